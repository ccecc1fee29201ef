# SPDX-License-Identifier: Apache-2.0
"""The plot of `dare similarity`: cosine of hidden states over layers."""

from __future__ import annotations

from pathlib import Path

from darekit import plotting
from darekit.analysis.similarities import Similarity
from darekit.wording import label


def draw_similarity(found: Similarity, stem: Path) -> tuple[Path, Path]:
    """Write STEM.png and STEM.svg."""
    with plotting.settings():
        figure, grid = plotting.new_figure()
        axes = grid[0][0]
        places = range(len(found.layers))
        methods = list(dict.fromkeys(curve.method for curve in found.curves))
        rates = list(dict.fromkeys(curve.drop_rate for curve in found.curves))
        for curve in found.curves:
            look = plotting.line_style(methods.index(curve.method))
            if len(rates) > 1:  # colour and marker: the method; dashes: the drop rate
                look["linestyle"] = plotting.DASHES[rates.index(curve.drop_rate) % len(plotting.DASHES)]
            axes.plot(places, curve.cosine, label=curve.title, **look)
            lows = [mean - spread for mean, spread in zip(curve.cosine, curve.deviation, strict=True)]
            highs = [min(1.0, mean + spread) for mean, spread in zip(curve.cosine, curve.deviation, strict=True)]
            axes.fill_between(places, lows, highs, color=look["color"], alpha=0.15, linewidth=0)
        step = max(1, len(found.layers) // 16)
        shown = [i for i in places if i % step == 0]
        axes.set_xticks(shown, [found.layers[i] for i in shown])
        lowest = min(min(curve.cosine) for curve in found.curves)
        room = 0.06 * max(1 - lowest, 1e-4)
        axes.set_ylim(lowest - room, 1 + room)
        axes.set_xlabel("layer (its output)")
        axes.set_ylabel("cosine to the original's hidden state")
        axes.set_title(f"{label(found.model)}: hidden states after dropping ({found.tokens} tokens)")
        seeds = max(len(curve.seeds) for curve in found.curves)
        title = f"bands: ± 1 standard deviation over {seeds} mask seeds" if seeds > 1 else None
        # Legends fill column by column: a column for each method, a row for each drop rate.
        figure.legend(loc="outside lower center", ncols=min(4, len(methods)), title=title, title_fontsize=10)
        return plotting.save(figure, stem)
