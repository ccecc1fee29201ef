# SPDX-License-Identifier: Apache-2.0
"""The commands as functions: what `import darekit as dk` offers, and what the command line calls.

A merge: recipe > plan (headers) > homology (a sample of values) > stage > engine > companions > publish.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darekit.errors import PlanError
from darekit.planning.checks import check
from darekit.recipe import Recipe, read_recipe
from darekit.recipe.single import drop_recipe

if TYPE_CHECKING:
    from darekit.output.publishing import Progress, Report
    from darekit.planning.plan import Plan

SHARD_SIZE = 5_000_000_000  # bytes; what the Hub's tools write


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what to compute: but for `allow_nonfinite` none of these changes a weight."""

    threads: int | None = None
    shard_size: int = SHARD_SIZE
    overwrite: bool = False
    resume: bool = False
    force: bool = False
    allow_nonfinite: bool = False
    tile: int | None = None
    progress: Progress | None = None
    say: Callable[[str], None] | None = None  # receives notes and warnings as they arise


def merge(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    *,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Report:
    """Merge models as a recipe says, from disk to disk, into a new model directory.

    Args:
        recipe: a recipe file, its data, or a `Recipe`.
        out: the directory to write; must not exist yet, unless `overwrite`.
        seed: replaces the recipe's seed.
        settings: dotted overrides, as `{"parameters.lambda": 0.5}`.
        **options: threads: int, shard_size: int in bytes, overwrite, resume, force, allow_nonfinite: bool, progress:
            called with (bytes done, bytes in all), say: called with each note (see `Options`). To look without
            running: `darekit.plan`.

    Raises:
        DarekitError: see `darekit.errors`; nothing is published then.
    """
    found = recipe if isinstance(recipe, Recipe) else read_recipe(recipe, settings=settings, seed=seed)
    return run(found, Path(out), _options(options), search=search_path(recipe))


def plan(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    shard_size: int = SHARD_SIZE,
) -> Plan:
    """Plan a merge from headers alone, without running it: its steps, files, bytes, notes.

    The plan can be printed and counted, and holds no file open: reading a tensor through it raises. Where tensors are
    to be read, use it as a context manager, which opens its files and closes them on leaving::

        with dk.plan("recipe.yaml") as plan:
            embedding = plan.base.tensors["model.embed_tokens.weight"]
            raw = np.empty(embedding.nbytes, np.uint8)
            embedding.source.read_into(raw, 0)

    Args:
        recipe: a recipe file, its data, or a `Recipe`.
        seed: replaces the recipe's seed.
        settings: dotted overrides.
        shard_size: largest output file in bytes.

    Raises:
        DarekitError: everything that can be foreseen about this merge.
    """
    from darekit.planning.opening import open_plan

    found = recipe if isinstance(recipe, Recipe) else read_recipe(recipe, settings=settings, seed=seed)
    with open_plan(found, search=search_path(recipe), shard_size=shard_size) as made:
        return made


def drop(
    base: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    drop_rate: float | str,
    method: str = "dare",
    rescale: str | None = None,
    on: str = "delta",
    keep_dense: Sequence[str] = (),
    seed: int | None = None,
    vocab: str = "strict",
    heads: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    **options: Any,
) -> Report:
    """Sparsify one model's delta: the paper's single-model operation, base + sparsified delta.

    Args:
        base: the checkpoint that `model` was fine-tuned from.
        model: the fine-tuned model; its tokenizer goes with the output (the base's under `vocab: base`).
        out: the directory to write.
        drop_rate: fraction dropped, in [0, 1]; or "auto": each tensor's own, from a sample of its delta.
        method: a sparsifier: dare, drop_only, magnitude, della, breadcrumbs.
        rescale: paper, l1 or none; the method's default where not given.
        on: `delta`, or `weights` for the paper's counter-experiment.
        keep_dense: groups or glob patterns of tensors that are not dropped.
        seed: the mask's effective seed, used as it is.
        vocab: what to do with vocabularies that differ: strict, base or pad.
        heads: `base` or `model`: whose heads the output has, as they are; None: they are sparsified like the rest.
        parameters: further parameters of the sparsifier (window, gamma, q, tau).
        **options: fields of `Options`.
    """
    recipe = drop_recipe(
        str(base), str(model), drop_rate=drop_rate, method=method, rescale=rescale, on=on, keep_dense=keep_dense,
        seed=seed, vocab=vocab, heads=heads, parameters=parameters,
    )  # fmt: skip
    return run(recipe, Path(out), _options(options), search=())


def _options(given: Mapping[str, Any]) -> Options:
    """Keyword arguments of `merge` and `drop` -> options.

    Raises:
        TypeError: a name that is no option, or a size or a number of threads that is no positive integer.
    """
    known = [entry.name for entry in fields(Options)]
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{name!r} is not an option{hint}; options: {', '.join(known)}")
        if name in ("threads", "shard_size", "tile") and value is not None and (type(value) is not int or value < 1):
            raise TypeError(f"{name} must be a whole number above 0 (shard_size: bytes), found {value!r}")
    return Options(**given)


def search_path(recipe: object) -> tuple[Path, ...]:
    """Where a recipe's relative paths are looked up after the working directory: the recipe's own folder."""
    return (Path(recipe).resolve().parent,) if isinstance(recipe, str | Path) else ()


def run(recipe: Recipe, out: Path, options: Options, *, search: Sequence[Path] = ()) -> Report:
    """Plan, check, execute and publish one recipe."""
    from darekit.output.publishing import execute
    from darekit.planning.opening import open_plan

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
