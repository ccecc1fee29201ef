# SPDX-License-Identifier: Apache-2.0
"""Whether a pack holds what was packed: what is stored, against its digests; and results, against theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from darekit.checkpoints import Checkpoint, Source
from darekit.checkpoints.digests import LEAF, TensorDigest, tensor_digest
from darekit.dtypes import DTYPES
from darekit.errors import CheckpointError, DarekitError
from darekit.packs.beside import digest_of
from darekit.packs.decoding import Decoder
from darekit.packs.format import PackedTensor, PackFile, stored_digest, stored_digests
from darekit.packs.lane import READ_LEAVES, stored_room

DAMAGED = "what is stored does not match its digest: the pack is damaged; download it again"


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


def verify(
    source: PackFile,
    base: Checkpoint | None,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compare what is stored with its digests, and with a base also every result."""
    from darekit.machine import threads_of
    from darekit.packs.workers import run_all

    tensors = source.document.tensors
    faults: list[Fault] = []
    total = sum(tensor.count * DTYPES[tensor.dtype].itemsize for tensor in tensors.values())

    def work(tensor: PackedTensor) -> int:
        try:
            words = _fault_of(source, tensor, base)
        except DarekitError as error:
            words = str(error).removeprefix(f"tensor {tensor.name}: ")
        if words:
            faults.append(Fault(tensor.name, words))
        return tensor.count * DTYPES[tensor.dtype].itemsize

    def tell(done: int) -> None:
        if progress:
            progress(done, total)

    largest = sorted(tensors.values(), key=lambda tensor: -tensor.count)
    run_all(largest, work, threads=threads_of(threads), tell=tell)
    for file in source.document.files:
        if file.stored and digest_of(source.read_part(source.files[file.name])) != file.digest:
            faults.append(Fault(file.name, "the stored file does not match its digest: the pack is damaged"))
    order = {name: place for place, name in enumerate(tensors)}
    faults.sort(key=lambda fault: order.get(fault.tensor, len(order)))
    return Verification(str(source.file.path), base is not None, len(tensors), tuple(faults))


def refuse_damaged(source: PackFile, *, threads: int | None = None) -> None:
    """Compare all that is stored with its digests.

    Raises:
        CheckpointError: something differs.
    """
    from darekit.machine import threads_of
    from darekit.packs.workers import run_all

    def work(tensor: PackedTensor) -> int:
        if _digest_of_stored(source, tensor) != tensor.stored:
            raise CheckpointError(f"{source.file.path}, tensor {tensor.name}: {DAMAGED}")
        return 1

    stored = [tensor for tensor in source.document.tensors.values() if tensor.kind != "same"]
    run_all(stored, work, threads=threads_of(threads))


def explain(source: PackFile, name: str, base: Checkpoint) -> str:
    """Why a tensor's result is not the one that was packed: its base, or what is stored."""
    tensor = source.document.tensors[name]
    if digest_of_source(base.tensors[name].source, tensor) != tensor.base:
        return (
            f"{name} of {base.ref} is not the tensor that was packed against, "
            f"{source.document.base['ref']}; give that base"
        )
    return f"{name} does not match the digest of its result: the pack is damaged; download it again"


def _fault_of(source: PackFile, tensor: PackedTensor, base: Checkpoint | None) -> str | None:
    """One line on what is wrong with a tensor, None where nothing is."""
    info = None if base is None else base.tensors[tensor.name]
    if tensor.kind == "same":
        if base is None or info is None or digest_of_source(info.source, tensor) == tensor.result:
            return None
        return explain(source, tensor.name, base)
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
    if _digest_of_stored(source, tensor) != tensor.stored:  # after what says more
        return DAMAGED
    if base is not None and tensor_digest(results) != tensor.result:
        return explain(source, tensor.name, base)
    return None


def _digest_of_stored(source: PackFile, tensor: PackedTensor) -> str:
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


def digest_of_source(source: Source, tensor: PackedTensor) -> str:
    """Of all bytes of a tensor, wherever they lie."""
    digest, size = TensorDigest(DTYPES[tensor.dtype].itemsize), READ_LEAVES * LEAF * DTYPES[tensor.dtype].itemsize
    room = np.empty(min(size, source.nbytes), np.uint8)
    for start in range(0, source.nbytes, size):
        raw = room[: source.nbytes - start]
        source.read_into(raw, start)
        digest.update(raw)
    return tensor_digest(digest.finish())
