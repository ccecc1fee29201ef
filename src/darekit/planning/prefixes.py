# SPDX-License-Identifier: Apache-2.0
"""A prefix that one checkpoint has before its names and another has not, where nobody knows the class.

Training frameworks keep the model as an attribute (`model.`, `student.`), and save it with that attribute's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from darekit.planning.naming import View
from darekit.wording import label


def fit_prefixes(views: Sequence[View], notes: list[str]) -> None:
    """Give models the reference's keys where one prefix is all that keeps most of their names apart."""
    reference = views[0]
    ours = reference.tensors
    for view in views[1:]:
        theirs = view.tensors
        if theirs.keys() == ours.keys():
            continue
        extra = [key for key in theirs if key not in ours]
        missing = [key for key in ours if key not in theirs]
        for longer, shorter, has, lacks in ((extra, missing, view, reference), (missing, extra, reference, view)):
            prefix = _prefix_of(longer, shorter)
            if prefix is None:
                continue
            moved = {f"{prefix}{key}": key for key in shorter if f"{prefix}{key}" in set(longer)}
            names = moved if has is view else {short: long for long, short in moved.items()}
            view.tensors = {names.get(key, key): info for key, info in theirs.items()}
            view.copies = {name: names.get(key, key) for name, key in view.copies.items()}
            notes.append(
                f"{label(has.ref)} has {prefix!r} before {len(moved)} names that {label(lacks.ref)} has without it: "
                "taken for the same tensors"
            )
            break


def _prefix_of(longer: Collection[str], shorter: Collection[str]) -> str | None:
    """The one prefix with which all the shorter names are the longer ones; None: there is none."""
    firsts = Counter(name.partition(".")[0] for name in longer)
    if not firsts or not shorter:
        return None
    (word, count), *_ = firsts.most_common(1)
    there = set(longer)
    found = sum(f"{word}.{name}" in there for name in shorter)
    return f"{word}." if found and found == len(shorter) == count else None
