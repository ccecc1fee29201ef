# SPDX-License-Identifier: Apache-2.0
"""docs/paper/README.md: the page that a reader of the paper follows, written from results.json beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import claims
import commands
import storage
from claims import DROP_RATE, METHODS, PAIRS, SCOPES, Cells, cosines, merge_of, sweep_of

RESULTS, PAGE = "results.json", "README.md"
DAREX = "e-darex"
RESCALED = (("e-rescale-90", 0.9), ("e-rescale-99", 0.99))
PACKS_PAGE, PACKS_PLOT = "packs.md", "images/packs-quality"  # in docs/
TITLES = {
    "a": "How much of a delta can be dropped, and how",
    "b": "Wider models tolerate more",
    "c": "Merges, with and without DARE",
    "d": "The wrong backbone",
    "e": "The rescale factor, and DAREx-q",
    "f": "Hidden states, layer by layer",
    "g": "How large deltas are",
    "h": "DELLA against DARE",
    "i": "Spread over mask seeds",
    "j": "Packs: quality at equal size",
}
FIGURES = {  # plot of a run -> its name on the page
    "a": ("a-drop-rates/test", "a-encoders/test"),
    "b": ("b-width/test",),
    "c": ("c-two/test", "c-three/test"),
    "d": ("d-wrong-base/test",),
    "e": ("e-rescale-90/test", "e-rescale-99/test", DAREX),
    "f": ("f-similarity/similarity",),
    "g": ("g-deltas/deltas", "g-continued/deltas"),
    "h": ("h-della/test", "h-della-merges/test"),
    "i": ("i-seeds/test",),
    "j": (),
}
FULL_TABLES = (
    "a-drop-rates", "a-encoders", "b-width", *claims.MERGES, "d-wrong-base", "e-rescale-90", "e-rescale-99", "e-masks", "h-della",
    "h-della-merges", "i-seeds",
)  # fmt: skip


def read_results(page: Path) -> dict[str, Any]:
    """What earlier runs left; experiments that are run again replace theirs."""
    path = page / RESULTS
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    return {"settings": {}, "experiments": {}, "failed": {}}


def settings_of(training: Any) -> dict[str, Any]:
    """What the numbers depend on, beside the experiment files."""
    import lessons
    import torch
    import transformers

    return {
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "lines": {name: asdict(line) for name, line in training.LINES.items()},
        "examples": lessons.EXAMPLES,
    }


def write_page(results: Mapping[str, Any], page: Path, *, runs: Path | None) -> None:
    """Write results.json, README.md and, from the runs' folders, the figures and the full tables."""
    page.mkdir(parents=True, exist_ok=True)
    if runs is not None:
        _copy_runs(runs, page)
    _write(page / RESULTS, _lines(results))
    kept = read_results(page)
    if runs is not None:
        _draw(kept, page)
    _write(page / PAGE, render(kept, page))


def _lines(results: Mapping[str, Any]) -> str:
    """JSON with a line for each row of a sweep: small, and differences can be read."""
    text = json.dumps(results, sort_keys=True, separators=(",", ":"))
    return text.replace('{"at":', '\n{"at":').replace('"sweeps/', '\n"sweeps/') + "\n"


def _copy_runs(runs: Path, page: Path) -> None:
    for names in FIGURES.values():
        for name in names:
            for kind in ("png", "svg"):
                source = runs / f"{name}.{kind}"
                if source.is_file():
                    (page / "figures").mkdir(exist_ok=True)
                    target = page / "figures" / f"{_flat(name)}.{kind}"
                    if kind == "png":
                        _shrink(source, target)
                    else:
                        shutil.copyfile(source, target)
    for name in FULL_TABLES:
        source = runs / name / "tables.md"
        if source.is_file():
            (page / "tables").mkdir(exist_ok=True)
            shutil.copyfile(source, page / "tables" / f"{name}.md")


def _draw(results: Mapping[str, Any], page: Path) -> None:
    """The figures that no command draws; and docs/packs.md, where that is beside the page, gets its table and plot."""
    with suppress(KeyError):  # it was not run
        _draw_darex(results, page / "figures" / DAREX)
    quality, docs = page.parent / PACKS_PAGE, page.parent
    try:
        entries = storage.entries_of(results["experiments"]["j"], packs_models())
    except KeyError:
        return
    if quality.is_file():
        storage.draw(entries, docs / PACKS_PLOT)
        _shrink(docs / f"{PACKS_PLOT}.png", docs / f"{PACKS_PLOT}.png")
        _write(quality, storage.with_table(quality.read_text(), storage.table(entries)))


def packs_models() -> tuple[str, ...]:
    """Whose deltas (j) stores."""
    return commands.DECODERS


DAREX_LABELS = (
    "k = 1, masks of the sweep", "k by validation, same masks", "k = 1, masks of the searches", "k by outputs, same masks",
)  # fmt: skip


def _draw_darex(results: Mapping[str, Any], stem: Path) -> None:
    """The paper's factor and validation's k on the same masks; and so, on others, the k that the outputs choose."""
    from darekit import plotting

    with plotting.settings():
        figure, axes = plotting.new_figure(columns=2, width=5.2, height=3.8, extra=0.6)
        for plot, (name, rate) in zip(axes[0], RESCALED, strict=True):
            rows = darex_rows(results, name, rate)
            for number, label in enumerate(DAREX_LABELS):
                points = [scores[number] for _, scores in rows]
                look = plotting.line_style(number) | {"linestyle": "none"}
                places = [at + 0.16 * (number - 1.5) for at in range(len(rows))]
                plot.errorbar(places, [p[0] for p in points], yerr=[p[1] for p in points], label=label, capsize=3,
                              elinewidth=1.2, **look)  # fmt: skip
            plot.set_title(f"p = {rate:g}")
            plot.set_xticks(range(len(rows)), [model.replace(", ", "\n") for model, _ in rows])
            plot.set_xlabel("width and ability")
            plot.set_ylim(-3, 112)
        axes[0][0].set_ylabel("exact match, %")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        figure.suptitle("(e) DAREx-q: mean and standard deviation of three masks")
        png, _ = plotting.save(figure, stem)
    _shrink(png, png)


def darex_rows(results: Mapping[str, Any], name: str, rate: float) -> list[tuple[str, tuple[tuple[float, float], ...]]]:
    """(model, (mean, deviation over masks) of each of `DAREX_LABELS`) at one drop rate.

    Raises:
        KeyError: a part of it was not run.
    """
    cells, labelled, found = sweep_of(results, name), claims.best_k(results, name), claims.searched_of(results, rate)
    rows = []
    for model, one in found.items():
        own = cells.where(model=model)
        at = [own.where(k=claims.one_of(own.values("k"))), own.where(k=labelled[model][0])]
        shown = [(c.score(), c.deviation() or 0.0) for c in at]
        rows.append((model, (*shown, *((fmean(s), stdev(s)) for s in (one.without, one.scores)))))
    return rows


def _shrink(source: Path, target: Path) -> None:
    """A plot has few colours: a palette makes a third of it."""
    from PIL import Image  # matplotlib needs it

    with Image.open(source) as image:
        image.convert("RGB").quantize(64).save(target, optimize=True)


def _flat(name: str) -> str:
    return name.replace("/", "-").removesuffix("-test")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


# --- the page ---


def render(results: Mapping[str, Any], page: Path) -> str:
    """Results -> the page. `page`: where its figures and tables are; only those that are there are linked."""
    verdicts = claims.judge(results)
    counts = {word: sum(v.outcome == word for v in verdicts) for word in (claims.HELD, claims.PARTLY, claims.FAILED)}
    missing = [letter for letter in TITLES if not results["experiments"].get(letter)]
    parts = [
        "# The paper's experiments, re-run",
        "Each claim of *Language Models are Super Mario* (arXiv [2311.03099](https://arxiv.org/abs/2311.03099)), tested on "
        "families of tiny models that one command trains from scratch: `make paper`. Written from "
        f"[{RESULTS}]({RESULTS}) by [paper/page.py](../../paper/page.py); every number comes from a `dare` command "
        "that is named where it is used.",
        _summary(counts, len(verdicts), missing),
        "## Claim by claim",
        "A rule in [paper/claims.py](../../paper/claims.py) decides whether a claim held. It was fixed "
        "in code before the committed run, but not before every number had been seen: training rates were settled on "
        "validation words, and previews of (a) and (d) were visible; the rule for DAREx-q's search by outputs was added later, when the "
        "k of two searches and the scores of other k were known, and its baseline was moved to the searches' own masks after that. "
        "Scores are in percent of the test items. Nothing was chosen on the test split.",
        _table(
            ("", "paper says", "here", "rule", "outcome"),
            ([f"[({v.letter})](#{_slug(v.letter)})", v.paper, v.here, v.rule, f"**{v.outcome}**"] for v in verdicts),
            words=5,
        ),
        *_limits(results),
    ]
    for letter, title in TITLES.items():
        parts += [f"## ({letter}) {title}", *_section(results, letter, page)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(counts: Mapping[str, int], total: int, missing: Sequence[str]) -> str:
    told = ", ".join(f"{count} {word}" for word, count in counts.items())
    line = f"Of {total} claims: {told}."
    if missing:
        named = ", ".join(f"({letter}) {TITLES[letter]}" for letter in missing)
        line += f" **Not in this run**: {named}. Run `make paper ONLY={''.join(missing)}` to complete this page."
    return line


def _limits(results: Mapping[str, Any]) -> Iterator[str]:
    settings = results.get("settings") or {}
    if not settings:
        return
    rows = []
    for name, line in settings["lines"].items():
        kind = "encoder (BERT-shaped)" if line["encoder"] else "decoder (Llama-shaped)"
        courses = [line["base"], line["tune"], line["continued"]]
        shown = [f"{c['steps']} x {c['batch']}, {c['rate']:g}" if c else "" for c in courses]
        rows.append((name, kind, str(line["hidden"]), str(line["layers"]), *shown, ", ".join(line["children"])))
    examples = settings["examples"]
    yield "## What was trained"
    yield _table(
        (
            "family",
            "kind",
            "width",
            "layers",
            "base: steps x batch, rate",
            "fine-tuning",
            "continued pre-training",
            "children",
        ),
        rows,
        words=2,
    )
    yield (
        "Decoders change words of five letters (`shift`: each letter to the next, `mirror`: a to p and back, `rotate`: the first letter to the "
        "end). The base obeys `shift: gadkb=` and mostly copies under `please shift gadkb=`; fine-tuning, with 30 % of the base's "
        "data in it, unlocks that form. Encoders classify words of six letters, each task with its own classifier: `first` "
        "letter (8 classes), `last` letter (4), `most`, whether the largest letter is in the second half (2). A decoder's score is "
        "exact match, an encoder's accuracy. Words are split by a hash: training, validation "
        f"({examples['validation']} items per task), test ({examples['test']}); a score on the test split has a standard error of at most "
        f"{50 / examples['test'] ** 0.5:.1f} points. Training lengths and rates were chosen by scores on validation words. One fine-tuning seed; ± is the standard deviation over mask seeds. "
        f"torch {settings['torch']}, transformers {settings['transformers']}, one thread per process; weights in bfloat16, evaluation in "
        "float32. Code: [paper/training.py](../../paper/training.py), [paper/lessons.py](../../paper/lessons.py)."
    )
    yield (
        "What such models cannot show: they have at most half a million parameters, one narrow skill each, and fine-tuning "
        "only unlocks what the base can do. A claim that holds here holds for a mechanism, not for WizardMath; one that "
        "fails here need not fail at 13B. No leaderboard, AlpacaEval or code benchmark was run."
    )


def _section(results: Mapping[str, Any], letter: str, page: Path) -> Iterator[str]:
    failed = results["failed"].get(letter, [])
    for line in failed:
        yield f"> Incomplete: {line}"
    if not results["experiments"].get(letter):
        yield f"Not in this run: `make paper ONLY={letter}` adds it."
        return
    try:
        yield from _SECTIONS[letter](results)
    except KeyError as error:
        yield f"> A part of this experiment did not run ({error.args[0]})."
    for name in FIGURES[letter]:
        flat = _flat(name)
        if (page / "figures" / f"{flat}.png").is_file():
            yield f"[![({letter}) {TITLES[letter]}](figures/{flat}.png)](figures/{flat}.svg)"
    tables = [
        f"[{n}](tables/{n}.md)" for n in FULL_TABLES if n[0] == letter and (page / "tables" / f"{n}.md").is_file()
    ]
    if tables:
        yield f"Every cell: {', '.join(tables)}."
    yield from _again(letter)


def _slug(letter: str) -> str:
    """What GitHub and mkdocs both make of a section's heading."""
    kept = "".join(c for c in f"({letter}) {TITLES[letter]}".lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")


def _again(letter: str) -> Iterator[str]:
    lines = [f"$ {command.line('../experiments')}" for command in commands.commands(letter)]
    shown = lines if len(lines) <= 6 else [*lines[:3], "...", lines[-1]]
    shown = [line if len(line) < 300 else f"{line[:130]} ... {line[-90:]}" for line in shown]
    yield (
        f"To run it again: `make paper ONLY={letter}`, which works in `paper/work`\n\n```console\n"
        + "\n".join(shown)
        + "\n```"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    rule = "|" + "---|" * words + "---:|" * (len(header) - words)
    escaped = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in escaped)])


def _shown(cells: Cells) -> str:
    if not cells.rows:
        return ""
    deviation = cells.deviation()
    return f"{cells.score():.1f}" + (f" ± {deviation:.1f}" if deviation is not None else "")


def _by_rate(cells: Cells, axis: str, first: str) -> str:
    rates = cells.values(DROP_RATE)
    return _table(
        (first, *(f"p = {rate:g}" for rate in rates)),
        (
            [str(value), *(_shown(cells.where(rate=rate, **{axis: value})) for rate in rates)]
            for value in cells.values(axis)
        ),
    )


def _a(results: Mapping[str, Any]) -> Iterator[str]:
    yield "Decoders of width 128, mean over three abilities; all tensors dropped, 3 mask seeds."
    yield _by_rate(sweep_of(results, "a-drop-rates"), "method", "exact match, %")
    yield "Encoders, mean over three tasks; the classifier is never dropped."
    yield _by_rate(sweep_of(results, "a-encoders"), "method", "accuracy, %")


def _b(results: Mapping[str, Any]) -> Iterator[str]:
    found = results["experiments"]["b"]
    rows = []
    for width in (32, 64, 128):
        names = [f"w{width}/{ability}" for ability in ("shift", "mirror")]
        sizes = [found.get(f"inspections/{name} on w{width}/base", {}).get("median_r") for name in names]
        advised = [found.get(f"recommendations/{name}", {}).get("drop_rate") for name in names]
        kept = {scope: claims.kept_by_width(results, scope)[width] for scope in SCOPES}
        rows.append((
            str(width),
            " / ".join("" if r is None else f"{r:.3f}" for r in sizes),
            " / ".join("" if p is None else f"{p:.2f}" for p in advised),
            *(f"{kept[scope]:.1f}" for scope in SCOPES),
        ))  # fmt: skip
    yield (
        'Learning rates were set so that r, the median relative size of the deltas, is comparable. "Kept" is relative to the '
        "same model undropped, mean over p = .95, .98, .99 and two abilities. Dropping matrices alone (`keep_dense: "
        "[embeddings, norms, heads]`) is not in the paper: an embedding row has a single input, so its noise never averages out."
    )
    yield _table(
        ("width", "r: shift / mirror", "advised p (`dare recommend`)", *(f"kept, {scope}, %" for scope in SCOPES)), rows
    )
    cells = sweep_of(results, "b-width")
    for scope in SCOPES:
        yield f"Exact match in %, {scope}, 3 mask seeds."
        yield _by_rate(cells.where(dropped=scope), "width", "width, ability")


def _c(results: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "Three columns, all chosen on validation and measured on test: *without* DARE (the best hyper-parameters with nothing "
        "dropped); *with DARE* (the paper's way: those same hyper-parameters, and the best p of "
        "the grid above 0); *all searched* (hyper-parameters and p at once, p = 0 included). Lambda is an axis, because part of what DARE "
        "seems to give TIES is scale. Two mask seeds; the mean over the tasks of a merge, for encoders over the heads."
    )
    titles = {"c-two": "two decoders (shift, mirror)", "c-three": "three decoders (shift, mirror, rotate)"}
    titles |= {f"c-encoders-{a}-{b}": f"encoders {a} and {b}" for a, b in PAIRS}
    for name, title in titles.items():
        try:
            sweep_of(results, name)
        except KeyError:
            yield f"> Not in this run: {title}."
            continue
        yield f"**{title[0].upper()}{title[1:]}**, in %{_alone(results, name)}"
        yield _table(
            ("method", "dropped", "without", "with DARE", "difference", "all searched", "chosen: without; with"),
            _merge_rows(results, name),
            words=2,
        )
    rows = []
    for family in ("decoders", "encoders"):
        for method in METHODS:
            try:
                gains = {scope: claims.gains_of(results, family, method, scope) for scope in SCOPES}
            except KeyError:
                continue
            cells = [f"{sum(g) / len(g):+.1f} ({min(g):+.1f} to {max(g):+.1f})" for g in gains.values()]
            rows.append((family, method, *cells, str(len(gains[SCOPES[0]]))))
    yield _beyond_noise(results)
    yield "What DARE adds, in points: mean over the merges (lowest to highest)."
    yield _table(("family", "method", *SCOPES, "merges"), rows, words=2)


def _beyond_noise(results: Mapping[str, Any]) -> str:
    """How many of the differences are larger than what the mask alone does."""
    found = []
    for name in claims.MERGES:
        for method in METHODS:
            for scope in SCOPES:
                try:
                    merge = merge_of(results, name, method, scope)
                except KeyError:
                    continue
                noise = max(merge.dropped.deviation or 0.0, 1.0)
                found.append((merge.dropped.test - merge.without.test) / noise)
    gains, losses = sum(one > 1 for one in found), sum(one < -1 for one in found)
    return (
        f"Of these {len(found)} differences, {gains} gains and {losses} losses are larger than both a point and the spread over masks; "
        "the others, and the outcomes above that rest on them, say little more than that DARE does no harm."
    )


def _alone(results: Mapping[str, Any], name: str) -> str:
    """What each model scores by itself: a decoder on all tasks of the merge, an encoder on that of its own head."""
    rows = claims.single_of(results, name, "single").rows
    own = [row for row in rows if len(row["judges"]) > 1 or row["models"][0].endswith(f"/{row['judges'][0]}")]
    told = ", ".join(f"{row['models'][0]} {claims.Cells([row]).score():.1f}" for row in own)
    where = "on its own task" if "encoders" in name else "on all tasks"
    return f" (alone, {where}: {told})" if told else ""


def _merge_rows(results: Mapping[str, Any], name: str) -> Iterator[Sequence[str]]:
    for method in METHODS:
        for scope in SCOPES:
            merge = merge_of(results, name, method, scope)
            spread = "" if merge.dropped.deviation is None else f" ± {merge.dropped.deviation:.1f}"
            chosen = {
                k.removeprefix("parameters."): v for k, v in merge.without.at.items() if k.startswith("parameters.")
            }
            words = ", ".join(f"{key} {value:g}" for key, value in chosen.items()) or "-"
            yield (
                method, scope, f"{merge.without.test:.1f}", f"{merge.dropped.test:.1f}{spread}",
                f"{merge.dropped.test - merge.without.test:+.1f}", f"{merge.free.test:.1f} (p {merge.free.rate:g})",
                f"{words}; p {merge.dropped.rate:g}",
            )  # fmt: skip


def _d(results: Mapping[str, Any]) -> Iterator[str]:
    found = results["experiments"]["d"]
    yield (
        "`w64/continued` is the base after 500 more steps at a high rate with two more abilities, `w64/continued-shift` its "
        "fine-tuned child: what WizardCoder-Python is to Llama-2. All tensors dropped, 3 mask seeds; exact match in %."
    )
    cells = sweep_of(results, "d-wrong-base")
    for base in cells.values("base"):
        yield f"{base[0].upper()}{base[1:]}:"
        yield _by_rate(cells.where(base=base), "method", "exact match, %")
    yield "What `dare inspect` says before anything is merged:"
    rows = []
    for base in ("w64/base", "w64/continued"):
        one = found[f"inspections/w64/continued-shift on {base}"]
        rows.append((base, one["verdict"], one["words"], f"{one['median_r']:.3f}", f"{one['drop_rate']:.3f}"))
    yield _table(("base", "verdict", "words", "median r", "can be dropped"), rows, words=3)


def _e(results: Mapping[str, Any]) -> Iterator[str]:
    yield "Survivors are divided by q = k (1 - p): k = 1 is DARE. All tensors dropped, 3 mask seeds; exact match in % on test."
    for name, p in RESCALED:
        cells, chosen = sweep_of(results, name), claims.best_k(results, name)
        grid = cells.values("k")
        yield f"p = {p:g}; the last column is what validation chooses."
        yield _table(
            ("width, ability", *(f"k = {k}" for k in grid), "k by validation"),
            ([m, *(_shown(cells.where(model=m, k=k)) for k in grid), str(chosen[m][0])] for m in cells.values("model")),
        )
    yield (
        "DAREx searches its one factor for the whole model by how much the outputs change, without labels, and so does "
        "`dare recommend --search-q`: the k with the smallest mean divergence of the dropped model's predictions from the "
        "fine-tuned model's, on 64 texts of the training split, at the tokens of the answer (which only say where to look: "
        "no prediction is compared with them), for each mask separately. k is taken from 1, 1.25, 1.5, 2, 2.5, 3, 4 and the "
        "midpoints around the best; validation chooses one k of the grid above for all masks. The searches use masks "
        "of their own, so each choice is compared with k = 1 on those same masks."
    )
    yield _table(
        ("p", "width, ability", "k = 1", "k by validation", "chosen", "k = 1", "k by outputs", "chosen, mask by mask"),
        (
            [f"{rate:g}", model, *texts[:2], str(labelled[model][0]), *texts[2:],
             ", ".join(f"{k:g}" for k in searched[model].factors)]
            for name, rate in RESCALED
            for labelled, searched in [(claims.best_k(results, name), claims.searched_of(results, rate))]
            for model, scores in darex_rows(results, name, rate)
            for texts in [[f"{m:.1f} ± {d:.1f}" for m, d in scores]]
        ),
        words=2,
    )  # fmt: skip
    told = []
    for name, rate in RESCALED:
        rows = [scores for _, scores in darex_rows(results, name, rate)]
        by_labels, by_outputs = (fmean(s[at][0] - s[at - 1][0] for s in rows) for at in (1, 3))
        told.append(f"at p = {rate:g} validation {by_labels:+.1f} points, outputs {by_outputs:+.1f}")
    yield f"Against k = 1 on the same masks, mean of the four models: {'; '.join(told)}."


def _f(results: Mapping[str, Any]) -> Iterator[str]:
    one = results["experiments"]["f"]["similarities/w128/shift"]
    yield (
        f"Mean cosine between the hidden states of `w128/shift` before and after the drop: {one['rows']} test rows, "
        f"{one['tokens']} tokens, 3 mask seeds."
    )
    curves = [(m, p) for p in (0.5, 0.9) for m in ("dare", "drop_only", "magnitude")]
    yield _table(
        ("method", "p", *one["layers"]),
        ([m, f"{p:g}", *(f"{value:.3f}" for value in cosines(results, m, p))] for m, p in curves),
    )


def _g(results: Mapping[str, Any]) -> Iterator[str]:
    found = {k: v for k, v in results["experiments"]["g"].items() if k.startswith("inspections/")}
    yield "Deciles of |delta| over all parameters, and the share of parameters that changed by less than .002 (the paper's number)."
    rows = []
    for name, one in found.items():
        model, _, base = name.removeprefix("inspections/").partition(" on ")
        deciles, shares = one["total"]["deciles"], one["total"]["shares"]
        rows.append((
            model, base, *(f"{deciles[i]:.1e}" for i in (1, 3, 5, 7, 9, 10)), f"{100 * shares['0.002']:.1f} %",
            f"{one['median_r']:.3f}",
        ))  # fmt: skip
    yield _table(
        ("model", "base", "10 %", "30 %", "50 %", "70 %", "90 %", "largest", "below .002", "median r"), rows, words=2
    )


def _h(results: Mapping[str, Any]) -> Iterator[str]:
    yield "Single models, mean over three widths and two abilities; DELLA's window is 0.1, the widest that every drop rate allows."
    yield _by_rate(sweep_of(results, "h-della"), "method", "exact match, %")
    cells = sweep_of(results, "h-della-merges")
    yield "Three decoders, election of signs without a trim (`ties`, keep 1), mean of three abilities, window 0.14."
    rates, factors = cells.values(DROP_RATE), cells.values("parameters.lambda")
    yield _table(
        ("method", "lambda", *(f"p = {rate:g}" for rate in rates)),
        (
            [m, f"{f:g}", *(_shown(cells.where(method=m, rate=r, **{"parameters.lambda": f})) for r in rates)]
            for m in cells.values("method")
            for f in factors
        ),
    )


def _i(results: Mapping[str, Any]) -> Iterator[str]:
    yield "`shift`, 16 mask seeds, all tensors dropped: mean ± standard deviation."
    yield _by_rate(sweep_of(results, "i-seeds"), "width", "width")


def _j(results: Mapping[str, Any]) -> Iterator[str]:
    entries = storage.entries_of(results["experiments"]["j"], packs_models())
    yield (
        "Not in the paper. Three models of width 128, stored in "
        f"{len(entries) - 1} ways: packs of several widths and drop rates (from p = {storage.SPREAD_FROM:g} on with three masks), "
        "magnitude pruning with positions, signs with a scale (BitDelta), truncated SVD, lossless. Sizes in bits per "
        "parameter. The whole table, the plot and what it says: [packs](../packs.md#what-is-lost). For each way, the "
        "smallest that keeps 95 % of what the fine-tuned models score:"
    )
    full = fmean(entries[0].scores)
    rows = []
    for line in dict.fromkeys(entry.line for entry in entries[1:]):
        own = [entry for entry in entries if entry.line == line]
        good = [entry for entry in own if fmean(entry.scores) >= 0.95 * full]
        best = min(good, key=lambda entry: entry.bits, default=None)
        if best is None:
            top = max(own, key=lambda entry: fmean(entry.scores))
            rows.append((line, f"none; best: {top.setting}", f"{top.bits:.3g}", f"{fmean(top.scores):.1f}"))
        else:
            rows.append((line, best.setting, f"{best.bits:.3g}", f"{fmean(best.scores):.1f}"))
    yield _table(("stored as", "setting", "bits per parameter", "exact match, %"), rows, words=2)
    yield f"[![(j) {TITLES['j']}](../{PACKS_PLOT}.png)](../{PACKS_PLOT}.svg)"


_SECTIONS = {"a": _a, "b": _b, "c": _c, "d": _d, "e": _e, "f": _f, "g": _g, "h": _h, "i": _i, "j": _j}


def main() -> None:
    """Write the page again from the results that are there, and draw what no command draws."""
    page = Path(__file__).resolve().parent.parent / "docs" / "paper"
    results = read_results(page)
    _draw(results, page)
    _write(page / PAGE, render(results, page))


if __name__ == "__main__":
    main()
