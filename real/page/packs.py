# SPDX-License-Identifier: Apache-2.0
"""One model as files: packs, what magnitude leaves, and adapters of equal size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import fmean

from real import claims
from real.claims import dropped
from real.lessons import PROSE
from real.packing import LORAS, PACKS, lora_path, pack_path
from real.packing import MAGNITUDE as PRUNED
from real.page.results import Results
from real.page.words import Gap, evaluated, gaps, is_worse, table, told_gap


def pack_entries(results: Results, model: str) -> list[tuple[str, float, float, float]]:
    """Title, bytes, exact match in percent and perplexity of every pack of a model.

    Raises:
        KeyError: they were not judged.
    """
    judged = {
        Path(one["model"]).name: one["scores"]
        for one in results["steps"][f"packs-{model}"]["evaluations"]
        if not one.get("error")
    }
    found = []
    for title in (*PACKS, *PRUNED):
        scores = judged.get(Path(pack_path(model, title)).name)
        pack = results["steps"].get(f"pack-{model}-{title}")
        if scores is None or pack is None:
            continue
        exact = next(v["value"] for k, v in scores.items() if k.endswith("exact_match"))
        prose = next(v["value"] for k, v in scores.items() if k.endswith("perplexity"))
        found.append((title, float(pack["bytes"]), 100 * exact, prose))
    if not found:
        raise KeyError(f"packs-{model}")
    return found


def pack_gaps(results: Results, model: str, title: str) -> dict[str, Gap]:
    """How far a pack is from the lossless one, which is the model itself, row by row."""
    return gaps(results, f"packs-{model}", Path(pack_path(model, title)).name)


def smallest(results: Results, model: str) -> tuple[str, ...]:
    """The smallest pack that keeps the ability, and the smallest of magnitude that is no smaller than it: title, size,
    exact match, how far apart row by row; size, exact match. Empty where packs were not judged."""
    try:
        entries = pack_entries(results, model)
    except KeyError:
        return ()
    good = [one for one in entries if claims.is_kept(results, model, one[2])]
    if not good:
        return ("none", "", "", "", "", "")
    title, size, exact, _ = min(good, key=lambda one: one[1])
    larger = [one for one in entries if one[0] in PRUNED and one[1] >= size]
    beside = min(larger, key=lambda one: one[1]) if larger else None
    own = ("", "") if beside is None else (f"{beside[1] / 1e6:.2f}", f"{beside[2]:.1f}")
    apart = told_gap(pack_gaps(results, model, title).get(model))
    return (title, f"{size / 1e6:.2f}", f"{exact:.1f}", apart, *own)


def packed(results: Results, page: Path) -> Iterator[str]:
    """All packs of all models."""
    models = [one for one in claims.abilities(results) if f"packs-{one}" in results["steps"]]
    if not models:
        raise KeyError("packs")
    whole = results["steps"][f"pack-{models[0]}-lossless"]["model_bytes"]
    yield (
        f"What `dare pack` stores of a fine-tuned model of {whole / 1e6:.0f} MB: size, exact match in %, and perplexity of prose. "
        "`magnitude`: the largest changes of each tensor, with their positions, as a lossless pack. All tensors are dropped but for the row "
        "that says so. **Bold**: within two standard errors of the fine-tuned model."
    )
    rows, paired, worse = [], [], []
    for title in (*PACKS, *PRUNED):
        cells: list[str] = []
        apart: list[str] = []
        for one in models:
            entry = next((e for e in pack_entries(results, one) if e[0] == title), None)
            if entry is None:
                cells += ["", "", ""]
                apart += ["", ""]
                continue
            kept = claims.is_kept(results, one, entry[2])
            exact = f"**{entry[2]:.1f}**" if kept else f"{entry[2]:.1f}"
            cells += [f"{entry[1] / 1e6:.2f} ({whole / entry[1]:.0f}x)", exact, f"{entry[3]:.1f}"]
            found = pack_gaps(results, one, title)
            if kept and one in found and is_worse(found[one]):
                worse.append(f"{one} at {title}")
            apart += [told_gap(found.get(one)), told_gap(found.get(PROSE))]
        if any(cells):
            rows.append((title, *cells))
        if any(apart):
            paired.append((title, *apart))
    header = ["stored as", *(word for one in models for word in (f"{one}, MB", "exact", "perplexity"))]
    yield table(header, rows)
    if paired:
        yield (
            "The same row by row, against the lossless pack, which is the model itself: points, ± the standard error of the rows' own differences. "
            "It is the sharper look: "
            + (
                f"bold above, but worse by more than two of these errors: {'; '.join(worse)}."
                if worse
                else "nothing that is bold above is worse by more than two of these errors."
            )
        )
        yield table(["stored as", *(word for one in models for word in (f"{one}, exact", "perplexity"))], paired)
    if (page / "packs.png").is_file():
        yield "![Exact match over the size of the file](packs.png)"


POSITIONS, LORA = "magnitude and positions", "adapter of the delta (LoRA)"
LINED = (POSITIONS, LORA)  # of one kind, from small to large


# --- adapters ---

Lora = tuple[str, float, float, float, float]  # title, bytes, exact match, perplexity, what is lost of the delta


def lora_entries(results: Results, model: str) -> list[Lora]:
    """Every adapter of a model, from the smallest.

    Raises:
        KeyError: they were not judged.
    """
    judged = evaluated(results, f"loras-{model}")
    found = []
    for title in LORAS:
        scores = judged.get(Path(lora_path(model, title)).name)
        made = results["steps"].get(f"lora-{model}-{title}")
        if scores and made:
            found.append((title, float(made["bytes"]), scores[model], scores[PROSE], made["total_error"]))
    if not found:
        raise KeyError(f"loras-{model}")
    return sorted(found, key=lambda one: one[1])


def adapters(results: Results, page: Path) -> Iterator[str]:
    """The delta as LoRA, beside the packs of its size."""
    models = [one for one in claims.abilities(results) if f"loras-{one}" in results["steps"]]
    if not models:
        raise KeyError("loras")
    outside = fmean(
        results["steps"][f"lora-{one}-{title}"]["outside"] for one in models for title, *_ in lora_entries(results, one)
    )
    yield (
        "The same models by `dare extract`: of each matrix's delta the closest of a rank, in bfloat16, judged as base + adapter; norms are saved "
        f"whole. The embeddings, which hold {100 * outside:.0f} % of the squared delta, are left out, as a LoRA has them. *Lost*: the "
        "error in all, relative to the delta. Beside each the best pack that is no larger. **Bold**: within two standard errors of the fine-tuned "
        "model; *apart*: points from it row by row."
    )
    rows = []
    for one in models:
        packs = pack_entries(results, one) if f"packs-{one}" in results["steps"] else []
        for title, size, exact, prose, lost in lora_entries(results, one):
            found = gaps(results, f"loras-{one}", Path(lora_path(one, title)).name)
            smaller = [pack for pack in packs if pack[1] <= size]
            best = max(smaller, key=lambda pack: (pack[2], -pack[1])) if smaller else None
            beside = "none" if best is None else f"{best[2]:.1f} ({best[0]}, {best[1] / 1e6:.2f} MB)"
            shown = f"**{exact:.1f}**" if claims.is_kept(results, one, exact) else f"{exact:.1f}"
            rows.append(
                (
                    one,
                    title,
                    f"{size / 1e6:.2f}",
                    f"{100 * lost:.0f} %",
                    shown,
                    told_gap(found.get(one)),
                    f"{prose:.1f}",
                    beside,
                )
            )
    yield table(
        ("model", "stored as", "MB", "lost", "exact", "apart", "perplexity", "best pack no larger"), rows, words=2
    )


def draw_packs(results: Results, page: Path) -> None:
    """Exact match over the size of the file."""
    from darekit import plotting

    models = [one for one in claims.abilities(results) if f"packs-{one}" in results["steps"]]
    if not models:
        raise KeyError("packs")
    with plotting.settings():
        extra = 0.9 if len(models) > 1 else 1.7  # the legend in two lines, or in five
        figure, axes = plotting.new_figure(1, len(models), width=4.6, height=4.4, extra=extra)
        kinds = {"pack": lambda t: "bit, p" in t and "kept" not in t, "embeddings and norms kept": lambda t: "kept" in t,
                 "1 bit dense (BitDelta)": lambda t: "BitDelta" in t, "lossless": lambda t: t == "lossless",
                 POSITIONS: lambda t: t.startswith("magnitude")}  # fmt: skip
        for plot, one in zip(axes[0], models, strict=True):
            entries = pack_entries(results, one)
            plot.axhline(dropped(results, one, "DARE", 0).mean, color=plotting.GREY, linewidth=1, linestyle=":")
            shown = {
                kind: sorted((size / 1e6, exact) for title, size, exact, _ in entries if belongs(title))
                for kind, belongs in kinds.items()
            }
            with suppress(KeyError):
                shown[LORA] = [(size / 1e6, exact) for _, size, exact, *_ in lora_entries(results, one)]
            for number, (kind, points) in enumerate(shown.items()):
                look = plotting.line_style(number)
                if kind not in LINED:
                    look["linestyle"] = "none"
                if points:
                    plot.plot(*zip(*points, strict=True), label=kind, **look)
            plot.set_xscale("log")
            ticks = [1, 3, 10, 30, 100]
            plot.set_xticks(ticks, [str(t) for t in ticks])
            plot.set_xticks([], minor=True)
            plot.set_title(one)
            plot.set_xlabel("size of the file, MB (log scale)")
            plot.set_ylim(-3, 103)
        axes[0][0].set_ylabel("exact match on test, %")
        labelled = {
            label: handle for plot in axes[0] for handle, label in zip(*plot.get_legend_handles_labels(), strict=True)
        }
        figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=3 if len(models) > 1 else 1)
        plotting.save(figure, page / "packs")
        (page / "packs.svg").unlink(missing_ok=True)
