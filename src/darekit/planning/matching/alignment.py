# SPDX-License-Identifier: Apache-2.0
"""Which tensors of the checkpoints correspond, from their headers alone; or what keeps them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from darekit.architectures.families import HEADS
from darekit.checkpoints import Checkpoint, TensorInfo, natural_key
from darekit.dtypes import dtype_named
from darekit.errors import HomologyError
from darekit.planning.matching.extras import Extras, Parts, leave_out_extras, settle_extras
from darekit.planning.matching.fusing import fit_parts
from darekit.planning.matching.hints import causes
from darekit.planning.matching.naming import Roles, View, buffers_of, views_of
from darekit.planning.matching.prefixes import fit_prefixes
from darekit.planning.matching.ties import has_own_head, settle_ties
from darekit.planning.matching.turning import fit_turned
from darekit.planning.matching.vocabulary import rows_told, sizes_for_config, tokens_axis
from darekit.wording import label, some

HEADS_HINT = (
    "Only heads differ: `heads: base` or `heads: MODEL` (--heads) takes them from one model and merges the rest"
)


@dataclass(frozen=True, slots=True)
class AlignedTensor:
    """One output tensor and the inputs it is made of; None: that checkpoint has nothing to say about it.

    Attributes:
        name: that is written: the reference's own.
        dtype, shape: of the output.
        base, models: the inputs, each under the name that it is stored under.
        head: taken as it is from the one checkpoint that has a say.
        of_head: belongs to a head, merged or taken.
        group: of `keep_dense`; None: none.
        token_axis: the axis that counts tokens; None: none does.
        copied: a buffer that loaders rebuild: its one input's bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: TensorInfo | None
    models: tuple[TensorInfo | None, ...]
    head: bool = False
    of_head: bool = False
    group: str | None = None
    token_axis: int | None = None
    copied: bool = False


@dataclass(frozen=True)
class Alignment:
    """How the checkpoints' tensors correspond.

    Attributes:
        tensors: of the output, in order.
        tied: what config.json must say of the output embedding; None: no change.
        sizes: what it must say of vocabularies: key, with dots -> rows.
        notes: what the user should know.
        copies: per checkpoint, stored name of a tied copy -> name of the output tensor that it is.
        buffers: per checkpoint, stored names of what every loader makes itself.
    """

    tensors: tuple[AlignedTensor, ...]
    tied: bool | None
    sizes: Mapping[str, int]
    notes: tuple[str, ...]
    copies: tuple[Mapping[str, str], ...] = field(default=())
    buffers: tuple[frozenset[str], ...] = field(default=())


Heads = Checkpoint | Literal["merged", "common"]


def align(
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    vocab: str,
    *,
    heads: Heads = "merged",
    verbatim: bool = False,
    extras: Extras = "keep",
) -> Alignment:
    """Headers of all checkpoints -> which tensors correspond, or an error that lists what does not.

    Names are compared as the loader knows them, and written as the base has them (as the checkpoint that gives the
    heads has them, as these are of its class). Values are read where they decide a tie, and no others.

    Args:
        base: the base, None where the recipe has none.
        models: the models, in recipe order.
        vocab: what to do with vocabularies that differ: strict, base or pad.
        heads: `merged`: as all other tensors; `common`: those that are not everywhere alike are left out, with a note;
            one of the checkpoints: its heads are the output's, and nobody compares those of the others.
        verbatim: where all checkpoints store the same names and shapes, every tensor that is stored is one of the
            output: copies and buffers stay what they are.
        extras: what becomes of parts that only the base has, and that a class may do without: keep or leave_out.

    Raises:
        HomologyError: missing, extra or differently shaped tensors; vocabularies that differ under `vocab: strict`;
            a checkpoint without heads that is to give them.
    """
    checkpoints = [*([base] if base else []), *models]
    notes: list[str] = []
    verbatim = verbatim and all(_is_like(one, checkpoints[0]) for one in checkpoints[1:])
    views = views_of(checkpoints, notes, verbatim=verbatim)
    roles = Roles(views[0].facts)
    naming = views[0]
    if isinstance(heads, Checkpoint):
        naming = next(view for view in views if view.checkpoint is heads)
    fit_prefixes(views, notes)
    tied = has_own_head(views) if verbatim else settle_ties(views, notes)
    fit_parts(views, notes)
    fit_turned(views, notes)
    taken: dict[str, TensorInfo] = {}
    if isinstance(heads, Checkpoint):
        taken = _take_heads(naming, views, notes)
    elif heads == "common":
        _leave_out_heads(views, roles, notes)
        leave_out_extras(views, notes)
    alone: frozenset[str] = frozenset()
    if base is not None:
        more, alone = settle_extras(views, giver=naming if taken else None, extras=extras, notes=notes)
        taken |= more
    _compare_names(views, alone)
    rows = _compare_shapes(views, vocab, roles)
    tensors = []

    def add(key: str, info: TensorInfo, found: Sequence[TensorInfo | None], **more: bool) -> None:
        role, shape, axis = roles.of(views[0].name_of(key, info), info.shape), info.shape, rows.get(key)
        if axis is not None:
            shape = (*shape[: axis[0]], axis[1], *shape[axis[0] + 1 :])
        own, others = (found[0], found[1:]) if base else (None, found)
        tensors.append(
            AlignedTensor(
                naming.name_of(key, info), info.dtype, shape, own, tuple(others), of_head=role.is_head,
                group=role.group, token_axis=role.token_axis, **more,
            )
        )  # fmt: skip

    for key, info in views[0].tensors.items():
        add(key, info, [view.tensors.get(key) for view in views])
    for key, info in taken.items():
        add(key, info, [info if view is naming else None for view in views], head=True)
    for key, info in buffers_of(views, notes).items():
        if naming is views[0] or key in naming.buffers:
            add(key, info, [info, *(None for _ in views[1:])], copied=True)
    _sort(tensors, checkpoints[0])
    if taken:
        _compare_head_rows(naming, tensors)
    sizes = sizes_for_config(views[0].facts, {views[0].name_of(key): found for key, found in rows.items()})
    copies = tuple({name: naming.name_of(key) for name, key in view.copies.items()} for view in views)
    buffers = tuple(frozenset(info.name for info in view.buffers.values()) for view in views)
    return Alignment(tuple(tensors), tied, sizes, tuple(notes), copies, buffers)


def _is_like(one: Checkpoint, other: Checkpoint) -> bool:
    shapes = {name: info.shape for name, info in other.tensors.items()}
    return {name: info.shape for name, info in one.tensors.items()} == shapes


def _sort(tensors: list[AlignedTensor], reference: Checkpoint) -> None:
    """Into the order of `natural_key`, which is slow; what has the reference's names and order is in it."""
    names = {tensor.name for tensor in tensors}
    if [tensor.name for tensor in tensors] != [name for name in reference.tensors if name in names]:
        tensors.sort(key=lambda tensor: natural_key(tensor.name))


def _take_heads(giver: View, views: Sequence[View], notes: list[str]) -> dict[str, TensorInfo]:
    """Remove the heads from all views; those of one checkpoint are the output's. Where its class is for another task
    than the reference's, so that each has some that the other lacks, layers that all have before their outputs
    (ModernBERT's `head`) were trained by all, and are merged."""
    taken: dict[str, TensorInfo] = {}
    others = []
    heads = [
        {key: info for key, info in view.tensors.items() if Roles(view.facts).of(view.name_of(key), info.shape).is_head}
        for view in views
    ]
    given = next(own for view, own in zip(views, heads, strict=True) if view is giver)
    shared: set[str] = set()
    if not (heads[0].keys() <= given.keys() or given.keys() <= heads[0].keys()):
        everywhere = given.keys() & heads[0].keys()
        shared = {key for key in everywhere if len({own[key].shape if key in own else () for own in heads}) == 1}
    for view, found in zip(views, heads, strict=True):
        own = {key: info for key, info in found.items() if key not in shared}
        for key in own:
            del view.tensors[key]
        if view is giver:
            taken = own
        elif own:
            others.append(label(view.ref))
    if not taken:
        raise HomologyError(
            f"heads should come from {giver.ref}, but it has none: no tensor is named {', '.join(HEADS)} (a "
            "head tied to the embedding counts as an embedding). Name another model, or remove `heads`"
        )
    if others:
        notes.append(
            f"heads ({_tensors([info.name for info in taken.values()])}) are taken from {label(giver.ref)}; those of "
            f"{', '.join(others)} are left out"
        )
    return taken


def _leave_out_heads(views: Sequence[View], roles: Roles, notes: list[str]) -> None:
    heads = {
        key: info
        for view in views
        for key, info in view.tensors.items()
        if roles.of(view.name_of(key), info.shape).is_head
    }  # fmt: skip
    unlike = []
    for key, info in heads.items():
        found = [view.tensors.get(key) for view in views]
        there = [one for one in found if one is not None]
        # One that is everywhere may differ in the size of the vocabulary.
        differs = len({one.shape for one in there}) > 1 and tokens_axis(info, there, roles) is None
        if differs or len(there) < len(found):
            unlike.append(info.name)
            for view in views:
                view.tensors.pop(key, None)
    if unlike:
        notes.append(f"heads that differ in shape, or that some models lack, are left out: {', '.join(unlike)}")


def _compare_head_rows(giver: View, tensors: Sequence[AlignedTensor]) -> None:
    """A language model's head must have a row for each token of the output's vocabulary."""
    facts = giver.facts
    embedding = next((t for t in tensors if not t.head and facts.is_input_embedding(t.name)), None)
    for tensor in tensors if embedding else ():
        words = tensor.head and tensor.token_axis == 0 and facts.is_output_embedding(tensor.name)
        if embedding and words and tensor.shape[0] != embedding.shape[0]:
            raise HomologyError(
                f"{tensor.name} of {giver.ref} has {tensor.shape[0]} rows, but {embedding.name} of the output "
                f"has {embedding.shape[0]}: take the heads of a model with the same vocabulary, or change `vocab`"
            )


def _compare_names(views: Sequence[View], alone: frozenset[str]) -> None:
    """`alone`: keys that the first may have alone."""
    reference, parts = views[0], Parts(views)
    problems = []
    for view in views[1:]:
        if view.tensors.keys() == reference.tensors.keys():
            continue
        missing = [info.name for key, info in reference.tensors.items() if key not in view.tensors and key not in alone]
        extra = [info.name for key, info in view.tensors.items() if key not in reference.tensors]
        if missing:
            problems.append(f"{view.ref} lacks {_tensors(missing)} of {reference.ref}")
        if extra:
            problems.append(f"{view.ref} has {_tensors(extra)} that {reference.ref} lacks")
        problems += causes(view, reference, missing, extra)
        others = [other for other in views[1:] if other is not view]
        if (missing or extra) and all(map(parts.may_be_absent, (*missing, *extra))):
            if extra and any(map(parts.is_own, extra)):
                problems.append(HEADS_HINT)
            else:
                problems.append(_way_out(view, reference, others))
    if problems:
        raise HomologyError(
            "The models do not have the same tensors, so as stored they were not fine-tuned from one base:\n  "
            + "\n  ".join(problems)
        )


def _way_out(view: View, reference: View, others: Sequence[View]) -> str:
    """What to do about a model that lacks what the others have."""
    kind = next((one.facts.class_name for one in (*others, reference) if one.facts.is_exact), None)
    return (
        f"To continue, save {view.ref} again with the class of the others{f' ({kind})' if kind else ''}, or leave it "
        "out; with `heads: MODEL` (--heads) the output has exactly the parts of that model"
    )


def _compare_shapes(views: Sequence[View], vocab: str, roles: Roles) -> dict[str, tuple[int, int]]:
    """Key of each tensor whose vocabulary differs -> its axis, and the output's rows; raises where more differs."""
    problems, vocabularies, rows = [], [], {}
    foreign = True  # all problems so far are shapes of heads
    unlike = {
        key
        for view in views[1:]
        for key, info in views[0].tensors.items()
        if (other := view.tensors.get(key)) is not None and (other.shape != info.shape or other.dtype != info.dtype)
    }
    for key, info in views[0].tensors.items() if unlike else ():
        if key not in unlike:
            continue
        found = [(view, view.tensors[key]) for view in views if key in view.tensors]
        for view, other in found[1:]:
            floats = dtype_named(other.dtype).kind == "float", dtype_named(info.dtype).kind == "float"
            if floats[0] != floats[1] or (not floats[0] and other.dtype != info.dtype):
                foreign = False
                problems.append(f"{info.name}: {other.dtype} in {view.ref}, {info.dtype} in {views[0].ref}")
        if len({other.shape for _, other in found}) == 1:
            continue
        axis = tokens_axis(info, [other for _, other in found], roles)
        if axis is not None:
            counts = [other.shape[axis] for _, other in found]
            rows[key] = axis, max(counts) if vocab == "pad" else counts[0]
            vocabularies.append(rows_told(info.name, axis, found))
        else:
            problems.append(
                f"{info.name}: " + ", ".join(f"{list(other.shape)} in {label(view.ref)}" for view, other in found)
            )
            foreign = foreign and roles.of(info.name, info.shape).is_head
    if problems and foreign:
        problems.append(HEADS_HINT)
    if problems:
        raise HomologyError(f"Tensors of the same name differ in shape or kind: {some(problems, sep='; ')}")
    if vocabularies and vocab == "strict":
        raise HomologyError(
            "The vocabularies differ:\n  "
            + "\n  ".join(vocabularies[:4])
            + "\nIf the models have tokens of their own: `tokenizer_source: union` matches rows by token and keeps all "
            "tokens (base, or a model: that one's). By number: `vocab: base` drops the extra rows, `vocab: pad` keeps "
            "them from the models that have them. These are keys of a recipe (`dare merge --set "
            "tokenizer_source=union`; other commands have --vocab)"
        )
    return rows


def _tensors(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors ({some(names)})"
