# SPDX-License-Identifier: Apache-2.0
"""From what the user wrote to an open checkpoint: a directory, a file, or a model on the Hub."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from darekit.checkpoints.checkpoint import Checkpoint, TensorInfo, natural_order
from darekit.checkpoints.companions import CONFIG, Companions, Content, look_beside
from darekit.checkpoints.documents import read_object, shorten
from darekit.checkpoints.files import InputFile
from darekit.checkpoints.headers import HeaderFile
from darekit.checkpoints.hub import fetch_snapshot, looks_like_hub_id, refuse_address
from darekit.checkpoints.pytorch import read_pickled
from darekit.checkpoints.quantised.view import SETTINGS, decoded
from darekit.checkpoints.refusals import (
    is_adapter,
    quantisation_in,
    refuse_adapter,
    refuse_empty,
    refuse_quantised,
    without_quantisation,
)
from darekit.checkpoints.safetensors import read_header
from darekit.checkpoints.sources import FileRange
from darekit.checkpoints.weights import SAFETENSORS, SINGLE, Weights, find_weights, list_names, refuse_name
from darekit.errors import CheckpointError, HoldsPack, Unsupported
from darekit.wording import label, some

COMMIT = re.compile("[0-9a-f]{40}")
PACK = "darekit_pack"  # metadata key of what `darekit.packs` writes
PIECE = 1 << 20  # bytes compared at once
STATISTICS = "darekit_statistics"  # likewise of one with statistics


@dataclass(frozen=True)
class Location:
    """Where a checkpoint lies on this machine. `revision`: its commit on the Hub, where known; `left`: files on the Hub
    that were not fetched, though they may belong to it, and why."""

    path: Path
    revision: str | None
    left: Mapping[str, str] = field(default_factory=dict)


def open_checkpoint(
    ref: str | Path, *, search: Sequence[Path] = (), open_file: Callable[[Path], InputFile] = InputFile
) -> Checkpoint:
    """Open a checkpoint: its headers are read and checked, its tensors are not.

    `ref` is a path, looked up in the working directory and then in each directory of `search`; or, if nothing is
    there and it is a string of the form org/name or org/name@revision, a model on the Hugging Face Hub. A Path is
    never looked up on the Hub. `open_file`: how files of weights are opened.

    Raises:
        CheckpointError: nothing is there, or it is malformed.
        Unsupported: an adapter, quantised weights, a format that darekit does not read.
    """
    location = _locate(ref, search)
    directory = location.path if location.path.is_dir() else location.path.parent
    weights = _choose(location.path)
    config = _read_config(directory)
    # A single file may lie anywhere, among what is nobody's companion.
    beside = look_beside(directory, listed=location.path.is_file() and location.path.name not in SINGLE.values())
    companions = beside.companions
    notes = list(weights.notes)
    if location.path.is_dir() and (adapters := [name for name in list_names(directory) if is_adapter(name)]):
        notes.append(
            f"{label(str(directory))} holds a whole model and an adapter ({some(adapters)}): the model is read as it "
            f"is, without the adapter; to use the adapter, name {directory / adapters[0]}"
        )
    with ExitStack() as opened:
        files: list[InputFile] = []
        for path in weights.files:
            file = open_file(path)
            opened.callback(file.close)
            files.append(file)
        headers = [tuple(_read_header(weights, file)) for file in files]
        found = _gather(weights, headers, notes)
        tensors = {name: found[name] for name in natural_order(found)}
        if not tensors:
            raise CheckpointError(f"{location.path} holds no tensors")
        refuse_adapter(list(tensors), location.path)
        said = quantisation_in(config)
        view = decoded(tensors, config, str(location.path))
        if view is not None:
            tensors = {name: view.tensors[name] for name in natural_order(view.tensors)}
            notes.extend(view.notes)
            companions = {name: content for name, content in companions.items() if name not in SETTINGS}
        # What is decoded has no codes any more; what config.json says was true of it.
        refuse_quantised(tensors, said if view is None else None, str(location.path))
        if config is not None:  # tensors that are no model's may well be empty
            refuse_empty(tensors, str(location.path))
        if config is not None and (said is not None or view is not None):
            config, companions = _as_decoded(config, companions, view.dtype if view else None)
        if config is not None and said is not None and view is None:
            notes.append(
                f"{label(str(location.path))}: its config.json has a {said}, but its weights are not quantised: they "
                "are read as they are, and the key is left out of outputs"
            )
        opened.pop_all()  # nothing failed: the checkpoint owns the files now
    own = location.path.is_dir() and view is None  # other programs load quantised weights as what they are
    return Checkpoint(
        str(ref), location.path if own else None, tensors, config, tuple(files), location.revision,
        companions, notes=tuple(notes), left={**location.left, **beside.left},
    )  # fmt: skip


def _choose(path: Path) -> Weights:
    if path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            raise CheckpointError(f"{path} cannot be read: no permission to look into this directory")
        return find_weights(path)
    refuse_name(path)
    return Weights("safetensors" if path.suffix == SAFETENSORS else "pickle", (path,))


def _read_config(directory: Path) -> dict[str, object] | None:
    path = directory / CONFIG
    # A dangling link counts, as one of weights does: whoever made it meant the model to have a config.
    return read_object(path, strict=False) if path.exists() or path.is_symlink() else None


def _as_decoded(
    config: Mapping[str, object], companions: Companions, dtype: str | None
) -> tuple[dict[str, object], dict[str, Content]]:
    """Config and companions of a model whose weights were dequantised, here or elsewhere, or never quantised: loaders
    believe the key. `dtype`: what they were decoded to here."""
    right = without_quantisation(config)
    for key in ("dtype", "torch_dtype"):
        if dtype is not None and key in right:
            right[key] = dtype
    text = json.dumps(right, indent=2, ensure_ascii=False) + "\n"
    return right, {**companions, CONFIG: text.encode()}


def _gather(weights: Weights, headers: Sequence[Sequence[TensorInfo]], notes: list[str]) -> dict[str, TensorInfo]:
    """The tensors of all files (in the order of `weights.files`): what is stored is right, whatever the index says.

    Raises:
        CheckpointError: two files have a tensor of one name, and differ in it.
    """
    found: dict[str, TensorInfo] = {}
    places: dict[str, str] = {}
    for path, header in zip(weights.files, headers, strict=True):
        for info in header:
            if info.name in found and not _equal(found[info.name], info):
                named = (weights.index or {}).get(info.name)
                listed = f" (the index names {named}; transformers takes the last)" if named else ""
                raise CheckpointError(
                    f"tensor {shorten(info.name)} lies in two shards of {path.parent}, with different values: "
                    f"{places[info.name]} and {path.name}{listed}. Save the model again, so that each tensor is stored "
                    "once, or remove a shard that is not the model's"
                )
            found[info.name] = info
            places[info.name] = path.name
    if weights.index is not None and weights.index_path is not None and weights.index != places:
        notes.extend(_compare_index(weights.index, places, sum(map(len, headers)), weights.index_path))
    return found


def _compare_index(index: Mapping[str, str], places: Mapping[str, str], count: int, path: Path) -> Iterable[str]:
    """Where an index and the shards disagree, in words; `count`: of tensors in all shards, copies counted."""
    where = f"{label(str(path.parent))}/{path.name}"
    absent = [shorten(name) for name in index if name not in places]
    unlisted = [shorten(name) for name in places if name not in index]
    elsewhere = [shorten(name) for name, file in index.items() if places.get(name, file) != file]
    if absent:
        yield f"{where} lists {some(absent)}, which no shard holds: the model does not have it, as in transformers"
    if unlisted:
        yield f"{where} does not list {some(unlisted)}, which the shards hold: read, as in transformers"
    if elsewhere and count == len(places):
        yield f"{where} names another shard than the one that holds {some(elsewhere)}: read from there"


def _equal(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors are the same to the bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if isinstance(one.source, FileRange) and isinstance(one.source.file, HeaderFile):
        return True  # nobody knows; it is looked at when the weights are there
    for start in range(0, one.nbytes, PIECE):
        size = min(PIECE, one.nbytes - start)
        ours, theirs = np.empty(size, np.uint8), np.empty(size, np.uint8)
        one.source.read_into(ours, start)
        other.source.read_into(theirs, start)
        if not np.array_equal(ours, theirs):
            return False
    return True


def _read_header(weights: Weights, file: InputFile) -> Iterable[TensorInfo]:
    if weights.kind == "pickle":
        return (TensorInfo(t.name, t.dtype, t.shape, t.source) for t in read_pickled(file.path))
    metadata, placements = read_header(file)
    if PACK in metadata:
        raise HoldsPack(
            f"{file.path} is a darekit pack, which is a delta and not a checkpoint: give it as a model beside its "
            "base, or write the whole model with `dare unpack BASE PACK OUT`",
            file.path,
        )
    if STATISTICS in metadata:
        raise Unsupported(
            f"{file.path} holds statistics of a model and is not a model itself: name it as "
            "`stats:` of a model in a recipe"
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
            found = _snapshot_of(candidate)
            return Location(found, _commit_of(found))
    plain = str(ref).removesuffix("@main")
    if isinstance(ref, str) and plain != ref:  # the revision that a name without one means
        for candidate in places_of(plain, search):
            if _exists(candidate):
                return Location(candidate, _commit_of(candidate))
    tail = looked_for(ref, search)
    if isinstance(ref, str) and _names_adapter(ref):
        model, _, adapter = ref.rpartition("+")
        raise CheckpointError(
            f"there is no checkpoint {ref!r}. If it means {model} with the LoRA adapter {adapter}: recipes and "
            "commands take that if both are here or on the Hub; packs opened from Python need a base that is open. "
            f"If it means a directory: {tail}"
        )
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
    return Location(snapshot.directory, snapshot.revision, snapshot.left)


def looked_for(ref: str | Path, search: Sequence[Path]) -> str:
    """Where a name was looked up on this machine in vain, and what is there that it may mean."""
    tried = places_of(ref, search)
    tail = "looked for " + ", ".join(str(candidate.absolute()) for candidate in tried)
    near = _near_misses(tried)
    bare, at, revision = str(ref).partition("@")
    if isinstance(ref, str) and at and any(_exists(candidate) for candidate in places_of(bare or ".", search)):
        return f"{tail}; {bare} is here, but a directory has no revisions: to use it, leave out @{revision}"
    return f"{tail}; did you mean {' or '.join(near)}?" if near else tail


def _names_adapter(ref: str) -> bool:
    """Whether a name reads model+adapter, as in recipes of mergekit; a revision on the Hub may have a plus too."""
    _, plus, adapter = ref.rpartition("+")
    return bool(plus) and (not looks_like_hub_id(ref) or looks_like_hub_id(adapter) or _exists(Path(adapter or ".")))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # no permission, a name that is too long
        raise CheckpointError(f"{path} cannot be opened: {error.strerror or error}") from error


def _commit_of(path: Path) -> str | None:
    """The commit of a path inside the Hub's cache: models--org--name/snapshots/COMMIT."""
    directory = path if path.is_dir() else path.parent
    return directory.name if directory.parent.name == "snapshots" and COMMIT.fullmatch(directory.name) else None


def _snapshot_of(path: Path) -> Path:
    """Of a model's folder in the Hub's cache (models--org--name), the snapshot that a name without a revision means;
    any other path as it is."""
    if not path.name.startswith("models--") or not (path / "snapshots").is_dir():
        return path
    try:
        commit = (path / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return path
    found = path / "snapshots" / commit
    return found if COMMIT.fullmatch(commit) and found.is_dir() else path


def _near_misses(tried: Sequence[Path]) -> list[str]:
    near: list[str] = []
    for path in tried:
        if path.parent.is_dir():
            names = [name for name in list_names(path.parent) if not name.startswith(".")]
            near += [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)]
    return near[:3]
