# SPDX-License-Identifier: Apache-2.0
"""What rounding leaves of changes, by itself: sums of one block, pieces of blocks, records and their summary."""

import math
from itertools import pairwise

import numpy as np
import pytest

from darekit.engine.losses import Losses, losses_of, record_of, summary_of
from darekit.kernels.lanes import SAMPLED

BLOCK = 1024


def piece(count, seed=0, models=2):
    """base, base in the output's format (another one), change, stored, deltas; a third of each is 0 or swallowed."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=count).astype(np.float32)
    origin = base.astype(np.float16).astype(np.float32)
    deltas = np.where(rng.random((models, count)) < 0.3, 0, rng.normal(size=(models, count))).astype(np.float32)
    change = np.where(rng.random(count) < 0.3, 0, deltas.sum(axis=0)).astype(np.float32)
    stored = np.where(rng.random(count) < 0.4, origin, base + change).astype(np.float32)
    return base, origin, change, stored, deltas


def plainly(base, origin, change, stored, deltas):
    """(changed, swallowed), of each model the same, and the three sums in float64."""
    at = change != 0
    lost = at & (stored == origin)
    applied, asked = (stored - base)[at].astype(float), change[at].astype(float)
    error = (stored - base)[at] - change[at]
    return (
        [at.sum(), lost.sum()],
        [[(at & (d != 0)).sum(), (lost & (d != 0)).sum()] for d in deltas],
        [math.fsum(error.astype(float) ** 2), math.fsum(asked**2), math.fsum(applied * asked)],
    )


@pytest.mark.parametrize("count", [1, 31, 32, 33, 1000, BLOCK])
def test_one_block(count):
    given = piece(count, count)
    counts, touched, squares = plainly(*given)
    found = losses_of(*given)
    assert found.counts.tolist() == counts and found.touched.tolist() == touched
    np.testing.assert_allclose(found.squares, squares, rtol=1e-13, atol=1e-13)
    assert losses_of(*given[:4], np.empty((0, count), np.float32)).touched.shape == (0, 2)


def test_a_base_that_is_no_number_is_no_change_and_no_warning():
    inf = np.float32([np.inf, 1])
    found = losses_of(inf, inf, np.float32([0, 1]), np.float32([np.inf, 2]), np.float32([[0, 1]]))
    assert found.squares.tolist() == [0, 1, 1] and found.counts.tolist() == [1, 0]
    with np.errstate(invalid="raise"):
        losses_of(inf, inf, np.float32([0, 1]), inf, np.float32([[0, 1]]))


def sampled_in(start, count):
    """First and last element of each sampled block's part of a range."""
    return [
        (max(at, start), min(at + BLOCK, start + count))
        for at in range(0, start + count, SAMPLED * BLOCK)
        if max(at, start) < min(at + BLOCK, start + count)
    ]


RANGES = [
    (0, 1), (0, BLOCK), (0, BLOCK + 1), (1023, 1), (1024, 1000), (1024, 60 * BLOCK), (1024, 60 * BLOCK + 1),
    (SAMPLED * BLOCK, 5), (SAMPLED * BLOCK + 1023, 1), (SAMPLED * BLOCK + 1024, 70_000), (3, 200_000), (500, 100),
]  # fmt: skip


@pytest.mark.parametrize(("start", "count"), RANGES)
def test_which_elements_are_looked_at(start, count):
    seen = []
    zeros = np.zeros(BLOCK, np.float32)

    def piece_of(part):
        seen.append((start + part.start, start + part.stop))
        return (*(zeros[: part.stop - part.start],) * 4, np.zeros((1, part.stop - part.start), np.float32))

    found = Losses((0,))
    found.add_sample(start, count, piece_of)
    assert seen == sampled_in(start, count) and found.elements == sum(end - begin for begin, end in seen)
    if start % BLOCK == 0:
        whole = Losses((0,))
        blocks = len(sampled_in(start, count))
        whole.add_blocks(start, count, np.int64([3, 2]), np.int64([[1, 0]]), np.ones((blocks, 3)))
        assert whole.elements == found.elements and whole.counts.tolist() == [3, 2]
        assert whole.touched.tolist() == [[1, 0]]
        assert sorted(whole.blocks) == sorted(found.finish().blocks) and len(whole.blocks) == blocks


def test_blocks_that_come_in_pieces_are_the_same_and_are_kept_apart():
    """Cut anywhere, a block's sums are its own; what was counted before is added to."""
    count = SAMPLED * BLOCK + 700
    given = piece(count, 1)

    def sample(cuts):
        found = Losses((0, 1))
        for low, high in pairwise(cuts):
            found.add_sample(
                low,
                high - low,
                lambda part, low=low: tuple(one[..., low + part.start : low + part.stop] for one in given),
            )
        return found.finish()

    first, second = (tuple(one[..., at] for one in given) for at in (slice(0, BLOCK), slice(SAMPLED * BLOCK, None)))
    expected = [plainly(*one) for one in (first, second)]
    for cuts in ((0, count), (0, 7, 40, 1023, 1024, 1025, SAMPLED * BLOCK + 1, count), (0, 600, 62_000, count)):
        found = sample(cuts)
        assert found.elements == BLOCK + 700 and [*found.blocks] == [0, SAMPLED]
        assert found.counts.tolist() == np.add(expected[0][0], expected[1][0]).tolist()
        assert found.touched.tolist() == np.add(expected[0][1], expected[1][1]).tolist()
        for sums, (_, _, squares) in zip(found.blocks.values(), expected, strict=True):
            np.testing.assert_allclose(sums, squares, rtol=1e-13)
        for sums, one in zip(found.blocks.values(), (first, second), strict=True):
            assert sums.tobytes() == losses_of(*one).squares.tobytes()  # the same lanes, in the same order


def part(owners, elements, counts, touched, blocks):
    found = Losses(owners)
    found.elements, found.counts, found.touched = elements, np.int64(counts), np.int64(touched)
    found.blocks = {at: np.array(sums, float) for at, sums in blocks.items()}
    return found


def test_a_record_adds_up_parts():
    parts = [
        part((2, 0), 100, [9, 4], [[5, 1], [6, 2]], {0: [1e16, 2, 3], 61: [1, 20, 30]}),
        part((0, 1), 50, [3, 1], [[2, 1], [7, 7]], {122: [1, 200, -300]}),
        part((1,), 0, [0, 0], [[0, 0]], {}),
    ]
    assert record_of(parts, 5000) == {
        "elements": 5000, "sampled": 150, "changed": 12, "swallowed": 5,
        "models": {"0": [8, 3], "1": [7, 7], "2": [5, 1]},
        "squares": [1e16 + 2, 222, -267],
    }  # fmt: skip
    assert [*record_of(parts, 5000)["models"]] == ["0", "1", "2"]
    assert record_of(parts[2:], 5000) == {}


def test_a_summary_of_changes_that_have_no_size():
    """Subnormal changes whose squares are 0: nothing is divided by."""
    one = {"elements": 10, "sampled": 5, "changed": 3, "swallowed": 1, "models": {"0": [3, 1]}, "squares": [0.0] * 3}
    kept = {**one, "sampled": 10, "swallowed": 0, "models": {"1": [2, 2]}}
    found = summary_of([{"rounding": one}, {"rounding": kept}, {"rounding": None}], ["a", "b"])
    assert found == {"share": 2 / 9, "models": {"a": 1 / 3, "b": 1.0}, "error": 0.0, "scale": 1.0, "sampled": 15}
    assert summary_of([{"rounding": {**one, "changed": 0}}], ["a"]) is None
    larger = {**one, "squares": [2.0, 8.0, 4.0], "models": {"1": [3, 1]}}
    found = summary_of([{"rounding": larger}], ["a", "b"])
    assert found["models"] == {"a": None, "b": 1 / 3} and (found["error"], found["scale"]) == (0.5, 0.5)
