# SPDX-License-Identifier: Apache-2.0
"""`dare search` for the best merge of all models, and what it found beside what the grid of weights found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from real.informed import gram_path
from real.lessons import PROSE
from real.merging import BY_WEIGHT, chosen_weights, validated
from real.sizes import DENSE, DROP_RATE, Document, Results, Size, Step, judges

TRIALS = 60
FULL_ASKED = 0.6  # of a candidate's rows, on average: rungs stop the hopeless ones
GOAL: Document = {}  # `choose:` and what bounds it; without, the mean of the abilities
BEST, GRID = "search-best", "search-weights"  # recipes of `search-test`, by name

# What a name stands for, on the recipe that the search starts from: TIES by weight, nothing dropped.
DROPPED: Document = {"sparsify": {"method": "dare", "drop_rate": 0.5, "keep_dense": [*DENSE]}}  # the rate is searched
SUM: Document = {"merge_method": "task_arithmetic", "parameters.keep": None, "parameters.normalize": None}


def methods(size: Size) -> dict[str, Document]:
    """Names of the search's `method`, with the settings that they stand for."""
    stats = {f"models.{at}.stats": gram_path(one) for at, one in enumerate(size.abilities)}
    informed = SUM | {"merge_method": "regmean", "parameters.lambda": None} | stats
    return {
        "task arithmetic": SUM,
        "TIES, keep .2": {"parameters.keep": 0.2},
        "TIES, keep .3": {"parameters.keep": 0.3},
        "RegMean": informed,
        "DARE, task arithmetic": SUM | DROPPED,
        "DARE, TIES": {"parameters.keep": 1.0} | DROPPED,
        "DARE, RegMean": informed | DROPPED,
    }


def written(size: Size, results: Results) -> Document:
    """TIES with the weights that the grid chose."""
    weights = chosen_weights(results, size.abilities)
    return {
        "base_model": "base",
        "models": [
            {"model": one, "parameters": {"weight": weight}}
            for one, weight in zip(size.abilities, weights, strict=True)
        ],
        **BY_WEIGHT,
    }


def search_file(size: Size, results: Results) -> Document:
    """Weights over depth, lambda, method and drop rate. Prose is no judge here: it is asked of what is found."""
    weight: Document = {"low": 0.0, "high": 1.5} | ({"layers": size.depth} if size.depth > 1 else {})
    return {
        "recipe": written(size, results),
        "space": {
            "method": methods(size),
            "models.*.parameters.weight": weight,
            "parameters.lambda": {"low": 0.3, "high": 1.5},
            DROP_RATE: {"low": 0.1, "high": 0.9},
        },
        **{split: judges(size, split, size.abilities, prose=False) for split in ("validation", "test")},
        **GOAL,
        "round": 4,  # the same candidates for one process and for four
    }


def search_steps(size: Size) -> Iterator[Step]:
    """The search, and its best beside the grid's weights: row by row, and what prose says."""
    three = size.abilities
    words: tuple[str, ...] = ("search", "steps/search.yaml", "runs/search", "--trials", f"{TRIALS}")
    baselines = 5 + len(three)  # base, each alone, average, two of task arithmetic, as written
    asked = round(baselines + FULL_ASKED * TRIALS)
    cells = ((asked, validated(three)), (3, three))
    title = f"a search of {TRIALS} merges on validation, reported on test"
    yield Step(
        "search", title, words, lambda found: search_file(size, found), cells, 20.0, device=True, needs=three,
        folder="runs/search",
    )  # fmt: skip

    def recipes(results: Results) -> Document:
        found = best_recipe(results)
        return {GRID: written(size, results), BEST: found}

    data = [word for one in (*three, PROSE) for word in ("--data", f"data/{one}.test.jsonl")]
    words = (
        "eval", f"steps/{GRID}.yaml", f"steps/{BEST}.yaml", *data, "--batch-size", f"{size.batch}", "--out",
        "runs/search-test", "--json",
    )  # fmt: skip
    title = "the search's best and the grid's weights, row by row"
    yield Step("search-test", title, words, recipes, ((2, (*three, PROSE)),), 20.0, device=True, needs=three)


def best_recipe(results: Results) -> Mapping[str, Any]:
    """What the search found.

    Raises:
        KeyError: it was not run, or found nothing.
    """
    found = results["search"]["best"]
    if found is None:
        raise KeyError("a best merge of the search")
    recipe: Mapping[str, Any] = found["merge"]
    return recipe
