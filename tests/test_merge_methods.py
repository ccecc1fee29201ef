# SPDX-License-Identifier: Apache-2.0
"""Each merge method against its formula written out here in float64, on whole tensors, and against mergekit's numbers.

Nothing here calls a method's own function: the truths work on vectors, where the methods work on their products.
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest

import darekit as dk
import oracle
from darekit import testing
from darekit.dtypes import DTYPES
from darekit.engine import execution, tiles
from darekit.engine.selection import Select
from darekit.errors import PlanError, RecipeError
from darekit.methods import MERGE_METHODS, merging, spherical

SHAPES = ((1,), (3,), (65,), (1025,), (3, 1), (1, 3), (130, 517), (2, 5, 64), ())
CLOSE = {"BF16": 2**-8, "F16": 2**-10, "F32": 3e-6, "F64": 1e-11}
WEIGHTS = (0.3, 0.9, 0.2)
ONE_MODEL = ("nearswap", "arcee_fusion")


def length(vector):
    return math.sqrt(math.fsum((vector * vector).reshape(-1)))


def unit(vector):
    size = length(vector)
    return vector / size if size else vector


def arc(a, b, t):
    """From one vector to another along the arc of their directions; norms go along linearly with the sines."""
    cosine = math.fsum((unit(a) * unit(b)).reshape(-1))
    if 1 - abs(cosine) <= 2**-24 or not a.any() or not b.any():
        if not (a.any() and b.any()):
            angle = math.pi / 2
            return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


# --- the formulas: float64 tensors (base None: there is none), weights -> float64

TRUTHS, CASES = {}, []


def truth(*cases):
    """What stands below is the formula of the method of that name; `cases`: parameters with which both are compared."""

    def known(formula):
        TRUTHS[formula.__name__] = formula
        CASES.extend((formula.__name__, parameters) for parameters in cases)
        return formula

    return known


@truth({}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True})
def nuslerp(base, models, weights, nuslerp_flatten=True, nuslerp_row_wise=False):
    origin = 0 if base is None else base
    a, b = (m - origin for m in models)
    t = weights[1] / sum(weights) if abs(sum(weights)) >= 1e-6 else 0.5
    if nuslerp_flatten or a.ndim < 2:
        return origin + arc(a, b, t)
    turn = (lambda x: np.swapaxes(x, 0, -1)) if nuslerp_row_wise else (lambda x: x)
    one, other = turn(a), turn(b)
    found = np.empty_like(one)
    for at in np.ndindex(one.shape[:-1]):
        found[at] = arc(one[at], other[at], t)
    return origin + turn(found)


@truth({}, {"normalize_weights": False})
def multislerp(base, models, weights, normalize_weights=True, eps=1e-8):
    origin = 0 if base is None else base
    points = [m - origin for m in models]
    shares = np.array(weights) / (sum(weights) if normalize_weights else 1)
    units = [p / (length(p) + eps) for p in points]
    mean = sum(s * u for s, u in zip(shares, units, strict=True))
    pole = mean / length(mean)
    tangents = [u - (u * pole).sum() * pole for u in units]
    step = sum(s * v for s, v in zip(shares, tangents, strict=True))
    size = length(step) + eps
    norm = sum(s * length(p) for s, p in zip(shares, points, strict=True))
    return origin + norm * (math.cos(size) * pole + math.sin(size) / size * step)


@truth({}, {"max_iter": 2, "tol": 1e-9})
def karcher(base, models, weights, max_iter=10, tol=1e-5):
    points = ([] if base is None else [base]) + list(models)
    units = [unit(p) for p in points]
    mean = unit(sum(units)) if length(sum(units)) >= tol else units[0]
    for _ in range(max_iter):
        step = 0
        for u in units:
            cosine = min(1.0, max(-1.0, math.fsum((u * mean).reshape(-1))))
            angle = math.acos(cosine)
            if angle >= tol:
                step = step + angle / math.sin(angle) * (u - cosine * mean) / len(units)
        if length(np.asarray(step)) < tol:
            break
        size = length(step)
        mean = unit(math.cos(size) * mean + math.sin(size) / size * step)
    return sum(map(length, points)) / len(points) * mean


@truth({}, {"select_topk": 0.3}, {"select_topk": 0.7, "floor": 0})
def sce(base, models, weights, select_topk=1.0, floor=1e-6):
    deltas = np.array([m - base for m in models]).reshape(len(models), -1)
    if select_topk < 1:
        spread = np.float32(deltas.var(axis=0))
        best = sorted(range(spread.size), key=lambda i: (-spread[i], i))[: int(np.count_nonzero(spread) * select_topk)]
        kept = np.zeros(spread.size)
        kept[best] = 1
        deltas = deltas * kept
    energy = (deltas**2).mean(axis=1)
    shares = energy / energy.sum() if energy.sum() >= floor and energy.any() else np.full(len(models), 1 / len(models))
    agree = np.sign(deltas) == np.where(deltas.sum(axis=0) >= 0, 1, -1)
    share = agree * shares[:, None]
    return base + ((deltas * share).sum(axis=0) / np.maximum(share.sum(axis=0), 1e-6)).reshape(base.shape)


@truth({"t": 0.01})
def nearswap(base, models, weights, t):
    (model,) = models
    near = np.abs(model - base) <= t
    return np.where(near, model, base + t * np.sign(model - base))


@truth({})
def arcee_fusion(base, models, weights):
    (model,) = models
    rows = [x.reshape(-1, x.shape[-1] if x.shape else 1) for x in (base, model)]
    q, p = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) + 1e-8 for x in rows)
    scores = np.abs(rows[1] - rows[0]) * (p * np.log(p / q)).sum(axis=1, keepdims=True)
    ordered = sorted(scores.reshape(-1))
    low, middle, high = (ordered[int(part * (len(ordered) - 1))] for part in (0.25, 0.5, 0.75))
    return np.where(scores >= middle + 1.5 * (high - low), rows[1], rows[0]).reshape(base.shape)


@truth({"epsilon": 0.02, "alpha": 2.0})
def ramplus_tl(base, models, weights, r=0.1, alpha=0.2, epsilon=1e-5):
    deltas = np.array([m - base for m in models])
    changed = np.abs(deltas) > epsilon
    many = changed.sum(axis=0)
    found = np.zeros(base.shape)
    for delta, here in zip(deltas, changed, strict=True):
        unique, shared = (here & (many == 1)).sum(), (here & (many > 1)).sum()
        found += np.where(here & (many == 1), (1 + r * min(shared / max(unique, epsilon), alpha)) * delta, 0)
        found += np.where(here & (many > 1), delta / np.maximum(many, 1), 0)
    return base + found


@truth({"epsilon": 0.02})
def ram(base, models, weights, epsilon=1e-5):
    return ramplus_tl(base, models, weights, r=0, epsilon=epsilon)


MODELS = {name: int(min(3, one.models[1])) for name, one in MERGE_METHODS.items()}
NEEDS_BASE = [name for name, one in MERGE_METHODS.items() if one.needs_base]
UNWEIGHTED = [name for name, one in MERGE_METHODS.items() if not one.weighted]


ELSEWHERE = {"slerp", "model_stock"}  # in test_measuring.py


def test_what_measures_or_surveys_has_a_truth():
    """The conformance test calls a method's own function, so it cannot tell whether the formula is right."""
    built_in = {name for name, one in MERGE_METHODS.items() if (one.products or one.survey) and one.foreign is None}
    missing = built_in - {*TRUTHS} - ELSEWHERE
    assert not missing, f"write {', '.join(sorted(missing))} out in float64, on vectors, as a `truth` in this file"
    assert {*TRUTHS} == {method for method, _ in CASES}, "a truth that is compared with nothing"


def merged(method, parameters, base, models, weights=None, **more):
    return dk.merge_tensors(
        None if base is None else {"w": base}, [{"w": m} for m in models],
        method=dk.merge_method(method, **parameters), weights=weights, **more,
    )["w"]  # fmt: skip


def family(rng, shape, dtype, k, scale=0.02):
    """A base and models whose deltas are long enough for the angles between the models to matter."""
    kind = DTYPES[dtype].numpy
    base = rng.normal(0, 0.02, shape).astype(kind)
    return base, [np.asarray(base.astype(np.float64) + rng.normal(0, scale, shape)).astype(kind) for _ in range(k)]


@pytest.mark.parametrize("name", [name for name, one in MERGE_METHODS.items() if "lambda" in one.parameters])
def test_arrays_take_the_lambda_that_mergekit_ignores(name):
    """A recipe of such a method may be one of mergekit's, where a lambda has no effect; a call from Python is none."""
    base, models = family(np.random.default_rng(3), (8, 16), "F64", 1 if name in ONE_MODEL else 3)
    given = {"t": 0.5} if "t" in MERGE_METHODS[name].parameters else {}
    full = merged(name, given, base, models) - base
    assert np.abs(full).max() > 1e-5
    np.testing.assert_allclose(merged(name, given | {"lambda": 0.5}, base, models) - base, full / 2, atol=1e-15)


def ids(case):
    return "-".join([case[0], *(f"{name}={value}" for name, value in case[1].items())])


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_every_method_is_its_formula(case, with_base, dtype):
    method, parameters = case
    if not with_base and method in NEEDS_BASE:
        return
    rng = np.random.default_rng(1)
    k = MODELS[method]
    for shape in SHAPES:
        base, models = family(rng, shape, dtype, k)
        weights = None if method in UNWEIGHTED else WEIGHTS[:k]
        found = merged(method, parameters, base if with_base else None, models, weights, threads=2)
        wide = [np.asarray(x).astype(np.float64) for x in (base, *models)]
        expected = TRUTHS[method](wide[0] if with_base else None, wide[1:], weights, **parameters)
        scale = max(np.abs(x).max(initial=0) for x in (*wide, expected))
        np.testing.assert_allclose(found.astype(np.float64), expected, rtol=CLOSE[dtype], atol=2 * CLOSE[dtype] * scale)


def test_the_examples_of_contributing_are_methods(monkeypatch):
    """What a contributor copies: functions, entries of the table, and a truth."""
    text = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    mean, mean_entry, closest, closest_entry, its_truth = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    for module, function, entry in ((merging, mean, mean_entry), (spherical, closest, closest_entry)):
        names = dict(vars(module))
        exec(function, names)
        (one,) = eval(f"({entry.strip()})", names)
        monkeypatch.setitem(MERGE_METHODS, one.name, one)
        testing.equals_formula(testing.Subject(None, (one.name, {})))
    monkeypatch.setitem(globals(), "TRUTHS", {})
    monkeypatch.setitem(globals(), "CASES", [])
    exec(its_truth, globals())
    assert len(CASES) == len(TRUTHS) == 1
    base, models = family(np.random.default_rng(31), (130, 517), "F64", 3)
    expected = TRUTHS[one.name](base, models, None)
    np.testing.assert_allclose(merged(one.name, {}, base, models), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_tensors_without_elements(case):
    method, parameters = case
    for shape, dtype in (((0,), "F32"), ((5, 0), "BF16"), ((0, 5), "F32"), ((0, 5), "F64"), ((3, 0, 2), "F32")):
        base, models = family(np.random.default_rng(0), shape, dtype, MODELS[method])
        assert merged(method, parameters, base, models).shape == shape


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_threads_tiles_and_spans_change_no_bit(case, dtype, monkeypatch):
    method, parameters = case
    rng = np.random.default_rng(2)
    k = MODELS[method]
    for shape in ((300, 377), (3, 70, 10), (70001,)):
        base, models = family(rng, shape, dtype, k)
        weights = None if method in UNWEIGHTED else WEIGHTS[:k]
        first = merged(method, parameters, base, models, weights, threads=1)
        for tile, span, threads in ((1000, 65536, 2), (65536, 65536, 3)):
            with monkeypatch.context() as patch:
                patch.setattr(tiles, "TILE", tile)
                patch.setattr(execution, "SPAN", span)
                found = merged(method, parameters, base, models, weights, threads=threads)
            assert np.array_equal(oracle.raw_of(found), oracle.raw_of(first))


# --- mergekit 0.1.5's results on these arrays, in float32

BASE = np.float32([[1, 2, 3], [-1, 0.5, 2]])
TUNED = np.float32([[[2, 2, 1], [0, 1, 2]], [[1, -1, 3], [-2, 0.5, 1]], [[0.5, 2.5, 3], [-1, 1, 4]]])
ROWS, COLUMNS = {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}
MERGEKITS = [
    ("nuslerp", True, {}, [1.4134463, -0.88526893, 2.1731074, -1.54831, 0.70672315, 1.0382437]),
    ("nuslerp", True, ROWS, [1.3826835, -0.77163863, 2.234633, -1.5915842, 0.844998, 0.71841979]),
    ("nuslerp", True, COLUMNS, [1.7856951, -0.77163863, 2.234633, -1.6013449, 0.69134176, 1.0761204]),
    ("nuslerp", False, {}, [1.4735036, -0.20653412, 2.8367987, -1.6800376, 0.73675179, 1.4735036]),
    ("nuslerp", False, ROWS, [1.5042628, -0.20000428, 2.8824651, -1.6369382, 0.70958138, 1.4191627]),
    ("nuslerp", False, COLUMNS, [1.4363477, 0.069378532, 2.6329842, -1.6506101, 1.2796384, 1.3374938]),
    ("multislerp", True, {}, [1.2648524, -0.74511051, 2.1423733, -1.540877, 0.87836754, 1.6861529]),
    ("multislerp", True, {"normalize_weights": False},
     [1.3707935, -1.8431549, 1.7993225, -1.7572281, 1.0297146, 1.560614]),
    ("multislerp", False, {}, [1.4074271, 0.08243496, 2.9968376, -1.6889259, 0.79469693, 1.8320165]),
    ("karcher", True, {}, [1.407631, 1.4562359, 2.8252201, -1.1582341, 0.86514026, 2.4412498]),
    ("karcher", True, {"max_iter": 1}, [1.4064428, 1.4572589, 2.8253794, -1.1579401, 0.86470125, 2.4414341]),
    ("sce", True, {}, [2.0, -1.0, 1.0, 0.0, 1.0, 4.0]),
    ("sce", True, {"select_topk": 0.5}, [1.0, -1.0, 1.0, -1.0, 0.5, 4.0]),
    ("nearswap", True, {"t": 0.75}, [1.75, 2.0, 2.25, -0.25, 1.0, 2.0]),
    ("arcee_fusion", True, {}, [2.0, 2.0, 1.0, -1.0, 0.5, 2.0]),
    ("ram", True, {}, [1.25, 0.75, 1.0, -1.0, 1.0, 2.5]),
    ("ram", True, {"epsilon": 0.75}, [2.0, -1.0, 1.0, -1.0, 0.5, 2.5]),
    ("ramplus_tl", True, {}, [1.25, 0.75, 0.96, -1.0, 1.0, 2.5]),
    ("ramplus_tl", True, {"r": 0.7, "alpha": 5.0, "epsilon": 0.75}, [2.35, -5.2, 0.3, -1.0, 0.5, 2.5]),
    ("karcher", False, {}, [1.5462942, 1.2335867, 2.7210495, -1.2024321, 0.99557823, 2.584306]),
]  # fmt: skip


@pytest.mark.parametrize(("method", "with_base", "parameters", "theirs"), MERGEKITS)
def test_mergekits_numbers(method, with_base, parameters, theirs):
    k = MODELS[method]
    weights = None if method in UNWEIGHTED else WEIGHTS[:k]
    found = merged(method, parameters, BASE if with_base else None, TUNED[:k], weights)
    np.testing.assert_allclose(found.reshape(-1), theirs, rtol=1e-6, atol=1e-6)


# --- at the edges


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_one_model_is_itself_to_the_bit(method):
    _, (model,) = family(np.random.default_rng(3), (40, 30), "BF16", 1)
    model[0, :3] = -0.0
    assert np.array_equal(oracle.raw_of(merged(method, {}, None, [model])), oracle.raw_of(model))


def test_one_model_on_a_base_is_itself_whatever_its_weight():
    base, (model,) = family(np.random.default_rng(4), (40, 30), "BF16", 1)
    assert np.array_equal(oracle.raw_of(merged("multislerp", {}, base, [model], [0.3])), oracle.raw_of(model))


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher"])
def test_models_of_no_angle(method, with_base):
    """Zeros, equal and opposite ones: never NaN, and what the formula tends to."""
    _, (a,) = family(np.random.default_rng(5), (40, 30), "F32", 1)
    zero = np.zeros_like(a)
    base = zero if with_base else None
    weights = None if method == "karcher" else (0.5, 0.5)
    points = 3 if with_base and method == "karcher" else 2  # the base counts, with the mean norm alone

    def of(*models):
        return merged(method, {}, base, models, weights)

    np.testing.assert_allclose(of(a, a), 2 / points * a, rtol=1e-6)
    assert not of(zero, zero).any()
    opposite = of(a, -a)
    assert np.isfinite(opposite).all() and np.abs(opposite).max() <= 1.001 * np.abs(a).max()
    half = of(a, zero)
    assert np.isfinite(half).all() and half.any()


def test_sce_of_short_fine_tuning_counts_models_alike():
    """mergekit's numbers, and the paper's weights where they are asked for."""
    near = [BASE + np.float32(1e-4) * (x - BASE) for x in TUNED]
    theirs = [1.0, 1.9997, 2.9998, -0.9999, 0.5, 2.0002]
    np.testing.assert_allclose(merged("sce", {"select_topk": 0.7}, BASE, near).reshape(-1), theirs, atol=1e-6)
    base, models = family(np.random.default_rng(20), (40, 30), "F32", 3, 2e-4)
    models[0] = base + 2 * (models[0] - base)
    alike, paper = (merged("sce", {"floor": floor}, base, models) for floor in (1e-6, 0))
    assert np.abs(alike - paper).max() > 1e-5


def test_of_equal_variances_exactly_k_survive_and_the_first():
    base = np.zeros(1000, np.float32)
    models = [np.ones(1000, np.float32), np.full(1000, 3, np.float32)]
    models[1][::2] = 1  # where nothing differs
    found = merged("sce", {"select_topk": 0.5}, base, models)
    assert np.flatnonzero(found).tolist() == list(range(1, 500, 2))


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_equal_deltas_have_no_variance(k):
    """So nothing is selected, whatever the number of models; all is, where all shall be."""
    base, (model,) = family(np.random.default_rng(21), (40, 30), "F32", 1)
    assert np.array_equal(merged("sce", {"select_topk": 0.99}, base, [model] * k), base)
    np.testing.assert_allclose(merged("sce", {}, base, [model] * k), model, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["sce", "arcee_fusion"])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_survey_that_samples_finds_the_same(method, dtype, monkeypatch):
    """Also where the sample misleads: its pieces are unlike the rest."""
    rng = np.random.default_rng(22)
    base, models = family(rng, (301, 177), dtype, MODELS[method])
    models[0][:40] = base[:40]
    parameters = {"select_topk": 0.2} if method == "sce" else {}
    expected = merged(method, parameters, base, models, threads=1)
    monkeypatch.setattr(Select, "SAMPLE_FROM", 1000)
    for pieces, tile in ((1, 1024), (3, 4096), (16, 700)):
        monkeypatch.setattr(tiles, "SAMPLED_PIECES", pieces)
        monkeypatch.setattr(tiles, "TILE", tile)
        found = merged(method, parameters, base, models)
        assert np.array_equal(oracle.raw_of(found), oracle.raw_of(expected))


def test_sce_selects_nothing_and_all():
    base, models = family(np.random.default_rng(23), (40, 30), "BF16", 3)
    assert np.array_equal(merged("sce", {"select_topk": 0}, base, models), base)
    assert np.array_equal(merged("sce", {"select_topk": 0}, base, [base, base, base]), base)
    one = merged("sce", {}, base, models[:1])
    np.testing.assert_allclose(one.astype(np.float32), models[0].astype(np.float32), rtol=2**-7)


def test_nearswap_at_its_ends():
    base, (model,) = family(np.random.default_rng(24), (40, 30), "F32", 1)
    assert np.array_equal(merged("nearswap", {"t": 0}, base, [model]), base)
    np.testing.assert_allclose(merged("nearswap", {"t": 10}, base, [model]), model, rtol=1e-6, atol=1e-8)


def test_arcee_fusion_takes_all_where_no_row_diverges():
    """A shift of whole rows changes no softmax: every score is 0, and so is the threshold."""
    base = np.float32([[1, 2, 3], [4, 5, 6]])
    assert np.array_equal(merged("arcee_fusion", {}, base, [base + 1]), base + 1)


def test_ram_drops_what_changed_too_little():
    base = np.zeros(4, np.float32)
    models = [np.float32([1e-6, 1e-4, 2, 0]), np.float32([1, 1e-6, 4, 0])]
    assert np.array_equal(merged("ram", {}, base, models), np.float32([1, 1e-4, 3, 0]))


@pytest.mark.parametrize("method", ["sce", "arcee_fusion", "ramplus_tl", "ram", "nearswap"])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_nan_counts_as_unchanged_where_that_is_allowed(method, dtype):
    parameters = {"nearswap": {"t": 0.01}, "sce": {"select_topk": 0.4}}.get(method, {})
    base, models = family(np.random.default_rng(25), (50, 60), dtype, MODELS[method])
    models[0][3, 4] = np.nan
    with pytest.raises(dk.DarekitError, match="model 0: w: 1 values"):
        merged(method, parameters, base, models)
    found = merged(method, parameters, base, models, allow_nonfinite=True)
    assert found[3, 4] == base[3, 4]
    for model in models:
        model[3, 4] = base[3, 4]
    expected = merged(method, parameters, base, models)
    assert np.array_equal(oracle.raw_of(found), oracle.raw_of(expected))


def test_halfway_where_the_weights_cancel():
    base, models = family(np.random.default_rng(6), (40, 30), "F32", 2)
    even = merged("nuslerp", {}, base, models, (1, 1))
    assert np.array_equal(merged("nuslerp", {}, base, models, (1, -1)), even)
    assert np.array_equal(merged("nuslerp", {}, base, models, (0, 0)), even)


def test_directions_that_cancel_leave_the_weighted_sum():
    a = np.float32([1, 2, 3, 4])
    np.testing.assert_allclose(merged("multislerp", {}, None, [a, -3 * a], (1, 1)), -a, rtol=1e-6)
    three = [a, np.float32([-1, -2, -3, -4]), 2 * a]
    np.testing.assert_allclose(merged("multislerp", {}, None, three, (2, 4, 2)), (2 * a - 4 * a + 4 * a) / 8, rtol=1e-6)


def test_the_mean_of_three_points_of_a_great_circle():
    """Where the mean angle is the Riemannian mean; the normalised average is another point."""
    angles = np.array([0.0, 0.3, 1.5])
    points = [np.array([math.cos(x), math.sin(x)]) for x in angles]
    found = merged("karcher", {"max_iter": 100, "tol": 1e-12}, None, points)
    np.testing.assert_allclose(found, [math.cos(0.6), math.sin(0.6)], rtol=1e-12)
    average = sum(points)
    assert abs(math.atan2(average[1], average[0]) - 0.6) > 0.01


def test_a_model_opposite_to_the_mean_does_not_pull():
    """There is no shortest way to it; the mean has the direction of the other two, and the mean of all norms."""
    rows = np.array([[3.0, 4.0], [6.0, 8.0], [-3.0, -4.0]])
    found = spherical.karcher(rows @ rows.T) @ rows
    np.testing.assert_allclose(found, np.array([0.6, 0.8]) * (5 + 10 + 5) / 3, rtol=1e-12)


def test_tensors_without_a_direction_have_no_say_in_karcher():
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(2, 500)).astype(np.float32)
    found = merged("karcher", {}, None, [a, np.zeros_like(a), b])
    np.testing.assert_allclose(found, 2 / 3 * merged("karcher", {}, None, [a, b]), rtol=1e-5, atol=1e-6)


def test_many_nearly_equal_models_keep_their_digits():
    """Angles of 1e-6, where 1 - cosine is all rounding."""
    rng = np.random.default_rng(8)
    base = rng.normal(size=2000)
    models = [base + 1e-6 * rng.normal(size=2000) for _ in range(5)]
    found = merged("karcher", {"max_iter": 50, "tol": 1e-12}, None, models)
    np.testing.assert_allclose(found, sum(models) / 5, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sparsify", [dk.dare(0.5, seed=3), dk.magnitude(0.5), dk.della(0.5, seed=3)])
@pytest.mark.parametrize(("method", "parameters"), [case for case in CASES if case[0] != "nuslerp"])
def test_any_sparsifier_comes_before(method, parameters, sparsify):
    """The models are then base + sparsified delta."""
    base, models = family(np.random.default_rng(9), (50, 60), "F32", MODELS[method])
    seeds = list(range(len(models)))
    sparse = [
        dk.merge_tensors({"w": base}, [{"w": m}], sparsify=sparsify, seeds=[s], method="task_arithmetic")["w"]
        for m, s in zip(models, seeds, strict=True)
    ]
    found = merged(method, parameters, base, models, sparsify=sparsify, seeds=seeds)
    np.testing.assert_allclose(found, merged(method, parameters, base, sparse), rtol=1e-5, atol=1e-7)


def test_parameters_by_filters_and_gradients():
    recipe = {
        "models": ["a", "b"], "merge_method": "karcher",
        "parameters": {"max_iter": [1, 5], "tol": [{"filter": "mlp", "value": 1e-9}, {"value": "1e-4"}]},
    }  # fmt: skip
    assert dk.read_recipe(recipe).parameters["tol"].entries[1].value == 1e-4
    with pytest.raises(RecipeError, match=r"max_iter must be a whole number, found 2.5"):
        dk.read_recipe(recipe | {"parameters": {"max_iter": 2.5}})


def test_a_base_among_the_models_is_the_base():
    for method in ("nuslerp", "multislerp", "karcher"):
        data = {"base_model": "b", "models": ["b", "x", "y"], "merge_method": method}
        recipe = dk.read_recipe(data)
        assert [entry.model for entry in recipe.models] == ["x", "y"]


@pytest.mark.parametrize(("models", "found"), [(["x"], 1), (["x", "y", "z"], 3)])
def test_nuslerp_takes_two(models, found):
    with pytest.raises(RecipeError, match=f"nuslerp takes exactly two models.*, found {found}"):
        dk.read_recipe({"base_model": "b", "models": models, "merge_method": "nuslerp"})


def test_weights_are_not_dropped_from_where_angles_count():
    data = {
        "models": ["x", "y"], "merge_method": "nuslerp", "base_model": "b",
        "sparsify": {"method": "dare", "drop_rate": 0.5, "on": "weights"},
    }  # fmt: skip
    with pytest.raises(RecipeError, match="works only with merge_method: linear"):
        dk.read_recipe(data)


@pytest.mark.parametrize("parameters", [ROWS, COLUMNS, {}])
def test_nan_is_listed_and_where_allowed_the_bases_element(parameters):
    base, models = family(np.random.default_rng(10), (50, 60), "F32", 2)
    models[1][3, 4] = np.nan
    with pytest.raises(dk.DarekitError, match="model 1: w: 1 values"):
        merged("nuslerp", parameters, base, models)
    found = merged("nuslerp", parameters, base, models, allow_nonfinite=True)
    assert found[3, 4] == base[3, 4] and np.isfinite(found).all()


def test_the_lock_tells_what_was_measured(monkeypatch):
    base, models = family(np.random.default_rng(11), (5, 7), "F32", 2)
    records = {}
    run = execution.run

    def recorded(*args, **kwargs):
        done = run(*args, **kwargs)
        records.update(done.records)
        return done

    monkeypatch.setattr(execution, "run", recorded)
    for parameters, line, many in ((ROWS, "rows", 5), (COLUMNS, "columns", 7)):
        merged("nuslerp", parameters, base, models)
        assert records["w"]["measured"][line] == many
    merged("nuslerp", {}, base, models)
    assert len(records["w"]["measured"]["coefficients"]) == 2
    merged("sce", {"select_topk": 0.1, "floor": 0}, base, models)
    deltas = np.array(models) - base
    lowest = sorted(deltas.var(axis=0).reshape(-1))[-3]
    assert records["w"]["measured"]["threshold"] == pytest.approx(lowest, rel=1e-4)
    assert sum(records["w"]["measured"]["weights"]) == pytest.approx(1)
    assert records["w"]["kept"] == {"0": 3, "1": 3}
    merged("arcee_fusion", {}, base, models[:1])
    assert records["w"]["measured"].keys() == {"threshold"}


def test_della_at_a_drop_rate_of_1_leaves_nothing_whatever_its_window():
    """One end of a gradient may be there; the rates around it would be beyond 1."""
    rng = np.random.default_rng(3)
    base, model = rng.normal(size=(2, 7, 33)).astype(np.float32)
    model[0, :5] = base[0, :5]  # deltas of 0, which a factor without a bound would make NaN
    merged = dk.merge_tensors({"w": base}, [{"w": model}], sparsify=dk.della(1.0, window=0.3), method="task_arithmetic")
    assert merged["w"].tobytes() == base.tobytes()
    with pytest.raises(PlanError, match=r"drop rates from 0\.79 to 1\.09"):
        dk.merge_tensors({"w": base}, [{"w": model}], sparsify=dk.della(0.94, window=0.3))
