# SPDX-License-Identifier: Apache-2.0
"""Stages, tile by tile, against the functions that define them; and how much of a tensor each must see at once."""

import ml_dtypes
import numpy as np
import pytest

from darekit import masks
from darekit.checkpoints import ArrayBytes, Places
from darekit.dtypes import DTYPES
from darekit.engine import stages
from darekit.engine.selection import Select
from darekit.engine.stages import build, scope_of, tile_of
from darekit.engine.steps import TRIM, TRIM_AT, TRIM_MODEL, Copy, Input, Merge, StageSpec
from darekit.methods import MERGE_METHODS, SPARSIFIERS, MergeMethod, Sparsifier
from darekit.methods.sparsifiers import largest

ROWS, ROW = 9, 130
COUNT = ROWS * ROW
SEED, NAME = 7, "layer.weight"
NOWHERE = Places(np.array([4, 5, -1, 0, 8, 8, 1, 2, 3]), stored=9, inner=ROW)


def step_of(chain=(), dtype="F32", shape=(ROWS, ROW), method="linear", **more):
    count = int(np.prod(shape))
    one = Input(ArrayBytes(np.zeros(0, np.uint8)), DTYPES[dtype], count)
    return Merge(NAME, DTYPES[dtype], shape, 0, count, 0, 0, one, (one,), (0,), (1.0,), (tuple(chain),), method, **more)


def deltas(dtype="float32"):
    rng = np.random.default_rng(3)
    found = rng.normal(size=(ROWS, ROW)).astype(dtype)
    found[1], found[2, ::2] = 0, 0.5
    return found


def drawn(places=None, name=NAME):
    """The draw of each element, by its place in the mask."""
    whole = masks.draws(SEED, masks.stream_of(name), 0, 2 * COUNT)
    if places is None:
        return whole[:COUNT].reshape(ROWS, ROW)
    inside = [masks.draws(SEED, masks.stream_of(name), max(0, row) * ROW, ROW) for row in places.rows]
    # What is stored nowhere has places behind all that is, as if the view's rows were appended.
    behind = [masks.draws(SEED, masks.stream_of(name), COUNT + at * ROW, ROW) for at in range(ROWS)]
    return np.stack([one if row >= 0 else other for row, one, other in zip(places.rows, inside, behind, strict=True)])


def staged(spec, step, array, tile, at=None):
    """A stage over tiles -> what is left, how many elements it says survive."""
    stage, starts, passes = build(spec, step), range(0, array.size, tile), 0
    while not stage.ready:
        stage.begin()
        for start in starts[::3] if stage.sampling else starts:
            stage.measure(array.reshape(-1)[start : start + tile].copy(), start)
        stage.settle()
        passes += 1
        assert passes < 8
    stage.begin()
    found = array.reshape(-1).copy()
    kept = sum(stage.apply(found[start : start + tile], start) for start in starts)
    return found.reshape(array.shape), kept


SPECS = [
    ("dare", {"drop_rate": 0.3, "rescale": "paper", "q": 0.0}),
    ("dare", {"drop_rate": 0.3, "rescale": "none", "q": 0.0}),
    ("dare", {"drop_rate": 0.3, "rescale": "l1", "q": 0.0}),
    ("dare", {"drop_rate": 0.3, "rescale": "none", "q": 0.4}),
    ("dare", {"drop_rate": 1.0, "rescale": "paper", "q": 0.0}),
    ("drop_only", {"drop_rate": 0.6}),
    ("dare", {"drop_rate": 1.0, "rescale": "l1", "q": 0.0}),
    *(("magnitude", {"drop_rate": 0.7, "rescale": rescale}) for rescale in ("none", "paper", "l1")),
    *(("breadcrumbs", {"drop_rate": 0.7, "gamma": 0.1, "rescale": rescale}) for rescale in ("none", "paper", "l1")),
    *(("della", {"drop_rate": 0.4, "window": 0.6, "rescale": rescale}) for rescale in ("none", "paper", "l1")),
    ("della", {"drop_rate": 0.5, "window": 1.0, "rescale": "paper"}),
]


def prepared(method, parameters, count=COUNT):
    prepare = SPARSIFIERS[method].prepare
    return prepare(parameters, count, NAME) if prepare else parameters


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("sample_from", [1 << 30, 500])
@pytest.mark.parametrize(("method", "parameters"), SPECS, ids=str)
def test_a_stage_is_its_function(method, parameters, sample_from, dtype, monkeypatch):
    monkeypatch.setattr(Select, "SAMPLE_FROM", sample_from)
    array = deltas(DTYPES[dtype].numpy)
    expected = SPARSIFIERS[method].function(array, drawn(), **parameters)
    spec = StageSpec(method, prepared(method, parameters), SEED)
    step = step_of([spec], dtype)
    for wanted in (ROW, 300, COUNT):
        found, kept = staged(spec, step, array, tile_of(step, wanted))
        assert found.tobytes() == (expected + 0).tobytes() and found.dtype == array.dtype
        random = SPARSIFIERS[method].kernel in ("drop", "rank")  # these count places, of which some hold a 0
        assert (
            kept == np.count_nonzero(expected) if not random or dtype == "F64" else kept >= np.count_nonzero(expected)
        )


def test_random_drops_count_all_places_that_stay():
    zeros = np.zeros((ROWS, ROW), np.float32)
    for method, parameters in (
        ("drop_only", {"drop_rate": 0.6}),
        ("della", {"drop_rate": 0.5, "window": 0.0, "rescale": "none"}),
    ):
        spec = StageSpec(method, parameters, SEED)
        expected = np.count_nonzero(drawn() >= masks.threshold_of(parameters["drop_rate"]))
        assert staged(spec, step_of([spec]), zeros, ROW)[1] == expected
    spec = StageSpec("dare", {"drop_rate": 1.0, "rescale": "paper"}, SEED)
    assert staged(spec, step_of([spec]), deltas(), ROW)[1] == 0


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("stream", ["", "another.weight"])
@pytest.mark.parametrize("method", ["dare", "della"])
def test_masks_follow_the_stored_element(method, stream, dtype):
    parameters = {"drop_rate": 0.4, "rescale": "paper"} | ({"window": 0.2} if method == "della" else {})
    array = deltas(DTYPES[dtype].numpy)
    for places in (None, NOWHERE):
        spec = StageSpec(method, parameters, SEED, stream, places)
        expected = SPARSIFIERS[method].function(array, drawn(places, stream or NAME), **parameters)
        for tile in (ROW, 4 * ROW, COUNT):
            assert staged(spec, step_of([spec], dtype), array, tile)[0].tobytes() == (expected + 0).tobytes()


@pytest.mark.parametrize("row", [1, 2, 3])
def test_short_rows(row):
    spec = StageSpec("della", {"drop_rate": 0.4, "window": 0.6, "rescale": "paper"}, SEED)
    array, count = deltas().reshape(-1)[: 999 // row * row].reshape(-1, row), 999 // row * row
    drawn_here = drawn().reshape(-1)[:count].reshape(-1, row)
    expected = SPARSIFIERS["della"].function(array, drawn_here, **spec.parameters)
    found = staged(spec, step_of([spec], shape=array.shape), array, 60)[0]
    assert found.tobytes() == (expected + 0).tobytes()


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("method", ["dare", "della"])
def test_a_draw_that_is_the_threshold_stays(method, dtype):
    draws = drawn().reshape(-1)
    for at in (0, 500, COUNT - 1):
        rate = int(draws[at]) / 2**32  # exact, and so is 1 minus it
        parameters = {"drop_rate": rate, "rescale": "none"} | ({"window": 0.0} if method == "della" else {})
        spec = StageSpec(method, parameters, SEED)
        ones = np.ones((ROWS, ROW), DTYPES[dtype].numpy)
        found = staged(spec, step_of([spec], dtype), ones, ROW)[0].reshape(-1)
        assert found[at] == 1 and ((found != 0) == (draws >= draws[at])).all()


def test_bf16_is_dropped_while_it_is_read():
    rng = np.random.default_rng(4)
    base, model = (rng.normal(size=COUNT).astype(ml_dtypes.bfloat16) for _ in range(2))
    wide = base.astype(np.float32)
    raw, bf16 = model.view(np.uint8), DTYPES["BF16"]
    parameters = {"drop_rate": 0.3, "rescale": "paper"}

    def taken(rate=0.3, places=None, dtype=bf16, start=0, raw=raw):
        stage = build(StageSpec("dare", parameters | {"drop_rate": rate}, SEED, places=places), step_of(dtype="BF16"))
        delta = np.empty(COUNT, np.float32)
        return stage.take(raw, dtype, wide, delta, start), delta

    (bad, kept), delta = taken()
    expected = SPARSIFIERS["dare"].function((model.astype(np.float32) - wide).reshape(ROWS, ROW), drawn(), **parameters)
    assert bad == 0 and kept == np.count_nonzero(drawn() >= masks.threshold_of(0.3))
    assert delta.tobytes() == (expected + 0).tobytes()
    draws = masks.draws(SEED, masks.stream_of(NAME), 77, COUNT)
    (_, kept), delta = taken(start=77)
    assert (
        kept == np.count_nonzero(draws >= masks.threshold_of(0.3)) and not delta[draws < masks.threshold_of(0.3)].any()
    )
    assert taken(rate=1.0)[0] is None and taken(dtype=DTYPES["F16"])[0] is None
    assert taken(places=NOWHERE)[0] is None
    assert taken(places=Places(np.arange(ROWS), ROWS, inner=ROW))[0] == taken()[0]
    spoilt = model.copy()
    spoilt[[3, 500]] = np.nan
    assert taken(raw=spoilt.view(np.uint8))[0][0] == 2


# --- the trim


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_the_trim_keeps_the_largest(dtype):
    array = deltas(DTYPES[dtype].numpy)
    expected = np.where(largest(np.abs(array.reshape(-1)), 400).reshape(array.shape), array, 0)
    spec = StageSpec(TRIM, {"keep_count": 400})
    step = step_of([spec], dtype)
    for wanted in (ROW, COUNT):
        found, kept = staged(spec, step, array, tile_of(step, wanted))
        assert (found == expected).all() and kept == 400


def test_a_trim_of_the_model_measures_until_its_threshold_is_known():
    step = step_of()
    waiting = build(StageSpec(TRIM_MODEL, {"keep": 0.25}), step)
    assert isinstance(waiting, Select) and not waiting.ready and waiting.keep == COUNT // 4
    assert build(StageSpec(TRIM_MODEL, {"keep": 1 / COUNT / 2}), step).keep == 0
    array = deltas()
    known = StageSpec(TRIM_AT, {"low": int(np.float32(0.5).view(np.uint32)), "low_left": 10})
    assert build(known, step).ready
    found, kept = staged(known, step, array, 300)
    inside = np.flatnonzero(np.abs(array) == 0.5)
    expected = np.where(
        (np.abs(array) > 0.5).reshape(-1) | np.isin(np.arange(COUNT), inside[:10]), array.reshape(-1), 0
    )
    assert (found.reshape(-1) == expected).all() and kept == np.count_nonzero(expected)


# --- what is asked of a tensor


def halved(delta, draws, *, by: float = 2.0):
    """Needs whole rows, and has no kernel."""
    assert delta.shape[1] == ROW and draws.shape == delta.shape
    return np.where(draws & 1, delta / by, delta.dtype.type(0))


def test_a_method_without_a_kernel_runs_as_it_is(monkeypatch):
    monkeypatch.setitem(SPARSIFIERS, "halved", Sparsifier(halved, "row", random=True))
    array = deltas()
    spec = StageSpec("halved", {"drop_rate": 0.0, "by": 4.0, "other": 1}, SEED)
    expected = np.where(drawn() & 1, array / 4, np.float32(0))
    for tile in (ROW, COUNT):
        found, kept = staged(spec, step_of([spec]), array, tile)
        assert (found == expected).all() and kept == np.count_nonzero(expected)
    found, kept = staged(StageSpec("halved", {"drop_rate": 0.0}, SEED), step_of([spec]), array, ROW)
    assert (found == np.where(drawn() & 1, array / 2, np.float32(0))).all()


def test_a_method_of_elements_need_not_get_whole_rows(monkeypatch):
    monkeypatch.setitem(
        SPARSIFIERS, "plain", Sparsifier(lambda delta, draws: delta * (draws > 99), "element", random=True)
    )
    spec = StageSpec("plain", {"drop_rate": 0.0}, SEED)
    assert (staged(spec, step_of([spec]), deltas(), 7)[0] == deltas()).all()


SCOPES = [
    # method, sparsifiers, number format, further fields -> scope
    ("linear", [], "F32", {}, "element"),
    ("linear", ["dare"], "F32", {}, "element"),
    ("linear", ["dare"], "F64", {}, "element"),
    ("linear", ["dare l1"], "F32", {}, "element"),
    ("linear", ["dare l1"], "F64", {}, "tensor"),
    ("linear", ["della"], "F32", {}, "row"),
    ("linear", ["della"], "F64", {}, "row"),
    ("linear", ["della l1"], "F32", {}, "row"),
    ("linear", ["della l1"], "F64", {}, "tensor"),
    ("linear", ["magnitude"], "F32", {}, "element"),
    ("linear", ["magnitude"], "F64", {}, "tensor"),
    ("linear", ["magnitude l1"], "F32", {}, "element"),
    ("linear", ["magnitude", "della"], "F32", {}, "row"),
    ("linear", ["della", "magnitude"], "F64", {}, "tensor"),
    ("ties", [TRIM], "F32", {}, "element"),
    ("ties", [TRIM], "F64", {}, "tensor"),
    ("ties", [TRIM_MODEL], "F32", {}, "element"),
    ("ties", [TRIM_AT, "dare"], "F32", {}, "element"),
    ("linear", [], "F32", {"transposed": True}, "tensor"),
    ("regmean", [], "F32", {}, "row"),
    ("regmean", [], "F32", {"transposed": True}, "tensor"),
    ("model_stock", [], "F32", {"parameters": {"filter_wise": True}}, "row"),
    ("model_stock", [], "F32", {"parameters": {"filter_wise": False}}, "element"),
    ("sce", [], "F32", {}, "element"),
    ("sce", ["della"], "F32", {}, "row"),
    ("sce", [], "F64", {}, "tensor"),
    ("sce", [], "F32", {"precise": True}, "tensor"),
    ("arcee_fusion", [], "F32", {}, "row"),
]  # fmt: skip
PARAMETERS = {
    "dare": {"drop_rate": 0.1}, "della": {"drop_rate": 0.5, "window": 0.1}, "magnitude": {"drop_rate": 0.1},
    TRIM: {"keep_count": 5}, TRIM_MODEL: {"keep": 0.5}, TRIM_AT: {"low": 1, "low_left": 1},
}  # fmt: skip


def chain_of(words):
    return [
        StageSpec(word.split()[0], PARAMETERS[word.split()[0]] | ({"rescale": "l1"} if "l1" in word else {}))
        for word in words
    ]


@pytest.mark.parametrize(("method", "sparsifiers", "dtype", "fields", "scope"), SCOPES, ids=str)
def test_how_much_must_be_seen_at_once(method, sparsifiers, dtype, fields, scope):
    step = step_of(chain_of(sparsifiers), dtype, method=method, **fields)
    assert scope_of(step) == scope
    if not MERGE_METHODS[method].rows:
        sizes = {"element": (64, 1000), "row": (ROW, 7 * ROW), "tensor": (COUNT, COUNT)}[scope]
        assert (tile_of(step, 64), tile_of(step, 1000)) == sizes


def test_tiles_of_methods_that_take_a_number_of_rows(monkeypatch):
    monkeypatch.setitem(MERGE_METHODS, "by_four", MergeMethod(lambda deltas: deltas[0], "row", rows=lambda row: 4))
    monkeypatch.setitem(MERGE_METHODS, "by_none", MergeMethod(lambda deltas: deltas[0], "row", rows=lambda row: 0))
    assert tile_of(step_of(method="by_four"), 64) == 4 * ROW
    assert tile_of(step_of(method="by_four", shape=(2, ROW)), 64) == 2 * ROW
    assert tile_of(step_of(method="by_four", shape=(0, ROW)), 64) == tile_of(step_of(method="by_none"), 64) == 1
    assert tile_of(step_of(method="by_four", transposed=True), 64) == COUNT
    assert tile_of(step_of(shape=(0, ROW), transposed=True), 64) == 1
    assert tile_of(step_of(chain_of(["della"]), shape=(3, 0)), 64) == 64
    one = step_of()
    assert tile_of(Copy(*(getattr(one, field) for field in Copy.__dataclass_fields__ if field != "giver")), 77) == 77


# --- stages around stages


class Inner:
    """Says when it samples and when it is ready."""

    ready, sampling = False, True

    def __init__(self):
        self.seen = []

    def __getattr__(self, name):
        return lambda *arguments: self.seen.append(name) or 5


def test_what_is_around_a_stage_asks_it():
    inner = Inner()
    scale = stages.Scale(inner, np.float32(2))
    delta = np.float32([1, 2])
    assert not scale.ready and scale.sampling
    scale.begin()
    scale.measure(delta, 0)
    scale.settle()
    assert scale.apply(delta, 0) == 5 and delta.tolist() == [2, 4]
    assert inner.seen == ["begin", "measure", "settle", "apply"]
    inner = Inner()
    restored = stages.RestoreL1(inner)
    assert not restored.ready and restored.sampling
    restored.begin()
    restored.measure(delta, 0)
    restored.settle()
    assert inner.seen == ["begin", "measure", "settle"] and not restored.ready
    inner.ready = True
    assert not restored.ready and not restored.sampling  # now it measures all
    inner.sampling = False
    assert not restored.sampling
    restored.measure(delta, 0)
    restored.settle()
    assert inner.seen[3:] == ["apply"] and restored.ready and restored.factor == 1


def test_a_stage_as_such_needs_nothing():
    one = stages.RandomDrop(SEED, 0, 0.5, np.float32(1))
    assert one.ready and not one.sampling and not one.ordered
    assert one.take(np.zeros(4, np.uint8), DTYPES["F32"], None, np.zeros(1, np.float32), 0) is None
