# SPDX-License-Identifier: Apache-2.0
"""Quantised models wherever a model stands: the same comes out as of copies that store what they decode to."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

import coded
import darekit as dk
import families
import tiny
from darekit.errors import DarekitError, HomologyError
from darekit.planning import checks

BF16 = ml_dtypes.bfloat16
DARE = {"method": "dare", "drop_rate": 0.5, "seed": 7}


def decoded(values):
    return values.astype(BF16)


def encode(tensors, form, **more):
    """(what is stored, what it decodes to) of a model; `form` makes both of each weight of a layer."""
    stored, plain = {}, {}
    for name, array in tensors.items():
        if "proj" in name:
            parts, values = form(name, array.astype(np.float32), **more)
            stored |= parts
            plain[name] = decoded(values)
        else:
            stored[name] = plain[name] = array
    return stored, plain


def fp8(name, weight):
    return coded.eights(name, weight, (32, 32))


CONFIG = families.config() | {
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32], "modules_to_not_convert": ["lm_head"]}
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """base and m0, m1 in 16 bits; of each a copy in FP8, and one that stores what that decodes to, called -16."""
    monkeypatch.chdir(tmp_path)
    base, models = families.family(tmp_path, k=2)
    for name, tensors in (("base", base), ("m0", models[0]), ("m1", models[1])):
        stored, plain = encode(tensors, fp8)
        families.save(f"{name}-8", stored, CONFIG, shards=2 if name == "base" else 1)
        families.save(f"{name}-16", plain, families.config())
    return tmp_path


def recipe(base, *models, **keys):
    return {"base_model": base, "models": list(models), "merge_method": "task_arithmetic", **keys}


def merged(made, out, **options):
    report = dk.merge(made, out, threads=1, force=True, **options)
    return families.load(out), list(report.notes)


@pytest.mark.parametrize(
    ("inputs", "keys"),
    [
        (("base-8", "m0", "m1"), {}),
        (("base", "m0-8", "m1"), {"sparsify": DARE}),
        (("base-8", "m0-8", "m1-8"), {"merge_method": "ties", "parameters": {"keep": 0.5}}),
        (("base-8", "m0-8", "m1"), {"merge_method": "slerp", "models": ["m0-8"], "parameters": {"t": 0.3}}),
        (("base-8", "m0-8", "m1-8"), {"sparsify": DARE, "dtype": "float32"}),
    ],
)  # fmt: skip
def test_as_base_as_model_and_as_both(inputs, keys, here):
    def plain(name):
        return name.replace("-8", "-16")

    keys = {k: v for k, v in keys.items() if k != "models"}
    models = inputs[1:2] if keys.get("merge_method") == "slerp" else inputs[1:]
    # Seeds are those of stored models, unless they are given.
    seeds = [{"model": m, "parameters": {"seed": i}} for i, m in enumerate(models)] if "sparsify" in keys else models
    plains = json.loads(json.dumps(seeds).replace("-8", "-16"))
    found, said = merged(recipe(inputs[0], *seeds, **keys), "out")
    expected, _ = merged(recipe(plain(inputs[0]), *plains, **keys), "expected")
    families.same(found, expected)
    config = json.loads(Path("out/config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == keys.get("dtype", "bfloat16")
    assert sum("quantised tensors are read as bfloat16" in note for note in said) == sum(
        "-8" in name for name in inputs
    )


def test_one_line_dequantises(here):
    found, _ = merged({"models": ["base-8"], "merge_method": "linear"}, "out")
    families.same(found, families.load("base-16"))
    assert json.loads(Path("out/config.json").read_text()) == families.config()


def test_drop_keeps_whole_what_is_kept_whole(here):
    dk.drop("base-8", "m0-8", "out", drop_rate=0.0, threads=1)
    families.same(families.load("out"), families.load("m0-16"))


def test_shards_and_parts_of_stacks(here):
    slices = [
        {"sources": [{"model": "base-8", "layer_range": [0, 2]}]},
        {"sources": [{"model": "base-8", "layer_range": [1, 2]}]},
    ]
    found, _ = merged({"merge_method": "passthrough", "slices": slices}, "out", shard_size=20_000)
    plain = families.load("base-16")
    assert len(list(Path("out").glob("*.safetensors"))) > 1
    layers = {name.replace("layers.1", "layers.2"): array for name, array in plain.items() if "layers.1" in name}
    families.same(found, plain | layers)


def test_nested(here):
    Path("inner.yaml").write_text(json.dumps(recipe("base-8", "m0", parameters={"lambda": 0.5})))
    Path("plain.yaml").write_text(json.dumps(recipe("base-16", "m0", parameters={"lambda": 0.5})))
    found, _ = merged(recipe("base-8", "inner.yaml", "m1"), "out")
    expected, _ = merged(recipe("base-16", "plain.yaml", "m1"), "expected")
    families.same(found, expected)


@pytest.mark.parametrize("how", [{"lossless": True}, {"drop_rate": 0.5}])
def test_packs_are_bound_to_what_the_base_decodes_to(how, here):
    """To the quantised base and to its decoded copy alike, and to nothing else."""
    dk.pack("base-8", "m0", "m.safetensors", force=True, **how)
    dk.unpack("base-8", "m.safetensors", "one")
    dk.unpack("base-16", "m.safetensors", "other")
    families.same(families.load("one"), families.load("other"))
    if "lossless" in how:
        families.same(families.load("one"), families.load("m0"))
    with pytest.raises(HomologyError, match="other values"):
        dk.unpack("base", "m.safetensors", "third")
    found, _ = merged(recipe("base-8", "m.safetensors"), "four")
    families.same(found, families.load("one"))


def test_what_is_complete_is_complete(here):
    dk.merge(recipe("base-8", "m0-8"), "out", threads=1, force=True)
    before = Path("out/model.safetensors").stat().st_mtime_ns
    dk.merge(recipe("base-8", "m0-8"), "out", threads=1, force=True, resume=True)
    assert Path("out/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(DarekitError):
        dk.merge(recipe("base-16", "m0-16"), "out", threads=1, force=True, resume=True)


def test_experts_of_gpt_oss_meet_those_in_16_bits(tmp_path, monkeypatch):
    """Fine-tunes in 16 bits have the names and shapes that a live model has, and so has what is decoded."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    names = {
        f"model.layers.0.mlp.experts.{n}": (4, *s) for n, s in {"gate_up_proj": (64, 96), "down_proj": (96, 64)}.items()
    }
    stored, plain = {"model.norm.weight": np.ones(64, BF16)}, {"model.norm.weight": np.ones(64, BF16)}
    for name, shape in names.items():
        parts, values = coded.blocks(name, (rng.standard_normal(shape) * 0.02).astype(np.float32))
        stored |= parts
        plain[name] = decoded(values)
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "torch_dtype": "bfloat16"}
    families.save("base", stored, config | {"quantization_config": {"quant_method": "mxfp4"}})
    families.save("base-16", plain, config)
    families.save("m", families.tuned(rng, plain, 2e-4), config)
    found, said = merged(recipe("base", {"model": "m", "parameters": {"seed": 1}}, sparsify=DARE), "out")
    expected, _ = merged(recipe("base-16", {"model": "m", "parameters": {"seed": 1}}, sparsify=DARE), "expected")
    families.same(found, expected)
    assert any("MXFP4, groups of 32" in note for note in said)
    # It was tuned from what the base decodes to, and so its delta holds no error of rounding.
    assert any("it was tuned from that" in note for note in said)


class TestRounding:
    def told(self, base, model):
        said = []
        with dk.plan(recipe(base, model)) as plan:
            checks.check(plan, force=True, say=said.append)
        return " ".join(said)

    def test_a_delta_from_a_quantised_base_holds_its_error(self, here):
        said = self.told("base-8", "m0")
        assert "base-8 is quantised and m0 is not" in said and "Give the 16-bit release of base-8" in said
        error = float(said.split("by about r = ")[1].split()[0])
        base, rounded = families.load("base"), families.load("base-16")
        true = [
            np.linalg.norm(rounded[n].astype(float) - base[n].astype(float)) / np.linalg.norm(base[n].astype(float))
            for n in base if "proj" in n
        ]  # fmt: skip
        assert abs(error - np.median(true)) < 0.15 * error

    def test_so_does_one_to_a_quantised_model(self, here):
        assert "m0-8 is quantised and base is not" in self.told("base", "m0-8")

    def test_not_if_the_model_was_tuned_from_what_it_decodes_to(self, here):
        rng = np.random.default_rng(3)
        families.save("tuned", families.tuned(rng, families.load("base-16"), 2e-4), families.config())
        assert "it was tuned from that, so its delta has no rounding in it" in self.told("base-8", "tuned")

    def test_between_two_quantised_models(self, here):
        assert "are both quantised" in self.told("base-8", "m0-8") and "16-bit releases" in self.told("base-8", "m0-8")
        near = families.tuned(np.random.default_rng(1), families.load("base"), 2e-5)
        families.save("near-8", encode(near, fp8)[0], CONFIG)
        assert "Most codes are the same" in self.told("base-8", "near-8")

    def test_an_adapter_is_added_to_what_is_decoded(self, here):
        rng, names = np.random.default_rng(2), [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in range(2)]
        shapes = {"lora_A": (4, families.HIDDEN), "lora_B": (families.HIDDEN, 4)}
        factors = {
            f"{n}.{f}.weight": rng.normal(0, 0.05, shape).astype(np.float32)
            for n in names
            for f, shape in shapes.items()
        }
        Path("a").mkdir()
        families.write_safetensors(Path("a/adapter_model.safetensors"), factors)
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        found = {}
        for base in ("base-8", "base-16"):
            Path("a/adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
            assert "rounding" not in self.told(base, "a")
            found[base], _ = merged(recipe(base, "a", parameters={"lambda": 0.5}), f"out-{base}")
        families.same(found["base-8"], found["base-16"])

    def test_nothing_is_said_of_numbers(self, here):
        assert "quantised" not in self.told("base", "m0")


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "base-8", "m0"], ["inspect", "base-8", "m0-8", "--json"], ["recommend", "base-8", "m0-8"],
        ["check", "r.yaml"], ["merge", "r.yaml", "out", "--dry-run"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_commands_say_how_weights_are_read(words, here, dare):
    Path("r.yaml").write_text(json.dumps(recipe("base-8", "m0-8")))
    said = dare(*words)
    text = " ".join((said.out + said.err).split())
    assert said.code == 0 and ("quantised tensors are read" in text or words[0] == "recommend"), said
    assert "rounding changed" in text or words[0] == "check", said


@pytest.mark.check
def test_a_live_model_is_what_is_decoded(here):
    """A quantised model is judged as what it decodes to, and not by kernels of whatever GPU there is."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from darekit.live.models import build
    from darekit.planning.opening import open_plan
    from darekit.recipe import read_recipe

    found = {}
    for name in ("base-8", "base-16"):
        with open_plan(read_recipe({"models": [name], "merge_method": "linear"})) as plan:
            found[name] = {key: value.float() for key, value in build(plan, device="cpu").model.state_dict().items()}
    assert found["base-8"].keys() == found["base-16"].keys()
    assert all(torch.equal(value, found["base-16"][key]) for key, value in found["base-8"].items())


def test_a_gpt_oss_in_shards_is_what_transformers_makes_of_it(tmp_path):
    """Codes in one shard, their scales in another; transformers decodes it while it loads."""
    tiny.build("GptOssForCausalLM", hidden_size=64, intermediate_size=64).to(torch.bfloat16).save_pretrained(
        tmp_path / "plain"
    )
    parts = {}
    for name, value in families.load(tmp_path / "plain").items():
        stored = coded.blocks(name, np.asarray(value, np.float32))[0] if name.endswith("_proj") else {name: value}
        parts |= stored
    (tmp_path / "coded").mkdir()
    shards = {name: f"model-0000{1 + name.endswith('_scales')}-of-00002.safetensors" for name in parts}
    for file in set(shards.values()):
        families.write_safetensors(tmp_path / "coded" / file, {n: v for n, v in parts.items() if shards[n] == file})
    index = {"metadata": {}, "weight_map": shards}
    (tmp_path / "coded" / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "coded" / "config.json").write_text(json.dumps(config))
    dk.merge({"models": [str(tmp_path / "coded")], "merge_method": "linear"}, tmp_path / "decoded")
    decoded = json.loads((tmp_path / "decoded" / "config.json").read_text())
    assert len(set(shards.values())) == 2 and "quantization_config" not in decoded
    told = transformers.Mxfp4Config(dequantize=True)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "coded", dtype=torch.bfloat16, quantization_config=told
    ).state_dict()
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "decoded", dtype=torch.bfloat16).state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
