# SPDX-License-Identifier: Apache-2.0
"""`dare check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from darekit.cli.options import (
    Json,
    Lenient,
    Seed,
    Settings,
    ShardSize,
    Stage,
    Threads,
    bytes_of,
    errors_told,
    overrides_of,
)


def check(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    out: Annotated[
        Path | None,
        typer.Argument(help="Where the output would go: also check that it fits and nothing is in the way."),
    ] = None,
    seed: Seed = None,
    settings: Settings = None,
    threads: Threads = None,
    shard_size: ShardSize = "5GB",
    lenient: Lenient = False,
    stage: Stage = None,
    as_json: Json = False,
) -> None:
    """List everything wrong with RECIPE and its models, from headers alone; exit with 1 if there is anything."""
    limit = bytes_of(shard_size)
    overrides = overrides_of(settings or [])
    with errors_told():
        from darekit.cli import display_check
        from darekit.output.room import output_problems
        from darekit.planning.checking import check_recipe
        from darekit.recipe.collecting import read_collecting
        from darekit.recipe.reading import search_path

        found, errors = read_collecting(recipe, settings=overrides, seed=seed, lenient=lenient, stage=stage)
        if found is None:
            display_check.show_problems(str(recipe), errors, as_json=as_json)
            raise typer.Exit(1)
        with check_recipe(found, search=search_path(recipe), shard_size=limit) as findings:
            problems = list(findings.problems)
            needed = findings.plan.bytes_out if findings.plan else 0
            problems += [] if out is None else output_problems(out, needed)
            if findings.plan is None or problems:
                display_check.show_problems(str(recipe), problems, as_json=as_json)
                raise typer.Exit(1)
            display_check.show_fit(str(recipe), findings, threads, as_json=as_json)
