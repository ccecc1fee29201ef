# SPDX-License-Identifier: Apache-2.0
"""Pages without a browser: what they say of folders that are whole, unfinished, empty or hostile; that they are sound
HTML, escaped, small, and made of figures that plotly itself accepts. `test_pages.py` looks at them in a browser."""

import base64
import hashlib
import itertools
import json
import math
import re
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest

pytest.importorskip("plotly")

import darekit as dk
import families
from darekit import plotting
from darekit.analysis.inspection import inspect
from darekit.analysis.records import RECORD, read_inspection, write_inspection
from darekit.errors import OutputError, Unsupported
from darekit.recipe import read_recipe
from darekit.recipe.texts import recipe_text
from darekit.reports.charts import CIVIDIS, LOOKS, PUOR
from darekit.reports.drawing import draw_search
from darekit.reports.evaluations import evaluation_page
from darekit.reports.inspections import inspection_page, shares_of
from darekit.reports.kinds import KINDS
from darekit.reports.markup import html_of
from darekit.reports.page import MINUS, Page, Plot, Table
from darekit.reports.search_plots import _brief, _shortened
from darekit.reports.searches import search_page
from darekit.reports.sweeps import compared, error_of, sweep_page
from darekit.sweeps.folders import read_sweep_folder
from darekit.sweeps.summaries import summarise
from result_folders import SWEEP, failed, finite, write_evaluation, write_sweep
from search_folders import write_search

HOSTILE = "</script><img src=x onerror=alert(1)><b>&\"'"

# --- reading a page as a browser would, without one


class Reader(HTMLParser):
    """Elements, the text of each kind of element, and whether all of them are closed in order."""

    VOID = frozenset({"meta", "img", "br", "wbr", "input", "link", "hr"})
    SVG = frozenset({"path", "circle"})  # written as <path/>

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.ids, self.texts, self.labels = [], [], [], {}, []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        self.labels += [value for name, value in attrs if name == "aria-labelledby"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in self.VOID | self.SVG, tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        for tag in {*self.open}:
            self.texts.setdefault(tag, []).append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert not reader.open
    return reader


def data_in(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def plots(page):
    return [part for section in page.sections for part in section.parts if isinstance(part, Plot)]


def tables(page):
    found = [part for section in page.sections for part in section.parts if isinstance(part, Table)]
    return found + [plot.table for plot in plots(page) if plot.table]


def painted(value, key=""):
    """A figure with real colours, as the script makes it."""
    if isinstance(value, dict):
        return {name: painted(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [painted(one, key) for one in value]
    return (
        "#123456" if isinstance(value, str) and key.endswith("color") and re.fullmatch("[a-z]+[0-9]?", value) else value
    )


@pytest.fixture(scope="module")
def inspected(tmp_path_factory, llamas):
    """A folder of `dare inspect --plot` of two models, without its plots."""
    folder = tmp_path_factory.mktemp("inspected")
    write_inspection(inspect(llamas.path / "base", llamas.path / "m0", llamas.path / "m1"), folder)
    return folder


@pytest.fixture(scope="module", params=["sweep", "search", "goals", "evaluation", "inspection"])
def page(request, tmp_path_factory):
    """The page of each kind of folder."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "inspection":
        return inspection_page(request.getfixturevalue("inspected"))
    if request.param == "sweep":
        return sweep_page(write_sweep(folder))
    if request.param == "evaluation":
        return evaluation_page(write_evaluation(folder))
    goals = ("math/exact_match", "chat/exact_match") if request.param == "goals" else ("mean",)
    return search_page(write_search(folder, 30, goals))


# --- what all pages have in common


def test_a_page_is_sound_html(page):
    html = html_of(page)
    found = read(html)
    assert len(found.ids) == len({*found.ids})
    assert {*found.labels} <= {*found.ids}
    links = [attrs["href"] for tag, attrs in found.tags if tag == "a"]
    assert len(links) > 3 and all(link.startswith("#") and link[1:] in found.ids for link in links)
    heads = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert heads[0] == 1 and heads.count(1) == 1 and all(b - a <= 1 for a, b in itertools.pairwise(heads))
    assert [tag for tag, _ in found.tags if tag in ("header", "nav", "main", "footer")] == [
        "header", "nav", "main", "footer",
    ]  # fmt: skip
    tables = sum(tag == "table" for tag, _ in found.tags)
    assert tables and tables == sum(tag == "caption" for tag, _ in found.tags)
    assert all(attrs.get("scope") for tag, attrs in found.tags if tag == "th")
    assert all(attrs.get("type") == "button" for tag, attrs in found.tags if tag == "button")
    assert page.verdict in " ".join(found.texts["p"]).replace("\N{NO-BREAK SPACE}", " ")
    charts = [attrs for tag, attrs in found.tags if "data-figure" in attrs]
    assert [int(attrs["data-figure"]) for attrs in charts] == [*range(len(charts))]
    assert all(len(attrs["aria-label"]) > 20 for attrs in charts)
    assert len(charts) == len(data_in(html)["figures"]) > 0


def test_a_page_needs_nothing_else(page):
    html = html_of(page)
    found = read(html)
    assert not [attrs for _, attrs in found.tags if {"src", "srcset", "data", "action"} & attrs.keys()]
    assert not any(tag in ("link", "iframe", "img", "object", "form", "base") for tag, _ in found.tags)
    assert "url(" not in "".join(found.texts["style"]) and "@import" not in "".join(found.texts["style"])
    [policy] = [a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "connect-src" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    digests = re.findall(r"'sha256-([^']+)'", policy)
    assert len(scripts) == 2
    assert digests == [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert "script-src" in policy and "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    assert len(html.encode()) < 8_000_000


def test_plotly_accepts_every_figure(page):
    import plotly.graph_objects as go

    html = html_of(page)
    figures = data_in(html)["figures"]
    for figure in figures:
        assert finite(figure)
        go.Figure(painted(figure))  # raises at a word that plotly does not know
        for trace in figure["data"]:
            lengths = {len(trace[key]) for key in ("x", "y", "customdata")
                       if isinstance(trace.get(key), list) and trace["type"] == "scatter"}  # fmt: skip
            assert len(lengths) <= 1, trace.get("name")
    with pytest.raises(ValueError, match="colour"):
        go.Figure({"data": [{"type": "scatter", "marker": {"colour": "red"}}]})


def test_clicks_copy_recipes_that_are_recipes(page):
    copies = data_in(html_of(page))["copies"]
    assert copies
    for title, text, what in copies:
        assert title and text
        if what == "recipe":
            import yaml

            assert read_recipe(yaml.safe_load(text)).models


def test_every_plot_says_how_to_read_it(page):
    assert all(len(plot.how) > 20 and plot.title and plot.views for plot in plots(page))
    for table in tables(page):
        assert all(len(row) == len(table.header) for row in table.rows), table.title
        assert not table.copies or len(table.copies) == len(table.rows)


def test_colours_are_those_of_the_plots_for_papers():
    from importlib.resources import files

    css = files("darekit.reports").joinpath("assets", "page.css").read_text()
    first = css[: css.index("@media")]
    named = dict(re.findall(r"--(\w+): (#\w+|rgba\([^)]*\));", first))
    assert [named[f"c{i}"].upper() for i in range(1, 8)] == [colour.upper() for colour in plotting.COLOURS]
    dark = [dict(re.findall(r"--(\w+): (#\w+);", block)) for block in re.findall(r"\{([^{}]*--c1[^{}]*)\}", css)[1:]]
    assert len(dark) == 2 and dark[0] == dark[1] and dark[0].keys() == named.keys() - {"none"}
    assert len({look[0] for look in LOOKS}) == len({look[1] for look in LOOKS}) == len({look[2] for look in LOOKS}) == 7
    pytest.importorskip("matplotlib")
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    for ours, theirs in ((CIVIDIS, plotting.SEQUENTIAL), (PUOR, plotting.DIVERGING)):
        for i, colour in enumerate(ours):
            there = colormaps[theirs](i / (len(ours) - 1))[:3]
            assert all(abs(a - b) < 0.03 for a, b in zip(to_rgb(colour), there, strict=True)), (theirs, i)


def contrast(one, other):
    """WCAG 2's ratio of two colours."""

    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
                   for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))  # fmt: skip

    a, b = sorted((light(one), light(other)), reverse=True)
    return (a + 0.05) / (b + 0.05)


def test_text_can_be_read_in_both_themes():
    from importlib.resources import files

    css = files("darekit.reports").joinpath("assets", "page.css").read_text()
    for block in re.findall(r"\{([^{}]*--c1[^{}]*)\}", css):
        named = dict(re.findall(r"--(\w+): (#\w+);", block))
        for paper in ("paper", "raised", "tint"):
            for ink in ("ink", "soft", "accent"):
                assert contrast(named[ink], named[paper]) >= 4.5, (ink, paper)
        for tone in ("good", "bad"):
            assert contrast(named[tone], named["paper"]) >= 3
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


# --- hostile data


def test_nothing_from_data_becomes_a_tag(tmp_path):
    def spoil(lines):
        for line in lines[5:]:
            line["recipe"]["models"][0]["model"] = HOSTILE
            line["params"] = {HOSTILE if k == "merge_method" else k: v for k, v in line["params"].items()}
        lines[6]["state"], lines[6]["error"] = "failed", HOSTILE

    sweep = json.loads(json.dumps(SWEEP).replace("code", HOSTILE.replace('"', "'")))
    sweep["axes"]["merge"][HOSTILE] = None
    evaluation = write_evaluation(tmp_path / "evaluation", (HOSTILE, "b"), errors={"b": HOSTILE})
    for made in (
        search_page(write_search(tmp_path / "search", 20, (HOSTILE,), change=spoil)),
        sweep_page(write_sweep(tmp_path / HOSTILE.replace("/", "|"), sweep)),
        evaluation_page(evaluation),
    ):
        html = html_of(made)
        plain = html_of(Page("Sweep", "x", "y"))
        found = read(html)
        assert not any(tag in ("img", "b") or "onerror" in attrs for tag, attrs in found.tags)
        # The only scripts are the page's own: the same as on a page without any data.
        assert html.count("<script") == plain.count("<script") and html.count("</script") == plain.count("</script")
        # plotly reads tags in labels and names, so there must be none in what it gets. (`customdata` is shown as text.)
        data = data_in(html)
        for figure in data["figures"]:
            for trace in figure["data"]:
                texts = json.dumps([trace.get(key) for key in ("name", "text", "x", "y")])
                assert trace["hoverinfo"] in ("none", "skip") and "hovertext" not in trace
                assert "<img" not in texts and "<b>" not in texts
            axes = json.dumps(figure["layout"])
            assert "<img" not in axes and "<b>" not in axes
        assert "onerror" in html  # it is there, as text
    # What a click copies is the data as it is.
    copies = data_in(html_of(search_page(tmp_path / "search")))["copies"]
    assert any(HOSTILE[:20] in text for _, text, _ in copies)


# --- sweeps


def test_a_sweep_says_what_was_chosen_first(tmp_path):
    page = sweep_page(write_sweep(tmp_path / "s"))
    assert page.kind == "Sweep" and page.state == ""
    assert re.match(r"Validation chooses .+: mean \d\.\d+ ± \d\.\d+ on test\.", page.verdict)
    assert page.tone == "good" and "better than the best single model" in page.details[0]
    facts = dict(page.facts)
    assert facts["drop rate p"] == "0, 0.5, 0.9" and facts["base"] == "base" and facts["models"] == "math, code"
    assert facts["chosen by"] == "mean, higher is better"
    [all_of_them] = [table for table in tables(page) if table.title.startswith("Every setting")]
    summary = summarise(*(lambda r: (r.sweep, r.finished))(read_sweep_folder(tmp_path / "s").result))
    assert [row[0] for row in all_of_them.rows] == [row.title for row in summary.rows]
    assert all_of_them.rows[all_of_them.strong[0]][0] == summary.chosen.title


def test_a_page_calls_its_errors_by_one_name(tmp_path):
    """`tables.md` has deviations over seeds; the page has standard errors, and must not say otherwise."""

    def warned(cell, one):
        return replace(one, warnings=("too much is dropped",)) if cell.at.get("sparsify.drop_rate") == 0.9 else one

    page = sweep_page(write_sweep(tmp_path / "s", change=warned))
    html = html_of(page)
    assert "standard deviation" not in html and "one standard error" in html
    [warning] = [note for note in page.notes if note.startswith("Warning: ")]
    assert warning.endswith(": too much is dropped") and " more: " in warning


def test_standard_errors_of_a_setting(tmp_path):
    result = read_sweep_folder(write_sweep(tmp_path / "s")).result
    summary = summarise(result.sweep, result.finished)
    row = next(row for row in summary.rows if row.kind == "grid" and len(row.finished) == 2)
    one, two = (cell.outcome.scores["test"]["sums/exact_match"]["value"] for cell in row.finished)
    spread = abs(one - two) / math.sqrt(2) / math.sqrt(2)  # deviation of two values, over the root of two
    assert error_of(row, "test", "sums/exact_match") == pytest.approx(math.hypot(0.02, spread))
    single = next(row for row in summary.rows if row.kind == "single")
    assert error_of(single, "test", "sums/exact_match") == 0.02
    assert error_of(single, "test", "mean") == pytest.approx(math.sqrt(2 * 0.02**2) / 2)
    assert error_of(single, "test", "nothing") is None


def test_what_is_no_better_is_called_so(tmp_path):
    result = read_sweep_folder(write_sweep(tmp_path / "s")).result
    summary = summarise(result.sweep, result.finished)
    same = compared(summary.single, summary.single, "test", "mean", True)
    assert same[1] == "plain" and "no better than" in same[0] and "may be chance" in same[0]
    worse = compared(summary.single, summary.chosen, "test", "mean", True)
    assert worse[1] == "bad" and "worse than" in worse[0]
    assert compared(summary.single, summary.chosen, "test", "mean", False)[1] == "good"  # a loss


def test_a_sweep_that_is_not_finished_says_so(tmp_path, dare):
    seen = []

    def first(cell):
        seen.append(cell)
        return len(seen) <= 12

    folder = write_sweep(tmp_path / "s", keep=first)
    page = sweep_page(folder)
    assert page.state.startswith(f"12 of {len(seen)} cells are done")
    assert "Not finished:" in html_of(page)
    done = dare("report", folder)
    assert done.code == 0 and f"not finished: 12 of {len(seen)}" in done.err


def test_failed_cells_are_named_and_lines_that_a_kill_cut_short_are_not(tmp_path):
    error = "NaN in 3 tensors"
    folder = write_sweep(
        tmp_path / "s", change=lambda cell, one: failed(error) if cell.at.get("merge") == "TIES" else one
    )
    with (folder / "cells.jsonl").open("a") as file:
        file.write('{"kind": "grid", "at"')
    page = sweep_page(folder)
    assert any(note.startswith("Failed: merge=TIES") and error in note for note in page.notes)
    [every] = [table for table in tables(page) if table.title.startswith("Every setting")]
    assert any("failed" in cell for row in every.rows for cell in row)
    assert "failed" in page.numbers[-1].note
    everything = write_sweep(tmp_path / "all", change=lambda cell, one: failed(error))
    page = sweep_page(everything)
    assert page.verdict.startswith("All ") and page.tone == "bad" and html_of(page)


def test_a_cell_that_failed_and_was_run_again_counts_once(tmp_path):
    folder = write_sweep(tmp_path / "s", change=lambda cell, one: failed("out of memory"))
    assert len(read_sweep_folder(folder).result.failed) == len(read_sweep_folder(folder).result.finished)
    write_sweep(folder)
    again = read_sweep_folder(folder)
    assert not again.result.failed and not again.missing


def test_a_sweep_without_any_cell(tmp_path):
    page = sweep_page(write_sweep(tmp_path / "s", keep=lambda cell: False))
    assert page.verdict == "No cell is finished yet." and page.state.startswith("0 of ")
    assert read(html_of(page))


def test_a_sweep_of_very_many_panels(tmp_path):
    axes = {"sparsify.drop_rate": [0, 0.5], "parameters.lambda": [i / 10 for i in range(1, 3)],
            "models.0.parameters.weight": [i / 10 for i in range(1, 31)]}  # fmt: skip
    page = sweep_page(write_sweep(tmp_path / "s", {**SWEEP, "axes": axes, "seeds": [1]}))
    [curves] = [plot for plot in plots(page) if plot.title.startswith("Scores over")]
    assert len(curves.views[0].panels) == 24 and "24 of 30 panels are drawn" in curves.how


def test_a_sweep_of_one_cell(tmp_path):
    one = {**SWEEP, "axes": {"sparsify.drop_rate": [0]}, "seeds": []}
    page = sweep_page(write_sweep(tmp_path / "s", one))
    assert page.verdict.startswith("Validation chooses")
    assert read(html_of(page))


def test_a_sweep_without_validation_chooses_nothing(tmp_path):
    page = sweep_page(write_sweep(tmp_path / "s", {**SWEEP, "validation": None} | {"validation": SWEEP["test"]}))
    assert page.verdict.startswith("Validation chooses")
    only = {key: value for key, value in SWEEP.items() if key != "validation"}
    page = sweep_page(write_sweep(tmp_path / "t", only))
    assert "nothing is chosen" in page.verdict.lower() and "too optimistic" in " ".join(page.details)
    only = {key: value for key, value in SWEEP.items() if key != "test"}
    page = sweep_page(write_sweep(tmp_path / "u", only))
    assert "too optimistic" in " ".join(page.details) and "on validation" in page.verdict


def test_a_score_that_is_not_there_yet_does_not_stop_the_page(tmp_path):
    judged = {split: {**SWEEP[split], "own": {"python": "judge.py:score"}} for split in ("validation", "test")}
    page = sweep_page(write_sweep(tmp_path / "s", {**SWEEP, **judged, "choose": "own/never"}))
    assert any("never" in note for note in page.notes) and page.verdict.startswith("Validation chooses")


def test_cells_of_a_method_that_is_not_registered_here(tmp_path):
    folder = write_sweep(tmp_path / "s")
    for name in ("cells.jsonl", "sweep.json"):
        path = folder / name
        path.write_text(path.read_text().replace('"merge_method": "ties"', '"merge_method": "mine_alone"'))
    html = html_of(sweep_page(folder))
    assert "merge_method: mine_alone" in "".join(text for _, text, _ in data_in(html)["copies"])


def test_a_record_that_is_none(tmp_path):
    folder = write_sweep(tmp_path / "s")
    for text in ("{", "[]", '{"format": "darekit-sweep-9"}', "null"):
        (folder / "sweep.json").write_text(text)
        with pytest.raises(OutputError, match="not a record of a sweep"):
            dk.report(folder)


# --- evaluations


def test_an_evaluation_says_who_is_best(tmp_path):
    page = evaluation_page(write_evaluation(tmp_path / "e"))
    assert page.verdict == "Clearly best: merged in sums/exact_match." and page.tone == "good"
    [table] = tables(page)
    assert table.rows[2][1] == "0.8000 ± 0.0100 *" and "*" not in table.rows[1][1]
    assert dict(page.facts) == {"models": "base, math, merged", "data": "sums.jsonl", "at most": "20"}
    page = evaluation_page(write_evaluation(tmp_path / "f", stderr=0.4))
    assert page.verdict == "In no score is one model clearly best."


def test_an_evaluation_that_is_not_finished_or_failed(tmp_path):
    page = evaluation_page(write_evaluation(tmp_path / "e", done=1))
    assert page.state.startswith("1 of 3 models are judged; math and merged")
    page = evaluation_page(write_evaluation(tmp_path / "f", errors={"math": "no tokenizer"}))
    assert "Failed: math: no tokenizer" in page.notes and tables(page)[0].rows[1][1] == "failed"
    page = evaluation_page(write_evaluation(tmp_path / "g", done=0))
    assert page.verdict == "No model has a score." and read(html_of(page))


def test_an_evaluation_of_an_earlier_version(tmp_path):
    folder = write_evaluation(tmp_path / "e")
    (folder / "asked.json").unlink()
    page = evaluation_page(folder)
    assert dict(page.facts)["judged by"] == "sums/exact_match, sums/loss" and not tables(page)[0].copies
    (folder / "comparison.json").unlink()
    assert evaluation_page(folder).verdict.startswith("Clearly best: merged")
    (folder / "evaluations.jsonl").write_text("")
    with pytest.raises(OutputError, match="no finished evaluation"):
        evaluation_page(folder)


def test_evaluate_writes_what_its_page_needs(tmp_path, monkeypatch, request):
    pytest.importorskip("torch")
    family = request.getfixturevalue("examples_family")
    monkeypatch.chdir(family)

    def sure(live):
        return {"sure": {"value": 0.5, "stderr": 0.1}}

    dk.evaluate(["base", "recipe.yaml"], judge=sure, device="cpu", out=tmp_path / "e")
    page = evaluation_page(tmp_path / "e")
    assert dict(page.facts)["judge"].endswith("sure") and tables(page)[0].rows[1][1] == "0.5000 ± 0.1000"
    text = tables(page)[0].copies[1].text
    assert "drop_rate: 0.9" in text and "keep_dense" in text


# --- inspections


def test_an_inspection_is_read_as_it_was_written(llamas, tmp_path):
    for models in (("m0",), ("m0", "m1"), ("base",)):
        found = inspect(llamas.path / "base", *(llamas.path / name for name in models))
        folder = tmp_path / "-".join(models)
        write_inspection(found, folder)
        again = read_inspection(folder)
        if len(models) == 1:
            assert again == found
        else:
            assert again.models == found.models and again.interference.pairs == found.interference.pairs
            assert again.interference.tensors == found.interference.tensors
            assert again.interference.total.pairs == found.interference.total.pairs
        assert read(html_of(inspection_page(folder)))


def test_a_base_of_zeros_has_no_finite_r(tmp_path, llamas):
    import numpy as np

    base = {name: np.zeros_like(array) if "q_proj" in name else array for name, array in llamas.base.items()}
    families.save(tmp_path / "base", base, families.config())
    write_inspection(inspect(tmp_path / "base", llamas.path / "m0"), tmp_path / "plots")
    assert "Infinity" not in (tmp_path / "plots" / RECORD).read_text()
    assert math.inf in [one.r for one in read_inspection(tmp_path / "plots").tensors]
    html = html_of(inspection_page(tmp_path / "plots"))
    assert all(finite(figure) for figure in data_in(html)["figures"])


def test_shares_of_the_change(llamas):
    import numpy as np

    found = inspect(llamas.path / "base", llamas.path / "m0")
    delta = {n: llamas.models[0][n].astype(np.float64) - llamas.base[n].astype(np.float64) for n in llamas.base}
    squares = {name: float((one**2).sum()) for name, one in delta.items()}
    shares = shares_of(found)
    assert sum(shares.values()) == pytest.approx(1)
    for tensor in found.tensors:
        assert shares[tensor.name] == pytest.approx(squares[tensor.name] / sum(squares.values()), rel=1e-4)


def test_many_experts_share_a_row_and_many_tensors_a_limit(llamas, tmp_path):
    """As of 256 experts in each of 20 layers: the page stays one that can be read, and sent."""
    found = inspect(llamas.path / "base", llamas.path / "m0")
    [one] = [tensor for tensor in found.tensors if tensor.name.endswith("layers.0.mlp.up_proj.weight")]
    experts = tuple(
        replace(one, name=f"model.layers.{layer}.mlp.experts.{k}.up_proj.weight", r=0.01 + k / 1e4 + layer / 1e6)
        for layer in range(20) for k in range(256)
    )  # fmt: skip
    write_inspection(replace(found, tensors=(*found.tensors, *experts)), tmp_path)
    page = inspection_page(tmp_path)
    figure = plots(page)[0].views[0].panels[0][1]
    assert "mlp.experts.*.up_proj" in figure["data"][0]["y"] and len(figure["data"][0]["y"]) < 20
    row = figure["data"][0]["y"].index("mlp.experts.*.up_proj")
    cell = figure["data"][0]["customdata"][row][3]
    assert cell.copy.text == "model.layers.3.mlp.experts.255.up_proj.weight" and "largest of 256 tensors" in cell.says
    [table] = [one for one in tables(page) if "tensors" in one.title]
    assert len(table.rows) == 2000 and table.title.startswith("The 2,000 of 5,141 tensors that moved most")
    assert len(html_of(page).encode()) < 8_000_000


def test_an_inspection_of_several_models_shows_how_they_pull(inspected):
    page = inspection_page(inspected)
    titles = [plot.title for plot in plots(page)]
    assert titles == ["r of every tensor", "Share of the change", "Sizes of the deltas", "Do they pull the same way?",
                      "Interference by layer"]  # fmt: skip
    assert [view.label for view in plots(page)[-1].views][:2] == [
        "signs that conflict, %",
        "size that a sum cancels, %",
    ]
    copies = data_in(html_of(page))["copies"]
    assert {what for *_, what in copies} == {"name"} and any("q_proj" in text for _, text, _ in copies)


# --- searches


def test_a_search_says_its_verdict_first(tmp_path):
    page = search_page(write_search(tmp_path / "s", 40))
    assert page.title == "abilities" and page.verdict.startswith("The best recipe is better")
    assert page.tone == "good" and page.state == ""
    titles = [plot.title for plot in plots(page)]
    assert titles == ["Scores over trials", "Differences rung by rung", "Importance", "Slices", "Parallel coordinates",
                      "Over depth", "By group of tensors"]  # fmt: skip
    facts = dict(page.facts)
    assert facts["math's weight, 4 points over depth"] == facts["chat's weight, attention, mlp"] == "0.0 to 2.0"
    assert facts["eps"] == "0.0001 to 1.0, log scale" and facts["rungs"] == "11 %, 33 %, 100 % of the items"
    # lambda decides in these folders, so it is the first setting that is shown.
    assert plots(page)[3].views[0].label == "lambda"


def test_several_goals_have_a_front(tmp_path):
    page = search_page(write_search(tmp_path / "s", 40, ("math/acc", "chat/acc")))
    [front] = [plot for plot in plots(page) if plot.title == "Pareto front"]
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    [trace] = [t for t in front.views[0].panels[0][1]["data"] if t["name"] == "front"]
    assert sorted(zip(trace["x"], trace["y"], strict=True)) == sorted(
        (one["validation"]["math/acc"]["value"], one["validation"]["chat/acc"]["value"]) for one in summary["front"]
    )
    assert all(len(plot.views) > 1 for plot in plots(page) if plot.title in ("Scores over trials", "Importance"))


def test_a_search_that_goes_on(tmp_path, dare):
    folder = write_search(tmp_path / "s", 12, finished=False)
    with (folder / "trials.jsonl").open("a") as file:
        file.write('{"kind": "trial", "tri')
    page = search_page(folder)
    assert page.state.startswith("12 trials so far, and no summary.json")
    lines = (folder / "trials.jsonl").read_text().splitlines(keepends=True)
    write_search(folder, 8)
    with (folder / "trials.jsonl").open("a") as file:
        file.writelines(lines[13:17])
    assert search_page(folder).state.startswith("12 trials so far, and summary.json knows 8 of them")
    write_search(folder, 12, finished=False)
    (folder / "summary.json").unlink()
    page = search_page(folder)
    assert page.verdict.startswith("Best so far on validation: trial ")
    assert dare("report", folder).code == 0


def test_a_search_without_trials(tmp_path):
    page = search_page(write_search(tmp_path / "s", 0))
    assert read(html_of(page)) and not plots(page)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "search.json").write_text('{"format": "darekit-search-1"}')
    assert search_page(tmp_path / "t").verdict == "No trial is complete yet."
    for text in ("{}", "[", "[1]", '{"format": "darekit-search-9"}'):
        (tmp_path / "t" / "search.json").write_text(text)
        with pytest.raises(OutputError, match=r"search\.json is not what `dare search` writes"):
            search_page(tmp_path / "t")


def test_failed_and_broken_trials(tmp_path):
    def spoil(lines):
        lines[-1] |= {"state": "failed", "error": "NaN in q_proj", "scores": {}, "rungs": []}
        lines[-2]["feasible"] = False
        lines[-2]["state"] = "complete"
        lines[-3]["scores"] = {"mean": {"value": None, "stderr": None, "higher_is_better": True, "items": None}}

    page = search_page(write_search(tmp_path / "s", 20, change=spoil))
    assert "Failed: trial 19: NaN in q_proj" in page.notes
    [every] = [table for table in tables(page) if table.title.startswith("Every trial")]
    assert every.rows[-1][1] == "failed" and "breaks a constraint" in every.rows[-2][1]
    names = [key.name for key in plots(page)[0].views[0].keys]
    assert "breaks a constraint" in names
    html = html_of(page)
    assert all(finite(figure) for figure in data_in(html)["figures"])


def test_the_last_line_of_a_trial_counts(tmp_path):
    def twice(lines):
        again = json.loads(json.dumps(lines[-1]))
        again["scores"]["mean"]["value"] = 0.123
        lines.append(again)

    page = search_page(write_search(tmp_path / "s", 10, change=twice))
    [every] = [table for table in tables(page) if table.title.startswith("Every trial")]
    assert len(every.rows) == 10 and every.rows[-1][2].startswith("0.123")


def test_a_line_that_is_no_trial(tmp_path):
    folder = write_search(tmp_path / "s", 3)
    (folder / "trials.jsonl").write_text("[1]\n")
    with pytest.raises(OutputError, match=r"trials\.jsonl line 1 is not a trial"):
        dk.report(folder)


def test_three_hundred_trials_are_quick_and_small(tmp_path):
    folder = write_search(tmp_path / "s")
    dk.report(write_search(tmp_path / "warm", 20))  # imports are not what is measured
    begin = time.process_time()
    written = dk.report(folder)
    assert time.process_time() - begin < 5  # of this process: others may be busy
    assert written.page.stat().st_size < 8_000_000


def test_importance_finds_what_decides(tmp_path):
    pytest.importorskip("optuna")
    from darekit.reports.importance import importance_of
    from darekit.reports.search_folder import read_search_folder

    read = read_search_folder(write_search(tmp_path / "s", 120))
    found, measure = importance_of(read.trials, read.space, read.goals[0])
    assert next(iter(found)) == "parameters.lambda" and measure in ("fANOVA", "PED-ANOVA")
    assert found["parameters.lambda"] > 0.3 and found["parameters.eps"] < 0.1
    few, why = importance_of(read.trials[:3], read.space, read.goals[0])
    assert not few and "at least 8 trials" in why


# --- the command and the function


def test_the_command_writes_a_page(tmp_path, dare, monkeypatch):
    folder = write_sweep(tmp_path / "s")
    done = dare("report", folder)
    assert done.code == 0 and done.out.startswith(f"Wrote {folder / 'report.html'}: ") and "MB" in done.out
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or False)
    done = dare("report", folder, "--open", "--out", tmp_path / "deep" / "page.html", "--json")
    assert opened == [(tmp_path / "deep" / "page.html").as_uri()]
    assert done.data["page"].endswith("page.html") and done.data["figures"] == [] and "no browser" in done.err
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["page.html"]


def test_figures_for_papers(tmp_path, dare, inspected):
    pytest.importorskip("matplotlib")
    folders = {
        write_sweep(tmp_path / "s"): {"test", "validation"},
        write_evaluation(tmp_path / "e"): {"scores"},
        inspected: {"r", "deltas", "pairs", "conflict"},
        write_search(tmp_path / "q", 15): {"trials", "trials-slices"},
    }
    for folder, names in folders.items():
        into = tmp_path / "figures" / folder.name
        done = dare("report", folder, "--figures", into, "--out", tmp_path / "x.html")
        assert done.code == 0, done.err
        assert {path.name for path in into.iterdir()} == {f"{n}.{kind}" for n in names for kind in ("png", "svg")}
        assert all(path.stat().st_size > 2000 for path in into.iterdir())


def test_a_folder_of_something_else(tmp_path, dare):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").touch()
    done = dare("report", tmp_path / "weights")
    assert done.code == 1 and "holds model.safetensors; expected one of: " in done.err
    for kind in KINDS:
        assert f"`{kind.command}`" in " ".join(done.err.split())
    (tmp_path / "empty").mkdir()
    assert "holds nothing; expected" in dare("report", tmp_path / "empty").err
    assert "does not exist" in dare("report", tmp_path / "nowhere").err
    sweep = write_sweep(tmp_path / "s")
    (tmp_path / "s.yaml").touch()
    for name in (sweep / "sweep.json", tmp_path / "s.yaml"):
        done = dare("report", name)
        assert done.code == 1 and "is a file" in done.err and f": {sweep}, perhaps" in " ".join(done.err.split())
    (tmp_path / "old").mkdir()
    for name in ("r.png", "deltas.png"):
        (tmp_path / "old" / name).touch()
    assert "earlier version: run it again" in " ".join(dare("report", tmp_path / "old").err.split())
    write_evaluation(sweep)
    assert "results of `dare sweep` and `dare eval --out`" in " ".join(dare("report", sweep).err.split())


def test_a_page_that_cannot_be_written(tmp_path, dare):
    folder = write_sweep(tmp_path / "s")
    assert "is a folder; name a file" in " ".join(dare("report", folder, "--out", tmp_path).err.split())
    (tmp_path / "file").touch()
    done = dare("report", folder, "--out", tmp_path / "file" / "page.html")
    assert done.code == 1 and "cannot write" in done.err


def test_plotly_is_an_extra(tmp_path, monkeypatch):
    folder = write_sweep(tmp_path / "s")
    monkeypatch.setattr("darekit.reports.markup.find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"pip install 'darekit\[report\]'"):
        dk.report(folder)
    assert not (folder / "report.html").exists()


def test_a_page_is_replaced_whole(tmp_path):
    folder = write_sweep(tmp_path / "s")
    first = dk.report(folder).page.read_bytes()
    assert dk.report(folder).page.read_bytes() == first  # the same folder, the same bytes
    assert not [path for path in folder.iterdir() if "darekit-part" in path.name]


# --- recipes as text


@pytest.mark.parametrize(
    "recipe",
    [
        {"base_model": "b", "models": ["x"], "merge_method": "task_arithmetic"},
        {"base_model": "b", "models": [{"model": "x", "parameters": {"weight": 0.5}}, "y"], "merge_method": "ties",
         "parameters": {"keep": 0.2, "lambda": [0.1, 1.0]},
         "sparsify": {"method": "dare", "drop_rate": 0.9, "seed": 7, "keep_dense": ["norms"]}},
        {"models": ["x", "y"], "merge_method": "linear", "vocab": "pad", "dtype": "float16"},
        {"base_model": "b", "models": ["x: y", "- z", "it's"], "merge_method": "sce"},
    ],
)  # fmt: skip
def test_short_recipes_mean_the_same(recipe):
    import yaml

    whole = read_recipe(recipe)
    text = recipe_text(whole.to_data())
    assert read_recipe(yaml.safe_load(text)) == whole
    assert len(text.splitlines()) < 20 and "vocab: strict" not in text


# --- in a notebook


def test_objects_show_themselves(llamas, tmp_path):
    data = families.recipe(llamas.path)
    recipe = read_recipe(data)
    for one in (recipe, dk.plan(data)):
        html = one._repr_html_()
        found = read(html)
        assert "task_arithmetic" in html and not any(tag == "script" for tag, _ in found.tags)
        assert len(html) < 10_000
    told = {"model": "a", "parameters": {"weight": [0.5, 1.18284]}}
    shown = {"base_model": "b", "models": [told, "c"], "merge_method": "task_arithmetic", "parameters": {"lambda": 0.8},
             "sparsify": {"method": "dare", "drop_rate": [{"filter": "*mlp*", "value": 0.3}]}}  # fmt: skip
    html = read_recipe(shown)._repr_html_()
    assert "a (weight 0.5, 1.183 over depth); c<" in html
    assert "dare, drop rate by filter<" in html and "task_arithmetic, lambda 0.8<" in html
    many = {**SWEEP, "seeds": [1, 2, 3]}
    html = read_sweep_folder(write_sweep(tmp_path / "s", many)).result._repr_html_()
    assert read(html) and "more rows" in html and "dk.report(" in html and "±" in html
    spoiled = read_recipe({"base_model": "b", "models": [HOSTILE], "merge_method": "task_arithmetic"})
    assert not any(tag in ("img", "script", "b") for tag, _ in read(spoiled._repr_html_()).tags)
    html = evaluation_comparison(tmp_path)._repr_html_()
    assert read(html) and "0.8000 ± 0.0100" in html


def evaluation_comparison(folder):
    from darekit.evaluation.folders import read_evaluation_folder

    return read_evaluation_folder(write_evaluation(folder / "e")).comparison


# --- what is read off a plot


def test_labels_beside_uprights_do_not_reach_the_next_one():
    told = [_brief(value) for value in (0.0001116, 0.861, 12.0, -0.25)]
    assert told == [f"1.1e{MINUS}4", "0.861", "12", f"{MINUS}0.25"]
    assert _shortened("task_arithmetic") == "task_arithme…" and _shortened("linear") == "linear"


def test_legends_have_lines_as_they_are_drawn(tmp_path):
    page = search_page(write_search(tmp_path / "s", 30))
    seen = 0
    for plot in (part for section in page.sections for part in section.parts if isinstance(part, Plot)):
        for view in plot.views:
            lines = {one["name"]: one["line"]["dash"] for _, figure in view.panels for one in figure["data"]
                     if "dash" in one.get("line", {})}  # fmt: skip
            for key in view.keys:
                if key.joined and key.name in lines:
                    seen += key.solid
                    assert lines[key.name] == ("solid" if key.solid else LOOKS[key.look][1]), (plot.title, key)
    assert seen


def test_a_figure_of_a_search_has_whole_trials_and_the_best_to_the_end(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plotting, "save", lambda figure, stem: kept.append(figure) or (stem, stem))
    draw_search([(0, 0.5, True), (1, 0.7, True), (2, 0.2, False), (3, 0.1, False)], [("base", 0.1)], [], "mean", True,
                tmp_path, "trials")  # fmt: skip
    axes = kept[0].axes[0]
    best = next(line for line in axes.get_lines() if line.get_label() == "best so far")
    assert [*best.get_xdata()] == [0, 1, 3] and [*best.get_ydata()] == [0.5, 0.7, 0.7]
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
