# SPDX-License-Identifier: Apache-2.0
"""The `dare` command. Imports stay inside the commands: `dare --help` and usage errors must be instant.

Each module here holds the commands of one kind, as functions whose signatures are their command lines. A run imports
the module of its own command alone: typer evaluates the annotations of every command that it knows.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from typing import Annotated

import typer

# Command -> its module and function here, in the order of `dare --help`.
COMMANDS = {
    "merge": ("merging", "merge"),
    "drop": ("merging", "drop"),
    "inspect": ("analysis", "inspect"),
    "similarity": ("analysis", "similarity"),
    "recommend": ("recommend", "recommend"),
    "sweep": ("analysis", "sweep"),
    "pack": ("packs", "pack"),
    "unpack": ("packs", "unpack"),
    "verify": ("packs", "verify"),
    "info": ("packs", "info"),
    "export": ("packs", "export"),
    "push": ("packs", "push"),
    "pull": ("packs", "pull"),
    "methods": ("merging", "methods"),
    "demo": ("merging", "demo"),
    "eval": ("evaluation", "evaluate"),
}
GROUPS = {"stats": ("statistics", "stats")}


def build_app(*only: str) -> typer.Typer:
    """The command with all that it knows, or with the commands and groups named in `only`."""
    app = typer.Typer(
        help="Absorb the abilities of fine-tuned models into one: DARE and model merging, streamed from disk to disk.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(root)
    for name in only or (*COMMANDS, *GROUPS):
        module, member = (COMMANDS | GROUPS)[name]
        found = getattr(import_module(f"darekit.cli.{module}"), member)
        if name in GROUPS:
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)
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


def main() -> None:
    """Entry point of the `dare` command."""
    # Imports make many objects and no garbage: looking for it at the default of 700 took about 7 % of a small merge.
    gc.set_threshold(50_000, 20, 20)
    # Help, a misspelt word and no word need all commands.
    build_app(*(word for word in sys.argv[1:2] if word in COMMANDS or word in GROUPS))()
