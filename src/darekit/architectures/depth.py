# SPDX-License-Identifier: Apache-2.0
"""Which layer a tensor belongs to, from the names alone: what a gradient over depth runs along."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# What stands before the number that counts layers: `model.layers.3.`, `transformer.h.3.`, `encoder.layer.3.`,
# `encoder.block.3.layer.0.`, `visual.blocks.3.`. The outermost one counts, so neither the parts of a T5 block nor a
# layer's experts are layers. Numbers after other words (`experts.3.`, `merger.mlp.0.`) count something else.
LAYER_WORDS: tuple[str, ...] = ("layers", "layer", "h", "blocks", "block", "resblocks", "deepstack_merger_list")

_LAYER = re.compile(rf"(?:^|\.)(?:{'|'.join(LAYER_WORDS)})\.([0-9]{{1,9}})\.")

# A layer beyond the last, for predicting more than one token (DeepSeek, GLM-4-MoE): the model's depth ends before it.
_NEXT_TOKEN = ".eh_proj."


@dataclass(frozen=True, slots=True)
class Layer:
    """A tensor's layer: `stack` is the name up to the number (`model.layers`); `index` counts from 0."""

    stack: str
    index: int


def layer_of(name: str) -> Layer | None:
    """The layer that a tensor's name tells; None where it names none.

    >>> layer_of("model.layers.3.mlp.experts.7.up_proj.weight")
    Layer(stack='model.layers', index=3)
    >>> layer_of("visual.merger.mlp.0.weight")
    """
    found = _LAYER.search(name)
    return Layer(name[: found.start(1) - 1], int(found[1])) if found else None


@dataclass(frozen=True, slots=True)
class Depths:
    """The layers of one checkpoint. `stacks`: each stack's number of layers, in order of appearance; `of`: depth of
    every tensor that has one, within its slice; `slices`: of every tensor which slice made it, None: no slice did."""

    stacks: dict[str, int]
    of: dict[str, float]
    slices: Mapping[str, int | None] = field(default_factory=dict)

    def at(self, name: str) -> float:
        """Depth of a tensor in [0, 1]; 0 where it belongs to no layer, as embeddings, the last norm and the head."""
        return self.of.get(name, 0.0)

    def slice_of(self, name: str) -> int | None:
        """Index of the slice that made a tensor; 0 where there are no slices."""
        return self.slices.get(name) if self.slices else 0


def layers_of(names: Iterable[str]) -> tuple[dict[str, Layer], dict[str, Layer]]:
    """All names of a checkpoint -> the layer of each that has one; and of those that stand beyond the last layer.

    >>> layers_of(["layers.0.w", "layers.1.eh_proj.weight", "layers.1.w", "norm.weight"])[1].keys()
    dict_keys(['layers.1.eh_proj.weight', 'layers.1.w'])
    """
    layers = {name: layer for name in names if (layer := layer_of(name))}
    last = {layer for name, layer in layers.items() if _NEXT_TOKEN in name}
    beyond = {name: layer for name, layer in layers.items() if layer in last} if last else {}
    return {name: layer for name, layer in layers.items() if name not in beyond} if last else layers, beyond


def depths_of(names: Iterable[str]) -> Depths:
    """All names of a checkpoint -> depth i / (n - 1) of layer i of the n of its stack; 1 in a stack of one layer.

    Encoder and decoder, text and vision each count their own. These are mergekit's depths; what it does not merge, a
    layer that predicts further tokens, belongs to no layer here.

    >>> depths_of(["h.0.ln.weight", "h.1.ln.weight", "h.2.ln.weight", "wte.weight"]).of
    {'h.0.ln.weight': 0.0, 'h.1.ln.weight': 0.5, 'h.2.ln.weight': 1.0}
    """
    layers, _ = layers_of(names)
    stacks: dict[str, int] = {}
    for layer in layers.values():
        stacks[layer.stack] = max(stacks.get(layer.stack, 0), layer.index + 1)
    scales = {stack: along(count) for stack, count in stacks.items()}
    return Depths(stacks, {name: scales[layer.stack][layer.index] for name, layer in layers.items()})


def along(layers: int) -> list[float]:
    """Depth of each of so many layers."""
    return [i / (layers - 1) for i in range(layers)] if layers > 1 else [1.0] * layers
