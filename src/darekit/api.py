# SPDX-License-Identifier: Apache-2.0
"""The commands as functions: what `import darekit as dk` offers, and what the command line calls.

A merge: recipe > plan (headers) > homology (a sample of values) > stage > engine > companions > publish.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from darekit.errors import PlanError, RecipeError
from darekit.planning.checks import check
from darekit.recipe import Recipe, read_recipe
from darekit.recipe.reading import search_path, with_rounding
from darekit.recipe.single import drop_recipe
from darekit.wording import and_

if TYPE_CHECKING:
    from darekit.dtypes import Rounding
    from darekit.output.publishing import Report
    from darekit.planning.plan import Plan

SHARD_SIZE = 5_000_000_000  # bytes; what the Hub's tools write


class WriteOptions(TypedDict, total=False):
    """How to write an output: keyword arguments of `merge`, `drop` and `unpack`. None of them changes a weight.

    Attributes:
        threads: worker threads; the processors, at most 8, if not given.
        shard_size: largest output file in bytes; 5 GB if not given.
        overwrite: replace an existing output once the new one is complete.
        resume: continue a run that was killed.
        tile: elements of a tensor that are worked on at once; 65,536 if not given.
        progress: called with (bytes done, bytes in all).
        say: called with each note and warning as it arises.
    """

    threads: int | None
    shard_size: int
    overwrite: bool
    resume: bool
    tile: int | None
    progress: Callable[[int, int], None] | None
    say: Callable[[str], None] | None


class RunOptions(WriteOptions, total=False):
    """How to run a merge: keyword arguments of `merge` and `drop`, in addition to those of `WriteOptions`.

    Attributes:
        force: continue although the base looks wrong or too much is dropped.
        allow_nonfinite: where an input has NaN or Inf, take the base's element; the only option that can change a
            weight.
    """

    force: bool
    allow_nonfinite: bool


@dataclass(frozen=True)
class Options:
    """`RunOptions` with their defaults, as `run` takes them."""

    threads: int | None = None
    shard_size: int = SHARD_SIZE
    overwrite: bool = False
    resume: bool = False
    force: bool = False
    allow_nonfinite: bool = False
    tile: int | None = None
    progress: Callable[[int, int], None] | None = None
    say: Callable[[str], None] | None = None


def merge(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    *,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    lenient: bool = False,
    stage: str | None = None,
    rounding: Rounding | Mapping[str, Any] | None = None,
    **options: Unpack[RunOptions],
) -> Report:
    """Merge models as a recipe says, from disk to disk, into a new model directory.

    Tensors are streamed: memory does not grow with the models. The output appears when it is complete, never in part.

    Args:
        recipe: a recipe file, its data, or a `Recipe`.
        out: the directory to write; must not exist yet, unless `overwrite`.
        seed: replaces the recipe's seed. For a `Recipe`, give seed, settings and stage to `read_recipe`.
        settings: overrides by dotted key, as `{"parameters.lambda": 0.5}`.
        lenient: warn about unknown keys and settings without effect instead of refusing the recipe.
        stage: of a recipe of several stages, which one; the last if not given.
        rounding: replaces the recipe's `rounding`: nearest, stochastic, or `{"method": "stochastic", "seed": 7}`.
        **options: how to run: threads, shard_size, overwrite, resume, force, allow_nonfinite, tile, progress, say
            (see `RunOptions`).

    Returns:
        What was done: sizes, times, parameters kept per model, and the notes.

    Raises:
        TypeError: an option that does not exist; the message names the closest one.
        DarekitError: see `darekit.errors`; nothing is published then.

    Examples:
        >>> report = dk.merge("recipe.yaml", "merged")
        >>> report.tensors, report.parameters
        (21, 23712)
        >>> sorted(path.name for path in Path("merged").iterdir())
        ['README.md', 'config.json', 'darekit.lock.json', 'darekit_recipe.yaml', 'model.safetensors',
         'tokenizer.json', 'tokenizer_config.json']

        The recipe may be data, and any setting can be overridden:

        >>> recipe = {"base_model": "base", "models": ["math", "code"], "merge_method": "task_arithmetic"}
        >>> report = dk.merge(recipe, "softer", settings={"parameters.lambda": 0.5}, threads=1)
        >>> report.notes
        ()
    """
    chosen = options_of(options)
    found = _read(recipe, settings=settings, seed=seed, lenient=lenient, stage=stage)
    found = found if rounding is None else with_rounding(found, rounding)
    return run(found, Path(out), chosen, search=search_path(recipe))


def plan(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    lenient: bool = False,
    stage: str | None = None,
    shard_size: int = SHARD_SIZE,
) -> Plan:
    """Plan a merge from headers alone, without running it: its steps, files, bytes, notes.

    The plan can be printed and counted, and holds no file open: reading a tensor through it raises. To read tensors,
    use it as a context manager, which opens its files and closes them on leaving.

    Args:
        recipe: a recipe file, its data, or a `Recipe`.
        seed: replaces the recipe's seed.
        settings: overrides by dotted key, as `{"parameters.lambda": 0.5}`.
        lenient: warn about unknown keys and settings without effect instead of refusing the recipe.
        stage: of a recipe of several stages, which one; the last if not given.
        shard_size: largest output file in bytes.

    Returns:
        The plan.

    Raises:
        DarekitError: everything that can be foreseen about this merge.

    Examples:
        >>> plan = dk.plan("recipe.yaml")
        >>> plan
        <Plan: dare + task_arithmetic, 2 models, 21 steps, 23,712 parameters, 142 kB in, 49.5 kB out>
        >>> for model in plan.summaries:
        ...     print(f"{model.ref}: keeps {model.kept:,} of {model.parameters:,}")
        math: keeps 5,279 of 23,712
        code: keeps 5,279 of 23,712

        Reading a tensor of the base, (vocabulary, width), as raw bytes:

        >>> with dk.plan("recipe.yaml") as plan:
        ...     embedding = plan.base.tensors["model.embed_tokens.weight"]
        ...     raw = np.empty(embedding.nbytes, np.uint8)
        ...     embedding.source.read_into(raw, 0)
        >>> embedding.dtype, embedding.shape
        ('BF16', (96, 32))
    """
    from darekit.planning.opening import open_plan

    found = _read(recipe, settings=settings, seed=seed, lenient=lenient, stage=stage)
    with open_plan(found, search=search_path(recipe), shard_size=shard_size) as made:
        return made


def drop(
    base: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    drop_rate: float | Literal["auto"],
    method: str = "dare",
    rescale: Literal["paper", "l1", "none"] | None = None,
    on: Literal["delta", "weights"] = "delta",
    keep_dense: Sequence[str] = (),
    seed: int | None = None,
    vocab: Literal["strict", "base", "pad"] = "strict",
    heads: Literal["base", "model"] | None = None,
    base_extras: Literal["keep", "leave_out"] = "keep",
    rounding: Rounding | Mapping[str, Any] = "nearest",
    parameters: Mapping[str, Any] | None = None,
    **options: Unpack[RunOptions],
) -> Report:
    """Sparsify one model's delta: the paper's single-model operation, base + sparsified delta.

    Args:
        base: the checkpoint that `model` was fine-tuned from.
        model: the fine-tuned model; the output gets its tokenizer (the base's under `vocab: base`).
        out: the directory to write.
        drop_rate: fraction dropped, in [0, 1]; or "auto": each tensor's own, from a sample of its delta.
        method: a sparsifier: dare, drop_only, magnitude, della, breadcrumbs.
        rescale: paper, l1 or none; the method's default if not given.
        on: `delta`, or `weights` for the paper's counter-experiment.
        keep_dense: groups or glob patterns of tensors that are not dropped.
        seed: the mask's effective seed, used as it is.
        vocab: what to do with vocabularies that differ: strict, base or pad.
        heads: `base` or `model`: whose heads the output has, as they are; None: they are sparsified like the rest.
        base_extras: what becomes of parts that only the base has (token prediction, a pooler): keep or leave_out.
        rounding: nearest; or stochastic, which keeps small changes in the mean (its draws follow from `seed`).
        parameters: further parameters of the sparsifier (window, gamma, q, tau).
        **options: how to run: threads, shard_size, overwrite, resume, force, allow_nonfinite, tile, progress, say
            (see `RunOptions`).

    Returns:
        What was done: sizes, times, parameters kept, and the notes.

    Raises:
        TypeError: an option that does not exist; the message names the closest one.
        DarekitError: see `darekit.errors`; nothing is published then.

    Examples:
        >>> report = dk.drop("base", "math", "math-dropped", drop_rate=0.9, seed=42)
        >>> report.kept, report.parameters
        ({'math': 2359}, 23712)

        Keep the largest tenth instead of a random one, and leave embeddings as they are:

        >>> report = dk.drop(
        ...     "base", "math", "math-largest", drop_rate=0.9, method="magnitude", keep_dense=["embeddings"]
        ... )

        A misspelt option is refused before anything is read:

        >>> dk.drop("base", "math", "out", drop_rate=0.9, thread=2)
        Traceback (most recent call last):
        TypeError: 'thread' is not an option; did you mean 'threads'?; options: threads, ...
    """
    chosen = options_of(options)
    recipe = drop_recipe(
        str(base), str(model), drop_rate=drop_rate, method=method, rescale=rescale, on=on, keep_dense=keep_dense,
        seed=seed, vocab=vocab, heads=heads, base_extras=base_extras, rounding=rounding, parameters=parameters,
    )  # fmt: skip
    return run(recipe, Path(out), chosen, search=())


def _read(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    settings: Mapping[str, Any] | None,
    seed: int | None,
    lenient: bool,
    stage: str | None,
) -> Recipe:
    """A recipe as it is given -> read.

    Raises:
        RecipeError: it cannot be read; or it was already, and what was to change it comes too late.
    """
    if not isinstance(recipe, Recipe):
        return read_recipe(recipe, settings=settings, seed=seed, lenient=lenient, stage=stage)
    late = [f"{name}={value!r}" for name, value in (("settings", settings or None), ("seed", seed), ("stage", stage))
            if value is not None]  # fmt: skip
    if late:
        raise RecipeError(
            f"this Recipe has already been read, so {and_(late)} would have no effect: give "
            f"{'it' if len(late) == 1 else 'them'} to dk.read_recipe, or give this function the file or the data"
        )
    return recipe


def options_of(given: RunOptions | WriteOptions, *, only_write: bool = False) -> Options:
    """Keyword arguments of `merge` and `drop`, or of `unpack`, which takes only `WriteOptions` -> options.

    Raises:
        TypeError: a name that is not an option, or a size or a number of threads that is not a positive integer.
    """
    known = [entry.name for entry in fields(Options) if not only_write or entry.name in WriteOptions.__annotations__]
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{name!r} is not an option{hint}; options: {', '.join(known)}")
        if name in ("threads", "shard_size", "tile") and value is not None and (type(value) is not int or value < 1):
            raise TypeError(f"{name} must be a whole number above 0 (shard_size: bytes), found {value!r}")
    return Options(**given)


def run(recipe: Recipe, out: Path, options: Options, *, search: Sequence[Path] = ()) -> Report:
    """Plan, check, execute and publish one recipe."""
    from darekit.output.publishing import execute
    from darekit.planning.opening import open_plan

    if recipe.output == "adapter":
        raise PlanError(
            "this recipe has output: adapter, but this call writes a model: use `dare merge`, or from Python "
            "dk.extract(None, recipe, out)"
        )
    if options.allow_nonfinite and recipe.base_model is None:
        raise PlanError(
            "--allow-nonfinite takes the base's element where a model has NaN or Inf, and this recipe has no base; "
            "add base_model, or repair the models"
        )
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if options.say:
            options.say(line)

    with open_plan(recipe, search=search, shard_size=options.shard_size) as made:
        if options.allow_nonfinite:
            from darekit.planning.nested import allow_nonfinite

            allow_nonfinite(made)
        for note in made.notes:
            say(note)
        check(made, force=options.force, say=say)
        report = execute(
            made,
            out,
            threads=options.threads,
            tile=options.tile,
            overwrite=options.overwrite,
            resume=options.resume,
            allow_nonfinite=options.allow_nonfinite,
            progress=options.progress,
            say=say,
        )
    return replace(report, notes=tuple(said))
