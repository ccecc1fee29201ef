# SPDX-License-Identifier: Apache-2.0
"""The measuring half of a merge, step by step: which rows, their products, what coefficients make of a step."""

import threading
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from darekit.checkpoints import ArrayBytes, Traits
from darekit.checkpoints.sources import Delta
from darekit.dtypes import DTYPES
from darekit.engine import measuring
from darekit.engine.measuring import (
    ByColumn,
    Products,
    Rows,
    add_leaves,
    coefficients,
    measure,
    measure_columns,
    merge_rows,
    settled,
    told,
    without_bad,
)
from darekit.engine.steps import Input, Merge, StageSpec
from darekit.engine.tiles import ScratchPool, StepRun, Tally
from darekit.errors import DataError
from darekit.methods import MERGE_METHODS, SUM, MergeMethod

LEAF = 65536
DROP = (StageSpec("dare", {"drop_rate": 0.5, "rescale": "paper"}, 7),)


def entry(array):
    kind = next(kind for kind in DTYPES.values() if kind.numpy == array.dtype)
    return Input(ArrayBytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8)), kind, array.size)


def step_of(models, base=None, chains=None, method="slerp", shape=None, **more):
    first = models[0]
    shape = first.shape if shape is None else shape
    count = int(np.prod(shape))
    many = len(models)
    usual = {"slerp": {"t": 0.5}, "nuslerp": {"nuslerp_flatten": False, "nuslerp_row_wise": True}}
    more = {"parameters": usual.get(method, {}), "weights": (1.0,) * many} | more
    return Merge(
        "w", DTYPES["F32"], shape, 0, count, 0, 0, None if base is None else entry(base),
        tuple(map(entry, models)), tuple(range(many)), chains=chains or ((),) * many, method=method, **more,
    )  # fmt: skip


def hands(tile=LEAF):
    return SimpleNamespace(
        outputs=(), tile=tile, tally=Tally(), scratch=ScratchPool(), allow_nonfinite=False, broken=threading.Event()
    )


def run_of(step, tile=LEAF):
    return StepRun(step, hands(tile), {}, Counter())


def numbers(count, many, dtype="float32", seed=0):
    return [np.random.default_rng(seed + k).normal(size=count).astype(dtype) for k in range(many)]


def plainly(rows):
    """(R, n) -> the products of each pair, upper triangle row by row."""
    wide = np.asarray(rows, np.float64)
    return [wide[i] @ wide[j] for i in range(len(wide)) for j in range(i, len(wide))]


def register(monkeypatch, function=None, **fields):
    monkeypatch.setitem(MERGE_METHODS, "tried", MergeMethod(function or plain_mean, **fields))


def plain_mean(products):
    return np.full(products.shape[:-1], 1 / products.shape[-1])


# --- which rows


ROWS = [
    # products, base_row, with a base, with a stage -> base, deltas, raw
    ("models", True, True, False, (True, False, True)),
    ("models", True, True, True, (True, False, False)),
    ("models", True, False, False, (False, False, True)),
    ("models", False, True, False, (False, False, True)),
    ("models", False, True, True, (False, False, False)),
    ("models", False, False, True, (False, False, True)),
    ("deltas", False, True, False, (False, True, False)),
    ("deltas", True, True, True, (True, True, False)),
    ("deltas", False, False, False, (False, False, True)),
]  # fmt: skip


@pytest.mark.parametrize(("products", "base_row", "with_base", "staged", "expected"), ROWS)
def test_rows_are_what_the_table_says(monkeypatch, products, base_row, with_base, staged, expected):
    register(monkeypatch, products=products, base_row=base_row)
    base, *models = numbers(300, 3)
    chains = ((), DROP if staged else ())
    step = step_of(models, base if with_base else None, chains, "tried")
    rows = Rows.of(step)
    assert (rows.base, rows.deltas, rows.raw) == expected and rows.count == 2 + expected[0]
    assert rows.pairs == (6 if expected[0] else 3)
    # Of what is measured the products are these, on any tiles.
    kept = [np.ones(300), np.ones(300)]
    if staged and with_base:
        from darekit import masks

        kept[1] = 2 * masks.kept(7, masks.stream_of("w"), 0, 300, 0.5)
    deltas = [(model - base) * np.float32(mask) for model, mask in zip(models, kept, strict=True)]
    own = deltas if expected[1] else [base + delta for delta in deltas] if staged and with_base else models
    if not (staged and not with_base):
        wanted = plainly([*([base] if expected[0] else []), *own])
        for tile in (100, LEAF):
            found = measure(run_of(step, tile), 0, 300, threading.Event())
            assert found.shape == (1, rows.pairs)
            np.testing.assert_allclose(found[0], wanted, rtol=1e-12)


def test_rows_from_deltas_and_models():
    base, first, second = numbers(5, 3)
    both = np.stack([first, second])
    for one, values, expected in (
        (Rows(True, False, False, 3), False, [base, base + first, base + second]),
        (Rows(False, False, False, 2), False, [base + first, base + second]),
        (Rows(True, False, True, 3), True, [base, first, second]),
        (Rows(True, True, False, 3), False, [base, first, second]),
        (Rows(False, True, False, 2), True, [first, second]),
    ):
        assert (one.assemble(base, both, values=values) == np.stack(expected)).all()


# --- products


def test_leaves_are_added_up_apart():
    """The last may be cut; within a leaf sums go over lanes, whatever the pieces."""
    rows = np.stack(numbers(2 * LEAF + 700, 2))
    for cuts in ((0, 2 * LEAF + 700), (0, 5, LEAF - 3, LEAF + 3, 2 * LEAF, 2 * LEAF + 1, 2 * LEAF + 700)):
        found = Products(3, 3 * LEAF, 5 * LEAF + 700)
        for low, high in pairwise(cuts):
            found.add(np.ascontiguousarray(rows[:, low:high]), 3 * LEAF + low)
        leaves = found.finish()
        expected = [plainly(rows[:, at : at + LEAF]) for at in range(0, rows.shape[1], LEAF)]
        assert leaves.shape == (3, 3)
        np.testing.assert_allclose(leaves, expected, rtol=1e-12)
    whole = Products(3, 0, LEAF)
    whole.add(np.ascontiguousarray(rows[:, :LEAF]), 0)
    np.testing.assert_allclose(whole.finish(), expected[:1], rtol=1e-12)
    assert Products(3, 0, 0).finish().shape == (0, 3)


def test_sums_of_leaves():
    assert add_leaves(np.float64([[1, 2], [3, 4], [5, 6]])).tolist() == [9, 12]
    assert add_leaves(np.zeros((0, 2))).tolist() == [0, 0]
    with np.errstate(all="raise"):
        assert np.isinf(add_leaves(np.float64([[1e308], [1e308]])))[0]
        assert np.isnan(add_leaves(np.float64([[np.inf], [-np.inf]])))[0]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("products", ["models", "deltas"])
@pytest.mark.parametrize("base_row", [True, False])
def test_products_of_a_range(monkeypatch, dtype, products, base_row):
    """What the kernel of BF16 finds is what the general way finds, to the bit, whatever the range and its tiles."""
    register(monkeypatch, products=products, base_row=base_row)
    count = 3 * LEAF + 77
    base, *models = numbers(count, 3, dtype)
    step = step_of(models, base, method="tried")
    own = [model.astype(np.float32) - (base.astype(np.float32) if products == "deltas" else 0) for model in models]
    rows = np.stack([*([base.astype(np.float32)] if base_row else []), *own])
    kernel, found = measuring.cpu.products_bf16, []

    def checked(raw, raws, base_row, deltas, start, leaf, sums, totals, work):
        """Kernels do not look where they write."""
        assert len(totals) == -(-(start + raw.size) // leaf) and 0 <= start < leaf
        return kernel(raw, raws, base_row, deltas, start, leaf, sums, totals, work)

    monkeypatch.setattr(measuring.cpu, "products_bf16", checked)
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(measuring, "_is_fast", lambda step: False)
        for begin, end in ((0, count), (LEAF, 2 * LEAF), (2 * LEAF, count)):
            for tile in (LEAF, 4096):
                leaves = measure(run_of(step, tile), begin, end, threading.Event())
                expected = [plainly(rows[:, at : min(at + LEAF, end)]) for at in range(begin, end, LEAF)]
                np.testing.assert_allclose(leaves, expected, rtol=1e-11)
                found.append((begin, leaves.tobytes()))
    assert len(set(found)) == 3


def test_a_part_of_a_tensor_is_measured_where_it_begins():
    base, model = numbers(500, 2, ml_dtypes.bfloat16)
    step = replace(step_of([model], base), begin=200, count=300, shape=(500,))
    expected = plainly([base[200:].astype(np.float32), model[200:].astype(np.float32)])
    np.testing.assert_allclose(measure(run_of(step), 0, 300, threading.Event())[0], expected, rtol=1e-12)
    assert measuring._is_fast(step)


def test_which_steps_have_a_kernel():
    base, model = numbers(300, 2, ml_dtypes.bfloat16)
    plain = step_of([model], base)
    assert measuring._is_fast(plain) and measuring._is_fast(step_of([model, base]))
    for slow in (
        replace(plain, precise=True),
        replace(plain, chains=(DROP,)),
        replace(plain, count=301),
        replace(plain, begin=1),
        step_of([model.astype(np.float32)], base),
        step_of([model], base.astype(np.float32)),
    ):
        assert not measuring._is_fast(slow)

    class Finer(ArrayBytes):
        traits = Traits(delta=Delta(plain.base.source, lambda out, at: None))

    finer = replace(plain.models[0], source=Finer(plain.models[0].source.data))
    assert not measuring._is_fast(replace(plain, models=(finer,)))
    both = step_of([model, base], base)
    assert measuring._is_fast(both) and not measuring._is_fast(replace(both, models=(finer, both.models[1])))
    assert not measuring._is_fast(replace(both, chains=((), DROP)))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_what_is_no_number_counts_as_nothing(dtype):
    base, model = numbers(2 * LEAF, 2, dtype)
    clean_base, clean_model = base.copy(), model.copy()
    base[9], model[[10, LEAF + 3]] = np.inf, np.nan
    for one in (clean_base, clean_model):
        one[[9, 10, LEAF + 3]] = 0
    found = measure(run_of(step_of([model], base)), 0, 2 * LEAF, threading.Event())
    expected = measure(run_of(step_of([clean_model], clean_base)), 0, 2 * LEAF, threading.Event())
    assert found.tobytes() == expected.tobytes()
    rows = np.float32([[1, 2, np.nan, 4], [5, np.inf, 7, 8]])
    assert without_bad(rows.copy(), None).tolist() == [[1, 0, 0, 4], [5, 0, 0, 8]]
    assert without_bad(rows, np.array([True, False, False, False])).tolist() == [[0, 0, 0, 4], [0, 0, 0, 8]]


def test_a_thread_that_is_stopped_measures_no_more():
    run = run_of(step_of(numbers(300, 1), numbers(300, 1)[0]))
    stop = threading.Event()
    stop.set()
    assert not measure(run, 0, 300, stop).any()
    run.hands.broken.set()
    assert not measure(run, 0, 300, threading.Event()).any()
    step = step_of([one.reshape(30, 10) for one in numbers(300, 2)], method="nuslerp", weights=(1.0, 1.0))
    run = run_of(step)
    assert not measure_columns(run, stop).any() and measure_columns(run, threading.Event()).any()
    run.hands.broken.set()
    assert not measure_columns(run, threading.Event()).any()


@pytest.mark.parametrize("tile", [7, 100, LEAF])
def test_columns(tile):
    models = [one.reshape(30, 10) for one in numbers(300, 2)]
    found = measure_columns(run_of(step_of(models, method="nuslerp"), tile), threading.Event())
    np.testing.assert_allclose(found, [plainly([one[:, at] for one in models]) for at in range(10)], rtol=1e-12)


def test_stages_are_begun_before_they_are_applied(monkeypatch):
    seen = []

    class Told:
        ready = True

        def begin(self):
            seen.append("begin")

        def apply(self, delta, start):
            seen.append(start)
            delta[...] = 1

    base, model = (one.reshape(30, 10) for one in numbers(300, 2))
    for measured in (
        lambda run: measure(run, 0, 300, threading.Event()),
        lambda run: measure_columns(run, threading.Event()),
    ):
        seen.clear()
        run = run_of(step_of([model], base), 128)
        run.chains = [[Told()]]
        measured(run)
        assert seen == ["begin", 0, 128, 256]


# --- coefficients


def test_a_method_gets_a_symmetric_matrix_its_parameters_and_weights(monkeypatch):
    seen = []

    def asked(products, weights, *, size: float = 1.0):
        seen.append((products, weights, size))
        return products[..., 0]

    register(monkeypatch, asked, products="models", base_row=True)
    step = step_of(numbers(5, 2), numbers(5, 1)[0], method="tried", parameters={"size": 3.0, "rows": 1}, weights=(2, 5))
    found = coefficients(step, np.arange(12.0).reshape(2, 6))
    ((matrix, weights, size),) = seen
    assert matrix.tolist() == [[[0, 1, 2], [1, 3, 4], [2, 4, 5]], [[6, 7, 8], [7, 9, 10], [8, 10, 11]]]
    assert weights.tolist() == [2, 5] and weights.dtype == np.float64 and size == 3
    assert found.tolist() == [[0, 1, 2], [6, 7, 8]]
    del matrix
    seen.clear()
    coefficients(step, -np.arange(12.0).reshape(2, 6))  # in memory that may still hold the last matrix
    assert seen[0][0].tolist() == [
        [[0, -1, -2], [-1, -3, -4], [-2, -4, -5]],
        [[-6, -7, -8], [-7, -9, -10], [-8, -10, -11]],
    ]
    for bad in (np.inf, np.nan):
        with pytest.raises(DataError, match="w: the values are too large for tried"):
            coefficients(step, np.array([1, 2, bad, 4, 5, 6]))
    register(monkeypatch, products="models", base_row=True)
    assert coefficients(step, np.arange(6.0)).shape == (3,)


WEIGHED = [
    # products, base row, with a base, coefficients -> of the deltas (or models), of the base in what is added to it
    ("models", True, True, [0.2, 0.5, 0.7], [0.5, 0.7], 0.4),
    ("models", False, True, [0.5, 0.7], [0.5, 0.7], 0.2),
    ("models", True, False, [0.5, 0.7], [0.5, 0.7], 0.0),
    ("models", False, False, [0.5, 0.7], [0.5, 0.7], 0.0),
    ("deltas", False, True, [0.5, 0.7], [0.5, 0.7], 0.0),
    ("deltas", True, True, [0.2, 0.5, 0.7], [0.5, 0.7], 0.2),
]  # fmt: skip


@pytest.mark.parametrize(("products", "base_row", "with_base", "found", "weights", "base_weight"), WEIGHED)
def test_what_is_settled_is_a_weighted_sum(monkeypatch, products, base_row, with_base, found, weights, base_weight):
    register(monkeypatch, lambda products: np.array(found), products=products, base_row=base_row)
    step = step_of(numbers(5, 2), numbers(5, 1)[0] if with_base else None, method="tried", parameters={"a": 1})
    pairs = Rows.of(step).pairs
    now, kept = settled(step, np.ones((2, pairs)))
    assert kept.tolist() == found and now.method == SUM and now.parameters == {} and not now.verbatim
    assert now.weights == tuple(weights) and now.base_weight == pytest.approx(base_weight, abs=1e-15)


def test_the_leaves_are_added_up_before_they_are_settled(monkeypatch):
    register(monkeypatch, lambda products: products[0], products="models", base_row=False)
    step = step_of(numbers(5, 2), method="tried")
    assert settled(step, np.float64([[1, 2, 3], [10, 20, 30]]))[1].tolist() == [11, 22]


def test_a_model_that_is_taken_as_it_is_is_copied(monkeypatch):
    base, model, other = numbers(5, 3)

    def verbatim(step, found):
        register(monkeypatch, lambda products: np.array(found), products="models", base_row=len(found) > 1)
        return settled(step, np.ones((1, Rows.of(step).pairs)))[0].verbatim

    plain = step_of([model], base, method="tried")
    alone = step_of([model], method="tried")
    assert verbatim(plain, [0.0, 1.0]) and verbatim(alone, [1.0])
    assert not verbatim(plain, [0.0, 0.5]) and not verbatim(plain, [0.5, 1.0]) and not verbatim(alone, [0.5])
    assert not verbatim(replace(plain, factor=0.5), [0.0, 1.0])
    assert not verbatim(replace(plain, chains=(DROP,)), [0.0, 1.0])
    assert not verbatim(replace(plain, count=6), [0.0, 1.0]) and not verbatim(replace(plain, begin=1), [0.0, 1.0])
    assert verbatim(replace(plain, begin=1, count=4), [0.0, 1.0])
    assert not verbatim(step_of([model, other], base, method="tried"), [0.0, 1.0, 0.0])


# --- coefficients of columns and rows


def scaled(products):
    """Coefficients that differ everywhere: of each row its length."""
    return np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("columns", [None, 3])
def test_columns_are_merged_by_their_own(monkeypatch, with_base, columns):
    if columns is not None:
        monkeypatch.setattr(measuring, "COLUMNS", columns)
    register(monkeypatch, scaled, products="models", base_row=True)
    base, *models = (one.reshape(30, 10) for one in numbers(300, 3))
    base[:, 4] = 0  # so that the base's coefficient is 0 in one column
    step = step_of(models, base if with_base else None, method="tried")
    run = run_of(step)
    products = measure_columns(run, threading.Event())
    by, found = ByColumn.of(step, products)
    rows = [base, *models] if with_base else models
    lengths = np.sqrt([(one.astype(float) ** 2).sum(axis=0) for one in rows]).T
    np.testing.assert_allclose(found, lengths, rtol=1e-12)
    assert by.weights.dtype == by.base_weight.dtype == np.float32 and by.weights.shape == (2, 10)
    own = [model - base for model in models] if with_base else models
    for start, count in ((0, 300), (35, 20), (299, 1), (10, 0)):
        merged = by.merge(
            base.reshape(-1)[start : start + count], np.stack(own).reshape(2, -1)[:, start : start + count], start
        )
        expected = sum(length * one.astype(float) for length, one in zip(lengths.T, rows, strict=True))
        expected = (expected - base if with_base else expected).reshape(-1)[start : start + count]
        np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-4)
    assert ByColumn.of(replace(step, precise=True), products)[0].weights.dtype == np.float64
    empty, none = ByColumn.of(step, np.zeros((0, 6 if with_base else 3)))
    assert (
        none.shape == (0, len(rows)) and empty.merge(np.zeros(0, np.float32), np.zeros((2, 0), np.float32), 0).size == 0
    )


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("products", ["models", "deltas"])
def test_rows_are_merged_by_their_own(monkeypatch, with_base, products):
    register(monkeypatch, scaled, products=products, base_row=True)
    base, *models = (one.reshape(30, 10) for one in numbers(300, 3))
    base[4] = 0
    step = step_of(models, base if with_base else None, method="tried")
    own = [model - base for model in models] if with_base else models
    told_apart = own if products == "deltas" or not with_base else models
    rows = [base, *told_apart] if with_base else models
    bad = np.zeros(300, bool)
    bad[37] = True
    for bad_at in (None, bad):
        counted = [np.where(bad.reshape(30, 10) & (bad_at is not None), 0, one).astype(float) for one in rows]
        lengths = np.sqrt([(one**2).sum(axis=1) for one in counted]).T
        merged, found = merge_rows(step, base.reshape(-1), np.stack(own).reshape(2, -1), bad_at)
        np.testing.assert_allclose(found, lengths, rtol=1e-6)
        expected = sum(length[:, None] * one.astype(float) for length, one in zip(lengths.T, rows, strict=True))
        if with_base and products == "models":
            expected = expected - base
        np.testing.assert_allclose(merged, expected.reshape(-1), rtol=1e-4, atol=1e-4)
        assert merged.dtype == np.float32
    empty, none = merge_rows(
        replace(step, shape=(4, 0), count=0), np.zeros(0, np.float32), np.zeros((2, 0), np.float32), None
    )
    assert empty.size == 0 and none.shape == (0, len(rows))
    single = replace(step, shape=(300, 1))
    assert merge_rows(single, base.reshape(-1), np.stack(own).reshape(2, -1), None)[1].shape == (300, len(rows))


def test_coefficients_are_told_in_order():
    found = told({20: np.ones((1, 2)), 0: np.zeros((2, 2)), 3: np.full((1, 2), 2.0)})
    assert found.tolist() == [[0, 0], [0, 0], [2, 2], [1, 1]]
