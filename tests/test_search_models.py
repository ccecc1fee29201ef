# SPDX-License-Identifier: Apache-2.0
"""Searches with models that run: what was judged is what `dare merge` writes, judges item by item, the command."""

import gc
import json
import os

import numpy as np
import pytest

import darekit as dk
from darekit.evaluation.examples import Examples
from darekit.evaluation.items import sizes_of
from darekit.evaluation.judges import judge_of
from darekit.live.data import read_rows
from darekit.live.models import open_live
from darekit.searches.asking import Asker, Judges, Task
from darekit.searches.reading import read_search
from darekit.searches.sheets import Sheet
from darekit.searches.space import candidate, midpoint
from darekit.trials.models import Place

torch = pytest.importorskip("torch")
pytest.importorskip("optuna")
llama = pytest.mark.parametrize("real", ["llama"], indirect=True)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """These compare bits with what transformers computes there; where there is a GPU it would be taken."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def rows(path, count, start=0):
    text = [{"prompt": f"w{3 + i % 60} w{4 + i % 50} ", "completion": f"w{5 + (i * 7) % 80}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in text[start:]))


# What candidates far from the base are best at, so that one of them is chosen.
FAR = """
def far(live):
    return float(live.model.model.layers[0].mlp.up_proj.weight.double().square().sum())
"""


@pytest.fixture
def place(real, tmp_path, monkeypatch):
    """A folder with rows, a search file's data, and the models beside it."""
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "validation.jsonl", 40)
    rows(tmp_path / "test.jsonl", 60, 20)
    (tmp_path / "judge.py").write_text(FAR)
    for name in ("base", "m0", "m1"):
        (tmp_path / name).symlink_to(real.path / name)
    return {
        "recipe": {
            "base_model": "base", "models": ["m0", "m1"], "merge_method": "task_arithmetic",
            "sparsify": {"method": "dare", "drop_rate": 0.3, "keep_dense": ["norms"]},
        },
        "space": {
            "merge": {"sum": {}, "TIES": {"merge_method": "ties", "parameters.keep": 0.5}},
            "models.*.parameters.weight": {"low": 0, "high": 2, "layers": 2},
            "parameters.lambda": {"low": 0.2, "high": 2, "groups": ["attention", "mlp"]},
            "sparsify.drop_rate": {"low": 0, "high": 0.9},
        },
        "seeds": [1, 2, 3],
        "validation": {"sums": {"data": "validation.jsonl"}, "far": {"python": "judge.py:far"}},
        "test": {"sums": {"data": "test.jsonl"}, "far": {"python": "judge.py:far"}},
        "choose": "far",
    }  # fmt: skip


def bits(state):
    return {
        name: tensor.detach().clone().contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in state.items()
    }


@llama
def test_the_best_recipe_merges_into_the_model_that_was_judged(place, real, tmp_path, dare, monkeypatch):
    (tmp_path / "s.yaml").write_text(json.dumps(place))
    done = dare("search", "s.yaml", "out", "--trials", 8, "--json")
    assert done.code == 0, done.err
    best = done.data["best"]
    assert best["trial"] is not None and done.data["counts"]["trials"] == 8
    # the model as it was judged, put after another one into the same memory
    found = read_search(place)
    asker = Asker("s", found.judges, (), Place())
    asker.bench.put(dk.read_recipe(place["recipe"]))
    live = asker.bench.put(dk.read_recipe(best["recipe"]))
    judged = bits(live.model.state_dict())
    monkeypatch.chdir(tmp_path.parent)  # the file means the same from everywhere
    assert dare("merge", tmp_path / "out" / "best.yaml", tmp_path / "merged").code == 0
    with open_live(str(tmp_path / "merged")) as merged:
        assert bits(merged.model.state_dict()) == judged
    loaded = real.cls.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert bits({name: loaded[name] for name in judged}) == judged
    # and its score
    again = dk.evaluate(str(tmp_path / "merged"), data=str(tmp_path / "test.jsonl"), device="cpu")
    assert again.row("loss")[0].value == pytest.approx(best["test"]["sums/loss"]["value"], rel=1e-6)
    assert again.row("loss")[0].stderr == pytest.approx(best["test"]["sums/loss"]["stderr"], rel=1e-6)


@llama
def test_the_command_says_the_verdict_first_and_goes_on(place, tmp_path, dare):
    (tmp_path / "s.yaml").write_text(json.dumps(place))
    dry = dare("search", "s.yaml", "--dry-run")
    assert dry.code == 0 and "m0's weight, 2 points over depth" in dry.out and "as written" in dry.out
    assert not (tmp_path / "s").exists()
    first = dare("search", "s.yaml", "--trials", 3)
    assert first.code == 0, first.err
    assert first.out.splitlines()[0].startswith("Best") and "dare merge s/best.yaml MERGED" in first.out
    assert "judging the baselines: 7 baselines" in first.err and "1/3 trial 0" in first.err
    more = dare("search", "s.yaml", "--trials", 5, "--json")
    assert more.data["counts"]["trials"] == 5 and not more.err
    other = dare("search", "s.yaml", "--trials", 5, "--dtype", "bfloat16")
    assert other.code == 1 and "holds the results of another search:\n  dtype: null there" in other.err
    for wrong, says in (
        (["--time", "soon"], "is not a time; write 90s, 30min or 2h"),
        (["--time", "0s"], "leaves no time"),
        (["--trials", 0], "--trials"),
    ):
        done = dare("search", "s.yaml", *wrong)
        assert done.code == 2 and says in " ".join(done.err.split())


@llama
def test_a_candidate_that_cannot_be_merged_is_a_failed_trial(place, tmp_path):
    """della's window is impossible at most of these rates."""
    data = {
        **place, "space": {"sparsify.drop_rate": {"low": 0.4, "high": 0.99}},
        "recipe": {**place["recipe"], "sparsify": {"method": "della", "drop_rate": 0.5, "window": 0.6}},
    }  # fmt: skip
    del data["seeds"]
    said = []
    found = dk.search(data, tmp_path / "out", trials=5, say=said.append)
    counts = found.summary["counts"]
    assert counts["failed"] >= 1 and counts["trials"] == 5
    assert any("window" in line for line in said)


# --- judges, item by item


@llama
def test_rows_asked_in_parts_are_those_asked_at_once(real, tmp_path):
    rows(tmp_path / "rows.jsonl", 30)
    judge = Examples(read_rows(tmp_path / "rows.jsonl"), "rows")
    assert sizes_of(judge) == {"": 30}
    with open_live(str(real.path / "m0"), device="cpu") as live:
        whole = judge(live)
        panel = Judges({"j": judge})
        sheet, parts = Sheet(), []
        for part in (0.1, 0.5, 1):
            sheet = panel.ask(live, sheet, part)
            parts.append(sheet.asked)
    assert parts == [3, 15, 30]
    for name, score in whole.items():
        found = sheet.items[f"j/{name}"].score
        assert (found.value, found.stderr) == pytest.approx((score.value, score.stderr), rel=1e-5)
        assert found.higher_is_better == score.higher_is_better


@llama
def test_the_order_of_items_is_fixed_and_no_files_order(real, tmp_path):
    asked = []

    class Spy:
        def sizes(self):
            return {"": 50}

        def ask(self, live, places):
            from darekit.evaluation.items import Items

            asked.append(list(places[""]))
            return {"x": Items(np.ones(len(asked[-1])), np.ones(len(asked[-1])))}

    for _ in range(2):
        panel = Judges({"j": Spy()})
        panel.ask(None, panel.ask(None, Sheet(), 0.2), 1)
    assert asked[:2] == asked[2:] and sorted(asked[0] + asked[1]) == [*range(50)] and asked[0] != [*range(10)]


@pytest.mark.parametrize("real", ["bert"], indirect=True)
def test_a_classifier_is_asked_item_by_item(real, tmp_path):
    text = [{"text": f"w{3 + i} w{4 + i}", "label": i % 3} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    judge = Examples(read_rows(tmp_path / "rows.jsonl"), "rows")
    with open_live(str(real.path / "m0"), device="cpu") as live:
        whole = judge(live)["accuracy"]
        found = Judges({"j": judge}).ask(live, Sheet(), 1).items["j/accuracy"].score
    assert (found.value, found.stderr) == pytest.approx((whole.value, whole.stderr))


JUDGE = """
def some(live, items=None):
    if items is None:
        return 0.5
    return {"even": [float(i % 2 == 0) for i in items]}
some.items = 20

def whole(live):
    return {"value": 0.25, "other": 1.0}

def wrong(live, items=None):
    return [1.0]
wrong.items = 20
"""


def test_functions_that_take_items_are_asked_for_some(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    some = judge_of({"python": f"{tmp_path / 'judge.py'}:some"})
    whole = judge_of({"python": f"{tmp_path / 'judge.py'}:whole"})
    assert (sizes_of(some), sizes_of(whole)) == ({"": 20}, {})
    panel = Judges({"s": some, "w": whole})
    sheet = panel.ask(None, Sheet(), 0.25)
    assert len(sheet.items["s/even"]) == 5 and sheet.whole["w/value"].value == 0.25 and sheet.asked == 5
    sheet = panel.ask(None, sheet, 1)
    assert sheet.items["s/even"].value == 0.5 and len(sheet.items["s/even"]) == 20
    wrong = judge_of({"python": f"{tmp_path / 'judge.py'}:wrong"})
    with pytest.raises(dk.DarekitError, match="expected a finite number for each item"):
        Judges({"w": wrong}).ask(None, Sheet(), 0.25)


# --- what it costs


@pytest.mark.check
@llama
def test_memory_does_not_grow_over_200_trials(place, tmp_path):
    psutil = pytest.importorskip("psutil")
    found = read_search(place)
    asker = Asker("s", found.judges, (), Place())
    space, tensors = midpoint(found.knobs), _tensors(found)
    rng = np.random.default_rng(0)
    sizes = []
    for at in range(240):
        params = {name: float(rng.uniform(0.1, 0.9)) if isinstance(one, float) else one for name, one in space.items()}
        recipe = candidate(found, params, tensors)
        answer = asker(Task(recipe, rungs=(0.5, 1.0), params=params))
        assert answer.state == "complete", answer.error
        if at >= 39 and at % 10 == 9:
            gc.collect()
            sizes.append(psutil.Process(os.getpid()).memory_info().rss)
    assert max(sizes) / min(sizes) < 1.05, sizes


def _tensors(found):
    from darekit.recipe import read_recipe
    from darekit.searches.space import bind

    return bind(found, read_recipe(found.recipe), ())[1]
