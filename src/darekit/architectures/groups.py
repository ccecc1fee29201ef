# SPDX-License-Identifier: Apache-2.0
"""The groups of `keep_dense`, and what else a tensor is: asked of the table of facts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from darekit.architectures.families import GENERIC, Facts

GROUPS: tuple[str, ...] = ("embeddings", "norms", "biases", "heads")

# Each of their outputs is one delta times one input: no sum in which the noise of dropping could average out.
ONE_TERM: tuple[str, ...] = ("embeddings", "norms", "biases")

# Counts changes of what belongs to which group: 2 since the table of facts decides.
MEANING = 2

_PATCHES = re.compile(r"(?:vision|visual|image|pixel|patch).*pos")


@dataclass(frozen=True, slots=True)
class Role:
    """What a tensor is. `group`: of `keep_dense`, None for the matrices that are in none. `is_head`: whether the
    recipe's key `heads` is about it, as about biases and norms of heads. `token_axis`: the axis that counts tokens."""

    group: str | None = None
    is_head: bool = False
    token_axis: int | None = None


def role_of(facts: Facts, name: str, shape: tuple[int, ...]) -> Role:
    """A tensor's name and shape -> what it is.

    >>> from darekit.architectures.families import facts_of
    >>> role_of(facts_of({"model_type": "gpt_neox"}), "embed_out.weight", (100, 64))
    Role(group='heads', is_head=True, token_axis=0)
    """
    axis = facts.token_axis(name, shape)
    return Role(group_of(name, shape, facts), facts.is_head(name), axis)


def group_of(name: str, shape: tuple[int, ...], facts: Facts = GENERIC) -> str | None:
    """Tensor name and shape -> its group, None for the matrices that are none of them.

    >>> group_of("model.layers.0.input_layernorm.weight", (64,)), group_of("model.embed_tokens.weight", (100, 64))
    ('norms', 'embeddings')
    """
    if name.endswith("bias"):
        return "biases"
    if len(shape) <= 1:
        return "norms"
    if facts.is_head(name):
        return "heads"
    if facts.is_embedding(name):
        return "embeddings"
    return None


def is_of_patches(name: str) -> bool:
    """Whether an embedding is of the positions in a picture, all of which are added at once.

    >>> is_of_patches("vision_model.embeddings.position_embedding.weight"), is_of_patches("visual.pos_embed.weight")
    (True, True)
    >>> is_of_patches("text_model.embeddings.position_embedding.weight")
    False
    """
    return _PATCHES.search(name) is not None


def is_kept_dense(name: str, group: str | None, patterns: Iterable[str]) -> bool:
    """Whether `keep_dense` (groups and globs) names a tensor of this name and group."""
    return any(group == pattern if pattern in GROUPS else fnmatchcase(name, pattern) for pattern in patterns)
