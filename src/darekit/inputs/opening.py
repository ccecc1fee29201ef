# SPDX-License-Identifier: Apache-2.0
"""The one way in: whatever a user may name as a model -> an open checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from darekit.checkpoints import Checkpoint, open_checkpoint
from darekit.errors import HoldsPack, PlanError
from darekit.packs.opening import find_pack


def open_model(ref: str | Path, base: Checkpoint | None, *, search: Sequence[Path] = ()) -> Checkpoint:
    """Open what stands where a model stands: a checkpoint, or a pack of one that was fine-tuned from `base`."""
    path = find_pack(ref, search)
    if path is None:
        try:
            return open_checkpoint(ref, search=search)
        except HoldsPack as error:  # a folder or a repository that holds nothing else
            path = error.path
    if base is None:
        raise PlanError(
            f"{path} is a pack: what it holds needs its base; name the base (base_model in a recipe, --base or BASE of "
            f"a command that has it), or write the whole model with `dare unpack BASE {path} OUT`"
        )
    from darekit.packs.reading import open_pack

    found = open_pack(path)
    try:
        return found.checkpoint(base)
    except BaseException:
        found.close()
        raise


def packed_seed(model: Checkpoint) -> int | None:
    """The seed of the mask by which a model was packed; None where it is no pack, or nothing of it was dropped."""
    seeds: Iterator[int | None] = (getattr(info.source, "seed", None) for info in model.tensors.values())
    return next((seed for seed in seeds if seed is not None), None)
