# SPDX-License-Identifier: Apache-2.0
"""A prefix that one checkpoint has before its names and another has not, where no table knows of it.

Training frameworks keep the model as an attribute (`model.`, `student.`), and save it with that attribute's name; and
a bare model is a part of a larger one (`vision_model.`), whose class may stand in another family.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from darekit.checkpoints import TensorInfo
from darekit.planning.matching.naming import View
from darekit.wording import label

MOST = 0.75  # of a bare model's tensors: what else it has (a pooler) the other may lack


def fit_prefixes(views: Sequence[View], notes: list[str]) -> None:
    """Give checkpoints the same keys where one prefix is all that keeps most of their names apart."""
    reference, models = views[0], views[1:]
    for view in models:
        if (part := _part_around(reference.tensors, view.tensors)) is not None:
            _strip(view, part, reference, notes)
    if models and all(view.tensors.keys().isdisjoint(reference.tensors) for view in models):
        parts = {_part_around(view.tensors, reference.tensors) for view in models}
        if len(parts) == 1 and (part := parts.pop()) is not None:
            _strip(reference, part, models[0], notes)
    for view in models:
        _fit_rest(view, reference, notes)


def _part_around(bare: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo]) -> str | None:
    """The first word of names in `other` under which nearly all of `bare` is found; None where there is none.
    Tensors that both have under one name are in no part of one of them."""
    if not bare or not bare.keys().isdisjoint(other):
        return None
    found = Counter(word for word, dot, rest in (key.partition(".") for key in other) if dot and rest in bare)
    word, count = found.most_common(1)[0] if found else ("", 0)
    return f"{word}." if count >= MOST * len(bare) else None


def _strip(view: View, prefix: str, other: View, notes: list[str]) -> None:
    """Take a prefix off all keys that begin with it."""
    notes.append(_told(view, prefix, sum(key.startswith(prefix) for key in view.tensors), other))
    view.tensors = {key.removeprefix(prefix): info for key, info in view.tensors.items()}
    view.buffers = {key.removeprefix(prefix): info for key, info in view.buffers.items()}
    view.names = {key.removeprefix(prefix): name for key, name in view.names.items()}
    view.copies = {name: key.removeprefix(prefix) for name, key in view.copies.items()}


def _fit_rest(view: View, reference: View, notes: list[str]) -> None:
    """Some names are the same: the others are, if one prefix before all of them is the only difference."""
    ours, theirs = reference.tensors, view.tensors
    if theirs.keys() == ours.keys():
        return
    extra = [key for key in theirs if key not in ours]
    missing = [key for key in ours if key not in theirs]
    for longer, shorter, has, lacks in ((extra, missing, view, reference), (missing, extra, reference, view)):
        prefix = _prefix_of(longer, shorter)
        if prefix is None:
            continue
        names = {f"{prefix}{key}": key for key in shorter}
        if has is reference:
            names = {short: long for long, short in names.items()}
        view.tensors = {names.get(key, key): info for key, info in theirs.items()}
        view.names = {names.get(key, key): name for key, name in view.names.items()}
        view.copies = {name: names.get(key, key) for name, key in view.copies.items()}
        notes.append(_told(has, prefix, len(names), lacks))
        return


def _prefix_of(longer: Sequence[str], shorter: Sequence[str]) -> str | None:
    """The one prefix with which the shorter names are the longer ones, all of them; None: there is none."""
    if not shorter or len(longer) != len(shorter):
        return None
    prefix = longer[0].partition(".")[0] + "."
    return prefix if set(longer) == {f"{prefix}{name}" for name in shorter} else None


def _told(has: View, prefix: str, count: int, lacks: View) -> str:
    return (
        f"{label(has.ref)} has {prefix!r} before {count} names that {label(lacks.ref)} has without it: taken for the "
        "same tensors"
    )
