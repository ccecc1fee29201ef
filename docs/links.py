# SPDX-License-Identifier: Apache-2.0
"""What `make site` does beyond mkdocs.

Links that leave docs/ (to source files, examples, README.md) lead nowhere on a site, so there they lead to the
repository, if the installed package says where that is (hatch_build.py), and else become the plain name of the file.
On disk, and where the repository is browsed, they work. The page of each command gets its place in the navigation,
below cli.md, which lists them.
"""

from __future__ import annotations

import posixpath
import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[(?P<text>[^\]\n]+)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


COMMAND = re.compile(r"^\| \[`dare \w+`\]\((commands/\w+\.md)\)", re.M)


def on_config(config: Any) -> Any:
    """Called by mkdocs once: add the commands' pages to the navigation."""
    pages = COMMAND.findall((ROOT / "docs" / "cli.md").read_text(encoding="utf-8"))
    _add_after(config["nav"], "cli.md", pages)
    return config


def _add_after(nav: list[Any], page: str, pages: list[str]) -> None:
    """Put pages behind another one, however deep that is.

    >>> nav = [{"Home": "index.md"}, {"Reference": [{"Command line": ["cli.md"]}]}]
    >>> _add_after(nav, "cli.md", ["commands/merge.md"])
    >>> nav[1]
    {'Reference': [{'Command line': ['cli.md', 'commands/merge.md']}]}
    """
    if page in nav:
        nav[nav.index(page) + 1 : nav.index(page) + 1] = pages
    for entry in nav:
        for inner in entry.values() if isinstance(entry, dict) else ():
            if isinstance(inner, list):
                _add_after(inner, page, pages)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return _with_links(markdown, posixpath.dirname(page.file.src_uri), _changelog_page())


def _changelog_page() -> str | None:
    """Where the repository shows CHANGELOG.md, which is how it shows any file."""
    try:
        addresses = metadata("darekit").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    named = dict(address.split(", ", 1) for address in addresses)
    return named.get("Changelog")


def _with_links(markdown: str, folder: str, changelog: str | None) -> str:
    """The page with links that lead somewhere; `folder` is its own, below docs/.

    >>> _with_links("[tiles.py](../src/darekit/engine/tiles.py#L1), [recipes](recipes.md)", "", None)
    'tiles.py (`src/darekit/engine/tiles.py`), [recipes](recipes.md)'
    >>> page = "https://example.org/someone/darekit/blob/HEAD/CHANGELOG.md"
    >>> _with_links("[tiles.py](../../src/darekit/engine/tiles.py#L1), [recipes](../recipes.md)", "api", page)
    '[tiles.py](https://example.org/someone/darekit/blob/HEAD/src/darekit/engine/tiles.py#L1), [recipes](../recipes.md)'
    >>> _with_links("[nothing](../src/nothing.py)", "", page)
    '[nothing](../src/nothing.py)'
    """

    def lead(match: re.Match[str]) -> str:
        if "://" in match["target"]:
            return match[0]
        path = posixpath.normpath(posixpath.join("docs", folder, match["target"]))
        if path.startswith("docs/") or not (ROOT / path).exists():  # what is missing is left for mkdocs to refuse
            return match[0]
        if changelog is None:
            return f"{match['text']} (`{path}`)"
        return f"[{match['text']}]({changelog.removesuffix('CHANGELOG.md')}{path}{match['anchor'] or ''})"

    return LINK.sub(lead, markdown)
