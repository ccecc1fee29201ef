# SPDX-License-Identifier: Apache-2.0
"""The plots of `dare inspect`: sizes of deltas, r by layer and kind of tensor, how models interfere."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from darekit import plotting
from darekit.analysis.inspection import DECILES, Comparison, Inspection
from darekit.wording import distinct_labels

_LAYER = re.compile(r"\.(\d+)\.")

OUTSIDE = "other"  # the column of tensors that belong to no layer

_LEAST_SHARE = 1e-4  # smaller bins at the lower end are left out: they would stretch the axis for nothing

_WIDEST = 14.0  # inches of a figure

_CELLS = 400  # above that many, numbers in the cells are not written


def draw_inspection(found: Inspection | Comparison, folder: Path) -> list[Path]:
    """Write deltas, r and, for several models, interference, each as .png and .svg; their paths."""
    models = found.models if isinstance(found, Comparison) else (found,)
    names = distinct_labels([one.model for one in models])
    written: list[Path] = []
    with plotting.settings():
        written += _draw_deltas(models, names, folder / "deltas")
        written += _draw_r(models, names, folder / "r")
        if isinstance(found, Comparison):
            written += _draw_pairs(found, names, folder / "pairs")
            written += _draw_conflict(found, folder / "conflict")
    return written


def place_of(name: str) -> tuple[str, str]:
    """Tensor name -> its kind, and its layer or `other`.

    >>> place_of("model.layers.11.self_attn.q_proj.weight"), place_of("model.norm.weight")
    (('self_attn.q_proj', '11'), ('norm', 'other'))
    """
    found = _LAYER.search(name)
    tail = name[found.end() :] if found else name.rpartition("model.")[2]
    return tail.removesuffix(".weight"), found[1] if found else OUTSIDE


def sides_of(tables: Sequence[Mapping[tuple[str, str], float]]) -> tuple[list[str], list[str]]:
    """Kinds and layers in the order of rows and columns: matrices, then norms and biases; those outside layers last."""
    kinds = list(dict.fromkeys(kind for table in tables for kind, _ in table))
    layers = sorted({layer for table in tables for _, layer in table}, key=lambda one: (one == OUTSIDE, len(one), one))
    small = {kind for kind in kinds if "norm" in kind or kind.endswith("bias")}
    layered = {kind for table in tables for kind, layer in table if layer != OUTSIDE}
    kinds.sort(key=lambda kind: (kind not in layered, kind in small))
    return kinds, layers


def _draw_deltas(models: Sequence[Inspection], names: Sequence[str], stem: Path) -> Iterator[Path]:
    figure, grid = plotting.new_figure(1, 2, width=plotting.WIDTH * 0.85, extra=0.3)
    sizes, ranks = grid[0]
    for i, (one, name) in enumerate(zip(models, names, strict=True)):
        look = plotting.line_style(i)
        edges, shares = octaves(one)
        sizes.plot(edges * math.sqrt(2), 100 * shares, drawstyle="steps-mid", label=name, **look)
        deciles = np.array(one.total.deciles)
        positive = deciles > 0
        ranks.plot(100 * np.array(DECILES)[positive], deciles[positive], **look)
    for limit in (0.002, 0.005):
        sizes.axvline(limit, color=plotting.GREY, linestyle=(0, (1, 2)), linewidth=1.2, zorder=1)
    sizes.set_xscale("log")
    sizes.set_xlabel("|delta| (dotted: the paper's 0.002 and 0.005)")
    sizes.set_ylabel("% of parameters (bins: a factor of 2)")
    sizes.set_ylim(bottom=0)
    sizes.set_title("How large the deltas are")
    ranks.set_yscale("log")
    ranks.set_xlabel("% of parameters with a smaller |delta| (deciles)")
    ranks.set_ylabel("|delta|")
    ranks.set_xticks(range(0, 101, 10))
    ranks.set_title("Deciles (those above 0)")
    zeros = ", ".join(f"{name} {100 * one.total.zeros:.1f} %" for one, name in zip(models, names, strict=True))
    figure.legend(
        loc="outside lower center", ncols=min(4, len(models)), title=f"deltas that are 0 and not shown: {zeros}",
        title_fontsize=10,
    )  # fmt: skip
    yield from plotting.save(figure, stem)


def octaves(one: Inspection) -> tuple[Any, Any]:
    """Powers of two, and the share of the parameters whose |delta| lies from each to the next.

    Narrower bins would show a comb: deltas of BF16 weights are whole numbers of their last bits.
    """
    octaves: dict[int, int] = {}
    for edge, count in zip(one.histogram.edges, one.histogram.counts, strict=False):
        at = math.frexp(edge)[1] - 1 if edge else -127
        octaves[at] = octaves.get(at, 0) + count
    shares = {at: count / max(1, one.total.parameters) for at, count in octaves.items()}
    least = min((at for at, share in shares.items() if share > _LEAST_SHARE), default=0)
    shown = list(range(least, max(shares, default=-1) + 1))
    return 2.0 ** np.array(shown, float), np.array([shares.get(at, 0.0) for at in shown])


def _draw_r(models: Sequence[Inspection], names: Sequence[str], stem: Path) -> Iterator[Path]:
    tables = [{place_of(t.name): t.r for t in one.tensors} for one in models]
    finite = [r for table in tables for r in table.values() if 0 < r < math.inf]
    low, high = (min(finite), max(finite)) if finite else (1e-4, 1e-3)
    yield from _heatmaps(
        stem, tables, names, title="r = ‖delta‖ / ‖base‖: how far fine-tuning moved each tensor", bar="r",
        low=low, high=max(high, low * 1.01), log=True, text=_short,
    )  # fmt: skip


def _short(r: float) -> str:
    """`.054`: three characters and a point, for narrow cells."""
    return f"{r:.2g}" if r >= 1 or r == 0 else "<.001" if r < 0.001 else f"{r:.3f}".lstrip("0")


def _draw_conflict(found: Comparison, stem: Path) -> Iterator[Path]:
    tensors = found.interference.tensors
    tables = [{place_of(t.name): 100 * getattr(t, key) for t in tensors} for key in ("conflict", "cancelled")]
    yield from _heatmaps(
        stem, tables, ("elements whose signs conflict", "size that a plain sum cancels"),
        title=f"Interference of {len(found.models)} models", bar="%", low=0.0,
        high=max(1.0, *(value for table in tables for value in table.values())), log=False, text=lambda v: f"{v:.0f}",
    )  # fmt: skip


def _heatmaps(
    stem: Path, tables: Sequence[Mapping[tuple[str, str], float]], names: Sequence[str], *, title: str, bar: str,
    low: float, high: float, log: bool, text: Callable[[float], str],
) -> Iterator[Path]:  # fmt: skip
    """A row for each kind of tensor, a column for each layer; one panel for each table, all on one scale."""
    from matplotlib.colors import LogNorm, Normalize

    kinds, layers = sides_of(tables)
    longest = max(len(kind) for kind in kinds)
    names_width = 0.085 * longest + 1.5  # inches, once a row, with the colour bar
    panel = max(2.7, 0.16 * len(layers), 0.62 * min(len(layers), 12))
    columns = max(1, min(len(tables), int((_WIDEST - names_width) / panel)))
    rows = math.ceil(len(tables) / columns)
    width = panel + names_width / columns
    figure, grid = plotting.new_figure(rows, columns, width=width, height=0.3 * len(kinds) + 1.0, extra=0.5)
    norm = LogNorm(low, high) if log else Normalize(low, high)
    every = [axes for row in grid for axes in row]
    image = None
    for i, (axes, table, name) in enumerate(zip(every, tables, names, strict=False)):
        values = np.array([[table.get((kind, layer), np.nan) for layer in layers] for kind in kinds])
        shown = np.where(values > 0, values, low) if log else values
        visible = np.where(np.isnan(values), np.nan, shown)
        image = axes.imshow(visible, cmap=plotting.SEQUENTIAL, norm=norm, aspect="auto")
        if values.size <= _CELLS and len(layers) <= 16:
            _write_cells(axes, values, shown, norm, text)
        step = max(1, len(layers) // 16)
        ticks = [j for j, layer in enumerate(layers) if j % step == 0 or layer == OUTSIDE]
        axes.set_xticks(ticks, [layers[j] for j in ticks])
        axes.set_yticks(range(len(kinds)), kinds if i % columns == 0 else [""] * len(kinds))
        axes.set_xlabel("layer (other: outside the layers)")
        if i % columns == 0:
            axes.set_ylabel("kind of tensor")
        axes.set_title(name)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
    for axes in every[len(tables) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.colorbar(image, ax=every, label=bar, shrink=0.8, aspect=30)
    yield from plotting.save(figure, stem)


def _write_cells(axes: Any, values: Any, shown: Any, norm: Any, text: Callable[[float], str]) -> None:
    for (i, j), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        bright = float(norm(shown[i, j])) > 0.5
        axes.text(
            j, i, text(float(value)) if np.isfinite(value) else "inf", ha="center", va="center", fontsize=8,
            color="black" if bright else "white",
        )  # fmt: skip


def _draw_pairs(found: Comparison, names: Sequence[str], stem: Path) -> Iterator[Path]:
    """Two matrices, models by models: cosine, and the share of equal signs."""
    from matplotlib.colors import Normalize

    count, interference = len(names), found.interference
    cosine, agreement = np.eye(count), np.full((count, count), np.nan)
    for (i, j), relation in zip(interference.pairs, interference.total.pairs, strict=True):
        cosine[i, j] = cosine[j, i] = relation.cosine
        agreement[i, j] = agreement[j, i] = np.nan if relation.agreement is None else 100 * relation.agreement
    np.fill_diagonal(agreement, 100.0)
    side = 1.6 + 0.75 * count + 0.06 * max(map(len, names))
    figure, grid = plotting.new_figure(1, 2, width=side, height=side * 0.8, extra=0.3)
    for axes, values, low, high, title, form in (
        (grid[0][0], cosine, -1.0, 1.0, "cosine of the deltas", "{:.2f}"),
        (grid[0][1], agreement, 0.0, 100.0, "equal signs, % of what both moved", "{:.0f}"),
    ):
        norm = Normalize(low, high)
        image = axes.imshow(values, cmap=plotting.DIVERGING, norm=norm)
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                strong = abs(float(norm(value)) - 0.5) > 0.3
                axes.text(j, i, form.format(value), ha="center", va="center", color="white" if strong else "black")
        axes.set_xticks(range(count), names, rotation=30, ha="right")
        axes.set_yticks(range(count), names)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("model")
        axes.set_ylabel("model")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, shrink=0.75)
    figure.suptitle("Do the models pull the same way? (independent deltas: 0 and 50 %)", fontsize=12)
    yield from plotting.save(figure, stem)
