# SPDX-License-Identifier: Apache-2.0
"""`dk.report`: a folder of results -> its page, and its plots for papers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from darekit.errors import OutputError
from darekit.reports.kinds import kind_of
from darekit.reports.markup import html_of, require_plotly
from darekit.wording import brief

PAGE = "report.html"


@dataclass(frozen=True)
class ReportFiles:
    """What `report` wrote.

    Attributes:
        page: the HTML file.
        figures: plots as PNG and SVG; empty where none were asked for, or there was nothing to draw.
        unfinished: what is not finished, in words; empty where all is.
    """

    page: Path
    figures: tuple[Path, ...]
    unfinished: str

    def __repr__(self) -> str:
        return brief(self, str(self.page))


def report(folder: str | Path, out: str | Path | None = None, *, figures: str | Path | None = None) -> ReportFiles:
    """Write one self-contained HTML file of a sweep, a search, an evaluation or an inspection.

    Args:
        folder: what `sweep`, `evaluate` (with `out`), `dare inspect --plot` or `dare search` wrote; finished or not.
        out: the page; `report.html` in the folder if not given. A file that is there is replaced.
        figures: a folder for the plots as PNG and SVG, for papers (needs matplotlib).

    Returns:
        Where it all is.

    Raises:
        OutputError: the folder holds no results, or `out` cannot be written.
        Unsupported: plotly is not installed, or matplotlib where figures are asked for.

    Examples:
        >>> _ = dk.evaluate(["base", "math"], data="sums.jsonl", device="cpu", out="results")
        >>> written = dk.report("results")
        >>> written
        <ReportFiles: results/report.html>
    """
    place = Path(folder)
    kind = kind_of(place)
    require_plotly()
    if figures is not None:
        from darekit.plotting import require_matplotlib

        require_matplotlib()
    target = place / PAGE if out is None else Path(out)
    if target.is_dir():
        raise OutputError(f"{target} is a folder; name a file, such as {target / PAGE}")
    page = kind.page_of(place)
    _write(target, html_of(page))
    drawn = kind.draw_into(place, Path(figures)) if figures is not None else []
    return ReportFiles(target, tuple(drawn), page.state)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.darekit-part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(text.encode())
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; name another file with --out") from None
