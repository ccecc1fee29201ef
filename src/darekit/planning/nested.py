# SPDX-License-Identifier: Apache-2.0
"""Recipes as models: the result of a recipe, whose tensors are computed when another recipe reads them.

A recipe is opened as whatever else may be named as a model: by its file's name, or by the name that it has among the
stages of the recipe that is being planned. Nothing of it is written anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from darekit.checkpoints import Checkpoint, TensorInfo, natural_key
from darekit.checkpoints.companions import Companions
from darekit.engine.steps import Merge, StageSpec, Step
from darekit.errors import PlanError, RecipeError
from darekit.inputs.kinds import Opener, Opening
from darekit.methods import SUM
from darekit.planning.plan import Plan, Within
from darekit.recipe import Recipe, read_recipe
from darekit.wording import label

SUFFIXES = (".yaml", ".yml")
DEEPEST = 16  # recipes within recipes

TAG = b"darekit-recipe-1\0"  # frozen: seeds depend on it, see `identity_of`


# A recipe, its name, where its models are looked up, the recipes above it and itself -> its result.
OpenRecipe = Callable[[Recipe, str, Sequence[Path], Sequence[str]], Checkpoint]


def opener_of(recipe: Recipe | None, above: Sequence[str], open_recipe: OpenRecipe) -> Opener:
    """What opens recipes as models.

    Args:
        recipe: whose stages may be named; None: there are none.
        above: the recipes that are being opened.
        open_recipe: how.
    """
    stages = {} if recipe is None else dict(recipe.stages)

    def find(opening: Opening) -> str | Path | None:
        if str(opening.ref) in stages:
            return str(opening.ref)
        if not str(opening.ref).endswith(SUFFIXES):
            return None
        path = opening.path
        return path if path is not None and path.is_file() else None

    def open_it(opening: Opening) -> Checkpoint:
        if isinstance(opening.ref, str):
            return open_recipe(stages[opening.ref], opening.ref, opening.search, (*above, opening.ref))
        path = opening.ref.resolve()
        chain = (*above, str(path))
        if str(path) in above:
            raise RecipeError(f"recipes that contain each other: {' > '.join(chain)}")
        if len(chain) > DEEPEST:
            raise RecipeError(f"recipes within recipes, more than {DEEPEST} deep: {' > '.join(chain)}")
        return open_recipe(read_recipe(path), str(opening.ref), (path.parent, *opening.search), chain)

    return Opener("a recipe", find, open_it)


def result_of(plan: Plan, ref: str) -> tuple[Checkpoint, Within]:
    """A plan's result as a checkpoint, and what it is made of. Closing it closes the plan's files; the plan must be
    open."""
    from darekit.engine.nested import Workshop, sources_of
    from darekit.planning.travel.beside import companions_of

    identities = {name: identity_of(plan, steps) for name, steps in _by_tensor(plan.steps).items()}
    workshop = Workshop(plan.steps, [model.ref for model in plan.models], ref)
    places = {place.name: place for shard in plan.shards for place in shard.placements}
    infos = {
        name: TensorInfo(name, places[name].dtype, places[name].shape, source)
        for name, source in sources_of(workshop, identities)
    }
    beside = companions_of(plan)
    files: Companions = dict(beside.files)
    if beside.chat_template is not None:
        files = {**files, "chat_template.jinja": beside.chat_template.encode("utf-8")}
    result = Checkpoint(
        ref=ref,
        directory=None,
        tensors={name: infos[name] for name in sorted(infos, key=natural_key)},
        config=beside.config,
        files=plan.files,
        revision=None,
        companions=files,
        notes=tuple(f"{label(ref)}: {note}" for note in plan.notes),
    )
    return result, Within(ref, plan, workshop)


def allow_nonfinite(plan: Plan) -> None:
    """Take the base's element where a model has NaN or Inf, also in the recipes that are models.

    Raises:
        PlanError: one of them has no base.
    """
    for one in plan.within:
        if one.plan.base is None:
            raise PlanError(
                f"--allow-nonfinite takes the base's element where a model has NaN or Inf, and {one.ref} has no base; "
                "add base_model to it, or repair its models"
            )
        one.workshop.allow_nonfinite()
        allow_nonfinite(one.plan)


def _by_tensor(steps: Sequence[Step]) -> dict[str, list[Step]]:
    found: dict[str, list[Step]] = {}
    for step in steps:
        found.setdefault(step.name, []).append(step)
    return found


def identity_of(plan: Plan, steps: Sequence[Step]) -> bytes:
    """One tensor's steps -> 16 bytes that follow from what it is made of, and from nothing else.

    BLAKE2b (digest_size=16, no key) over b"darekit-recipe-1\\\\0" and UTF-8 JSON (keys sorted, separators "," and ":")
    of a list with, for each step in order::

        [begin, count, output dtype as in safetensors, kind, method, parameters, weights, factor, base_weight,
         on_weights, base, models]

    and, where it is rounded stochastically, the effective seed of that behind them.
    `base`: null, or [sample digest of its checkpoint in hexadecimal, name stored under, dtype]; `models`: a list of
    [the same three, chain], where a chain is a list of [method, parameters, seed, stream].

    Seeds, and through them masks, depend on this encoding: it never changes.
    """
    digests = [digest.hex() for digest in plan.sample_digests]
    first = int(plan.base is not None)
    tensors = {tensor.name: tensor for tensor in plan.alignment.tensors}

    def of(checkpoint: int, info: TensorInfo | None) -> list[Any]:
        return [digests[checkpoint], None if info is None else info.stored_name, None if info is None else info.dtype]

    made = []
    for step in steps:
        tensor = tensors[step.name]
        chains: Sequence[Sequence[StageSpec]] = ((),) * len(step.owners)
        how: list[Any] = ["copy", SUM, {}, [], 1.0, 0.0, False]
        if isinstance(step, Merge):
            chains = step.chains
            how = [
                "merge", step.method, _plain(step.parameters), list(step.weights), step.factor, step.base_weight,
                step.on_weights,
            ]  # fmt: skip
        models = [
            [*of(first + k, tensor.models[k]), [[s.method, _plain(s.parameters), s.seed, s.stream] for s in chain]]
            for k, chain in zip(step.owners, chains, strict=True)
        ]
        made.append([
            step.begin, step.count, step.dtype.name, *how,
            None if step.base is None else of(0, tensor.base), models,
            *([step.rounding] if isinstance(step, Merge) and step.rounding is not None else []),
        ])  # fmt: skip
    text = json.dumps(made, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(TAG + text.encode(), digest_size=16).digest()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, str | bool | int | float) else repr(value) for name, value in values.items()
    }
