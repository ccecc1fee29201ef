# SPDX-License-Identifier: Apache-2.0
"""The safetensors format: strict parsing of a file's header, and the layout of files to be written.

A file is the header's length (8 bytes, little-endian), the header (JSON), and the tensors' raw little-endian bytes.
The header maps each name to its `dtype`, `shape` and `data_offsets` [begin, end), counted from the header's end;
`__metadata__` may map strings to strings. The tensors cover the data exactly: no hole, no overlap, nothing behind.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from types import MappingProxyType
from typing import Any

from darekit.checkpoints.documents import parse_object, shorten
from darekit.checkpoints.files import InputFile
from darekit.dtypes import DTYPES, POWERS, dtype_named
from darekit.errors import CheckpointError, PlanError, Unsupported

HEADER_LIMIT = 100_000_000  # the format's own limit, in bytes
DIMENSION_LIMIT = 64  # numpy's and torch's
COUNT_LIMIT = (1 << 63) - 1  # of elements and bytes, everywhere a signed 64-bit number
METADATA = "__metadata__"
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
QUANTISED = ("F6_E2M3", "F6_E3M2", "F4")  # number formats that mean nothing by themselves
SINGLE = "model.safetensors"
LFS_POINTER = b"version https://git-lfs"
# How files of other formats begin that were given this one's name.
OTHERS = {
    b"PK\x03\x04": "it is a zip archive, as torch.save writes. If it holds a model, name it pytorch_model.bin",
    b"GGUF": "it is a GGUF file under another name. Give the original checkpoint",
    b"\x89HDF": "it is an HDF5 file, as TensorFlow's weights are. Save the model in safetensors",
}


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor's bytes lie in a file; `offset` counts from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One file to be written: `header` (with its length in front) at 0, then the tensors, `size` bytes in all."""

    filename: str
    header: bytes
    size: int
    placements: tuple[Placement, ...]


def read_placements(file: InputFile) -> tuple[Placement, ...]:
    """Header of a safetensors file -> its tensors, in the order of their bytes; errors as `read_header`."""
    return read_header(file)[1]


def read_header(file: InputFile) -> tuple[dict[str, str], tuple[Placement, ...]]:
    """Header of a safetensors file -> its metadata, and its tensors in the order of their bytes.

    Raises:
        CheckpointError: the file is malformed; the message says how and where.
        Unsupported: a tensor's number format is not one of `DTYPES`.
    """
    where = str(file.path)
    if file.size < 8:
        raise CheckpointError(
            f"{where} is not a safetensors file: it has {file.size} bytes, and the header alone has more"
        )
    length = int.from_bytes(file.read(0, 8), "little")
    _check_length(file, length)
    text = file.read(8, length)
    if not text.startswith(b"{"):
        raise CheckpointError(f"{where} is not a safetensors file: its header begins with {text[:8]!r}, expected '{{'")
    header = parse_object(text, f"the header of {where}", strict=True)
    metadata = header.pop(METADATA, {})
    _check_metadata(metadata, where)
    known: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...], int]] = {}
    placements = [_read_entry(name, entry, 8 + length, where, known) for name, entry in header.items()]
    placements.sort(key=lambda place: (place.offset, place.nbytes))  # an empty tensor before its full neighbour
    _check_cover(placements, 8 + length, file)
    return metadata, tuple(placements)


def lay_out(
    tensors: Sequence[OutputTensor], shard_size: int, *, metadata: Mapping[str, str] = MappingProxyType({})
) -> tuple[Shard, ...]:
    """Tensors in canonical order -> files of at most `shard_size` bytes of data each, with every offset.

    `metadata` goes into each file's, beside what transformers wants there.

    A shard takes tensors in the given order until the next one does not fit; a tensor larger than `shard_size` has
    a shard of its own. Within a shard larger elements come first, so that every tensor is aligned to its elements.

    Raises:
        PlanError: `shard_size` or a name is impossible.
    """
    if shard_size < 1:
        raise PlanError(f"shard size {shard_size} is impossible; expected at least 1 byte")
    names = {tensor.name for tensor in tensors}
    if len(names) != len(tensors) or METADATA in names:
        twice = sorted(name for name in names if sum(t.name == name for t in tensors) > 1)
        raise PlanError(f"tensors cannot be written under these names: {twice or METADATA!r} (reserved, or used twice)")
    groups: list[list[tuple[OutputTensor, int]]] = [[]]
    filled = 0
    for tensor in tensors:
        nbytes = _count_bytes(tensor.dtype, tensor.shape)
        if groups[-1] and filled + nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append((tensor, nbytes))
        filled += nbytes
    if len(groups) == 1:
        return (_fill(SINGLE, groups[0], metadata),)
    return tuple(
        _fill(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group, metadata)
        for number, group in enumerate(groups, start=1)
    )


def index_json(shards: Sequence[Shard]) -> str:
    """The text of `model.safetensors.index.json`: which file holds which tensor, and the bytes of all tensors."""
    places = sorted((place.name, shard.filename) for shard in shards for place in shard.placements)
    total = sum(place.nbytes for shard in shards for place in shard.placements)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(places)}, indent=2) + "\n"


def _fill(filename: str, group: Sequence[tuple[OutputTensor, int]], metadata: Mapping[str, str]) -> Shard:
    # Sorting is stable: equal element sizes stay in canonical order.
    ordered = sorted(group, key=lambda item: -DTYPES[item[0].dtype].itemsize)
    first = {METADATA: {"format": "pt", **metadata}}  # transformers refuses files without it
    # Line by line: as one object to dump, the header of very many tensors would take many times its own size.
    entries = [json.dumps(first, separators=(",", ":"), ensure_ascii=False)[1:-1]]
    begins, end = [], 0
    for tensor, nbytes in ordered:
        shape = ",".join(map(str, tensor.shape))
        entries.append(
            f'{encode_basestring(tensor.name)}:{{"dtype":"{tensor.dtype}","shape":[{shape}],'
            f'"data_offsets":[{end},{end + nbytes}]}}'
        )
        begins.append(end)
        end += nbytes
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % 8)  # the data, and with it every tensor, begins aligned
    if len(text) > HEADER_LIMIT:
        raise PlanError(f"{filename} would need a header of {len(text):,} bytes; the format allows {HEADER_LIMIT:,}")
    start = 8 + len(text)
    placements = tuple(
        Placement(tensor.name, tensor.dtype, tensor.shape, start + begin, nbytes)
        for (tensor, nbytes), begin in zip(ordered, begins, strict=True)
    )
    return Shard(filename, len(text).to_bytes(8, "little") + text, start + end, placements)


def _count_bytes(dtype: str, shape: Sequence[int]) -> int:
    count = dtype_named(dtype).itemsize
    for dimension in shape:
        count *= dimension
    return count


def _check_length(file: InputFile, length: int) -> None:
    where = file.path
    if length <= min(HEADER_LIMIT, file.size - 8):
        if length < 2:
            raise CheckpointError(
                f"{where} is not a safetensors file: its header has {length} bytes, expected at least 2"
            )
        return
    begin = file.read(0, min(file.size, 64))
    if begin.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{where} is a Git LFS pointer, not the weights themselves: run `git lfs pull` in its directory"
        )
    if told := next((words for start, words in OTHERS.items() if begin.startswith(start)), None):
        raise CheckpointError(f"{where} is not a safetensors file: {told}")
    if length > HEADER_LIMIT and begin[:8].isascii() and begin[:8].decode("ascii").isprintable():
        text = shorten(begin[:24].decode("ascii", "replace"))
        raise CheckpointError(
            f"{where} is not a safetensors file: it begins with the text {text}, as a web page or an error message "
            "does that was saved in its place. Download it again"
        )
    if length > HEADER_LIMIT:
        raise CheckpointError(
            f"{where} is not a safetensors file: its header would have {length:,} bytes, the format allows "
            f"{HEADER_LIMIT:,}"
        )
    raise CheckpointError(
        f"{where} is truncated: its header has {length:,} bytes, but the file only {file.size:,}. Download it again"
    )


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(
            f"the header of {where} has a {METADATA} that does not map strings to strings, as its format asks: write "
            "the file again, every value as text"
        )


def _at(where: str, name: str) -> str:
    return f"{where}, tensor {shorten(name)}"


def _read_entry(
    name: str,
    entry: Any,
    start: int,
    where: str,
    known: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...], int]],
) -> Placement:
    """One entry of a header, checked. `known`: formats and shapes that were measured, with their bytes.

    There may be very many entries: equal names, formats and shapes become one object.
    """
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
            raise CheckpointError(f"{_at(where, name)}: the name is not Unicode text") from None
    if not isinstance(entry, dict) or entry.keys() != ENTRY_KEYS:
        raise CheckpointError(
            f"{_at(where, name)}: found {shorten(entry)}, expected an object with dtype, shape and data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in (*DTYPES, POWERS.name):
        told = "" if dtype not in QUANTISED else ": it is one of quantised weights and their scales; dequantise first"
        raise Unsupported(
            f"{_at(where, name)}: number format {shorten(dtype)} is not supported; darekit reads "
            f"{', '.join(DTYPES)}{told}"
        )
    # True and 1.0 are equal to 1, and no sizes: what was measured counts for whole numbers alone.
    plain = isinstance(shape, list) and set(map(type, shape)) <= {int}
    found = known.get((dtype, tuple(shape))) if plain else None
    if found is None:
        nbytes = _measure(dtype, shape, where, name)
        found = known[dtype, tuple(shape)] = dtype_named(dtype).name, tuple(shape), nbytes
    format, sizes, nbytes = found
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_natural, offsets)):
        raise CheckpointError(
            f"{_at(where, name)}: data_offsets {shorten(offsets)} are not two whole numbers, 0 or more"
        )
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{_at(where, name)}: its data begins at {begin}, after its end at {end}")
    if end - begin != nbytes:
        raise CheckpointError(
            f"{_at(where, name)}: shape {shape} of {dtype} needs {nbytes:,} bytes, data_offsets [{begin}, {end}] hold "
            f"{end - begin:,}"
        )
    return Placement(sys.intern(name), format, sizes, start + begin, nbytes)


def _measure(dtype: str, shape: Any, where: str, name: str) -> int:
    if not isinstance(shape, list) or not all(map(_is_natural, shape)):
        raise CheckpointError(f"{_at(where, name)}: shape {shorten(shape)} is not a list of whole numbers, 0 or more")
    if len(shape) > DIMENSION_LIMIT:
        raise CheckpointError(
            f"{_at(where, name)}: shape has {len(shape)} dimensions; at most {DIMENSION_LIMIT} are possible"
        )
    nbytes = dtype_named(dtype).itemsize
    for dimension in shape:
        nbytes *= dimension
        # Checked at each step: [2^62, 4, 0] is an attack too, on readers that multiply in 64 bits.
        if max(nbytes, dimension) > COUNT_LIMIT:
            raise CheckpointError(
                f"{_at(where, name)}: shape {shorten(shape)} overflows: no file has that many elements"
            )
    return nbytes


def _check_cover(placements: Sequence[Placement], start: int, file: InputFile) -> None:
    end, last = start, None
    for place in placements:
        if place.offset != end:
            at, before = _at(str(file.path), place.name), shorten(last.name) if last else "the header"
            if place.offset < end:
                raise CheckpointError(f"{at}: its data overlaps that of {before} by {end - place.offset:,} bytes")
            raise CheckpointError(f"{at}: a hole of {place.offset - end:,} bytes lies between it and {before}")
        end, last = place.offset + place.nbytes, place
    if file.size < end:
        raise CheckpointError(
            f"{file.path} is truncated: its tensors end at byte {end:,}, the file at {file.size:,}. Download it again"
        )
    if file.size > end:
        raise CheckpointError(f"{file.path} has {file.size - end:,} bytes behind its last tensor; expected none")


def _is_natural(value: Any) -> bool:
    return type(value) is int and value >= 0  # bool is an int for isinstance
