# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk: opening them, reading ranges of their tensors, laying out and writing new ones.

Knows files and no method. Nothing is imported here that is not needed to read a header.
"""

from __future__ import annotations

from darekit.checkpoints.checkpoint import Checkpoint, TensorInfo, natural_key, sample_digest
from darekit.checkpoints.files import InputFile, OutputFile, sync_directory
from darekit.checkpoints.opening import open_checkpoint
from darekit.checkpoints.places import Places
from darekit.checkpoints.safetensors import (
    OutputTensor,
    Placement,
    Shard,
    index_json,
    lay_out,
    read_header,
    read_placements,
)
from darekit.checkpoints.sources import ArrayBytes, Delta, FileRange, Source, Traits, traits_of

__all__ = [
    "ArrayBytes",
    "Checkpoint",
    "Delta",
    "FileRange",
    "InputFile",
    "OutputFile",
    "OutputTensor",
    "Placement",
    "Places",
    "Shard",
    "Source",
    "TensorInfo",
    "Traits",
    "index_json",
    "lay_out",
    "natural_key",
    "open_checkpoint",
    "read_header",
    "read_placements",
    "sample_digest",
    "sync_directory",
    "traits_of",
]
