# SPDX-License-Identifier: Apache-2.0
"""Measuring the family: itself, its merges through `dk.merge`, and its sparsified models through `dk.drop`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from darekit.api import drop, merge
from darekit.demo.family import IGNORED, UNFINISHED, Family, encode, load_model, load_tokenizer
from darekit.demo.measurements import Point, Score
from darekit.demo.recipes import NAMES, place_models, read_example
from darekit.demo.tasks import FINE_TUNED, Example, held_out_words, instruct

METHODS = ("dare", "drop_only", "magnitude")
MASKED = ("dare", "drop_only")  # those that draw a mask
CONTROL_LAMBDA = 1.5

Step = Callable[[], None]


def examples_of(family: Family) -> dict[str, tuple[Example, ...]]:
    """The evaluation items: the same held-out words under each fine-tuned ability's instruction."""
    words = held_out_words(count=family.settings.items, length=family.settings.word_length)
    return {ability: tuple(instruct(ability, word) for word in words) for ability in FINE_TUNED}


def answered(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[bool]:
    """Which examples the model answers exactly, end of answer included.

    Teacher forcing: one forward pass over the right answer, and every next token must be the likeliest. Greedy
    decoding agrees, because it leaves the right answer exactly where the first wrong token would be.
    """
    ids, targets = encode(tokenizer, examples)
    with torch.no_grad():
        likeliest = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    right: list[bool] = ((likeliest == targets) | (targets == IGNORED)).all(1).tolist()
    return right


def accuracy(model: Any, tokenizer: Any, examples: Sequence[Example]) -> float:
    """Exact match in percent."""
    return 100 * sum(answered(model, tokenizer, examples)) / len(examples)


def measure_rows(family: Family, step: Step) -> tuple[tuple[Score, ...], tuple[Score, ...]]:
    """The table's scores, and the controls: TIES without DARE at a larger lambda."""
    examples = examples_of(family)
    tokenizer = load_tokenizer(family.base)

    def score(row: str, path: Path, tune_seed: int | None = None, mask_seed: int | None = None) -> Score:
        model = load_model(path)
        step()
        found = tuple(accuracy(model, tokenizer, examples[ability]) for ability in FINE_TUNED)
        return Score(row, tune_seed, mask_seed, found)

    scores = [score("base", family.base)]
    for ability in FINE_TUNED:
        for seed in family.settings.tune_seeds:
            scores.append(score(f"fine-tuned: {ability}", family.model(ability, seed), seed))
    controls = []
    with _scratch(family) as scratch:
        for title, plain, sparse in NAMES:
            for seed in family.settings.tune_seeds:
                out = _merged(family, scratch, plain, first=seed == family.settings.tune_seeds[0])
                merge(place_models(read_example(plain), family, seed), out, overwrite=True)
                scores.append(score(title, out, seed))
            for seed, mask_seed in _pairs(family):
                out = _merged(family, scratch, sparse, first=(seed, mask_seed) == next(_pairs(family)))
                merge(place_models(read_example(sparse), family, seed), out, seed=mask_seed, overwrite=True)
                scores.append(score(f"{title} + DARE", out, seed, mask_seed))
        title, plain, _ = NAMES[-1]
        for seed in family.settings.tune_seeds:
            recipe = place_models(read_example(plain), family, seed)
            merge(recipe, scratch / "control", settings={"parameters.lambda": CONTROL_LAMBDA}, overwrite=True)
            controls.append(score(f"{title}, lambda {CONTROL_LAMBDA:g}", scratch / "control", seed))
    return tuple(scores), tuple(controls)


def measure_sweep(family: Family, step: Step) -> tuple[Point, ...]:
    """Exact match against drop rate: the first seed's models, every tensor dropped, as in the paper."""
    examples = examples_of(family)
    tokenizer = load_tokenizer(family.base)
    points = []
    with _scratch(family) as scratch:
        for method, rate, ability, seed in sweep_plan(family):
            model = family.model(ability, family.settings.tune_seeds[0])
            out = scratch / "dropped"
            # force: the curve is meant to pass the point where darekit refuses, and to show that it is right to refuse
            drop(family.base, model, out, drop_rate=rate, method=method, seed=seed, overwrite=True, force=True)
            right = accuracy(load_model(out), tokenizer, examples[ability])
            points.append(Point(method, rate, ability, seed, right))
            step()
    return tuple(points)


def sweep_plan(family: Family) -> tuple[tuple[str, float, str, int | None], ...]:
    """(method, drop rate, ability, mask seed) of each point: no mask seed where nothing is drawn."""
    plan: list[tuple[str, float, str, int | None]] = []
    for method in METHODS:
        for rate in family.settings.drop_rates:
            drawn = method in MASKED and rate > 0
            seeds: tuple[int | None, ...] = family.settings.mask_seeds if drawn else (None,)
            plan += [(method, rate, ability, seed) for ability in FINE_TUNED for seed in seeds]
    return tuple(plan)


def count_steps(family: Family) -> int:
    """How many models `measure_rows` and `measure_sweep` evaluate."""
    seeds, masks = len(family.settings.tune_seeds), len(family.settings.mask_seeds)
    rows = 1 + seeds * len(FINE_TUNED) + len(NAMES) * seeds * (1 + masks) + seeds
    return rows + len(sweep_plan(family))


def _pairs(family: Family) -> Iterator[tuple[int, int]]:
    return ((seed, mask) for seed in family.settings.tune_seeds for mask in family.settings.mask_seeds)


@contextmanager
def _scratch(family: Family) -> Iterator[Path]:
    """A place for models that are only measured; inside the demo's directory, so that a kill leaves it to be found."""
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=family.directory) as scratch:
        yield Path(scratch)


def _merged(family: Family, scratch: Path, recipe: str, *, first: bool) -> Path:
    """Where a merge goes: the first of each recipe stays for the user to load, the others are only measured."""
    return family.directory / "merged" / Path(recipe).stem if first else scratch / "merged"
