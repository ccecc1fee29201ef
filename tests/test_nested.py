# SPDX-License-Identifier: Apache-2.0
"""Recipes as models: the same bytes as with an intermediate checkpoint of the same format, and nothing written."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import darekit as dk
import families
from darekit.checkpoints import open_checkpoint, sample_digest, traits_of
from darekit.engine.nested import Computed
from darekit.errors import DataError, HomologyError, PlanError, RecipeError
from darekit.output.card import front_matter
from darekit.planning.checks import check
from darekit.planning.opening import open_models, open_plan
from darekit.recipe import read_recipe

OPTIONS = {"force": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bf16 family: base, m0 to m3; the first tensors are larger than a tile."""
    path = tmp_path_factory.mktemp("nested")
    rng = np.random.default_rng(11)
    base = families.llama(rng, ml_dtypes.bfloat16, layers=2)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = rng.normal(0, 0.02, (2200, families.HIDDEN)).astype(ml_dtypes.bfloat16)
    for name in ("base", "m0", "m1", "m2", "m3"):
        tensors = base if name == "base" else families.tuned(rng, base)
        families.save(path / name, tensors, families.config(vocab=2200, layers=2))
    return path


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.chdir(folder)


FIRST = {
    "linear": {"models": ["m0", "m1"], "merge_method": "linear", "parameters": {"weight": [0.3, 0.8]}},
    "slerp": {"models": ["m0", "m1"], "merge_method": "slerp", "parameters": {"t": 0.4}},
    "dare_ties": {"base_model": "base", "models": ["m0", "m1"], "merge_method": "dare_ties",
                  "parameters": {"density": 0.6, "weight": 0.5}},
    "ties": {"base_model": "base", "models": ["m0", "m1"], "merge_method": "ties",
             "parameters": {"density": 0.3, "weight": 0.5}},
    "ties of models": {"base_model": "base", "models": ["m0", "m1"], "merge_method": "ties",
                       "parameters": {"keep": 0.3, "trim": "model"}},
    "l1": {"base_model": "base", "models": ["m0"], "merge_method": "dare_linear",
           "parameters": {"density": 0.5, "rescale": "l1"}},
    "della": {"base_model": "base", "models": ["m0", "m1"], "merge_method": "della", "parameters": {"density": 0.5}},
    "sce": {"base_model": "base", "models": ["m0", "m1"], "merge_method": "sce", "parameters": {"select_topk": 0.4}},
    "model_stock": {"base_model": "base", "models": ["m0", "m1"], "merge_method": "model_stock"},
    "rows": {"base_model": "base", "models": ["m0", "m1"], "merge_method": "model_stock",
             "parameters": {"filter_wise": True}},
    "stack": {"slices": [{"sources": [{"model": "m0", "layer_range": [0, 1]}]},
                         {"sources": [{"model": "m1", "layer_range": [1, 2], "parameters": {"scale": 0.5}}]}],
              "merge_method": "passthrough"},
    "float32": {"models": ["m0", "m1"], "merge_method": "linear", "dtype": "float32"},
}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("first", FIRST)
def test_as_with_an_intermediate_checkpoint(tmp_path, first, threads):
    """The second merge reads both halves of its work twice (slerp measures), and once in order (ties selects)."""
    (tmp_path / "first.yaml").write_text(json.dumps(FIRST[first]))
    dk.merge(tmp_path / "first.yaml", tmp_path / "first", **OPTIONS)
    for second in (
        {"base_model": "m2", "models": [str(tmp_path / "first.yaml")], "merge_method": "slerp",
         "parameters": {"t": 0.3}},
        {"base_model": "base", "models": [str(tmp_path / "first.yaml"), "m2"], "merge_method": "ties",
         "parameters": {"density": 0.4, "weight": 0.7}},
        {"base_model": str(tmp_path / "first.yaml"), "models": ["m3"], "merge_method": "task_arithmetic",
         "parameters": {"weight": 0.5}},
    ):  # fmt: skip
        dk.merge(second, tmp_path / "nested", overwrite=True, threads=threads, **OPTIONS)
        plain = json.loads(json.dumps(second).replace("first.yaml", "first"))
        dk.merge(plain, tmp_path / "plain", overwrite=True, threads=threads, **OPTIONS)
        found, wanted = families.load(tmp_path / "nested"), families.load(tmp_path / "plain")
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            assert np.array_equal(found[name].view(np.uint8), array.view(np.uint8)), name
        configs = [json.loads((tmp_path / one / "config.json").read_text()) for one in ("nested", "plain")]
        assert configs[0] == configs[1]


def test_a_source_gives_any_range_in_any_order(tmp_path):
    rng = np.random.default_rng(0)
    for first in ("della", "ties", "slerp", "sce"):
        (tmp_path / "first.yaml").write_text(json.dumps(FIRST[first]))
        dk.merge(tmp_path / "first.yaml", tmp_path / "first", overwrite=True, **OPTIONS)
        with open_models(None, [tmp_path / "first.yaml"]) as (_, (model,)):
            stored = open_checkpoint(tmp_path / "first")
            for name in ("model.embed_tokens.weight", "model.norm.weight"):
                whole = np.empty(stored.tensors[name].nbytes, np.uint8)
                stored.tensors[name].source.read_into(whole, 0)
                for _ in range(8):
                    begin, end = sorted(rng.integers(0, whole.size + 1, 2))
                    part = np.empty(end - begin, np.uint8)
                    model.tensors[name].source.read_into(part, begin)
                    assert np.array_equal(part, whole[begin:end])
                with pytest.raises(ValueError, match="outside"):
                    model.tensors[name].source.read_into(np.empty(2, np.uint8), whole.size - 1)
            stored.close()


def test_documents_are_stages(tmp_path):
    """The last is written, or the one that is named; stages are models, bases and givers of tokenizers."""
    text = """
name: one
models: [m0, m1]
merge_method: linear
---
name: two
base_model: one
models: [m2]
merge_method: slerp
parameters: {t: 0.5}
---
base_model: base
models:
- {model: two, parameters: {weight: 0.5}}
- m3
merge_method: task_arithmetic
"""
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert [name for name, _ in recipe.stages] == ["two"]
    assert [name for name, _ in recipe.stages[0][1].stages] == ["one"]
    assert read_recipe(recipe.to_data()) == recipe
    dk.merge(tmp_path / "recipe.yaml", tmp_path / "whole", **OPTIONS)
    for stage in ("one", "two"):
        data = read_recipe(tmp_path / "recipe.yaml", stage=stage).to_data()
        data.pop("stages", None)
        dk.merge(json.loads(json.dumps(data).replace('"one"', f'"{tmp_path}/one"')), tmp_path / stage, **OPTIONS)
    last = recipe.to_data() | {"models": [{"model": str(tmp_path / "two"), "parameters": {"weight": 0.5}}, "m3"]}
    del last["stages"]
    dk.merge(last, tmp_path / "plain", **OPTIONS)
    families.same(families.load(tmp_path / "whole"), families.load(tmp_path / "plain"))
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "whole", "one", "two", "plain"}


def test_one_is_written_by_its_name(tmp_path, dare):
    (tmp_path / "r.yaml").write_text(
        "name: a\nmodels: [m0]\nmerge_method: linear\n---\nmodels: [a]\nmerge_method: linear\n"
    )
    assert dare("merge", tmp_path / "r.yaml", tmp_path / "out", "--stage", "a").code == 0
    missing = dare("merge", tmp_path / "r.yaml", tmp_path / "other", "--stage", "b")
    assert missing.code and "no stage is named 'b'; known: a" in missing.err


DRAWN = """
name: one
base_model: base
models: [m0, m1]
merge_method: dare_ties
parameters: {density: 0.5, weight: 0.5}
---
name: two
base_model: base
models: [one, m2]
merge_method: task_arithmetic
parameters: {weight: 0.5}
"""


def test_one_seed_for_all_stages_that_draw(tmp_path, dare):
    """Also where the recipe itself draws nothing; the recipe in the output repeats it, whichever stage is written."""
    (tmp_path / "r.yaml").write_text(DRAWN)
    for out, options in (("zero", ()), ("seven", ("--seed", "7")), ("one", ("--seed", "7", "--stage", "one"))):
        run = dare("merge", tmp_path / "r.yaml", tmp_path / out, *options, "--force")
        assert run.code == 0 and "seed has no effect" not in run.err
    zero, seven = families.load(tmp_path / "zero"), families.load(tmp_path / "seven")
    name = "model.layers.0.mlp.up_proj.weight"
    assert (zero[name] != seven[name]).any()
    for out in ("seven", "one"):
        dk.merge(tmp_path / out / "darekit_recipe.yaml", tmp_path / f"{out} again", **OPTIONS)
        families.same(families.load(tmp_path / f"{out} again"), families.load(tmp_path / out))
    stage = dk.read_recipe(tmp_path / "r.yaml", seed=7, stage="one")
    assert stage.text.startswith("# stage one; overridden: seed=7\n") and stage.sparsify.seed == 7
    recipe = dk.read_recipe(tmp_path / "r.yaml", settings={"parameters.weight": 0.25}, seed=7)
    (tmp_path / "text.yaml").write_text(recipe.text)
    assert read_recipe(tmp_path / "text.yaml") == recipe and recipe.stages[0][1].sparsify.seed == 7


def test_a_seed_that_draws_nothing_is_told(tmp_path):
    (tmp_path / "r.yaml").write_text(DRAWN.replace("dare_ties", "ties").replace("density: 0.5, ", ""))
    assert any("seed has no effect" in note for note in read_recipe(tmp_path / "r.yaml", seed=7).notes)
    (tmp_path / "outer.yaml").write_text("models: [r.yaml, m2]\nmerge_method: linear\n")
    notes = read_recipe(tmp_path / "outer.yaml", seed=7).notes
    assert "the seed is that of this file's recipes: r.yaml keeps its own" in notes


def test_the_card_names_the_models_that_recipes_are_made_of(tmp_path):
    (tmp_path / "r.yaml").write_text(DRAWN)
    (tmp_path / "outer.yaml").write_text("models: [r.yaml, m3]\nmerge_method: linear\n")
    private = str(Path("m0").resolve())
    (tmp_path / "stage.yaml").write_text(DRAWN.replace("[m0,", f"[{private},"))
    for name in ("outer", "stage"):
        dk.merge(tmp_path / f"{name}.yaml", tmp_path / name, **OPTIONS)
    outer, stage = ((tmp_path / name / "README.md").read_text() for name in ("outer", "stage"))
    assert sorted(front_matter(outer)["base_model"]) == ["base", "m0", "m1", "m2", "m3"]
    assert "- `r.yaml`, merged from `m0`, `m1`, `base`, `m2`\n" in outer
    assert sorted(front_matter(stage)["base_model"]) == ["base", "m0", "m1", "m2"]
    assert "- `one`, merged from `m0`, `m1`, `base`\n" in stage and private not in stage


def test_the_one_without_a_name_is_written_wherever_it_stands(tmp_path):
    stage, final = "name: a\nmodels: [m0, m1]\nmerge_method: linear\n", "models: [a, m1]\nmerge_method: linear\n"
    for name, documents in (("behind", (stage, final)), ("before", (final, stage))):
        (tmp_path / f"{name}.yaml").write_text("---\n".join(documents))
        dk.merge(tmp_path / f"{name}.yaml", tmp_path / name, force=True, threads=1)
    families.same(families.load(tmp_path / "behind"), families.load(tmp_path / "before"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [m0]\nmerge_method: linear\n---\nmodels: [m1]\nmerge_method: linear\n",
         "documents 1 and 2 of 2 have no name"),
        ("name: a\nmodels: [m0]\nmerge_method: linear\n---\nname: a\nmodels: [m1]\nmerge_method: linear\n",
         "line 5: name 'a' is the name of an earlier document"),
        ("name: a\nmodels: [b]\nmerge_method: linear\n---\nname: b\nmodels: [a]\nmerge_method: linear\n",
         "contain each other: b > a > b"),
        ("name: a\nmodels: [m0]\nmerge_method: lineer\n---\nmodels: [a]\nmerge_method: linear\n",
         "did you mean 'linear'"),
        ("- a\n---\nmodels: [a]\nmerge_method: linear\n", "found a list"),
    ],
)  # fmt: skip
def test_bad_documents(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(tmp_path / "recipe.yaml")


def test_recipes_of_each_other(tmp_path):
    for one, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{one}.yaml").write_text(f"models: [{other}.yaml]\nmerge_method: linear\n")
    with (
        pytest.raises(RecipeError, match=r"recipes that contain each other: .*b\.yaml > .*c\.yaml > .*a\.yaml > "),
        open_plan(read_recipe(tmp_path / "a.yaml"), search=[tmp_path]),
    ):
        pass


def test_relative_names_are_of_the_recipes_own_folder(tmp_path, folder):
    (tmp_path / "inner").mkdir()
    families.copy(folder / "m0", tmp_path / "inner" / "model")
    (tmp_path / "inner" / "r.yaml").write_text("models: [model, model]\nmerge_method: linear\n")
    (tmp_path / "outer.yaml").write_text("models: [inner/r.yaml]\nmerge_method: linear\n")
    dk.merge(tmp_path / "outer.yaml", tmp_path / "out", **OPTIONS)
    families.same(families.load(tmp_path / "out"), families.load(folder / "m0"))


def test_a_nan_within_is_told(tmp_path, folder):
    tensors = families.load(folder / "m0")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].copy()
    tensors["model.norm.weight"][3] = np.nan
    families.save(tmp_path / "bad", tensors, families.config(vocab=2200, layers=2))
    (tmp_path / "r.yaml").write_text("models: [bad, m1]\nmerge_method: linear\n")
    with pytest.raises(DataError, match=r"r\.yaml: NaN or Inf in the input(.|\n)*bad: model\.norm\.weight: 1 values"):
        dk.merge({"models": [str(tmp_path / "r.yaml"), "m2"], "merge_method": "linear"}, tmp_path / "out", **OPTIONS)


@pytest.fixture
def holes(folder):
    """m0 with NaN and Inf here and there."""
    tensors = dict(families.load(folder / "m0"))
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[[3, 700]] = np.nan, np.inf
    return families.save(folder / "holes", tensors, families.config(vocab=2200, layers=2))


@pytest.mark.parametrize("first", ["dare_ties", "ties", "ties of models", "della", "model_stock"])
def test_nonfinite_values_within_are_allowed(tmp_path, holes, first):
    """As with an intermediate checkpoint that was made so; also two recipes deep."""
    inner = {**FIRST[first], "models": ["holes", "m1"]}
    outer = {"base_model": "base", "models": ["m2"], "merge_method": "task_arithmetic"}
    (tmp_path / "middle.yaml").write_text(json.dumps({**outer, "models": ["inner.yaml"]}))
    (tmp_path / "inner.yaml").write_text(json.dumps(inner))
    dk.merge(inner, tmp_path / "inner", allow_nonfinite=True, **OPTIONS)
    names = [str(tmp_path / "inner.yaml"), str(tmp_path / "middle.yaml")]
    for i, name in enumerate(names):
        with pytest.raises(DataError, match="NaN"):
            dk.merge({**outer, "models": [name, "m2"]}, tmp_path / "refused", **OPTIONS)
        dk.merge({**outer, "models": [name, "m2"]}, tmp_path / f"out{i}", allow_nonfinite=True, **OPTIONS)
    dk.merge({**outer, "models": [str(tmp_path / "inner"), "m2"]}, tmp_path / "expected", **OPTIONS)
    families.same(families.load(tmp_path / "out0"), families.load(tmp_path / "expected"))
    found = families.load(tmp_path / "out1")
    assert all(np.isfinite(array.astype(np.float32)).all() for array in found.values())


def test_nonfinite_values_of_a_recipe_without_a_base_are_not_allowed(tmp_path, holes):
    (tmp_path / "inner.yaml").write_text(json.dumps({**FIRST["linear"], "models": ["holes", "m1"]}))
    outer = {"base_model": "base", "models": [str(tmp_path / "inner.yaml")], "merge_method": "task_arithmetic"}
    with pytest.raises(PlanError, match=r"inner.yaml has no base; add base_model to it"):
        dk.merge(outer, tmp_path / "out", allow_nonfinite=True, **OPTIONS)


def test_the_base_within_is_checked(tmp_path, folder):
    rng = np.random.default_rng(3)
    families.save(folder / "foreign", families.llama(rng, layers=2, vocab=2200), families.config(vocab=2200, layers=2))
    inner = {**FIRST["dare_ties"], "base_model": "foreign"}
    (tmp_path / "inner.yaml").write_text(json.dumps(inner))
    (tmp_path / "middle.yaml").write_text(
        json.dumps({"models": ["inner.yaml", "inner.yaml"], "merge_method": "linear"})
    )
    for name in ("inner.yaml", "middle.yaml"):
        outer = {"models": [str(tmp_path / name), "m2"], "merge_method": "slerp", "parameters": {"t": 0.5}}
        with pytest.raises(HomologyError, match=r"inner.yaml: foreign does not look like the base of m0.*--force"):
            dk.merge(outer, tmp_path / "out")
        said = []
        with open_plan(read_recipe(outer), search=[folder]) as plan:
            check(plan, force=True, say=said.append)
        assert sum("inner.yaml: foreign does not look like the base" in line for line in said) == 2 * (
            1 + (name == "middle.yaml")
        )
        dk.merge(outer, tmp_path / name.removesuffix(".yaml"), **OPTIONS)


def test_identity_known_answer(tmp_path):
    """Frozen: seeds, and through them masks, follow from it. No path counts, and every number does."""
    for name in ("a", "b", "moved"):
        tensors = {"w": np.arange(8, dtype=np.float32) * (2 if name == "b" else 1), "n": np.ones(2, np.float32)}
        families.save(tmp_path / name, tensors, {"model_type": "none"})

    def digest(model, density, ref="r.yaml"):
        data = {"base_model": str(tmp_path / model), "models": [str(tmp_path / "b")], "merge_method": "dare_linear",
                "parameters": {"density": density, "seed": 5}}  # fmt: skip
        (tmp_path / ref).write_text(json.dumps(data))
        with open_models(None, [tmp_path / ref]) as (_, (found,)):
            assert isinstance(found.tensors["w"].source, Computed)
            assert traits_of(found.tensors["w"].source).identity is not None
            return sample_digest(found).hex()

    assert digest("a", 0.5) == "68e494fd0a25329a661e0cda586de6b3"
    assert digest("moved", 0.5, "other.yaml") == digest("a", 0.5)
    assert digest("a", 0.25) != digest("a", 0.5)
