# SPDX-License-Identifier: Apache-2.0
"""Checkpoints under the names that the loader knows: one view of each, whatever its tensors are called in files.

A key is a tensor's name in memory without the prefix of the base model, so that a bare encoder and one with a head on
it, a wrapped model and an unwrapped one, old names and new ones meet. No `TensorInfo` is changed: seeds are those of
the stored model, and masks are drawn by the name that is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from darekit.architectures.families import GENERIC, Facts, facts_of, unwrapped, wrappers_in
from darekit.architectures.groups import Role, role_of
from darekit.checkpoints import Checkpoint, TensorInfo
from darekit.dtypes import dtype_named
from darekit.errors import HomologyError, NotFetched
from darekit.planning.matching.equality import are_equal, read_whole
from darekit.wording import label

POSITIONS = "position_ids"


@dataclass
class View:
    """One checkpoint's tensors by key; those that were found to be copies of others, or buffers, are apart.

    Attributes:
        checkpoint: whose they are.
        facts: what is known of it, or of the first checkpoint that something is known of.
        tensors: key -> tensor.
        keys: stored name -> key.
        word: what was taken off the beginning of all names, beside what wrappers are known to put there.
        buffers: key -> tensor that every loader makes itself.
        names: key -> the name to write where it is not the stored one.
        copies: stored name of a tied copy -> the key of the tensor that it is.
    """

    checkpoint: Checkpoint
    facts: Facts
    tensors: dict[str, TensorInfo]
    keys: Mapping[str, str]
    word: str = ""
    buffers: dict[str, TensorInfo] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    @property
    def ref(self) -> str:
        """The checkpoint, as the user wrote it."""
        return self.checkpoint.ref

    def name_of(self, key: str, info: TensorInfo | None = None) -> str:
        """The name to write a tensor under, in this checkpoint's way of naming; `info`: the tensor, where this
        checkpoint may lack it."""
        if (name := self.names.get(key)) is not None:
            return name
        own = self.tensors.get(key) or self.buffers.get(key) or info
        return key if own is None else own.name


@dataclass
class Roles:
    """What tensors are, asked once for each pattern of a name and shape."""

    facts: Facts
    known: dict[tuple[str, tuple[int, ...]], Role] = field(default_factory=dict)

    def of(self, name: str, shape: tuple[int, ...]) -> Role:
        """A tensor by one of its names -> its group, whether it is a head, which axis counts tokens."""
        pattern = self.facts.pattern(name), shape
        if (role := self.known.get(pattern)) is None:
            role = self.known[pattern] = role_of(self.facts, name, shape)
        return role


def views_of(checkpoints: Sequence[Checkpoint], notes: list[str], *, verbatim: bool = False) -> list[View]:
    """All checkpoints under the names that the loader knows; what was done to names is noted.

    `verbatim`: under the names that are stored, and all of them.

    Raises:
        HomologyError: two tensors of one checkpoint, of different values, have one name for the loader.
    """
    own = [facts_of(checkpoint.config) for checkpoint in checkpoints]
    fallback = next((facts for facts in own if facts.is_known), GENERIC)
    shared: list[Facts] = []  # one object for equal facts: it remembers its answers
    for i, facts in enumerate(own):
        found = facts if facts.is_known else fallback
        shared.append(next((one for one in shared if one == found), found))
        own[i] = shared[-1]
    if verbatim:
        stored = {name: name for name in checkpoints[0].tensors}
        return [View(one, facts, dict(one.tensors), stored) for one, facts in zip(checkpoints, own, strict=True)]
    prefixes = tuple(dict.fromkeys(facts.prefix for facts in own if facts.prefix))
    views: list[View] = []
    for checkpoint, facts in zip(checkpoints, own, strict=True):
        like = next((one for one in views if one.facts is facts and _same_names(one.checkpoint, checkpoint)), None)
        views.append(_view(checkpoint, facts, prefixes, like, notes))
    return views


def _same_names(one: Checkpoint, other: Checkpoint) -> bool:
    return one.tensors.keys() == other.tensors.keys()


def _view(checkpoint: Checkpoint, facts: Facts, prefixes: Sequence[str], like: View | None, notes: list[str]) -> View:
    keys, word = (like.keys, like.word) if like else _keys(facts, checkpoint.tensors, prefixes)
    view = View(checkpoint, facts, {}, keys, word)
    rebuilt: dict[tuple[str, tuple[int, ...]], bool] = {}
    for name, info in checkpoint.tensors.items():
        key, at = keys[name], (facts.pattern(name), info.shape)
        if at not in rebuilt:
            rebuilt[at] = facts.is_rebuilt(name, info.shape)
        if rebuilt[at]:
            view.buffers[key] = info
        elif key in view.tensors:
            _refuse_unequal(view, key, info)
            view.copies[name] = key
        else:
            view.tensors[key] = info
    if facts.is_known and (like is None or like.names):
        _unwrap(view, notes)
    return view


def _keys(facts: Facts, names: Collection[str], prefixes: Sequence[str]) -> tuple[dict[str, str], str]:
    """Stored name -> key; and what was before all names, to make them so. Training frameworks keep the model as an
    attribute (`model.`), and save it with that attribute's name: taken off where more names are the family's then."""
    plain = _plain_keys(facts, names, prefixes)
    word = next((unwrapped(name).partition(".")[0] for name in names), "") + "."
    if not facts.is_known or facts.begins_with(word) or not all(unwrapped(name).startswith(word) for name in names):
        return plain, ""
    short = {name: unwrapped(name).removeprefix(word) for name in names}
    keys = _plain_keys(facts, short.values(), prefixes)
    stripped = {name: keys[bare] for name, bare in short.items()}
    if sum(map(facts.has_part, stripped.values())) > sum(map(facts.has_part, plain.values())):
        return stripped, word
    return plain, ""


def _plain_keys(facts: Facts, names: Iterable[str], prefixes: Sequence[str]) -> dict[str, str]:
    """A prefix that only other checkpoints' classes have counts before a part of the base model."""
    found = facts.canonicals(names)
    for prefix in prefixes:
        begin = f"{prefix}."
        for name, memory in found.items():
            if memory.startswith(begin):
                rest = memory[len(begin) :]
                if prefix == facts.prefix or rest.partition(".")[0] in facts.parts:
                    found[name] = rest
    return found


def _refuse_unequal(view: View, key: str, info: TensorInfo) -> None:
    """Two stored tensors have one name for the loader: equal values are one tensor."""
    first = view.tensors[key]
    if not are_equal(first, info):
        raise HomologyError(
            f"{view.ref} stores {first.name} and {info.name}, which are one tensor to the loader ({key}), with "
            "different values. Remove one of them, or save the model again with `save_pretrained`"
        )


def _unwrap(view: View, notes: list[str]) -> None:
    """What wrappers and frameworks put into names is not written."""
    found: dict[str, int] = {}
    wrapped: dict[str, tuple[str, ...]] = {}
    for key, info in (*view.tensors.items(), *view.buffers.items()):
        pattern = view.facts.pattern(info.name)
        if pattern not in wrapped:
            wrapped[pattern] = (*wrappers_in(info.name), *([view.word] if view.word else ()))
        if wrapped[pattern]:
            view.names[key] = unwrapped(info.name).removeprefix(view.word)
            for one in wrapped[pattern]:
                found[one] = found.get(one, 0) + 1
    if found:
        words = ", ".join(f"{one!r} in {count} names" for one, count in found.items())
        notes.append(f"{label(view.ref)} has parts of names that a training wrapper added ({words}): left out")


def buffers_of(views: Sequence[View], notes: list[str]) -> dict[str, TensorInfo]:
    """Key -> buffer of the first checkpoint, to be copied: every loader makes it anew, whatever it says.

    Positions that are not 0, 1, 2, ... as integers are left out, as a conversion took them along.
    """
    kept = {key: info for key, info in views[0].buffers.items() if not key.endswith(POSITIONS) or _counts_up(info)}
    for view in views:
        unlike = [key for key in view.buffers if key not in kept]
        if unlike:
            notes.append(f"{label(view.ref)}: {len(unlike)} buffers that the loader rebuilds are left out")
    return kept


def _counts_up(info: TensorInfo) -> bool:
    dtype = dtype_named(info.dtype)
    if dtype.kind != "int" or not info.count:
        return False
    try:
        found = read_whole(info).view(dtype.numpy)
    except NotFetched:  # as nearly all do
        return True
    return np.array_equal(found, np.arange(info.count, dtype=found.dtype))
