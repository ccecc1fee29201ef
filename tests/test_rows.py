# SPDX-License-Identifier: Apache-2.0
"""Gathered token rows: bytes as numpy gathers them, and masks that follow the stored row."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darekit.checkpoints import ArrayBytes, Places, TensorInfo, traits_of
from darekit.errors import HomologyError
from darekit.inputs.rows import FILL, MEAN, ZERO, RowTable, gathered

NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64", np.dtype(ml_dtypes.bfloat16): "BF16"}


def info(array, name="w"):
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return TensorInfo(name, NAMES[array.dtype], array.shape, ArrayBytes(raw))


def read(tensor, start=0, count=None):
    size = {"F32": 4, "F64": 8, "BF16": 2}[tensor.dtype]
    kind = {name: dtype for dtype, name in NAMES.items()}[tensor.dtype]
    buffer = np.empty((tensor.count if count is None else count) * size, np.uint8)
    tensor.source.read_into(buffer, start * size)
    return buffer.view(kind)


@st.composite
def gathers(draw):
    """Tensors of one or two models, an axis, and a table that takes rows of both, zeros and means."""
    axis = draw(st.integers(0, 2))
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=2))
    shape = draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    arrays = [rng.normal(size=(*shape[:axis], length, *shape[axis:])).astype(np.float32) for length in lengths]
    places = [(k, row) for k, length in enumerate(lengths) for row in range(length)]
    wanted = draw(st.lists(st.sampled_from([*places, (ZERO, -1), (MEAN, -1)]), min_size=1, max_size=12))
    means = {
        i: draw(st.lists(st.sampled_from(places), min_size=1, max_size=3, unique=True))
        for i, (owner, _) in enumerate(wanted)
        if owner == MEAN
    }
    return axis, arrays, wanted, means


def by_numpy(axis, arrays, wanted, means):
    """The same, row by row."""
    rows = []
    for i, (owner, row) in enumerate(wanted):
        if owner == ZERO:
            rows.append(np.zeros_like(arrays[0].take(0, axis)))
        elif owner == MEAN:
            total = np.zeros_like(arrays[0].take(0, axis))
            for k, r in means[i]:  # float32, one after another
                total = total + arrays[k].take(r, axis)
            rows.append(total / np.float32(len(means[i])))
        else:
            rows.append(arrays[owner].take(row, axis))
    return np.stack(rows, axis).astype(np.float32)


@given(gathers(), st.data())
def test_a_gather_is_numpys(case, data):
    axis, arrays, wanted, means = case
    owners, rows = (np.array(column, np.int64) for column in zip(*wanted, strict=True))
    tensor = gathered(0, RowTable(owners, rows, means, len(wanted)), [info(array) for array in arrays], axis)
    expected = by_numpy(*case)
    assert tensor.shape == expected.shape and tensor.source.nbytes == expected.nbytes
    np.testing.assert_array_equal(read(tensor), expected.reshape(-1))
    start = data.draw(st.integers(0, expected.size))
    count = data.draw(st.integers(0, expected.size - start))
    np.testing.assert_array_equal(read(tensor, start, count), expected.reshape(-1)[start : start + count])
    whole = expected.reshape(-1).view(np.uint8)
    piece = np.empty(min(3, whole.size), np.uint8)  # not whole elements
    tensor.source.read_into(piece, whole.size - piece.size)
    np.testing.assert_array_equal(piece, whole[whole.size - piece.size :])


@given(gathers())
def test_places_are_those_of_the_stored_element(case):
    """Each element of an own row is where numpy's index array puts it; all others are behind, and no two alike."""
    axis, arrays, wanted, means = case
    owners, rows = (np.array(column, np.int64) for column in zip(*wanted, strict=True))
    tensor = gathered(0, RowTable(owners, rows, means, len(wanted)), [info(array) for array in arrays], axis)
    places = traits_of(tensor.source).places
    found = np.full(tensor.count, -1)
    for offset, many, place in places.runs(0, tensor.count):
        found[offset : offset + many] = np.arange(place, place + many)
    stored = np.arange(arrays[0].size).reshape(arrays[0].shape)
    expected = np.stack([stored.take(row if k == 0 else 0, axis) for k, row in wanted], axis)
    own = np.broadcast_to(
        np.expand_dims(owners == 0, tuple(i for i in range(expected.ndim) if i != axis)), expected.shape
    )
    found = found.reshape(expected.shape)
    np.testing.assert_array_equal(found[own], expected[own])
    foreign = found[~own]
    assert (foreign >= arrays[0].size).all() and np.unique(foreign).size == foreign.size
    for start in range(0, tensor.count, 5):
        many = min(5, tensor.count - start)
        assert places.stay(start, many) == np.array_equal(
            found.reshape(-1)[start : start + many], np.arange(start, start + many)
        )


def test_the_mean_of_all_rows():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(5, 70_000)).astype(np.float32)  # more than is widened at once
    table = RowTable(np.array([0, 0, FILL, FILL]), np.array([4, 1, -1, -1]), {}, 2)
    found = read(gathered(0, table, [info(array)], 0)).reshape(4, -1)
    mean = array[[4, 1]].astype(np.float64).mean(axis=0).astype(np.float32)
    np.testing.assert_array_equal(found[2], mean)
    np.testing.assert_array_equal(found[3], mean)


def test_rows_of_another_format_are_rounded():
    rng = np.random.default_rng(0)
    own, other = rng.normal(size=(2, 6)).astype(ml_dtypes.bfloat16), rng.normal(size=(3, 6)).astype(np.float32)
    table = RowTable(np.array([0, 1, 0, 1]), np.array([1, 2, 0, 0]))
    tensor = gathered(0, table, [info(own), info(other)], 0)
    assert tensor.dtype == "BF16"
    expected = np.stack([own[1], other[2].astype(ml_dtypes.bfloat16), own[0], other[0].astype(ml_dtypes.bfloat16)])
    np.testing.assert_array_equal(read(tensor).view(np.uint16), expected.reshape(-1).view(np.uint16))


def test_rows_of_another_size_are_refused():
    table = RowTable(np.array([0, 1]), np.array([0, 0]))
    with pytest.raises(
        HomologyError, match="w: token rows of shape \\[1, 5\\] do not fit among rows of shape \\[1, 4\\]"
    ):
        gathered(0, table, [info(np.zeros((1, 4), np.float32)), info(np.zeros((1, 5), np.float32))], 0)


def test_identity():
    same = RowTable(np.array([2, 2]), np.array([0, 1]))
    assert same.is_identity(2, 2) and not same.is_identity(2, 3) and not same.is_identity(1, 2)
    assert not RowTable(np.array([2, 2]), np.array([1, 0])).is_identity(2, 2)


def test_places_of_rows_without_a_delta():
    """Where the base has the same row, any mask does: it is the one at hand, and only in deltas."""
    places = Places(np.array([0, 3, 2, -1, -1]), 4, 1, 2, np.array([False, True, False, True, False]))
    assert not places.stay(2, 2) and not places.stay(6, 2)
    rest = places.of_deltas()
    assert rest.stay(0, 8) and rest.rows.tolist() == [0, 1, 2, 3, -1]
    assert list(rest.runs(8, 2)) == [(0, 2, 18)]  # behind all of both
    assert Places(np.array([1, 0]), 2).of_deltas().rows.tolist() == [1, 0]


def test_places_known_answer():
    """Frozen: masks of rows that a model has are those of its stored rows; others lie behind all of them."""
    places = Places(np.array([2, 3, 0, -1, -1]), stored=4, inner=3)
    assert list(places.runs(0, 15)) == [(0, 6, 6), (6, 3, 0), (9, 6, 21)]
    outer = Places(np.array([1, -1]), stored=2, outer=2, inner=1)
    assert list(outer.runs(0, 4)) == [(0, 1, 1), (1, 1, 5), (2, 1, 3), (3, 1, 7)]
