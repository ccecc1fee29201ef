# SPDX-License-Identifier: Apache-2.0
"""Goals and constraints as written, by the names of scores that there are; and the judges that a file names."""

from types import SimpleNamespace

import pytest

from darekit.errors import DataError, RecipeError
from darekit.evaluation.scores import Score
from darekit.recipe.documents import Document, Places
from darekit.searches.baselines import BASE, PLAIN, SINGLE, WRITTEN, Baseline
from darekit.searches.blends import Blend
from darekit.searches.data import Limit
from darekit.searches.goals import Known, Unasked, bounds_of, check_goals, goals_of, named_sheets
from darekit.searches.racing import Bound, Goal
from darekit.searches.sheets import Sheet
from darekit.trials import judging
from darekit.trials.judging import asked, check_judges, found_in, judge_in, make_judges, read_judges, search_of


def score(value=0.5, higher=True, items=8):
    return {"value": value, "stderr": 0.1, "higher_is_better": higher, "items": items}


SCORES = {
    "math/right": score(), "math/loss": score(higher=False), "chat/right": score(), "chat/length": score(higher=None),
    "slow/seconds": score(higher=False, items=None),
}  # fmt: skip
RIGHT = {name: SCORES[name] for name in ("math/right", "chat/right")}


def search(*goals, limits=()):
    return SimpleNamespace(name="file.yaml", goals=goals, limits=limits, places=Places("file.yaml"))


def baseline(kind, name="x", model=None):
    return Baseline(kind, name, None, model)


# --- before anything is judged


class Knowing:
    def __init__(self, *names):
        self.score_names = lambda: names


def test_shares_need_a_model_that_is_judged_alone():
    for wish in ("relative mean", "relative min of math"):
        for one in (search(wish), search(limits=(Limit(wish, 0.5, None, True),))):
            with pytest.raises(RecipeError, match=r"file.yaml: .*shares are those of the best single model"):
                check_goals(one, {}, [baseline(BASE), baseline(PLAIN), baseline(WRITTEN)])
            check_goals(one, {}, [baseline(BASE), baseline(SINGLE)])
    check_goals(search("mean", "math"), {}, [])


def test_what_no_judge_gives_is_told_beforehand():
    judges = {"validation": {"math": Knowing("right", "loss"), "chat": Knowing()}, "test": {"math": Knowing("right")}}
    check_goals(search("math", "math/right", "chat/anything", "mean of math/right, chat"), judges, [])
    for one, said in (
        (search("math/rihgt"), "choose: math/rihgt: validation.math has no score 'rihgt'"),
        (search("math/loss"), "choose: math/loss: test.math has no score 'loss'"),
        (search("mean of chat, math/loss"), "test.math has no score 'loss'"),
        (search("math", limits=(Limit("math/los", 0.5, None, False),)), "at_most.math/los: validation.math has no"),
    ):
        with pytest.raises(RecipeError, match=said):
            check_goals(one, judges, [])


# --- goals


def test_goals_have_full_names_and_directions():
    known = Known(SCORES)
    assert goals_of(search("math", "math/loss", "chat/right"), known) == (
        Goal("math/right", True), Goal("math/loss", False), Goal("chat/right", True),
    )  # fmt: skip
    with pytest.raises(RecipeError, match=r"file.yaml: choose: chat/length: neither more nor less of chat/length"):
        goals_of(search("chat/length"), known)


def test_without_a_goal_it_is_the_mean_or_the_only_judges_first_score():
    (found,) = goals_of(search(), Known(RIGHT))
    assert found == Goal("mean", True, Blend("mean", {"math/right": 1.0, "chat/right": 1.0}))
    one = {name: SCORES[name] for name in ("math/loss", "math/right")}
    assert goals_of(search(), Known(one)) == (Goal("math/loss", False),)
    # Two judges that do not point one way have no mean.
    unlike = Known({name: SCORES[name] for name in ("math/loss", "chat/right")})
    assert [one.score for one in goals_of(search(), unlike)] == ["math/loss"]


def test_a_blend_points_where_its_parts_do():
    lower = {"a/loss": score(2.0, False), "b/loss": score(1.0, False)}
    (found,) = goals_of(search("mean of a, b/loss"), Known(lower))
    assert found == Goal("mean of a, b/loss", False, Blend("mean of a, b/loss", {"a/loss": 1.0, "b/loss": 1.0}))
    (found,) = goals_of(search("min of math, chat"), Known(SCORES))
    assert found.higher and found.blend == Blend("min of math, chat", {"math/right": 1.0, "chat/right": 1.0}, True)
    with pytest.raises(
        RecipeError, match="of a/loss less is better, and the least would be the best of all; choose mean"
    ):
        goals_of(search("min of a, b"), Known(lower))
    for wish, said in (
        ("mean of math, math/loss", "these scores do not all point one way; name some that do, as in choose: {mean: "),
        ("min of math, chat/length", "these scores do not all point one way; .* choose: {min: "),
        ("mean of chat/length", "these scores do not"), ("mean", "the judges' first scores do not"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=f"file.yaml: choose: {wish}: {said}"):
            goals_of(search(wish), Known(SCORES))
    (found,) = goals_of(search("mean"), Known(RIGHT))
    assert found.blend.units == {"math/right": 1.0, "chat/right": 1.0} and not found.blend.least


def test_shares_are_those_of_the_best_model():
    singles = [
        {"math/right": score(0.2), "chat/right": score(0.9)}, {"math/right": score(0.8)}, {"other/right": score(1.0)},
    ]  # fmt: skip
    (found,) = goals_of(search("relative mean"), Known(RIGHT, singles=singles))
    assert found.blend.units == {"math/right": 0.8, "chat/right": 0.9}
    (found,) = goals_of(search("mean of math, chat"), Known(RIGHT, singles=singles))
    assert found.blend.units == {"math/right": 1.0, "chat/right": 1.0}
    (found,) = goals_of(search("relative mean"), Known(RIGHT))  # as long as they were not all judged
    assert found.blend.units == {"math/right": 1.0, "chat/right": 1.0}
    lower = {"a/loss": score(2.0, False)}
    losses = [{"a/loss": score(2.0, False)}, {"a/loss": score(1.5, False)}]
    assert goals_of(search("relative mean of a"), Known(lower, singles=losses))[0].blend.units == {"a/loss": 1.5}
    for values, said in (
        ([0.0], "has more than 0 in math/right"),
        ([-1.0, 0.0], "has more than 0"),
        ([], "could be judged"),
    ):
        with pytest.raises(RecipeError, match=f"no model alone {said}"):
            goals_of(search("relative mean of math"), Known(RIGHT, singles=[{"math/right": score(v)} for v in values]))


def test_a_score_that_is_not_there():
    with pytest.raises(Unasked) as found:
        goals_of(search("chat/other"), Known(SCORES))
    assert found.value.judge == "chat" and "chat/other is not a score of single items" in str(found.value)
    for name, whole in (("chat/other", {"chat"}), ("slow/minutes", ()), ("none", ()), ("none/x", ())):
        with pytest.raises(RecipeError, match=f"file.yaml: choose: {name}: '{name}' is not a score"):
            goals_of(search(name), Known(SCORES, frozenset(whole)))
    mixed = {"math/sum": score(items=None), "math/right": score()}
    with pytest.raises(Unasked):
        goals_of(search("math/more"), Known(mixed))


# --- constraints


def test_bounds_refer_to_what_was_judged():
    number, share = Limit("math", 0.5, None, True), Limit("mean of math, chat", 0.9, "base", False)
    sheet = Sheet()
    known = Known(RIGHT, singles=[], sheets={"base": sheet})
    blend = Blend("mean of math, chat", {"math/right": 1.0, "chat/right": 1.0})
    assert bounds_of(search(limits=(number, share)), known) == (
        Bound(number, "math/right", None), Bound(share, "mean of math, chat", sheet, blend),
    )  # fmt: skip
    assert bounds_of(search(limits=(number, share)), known)[1].of is sheet
    assert bounds_of(search(limits=(share,)), Known(RIGHT))[0].of is None  # not yet
    with pytest.raises(RecipeError, match=r"at_least\.math: m could not be judged, so nothing can be compared"):
        bounds_of(search(limits=(Limit("math", 1, "m", True),)), known)
    with pytest.raises(RecipeError, match=r"file.yaml: at_least.x: 'x' is not a score"):
        bounds_of(search(limits=(Limit("x", 1, None, True),)), known)


def test_what_constraints_may_name():
    sheets = [Sheet(sizes={"a": at}) for at in range(5)]
    kinds = [baseline(BASE), baseline(SINGLE, "single m", "hub/m"), baseline(SINGLE), baseline(PLAIN, "p", "p"),
             baseline(WRITTEN, "w", "w")]  # fmt: skip
    assert named_sheets(zip(kinds, sheets, strict=True)) == {"base": sheets[0], "hub/m": sheets[1]}


# --- judges


def document(data):
    return Document("file.yaml", data, {}, "")


def test_judges_of_a_file():
    one = {"data": "x.jsonl"}
    assert read_judges(document({"test": {"a": one}, "other": 5})) == {"test": {"a": one}}
    assert [*read_judges(document({"test": {"a": one}, "validation": {"b": one}}))] == ["validation", "test"]
    shape = "expected names with their judges, such as"
    for data, said in (
        ({}, "no judges; add"),
        ({"test": {}}, shape),
        ({"test": [one]}, shape),
        ({"test": None}, shape),
        ({"test": one}, r"give this judge a name, test: \{NAME: \{data: "),
        ({"test": {"command": ["x"]}}, "give this judge a name"),
        ({"test": {"tasks": ["x"]}}, "give this judge a name"),
        ({"test": {"python": "x"}}, "give this judge a name"),
        ({"test": {"a": "x.jsonl"}}, "expected a judge, such as"),
        ({"test": {"a": {}}}, "expected a judge, such as"),
        ({"test": {"mean": one}}, "is a reserved name"),
        ({"test": {"validation": one}}, "is a reserved name"),
        ({"test": {"test": one}}, "is a reserved name"),
    ):
        with pytest.raises(RecipeError, match=said):
            read_judges(document(data))
    assert read_judges(document({"test": {"data": one}})) == {"test": {"data": one}}  # a name like any other


def test_relative_names_are_looked_for_beside_the_file(tmp_path, monkeypatch):
    first, second, here = (tmp_path / name for name in ("first", "second", "here"))
    for folder, names in ((first, ("a",)), (second, ("a", "b", "c")), (here, ("c",))):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    monkeypatch.chdir(here)
    look = (first, second)
    assert [found_in(name, look) for name in "abcd"] == [str(first / "a"), str(second / "b"), "c", "d"]
    assert found_in(str(here / "x"), look) == str(here / "x")
    assert search_of(first / "r.yaml", (second, first)) == (first.resolve(), second)
    assert search_of({}, (second, second)) == (second,)


def test_a_recipe_is_a_file_or_its_data(tmp_path):
    (tmp_path / "r.yaml").touch()
    place = judging.read_recipe_place
    assert place(document({"recipe": "r.yaml"}), (tmp_path,)) == tmp_path / "r.yaml"
    assert place(document({"recipe": {"models": []}}), ()) == {"models": []}
    for wrong in ("", {}, 5, None):
        with pytest.raises(RecipeError, match="expected a recipe or a recipe's file, found"):
            place(document({"recipe": wrong}), ())


def test_judges_are_made_by_name_and_their_mistakes_too(monkeypatch):
    def made(spec, *, search):
        if spec == "bad":
            raise DataError("no such file")
        return None if spec == "tasks" else (spec, search)

    monkeypatch.setattr(judging, "judge_of", made)
    monkeypatch.setattr(judging, "check_judge", made)
    specs = {"validation": {"a": 1, "b": 2}, "test": {"a": 3}}
    expected = {"validation": {"a": (1, "s"), "b": (2, "s")}, "test": {"a": (3, "s")}}
    assert make_judges(Places("file"), specs, "s") == check_judges(Places("file"), specs, "s") == expected
    assert check_judges(Places("file"), {"test": {"a": "tasks", "b": 1}}, "s") == {"test": {"b": (1, "s")}}
    for make in (make_judges, check_judges):
        with pytest.raises(DataError, match=r"^file: test.a: no such file$"):
            make(Places("file"), {"test": {"a": "bad"}}, "s")


def test_scores_are_called_after_their_judge():
    good = {"right": Score(0.5), "loss": Score(2.0)}
    assert asked("math", lambda live: good, None) == {"math/right": good["right"], "math/loss": good["loss"]}
    for bad in (float("nan"), float("inf")):
        with pytest.raises(DataError, match=f"math/loss is {bad}"):
            asked("math", lambda live, bad=bad: {**good, "loss": Score(bad)}, None)
    assert judge_in("math/right/more") == "math" and judge_in("math") == "math"
