# SPDX-License-Identifier: Apache-2.0
"""Scores and their standard errors: arrays -> numbers, no model in here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from darekit.errors import DataError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Score:
    """One number about one model.

    Attributes:
        value: the number.
        stderr: its standard error; None where it is unknown.
        higher_is_better: None where it is neither.
        effects: of each row, what it adds to `value - mean`, to first order; where they are known, `stderr` is
            sqrt(n / (n - 1) sum of their squares), and two models' scores can be compared row by row.
    """

    value: float
    stderr: float | None = None
    higher_is_better: bool | None = True
    effects: tuple[float, ...] | None = field(default=None, repr=False, compare=False)

    def to_data(self) -> dict[str, Any]:
        """In JSON-able form."""
        return {"value": self.value, "stderr": self.stderr, "higher_is_better": self.higher_is_better}


def difference(score: Score, other: Score) -> tuple[float, float | None]:
    """score - other, and its standard error; None where one of theirs is unknown.

    Where both know their rows' effects, and so answered the same rows, the error is that of the rows' differences:
    models of one base are mostly right and wrong about the same ones, and what all find hard cancels out. Else
    sqrt(se1^2 + se2^2), which is too large.

    >>> same = share(np.array([True, True, False, True]))
    >>> difference(same, same)
    (0.0, 0.0)
    """
    value = score.value - other.value
    if score.effects is not None and other.effects is not None and len(score.effects) == len(other.effects) > 1:
        error = _spread(np.array(score.effects) - np.array(other.effects))
        return value, error if math.isfinite(error) else None  # an infinite perplexity has none
    if score.stderr is None or other.stderr is None:
        return value, None
    return value, math.hypot(score.stderr, other.stderr)


def _spread(effects: Floats) -> float:
    """(n,) effects of rows -> the standard error of their sum."""
    n = len(effects)
    return math.sqrt(math.fsum(effects**2) * n / (n - 1))


def share(right: npt.NDArray[np.bool_]) -> Score:
    """(n,) bool -> the share of True, with the binomial standard error sqrt(v (1 - v) / (n - 1))."""
    value = float(right.mean())
    if len(right) < 2:
        return Score(value)
    effects = tuple(((right - value) / len(right)).tolist())
    return Score(value, math.sqrt(value * (1 - value) / (len(right) - 1)), effects=effects)


def mean_loss(losses: Floats, targets: Ints) -> Score:
    """(n,) summed loss and number of targets of each row -> mean loss per target.

    The rows are what varies, not the tokens within them: the standard error is that of a ratio of two sums over rows
    (Cochran, Sampling Techniques, section 2.11).
    """
    total = targets.sum()
    value = math.fsum(losses) / total
    n = len(losses)
    if n < 2:
        return Score(float(value), None, False)
    spread = math.sqrt(math.fsum((losses - value * targets) ** 2) * n / (n - 1))
    effects = tuple(((losses - value * targets) / total).tolist())
    return Score(float(value), float(spread / total), False, effects)


def perplexity(loss: Score) -> Score:
    """exp(loss), and its standard error to first order. Above 1e308 it is infinite, as the loss of a broken model."""
    value = math.exp(loss.value) if loss.value < 709 else math.inf
    effects = loss.effects if loss.effects is None else tuple(value * effect for effect in loss.effects)
    return Score(value, None if loss.stderr is None else value * loss.stderr, False, effects)


def classification(predicted: Ints, labels: Ints, *, classes: int) -> dict[str, Score]:
    """(n,), (n,) -> accuracy, Matthews correlation, and for two classes F1 of class 1."""
    table = np.zeros((classes, classes))
    np.add.at(table, (labels, predicted), 1)
    found = {"accuracy": share(predicted == labels)}
    if classes == 2:
        found["f1"] = _jackknifed_table(_f1, table)
    return found | {"matthews": _jackknifed_table(_matthews, table)}


def regression(predicted: Floats, values: Floats) -> dict[str, Score]:
    """(n,), (n,) -> Pearson's and Spearman's correlation."""
    return {"pearson": _correlation(predicted, values), "spearman": _correlation(_ranks(predicted), _ranks(values))}


def _f1(table: Floats) -> float:
    """2x2, rows the truth -> F1 of class 1; 0 where nothing is 1 in either."""
    twice = 2 * table[1, 1]
    either = twice + table[0, 1] + table[1, 0]
    return float(twice / either) if either else 0.0


def _matthews(table: Floats) -> float:
    """CxC, rows the truth -> Matthews correlation (Gorodkin 2004 for C > 2); 0 where one side is constant."""
    n, right = table.sum(), np.trace(table)
    truth, guess = table.sum(1), table.sum(0)
    scale = math.sqrt(n * n - guess @ guess) * math.sqrt(n * n - truth @ truth)
    return float((right * n - truth @ guess) / scale) if scale else 0.0


def _jackknifed_table(measure: Callable[[Floats], float], table: Floats) -> Score:
    """A measure of a table of counts with its jackknife error: leaving out one row is one of C x C cases."""
    n = table.sum()
    if n < 3:
        return Score(measure(table))
    counts, without = [], []
    for cell in np.argwhere(table > 0):
        less = table.copy()
        less[tuple(cell)] -= 1
        counts.append(table[tuple(cell)])
        without.append(measure(less))
    return Score(measure(table), _jackknife(np.array(without), np.array(counts)))


def _correlation(x: Floats, y: Floats) -> Score:
    """Pearson's r, 0 where either is constant (it explains nothing then); jackknife error, O(n)."""
    n = len(x)
    x, y = x - x.mean(), y - y.mean()
    r = float(_ratio(x @ y, x @ x, y @ y))
    if n < 4:
        return Score(r)
    # Leaving out row i takes d_i e_i n/(n-1) from a centred sum of products.
    factor = n / (n - 1)
    without = _ratio(x @ y - factor * x * y, x @ x - factor * x * x, y @ y - factor * y * y)
    return Score(r, _jackknife(without, np.ones(n)))


def _ratio(xy: Any, xx: Any, yy: Any) -> Any:
    scale = np.sqrt(np.maximum(xx, 0)) * np.sqrt(np.maximum(yy, 0))
    safe = scale > 1e-12 * np.maximum(np.abs(xy), 1e-300)
    return np.where(safe, xy / np.where(safe, scale, 1), 0.0)


def _jackknife(without: Floats, counts: Floats) -> float:
    n = counts.sum()
    mean = (without * counts).sum() / n
    return math.sqrt((n - 1) / n * (((without - mean) ** 2) * counts).sum())


def _ranks(x: Floats) -> Floats:
    """Ranks from 1; ties share their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse])


def scores_of(found: Any, who: str) -> dict[str, Score]:
    """What somebody else's judge returned -> scores: a number, name -> number, or name -> {value, stderr, ...}.

    Raises:
        DataError: it is something else, or not finite.
    """
    if isinstance(found, Score) or _is_number(found):
        found = {"score": found}
    if not isinstance(found, Mapping) or not found:
        raise DataError(f"{who} returned {_short(found)}; expected a number, or an object of names and numbers")
    scores = {}
    for name, value in found.items():
        if isinstance(value, Mapping):
            unknown = set(value) - {"value", "stderr", "higher_is_better"}
            if unknown or "value" not in value:
                raise DataError(
                    f"{who} returned {name}: {_short(value)}; expected a number, or value, stderr and higher_is_better"
                )
            score = Score(value["value"], value.get("stderr"), value.get("higher_is_better", True))
        else:
            score = value if isinstance(value, Score) else Score(value)
        for part in (score.value, score.stderr):
            if part is not None and not _is_number(part):
                raise DataError(f"{who} returned {name}: {_short(part)}; expected a number")
            if part is not None and not math.isfinite(part):
                raise DataError(f"{who} returned {name}: {part}, which cannot be compared; expected a finite number")
        stderr = None if score.stderr is None else float(score.stderr)
        scores[str(name)] = Score(float(score.value), stderr, score.higher_is_better)
    return scores


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:97]}..."
