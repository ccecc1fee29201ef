# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's stored tensors with its quantised weights as numbers, and what its user should know about that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from darekit.checkpoints.checkpoint import TensorInfo
from darekit.checkpoints.quantised.building import Making, build
from darekit.checkpoints.quantised.naming import EIGHTS, matches_in, orphans_in, unused
from darekit.checkpoints.quantised.sources import Shelf
from darekit.checkpoints.quantised.told import Told, told_by
from darekit.checkpoints.refusals import some
from darekit.dtypes import DType, dtype_named
from darekit.errors import CheckpointError
from darekit.wording import label

# What quantisers leave beside the weights, and loaders believe.
SETTINGS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")


@dataclass(frozen=True)
class View:
    """Tensors by name, in no order; a note of how they are read; the format of those that were decoded, as torch
    calls it."""

    tensors: Mapping[str, TensorInfo]
    note: str
    dtype: str


def decoded(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None, where: str) -> View | None:
    """Stored tensors -> the same with quantised weights decoded; None where none is quantised in a way that is read.

    Raises:
        CheckpointError: something of a quantised weight is missing, or does not fit.
        Unsupported: one is stored in a way that is not read.
    """
    matches = matches_in(tensors, where)
    if not matches:
        return None
    told = told_by(config, where)
    taken = {name for match in matches for name in match.parts.values()}
    states = tuple(f"{match.name}." for match in matches if match.kind == "bitsandbytes")
    left = {
        name: info for name, info in tensors.items() if name not in taken and not name.startswith(states or ("\0",))
    }
    ignored = [name for name in left if unused(name)]
    kept = {name: info for name, info in left.items() if name not in ignored}
    _refuse_halves(kept, where)
    making = Making(tensors, told, _format_of(told, kept), where, Shelf())
    made = [build(match, making) for match in matches]
    forms = Counter(one.form for one in made)
    told_forms = ", ".join(f"{count} of {form}" for form, count in forms.most_common())
    note = (
        f"{label(where)}: {len(made)} quantised {'tensor is' if len(made) == 1 else 'tensors are'} decoded to "
        f"{making.dtype.torch_name} ({told_forms}); the output is not quantised"
    )
    if ignored:
        note += f". Not used: {some(ignored)}, which say nothing about weights"
    return View({**kept, **{one.info.name: one.info for one in made}}, note, making.dtype.torch_name)


def _refuse_halves(left: Mapping[str, TensorInfo], where: str) -> None:
    """Refuse scales without a weight, and F8 weights without a scale beside others that have one."""
    if orphans := orphans_in(iter(left)):
        raise CheckpointError(
            f"{where}: {some(orphans)} {'is' if len(orphans) == 1 else 'are'} part of a quantised weight whose other "
            "parts are missing, or are not what they are expected to be. Is a shard missing? Download it again, or "
            "give the checkpoint that was quantised"
        )
    bare = [name for name, info in left.items() if info.dtype in EIGHTS and len(info.shape) > 1]
    if bare:
        raise CheckpointError(
            f"{where}: {some(bare)} {'is' if len(bare) == 1 else 'are'} {left[bare[0]].dtype} without scales, where "
            "other weights have them. Is a shard missing? Download it again, or give the checkpoint that was quantised"
        )


def _format_of(told: Told, others: Mapping[str, TensorInfo]) -> DType:
    """What weights are decoded to: what config.json says of the model, else what its other weights have, else BF16."""
    if told.dtype is not None:
        return told.dtype
    halves = {info.dtype for info in others.values()} & {"F16", "BF16"}
    return dtype_named("F16" if halves == {"F16"} else "BF16")
