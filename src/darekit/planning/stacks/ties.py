# SPDX-License-Identifier: Apache-2.0
"""Output embeddings of stacks whose first and last slices are made of different models.

The output embedding is the last slice's, the input embedding the first one's. Where all models tie the two, the output
does; where one does not, every model of the last slice gives an output embedding, the tied ones their input embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darekit.architectures.families import TEXTS, facts_of
from darekit.checkpoints import Checkpoint
from darekit.planning.matching.equality import are_equal


@dataclass(frozen=True)
class OutputTie:
    """One output embedding. `tied`: it is the input embedding, and not written. `given`: of each checkpoint of the last
    slice, the name in the output and the stored one; none where it lacks both."""

    tied: bool
    target: str
    given: tuple[tuple[str, str] | None, ...]


def output_ties(first: Sequence[Checkpoint], last: Sequence[Checkpoint]) -> list[OutputTie]:
    """What becomes of output embeddings that can be tied, in a stack of these checkpoints."""
    everybody = [*first, *last]
    facts = [facts_of(checkpoint.config) for checkpoint in everybody]
    keys = [
        {own.relative(name): name for name in checkpoint.tensors}
        for own, checkpoint in zip(facts, everybody, strict=True)
    ]
    shapes = {
        key: checkpoint.tensors[name].shape
        for checkpoint, names in zip(everybody, keys, strict=True)
        for key, name in names.items()
    }
    found = []
    for target, source in facts[-1].possible_ties(dict.fromkeys(shapes), shapes):
        if not facts[-1].is_output_embedding(target):
            continue
        own = []
        for checkpoint, names, one in zip(everybody, keys, facts, strict=True):
            stored = target in names
            held = source in names and one.is_held(target, stored=stored)
            copy = held and stored and are_equal(checkpoint.tensors[names[target]], checkpoint.tensors[names[source]])
            own.append(stored and not copy)
        name = next((names[target] for names in keys if target in names), target)
        given = [
            (name, names[target]) if mine else (name, names[source]) if source in names else None
            for mine, names in zip(own[len(first) :], keys[len(first) :], strict=True)
        ]
        found.append(OutputTie(not any(own), name, tuple(given)))
    return found


def untied_config(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The same, saying that the output embedding is not tied."""
    if config is None:
        return None
    changed: dict[str, Any] = {**config, "tie_word_embeddings": False}
    for key in TEXTS:
        if isinstance(changed.get(key), dict):
            changed[key] = {**changed[key], "tie_word_embeddings": False}
    return changed
