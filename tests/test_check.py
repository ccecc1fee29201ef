# SPDX-License-Identifier: Apache-2.0
"""`dare check`: all problems at once, from headers alone."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import families
from hub_server import dare as from_hub

GOOD = {
    "base_model": "base", "models": ["m0", "m1"], "merge_method": "dare_ties",
    "parameters": {"density": 0.5, "weight": 0.5},
}  # fmt: skip


@pytest.fixture
def family(tmp_path, monkeypatch):
    """The working directory: base, m0, m1, m2; `.write(recipe)` makes recipe.yaml."""
    base, models = families.family(tmp_path)
    monkeypatch.chdir(tmp_path)

    def write(recipe):
        text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False)
        (tmp_path / "recipe.yaml").write_text(text)
        return "recipe.yaml"

    return SimpleNamespace(path=tmp_path, base=base, models=models, write=write)


def messages(done):
    return [one["message"] for one in done.data["problems"]]


def test_what_fits_is_told_as_the_dry_run_tells_it(family, dare):
    name = family.write(GOOD)
    dry, found = dare("merge", name, "out", "--dry-run", "--json"), dare("check", name, "--json")
    assert found.code == 0 and found.data["ok"] and found.data["problems"] == []
    same = ("tensors", "parameters", "bytes_in", "bytes_out", "peak_memory_bytes", "shards", "models")
    assert {key: found.data[key] for key in same} == {key: dry.data[key] for key in same}
    assert found.data["bytes_out"] == found.data["shards"][0]["bytes"]
    shown = dare("check", name)
    assert shown.code == 0 and "no problems found" in shown.out and "BF16" in shown.out


def test_every_line_of_a_recipe_that_is_wrong_is_told(family, dare):
    name = family.write(
        "base_model: base\n"
        "models:\n"
        "  - {model: m0, parameters: {weight: heavy, densty: 0.5}}\n"
        "  - {model: m1, parameters: {weight: lots, density: 7}}\n"
        "merge_method: dare_ties\n"
        "dtype: bfloat17\n"
        "vocab: whatever\n"
        "keep_float32: maybe\n"
    )
    done = dare("check", name, "--json")
    told = "\n".join(messages(done))
    assert done.code == 1 and not done.data["ok"]
    for line in (3, 4, 6, 7, 8):
        assert f"line {line}" in told
    for word in ("densty", "'heavy'", "'lots'", "bfloat17", "'whatever'", "'maybe'"):
        assert word in told
    assert {one["error"] for one in done.data["problems"]} == {"RecipeError"}
    assert not any("drops nothing" in one for one in messages(done)), "that density was misspelt is told already"


def test_a_key_that_is_gone_causes_no_problem_of_its_own(family, dare):
    done = dare("check", family.write(GOOD | {"merge_method": "dare_tise"}), "--json")
    assert len(messages(done)) == 1 and "dare_tise" in messages(done)[0]
    done = dare("check", family.write({**GOOD, "merge_method": "slerp", "models": ["m0"], "parameters": {"t": "x"}}),
                "--json")  # fmt: skip
    assert len(messages(done)) == 1 and "'x'" in messages(done)[0]


def test_what_is_not_a_recipe_is_one_problem(family, dare):
    for text in ("", "- 1\n", "a: [\n"):
        assert len(messages(dare("check", family.write(text), "--json"))) == 1
    assert "no such file" in messages(dare("check", "nothing.yaml", "--json"))[0]


def test_every_input_that_does_not_open_is_told_and_the_others_are_compared(family, dare):
    short = dict(family.models[1])
    short.pop("model.norm.weight")
    families.save(family.path / "short", short)
    (family.path / "broken").mkdir()
    (family.path / "broken" / "model.safetensors").write_bytes(b"\x05")
    done = dare("check", family.write(GOOD | {"models": ["m0", "gone", "broken", "short"]}), "--json")
    told = messages(done)
    assert done.code == 1 and len(told) == 3
    assert "'gone'" in told[0] and "1 bytes" in told[1] and "short lacks model.norm.weight" in told[2]


def test_each_model_has_its_own_misfit(family, dare):
    short, wide = dict(family.models[0]), dict(family.models[1])
    short.pop("model.norm.weight")
    wide["model.norm.weight"] = np.concatenate([wide["model.norm.weight"]] * 2)
    families.save(family.path / "short", short)
    families.save(family.path / "wide", wide)
    done = dare("check", family.write(GOOD | {"models": ["short", "wide", "m2"]}), "--json")
    told = messages(done)
    assert len(told) == 2 and {one["error"] for one in done.data["problems"]} == {"HomologyError"}
    assert "short lacks model.norm.weight" in told[0] and "[64] in wide" in told[1]


def test_problems_of_different_kinds_come_together(family, dare):
    """A value that no tensor has, a tokenizer that its source lacks: neither hides the other."""
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}
    (family.path / "m0" / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = {
        "base_model": "base", "models": ["m0"], "merge_method": "slerp", "tokenizer_source": "base",
        "parameters": {"t": [{"filter": "mlp", "value": 0.5}]},
    }  # fmt: skip
    done = dare("check", family.write(recipe), "--json")
    assert done.code == 1
    assert [one["error"] for one in done.data["problems"]] == ["PlanError", "RecipeError"], messages(done)


def test_every_range_of_layers_that_a_model_lacks_is_told(family, dare):
    def cut(model, *layers):
        return {"sources": [{"model": model, "layer_range": list(layers)}]}

    recipe = {"merge_method": "passthrough", "slices": [cut("m0", 0, 2), cut("m1", 1, 4), cut("m2", 7, 9)]}
    done = dare("check", family.write(recipe), "--json")
    assert ["[1, 4]" in messages(done)[0], "[7, 9]" in messages(done)[1], len(messages(done))] == [True, True, 2]


def test_the_place_of_the_output(family, dare, monkeypatch):
    name = family.write(GOOD)
    assert dare("check", name, "out").code == 0 and not os.path.lexists("out")
    done = dare("check", name, "m0", "--json")
    assert done.code == 1 and "not empty" in messages(done)[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    done = dare("check", name, "out", "--json")
    assert done.code == 1 and "49.5 kB" in messages(done)[0] and "1 kB" in messages(done)[0]


def test_settings_and_lenient_as_in_merge(family, dare):
    name = family.write(GOOD | {"nonsense": 1})
    assert dare("check", name).code == 1
    assert dare("check", name, "--lenient").code == 0
    assert dare("check", name, "--lenient", "--set", "merge_method=nothing").code == 1


def test_no_weights_are_read(family, dare):
    """Values that are no numbers at all: the check is the same, since it is for the dry run to look at them."""
    for name in ("m0", "m1"):
        path = family.path / name / "model.safetensors"
        raw = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        raw[start:] = b"\xff" * (len(raw) - start)
        path.write_bytes(raw)
    done = dare("check", family.write(GOOD))
    assert done.code == 0 and "not looked at" in done.out and "NaN" in done.out


# --- models on the Hub


def upload(hub, name, directory):
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    hub.repositories[f"org/{name}"] = files
    return sum(map(len, files.values()))


@pytest.fixture
def hubbed(tmp_path, hub):
    """base and m0 on the Hub alone, in three shards, and large enough that headers are a small part; m1 is here."""
    rng = np.random.default_rng(0)
    base = families.llama(rng, vocab=20_000)
    config = families.config(vocab=20_000)
    size = 0
    for name in ("base", "m0", "m1"):
        families.save(tmp_path / name, base, config, shards=3)
        if name != "m1":
            size += upload(hub, name, tmp_path / name)
            shutil.rmtree(tmp_path / name)
    recipe = GOOD | {"base_model": "org/base", "models": ["org/m0", "m1"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return SimpleNamespace(path=tmp_path, size=size, base=base)


def test_models_on_the_hub_are_checked_by_their_headers(hubbed, hub):
    done = from_hub(hub, hubbed.path, "check", "recipe.yaml", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    weights = {
        name: sum(len(data) for file, data in files.items() if file.endswith(".safetensors"))
        for name, files in hub.repositories.items()
    }
    assert found["downloads"] == weights
    assert found["tensors"] == len(hubbed.base)
    assert found["bytes_in"] == 3 * sum(array.nbytes for array in hubbed.base.values())
    assert hub.sent < hubbed.size / 3 and hub.sent < 1e6
    assert not list(hubbed.path.rglob("*.safetensors")) or not list((hubbed.path / "hf").rglob("*.safetensors"))


def test_what_is_wrong_on_the_hub_is_told_of_each_model(hubbed, hub):
    files = hub.repositories["org/m0"]
    hub.repositories["org/short"] = {"model.safetensors": files["model-00001-of-00003.safetensors"]}
    hub.repositories["org/cut"] = {"model.safetensors": files["model-00001-of-00003.safetensors"][:-10]}
    hub.repositories["org/pickled"] = {"config.json": b"{}", "pytorch_model.bin": b"x" * 100}
    recipe = GOOD | {"base_model": "org/base", "models": ["org/short", "org/cut", "org/pickled", "org/nobody"]}
    (hubbed.path / "bad.yaml").write_text(yaml.safe_dump(recipe))
    done = from_hub(hub, hubbed.path, "check", "bad.yaml", "--json")
    assert done.returncode == 1
    told = [one["message"] for one in json.loads(done.stdout)["problems"]]
    assert len(told) == 4, told
    assert told[0].startswith("org/cut/model.safetensors is truncated")
    assert "org/pickled has its weights in pytorch_model.bin" in told[1] and "hf download org/pickled" in told[1]
    assert "org/nobody is not on the Hub" in told[2]
    assert "org/short lacks" in told[3]


@pytest.mark.check
def test_what_takes_values_is_not_looked_at_on_the_hub(hubbed, hub):
    recipe = {"base_model": "org/base", "models": ["org/m0"], "merge_method": "task_arithmetic",
              "sparsify": {"method": "dare", "drop_rate": "auto"}}  # fmt: skip
    (hubbed.path / "auto.yaml").write_text(yaml.safe_dump(recipe))
    done = from_hub(hub, hubbed.path, "check", "auto.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "drop_rate: auto is not known" in " ".join(done.stdout.split())


@pytest.mark.check
def test_recipes_within_recipes_are_checked_by_headers_too(hubbed, hub):
    (hubbed.path / "inner.yaml").write_text(yaml.safe_dump({"models": ["org/m0", "m1"], "merge_method": "linear"}))
    outer = {"base_model": "org/base", "models": ["inner.yaml"], "merge_method": "task_arithmetic"}
    (hubbed.path / "outer.yaml").write_text(yaml.safe_dump(outer))
    done = from_hub(hub, hubbed.path, "check", "outer.yaml", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads(done.stdout)["downloads"]) == {"org/m0", "org/base"} and hub.sent < 1e6


@pytest.mark.check
def test_a_model_in_the_cache_is_read_from_there(hubbed, hub):
    recipe = {"models": ["org/m0", "org/base"], "merge_method": "linear"}
    (hubbed.path / "linear.yaml").write_text(yaml.safe_dump(recipe))
    assert from_hub(hub, hubbed.path, "merge", "linear.yaml", "out").returncode == 0
    done = from_hub(hub, hubbed.path, "check", "linear.yaml", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["downloads"] == {}


def test_a_mistyped_path_that_reads_like_a_model_on_the_hub_has_its_neighbours(family, dare, monkeypatch):
    """As `dare merge` names them."""
    shutil.copytree("m0", "models/llama-math")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in (("check", "recipe.yaml"), ("merge", "recipe.yaml", "out")):
        family.write(GOOD | {"models": ["m0", "models/lama-math"]})
        found = dare(*command)
        said = " ".join((found.out + found.err).split())
        assert found.code == 1 and "No local checkpoint either: looked for" in said
        assert "did you mean" in said and "models/llama-math?" in said
