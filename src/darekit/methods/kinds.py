# SPDX-License-Identifier: Apache-2.0
"""What a sparsifier and a merge method are: entries of the tables, which stand below the functions they are about."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt

from darekit.methods.foreign import Foreign
from darekit.methods.parameters import Choice, Number, Parameter, parameters_of

Scope = Literal["element", "row", "tensor"]
Vectors = Literal["tensor", "row", "column"]  # what is one vector: all of a tensor, or a line of it along an axis
Floats = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Survey:
    """What a method must know of a whole tensor, in the order in which it is found out. None: nothing of the kind.

    Parts get the method's parameters by name, as far as they take them.

    Attributes:
        lines: base (rows, columns), deltas (K, rows, columns) -> (rows,) float64, what `scores` must know of each row.
        scores: deltas (K, ...), and `lines` where there are any -> (...) float32, none negative: what is selected by.
        keeps: how many elements have a score above 0 -> how many survive, those with the highest scores, of equals
            the first; None: all.
        quantiles: which parts of the tensor have lower scores than the scores that `threshold` takes; it gives the
            lowest that survives.
        squares: deltas, 0 where an element does not survive -> rows (R, ...) whose squares are added up.
        weights: the R sums, (R,) float64, and how many elements there are -> (K,) float64, what `merge` must know.
        alike: what the R sums add up to at most, and how many elements there are -> whether `weights` are then the same
            for any such sums, so that nobody needs to know them; None: they always matter.
        merge: those deltas, and `weights` where there are any -> the merged delta.
    """

    merge: Callable[..., Floats]
    lines: Callable[..., Doubles] | None = None
    scores: Callable[..., Floats] | None = None
    keeps: Callable[..., int | None] | None = None
    quantiles: tuple[float, ...] = ()
    threshold: Callable[..., float] | None = None
    squares: Callable[..., Floats] | None = None
    weights: Callable[..., Doubles] | None = None
    alike: Callable[..., bool] | None = None


def passes_before(survey: Survey | None) -> int:
    """How often all of a tensor is seen before it is merged (samples not counted)."""
    return 0 if survey is None else (survey.scores is not None) + (survey.squares is not None)


class _Named:
    """An entry of a table; its fields are those of the dataclass."""

    function: Callable[..., Any]
    foreign: Foreign | None

    @property
    def name(self) -> str:
        """The word in recipes."""
        return self.function.__name__ if self.foreign is None else self.foreign.name


@dataclass(frozen=True)
class Sparsifier(_Named):
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

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The function's parameters."""
        return parameters_of(self.function)


@dataclass(frozen=True)
class MergeMethod(_Named):
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
