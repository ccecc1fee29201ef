# SPDX-License-Identifier: Apache-2.0
"""The trim of a whole model against sorting all of its elements: one threshold, ties in the order of tensors."""

import numpy as np
import pytest

from darekit import masks
from darekit.checkpoints import ArrayBytes
from darekit.dtypes import DTYPES
from darekit.engine import trimming
from darekit.engine.selection import Select
from darekit.engine.stages import build
from darekit.engine.steps import TRIM_AT, TRIM_MODEL, Copy, Input, Merge, StageSpec
from darekit.engine.trimming import settle_model_trim
from darekit.errors import PlanError

DROP = StageSpec("dare", {"drop_rate": 0.5, "rescale": "none"}, 7)


def trim(keep):
    return StageSpec(TRIM_MODEL, {"keep": keep})


def entry(array):
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return Input(ArrayBytes(raw), DTYPES[{4: "F32", 8: "F64"}[array.itemsize]], array.size)


def step_of(name, models, chains, owners=None):
    """A base of zeros, so that a model is its delta."""
    count = models[0].size
    return Merge(
        name,
        DTYPES["F32"],
        (count,),
        0,
        count,
        0,
        0,
        entry(np.zeros_like(models[0])),
        tuple(map(entry, models)),
        tuple(range(len(models))) if owners is None else owners,
        (1.0,) * len(models),
        tuple(map(tuple, chains)),
        "ties",
        {"normalize": True},
    )


def tensors(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.choice(np.float32([-3, -2, -1, 0.5, 0.25, 0]), size) * rng.choice(np.float32([1, 1, 0.1]), size)
        for size in sizes
    ]


def survivors(arrays, keep):
    """Of all elements in order the largest, of equals the first; cut into tensors again."""
    flat = np.concatenate(arrays)
    kept = np.argsort(-np.abs(flat), kind="stable")[: max(1, int(keep * flat.size))]
    found = np.zeros_like(flat)
    found[kept] = flat[kept]
    return np.split(found, np.cumsum([one.size for one in arrays])[:-1])


def applied(step, at, array):
    """What a step's trim of one model leaves of its delta."""
    (spec,) = (spec for spec in step.chains[at] if spec.method == TRIM_AT)
    found = array.copy()
    stage = build(spec, step)
    stage.begin()
    stage.apply(found, 0)
    return found


def test_an_empty_tensor_takes_no_place():
    """Where equals are counted out in order, it is the next one's turn."""
    empty, full = np.zeros(0, np.float32), np.ones(10, np.float32)
    steps = [step_of(name, [array], [[trim(0.3)]]) for name, array in (("a", empty), ("b", full))]
    found = settle_model_trim(steps, threads=1, tile=64)
    assert applied(found[1], 0, full).tolist() == [1, 1, 1] + [0] * 7


def test_all_is_counted_where_one_model_is_too_small_for_samples(monkeypatch):
    monkeypatch.setattr(Select, "SAMPLE_FROM", 500)
    one, two, more = tensors((300, 300, 900), 2)
    steps = [step_of("a", [one, two], [[trim(0.3)], [trim(0.3)]]), step_of("b", [more], [[trim(0.3)]])]
    found = settle_model_trim(steps, threads=1, tile=8)
    assert applied(found[0], 1, two).tolist() == survivors([two], 0.3)[0].tolist()
    expected = survivors([one, more], 0.3)
    assert applied(found[0], 0, one).tolist() == expected[0].tolist()
    assert applied(found[1], 0, more).tolist() == expected[1].tolist()


@pytest.mark.parametrize("sample_from", [1 << 30, 500])
@pytest.mark.parametrize(("threads", "tile"), [(1, 65536), (2, 64)])
def test_one_threshold_for_all_tensors(sample_from, threads, tile, monkeypatch):
    monkeypatch.setattr(Select, "SAMPLE_FROM", sample_from)
    sizes = (700, 1, 300, 900)
    first, second = tensors(sizes), tensors(sizes, 1)
    for keep, other in ((0.3, 0.3), (0.5, 0.01), (1.0, 0.75), (0.0001, 0.2)):
        steps = [
            step_of(f"t{at}", [one, two], [[trim(keep)], [trim(other)]])
            for at, (one, two) in enumerate(zip(first, second, strict=True))
        ]
        found = settle_model_trim(steps, threads=threads, tile=tile)
        for k, (arrays, share) in enumerate(((first, keep), (second, other))):
            for step, array, expected in zip(found, arrays, survivors(arrays, share), strict=True):
                assert applied(step, k, array).tolist() == expected.tolist()
                assert [spec.method for spec in step.chains[k]] == [TRIM_AT]


def test_only_what_trims_is_concerned():
    """Other steps and models stay as they are; a tensor that a model lacks is none of its elements."""
    arrays = tensors((400, 300, 200))
    wide = step_of("wide", [np.ones(9)], [[]])
    copy = Copy("copied", DTYPES["F32"], (3,), 0, 3, 0, 0, entry(np.zeros(3, np.float32)), (), ())
    steps = [
        copy, step_of("a", [arrays[0], arrays[0]], [[], [trim(0.2)]], owners=(4, 2)), wide,
        step_of("b", [arrays[1]], [[trim(0.2)]], owners=(2,)), step_of("c", [arrays[2]], [[]], owners=(2,)),
    ]  # fmt: skip
    found = settle_model_trim(steps, threads=1, tile=65536)
    assert found[0] is copy and found[2] == wide and found[4] == steps[4] and len(found) == 5
    assert found[1].chains[0] == () and found[1].owners == (4, 2)
    expected = survivors(arrays[:2], 0.2)
    assert applied(found[1], 1, arrays[0]).tolist() == expected[0].tolist()
    assert applied(found[3], 0, arrays[1]).tolist() == expected[1].tolist()
    assert settle_model_trim([copy, wide], threads=1, tile=65536) == [copy, wide]


def test_what_the_sparsifier_dropped_is_not_counted():
    (array,) = tensors((1000,))
    for chain in ([DROP, trim(0.1)], [trim(0.1)]):
        (found,) = settle_model_trim([step_of("w", [array], [chain])], threads=1, tile=100)
        kept = masks.kept(7, masks.stream_of("w"), 0, 1000, 0.5) if len(chain) == 2 else np.ones(1000, bool)
        sparse = np.where(kept, array, 0)
        assert [spec.method for spec in found.chains[0]] == [*([DROP.method] * (len(chain) - 1)), TRIM_AT]
        assert applied(found, 0, sparse).tolist() == survivors([sparse], 0.1)[0].tolist()


def test_a_selection_before_the_trim_is_settled_first():
    (array,) = tensors((1000,))
    chain = [StageSpec("magnitude", {"drop_rate": 0.5, "rescale": "paper"}), trim(0.9)]
    (found,) = settle_model_trim([step_of("w", [array], [chain])], threads=1, tile=100)
    largest = np.zeros(1000, bool)
    largest[np.argsort(-np.abs(array), kind="stable")[:500]] = True
    sparse = np.where(largest, 2 * array, 0)
    assert applied(found, 0, sparse).tolist() == survivors([sparse], 0.9)[0].tolist()


def test_equals_that_a_selection_dropped_leave_their_place_to_others():
    """Of two tensors of ones half of each survives the selection: the trim's 80 are 50 of one and 30 of the other."""
    ones = np.ones(100, np.float32)
    half = StageSpec("magnitude", {"drop_rate": 0.5, "rescale": "none"})
    steps = [step_of(name, [ones], [[half, trim(0.4)]]) for name in "ab"]
    sparse = np.where(np.arange(100) < 50, ones, 0)
    found = settle_model_trim(steps, threads=1, tile=16)
    assert [np.count_nonzero(applied(step, 0, sparse)) for step in found] == [50, 30]


def test_float64_is_refused():
    steps = [step_of("a", [np.ones(3, np.float32)], [[trim(0.5)]]), step_of("b", [np.ones(3)], [[trim(0.5)]])]
    with pytest.raises(PlanError, match="trim: model computes in float32, but b is F64; use trim: tensor"):
        settle_model_trim(steps, threads=1, tile=64)


def test_a_sample_is_some_tiles_of_each_tensor(monkeypatch):
    """One in so many, from the first on; all of what is small, and of every pass but the samples."""
    seen = []

    class Seen(trimming.StepRun):
        def load(self, start, count):
            seen.append((start, count))
            return super().load(start, count)

    monkeypatch.setattr(trimming, "StepRun", Seen)
    monkeypatch.setattr(Select, "SAMPLE_FROM", 500)
    (array,) = tensors((6410,))
    settle_model_trim([step_of("w", [array], [[trim(0.5)]])], threads=1, tile=64)
    whole = [(start, min(64, 6410 - start)) for start in range(0, 6410, 64)]
    every = 4 * len(whole) // trimming.SAMPLED_PIECES
    passes = [
        seen[: len(whole[::every])],
        *(seen[at : at + len(whole)] for at in range(len(whole[::every]), len(seen), len(whole))),
    ]
    assert every == 25 and passes[0] == whole[::25] and len(passes) >= 3 and all(one == whole for one in passes[1:])
    seen.clear()
    monkeypatch.setattr(Select, "SAMPLE_FROM", 100)
    settle_model_trim([step_of("w", [array[:150]], [[trim(0.5)]])], threads=1, tile=64)
    assert seen[:3] == [(0, 64), (64, 64), (128, 22)]


def test_models_that_need_fewer_passes_wait_for_the_others(monkeypatch):
    """One model's threshold is known without a pass: nothing of it is dropped."""
    monkeypatch.setattr(Select, "SAMPLE_FROM", 500)
    one, two = tensors((2000, 2000))
    (found,) = settle_model_trim([step_of("w", [one, two], [[trim(1.0)], [trim(0.3)]])], threads=1, tile=64)
    assert applied(found, 0, one).tolist() == one.tolist()
    assert applied(found, 1, two).tolist() == survivors([two], 0.3)[0].tolist()


def test_values_that_are_no_numbers_have_no_say():
    """Where such elements are to be the base's, thresholds are those of the rest, in all models."""
    arrays = tensors((600, 600))
    spoilt, clean = arrays[0].copy(), [one.copy() for one in arrays]
    spoilt[5] = np.nan
    for one in clean:
        one[5] = 0
    step = step_of("w", [spoilt, arrays[1]], [[trim(0.3)], [trim(0.4)]])
    (found,) = settle_model_trim([step], threads=1, tile=64, allow_nonfinite=True)
    for k, keep in enumerate((0.3, 0.4)):
        assert applied(found, k, clean[k]).tolist() == survivors([clean[k]], keep)[0].tolist()
