# SPDX-License-Identifier: Apache-2.0
"""The config of an output whose layers come from slices; or why no config can say what its layers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from darekit.architectures.parts import part_named
from darekit.architectures.stacking import Source, restacked, told_apart
from darekit.checkpoints import Checkpoint
from darekit.errors import PlanError
from darekit.planning.stacks.stack import Origin, Tower


def config_of(donor: Checkpoint, towers: Sequence[Tower]) -> tuple[Mapping[str, Any] | None, list[str]]:
    """The donor's config for stacks of layers, and what the user should know; None where it has none.

    Raises:
        PlanError: no config can be true of these layers.
    """
    config = donor.config
    notes: list[str] = []
    if config is None:
        return None, []
    for tower in towers:
        part = part_named(f"{tower.name}.0.x")
        layers = [[_source(one, config) for one in origins] for origins in tower.layers]
        own = [one for origins in tower.layers for one in origins]
        count = next((one.count for one in own if one.checkpoint.ref == donor.ref), own[0].count)
        found = restacked(config, part, layers, count, tower.name)
        problems = [*found.problems, *_unexplained(tower, part, config)]
        if problems:
            raise PlanError(
                f"config.json of {donor.ref} cannot describe these slices:\n  "
                + "\n  ".join(dict.fromkeys(problems))
                + "\nChoose slices whose kinds of layers come in an order that it can express"
            )
        config = found.config
        notes += found.notes
    return config, list(dict.fromkeys(notes))


def _source(one: Origin, otherwise: Mapping[str, Any]) -> Source:
    return Source(otherwise if one.checkpoint.config is None else one.checkpoint.config, one.index, one.count)


def _unexplained(tower: Tower, part: str, otherwise: Mapping[str, Any]) -> list[str]:
    """Layers with other tensors than a model has there, where nothing that is known in its config tells them apart."""
    by_kind: dict[Any, set[Any]] = {}
    for origins in tower.layers:
        for one in origins[:1]:
            source = _source(one, otherwise)
            kind = id(one.checkpoint), told_apart(source.config, part, source.index, source.count)
            by_kind.setdefault(kind, set()).add(one.tensors)
    if all(len(classes) == 1 for classes in by_kind.values()):
        return []
    moved = [i for i, origins in enumerate(tower.layers) if origins[0].index != i]
    if not moved or _begins_alike(tower):
        return []
    first = tower.layers[moved[0]][0]
    return [
        f"layers of {first.checkpoint.ref} have different tensors, and nothing known in config.json says which layer "
        f"has which, so none can be moved (layer {moved[0]} would be its layer {first.index})"
    ]


def _begins_alike(tower: Tower) -> bool:
    """Whether only a few first layers are special, and the output begins with layers of these kinds, too (RWKV's first
    layer has a norm more)."""
    found = [origins[0] for origins in tower.layers]
    known: dict[int, Any] = {}
    for one in found:
        if known.setdefault(one.index, one.tensors) != one.tensors:
            return False
    rest = found[-1].tensors
    special = max((i for i, tensors in known.items() if tensors != rest), default=-1) + 1
    alike = all(one.tensors == known.get(i) for i, one in enumerate(found[:special]))
    return alike and all(one.tensors == rest for one in found[special:])
