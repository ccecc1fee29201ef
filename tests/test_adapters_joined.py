# SPDX-License-Identifier: Apache-2.0
"""LoRAs in, one LoRA out: sums are exact, truncation is the closest one, core space does what its definition says, and
nothing that an adapter brings beside its factors is lost."""

import json
import sys
import zlib

import numpy as np
import pytest
from safetensors.numpy import load_file

import darekit as dk
import families
from darekit.masks import kept, stream_of
from darekit.methods.merging import ties

lora = pytest.importorskip("lora")  # needs PEFT

ATTENTION = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A base with three adapters of other ranks and layers."""
    root = tmp_path_factory.mktemp("three")
    lora.make(root, "a", seed=1, **ATTENTION)
    lora.make(root, "b", seed=2, r=6, lora_alpha=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    lora.make(root, "c", seed=3, use_rslora=True, **ATTENTION)
    return root


def recipe(root, *names, weights=(0.7, -0.4, 1.1), method="task_arithmetic", **keys):
    return {
        "base_model": str(root / "base"),
        "models": [{"model": str(root / name), "parameters": {"weight": weight}}
                   for name, weight in zip(names, weights, strict=False)],
        "merge_method": method, "output": "adapter", **keys,
    }  # fmt: skip


def product(folder, module):
    """B A of a module in an adapter's file, in float64; 0 where it has none."""
    tensors = load_file(folder / "adapter_model.safetensors")
    key = f"base_model.model.{module}.lora_"
    if f"{key}A.weight" not in tensors:
        return 0.0
    return tensors[f"{key}B.weight"].astype(np.float64) @ tensors[f"{key}A.weight"].astype(np.float64)


SCALES = {"a": 6 / 4, "b": 3 / 6, "c": 6 / 2}
MODULES = [
    f"model.layers.{i}.{one}" for i in range(2) for one in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]


def delta(root, name, module):
    return SCALES[name] * product(root / name, module)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_sums_are_exact(three, tmp_path, method, scale):
    keys = {"parameters": {"lambda": scale}} if method == "task_arithmetic" else {}
    report = dk.extract(None, recipe(three, "a", "b", "c", method=method, **keys), tmp_path / "out")
    divisor = 0.7 - 0.4 + 1.1 if method == "linear" else 1 / scale
    ranks = {one.module: one.rank for one in report.modules}
    for module in MODULES:
        own = {name: delta(three, name, module) for name in "abc"}
        wanted = (0.7 * own["a"] - 0.4 * own["b"] + 1.1 * own["c"]) / divisor
        assert np.linalg.norm(product(tmp_path / "out", module) - wanted) <= 1e-6 * np.linalg.norm(wanted)
        assert ranks[module] == sum(np.ndim(one) > 0 and (6 if name == "b" else 4) for name, one in own.items())
    assert report.error < 1e-6 and any("their sum is exact" in note for note in report.notes)


def test_a_rank_gives_the_closest_product(three, tmp_path):
    report = dk.extract(None, recipe(three, "a", "b", "c", rank=3), tmp_path / "out")
    for one in report.modules:
        if not one.rank:
            continue
        wanted = 0.7 * delta(three, "a", one.module) - 0.4 * delta(three, "b", one.module)
        wanted = wanted + 1.1 * delta(three, "c", one.module)
        u, s, vt = np.linalg.svd(wanted)
        best = (u[:, :3] * s[:3]) @ vt[:3]
        assert np.linalg.norm(product(tmp_path / "out", one.module) - best) <= 1e-5 * np.linalg.norm(wanted)
        assert one.error == pytest.approx(np.sqrt(np.sum(s[3:] ** 2) / np.sum(s**2)), rel=1e-4)


def test_peft_and_darekit_read_what_is_written(three, tmp_path):
    """PEFT's merge of the one adapter is darekit's merge of the three."""
    import peft
    import transformers

    data = recipe(three, "a", "b", "c")
    dk.extract(None, data, tmp_path / "one")
    data.pop("output")
    dk.merge(data, tmp_path / "whole")
    model = transformers.AutoModelForCausalLM.from_pretrained(three / "base")
    peft.PeftModel.from_pretrained(model, tmp_path / "one").merge_and_unload().save_pretrained(tmp_path / "merged")
    lora.agree(tmp_path / "merged", tmp_path / "whole", within=1e-5)
    lora.merge(tmp_path / "again", three / "base", tmp_path / "one")
    lora.agree(tmp_path / "again", tmp_path / "whole", within=1e-5)


def cores(root, module, names):
    """The definition: U, V and each M_k, in float64, with numpy alone."""
    factors = []
    for name in names:
        tensors = load_file(root / name / "adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        factors.append((np.float32(SCALES[name]) * b.astype(np.float32), a))
    u = np.linalg.svd(np.concatenate([b for b, _ in factors], axis=1).astype(np.float64), full_matrices=False)[0]
    v = np.linalg.svd(np.concatenate([a for _, a in factors], axis=0).T, full_matrices=False)[0]
    signed = [x * np.where(x[np.abs(x).argmax(0), np.arange(x.shape[1])] < 0, -1, 1) for x in (u, v)]
    u, v = signed
    return u, v, [(u.T @ b) @ (a @ v) for b, a in factors]


def test_ties_in_core_space_is_its_definition(three, tmp_path):
    report = dk.extract(None, recipe(three, "a", "c", weights=(1.0, 1.0), method="ties"), tmp_path / "out")
    assert any("core space" in note for note in report.notes)
    module = "model.layers.0.self_attn.v_proj"
    u, v, found = cores(three, module, "ac")
    merged = ties(np.stack([one.reshape(-1) for one in found]).astype(np.float32), np.ones(2), normalize=True)
    wanted = u @ merged.reshape(found[0].shape) @ v.T
    assert np.linalg.norm(product(tmp_path / "out", module) - wanted) <= 1e-4 * np.linalg.norm(wanted)


def test_dare_in_core_space_is_its_definition(three, tmp_path):
    data = recipe(three, "a", "c", weights=(1.0, 1.0), sparsify={"method": "dare", "drop_rate": 0.5})
    for entry, seed in zip(data["models"], (11, 12), strict=True):
        entry["parameters"]["seed"] = seed
    dk.extract(None, data, tmp_path / "out")
    module = "model.layers.1.self_attn.v_proj"
    u, v, found = cores(three, module, "ac")
    stream = stream_of(f"{module}.weight")
    masks = [kept(seed, stream, 0, found[0].size, 0.5).reshape(found[0].shape) for seed in (11, 12)]
    wanted = u @ sum(2 * one * mask for one, mask in zip(found, masks, strict=True)) @ v.T
    assert np.linalg.norm(product(tmp_path / "out", module) - wanted) <= 1e-4 * np.linalg.norm(wanted)


def test_dare_on_whole_products_is_one_flag_away(three, tmp_path):
    """`dare extract` of the same recipe without output: adapter drops elements of the full deltas."""
    data = recipe(three, "a", "c", sparsify={"method": "dare", "drop_rate": 0.5})
    data.pop("output")
    report = dk.extract(three / "base", data, tmp_path / "out", energy=1, save=[])
    dk.merge(data, tmp_path / "whole")
    after, before = families.load(tmp_path / "whole"), families.load(three / "base")
    for one in report.modules:
        if one.rank:
            wanted = after[one.name].astype(np.float64) - before[one.name]
            assert np.linalg.norm(product(tmp_path / "out", one.module) - wanted) <= 1e-4 * np.linalg.norm(wanted)


def test_what_adapters_bring_beside_factors_is_merged_and_saved_whole(tmp_path):
    more = {"modules_to_save": ["embed_tokens"], "bias": "none"}
    lora.make(tmp_path, "a", seed=1, **ATTENTION, **more)
    lora.make(tmp_path, "b", seed=2, **ATTENTION)
    report = dk.extract(None, recipe(tmp_path, "a", "b"), tmp_path / "out")
    assert [one.name for one in report.tensors if one.saved and one.norm] == ["model.embed_tokens.weight"]
    data = recipe(tmp_path, "a", "b")
    data.pop("output")
    dk.merge(data, tmp_path / "whole")
    lora.merge(tmp_path / "again", tmp_path / "base", tmp_path / "out")
    lora.agree(tmp_path / "again", tmp_path / "whole", within=1e-5)


def test_dora_takes_a_full_matrix_and_a_rank(tmp_path, dare):
    lora.make(tmp_path, "a", seed=1, use_dora=True, **ATTENTION)
    lora.make(tmp_path, "b", seed=2, **ATTENTION)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(tmp_path, "a", "b")))
    done = dare("merge", tmp_path / "r.yaml", tmp_path / "out")
    assert done.code == 1 and "DoRA" in done.err and "give a rank" in done.err and not (tmp_path / "out").exists()
    done = dare("merge", tmp_path / "r.yaml", tmp_path / "out", "--set", "rank=32")
    assert done.code == 0, done.err
    data = recipe(tmp_path, "a", "b")
    data.pop("output")
    dk.merge(data, tmp_path / "whole")
    lora.merge(tmp_path / "again", tmp_path / "base", tmp_path / "out")
    lora.agree(tmp_path / "again", tmp_path / "whole", within=1e-5)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Qwen3MoeForCausalLM"])
def test_other_families_are_joined_alike(tmp_path, name):
    targets = {
        "GPT2LMHeadModel": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        "Qwen3MoeForCausalLM": {"target_modules": ["q_proj"], "lora_dropout": 0.0,
                                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    }[name]  # fmt: skip
    for i, adapter in enumerate("ab"):
        lora.make(tmp_path, adapter, name, seed=i, **targets)
    report = dk.extract(None, recipe(tmp_path, "a", "b"), tmp_path / "out")
    assert report.error < 1e-5 and max(one.rank for one in report.modules) == 8
    data = recipe(tmp_path, "a", "b")
    data.pop("output")
    dk.merge(data, tmp_path / "whole")
    lora.merge(tmp_path / "again", tmp_path / "base", tmp_path / "out")
    lora.agree(tmp_path / "again", tmp_path / "whole", within=1e-5)


def test_no_full_matrix_is_ever_read(three, tmp_path, monkeypatch):
    from darekit.extraction.deltas import Reader

    monkeypatch.setattr(Reader, "matrix", lambda *arguments: pytest.fail("a full matrix"))
    dk.extract(None, recipe(three, "a", "b", "c", rank=4), tmp_path / "sum")
    dk.extract(None, recipe(three, "a", "c", method="ties", parameters={"keep": 0.5}), tmp_path / "ties")


def test_what_cannot_be_joined(three, tmp_path, dare):
    def told(data, *more):
        (tmp_path / "r.yaml").write_text(json.dumps(data))
        done = dare("merge", tmp_path / "r.yaml", tmp_path / "out", *more)
        assert done.code == 1 and "Traceback" not in done.err and not (tmp_path / "out").exists()
        return done.err

    assert "a-merged is not one" in told(recipe(three, "a", "a-merged"))
    assert "output: adapter" in told(recipe(three, "a") | {"output": "model", "rank": 4})
    assert "above 0" in told(recipe(three, "a", rank=0))
    assert "one of model, adapter" in told(recipe(three, "a") | {"output": "lora"})
    assert "--resume" in told(recipe(three, "a"), "--resume")
    nothing = recipe(three, "a")
    nothing.pop("base_model")
    assert "base_model" in told(nothing | {"merge_method": "linear"})
    with pytest.raises(dk.DarekitError, match="use `dare merge`"):
        dk.merge(recipe(three, "a"), tmp_path / "out")


def test_a_dry_run_and_a_merge_from_the_command_line(three, tmp_path, dare):
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(three, "a", "b", rank=4)))
    done = dare("merge", tmp_path / "r.yaml", tmp_path / "out", "--dry-run")
    assert done.code == 0 and "Would write" in done.out and not (tmp_path / "out").exists()
    done = dare("merge", tmp_path / "r.yaml", tmp_path / "out", "--json")
    assert done.data["rank"] == 4
    found = dk.read_recipe(tmp_path / "r.yaml")
    assert (found.output, found.rank) == ("adapter", 4) and dk.read_recipe(found.to_data()) == found


def test_elsewhere_the_recipe_is_the_whole_merge_and_that_is_told(three, tmp_path, dare):
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(three, "a", "b", rank=2)))
    done = dare("check", tmp_path / "r.yaml")
    assert done.code == 0 and "stands for the whole merged model, of full rank" in " ".join(done.out.split())
    done = dare("merge", tmp_path / "r.yaml", tmp_path / "out")
    assert done.code == 0 and "stands for the whole" not in done.out + done.err


def test_one_adapter_can_be_made_smaller(three, tmp_path):
    report = dk.extract(three / "base", f"{three / 'base'}+{three / 'b'}", tmp_path / "out", rank=2)
    for one in report.modules:
        if one.rank:
            u, s, vt = np.linalg.svd(delta(three, "b", one.module))
            best = (u[:, :2] * s[:2]) @ vt[:2]
            assert np.linalg.norm(product(tmp_path / "out", one.module) - best) <= 1e-5 * s[0]


def test_a_recipe_for_an_adapter_is_judged_as_the_model_that_it_makes(three, tmp_path):
    """A judge of folders gets the merged model, the very bytes that the recipe without `output: adapter` writes."""
    data = recipe(three, "a", "c")
    dk.merge({key: value for key, value in data.items() if key != "output"}, tmp_path / "model")
    (tmp_path / "judge.py").write_text(
        "import json, pathlib, sys, zlib\n"
        "print(json.dumps({'sum': zlib.crc32(pathlib.Path(sys.argv[1], 'model.safetensors').read_bytes())}))\n"
    )
    judge = {"command": [sys.executable, str(tmp_path / "judge.py")]}
    (found,) = dk.evaluate([data], judge=judge).evaluations
    expected = zlib.crc32((tmp_path / "model" / "model.safetensors").read_bytes())
    assert found.error is None and found.scores["sum"].value == expected
