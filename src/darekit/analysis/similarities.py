# SPDX-License-Identifier: Apache-2.0
"""`dare similarity`: how far dropping turns hidden states, layer by layer (the paper's section 4.4 and Fig. 6)."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from darekit.errors import DataError, PlanError
from darekit.live.data import read_rows, tokenize
from darekit.live.models import LiveModel, build
from darekit.live.reading import refuse_unreadable
from darekit.live.states import States, hidden_states
from darekit.live.tasks import SEQ2SEQ
from darekit.methods import SPARSIFIERS
from darekit.planning import checks
from darekit.planning.opening import open_plan
from darekit.recipe import Recipe, single
from darekit.wording import brief
from darekit.wording.progress import Progress

METHODS = ("dare", "drop_only", "magnitude")

ROWS, MAX_LENGTH, BATCH_SIZE = 64, 128, 8


@dataclass(frozen=True)
class Curve:
    """One sparsifier at one drop rate.

    Attributes:
        method: the sparsifier.
        drop_rate: fraction dropped.
        seeds: of the masks.
        cosine: of each layer, the mean over tokens and seeds.
        deviation: of each layer, the standard deviation of the seeds' means; 0 for one seed.
    """

    method: str
    drop_rate: float
    seeds: tuple[int, ...]
    cosine: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.method}, p = {self.drop_rate:g}"


@dataclass(frozen=True)
class Similarity:
    """What was compared, and a curve for each sparsifier and drop rate.

    Attributes:
        base: as written.
        model: as written.
        data: as written.
        rows: of the data that were read.
        tokens: in those rows.
        layers: embeddings, 1, 2, ...
        curves: one for each sparsifier and drop rate.
    """

    base: str
    model: str
    data: str
    rows: int
    tokens: int
    layers: tuple[str, ...]
    curves: tuple[Curve, ...]

    def __repr__(self) -> str:
        shown = ", ".join(f"{curve.title}: {curve.cosine[-1]:.3f}" for curve in self.curves)
        return brief(self, f"{self.model} on {self.base}, {self.tokens} tokens; cosine of the last layer: {shown}")

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def similarity(
    base: str | Path,
    model: str | Path,
    *,
    data: str | Path,
    drop_rate: float | Sequence[float],
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0,),
    keep_dense: Sequence[str] = (),
    limit: int | None = ROWS,
    batch_size: int = BATCH_SIZE,
    max_length: int = MAX_LENGTH,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Similarity:
    """Cosine between the hidden states of a fine-tuned model and of its sparsified versions, for each layer.

    One model is built; its weights are replaced. The original's states are kept in a temporary file: layers x tokens x
    width x 4 bytes.

    Args:
        base: the checkpoint that `model` was fine-tuned from.
        model: the fine-tuned model.
        data: rows as for `dare eval`: a file of JSON lines or a dataset's name.
        drop_rate: one or several.
        methods: sparsifiers.
        seeds: effective seeds of the masks; those of sparsifiers that draw nothing count once.
        keep_dense: groups or glob patterns of tensors that are not dropped.
        limit: rows of the data; None: all.
        batch_size: examples that run at once.
        max_length: tokens of one example.
        device: cpu, cuda or mps; the fastest available if not given.
        dtype: number format to compute in; float32 on a CPU if not given.
        progress: called with (examples done, examples in all) over all models.
        say: receives notes and warnings.

    Returns:
        A curve of cosines over the layers for each sparsifier and drop rate.

    Raises:
        DarekitError: see `darekit.errors`.

    Examples:
        >>> found = dk.similarity(
        ...     "base", "math", data="sums.jsonl", drop_rate=0.9, methods=["dare", "magnitude"], device="cpu"
        ... )
        >>> found.layers
        ('embeddings', '1', '2')
        >>> for curve in found.curves:
        ...     print(curve.title, [round(cosine, 2) for cosine in curve.cosine])
        dare, p = 0.9 [0.99, 0.98, 0.98]
        magnitude, p = 0.9 [1.0, 1.0, 1.0]
    """
    rates = [drop_rate] if isinstance(drop_rate, int | float) else list(drop_rate)
    runs = _runs(str(base), str(model), methods, rates, list(dict.fromkeys(seeds)), keep_dense)
    rows = read_rows(data, limit=limit)
    original = single.drop_recipe(str(base), str(model), drop_rate=0.0)
    with open_plan(original) as plan:
        live = build(plan, device=device, dtype=dtype)
    if live.task == SEQ2SEQ:
        raise DataError(f"{live.kind}: hidden states are compared for decoders or encoders, not for both together")
    refuse_unreadable(live, rows)
    if live.tokenizer is None:
        raise DataError(f"{model} has no tokenizer, so it cannot read {data}")
    tokens = tokenize(live.tokenizer, rows, max_length=min(max_length, live.max_length))
    total, said, means = len(tokens) * (len(runs) + 1), set[str](), []
    with tempfile.TemporaryFile(prefix="darekit-") as spool:

        def states(done: int) -> Iterator[States]:
            tell = None if progress is None else lambda now, _: progress(done * len(tokens) + now, total)
            yield from hidden_states(live, tokens, batch_size=batch_size, progress=tell)

        def tell_once(line: str) -> None:
            if say and line not in said:
                say(line)
            said.add(line)

        for batch in states(0):
            np.save(spool, batch, allow_pickle=False)
        for done, (_, _, recipe) in enumerate(runs, 1):
            _put(live, recipe, tell_once)
            means.append(_cosines(spool, states(done)))
    layers = ("embeddings", *(str(i) for i in range(1, len(means[0]))))
    count = sum(len(row.ids) for row in tokens)
    return Similarity(str(base), str(model), str(data), len(tokens), count, layers, _curves(runs, means))


Run = tuple[tuple[str, float], int, Recipe]


def _runs(
    base: str, model: str, methods: Sequence[str], rates: Sequence[float], seeds: Sequence[int], dense: Sequence[str]
) -> list[Run]:
    """((method, drop rate), seed, recipe) of everything to run."""
    runs: list[Run] = []
    for method in methods:
        if method not in SPARSIFIERS:
            near = difflib.get_close_matches(method, SPARSIFIERS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PlanError(f"{method!r} is not a sparsifier{hint} There are {', '.join(SPARSIFIERS)}")
        for rate in rates:
            drawn = SPARSIFIERS[method].random and 0 < rate < 1
            for seed in seeds if drawn else seeds[:1]:
                own = seed if SPARSIFIERS[method].random else None
                recipe = single.drop_recipe(base, model, drop_rate=rate, method=method, seed=own, keep_dense=dense)
                runs.append(((method, rate), seed, recipe))
    if not runs:
        raise PlanError("nothing to compare: give at least one drop rate, one method and one seed")
    return runs


def _put(live: LiveModel, recipe: Recipe, say: Callable[[str], None]) -> None:
    with open_plan(recipe) as plan:
        # Too much may be dropped here: that is what is looked at.
        checks.check(plan, force=True, say=say)
        live.put(plan)


def _cosines(spool: IO[bytes], batches: Iterator[States]) -> np.ndarray:
    """The original's states on disk, a version's batches -> (layers + 1,) float64, mean cosine over tokens."""
    spool.seek(0)
    total, count = np.zeros(0), 0
    for batch in batches:
        before = np.load(spool, allow_pickle=False)
        total = total + cosine(before, batch).sum(1) if count else cosine(before, batch).sum(1)
        count += batch.shape[1]
    return total / count


def cosine(one: States, other: States) -> np.ndarray:
    """(..., width), (..., width) -> (...,) float64: the cosine; of two zero vectors 1, of one of them 0.

    >>> cosine(np.float32([[1, 0], [0, 0], [0, 0]]), np.float32([[2, 2], [0, 0], [1, 0]])).round(4).tolist()
    [0.7071, 1.0, 0.0]
    """
    x, y = one.astype(np.float64), other.astype(np.float64)
    dot = np.einsum("...i,...i", x, y)
    sizes = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    both = ~x.any(-1) & ~y.any(-1)
    found: np.ndarray = np.where(both, 1.0, np.clip(dot / np.where(sizes > 0, sizes, 1.0), -1.0, 1.0))
    return found


def _curves(runs: Sequence[Run], means: Sequence[np.ndarray]) -> tuple[Curve, ...]:
    groups: dict[tuple[str, float], list[tuple[int, np.ndarray]]] = {}
    for (key, seed, _), mean in zip(runs, means, strict=True):
        groups.setdefault(key, []).append((seed, mean))
    curves = []
    for (method, rate), found in groups.items():
        stacked = np.stack([mean for _, mean in found])
        deviation = stacked.std(0, ddof=1) if len(found) > 1 else np.zeros(stacked.shape[1])
        seeds = tuple(seed for seed, _ in found)
        curves.append(Curve(method, rate, seeds, tuple(stacked.mean(0).tolist()), tuple(deviation.tolist())))
    return tuple(curves)
