# SPDX-License-Identifier: Apache-2.0
"""The plot of the first screen."""

from __future__ import annotations

from pathlib import Path

from real import claims
from real.claims import DROP_ONLY, MAGNITUDE, dropped
from real.lessons import PROSE
from real.page.results import Results
from real.page.words import rate_word


def draw_drops(results: Results, page: Path) -> None:
    """Exact match and perplexity over the drop rate, on an axis of what is kept."""
    from darekit import plotting

    models = claims.abilities(results)
    settings = results["settings"]
    with plotting.settings():
        figure, axes = plotting.new_figure(1, 2, width=5.6, height=4.0, extra=0.5)
        left, right = axes[0]
        for number, one in enumerate(models):
            look = plotting.line_style(number) | {"linestyle": "-"}
            for method, style in (("DARE", "-"), (MAGNITUDE, "--"), (DROP_ONLY, ":")):
                rates = settings["rates"] if method == "DARE" else settings["other_rates"]
                points = [(1 - rate, dropped(results, one, method, rate)) for rate in sorted(rates)]
                points = [(1.0, dropped(results, one, "DARE", 0)), *points]
                kept, means = [x for x, _ in points], [cell.mean for _, cell in points]
                faded = {} if method == "DARE" else {"linewidth": 1.3, "markersize": 4, "alpha": 0.75}
                left.plot(
                    kept,
                    means,
                    **look | {"linestyle": style} | faded,
                    label=f"{one}, {method}" if method == "DARE" else None,
                )
                prose = [
                    dropped(results, one, "DARE" if x == 1.0 else method, 0 if x == 1.0 else rate, PROSE).mean
                    for x, rate in zip(kept, [0, *sorted(rates)], strict=True)
                ]
                if method != DROP_ONLY:
                    right.plot(kept, prose, **look | {"linestyle": style} | faded)
        right.axhline(claims.base(results, PROSE).mean, color=plotting.GREY, linestyle="-.", linewidth=1)
        right.annotate("base", (1.0, claims.base(results, PROSE).mean), color=plotting.GREY, va="bottom", fontsize=9)
        for method, style in ((MAGNITUDE, "--"), (DROP_ONLY, ":")):
            left.plot([], [], color=plotting.GREY, linestyle=style, label=f"{method}, in the same colours")
        for plot, label in ((left, "exact match on test, %"), (right, "perplexity of prose")):
            plot.set_xscale("log")
            plot.invert_xaxis()
            ticks = sorted({1.0, *(1 - rate for rate in settings["rates"])}, reverse=True)
            plot.set_xticks(
                ticks, [rate_word(1 - tick) if tick < 1 else "0" for tick in (round(t, 6) for t in ticks)], minor=False
            )
            plot.set_xticks([], minor=True)
            plot.set_xlabel("drop rate p")
            plot.set_ylabel(label)
        left.set_ylim(-3, 103)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(models) + 2)
        plotting.save(figure, page / "drop")
        (page / "drop.svg").unlink(missing_ok=True)
