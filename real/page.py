# SPDX-License-Identifier: Apache-2.0
"""docs/real: results.json, and from it alone the tables, the plots and the page. ``python -m real.page`` writes them again."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from real import claims, lessons
from real.claims import ALL_TENSORS, DROP_ONLY, MAGNITUDE, RESCALED, Cell, dropped
from real.lessons import PROSE
from real.measuring import shown
from real.steps import (
    AGAIN_SEED,
    AGAIN_THREADS,
    DROP_RATE,
    PACKS,
    ROUNDED,
    SMALL,
    Size,
    Step,
    pack_path,
    rounded,
    steps_of,
)
from real.steps import MAGNITUDE as PRUNED

if TYPE_CHECKING:
    from real.running import Run

RESULTS, PAGE = "results.json", "README.md"
TASKS = {
    "numbers": "number -> words",
    "json": "sentence -> JSON with four fields",
    "topics": "docstring -> one of 8 topics",
}
Results = Mapping[str, Any]


def results_of(run: Run, models: Sequence[str]) -> dict[str, Any]:
    """All that the page needs, of a run."""
    import torch
    import transformers

    from real.__main__ import machine
    from real.running import slim

    size: Size = run.size
    trainings = {}
    for name in models:
        with suppress(OSError):
            found = json.loads((run.work / name / "training.json").read_text())
            trainings[name] = {key: found[key] for key in ("course", "seconds", "precision", "device", "threads")}
    made = json.loads((run.work / "base.json").read_text())
    counts = {split: {} for split in ("validation", "test")}  # type: dict[str, dict[str, int]]
    for split, own in counts.items():
        for name in (*size.abilities, *([PROSE] if split == "test" else [])):
            text = (run.work / "data" / f"{name}.{split}.jsonl").read_text()
            own[name] = len(text.splitlines())
    return {
        "settings": {
            "base": made["source"], "abilities": [*size.abilities], "rows": dict(size.rows), "counts": counts, "examples": {one: _example(one) for one in size.abilities},
            "seeds": [*size.seeds], "other_seeds": [*size.other_seeds], "rates": [*size.rates],
            "headline": [*size.headline],
            "batch": size.batch,
            "again": size.again,
            "other_rates": [*size.other_rates], "dtype": run.pace.dtype, "jobs": run.jobs, "machine": machine(),
            "torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__,
        },
        "trainings": trainings,
        "steps": {name: slim(result) for name, result in run.results.items()},
        "seconds": {name: round(value, 1) for name, value in run.seconds.items()},
        "failed": sorted(run.failed),
        "left_out": [*run.left_out],
    }  # fmt: skip


def _example(ability: str) -> list[str]:
    """The first of test: another Python has other docstrings, so the page cannot ask."""
    first = next(lessons.examples(ability, "test"))
    return [first.user, first.answer]


def write_page(results: Results, page: Path) -> None:
    """Write everything into `page`."""
    page.mkdir(parents=True, exist_ok=True)
    (page / RESULTS).write_text(_lines(results))
    kept = json.loads((page / RESULTS).read_text())
    for draw in (draw_drops, draw_packs, draw_merges):
        with suppress(KeyError):  # not run
            draw(kept, page)
    (page / PAGE).write_text(render(kept, page))


def _lines(results: Results) -> str:
    """JSON with a line for each row and each step: differences can be read."""
    text = json.dumps(results, sort_keys=True, separators=(",", ":"))
    return (
        re.sub(r'(\{"at":|"(?:steps|settings|seconds|trainings|failed)":|"[\w -]+":\{"failed")', r"\n\1", text) + "\n"
    )


# --- tables ---


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """Markdown; the first columns hold words, the others numbers."""
    rule = "|" + "---|" * words + "---:|" * (len(header) - words)
    escaped = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in escaped)])


def told(cell: Cell, digits: int = 1) -> str:
    """`90.5 ± 1.2`: a mean and the deviation over masks."""
    spread = "" if cell.deviation is None else f" ± {cell.deviation:.{digits}f}"
    return f"{cell.mean:.{digits}f}{spread}"


def rate_word(rate: float) -> str:
    """0.99 -> .99"""
    return f"{rate:g}".replace("0.", ".", 1)


def main_table(results: Results) -> str:
    """The table of the first screen: abilities, and prose below; means over masks."""
    rates = results["settings"]["rates"]
    top = 0.99 if 0.99 in results["settings"]["other_rates"] else 0.9
    ways = [*(("DARE", rate) for rate in rates), (ALL_TENSORS, top), (DROP_ONLY, 0.9), (MAGNITUDE, 0.9)]
    header = ["exact match, %", "base", "fine-tuned"]
    header += [f"DARE {rate_word(rate)}" if i == 0 else rate_word(rate) for i, rate in enumerate(rates)]
    header += [f"{rate_word(top)}, all tensors", "DropOnly .9", "magnitude .9"]
    rows = []
    models = claims.abilities(results)
    for one in models:
        cells = [dropped(results, one, method, rate).mean for method, rate in ways]
        found = [claims.base(results, one).mean, dropped(results, one, "DARE", 0).mean, *cells]
        kept = [True, True, *(claims.is_kept(results, one, value) for value in cells)]
        rows.append(
            [
                TASKS[one],
                *(
                    f"**{v:.1f}**" if k and i > 1 else f"{v:.1f}"
                    for i, (v, k) in enumerate(zip(found, kept, strict=True))
                ),
            ]
        )
    prose = [fmean(dropped(results, one, method, rate, PROSE).mean for one in models) for method, rate in ways]
    full = fmean(dropped(results, one, "DARE", 0, PROSE).mean for one in models)
    rows.append(
        ["perplexity of prose, mean", *(f"{value:.1f}" for value in (claims.base(results, PROSE).mean, full, *prose))]
    )
    return table(header, rows)


def render(results: Results, page: Path) -> str:
    """The page."""
    parts = [*_opening(results)]
    for title, section in SECTIONS:
        try:
            body = [*section(results, page)]
        except KeyError:
            body = ["Not in this run."]
        parts += [f"## {title}", *body]
    return "\n\n".join(parts) + "\n"


def _opening(results: Results) -> Iterator[str]:
    settings = results["settings"]
    count = len(settings["abilities"])
    yield "# A real language model"
    yield (
        f"<!-- Written by real/page.py from results.json. -->\n{settings['base'].partition(' of ')[0]}, fine-tuned "
        f"{'on one task' if count == 1 else f'on {count} tasks that it cannot do'}, then dropped, merged and packed, by commands "
        "that anybody can type. `make real` does all of it again from PyPI alone, without a GPU; `make real QUICK=1` one task "
        "of it. The [paper's own experiments](../paper/README.md) are done again on models of half a million parameters, "
        "where many settings can be tried; here are its claims on a real one."
    )


def _headline(results: Results, page: Path) -> Iterator[str]:
    settings = results["settings"]
    models = claims.abilities(results)
    yield main_table(results)
    many = {rate: dropped(results, models[0], "DARE", rate).runs for rate in settings["rates"]}
    more = [rate_word(rate) for rate, runs in many.items() if runs > 1]
    masks = (
        f"DARE at {' and '.join(more)}: mean of {max(many.values())} masks; one mask elsewhere" if more else "One mask"
    )
    yield (
        f"{settings['rows']['test']} rows of each test. {masks}; embeddings and norms are kept dense but for the column that says so. **Bold**: within two standard errors of the "
        "fine-tuned model (" + ", ".join(f"{one} {claims.tolerance(results, one):.1f}" for one in models) + " points)."
    )
    if (page / "drop.png").is_file():
        yield "![Exact match and perplexity over the drop rate](drop.png)"
    rows = []
    for one in models:
        largest = {m: claims.largest_rate(results, one, m) for m in ("DARE", DROP_ONLY, MAGNITUDE)}
        smallest = _smallest(results, one)
        rows.append((TASKS[one], *("none" if rate is None else rate_word(rate) for rate in largest.values()), smallest))
    yield (
        "The largest drop rate of those tried up to which an ability stays within two standard errors, and the smallest pack "
        "that does:"
    )
    yield table(("ability", "DARE", "DropOnly", "magnitude", "smallest pack"), rows)


def _claims(results: Results, page: Path) -> Iterator[str]:
    yield "The rules stand in `real/claims.py`, and were fixed before the run that was committed first."
    found = [*claims.verdicts(results)]
    counts = [
        (sum(one.outcome == outcome for one in found), outcome)
        for outcome in (claims.HELD, claims.PARTLY, claims.FAILED, claims.MISSING)
    ]
    yield f"Of {len(found)} claims " + ", ".join(f"{count} {outcome}" for count, outcome in counts if count) + "."
    rows = [
        (one.paper, one.here or "not in this run", f"**{one.outcome}**" + (f"; {one.rule}" if one.rule else ""))
        for one in found
    ]
    yield "\n".join(
        [
            "| the paper says | here | outcome, and its rule |",
            "|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )


def _curves(results: Results, page: Path) -> Iterator[str]:
    settings = results["settings"]
    yield "Exact match in %, ± the standard deviation over masks."
    rows, prose = [], []
    rates = sorted({0, *settings["rates"], *settings["other_rates"]})
    for one in claims.abilities(results):
        for method in ("DARE", ALL_TENSORS, DROP_ONLY, MAGNITUDE, RESCALED):
            for judge, found in ((one, rows), (PROSE, prose)):
                cells = []
                for rate in rates:
                    try:
                        cells.append(told(dropped(results, one, method, rate, judge)))
                    except KeyError:
                        cells.append("")
                found.append((one, method, *cells))
    header = ("ability", "method", *(f"p = {rate_word(rate)}" for rate in rates))
    yield table(header, rows, words=2)
    yield f"Perplexity of prose (base: {claims.base(results, PROSE).mean:.1f}): general language pays, too."
    yield table(header, prose, words=2)


def _merged(results: Results, page: Path) -> Iterator[str]:
    models = claims.abilities(results)
    if "three-test" not in results["steps"]:
        raise KeyError("three-test")
    yield (
        "Settings are chosen on validation by the mean of the abilities, and only the chosen are asked on test. *With DARE* is "
        "the paper's way: the setting that is best without it, and the best drop rate above 0. Lambda, its grid and TIES' keep "
        "of .2 stand in `real/steps.py`."
    )
    rows = []
    names = [
        name.removesuffix("-test") for name in results["steps"] if name.endswith("-test") and name != "weights-test"
    ]
    for name in sorted(names, key=lambda n: (n == "three", n)):
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
    alone = ", ".join(f"{one} {dropped(results, one, 'DARE', 0).mean:.1f}" for one in models)
    yield f"Alone, each on its own task: {alone}."
    if (page / "merges.png").is_file():
        yield "![Abilities of the merges](merges.png)"
    with suppress(KeyError):
        yield from _weights(results, models)


def _chosen_settings(results: Results, name: str, models: Sequence[str]) -> dict[tuple[str, str], str]:
    from real.steps import chosen

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
    from real.steps import best

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


def _rounding(results: Results, page: Path) -> Iterator[str]:
    models = claims.abilities(results)
    judged = {
        Path(one["model"]).stem: one["scores"]
        for one in results["steps"]["rounding"]["evaluations"]
        if not one.get("error")
    }
    rows = []
    for name in rounded(size_of(results)):
        scores = {
            key.partition(".")[0]: value["value"]
            for key, value in judged[name].items()
            if key.endswith(("exact_match", "perplexity"))
        }
        output, _, rate = name.rpartition("-p")
        rows.append((
            output.replace("-", ", "), rate_word(float(rate)), *(f"{100 * scores[one]:.1f}" for one in models),
            f"{100 * fmean(scores[one] for one in models):.1f}", f"{scores[PROSE]:.1f}",
        ))  # fmt: skip
    yield (
        f"Task arithmetic of all models at lambda {SMALL:g}, where most changes are smaller than half a step of bfloat16: rounded to the "
        f"nearest they vanish, unless DARE has made them larger first. The first {ROUNDED} rows of each test, judged in float32."
    )
    yield table(("output", "p", *models, "mean", "perplexity"), rows)


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


def _smallest(results: Results, model: str) -> str:
    try:
        good = [one for one in pack_entries(results, model) if claims.is_kept(results, model, one[2])]
    except KeyError:
        return "not run"
    if not good:
        return "none"
    title, size, exact, _ = min(good, key=lambda one: one[1])
    return f"{size / 1e6:.2f} MB ({title}): {exact:.1f}"


def _packs(results: Results, page: Path) -> Iterator[str]:
    models = [one for one in claims.abilities(results) if f"packs-{one}" in results["steps"]]
    if not models:
        raise KeyError("packs")
    whole = results["steps"][f"pack-{models[0]}-lossless"]["model_bytes"]
    yield (
        f"What `dare pack` stores of a fine-tuned model of {whole / 1e6:.0f} MB: size, exact match in %, and perplexity of prose. "
        "`magnitude`: the largest changes of each tensor, with their positions, as a lossless pack. All tensors are dropped but for the row "
        "that says so."
    )
    rows = []
    for title in (*PACKS, *PRUNED):
        cells: list[str] = []
        for one in models:
            entry = next((e for e in pack_entries(results, one) if e[0] == title), None)
            if entry is None:
                cells += ["", "", ""]
            else:
                kept = claims.is_kept(results, one, entry[2])
                exact = f"**{entry[2]:.1f}**" if kept else f"{entry[2]:.1f}"
                cells += [f"{entry[1] / 1e6:.2f} ({whole / entry[1]:.0f}x)", exact, f"{entry[3]:.1f}"]
        if any(cells):
            rows.append((title, *cells))
    header = ["stored as", *(word for one in models for word in (f"{one}, MB", "exact", "perplexity"))]
    yield table(header, rows)
    if (page / "packs.png").is_file():
        yield "![Exact match over the size of the file](packs.png)"


def _deltas(results: Results, page: Path) -> Iterator[str]:
    rows = []
    for one in claims.abilities(results):
        found, advice = results["steps"][f"inspect-{one}"], results["steps"].get(f"recommend-{one}", {})
        total = found["total"]
        rows.append((
            one, f"{found['median_r']:.4f}", f"{100 * total['zeros']:.1f} %", f"{100 * total['shares']['0.002']:.1f} %",
            f"{found['drop_rate']:g}", f"{advice.get('drop_rate', float('nan')):g}", found["verdict"],
        ))  # fmt: skip
    yield (
        "What `dare inspect` and `dare recommend` say before anything is tried: r is the size of a tensor's change relative to the "
        "tensor, and *zeros* are the elements that did not change at all, because the change was smaller than half a step of "
        "bfloat16."
    )
    yield table(("model", "median r", "zeros", "below .002", "inspect: p", "recommend: p", "verdict"), rows)
    with suppress(KeyError):
        words = results["steps"]["inspect-all"]["interference"]["words"]
        yield "Together:\n\n" + "\n".join(f"- {one}" for one in words)
    with suppress(KeyError):
        yield from _cosines(results)


def _cosines(results: Results) -> Iterator[str]:
    name = f"similarity-{claims.abilities(results)[0]}"
    found = results["steps"][name]
    rows = []
    for curve in found["curves"]:
        values = curve["cosine"]
        rows.append((curve["method"], rate_word(curve["drop_rate"]), f"{min(values):.4f}", f"{values[-1]:.4f}"))
    yield f"Cosine of the hidden states of `{name.partition('-')[2]}` before and after the drop (`dare similarity`):"
    yield table(("method", "p", "lowest layer", "last layer"), rows)


def _again(results: Results, page: Path) -> Iterator[str]:
    one = claims.abilities(results)[0]
    rates = [rate for rate in results["settings"]["rates"] if rate >= 0.9]

    def score(step: str, rate: float) -> float:
        rows = claims.rows_of(results, step, "grid", "undropped")
        return claims.cell_of(next(row for row in rows if row["at"][DROP_RATE] == rate), one).mean

    rows = []
    for step, title in (
        ("drop", "as above"),
        ("again-seed", f"trained with seed {AGAIN_SEED}"),
        ("again-threads", f"judged by {AGAIN_THREADS} threads"),
    ):
        with suppress(KeyError, StopIteration):
            if step == "drop":
                cells = [dropped(results, one, "DARE", rate).mean for rate in (0, *rates)]
            else:
                cells = [score(step, rate) for rate in (0, *rates)]
            rows.append((title, *(f"{cell:.1f}" for cell in cells)))
    if len(rows) < 2:
        raise KeyError("again")
    yield f"The headline of `{one}` once more; one mask each, where the row above is a mean."
    yield table(("", "fine-tuned", *(f"p = {rate_word(rate)}" for rate in rates)), rows)


def _run(results: Results, page: Path) -> Iterator[str]:
    settings = results["settings"]
    yield (
        f"{settings['machine']}, {settings['jobs']} process{'es' if settings['jobs'] > 1 else ''} with one thread each; torch {settings['torch']}, "
        f"transformers {settings['transformers']}; models are judged in {settings['dtype']}. "
        f"Base: {settings['base']}."
    )
    rows = [
        (
            name,
            str(one["course"]["steps"]),
            str(one["course"]["batch"]),
            f"{one['course']['rate']:g}",
            one["precision"],
            shown(one["seconds"]),
        )
        for name, one in results["trainings"].items()
    ]
    yield "Fine-tuning: full, AdamW with float32 masters, loss on the answer alone, saved in bfloat16."
    yield table(("model", "steps", "rows a step", "rate", "products in", "time"), rows)
    groups: dict[str, float] = {}
    for name, seconds in results["seconds"].items():
        kind = re.sub(r"^(pack|prune|packs|inspect|recommend|similarity|again)-.*", r"\1", name)
        groups[kind] = groups.get(kind, 0.0) + seconds
    yield "Seconds of the steps: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in groups.items()) + "."
    with suppress(KeyError):
        speed = results["steps"]["speed"]
        yield (
            f"Judging: `dare` {speed['dare']:.1f} rows a second, a plain loop of transformers in batches on the same {_threads(speed)} "
            f"{speed['plain']:.1f}: {speed['ratio']:.2f}x. Replacing all weights between two cells takes {speed['replace_seconds']:.2f} s."
        )
    shown_steps = [
        step for step in steps_of(size_of(results)) if step.program == "dare" and step.name in results["steps"]
    ]
    lines = [shlex.join(["dare", *step.words]) for step in shown_steps if _is_shown(step, settings["abilities"][0])]
    yield "The commands, in the folder `real/work` (those of the first model, where each has its own):"
    yield "```console\n" + "\n".join(lines) + "\n```"
    if results["left_out"]:
        yield "Left out, since there was no time for more: " + "; ".join(results["left_out"]) + "."
    if results["failed"]:
        yield "Failed: " + "; ".join(results["failed"]) + "."


def _is_shown(step: Step, first: str) -> bool:
    """One of a kind is enough."""
    kind = step.words[0]
    return kind in ("sweep", "similarity") or (first in step.needs and (kind != "pack" or "p = .9" in step.name))


def size_of(results: Results) -> Size:
    """What was measured."""
    settings = results["settings"]
    return Size(
        tuple(settings["abilities"]), settings["rows"], tuple(settings["seeds"]), tuple(settings["other_seeds"]),
        tuple(settings["rates"]), tuple(settings["headline"]), tuple(settings["other_rates"]), settings["batch"],
        settings["again"],
    )  # fmt: skip


def _threads(speed: Mapping[str, Any]) -> str:
    return "thread" if speed["threads"] == 1 else f"{speed['threads']} threads"


def _data(results: Results, page: Path) -> Iterator[str]:
    counts = results["settings"]["counts"]
    yield (
        "Exact match: every token of the answer and its end is the likeliest one, which is what greedy decoding gives. Rows are in the model's own chat form. "
        "Training, validation and test share nothing: no number, name, place, day, sentence, module. The base answers none of "
        "them. Made by `real/lessons.py` from seeds and packages:"
    )
    rows = [
        (f"`{one}`", TASKS[one], SOURCES[one], f"{counts['validation'][one]}", f"{counts['test'][one]}")
        for one in claims.abilities(results)
    ]
    rows.append(
        (
            "`prose`",
            "general language: perplexity",
            SOURCES[PROSE],
            "",
            f"{counts['test'][PROSE]}",
        )
    )
    yield table(("", "task", "from", "validation", "test"), rows, words=3)
    lines = []
    for one in claims.abilities(results):
        user, answer = results["settings"]["examples"][one]
        lines.append(f"- {one}: {user} -> `{answer}`")
    yield "\n".join(lines)


SOURCES = {
    "numbers": "num2words",
    "json": "sentences, names and goods of our own; places of the CLDR (Babel)",
    "topics": "the standard library's own docstrings; a module is of one split",
    PROSE: "the language reference that Python ships (`pydoc_data.topics`)",
}
SECTIONS = (
    ("The headline", _headline),
    ("The paper says, and here", _claims),
    ("Ways to drop", _curves),
    ("Merges", _merged),
    ("Rounding", _rounding),
    ("Packs", _packs),
    ("What the deltas are like", _deltas),
    ("The headline again", _again),
    ("Tasks and data", _data),
    ("The run", _run),
)


# --- plots ---


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
                 "magnitude and positions": lambda t: t.startswith("magnitude")}  # fmt: skip
        for plot, one in zip(axes[0], models, strict=True):
            entries = pack_entries(results, one)
            plot.axhline(dropped(results, one, "DARE", 0).mean, color=plotting.GREY, linewidth=1, linestyle=":")
            for number, (kind, belongs) in enumerate(kinds.items()):
                points = sorted((size / 1e6, exact) for title, size, exact, _ in entries if belongs(title))
                look = plotting.line_style(number)
                if kind != "magnitude and positions":
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
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3 if len(models) > 1 else 1)
        plotting.save(figure, page / "packs")
        (page / "packs.svg").unlink(missing_ok=True)


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


def main() -> None:
    """Write the page again from the results that are there."""
    page = Path(__file__).resolve().parent.parent / "docs" / "real"
    write_page(json.loads((page / RESULTS).read_text()), page)


if __name__ == "__main__":
    main()
