# SPDX-License-Identifier: Apache-2.0
"""Steps: what a plan is made of and what the engine executes. Inert data; one step makes (a part of) one tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from darekit.checkpoints import FileRange, Places, Source, TensorInfo, traits_of
from darekit.dtypes import DType, dtype_named
from darekit.methods import MERGE_METHODS, SUM
from darekit.methods.spherical import Vectors

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
class Step:
    """Elements begin .. begin + count of one output tensor.

    `models` are the inputs that are merged, with their `weights`, in recipe order; `owners` says which model of the
    recipe each one is. `chains` holds each model's stages in order. Inputs with fewer elements than the step read as
    the base beyond their end (a delta of 0).
    """

    name: str
    kind: Literal["merge", "copy"]
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    count: int
    output: int  # index of the shard
    offset: int  # of the tensor's first byte in the shard
    base: Input | None
    models: tuple[Input, ...]
    owners: tuple[int, ...]
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
    # Of a copy whose inputs may differ: whose bytes are taken, a model of the recipe or -1, the base. None: all agree.
    giver: int | None = None
    precise: bool = False  # arithmetic is float64 even where no input is F64
    rounding: int | None = None  # the seed by whose draws what is merged is rounded; None: to nearest

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
        inputs = (*self.models, *([self.base] if self.base else []))
        return self.precise or any(entry.dtype.name == "F64" for entry in inputs)


def vectors_of(step: Step) -> Vectors | None:
    """What has coefficients of its own in a step whose method measures products; None: its method measures none."""
    method = MERGE_METHODS[step.method]
    if step.kind != "merge" or method.products is None:
        return None
    return method.vectors_at(step.parameters)


def is_counted(step: Step) -> bool:
    """Whether it says what rounding leaves of its changes: there is something that is changed."""
    return step.kind == "merge" and step.base is not None


def is_per_row(step: Step) -> bool:
    """Whether each row has coefficients of its own."""
    return vectors_of(step) == "row"


def is_measured(step: Step) -> bool:
    """Whether the products of all of the tensor must be known before a first element is merged."""
    return vectors_of(step) in ("tensor", "column")
