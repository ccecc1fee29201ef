# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding: its definition against exact fractions, its statistics, and the same bits everywhere."""

import hashlib
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import darekit as dk
import families
import oracle
from darekit import kernels, masks
from darekit.checkpoints import sample_digest
from darekit.dtypes import DTYPES, narrow, stochastic
from darekit.errors import DataError, RecipeError
from darekit.memory import _checkpoint

NARROW = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
          "F8_E5M2": ml_dtypes.float8_e5m2}  # fmt: skip
TOP = 1 << 32


def values_of(dtype):
    """All finite values of a format that are not negative, ascending, as exact fractions."""
    bits = np.arange(1 << (8 * np.dtype(dtype).itemsize - 1)).astype(f"u{np.dtype(dtype).itemsize}")
    with np.errstate(invalid="ignore"):
        found = bits.view(dtype).astype(np.float64)
    return [Fraction(value) for value in sorted(found[np.isfinite(found)].tolist())]


def between(low, high, value):
    """The smallest word that takes `value` up to `high`."""
    exact = (value - low) / (high - low) * TOP
    return TOP - round(exact)


@pytest.mark.parametrize("name", NARROW)
def test_float64_is_rounded_once_to_nearest_even(name):
    """Around every tie, and by less than float32 can tell apart."""
    dtype, table = DTYPES[name], values_of(NARROW[name])
    values, expected = [], []
    for above in {*range(1, len(table), max(1, len(table) // 100)), 1, 2, 3, len(table) - 1}:
        tie = (table[above - 1] + table[above]) / 2
        values += [float(tie), np.nextafter(float(tie), np.inf), np.nextafter(float(tie), 0)]
        expected += [table[above - above % 2], table[above], table[above - 1]]  # codes are in the order of values
    raw = np.empty(2 * len(values) * dtype.itemsize, np.uint8)
    assert narrow(np.array([*values, *(-value for value in values)]), dtype, raw) == 0
    found = raw.view(dtype.numpy).astype(np.float64)
    assert [Fraction(value) for value in found[: len(values)]] == expected
    assert np.array_equal(found[len(values) :], -found[: len(values)])


@pytest.mark.parametrize("name", NARROW)
def test_float64_beyond_float32_keeps_its_sign_and_its_kind(name):
    dtype = DTYPES[name]
    raw = np.empty(6 * dtype.itemsize, np.uint8)
    bad = narrow(np.array([5e-324, -5e-324, 1e300, -1e300, np.nan, -np.inf]), dtype, raw)
    found = raw.view(dtype.numpy).astype(np.float64)
    assert bad == 4 and not np.isfinite(found[2:]).any() and np.signbit(found[:2]).tolist() == [False, True]
    assert not found[:2].any()


def test_merges_of_float64_are_rounded_once():
    value = np.array([1 + 2**-8 + 2**-40])
    merged = dk.merge_tensors({"w": np.zeros(1)}, [{"w": value}], method="task_arithmetic", dtype="bfloat16")
    assert merged["w"].astype(np.float64).tolist() == [1.0078125]


NANS = np.array([0xFFFFFFFF, 0x7FFFFFFF, 0x7FC00000, 0x7F800000, 0x3F800000], np.uint32).view(np.float32)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_the_bases_nans_stay_nans_in_a_narrower_format(name):
    """BF16's rounding adds 0x7FFF to the bits: a NaN of all ones became 0."""
    models = [{"w": np.ones(NANS.size, np.float32)}]
    merged = dk.merge_tensors({"w": NANS}, models, allow_nonfinite=True, dtype=name)["w"].astype(np.float32)
    assert np.isnan(merged[:3]).all() and merged[3:].tolist() == [np.inf, 1]


def test_what_only_the_base_has_keeps_its_nans_in_another_format(tmp_path):
    base = {"a": np.zeros((2, 2), np.float32), "pooler.dense.weight": NANS}
    for name, tensors in (("base", base), ("model", {"a": base["a"] + 1})):
        families.save(tmp_path / name, tensors, {"architectures": ["BertModel"], "model_type": "bert"})
    recipe = {"base_model": str(tmp_path / "base"), "models": [str(tmp_path / "model")], "dtype": "bfloat16",
              "merge_method": "task_arithmetic"}  # fmt: skip
    dk.merge(recipe, tmp_path / "out", force=True)
    found = families.load(tmp_path / "out")["pooler.dense.weight"].astype(np.float32)
    assert np.isnan(found[:3]).all() and found[3:].tolist() == [np.inf, 1]


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("number", [np.float32, np.float64])
def test_neighbours_and_probabilities_are_exact(name, number):
    dtype, rng = np.dtype(NARROW[name]), np.random.default_rng(1)
    table = values_of(dtype)
    spots = [0, 1, 2, len(table) // 2, len(table) - 3, *rng.integers(0, len(table) - 1, 60).tolist()]
    for spot in spots:
        low, high = table[spot], table[spot + 1]
        for part in (0.0, 2.0**-12, 0.25, 0.5, 0.8125, 1 - 2.0**-12):
            value = number(float(low) + part * (float(high) - float(low)))
            if not low <= Fraction(float(value)) < high:  # between float32's own values
                continue
            least = between(low, high, Fraction(float(value)))
            words = [word for word in (0, least - 1, least, TOP - 1) if 0 <= word < TOP]
            for sign in (1, -1):
                given_values = np.full(len(words), sign * value, number)
                found = stochastic(given_values, dtype, np.array(words, np.uint32)).astype(np.float64)
                expected = [float(high if word >= least else low) for word in words]
                assert np.abs(found).tolist() == expected, (name, value, words)
                assert (np.signbit(found) == (sign < 0)).all()


@pytest.mark.parametrize("name", NARROW)
def test_what_the_format_has_stays(name):
    dtype = np.dtype(NARROW[name])
    table = np.array([float(value) for value in values_of(dtype)], np.float32)
    for values in (table, -table):
        for word in (0, 1, TOP - 1):
            found = stochastic(values, dtype, np.full(values.size, word, np.uint32)).astype(np.float32)
            assert found.tobytes() == values.tobytes()  # -0.0 as well


@pytest.mark.parametrize("name", NARROW)
def test_beyond_the_largest_value(name):
    """Up to where rounding to nearest overflows it is the largest value, whatever the word; then it is an overflow."""
    dtype, entry = np.dtype(NARROW[name]), DTYPES[name]
    *_, before, largest = (float(value) for value in values_of(dtype))
    limit = largest + (largest - before) / 2
    high = np.uint32([TOP - 1])
    for sign in (1, -1):
        for value in (largest, np.nextafter(np.float32(largest), np.float32(np.inf)),
                      np.nextafter(np.float32(limit), np.float32(0))):  # fmt: skip
            found = stochastic(np.float32([sign * value]), dtype, high)
            assert float(found[0]) == sign * largest
        raw = np.empty(dtype.itemsize, np.uint8)
        over = np.float32([sign * np.nextafter(np.float32(limit), np.float32(np.inf))])
        assert kernels.round_to(over, entry, raw, high) == kernels.round_to(over, entry, raw) == 1


def test_nan_and_inf_are_no_numbers():
    found = stochastic(np.float32([np.nan, np.inf, -np.inf, 1e-45]), np.dtype(np.float16), np.zeros(4, np.uint32))
    assert np.isnan(found[0]) and found[1:].tolist() == [np.inf, -np.inf, 0]


@given(st.data())
def test_the_fast_twins_are_the_definition(data):
    size = data.draw(st.sampled_from([0, 1, 63, 1024, 1025]))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    values = data.draw(arrays.arrays(np.float32, size, elements=finite, fill=finite))
    words = data.draw(arrays.arrays(np.uint32, size, elements=st.integers(0, TOP - 1)))
    base = data.draw(arrays.arrays(np.float32, size, elements=finite, fill=st.just(0.5)))
    entry = DTYPES["BF16"]
    base_raw = base.astype(entry.numpy).view(np.uint8)
    base = base_raw.view(entry.numpy).astype(np.float32)
    found, expected = np.empty(2 * size, np.uint8), np.empty(2 * size, np.uint8)
    bad = kernels.round_to(values, entry, found, words)
    assert bad == narrow(values, entry, expected, words)
    if not bad:
        assert found.tobytes() == expected.tobytes()
    if not np.isfinite(base).all():
        return
    with np.errstate(over="ignore", invalid="ignore"):
        change = np.float32(0.75) * values
        total = base + change
    bad = kernels.add_round(base_raw, entry, base, values, 0.75, entry, found, words)
    if np.isfinite(total).all():
        assert bad == narrow(total, entry, expected, words)
    if not bad:
        same = np.repeat(change == 0, 2)
        assert found.tobytes() == np.where(same, base_raw, expected).tobytes()


# --- statistics


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("part", [0.02, 0.315, 0.5, 0.9])
def test_mean_and_variance_of_every_step(dtype, part):
    """A change of `part` of one step: the mean of many is the change itself, and each is one of two values."""
    count = 200_000
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or np.dtype(dtype))
    base = np.full(count, 1.5, np.float32).astype(kind)
    step = float((base[:1].view(f"u{kind.itemsize}") + 1).astype(f"u{kind.itemsize}").view(kind)[0]) - 1.5
    tuned = (base.astype(np.float32) + np.float32(step)).astype(kind)
    merged = dk.merge_tensors(
        {"w": base}, [{"w": tuned}], method=dk.task_arithmetic(lambda_=part), rounding="stochastic"
    )["w"].astype(np.float64)
    moved = (merged - 1.5) / step
    assert set(np.unique(moved)) <= {0.0, 1.0}
    assert abs(moved.mean() - part) < 5 * np.sqrt(part * (1 - part) / count)
    assert abs(moved.var() - part * (1 - part)) < 5 / np.sqrt(count)
    nearest = dk.merge_tensors({"w": base}, [{"w": tuned}], method=dk.task_arithmetic(lambda_=part))["w"]
    assert len(np.unique(nearest.astype(np.float32))) == 1


def test_no_draw_meets_a_mask_or_its_neighbour():
    """Kept by a mask and rounded up are independent, and so are two elements, two tensors and two outputs."""
    count, seed = 1 << 18, 42
    own = masks.rounding_seed(seed, [bytes(16)])
    up = masks.draws(own, masks.stream_of("w"), 0, count) >= TOP // 2
    other_output = masks.rounding_seed(seed, [bytes(15) + b"1"])
    others = {
        "mask": masks.draws(seed, masks.stream_of("w"), 0, count) >= TOP // 2,
        "derived": masks.draws(masks.effective_seeds(seed, [bytes(16)])[0], masks.stream_of("w"), 0, count) >= TOP // 2,
        "next": np.roll(up, 1),
        "tensor": masks.draws(own, masks.stream_of("v"), 0, count) >= TOP // 2,
        "output": masks.draws(other_output, masks.stream_of("w"), 0, count) >= TOP // 2,
    }
    for name, other in others.items():
        assert abs(np.mean(up == other) - 0.5) < 5 * 0.5 / np.sqrt(count), name


# --- frozen


def test_known_answers():
    assert masks.rounding_seed(0, [bytes(16)]) == 0x7DA2FEBAD8A5B704
    digests = [bytes(range(16)), bytes(range(16, 32))]
    text = b"darekit-rounding-1" + (42).to_bytes(8, "little") + bytes(range(32))
    by_hand = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    assert masks.rounding_seed(42, digests) == by_hand == KNOWN_SEED
    draws = masks.draws(by_hand, masks.stream_of("w"), 0, 3000)[[0, 1, 255, 256, 1023, 1024, 2999]]
    assert [f"{word:08x}" for word in draws] == KNOWN_DRAWS
    values = np.float32([1.001, -1.001, 0.3, 1e-40, 65504.1])
    words = masks.draws(by_hand, masks.stream_of("w"), 0, 5)
    found = {name: stochastic(values, np.dtype(kind), words).tobytes().hex() for name, kind in list(NARROW.items())[:2]}
    assert found == KNOWN_BYTES


KNOWN_SEED = 0x84089978499C0D80
KNOWN_DRAWS = ["f3f1470a", "c0a7a097", "8614f8fa", "dcf82bf7", "e1c54716", "267f18e9", "359e81b3"]
KNOWN_BYTES = {"BF16": "813f80bf993e01008047", "F16": "013c01bccc340000ff7b"}


# --- the same bits everywhere


def by_hand(name, base, models, weights, factor, seed, drop=None):
    """base + factor * sum of w_k d_k, each element rounded by its own word, in plain numpy on BF16 or F16."""
    number = np.float32
    origin = base.astype(number).reshape(-1)
    merged = np.zeros(origin.size, number)
    for k, (model, weight) in enumerate(zip(models, weights, strict=True)):
        delta = model.astype(number).reshape(-1) - origin
        if drop:
            kept = masks.kept(drop[1][k], masks.stream_of(name), 0, origin.size, drop[0])
            delta = np.where(kept, delta * number(1 / (1 - drop[0])), number(0))
        merged = merged + number(weight) * delta
    change = number(factor) * merged
    words = masks.draws(seed, masks.stream_of(name), 0, origin.size)
    rounded = stochastic(origin + change, base.dtype, words)
    word = f"u{base.dtype.itemsize}"
    bits = np.where(change == 0, base.reshape(-1).view(word), rounded.view(word))
    return bits.astype(word).view(base.dtype).reshape(base.shape)


def seed_of(base, models, seed=0):
    opened = [_checkpoint(str(k), {"w": array}) for k, array in enumerate((base, *models))]
    return masks.rounding_seed(seed, [sample_digest(one) for one in opened])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("shape", [(0,), (1,), (1025,), (130, 517), (600_001,)])
def test_both_lanes_are_the_formula(dtype, dropped, shape):
    base, models = oracle.family(np.random.default_rng(3), shape, dtype)
    seeds, weights = (5, 6, 7), (1.0, 0.7, 0.3)
    expected = by_hand("w", base, models, weights, 0.315, seed_of(base, models, 9), (0.6, seeds) if dropped else None)
    for tile, threads in ((65536, 2), (1000, 1), (4096, 3)):  # a tile of 1000 goes the general way
        found = dk.merge_tensors(
            {"w": base}, [{"w": model} for model in models], weights=weights, seeds=seeds if dropped else None,
            method=dk.task_arithmetic(lambda_=0.315), sparsify=dk.dare(0.6) if dropped else None, tile=tile,
            threads=threads, rounding={"method": "stochastic", "seed": 9},
        )["w"]  # fmt: skip
        assert found.tobytes() == expected.tobytes(), (tile, threads)


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "sce", "model_stock"])
def test_tiles_and_threads_change_nothing(method):
    base, models = oracle.family(np.random.default_rng(4), (211, 700), "BF16")
    models = models[:1] if method == "slerp" else models
    parameters = {"t": 0.4} if method == "slerp" else {}
    given_base = None if method == "linear" else {"w": base}
    found = [
        dk.merge_tensors(
            given_base,
            [{"w": model} for model in models],
            method=dk.merge_method(method, **parameters),
            tile=tile,
            threads=threads,
            rounding="stochastic",
        )["w"].tobytes()
        for tile, threads in ((65536, 1), (65536, 3), (3000, 2))
    ]
    nearest = dk.merge_tensors(
        given_base, [{"w": model} for model in models], method=dk.merge_method(method, **parameters)
    )["w"].tobytes()
    assert len(set(found)) == 1 and found[0] != nearest


def test_a_narrower_output_of_wide_inputs():
    """F64 and F32 into BF16, a model alone, and rows that the base lacks."""
    rng = np.random.default_rng(5)
    for number in (np.float64, np.float32):
        model = rng.normal(size=3000).astype(number)
        found = dk.merge_tensors(None, [{"w": model}], dtype="bfloat16", rounding="stochastic")["w"].astype(np.float64)
        nearest = model.astype(ml_dtypes.bfloat16).astype(np.float64)
        assert (found != nearest).any()
        assert (np.abs(found - model) < 2 * 2.0**-8 * np.abs(model)).all()
        assert abs(np.mean(found - model)) < 5 * np.std(found - model) / np.sqrt(model.size)


def test_where_nothing_changes_the_bits_stay():
    base = np.array([-0.0, 0.0, 1.0, 1e-40, -3e38], np.float32).astype(ml_dtypes.bfloat16)
    found = dk.merge_tensors({"w": base}, [{"w": base}, {"w": base}], method="task_arithmetic", rounding="stochastic")[
        "w"
    ]
    assert found.tobytes() == base.tobytes()


def test_float32_has_nothing_to_round():
    base, models = oracle.family(np.random.default_rng(6), 2000, "F32")
    given_models = [{"w": model} for model in models]
    found = dk.merge_tensors({"w": base}, given_models, method="task_arithmetic", rounding="stochastic")["w"]
    assert found.tobytes() == dk.merge_tensors({"w": base}, given_models, method="task_arithmetic")["w"].tobytes()


def test_overflow_is_an_error_whatever_is_drawn():
    base = np.full(5000, 3.3e38, np.float32).astype(ml_dtypes.bfloat16)
    tuned = (base.astype(np.float32) * np.float32(0.99)).astype(ml_dtypes.bfloat16)
    for rounding_word in ("nearest", "stochastic"):
        with pytest.raises(DataError, match="do not fit"):
            dk.merge_tensors(
                {"w": base}, [{"w": tuned}], method=dk.task_arithmetic(lambda_=-20.0), rounding=rounding_word
            )


# --- files, live models, stages


RECIPE = {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.315}, "rounding": "stochastic"}


def tensors_of(path):
    from safetensors.numpy import load_file

    return {
        name: array.tobytes() for file in sorted(path.glob("*.safetensors")) for name, array in load_file(file).items()
    }


def test_files_memory_and_shards_agree(llamas, tmp_path):
    recipe = families.recipe(llamas.path, **RECIPE) | {"sparsify": {"method": "dare", "drop_rate": 0.5, "seed": 3}}
    dk.merge(recipe, tmp_path / "one", threads=1, tile=64)
    dk.merge(recipe, tmp_path / "many", threads=3, shard_size=20_000)
    dk.merge(recipe | {"rounding": "nearest"}, tmp_path / "nearest")
    assert tensors_of(tmp_path / "one") == tensors_of(tmp_path / "many") != tensors_of(tmp_path / "nearest")
    found = dk.merge_tensors(
        llamas.base, llamas.models, sparsify=dk.dare(0.5, seed=3), method=dk.task_arithmetic(lambda_=0.315),
        rounding="stochastic",
    )  # fmt: skip
    assert {name: array.tobytes() for name, array in found.items()} == tensors_of(tmp_path / "one")
    dk.merge(recipe | {"rounding": "nearest"}, tmp_path / "argument", rounding="stochastic")
    assert tensors_of(tmp_path / "argument") == tensors_of(tmp_path / "one")


def test_a_live_model_has_the_bits_of_the_file(real, tmp_path):
    torch = pytest.importorskip("torch")
    from darekit.live.models import open_live

    recipe = families.recipe(real.path, **RECIPE)
    dk.merge(recipe, tmp_path / "out")
    loaded = real.cls.from_pretrained(tmp_path / "out").eval().float()
    with open_live(recipe, device="cpu") as live:
        state = live.model.float().state_dict()
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(state[name], tensor), name


def test_a_stage_has_draws_of_its_own(llamas, tmp_path):
    """Else what it was rounded by would be met once more, and a mean of the outer rounding would be a mean no more."""
    base, m0, m1, m2 = (str(llamas.path / name) for name in ("base", "m0", "m1", "m2"))
    inner = {"base_model": base, "models": [m0, m1], **RECIPE}
    outer = {"base_model": base, "models": ["first", m2], "stages": {"first": inner}, **RECIPE}
    with dk.plan(inner) as first, dk.plan(outer) as second:
        assert None not in (first.rounding, second.rounding) and first.rounding != second.rounding
    dk.merge(inner, tmp_path / "inner")
    dk.merge(outer, tmp_path / "nested", threads=2)
    dk.merge(outer, tmp_path / "again", threads=1, tile=640)
    assert tensors_of(tmp_path / "nested") == tensors_of(tmp_path / "again")
    # Merged alone, untouched, a stage is what was written of it.
    alone = {"models": ["first"], "stages": {"first": inner}, "merge_method": "linear"}
    dk.merge(alone, tmp_path / "alone")
    assert tensors_of(tmp_path / "alone") == tensors_of(tmp_path / "inner")
    # What is made of it is another model's when it is rounded otherwise: seeds follow.
    digests = [dk.plan({**outer, "stages": {"first": inner | {"rounding": one}}}).sample_digests
               for one in ("nearest", "stochastic", {"method": "stochastic", "seed": 1})]  # fmt: skip
    assert len(set(digests)) == 3


def test_an_output_is_resumed_under_its_own_rounding(llamas, tmp_path):
    from darekit.output.lock import identity

    made = [dk.plan(families.recipe(llamas.path, **RECIPE) | {"rounding": one})
            for one in ("nearest", "stochastic", {"method": "stochastic", "seed": 1})]  # fmt: skip
    found = []
    for plan in made:
        with plan:
            found.append(identity(plan, allow_nonfinite=False))
    assert found[0] != found[1] != found[2] != found[0]
    assert made[0].rounding is None and made[1].rounding != made[2].rounding


# --- recipes


@pytest.mark.parametrize(("rounding", "seed", "data"), [
    ("nearest", 0, None),
    ("stochastic", 3, "stochastic"),
    ({"method": "stochastic"}, 3, "stochastic"),
    ({"method": "stochastic", "seed": 8}, 8, {"method": "stochastic", "seed": 8}),
    ({"method": "nearest"}, 0, None),
])  # fmt: skip
def test_ways_to_write_it(llamas, rounding, seed, data):
    recipe = families.recipe(llamas.path, **RECIPE) | {"rounding": rounding}
    recipe["sparsify"] = {"method": "dare", "drop_rate": 0.5, "seed": 3}
    found = dk.read_recipe(recipe)
    assert (found.rounding_seed, found.to_data().get("rounding")) == (seed, data)
    assert dk.read_recipe(found.to_data()) == found


def test_the_recipes_seed_is_that_of_its_rounding(llamas):
    mergekit = families.recipe(llamas.path, **RECIPE)
    assert dk.read_recipe(mergekit).rounding_seed == 0
    assert dk.read_recipe(mergekit, seed=5).rounding_seed == 5
    native = mergekit | {"sparsify": {"method": "dare", "drop_rate": 0.5}}
    assert dk.read_recipe(native, seed=5).rounding_seed == 5
    assert not any("no effect" in note for note in dk.read_recipe(mergekit, seed=5).notes)
    assert any("no effect" in note for note in dk.read_recipe(mergekit | {"rounding": "nearest"}, seed=5).notes)


@pytest.mark.parametrize(("rounding", "said"), [
    ("stochastik", "did you mean 'stochastic'"),
    (3, "nearest, stochastic"),
    ({"seed": 3}, "has no method"),
    ({"method": "stochastic", "sed": 3}, "did you mean 'seed'"),
    ({"method": "stochastic", "seed": -1}, "whole number"),
    ({"method": "nearest", "seed": 3}, "no effect"),
])  # fmt: skip
def test_what_is_refused(llamas, rounding, said):
    with pytest.raises(RecipeError, match=said):
        dk.read_recipe(families.recipe(llamas.path, **RECIPE) | {"rounding": rounding})


def test_an_adapter_is_not_rounded_so(llamas):
    with pytest.raises(RecipeError, match="applies to models"):
        dk.read_recipe(families.recipe(llamas.path, **RECIPE) | {"output": "adapter"})


def test_where_it_belongs(llamas):
    for where in ("parameters", "sparsify"):
        recipe = families.recipe(llamas.path, **RECIPE) | {"sparsify": {"method": "dare", "drop_rate": 0.5}}
        recipe[where] = recipe[where] | {"rounding": "stochastic"}
        with pytest.raises(RecipeError, match=r"belongs to the recipe itself.*top level"):
            dk.read_recipe(recipe)


def test_stochastic_without_effect_is_said(llamas):
    plan = dk.plan(families.recipe(llamas.path, **RECIPE) | {"dtype": "float32"})
    assert any("rounding: stochastic has no effect" in note for note in plan.notes)
    assert not any("rounding" in note for note in dk.plan(families.recipe(llamas.path, **RECIPE)).notes)


def test_a_sweep_may_vary_it(llamas):
    from darekit.recipe.essence import is_random
    from darekit.sweeps.grid import cells_of
    from darekit.sweeps.reading import read_sweep

    sweep = {
        "recipe": families.recipe(llamas.path, **RECIPE),
        "axes": {"rounding": ["nearest", "stochastic"]}, "seeds": [1, 2],
        "test": {"prose": {"perplexity": str(llamas.path / "text.txt")}},
    }  # fmt: skip
    (llamas.path / "text.txt").write_text("w3 w4 w5\n" * 4)
    cells = [cell for cell in cells_of(read_sweep(sweep))[0] if cell.kind == "grid"]
    assert [(cell.at["rounding"], cell.seed) for cell in cells] == [
        ("nearest", None), ("stochastic", 1), ("stochastic", 2)
    ]  # fmt: skip
    assert [is_random(cell.recipe) for cell in cells] == [False, True, True]
