# SPDX-License-Identifier: Apache-2.0
"""What a user should know about a plan before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from darekit.architectures.groups import ONE_TERM, group_of, is_kept_dense
from darekit.checkpoints import Checkpoint
from darekit.inputs.opening import packed_seed
from darekit.planning.alignment import Alignment
from darekit.planning.rates import MOST
from darekit.planning.settings import drop_rate_of
from darekit.recipe import Recipe, is_exact, resolve
from darekit.wording import label

EMBEDDING_WARNING_RATE = 0.9


def notes_of(
    recipe: Recipe, alignment: Alignment, models: Sequence[Checkpoint], seeds: Sequence[int | None]
) -> Iterator[str]:
    """Masks that interfere, settings that match nothing, and drop rates that are known to cost an ability."""
    by_seed: dict[int, list[str]] = {}
    for checkpoint, seed in zip(models, seeds, strict=True):
        for one in {seed, packed_seed(checkpoint)} - {None}:
            by_seed.setdefault(cast(int, one), []).append(label(checkpoint.ref))
    for seed, names in by_seed.items():
        if len(names) > 1:
            yield (
                f"{' and '.join(names)} have the same effective seed {seed}: their masks are equal and interfere "
                "everywhere at once; give each its own"
            )
    yield from _idle(recipe, [tensor.name for tensor in alignment.tensors], alignment)
    if recipe.sparsify is None or recipe.sparsify.on == "weights":
        return
    rates = [drop_rate_of(recipe, k, tensor)[0] for tensor in alignment.tensors for k in range(len(models))]
    if rates and min(rates) == 1:
        yield "the drop rate is 1: everything is dropped, and the output is the base"
        return
    rate, name = max(
        (
            (drop_rate_of(recipe, k, tensor)[0], tensor.name)
            for tensor in alignment.tensors
            if group_of(tensor.name, tensor.shape) == "embeddings"
            for k in range(len(models))
        ),
        default=(0.0, ""),
    )
    if rate >= EMBEDDING_WARNING_RATE:
        yield (
            f"{name} is dropped at p = {rate:g}: one-hot inputs get no averaging; "
            "keep_dense: [embeddings, norms] usually costs little and keeps more"
        )


def rate_notes(models: Sequence[Checkpoint], rates: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """What `drop_rate: auto` came to, one line per model."""
    for checkpoint, found in zip(models, rates, strict=True):
        if found:
            yield (
                f"{label(checkpoint.ref)}: drop_rate auto, by a sample of each tensor, is {min(found.values()):g} to "
                f"{max(found.values()):g} in {len(found)} tensors (at most {MOST})"
            )


def _idle(recipe: Recipe, names: Sequence[str], alignment: Alignment) -> Iterator[str]:
    """Filters and patterns that match no tensor: most are misspelt."""
    sparsify, known = recipe.sparsify, {*names}
    scopes = [
        recipe.parameters,
        *(entry.parameters for entry in recipe.models),
        *([sparsify.parameters] if sparsify else []),
    ]
    for parameters in scopes:
        for parameter, value in parameters.items():
            for entry in value if isinstance(value, tuple) else ():
                if is_exact(entry.filter):
                    used = entry.filter[1:] in known
                else:
                    used = any(resolve(((entry,),), name) is not None for name in names)
                if not used:
                    yield f"{parameter}: the filter {entry.filter!r} matches no tensor"
    for pattern in sparsify.keep_dense if sparsify and sparsify.keep_dense != ONE_TERM else ():
        if not any(is_kept_dense(tensor.name, tensor.shape, [pattern]) for tensor in alignment.tensors):
            yield f"keep_dense: {pattern!r} matches no tensor"
