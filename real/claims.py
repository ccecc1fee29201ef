# SPDX-License-Identifier: Apache-2.0
"""The paper's claims on a real model, each with the rule by which a run's numbers decide: held, partly held, failed.

The rules were fixed in code before the run that was committed first. Scores are exact match in percent of the test
rows, means over mask seeds. "Within two standard errors" is that of the fine-tuned model's own score on its rows: q
its share, n the rows, 2 sqrt(q (1 - q) / n); where q is 1, of one row that is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from real.lessons import PROSE
from real.merging import MERGES
from real.sizes import DROP_RATE
from real.steps import METHODS

HELD, PARTLY, FAILED, MISSING = "held", "partly held", "failed", "not run"
ALL_TENSORS, DROP_ONLY, MAGNITUDE, RESCALED = METHODS

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What one claim came to."""

    paper: str
    here: str
    rule: str
    outcome: str


@dataclass(frozen=True)
class Cell:
    """A mean over mask seeds, and their standard deviation where there are several; percent, or perplexity."""

    mean: float
    deviation: float | None
    runs: int


# --- reading results ---


def rows_of(results: Results, step: str, *kinds: str) -> list[Mapping[str, Any]]:
    """A sweep's rows with scores, of some kinds (all if none is named).

    Raises:
        KeyError: it was not run.
    """
    return [row for row in results["steps"][step]["rows"] if row["scores"] and (not kinds or row["kind"] in kinds)]


def cell_of(row: Mapping[str, Any], ability: str, split: str = "test") -> Cell:
    """A row's score of an ability, or its perplexity of prose."""
    score = f"{ability}/perplexity" if ability == PROSE else f"{ability}/exact_match"
    mean, deviation, runs = row["scores"][split][score]
    factor = 1.0 if ability == PROSE else 100.0
    return Cell(factor * mean, None if deviation is None else factor * deviation, runs)


def dropped(results: Results, model: str, method: str, rate: float, judge: str | None = None) -> Cell:
    """A model after the drop, judged by its own ability or another judge.

    Raises:
        KeyError: there is no such cell.
    """
    names = ("masks", "drop") if method == "DARE" else ("others",)  # where there are more masks first
    for step in names if rate else ("drop",):
        for row in rows_of(results, step, "grid", "undropped") if step in results["steps"] else ():
            at = row["at"]
            if (at["model"], at["method"], at[DROP_RATE]) == (model, method if rate else "DARE", rate):
                return cell_of(row, judge or model)
    raise KeyError(f"{model}, {method}, p = {rate:g}")


def base(results: Results, judge: str) -> Cell:
    """The base model's score."""
    for row in rows_of(results, "drop", "base"):
        if judge in row["judges"]:
            return cell_of(row, judge)
    raise KeyError(f"the base, judged by {judge}")


def abilities(results: Results) -> list[str]:
    """The models of the run, in order."""
    return [*results["settings"]["abilities"]]


def tolerance(results: Results, model: str) -> float:
    """Two standard errors of the fine-tuned model's score, in points."""
    rows = results["settings"]["rows"]["test"]
    share = min(max(dropped(results, model, "DARE", 0).mean / 100, 1 / rows), 1 - 1 / rows)
    return 200 * math.sqrt(share * (1 - share) / rows)


def is_kept(results: Results, model: str, found: float) -> bool:
    """Whether a score is within two standard errors of the fine-tuned model's, or above."""
    return found >= dropped(results, model, "DARE", 0).mean - tolerance(results, model)


def largest_rate(results: Results, model: str, method: str) -> float | None:
    """The largest drop rate up to which (at all that were tried below, too) the ability is kept."""
    best = None
    rates = results["settings"]["rates" if method == "DARE" else "other_rates"]
    for rate in sorted(rates):
        if not is_kept(results, model, dropped(results, model, method, rate).mean):
            break
        best = rate
    return best


# --- merges ---


def merge_cells(results: Results, name: str, models: Sequence[str]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Method -> `without` and `with` DARE -> the row on test.

    Raises:
        KeyError: it was not run.
    """
    rows = {row["at"]["merge"]: row for row in rows_of(results, f"{name}-test", "grid")}
    return {method: {how: rows[f"{method} {how}"] for how in ("without", "with")} for method in MERGES}


def mean_of(row: Mapping[str, Any], models: Sequence[str]) -> float:
    """Mean exact match of the abilities."""
    return fmean(cell_of(row, one).mean for one in models)


# --- the claims ---


Found = tuple[str, str, str]  # what was measured, the rule, the outcome; a claim's docstring says what the paper says


def _three(held: bool, partly: bool) -> str:
    return HELD if held else PARTLY if partly else FAILED


def _listed(results: Results, method: str, rates: Sequence[float]) -> str:
    found = []
    for one in abilities(results):
        found.append(f"{one} " + " / ".join(f"{dropped(results, one, method, rate).mean:.1f}" for rate in rates))
    return "; ".join(found)


def _kept_at(results: Results, method: str, rate: float) -> list[bool]:
    return [is_kept(results, one, dropped(results, one, method, rate).mean) for one in abilities(results)]


def dare_90(results: Results) -> Found:
    """DARE drops 90 % of a delta with next to no loss."""
    kept = _kept_at(results, "DARE", 0.9)
    return (
        f"exact match at p = 0 / .9: {_listed(results, 'DARE', (0, 0.9))}",
        "held: every ability is within two standard errors; partly: one is", _three(all(kept), any(kept)),
    )  # fmt: skip


def dare_99(results: Results) -> Found:
    """Even 99 % can be dropped, where a model is large (70B)."""
    kept = _kept_at(results, "DARE", 0.99)
    return (
        f"at p = 0 / .99: {_listed(results, 'DARE', (0, 0.99))}",
        "held: every ability is within two standard errors; partly: one is", _three(all(kept), any(kept)),
    )  # fmt: skip


def all_tensors(results: Results) -> Found:
    """All tensors are dropped alike, embeddings and norms too."""
    kept = _kept_at(results, ALL_TENSORS, 0.9)
    return (
        f"all tensors, at p = 0 / .9 / .99: {_listed(results, ALL_TENSORS, (0, 0.9, *_other(results, 0.99)))}",
        "held: with all tensors at p = .9 every ability is within two standard errors; partly: one is",
        _three(all(kept), any(kept)),
    )  # fmt: skip


def drop_only(results: Results) -> Found:
    """Without the rescale (DropOnly) it fails."""
    gaps = [
        dropped(results, one, "DARE", 0.9).mean - dropped(results, one, DROP_ONLY, 0.9).mean
        for one in abilities(results)
    ]
    return (
        f"DropOnly at {_rates(results)}: {_listed(results, DROP_ONLY, _others(results))}",
        "held: at p = .9 DropOnly is 10 points or more below DARE for every ability; partly: for one",
        _three(min(gaps) >= 10, max(gaps) >= 10),
    )  # fmt: skip


def magnitude(results: Results) -> Found:
    """Keeping the largest changes (MP) instead of random ones fails earlier than DARE."""
    gaps = [
        dropped(results, one, "DARE", 0.9).mean - dropped(results, one, MAGNITUDE, 0.9).mean
        for one in abilities(results)
    ]
    return (
        f"MP at {_rates(results)}: {_listed(results, MAGNITUDE, _others(results))}",
        "held: at p = .9 MP is 10 points or more below DARE for every ability; partly: for one",
        _three(min(gaps) >= 10, max(gaps) >= 10),
    )  # fmt: skip


def rescaled(results: Results) -> Found:
    """Rescaling after MP ruins it."""
    gaps = [
        dropped(results, one, MAGNITUDE, 0.9).mean - dropped(results, one, RESCALED, 0.9).mean
        for one in abilities(results)
    ]
    return (
        f"MP with rescale at {_rates(results)}: {_listed(results, RESCALED, _others(results))}",
        "held: at p = .9 the rescale costs 10 points or more for every ability; partly: for one",
        _three(min(gaps) >= 10, max(gaps) >= 10),
    )  # fmt: skip


def small_deltas(results: Results) -> Found:
    """Most changes of supervised fine-tuning are below .002."""
    found = {one: results["steps"][f"inspect-{one}"]["total"] for one in abilities(results)}
    shares = {one: 100 * total["shares"]["0.002"] for one, total in found.items()}
    told = "; ".join(f"{one} {share:.1f} % (median r {found[one]['r']:.4f})" for one, share in shares.items())
    return (
        f"below .002: {told}",
        "held: 95 % or more of the elements of every model; partly: of one",
        _three(min(shares.values()) >= 95, max(shares.values()) >= 95),
    )  # fmt: skip


def merging_gains(results: Results) -> Found:
    """DARE before a merge makes it better."""
    models = abilities(results)
    cells = merge_cells(results, "three", models)
    gains = {method: mean_of(pair["with"], models) - mean_of(pair["without"], models) for method, pair in cells.items()}
    told = ", ".join(f"{method} {gain:+.1f}" for method, gain in gains.items())
    count = sum(gain >= 1 for gain in gains.values())
    return (
        f"three models, mean of the abilities, with DARE minus without: {told} points",
        "held: by a point or more for two methods of three; partly: for one", _three(count >= 2, count >= 1),
    )  # fmt: skip


def absorbed(results: Results) -> Found:
    """One model absorbs the abilities of several, with equal weights."""
    models = abilities(results)
    rows = [row for pair in merge_cells(results, "three", models).values() for row in pair.values()]
    kept = {
        row["at"]["merge"]: [
            cell_of(row, one).mean / max(dropped(results, one, "DARE", 0).mean, 1e-9) for one in models
        ]
        for row in rows
    }
    lowest = max(kept, key=lambda name: min(kept[name]))
    mean = max(kept, key=lambda name: fmean(kept[name]))
    row = next(row for row in rows if row["at"]["merge"] == lowest)
    told = ", ".join(f"{one} {cell_of(row, one).mean:.1f}" for one in models)
    return (
        f"best of the chosen merges, {lowest} DARE: {told}",
        "held: a merge keeps 90 % of every ability; partly: a merge keeps 80 % in the mean",
        _three(min(kept[lowest]) >= 0.9, fmean(kept[mean]) >= 0.8),
    )  # fmt: skip


def _others(results: Results) -> list[float]:
    return [*results["settings"]["other_rates"]]


def _other(results: Results, rate: float) -> list[float]:
    return [rate] if rate in _others(results) else []


def _rates(results: Results) -> str:
    return "p = " + " / ".join(f"{rate:g}".lstrip("0") for rate in _others(results))


CLAIMS: Sequence[Callable[[Results], Found]] = (
    dare_90, dare_99, all_tensors, drop_only, magnitude, rescaled, small_deltas, merging_gains, absorbed,
)  # fmt: skip


def verdict(claim: Callable[[Results], Found], results: Results) -> Verdict:
    """One claim; what was not run says so."""
    says = (claim.__doc__ or "").strip().removesuffix(".")
    try:
        return Verdict(says, *claim(results))
    except KeyError:
        return Verdict(says, "", "", MISSING)


def verdicts(results: Results) -> Iterator[Verdict]:
    """Every claim."""
    return (verdict(claim, results) for claim in CLAIMS)
