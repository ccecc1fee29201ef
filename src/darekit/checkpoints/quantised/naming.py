# SPDX-License-Identifier: Apache-2.0
"""Which stored tensors are one quantised weight: by their names and number formats, which headers tell."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from darekit.checkpoints.refusals import Header, last_of, module_of
from darekit.errors import CheckpointError

EIGHTS = ("F8_E4M3", "F8_E5M2")
QUANT_STATE = re.compile(r"quant_state\.bitsandbytes__(?:nf4|fp4)")

# Of activations and caches, which a merge does not have, and marks that say of a file that its F8 weights are scaled.
_UNUSED = re.compile(
    r"(?:.*_)?(?:input|output|activation|act|q|k|v|qk|kv|kv_cache|prob|bmm)_(?:global_)?"
    r"(?:scale(?:_inv|_ub)?|zero_point|amax)|q?scale_(?:input|output|act|in|out)|input_scale_\w+|scaled_fp8|comfy_quant"
    r"|weight_format"
)
# Of inputs, which the layer multiplies before its weights see them: what it computes is not what the weights say.
_BEFORE = ("pre_quant_scale", "smooth_scale", "smoothing_scale", "smooth_factor", "act_scales")
# Nobody else's names: where one of them is left over, something of a quantised weight is missing.
_ORPHANS = re.compile(
    r"(?:.*_)?(?:weight_(?:packed|scale|scale_inv|scale_2|global_scale|zero_point|shape|g_idx)|proj_scale(?:_inv)?|"
    r"proj_(?:blocks|scales))|SCB|absmax|nested_absmax|quant_map|nested_quant_map|scale_weight|qscale_weight"
)


@dataclass(frozen=True)
class Match:
    """One quantised weight.

    Attributes:
        kind: how it is stored, a key of `darekit.checkpoints.quantised.building.KINDS`.
        name: of the weight.
        parts: role -> the name of the stored tensor.
    """

    kind: str
    name: str
    parts: Mapping[str, str]


def matches_in(tensors: Mapping[str, Header], where: str) -> list[Match]:
    """All quantised weights among these tensors.

    Raises:
        CheckpointError: two tensors would be scales of one weight, or two weights have one name.
    """
    found = [match for name, info in tensors.items() if (match := _match(name, info, tensors, where)) is not None]
    seen: dict[str, str] = {}
    for match in found:
        own = match.parts["codes"]
        other = seen.setdefault(match.name, own)
        if other != own or (match.name in tensors and match.name != own):
            raise CheckpointError(
                f"{where} stores {match.name} twice: as {own}, and as {other if other != own else match.name}. Remove "
                "one of them"
            )
    return found


def misnamed_in(tensors: Mapping[str, Header]) -> dict[str, str]:
    """Stored name -> right one, of experts that were decoded and saved under the names of their codes: transformers 5
    does so, and does not load them again."""
    return {
        name: right
        for name, info in tensors.items()
        if name.endswith(".experts.gate_up_proj_blocks") or name.endswith(".experts.down_proj_blocks")
        if info.dtype in ("BF16", "F16", "F32") and len(info.shape) == 3
        if (right := name.removesuffix("_blocks")) not in tensors
    }


def undecoded(tensors: Mapping[str, Header], where: str) -> dict[str, Header]:
    """Of headers alone: what no quantised weight that is read takes. Nothing where there is one, since what else would
    be wrong is told when the weights are here."""
    return {} if matches_in(tensors, where) else dict(tensors)


def unused(name: str) -> bool:
    """Whether a tensor beside quantised weights is for activations or caches, or only a mark."""
    return _UNUSED.fullmatch(last_of(name)) is not None


def scales_inputs(name: str) -> bool:
    """Whether a tensor beside quantised weights changes what they mean."""
    return last_of(name) in _BEFORE


def orphans_in(names: Iterator[str]) -> list[str]:
    """Of names that no weight has taken, those that only parts of quantised weights have."""
    return [name for name in names if _ORPHANS.fullmatch(last_of(name)) or QUANT_STATE.search(name)]


def _match(name: str, info: Header, tensors: Mapping[str, Header], where: str) -> Match | None:
    module, last = module_of(name), last_of(name)
    scales: str | None

    def beside(other: str) -> str | None:
        """A name in the same module, where there is such a tensor."""
        whole = f"{module}.{other}" if module else other
        return whole if whole in tensors else None

    def match(kind: str, **parts: str | None) -> Match:
        found = {"codes": name, **{role: part for role, part in parts.items() if part is not None}}
        return Match(kind, _plain_name(name), found)

    if info.dtype == "U8" and last.endswith("_blocks"):
        other = name.removesuffix("blocks") + "scales"
        return match("blocks", scales=other) if other in tensors else None
    if last == "weight_packed":
        scales = beside("weight_scale")
        if scales is None:
            return None
        if info.dtype == "I32":
            return match(
                "packed", scales=scales, shape=beside("weight_shape"), zeros=beside("weight_zero_point"),
                order=beside("weight_g_idx"),
            )  # fmt: skip
        return match("fours", scales=scales, divisor=beside("weight_global_scale")) if info.dtype == "U8" else None
    if info.dtype in EIGHTS:
        scales = _scale_of(name, tensors, where)
        return None if scales is None else match("eights", scales=scales)
    if last != "weight":
        return None
    state = next((f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")
                  if f"{name}.quant_state.bitsandbytes__{kind}" in tensors), None)  # fmt: skip
    if state is not None and f"{name}.absmax" in tensors:
        roles = {"scales": "absmax", "map": "quant_map", "outer": "nested_absmax", "outer_map": "nested_quant_map"}
        stored = {role: f"{name}.{own}" for role, own in roles.items() if f"{name}.{own}" in tensors}
        return match("bitsandbytes", state=state, **stored)
    if info.dtype == "I8" and (scales := beside("SCB")):
        return match("rows", scales=scales, format=beside("weight_format"))
    scales = beside("weight_scale") or (beside("scale") if info.dtype == "I8" else None)
    if scales is None or info.dtype not in ("I8", "U8"):
        return None
    if info.dtype == "U8" or tensors[scales].dtype == "F8_E8M0":  # two codes in a byte
        return match("fours", scales=scales, factor=beside("weight_scale_2"))
    return match("integers", scales=scales, zeros=beside("weight_zero_point"))


def _scale_of(name: str, tensors: Mapping[str, Header], where: str) -> str | None:
    """The tensor that F8 weights are multiplied by."""
    candidates = [f"{name}_scale_inv", f"{name}_scale", f"{name}.scale"]
    if last_of(name) == "weight":
        stem = name.removesuffix("weight")
        candidates += [f"{stem}scale", f"{stem}scale_weight", f"{stem}qscale_weight"]
    found = [one for one in candidates if one in tensors]
    if len(found) > 1:
        raise CheckpointError(
            f"{where} has two scales of {name}: {' and '.join(found)}. It is not known which of them its F8 weights "
            "must be multiplied by"
        )
    return found[0] if found else None


def _plain_name(name: str) -> str:
    """What the weight is called where it is not quantised."""
    last = last_of(name)
    return name.removesuffix("_packed") if last == "weight_packed" else name.removesuffix("_blocks")
