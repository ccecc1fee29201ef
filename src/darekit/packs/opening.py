# SPDX-License-Identifier: Apache-2.0
"""What stands where a model stands: a checkpoint, or a pack. The reader of packs is imported when there is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from darekit.checkpoints import Checkpoint, InputFile, open_checkpoint, read_header
from darekit.checkpoints.hub import fetch_file, looks_like_hub_file
from darekit.errors import HoldsPack, PlanError

SUFFIX = ".safetensors"
DOCUMENT_KEY = "darekit_pack"  # in a safetensors file's metadata


def is_pack(file: InputFile) -> bool:
    """Whether a safetensors file says that it is a pack."""
    return DOCUMENT_KEY in read_header(file)[0]


def find_pack(ref: str | Path, search: Sequence[Path] = ()) -> Path | None:
    """A model's name -> the file, where the name is that of a pack: a local file, or one on the Hub."""
    for candidate in (Path(ref).expanduser(), *(directory / ref for directory in search)):
        if candidate.exists():
            if candidate.suffix != SUFFIX or not candidate.is_file():
                return None
            file = InputFile(candidate)
            try:
                return candidate if is_pack(file) else None
            finally:
                file.close()
    return fetch_file(ref) if isinstance(ref, str) and looks_like_hub_file(ref) else None


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
