# SPDX-License-Identifier: Apache-2.0
"""The one way in: everything that a command or a recipe names is opened through here.

Kinds of input that are files are in `inputs/`. Packs, which are on a floor with it, and recipes, which must be planned
to be read, come in here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from darekit.checkpoints import Checkpoint
from darekit.errors import CheckpointError, PlanError
from darekit.inputs import opening
from darekit.inputs.kinds import Opener, Opening
from darekit.machine import without_collector
from darekit.packs.opening import find_pack
from darekit.planning.nested import SUFFIXES, opener_of, result_of
from darekit.planning.plan import SHARD_SIZE, Plan, Within, make_plan
from darekit.planning.problems import Problems
from darekit.recipe import Recipe

if TYPE_CHECKING:
    from darekit.inputs.statistics import Statistics


class _Closes(Protocol):
    def close(self) -> None: ...


Closable = TypeVar("Closable", bound=_Closes)


def _find_pack(opening: Opening) -> Path | None:
    return find_pack(opening.ref, opening.search)


def _open_pack(opening: Opening) -> Checkpoint:
    from darekit.packs.reading import open_pack

    found = open_pack(opening.ref)
    try:
        return found.checkpoint(opening.base)
    except BaseException:
        found.close()
        raise


OPENERS = (
    Opener(
        "a pack", _find_pack, _open_pack, needs_base=True,
        instead="or write the whole model with `dare unpack BASE {ref} OUT`",
    ),
    *opening.OPENERS,
)  # fmt: skip


@contextmanager
def open_models(
    base: str | Path | None,
    models: Sequence[str | Path],
    *,
    search: Sequence[Path] = (),
    openers: Sequence[Opener] | None = None,
    layouts: Mapping[str, str | None] | None = None,
) -> Iterator[tuple[Checkpoint | None, tuple[Checkpoint, ...]]]:
    """Open a base, where there is one, and models (headers only); the files are closed on leaving. `layouts`: of
    adapters' experts, by name."""
    openers = (opener_of(None, (), _open_recipe), *OPENERS) if openers is None else openers
    with ExitStack() as opened:
        origin = None
        if base is not None:
            origin = opened.enter_context(closing(opening.open_base(base, search=search, openers=openers)))
        yield (
            origin,
            tuple(
                opened.enter_context(
                    closing(
                        opening.open_model(
                            model, origin, search=search, openers=openers, layout=(layouts or {}).get(str(model))
                        )
                    )
                )
                for model in models
            ),
        )


@contextmanager
def open_unrounded(
    base: str | Path, model: str | Path | Recipe, *, search: Sequence[Path] = ()
) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Open a base and one model (headers only); the files are closed on leaving.

    A model that is a recipe gives its result in float32, as it is before it is rounded to the recipe's `dtype`: the
    difference from a base of 16 bits would otherwise be as much rounding as delta.

    Raises:
        PlanError: the base is a recipe.
    """

    def whole(recipe: Recipe, ref: str, search: Sequence[Path], above: Sequence[str]) -> Checkpoint:
        return _open_recipe(replace(recipe, dtype="F32", output="model", rank=None), ref, search, above)

    if str(base).endswith(SUFFIXES):
        raise PlanError(f"{base} is a recipe: a delta is taken from a stored checkpoint; merge it first")
    with ExitStack() as opened:
        origin = opened.enter_context(closing(opening.open_base(base, search=search, openers=OPENERS)))
        if isinstance(model, Recipe):
            found = whole(model, "the recipe", search, ())
        else:
            openers = (opener_of(None, (), whole), *OPENERS)
            found = opening.open_model(model, origin, search=search, openers=openers)
        yield origin, opened.enter_context(closing(found))


def only_on_base(ref: str | Path) -> tuple[Opener, str | Path] | None:
    """Of what is a model only on top of its base: its kind, and what was found under the name; None of all else."""
    return opening.only_on_base(ref, openers=OPENERS)


@dataclass(frozen=True)
class Inputs:
    """What a recipe names, open. None: it does not open, where problems are collected.

    Attributes:
        base: the base, None without one.
        models: the models, in order.
        statistics: of the models that have some.
        others: checkpoints that give tokens and are no models, by name.
        bases: the bases that slices name, by name.
    """

    base: Checkpoint | None
    models: tuple[Checkpoint | None, ...]
    statistics: tuple[Statistics | None, ...]
    others: Mapping[str, Checkpoint]
    bases: Mapping[str, Checkpoint]

    def plan(self, recipe: Recipe, *, shard_size: int, verbatim: bool, problems: Problems | None = None) -> Plan:
        """The plan, where everything has opened; errors as `make_plan`."""
        return make_plan(
            recipe, self.base, [one for one in self.models if one is not None],
            statistics=[one for one in self.statistics if one is not None], others=self.others, bases=self.bases,
            shard_size=shard_size, verbatim=verbatim, problems=problems,
        )  # fmt: skip


@contextmanager
def open_inputs(
    recipe: Recipe, *, search: Sequence[Path] = (), openers: Sequence[Opener], problems: Problems
) -> Iterator[Inputs]:
    """Open what a recipe names (headers only); the files are closed on leaving."""
    with ExitStack() as opened:

        def enter(opening: Callable[[], Closable]) -> Closable | None:
            return problems.attempt(lambda: opened.enter_context(closing(opening())))

        def enter_base(name: str) -> Checkpoint | None:
            return enter(lambda: opening.open_base(name, search=search, openers=openers))

        def enter_model(name: str, layout: str | None = None) -> Checkpoint | None:
            if base is None and recipe.base_model is not None and _needs_base(name, search, openers):
                return None  # the base has not opened, and that was told
            return enter(lambda: opening.open_model(name, base, search=search, openers=openers, layout=layout))

        base = None if recipe.base_model is None else enter_base(recipe.base_model)
        names = [entry.model for entry in recipe.models]

        def enter_statistics(name: str) -> Statistics | None:
            from darekit.inputs.statistics import open_statistics

            return enter(lambda: open_statistics(name, search=search))

        models = [enter_model(entry.model, entry.experts_layout) for entry in recipe.models]
        statistics = [enter_statistics(entry.stats) for entry in recipe.models if entry.stats is not None]
        others = {}
        for name in recipe.tokens.models if recipe.tokens else ():
            if name not in names and not (name == "base" and recipe.base_model is not None):
                others[name] = enter_model(name)
        known = dict(zip(names, models, strict=True))
        known |= {} if recipe.base_model is None else {recipe.base_model: base}
        bases = {}
        for name in dict.fromkeys(one.base[0] for one in recipe.slices if one.base):
            bases[name] = known[name] if name in known else enter_base(name)
        yield Inputs(base, tuple(models), tuple(statistics), _there(others), _there(bases))


def _needs_base(ref: str, search: Sequence[Path], openers: Sequence[Opener]) -> bool:
    try:
        return opening.only_on_base(ref, search=search, openers=openers) is not None
    except CheckpointError:  # told when it is opened
        return False


def _there(found: Mapping[str, Checkpoint | None]) -> dict[str, Checkpoint]:
    return {name: one for name, one in found.items() if one is not None}


@contextmanager
def open_plan(
    recipe: Recipe,
    *,
    search: Sequence[Path] = (),
    shard_size: int = SHARD_SIZE,
    verbatim: bool = False,
    above: Sequence[str] = (),
    openers: Sequence[Opener] | None = None,
) -> Iterator[Plan]:
    """Open the recipe's checkpoints (headers only) and plan; the files are closed on leaving.

    `verbatim`: tied copies and buffers are tensors like others, where all checkpoints store the same names. `above`:
    the recipes that this one is a model of. `openers`: the kinds of input, besides recipes; None: all there are.
    """
    openers = OPENERS if openers is None else openers
    within: list[Within] = []
    kinds = (open_nested(recipe, openers, above, within), *openers)
    with ExitStack() as opened:
        with without_collector():
            inputs = opened.enter_context(open_inputs(recipe, search=search, openers=kinds, problems=Problems()))
            plan = inputs.plan(recipe, shard_size=shard_size, verbatim=verbatim)
        yield replace(plan, within=tuple(within))


def open_nested(
    recipe: Recipe,
    openers: Sequence[Opener],
    above: Sequence[str] = (),
    within: MutableSequence[Within] | None = None,
) -> Opener:
    """What opens recipes that stand for models of this one; `openers`: what opens all else, in these too; `within`:
    where to put what was opened."""
    return opener_of(recipe, above, partial(_open_recipe, openers=openers, within=within))


def _open_recipe(
    recipe: Recipe,
    ref: str,
    search: Sequence[Path],
    above: Sequence[str],
    openers: Sequence[Opener] | None = None,
    within: MutableSequence[Within] | None = None,
) -> Checkpoint:
    """A recipe's result; closing it closes the files of its plan."""
    with open_plan(recipe, search=search, above=above, openers=openers) as plan:
        found, made_of = result_of(plan, ref)
    plan.__enter__()  # its files, again: they stay open as long as the result is
    if within is not None:
        within.append(made_of)
    return found
