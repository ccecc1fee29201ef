# SPDX-License-Identifier: Apache-2.0
"""Whether two names mean one model: `base`, `./base`, `base/` and its absolute path do."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path


def same_model(one: str, other: str, search: Sequence[Path] = ()) -> bool:
    """Whether two names mean one path, or one model on the Hub; symbolic links are two paths.

    Args:
        one: as the user wrote it.
        other: likewise.
        search: where relative names are looked up after the working directory.
    """
    return one == other or _place(one, search) == _place(other, search)


def find_model(name: str, among: Iterable[str], search: Sequence[Path] = ()) -> str | None:
    """The one of several names that means the same model, as it is spelled there; None: none does."""
    known = list(among)
    return name if name in known else next((other for other in known if same_model(name, other, search)), None)


def _place(name: str, search: Sequence[Path]) -> str:
    """The path that a name stands for; of one that is nowhere on this machine, its shortest spelling."""
    path = os.path.expanduser(name)  # noqa: PTH111 (pathlib's raises for a user without a home)
    for folder in (Path(), *search):
        with suppress(OSError, ValueError):  # too long, no permission, a NUL: whoever opens it says so
            place = os.path.abspath(folder / path)  # noqa: PTH100 (pathlib's keeps `..`)
            if os.path.lexists(place):
                return place
    if name.endswith("@main"):  # what a name without a revision means
        return _place(name.removesuffix("@main"), search)
    plain = os.path.normpath(path)
    # org/name is on the Hub, ./org/name is a path that is not there.
    return os.path.abspath(plain) if path.startswith((".", os.sep)) else plain  # noqa: PTH100
