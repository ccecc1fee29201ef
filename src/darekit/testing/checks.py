# SPDX-License-Identifier: Apache-2.0
"""What methods must do, one function each, and the lists that `darekit.testing.checks` makes of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from darekit import masks
from darekit.api import merge
from darekit.errors import DataError, PlanError, RecipeError
from darekit.methods import MERGE_METHODS, SPARSIFIERS, Choice, Number, Parameter, Switch
from darekit.testing.subjects import SEEDS, SHAPES, WEIGHTS, Subject, close, load, raw_of, same, save

DROP_RATE = 0.7
WIDE = ("F16", "F64")  # formats in which one tensor is tried, beside all of them in BF16 and F32


# --- what every method must do


def equals_formula(
    subject: Subject,
    *,
    dtypes: Sequence[str] = ("BF16", "F32"),
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    exact: bool = True,
) -> None:
    """Tensors of many sizes, in tiles and on threads, have the bits of the functions on whole tensors.

    Not `exact`: but for rounding, since products of whole tensors are sums that are added up in another order.

    Raises:
        AssertionError: they have not.
    """
    for dtype in dtypes:
        made = subject.family(dtype, shapes)
        found, expected = subject.merged(made.base, made.models, threads=2), subject.expected(made.base, made.models)
        if exact:
            same(found, expected, dtype)
        else:
            close(found, expected, dtype)


def _equals_formula(subject: Subject) -> None:
    exact = not subject.entry.products
    equals_formula(subject, exact=exact)
    equals_formula(subject, dtypes=WIDE, shapes=[(37, 129)], exact=exact)


def _any_tile(subject: Subject) -> None:
    made = subject.family("BF16")
    whole = subject.merged(made.base, made.models, threads=1)
    for tile, threads in ((64, 1), (1000, 2), (20_000, 7)):
        found = subject.merged(made.base, made.models, tile=tile, threads=threads)
        same(found, whole, f"tiles of {tile} elements on {threads} threads")


def _any_files(subject: Subject) -> None:
    if subject.statistics is not None:
        return
    made = subject.family("F32", [(70, 33), (130,), (40, 64)])
    expected = subject.merged(made.base, made.models)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        for parts in (1, 3):
            names = [f"{which}-{parts}" for which in ("base", *(f"m{k}" for k in range(len(made.models))))]
            for name, tensors in zip(names, (made.base, *made.models), strict=True):
                save(where / name, tensors, parts)
            entries = [
                {"model": str(where / name), "parameters": {"seed": SEEDS[k % 3] + k // 3}
                 | ({subject.entry.weight_word: WEIGHTS[k % 3]} if subject.entry.weighted else {})}
                for k, name in enumerate(names[1:])
            ]  # fmt: skip
            recipe: dict[str, Any] = {
                "base_model": str(where / names[0]), "models": entries,
                "merge_method": subject.merge[0], "parameters": dict(subject.merge[1]),
            }  # fmt: skip
            if subject.sparsify is not None:
                recipe["sparsify"] = {"method": subject.sparsify[0], **subject.sparsify[1]}
            size = 10**9 if parts == 1 else 4000
            merge(recipe, where / f"out-{parts}", threads=parts, shard_size=size, force=True)
            same(load(where / f"out-{parts}"), expected, f"{parts} files")


def _models_that_are_the_base(subject: Subject) -> None:
    if subject.entry.sums_models:
        return
    for dtype in ("BF16", "F32"):
        made = subject.family(dtype)
        copies = [{name: array.copy() for name, array in made.base.items()} for _ in made.models]
        same(subject.merged(made.base, copies), made.base, f"{dtype}: models that are the base")


def _again(subject: Subject) -> None:
    made = subject.family("F32")
    before = [raw_of(array).tobytes() for tensors in (made.base, *made.models) for array in tensors.values()]
    first = subject.merged(made.base, made.models)
    same(subject.merged(made.base, made.models), first, "the second time")
    after = [raw_of(array).tobytes() for tensors in (made.base, *made.models) for array in tensors.values()]
    assert before == after, "it has changed its inputs"


def _not_finite(subject: Subject) -> None:
    made = subject.family("F32", [(40, 64)])
    (name,), at = made.base, (3, 5)
    whole = subject.merged(made.base, made.models)[name]
    for bad in (np.nan, np.inf):
        spoilt = [dict(model) for model in made.models]
        spoilt[-1][name] = spoilt[-1][name].copy()
        spoilt[-1][name][at] = bad
        try:
            subject.merged(made.base, spoilt)
        except DataError:
            pass
        else:
            raise AssertionError(f"{bad} in a model went through")
        found = subject.merged(made.base, spoilt, allow_nonfinite=True)[name]
        assert found[at].tobytes() == made.base[name][at].tobytes(), f"where a model has {bad}, not the base's element"
        assert np.isfinite(found).all(), f"one {bad} made others"
        copied = subject.entry.keeps_one and len(made.models) == 1  # to the bit, where all is finite
        if _is_local(subject) and not copied:
            found[at] = whole[at]
            assert found.tobytes() == whole.tobytes(), f"one {bad} changed other elements, though scope is element"


def _is_local(subject: Subject) -> bool:
    """Whether an element of the result depends on that very element of the inputs alone."""
    entry, sparse = subject.entry, SPARSIFIERS[subject.sparsify[0]] if subject.sparsify else None
    scaled = subject.sparsify is not None and subject.sparsify[1].get("rescale") == "l1"
    trimmed = entry.trims and subject.merge[1].get("keep", 1) < 1
    merges = entry.scope == "element" and not entry.products and not trimmed
    return merges and not scaled and (sparse is None or sparse.scope == "element")


def _ranges(subject: Subject) -> None:
    """Every parameter at the ends of its range, and at every word."""
    made = subject.family("F32", [(40, 64)])
    name, given = subject.sparsify or subject.merge
    parameters = SPARSIFIERS[name].parameters if subject.sparsify else MERGE_METHODS[name].parameters
    for parameter in parameters.values():
        for value in _values(parameter):
            changed = (name, {**given, parameter.name: value})
            tried = replace(subject, sparsify=changed) if subject.sparsify else replace(subject, merge=changed)
            try:
                found = tried.merged(made.base, made.models)
            except (PlanError, RecipeError, DataError):  # it may refuse what does not go together
                continue
            for array in found.values():
                assert np.isfinite(array).all(), f"{parameter.name}: {value} makes NaN or Inf"


def _values(parameter: Parameter) -> Iterator[Any]:
    match parameter.kind:
        case Number(low=low, high=high):
            yield from (float(end) for end in (low, high) if np.isfinite(end) and end < 2**32)
        case Choice(of=of):
            yield from of
        case Switch():
            yield from (False, True)


COMMON: dict[str, Callable[[Subject], None]] = {
    "equals its function on whole tensors": _equals_formula,
    "does not depend on tiles and threads": _any_tile,
    "does not depend on files and shards": _any_files,
    "leaves the base where no model differs": _models_that_are_the_base,
    "gives the same again, and changes no input": _again,
    "refuses NaN and Inf, or keeps to the base there": _not_finite,
    "takes all that its parameters' ranges allow": _ranges,
}


# --- what merge methods must do


def _no_weight(subject: Subject) -> None:
    if not subject.entry.weighted:
        return
    made = subject.family("F32", [(40, 64)])
    try:
        found = subject.merged(made.base, made.models, weights=[0.0] * len(made.models))
    except PlanError:  # there is no mean
        return
    for array in found.values():
        assert np.isfinite(array).all(), "weights of 0 make NaN or Inf"


def _one_model(subject: Subject) -> None:
    if not subject.entry.keeps_one:
        return
    made = subject.family("BF16")
    plain = {name: value for name, value in subject.merge[1].items() if name not in ("lambda", "keep")}
    one = replace(subject, merge=(subject.merge[0], plain))
    function, parameters = subject.entry.function, {n: v for n, v in plain.items() if n in subject.entry.own_parameters}
    if subject.entry.statistics is None and not subject.entry.products:
        delta = np.array([[0.5, -0.25, 0.0]], np.float32)
        shaped = delta.reshape(1, 1, -1) if subject.entry.shaped else delta
        assert function(shaped, np.ones(1), **parameters).reshape(-1).tolist() == delta[0].tolist(), (
            "keeps_one: of one delta with weight 1 it makes another one"
        )
    if one.statistics is None:
        weights = [1.0] if subject.entry.weighted else None
        same(one.merged(made.base, made.models[:1], weights=weights), made.models[0], "one model of weight 1")


def _more_models(subject: Subject) -> None:
    if subject.statistics is not None:
        return
    low, high = subject.entry.models
    for many in sorted({low, int(min(high, 5)), int(min(high, 9))}):
        if many == 1 and subject.entry.keeps_one:  # copied to the bit, not computed
            continue
        made = subject.family("F32", [(20, 33)], models=many)
        found, expected = subject.merged(made.base, made.models), subject.expected(made.base, made.models)
        close(found, expected, f"{many} models")


def _without_a_base(subject: Subject) -> None:
    """A mean of models is the base plus that of their deltas, but for rounding."""
    if (
        subject.entry.needs_base
        or subject.entry.products
        or subject.entry.sums_models
        or subject.statistics is not None
    ):
        return
    made = subject.family("F64", [(40, 64)])
    switch = {subject.entry.mean_if: True} if subject.entry.mean_if else {}
    mean = replace(subject, merge=(subject.merge[0], {**subject.merge[1], **switch}))
    found, expected = mean.merged(None, made.models), mean.merged(made.base, made.models)
    for name, array in found.items():
        assert np.allclose(array, expected[name], rtol=1e-9, atol=1e-12), (
            "needs_base=False is for means: without a base the result must be that with one"
        )


def _after_a_drop(subject: Subject) -> None:
    dropped = replace(subject, sparsify=("dare", {"drop_rate": DROP_RATE}))
    equals_formula(dropped, dtypes=["BF16"], shapes=[(130, 517), (65,)], exact=not subject.entry.products)


OF_MERGES: dict[str, Callable[[Subject], None]] = {
    "stays finite with weights of 0, or refuses them": _no_weight,
    "keeps one model, if it says so": _one_model,
    "takes as many models as it says": _more_models,
    "is a mean, if it needs no base": _without_a_base,
    "goes after a sparsifier": _after_a_drop,
}


# --- what sparsifiers must do


def _drops_that_much(subject: Subject) -> None:
    assert subject.sparsify is not None
    rng = np.random.default_rng(1)
    base, model = {"w": np.zeros((200, 500), np.float32)}, {"w": rng.normal(size=(200, 500)).astype(np.float32)}
    rate = subject.sparsify[1]["drop_rate"]
    found = subject.merged(base, [model], weights=[1])["w"]
    share = 1 - np.count_nonzero(found) / found.size
    assert abs(share - rate) < 0.02, f"at drop_rate {rate:g} it drops {share:.3f} of the elements"


def _drops_all(subject: Subject) -> None:
    assert subject.sparsify is not None
    made = subject.family("BF16")
    every = replace(subject, sparsify=(subject.sparsify[0], {**subject.sparsify[1], "drop_rate": 1.0}))
    try:
        found = every.merged(made.base, made.models)
    except PlanError:
        return
    same(found, made.base, "at drop_rate 1 something is left")


def _draws(subject: Subject) -> None:
    assert subject.sparsify is not None
    made, random = subject.family("F32"), SPARSIFIERS[subject.sparsify[0]].random
    first, other = (subject.merged(made.base, made.models, seeds=seeds) for seeds in ((1, 2, 3), (4, 5, 6)))
    alike = all(raw_of(array).tobytes() == raw_of(other[name]).tobytes() for name, array in first.items())
    assert alike != random, "it is random, but the seed changes nothing" if random else "not random, but seeds matter"


def _keeps_expectations(subject: Subject) -> None:
    assert subject.sparsify is not None
    name, parameters = subject.sparsify
    if not SPARSIFIERS[name].unbiased or {"rescale", "q"} & {*parameters}:
        return
    rng = np.random.default_rng(2)
    delta = rng.normal(size=(1, 2048)).astype(np.float32)
    defaults = {p.name: p.default for p in SPARSIFIERS[name].parameters.values() if p.default is not None}
    total = float(np.square(delta, dtype=np.float64).sum())
    means = np.array([
        float((SPARSIFIERS[name].function(delta, masks.draws(seed, 7, 0, delta.size).reshape(delta.shape),
               **defaults | dict(parameters)).astype(np.float64) * delta).sum()) / total
        for seed in range(200)
    ])  # fmt: skip
    error = abs(means.mean() - 1) / max(1e-12, means.std() / np.sqrt(len(means)))
    assert error < 5, (
        f"unbiased, but on average {means.mean():.3f} of a delta is left ({error:.1f} standard errors off)"
    )


OF_SPARSIFIERS: dict[str, Callable[[Subject], None]] = {
    "drops as much as drop_rate says": _drops_that_much,
    "leaves nothing at drop rate 1": _drops_all,
    "is random or not, as it says": _draws,
    "keeps expectations, if it is unbiased": _keeps_expectations,
}
