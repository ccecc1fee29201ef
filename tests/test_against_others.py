# SPDX-License-Identifier: Apache-2.0
"""Agreement with PEFT's merge utilities and with the papers' formulas, written out in torch."""

import numpy as np
import pytest

import darekit as dk
from darekit import masks

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

SHAPE = (60, 70)
# Sums of three float32 numbers in another order, and a division: a few units in the last place of the largest.
CLOSE = {"rtol": 1e-5, "atol": 1e-9}


@pytest.fixture(scope="module")
def deltas():
    generator = torch.Generator().manual_seed(0)
    return [1e-3 * torch.randn(SHAPE, generator=generator) for _ in range(3)]


def merged(deltas, **how):
    """Our merge onto a base of zeros: the merged delta itself."""
    base = {"w": torch.zeros(SHAPE)}
    return dk.merge_tensors(base, [{"w": delta} for delta in deltas], **how)["w"]


def close(found, expected):
    torch.testing.assert_close(found, expected, **CLOSE)


# --- PEFT


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft.utils.merge_utils")


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.5, 1.3)])
def test_task_arithmetic_is_pefts(deltas, peft, weights):
    expected = peft.task_arithmetic(deltas, torch.tensor(weights))
    close(merged(deltas, method=dk.task_arithmetic(), weights=weights), expected)


@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 0.9999])
def test_ties_with_equal_weights_is_pefts(deltas, peft, density):
    # PEFT's disjoint mean divides by the number that agree: ours by their weights, the same where all are 1.
    expected = peft.ties(deltas, torch.ones(3), density)
    close(merged(deltas, method=dk.ties(keep=density)), expected)


def test_ties_with_majority_by_frequency_differs(deltas, peft):
    """The comparison above can fail: another election gives another result."""
    other = peft.ties(deltas, torch.ones(3), 0.5, majority_sign_method="frequency")
    assert not torch.allclose(merged(deltas, method=dk.ties(keep=0.5)), other, **CLOSE)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_magnitude_is_pefts_where_no_magnitudes_tie(deltas, peft, rate):
    assert len({float(x) for x in deltas[0].abs().flatten()}) == deltas[0].numel()
    kept = deltas[0].numel() - int(rate * deltas[0].numel())
    expected = peft.magnitude_based_pruning(deltas[0], kept / deltas[0].numel() + 1e-9)
    found = merged(deltas[:1], sparsify=dk.magnitude(rate), method=dk.task_arithmetic())
    assert torch.equal(found, expected) and int((found != 0).sum()) == kept


def test_dare_ties_is_pefts_with_our_mask(deltas, peft, monkeypatch):
    """PEFT draws its own mask; given ours, its dare_ties is ours."""
    p, seeds = 0.7, (3, 4, 5)
    draws = iter(seeds)

    def our_mask(tensor, density, rescale):
        kept = masks.kept(next(draws), masks.stream_of("w"), 0, tensor.numel(), p).reshape(SHAPE)
        return tensor * torch.from_numpy(kept) / (density if rescale else 1)

    monkeypatch.setattr(peft, "random_pruning", our_mask)
    expected = peft.dare_ties(deltas, torch.ones(3), 1 - p)
    close(merged(deltas, sparsify=dk.dare(p), method=dk.ties(), seeds=seeds), expected)


# --- the papers


def test_dare_as_the_paper_writes_it(deltas):
    """Equation 2 and 3 and task arithmetic onto a real base, bf16 throughout."""
    p, seeds, scale = 0.9, (11, 12, 13), 0.4
    base = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    models = [(base.float() + 20 * delta).to(torch.bfloat16) for delta in deltas]
    total = torch.zeros(SHAPE)
    for model, seed in zip(models, seeds, strict=True):
        delta = model.float() - base.float()
        m = torch.from_numpy(~masks.kept(seed, masks.stream_of("w"), 0, base.numel(), p).reshape(SHAPE)).float()
        dropped = (1 - m) * delta
        total += dropped / (1 - p)
    expected = base.float() + scale * total
    found = dk.merge_tensors(
        {"w": base}, [{"w": model} for model in models], sparsify=dk.dare(p),
        method=dk.task_arithmetic(lambda_=scale), seeds=seeds,
    )["w"]  # fmt: skip
    assert found.dtype == torch.bfloat16
    error = (found.float() - expected).abs()
    assert bool((error <= expected.abs() * 2**-8 * 1.01 + 1e-12).all())  # one rounding, half a unit
    untouched = total == 0
    assert torch.equal(found[untouched].view(torch.int16), base[untouched].view(torch.int16))


def test_ties_as_the_authors_write_it(deltas):
    """Trim over one flat vector per model, elect by mass, disjoint mean: their `ties_merging`, in our words."""
    keep = 0.2
    flat = torch.stack([delta.flatten() for delta in deltas])
    d = flat.shape[1]
    threshold = flat.abs().kthvalue(d - int(d * keep) + 1, dim=1, keepdim=True).values
    trimmed = flat * (flat.abs() >= threshold)
    elected = torch.sign(trimmed.sum(dim=0))
    elected[elected == 0] = 1.0
    agree = torch.where(elected > 0, trimmed > 0, trimmed < 0)
    entries = trimmed * agree
    expected = entries.sum(dim=0) / (entries != 0).sum(dim=0).clamp(min=1).float()
    close(merged(deltas, method=dk.ties(keep=keep)).flatten(), expected)
    close(merged(deltas, method=dk.ties(keep=keep, trim="model")).flatten(), expected)


def test_ties_against_a_matrix_by_hand():
    base = {"w": np.zeros(6, np.float32)}
    models = [np.float32(row) for row in ([3, -1, 2, 0, 5, 1], [1, 4, -2, 0, -1, 1], [-2, 1, 0, 0, -1, 1])]
    # sums        2   4   0 (elects +)  0   3   3
    expected = [(3 + 1) / 2, (4 + 1) / 2, 2, 0, 5, 1]
    assert dk.merge_tensors(base, [{"w": m} for m in models], method=dk.ties())["w"].tolist() == expected
    # keep 1/2: 3 of 6 each, the lower index of equals: [3 . 2 . 5 .], [1 4 -2 . . .], [-2 1 . . -1 .]
    expected = [(3 + 1) / 2, (4 + 1) / 2, 2, 0, 5, 0]
    assert dk.merge_tensors(base, [{"w": m} for m in models], method=dk.ties(keep=0.5))["w"].tolist() == expected


def test_average_is_torchs_mean(deltas):
    base = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    models = [base + delta for delta in deltas]
    found = dk.merge_tensors(None, [{"w": model} for model in models])["w"]
    torch.testing.assert_close(found, torch.stack(models).mean(dim=0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_torch_tensors_are_read_in_place_and_left_alone(deltas, name):
    dtype = getattr(torch, name)
    base = torch.ones(SHAPE, dtype=dtype)
    models = [(1 + 50 * delta).to(dtype) for delta in deltas]
    before = [model.clone() for model in models]
    found = dk.merge_tensors({"w": base}, [{"w": model} for model in models], sparsify=dk.dare(1.0))["w"]
    assert found.dtype == dtype and torch.equal(found, base) and found.data_ptr() != base.data_ptr()
    assert all(torch.equal(one, two) for one, two in zip(models, before, strict=True))
