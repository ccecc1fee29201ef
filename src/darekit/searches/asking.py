# SPDX-License-Identifier: Apache-2.0
"""Judging one candidate: its recipe goes into a live model, which is asked rung by rung, until it is hopeless."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from darekit.errors import DataError
from darekit.evaluation.items import Itemised, Items, sizes_of
from darekit.evaluation.scores import Score
from darekit.live.models import LiveModel
from darekit.recipe import Recipe
from darekit.recipe.documents import Places
from darekit.searches.racing import Race
from darekit.searches.sheets import Sheet
from darekit.trials.identities import digest_of
from darekit.trials.judging import Specs, asked, judge_in, make_judges
from darekit.trials.models import Bench, Place, reason_of

COMPLETE, STOPPED, FAILED = "complete", "stopped", "failed"


@dataclass(frozen=True)
class Task:
    """One candidate.

    Attributes:
        recipe: what is judged.
        split: by whose judges.
        rungs: shares of the items; after each but the last a hopeless one is stopped.
        race: what it is held against.
        look: whether to say what `dare merge` would refuse.
        params: what the sampler chose, for whoever judges without a model.
    """

    recipe: Recipe
    split: str = "validation"
    rungs: tuple[float, ...] = (1.0,)
    race: Race = field(default_factory=Race)
    look: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rung:
    """How a candidate stood after a share of the items: `scores` and `differences` in JSON-able form."""

    share: float
    items: int
    scores: Mapping[str, Any]
    against: str | int | None
    differences: Mapping[str, Any]

    def to_data(self) -> dict[str, Any]:
        """As a line of `trials.jsonl` has it."""
        return {
            "share": round(self.share, 4), "items": self.items, "scores": self.scores, "against": self.against,
            "differences": self.differences,
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What came of a candidate.

    Attributes:
        state: complete, stopped or failed.
        sheet: its answers.
        rungs: how it stood, rung by rung.
        error: why it failed; None where it did not.
        warnings: said while it was made.
        seconds: of all.
    """

    state: str
    sheet: Sheet = field(default_factory=Sheet)
    rungs: tuple[Rung, ...] = ()
    error: str | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


class Panel(Protocol):
    """Whatever can be asked rung by rung."""

    @property
    def order(self) -> Sequence[str]:
        """Names of the judges."""

    def ask(self, live: Any, before: Sheet, share: float) -> Sheet:
        """The answers up to a share of the items, given those so far."""
        ...


@dataclass
class Judges:
    """The judges of one split. `whole`: names of those that are asked as a whole, though they could do otherwise, as a
    goal is no mean over their items."""

    judges: Mapping[str, Any]
    whole: frozenset[str] = frozenset()
    _orders: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)

    @property
    def order(self) -> Sequence[str]:
        """Names of the judges."""
        return tuple(self.judges)

    def ask(self, live: LiveModel, before: Sheet, share: float) -> Sheet:
        """The answers up to a share of the items. Who can only be asked as a whole is asked first."""
        items, whole, sizes = dict(before.items), dict(before.whole), dict(before.sizes)
        for name, judge in self.judges.items():
            known = any(judge_in(score) == name for score in whole)
            groups = {} if name in self.whole or known else sizes_of(judge)
            if not groups and not known:
                whole |= asked(name, judge, live)
            if not groups:
                continue
            found = self._asked(name, judge, live, groups, before, share)
            if found is None:  # it has no score that is a mean over items
                whole |= asked(name, judge, live)
                continue
            for score, new in found.items():
                items[score] = items[score] + new if score in items else new
                sizes[score] = groups[new.group]
        return Sheet(items, whole, sizes)

    def _asked(
        self, name: str, judge: Itemised, live: LiveModel, groups: Mapping[str, int], before: Sheet, share: float
    ) -> dict[str, Items] | None:
        """What comes to the answers so far; None where the judge's scores are no means over items."""
        places: dict[str, Sequence[int]] = {}
        for group, size in groups.items():
            done = max((len(one) for n, one in before.items.items() if judge_in(n) == name and one.group == group),
                       default=0)  # fmt: skip
            places[group] = self._order(name, group, size)[done : count_of(share, size)].tolist()
        if not any(places.values()):
            return {}
        found = judge.ask(live, places)
        for metric, one in found.items():
            if not math.isfinite(float(np.sum(one.sums))):
                raise DataError(f"{name}/{metric} is not finite")
        return {f"{name}/{metric}": one for metric, one in found.items()} or None

    def _order(self, name: str, group: str, size: int) -> Any:
        """All items of a group, shuffled once and for all: files are often sorted, and a rung must be like the rest."""
        if (name, group) not in self._orders:
            seed = int(digest_of("items", name, group, size)[:16], 16)
            self._orders[name, group] = np.random.Generator(np.random.Philox(seed)).permutation(size)
        return self._orders[name, group]


def count_of(share: float, size: int) -> int:
    """How many of so many items a rung asks: at least two, where there are two."""
    return size if share >= 1 else min(size, max(2, round(share * size)))


def judged(panel: Panel, live: Any, task: Task, began: float, warnings: Sequence[str] = ()) -> Answer:
    """Ask a model rung by rung, until it is hopeless or was asked everything."""
    sheet, rungs, state = Sheet(), [], COMPLETE
    blends = [goal.blend for goal in task.race.goals if goal.blend is not None]
    for share in task.rungs:
        sheet = panel.ask(live, sheet, share)
        against, found = task.race.against(sheet)
        rungs.append(Rung(
            share, sheet.asked, sheet.scores(panel.order, blends), against,
            {score: {"value": one.value, "stderr": one.stderr} for score, one in found.items()},
        ))  # fmt: skip
        if share < 1 and task.race.is_hopeless(sheet):
            state = STOPPED
            break
    return Answer(state, sheet, tuple(rungs), None, tuple(warnings), time.perf_counter() - began)


class Asker:
    """The work of a search in one place: one live model whose weights are replaced, and the judges."""

    def __init__(
        self, at: Places, specs: Specs, folders: Sequence[Path], place: Place, whole: frozenset[str] = frozenset()
    ) -> None:
        self.bench = Bench(place)
        self.panels = {split: Judges(named, whole) for split, named in make_judges(at, specs, folders).items()}

    def __call__(self, task: Task) -> Answer:
        """Judge one candidate; whatever goes wrong is in the answer."""
        began = time.perf_counter()
        warnings: list[str] = []
        try:
            live = self.bench.put(task.recipe, say=warnings.append if task.look else None)
            return judged(self.panels[task.split], live, task, began, warnings)
        except Exception as failure:  # also a judge's, torch's, transformers': the others must not suffer
            self.bench.drop()
            return Answer(FAILED, error=reason_of(failure), warnings=tuple(warnings),
                          seconds=time.perf_counter() - began)  # fmt: skip


def scores_in(sheet: Sheet, order: Sequence[str]) -> dict[str, Score]:
    """All scores of a sheet, with the mean."""
    return {
        name: Score(one["value"], one["stderr"], one["higher_is_better"]) for name, one in sheet.scores(order).items()
    }
