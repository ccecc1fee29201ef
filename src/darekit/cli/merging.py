# SPDX-License-Identifier: Apache-2.0
"""`dare merge`, `drop`, `methods` and `demo`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from darekit.cli.options import (
    AllowNonfinite,
    BaseExtras,
    DryRun,
    Force,
    HeadsOption,
    Json,
    KeepDense,
    Lenient,
    Overwrite,
    RescaleName,
    Resume,
    RoundingName,
    Scope,
    Seed,
    Settings,
    ShardSize,
    Stage,
    Tau,
    Threads,
    Vocab,
    VocabOption,
    bytes_of,
    drop_rate_of,
    errors_told,
    overrides_of,
)


def merge(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    seed: Seed = None,
    settings: Settings = None,
    threads: Threads = None,
    shard_size: ShardSize = "5GB",
    lenient: Lenient = False,
    stage: Stage = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    force: Force = False,
    allow_nonfinite: AllowNonfinite = False,
    as_json: Json = False,
) -> None:
    """Merge models as RECIPE says and write the model directory OUT, or the adapter that the recipe asks for."""
    limit = bytes_of(shard_size)
    overrides = overrides_of(settings or [])
    with errors_told(resumes=True):
        from darekit.recipe import read_recipe
        from darekit.recipe.reading import search_path

        found = read_recipe(recipe, settings=overrides, seed=seed, lenient=lenient, stage=stage)
        if found.output == "adapter":
            _join(
                found, out, search_path(recipe), dry_run=dry_run, as_json=as_json, threads=threads,
                overwrite=overwrite, resume=resume, force=force, allow_nonfinite=allow_nonfinite,
            )  # fmt: skip
            return
        _run(
            found, out, search_path(recipe), dry_run=dry_run, as_json=as_json, threads=threads, shard_size=limit,
            overwrite=overwrite, resume=resume, force=force, allow_nonfinite=allow_nonfinite,
        )  # fmt: skip


def drop(
    base: Annotated[str, typer.Argument(help="The checkpoint MODEL was fine-tuned from.")],
    model: Annotated[str, typer.Argument(help="The fine-tuned model: directory, file or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    drop_rate: Annotated[
        str,
        typer.Option(
            "-p", "--drop-rate", metavar="P", help="Fraction of the delta to drop; auto: a rate for each tensor."
        ),
    ],
    tau: Tau = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="Sparsifier, which chooses what to drop: see `dare methods`.")
    ] = "dare",
    rescale: Annotated[
        RescaleName | None, typer.Option(help="How survivors are rescaled; default: as the method does.")
    ] = None,
    rescale_q: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="Q", help="dare: divide survivors by Q instead of 1 - p (DAREx's q)."),
    ] = None,
    on: Annotated[Scope, typer.Option(help="Drop from the delta, or from the weights themselves.")] = Scope.DELTA,
    keep_dense: KeepDense = None,
    window: Annotated[
        float | None, typer.Option(metavar="X", help="della: width of the range of keep probabilities.")
    ] = None,
    gamma: Annotated[
        float | None, typer.Option(metavar="X", help="breadcrumbs: fraction of the largest magnitudes to drop.")
    ] = None,
    seed: Seed = None,
    vocab: VocabOption = Vocab.STRICT,
    heads: HeadsOption = None,
    base_extras: Annotated[
        BaseExtras, typer.Option(help="Parts that only BASE has (token prediction, a pooler): keep or leave out.")
    ] = BaseExtras.KEEP,
    rounding: Annotated[
        RoundingName, typer.Option(help="To the nearest value, or stochastic: keeps small changes on average.")
    ] = RoundingName.NEAREST,
    threads: Threads = None,
    shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    force: Force = False,
    allow_nonfinite: AllowNonfinite = False,
    as_json: Json = False,
) -> None:
    """Drop most of one model's delta: write base + sparsified (model - base) to OUT."""
    rate = drop_rate_of(drop_rate)
    assert rate is not None
    if tau is not None and rate != "auto":
        raise typer.BadParameter("only works with -p auto", param_hint="--tau")
    if rescale_q == 0:
        raise typer.BadParameter(
            "0 would divide survivors by zero; leave it out to divide by 1 - p", param_hint="--rescale-q"
        )
    limit = bytes_of(shard_size)
    _check_method(method)
    with errors_told(resumes=True):
        from darekit.recipe.single import drop_recipe

        given = (("window", window), ("gamma", gamma), ("q", rescale_q), ("tau", tau))
        extra = {name: value for name, value in given if value is not None}
        found = drop_recipe(
            base, model, drop_rate=rate, method=method, rescale=rescale.value if rescale else None,
            on=on.value, keep_dense=keep_dense or (), seed=seed, vocab=vocab.value,
            heads=heads.value if heads else None, base_extras=base_extras.value, rounding=rounding.value,
            parameters=extra,
        )  # fmt: skip
        _run(
            found, out, (), dry_run=dry_run, as_json=as_json, threads=threads, shard_size=limit,
            overwrite=overwrite, resume=resume, force=force, allow_nonfinite=allow_nonfinite,
        )  # fmt: skip


def methods(
    name: Annotated[str | None, typer.Argument(help="Only this method, with its parameters and source.")] = None,
    as_json: Json = False,
) -> None:
    """List the sparsifiers and merge methods, or explain one."""
    from darekit.cli import display
    from darekit.methods import MERGE_ALIASES, MERGE_METHODS, SPARSIFIERS, installed

    name = MERGE_ALIASES.get(name, name) if name else None
    if name is None:
        for line in installed.load_all():
            display.say_note(f"not listed: {line}")
    elif name not in {**SPARSIFIERS, **MERGE_METHODS}:
        _load(name, [*SPARSIFIERS, *MERGE_METHODS], "NAME")
    display.show_methods(name, as_json=as_json)


def demo(
    directory: Annotated[Path, typer.Argument(help="Where to cache weights and write results.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Train a tiny family of models, merge it with and without DARE, and show what each model can do."""
    with errors_told():
        from darekit.demo import run_demo, show

        result = run_demo(directory)
        if as_json:
            print(json.dumps(result.to_data()))
        else:
            show(result)


def _check_method(method: str) -> None:
    if method != "dare":  # the default needs no import of the table
        from darekit.methods import SPARSIFIERS

        if method not in SPARSIFIERS:
            _load(method, SPARSIFIERS, "--method")


def _load(name: str, known: Iterable[str], where: str) -> None:
    """A method that is not known may come with an installed package."""
    from darekit.methods import MERGE_METHODS, SPARSIFIERS, installed

    before = [*known]
    with errors_told():
        problems = installed.load(name) if name not in {**SPARSIFIERS, **MERGE_METHODS} else []
    tables = {**SPARSIFIERS, **MERGE_METHODS} if where == "NAME" else SPARSIFIERS
    if name not in tables:
        told = "".join(f"; not loaded: {line}" for line in problems)
        listed = [*before, *(one for one in tables if one not in before)]
        raise typer.BadParameter(
            f"{name!r} is not a method; expected one of {', '.join(listed)}{told}", param_hint=where
        )


def _join(
    recipe: Any, out: Path, search: Any, *, dry_run: bool, as_json: bool, resume: bool, allow_nonfinite: bool,
    overwrite: bool, threads: int | None, force: bool,
) -> None:  # fmt: skip
    """A recipe with `output: adapter`."""
    from darekit.cli import display, display_extract
    from darekit.errors import PlanError
    from darekit.extraction.plan import terms_of
    from darekit.extraction.writing import planned, run_extraction

    if resume or allow_nonfinite:
        word = "--resume" if resume else "--allow-nonfinite"
        raise PlanError(f"{word} is for merges that write a model, but this recipe has output: adapter; leave it out")
    terms = terms_of(
        rank=None, energy=None, error=None, max_rank=None, dtype="float32", save=None, server=None, out_kind="peft",
        recipe=recipe,
    )  # fmt: skip
    if dry_run:
        with planned(None, recipe, terms, vocab=recipe.vocab, threads=threads, force=force, search=search) as plan:
            for line in plan.notes:
                display.say_note(line)
            display_extract.show_plan(plan, as_json=as_json)
        return
    with display.progress_bar("merging", quiet=as_json) as progress:
        report = run_extraction(
            None, recipe, out, terms, vocab=recipe.vocab, threads=threads, overwrite=overwrite, force=force,
            search=search, progress=progress, say=display.say_note,
        )  # fmt: skip
    display_extract.show_report(report, as_json=as_json)


def _run(recipe: Any, out: Path, search: Any, *, dry_run: bool, as_json: bool, **options: Any) -> None:
    from darekit import api
    from darekit.cli import display
    from darekit.planning import checks

    if dry_run:
        from darekit.planning.losses import sample_rounding, swallowed_notes
        from darekit.planning.opening import open_plan

        with open_plan(recipe, search=search, shard_size=options["shard_size"]) as plan:
            notes: list[str] = list(plan.notes)
            judgements = checks.check(plan, force=options["force"], say=notes.append)
            rounding = sample_rounding(plan)
            notes += swallowed_notes(rounding)
            display.show_plan(plan, judgements, notes, options["threads"], rounding, as_json=as_json)
        return
    with display.progress_bar("merging", quiet=as_json) as progress:
        report = api.run(recipe, out, api.Options(progress=progress, say=display.say_note, **options), search=search)
    display.show_report(report, as_json=as_json)
