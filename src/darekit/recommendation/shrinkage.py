# SPDX-License-Identifier: Apache-2.0
"""DAREx's q, found by how much the outputs change on text without labels (arXiv 2410.09344, DAREx-q, global).

Dividing survivors by q = k (1-p) instead of 1-p leaves 1/k of the delta and 1/k of the noise. One k for the whole
model is searched: where noise dominates, some k > 1 brings the outputs nearer to those of the fine-tuned model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darekit.errors import DataError
from darekit.live.batches import padding_known
from darekit.live.models import LiveModel, build, memory_told, one_thread
from darekit.live.tasks import CAUSAL, MASKED, REGRESSOR, SEQ2SEQ
from darekit.planning.plan import Plan
from darekit.recommendation.inputs import Feed, batched
from darekit.wording.progress import Progress

FACTORS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
LIKELIEST = 256  # outputs of each position that are compared one by one; the others' probability as one


@dataclass(frozen=True)
class Search:
    """What was tried for DAREx's q = k (1 - p).

    Attributes:
        changes: k -> mean change of the outputs.
        best: the k of the least change.
        measure: how outputs were compared.
    """

    changes: Mapping[float, float]
    best: float
    measure: str

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "factor": self.best,
            "measure": self.measure,
            "tried": [{"factor": k, "change": change} for k, change in sorted(self.changes.items())],
        }


def search_factor(
    tuned: Plan,
    dropped: Callable[[float], Any],
    feed: Feed,
    *,
    factors: Sequence[float] = FACTORS,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Search:
    """Try factors k on one mask: a coarse row of them, then two around the best.

    Args:
        tuned: the plan of the fine-tuned model itself; its checkpoints are open.
        dropped: k -> a context that yields the open plan of the dropped model whose survivors are divided by k (1-p).
        feed: the text.
        factors: the coarse row.
        device: where to compute.
        dtype: what to compute in.
        progress: called with (runs done, runs in all).

    Raises:
        DataError: an output is NaN or Inf; out of memory.
    """
    live = build(tuned, device=device, dtype=dtype)
    tokens = feed.tokens(live)
    if live.task in (CAUSAL, SEQ2SEQ, MASKED) and not any(one.targets for one in tokens):
        raise DataError("no row has two tokens, so there is no next token to predict; use longer texts")
    runs = len(factors) + 3
    changes: dict[float, float] = {}

    def told() -> None:
        if progress:
            progress(len(changes) + 1, runs)

    with one_thread(live.device), memory_told("searching q"), padding_known(live):
        reference = [_summary(live, out) for out in _outputs(live, tokens, feed)]
        told()

        def try_one(k: float) -> None:
            with dropped(k) as plan:
                live.put(plan)
            pairs = zip(reference, _outputs(live, tokens, feed), strict=True)
            total = sum(_change(live, before, after) for before, after in pairs)
            changes[k] = total / max(1, sum(one["count"] for one in reference))
            told()

        for k in factors:
            try_one(k)
        ordered = sorted(changes)
        at = ordered.index(min(changes, key=lambda k: changes[k]))
        for other in (at - 1, at + 1):
            if 0 <= other < len(ordered):
                try_one((ordered[at] + ordered[other]) / 2)
    best = min(sorted(changes), key=lambda k: changes[k])
    measure = "mean squared difference" if live.task == REGRESSOR else "mean Kullback-Leibler divergence in nats"
    return Search(changes, best, measure)


def _outputs(live: LiveModel, tokens: Sequence[Any], feed: Feed) -> Iterator[Any]:
    """(n, outputs) float32 of each batch: one row per token that a causal model is asked for, per example of others."""
    import torch

    for inputs, asking in batched(live, tokens, feed.batch_size):
        with torch.inference_mode():
            more = {"use_cache": False} if live.task in (CAUSAL, SEQ2SEQ) else {}
            logits = getattr(live.run(inputs, **more), "logits", None)
        if logits is None or logits.dim() not in (2, 3):
            raise DataError(f"{live.kind}, and gives no logits by which q could be searched: choose another rescale")
        logits = logits.float()
        rows = logits[asking] if logits.dim() == 3 else logits
        if not bool(torch.isfinite(rows).all()):
            raise DataError(f"the model's output has NaN or Inf: {live.suspects}")
        yield rows


def _summary(live: LiveModel, rows: Any) -> dict[str, Any]:
    """What is kept of the fine-tuned model's outputs: the likeliest ones, and what the rest add up to."""
    if live.task == REGRESSOR:
        return {"values": rows, "count": len(rows)}
    scores = rows.log_softmax(-1)
    values, places = scores.topk(min(LIKELIEST, scores.shape[-1]))
    return {"values": values, "places": places, "count": len(rows)}


def _change(live: LiveModel, before: Mapping[str, Any], rows: Any) -> float:
    """Summed over rows: KL(fine-tuned || dropped) over the likeliest outputs and one bucket for all others (a lower
    bound of the whole divergence, and equal to it up to 256 outputs), or the squared difference of a regressor."""
    if live.task == REGRESSOR:
        return float((rows - before["values"]).square().mean(-1).double().sum())
    scores = rows.log_softmax(-1).gather(-1, before["places"]).double()
    known = before["values"].double()
    total = (known.exp() * (known - scores)).sum(-1)
    rest, other = (1 - known.exp().sum(-1)).clamp(min=0), (1 - scores.exp().sum(-1)).clamp(min=1e-12)
    if known.shape[-1] < rows.shape[-1]:
        total = total + rest * (rest.clamp(min=1e-12).log() - other.log())
    return float(total.sum())
