# SPDX-License-Identifier: Apache-2.0
"""`dare stats fisher` and `dare stats gram`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from darekit.cli.options import Device, Json, Overwrite, PlainCommand, PlainGroup, Resume, bytes_of, errors_told

stats = typer.Typer(
    help="Compute what fisher and regmean need to know about a model, from data (needs torch).",
    cls=PlainGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="The model: directory, file or Hub id.")]
Data = Annotated[
    str,
    typer.Option(
        metavar="FILE", help="A JSON Lines file (text; prompt and completion; or text and label), or a dataset."
    ),
]
Out = Annotated[Path, typer.Option(metavar="FILE", help="The .safetensors file to write.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Read only the first N rows.")]
Split = Annotated[str, typer.Option(metavar="NAME", help="Split of the dataset.")]
MaxLength = Annotated[
    int | None, typer.Option(min=2, metavar="N", help="Tokens per example; default: the model's limit, at most 2048.")
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Examples per batch.")]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for the sums, beside the model: 4GB. With less, more passes over the data give the same file; "
        "default: half of the free memory.",
    ),
]
Compute = Annotated[
    str | None, typer.Option(metavar="DTYPE", help="Dtype to compute in: float32 or bfloat16; sums are float32.")
]


class Labels(StrEnum):
    """Words for --kind."""

    EMPIRICAL = "empirical"
    SAMPLED = "sampled"
    EXACT = "exact"


@stats.command(cls=PlainCommand)
def fisher(
    model: Model,
    data: Data,
    out: Out,
    kind: Annotated[
        Labels,
        typer.Option(
            help="Whose labels: the data's, drawn from the model's own predictions, or the expectation over all labels "
            "of a classifier or regressor."
        ),
    ] = Labels.EMPIRICAL,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed for what is drawn.")] = 0,
    limit: Limit = None,
    split: Split = "train",
    max_length: MaxLength = None,
    device: Device = None,
    dtype: Compute = None,
    memory: Memory = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Write MODEL's diagonal Fisher: the mean over examples of the squared gradient of the log-likelihood."""
    _make(
        "fisher", model, data, out, as_json, labels=kind.value, seed=seed, limit=limit, split=split,
        max_length=max_length, device=device, dtype=dtype, memory=memory, overwrite=overwrite, resume=resume,
    )  # fmt: skip


@stats.command(cls=PlainCommand)
def gram(
    model: Model,
    data: Data,
    out: Out,
    batch_size: BatchSize = 8,
    limit: Limit = None,
    split: Split = "train",
    max_length: MaxLength = None,
    device: Device = None,
    dtype: Compute = None,
    memory: Memory = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Write the Gram matrix of the inputs of each of MODEL's linear layers: the sum over tokens of x x^T."""
    _make(
        "gram", model, data, out, as_json, batch_size=batch_size, limit=limit, split=split, max_length=max_length,
        device=device, dtype=dtype, memory=memory, overwrite=overwrite, resume=resume,
    )  # fmt: skip


def _make(kind: str, model: str, data: str, out: Path, as_json: bool, *, memory: str | None, **options: Any) -> None:
    limit = None if memory is None else bytes_of(memory, "--memory")
    with errors_told(resumes=True):
        from darekit.cli import display
        from darekit.statistics.running import make_statistics

        with display.progress_bar(kind, quiet=as_json, unit="examples") as progress:
            report = make_statistics(
                kind, model, data, out, memory=limit, progress=progress, say=display.say_note, **options
            )
        display.show_statistics(report, as_json=as_json)
