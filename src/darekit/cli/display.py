# SPDX-License-Identifier: Apache-2.0
"""What the commands show: plans, reports, inspections, tables. Results go to standard output."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from threading import Lock
from typing import TYPE_CHECKING, Any

from darekit.architectures.groups import ONE_TERM
from darekit.cli import tables
from darekit.cli.display_adapters import LEGEND, adapters_data, adapters_table
from darekit.cli.pace import Pace
from darekit.wording import size_of

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from darekit.output.publishing import Report
    from darekit.planning.homology import Judgement
    from darekit.planning.plan import Plan
    from darekit.statistics.running import StatisticsReport


KINDS = {"fisher": "diagonal Fisher", "gram": "Gram matrices"}
GLOBS = 4  # names of tensors that are shown for an entry of keep_dense
LINES_EVERY = 30.0  # seconds between lines where there is no terminal
GRADIENT_LAYERS = 9  # layers of a gradient that are shown


def say_note(line: str) -> None:
    """A note or warning while a command runs."""
    print(tables.told(f"note: {line}"), file=sys.stderr)


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


def time_of(seconds: float) -> str:
    """A duration for people.

    >>> time_of(1.594), time_of(75.2), time_of(3725)
    ('1.59 s', '1 min 15 s', '1 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def left_told(seconds: float | None) -> str:
    """How long something will still take, to stand after how far it is; nothing where it is not known.

    >>> left_told(75.2), left_told(None)
    (', about 1 min 15 s left', '')
    """
    return "" if seconds is None else f", about {time_of(seconds)} left"


def _progress_lines(label: str, unit: str | None, at_once: int) -> Callable[[int, int], None]:
    """Where there is no terminal: a line at most every half minute, so what is short says nothing."""
    last, most = time.monotonic(), 0
    pace = Pace(first=1 if unit is None else at_once)
    lock = Lock()

    def advance(done: int, total: int) -> None:
        nonlocal last, most
        with lock:
            now = time.monotonic()
            pace.note(done, now)
            if now - last < LINES_EVERY or done <= most or done >= total:
                return
            last, most = now, done
            left = left_told(pace.left(total - done, now))
        part = f"{size_of(done)} of {size_of(total)}" if unit is None else f"{done} of {total} {unit}"
        print(f"{label}: {part}{left}", file=sys.stderr, flush=True)

    return advance


@contextmanager
def progress_bar(
    label: str, *, quiet: bool, unit: str | None = None, at_once: int = 1
) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error with the time left and bytes and rate, or a count of `unit`; without a terminal a line
    now and then. `at_once`: how many units are worked on at the same time."""
    if quiet:
        yield None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _progress_lines(label, unit, at_once)
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class Known(ProgressColumn):
        """Another column, once the total is known: `0/? bytes` tells nobody anything."""

        def __init__(self, column: ProgressColumn) -> None:
            super().__init__()
            self.column = column

        def render(self, task: Task) -> RenderableType:
            return Text("") if task.total is None else self.column(task)

    counts: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn())
    if unit is not None:
        counts = (MofNCompleteColumn(), TextColumn(unit))
    counts = (*counts, TimeRemainingColumn(compact=True), TextColumn("left"))
    with Progress(
        TextColumn(label), BarColumn(bar_width=None), *map(Known, counts),
        console=console, transient=True, expand=console.width <= 100,
    ) as progress:  # fmt: skip
        task = progress.add_task(label, total=None)

        def advance(done: int, total: int) -> None:
            # A measuring pass reads a tensor again: never show more than everything.
            progress.update(task, completed=min(done, total), total=total)

        yield advance


def show_report(report: Report, *, as_json: bool) -> None:
    """What a finished merge wrote, and what it took."""
    if as_json:
        print(json.dumps(report.to_data()))
        return
    from darekit.planning.losses import rounding_lines

    holds = f"{counted(report.tensors, 'tensor')}, {count_of(report.parameters)} parameters"
    if not report.bytes_read and not report.bytes_written:
        print(f"{report.output} is complete: {holds}; nothing was left to write")
        return
    print(f"Wrote {report.output}: {size_of(report.bytes_written)}, {holds}")
    shares = {model: f"{100 * kept / max(1, report.parameters):.3g} %" for model, kept in report.kept.items()}
    if len(shares) == 1:
        ((model, kept),) = report.kept.items()
        told = f"{shares[model]} of {model}'s {report.kept_of} ({count_of(kept)} elements)"
    else:
        told = ", ".join(f"{share} of {model}" for model, share in shares.items())
    rate = (report.bytes_read + report.bytes_written) / max(report.seconds, 1e-9)
    tables.print_facts([
        *([("kept", told)] if report.kept_of else []),
        ("rounding", "".join(rounding_lines(report.rounding))),
        ("took", f"{time_of(report.seconds)} at {size_of(rate)}/s, {size_of(report.peak_rss_bytes)} of memory at most"),
    ])  # fmt: skip


def show_statistics(report: StatisticsReport, *, as_json: bool) -> None:
    """What a pass over data wrote, and what it took."""
    if as_json:
        print(json.dumps(report.to_data()))
        return
    print(
        f"Wrote {report.output}: {KINDS[report.kind]} of {counted(report.tensors, 'tensor')}, {size_of(report.bytes)}"
    )
    passes = "1 pass" if report.passes == 1 else f"{report.passes} passes"
    tables.print_facts([
        ("mean", "" if report.mean is None else f"{report.mean:.2e}; keep `minimal` of a fisher merge far below it"),
        ("data", f"{counted(report.examples, 'example')}, {count_of(report.tokens)} tokens"),
        ("took", f"{time_of(report.seconds)}, {passes} over the data, with {size_of(report.sums_bytes)} of sums in "
         f"memory (--memory {size_of(report.memory)})"),
    ])  # fmt: skip


def plan_data(
    plan: Plan,
    judgements: Sequence[Judgement],
    notes: Sequence[str],
    threads: int | None,
    rounding: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
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
        **({"layers": _layers_data(plan)} if plan.towers else {}),
        "gradients": [asdict(row) for row in gradient_rows(plan.recipe, plan.depths, plan.towers)],
        "keep_dense": dense_tensors(plan),
        "rounding": rounding,
        "checks": [judgement.to_data() for judgement in judgements],
        "notes": list(notes),
        "adapters": adapters_data(plan),
    }


def _layers_data(plan: Plan) -> list[dict[str, Any]]:
    from darekit.cli.display_layers import layers_data

    return layers_data(plan)


def dense_tensors(plan: Plan) -> dict[str, list[str]]:
    """What each entry of `keep_dense` matched."""
    from darekit.architectures.groups import is_kept_dense

    if plan.recipe.sparsify is None:
        return {}
    return {
        pattern: [t.name for t in plan.alignment.tensors if is_kept_dense(t.name, t.group, [pattern])]
        for pattern in plan.recipe.sparsify.keep_dense
    }


def show_plan(
    plan: Plan,
    judgements: Sequence[Judgement],
    notes: Sequence[str],
    threads: int | None,
    rounding: Mapping[str, Any] | None,
    *,
    as_json: bool,
) -> None:
    """A plan for people, or as JSON; `rounding`: what rounding will do, from a sample."""
    from darekit.planning.losses import rounding_lines

    data = plan_data(plan, judgements, notes, threads, rounding)
    if as_json:
        print(json.dumps(data))
        return
    models = counted(len(plan.summaries), "model")
    print(f"Dry run, nothing is written: {plan.recipe.merge_method} of {models}")
    tables.print_facts([
        ("writes", f"{size_of(plan.bytes_out)} in {counted(len(plan.shards), 'file')}: "
         f"{counted(data['tensors'], 'tensor')}, {count_of(plan.parameters)} parameters"),
        ("reads", size_of(plan.bytes_in)),
        ("memory", f"about {size_of(data['peak_memory_bytes'])}"),
        ("rounding", "".join(f"{line} (in a sample)" for line in rounding_lines(rounding))),
    ])  # fmt: skip
    for note in notes:
        print(tables.wrapped(f"note: {note}", "  "))
    print()
    checks = {judgement.model: judgement for judgement in judgements}
    rows = []
    for summary in plan.summaries:
        check = checks.get(summary.ref)
        rows.append(
            (tables.shorten(summary.ref, tables.LONGEST), f"{summary.drop_rate:.4g}",
             f"{100 * summary.kept / max(1, summary.parameters):.3g} %", count_of(summary.kept),
             f"{check.r:.4f}" if check else "", f"{check.rho:.3f}" if check else "")
        )  # fmt: skip
    print_table(tables.table_of(("model", "mean drop rate", "kept", "elements", "r", "rho"), rows))
    if judgements:
        tables.print_small("r: ||delta|| / ||base|| in a sample. kept: what is not dropped, including "
                           "deltas that are exactly 0. rho: how far dropping is predicted to move a layer's "
                           "output, relative to it; above 0.5 a merge is refused.")  # fmt: skip
    if (adapters := adapters_table(data["adapters"])) is not None:
        print()
        print_table(adapters)
        tables.print_small(LEGEND)
    _show_layers(plan)
    _show_rates(plan)
    _show_gradients(data["gradients"], bars=bool(plan.towers))
    if data["keep_dense"]:
        print()
    # Of the groups that `recommend` and `drop_rate: auto` keep dense, a model need not have all.
    standing = plan.recipe.sparsify is not None and plan.recipe.sparsify.keep_dense == ONE_TERM
    for pattern, names in data["keep_dense"].items():
        if standing and not names:
            continue
        globs = tables.globs_of(names)
        more = f" and {len(globs) - GLOBS} more" if len(globs) > GLOBS else ""
        shown = ", ".join(globs[:GLOBS]) + more if names else "matches nothing"
        print(tables.wrapped(f"keep_dense {pattern}: {counted(len(names), 'tensor')}: {shown}", "  "))


def _show_rates(plan: Plan) -> None:
    """What `drop_rate: auto` came to, a row for each kind of tensor."""
    automatic = [(s.ref, rates) for s, rates in zip(plan.summaries, plan.rates, strict=True) if rates]
    if not automatic:
        return
    names = {name for _, rates in automatic for name in rates}
    tensors = [tensor for tensor in plan.alignment.tensors if tensor.name in names]
    kinds = tables.kinds_of([tables.Sized(t.name, t.shape, math.prod(t.shape), t.group) for t in tensors])

    def rate(kind: tables.Kind[tables.Sized], rates: Mapping[str, float]) -> float | None:
        return kind.mean(lambda tensor: rates.get(tensor.name))

    rows = [(tables.shorten(kind.name, tables.LONGEST), count_of(kind.parameters),
             *(_rate(rate(kind, rates)) for _, rates in automatic)) for kind in kinds]  # fmt: skip
    models = [tables.shorten(ref, tables.LONGEST) for ref, _ in automatic]
    heads = ("drop_rate: auto", "parameters", *(models if len(models) > 1 else ["drop rate"]))
    print()
    if len(automatic) > 1:
        print_table(tables.table_of(heads, rows))
        return
    kept = [{i: 1 - (rate(layer, automatic[0][1]) or 0.0) for i, layer in kind.by_layer().items()} for kind in kinds]
    layers = tables.layers_of(kinds)
    table, room = tables.with_bars(heads, rows, kept, layers, what="kept, ")
    print_table(table)
    tables.print_small(("Mean of each kind; every tensor: --json." + tables.bar_legend(
        "the share that is kept", layers, room, "the largest in its row")).strip())  # fmt: skip


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _show_layers(plan: Plan) -> None:
    """Where the layers of a stack come from."""
    if not plan.towers:
        return
    from darekit.cli.display_layers import rows_of

    for tower in plan.towers:
        print()
        heads = (tower.name, "model", "its layers", "where they lie in it")
        print_table(tables.table_of(heads, rows_of(tower), len(heads)))


def _show_gradients(gradients: Sequence[Mapping[str, Any]], *, bars: bool) -> None:
    """What each gradient comes to along the layers: all of them, or some at equal distances."""
    if not gradients:
        return
    from darekit.cli.display_layers import spark

    def row(one: Mapping[str, Any], count: int) -> tuple[str, ...]:
        last = len(one["values"]) - 1
        shown = sorted({round(i * last / (count - 1)) for i in range(count)})
        values = "  ".join(f"{one['first'] + i}: {one['values'][i]:.4g}" for i in shown)
        along = (spark(one["values"]),) if bars else ()
        return (one["parameter"], one["model"] or "all", one["filter"], one["stack"], *along, values)

    heads = ("gradient", "model", "filter", "layers", *(("along them",) if bars else ()), "layer: value")
    for count in range(GRADIENT_LAYERS, 2, -1):  # as many layers as the terminal has room for, and at least three
        rows = [row(one, count) for one in gradients]
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        if sum(widths) + tables.SPACE * (len(heads) - 1) <= tables.columns():
            break
    print()
    print_table(tables.table_of(heads, rows, len(heads)))


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
            **({} if entry.foreign is None else {"from": _whose(entry.foreign)}),
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


def _whose(foreign: Any) -> str:
    """The package that brought a method, or the module that registered it."""
    from darekit.methods.installed import distribution_of

    return distribution_of(foreign) or str(foreign.module)


def _first_clause(text: str) -> str:
    """A summary as far as its first break, for a table.

    >>> _first_clause("Drop at random and leave the survivors as they are: the paper's ablation.")
    'Drop at random and leave the survivors as they are'
    """
    return re.split(r"[.;:]\s|\.$|\s\(", text)[0]


def show_methods(name: str | None, *, as_json: bool) -> None:
    """The table of methods in a line each, or all about one."""
    data = methods_data()
    if name is not None:
        data = {title: [one for one in entries if one["name"] == name] for title, entries in data.items()}
    if as_json:
        print(json.dumps(data))
        return
    if name is not None:
        for title, entries in data.items():
            for entry in entries:
                print(f"{name} ({title[:-1].replace('_', ' ')})")
                print(tables.wrapped(entry["summary"], "  ", "  ") + "\n")
                tables.print_facts([
                    *((p["name"], f"{p['help']} ({_default(p['default'])})") for p in entry["parameters"]),
                    *([("source", entry["source"])] if entry["source"] else []),
                ])  # fmt: skip
                if "from" in entry:
                    print(f"\n  from: {entry['from']}")
        return
    width = max(len(one["name"]) for entries in data.values() for one in entries) + tables.SPACE
    for title, entries in data.items():
        print(f"{title.replace('_', ' ').capitalize()} (and their parameters)\n")
        for entry in entries:
            first = f"  {entry['name']:{width}}"
            words = ", ".join(parameter["name"] for parameter in entry["parameters"])
            text = _first_clause(entry["summary"]) + (f" ({words})" if words else "")
            text += f"; from {entry['from']}" if "from" in entry else ""
            print(tables.wrapped(text, " " * len(first), first))
        print()
    print(tables.wrapped(
        f"Any sparsifier can precede any merge method. {_other_names()}For more about one: dare methods NAME"
    ))  # fmt: skip


def _other_names() -> str:
    from darekit.methods import MERGE_ALIASES

    return "".join(f"{alias} is another name for {name}. " for alias, name in MERGE_ALIASES.items())


def _default(value: Any) -> str:
    return "required" if value is None else f"default {_plain(value)}"


def counted(count: int, noun: str) -> str:
    """`1 tensor`, `30 tensors`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
