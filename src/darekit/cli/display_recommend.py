# SPDX-License-Identifier: Apache-2.0
"""What `dare recommend` shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from darekit.cli import display, tables

if TYPE_CHECKING:
    from darekit.recommendation.advice import Recommendation, TensorAdvice

DENSE_SHOWN = 3  # names of tensors that are shown for each reason to keep them dense


def show_recommendation(
    advice: Recommendation, out: Path | None, said: Sequence[str], *, stopped: bool, tensors: bool
) -> None:
    """How much may be dropped and what that does, then a table by kind of tensor, or of every one, then the recipe."""
    tables.print_headline(advice.verdict, _headline(advice), tables.COLOURS[advice.verdict])
    print()
    tables.print_facts(_facts(advice))
    for note in advice.notes:
        print(tables.wrapped(f"note: {note}", "  "))
    if advice.tensors:
        print()
        _show_tensors(advice, every=tensors)
    print()
    tables.print_small(f"{advice.assumed}.")
    if out is not None:
        print(f"\nWrote {out}: the recipe. Next: dare merge {out} OUT{' --force' if stopped else ''}")
        for line in said:
            print(tables.wrapped(f"note: dare merge will say: {line}", "  "))


def _show_tensors(advice: Recommendation, *, every: bool) -> None:
    calibrated = advice.calibration is not None
    heads = ("parameters", "r", "p_max", "drop rate", "rho", *(("kappa", "noise/signal") if calibrated else ()))
    if every:
        rows = [(one.name, *_cells(tables.Kind(one.name, (one,), (None,)), calibrated)) for one in advice.tensors]
        display.print_table(tables.table_of(("tensor", *heads), rows))
        return
    kinds = [*tables.kinds_of(advice.tensors), tables.whole(advice.tensors)]
    rows = [(tables.shorten(kind.name, tables.LONGEST), *_cells(kind, calibrated)) for kind in kinds]
    kept = [
        {layer: 1 - (part.mean(lambda tensor: tensor.drop_rate) or 0.0) for layer, part in kind.by_layer().items()}
        for kind in kinds
    ]
    layers = tables.layers_of(kinds)
    table, room = tables.with_bars(("kind of tensor", *heads), rows, kept, layers, what="kept, ")
    display.print_table(table)
    print()
    more = " kappa: how strongly the delta responds to this text. noise/signal: noise against what fine-tuning does."
    tables.print_small(
        f"Medians of each kind. r: ||delta|| / ||base||. p_max: the drop rate at which rho is {advice.tau:g}. rho: "
        "predicted change of a layer's output, relative to it." + more * calibrated
        + tables.bar_legend("share kept", layers, room, "the largest in its row") + " Every tensor: --tensors."
    )  # fmt: skip


def _headline(advice: Recommendation) -> str:
    from darekit.wording import label

    if advice.verdict == "wrong_base":
        return f"{advice.words}."
    if not advice.tensors:
        return f"every tensor of {label(advice.model)} stays dense."
    median, _ = advice.rho
    far = f" {label(advice.model)} is far from {label(advice.base)}." if advice.verdict == "large" else ""
    if advice.asked is not None:
        return (
            f"p = {advice.asked:g} is predicted to move a layer's output by {median:.3g} of itself; at most "
            f"p = {_rate(advice)} is advised for the median tensor (tau = {advice.tau:g}).{far}"
        )
    if advice.budget is not None:
        return (
            f"keeping {100 * advice.budget:g} % of what may be dropped is predicted to move a layer's output by "
            f"{median:.3g} of itself.{far}"
        )
    dropped = 100 * (1 - advice.kept / max(1, advice.parameters))
    return (
        f"{math.floor(10 * dropped) / 10:.1f} % of {label(advice.model)}'s delta can be dropped, the median tensor at "
        f"p = {_rate(advice)}.{far}"
    )


def _rate(advice: Recommendation) -> str:
    """As the recipe would say it: rounded down."""
    from darekit.planning.rates import rounded_down

    return f"{rounded_down(advice.drop_rate):g}"


def _facts(advice: Recommendation) -> Iterator[tuple[str, str]]:
    median, largest = advice.rho
    share = 100 * advice.kept / max(1, advice.parameters)
    yield "kept", f"{display.count_of(advice.kept)} of {display.count_of(advice.parameters)} elements ({share:.3g} %)"
    if advice.tensors:
        yield "moves", f"a layer's output by {median:.3g} of itself (median), at most {largest:.3g}, as predicted"
    if advice.search is not None:
        tried = ", ".join(f"{change:.4g} at k = {k:g}" for k, change in sorted(advice.search.changes.items()))
        best = f"{advice.search.best:g} (1 - p) comes nearest to the fine-tuned outputs"
        yield "q", f"{best}; {advice.search.measure}: {tried}"
    from darekit.recommendation.advice import REASONS

    reasons: dict[str, list[str]] = {}
    for dense in advice.dense:
        reasons.setdefault("" if dense.reason in REASONS.values() else dense.reason, []).append(dense.name)
    for reason, names in reasons.items():
        globs = tables.globs_of(names)
        more = f" and {len(globs) - DENSE_SHOWN} more" if len(globs) > DENSE_SHOWN else ""
        yield "dense", f"{', '.join(globs[:DENSE_SHOWN])}{more}" + (f" ({reason})" if reason else "")


def _cells(kind: tables.Kind[TensorAdvice], calibrated: bool) -> Iterator[str]:
    yield display.count_of(kind.parameters)
    yield tables.small(kind.median(lambda tensor: tensor.r))
    for value in (lambda tensor: tensor.p_max, lambda tensor: tensor.drop_rate):
        yield tables.floored(kind.median(value), 4)
    yield f"{kind.median(lambda tensor: tensor.rho):.3f}"
    if calibrated:
        for seen in (kind.mean(lambda tensor: tensor.kappa), kind.mean(lambda tensor: tensor.noise_to_signal)):
            yield "" if seen is None else f"{seen:.3g}"
