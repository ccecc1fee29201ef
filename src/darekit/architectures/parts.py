# SPDX-License-Identifier: Apache-2.0
"""The parts of a composite model, by name: its text decoder, its vision tower, what projects from one to the other."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Words in a name's path that belong to a part; what has none of them is text.
_PARTS: dict[str, str] = {
    "projector": (
        r"multi_modal_projector|multimodal_projector|mm_projector|connector|aligner|mlp1|embed_vision|embed_audio"
    ),
    "audio": r"audio_tower|audio_model|audio_encoder|audio",
    "vision": (
        r"vision_tower|vision_model|vision_encoder|vision_embed_tokens|visual|vision|vpm|image_encoder|image_newline"
    ),
}

# mergekit's names and others for one part.
_NAMES: dict[str, str] = {
    "text_decoder": "text",
    "text_model": "text",
    "text": "text",
    "language_model": "text",
    "llm": "text",
    "vision_tower": "vision",
    "vision_model": "vision",
    "vision_encoder": "vision",
    "visual": "vision",
    "vision": "vision",
    "multi_modal_projector": "projector",
    "mm_projector": "projector",
    "projector": "projector",
    "connector": "projector",
    "audio_tower": "audio",
    "audio_encoder": "audio",
    "audio": "audio",
}

# What stands before the first layer; everything else that belongs to no layer comes after the last.
_BEFORE = re.compile(
    r"(^|[._])(\w*embed\w*|wte|wpe|\w*emb|emb_\w+|shared|project_in|conv1|conv2|ln_pre|pre_layrnorm)(\.|$)"
)


def is_before(name: str) -> bool:
    """Whether a tensor that belongs to no layer is used before the first of them.

    >>> is_before("model.embed_tokens.weight"), is_before("lm_head.weight"), is_before("transformer.ln_f.weight")
    (True, False, False)
    """
    return bool(_BEFORE.search(name)) and "embed_out" not in name  # GPT-NeoX's head


def part_named(name: str) -> str:
    """The part that a tensor belongs to: text, vision, audio or projector.

    >>> part_named("model.visual.blocks.0.attn.qkv.weight"), part_named("model.layers.0.mlp.up_proj.weight")
    ('vision', 'text')
    """
    path = name.split(".")
    return next((part for part, pattern in _PARTS.items() if any(re.fullmatch(pattern, word) for word in path)), "text")


def part_of(names: Iterable[str], module: str) -> dict[str, bool]:
    """Which tensors a module is made of: by mergekit's name of a part, or the beginning of their names.

    >>> part_of(["model.visual.blocks.0.w", "model.language_model.layers.0.w", "lm_head.weight"], "text_decoder")
    {'model.visual.blocks.0.w': False, 'model.language_model.layers.0.w': True, 'lm_head.weight': True}
    """
    wanted = _NAMES.get(module)
    if wanted is None:  # `encoder`, `model.language_model`
        return {name: name == module or name.startswith(f"{module}.") for name in names}
    return {name: part_named(name) == wanted for name in names}
