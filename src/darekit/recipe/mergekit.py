# SPDX-License-Identifier: Apache-2.0
"""mergekit's recipes in darekit's words: its product names become sparsifier x merge method.

What mergekit calls `density` is 1 - drop rate (or `keep`, for `ties`); its `epsilon` is half of `window`. This is
the only place that knows those words. Names and meanings are mergekit 0.1.5's (an interface; its code is not used).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NoReturn

from darekit.methods import MERGE_METHODS, SCALE, SEED, SPARSIFIERS, WEIGHT, Choice, Number, Parameter, Switch
from darekit.recipe.values import Value, chained, mapped, scalars_of

Refuse = Callable[[tuple[str | int, ...], str], NoReturn]


@dataclass(frozen=True, slots=True)
class Product:
    """What one of mergekit's product names stands for; `normalize` is its default there."""

    sparsifier: str
    merge: str
    normalize: bool

    @property
    def random(self) -> bool:
        """Whether elements are dropped at random."""
        return SPARSIFIERS[self.sparsifier].random


PRODUCTS: dict[str, Product] = {
    "dare_linear": Product("dare", "task_arithmetic", normalize=False),
    "dare_ties": Product("dare", "ties", normalize=False),
    "breadcrumbs": Product("breadcrumbs", "task_arithmetic", normalize=False),
    "breadcrumbs_ties": Product("breadcrumbs", "ties", normalize=False),
    "della": Product("della", "ties", normalize=True),
    "della_linear": Product("della", "task_arithmetic", normalize=False),
}

# Every method of mergekit's, by its names.
METHODS = (
    "linear", "task_arithmetic", "ties", *PRODUCTS, "slerp", "nuslerp", "multislerp", "karcher", "passthrough", "sce",
    "model_stock", "nearswap", "arcee_fusion", "ram", "ramplus_tl",
)  # fmt: skip

# Those of them that take `lambda`; darekit's other methods on deltas take it too, which mergekit ignores there.
SCALED = ("task_arithmetic", "ties", *PRODUCTS)

DENSITY = Parameter("density", Number("fraction that is kept: 1 - drop_rate, or ties' keep", 0, 1), 1.0)
EPSILON = Parameter("epsilon", Number("half of della's window", 0, 0.5), 0.15)
GAMMA = SPARSIFIERS["breadcrumbs"].parameters["gamma"]
RESCALE = Parameter(
    "rescale", Choice("true: paper, false: none; l1 is mergekit's own", ("true", "false", "paper", "l1", "none")), None
)
INT8_MASK = Parameter("int8_mask", Switch("accepted, without effect"), None)

_OWN_WORDS: dict[str, Parameter] = {"gamma": GAMMA, "epsilon": EPSILON}
_SPARSIFIER_WORDS = {"breadcrumbs": "gamma", "della": "epsilon"}
_TRIM_WORDS = ("keep", "trim")  # mergekit's products never trim


def model_words(method: str) -> dict[str, Parameter]:
    """mergekit's (or a native) method name -> what a model's `parameters` may hold."""
    native = MERGE_METHODS[_merge_of(method)].parameters
    numbers = {name: p for name, p in native.items() if isinstance(p.kind, Number) and p.kind.per_model}
    return weight_words(method) | _sparse_words(method) | _without_trim(method, numbers) | {"seed": SEED}


def shared_words(method: str, *, ours: bool = True) -> dict[str, Parameter]:
    """mergekit's (or a native) method name -> what the top-level `parameters` may hold.

    `ours`: with what darekit alone takes there.
    """
    native = _without_trim(method, MERGE_METHODS[_merge_of(method)].parameters)
    if not ours and lambda_is_ours(method):
        native = {name: one for name, one in native.items() if name != "lambda"}
    common = {"rescale": RESCALE, "int8_mask": INT8_MASK, "seed": SEED}
    return weight_words(method) | _sparse_words(method) | native | common


def lambda_is_ours(method: str) -> bool:
    """Whether a method of mergekit's takes `lambda` here and not there."""
    return method in METHODS and method not in SCALED and "lambda" in MERGE_METHODS[method].parameters


def weight_words(method: str) -> dict[str, Parameter]:
    """`weight`, or the method's own word for it, where it takes any."""
    entry = MERGE_METHODS[_merge_of(method)]
    return {word.name: word for word in (WEIGHT, SCALE) if entry.weighted and word.name == entry.weight_word}


def _merge_of(method: str) -> str:
    return PRODUCTS[method].merge if method in PRODUCTS else method


def _sparse_words(method: str) -> dict[str, Parameter]:
    words = {"density": DENSITY} if method in PRODUCTS or MERGE_METHODS[_merge_of(method)].trims else {}
    own = _SPARSIFIER_WORDS.get(PRODUCTS[method].sparsifier) if method in PRODUCTS else None
    return words | ({own: _OWN_WORDS[own]} if own else {})


def _without_trim(method: str, words: Mapping[str, Parameter]) -> dict[str, Parameter]:
    return {name: p for name, p in words.items() if method not in PRODUCTS or name not in _TRIM_WORDS}


def advise(word: str, value: Any, method: str) -> str | None:
    """A parameter that `method` does not take -> what to write instead; None for an unknown word."""
    product = PRODUCTS.get(method)
    if word == WEIGHT.name:
        entry = MERGE_METHODS[_merge_of(method)]
        return f"{method} takes no weights{f'; write {entry.weight_word}' if entry.weighted else _instead(method)}"
    if word in _OWN_WORDS:
        owner = next(name for name, own in _SPARSIFIER_WORDS.items() if own == word)
        users = " and ".join(name for name, entry in PRODUCTS.items() if entry.sparsifier == owner)
        return f"{word} belongs to {users}, not to {method}"
    if word == "density":
        return (
            f"{method} drops nothing; dare_linear, dare_ties, della and breadcrumbs take a density, and so does ties, "
            "as its keep"
        )
    if product and word == "drop_rate":
        kept = complement(value) if _is_rate(value) else "1 - drop_rate"
        return (
            f"{method} is mergekit's form and takes density (1 - drop_rate): write density: {kept}, or the native form "
            f"`sparsify: {{method: {product.sparsifier}, drop_rate: ...}}` with `merge_method: {product.merge}`"
        )
    if product and word in _TRIM_WORDS:
        return (
            f"{method} does not trim; the native form does: `sparsify: {{method: {product.sparsifier}, ...}}` with "
            f"`merge_method: ties`"
        )
    if product and word == "window":
        return "mergekit's form takes epsilon, half of the window"
    return None


def _instead(method: str) -> str:
    own = list(MERGE_METHODS[method].own_parameters)
    return f"; its parameters are {' and '.join(own)}" if own else ""


def drop_rate_words(density: Any) -> str:
    """What to write as drop rate instead of a density."""
    return str(complement(density)) if _is_rate(density) else "1 - density"


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def complement(density: float) -> float:
    """1 - density, as the decimal that was meant.

    >>> complement(0.9), complement(0.1), complement(0.3)
    (0.1, 0.9, 0.7)
    """
    return float(1 - Decimal(repr(float(density))))


@dataclass(frozen=True, slots=True)
class Translation:
    """A recipe's methods and parameters in native words; `sparsifier` is None where nothing is sparsified."""

    merge_method: str
    shared: dict[str, Value]
    models: list[dict[str, Value]]
    sparsifier: str | None
    sparsify: dict[str, Value]
    seed: int | None
    notes: list[str]


def translate(
    method: str,
    shared: Mapping[str, Value],
    models: Sequence[tuple[tuple[str | int, ...], str, Mapping[str, Value]]],
    refuse: Refuse,
    *,
    lenient: bool = False,
) -> Translation:
    """mergekit's method, top-level parameters and (where it stands, model, its parameters) -> native words.

    A recipe in native words passes through as it is. `refuse(path, message)` raises where there is no meaning;
    `lenient`: what would be refused because it drops nothing, or would surprise, means what it means in mergekit.
    """
    rest = dict(shared)
    rescale, int8_mask, seed = (rest.pop(name, None) for name in ("rescale", "int8_mask", "seed"))
    parts = Translation(
        merge_method=_merge_of(method),
        shared=rest,
        models=[dict(own) for _, _, own in models],
        sparsifier=None,
        sparsify={},
        seed=seed if isinstance(seed, int) else None,
        notes=[],
    )
    if int8_mask is not None:
        parts.notes.append("int8_mask is accepted and has no effect: no mask is stored")
    if method in PRODUCTS:
        return _translate_product(method, parts, [name for _, name, _ in models], rescale, None if lenient else refuse)
    if MERGE_METHODS[method].trims:
        return _translate_ties(method, parts, [path for path, _, _ in models], rescale, refuse, lenient=lenient)
    if rescale not in (None, "false", "none"):
        parts.notes.append(f"parameters.rescale has no effect: {method} drops nothing, so there is nothing to rescale")
    return parts


def _translate_ties(
    method: str,
    parts: Translation,
    paths: Sequence[tuple[str | int, ...]],
    rescale: Value | None,
    refuse: Refuse,
    *,
    lenient: bool,
) -> Translation:
    scopes: list[tuple[tuple[str | int, ...], dict[str, Value]]] = [(("parameters",), parts.shared)]
    scopes += [((*path, "parameters"), own) for path, own in zip(paths, parts.models, strict=True)]
    dense = any("density" in own for _, own in scopes)
    for path, own in scopes:
        if dense and "keep" in own:
            refuse((*path, "keep"), f"{method}'s density and keep are the same quantity; keep only one of them")
    if rescale == "true" and lenient:
        parts.notes.append(
            f"{method}: rescale: true restores the L1 norm of what was trimmed, as in mergekit (rescale: l1)"
        )
        rescale = "l1" if dense else None
    rescaled = rescale not in (None, "false", "none")
    if rescale == "true":
        # 1/density on the LARGEST elements would blow the delta up (5x at 0.2); mergekit restores the L1 norm here.
        refuse(
            ("parameters", "rescale"),
            f"rescale: true after {method}'s trim is ambiguous: write rescale: l1 for mergekit's (the trimmed "
            "delta's L1 norm is restored), rescale: paper for 1/density, or remove it",
        )
    if rescaled and not dense:
        refuse(("parameters", "rescale"), f"{method} without a density trims nothing, so there is nothing to rescale")
    if not rescaled:
        for _, own in scopes:
            if "density" in own:
                own["keep"] = own.pop("density")
        return parts
    shared = parts.shared.pop("density", None)
    for own in parts.models:  # survivors are counted from the number as written
        own["density"] = _inherited(own.get("density"), shared, DENSITY.default)
        own["drop_rate"] = drop_rates(own["density"])
    parts.sparsify["drop_rate"] = 0.0
    parts.sparsify["rescale"] = str(rescale)
    parts.shared.setdefault("keep", 1.0)
    return dataclasses.replace(parts, sparsifier="magnitude")


def _translate_product(
    method: str, parts: Translation, names: Sequence[str], rescale: Value | None, refuse: Refuse | None
) -> Translation:
    product = PRODUCTS[method]
    shared_density = parts.shared.pop("density", None)
    densities = [_inherited(own.pop("density", None), shared_density, DENSITY.default) for own in parts.models]
    if product.random:
        _refuse_all_kept(method, parts, densities, refuse)
    for name, own, density in zip(names, parts.models, densities, strict=True):
        if set(scalars_of(density)) == {1.0}:
            parts.notes.append(f"{name} has density 1: nothing in it is dropped")
        own["drop_rate"] = drop_rates(density)
        if product.sparsifier == "breadcrumbs":
            own["density"] = density  # survivors are counted from the number as written
        if "epsilon" in own:
            own["window"] = mapped(own.pop("epsilon"), _doubled)
    if product.sparsifier == "della":
        parts.sparsify["window"] = mapped(
            _inherited(None, parts.shared.pop("epsilon", None), EPSILON.default), _doubled
        )
    if "gamma" in parts.shared:
        parts.sparsify["gamma"] = parts.shared.pop("gamma")
    if rescale is not None:
        # What is chosen by size has no expectation that 1/density would keep: mergekit's meaning is the only one.
        meant = "paper" if product.random else "l1"
        parts.sparsify["rescale"] = {"true": meant, "false": "none"}.get(str(rescale), rescale)
    if rescale == "true" and not product.random:
        parts.notes.append(f"{method}: rescale: true restores the delta's L1 norm, as in mergekit (rescale: l1)")
    parts.shared.setdefault("normalize", product.normalize)
    if MERGE_METHODS[product.merge].trims:
        parts.shared["keep"] = 1.0
    return dataclasses.replace(parts, sparsifier=product.sparsifier)


def _refuse_all_kept(method: str, parts: Translation, densities: Sequence[Value], refuse: Refuse | None) -> None:
    if densities and all(number == 1.0 for density in densities for number in scalars_of(density)):
        merge = PRODUCTS[method].merge
        if refuse is None:
            parts.notes.append(f"{method} with density 1 for every model drops nothing: it is {merge}, as in mergekit")
            return
        refuse(
            ("merge_method",),
            f"{method} with density 1 for every model drops nothing (density 1 is mergekit's silent default): set "
            f"density (0.1 drops 90 %) in each model's parameters or at the top level, or write merge_method: {merge}",
        )


def _inherited(*scopes: Value | None) -> Value:
    """The model's value, else the recipe's, else the default (which there always is), as one value."""
    found = chained(scopes)
    assert found is not None
    return found


def drop_rates(density: Value) -> Value:
    """1 - density, of every number in it."""
    return mapped(density, complement)


def _doubled(value: float) -> float:
    return 2 * value
