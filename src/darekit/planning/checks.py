# SPDX-License-Identifier: Apache-2.0
"""Numeric checks of a plan: a small sample of values is read before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from darekit.architectures.depth import layer_of
from darekit.errors import HomologyError

if TYPE_CHECKING:
    from darekit.planning.homology import Judgement
    from darekit.planning.matching.alignment import AlignedTensor
    from darekit.planning.plan import Plan


def check(plan: Plan, *, force: bool = False, say: Callable[[str], None] | None = None) -> list[Judgement]:
    """Numeric homology tests on a sample of the values; says warnings, raises on refusals.

    Raises:
        HomologyError: a model does not look like its base's child, or too much is dropped (unless `force`).
        DataError: integer tensors differ.
    """
    from darekit.planning.homology import check_integers, judge, sample_norms
    from darekit.planning.rounding import rounding_of, told

    weights = [tensor for tensor in plan.alignment.tensors if tensor.name not in plan.roles]
    check_integers(weights, [model.ref for model in plan.models])
    if plan.base is None or (plan.recipe.sparsify is not None and plan.recipe.sparsify.on == "weights"):
        return []
    judgements = []
    rounded = []
    for k, model in enumerate(plan.models):
        if model.ref == plan.base.ref:  # listed on purpose, by a method that counts it among the models
            continue
        own = [tensor for tensor in weights if _comparable(tensor, k)] if plan.towers else weights
        if not own:
            continue
        norms = sample_norms(own, k, partial(plan.rate_of, k))
        judgements.append(judge(model.ref, plan.base.ref, norms))
        if (found := rounding_of(own, k, norms)) is not None:
            rounded.append(told(model.ref, plan.base.ref, found))
    stops = [j.stop for j in judgements if j.stop]
    if stops and not force:
        raise HomologyError("\n".join(f"{stop}; use --force to continue anyway" for stop in stops))
    for judgement in judgements:
        if say and (judgement.stop or judgement.warning):
            say(judgement.stop or judgement.warning or "")
    for line in rounded:
        if say:
            say(line)
    return judgements


def _comparable(tensor: AlignedTensor, k: int) -> bool:
    """Whether a stack takes a tensor from the same layer of the base and of a model: others are no fine-tunes of it."""
    base, model = tensor.base, tensor.models[k]
    if base is None or model is None:
        return True
    found = [layer_of(info.stored_name) for info in (base, model)]
    return len({None if layer is None else layer.index for layer in found}) == 1
