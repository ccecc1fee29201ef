# SPDX-License-Identifier: Apache-2.0
"""What can be given as a model: a checkpoint, or a pack. The reader of packs is imported when there is one."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from darekit.checkpoints import Checkpoint, InputFile, open_checkpoint, read_header
from darekit.checkpoints.hub import fetch_file, looks_like_hub_file, looks_like_hub_id, refuse_address
from darekit.checkpoints.opening import places_of
from darekit.errors import CheckpointError, HoldsPack

SUFFIX = ".safetensors"

DOCUMENT_KEY = "darekit_pack"  # in a safetensors file's metadata


def is_pack(file: InputFile) -> bool:
    """Whether a safetensors file says that it is a pack."""
    return DOCUMENT_KEY in read_header(file)[0]


def find_pack(ref: str | Path, search: Sequence[Path] = ()) -> Path | None:
    """A model's name -> the file, where the name is that of a pack: a local file, or one on the Hub."""
    for candidate in places_of(ref, search):
        if candidate.exists():
            if candidate.suffix != SUFFIX or not candidate.is_file():
                return None
            file = InputFile(candidate)
            try:
                return candidate if is_pack(file) else None
            finally:
                file.close()
    return fetch_file(ref) if isinstance(ref, str) and looks_like_hub_file(ref) else None


def locate_pack(ref: str | Path) -> Path:
    """What the user wrote -> the file of a pack: that file, a folder with nothing else, or either on the Hub.

    Raises:
        CheckpointError: there is nothing, or no pack.
    """
    refuse_address(ref)
    path = places_of(ref, ())[0]
    if path.is_file():
        return path  # what is wrong with it is said when it is read
    if path.is_dir():
        return _pack_in(path)
    if isinstance(ref, str) and looks_like_hub_file(ref):
        return fetch_file(ref)
    if isinstance(ref, str) and looks_like_hub_id(ref):
        try:
            open_checkpoint(ref).close()
        except HoldsPack as error:
            return error.path
        raise CheckpointError(f"{ref} {_WHOLE}")
    beside = sorted(path.parent.glob(f"*{SUFFIX}")) if path.parent.is_dir() else []
    near = get_close_matches(path.name, [file.name for file in beside], n=1)
    near = near or [file.name for file in beside if file.name.split(".")[0] == path.name.split(".")[0]][:1]
    raise CheckpointError(
        f"{ref} does not exist: looked for {path.absolute()}; expected a file written by `dare pack`, a folder with "
        f"one, or org/name on the Hub{f'; did you mean {path.with_name(near[0])}?' if near else ''}"
    )


_WHOLE = (
    "is a whole checkpoint, not a pack; expected a file written by `dare pack` "
    "(`dare pack BASE MODEL OUT.safetensors` makes one)"
)


def _pack_in(folder: Path) -> Path:
    """The only weights of a folder, where they are a pack."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if len(files) == 1 and _may_be_pack(files[0]):
        return files[0]
    packs = [file for file in files if _may_be_pack(file)]
    if packs:
        names = ", ".join(file.name for file in packs[:4]) + (", ..." if len(packs) > 4 else "")
        raise CheckpointError(
            f"{folder} holds {len(files)} safetensors files; these are packs: {names}. Name the one you mean, such as "
            f"{packs[0]}"
        )
    if files or (folder / "config.json").exists():
        raise CheckpointError(f"{folder} {_WHOLE}")
    raise CheckpointError(f"{folder} holds no pack; expected one file *{SUFFIX} written by `dare pack`")


def _may_be_pack(path: Path) -> bool:
    """Whether a file is a pack, or too damaged to say."""
    try:
        file = InputFile(path)
        try:
            return is_pack(file)
        finally:
            file.close()
    except CheckpointError:
        return True


def open_base(base: str | Path, pack: str | Path) -> Checkpoint:
    """Open what `pack` is to be bound to.

    Raises:
        HoldsPack: it is a pack itself.
    """
    try:
        return open_checkpoint(base)
    except HoldsPack as error:
        refuse_swapped(base, pack)
        raise HoldsPack(
            f"{base} is a pack, but is given as the base of {pack}; give the checkpoint that was packed against",
            error.path,
        ) from None


def refuse_swapped(base: str | Path, pack: str | Path) -> None:
    """Say so where a base and a pack have changed places.

    Raises:
        HoldsPack: `base` is a pack, and `pack` is none.
    """
    if _names_pack(base) and not _names_pack(pack):
        raise HoldsPack(
            f"{base} is a pack and {pack} is not, so they are swapped; the base is {pack}, the pack {base}",
            Path(base),
        )


def _names_pack(ref: str | Path) -> bool:
    try:
        return _may_be_pack(locate_pack(ref))
    except CheckpointError:
        return False
