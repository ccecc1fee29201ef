# SPDX-License-Identifier: Apache-2.0
"""Statistics files: safetensors with one JSON document among their metadata. Reading opens the header alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from darekit.checkpoints import (
    Checkpoint,
    FileRange,
    InputFile,
    OutputFile,
    OutputTensor,
    TensorInfo,
    lay_out,
    read_header,
    sample_digest,
    sync_directory,
)
from darekit.checkpoints.documents import parse_object
from darekit.dtypes import dtype_named
from darekit.errors import CheckpointError, OutputError

KEY = "darekit_statistics"  # in the file's __metadata__

FORMAT = "darekit-statistics-1"

FISHER, GRAM = "fisher", "gram"

KINDS = (FISHER, GRAM)


@dataclass(frozen=True)
class Statistics:
    """Statistics of one model, of which only the header has been read.

    Attributes:
        kind: fisher or gram.
        ref: the file, as the user wrote it.
        model_digest: the sample digest of the model that they were made with, in hex; None for arrays in memory.
        tensors: name of a weight in the checkpoint -> its Fisher (the weight's shape) or its input's Gram (in, in).
        rows: of a Gram, the tokens that it is a sum over.
        norm, mean: of a Fisher, over the whole model.
        transposed: weights that are stored [in, out].
        facts: the file's document.
        file: what must stay open; None for arrays in memory.
    """

    kind: str
    ref: str
    model_digest: str | None
    tensors: Mapping[str, TensorInfo]
    rows: Mapping[str, int]
    norm: float
    mean: float
    transposed: frozenset[str]
    facts: Mapping[str, Any]
    file: InputFile | None

    def size_of(self, name: str) -> float:
        """What `normalize` divides this tensor's statistics by: the Fisher's norm, or the Gram's tokens."""
        return self.norm if self.kind == FISHER else float(self.rows.get(name, 1))

    def fingerprint(self) -> str:
        """Hex: cheap, of the header's facts and a sample of the values."""
        stored = Checkpoint(self.ref, None, {info.name: info for info in self.tensors.values()}, None, (), None)
        return sample_digest(stored).hex()

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


def open_statistics(ref: str | Path, *, search: Sequence[Path] = ()) -> Statistics:
    """A statistics file, looked up in the working directory and then in `search` -> its header.

    Raises:
        CheckpointError: there is none, or it is something else.
    """
    path = Path(ref).expanduser()
    places = [path, *(directory / path for directory in search if not path.is_absolute())]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        looked = ", ".join(dict.fromkeys(str(place.absolute()) for place in places))
        raise CheckpointError(
            f"there is no statistics file {str(ref)!r} (looked for {looked}); make it with `dare stats fisher` or "
            "`dare stats gram`"
        )
    file = InputFile(found)
    try:
        return _read(str(ref), file)
    except BaseException:
        file.close()
        raise


def _read(ref: str, file: InputFile) -> Statistics:
    metadata, placements = read_header(file)
    if KEY not in metadata:
        raise CheckpointError(
            f"{file.path} holds no statistics (its metadata has no {KEY}): expected a file that `dare stats fisher` or "
            "`dare stats gram` made"
        )
    where = f"the metadata of {file.path}"
    facts = parse_object(metadata[KEY].encode(), where, strict=True)
    if facts.get("format") != FORMAT or facts.get("kind") not in KINDS:
        raise CheckpointError(
            f"{where}: found format {facts.get('format')!r} and kind {facts.get('kind')!r}, expected {FORMAT} and "
            f"{' or '.join(KINDS)}; is it unfinished, or from a later darekit?"
        )
    stored = {
        place.name: TensorInfo(place.name, place.dtype, place.shape, FileRange(file, place.offset, place.nbytes))
        for place in placements
    }
    for name, info in stored.items():
        square = len(info.shape) == 2 and info.shape[0] == info.shape[1]
        if dtype_named(info.dtype).kind != "float" or (facts["kind"] == GRAM and not square):
            raise CheckpointError(
                f"{file.path}, tensor {name}: {info.dtype} {list(info.shape)}, expected "
                f"{'a square matrix of ' if facts['kind'] == GRAM else ''}floating point numbers"
            )
    try:
        same = {str(name): stored[str(owner)] for name, owner in dict(facts.get("same_input", {})).items()}
        rows = {str(name): int(count) for name, count in dict(facts.get("rows", {})).items()}
        rows |= {name: rows[info.name] for name, info in same.items() if info.name in rows}
        norm, mean = float(facts.get("norm", 1.0)), float(facts.get("mean", 0.0))
        transposed = frozenset(map(str, facts.get("transposed", ())))
        digest = str(facts["model_digest"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where} is damaged ({error!r}); recreate the file") from None
    if not (math.isfinite(norm) and norm >= 0) or any(count < 0 for count in rows.values()):
        raise CheckpointError(f"{where} is damaged: a norm or a number of rows is negative or not finite")
    return Statistics(facts["kind"], ref, digest, stored | same, rows, norm, mean, transposed, facts, file)


def write_statistics(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    values: Callable[[str], npt.NDArray[np.float32]],
    document: Mapping[str, Any],
) -> None:
    """Write a file of float32 tensors at once or not at all; `values(name)` gives one tensor at a time.

    Raises:
        OutputError: the disk is full or fails.
    """
    (shard,) = lay_out(
        [OutputTensor(name, "F32", shape) for name, shape in shapes.items()], 1 << 62,
        metadata={KEY: json.dumps(document)},
    )  # fmt: skip
    hidden = path.with_name(f".{path.name}.darekit-tmp")
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden.unlink(missing_ok=True)
    try:
        output = OutputFile.create(hidden, shard.size)
        try:
            output.write(np.frombuffer(shard.header, np.uint8), 0)
            for place in shard.placements:
                array = np.ascontiguousarray(values(place.name), np.float32)
                if array.size:
                    output.write(array.reshape(-1).view(np.uint8), place.offset)
            output.sync()
        finally:
            output.close()
        with told(path):
            hidden.replace(path)
        sync_directory(path.parent)
    except BaseException:
        with suppress(OSError):
            hidden.unlink(missing_ok=True)
        raise


@contextmanager
def told(path: Path) -> Iterator[None]:
    """What the system refuses while `path` is written becomes an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Complain before the work begins rather than after it.

    Raises:
        OutputError: `path` exists and may not be replaced, or cannot be written.
    """
    if path.suffix != ".safetensors":
        raise OutputError(f"--out {path}: statistics are a .safetensors file; write {path.name}.safetensors")
    if path.is_dir():
        raise OutputError(f"--out {path} is a directory; expected the name of a file")
    if path.exists() and not overwrite:
        raise OutputError(f"--out {path} exists; choose another name, or replace it with --overwrite")
    if path.exists():
        file = InputFile(path)
        try:
            if KEY not in read_header(file)[0]:
                raise OutputError(f"--overwrite does not replace {path}: it holds no statistics (is it a model?)")
        finally:
            file.close()
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not os.access(above, os.W_OK):
        raise OutputError(f"--out {path}: {above} cannot be written to; choose another place")
