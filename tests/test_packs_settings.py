# SPDX-License-Identifier: Apache-2.0
"""Packs of models whose vocabulary differs from the base's, and drop rates that follow from the delta."""

import json

import ml_dtypes
import numpy as np
import pytest

import darekit as dk
import families
from darekit.errors import HomologyError, PlanError, RecipeError
from darekit.packing import jobs, spans
from darekit.packs import frames


def grown(llamas, folder, rows):
    """Base, and m0 with so many more (or fewer) tokens, configs and tokenizers included."""
    rng = np.random.default_rng(2)
    config = {"model_type": "llama", "vocab_size": families.VOCAB}
    families.save(folder / "base", llamas.base, config)
    (folder / "base/tokenizer.json").write_text("{}")
    tuned = dict(families.load(llamas.path / "m0"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more = rng.normal(0, 0.05, (max(rows, 0), families.HIDDEN)).astype(tuned[name].dtype)
        tuned[name] = np.concatenate([tuned[name], more])[: families.VOCAB + rows]
    families.save(folder / "m0", tuned, config | {"vocab_size": families.VOCAB + rows})
    (folder / "m0/tokenizer.json").write_text('{"added": true}')
    return folder / "base", folder / "m0"


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("rows", [3, -5])
def test_a_vocabulary_that_differs_is_cut_to_the_bases(llamas, tmp_path, rows, bits):
    base, tuned = grown(llamas, tmp_path, rows)
    out = tmp_path / "m.pack.safetensors"
    with pytest.raises(HomologyError, match="vocabularies differ"):
        dk.pack(base, tuned, out, drop_rate=0.9)
    dk.pack(base, tuned, out, drop_rate=0.9, bits=bits, vocab="base", seed=3)
    with dk.open_pack(out, base=base) as found:
        assert not found.verify().faults
        assert found.info()["settings"]["vocab"] == "base"
    dk.unpack(base, out, tmp_path / "unpacked")
    assert json.loads((tmp_path / "unpacked/config.json").read_text())["vocab_size"] == families.VOCAB
    assert (tmp_path / "unpacked/tokenizer.json").read_text() == "{}"
    if bits == 16:
        dk.drop(base, tuned, tmp_path / "dropped", drop_rate=0.9, vocab="base", seed=3)
        families.same(families.load(tmp_path / "unpacked"), families.load(tmp_path / "dropped"))


def test_vocabularies_that_are_refused(llamas, tmp_path, dare):
    base, tuned = grown(llamas, tmp_path, 1)
    out = tmp_path / "m.pack.safetensors"
    with pytest.raises(PlanError, match="expected strict or base"):
        dk.pack(base, tuned, out, drop_rate=0.9, vocab="pad")
    with pytest.raises(HomologyError, match="vocabularies differ"):
        dk.pack(base, tuned, out, lossless=True, vocab="base")
    for idle, said in (
        ({"seed": 3}, "seed = 3 would have no effect"),
        ({"bits": 4, "keep_dense": ["norms"]}, r"bits = 4, keep_dense = .* would have no effect; leave them out"),
    ):
        with pytest.raises(PlanError, match=said):
            dk.pack(base, tuned, out, lossless=True, **idle)
    said = dare("pack", base, tuned, out, "--lossless", "--seed", 3)
    assert said.code == 1 and "seed = 3 would have no effect" in " ".join(said.err.split()) and not out.exists()
    assert dare("pack", base, tuned, out, "-p", "0.9", "--vocab", "pad").code == 2
    assert dare("pack", base, tuned, out, "-p", "0.9", "--vocab", "base").code == 0


def test_a_drop_rate_of_each_tensor_from_its_delta(llamas, tmp_path, dare):
    base, tuned, out = llamas.path / "base", llamas.path / "m0", tmp_path / "m.pack.safetensors"
    found = dare("pack", base, tuned, out, "-p", "auto", "--tau", "0.3", "--seed", "5", "--json")
    assert found.code == 0, found.err
    recipe = {
        "base_model": str(base),
        "models": [{"model": str(tuned), "parameters": {"seed": 5}}],
        "sparsify": {"method": "dare", "drop_rate": "auto", "tau": 0.3},
        "merge_method": "task_arithmetic",
    }
    dk.merge(recipe, tmp_path / "merged")
    dk.unpack(base, out, tmp_path / "unpacked")
    families.same(families.load(tmp_path / "unpacked"), families.load(tmp_path / "merged"))
    with dk.open_pack(out) as pack:
        rates = {tensor.drop_rate for tensor in pack.tensors.values() if tensor.kind == "delta"}
        assert len(rates) > 3 and 0 < max(rates) < 1
        settings = pack.info()["settings"]
        assert (settings["drop_rate"], settings["tau"]) == ("auto", 0.3)
    assert "drop_rate auto" in dare("info", out).out
    for arguments in (("-p", "often"), ("-p", "0.9", "--tau", "0.1"), ("-p", "90")):
        assert dare("pack", base, tuned, tmp_path / "x.safetensors", *arguments).code == 2
    with pytest.raises(PlanError, match="can only be used with"):
        dk.pack(base, tuned, tmp_path / "x.safetensors", drop_rate=0.9, tau=0.1)
    with pytest.raises(PlanError, match="or auto"):
        dk.pack(base, tuned, tmp_path / "x.safetensors", drop_rate="often")


# --- packs where other commands take models


def total(live):
    """Every weight has its say, so a cell's score tells whether it is the same model."""
    return float(sum((i + 1) * p.double().square().sum() for i, p in enumerate(live.model.parameters())))


@pytest.mark.parametrize("real", ["llama"], indirect=True)
def test_a_sweep_takes_packs(real, tmp_path):
    pytest.importorskip("torch")
    base = real.path / "base"
    names = {"packs": [], "folders": []}
    for k in range(2):
        dk.pack(base, real.path / f"m{k}", tmp_path / f"m{k}.pack.safetensors", drop_rate=0.5, bits=8)
        dk.unpack(base, tmp_path / f"m{k}.pack.safetensors", tmp_path / f"m{k}")
        names["packs"].append(str(tmp_path / f"m{k}.pack.safetensors"))
        names["folders"].append(str(tmp_path / f"m{k}"))
    scores = {}
    for kind, models in names.items():
        recipe = {"base_model": str(base), "models": models, "merge_method": "task_arithmetic"}
        judge = {"sum": {"python": f"{__file__}:total"}}
        data = {"recipe": recipe, "axes": {"parameters.lambda": [0.5, 1]}, "test": judge}
        dk.sweep(data, tmp_path / kind, plots=False)
        cells = [json.loads(line) for line in (tmp_path / kind / "cells.jsonl").read_text().splitlines()]
        assert {cell["status"] for cell in cells} == {"ok"}
        scores[kind] = sorted(json.dumps([cell["kind"], cell["at"], cell["test"]]) for cell in cells)
    assert scores["packs"] == scores["folders"] and len(scores["packs"]) >= 2


@pytest.mark.parametrize(
    ("bits", "rate", "codec", "tries"), [(4, 0.99, "none", 4), (4, 0.9, "zstd", 4 + 17), (16, 0.9, "zstd", 1 + 17)]
)
def test_auto_asks_a_few_leaves_before_it_compresses(tmp_path, monkeypatch, bits, rate, codec, tries):
    rng = np.random.default_rng(5)
    base = rng.normal(0, 0.02, (17, 65536)).astype(ml_dtypes.bfloat16)
    tuned = (base.astype(np.float32) + rng.normal(0, 5e-4, base.shape)).astype(ml_dtypes.bfloat16)
    for name, weights in (("base", base), ("m0", tuned)):
        families.save(tmp_path / name, {"w.weight": weights})
    tried = []
    compress = frames.compress_leaves

    def counted(*arguments):
        tried.extend(arguments[-1])
        return compress(*arguments)

    for module in (frames, spans):
        monkeypatch.setattr(module, "compress_leaves", counted)
    out = tmp_path / "m.safetensors"
    dk.pack(tmp_path / "base", tmp_path / "m0", out, drop_rate=rate, bits=bits, seed=1, force=True)
    assert len(tried) == tries
    with dk.open_pack(out, base=tmp_path / "base") as found:
        assert found.tensors["w.weight"].codec == codec
        assert not found.verify().faults


@pytest.mark.parametrize(("same", "told"), [(700, True), (3, False)])
def test_rows_that_no_sample_told_of_are_found_while_leaves_are_made(tmp_path, monkeypatch, same, told):
    """Of 4000 rows some did not change, none of the 64 that are looked at first: the file is that of comparing all."""
    rng = np.random.default_rng(6)
    base = rng.normal(0, 0.02, (4000, 40)).astype(ml_dtypes.bfloat16)
    tuned = (base.astype(np.float32) + rng.normal(0, 5e-3, base.shape)).astype(ml_dtypes.bfloat16)
    sampled = [row * 3999 // (jobs.SAMPLED_ROWS - 1) for row in range(jobs.SAMPLED_ROWS)]
    rows = np.setdiff1d(np.arange(4000), sampled)[:same]
    tuned[rows] = base[rows]
    for name, weights in (("base", base), ("m0", tuned)):
        families.save(tmp_path / name, {"model.embed_tokens.weight": weights})
    options = {"drop_rate": 0.5, "bits": 4, "seed": 1, "force": True}
    found, compared = tmp_path / "found.safetensors", tmp_path / "compared.safetensors"
    dk.pack(tmp_path / "base", tmp_path / "m0", found, **options)
    monkeypatch.setattr(jobs, "_has_same_row", lambda *_: True)
    dk.pack(tmp_path / "base", tmp_path / "m0", compared, **options)
    assert found.read_bytes() == compared.read_bytes()
    with dk.open_pack(found, base=tmp_path / "base") as pack:
        assert ("model.embed_tokens.weight" in pack._source.rows) == told
        assert not pack.verify().faults
        delta = pack.delta("model.embed_tokens.weight")
        assert not delta[rows].any()
        assert delta.any(axis=1).sum() > 3000 - same


@pytest.mark.parametrize("command", ["drop", "pack"])
def test_options_that_make_no_recipe_are_told_as_options(llamas, tmp_path, dare, command):
    base, model = llamas.path / "base", llamas.path / "m0"
    done = dare(command, base, model, tmp_path / "out.safetensors", "-p", "0.9", "--keep-dense", "nosuch")
    assert done.code == 1 and done.err.startswith("dare: keep_dense.0: 'nosuch' is neither a group (embeddings, ")
    given = {"tau": -3.0} if command == "pack" else {"parameters": {"tau": -3.0}}
    with pytest.raises(RecipeError, match=r"^tau must be in \[0\.001, 1\], found -3"):
        getattr(dk, command)(base, model, tmp_path / "out.safetensors", drop_rate="auto", **given)
