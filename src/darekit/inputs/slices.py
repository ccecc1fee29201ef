# SPDX-License-Identifier: Apache-2.0
"""Views that rename: some tensors of a checkpoint, under the same or other names. No byte is another.

So seeds and masks stay those of the stored model: the sample digest is that of the whole of it, and each tensor's mask
is drawn by the name that it is stored under. A layer that is used twice is dropped alike, wherever it goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches

from darekit.architectures.depth import Layer, layer_of
from darekit.checkpoints import Checkpoint, TensorInfo, natural_key
from darekit.errors import PlanError


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """A view of some tensors: the name of each in the view -> its name in `checkpoint`, which may come up repeatedly.

    The view shares the checkpoint's files, config and companions. Closing it closes the checkpoint.

    Raises:
        PlanError: the checkpoint has no tensor of that name.
    """
    tensors: dict[str, TensorInfo] = {}
    for name in sorted(names, key=natural_key):
        info = checkpoint.tensors.get(names[name])
        if info is None:
            near = get_close_matches(names[name], checkpoint.tensors, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise PlanError(f"{checkpoint.ref} has no tensor {names[name]}, which {name} is to be{hint}")
        stored = info.stored_name
        tensors[name] = replace(info, name=name, stored=None if stored == name else stored)
    return replace(checkpoint, directory=None, tensors=tensors, origin=checkpoint.origin or checkpoint)


def layers(checkpoint: Checkpoint, start: int, end: int, *, stack: str | None = None) -> Checkpoint:
    """A view of layers start .. end - 1 of a stack, counted from 0 anew, and of all tensors outside the stack.

    The config is the checkpoint's: what it says of the number and the kinds of layers is for the caller to mend.

    Args:
        checkpoint: of whichever model.
        start: the first layer.
        end: the first layer that is no longer part of it; `start` for no layer at all.
        stack: the names of the layers up to the number, as "model.layers"; None where there is but one stack.

    Raises:
        PlanError: no such stack, several of which none is named, or layers that it does not have.
    """
    found = {name: layer for name in checkpoint.tensors if (layer := layer_of(name))}
    stacks = [*dict.fromkeys(layer.stack for layer in found.values())]
    if stack is None and len(stacks) != 1:
        raise PlanError(f"{checkpoint.ref} has {len(stacks)} stacks of layers ({', '.join(stacks)}); name one of them")
    stack = stacks[0] if stack is None else stack
    if stack not in stacks:
        raise PlanError(f"{checkpoint.ref} has no layers {stack}; it has {', '.join(stacks) or 'no layers at all'}")
    count = 1 + max(layer.index for layer in found.values() if layer.stack == stack)
    if not 0 <= start <= end <= count:
        raise PlanError(
            f"layers {start} to {end} of {stack} in {checkpoint.ref}, which has {count}: expected 0 <= start <= end <= "
            f"{count}"
        )
    names = {}
    for name in checkpoint.tensors:
        layer = found.get(name)
        if layer is None or layer.stack != stack:
            names[name] = name
        elif start <= layer.index < end:
            names[_numbered(name, layer, layer.index - start)] = name
    return renamed(checkpoint, names)


def _numbered(name: str, layer: Layer, index: int) -> str:
    rest = name[len(layer.stack) + 1 :].partition(".")[2]
    return f"{layer.stack}.{index}.{rest}"
