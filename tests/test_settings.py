# SPDX-License-Identifier: Apache-2.0
"""What holds for each tensor of each model: whose value counts; what is dense, copied, averaged; what is one object."""

import numpy as np
import pytest

from darekit.architectures.depth import Depths, depths_of
from darekit.checkpoints import ArrayBytes, TensorInfo
from darekit.errors import RecipeError
from darekit.methods.sparsifiers import noise_gain
from darekit.planning.matching.alignment import AlignedTensor
from darekit.planning.settings import merges_weights, place_in, place_of, settings_of
from darekit.recipe import Place, read_recipe


def info(name="w", stored=None):
    return TensorInfo(name, "F32", (4, 4), ArrayBytes(np.zeros(64, np.uint8)), stored)


def tensor(name, *, base=True, models=2, dtype="F32", stored=(), **more):
    own = [info(name, stored[k] if stored else None) if k < models else None for k in range(2)]
    return AlignedTensor(name, dtype, (4, 4), info(name) if base else None, tuple(own), **more)


def settings(data, *tensors, roles=None, depths=None):
    recipe = read_recipe({"base_model": "base", "models": ["a", "b"], "merge_method": "task_arithmetic"} | data)
    depths = depths or depths_of(one.name for one in tensors)
    return [*settings_of(recipe, tensors, depths, roles).values()]


DARE = {"method": "dare", "drop_rate": 0.5}
LAYERS = tuple(tensor(f"h.{at}.w") for at in range(3))


def test_a_models_own_value_comes_first_then_the_recipes_then_the_default():
    (one,) = settings({}, tensor("w"))
    assert (one.scale, [m.weight for m in one.models], [m.keep for m in one.models]) == (1.0, [1, 1], [1, 1])
    assert [m.sparsify for m in one.models] == [{}, {}] and [m.rate for m in one.models] == [0, 0]
    data = {
        "models": [{"model": "a", "parameters": {"weight": 3, "drop_rate": 0.25}}, "b"],
        "parameters": {"weight": 2, "lambda": 0.5},
        "sparsify": DARE,
    }
    (one,) = settings(data, tensor("w"))
    assert one.scale == 0.5 and [m.weight for m in one.models] == [3, 2] and [m.rate for m in one.models] == [0.25, 0.5]
    assert one.models[1].sparsify == {"drop_rate": 0.5, "rescale": "paper", "q": 0.0}
    (keep,) = settings(
        {
            "merge_method": "ties",
            "parameters": {"keep": 0.4},
            "models": ["a", {"model": "b", "parameters": {"keep": 0.2}}],
        },
        tensor("w"),
    )
    assert [m.keep for m in keep.models] == [0.4, 0.2] and {*keep.merge} == {"normalize"}


def test_the_noise_of_a_drop_counts_where_it_is_random_and_rescaled():
    for sparsify, noise in (
        (DARE, noise_gain(0.5)), (DARE | {"q": 0.25}, noise_gain(0.5, 0.25)), (DARE | {"rescale": "none"}, 0),
        (DARE | {"rescale": "l1"}, noise_gain(0.5)),
        ({"method": "drop_only", "drop_rate": 0.5}, 0), ({"method": "magnitude", "drop_rate": 0.5}, 0),
        ({"method": "della", "drop_rate": 0.5}, noise_gain(0.5)), (DARE | {"drop_rate": 1}, 0),
    ):  # fmt: skip
        (one,) = settings({"sparsify": sparsify}, tensor("w"))
        assert [m.noise for m in one.models] == [noise] * 2, sparsify
    (weights,) = settings({"sparsify": DARE | {"on": "weights"}, "merge_method": "linear"}, tensor("w"))
    assert weights.models[0].noise == 0 and weights.models[0].rate == 0.5


def test_what_is_kept_dense_is_not_dropped():
    sparsify = DARE | {"keep_dense": ["norms", "h.*"]}
    found = settings(
        {"sparsify": sparsify},
        tensor("n", group="norms"),
        tensor("h.0.w"),
        tensor("x", group="heads"),
        tensor("y", head=True),
    )
    assert [one.models[0].rate for one in found] == [0, 0, 0.5, 0] and found[0].models[0].sparsify == {}
    assert found[0] is found[1] is found[3]
    plain = settings({"sparsify": DARE}, tensor("n", group="norms"), tensor("h.0.w"))
    assert [one.models[0].rate for one in plain] == [0.5, 0.5] and plain[0] is plain[1]


def test_who_has_no_say():
    found = settings({}, tensor("w", models=1), tensor("i", dtype="I64"), tensor("c", copied=True))
    assert [[m is None for m in one.models] for one in found] == [[False, True], [True, True], [True, True]]


def test_the_survivors_fraction_of_a_foreign_recipe():
    models = [
        {"model": "a", "parameters": {"weight": 1.0, "density": 0.3}},
        {"model": "b", "parameters": {"weight": 1.0, "density": [0.2, 0.4]}},
    ]
    recipe = read_recipe(
        {"models": models, "merge_method": "breadcrumbs", "base_model": "base", "parameters": {"gamma": 0.1}}
    )
    tensors = [*LAYERS, tensor("n", head=True)]
    found = [*settings_of(recipe, tensors, depths_of(one.name for one in tensors)).values()]
    assert [one.models[0].density for one in found] == [0.3, 0.3, 0.3, None]
    assert [one.models[1].density for one in found] == pytest.approx([0.2, 0.3, 0.4, None])
    assert [one.models[1].rate for one in found] == pytest.approx([0.8, 0.7, 0.6, 0.0])


@pytest.mark.parametrize("varying", ["weight", "drop_rate", "keep", "lambda"])
def test_what_varies_with_depth_is_asked_at_every_tensor(varying):
    data = {"sparsify": dict(DARE), "merge_method": "ties", "parameters": {}}
    (data["sparsify"] if varying == "drop_rate" else data["parameters"])[varying] = [0, 0.5]
    found = settings(data, *LAYERS)
    values = {
        "weight": [one.models[0].weight for one in found], "drop_rate": [one.models[0].rate for one in found],
        "keep": [one.models[0].keep for one in found], "lambda": [one.scale for one in found],
    }[varying]  # fmt: skip
    assert values == [0, 0.25, 0.5] and len({id(one) for one in found}) == 3


def test_equal_settings_are_one_object():
    same = settings({"sparsify": DARE}, *LAYERS)
    assert same[0] is same[1] is same[2]
    varying = {"parameters": {"weight": [{"filter": "h.1", "value": 0.5}, {"value": 1.0}]}}
    found = settings(varying, *LAYERS, tensor("w"))
    assert found[0] is found[2] is found[3] and found[0] is not found[1]
    assert found[0].models[0] is not found[1].models[0] and found[0].models[0] is found[2].models[0]
    assert settings({"parameters": {"lambda": [0, 1, 0]}}, *LAYERS)[0].models[0] is not None


def test_a_value_that_no_filter_gives_is_an_error():
    model = [
        {"model": "hub/a", "parameters": {"drop_rate": {"filter": "h.1", "value": 0.5}}},
        {"model": "b", "parameters": {"drop_rate": 0.5}},
    ]
    with pytest.raises(
        RecipeError, match=r"no drop_rate for tensor h.0.w of model hub/a: none .* or set sparsify.drop_rate"
    ):
        settings({"models": model, "sparsify": {"method": "dare"}}, *LAYERS)
    slerp = {"models": ["a"], "merge_method": "slerp", "parameters": {"t": {"filter": "h.1", "value": 0.5}}}
    with pytest.raises(RecipeError, match=r"no t for tensor h.0.w: none .* or set parameters.t"):
        recipe = read_recipe({"base_model": "base"} | slerp)
        settings_of(recipe, [AlignedTensor("h.0.w", "F32", (4,), info(), (info(),))], depths_of(["h.0.w"]))


def test_statistics_are_averaged_whatever_is_dropped():
    data = {
        "models": [
            {"model": "a", "parameters": {"weight": 0.3, "drop_rate": 1}},
            {"model": "b", "parameters": {"weight": -1}},
        ],
        "sparsify": DARE,
        "parameters": {"lambda": 0.5},
    }
    roles = {"w": "statistic", "x": "counter"}
    stat, plain = settings(data, tensor("w"), tensor("x"), roles=roles)
    assert [(m.weight, m.rate, m.sparsify, m.noise) for m in stat.models] == [(0.0, 1.0, {}, 0.0), (0.0, 0.0, {}, 0.0)]
    assert stat.scale == 0.0 and stat.merge == {} and plain.models[0].weight == 0.3 and plain.scale == 0.5
    data["models"] = [{"model": "a", "parameters": {"weight": 0.75}}, "b"]
    (stat,) = settings(data, tensor("w"), roles=roles)
    assert [m.weight for m in stat.models] == [0.75, 1.0] and stat.scale == 0.875 and stat.models[0].keep == 1
    assert settings(data, tensor("w", base=False), roles=roles)[0].scale == 1.0
    (alone,) = settings(data, tensor("w", models=1), roles=roles)
    assert alone.models[1] is None and alone.scale == 0.375


def test_the_models_themselves_are_merged_where_no_base_is_left():
    def asked(**data):
        return read_recipe({"base_model": "base", "models": ["a", "b"]} | data)

    linear = asked(merge_method="linear")
    assert merges_weights(linear, {"normalize": False}) and not merges_weights(linear, {"normalize": True})
    assert not merges_weights(asked(merge_method="task_arithmetic"), {"normalize": False})
    assert merges_weights(asked(merge_method="linear", sparsify=DARE | {"on": "weights"}), {"normalize": True})
    assert not merges_weights(asked(merge_method="linear", sparsify=DARE), {"normalize": True})


def test_places():
    plain, cut = depths_of(["h.0.w", "h.1.w", "x"]), Depths({"h": 2}, {"h.1.w": 0.5}, {"h.1.w": 3, "x": None})
    assert place_of(tensor("h.1.w"), plain) == Place("h.1.w", (4, 4), 1.0, 0)
    assert place_of(tensor("h.1.w"), cut) == Place("h.1.w", (4, 4), 0.5, 3) and place_of(tensor("x"), cut).slice is None
    here = place_of(tensor("h.1.w"), cut)
    assert place_in(here, info("h.1.w", "h.7.w"), cut).name == "h.7.w" and place_in(here, info("h.1.w"), cut) is here
    assert place_in(here, info("h.1.w", "h.7.w"), plain) is here
    data = {"parameters": {"weight": [{"filter": "h.7", "value": 0.25}, {"value": 1.0}]}}
    (found,) = settings(data, tensor("h.1.w", stored=("h.7.w", None)), depths=cut)
    assert [m.weight for m in found.models] == [0.25, 1.0]
