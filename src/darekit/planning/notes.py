# SPDX-License-Identifier: Apache-2.0
"""What a user should know about a plan before it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, cast

from darekit.architectures.depth import LAYER_WORDS, Depths, along
from darekit.architectures.groups import ONE_TERM, is_kept_dense, is_of_patches
from darekit.checkpoints import Checkpoint, OutputTensor
from darekit.dtypes import DTYPES, STOCHASTIC
from darekit.engine.steps import Merge, Step
from darekit.inputs.opening import packed_seed
from darekit.methods import MERGE_METHODS, SPARSIFIERS
from darekit.methods.merging import WEIGHTS_TINY
from darekit.planning.draft import Draft
from darekit.planning.matching.alignment import AlignedTensor
from darekit.planning.rates import MOST
from darekit.recipe import Place, Recipe, Value, is_exact
from darekit.recipe.values import filters_of, gradients_of
from darekit.wording import and_, label

if TYPE_CHECKING:
    from darekit.planning.stacks.stack import Tower

EMBEDDING_WARNING_RATE = 0.9


def notes_of(draft: Draft) -> Iterator[str]:
    """Masks that interfere, settings that match nothing, gradients without layers, and drop rates that are known to
    cost an ability."""
    recipe = draft.recipe
    by_seed: dict[int, list[str]] = {}
    for checkpoint, seed in zip(draft.models, draft.seeds, strict=True):
        for one in {seed, packed_seed(checkpoint)} - {None}:
            by_seed.setdefault(cast(int, one), []).append(label(checkpoint.ref))
    for seed, names in by_seed.items():
        if len(names) > 1:
            yield (
                f"{' and '.join(names)} have the same effective seed {seed}: their masks are identical and interfere "
                "everywhere; give each model its own seed"
            )
    if recipe.output == "adapter":
        yield (
            "output: adapter is for `dare merge` and `dare extract`; here the recipe stands for the whole merged model"
            + (", of full rank" if recipe.rank is not None else "")
        )
    yield from _weight_notes(draft)
    yield from _idle(draft)
    yield from _gradient_notes(draft)
    yield from _trimmed_away(draft)
    if recipe.sparsify is None or recipe.sparsify.on == "weights":
        return
    rates = {settings.rate for _, _, settings in draft.merged()}
    if rates and min(rates) == 1:
        yield "the drop rate is 1: everything is dropped, and the output is the base"
        return
    if not SPARSIFIERS[recipe.sparsify.method].random:  # what is not drawn is no noise
        return
    rate, _, name = max(
        (
            (settings.rate, math.prod(tensor.shape), tensor.name)
            for tensor, _, settings in draft.merged()
            if settings.rate >= EMBEDDING_WARNING_RATE and _is_looked_up(tensor)
        ),
        default=(0.0, 0, ""),
    )
    if name:
        yield (
            f"{name} is dropped at p = {rate:g}: noise does not average out for one-hot inputs. keep_dense: "
            "[embeddings, norms] preserves more. It does not enlarge a merge, but makes a pack 2.5 to 3.8 times as "
            "large, for at most one point of ability on a model of 135M parameters"
        )


def _trimmed_away(draft: Draft) -> Iterator[str]:
    """Models of which a trim leaves nothing somewhere."""
    if not MERGE_METHODS[draft.recipe.merge_method].trims:
        return
    many: dict[int, list[bool]] = {}
    for _, model, settings in draft.merged():
        many.setdefault(model, []).append(settings.keep == 0)
    for model, gone in many.items():
        if any(gone):
            where = "" if all(gone) else f" in {sum(gone)} of {len(gone)} tensors"
            word = "WARNING: " if all(gone) else ""
            yield f"{word}keep 0 (of mergekit's, density 0) leaves nothing of {label(draft.models[model].ref)}{where}"


def _weight_notes(draft: Draft) -> Iterator[str]:
    """Weights that leave nothing of the models, or nothing to divide by."""
    entry = MERGE_METHODS[draft.recipe.merge_method]
    weights = [
        (tensor.name, [one.weight for one in found.models if one is not None], bool(found.merge.get("normalize")))
        for tensor in draft.alignment.tensors
        for found in (draft.settings[tensor.name],)
        if tensor.name not in draft.roles and any(found.models)
    ]
    if weights and not any(weight for _, found, _ in weights for weight in found):
        based = any(tensor.base is not None for tensor in draft.alignment.tensors)
        if entry.sums_models or (entry.kernel in ("sum", "elect") and not based):
            yield "all weights are 0: the output is 0 everywhere"
        elif entry.kernel in ("sum", "elect"):
            yield "all weights are 0: the output is the base"
        else:
            yield "all weights are 0, so they say nothing about the models"
        return
    if entry.kernel != "sum":  # others divide by something else
        return
    zero = [name for name, found, divided in weights if divided and any(found) and abs(sum(found)) < WEIGHTS_TINY]
    if zero:
        yield (
            f"the weights add up to 0 in {len(zero)} {'tensor' if len(zero) == 1 else 'tensors'} (as {zero[0]}), so "
            "normalize has nothing to divide by: they are used as they are"
        )


def _is_looked_up(tensor: AlignedTensor) -> bool:
    """Whether it is a table of which rows are used one at a time; a vision model's positions are added as a whole."""
    return tensor.group == "embeddings" and len(tensor.shape) == 2 and not is_of_patches(tensor.name)


def equal_notes(models: Sequence[Checkpoint], digests: Sequence[bytes]) -> Iterator[str]:
    """Models of other names that are one and the same, as after a copy in the wrong place; `digests`: their samples."""
    alike: dict[bytes, dict[str, str]] = {}
    for model, digest in zip(models, digests, strict=True):
        place = str(model.directory.absolute()) if model.directory is not None else model.ref
        alike.setdefault(digest, {}).setdefault(place, label(model.ref))
    for names in alike.values():
        if len(names) > 1:
            yield (
                f"{and_(list(names.values()))} are identical wherever they were sampled: are they the right models? "
                "Each counts as a separate model"
            )


def rate_notes(models: Sequence[Checkpoint], rates: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """What `drop_rate: auto` came to, one line per model."""
    for checkpoint, found in zip(models, rates, strict=True):
        if found:
            yield (
                f"{label(checkpoint.ref)}: drop_rate auto, from a sample of each tensor, is {min(found.values()):g} to "
                f"{max(found.values()):g} in {len(found)} tensors (at most {MOST})"
            )


def wide_notes(recipe: Recipe, outputs: Sequence[OutputTensor]) -> Iterator[str]:
    """Tensors that are not rounded to the recipe's format."""
    asked = DTYPES[recipe.dtype] if recipe.dtype else None
    wide = [t for t in outputs if asked and DTYPES[t.dtype].kind == "float" and t.dtype != asked.name]
    if asked and wide:
        shown = ", ".join(t.name for t in wide[:2]) + (", ..." if len(wide) > 2 else "")
        formats = " or ".join(sorted({DTYPES[t.dtype].torch_name for t in wide}))
        yield (
            f"{len(wide)} {'tensor stays' if len(wide) == 1 else 'tensors stay'} {formats}, as in the input, and "
            f"are not rounded to {asked.torch_name} ({shown}); keep_float32: false rounds all"
        )


def rounding_notes(recipe: Recipe, steps: Sequence[Step]) -> Iterator[str]:
    """Stochastic rounding where nothing is rounded."""
    merges = [step for step in steps if isinstance(step, Merge)]
    if recipe.rounding == STOCHASTIC and all(step.rounding is None for step in merges):
        yield (
            "rounding: stochastic has no effect: the output's format stores what is computed exactly. It matters where "
            "the output is bfloat16, float16 or float8"
        )


def _scopes(recipe: Recipe) -> Iterator[tuple[str, Mapping[str, Value]]]:
    """Whose parameters they are ("" for the recipe's own), and the parameters."""
    yield "", recipe.parameters
    for entry in recipe.models:
        yield label(entry.model), entry.parameters
    if recipe.sparsify is not None:
        yield "", recipe.sparsify.parameters


def _idle(draft: Draft) -> Iterator[str]:
    """Filters and patterns that match no tensor: most are misspelt."""
    sparsify, tensors = draft.recipe.sparsify, draft.alignment.tensors
    known = {tensor.name for tensor in tensors}
    for _, parameters in _scopes(draft.recipe):
        for parameter, value in parameters.items():
            for entry in filters_of(value):
                exact = is_exact(entry.filter)
                if not (entry.filter[1:] in known if exact else any(entry.matches(name) for name in known)):
                    yield f"{parameter}: the filter {entry.filter!r} matches no tensor"
    for pattern in sparsify.keep_dense if sparsify and sparsify.keep_dense != ONE_TERM else ():
        if not any(is_kept_dense(tensor.name, tensor.group, [pattern]) for tensor in tensors):
            yield f"keep_dense: {pattern!r} matches no tensor"


@dataclass(frozen=True, slots=True)
class GradientRow:
    """One gradient of a recipe, and what it comes to. `model`: "" for one that holds for all; `filter`: "*" for all
    tensors; `stack`: whose layers (`model.layers`); `values`: one per layer, in order; `first`: of these layers, the
    first."""

    parameter: str
    model: str
    filter: str
    stack: str
    values: tuple[float, ...]
    first: int = 0


def gradient_rows(recipe: Recipe, depths: Depths, towers: Sequence[Tower] = ()) -> list[GradientRow]:
    """Every gradient of a recipe along every stack of layers, and in stacks of slices along every slice."""
    stacked = {tower.name for tower in towers}
    runs: list[tuple[str, int | None, int, int]] = [
        (stack, None, 0, layers) for stack, layers in depths.stacks.items() if stack not in stacked
    ]
    for tower in towers:
        first = 0
        for at, run in groupby(tower.slices):
            many = len(list(run))
            runs.append((tower.name, at, first, many))
            first += many
    return [
        GradientRow(
            name, whose, pattern, stack, tuple(gradient.at(Place("", (), depth)) for depth in along(layers)), first
        )
        for whose, parameters in _scopes(recipe)
        for name, value in parameters.items()
        for pattern, own, gradient in gradients_of(value)
        for stack, at, first, layers in runs
        if own is None or at is None or own == at
    ]


def _gradient_notes(draft: Draft) -> Iterator[str]:
    """Where there are no layers for a gradient to run along."""
    if draft.depths.stacks:
        return
    names = {
        name
        for _, parameters in _scopes(draft.recipe)
        for name, value in parameters.items()
        if next(gradients_of(value), None)
    }
    for name in sorted(names):
        yield (
            f"{name}: no tensor's name contains a layer number, so every tensor gets the gradient's first value; "
            f"layers are recognised as {', '.join(f'{word}.N.' for word in LAYER_WORDS)}"
        )
