# SPDX-License-Identifier: Apache-2.0
"""Steps: what a plan is made of and what the engine executes. Inert data; one step makes (a part of) one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from darekit.checkpoints import Places, Source, TensorInfo, traits_of
from darekit.dtypes import DType, dtype_named
from darekit.methods import MERGE_METHODS, SUM

# Of what the engine writes and records. Raised when equal steps would give other bytes or other records than before: no
# run is resumed across it.
ENGINE_FORMAT = 1

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
        return Input(info.source, dtype_named(info.dtype), info.count, traits_of(info.source).cost)


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

    @property
    def row(self) -> int:
        """Length of the last axis (1-D: the whole tensor)."""
        return self.shape[-1] if self.shape else 1

    @property
    def wide(self) -> bool:
        """Whether arithmetic is float64."""
        inputs = (*self.models, *([self.base] if self.base else []))
        return any(entry.dtype.name == "F64" for entry in inputs)


def is_per_row(step: Step) -> bool:
    """Whether each row has coefficients of its own."""
    switch = MERGE_METHODS[step.method].per_row
    return step.kind == "merge" and switch is not None and bool(step.parameters[switch])


def is_measured(step: Step) -> bool:
    """Whether the products of all of the tensor must be known before a first element is merged."""
    return step.kind == "merge" and MERGE_METHODS[step.method].products is not None and not is_per_row(step)
