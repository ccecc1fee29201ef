# SPDX-License-Identifier: Apache-2.0
"""What a run consists of: every call of `dare`, with the sweep files that it reads and what it costs.

Settings of merges are chosen on validation; only what was chosen, and what is compared with it, is asked on test.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from real.lessons import ABILITIES, PROSE

Results = Mapping[str, Any]  # a step's name -> what it gave
Document = dict[str, Any]

DROP_RATE = "sparsify.drop_rate"
DENSE = ["embeddings", "norms"]
METHODS = ("DARE, all tensors", "DropOnly", "magnitude", "magnitude, rescaled")
MERGES = ("average", "task arithmetic", "TIES")


def rows_for(test: int) -> dict[str, int]:
    """Rows of each split and of prose.

    >>> rows_for(200)
    {'validation': 80, 'test': 200, 'prose': 32}
    """
    return {"validation": max(1, round(0.4 * test)), "test": test, PROSE: max(1, round(0.16 * test))}


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        abilities: the models, in the order of the merges.
        rows: rows of each split, and of prose.
        seeds: of the masks at the headline's cells.
        other_seeds: of all other cells.
        rates, headline, other_rates: drop rates of DARE's curve, those of the headline, those of other methods.
        batch: rows at once.
    """

    abilities: tuple[str, ...] = ABILITIES
    rows: Mapping[str, int] = field(default_factory=lambda: rows_for(200))
    seeds: tuple[int, ...] = (1, 2, 3)
    other_seeds: tuple[int, ...] = (1,)
    rates: tuple[float, ...] = (0.5, 0.9, 0.95, 0.99, 0.999)
    headline: tuple[float, ...] = (0.9, 0.99)
    other_rates: tuple[float, ...] = (0.9, 0.99)
    batch: int = 32
    again: bool = True  # the headline again: another training seed, other threads


STANDARD = Size()
FULL = replace(STANDARD, other_seeds=(1, 2, 3), headline=STANDARD.rates, other_rates=STANDARD.rates)
QUICK = Size(
    abilities=ABILITIES[:1], rows=rows_for(100), seeds=(1,), rates=(0.5, 0.9, 0.99),
    headline=(), other_rates=(0.9,), again=False,
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        name: of its result, and of its sweep file.
        title: for people.
        words: after the program.
        file: makes what it reads from the results so far: the sweep file `steps/NAME.yaml`, or the recipes of an
            evaluation by name, each `steps/THEIRS.yaml`.
        cells: about how many models are judged, and by which judges each: by their test, or `/validation`, or so many
            of the rows.
        seconds: beside judging.
        program: `dare`, or a module of this package.
        makes: a file or folder that later steps read; what it holds is replaced.
        device: whether it takes --device and --dtype.
        dtype: the number format that it must be judged in, whatever is faster.
        needs: abilities whose models it reads.
    """

    name: str
    title: str
    words: tuple[str, ...]
    file: Callable[[Results], Document] | None = None
    cells: tuple[tuple[int, tuple[str, ...]], ...] = ()
    seconds: float = 5.0
    program: str = "dare"
    makes: str | None = None
    device: bool = False
    dtype: str | None = None
    needs: tuple[str, ...] = ()


def steps_of(size: Size) -> list[Step]:
    """All steps, in order: the headline first, what can be missed last."""
    first, *others = size.abilities
    found = [*_looks(size), _drops(size), _others(size), *_packs(size, first)]
    if others:
        found += [*_equal(size), _rounding(size), *_weights(size)]
    found += [*_headline(size), _speed(size)]
    for one in others:
        found += _packs(size, one)
    if others:
        found += _pairs(size)
    return [*found, *_similarities(size), *(_again(size) if size.again else ())]


def models_of(size: Size) -> list[str]:
    """The models that are fine-tuned, in order."""
    return [*size.abilities, *([f"{size.abilities[0]}-seed{AGAIN_SEED}"] if size.again else [])]


def sweep(
    name: str, title: str, file: Callable[[Results], Document], cells: Any, needs: Sequence[str], out: str = ""
) -> Step:
    """A step that is a sweep. Those with one `out` judge what they have in common once: --overwrite replaces the tables
    of the one before, and keeps its cells."""
    words = ("sweep", f"steps/{name}.yaml", f"runs/{out or name}", "--overwrite")
    return Step(name, title, words, file, tuple(cells), 15.0, device=True, needs=tuple(needs))


def judges(size: Size, split: str, names: Sequence[str], *, prose: bool = True) -> Document:
    """Judges by name, as a sweep has them."""
    every = [*names, PROSE] if prose else [*names]
    return {name: {"data": f"data/{name}.{split}.jsonl", "batch_size": size.batch} for name in every}


# --- one model: what is in its delta, and what dropping does ---


def _looks(size: Size) -> Iterator[Step]:
    for one in size.abilities:
        words = ("inspect", "base", one, "--json")
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


# --- packs ---

PACKS: Mapping[str, tuple[str, ...]] = {
    "lossless": ("--lossless",),
    "16 bit, p = .9": ("-p", "0.9", "--bits", "16"),
    "4 bit, p = .9": ("-p", "0.9", "--bits", "4"),
    "4 bit, p = .95": ("-p", "0.95", "--bits", "4"),
    "4 bit, p = .99": ("-p", "0.99", "--bits", "4"),
    "1 bit, p = .9": ("-p", "0.9", "--bits", "1"),
    "4 bit, p = .95, embeddings and norms kept": (
        "-p", "0.95", "--bits", "4", "--keep-dense", "embeddings", "--keep-dense", "norms",
    ),
    "1 bit, nothing dropped (BitDelta)": ("-p", "0", "--bits", "1", "--dense-bits", "1", "--group", "65536"),
}  # fmt: skip
MAGNITUDE = {f"magnitude, p = {rate:g}".replace("0.", "."): rate for rate in (0.9, 0.95, 0.99)}


def pack_path(model: str, title: str) -> str:
    """Where a pack is written.

    >>> pack_path("json", "4 bit, p = .9")
    'packs/json/4-bit-p-.9.pack.safetensors'
    """
    words = "".join(c if c.isalnum() or c == "." else " " for c in title).split()
    return f"packs/{model}/{'-'.join(words)}.pack.safetensors"


def _packs(size: Size, one: str) -> Iterator[Step]:
    """Packs of one model, and what is judged of them."""
    quick = len(size.abilities) == 1
    kept = [title for title in PACKS if not quick or title in ("lossless", "4 bit, p = .95")]
    pruned = {} if quick else MAGNITUDE
    for title in kept:
        path = pack_path(one, title)
        words = ("pack", "base", one, path, *PACKS[title], "--force", "--overwrite", "--json")
        yield Step(f"pack-{one}-{title}", f"pack of {one}: {title}", words, seconds=6, makes=path, needs=(one,))
    for title, rate in pruned.items():
        # What is left of magnitude pruning, as a file: positions and values, without loss.
        folder, path = f"packs/{one}/pruned-{rate:g}", pack_path(one, title)
        words = (
            "drop", "base", one, folder, "--method", "magnitude", "-p", f"{rate:g}", "--rescale", "none", "--force",
            "--overwrite", "--json",
        )  # fmt: skip
        title_ = f"pruned {one}, p = {rate:g}"
        yield Step(f"prune-{one}-{rate:g}", title_, words, seconds=6, makes=folder, needs=(one,))
        words = ("pack", "base", folder, path, "--lossless", "--overwrite", "--json")
        yield Step(f"pack-{one}-{title}", f"pack of {one}: {title}", words, seconds=8, makes=path, needs=(one,))
    files = [pack_path(one, title) for title in (*kept, *pruned)]
    words = (
        "eval", *files, "--base", "base", "--data", f"data/{one}.test.jsonl", "--data", f"data/{PROSE}.test.jsonl",
        "--batch-size", f"{size.batch}", "--out", f"runs/packs-{one}", "--json",
    )  # fmt: skip
    cells = ((len(files), (one, PROSE)),)
    title = f"packs of {one}, judged"
    yield Step(f"packs-{one}", title, words, cells=cells, device=True, seconds=20, needs=(one,))


# --- merges ---

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


def _grid_step(size: Size, name: str, models: Sequence[str]) -> Step:
    grid = settings_grid(models)
    rates = MERGE_RATES if len(models) > 2 else PAIRED_RATES

    def file(_: Results) -> Document:
        return merged(size, models, {"setting": grid, DROP_RATE: [*rates]}, "validation")

    each = len(grid) * (1 + (len(rates) - 1) * len(size.other_seeds)) + len(models) + 1
    title = f"merges of {', '.join(models)}: settings on validation"
    return sweep(f"{name}-grid", title, file, [(each, _validated(models))], models)


def _validated(models: Sequence[str]) -> tuple[str, ...]:
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


def _pairs(size: Size) -> Iterator[Step]:
    for pair in itertools.combinations(size.abilities, 2):
        name = "-".join(pair)
        yield _grid_step(size, name, pair)
        yield _test_step(size, name, pair)


WEIGHTS = (0.4, 0.8, 1.2)


def _equal(size: Size) -> Iterator[Step]:
    """All of them, with equal weights."""
    yield _grid_step(size, "three", size.abilities)
    yield _test_step(size, "three", size.abilities)


def _weights(size: Size) -> Iterator[Step]:
    """All of them, with weights that validation chooses."""
    three = size.abilities

    def weights(results: Results) -> Document:
        points = {}
        for values in itertools.product(WEIGHTS, repeat=len(three)):
            own = {f"models.{at}.parameters.weight": value for at, value in enumerate(values)}
            points[" / ".join(f"{value:g}" for value in values)] = own
        return _weighted(merged(size, three, {"weights": points}, "validation"))

    count = len(WEIGHTS) ** len(three)  # the models alone and the base are judged by then
    title = "weights of a TIES merge, on validation"
    yield sweep("weights-grid", title, weights, [(count, _validated(three))], three, "three-grid")

    def test(results: Results) -> Document:
        rows = [row for row in results["weights-grid"]["rows"] if row["kind"] == "grid" and row["scores"]]
        values = best(rows, three)["at"]["weights"].split(" / ")
        own = {f"models.{at}.parameters.weight": float(value) for at, value in enumerate(values)}
        points = {f"p = {rate:g}": own | {DROP_RATE: rate} for rate in MERGE_RATES}
        return _weighted(merged(size, three, {"merge": points}, "test"))

    cells = [(1 + (len(MERGE_RATES) - 1) * len(size.other_seeds), (*three, PROSE))]
    yield sweep("weights-test", "the chosen weights, on test", test, cells, three, "three-test")


def _weighted(document: Document) -> Document:
    """TIES whose kept deltas are added up by weight: with its own mean, the weight of a model that is alone in an
    element would not matter."""
    recipe = {"merge_method": "ties", "parameters": {"keep": 0.3, "lambda": 1.0, "normalize": False}}
    return document | {"recipe": document["recipe"] | recipe}


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


def _rounding(size: Size) -> Step:
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


# --- the headline again, and how fast ---

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


def _speed(size: Size) -> Step:
    words = ("base", size.abilities[0], f"data/{size.abilities[-1]}.test.jsonl", "--batch-size", f"{size.batch}")
    return Step(
        "speed", "how fast: `dare` against a plain loop", words, program="real.speed", seconds=90, device=True,
        needs=(size.abilities[0],),
    )  # fmt: skip
