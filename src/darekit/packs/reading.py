# SPDX-License-Identifier: Apache-2.0
"""Reading packs: what they are, single deltas at random access, applied in place, or bound to a base as a checkpoint.

A bound pack decodes ranges on the fly, so it can be used in place of a model, and no model is ever expanded on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash

from darekit import kernels
from darekit.checkpoints import Checkpoint, InputFile, Source, TensorInfo, sample_digest
from darekit.checkpoints.companions import ALL, CONFIG, Companions, Content, content_of, matching, travels
from darekit.checkpoints.digests import LEAF, TensorDigest, tensor_digest
from darekit.dtypes import DTYPES, Bytes, Floats
from darekit.errors import CheckpointError, DarekitError, HomologyError, PlanError
from darekit.packs.decoding import Decoder, PackedSource, spans_of
from darekit.packs.format import PackedTensor, PackFile, read_pack, stored_digest, stored_digests
from darekit.packs.lane import READ_LEAVES, stored_room
from darekit.packs.leaves import decode, number_for, take
from darekit.packs.opening import locate_pack, open_base, refuse_swapped
from darekit.packs.weights import Counterparts, Weight, refuse_shared
from darekit.wording import brief, size_of

_DAMAGED = "what is stored does not match its digest: the pack is damaged; download it again"


@dataclass(frozen=True)
class Fault:
    """What `verify` found wrong with one tensor.

    Attributes:
        tensor: its name.
        words: what is wrong.
    """

    tensor: str
    words: str


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        pack: the file.
        against_base: whether results were compared, or only what is stored.
        tensors: how many were checked.
        faults: what is wrong; empty where nothing is.
    """

    pack: str
    against_base: bool
    tensors: int
    faults: tuple[Fault, ...]

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "pack": self.pack,
            "ok": not self.faults,
            "against_base": self.against_base,
            "tensors": self.tensors,
            "faults": [{"tensor": fault.tensor, "words": fault.words} for fault in self.faults],
        }


class Pack:
    """An open pack; close it, or use it in a `with` statement.

    Attributes:
        path: the file.
        tensors: name -> what is stored of it.
        base: the checkpoint it is bound to; None if it is not.

    Examples:
        >>> packed = dk.pack("base", "math", "math.safetensors", drop_rate=0.9, seed=42)
        >>> with dk.open_pack("math.safetensors", base="base") as pack:
        ...     kept = pack.info()["kept"]
        ...     delta = pack.delta("model.layers.0.mlp.up_proj.weight")
        ...     faults = pack.verify().faults
        >>> kept, delta.shape, delta.dtype, int(np.count_nonzero(delta))
        (2359, (48, 32), dtype('float32'), 147)
        >>> faults
        ()
    """

    def __init__(self, path: Path, source: PackFile, base: Checkpoint | None, owned: bool) -> None:
        self.path, self.base = path, base
        self._source, self._owned = source, owned
        self.tensors: Mapping[str, PackedTensor] = source.document.tensors
        if base is not None:
            bind(source, base)

    def __repr__(self) -> str:
        base = "not bound to a base" if self.base is None else f"bound to {self.base.ref}"
        return brief(self, f"{self.path}, {len(self.tensors)} tensors, {size_of(self._source.file.size)}, {base}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and the base where this pack opened it."""
        self._source.file.close()
        if self.base is not None and self._owned:
            self.base.close()

    @property
    def identity(self) -> tuple[Path, int, int]:
        """Path, size and time of last change (ns) of the file, as it was opened."""
        file = self._source.file
        return file.path, file.size, file.mtime_ns

    def info(self) -> dict[str, Any]:
        """What the pack is, JSON-able: sizes, ratio, and the document without its tensors."""
        document = self._source.document
        tensors = self.tensors.values()
        model_bytes = sum(tensor.count * DTYPES[tensor.dtype].itemsize for tensor in tensors)
        data = document.to_data()
        del data["tensors"]
        encodings: dict[str, int] = {}
        for tensor in tensors:
            key = tensor.encoding if tensor.kind == "delta" else tensor.kind
            encodings[key] = encodings.get(key, 0) + 1
        return {
            "pack": str(self.path),
            "bytes": self._source.file.size,
            "model_bytes": model_bytes,
            "ratio": model_bytes / self._source.file.size,
            "parameters": sum(tensor.count for tensor in tensors),
            "kept": sum(tensor.kept for tensor in tensors),
            "tensors": len(self.tensors),
            "encodings": encodings,
            **data,
        }

    def delta(self, name: str, rows: slice | None = None) -> Floats:
        """(rows, ...) float32 (float64 for F64): one tensor's delta as it is added to the base, 0 where dropped.

        Args:
            name: a tensor.
            rows: of the first axis, without a step; all if not given. Only their leaves are read.

        Raises:
            PlanError: no such tensor, or an exact pack without its base.
        """
        tensor = self._tensor(name)
        count = tensor.shape[0] if tensor.shape else 1
        first, last, step = (rows or slice(None)).indices(count)
        if step != 1:
            raise PlanError(f"rows of {name} with a step of {step}; only contiguous ranges can be read")
        last = max(first, last)
        begin, end = first * tensor.row, last * tensor.row
        if DTYPES[tensor.dtype].kind != "float":
            raise PlanError(f"{name} is {tensor.dtype}: integers have no delta")
        wide = tensor.kind == "delta" and number_for(tensor, self._source.value_dtype(tensor)) is np.float64
        out: Floats = np.zeros(end - begin, np.float64 if wide or tensor.dtype == "F64" else np.float32)
        if tensor.kind != "same":
            for leaf in range(begin // LEAF, -(-end // LEAF)):
                at, values = self._leaf_delta(tensor, leaf)
                inside = (at >= begin) & (at < end)
                out[at[inside] - begin] = values[inside]
        found: Floats = out.reshape((last - first, *tensor.shape[1:]) if tensor.shape else ())
        return found

    def apply_(self, tensors: MutableMapping[str, Any] | Any, *, threads: int | None = None) -> None:
        """Turn the base's weights into the packed model's, in place; every bit as `unpack` writes it.

        Args:
            tensors: name -> contiguous numpy array or torch tensor (on any device) with the base's values; or a torch
                module. Tied tensors may be given twice only if the pack has one of them. Names that the pack lacks
                are left alone.
            threads: worker threads.

        Raises:
            HomologyError: a tensor is missing, shares another's memory, or has another shape, format or other values;
                nothing was changed.
            CheckpointError: the pack is damaged, and nothing was changed; or it says what its own mask does not (then
                an error comes only while weights change: load the base again).
        """
        from darekit.machine import default_threads
        from darekit.packs.workers import run_all

        threads = threads or default_threads()
        self.refuse_damaged(threads=threads)
        decoders = self.decoders(self._counterparts(tensors))

        def compare(job: tuple[Decoder, Weight]) -> int:
            decoder, weight = job
            if _source_digest(weight, decoder.tensor) != decoder.tensor.base:
                raise HomologyError(
                    f"{decoder.tensor.name} does not hold the values of {self._source.document.base['ref']}, against "
                    f"which {self.path} was packed; load the base's weights (`Switcher` goes from one pack to another)"
                )
            return 1

        def restore(job: tuple[Decoder, Weight, int]) -> int:
            decoder, weight, first = job
            with weight.changing(*decoder.span(first)) as raw:
                decoder.restore_leaves(first, raw)
            return 1

        run_all(decoders, compare, threads=threads)
        run_all(spans_of(decoders), restore, threads=threads)

    def refuse_base(self, base: Checkpoint, digest: bytes | None = None) -> None:
        """Refuse a base that is not this pack's; `digest`: its sample digest, where that is known.

        Raises:
            HomologyError: it is another.
        """
        bind(self._source, base, digest)

    def refuse_damaged(self, *, threads: int | None = None) -> None:
        """Compare all that is stored with its digests; a sixth of the time that `Switcher` takes to decode it.

        Raises:
            CheckpointError: something differs.
        """
        from darekit.machine import default_threads
        from darekit.packs.workers import run_all

        def work(tensor: PackedTensor) -> int:
            if _stored_digest(self._source, tensor) != tensor.stored:
                raise CheckpointError(f"{self.path}, tensor {tensor.name}: {_DAMAGED}")
            return 1

        stored = [tensor for tensor in self.tensors.values() if tensor.kind != "same"]
        run_all(stored, work, threads=threads or default_threads())

    def _counterparts(self, tensors: Mapping[str, Any] | Any) -> Counterparts:
        config = None if self.base is None else self.base.config
        stored = {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}
        return Counterparts(tensors, stored, config, str(self.path))

    def decoders(self, live: Counterparts) -> list[tuple[Decoder, Weight]]:
        """What decodes each tensor that changes, and where it lies in memory.

        Raises:
            HomologyError: a counterpart is missing, is another tensor's memory as well, or cannot be changed in place.
        """
        names = [n for n, tensor in self.tensors.items() if tensor.kind != "same" and not live.is_nobodys(n)]
        weights = live.weights(names)
        refuse_shared(weights)
        return [(Decoder(self._source, self.tensors[name]), weight) for name, weight in weights.items()]

    def checkpoint(self, base: Checkpoint | None = None) -> Checkpoint:
        """The packed model as a checkpoint that decodes what is read of it; `base` where none is bound yet.

        Closing it closes the pack's file, and not the base.

        Raises:
            HomologyError: another base.
        """
        base = base or self.base
        if base is None:
            raise PlanError(f"{self.path} is a pack: it needs its base, {self._source.document.base['ref']}")
        bind(self._source, base)
        infos = {}
        for name, tensor in self.tensors.items():
            origin = base.tensors[name]
            source = origin.source if tensor.kind == "same" else PackedSource(Decoder(self._source, tensor), origin)
            infos[name] = TensorInfo(name, tensor.dtype, tensor.shape, source)
        companions, config = self._companions(base)
        return Checkpoint(str(self.path), None, infos, config, (self._source.file,), None, companions)

    def verify(self, *, threads: int | None = None, progress: Callable[[int, int], None] | None = None) -> Verification:
        """Compare what is stored with its digests, and with a base bound also every result."""
        from darekit.machine import default_threads
        from darekit.packs.workers import run_all

        faults: list[Fault] = []
        total = sum(tensor.count * DTYPES[tensor.dtype].itemsize for tensor in self.tensors.values())

        def work(tensor: PackedTensor) -> int:
            try:
                words = self._fault_of(tensor)
            except DarekitError as error:
                words = str(error).removeprefix(f"tensor {tensor.name}: ")
            if words:
                faults.append(Fault(tensor.name, words))
            return tensor.count * DTYPES[tensor.dtype].itemsize

        def tell(done: int) -> None:
            if progress:
                progress(done, total)

        largest = sorted(self.tensors.values(), key=lambda tensor: -tensor.count)
        run_all(largest, work, threads=threads or default_threads(), tell=tell)
        for file in self._source.document.files:
            if file.stored and _digest_of(self._source.read_part(self._source.files[file.name])) != file.digest:
                faults.append(Fault(file.name, "the stored file does not match its digest: the pack is damaged"))
        order = {name: place for place, name in enumerate(self.tensors)}
        faults.sort(key=lambda fault: order.get(fault.tensor, len(order)))
        return Verification(str(self.path), self.base is not None, len(self.tensors), tuple(faults))

    def explain(self, name: str) -> str:
        """Why a tensor's result is not the one that was packed: its base, or what is stored."""
        assert self.base is not None
        tensor = self.tensors[name]
        if _source_digest(self.base.tensors[name].source, tensor) != tensor.base:
            return (
                f"{name} of {self.base.ref} is not the tensor that was packed against, "
                f"{self._source.document.base['ref']}; give that base"
            )
        return f"{name} does not match the digest of its result: the pack is damaged; download it again"

    def _fault_of(self, tensor: PackedTensor) -> str | None:
        """One line on what is wrong with a tensor, None where nothing is."""
        source = self._source
        info = self.base.tensors[tensor.name] if self.base is not None else None
        if tensor.kind == "same":
            return self.explain(tensor.name) if info and _source_digest(info.source, tensor) != tensor.result else None
        decoder = Decoder(source, tensor)
        results: list[bytes] = []
        if info is None:
            for leaf in range(tensor.leaves):
                decoder.check(leaf, *source.read_leaf(tensor, leaf))
        else:
            digest, room = TensorDigest(decoder.itemsize), np.empty(decoder.step * decoder.leaf_bytes, np.uint8)
            for first in range(0, tensor.leaves, decoder.step):
                begin = first * decoder.leaf_bytes
                raw = room[: decoder.nbytes - begin]
                info.source.read_into(raw, begin)
                decoder.restore_leaves(first, raw)
                digest.update(raw)
            results = digest.finish()
        if _stored_digest(source, tensor) != tensor.stored:  # after what says more
            return _DAMAGED
        if info is not None and tensor_digest(results) != tensor.result:
            return self.explain(tensor.name)
        return None

    def _tensor(self, name: str) -> PackedTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise PlanError(f"{self.path} has no tensor {name}; see its `tensors`") from None

    def _leaf_delta(self, tensor: PackedTensor, leaf: int) -> tuple[np.ndarray, Floats]:
        decoder = Decoder(self._source, tensor)
        if tensor.kind == "lossless":
            return self._exact_delta(decoder, leaf)
        indices = decoder.indices(leaf)
        stored, scales = self._source.read_leaf(tensor, leaf)
        base: Floats = np.zeros(indices.size, decoder.number)
        kept = None
        if tensor.encoding == "exact":
            kept = take(self._base_leaf(decoder, leaf), DTYPES[tensor.dtype], indices)
            kernels.widen(kept, DTYPES[tensor.dtype], base)
        stored = decoder.bare(stored, indices.size, kept)
        delta = decode(tensor, decoder.values, stored, scales, indices.size, base)
        delta *= base.dtype.type(decoder.factor)
        return indices.astype(np.int64) + leaf * LEAF, delta

    def _exact_delta(self, decoder: Decoder, leaf: int) -> tuple[np.ndarray, Floats]:
        """Every element of a leaf: the fine-tuned values minus the base's."""
        dtype = DTYPES[decoder.tensor.dtype]
        raw = self._base_leaf(decoder, leaf)
        base: Floats = np.empty(raw.size // dtype.itemsize, decoder.number)
        delta = np.empty_like(base)
        kernels.widen(raw, dtype, base)
        decoder.restore(leaf, raw)
        kernels.difference(raw, dtype, base, delta)
        return np.arange(leaf * LEAF, leaf * LEAF + base.size), delta

    def _base_leaf(self, decoder: Decoder, leaf: int) -> Bytes:
        if self.base is None:
            raise PlanError(
                f"{self.path} stores fine-tuned values: their delta needs the base; open_pack(path, base=...)"
            )
        raw = np.empty(decoder.size(leaf), np.uint8)
        self.base.tensors[decoder.tensor.name].source.read_into(raw, leaf * decoder.leaf_bytes)
        return raw

    def _companions(self, base: Checkpoint) -> tuple[Companions, Mapping[str, Any] | None]:
        """The model's small files, those that it shares with its base where the base has them; and its config."""
        files = self._source.document.files
        if not files:
            return {}, base.config
        found: dict[str, Content] = {}
        sizes: dict[str, int] = {}
        config = None
        for file in files:
            content = found[file.name] = self._file(file.name, base)
            raw = content_of(content)
            if _digest_of(raw) != file.digest:
                where = self.path if file.stored else base.ref
                raise CheckpointError(f"{file.name} of {where} is not the file that was packed")
            sizes[file.name] = len(raw)
            if file.name == CONFIG:
                config = json.loads(raw)
        # A stranger's pack brings no files that would not travel beside a stranger's weights.
        listed = matching(found, ALL)
        further, _ = travels({name: size for name, size in sizes.items() if name not in listed})
        return {name: content for name, content in found.items() if name in listed or name in further}, config

    def _file(self, name: str, base: Checkpoint) -> Content:
        if name in self._source.files:
            return self._source.read_part(self._source.files[name]).tobytes()
        if name not in base.companions:
            raise CheckpointError(f"{base.ref} has no {name}, which {self.path} takes from it")
        return base.companions[name]


def open_pack(path: str | Path, base: str | Path | Checkpoint | None = None) -> Pack:
    """Open a pack, and bind it to its base if one is given; only headers and tables are read.

    Args:
        path: the file, a folder that holds nothing else, or either on the Hub: org/name, org/name/FILE.safetensors.
        base: the checkpoint that it was packed against: directory, file, Hub id, or an open `Checkpoint`.

    Returns:
        The pack; close it, or use it in a `with` statement.

    Raises:
        CheckpointError: it is malformed or damaged, or of another version.
        HomologyError: another base.

    Examples:
        >>> packed = dk.pack("base", "math", "math.safetensors", drop_rate=0.9, seed=42)
        >>> with dk.open_pack("math.safetensors", base="base") as pack:
        ...     print(pack)
        <Pack: math.safetensors, 21 tensors, 18... kB, bound to base>

        Turn the base's weights in memory into the packed model's, in place; a torch module will do as well:

        >>> from safetensors.torch import load_file
        >>> weights = load_file("base/model.safetensors")
        >>> with dk.open_pack("math.safetensors") as pack:
        ...     pack.apply_(weights)
    """
    try:
        return _open(path, base)
    except CheckpointError:
        if base is not None and not isinstance(base, Checkpoint):
            refuse_swapped(base, path)
        raise


def _open(ref: str | Path, base: str | Path | Checkpoint | None) -> Pack:
    path = locate_pack(ref)
    file = InputFile(path)
    opened = None
    try:
        source = read_pack(file)
        if base is not None:
            opened = base if isinstance(base, Checkpoint) else open_base(base, ref)
        return Pack(path, source, opened, owned=not isinstance(base, Checkpoint))
    except BaseException:
        file.close()
        if opened is not None and not isinstance(base, Checkpoint):
            opened.close()
        raise


def bind(source: PackFile, base: Checkpoint, digest: bytes | None = None) -> None:
    """Refuse a base that is not the pack's.

    Raises:
        HomologyError: a tensor is missing, or has another shape or format; or the samples differ.
    """
    wanted = source.document.base
    for name, tensor in source.document.tensors.items():
        info = base.tensors.get(name)
        found = "no such tensor" if info is None else f"{info.dtype} {list(info.shape)}"
        if info is not None and info.stored_name != name:  # the base's sample digest is that of the stored model
            found += f", which is stored as {info.stored_name}"
        if info is None or (info.dtype, info.shape, info.stored_name) != (tensor.dtype, tensor.shape, name):
            raise HomologyError(
                f"{base.ref} is not the base of {source.file.path}: {name} should be {tensor.dtype} "
                f"{list(tensor.shape)}, found {found}. It was packed against {wanted['ref']}"
            )
    if (digest or sample_digest(base, decoded=True)).hex() != wanted["sample_digest"]:
        raise HomologyError(
            f"{base.ref} is not the base of {source.file.path}: its tensors have the same shapes but other values. It "
            f"was packed against {wanted['ref']}"
            + (f" at commit {wanted['revision']}" if wanted.get("revision") else "")
        )


def _digest_of(raw: Bytes | bytes) -> str:
    return xxhash.xxh3_128_hexdigest(raw)


def _stored_digest(source: PackFile, tensor: PackedTensor) -> str:
    """Of all that is stored of a tensor, as it is now."""
    table = source.tables[tensor.name]
    digests = [_part_digest(source, tensor.name, role) for role in ("rows", "leaves", "sizes")]
    for first in range(0, tensor.leaves, READ_LEAVES):
        last = min(first + READ_LEAVES, tensor.leaves)
        values, scales = source.read_leaves(tensor, first, last, stored_room)
        ends, scale_ends = (
            (begins[first + 1 : last + 1] - begins[first]).tolist() for begins in (table.values, table.scales)
        )
        digests += stored_digests(values, ends, scales, scale_ends)
    return stored_digest([digest for digest in digests if digest])


def _part_digest(source: PackFile, name: str, role: str) -> bytes:
    place = getattr(source.parts[name], role)
    return b"" if place is None else xxhash.xxh3_128_digest(source.read_part(place))


def _source_digest(source: Source, tensor: PackedTensor) -> str:
    """Of all bytes of a tensor, wherever they lie."""
    digest, size = TensorDigest(DTYPES[tensor.dtype].itemsize), READ_LEAVES * LEAF * DTYPES[tensor.dtype].itemsize
    room = np.empty(min(size, source.nbytes), np.uint8)
    for start in range(0, source.nbytes, size):
        raw = room[: source.nbytes - start]
        source.read_into(raw, start)
        digest.update(raw)
    return tensor_digest(digest.finish())
