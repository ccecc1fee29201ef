# SPDX-License-Identifier: Apache-2.0
"""Merged adapters without a full matrix: the delta of each is a product of thin factors, and so is their sum.

A weighted sum is exact: factors behind each other, and then an exact decomposition through the small core between
their QRs. Every other method, and whatever drops or trims first, sees each delta in the basis that all of them share
(core space): U from the left singular vectors of all left factors, V from the right ones of all right factors, and
M_k = U^T B_k A_k V, which loses nothing of any delta. The engine then merges the M_k as it would merge tensors, and
U M V^T is the result. Elements of M_k are not elements of the delta: where a method looks at single elements (a drop,
a trim, signs), the result is another one than that of the same method on the full delta. What looks at inner products
alone has the same coefficients.

Sources: Core Space, arXiv 2509.17786; concatenation, PEFT's `add_weighted_adapter` with `cat`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from darekit.checkpoints import ArrayBytes, Checkpoint, Source, TensorInfo, traits_of
from darekit.dtypes import dtype_named
from darekit.engine.nested import Computed, Workshop
from darekit.engine.steps import TRIM, Input, Merge, StageSpec
from darekit.errors import DataError
from darekit.extraction.deltas import are_same
from darekit.extraction.factors import NOISE, Doubles, Factors, Matrix
from darekit.extraction.targets import Block, Target
from darekit.inputs.adapters.products import Pair
from darekit.inputs.adapters.sources import AdaptedSource
from darekit.methods import MERGE_METHODS, SPARSIFIERS
from darekit.methods.merging import total_weight


@dataclass(frozen=True)
class Thin:
    """A matrix as a product: `left` (out, q) @ `right` (q, in), float64; q may be 0."""

    left: Doubles
    right: Doubles

    @property
    def turned(self) -> Thin:
        """The transposed matrix."""
        return Thin(self.right.T, self.left.T)

    def decomposed(self) -> tuple[Factors, Doubles]:
        """Factors of its full rank, and its singular values, through the small core between two QRs.

        >>> thin = Thin(np.ones((3, 2)), np.ones((2, 4)))
        >>> found, values = thin.decomposed()
        >>> found.rank, values.round(3).tolist()
        (1, [6.928, 0.0])
        """
        if not self.left.shape[1]:
            empty = np.zeros((self.left.shape[0], 0), np.float32), np.zeros((0, self.right.shape[1]), np.float32)
            return Factors(*empty), np.zeros(0)
        q1, r1 = np.linalg.qr(self.left)
        q2, r2 = np.linalg.qr(self.right.T)
        u, values, vt = np.linalg.svd(r1 @ r2.T)
        count = int(np.count_nonzero(values > values[0] * NOISE)) if values[0] else 0
        roots = np.sqrt(values[:count])
        b, a = (q1 @ u[:, :count]) * roots, (vt[:count] @ q2.T) * roots[:, None]
        at = np.argmax(np.abs(b), axis=0)
        signs = np.where(b[at, np.arange(count)] < 0, -1.0, 1.0)
        return Factors((b * signs).astype(np.float32), (a * signs[:, None]).astype(np.float32)), values

    def of_rank(self, rank: int) -> Factors:
        """Its factors of a rank, or of its own where that is less."""
        return self.decomposed()[0].cut(rank)

    def square(self) -> float:
        """||left right||^2, from q x q matrices."""
        return float(np.sum((self.left.T @ self.left) * (self.right @ self.right.T)))

    def residual(self, factors: Factors) -> float:
        """||left right - b a||^2: that of one more product; to about 1e-16 of ||left right||^2."""
        left = np.concatenate([self.left, -factors.b.astype(np.float64)], axis=1)
        right = np.concatenate([self.right, factors.a.astype(np.float64)], axis=0)
        return max(0.0, Thin(left, right).square())


@dataclass(frozen=True)
class Stack:
    """All matrices of a stored tensor as products: left (E, R, q), right (E, q, C), float64."""

    left: Doubles
    right: Doubles

    def taken(self, block: Block) -> Thin:
        """The rows of one block."""
        rows = self.left.shape[1]
        matrix, row = divmod(block.begin // block.shape[1], rows)
        return Thin(self.left[matrix, row : row + block.shape[0]], self.right[matrix])


class Cores:
    """Finds the factors of merged tensors; threads may share it.

    Args:
        approximate: whether methods that are no sums are run in core space; else they have no factors here.
    """

    def __init__(self, *, approximate: bool) -> None:
        self._approximate = approximate
        self._known: dict[str, Stack | None] = {}
        self._lock = threading.Lock()

    def of(self, target: Target, matrix: int) -> Thin | None:
        """The delta of one of a module's matrices, (out, in); None: it has no factors."""
        found = []
        for block in target.matrices[matrix]:
            stack = self._stack(block)
            if stack is None:
                return None
            found.append(stack.taken(block))
        whole = found[0] if len(found) == 1 else _upon_each_other(found)
        return whole.turned if target.transposed else whole

    def _stack(self, block: Block) -> Stack | None:
        tensor = block.tensor
        base, model = tensor.base, tensor.models[0]
        if base is None or model is None or base.shape != model.shape:
            return None
        with self._lock:
            if tensor.name not in self._known:
                if len(self._known) > 8:  # experts of one tensor come one after another
                    self._known.clear()
                self._known[tensor.name] = stack_of(model, base, approximate=self._approximate)
            return self._known[tensor.name]


def is_thin(model: TensorInfo, base: TensorInfo, *, approximate: bool) -> bool:
    """Whether a tensor's delta has factors, from what is known without reading them."""
    found = _inputs_of(model, base)
    return found is not None and (found.step is None or _is_sum(found.step) or (approximate and _can_merge(found.step)))


def adapters_in(model: Checkpoint) -> set[int]:
    """Which models of a recipe, by number, have an adapter on some tensor; of a checkpoint that is no recipe's: 0."""
    found: set[int] = set()
    for info in model.tensors.values():
        if isinstance(info.source, AdaptedSource):
            found.add(0)
        elif isinstance(info.source, Computed):
            for step in info.source.workshop.planned(info.source.name):
                entries = zip(step.owners, step.models, strict=True)
                found |= {owner for owner, entry in entries if isinstance(entry.source, AdaptedSource)}
    return found


def stack_of(model: TensorInfo, base: TensorInfo, *, approximate: bool) -> Stack | None:
    """A tensor's delta from its base as products; None where it has none.

    Raises:
        DataError: a factor has NaN or Inf.
    """
    found = _inputs_of(model, base)
    if found is None:
        return None
    pairs = [None if source is None else source.pair() for source in found.sources]
    matrices = next((source.change.matrices for source in found.sources if source is not None), _matrices(base))
    if found.step is None:
        return _sum([1.0] * len(pairs), pairs, matrices)
    if _is_sum(found.step):
        return _sum(_coefficients(found.step), pairs, matrices)
    return _merged(found.step, pairs, matrices) if approximate and _can_merge(found.step) else None


@dataclass(frozen=True)
class _Inputs:
    """What a tensor is made of: each model's adapter, None where it leaves the base alone; `step`: how they are merged,
    None for one that is not merged."""

    sources: tuple[AdaptedSource | None, ...]
    step: Merge | None


def _inputs_of(model: TensorInfo, base: TensorInfo) -> _Inputs | None:
    source = model.source
    if are_same(source, base.source):
        return _Inputs((), None)
    if isinstance(source, AdaptedSource):
        return _Inputs((source,), None) if _adds_to(source, base.source) else None
    if not isinstance(source, Computed):
        return None
    steps = source.workshop.planned(source.name)
    step = steps[0]
    if len(steps) > 1 or not isinstance(step, Merge):
        return None
    if step.base is None or not are_same(step.base.source, base.source):
        return None
    found: list[AdaptedSource | None] = []
    for entry in step.models:
        if entry.count != step.count:
            return None
        if are_same(entry.source, base.source):
            found.append(None)
        elif isinstance(entry.source, AdaptedSource) and _adds_to(entry.source, base.source):
            found.append(entry.source)
        else:
            return None
    return _Inputs(tuple(found), step)


def _adds_to(source: AdaptedSource, base: Source) -> bool:
    """Whether a tensor is this very base plus one product."""
    delta = traits_of(source).delta
    return delta is not None and are_same(source.base.source, base)


def _is_sum(step: Merge) -> bool:
    """Whether the merged delta is a sum of deltas with coefficients that are known."""
    if step.verbatim:
        return True
    if MERGE_METHODS[step.method].kernel != "sum" or any(step.chains) or step.base_weight:
        return False
    return not step.on_weights or bool(step.parameters.get("normalize"))


def _coefficients(step: Merge) -> list[float]:
    if step.verbatim:
        return [1.0]
    divisor = total_weight(np.array(step.weights)) if step.parameters.get("normalize") else 1.0
    factor = 1.0 if step.on_weights else step.factor
    return [factor * weight / float(divisor) for weight in step.weights]


def _can_merge(step: Merge) -> bool:
    """Whether the engine can merge cores in place of the tensor."""
    method = MERGE_METHODS[step.method]
    specs = [spec for chain in step.chains for spec in chain]
    fits = all(
        spec.method == TRIM or (spec.method in SPARSIFIERS and SPARSIFIERS[spec.method].prepare is None)
        for spec in specs
    )
    return fits and not (step.on_weights or step.statistics or step.base_weight or method.products == "models")


def _sum(coefficients: Sequence[float], pairs: Sequence[Pair | None], matrices: tuple[int, int, int]) -> Stack:
    """Factors behind each other: exact."""
    many, rows, columns = matrices
    lefts, rights = [np.zeros((many, rows, 0))], [np.zeros((many, 0, columns))]
    for coefficient, pair in zip(coefficients, pairs, strict=True):
        if pair is not None and coefficient:
            lefts.append(coefficient * pair[0].astype(np.float64))
            rights.append(pair[1].astype(np.float64))
    return Stack(np.concatenate(lefts, axis=2), np.concatenate(rights, axis=1))


def _merged(step: Merge, pairs: Sequence[Pair | None], matrices: tuple[int, int, int]) -> Stack:
    """Core space: every delta in the basis that all share, merged there."""
    many, rows, columns = matrices
    found = [pair for pair in pairs if pair is not None]
    if not found:
        return Stack(np.zeros((many, rows, 0)), np.zeros((many, 0, columns)))
    lefts = [_basis(np.concatenate([pair[0][e] for pair in found], axis=1)) for e in range(many)]
    rights = [_basis(np.concatenate([pair[1][e] for pair in found], axis=0).T) for e in range(many)]
    high, wide = max(u.shape[1] for u in lefts), max(v.shape[1] for v in rights)
    u, v = np.zeros((many, rows, high)), np.zeros((many, columns, wide))
    for e in range(many):
        u[e, :, : lefts[e].shape[1]], v[e, :, : rights[e].shape[1]] = lefts[e], rights[e]
    cores = [
        np.zeros((many, high, wide)) if pair is None
        else (u.swapaxes(1, 2) @ pair[0].astype(np.float64)) @ (pair[1].astype(np.float64) @ v) for pair in pairs
    ]  # fmt: skip
    core = _run(step, [np.ascontiguousarray(one, np.float32) for one in cores])
    return Stack(u @ core.astype(np.float64), v.swapaxes(1, 2))


def _basis(columns: Matrix) -> Doubles:
    """(n, q) -> (n, <= q): the left singular vectors, the largest first, each with its largest element positive."""
    u, values, _ = np.linalg.svd(columns.astype(np.float64), full_matrices=False)
    u = u[:, : max(1, int(np.count_nonzero(values > values[0] * NOISE)))]
    at = np.argmax(np.abs(u), axis=0)
    return u * np.where(u[at, np.arange(u.shape[1])] < 0, -1.0, 1.0)


def _run(step: Merge, cores: Sequence[Matrix]) -> Matrix:
    """The step, on cores (E, q, q') in place of the tensors' deltas, by the engine itself."""
    dtype, shape, count = dtype_named("F32"), cores[0].shape, cores[0].size
    inputs = tuple(Input(ArrayBytes(one.reshape(-1).view(np.uint8)), dtype, count) for one in cores)
    zeros = Input(ArrayBytes(np.zeros(4 * count, np.uint8)), dtype, count)
    chains = tuple(tuple(_on_core(spec, step.count, count) for spec in chain) for chain in step.chains)
    small = replace(
        step, dtype=dtype, shape=(shape[0] * shape[1], shape[2]), begin=0, count=count, base=zeros, models=inputs,
        chains=chains, precise=False, transposed=False,
    )  # fmt: skip
    workshop = Workshop([small], [f"adapter {k + 1}" for k in range(1 + max(step.owners))], step.name)
    merged = np.empty(count, np.float32)
    Computed(workshop, step.name, b"").read_into(merged.view(np.uint8), 0)
    if not np.isfinite(merged).all():
        raise DataError(f"{step.name}: merging the adapters' cores gave NaN or Inf")
    return merged.reshape(shape)


def _on_core(spec: StageSpec, before: int, now: int) -> StageSpec:
    """A stage on the core: what counts elements keeps their share."""
    if spec.method == TRIM:
        kept = max(1, int(spec.parameters["keep_count"] * now / before))
        spec = replace(spec, parameters={**spec.parameters, "keep_count": kept})
    return replace(spec, places=None)


def _upon_each_other(parts: Sequence[Thin]) -> Thin:
    """Matrices of one width as one of all their rows."""
    ranks = [part.left.shape[1] for part in parts]
    left = np.zeros((sum(part.left.shape[0] for part in parts), sum(ranks)))
    row = column = 0
    for part, rank in zip(parts, ranks, strict=True):
        left[row : row + part.left.shape[0], column : column + rank] = part.left
        row, column = row + part.left.shape[0], column + rank
    return Thin(left, np.concatenate([part.right for part in parts], axis=0))


def _matrices(info: TensorInfo) -> tuple[int, int, int]:
    """A tensor that nobody changes, as matrices."""
    many, rows, columns = (1,) * (3 - len(info.shape[:3])) + info.shape[:3]
    return many, rows, columns
