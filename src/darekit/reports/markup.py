# SPDX-License-Identifier: Apache-2.0
"""A page -> HTML: one file with style, script, plotly and numbers inside, which may load nothing and run nothing else.

All text is escaped here. The policy in the head names the two scripts by their digests, so that even a tag that got
through could not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

from darekit.errors import Unsupported
from darekit.reports.charts import LOOKS
from darekit.reports.page import FOLDED_ABOVE, AtPointer, Copy, Key, Page, Plot, Section, Table
from darekit.version import __version__

T = TypeVar("T")

_UNITS = re.compile(r" (?=± ?\d|%)|(?<=±) (?=\d)")

_BREAKS = re.compile(r"(?<=\w)([/_])(?=\w)")  # after which the name of a score may go on in the next line
_BREAK = r"\1<wbr>"

_DASHES = {"solid": "", "dash": "7 4", "dashdot": "7 3 2 3", "dot": "2 3", "longdash": "11 4",
           "longdashdot": "11 3 2 3", "8px,2px,2px,2px,2px,2px": "8 2 2 2 2 2"}  # fmt: skip

_MARKS = {
    "circle": '<circle cx="17" cy="7" r="4"/>',
    "square": '<path d="M13 3h8v8h-8z"/>',
    "triangle-up": '<path d="M17 2l5 9h-10z"/>',
    "diamond": '<path d="M17 1l5 6-5 6-5-6z"/>',
    "triangle-down": '<path d="M17 12l5-9h-10z"/>',
    "cross": '<path d="M15.4 2h3.2v3.4H22v3.2h-3.4V12h-3.2V8.6H12V5.4h3.4z"/>',
    "x": '<path d="M13 3l8 8M21 3l-8 8" stroke-width="3"/>',
}


def require_plotly() -> None:
    """Pages are an extra.

    Raises:
        Unsupported: plotly is not installed.
    """
    if find_spec("plotly") is None:
        raise Unsupported("pages need plotly: pip install 'darekit[report]'")


def html_of(page: Page) -> str:
    """The whole file as text. Lines end in \\n alone: the scripts' digests hold for these bytes."""
    require_plotly()
    copies, tips = _Numbers[Copy](), _Numbers[str]()
    figures: list[Any] = []
    body = "".join(_body(page, figures, copies))
    data = {
        "figures": [_numbered(figure, copies, tips) for figure in figures],
        "copies": [[copy.title, copy.text, copy.what] for copy in copies.found],
        "tips": list(tips.found),
    }
    scripts = (_plotly(), _asset("page.js"))
    allowed = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta name="generator" content="darekit {escape(__version__)}">\n'
        f"<title>{escape(page.title)} · {escape(page.kind)} · darekit</title>\n"
        f"<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n{body}"
        f'<script type="application/json" id="data">{_json(data)}</script>\n'
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body>\n</html>\n"
    )


@cache
def _asset(name: str) -> str:
    return files("darekit.reports").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("\r\n", "\n")


def _json(data: Any) -> str:
    """JSON that cannot end the element which holds it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class _Numbers(Generic[T]):
    """Things by number, each once: many points share a recipe, or what is said of it."""

    def __init__(self) -> None:
        self.found: dict[T, int] = {}

    def __call__(self, one: T) -> int:
        return self.found.setdefault(one, len(self.found))


def _numbered(data: Any, copies: _Numbers[Copy], tips: _Numbers[str]) -> Any:
    """A figure in which each point has two numbers: of what a click copies, and of what is said of it."""
    if isinstance(data, AtPointer):
        return [None if data.copy is None else copies(data.copy), tips(data.says)]
    if isinstance(data, dict):
        return {key: _numbered(value, copies, tips) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_numbered(value, copies, tips) for value in data]
    return data


def _text(words: str) -> str:
    """Words as they are; a number and its error or unit stay on one line."""
    return _UNITS.sub("\N{NO-BREAK SPACE}", escape(words))


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "part"


def _body(page: Page, figures: list[Any], number: _Numbers[Copy]) -> Iterator[str]:
    titles = ["What was asked", *(section.title for section in page.sections), *(["Notes"] if page.notes else [])]
    links = "".join(f'<li><a href="#{_slug(title)}">{escape(title)}</a></li>' for title in titles)
    yield '<a class="skip" href="#main">Skip to the content</a>\n'
    yield (
        '<header class="bar"><a class="brand" href="#main">darekit<span> report</span></a>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>'
        '<button type="button" id="theme" class="quiet" hidden><span aria-hidden="true">◐</span> '
        '<span id="theme-word">Dark</span></button></header>\n<main id="main" tabindex="-1">\n'
    )
    yield from _head(page)
    yield f'<section aria-labelledby="{_slug(titles[0])}"><h2 id="{_slug(titles[0])}">{titles[0]}</h2>\n'
    yield '<dl class="facts">'
    yield from (f"<div><dt>{escape(term)}</dt><dd>{_text(text)}</dd></div>" for term, text in page.facts)
    yield "</dl>\n"
    if page.source is not None:
        name, text = page.source
        yield f"<details><summary>{escape(name)}</summary><pre tabindex='0'>{escape(text)}</pre></details>\n"
    yield "</section>\n"
    for section in page.sections:
        yield from _section(section, figures, number)
    if page.notes:
        yield '<section aria-labelledby="notes"><h2 id="notes">Notes</h2>\n<ul class="notes">'
        yield from (f"<li>{_text(note)}</li>" for note in page.notes)
        yield "</ul></section>\n"
    yield (
        f"</main>\n<footer><p>Written by <code>dare report</code>, darekit {escape(__version__)}. Everything is in "
        "this file: it loads nothing. Drag in a plot to zoom, double-click to zoom out.</p></footer>"
        '\n<div id="tip" aria-hidden="true" hidden></div>'
        '\n<div id="told" role="status" aria-live="polite"></div>\n'
    )


def _head(page: Page) -> Iterator[str]:
    yield f'<p class="kind">{escape(page.kind)}</p>\n<h1>{escape(page.title)}</h1>\n'
    if page.state:
        yield f'<p class="state"><strong>Not finished:</strong> {_text(page.state)}</p>\n'
    yield f'<section class="verdict {escape(page.tone)}" aria-label="Verdict">'
    yield f'<p class="answer">{_text(page.verdict)}</p>'
    yield from (f"<p>{_text(line)}</p>" for line in page.details)
    yield "</section>\n"
    if page.numbers:
        yield '<dl class="numbers">'
        for one in page.numbers:
            note = f'<dd class="note">{_text(one.note)}</dd>' if one.note else ""
            yield f"<div><dt>{_BREAKS.sub(_BREAK, escape(one.label))}</dt><dd>{_text(one.value)}</dd>{note}</div>"
        yield "</dl>\n"
    yield '<noscript><p class="state">The plots need JavaScript; all numbers are in the tables.</p></noscript>\n'


def _section(section: Section, figures: list[Any], number: _Numbers[Copy]) -> Iterator[str]:
    name = _slug(section.title)
    yield f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(section.title)}</h2>\n'
    if section.lead:
        yield f"<p>{_text(section.lead)}</p>\n"
    for part in section.parts:
        if isinstance(part, Table):
            yield from _table(part, number)
        else:
            yield from _plot(part, figures, number)
    yield "</section>\n"


def _plot(plot: Plot, figures: list[Any], number: _Numbers[Copy]) -> Iterator[str]:
    first = len(figures)
    yield f'<figure class="plot"><div class="title"><h3 id="p{first}">{escape(plot.title)}</h3>'
    if len(plot.views) > 1:
        options = "".join(f'<option value="{i}">{escape(view.label)}</option>' for i, view in enumerate(plot.views))
        yield f"<label>{escape(plot.choice)} <select data-views>{options}</select></label>"
    yield "</div>\n"
    for at, view in enumerate(plot.views):
        yield '<div class="view" hidden>' if at else '<div class="view">'
        if view.keys:
            yield f'<div class="keys" role="group" aria-label="Legend">{"".join(map(_key, view.keys))}</div>'
        many = "panels many" if len(view.panels) > 1 else "panels"
        yield f'<div class="{many}">'
        for title, figure in view.panels:
            head = f'<p class="panel">{escape(title)}</p>' if title else ""
            label = escape(", ".join(filter(None, (plot.title, view.label, title))))
            height = int(figure["layout"]["height"])
            wide = figure["layout"].get("meta", {}).get("wide")
            size = f"min-height:{height}px" + (f";min-width:{int(wide)}px" if wide else "")
            yield (
                f'<div>{head}<div class="chart" role="group" aria-label="{label}. {escape(plot.how)}" '
                f'data-figure="{len(figures)}" style="{size}"></div></div>'
            )
            figures.append(figure)
        yield "</div></div>\n"
    pointer = f' <span class="pointer">{_text(plot.pointer)}</span>' if plot.pointer else ""
    yield f"<figcaption>{_text(plot.how)}{pointer}</figcaption>\n"
    if plot.table is not None:
        yield from _table(plot.table, number)
    yield "</figure>\n"


def _key(key: Key) -> str:
    colour, dash, mark = LOOKS[key.look % len(LOOKS)]
    name = escape(key.name)
    line = (
        f'<path d="M0 7h34" fill="none" stroke-width="2" stroke-dasharray="{_DASHES["solid" if key.solid else dash]}"/>'
    )
    return (
        f'<button type="button" class="key" aria-pressed="true" data-name="{name}">'
        f'<svg width="34" height="14" aria-hidden="true" style="color:var(--{colour})" fill="currentColor" '
        f'stroke="currentColor">{line if key.joined else ""}{_MARKS[mark] if key.marks else ""}</svg>{name}</button>'
    )


def _table(table: Table, number: _Numbers[Copy]) -> Iterator[str]:
    folded = len(table.rows) > FOLDED_ABOVE if table.folded is None else table.folded
    count = f"{len(table.rows)} row{'' if len(table.rows) == 1 else 's'}"
    if folded:
        yield f"<details><summary>{escape(table.title)} <span>({count})</span></summary>"
    label = escape(table.title)
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {label}"><table>'
    hidden = ' class="unseen"' if folded else ""
    yield f"<caption{hidden}>{label}</caption><thead><tr>"
    sortable = len(table.rows) > 2
    for i, word in enumerate(table.header):
        side = "" if i < table.words else ' class="number"'
        text = _BREAKS.sub(_BREAK, escape(word))
        text = f'<button type="button" data-sort="{i}">{text}</button>' if sortable and word else text
        yield f'<th scope="col"{side}>{text}</th>'
    buttons = any(table.copies)
    yield '<th scope="col" class="act"><span class="unseen">Copy</span></th>' if buttons else ""
    yield "</tr></thead><tbody>"
    for at, row in enumerate(table.rows):
        yield '<tr class="strong">' if at in table.strong else "<tr>"
        yield from _cells(row, table)
        if buttons:
            copy = table.copies[at] if at < len(table.copies) else None
            yield (
                '<td class="act"></td>'
                if copy is None
                else (
                    f'<td class="act"><button type="button" class="copy" data-copy="{number(copy)}" '
                    f'aria-label="Copy the {escape(copy.what)} of {escape(copy.title)}">copy</button></td>'
                )
            )
        yield "</tr>"
    yield "</tbody></table></div>\n"
    if folded:
        yield "</details>\n"


def _cells(row: Sequence[str], table: Table) -> Iterator[str]:
    for i, text in enumerate(row):
        if i == 0:
            yield f'<th scope="row">{_text(text)}</th>'
        else:
            yield f"<td>{_text(text)}</td>" if i < table.words else f'<td class="number">{_text(text)}</td>'
