# SPDX-License-Identifier: Apache-2.0
"""The live model in which one recipe after another is tried: never more than one model in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darekit.checkpoints.tokenizers import files_digest
from darekit.live.models import LiveModel, build
from darekit.planning import checks
from darekit.planning.opening import open_plan
from darekit.planning.plan import Plan
from darekit.planning.travel.beside import companions_of
from darekit.recipe import Recipe
from darekit.recipe.origins import Origin, require, used_by


@dataclass(frozen=True)
class Place:
    """Where recipes are tried.

    Attributes:
        search: folders in which relative names are looked up after the working directory.
        device: cpu, cuda or mps; None: the fastest.
        dtype: what models compute in; None: float32 on a CPU.
        threads: that merge; None: one per processor.
        origins: of methods that are not built in, which another process must know too.
    """

    search: tuple[Path, ...] = ()
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    origins: tuple[Origin, ...] = ()


class Bench:
    """One live model whose weights are replaced by those of one recipe after another."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._live: LiveModel | None = None
        self._kind: Any = None

    def put(self, recipe: Recipe, *, say: Callable[[str], None] | None = None) -> LiveModel:
        """The model of a recipe. What `dare merge` would refuse as a bad idea is said, not refused; without `say` it
        is not looked for, which saves the reading of a sample.

        Raises:
            DarekitError: it cannot be made; `drop` it then, as its weights may be half replaced.
        """
        require(one for one in self.place.origins if one.name in used_by(recipe))
        with open_plan(recipe, search=self.place.search) as plan:
            if say is not None:
                checks.check(plan, force=True, say=say)
            return self._put(plan)

    def drop(self) -> None:
        """Forget the model."""
        self._live, self._kind = None, None

    def _put(self, plan: Plan) -> LiveModel:
        kind = _kind(plan)
        if self._live is None or kind != self._kind:
            self.drop()
            gc.collect()  # the old model goes before the new one comes
            self._live = build(plan, device=self.place.device, dtype=self.place.dtype)
            self._kind = kind
        else:
            self._live.put(plan, threads=self.place.threads)
        return self._live


def _kind(plan: Plan) -> Any:
    """Plans of one kind fill the same live model: equal shapes, config and tokenizer."""
    companions = companions_of(plan)
    shapes = tuple((place.name, place.shape, place.dtype) for shard in plan.shards for place in shard.placements)
    return shapes, companions.config, files_digest(companions.files), sorted(companions.files)


def reason_of(error: Exception) -> str:
    """Why a recipe could not be tried, in words."""
    from darekit.errors import DarekitError

    return str(error) if isinstance(error, DarekitError) else f"{type(error).__name__}: {error}".rstrip(": ")


def shared_threads(threads: int | None, places: int) -> int:
    """Threads for each of several places on one machine."""
    from darekit.machine import default_threads, threads_of

    return max(1, default_threads() // places) if threads is None else threads_of(threads)


def origins_in(recipes: Sequence[Recipe]) -> tuple[Origin, ...]:
    """Of the methods that recipes use, those that are not built in."""
    from darekit.recipe.origins import origins_of

    return tuple(dict.fromkeys(one for recipe in recipes for one in origins_of(recipe)))
