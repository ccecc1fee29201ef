# SPDX-License-Identifier: Apache-2.0
"""Which tensors of the checkpoints correspond, from their headers alone; or what keeps them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from darekit.architectures.groups import (
    HEAD_NAMES,
    HEAD_PATTERNS,
    embedding_for,
    has_vocabulary_rows,
    is_head,
    is_rebuilt,
)
from darekit.architectures.tying import is_tied, tied_by_default
from darekit.checkpoints import Checkpoint, TensorInfo, natural_key
from darekit.dtypes import dtype_named
from darekit.errors import HomologyError
from darekit.wording import label

HEADS_HINT = (
    "Only heads differ: `heads: base` or `heads: MODEL` (--heads) takes them from one model and merges the rest"
)


@dataclass(frozen=True, slots=True)
class AlignedTensor:
    """One output tensor and the inputs it is made of; None: that checkpoint has nothing to say about it.

    `head`: taken as it is from the one checkpoint that has a say.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: TensorInfo | None
    models: tuple[TensorInfo | None, ...]
    head: bool = False


@dataclass(frozen=True)
class Alignment:
    """How the checkpoints' tensors correspond. `tied` and `vocab_size`: what config.json must say, None: no change."""

    tensors: tuple[AlignedTensor, ...]
    tied: bool | None
    vocab_size: int | None
    notes: tuple[str, ...]


Heads = Checkpoint | Literal["merged", "common"]


def align(base: Checkpoint | None, models: Sequence[Checkpoint], vocab: str, *, heads: Heads = "merged") -> Alignment:
    """Headers of all checkpoints -> which tensors correspond, or an error that lists what does not.

    Args:
        base: the base, None where the recipe has none.
        models: the models, in recipe order.
        vocab: what to do with vocabularies that differ: strict, base or pad.
        heads: `merged`: as all other tensors; `common`: those that are not everywhere alike are left out, with a note;
            one of the checkpoints: its heads are the output's, and nobody compares those of the others.

    Raises:
        HomologyError: missing, extra or differently shaped tensors; vocabularies that differ under `vocab: strict`;
            a checkpoint without heads that is to give them.
    """
    checkpoints = [*([base] if base else []), *models]
    views, tied, notes = _untie(checkpoints)
    taken: dict[str, TensorInfo] = {}
    if isinstance(heads, Checkpoint):
        taken = _take_heads(heads, checkpoints, views, notes)
    elif heads == "common":
        _leave_out_heads(views, notes)
    reference = views[0]
    _compare_names(checkpoints, views, notes)
    rows_wanted = _compare_shapes(checkpoints, views, vocab)
    tensors = []
    vocab_size = None
    for name, info in sorted(reference.items(), key=lambda item: natural_key(item[0])):
        shape = info.shape
        if name in rows_wanted:
            shape = (rows_wanted[name], *shape[1:])
            if embedding_for(name, {name: shape}):  # said even where it is the base's: the config may be a model's
                vocab_size = shape[0]
        found = [view.get(name) for view in views]
        tensors.append(
            AlignedTensor(name, info.dtype, shape, found[0] if base else None, tuple(found[1:] if base else found))
        )
    if isinstance(heads, Checkpoint):
        for name, info in taken.items():
            owners = tuple(info if model is heads else None for model in models)
            tensors.append(AlignedTensor(name, info.dtype, info.shape, info if heads is base else None, owners, True))
        tensors.sort(key=lambda tensor: natural_key(tensor.name))
        _compare_head_rows(heads, tensors)
    return Alignment(tuple(tensors), tied, vocab_size, tuple(notes))


def _untie(checkpoints: Sequence[Checkpoint]) -> tuple[list[dict[str, TensorInfo]], bool | None, list[str]]:
    """Decide once whether head and embedding are one tensor; give every checkpoint the same view of it."""
    views = [dict(checkpoint.tensors) for checkpoint in checkpoints]
    head = next((name for name in HEAD_NAMES if any(name in view for view in views)), None)
    if head is None:
        return views, None, []
    untied = [head in view and not _says_tied(checkpoint) for checkpoint, view in zip(checkpoints, views, strict=True)]
    if all(untied):
        return views, None, []
    if not any(untied):  # stored twice: the loader would ignore the head
        for view in views:
            view.pop(head, None)
        return views, True, []
    notes = []
    for checkpoint, view, alone in zip(checkpoints, views, untied, strict=True):
        if alone:
            continue
        embedding = embedding_for(head, {name: info.shape for name, info in view.items()})
        if embedding is None:
            continue
        view[head] = replace(view[embedding], name=head)
        notes.append(f"{label(checkpoint.ref)} ties {head} to {embedding}, but others do not: the output is untied")
    return views, False, notes


def _says_tied(checkpoint: Checkpoint) -> bool:
    config = checkpoint.config
    if config is None:
        return False
    said = is_tied(config)
    return tied_by_default(str(config.get("model_type", ""))) if said is None else said


def _take_heads(
    giver: Checkpoint, checkpoints: Sequence[Checkpoint], views: Sequence[dict[str, TensorInfo]], notes: list[str]
) -> dict[str, TensorInfo]:
    """Remove the heads from all views; those of one checkpoint are the output's."""
    taken: dict[str, TensorInfo] = {}
    others = []
    for checkpoint, view in zip(checkpoints, views, strict=True):
        own = {name: view.pop(name) for name in list(view) if is_head(name)}
        if checkpoint is giver:
            taken = own
        elif own:
            others.append(label(checkpoint.ref))
    if not taken:
        raise HomologyError(
            f"heads should come from {giver.ref}, but it has none: no tensor is named {', '.join(HEAD_PATTERNS)} (a "
            "head tied to the embedding counts as an embedding). Name another model, or remove `heads`"
        )
    if others:
        notes.append(
            f"heads ({_some(list(taken))}) are taken from {label(giver.ref)}; those of {', '.join(others)} are left out"
        )
    return taken


def _leave_out_heads(views: Sequence[dict[str, TensorInfo]], notes: list[str]) -> None:
    names = dict.fromkeys(name for view in views for name in view if is_head(name))
    unlike = [
        name
        for name in names
        if len({view[name].shape if name in view else None for view in views}) > 1 and not _are_words(views, name)
    ]
    for name in unlike:
        for view in views:
            view.pop(name, None)
    if unlike:
        notes.append(f"heads that differ in shape, or that some models lack, are left out: {', '.join(unlike)}")


def _are_words(views: Sequence[dict[str, TensorInfo]], name: str) -> bool:
    """Whether a head is everywhere, and differs in the size of the vocabulary at most."""
    return all(name in view and has_vocabulary_rows(name, view[name].shape) for view in views)


def _compare_head_rows(giver: Checkpoint, tensors: Sequence[AlignedTensor]) -> None:
    """A language model's head must have a row for each token of the output's vocabulary."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    for tensor in tensors:
        embedding = embedding_for(tensor.name, shapes) if tensor.head else None
        if embedding and has_vocabulary_rows(tensor.name, tensor.shape) and shapes[embedding][0] != tensor.shape[0]:
            raise HomologyError(
                f"{tensor.name} of {giver.ref} has {tensor.shape[0]} rows, but {embedding} of the output "
                f"has {shapes[embedding][0]}: take the heads of a model with the same vocabulary, or change `vocab`"
            )


def _compare_names(checkpoints: Sequence[Checkpoint], views: Sequence[dict[str, TensorInfo]], notes: list[str]) -> None:
    reference = views[0]
    problems = []
    for checkpoint, view in zip(checkpoints[1:], views[1:], strict=True):
        missing = [name for name in reference if name not in view and not is_rebuilt(name)]
        extra = [name for name in view if name not in reference]
        dropped = [name for name in extra if is_rebuilt(name)]
        extra = [name for name in extra if not is_rebuilt(name)]
        if dropped:
            notes.append(f"{label(checkpoint.ref)}: {len(dropped)} buffers that the loader rebuilds are left out")
        if missing:
            problems.append(f"{checkpoint.ref} lacks {_some(missing)} of {checkpoints[0].ref}")
        if extra:
            problems.append(f"{checkpoint.ref} has {_some(extra)} that {checkpoints[0].ref} lacks")
        if missing and extra:
            problems += _prefix_hint(missing, extra)
        if (missing or extra) and all(is_head(name) for name in (*missing, *extra)):
            problems.append(HEADS_HINT)
    if problems:
        raise HomologyError(
            "The models do not have the same tensors, so as stored they were not fine-tuned from one base:\n  "
            + "\n  ".join(problems)
        )


def _prefix_hint(missing: Sequence[str], extra: Sequence[str]) -> list[str]:
    """The commonest cause: the same tensors saved with and without the wrapper's prefix."""
    for ours, theirs in ((missing, extra), (extra, missing)):
        prefix = ours[0].split(".")[0] + "."
        if {name.removeprefix(prefix) for name in ours} & set(theirs):
            return [f"Names differ by the prefix {prefix!r}: save both with the same class (AutoModelForCausalLM)"]
    return []


def _compare_shapes(
    checkpoints: Sequence[Checkpoint], views: Sequence[dict[str, TensorInfo]], vocab: str
) -> dict[str, int]:
    """Rows of every output tensor whose vocabulary differs; raises where anything else does."""
    problems, vocabularies, rows = [], [], {}
    foreign = True  # all problems so far are shapes of heads
    for name, info in views[0].items():
        found = [(c, view[name]) for c, view in zip(checkpoints, views, strict=True) if name in view]
        for checkpoint, other in found[1:]:
            floats = dtype_named(other.dtype).kind == "float", dtype_named(info.dtype).kind == "float"
            if floats[0] != floats[1] or (not floats[0] and other.dtype != info.dtype):
                foreign = False
                problems.append(f"{name}: {other.dtype} in {checkpoint.ref}, {info.dtype} in {checkpoints[0].ref}")
        shapes = {other.shape for _, other in found}
        if len(shapes) == 1:
            continue
        if len({shape[1:] for shape in shapes}) == 1 and info.shape and has_vocabulary_rows(name, info.shape):
            counts = [other.shape[0] for _, other in found]
            rows[name] = max(counts) if vocab == "pad" else counts[0]
            vocabularies.append(
                f"{name}: " + ", ".join(f"{other.shape[0]} rows in {label(c.ref)}" for c, other in found)
            )
        else:
            problems.append(f"{name}: " + ", ".join(f"{list(other.shape)} in {label(c.ref)}" for c, other in found))
            foreign = foreign and is_head(name)
    if problems and foreign:
        problems.append(HEADS_HINT)
    if problems:
        raise HomologyError(f"Tensors of the same name differ in shape or kind: {_some(problems, sep='; ')}")
    if vocabularies and vocab == "strict":
        raise HomologyError(
            "The vocabularies differ:\n  "
            + "\n  ".join(vocabularies[:4])
            + "\nChoose what to do with the extra rows: `vocab: base` drops them, `vocab: pad` keeps them from the "
            "models that have them (on the command line: --vocab; in a recipe, set tokenizer_source to match)"
        )
    return rows


def _some(names: Sequence[str], sep: str = ", ") -> str:
    shown = sep.join(names[:4])
    return (
        f"{len(names)} tensors ({shown}{', ...' if len(names) > 4 else ''})"
        if sep == ", "
        else shown + (f"; ... {len(names) - 4} more" if len(names) > 4 else "")
    )
