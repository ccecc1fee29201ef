# SPDX-License-Identifier: Apache-2.0
"""Scales of quantised weights by themselves: ranges of their grid, and values that no quantiser writes."""

import numpy as np
import pytest

from darekit.checkpoints import ArrayBytes, TensorInfo
from darekit.checkpoints.quantised.scales import Nested, Ordered, Scales, Zeros, read_part, refuse_impossible
from darekit.errors import DataError

NAMES = {"float32": "F32", "int32": "I32", "uint8": "U8", "int8": "I8"}


def info(array, name="s"):
    array = np.asarray(array)
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return TensorInfo(name, NAMES[array.dtype.name], array.shape, ArrayBytes(raw))


GRID = np.arange(1, 43, dtype=np.float32).reshape(6, 7)
RANGES = [((0, 6), (0, 7)), ((2, 5), (0, 7)), ((2, 5), (3, 6)), ((1, 3), (6, 7)), ((4, 5), (2, 4)), ((0, 2), (0, 1))]


@pytest.mark.parametrize(("rows", "columns"), RANGES)
def test_any_range_of_a_grid(rows, columns):
    expected = GRID[slice(*rows), slice(*columns)]
    assert read_part(info(GRID), 7, rows, columns).tobytes() == np.ascontiguousarray(expected).tobytes()
    half, whole = info(np.float32([0.5])), Scales(info(GRID), 7, "w")
    assert np.array_equal(whole.read(rows, columns), expected)
    assert np.array_equal(Scales(info(GRID), 7, "w", half).read(rows, columns), expected / 2)
    assert np.array_equal(Scales(info(GRID), 7, "w", half, divides=True).read(rows, columns), expected * 2)
    zeros = Zeros(info(GRID.astype(np.int32)), 7).read(rows, columns)
    assert zeros.shape == expected.shape and np.array_equal(zeros, expected)


def test_scales_that_no_quantiser_writes():
    refuse_impossible(np.float32([0, 1, 2]), "s", "w")
    refuse_impossible(np.float32([-1, 0]), "s", "w", signed=True)
    refuse_impossible(np.float32([1]), "s", "w", zero=False)
    for values, options, said in (
        ([1, np.nan, np.inf], {}, "2 of 3 scales .* NaN or Inf"),
        ([1, -np.inf], {"signed": True}, "1 of 2 scales .* NaN or Inf"),
        ([-1, 1, -2], {}, "2 of 3 scales .* negative"),
        ([0, 1], {"zero": False}, "1 of 2 scales .* are 0"),
        ([0, -1], {"zero": False, "signed": True}, "1 of 2 scales .* are 0"),
        ([np.nan, -1, 0], {"zero": False}, "1 of 3 scales .* NaN or Inf"),
        ([-1, 0, 0], {"zero": False}, "1 of 3 scales .* negative"),
    ):
        with pytest.raises(DataError, match=said):
            refuse_impossible(np.float32(values), "s", "w", **options)
    nothing = info(np.float32([0]))
    assert not Scales(info(GRID), 7, "w", nothing).read((0, 1), (0, 7)).any()
    with pytest.raises(DataError, match="are 0"):
        Scales(info(GRID), 7, "w", nothing, divides=True).read((0, 1), (0, 7))


def test_scales_of_scales():
    rng = np.random.default_rng(0)
    codes, table = rng.integers(0, 256, 50).astype(np.uint8), rng.random(256).astype(np.float32)
    outer = np.float32([1, 2, 3, 4])
    nested = Nested(info(codes), info(table), info(outer), 16, np.float32(0.25), "w")
    for columns in ((0, 50), (16, 32), (15, 33), (48, 50), (3, 4)):
        at = np.arange(*columns)
        expected = table[codes[at]] * outer[at // 16] + np.float32(0.25)
        found = nested.read((0, 1), columns)
        assert found.shape == (1, at.size) and np.array_equal(found[0], expected)
    bad = Nested(info(codes), info(table), info(np.float32([1, -2, 3, 4])), 16, np.float32(0.25), "w")
    bad.read((0, 1), (0, 16))
    with pytest.raises(DataError, match="negative"):
        bad.read((0, 1), (0, 50))
    huge = Nested(info(codes), info(np.full(256, 1e38, np.float32)), info(outer * 1e3), 16, np.float32(0), "w")
    with np.errstate(over="ignore"), pytest.raises(DataError, match="s are NaN or Inf"):
        huge.read((0, 1), (0, 50))
    lost = Nested(info(codes), info(np.full(256, np.nan, np.float32)), info(outer), 16, np.float32(0), "w")
    with pytest.raises(DataError, match="NaN"):
        lost.read((0, 1), (0, 50))


def test_groups_in_any_order():
    grid, order = Scales(info(GRID), 7, "w"), np.int32([6, 0, 0, 3, 5, 1])
    found = Ordered(grid, info(order), 7, 2).read((1, 4), (1, 6))
    assert np.array_equal(found, GRID[1:4][:, order[1:6]])
    none = Ordered(grid, info(np.full(14, -1, np.int32)), 7, 2)  # no order: groups of two, one behind another
    assert np.array_equal(none.read((0, 6), (3, 9)), GRID[:, [1, 2, 2, 3, 3, 4]])
    assert none.read((0, 2), (5, 5)).shape == (2, 0)
    for wrong, said in (([0, 7], "groups 0 to 7, of 7"), ([-1, 0], "groups -1 to 0"), ([-2, -2], "groups -2 to -2")):
        with pytest.raises(DataError, match=said):
            Ordered(grid, info(np.int32(wrong)), 7, 2).read((0, 1), (0, 2))
    assert np.array_equal(Ordered(grid, info(np.int32([1, 1])), 7, 2).read((0, 1), (0, 2)), GRID[:1, [1, 1]])
