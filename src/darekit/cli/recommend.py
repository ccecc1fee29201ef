# SPDX-License-Identifier: Apache-2.0
"""`dare recommend`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from darekit.cli import display, tables
from darekit.cli.options import HeadsOf, Json, Seed, Threads, Vocab, check_fraction, errors_told

if TYPE_CHECKING:
    from darekit.recommendation.advice import Recommendation, TensorAdvice

DENSE_SHOWN = 3  # names of tensors that are shown for each reason to keep them dense


def recommend(
    base: Annotated[str, typer.Argument(help="The checkpoint MODEL was fine-tuned from.")],
    model: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    tau: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1,
            metavar="X",
            help="How far a layer's output may move, relative to itself; default: 0.2, or 0.1 with --data.",
        ),
    ] = None,
    drop_rate: Annotated[
        float | None,
        typer.Option("-p", "--drop-rate", metavar="P", help="Judge this rate instead of what --tau allows."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Keep this fraction of what may be dropped, where it matters most: 0.05 for 5 %."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Text to run MODEL on: a JSON Lines file, or the name of a dataset; needs torch.")
    ] = None,
    search_q: Annotated[
        bool,
        typer.Option("--search-q", help="With --data: search DAREx's q = k (1 - p) by how little the outputs change."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write a recipe with these drop rates to this .yaml file.")] = None,
    keep_dense: Annotated[
        list[str] | None,
        typer.Option(help="Tensors not to drop; default: embeddings, norms and biases; none: drop from all."),
    ] = None,
    seed: Seed = None,
    vocab: Annotated[
        Vocab, typer.Option(help="If vocabularies differ: refuse, cut to the base's rows, or keep extra rows.")
    ] = Vocab.STRICT,
    heads: Annotated[
        HeadsOf | None, typer.Option(help="Copy the heads (classifiers, lm_head) from one of the two.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows of --data to read.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 512,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; default: the fastest available.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype to compute in; default: float32 on a CPU, else the model's own.")
    ] = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Show a row for every tensor instead of every kind.")
    ] = False,
    threads: Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the recipe if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Recommend how much of MODEL to drop, tensor by tensor, predict what that does, and write a recipe."""
    if drop_rate is not None:
        check_fraction(drop_rate, "-p")
        if budget is not None:
            raise typer.BadParameter("both a drop rate and a budget say how much; give only one", param_hint="--budget")
    check_fraction(budget or 0.0, "--budget")
    if search_q and data is None:
        raise typer.BadParameter("the search compares outputs on text; add --data FILE", param_hint="--search-q")
    with errors_told():
        from darekit.naming import ONE_TERM
        from darekit.recommendation import advice

        if out is not None:  # before anything long
            advice.check_out(out, overwrite=overwrite)
        dense = ONE_TERM if keep_dense is None else tuple(p for p in keep_dense if p != "none")
        with ExitStack() as bars:

            def step(what: str) -> Callable[[int, int], None] | None:
                bars.close()
                unit = {"running the model": "rows", "searching q": "runs"}.get(what)
                return bars.enter_context(display.progress_bar(what, quiet=as_json, unit=unit))

            found = advice.recommend(
                base, model, tau=tau, drop_rate=drop_rate, budget=budget, data=data, search_q=search_q,
                keep_dense=dense, seed=seed, vocab=vocab.value, heads=heads.value if heads else None, limit=limit,
                batch_size=batch_size, max_length=max_length, device=device, dtype=dtype, threads=threads,
                progress=step,
            )  # fmt: skip
        said, stopped = ([], False) if out is None else advice.write_recipe(found, out, overwrite=overwrite)
        if as_json:
            data_out = found.to_data() | {"out": str(out) if out else None, "checks": said}
            print(json.dumps(data_out))
            return
        _show(found, every=tensors)
        if out is not None:
            print(f"\nWrote {out}: the recipe. Next: dare merge {out} OUT{' --force' if stopped else ''}")
            for line in said:
                print(tables.wrapped(f"note: dare merge will say: {line}", "  "))


def _show(found: Recommendation, *, every: bool) -> None:
    """How much may be dropped and what that does, then a table by kind of tensor, or of every one."""
    tables.print_headline(found.verdict, _headline(found), tables.COLOURS[found.verdict])
    print()
    tables.print_facts(_facts(found))
    for note in found.notes:
        print(tables.wrapped(f"note: {note}", "  "))
    if found.tensors:
        print()
        _show_tensors(found, every=every)
    print()
    tables.print_small(f"{found.assumed}.")


def _show_tensors(found: Recommendation, *, every: bool) -> None:
    calibrated = found.calibration is not None
    heads = ("parameters", "r", "p_max", "drop rate", "rho", *(("kappa", "noise/signal") if calibrated else ()))
    if every:
        rows = [(one.name, *_cells(tables.Kind(one.name, (one,), (None,)), calibrated)) for one in found.tensors]
        display.print_table(tables.table_of(("tensor", *heads), rows))
        return
    kinds = [*tables.kinds_of(found.tensors), tables.whole(found.tensors)]
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
        f"Medians of each kind. r: ||delta|| / ||base||. p_max: the drop rate at which rho is {found.tau:g}. rho: "
        "predicted change of a layer's output, relative to it." + more * calibrated
        + tables.bar_legend("share kept", layers, room, "the largest in its row") + " Every tensor: --tensors."
    )  # fmt: skip


def _headline(found: Recommendation) -> str:
    from darekit.homology import label

    if found.verdict == "wrong_base":
        return f"{found.words}."
    if not found.tensors:
        return f"every tensor of {label(found.model)} stays dense."
    median, _ = found.rho
    far = f" {label(found.model)} is far from {label(found.base)}." if found.verdict == "large" else ""
    if found.asked is not None:
        return (
            f"p = {found.asked:g} is predicted to move a layer's output by {median:.3g} of itself; the median tensor "
            f"stays within {found.tau:g} up to p = {found.drop_rate:.4g}.{far}"
        )
    if found.budget is not None:
        return (
            f"keeping {100 * found.budget:g} % of what may be dropped is predicted to move a layer's output by "
            f"{median:.3g} of itself.{far}"
        )
    dropped = 100 * (1 - found.kept / max(1, found.parameters))
    return (
        f"{math.floor(10 * dropped) / 10:.1f} % of {label(found.model)}'s delta can be dropped, the median tensor at "
        f"p = {found.drop_rate:.4g}.{far}"
    )


def _facts(found: Recommendation) -> Iterator[tuple[str, str]]:
    median, largest = found.rho
    share = 100 * found.kept / max(1, found.parameters)
    yield "kept", f"{display.count_of(found.kept)} of {display.count_of(found.parameters)} elements ({share:.3g} %)"
    if found.tensors:
        yield "moves", f"a layer's output by {median:.3g} of itself (median), at most {largest:.3g}, as predicted"
    if found.search is not None:
        tried = ", ".join(f"{change:.4g} at k = {k:g}" for k, change in sorted(found.search.changes.items()))
        yield (
            "q",
            (f"{found.search.best:g} (1 - p) comes nearest to the fine-tuned outputs; {found.search.measure}: {tried}"),
        )
    from darekit.recommendation.advice import REASONS

    reasons: dict[str, list[str]] = {}
    for dense in found.dense:
        reasons.setdefault("" if dense.reason in REASONS.values() else dense.reason, []).append(dense.name)
    for reason, names in reasons.items():
        globs = tables.globs_of(names)
        more = f" and {len(globs) - DENSE_SHOWN} more" if len(globs) > DENSE_SHOWN else ""
        yield "dense", f"{', '.join(globs[:DENSE_SHOWN])}{more}" + (f" ({reason})" if reason else "")


def _cells(kind: tables.Kind[TensorAdvice], calibrated: bool) -> Iterator[str]:
    yield display.count_of(kind.parameters)
    yield tables.small(kind.median(lambda tensor: tensor.r))
    for value in (lambda tensor: tensor.p_max, lambda tensor: tensor.drop_rate):
        yield f"{kind.median(value):.4f}"
    yield f"{kind.median(lambda tensor: tensor.rho):.3f}"
    if calibrated:
        for seen in (kind.mean(lambda tensor: tensor.kappa), kind.mean(lambda tensor: tensor.noise_to_signal)):
            yield "" if seen is None else f"{seen:.3g}"
