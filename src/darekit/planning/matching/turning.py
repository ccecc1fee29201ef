# SPDX-License-Identifier: Apache-2.0
"""Matrices that are stored turned in one checkpoint and not in another: read as the reference stores them.

The loader turns some tensors (`Transpose`): those of the Hub lie in files as an older class had them in memory. Where
it gives them another name on the way, the name tells. Qwen3-VL-MoE's experts have one name for both; there the loader
goes by shape (`check_dims`), and so does this: of experts' two kinds of matrices, (2 I, H) and (H, I), one at least is
not square, and it tells of both how a checkpoint stores them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from darekit.architectures.families import Conversion
from darekit.checkpoints import TensorInfo
from darekit.checkpoints.transposed import Transposed
from darekit.dtypes import dtype_named
from darekit.errors import HomologyError
from darekit.planning.matching.naming import View
from darekit.wording import label, some

TRANSPOSE = "Transpose"


@dataclass(frozen=True)
class _Turn:
    """A tensor of a view that may be turned: its key there, and the reference's."""

    own: str
    key: str


def fit_turned(views: Sequence[View], notes: list[str]) -> None:
    """Turn what models store otherwise than the reference does.

    Raises:
        HomologyError: a checkpoint stores some of its experts turned and others not.
    """
    reference = views[0]
    for view in views[1:]:
        if not any(
            TRANSPOSE in (o.name for o in r.operations) for r in (*view.facts.renames, *reference.facts.renames)
        ):
            continue
        last = threading.local()
        turned = [turn for turn in _by_name(view, reference) if _fits(view, reference, turn)]
        turned += _by_shape(view, reference)
        for turn in turned:
            like = reference.tensors[turn.key]
            info = view.tensors.pop(turn.own)
            source = Transposed(info.source, info.shape, dtype_named(info.dtype).itemsize, last)
            name = info.name if turn.own == turn.key else like.name
            view.tensors[turn.key] = replace(info, name=name, shape=like.shape, source=source)
        if turned:
            named = [reference.tensors[turn.key].name for turn in turned]
            notes.append(
                f"{label(view.ref)} stores {some(named)} with rows and columns swapped, as another version of "
                f"transformers has them: read as {label(reference.ref)} has them"
            )


def _are_turned(view: View) -> bool:
    return any(one.name == TRANSPOSE for rename in view.facts.renames for one in rename.operations)


def _conversion(view: View, key: str) -> Conversion | None:
    """How the loader turns a tensor, where that is all that it does."""
    found = view.facts.conversion(view.facts.in_memory(key))
    return found if found is not None and [one.name for one in found.operations] == [TRANSPOSE] else None


def _by_name(view: View, reference: View) -> Iterator[_Turn]:
    """Tensors that have another name turned."""
    for one, other in ((view, reference), (reference, view)):
        for key in [key for key in one.tensors if key not in other.tensors]:
            conversion = _conversion(one, key)
            target = None if conversion is None else one.facts.without_prefix(conversion.target)
            if target is not None and target in other.tensors and target not in one.tensors:
                yield _Turn(key, target) if one is view else _Turn(target, key)


def _by_shape(view: View, reference: View) -> list[_Turn]:
    """Tensors that keep their name: all of a checkpoint's, as soon as those that are not square say so."""
    turns = []
    for key in view.tensors:
        conversion = _conversion(view, key) if key in reference.tensors else None
        if conversion is not None and view.facts.without_prefix(conversion.target) == key:
            turns.append(_Turn(key, key))
    unlike = [t for t in turns if view.tensors[t.own].shape != reference.tensors[t.key].shape]
    if not unlike or not all(_fits(view, reference, turn) for turn in turns):
        alike = [t for t in turns if t not in unlike and not _is_square(view.tensors[t.own])]
        if alike and unlike and all(_fits(view, reference, turn) for turn in unlike):
            raise HomologyError(
                f"{view.ref} stores some matrices with rows and columns swapped against {reference.ref} "
                f"({some([view.tensors[t.own].name for t in unlike])}), but not others "
                f"({some([view.tensors[t.own].name for t in alike])}): how the square ones are stored is unknown. Load "
                "the model that was assembled by hand, and save it again with `save_pretrained`"
            )
        return []
    return turns


def _fits(view: View, reference: View, turn: _Turn) -> bool:
    """Whether a tensor, turned, has the reference's shape."""
    *outer, rows, columns = view.tensors[turn.own].shape if len(view.tensors[turn.own].shape) > 1 else (0, 0)
    return (*outer, columns, rows) == reference.tensors[turn.key].shape


def _is_square(info: TensorInfo) -> bool:
    return info.shape[-1] == info.shape[-2]
