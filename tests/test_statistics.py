# SPDX-License-Identifier: Apache-2.0
"""Each element's mean and variance over many masks: what the paper promises, and what a wrong factor would break.

An element of a rescaled random drop is d/q with probability q, else 0: mean d, variance d^2 (1-q)/q. Over n masks
the mean has the standard error |d| sqrt((1-q)/(q n)), and the count of survivors that of a binomial. With 400
elements a bound of 5 standard errors fails by chance once in 4000 draws of seeds; the seeds here are fixed.
"""

import numpy as np
import pytest

import darekit as dk
from darekit import masks
from darekit.methods.sparsifiers import della_keep

SEEDS = 1500
SIGMAS = 5.0


def outcomes(spec, delta, seeds=SEEDS):
    """(seeds, n): the sparsified delta under many seeds, through the engine. One model per seed, one tensor each."""
    base = {"w": np.zeros_like(delta)}
    found = np.empty((seeds, delta.size), np.float32)
    for seed in range(seeds):
        merged = dk.merge_tensors(base, [{"w": delta}], sparsify=spec, method=dk.task_arithmetic(), seeds=[seed],
                                  threads=1)  # fmt: skip
        found[seed] = merged["w"].reshape(-1)
    return found


def deviations(found, delta, keep):
    """Means and variances of (seeds, n) outcomes, in standard errors from d and d^2 (1-q)/q."""
    n = len(found)
    delta = delta.reshape(-1).astype(np.float64)
    variance = delta**2 * (1 - keep) / keep
    of_mean = (found.mean(axis=0, dtype=np.float64) - delta) / np.sqrt(variance / n)
    squares = (found - delta) ** 2
    # (x - d)^2 is d^2 ((1-q)/q)^2 with probability q, else d^2: its own variance gives the error of its mean.
    fourth = delta**4 * (keep * ((1 - keep) / keep) ** 4 + (1 - keep))
    of_variance = (squares.mean(axis=0, dtype=np.float64) - variance) / np.sqrt((fourth - variance**2) / n)
    return of_mean, of_variance


def deltas():
    return np.random.default_rng(0).normal(0, 1e-3, (20, 20)).astype(np.float32)


def check(of_mean, of_variance):
    assert np.abs(of_mean).max() < SIGMAS
    assert np.abs(of_variance).max() < SIGMAS
    # They scatter as they must: all at 0 would be a mask that is balanced instead of random.
    assert 0.85 < of_mean.std() < 1.15 and 0.85 < of_variance.std() < 1.15


@pytest.mark.parametrize("p", [0.25, 0.9])
def test_dare(p):
    delta = deltas()
    check(*deviations(outcomes(dk.dare(p), delta), delta, np.full(delta.size, 1 - p)))


def test_della():
    delta = deltas()
    keep = della_keep(delta, 0.6, 0.4).reshape(-1)
    found = outcomes(dk.della(0.6, window=0.4), delta)
    check(*deviations(found, delta, keep))
    # The formula itself, by hand for one row: the smallest is kept with 0.2, the largest with 0.6.
    row = np.abs(delta[0])
    rates = (found[:, :20] != 0).mean(axis=0)
    assert rates[row.argmin()] == pytest.approx(0.2, abs=0.04)
    assert rates[row.argmax()] == pytest.approx(0.6, abs=0.04)


def test_without_rescale_the_mean_shrinks():
    """The same bounds reject drop_only: they can fail."""
    delta = deltas()
    found = outcomes(dk.drop_only(0.9), delta, 1000)
    of_mean, _ = deviations(found, delta, np.full(delta.size, 0.1))
    assert np.abs(of_mean).min() > SIGMAS  # 0.9 |d| off, at 0.095 |d| a standard error
    of_mean, _ = deviations(found * 10, delta, np.full(delta.size, 0.1))
    assert np.abs(of_mean).max() < SIGMAS


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99, 0.999])
def test_survivors_of_a_large_tensor(p):
    """A share in a storage format (bf16 at 0.99 keeps 0.78 %) would be 200 standard errors off."""
    n = 4_000_000
    kept = int(masks.kept(42, masks.stream_of("w"), 0, n, p).sum())
    assert abs(kept - n * (1 - p)) < SIGMAS * np.sqrt(n * p * (1 - p))


def test_masks_of_models_tensors_and_seeds_are_independent():
    n, p = 1_000_000, 0.5
    pairs = [((1, "a"), (2, "a")), ((1, "a"), (1, "b")), ((1, "a"), (1 + (1 << 32), "a")), ((7, "w.1"), (7, "w.11"))]
    for one, two in pairs:
        both = [masks.kept(seed, masks.stream_of(name), 0, n, p) for seed, name in (one, two)]
        together = int((both[0] & both[1]).sum())
        assert abs(together - n * 0.25) < SIGMAS * np.sqrt(n * 0.25 * 0.75)
