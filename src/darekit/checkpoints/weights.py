# SPDX-License-Identifier: Apache-2.0
"""Which files of a directory hold its weights, by the conventions of transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from darekit.checkpoints.documents import read_object, shorten
from darekit.checkpoints.refusals import about_file, advise, is_adapter
from darekit.errors import CheckpointError, Unsupported
from darekit.wording import label, some

SAFETENSORS = ".safetensors"
SINGLE = {"safetensors": "model.safetensors", "pickle": "pytorch_model.bin"}
INDEX = {kind: f"{name}.index.json" for kind, name in SINGLE.items()}
SHARD_NAME = re.compile(r".*-of-(\d{1,9})\.safetensors")
SERIES = re.compile(r"(?<=-)\d+(?=-of-\d+)")  # what differs between the shards of one model
NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})(?P<suffix>\.safetensors|\.bin)")
INDEX_NAME = re.compile(r"(?P<stem>.+\.(?:safetensors|bin))\.index(?:\.(?P<variant>[^.]+))?\.json")
VARIANT_NAME = re.compile(
    r"(?:model|pytorch_model|diffusion_pytorch_model)(?:-\d+-of-\d+)?\.(?P<variant>[^.]+?)(?:-\d+-of-\d+)?"
    r"\.(?:safetensors|bin)"
)

VALUE_HEAD = "value_head.bin"  # of LLaMA-Factory
COPIES = ("consolidated", "model.", "model-", "pytorch_model")  # how files that hold the same model again begin

Kind = Literal["safetensors", "pickle"]
KINDS: tuple[Kind, ...] = ("safetensors", "pickle")


@dataclass(frozen=True)
class Weights:
    """The files that hold a checkpoint's tensors.

    Attributes:
        kind: what they are read with.
        files: all that the loader reads, in its order.
        index: tensor -> file name, as the index says; None without one.
        index_path: the index.
        notes: lines worth telling the user.
    """

    kind: Kind
    files: tuple[Path, ...]
    index: Mapping[str, str] | None = None
    index_path: Path | None = None
    notes: tuple[str, ...] = ()


def find_weights(directory: Path) -> Weights:
    """Directory -> its files of weights; safetensors before pickled ones.

    Raises:
        CheckpointError: there are none, or more than one answer.
        Unsupported: there are only files of a kind that darekit does not read.
    """
    names = list_names(directory)
    for kind in KINDS:
        # A variant (fp16) is somebody's second copy: it counts only where there is no other.
        if found := _find_standard(directory, kind) or _find_other(directory, kind, names, variants=False):
            return replace(found, notes=(*found.notes, *_unread(directory, found, names)))
    for kind in KINDS:
        if found := _find_other(directory, kind, names, variants=True):
            return found
    if advice := advise(directory, names):
        raise Unsupported(advice)
    raise CheckpointError(
        f"{directory} holds no weights: expected {SINGLE['safetensors']}, or shards with {INDEX['safetensors']}; "
        f"found {some(names) if names else 'an empty directory'}"
    )


def list_names(directory: Path) -> list[str]:
    """Names of a directory's entries, sorted."""
    try:
        return sorted(path.name for path in directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be listed: {error.strerror or error}") from error


def read_index(path: Path) -> dict[str, str]:
    """Index file of shards -> tensor name -> file name, every file name plain.

    Raises:
        CheckpointError: the index is malformed, or a file name would leave the directory.
    """
    index = read_object(path, strict=True).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path}: weight_map is {shorten(index)}, expected an object of tensor name -> file name")
    suffix = ".bin" if path.name.startswith(SINGLE["pickle"]) else SAFETENSORS
    checked: set[str] = set()
    for name, file in index.items():
        if isinstance(file, str) and file in checked:  # shards are few, tensors may be very many
            continue
        at = f"{path}: tensor {shorten(name)} lies in {shorten(file)}"
        if not isinstance(file, str):
            raise CheckpointError(f"{at}; expected the name of a file")
        # Backslash and colon are separators on Windows only, and no shard has them in its name.
        if file in ("", ".", "..") or any(character in file for character in "/\\:\0"):
            raise CheckpointError(f"{at}; expected a plain file name: no folder, no absolute path, no '..'")
        if not file.endswith(suffix):
            raise CheckpointError(f"{at}; expected a name that ends in {suffix}")
        checked.add(file)
    return index


def refuse_name(path: Path) -> None:
    """Refuse a single file by its name.

    Raises:
        Unsupported: an adapter, or a kind that darekit does not read.
    """
    if advice := about_file(path):
        raise Unsupported(advice)
    if path.suffix in (".yaml", ".yml"):
        raise Unsupported(
            f"{path} looks like a recipe, but a model is expected here: write it out first with "
            f"`dare merge {path} OUT`, and name OUT"
        )
    if path.suffix not in (SAFETENSORS, ".bin"):
        raise Unsupported(f"{path} is not read: expected a directory, a {SAFETENSORS} file or an org/name on the Hub")


def _find_standard(directory: Path, kind: Kind) -> Weights | None:
    single, index_path = directory / SINGLE[kind], directory / INDEX[kind]
    # A dangling link counts: it is opened later, and reported there.
    has_single = single.exists() or single.is_symlink()
    if not index_path.exists():
        return Weights(kind, (single,)) if has_single else None
    index = read_index(index_path)
    files = sorted(set(index.values()))
    if has_single and single.name not in files:
        if not any((directory / name).exists() for name in files):  # left behind by an older, sharded version
            return Weights(kind, (single,))
        raise CheckpointError(
            f"{directory} has both {single.name} and shards with {index_path.name}; which of them is the model? Remove "
            f"one, or give the file itself: {single}"
        )
    if not any((directory / name).exists() for name in files):
        shards = _whole_series(kind, list_names(directory))
        if shards:
            return _unindexed(directory, kind, shards, f"{index_path.name} names files that are not there")
    return _indexed(kind, index_path, index)


def _find_other(directory: Path, kind: Kind, names: Sequence[str], *, variants: bool) -> Weights | None:
    """Weights under other names than the usual ones, or a variant of them such as fp16."""
    files = [
        name for name in names if _is_weights(name, kind) and (VARIANT_NAME.fullmatch(name) is not None) == variants
    ]
    indices = [
        name
        for name in names
        if (index := INDEX_NAME.fullmatch(name))
        and _is_weights(index["stem"], kind)
        and bool(index["variant"]) == variants
    ]
    if not variants and not indices and (shards := _whole_series(kind, files)):
        return _unindexed(directory, kind, shards, "there is no index")
    if kind == "pickle" and not variants:  # whatever else is called .bin is something else: training_args.bin
        return None
    notes: list[str] = []
    if variants and files:
        found = sorted({match["variant"] for name in files if (match := VARIANT_NAME.fullmatch(name))})
        if len(found) > 1:
            raise CheckpointError(
                f"{directory} has its weights in {len(found)} variants ({', '.join(found)}) and no plain one. "
                f"Give the file of one, or leave only one: {some(files)}"
            )
        notes = [f"{label(str(directory))} has only the variant {found[0]} of its weights: that is read"]
    if len(indices) == 1 and files:
        path = directory / indices[0]
        return _indexed(kind, path, read_index(path), notes)
    if len(files) == 1:
        return replace(_take_only(directory, kind, files[0]), notes=tuple(notes))
    if files and (absent := _absent(files)):
        raise CheckpointError(
            f"{directory} has {some(files)}, but neither {INDEX[kind]} nor {some(absent)}. Download the model again"
        )
    if (saves := {SERIES.sub("*", name) for name in files}) and len(saves) > 1 and all(map(NUMBERED.fullmatch, files)):
        raise CheckpointError(
            f"{directory} has shards of {len(saves)} saves of a model ({some(sorted(saves))}), and no {INDEX[kind]} "
            "that says which is meant: remove all but one"
        )
    if files:
        raise CheckpointError(
            f"{directory} has {len(files)} {kind if kind == 'safetensors' else 'pickled'} files ({some(files)}), but "
            f"neither {SINGLE[kind]} nor {INDEX[kind]}, so their order and completeness are unknown. "
            "Restore the index, or give one file"
        )
    return None


def _whole_series(kind: Kind, names: Sequence[str]) -> tuple[str, ...]:
    """The shards of a model, if they are all there by their numbers, and no other file of weights is; else ()."""
    files = [name for name in names if _is_weights(name, kind) and not VARIANT_NAME.fullmatch(name)]
    if kind == "pickle":
        files = [name for name in files if NUMBERED.fullmatch(name)]
    return tuple(files) if len(files) > 1 and _absent(files) == [] else ()


def _absent(files: Sequence[str]) -> list[str] | None:
    """Which shards of one series are missing among files; None: they are no series."""
    found = [NUMBERED.fullmatch(name) for name in files]
    kinds = {(one["stem"], one["count"], one["suffix"]) for one in found if one}
    if len(kinds) != 1 or None in found:
        return None
    stem, count, suffix = kinds.pop()
    if int(count) > 2 * len(files) + 8:  # nobody wants to read of them one by one
        return [f"the rest of the {int(count)} shards"]
    first = 0 if any(one and int(one["number"]) == 0 for one in found) else 1  # some tools begin at 0
    numbered = [f"{stem}-{first + k:0{len(count)}}-of-{count}{suffix}" for k in range(int(count))]
    return [name for name in numbered if name not in files]


def _unindexed(directory: Path, kind: Kind, files: Sequence[str], why: str) -> Weights:
    """Shards that are complete by their numbers: names say what is in them, so nothing hangs on an index."""
    note = f"{label(str(directory))}: {why}: its {len(files)} shards are complete by their numbers, and are read"
    return Weights(kind, tuple(directory / name for name in files), notes=(note,))


def _unread(directory: Path, found: Weights, names: Sequence[str]) -> Iterator[str]:
    """Weights that no loader of the model asks for, and that may matter all the same, as a value head in a file of its
    own. Second copies of the model (variants, Mistral's `consolidated`, shards of an older save) are not spoken of."""
    read = {path.name for path in found.files}
    series = {SERIES.sub("", name) for name in read}
    others = [
        name
        for name in names
        if (_is_weights(name, "safetensors") or name == VALUE_HEAD)
        and name not in read
        and SERIES.sub("", name) not in series
        and not SHARD_NAME.fullmatch(name)
        and not VARIANT_NAME.fullmatch(name)
        and not name.startswith(COPIES)
    ]
    if others:
        yield (
            f"{label(str(directory))}: {some(others)} {'is' if len(others) == 1 else 'are'} neither read nor copied: "
            f"the model is in {some([path.name for path in found.files], 2)}"
        )


def _is_weights(name: str, kind: Kind) -> bool:
    suffix = SAFETENSORS if kind == "safetensors" else ".bin"
    return name.endswith(suffix) and not is_adapter(name)


def _indexed(kind: Kind, path: Path, index: Mapping[str, str], notes: Sequence[str] = ()) -> Weights:
    """The shards that an index names: all of them are read, and nothing else is, as transformers does."""
    directory, files = path.parent, sorted(set(index.values()))
    missing = [name for name in files if not (directory / name).exists()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {some(missing)}, {len(missing)} of the {len(files)} files that {path.name} "
            "names. Download the model again"
        )
    series = {SERIES.sub("", name) for name in files}
    others = [name for name in list_names(directory) if name not in files and SERIES.sub("", name) in series]
    if others:
        notes = (
            *notes,
            f"{label(str(directory))}: {path.name} does not name {some(others)}: not read, as transformers does not",
        )
    return Weights(kind, tuple(directory / name for name in files), index, path, tuple(notes))


def _take_only(directory: Path, kind: Kind, name: str) -> Weights:
    shard = SHARD_NAME.fullmatch(name)
    if shard and int(shard[1]) > 1:
        raise CheckpointError(
            f"{directory} has {name}, one of {int(shard[1])} shards, without the others and without "
            f"{INDEX['safetensors']}. Download the model again"
        )
    return Weights(kind, (directory / name,))
