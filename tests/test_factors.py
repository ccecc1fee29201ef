# SPDX-License-Identifier: Apache-2.0
"""Truncated decompositions against numpy's own, with the sizes at which one way takes over from another made small."""

import numpy as np
import pytest

import darekit as dk
import families
from darekit.extraction import factors
from darekit.extraction.factors import Factors, everything, is_whole, key_of, of_rank, rank_of_energy, residual, square
from darekit.masks import draws

SIZES = {"SMALL": 4, "LAPACKS": 8, "STRIP": 4, "COLUMNS": 8, "ROWS": 8, "OVERSAMPLING": 2}


@pytest.fixture
def small(monkeypatch):
    for name, value in SIZES.items():
        monkeypatch.setattr(factors, name, value)


def spectrum(shape, values, seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(side, len(values))))[0] for side in shape)
    return ((u * values) @ v.T).astype(np.float32)


def check(matrix, found, rank, *, within=1.0001, values=None):
    """The best of this rank, balanced, with signs settled."""
    known = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) if values is None else values
    optimum = np.sum(known[rank:] ** 2)
    lost = residual(matrix, found)
    assert found.rank == rank and found.b.shape == (matrix.shape[0], rank) and found.a.shape == (rank, matrix.shape[1])
    assert found.b.dtype == found.a.dtype == np.float32
    assert optimum * 0.999 - 1e-9 * known[0] ** 2 <= lost <= optimum * within**2 + 1e-9 * known[0] ** 2
    sizes = [np.linalg.norm(found.b, axis=0), np.linalg.norm(found.a, axis=1)]
    large = known[:rank] > 1e-3 * known[0]
    np.testing.assert_allclose(sizes[0][large], sizes[1][large], rtol=2e-3)
    assert (np.diff(sizes[0][large]) <= 1e-3 * sizes[0][0]).all()  # the largest first
    at = np.abs(found.b).argmax(axis=0)
    assert (found.b[at, np.arange(rank)] > 0).all()


SHAPES = [(12, 12), (12, 20), (40, 12), (14, 12), (18, 12), (19, 12), (33, 25)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["flat", "steep", "low"])
def test_a_whole_decomposition(small, shape, kind):
    many = min(shape)
    values = {
        "flat": np.linspace(1.5, 0.5, many), "steep": np.arange(1, many + 1.0) ** -1.5,
        "low": np.where(np.arange(many) < 5, 2.0 ** -np.arange(many), 0),
    }[kind]  # fmt: skip
    matrix = spectrum(shape, values)
    before = matrix.copy()
    found, known = everything(matrix)
    assert (matrix == before).all() and known.shape == (many,) and known.dtype == np.float64
    np.testing.assert_allclose(known, values, atol=2e-6 * values[0])
    rank = 5 if kind == "low" else many
    for one in (1, 3, rank):
        check(matrix, found.cut(one) if one < rank else found, one, values=values)
    unit = found.b / np.linalg.norm(found.b, axis=0)
    assert np.abs(unit.T @ unit - np.eye(rank)).max() < 1e-4


@pytest.mark.parametrize("shape", [(6, 6), (3, 9), (9, 3)])
def test_lapack_does_small_ones(small, shape):
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found, known = everything(matrix)
    np.testing.assert_allclose(known, np.linalg.svd(matrix, compute_uv=False), rtol=1e-5)
    check(matrix, found, min(shape))


@pytest.mark.parametrize("shape", [(40, 30), (20, 50)])
@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_a_rank_alone(small, shape, decay):
    matrix = spectrum(shape, np.arange(1, min(shape) + 1.0) ** -decay)
    assert not is_whole(shape, 5)
    found = of_rank(matrix, 5, key_of("w"))
    check(matrix, found, 5, within=1.06 if decay == 0 else 1.01)
    assert (of_rank(matrix.copy(), 5, key_of("w")).a == found.a).all()
    assert not (of_rank(matrix, 5, key_of("v")).a == found.a).all()


def test_of_few_columns_all_values_are_computed(small):
    assert is_whole((4, 99), 1) and is_whole((99, 4), 1) and not is_whole((5, 99), 0)
    assert is_whole((40, 30), 13) and not is_whole((40, 30), 12) and not is_whole((30, 40), 12)
    matrix = spectrum((40, 30), np.linspace(2, 1, 30))
    assert (of_rank(matrix, 13, 0).a == everything(matrix)[0].cut(13).a).all()


def test_less_than_the_rank_is_there(small):
    rng = np.random.default_rng(1)
    low = (rng.normal(size=(40, 3)) @ rng.normal(size=(3, 30)) * 1e-4).astype(np.float32)
    assert of_rank(low, 5, 0).rank == 3 and residual(low, of_rank(low, 5, 0)) < 1e-10 * square(low)
    for shape, rank in (((40, 30), 5), ((12, 12), 9), ((40, 12), 9), ((3, 3), 2)):
        zero = np.zeros(shape, np.float32)
        found = of_rank(zero, rank, 0)
        assert found.rank == 0 and found.b.shape == (shape[0], 0) and found.a.shape == (0, shape[1])
        assert everything(zero)[0].rank == 0 and not everything(zero)[1].any()
    tiny = (np.eye(40, 30) * 1e-20).astype(np.float32)
    assert np.isfinite(of_rank(tiny, 5, 0).a).all() and everything(tiny)[0].rank == 30
    huge = spectrum((40, 12), np.linspace(2, 1, 12)) * np.float32(1e18)
    np.testing.assert_allclose(everything(huge)[1], np.linspace(2e18, 1e18, 12), rtol=1e-5)


@pytest.mark.parametrize("matrix", [
    np.eye(12), np.eye(12)[::-1] * np.arange(1, 13), np.eye(12, 20) * (np.arange(12) % 2)[:, None], np.ones((12, 20)),
    np.eye(40, 12) * np.arange(1, 13), np.ones((40, 12)),
])  # fmt: skip
def test_odd_matrices(small, matrix):
    matrix = matrix.astype(np.float32)
    known = np.linalg.svd(matrix, compute_uv=False)
    found, values = everything(matrix)
    assert found.rank == np.count_nonzero(known > 1e-5) and np.count_nonzero(values) <= 12
    np.testing.assert_allclose(values, known, atol=1e-5 * known[0])
    assert residual(matrix, found) <= 1e-10 * square(matrix)


def test_noise_is_no_rank(small):
    """Values below a millionth of the largest are float32's own."""
    values = np.array([1.0, 0.1, 1e-3, 3e-6, 1e-8, 0, 0, 0, 0, 0, 0, 0])
    matrix = (np.eye(12) * values).astype(np.float32)
    for one in (matrix, np.concatenate([matrix, np.zeros((30, 12), np.float32)])):
        assert everything(one)[0].rank == 4
    for matrix, many in ((np.diag([1.0, 2e-6, 5e-7]), 2), (np.diag([4.0, 5e-6, 3e-6]), 2)):
        assert everything(matrix.astype(np.float32))[0].rank == many


def test_rotations_that_do_not_settle_are_an_error(small, monkeypatch):
    monkeypatch.setattr(factors, "SWEEPS", 1)
    with pytest.raises(np.linalg.LinAlgError, match="Jacobi rotations did not settle in 1 sweeps"):
        everything(spectrum((12, 12), np.arange(1, 13.0) ** -1.5))


def test_the_rank_of_an_energy():
    values = np.array([2.0, 1.0, 1.0, 1e-9])
    for energy, rank in ((0.0, 1), (0.5, 1), (4 / 6, 1), (0.67, 2), (5 / 6, 2), (0.84, 3), (1, 3), (1.0, 3)):
        assert rank_of_energy(values, energy) == rank, energy
    assert rank_of_energy(np.zeros(3), 0.5) == rank_of_energy(np.zeros(0), 0.5) == 0
    assert rank_of_energy(np.array([5.0]), 1) == 1


def test_a_residual_is_what_is_left(small):
    rng = np.random.default_rng(3)
    for shape in ((20, 7), (8, 8), (5, 30)):
        matrix = rng.normal(size=shape).astype(np.float32)
        parts = Factors(
            rng.normal(size=(shape[0], 2)).astype(np.float32), rng.normal(size=(2, shape[1])).astype(np.float32)
        )
        expected = np.sum((matrix.astype(float) - (parts.b @ parts.a).astype(float)) ** 2)
        for one in (matrix, np.asfortranarray(matrix), np.repeat(matrix, 2, axis=0)[::2]):
            assert residual(one, parts) == pytest.approx(expected, rel=1e-5)
        assert square(matrix) == pytest.approx(np.sum(matrix.astype(float) ** 2), rel=1e-12)
        assert square(matrix.T) == pytest.approx(np.sum(matrix.astype(float) ** 2), rel=1e-12)


def test_signs_are_those_of_the_largest_elements():
    b = np.float32([[1, -3, 2, -2, 0], [-2, 1, -2, 2, 0]])
    found = factors._signed(b.copy(), np.ones((5, 2), np.float32))
    assert found.b.tolist() == [[-1, 3, 2, 2, 0], [2, -1, -2, -2, 0]]
    assert found.a[:, 0].tolist() == [-1, -1, 1, -1, 1]


def test_the_random_matrix_is_made_of_the_masks_draws(small):
    """Frozen: factors of a rank follow from a tensor's name."""
    assert key_of("w") == 0xB7F94DFF3124B8F6
    matrix = spectrum((40, 30), np.linspace(2, 1, 30))
    words = draws(5, 0, 0, 30 * 7)
    signs = np.where(words >= 1 << 31, 1, -1).reshape(30, 7)
    span = matrix @ signs
    for _ in range(factors.POWERS):
        span = matrix @ (matrix.T @ np.linalg.qr(span)[0])
    span = np.linalg.qr(span)[0]
    found = factors._range_of(matrix, 7, 5)
    assert found.shape == (40, 7)
    np.testing.assert_allclose(found @ found.T, span @ span.T, atol=1e-4)
    np.testing.assert_allclose(found.T @ found, np.eye(7), atol=1e-6)


def test_columns_that_are_not_independent_span_less():
    rng = np.random.default_rng(4)
    two = rng.normal(size=(30, 2)).astype(np.float32)
    found = factors._orthonormal(np.concatenate([two, two @ np.float32([[1], [2]])], axis=1))
    assert found.shape == (30, 2)
    np.testing.assert_allclose(found.T @ found, np.eye(2), atol=1e-4)
    full = factors._orthonormal(rng.normal(size=(30, 3)).astype(np.float32))
    np.testing.assert_allclose(full.T @ full, np.eye(3), atol=1e-5)
    assert factors._orthonormal(np.zeros((30, 0), np.float32)).shape == (30, 0)
    assert factors._orthonormal(np.zeros((30, 2), np.float32)).shape == (30, 0)


def test_how_far_columns_are_from_orthogonal():
    """1 is a millionth of both norms, of which the smaller counts as at least half of the largest."""
    norms = np.array([2.0, 1.0, 0.1, 4.0, 0.0, 3.0])
    products = np.diag(norms**2)
    assert factors._off(products, 4.0) == (0.0, 4.0)
    for i, j in ((0, 1), (2, 1), (5, 0), (3, 5), (4, 3)):
        one = products.copy()
        one[i, j] = one[j, i] = -3e-6
        allowed = 1e-6 * max(norms[i], norms[j]) * max(min(norms[i], norms[j]), 2.0)
        assert factors._off(one, 4.0)[0] == pytest.approx(3e-6 / allowed)


def test_what_decompositions_cost():
    """Flops and bytes as the page of costs has them."""
    assert factors.svd_flops((300, 200)) == factors.svd_flops((200, 300)) == 6 * 300 * 200**2 + 20 * 200**3
    assert factors.flops((1000, 900), 8) == 2 * 1000 * 900 * (16 * 6 + 8)
    assert factors.flops((1000, 900), 500) == factors.svd_flops((1000, 900))
    assert factors.memory((1000, 900), 8) == 4 * 1000 * 900 + 16 * 20 * 1900
    assert factors.memory((384, 900), None) == 16 * 384 * 900 + 20 * 384**2
    assert factors.memory((1000, 100), 8) == 16 * 1000 * 100 + 20 * 100**2
    width = 2 * 150  # 900 columns in six blocks
    rotating = 4 * 1000 * (900 + width) + max(8 * 1000 * width + 8 * width**2, 40 * width**2)
    assert factors.memory((1000, 900), None) == 4 * 1000 * 900 + max(rotating, 4 * 900 * 2000)
    rotating = 4 * 900 * (900 + width) + max(8 * 900 * width + 8 * width**2, 40 * width**2)
    tall = (12 * 900 + 24 * 256) * 900
    assert factors.memory((1400, 900), None) == factors.memory((900, 1400), None) == 4 * 1400 * 900 + max(
        tall, rotating, 4 * 900 * 2300
    )  # fmt: skip
    assert [factors._blocks(size) for size in (1, 3072, 3073, 5120)] == [6, 6, 7, 10]


def test_a_module_that_is_as_it_was_has_no_factors(small, tmp_path):
    """From disk to disk: of the others a rank is asked for, which nobody need know to be 0 beforehand."""
    rng = np.random.default_rng(0)
    base = families.llama(rng, np.float32)
    same = "model.layers.1.self_attn.q_proj.weight"
    model = {
        name: array + (0 if name == same else rng.normal(0, 0.01, array.shape).astype(np.float32))
        for name, array in base.items()
    }
    for name, tensors in (("base", base), ("model", model)):
        families.save(tmp_path / name, tensors, families.config(dtype="float32"))
    assert not is_whole((families.HIDDEN, families.HIDDEN), 2)
    report = dk.extract(tmp_path / "base", tmp_path / "model", tmp_path / "out", rank=2, threads=1)
    ranks = {one.name: one.rank for one in report.modules}
    assert ranks[same] == 0 and {*ranks.values()} >= {0, 2}
    stored = families.load(tmp_path / "out")
    assert not any(".1.self_attn.q_proj." in name for name in stored)
    found = stored["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert found.shape == (families.HIDDEN, 2)
