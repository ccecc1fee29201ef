# SPDX-License-Identifier: Apache-2.0
"""Adapters as they lie about: how they are named, on which base they are put, and files that are not what they say."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

import darekit as dk
import families
import lora
import oracle
import sources
from darekit.checkpoints import open_checkpoint, sample_digest, traits_of
from darekit.errors import CheckpointError, DataError, HomologyError, PlanError, RecipeError, Unsupported
from darekit.inputs.adapters.config import read_config
from darekit.inputs.adapters.strengths import strengths_of
from darekit.planning.opening import open_models, open_plan
from darekit.recipe import read_recipe
from hub_server import dare as from_hub
from test_sources import merged as run_plan

Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base, a and b, made once; tests that change a file copy it."""
    root = tmp_path_factory.mktemp("made")
    lora.make(root, "a", target_modules=["q_proj", "down_proj"])
    lora.make(root, "b", target_modules=["q_proj"], seed=1, r=2)
    for name in "ab":
        lora.edit(root / name, base_model_name_or_path="base")
    return root


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """The same in a working directory of its own."""
    for name in ("base", "a", "b", "a-merged"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(model, out="out", base="base", **keys):
    lora.merge(Path(out), base, model, **keys)
    return families.load(out)


def said(error, *words):
    for word in words:
        assert word in str(error.value), str(error.value)


# --- names


def test_every_way_to_name_one(here):
    wanted = merged("a")
    lora.agree("out", "a-merged")
    for name in (
        "base+a",
        " base + a ",
        "./base+./a",
        f"{here}/base+{here}/a",
        str(here / "a"),
        "a/adapter_model.safetensors",
    ):
        families.same(merged(name), wanted)
    for entry in ({"model": "base", "lora": "a"}, {"model": {"path": "base"}, "lora": {"path": "a"}}):
        recipe = {"base_model": "base", "models": [{"model": entry}], "merge_method": "task_arithmetic"}
        dk.merge(recipe | {"parameters": {"normalize": False}}, "out", overwrite=True)
        families.same(families.load("out"), wanted)


def test_a_plus_in_a_name(here):
    wanted = merged("a")
    Path("base").rename("my+base")
    Path("a").rename("my+lora")
    lora.edit("my+lora", base_model_name_or_path="my+base")
    for name in ("my+base+my+lora", "my+lora"):
        families.same(merged(name, base="my+base"), wanted)
    Path("my+base").rename("x+my")  # a folder of the whole name goes before
    shutil.copytree("a-merged", "x+my+my+lora")
    families.same(merged("x+my+my+lora", base="x+my"), families.load("a-merged"))


def test_an_adapter_upon_an_adapter(here):
    found = merged("base+a+b")
    base, one, other = (families.load("base"), merged("a", "one"), merged("b", "two"))
    for name in found:
        assert np.allclose(found[name] - base[name], one[name] - base[name] + other[name] - base[name], atol=1e-7)
    with open_models("base", ["base+a+b"]) as (origin, (model,)):
        q = model.tensors["model.layers.0.self_attn.q_proj.weight"]
        assert traits_of(q.source).delta.base == origin.tensors[q.name].source  # exact down to the base


def test_an_adapter_on_another_model(here):
    shutil.copytree("a-merged", "tuned")
    found, tuned = merged("tuned+b"), families.load("tuned")
    base, other = families.load("base"), merged("b", "two")
    for name in found:
        assert np.allclose(found[name], tuned[name] + (other[name] - base[name]), atol=1e-7)


def test_without_a_base_it_is_put_on_the_one_that_it_names(here):
    recipe = {"models": [{"model": "a"}, {"model": "base+b"}], "merge_method": "linear"}
    dk.merge(recipe, "mean")
    one, other = merged("a", "one"), merged("b", "two")
    for name, values in families.load("mean").items():
        assert np.allclose(values, (one[name] + other[name]) / 2, atol=1e-7)
    lora.edit("a", base_model_name_or_path="elsewhere/gone")
    with pytest.raises(PlanError) as error:
        dk.merge(recipe, "mean", overwrite=True)
    said(error, "the one that it names cannot be opened", "BASE+a", "elsewhere/gone")
    lora.edit("a", base_model_name_or_path=None)
    with pytest.raises(PlanError, match="names no base"):
        dk.merge(recipe, "mean", overwrite=True)


def test_as_the_base(here):
    shutil.copytree("a-merged", "tuned")
    found = merged("tuned", base="base+a")  # nearly nothing is left
    for name, values in families.load("a-merged").items():
        assert np.allclose(found[name], values, atol=1e-6)


def test_a_base_that_it_does_not_name(here):
    shutil.copytree("a-merged", "other")
    with pytest.raises(PlanError) as error:
        merged("a", base="other")
    said(error, "a is an adapter for base", "other+a", "base+a")
    merged("other+a", base="other")  # told
    lora.edit("a", base_model_name_or_path="/nowhere/llama")
    done = lora.merge(Path("out"), "base", "a")
    assert any("names /nowhere/llama as its base, and is used on base" in note for note in done.notes)
    for same in (str(here / "base"), "/somebody/elses/base"):
        lora.edit("a", base_model_name_or_path=same)
        assert not any("names" in note for note in lora.merge(Path("out"), "base", "a").notes)
    shutil.copytree("base", "copy")
    lora.edit("a", base_model_name_or_path="copy")  # equal content
    assert not any("names" in note for note in lora.merge(Path("out"), "base", "a").notes)


def test_what_is_not_there(here):
    with pytest.raises(CheckpointError, match="there is no adapter 'gone'"):
        merged("base+gone")
    with pytest.raises(CheckpointError, match=r"whole model, expected an adapter after the plus|there is no adapter"):
        merged("base+a-merged")


def test_an_order_of_experts_for_what_is_no_adapter(here):
    models = [{"model": "a-merged", "experts_layout": "peft"}]
    with pytest.raises(PlanError, match="is not an adapter, so it has no experts_layout"):
        dk.merge({"base_model": "base", "models": models, "merge_method": "task_arithmetic"}, "out")


def test_what_a_dry_run_shows(here, dare):
    Path("r.yaml").write_text(json.dumps({"base_model": "base", "models": ["a", "b"], "merge_method": "ties"}))
    shown = dare("merge", "r.yaml", "out", "--dry-run").out
    assert "||sBA||/||W||" in shown and "down_proj" in shown
    rows = json.loads(dare("merge", "r.yaml", "out", "--dry-run", "--json").out)["adapters"]
    assert {(row["kind"], row["modules"]) for row in rows["a"]} == {("down_proj", 2), ("q_proj", 2)}
    assert [row["kind"] for row in rows["b"]] == ["q_proj"] and rows["b"][0]["relative"] > 0


def test_a_pack_says_that_it_rounds(here):
    report = dk.pack("base", "a", "a.safetensors", drop_rate=0.5)
    assert any("rounded to the base's number format" in note for note in report.notes)
    dk.unpack("base", "a.safetensors", "restored")
    assert families.load("restored").keys() == families.load("base").keys()


# --- what a view is


def test_its_sources_are_as_sources_must_be(here):
    with open_models("base", ["a", "base+a+b"]) as (_, models):
        for model in models:
            for info in model.tensors.values():
                if "down_proj" in info.name or "q_proj" in info.name:
                    raw = np.empty(info.nbytes, np.uint8)
                    info.source.read_into(raw, 0)
                    sources.conform(info.source, info.dtype, raw.tobytes())


def test_its_digest_is_its_own_and_frozen(tmp_path):
    weights = {"model.layers.0.mlp.up_proj.weight": np.arange(24, dtype=np.float32).reshape(6, 4)}
    families.save(tmp_path / "base", weights)
    (tmp_path / "a").mkdir()
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    factors = {name.format("A"): np.arange(8).reshape(2, 4), name.format("B"): np.arange(12).reshape(6, 2)}
    families.write_safetensors(
        tmp_path / "a" / "adapter_model.safetensors", {n: v.astype(np.float32) for n, v in factors.items()}
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))

    def digest():
        with open_models(tmp_path / "base", [tmp_path / "a"]) as (_, (model,)):
            return sample_digest(model).hex()

    assert digest() == "2d27af671f75375219653d4d3372342e"
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 4}))
    assert digest() != "2d27af671f75375219653d4d3372342e"


def test_dare_and_ties_act_on_the_product(here):
    recipe = {
        "base_model": "base", "models": [{"model": "a"}, {"model": "b"}], "merge_method": "ties",
        "sparsify": {"method": "dare", "drop_rate": 0.5, "seed": 3}, "parameters": {"keep": 1.0, "lambda": 1.0},
    }  # fmt: skip
    with open_models("base", ["a", "b"]) as (_, models):
        deltas = []
        for model in models:
            info = model.tensors["model.layers.1.self_attn.q_proj.weight"]
            delta = np.empty(info.shape, np.float32)
            traits_of(info.source).delta.read_into(delta.reshape(-1), 0)
            deltas.append(delta)
    dk.merge(recipe, "out")
    seeds = json.loads(Path("out/darekit.lock.json").read_text())["effective_seeds"]
    base = families.load("base")[info.name]
    wanted = base + oracle.merge(
        info.name, np.zeros_like(base), deltas, seeds=seeds, sparsify=("dare", {"drop_rate": 0.5}), method="ties"
    )
    assert np.allclose(families.load("out")[info.name], wanted, atol=1e-7)


def test_how_much_it_changes(here):
    with open_models("base", ["a"]) as (_, (model,)):
        rows = {row.kind: row for row in strengths_of(model)}
    base, after = families.load("base"), families.load("a-merged")
    for kind in ("q_proj", "down_proj"):
        names = [name for name in base if kind in name]
        change = np.sqrt(sum(np.square(after[name].astype(float) - base[name]).sum() for name in names))
        norm = np.sqrt(sum(np.square(base[name].astype(float)).sum() for name in names))
        assert rows[kind].modules == 2
        assert rows[kind].change == pytest.approx(change, rel=1e-5)
        assert rows[kind].ratio == pytest.approx(change / norm, rel=1e-5)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear"])
def test_nothing_depends_on_lanes_tiles_and_threads(method, tmp_path):
    """BF16, so that the fast lane takes what it can: adapters (one with DoRA) beside a whole model, dropped."""
    import tiny

    tiny.build("LlamaForCausalLM", intermediate_size=600).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    lora.make(tmp_path, "a", target_modules=["q_proj", "up_proj", "down_proj"])
    lora.make(tmp_path, "d", target_modules=["up_proj"], use_dora=True, seed=1)
    base = "" if method == "linear" else str(tmp_path / "base")
    recipe = {
        "models": [f"{tmp_path}/base+{tmp_path}/a", f"{tmp_path}/base+{tmp_path}/d", str(tmp_path / "a-merged")],
        "merge_method": method,
        **({"base_model": base, "sparsify": {"method": "dare", "drop_rate": 0.5}} if base else {}),
    }  # fmt: skip
    with open_plan(read_recipe(recipe), shard_size=1) as plan:
        wanted, _ = run_plan(plan)
        for tile, threads in ((1000, 1), (4096, 3), (65536, 2)):
            found, done = run_plan(plan, tile=tile, threads=threads)
            assert found == wanted, (tile, threads)
        kept = done.records["model.layers.0.mlp.up_proj.weight"]
        assert set(kept["models"]) == {"2"}  # of adapters no bytes were asked for
        assert set(kept["kept"]) == {"0", "1", "2"}


# --- other files


def test_pickled(here):
    tensors = families.load_file("a/adapter_model.safetensors")
    wanted = merged("a")
    torch.save({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}, "a/adapter_model.bin")
    Path("a/adapter_model.safetensors").unlink()
    families.same(merged("a"), wanted)
    torch.save({"x": Path("y")}, "a/adapter_model.bin")
    with pytest.raises((Unsupported, CheckpointError)):
        merged("a")


def test_names_of_older_versions(here):
    wanted = merged("a")
    lora.rewrite("a", lambda tensors: {n.replace(".weight", ".default.weight"): v for n, v in tensors.items()})
    families.same(merged("a"), wanted)
    lora.edit("a", **dict.fromkeys(("peft_version", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias")))
    families.same(merged("a"), wanted)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx(kind, here):
    adapter = lora.make(here, "m", target_modules=["q_proj"], use_dora=kind == "dora")
    wanted = merged("m")
    tensors = families.load_file(adapter / "adapter_model.safetensors")
    shutil.rmtree(adapter)
    adapter.mkdir()
    ends = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
    made = {}
    for name, value in tensors.items():
        end = next(end for end in ends if name.endswith(end))
        name = name.removeprefix("base_model.model.").removesuffix(end) + ends[end]
        made[name] = np.ascontiguousarray(value.T)
    families.write_safetensors(adapter / "adapters.safetensors", made)
    settings = {"rank": 4, "scale": 1.5, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": settings, "model": "base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    found = merged("m")
    for name, values in wanted.items():
        assert np.allclose(found[name], values, atol=1e-7), name


def test_a_vocabulary_and_a_tokenizer_of_its_own(here):
    import tiny

    tiny.tokenizer("base", size=60)
    tiny.tokenizer("a", size=62)
    with open_models("base", ["a"]) as (base, (model,)):
        assert model.companions["tokenizer.json"] != base.companions["tokenizer.json"]
        assert Path(model.companions["tokenizer.json"]).parent.name == "a"


# --- experts


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_grouped_experts(tmp_path):
    adapter = lora.make(tmp_path, "a", "Qwen3MoeForCausalLM", target_modules=[], target_parameters=EXPERTS)

    def slow(tensors):
        for name, value in tensors.items():
            if "lora_B" in name:  # (out, r E), expert fast -> slow
                tensors[name] = value.reshape(value.shape[0], 4, 4).transpose(0, 2, 1).reshape(value.shape).copy()

    lora.rewrite(adapter, slow)
    lora.edit(adapter, auto_mapping={"base_model_class": "Qwen3MoeForCausalLM", "unsloth_fixed": True})
    with pytest.raises(PlanError) as error:
        lora.merge(tmp_path / "out", tmp_path / "base", adapter)
    said(error, "Unsloth", "experts_layout: grouped", "lora_B_layout")
    recipe = {
        "base_model": str(tmp_path / "base"), "merge_method": "task_arithmetic",
        "models": [{"model": str(adapter), "experts_layout": "grouped"}],
    }  # fmt: skip
    dk.merge(recipe, tmp_path / "out")
    lora.agree(tmp_path / "out", tmp_path / "a-merged")
    recipe["models"][0]["experts_layout"] = "peft"
    dk.merge(recipe, tmp_path / "out", overwrite=True)
    with pytest.raises(AssertionError):
        lora.agree(tmp_path / "out", tmp_path / "a-merged")
    lora.edit(adapter, lora_B_layout="grouped_by_expert")
    lora.merge(tmp_path / "out", tmp_path / "base", adapter)
    lora.agree(tmp_path / "out", tmp_path / "a-merged")
    recipe["models"][0]["experts_layout"] = "group"
    with pytest.raises(RecipeError, match="experts_layout must be one of peft, grouped"):
        dk.merge(recipe, tmp_path / "out", overwrite=True)


def test_experts_one_by_one_on_a_base_that_has_them_in_one(tmp_path):
    adapter = lora.make(tmp_path, "a", "Qwen3MoeForCausalLM", target_modules=[], target_parameters=EXPERTS)
    lora.merge(tmp_path / "out", tmp_path / "base", adapter)
    apart = families.load(tmp_path / "base")
    rng = np.random.default_rng(0)
    factors, deltas = {}, {}
    for name, value in apart.items():
        if ".experts." in name and rng.random() < 0.7:
            a, b = (
                rng.standard_normal(s).astype(np.float32) * 0.05 for s in ((3, value.shape[1]), (value.shape[0], 3))
            )
            module = name.removesuffix(".weight")
            factors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
            deltas[name] = 2 * (b.astype(float) @ a)
    (tmp_path / "each").mkdir()
    families.write_safetensors(tmp_path / "each" / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
    (tmp_path / "each" / "adapter_config.json").write_text(json.dumps(config))
    lora.merge(tmp_path / "one", tmp_path / "base", tmp_path / "each")
    for name, value in families.load(tmp_path / "one").items():
        assert np.allclose(value, apart[name] + deltas.get(name, 0), atol=1e-6), name
    # The same base, fused as it is in memory.
    fused, wanted = dict(apart), {n: v + deltas.get(n, 0) for n, v in apart.items()}
    for tensors in (fused, wanted):
        for layer in range(2):
            at = f"model.layers.{layer}.mlp.experts"
            kinds = {
                kind: [tensors.pop(f"{at}.{e}.{kind}_proj.weight") for e in range(4)] for kind in ("gate", "up", "down")
            }
            pairs = zip(kinds["gate"], kinds["up"], strict=True)
            tensors[f"{at}.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in pairs])
            tensors[f"{at}.down_proj"] = np.stack(kinds["down"])
    shutil.copytree(tmp_path / "base", tmp_path / "fused")
    families.write_safetensors(tmp_path / "fused" / "model.safetensors", fused)
    lora.merge(tmp_path / "two", tmp_path / "fused", tmp_path / "each")
    for name, value in families.load(tmp_path / "two").items():
        assert np.allclose(value, wanted[name], atol=1e-6), name
    lora.merge(tmp_path / "three", tmp_path / "fused", f"{tmp_path}/fused+{adapter}")
    back = families.load(tmp_path / "three")
    for name, value in families.load(tmp_path / "a-merged").items():
        if name in back:
            assert np.allclose(back[name], value, atol=1e-6), name


# --- what is wrong with files


def broken(here, change=None, **config):
    if change is not None:
        lora.rewrite("a", change)
    if config:
        lora.edit("a", **config)


def put(name, value):
    def change(tensors):
        tensors[name] = value

    return change


def take(name):
    def change(tensors):
        del tensors[name]

    return change


A0, B0 = Q.format(0, "A"), Q.format(0, "B")
HOSTILE = {
    "a half": (take(B0), {}, CheckpointError, "lora_A without lora_B"),
    "the other half": (take(A0), {}, CheckpointError, "lora_B without lora_A"),
    "a rank that lies": (None, {"r": 5}, CheckpointError, "has rank 5 by the config, but its factors have rank 4"),
    "ranks that differ": (put(A0, np.ones((3, 32), np.float32)), {}, CheckpointError, "with one r"),
    "another width": (put(A0, np.ones((4, 31), np.float32)), {}, HomologyError, "whose product is [32, 31]"),
    "a vector": (put(A0, np.ones(32, np.float32)), {}, CheckpointError, "expected [r, in]"),
    "no elements": (put(A0, np.ones((0, 32), np.float32)), {}, CheckpointError, "with one r. Empty ones are left"),
    "NaN": (put(A0, np.full((4, 32), np.nan, np.float32)), {}, DataError, "NaN or Inf in 1 of its tensors"),
    "Inf": (put(B0, np.full((32, 4), np.inf, np.float32)), {}, DataError, "128 values"),
    "integers": (put(B0, np.ones((32, 4), np.int32)), {}, CheckpointError, "I32"),
    "names that match nothing": (
        put("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", np.ones((4, 32), np.float32)),
        {}, HomologyError, "does not have: model.layers.7.self_attn.q_proj.weight (near it: ",
    ),
    "names of nothing": (put("whatever.gain", np.ones(1, np.float32)), {}, HomologyError, "whatever.gain"),
    "a NaN for alpha": (None, {"lora_alpha": float("nan")}, CheckpointError, "expected a finite number"),
    "a text for alpha": (None, {"lora_alpha": "8"}, CheckpointError, "expected a finite number"),
    "an alpha beyond float32": (None, {"lora_alpha": 1e300}, CheckpointError, "scale"),
    "a rank of 0": (None, {"r": 0}, CheckpointError, "expected a whole number from 1 on"),
    "a pattern that is none": (None, {"rank_pattern": {"(": 3}}, CheckpointError, "neither"),
    "a list for a mapping": (None, {"rank_pattern": [3]}, CheckpointError, "expected a mapping"),
    "biases of its own kind": (None, {"bias": "some"}, CheckpointError, "none, all or lora_only"),
    "magnitudes that are missing": (None, {"use_dora": True}, CheckpointError, "no lora_magnitude_vector"),
    "magnitudes of another layer": (
        put("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", np.ones(31, np.float32)),
        {}, CheckpointError, "has 31 elements, expected 32",
    ),
    "factors of nothing": (
        put("base_model.model.model.layers.0.self_attn.k_proj.lora_magnitude_vector", np.ones(32, np.float32)),
        {}, CheckpointError, "without factors",
    ),
    "a norm of another size": (
        put("base_model.model.model.norm.weight", np.ones(31, np.float32)), {}, HomologyError, "has shape [31]",
    ),
    "PiSSA": (None, {"init_lora_weights": "pissa_niter_4"}, Unsupported, "a PiSSA adapter"),
    "OLoRA": (None, {"init_lora_weights": "olora"}, Unsupported, "path_initial_model_for_weight_conversion"),
    "CorDA": (None, {"init_lora_weights": "corda"}, Unsupported, "CorDA"),
    "LoRA-GA": (None, {"init_lora_weights": "lora_ga"}, Unsupported, "LoRA-GA"),
    "KaSA": (None, {"kasa_config": {"beta": 1}}, Unsupported, "KaSA"),
    "aLoRA": (None, {"alora_invocation_tokens": [1]}, Unsupported, "aLoRA"),
    "QALoRA": (None, {"use_qalora": True}, Unsupported, "QALoRA"),
    "Arrow": (None, {"arrow_config": {"x": 1}}, Unsupported, "Arrow"),
    "layers that are repeated": (None, {"layer_replication": [[0, 2], [1, 2]]}, Unsupported, "layer_replication"),
    "BD-LoRA": (None, {"use_bdlora": {"nblocks": 2}}, Unsupported, "BD-LoRA"),
    "LoHa": (None, {"peft_type": "LOHA"}, Unsupported, "save_as_lora"),
    "IA3": (None, {"peft_type": "IA3"}, Unsupported, "merge_and_unload"),
    "a prompt": (None, {"peft_type": "PREFIX_TUNING"}, Unsupported, "there is nothing to merge"),
    "no type": (None, {"peft_type": 3}, Unsupported, "type 3"),
    "a form of tomorrow": (None, {"use_tomorrow": True}, Unsupported, "use_tomorrow: true, which PEFT up to 0.21"),
    "a module that is named in full": (
        None, {"target_modules": ["model.layers.1.self_attn.k_proj", "q_proj", "down_proj"]},
        CheckpointError, "model.layers.1.self_attn.k_proj of target_modules",
    ),
}  # fmt: skip


def test_a_base_that_it_names_and_does_not_fit(here):
    broken(here, put(Q.format(7, "A"), np.ones((4, 32), np.float32)))
    with pytest.raises(HomologyError, match="It names base as its base, so it was trained on another class"):
        merged("a")
    lora.edit(Path("a"), base_model_name_or_path="org/other")
    with pytest.raises(HomologyError, match="It names org/other as its base: give that one"):
        merged("base+a")


WHOLE = ("LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration", "Qwen2VLForConditionalGeneration")


@pytest.mark.parametrize("name", WHOLE)
def test_trained_on_the_language_model_of_a_model_with_vision(name, tmp_path, monkeypatch):
    """Its class calls the same layers by shorter names."""
    monkeypatch.chdir(tmp_path)
    others = ".*(vision|visual|projector).*"
    lora.make(tmp_path, "a", name, base="whole", target_modules="all-linear", exclude_modules=others)
    shutil.copytree("a", "short")
    lora.rewrite(Path("short"), lambda found: {n.replace(".language_model.", ".", 1): t for n, t in found.items()})
    assert families.load("short").keys() != families.load("a").keys()
    assert merged("whole+short", "one", "whole").keys() == merged("whole+a", "two", "whole").keys()
    families.same(families.load("one"), families.load("two"))
    assert any("language_model" in name and "q_proj" in name for name in families.load("a"))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_is_not_what_it_says(case, here):
    change, config, error, words = HOSTILE[case]
    broken(here, change, **config)
    with pytest.raises(error) as caught:
        merged("a")
    said(caught, words)
    assert not Path("out").exists()


def _notes(**config):
    if config:
        lora.edit("a", **config)
    return [note for note in lora.merge(Path("out"), "base", "a").notes if "WARNING" in note]


def test_modules_that_were_lost_are_told(here):
    assert not _notes()
    whole = Path("a/adapter_model.safetensors").read_bytes()
    lora.rewrite("a", lambda tensors: {n: v for n, v in tensors.items() if ".1.self_attn.q_proj" not in n})
    (note,) = _notes()
    assert "1 of 2 q_proj in model.layers, but not for model.layers.1.self_attn.q_proj, which stay" in note
    assert not _notes(layers_to_transform=[0], target_modules=["q_proj"])
    assert not _notes(layers_to_transform=None, target_modules=["q_proj", "down_proj"], exclude_modules=["q_proj"])
    lora.edit("a", exclude_modules=None)
    lora.rewrite("a", lambda tensors: {n: v for n, v in tensors.items() if "q_proj" not in n})
    (note,) = _notes()
    assert "none of 2 q_proj in model.layers" in note
    Path("a/adapter_model.safetensors").write_bytes(whole)
    # Of a regular expression nothing is known but what the file itself shows.
    assert not _notes(target_modules=".*(q_proj|v_proj|down_proj)")
    lora.rewrite("a", lambda tensors: {n: v for n, v in tensors.items() if ".0.mlp" not in n})
    (note,) = _notes()
    assert "1 of 2 down_proj" in note


def test_settings_that_nobody_knows_are_told(here):
    assert not _notes(unsloth_version="x", some_number=3, off=False, nothing={})
    (note,) = _notes(mirrored=True, tomorrow_config={"a": 1})
    assert "has mirrored, tomorrow_config, which PEFT up to 0.21 does not know" in note


def test_every_key_of_peft_is_known():
    from dataclasses import fields

    from darekit.inputs.adapters.config import _KNOWN

    assert {one.name for one in fields(peft.LoraConfig)} <= _KNOWN


def test_experts_that_do_not_divide(tmp_path):
    adapter = lora.make(tmp_path, "a", "Qwen3MoeForCausalLM", target_modules=[], target_parameters=EXPERTS[1:])
    name = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"

    def change(tensors):
        tensors[name.format("A")] = tensors[name.format("A")][:-1].copy()
        tensors[name.format("B")] = tensors[name.format("B")][:, :-1].copy()

    lora.rewrite(adapter, change)
    with pytest.raises(CheckpointError, match=r"15 ranks for all experts together, which is no multiple of 4"):
        lora.merge(tmp_path / "out", tmp_path / "base", adapter)


def test_a_bias_for_a_layer_without_one(here):
    broken(here, put(Q.format(0, "B").replace("weight", "bias"), np.ones(32, np.float32)), lora_bias=True)
    with pytest.raises(HomologyError, match="has no bias"):
        merged("a")


@pytest.mark.parametrize("text", ["{", "[]", '{"peft_type": "LORA"}', '{"r": 4, "lora_alpha": 8, "r": 4}'])
def test_a_config_that_is_none(text, here):
    Path("a/adapter_config.json").write_text(text)
    if text.startswith('{"r"'):
        merged("a")
        return
    with pytest.raises(CheckpointError):
        merged("a")


def test_a_folder_without_one_of_its_files(here):
    Path("b/adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights: expected adapter_model"):
        merged("b")
    Path("a/adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="which says its rank and scale"):
        merged("a")


def test_one_that_changes_nothing_is_warned_of(here):
    lora.rewrite("a", lambda tensors: {n: v * ("lora_A" in n) for n, v in tensors.items()})
    done = lora.merge(Path("out"), "base", "a")
    assert any("every factor B is 0" in note for note in done.notes)
    families.same(families.load("out"), families.load("base"))


def test_a_bf16_base_keeps_its_bits_where_nothing_changes(tmp_path):
    import tiny

    tiny.build("LlamaForCausalLM").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = lora.make(tmp_path, "a", target_modules=["q_proj"], layers_to_transform=[1])
    found, base = (lora.merge(tmp_path / "out", tmp_path / "base", adapter), families.load(tmp_path / "base"))
    after = families.load(tmp_path / "out")
    factors = families.load_file(adapter / "adapter_model.safetensors")
    for name, value in base.items():
        if name == "model.layers.1.self_attn.q_proj.weight":
            product = 1.5 * factors[Q.format(1, "B")].astype(np.float64) @ factors[Q.format(1, "A")]
            wanted = value.astype(np.float32) + product.astype(np.float32)
            assert np.mean(after[name] == wanted.astype(value.dtype)) > 0.999
        else:
            assert after[name].tobytes() == value.tobytes()
    assert found.bytes_written


def test_a_config_is_read_strictly():
    with pytest.raises(CheckpointError, match="modules_to_save is 3, expected a list of names"):
        read_config({"peft_type": "LORA", "modules_to_save": 3}, "c.json")
    assert read_config({"peft_type": "LORA", "modules_to_save": "score", "r": 1}, "c.json").saved == ("score",)
    found = read_config({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"x.*q": 4}}, "c.json")
    assert found.scale_of("a.q", 8) == 2 and found.scale_of("a.xyq", 4) == 4


def test_peft_itself_reads_what_was_made(made):
    model = transformers.LlamaForCausalLM.from_pretrained(made / "base")
    assert peft.PeftModel.from_pretrained(model, made / "a") is not None
    open_checkpoint(made / "base").close()


# --- on the Hub


@pytest.mark.check
def test_on_the_hub(hub, here):
    for name in ("base", "a"):
        files = {path.name: path.read_bytes() for path in Path(name).iterdir() if path.is_file()}
        hub.repositories[f"org/{name}"] = files
    lora.edit("a", base_model_name_or_path="org/base")
    hub.repositories["org/a"]["adapter_config.json"] = Path("a/adapter_config.json").read_bytes()
    wanted = merged("base+a")
    recipe = {"base_model": "org/base", "models": [{"model": "org/a"}], "merge_method": "task_arithmetic"}
    Path("r.yaml").write_text(json.dumps(recipe))
    pair = {**recipe, "models": [{"model": "org/base+org/a"}]}
    Path("p.yaml").write_text(json.dumps(pair))
    for file in ("r.yaml", "p.yaml"):
        done = from_hub(hub, here, "check", file)
        assert done.returncode == 0 and "no problems found" in done.stdout, done.stdout + done.stderr
        assert not list((here / "hf").rglob("*.safetensors"))  # headers alone
    lora.edit("a", r=3)
    hub.repositories["org/wrong"] = {
        path.name: path.read_bytes() for path in Path("a").iterdir() if path.name.startswith("adapter_")
    }
    Path("w.yaml").write_text(json.dumps({**recipe, "models": [{"model": "org/wrong"}]}))
    done = from_hub(hub, here, "check", "w.yaml")
    told = " ".join(done.stdout.split())
    assert done.returncode == 1 and "org/wrong/adapter_config.json" in told and "has rank 3 by the config" in told
    for file in ("r.yaml", "p.yaml"):
        done = from_hub(hub, here, "merge", file, f"out-{file}")
        assert done.returncode == 0, done.stderr
        families.same(families.load(f"out-{file}"), wanted)
    done = from_hub(hub, here, "inspect", "org/base", "org/base+org/base")
    assert done.returncode == 1 and "is a whole model, expected an adapter" in done.stderr


def test_a_pack_on_a_base_with_an_adapter_is_unpacked_on_it(here):
    """What is packed against base+adapter can be unpacked: on that, or exported, and on nothing else."""
    report = dk.pack("base+a", "base+b", "p.safetensors", drop_rate=0.5, seed=1)
    dk.unpack("base+a", "p.safetensors", "whole")
    dk.drop("base+a", "base+b", "dropped", drop_rate=0.5, seed=1)
    assert report.bytes and families.load("whole").keys() == families.load("base").keys()
    for name, value in families.load("dropped").items():
        assert np.allclose(value, families.load("whole")[name], atol=2e-4), name  # deltas of 16 bits
    dk.export("p.safetensors", "out", base="base+a", to="dense")
    families.same(families.load("out"), families.load("whole"))
    with pytest.raises(HomologyError, match="packed against base\\+a"):
        dk.unpack("base", "p.safetensors", "other")


# --- as others write them


def test_in_shards(here):
    """As transformers saves large adapters."""
    wanted = merged("a")
    tensors = families.load_file("a/adapter_model.safetensors")
    names = sorted(tensors)
    parts = {f"adapter_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in parts.items():
        families.write_safetensors(Path("a") / file, {name: tensors[name] for name in own})
    Path("a/adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        merged("a")
    said(caught, "no weights: expected", "or shards with adapter_model.safetensors.index.json")
    index = Path("a/adapter_model.safetensors.index.json")
    places = {name: file for file, own in parts.items() for name in own}
    index.write_text(json.dumps({"weight_map": places}))
    families.same(merged("a"), wanted)
    families.same(merged("a/adapter_model-00002-of-00002.safetensors"), wanted)
    for wrong, words in (
        ({"x": "adapter_model-00001-of-00002.safetensors", **places}, "lists x, which no shard holds"),
        ({name: places[name] for name in names[1:]}, "which a shard holds: shards of two adapters"),
        ({**places, "x": "adapter_model-00003-of-00003.safetensors"}, "adapter_model-00003-of-00003.safetensors"),
        ({"x": "../model.safetensors"}, "expected a weight_map"),
        ({}, "expected a weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(CheckpointError) as caught:
            merged("a")
        said(caught, words)
    # A stale factor in another shard than the index says: which of the two counts is no guess.
    index.write_text(json.dumps({"weight_map": places}))
    own = {names[0]: tensors[names[0]] * 5, **{name: tensors[name] for name in names[1::2]}}
    families.write_safetensors(Path("a/adapter_model-00002-of-00002.safetensors"), own)
    with pytest.raises(CheckpointError) as caught:
        merged("a")
    said(caught, f"places {names[0]} in adapter_model-00001-of-00002.safetensors, but", "two adapters")


def _renamed(change):
    return lambda tensors: {change(name): value for name, value in tensors.items()}


def _with_another(tensors):
    """`.default` and `.other` in one file."""
    return {
        name.replace(".weight", f".{adapter}.weight"): value
        for name, value in tensors.items()
        for adapter in ("default", "other")
    }


def _with_alphas(tensors):
    modules = dict.fromkeys(name.rpartition(".lora_")[0] for name in tensors)
    return tensors | {f"{module}.alpha": np.float32(8).reshape(1) for module in modules}


def _like_kohya(name):
    module, _, end = name.removeprefix("base_model.model.").rpartition(".lora_")
    return f"lora_unet_{module.replace('.', '_')}.lora_{'down' if end[0] == 'A' else 'up'}.weight"


OTHERS = {
    "diffusers": (_renamed(lambda n: n.replace("lora_A", "lora.down").replace("lora_B", "lora.up")), "as diffusers or"),
    "kohya": (_renamed(_like_kohya), "as diffusers or kohya's scripts do (lora_unet_"),
    "an alpha for each module": (_with_alphas, "put these numbers into alpha_pattern"),
    "two adapters": (_with_another, "holds more than one adapter"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_names_of_others_are_refused_by_whose_they_are(case, here):
    change, words = OTHERS[case]
    lora.rewrite("a", change)
    with pytest.raises((Unsupported, CheckpointError)) as caught:
        merged("a")
    said(caught, words)


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n.replace("base_model.model.", "base_model.model.base_model.model.", 1),
        lambda n: n.removeprefix("base_model.model."),
        lambda n: f"_orig_mod.{n}",
        lambda n: n.replace(".weight", ".my-adapter.weight"),
    ],
)
def test_names_around_the_names(change, here):
    """Of wrappers in wrappers, compilers and adapters with names of their own."""
    wanted = merged("a")
    lora.rewrite("a", _renamed(change))
    families.same(merged("a"), wanted)


def test_configs_of_the_wild(here):
    """Keys that are null, that old versions had, or that are missing."""
    wanted = merged("a")
    config = json.loads(Path("a/adapter_config.json").read_text())
    for changed in (
        config | {"peft_type": "lora"},
        config | {"enable_lora": None, "merge_weights": False, "target_modules": "all-linear"},
        config
        | dict.fromkeys(("task_type", "rank_pattern", "modules_to_save", "revision", "use_dora", "peft_version")),
        {key: config[key] for key in ("r", "lora_alpha")},
    ):
        Path("a/adapter_config.json").write_text(json.dumps(changed))
        families.same(merged("a"), wanted)
    for changed in ({"base_model": "x/y"}, {"rank": 4, "alpha": 8, "dropout": 0.0}):
        Path("a/adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(Unsupported) as caught:
            merged("a")
        said(caught, f"it has {', '.join(changed)}, expected peft_type, r and lora_alpha, or lora_parameters")


def test_an_alpha_of_mlx_beside_its_scale():
    """Its first versions multiplied by both; what num_layers is in has later ones."""
    both = {"rank": 8, "alpha": 16, "scale": 10.0}
    with pytest.raises(CheckpointError) as caught:
        read_config({"lora_layers": 4, "lora_parameters": both}, "c")
    said(caught, "both alpha and scale", "(20)", "alone (10)")
    assert read_config({"num_layers": 4, "lora_parameters": both}, "c").scale == 10
    assert read_config({"lora_layers": 4, "lora_parameters": both | {"alpha": 8}}, "c").scale == 10
    assert read_config({"lora_layers": 4, "lora_parameters": {"rank": 8, "scale": 10}}, "c").scale == 10
    assert read_config({"lora_layers": 4, "lora_parameters": {"rank": 8, "alpha": 16}}, "c").scale == 2


def test_what_lies_beside_an_adapter(here):
    wanted = merged("a")
    families.write_safetensors(
        Path("a/value_head.safetensors"), {"v_head.summary.weight": np.ones((1, 32), np.float32)}
    )
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"):
        Path("a", name).write_bytes(b"{}")
    report = lora.merge(Path("out"), "base", "a")
    families.same(families.load("out"), wanted)
    assert [note for note in report.notes if "value_head.safetensors, a reward model's head" in note]
    families.write_safetensors(Path("a/new_embeddings.safetensors"), {"input_embeddings": np.ones((2, 32), np.float32)})
    report = lora.merge(Path("out2"), "base", "a")
    assert any("WARNING: a has new_embeddings.safetensors, rows of tokens" in note for note in report.notes)
    Path("a/new_embeddings.safetensors").unlink()
    # A file of another name is not found, and the refusal says so.
    Path("a/value_head.safetensors").unlink()
    Path("a/adapter_model.safetensors").rename("a/pytorch_lora_weights.safetensors")
    with pytest.raises(Unsupported) as caught:
        merged("a")
    said(caught, "once its file is called adapter_model.safetensors, with adapter_config.json next to it")
