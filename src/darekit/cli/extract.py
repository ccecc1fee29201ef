# SPDX-License-Identifier: Apache-2.0
"""`dare extract`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from darekit.cli.options import DryRun, Force, Json, Overwrite, PackVocab, Threads, errors_told, listed


class OutKind(StrEnum):
    """Words for --out-kind."""

    PEFT = "peft"


class Server(StrEnum):
    """Words for --for."""

    VLLM = "vllm"


class FactorType(StrEnum):
    """Words for --dtype."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def extract(
    base: Annotated[str, typer.Argument(help="The checkpoint that the adapter is for.")],
    model: Annotated[str, typer.Argument(help="The fine-tuned model: directory, Hub id, pack, or recipe (YAML).")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    rank: Annotated[int | None, typer.Option(min=1, metavar="N", help="Rank of every module.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="X", help="Instead of --rank: share of each delta's squared norm to keep, such as 0.95."),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(metavar="X", help="Instead of --rank: how much of each delta's norm may be lost, such as 0.05."),
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Largest rank that --energy or --error may choose.")
    ] = None,
    dtype: Annotated[FactorType, typer.Option(help="Number format of the factors.")] = FactorType.FLOAT32,
    save: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KINDS",
            help="What to save whole: norms, biases, heads, routers, embeddings; or none. Default: all but embeddings.",
        ),
    ] = None,
    factors: Annotated[
        list[str] | None,
        typer.Option(metavar="KINDS", help="What else gets factors, as PEFT has them: embeddings, convolutions."),
    ] = None,
    server: Annotated[
        Server | None,
        typer.Option("--for", help="Write only what this server loads: nothing saved whole, rank <= 512."),
    ] = None,
    out_kind: Annotated[OutKind, typer.Option(help="Format of the adapter.")] = OutKind.PEFT,
    vocab: Annotated[
        PackVocab, typer.Option(help="If vocabularies differ: refuse, or keep to the base's rows.")
    ] = PackVocab.STRICT,
    threads: Threads = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write what MODEL adds to BASE as a LoRA adapter in OUT. A recipe is merged and extracted in one pass."""
    given = sum(value is not None for value in (rank, energy, error))
    if given > 1 or (not given and not model.endswith((".yaml", ".yml"))):  # a recipe may say its rank itself
        raise typer.BadParameter("give one of --rank, --energy and --error", param_hint="--rank")
    if energy is not None and not 0 < energy <= 1:
        raise typer.BadParameter(f"{energy:g} is outside (0, 1]{_percent(energy)}", param_hint="--energy")
    if error is not None and not 0 <= error < 1:
        raise typer.BadParameter(f"{error:g} is outside [0, 1){_percent(error)}", param_hint="--error")
    kinds = None if save is None else listed(save)
    if kinds == ["none"]:
        kinds = []
    with errors_told():
        from darekit.cli import display, display_extract
        from darekit.extraction.plan import terms_of
        from darekit.extraction.writing import extract as extract_adapter
        from darekit.extraction.writing import planned, recipe_in

        word: Literal["vllm"] | None = None if server is None else "vllm"
        if dry_run:
            terms = terms_of(
                rank=rank, energy=energy, error=error, max_rank=max_rank, dtype=dtype.value, save=kinds, server=word,
                out_kind=out_kind.value, recipe=recipe_in(model), factors=listed(factors or []),
            )  # fmt: skip
            with planned(base, model, terms, vocab=vocab.value, threads=threads, force=force) as plan:
                for line in plan.notes:
                    display.say_note(line)
                display_extract.show_plan(plan, as_json=as_json)
            return
        with display.progress_bar("extracting", quiet=as_json) as progress:
            report = extract_adapter(
                base, model, out, rank=rank, energy=energy, error=error, max_rank=max_rank, dtype=dtype.value,
                save=kinds, factors=listed(factors or []), server=word, out_kind=out_kind.value, vocab=vocab.value,
                threads=threads, overwrite=overwrite, force=force, progress=progress, say=display.say_note,
            )  # fmt: skip
        display_extract.show_report(report, as_json=as_json)


def _percent(value: float) -> str:
    return f"; write {value / 100:g} for {value:g} %" if 1 < value <= 100 else ""
