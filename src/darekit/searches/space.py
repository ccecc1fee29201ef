# SPDX-License-Identifier: Apache-2.0
"""The space: knobs -> dimensions for the sampler; what it chooses -> a recipe."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from darekit.architectures.depth import layer_of
from darekit.errors import PlanError, RecipeError
from darekit.methods import MERGE_METHODS, SPARSIFIERS
from darekit.planning.homology import TAU, sample_norms, weighted_median
from darekit.planning.opening import open_plan
from darekit.planning.plan import Plan
from darekit.planning.rates import rate_within
from darekit.recipe import Recipe
from darekit.recipe.mergekit import weight_words
from darekit.searches.data import Knob, Numbers, Search
from darekit.trials.settings import data_of, is_fixed, recipe_with, value_in

Params = Mapping[str, Any]  # dimension -> what the sampler chose: a number, or a choice's name

DIGITS = 6  # significant ones of a number in a recipe: more would say nothing
REACH = 2.0  # how far beyond what `dare recommend` allows a range of drop rates goes, as a multiple of its tolerance

# Words in tensors' names, by what they belong to.
_PARTS = {
    "attention": re.compile(r"attn|attention|(^|\.)(q|k|v|o|qkv|c_attn)_proj(\.|$)"),
    "mlp": re.compile(r"mlp|ffn|feed_forward|experts|intermediate|moe|(^|\.)fc\d|dense_(h_to_4h|4h_to_h)"),
}
_WEIGHT = re.compile(r"models\.(\d+)\.parameters\.weight")
_PARAMETER = re.compile(r"(?:models\.\d+\.)?parameters\.([\w-]+)")


@dataclass(frozen=True)
class Tensors:
    """What the space must know of the models: patterns of names for each group, and the number of layers."""

    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    layers: int = 0


def dimension_data(knobs: Sequence[Knob]) -> dict[str, dict[str, Any]]:
    """Every dimension and its range or choices, in JSON-able form."""
    return {
        name: {"choices": [*knob.choices]} if knob.choices is not None else _numbers(knob).to_data()
        for knob in knobs
        for name in knob.dimensions
    }


def _numbers(knob: Knob) -> Numbers:
    assert knob.numbers is not None, f"{knob.name} is bound before it is used"
    return knob.numbers


def weight_knobs(knobs: Sequence[Knob]) -> list[Knob]:
    """Those that are weights of models."""
    return [knob for knob in knobs if _WEIGHT.fullmatch(knob.name) and knob.choices is None]


def midpoint(knobs: Sequence[Knob]) -> dict[str, Any]:
    """The middle of every range, the first of all choices."""
    found: dict[str, Any] = {}
    for knob in knobs:
        for name in knob.dimensions:
            numbers = knob.numbers or Numbers(0.0, 1.0)
            found[name] = next(iter(knob.choices)) if knob.choices else (numbers.low + numbers.high) / 2
            if numbers.whole or numbers.step:
                found[name] = numbers.low
    return found


def combinations(knobs: Sequence[Knob]) -> Iterator[dict[str, Any]]:
    """All that a grid tries, in order."""
    points = {
        name: [*knob.choices] if knob.choices is not None else steps_of(_numbers(knob))
        for knob in knobs
        for name in knob.dimensions
    }
    for values in itertools.product(*points.values()):
        yield dict(zip(points, values, strict=True))


def steps_of(numbers: Numbers) -> list[float]:
    """All values of a range with a step."""
    assert numbers.step is not None
    count = int((numbers.high - numbers.low) / numbers.step + 1e-9) + 1
    return [_rounded(numbers.low + i * numbers.step, numbers) for i in range(count)]


def candidate(search: Search, params: Params, tensors: Tensors | None = None, *, only: Knob | None = None) -> Recipe:
    """What the sampler chose -> the recipe.

    Args:
        search: the search.
        params: a value for each dimension.
        tensors: what is known of the models; None: nothing yet, for a check of the words alone.
        only: apply this knob alone; None: all.

    Raises:
        RecipeError: it makes no recipe.
    """
    knobs = [only] if only is not None else list(search.knobs)
    settings, used = _settings(search, knobs, params, tensors)
    return recipe_with(search.recipe, settings, {*used, *(knob.name for knob in knobs)}, None)


def choice_recipes(search: Search) -> list[Recipe]:
    """A recipe with each of the choices: they may name models that the recipe as written does not."""
    plain, search = midpoint(search.knobs), replace(search, weights_sum=None)
    found = []
    for knob in search.knobs:
        for label in knob.choices or ():
            with suppress(RecipeError):  # beside the first of all other choices; another one may suit it
                found.append(candidate(search, {**plain, knob.name: label}))
    return found


def used_knobs(search: Search, params: Params) -> set[str]:
    """Names of the knobs that concern the recipe of these choices."""
    return {*_settings(search, search.knobs, params, None)[1]}


def _settings(
    search: Search, knobs: Sequence[Knob], params: Params, tensors: Tensors | None
) -> tuple[dict[str, Any], list[str]]:
    named: dict[str, Any] = {}
    used: list[str] = []
    for knob in knobs:
        if knob.named:
            assert knob.choices is not None
            named |= knob.choices[params[knob.name]]
            used.append(knob.name)
    settings = dict(named)
    rest = [knob for knob in knobs if not knob.named and not is_fixed(knob.name, named)]
    for knob in rest:
        if knob.choices is not None:
            settings |= knob.choices[params[knob.name]]
    data = data_of(search.recipe)
    method, sparsifier = _methods(data, settings)
    for knob in rest:
        if not _concerns(knob.name, method, sparsifier):
            settings.pop(knob.name, None)
            continue
        used.append(knob.name)
    ranges = [knob for knob in rest if knob.choices is None and knob.name in used]
    values = {knob.name: _values(knob, params) for knob in ranges}
    if search.weights_sum is not None:
        _scale({k.name: values[k.name] for k in weight_knobs(ranges)}, search.weights_sum)
    for knob in ranges:
        settings[knob.name] = _value(knob, values[knob.name], tensors, value_in(data, knob.name))
    return settings, used


def _methods(data: Any, settings: Mapping[str, Any]) -> tuple[str, str | None]:
    """The merge method and the sparsifier that a recipe has."""
    method = str(settings.get("merge_method", value_in(data, "merge_method")))
    block = settings.get("sparsify", value_in(data, "sparsify"))
    if not isinstance(block, Mapping):
        return method, None
    return method, str(settings.get("sparsify.method", block.get("method")))


def _concerns(key: str, method: str, sparsifier: str | None) -> bool:
    """Whether a recipe of these methods has such a setting. What no method has does: it is refused."""
    sparse = SPARSIFIERS[sparsifier].parameters if sparsifier in SPARSIFIERS else {}
    if key.startswith("sparsify."):
        if sparsifier is None:
            return False
        others = {name for one in SPARSIFIERS.values() for name in one.parameters} - {*sparse}
        return key.removeprefix("sparsify.") not in others
    match = _PARAMETER.fullmatch(key)
    if match is None or method not in MERGE_METHODS:
        return True
    merge = {*MERGE_METHODS[method].parameters, *weight_words(method)}
    others = {n for one in MERGE_METHODS.values() for n in (*one.parameters, *weight_words(one.name))}
    others |= {name for one in SPARSIFIERS.values() for name in one.parameters}
    return match[1] not in others - merge - {*sparse}


# --- values ---


def _values(knob: Knob, params: Params) -> list[float]:
    """What was chosen for each of a knob's dimensions."""
    return [_rounded(float(params[name]), knob.numbers) for name in knob.dimensions]


def _rounded(value: float, numbers: Numbers | None = None) -> float:
    if numbers is not None and numbers.whole:
        return round(value)
    return float(f"{value:.{DIGITS}g}")


def _scale(weights: Mapping[str, list[float]], total: float) -> None:
    """Scale the models' weights so that they add up: at each control point, and in each group."""
    for at in range(len(next(iter(weights.values()), ()))):
        found = sum(values[at] for values in weights.values())
        if found < 1e-3 * sum(abs(values[at]) for values in weights.values()) or found == 0:
            raise RecipeError(f"the models' weights add up to {found:.3g} and cannot be scaled to {total:g}")
        for values in weights.values():
            values[at] = _rounded(values[at] * total / found)


def _value(knob: Knob, values: list[float], tensors: Tensors | None, written: Any) -> Any:
    """One setting's value as a recipe has it: a number, a gradient, or filters over names."""
    count = knob.layers or 1
    parts = [_along(knob, values[i : i + count], tensors) for i in range(0, len(values), count)]
    if not knob.groups:
        return parts[0]
    filters = [
        {"filter": pattern, "value": part}
        for group, part in zip(knob.groups, parts, strict=True)
        for pattern in ((f"*{group}*",) if tensors is None else tensors.groups[group])
    ]
    rest = written if isinstance(written, list) and all(isinstance(one, dict) for one in written) else None
    if rest is not None:
        return [*filters, *rest]
    return filters if written is None else [*filters, {"filter": "*", "value": written}]


def _along(knob: Knob, values: list[float], tensors: Tensors | None) -> Any:
    if not knob.layers:
        return values[0]
    if not knob.stepped or tensors is None:
        return values
    # A gradient with a number for each layer is a step.
    layers = max(tensors.layers, 2)
    return [values[i * knob.layers // layers] for i in range(layers)]


# --- what the models must say ---


def bind(search: Search, recipe: Recipe, folders: Sequence[Path]) -> tuple[Search, Tensors]:
    """Look at the models (headers, and a sample of values where a range is `auto`) -> the search with all its ranges.

    Raises:
        DarekitError: a model does not open; a group has no tensors; more control points than layers.
    """
    if not any(knob.groups or knob.layers or (knob.numbers is None and knob.choices is None) for knob in search.knobs):
        return search, Tensors()
    with open_plan(recipe, search=folders) as plan:
        tensors = _tensors(plan)
        knobs = tuple(_bound(search, knob, plan, tensors) for knob in search.knobs)
        notes = [
            f"{knob.name}: from 0 to {knob.numbers.high:g}, by the size of the deltas"
            for before, knob in zip(search.knobs, knobs, strict=True)
            if before.numbers is None and knob.numbers is not None
        ]
    return replace(search, knobs=knobs, notes=(*search.notes, *notes)), tensors


def _tensors(plan: Plan) -> Tensors:
    found: dict[str, dict[str, None]] = {}
    for tensor in plan.alignment.tensors:
        if tensor.copied:
            continue
        group = tensor.group or next((g for g, words in _PARTS.items() if words.search(tensor.name)), None)
        if group is not None:
            layer = layer_of(tensor.name)
            glob = ".".join("*" if word.isdecimal() else word for word in tensor.name.split("."))
            found.setdefault(group, {})[glob if layer else tensor.name] = None
    return Tensors({group: tuple(globs) for group, globs in found.items()}, max(plan.depths.stacks.values(), default=0))


def _bound(search: Search, knob: Knob, plan: Plan, tensors: Tensors) -> Knob:
    for group in knob.groups:
        if not tensors.groups.get(group):
            raise PlanError(
                f"{search.place_of(knob)}: the models have no tensors in the group {group}; they have "
                f"{', '.join(tensors.groups)}"
            )
    if knob.layers > tensors.layers:
        raise PlanError(
            f"{search.place_of(knob)}: {knob.layers} control points, but the models have {tensors.layers} "
            f"layers; write layers: {tensors.layers} or less"
        )
    if knob.numbers is not None or knob.choices is not None:
        return knob
    match = re.match(r"models\.(\d+)\.", knob.name)
    models = [int(match[1])] if match else range(len(plan.recipe.models))
    highest = []
    for k in models:
        norms = [n for n in sample_norms(plan.alignment.tensors, k, lambda tensor: (0.0, 0.0)) if n.r > 0]
        if norms:
            highest.append(rate_within(weighted_median((n.r, n.parameters) for n in norms), REACH * TAU))
    if not highest:
        raise PlanError(f"{search.place_of(knob)}: auto needs deltas, and none was seen; write {{low: 0, high: 0.9}}")
    return replace(knob, numbers=Numbers(0.0, min(highest)))
