# SPDX-License-Identifier: Apache-2.0
"""What rounding leaves of the changes: counts and sums against plain numpy, whatever tiles and threads, and words."""

import json
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import darekit as dk
import families
from darekit.engine import execution
from darekit.engine.losses import Losses, losses_of, summary_of
from darekit.kernels import rounding
from darekit.kernels.lanes import SAMPLED, SUM_LANES
from darekit.memory import _ArraySink, _checkpoint
from darekit.planning.losses import rounding_lines, sample_rounding, swallowed_notes
from darekit.planning.plan import make_plan

BLOCK = 1024
TUNED = {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.315}}


def like_a_fine_tune(count, models=2, seed=0):
    """A BF16 base, and models of which every second element is one step away."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.02, count).astype(ml_dtypes.bfloat16)
    tuned = []
    for _ in range(models):
        bits = base.view(np.uint16) + (rng.random(count) < 0.5).astype(np.uint16)
        tuned.append(bits.view(ml_dtypes.bfloat16))
    return base, tuned


def records_of(recipe, base, models, *, tile=65536, threads=1):
    """The engine's records of one tensor, and what it wrote."""
    opened = [_checkpoint(str(k), {"w": array}) for k, array in enumerate((base, *models))]
    plan = make_plan(dk.read_recipe(recipe), opened[0], opened[1:], shard_size=1)
    (shard,) = plan.shards
    (place,) = shard.placements
    out = np.empty(base.size * plan.steps[0].dtype.itemsize, np.uint8)
    done = execution.run(plan.steps, [_ArraySink(out, place.offset)], names=["a", "b", "c"], tile=tile, threads=threads)
    return done.records["w"]["rounding"], out.view(plan.steps[0].dtype.numpy)


def recipe_of(models, **more):
    return {"base_model": "0", "models": [str(k + 1) for k in range(models)]} | TUNED | more


def looked_at(count):
    """The elements of sampled blocks."""
    return np.flatnonzero((np.arange(count) // BLOCK) % SAMPLED == 0)


@pytest.mark.parametrize("count", [1, 700, 1024, 5000, 65_537, 700_001])
@pytest.mark.parametrize("how", ["nearest", "stochastic"])
def test_counts_are_those_of_plain_numpy(count, how):
    base, models = like_a_fine_tune(count)
    record, out = records_of(recipe_of(2, rounding=how), base, models)
    origin, stored = base.astype(np.float32), out.astype(np.float32)
    deltas = [model.astype(np.float32) - origin for model in models]
    change = np.float32(0.315) * (np.float32(0) + deltas[0] + deltas[1])
    at = looked_at(count)
    changed, lost = change[at] != 0, (stored == origin)[at]
    assert (record["elements"], record["sampled"]) == (count, at.size)
    assert (record["changed"], record["swallowed"]) == (changed.sum(), (changed & lost).sum())
    for k, delta in enumerate(deltas):
        own = changed & (delta[at] != 0)
        assert record["models"][str(k)] == [own.sum(), (own & lost).sum()]
    applied, asked = (stored - origin)[at][changed].astype(float), change[at][changed].astype(float)
    expected = [((applied - asked) ** 2).sum(), (asked**2).sum(), (applied * asked).sum()]
    assert record["squares"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("recipe", [
    {}, {"rounding": "stochastic"}, {"merge_method": "ties", "parameters": {"keep": 0.4, "lambda": 0.3}},
    {"sparsify": {"method": "dare", "drop_rate": 0.7}}, {"sparsify": {"method": "magnitude", "drop_rate": 0.7}},
    {"sparsify": {"method": "della", "drop_rate": 0.7}},
    {"sparsify": {"method": "dare", "drop_rate": 0.7, "rescale": "l1"}},
    {"merge_method": "linear", "parameters": {"normalize": False}}, {"dtype": "float16"},
    {"merge_method": "model_stock", "parameters": {"filter_wise": True}},
], ids=str)  # fmt: skip
def test_tiles_threads_and_lanes_change_nothing(recipe):
    rows, columns = 600, 701
    base, models = like_a_fine_tune(rows * columns)
    base, models = base.reshape(rows, columns), [model.reshape(rows, columns) for model in models]
    found = {
        json.dumps(records_of(recipe_of(2, **recipe), base, models, tile=tile, threads=threads)[0])
        for tile, threads in ((65536, 1), (65536, 3), (1000, 1), (4096, 2))
    }
    assert len(found) == 1
    record = json.loads(found.pop())
    assert 0 < record["changed"] <= record["sampled"] == looked_at(rows * columns).size


@given(st.data())
def test_the_twin_is_the_definition_however_it_is_cut(data):
    count = data.draw(st.sampled_from([1, 31, 32, 33, 1000, 1024]))
    small = st.floats(-1, 1, width=32)
    values = [data.draw(arrays.arrays(np.float32, count, elements=small, fill=st.just(0.0))) for _ in range(5)]
    base, change, stored, *deltas = values
    change[data.draw(arrays.arrays(bool, count))] = 0
    stored = np.where(data.draw(arrays.arrays(bool, count)), base, stored)
    expected = losses_of(base, base, change, stored, np.array(deltas))
    cuts = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=4))})
    counts, touched = np.zeros(2, np.int64), np.zeros((2, 2), np.int64)
    lanes, flags, sums = np.zeros((3, SUM_LANES)), np.empty(BLOCK, np.uint32), np.empty(3)
    for low, high in pairwise(cuts):
        piece = slice(low, high)
        own = np.ascontiguousarray(np.array(deltas)[:, piece])
        rounding.add_losses(
            base[piece], base[piece], change[piece], stored[piece], own, low, counts, touched, lanes, flags
        )
    rounding.end_block(lanes, sums)
    assert counts.tolist() == expected.counts.tolist() and touched.tolist() == expected.touched.tolist()
    assert sums.tobytes() == expected.squares.tobytes() and not lanes.any()


def test_another_format_than_the_bases():
    """What is stored as the base would be stored: a delta of F32 models that BF16 does not hold is swallowed."""
    rng = np.random.default_rng(2)
    base = rng.normal(0, 0.02, 900).astype(np.float32)
    model = base + np.float32(1e-7)
    record, out = records_of(recipe_of(1, dtype="bfloat16"), base, [model])
    rounded = base.astype(ml_dtypes.bfloat16)
    assert record["changed"] == np.count_nonzero(model != base) > 850
    assert record["swallowed"] == np.count_nonzero((out == rounded) & (model != base)) > 800


def test_nan_of_the_base_is_no_change():
    base, models = like_a_fine_tune(3000)
    base[5] = np.nan
    found = dk.merge_tensors({"w": base}, [{"w": m} for m in models], allow_nonfinite=True, method="task_arithmetic")
    assert np.isnan(found["w"][5].astype(np.float32))
    part = losses_of(np.float32([np.nan]), np.float32([np.nan]), np.float32([0]), np.float32([np.nan]),
                     np.float32([[0]]))  # fmt: skip
    assert part.squares.tolist() == [0, 0, 0] and part.counts.tolist() == [0, 0]


def test_each_sample_stands_for_its_tensor():
    large = {"elements": 61_000, "sampled": 1000, "changed": 500, "swallowed": 400, "models": {"0": [500, 400]},
             "squares": [1.0, 4.0, 2.0]}  # fmt: skip
    small = {"elements": 100, "sampled": 100, "changed": 100, "swallowed": 0, "models": {"1": [100, 0]},
             "squares": [0.0, 1.0, 1.0]}  # fmt: skip
    found = summary_of([{"rounding": large}, {"rounding": small}, {}], ["a", "b", "c"])
    assert found["share"] == pytest.approx(61 * 400 / (61 * 500 + 100))
    assert found["models"] == {"a": 0.8, "b": 0.0, "c": None}
    assert found["error"] == pytest.approx(np.sqrt(61 / (61 * 4 + 1)))
    assert found["scale"] == pytest.approx((61 * 2 + 1) / (61 * 4 + 1))
    assert summary_of([{}], ["a"]) is None and Losses(()).elements == 0


# --- as users see it


@pytest.fixture
def tuned(tmp_path):
    """A base and two models on disk whose deltas are one step of BF16 in half of the elements."""
    rng = np.random.default_rng(0)
    base = families.llama(rng)
    families.save(tmp_path / "base", base, families.config())
    for k in range(2):
        moved = {
            name: (array.view(np.uint16) + (rng.random(array.shape) < 0.5).astype(np.uint16)).view(array.dtype)
            for name, array in base.items()
        }
        families.save(tmp_path / f"m{k}", moved, families.config())
    return tmp_path


def recipe_at(path, **more):
    return {"base_model": str(path / "base"), "models": [str(path / f"m{k}") for k in range(2)]} | TUNED | more


def test_a_merge_that_rounds_away_says_so(tuned):
    report = dk.merge(recipe_at(tuned), tuned / "out")
    (warning,) = [note for note in report.notes if "rounding to bfloat16 undoes" in note]
    assert "dtype: float32" in warning and "rounding: stochastic" in warning and "DARE" in warning
    assert report.rounding["share"] > 0.5 and set(report.rounding["models"]) == {str(tuned / f"m{k}") for k in range(2)}
    lock = json.loads((tuned / "out" / "darekit.lock.json").read_text())
    assert lock["rounding"] == report.rounding and lock["rounding"]["method"] == "nearest"
    assert "too small for bfloat16" in (tuned / "out" / "README.md").read_text()
    assert str(tuned) not in (tuned / "out" / "README.md").read_text()


def test_the_ways_out(tuned):
    wide = dk.merge(recipe_at(tuned, dtype="float32"), tuned / "wide")
    mean = dk.merge(recipe_at(tuned, rounding="stochastic"), tuned / "mean")
    assert wide.rounding["share"] < 0.001 and wide.rounding["scale"] == pytest.approx(1, abs=1e-4)
    assert mean.rounding["scale"] == pytest.approx(1, abs=0.1)
    assert not [note for report in (wide, mean) for note in report.notes if "undoes" in note]
    lock = json.loads((tuned / "mean" / "darekit.lock.json").read_text())
    assert lock["rounding"]["effective_seed"] == dk.plan(recipe_at(tuned, rounding="stochastic")).rounding
    assert "stochastic" in (tuned / "mean" / "README.md").read_text()


def test_the_dry_run_foretells_it(tuned, dare):
    (tuned / "recipe.yaml").write_text(json.dumps(recipe_at(tuned)))
    told = dare("merge", tuned / "recipe.yaml", tuned / "out", "--dry-run")
    assert told.code == 0 and "undoes" in told.out and "in a sample" in told.out and not (tuned / "out").exists()
    foretold = dare("merge", tuned / "recipe.yaml", tuned / "out", "--dry-run", "--json").data["rounding"]
    done = dare("merge", tuned / "recipe.yaml", tuned / "out", "--json").data["rounding"]
    assert foretold["share"] == pytest.approx(done["share"], abs=0.02)
    shown = dare("merge", tuned / "recipe.yaml", tuned / "again", "--set", "rounding=stochastic")
    assert "none is lost on average" in " ".join(shown.out.split()) and "undoes" not in shown.err


@pytest.mark.parametrize("recipe", [
    {"sparsify": {"method": "magnitude", "drop_rate": 0.9}}, {"sparsify": {"method": "della", "drop_rate": 0.9}},
    {"merge_method": "ties", "parameters": {"keep": 0.2, "trim": "model"}},
    {"merge_method": "ties", "parameters": {"keep": 0.2}, "sparsify": {"method": "dare", "drop_rate": 0.5}},
    {"merge_method": "sce", "parameters": {}}, {"merge_method": "model_stock", "parameters": {}},
    {"merge_method": "linear", "parameters": {"normalize": False}}, {"merge_method": "karcher", "parameters": {}},
], ids=str)  # fmt: skip
def test_a_sample_of_every_kind_of_step(tuned, recipe):
    with dk.plan(recipe_at(tuned, **recipe)) as plan:
        found = sample_rounding(plan)
    done = dk.merge(recipe_at(tuned, **recipe), tuned / "out").rounding
    assert found["share"] == pytest.approx(done["share"], abs=0.1)


def test_nothing_is_said_where_there_is_nothing(tuned, dare):
    report = dk.merge({"models": [str(tuned / "m0"), str(tuned / "m1")], "merge_method": "linear"}, tuned / "out")
    assert report.rounding is None and "rounding" not in json.loads((tuned / "out" / "darekit.lock.json").read_text())
    alone = dk.merge(recipe_at(tuned, models=[str(tuned / "m0")], parameters={}), tuned / "alone")
    assert alone.rounding is None  # its own bytes
    with dk.plan({"models": [str(tuned / "m0"), str(tuned / "m1")], "merge_method": "linear"}) as plan:
        assert sample_rounding(plan) is None
    assert [*rounding_lines(None)] == [*swallowed_notes(None)] == []


def test_drop_takes_it(tuned, dare):
    arguments = ("drop", tuned / "base", tuned / "m0")
    one = dare(*arguments, tuned / "one", "-p", "0.5", "--seed", "7", "--rounding", "stochastic", "--json")
    assert one.code == 0 and one.data["rounding"]["method"] == "stochastic"
    dk.drop(tuned / "base", tuned / "m0", tuned / "two", drop_rate=0.5, seed=7, rounding="stochastic")
    other = dk.drop(tuned / "base", tuned / "m0", tuned / "three", drop_rate=0.5, seed=8, rounding="stochastic")
    assert families.load(tuned / "one").keys() == families.load(tuned / "two").keys()
    assert all(
        array.tobytes() == families.load(tuned / "two")[name].tobytes()
        for name, array in families.load(tuned / "one").items()
    )
    assert other.rounding["effective_seed"] != one.data["rounding"]["effective_seed"]
    refused = dare(*arguments, tuned / "four", "-p", "0.5", "--rounding", "up")
    assert refused.code == 2 and "stochastic" in refused.err


def test_what_was_counted_survives_a_resume(tuned, monkeypatch):
    recipe = recipe_at(tuned)
    whole = dk.merge(recipe, tuned / "whole").rounding
    from darekit.output.staging import Stage

    real, seen = Stage.record, []

    def record(self, name, record):
        real(self, name, record)
        seen.append(name)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "record", record)
        with pytest.raises(KeyboardInterrupt):
            dk.merge(recipe, tuned / "out", threads=1)
    assert dk.merge(recipe, tuned / "out", resume=True).rounding == whole


def test_oracle_and_engine_agree_on_the_share():
    """DARE's survivors are larger: of the same deltas fewer of their changes are undone."""
    base, models = like_a_fine_tune(400_000, 1)
    shares = {}
    for p in (0.0, 0.5, 0.9):
        more = {"sparsify": {"method": "dare", "drop_rate": p}} if p else {}
        record, _ = records_of(recipe_of(1, **more), base, models)
        shares[p] = record["swallowed"] / record["changed"]
    assert shares[0.0] > 0.9 and shares[0.9] < 0.05 < shares[0.0]


def test_steps_as_large_as_the_changes_are_told(tmp_path):
    """DARE at 0.5 loses nothing, but what was half a step and more became a whole one: another lambda, in effect."""
    base, (model,) = like_a_fine_tune(96 * 32, 1)
    for name, array in (("base", base), ("m0", model)):
        families.save(tmp_path / name, {"model.embed_tokens.weight": array.reshape(96, 32)}, families.config())
    report = dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "out", drop_rate=0.0)
    assert not report.notes or not any("rounding" in note for note in report.notes)
    recipe = {"base_model": str(tmp_path / "base"), "models": [str(tmp_path / "m0")], **TUNED}
    report = dk.merge(recipe | {"parameters": {"lambda": 0.66}}, tmp_path / "larger")
    assert report.rounding["share"] < 0.2 and report.rounding["scale"] > 1.2
    assert any("about as large as the steps" in note for note in report.notes)
