# SPDX-License-Identifier: Apache-2.0
"""The paper's experiments (paper/): every file is read and planned on a miniature family, and the page follows from
its results."""

import json
import re
import shlex
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAPER, PAGE = ROOT / "paper", ROOT / "docs" / "paper"
EXPERIMENTS = sorted((PAPER / "experiments").glob("*.yaml"))
pytest.importorskip("torch")
pytest.importorskip("tokenizers")

sys.path.insert(0, str(PAPER))
import claims  # noqa: E402
import commands  # noqa: E402
import lessons  # noqa: E402
import page  # noqa: E402
import rerun  # noqa: E402
import storage  # noqa: E402
import tasks  # noqa: E402
import training  # noqa: E402


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """All models, one step each, and the statistics that merges ask for."""
    from darekit import make_statistics

    path = tmp_path_factory.mktemp("paper")
    training.train_small(path)
    (path / "statistics").mkdir()
    for command in commands.commands("c"):
        if command.words[0] == "stats":
            _, kind, model, _, data, *_ = command.words
            make_statistics(kind, path / model, path / data, path / command.makes, limit=2)
    return path


def test_the_families_are_cached(work):
    line = training.miniature(training.LINES["w64"])
    for job in training.jobs_of("w64", line):
        assert training.is_trained(work, job, line), job
    assert not list(training.train_line(work, "w64", line))
    (job, *_) = training.jobs_of("w64", line)
    longer = training.Job(job.name, job.parent, job.lesson, training.Course(9, 2, 1e-3))
    assert not training.is_trained(work, longer, line)


def test_every_model_that_is_named_is_trained():
    names = set(training.names_of())
    for path in EXPERIMENTS:
        found = set(re.findall(r"\b(?:w\d+|encoder)/[\w-]+", path.read_text()))
        assert found and found <= names, path.name
    for command in commands.commands():
        assert {word for word in command.words if re.fullmatch(r"(w\d+|encoder)/[\w-]+", word)} <= names, command


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_cell_can_be_planned(path, work, monkeypatch):
    from darekit.planning.opening import open_plan
    from darekit.sweeps.grid import cells_of
    from darekit.sweeps.reading import read_sweep

    monkeypatch.chdir(work)
    sweep = read_sweep(path)
    cells, _ = cells_of(sweep)
    assert "test" in sweep.judges
    for split, judges in sweep.judges.items():
        for judge in judges.values():
            assert judge["data"].endswith(f".{split}.jsonl") and (work / judge["data"]).is_file()
    planned = set()
    for cell in cells:  # seeds and drop rates change no shape
        at = tuple((k, v) for k, v in cell.at.items() if k != claims.DROP_RATE and not k.startswith("parameters."))
        key = cell.kind, at
        if key not in planned:
            with open_plan(cell.recipe) as plan:
                assert plan.steps
        planned.add(key)
    assert 0 in {cell.at.get(claims.DROP_RATE, 0) for cell in cells}, "nothing dropped must be in the grid"


def test_all_experiments_run_and_all_runs_are_experiments():
    """Every file is run by one letter; every command is one that `dare` has, with options that it has."""
    from typer.main import get_command

    from darekit.cli import build_app

    named = [command.words[1] for command in commands.commands() if command.words[0] == "sweep"]
    assert sorted(Path(name).name for name in named) == [path.name for path in EXPERIMENTS]
    top = get_command(build_app())
    for command in commands.commands():
        if command.program != "dare":
            assert (PAPER / command.program).is_file()
            continue
        known, words = top, list(command.words)
        while hasattr(known, "commands"):
            known = known.commands[words.pop(0)]
        options = {option for parameter in known.params for option in parameter.opts}
        for word in words:
            assert not word.startswith("-") or word in options, shlex.join(command.words)


def test_commands_wait_for_what_they_read():
    """Models, statistics, recipes and packs are there before they are named; nothing else is trained."""
    run = rerun.Run(Path("work"), print)
    found = {task.name: task for task in rerun.tasks_of("cej", run, commands.TRAINING)}
    assert found["w64" if "w64" in found else "w32"].needs == frozenset() and "w64" not in found
    (three,) = [n for n, c in enumerate(commands.commands("cej")) if "EXPERIMENTS/c-three.yaml" in c.words]
    statistics = {
        f"c: statistics/{name}.{kind}.safetensors" for name in commands.DECODERS for kind in ("fisher", "gram")
    }
    assert found[f"c: {three}"].needs == {"w128", *statistics}
    shift = [n for n, c in enumerate(commands.commands("cej")) if c.result == "evaluations/shift"]
    judged, packs = (found[f"{letter}: {n}"] for letter, n in zip("ej", shift, strict=True))
    recipes = {commands.searched(w, "shift", p, seed) for w in (32, 128) for p in (0.9, 0.99) for seed in (1, 2, 3)}
    assert judged.needs >= {f"e: {recipe}" for recipe in recipes} and len(judged.needs - {"w32", "w128"}) == 12
    assert packs.needs == {"w128", "j: packs/shift"}
    assert not [name for name in tasks.chains(found.values()) if name not in found]


def test_the_longest_chain_begins_first_and_nothing_before_what_it_needs():
    order, lock = [], threading.Lock()

    def task(name, seconds, *needs):
        def run():
            with lock:
                assert set(needs) - {"elsewhere"} <= set(order)
                order.append(name)

        return tasks.Task(name, run, seconds, frozenset(needs))

    some = [task("short", 5), task("last", 20, "first"), task("first", 1), task("alone", 9, "elsewhere")]
    assert tasks.chains(some) == {"short": 5, "last": 20, "first": 21, "alone": 9}
    tasks.run_tasks(some, processes=1)
    assert order == ["first", "last", "alone", "short"]
    order.clear()
    tasks.run_tasks(some, processes=3)
    assert sorted(order) == ["alone", "first", "last", "short"]


def test_a_failed_task_ends_the_run():
    def fail():
        raise SystemExit("training w64 failed")

    with pytest.raises(SystemExit, match="w64"):
        tasks.run_tasks([tasks.Task("w64", fail, 1.0)], processes=2)


def test_packs_and_other_ways_are_stored_and_judged(work, monkeypatch):
    """Every way is a model that `dare eval` takes; what is exact scores as the model; fewer bits are fewer bits."""
    import darekit as dk

    monkeypatch.chdir(work)
    base, model, out = Path("w128/base"), Path("w128/shift"), Path("packs")
    out.mkdir(exist_ok=True)
    parameters = sum(tensor.numel() for tensor in storage.weights(base).values())
    sizes = {way.name: way.store(base, model, out / way.name) / parameters for way in storage.ways()}
    assert tuple(sizes) == storage.names()
    assert sizes["4-bit-p0.5-seed1.pack.safetensors"] < sizes["8-bit-dense.pack.safetensors"]
    assert sizes["rank-1"] < sizes["rank-2"]
    some = ["lossless.pack.safetensors", "rank-1", "magnitude-4-bit-p0.9.pack.safetensors", "magnitude-16-bit-p0.9"]
    models = [str(model), *(str(out / name) for name in some)]
    found = dk.evaluate(models, base=str(base), data="data/shift.test.jsonl", limit=4)
    whole, lossless = (one.scores["loss"].value for one in found.evaluations[:2])
    assert lossless == whole and len(found.evaluations) == 5 and not any(one.error for one in found.evaluations)


def test_packs_page_has_the_table_of_the_results():
    found = page.read_results(PAGE)["experiments"]["j"]
    entries = storage.entries_of(found, commands.DECODERS)
    text = (PAGE.parent / "packs.md").read_text()
    assert storage.with_table(text, storage.table(entries)) == text, "run `make paper ONLY=j`"
    with pytest.raises(KeyError):
        storage.entries_of({**found, "stored/shift": {}}, commands.DECODERS)


def test_no_word_is_in_two_splits():
    splits = {split: set(lessons.fixed_words(split, length=5)) for split in lessons.SHARES}
    assert not splits["test"] & splits["validation"] and not splits["test"] & splits["training"]
    for split, found in splits.items():
        assert len(found) == lessons.EXAMPLES[split] and {lessons.split_of(word) for word in found} == {split}
    import random

    seen = [next(lessons.tuning_examples(random.Random(i), "shift", length=5, replay=0.3)).word for i in range(50)]
    assert {lessons.split_of(word) for word in seen} == {"training"}


def rows_of(rates, scores, **at):
    return [
        {"kind": "grid", "at": {**at, claims.DROP_RATE: p}, "models": ["m"], "judges": ["shift"],
         "scores": {"test": {"shift/exact_match": [s, 0.01 if p else None, 3 if p else 1]}}}
        for p, s in zip(rates, scores, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kept", "outcome"),
    [((1, 1, 0.97, 0.5, 0.1), "held"), ((1, 1, 0.5, 0.3, 0.1), "partly held"), ((1, 0.2, 0.1, 0, 0), "failed")],
)
def test_a_rule_decides_by_numbers(kept, outcome):
    rows = [row for p, s in [(0.7, kept[1])] for row in rows_of([p], [s], method="DARE")]
    rows += rows_of((0, 0.5, 0.9, 0.95, 0.99), kept, method="DARE")
    results = {"experiments": {"a": {"sweeps/a-drop-rates": {"rows": rows}}}}
    assert claims.a_dare(results).outcome == outcome


def test_what_was_added_for_comparison_is_no_point_of_the_grid():
    """A sweep over k adds a cell with nothing dropped beside one k, whose score it must not change."""
    rows = rows_of([0.5], [0.2], k="3")
    del rows[0]["at"][claims.DROP_RATE]
    rows += [{**rows[0], "kind": "undropped", "scores": {"test": {"shift/exact_match": [1.0, None, 1]}}}]
    results = {"experiments": {"e": {"sweeps/e-rescale-90": {"rows": rows}}}}
    assert claims.sweep_of(results, "e-rescale-90").where(k="3").score() == pytest.approx(20)


def test_settings_are_chosen_on_validation_alone():
    """The setting with the best test score is not the one that is reported."""

    def row(p, factor, validation, test):
        at = {"method": "TIES", "dropped": "all tensors", "parameters.lambda": factor, claims.DROP_RATE: p}
        scores = {"validation": {"x/accuracy": [validation, None, 1]}, "test": {"x/accuracy": [test, None, 1]}}
        return {"kind": "grid", "at": at, "models": ["m", "n"], "judges": ["x"], "scores": scores}

    rows = [row(0, 1.0, 0.6, 0.5), row(0, 0.5, 0.5, 0.9), row(0.5, 1.0, 0.55, 0.7), row(0.9, 1.0, 0.7, 0.4),
            row(0.5, 0.5, 0.9, 0.3)]  # fmt: skip
    merge = claims.merge_of({"experiments": {"c": {"sweeps/c-two": {"rows": rows}}}}, "c-two", "TIES", "all tensors")
    assert (merge.without.test, merge.dropped.test, merge.free.test) == pytest.approx((50, 40, 30))
    assert (merge.without.rate, merge.dropped.rate, merge.free.rate) == (0, 0.9, 0.5)


def test_the_page_is_that_of_its_results(tmp_path):
    results = page.read_results(PAGE)
    assert page.render(results, PAGE) == (PAGE / "README.md").read_text(), "run `python paper/page.py`"
    page.write_page(results, tmp_path, runs=None)
    assert page.read_results(tmp_path) == results


def test_what_did_not_run_is_said(tmp_path):
    results = json.loads((PAGE / "results.json").read_text())
    results["experiments"]["a"] = {}
    results["failed"]["d"] = ["`dare sweep` ended with 1: because"]
    text = page.render(results, tmp_path)
    assert "Not in this run**: (a)" in text and "make paper ONLY=a" in text
    assert "Incomplete: `dare sweep` ended with 1: because" in text
    assert page.render({"settings": {}, "experiments": {}, "failed": {}}, tmp_path).startswith("# The paper")


def test_the_folder_is_small():
    files = [path for path in PAGE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
