# SPDX-License-Identifier: Apache-2.0
"""The `dare` command. Imports stay inside the commands: `dare --help` and usage errors must be instant.

Each module here holds the commands of one kind, as functions whose signatures are their command lines. A run imports
the module of its own command alone: typer evaluates the annotations of every command that it knows.
"""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated

import typer

from darekit.cli.mergekit_options import read_options
from darekit.cli.options import PlainCommand, PlainGroup

# Panel of `dare --help` -> its commands, each with its module and function here; in the order in which users meet them.
PANELS = {
    "Merge and drop": {
        "merge": ("merging", "merge"),
        "drop": ("merging", "drop"),
        "extract": ("extract", "extract"),
    },
    "Before you merge": {
        "check": ("check", "check"),
        "inspect": ("analysis", "inspect"),
        "recommend": ("recommend", "recommend"),
        "similarity": ("analysis", "similarity"),
        "methods": ("merging", "methods"),
        "schema": ("schema", "schema"),
    },
    "Packs": {
        "pack": ("packs", "pack"),
        "unpack": ("packs", "unpack"),
        "verify": ("packs", "verify"),
        "info": ("packs", "info"),
        "export": ("packs", "export"),
        "push": ("packs", "push"),
        "pull": ("packs", "pull"),
    },
    "Statistics and evaluation": {
        "stats": ("statistics", "stats"),
        "eval": ("evaluation", "evaluate"),
        "sweep": ("analysis", "sweep"),
        "search": ("searching", "search"),
        "report": ("reports", "report"),
    },
    "See it work": {
        "demo": ("merging", "demo"),
    },
}
COMMANDS = {name: (panel, *place) for panel, commands in PANELS.items() for name, place in commands.items()}


class InOrder(PlainGroup):
    """Lists its commands as PANELS does; typer alone would list `stats`, which has commands of its own, last."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Names of the commands that this run knows."""
        return [name for name in COMMANDS if name in self.commands]


def build_app(*only: str) -> typer.Typer:
    """The command with all that it knows, or with the commands named in `only`."""
    app = typer.Typer(
        help="Absorb the abilities of fine-tuned models into one: DARE and model merging, streamed from disk to disk.",
        cls=InOrder,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(root)
    for name in only or COMMANDS:
        panel, module, member = COMMANDS[name]
        found = getattr(import_module(f"darekit.cli.{module}"), member)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel, cls=PlainCommand)(found)
    return app


def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Absorb the abilities of fine-tuned models into one: DARE and model merging, streamed from disk to disk."""
    if version:
        from darekit import __version__

        print(__version__)
        raise typer.Exit


def spelled_out(words: list[str]) -> list[str]:
    """A command line on which `--ray` has its address: typer knows no options that may have a value or none.

    >>> spelled_out(["search", "--ray", "s.yaml"]), spelled_out(["sweep", "s.yaml", "--ray", "head:6379"])
    (['search', '--ray', 'auto', 's.yaml'], ['sweep', 's.yaml', '--ray', 'head:6379'])
    """
    found: list[str] = []
    for at, word in enumerate(words):
        found.append(word)
        if word == "--ray" and not _is_address(words[at + 1 : at + 2]):
            found.append("auto")
    return found


def _is_address(words: list[str]) -> bool:
    return bool(words) and (words[0] in ("auto", "local") or words[0].rpartition(":")[2].isdecimal())


def main() -> None:
    """Entry point of the `dare` command."""
    # Imports make many objects and no garbage: looking for it at the default of 700 took about 7 % of a small merge.
    gc.set_threshold(200_000, 20, 20)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model's name may hold what the terminal cannot show
    first = next(iter(sys.argv[1:]), "")
    if first.endswith((".yaml", ".yml")):
        told = f"`dare check {first}` checks a recipe, `dare merge {first} OUT` merges it"
        print(f"dare: {first!r} is not a command: {told}", file=sys.stderr)
        raise SystemExit(2)
    given = read_options(sys.argv[1:])
    if given.refused is not None:
        print(f"dare: {given.refused}", file=sys.stderr)
        raise SystemExit(2)
    if given.cache is not None:
        os.environ["HF_HUB_CACHE"] = given.cache
    for note in given.notes:
        print(f"note: {note}", file=sys.stderr)
    # Help, a misspelt word and no word need all commands.
    try:
        build_app(*(word for word in sys.argv[1:2] if word in COMMANDS))(spelled_out(given.words))
    finally:
        gc.freeze()  # the interpreter's last collections need not look at what dies with the process
