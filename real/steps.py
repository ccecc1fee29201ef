# SPDX-License-Identifier: Apache-2.0
"""What a run consists of: every call of `dare`, with the sweep files that it reads and what it costs.

Settings of merges are chosen on validation; only what was chosen, and what is compared with it, is asked on test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from real.informed import informed_steps
from real.lessons import PROSE
from real.merging import MERGES, chosen, equal_steps, merge_recipe, pair_steps, rounding_step, weight_steps
from real.packing import lora_steps, pack_steps
from real.searching import search_steps
from real.sizes import DENSE, DROP_RATE, Document, Results, Size, Step, judges, sweep

METHODS = ("DARE, all tensors", "DropOnly", "magnitude", "magnitude, rescaled")


def steps_of(size: Size) -> list[Step]:
    """All steps, in order: the headline first, what can be missed last."""
    first, *others = size.abilities
    found = [*_looks(size), _drops(size), _others(size), *pack_steps(size, first)]
    if others:
        found += [*lora_steps(size, first), *equal_steps(size), *informed_steps(size), rounding_step(size)]
        found += weight_steps(size)
    found += [*_headline(size), _speed(size)]
    for one in others:
        found += pack_steps(size, one)
    if others:
        found += pair_steps(size)
    found += [*_similarities(size), *(_again(size) if size.again else ())]
    if "loras" in size.also:
        for one in others:
            found += lora_steps(size, one)
    if "paired" in size.also:
        found += _paired(size)
    if "search" in size.also and others:
        found += search_steps(size)
    return found


def models_of(size: Size) -> list[str]:
    """The models that are fine-tuned, in order."""
    return [*size.abilities, *([f"{size.abilities[0]}-seed{AGAIN_SEED}"] if size.again else [])]


# --- one model: what is in its delta, and what dropping does ---


def _looks(size: Size) -> Iterator[Step]:
    for one in size.abilities:
        words: tuple[str, ...] = ("inspect", "base", one, "--json")
        yield Step(f"inspect-{one}", f"what the delta of {one} is like", words, needs=(one,))
    if len(size.abilities) > 1:
        words = ("inspect", "base", *size.abilities, "--plot", "runs/deltas", "--json")
        yield Step("inspect-all", "where the deltas conflict", words, seconds=12, needs=size.abilities)
    for one in size.abilities:
        recipe = f"recipes/{one}.yaml"
        words = ("recommend", "base", one, "--out", recipe, "--json")
        yield Step(f"recommend-{one}", f"how much of {one} may be dropped", words, makes=recipe, needs=(one,))


def curve(size: Size, methods: Mapping[str, Document], rates: Sequence[float], seeds: Sequence[int]) -> Document:
    """Drop rates x methods x models, on test."""
    return {
        "recipe": {
            "base_model": "base",
            "models": [{"model": size.abilities[0]}],
            "sparsify": {"method": "dare", "drop_rate": 0.9, "keep_dense": DENSE},
            "merge_method": "task_arithmetic",
        },
        "axes": {
            "model": {one: {"models.0.model": one, "judges": [one, PROSE]} for one in size.abilities},
            "method": dict(methods),
            DROP_RATE: [0, *rates],
        },
        "seeds": [*seeds],
        "test": judges(size, "test", size.abilities),
        "choose": f"{size.abilities[0]}/exact_match",
        "plot": {"x": DROP_RATE, "lines": "model", "title": "What is left of an ability"},
    }


def _drops(size: Size) -> Step:
    def file(_: Results) -> Document:
        return curve(size, {"DARE": {}}, size.rates, size.other_seeds)

    each = 2 + len(size.rates) * len(size.other_seeds)  # nothing dropped, and the base
    return sweep("drop", "DARE: drop rates", file, _each(size, each), size.abilities, "curves")


def _others(size: Size) -> Step:
    methods: dict[str, Document] = {
        METHODS[0]: {"sparsify.keep_dense": []},
        METHODS[1]: {"sparsify.method": "drop_only"},
        METHODS[2]: {"sparsify.method": "magnitude"},
        METHODS[3]: {"sparsify.method": "magnitude", "sparsify.rescale": "paper"},
    }

    def file(_: Results) -> Document:
        return curve(size, methods, size.other_rates, size.other_seeds)

    each = len(size.other_rates) * (2 * len(size.other_seeds) + 2)
    return sweep("others", "other ways to drop", file, _each(size, each), size.abilities, "curves")


def _headline(size: Size) -> Iterator[Step]:
    """More masks, where the headline is."""
    more = len({*size.seeds} - {*size.other_seeds})

    def file(_: Results) -> Document:
        return curve(size, {"DARE": {}}, size.headline, size.seeds)

    if more and size.headline:
        cells = _each(size, more * len(size.headline))
        yield sweep("masks", "DARE: more masks", file, cells, size.abilities, "curves")


def _each(size: Size, count: int) -> list[tuple[int, tuple[str, ...]]]:
    """So many cells of each model, judged by its own ability and prose."""
    return [(count, (one, PROSE)) for one in size.abilities]


def _similarities(size: Size) -> Iterator[Step]:
    for one in size.abilities[:1]:
        words = (
            "similarity", "base", one, "--data", f"data/{one}.test.jsonl", "-p", "0.9,0.99", "--keep-dense",
            "embeddings", "--keep-dense", "norms", "--limit", "32", "--batch-size", f"{size.batch}", "--plot",
            "runs/similarity", "--json",
        )  # fmt: skip
        yield Step(f"similarity-{one}", f"hidden states of {one}", words, seconds=60, device=True, needs=(one,))


# --- the headline again, row by row, and how fast ---

AGAIN_SEED, AGAIN_THREADS = 1, 2


def _again(size: Size) -> Iterator[Step]:
    one = size.abilities[0]
    rates = tuple(rate for rate in size.rates if rate >= 0.9)

    def file(model: str) -> Callable[[Results], Document]:
        def made(_: Results) -> Document:
            document = curve(replace(size, abilities=(one,)), {"DARE": {}}, rates, size.seeds[:1])
            document["axes"]["model"] = {model: {"models.0.model": model, "judges": [one, PROSE]}}
            return document | {"recipe": document["recipe"] | {"models": [{"model": model}]}}

        return made

    other = f"{one}-seed{AGAIN_SEED}"
    cells = [(len(rates) + 2, (one, PROSE))]
    yield sweep("again-seed", f"{one}, trained with another seed", file(other), cells, (other,))
    yield sweep("again-threads", f"{one}, judged by {AGAIN_THREADS} threads", file(one), cells, (one,))


PAIRED_RATES = (0.9, 0.99)


def _paired(size: Size) -> Iterator[Step]:
    """What a sweep cannot say: how far a model is from the fine-tuned one on the very rows, and a merge with DARE from
    the same without. `dare eval` compares all that it is given with the first, row by row."""
    for one in size.abilities:
        recipes = {f"{one}-p{rate:g}": dropped_recipe(size, one, rate) for rate in PAIRED_RATES}
        files = (one, *(f"steps/{name}.yaml" for name in recipes))
        yield Step(
            f"paired-{one}", f"DARE on {one}, row by row", _evaluated(size, f"paired-{one}", files, (one, PROSE)),
            _fixed(recipes), ((len(files), (one, PROSE)),), 20.0, device=True, needs=(one,),
        )  # fmt: skip
    three = size.abilities
    for method in MERGES if len(three) > 1 else ():
        name = f"paired-{method.replace(' ', '-')}"
        files = tuple(f"steps/{name}-{how}.yaml" for how in ("without", "with"))
        yield Step(
            name, f"{method} with and without DARE, row by row", _evaluated(size, name, files, (*three, PROSE)),
            _merge_pair(size, name, method), ((2, (*three, PROSE)),), 20.0, device=True, needs=three,
        )  # fmt: skip


def _fixed(document: Document) -> Callable[[Results], Document]:
    return lambda _: document


def _merge_pair(size: Size, name: str, method: str) -> Callable[[Results], Document]:
    def file(results: Results) -> Document:
        pair = chosen(results, "three", size.abilities)[method]
        return {f"{name}-{how}": merge_recipe(size, row["at"]) for how, row in pair.items()}

    return file


def _evaluated(size: Size, name: str, models: Sequence[str], judged: Sequence[str]) -> tuple[str, ...]:
    data = [word for one in judged for word in ("--data", f"data/{one}.test.jsonl")]
    return ("eval", *models, *data, "--batch-size", f"{size.batch}", "--out", f"runs/{name}", "--json")


def dropped_recipe(size: Size, model: str, rate: float) -> Document:
    """A model after DARE, as the headline has it, with its first mask."""
    return {
        "base_model": "base",
        "models": [{"model": model}],
        "sparsify": {"method": "dare", "drop_rate": rate, "keep_dense": DENSE, "seed": size.seeds[0]},
        "merge_method": "task_arithmetic",
    }


def _speed(size: Size) -> Step:
    words = ("base", size.abilities[0], f"data/{size.abilities[-1]}.test.jsonl", "--batch-size", f"{size.batch}")
    return Step(
        "speed", "how fast: `dare` against a plain loop", words, program="real.speed", seconds=90, device=True,
        needs=(size.abilities[0],),
    )  # fmt: skip
