# SPDX-License-Identifier: Apache-2.0
"""Where a parameter that was trained lies in a base that stores it otherwise: fused here, in parts there.

A loader stacks experts (`MergeModulelist`), puts kinds of them behind each other (`Concatenate`), or cuts a tensor
along its first axis (`Chunk`). An adapter may be of either side. The facts are those by which whole models are matched
(`planning.matching.fusing`); here it is ranges of matrices and rows that a product is cut to, or put into.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from darekit.architectures.families import Conversion, Facts
from darekit.checkpoints import TensorInfo

# Operations after which the parts follow one another in the whole, and the axes that they work along.
_CONTIGUOUS = {
    ("MergeModulelist",): (0,),
    ("MergeModulelist", "Concatenate"): (0, 1),
    ("Concatenate",): (0,),
}


@dataclass(frozen=True)
class Range:
    """Some rows of one of several matrices."""

    matrix: int
    begin: int
    end: int


@dataclass(frozen=True)
class InParts:
    """A parameter in memory that the base stores in parts. `matrices`: (E, R, C) of all of it; `parts`: stored name ->
    what it is of it."""

    matrices: tuple[int, int, int]
    parts: Mapping[str, Range]


@dataclass(frozen=True)
class InWhole:
    """A parameter in memory that is a part of a stored tensor. `matrices`: (E, R, C) of that, in memory."""

    stored: str
    matrices: tuple[int, int, int]
    range: Range


class Fusing:
    """What of a base is stored otherwise than it is in memory.

    Args:
        facts: of the base.
        tensors: the base's, by stored name.
        keys: how the loader knows each, without the base model's prefix -> stored name.
    """

    def __init__(self, facts: Facts, tensors: Mapping[str, TensorInfo], keys: Mapping[str, str]) -> None:
        self.facts, self.tensors, self.keys = facts, tensors, keys

    def in_parts(self, key: str) -> InParts | None:
        """A fused parameter, by key, of which the base stores the parts."""
        found = self._groups.get(key)
        if found is None:
            return None
        stacked, kinds = found
        shapes = {place: self.tensors[stored].shape for place, stored in kinds.items()}
        numbers = sorted({expert for expert, _ in kinds})
        heights = [shapes.get((numbers[0], kind), (0,))[0] for kind in range(1 + max(kind for _, kind in kinds))]
        ends = list(accumulate(heights))
        width = next(iter(shapes.values()))[-1]
        if any(shape != (heights[kind], width) for (_, kind), shape in shapes.items()):
            return None
        if len(kinds) != len(numbers) * len(heights) or (stacked and numbers != list(range(len(numbers)))):
            return None
        parts = {
            stored: Range(expert, ends[kind] - heights[kind], ends[kind]) for (expert, kind), stored in kinds.items()
        }
        return InParts((len(numbers), ends[-1], width), parts)

    def in_whole(self, key: str, shape: tuple[int, int]) -> InWhole | None:
        """A parameter, by key, that the base stores as a part of another. `shape`: of the part."""
        if key in self._chunks:
            stored, at, many = self._chunks[key]
            rows, *rest = self.tensors[stored].shape
            if rows % many or len(rest) != 1:
                return None
            return InWhole(stored, (1, rows, rest[0]), Range(0, at * rows // many, (at + 1) * rows // many))
        found = self._place(key)
        if found is None:
            return None
        whole, stacked, expert, kind, kinds = found
        stored_name = self.keys.get(whole)
        if stored_name is None:
            return None
        info, (rows, columns) = self.tensors[stored_name], shape
        many = info.shape[0] if stacked else 1
        wanted = (many, kinds * rows, columns)
        if info.shape not in (wanted, (wanted[0], wanted[2], wanted[1]), wanted[1:]) or expert >= many:
            return None
        return InWhole(stored_name, wanted, Range(expert, kind * rows, (kind + 1) * rows))

    def _place(self, key: str) -> tuple[str, bool, int, int, int] | None:
        """Of a part: key of the whole, whether experts are stacked, which expert and kind, of how many kinds."""
        conversion = self.facts.conversion(self.facts.in_memory(key))
        if conversion is None or not _is_contiguous(conversion):
            return None
        at = re.search(re.escape(conversion.source).replace(r"\*", r"(\d+)") + "$", key)
        if at is None:
            return None
        stacked = conversion.operations[0].name == "MergeModulelist"
        expert = int(at.group(1)) if stacked and at.groups() else 0
        kind, kinds = conversion.sources.index(conversion.source), len(conversion.sources)
        return self.facts.without_prefix(conversion.target), stacked, expert, kind, kinds

    @cached_property
    def _groups(self) -> dict[str, tuple[bool, dict[tuple[int, int], str]]]:
        found: dict[str, tuple[bool, dict[tuple[int, int], str]]] = {}
        parts: dict[str, bool] = {}  # pattern -> whether its names are parts of something
        for key, stored in self.keys.items():
            pattern = self.facts.pattern(key)
            if parts.get(pattern) is False or len(self.tensors[stored].shape) != 2:
                continue
            place = self._place(key)
            parts[pattern] = place is not None
            if place is not None:
                whole, stacked, expert, kind, _ = place
                found.setdefault(whole, (stacked, {}))[1][expert, kind] = stored
        return found

    @cached_property
    def _chunks(self) -> dict[str, tuple[str, int, int]]:
        """Key of a part in memory -> the stored tensor that is cut into it and others, which part, of how many."""
        found = {}
        seen: dict[str, bool] = {}
        for key, stored in self.keys.items():
            pattern = self.facts.pattern(key)
            if seen.get(pattern) is False:
                continue
            conversion = self.facts.conversion(self.facts.in_memory(key))
            operations = [one.name for one in conversion.operations] if conversion else []
            seen[pattern] = operations == ["Chunk"]
            if conversion is not None and seen[pattern] and conversion.operations[0].parameters.get("dim") == 0:
                for i, target in enumerate(conversion.targets):
                    found[key.replace(conversion.source, target)] = stored, i, len(conversion.targets)
        return found


def _is_contiguous(conversion: Conversion) -> bool:
    axes = _CONTIGUOUS.get(tuple(operation.name for operation in conversion.operations))
    return axes == tuple(operation.parameters.get("dim") for operation in conversion.operations)
