# SPDX-License-Identifier: Apache-2.0
"""How far PEFT's merges of factors are from the same merges of products: the table in docs/adapters.md.

PEFT's add_weighted_adapter with `linear`, `ties` and `dare_linear` works on A and B apart and multiplies the results,
so B of one adapter meets A of another. Here each is compared with what its name says, on the products.
Three adapters on one 1024 x 1024 layer; relative Frobenius errors.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import peft
import torch

from darekit import masks
from darekit.methods.merging import linear, ties
from darekit.methods.sparsifiers import dare

SIZE, ADAPTERS = 1024, ("a", "b", "c")


class Layer(torch.nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., SIZE) -> (..., SIZE)."""
        found: torch.Tensor = self.layer(x)
        return found


def adapted(rank: int, alike: float) -> peft.PeftModel:
    """A layer with three adapters; `alike`: the share of each that all have in common."""
    torch.manual_seed(rank)
    settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
    model = peft.get_peft_model(Layer(), settings, adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        model.add_adapter(name, settings)
    layer = model.base_model.model.layer
    common = torch.randn(rank, SIZE), torch.randn(SIZE, rank)
    with torch.no_grad():
        for name in ADAPTERS:
            for module, shared in zip((layer.lora_A, layer.lora_B), common, strict=True):
                noise = torch.randn_like(shared)
                module[name].weight.copy_(alike**0.5 * shared + (1 - alike) ** 0.5 * noise)
    return model


def combined(model: peft.PeftModel, how: str, **more: float) -> np.ndarray:
    """PEFT's merge of the three, as a matrix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(list(ADAPTERS), [1.0] * 3, "merged", combination_type=how, **more)
    found: np.ndarray = model.base_model.model.layer.get_delta_weight("merged").detach().numpy()
    model.delete_adapter("merged")
    return found


def error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--drop-rate", type=float, default=0.5)
    arguments = parser.parse_args()
    rank, p = arguments.rank, arguments.drop_rate
    print("| adapters | PEFT `linear` | PEFT `ties`, all kept | PEFT `dare_linear` | DARE on products |")
    print("|---|--:|--:|--:|--:|")
    for alike in (0.0, 0.5, 0.9):
        model = adapted(rank, alike)
        layer = model.base_model.model.layer
        products = np.stack([layer.get_delta_weight(name).detach().numpy().ravel() for name in ADAPTERS])
        weights = np.ones(3)
        total = linear(products, weights, normalize=False).reshape(SIZE, SIZE)
        elected = ties(products, weights, normalize=True).reshape(SIZE, SIZE)
        dropped = np.stack([
            dare(delta, masks.draws(seed, masks.stream_of("layer"), 0, delta.size), drop_rate=p)
            for seed, delta in enumerate(products)
        ])  # fmt: skip
        ours = linear(dropped, weights, normalize=False).reshape(SIZE, SIZE)
        torch.manual_seed(0)
        figures = (
            error(combined(model, "linear"), total),
            error(combined(model, "ties", density=1.0), elected),
            error(combined(model, "dare_linear", density=1 - p), total),
            error(ours, total),
        )
        print(f"| {alike:.0%} in common | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
