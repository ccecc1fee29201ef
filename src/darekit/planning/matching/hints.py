# SPDX-License-Identifier: Apache-2.0
"""Why checkpoints have other tensors, and what to do: read off names and configs, the likeliest cause first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from darekit.architectures.families import Conversion
from darekit.architectures.parts import part_named
from darekit.planning.matching.naming import View
from darekit.wording import and_, label

# What PEFT calls its own tensors, beside the weights of the model that it wraps.
_ADAPTED = ("lora_A", "lora_B", "lora_embedding", "lora_magnitude", "modules_to_save", "original_module", "ia3_")

# What quantised weights have beside them, and what reinforcement learning (TRL, LLaMA-Factory) puts beside a model.
_SCALES = ("weight_scale", "weight_scale_inv", "input_scale", "k_scale", "v_scale", "SCB", "weight_format", "g_idx")
_VALUE_HEADS = ("v_head", "value_head")

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
    for one, names in ((view, extra), (reference, missing)):
        if scale := next((name for name in names if name.rpartition(".")[2] in _SCALES), None):
            yield (
                f"{label(one.ref)} has tensors that accompany quantised weights ({scale}), but its weights are not "
                "quantised: if these tensors are left over from a conversion, remove them; if the weights are still "
                "codes, in another number format, the conversion failed, and no merge can be right"
            )
        words = [name.split(".") for name in names]
        if any(word in path for path in words for word in _VALUE_HEADS):
            wrapped = ", under the names of its wrapper," if "pretrained_model" in {path[0] for path in words} else ""
            yield (
                f"{label(one.ref)} was saved{wrapped} with the value head of reinforcement learning, which nothing "
                "else reads: save the model without it (in TRL: `model.pretrained_model.save_pretrained(...)`)"
            )
    if second := _second_copy(extra, view):
        yield (
            f"{label(view.ref)} holds every weight twice, the second time with {second!r} before the name, as training "
            "keeps averages of weights: save only the copy that you want"
        )
    if (missing and not extra and _are_whole_parts(missing, reference)) or _is_text_of(view, reference):
        yield (
            f"{label(view.ref)} has only the text part of {label(reference.ref)}, which is a model of several parts: a "
            f"recipe with `modules: {{text_decoder: {{models: [{view.ref}]}}}}` instead of `models` merges that part, "
            "and keeps the others from the base"
        )
    if (extra and not missing and _are_whole_parts(extra, view)) or _is_text_of(reference, view):
        yield (
            f"{label(reference.ref)} has only the text part of {label(view.ref)}, which is a model of several parts: "
            "as the base give the model with all parts that it was fine-tuned from"
        )
    composite = [*map(_is_composite, (view, reference))]
    if not (missing and extra) and len({*composite}) == 1:
        yield from _other_architecture(view, reference)
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
                f"Hub has it; transformers converts between them by {and_([one.name for one in found.operations])}, "
                "which moves values, so these tensors cannot be merged with each other"
            )
            yield (
                f"{told}. Load the one that differs with {_class_of(memory)} and save it again as the Hub has it, with "
                "`save_pretrained(..., save_original_format=True)`"
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
    yield from _other_architecture(view, reference)


def _are_whole_parts(names: Sequence[str], owner: View) -> bool:
    """Whether these are all tensors of some parts of a composite model, and none of its text."""
    parts = {part_named(name) for name in names}
    stored = owner.checkpoint.tensors
    own = [name for name in stored if part_named(name) in parts]
    left = {part_named(name) for name in stored} - parts
    return "text" not in parts and left == {"text"} and len(own) <= len(names) < len(stored)


def _is_text_of(one: View, other: View) -> bool:
    """Whether one is a language model, and the other a model of several parts with one like it: their classes call the
    same tensors by other names."""
    ours, theirs = one.checkpoint.tensors, other.checkpoint.tensors
    texts = [name for name in theirs if part_named(name) == "text"]
    if len(texts) == len(theirs) or any(part_named(name) != "text" for name in ours):
        return False
    shapes = {theirs[name].shape for name in texts}
    return abs(len(ours) - len(texts)) <= 1 and all(info.shape in shapes for info in ours.values())


def _second_copy(extra: Sequence[str], view: View) -> str | None:
    """The prefix of a second copy of all weights, where that is what the further tensors are."""
    prefixes = {name.split(".")[0] + "." for name in extra}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    stored = view.checkpoint.tensors
    return prefix if prefix and len(extra) > 1 and all(name.removeprefix(prefix) in stored for name in extra) else None


def _other_architecture(view: View, reference: View) -> Iterator[str]:
    """Of a model that was converted: a Phi-3 or Qwen made a Llama."""
    ours, theirs = ((one.checkpoint.config or {}).get("model_type") for one in (view, reference))
    if isinstance(ours, str) and isinstance(theirs, str) and ours != theirs:
        yield (
            f"According to config.json, model_type is {ours} in {label(view.ref)} and {theirs} in "
            f"{label(reference.ref)}: their architectures differ, or one was converted to the other's. Give a "
            "fine-tune of the base's own architecture, or convert it back"
        )


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
