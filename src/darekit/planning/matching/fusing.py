# SPDX-License-Identifier: Apache-2.0
"""One tensor here, its parts there: experts that are stored fused in one checkpoint and one by one in another.

The loader stacks the parts (`MergeModulelist`) and puts kinds of them behind each other (`Concatenate`), or cuts a
tensor along its first axis (`Chunk`). Where the parts lie in the whole as they are, byte for byte, a model is read as
the reference stores it: no value is moved before it is merged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from darekit.architectures.families import Conversion
from darekit.checkpoints import TensorInfo
from darekit.checkpoints.sources import Joined, Part
from darekit.planning.matching.naming import View
from darekit.wording import label

# Operations after which the parts follow one another in the whole, and the axes that they work along.
_CONTIGUOUS = {
    ("MergeModulelist",): (0,),
    ("MergeModulelist", "Concatenate"): (0, 1),
    ("Concatenate",): (0,),
}


@dataclass
class Group:
    """The parts of one tensor. `parts`: their order in the whole -> key; `stacked`: whether the first axis counts
    them; `kinds`: how many lie behind each other at each place of that axis."""

    stacked: bool
    kinds: int
    parts: dict[tuple[int, ...], str] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """The parts' keys, in order."""
        return [self.parts[order] for order in sorted(self.parts)]

    def fills(self, whole: TensorInfo, parts: Sequence[TensorInfo]) -> bool:
        """Whether parts of one shape make up the whole: (parts / kinds, kinds x rows, ...), or (parts x rows, ...)."""
        first = parts[0].shape
        if not first or any(part.shape != first for part in parts):
            return False
        rows, *rest = first
        shape = (len(parts) // self.kinds, self.kinds * rows, *rest) if self.stacked else (len(parts) * rows, *rest)
        return whole.shape == shape


def fit_parts(views: Sequence[View], notes: list[str]) -> None:
    """Cut or join what models store otherwise than the reference does, where bytes stay as they are."""
    reference = views[0]
    for view in views[1:]:
        missing = [key for key in reference.tensors if key not in view.tensors]
        extra = [key for key in view.tensors if key not in reference.tensors]
        if not missing or not extra:
            continue
        cut = [w for w, group in groups_of(view, missing, extra).items() if _cut(view, w, group, reference)]
        joined = [w for w, group in groups_of(view, extra, missing).items() if _join(view, w, group, reference)]
        for done, here, there in ((cut, "whole", "in parts"), (joined, "in parts", "whole")):
            if done:
                notes.append(
                    f"{label(view.ref)} stores {len(done)} tensors {here} that {label(reference.ref)} stores {there} "
                    f"({done[0]}{', ...' if done[1:] else ''}): read as {label(reference.ref)} has them"
                )


def groups_of(view: View, keys: Sequence[str], wholes: Sequence[str]) -> dict[str, Group]:
    """Of these keys those that are parts of one of the wholes: key of the whole -> its parts."""
    found: dict[str, Group] = {}
    there = set(wholes)
    for key in keys:
        conversion = view.facts.conversion(view.facts.in_memory(key))
        if conversion is None or not _is_contiguous(conversion):
            continue
        whole = view.facts.without_prefix(conversion.target)
        place = re.search(conversion.source.replace("*.", r"(\d+)\.") + "$", key)  # a source is a regular expression
        if whole not in there or place is None:
            continue
        stacked = conversion.operations[0].name == "MergeModulelist"
        group = found.setdefault(whole, Group(stacked, len(conversion.sources)))
        group.parts[*map(int, place.groups()), conversion.sources.index(conversion.source)] = key
    return found | _chunks_of(view, {*keys}, wholes)


def _chunks_of(view: View, keys: set[str], wholes: Sequence[str]) -> dict[str, Group]:
    """Wholes that the loader cuts into equal parts along their first axis."""
    found = {}
    for whole in wholes:
        conversion = view.facts.conversion(view.facts.in_memory(whole))
        if conversion is None or [operation.name for operation in conversion.operations] != ["Chunk"]:
            continue
        first = view.facts.without_prefix(conversion.target)
        parts = [first.replace(conversion.targets[0], target, 1) for target in conversion.targets]
        if conversion.operations[0].parameters.get("dim") == 0 and keys.issuperset(parts):
            found[whole] = Group(False, len(parts), {(i,): key for i, key in enumerate(parts)})
    return found


def _is_contiguous(conversion: Conversion) -> bool:
    axes = _CONTIGUOUS.get(tuple(operation.name for operation in conversion.operations))
    return axes == tuple(operation.parameters.get("dim") for operation in conversion.operations)


def _cut(view: View, whole: str, group: Group, reference: View) -> bool:
    info, parts = view.tensors[whole], [reference.tensors[key] for key in group.keys]
    if not group.fills(info, parts):
        return False
    del view.tensors[whole]
    size = info.nbytes // len(parts)
    for i, (key, like) in enumerate(zip(group.keys, parts, strict=True)):
        view.tensors[key] = TensorInfo(like.name, info.dtype, like.shape, Part(info.source, i * size, size))
    return True


def _join(view: View, whole: str, group: Group, reference: View) -> bool:
    like, parts = reference.tensors[whole], [view.tensors[key] for key in group.keys]
    if not group.fills(like, parts) or len({part.dtype for part in parts}) != 1:
        return False
    for key in group.keys:
        del view.tensors[key]
    source = Joined(tuple(part.source for part in parts))
    view.tensors[whole] = TensorInfo(like.name, parts[0].dtype, like.shape, source)
    return True
