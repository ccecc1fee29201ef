# SPDX-License-Identifier: Apache-2.0
"""Reading packs: what they are, single deltas at random access, applied in place, or bound to a base as a checkpoint.

A bound pack decodes ranges on the fly, so it can be used in place of a model, and no model is ever expanded on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from darekit.checkpoints import Checkpoint, InputFile, TensorInfo
from darekit.dtypes import DTYPES, Floats
from darekit.errors import CheckpointError, HomologyError, PlanError
from darekit.packs.beside import companions_of
from darekit.packs.binding import bind
from darekit.packs.decoding import Decoder, PackedSource, spans_of
from darekit.packs.deltas import delta_of
from darekit.packs.format import PackedTensor, PackFile, read_pack
from darekit.packs.opening import locate_pack, open_base, refuse_swapped
from darekit.packs.verifying import Verification, digest_of_source, explain, refuse_damaged, verify
from darekit.packs.weights import Counterparts, Weight, refuse_shared
from darekit.wording import brief, size_of


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
        return delta_of(self._source, self._tensor(name), rows or slice(None), self.base)

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

        Examples:
            >>> from safetensors.torch import load_file
            >>> packed = dk.pack("base", "math", "math.safetensors", drop_rate=0.9, seed=42)
            >>> weights = load_file("base/model.safetensors")  # or a torch module
            >>> with dk.open_pack("math.safetensors") as pack:
            ...     pack.apply_(weights)
            >>> unpacked = dk.unpack("base", "math.safetensors", "restored")
            >>> all(bool((weights[name] == one).all()) for name, one in load_file("restored/model.safetensors").items())
            True
        """
        from darekit.machine import threads_of
        from darekit.packs.workers import run_all

        threads = threads_of(threads)
        self.refuse_damaged(threads=threads)
        decoders = self.decoders(self._counterparts(tensors))

        def compare(job: tuple[Decoder, Weight]) -> int:
            decoder, weight = job
            if digest_of_source(weight, decoder.tensor) != decoder.tensor.base:
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
        refuse_damaged(self._source, threads=threads)

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
        companions, config = companions_of(self._source, base)
        return Checkpoint(str(self.path), None, infos, config, (self._source.file,), None, companions)

    def verify(self, *, threads: int | None = None, progress: Callable[[int, int], None] | None = None) -> Verification:
        """Compare what is stored with its digests, and with a base bound also every result."""
        return verify(self._source, self.base, threads=threads, progress=progress)

    def explain(self, name: str) -> str:
        """Why a tensor's result is not the one that was packed: its base, or what is stored."""
        assert self.base is not None
        return explain(self._source, name, self.base)

    def _tensor(self, name: str) -> PackedTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise PlanError(f"{self.path} has no tensor {name}; see its `tensors`") from None


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
