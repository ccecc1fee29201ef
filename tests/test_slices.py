# SPDX-License-Identifier: Apache-2.0
"""Recipes of slices: which layer goes where, by numpy; parameters by slice; what is refused."""

import itertools
import json
import re

import numpy as np
import pytest

import darekit as dk
import families
from darekit import masks
from darekit.errors import HomologyError, PlanError, RecipeError
from darekit.planning.opening import open_plan
from darekit.recipe import Filtered, Filters, Gradient, Place, read_recipe
from darekit.recipe.values import BySlice, by_slice, chained, mapped, scalars_of

LAYERS = 6
OPTIONS = {"force": True, "threads": 1}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A float32 family with six layers."""
    path = tmp_path_factory.mktemp("deep")
    rng = np.random.default_rng(5)
    base = families.llama(rng, np.float32, layers=LAYERS)
    for name in ("base", "m0", "m1"):
        config = families.config(layers=LAYERS, dtype="float32")
        families.save(path / name, base if name == "base" else families.tuned(rng, base), config)
    return path


def source(model, start, end, **parameters):
    return {"model": model, "layer_range": [start, end], "parameters": parameters}


def merged(deep, tmp_path, slices, method="passthrough", *, base=None, **keys):
    """The output's tensors and config."""
    data = {"slices": slices, "merge_method": method, **({"base_model": base} if base else {}), **keys}
    (tmp_path / "recipe.json").write_text(json.dumps(data))
    report = dk.merge(tmp_path / "recipe.json", tmp_path / "out", overwrite=True, **OPTIONS)
    return families.load(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text()), report


@pytest.fixture(autouse=True)
def _here(deep, monkeypatch):
    monkeypatch.chdir(deep)


def test_layers_of_other_places_are_no_children_of_the_base(deep, tmp_path):
    """No --force is needed where a stack sets other layers of a model on those of the base; where it sets the same
    ones, a model of another base is refused as ever."""
    data = {"merge_method": "slerp", "base_model": "base", "parameters": {"t": 0.5}}
    crossed = [source("base", 0, 3), source("m0", 3, 6)]
    dk.merge({**data, "slices": [{"sources": crossed}]}, tmp_path / "out")
    rng = np.random.default_rng(6)
    families.save(deep / "foreign", families.llama(rng, np.float32, layers=LAYERS), families.config(layers=LAYERS))
    foreign = [{"sources": [source("base", 0, 3), source("foreign", 0, 3)]}]
    with pytest.raises(HomologyError, match="does not look like the base"):
        dk.merge({**data, "slices": foreign}, tmp_path / "refused")


def layers_of(tensors):
    """Layer -> rest of the name -> array; and everything else."""
    layers, rest = {}, {}
    for name, array in tensors.items():
        found = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if found:
            layers.setdefault(int(found[1]), {})[found[2]] = array
        else:
            rest[name] = array
    return layers, rest


# --- where layers go


def test_a_stack_is_its_models_layers_byte_for_byte(deep, tmp_path):
    """Overlapping ranges, a model used twice, a slice without layers that gives only what comes after them."""
    wanted = [("m0", 0), ("m0", 1), ("m0", 2), ("m0", 3), ("m1", 2), ("m1", 3), ("m0", 3), ("m0", 4), ("m0", 5)]
    found, config, _ = merged(deep, tmp_path, [
        {"sources": [source("m0", 0, 4)]}, {"sources": [source("m1", 2, 4)]}, {"sources": [source("m0", 3, 6)]},
        {"sources": [source("m1", 6, 6)]},
    ])  # fmt: skip
    models = {name: layers_of(families.load(deep / name)) for name in ("m0", "m1")}
    layers, rest = layers_of(found)
    assert config["num_hidden_layers"] == len(layers) == len(wanted)
    for i, (model, layer) in enumerate(wanted):
        assert layers[i].keys() == models[model][0][layer].keys()
        for name, array in layers[i].items():
            assert np.array_equal(array, models[model][0][layer][name]), (i, name)
    assert np.array_equal(rest["model.embed_tokens.weight"], models["m0"][1]["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert np.array_equal(rest[name], models["m1"][1][name])


def test_scale_and_sources_of_different_layers(deep, tmp_path):
    found, _, _ = merged(deep, tmp_path, [
        {"sources": [source("m0", 0, 1, scale=[{"filter": "o_proj", "value": 0.5}, {"value": 2}])]},
        {"sources": [source("m0", 1, 2)]},
    ])  # fmt: skip
    own, _ = layers_of(families.load(deep / "m0"))
    layers, _ = layers_of(found)
    assert np.array_equal(layers[0]["self_attn.o_proj.weight"], own[0]["self_attn.o_proj.weight"] * np.float32(0.5))
    assert np.array_equal(layers[0]["mlp.up_proj.weight"], own[0]["mlp.up_proj.weight"] * np.float32(2))
    assert np.array_equal(layers[1]["mlp.up_proj.weight"], own[1]["mlp.up_proj.weight"])
    found, _, _ = merged(
        deep, tmp_path, [{"sources": [source("m0", 0, 2, weight=3), source("m0", 3, 5, weight=1)]}], "linear"
    )
    layers, _ = layers_of(found)
    name = "mlp.down_proj.weight"
    assert np.allclose(layers[1][name], 0.75 * own[1][name] + 0.25 * own[4][name], atol=1e-7)


def test_gradients_run_along_each_slice(deep, tmp_path):
    """By mergekit's rule: layer i of n at i / (n - 1), an only layer at 1, what has no layer at 0."""
    found, _, _ = merged(
        deep, tmp_path,
        [
            {"sources": [source("m0", 0, 3), source("m1", 0, 3)], "parameters": {"weight": [1.0, 3.0]}},
            {"sources": [source("m0", 3, 4, weight=[{"filter": "layers.3.mlp", "value": 5}]), source("m1", 4, 5)]},
        ],
        "linear", parameters={"weight": [1.0, 9.0], "normalize": False},
    )  # fmt: skip
    first, second = (layers_of(families.load(deep / name)) for name in ("m0", "m1"))
    layers, rest = layers_of(found)

    def close(array, a, b):
        assert np.allclose(array, a + b, rtol=1e-6, atol=1e-6)

    for i, weight in enumerate((1.0, 2.0, 3.0)):
        for name, array in layers[i].items():
            close(array, weight * first[0][i][name], weight * second[0][i][name])
    mlp, attention = "mlp.up_proj.weight", "self_attn.q_proj.weight"
    close(layers[3][mlp], 5 * first[0][3][mlp], 9 * second[0][4][mlp])  # the filter matches the model's own name
    close(layers[3][attention], 9 * first[0][3][attention], 9 * second[0][4][attention])
    close(rest["model.norm.weight"], first[1]["model.norm.weight"], second[1]["model.norm.weight"])


def test_deltas_are_to_the_bases_layers_and_masks_follow_the_models_tensors(deep, tmp_path):
    """The same layer used twice is dropped alike, and as in a merge of whole models."""
    drop = {"sparsify": {"method": "dare", "drop_rate": 0.5, "seed": 3}}
    slices = [
        {"sources": [source("base", 0, 4), source("m0", 0, 4)]},
        {"sources": [source("m0", 2, 6), source("base", 2, 6)]},
    ]
    found, _, _ = merged(deep, tmp_path, slices, "task_arithmetic", base="base", **drop)
    whole = {"base_model": "base", "models": ["m0"], "merge_method": "task_arithmetic", **drop}
    dk.merge(whole, tmp_path / "whole", **OPTIONS)
    layers, rest = layers_of(found)
    own, outside = layers_of(families.load(tmp_path / "whole"))
    for i, layer in enumerate((0, 1, 2, 3, 2, 3, 4, 5)):
        for name, array in layers[i].items():
            assert np.array_equal(array, own[layer][name]), (i, name)
    for name, array in outside.items():
        assert np.array_equal(rest[name], array)


def test_masks_of_a_moved_layer_known_answer(deep):
    """Frozen: the stream of layer 0 of the output is that of the model's layer 2."""
    data = {
        "base_model": "base", "merge_method": "task_arithmetic", "sparsify": {"method": "dare", "drop_rate": 0.5},
        "slices": [{"sources": [source("base", 2, 4), source("m0", 2, 4)]}],
    }  # fmt: skip
    with open_plan(read_recipe(data), search=[deep]) as plan:
        step = next(step for step in plan.steps if step.name == "model.layers.0.mlp.up_proj.weight")
        whole = {
            "base_model": "base",
            "models": ["m0"],
            "merge_method": "task_arithmetic",
            "sparsify": data["sparsify"],
        }
    with open_plan(read_recipe(whole), search=[deep]) as other:
        assert plan.seeds == other.seeds
    (spec,) = step.chains[0]
    assert spec.stream == "model.layers.2.mlp.up_proj.weight"
    assert masks.stream_of(spec.stream) == 2157618949589583314


def test_slerp_of_slices_with_bases_of_their_own(deep, tmp_path):
    """`base_model` of a slice; and without any, the first source."""
    slices = [
        {"sources": [source("m0", 0, 3), source("m1", 0, 3)], "base_model": "m1"},
        {"sources": [source("m0", 3, 6), source("base", 3, 6)], "base_model": "m0"},
    ]
    found, _, _ = merged(deep, tmp_path, slices, "slerp", parameters={"t": 0.0})
    layers, rest = layers_of(found)
    first, second = (layers_of(families.load(deep / name)) for name in ("m0", "m1"))
    for i in range(LAYERS):
        for name, array in layers[i].items():
            assert np.allclose(array, (second if i < 3 else first)[0][i][name], atol=1e-6)
    assert np.allclose(rest["model.embed_tokens.weight"], second[1]["model.embed_tokens.weight"], atol=1e-6)
    assert np.allclose(rest["lm_head.weight"], first[1]["lm_head.weight"], atol=1e-6)


def test_modules_and_slices_that_change_nothing_are_a_plain_recipe():
    models = [{"model": "m0", "parameters": {"weight": 0.5}}, {"model": "m1"}]
    plain = read_recipe({"models": models, "merge_method": "linear", "parameters": {"weight": [1, 2]}})
    module = {"default": {"models": models, "parameters": {"weight": [1, 2]}}}
    assert read_recipe({"modules": module, "merge_method": "linear"}) == plain


# --- the recipe as data


@pytest.mark.parametrize(
    "data",
    [
        {"slices": [{"sources": [source("a", 0, 4)]}, {"sources": [source("b", "2", 6.0, scale=0.5)]}],
         "merge_method": "passthrough"},
        {"slices": [{"sources": [source("a", 0, 2, weight=1), source("a", 2, 4, weight=[0, 1])],
                     "parameters": {"normalize": False}}, {"sources": [source("c", 0, 2)]}], "merge_method": "linear"},
        {"slices": [{"sources": [source("x", 0, 2), source("b", 0, 2, density=[0.5, 0.2])]},
                    {"sources": [source("x", 2, 4), source("c", 2, 4)], "parameters": {"density": 0.3}}],
         "base_model": "x", "merge_method": "dare_ties", "parameters": {"density": 0.9, "weight": 0.5}},
        {"slices": [{"sources": [source("x", 0, 2), source("b", 0, 2, drop_rate=0.2)]},
                    {"sources": [source("x", 2, 4), source("b", 2, 4)], "parameters": {"drop_rate": [0.1, 0.2]}}],
         "base_model": "x", "merge_method": "ties", "sparsify": {"method": "dare"}},
        {"slices": [{"sources": [source("x", 0, 2), source("b", 0, 2)], "base_model": "b", "parameters": {"t": 0.1}},
                    {"sources": [source("x", 2, 4), source("b", 2, 4)], "parameters": {"t": [0, 1]}}],
         "base_model": "x", "merge_method": "slerp"},
        {"modules": {"text_decoder": {"slices": [{"sources": [source("a", 0, 4)]}]}, "projector": {"models": ["a"]}},
         "merge_method": "passthrough"},
        {"slices": [{"sources": [source("x", 0, 2), source("b", 0, 2)], "parameters": {"density": 0.5}},
                    {"sources": [source("b", 2, 4), source("x", 2, 4)]}], "base_model": "x", "merge_method": "ties",
         "parameters": {"rescale": "l1", "density": 0.2}},
    ],
)  # fmt: skip
def test_round_trip(data):
    recipe = read_recipe(data)
    assert recipe.slices
    assert read_recipe(recipe.to_data()) == recipe
    assert read_recipe(json.loads(json.dumps(recipe.to_data()))) == recipe


def test_values_by_slice():
    one = by_slice([0.5, None, Gradient((0.0, 1.0))])
    assert [one.at(Place("w", depth=0.25, slice=i)) for i in (0, 1, 2, None)] == [0.5, None, 0.25, None]
    assert chained([one, 7.0]) == BySlice((0.5, 7.0, Gradient((0.0, 1.0))))
    filters = Filters((Filtered("mlp", 1.0),))
    assert chained([filters, one]) == BySlice((
        Filters((Filtered("mlp", 1.0), Filtered("*", 0.5))), filters,
        Filters((Filtered("mlp", 1.0), Filtered("*", Gradient((0.0, 1.0))))),
    ))  # fmt: skip
    assert mapped(one, lambda x: 1 - x) == BySlice((0.5, None, Gradient((1.0, 0.0))))
    assert [*scalars_of(one)] == [0.5, 0.0, 1.0]


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([], "expected a list of at least one `- sources"),
        ([{"models": ["a"]}], "expected `sources:`"),
        ([{"sources": []}], "at least one `- {model: name, layer_range: [0, 8]}`"),
        ([{"sources": [{"model": "a"}]}], "has no layer_range"),
        ([{"sources": [source("a", 4, 2)]}], "must be two whole numbers"),
        ([{"sources": [source("a", -1, 2)]}], "must be two whole numbers"),
        ([{"sources": [source("a", 0, 2.5)]}], "must be two whole numbers"),
        ([{"sources": [{"model": "a", "layer_range": [0]}]}], "the first layer and the one after the last"),
        ([{"sources": [source("a", 0, 2), source("b", 0, 3)]}], "the same number of layers"),
        ([{"sources": [source("a", 0, 2)], "parmeters": {}}], "did you mean 'parameters'?"),
        ([{"sources": [{"model": "a", "layer_rnge": [0, 2]}]}], "did you mean 'layer_range'?"),
        ([{"sources": [source("a", 0, 2, sclae=1)]}], "did you mean 'scale'?"),
        ([{"sources": [source("a", 0, 2), source("b", 0, 2)]}], "passthrough takes exactly one model, found 2"),
    ],
)
def test_bad_slices(slices, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        read_recipe({"slices": slices, "merge_method": "passthrough"})


def test_only_one_form():
    slices = [{"sources": [source("a", 0, 2)]}]
    with pytest.raises(RecipeError, match="keep one of them"):
        read_recipe({"slices": slices, "models": ["a"], "merge_method": "passthrough"})


def test_bases_that_are_not_listed(deep, tmp_path):
    """The models' layers are the base's; where theirs differ, nobody knows which are."""
    one = [{"sources": [source("m0", 1, 3)]}]
    found, _, _ = merged(deep, tmp_path, one, "task_arithmetic", base="base", parameters={"weight": 0})
    own, _ = layers_of(families.load(deep / "base"))
    layers, _ = layers_of(found)
    assert np.array_equal(layers[0]["mlp.up_proj.weight"], own[1]["mlp.up_proj.weight"])
    two = [{"sources": [source("m0", 0, 2), source("m1", 1, 3)]}]
    with pytest.raises(RecipeError, match="which layers of base are the base of this slice"):
        read_recipe({"slices": two, "base_model": "base", "merge_method": "task_arithmetic"})


def test_layers_that_are_not_there(deep):
    data = {"slices": [{"sources": [source("m0", 3, 9)]}], "merge_method": "passthrough"}
    with (
        pytest.raises(PlanError, match=r"layer_range \[3, 9\]: m0 has 6 layers"),
        open_plan(read_recipe(data), search=[deep]),
    ):
        pass


def test_a_dry_run_shows_the_stack(deep, tmp_path, dare):
    slices = [
        {"sources": [source("base", 0, 4), source("m0", 0, 4)]},
        {"sources": [source("m0", 3, 6), source("base", 3, 6)], "parameters": {"t": [1, 0]}},
    ]
    data = {"slices": slices, "merge_method": "slerp", "base_model": "base", "parameters": {"t": [0, 0.5, 1]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    shown = dare("merge", tmp_path / "recipe.yaml", tmp_path / "out", "--dry-run", "--force").out
    assert re.search(r"^0-3 +base \(base\) +0-3 of 6 +████·· *$", shown, re.M)
    assert re.search(r"^4-6 +base \(base\) +3-5 of 6 +···███ *$", shown, re.M)
    assert re.search(r"model\.layers +█▄ +4: 1  5: 0\.5  6: 0", shown)
    found = dare("merge", tmp_path / "recipe.yaml", tmp_path / "out", "--dry-run", "--force", "--json").data
    (tower,) = found["layers"]
    assert tower["stack"] == "model.layers" and len(tower["layers"]) == 7
    assert tower["layers"][4] == [
        {"model": "base", "layer": 3, "base": True}, {"model": "m0", "layer": 3, "base": False},
    ]  # fmt: skip


def test_modules_that_name_every_tensor(deep, tmp_path):
    """Nothing is left for a base, and there may be none."""
    models = [{"model": "m0", "parameters": {"weight": 1}}, {"model": "m1", "parameters": {"weight": 3}}]
    plain = {"models": models, "merge_method": "linear"}
    dk.merge(plain, tmp_path / "plain", **OPTIONS)
    dk.merge({"modules": {"text_decoder": {"models": models}}, "merge_method": "linear"}, tmp_path / "out", **OPTIONS)
    families.same(families.load(tmp_path / "out"), families.load(tmp_path / "plain"))


def test_words_that_are_ignored_are_on_the_page():
    from pathlib import Path

    from darekit.recipe import ignored

    page = (Path(__file__).parent.parent / "docs" / "mergekit.md").read_text()
    words = (ignored.PARAMETERS, ignored.OPTIONS, ignored.SLICE_WORDS, ignored.SOURCE_WORDS, ignored.ELSEWHERE)
    for word in itertools.chain(*words):
        assert f"`{word}`" in page, word


@pytest.mark.parametrize(
    ("data", "note"),
    [
        ({"int8_mask": True}, "int8_mask is ignored, as mergekit does"),
        ({"normalize": False}, "normalize is ignored, as mergekit does: it would have an effect under `parameters:`"),
        ({"random_seed": 3}, "random_seed is ignored"),
        ({"models": [{"model": "a", "revision": "v1"}, "b"]}, "`model: org/name@revision`"),
        (
            {"parameters": {"t": 0.5, "select_topk": 1}},
            "parameters.t (a parameter of nearswap and slerp) has no effect",
        ),
    ],
)
def test_ignored_with_a_note(data, note):
    recipe = read_recipe({"models": ["a", "b"], "merge_method": "linear", **data})
    assert any(note in one for one in recipe.notes), recipe.notes
    with pytest.raises(RecipeError):
        read_recipe({"models": ["a", "b"], "merge_method": "linear", "base_model": "x",
                     "sparsify": {"method": "dare", "drop_rate": 0.5}, **data})  # fmt: skip


def test_lenient():
    data = {"models": ["a"], "base_model": "b", "merge_method": "dare_ties", "parameters": {"densty": 0.5}, "dype": "x"}
    with pytest.raises(RecipeError, match="2 keys are not allowed"):
        read_recipe(data)
    recipe = read_recipe(data, lenient=True)
    assert "WARNING: dype is not known; did you mean 'dtype'? Ignored (--lenient)" in recipe.notes
    assert any("dare_ties with density 1 for every model drops nothing: it is ties" in note for note in recipe.notes)
    ties = {"models": ["a"], "base_model": "b", "merge_method": "ties", "parameters": {"density": 0.5, "rescale": True}}
    found = read_recipe(ties, lenient=True)
    assert found.sparsify is not None and found.sparsify.parameters["rescale"] == "l1"


def test_slerp_with_a_third_model(deep, tmp_path):
    """As older versions ran it: from the first to the second; the base gives config and tokenizer."""
    data = {"base_model": "base", "models": ["m0", "m1"], "merge_method": "slerp", "parameters": {"t": 0.25}}
    report = dk.merge(data, tmp_path / "out", **OPTIONS)
    assert any("base is neither of the two models" in note for note in report.notes)
    dk.merge({**data, "base_model": "m0", "models": ["m1"]}, tmp_path / "two", **OPTIONS)
    families.same(families.load(tmp_path / "out"), families.load(tmp_path / "two"))


# --- heads


def halves(*last):
    return [{"sources": [source("m0", 0, 3), source("m1", 0, 3)]}, {"sources": list(last)}]


@pytest.mark.parametrize("giver", ["m0", "m1", "base"])
def test_the_head_of_a_stack_can_be_one_models(deep, tmp_path, giver):
    slices = halves(source("m0", 3, 6), source("m1", 3, 6))
    plain, _, _ = merged(deep, tmp_path, slices, "task_arithmetic", base="base")
    found, _, report = merged(deep, tmp_path, slices, "task_arithmetic", base="base", heads=giver)
    own = families.load(deep / giver)
    for name, array in found.items():
        head = name == "lm_head.weight"
        assert np.array_equal(array, own[name] if head else plain[name]), name
    assert not np.array_equal(plain["lm_head.weight"], own["lm_head.weight"])
    assert giver == "base" or any(f"are taken from {giver};" in note for note in report.notes)


def test_the_giver_of_a_stacks_head_is_in_its_last_slice(deep, tmp_path):
    slices = [{"sources": [source("m0", 0, 3)]}, {"sources": [source("m1", 3, 6)]}]
    found, _, _ = merged(deep, tmp_path, slices, heads="m1")
    assert np.array_equal(found["lm_head.weight"], families.load(deep / "m1")["lm_head.weight"])
    with pytest.raises(PlanError, match=r"heads: m0 has no part in the last slice.*its models are m1\. Name one"):
        merged(deep, tmp_path, slices, heads="m0")


def test_classifiers_of_unlike_heads_stack(tmp_path):
    """A stack of classifiers with 2 and 3 labels: refused without `heads`, with it the giver's, config and all."""
    rng = np.random.default_rng(0)
    kind = {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "num_hidden_layers": 2}
    for i in range(2):
        tensors = {"bert.embeddings.word_embeddings.weight": rng.normal(size=(20, 8)).astype(np.float32)}
        for layer in range(2):
            name = f"bert.encoder.layer.{layer}.output.dense.weight"
            tensors[name] = rng.normal(size=(8, 8)).astype(np.float32)
        tensors |= {"classifier.weight": rng.normal(size=(2 + i, 8)).astype(np.float32)}
        labels = {"id2label": {str(k): f"m{i}-{k}" for k in range(2 + i)}}
        families.save(tmp_path / f"m{i}", tensors, {**kind, **labels, "vocab_size": 20})
    one = [source(str(tmp_path / f"m{i}"), 0, 2) for i in range(2)]
    recipe = {"slices": [{"sources": one}], "merge_method": "linear", "parameters": {"weight": 0.5}}
    with pytest.raises(HomologyError, match="heads"):
        dk.merge(recipe, tmp_path / "out", **OPTIONS)
    dk.merge({**recipe, "heads": one[1]["model"]}, tmp_path / "out", **OPTIONS)
    found, own = families.load(tmp_path / "out"), families.load(tmp_path / "m1")
    assert np.array_equal(found["classifier.weight"], own["classifier.weight"])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["id2label"] == {str(k): f"m1-{k}" for k in range(3)}


# --- where an error is


def test_layers_that_are_not_there_are_told_with_their_line(deep, tmp_path):
    text = (
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n- sources:\n  - model: m0\n    layer_range: [0, 3]\n"
        "  - model: m1\n    layer_range: [4, 7]\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(PlanError, match=r"r\.yaml line 8: layer_range \[4, 7\]: m1 has 6 layers"):
        dk.merge(tmp_path / "r.yaml", tmp_path / "out")
    (tmp_path / "r.yaml").write_text(text.replace("linear", "task_arithmetic") + "base_model: m1\n")
    with pytest.raises(PlanError, match=r"r\.yaml line 8: layer_range \[4, 7\]: m1 has 6 layers"):
        dk.merge(tmp_path / "r.yaml", tmp_path / "out")


def test_no_layers_at_all_are_told_with_their_line(deep, tmp_path):
    text = "merge_method: passthrough\nslices:\n- sources:\n  - {model: m0, layer_range: [2, 2]}\n"
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(PlanError, match=r"r\.yaml line 3: the slices have no layers at all: .* as \[0, 16\]"):
        dk.merge(tmp_path / "r.yaml", tmp_path / "out")
    with pytest.raises(PlanError, match=r"the slices have no layers at all"):  # a recipe from Python has no lines
        dk.merge(read_recipe(tmp_path / "r.yaml").to_data(), tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "of"),
    [
        ({"merge_method": "passthrough"}, None),
        ({"merge_method": "slerp", "base_model": "base", "parameters": {"t": 0.5}}, None),
        ({"merge_method": "task_arithmetic", "base_model": "base"}, "delta"),
        ({"merge_method": "linear", "base_model": "base",
          "sparsify": {"method": "dare", "drop_rate": 0.5, "on": "weights"}}, "weights"),
    ],
)  # fmt: skip
def test_what_is_kept_is_told_as_what_it_is(deep, tmp_path, dare, keys, of):
    report = dk.merge({"models": ["m0"], **keys}, tmp_path / "out", **OPTIONS)
    assert report.kept_of == of
    (tmp_path / "r.yaml").write_text(json.dumps({"models": ["m0"], **keys}))
    said = dare("merge", tmp_path / "r.yaml", tmp_path / "told", "--force").out
    assert (f"of m0's {of}" in said) if of else "  kept" not in said
