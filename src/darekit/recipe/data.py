# SPDX-License-Identifier: Apache-2.0
"""The recipe itself: inert data that knows no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from darekit.dtypes import DTYPES
from darekit.recipe.values import Value, to_data


@dataclass(frozen=True)
class ModelEntry:
    """One model of a recipe.

    Attributes:
        model: directory, file or Hub id, as written.
        parameters: those that are set for it alone; what is missing comes from the recipe.
        stats: its statistics file, as written; None if it has none.
    """

    model: str
    parameters: Mapping[str, Value]
    stats: str | None = None


@dataclass(frozen=True)
class Sparsify:
    """How each delta (or, `on` weights, each model) is made sparse.

    Attributes:
        method: the sparsifier's name.
        parameters: `drop_rate` and the sparsifier's own; only what was given.
        on: `delta` or `weights`.
        seed: the recipe seed from which each model's mask is derived.
        keep_dense: groups or glob patterns of tensors that are not dropped.
    """

    method: str
    parameters: Mapping[str, Value]
    on: Literal["delta", "weights"] = "delta"
    seed: int = 0
    keep_dense: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """What to do, in native words and canonical names; knows no file.

    Attributes:
        base_model: directory, file or Hub id, as written; None for a plain average of models.
        models: the fine-tuned models, in order.
        sparsify: what is done to each delta; None: nothing.
        merge_method: the method's name.
        parameters: the method's own; only what was given.
        dtype: output format by its safetensors name; None keeps the base's.
        keep_float32: whether tensors that are F32 in a 16-bit model stay so under a 16-bit `dtype`.
        vocab: what to do with vocabularies that differ: strict refuses, base cuts, pad keeps.
        tokenizer_source: `base`, or the model whose tokenizer the output gets.
        heads: whose heads the output has: `base`, or a model as written; None: heads are merged.
        base_extras: what becomes of tensors that only the base has: keep or leave_out.
        notes: notes and warnings for the user.
        text: the file's own text.
    """

    base_model: str | None
    models: tuple[ModelEntry, ...]
    sparsify: Sparsify | None
    merge_method: str
    parameters: Mapping[str, Value]
    dtype: str | None = None
    vocab: Literal["strict", "base", "pad"] = "strict"
    tokenizer_source: str = "base"
    heads: str | None = None
    keep_float32: bool = True
    base_extras: Literal["keep", "leave_out"] = "keep"
    notes: tuple[str, ...] = field(default=(), compare=False)
    text: str = field(default="", compare=False, repr=False)

    def to_data(self) -> dict[str, Any]:
        """The recipe as JSON-able data in native form: `read_recipe` of it gives an equal recipe."""
        data: dict[str, Any] = {} if self.base_model is None else {"base_model": self.base_model}
        data["models"] = [
            {"model": e.model, **({"stats": e.stats} if e.stats else {}), "parameters": _parameters_data(e.parameters)}
            for e in self.models
        ]
        if self.sparsify is not None:
            data["sparsify"] = {
                "method": self.sparsify.method,
                **_parameters_data(self.sparsify.parameters),
                "on": self.sparsify.on,
                "seed": self.sparsify.seed,
                "keep_dense": list(self.sparsify.keep_dense),
            }
        data["merge_method"] = self.merge_method
        data["parameters"] = _parameters_data(self.parameters)
        if self.dtype is not None:
            data["dtype"] = DTYPES[self.dtype].torch_name
        data |= {"vocab": self.vocab, "tokenizer_source": self.tokenizer_source}
        data |= {} if self.heads is None else {"heads": self.heads}
        data |= {} if self.keep_float32 else {"keep_float32": False}
        return data | ({} if self.base_extras == "keep" else {"base_extras": self.base_extras})


def _parameters_data(parameters: Mapping[str, Value]) -> dict[str, Any]:
    return {name: to_data(value) for name, value in parameters.items()}
