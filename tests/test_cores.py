# SPDX-License-Identifier: Apache-2.0
"""Products of thin factors, against the whole matrices: their decomposition, sums, and merges in a shared basis."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from darekit.checkpoints import ArrayBytes, TensorInfo
from darekit.dtypes import DTYPES
from darekit.engine.steps import TRIM, TRIM_AT, Input, Merge, StageSpec
from darekit.errors import DataError
from darekit.extraction import cores
from darekit.extraction.cores import Cores, Stack, Thin
from darekit.extraction.factors import Factors
from darekit.extraction.targets import Block, Target


def thin(out, q, inner, seed=0):
    rng = np.random.default_rng(seed)
    return Thin(rng.normal(size=(out, q)), rng.normal(size=(q, inner)))


def product(one):
    return one.left @ one.right


@pytest.mark.parametrize(("out", "q", "inner"), [(9, 3, 7), (3, 5, 8), (8, 5, 3), (1, 1, 1), (4, 4, 4)])
def test_a_product_is_decomposed_without_being_made(out, q, inner):
    one = thin(out, q, inner)
    whole = product(one)
    found, values = one.decomposed()
    known = np.linalg.svd(whole, compute_uv=False)
    np.testing.assert_allclose(values[: known.size][: min(out, q, inner)], known[: min(out, q, inner)], rtol=1e-10)
    assert found.rank == min(out, q, inner) and found.a.dtype == found.b.dtype == np.float32
    np.testing.assert_allclose(found.b @ found.a, whole, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.b, axis=0), np.linalg.norm(found.a, axis=1), rtol=1e-5)
    assert (np.diff(np.linalg.norm(found.b, axis=0)) <= 0).all()
    at = np.abs(found.b).argmax(axis=0)
    assert (found.b[at, np.arange(found.rank)] > 0).all()
    np.testing.assert_allclose(one.square(), np.sum(whole**2))
    np.testing.assert_allclose(product(one.turned), whole.T)
    for rank in range(1, found.rank + 1):
        cut = one.of_rank(rank)
        assert cut.rank == rank
        np.testing.assert_allclose(one.residual(cut), np.sum(known[rank:] ** 2), atol=1e-6 * known[0] ** 2)
    assert one.residual(Factors(found.b[:, :0], found.a[:0])) == pytest.approx(np.sum(whole**2))


def test_products_of_less_than_their_width():
    low = Thin(np.ones((5, 3)), np.ones((3, 4)))
    found, values = low.decomposed()
    assert found.rank == 1 and values.size == 3 and values[0] == pytest.approx(3 * 20**0.5)
    zero, none = Thin(np.zeros((5, 3)), np.ones((3, 4))), Thin(np.zeros((5, 0)), np.zeros((0, 4)))
    for one in (zero, none):
        found, values = one.decomposed()
        assert found.b.shape == (5, 0) and found.a.shape == (0, 4) and not values.any()
        assert one.square() == 0
    assert low.residual(low.decomposed()[0]) >= 0
    small = Thin(np.eye(3), np.diag([1.0, 2e-6, 5e-7]))
    assert small.decomposed()[0].rank == 2


def test_products_upon_each_other():
    parts = [thin(2, 3, 5), thin(4, 1, 5, 1), thin(1, 2, 5, 2)]
    found = cores._upon_each_other(parts)
    assert found.left.shape == (7, 6)
    np.testing.assert_allclose(product(found), np.concatenate([product(one) for one in parts]))


def test_blocks_of_a_stack():
    rng = np.random.default_rng(0)
    stack = Stack(rng.normal(size=(3, 4, 2)), rng.normal(size=(3, 2, 5)))
    whole = stack.left @ stack.right
    for matrix, row, rows in ((0, 0, 4), (1, 2, 2), (2, 1, 1)):
        block = Block(None, matrix * 20 + row * 5, (rows, 5))
        np.testing.assert_allclose(product(stack.taken(block)), whole[matrix, row : row + rows])


def pair(many, rows, q, columns, seed):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in ((many, rows, q), (many, q, columns)))


PAIRS = [pair(2, 6, 2, 5, 0), None, pair(2, 6, 1, 5, 1)]
DELTAS = [np.zeros((2, 6, 5)) if one is None else one[0].astype(float) @ one[1].astype(float) for one in PAIRS]


def test_a_sum_is_exact():
    found = cores._sum([0.5, 9.0, -2.0], PAIRS, (2, 6, 5))
    assert found.left.shape == (2, 6, 3)
    np.testing.assert_allclose(found.left @ found.right, 0.5 * DELTAS[0] - 2 * DELTAS[2])
    assert cores._sum([0.0, 1.0, 1.0], PAIRS, (2, 6, 5)).left.shape == (2, 6, 1)
    nothing = cores._sum([], [], (2, 6, 5))
    assert nothing.left.shape == (2, 6, 0) and nothing.right.shape == (2, 0, 5)


def step_of(method="linear", chains=((), (), ()), weights=(1.0, 2.0, 3.0), **more):
    zeros = Input(ArrayBytes(np.zeros(240, np.uint8)), DTYPES["F32"], 60)
    return Merge(
        "w", DTYPES["F32"], (2, 6, 5), 0, 60, 0, 0, zeros, (zeros,) * 3, (0, 1, 2), weights, tuple(map(tuple, chains)),
        method, **more,
    )  # fmt: skip


DROP, KEEP = StageSpec("dare", {"drop_rate": 0.5, "rescale": "paper"}, 7), StageSpec(TRIM, {"keep_count": 30})


def test_which_merges_are_sums_and_with_what_coefficients():
    plain = step_of(parameters={"normalize": True}, factor=0.5)
    assert cores._is_sum(plain) and cores._coefficients(plain) == [1 / 12, 2 / 12, 3 / 12]
    summed = step_of("task_arithmetic", parameters={"normalize": False}, factor=0.5)
    assert cores._is_sum(summed) and cores._coefficients(summed) == [0.5, 1.0, 1.5]
    assert cores._coefficients(replace(plain, on_weights=True)) == [1 / 6, 2 / 6, 3 / 6]
    assert cores._is_sum(replace(plain, on_weights=True)) and not cores._is_sum(replace(summed, on_weights=True))
    assert not cores._is_sum(replace(plain, chains=((DROP,), (), ()))) and not cores._is_sum(
        replace(plain, base_weight=0.1)
    )
    assert not cores._is_sum(step_of("ties"))
    copied = replace(step_of("ties", base_weight=1.0), verbatim=True)
    assert cores._is_sum(copied) and cores._coefficients(copied) == [1.0]


def test_which_merges_may_be_made_in_core_space():
    assert cores._can_merge(step_of("ties", ((KEEP,), (DROP,), ()))) and cores._can_merge(step_of("ties"))
    counted = StageSpec("magnitude", {"drop_rate": 0.5, "rescale": "none"})
    for other in (
        step_of("ties", ((counted,), (), ())), step_of("ties", ((StageSpec(TRIM_AT, {}),), (), ())),
        step_of("ties", on_weights=True), step_of("ties", base_weight=0.1), step_of("slerp"),
        step_of("fisher", statistics=(None,)),
    ):  # fmt: skip
        assert not cores._can_merge(other)
    assert cores._can_merge(step_of("multislerp"))  # products of deltas


def test_a_basis_spans_what_it_is_made_of():
    rng = np.random.default_rng(2)
    columns = rng.normal(size=(6, 2)) @ rng.normal(size=(2, 4))
    found = cores._basis(columns)
    assert found.shape == (6, 2)
    np.testing.assert_allclose(found.T @ found, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(found @ found.T @ columns, columns, atol=1e-12)
    assert (found[np.abs(found).argmax(axis=0), [0, 1]] > 0).all()
    assert cores._basis(np.zeros((6, 3))).shape == (6, 1)


def test_core_space_loses_nothing_of_a_sum(monkeypatch):
    step = step_of("task_arithmetic", parameters={"normalize": False})
    found = cores._merged(step, PAIRS, (2, 6, 5))
    expected = DELTAS[0] + 2 * DELTAS[1] + 3 * DELTAS[2]
    np.testing.assert_allclose(found.left @ found.right, expected, atol=1e-5)
    assert found.left.shape == (2, 6, 3) and found.right.shape == (2, 3, 5)
    nothing = cores._merged(step, [None, None, None], (2, 6, 5))
    assert nothing.left.shape == (2, 6, 0) and nothing.right.shape == (2, 0, 5)
    still = np.float32([1, 0])[:, None, None]  # the second matrix does not change
    thinner = [(PAIRS[0][0] * still, PAIRS[0][1] * still), None, None]
    one = cores._merged(step, thinner, (2, 6, 5))
    np.testing.assert_allclose(one.left @ one.right, DELTAS[0] * np.array([1, 0])[:, None, None], atol=1e-5)
    huge = [(one[0] * np.float32(1e30), one[1] * np.float32(1e30)) if one else None for one in PAIRS]
    with (
        np.errstate(over="ignore", invalid="ignore"),
        pytest.raises(DataError, match=r"w: merging the adapters' cores gave NaN or Inf|w"),
    ):
        cores._merged(step, huge, (2, 6, 5))


def test_stages_on_cores_keep_their_share():
    assert cores._on_core(KEEP, 60, 18).parameters == {"keep_count": 9}
    assert cores._on_core(replace(KEEP, parameters={"keep_count": 1}), 60, 18).parameters == {"keep_count": 1}
    moved = cores._on_core(replace(DROP, places="somewhere"), 60, 18)
    assert moved.places is None and moved.parameters == DROP.parameters and moved.seed == 7


def test_ties_of_cores_is_ties_of_their_elements():
    """In core space the engine merges coordinates: the same as merging them by hand."""
    step = step_of("ties", ((KEEP,), (), (KEEP,)), weights=(1.0, 1.0, 1.0), parameters={"normalize": True})
    found = cores._merged(step, PAIRS, (2, 6, 5))
    u, v = found.left, found.right
    parts = [one for one in PAIRS if one is not None]
    lefts = np.stack([cores._basis(np.concatenate([one[0][e] for one in parts], axis=1)) for e in range(2)])
    rights = np.stack([cores._basis(np.concatenate([one[1][e] for one in parts], axis=0).T) for e in range(2)])
    mine = [lefts.swapaxes(1, 2) @ delta @ rights for delta in DELTAS]
    keep = 30 * 18 // 60
    for at in (0, 2):
        flat = mine[at].reshape(-1)
        flat[np.argsort(-np.abs(flat), kind="stable")[keep:]] = 0
    whole = np.array(mine)
    sign = np.where(whole.sum(axis=0) >= 0, 1, -1)
    agrees = (np.sign(whole) == sign) & (whole != 0)
    count = agrees.sum(axis=0)
    merged = np.where(count > 0, (whole * agrees).sum(axis=0) / np.maximum(count, 1), 0)
    np.testing.assert_allclose(u @ v, lefts @ merged @ rights.swapaxes(1, 2), atol=1e-5)


# --- where factors come from


def tensor(name="w", shape=(2, 3, 5), own=None):
    base = TensorInfo(name, "F32", shape, ArrayBytes(np.zeros(4 * int(np.prod(shape)), np.uint8)))
    return SimpleNamespace(name=name, base=base, models=(own or base,))


def test_modules_are_put_together_from_their_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    stacks = {name: Stack(rng.normal(size=(2, 3, 1)), rng.normal(size=(2, 1, 5))) for name in ("a", "b")}
    made = []

    def stack_of(model, base, *, approximate):
        made.append((model.name, approximate))
        return stacks.get(model.name)

    monkeypatch.setattr(cores, "stack_of", stack_of)
    one, two = tensor("a"), tensor("b")
    whole = {name: stack.left @ stack.right for name, stack in stacks.items()}
    found = Cores(approximate=True)
    target = Target("m", ((Block(one, 0, (3, 5)), Block(two, 20, (2, 5))), (Block(one, 15, (3, 5)),)))
    np.testing.assert_allclose(product(found.of(target, 0)), np.concatenate([whole["a"][0], whole["b"][1][1:]]))
    np.testing.assert_allclose(product(found.of(target, 1)), whole["a"][1])
    turned = replace(target, transposed=True)
    np.testing.assert_allclose(product(found.of(turned, 1)), whole["a"][1].T)
    assert made == [("a", True), ("b", True)]
    none = tensor("c")
    assert found.of(Target("m", ((Block(one, 0, (3, 5)), Block(none, 0, (3, 5))),)), 0) is None
    for at in range(9):
        found.of(Target("m", ((Block(tensor(f"t{at}"), 0, (3, 5)),),)), 0)
    assert len(found._known) <= 9 and "a" not in found._known
    unlike = SimpleNamespace(name="a", base=one.base, models=(tensor(shape=(2, 3, 4)).base,))
    for lacking in (
        unlike,
        SimpleNamespace(name="a", base=None, models=(one.base,)),
        SimpleNamespace(name="a", base=one.base, models=(None,)),
    ):
        assert Cores(approximate=False).of(Target("m", ((Block(lacking, 0, (3, 5)),),)), 0) is None


def test_a_tensor_that_nobody_changes_is_no_sum_at_all():
    one = tensor(shape=(3, 5))
    found = cores.stack_of(one.base, one.base, approximate=False)
    assert (
        found.left.shape == (1, 3, 0)
        and found.right.shape == (1, 0, 5)
        and cores.is_thin(one.base, one.base, approximate=False)
    )
    other = tensor(shape=(3, 5), own=None)
    moved = replace(other.base, source=type("Other", (ArrayBytes,), {})(np.ones(60, np.uint8)))
    assert cores.stack_of(moved, one.base, approximate=True) is None and not cores.is_thin(
        moved, one.base, approximate=True
    )
    assert [cores._matrices(SimpleNamespace(shape=shape)) for shape in ((5,), (3, 5), (2, 3, 5), (2, 3, 5, 7))] == [
        (1, 1, 5), (1, 3, 5), (2, 3, 5), (2, 3, 5),
    ]  # fmt: skip


def test_which_inputs_have_factors(monkeypatch):
    one = tensor().base
    sources = [
        SimpleNamespace(change=SimpleNamespace(matrices=(2, 6, 5)), pair=lambda pair=pair: pair) for pair in PAIRS
    ]
    sources[1] = None

    def asked(step, approximate=False):
        monkeypatch.setattr(
            cores, "_inputs_of", lambda model, base: cores._Inputs(tuple(sources[: 3 if step else 1]), step)
        )
        thin = cores.is_thin(one, one, approximate=approximate)
        found = cores.stack_of(one, one, approximate=approximate)
        assert thin == (found is not None)
        return None if found is None else found.left @ found.right

    np.testing.assert_allclose(asked(None), DELTAS[0])
    summed = step_of("task_arithmetic", parameters={"normalize": False})
    np.testing.assert_allclose(asked(summed), DELTAS[0] + 3 * DELTAS[2])
    trimmed = step_of("task_arithmetic", ((KEEP,), (), ()), parameters={"normalize": False})
    assert asked(trimmed) is None and asked(trimmed, True).shape == (2, 6, 5)
    assert asked(step_of("slerp"), True) is None
