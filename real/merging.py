# SPDX-License-Identifier: Apache-2.0
"""Merges: settings that validation chooses and test reports, weights, and what rounding does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from real.lessons import PROSE
from real.sizes import DENSE, DROP_RATE, Document, Results, Size, Step, judges, sweep

MERGES = ("average", "task arithmetic", "TIES")
AVERAGE: Document = {"merge_method": "linear"}
ARITHMETIC: Document = {"merge_method": "task_arithmetic"}
TIES: Document = {"merge_method": "ties", "parameters.keep": 0.2}
LAMBDAS, TIES_LAMBDAS = (0.3, 0.5, 0.7, 1.0), (0.7, 1.0, 1.5)
MERGE_RATES = (0, 0.5, 0.9)


PAIRED_LAMBDAS, PAIRED_TIES_LAMBDAS = (0.5, 1.0), (1.0, 1.5)
PAIRED_RATES = (0, 0.9)


def settings_grid(models: Sequence[str]) -> dict[str, Document]:
    """Method and lambda as one axis: each method has lambdas of its own. Pairs have fewer."""
    lambdas, ties = (LAMBDAS, TIES_LAMBDAS) if len(models) > 2 else (PAIRED_LAMBDAS, PAIRED_TIES_LAMBDAS)
    found = {"average": AVERAGE}
    found |= {f"task arithmetic, lambda {one:g}": ARITHMETIC | {"parameters.lambda": one} for one in lambdas}
    found |= {f"TIES, lambda {one:g}": TIES | {"parameters.lambda": one} for one in ties}
    return found


def method_of(setting: str) -> str:
    """`task arithmetic, lambda 0.5` -> `task arithmetic`."""
    return setting.partition(", ")[0]


def merged(size: Size, models: Sequence[str], axes: Document, split: str) -> Document:
    """A sweep of merges."""
    prose = split == "test"
    return {
        "recipe": {
            "base_model": "base",
            "models": [{"model": one} for one in models],
            "sparsify": {"method": "dare", "drop_rate": 0, "keep_dense": DENSE},
            "merge_method": "task_arithmetic",
        },
        "axes": axes,
        "seeds": [*size.other_seeds],
        split: judges(size, split, models, prose=prose),
    } | ({"choose": f"{models[0]}/exact_match"} if prose else {})


def merge_recipe(size: Size, at: Mapping[str, Any]) -> Document:
    """The merge of all models at a place of the grid, as a recipe of its own."""
    found: Document = {"base_model": "base", "models": [{"model": one} for one in size.abilities], "parameters": {}}
    for key, value in settings_grid(size.abilities)[at["setting"]].items():
        block, _, name = key.rpartition(".")
        (found[block] if block else found)[name] = value
    if rate := at[DROP_RATE]:
        seed = size.other_seeds[0]
        found["sparsify"] = {"method": "dare", "drop_rate": rate, "keep_dense": DENSE, "seed": seed}
    return found


def _grid_step(size: Size, name: str, models: Sequence[str]) -> Step:
    grid = settings_grid(models)
    rates = MERGE_RATES if len(models) > 2 else PAIRED_RATES

    def file(_: Results) -> Document:
        return merged(size, models, {"setting": grid, DROP_RATE: [*rates]}, "validation")

    each = len(grid) * (1 + (len(rates) - 1) * len(size.other_seeds)) + len(models) + 1
    title = f"merges of {', '.join(models)}: settings on validation"
    return sweep(f"{name}-grid", title, file, [(each, validated(models))], models)


def validated(models: Sequence[str]) -> tuple[str, ...]:
    """Judges of validation, as a step's cells name them."""
    return tuple(f"{one}/validation" for one in models)


def best(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> Mapping[str, Any]:
    """The row with the highest mean over the abilities on validation; of equals the first."""
    return max(rows, key=lambda row: sum(row["scores"]["validation"][f"{one}/exact_match"][0] for one in models))


def chosen(results: Results, name: str, models: Sequence[str]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Method -> what validation chooses: `without` DARE, `with` it at that very setting (the paper's way: the best drop
    rate above 0)."""
    rows = [row for row in results[f"{name}-grid"]["rows"] if row["kind"] == "grid" and row["scores"]]
    found = {}
    for method in MERGES:
        own = [row for row in rows if method_of(row["at"]["setting"]) == method]
        without = best([row for row in own if not row["at"][DROP_RATE]], models)
        same = [row for row in own if row["at"]["setting"] == without["at"]["setting"] and row["at"][DROP_RATE]]
        found[method] = {"without": without, "with": best(same, models)}
    return found


def _test_step(size: Size, name: str, models: Sequence[str]) -> Step:
    grid = settings_grid(models)

    def file(results: Results) -> Document:
        points = {}
        for method, pair in chosen(results, name, models).items():
            for how, row in pair.items():
                points[f"{method} {how}"] = grid[row["at"]["setting"]] | {DROP_RATE: row["at"][DROP_RATE]}
        return merged(size, models, {"merge": points}, "test")

    cells = [(len(MERGES) * (1 + len(size.other_seeds)) + 1 + len(models), (*models, PROSE))]
    return sweep(f"{name}-test", f"merges of {', '.join(models)}: the chosen, on test", file, cells, models)


def pair_steps(size: Size) -> Iterator[Step]:
    """Two of them at a time."""
    for pair in itertools.combinations(size.abilities, 2):
        name = "-".join(pair)
        yield _grid_step(size, name, pair)
        yield _test_step(size, name, pair)


WEIGHTS = (0.4, 0.8, 1.2)


def equal_steps(size: Size) -> Iterator[Step]:
    """All of them, with equal weights."""
    yield _grid_step(size, "three", size.abilities)
    yield _test_step(size, "three", size.abilities)


def weight_steps(size: Size) -> Iterator[Step]:
    """All of them, with weights that validation chooses."""
    three = size.abilities

    def weights(results: Results) -> Document:
        points = {}
        for values in itertools.product(WEIGHTS, repeat=len(three)):
            own = {f"models.{at}.parameters.weight": value for at, value in enumerate(values)}
            points[" / ".join(f"{value:g}" for value in values)] = own
        return weighted(merged(size, three, {"weights": points}, "validation"))

    count = len(WEIGHTS) ** len(three)  # the models alone and the base are judged by then
    title = "weights of a TIES merge, on validation"
    yield sweep("weights-grid", title, weights, [(count, validated(three))], three, "three-grid")

    def test(results: Results) -> Document:
        own = {f"models.{at}.parameters.weight": one for at, one in enumerate(chosen_weights(results, three))}
        points = {f"p = {rate:g}": own | {DROP_RATE: rate} for rate in MERGE_RATES}
        return weighted(merged(size, three, {"merge": points}, "test"))

    cells = [(1 + (len(MERGE_RATES) - 1) * len(size.other_seeds), (*three, PROSE))]
    yield sweep("weights-test", "the chosen weights, on test", test, cells, three, "three-test")


def chosen_weights(results: Results, models: Sequence[str]) -> list[float]:
    """The weights that validation chooses.

    Raises:
        KeyError: they were not tried.
    """
    rows = [row for row in results["weights-grid"]["rows"] if row["kind"] == "grid" and row["scores"]]
    return [float(word) for word in best(rows, models)["at"]["weights"].split(" / ")]


# TIES whose kept deltas are added up by weight: with its own mean, the weight of a model that is alone in an element
# would not matter.
BY_WEIGHT: Document = {"merge_method": "ties", "parameters": {"keep": 0.3, "lambda": 1.0, "normalize": False}}


def weighted(document: Document) -> Document:
    """The same sweep, of TIES by weight."""
    return document | {"recipe": document["recipe"] | BY_WEIGHT}


# --- what rounding does to a merge at a small coefficient ---

OUTPUTS: Mapping[str, Document] = {
    "bfloat16": {},
    "bfloat16, stochastic": {"rounding": "stochastic"},
    "float32": {"dtype": "float32"},
}
SMALL, ROUNDED = 0.3, 60  # lambda; rows of each test


def rounded(size: Size) -> dict[str, Document]:
    """Recipe's name -> task arithmetic of all models at a small lambda, by output and drop rate."""
    found = {}
    for output, settings in OUTPUTS.items():
        for rate in (0, 0.9):
            name = "-".join([*output.replace(",", "").split(), f"p{rate:g}"])
            found[name] = {
                "base_model": "base",
                "models": [{"model": one} for one in size.abilities],
                **({"sparsify": {"method": "dare", "drop_rate": rate, "keep_dense": DENSE}} if rate else {}),
                "merge_method": "task_arithmetic",
                "parameters": {"lambda": SMALL},
                **settings,
            }
    return found


def rounding_step(size: Size) -> Step:
    """A merge in float32 must be judged in float32: in bfloat16 it would be rounded after all."""
    recipes = rounded(size)
    data = [word for one in (*size.abilities, PROSE) for word in ("--data", f"data/{one}.test.jsonl")]
    words = (
        "eval", *(f"steps/{name}.yaml" for name in recipes), *data, "--limit", f"{ROUNDED}", "--batch-size",
        f"{size.batch}", "--out", "runs/rounding", "--json",
    )  # fmt: skip
    cells = ((len(recipes), (*(f"{one}/{ROUNDED}" for one in size.abilities), PROSE)),)
    return Step(
        "rounding", "what rounding does to a merge", words, lambda _: recipes, cells, 60.0, device=True,
        dtype="float32", needs=size.abilities,
    )  # fmt: skip
