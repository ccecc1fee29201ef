# SPDX-License-Identifier: Apache-2.0
"""Searches that run, with a judge that needs no model: what is written, resuming, several processes, verdicts."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from darekit.errors import DataError, OutputError, PlanError, RecipeError
from darekit.evaluation.items import Items
from darekit.evaluation.scores import Score
from darekit.pools.processes import open_processes
from darekit.searches import leases as leases_module
from darekit.searches import running
from darekit.searches.asking import FAILED, Answer, count_of, judged
from darekit.searches.folders import Folder
from darekit.searches.leases import FREE, HELD, ORPHAN, Leases
from darekit.searches.reading import read_search
from darekit.searches.sheets import Sheet
from darekit.searches.studies import Study
from darekit.trials import files

pytest.importorskip("optuna")

ITEMS = 90
OTHERS = ("cmaes", "random", "nsga2")


class Fake:
    """Judges a recipe by its numbers: it answers an item rightly if the item is easier than the recipe is good, with
    some luck. `calls`: a file that gets a line for each recipe."""

    def __init__(
        self, calls=None, slow=0.0, fail=None, whole=False, kill=None, noise=0.05, names=("a", "b"), plain=False
    ):
        self.calls, self.slow, self.fail, self.whole, self.kill, self.plain = calls, slow, fail, whole, kill, plain
        self.noise, self.names = noise, names

    @property
    def order(self):
        return self.names

    def __call__(self, task):
        began = time.perf_counter()
        if self.calls:
            with Path(self.calls).open("a") as file:
                file.write(f"{os.getpid()} {task.split} {json.dumps(dict(task.params))}\n")
        time.sleep(self.slow if task.params else 0)
        recipe = task.recipe.to_data()
        if self.kill and task.params and not Path(self.kill).exists():
            Path(self.kill).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fail is not None and task.params and self.fail(task.params):
            return Answer(FAILED, error="the model's loss is nan")
        return judged(self, recipe, task, began)

    def ask(self, recipe, before, share):
        items, sizes = {}, {}
        for name in () if self.whole else self.names:
            count = count_of(share, ITEMS)
            values = self.answers(recipe, name)[:count]
            items[f"{name}/exact_match"] = Items(values, np.ones(count))
            sizes[f"{name}/exact_match"] = ITEMS
        whole = {"w/loss": Score(1 - self.quality(recipe, "a"), 0.01, False)} if self.whole else {}
        if self.plain:  # the same, not item by item
            return Sheet({}, {name: one.score for name, one in items.items()}, {})
        return Sheet(items, whole, sizes)

    def answers(self, recipe, name):
        what = [name, recipe["merge_method"], recipe["parameters"], [one["parameters"] for one in recipe["models"]]]
        luck = np.random.default_rng([*json.dumps(what, sort_keys=True).encode()])
        hard = np.random.default_rng(len(name) + ord(name[0])).random(ITEMS)
        return (hard + self.noise * luck.normal(size=ITEMS) < self.quality(recipe, name)).astype(float)

    @staticmethod
    def quality(recipe, name):
        """Best at lambda 0.8 with weights 1; for b at lambda 0.3."""
        if recipe["merge_method"] == "linear":
            return 0.3
        scale = recipe["parameters"].get("lambda", 1.0)
        weights = [model["parameters"].get("weight", 1.0) for model in recipe["models"]]
        best = 0.8 if name == "a" else 0.3
        return 0.9 - 0.8 * abs(scale - best) - 0.1 * abs(sum(weights) - 2)


@pytest.fixture
def place(llamas, tmp_path, monkeypatch):
    """`search(**changes)` as data, and `run(data, out, fake, ...)`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.py").write_text("def score(live):\n    return 1.0\n")
    judge = {"python": "judge.py:score"}

    class Place:
        path = tmp_path

        @staticmethod
        def search(**changes):
            return {
                "recipe": {
                    "base_model": str(llamas.path / "base"),
                    "models": [str(llamas.path / "m0"), str(llamas.path / "m1")],
                    "merge_method": "task_arithmetic",
                },
                "space": {"parameters.lambda": {"low": 0.0, "high": 1.5}},
                "validation": {"a": judge, "b": judge},
                "test": {"a": judge, "b": judge},
                "trials": 12,
                "choose": "a",
                **changes,
            }

        @staticmethod
        def run(data, out="out", fake=None, jobs=1, **more):
            fake = fake or Fake()
            return running.run(
                read_search(data), tmp_path / out, make=lambda whole: partial(_itself, fake),
                pool=lambda work: open_processes(work, jobs), **more,
            )  # fmt: skip

    return Place()


class OtherTests(Fake):
    """On the test data there is one judge more, or scores have another name."""

    def __init__(self, more=(), metric="exact_match"):
        super().__init__()
        self.more, self.metric = more, metric

    def __call__(self, task):
        self.names = ("a", "b", *(self.more if task.split == "test" else ()))
        self.now = self.metric if task.split == "test" else "exact_match"
        return super().__call__(task)

    def ask(self, recipe, before, share):
        sheet = super().ask(recipe, before, share)
        items, sizes = ({name.replace("exact_match", self.now): value for name, value in one.items()}
                        for one in (sheet.items, sheet.sizes))  # fmt: skip
        return Sheet(items, sheet.whole, sizes)


def _itself(fake):
    return fake


def lines(out):
    return [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]


def trials(out):
    return [one for one in lines(out) if one["kind"] == "trial"]


# --- a whole search


def test_a_search_finds_what_is_best_and_says_what_it_beats(place):
    said, watched = [], []
    found = place.run(place.search(), say=said.append, watch=watched.append)
    summary = found.summary
    assert abs(summary["best"]["params"]["parameters.lambda"] - 0.8) < 0.15
    assert summary == json.loads((place.path / "out" / "summary.json").read_text())
    names = ["base", "single m0", "single m1", "average", "task arithmetic, 1/K", "task arithmetic"]
    assert [one["name"] for one in summary["baselines"]] == names
    assert [one["name"] for one in lines(found.out)[: len(names)]] == names  # first of all
    assert summary["best_plain"] == "task arithmetic"
    assert {one["role"] for one in summary["differences"]} == {"best single model", "best plain merge"}
    assert all(one["split"] == "test" for one in summary["differences"])
    assert summary["best"]["test"]["a/exact_match"]["items"] == ITEMS
    tested = [one["name"] for one in summary["baselines"] if one["test"]]
    assert tested == [summary["best_single"], "task arithmetic"]
    counts = summary["counts"]
    assert counts["trials"] == 12 == counts["complete"] + counts["stopped"] and counts["stopped"] > 3
    assert counts["saved"] > 0.2 and summary["test_looks"] == 1
    assert [one.phase for one in watched if one.fresh is None] == ["baselines", "search", *["test"] * 4]
    assert watched[-5].done == watched[-5].total == 12


def test_lines_hold_what_the_page_says(place):
    found = place.run(place.search(trials=6))
    for one in lines(found.out):
        assert {*one} == {
            "kind", "trial", "name", "state", "params", "recipe", "rungs", "scores", "feasible", "items", "digest",
            "seconds", "error", "warnings",
        }  # fmt: skip
        assert one["scores"] == one["rungs"][-1]["scores"] and one["items"] == one["rungs"][-1]["items"]
    stopped = [one for one in trials(found.out) if one["state"] == "stopped"]
    assert stopped and all(one["rungs"][-1]["share"] < 1 for one in stopped)
    for one in stopped:
        last = one["rungs"][-1]
        assert last["against"] is not None and last["differences"]["a/exact_match"]["value"] < 0
        assert one["items"] == 2 * count_of(last["share"] + 1e-4, ITEMS)
    assert [one["trial"] for one in trials(found.out)] == [*range(6)]


def test_the_same_seed_gives_the_same_search_and_another_one_another(place):
    def said(out):
        return [(one["params"], one["state"], one["scores"]) for one in trials(place.path / out)]

    for out, seed in (("one", 1), ("two", 1), ("three", 2)):
        place.run(place.search(sampler={"name": "tpe", "seed": seed}, trials=14), out)
    assert said("one") == said("two") != said("three")


def test_rounds_make_the_number_of_workers_indifferent(place):
    for out, jobs in (("one", 1), ("three", 3)):
        place.run(place.search(round=4, trials=14), out, jobs=jobs)
    first, second = (
        sorted(((o["trial"], o["params"], o["state"], o["scores"], o["rungs"]) for o in trials(place.path / out)),
               key=lambda one: one[0])
        for out in ("one", "three")
    )  # fmt: skip
    assert first == second and len(first) == 14


@pytest.mark.parametrize("sampler", ["tpe", "grid", *(pytest.param(one, marks=pytest.mark.check) for one in OTHERS)])
def test_every_sampler_searches(place, sampler):
    pytest.importorskip("cmaes")
    step = {"step": 0.5} if sampler == "grid" else {}
    space = {
        "parameters.lambda": {"low": 0, "high": 1.5, **step},
        "models.*.parameters.weight": {"low": 0.5, "high": 1.5, **step},
    }
    more = {"choose": ["a", "b"]} if sampler == "nsga2" else {"choose": "a"}
    found = place.run(place.search(space=space, sampler=sampler, trials=20 if sampler != "grid" else 1000, **more))
    assert found.summary["counts"]["trials"] == (36 if sampler == "grid" else 20)
    assert found.summary["best"] is not None
    if sampler == "grid":
        assert len({json.dumps(one["params"]) for one in trials(found.out)}) == 36
        assert found.summary["best"]["params"]["parameters.lambda"] == 1.0


def test_choices_that_come_to_the_same_are_judged_once(place):
    space = {
        "merge": {
            "one": {"parameters.lambda": 0.6},
            "other": {"parameters.lambda": 0.6},
            "more": {"parameters.lambda": 0.7},
        }
    }
    calls = place.path / "calls"
    found = place.run(place.search(space=space, sampler="grid", round=3), fake=Fake(calls=calls))
    counts = found.summary["counts"]
    assert counts["trials"] == 3 and counts["reused"] == 1
    assert sum("merge" in line for line in calls.read_text().splitlines() if "validation" in line) == 2


# --- goals and constraints


def test_several_goals_give_a_front(place):
    found = place.run(place.search(choose=["a", "b"], sampler="nsga2", trials=30))
    summary = found.summary
    front = summary["front"]
    assert len(front) >= 2 and summary["hypervolume"] > 0 and summary["verdict"][0].startswith("Best compromise: ")
    scores = [tuple(one["validation"][f"{n}/exact_match"]["value"] for n in "ab") for one in front]
    assert all(not (x[0] >= y[0] and x[1] >= y[1]) for x in scores for y in scores if x is not y)
    assert {one["score"] for one in summary["differences"]} == {"a/exact_match", "b/exact_match"}


def test_a_constraint_is_kept(place):
    """a is best at lambda 0.8 and b at 0.3: at least 0.6 of b leaves less of a."""
    free = place.run(place.search(trials=25), "free").summary["best"]
    bound = place.run(place.search(trials=25, at_least={"b": 0.62}), "bound").summary
    assert bound["best"]["validation"]["b/exact_match"]["value"] >= 0.62
    assert bound["best"]["validation"]["a/exact_match"]["value"] < free["validation"]["a/exact_match"]["value"]
    assert any(line.startswith("Constraint b at least 0.62: kept on validation, by ") for line in bound["verdict"])
    assert any(one["feasible"] is False for one in trials(place.path / "bound"))


def test_a_constraint_that_nobody_keeps_leaves_nothing_to_choose(place):
    found = place.run(place.search(trials=4, at_least={"b": 1.5}))
    assert found.summary["best"] is None and found.best is None and not (found.out / "best.yaml").exists()
    assert found.summary["verdict"][0] == (
        "Nothing was chosen: of 4 candidates and the baselines, none keeps the constraints."
    )


@pytest.mark.check
def test_a_constraint_on_a_share_of_a_model(place, llamas):
    found = place.run(place.search(trials=4, at_least={"b": "0.9 of m0"}))
    base = next(one for one in found.summary["baselines"] if one["name"] == "single m0")
    least = 0.9 * base["validation"]["b/exact_match"]["value"]
    assert found.summary["best"]["validation"]["b/exact_match"]["value"] >= least
    assert found.summary["question"]["constraints"] == [
        {"score": "b/exact_match", "bound": 0.9, "of": str(llamas.path / "m0"), "least": True}
    ]


def test_a_goal_that_is_no_score_lists_those_that_there_are(place):
    with pytest.raises(RecipeError, match=r"choose: a/exact_mach: 'a/exact_mach' is not a score; did you mean"):
        place.run(place.search(choose="a/exact_mach"))
    kept = (place.path / "out" / "trials.jsonl").read_text().splitlines()
    assert len(kept) == 2, "found by the first baseline, item by item and as a whole"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"choose": "a/exact_mach"},
            r"choose: a/exact_mach: 'a/exact_mach' is not a score; did you mean 'a/exact_match'",
        ),
        (
            {"at_least": {"b/los": 0.5}},
            r"search: at_least.b/los: 'b/los' is not a score; there are: a/exact_match, b/exac",
        ),
        ({"at_most": {"min": "0.9 of m1"}, "choose": {"mean": ["a", "b/acc"]}}, r"'b/acc' is not a score"),
    ],
)
def test_a_mistake_in_goals_is_told_by_the_first_baseline_and_can_be_corrected(place, change, says):
    calls = place.path / "calls"
    fake = Fake(calls=calls, plain=True)  # with a judge that is asked as a whole, once is enough to know
    with pytest.raises(RecipeError, match=says):
        place.run(place.search(**change), fake=fake)
    assert len(calls.read_text().splitlines()) == 1
    found = place.run(place.search(trials=2), fake=fake)  # the same folder
    assert found.summary["counts"]["trials"] == 2
    recipes = [json.dumps(one["recipe"]) for one in lines(found.out) if one["kind"] == "baseline"]
    assert len(recipes) == len({*recipes}), "what was judged before the mistake was found is not judged again"
    with pytest.raises(OutputError, match="choose: "):
        place.run(place.search(trials=2, choose="b"), fake=fake)  # now there are candidates, which followed it


@pytest.mark.parametrize("key", ["choose", "at_least"])
def test_shares_of_what_no_model_has_are_refused_before_the_plain_merges(place, key):
    class Nothing(Fake):
        @staticmethod
        def quality(recipe, name):
            return -1.0 if recipe["merge_method"] == "linear" and len(recipe["models"]) == 1 else 0.9

    change = {key: "relative mean" if key == "choose" else {"relative min": 0.9}}
    calls = place.path / "calls"
    with pytest.raises(
        RecipeError, match="no model alone has more than 0 in a/exact_match, so there is nothing to tak"
    ):
        place.run(place.search(**change), fake=Nothing(calls=calls))
    assert len(calls.read_text().splitlines()) == 3  # the base, and two models


def test_a_model_that_a_constraint_names_and_that_fails_is_told_before_the_plain_merges(place, llamas):
    class Broken(Fake):
        def __call__(self, task):
            data = task.recipe.to_data()
            broken = len(data["models"]) == 1 and data["models"][0]["model"].endswith("m1")
            return Answer(FAILED, error="not this one") if broken else super().__call__(task)

    with pytest.raises(RecipeError, match=r"search: at_least.b: .*m1 could not be judged"):
        place.run(place.search(at_least={"b": "0.9 of m1"}), fake=Broken())
    assert [one["name"] for one in lines(place.path / "out")] == ["base", "single m0", "single m1"]


def test_what_judges_never_give_is_refused_before_anything_is_judged(place):
    """Rows say which scores there are, also those of judges in judges, and those under `test:`."""
    (place.path / "a.jsonl").write_text('{"prompt": "w3", "completion": "w4"}\n')
    (place.path / "text.jsonl").write_text('{"text": "w3 w4 w5"}\n')
    rows, text = {"data": "a.jsonl"}, {"data": "text.jsonl"}
    both = {"one": rows, "two": text}
    for validation, test, choose, says in (
        (
            {"a": both},
            {"a": both},
            "a/two/exact_match",
            r"validation.a has no score 'two/exact_match'; did you mean 'one",
        ),
        ({"a": rows}, {"a": text}, "a/exact_match", r"test.a has no score 'exact_match'; a has: loss, perplexity"),
        ({"a": rows}, {"a": text}, {"min": ["a/loss", "a/exact_match"]}, r"test.a has no score 'exact_match'"),
    ):
        data = place.search(validation=validation, test=test, choose=choose)
        with pytest.raises(RecipeError, match=says):
            place.run(data)
        with pytest.raises(RecipeError, match=says):
            running.check_search(read_search(data), place.path / "out")
    assert not (place.path / "out").exists()


def test_lower_is_better_for_a_loss(place):
    judge = {"python": "judge.py:score"}
    data = place.search(choose="w", validation={"w": judge}, test={"w": judge}, trials=10)
    found = place.run(data, fake=Fake(whole=True, names=("w",)))
    assert abs(found.summary["best"]["params"]["parameters.lambda"] - 0.8) < 0.2
    assert found.summary["question"]["goals"] == [{"score": "w/loss", "higher_is_better": False}]


def test_the_least_of_several_is_a_goal(place):
    """a is best at lambda 0.8 and b at 0.3: their mean does not care where between, the least of them does."""
    found = place.run(place.search(choose="min", trials=25))
    best = found.summary["best"]
    assert abs(best["params"]["parameters.lambda"] - 0.55) < 0.1
    scores = best["validation"]
    both = [scores[f"{name}/exact_match"]["value"] for name in "ab"]
    assert scores["min"]["value"] == min(both)
    assert found.summary["question"]["goals"] == [{"score": "min", "higher_is_better": True}]
    told = ", ".join(f"{n}/exact_match {best['test'][f'{n}/exact_match']['value']:.3f}" for n in "ab")
    assert any(line.startswith("One by one on test: ") for line in found.summary["verdict"])
    assert told.split(",")[0] in " ".join(found.summary["verdict"])
    assert all("min" in one["scores"] for one in trials(found.out))
    assert all("min" in one["validation"] for one in found.summary["baselines"])


def test_relative_scores_are_shares_of_the_best_single_model(place):
    found = place.run(place.search(choose={"relative mean": ["a", "b"]}, trials=6))
    singles = [one["validation"] for one in found.summary["baselines"] if one["kind"] == "single"]
    units = [max(one[f"{name}/exact_match"]["value"] for one in singles) for name in "ab"]
    scores = found.summary["best"]["validation"]
    values = [scores[f"{name}/exact_match"]["value"] for name in "ab"]
    share = sum(value / unit for value, unit in zip(values, units, strict=True)) / 2
    assert scores["relative mean of a, b"]["value"] == pytest.approx(share, abs=1e-12)


def test_a_bound_may_be_about_the_least_of_all(place):
    found = place.run(place.search(choose="a", trials=25, at_least={"min": 0.62}))
    scores = found.summary["best"]["validation"]
    assert min(scores[f"{name}/exact_match"]["value"] for name in "ab") >= 0.62
    (told,) = [line for line in found.summary["verdict"] if line.startswith("Constraint min at least 0.62: ")]
    assert "kept on validation, by " in told and " on test, by " in told


# --- candidates that are asked first


WEIGHTS = "models.*.parameters.weight"


def test_the_recipe_as_written_and_ones_own_candidates_come_first(place):
    calls = place.path / "calls"
    data = place.search(
        trials=4, space={WEIGHTS: {"low": 0, "high": 1.5}, "parameters.lambda": {"low": 0, "high": 1.5}}
    )
    data["recipe"]["parameters"] = {"lambda": 0.7}
    data["try"] = [{"parameters.lambda": 0.8}, {WEIGHTS: 0.5, "models.0.parameters.weight": 1.2}]
    found = place.run(data, fake=Fake(calls=calls))
    first, second, third, _ = [one["params"] for one in trials(found.out)]
    assert first == {"models.0.parameters.weight": 1.0, "models.1.parameters.weight": 1.0, "parameters.lambda": 0.7}
    assert second == {**first, "parameters.lambda": 0.8}
    assert third == {**first, "models.0.parameters.weight": 1.2, "models.1.parameters.weight": 0.5}
    asked = [line for line in calls.read_text().splitlines() if "validation" in line and "lambda" in line]
    assert len(asked) == 3, "the recipe as written was judged already"
    roles = {one["role"]: one for one in found.summary["differences"]}
    assert roles["recipe as written"]["split"] == "test"  # also where something else is the best plain merge
    assert " the recipe as written" in " ".join(found.summary["verdict"])


def test_more_candidates_may_be_given_while_a_search_goes_on(place):
    data = place.search(trials=12)
    place.run(data)
    data["try"] = [{"parameters.lambda": 0.81}]
    found = place.run({**data, "trials": 14})
    assert [one["params"] for one in trials(found.out)][12] == {"parameters.lambda": 0.81}
    place.run({**data, "trials": 15})
    assert sum(one["params"] == {"parameters.lambda": 0.81} for one in trials(found.out)) == 1


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_sampler_that_learns_first_sees_the_whole_range(place, sampler):
    """Of the nine after the recipe as written each ninth of the range has one, and layers have one value."""
    place.run(place.search(trials=10, sampler=sampler, space={"parameters.lambda": {"low": 0, "high": 1.8}}))
    values = [one["params"]["parameters.lambda"] for one in trials(place.path / "out")]
    assert values[0] == 1.0
    ninths = sorted(int(value / 0.2) for value in values[1:])
    assert (ninths == [*range(9)]) == (sampler == "tpe")


# --- verdicts


def test_no_better_is_said_in_words(place):
    """The recipe's plain sum is as good as it gets: nothing can be better than it."""
    data = place.search(trials=3, space={"models.*.parameters.weight": {"low": 0.995, "high": 1.005}})
    found = place.run(data)
    head = found.summary["verdict"][0]
    assert ("no better than" in head and "as far as these data can tell" in head) or "Best: task arithmetic" in head
    assert not any(one["better"] for one in found.summary["differences"] if one["role"] == "best plain merge")


def test_a_baseline_that_nobody_beats_is_the_best(place):
    data = place.search(trials=3, space={"parameters.lambda": {"low": 0.0, "high": 0.2}})
    found = place.run(data)
    assert found.summary["best"]["trial"] is None and found.summary["best"]["name"] == "task arithmetic"
    assert found.summary["verdict"][0].startswith("None of 3 candidates beats ")
    assert "task arithmetic" in (found.out / "best.yaml").read_text()


@pytest.mark.parametrize(("quality", "choose"), [(-1.0, "a"), (-1.0, ["a", "b"]), (2.0, "mean")])
def test_scores_that_are_all_the_same_are_no_finding(place, quality, choose):
    class Same(Fake):
        @staticmethod
        def quality(recipe, name):
            return quality

    found = place.run(place.search(trials=3, choose=choose), fake=Same())
    head, held, why, *rest = found.summary["verdict"]
    value = "0.000" if quality < 0 else "1.000"
    assert head.startswith("Nothing was found: the scores do not tell 3 candidates and 6 baselines apart. All have ")
    assert head.endswith(f" {value} on validation.") and held == "best.yaml holds base, for want of a better one."
    assert ("Not even a model alone does anything right" in why) == (quality < 0)
    assert not any("beats" in line for line in rest)


def test_a_judge_that_stopped_candidates_does_tell_models_apart(place):
    """Equal baselines alone are what is left in full; the candidates were stopped because they are worse."""

    class Worse(Fake):
        @staticmethod
        def quality(recipe, name):
            return 0.0 if recipe.get("parameters", {}).get("lambda", 1) > 2 else 0.5

        def answers(self, recipe, name):
            return (np.arange(ITEMS) % 2 < 2 * self.quality(recipe, name)).astype(float)

    found = place.run(place.search(trials=6, space={"parameters.lambda": {"low": 3.0, "high": 4.0}}), fake=Worse())
    assert found.summary["counts"]["stopped"] > 0
    assert not any("Nothing was found" in line or "does not look" in line for line in found.summary["verdict"])
    assert found.summary["verdict"][0].startswith("None of 6 candidates beats ")


def test_candidates_that_are_all_the_same_are_said_to_be(place):
    class Fixed(Fake):
        @staticmethod
        def quality(recipe, name):
            return 0.3 if recipe["merge_method"] == "linear" else 0.7

        def answers(self, recipe, name):
            return (np.arange(ITEMS) < self.quality(recipe, name) * ITEMS).astype(float)

    words = place.run(place.search(trials=3), fake=Fixed()).summary["verdict"]
    assert any(
        line == "All candidates have a/exact_match 0.700: what was varied makes no difference." for line in words
    )
    words = place.run(place.search(trials=3), "other").summary["verdict"]
    assert not any("makes no difference" in line for line in words)


def test_without_test_judges_validation_is_said_to_flatter(place):
    data = place.search(trials=3)
    del data["test"]
    found = place.run(data)
    assert found.summary["best"]["test"] is None and all(
        o["split"] == "validation" for o in found.summary["differences"]
    )
    assert any("flatter" in line for line in found.summary["verdict"])


@pytest.mark.parametrize("choose", ["a", None])
def test_test_judges_that_validation_lacks_are_asked_too(place, choose):
    """They are reported, and no part of what is chosen by: also not of the mean."""
    judge = {"python": "judge.py:score"}
    data = place.search(choose=choose, trials=3, test={"a": judge, "b": judge, "more": judge})
    data = {key: value for key, value in data.items() if value is not None}
    found = place.run(data, fake=OtherTests(more=("more",)))
    tested = found.summary["best"]["test"]
    assert "more/exact_match" in tested
    if choose is None:
        both = [tested[f"{name}/exact_match"]["value"] for name in "ab"]
        assert tested["mean"]["value"] == pytest.approx(sum(both) / 2)
    assert all(one["split"] == "test" for one in found.summary["differences"])


def test_test_judges_that_name_their_scores_differently_are_no_traceback(place):
    found = place.run(place.search(trials=3), fake=OtherTests(metric="accuracy"))
    head, *rest = found.summary["verdict"]
    assert "Best on validation: " in head
    assert "The judges under `test:` give no a/exact_match, only a/accuracy" in " ".join(rest)
    assert all(one["split"] == "validation" for one in found.summary["differences"])


def test_the_test_data_are_asked_once_for_each_choice(place):
    calls = place.path / "calls"
    place.run(place.search(trials=6), fake=Fake(calls=calls))
    asked = calls.read_text().count(" test ")
    assert asked == 3
    place.run(place.search(trials=6), fake=Fake(calls=calls))
    assert calls.read_text().count(" test ") == asked  # nothing new was chosen
    found = place.run(place.search(trials=30), fake=Fake(calls=calls))
    looks = found.summary["test_looks"]
    assert looks == 1 or any(f"used for {looks} choices" in line for line in found.summary["verdict"])


# --- going on


def test_a_search_goes_on_where_it_was(place):
    place.run(place.search(trials=20), "whole")
    place.run(place.search(), "parts", trials=7)
    found = place.run(place.search(), "parts", trials=20)
    assert found.summary["counts"]["trials"] == 20
    first, second = (
        [(one["trial"], one["params"], one["state"]) for one in trials(place.path / out)] for out in ("whole", "parts")
    )
    assert first == second  # whether it was interrupted does not matter


def test_ctrl_c_ends_in_a_summary_and_goes_on(place):
    seen = []

    def watch(status):
        if status.phase == "search" and status.fresh is not None:
            seen.append(status.fresh)
            if len(seen) == 5:
                raise KeyboardInterrupt

    found = place.run(place.search(), watch=watch)
    assert found.interrupted and found.summary["counts"]["trials"] == 5 and found.summary["best"] is not None
    assert any("Interrupted after 5 candidates" in line for line in found.summary["verdict"])
    assert any("The test data have not been used yet" in line for line in found.summary["verdict"])
    again = place.run(place.search())
    assert not again.interrupted and again.summary["counts"]["trials"] == 12
    assert not [*(place.path / "out" / "leases").glob("trial-*")]


def test_a_choice_may_name_models_that_the_recipe_does_not(place, llamas):
    other = place.path / "other"
    shutil.copytree(llamas.path / "m1", other)
    data = place.search(space={"models.1.model": [str(llamas.path / "m1"), str(other)]}, trials=4, sampler="random")
    found = place.run(data)
    models = {one["recipe"]["models"][1]["model"] for one in trials(place.path / "out")}
    assert models == {str(llamas.path / "m1"), str(other)} and found.summary["counts"]["failed"] == 0
    record = json.loads((place.path / "out" / "search.json").read_text())
    assert str(other) in record["content of models"]


def test_a_time_limit_begins_nothing_new(place):
    found = place.run(place.search(trials=1000), fake=Fake(slow=0.05), seconds=0.6)
    assert 1 <= found.summary["counts"]["trials"] < 40 and not found.interrupted


def test_a_candidate_that_fails_stops_nothing(place):
    said = []
    found = place.run(place.search(), fake=Fake(fail=lambda params: params["parameters.lambda"] > 1), say=said.append)
    counts = found.summary["counts"]
    assert counts["failed"] > 0 and counts["trials"] == 12
    assert any("failed: the model's loss is nan" in line for line in said)
    assert all(one["error"] for one in trials(found.out) if one["state"] == "failed")
    first = next(one["trial"] for one in trials(found.out) if one["state"] == "failed")
    assert found.summary["verdict"][-1] == (
        f"{counts['failed']} candidates failed; the first, trial {first}: the model's loss is nan. "
        "trials.jsonl has each reason."
    )


def test_baselines_that_all_fail_are_an_error(place):
    class Broken(Fake):
        def __call__(self, task):
            return Answer(FAILED, error="no such head")

    with pytest.raises(DataError, match="no baseline could be judged; base: no such head"):
        place.run(place.search(), fake=Broken())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"space": {"parameters.lambda": {"low": 0, "high": 2}}},
            "space: .*lambda: high: 1.5 there, 2.0 here",
        ),
        ({"choose": "b"}, r'choose: \["a"\] there, \["b"\] here'),
        ({"rungs": [1]}, "rungs: "),
        ({"sampler": {"name": "tpe", "seed": 3}}, "sampler: "),
    ],
)
def test_a_folder_of_another_search_is_refused(place, change, says):
    place.run(place.search(trials=1))
    with pytest.raises(OutputError, match=rf"holds the results of another search:\n  {says}"):
        place.run(place.search(**change))


def test_a_folder_of_something_else_is_refused(place):
    (place.path / "out").mkdir()
    (place.path / "out" / "cells.jsonl").write_text("")
    with pytest.raises(OutputError, match=r"holds cells.jsonl, which is not of this search: choose another OUT"):
        place.run(place.search())
    (place.path / "model").mkdir()
    (place.path / "model" / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"model holds config.json, which is not of this search"):
        place.run(place.search(), "model")
    (place.path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        place.run(place.search(), "file")


def test_a_changed_judge_makes_another_search(place):
    place.run(place.search(trials=1))
    (place.path / "judge.py").write_text("def score(live):\n    return 2.0\n")
    with pytest.raises(OutputError, match="content of judges"):
        place.run(place.search())


def test_a_database_keeps_the_trials_of_several_searches(place):
    pytest.importorskip("sqlalchemy")
    url = f"sqlite:///{place.path / 'search.db'}"
    one = place.run(place.search(storage=url, trials=3), "one")
    other = place.run(place.search(storage=url, trials=4, choose="b"), "other")  # of the same name
    again = place.run(place.search(storage=url, trials=5), "one")
    assert [found.summary["counts"]["trials"] for found in (one, other, again)] == [3, 4, 5]
    assert (place.path / "search.db").exists() and not (place.path / "one" / "journal.log").exists()
    with pytest.raises(PlanError, match="search: storage: SQLAlchemy knows no database 'nosuch'"):
        place.run(place.search(storage="nosuch://x"), "none")
    assert not (place.path / "none").exists()


def test_a_line_cut_short_by_a_kill_spoils_nothing(place):
    place.run(place.search(trials=4))
    path = place.path / "out" / "trials.jsonl"
    with path.open("a") as file:
        file.write('{"kind": "trial", "trial": 99, "na')
    found = place.run(place.search(trials=6))
    assert found.summary["counts"]["trials"] == 6


# --- several workers and processes


def test_a_worker_that_dies_is_noticed_and_its_task_given_again(place):
    said = []
    found = place.run(place.search(), fake=Fake(kill=str(place.path / "killed")), jobs=2, say=said.append)
    assert (place.path / "killed").exists()
    assert found.summary["counts"]["trials"] == 12 and found.summary["counts"]["failed"] == 0
    assert any("a worker was lost: its process was killed by SIGKILL" in line for line in said)


SCRIPT = """
import sys
sys.path[:0] = {path!r}
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from darekit.pools.processes import open_processes
from darekit.searches import running
from darekit.searches.leases import Leases
from darekit.searches.reading import read_search
from test_search_runs import Fake, _itself
fake = Fake(slow={slow}, calls="calls-" + sys.argv[1])
found = running.run(
    read_search("s.yaml"), Path("out"), make=lambda whole: partial(_itself, fake),
    pool=lambda work: open_processes(work, 1), say=print,
    leases=partial(Leases, beat=0.2, dead=2.0),
)
print("FINISHED", found.summary["counts"]["trials"])
"""


@pytest.fixture
def process(place):
    """`start(name)`: a process of its own that works on out/; all are killed at the end."""
    (place.path / "s.yaml").write_text(json.dumps(place.search(trials=16)))
    (place.path / "run.py").write_text(
        textwrap.dedent(SCRIPT.format(path=[str(Path(__file__).parent)], slow=0.15)), encoding="utf-8"
    )
    started = []

    def start(name):
        with (place.path / f"log-{name}").open("w") as log:
            started.append(subprocess.Popen([sys.executable, "run.py", name], cwd=place.path, stdout=log, stderr=log))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def count_of_trials(place):
    path = place.path / "out" / "trials.jsonl"
    return len(trials(place.path / "out")) if path.exists() else 0


@pytest.mark.parametrize("at", ["work", pytest.param("line", marks=pytest.mark.check)])
def test_a_process_that_was_killed_is_noticed_and_its_trial_judged_by_another(place, process, at):
    """Killed while it judges, or when it has written down what came of a trial, but has not told Optuna yet."""
    first = process("first")
    calls = place.path / "calls-first"
    if at == "work":
        wait_for(lambda: calls.exists() and calls.read_text().count("lambda") >= 4)
    else:
        wait_for(lambda: count_of_trials(place) >= 3)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert at == "line" or [*(place.path / "out" / "leases").glob("trial-*")]
    second = process("second")
    assert second.wait(120) == 0
    log = (place.path / "log-second").read_text()
    assert "FINISHED 16" in log
    assert at == "line" or "was left by a process that died; its candidate will be judged again" in log
    numbers = [one["trial"] for one in trials(place.path / "out")]
    assert len({*numbers}) == 16
    params = [json.dumps(one["params"]) for one in trials(place.path / "out")]
    assert len({*params}) == 16  # the orphan's among them
    place.run(place.search(trials=16), "alone")  # as if nothing had happened
    assert params == [json.dumps(one["params"]) for one in trials(place.path / "alone")]
    assert not [*(place.path / "out" / "leases").glob("trial-*")]


def test_a_lease_that_a_dead_process_left_on_a_finished_trial_is_cleared(place):
    place.run(place.search(trials=4), "out")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = place.path / "out" / "leases" / "trial-1"
    left.write_text(json.dumps({"host": leases_module._host(), "pid": dead.pid, "token": "0"}))
    place.run(place.search(trials=5), "out")
    assert not left.exists() and len(trials(place.path / "out")) == 5


@pytest.mark.check
def test_two_processes_share_one_search(place, process):
    both = [process("first"), process("second")]
    assert [one.wait(90) for one in both] == [0, 0]
    found = trials(place.path / "out")
    assert len({one["trial"] for one in found}) == 16
    worked = [(place.path / f"calls-{name}").read_text().count("lambda") for name in ("first", "second")]
    summary = json.loads((place.path / "out" / "summary.json").read_text())
    assert summary["counts"]["reused"] == 1  # the recipe as written is a baseline, too
    assert min(worked) >= 3 and sum(worked) == 15
    names = [one["name"] for one in lines(place.path / "out") if one["kind"] == "baseline"]
    assert len(names) == len({*names})  # each baseline once, by whomever
    assert summary["counts"]["trials"] == 16 and summary["test_looks"] == 1


def test_two_that_ask_at_once_ask_for_no_more_than_is_left(place, monkeypatch):
    counts = Study.counts

    def slowly(study):
        found = counts(study)
        time.sleep(0.2)
        return found

    monkeypatch.setattr(Study, "counts", slowly)
    data = place.search(trials=4, round=3)
    with ThreadPoolExecutor(2) as both:
        list(both.map(lambda fake: place.run(data, "out", fake), (Fake(slow=0.1), Fake(slow=0.1))))
    assert len(trials(place.path / "out")) == 4


# --- leases


def test_a_full_disk_leaves_no_lease_and_says_what_to_do(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Leases(tmp_path / "leases") as leases:
        monkeypatch.setattr(leases_module.json, "dump", full)
        with pytest.raises(OutputError, match="No space left on device; make room, and run the same command again"):
            leases.take("x")
        monkeypatch.undo()
        assert leases.state("x") == FREE and leases.take("x")


def test_what_a_disk_takes_in_parts_is_written_whole(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, text: write(descriptor, text[:7]))
    files.append(tmp_path / "lines", '{"a": "a line of some length"}\n')
    monkeypatch.undo()
    assert (tmp_path / "lines").read_text() == '{"a": "a line of some length"}\n'


def test_a_lease_is_held_by_one_and_given_back(tmp_path):
    with Leases(tmp_path / "leases") as first, Leases(tmp_path / "leases") as second:
        assert first.take("x") and first.take("x") and not second.take("x")
        assert second.state("x") == HELD and first.others() == 0 and second.others() == 1
        second.release("x")  # not its own
        assert second.state("x") == HELD
        first.release("x")
        assert second.state("x") == FREE and second.take("x")
    assert not [*(tmp_path / "leases").iterdir()]


def test_a_lease_without_a_heartbeat_is_an_orphan(tmp_path):
    with Leases(tmp_path / "leases", dead=0.5) as leases:
        (tmp_path / "leases" / "x").write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "t"}))
        assert leases.state("x") == HELD
        old = time.time() - 10
        os.utime(tmp_path / "leases" / "x", (old, old))
        assert leases.state("x") == ORPHAN and leases.take("x") and leases.state("x") != ORPHAN


def test_a_lease_of_a_dead_process_is_an_orphan_at_once(tmp_path):
    code = (
        "import sys, os; from pathlib import Path; from darekit.searches.leases import Leases\n"
        f"Leases(Path({str(tmp_path / 'leases')!r})).take('x'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with Leases(tmp_path / "leases") as leases:
        assert leases.state("x") == ORPHAN and leases.take("x")


def test_heartbeats_keep_a_lease_alive(tmp_path):
    with Leases(tmp_path / "leases", beat=0.05, dead=0.4) as first, Leases(tmp_path / "leases", dead=0.4) as second:
        first.take("x")
        time.sleep(0.8)
        assert second.state("x") == HELD


def test_a_folder_of_lines_of_others_is_refused(tmp_path):
    folder = Folder(tmp_path / "out")
    (tmp_path / "out" / "trials.jsonl").write_text('{"something": 1}\n')
    with pytest.raises(OutputError, match="holds what no search wrote"):
        _ = folder.lines


def test_files_that_two_processes_write_at_once_are_whole(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from darekit.trials.files import append, write_whole

    with ThreadPoolExecutor(8) as threads:
        for found in [threads.submit(write_whole, tmp_path / "x", f"{i}" * 1000) for i in range(80)]:
            found.result()
        for found in [threads.submit(append, tmp_path / "y", f"{i}\n") for i in range(80)]:
            found.result()
    text = (tmp_path / "x").read_text()
    assert any(text == f"{i}" * 1000 for i in range(80)) and len([*tmp_path.iterdir()]) == 2
    assert sorted(map(int, (tmp_path / "y").read_text().split())) == [*range(80)]


# --- what others make of the folder


def test_a_search_has_a_page_and_shows_itself(place):
    pytest.importorskip("plotly")
    from darekit.reports.searches import search_page

    weights = {"low": 0.5, "high": 1.5, "groups": ["attention", "mlp"]}
    space = {"parameters.lambda": {"low": 0.0, "high": 1.5}, "models.0.parameters.weight": weights}

    class Plain(Fake):
        @staticmethod
        def quality(recipe, name):  # weights by group are no numbers
            return 0.9 - 0.8 * abs(recipe["parameters"].get("lambda", 1.0) - 0.8)

    found = place.run(place.search(space=space), fake=Plain())
    page = search_page(found.out)
    assert (page.verdict, *page.details) == tuple(found.summary["verdict"])
    assert page.title == found.summary["name"] and page.state == "" and page.source and "lambda" in page.source[1]
    facts = dict(page.facts)
    assert facts["lambda"] == "0.0 to 1.5" and "m0's weight, attention, mlp" in facts
    assert "judge.py:score" in facts["validation"] and facts["test used"] == "for 1 choice"
    titles = [part.title for section in page.sections for part in section.parts]
    drawn = {"Scores over trials", "Differences rung by rung", "Slices", "Parallel coordinates", "By group of tensors"}
    assert drawn <= {*titles} and {"Do they pull the same way?", "Interference by layer"} <= {*titles}
    assert (found.out / "models" / "inspection.json").exists()
    [every] = [p for s in page.sections for p in s.parts if p.title.startswith("Every trial")]
    assert len(every.rows) == 12 and {row[1].split(" ")[0] for row in every.rows} == {"complete", "stopped"}
    html = found._repr_html_()
    assert found.summary["verdict"][0] in html and "task arithmetic, 1/K" in html and "±" in html


def test_a_page_of_a_search_that_gained_nothing(place):
    pytest.importorskip("plotly")
    from darekit.reports.searches import search_page

    found = place.run(place.search(space={"parameters.lambda": {"low": 0.0, "high": 0.1}}, trials=4))
    best = found.summary["best"]
    assert best["trial"] is None and best["name"] == "task arithmetic"
    page = search_page(found.out)
    assert page.tone == "plain" and page.numbers[0].note == "task arithmetic"
    assert page.sections[0].parts[0].rows[0][0] == "best: task arithmetic"
