# SPDX-License-Identifier: Apache-2.0
"""What mergekit ignores without a word, and what is made of it here: said in one line, or refused.

In recipes without a `sparsify:` block, words that mean something elsewhere in mergekit or its tools are accepted where
they mean nothing, each with a note. Any other word may be a misspelling of one that would matter: it is an error,
unless the recipe is read leniently. docs/mergekit.md lists the words.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from darekit.methods import MERGE_METHODS, MergeMethod
from darekit.recipe.documents import Document, Key

# Names of parameters of some method of mergekit's.
PARAMETERS = (
    "weight", "density", "gamma", "epsilon", "lambda", "normalize", "rescale", "int8_mask", "t", "scale", "max_iter",
    "tol", "eps", "normalize_weights", "nuslerp_flatten", "nuslerp_row_wise", "filter_wise", "select_topk", "r",
    "alpha", "consensus_method", "embed_slerp", "allow_negative_weights", "similarity_threshold", "smooth",
)  # fmt: skip

# Options of mergekit's commands, and keys that its tools or older versions have or write.
OPTIONS = (
    "name", "random_seed", "allow_crimes", "copy_tokenizer", "trust_remote_code", "lazy_unpickle", "low_cpu_memory",
    "cuda", "device", "clone_tensors", "out_shard_size", "write_model_card", "safe_serialization", "transformers_cache",
    "lora_merge_cache", "num_threads", "gpu_rich", "multi_gpu", "async_write", "verbose", "quiet", "out_path",
    "output_path", "output_dir", "input_model_parameters", "license", "tags", "description", "language", "library_name",
    "pipeline_tag", "author", "version",
)  # fmt: skip

# Top-level keys under which recipes keep what YAML's anchors repeat; so is any that begins with x-, _ or a point.
ANCHORS = ("anchors", "common", "defaults", "definitions", "variables")

# Beside `sources:`, and beside `model:`, without an effect anywhere else either.
SLICE_WORDS = ("residual_weight", "name")
SOURCE_WORDS = ("revision", "name")

# mergekit's words that would have an effect elsewhere, and where.
ELSEWHERE = {
    **dict.fromkeys(
        ("merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template"),
        "at the top level",
    ),
    **dict.fromkeys(("pad_to_multiple_of", "tokens"), "under `tokenizer:`"),
    **dict.fromkeys(("filter", "value"), "in an entry of a parameter's list, `- {filter: mlp, value: 0.5}`"),
    "layer_range": "beside `model:` in a slice's `sources:`",
}


def why_ignored(path: Key, method: str, entry: MergeMethod, *, inside: bool) -> str | None:
    """The note for a word that has no meaning at a path; None where it is to be refused.

    Args:
        path: where it stands; its last part is the word.
        method: as the recipe calls it.
        entry: the same in the table.
        inside: whether it stands in a block of parameters, not beside one.
    """
    word, place = str(path[-1]), ".".join(map(str, path))
    if isinstance(path[-1], int):  # an entry of a list of filters behind one for all tensors
        return (
            f"WARNING: {place} is never reached, as in mergekit: an entry before it matches every tensor; put that one "
            "last"
        )
    if inside and word in PARAMETERS:
        if word in entry.parameters:
            return (
                f"{place} has no effect, as in mergekit: {word} is one for all models; write it under the top-level "
                "`parameters:`"
            )
        owners = [name for name, other in MERGE_METHODS.items() if word in other.parameters]
        whose = f" (a parameter of {' and '.join(owners)})" if owners else ""
        return f"{place}{whose} has no effect with {method}; ignored, as mergekit does"
    if word in ELSEWHERE:
        return f"WARNING: {place} has no effect, as in mergekit: it would have one {ELSEWHERE[word]}"
    if inside:
        return None
    if word in PARAMETERS and not (word == entry.weight_word and entry.weighted and len(path) > 1):
        below = "`parameters:`" if len(path) == 1 else "a `parameters:` of its own"
        matters = word in entry.parameters or word in ("density", entry.weight_word)
        return f"{place} is ignored, as mergekit does" + (f": it would have an effect under {below}" if matters else "")
    if word == "revision" and len(path) > 1:
        return f"{place} is ignored, as mergekit does: a revision is written as `model: org/name@revision`"
    around = next((part for part in reversed(path[:-1]) if isinstance(part, str)), None)
    if len(path) == 1 and (word.startswith(("x-", "_", ".")) or word in ANCHORS):
        return anchored(path)
    words = {"sources": SOURCE_WORDS, "models": SOURCE_WORDS, "slices": SLICE_WORDS}.get(around or "", OPTIONS)
    return f"{place} is ignored, as mergekit does" if word in words else None


def lambda_ignored(path: Key, method: str) -> str:
    """The note for a `lambda` of a method that takes it here and not in mergekit."""
    return (
        f"WARNING: {'.'.join(map(str, path))} has no effect with {method}, as in mergekit; to scale the merged delta "
        "by it, write it under the top-level `parameters:` and add `output: model`, a key of ours"
    )


def anchored(path: Key) -> str:
    """The note for a key that holds what YAML's anchors repeat."""
    return f"{'.'.join(map(str, path))} is ignored, as mergekit does: what it holds counts where its anchors are used"


def without(document: Document, paths: Iterable[Key]) -> Document:
    """The same without these keys."""
    data: Any = document.data
    for path in sorted(paths, key=_from_behind, reverse=True):
        data = _removed(data, path)
    return replace(document, data=data)


def _from_behind(path: Key) -> tuple[int, ...]:
    """Orders paths so that an entry of a list comes after those before it: what is removed first moves none of them."""
    return tuple(part for part in path if isinstance(part, int))


def _removed(data: Any, path: Key) -> Any:
    key, *rest = path
    if isinstance(data, list):
        if not rest:
            return [one for i, one in enumerate(data) if i != key]
        return [_removed(one, tuple(rest)) if i == key else one for i, one in enumerate(data)]
    if rest:
        return {name: _removed(one, tuple(rest)) if name == key else one for name, one in data.items()}
    return {name: one for name, one in data.items() if name != key}
