# SPDX-License-Identifier: Apache-2.0
"""Methods that measure first: slerp against float64 written out here; products do not depend on threads or tiles."""

import itertools
import json
import math
from typing import Annotated

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import darekit as dk
import families
import oracle
from darekit.checkpoints import ArrayBytes
from darekit.dtypes import DTYPES
from darekit.engine import execution, measuring, tiles
from darekit.engine.steps import Input, Merge
from darekit.errors import CheckpointError, DataError, RecipeError
from darekit.methods import MERGE_METHODS, MergeMethod, Switch
from darekit.planning.plan import make_plan
from darekit.recipe import read_recipe

SIZES = (0, 1, 63, 64, 65, 1023, 1024, 1025)
# Half a unit in the last place, and what arithmetic in float32 adds to it.
CLOSE = {"BF16": 2**-8, "F16": 2**-10, "F32": 2e-6, "F64": 1e-14}


def truth(t, a, b):
    """Interpolation on the arc between two whole tensors, in float64; what mergekit does where they have no angle."""
    a, b = (np.asarray(x).astype(np.float64).reshape(-1) for x in (a, b))
    length_a, length_b = (math.sqrt(math.fsum(x * x)) for x in (a, b))
    cosine = math.fsum(a / (length_a if length_a > 1e-8 else 1) * (b / (length_b if length_b > 1e-8 else 1)))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def pair(rng, shape, dtype, angle=None):
    """Two tensors; `angle` between them in radians, else as it comes."""
    a, b = rng.normal(size=shape), rng.normal(size=shape)
    if angle is not None:
        b = math.cos(angle) * a + math.sin(angle) * b
    return a.astype(DTYPES[dtype].numpy), b.astype(DTYPES[dtype].numpy)


def slerp(a, b, t=0.3, *, sparsify=None, seed=None, **more):
    return dk.merge_tensors(
        {"w": a}, [{"w": b}], method=dk.slerp(t), sparsify=sparsify, seeds=None if seed is None else [seed], **more
    )["w"]


def same_bits(found, expected):
    assert found.dtype == expected.dtype and np.array_equal(oracle.raw_of(found), oracle.raw_of(expected))


def close(found, a, b, t, dtype):
    expected = truth(t, a, b)
    size = max(np.abs(x.astype(np.float64)).max(initial=0) for x in (a, b, expected))
    np.testing.assert_allclose(
        found.astype(np.float64).reshape(-1), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype] * size
    )


# --- slerp


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("angle", [None, 1e-4, 0.02, 0.04, 2.0])
def test_slerp_is_the_formula(dtype, angle):
    rng = np.random.default_rng(1)
    # Below 0 and above 1 it goes past the models.
    for shape, t in itertools.product((*SIZES, (130, 517), (2, 5, 64)), (0.0, 0.25, 0.7, 1.0, -0.1, 1.2)):
        a, b = pair(rng, shape, dtype, angle)
        close(slerp(a, b, t, threads=2), a, b, t, dtype)


def test_the_truth_can_tell_an_arc_from_a_line():
    a, b = pair(np.random.default_rng(2), 1000, "F32")
    line = 0.7 * a + 0.3 * b
    assert np.abs(truth(0.3, a, b) - line).max() > 0.1
    with pytest.raises(AssertionError):
        close(line, a, b, 0.3, "F32")


@pytest.mark.parametrize("dtype", CLOSE)
def test_tensors_of_no_angle(dtype):
    """Zeros, parallel and opposite ones, as mergekit has them: no direction is no angle of 90 degrees by accident."""
    a, _ = pair(np.random.default_rng(3), 1000, dtype)
    zero = np.zeros_like(a)
    for one, other in ((zero, a), (a, zero), (zero, zero), (a, a), (a, -a), (a, (2 * a).astype(a.dtype))):
        close(slerp(one, other), one, other, 0.3, dtype)


@pytest.mark.parametrize("dtype", CLOSE)
def test_the_ends_and_equal_models_are_copied_to_the_bit(dtype):
    a, b = pair(np.random.default_rng(4), (300, 7), dtype)
    a[0, :3] = -0.0
    same_bits(slerp(a, b, 0.0), a)
    same_bits(slerp(a, b, 1.0), b)
    same_bits(slerp(a, a.copy(), 0.37), a)


def test_t_by_filters_and_none_that_matches():
    rng = np.random.default_rng(5)
    names = ("a.mlp.w", "a.attn.w", "norm")
    both = {name: pair(rng, 700, "F32") for name in names}
    base, model = ({name: ab[i] for name, ab in both.items()} for i in (0, 1))
    values = [{"filter": "mlp", "value": 0.2}, {"filter": "attn", "value": 0.9}]
    found = dk.merge_tensors(base, [model], method=dk.slerp([*values, {"value": 0.5}]))
    for name, t in zip(names, (0.2, 0.9, 0.5), strict=True):
        close(found[name], *both[name], t, "F32")
    with pytest.raises(RecipeError, match="no t for tensor norm: none of its filters match"):
        dk.merge_tensors(base, [model], method=dk.slerp(values))


def test_sparsifiers_come_before_the_measuring():
    """What is measured is base + sparsified delta: with everything dropped there is no angle left, but the base."""
    a, b = pair(np.random.default_rng(6), 4000, "F32")
    same_bits(slerp(a, b, sparsify=dk.dare(1.0)), a)
    sparse = dk.merge_tensors({"w": a}, [{"w": b}], sparsify=dk.dare(0.5), seeds=[9], method=dk.task_arithmetic())["w"]
    close(slerp(a, b, sparsify=dk.dare(0.5), seed=9), a, sparse, 0.3, "F32")


def test_two_models_without_a_base():
    a, b = pair(np.random.default_rng(7), (30, 40), "BF16")
    without = dk.merge_tensors(None, [{"w": a}, {"w": b}], method=dk.slerp(0.3))["w"]
    same_bits(without, slerp(a, b))


# --- no thread, span or tile


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
def test_nothing_depends_on_threads_tiles_and_spans(dtype, monkeypatch):
    a, b = pair(np.random.default_rng(8), (300, 777), dtype, 0.5)  # 3.6 leaves
    first = slerp(a, b, threads=1)
    close(first, a, b, 0.3, dtype)
    for tile, span, threads in itertools.product((64, 1000, 65536), (65536, 131072), (1, 2, 4)):
        monkeypatch.setattr(tiles, "TILE", tile)
        monkeypatch.setattr(execution, "SPAN", span)
        same_bits(slerp(a, b, threads=threads), first)


@settings(max_examples=60)
@given(
    shape=st.sampled_from([(1,), (1023,), (65536,), (65537,), (131073,), (3, 1), (257, 511), (70, 1024)]),
    dtype=st.sampled_from(["BF16", "F16", "F32", "F64"]),
    angle=st.sampled_from([None, 1e-3, 0.1]),
    sparsify=st.sampled_from(
        [None, dk.dare(0.5), dk.magnitude(0.5), dk.della(0.5), dk.sparsifier("dare", 0.5, rescale="l1")]
    ),
    tile=st.sampled_from([64, 100, 1024, 65536]),
    span=st.sampled_from([65536, 131072, 64 * 65536]),
    threads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**32),
)
def test_shapes_threads_tiles_spans_and_sparsifiers(shape, dtype, angle, sparsify, tile, span, threads, seed):
    a, b = pair(np.random.default_rng(seed), shape, dtype, angle)
    expected = slerp(a, b, sparsify=sparsify, seed=seed, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", tile)
        patch.setattr(execution, "SPAN", span)
        same_bits(slerp(a, b, sparsify=sparsify, seed=seed, threads=threads), expected)
    if sparsify is None:
        close(expected, a, b, 0.3, dtype)


@pytest.mark.parametrize("angle", [None, 1e-3])
def test_the_fast_lane_and_the_general_way_give_the_same_bits(angle, monkeypatch):
    a, b = pair(np.random.default_rng(9), (700, 1001), "BF16", angle)
    fast = slerp(a, b, threads=2)
    monkeypatch.setattr(measuring, "_is_fast", lambda step: False)
    same_bits(slerp(a, b, threads=2), fast)
    monkeypatch.setattr(tiles, "fuse", lambda step, chains: None)
    same_bits(slerp(a, b, threads=2), fast)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("rows", [2, 5])
def test_products_are_sums_of_float64(dtype, rows):
    """Whatever the pieces are; and no precision is lost where large values come first."""
    rng = np.random.default_rng(10)
    n = 200_001
    values = (rng.normal(size=(rows, n)) * np.where(np.arange(n) < 1000, 1e4, 1e-2)).astype(DTYPES[dtype].numpy)
    kind = DTYPES[dtype]

    def entry(array):
        return Input(ArrayBytes(oracle.raw_of(array)), kind, n)

    step = Merge(
        "w", kind, (n,), 0, n, 0, 0, entry(values[0]), tuple(map(entry, values[1:])), tuple(range(rows - 1)),
        (1.0,) * (rows - 1), ((),) * (rows - 1), "slerp", {"t": 0.5},
    )  # fmt: skip
    stop = execution.threading.Event()
    worker = execution.Worker((), 65536, False, stop)
    parts = [
        measuring.measure(tiles.StepRun(step, worker, {}, execution.Counter()), begin, end, stop)
        for begin, end in ((0, 65536), (65536, 196608), (196608, n))
    ]
    found = np.concatenate(parts).sum(axis=0)
    wide = values.astype(np.float64)
    exact = [math.fsum(wide[i] * wide[j]) for i in range(rows) for j in range(i, rows)]
    scale = [math.fsum(np.abs(wide[i] * wide[j])) for i in range(rows) for j in range(i, rows)]
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-14 * max(scale))


def measured_job(count, tile=65536):
    zeros = Input(ArrayBytes(np.zeros(4 * count, np.uint8)), DTYPES["F32"], count)
    step = Merge(
        "w", DTYPES["F32"], (count,), 0, count, 0, 0, zeros, (zeros,), (0,), (1.0,), ((),), "slerp",
        {"t": 0.5},
    )  # fmt: skip
    return execution.Job([step], tile)


def test_a_measured_tensor_is_shared_by_threads_in_both_passes(monkeypatch):
    monkeypatch.setattr(execution, "SPAN", 65536)
    job = measured_job(3 * 65536)
    queue = execution.Queue([job])
    assert job.measured is not None and len(job.spans) == 3
    spans = [queue.take(thread)[1:] for thread in (0, 1, 2)]
    for span in spans:
        job.add_products(span[0], np.zeros((1, 3)))
    assert [job.end() for _ in spans] == [False, False, True]
    job.settle(job.measured)
    queue.put(job)
    assert job.measured is None and [queue.take(thread)[1:] for thread in (2, 1, 0)] == spans
    assert queue.take(0) is None


class Faulty:
    """A source that breaks off."""

    nbytes = 4 * 3 * 65536

    def read_into(self, buffer, offset):
        raise CheckpointError("the disk is gone")


def test_threads_that_wait_for_a_measured_tensor_end_when_it_fails(monkeypatch):
    monkeypatch.setattr(execution, "SPAN", 3 * 65536)
    job = measured_job(3 * 65536)
    (step,) = job.steps
    broken = execution.replace(step, models=(Input(Faulty(), DTYPES["F32"], step.count),))
    with pytest.raises(CheckpointError, match="the disk is gone"):
        execution.run([broken], [], names=["m"], threads=3)


# --- values that are no numbers


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_nan_and_inf_are_all_listed_and_nothing_comes_out(dtype):
    a, b = pair(np.random.default_rng(11), 200_000, dtype)
    a[7], b[[9, 150_000]] = np.nan, np.inf
    with pytest.raises(DataError, match=r"base: w: 1 values\n  model 0: w: 2 values"):
        slerp(a, b, threads=2)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("sparsify", [None, dk.dare(0.5)])
def test_nan_counts_as_nothing_where_the_bases_elements_are_taken(dtype, sparsify):
    a, b = pair(np.random.default_rng(12), 200_000, dtype)
    at = [5, 70_000, 199_999]
    clean_a, clean_b = a.copy(), b.copy()
    clean_a[at], clean_b[at] = 0, 0
    expected = slerp(clean_a, clean_b, sparsify=sparsify, seed=3)
    b[at] = np.nan
    found = slerp(a, b, sparsify=sparsify, seed=3, allow_nonfinite=True, threads=2)
    same_bits(np.delete(found, at), np.delete(expected, at))
    same_bits(found[at], a[at])


def test_products_that_float64_cannot_hold():
    a, b = pair(np.random.default_rng(13), 100, "F64")
    with pytest.raises(DataError, match="w: the values are too large for slerp: their products overflow float64"):
        slerp(1e200 * a, 1e200 * b)


# --- what else a method may ask for


def halves(products, weights):
    """Coefficients that say what came: the trace in the first, the weights in all."""
    trace = np.trace(products, axis1=-2, axis2=-1)
    return np.stack([np.sqrt(trace)] * products.shape[-1], axis=-1) * np.array([1.0, *weights])[-products.shape[-1] :]


def by_rows(*, rows: Annotated[bool, Switch("each row by itself")] = False):
    return "row" if rows else "tensor"


def register(monkeypatch, **fields):
    monkeypatch.setitem(MERGE_METHODS, "halves", MergeMethod(halves, **fields))


def test_of_deltas(monkeypatch):
    register(monkeypatch, products="deltas")
    rng = np.random.default_rng(14)
    base, models = oracle.family(rng, (50, 33), "F32", scale=0.1)
    found = dk.merge_tensors(
        {"w": base}, [{"w": m} for m in models], method=dk.merge_method("halves", **{"lambda": 0.5}), weights=[1, 2, 3]
    )
    deltas = np.array([m - base for m in models]).astype(np.float64)
    size = math.sqrt((deltas**2).sum())
    expected = base + 0.5 * size * np.tensordot([1, 2, 3], deltas, 1)
    np.testing.assert_allclose(found["w"], expected, rtol=1e-5, atol=1e-6)


def test_of_deltas_with_the_base_as_a_row(monkeypatch):
    """The base's coefficient is that of the base in what is added to it."""
    register(monkeypatch, products="deltas", base_row=True)
    base, models = oracle.family(np.random.default_rng(15), (50, 33), "F32", k=1, scale=0.1)
    found = dk.merge_tensors({"w": base}, [{"w": models[0]}], method=dk.merge_method("halves"), weights=[2])["w"]
    delta = (models[0] - base).astype(np.float64)
    size = math.sqrt((delta**2).sum() + (base.astype(np.float64) ** 2).sum())
    np.testing.assert_allclose(found, base + size * base + 2 * size * delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_base", [True, False])
def test_of_models_without_the_base_as_a_row(monkeypatch, with_base):
    """The sum of the models, whether there is a base to start from or none."""
    register(monkeypatch, products="models", needs_base=False)
    base, models = oracle.family(np.random.default_rng(16), (50, 33), "F32", k=2, scale=0.1)
    found = dk.merge_tensors(
        {"w": base} if with_base else None, [{"w": m} for m in models], method=dk.merge_method("halves"),
        weights=[1, 2],
    )["w"]  # fmt: skip
    size = math.sqrt(sum((m.astype(np.float64) ** 2).sum() for m in models))
    expected = size * (models[0].astype(np.float64) + 2 * models[1])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
@pytest.mark.parametrize("shape", [(0,), (7,), (5, 1), (130, 517), (70, 1024), (2, 5, 64)])
def test_each_row_by_itself(monkeypatch, dtype, shape):
    register(monkeypatch, products="models", base_row=True, vectors=by_rows)
    base, (model,) = (
        pair(np.random.default_rng(17), shape, dtype)[0],
        [pair(np.random.default_rng(18), shape, dtype)[1]],
    )
    results = []
    for tile, span, threads in ((65536, 64 * 65536, 1), (100, 65536, 2), (65536, 65536, 4)):
        monkeypatch.setattr(tiles, "TILE", tile)
        monkeypatch.setattr(execution, "SPAN", span)
        results.append(
            dk.merge_tensors(
                {"w": base}, [{"w": model}], method=dk.merge_method("halves", rows=True), weights=[0.5], threads=threads
            )["w"]
        )
    for other in results[1:]:
        same_bits(other, results[0])
    a, b = (x.astype(np.float64).reshape(-1, shape[-1] or 1) for x in (base, model))
    size = np.sqrt((a * a + b * b).sum(axis=1, keepdims=True))
    expected = (size * a + 0.5 * size * b).reshape(shape)
    np.testing.assert_allclose(
        results[0].astype(np.float64), expected, rtol=CLOSE[dtype],
        atol=10 * CLOSE[dtype] * np.abs(expected).max(initial=0),
    )  # fmt: skip


def test_rows_are_cut_into_spans(monkeypatch):
    register(monkeypatch, products="models", base_row=True, vectors=by_rows)
    monkeypatch.setattr(execution, "SPAN", 65536)
    zeros = Input(ArrayBytes(np.zeros(2 * 300 * 1536, np.uint8)), DTYPES["BF16"], 300 * 1536)
    step = Merge(
        "w", DTYPES["BF16"], (300, 1536), 0, 300 * 1536, 0, 0, zeros, (zeros,), (0,), (1.0,), ((),), "halves",
        {"rows": True},
    )  # fmt: skip
    spans = execution.Job([step], 65536).spans
    assert spans == [(0, 196608), (196608, 393216), (393216, 460800)]
    assert all(begin % 1536 == begin % 65536 == 0 for begin, _ in spans)


# --- model_stock


def stock(base, models):
    """(n,) base, N models -> the formula in float64, over pairs of models; n is the tensor, or one row of it."""
    base, *models = (np.asarray(x).astype(np.float64).reshape(-1) for x in (base, *models))
    deltas, n = [m - base for m in models], len(models)
    lengths = [math.sqrt(math.fsum(d * d)) for d in deltas]
    cosines = [
        math.fsum(deltas[i] * deltas[j]) / (lengths[i] * lengths[j]) if lengths[i] * lengths[j] else 0.0
        for i in range(n) for j in range(i)
    ]  # fmt: skip
    c = sum(cosines) / len(cosines)
    t = n * c / (1 + (n - 1) * c) if abs(1 + (n - 1) * c) >= 1e-6 else 0.0
    return t * sum(models) / n + (1 - t) * base


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("k", [2, 3])
def test_model_stock_is_the_formula(dtype, filter_wise, k):
    rng = np.random.default_rng(21)
    for shape in ((1,), (65,), (1025,), (3, 1), (130, 517), (2, 5, 64), (0,)):
        common, base = rng.normal(size=shape), rng.normal(size=shape).astype(DTYPES[dtype].numpy)
        models = [(base.astype(np.float64) + common + 2 * rng.normal(size=shape)).astype(base.dtype) for _ in range(k)]
        found = dk.merge_tensors(
            {"w": base}, [{"w": m} for m in models], method=dk.merge_method("model_stock", filter_wise=filter_wise),
            threads=2,
        )["w"]  # fmt: skip
        if not base.size:
            continue
        cut = (-1, shape[-1] if filter_wise else base.size)
        rows = zip(base.reshape(cut), *(m.reshape(cut) for m in models), strict=True)
        expected = np.concatenate([stock(b, ms) for b, *ms in rows])
        scale = max(np.abs(x.astype(np.float64)).max() for x in (base, *models, expected))
        np.testing.assert_allclose(
            found.astype(np.float64).reshape(-1), expected, rtol=CLOSE[dtype], atol=4 * CLOSE[dtype] * scale
        )


def test_model_stock_of_models_that_cancel_or_agree():
    base, (model,) = oracle.family(np.random.default_rng(22), (40, 30), "F32", k=1, scale=0.1)
    opposite = base - (model - base)
    how = {"method": dk.merge_method("model_stock")}
    same_bits(dk.merge_tensors({"w": base}, [{"w": model}, {"w": opposite}], **how)["w"], base)
    np.testing.assert_allclose(
        dk.merge_tensors({"w": base}, [{"w": model}, {"w": model}], **how)["w"], model, rtol=1e-6, atol=1e-7
    )
    with pytest.raises(RecipeError, match="model_stock takes at least two models besides base_model, found 1"):
        dk.merge_tensors({"w": base}, [{"w": model}], **how)


# --- from disk to disk


@pytest.fixture
def two(tmp_path):
    """Two models that are no close relatives, in two shards each: .path."""
    rng = np.random.default_rng(19)
    for name in ("a", "b"):
        families.save(tmp_path / name, families.llama(rng, ml_dtypes.bfloat16), families.config(), shards=2)
    return tmp_path


def slerp_recipe(path, **keys):
    return {
        "base_model": str(path / "a"), "models": [str(path / "b")], "merge_method": "slerp", "parameters": {"t": 0.3},
    } | keys  # fmt: skip


def test_what_was_measured_is_in_the_lock_and_costs_what_the_plan_said(two):
    recipe = slerp_recipe(two)
    report = dk.merge(recipe, two / "out", force=True)
    a, b, found = (families.load(two / name) for name in ("a", "b", "out"))
    for name in a:
        close(found[name], a[name], b[name], 0.3, "BF16")
    assert report.bytes_read == dk.plan(recipe).bytes_to_read() == 2 * sum(x.nbytes for x in (*a.values(), *b.values()))
    lock = json.loads((two / "out" / "darekit.lock.json").read_text())
    assert list(lock["measured"]) == sorted(a)
    for name, measured in lock["measured"].items():
        x, y = (t[name].astype(np.float64).reshape(-1) for t in (a, b))
        angle = math.acos(x @ y / math.sqrt((x @ x) * (y @ y)))
        expected = [math.sin(0.7 * angle) / math.sin(angle), math.sin(0.3 * angle) / math.sin(angle)]
        if math.cos(angle) > 0.9995:
            expected = [0.7, 0.3]
        np.testing.assert_allclose(measured["coefficients"], expected, rtol=1e-9)
    (resolved,) = lock["resolved"]
    assert resolved["parameters"] == {"t": 0.3} and "weights" not in resolved


def test_a_resumed_run_has_the_same_lock(two, monkeypatch):
    dk.merge(slerp_recipe(two), two / "whole", force=True)
    record, seen = execution.Job.record, []

    def failing(job):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(job.name)
        return record(job)

    with monkeypatch.context() as patch:
        patch.setattr(execution.Job, "record", failing)
        with pytest.raises(KeyboardInterrupt):
            dk.merge(slerp_recipe(two), two / "cut", force=True, threads=1)
    dk.merge(slerp_recipe(two), two / "cut", force=True, resume=True)
    cut, whole = families.contents(two / "cut"), families.contents(two / "whole")
    for name in ("darekit.lock.json", "model.safetensors"):
        assert cut[name] == whole[name]


def test_rows_digest_in_the_lock(two, monkeypatch):
    register(monkeypatch, products="models", base_row=True, vectors=by_rows)
    digests = []
    for threads, tile in ((1, None), (2, 64)):
        out = two / f"out{threads}"
        keys = {"merge_method": "halves", "parameters": {"rows": True, "weight": 0.5}}
        dk.merge(slerp_recipe(two, **keys), out, force=True, threads=threads, tile=tile)
        digests.append(json.loads((out / "darekit.lock.json").read_text())["measured"])
    assert digests[0] == digests[1]
    assert digests[0]["model.embed_tokens.weight"]["rows"] == families.VOCAB
    assert len(digests[0]["model.norm.weight"]["coefficients"]) == 2


@pytest.mark.parametrize("vocab", ["base", "pad"])
def test_vocabularies_that_differ(tmp_path, vocab):
    """Rows that only the model has are its own; the others are measured by themselves."""
    rng = np.random.default_rng(20)
    a, b = families.llama(rng), families.llama(rng, vocab=families.VOCAB + 4)
    families.save(tmp_path / "a", a, families.config())
    families.save(tmp_path / "b", b, families.config(vocab=families.VOCAB + 4))
    dk.merge(slerp_recipe(tmp_path, vocab=vocab), tmp_path / "out", force=True)
    found = families.load(tmp_path / "out")
    for name in a:
        rows = len(a[name])
        close(found[name][:rows], a[name], b[name][:rows], 0.3, "BF16")
        if vocab == "pad":
            same_bits(found[name][rows:], b[name][rows:])


def test_peak_memory_counts_the_rows(two):
    recipe = read_recipe(slerp_recipe(two))
    from darekit.checkpoints import open_checkpoint

    base, model = open_checkpoint(two / "a"), open_checkpoint(two / "b")
    with_rows = make_plan(recipe, base, [model]).peak_memory(2, 65536)
    plain = make_plan(read_recipe(slerp_recipe(two, merge_method="linear", parameters={})), base, [model])
    assert with_rows > plain.peak_memory(2, 65536)
