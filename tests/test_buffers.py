# SPDX-License-Identifier: Apache-2.0
"""What is no weight: running statistics, counters, and tensors that stay in F32. Expectations are numpy's, by hand."""

import json

import ml_dtypes
import numpy as np
import pytest

import darekit as dk
import families
from darekit.errors import DataError, RecipeError

RESNET = {"architectures": ["ResNetForImageClassification"], "model_type": "resnet"}
CODEC = {"architectures": ["EncodecModel"], "model_type": "encodec"}
ROUTER = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}

NORM = "resnet.encoder.stages.0.layers.0.layer.0.normalization"
WEIGHT = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
MEAN, VAR, COUNT = (f"{NORM}.{name}" for name in ("running_mean", "running_var", "num_batches_tracked"))


@pytest.fixture
def resnets(tmp_path):
    """base and m0 .. m2, whose variances are far apart."""
    rng = np.random.default_rng(1)
    found = []
    for i, name in enumerate(("base", "m0", "m1", "m2")):
        own = {
            WEIGHT: rng.normal(0, 1, (4, 4, 3, 3)).astype(np.float32) * (0.01 if i else 1),
            MEAN: rng.normal(0, 1, 64).astype(np.float32),
            VAR: (10.0 ** rng.uniform(-8, 2, 64)).astype(np.float32),
            COUNT: np.int64([100, 7, 180, 150][i]).reshape(()),
        }
        if i:
            own[WEIGHT] = own[WEIGHT] + found[0][WEIGHT]
        found.append(own)
        families.save(tmp_path / name, own, RESNET)
    return tmp_path, found[0], found[1:]


def merged(path, k=2, *, models=None, **keys):
    dk.merge(families.recipe(path, k=k, **keys) | ({"models": models} if models else {}), path / "out", overwrite=True)
    return families.load(path / "out")


def mean(models, name, weights=None):
    return np.average([model[name].astype(np.float64) for model in models], axis=0, weights=weights)


METHODS = [
    ("task_arithmetic", {}),
    ("task_arithmetic", {"normalize": True}),
    ("ties", {"keep": 0.2}),
    ("ties", {"keep": 0.5, "trim": "model"}),
    ("linear", {}),
    ("linear", {"normalize": False}),
    ("model_stock", {}),
]


@pytest.mark.parametrize("rate", [None, 0.9])
@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_statistics_are_averaged_whatever_the_method(resnets, method, parameters, rate):
    path, _, models = resnets
    unsummed = parameters.get("normalize") is not False or method != "linear"
    sparse = {"sparsify": {"method": "dare", "drop_rate": rate, "seed": 1}} if rate and unsummed else {}
    found = merged(path, merge_method=method, parameters=parameters, **sparse)
    for name in (MEAN, VAR):
        assert np.allclose(found[name], mean(models[:2], name), rtol=1e-6, atol=1e-7), name
    assert (found[VAR] > 0).all()


@pytest.mark.parametrize("method", ["della", "magnitude", "breadcrumbs", "drop_only"])
def test_no_sparsifier_drops_statistics(resnets, method):
    path, _, models = resnets
    found = merged(path, 1, sparsify={"method": method, "drop_rate": 0.8})
    assert np.array_equal(found[VAR], models[0][VAR]) and np.array_equal(found[MEAN], models[0][MEAN])
    assert not np.array_equal(found[WEIGHT], models[0][WEIGHT])


def test_infinite_bounds_are_constants(resnets):
    """Bounds of +-Inf that all have are no fault; one that a model has alone is."""
    path, base, models = resnets
    bounds = np.float32([-np.inf] * 32 + [np.inf] * 32)
    for name, own in (("base", base), ("m0", models[0]), ("m1", models[1])):
        families.save(path / name, own | {MEAN: bounds}, RESNET)
    found = merged(path, sparsify={"method": "dare", "drop_rate": 0.5})
    assert np.array_equal(found[MEAN], bounds)
    assert np.allclose(found[VAR], mean(models[:2], VAR), rtol=1e-6)
    families.save(path / "m1", models[1] | {MEAN: -bounds}, RESNET)
    with pytest.raises(DataError, match="NaN or Inf"):
        merged(path)


def test_they_go_as_far_as_the_merge_goes(resnets):
    path, base, models = resnets
    found = merged(path, parameters={"lambda": 0.25, "normalize": False})
    expected = 0.5 * base[VAR].astype(np.float64) + 0.25 * models[0][VAR] + 0.25 * models[1][VAR]
    assert np.allclose(found[VAR], expected, rtol=1e-6)
    found = merged(path, 1, merge_method="slerp", parameters={"t": 0.3})
    assert np.allclose(found[MEAN], 0.7 * base[MEAN] + 0.3 * models[0][MEAN], atol=1e-6)
    found = merged(path, parameters={"lambda": 0.0})
    assert np.array_equal(found[VAR], base[VAR])


def test_statistics_in_16_bits(resnets):
    """Of BF16 models: averaged in a wider format, and rounded once."""
    path, base, models = resnets
    narrow = [{n: a.astype(ml_dtypes.bfloat16) if a.dtype == np.float32 else a for n, a in own.items()}
              for own in (base, *models)]  # fmt: skip
    for name, own in zip(("base", "m0", "m1"), narrow, strict=False):
        families.save(path / name, own, RESNET)
    for parameters, expected in (
        ({}, mean(narrow[1:3], VAR)),
        ({"lambda": 0.125}, 0.75 * narrow[0][VAR].astype(np.float64) + 0.25 * mean(narrow[1:3], VAR)),
    ):
        found = merged(path, parameters=parameters)[VAR]
        assert np.array_equal(found, expected.astype(np.float32).astype(ml_dtypes.bfloat16))


def test_weights_count_and_negative_ones_do_not(resnets):
    path, base, models = resnets
    entries = [{"model": str(path / f"m{k}"), "parameters": {"weight": w}} for k, w in enumerate((3.0, 1.0, -2.0))]
    found = merged(path, models=entries)
    assert np.allclose(found[VAR], mean(models[:2], VAR, [3, 1]), rtol=1e-6)
    found = merged(path, models=entries[2:])  # a negated task
    assert np.array_equal(found[VAR], base[VAR]) and np.array_equal(found[MEAN], base[MEAN])


def test_of_what_is_dropped_altogether_nothing_is_left(resnets):
    path, base, _ = resnets
    found = merged(path, sparsify={"method": "dare", "drop_rate": 1.0})
    assert all(np.array_equal(found[name], base[name]) for name in base)


def test_without_a_base(resnets):
    path, _, models = resnets
    recipe = families.recipe(path, k=3, merge_method="linear")
    del recipe["base_model"]
    dk.merge(recipe, path / "out")
    found = families.load(path / "out")
    assert np.allclose(found[VAR], mean(models, VAR), rtol=1e-6) and found[COUNT] == 180


def test_equal_statistics_stay_to_the_bit(resnets):
    path, base, models = resnets
    for k, model in enumerate(models):
        families.save(path / f"m{k}", model | {VAR: base[VAR]}, RESNET)
    for parameters in ({}, {"lambda": 0.1}, {"lambda": 1 / 3}):
        assert np.array_equal(merged(path, 3, parameters=parameters)[VAR], base[VAR])


def test_counters_are_the_models_largest(resnets):
    path, _, models = resnets
    assert merged(path, 3)[COUNT] == 180
    assert merged(path, 1)[COUNT] == models[0][COUNT] == 7
    dk.drop(path / "base", path / "m0", path / "dropped", drop_rate=0.0)
    found = families.load(path / "dropped")
    assert all(np.array_equal(found[name], models[0][name]) for name in models[0])
    lock = json.loads((path / "dropped" / "darekit.lock.json").read_text())
    assert all(entry["content_digest"] for entry in lock["inputs"])  # all of base and model was read


def test_other_integers_must_agree(tmp_path):
    base = {"w": np.ones((4, 4), np.float32), "bins": np.arange(8), "num_updates": np.int64(3).reshape(1)}
    flags = {"ready": np.array([False])}
    families.save(tmp_path / "base", base | flags)
    families.save(tmp_path / "m0", base | {"num_updates": np.int64(9).reshape(1), "ready": np.array([True])})
    found = merged(tmp_path, 1)
    assert found["num_updates"] == 9 and found["ready"] and np.array_equal(found["bins"], base["bins"])
    families.save(tmp_path / "m0", base | flags | {"bins": np.arange(8) + 1})
    with pytest.raises(DataError, match="bins"):
        merged(tmp_path, 1)


def test_codebooks_that_follow_an_average_are_averaged(tmp_path):
    rng = np.random.default_rng(2)
    at = "quantizer.layers.0.codebook"
    models = []
    for i, name in enumerate(("base", "m0", "m1")):
        size = rng.uniform(1, 9, 16).astype(np.float32)
        models.append({f"{at}.cluster_size": size, f"{at}.embed_avg": rng.normal(0, 1, (16, 4)).astype(np.float32)})
        models[-1]["decoder.layers.0.conv.bias"] = np.float32([1, 1 + 0.01 * i])
        families.save(tmp_path / name, models[-1], CODEC)
    found = merged(tmp_path, sparsify={"method": "dare", "drop_rate": 0.9})
    for name in (f"{at}.cluster_size", f"{at}.embed_avg"):
        assert np.allclose(found[name], mean(models[1:], name), atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"drop_rate": 0.9, "bits": 2, "seed": 3}, {"drop_rate": 0.5, "seed": 3}, {"lossless": True}]
)
def test_packs_hold_them_exactly(resnets, options):
    path, base, models = resnets
    dk.pack(path / "base", path / "m0", path / "m0.safetensors", **options)
    dk.unpack(path / "base", path / "m0.safetensors", path / "unpacked")
    found = families.load(path / "unpacked")
    for name in (MEAN, VAR, COUNT):
        assert np.array_equal(found[name], models[0][name]), name
    dk.pack(path / "base", path / "m0", path / "none.safetensors", drop_rate=1.0)
    dk.unpack(path / "base", path / "none.safetensors", path / "none")
    found = families.load(path / "none")
    assert all(np.array_equal(found[name], base[name]) for name in base)


# Number formats


@pytest.fixture
def routers(tmp_path):
    """base, m0 and m1 in BF16, with an F32 router bias whose differences BF16 has no room for."""
    rng = np.random.default_rng(3)
    found = []
    for i, name in enumerate(("base", "m0", "m1")):
        own = {
            "model.layers.1.mlp.gate.weight": (1 + rng.normal(0, 0.1, (4, 32))).astype(ml_dtypes.bfloat16),
            "model.layers.1.mlp.gate.e_score_correction_bias": (5.2 + 0.001 * np.arange(4) * (i + 1)).astype(
                np.float32
            ),
            "model.layers.1.mlp.anything.weight": (1 + rng.normal(0, 0.1, (2, 3))).astype(np.float32),
        }
        found.append(own)
        families.save(tmp_path / name, own, ROUTER)
    return tmp_path, found[0], found[1:]


GATE, BIAS, OTHER = (f"model.layers.1.mlp.{name}" for name in (
    "gate.weight", "gate.e_score_correction_bias", "anything.weight"))  # fmt: skip


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_f32_in_a_16_bit_model_stays_f32(routers, key):
    path, _, models = routers
    report = dk.merge(families.recipe(path, k=2, parameters={"lambda": 0.5}, **{key: "bfloat16"}), path / "out")
    found = families.load(path / "out")
    assert [str(found[name].dtype) for name in (GATE, BIAS, OTHER)] == ["bfloat16", "float32", "float32"]
    assert np.allclose(found[BIAS], mean(models, BIAS), rtol=1e-7)
    assert any("2 tensors stay float32" in note and "keep_float32: false" in note for note in report.notes)
    assert json.loads((path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_unless_asked_otherwise(routers):
    path, _, _ = routers
    found = merged(path, dtype="float16", keep_float32=False)
    assert {str(array.dtype) for array in found.values()} == {"float16"}
    assert {str(array.dtype) for array in merged(path, dtype="float32").values()} == {"float32"}


def test_in_mergekits_dialect_too(routers):
    path, _, _ = routers
    entry = [{"model": str(path / f"m{k}"), "parameters": {"weight": 0.5, "density": 0.5}} for k in range(2)]
    recipe = {"base_model": str(path / "base"), "models": entry, "merge_method": "dare_linear", "dtype": "bfloat16"}
    dk.merge(recipe, path / "out")
    assert str(families.load(path / "out")[BIAS].dtype) == "float32"
    dk.merge(recipe | {"keep_float32": False}, path / "flat")
    assert str(families.load(path / "flat")[BIAS].dtype) == "bfloat16"


def test_a_model_in_f32_is_rounded_but_for_what_transformers_keeps(routers):
    path, base, models = routers
    for name, own in zip(("base", "m0", "m1"), (base, *models), strict=True):
        families.save(path / name, {n: array.astype(np.float32) for n, array in own.items()}, ROUTER)
    kinds = {name: str(array.dtype) for name, array in merged(path, dtype="bfloat16").items()}
    assert kinds == {GATE: "bfloat16", BIAS: "float32", OTHER: "bfloat16"}
    for name, own in zip(("base", "m0", "m1"), (base, *models), strict=True):  # of an unknown class nothing is known
        (path / name / "config.json").unlink()
        families.save(path / name, {n: array.astype(np.float32) for n, array in own.items()})
    assert {str(array.dtype) for array in merged(path, dtype="bfloat16").values()} == {"bfloat16"}


def test_the_key_is_a_switch():
    recipe = {"base_model": "a", "models": ["b"], "merge_method": "ties"}
    assert dk.read_recipe(recipe).keep_float32 and "keep_float32" not in dk.read_recipe(recipe).to_data()
    found = dk.read_recipe(recipe | {"keep_float32": False})
    assert not found.keep_float32 and dk.read_recipe(found.to_data()) == found
    with pytest.raises(RecipeError, match="keep_float32 must be true or false, found 'maybe'"):
        dk.read_recipe(recipe | {"keep_float32": "maybe"})
