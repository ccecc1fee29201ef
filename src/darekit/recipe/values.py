# SPDX-License-Identifier: Apache-2.0
"""What a parameter may be: one scalar, a list of filters over tensors' names, a gradient (or switches) over the layers,
or one of these for each slice of a stack of layers.

The only module that looks inside such a value. Everybody else asks it, with a place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, cast

AUTO = "auto"  # the drop rate that follows from the size of each tensor's delta

Scalar = float | int | bool | str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter is asked: a tensor's name and shape, and its depth from 0 (first layer) to 1 (last).

    `depth`: 0 also for tensors that belong to no layer (`darekit.architectures.depth`); in a stack, within its slice.
    `slice`: index among the recipe's slices; None where it has none, or none of them made the tensor.
    """

    name: str
    shape: tuple[int, ...] = ()
    depth: float = 0.0
    slice: int | None = 0


@dataclass(frozen=True, slots=True)
class Gradient:
    """Numbers at equal distances over depth: the first holds at depth 0, the last at depth 1.

    `within`: the range in which its values stay, where the numbers themselves reach beyond it; None: they do not.
    """

    anchors: tuple[float, ...]
    within: tuple[float, float] | None = None

    def at(self, place: Place) -> float:
        """The value at a depth, linear between its two neighbours. mergekit's rule, and its order of operations.

        >>> Gradient((0.0, 0.5, 1.0)).at(Place("w", depth=0.25)), Gradient((0.0, 0.5, 1.0)).at(Place("w"))
        (0.25, 0.0)
        >>> [Gradient((0.5, 1.5), (0.0, 1.0)).at(Place("w", depth=depth)) for depth in (0.25, 0.75)]
        [0.75, 1.0]
        """
        position = place.depth * (len(self.anchors) - 1)
        below = int(position)
        left, right = self.anchors[below], self.anchors[min(below + 1, len(self.anchors) - 1)]
        share = position - below
        value = (1 - share) * left + share * right
        # Rounding may leave the range by one unit in the last place, which a drop rate of 1 cannot bear.
        return self.inside(min(max(value, min(left, right)), max(left, right)))

    def inside(self, value: float) -> float:
        """A number, or the end of the range that is nearest to it."""
        return value if self.within is None else min(max(value, self.within[0]), self.within[1])


@dataclass(frozen=True, slots=True)
class Stepped:
    """Switches over depth: each holds from its own depth on, up to the next one's."""

    anchors: tuple[bool, ...]

    def at(self, place: Place) -> bool:
        """The switch at a depth; nothing lies between true and false. mergekit's rule, by which the last one holds at
        depth 1 alone.

        >>> steps = Stepped((True, False, True))
        >>> [steps.at(Place("w", depth=depth)) for depth in (0.0, 0.4, 0.5, 0.9, 1.0)]
        [True, True, False, False, True]
        """
        return self.anchors[int(place.depth * (len(self.anchors) - 1))]


@dataclass(frozen=True, slots=True)
class Filtered:
    """One entry of a per-tensor list: `value` for the tensors that `filter` matches ("*": all)."""

    filter: str
    value: Scalar | Gradient | Stepped

    def matches(self, tensor: str) -> bool:
        """The whole name after `=`; a glob over the whole name if there is a glob character in it; else a substring."""
        pattern = self.filter
        if is_exact(pattern):
            return pattern[1:] == tensor
        return pattern == "*" or (fnmatchcase(tensor, pattern) if is_glob(pattern) else pattern in tensor)


@dataclass(frozen=True)
class Filters:
    """A list of filters in order, with an index of the exact names: a recipe may give every tensor its own value."""

    entries: tuple[Filtered, ...]

    @cached_property
    def _exact(self) -> dict[str, int]:
        """Name -> index of the first filter that is that very name."""
        found: dict[str, int] = {}
        for i, entry in enumerate(self.entries):
            if is_exact(entry.filter):
                found.setdefault(entry.filter[1:], i)
        return found

    @cached_property
    def _patterns(self) -> tuple[int, ...]:
        """Indices of the filters that are patterns."""
        return tuple(i for i, entry in enumerate(self.entries) if not is_exact(entry.filter))

    def at(self, place: Place) -> Any:
        """The value of the first filter that matches the name; None if none does."""
        end = self._exact.get(place.name, len(self.entries))
        for i in self._patterns:
            if i > end:
                break
            if self.entries[i].matches(place.name):
                end = i
                break
        return at(self.entries[end].value, place) if end < len(self.entries) else None


@dataclass(frozen=True, slots=True)
class BySlice:
    """A value for each slice of a stack; None for those that have none of their own."""

    values: tuple[Scalar | Filters | Gradient | Stepped | None, ...]

    def at(self, place: Place) -> Any:
        """What the place's slice says there; None where it says nothing."""
        value = None if place.slice is None else self.values[place.slice]
        return None if value is None else at(value, place)


Value = Scalar | Filters | Gradient | Stepped | BySlice


def by_slice(values: Sequence[Value | None]) -> Value | None:
    """One value for each slice -> one for the stack: None where no slice has any, the bare value of an only slice.

    >>> by_slice([None, None]), by_slice([0.5]), by_slice([0.5, None])
    (None, 0.5, BySlice(values=(0.5, None)))
    """
    if all(value is None for value in values):
        return None
    return values[0] if len(values) == 1 else BySlice(tuple(cast(Any, values)))


def at(value: Value, place: Place) -> Any:
    """What a value is at a place; None where it is a list of filters and none matches."""
    return value if is_scalar(value) else cast(Any, value).at(place)


def resolve(scopes: Iterable[Value | None], place: Place) -> Any:
    """Values in order of precedence (the model's, the recipe's), place -> the value that holds there.

    The first scope that yields a value wins; a list of filters without a match falls through to the next scope.
    None if nothing matches.

    >>> mlp = Filters((Filtered("mlp", 0.9),))
    >>> resolve([mlp, 0.5], Place("model.layers.0.mlp.up_proj.weight")), resolve([mlp, 0.5], Place("model.norm.weight"))
    (0.9, 0.5)
    """
    for value in scopes:
        found = None if value is None else at(value, place)
        if found is not None:
            return found
    return None


def reachable(scopes: Iterable[Value | None]) -> tuple[Value, ...]:
    """The scopes that can decide: None is left out, and so is what comes after a value for all tensors."""
    found: list[Value] = []
    for value in scopes:
        if value is None:
            continue
        found.append(value)
        if _decides(value):
            break
    return tuple(found)


def _decides(value: Value) -> bool:
    """Whether a value says something everywhere."""
    match value:
        case Filters(entries):
            return any(entry.filter == "*" for entry in entries)
        case BySlice():
            return False  # what no slice has made asks the next scope
        case _:
            return True


def chained(scopes: Iterable[Value | None]) -> Value | None:
    """Scopes in order of precedence -> one value that resolves to the same everywhere; None where all are None."""
    entries: tuple[Filtered, ...] = ()
    scopes = tuple(scopes)
    many = next((len(value.values) for value in scopes if isinstance(value, BySlice)), None)
    if many is not None:
        return BySlice(tuple(cast(Any, chained(_of_slice(value, i) for value in scopes)) for i in range(many)))
    for value in reachable(scopes):
        if not isinstance(value, Filters):
            return Filters((*entries, Filtered("*", cast(Any, value)))) if entries else value
        entries += value.entries
    return Filters(entries) if entries else None


def _of_slice(value: Value | None, index: int) -> Value | None:
    return value.values[index] if isinstance(value, BySlice) else value


def is_scalar(value: Value) -> bool:
    """Whether a value is the same at every place."""
    return not isinstance(value, Filters | Gradient | Stepped | BySlice)


def slices_of(value: Value | None) -> tuple[Value | None, ...]:
    """Its value for each slice; itself where it is one for all."""
    return value.values if isinstance(value, BySlice) else (value,)


def filters_of(value: Value | None) -> tuple[Filtered, ...]:
    """Its filters with their values; none where one value is for all tensors."""
    return tuple(entry for one in slices_of(value) if isinstance(one, Filters) for entry in one.entries)


def gradients_of(value: Value) -> Iterator[tuple[str, int | None, Gradient]]:
    """Its gradients, each with the filter before it ("*": all tensors) and its slice (None: all)."""
    for i, one in enumerate(slices_of(value)):
        for entry in one.entries if isinstance(one, Filters) else (one,):
            found = entry.value if isinstance(entry, Filtered) else entry
            if isinstance(found, Gradient):
                pattern = entry.filter if isinstance(entry, Filtered) else "*"
                yield pattern, i if isinstance(value, BySlice) else None, found


def scalars_of(value: Value | None) -> Iterator[Scalar]:
    """Every scalar that is written in a value: between them lies all that it can be."""
    match value:
        case Filters(entries):
            for entry in entries:
                yield from scalars_of(entry.value)
        case Gradient(anchors):
            yield from map(value.inside, anchors)
        case Stepped(anchors):
            yield from anchors
        case BySlice(values):
            for one in values:
                yield from scalars_of(one)
        case None:
            return
        case _:
            yield value


def mapped(value: Value, function: Callable[[float], float]) -> Value:
    """The same with every number replaced by the function of it."""
    match value:
        case Filters(entries):
            return Filters(tuple(Filtered(entry.filter, _mapped_one(entry.value, function)) for entry in entries))
        case BySlice(values):
            return BySlice(tuple(None if one is None else cast(Any, mapped(one, function)) for one in values))
        case _:
            return _mapped_one(value, function)


def _mapped_one(value: Scalar | Gradient | Stepped, function: Callable[[float], float]) -> Scalar | Gradient | Stepped:
    if isinstance(value, Stepped):
        return value
    if isinstance(value, Gradient):
        anchors = tuple(function(anchor) for anchor in value.anchors)
        if value.within is None:
            return Gradient(anchors)
        low, high = sorted(function(end) for end in value.within)
        return Gradient(anchors, (low, high))
    return function(float(value))


def to_data(value: Value) -> Any:
    """JSON-able form, as a recipe is written."""
    match value:
        case Filters(entries):
            return [{"filter": entry.filter, "value": to_data(entry.value)} for entry in entries]
        case Gradient(anchors) | Stepped(anchors):
            return list(anchors)
        case _:
            return value


def is_exact(pattern: str) -> bool:
    """Whether a pattern is one tensor's whole name, written `=name`."""
    return pattern.startswith("=")


def is_glob(pattern: str) -> bool:
    """Whether a pattern is matched as a glob over the whole name."""
    return any(character in pattern for character in "*?[")
