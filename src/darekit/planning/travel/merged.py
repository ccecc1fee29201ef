# SPDX-License-Identifier: Apache-2.0
"""`config.json`, made true to the merged weights: number format, vocabulary, tied embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from darekit.architectures.families import TEXTS, VOCAB_KEYS, facts_of

if TYPE_CHECKING:
    from darekit.dtypes import DType

DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5 writes the first and reads both, 4 writes the second

# What only a tokenizer gives a meaning: eos_token_id, image_token_index, ...
ID_KEYS = re.compile(r".+_token_(id|ids|index|indices)|tokenizer_class")

CODERS = ("encoder", "decoder")  # nested configs not named `*_config`


def merged_config(
    config: Mapping[str, Any], *, dtype: DType, sizes: Mapping[str, int], tied: bool | None
) -> dict[str, Any]:
    """The config of an output whose weights are `dtype`, have vocabularies of these sizes and are `tied`.

    `sizes`: key, with dots -> rows. None means: as the config says. Everything else is left as it is, in its order.
    """
    merged = _with_dtype(config, _load_name(dtype))
    if not any(key in merged for key in DTYPE_KEYS):
        merged["torch_dtype"] = _load_name(dtype)  # the one name that 4.48 to 5.23 understand
    text = next((key for key in TEXTS if isinstance(merged.get(key), dict)), None)
    for key, rows in sizes.items():
        if key not in VOCAB_KEYS:
            _set(merged, key, rows)
            continue
        # A composite config may carry the size twice, or (where it has the default value) nowhere.
        if text is not None:
            merged[text]["vocab_size"] = rows
        if text is None or "vocab_size" in merged:
            merged["vocab_size"] = rows
    if tied is not None:
        _tie(merged, text, tied)
    return merged


def with_ids(config: Mapping[str, Any], source: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config whose ids of special tokens are those of another model, in each part that both have; what that one does
    not say is left to the loader's default.

    >>> with_ids({"eos_token_id": 1, "pad_token_id": 0, "hidden_size": 8}, {"eos_token_id": [1, 44], "hidden_size": 9})
    {'eos_token_id': [1, 44], 'hidden_size': 8}
    """
    if source is None:
        return dict(config)
    if config.get("model_type") != source.get("model_type"):  # a whole model's and its language model's, maybe
        theirs = next((source[key] for key in TEXTS if isinstance(source.get(key), dict)), source)
        ids = {key: value for key, value in {**theirs, **source}.items() if ID_KEYS.fullmatch(key)}
        parts = {key: config[key] for key in TEXTS if isinstance(config.get(key), dict)}
        inner = {at: {key: ids.get(key, value) for key, value in part.items()} for at, part in parts.items()}
        held = {key for part in parts.values() for key in part} - config.keys()
        return {**config, **inner, **{key: value for key, value in ids.items() if key not in held}}
    changed = {}
    for key, value in config.items():
        if ID_KEYS.fullmatch(key):
            if key in source:
                changed[key] = source[key]
        elif _is_part(key, value) and isinstance(source.get(key), dict):
            changed[key] = with_ids(value, source[key])
        else:
            changed[key] = value
    return changed | {key: value for key, value in source.items() if ID_KEYS.fullmatch(key) and key not in config}


def _tie(merged: dict[str, Any], text: str | None, tied: bool) -> None:
    """Say whether the output embedding is tied, where the class asks; some never ask, and T5 takes the key for
    another."""
    facts = facts_of(merged)
    keys = facts.output_tie_keys
    if facts.is_known and not keys:
        return
    for key in keys:
        _set(merged, key, tied)
    # transformers 5 asks the top level, 4 asks the language model's config: both are told.
    merged["tie_word_embeddings"] = tied
    if text is not None:
        merged[text]["tie_word_embeddings"] = tied


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a key with dots, where the part of the config that holds it is there."""
    *parts, last = key.split(".")
    place: Any = config
    for part in parts:
        place = place.get(part)
        if not isinstance(place, dict):
            return
    place[last] = value


def _load_name(dtype: DType) -> str:
    # transformers makes this torch's default dtype while it loads, which torch refuses for 8 bits.
    return "bfloat16" if dtype.name.startswith("F8") else dtype.torch_name


def _with_dtype(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in DTYPE_KEYS and (value is None or isinstance(value, str)):
            changed[key] = name
        elif key in DTYPE_KEYS and isinstance(value, dict):  # one format for each part of a composite model
            changed[key] = dict.fromkeys(value, name)
        elif _is_part(key, value):
            changed[key] = _with_dtype(value, name)
        else:
            changed[key] = value
    return changed


def _is_part(key: str, value: object) -> bool:
    return isinstance(value, dict) and (key.endswith("_config") or key in CODERS)
