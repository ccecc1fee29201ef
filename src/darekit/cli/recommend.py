# SPDX-License-Identifier: Apache-2.0
"""`dare recommend`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from darekit.cli.options import (
    Device,
    Dtype,
    HeadsOption,
    Json,
    Seed,
    Threads,
    Vocab,
    VocabOption,
    check_fraction,
    errors_told,
)


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
        str | None,
        typer.Option(
            metavar="FILE", help="Text to run MODEL on: a JSON Lines file, or the name of a dataset; needs torch."
        ),
    ] = None,
    search_q: Annotated[
        bool,
        typer.Option("--search-q", help="With --data: search DAREx's q = k (1 - p) by how little the outputs change."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a recipe with these drop rates to this .yaml file.")
    ] = None,
    keep_dense: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Tensors not to drop; default: embeddings, norms and biases; none: drop from all."
        ),
    ] = None,
    seed: Seed = None,
    vocab: VocabOption = Vocab.STRICT,
    heads: HeadsOption = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Rows of --data to read.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Rows per batch.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens per row.")] = 512,
    device: Device = None,
    dtype: Dtype = None,
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
        from darekit.architectures.groups import ONE_TERM
        from darekit.cli import display, display_recommend
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
        display_recommend.show_recommendation(found, out, said, stopped=stopped, tensors=tensors)
