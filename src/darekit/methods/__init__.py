# SPDX-License-Identifier: Apache-2.0
"""The table of methods: one line each. It drives the recipes, the command line, the docs, the tests and the bench."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from darekit.methods import informed, merging, sparsifiers, spherical, surveyed
from darekit.methods.foreign import Foreign
from darekit.methods.parameters import Choice, Number, Parameter, Switch, parameters_of
from darekit.methods.spherical import Vectors
from darekit.methods.surveyed import Survey

Scope = Literal["element", "row", "tensor"]


@dataclass(frozen=True)
class Sparsifier:
    """One delta -> one delta.

    `scope`: how much of a tensor the function must see at once. `unbiased`: a random drop with rescale, so that each
    element keeps its expectation. `kernel`: how the engine does it tile by tile: a random `drop`; a drop by the `rank`
    in a row; or it can `select` by magnitude: then `selects` gives, from the parameters and a tensor's size, how many
    of the largest are dropped and how many are kept. None: through the function alone. `prepare`: parameters, elements
    and name of one tensor -> the parameters that the engine gets, or a PlanError. `foreign`: whose it is, where it is
    not built in (`darekit.methods.registry`).
    """

    function: Callable[..., Any]
    scope: Scope
    random: bool
    unbiased: bool = False
    kernel: Literal["drop", "rank", "select"] | None = None
    selects: Callable[[Mapping[str, Any], int], tuple[int, int]] | None = None
    prepare: Callable[[Mapping[str, Any], int, str], dict[str, Any]] | None = None
    foreign: Foreign | None = None

    @property
    def name(self) -> str:
        """The word in recipes."""
        return self.function.__name__ if self.foreign is None else self.foreign.name

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The function's parameters."""
        return parameters_of(self.function)


@dataclass(frozen=True)
class MergeMethod:
    """K deltas -> one.

    `kernel`: how the engine does it in float32: a weighted `sum`, `elect` signs first, or the mean of the `changes`
    alone; None: through the function.
    `models`: how many it takes besides the base, at least and at most. `trims`: each delta is first trimmed to its
    largest `keep` fraction. `keeps_one`: of a single delta with weight 1 it makes that delta, so that an untouched
    model can be copied to the bit. `mean_if`: the switch without which it is no mean, and so not the same of models as
    of deltas. `statistics`: what it must know of each model besides its weights (`darekit.methods.informed`); a tensor
    without them is averaged. `rows`: length of a row -> how many rows the function takes at once, whatever the tile is.
    `matrix`: length of a row -> bytes that it needs beside the tiles, where it works on a whole matrix.

    `products`: the function gives coefficients, from the inner products of these rows (`darekit.methods.spherical`):
    of the models, whose sum is the result, or of the deltas, whose sum is added to the base. `base_row`: the base is
    one of the rows, the first. `vectors`: from parameters of its own, which the method then has too, what is one vector
    with coefficients of its own: the tensor, each row, or each column.
    `weight_word`: what recipes call the models' weights. `sums_models`: weights of the models themselves, so that on a
    base their sum less one is the base's own.

    `survey`: what the function must know of all of a tensor first, part by part (`darekit.methods.surveyed`).
    `shaped`: the function gets deltas as (K, rows, columns), not as (K, n). `foreign`: as of a sparsifier.
    """

    function: Callable[..., Any]
    scope: Scope = "element"
    needs_base: bool = True
    kernel: Literal["sum", "elect", "changes"] | None = None
    models: tuple[int, float] = (1, float("inf"))
    trims: bool = False
    keeps_one: bool = False
    mean_if: str | None = None
    statistics: Literal["fisher", "gram"] | None = None
    rows: Callable[[int], int] | None = None
    matrix: Callable[[int], int] | None = None
    products: Literal["models", "deltas"] | None = None
    base_row: bool = False
    vectors: Callable[..., Vectors] | None = None
    weight_word: str = "weight"
    sums_models: bool = False
    survey: Survey | None = None
    shaped: bool = False
    foreign: Foreign | None = None

    @property
    def name(self) -> str:
        """The word in recipes."""
        return self.function.__name__ if self.foreign is None else self.foreign.name

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The function's parameters, and those that come with the way the method is run."""
        trim = parameters_of(_trim) if self.trims else {}
        scale = parameters_of(_scale) if self.needs_base and self.products != "models" else {}
        return trim | self.own_parameters | self._vectors | scale

    @property
    def parts_base(self) -> bool:
        """Whether a base that is also listed among the models is none of them."""
        return self.needs_base or self.products is not None

    def vectors_at(self, parameters: Mapping[str, Any]) -> Vectors:
        """What is one vector, by the method's parameters."""
        return self.vectors(**{name: parameters[name] for name in self._vectors}) if self.vectors else "tensor"

    @cached_property
    def _vectors(self) -> dict[str, Parameter]:
        return parameters_of(self.vectors) if self.vectors else {}

    @cached_property
    def own_parameters(self) -> dict[str, Parameter]:
        """The function's parameters."""
        found = parameters_of(self.function)
        if self.foreign is None:
            return found
        return {  # whoever wrote it need not know that `per_model` means nothing here
            name: replace(one, kind=replace(one.kind, per_model=False)) if isinstance(one.kind, Number) else one
            for name, one in found.items()
        }

    @cached_property
    def weighted(self) -> bool:
        """Whether the models' weights mean anything to it."""
        return "weights" in inspect.signature(self.function).parameters


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
        Sparsifier(sparsifiers.dare, "element", random=True, unbiased=True, kernel="drop"),
        Sparsifier(sparsifiers.drop_only, "element", random=True, kernel="drop"),
        Sparsifier(
            sparsifiers.magnitude,
            "tensor",
            random=False,
            kernel="select",
            selects=sparsifiers.magnitude_range,
            prepare=sparsifiers.count_survivors,
        ),
        Sparsifier(
            sparsifiers.della, "row", random=True, unbiased=True, kernel="rank", prepare=sparsifiers.check_window
        ),
        Sparsifier(
            sparsifiers.breadcrumbs,
            "tensor",
            random=False,
            kernel="select",
            selects=sparsifiers.breadcrumbs_range,
            prepare=sparsifiers.count_survivors,
        ),
    )
}

MERGE_METHODS: dict[str, MergeMethod] = {
    entry.name: entry
    for entry in (
        MergeMethod(merging.linear, needs_base=False, kernel="sum", keeps_one=True, mean_if="normalize"),
        MergeMethod(
            merging.passthrough, needs_base=False, kernel="sum", models=(1, 1), keeps_one=True, weight_word="scale",
            sums_models=True,
        ),
        MergeMethod(merging.task_arithmetic, kernel="sum", keeps_one=True),
        MergeMethod(merging.ties, kernel="elect", trims=True, keeps_one=True),
        MergeMethod(surveyed.sce, "tensor", survey=surveyed.SCE),
        MergeMethod(merging.nearswap, models=(1, 1)),
        MergeMethod(surveyed.arcee_fusion, "tensor", models=(1, 1), survey=surveyed.ARCEE_FUSION),
        MergeMethod(merging.ram, kernel="changes"),
        MergeMethod(surveyed.ramplus_tl, "tensor", survey=surveyed.RAMPLUS_TL),
        MergeMethod(informed.fisher, needs_base=False, keeps_one=True, statistics="fisher"),
        MergeMethod(
            informed.regmean, "row", needs_base=False, keeps_one=True, statistics="gram", rows=informed.rows_at_once,
            matrix=informed.gram_memory,
        ),
        MergeMethod(spherical.slerp, models=(1, 1), products="models", base_row=True),
        MergeMethod(
            spherical.nuslerp, needs_base=False, models=(2, 2), products="deltas", vectors=spherical.by_axis
        ),
        MergeMethod(spherical.multislerp, needs_base=False, products="deltas"),
        MergeMethod(spherical.karcher, needs_base=False, products="models", base_row=True),
        MergeMethod(
            spherical.model_stock, models=(2, float("inf")), products="deltas", vectors=spherical.by_filter
        ),
    )
}  # fmt: skip

AVERAGE = merging.linear.__name__  # what is done where a method has nothing to say
SUM = merging.task_arithmetic.__name__  # what a method with coefficients becomes when they are known

MERGE_ALIASES: dict[str, str] = {"average": "linear"}

WEIGHT = Parameter("weight", Number("the model's factor in the merge"), 1.0)
SCALE = Parameter("scale", Number("what the model's tensors are multiplied by"), 1.0)
TAU = Parameter(
    "tau",
    Number("with drop_rate: auto: the relative perturbation of a layer's output that it may cause", 0.001, 1),
    None,
)
SEED = Parameter("seed", Number("effective seed of the model's mask, used as it is", 0, 2**64 - 1), None)

__all__ = [
    "AVERAGE",
    "MERGE_ALIASES",
    "MERGE_METHODS",
    "SCALE",
    "SEED",
    "SPARSIFIERS",
    "SUM",
    "TAU",
    "WEIGHT",
    "Choice",
    "MergeMethod",
    "Number",
    "Parameter",
    "Scope",
    "Sparsifier",
    "Switch",
]
