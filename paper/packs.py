# SPDX-License-Identifier: Apache-2.0
"""Ability against size: packs, and four other ways to store a fine-tuned model, on the family of `dare demo`.

    python paper/packs.py FOLDER_OF_THE_FAMILY [--write]

Every way stores every delta of the family (three abilities, three training seeds) whole: embeddings and norms too.
Sizes are those of what is stored, in bits per parameter, without the header of a file: in a model this small it would
be all one sees. What is not written by darekit is counted at its best: positions of magnitude pruning at the entropy
bound, which no index reaches, and scales as in a pack. `--write` draws docs/images/packs-quality.png and puts the table
into docs/packs.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import darekit as dk
from darekit.demo.tasks import FINE_TUNED, held_out_words, instruct
from darekit.evaluation.judges import judge_of
from darekit.live.models import LiveModel, open_live
from darekit.planning import open_plan
from darekit.plots import style
from darekit.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- quality:begin -->", "<!-- quality:end -->"
WORDS, LENGTH = 200, 5
RATES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
BITS = (16, 4, 2, 1)
RANKS = (1, 2, 4, 8, 16, 32)
GROUP = 64
Tensors = dict[str, torch.Tensor]


class Way:
    """One way to store a delta. `store`: base and model, a folder for scratch -> the restored model, and bits."""

    def __init__(self, line: str, setting: str, store: Callable[[Path, Path, Path], tuple[Path, float]]) -> None:
        self.line, self.setting, self.store = line, setting, store


def ways() -> Iterator[Way]:
    """All ways, in the order of the table."""
    for bits in BITS:
        for rate in RATES:
            yield Way(f"pack, {bits} bit", f"p = {rate:g}", packed(drop_rate=rate, bits=bits, seed=1))
    for bits in (8, 4, 2):
        yield Way("nothing dropped", f"{bits} bit", packed(drop_rate=0.0, dense_bits=bits))
    yield Way("1 bit dense (BitDelta)", "a scale for 65,536", packed(drop_rate=0.0, dense_bits=1, group=65536))
    yield Way("1 bit dense (BitDelta)", "a scale for 64", packed(drop_rate=0.0, dense_bits=1))
    yield Way("lossless", "", packed(lossless=True))
    for bits in (16, 4):
        for rate in RATES:
            yield Way(f"magnitude and positions, {bits} bit", f"p = {rate:g}", by_magnitude(rate, bits))
    for rank in RANKS:
        yield Way("truncated SVD", f"rank {rank}", by_rank(rank))


def packed(**options: Any) -> Callable[[Path, Path, Path], tuple[Path, float]]:
    """A pack, with these options of `dk.pack`."""

    def store(base: Path, model: Path, folder: Path) -> tuple[Path, float]:
        out = folder / "m.pack.safetensors"
        dk.pack(base, model, out, force=True, overwrite=True, **options)
        with safe_open(out, "pt") as file:
            stored = [file.get_slice(name) for name in file.keys() if not name.startswith("file:")]  # noqa: SIM118
            size = sum(math.prod(part.get_shape()) * WIDTHS[part.get_dtype()] for part in stored)
        return out, 8 * size

    return store


WIDTHS = {"BF16": 2, "U8": 1, "I8": 1, "U16": 2, "U32": 4, "F32": 4, "F16": 2}


def by_magnitude(rate: float, bits: int) -> Callable[[Path, Path, Path], tuple[Path, float]]:
    """The largest deltas of each tensor, as they are; their positions cost the entropy of a mask with so many ones."""

    def store(base: Path, model: Path, folder: Path) -> tuple[Path, float]:
        out = folder / "dropped"
        dk.drop(base, model, out, drop_rate=rate, method="magnitude", rescale="none", force=True, overwrite=True)
        kept = entropy = 0.0
        for tensor in weights(base).values():
            n = tensor.numel()
            k = n - int(rate * n)
            kept += k
            entropy += sum(-c * math.log2(c / n) for c in (k, n - k) if c)
        if bits == 16:
            return out, 16 * kept + entropy
        # Quantised where they stand: zeros stay zeros, and a scale is shared by no more values than it is counted for.
        pack = folder / "dropped.pack.safetensors"
        dk.pack(base, out, pack, drop_rate=0.0, dense_bits=bits, force=True, overwrite=True)
        return pack, kept * (bits + 16 / GROUP) + entropy

    return store


def by_rank(rank: int) -> Callable[[Path, Path, Path], tuple[Path, float]]:
    """Each matrix of the delta as the product of two of `rank` columns, BF16; vectors as they are."""

    def store(base: Path, model: Path, folder: Path) -> tuple[Path, float]:
        before, after = weights(base), weights(model)
        size, found = 0.0, {}
        for name, origin in before.items():
            delta = after[name].float() - origin.float()
            if delta.ndim == 2 and rank * sum(delta.shape) < delta.numel():
                u, s, v = torch.linalg.svd(delta, full_matrices=False)
                left, right = ((u * s.sqrt())[:, :rank].bfloat16(), (s.sqrt()[:, None] * v)[:rank].bfloat16())
                delta = left.float() @ right.float()
                size += 16 * rank * sum(delta.shape)
            else:
                size += 16 * delta.numel()
            found[name] = (origin.float() + delta).to(origin.dtype)
        out = folder / "svd"
        out.mkdir(exist_ok=True)
        save_file(found, out / "model.safetensors", {"format": "pt"})
        return out, size

    return store


def weights(directory: Path) -> Tensors:
    """All tensors of a checkpoint."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def put(live: LiveModel, base: Path, model: Path) -> None:
    """A restored model, or a pack, onto the weights of a model that runs."""
    recipe = {"base_model": str(base), "models": [{"model": str(model)}], "merge_method": "task_arithmetic"}
    with open_plan(read_recipe(recipe)) as plan:
        live.put(plan)


def measure(family: Path) -> list[dict[str, Any]]:
    """Line, setting, bits per parameter and every model's exact match in percent, of each way."""
    base = family / "base"
    seeds = [family, *sorted(family.glob("seed-*"))]
    parameters = sum(tensor.numel() for tensor in weights(base).values())
    results = []
    with tempfile.TemporaryDirectory() as scratch, open_live(base, device="cpu") as live:
        folder = Path(scratch)
        judges = {}
        for ability in FINE_TUNED:
            rows = [instruct(ability, word) for word in held_out_words(count=WORDS, length=LENGTH)]
            path = folder / f"{ability}.jsonl"
            path.write_text("".join(json.dumps({"prompt": r.prompt, "completion": r.answer}) + "\n" for r in rows))
            judges[ability] = judge_of({"data": str(path)})

        def score(model: Path, ability: str) -> float:
            put(live, base, model)
            return 100 * judges[ability](live)["exact_match"].value

        whole = [score(seed / ability, ability) for seed in seeds for ability in FINE_TUNED]
        results.append({"line": "fine-tuned", "setting": "", "bits": 16.0, "scores": whole})
        for way in ways():
            scores, bits = [], 0.0
            for seed in seeds:
                for ability in FINE_TUNED:
                    restored, size = way.store(base, seed / ability, folder)
                    scores.append(score(restored, ability))
                    bits += size / parameters / len(seeds) / len(FINE_TUNED)
            results.append({"line": way.line, "setting": way.setting, "bits": bits, "scores": scores})
            print(f"{way.line}, {way.setting}: {bits:.4g} bits, {mean(scores):.1f} %", file=sys.stderr, flush=True)
    return results


def mean(scores: list[float]) -> float:
    """The mean."""
    return sum(scores) / len(scores)


def draw(results: list[dict[str, Any]], stem: Path) -> None:
    """Accuracy over log size, one line for each way."""
    lines = list(dict.fromkeys(entry["line"] for entry in results if entry["line"] != "fine-tuned"))
    with style.settings():
        figure, axes = style.new_figure(width=9.0, height=5.4)
        plot = axes[0][0]
        top = next(entry for entry in results if entry["line"] == "fine-tuned")
        plot.axhline(mean(top["scores"]), color=style.GREY, linewidth=1, linestyle=":")
        plot.annotate("fine-tuned, 16 bits", (16, mean(top["scores"])), ha="right", va="bottom", color=style.GREY,
                      xytext=(0, 2), textcoords="offset points")  # fmt: skip
        for number, line in enumerate(lines):
            points = sorted((e["bits"], mean(e["scores"])) for e in results if e["line"] == line)
            # Beyond the seven colours: greys, with markers and dashes of their own.
            grey = {"color": style.GREY, "marker": "*<>"[number % 3], "linestyle": ("-", "--", ":")[number % 3]}
            look = style.line_style(number) if number < len(style.COLOURS) else grey
            if not line.startswith(("pack", "magnitude", "truncated")):
                look["linestyle"] = "none"
            plot.plot(*zip(*points, strict=True), label=line, **look)
        plot.set_xscale("log", base=2)
        plot.set_xticks([2.0**k for k in range(-6, 5)], [f"1/{2**-k}" if k < 0 else str(2**k) for k in range(-6, 5)])
        plot.set_xlabel("stored bits per parameter (log scale)")
        plot.set_ylabel("exact match, %")
        plot.set_ylim(-3, 104)
        plot.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        style.save(figure, stem)


def table(results: list[dict[str, Any]]) -> str:
    """All numbers, in Markdown."""
    rows = ["| stored as | setting | bits per parameter | exact match, % | worst of 9 |", "|---|---|--:|--:|--:|"]
    for entry in results:
        cells = [entry["line"], entry["setting"], f"{entry['bits']:.3g}", f"{mean(entry['scores']):.1f}",
                 f"{min(entry['scores']):.1f}"]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path, help="a folder that `dare demo` made")
    parser.add_argument("--write", action="store_true", help="the figure and the table into docs/")
    parser.add_argument("--results", type=Path, help="keep the numbers here, and use them where they are")
    arguments = parser.parse_args()
    kept = arguments.results
    results = json.loads(kept.read_text()) if kept and kept.exists() else measure(arguments.family)
    if kept:
        kept.write_text(json.dumps(results))
    print(table(results))
    if arguments.write:
        draw(results, ROOT / "docs" / "images" / "packs-quality")
        page = ROOT / "docs" / "packs.md"
        old = page.read_text()
        before, after = old.index(BEGIN) + len(BEGIN), old.index(END)
        page.write_text(f"{old[:before]}\n{table(results)}\n{old[after:]}")


if __name__ == "__main__":
    main()
