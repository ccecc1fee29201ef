# SPDX-License-Identifier: Apache-2.0
"""What a kind of input is: something that recognises a name, and opens what it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from darekit.checkpoints import Checkpoint
from darekit.checkpoints.opening import places_of
from darekit.errors import CheckpointError, PlanError


@dataclass(frozen=True)
class Opening:
    """What an opener is asked to open.

    Attributes:
        ref: as the user wrote it; or the file that an opener found under that name.
        base: the base of the recipe or command, open; None where there is none.
        search: where relative names are looked up after the working directory.
        openers: all kinds of input that may be named.
        layout: in which order an adapter has its experts, as the user says; None: as it says itself.
        together: the base was named in one word with what is opened: nobody need ask whether it is the right one.
    """

    ref: str | Path
    base: Checkpoint | None
    search: Sequence[Path]
    openers: Sequence[Opener]
    layout: str | None = None
    together: bool = False

    @property
    def path(self) -> Path | None:
        """The file or directory of that name on this machine, where there is one."""
        with suppress(OSError):  # what is wrong with it is said by whoever opens it
            return next((place for place in places_of(self.ref, self.search) if place.exists()), None)
        return None

    def open(self, ref: str | Path) -> Checkpoint:
        """What this input is made of: opened in the same way, under another name."""
        return open_by(replace(self, ref=ref))


@dataclass(frozen=True)
class Opener:
    """One kind of input.

    Attributes:
        kind: what to call it in errors, with its article.
        find: what a name stands for, None where it is of another kind; cheap, since all names pass it.
        open: what `find` found -> an open checkpoint; headers only.
        needs_base: it is a model only on top of the base that it was made from.
        finds_base: where none is given, it opens the one that it names itself.
        instead: what else can be done with it, where no base can be named; `{ref}` stands for its name.
    """

    kind: str
    find: Callable[[Opening], str | Path | None]
    open: Callable[[Opening], Checkpoint]
    needs_base: bool = False
    finds_base: bool = False
    instead: str = ""


def open_by(opening: Opening) -> Checkpoint:
    """Have the first opener that recognises a name open it.

    Raises:
        CheckpointError: none does, or what it found is malformed.
        PlanError: it needs a base, and there is none.
    """
    opener, opening = found_by(opening)
    if opener.needs_base and not opener.finds_base and opening.base is None:
        instead = f", {opener.instead.format(ref=opening.ref)}" if opener.instead else ""
        raise PlanError(
            f"{opening.ref} is {opener.kind}: it can only be used with its base; name the base (base_model in a "
            f"recipe, --base or BASE of a command that has it){instead}"
        )
    return opener.open(opening)


def found_by(opening: Opening) -> tuple[Opener, Opening]:
    """The first opener that recognises a name, and what it found under it.

    Raises:
        CheckpointError: none does.
    """
    for opener in opening.openers:
        found = opener.find(opening)
        if found is not None:
            return opener, replace(opening, ref=found)
    raise CheckpointError(f"{opening.ref} is not a kind of input that can be opened here")
