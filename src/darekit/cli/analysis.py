# SPDX-License-Identifier: Apache-2.0
"""`dare inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from darekit.cli.options import Json, Threads, errors_told


def inspect(
    base: Annotated[str, typer.Argument(help="The checkpoint that MODEL was fine-tuned from.")],
    model: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show how far MODEL is from BASE, tensor by tensor, and how much of it can be dropped."""
    with errors_told():
        from darekit.cli import display
        from darekit.inspection import inspect as inspect_models

        with display.progress_bar("inspecting", quiet=as_json) as progress:
            found = inspect_models(base, model, threads=threads, progress=progress)
        display.show_inspection(found, as_json=as_json)
