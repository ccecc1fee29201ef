# SPDX-License-Identifier: Apache-2.0
"""What a run that makes statistics has on disk until its file is whole.

    .NAME.darekit-stage    the file to be: room for its header, then the finished tensors, in order
    .NAME.darekit-partial  replaced at once or not at all: which tensors of the stage are finished, and the sums of the
                           group that is under way

A tensor is flushed to the stage before the partial file names it, so a run that is killed at any point goes on from the
last partial file. At the end the header is written and the stage gets the output's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from darekit.checkpoints import FileRange, InputFile, OutputFile, OutputTensor, lay_out, read_header, sync_directory
from darekit.checkpoints.documents import parse_object
from darekit.errors import OutputError
from darekit.inputs.statistics import FORMAT, KEY, told, write_statistics

UNFINISHED = f"{FORMAT}-unfinished-2"

Shapes = Mapping[str, tuple[int, ...]]
Parts = Callable[[str], Iterator[npt.NDArray[np.float32]]]  # a tensor's name -> its values in order, part by part


class Stage:
    """The two hidden files beside the output.

    Attributes:
        shapes: the finished tensors, in the file's order.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(f".{out.name}.darekit-stage")
        self.partial = out.with_name(f".{out.name}.darekit-partial")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._header = self._size = self._end = 0

    def create(self, shapes: Shapes, document: Mapping[str, Any]) -> None:
        """Begin with an empty stage that has room for these tensors and for a header with this document.

        Raises:
            OutputError: the disk has too little room, or cannot be written.
        """
        shard = _shard(shapes, document)
        self._header, self._size = len(shard.header), shard.size
        self._end = self._header
        with told(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
        OutputFile.create(self.path, self._size).close()

    def append(self, shapes: Shapes, parts: Parts) -> None:
        """Write finished tensors behind those that are there, and wait until they are on the disk.

        Raises:
            OutputError: the disk is full or fails; the stage is as it was.
        """
        end = self._end
        output = OutputFile.create(self.path, self._size)
        try:
            for name in shapes:
                for part in parts(name):
                    output.write(part.reshape(-1).view(np.uint8), end)
                    end += part.nbytes
            output.sync()
        finally:
            output.close()
        self.shapes |= shapes
        self._end = end

    def save(self, shapes: Shapes, values: Callable[[str], npt.NDArray[np.float32]], facts: Mapping[str, Any]) -> None:
        """Replace the partial file: the finished tensors, a group's sums, and what else a resumed run must know.

        Raises:
            OutputError: the disk is full or fails; the partial file is as it was.
        """
        document = {
            "format": UNFINISHED,
            "header": self._header,
            "size": self._size,
            "finished": {name: list(shape) for name, shape in self.shapes.items()},
            **facts,
        }
        write_statistics(self.partial, shapes, values, document)

    @contextmanager
    def resume(self) -> Iterator[tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], FileRange]]]]:
        """Go on from the partial file -> its document, and the sums of its group: (shape, where they lie).

        Raises:
            OutputError: it is another version's, or the stage beside it is gone.
        """
        file = InputFile(self.partial)
        try:
            metadata, placements = read_header(file)
            document = parse_object(metadata.get(KEY, "{}").encode(), f"the metadata of {self.partial}", strict=True)
            if document.get("format") != UNFINISHED or not isinstance(document.get("identity"), dict):
                raise OutputError(
                    f"{self.partial} is not an unfinished run of this version; delete it (and {self.path.name}) to "
                    "start over"
                )
            self.shapes = {name: tuple(map(int, shape)) for name, shape in document["finished"].items()}
            self._header, self._size = int(document["header"]), int(document["size"])
            self._end = self._header + sum(4 * math.prod(shape) for shape in self.shapes.values())
            found = self.path.stat().st_size if self.path.is_file() else None
            if found not in (self._size, self._end):  # the latter: killed between `truncate` and `replace`
                raise OutputError(
                    f"{self.path}, which holds what the unfinished run completed, {_seen(found)}, expected "
                    f"{self._size:,} bytes; run without --resume to start over"
                )
            self._size = found
            yield document, {p.name: (p.shape, FileRange(file, p.offset, p.nbytes)) for p in placements}
        finally:
            file.close()

    def publish(self, document: Mapping[str, Any]) -> None:
        """Write the header, give the stage the output's name, and clear up.

        Raises:
            OutputError: the disk is full or fails.
        """
        shard = _shard(self.shapes, document)
        assert len(shard.header) <= self._header and shard.size - len(shard.header) == self._end - self._header
        length = self._header - 8  # of the text: JSON, and spaces up to the data
        header = length.to_bytes(8, "little") + shard.header[8:].ljust(length)
        output = OutputFile.create(self.path, self._size)
        try:
            output.write(np.frombuffer(header, np.uint8), 0)
            output.sync()
        finally:
            output.close()
        with told(self.out):
            if self._end < self._size:  # room for tensors that turned out not to be needed
                with self.path.open("r+b") as file:
                    file.truncate(self._end)
                self._size = self._end
            self.path.replace(self.out)
        sync_directory(self.out.parent)
        self.partial.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove both files."""
        for path in (self.partial, self.path):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _shard(shapes: Shapes, document: Mapping[str, Any]) -> Any:
    tensors: Sequence[OutputTensor] = [OutputTensor(name, "F32", shape) for name, shape in shapes.items()]
    (shard,) = lay_out(tensors, 1 << 62, metadata={KEY: json.dumps(document)})
    return shard


def _seen(size: int | None) -> str:
    return "is gone" if size is None else f"has {size:,} bytes"
