# SPDX-License-Identifier: Apache-2.0
"""One merge of a base and three adapters, against the way that it is done without darekit: PEFT merges each adapter
into a copy of the base on the disk, and mergekit merges the copies. Prints a table; `--write` puts it into
docs/speed.md.

    python bench/adapters.py SCRATCH --mergekit PATH/bin/mergekit-yaml [--runs 3] [--write]

PEFT, torch and transformers are those of the environment that mergekit is in, and each merge is a process of its own,
as its users run it. Files are warm. Neither PEFT nor mergekit waits for the disk, and darekit is made not to (as in
`run.py`); it is also timed as it is. The least seconds of the runs are compared. The results are compared too: the same
merge, but for what rounding the copies to BF16 loses.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np

import family
import run as bench
from costs import Cost, cost_of, mergekit
from darekit.checkpoints import open_checkpoint

CASE = "lora_task_arithmetic"
SAMPLE = 1 << 20  # elements of each tensor that are compared

PEFT = """
import sys, torch, peft, transformers
torch.set_num_threads(int(sys.argv[4]))
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model = peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3])
"""


def warm(folder: Path) -> None:
    bench.warm([path for name in ("base", *family.ADAPTERS) for path in sorted((folder / name).glob("*.safetensors"))])


def by_copies(folder: Path, program: str, threads: int) -> tuple[Cost, Cost]:
    """PEFT three times, and mergekit on what it wrote -> the cost of each; the result stays in `by-mergekit`."""
    peft = Cost()
    python = str(Path(program).with_name("python"))
    for name in family.ADAPTERS:
        out = folder / f"{name}-merged"
        arguments = [str(folder / "base"), str(folder / name), str(out), str(threads)]
        peft.add(cost_of([python, "-c", PEFT, *arguments], out))
    text = bench.recipe(folder, CASE).read_text()
    for name in family.ADAPTERS:
        text = text.replace(f'{folder / name}"', f'{folder / name}-merged"')
    recipe = folder / "merged.yaml"
    recipe.write_text(text)
    return peft, mergekit(program, recipe, folder / "by-mergekit")


def by_darekit(folder: Path, threads: int, *, synced: bool) -> Cost:
    """One command; its result stays in `by-darekit`."""
    program = [str(bench.DARE)] if synced else [sys.executable, "-c", bench.UNSYNCED]
    out = folder / "by-darekit"
    arguments = ["merge", str(bench.recipe(folder, CASE)), str(out), "--seed", "42", "--threads", str(threads)]
    return cost_of([*program, *arguments], out)


def distance(folder: Path) -> float:
    """||darekit's result - mergekit's|| / ||darekit's - base||, over the head of each tensor."""
    checkpoints = [open_checkpoint(folder / name) for name in ("by-darekit", "by-mergekit", "base")]
    apart = moved = 0.0
    for name, info in checkpoints[0].tensors.items():
        found = []
        for checkpoint in checkpoints:
            raw = np.empty(min(SAMPLE, info.count), np.uint16)
            checkpoint.tensors[name].source.read_into(raw.view(np.uint8), 0)
            found.append((raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64))
        ours, theirs, base = found
        apart += float(np.square(ours - theirs).sum())
        moved += float(np.square(ours - base).sum())
    for checkpoint in checkpoints:
        checkpoint.close()
    return float(np.sqrt(apart / moved))


def row(title: str, cost: Cost) -> str:
    return f"| {title} | {cost.seconds:.2f} | {cost.written / 1e9:.2f} | {cost.memory / 1e6:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--mergekit", default=os.environ.get("MERGEKIT"), help="its mergekit-yaml; else $MERGEKIT")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--layers", type=int, default=family.LAYERS, help="fewer, to see whether all of it works")
    parser.add_argument("--write", action="store_true", help="put the table into docs/speed.md")
    given = parser.parse_args()
    if not given.mergekit:
        parser.error("--mergekit PATH/bin/mergekit-yaml is needed, in an environment that has peft too")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    own = given.layers == family.LAYERS
    family.LAYERS = given.layers
    whole = given.scratch.resolve() / ("family" if own else f"family-{given.layers}")
    folder = given.scratch.resolve() / ("adapters" if own else f"adapters-{given.layers}")
    family.build(whole)
    family.build_adapters(folder, whole)
    by_darekit(folder, given.threads, synced=False)  # compiles the kernels, if need be
    ours, synced, theirs = [], [], []
    for _ in range(given.runs):
        warm(folder)
        ours.append(by_darekit(folder, given.threads, synced=False))
        warm(folder)
        synced.append(by_darekit(folder, given.threads, synced=True))
        warm(folder)
        theirs.append(by_copies(folder, given.mergekit, given.threads))
    least = min(ours, key=lambda cost: cost.seconds)
    peft, kit = (min(costs, key=lambda cost: cost.seconds) for costs in zip(*theirs, strict=True))
    both = Cost()
    both.add(peft)
    both.add(kit)
    lines = [
        "| base + 3 adapters of rank 16, task arithmetic | seconds | GB written | peak RSS MB |",
        "|---|--:|--:|--:|",
        row("PEFT's `merge_and_unload()`, three times", peft),
        row("mergekit, on the three copies", kit),
        row("both", both),
        row("`dare merge`, one command", least),
        "",
        f"{both.seconds / least.seconds:.0f} times as long, and {(both.written - least.written) / 1e9:.1f} GB of "
        f"copies that nobody needs. Until its output is on the disk `dare merge` takes "
        f"{min(cost.seconds for cost in synced):.2f} s. The two results differ by {distance(folder):.3f} of what the "
        "merge changes: the copies are rounded to BF16, and mergekit calculates in it.",
    ]
    text = "\n".join(lines)
    print(text)
    for name in ("by-darekit", "by-mergekit", *(f"{one}-merged" for one in family.ADAPTERS)):
        shutil.rmtree(folder / name)
    if given.write:
        bench.put(text, bench.PAGE, "adapters")


if __name__ == "__main__":
    main()
