# SPDX-License-Identifier: Apache-2.0
"""RegMean: a merge that knows what the inputs of each layer look like, from some rows of training for each model."""

from __future__ import annotations

from collections.abc import Iterator

from real.lessons import PROSE, TRAINING
from real.merging import merged
from real.sizes import DROP_RATE, Document, Results, Size, Step, sweep

ROWS = 160  # of each model's own training data
RATES = (0, 0.5, 0.9, 0.99, 0.999)


def gram_path(model: str) -> str:
    """Where a model's statistics are written.

    >>> gram_path("json")
    'stats/json.gram.safetensors'
    """
    return f"stats/{model}.gram.safetensors"


def informed_steps(size: Size) -> Iterator[Step]:
    """Statistics of each model, and RegMean of all, with its default settings: nothing is chosen."""
    three = size.abilities
    for one in three:
        words = (
            "stats", "gram", one, "--data", f"data/{TRAINING}/{one}.jsonl", "--out", gram_path(one), "--batch-size",
            f"{size.batch}", "--overwrite", "--json",
        )  # fmt: skip
        yield Step(
            f"gram-{one}", f"inputs of the layers of {one}", words, seconds=40, makes=gram_path(one), device=True,
            needs=(one,),
        )  # fmt: skip

    def file(_: Results) -> Document:
        document = merged(size, three, {DROP_RATE: [*RATES]}, "test")
        models = [{"model": one, "stats": gram_path(one)} for one in three]
        return document | {"recipe": document["recipe"] | {"models": models, "merge_method": "regmean"}}

    cells = [(1 + (len(RATES) - 1) * len(size.other_seeds), (*three, PROSE))]
    yield sweep("regmean", f"RegMean of {', '.join(three)}, on test", file, cells, three, "three-test")
