# SPDX-License-Identifier: Apache-2.0
"""A page as inert data: what it says, in which order. Texts are plain; nobody but `markup` knows HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MINUS = "\N{MINUS SIGN}"

FOLDED_ABOVE = 12  # rows of a table that is open from the start

Figure = Mapping[str, Any]  # `data` and `layout` of plotly; colours are names of the page's style sheet


@dataclass(frozen=True)
class Copy:
    """What a click puts on the clipboard.

    Attributes:
        title: whose it is.
        text: what is copied.
        what: its kind, in a word: recipe, name.
    """

    title: str
    text: str
    what: str = "recipe"


@dataclass(frozen=True)
class AtPointer:
    """What belongs to a point of a plot: text for whoever points at it, and what a click copies."""

    says: str
    copy: Copy | None = None


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        title: its caption.
        header: of the columns.
        rows: as wide as the header.
        words: how many of the first columns hold words; the others hold numbers.
        copies: of each row, what its button copies; empty: there are no buttons.
        strong: indices of rows that stand out.
        folded: whether a reader opens it; None: where it is long.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    copies: tuple[Copy | None, ...] = ()
    strong: tuple[int, ...] = ()
    folded: bool | None = None


@dataclass(frozen=True)
class Key:
    """One line of a legend: a name, and how what it stands for is drawn (see `charts.LOOKS`): `marks`, `joined`, and
    whether the line is `solid` whatever its look."""

    name: str
    look: int
    marks: bool = True
    joined: bool = True
    solid: bool = False


@dataclass(frozen=True)
class View:
    """One choice of what a plot shows: panels beside each other, on one scale, with one legend."""

    label: str
    panels: tuple[tuple[str, Figure], ...]
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Plot:
    """A plot and how to read it.

    Attributes:
        title: what it shows.
        how: how to read it, in a sentence or two.
        views: what may be chosen; the first is shown.
        table: the same as numbers.
        choice: what is chosen among the views, in a word.
        pointer: what pointing and clicking do; not said on paper.
    """

    title: str
    how: str
    views: tuple[View, ...]
    table: Table | None = None
    choice: str = "Show"
    pointer: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    title: str
    parts: tuple[Plot | Table, ...]
    lead: str = ""


@dataclass(frozen=True)
class Number:
    """One number that a reader must not miss."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """Everything that a page says.

    Attributes:
        kind: of the folder: Sweep, Search, Evaluation, Inspection.
        title: its name.
        verdict: the answer, in a sentence.
        tone: good, plain or bad: how the verdict is to be taken.
        details: sentences that belong to the verdict.
        state: what is not finished; empty where all is.
        numbers: those of the verdict.
        facts: (term, text): what was asked.
        source: (name, text) of the file that was run.
        sections: plots and tables.
        notes: what must be said besides: failures, warnings.
    """

    kind: str
    title: str
    verdict: str
    tone: str = "plain"
    details: tuple[str, ...] = ()
    state: str = ""
    numbers: tuple[Number, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    source: tuple[str, str] | None = None
    sections: tuple[Section, ...] = ()
    notes: tuple[str, ...] = ()
