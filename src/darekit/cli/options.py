# SPDX-License-Identifier: Apache-2.0
"""What several commands share: options, their choices, and how errors are reported."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from darekit.errors import DarekitError


class PlainCommand(TyperCommand):
    """A command whose help is in plain words."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Arguments and options."""
        return _in_plain_words(super().get_params(ctx))


class PlainGroup(TyperGroup):
    """A command that has commands, whose help is in plain words."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Options."""
        return _in_plain_words(super().get_params(ctx))


def _in_plain_words(parameters: list[Any]) -> list[Any]:
    """Arguments are called what the texts call them, MODEL, and a switch has no value whose type would be shown."""
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            parameter.metavar = parameter.metavar or parameter.name.upper()
        elif parameter.is_flag:
            parameter.metavar = ""
    return parameters


Threads = Annotated[
    int | None,
    typer.Option(min=1, max=256, metavar="N", help="Worker threads; default: one per processor, at most 8."),
]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Largest output file: 5GB, 500MB, 2GiB.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe: parameters.lambda=0.5."),
]
Lenient = Annotated[
    bool,
    typer.Option("--lenient", help="Only warn about unknown keys and settings without effect, which mergekit ignores."),
]
Stage = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Of several documents, the one to write; default: the one without a name, or the last."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the new output is complete.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Force = Annotated[bool, typer.Option("--force", help="Continue even if the base looks wrong or too much is dropped.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Where an input is NaN or Inf, use the base's value.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and check the models; write nothing.")]


def seed_of(number: int | None) -> int | None:
    """A seed; typer's own range would show its twenty digits in every help."""
    if number is not None and not 0 <= number < 2**64:
        raise typer.BadParameter(f"{number} is not a whole number from 0 to 2^64 - 1")
    return number


Seed = Annotated[int | None, typer.Option(callback=seed_of, metavar="N", help="Seed for the masks.")]

Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=256,
        metavar="N",
        help="Processes to run, or workers on a cluster; each holds one model. Default: 1; on a cluster, what fits.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Run on the Ray cluster at ADDRESS (or RAY_ADDRESS); without an address, start one on this machine.",
    ),
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option(min=0, metavar="N", help="With --ray: GPUs for each worker; default: 1 where the cluster has GPUs."),
]


class RescaleName(StrEnum):
    """Words for --rescale."""

    PAPER = "paper"
    L1 = "l1"
    NONE = "none"


class PackRescale(StrEnum):
    """Words for `pack --rescale`."""

    PAPER = "paper"
    NONE = "none"


class Codec(StrEnum):
    """Words for `pack --codec`."""

    AUTO = "auto"
    NONE = "none"
    ZSTD = "zstd"


class ExportTarget(StrEnum):
    """Words for `export --to`."""

    VLLM_PATCH = "vllm-patch"
    DENSE = "dense"


class Scope(StrEnum):
    """Words for --on."""

    DELTA = "delta"
    WEIGHTS = "weights"


class HeadsOf(StrEnum):
    """Words for --heads."""

    BASE = "base"
    MODEL = "model"


class BaseExtras(StrEnum):
    """Words for --base-extras."""

    KEEP = "keep"
    LEAVE_OUT = "leave_out"


class RoundingName(StrEnum):
    """Words for --rounding."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


class Vocab(StrEnum):
    """Words for --vocab."""

    STRICT = "strict"
    BASE = "base"
    PAD = "pad"


class PackVocab(StrEnum):
    """Words for `pack --vocab`."""

    STRICT = "strict"
    BASE = "base"


KeepDense = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Tensors not to drop: embeddings, norms, biases, heads, or a glob pattern."),
]
Tau = Annotated[
    float | None,
    typer.Option(min=0.001, max=1, metavar="X", help="With -p auto: how far a layer's output may move; default 0.2."),
]
VocabOption = Annotated[
    Vocab, typer.Option(help="If vocabularies differ: refuse, cut to the base's rows, or keep extra rows.")
]
HeadsOption = Annotated[HeadsOf | None, typer.Option(help="Copy the heads (classifiers, lm_head) from one of the two.")]
Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1 or mps; default: the fastest available.")
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="DTYPE", help="Dtype to compute in; default: float32 on a CPU, else the model's own."),
]


def drop_rate_of(text: str | None) -> float | str | None:
    """`0.9` or `auto`; anything else is a usage error."""
    if text is None or text == "auto":
        return text
    try:
        value = float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number in [0, 1] nor auto", param_hint="-p") from None
    check_drop_rate(value)
    return value


def check_drop_rate(drop_rate: float) -> None:
    """A drop rate outside [0, 1] is a usage error."""
    check_fraction(drop_rate, "-p")


def check_fraction(value: float, option: str) -> None:
    """A fraction outside [0, 1] is a usage error."""
    if not 0 <= value <= 1:
        hint = f"; write {value / 100:g} for {value:g} %" if 1 < value <= 100 else ""
        hint += f", or {value / 10:g} if the point is missing" if 1 < value < 10 else ""
        raise typer.BadParameter(f"{value:g} is outside [0, 1]{hint}", param_hint=option)


def listed(texts: Sequence[str]) -> list[str]:
    """Values of an option, separated by commas, repeated, or both -> words, each once.

    >>> listed(["dare, magnitude", "della", "dare"])
    ['dare', 'magnitude', 'della']
    """
    return list(dict.fromkeys(word.strip() for text in texts for word in text.split(",") if word.strip()))


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def bytes_of(text: str, option: str = "--shard-size") -> int:
    """`5GB`, `500 MB`, `2GiB` -> bytes."""
    stripped = text.replace(" ", "").upper()
    number = stripped.rstrip("KMGTIB")
    try:
        size = int(float(number) * _UNITS[stripped[len(number) :]])
    except (ValueError, KeyError, OverflowError):
        raise typer.BadParameter(f"{text!r} is not a size; write 5GB, 500MB or 2GiB", param_hint=option) from None
    if size < 1:
        raise typer.BadParameter(f"{text!r} is not a size; it must be above 0", param_hint=option)
    if size < 1000:
        raise typer.BadParameter(f"{text!r} would mean {size} bytes; write 5GB, 500MB or 2GiB", param_hint=option)
    return size


def overrides_of(settings: Sequence[str]) -> dict[str, str]:
    """`--set KEY=VALUE`, repeated -> value by key."""
    overrides = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{setting!r} is not KEY=VALUE, as in parameters.lambda=0.5", param_hint="--set")
        overrides[key.strip()] = value.strip()
    return overrides


@contextmanager
def errors_told(resumes: bool = False) -> Iterator[None]:
    """An error on purpose becomes its message and exit code 1, and so does what the system has against a file that was
    named; anything else is a bug and shows its stack."""
    try:
        yield
    except DarekitError as error:
        raise _told(error, str(error)) from None
    except KeyboardInterrupt:
        told = "; nothing was written to OUT (--resume continues)" if resumes else ""
        print(f"dare: interrupted{told}", file=sys.stderr)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise typer.Exit(1) from None
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        if error.filename is None:
            if not _has_directory():
                raise _told(error, "the working directory no longer exists: run from another one") from None
            raise
        raise _told(error, f"{error.filename}: {error.strerror or error}") from None


def _has_directory() -> bool:
    try:
        return bool(Path.cwd())
    except OSError:
        return False


def _told(error: Exception, message: str) -> typer.Exit:
    """The message is printed; what ends the command."""
    from darekit.cli import tables

    if "--json" in sys.argv:
        print(json.dumps({"error": type(error).__name__, "message": message}))
    print(tables.told(f"dare: {message}"), file=sys.stderr)
    return typer.Exit(1)
