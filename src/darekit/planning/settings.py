# SPDX-License-Identifier: Apache-2.0
"""What holds for one tensor of one model: drop rate, weight, lambda."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from darekit.architectures.groups import is_kept_dense
from darekit.dtypes import dtype_named
from darekit.errors import RecipeError
from darekit.methods import MERGE_METHODS, SPARSIFIERS, Sparsifier
from darekit.methods.sparsifiers import noise_gain
from darekit.planning.alignment import AlignedTensor
from darekit.recipe import Recipe, resolve


def is_float(dtype: str) -> bool:
    """Whether tensors of this dtype are merged; others are copied."""
    return dtype_named(dtype).kind == "float"


def drop_rate_of(recipe: Recipe, model: int, tensor: AlignedTensor) -> tuple[float, float]:
    """Recipe, model, tensor -> (drop rate, noise of one element where it is a random drop that is rescaled, else 0)."""
    sparsify = recipe.sparsify
    if sparsify is None or tensor.head or is_kept_dense(tensor.name, tensor.shape, sparsify.keep_dense):
        return 0.0, 0.0
    entry = SPARSIFIERS[sparsify.method]
    values = resolved(recipe, model, tensor.name, entry)
    rate, q = float(values["drop_rate"]), float(values.get("q", 0.0))
    rescaled = entry.unbiased and (values.get("rescale") != "none" or q > 0) and sparsify.on == "delta"
    return rate, noise_gain(rate, q) if rescaled else 0.0


def resolved(recipe: Recipe, model: int, name: str, entry: Sparsifier) -> dict[str, Any]:
    """The sparsifier's parameters for one tensor: the model's own, else the recipe's, else the defaults."""
    assert recipe.sparsify is not None
    own, shared = recipe.models[model].parameters, recipe.sparsify.parameters
    values = {}
    for parameter in entry.parameters.values():
        value = resolve((own.get(parameter.name), shared.get(parameter.name)), name)
        value = parameter.default if value is None else value
        if value is None:
            raise RecipeError(
                f"no {parameter.name} for tensor {name} of model {recipe.models[model].model}: none of its filters "
                f"match; end the list with a value without a filter, or set sparsify.{parameter.name}"
            )
        values[parameter.name] = value
    return values


def merges_weights(recipe: Recipe, parameters: Mapping[str, Any]) -> bool:
    """Whether the models themselves are merged: asked for, or an unnormalised sum of w_k theta_k, which is not the
    base plus anything."""
    if recipe.sparsify is not None and recipe.sparsify.on == "weights":
        return True
    switch = MERGE_METHODS[recipe.merge_method].mean_if
    return switch is not None and not parameters.get(switch)


def lambda_of(recipe: Recipe, name: str) -> float:
    """The factor of a tensor's merged delta; 1 where the recipe sets none."""
    value = resolve((recipe.parameters.get("lambda"),), name)
    return 1.0 if value is None else float(value)


def weight_of(recipe: Recipe, model: int, name: str) -> float:
    """The factor of one model in the merge of a tensor: its own, the recipe's, or 1."""
    value = resolve((recipe.models[model].parameters.get("weight"), recipe.parameters.get("weight")), name)
    return 1.0 if value is None else float(value)
