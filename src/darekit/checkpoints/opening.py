# SPDX-License-Identifier: Apache-2.0
"""From what the user wrote to an open checkpoint: a directory, a file, or a model on the Hub."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from darekit.checkpoints.checkpoint import Checkpoint, TensorInfo, natural_key
from darekit.checkpoints.companions import CONFIG, companions_in
from darekit.checkpoints.documents import read_object
from darekit.checkpoints.files import InputFile
from darekit.checkpoints.hub import fetch_snapshot, looks_like_hub_id, refuse_address
from darekit.checkpoints.pytorch import read_pickled
from darekit.checkpoints.safetensors import read_header
from darekit.checkpoints.sources import FileRange
from darekit.checkpoints.weights import (
    SAFETENSORS,
    Weights,
    compare_index,
    find_weights,
    list_names,
    refuse_config,
    refuse_directory,
    refuse_file,
    refuse_scales,
)
from darekit.errors import CheckpointError, HoldsPack, Unsupported

COMMIT = re.compile("[0-9a-f]{40}")
PACK = "darekit_pack"  # metadata key of what `darekit.packs` writes
STATISTICS = "darekit_statistics"  # likewise of one with statistics


@dataclass(frozen=True)
class Location:
    """Where a checkpoint lies on this machine. `revision`: its commit on the Hub, where known."""

    path: Path
    revision: str | None


def open_checkpoint(ref: str | Path, *, search: Sequence[Path] = ()) -> Checkpoint:
    """Open a checkpoint: its headers are read and checked, its tensors are not.

    `ref` is a path, looked up in the working directory and then in each directory of `search`; or, if nothing is
    there and it is a string of the form org/name or org/name@revision, a model on the Hugging Face Hub. A Path is
    never looked up on the Hub.

    Raises:
        CheckpointError: nothing is there, or it is malformed.
        Unsupported: an adapter, quantised weights, a format that darekit does not read.
    """
    location = _locate(ref, search)
    directory = location.path if location.path.is_dir() else location.path.parent
    weights = _choose(location.path)
    config = _read_config(directory)
    with ExitStack() as opened:
        files: list[InputFile] = []
        for path in weights.files:
            file = InputFile(path)
            opened.callback(file.close)
            files.append(file)
        headers = [tuple(_read_header(weights, file)) for file in files]
        compare_index(weights, [[info.name for info in header] for header in headers])
        found = {info.name: info for header in headers for info in header}
        tensors = {name: found[name] for name in sorted(found, key=natural_key)}
        if not tensors:
            raise CheckpointError(f"{location.path} holds no tensors")
        refuse_scales({name: info.dtype for name, info in tensors.items()}, str(location.path))
        opened.pop_all()  # nothing failed: the checkpoint owns the files now
    return Checkpoint(
        str(ref), location.path if location.path.is_dir() else None, tensors, config, tuple(files), location.revision,
        companions_in(directory),
    )  # fmt: skip


def _choose(path: Path) -> Weights:
    if path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            raise CheckpointError(f"{path} cannot be read: no permission to look into this directory")
        refuse_directory(path)
        # Before the weights are looked for: of a quantised model this is the more useful message.
        _read_config(path)
        return find_weights(path)
    refuse_file(path)
    return Weights("safetensors" if path.suffix == SAFETENSORS else "pickle", (path,), None, None)


def _read_config(directory: Path) -> dict[str, object] | None:
    path = directory / CONFIG
    if not path.exists():
        return None
    config = read_object(path, strict=False)
    refuse_config(config, path)
    return config


def _read_header(weights: Weights, file: InputFile) -> Iterable[TensorInfo]:
    if weights.kind == "pickle":
        return (TensorInfo(t.name, t.dtype, t.shape, t.source) for t in read_pickled(file.path))
    metadata, placements = read_header(file)
    if PACK in metadata:
        raise HoldsPack(
            f"{file.path} is a darekit pack, a delta and no checkpoint: give it as a model beside its base, or write "
            "the whole model with `dare unpack BASE PACK OUT`",
            file.path,
        )
    if STATISTICS in metadata:
        raise Unsupported(
            f"{file.path} holds statistics of a model, and no model: name it as `stats:` of a model in a recipe"
        )
    return (
        TensorInfo(place.name, place.dtype, place.shape, FileRange(file, place.offset, place.nbytes))
        for place in placements
    )


def places_of(ref: str | Path, search: Sequence[Path]) -> list[Path]:
    """Where a name is looked up on this machine: in the working directory, then in each of `search`."""
    try:
        path = Path(ref).expanduser()
    except RuntimeError:  # ~somebody who has no home here
        path = Path(ref)
    places = [path, *(directory / path for directory in search if not path.is_absolute())]
    return list({place.absolute(): place for place in places}.values())  # the recipe's folder may be this one


def _locate(ref: str | Path, search: Sequence[Path]) -> Location:
    if not str(ref).strip():
        raise CheckpointError(
            "the name of a checkpoint is empty; expected a directory, a file or an org/name on the Hub"
        )
    refuse_address(ref)
    tried = places_of(ref, search)
    for candidate in tried:
        if _exists(candidate):
            return Location(candidate, _commit_of(candidate))
    tail = "looked for " + ", ".join(str(candidate.absolute()) for candidate in tried)
    near = _near_misses(tried)
    if near:
        tail += f"; did you mean {' or '.join(near)}?"
    if not isinstance(ref, str) or not looks_like_hub_id(ref):
        raise CheckpointError(
            f"there is no checkpoint {str(ref)!r}, and it is not written org/name as models on the Hub are: {tail}"
        )
    try:
        snapshot = fetch_snapshot(ref)
    except Unsupported:  # it was found
        raise
    except CheckpointError as error:
        # A mistyped path reads like a Hub id, so the answer covers both.
        raise CheckpointError(f"{error}. No local checkpoint either: {tail}") from error
    return Location(snapshot.directory, snapshot.revision)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # no permission, a name that is too long
        raise CheckpointError(f"{path} cannot be opened: {error.strerror or error}") from error


def _commit_of(path: Path) -> str | None:
    """The commit of a path inside the Hub's cache: models--org--name/snapshots/COMMIT."""
    directory = path if path.is_dir() else path.parent
    return directory.name if directory.parent.name == "snapshots" and COMMIT.fullmatch(directory.name) else None


def _near_misses(tried: Sequence[Path]) -> list[str]:
    near: list[str] = []
    for path in tried:
        if path.parent.is_dir():
            names = [name for name in list_names(path.parent) if not name.startswith(".")]
            near += [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)]
    return near[:3]
