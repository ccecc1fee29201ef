# SPDX-License-Identifier: Apache-2.0
"""What the commands show: plans, reports, inspections, tables. Results go to standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from darekit.wording import size_of

if TYPE_CHECKING:
    from rich.table import Table

    from darekit.output.publishing import Report
    from darekit.planning.homology import Judgement
    from darekit.planning.plan import Plan
    from darekit.statistics.running import StatisticsReport


def say_note(line: str) -> None:
    """A note or warning while a command runs."""
    print(f"note: {line}", file=sys.stderr)


def count_of(count: float) -> str:
    """Elements for people.

    >>> count_of(570_000_000)
    '570 M'
    """
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} B"


@contextmanager
def progress_bar(label: str, *, quiet: bool, unit: str | None = None) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error with bytes and rate (or a count of `unit`) and time left; nothing where that is no
    terminal."""
    if quiet:
        yield None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn())
    if unit is not None:
        counts = (MofNCompleteColumn(), TextColumn(unit))
    with Progress(
        TextColumn(label), BarColumn(), *counts, TimeRemainingColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task(label, total=None)

        def advance(done: int, total: int) -> None:
            # A measuring pass reads a tensor again: never show more than everything.
            progress.update(task, completed=min(done, total), total=total)

        yield advance


def show_report(report: Report, *, as_json: bool) -> None:
    """What a finished merge did."""
    if as_json:
        print(json.dumps(report.to_data()))
        return
    rate = (report.bytes_read + report.bytes_written) / max(report.seconds, 1e-9)
    print(
        f"{report.output}: {report.tensors} tensors, {count_of(report.parameters)} parameters, "
        f"{size_of(report.bytes_written)} in {report.seconds:.2f} s ({size_of(rate)}/s, "
        f"{size_of(report.peak_rss_bytes)} of memory)"
    )
    for model, kept in report.kept.items():
        share = 100 * kept / report.parameters if report.parameters else 0
        print(f"  {model}: {count_of(kept)} of its deltas kept ({share:.3g} %)")


def show_statistics(report: StatisticsReport, *, as_json: bool) -> None:
    """What a pass over data did."""
    if as_json:
        print(json.dumps(report.to_data()))
        return
    print(
        f"{report.output}: {report.kind} of {_plural(report.tensors, 'tensor')}, {count_of(report.examples)} examples, "
        f"{count_of(report.tokens)} tokens, {size_of(report.bytes)} in {report.seconds:.2f} s"
    )
    passes = "1 pass" if report.passes == 1 else f"{report.passes} passes"
    print(
        f"  {passes} over the data, with {size_of(report.sums_bytes)} of sums in memory "
        f"(--memory {size_of(report.memory)})"
    )
    if report.mean is not None:
        print(f"  mean {report.mean:.2e}; `minimal` of a fisher merge should be far below it")


def plan_data(plan: Plan, judgements: Sequence[Judgement], notes: Sequence[str], threads: int | None) -> dict[str, Any]:
    """A plan in JSON-able form."""
    from darekit.engine.tiles import TILE
    from darekit.machine import default_threads
    from darekit.planning.notes import gradient_rows

    return {
        "tensors": len(plan.alignment.tensors),
        "parameters": plan.parameters,
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "peak_memory_bytes": plan.peak_memory(threads or default_threads(), TILE),
        "shards": [{"file": shard.filename, "bytes": shard.size} for shard in plan.shards],
        "models": [
            {
                "model": summary.ref,
                "parameters": summary.parameters,
                "drop_rate": summary.drop_rate,
                "kept": summary.kept,
                "effective_seed": summary.seed,
                **({"drop_rates": dict(rates)} if rates else {}),
            }
            for summary, rates in zip(plan.summaries, plan.rates, strict=True)
        ],
        "gradients": [asdict(row) for row in gradient_rows(plan.recipe, plan.depths)],
        "keep_dense": dense_tensors(plan),
        "checks": [judgement.to_data() for judgement in judgements],
        "notes": list(notes),
    }


def dense_tensors(plan: Plan) -> dict[str, list[str]]:
    """What each entry of `keep_dense` matched."""
    from darekit.architectures.groups import is_kept_dense

    if plan.recipe.sparsify is None:
        return {}
    return {
        pattern: [t.name for t in plan.alignment.tensors if is_kept_dense(t.name, t.shape, [pattern])]
        for pattern in plan.recipe.sparsify.keep_dense
    }


def show_plan(
    plan: Plan, judgements: Sequence[Judgement], notes: Sequence[str], threads: int | None, *, as_json: bool
) -> None:
    """A plan for people, or as JSON."""
    data = plan_data(plan, judgements, notes, threads)
    if as_json:
        print(json.dumps(data))
        return
    from rich.table import Table

    print(f"{data['tensors']} tensors, {count_of(plan.parameters)} parameters, method {plan.recipe.merge_method}")
    print(f"reads {size_of(plan.bytes_in)}, writes {size_of(plan.bytes_out)} in {_plural(len(plan.shards), 'file')}")
    print(f"memory: about {size_of(data['peak_memory_bytes'])}")
    table = Table("model", "parameters", "mean drop rate", "kept", "r", "rho", box=None, pad_edge=False)
    checks = {judgement.model: judgement for judgement in judgements}
    for summary in plan.summaries:
        check = checks.get(summary.ref)
        table.add_row(
            summary.ref, count_of(summary.parameters), f"{summary.drop_rate:.4g}", count_of(summary.kept),
            f"{check.r:.4f}" if check else "", f"{check.rho:.3f}" if check else "",
        )  # fmt: skip
    print_table(table)
    _show_rates(plan)
    _show_gradients(data["gradients"])
    for pattern, names in data["keep_dense"].items():
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        print(f"keep_dense {pattern}: {_plural(len(names), 'tensor')}{': ' + shown if names else ' (matches nothing)'}")
    for note in notes:
        print(f"note: {note}")


def _show_rates(plan: Plan) -> None:
    """What `drop_rate: auto` came to, a row for each tensor."""
    automatic = [(s.ref, rates) for s, rates in zip(plan.summaries, plan.rates, strict=True) if rates]
    if not automatic:
        return
    from rich.table import Table

    table = Table("drop_rate: auto", *(ref for ref, _ in automatic), box=None, pad_edge=False)
    for name in dict.fromkeys(name for _, rates in automatic for name in rates):
        table.add_row(name, *(f"{rates[name]:g}" if name in rates else "" for _, rates in automatic))
    print_table(table)


GRADIENT_COLUMNS = 9  # layers of a gradient that are shown


def _show_gradients(rows: Sequence[Mapping[str, Any]]) -> None:
    """What each gradient comes to along the layers: all of them, or some at equal distances."""
    if not rows:
        return
    from rich.table import Table

    table = Table("gradient", "model", "filter", "layers", "layer: value", box=None, pad_edge=False)
    for row in rows:
        last = len(row["values"]) - 1
        shown = sorted({round(i * last / (GRADIENT_COLUMNS - 1)) for i in range(GRADIENT_COLUMNS)})
        values = "  ".join(f"{i}: {row['values'][i]:.4g}" for i in shown)
        table.add_row(row["parameter"], row["model"] or "all", row["filter"], row["stack"], values)
    print_table(table)


def print_table(table: Table) -> None:
    """A table on standard output."""
    from rich.console import Console

    # As wide as its cells: on 80 columns rich would cut the names of tensors to `mod...`.
    Console(soft_wrap=True, width=10_000).print(table)


def methods_data() -> dict[str, list[dict[str, Any]]]:
    """The table of methods in JSON-able form."""
    from darekit.methods import MERGE_METHODS, SPARSIFIERS

    def described(entry: Any) -> dict[str, Any]:
        text = (entry.function.__doc__ or "").strip()
        summary, _, source = text.partition("Source: ")
        return {
            "name": entry.name,
            "summary": " ".join(summary.split()),
            "source": " ".join(source.split()),
            "parameters": [
                {"name": p.name, "default": p.default, "help": p.kind.help} for p in entry.parameters.values()
            ],
        }

    return {
        "sparsifiers": [described(entry) for entry in SPARSIFIERS.values()],
        "merge_methods": [described(entry) for entry in MERGE_METHODS.values()],
    }


def show_methods(*, as_json: bool) -> None:
    """The table of methods."""
    data = methods_data()
    if as_json:
        print(json.dumps(data))
        return
    for title, entries in data.items():
        print(title.replace("_", " ").upper())
        for entry in entries:
            print(f"\n  {entry['name']}: {entry['summary']}")
            print(f"    source: {entry['source']}")
            for parameter in entry["parameters"]:
                default = "required" if parameter["default"] is None else f"default {_plain(parameter['default'])}"
                print(f"    {parameter['name']} ({default}): {parameter['help']}")
        print()


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
