# SPDX-License-Identifier: Apache-2.0
"""The project's addresses, as the package's metadata has them: those of the repository that it is built from.

Which one that is, `DAREKIT_SOURCE` says (workflows set it), or git's `origin` where that is on a public forge. A build
that knows neither names the paper alone. What a source distribution says is kept by the wheels built from it.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

VARIABLE = "DAREKIT_SOURCE"
FORGES = ("github.com", "gitlab.com")
PATH = r"(?P<path>[\w-][\w.-]*(?:/[\w-][\w.-]*)+)/?"
HTTPS = re.compile(rf"https://(?P<host>[\w-]+(?:\.[\w-]+)+)/{PATH}", re.ASCII)
SSH = re.compile(rf"(?:ssh://git@(?P<host>[\w.-]+)/|git@(?P<short>[\w.-]+):){PATH}", re.ASCII)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[\w./-]+)(?P<anchor>#[\w-]*)?\)")


class CustomMetadataHook(MetadataHookInterface):
    """`urls` and `readme` of a package's metadata."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling, not where a source distribution has said both."""
        source = source_of(Path(self.root))
        metadata["urls"] = {**(urls(source) if source else {}), **self.config["urls"]}
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if source:
            text = linked(text, source, str(metadata["version"]))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def source_of(root: Path) -> str | None:
    """The address of the repository, such as https://github.com/someone/darekit."""
    told = os.environ.get(VARIABLE, "").strip()
    if not told:
        return on_forge(origin_of(root))
    match = HTTPS.fullmatch(told)
    if match is None:  # and what it is stays unsaid: it may hold a token
        raise ValueError(f"the variable {VARIABLE} is not a plain address: expected https://HOST/OWNER/NAME")
    return page_of(match["host"], match["path"])


def origin_of(root: Path) -> str:
    """What the clone at `root` calls origin, as its owner wrote it; "" without one."""
    if not (root / ".git").exists():  # sources inside of another repository are not of that repository
        return ""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(root), "config", "--local", "--get", "remote.origin.url"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def on_forge(origin: str) -> str | None:
    """The page of an origin, if anyone can see it: no path, no other host, nobody's name or token."""
    match = HTTPS.fullmatch(origin) or SSH.fullmatch(origin)
    if match is None:
        return None
    host = match["host"] or match["short"]
    return page_of(host, match["path"]) if host in FORGES else None


def page_of(host: str, path: str) -> str:
    """A repository's page, whose address is that of its clones without the suffix."""
    return f"https://{host}/{path.removesuffix('.git')}"


def urls(source: str) -> dict[str, str]:
    """Label -> address, of a repository's pages."""
    return {
        "Source": source,
        "Documentation": file_of(source, "docs/index.md"),
        "Issues": f"{source}{_mark(source)}/issues",
        "Changelog": file_of(source, "CHANGELOG.md"),
    }


def linked(text: str, source: str, version: str) -> str:
    """README with links that lead somewhere from elsewhere: to the files of this release, or to the newest ones."""
    at = f"v{version}" if re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version) else "HEAD"

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match["image"] else "blob"
        address = file_of(source, match["target"], at, kind)
        return f"{match['image']}[{match['text']}]({address}{match['anchor'] or ''})"

    return LINK.sub(absolute, text)


def file_of(source: str, path: str, at: str = "HEAD", kind: str = "blob") -> str:
    """The page of a file in the repository, or (`raw`) the file itself."""
    return f"{source}{_mark(source)}/{kind}/{at}/{path}"


def _mark(source: str) -> str:
    """GitLab keeps its own pages apart from those of groups and projects."""
    return "/-" if source.startswith("https://gitlab.") else ""
