# SPDX-License-Identifier: Apache-2.0
"""Whatever a user may name as a model or a base -> an open checkpoint.

Each kind of input is an `Opener`, and the first in the list that recognises a name opens it. A new kind is a file in
this room and a line in `OPENERS`. Packs and recipes are models too: `planning/opening.py`, through which every command
opens, puts these before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from darekit.checkpoints import Checkpoint, open_checkpoint, traits_of
from darekit.errors import HoldsAdapter, HoldsPack, PlanError
from darekit.inputs.adapters.opening import ALONE, PAIR, open_from_hub
from darekit.inputs.kinds import Opener, Opening, found_by, open_by


def _open_stored(opening: Opening) -> Checkpoint:
    try:
        return open_checkpoint(opening.ref, search=opening.search)
    except HoldsPack as error:  # a folder or a repository that holds nothing else
        if Path(opening.ref) == error.path:  # nobody here opens packs
            raise
        return opening.open(error.path)
    except HoldsAdapter:  # a repository on the Hub
        return open_from_hub(opening)


OPENERS = (PAIR, ALONE, Opener("a checkpoint", lambda opening: opening.ref, _open_stored))


def open_model(
    ref: str | Path,
    base: Checkpoint | None,
    *,
    openers: Sequence[Opener],
    search: Sequence[Path] = (),
    layout: str | None = None,
) -> Checkpoint:
    """Open what stands for a model. Closing it leaves `base` open. `layout`: of an adapter's experts.

    Raises:
        CheckpointError: nothing is there, or it is malformed.
        PlanError: it needs a base, and there is none; or it is no adapter, and `layout` is given.
    """
    found = open_by(Opening(ref, base, search, openers, layout))
    if layout is not None:
        from darekit.inputs.adapters.views import is_adapted

        if not is_adapted(found):
            found.close()
            raise PlanError(f"{ref} is not an adapter, so it has no experts_layout: leave that out")
    return found


def open_base(ref: str | Path, *, openers: Sequence[Opener], search: Sequence[Path] = ()) -> Checkpoint:
    """Open what other models are compared with.

    Raises:
        CheckpointError: nothing is there, or it is malformed; or it needs a base itself.
    """
    return open_by(Opening(ref, None, search, [one for one in openers if one.finds_base or not one.needs_base]))


def only_on_base(
    ref: str | Path, *, openers: Sequence[Opener], search: Sequence[Path] = ()
) -> tuple[Opener, str | Path] | None:
    """Of what is a model only on top of its base: its opener, and what was found under the name; None of all else."""
    opener, opening = found_by(Opening(ref, None, search, openers))
    return (opener, opening.ref) if opener.needs_base else None


def packed_seed(model: Checkpoint) -> int | None:
    """The seed of the mask by which a model was dropped before it was stored; None where nothing of it was."""
    seeds = (traits_of(info.source).seed for info in model.tensors.values())
    return next((seed for seed in seeds if seed is not None), None)
