# SPDX-License-Identifier: Apache-2.0
"""What the names of tensors tell: the groups of `keep_dense`, embeddings and heads, buffers that are not merged.

Names are all that is known here of architectures; every table of names is in this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

GROUPS: tuple[str, ...] = ("embeddings", "norms", "biases", "heads")

# Each of their outputs is one delta times one input: no sum in which the noise of dropping could average out.
ONE_TERM: tuple[str, ...] = ("embeddings", "norms", "biases")

_EMBEDDINGS = ("*embed*", "*wte*", "*wpe*")

HEAD_PATTERNS = ("lm_head*", "*classifier*", "score*", "*cls*")

HEAD_NAMES = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight", "lm_head.decoder.weight")

EMBEDDING_SUFFIXES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")

_NOT_WORDS = ("*position*", "*wpe*", "*token_type*")

_HEAD_BIASES = ("lm_head.bias", "cls.predictions.bias", "cls.predictions.decoder.bias", "lm_head.decoder.bias")

# Buffers that older transformers wrote and newer ones rebuild: absent or extra, they say nothing about homology.
_REBUILT = ("*rotary_emb.inv_freq", "*position_ids", "*token_type_ids", "*.attn.bias", "*.attn.masked_bias")


def group_of(name: str, shape: tuple[int, ...]) -> str | None:
    """Tensor name and shape -> its group, None for the matrices that are none of them.

    >>> group_of("model.layers.0.input_layernorm.weight", (64,)), group_of("model.embed_tokens.weight", (100, 64))
    ('norms', 'embeddings')
    """
    if name.endswith("bias"):
        return "biases"
    if len(shape) <= 1:
        return "norms"
    if any(fnmatchcase(name, pattern) for pattern in HEAD_PATTERNS):
        return "heads"
    if any(fnmatchcase(name, pattern) for pattern in _EMBEDDINGS):
        return "embeddings"
    return None


def is_head(name: str) -> bool:
    """Whether a tensor belongs to a head, its bias and norms included: what the recipe's key `heads` is about.

    >>> is_head("classifier.bias"), is_head("lm_head.weight"), is_head("bert.pooler.dense.weight")
    (True, True, False)
    """
    return any(fnmatchcase(name, pattern) for pattern in HEAD_PATTERNS)


def is_kept_dense(name: str, shape: tuple[int, ...], patterns: Iterable[str]) -> bool:
    """Whether `keep_dense` (groups and globs) names this tensor."""
    group = group_of(name, shape)
    return any(group == pattern if pattern in GROUPS else fnmatchcase(name, pattern) for pattern in patterns)


def has_vocabulary_rows(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the first axis counts tokens: embeddings, heads and heads' biases, but not positions or classes.

    >>> has_vocabulary_rows("model.embed_tokens.weight", (100, 64)), has_vocabulary_rows("classifier.weight", (3, 64))
    (True, False)
    """
    if any(fnmatchcase(name, pattern) for pattern in _NOT_WORDS):
        return False
    heads = name.endswith((*HEAD_NAMES, *_HEAD_BIASES))
    return heads or (len(shape) == 2 and group_of(name, shape) == "embeddings")


def is_rebuilt(name: str) -> bool:
    """Whether transformers makes this buffer itself."""
    return any(fnmatchcase(name, pattern) for pattern in _REBUILT)


def embedding_for(head: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The embedding that a missing head is tied to: by its name's ending, and as wide as `head` where that is known."""
    wanted = shapes.get(head)
    for name, shape in shapes.items():
        if name.endswith(EMBEDDING_SUFFIXES) and (wanted is None or shape[1:] == wanted[1:]):
            return name
    return None
