# SPDX-License-Identifier: Apache-2.0
"""The options of `mergekit-yaml` and `mergekit-multi` on the command line of `dare merge` and `dare check`.

Those with a counterpart become it; those that change no result here are left out, each with a note. Nothing here needs
an import: every command line passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COMMANDS = ("merge", "check")

# Option -> the same here.
SAME = {"--random-seed": "--seed", "--num-threads": "--threads", "-j": "--threads", "--out-shard-size": "--shard-size"}

_PROCESSOR = "merging runs on the CPU"
_STREAMED = "tensors are streamed, tile by tile"
_SHAPES = "the tensors' names and shapes decide what can be merged"

# Switch -> why it changes nothing; the same for --no-...
SWITCHES = {
    "--allow-crimes": _SHAPES,
    "--trust-remote-code": "no model's code is run",
    "--cuda": _PROCESSOR,
    "--read-to-gpu": _PROCESSOR,
    "--multi-gpu": _PROCESSOR,
    "--gpu-rich": _PROCESSOR,
    "--low-cpu-memory": _STREAMED,
    "--lazy-unpickle": _STREAMED,
    "--async-write": _STREAMED,
    "--clone-tensors": _STREAMED,
    "--copy-tokenizer": "the tokenizer is always written",
    "--write-model-card": "a model card is always written",
    "--safe-serialization": "the output is always safetensors",
    "--lazy": "--resume continues a run, and leaves a complete output alone",
    "--quiet": "the progress bar and notes go to standard error",
    "-v": "notes and warnings are always printed",
}

# Option with a value -> why it changes nothing.
VALUES = {
    "--device": _PROCESSOR,
    "--lora-merge-cache": "adapters are read as they are, and no merged copy is written",
    "--lora-merge-dtype": "adapters are never rounded before the merge",
    "--write-threads": "threads write what they have computed",
    "--intermediate-dir": "intermediate models are not written; --stage NAME writes one",
    "-I": "intermediate models are not written; --stage NAME writes one",
}

CACHE, OUT_PATH, TRUNCATE = "--transformers-cache", "--out-path", "--unsafe-truncate-embeddings"

_UNITS = {"K": "KB", "M": "MB", "B": "GB"}  # of --out-shard-size, which counts bytes


@dataclass(frozen=True)
class Read:
    """A command line without mergekit's options.

    Attributes:
        words: what is left.
        notes: what became of those that were there.
        cache: the folder of downloads; None: not given.
        refused: why it cannot be run; None: it can.
    """

    words: list[str]
    notes: list[str]
    cache: str | None = None
    refused: str | None = None


def read_options(words: Sequence[str]) -> Read:
    """The words behind `dare`; those of other commands are left as they are.

    >>> read_options(["merge", "r.yml", "out", "--cuda", "--random-seed=7", "--out-shard-size", "5B"])
    ... # doctest: +NORMALIZE_WHITESPACE
    Read(words=['merge', 'r.yml', 'out', '--seed', '7', '--shard-size', '5GB'],
         notes=['--cuda is ignored: merging runs on the CPU'], cache=None, refused=None)
    """
    if not words or words[0] not in COMMANDS:
        return Read([*words], [])
    kept: list[str] = []
    notes: list[str] = []
    out: list[str] = []
    cache = refused = None
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        known = option in SAME or option in VALUES or option in (CACHE, OUT_PATH)
        if known and not equals:
            given = next(rest, None)
            if given is None:  # the command says that a value is missing
                kept.append(SAME.get(option, option))
                continue
            value = given
        if option in SAME:
            kept += [SAME[option], _size_of(value) if option == "--out-shard-size" else value]
        elif option == CACHE:
            cache = value
        elif option == OUT_PATH:
            out.append(value)
        elif option in VALUES:
            notes.append(f"{option} {value} is ignored: {VALUES[option]}")
        elif option == TRUNCATE:
            refused = (
                f"{option}: say in the recipe which rows the output has: `vocab: base` drops those that the base "
                "lacks (--set vocab=base), `tokenizer_source: union` matches rows by token"
            )
        elif option == TRUNCATE.replace("--", "--no-"):
            pass
        elif (switch := _switch_of(option)) is not None:
            notes.append(f"{option} is ignored: {SWITCHES[switch]}")
        else:
            kept.append(word)
    return Read(kept + out, list(dict.fromkeys(notes)), cache, refused)


def _switch_of(option: str) -> str | None:
    if option.strip("v") == "-" and option != "-":  # -vv
        return "-v"
    plain = f"--{option[5:]}" if option.startswith("--no-") else option
    return plain if plain in SWITCHES else None


def _size_of(text: str) -> str:
    """`5B` -> `5GB`.

    >>> _size_of("500M"), _size_of("5GB"), _size_of("1000000")
    ('500MB', '5GB', '1000000')
    """
    number, unit = text[:-1], text[-1:].upper()
    return number + _UNITS[unit] if unit in _UNITS and number.replace(".", "", 1).isdigit() else text
