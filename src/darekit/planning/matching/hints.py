# SPDX-License-Identifier: Apache-2.0
"""Why checkpoints have other tensors, and what to do: read off names and configs, the likeliest cause first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from darekit.architectures.families import Conversion
from darekit.planning.matching.naming import View
from darekit.wording import and_, label

# What PEFT calls its own tensors, beside the weights of the model that it wraps.
_ADAPTED = ("lora_A", "lora_B", "lora_embedding", "lora_magnitude", "modules_to_save", "original_module", "ia3_")

_PARTS = ("_config", "encoder", "decoder")  # keys of a config whose value is a part's config


def causes(view: View, reference: View, missing: Sequence[str], extra: Sequence[str]) -> list[str]:
    """Lines for an error: why `view` lacks some tensors (names) of the reference and has others."""
    return [*_causes(view, reference, missing, extra)][:1]


def _causes(view: View, reference: View, missing: Sequence[str], extra: Sequence[str]) -> Iterator[str]:
    for one, names in ((view, extra), (reference, missing)):
        adapted = next((name for name in names if any(word in name for word in _ADAPTED)), None)
        if adapted:
            yield (
                f"{one.ref} holds an adapter that is not merged into its weights ({adapted}): call "
                "`merge_and_unload()` of PEFT's model, and save what it returns"
            )
    composite = [*map(_is_composite, (view, reference))]
    if not (missing and extra) and len({*composite}) == 1:
        return
    for memory, stored, found in (
        (view, reference, _conversion_between(view, missing, extra)),
        (reference, view, _conversion_between(reference, extra, missing)),
    ):
        if found is not None:
            told = (
                f"{label(memory.ref)} has its experts fused, {label(stored.ref)} one by one, and their shapes do not "
                "fit each other"
                if found.operations[0].name == "MergeModulelist"
                else f"{label(memory.ref)} stores {found.target} as it is in memory, and {label(stored.ref)} as the "
                f"Hub has it; transformers makes one of the other by {and_([one.name for one in found.operations])}, "
                "which moves values; such tensors are not merged with each other"
            )
            yield (
                f"{told}. Load the one that differs with {_class_of(memory)} and save it again with `save_pretrained("
                "..., save_original_format=True)`, as the Hub has it"
            )
    if any(composite):
        yield (
            "One of them is a model of several parts (text, images, ...), and they are saved under the names of "
            f"different classes or formats. Load both with {_class_of(reference)}, the class of "
            f"{label(reference.ref)}, and save them again with `save_pretrained(..., save_original_format=True)`"
        )
    for ours, theirs in ((missing, extra), (extra, missing)) if missing and extra else ():
        prefix = ours[0].split(".")[0] + "."
        if {name.removeprefix(prefix) for name in ours} & set(theirs):
            yield f"Names differ by the prefix {prefix!r}: save both with the same class ({_class_of(reference)})"


def _conversion_between(view: View, stored: Sequence[str], memory: Sequence[str]) -> Conversion | None:
    """What makes tensors as they are in memory, which this side has, of those that the other one stores."""
    there = {view.facts.key(name) for name in memory}
    found = (view.facts.conversion(name) for name in stored)
    return next((one for one in found if one is not None and view.facts.without_prefix(one.target) in there), None)


def _is_composite(view: View) -> bool:
    config = view.checkpoint.config or {}
    return sum(isinstance(value, dict) and key.endswith(_PARTS) for key, value in config.items()) > 1


def _class_of(view: View) -> str:
    names = (view.checkpoint.config or {}).get("architectures")
    named = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else view.facts.class_name
    return named or "the class that they were trained with"
