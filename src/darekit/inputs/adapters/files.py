# SPDX-License-Identifier: Apache-2.0
"""Where an adapter lies: a folder with a config and weights, on this machine or on the Hub; opened by its headers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from darekit.checkpoints import FileRange, InputFile, TensorInfo, read_header
from darekit.checkpoints.documents import read_object
from darekit.checkpoints.pytorch import read_pickled
from darekit.checkpoints.refusals import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_INDEX,
    ADAPTER_SHARD,
    ADAPTER_WEIGHTS,
    PICKLED_ADAPTER,
)
from darekit.errors import CheckpointError
from darekit.inputs.adapters.config import AdapterConfig, read_config
from darekit.inputs.adapters.finding import EMBEDDINGS, VALUE_HEADS


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
    there = [folder / one for one in ADAPTER_WEIGHTS if (folder / one).exists()]
    shards = (folder / ADAPTER_INDEX).exists() and not (place.is_dir() and there)
    weights = place if place.is_file() else there[0] if there else None
    settings = folder / ADAPTER_CONFIG
    if not settings.exists():
        raise CheckpointError(
            f"{folder} has an adapter's weights, but no {ADAPTER_CONFIG}, which says its rank and scale: copy it there"
        )
    config = read_config(read_object(settings, strict=False), str(settings))
    beside = [name for name in VALUE_HEADS if (folder / name).exists()]
    if beside:
        note = f"{folder} has {beside[0]}, a reward model's head, beside the adapter: it is not merged"
        config = replace(config, notes=(*config.notes, note))
    if rows := [name for name in EMBEDDINGS if (folder / name).exists()]:
        note = f"WARNING: {folder} has {rows[0]}, rows of tokens that were added: they are not merged"
        config = replace(config, notes=(*config.notes, note))
    if shards and (weights is None or ADAPTER_SHARD.fullmatch(weights.name)):
        return _open_shards(config, folder, open_file)
    if weights is None:
        raise CheckpointError(
            f"{folder} has {ADAPTER_CONFIG}, but no weights: expected {ADAPTER} or {PICKLED_ADAPTER}, or shards with "
            f"{ADAPTER_INDEX}"
        )
    if weights.suffix == ".bin":
        found = {t.name: TensorInfo(t.name, t.dtype, t.shape, t.source) for t in read_pickled(weights)}
        return AdapterFiles(config, found, folder, ())
    file = open_file(weights)
    try:
        tensors = _tensors_in(file)
    except BaseException:
        file.close()
        raise
    return AdapterFiles(config, tensors, folder, (file,))


def _open_shards(config: AdapterConfig, folder: Path, open_file: Callable[[Path], InputFile]) -> AdapterFiles:
    """One that transformers has cut into shards, as it saves what is large."""
    index = folder / ADAPTER_INDEX
    places = read_object(index, strict=True).get("weight_map")
    named = isinstance(places, dict) and all(
        isinstance(file, str) and ADAPTER_SHARD.fullmatch(file) for file in places.values()
    )
    if not isinstance(places, dict) or not places or not named:
        raise CheckpointError(
            f"{index}: expected a weight_map of tensor name -> adapter_model-00001-of-00002.safetensors"
        )
    files: list[InputFile] = []
    tensors: dict[str, TensorInfo] = {}
    try:
        for name in dict.fromkeys(places.values()):
            if not (folder / name).exists():
                raise CheckpointError(f"{index} names {name}, which is not there: download or save the adapter again")
            files.append(open_file(folder / name))
            found = _tensors_in(files[-1])
            if wrong := [one for one in found if places.get(one, name) != name]:
                raise CheckpointError(
                    f"{index} places {wrong[0]} in {places[wrong[0]]}, but {name} holds it too: shards of two "
                    "adapters; download or save it again"
                )
            tensors |= found
        if tensors.keys() != places.keys():
            name = min(tensors.keys() ^ places.keys())
            what = "lists {}, which no shard holds" if name in places else "does not list {}, which a shard holds"
            raise CheckpointError(f"{index} {what.format(name)}: shards of two adapters; download or save it again")
    except BaseException:
        for file in files:
            file.close()
        raise
    return AdapterFiles(config, tensors, folder, tuple(files))


def _tensors_in(file: InputFile) -> dict[str, TensorInfo]:
    _, placements = read_header(file)
    if not placements:
        raise CheckpointError(f"{file.path} holds no tensors")
    return {p.name: TensorInfo(p.name, p.dtype, p.shape, FileRange(file, p.offset, p.nbytes)) for p in placements}
