# SPDX-License-Identifier: Apache-2.0
"""A file of weights of which only the header is on this machine, and tensors whose bytes are elsewhere."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from darekit.checkpoints.checkpoint import Checkpoint
from darekit.checkpoints.files import Bytes, InputFile
from darekit.checkpoints.sources import Traits
from darekit.errors import NotFetched


class HeaderFile(InputFile):
    """The beginning of a file of `size` bytes: as many as its header has."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(path)
        self.size = size

    def _differs(self, status: os.stat_result) -> bool:
        return False  # what was fetched is of one commit


@dataclass(frozen=True)
class Elsewhere:
    """A tensor whose bytes were not fetched. `ref`: its model and commit; `asked`: what values were asked of, by model
    and name."""

    ref: str
    name: str
    nbytes: int
    asked: dict[str, set[str]]

    @property
    def traits(self) -> Traits:
        """Its name and commit say which tensor it is."""
        return Traits(identity=hashlib.blake2b(f"{self.ref}\0{self.name}".encode(), digest_size=16).digest())

    def read_into(self, buffer: Bytes, offset: int) -> None:
        """Note that values were asked for.

        Raises:
            NotFetched: always.
        """
        self.asked.setdefault(self.ref, set()).add(self.name)
        raise NotFetched(
            f"{self.ref}, tensor {self.name}: its values are needed, but only its header was fetched; download the "
            f"model first: `hf download {self.ref.partition('@')[0]}`"
        )


def has_values(checkpoint: Checkpoint) -> bool:
    """Whether the values of a checkpoint's tensors can be read."""
    return not any(isinstance(info.source, Elsewhere) for info in checkpoint.tensors.values())


def without_values(checkpoint: Checkpoint, ref: str, revision: str, asked: dict[str, set[str]]) -> Checkpoint:
    """A checkpoint whose files are headers, as the model that they are headers of."""
    tensors = {
        name: replace(info, source=Elsewhere(f"{ref.partition('@')[0]}@{revision}", name, info.nbytes, asked))
        for name, info in checkpoint.tensors.items()
    }
    return replace(checkpoint, ref=ref, tensors=tensors, revision=revision)
