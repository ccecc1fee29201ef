# SPDX-License-Identifier: Apache-2.0
"""The demo: train a tiny family of models, merge it with and without DARE, and measure what is left of each ability.

Importing this package is cheap; torch, transformers and matplotlib are imported by `run_demo`.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from darekit.demo.measurements import DemoResult
from darekit.demo.settings import Settings, quick_settings
from darekit.errors import DarekitError, OutputError

EXTRAS = ("torch", "transformers", "tokenizers", "matplotlib")
MARKER = "demo.json"  # says that a directory is the demo's, so that nothing of the user's is ever replaced

__all__ = ["DemoResult", "run_demo", "show"]


def run_demo(
    directory: Path, *, quick: bool = False, quiet: bool = False, settings: Settings | None = None
) -> DemoResult:
    """Train what is missing in a directory, merge, measure, and write results.md, results.json and drop_rates.png.

    Args:
        directory: a new or empty directory, or one of an earlier demo, whose models are then used again.
        quick: much smaller models, in seconds: for tests of the machinery.
        quiet: no progress bars; there are none either where stderr is not a terminal.
        settings: what to train and measure, instead of the default.

    Raises:
        DarekitError: the extra `demo` is not installed.
        OutputError: the directory holds something else.
        DataError: a training diverged.
    """
    require_extras()
    settings = settings or (quick_settings() if quick else Settings())
    directory = claim_directory(Path(directory))

    from darekit.demo import data, evaluation, family, recipes, report, tasks, training

    members = family.Family(directory, settings)
    with family.calm(), _progress(quiet) as progress:
        family.remove_unfinished(directory)
        start = time.perf_counter()
        trained = training.train_family(members, progress)
        middle = time.perf_counter()
        total, done = evaluation.count_steps(members), iter(range(1, 1 << 30))

        def step() -> None:
            progress("merging and measuring", next(done), total)

        scores, controls = evaluation.measure_rows(members, step)
        points = evaluation.measure_sweep(members, step)
        end = time.perf_counter()
    recipes.copy_examples(directory)
    data.write_data(directory, settings)
    result = DemoResult(
        directory=directory,
        abilities=tasks.FINE_TUNED,
        scores=scores,
        controls=controls,
        points=points,
        drop_rate=recipes.read_example(recipes.NAMES[-1][2])["sparsify"]["drop_rate"],
        control_lambda=evaluation.CONTROL_LAMBDA,
        items=settings.items,
        trained=trained,
        training_seconds=middle - start,
        measuring_seconds=end - middle,
        table=directory / "results.md",
        data=directory / "results.json",
        plot=directory / "drop_rates.png",
    )
    report.write_report(result)
    return result


def show(result: DemoResult) -> None:
    """Print the table, and where everything is."""
    from rich.console import Console

    from darekit.demo.report import render_table

    console = Console(highlight=False)
    console.print(render_table(result))
    seconds = f"in {result.training_seconds:.0f} s, merged and measured in {result.measuring_seconds:.0f} s."
    console.print(f"\nTrained {len(result.trained)} models {seconds}")
    merged = result.directory / "merged"
    for title, path in (("Plot", result.plot), ("Table", result.table), ("Numbers", result.data), ("Merged", merged)):
        console.print(f"{title + ':':9}{path}", soft_wrap=True)


def require_extras() -> None:
    """Say what to install, before a second-long import of half of it."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise DarekitError(f"the demo needs {', '.join(missing)}, which is not installed: pip install 'darekit[demo]'")


def claim_directory(directory: Path) -> Path:
    """Make a directory the demo's, unless it holds something else.

    Raises:
        OutputError: it is a file, or holds files and no mark of an earlier demo.
    """
    directory = directory.absolute()
    marker = directory / MARKER
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"{directory} is a file; the demo needs a directory")
    if directory.is_dir() and not marker.is_file() and any(directory.iterdir()):
        raise OutputError(
            f"{directory} holds other files and no {MARKER} of an earlier demo: choose a new or an empty directory"
        )
    directory.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"made_by": "dare demo"}) + "\n")
    return directory


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bars:
        stages = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total)
            bars.update(stages[stage], completed=done, total=total)

        yield progress
