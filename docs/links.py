# SPDX-License-Identifier: Apache-2.0
"""What `make site` does beyond mkdocs: links that leave docs/ (to source files, examples, README.md) lead nowhere on a
site, so there they become the plain name of the file. On disk, and where the repository is browsed, they work."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[(?P<text>[^\]\n]+)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page.

    >>> class Page:
    ...     class file:
    ...         src_uri = "architecture.md"
    >>> on_page_markdown("[tiles.py](../src/darekit/engine/tiles.py), [recipes](recipes.md)", page=Page)
    'tiles.py (`src/darekit/engine/tiles.py`), [recipes](recipes.md)'
    >>> on_page_markdown("[nothing](../src/nothing.py)", page=Page)
    '[nothing](../src/nothing.py)'
    """
    folder = posixpath.dirname(page.file.src_uri)

    def plain(match: re.Match[str]) -> str:
        if "://" in match["target"]:
            return match[0]
        path = posixpath.normpath(posixpath.join("docs", folder, match["target"]))
        if path.startswith("docs/") or not (ROOT / path).exists():  # what is missing is left for mkdocs to refuse
            return match[0]
        return f"{match['text']} (`{path}`)"

    return LINK.sub(plain, markdown)
