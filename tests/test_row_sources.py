# SPDX-License-Identifier: Apache-2.0
"""Bytes of gathered rows in every number format, pieces of elements, means, and what such a source says of itself."""

import threading
from itertools import product

import ml_dtypes
import numpy as np
import pytest

from darekit.checkpoints import ArrayBytes, Places, TensorInfo, Traits, traits_of
from darekit.checkpoints.places import run_ends, split
from darekit.errors import HomologyError
from darekit.inputs import rows
from darekit.inputs.rows import FILL, MEAN, ZERO, RowTable, gathered

FORMATS = {"F32": np.float32, "F64": np.float64, "BF16": ml_dtypes.bfloat16}


def info(array, name="w", traits=None):
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    source = ArrayBytes(raw)
    if traits is not None:
        source = type("Told", (ArrayBytes,), {"traits": traits})(raw)
    format = next(name for name, kind in FORMATS.items() if array.dtype == kind)
    return TensorInfo(name, format, array.shape, source)


def read(tensor, begin=0, end=None):
    """Bytes begin .. end."""
    buffer = np.full((tensor.nbytes if end is None else end) - begin, 0xAB, np.uint8)
    tensor.source.read_into(buffer, begin)
    return buffer.tobytes()


def widened(array):
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32)


def by_numpy(own, arrays, table, axis):
    """Row by row, in the arithmetic of each part."""
    like = arrays[own]
    shape = [size for at, size in enumerate(like.shape) if at != axis]
    found = []
    for row, (owner, at) in enumerate(zip(table.owners, table.rows, strict=True)):
        if owner >= 0:
            found.append(arrays[owner].take(at, axis).astype(like.dtype))
        elif owner == ZERO:
            found.append(np.zeros(shape, like.dtype))
        elif owner == MEAN:
            number = np.float64 if like.dtype == np.float64 else np.float32
            total = np.zeros(shape, number)
            for k, other in table.means[row]:
                total = total + arrays[k].take(other, axis).astype(number)
            found.append((total / number(len(table.means[row]))).astype(like.dtype))
        else:
            found.append(None)
    real = [one for one in found[: table.tokens]]
    fill = (
        np.mean([one.astype(np.float64) for one in real], axis=0).astype(like.dtype)
        if real
        else np.zeros(shape, like.dtype)
    )
    return np.stack([fill if one is None else one for one in found], axis).astype(like.dtype)


@pytest.mark.parametrize("chunk", [65536, 5])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("own", "other"), [*product(FORMATS, FORMATS)])
def test_rows_of_all_kinds(own, other, axis, chunk, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    shapes = [[2, 3], [2, 3]]
    for shape, length in zip(shapes, (4, 6), strict=True):
        shape.insert(axis, length)
    arrays = [
        (rng.integers(-64, 64, shape) / 8).astype(FORMATS[kind])
        for shape, kind in zip(shapes, (own, other), strict=True)
    ]
    table = RowTable(
        np.array([1, 1, 0, ZERO, MEAN, 1, 0, MEAN, FILL, FILL]), np.array([2, 3, 1, -1, -1, 4, 3, -1, -1, -1]),
        {4: [(1, 5), (0, 0), (1, 1), (0, 3)], 7: [(0, 2)]}, 8,
    )  # fmt: skip
    tensor = gathered(0, table, [*map(info, arrays)], axis)
    expected = by_numpy(0, arrays, table, axis)
    assert tensor.shape == expected.shape and tensor.nbytes == tensor.source.nbytes == expected.nbytes
    assert tensor.dtype == own and tensor.name == "w"
    whole = read(tensor)
    assert whole == expected.tobytes()
    size = expected.itemsize
    for begin, end in (
        (0, 1),
        (1, 3),
        (size, 2 * size),
        (size - 1, 5 * size + 1),
        (7 * size, 7 * size),
        (0, 3 * size - 1),
        (len(whole) - 1, len(whole)),
        (4 * size + 1, len(whole)),
        (11 * size, 29 * size),
    ):
        assert read(tensor, begin, end) == whole[begin:end]
    for begin, end in ((-1, 3), (len(whole) - 1, len(whole) + 1)):
        with pytest.raises(ValueError, match="lie outside"):
            tensor.source.read_into(np.empty(end - begin, np.uint8), begin)


def test_a_mean_of_no_rows_is_0_and_it_is_made_once(monkeypatch):
    array = np.ones((2, 3), np.float32)
    nothing = gathered(0, RowTable(np.array([FILL, FILL]), np.array([-1, -1])), [info(array)], 0)
    assert read(nothing) == np.zeros((2, 3), np.float32).tobytes()
    no_columns = gathered(0, RowTable(np.array([0, FILL]), np.array([1, -1]), {}, 1), [info(array[:, :0])], 0)
    assert read(no_columns) == b"" and no_columns.shape == (2, 0)
    made = []
    values = rows.RowSource._filling.func
    monkeypatch.setattr(rows.RowSource._filling, "func", lambda source: made.append(1) or values(source))
    tensor = gathered(0, RowTable(np.array([0, 0, FILL]), np.array([0, 1, -1]), {}, 2), [info(array)], 0)
    threads = [threading.Thread(target=read, args=(tensor,)) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert made == [1]


def test_means_of_numbers_that_are_not_round():
    """Those of neighbours each by their own rows; of float64 in float64; of a single token that token."""
    rng = np.random.default_rng(1)
    for dtype in (np.float64, np.float32):
        array = rng.normal(size=(6, 5)).astype(dtype)
        means = {1: [(0, 0), (0, 1)], 2: [(0, 2), (0, 3)], 3: [(0, 4), (0, 5)]}
        table = RowTable(np.array([0, MEAN, MEAN, MEAN, FILL]), np.array([3, -1, -1, -1, -1]), means, 4)
        tensor = gathered(0, table, [info(array)], 0)
        found = np.frombuffer(read(tensor), dtype).reshape(5, 5)
        size = found.itemsize
        single = b"".join(read(tensor, at, at + size) for at in range(0, found.nbytes, size))
        assert single == found.tobytes()
        pairs = (array[[0, 2, 4]] + array[[1, 3, 5]]) / dtype(2)
        assert (found[1:4] == pairs).all()
        close = 1e-15 if dtype == np.float64 else 1e-7
        np.testing.assert_allclose(found[4], np.mean(found[:4].astype(float), axis=0), rtol=close, atol=close)
        alone = gathered(0, RowTable(np.array([0, FILL]), np.array([2, -1]), {}, 1), [info(array)], 0)
        assert read(alone) == array[[2, 2]].tobytes()


def test_rows_of_two_tensors_are_no_neighbours():
    one, other = np.arange(12, dtype=np.float32).reshape(4, 3), -np.arange(12, dtype=np.float32).reshape(4, 3)
    table = RowTable(np.array([0, 1, 0, 1]), np.array([1, 1, 2, 3]))
    expected = np.stack([one[1], other[1], one[2], other[3]])
    assert read(gathered(0, table, [info(one), info(other)], 0)) == expected.tobytes()


def test_rows_that_lie_behind_each_other_are_read_at_once():
    seen = []

    class Told(ArrayBytes):
        def read_into(self, buffer, offset):
            seen.append((offset, buffer.nbytes))
            super().read_into(buffer, offset)

    array = np.arange(24, dtype=np.float32).reshape(8, 3)
    one, other = (TensorInfo("w", "F32", (8, 3), Told(array.reshape(-1).view(np.uint8))) for _ in range(2))
    table = RowTable(np.array([0, 0, 0, 1, 1, 0, 0]), np.array([2, 3, 4, 5, 6, 7, 7]))
    tensor = gathered(0, table, [one, other], 0)
    assert read(tensor) == array[[2, 3, 4, 5, 6, 7, 7]].tobytes()
    assert seen == [(24, 36), (60, 24), (84, 12), (84, 12)]


def test_what_does_not_fit_and_what_is_not_named():
    base = info(np.zeros((4, 3), np.float32))
    wrong = info(np.zeros((4, 5), np.float32))
    here, there = RowTable(np.array([0, 0]), np.array([1, 2])), RowTable(np.array([0, 1]), np.array([1, 2]))
    assert gathered(0, here, [base, wrong, None], 0).shape == (2, 3)
    with pytest.raises(HomologyError, match=r"shape \[4, 5\] do not fit among rows of shape \[4, 3\]"):
        gathered(0, there, [base, wrong], 0)
    with pytest.raises(HomologyError, match="do not fit"):
        gathered(0, RowTable(np.array([MEAN]), np.array([-1]), {0: [(1, 0)]}), [base, wrong], 0)
    with pytest.raises(HomologyError, match="do not fit"):
        gathered(1, there, [wrong, base], 0)
    assert gathered(0, there, [base, info(np.zeros((9, 3), np.float32))], 0).shape == (2, 3)
    assert gathered(0, there, [info(np.zeros((3, 4), np.float32)), info(np.zeros((3, 9), np.float32))], 1).shape == (
        3,
        2,
    )
    with pytest.raises(HomologyError, match="do not fit"):
        gathered(0, there, [base, info(np.zeros((4, 9), np.float32))], 0)
    with pytest.raises(HomologyError, match="do not fit"):
        gathered(0, there, [base, info(np.zeros((4,), np.float32))], 0)


def test_is_identity():
    def same(owners, at):
        return RowTable(np.array(owners), np.array(at)).is_identity(2, 3)

    assert same([2, 2, 2], [0, 1, 2])
    assert not same([2, 2, 1], [0, 1, 2]) and not same([2, 2, 2], [0, 2, 1]) and not same([2, 2], [0, 1])
    assert not same([2, 2, 2, 2], [0, 1, 2, 3]) and not same([1, 1, 1], [0, 1, 2])


def test_what_a_source_says_of_itself():
    """All of what is named, be it in a mean; the seed is that of the tensor itself."""
    array = np.zeros((4, 3), np.float32)
    files = "a", "b", "c"
    told = [
        Traits(files=("a", "b"), seed=5, grain=2, cost=1.5), Traits(files=("b", "c"), seed=6, grain=8, cost=2.5),
        Traits(files=("d",), grain=99, cost=99.0),
    ]  # fmt: skip
    inputs = [*(info(array, traits=one) for one in told), None]
    table = RowTable(np.array([0, MEAN, ZERO]), np.array([3, -1, -1]), {1: [(1, 0), (0, 1)]})
    alike = np.array([True, False, False])
    found = traits_of(gathered(0, table, inputs, 0, alike).source)
    assert (found.files, found.seed, found.grain, found.cost) == (files, 5, 8, 2.5)
    assert found.identity is None and found.result is None
    places = found.places
    assert places.rows.tolist() == [3, -1, -1] and places.alike is alike
    assert (places.stored, places.outer, places.inner) == (4, 1, 3)
    across = traits_of(gathered(1, RowTable(np.array([1, 0]), np.array([2, 1])), inputs, 1).source)
    assert across.seed == 6 and across.places.rows.tolist() == [2, -1]
    assert (across.places.stored, across.places.outer, across.places.inner) == (3, 4, 1)
    nothing = traits_of(gathered(0, RowTable(np.array([ZERO]), np.array([-1])), [info(array)], 0).source)
    assert (nothing.grain, nothing.cost, nothing.files) == (1, 1.0, ())


# --- places


def test_runs_of_rows():
    for given, expected in (
        ([], []), ([3], [1]), ([3, 4, 5], [3]), ([3, 5], [1, 2]), ([3, 3], [1, 2]), ([-1, -1], [2]), ([-1, -2], [1, 2]),
        ([-2, -1], [1, 2]), ([-1, 0], [1, 2]), ([0, -1, -1, 0, 1, 3, 2], [1, 3, 5, 6, 7]),
    ):  # fmt: skip
        rows = np.array(given, np.int64)
        assert run_ends(rows, rows >= 0).tolist() == expected


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("outer", [1, 2])
def test_places_of_any_range(inner, outer):
    """What the stored tensor has is where numpy finds it; the rest is behind, where it would be if it were appended."""
    at = np.array([4, 0, 1, 2, -1, -1, 5, -1])
    stored = 6
    places = Places(at, stored, outer, inner)
    cells = np.arange(outer * stored * inner).reshape(outer, stored, inner)
    behind = cells.size + np.arange(outer * at.size * inner).reshape(outer, at.size, inner)
    expected = np.where((at >= 0)[None, :, None], cells[:, at], behind).reshape(-1)
    for start in range(expected.size):
        for count in (0, 1, 2, 7, expected.size):
            count = min(count, expected.size - start)
            runs = [*places.runs(start, count)]
            found = np.concatenate([np.arange(place, place + many) for _, many, place in runs] or [np.zeros(0)])
            assert found.tolist() == expected[start : start + count].tolist()
            assert [offset for offset, _, _ in runs] == np.cumsum([0, *(many for _, many, _ in runs)])[:-1].tolist()
            assert places.stay(start, count) == (found == np.arange(start, start + count)).all()
    assert [*split(run_ends(at, at >= 0), inner, 0, 0)] == []


def test_what_is_where_it_is_stored_stays():
    same = Places(np.arange(3), 3, 2, 2)
    assert same.stay(0, 12) and same.stay(5, 4) and [offset for offset, _, _ in same.runs(0, 12)] == [0, 6]
    cut = Places(np.arange(3), 4, 2, 2)
    assert cut.stay(0, 6) and not cut.stay(0, 7)


def test_places_of_deltas():
    at, alike = np.array([2, 1, 0, -1]), np.array([True, False, True, False])
    places = Places(at, 3, 1, 2, alike)
    now = places.of_deltas()
    assert now.rows.tolist() == [0, 1, 2, -1] and (now.stored, now.outer, now.inner) == (4, 1, 2) and now.alike is None
    assert Places(at, 9, 1, 2, alike).of_deltas().stored == 9
    across = Places(at, 3, 2, 2, alike)
    assert across.of_deltas() is across
    unknown = Places(at, 3)
    assert unknown.of_deltas() is unknown and (unknown.outer, unknown.inner) == (1, 1)
