# SPDX-License-Identifier: Apache-2.0
"""`dare pack`, `unpack`, `verify`, `info`, `export`, `push` and `pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from darekit.cli.options import (
    Codec,
    ExportTarget,
    Force,
    Json,
    KeepDense,
    Overwrite,
    PackRescale,
    PackVocab,
    Resume,
    Seed,
    ShardSize,
    Tau,
    Threads,
    bytes_of,
    drop_rate_of,
    errors_told,
)

PackName = Annotated[
    str, typer.Argument(help="A file written by `dare pack`, or org/name or org/name/FILE on the Hub.")
]


def pack(
    base: Annotated[str, typer.Argument(help="The checkpoint MODEL was fine-tuned from.")],
    model: Annotated[str, typer.Argument(help="The fine-tuned model: directory, file or Hub id.")],
    out: Annotated[Path, typer.Argument(help="File to write, OUT.safetensors.")],
    drop_rate: Annotated[
        str | None,
        typer.Option(
            "-p", "--drop-rate", metavar="P", help="Fraction of the delta to drop; auto: a rate for each tensor."
        ),
    ] = None,
    tau: Tau = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Drop nothing: store the exact model, compressed.")
    ] = False,
    bits: Annotated[int, typer.Option(metavar="N", help="Bits per kept element: 64, 32, 16, 8, 4, 2 or 1.")] = 16,
    dense_bits: Annotated[
        int | None,
        typer.Option(metavar="N", help="The same for tensors that are not dropped; default: --bits, but at least 4."),
    ] = None,
    group: Annotated[
        int, typer.Option(min=1, max=65536, metavar="N", help="Kept elements that share a scale (8 bits or fewer).")
    ] = 64,
    codec: Annotated[
        Codec,
        typer.Option(help="Compress values: if that saves 5 % (auto), if it saves anything (zstd), or never (none)."),
    ] = Codec.AUTO,
    rescale: Annotated[PackRescale, typer.Option(help="How survivors are rescaled.")] = PackRescale.PAPER,
    keep_dense: KeepDense = None,
    seed: Seed = None,
    vocab: Annotated[
        PackVocab, typer.Option(help="If vocabularies differ: refuse, or keep the base's rows.")
    ] = PackVocab.STRICT,
    threads: Threads = None,
    overwrite: Overwrite = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Store MODEL as a sparse delta from BASE in the file OUT. No indices are stored: the mask follows from a seed."""
    if (drop_rate is None) != lossless:
        raise typer.BadParameter("give either -p or --lossless", param_hint="-p")
    rate = drop_rate_of(drop_rate)
    if tau is not None and rate != "auto":
        raise typer.BadParameter("only works with -p auto", param_hint="--tau")
    widths = (64, 32, 16, 8, 4, 2, 1)
    for value, name in ((bits, "--bits"), (dense_bits, "--dense-bits")):
        if value is not None and value not in widths:
            raise typer.BadParameter(f"{value} is not one of {', '.join(map(str, widths))}", param_hint=name)
    with errors_told():
        from darekit.cli import display, display_packs
        from darekit.packing.writing import pack as pack_model

        with display.progress_bar("packing", quiet=as_json) as progress:
            report = pack_model(
                base, model, out, drop_rate=rate, tau=tau, lossless=lossless, bits=bits, dense_bits=dense_bits,
                group=group, codec=codec.value, rescale=rescale.value, keep_dense=keep_dense or (), seed=seed,
                vocab=vocab.value, threads=threads, overwrite=overwrite, force=force, progress=progress,
                say=display.say_note,
            )  # fmt: skip
        display_packs.show_pack(report, as_json=as_json)


def unpack(
    base: Annotated[str, typer.Argument(help="The checkpoint PACK was made from.")],
    pack: PackName,
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    threads: Threads = None,
    shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Turn PACK back into an ordinary model directory."""
    limit = bytes_of(shard_size)
    with errors_told(resumes=True):
        from darekit.cli import display
        from darekit.packing.unpacking import unpack as unpack_model

        with display.progress_bar("unpacking", quiet=as_json) as progress:
            report = unpack_model(
                base, pack, out, threads=threads, shard_size=limit, overwrite=overwrite, resume=resume,
                progress=progress, say=display.say_note,
            )  # fmt: skip
        display.show_report(report, as_json=as_json)


def verify(
    pack: PackName,
    base: Annotated[str | None, typer.Argument(help="The checkpoint PACK was made from.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Check PACK against its digests, and with BASE what it unpacks to. Exits with 1 if anything is damaged."""
    with errors_told():
        from darekit.cli import display, display_packs
        from darekit.packs.reading import open_pack

        with open_pack(pack, base=base) as found, display.progress_bar("verifying", quiet=as_json) as progress:
            verification = found.verify(threads=threads, progress=progress)
        display_packs.show_verification(verification, as_json=as_json)
    if verification.faults:
        raise typer.Exit(1)


def info(
    pack: PackName,
    as_json: Json = False,
) -> None:
    """Show what PACK holds: its model and base, size, drop rate, bits and license."""
    with errors_told():
        from darekit.cli import display_packs
        from darekit.packs.reading import open_pack

        with open_pack(pack) as found:
            display_packs.show_info(found.info(), as_json=as_json)


def export(
    pack: PackName,
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    to: Annotated[ExportTarget, typer.Option(help="What to write: weight patches for vLLM, or a model directory.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="The checkpoint PACK was made from; default: the base it names, from the Hub."
        ),
    ] = None,
    threads: Threads = None,
    shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="With --to dense: continue an interrupted run.")] = False,
    as_json: Json = False,
) -> None:
    """Convert PACK to what servers load: weight patches for vLLM, or an ordinary model directory."""
    limit = bytes_of(shard_size)
    if resume and to is not ExportTarget.DENSE:
        raise typer.BadParameter("only works with --to dense", param_hint="--resume")
    with errors_told(resumes=to is ExportTarget.DENSE):
        from darekit.cli import display, display_packs
        from darekit.packing.exporting import export as export_pack

        with display.progress_bar("exporting", quiet=as_json) as progress:
            report = export_pack(
                pack, out, to=to.value, base=base, shard_size=limit, threads=threads, overwrite=overwrite,
                resume=resume, progress=progress, say=display.say_note,
            )  # fmt: skip
        display_packs.show_export(report, as_json=as_json)


def push(
    pack: Annotated[Path, typer.Argument(help="A file written by `dare pack`.")],
    to: Annotated[str, typer.Argument(help="org/name on the Hub, or a folder (./name).")],
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="The base on the Hub: org/name or org/name@commit; default: the base that PACK names."
        ),
    ] = None,
    license: Annotated[
        str | None, typer.Option(metavar="NAME", help="License of the model, if PACK does not name one.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a new repository as private.")] = False,
    new_card: Annotated[bool, typer.Option("--new-card", help="Replace an existing model card.")] = False,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Commit message.")] = None,
    as_json: Json = False,
) -> None:
    """Upload PACK with a model card to the Hugging Face Hub, or copy it to a folder."""
    with errors_told():
        from darekit.cli import display, display_packs
        from darekit.packing.sharing import push as push_pack

        pushed = push_pack(
            pack, to, base_model=base_model, license=license, private=private, new_card=new_card, message=message,
            say=display.say_note,
        )  # fmt: skip
        display_packs.show_pushed(pushed, as_json=as_json)


def pull(
    pack: Annotated[str, typer.Argument(help="org/name or org/name/FILE on the Hub, or a folder written by `push`.")],
    out: Annotated[
        Path | None, typer.Argument(help="File to write, or the folder to put it in; default: the current folder.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Download PACK from the Hugging Face Hub or a folder, and verify it."""
    with errors_told():
        from darekit.cli import display, display_packs
        from darekit.packing.sharing import pull as pull_pack

        with display.progress_bar("checking", quiet=as_json) as progress:
            pulled = pull_pack(pack, out, overwrite=overwrite, progress=progress)
        display_packs.show_pulled(pulled, as_json=as_json)
