# SPDX-License-Identifier: Apache-2.0
"""The one way in: whatever a user may name as a model or a base -> an open checkpoint.

Each kind of input is an `Opener`, and the first in the list that recognises a name opens it. A new kind is a file in
this room and a line in `OPENERS`. Rooms above may put openers of their own before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from darekit.checkpoints import Checkpoint, open_checkpoint, traits_of
from darekit.checkpoints.opening import places_of
from darekit.errors import CheckpointError, HoldsPack, PlanError
from darekit.packs.opening import find_pack


@dataclass(frozen=True)
class Opening:
    """What an opener is asked to open.

    Attributes:
        ref: as the user wrote it; or the file that an opener found under that name.
        base: the base of the recipe or command, open; None where there is none.
        search: where relative names are looked up after the working directory.
        openers: all kinds of input that may be named.
    """

    ref: str | Path
    base: Checkpoint | None
    search: Sequence[Path]
    openers: Sequence[Opener]

    @property
    def path(self) -> Path | None:
        """The file or directory of that name on this machine, where there is one."""
        with suppress(OSError):  # what is wrong with it is said by whoever opens it
            return next((place for place in places_of(self.ref, self.search) if place.exists()), None)
        return None

    def open(self, ref: str | Path) -> Checkpoint:
        """What this input is made of: opened in the same way, under another name."""
        return _open(replace(self, ref=ref))


@dataclass(frozen=True)
class Opener:
    """One kind of input.

    Attributes:
        kind: what to call it in errors, with its article.
        find: what a name stands for, None where it is of another kind; cheap, since all names pass it.
        open: what `find` found -> an open checkpoint; headers only.
        needs_base: it is a model only on top of the base that it was made from.
        instead: what else can be done with it, where no base can be named; `{ref}` stands for its name.
    """

    kind: str
    find: Callable[[Opening], str | Path | None]
    open: Callable[[Opening], Checkpoint]
    needs_base: bool = False
    instead: str = ""


def _find_pack(opening: Opening) -> Path | None:
    return find_pack(opening.ref, opening.search)


def _open_pack(opening: Opening) -> Checkpoint:
    from darekit.packs.reading import open_pack

    found = open_pack(opening.ref)
    try:
        return found.checkpoint(opening.base)
    except BaseException:
        found.close()
        raise


def _open_stored(opening: Opening) -> Checkpoint:
    try:
        return open_checkpoint(opening.ref, search=opening.search)
    except HoldsPack as error:  # a folder or a repository that holds nothing else
        if Path(opening.ref) == error.path:  # nobody here opens packs
            raise
        return opening.open(error.path)


OPENERS = (
    Opener(
        "a pack", _find_pack, _open_pack, needs_base=True,
        instead="or write the whole model with `dare unpack BASE {ref} OUT`",
    ),
    Opener("a checkpoint", lambda opening: opening.ref, _open_stored),
)  # fmt: skip


def open_model(
    ref: str | Path, base: Checkpoint | None, *, search: Sequence[Path] = (), openers: Sequence[Opener] = OPENERS
) -> Checkpoint:
    """Open what stands for a model. Closing it leaves `base` open.

    Raises:
        CheckpointError: nothing is there, or it is malformed.
        PlanError: it needs a base, and there is none.
    """
    return _open(Opening(ref, base, search, openers))


def open_base(ref: str | Path, *, search: Sequence[Path] = (), openers: Sequence[Opener] = OPENERS) -> Checkpoint:
    """Open what other models are compared with.

    Raises:
        CheckpointError: nothing is there, or it is malformed; or it needs a base itself.
    """
    return _open(Opening(ref, None, search, [opener for opener in openers if not opener.needs_base]))


def only_on_base(
    ref: str | Path, *, search: Sequence[Path] = (), openers: Sequence[Opener] = OPENERS
) -> tuple[str, str | Path] | None:
    """Of what is a model only on top of its base: its kind, and what was found under the name; None of all else."""
    opener, opening = _found(Opening(ref, None, search, openers))
    return (opener.kind, opening.ref) if opener.needs_base else None


def _open(opening: Opening) -> Checkpoint:
    opener, opening = _found(opening)
    if opener.needs_base and opening.base is None:
        instead = f", {opener.instead.format(ref=opening.ref)}" if opener.instead else ""
        raise PlanError(
            f"{opening.ref} is {opener.kind}: what it holds needs its base; name the base (base_model in a recipe, "
            f"--base or BASE of a command that has it){instead}"
        )
    return opener.open(opening)


def _found(opening: Opening) -> tuple[Opener, Opening]:
    """Who opens it, and what was found under the name."""
    for opener in opening.openers:
        found = opener.find(opening)
        if found is not None:
            return opener, replace(opening, ref=found)
    raise CheckpointError(f"{opening.ref} is no kind of input that can be opened here")


def packed_seed(model: Checkpoint) -> int | None:
    """The seed of the mask by which a model was dropped before it was stored; None where nothing of it was."""
    seeds = (traits_of(info.source).seed for info in model.tensors.values())
    return next((seed for seed in seeds if seed is not None), None)
