# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's stored tensors with its quantised weights as numbers, and what its user should know about that.

All checkpoints pass through here, so what decodes is imported when there is something to decode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from darekit.checkpoints.checkpoint import TensorInfo
from darekit.checkpoints.quantised.naming import EIGHTS, matches_in, misnamed_in, orphans_in, scales_inputs, unused
from darekit.checkpoints.refusals import module_of
from darekit.dtypes import DType, dtype_named
from darekit.errors import CheckpointError, Unsupported
from darekit.wording import label, some

if TYPE_CHECKING:
    from darekit.checkpoints.quantised.told import Told

# What quantisers leave beside the weights, and loaders believe.
SETTINGS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")


@dataclass(frozen=True)
class View:
    """What a checkpoint is read as.

    Attributes:
        tensors: by name, in no order.
        notes: how they are read.
        dtype: the format of those that were decoded, as torch calls it; None where none was.
    """

    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...]
    dtype: str | None


def decoded(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None, where: str) -> View | None:
    """Stored tensors -> the same with quantised weights decoded; None where they are read as they are stored.

    Raises:
        CheckpointError: something of a quantised weight is missing, or does not fit.
        Unsupported: one is stored in a way that is not read.
    """
    matches, misnamed = matches_in(tensors, where), misnamed_in(tensors)
    if not matches and not misnamed:
        return None
    taken = {name for match in matches for name in match.parts.values()}
    states = tuple(f"{match.name}." for match in matches if match.kind == "bitsandbytes")
    left = {
        name: info for name, info in tensors.items() if name not in taken and not (states and name.startswith(states))
    }
    kept = {name: info for name, info in left.items() if name not in misnamed}
    kept |= {right: replace(left[name], name=right) for name, right in misnamed.items()}
    notes = [_about_names(misnamed, where)] if misnamed else []
    if not matches:
        return View(kept, tuple(notes), None)
    from darekit.checkpoints.quantised.building import Making, build
    from darekit.checkpoints.quantised.sources import Shelf
    from darekit.checkpoints.quantised.told import told_by

    ignored = [name for name in kept if unused(name)]
    kept = {name: info for name, info in kept.items() if name not in ignored}
    _refuse_halves(kept, where)
    _refuse_scaled_inputs(kept, {module_of(match.name) for match in matches}, where)
    told = told_by(config, where)
    making = Making(tensors, told, _format_of(told, kept), where, Shelf())
    made = [build(match, making) for match in matches]
    notes.append(_about_forms([one.form for one in made], ignored, making.dtype, where))
    return View({**kept, **{one.info.name: one.info for one in made}}, tuple(notes), making.dtype.torch_name)


def _about_forms(forms: Sequence[str], ignored: Sequence[str], dtype: DType, where: str) -> str:
    counted = Counter(forms).most_common()
    what = ", ".join(f"{count} of {form}" for form, count in counted) if counted[1:] else counted[0][0]
    many = "1 quantised tensor is" if len(forms) == 1 else f"{len(forms)} quantised tensors are"
    unread = f". Not used, because they are for activations: {some(ignored)}" if ignored else ""
    return f"{label(where)}: {many} read as {dtype.torch_name} ({what}); outputs are not quantised{unread}"


def _about_names(misnamed: Mapping[str, str], where: str) -> str:
    name, right = next(iter(misnamed.items()))
    return (
        f"{label(where)}: {len(misnamed)} tensors that are not quantised have names of MXFP4 codes ({name}), as "
        f"transformers 5 saves a gpt-oss that it has decoded; they are read as what they are ({right})"
    )


def _refuse_scaled_inputs(left: Mapping[str, TensorInfo], modules: Collection[str], where: str) -> None:
    """Refuse layers whose inputs are scaled before: their weights are others than those that were quantised."""
    found = [name for name in left if scales_inputs(name) and module_of(name) in modules]
    if found:
        raise Unsupported(
            f"{where}: {some(found)} scale{'s' if len(found) == 1 else ''} the inputs of quantised layers (AWQ of "
            "ModelOpt, SmoothQuant), whose weights were divided by them; this is not supported. Dequantise it with the "
            "tool that made it, or give the checkpoint from which it was quantised"
        )


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
