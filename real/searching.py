# SPDX-License-Identifier: Apache-2.0
"""`dare search` for the best merge of all models, and what it found beside what the grid of weights found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from real.informed import gram_path
from real.lessons import PROSE
from real.merging import BY_WEIGHT, chosen_weights, validated
from real.sizes import DENSE, DROP_RATE, Document, Results, Size, Step, judges

TRIALS = 60
FULL_ASKED = 0.6  # of a candidate's rows, on average: rungs stop the hopeless ones
INFORMED_TRIALS, INFORMED_SECONDS = 30, 20.0  # and how long such a merge takes in one process
FAIR, ALL = "relative min", "relative mean"  # shares of what a model alone can do: none starves, or all of them
BEST, START = "best", "start"  # recipes of a search's comparison are `SEARCH-best` and `SEARCH-start`

# What a name stands for, on the recipe that the search starts from: TIES by weight, nothing dropped.
DROPPED: Document = {"sparsify": {"method": "dare", "drop_rate": 0.5, "keep_dense": [*DENSE]}}  # the rate is searched
SUM: Document = {"merge_method": "task_arithmetic", "parameters.keep": None, "parameters.normalize": None}
METHODS: Mapping[str, Document] = {
    "task arithmetic": SUM,
    "TIES, keep .2": {"parameters.keep": 0.2},
    "TIES, keep .3": {"parameters.keep": 0.3},
    "DARE, task arithmetic": SUM | DROPPED,
    "DARE, TIES": {"parameters.keep": 1.0} | DROPPED,
}
INFORMED: Mapping[str, Document] = {"RegMean": {}, "DARE, RegMean": DROPPED}


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
    own = {"parameters.lambda": {"low": 0.3, "high": 1.5}, DROP_RATE: {"low": 0.1, "high": 0.9}}
    return _searched(size, written(size, results), METHODS, own, FAIR)


def default(size: Size) -> Document:
    """RegMean, whose settings are the defaults."""
    models = [{"model": one, "stats": gram_path(one)} for one in size.abilities]
    return {"base_model": "base", "models": models, "merge_method": "regmean"}


def informed_file(size: Size) -> Document:
    """Weights over depth, how far the Grams are shrunk, and drop rate, from RegMean as it is by default."""
    own = {"parameters.off_diagonal": {"low": 0.5, "high": 1.0}, DROP_RATE: {"low": 0.1, "high": 0.99}}
    return _searched(size, default(size), INFORMED, own, ALL)


def _searched(size: Size, start: Document, methods: Mapping[str, Document], own: Document, choose: str) -> Document:
    weight: Document = {"low": 0.0, "high": 1.5} | ({"layers": size.depth} if size.depth > 1 else {})
    return {
        "recipe": start,
        "space": {"method": dict(methods), "models.*.parameters.weight": weight, **own},
        **{split: judges(size, split, size.abilities, prose=False) for split in ("validation", "test")},
        "choose": choose,
        "round": 4,  # the same candidates for one process and for four
    }


def search_steps(size: Size) -> Iterator[Step]:
    """The search by weights and the search of RegMeans, each with its best beside what it began with."""
    three = size.abilities
    baselines = 5 + len(three)  # base, each alone, average, two of task arithmetic, as written

    def search(name: str, title: str, file: Callable[[Results], Document], trials: int, merging: float) -> Step:
        words = ("search", f"steps/{name}.yaml", f"runs/{name}", "--trials", f"{trials}")
        cells = ((round(baselines + FULL_ASKED * trials), validated(three)), (4, three))
        title = f"{title}: {trials} candidates on validation, the best on test"
        return Step(
            name, title, words, file, cells, 20.0 + merging * trials, device=True, needs=three, folder=f"runs/{name}"
        )

    yield search("search", "a search by weights", lambda found: search_file(size, found), TRIALS, 0.0)
    yield _compared(size, "search", lambda found: written(size, found))
    yield search(
        "search-regmean", "a search of RegMeans", lambda _: informed_file(size), INFORMED_TRIALS, INFORMED_SECONDS
    )
    yield _compared(size, "search-regmean", lambda _: default(size))


def _compared(size: Size, name: str, start: Callable[[Results], Document]) -> Step:
    """A search's best beside what it began with: row by row, and what prose says."""

    def recipes(results: Results) -> Document:
        found = best_recipe(results, name)
        return {f"{name}-{START}": start(results), f"{name}-{BEST}": found}

    data = [word for one in (*size.abilities, PROSE) for word in ("--data", f"data/{one}.test.jsonl")]
    words = (
        "eval", f"steps/{name}-{START}.yaml", f"steps/{name}-{BEST}.yaml", *data, "--batch-size", f"{size.batch}",
        "--out", f"runs/{name}-test", "--json",
    )  # fmt: skip
    cells = ((2, (*size.abilities, PROSE)),)
    title = "its best and what it began with, row by row"
    return Step(f"{name}-test", title, words, recipes, cells, 20.0, device=True, needs=size.abilities)


def best_recipe(results: Results, name: str) -> Mapping[str, Any]:
    """What a search found.

    Raises:
        KeyError: it was not run, or found nothing.
    """
    found = results[name]["best"]
    if found is None:
        raise KeyError("a best merge of the search")
    recipe: Mapping[str, Any] = found["merge"]
    return recipe
