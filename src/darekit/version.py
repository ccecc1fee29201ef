# SPDX-License-Identifier: Apache-2.0
"""The version of darekit: the tag's in what was built, the fallback in a source tree.

A build takes the version from the git tag (hatch-vcs) and writes it to `_version.py`, which git ignores. Reading a
file keeps `import darekit` light: importlib.metadata takes 20 ms, a third of the import of a command.
"""

from __future__ import annotations

# pyproject.toml repeats it for builds without a tag, and a test compares the two.
FALLBACK = "0.1.0.dev0"

try:
    from darekit._version import __version__ as __version__
except ModuleNotFoundError:
    __version__ = FALLBACK
