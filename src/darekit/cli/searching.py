# SPDX-License-Identifier: Apache-2.0
"""`dare search`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from darekit.cli.options import Device, DryRun, Dtype, GpusPerWorker, Jobs, Json, Ray, Threads, errors_told

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def search(
    source: Annotated[Path, typer.Argument(metavar="SEARCH.yaml", help="Search file (YAML).")],
    out: Annotated[
        Path | None, typer.Argument(help="Folder for the results; default: SEARCH.yaml without its extension.")
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Candidates to judge, all runs together; default: the file's, or 60."),
    ] = None,
    time: Annotated[
        str | None, typer.Option(metavar="TIME", help="Start no new candidate after this time: 90s, 30min, 2h.")
    ] = None,
    jobs: Jobs = None,
    ray: Ray = None,
    gpus_per_worker: GpusPerWorker = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Search for the best recipe. To continue after an interruption, or to share the work, run the same command."""
    seconds = None if time is None else seconds_of(time)
    place = out or source.with_suffix("")
    with errors_told():
        from darekit.cli import display, display_search
        from darekit.searches.reading import read_search
        from darekit.searches.running import check_search
        from darekit.searches.running import search as run_search

        found = read_search(source)
        if dry_run:
            bound, baselines = check_search(found, place, dtype=dtype)
            display_search.show_space(bound, baselines, as_json=as_json)
            return
        with display_search.watched(quiet=as_json) as watch:
            result = run_search(
                found, place, trials=trials, seconds=seconds, jobs=jobs, ray=ray,
                gpus_per_worker=gpus_per_worker, threads=threads, device=device, dtype=dtype,
                watch=watch, say=None if as_json else display.say_note,
            )  # fmt: skip
        display_search.show_result(result, as_json=as_json)
    if result.interrupted:
        typer.echo(f"dare: interrupted; {place} keeps all results: run the same command again to continue", err=True)
        raise typer.Exit(130)


def seconds_of(text: str) -> float:
    """`90s`, `30min`, `1h30m`, `2h` -> seconds."""
    found = re.fullmatch(r"(?:\d+(?:\.\d+)?\s*(?:s|min|m|h|d)\s*)+", text.strip().lower())
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a time; write 90s, 30min or 2h", param_hint="--time")
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(min|s|m|h|d)", found[0])
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if seconds == 0:
        raise typer.BadParameter(
            f"{text!r} leaves no time for any candidate; leave --time out for as many as --trials says",
            param_hint="--time",
        )
    return seconds
