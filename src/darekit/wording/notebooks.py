# SPDX-License-Identifier: Apache-2.0
"""How objects show themselves in a notebook: small HTML without scripts, in the notebook's own colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

ROWS = 30  # of a table; a notebook is not the place for more

_CELL = "padding:.15em 1em .15em 0;text-align:{};vertical-align:top;background:none"


def shown_as_html(
    title: str,
    facts: Iterable[tuple[str, str]] = (),
    *,
    header: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
    words: int = 1,
    notes: Sequence[str] = (),
    source: tuple[str, str] | None = None,
) -> str:
    """What an object's `_repr_html_` returns; all text is escaped.

    Args:
        title: what it is, in a line.
        facts: terms and what they say.
        header: of a table.
        rows: of that table; the first `ROWS` are shown, and how many there are.
        words: how many of its first columns hold words; the others hold numbers.
        notes: what must be said besides.
        source: a name and a text behind it, folded away.

    Examples:
        >>> print(shown_as_html("<merge>", [("base", "llama")]))
        <div style="max-width:60em"><strong>&lt;merge&gt;</strong><table style="margin:.4em 0"><tr>...</table></div>
    """
    parts = [f'<div style="max-width:60em"><strong>{escape(title)}</strong>']
    lines = [f"<tr>{_head(term, row=True)}{_cell(text)}</tr>" for term, text in facts]
    parts += [f'<table style="margin:.4em 0">{"".join(lines)}</table>'] if lines else []
    if rows:
        head = "".join(_head(word, number=i >= words) for i, word in enumerate(header))
        body = "".join(
            "<tr>" + "".join(_cell(text, number=i >= words) for i, text in enumerate(row)) + "</tr>"
            for row in rows[:ROWS]
        )
        parts.append(f'<table style="margin:.4em 0"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>')
        parts += [f"<p>{len(rows) - ROWS} more rows</p>"] if len(rows) > ROWS else []
    if notes:
        parts.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>")
    if source is not None:
        name, text = source
        parts.append(f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>")
    return "".join(parts) + "</div>"


def _head(text: str, *, number: bool = False, row: bool = False) -> str:
    scope = "row" if row else "col"
    side = "right" if number else "left"
    return f'<th scope="{scope}" style="{_CELL.format(side)}">{escape(text)}</th>'


def _cell(text: str, *, number: bool = False) -> str:
    style = _CELL.format("right") + ";white-space:nowrap" if number else _CELL.format("left")
    return f'<td style="{style}">{escape(text)}</td>'
