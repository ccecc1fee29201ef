# SPDX-License-Identifier: Apache-2.0
"""How much an adapter changes, by kind of module: what a merge that changes nothing would have shown at once.

The norm of a product follows from its factors (r x r products of each with itself); that of the base is estimated from
a few pieces of each tensor, and so is that of a change that is no product.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from darekit.checkpoints import Checkpoint, TensorInfo, traits_of
from darekit.inputs.adapters import products
from darekit.inputs.adapters.sources import AdaptedSource, read_values

PIECES, PIECE = 8, 8192  # of a tensor, and elements of each


@dataclass(frozen=True)
class Strength:
    """What an adapter does to the modules of one kind.

    Attributes:
        kind: the last word of their names, as q_proj.
        modules: how many of them it changes.
        change: Frobenius norm of what it adds to all of them together.
        ratio: that by the norm of the base's tensors.
    """

    kind: str
    modules: int
    change: float
    ratio: float


def strengths_of(checkpoint: Checkpoint) -> list[Strength]:
    """A view of a base with an adapter -> a row for each kind of module that it changes; none for what is no adapter.

    Factors are read, and samples of the base.
    """
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, info in checkpoint.tensors.items():
        if isinstance(info.source, AdaptedSource):
            kinds.setdefault(kind_of(name), []).append(_squares(info, info.source))
    found = []
    for kind, squares in kinds.items():
        change, base = (float(np.sqrt(sum(column))) for column in zip(*squares, strict=True))
        found.append(Strength(kind, len(squares), change, change / base if base else float("inf") if change else 0.0))
    return found


def kind_of(name: str) -> str:
    """A tensor's name -> its kind of module.

    >>> kind_of("model.layers.3.self_attn.q_proj.weight"), kind_of("model.layers.3.mlp.experts.down_proj")
    ('q_proj', 'experts.down_proj')
    >>> kind_of("model.layers.3.mlp.experts.17.w1.weight"), kind_of("bert.encoder.layer.0.output.dense.bias")
    ('experts.w1', 'output.dense bias')
    """
    words = [word for word in name.split(".") if not word.isdecimal()]
    end = f" {words.pop()}" if words[-1] == "bias" else ""
    words = words[:-1] if words[-1] == "weight" and len(words) > 1 else words
    many = 2 if len(words) > 1 and (words[-2] == "experts" or words[-1] == "dense") else 1
    return ".".join(words[-many:]) + end


def _squares(info: TensorInfo, source: AdaptedSource) -> tuple[float, float]:
    """Squared norms: of the change, and of the base."""
    places = _pieces(info.count)
    sampled = sum(count for _, count in places)
    share = info.count / sampled if sampled else 0.0
    known = source.change.shape_stays(source.base.shape)
    base = _sum(_base(source, start, count) for start, count in places) * share if known else 0.0
    if source.change.is_sum:
        return products.norm_of(source.pair()) ** 2, base
    change = 0.0
    for start, count in places:
        part: products.Array = np.empty(count, np.float32)
        source.values_into(part, start)
        if known:
            part -= _base(source, start, count)
        change += _sum([part])
    return change * share, base


def _base(source: AdaptedSource, start: int, count: int) -> products.Array:
    part: products.Array = np.empty(count, np.float32)
    exact = traits_of(source.base.source).values
    if exact is not None:
        exact(part, start)
    else:
        read_values(source.base, part, start)
    return part


def _pieces(count: int) -> list[tuple[int, int]]:
    """Where a tensor is looked at: first elements, and how many."""
    if count <= PIECES * PIECE:
        return [(0, count)] if count else []
    return [((count - PIECE) * k // (PIECES - 1), PIECE) for k in range(PIECES)]


def _sum(parts: Iterable[products.Array]) -> float:
    return sum(float(np.square(part, dtype=np.float64).sum()) for part in parts)
