# SPDX-License-Identifier: Apache-2.0
"""Views that rename: some tensors of a checkpoint, under the same or other names. No byte is another.

So seeds and masks stay those of the stored model: the sample digest is that of the whole of it, and each tensor's mask
is drawn by the name that it is stored under. A layer that is used twice is dropped alike, wherever it goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

from darekit.architectures.depth import Layer, layer_of, layers_of
from darekit.architectures.parts import is_before
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


@dataclass(frozen=True)
class Layered:
    """The tensors of a checkpoint, or of a part of it, sorted by layer.

    Attributes:
        ref: the checkpoint's.
        stack: names of its layers up to the number, as "model.layers".
        layers: of each layer, from what follows its number to the whole name.
        before: names of what stands before the first layer.
        after: names of what stands after the last.
    """

    ref: str
    stack: str
    layers: tuple[Mapping[str, str], ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    _beyond: tuple[tuple[int, str, str], ...]  # layers after the last, what follows the number, whole name

    def range(self, start: int, end: int | None) -> range:
        """Layers start .. end - 1; to the last where `end` is None.

        Raises:
            PlanError: there are not so many.
        """
        many = len(self.layers)
        end = many if end is None else end
        if not start <= end <= many:
            raise PlanError(
                f"layer_range [{start}, {end}]: {self.ref} has {many} layers; a range lies within [0, {many}]"
            )
        return range(start, end)

    def layer(self, index: int, new: int) -> Iterator[tuple[str, str]]:
        """The tensors of a layer: names with another number, and their own."""
        for rest, name in self.layers[index].items():
            yield f"{self.stack}.{new}.{rest}", name

    def beyond(self, many: int) -> Iterator[tuple[str, str]]:
        """What is stored as layers after the last, in a stack of so many."""
        for after, rest, name in self._beyond:
            yield f"{self.stack}.{many + after}.{rest}", name


def layered(checkpoint: Checkpoint, names: Iterable[str]) -> Layered:
    """Sort tensors of a checkpoint by layer; those names have exactly one stack of layers.

    Raises:
        PlanError: there are none, or several.
    """
    names = list(names)
    layers, beyond = layers_of(names)
    stacks = [*dict.fromkeys(layer.stack for layer in layers.values())]
    if len(stacks) != 1:
        told = f"{len(stacks)} stacks of layers ({', '.join(stacks)})" if stacks else "no numbered layers"
        raise PlanError(
            f"slices need exactly one stack of layers, and {checkpoint.ref} has {told}; with several, write `modules:` "
            "with slices for each part (text_decoder, vision_tower, or a prefix of names): what is not named is kept "
            "from the base"
        )
    many = 1 + max(layer.index for layer in layers.values())
    found: tuple[dict[str, str], ...] = tuple({} for _ in range(many))
    for name, layer in layers.items():
        found[layer.index][_rest(name, layer)] = name
    outside = [name for name in names if name not in layers and name not in beyond]
    return Layered(
        checkpoint.ref, stacks[0], found,
        tuple(name for name in outside if is_before(name)), tuple(name for name in outside if not is_before(name)),
        tuple((layer.index - many, _rest(name, layer), name) for name, layer in beyond.items()),
    )  # fmt: skip


def kind_of(rest: str) -> str:
    """What follows a layer's number, without an expert's: layers of one kind have the same of them.

    >>> kind_of("mlp.experts.7.up_proj.weight")
    'mlp.experts.*.up_proj.weight'
    """
    return ".".join("*" if part.isdecimal() else part for part in rest.split("."))


def _rest(name: str, layer: Layer) -> str:
    return name[len(layer.stack) + 1 :].partition(".")[2]


def _numbered(name: str, layer: Layer, index: int) -> str:
    return f"{layer.stack}.{index}.{_rest(name, layer)}"
