# SPDX-License-Identifier: Apache-2.0
"""The `dare` command. Imports stay inside the commands: `dare --help` and usage errors must be instant.

Each module here holds the commands of one kind, as functions whose signatures are their command lines.
"""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from darekit.cli import analysis, evaluation, merging, packs, recommend, statistics

app = typer.Typer(
    help="Absorb the abilities of fine-tuned models into one: DARE and model merging, streamed from disk to disk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _command in (
    merging.merge,
    merging.drop,
    analysis.inspect,
    analysis.similarity,
    recommend.recommend,
    analysis.sweep,
    packs.pack,
    packs.unpack,
    packs.verify,
    packs.info,
    packs.export,
    packs.push,
    packs.pull,
    merging.methods,
    merging.demo,
):
    app.command()(_command)
app.add_typer(statistics.stats, name="stats")
app.command("eval")(evaluation.evaluate)  # `eval` is Python's own


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


def main() -> None:
    """Entry point of the `dare` command."""
    # Imports make many objects and no garbage: at the default 700, looking for it takes a tenth of a small merge.
    gc.set_threshold(50_000, 20, 20)
    app()
