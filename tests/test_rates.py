# SPDX-License-Identifier: Apache-2.0
"""Drop rates from the size of deltas: `drop_rate: auto`, budgets, exact filters; and DAREx's q."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import darekit as dk
import families
from darekit.errors import RecipeError
from darekit.output.lock import identity
from darekit.planning.homology import TAU, judge, p_max, sample_norms
from darekit.planning.opening import open_plan
from darekit.planning.rates import MOST, rate_within, rounded_down, spend
from darekit.recipe import Filtered, Filters, Place, read_recipe, resolve

BASE = {"base_model": "b", "models": [{"model": "a"}], "merge_method": "task_arithmetic"}


def reading(**sparsify):
    return read_recipe(BASE | {"sparsify": {"method": "dare", "drop_rate": 0.9, **sparsify}})


# --- q


def test_q_is_read_in_both_forms():
    assert reading(rescale={"q": 0.15}) == reading(q=0.15)
    assert reading(rescale={"q": 0.15}).sparsify.parameters["q"] == 0.15
    own = {"models": [{"model": "a", "parameters": {"rescale": {"q": 0.3}}}]}
    recipe = read_recipe(BASE | own | {"sparsify": {"method": "dare", "drop_rate": 0.9}})
    assert recipe.models[0].parameters == {"q": 0.3}
    assert read_recipe(recipe.to_data()) == recipe


@pytest.mark.parametrize(
    ("sparsify", "says"),
    [
        ({"rescale": {"q": 0}}, "must be above 0"),
        ({"rescale": {"q": 2}}, r"q must be in \[0, 1\]"),
        ({"rescale": {"k": 0.1}}, r"must be paper, l1, none or \{q: number\}"),
        ({"rescale": {"q": 0.1}, "q": 0.2}, "given again"),
        ({"rescale": "l1", "q": 0.2}, "two ways to rescale"),
        ({"method": "magnitude", "rescale": {"q": 0.2}}, "q is a parameter of dare, not of magnitude"),
        ({"method": "drop_only", "drop_rate": "auto"}, "auto works with dare"),
        ({"on": "weights", "drop_rate": "auto"}, "works only with merge_method: linear|auto works with dare"),
        ({"tau": 0.2}, "needs drop_rate: auto"),
        ({"drop_rate": "atuo"}, "must be a number"),
        ({"drop_rate": "auto", "tau": 0}, r"tau must be in \[0.001, 1\]"),
    ],
)
def test_what_does_not_go_together_is_refused(sparsify, says):
    with pytest.raises(RecipeError, match=says):
        reading(**sparsify)


def test_q_divides_the_survivors(llamas, dare, tmp_path):
    """On disk, by the command; BF16 goes through the one kernel."""
    base, model = llamas.base, llamas.models[0]
    arguments = ("drop", llamas.path / "base", llamas.path / "m0")
    for name, more in (("q", ("--rescale-q", 0.25)), ("none", ("--rescale", "none"))):
        assert dare(*arguments, tmp_path / name, "-p", 0.9, "--seed", 5, *more).code == 0
    scaled, plain = families.load(tmp_path / "q"), families.load(tmp_path / "none")
    for name, before in base.items():
        kept = plain[name].view(np.uint16) != before.view(np.uint16)
        delta = model[name].astype(np.float32) - before.astype(np.float32)
        expected = (before.astype(np.float32) + np.where(kept, delta * np.float32(4), 0)).astype(before.dtype)
        assert np.array_equal(scaled[name].view(np.uint16), expected.view(np.uint16)), name


def test_a_q_of_zero_is_a_usage_error(dare):
    said = dare("drop", "a", "b", "c", "-p", 0.9, "--rescale-q", 0)
    assert said.code == 2 and "--rescale-q" in said.err


def test_the_check_knows_that_q_quietens_the_noise(llamas):
    def rho(**more):
        sparsify = {"method": "dare", "drop_rate": 0.99, **more}
        with open_plan(read_recipe(families.recipe(llamas.path, k=1, sparsify=sparsify))) as plan:
            norms = sample_norms(plan.alignment.tensors, 0, lambda tensor: plan.rate_of(0, tensor))
            return judge("m0", "base", norms).rho

    assert rho() == pytest.approx(0.04 * math.sqrt(99), rel=0.1)
    assert rho(q=0.02) == pytest.approx(rho() / 2)
    assert rho(q=0.01) == pytest.approx(rho())


# --- filters by whole names


def test_an_equals_sign_means_the_whole_name():
    filters = Filters((Filtered("=a.weight", 1), Filtered("xa", 2), Filtered("=xa.weight", 3), Filtered("*", 4)))
    assert [resolve((filters,), Place(name)) for name in ("a.weight", "xa.weight", "a.weight.b")] == [1, 2, 4]
    assert resolve((Filters(filters.entries[:1]), 7), Place("b.a.weight")) == 7


@given(
    st.lists(st.builds(Filtered, st.text("ab=*", min_size=1), st.integers(0, 9)), max_size=5), st.text("ab", min_size=1)
)
def test_the_index_of_names_changes_nothing(entries, name):
    """The first entry that matches decides, with or without the index."""
    place = Place(name)
    single = (resolve((Filters((entry,)),), place) for entry in entries)
    assert resolve((Filters(tuple(entries)),), place) == next((value for value in single if value is not None), None)


# --- auto


def auto(llamas, **more):
    return families.recipe(llamas.path, k=2, sparsify={"method": "dare", "drop_rate": "auto", "tau": 0.1, **more})


@pytest.mark.parametrize(
    ("method", "rate", "told"),
    [("dare", 0.9, True), ("drop_only", 0.9, True), ("magnitude", 0.9, False), ("dare", 0.8, False)],
)
def test_noise_in_embeddings_is_told_of_where_something_is_drawn(llamas, method, rate, told):
    sparsify = {"method": method, "drop_rate": rate}
    with open_plan(read_recipe(families.recipe(llamas.path, k=2, sparsify=sparsify))) as plan:
        assert any("one-hot inputs" in note and "2.5 to 3.8 times" in note for note in plan.notes) is told


def test_auto_follows_the_sampled_size_of_each_delta(llamas):
    with open_plan(read_recipe(auto(llamas))) as plan:
        for k in range(2):
            droppable = {name for name in llamas.base if name.endswith("proj.weight") or name == "lm_head.weight"}
            assert set(plan.rates[k]) == droppable
            for name, rate in plan.rates[k].items():
                before = llamas.base[name].astype(np.float64)
                r = np.linalg.norm(llamas.models[k][name] - before) / np.linalg.norm(before)
                assert rate == rounded_down(p_max(r, 0.1))  # tensors this small are read whole
            assert plan.summaries[k].drop_rate < np.mean([*plan.rates[k].values()])
        assert any("keeps embeddings, norms, biases dense" in note for note in plan.notes)
        assert not any("matches no tensor" in note for note in plan.notes)


def test_auto_is_recorded_repeatable_and_resumable(llamas, tmp_path, dare):
    dk.merge(auto(llamas), tmp_path / "one")
    lock = json.loads((tmp_path / "one" / "darekit.lock.json").read_text())
    rates = {
        name: group["stages"][0][0]["drop_rate"]
        for group in lock["resolved"]
        for name in group["tensors"]
        if group["stages"][0]
    }
    with open_plan(read_recipe(auto(llamas))) as plan, open_plan(read_recipe(auto(llamas))) as again:
        assert rates == dict(plan.rates[0])
        # What a resume compares holds the numbers, and comes out the same.
        compared = identity(plan, allow_nonfinite=False)
        assert compared == identity(again, allow_nonfinite=False)
        assert {"filter": "=lm_head.weight", "value": rates["lm_head.weight"]} in (
            compared["recipe"]["models"][0]["parameters"]["drop_rate"]
        )
    # The lock's recipe, whose rates are numbers, makes the same bytes.
    dk.merge(lock["recipe"], tmp_path / "two")
    families.same(families.load(tmp_path / "one"), families.load(tmp_path / "two"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(auto(llamas)))
    shown = dare("merge", recipe, tmp_path / "three", "--dry-run", "--json").data
    assert shown["models"][0]["drop_rates"] == rates
    assert "heads" in dare("merge", recipe, tmp_path / "three", "--dry-run").out


def test_drop_takes_auto_too(llamas, dare, tmp_path):
    arguments = ("drop", llamas.path / "base", llamas.path / "m0", tmp_path / "out", "--dry-run")
    shown = dare(*arguments, "-p", "auto", "--tau", 0.1, "--json").data
    with open_plan(read_recipe(auto(llamas))) as plan:
        assert shown["models"][0]["drop_rates"] == dict(plan.rates[0])
    assert dare(*arguments, "-p", 0.5, "--tau", 0.1).code == 2
    assert dare(*arguments, "-p", "lots").code == 2
    assert "auto works with dare" in dare(*arguments, "-p", "auto", "--method", "magnitude").err


def test_auto_for_one_model_and_for_some_tensors(llamas):
    data = auto(llamas, keep_dense=[])
    data["sparsify"]["drop_rate"] = [{"filter": "mlp", "value": "auto"}, {"value": 0.5}]
    data["models"][1]["parameters"] = {"drop_rate": "auto", "tau": 0.3}
    with open_plan(read_recipe(data)) as plan:
        rates = [{t.name: plan.rate_of(k, t)[0] for t in plan.alignment.tensors} for k in range(2)]
        for name, rate in rates[0].items():
            assert ("mlp" in name) == (name in plan.rates[0]) == (rate != 0.5)
        assert set(plan.rates[1]) == set(llamas.base)
        assert all(rates[1][name] > rates[0][name] for name in rates[0] if "mlp" in name)


def test_auto_everywhere_is_auto(llamas):
    data = auto(llamas)
    shared = open_rates(data)
    for entry in data["models"]:
        entry["parameters"] = {"drop_rate": "auto"}
    assert open_rates(data) == shared and any(shared[0].values())


def test_what_cannot_be_sampled_is_not_dropped(llamas, tmp_path):
    """Tensors that are computed from the first element on: a few chunks of one would cost all of it."""
    inner = tmp_path / "inner.yaml"
    inner.write_text(json.dumps(families.recipe(llamas.path, k=2, merge_method="ties", parameters={"keep": 0.5})))
    with open_plan(read_recipe(auto(llamas) | {"models": [str(inner)]})) as plan:
        assert not plan.rates[0]
        assert {plan.rate_of(0, tensor) for tensor in plan.alignment.tensors} == {(0.0, 0.0)}


def test_integers_have_no_settings(llamas, tmp_path):
    for name, tensors in (("base", llamas.base), ("m0", llamas.models[0])):
        families.save(tmp_path / name, {**tensors, "steps": np.arange(3)}, families.config())
    recipe = families.recipe(tmp_path, k=1, sparsify={"method": "dare", "drop_rate": 0.5})
    with open_plan(read_recipe(recipe)) as plan:
        assert plan.settings["steps"].models == (None,)
        assert all(found.models[0].rate == 0.5 for name, found in plan.settings.items() if name != "steps")


def open_rates(data):
    with open_plan(read_recipe(data)) as plan:
        return plan.rates


def test_a_rate_is_never_above_what_was_seen_to_work():
    assert rate_within(0.0, TAU) == 0.0 and rate_within(math.inf, TAU) == 0.0
    assert rate_within(1e-6, TAU) == MOST
    assert rate_within(0.3, TAU) <= p_max(0.3, TAU) < rate_within(0.3, TAU) + 1e-4


# --- budgets


def cost(costs, rates):
    return sum(c * p / (1 - p) if c else 0.0 for c, p in zip(costs, rates, strict=True))


TENSORS = st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-8, 10)), min_size=1, max_size=6)


@given(TENSORS, st.floats(0.01, 1))
def test_a_budget_is_spent_whole_and_no_exchange_is_better(tensors, share):
    sizes, costs = zip(*tensors, strict=True)
    budget = share * sum(sizes)
    rates = spend(sizes, costs, budget)
    kept = [n * (1 - p) for n, p in zip(sizes, rates, strict=True)]
    assert sum(kept) == pytest.approx(budget, rel=1e-6)
    assert all(0 <= p < 1 for p in rates)
    for i in range(len(sizes)):
        for j in range(len(sizes)):
            moved = 1e-3 * kept[i]  # from i to j
            if i == j or kept[j] + moved > sizes[j]:
                continue
            other = list(rates)
            other[i], other[j] = 1 - (kept[i] - moved) / sizes[i], 1 - (kept[j] + moved) / sizes[j]
            assert cost(costs, other) >= cost(costs, rates) * (1 - 1e-6)


def test_budgets_at_the_edges():
    assert spend([10, 10], [0.0, 1.0], 5) == [1.0, 0.5]  # nothing is spent where nothing changed
    assert spend([10, 10], [0.0, 1.0], 15) == [0.5, 0.0]
    assert spend([10, 10], [math.inf, 1.0], 12) == [0.0, 0.8]  # a new tensor stays whole
    assert spend([10, 10], [math.inf, 1.0], 5) == [0.5, 1.0]  # as far as it goes
    assert spend([10, 0], [1.0, 1.0], 100) == [0.0, 1.0]
    assert spend([], [], 3) == []


def test_what_is_left_of_a_budget_goes_to_what_moves_nothing():
    assert spend([100, 1], [1.0, 0.0], 100.5) == [0.0, 0.5]
    assert spend([100, 4], [1.0, 0.0], 103) == [0.0, 0.25]


def test_a_tensor_of_one_element_has_its_share_of_a_budget():
    """By hand: what is kept of each goes as sqrt(cost / size), here 0.2 to 0.05; 2 of 13 elements are kept."""
    assert spend([1, 12], [0.04, 0.03], 2) == pytest.approx([1 - 2 * 0.2 / 0.8, 1 - 2 * 0.05 / 0.8])
    assert spend([0, 12], [0.0, 0.03], 6)[1] == pytest.approx(0.5)
