# SPDX-License-Identifier: Apache-2.0
"""The mask is frozen: known answers, and the laws that packs and merges rely on."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darekit import masks
from darekit.kernels import cpu

KNOWN = [
    (0, "w", "985868c7 46fed606 892873b7 addd6b23 7f1aa930 9480d7f5 1d4e0df6", [8, 13, 14, 24, 39, 40]),
    (
        42,
        "model.layers.0.mlp.up_proj.weight",
        "8e155c47 da10de59 f89510a6 d9a4c13a cf990b93 da5ab84c b8d3bf98",
        [23, 28, 60, 81, 89, 110],
    ),
    (
        2**63 + 5,
        "lm_head.weight",
        "192b5f41 bd7d22e5 d2c93acd 06d15fc0 df06d9e0 e6764d1f 0df493f1",
        [13, 18, 21, 23, 28, 36],
    ),
]


def fast_draws(seed, name, start, count):
    out = np.empty(count, np.uint32)
    cpu.draws(np.uint64(seed), np.uint64(masks.stream_of(name)), start, out)
    return out


def reference_draws(seed, name, start, count):
    return masks.draws(seed, masks.stream_of(name), start, count)


def test_philox_known_answer():
    words = masks.philox(np.zeros(1, np.uint64), 0, 0)
    assert [f"{int(word[0]):08x}" for word in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("draws", [reference_draws, fast_draws])
@pytest.mark.parametrize(("seed", "name", "expected", "kept"), KNOWN)
def test_draws_known_answers(draws, seed, name, expected, kept):
    found = draws(seed, name, 0, 3000)
    assert " ".join(f"{found[i]:08x}" for i in (0, 1, 255, 256, 1023, 1024, 2999)) == expected
    threshold = masks.threshold_of(0.9)
    assert np.flatnonzero(found >= threshold)[:6].tolist() == kept


@pytest.mark.parametrize("draws", [reference_draws, fast_draws])
def test_counter_beyond_32_bits(draws):
    assert f"{draws(0, 'w', 2**34 + 5, 1)[0]:08x}" == "8a95f27c"
    assert f"{draws(0, 'w', 2**34 + 1029, 1)[0]:08x}" == "6122140e"


def test_golden_hash_of_a_mask():
    kept = masks.kept(7, masks.stream_of("model.norm.weight"), 0, 100_000, 0.5)
    digest = hashlib.sha256(np.packbits(kept).tobytes()).hexdigest()
    assert digest == GOLDEN


GOLDEN = "c357ead1960c188bd4723a466652dc3b3306df999254144a3568ad795083179a"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.text(max_size=20), st.integers(0, 2**40), st.integers(0, 5000))
def test_fast_draws_equal_the_reference(seed, name, start, count):
    assert np.array_equal(fast_draws(seed, name, start, count), reference_draws(seed, name, start, count))


@given(st.integers(0, 4000), st.integers(1, 3000))
def test_any_slice_of_the_mask_is_the_mask_of_the_slice(start, count):
    whole = reference_draws(3, "t", 0, 8000)
    assert np.array_equal(reference_draws(3, "t", start, count), whole[start : start + count])


def test_thresholds():
    assert masks.threshold_of(0.0) == 0
    assert masks.threshold_of(1.0) == 2**32
    assert masks.threshold_of(0.5) == 2**31
    assert masks.threshold_of(0.9) == round(0.9 * 2**32)
    # half to even: p = (2k + 1) / 2^33 lies exactly between two thresholds
    assert masks.threshold_of(1 / 2**33) == 0
    assert masks.threshold_of(3 / 2**33) == 2
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="outside"):
            masks.threshold_of(bad)


def test_share_kept_is_one_minus_p():
    n = 1 << 20
    for p in (0.1, 0.5, 0.9, 0.99):
        share = masks.kept(11, masks.stream_of("x"), 0, n, p).mean()
        assert abs(share - (1 - p)) < 5 * np.sqrt(p * (1 - p) / n)


def test_masks_of_different_names_and_seeds_are_independent():
    n, p = 1 << 20, 0.9
    one = masks.kept(1, masks.stream_of("a"), 0, n, p)
    for other in (masks.kept(2, masks.stream_of("a"), 0, n, p), masks.kept(1, masks.stream_of("b"), 0, n, p)):
        both = (one & other).mean()
        assert abs(both - 0.01) < 5 * np.sqrt(0.01 * 0.99 / n)


def test_effective_seeds_follow_the_model_and_not_its_place():
    a, b = bytes(16), bytes(range(16))
    assert masks.effective_seeds(42, [a, b]) == masks.effective_seeds(42, [b, a])[::-1]
    assert not set(masks.effective_seeds(42, [a, b])) & set(masks.effective_seeds(43, [a, b]))
    same = masks.effective_seeds(0, [a, a])
    assert same[0] != same[1], "two equal models must not share a mask"
    text = b"darekit-seed-1" + (42).to_bytes(8, "little") + a
    assert masks.effective_seeds(42, [a])[0] == int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def test_seed_must_be_64_bits():
    with pytest.raises(ValueError, match="64-bit"):
        masks.key_of(2**64)
