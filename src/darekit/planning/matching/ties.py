# SPDX-License-Identifier: Apache-2.0
"""Tensors that are one: decided by stored values, and by the architecture where nothing is stored.

A copy that is stored and differs from its source is a tensor of its own, whatever the config says: the loader reads it
as one. One that is equal, where the config ties it, is no tensor: it is written once, and merged once. One that is not
stored is the source's where the architecture ties it, and missing elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from darekit.planning.matching.equality import are_equal
from darekit.planning.matching.naming import View
from darekit.wording import label

Status = Literal["own", "copy", "tied", "none"]


@dataclass(frozen=True)
class Possible:
    """A tensor that may be another's, both by key."""

    target: str
    source: str


def settle_ties(views: Sequence[View], notes: list[str]) -> bool | None:
    """Fold what is one tensor in all views, and give every view what is a tensor of its own in one of them.

    Returns:
        whether the output embedding is tied, where any checkpoint stores one; None: nothing is to be said of it.
    """
    verdict: bool | None = None
    for tie in _possible(views):
        _stand_in(views, tie)
        found = [_status(view, tie) for view in views]
        output = any(view.facts.is_output_embedding(tie.target) for view in views)
        if "own" in found:
            for view, status in zip(views, found, strict=True):
                if status == "tied":
                    name = next(one.name_of(tie.target) for one in views if tie.target in one.tensors)
                    view.tensors[tie.target] = replace(view.tensors[tie.source], name=name)
                    notes.append(
                        f"{label(view.ref)} ties {name} to {view.name_of(tie.source)}, but others do not: the output "
                        "is untied"
                    )
            if output and any(view.facts.is_held(tie.target, stored=True) for view in views):
                verdict = False
        else:
            for view, status in zip(views, found, strict=True):
                if status == "copy":
                    view.copies[view.tensors.pop(tie.target).name] = tie.source
            verdict = True if output and verdict is None else verdict
    if verdict is False:
        _write_out(views)
    return verdict


def has_own_head(views: Sequence[View]) -> bool | None:
    """Of tensors under their stored names: False where an output embedding differs from what the config ties it to.

    None where it does not, or where a config that says so would untie what is not stored.
    """
    view = views[0]
    names = {view.facts.key(name): name for name in view.tensors}
    for target, source in view.facts.possible_ties(names, {}) if view.facts.is_known else ():
        found = names[target], names.get(source)
        if (
            found[1] is None
            or not view.facts.is_output_embedding(target)
            or not view.facts.is_held(target, stored=True)
        ):
            continue
        if not all(are_equal(one.tensors[found[0]], one.tensors[found[1]]) for one in views):
            rest = {key for key, of in view.facts.untied_with_output() if of in names}
            return False if rest <= names.keys() else None
    return None


def _possible(views: Sequence[View]) -> list[Possible]:
    """All ties whose target any view stores."""
    keys: Collection[str] = views[0].tensors.keys()
    if any(view.tensors.keys() != keys for view in views[1:]):
        keys = dict.fromkeys(key for view in views for key in view.tensors)
    found: dict[str, Possible] = {}
    for facts in {id(view.facts): view.facts for view in views}.values():
        shapes = {}  # of a model that the table knows they are not asked
        if not facts.is_known:
            shapes = {key: info.shape for view in reversed(views) for key, info in view.tensors.items()}
        for target, source in facts.possible_ties(keys, shapes):
            found.setdefault(target, Possible(target, source))
    return list(found.values())


def _stand_in(views: Sequence[View], tie: Possible) -> None:
    """Where the source is not stored, but its copy is, the copy is the source."""
    for view in views:
        alone = tie.source not in view.tensors and tie.target in view.tensors
        if alone and view.facts.is_held(tie.target, stored=True):
            view.tensors[tie.source] = view.tensors.pop(tie.target)


def _status(view: View, tie: Possible) -> Status:
    copy, source = view.tensors.get(tie.target), view.tensors.get(tie.source)
    held = source is not None and view.facts.is_held(tie.target, stored=copy is not None)
    if copy is None:
        return "tied" if held else "none"
    return "copy" if held and source is not None and are_equal(copy, source) else "own"


def _write_out(views: Sequence[View]) -> None:
    """A config that says untied unties more than the head: what is still one tensor is written under each name, with
    one mask and one seed, and so stays equal."""
    reference = views[0]
    for target, source in reference.facts.untied_with_output():
        if any(target in view.tensors for view in views) or source not in reference.tensors:
            continue
        stream = reference.name_of(source)
        for view in views:
            info = view.tensors.get(source)
            if info is not None:
                name = reference.facts.in_memory(target)
                view.tensors[target] = replace(info, name=name, stored=info.stored or stream)
