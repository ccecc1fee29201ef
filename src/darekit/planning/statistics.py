# SPDX-License-Identifier: Apache-2.0
"""Which statistics belong to which tensors of a plan, and what is wrong where they do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from darekit.checkpoints import Checkpoint, TensorInfo
from darekit.checkpoints.headers import has_values
from darekit.engine.steps import Input, Merge, Step
from darekit.errors import HomologyError, PlanError
from darekit.inputs.statistics import FISHER, Statistics
from darekit.methods import MERGE_METHODS
from darekit.planning.matching.alignment import AlignedTensor
from darekit.recipe import Recipe


def statistics_of(
    recipe: Recipe,
    tensor: AlignedTensor,
    owners: Sequence[int],
    weights: Mapping[int, float],
    statistics: Sequence[Statistics],
) -> dict[str, Any] | None:
    """What a step must know of its models' statistics: its `statistics`, `sizes` and `transposed`.

    None where the method uses none, or a model has none of this tensor, which is then averaged.

    Raises:
        HomologyError: statistics of another shape than the tensor.
        PlanError: all weights are 0.
    """
    if not MERGE_METHODS[recipe.merge_method].statistics:
        return None
    if not any(weights.values()):
        raise PlanError(f"all weights of {tensor.name} are 0, so there is no mean; give one model a weight above 0")
    found: list[TensorInfo] = []
    names: dict[int, str] = {}  # statistics know the tensors of the stored model
    for k in owners:
        info, entry = tensor.models[k], statistics[k]
        known = entry.tensors.get(info.stored_name) if info is not None else None
        if known is None or info is None:
            return None
        name = names[k] = info.stored_name
        inputs = info.shape[0 if name in entry.transposed else -1] if len(info.shape) == 2 else None
        wanted = info.shape if entry.kind == FISHER else (inputs, inputs)
        if known.shape != wanted:
            raise HomologyError(
                f"{entry.ref} has {list(known.shape)} for {name}, which is {list(info.shape)} in "
                f"{recipe.models[k].model}: expected {list(wanted) if inputs or entry.kind == FISHER else 'a matrix'}; "
                "recreate the statistics with this model"
            )
        found.append(known)
    transposed = [names[k] in statistics[k].transposed for k in owners]
    if len(set(transposed)) > 1:
        raise HomologyError(
            f"{tensor.name} is stored [in, out] according to some of the statistics, [out, in] according to others"
        )
    if transposed[0] and len({info.shape for info in tensor.models if info}) > 1:
        return None
    return {
        "statistics": tuple(Input.of(info) for info in found),
        "sizes": tuple(statistics[k].size_of(names[k]) for k in owners),
        "transposed": transposed[0],
    }


def check_statistics(
    recipe: Recipe, models: Sequence[Checkpoint], digests: Sequence[bytes], statistics: Sequence[Statistics]
) -> None:
    """Each model's statistics are of the kind that the method needs, and were made with that very model.

    Raises:
        PlanError: the other kind.
        HomologyError: another model's.
    """
    wanted = MERGE_METHODS[recipe.merge_method].statistics
    if wanted is None:
        return
    for model, digest, entry in zip(models, digests, statistics, strict=True):
        if entry.kind != wanted:
            raise PlanError(
                f"{entry.ref} holds {entry.kind} statistics, but {recipe.merge_method} needs {wanted}: run `dare stats "
                f"{wanted} {model.ref} --data FILE --out NAME.{wanted}.safetensors`"
            )
        if not has_values(model):
            continue  # its digest takes values
        if entry.model_digest is not None and entry.model_digest != digest.hex():
            right = next((m.ref for m, d in zip(models, digests, strict=True) if d.hex() == entry.model_digest), None)
            mixed = f": it matches {right}; are the files swapped?" if right else ""
            raise HomologyError(
                f"{entry.ref} was not made with {model.ref}: it was made with {entry.facts.get('model')}, whose sample "
                f"digest is {entry.model_digest}, and {model.ref} has {digest.hex()}{mixed or '.'} Run `dare stats "
                f"{wanted}` on exactly this model"
            )


def statistics_notes(recipe: Recipe, steps: Sequence[Step], statistics: Sequence[Statistics]) -> Iterator[str]:
    """What a user should know: which tensors are averaged, and whether the Fishers have a say at all."""
    kind = MERGE_METHODS[recipe.merge_method].statistics
    if kind is None:
        return
    merged = [step for step in steps if isinstance(step, Merge) and step.begin == 0]
    plain = [step.name for step in merged if not step.statistics]
    if len(plain) == len(merged):
        yield (
            f"the statistics cover none of the tensors: all are averaged, and {recipe.merge_method} has no other effect"
        )
    elif kind == FISHER and plain:
        listed = ", ".join(plain[:3]) + (", ..." if len(plain) > 3 else "")
        yield f"{len(plain)} tensors without statistics are averaged: {listed}"
    elif plain:
        yield f"{len(merged) - len(plain)} tensors have a Gram matrix; the other {len(plain)} are averaged"
    if kind != FISHER:
        return
    minimal = recipe.parameters.get("minimal", MERGE_METHODS[recipe.merge_method].parameters["minimal"].default)
    for entry in statistics:
        if isinstance(minimal, float) and 0 < entry.mean < minimal:
            yield (
                f"the mean of {entry.ref} is {entry.mean:.1e}, less than minimal ({minimal:g}): most elements are "
                f"merely averaged; write parameters: {{minimal: {entry.mean * 1e-3:.0e}}} to let the Fisher decide"
            )
