# SPDX-License-Identifier: Apache-2.0
"""What is left of an ability in an adapter of some rank, and in a pack of the same size: the table of docs/serving.md.

    python bench/ranks.py DEMO        # a folder that `dare demo` left

Each number is the mean over the demo's three abilities and three training seeds: exact match of the fine-tuned model's
own ability. Adapters and packs become whole models on the base, and are measured as the demo measures its models.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from darekit import extract, merge, pack, unpack
from darekit.demo.evaluation import accuracy, examples_of
from darekit.demo.family import Family, calm, load_model, load_tokenizer
from darekit.demo.settings import Settings
from darekit.demo.tasks import FINE_TUNED

RANKS = (1, 2, 4, 8, 16, 32)
BITS = (16, 4)


def packed(base: Path, model: Path, scratch: Path, size: int, bits: int) -> tuple[Path, float]:
    """A pack of about `size` bytes, and the fraction that it keeps: its size grows with that almost as a line."""
    out = scratch / "p.safetensors"

    def of(keep: float) -> int:
        options = {"bits": bits, "keep_dense": ["norms"], "seed": 1, "overwrite": True, "force": True}
        return pack(base, model, out, drop_rate=1 - keep, **options).bytes

    low, high = of(0.01), of(0.5)
    keep = min(1.0, max(0.001, 0.01 + 0.49 * (size - low) / (high - low)))
    of(keep)
    return out, keep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    family = Family(given.demo, Settings())
    examples, tokenizer = examples_of(family), load_tokenizer(family.base)
    models = [(ability, family.model(ability, seed)) for ability in FINE_TUNED for seed in range(given.seeds)]
    whole = sum(path.stat().st_size for path in models[0][1].glob("*.safetensors"))
    print(f"| rank | size | error | adapter | {' | '.join(f'pack, {bits} bits' for bits in BITS)} |")
    print("|---:|---:|---:|---:|" + "---:|" * len(BITS))
    with calm(), tempfile.TemporaryDirectory() as name:
        scratch = Path(name)

        def measured(path: Path, ability: str) -> float:
            return accuracy(load_model(path), tokenizer, examples[ability])

        for rank in RANKS:
            rows = []
            for ability, model in models:
                report = extract(family.base, model, scratch / "lora", rank=rank, dtype="bfloat16", overwrite=True)
                data = {"merge_method": "linear", "models": [f"{family.base}+{scratch / 'lora'}"]}
                merge(data, scratch / "m", overwrite=True)
                row = [report.bytes, report.total_error, measured(scratch / "m", ability)]
                for bits in BITS:
                    path, keep = packed(family.base, model, scratch, report.bytes, bits)
                    unpack(family.base, path, scratch / "m", overwrite=True)
                    row += [measured(scratch / "m", ability), keep]
                rows.append(row)
                shutil.rmtree(scratch / "lora")
            size, error, low, *packs = (sum(column) / len(rows) for column in zip(*rows, strict=True))
            cells = [f"{packs[i]:.1f} (keeps {100 * packs[i + 1]:.0f} %)" for i in range(0, len(packs), 2)]
            share = f"{size / 1000:.0f} kB, {100 * size / whole:.0f} %"
            print(f"| {rank} | {share} | {error:.2f} | {low:.1f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
