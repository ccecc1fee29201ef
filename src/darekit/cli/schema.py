# SPDX-License-Identifier: Apache-2.0
"""`dare schema`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from darekit.cli.options import errors_told


class Kind(StrEnum):
    """Kinds of files that have a schema."""

    RECIPE = "recipe"
    SWEEP = "sweep"
    SEARCH = "search"


def schema(
    kind: Annotated[Kind, typer.Argument(help="The kind of file: recipe, sweep or search.")] = Kind.RECIPE,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Write it to this file instead of printing it.")
    ] = None,
) -> None:
    """Print a JSON Schema of recipes, sweep or search files, so that editors can complete and check them."""
    with errors_told():
        from darekit.cli.display import say_note
        from darekit.methods import installed

        for line in installed.load_all():  # what the reader accepts, an editor must not mark
            say_note(f"not in the schema: {line}")
        found = _schema_of(kind)
        text = json.dumps(found, indent=1)
        if out is None:
            print(text)
        else:
            _write(out, text, found["title"])
            line = f"# yaml-language-server: $schema={out.name}"
            print(f"Wrote {out}; in the same folder, begin a {kind.value} file with the line: {line}")


def _schema_of(kind: Kind) -> dict[str, Any]:
    if kind is Kind.RECIPE:
        from darekit.recipe.schema import recipe_schema

        return recipe_schema()
    if kind is Kind.SWEEP:
        from darekit.sweeps.schema import sweep_schema

        return sweep_schema()
    from darekit.searches.schema import search_schema

    return search_schema()


def _write(path: Path, text: str, title: str) -> None:
    """Write a schema; only an older one is replaced, never a recipe that was named by mistake."""
    from darekit.errors import OutputError

    try:
        if path.exists() and not _is_schema(path, title):
            raise OutputError(f"{path} exists and is not the schema of a {title}; name another file, or remove it")
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _is_schema(path: Path, title: str) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("title") == title and "$schema" in found
