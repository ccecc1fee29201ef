# SPDX-License-Identifier: Apache-2.0
"""The recipe of a single model: base + sparsified delta."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from darekit.errors import PlanError, RecipeError
from darekit.recipe import Recipe, read_recipe
from darekit.recipe.names import same_model


def drop_recipe(
    base: str,
    model: str,
    *,
    drop_rate: float | str,
    method: str = "dare",
    rescale: str | None = None,
    on: str = "delta",
    keep_dense: Sequence[str] = (),
    seed: int | None = None,
    vocab: str = "strict",
    heads: str | None = None,
    base_extras: str = "keep",
    rounding: str | Mapping[str, Any] = "nearest",
    parameters: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe that `drop` runs.

    Raises:
        RecipeError: the arguments do not form a valid recipe.
        PlanError: base and model are one.
    """
    if same_model(base, model):
        raise PlanError(f"{model} is given both as the base and as the model; name a model that was fine-tuned from it")
    sparsify: dict[str, Any] = {"method": method, "drop_rate": drop_rate, "on": on}
    # Where nothing is said, `auto` keeps dense what averages nothing out.
    if keep_dense or drop_rate != "auto":
        sparsify["keep_dense"] = keep_dense if isinstance(keep_dense, str) else list(keep_dense)
    sparsify |= {"rescale": rescale} if rescale is not None else {}
    entry: dict[str, Any] = {"model": model}
    if seed is not None:
        entry["parameters"] = {"seed": seed}
        if rounding == "stochastic":
            rounding = {"method": rounding, "seed": seed}
    given = {} if heads is None else {"heads": model if heads == "model" else heads}
    recipe = {
        **given,
        "base_model": base,
        "models": [entry],
        "sparsify": sparsify | dict(parameters or {}),
        "merge_method": "linear" if on == "weights" else "task_arithmetic",
        "vocab": vocab,
        "base_extras": base_extras,
        "rounding": rounding,
    }
    try:
        return read_recipe(recipe)
    except RecipeError as error:  # who gave options knows of no recipe, and of no place in one
        raise RecipeError(re.sub(r"^recipe: (sparsify\.|models\.0\.parameters\.)?", "", str(error))) from None
