# SPDX-License-Identifier: Apache-2.0
"""Whose folder it is: one line for each kind of page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from darekit.errors import OutputError


@dataclass(frozen=True)
class Kind:
    """A kind of folder.

    Attributes:
        command: that writes it.
        files: one of them is always there.
        module: of this room, with its page.
        page: function there: folder -> `Page`.
        draw: function there: folder, folder for the plots -> their paths.
    """

    command: str
    files: tuple[str, ...]
    module: str
    page: str
    draw: str

    def page_of(self, folder: Path) -> Any:
        """The folder's page."""
        return self._function(self.page)(folder)

    def draw_into(self, folder: Path, into: Path) -> list[Path]:
        """Write the folder's plots as PNG and SVG."""
        found: list[Path] = self._function(self.draw)(folder, into)
        return found

    def _function(self, name: str) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(import_module(f"darekit.reports.{self.module}"), name)
        return found


KINDS = (
    Kind("dare search", ("trials.jsonl", "search.json"), "searches", "search_page", "draw_search_folder"),
    Kind("dare sweep", ("sweep.json",), "sweeps", "sweep_page", "draw_sweep_folder"),
    Kind("dare eval --out", ("asked.json", "evaluations.jsonl", "comparison.json"), "evaluations", "evaluation_page",
         "draw_evaluation_folder"),
    Kind("dare inspect --plot", ("inspection.json",), "inspections", "inspection_page", "draw_inspection_folder"),
)  # fmt: skip

_SHOWN = 8  # files that an error names


def kind_of(folder: Path) -> Kind:
    """The kind of a folder of results.

    Raises:
        OutputError: it is missing, is a file, or holds results of none.
    """
    if not folder.exists():
        raise OutputError(f"{folder} does not exist; name the folder that {_commands()} wrote")
    if not folder.is_dir():
        near = [one for one in (folder.with_suffix(""), folder.parent) if _kinds_in(one)]
        hint = f": {near[0]}, perhaps" if near else ""
        raise OutputError(f"{folder} is a file; name the folder that {_commands()} wrote{hint}")
    found = _kinds_in(folder)
    if len(found) == 1:
        return found[0]
    if found:
        both = " and ".join(f"`{kind.command}`" for kind in found)
        raise OutputError(
            f"{folder} holds results of {both}: which are meant? Move one of them into a folder of its own"
        )
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    holds = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    expected = "; ".join(f"{' or '.join(kind.files)} (`{kind.command}`)" for kind in KINDS)
    old = ""
    if {"r.png", "deltas.png"} <= {*names}:
        old = ". These look like the plots of `dare inspect --plot` by an earlier version: run it again"
    raise OutputError(f"{folder} holds {holds or 'nothing'}; expected one of: {expected}{old}")


def _kinds_in(folder: Path) -> list[Kind]:
    return [kind for kind in KINDS if any((folder / name).is_file() for name in kind.files)]


def _commands() -> str:
    words = [f"`{kind.command}`" for kind in KINDS]
    return f"{', '.join(words[:-1])} or {words[-1]}"
