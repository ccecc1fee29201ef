# SPDX-License-Identifier: Apache-2.0
"""`dare report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from darekit.cli.options import Json, errors_told


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a sweep, a search, an eval (--out) or an inspect (--plot).")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page to write; default: report.html in DIR.")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write the plots to this folder too, as PNG and SVG, for papers."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML page of results, with plots to zoom and recipes to copy; it needs no network."""
    with errors_told():
        from darekit.cli import display
        from darekit.reports.writing import report as write_report
        from darekit.wording import size_of

        written = write_report(folder, out, figures=figures)
        if as_json:
            print(json.dumps({
                "page": str(written.page), "figures": [str(path) for path in written.figures],
                "unfinished": written.unfinished,
            }))  # fmt: skip
        else:
            if written.unfinished:
                display.say_note(f"not finished: {written.unfinished}")
            print(f"Wrote {written.page}: {size_of(written.page.stat().st_size)}")
            if figures is not None:
                names = ", ".join(path.name for path in written.figures)
                print(f"Wrote {figures}: {names}" if names else f"There was nothing to draw in {folder}")
        if open_it:
            _show(written.page)


def _show(page: Path) -> None:
    import webbrowser

    from darekit.cli import display

    if not webbrowser.open(page.resolve().as_uri()):
        display.say_note(f"no browser could be opened here; open {page} yourself")
