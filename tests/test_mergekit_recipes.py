# SPDX-License-Identifier: Apache-2.0
"""mergekit's form of recipes: what its words mean here, and what is refused."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darekit.errors import RecipeError
from darekit.methods import SPARSIFIERS
from darekit.recipe import Filtered, Filters, Gradient, Place, Recipe, Sparsify, read_recipe, resolve
from darekit.recipe.mergekit import PRODUCTS, complement

DARE_TIES = """\
    models:
      - model: mistralai/Mistral-7B-v0.1
        # no parameters necessary for base model
      - model: samir-fama/SamirGPT-v1
        parameters:
          density: 0.53
          weight: 0.4
      - model: abacusai/Slerp-CM-mist-dpo
        parameters:
          density: 0.3
          weight: 0.3
          seed: 11
    merge_method: dare_ties
    base_model: mistralai/Mistral-7B-v0.1
    parameters:
      int8_mask: true
    dtype: bfloat16
    """


def make(method: str, *models: dict[str, Any], base: str | None = "b", **parameters: Any) -> Recipe:
    entries = [{"model": f"m{i}", "parameters": own} for i, own in enumerate(models)]
    return read_recipe({"base_model": base, "models": entries, "merge_method": method, "parameters": parameters})


def refused(method: str, *models: dict[str, Any], **parameters: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        make(method, *models, **parameters)
    return str(caught.value)


def filters_of(*pairs: tuple[str, Any]) -> Filters:
    return Filters(tuple(Filtered(*pair) for pair in pairs))


def test_a_recipe_from_the_hub(tmp_path: Path):
    path = tmp_path / "mergekit_config.yml"
    path.write_text(dedent(DARE_TIES))
    recipe = read_recipe(path)
    assert [entry.model for entry in recipe.models] == ["samir-fama/SamirGPT-v1", "abacusai/Slerp-CM-mist-dpo"]
    assert recipe.models[0].parameters == {"weight": 0.4, "drop_rate": 0.47}
    assert recipe.models[1].parameters == {"weight": 0.3, "drop_rate": 0.7, "seed": 11}
    assert recipe.sparsify == Sparsify("dare", {}, "delta", 0, ())
    assert recipe.merge_method == "ties"
    assert recipe.parameters == {"keep": 1.0, "normalize": False}
    assert recipe.dtype == "BF16"
    assert any("int8_mask is accepted and has no effect" in note for note in recipe.notes)
    assert not any("density 1" in note for note in recipe.notes)  # the base's is not counted
    assert recipe.text == dedent(DARE_TIES)


@pytest.mark.parametrize(
    ("method", "sparsify", "merge_method", "parameters"),
    [
        ("dare_linear", Sparsify("dare", {}), "task_arithmetic", {"normalize": False}),
        ("dare_ties", Sparsify("dare", {}), "ties", {"normalize": False, "keep": 1.0}),
        ("breadcrumbs", Sparsify("breadcrumbs", {}), "task_arithmetic", {"normalize": False}),
        ("breadcrumbs_ties", Sparsify("breadcrumbs", {}), "ties", {"normalize": False, "keep": 1.0}),
        ("della", Sparsify("della", {"window": 0.3}), "ties", {"normalize": True, "keep": 1.0}),
        ("della_linear", Sparsify("della", {"window": 0.3}), "task_arithmetic", {"normalize": False}),
    ],
)
def test_products(method, sparsify, merge_method, parameters):
    recipe = make(method, {"density": 0.9, "weight": 0.5})
    assert (recipe.sparsify, recipe.merge_method, recipe.parameters) == (sparsify, merge_method, parameters)
    own = {"weight": 0.5, "drop_rate": 0.1} | ({"density": 0.9} if "breadcrumbs" in method else {})
    assert recipe.models[0].parameters == own
    assert read_recipe(recipe.to_data()) == recipe
    inherited = make(method, {}, density=0.9, weight=0.5)
    assert inherited.models[0].parameters["drop_rate"] == 0.1
    assert inherited.parameters["weight"] == 0.5
    assert (
        make(method, {}, density=0.9, normalize=not parameters["normalize"]).parameters["normalize"]
        is not parameters["normalize"]
    )
    assert make(method, {"density": 0.9}, **{"lambda": 0.5}).parameters["lambda"] == 0.5


def test_defaults_of_the_table_are_mergekits():
    """Only what is given is stored: rescale's defaults per sparsifier and gamma's must agree with mergekit's."""
    assert SPARSIFIERS["dare"].parameters["rescale"].default == "paper"
    assert SPARSIFIERS["della"].parameters["rescale"].default == "paper"
    assert SPARSIFIERS["breadcrumbs"].parameters["rescale"].default == "none"
    assert SPARSIFIERS["breadcrumbs"].parameters["gamma"].default == 0.01


@pytest.mark.parametrize(
    ("density", "rate"), [(0.1, 0.9), (0.9, 0.1), (0.3, 0.7), (0.53, 0.47), (0, 1), (1, 0), (1e-3, 0.999)]
)
def test_drop_rate_is_the_decimal_that_was_meant(density, rate):
    assert complement(density) == rate


@given(st.integers(0, 10**6))
def test_complement_of_decimals(millionths):
    assert complement(millionths / 10**6) == (10**6 - millionths) / 10**6


def test_rescale():
    def rescale(method: str, value: Any) -> Any:
        recipe = make(method, {"density": 0.5}, rescale=value)
        assert recipe.sparsify is not None
        return recipe.sparsify.parameters["rescale"]

    for method in PRODUCTS:
        assert rescale(method, "paper") == "paper"
        assert rescale(method, True) == ("paper" if PRODUCTS[method].random else "l1")
        assert rescale(method, False) == rescale(method, "none") == "none"
        assert rescale(method, "l1") == "l1"
    assert any("restores the delta's L1 norm" in n for n in make("breadcrumbs", {"density": 0.5}, rescale=True).notes)
    assert "parameters.rescale must be one of true, false, paper, l1, none" in refused("dare_ties", {}, rescale="L2")


def test_ties_density_is_keep():
    recipe = make("ties", {"density": 0.3, "weight": 1}, {"weight": 2}, density=0.2, normalize=True)
    assert recipe.sparsify is None
    assert recipe.models[0].parameters == {"keep": 0.3, "weight": 1.0}
    assert recipe.models[1].parameters == {"weight": 2.0}
    assert recipe.parameters == {"keep": 0.2, "normalize": True}
    assert not any("no trim" in note for note in recipe.notes)
    notes = make("ties", {"density": 0.3}, {}, {}).notes
    assert any("ties without keep for m1 and m2: no trim" in note for note in notes)
    assert any("ties without keep: no trim" in note for note in make("ties", {}).notes)
    filters = [{"filter": "mlp", "value": 0.5}, {"value": 0.1}]
    assert make("ties", {}, density=filters).parameters["keep"] == filters_of(("mlp", 0.5), ("*", 0.1))
    assert "density and keep are the same quantity" in refused("ties", {"density": 0.3}, keep=0.2)
    assert "density and keep are the same quantity" in refused("ties", {"density": 0.3, "keep": 0.2})


def test_ties_with_rescale():
    assert make("ties", {"density": 0.3}, rescale=False).sparsify is None
    assert "write rescale: l1 for mergekit's" in refused("ties", {"density": 0.3}, rescale=True)
    recipe = make("ties", {"density": 0.3}, {}, rescale="l1")
    assert recipe.sparsify == Sparsify("magnitude", {"drop_rate": 0.0, "rescale": "l1"})
    assert recipe.models[0].parameters == {"drop_rate": 0.7, "density": 0.3}
    assert recipe.parameters == {"keep": 1.0}
    assert read_recipe(recipe.to_data()) == recipe
    paper = make("ties", {}, density=0.2, rescale="paper")
    assert paper.sparsify == Sparsify("magnitude", {"drop_rate": 0.0, "rescale": "paper"})
    assert paper.models[0].parameters == {"drop_rate": 0.8, "density": 0.2}
    assert "nothing to rescale" in refused("ties", {}, rescale="l1", keep=0.2)


def test_della_window_is_twice_epsilon():
    recipe = make("della", {"density": 0.5, "epsilon": 0.1}, {}, density=0.4, epsilon=0.2)
    assert recipe.sparsify == Sparsify("della", {"window": 0.4})
    assert recipe.models[0].parameters == {"drop_rate": 0.5, "window": 0.2}
    assert "parameters.epsilon must be in [0, 0.5], found 0.6" in refused("della", {}, density=0.5, epsilon=0.6)


def test_breadcrumbs_keeps_the_density_as_written():
    """Also where it comes from the top level, or from both: a list of filters falls through to the next scope."""
    recipe = make(
        "breadcrumbs",
        {"density": 0.8, "gamma": 0.02},
        {"density": [{"filter": "mlp", "value": 0.3}]},
        {},
        density=[{"filter": "attn", "value": 0.9}],
        gamma=0.03,
    )
    assert recipe.sparsify == Sparsify("breadcrumbs", {"gamma": 0.03})
    assert recipe.models[0].parameters == {"density": 0.8, "drop_rate": 0.2, "gamma": 0.02}
    assert recipe.models[1].parameters == {
        "density": filters_of(("mlp", 0.3), ("attn", 0.9), ("*", 1.0)),
        "drop_rate": filters_of(("mlp", 0.7), ("attn", 0.1), ("*", 0.0)),
    }
    assert recipe.models[2].parameters["density"] == filters_of(("attn", 0.9), ("*", 1.0))
    assert read_recipe(recipe.to_data()) == recipe


def test_breadcrumbs_may_keep_nothing_of_a_small_tensor_where_magnitude_keeps_one():
    """mergekit keeps int(density n), and refuses `magnitude` of nothing; native drop rates keep one."""
    prepared = {
        (method, density, count): SPARSIFIERS[method].prepare(
            {"drop_rate": 1 - density, "density": density, "gamma": 0.05}, count, "x"
        )["keep_count"]
        for method in ("breadcrumbs", "magnitude") for density in (0.01, 0.5) for count in (40, 300)
    }  # fmt: skip
    assert prepared == {
        ("breadcrumbs", 0.01, 40): 0, ("breadcrumbs", 0.01, 300): 3, ("breadcrumbs", 0.5, 40): 20,
        ("breadcrumbs", 0.5, 300): 150, ("magnitude", 0.01, 40): 1, ("magnitude", 0.01, 300): 3,
        ("magnitude", 0.5, 40): 20, ("magnitude", 0.5, 300): 150,
    }  # fmt: skip


def test_a_list_of_densities_falls_through():
    recipe = make("dare_linear", {"density": [{"filter": "mlp", "value": 0.3}]}, density=0.6)
    assert recipe.models[0].parameters["drop_rate"] == filters_of(("mlp", 0.7), ("*", 0.4))
    # What nothing can reach is left out: the recipe in a lock must be one that can be read again.
    whole = make("dare_linear", {"density": [{"filter": "mlp", "value": 0.3}, {"value": 0.8}]}, density=0.6)
    assert whole.models[0].parameters["drop_rate"] == filters_of(("mlp", 0.7), ("*", 0.2))
    assert read_recipe(whole.to_data()) == whole


def test_gradients_of_densities():
    """Complemented number by number; the value of a filter may be one; the next level may be one."""
    recipe = make("dare_ties", {"density": [1, 0.7, 0.1], "weight": [0, "1e-1"]}, {}, density=[0.5, 0.25])
    assert recipe.models[0].parameters == {"drop_rate": Gradient((0.0, 0.3, 0.9)), "weight": Gradient((0.0, 0.1))}
    assert recipe.models[1].parameters == {"drop_rate": Gradient((0.5, 0.75))}
    assert read_recipe(recipe.to_data()) == recipe
    mixed = make("dare_ties", {"density": [{"filter": "mlp", "value": [0, 0.5, 1]}]}, density=[0.9, 0.6])
    assert mixed.models[0].parameters["drop_rate"] == filters_of(
        ("mlp", Gradient((1.0, 0.5, 0.0))), ("*", Gradient((0.1, 0.4)))
    )
    assert read_recipe(mixed.to_data()) == mixed
    assert make("ties", {"density": [1, 0.7, 0.1]}).models[0].parameters == {"keep": Gradient((1.0, 0.7, 0.1))}
    magnitude = make("ties", {"density": [1, 0.7, 0.1]}, rescale="l1")
    assert magnitude.models[0].parameters == {
        "drop_rate": Gradient((0.0, 0.3, 0.9)), "density": Gradient((1.0, 0.7, 0.1)),
    }  # fmt: skip
    crumbs = make("breadcrumbs", {"density": [0.8, 0.2], "gamma": [0.01, 0.02]})
    assert crumbs.models[0].parameters == {
        "drop_rate": Gradient((0.2, 0.8)), "density": Gradient((0.8, 0.2)), "gamma": Gradient((0.01, 0.02)),
    }  # fmt: skip
    assert read_recipe(crumbs.to_data()) == crumbs
    della = make("della", {"density": 0.5, "epsilon": [0.1, 0.2]}, epsilon=[0.05, 0.1])
    assert della.models[0].parameters["window"] == Gradient((0.2, 0.4))
    assert della.sparsify is not None and della.sparsify.parameters["window"] == Gradient((0.1, 0.2))
    assert "drops nothing" in refused("dare_ties", {"density": [1, 1.0]})
    assert not any("nothing in it is dropped" in note for note in recipe.notes)
    assert "density.1 must be in [0, 1], found 7" in refused("ties", {"density": [1, 7]})


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_all_densities_1(method):
    for models, shared in [
        ([{}], {}),
        ([{"density": 1.0}, {}], {}),
        ([{}], {"density": 1}),
        ([{"density": [{"filter": "a", "value": 1}]}], {}),
    ]:
        message = refused(method, *models, **shared)
        assert f"{method} with density 1 for every model drops nothing" in message
        assert "mergekit's silent default" in message
    notes = make(method, {"density": 0.5}, {}).notes
    assert any("m1 has density 1: nothing in it is dropped" in note for note in notes)


def test_linear():
    recipe = make("linear", {"weight": 0.3}, {"weight": 0.7}, base=None, normalize=False, int8_mask=False)
    assert recipe.base_model is None
    assert [entry.parameters["weight"] for entry in recipe.models] == [0.3, 0.7]
    assert recipe.parameters == {"normalize": False}
    data = {"base_model": "b", "models": [{"model": "b", "parameters": {"weight": 0.2}}, "a"], "merge_method": "linear"}
    assert [entry.model for entry in read_recipe(data).models] == ["b", "a"]


def test_the_base_among_the_models_takes_its_parameters_along():
    data = {
        "base_model": "b",
        "models": [{"model": "b", "parameters": {"density": 0.1}}, {"model": "a", "parameters": {"density": 0.5}}],
        "merge_method": "dare_ties",
    }
    assert [entry.model for entry in read_recipe(data).models] == ["a"]
    data["models"] = [{"model": "b", "parameters": {"density": 0.1}}, {"model": "a"}]
    with pytest.raises(RecipeError, match="density 1 for every model"):
        read_recipe(data)


def test_seed():
    recipe = make("dare_ties", {"density": 0.5}, seed=42)
    assert recipe.sparsify is not None and recipe.sparsify.seed == 42
    assert recipe.models[0].parameters == {"drop_rate": 0.5}  # the recipe's seed is not a model's
    data = {"base_model": "b", "models": ["a"], "merge_method": "dare_ties", "parameters": {"density": 0.5, "seed": 1}}
    again = read_recipe(data, seed=43)
    assert again.sparsify is not None and again.sparsify.seed == 43
    assert any("seed has no effect" in note for note in make("ties", {}, seed=1).notes)


def test_words_of_other_methods():
    """mergekit's are ignored there, and so here, with a note; ours are refused."""
    for method, own, shared, said in (
        ("dare_ties", {"epsilon": 0.1, "density": 0.5}, {}, "has no effect with dare_ties"),
        ("della", {"density": 0.5}, {"gamma": 0.1}, "parameters.gamma has no effect with della"),
        ("task_arithmetic", {"density": 0.5}, {}, "models.0.parameters.density has no effect with task_arithmetic"),
        ("linear", {}, {"density": 0.5}, "parameters.density has no effect with linear"),
        ("linear", {}, {"lambda": 1}, "has no effect with linear"),
        ("task_arithmetic", {}, {"rescale": True}, "nothing to rescale"),
        ("ties", {"normalize": True}, {}, "normalize is one for all models"),
    ):
        assert any(said in note for note in make(method, own, **shared).notes), said
    assert make("task_arithmetic", {}, rescale=False).parameters == {}
    assert "dare_ties does not trim" in refused("dare_ties", {"density": 0.5}, keep=0.2)
    assert "takes epsilon, half of the window" in refused("della", {"density": 0.5}, window=0.2)
    message = refused("dare_ties", {"drop_rate": 0.9, "density": 0.1})
    assert "write density: 0.1, or the native form" in message
    assert "`sparsify: {method: dare, drop_rate: ...}` with `merge_method: ties`" in message
    assert "density must be in [0, 1], found 53; a percentage? write 0.53" in refused("dare_ties", {"density": 53})
    assert "did you mean 'density'?" in refused("dare_ties", {"densty": 0.5})


@pytest.mark.parametrize("method", PRODUCTS)
def test_a_sparsify_block_with_a_product(method):
    product = PRODUCTS[method]
    with pytest.raises(RecipeError, match=f"with it write merge_method: {product.merge}"):
        read_recipe(
            {
                "base_model": "b",
                "models": ["a"],
                "merge_method": method,
                "sparsify": {"method": "dare", "drop_rate": 0.9},
            }
        )


def test_near_misses():
    assert "unknown method 'dare-ties'; did you mean 'dare_ties'?" in refused("dare-ties", {})
    assert "did you mean 'breadcrumbs_ties'?" in refused("breadcrumb_ties", {})


@given(
    st.sampled_from([*PRODUCTS, "ties"]),
    st.lists(
        st.none()
        | st.integers(0, 999).map(lambda n: n / 1000)
        | st.lists(st.integers(0, 999), min_size=1, max_size=3).map(
            lambda ns: [{"filter": f"layers.{i}", "value": n / 1000} for i, n in enumerate(ns)]
        )
        | st.lists(st.integers(0, 999), min_size=1, max_size=3).map(lambda ns: [n / 1000 for n in ns])
        | st.lists(st.integers(0, 999), min_size=1, max_size=3).map(
            lambda ns: [{"filter": "mlp", "value": [n / 1000 for n in ns]}, {"value": 0.5}]
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 999),
)
def test_round_trip(method, densities, shared):
    models = [{} if density is None else {"density": density} for density in densities]
    recipe = make(method, *models, density=shared / 1000, seed=5)
    assert read_recipe(recipe.to_data()) == recipe


# --- slerp


def test_slerp_in_each_of_its_forms():
    t = {"parameters": {"t": 0.4}, "merge_method": "slerp"}
    expected = read_recipe(t | {"base_model": "b", "models": ["m"]})
    assert (expected.base_model, expected.models[0].model, expected.parameters) == ("b", "m", {"t": 0.4})
    assert not expected.notes
    for models in (["b", "m"], ["m", "b"], ["m/", "b/"]):
        recipe = read_recipe(t | {"base_model": "b", "models": models})
        assert (recipe.base_model, [e.model.rstrip("/") for e in recipe.models]) == ("b", ["m"]) and not recipe.notes
    recipe = read_recipe(t | {"models": ["b", "m"], "tokenizer_source": "b"})
    assert (recipe.base_model, recipe.models, recipe.tokenizer_source) == ("b", expected.models, "base")
    assert recipe.notes == ("no base_model: b is the base, since it comes first",)
    assert read_recipe(recipe.to_data()) == recipe


def test_slerp_by_filters_as_on_the_hub():
    values = [{"filter": "self_attn", "value": 0.3}, {"filter": "mlp", "value": 0.7}, {"value": 0.5}]
    recipe = read_recipe(
        {"base_model": "b", "models": ["b", "m"], "merge_method": "slerp", "parameters": {"t": values}}
    )
    found = recipe.parameters["t"]
    assert [(e.filter, e.value) for e in found.entries] == [("self_attn", 0.3), ("mlp", 0.7), ("*", 0.5)]
    late = read_recipe(recipe.to_data() | {"parameters": {"t": [{"value": 0.5}, {"filter": "mlp", "value": 1}]}})
    assert late.parameters["t"] == filters_of(("*", 0.5))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"models": ["m"]},
         r"models: slerp takes exactly one model besides base_model \(or two models, of which the first is the base "
         r"then\), found 1 and no base_model"),
        ({"models": ["a", "b", "c"]}, "found 3 and no base_model"),
        ({"base_model": "x", "models": ["a", "b", "c"]}, "found 3 besides x"),
        ({"base_model": "x", "models": ["x"]}, "only the base is listed"),
        ({"base_model": "x", "models": ["a"], "parameters": {}}, "slerp needs t, how far to go: .* add `param"),
        ({"base_model": "x", "models": ["a"], "parameters": {"t": -1.5}}, r"t must be in \[-1, 2\], found -1.5"),
        ({"base_model": "x", "models": ["a"], "parameters": {"t": [0, 50]}}, "a percentage\\? write 0.5"),
        ({"base_model": "x", "models": [{"model": "a", "parameters": {"t": 0.5}}], "parameters": {}}, "slerp needs t"),
        ({"base_model": "x", "models": ["a"], "sparsify": {"method": "dare", "drop_rate": 0.5},
          "parameters": {"t": 0.5, "weight": 1}}, "slerp takes no weights"),
        ({"base_model": "x", "models": ["a"], "sparsify": {"method": "dare", "drop_rate": 0.5, "on": "weights"}},
         "weights works only with merge_method: linear"),
    ],
)  # fmt: skip
def test_slerp_refuses(data, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe({"merge_method": "slerp", "parameters": {"t": 0.5}} | data)


def test_forms_that_mergekit_reads(tmp_path: Path):
    """Filters that match every name, a key given twice alike, and keys that hold nothing but anchors."""
    lines = [
        "defaults: &own {density: 0.5, weight: -0.25}",
        "x-note: {by: me}",
        "base_model: b",
        "models:",
        "- {model: m0, parameters: *own}",
        "- model: m1",
        "  parameters: {<<: *own, weight: [{filter: mlp, value: 1}, {filter: '', value: [0.5, 1e-1]}]}",
        "- {model: m2, parameters: {weight: [{filter: null, value: 0.5}]}}",
        "merge_method: ties",
        "dtype: bfloat16",
        "dtype: bfloat16",
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines))
    recipe = read_recipe(path)
    assert recipe.models[0].parameters == {"weight": -0.25, "keep": 0.5}
    assert recipe.models[1].parameters == {
        "weight": filters_of(("mlp", 1.0), ("*", Gradient((0.5, 0.1)))),
        "keep": 0.5,
    }
    assert recipe.models[2].parameters == {"weight": filters_of(("*", 0.5))}
    assert [note.split()[0] for note in recipe.notes][:2] == ["defaults", "x-note"]
    lines[-1] = "dtype: float16"
    path.write_text("\n".join(lines))
    with pytest.raises(RecipeError, match="line 11: dtype is given twice"):
        read_recipe(path)
    assert read_recipe(path, lenient=True).dtype == "F16"


def test_filters_behind_one_for_all_are_left_out_with_a_warning():
    late = [{"filter": "norm", "value": 1}, {"value": 0.5}, {"filter": "q", "value": 0.1}, {"filter": "k", "value": 2}]
    recipe = make("linear", {"weight": late}, {"weight": 0.5})
    assert recipe.models[0].parameters == {"weight": filters_of(("norm", 1.0), ("*", 0.5))}
    assert [note.split(" is ")[0] for note in recipe.notes] == [
        "WARNING: models.0.parameters.weight.2",
        "WARNING: models.0.parameters.weight.3",
    ]


def test_recipes_of_mergekits_other_tools_are_named(tmp_path: Path):
    path = tmp_path / "moe.yaml"
    path.write_text("base_model: b\ngate_mode: hidden\nexperts: [{source_model: a, positive_prompts: [x]}]\n")
    with pytest.raises(RecipeError, match="experts belongs to mergekit-moe"):
        read_recipe(path)


def test_passthrough_of_several_models_names_slices():
    assert "make each a slice" in refused("passthrough", {}, {})
    sources = [{"model": name, "layer_range": [0, 4]} for name in ("m0", "m1")]
    with pytest.raises(RecipeError, match="each source is a slice of its own"):
        read_recipe({"slices": [{"sources": sources}], "merge_method": "passthrough"})


def test_of_a_key_given_twice_the_last_counts_leniently(tmp_path: Path):
    """Whole blocks and nested keys, as YAML's readers have it; errors behind it name the line that counts."""
    text = """\
        base_model: b
        models:
        - model: m0
          parameters: {weight: 0.25, density: 0.5, weight: 0.75}
        merge_method: ties
        parameters: {normalize: false, lambda: 0.5}
        parameters:
          int8_mask: true
          lambda: 2
        """
    path = tmp_path / "recipe.yaml"
    path.write_text(dedent(text))
    recipe = read_recipe(path, lenient=True)
    assert recipe.models[0].parameters == {"weight": 0.75, "keep": 0.5}
    assert recipe.parameters == {"lambda": 2.0}
    assert [note for note in recipe.notes if "given twice" in note] == [
        "WARNING: models.0.parameters.weight is given twice: line 4 counts, as in mergekit, and line 4 is ignored "
        "(--lenient)",
        "WARNING: parameters is given twice: line 7 counts, as in mergekit, and line 6 is ignored (--lenient)",
    ]
    path.write_text(dedent(text).replace("lambda: 2", "lambda: two"))
    with pytest.raises(RecipeError, match=r"line 9: parameters\.lambda must be a number"):
        read_recipe(path, lenient=True)


UNION = {"models": ["m0", "m1"], "base_model": "m0", "merge_method": "linear"}


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"tokenizer": {"source": "union", "preserve_embeddings": True}}, "tokenizer.preserve_embeddings"),
        ({"tokenizer": {"tokens": {"<s>": {"source": "m1", "forced": True}}}}, "tokenizer.tokens.<s>.forced"),
        (
            {"tokenizer": {"tokens": {"<s>": {"source": {"kind": "zero", "model": "m0"}}}}},
            "tokenizer.tokens.<s>.source.model",
        ),
        ({"base_model": {"model": {"path": "m0", "sha": "1"}}}, "base_model.model.sha"),
        ({"models": [{"model": {"model": "m0", "weights": 1}}, "m1"]}, "models.0.model.weights"),
        ({"tokenizer_source": {"model": {"path": "m1"}, "x": 1}}, "tokenizer_source.x"),
    ],
)
def test_unknown_words_of_tokenizers_and_names(data, word):
    with pytest.raises(RecipeError) as caught:
        read_recipe(UNION | data)
    assert f"{word} is not known" in str(caught.value)
    recipe = read_recipe(UNION | data, lenient=True)
    assert any(note.startswith(f"WARNING: {word} is not known") and "(--lenient)" in note for note in recipe.notes)
    assert recipe.base_model == "m0" and [entry.model for entry in recipe.models] == ["m0", "m1"]


def test_values_of_tokenizers_as_mergekit_reads_them():
    """Numbers and switches in quotes, and mappings for a model's name."""
    name = {"model": {"path": "m1"}}
    block = {"source": name, "pad_to_multiple_of": "16", "tokens": {"<s>": {"source": name, "force": "yes"}}}
    tokens = read_recipe(UNION | {"tokenizer": block}).tokens
    assert tokens is not None and (tokens.source, tokens.pad_to_multiple_of) == ("m1", 16)
    assert tokens.rows["<s>"].model == "m1" and tokens.rows["<s>"].force is True


@pytest.mark.parametrize(
    ("data", "word", "place"),
    [
        ({"parameters": {"dtype": "bfloat16"}}, "parameters.dtype", "at the top level"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of", "under `tokenizer:`"),
        (
            {"models": [{"model": "m0", "layer_range": [0, 4]}, "m1"]},
            "models.0.layer_range",
            "beside `model:` in a slice's `sources:`",
        ),
        (
            {"models": [{"model": "m0", "parameters": {"weight": 1, "filter": "mlp"}}, "m1"]},
            "models.0.parameters.filter",
            "in an entry of a parameter's list, `- {filter: mlp, value: 0.5}`",
        ),
    ],
)
def test_words_of_other_places(data, word, place):
    notes = read_recipe({"models": ["m0", "m1"], "merge_method": "linear"} | data).notes
    assert f"WARNING: {word} has no effect, as in mergekit: it would have one {place}" in notes


def test_empty_forms_say_nothing():
    plain = {"models": ["m0", "m1"], "merge_method": "linear"}
    assert read_recipe(plain | {"slices": [], "modules": {}}).models == read_recipe(plain).models
    with pytest.raises(RecipeError, match="expected a list of at least one"):
        read_recipe({"slices": [], "merge_method": "linear"})


def test_keys_without_a_value_as_programs_write_them(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    empty = ["base_model:", "dtype: null", "out_dtype: ~", "slices:", "tokenizer:"]
    path.write_text("\n".join(["merge_method: linear", "models: [a, b]", *empty]))
    recipe = read_recipe(path)
    assert (recipe.base_model, recipe.dtype, recipe.slices) == (None, None, ())
    assert [note.split()[0] for note in recipe.notes if "has no value" in note] == ["base_model", "dtype", "out_dtype"]
    path.write_text("\n".join(["merge_method: ties", "models: [a, b]", "base_model:"]))
    with pytest.raises(RecipeError, match="line 3: base_model has no value"):
        read_recipe(path)


def test_densities_above_1():
    """As in mergekit, all is kept; but only leniently: it may be a percentage."""
    own = {"density": [{"filter": "mlp", "value": [0.5, 2]}, {"value": 1.2}]}
    data = {"models": [{"model": "m0", "parameters": own}, "m1"], "base_model": "b", "merge_method": "dare_ties"}
    shared = {"parameters": {"density": 50, "weight": 2}}
    with pytest.raises(RecipeError, match=r"must be in \[0, 1\], found 2; a percentage"):
        read_recipe(data | shared)
    recipe = read_recipe(data | shared, lenient=True)
    rate = recipe.models[0].parameters["drop_rate"]
    assert rate == filters_of(("mlp", Gradient((0.5, -1.0), within=(0.0, float("inf")))), ("*", 0.0))
    # What passes 1 is a density, not the list's own numbers: 1 from a third of the depth on, not at the end.
    assert [resolve([rate], Place("mlp", depth=depth)) for depth in (0.0, 0.2, 0.4, 1.0)] == [0.5, 0.2, 0.0, 0.0]
    assert recipe.models[1].parameters["drop_rate"] == 0.0
    assert recipe.parameters["weight"] == 2
    assert [note.split()[1] for note in recipe.notes if "counts as 1" in note] == [
        "models.0.parameters.density.0.value.1", "models.0.parameters.density.1.value", "parameters.density",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "own", "shared", "path", "becomes"),
    [
        ("ties", {"density": -0.1}, {}, "models.0.parameters.density is -0.1, which counts as 0", {"keep": 0.0}),
        ("breadcrumbs", {"density": [-1, 1]}, {}, "density.0 is -1: where the gradient passes 0 it counts as 0",
         {"drop_rate": Gradient((2.0, 0.0), (0.0, 1.0)), "density": Gradient((-1.0, 1.0), (0.0, 1.0))}),
        ("breadcrumbs", {"density": 0.5, "gamma": [0.1, 1.2]}, {}, "gamma.1 is 1.2: where the gradient passes 1 it",
         {"gamma": Gradient((0.1, 1.2), (float("-inf"), 1.0))}),
        ("dare_ties", {"density": True}, {"density": 0.5}, "density is true, which counts as 1", {"drop_rate": 0.0}),
        ("dare_ties", {"density": []}, {"density": 0.5}, "density is an empty list: as if it were not there",
         {"drop_rate": 0.5}),
        ("task_arithmetic", {"weight": [True, False]}, {}, "weight.1 is false, which counts as 0",
         {"weight": Gradient((1.0, 0.0))}),
        ("task_arithmetic", {"weight": {"filter": "mlp", "value": True}}, {}, "weight.value is true, which counts as 1",
         {"weight": filters_of(("mlp", 1.0))}),
        ("sce", {}, {"select_topk": 1.5}, "parameters.select_topk is 1.5, which counts as 1", {"select_topk": 1.0}),
        ("nearswap", {}, {"t": [-1, 1]}, "t.0 is -1: where the gradient passes 0 it counts as 0",
         {"t": Gradient((-1.0, 1.0), (0.0, float("inf")))}),
        ("breadcrumbs", {"gamma": 1.5}, {}, "gamma is 1.5, which counts as 1", {"gamma": 1.0, "drop_rate": 0.0}),
    ],
)  # fmt: skip
def test_what_mergekit_takes_and_is_more_likely_a_slip(method, own, shared, path, becomes):
    data = {"models": [{"model": "m0", "parameters": own}], "base_model": "b", "merge_method": method,
            "parameters": shared}  # fmt: skip
    with pytest.raises(RecipeError):
        read_recipe(data)
    recipe = read_recipe(data, lenient=True)
    parameters = {**recipe.parameters, **recipe.models[0].parameters}
    assert {name: parameters[name] for name in becomes} == becomes
    (note,) = [note for note in recipe.notes if path in note]
    assert note.startswith("WARNING: ") and note.endswith(", as in mergekit (--lenient)")
    # Its native form says the same, and what only leniently reads stays so.
    assert read_recipe(recipe.to_data(), lenient=True).to_data() == recipe.to_data()


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("dare_ties", {"density": -0.1}),  # mergekit cannot draw with it
        ("dare_ties", {"density": [0.5, -0.1]}),
        ("breadcrumbs", {"gamma": -0.1}),
        ("della", {"density": 0.5, "epsilon": -0.1}),
        ("task_arithmetic", {"weight": [[0.5]]}),
        ("task_arithmetic", {"weight": [0.5, None]}),
    ],
)
def test_what_stays_refused_leniently(method, own):
    data = {"models": [{"model": "m0", "parameters": own}], "base_model": "b", "merge_method": method}
    with pytest.raises(RecipeError):
        read_recipe(data, lenient=True)


def test_a_range_that_runs_backwards_has_no_layers():
    sources = [{"model": "a", "layer_range": [0, 2]}], [{"model": "b", "layer_range": [4, 2]}]
    data = {"merge_method": "passthrough", "slices": [{"sources": one} for one in sources]}
    with pytest.raises(RecipeError, match="the first no larger than the second"):
        read_recipe(data)
    recipe = read_recipe(data, lenient=True)
    assert [one.models for one in recipe.slices] == [((0, 2), None), (None, (4, 4))]
    assert any("layer_range is [4, 2], which runs backwards: no layers" in note for note in recipe.notes)


def test_slerp_goes_past_its_models():
    data = {"merge_method": "slerp", "base_model": "b", "models": ["a"], "parameters": {"t": [-0.5, 0.5, 1.2]}}
    recipe = read_recipe(data)
    assert recipe.parameters["t"] == Gradient((-0.5, 0.5, 1.2))
    assert any(note.startswith("t reaches -0.5 and 1.2: beyond [0, 1] slerp goes on") for note in recipe.notes)
    assert not any("beyond" in note for note in read_recipe(data | {"parameters": {"t": [0, 1]}}).notes)
    assert read_recipe(data | {"parameters": {"t": 3}}, lenient=True).parameters["t"] == 3.0


@pytest.mark.parametrize("method", ["sce", "model_stock", "nearswap", "arcee_fusion", "ram", "ramplus_tl"])
def test_a_lambda_that_mergekit_ignores(method):
    """Ours has an effect; a recipe that says nothing of us is one of mergekit's, where it has none."""
    t = {"t": 0.1} if method == "nearswap" else {}
    models = ["a", "c"] if method not in ("nearswap", "arcee_fusion") else ["a"]
    data = {"merge_method": method, "base_model": "b", "models": models, "parameters": {"lambda": 0.5, **t}}
    recipe = read_recipe(data)
    assert "lambda" not in recipe.parameters
    assert any(note.startswith(f"WARNING: parameters.lambda has no effect with {method}") for note in recipe.notes)
    ours = read_recipe(data | {"output": "model"})
    assert ours.parameters["lambda"] == 0.5
    assert read_recipe(ours.to_data()).parameters == ours.parameters
    assert read_recipe(data | {"parameters": t}, settings={"parameters.lambda": 0.5}).parameters["lambda"] == 0.5


def test_a_base_of_linear_counts_where_a_weight_is_given_for_all():
    data = {"merge_method": "linear", "base_model": "b", "models": ["a", {"model": "c", "parameters": {"weight": 2}}]}
    assert [one.model for one in read_recipe(data).models] == ["a", "c"]
    recipe = read_recipe(data | {"parameters": {"weight": 0.5}})
    assert [one.model for one in recipe.models] == ["a", "c", "b"]
    assert any(note.startswith("WARNING: b is the base and not listed") for note in recipe.notes)
    assert read_recipe(recipe.to_data()).to_data() == recipe.to_data()
    listed = data | {"models": ["b", "a"], "parameters": {"weight": 0.5}}
    assert [one.model for one in read_recipe(listed).models] == ["b", "a"]
    modules = {"merge_method": "linear", "base_model": "b",
               "modules": {"default": {"models": ["a", "c"], "parameters": {"weight": 0.5}}}}  # fmt: skip
    assert [one.model for one in read_recipe(modules).models] == ["a", "c", "b"]


def test_a_key_that_is_left_out_is_told_in_a_line():
    data = {"merge_method": "ties", "base_model": "b", "models": ["m"], "dype": "float32", "zzz": 1}
    notes = read_recipe(data, lenient=True).notes
    assert "WARNING: dype is not known; did you mean 'dtype'? Ignored (--lenient)" in notes
    assert "WARNING: zzz is not known: ignored (--lenient)" in notes


def test_a_chat_template_of_no_known_name():
    data = {"merge_method": "linear", "models": ["a", "b"], "chat_template": "vicuna"}
    with pytest.raises(RecipeError, match="chat_template must be auto, alpaca"):
        read_recipe(data)
    recipe = read_recipe(data, lenient=True)
    assert recipe.chat_template is None
    assert any(note.startswith("WARNING: chat_template 'vicuna' is neither alpaca, chatml") for note in recipe.notes)


def test_a_key_of_any_name_may_hold_what_aliases_repeat(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    lines = ["defs:", "- &own {weight: 0.5}", "base_model: b", "merge_method: ties", "models:"]
    text = "\n".join([*lines, "- {model: m0, parameters: *own}"])
    path.write_text(text)
    recipe = read_recipe(path)
    assert recipe.models[0].parameters == {"weight": 0.5}
    assert "defs is ignored, as mergekit does: what it holds counts where its anchors are used" in recipe.notes
    path.write_text(text.replace("*own", "{weight: 0.5}"))
    with pytest.raises(RecipeError, match="line 1: defs is not known"):
        read_recipe(path)
    # One that is a misspelling is none the less for an anchor in it.
    path.write_text("paramters: {normalize: false, lambda: &w 0.5}\nbase_model: b\nmerge_method: ties\nmodels:\n"
                    "- {model: m0, parameters: {weight: *w}}")  # fmt: skip
    with pytest.raises(RecipeError, match="paramters is not known; did you mean 'parameters'"):
        read_recipe(path)


def test_what_a_missing_t_may_be_confused_with():
    data = {"merge_method": "slerp", "base_model": "m0"}
    weights = [{"model": f"m{i}", "parameters": {"weight": 0.5}} for i in range(2)]
    with pytest.raises(
        RecipeError, match=r"slerp needs t, .* \(models\.0\.parameters\.weight.* has no effect with slerp"
    ):
        read_recipe(data | {"models": weights})
    own = ["m0", {"model": "m1", "parameters": {"t": 0.5}}]
    with pytest.raises(RecipeError, match=r"slerp needs t, .*t is one for all models; write it under the top-level"):
        read_recipe(data | {"models": own})


def test_a_model_card_is_no_recipe(tmp_path: Path):
    path = tmp_path / "README.md"
    path.write_text("---\ntags: [merge]\n---\n# A card\n\n```yaml\nmerge_method: linear\n```\n")
    with pytest.raises(RecipeError, match="is this a model card"):
        read_recipe(path)


def test_a_stage_that_is_misspelt(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    text = "name: first\nmerge_method: linear\nmodels: [a]\n---\nmerge_method: linear\nmodels: [firts]\n"
    path.write_text(text)
    with pytest.raises(RecipeError, match="no stage and no checkpoint 'firts'; did you mean 'first'"):
        read_recipe(path)
    (tmp_path / "firts").mkdir()
    for name in ("firts", "firts@main", "fir+st"):  # a folder, and what is no name of one word
        path.write_text(text.replace("firts", name))
        assert read_recipe(path).models[0].model == name
    path.write_text(text.replace("firts", "org/first"))
    assert read_recipe(path).models[0].model == "org/first"


@pytest.mark.parametrize("method", ["dare_ties", "ties", "task_arithmetic"])
def test_a_recipe_of_the_base_alone_is_a_copy_leniently(method):
    own = {"model": "b", "parameters": {"weight": 1, "density": 0.5}}
    data = {"merge_method": method, "base_model": "b", "models": [own], "parameters": {"normalize": True}}
    with pytest.raises(RecipeError, match="only the base is listed"):
        read_recipe(data)
    recipe = read_recipe(data, lenient=True)
    assert (recipe.merge_method, [entry.model for entry in recipe.models]) == ("passthrough", ["b"])
    assert "WARNING: only the base is listed, so the output is a copy of b, as in mergekit (--lenient)" in recipe.notes
    with pytest.raises(RecipeError, match="no model"):
        read_recipe({**data, "models": [{"parameters": {}}]}, lenient=True)
