# SPDX-License-Identifier: Apache-2.0
"""What an extraction will do: from headers and a sample of values, before anything is computed."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from darekit.architectures.families import Facts, facts_of
from darekit.checkpoints import Checkpoint
from darekit.dtypes import DTYPES
from darekit.engine.costs import INTERPRETER_BYTES
from darekit.errors import HomologyError, PlanError
from darekit.extraction import factors
from darekit.extraction.cores import adapters_in, is_thin
from darekit.extraction.layers import FACTORS
from darekit.extraction.modules import SAVED, SAVES, Selection, select
from darekit.extraction.targets import Target
from darekit.inputs.opening import packed_seed
from darekit.machine import free_host_memory, threads_of
from darekit.planning.homology import judge, sample_norms
from darekit.planning.matching.alignment import Alignment, align
from darekit.planning.opening import open_unrounded
from darekit.recipe import Recipe

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # of factors
KINDS = ("peft",)  # of adapters that are written
SERVERS = ("vllm",)
BLAS_BYTES = 40 << 20  # buffers that OpenBLAS keeps for each thread
THIN_BYTES = 32 << 20  # what a thread takes for factors of adapters, roughly
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank may be

# How fast a whole decomposition is for each flop that LAPACK's would take, and the range finder at its products,
# compared with a product of large matrices: measured with OpenBLAS.
SVD_PACE, RANGE_PACE = 0.3, 0.7


@dataclass(frozen=True)
class Terms:
    """How much of a delta is kept, and in which form. Exactly one of `rank`, `energy` and `error` is given.

    Attributes:
        rank: of every module.
        energy: of every module the share of its squared norm that is kept.
        error: of every module the norm of what is lost, relative to its delta's.
        max_rank: that energy and error may ask for.
        dtype: of the factors, by its safetensors name.
        save: the kinds of tensors that are saved whole.
        server: whose rules are kept; None: PEFT's alone.
        factors: what gets factors besides layers of matrices: embeddings, convolutions.
        in_cores: whether methods that are no sums merge adapters in core space, not as full matrices.
    """

    rank: int | None
    energy: float | None
    error: float | None
    max_rank: int | None
    dtype: str
    save: tuple[str, ...]
    server: str | None
    factors: tuple[str, ...] = ()
    in_cores: bool = False

    @property
    def share(self) -> float | None:
        """The energy that is kept of each module, where there is a budget."""
        if self.energy is not None:
            return self.energy
        return None if self.error is None else 1 - self.error**2

    def to_data(self) -> dict[str, Any]:
        """JSON-able form: what was given."""
        data = {"rank": self.rank, "energy": self.energy, "error": self.error, "max_rank": self.max_rank}
        return {key: value for key, value in data.items() if value is not None} | {
            "dtype": DTYPES[self.dtype].torch_name, "save": list(self.save), "factors": list(self.factors),
            "for": self.server,
        }  # fmt: skip


def terms_of(
    *, rank: int | None, energy: float | None, error: float | None, max_rank: int | None, dtype: str,
    save: Collection[str] | None, server: str | None, out_kind: str, recipe: Recipe | None = None,
    factors: Collection[str] = (),
) -> Terms:  # fmt: skip
    """What the user asked for; a recipe with `output: adapter` says it, where nobody else does.

    Raises:
        PlanError: no amount or several of them, or a value that is impossible.
    """
    joins = recipe is not None and recipe.output == "adapter"
    if recipe is not None and joins and rank is None and energy is None and error is None:
        rank, error = recipe.rank, 0.0 if recipe.rank is None else None
    given = {"rank": rank, "energy": energy, "error": error}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise PlanError(
            f"an adapter needs one of rank, energy and error, found {' and '.join(named) or 'none'}: rank 32, or "
            "energy 0.95 (of each delta's squared norm), or error 0.05 (of each delta's norm)"
        )
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None and (type(value) is not int or value < 1):
            raise PlanError(f"{name} {value!r}: expected a whole number above 0")
    if energy is not None and not 0 < energy <= 1:
        raise PlanError(f"energy {energy:g} is outside (0, 1]; it is the share of each delta's squared norm to keep")
    if error is not None and not 0 <= error < 1:
        raise PlanError(f"error {error:g} is outside [0, 1); it is how much of each delta's norm may be lost")
    if max_rank is not None and rank is not None:
        raise PlanError("max_rank limits what energy or error ask for; with rank there is nothing to limit")
    if dtype not in DTYPE_NAMES:
        raise PlanError(f"dtype {dtype!r}: expected one of {', '.join(DTYPE_NAMES)}")
    if out_kind not in KINDS:
        raise PlanError(f"cannot write adapters of kind {out_kind!r}; expected {' or '.join(KINDS)}")
    if server is not None and server not in SERVERS:
        raise PlanError(f"there are no rules for {server!r}; expected {' or '.join(SERVERS)}")
    _refuse_unknown("save", save or (), SAVES)
    _refuse_unknown("factors", factors, FACTORS)
    if joins and factors:
        raise PlanError("factors is for extracting from whole models; output: adapter joins its inputs' own factors")
    if server == "vllm":
        if factors:
            raise PlanError(f"few of vLLM's models take factors of {' and '.join(factors)}: leave factors out")
        if save:
            raise PlanError(
                f"vLLM refuses adapters that save modules whole ({', '.join(save)}): leave save out, or do not extract "
                "for vLLM"
            )
        most = VLLM_RANKS[-1]
        if max(rank or 0, max_rank or 0) > most:
            raise PlanError(f"vLLM takes ranks up to {most}, found {max(rank or 0, max_rank or 0)}")
        save, max_rank = (), max_rank or (None if rank else most)
    usual = SAVES if joins else SAVED  # of adapters that are joined, nothing is lost
    chosen = usual if save is None else tuple(word for word in SAVES if word in save)
    more = tuple(word for word in FACTORS if word in factors)
    return Terms(rank, energy, error, max_rank, DTYPE_NAMES[dtype], chosen, server, more, joins)


def _refuse_unknown(what: str, words: Collection[str], known: Sequence[str]) -> None:
    unknown = [word for word in words if word not in known]
    if unknown:
        near = get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PlanError(f"{what}: {', '.join(map(repr, unknown))}: expected some of {', '.join(known)}{hint}")


@dataclass(frozen=True)
class ExtractPlan:
    """An extraction, planned. Its checkpoints are open as long as the `with` statement of `open_plan` lasts.

    Attributes:
        terms: what is kept.
        base: the base's checkpoint.
        model: the model's.
        alignment: which tensors belong together.
        selection: what becomes of each of them.
        facts: of the class that loads the adapter.
        config: its config.
        threads: that will run.
        peak_memory: estimate in bytes.
        seconds: estimate, without reading.
        notes: notes and warnings for the user.
    """

    terms: Terms
    base: Checkpoint
    model: Checkpoint
    alignment: Alignment
    selection: Selection
    facts: Facts
    config: Mapping[str, Any]
    threads: int
    peak_memory: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def model_bytes(self) -> int:
        """Of the model's tensors, in the base's formats."""
        sizes = (info.count * DTYPES[tensor.dtype].itemsize for tensor in self.alignment.tensors
                 if (info := tensor.models[0]) is not None)  # fmt: skip
        return sum(sizes)

    @property
    def most_bytes(self) -> int:
        """Of the adapter, at most; with a budget that is not limited the ranks, and this, are only a bound."""
        size = DTYPES[self.terms.dtype].itemsize
        low = sum(
            len(one.matrices) * self.rank_of(one) * sum(one.shape) * size * (1 + len(one.heads))
            for one in self.selection.targets
        )
        return low + sum(_bytes_of(one.tensor.shape, one.tensor.dtype) for one in self.selection.saved)

    def rank_of(self, target: Target) -> int:
        """The largest rank that a module can get."""
        limits = (self.terms.rank, self.terms.max_rank, min(target.shape))
        return min(one for one in limits if one is not None)

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "base": self.base.ref,
            "model": self.model.ref,
            **self.terms.to_data(),
            "modules": [
                {"module": one.name, "tensors": [tensor.name for tensor in one.tensors], "shape": list(one.shape),
                 "matrices": len(one.matrices), "rank_at_most": self.rank_of(one)} for one in self.selection.targets
            ],
            "saved": [{"tensor": one.tensor.name, "kind": one.kind} for one in self.selection.saved],
            "left_out": [
                {"tensor": one.tensor.name, "kind": one.kind, "why": one.why} for one in self.selection.left_out
            ],
            "bytes_at_most": self.most_bytes,
            "model_bytes": self.model_bytes,
            "threads": self.threads,
            "peak_memory": self.peak_memory,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }  # fmt: skip


@contextmanager
def open_plan(
    base: str | Path, model: str | Path | Recipe, terms: Terms, *, vocab: str, threads: int | None, force: bool,
    search: tuple[Path, ...] = (), recipe: Recipe | None = None,
) -> Iterator[ExtractPlan]:  # fmt: skip
    """Open base and model (headers, and a sample of values) and plan; the files are closed on leaving.

    `recipe`: that of the model, where it is one.

    Raises:
        HomologyError: they do not correspond, or the base does not look like the model's (unless `force`).
        PlanError: there is nothing to extract.
    """
    if vocab not in ("strict", "base"):
        raise PlanError(
            f"vocab {vocab!r}: expected strict or base. An adapter adds to rows that the base has; a model with more "
            "rows must be kept whole"
        )
    with open_unrounded(base, model, search=search) as (origin, tuned):
        if adapters_in(origin):
            raise PlanError(
                f"{base} already has an adapter on it, and adapters cannot be stacked: name the checkpoint "
                "underneath, so that one adapter holds both"
            )
        if terms.in_cores and recipe is not None:
            _refuse_whole_models(recipe, origin, tuned)
        alignment, facts, config = _aligned(origin, tuned, vocab)
        selection = select(
            alignment, facts, config, save=terms.save, factors=terms.factors, for_vllm=terms.server == "vllm"
        )
        if not selection.targets:
            raise PlanError(
                f"{tuned.ref} has no matrices that an adapter could hold: none of its tensors is the weight of a layer"
            )
        floats = [tensor for tensor in alignment.tensors if tensor.base is not None and tensor.models[0] is not None]
        judged = judge(tuned.ref, origin.ref, sample_norms(floats, 0, lambda _: (0.0, 0.0)))
        if judged.stop and not force:
            raise HomologyError(f"{judged.stop}; use --force to continue anyway")
        notes = [*dict.fromkeys((*origin.notes, *tuned.notes)), *alignment.notes]
        notes += [judged.stop] if judged.stop else []
        notes += _notes(terms, selection, tuned)
        dense = [one for one in selection.targets if not _has_factors(one, approximate=terms.in_cores)]
        notes += _notes_on_factors(terms, selection, dense, recipe)
        allowed, peak, crowded = _threads_and_memory(terms, dense, threads_of(threads))
        notes += [crowded] if crowded else []
        yield ExtractPlan(
            terms, origin, tuned, alignment, selection, facts, config, allowed, peak, _seconds(terms, dense, allowed),
            tuple(notes),
        )  # fmt: skip


def _aligned(base: Checkpoint, model: Checkpoint, vocab: str) -> tuple[Alignment, Facts, Mapping[str, Any]]:
    """Which tensors correspond; a model's own heads are its own, and the adapter's class is that which has them."""
    alignment = align(base, (model,), vocab, heads="common")
    used = {info.name for tensor in alignment.tensors for info in tensor.models if info is not None}
    copies = alignment.copies[1] if len(alignment.copies) > 1 else {}
    facts = facts_of(model.config or base.config)
    own = [name for name in model.tensors if name not in used and name not in copies and facts.is_head(name)]
    if own:
        return align(base, (model,), vocab, heads=model), facts, model.config or base.config or {}
    return alignment, facts_of(base.config or model.config), base.config or model.config or {}


def _notes(terms: Terms, selection: Selection, model: Checkpoint) -> Iterator[str]:
    if packed_seed(model) is not None:
        yield f"{model.ref} is a pack: its delta is that of the model it unpacks to, which is sparse and rescaled"
    sides = [min(one.shape) for one in selection.targets]
    small = [side for side in sides if terms.rank is not None and side <= terms.rank]
    if small:
        yield (
            f"rank {terms.rank} is the full rank of {len(small)} of {len(sides)} modules: their deltas are kept whole "
            f"(rank {min(small)}{f' to {max(small)}' if max(small) > min(small) else ''})"
        )
    whole = sum(math.prod(one.shape) * len(one.matrices) for one in selection.targets)
    thin = sum(sum(one.shape) * min(terms.rank or 0, *one.shape) * len(one.matrices) for one in selection.targets)
    if thin > whole:
        yield f"factors of rank {terms.rank} are {thin / whole:.2g} times as large as the matrices: use a smaller rank"
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in selection.left_out:
        reasons.setdefault((one.kind, one.why), []).append(one.tensor.name)
    for (kind, why), names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"left out, {kind}: {names[0]}{more}: {why}"


def _refuse_whole_models(recipe: Recipe, base: Checkpoint, merged: Checkpoint) -> None:
    """With `output: adapter` all models are adapters."""
    owners = adapters_in(merged)
    whole = [entry.model for k, entry in enumerate(recipe.models) if k not in owners]
    if whole:
        raise PlanError(
            f"output: adapter joins adapters on {base.ref} by their factors, and {', '.join(whole)} "
            f"{'is not one' if len(whole) == 1 else 'are not'}. To extract an adapter from a merge of any models, "
            "remove output, and run `dare extract BASE RECIPE OUT --rank N`"
        )


def _has_factors(target: Target, *, approximate: bool) -> bool:
    """Whether a module's delta is known as a product, so that no full matrix is made."""
    return all(
        tensor.base is not None and tensor.models[0] is not None
        and is_thin(tensor.models[0], tensor.base, approximate=approximate)
        for tensor in target.tensors
    )  # fmt: skip


def _notes_on_factors(
    terms: Terms, selection: Selection, dense: Sequence[Target], recipe: Recipe | None
) -> Iterator[str]:
    """Of merged adapters: what is exact, and what takes full matrices.

    Raises:
        PlanError: everything is to be kept of a full matrix.
    """
    thin = len(selection.targets) - len(dense)
    if thin and recipe is not None:
        exact = not any(not _has_factors(one, approximate=False) for one in selection.targets if one not in dense)
        what = "their sum is exact" if exact else (
            "they are merged in core space: dropping, trimming and comparing act on small matrices that stand for "
            "the deltas"
        )  # fmt: skip
        yield f"{thin} modules are merged by their factors, without a full matrix: {what}"
    if not terms.in_cores or not dense:
        return
    named = f"{dense[0].name}{', ...' if dense[1:] else ''}: DoRA, or a method that takes whole models"
    told = f"{len(dense)} modules have no factors ({named})"
    if terms.rank is None and not terms.max_rank:
        raise PlanError(f"{told}, so their full rank would be kept: give a rank (rank: 16)")
    yield f"{told}: their full matrices are decomposed"


def _threads_and_memory(terms: Terms, dense: Sequence[Target], threads: int) -> tuple[int, int, str | None]:
    """Threads that memory allows, the peak in bytes, and what to say where it does not even allow one."""
    needs = sorted((factors.memory(one.shape, terms.rank) for one in dense), reverse=True)
    if not needs:  # thin factors alone
        return threads, INTERPRETER_BYTES + threads * THIN_BYTES, None
    threads = max(1, min(threads, len(needs)))
    free = free_host_memory()
    while threads > 1 and sum(needs[:threads]) > 0.8 * free:
        threads -= 1
    peak = INTERPRETER_BYTES + threads * BLAS_BYTES + sum(needs[:threads])
    crowded = None
    if needs[0] > free:
        way = "" if terms.rank is not None else "; a rank instead of a budget needs a fraction of that"
        crowded = f"the largest matrix takes {needs[0] / 1e9:.3g} GB, and {free / 1e9:.3g} GB of memory are free{way}"
    return threads, peak, crowded


def _seconds(terms: Terms, dense: Sequence[Target], threads: int) -> float:
    """A guess: products at the pace that a small one has on this machine now."""
    sample = np.ones((768, 768), np.float32)
    paces = []
    for _ in range(3):
        began = time.perf_counter()
        sample @ sample
        paces.append(2 * 768**3 / max(1e-9, time.perf_counter() - began))
    total = 0.0
    for one in dense:
        whole = terms.rank is None or factors.is_whole(one.shape, terms.rank)
        work = factors.svd_flops(one.shape) if whole else factors.flops(one.shape, terms.rank or 1)
        total += len(one.matrices) * work / (SVD_PACE if whole else RANGE_PACE)
    return total / max(paces) / threads


def _bytes_of(shape: tuple[int, ...], dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
