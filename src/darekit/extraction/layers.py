# SPDX-License-Identifier: Apache-2.0
"""Layers beside linear ones that PEFT gives factors: tables of tokens, and convolutions."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from darekit.architectures.families import Facts
from darekit.extraction.targets import Block, Target
from darekit.planning.matching.alignment import AlignedTensor

FACTORS = ("embeddings", "convolutions")  # what gets factors if somebody asks for it

TIED_BY_PEFT = ("embed_tokens", "lm_head")  # one of a pair must be called so (0.21, `EMBEDDING_LAYER_NAMES`)

# Model type -> the names of its convolutions, where they are plain: a stored weight does not say whether its layer has
# groups, or is transposed, on which the factors depend. A test asks transformers' classes.
PLAIN_CONVOLUTIONS: Mapping[str, tuple[str, ...]] = {
    "whisper": ("conv1", "conv2"),
    **dict.fromkeys(("clip", "clip_vision_model", "siglip", "siglip_vision_model"), ("patch_embedding",)),
    **dict.fromkeys(("vit", "deit", "dinov2"), ("projection",)),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), ("proj",)),
    **dict.fromkeys(("pixtral", "mistral3"), ("patch_conv",)),
    **dict.fromkeys(("wav2vec2", "hubert"), ("conv",)),
    "resnet": ("convolution",),
}


def convolution(name: str, tensor: AlignedTensor, facts: Facts, config: Mapping[str, Any]) -> Target | None:
    """A convolution whose factors can be known, (out, in, ...); None: nobody says what kind it is."""
    module, _, last = name.rpartition(".")
    plain = {word for kind in model_types(facts, config) for word in PLAIN_CONVOLUTIONS.get(kind, ())}
    if last != "weight" or len(tensor.shape) not in (3, 4, 5) or module.rpartition(".")[2] not in plain:
        return None
    rows, *kernel = tensor.shape
    block = Block(tensor, 0, (rows, math.prod(kernel)))
    return Target(module, ((block,),), kernel=tuple(kernel))


def table(name: str, tensor: AlignedTensor, facts: Facts, names: Collection[str]) -> Target | str | None:
    """A table that tokens are looked up in; None: it is none, or why it can have no factors.

    Args:
        name: in memory.
        tensor: what is stored of it.
        facts: of the class that will load the adapter.
        names: of all tensors, in memory.
    """
    if len(tensor.shape) != 2 or facts.token_axis(tensor.name, tensor.shape) != 0:
        return None
    shared = [one for one in shared_with(name, facts) if one not in names]
    if not all(facts.is_output_embedding(one) for one in shared):
        return "other layers look tokens up in its values, and PEFT would change them in this one alone"
    heads = tuple(one.removesuffix(".weight") for one in shared)
    known = [one for one in (name.removesuffix(".weight"), *heads) if one.rpartition(".")[2] in TIED_BY_PEFT]
    if heads and not known:
        return f"it is also the head ({heads[0]}), and PEFT ties factors only of {' and '.join(TIED_BY_PEFT)}"
    block = Block(tensor, 0, (tensor.shape[0], tensor.shape[1]))
    return Target(name.removesuffix(".weight"), ((block,),), transposed=True, table=True, heads=heads)


def shared_with(name: str, facts: Facts) -> Iterator[str]:
    """The weights in memory that have a tensor's values."""
    for one in facts.held:
        if "#" not in one and one.endswith(".weight") and one != name and facts.tied_to(one) == name:
            yield one


def model_types(facts: Facts, config: Mapping[str, Any]) -> set[str]:
    """A model's type, and those of its parts."""
    found = {facts.model_type, config.get("model_type")}
    found |= {part.get("model_type") for part in config.values() if isinstance(part, Mapping)}
    return {one for one in found if isinstance(one, str)}
