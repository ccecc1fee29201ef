# SPDX-License-Identifier: Apache-2.0
"""Standard errors of differences between models that answered the same rows."""

import json
import math

import numpy as np
import pytest

from darekit.evaluation.comparison import Comparison, Evaluation, _keep, best_of, kept_in
from darekit.evaluation.scores import Score, difference, mean_loss, perplexity, share


def test_of_shares_it_is_the_paired_one():
    """sd of the rows' differences / sqrt(n), from the textbook."""
    rng = np.random.default_rng(0)
    one = rng.random(400) < 0.6
    other = np.where(rng.random(400) < 0.9, one, ~one)
    value, error = difference(share(one), share(other))
    apart = one.astype(float) - other.astype(float)
    assert value == pytest.approx(apart.mean())
    assert error == pytest.approx(apart.std(ddof=1) / math.sqrt(400))
    assert error < math.hypot(share(one).stderr, share(other).stderr) / 2


def rows_of(rng, count=600):
    """Losses of two models on rows of unlike difficulty and length, and the rows' numbers of targets."""
    targets = rng.integers(5, 60, count)
    hard = rng.gamma(4, 0.5, count)
    return (*(targets * (hard + part + rng.normal(0, 0.05, count)) for part in (0.0, 0.02)), targets)


@pytest.mark.parametrize("measure", [mean_loss, lambda loss, n: perplexity(mean_loss(loss, n))], ids=["loss", "ppl"])
def test_of_losses_it_is_what_resampling_rows_finds(measure):
    rng = np.random.default_rng(1)
    one, other, targets = rows_of(rng)
    value, error = difference(measure(other, targets), measure(one, targets))
    found = []
    for _ in range(2000):
        at = rng.integers(0, len(one), len(one))
        found.append(measure(other[at], targets[at]).value - measure(one[at], targets[at]).value)
    assert error == pytest.approx(np.std(found), rel=0.1)
    apart = math.hypot(measure(one, targets).stderr, measure(other, targets).stderr)
    assert error < apart / 5 and value > 4 * error > 0
    assert value < 2 * apart  # which would have called it noise


def test_each_scores_own_error_follows_from_its_effects():
    one, _, targets = rows_of(np.random.default_rng(2))
    for score in (mean_loss(one, targets), perplexity(mean_loss(one, targets)), share(one > one.mean())):
        n = len(score.effects)
        assert score.stderr == pytest.approx(math.sqrt(n / (n - 1) * sum(e * e for e in score.effects)))


def test_where_rows_are_not_the_same_errors_add_up():
    few, many = share(np.array([True, False, True])), share(np.array([True, False, True, False]))
    for other in (many, Score(0.5, 0.25)):
        assert difference(few, other)[1] == pytest.approx(math.hypot(few.stderr, other.stderr))
    assert difference(few, Score(0.5)) == (few.value - 0.5, None)
    assert difference(share(np.array([True])), share(np.array([True]))) == (0.0, None)


def test_an_infinite_perplexity_has_no_error():
    broken = perplexity(mean_loss(np.array([1e6, 1e6, 2e6]), np.array([1, 1, 1])))
    assert math.isinf(broken.value) and difference(broken, Score(3.0, 0.1))[1] in (None, math.inf)
    sound = perplexity(mean_loss(np.array([1.0, 2.0, 3.0]), np.array([1, 1, 1])))
    assert difference(broken, sound) == (math.inf, None)


def test_the_best_is_told_by_pairs():
    rng = np.random.default_rng(3)
    one, other, targets = rows_of(rng)
    scores = [mean_loss(one, targets), mean_loss(other, targets)]
    assert best_of(scores) == 0
    assert best_of([Score(s.value, s.stderr, False) for s in scores]) is None  # without rows it is noise


def test_what_is_kept_can_be_compared_again(tmp_path):
    one, other, targets = rows_of(np.random.default_rng(4), 50)
    found = [Evaluation(name, {"loss": mean_loss(loss, targets)}, 1.0) for name, loss in (("a", one), ("b", other))]
    for evaluation in found:
        _keep(tmp_path, evaluation.model, evaluation)
    again = kept_in(tmp_path)
    assert Comparison(tuple(again.values())).differences() == Comparison(tuple(found)).differences()
    told = Comparison(tuple(found)).to_data()
    assert "effects" not in json.dumps(told)
    value, error = difference(found[1].scores["loss"], found[0].scores["loss"])
    assert told["differences"] == {"loss": {"b": {"value": value, "stderr": error}}}
    # Lines that an earlier version wrote have no rows.
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    (tmp_path / "evaluations.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in line.items() if k != "effects"}) + "\n" for line in lines)
    )
    older = Comparison(tuple(kept_in(tmp_path).values())).differences()["loss"]["b"]
    assert older[0] == value and older[1] > error
