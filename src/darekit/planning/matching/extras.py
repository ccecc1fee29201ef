# SPDX-License-Identifier: Apache-2.0
"""Tensors that a base has and its fine-tunes have not, or the other way round, and rightly so: parts that some classes
of a family are built without (heads, poolers), and parts that a class drops when it loads (token prediction).

What no class of the family can miss (a layer, an embedding) is none of these, and stays an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from darekit.architectures.depth import layer_of
from darekit.architectures.families import Facts
from darekit.checkpoints import TensorInfo
from darekit.planning.matching.naming import View
from darekit.wording import label

Extras = Literal["keep", "leave_out"]

# What names tell where no table does: poolers, the prediction of further tokens, and what stands for masked patches.
_POOLER, _DROPPED = re.compile(r"(^|\.)pooler\."), re.compile(r"(^|\.)(mtp(_\w+)?\.|mask_token$)")

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass
class Parts:
    """What names of tensors are parts that not every class has; asked once for each pattern of a name."""

    views: Sequence[View]
    known: dict[str, tuple[bool, bool]] = field(default_factory=dict)

    def is_own(self, name: str) -> bool:
        """Whether it is a head or a pooler: what a fine-tune for another task has of its own."""
        return self._of(name)[0]

    def may_be_absent(self, name: str) -> bool:
        """Whether some class of these checkpoints does without it: because it has no such part, or drops it."""
        return any(self._of(name))

    def _of(self, name: str) -> tuple[bool, bool]:
        """Whether it is a part of some classes; whether a class drops it."""
        pattern = self.views[0].facts.pattern(name)
        if layer_of(name) is not None:  # which layer it is decides
            pattern = name
        if pattern not in self.known:
            asked = {id(view.facts): view.facts for view in self.views}.values()
            own = any(_is_part(facts, name) for facts in asked)
            dropped = _DROPPED.search(name) is not None or self._is_beyond(name)
            dropped = dropped or any(facts.ignored_when_unexpected(name) for facts in asked)
            self.known[pattern] = own, dropped
        return self.known[pattern]

    def _is_beyond(self, name: str) -> bool:
        """Whether it belongs to a layer behind the last one that the configs tell of."""
        layer = layer_of(name)
        if layer is None:
            return False
        counts = [_depth(view.checkpoint.config) for view in self.views]
        known = [count for count in counts if count is not None]
        return bool(known) and layer.index >= max(known) and layer.stack.rpartition(".")[2] == "layers"


def _is_part(facts: Facts, name: str) -> bool:
    known = facts.is_head(name) or facts.is_optional(name) or facts.is_lacking(name)
    return known or _POOLER.search(name) is not None


def _depth(config: Mapping[str, Any] | None) -> int | None:
    found = [config[key] for key in _LAYERS if config and isinstance(config.get(key), int)]
    return found[0] if found else None


def settle_extras(
    views: Sequence[View], *, giver: View | None, extras: Extras, notes: list[str]
) -> tuple[dict[str, TensorInfo], frozenset[str]]:
    """Take from the views what need not be everywhere, and say what became of it.

    Args:
        views: of the base, then of the models; heads that one of them gives are out already.
        giver: who gives the heads: the output has exactly what it has. None: heads are merged.
        extras: what becomes of what only the base has.
        notes: gets what the user should know.

    Returns:
        what only the giver has, to be taken as it is; and the keys of what only the base has, which is kept.
    """
    base, models = views[0], views[1:]
    if all(view.tensors.keys() == base.tensors.keys() for view in models):
        return {}, frozenset()
    parts = Parts(views)
    if giver is not None and giver is not base:
        return _as_the_giver(views, giver, parts, notes), frozenset()
    foreign = _foreign(base, models, parts.may_be_absent)
    if giver is None and any(parts.is_own(info.name) for info in foreign.values()):
        return {}, frozenset()  # nothing is guessed: what is told of it names `heads`
    if foreign:
        _remove(views, foreign)
        notes.append(f"only models have {_told(foreign.values())}, which {label(base.ref)} lacks: left out")
    alone = {
        key: info
        for key, info in base.tensors.items()
        if not any(key in view.tensors for view in models)
        and parts.may_be_absent(info.name)
        # A model whose own class has this head has lost it.
        and not any(view.facts.has_head(info.name) for view in models)
    }
    if not alone:
        return {}, frozenset()
    told = f"only {label(base.ref)} has {_told(alone.values())}"
    if giver is None and extras == "leave_out":
        _remove(views, alone)
        notes.append(f"{told}: left out")
        return {}, frozenset()
    notes.append(f"{told}: kept as they are" + ("; base_extras: leave_out leaves them out" if giver is None else ""))
    return {}, frozenset(alone)


def leave_out_extras(views: Sequence[View], notes: list[str]) -> None:
    """Leave out what not all have and need not have, of a comparison."""
    parts = Parts(views)
    everything = {key: info for view in views for key, info in view.tensors.items()}
    unlike = {
        key: info
        for key, info in everything.items()
        if not all(key in view.tensors for view in views) and parts.may_be_absent(info.name)
    }
    if unlike:
        _remove(views, unlike)
        notes.append(f"not all models have {_told(unlike.values())}: left out")


def _as_the_giver(views: Sequence[View], giver: View, parts: Parts, notes: list[str]) -> dict[str, TensorInfo]:
    """The output has what this model has: nothing that it lacks, and of what the base lacks its own."""
    base = views[0]
    absent = {
        key: info
        for view in views
        for key, info in view.tensors.items()
        if key not in giver.tensors and parts.may_be_absent(info.name)
    } | _absent_towers(base, views[1:])
    if absent:
        _remove(views, absent)
        notes.append(
            f"{label(giver.ref)}, whose heads the output has, has no {_told(absent.values(), count=False)}: left out"
        )
    taken = _foreign(base, (giver,), parts.may_be_absent)
    if taken:
        _remove(views, taken)
        notes.append(f"{_told(taken.values())}, which {label(base.ref)} lacks, are taken from {label(giver.ref)}")
    return taken


def _absent_towers(base: View, models: Sequence[View]) -> dict[str, TensorInfo]:
    """Whole towers of which no model has anything, and what goes with them: classifiers of sounds have no decoder,
    those of pictures no text, and no scale of similarities between the two."""
    first = {key: key.split(".")[0] for key in base.tensors}
    gone = {*first.values()} - {key.split(".")[0] for view in models for key in view.tensors}
    if not any(first[key] in gone and layer_of(info.name) is not None for key, info in base.tensors.items()):
        return {}
    return {key: info for key, info in base.tensors.items() if first[key] in gone}


def _foreign(base: View, models: Iterable[View], wanted: Callable[[str], bool]) -> dict[str, TensorInfo]:
    """What models have and the base lacks, and that is `wanted` by its name."""
    return {
        key: info
        for view in models
        for key, info in view.tensors.items()
        if key not in base.tensors and wanted(info.name)
    }


def _remove(views: Iterable[View], keys: Iterable[str]) -> None:
    for key in list(keys):
        for view in views:
            view.tensors.pop(key, None)


def _told(infos: Iterable[TensorInfo], *, count: bool = True) -> str:
    """How many tensors, and the parts of the model that they are: 29 tensors (mtp.*)."""
    names = [info.name for info in infos]
    parts = list(dict.fromkeys(part_of(name) for name in names))
    shown = ", ".join(parts[:4]) + (", ..." if len(parts) > 4 else "")
    if not count:
        return shown
    return f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} ({shown})"


def part_of(name: str) -> str:
    """The part of a model that a tensor belongs to, as a pattern.

    >>> names = "mtp.layers.0.norm.weight", "bert.pooler.dense.bias", "model.layers.61.eh_proj.weight"
    >>> [part_of(name) for name in names]
    ['mtp.*', 'bert.pooler.*', 'model.layers.61.*']
    """
    words = name.split(".")
    if words[0] in ("mtp", "cls") or len(words) < 3:
        return f"{words[0]}.*" if len(words) > 1 else name
    layer = layer_of(name)
    if layer is not None:
        return f"{layer.stack}.{layer.index}.*"
    return ".".join(words[:2]) + ".*"
