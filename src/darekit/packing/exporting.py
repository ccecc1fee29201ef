# SPDX-License-Identifier: Apache-2.0
"""A pack as what today's servers load: patches that overwrite final weights, or an ordinary checkpoint.

A patch holds no delta. Base and delta are added in the base's own number format first, as `unpack` does, and what then
differs from the base is stored: so a server that already holds the base gets the very bits of `unpack`. The files are
described in docs/packs.md; what they hold are the fields of vLLM's CheckpointWeightPatch (name, shape, dtype, values,
indices or none), and they keep its rules: floating-point, no NaN and unique int32 or int64 indices where there are
indices; dense and sparse patches in calls of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from darekit import __version__, kernels
from darekit.checkpoints import Checkpoint, OutputFile, OutputTensor, Shard, lay_out
from darekit.checkpoints.digests import LEAF, TensorDigest, tensor_digest
from darekit.dtypes import DTYPES, Bytes, Floats, dtype_named
from darekit.errors import DataError, PlanError
from darekit.machine import peak_rss
from darekit.output.card import public_name
from darekit.output.staging import open_brief_stage
from darekit.packing.unpacking import open_bound, unpack
from darekit.packs.format import PackedTensor
from darekit.packs.reading import Pack, open_pack
from darekit.packs.workers import run_all
from darekit.wording import brief, size_of
from darekit.wording.progress import Progress

FORMAT = "darekit-weight-patches"

VERSION = 1

TARGETS = ("vllm-patch", "dense")

MANIFEST = "patches.json"

SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        output: the directory that was written.
        target: vllm-patch or dense.
        bytes: of all files.
        tensors: of the model.
        sparse: tensors of which some elements are patched.
        dense: tensors that are patched as a whole.
        same: tensors that need no patch.
        changed: elements that the patches overwrite.
        peak_rss_bytes: largest resident memory of the process.
    """

    output: str
    target: str
    bytes: int
    tensors: int
    sparse: int
    dense: int
    same: int
    changed: int
    peak_rss_bytes: int

    def __repr__(self) -> str:
        return brief(self, f"{self.output}, {self.target}, {self.tensors} tensors, {size_of(self.bytes)}")

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return dict(self.__dict__)


def export(
    pack: str | Path,
    out: str | Path,
    *,
    to: str,
    base: str | Path | None = None,
    shard_size: int = SHARD_SIZE,
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> ExportReport:
    """Write a pack as what servers load.

    Args:
        pack: the file, or its name on the Hub.
        out: the directory to write.
        to: vllm-patch (final values by name, shape, dtype and flat index) or dense (an ordinary model directory).
        base: what it was packed against; if not given, the base that the pack names, if that is on the Hub.
        shard_size: largest file, in bytes.
        threads: worker threads.
        overwrite: replace `out` once the new one is complete.
        resume: continue a dense export that was killed; patches always start over.
        progress: called with (bytes done, bytes in all).
        say: receives notes.

    Returns:
        What was written, and how much of it.

    Raises:
        DarekitError: see `darekit.errors`; nothing is published then.

    Examples:
        >>> packed = dk.pack("base", "math", "math.safetensors", drop_rate=0.9, seed=42)
        >>> report = dk.export("math.safetensors", "patches", to="vllm-patch", base="base")
        >>> report.tensors, report.changed
        (21, 2234)
        >>> sorted(path.name for path in Path("patches").iterdir())
        ['patches.json', 'sparse-00001.safetensors']
    """
    if to not in TARGETS:
        raise PlanError(f"a pack cannot be exported to {to!r}; targets: {', '.join(TARGETS)}")
    if resume and to != "dense":
        raise PlanError(f"an export to {to} cannot be resumed, only one to dense can; run it again without resume")
    with open_pack(pack) as found:
        base = base or _named_base(found)
        if to == "dense":
            report = unpack(
                base, found.path, out, shard_size=shard_size, threads=threads, overwrite=overwrite, resume=resume,
                progress=progress, say=say,
            )  # fmt: skip
            counts = len(found.tensors), 0, len(found.tensors), 0
            return ExportReport(str(out), to, report.bytes_written, *counts, 0, report.peak_rss_bytes)
        origin = open_bound(base, pack)
        try:
            with open_pack(found.path, base=origin) as bound:
                inputs = [found.path, *(file.path for file in origin.files)]
                with open_brief_stage(
                    Path(out), identity={"export": FORMAT}, overwrite=overwrite, inputs=inputs, say=say
                ) as stage:
                    exported = _Patches(bound, origin, threads, progress).write(stage.path, shard_size)
                    stage.publish()
                return replace(exported, output=str(out))
        finally:
            origin.close()


def _named_base(pack: Pack) -> str:
    entry = pack.info()["base"]
    if "/" not in entry["ref"]:
        raise PlanError(f"{pack.path} was packed against {entry['ref']}, which is not on the Hub: name it with --base")
    return f"{entry['ref']}@{entry['revision']}" if entry.get("revision") else str(entry["ref"])


class _Patches:
    """Patches being written: one pass that counts what changes, and one that writes it where it belongs."""

    def __init__(self, pack: Pack, base: Checkpoint, threads: int | None, progress: Progress | None) -> None:
        from darekit.machine import threads_of

        self.pack, self.base, self.progress = pack, base, progress
        self.threads = threads_of(threads)
        self.model = pack.checkpoint(base)
        self.tensors = [tensor for tensor in pack.tensors.values() if tensor.kind != "same" and tensor.count]
        self.total = 2 * sum(self.model.tensors[tensor.name].nbytes for tensor in self.tensors)
        self.done = 0

    def write(self, folder: Path, shard_size: int) -> ExportReport:
        """Fill an empty folder."""
        counts: dict[str, np.ndarray] = {}
        odd: set[str] = set()  # sparse patches cannot say NaN

        def count(tensor: PackedTensor) -> int:
            digest = TensorDigest(DTYPES[tensor.dtype].itemsize)
            changed = []
            for before, after in self._leaves(tensor):
                changed.append(np.count_nonzero(before.view(_word(tensor)) != after.view(_word(tensor))))
                if not _is_finite(tensor, after):
                    odd.add(tensor.name)
                digest.update(after)
            if tensor_digest(digest.finish()) != tensor.result:
                raise DataError(
                    f"The result is not what was packed; nothing was written: {self.pack.explain(tensor.name)}"
                )
            counts[tensor.name] = np.array(changed, np.int64)
            return self.model.tensors[tensor.name].nbytes

        self._run(count)
        entries = [entry for tensor in self.tensors if (entry := _entry(tensor, int(counts[tensor.name].sum()),
                                                                        tensor.name in odd))]  # fmt: skip
        size = self._write_files(folder, entries, counts, shard_size)
        (folder / MANIFEST).write_text(json.dumps(self._manifest(entries), indent=1) + "\n")
        dense = sum("indices" not in entry for entry in entries)
        return ExportReport(
            str(folder), "vllm-patch", size, len(self.pack.tensors), len(entries) - dense, dense,
            len(self.pack.tensors) - len(entries), sum(entry["changed"] for entry in entries), peak_rss(),
        )  # fmt: skip

    def _write_files(
        self, folder: Path, entries: Sequence[dict[str, Any]], counts: Mapping[str, np.ndarray], shard_size: int
    ) -> int:
        outputs: dict[str, tuple[OutputFile, int]] = {}  # part -> its file and offset
        size = 0
        for kind in ("sparse", "dense"):
            parts = [part for entry in entries if ("indices" in entry) == (kind == "sparse") for part in _parts(entry)]
            for number, shard in enumerate(lay_out(parts, shard_size) if parts else (), start=1):
                output = _create(folder / f"{kind}-{number:05d}.safetensors", shard)
                size += shard.size
                for place in shard.placements:
                    outputs[place.name] = output, place.offset
        for entry in entries:
            for role in ("values", "indices"):
                if role in entry:
                    entry["file" if role == "values" else "indices_file"] = outputs[entry[role]][0].path.name
        by_name = {entry["name"]: entry for entry in entries}

        def write(tensor: PackedTensor) -> int:
            entry = by_name.get(tensor.name)
            if entry is not None:
                self._write_tensor(tensor, entry, outputs)
            return self.model.tensors[tensor.name].nbytes

        files = {id(output): output for output, _ in outputs.values()}.values()
        try:
            self._run(write)
            for output in files:
                output.sync()
        finally:
            for output in files:
                output.close()
        return size

    def _write_tensor(
        self, tensor: PackedTensor, entry: Mapping[str, Any], outputs: Mapping[str, tuple[OutputFile, int]]
    ) -> None:
        word = _word(tensor)
        done = 0
        values, at = outputs[entry["values"]]
        for leaf, (before, after) in enumerate(self._leaves(tensor)):
            if "indices" not in entry:
                values.write(after, at + leaf * LEAF * word.itemsize)
                continue
            changed = np.flatnonzero(before.view(word) != after.view(word))
            if changed.size:
                places, begin = outputs[entry["indices"]]
                kind = np.dtype("<i4" if entry["index_dtype"] == "I32" else "<i8")
                places.write((changed + leaf * LEAF).astype(kind).view(np.uint8), begin + done * kind.itemsize)
                values.write(after.view(word)[changed].view(np.uint8), at + done * word.itemsize)
                done += changed.size

    def _leaves(self, tensor: PackedTensor) -> Iterator[tuple[Bytes, Bytes]]:
        """Raw leaves of the base and of the result."""
        before, after = self.base.tensors[tensor.name], self.model.tensors[tensor.name]
        size = LEAF * DTYPES[tensor.dtype].itemsize
        for start in range(0, before.nbytes, size):
            raws = tuple(np.empty(min(size, before.nbytes - start), np.uint8) for _ in range(2))
            before.source.read_into(raws[0], start)
            after.source.read_into(raws[1], start)
            yield raws[0], raws[1]

    def _run(self, work: Callable[[PackedTensor], int]) -> None:
        begun = self.done

        def tell(done: int) -> None:
            self.done = begun + done
            if self.progress:
                self.progress(self.done, self.total)

        run_all(sorted(self.tensors, key=lambda tensor: -tensor.count), work, threads=self.threads, tell=tell)

    def _manifest(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        info = self.pack.info()
        return {
            "format": FORMAT,
            "version": VERSION,
            "tool": f"darekit {__version__}",
            "pack": public_name(str(self.pack.path)),
            "base": info["base"],
            "content_digest": info["content_digest"],
            "patches": [{key: value for key, value in entry.items() if key != "index_dtype"} for entry in entries],
        }


def _entry(tensor: PackedTensor, changed: int, odd: bool) -> dict[str, Any] | None:
    """The patch of one tensor, None where nothing changes; dense where that takes no more room, or where it must be."""
    if not changed:
        return None
    size, index = DTYPES[tensor.dtype].itemsize, 4 if tensor.count <= 1 << 31 else 8
    entry: dict[str, Any] = {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": DTYPES[tensor.dtype].torch_name,
        "changed": changed,
        "values": tensor.name,
    }
    if odd or DTYPES[tensor.dtype].kind != "float" or changed * (size + index) >= tensor.count * size:
        return entry
    names = {"values": f"values:{tensor.name}", "indices": f"indices:{tensor.name}"}
    return {**entry, **names, "index_dtype": "I32" if index == 4 else "I64"}


def _parts(entry: Mapping[str, Any]) -> list[OutputTensor]:
    dtype = next(found.name for found in DTYPES.values() if found.torch_name == entry["dtype"])
    if "indices" not in entry:
        return [OutputTensor(entry["values"], dtype, tuple(entry["shape"]))]
    count = (entry["changed"],)
    return [OutputTensor(entry["indices"], entry["index_dtype"], count), OutputTensor(entry["values"], dtype, count)]


def _create(path: Path, shard: Shard) -> OutputFile:
    output = OutputFile.create(path, shard.size)
    output.write(np.frombuffer(shard.header, np.uint8), 0)
    return output


def _word(tensor: PackedTensor) -> np.dtype:
    return np.dtype(f"<u{DTYPES[tensor.dtype].itemsize}")


def _is_finite(tensor: PackedTensor, raw: Bytes) -> bool:
    dtype = dtype_named(tensor.dtype)
    if dtype.kind != "float":
        return True
    values: Floats = np.empty(raw.size // dtype.itemsize, np.float64 if dtype.name == "F64" else np.float32)
    kernels.widen(raw, dtype, values)
    return kernels.count_nonfinite(values) == 0
