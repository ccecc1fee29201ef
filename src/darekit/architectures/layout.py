# SPDX-License-Identifier: Apache-2.0
"""Where the values of a stored tensor lie in memory: a whole tensor under another name, or a part of a fused one.

A loader's conversion is followed on shapes alone. Its result is looked at from behind: fused experts become views, one
for each stored expert, that have its shape and its order of elements. Arrays may be numpy's or torch's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from darekit.architectures.families import Conversion, Facts

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One way into an array: the elements begin .. end of an axis, one of them (the axis goes), or two axes swapped."""

    kind: Literal["narrow", "select", "swap"]
    axis: int
    begin: int
    end: int = 0  # of a swap: the other axis is `begin`

    def of(self, array: Any) -> Any:
        """A view of what this step leads to."""
        if self.kind == "swap":
            return array.swapaxes(self.axis, self.begin)
        there = self.begin if self.kind == "select" else slice(self.begin, self.end)
        return array[(slice(None),) * self.axis + (there,)]


@dataclass(frozen=True)
class Part:
    """A tensor in memory, and the way to what is meant of it."""

    name: str
    steps: tuple[Step, ...] = ()

    def of(self, arrays: Mapping[str, Any]) -> Any:
        """The view."""
        return self.within(arrays[self.name])

    def within(self, array: Any) -> Any:
        """The view, in this array (of the tensor's shape)."""
        for step in self.steps:
            array = step.of(array)
        return array


@dataclass(frozen=True)
class Unplaced:
    """A stored tensor is no part of what is in memory. `why`: its values are there, but not in its order; None: nothing
    has them."""

    why: str | None = None


class _Opaque(Exception):
    """An operation whose result has no views of what went in."""


def places_of(
    stored: Mapping[str, Shape], live: Mapping[str, Shape], facts: Facts
) -> dict[str, tuple[Part, ...] | Unplaced]:
    """Where each stored tensor lies.

    Args:
        stored: name -> shape, all tensors of one checkpoint.
        live: the same of what is in memory.
        facts: what is known of the model.

    Returns:
        Stored name -> its parts, one after another in its order of elements.

    >>> from darekit.architectures.families import facts_of
    >>> stored = {f"model.layers.0.mlp.experts.{i}.{n}_proj.weight": (6, 4) for i in (0, 1) for n in ("gate", "up")}
    >>> live = {"model.layers.0.mlp.experts.gate_up_proj": (2, 12, 4)}
    >>> found = places_of(stored, live, facts_of({"model_type": "qwen3_moe"}))
    >>> [part.steps for part in found["model.layers.0.mlp.experts.1.up_proj.weight"]]
    [(Step(kind='narrow', axis=1, begin=6, end=12), Step(kind='select', axis=0, begin=1, end=0))]
    """
    found: dict[str, tuple[Part, ...] | Unplaced] = {}
    groups: dict[str, tuple[Conversion, list[tuple[str, str]]]] = {}
    canonical = facts.canonicals(stored)
    for name in sorted(stored, key=_natural):
        same = next((one for one in (name, *_known_as(canonical[name], facts)) if one in live), None)
        conversion = None if same == name and live[name] == stored[name] else facts.conversion(name)
        target = next((t for t in _known_as(conversion.target, facts) if t in live), None) if conversion else None
        if conversion is not None and target is not None:
            groups.setdefault(target, (conversion, []))[1].append((conversion.source, name))
        elif same is not None:
            found[name] = (Part(same),)
        else:
            found[name] = Unplaced()
    for target, (conversion, names) in groups.items():
        try:
            found |= _converted(target, conversion, names, stored, live)
        except _Opaque as reason:
            found |= dict.fromkeys((name for _, name in names), Unplaced(str(reason)))
    return found


def _natural(name: str) -> list[tuple[int, int, str, int]]:
    """The order in which a loader collects what it stacks: by words, and numbers (also at a word's end) by value."""
    found = []
    for word in name.split("."):
        stem = word.rstrip("0123456789")
        last = int(word[len(stem) :]) if word != stem else -1
        found.append((1, 0, stem, last) if stem else (0, last, "", -1))
    return found


def _known_as(name: str, facts: Facts) -> tuple[str, ...]:
    """A name in memory, with and without the prefix of the base model."""
    prefix = f"{facts.prefix}."
    return (name, prefix + name, name.removeprefix(prefix)) if facts.prefix else (name,)


def _converted(
    target: str,
    conversion: Conversion,
    names: list[tuple[str, str]],
    stored: Mapping[str, Shape],
    live: Mapping[str, Shape],
) -> dict[str, tuple[Part, ...]]:
    if len(conversion.targets) > 1:
        return _cut(target, conversion, names, stored, live)
    made: dict[str, list[_Made]] = {source: [] for source in conversion.sources}
    for source, name in names:
        made[source].append(_Made(stored[name], {name: ()}))
    made = {source: row for source, row in made.items() if row}
    for operation in conversion.operations:
        made = _followed(operation.name, operation.parameters, made, live[target])
    rows = list(made.values())
    if len(rows) != 1 or len(rows[0]) != 1 or rows[0][0].shape != live[target]:
        raise _Opaque(f"{target} has a different shape from what the stored tensors make")
    return {name: (Part(target, steps),) for name, steps in rows[0][0].parts.items()}


@dataclass(frozen=True)
class _Made:
    """A tensor that a conversion has made so far: its shape, and the way from it to each stored tensor."""

    shape: Shape
    parts: Mapping[str, tuple[Step, ...]]

    def within(self, step: Step) -> dict[str, tuple[Step, ...]]:
        """The ways, where this tensor is what a step leads to."""
        return {name: (step, *steps) for name, steps in self.parts.items()}


def _followed(
    name: str, parameters: Mapping[str, Any], made: dict[str, list[_Made]], live: Shape
) -> dict[str, list[_Made]]:
    """One operation of transformers', on tensors by the pattern of the names that they came from."""
    match name:
        case "MergeModulelist":
            return {source: [_stacked(row, int(parameters["dim"]))] for source, row in made.items()}
        case "Concatenate":
            return {next(iter(made)): [_joined([one for row in made.values() for one in row], int(parameters["dim"]))]}
        case "Transpose":
            pair = int(parameters["dim0"]), int(parameters["dim1"])
            return {
                source: [
                    one if parameters.get("check_dims") and one.shape == live else _swapped(one, *pair) for one in row
                ]
                for source, row in made.items()
            }
    raise _Opaque(f"transformers makes it by {name}, whose result has no part that is the stored tensor")


def _stacked(row: list[_Made], axis: int) -> _Made:
    shape = row[0].shape
    if any(one.shape != shape for one in row):
        raise _Opaque("tensors of several shapes are stacked")
    parts = {name: steps for i, one in enumerate(row) for name, steps in one.within(Step("select", axis, i)).items()}
    return _Made((*shape[:axis], len(row), *shape[axis:]), parts)


def _joined(row: list[_Made], axis: int) -> _Made:
    ends = list(accumulate(one.shape[axis] for one in row))
    parts: dict[str, tuple[Step, ...]] = {}
    for one, end in zip(row, ends, strict=True):
        parts |= one.within(Step("narrow", axis, end - one.shape[axis], end))
    shape = row[0].shape
    return _Made((*shape[:axis], ends[-1], *shape[axis + 1 :]), parts)


def _swapped(one: _Made, first: int, second: int) -> _Made:
    shape = list(one.shape)
    shape[first], shape[second] = shape[second], shape[first]
    return _Made(tuple(shape), one.within(Step("swap", first, second)))


def _cut(
    target: str,
    conversion: Conversion,
    names: list[tuple[str, str]],
    stored: Mapping[str, Shape],
    live: Mapping[str, Shape],
) -> dict[str, tuple[Part, ...]]:
    """One stored tensor that becomes several, cut along its first axis: they follow one another in it."""
    operations = [operation.name for operation in conversion.operations]
    first, *_ = conversion.targets
    parts = [target.replace(first, other, 1) for other in conversion.targets]
    along = conversion.operations[0].parameters.get("dim") == 0
    if operations not in (["Chunk"], ["Split"]) or not along or len(names) != 1 or any(p not in live for p in parts):
        raise _Opaque(
            f"transformers makes {len(parts)} tensors of it by {', '.join(operations)}, not one after another"
        )
    ((_, name),) = names
    if sum(live[part][0] for part in parts) != stored[name][0]:
        raise _Opaque(f"{', '.join(parts)} have other shapes than what is made of it")
    return {name: tuple(Part(part) for part in parts)}
