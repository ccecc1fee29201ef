# SPDX-License-Identifier: Apache-2.0
"""Steps: what a plan is made of and what the engine executes. Inert data; one step makes (a part of) one tensor, by a
copy or a merge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from darekit.checkpoints import FileRange, Places, Source, TensorInfo, traits_of
from darekit.dtypes import DType, dtype_named
from darekit.methods import MERGE_METHODS, SUM
from darekit.methods.kinds import Vectors

# Of what the engine writes and records. Raised when equal steps would give other bytes or other records than before: no
# run is resumed across it.
ENGINE_FORMAT = 2

# The stages that belong to a merge method: per tensor; per model, before and after its threshold is known.
TRIM, TRIM_MODEL, TRIM_AT = "trim", "trim_model", "trim_at"


def is_trim(spec: StageSpec) -> bool:
    """Whether a stage belongs to the merge method rather than to the sparsifier."""
    return spec.method in (TRIM, TRIM_MODEL, TRIM_AT)


@dataclass(frozen=True, slots=True)
class Input:
    """One tensor of one checkpoint, as a step reads it.

    `count`: its elements; a step may want more or fewer. `cost`: bytes read for each byte that the source gives.
    """

    source: Source
    dtype: DType
    count: int
    cost: float = 1.0

    @staticmethod
    def of(info: TensorInfo) -> Input:
        """A checkpoint's tensor as an input."""
        cost = 1.0 if type(info.source) is FileRange else traits_of(info.source).cost  # nearly always the former
        return Input(info.source, dtype_named(info.dtype), info.count, cost)


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One operation on one model's delta: a sparsifier with its parameters, or the trim of a merge method.

    `stream`: the name of the tensor whose masks are drawn; empty: the step's. `places`: where its elements lie in that
    tensor; None: where they do here.
    """

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    stream: str = ""
    places: Places | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """Elements begin .. begin + count of one output tensor.

    `models` are the inputs besides the base, in recipe order; `owners` says which model of the recipe each one is.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    count: int
    output: int  # index of the shard
    offset: int  # of the tensor's first byte in the shard
    base: Input | None
    models: tuple[Input, ...]
    owners: tuple[int, ...]

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All that is read: the models' tensors, and the base's where there is one."""
        return (*self.models, self.base) if self.base else self.models

    @property
    def row(self) -> int:
        """Length of the last axis (1-D: the whole tensor)."""
        return self.shape[-1] if self.shape else 1

    @property
    def columns(self) -> int:
        """Vectors along the first axis."""
        return math.prod(self.shape[1:])

    @property
    def wide(self) -> bool:
        """Whether arithmetic is float64."""
        return any(entry.dtype.name == "F64" for entry in self.inputs)


@dataclass(frozen=True, slots=True)
class Copy(_Part):
    """What is not merged: the base's bytes, in the output's format where that of a float is another.

    `giver`: where inputs may differ, whose bytes are taken: a model of the recipe, or -1, the base. None: all agree.
    """

    giver: int | None = None


@dataclass(frozen=True, slots=True)
class Merge(_Part):
    """What is merged, by `method` with `weights`, after each model's stages, which `chains` holds in order.

    Inputs with fewer elements than the step read as the base beyond their end (a delta of 0).
    """

    weights: tuple[float, ...] = ()
    chains: tuple[tuple[StageSpec, ...], ...] = ()
    method: str = SUM
    parameters: Mapping[str, Any] = field(default_factory=dict)
    factor: float = 1.0  # lambda
    base_weight: float = 0.0  # of the base itself in what is added to it
    on_weights: bool = False  # merge the models themselves, not their deltas
    verbatim: bool = False  # the one model's own bytes: nothing is dropped, scaled or added
    statistics: tuple[Input, ...] = ()  # of each model, where the method reads them: Fishers, or Grams
    sizes: tuple[float, ...] = ()  # of each model: the norm of its Fisher, or the tokens of its Gram
    transposed: bool = False  # a linear layer stored [in, out]
    precise: bool = False  # arithmetic is float64 even where no input is F64
    rounding: int | None = None  # the seed by whose draws the result is rounded; None: to nearest

    @property
    def wide(self) -> bool:
        """Whether arithmetic is float64."""
        return self.precise or any(entry.dtype.name == "F64" for entry in self.inputs)


Step = Copy | Merge


def copied(step: Step) -> Copy:
    """The same elements, taken from the inputs as they are: all must agree."""
    if isinstance(step, Copy):
        return step
    return Copy(
        step.name, step.dtype, step.shape, step.begin, step.count, step.output, step.offset, step.base, step.models,
        step.owners,
    )  # fmt: skip


def vectors_of(step: Step) -> Vectors | None:
    """What has coefficients of its own in a step whose method measures products; None: nothing is measured."""
    if not isinstance(step, Merge) or MERGE_METHODS[step.method].products is None:
        return None
    return MERGE_METHODS[step.method].vectors_at(step.parameters)


def is_counted(step: Step) -> TypeGuard[Merge]:
    """Whether it says what rounding leaves of its changes: there is something that is changed."""
    return isinstance(step, Merge) and step.base is not None


def is_per_row(step: Step) -> bool:
    """Whether each row has coefficients of its own."""
    return vectors_of(step) == "row"


def is_measured(step: Step) -> TypeGuard[Merge]:
    """Whether the products of all of the tensor must be known before a first element is merged."""
    return vectors_of(step) in ("tensor", "column")
