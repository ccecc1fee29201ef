# SPDX-License-Identifier: Apache-2.0
"""What the page begins with: the tables of the first screen, the paper's claims, every way to drop, and what moves when
it is done again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean

from real import claims
from real.claims import ALL_TENSORS, DROP_ONLY, MAGNITUDE, RESCALED, dropped
from real.lessons import PROSE
from real.page.packs import smallest
from real.page.results import Results
from real.page.words import TASKS, gaps, rate_word, table, told, told_gap
from real.sizes import DROP_RATE
from real.steps import AGAIN_SEED, AGAIN_THREADS, PAIRED_RATES


def main_table(results: Results) -> str:
    """The table of the first screen: abilities, and prose below; means over masks."""
    rates = results["settings"]["rates"]
    top = 0.99 if 0.99 in results["settings"]["other_rates"] else 0.9
    ways = [*(("DARE", rate) for rate in rates), (ALL_TENSORS, top), (DROP_ONLY, 0.9), (MAGNITUDE, 0.9)]
    header = ["exact match, %", "base", "fine-tuned"]
    header += [f"DARE {rate_word(rate)}" if i == 0 else rate_word(rate) for i, rate in enumerate(rates)]
    header += [f"{rate_word(top)}, all tensors", "DropOnly .9", "magnitude .9"]
    rows = []
    models = claims.abilities(results)
    for one in models:
        cells = [dropped(results, one, method, rate).mean for method, rate in ways]
        found = [claims.base(results, one).mean, dropped(results, one, "DARE", 0).mean, *cells]
        kept = [True, True, *(claims.is_kept(results, one, value) for value in cells)]
        rows.append(
            [
                TASKS[one],
                *(
                    f"**{v:.1f}**" if k and i > 1 else f"{v:.1f}"
                    for i, (v, k) in enumerate(zip(found, kept, strict=True))
                ),
            ]
        )
    prose = [fmean(dropped(results, one, method, rate, PROSE).mean for one in models) for method, rate in ways]
    full = fmean(dropped(results, one, "DARE", 0, PROSE).mean for one in models)
    rows.append(
        ["perplexity of prose, mean", *(f"{value:.1f}" for value in (claims.base(results, PROSE).mean, full, *prose))]
    )
    return table(header, rows)


def opening(results: Results) -> Iterator[str]:
    """What it is."""
    settings = results["settings"]
    count = len(settings["abilities"])
    yield "# A real language model"
    yield (
        f"<!-- Written by real/page/ from results.json. -->\n{settings['base'].partition(' of ')[0]}, fine-tuned "
        f"{'on one task' if count == 1 else f'on {count} tasks that it cannot do'}, then dropped, merged and packed, by commands "
        "that anybody can type. `make real` does all of it again from PyPI alone, without a GPU; `make real QUICK=1` one task "
        "of it. The [paper's own experiments](../paper/README.md) are done again on models of half a million parameters, "
        "where many settings can be tried; here are its claims on a real one."
    )


def first(results: Results, page: Path) -> Iterator[str]:
    """The first screen."""
    settings = results["settings"]
    models = claims.abilities(results)
    yield main_table(results)
    many = {rate: dropped(results, models[0], "DARE", rate).runs for rate in settings["rates"]}
    more = [rate_word(rate) for rate, runs in many.items() if runs > 1]
    masks = (
        f"DARE at {' and '.join(more)}: mean of {max(many.values())} masks; one mask elsewhere" if more else "One mask"
    )
    yield (
        f"{settings['rows']['test']} rows of each test. {masks}; embeddings and norms are kept dense but for the column that says so. **Bold**: within two standard errors of the "
        "fine-tuned model (" + ", ".join(f"{one} {claims.tolerance(results, one):.1f}" for one in models) + " points)."
    )
    if (page / "drop.png").is_file():
        yield "![Exact match and perplexity over the drop rate](drop.png)"
    yield (
        "The largest drop rate of those tried up to which an ability stays within two standard errors, and what the three ways leave at DARE's:"
    )
    header = ("ability", "DARE", "DropOnly", "magnitude", "at that rate: DARE", "DropOnly", "magnitude")
    yield table(header, [_limits(results, one) for one in models])
    files = [(TASKS[one], *found) for one in models if (found := smallest(results, one))]
    if files:
        yield "The smallest pack that stays within them, and the smallest file of magnitude's that is no smaller (positions and values, without loss). *Row by row*: points from the model itself, ± the standard error of the rows' own differences."
        header = ("ability", "pack", "MB", "exact match", "row by row", "magnitude, MB", "exact match")
        yield table(header, files, words=2)
    with suppress(KeyError):
        yield from _row_by_row(results, models)


def _limits(results: Results, one: str) -> tuple[str, ...]:
    """How far an ability goes, by three ways."""
    largest = {method: claims.largest_rate(results, one, method) for method in ("DARE", DROP_ONLY, MAGNITUDE)}
    rate = largest["DARE"]
    there = []
    for method in largest:
        try:
            there.append("" if rate is None else f"{dropped(results, one, method, rate).mean:.1f}")
        except KeyError:  # not tried at this rate
            there.append("")
    found = ["none" if rate is None else rate_word(rate) for rate in largest.values()]
    return (TASKS[one], *found, *there)


def _row_by_row(results: Results, models: Sequence[str]) -> Iterator[str]:
    rows = []
    for one in models:
        for rate in PAIRED_RATES:
            found = gaps(results, f"paired-{one}", f"{one}-p{rate:g}")
            rows.append((TASKS[one], rate_word(rate), told_gap(found.get(one)), told_gap(found.get(PROSE))))
    yield (
        "Row by row against the fine-tuned model (`dare eval`, the first mask): points, ± the standard error of the rows' own differences. "
        "Models of one base find the same rows hard, so it is smaller than that of two scores."
    )
    yield table(("ability", "DARE", "exact match", "perplexity of prose"), rows, words=2)


def verdicts(results: Results, page: Path) -> Iterator[str]:
    """The paper's claims, with their rules."""
    yield "The rules stand in `real/claims.py`, and were fixed before the run that was committed first."
    found = [*claims.verdicts(results)]
    counts = [
        (sum(one.outcome == outcome for one in found), outcome)
        for outcome in (claims.HELD, claims.PARTLY, claims.FAILED, claims.MISSING)
    ]
    yield f"Of {len(found)} claims " + ", ".join(f"{count} {outcome}" for count, outcome in counts if count) + "."
    rows = [
        (one.paper, one.here or "not in this run", f"**{one.outcome}**" + (f"; {one.rule}" if one.rule else ""))
        for one in found
    ]
    yield "\n".join(
        [
            "| the paper says | here | outcome, and its rule |",
            "|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )


def curves(results: Results, page: Path) -> Iterator[str]:
    """Every cell of one model."""
    settings = results["settings"]
    yield "Exact match in %, ± the standard deviation over masks."
    rows: list[tuple[str, ...]] = []
    prose: list[tuple[str, ...]] = []
    rates = sorted({0, *settings["rates"], *settings["other_rates"]})
    for one in claims.abilities(results):
        for method in ("DARE", ALL_TENSORS, DROP_ONLY, MAGNITUDE, RESCALED):
            for judge, found in ((one, rows), (PROSE, prose)):
                cells = []
                for rate in rates:
                    try:
                        cells.append(told(dropped(results, one, method, rate, judge)))
                    except KeyError:
                        cells.append("")
                found.append((one, method, *cells))
    header = ("ability", "method", *(f"p = {rate_word(rate)}" for rate in rates))
    yield table(header, rows, words=2)
    yield f"Perplexity of prose (base: {claims.base(results, PROSE).mean:.1f}): general language pays, too."
    yield table(header, prose, words=2)


def again(results: Results, page: Path) -> Iterator[str]:
    """One training more, and other threads: what moved."""
    one = claims.abilities(results)[0]
    rates = (0, *(rate for rate in results["settings"]["rates"] if rate >= 0.9))

    def scores(step: str) -> list[float]:
        rows = claims.rows_of(results, step, "grid", "undropped")
        found = {
            row["at"][DROP_RATE]: row
            for row in rows
            if row["at"].get("method", "DARE") == "DARE" and one in row["judges"]
        }
        return [claims.cell_of(found[rate], one).mean for rate in rates]

    first = scores("drop")
    rows = [("as above, that mask", *(f"{score:.1f}" for score in first))]
    most = {}
    for step, title in (
        ("again-seed", f"trained with seed {AGAIN_SEED}"),
        ("again-threads", f"judged by {AGAIN_THREADS} threads"),
    ):
        with suppress(KeyError):
            found = scores(step)
            moved = [new - old for new, old in zip(found, first, strict=True)]
            rows += [(title, *(f"{score:.1f}" for score in found)), ("moved by", *(f"{gap:+.1f}" for gap in moved))]
            most[title] = max(moved, key=abs)
    if not most:
        raise KeyError("again")
    error = claims.tolerance(results, one) / 2
    yield (
        f"The headline of `{one}` once more, with one mask, the same in all rows; {results['settings']['rows']['test']} rows of test, of which "
        f"a score has a standard error of {error:.1f} points. The largest moves: "
        + "; ".join(f"{title} {gap:+.1f} points" for title, gap in most.items())
        + "."
    )
    yield table(("", "fine-tuned", *(f"p = {rate_word(rate)}" for rate in rates[1:])), rows)
