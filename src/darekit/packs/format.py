# SPDX-License-Identifier: Apache-2.0
"""The file format of packs, version 1: a safetensors file whose metadata hold one JSON document.

What lies in the file beside the document are parts: arrays named ROLE:TENSOR. docs/pack-format.md is the reference;
every malformation is found here, before a value is used, at a cost that the file's own size bounds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import xxhash

from darekit.checkpoints import InputFile, OutputTensor, Placement, natural_key, read_header
from darekit.checkpoints.digests import LEAF, digest_pieces
from darekit.checkpoints.documents import parse_object, shorten
from darekit.checkpoints.safetensors import HEADER_LIMIT
from darekit.dtypes import DTYPES, Bytes, DType
from darekit.errors import CheckpointError, PlanError, Unsupported
from darekit.masks import threshold_of
from darekit.packs.opening import DOCUMENT_KEY
from darekit.packs.quantization import groups_in

FORMAT = "darekit-pack"
VERSION = 1
MASK = "philox4x32-10/1"
DIGEST_KEY = "darekit_header_digest"
NO_DIGEST = "0" * 32

Kind = Literal["same", "delta", "lossless"]
Counts = npt.NDArray[np.int64]

CODECS = ("none", "zstd")
# Bits per stored integer; the other encodings store one number of the values part's own format per kept element.
INTEGER_BITS = {"int8": 8, "int4": 4, "int2": 2, "int1": 1}
ENCODINGS = ("exact", "delta", *INTEGER_BITS)
RESCALES = ("paper", "none")
ROLES = ("values", "scales", "leaves", "rows", "frames", "sizes")
FILE_ROLE = "file"
# Names of companions become paths: plain names, in folders of plain names.
PATH = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]*/){0,3}[A-Za-z0-9_-][A-Za-z0-9._-]*")
GROUP_LIMIT = 1 << 16
ROLE_DTYPES = {
    "scales": ("BF16",), "leaves": ("I8", "U16", "U32"), "rows": ("U8",), "frames": ("U8",), "sizes": ("U16", "U32"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One tensor of a pack.

    Attributes:
        name: as in the base.
        dtype: format of the result, by its safetensors name.
        shape: of the result, and of the base's tensor.
        kind: same (the base's bytes), delta (kept elements of it), lossless (changed bytes of it).
        drop_rate: of the mask; 0 keeps every element.
        encoding: of a delta's values.
        group: kept elements that share a scale, counted from the start of every leaf; 0 if there are no scales.
        kept: stored elements.
        codec: zstd: the values are stored in compressed frames, one per leaf.
        values: format of the values within frames, by its safetensors name; empty if there are none.
        base: content digest of the base's tensor.
        result: content digest of the result.
        stored: digest of the parts, see `stored_digest`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: Kind
    drop_rate: float = 0.0
    encoding: str = "exact"
    group: int = 0
    kept: int = 0
    codec: str = "none"
    values: str = ""
    base: str = NO_DIGEST
    result: str = NO_DIGEST
    stored: str = NO_DIGEST

    @property
    def count(self) -> int:
        """Elements of the result."""
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Elements per row: what one index of the first axis spans."""
        return max(1, math.prod(self.shape[1:]))

    @property
    def leaves(self) -> int:
        """Runs of 64Ki elements, the last one shorter."""
        return -(-self.count // LEAF)

    @property
    def bits(self) -> int:
        """Per stored integer; 0 where values are numbers."""
        return INTEGER_BITS.get(self.encoding, 0)

    @property
    def verbatim(self) -> bool:
        """Whether the stored elements are the result's, without arithmetic."""
        return self.kind == "delta" and self.drop_rate == 0 and self.encoding == "exact"

    def to_data(self) -> dict[str, Any]:
        """JSON-able form, without what the kind has no use for."""
        unused = [] if self.kind == "delta" else ["drop_rate", "encoding", "group", "kept"]
        unused += [] if self.codec != "none" else ["codec", "values"]
        data = {key: value for key, value in asdict(self).items() if key not in ("name", *unused)}
        return {**data, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class CompanionFile:
    """A small file that belongs to the model; stored where it is not the base's own. `digest`: xxh3-128."""

    name: str
    stored: bool
    digest: str


@dataclass(frozen=True)
class Document:
    """What a pack says of itself. `base`, `model` and `settings` are for people, but for those named below.

    Attributes:
        seed: effective seed of the mask.
        rescale: paper (kept deltas times 1/(1-p)) or none.
        tensors: by name, in canonical order.
        files: the model's companions.
        base: ref, revision, sample_digest, content_digest of the base; `sample_digest` binds.
        model: ref and revision of what was packed.
        settings: how it was packed.
        content_digest: of the result.
        license: of the model, where known.
        tool: who wrote the file.
    """

    seed: int
    rescale: str
    tensors: Mapping[str, PackedTensor]
    files: tuple[CompanionFile, ...]
    base: Mapping[str, Any]
    model: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    content_digest: str = NO_DIGEST
    license: str | None = None
    tool: str = ""

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "mask": MASK,
            "tool": self.tool,
            "seed": self.seed,
            "rescale": self.rescale,
            "base": dict(self.base),
            "model": dict(self.model),
            "settings": dict(self.settings),
            "license": self.license,
            "content_digest": self.content_digest,
            "files": [asdict(file) for file in self.files],
            "tensors": {name: tensor.to_data() for name, tensor in self.tensors.items()},
        }


@dataclass(frozen=True)
class LeafTable:
    """Where each leaf's values (or frame) and scales begin.

    `counts`: kept elements, of lossless tensors bytes, (leaves,); the others (leaves + 1,) bytes.
    """

    counts: Counts
    values: Counts
    scales: Counts


def leaf_table(tensor: PackedTensor, counts: Counts, itemsize: int, frames: Counts | None = None) -> LeafTable:
    """Kept elements of each leaf, (leaves,) -> where its bytes lie; every leaf begins at a whole byte and group.

    `frames`: bytes of each leaf's frame, where there are frames.
    """
    sizes = value_sizes(tensor, counts, itemsize) if frames is None else frames
    groups = groups_in(counts, tensor.group) if tensor.group else np.zeros_like(counts)
    return LeafTable(counts, _starts(sizes), _starts(2 * groups))


def value_sizes(tensor: PackedTensor, counts: Any, itemsize: int) -> Any:
    """Kept elements, a number or (leaves,) -> bytes of their values outside frames."""
    return -(-counts * tensor.bits // 8) if tensor.bits else counts * itemsize


def expected_counts(tensor: PackedTensor) -> Counts:
    """What a mask keeps of each leaf on average, rounded down, (leaves,); `leaves` of I8 hold differences from it."""
    found: Counts = full_counts(tensor) * ((1 << 32) - int(threshold_of(tensor.drop_rate))) >> 32
    return found


def full_counts(tensor: PackedTensor) -> Counts:
    """Elements of each leaf, (leaves,)."""
    counts = np.full(tensor.leaves, LEAF, np.int64)
    if tensor.count % LEAF:
        counts[-1] = tensor.count % LEAF
    return counts


def _starts(sizes: Counts) -> Counts:
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)


def needs_table(tensor: PackedTensor, rows: bool) -> bool:
    """Whether the counts of the leaves are stored: not where every element is."""
    return tensor.kind == "lossless" or tensor.drop_rate > 0 or rows


def stored_digests(values: Bytes, ends: Sequence[int], scales: Bytes, scale_ends: Sequence[int]) -> list[bytes]:
    """Of each leaf's values or frame, which end at `ends` in (n,) uint8, and of its scales behind them."""
    if not scales.size:
        return digest_pieces(values, ends)
    pieces: list[Bytes] = []
    joined: list[int] = []
    begin = scaled = 0
    for end, scales_end in zip(ends, scale_ends, strict=True):
        pieces += [values[begin:end], scales[scaled:scales_end]]
        joined.append(end + scales_end)
        begin, scaled = end, scales_end
    return digest_pieces(np.concatenate(pieces), joined)


def stored_digest(parts: Sequence[bytes]) -> str:
    """Digests of the rows part and of the leaves part (where there are), and of each leaf's bytes -> one."""
    return xxhash.xxh3_128_hexdigest(b"".join(parts))


# --- writing


@dataclass(frozen=True)
class Layout:
    """Where the parts of a file to be written lie. `data`: offset of the first byte behind the header."""

    places: Mapping[str, Placement]
    data: int
    size: int


def lay_out_parts(parts: Sequence[OutputTensor], document: Document) -> Layout:
    """Parts in order -> their places: larger elements first, so that everything is aligned."""
    ordered = sorted(parts, key=lambda part: -DTYPES[part.dtype].itemsize)
    start = len(render_header(document, [Placement(p.name, p.dtype, p.shape, 0, 0) for p in ordered], 0, True))
    places, end = {}, start
    for part in ordered:
        nbytes = math.prod(part.shape) * DTYPES[part.dtype].itemsize
        places[part.name] = Placement(part.name, part.dtype, part.shape, end, nbytes)
        end += nbytes
    return Layout(places, start, end)


def render_header(document: Document, places: Sequence[Placement], data: int, measure: bool = False) -> bytes:
    """The first bytes of a pack: length, JSON, and blanks up to `data`; its digest stands in it.

    With `measure` the size for the largest possible offsets: so the place of the data is known before the header is.
    """
    text = json.dumps(document.to_data(), separators=(",", ":"))
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, DIGEST_KEY: NO_DIGEST, DOCUMENT_KEY: text}}
    for place in places:
        begin = (1 << 62) if measure else place.offset - data
        end = begin + place.nbytes
        header[place.name] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": [begin, end]}
    found = json.dumps(header, separators=(",", ":")).encode()
    size = 8 + len(found) if measure else data
    size += -size % 64 if measure else 0
    if size > HEADER_LIMIT:
        raise PlanError(f"the pack would need a header of {size:,} bytes; safetensors allows {HEADER_LIMIT:,}")
    found += b" " * (size - 8 - len(found))
    found = found.replace(NO_DIGEST.encode(), xxhash.xxh3_128_hexdigest(found).encode(), 1)
    return (size - 8).to_bytes(8, "little") + found


# --- reading


@dataclass(frozen=True)
class Parts:
    """The parts of one tensor; None: there is no such part."""

    values: Placement | None = None
    scales: Placement | None = None
    leaves: Placement | None = None
    rows: Placement | None = None
    frames: Placement | None = None
    sizes: Placement | None = None


@dataclass(frozen=True)
class PackFile:
    """An open pack whose header and tables are checked. `tables` and `rows` only of the tensors that have them."""

    file: InputFile
    document: Document
    parts: Mapping[str, Parts]
    files: Mapping[str, Placement]
    tables: Mapping[str, LeafTable]
    rows: Mapping[str, Bytes]

    def value_dtype(self, tensor: PackedTensor) -> DType:
        """Format of the stored values."""
        place = self.parts[tensor.name].values
        return DTYPES[tensor.values if place is None else place.dtype]

    def stored_bytes(self, tensor: PackedTensor) -> int:
        """Bytes of a tensor's values (or frames) and scales: what is read to decode all of it."""
        parts = self.parts[tensor.name]
        return sum(place.nbytes for place in (parts.values, parts.frames, parts.scales) if place is not None)

    def read_leaf(self, tensor: PackedTensor, leaf: int) -> tuple[Bytes, Bytes]:
        """Raw bytes of one leaf's values (or frame) and of its scales."""
        return self.read_leaves(tensor, leaf, leaf + 1)

    def read_leaves(
        self, tensor: PackedTensor, first: int, last: int, room: Callable[[int], Bytes] | None = None
    ) -> tuple[Bytes, Bytes]:
        """Raw bytes of the values (or frames) of leaves first .. last, one behind the other, and of their scales.

        `room`: gives the memory that values are read into, (n,) uint8 for n; new memory, where there is none.
        """
        parts, table = self.parts[tensor.name], self.tables[tensor.name]
        begin, end = int(table.values[first]), int(table.values[last])
        values = room(end - begin) if room else np.empty(end - begin, np.uint8)
        place = parts.values or parts.frames
        if place is not None and values.size:
            self.file.read_into(values, place.offset + begin)
        if parts.scales is None:
            return values, np.empty(0, np.uint8)
        begin, end = int(table.scales[first]), int(table.scales[last])
        scales = np.empty(end - begin, np.uint8)
        if scales.size:
            self.file.read_into(scales, parts.scales.offset + begin)
        return values, scales

    def read_part(self, place: Placement) -> Bytes:
        """All bytes of one part."""
        raw = np.empty(place.nbytes, np.uint8)
        if raw.size:
            self.file.read_into(raw, place.offset)
        return raw


def read_pack(file: InputFile) -> PackFile:
    """Open file -> its document, parts and tables, all checked against one another.

    Raises:
        Unsupported: another version, mask, kind or encoding.
        CheckpointError: malformed; the message names the file and the tensor.
    """
    where = str(file.path)
    metadata, places = read_header(file)
    if DOCUMENT_KEY not in metadata:
        raise CheckpointError(
            f"{where} is a safetensors file but not a pack: its metadata has no {DOCUMENT_KEY}; expected a file "
            "written by `dare pack`"
        )
    data = parse_object(
        metadata[DOCUMENT_KEY].encode("utf-8", "surrogatepass"), f"the document of {where}", strict=True
    )
    for key, expected in (("format", FORMAT), ("version", VERSION), ("mask", MASK)):
        if data.get(key) != expected or type(data.get(key)) is not type(expected):
            raise Unsupported(
                f"{where}: pack {key} {shorten(data.get(key))}; this darekit reads {expected!r}. "
                "A newer darekit may read it: pip install -U darekit"
            )
    _check_header_digest(file, metadata)
    document = _read_document(data, where)
    parts, files = _sort_parts(document, places, where)
    tables, rows = {}, {}
    for name, tensor in document.tensors.items():
        if tensor.kind == "same":
            continue
        table, bitmap = _read_table(tensor, parts[name], file, f"{where}, tensor {shorten(name)}")
        tables[name] = table
        if bitmap is not None:
            rows[name] = bitmap
    return PackFile(file, document, parts, files, tables, rows)


def _check_header_digest(file: InputFile, metadata: Mapping[str, str]) -> None:
    length = int.from_bytes(file.read(0, 8), "little")
    digest = metadata.get(DIGEST_KEY, "")
    text = file.read(8, length)
    if text.count(digest.encode()) != 1 or digest == NO_DIGEST:
        raise CheckpointError(f"{file.path}: its metadata has no {DIGEST_KEY} of its own: the header is damaged")
    if xxhash.xxh3_128_hexdigest(text.replace(digest.encode(), NO_DIGEST.encode())) != digest:
        raise CheckpointError(f"{file.path}: the header does not match its own digest: it is damaged")


def _read_document(data: Mapping[str, Any], where: str) -> Document:
    def take(owner: Mapping[str, Any], key: str, kind: type, at: str) -> Any:
        value = owner.get(key)
        if type(value) is not kind:
            raise CheckpointError(f"{at}: {key} is {shorten(value)}, expected {_words(kind)}")
        return value

    at = f"the document of {where}"
    seed = take(data, "seed", int, at)
    if not 0 <= seed < 1 << 64:
        raise CheckpointError(f"{at}: seed {shorten(seed)} is not an unsigned 64-bit number")
    rescale = take(data, "rescale", str, at)
    if rescale not in RESCALES:
        raise Unsupported(f"{at}: rescale {shorten(rescale)} is not one of {', '.join(RESCALES)}")
    base = take(data, "base", dict, at)
    _check_digest(base.get("sample_digest"), f"{at}, base: sample_digest")
    if not isinstance(base.get("ref"), str):
        raise CheckpointError(f"{at}: base has no ref")
    model = take(data, "model", dict, at)
    _check_digest(data.get("content_digest"), f"{at}: content_digest")
    tensors = {}
    entries = take(data, "tensors", dict, at)
    for name in sorted(entries, key=natural_key):
        tensors[name] = _read_tensor(name, entries[name], f"{where}, tensor {shorten(name)}")
    files = []
    for entry in take(data, "files", list, at):
        if not isinstance(entry, dict):
            raise CheckpointError(f"{at}: files hold {shorten(entry)}, expected objects")
        name = take(entry, "name", str, at)
        if not PATH.fullmatch(name):
            raise CheckpointError(f"{at}: {shorten(name)} is not a plain file name")
        _check_digest(entry.get("digest"), f"{at}, file {name}: digest")
        files.append(CompanionFile(name, take(entry, "stored", bool, at), entry["digest"]))
    if len({file.name for file in files}) != len(files):
        raise CheckpointError(f"{at}: a file is listed twice")
    license = data.get("license")
    return Document(
        seed, rescale, tensors, tuple(files), base, model, take(data, "settings", dict, at),
        data["content_digest"], license if isinstance(license, str) else None, str(data.get("tool", "")),
    )  # fmt: skip


def _read_tensor(name: str, entry: Any, at: str) -> PackedTensor:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{at}: found {shorten(entry)}, expected an object")
    kind, dtype, shape = entry.get("kind"), entry.get("dtype"), entry.get("shape")
    if kind not in ("same", "delta", "lossless"):
        raise Unsupported(f"{at}: kind {shorten(kind)} is not one of same, delta, lossless")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Unsupported(f"{at}: number format {shorten(dtype)} is not one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape) or len(shape) > 64:
        raise CheckpointError(f"{at}: shape {shorten(shape)} is not a list of whole numbers, 0 or more")
    if math.prod(shape) >= 1 << 48:
        raise CheckpointError(f"{at}: shape {shorten(shape)} has more elements than any model")
    for key in ("base", "result", "stored"):
        _check_digest(entry.get(key), f"{at}: {key}")
    digests = {key: entry[key] for key in ("base", "result", "stored")}
    tensor = PackedTensor(name, dtype, tuple(shape), cast(Kind, kind), **digests)
    if kind != "delta":
        return tensor
    rate, encoding, group, kept = (entry.get(key) for key in ("drop_rate", "encoding", "group", "kept"))
    if type(rate) not in (int, float) or not 0 <= cast(float, rate) <= 1:
        raise CheckpointError(f"{at}: drop rate {shorten(rate)} is not a number from 0 to 1")
    if encoding not in ENCODINGS:
        raise Unsupported(f"{at}: encoding {shorten(encoding)} is not one of {', '.join(ENCODINGS)}")
    if DTYPES[dtype].kind != "float":
        raise CheckpointError(f"{at}: a delta of {dtype}, which is not a floating-point format")
    if type(group) is not int or not (1 <= group <= GROUP_LIMIT if encoding in INTEGER_BITS else group == 0):
        raise CheckpointError(f"{at}: group {shorten(group)} is impossible for {encoding}")
    if type(kept) is not int or not 0 <= kept <= math.prod(shape):
        raise CheckpointError(f"{at}: {shorten(kept)} kept elements of {math.prod(shape)}")
    codec, values = entry.get("codec", "none"), entry.get("values", "")
    if codec not in CODECS:
        raise Unsupported(f"{at}: codec {shorten(codec)} is not one of {', '.join(CODECS)}")
    if not isinstance(values, str) or values not in (DTYPES if codec != "none" else ("",)):
        raise CheckpointError(f"{at}: values of {shorten(values)}, which the codec {codec} does not allow")
    return PackedTensor(
        name, dtype, tuple(shape), "delta", float(cast(float, rate)), cast(str, encoding), group, kept, codec, values,
        **digests,
    )  # fmt: skip


def _check_digest(value: Any, at: str) -> None:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{32}", value):
        raise CheckpointError(f"{at} is {shorten(value)}, expected 32 hexadecimal digits")


def _words(kind: type) -> str:
    return {int: "a whole number", str: "a string", dict: "an object", list: "a list", bool: "true or false"}[kind]


def _sort_parts(
    document: Document, places: Sequence[Placement], where: str
) -> tuple[dict[str, Parts], dict[str, Placement]]:
    """Every part belongs to a tensor or file that wants it, and has a format that its role allows."""
    found: dict[str, dict[str, Placement]] = {name: {} for name in document.tensors}
    files = {}
    stored = {file.name for file in document.files if file.stored}
    for place in places:
        role, colon, name = place.name.partition(":")
        at = f"{where}: part {shorten(place.name)}"
        if role == FILE_ROLE and name in stored and place.dtype == "U8":
            files[name] = place
            continue
        if not colon or role not in ROLES or name not in found:
            raise CheckpointError(f"{at} belongs to no tensor of the document")
        if len(place.shape) != 1 or place.dtype not in ROLE_DTYPES.get(role, DTYPES):
            raise CheckpointError(f"{at} has {place.dtype} of shape {list(place.shape)}, which its role does not allow")
        found[name][role] = place
    if missing := stored - files.keys():
        raise CheckpointError(f"{where}: the file {sorted(missing)[0]} is missing")
    for name, tensor in document.tensors.items():
        wanted = _roles_of(tensor, "rows" in found[name])
        if set(found[name]) != set(wanted):
            raise CheckpointError(
                f"{where}, tensor {shorten(name)}: has the parts {sorted(found[name])}, expected {sorted(wanted)}"
            )
    return {name: Parts(**parts) for name, parts in found.items()}, files


def _roles_of(tensor: PackedTensor, rows: bool) -> tuple[str, ...]:
    if tensor.kind == "same":
        return ()
    if tensor.kind == "lossless":
        return ("frames", "leaves")
    roles = ["values"] if tensor.codec == "none" else ["frames", "sizes"]
    roles += [*(["scales"] if tensor.bits else []), *(["rows"] if rows else [])]
    return (*roles, *(["leaves"] if needs_table(tensor, rows) else []))


def _read_table(tensor: PackedTensor, parts: Parts, file: InputFile, at: str) -> tuple[LeafTable, Bytes | None]:
    """Counts of kept elements per leaf, checked against the sizes of all other parts; and the bitmap of rows."""
    # The shape is what a stranger says: nothing of its size is made before the file is known to be as large.
    for place, what in ((parts.leaves, "counts"), (parts.sizes, "sizes")):
        if place is not None and place.shape != (tensor.leaves,):
            raise CheckpointError(f"{at}: {what} of {place.shape[0]} leaves, but its shape has {tensor.leaves}")
    if (
        parts.leaves is None
        and parts.values is not None
        and 8 * parts.values.nbytes < tensor.count * (tensor.bits or 8)
    ):
        raise CheckpointError(
            f"{at}: values of {tensor.count:,} elements, but the file has {parts.values.nbytes:,} bytes"
        )
    full = full_counts(tensor)
    counts = full
    bitmap = None
    if parts.leaves is not None:
        counts = _read_counts(file, parts.leaves)
        if parts.leaves.dtype == "I8":
            counts += expected_counts(tensor)
    if tensor.kind == "lossless":
        assert parts.frames is not None
        starts = _starts(counts)
        if parts.frames.nbytes != starts[-1]:
            raise CheckpointError(f"{at}: its leaves take {starts[-1]:,} bytes, the file has {parts.frames.nbytes:,}")
        if np.any(counts > full * DTYPES[tensor.dtype].itemsize + 1):
            raise CheckpointError(f"{at}: a leaf is longer than its uncompressed bytes")
        return LeafTable(counts, starts, np.zeros(tensor.leaves + 1, np.int64)), None
    if np.any((counts < 0) | (counts > full)) or int(counts.sum()) != tensor.kept:
        raise CheckpointError(
            f"{at}: its leaves keep {int(counts.sum()):,} elements, the document says {tensor.kept:,}"
        )
    if parts.rows is not None:
        rows = tensor.shape[0] if tensor.shape else 1
        if parts.rows.nbytes != -(-rows // 8):
            raise CheckpointError(f"{at}: a bitmap of {parts.rows.nbytes} bytes for {rows} rows")
        bitmap = _read_raw(file, parts.rows)
    dtype = DTYPES[tensor.values if parts.values is None else parts.values.dtype]
    if (tensor.bits and dtype.name != "U8") or (not tensor.bits and dtype.kind != "float"):
        raise CheckpointError(f"{at}: values of {dtype.name} for the encoding {tensor.encoding}")
    frames = None
    if parts.sizes is not None:
        frames = _read_counts(file, parts.sizes)
        raw = value_sizes(tensor, counts, dtype.itemsize)
        if np.any(frames > raw + 1) or np.any((frames == 0) != (raw == 0)):
            raise CheckpointError(f"{at}: a frame is longer than its uncompressed bytes, or missing")
    table = leaf_table(tensor, counts, dtype.itemsize, frames)
    stored = parts.frames or parts.values
    for place, starts, role in ((stored, table.values, "values"), (parts.scales, table.scales, "scales")):
        if place is not None and place.nbytes != starts[-1]:
            raise CheckpointError(f"{at}: its {role} take {int(starts[-1]):,} bytes, the file has {place.nbytes:,}")
    return table, bitmap


def _read_counts(file: InputFile, place: Placement) -> Counts:
    found: Counts = _read_raw(file, place).view(DTYPES[place.dtype].numpy).astype(np.int64)
    return found


def _read_raw(file: InputFile, place: Placement) -> Bytes:
    raw = np.empty(place.nbytes, np.uint8)
    if raw.size:
        file.read_into(raw, place.offset)
    return raw
