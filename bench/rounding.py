# SPDX-License-Identifier: Apache-2.0
"""What rounding leaves of small deltas: BF16 models whose deltas are those of a real fine-tune (r = 0.003), merged at
weight x lambda = 0.315, with and without DARE. Prints the table of docs/rounding.md.

    python bench/rounding.py
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

import darekit as dk

COUNT, R, SCALE = 1 << 22, 0.003, 0.315
WAYS = {"nearest": {}, "stochastic": {"rounding": "stochastic"}, "float32": {"dtype": "float32"}}


def family(models: int, rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """Trained in float32, stored in BF16."""
    base = rng.normal(0, 0.02, COUNT).astype(ml_dtypes.bfloat16)
    origin = base.astype(np.float64)
    return base, [(origin + rng.normal(0, 0.02 * R, COUNT)).astype(ml_dtypes.bfloat16) for _ in range(models)]


def row(base: np.ndarray, models: list[np.ndarray], p: float, **how: str) -> tuple[float, float, float]:
    """Share of the changes that are undone; how much of the dense merged delta is applied; error by its length."""
    found = dk.merge_tensors(
        {"w": base}, [{"w": one} for one in models], method=dk.task_arithmetic(lambda_=SCALE),
        sparsify=dk.dare(p, seed=1) if p else None, **how,
    )["w"]  # fmt: skip
    wide = dk.merge_tensors(
        {"w": base.astype(np.float32)}, [{"w": one.astype(np.float32)} for one in models],
        method=dk.task_arithmetic(lambda_=SCALE), sparsify=dk.dare(p, seed=1) if p else None,
        seeds=None if not p else seeds_of(base, models),
    )["w"]  # fmt: skip
    origin = base.astype(np.float64)
    change, applied = wide.astype(np.float64) - origin, found.astype(np.float64) - origin
    dense = SCALE * sum(one.astype(np.float64) - origin for one in models)
    moved = change != 0
    return (
        float(np.mean(applied[moved] == 0)),
        float(applied @ dense / (dense @ dense)),
        float(np.linalg.norm(applied - change) / np.linalg.norm(change)),
    )


def seeds_of(base: np.ndarray, models: list[np.ndarray]) -> list[int]:
    """Those of the BF16 models, so that the exact merge drops the same."""
    from darekit.checkpoints import sample_digest
    from darekit.masks import effective_seeds
    from darekit.memory import _checkpoint

    return [*effective_seeds(1, [sample_digest(_checkpoint(f"model {k}", {"w": m})) for k, m in enumerate(models)])]


def main() -> None:
    for many in (1, 3):
        base, models = family(many, np.random.default_rng(0))
        steps = np.abs(models[0].view(np.int16).astype(int) - base.view(np.int16).astype(int))
        same, one = np.mean(steps == 0), np.mean(steps == 1)
        print(f"\nmodels: {many}; {same:.0%} of the elements unchanged, {one:.0%} changed by one step\n")
        print("| DARE | rounding | undone | applied | error |\n|---|---|---|---|---|")
        for p in (0.0, 0.5, 0.9, 0.99):
            for name, how in WAYS.items():
                undone, applied, error = row(base, models, p, **how)
                print(f"| {p or 'none'} | {name} | {undone:.1%} | {applied:.3f} | {error:.2f} |")


if __name__ == "__main__":
    main()
