# SPDX-License-Identifier: Apache-2.0
"""What a plan is made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from darekit.architectures.depth import Depths
from darekit.checkpoints import Checkpoint
from darekit.planning.buffers import Role
from darekit.planning.matching.alignment import AlignedTensor, Alignment
from darekit.planning.settings import ModelSettings, Settings
from darekit.recipe import Recipe

if TYPE_CHECKING:
    from darekit.inputs.statistics import Statistics


@dataclass(frozen=True)
class Draft:
    """A recipe and open checkpoints, aligned and resolved: steps, summaries and notes are made from it.

    `settings`: by tensor. `seeds`: each model's effective seed, None where nothing is drawn. `statistics`: one of each
    model, where the method uses them. `roles`: what is no weight. `counters`: who gives each counter. `shared`: what
    steps with equal settings have in common, made once.
    """

    recipe: Recipe
    models: tuple[Checkpoint, ...]
    alignment: Alignment
    depths: Depths
    settings: Mapping[str, Settings]
    seeds: tuple[int | None, ...]
    statistics: tuple[Statistics, ...] = ()
    roles: Mapping[str, Role] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)

    def merged(self) -> Iterator[tuple[AlignedTensor, int, ModelSettings]]:
        """Every tensor with every model that has a say about it, and what holds there."""
        for tensor in self.alignment.tensors:
            for k, settings in enumerate(self.settings[tensor.name].models):
                if settings is not None:
                    yield tensor, k, settings
