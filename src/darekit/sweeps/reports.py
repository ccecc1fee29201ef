# SPDX-License-Identifier: Apache-2.0
"""The tables of a sweep (for the terminal and as Markdown), its summary as JSON, its plots on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darekit.sweeps.data import SPLITS, UNDROPPED, Sweep
from darekit.sweeps.effects import difference_of, differences_of
from darekit.sweeps.store import CELLS, PLOTS, SUMMARY, TABLES
from darekit.sweeps.summaries import Row, Summary, figure_of, roles_of, shown, shown_label, summarise, title_of
from darekit.trials.files import write_whole

if TYPE_CHECKING:
    from darekit.sweeps.store import SweepResult


@dataclass(frozen=True)
class Table:
    """A table as text; the first columns (as many as `words`) hold words, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int


def tables_of(sweep: Sweep, summary: Summary, out: Path | None = None) -> tuple[Table, ...]:
    """What validation chose; the chosen score over the x axis, for each split; every setting with every score. `out`:
    where rows' effects are kept, if settings are to be compared row by row."""
    crossed = (table for score in _compared(summary) for table in _crossed(sweep, summary, score))
    return tuple(table for table in (_chosen(sweep, summary, out), *crossed, _all(sweep, summary)) if table)


def _compared(summary: Summary) -> tuple[str, ...]:
    """The scores that have a table over the x axis: one, or where judges have no mean and none was chosen, all."""
    return summary.abilities if summary.unlike else (summary.score,)


def short_tables(sweep: Sweep, summary: Summary, out: Path | None = None) -> tuple[Table, ...]:
    """Those that a terminal shows: the choice, and the test split (else validation)."""
    crossed = [table for score in _compared(summary) for table in list(_crossed(sweep, summary, score))[-1:]]
    return tuple(table for table in (_chosen(sweep, summary, out), *(crossed or [_all(sweep, summary)])) if table)


def _splits(sweep: Sweep) -> list[str]:
    return [split for split in SPLITS if split in sweep.judges]


def _score(row: Row, split: str, score: str) -> str:
    found = row.scores.get(split, {}).get(score)
    return shown(found) if found else "failed" if row.failed else ""


def _chosen(sweep: Sweep, summary: Summary, out: Path | None) -> Table | None:
    if summary.chosen is None:
        return None
    shown_scores = [
        (split, score) for split in _splits(sweep) for score in summary.abilities
        if any(score in row.scores.get(split, {}) for row in summary.rows)
    ]  # fmt: skip
    rows = [row for row in summary.by_name if row is not summary.chosen]
    lines = [("chosen", summary.chosen), *(("best of its kind", row) for row in rows)]
    lines += [("best single model", summary.single)] if summary.single else []
    lines += [("nothing fine-tuned", row) for row in summary.rows if row.kind == "base"][:1]
    last = _splits(sweep)[-1]
    gaps = [_gap(out, summary, row, last) for _, row in lines]
    return Table(
        f"Chosen by {summary.score} on validation",
        ("", "setting", *(f"{score}, {split}" for split, score in shown_scores),
         *([f"chosen minus this, {last}"] if any(gaps) else [])),
        tuple(
            (what, row.title, *(_score(row, split, score) for split, score in shown_scores),
             *([gap] if any(gaps) else []))
            for (what, row), gap in zip(lines, gaps, strict=True)
        ),
        2,
    )  # fmt: skip


def _gap(out: Path | None, summary: Summary, row: Row, split: str) -> str:
    """How far the chosen setting is above another, with the standard error of that: `+0.040 ± 0.009`."""
    if out is None or summary.chosen is None or row is summary.chosen:
        return ""
    found = difference_of(out, summary.chosen, row, split, summary.score)
    if found is None or found.stderr is None or not found.paired:
        return ""
    return f"{found.value:+.3f} ± {found.stderr:.3f}"


def _crossed(sweep: Sweep, summary: Summary, score: str) -> Iterator[Table]:
    x, _ = roles_of(sweep)
    if x is None or not score:  # nothing came of any cell
        return
    rest = [axis for axis in sweep.axes if axis is not x]
    for split in _splits(sweep):
        groups: dict[tuple[str, ...], dict[Any, Row]] = {}
        lone: list[tuple[tuple[str, ...], Row]] = []
        for row in summary.rows:
            if row.kind not in ("grid", "undropped"):
                lone.append(((row.title, *[""] * (len(rest) - 1)), row))
                continue
            place = tuple(shown_label(row.at[axis.name]) if axis.name in row.at else "" for axis in rest)
            if row.beside:
                place = (", ".join(filter(None, (*place[:1], UNDROPPED))), *place[1:])
            if x.name in row.at:
                groups.setdefault(place, {})[row.at[x.name]] = row
            else:
                lone.append((place, row))
        labels = [point.label for point in x.points]
        rows = [
            (*(place or ("",)), *(_score(found[one], split, score) if one in found else "" for one in labels))
            for place, found in groups.items()
        ]
        # What the x axis does not concern stands in the first column.
        rows += [
            (*(place or (row.title,)), _score(row, split, score), *[""] * (len(labels) - 1)) for place, row in lone
        ]
        header = (*([title_of(axis.name, summary.models) for axis in rest] or [""]),
                  *(f"{title_of(x.name, summary.models)} {shown_label(one)}" if i == 0 else shown_label(one)
                    for i, one in enumerate(labels)))  # fmt: skip
        yield Table(f"{score} on {split}", header, tuple(rows), max(1, len(rest)))


def _all(sweep: Sweep, summary: Summary) -> Table:
    splits = _splits(sweep)
    header = ("setting", "runs", *(f"{score}, {split}" for score in summary.scores for split in splits))
    rows = []
    for row in summary.rows:
        runs = max((one.runs for found in row.scores.values() for one in found.values()), default=0)
        count = f"{runs}" if not row.failed else f"{runs}, {row.failed} failed"
        rows.append((row.title, count, *(_score(row, s, score) for score in summary.scores for s in splits)))
    return Table("Every setting", header, tuple(rows), 1)


def words_of(result: SweepResult, summary: Summary) -> tuple[str, ...]:
    """What must be said with the tables."""
    lines = []
    seeds = len(result.sweep.seeds)
    if seeds > 1:
        lines.append(f"± is the standard deviation over {seeds} mask seeds; without it nothing was drawn.")
    if summary.chosen is not None and any(
        "minus" in head for head in _headed(_chosen(result.sweep, summary, result.out))
    ):
        lines.append("The ± of a difference is its standard error: of the rows of data, which both settings answered, "
                     "and of the masks.")  # fmt: skip
    if summary.chosen is None and "validation" not in result.sweep.judges:
        lines.append("No setting is chosen: there are no judges under `validation:`. The best cell of a test split is "
                     "not a fair estimate of its setting.")  # fmt: skip
    elif "test" not in result.sweep.judges:
        lines.append(
            "Chosen on validation, where its value is optimistic: report a setting with separate `test:` judges."
        )
    lines += [f"{note}." for note in result.notes]
    failed = result.failed
    if failed:
        lines.append(f"{len(failed)} of {len(result.finished)} cells failed; the first: {failed[0].cell.title}: "
                     f"{failed[0].outcome.error}")  # fmt: skip
    warned = {line for row in summary.rows for line in row.warnings}
    if warned:
        count = "1 warning, beside its cell" if len(warned) == 1 else f"{len(warned)} warnings, beside their cells"
        lines.append(f"{count} in {CELLS}; the first: {min(warned)}")
    return tuple(lines)


def _headed(table: Table | None) -> tuple[str, ...]:
    return () if table is None else table.header


def markdown(table: Table) -> str:
    """A table as Markdown."""
    rule = "|" + "---|" * table.words + "---:|" * (len(table.header) - table.words)
    lines = [f"| {' | '.join(row)} |" for row in (table.header, *table.rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def data_of(result: SweepResult, summary: Summary) -> dict[str, Any]:
    """The summary in JSON-able form."""

    def row_data(row: Row) -> dict[str, Any]:
        scores = {split: {name: asdict(one) for name, one in found.items()} for split, found in row.scores.items()}
        return {"kind": row.kind, "at": dict(row.at), "models": list(row.models), "judges": list(row.judges),
                "scores": scores, "failed": row.failed, "warnings": list(row.warnings)}  # fmt: skip

    differences = differences_of(result.out, summary)
    return {
        "out": str(result.out),
        "score": summary.score,
        "higher_is_better": summary.higher,
        "chosen": row_data(summary.chosen) if summary.chosen else None,
        "chosen_by_name": [row_data(row) for row in summary.by_name],
        "differences": differences,
        "best_single_model": row_data(summary.single) if summary.single else None,
        "rows": [row_data(row) for row in summary.rows],
        "failed": [{"cell": one.cell.title, "error": one.outcome.error} for one in result.failed],
        "notes": [*([summary.unlike] if summary.unlike else []), *result.notes],
        "seconds": round(result.seconds, 3),
    }


def write_reports(result: SweepResult, *, plots: bool) -> None:
    """Write tables.md, summary.json and, with matplotlib, the plots."""
    summary = summarise(result.sweep, result.finished)
    parts = [f"# {result.sweep.layout.title or result.sweep.name}"]
    if summary.unlike:
        parts.append(f"**Note: {summary.unlike}.**")
    for table in tables_of(result.sweep, summary, result.out):
        parts += [f"## {table.title}", markdown(table)]
    parts += ["\n\n".join(words_of(result, summary))]
    write_whole(result.out / TABLES, "\n\n".join(parts) + "\n")
    write_whole(result.out / SUMMARY, json.dumps(data_of(result, summary), indent=1) + "\n")
    drawn: set[Path] = set()
    if plots and find_spec("matplotlib") is not None:
        from darekit.sweeps.drawing import draw_sweep

        for split in _splits(result.sweep):
            figure = figure_of(result.sweep, summary, split)
            if figure is not None:
                drawn |= {*draw_sweep(figure, result.out / split)}
    for path in (result.out / name for name in PLOTS):
        if path not in drawn:  # a plot of other cells than the tables'
            path.unlink(missing_ok=True)
