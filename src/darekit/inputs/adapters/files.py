# SPDX-License-Identifier: Apache-2.0
"""Where an adapter lies: a folder with a config and weights, on this machine or on the Hub; opened by its headers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from darekit.checkpoints import FileRange, InputFile, TensorInfo, read_header
from darekit.checkpoints.documents import read_object
from darekit.checkpoints.pytorch import read_pickled
from darekit.checkpoints.refusals import ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLED_ADAPTER
from darekit.errors import CheckpointError
from darekit.inputs.adapters.config import AdapterConfig, read_config


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter whose headers were read. `folder`: where it lies; `files`: to be closed."""

    config: AdapterConfig
    tensors: Mapping[str, TensorInfo]
    folder: Path
    files: tuple[InputFile, ...]

    def close(self) -> None:
        """Close its files."""
        for file in self.files:
            file.close()


def open_adapter(place: Path, open_file: Callable[[Path], InputFile] = InputFile) -> AdapterFiles:
    """Open an adapter: config and headers are read and checked, values are not.

    Raises:
        CheckpointError: a part of it is missing or malformed.
        Unsupported: an adapter of a kind that has no place on a whole model.
    """
    folder = place if place.is_dir() else place.parent
    weights = (
        place if place.is_file() else next((folder / one for one in ADAPTER_WEIGHTS if (folder / one).exists()), None)
    )
    settings = folder / ADAPTER_CONFIG
    if not settings.exists():
        raise CheckpointError(
            f"{folder} has an adapter's weights, but no {ADAPTER_CONFIG}, which says its rank and scale: copy it there"
        )
    config = read_config(read_object(settings, strict=False), str(settings))
    if weights is None:
        raise CheckpointError(f"{folder} has {ADAPTER_CONFIG}, but no weights: expected {ADAPTER} or {PICKLED_ADAPTER}")
    if weights.suffix == ".bin":
        found = {t.name: TensorInfo(t.name, t.dtype, t.shape, t.source) for t in read_pickled(weights)}
        return AdapterFiles(config, found, folder, ())
    file = open_file(weights)
    try:
        _, placements = read_header(file)
    except BaseException:
        file.close()
        raise
    if not placements:
        file.close()
        raise CheckpointError(f"{weights} holds no tensors")
    tensors = {p.name: TensorInfo(p.name, p.dtype, p.shape, FileRange(file, p.offset, p.nbytes)) for p in placements}
    return AdapterFiles(config, tensors, folder, (file,))
