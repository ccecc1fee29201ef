# SPDX-License-Identifier: Apache-2.0
"""Do these checkpoints belong together? First from headers alone, then from a small sample of their values.

The numeric test rests on one number per tensor, r = ||delta||_F / ||W||_F. With random drop and rescale the relative
perturbation of a linear layer's output is about rho = r sqrt(p / (1 - p)) for inputs without a preferred direction.
The thresholds are a rule of thumb from small models, and stand here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Literal

import numpy as np
import numpy.typing as npt

from darekit.checkpoints import Checkpoint, TensorInfo, natural_key
from darekit.dtypes import Floats, dtype_named, widen
from darekit.errors import DataError, HomologyError
from darekit.naming import HEAD_NAMES, HEAD_PATTERNS, embedding_for, has_vocabulary_rows, is_head, is_rebuilt
from darekit.output.config import is_tied, tied_by_default

TAU = 0.2  # rho up to which abilities stayed in every small model that was measured
RHO_STOP = 0.5
R_LARGE = 0.25
R_STOP = 0.5

SAMPLED_CHUNKS = 4
SAMPLED_ELEMENTS = 4096  # per chunk

HEADS_HINT = (
    "Only heads differ: `heads: base` or `heads: MODEL` (--heads) takes them from one model, and merges the rest"
)
RULE_OF_THUMB = "(a rule of thumb from small models)"


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


def label(ref: str) -> str:
    """A model's short name for tables and errors: the last part of its path or id."""
    return PurePath(ref).name or ref


def distinct_labels(refs: Sequence[str]) -> list[str]:
    """Short names, or the whole ones where two short ones are the same.

    >>> distinct_labels(["a/math", "a/code", "b/code"])
    ['math', 'a/code', 'b/code']
    """
    short = [label(ref) for ref in refs]
    return [ref if short.count(one) > 1 else one for ref, one in zip(refs, short, strict=True)]


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
        return views, False if _says_tied(checkpoints[0]) else None, []
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
        notes.append(f"{label(checkpoint.ref)} ties {head} to {embedding}, others do not: the output is untied")
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
            f"heads are to come from {giver.ref}, which has none: no tensor named {', '.join(HEAD_PATTERNS)} (a head "
            "that is tied to the embedding counts as embedding). Name another model, or remove `heads`"
        )
    if others:
        notes.append(
            f"heads ({_some(list(taken))}) are {label(giver.ref)}'s; those of {', '.join(others)} are left out"
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
        notes.append(f"heads that differ in shape, or that not all have, are left out: {', '.join(unlike)}")


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
                f"{tensor.name} of {giver.ref} has {tensor.shape[0]} rows, and {embedding} of the output "
                f"{shapes[embedding][0]}: take the heads of a model with the same vocabulary, or change `vocab`"
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
            "The models do not have the same tensors, so they were not fine-tuned from one base as they stand:\n  "
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
            "models that have them (--vocab; in a recipe the tokenizer to go with it: tokenizer_source)"
        )
    return rows


def _some(names: Sequence[str], sep: str = ", ") -> str:
    shown = sep.join(names[:4])
    return (
        f"{len(names)} tensors ({shown}{', ...' if len(names) > 4 else ''})"
        if sep == ", "
        else shown + (f"; ... {len(names) - 4} more" if len(names) > 4 else "")
    )


@dataclass(frozen=True, slots=True)
class Norms:
    """A sample's squared norms for one tensor of one model, and what will be dropped of it."""

    name: str
    parameters: int
    delta: float
    base: float
    drop_rate: float  # 0: not dropped
    noise: float  # of one element, as a multiple of it; 0: not a random drop that is rescaled, rho says nothing

    @property
    def r(self) -> float:
        """||delta|| / ||W||; infinite where the base is all zeros and the delta is not."""
        if self.delta == 0:
            return 0.0
        return math.inf if self.base == 0 else math.sqrt(self.delta / self.base)

    @property
    def rho(self) -> float:
        """Predicted relative perturbation of the output."""
        return self.r * self.noise if self.noise else 0.0


def sample_norms(
    tensors: Iterable[AlignedTensor], model: int, rate_of: Callable[[AlignedTensor], tuple[float, float]]
) -> list[Norms]:
    """Read a few evenly spread chunks of each float tensor of one model and its base.

    Args:
        tensors: the alignment's tensors.
        model: the model's index in the recipe.
        rate_of: tensor -> (drop rate, noise of one element where it is a random drop that is rescaled).
    """
    norms = []
    for tensor in tensors:
        base, tuned = tensor.base, tensor.models[model]
        if base is None or tuned is None or dtype_named(base.dtype).kind != "float":
            continue
        common = min(base.count, tuned.count)
        chunks = _chunks(common)
        before, after = _read(base, chunks), _read(tuned, chunks)
        with np.errstate(invalid="ignore", over="ignore"):
            change = after - before
        usable = np.isfinite(change)
        delta, square = _sum_of_squares(change, usable), _sum_of_squares(before, usable)
        rate, noise = rate_of(tensor)
        norms.append(Norms(tensor.name, common, delta, square, rate, noise))
    return norms


def check_integers(tensors: Iterable[AlignedTensor], refs: Sequence[str]) -> None:
    """Integer and bool tensors are copied: a sample must agree before anything is written.

    Raises:
        DataError: they differ, as those of quantised models do.
    """
    for tensor in tensors:
        if dtype_named(tensor.dtype).kind == "float":
            continue
        first = tensor.base or next(info for info in tensor.models if info)
        for ref, other in zip(refs, tensor.models, strict=True):
            if other is None or other is first:
                continue
            size = min(first.nbytes, 1 << 20)
            raws = np.empty(size, np.uint8), np.empty(size, np.uint8)
            first.source.read_into(raws[0], 0)
            other.source.read_into(raws[1], 0)
            if first.shape != other.shape or not np.array_equal(*raws):
                raise DataError(
                    f"{tensor.name} ({tensor.dtype}) of {ref} differs from the base's. Integer tensors cannot be "
                    "merged; if the model is quantised, dequantise it first"
                )


def _chunks(count: int) -> list[tuple[int, int]]:
    if count <= SAMPLED_CHUNKS * SAMPLED_ELEMENTS:
        return [(0, count)]
    step = (count - SAMPLED_ELEMENTS) // (SAMPLED_CHUNKS - 1)
    return [(i * step, SAMPLED_ELEMENTS) for i in range(SAMPLED_CHUNKS)]


def _read(info: TensorInfo, chunks: Sequence[tuple[int, int]]) -> Floats:
    """(start, count) of chunks, all of one count -> (chunks, count) float32 or float64."""
    dtype, shape = dtype_named(info.dtype), (len(chunks), chunks[0][1])
    raw = np.empty((shape[0], shape[1] * dtype.itemsize), np.uint8)
    for row, (start, _) in zip(raw, chunks, strict=True):
        info.source.read_into(row, start * dtype.itemsize)
    values: Floats = np.empty(shape, np.float64 if dtype.name == "F64" else np.float32)
    widen(raw.reshape(-1), dtype, values.reshape(-1))
    return values


def _sum_of_squares(values: Floats, usable: npt.NDArray[np.bool_]) -> float:
    """(chunks, count), of which only what is usable counts; chunk by chunk, so that a NaN changes no other sum."""
    if usable.all():
        return sum(np.square(values, dtype=np.float64).sum(axis=1).tolist(), 0.0)
    rows = zip(values, usable, strict=True)
    return sum((float(np.sum(np.square(row[good], dtype=np.float64))) for row, good in rows), 0.0)


def weighted_median(pairs: Iterable[tuple[float, int]]) -> float:
    """(value, weight) pairs -> the value at half of the weight; 0 for none.

    >>> weighted_median([(1.0, 1), (5.0, 3), (9.0, 1)])
    5.0
    """
    ordered = sorted(pairs)
    half = sum(weight for _, weight in ordered) / 2
    total = 0.0
    for value, weight in ordered:
        total += weight
        if total >= half:
            return value
    return 0.0


def p_max(r: float, tau: float = TAU) -> float:
    """Largest drop rate with rho <= tau: tau^2 / (tau^2 + r^2)."""
    return tau * tau / (tau * tau + r * r)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the sample says of one model: `stop` is a refusal, `warning` a line to print; None: nothing to say."""

    model: str
    r: float
    rho: float
    stop: str | None
    warning: str | None

    def to_data(self) -> Mapping[str, float | str | None]:
        """JSON-able form."""
        return {"model": self.model, "r": self.r, "rho": self.rho, "warning": self.stop or self.warning}


def judge(ref: str, base_ref: str, norms: Sequence[Norms]) -> Judgement:
    """Norms of one model -> is this its base, and is as much dropped as deltas this large can bear?

    Args:
        ref: the model, as the recipe names it.
        base_ref: its base.
        norms: its sampled norms.

    The medians run over the tensors that are dropped, over all where none is.
    """
    scope = [n for n in norms if n.drop_rate > 0] or list(norms)
    r = weighted_median((n.r, n.parameters) for n in scope)
    random = [n for n in scope if n.noise]
    rho = weighted_median((n.rho, n.parameters) for n in random) if random else 0.0
    stop = warning = None
    if r > R_STOP:
        stop = (
            f"{base_ref} does not look like the base of {ref}: the median tensor differs from it by r = {r:.2f} of "
            f"its norm; fine-tuning changes 0.001 to 0.1, more than {R_STOP} is refused {RULE_OF_THUMB}. "
            "Name the checkpoint that the model was fine-tuned from"
        )
    elif rho > RHO_STOP:
        stop = (
            f"Too much is dropped of {ref} for deltas this large: predicted perturbation rho = {rho:.3f} "
            f"(r = {r:.3f}), more than {RHO_STOP} is refused {RULE_OF_THUMB}. A drop rate of "
            f"{_shown_rate(r)} brings it to {TAU}"
        )
    elif rho > TAU:
        warning = (
            f"{label(ref)}: predicted perturbation rho = {rho:.2f} (r = {r:.3f}) is above {TAU} {RULE_OF_THUMB}; "
            f"a drop rate of {_shown_rate(r)} would bring it to {TAU}"
        )
    elif norms and all(n.delta == 0 for n in norms):
        warning = f"{label(ref)} is identical to {base_ref} wherever it was sampled: is it the right model?"
    return Judgement(ref, r, rho, stop, warning)


def _shown_rate(r: float) -> str:
    return f"{math.floor(p_max(r) * 1000) / 1000:g}"
