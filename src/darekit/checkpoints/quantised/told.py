# SPDX-License-Identifier: Apache-2.0
"""What config.json says of quantised weights. It is asked only what the stored tensors leave open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from darekit.checkpoints.documents import shorten
from darekit.dtypes import DType, dtype_from_torch_name
from darekit.errors import CheckpointError, Unsupported

KEYS = ("quantization_config", "compression_config")  # the second: of older compressed-tensors
DECODED = ("BF16", "F16", "F32")  # formats that weights are decoded to


@dataclass(frozen=True)
class Told:
    """What a config says.

    Attributes:
        method: what quantised the weights, "" where it does not say so.
        blocks: (rows, columns) of elements that share a scale; several where layers differ.
        bits: of integers; several where layers differ.
        dtype: the format of the weights otherwise; None where it does not say so.
        model: the model type.
    """

    method: str = ""
    blocks: tuple[tuple[int, int], ...] = ()
    bits: tuple[int, ...] = ()
    dtype: DType | None = None
    model: str = ""


def told_by(config: Mapping[str, Any] | None, where: str) -> Told:
    """What config.json says, or a part of a model in it.

    Raises:
        CheckpointError: it says what cannot be.
        Unsupported: the model turns activations while it runs, so that its weights are not the layers' own.
    """
    config = config or {}
    found: Mapping[str, Any] = next(
        (part[key] for part in parts_of(config) for key in KEYS if isinstance(part.get(key), Mapping)), {}
    )
    _refuse_turned(found.get("transform_config"), where)
    blocks: list[tuple[int, int]] = []
    bits: list[int] = []
    if (block := found.get("weight_block_size")) is not None:
        blocks.append(_block(block, "weight_block_size", where))
    groups = found.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        if (structure := weights.get("block_structure")) is not None:
            structure = structure.split("x") if isinstance(structure, str) else structure
            blocks.append(_block(structure, "block_structure", where))
        size = weights.get("group_size")
        if size is not None and size != -1:
            blocks.append(_block([1, size], "group_size", where))
        if (many := weights.get("num_bits")) is not None:
            if type(many) is not int or not 1 <= many <= 16:
                raise CheckpointError(f"{where}: config.json has num_bits {shorten(many)}; expected 1 to 8")
            bits.append(many)
    names = [
        part[key] for part in parts_of(config) for key in ("dtype", "torch_dtype") if isinstance(part.get(key), str)
    ]
    formats = (dtype_from_torch_name(name) for name in names)
    return Told(
        method=str(found.get("quant_method") or ""),
        blocks=tuple(dict.fromkeys(blocks)),
        bits=tuple(dict.fromkeys(bits)),
        dtype=next((one for one in formats if one is not None and one.name in DECODED), None),
        model=str(config.get("model_type") or ""),
    )


def parts_of(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config, and those of parts of the model in it."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from parts_of(value)


def _refuse_turned(said: Any, where: str) -> None:
    """Refuse compressed-tensors' transforms of activations (QuIP, SpinQuant): stored weights are in a turned basis.
    Those of weights alone (`weight_input`, `weight_output`) are done once and for all."""
    groups = said.get("config_groups") if isinstance(said, Mapping) else None
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        applied = group.get("apply") if isinstance(group, Mapping) else None
        for one in applied if isinstance(applied, list) else ():
            place = str(one.get("location")) if isinstance(one, Mapping) else ""
            if not place.startswith("weight_"):
                raise Unsupported(
                    f"{where}: config.json has a transform_config ({shorten(name)}) that rotates activations "
                    f"({place}) while the model runs, so the stored weights are rotated too; this is not supported. "
                    "Give the checkpoint from which it was quantised"
                )


def _block(value: Any, key: str, where: str) -> tuple[int, int]:
    try:
        rows, columns = (int(one) if isinstance(one, str) else one for one in value)
    except (TypeError, ValueError):
        rows = columns = None
    if type(rows) is not int or type(columns) is not int or min(rows, columns) < 1:
        raise CheckpointError(
            f"{where}: config.json has {key} {shorten(value)}; expected whole numbers above 0, as [128, 128]"
        )
    return rows, columns
