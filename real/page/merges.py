# SPDX-License-Identifier: Apache-2.0
"""Merges: of the grid, with chosen weights, of the search; and what rounding does to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from real import claims
from real import informed as informing
from real.claims import dropped
from real.lessons import PROSE
from real.measuring import shown
from real.merging import MERGES, ROUNDED, SMALL, best, chosen, chosen_weights, rounded
from real.page.results import Results, size_of
from real.page.words import evaluated, gaps, mean_gap, rate_word, table, told_gap
from real.searching import BEST, START
from real.sizes import DROP_RATE


def merged(results: Results, page: Path) -> Iterator[str]:
    """The grid's merges, and the weights'."""
    models = claims.abilities(results)
    if "three-test" not in results["steps"]:
        raise KeyError("three-test")
    yield (
        "Settings are chosen on validation by the mean of the abilities, and only the chosen are asked on test. *With DARE* is "
        "the paper's way: the setting that is best without it, and the best drop rate above 0. Lambda, its grid and TIES' keep "
        "of .2 stand in `real/merging.py`."
    )
    rows = []
    names = [
        name.removesuffix("-grid") for name in results["steps"] if name.endswith("-grid") and name != "weights-grid"
    ]
    names = [name for name in names if f"{name}-test" in results["steps"]]
    for name in sorted(names, key=lambda n: (n != "three", n)):
        own = models if name == "three" else name.split("-")
        grid = _chosen_settings(results, name, own)
        for method, pair in claims.merge_cells(results, name, own).items():
            for how, row in pair.items():
                scores = [f"{claims.cell_of(row, one).mean:.1f}" if one in own else "" for one in models]
                rows.append((
                    ", ".join(own), f"{method} {how} DARE", *scores, f"{claims.mean_of(row, own):.1f}",
                    f"{claims.cell_of(row, PROSE).mean:.1f}", grid.get((method, how), ""),
                ))  # fmt: skip
    yield table(("models", "merge", *models, "mean", "perplexity", "chosen"), rows, words=2)
    cells = [row for pair in claims.merge_cells(results, "three", models).values() for row in pair.values()]
    rows_each = results["settings"]["rows"]["test"]
    error = max(
        sum(q * (1 - q) / rows_each for q in [claims.cell_of(row, one).mean / 100 for one in models]) ** 0.5
        for row in cells
    )
    error *= 100 / len(models)
    yield (
        f"The mean of a merge of {len(models)} has a standard error of up to {error:.1f} points: a difference of less than twice that is no "
        "finding, whatever the rule above says of it."
    )
    with suppress(KeyError):
        yield from _row_by_row(results, models)
    alone = ", ".join(f"{one} {dropped(results, one, 'DARE', 0).mean:.1f}" for one in models)
    yield f"Alone, each on its own task: {alone}."
    if (page / "merges.png").is_file():
        yield "![Abilities of the merges](merges.png)"
    with suppress(KeyError):
        yield from _weights(results, models)


def _row_by_row(results: Results, models: Sequence[str]) -> Iterator[str]:
    rows = []
    for method in MERGES:
        step = f"paired-{method.replace(' ', '-')}"
        found = gaps(results, step, f"{step}-with")
        cells = [told_gap(found.get(one)) for one in models]
        rows.append((method, *cells, told_gap(mean_gap(found, models)), told_gap(found.get(PROSE))))
    yield (
        f"With DARE minus without, for all {len(models)} models, row by row (`dare eval`): points, ± the standard error of the rows' own "
        "differences."
    )
    yield table(("merge", *models, "mean", "perplexity"), rows)


def _chosen_settings(results: Results, name: str, models: Sequence[str]) -> dict[tuple[str, str], str]:
    found = {}
    for method, pair in chosen(results["steps"], name, models).items():
        for how, row in pair.items():
            words = row["at"]["setting"].partition(", ")[2]
            rate = row["at"][DROP_RATE]
            found[method, how] = ", ".join(filter(None, (words, f"p {rate_word(rate)}" if rate else "")))
    return found


def _weights(results: Results, models: Sequence[str]) -> Iterator[str]:
    rows = claims.rows_of(results, "weights-test", "grid", "undropped")
    grid = [row for row in results["steps"]["weights-grid"]["rows"] if row["kind"] == "grid" and row["scores"]]
    top = best(grid, models)["at"]["weights"]
    yield (
        f"Weights of TIES (keep .3, kept deltas added up by weight), the best of {len(grid)} on validation: **{top}** for "
        f"{', '.join(models)}. On test, with DARE before it at several drop rates:"
    )
    yield table(
        ("merge", *models, "mean", "perplexity"),
        (
            (
                row["at"]["merge"], *(f"{claims.cell_of(row, one).mean:.1f}" for one in models),
                f"{claims.mean_of(row, models):.1f}", f"{claims.cell_of(row, PROSE).mean:.1f}",
            )
            for row in rows
        ),
    )  # fmt: skip


# --- RegMean ---


def informed(results: Results, page: Path) -> Iterator[str]:
    """A merge by statistics, beside each model alone."""
    models = claims.abilities(results)
    cells = [row for row in claims.rows_of(results, "regmean", "grid", "undropped")]
    yield (
        f"The merges above know nothing but weights. [`regmean`](../recipes.md#statistics) also knows what the inputs of each linear layer look like: "
        f"`dare stats gram` reads {informing.ROWS} rows of each model's own training data (no row of validation or test), and each layer of the merge is the "
        "one that comes closest to what every model does on its own inputs, in closed form. Nothing is trained and nothing is chosen: all settings are the defaults. "
        f"With DARE before it, all {len(models)} models are dropped at p (embeddings and norms stay dense)."
    )
    alone = {one: dropped(results, one, "DARE", 0).mean for one in models}
    rows = []
    for row in cells:
        values = {one: claims.cell_of(row, one).mean for one in models}
        kept = [
            f"**{value:.1f}**" if claims.is_kept(results, one, value) else f"{value:.1f}"
            for one, value in values.items()
        ]
        rate = row["at"][DROP_RATE]
        name = f"RegMean, DARE p = {rate_word(rate)}" if rate else "RegMean"
        rows.append((name, *kept, f"{fmean(values.values()):.1f}", f"{claims.cell_of(row, PROSE).mean:.1f}"))
    with suppress(KeyError):
        name, row = _best_plain(results, models)
        values = [claims.cell_of(row, one).mean for one in models]
        rows.append(
            (
                f"best merge by weights alone: {name}",
                *(f"{one:.1f}" for one in values),
                f"{fmean(values):.1f}",
                f"{claims.cell_of(row, PROSE).mean:.1f}",
            )
        )
    rows.append(
        (
            "each model alone, on its own task",
            *(f"{one:.1f}" for one in alone.values()),
            f"{fmean(alone.values()):.1f}",
            "",
        )
    )
    yield table(("on test", *models, "mean", "perplexity"), rows)
    seconds = fmean(results["seconds"][f"gram-{one}"] for one in models)
    yield f"**Bold**: within two standard errors of the model alone. The statistics of a model took {shown(seconds)}."


def _best_plain(results: Results, models: Sequence[str]) -> tuple[str, Mapping[str, Any]]:
    """The merge by weights alone with the highest mean on test: what RegMean is held against has the advantage."""
    found = {
        f"{method} {how} DARE": row
        for method, pair in claims.merge_cells(results, "three", models).items()
        for how, row in pair.items()
    }
    with suppress(KeyError):
        found |= {
            f"TIES, chosen weights, {row['at']['merge']}": row
            for row in claims.rows_of(results, "weights-test", "grid", "undropped")
        }
    name = max(found, key=lambda one: claims.mean_of(found[one], models))
    return name, found[name]


# --- the search ---


def searched(results: Results, page: Path) -> Iterator[str]:
    """What `dare search` found, on test, beside what it had to beat."""
    models = claims.abilities(results)
    weights = ""
    with suppress(KeyError):
        weights = f" ({' / '.join(f'{one:g}' for one in chosen_weights(results['steps'], models))})"
    yield from _search(
        results, "search", models, f"TIES with the grid's weights{weights}",
        "method (task arithmetic, TIES with a keep of .2 or .3, DARE before either), a weight for each model with {depth} control points from the first "
        "layer to the last, lambda and drop rate",
    )  # fmt: skip
    if "search-regmean" in results["steps"]:
        yield "**RegMean.** The same question, where the merge knows the inputs:"
        yield from _search(
            results, "search-regmean", models, "RegMean by default",
            "a weight for each model with {depth} control points, how far the Grams are shrunk, and drop rate",
        )  # fmt: skip


def _search(results: Results, step: str, models: Sequence[str], start: str, space: str) -> Iterator[str]:
    """One search: what was asked, what was chosen, how it does on test."""
    found = results["steps"][step]
    best_one, counts = found["best"], found["counts"]
    if best_one is None:
        yield "The search found no merge that could be judged: " + " ".join(found["verdict"])
        return
    settings = results["settings"]
    yield (
        f"`dare search`: {counts['trials']} candidates over {space.format(depth=settings['depth'])}; it begins with {start}. They are chosen on "
        f"validation ({settings['rows']['validation']} rows of each ability) by {_goals(found)}; test is asked once, for what was chosen. Rungs saved "
        f"{100 * counts['saved']:.0f} % of the rows."
    )
    yield "Chosen: " + _recipe_words(best_one, models) + "."
    judged: dict[str, dict[str, float]] = {}
    with suppress(KeyError):
        judged = evaluated(results, f"{step}-test")
    rows = [_search_row("the search's best", best_one["test"], models, judged.get(f"{step}-{BEST}", {}).get(PROSE))]
    with suppress(KeyError):
        first = judged[f"{step}-{START}"]
        cells = (
            *(f"{first[one]:.1f}" for one in models),
            f"{fmean(first[one] for one in models):.1f}",
            f"{first[PROSE]:.1f}",
        )
        rows.append((start, *cells))
    for role, name in (("best plain merge", found["best_plain"]), ("best single model", found["best_single"])):
        baseline = next((one for one in found["baselines"] if one["name"] == name), None)
        if baseline is not None and baseline["test"]:
            rows.append(_search_row(f"{role}: {name}", baseline["test"], models, None))
    alone = [dropped(results, one, "DARE", 0).mean for one in models]
    rows.append(("each model alone, on its own task", *(f"{one:.1f}" for one in alone), f"{fmean(alone):.1f}", ""))
    yield table(("on test", *models, "mean", "perplexity"), rows)
    if mine := (gaps(results, f"{step}-test", f"{step}-{BEST}") if judged else {}):
        by_model = [told_gap(mine.get(one)) for one in models]
        cells = (*by_model, told_gap(mean_gap(mine, models)), told_gap(mine.get(PROSE)))
        yield f"The search's best minus {start}, row by row: points, ± the standard error of the rows' own differences."
        yield table(("minus", *models, "mean", "perplexity"), [(start, *cells)])
    lowest = min(models, key=lambda one: best_one["test"][f"{one}/exact_match"]["value"])
    value = 100 * best_one["test"][f"{lowest}/exact_match"]["value"]
    looks = found["test_looks"]
    yield (
        f"Its weakest ability is `{lowest}` with {value:.1f} %. Test was used for {looks} choice{'' if looks == 1 else 's'} of this search."
    )
    yield "In its own words: " + " ".join(found["verdict"])


GOALS = {
    "mean": "the mean of the abilities",
    "relative mean": "the mean of the abilities, each as a share of what the model alone can do",
    "relative min": "the least ability, as a share of what the model alone can do",
}


def _goals(found: Mapping[str, Any]) -> str:
    named = [goal["score"] for goal in found["question"]["goals"]]
    return ", ".join(GOALS.get(one, f"`{one}`") for one in named)


def _search_row(
    title: str, scores: Mapping[str, Mapping[str, Any]], models: Sequence[str], prose: float | None
) -> tuple[str, ...]:
    values = [100 * scores[f"{one}/exact_match"]["value"] for one in models]
    told = "" if prose is None else f"{prose:.1f}"
    return (title, *(f"{value:.1f}" for value in values), f"{fmean(values):.1f}", told)


def _recipe_words(found: Mapping[str, Any], models: Sequence[str]) -> str:
    """The best's own settings; a baseline has a name."""
    if found["trial"] is None:
        return f"no candidate, but the baseline *{found['name']}*"
    params = dict(found["params"])
    words = [f"trial {found['trial']}: {params.pop('method', 'as written')}"]
    for at, one in enumerate(models):
        start = f"models.{at}.parameters.weight"
        points = [value for key, value in params.items() if key == start or key.startswith(f"{start}[")]
        params = {key: value for key, value in params.items() if not key.startswith(start)}
        if points:
            words.append(f"weight of {one} " + " / ".join(f"{value:.2f}" for value in points))
    words += [
        f"{key.rpartition('.')[2].replace('_', ' ')} {value:.2f}"
        for key, value in params.items()
        if isinstance(value, float)
    ]
    return "; ".join(words)


# --- rounding ---


def rounding(results: Results, page: Path) -> Iterator[str]:
    """A merge in three formats."""
    models = claims.abilities(results)
    judged = evaluated(results, "rounding")
    rows, means = [], []
    for name in rounded(size_of(results)):
        scores = judged[name]
        output, _, rate = name.rpartition("-p")
        means.append(fmean(scores[one] for one in models))
        apart = mean_gap(gaps(results, "rounding", name), models)
        rows.append((
            output.replace("-", ", "), rate_word(float(rate)), *(f"{scores[one]:.1f}" for one in models),
            f"{means[-1]:.1f}", told_gap(apart), f"{scores[PROSE]:.1f}",
        ))  # fmt: skip
    header = ["output", "p", *models, "mean", "apart", "perplexity"]
    if not any(row[-2] for row in rows):  # a run from before differences were kept
        header.remove("apart")
        rows = [(*row[:-2], row[-1]) for row in rows]
    yield (
        f"Task arithmetic of all models at lambda {SMALL:g}, where many changes are smaller than half a step of bfloat16: does it matter how "
        f"they are rounded, and does DARE gain by it? The first {ROUNDED} rows of each test, judged in float32."
        + (
            " *Apart*: the mean minus that of the first row, ± the standard error of the rows' own differences."
            if "apart" in header
            else ""
        )
    )
    yield table(header, rows)
    error = 100 * max(
        sum(q * (1 - q) / ROUNDED for q in [scores[one] / 100 for one in models]) ** 0.5 for scores in judged.values()
    ) / len(models)  # fmt: skip
    spread = max(means) - min(means)
    yield (
        f"All means lie within {spread:.1f} points, and one has a standard error of {error:.1f}: "
        + (
            "here it does not matter how they are rounded, with or without DARE. How many changes are undone, which "
            if spread < 2 * error
            else "rounding decides here, so a comparison with and without DARE must be made in float32 or with `rounding: stochastic`. How many changes are undone, which "
        )
        + "every merge says and [docs/rounding.md](../rounding.md) explains, does not tell what becomes of an ability."
    )


def draw_merges(results: Results, page: Path) -> None:
    """Every ability of every merge of all models: one ability starves the others."""
    from darekit import plotting

    models = claims.abilities(results)
    rows = [
        (f"{method}, {how} DARE", row)
        for method, pair in claims.merge_cells(results, "three", models).items()
        for how, row in pair.items()
    ]
    with suppress(KeyError):
        rows += [
            (f"TIES, chosen weights, {row['at']['merge']}", row)
            for row in claims.rows_of(results, "weights-test", "grid", "undropped")
        ]
    with suppress(KeyError):
        rows += [
            ("RegMean" + (f", DARE p = {rate_word(row['at'][DROP_RATE])}" if row["at"][DROP_RATE] else ""), row)
            for row in claims.rows_of(results, "regmean", "grid", "undropped")
        ]
    with plotting.settings():
        figure, axes = plotting.new_figure(1, 1, width=7.4, height=0.42 * len(rows) + 1.4)
        plot = axes[0][0]
        places = range(len(rows))
        for number, one in enumerate(models):
            look = plotting.line_style(number) | {"linestyle": "none", "markersize": 8}
            plot.plot([claims.cell_of(row, one).mean for _, row in rows], places, label=one, **look)
            plot.axvline(dropped(results, one, "DARE", 0).mean, color=look["color"], linewidth=1, linestyle=":")
        plot.set_yticks(places, [name for name, _ in rows])
        plot.invert_yaxis()
        plot.grid(axis="y")
        plot.set_xlim(-3, 103)
        plot.set_xlabel("exact match on test, % (dotted: each model alone)")
        plot.legend(loc="upper center", bbox_to_anchor=(0.4, 1.12), ncols=len(models))
        plotting.save(figure, page / "merges")
        (page / "merges.svg").unlink(missing_ok=True)
