# SPDX-License-Identifier: Apache-2.0
"""Numeric checks of a plan: a small sample of values is read before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from darekit.architectures.depth import layer_of
from darekit.errors import HomologyError

if TYPE_CHECKING:
    from darekit.planning.homology import Judgement
    from darekit.planning.matching.alignment import AlignedTensor
    from darekit.planning.plan import Plan


def check(plan: Plan, *, force: bool = False, say: Callable[[str], None] | None = None) -> list[Judgement]:
    """Numeric homology tests on a sample of the values; says warnings, raises on refusals. Of recipes that are models
    too, though what is returned is about the plan's own models.

    Raises:
        HomologyError: a model does not look like its base's child, or too much is dropped (unless `force`).
        DataError: integer tensors differ.
    """
    judgements, told = _judge(plan)
    found = [("", one) for one in judgements]
    for ref, inner in _within(plan):
        others, more = _judge(inner)
        found += [(f"{ref}: ", one) for one in others]
        told += [f"{ref}: {line}" for line in more]
    stops = [f"{where}{one.stop}" for where, one in found if one.stop]
    if stops and not force:
        raise HomologyError("\n".join(f"{stop}; use --force to continue anyway" for stop in stops))
    for where, one in found:
        if say and (one.stop or one.warning):
            say(f"{where}{one.stop or one.warning}")
    if say:
        for line in told:
            say(line)
    return judgements


def _within(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """The recipes that are models, and those that are models of these: what went wrong there is in the result."""
    seen: set[int] = set()
    for one in plan.within:
        for ref, inner in ((one.ref, one.plan), *_within(one.plan)):
            if id(inner) not in seen:
                seen.add(id(inner))
                yield ref, inner


def _judge(plan: Plan) -> tuple[list[Judgement], list[str]]:
    """How each model looks beside the base, and what there is to say of quantised ones."""
    from darekit.planning.homology import Sample, check_integers, judge, sample_norms
    from darekit.planning.rounding import rounding_of
    from darekit.planning.rounding import told as told_of

    weights = [tensor for tensor in plan.alignment.tensors if tensor.name not in plan.roles]
    check_integers(weights, [model.ref for model in plan.models])
    if plan.base is None or (plan.recipe.sparsify is not None and plan.recipe.sparsify.on == "weights"):
        return [], []
    judgements: list[Judgement] = []
    told: list[str] = []
    kept: dict[str, Sample] = {}
    for k, model in enumerate(plan.models):
        if model.ref == plan.base.ref:  # listed on purpose, by a method that counts it among the models
            continue
        own = [tensor for tensor in weights if _comparable(tensor, k)] if plan.towers else weights
        if not own:
            continue
        norms = sample_norms(own, k, partial(plan.rate_of, k), kept)
        judgements.append(judge(model.ref, plan.base.ref, norms))
        if (found := rounding_of(own, k, norms)) is not None:
            told.append(told_of(model.ref, plan.base.ref, found))
    return judgements, told


def _comparable(tensor: AlignedTensor, k: int) -> bool:
    """Whether a stack takes a tensor from the same layer of the base and of a model: others are no fine-tunes of it."""
    base, model = tensor.base, tensor.models[k]
    if base is None or model is None:
        return True
    found = [layer_of(info.stored_name) for info in (base, model)]
    return len({None if layer is None else layer.index for layer in found}) == 1
