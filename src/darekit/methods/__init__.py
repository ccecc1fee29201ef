# SPDX-License-Identifier: Apache-2.0
"""The table of methods: one line each. It drives the recipes, the command line, the docs, the tests and the bench."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from darekit.methods import informed, merging, sparsifiers
from darekit.methods.parameters import Choice, Number, Parameter, Switch, parameters_of

Scope = Literal["element", "row", "tensor"]


@dataclass(frozen=True)
class Sparsifier:
    """One delta -> one delta. `scope`: how much of a tensor the function must see at once."""

    function: Callable[..., Any]
    scope: Scope
    random: bool
    unbiased: bool = False  # random drop with rescale: each element keeps its expectation

    @property
    def name(self) -> str:
        """The word in recipes."""
        return self.function.__name__

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The function's parameters."""
        return parameters_of(self.function)


@dataclass(frozen=True)
class MergeMethod:
    """K deltas -> one.

    `trims`: each delta is first trimmed to its largest `keep` fraction. `keeps_one`: of a single delta with weight 1
    it makes that delta, so that an untouched model can be copied to the bit. `statistics`: what it must know of each
    model besides its weights (`darekit.methods.informed`); a tensor without them is averaged. `rows`: length of a row
    -> how many rows the function takes at once, whatever the tile is.
    """

    function: Callable[..., Any]
    scope: Scope = "element"
    needs_base: bool = True
    trims: bool = False
    keeps_one: bool = False
    statistics: Literal["fisher", "gram"] | None = None
    rows: Callable[[int], int] | None = None

    @property
    def name(self) -> str:
        """The word in recipes."""
        return self.function.__name__

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The function's parameters, and those that come with the way the method is run."""
        extra = parameters_of(_trim) if self.trims else {}
        scale = parameters_of(_scale) if self.needs_base else {}
        return extra | parameters_of(self.function) | scale


def _trim(
    *,
    keep: Annotated[float, Number("fraction of largest magnitudes that survives the trim; 1: no trim", 0, 1)] = 1.0,
    trim: Annotated[
        str, Choice("what is trimmed to `keep`: each tensor, or the whole model", ("tensor", "model"))
    ] = "tensor",
) -> None: ...


def _scale(*, lambda_: Annotated[float, Number("scale of the merged delta", per_model=False)] = 1.0) -> None: ...


SPARSIFIERS: dict[str, Sparsifier] = {
    entry.name: entry
    for entry in (
        Sparsifier(sparsifiers.dare, "element", random=True, unbiased=True),
        Sparsifier(sparsifiers.drop_only, "element", random=True),
        Sparsifier(sparsifiers.magnitude, "tensor", random=False),
        Sparsifier(sparsifiers.della, "row", random=True, unbiased=True),
        Sparsifier(sparsifiers.breadcrumbs, "tensor", random=False),
    )
}

MERGE_METHODS: dict[str, MergeMethod] = {
    entry.name: entry
    for entry in (
        MergeMethod(merging.linear, needs_base=False, keeps_one=True),
        MergeMethod(merging.task_arithmetic, keeps_one=True),
        MergeMethod(merging.ties, trims=True, keeps_one=True),
        MergeMethod(informed.fisher, needs_base=False, keeps_one=True, statistics="fisher"),
        MergeMethod(
            informed.regmean, "row", needs_base=False, keeps_one=True, statistics="gram", rows=informed.rows_at_once
        ),
    )
}

MERGE_ALIASES: dict[str, str] = {"average": "linear"}

WEIGHT = Parameter("weight", Number("the model's factor in the merge"), 1.0)
TAU = Parameter(
    "tau",
    Number("with drop_rate: auto: the relative perturbation of a layer's output that it may cause", 0.001, 1),
    None,
)
SEED = Parameter("seed", Number("effective seed of the model's mask, used as it is", 0, 2**64 - 1), None)

__all__ = [
    "MERGE_ALIASES",
    "MERGE_METHODS",
    "SEED",
    "SPARSIFIERS",
    "TAU",
    "WEIGHT",
    "Choice",
    "MergeMethod",
    "Number",
    "Parameter",
    "Sparsifier",
    "Switch",
]
