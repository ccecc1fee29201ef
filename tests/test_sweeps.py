"""Sweeps: the strict file, the grid and what is added to it, cells against merges on disk, resuming, choosing."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import darekit as dk
from darekit.errors import DarekitError, OutputError, RecipeError
from darekit.evaluation.judges import judge_of
from darekit.evaluation.scores import difference
from darekit.live.models import open_live
from darekit.recipe.essence import essence
from darekit.sweeps.effects import difference_of
from darekit.sweeps.grid import cells_of
from darekit.sweeps.reading import read_sweep
from darekit.sweeps.reports import short_tables
from darekit.sweeps.store import CELLS
from darekit.sweeps.summaries import figure_of, summarise, title_of

torch = pytest.importorskip("torch")
llama = pytest.mark.parametrize("real", ["llama"], indirect=True)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """These compare bits with what transformers computes there; where there is a GPU it would be taken."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# Judges in a file, as a user would write them. Each call leaves a line behind.
JUDGES = """
import os
import torch
from pathlib import Path

CALLS = Path(os.environ["CALLS"])

def said(live):
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        return float(live.model(input_ids=ids).logits.double().square().sum())

def total(live):
    with CALLS.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    return {"total": said(live)}

def minus(live):
    return {"total": -said(live)}

def fails(live):
    if said(live) != said(live) or live.model.model.embed_tokens.weight.double().sum() != FIRST:
        raise ValueError("not this one")
    return 1.0

def lost(live):
    from darekit.evaluation.scores import Score

    return {"lost": Score(said(live), None, False)}

def never(live):
    return float("nan")
"""


def recipe(path, k=1, **changes):
    return {
        "base_model": str(path / "base"),
        "models": [str(path / f"m{i}") for i in range(k)],
        "sparsify": {"method": "dare", "drop_rate": 0.5},
        "merge_method": "task_arithmetic",
        **changes,
    }


@pytest.fixture
def place(real, tmp_path, monkeypatch):
    """A folder with the judges; `sweep(**changes)`: a sweep as data, `calls()`: how often they were asked."""
    (tmp_path / "judges.py").write_text(JUDGES)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))

    class Place:
        path, models = tmp_path, real.path

        @staticmethod
        def sweep(function="total", k=1, **changes):
            return {
                "recipe": recipe(real.path, k),
                "axes": {"sparsify.drop_rate": [0, 0.5]},
                "test": {"all": {"python": f"{tmp_path / 'judges.py'}:{function}"}},
                **changes,
            }

        @staticmethod
        def calls():
            return len((tmp_path / "calls").read_text().splitlines()) if (tmp_path / "calls").exists() else 0

    return Place()


def lines(out):
    return [json.loads(line) for line in (out / CELLS).read_text().splitlines()]


# --- the file


START = "recipe: r.yaml\ntest: {a: {data: a.jsonl}}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty; a sweep needs"),
        ("recipe: r.yaml\naxes: {sparsify.drop_rate: [0]}\n", "no judges; add"),
        (START, "no axes"),
        (f"{START}axis: {{}}\n", r"line 3: axis is not known; did you mean 'axes'\?"),
        (f"{START}seed: [1]\n", r"write seeds: \[1\]"),
        (f"{START}models: [a]\n", "belongs to the recipe"),
        (f"{START}sparsify.drop_rate: [0, 1]\n", "write it under `axes:`"),
        (f"{START}axes: {{seed: [1, 2]}}\n", r"is not an axis.*seeds: \[1, 2\]"),
        (f"{START}axes: {{sparsify.drop_rate: 0.5}}\n", "expected a list of values"),
        (f"{START}axes: {{sparsify.drop_rate: [0.5, 0.5]}}\n", "is given twice"),
        (f"{START}axes: {{m: {{one: [1]}}}}\n", "expected settings"),
        (f"{START}axes: {{m: {{one: {{judges: b}}}}}}\n", "names 'b'; known: a"),
        (f"{START}axes: {{p: [1]}}\nseeds: [1, 1]\n", "a seed twice"),
        (f"{START}axes: {{p: [1]}}\nseeds: [-1]\n", "whole numbers"),
        (f"{START}axes: {{p: [1]}}\nplot: {{x: q}}\n", "'q' is not an axis"),
        ("recipe: r.yaml\naxes: {p: [1]}\ntest: {data: a.jsonl}\n", "give this judge a name"),
        ("recipe: r.yaml\naxes: {p: [1]}\ntest: [a]\n", "expected names with their judges"),
    ],
)
def test_files_that_are_no_sweep(tmp_path, text, says):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(RecipeError, match=says):
        read_sweep(tmp_path / "s.yaml")


def test_a_cell_that_is_no_recipe_is_named():
    data = {"recipe": recipe(Path("x")), "axes": {"sparsify.drop_rat": [0.5]}, "test": {"a": {"data": "a"}}}
    with pytest.raises(RecipeError, match=r"cell sparsify.drop_rat=0.5: .*did you mean 'drop_rate'\?"):
        cells_of(read_sweep(data))


# --- the grid


def cells(axes, k=1, seeds=(), **changes):
    data = {"recipe": recipe(Path("x"), k, **changes), "axes": axes, "seeds": list(seeds)}
    return cells_of(read_sweep(data | {"test": {"a": {"data": "a"}, "b": {"data": "b"}}}))


def test_every_combination_with_seeds_only_where_something_is_drawn():
    axes = {"method": {"DARE": None, "magnitude": {"sparsify.method": "magnitude"}}, "sparsify.drop_rate": [0, 0.9]}
    found, notes = cells(axes, seeds=(1, 2))
    assert [(c.at["method"], c.at["sparsify.drop_rate"], c.seed) for c in found if c.kind == "grid"] == [
        ("DARE", 0, None), ("DARE", 0.9, 1), ("DARE", 0.9, 2), ("magnitude", 0, None), ("magnitude", 0.9, None)
    ]  # fmt: skip
    assert [c.kind for c in found if c.kind != "grid"] == ["base"]  # at p = 0 the only model is there already
    assert notes == ("1 cell was added with the base alone",)
    seeds = [c.recipe.sparsify.seed for c in found if c.seed]
    assert seeds == [1, 2]


def test_drop_rate_0_and_the_models_alone_are_always_there():
    found, notes = cells({"sparsify.drop_rate": [0.5], "parameters.lambda": [0.5, 1]}, k=2)
    assert [c.at["sparsify.drop_rate"] for c in found if c.kind == "grid"] == [0, 0, 0.5, 0.5]
    assert [c.recipe.models[0].model for c in found if c.kind == "single"] == ["x/m0", "x/m1"]
    assert any("drop rate 0 was added" in note for note in notes)
    assert "2 cells were added with one of the models alone" in notes


def test_without_a_drop_rate_axis_the_undropped_cells_are_added():
    found, _ = cells({"parameters.lambda": [0.5, 1]}, k=2)
    undropped = [c for c in found if c.kind == "undropped"]
    assert [c.at for c in undropped] == [{"parameters.lambda": 0.5}, {"parameters.lambda": 1}]
    assert all(c.recipe.sparsify is None for c in undropped)
    assert [c.title for c in undropped] == [f"parameters.lambda={x} (nothing dropped)" for x in (0.5, 1)]


def test_what_is_added_undropped_for_several_names_bears_none_of_them():
    methods = {"DARE": None, "magnitude": {"sparsify.method": "magnitude"}}
    found, _ = cells({"method": methods, "parameters.lambda": [0.5, 1]}, k=2)
    assert [c.at for c in found if c.kind == "undropped"] == [{"parameters.lambda": 0.5}, {"parameters.lambda": 1}]


def test_a_name_can_fix_or_take_away_an_axis():
    axes = {
        "merge": {
            "task arithmetic": None,
            "average": {"merge_method": "linear", "parameters.lambda": None},
            "TIES": {"merge_method": "ties", "parameters.keep": 0.2, "parameters.lambda": 1.5},
            "no drop": {"sparsify": None},
        },
        "parameters.lambda": [0.5, 1],
        "sparsify.drop_rate": [0, 0.3],
    }
    found, _ = cells(axes, k=2)
    grid = [c for c in found if c.kind == "grid"]
    count = {name: sum(c.at["merge"] == name for c in grid) for name in axes["merge"]}
    assert count == {"task arithmetic": 4, "average": 2, "TIES": 2, "no drop": 2}
    assert {c.recipe.parameters.get("lambda") for c in grid if c.at["merge"] == "TIES"} == {1.5}
    assert all("parameters.lambda" not in c.at for c in grid if c.at["merge"] == "average")
    assert all(c.recipe.sparsify is None for c in grid if c.at["merge"] == "no drop")


def test_each_model_by_its_own_judge():
    axes = {"model": {"one": {"judges": "a"}, "two": {"models.0.model": "x/m1", "judges": ["b"]}}}
    found, _ = cells(axes)
    assert {(c.recipe.models[0].model, c.judges) for c in found if c.kind == "grid"} == {
        ("x/m0", ("a",)), ("x/m1", ("b",))
    }  # fmt: skip
    assert {c.judges for c in found if c.kind == "base"} == {("a",), ("b",)}


def test_what_comes_to_the_same_has_one_essence():
    def essences(**changes):
        return essence(dk.read_recipe(recipe(Path("x"), **changes))).to_data()

    same = [
        essences(sparsify=s, merge_method=m)
        for s, m in (
            ({"method": "dare", "drop_rate": 0, "seed": 5}, "task_arithmetic"),
            ({"method": "magnitude", "drop_rate": 0.0}, "ties"),
            (None, "linear"),
            ({"method": "drop_only", "drop_rate": 0, "on": "weights"}, "linear"),
        )
    ]
    assert all(one == same[0] for one in same)
    other = [
        essences(parameters={"lambda": 0.5}),
        essences(sparsify={"method": "dare", "drop_rate": 0.1}),
        essences(sparsify={"method": "dare", "drop_rate": 0.1, "seed": 1}),
        essences(sparsify={"method": "dare", "drop_rate": [{"filter": "mlp", "value": 0.1}, {"value": 0}]}),
    ]
    assert len({json.dumps(one) for one in (same[0], *other)}) == 5


# --- running


@llama
def test_a_cell_is_what_a_merge_on_disk_is(real, place):
    data = place.sweep(k=2, axes={"sparsify.drop_rate": [0.5], "parameters.lambda": [0.7]}, seeds=[3])
    result = dk.sweep(data, place.path / "out")
    (cell,) = [one for one in result.finished if one.cell.kind == "grid" and one.cell.seed == 3]
    dk.merge(data["recipe"], place.path / "merged", seed=3, settings={"parameters.lambda": 0.7})
    loaded = real.cls.from_pretrained(place.path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = loaded(input_ids=torch.arange(3, 19).reshape(2, 8)).logits.double().square().sum()
    assert cell.outcome.scores["test"]["all/total"]["value"] == float(expected)
    singles = {one.cell.recipe.models[0].model: one.outcome for one in result.finished if one.cell.kind == "single"}
    assert {*singles} == {str(real.path / "m0"), str(real.path / "m1")}


@llama
def test_one_model_in_memory_and_equal_cells_once(real, place, monkeypatch):
    from darekit.trials import models as running

    built, real_build = [], running.build
    monkeypatch.setattr(running, "build", lambda *a, **k: built.append(1) or real_build(*a, **k))
    axes = {
        "method": {"DARE": None, "DropOnly": {"sparsify.method": "drop_only"}},
        "sparsify.drop_rate": [0, 0.5, 0.9],
    }
    result = dk.sweep(place.sweep(axes=axes, seeds=[1, 2]), place.path / "out")
    assert len(result.finished) == 11 and len(lines(place.path / "out")) == 11
    assert place.calls() == 10  # p = 0 of both methods is one model
    assert len(built) == 1
    zero = [one.outcome.scores for one in result.finished if one.cell.at.get("sparsify.drop_rate") == 0]
    assert len(zero) == 2 and zero[0] == zero[1]
    assert {p.name for p in (place.path / "out").iterdir()} == {
        CELLS, "sweep.json", "tables.md", "summary.json", "test.png", "test.svg"
    }  # fmt: skip


@llama
def test_a_run_goes_on_where_it_was_killed(real, place):
    data, out = place.sweep(axes={"sparsify.drop_rate": [0, 0.3, 0.6, 0.9]}), place.path / "out"
    dk.sweep(data, out)
    first, calls = (out / CELLS).read_bytes(), place.calls()
    kept = first.splitlines(keepends=True)[:2]
    (out / CELLS).write_bytes(b"".join(kept) + b'{"kind": "grid", "at": {"spars')
    result = dk.sweep(data, out)
    assert place.calls() == calls + 3
    assert any("dropped an incomplete last line" in note for note in result.notes) and any(
        "2 evaluations of 5" in n for n in result.notes
    )
    again = (out / CELLS).read_bytes().splitlines(keepends=True)
    assert again[:2] == kept

    def facts(raw):
        return sorted(json.dumps(json.loads(line) | {"seconds": 0}) for line in raw.splitlines())

    assert facts((out / CELLS).read_bytes()) == facts(first)
    dk.sweep(data, out)
    assert place.calls() == calls + 3


@llama
def test_changed_recipes_models_and_judges_are_evaluated_anew(real, place):
    import shutil

    shutil.copytree(real.path / "m0", place.path / "model")
    data = place.sweep(recipe=recipe(real.path) | {"models": [str(place.path / "model")]})
    out = place.path / "out"
    dk.sweep(data, out)
    calls = place.calls()
    dk.sweep(data | {"axes": {"sparsify.drop_rate": [0, 0.5, 0.6]}}, out)
    assert place.calls() == calls + 1  # one more value, the others stay
    shutil.copyfile(real.path / "m1" / "model.safetensors", place.path / "model" / "model.safetensors")
    dk.sweep(data, out, overwrite=True)  # one value less
    assert place.calls() == calls + 3  # the base is the same as before
    (place.path / "judges.py").write_text(JUDGES + "\n# changed\n")
    dk.sweep(data, out)
    assert place.calls() == calls + 6


@llama
def test_failures_are_kept_and_stop_nothing(real, place, dare):
    base = real.cls.from_pretrained(real.path / "base")
    first = base.model.embed_tokens.weight.detach().double().sum().item()
    (place.path / "judges.py").write_text(f"FIRST = {first}\n" + JUDGES)
    data = place.sweep("fails", axes={"sparsify.drop_rate": [0, 1]})
    result = dk.sweep(data, place.path / "out")
    assert [one.outcome.status for one in result.finished] == ["failed", "ok", "ok"]
    assert "ValueError: not this one" in result.failed[0].outcome.error
    assert [line["status"] for line in lines(place.path / "out")] == ["failed", "ok", "ok"]
    assert json.loads((place.path / "out" / "summary.json").read_text())["failed"]

    (place.path / "never.yaml").write_text(json.dumps(place.sweep("never")))
    done = dare("sweep", place.path / "never.yaml", place.path / "nan", "--json")
    assert done.code == 1 and all("nan" in one["error"] for one in done.data["failed"])
    assert all(line["status"] == "failed" for line in lines(place.path / "nan"))


@llama
def test_settings_are_chosen_on_validation_and_reported_on_test(real, place):
    judge = str(place.path / "judges.py")
    data = place.sweep(
        axes={"method": {"DARE": None, "scaled": {"parameters.lambda": 3}}, "sparsify.drop_rate": [0, 0.5, 0.9]},
        validation={"all": {"python": f"{judge}:minus"}},
        seeds=[1, 2],
    )
    result = dk.sweep(data, place.path / "out")
    summary = summarise(result.sweep, result.finished)
    grid = [row for row in summary.rows if row.kind == "grid"]
    validation = [row.scores["validation"]["all/total"].mean for row in grid]
    test = [row.scores["test"]["all/total"].mean for row in grid]
    assert grid.index(summary.chosen) == validation.index(max(validation)) != test.index(max(test))
    assert [row.at["method"] for row in summary.by_name] == ["DARE", "scaled"]
    dare = next(row for row in grid if row.at == {"method": "DARE", "sparsify.drop_rate": 0.9})
    values = [one.outcome.scores["test"]["all/total"]["value"] for one in result.finished if one.cell.at == dare.at]
    statistic = dare.scores["test"]["all/total"]
    assert statistic.mean == pytest.approx(sum(values) / 2)
    assert statistic.deviation == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert "Chosen by all/total on validation" in (place.path / "out" / "tables.md").read_text()
    assert summary.single.at == {"method": "DARE", "sparsify.drop_rate": 0}  # at lambda 3 it is no model of ours
    assert figure_of(result.sweep, summary, "test").panels[0].levels  # the base is there to compare with


@llama
def test_judges_that_point_two_ways_are_said_first_and_all_shown(real, place):
    """Exact match and a perplexity have no mean: which counts is the user's to say."""
    judges = {name: {"python": f"{place.path / 'judges.py'}:{name}"} for name in ("total", "lost")}
    told = []
    result = dk.sweep(place.sweep(validation=judges, test=judges), place.path / "out", plots=False, say=told.append)
    (line,) = [line for line in told if "choose:" in line]
    assert "settings are compared by total/total alone" in line
    assert "total/total (higher is better), lost/lost (lower is better)" in line
    summary = summarise(result.sweep, result.finished)
    assert summary.unlike == line and summary.abilities == ("total/total", "lost/lost") and "mean" not in summary.scores
    chosen, total, lost = short_tables(result.sweep, summary)
    heads = [f"{score}, {split}" for split in ("validation", "test") for score in summary.abilities]
    assert list(chosen.header) == ["", "setting", *heads]
    assert [total.title, lost.title] == ["total/total on test", "lost/lost on test"]
    page = (place.path / "out/tables.md").read_text()
    assert 0 < page.index("settings are compared by total/total alone") < page.index("## Chosen by")
    again = []  # who chooses hears nothing of it
    asked = place.sweep(validation=judges, test=judges, choose="lost/lost")
    chosen = dk.sweep(asked, place.path / "out", plots=False, overwrite=True, say=again.append)
    assert not any("choose:" in line for line in again)
    found = summarise(chosen.sweep, chosen.finished)
    assert (found.unlike, found.score, found.higher) == ("", "lost/lost", False)
    assert found.abilities == ("lost/lost", "total/total")


@llama
def test_a_score_that_no_judge_gives_is_told_by_the_first_cell_and_can_be_corrected(real, place):
    file = place.path / "judges.py"
    judges = {name: {"python": f"{file}:{name}"} for name in ("total", "lost")}
    both = {"validation": judges, "test": judges}
    out = place.path / "out"
    for changes, says in (
        (
            {"choose": "total/totl"},
            r"choose: 'total/totl' is not a score; did you mean 'total/total'\? There are: total",
        ),
        (
            {"choose": "mean"},
            r"choose: there is no mean of total/total \(higher is better\), lost/lost \(lower is bett",
        ),
        (
            {"choose": "total/total", "plot": {"score": "lost/los"}},
            r"plot.score: 'lost/los' is not a score; did you mean",
        ),
    ):
        with pytest.raises(RecipeError, match=says):
            dk.sweep(place.sweep(**both, **changes), out, plots=False)
        assert place.calls() == 2, "one cell, by the judges of both splits; and found on disk from then on"
    result = dk.sweep(place.sweep(**both, choose="total/total"), out, plots=False)
    assert len({one.digest for one in result.finished}) * 2 == place.calls()  # the first cell was kept


@llama
def test_a_score_of_the_test_judges_alone_chooses_nothing(real, place):
    file = place.path / "judges.py"
    data = place.sweep(
        validation={"all": {"python": f"{file}:total"}}, test={"all": {"python": f"{file}:lost"}}, choose="all/lost"
    )
    with pytest.raises(RecipeError, match="choose: 'all/lost' is not a score; there are: all/total"):
        dk.sweep(data, place.path / "out", plots=False)


@llama
def test_tables_call_a_models_setting_by_its_name(real, place):
    """Files keep the dotted key; where an axis is about other models from cell to cell, so do headings."""
    weights = {"models.1.parameters.weight": [0.5, 1]}
    result = dk.sweep(place.sweep(k=2, axes=weights), place.path / "out", plots=False)
    page = (place.path / "out" / "tables.md").read_text()
    assert "m1's weight 0.5" in page and "models.1" not in page
    assert "m1's weight 1" in [row.title for row in summarise(result.sweep, result.finished).rows]
    rows = json.loads((place.path / "out" / "summary.json").read_text())["rows"]
    assert {"models.1.parameters.weight": 0.5} in [row["at"] for row in rows]
    assert figure_of(result.sweep, summarise(result.sweep, result.finished), "test").across == "m1's weight"
    assert title_of("models.1.model", ["m0", "m1"]) == "models.1.model"
    assert title_of("models.1.parameters.weight") == "models.1.parameters.weight"


@llama
def test_the_tables_of_a_fixed_drop_rate_show_the_grid_beside_what_was_added(real, place):
    data, out = place.sweep(k=2, axes={"parameters.lambda": [0.5, 1]}), place.path / "out"
    result = dk.sweep(data, out, plots=False)
    values = {
        (one.cell.kind, one.cell.at["parameters.lambda"]): one.outcome.scores["test"]["all/total"]["value"]
        for one in result.finished
        if one.cell.at
    }
    assert len({*values.values()}) == 4
    table = (out / "tables.md").read_text().partition("## Every")[0].splitlines()
    crossed = {line.split("|")[1].strip(): line.split("|")[2:4] for line in table if line.startswith("|")}
    for label, kind in (("", "grid"), ("nothing dropped", "undropped")):
        shown = [float(text) for text in crossed[label]]
        assert shown == pytest.approx([values[kind, 0.5], values[kind, 1]], rel=1e-3)
    titles = [row.title for row in summarise(result.sweep, result.finished).rows]
    assert titles[:4] == ["lambda 0.5", "lambda 1", "lambda 0.5, nothing dropped", "lambda 1, nothing dropped"]


# --- whose folder it is


@llama
def test_a_folder_of_another_sweep_is_refused(real, place, dare):
    data, out = place.sweep(axes={"sparsify.drop_rate": [0, 0.5]}), place.path / "out"
    dk.sweep(data, out)
    calls, before = place.calls(), {path.name: path.read_bytes() for path in out.iterdir()}
    other = data | {"recipe": recipe(real.path) | {"models": [str(real.path / "m1")]}}
    name = re.escape(str(real.path / "m0"))
    for changed, says in (
        (other, rf"2 of its 3 finished cells are not in this one, the first: .*models.0.model is {name} there"),
        (data | {"axes": {"sparsify.drop_rate": [0]}}, r"1 of its 3 finished .*sparsify.drop_rate=0.5"),
        (place.sweep("minus"), r"test.all: .*judges.py:total.* there, .*judges.py:minus.* here"),
    ):
        with pytest.raises(OutputError, match=rf"(?s)holds the results of another sweep.*{says}.*--overwrite"):
            dk.sweep(changed, out)
    with pytest.raises(OutputError, match="dtype: not given there, float64 here"):
        dk.sweep(data, out, dtype="float64")
    assert place.calls() == calls and {path.name: path.read_bytes() for path in out.iterdir()} == before

    (place.path / "s.yaml").write_text(json.dumps(other))
    for dry in ((), ("--dry-run",)):
        done = dare("sweep", place.path / "s.yaml", out, *dry)
        assert done.code == 1 and "results of another sweep, sweep:" in done.err
    assert dare("sweep", place.path / "s.yaml", out, "--overwrite", "--no-plots").code == 0
    assert place.calls() == calls + 2  # the base was there
    assert {path.name for path in out.iterdir()} == {CELLS, "sweep.json", "tables.md", "summary.json"}  # no old plots
    dk.sweep(data, out, overwrite=True)
    assert place.calls() == calls + 2  # nor was anything of the first lost


@llama
def test_a_sweep_may_grow_and_may_mend_what_came_to_nothing(real, place):
    out = place.path / "out"
    dk.sweep(place.sweep("never"), out, plots=False)
    data = place.sweep()
    dk.sweep(data, out, plots=False)
    calls = place.calls()
    judge = data["test"]["all"]
    grown = place.sweep(
        axes={"sparsify.drop_rate": [0, 0.5, 0.9]},
        seeds=[0, 1],
        test={"all": judge, "more": judge},
        plot={"title": "T"},
    )
    dk.sweep(place.sweep(axes=grown["axes"], seeds=[0, 1]), out, plots=False)
    assert place.calls() == calls + 3
    dk.sweep(grown, out, plots=False)
    with pytest.raises(OutputError, match="another sweep"):
        dk.sweep(data, out, plots=False)


@llama
def test_folders_without_a_record(real, place):
    out = place.path / "out"
    dk.sweep(place.sweep(), out, plots=False)
    (out / "sweep.json").unlink()
    with pytest.raises(OutputError, match=r"3 finished cells of another sweep, whose sweep\.json is missing"):
        dk.sweep(place.sweep("minus"), out, plots=False)
    calls = place.calls()
    dk.sweep(place.sweep(), out, plots=False)
    assert place.calls() == calls and (out / "sweep.json").exists()
    (out / "sweep.json").write_text("[]")
    with pytest.raises(OutputError, match="is not a record of a sweep"):
        dk.sweep(place.sweep(), out, plots=False)
    mine = place.path / "mine"
    mine.mkdir()
    (mine / "summary.json").write_text("{}")
    with pytest.raises(OutputError, match=r"holds summary\.json, which no sweep wrote"):
        dk.sweep(place.sweep(), mine)
    assert [path.name for path in mine.iterdir()] == ["summary.json"]
    (mine / "search.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds the results of `dare search`"):
            dk.sweep(place.sweep(), mine, overwrite=overwrite)
    assert (mine / "summary.json").read_text() == "{}"


@llama
def test_changed_modules_of_a_judge_are_seen(real, place, monkeypatch):
    (place.path / "judges.py").write_text(JUDGES.replace("import os\n", "import os\nimport helping\n", 1))
    (place.path / "helping.py").write_text("import deep.inner\n")
    (place.path / "deep").mkdir()
    (place.path / "deep" / "__init__.py").write_text("")
    (place.path / "deep" / "inner.py").write_text("")
    (place.path / "unrelated.py").write_text("")
    data, out = place.sweep(), place.path / "out"
    for change, more in (("judges.py", 3), ("unrelated.py", 0), ("helping.py", 3), ("deep/inner.py", 3)):
        before = place.calls()
        with (place.path / change).open("a") as file:
            file.write("# changed\n")
        dk.sweep(data, out, plots=False)
        assert place.calls() == before + more, change


@pytest.mark.parametrize("real", ["llama"], indirect=True)
def test_changed_statistics_are_seen(real, place):
    files = {}
    for name in ("m0", "m1"):
        files[name] = place.path / f"{name}.fisher.safetensors"
        _fisher(real.path / name, files[name], 1.0)
    models = [{"model": str(real.path / name), "stats": str(file)} for name, file in files.items()]
    data = place.sweep(
        recipe={"base_model": str(real.path / "base"), "models": models, "merge_method": "fisher"},
        axes={"parameters.minimal": [1e-9]},
    )
    out = place.path / "out"
    first = dk.sweep(data, out, plots=False)
    calls = place.calls()
    dk.sweep(data, out, plots=False)
    assert place.calls() == calls and not first.failed
    _fisher(real.path / "m1", files["m1"], 3.0)
    second = dk.sweep(data, out, plots=False)
    assert place.calls() == calls + 1
    scores = [result.finished[0].outcome.scores["test"]["all/total"]["value"] for result in (first, second)]
    assert scores[0] != scores[1]
    with pytest.raises(DarekitError, match=r"there is no statistics file 'nosuch.safetensors'"):
        dk.sweep(data | {"axes": {"models.0.stats": ["nosuch.safetensors"]}}, place.path / "other")


def _fisher(model, path, value):
    """A Fisher of that model with the same value everywhere."""
    from darekit.checkpoints import open_checkpoint, sample_digest
    from darekit.inputs.statistics import FISHER, FORMAT, write_statistics

    checkpoint = open_checkpoint(str(model))
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    facts = {"format": FORMAT, "kind": FISHER, "model": str(model), "model_digest": sample_digest(checkpoint).hex(),
             "norm": 1.0, "mean": value}  # fmt: skip
    checkpoint.close()
    write_statistics(path, shapes, lambda name: np.full(shapes[name], value, np.float32), facts)


@llama
def test_processes_find_what_one_process_finds(real, place):
    data = place.sweep(axes={"sparsify.drop_rate": [0, 0.5, 0.9]})
    alone, both = dk.sweep(data, place.path / "one"), dk.sweep(data, place.path / "two", jobs=2)
    assert [one.outcome.scores for one in alone.finished] == [one.outcome.scores for one in both.finished]
    pids = (place.path / "calls").read_text().split()
    assert pids[:4] == [str(os.getpid())] * 4 and len({*pids[4:]}) == 2


@llama
def test_an_interrupted_command_keeps_what_it_finished(real, place, dare, monkeypatch):
    from darekit.trials import models as running

    (place.path / "s.yaml").write_text(json.dumps(place.sweep(axes={"sparsify.drop_rate": [0, 0.3, 0.6, 0.9]})))
    real_check = running.checks.check

    def check(*arguments, **options):
        if place.calls() == 2:
            raise KeyboardInterrupt
        return real_check(*arguments, **options)

    monkeypatch.setattr(running.checks, "check", check)
    done = dare("sweep", place.path / "s.yaml", "--no-plots")
    assert (
        done.code == 130
        and "finished cells are in" in done.err
        and "run the same command again to continue" in done.err
    )
    kept = lines(place.path / "s")
    assert len(kept) == 2
    monkeypatch.undo()
    monkeypatch.setenv("CALLS", str(place.path / "calls"))
    assert dare("sweep", place.path / "s.yaml", "--no-plots").code == 0
    assert lines(place.path / "s")[:2] == kept and len(lines(place.path / "s")) == 5 == place.calls()


@llama
def test_mistakes_are_told_before_anything_runs(real, place, dare):
    out = place.path / "out"
    for changes, says in (
        ({"test": {"all": {"data": "nowhere.jsonl"}}}, r"test.all: .*nowhere.jsonl"),
        ({"recipe": recipe(real.path) | {"models": [str(real.path / "m9")]}}, "m9"),
        ({"choose": "speed"}, "choose: no judge gives 'speed'; under `test:` are: all"),
        ({"choose": "all"}, "choose: all is a judge; name one of its scores: all/"),
        ({"choose": "mean"}, "choose: there is one judge, so no mean; name one of its scores, or leave this out"),
        ({"choose": "relative min"}, "'relative min' is for a search: a sweep chooses by one score, or by mean"),
        ({"choose": "average"}, r"no judge gives 'average'; did you mean 'mean'\?"),
        ({"plot": {"score": "al/total"}}, r"plot.score: no judge gives 'al/total'; did you mean 'all'\?"),
        (
            {"test": {"all": {"data": "nowhere.jsonl"}}, "choose": "all/speed"},
            "all has no score 'speed'; all has: exact",
        ),
    ):
        with pytest.raises(DarekitError, match=says):
            dk.sweep(place.sweep(**changes), out)
    (place.path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        dk.sweep(place.sweep(), place.path / "file")
    (place.path / "other").mkdir()
    (place.path / "other" / CELLS).write_text('{"a": 1}\n')
    with pytest.raises(OutputError, match="line 1 is not a finished cell"):
        dk.sweep(place.sweep(), place.path / "other")
    assert dare("sweep", place.path / "none.yaml").code == 1


@llama
def test_a_dry_run_lists_the_cells(real, place, dare):
    (place.path / "s.yaml").write_text(json.dumps(place.sweep(axes={"sparsify.drop_rate": [0.5]}, k=2)))
    done = dare("sweep", place.path / "s.yaml", "--dry-run", "--json")
    assert done.code == 0 and done.data["evaluations"] == 5 and len(done.data["cells"]) == 5
    assert place.calls() == 0 and not (place.path / "s").exists()
    shown = dare("sweep", place.path / "s.yaml", "--dry-run")
    assert "5 cells, 5 evaluations" in shown.out and "drop rate 0 was added" in shown.out


@llama
def test_plots_are_the_same_for_the_same_data(real, place):
    pytest.importorskip("matplotlib")
    from darekit import plotting
    from darekit.sweeps.drawing import draw_sweep

    result = dk.sweep(place.sweep(axes={"sparsify.drop_rate": [0, 0.5, 0.9]}), place.path / "out")
    figure = figure_of(result.sweep, summarise(result.sweep, result.finished), "test")
    for path in draw_sweep(figure, place.path / "again"):
        assert path.read_bytes() == (place.path / "out" / f"test{path.suffix}").read_bytes()
    svg = (place.path / "again.svg").read_text()
    assert "drop rate p" in svg and "all/total on test" in svg and "<dc:date>" not in svg
    looks = [plotting.line_style(i) for i in range(7)]
    for key in ("color", "marker", "linestyle"):
        assert len({str(look[key]) for look in looks}) == 7


# --- settings compared row by row


@llama
def test_settings_are_compared_row_by_row(real, place):
    """By judges of data every cell keeps what each row did, and a resumed sweep finds it again."""
    for name, start in (("a", 0), ("b", 7)):
        rows = [{"prompt": f"w{3 + i % 60} w{4 + i % 50} ", "completion": f"w{5 + (i * 7) % 80}"} for i in range(40)]
        (place.path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[start:]))
    judges = {name: {"data": str(place.path / f"{name}.jsonl")} for name in ("a", "b")}
    asked = place.sweep(validation=judges, test=judges, seeds=[1, 2], choose="a/loss")
    first = dk.sweep(asked, place.path / "out", device="cpu", plots=False)
    data = json.loads((place.path / "out" / "summary.json").read_text())
    assert {one["split"] for one in data["differences"]} == {"validation", "test"}
    assert len(data["differences"]) == 2 * (len(data["rows"]) - 1)
    assert all(one["paired"] and one["stderr"] > 0 for one in data["differences"])
    # Of one cell against another, without seeds: what `Score` itself says of two models on the same rows.
    summary = summarise(first.sweep, first.finished)
    base = next(row for row in summary.rows if row.kind == "base")
    single = next(row for row in summary.rows if row.alone and row.kind != "base")
    judge = judge_of(judges["a"])
    scores = []
    for name in ("base", "m0"):
        with open_live(place.models / name, device="cpu") as live:
            scores.append(judge(live)["loss"])
    value, error = difference(scores[1], scores[0])
    found = difference_of(first.out, single, base, "test", "a/loss")
    assert found.value == pytest.approx(value, abs=1e-9) and found.stderr == pytest.approx(error, rel=1e-9)
    apart = math.hypot(*(score.stderr for score in scores))
    assert found.paired and found.stderr < apart
    # Where the rows are not known, errors add up.
    shutil.rmtree(first.out / "items")
    found = difference_of(first.out, single, base, "test", "a/loss")
    assert not found.paired and found.stderr == pytest.approx(apart)
    again = dk.sweep(asked, first.out, device="cpu", plots=False)
    assert [one.digest for one in again.finished] == [one.digest for one in first.finished]
