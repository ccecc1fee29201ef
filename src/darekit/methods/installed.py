# SPDX-License-Identifier: Apache-2.0
"""Methods of installed packages: found by the entry points of one group, and loaded only when they are asked for.

An entry point's name is the method's name in recipes, its value the module that registers it (or `module:function`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from darekit.errors import MethodError
from darekit.methods import MERGE_METHODS, SPARSIFIERS
from darekit.methods.foreign import Foreign

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "darekit.methods"


def load(name: str) -> list[str]:
    """Load what installed packages say of an unknown name: those that bring it; if none does, all of them.

    Returns:
        What could not be loaded, a line each, where that leaves the name unknown.

    Raises:
        MethodError: a package brings this method, but cannot be loaded, or does not register it.
    """
    found = list(_entries())
    named = [entry for entry in found if entry.name == name]
    for entry in named:
        if problem := _load(entry):
            raise MethodError(f"the method {name} comes with {problem}; repair that package, or uninstall it")
    if name in SPARSIFIERS or name in MERGE_METHODS:
        return []
    if named:
        raise MethodError(
            f"{_of(named[0])} says that it brings the method {name}, but loading {named[0].value} registered no "
            "method of this name: its function needs @dk.register.merge_method or @dk.register.sparsifier"
        )
    problems = [problem for entry in found if (problem := _load(entry))]
    return [] if name in SPARSIFIERS or name in MERGE_METHODS else problems


def load_all() -> list[str]:
    """Load the methods of all installed packages -> what could not be loaded, a line each."""
    return [problem for entry in _entries() if (problem := _load(entry))]


def distribution_of(foreign: Foreign) -> str | None:
    """Name and version of the installed package that brings a registered method; None where no package does."""
    top = foreign.module.partition(".")[0]
    found = [entry for entry in _entries() if entry.dist is not None and entry.module.partition(".")[0] == top]
    # Several packages may share the first part of their modules' names.
    found.sort(key=lambda entry: (entry.name != foreign.name, entry.module != foreign.module))
    return _of(found[0]) if found else None


def _entries() -> Iterator[EntryPoint]:
    from importlib.metadata import entry_points

    yield from entry_points(group=GROUP)


def _load(entry: EntryPoint) -> str | None:
    """Import what an entry point names -> why that failed; then nothing of it stays registered."""
    before = dict(SPARSIFIERS), dict(MERGE_METHODS)
    try:
        entry.load()
    except (Exception, SystemExit) as error:  # whatever other people's code may raise
        SPARSIFIERS.clear()
        MERGE_METHODS.clear()
        SPARSIFIERS.update(before[0])
        MERGE_METHODS.update(before[1])
        return (
            f"{_of(entry)} (entry point {entry.name}: {entry.value}), which cannot be loaded: "
            f"{type(error).__name__}: {error}"
        )
    return None


def _of(entry: EntryPoint) -> str:
    return "an unnamed package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
