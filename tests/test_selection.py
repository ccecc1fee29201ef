# SPDX-License-Identifier: Apache-2.0
"""The k largest by counting, against sorting: ties across tiles, both boundaries, samples that mislead."""

import ml_dtypes
import numpy as np
import pytest

from darekit.engine.selection import Census, Select, ShareOf

KINDS = ("normal", "few", "equal", "zeros", "falling")


def values(kind, count):
    """(count,) float32; `few`: of four magnitudes; `falling`: the head of it is unlike the rest."""
    rng = np.random.default_rng(count)
    match kind:
        case "normal":
            return rng.normal(size=count).astype(np.float32)
        case "few":
            return rng.choice(np.float32([-2, -1, -0.5, 0, 0.5, 1, 2]), count)
        case "equal":
            return rng.choice(np.float32([-1, 1]), count)
        case "zeros":
            return np.where(rng.random(count) < 0.9, 0, rng.normal(size=count)).astype(np.float32)
        case "falling":
            return (rng.normal(size=count) * np.geomspace(1, 1e-6, count)).astype(np.float32)


def largest(array, top, keep):
    """What survives, by sorting: of equals at either boundary those with the lower indices."""
    falling = np.argsort(-np.abs(array[::-1]), kind="stable")
    rest = np.sort(array.size - 1 - falling[top:])  # without the `top` largest, of equals those with higher indices
    kept = rest[np.argsort(-np.abs(array[rest]), kind="stable")[:keep]]
    found = np.zeros_like(array)
    found[kept] = array[kept]
    return found


def selected(select, array, tile):
    """The same by passes over tiles -> survivors, how many are said to survive, and passes."""
    starts, passes = range(0, array.size, tile), 0
    while not select.ready:
        select.begin()
        for start in starts[:: max(1, len(starts) // 4)] if select.sampling else starts:
            select.measure(array[start : start + tile].copy(), start)
        select.settle()
        passes += 1
        assert passes < 8
    select.begin()
    found = array.copy()
    return found, sum(select.apply(found[start : start + tile], start) for start in starts), passes


@pytest.mark.parametrize("sample_from", [1 << 30, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_selection_is_sorting(kind, sample_from, monkeypatch):
    monkeypatch.setattr(Select, "SAMPLE_FROM", sample_from)
    for count in (1, 2, 63, 1025, 5000):
        array = values(kind, count)
        for top, keep in ((0, 0), (0, 1), (0, count), (count // 3, count // 3), (1, count - 1), (count // 2, 1)):
            expected = largest(array, top, keep)
            for tile in (97, count):
                found, kept, _ = selected(Select(count, top, min(keep, count - top)), array, tile)
                assert (found == expected).all(), (count, top, keep, tile)
                assert kept == min(keep, count - top)


def test_neighbours_of_a_class_of_equals_are_not_in_it():
    """Both boundaries lie in one class, and the number just above it is dropped with the largest."""
    one = np.float32(1)
    array = np.array([one, np.nextafter(one, np.float32(2)), one, one, np.nextafter(one, np.float32(0)), one])
    for top, keep in ((3, 2), (2, 3), (1, 2), (2, 1)):
        found, kept, _ = selected(Select(6, top, keep), array, 4)
        assert (found == largest(array, top, keep)).all() and kept == keep


@pytest.mark.parametrize("sample_from", [1 << 30, 1000])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_what_is_not_0(kind, share, sample_from, monkeypatch):
    monkeypatch.setattr(ShareOf, "SAMPLE_FROM", sample_from)
    for count in (1, 65, 5000):
        array = values(kind, count)
        keep = int(np.count_nonzero(array) * share)
        for tile in (97, count):
            found, kept, _ = selected(ShareOf(count, lambda many: int(many * share)), array, tile)
            assert (found == largest(array, 0, keep)).all() and kept == keep
    nothing = ShareOf(0, lambda many: many)
    assert nothing.ready


def test_a_good_guess_saves_a_pass_and_a_bad_one_costs_one(monkeypatch):
    monkeypatch.setattr(Select, "SAMPLE_FROM", 1000)
    even, falling = values("normal", 40_000), values("falling", 40_000)
    assert selected(Select(even.size, 0, 4000), even, 500)[2] == 2
    assert selected(Select(falling.size, 0, 4000), falling, 500)[2] >= 2
    first = np.concatenate([np.full(20_000, 3, np.float32), values("normal", 20_000)])
    found, _, passes = selected(Select(first.size, 0, 30_000), first, 20_000)
    assert (found == largest(first, 0, 30_000)).all() and passes >= 2


def test_the_boundary_is_known_even_where_all_survive():
    array = values("normal", 500)
    select = Select(500, 0, 500, boundary=True)
    assert not select.ready
    found, kept, _ = selected(select, array, 100)
    assert kept == 500 and (found == array).all()
    assert np.uint32(select.low).view(np.float32) == np.abs(array).min()


def test_a_threshold_that_is_known_needs_no_pass():
    array = np.float32([3, 1, -1, 0.5, 1, 2])
    select = Select.at(6, int(np.float32(1).view(np.uint32)), 2)  # of the three elements of size 1, two
    assert select.ready and selected(select, array, 2)[0].tolist() == [3, 1, -1, 0, 0, 2]


def test_raw_bf16_is_counted_as_its_difference_is(monkeypatch):
    rng = np.random.default_rng(5)
    base, model = (rng.normal(size=3000).astype(ml_dtypes.bfloat16) for _ in range(2))
    delta = model.astype(np.float32) - base.astype(np.float32)
    raws = base.view(np.uint8), model.view(np.uint16)
    for sample_from in (1 << 30, 1000):
        monkeypatch.setattr(Select, "SAMPLE_FROM", sample_from)
        fast, slow = Select(3000, 10, 300), Select(3000, 10, 300)
        while not slow.ready:
            for one in (fast, slow):
                one.begin()
            assert fast.measure_bf16(*raws)
            slow.measure(delta.copy(), 0)
            for one in (fast, slow):
                one.settle()
            assert fast.ready == slow.ready and fast.windows == slow.windows
        assert (fast.low, fast.low_left, fast.high, fast.high_left) == (
            slow.low, slow.low_left, slow.high, slow.high_left,
        )  # fmt: skip
    model[7] = np.nan
    for window in (None, (0x3F80 << 16, 1 << 16)):
        assert not Census(window, 3000).count_bf16(*raws, np.empty(3000, np.float32))
    # None above the window, and none in it, is no fault.
    model[7] = 0
    assert Census((0x7F00 << 16, 1 << 16), 3000).count_bf16(*raws, np.empty(1024, np.float32))


def test_censuses_of_parts_add_up():
    array = values("few", 2000)
    for window in (None, (int(np.float32(0.5).view(np.uint32)), 1 << 16)):
        whole, parts = Census(window, 2000), [Census(window, 2000) for _ in range(2)]
        whole.count(array.copy())
        parts[0].count(array[:700].copy())
        parts[1].count(array[700:].copy())
        parts[0].add(parts[1])
        assert parts[0].above == whole.above and (parts[0].counts == whole.counts).all()
        for rank in (1, 500, 1000, 2000):
            assert parts[0].at_rank(rank) == whole.at_rank(rank)
    exact = Census((int(np.float32(0.5).view(np.uint32)), 1 << 16), 2000)
    exact.count(array.copy())
    sizes = np.abs(array)
    above, here = int((sizes > 0.5).sum()), int((sizes == 0.5).sum())
    half = int(np.float32(0.5).view(np.uint32))
    assert exact.at_rank(above) is None and exact.at_rank(above + here + 1) is None
    assert exact.at_rank(above + 1) == (half, here, 1) and exact.at_rank(above + here) == (half, here, here)


def test_ranks_in_a_window_are_those_of_sorting():
    array = np.abs(values("normal", 3000))
    patterns = np.sort(array.view(np.uint32))[::-1].astype(np.int64)
    for first, width in ((0x3F00 << 16, 0x40 << 16), (0x3F80 << 16, 0x20 << 16)):  # 0.5 to 0.75, and 1 to 1.25
        census = Census((first, width), 3000)
        census.count(array.copy())
        inside = patterns[(patterns >= first) & (patterns < first + width)]
        above = int((patterns >= first + width).sum())
        assert inside.size > 100 and census.above == above
        assert census.at_rank(above) is None and census.at_rank(above + inside.size + 1) is None
        for at in (0, 1, inside.size // 2, inside.size - 2, inside.size - 1):
            place, here, within = census.at_rank(above + at + 1)
            assert place == inside[at] and here == (inside == inside[at]).sum()
            assert within == at - int((inside > inside[at]).sum()) + 1
