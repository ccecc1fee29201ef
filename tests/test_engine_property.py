# SPDX-License-Identifier: Apache-2.0
"""The whole engine, whatever it is given: shapes, number formats, threads, tiles, spans, methods.

Twice: every bit is that of the formulas on whole tensors (`oracle`), and the values are those of a second truth, which
shares nothing with darekit: its own Philox, its own selection, its own election, in float64.
"""

import hashlib
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import darekit as dk
import oracle
from darekit.dtypes import DTYPES
from darekit.engine import execution
from darekit.engine.selection import Select
from darekit.methods import MERGE_METHODS, SPARSIFIERS

FORMATS = ("F32", "BF16", "F16", "F64")
TILES = (64, 100, 1024, 4097, 65536)
SPANS = (65536, 131072, 64 * 65536)
SHAPES = st.one_of(
    st.sampled_from([(0,), (1,), (63,), (64,), (65,), (1023,), (1024,), (1025,), (0, 5), (7, 0), (1, 1), (3, 1)]),
    st.tuples(st.integers(1, 3000)),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 40)),
    st.sampled_from([(300, 257), (70001,), (2, 65536)]),  # more than a tile, and more than a small span
)
RATES = st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]) | st.floats(0, 1).map(lambda p: round(p, 3))
SIZES = st.lists(SHAPES, min_size=1, max_size=3, unique=True)


@st.composite
def families_(draw):
    """Base and models, in small steps, so that equal values, zeros and equal magnitudes abound."""
    kind = DTYPES[draw(st.sampled_from(FORMATS))].numpy
    rng, many = np.random.default_rng(draw(st.integers(0, 2**32))), draw(st.integers(1, 5))
    grid = draw(st.sampled_from([4, 256]))  # steps of a delta
    base, tuned = {}, [{} for _ in range(many)]
    for i, shape in enumerate(draw(SIZES)):
        name = f"layers.{i}.w"
        base[name] = rng.normal(0, 0.25, shape).astype(kind)
        for model in tuned:
            change = rng.integers(-grid, grid + 1, shape) * (0.03 / grid)
            model[name] = (base[name].astype(np.float64) + change).astype(kind)
    return base, tuned


@st.composite
def machines(draw):
    """Threads, tile, span, and from which size on a selection begins with a sample."""
    return draw(st.integers(1, 4)), draw(st.sampled_from(TILES)), draw(st.sampled_from(SPANS)), draw(st.booleans())


def run(base, models, machine, **how):
    threads, tile, span, sampled = machine
    patches = [mock.patch.object(execution, "SPAN", span)]
    patches += [mock.patch.object(Select, "SAMPLE_FROM", 1000)] if sampled else []
    for patch in patches:
        patch.start()
    try:
        return dk.merge_tensors(base, models, threads=threads, tile=tile, **how)
    finally:
        for patch in patches:
            patch.stop()


# --- every bit, against the formulas


@st.composite
def merges(draw):
    """(sparsifier and parameters or None, merge method and parameters), of all that need nothing but models."""
    sparsify = None
    if draw(st.booleans()):
        kind = draw(st.sampled_from(sorted(SPARSIFIERS)))
        own = {"drop_rate": draw(RATES)}
        if "rescale" in SPARSIFIERS[kind].parameters and draw(st.booleans()):
            own["rescale"] = draw(st.sampled_from(["paper", "l1", "none"]))
        if kind == "della":
            own["window"] = draw(st.sampled_from([0.0, 0.1]))
            own["drop_rate"] = min(max(own["drop_rate"], 0.05), 0.95)
        if kind == "breadcrumbs":
            own["gamma"] = draw(st.sampled_from([0.0, 0.01])) * (1 - own["drop_rate"])
        sparsify = kind, own
    method = draw(st.sampled_from(sorted(n for n, entry in MERGE_METHODS.items() if entry.statistics is None)))
    parameters = {}
    for name, one in MERGE_METHODS[method].parameters.items():
        if name in ("keep", "lambda", "t") and (one.default is None or draw(st.booleans())):
            parameters[name] = draw(st.sampled_from([0.2, 0.5, 1.0]))
        if (
            name == "normalize" and MERGE_METHODS[method].mean_if is None and draw(st.booleans())
        ):  # else a sum of models
            parameters[name] = draw(st.booleans())
    return sparsify, (method, parameters)


WEIGHTS, SEEDS = (1.0, 0.7, 0.25, 1.5, 0.5), (11, 22, 33, 44, 2**63 + 5)


def bits_are_the_formulas(made, machine, how):
    base, models = made
    sparsify, (method, parameters) = how
    entry = MERGE_METHODS[method]
    low, high = entry.models
    models = [models[k % len(models)] for k in range(int(min(max(low, len(models)), high)))]
    weights = WEIGHTS[: len(models)] if entry.weighted else None
    seeds = SEEDS[: len(models)]
    found = run(
        base, models, machine, sparsify=sparsify and dk.sparsifier(sparsify[0], **sparsify[1]), seeds=seeds,
        method=dk.merge_method(method, **parameters), weights=weights,
    )  # fmt: skip
    if sparsify is not None and sparsify[1]["drop_rate"] == 0 and not sparsify[1].get("gamma"):
        sparsify = None  # nothing is dropped: an untouched model is the model, to the bit
    own = dict(parameters)
    told = {"lambda_": own.pop("lambda", 1.0), "keep": own.pop("keep", 1.0), "own": own}
    for name, array in base.items():
        expected = oracle.merge(
            name, array, [one[name] for one in models], seeds=seeds, sparsify=sparsify, method=method, weights=weights,
            **told,
        )  # fmt: skip
        assert found[name].dtype == expected.dtype and found[name].shape == expected.shape
        if entry.products and array.size:  # sums in another order
            unit = float(ml_dtypes.finfo(array.dtype).eps) * max(1e-30, float(np.abs(expected.astype(float)).max()))
            assert np.abs(found[name].astype(float) - expected.astype(float)).max() <= 4 * unit, name
        else:
            assert np.array_equal(oracle.raw_of(found[name]), oracle.raw_of(expected)), name


QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@seed(1)
@settings(max_examples=25, **QUIET)
@given(families_(), machines(), merges())
def test_every_bit_is_that_of_the_formulas(made, machine, how):
    bits_are_the_formulas(made, machine, how)


@pytest.mark.check
@seed(2)
@settings(max_examples=600, **QUIET)
@given(families_(), machines(), merges())
def test_every_bit_is_that_of_the_formulas_at_length(made, machine, how):
    bits_are_the_formulas(made, machine, how)


# --- the values, against a second truth


def philox(key, counters):
    """Philox4x32-10 (Salmon et al., SC'11): (n, 4) counter words -> (n, 4) draws."""
    x, (k0, k1) = counters.astype(np.uint64), key
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = x[:, 0] * np.uint64(0xD2511F53), x[:, 2] * np.uint64(0xCD9E8D57)
        x = np.stack([(b >> np.uint64(32)) ^ x[:, 1] ^ np.uint64(k0), b & low,
                      (a >> np.uint64(32)) ^ x[:, 3] ^ np.uint64(k1), a & low], axis=1)  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x


def draws_of(own_seed, name, count):
    """(count,) as docs/formats.md says: 1,024 elements are 256 counters, four words one after another."""
    stream = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    e = np.arange(count)
    t = 256 * (e // 1024) + e % 256
    words = [t & 0xFFFFFFFF, t >> 32, np.full(count, stream & 0xFFFFFFFF), np.full(count, stream >> 32)]
    found = philox((own_seed & 0xFFFFFFFF, own_seed >> 32), np.stack(words, axis=1).reshape(-1, 4))
    return found[e, e % 1024 // 256]


def top(sizes, many):
    """The `many` largest; of equals those that come first."""
    chosen = np.zeros(sizes.size, bool)
    chosen[np.lexsort((np.arange(sizes.size), -sizes))[:many]] = True
    return chosen


def truth(name, base, models, seeds, weights, kind, rate, method, keep, scale):
    """(n,) float64, and where an election is too close to call."""
    number = np.float64 if base.dtype == np.float64 else np.float32
    changes = []
    for model, own_seed in zip(models, seeds, strict=True):
        change = (model.astype(number) - base.astype(number)).reshape(-1)
        if kind in ("dare", "drop_only"):
            kept = draws_of(own_seed, name, change.size) >= round(rate * 2**32)
            # Rounded as the engine does: two magnitudes that it makes equal must be equal to the trim.
            factor = np.float32(1 / (1 - rate) if kind == "dare" and rate < 1 else 1)
            change = np.where(kept, change * number(factor), number(0))
        elif kind == "magnitude":
            change = np.where(top(np.abs(change), change.size - int(rate * change.size)), change, 0)
        if method == "ties" and keep < 1:
            change = np.where(top(np.abs(change), max(1, int(keep * change.size))), change, 0)
        changes.append(change.astype(np.float64))
    parts = [w * change for w, change in zip(weights, changes, strict=True)]
    close = np.zeros(base.size, bool)
    if method == "ties":
        votes = sum(parts)
        close = np.abs(votes) < 1e-6 * np.maximum(sum(map(np.abs, parts)), 1e-30)
        agree = [np.sign(part) == np.where(votes >= 0, 1, -1) for part in parts]
        merged = sum(part * yes for part, yes in zip(parts, agree, strict=True))
        share = sum(w * yes for w, yes in zip(weights, agree, strict=True))
        merged = np.divide(merged, share, out=np.zeros(base.size), where=share != 0)
    elif method == "linear":
        merged, scale = sum(parts) / sum(weights), 1.0
    else:
        merged = sum(parts)
    return base.astype(np.float64).reshape(-1) + scale * merged, close


def values_are_the_second_truths(made, machine, kind, rate, method, keep, scale):
    base, models = made
    seeds, weights = SEEDS[: len(models)], WEIGHTS[: len(models)]
    parameters = {"ties": {"keep": keep, "lambda": scale}, "task_arithmetic": {"lambda": scale}, "linear": {}}[method]
    found = run(
        base, models, machine, sparsify=kind and dk.sparsifier(kind, drop_rate=rate), seeds=seeds, weights=weights,
        method=dk.merge_method(method, **parameters),
    )  # fmt: skip
    for name, array in base.items():
        wanted, close = truth(name, array, [m[name] for m in models], seeds, weights, kind, rate, method, keep, scale)
        values = found[name].astype(np.float64).reshape(-1)
        grown = 1 / max(1 - rate, 1e-3) if kind == "dare" else 1  # float32's part of the error
        unit = float(ml_dtypes.finfo(array.dtype).eps) * np.abs(wanted) + 2**-20 * grown * 0.03 * 5
        if array.dtype == np.float64:
            unit = 1e-7 * (1 + grown)  # the rescale factor is a float32
        assert ((np.abs(values - wanted) <= unit) | close).all(), name


SECOND = (
    families_(),
    machines(),
    st.sampled_from([None, "dare", "drop_only", "magnitude"]),
    RATES,
    st.sampled_from(["task_arithmetic", "linear", "ties"]),
    st.sampled_from([0.1, 0.5, 1.0]),
    st.sampled_from([0.5, 1.0]),
)


@seed(3)
@settings(max_examples=50, **QUIET)
@given(*SECOND)
def test_the_values_are_those_of_a_second_truth(made, machine, kind, rate, method, keep, scale):
    values_are_the_second_truths(made, machine, kind, rate, method, keep, scale)


@pytest.mark.check
@seed(4)
@settings(max_examples=600, **QUIET)
@given(*SECOND)
def test_the_values_are_those_of_a_second_truth_at_length(made, machine, kind, rate, method, keep, scale):
    values_are_the_second_truths(made, machine, kind, rate, method, keep, scale)


def test_the_second_truths_draws_are_the_published_ones():
    """DESIGN.md's known answers: the truth itself can be wrong."""
    assert [f"{int(word):08x}" for word in philox((0, 0), np.zeros((1, 4)))[0]] == [
        "6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8",
    ]  # fmt: skip
    found = draws_of(42, "model.layers.0.mlp.up_proj.weight", 3000)
    assert [f"{int(found[i]):08x}" for i in (0, 1, 255, 256, 2999)] == [
        "8e155c47", "da10de59", "f89510a6", "d9a4c13a", "b8d3bf98",
    ]  # fmt: skip
