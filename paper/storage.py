# SPDX-License-Identifier: Apache-2.0
"""Experiment (j), ability against size: packs, and four other ways to store what fine-tuning changed.

    python paper/storage.py BASE MODEL FOLDER

stores one model in every way, and prints what each takes; `rerun.py` calls it, has all of them judged by ``dare eval``,
and puts the table into docs/packs.md and the plot into docs/images.

Every way stores the whole delta: embeddings and norms too. Sizes are those of what is stored, in bits per parameter,
without the header of a file: in a model this small it would be all one sees. What is not written by darekit is counted
at its best: positions of magnitude pruning at the entropy bound, which no index reaches, and scales as in a pack.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

BEGIN, END = "<!-- quality:begin -->", "<!-- quality:end -->"
RATES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
SPREAD_FROM, SEEDS = 0.95, (1, 2, 3)  # from this drop rate on, scores depend on the mask
BITS = (16, 4, 2, 1)
RANKS = (1, 2, 4, 8, 16, 32)
GROUP = 64
WIDTHS = {"BF16": 2, "U8": 1, "I8": 1, "U16": 2, "U32": 4, "F32": 4, "F16": 2}
FINE_TUNED = "fine-tuned"

Store = Callable[[Path, Path, Path], float]  # base, model, what to write -> bits that it takes


@dataclass(frozen=True)
class Way:
    """One way to store a delta. `line`, `setting`: in table and plot; `name`: of the file or folder."""

    line: str
    setting: str
    name: str
    store: Store


def ways() -> Iterator[Way]:
    """All ways, in the order of the table; masks are ways of their own."""
    for bits in BITS:
        for rate in RATES:
            for seed in SEEDS if rate >= SPREAD_FROM else SEEDS[:1]:
                name = f"{bits}-bit-p{rate:g}-seed{seed}.pack.safetensors"
                yield Way(f"pack, {bits} bit", f"p = {rate:g}", name, packed(drop_rate=rate, bits=bits, seed=seed))
    for bits in (8, 4, 2):
        name = f"{bits}-bit-dense.pack.safetensors"
        yield Way("nothing dropped", f"{bits} bit", name, packed(drop_rate=0.0, dense_bits=bits))
    for group in (65536, GROUP):
        name = f"signs-of-{group}.pack.safetensors"
        yield Way(
            "1 bit dense (BitDelta)", f"a scale for {group:,}", name,
            packed(drop_rate=0.0, dense_bits=1, group=group),
        )  # fmt: skip
    yield Way("lossless", "", "lossless.pack.safetensors", packed(lossless=True))
    for bits in (16, 4):
        for rate in RATES:
            name = f"magnitude-{bits}-bit-p{rate:g}" + ("" if bits == 16 else ".pack.safetensors")
            yield Way(f"magnitude and positions, {bits} bit", f"p = {rate:g}", name, by_magnitude(rate, bits))
    for rank in RANKS:
        yield Way("truncated SVD", f"rank {rank}", f"rank-{rank}", by_rank(rank))


def names() -> tuple[str, ...]:
    """Of all that is stored of one model."""
    return tuple(way.name for way in ways())


# --- storing ---


def packed(**options: Any) -> Store:
    """A pack, with these options of `dk.pack`."""

    def store(base: Path, model: Path, out: Path) -> float:
        from safetensors import safe_open

        import darekit as dk

        dk.pack(base, model, out, force=True, overwrite=True, **options)
        with safe_open(out, "pt") as file:
            parts = [file.get_slice(name) for name in file.keys() if not name.startswith("file:")]  # noqa: SIM118
            return 8.0 * sum(math.prod(part.get_shape()) * WIDTHS[part.get_dtype()] for part in parts)

    return store


def by_magnitude(rate: float, bits: int) -> Store:
    """The largest deltas of each tensor, as they are; their positions cost the entropy of a mask with so many ones."""

    def store(base: Path, model: Path, out: Path) -> float:
        import darekit as dk

        dropped = out.with_name(f"magnitude-16-bit-p{rate:g}")
        if bits == 16:
            dk.drop(
                base, model, dropped, drop_rate=rate, method="magnitude", rescale="none", force=True, overwrite=True
            )
        else:
            # Quantised where they stand: zeros stay zeros; a scale is shared by no more values than it is counted for.
            dk.pack(base, dropped, out, drop_rate=0.0, dense_bits=bits, force=True, overwrite=True)
        kept = entropy = 0.0
        for tensor in weights(base).values():
            n = tensor.numel()
            k = n - int(rate * n)
            kept += k
            entropy += sum(-c * math.log2(c / n) for c in (k, n - k) if c)
        return kept * (16 if bits == 16 else bits + 16 / GROUP) + entropy

    return store


def by_rank(rank: int) -> Store:
    """Each matrix of the delta as the product of two of `rank` columns, BF16; vectors as they are."""

    def store(base: Path, model: Path, out: Path) -> float:
        import shutil

        import torch
        from safetensors.torch import save_file

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
        out.mkdir(exist_ok=True)
        for path in model.glob("*.json"):  # config and tokenizer: an ordinary checkpoint
            if path.name != "training.json":
                shutil.copyfile(path, out / path.name)
        save_file(found, out / "model.safetensors", {"format": "pt"})
        return size

    return store


@cache
def weights(directory: Path) -> Mapping[str, Any]:
    """All tensors of a checkpoint."""
    from safetensors.torch import load_file

    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


# --- table and plot ---


@dataclass(frozen=True)
class Entry:
    """A row of the table. `scores`: exact match in percent of every model and mask; `bits`: per parameter, the mean."""

    line: str
    setting: str
    bits: float
    scores: Sequence[float]


def entries_of(found: Mapping[str, Any], models: Sequence[str]) -> list[Entry]:
    """Results of (j) -> rows of the table, in order.

    Raises:
        KeyError: something was not stored, or not judged.
    """
    whole = [100 * found[f"evaluations/{model}"][model] for model in models]
    entries = [Entry(FINE_TUNED, "", 16.0, whole)]
    places: dict[tuple[str, str], list[str]] = {}
    for way in ways():
        places.setdefault((way.line, way.setting), []).append(way.name)
    for (line, setting), stored in places.items():
        every = [(model, name) for model in models for name in stored]
        bits = fmean(found[f"stored/{model}"][name] for model, name in every)
        entries.append(Entry(line, setting, bits, [100 * found[f"evaluations/{model}"][name] for model, name in every]))
    return entries


def draw(entries: Sequence[Entry], stem: Path) -> None:
    """Accuracy over log size, one line for each way."""
    from darekit import plotting

    lines = list(dict.fromkeys(entry.line for entry in entries if entry.line != FINE_TUNED))
    with plotting.settings():
        figure, axes = plotting.new_figure(width=9.0, height=5.4)
        plot = axes[0][0]
        top = fmean(entries[0].scores)
        plot.axhline(top, color=plotting.GREY, linewidth=1, linestyle=":")
        plot.annotate("fine-tuned, 16 bits", (16, top), ha="right", va="bottom", color=plotting.GREY, xytext=(0, 2),
                      textcoords="offset points")  # fmt: skip
        for number, line in enumerate(lines):
            points = sorted((entry.bits, fmean(entry.scores)) for entry in entries if entry.line == line)
            # Beyond the seven colours: greys, with markers and dashes of their own.
            grey = {"color": plotting.GREY, "marker": "*<>"[number % 3], "linestyle": ("-", "--", ":")[number % 3]}
            look = plotting.line_style(number) if number < len(plotting.COLOURS) else grey
            if not line.startswith(("pack", "magnitude", "truncated")):
                look["linestyle"] = "none"
            plot.plot(*zip(*points, strict=True), label=line, **look)
        plot.set_xscale("log", base=2)
        plot.set_xticks([2.0**k for k in range(-6, 5)], [f"1/{2**-k}" if k < 0 else str(2**k) for k in range(-6, 5)])
        plot.set_xlabel("stored bits per parameter (log scale)")
        plot.set_ylabel("exact match, %")
        plot.set_ylim(-3, 104)
        plot.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        plotting.save(figure, stem)


def table(entries: Sequence[Entry]) -> str:
    """All numbers, in Markdown."""
    rows = [
        "| stored as | setting | bits per parameter | exact match, % | lowest | of |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for entry in entries:
        cells = [entry.line, entry.setting, f"{entry.bits:.3g}", f"{fmean(entry.scores):.1f}",
                 f"{min(entry.scores):.1f}", str(len(entry.scores))]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def with_table(page: str, rows: str) -> str:
    """docs/packs.md with this table in its place."""
    before, after = page.index(BEGIN) + len(BEGIN), page.index(END)
    return f"{page[:before]}\n{rows}\n{page[after:]}"


def main() -> None:
    """Store one model in every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path, help="where everything is written")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    parameters = sum(tensor.numel() for tensor in weights(given.base).values())
    sizes = {way.name: way.store(given.base, given.model, given.folder / way.name) / parameters for way in ways()}
    print(json.dumps({name: round(bits, 5) for name, bits in sizes.items()}))


if __name__ == "__main__":
    main()
