# SPDX-License-Identifier: Apache-2.0
"""The `dare` command. Imports stay inside the commands: `dare --help` and usage errors must be instant."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from darekit.errors import DarekitError

app = typer.Typer(
    help="Absorb the abilities of fine-tuned models into one: DARE and model merging, streamed from disk to disk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Options that several commands share.
Threads = Annotated[
    int | None, typer.Option(min=1, max=256, help="Worker threads; default: the processors, at most 8.")
]
ShardSize = Annotated[str, typer.Option(help="Largest output file: 5GB, 500MB, 2GiB.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the new one is complete.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run that was killed.")]
Force = Annotated[bool, typer.Option("--force", help="Go on although the base looks wrong or too much is dropped.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Where an input has NaN or Inf, take the base's element.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, check the models, write nothing.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Seed of the masks.")]


class RescaleName(StrEnum):
    """Words for --rescale."""

    PAPER = "paper"
    L1 = "l1"
    NONE = "none"


class PackRescale(StrEnum):
    """Words for `pack --rescale`."""

    PAPER = "paper"
    NONE = "none"


class Scope(StrEnum):
    """Words for --on."""

    DELTA = "delta"
    WEIGHTS = "weights"


class Vocab(StrEnum):
    """Words for --vocab."""

    STRICT = "strict"
    BASE = "base"
    PAD = "pad"


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Absorb the abilities of fine-tuned models into one: DARE and model merging, streamed from disk to disk."""
    if version:
        from darekit import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    seed: Seed = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override: parameters.lambda=0.5.")
    ] = None,
    threads: Threads = None,
    shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    force: Force = False,
    allow_nonfinite: AllowNonfinite = False,
    as_json: Json = False,
) -> None:
    """Merge models as RECIPE says, into the model directory OUT."""
    limit = _bytes_of(shard_size)
    overrides = _overrides(settings or [])
    with _errors_told(resumes=True):
        from darekit.api import search_path
        from darekit.recipe import read_recipe

        found = read_recipe(recipe, settings=overrides, seed=seed)
        _run(
            found, out, search_path(recipe), dry_run=dry_run, as_json=as_json, threads=threads, shard_size=limit,
            overwrite=overwrite, resume=resume, force=force, allow_nonfinite=allow_nonfinite,
        )  # fmt: skip


@app.command()
def drop(
    base: Annotated[str, typer.Argument(help="The checkpoint that MODEL was fine-tuned from.")],
    model: Annotated[str, typer.Argument(help="The fine-tuned model: directory, file or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    drop_rate: Annotated[float, typer.Option("-p", "--drop-rate", help="Fraction of the delta that is dropped.")],
    method: Annotated[str, typer.Option(help="How to choose what is dropped: see `dare methods`.")] = "dare",
    rescale: Annotated[RescaleName | None, typer.Option(help="What survivors are multiplied by.")] = None,
    on: Annotated[Scope, typer.Option(help="Drop from the delta, or from the weights themselves.")] = Scope.DELTA,
    keep_dense: Annotated[
        list[str] | None, typer.Option(help="Do not drop these: embeddings, norms, biases, heads or a glob pattern.")
    ] = None,
    window: Annotated[float | None, typer.Option(help="della: width of the range of keep probabilities.")] = None,
    gamma: Annotated[float | None, typer.Option(help="breadcrumbs: fraction of largest magnitudes dropped.")] = None,
    seed: Seed = None,
    vocab: Annotated[Vocab, typer.Option(help="Vocabularies that differ: refuse, cut, or keep.")] = Vocab.STRICT,
    threads: Threads = None,
    shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    force: Force = False,
    allow_nonfinite: AllowNonfinite = False,
    as_json: Json = False,
) -> None:
    """Drop most of one model's delta: base + sparsified (model - base), written to OUT."""
    _check_drop_rate(drop_rate)
    limit = _bytes_of(shard_size)
    _check_method(method)
    with _errors_told(resumes=True):
        from darekit.api import drop_recipe

        extra = {name: value for name, value in (("window", window), ("gamma", gamma)) if value is not None}
        found = drop_recipe(
            base, model, drop_rate=drop_rate, method=method, rescale=rescale.value if rescale else None,
            on=on.value, keep_dense=keep_dense or (), seed=seed, vocab=vocab.value, parameters=extra,
        )  # fmt: skip
        _run(
            found, out, (), dry_run=dry_run, as_json=as_json, threads=threads, shard_size=limit,
            overwrite=overwrite, resume=resume, force=force, allow_nonfinite=allow_nonfinite,
        )  # fmt: skip


def _check_method(method: str) -> None:
    if method != "dare":  # the default needs no import of the table
        from darekit.methods import SPARSIFIERS

        if method not in SPARSIFIERS:
            raise typer.BadParameter(f"{method!r} is none of {', '.join(SPARSIFIERS)}", param_hint="--method")


def _check_drop_rate(drop_rate: float) -> None:
    if not 0 <= drop_rate <= 1:
        hint = f"; a percentage? write {drop_rate / 100:g}" if 1 < drop_rate <= 100 else ""
        raise typer.BadParameter(f"{drop_rate:g} is outside [0, 1]{hint}", param_hint="-p")


def _run(recipe: Any, out: Path, search: Any, *, dry_run: bool, as_json: bool, **options: Any) -> None:
    from darekit import api
    from darekit.cli import display

    if dry_run:
        from darekit.planning import open_plan

        with open_plan(recipe, search=search, shard_size=options["shard_size"]) as plan:
            notes: list[str] = list(plan.notes)
            judgements = api.check(plan, force=options["force"], say=notes.append)
            display.show_plan(plan, judgements, notes, options["threads"], as_json=as_json)
        return
    with display.progress_bar("merging", quiet=as_json) as progress:
        report = api.run(recipe, out, api.Options(progress=progress, say=display.say_note, **options), search=search)
    display.show_report(report, as_json=as_json)


@app.command()
def inspect(
    base: Annotated[str, typer.Argument(help="The checkpoint that MODEL was fine-tuned from.")],
    model: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show how far MODEL is from BASE, tensor by tensor, and how much of it can be dropped."""
    with _errors_told():
        from darekit.cli import display
        from darekit.inspection import inspect as inspect_models

        with display.progress_bar("inspecting", quiet=as_json) as progress:
            found = inspect_models(base, model, threads=threads, progress=progress)
        display.show_inspection(found, as_json=as_json)


@app.command()
def pack(
    base: Annotated[str, typer.Argument(help="The checkpoint that MODEL was fine-tuned from.")],
    model: Annotated[str, typer.Argument(help="The fine-tuned model: directory, file or Hub id.")],
    out: Annotated[Path, typer.Argument(help="File to write, OUT.safetensors.")],
    drop_rate: Annotated[
        float | None, typer.Option("-p", "--drop-rate", help="Fraction of the delta that is dropped.")
    ] = None,
    lossless: Annotated[bool, typer.Option("--lossless", help="Drop nothing: the exact model, compressed.")] = False,
    bits: Annotated[int, typer.Option(help="Per kept element: 64, 32, 16, 8, 4, 2 or 1.")] = 16,
    dense_bits: Annotated[
        int | None, typer.Option(help="The same for tensors that are not dropped; default: as --bits, at least 4.")
    ] = None,
    group: Annotated[
        int, typer.Option(min=1, max=65536, help="Kept elements that share a scale (8 bits or less).")
    ] = 64,
    rescale: Annotated[PackRescale, typer.Option(help="What survivors are multiplied by.")] = PackRescale.PAPER,
    keep_dense: Annotated[
        list[str] | None, typer.Option(help="Do not drop these: embeddings, norms, biases, heads or a glob pattern.")
    ] = None,
    seed: Seed = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Store MODEL as its sparse delta from BASE, in the file OUT: no index, as the mask is a function of a seed."""
    if (drop_rate is None) != lossless:
        raise typer.BadParameter("give either -p or --lossless", param_hint="-p")
    _check_drop_rate(drop_rate or 0.0)
    widths = (64, 32, 16, 8, 4, 2, 1)
    for value, name in ((bits, "--bits"), (dense_bits, "--dense-bits")):
        if value is not None and value not in widths:
            raise typer.BadParameter(f"{value} is none of {', '.join(map(str, widths))}", param_hint=name)
    with _errors_told():
        from darekit.cli import display, packs
        from darekit.packs.packing import pack as pack_model

        with display.progress_bar("packing", quiet=as_json) as progress:
            report = pack_model(
                base, model, out, drop_rate=drop_rate, lossless=lossless, bits=bits, dense_bits=dense_bits, group=group,
                rescale=rescale.value, keep_dense=keep_dense or (), seed=seed, threads=threads, overwrite=overwrite,
                force=force, progress=progress, say=display.say_note,
            )  # fmt: skip
        packs.show_pack(report, as_json=as_json)


@app.command()
def unpack(
    base: Annotated[str, typer.Argument(help="The checkpoint that PACK was made against.")],
    pack: Annotated[Path, typer.Argument(help="A file that `dare pack` wrote.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    threads: Threads = None,
    shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Write the packed model as an ordinary model directory, with the bits that `dare drop` gives."""
    limit = _bytes_of(shard_size)
    with _errors_told(resumes=True):
        from darekit.cli import display
        from darekit.packs.unpacking import unpack as unpack_model

        with display.progress_bar("unpacking", quiet=as_json) as progress:
            report = unpack_model(
                base, pack, out, threads=threads, shard_size=limit, overwrite=overwrite, resume=resume,
                progress=progress, say=display.say_note,
            )  # fmt: skip
        display.show_report(report, as_json=as_json)


@app.command()
def verify(
    pack: Annotated[Path, typer.Argument(help="A file that `dare pack` wrote.")],
    base: Annotated[str | None, typer.Argument(help="The checkpoint that it was made against.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Check PACK against its own digests, and with BASE every result; writes nothing, exits with 1 on a fault."""
    with _errors_told():
        from darekit.cli import display, packs
        from darekit.packs.reading import open_pack

        with open_pack(pack, base=base) as found, display.progress_bar("verifying", quiet=as_json) as progress:
            verification = found.verify(threads=threads, progress=progress)
        packs.show_verification(verification, as_json=as_json)
    if verification.faults:
        raise typer.Exit(1)


@app.command()
def info(
    pack: Annotated[Path, typer.Argument(help="A file that `dare pack` wrote.")],
    as_json: Json = False,
) -> None:
    """Show what PACK is: its model and base, size and ratio, drop rate, bits, license."""
    with _errors_told():
        from darekit.cli import packs
        from darekit.packs.reading import open_pack

        with open_pack(pack) as found:
            packs.show_info(found.info(), as_json=as_json)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the sparsifiers and merge methods with their parameters and sources."""
    from darekit.cli import display

    display.show_methods(as_json=as_json)


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(help="Where weights are cached and results written.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Train a tiny real family, merge it with and without DARE, and show what each model can do."""
    with _errors_told():
        from darekit.demo import run_demo, show

        result = run_demo(directory)
        if as_json:
            print(json.dumps(result.to_data()))
        else:
            show(result)


def _overrides(settings: list[str]) -> dict[str, str]:
    overrides = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{setting!r} is not KEY=VALUE, as in parameters.lambda=0.5", param_hint="--set")
        overrides[key.strip()] = value.strip()
    return overrides


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def _bytes_of(text: str) -> int:
    """`5GB`, `500 MB`, `2GiB` -> bytes."""
    stripped = text.replace(" ", "").upper()
    number = stripped.rstrip("KMGTIB")
    try:
        size = int(float(number) * _UNITS[stripped[len(number) :]])
    except (ValueError, KeyError, OverflowError):
        raise typer.BadParameter(
            f"{text!r} is not a size; write 5GB, 500MB or 2GiB", param_hint="--shard-size"
        ) from None
    if size < 1:
        raise typer.BadParameter(f"{text!r} is not a size above 0", param_hint="--shard-size")
    if stripped.isdigit() and size < 1000:
        raise typer.BadParameter(f"{text!r} would be bytes; write 5GB, 500MB or 2GiB", param_hint="--shard-size")
    return size


@contextmanager
def _errors_told(resumes: bool = False) -> Iterator[None]:
    """An error on purpose becomes its message and exit code 1; anything else is a bug and shows its stack."""
    try:
        yield
    except DarekitError as error:
        if "--json" in sys.argv:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        print(f"dare: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        told = "; nothing was published (--resume continues)" if resumes else ""
        print(f"dare: interrupted{told}", file=sys.stderr)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise typer.Exit(1) from None


def main() -> None:
    """Entry point of the `dare` command."""
    app()
