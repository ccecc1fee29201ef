# SPDX-License-Identifier: Apache-2.0
"""`dare inspect`, `similarity` and `sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from darekit.cli.options import (
    Device,
    DryRun,
    Dtype,
    GpusPerWorker,
    Jobs,
    Json,
    KeepDense,
    Ray,
    Threads,
    Vocab,
    check_drop_rate,
    errors_told,
    listed,
)


def inspect(
    base: Annotated[str, typer.Argument(help="The checkpoint the models were fine-tuned from.")],
    models: Annotated[list[str], typer.Argument(help="The fine-tuned model, or several to compare with each other.")],
    vocab: Annotated[
        Vocab, typer.Option(help="If vocabularies differ: refuse (strict), or compare the rows both have (base, pad).")
    ] = Vocab.BASE,
    heads: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="base, model, or one of several models: whose heads a recipe would keep. No heads are compared then.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write plots of the deltas to this folder, as PNG and SVG.")
    ] = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Show a row for every tensor instead of every kind.")
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Check that BASE is the base, how much can be dropped, and where several models conflict."""
    with errors_told():
        from darekit.analysis.inspection import inspect as inspect_models
        from darekit.cli import display, display_inspect

        if plot is not None:
            from darekit.plotting import require_matplotlib

            require_matplotlib()
        with display.progress_bar("inspecting", quiet=as_json) as progress:
            found = inspect_models(
                base, *models, vocab=vocab.value, heads=heads, threads=threads, progress=progress
            )  # fmt: skip
        drawn = []
        if plot is not None:
            from darekit.analysis.drawing import draw_inspection
            from darekit.analysis.records import write_inspection

            drawn = draw_inspection(found, plot)
            write_inspection(found, plot)
        display_inspect.show_inspections(found, drawn, tensors=tensors, as_json=as_json)


def similarity(
    base: Annotated[str, typer.Argument(help="The checkpoint MODEL was fine-tuned from.")],
    model: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    data: Annotated[str, typer.Option(metavar="FILE", help="Text: a JSON Lines file, or the name of a dataset.")],
    drop_rate: Annotated[
        list[str],
        typer.Option(
            "-p",
            "--drop-rate",
            metavar="P,...",
            help="Fraction of the delta to drop; for several, use commas or repeat.",
        ),
    ],
    methods: Annotated[
        list[str], typer.Option(metavar="NAME,...", help="Sparsifiers; for several, use commas or repeat.")
    ] = ["dare,drop_only,magnitude"],  # noqa: B006 (typer reads the default)
    seeds: Annotated[
        list[str], typer.Option(metavar="N,...", help="Seeds for the masks; for several, use commas or repeat.")
    ] = ["0"],  # noqa: B006
    keep_dense: KeepDense = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Rows to read.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Rows per batch.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens per row.")] = 128,
    device: Device = None,
    dtype: Dtype = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write similarity.png and similarity.svg to this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how far dropping turns MODEL's hidden states: the cosine to the original ones, layer by layer."""
    rates = [_rate(word) for word in _some(drop_rate, "-p")]
    words, numbers = _some(methods, "--methods"), [_seed(word) for word in _some(seeds, "--seeds")]
    with errors_told():
        from darekit.cli import display, display_analysis

        if plot is not None:
            from darekit.plotting import require_matplotlib

            require_matplotlib()
        from darekit.analysis.similarities import similarity as compare

        with display.progress_bar("comparing", quiet=as_json, unit="rows") as progress:
            found = compare(
                base, model, data=data, drop_rate=rates, methods=words, seeds=numbers, keep_dense=keep_dense or (),
                limit=limit, batch_size=batch_size, max_length=max_length, device=device, dtype=dtype,
                progress=progress, say=None if as_json else display.say_note,
            )  # fmt: skip
        drawn = []
        if plot is not None:
            from darekit.analysis.curves import draw_similarity

            drawn = [*draw_similarity(found, plot / "similarity")]
        display_analysis.show_similarity(found, drawn, as_json=as_json)


def _some(texts: list[str], option: str) -> list[str]:
    words = listed(texts)
    if not words:
        raise typer.BadParameter("is empty; give at least one", param_hint=option)
    return words


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number from 0 to 1, as in 0.5,0.9", param_hint="-p") from None
    check_drop_rate(value)
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 64:
        raise typer.BadParameter(
            f"{text!r} is not a whole number from 0 to 2^64 - 1, as in 1,2,3", param_hint="--seeds"
        )
    return int(text)


def sweep(
    source: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="Sweep file (YAML).")],
    out: Annotated[
        Path | None, typer.Argument(help="Directory for the results; default: SWEEP.yaml without its extension.")
    ] = None,
    jobs: Jobs = None,
    ray: Ray = None,
    gpus_per_worker: GpusPerWorker = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="Write tables but no plots.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the tables of another sweep in OUT; its cells are kept.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Evaluate every combination of a recipe's settings. If interrupted, run the same command again to continue."""
    place = out or source.with_suffix("")
    try:
        with errors_told():
            from darekit.cli import display, display_analysis
            from darekit.sweeps.reading import read_sweep
            from darekit.sweeps.running import check_sweep
            from darekit.sweeps.running import sweep as run_sweep

            found = read_sweep(source)
            if dry_run:
                cells, notes = check_sweep(found, place, dtype=dtype, overwrite=overwrite)
                display_analysis.show_cells(cells, notes, as_json=as_json)
                return

            with display.progress_bar("sweeping", quiet=as_json, unit="evaluations", at_once=jobs or 1) as progress:
                result = run_sweep(
                    found, place, jobs=jobs, ray=ray, gpus_per_worker=gpus_per_worker,
                    threads=threads, device=device, dtype=dtype, plots=not no_plots,
                    overwrite=overwrite, progress=progress, say=None if as_json else display.say_note,
                )  # fmt: skip
            display_analysis.show_sweep(result, as_json=as_json)
    except typer.Exit as stop:
        if stop.exit_code == 130:
            typer.echo(f"dare: finished cells are in {place}; run the same command again to continue", err=True)
        raise
    if all(one.outcome.error is not None for one in result.finished if one.cell.kind == "grid"):
        raise typer.Exit(1)
