# SPDX-License-Identifier: Apache-2.0
"""How fast `dare eval` and `dare sweep` judge, against a plain loop of transformers in batches on the same threads; and
how long it takes to replace a model's weights between two cells. Prints JSON.

    python -m real.speed BASE MODEL DATA [--batch-size N] [--device D] [--dtype D]

The plain loop is what one writes by hand: rows sorted by length, padded on the right, one forward pass, argmax against
the completion. Both read the same rows, in turn, three times; the best of each counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from darekit.evaluation.judges import judge_of
from darekit.live.data import read_rows, tokenize
from darekit.live.models import build, one_thread, recipe_of
from darekit.planning.opening import open_plan

TURNS, LIMIT = 3, 128


def measure(base: str, model: str, data: str, *, batch: int, device: str | None, dtype: str | None) -> dict[str, Any]:
    """Rows a second of both, what they found, and seconds to replace the weights by a dropped model's."""
    import torch

    judge = judge_of({"data": data, "batch_size": batch, "limit": LIMIT})
    rows = read_rows(Path(data), limit=LIMIT)
    recipe, search = recipe_of(model)
    ours, plain, hits = [], [], 0
    with open_plan(recipe, search=search) as plan:
        live = build(plan, device=device, dtype=dtype)
    for _ in range(TURNS):
        began = time.perf_counter()
        scores = judge(live)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        with one_thread(live.device):
            hits = _plain(live.model, live.tokenizer, rows, batch)
        plain.append(time.perf_counter() - began)
    dropped = {
        "base_model": base,
        "models": [model],
        "sparsify": {"method": "dare", "drop_rate": 0.9, "keep_dense": ["embeddings", "norms"]},
        "merge_method": "task_arithmetic",
    }
    replaced = []
    for seed in range(TURNS):
        sparsify = {**dropped["sparsify"], "seed": seed}  # type: ignore[dict-item]
        recipe, search = recipe_of(dropped | {"sparsify": sparsify})
        began = time.perf_counter()
        with open_plan(recipe, search=search) as plan:
            live.put(plan)
        replaced.append(time.perf_counter() - began)
    return {
        "rows": len(rows), "dare": len(rows) / min(ours), "plain": len(rows) / min(plain),
        "ratio": min(plain) / min(ours), "exact_match": scores["exact_match"].value, "plain_match": hits / len(rows),
        "replace_seconds": min(replaced), "threads": torch.get_num_threads(),
    }  # fmt: skip


def _plain(model: Any, tokenizer: Any, rows: Sequence[Any], batch: int) -> int:
    import torch

    tokens = sorted(tokenize(tokenizer, rows, max_length=512), key=lambda row: -len(row.ids))
    hits = 0
    with torch.inference_mode():
        for start in range(0, len(tokens), batch):
            part = tokens[start : start + batch]
            width = len(part[0].ids)
            ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in part], device=model.device)
            mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in part]).to(model.device)
            found = model(input_ids=ids, attention_mask=mask).logits.argmax(-1).cpu()
            for at, row in enumerate(part):
                hits += all(
                    found[at, i - 1] == token
                    for i, (token, asked) in enumerate(zip(row.ids, row.asked, strict=True))
                    if asked
                )
    return hits


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description="Judging against a plain loop.")
    parser.add_argument("base")
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    given = parser.parse_args(arguments)
    found = measure(given.base, given.model, given.data, batch=given.batch_size, device=given.device, dtype=given.dtype)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
