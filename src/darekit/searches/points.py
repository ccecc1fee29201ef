# SPDX-License-Identifier: Apache-2.0
"""Candidates that are asked before the sampler chooses: the recipe as written, those that a file gives, and some that
are spread over the space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from darekit.errors import PlanError
from darekit.methods import MERGE_METHODS, SPARSIFIERS
from darekit.searches.data import Knob, Numbers, Search
from darekit.searches.space import midpoint, used_knobs
from darekit.trials.identities import digest_of
from darekit.trials.settings import data_of, value_in

SPREAD = 10  # candidates before the sampler has seen enough to choose: as many as Optuna's TPE draws at random

_NOTHING = object()


def point_of(knob: Knob, value: Any) -> dict[str, Any]:
    """What somebody writes for one setting -> a value for each of its dimensions.

    Raises:
        ValueError: it is none; in words, to stand after the setting's name.
    """
    if knob.choices is not None:
        plain = {} if knob.named else knob.choices
        label = next((label for label, settings in plain.items() if settings == {knob.name: value}), value)
        if label not in knob.choices:
            raise ValueError(f"{value!r} is not one of {', '.join(knob.choices)}")
        return {knob.name: label}
    parts = knob.groups or (None,)
    if isinstance(value, Mapping) and knob.groups:
        if {*value} != {*knob.groups}:
            raise ValueError(
                f"expected a value for each of {', '.join(knob.groups)}, found {', '.join(map(str, value))}"
            )
        given = [value[group] for group in knob.groups]
    else:
        given = [value] * len(parts)
    numbers = [number for one in given for number in _along(knob, one)]
    return dict(zip(knob.dimensions, numbers, strict=True))


def _along(knob: Knob, value: Any) -> list[float]:
    """One number for all control points, or one for each."""
    values = value if isinstance(value, list) else [value] * max(1, knob.layers)
    for one in values:
        if isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one):
            raise ValueError(f"expected a number{' for each control point' * bool(knob.layers)}, found {one!r}")
        if knob.numbers is not None and not knob.numbers.holds(one):
            raise ValueError(f"{one:g} is not in the range {_told(knob.numbers)}")
    if len(values) != max(1, knob.layers):
        raise ValueError(f"expected {max(1, knob.layers)} numbers, found {len(values)}")
    return values


def _told(numbers: Numbers) -> str:
    step = f" in steps of {numbers.step:g}" if numbers.step else ""
    return f"from {numbers.low:g} to {numbers.high:g}{step}"


def written_point(search: Search) -> dict[str, Any] | None:
    """The recipe as written, as a candidate; None where a range or the choices do not hold it. Of settings that do not
    concern it, it has the middle."""
    found = midpoint(search.knobs)
    data = data_of(search.recipe)
    unknown = []
    for knob in search.knobs:
        if knob.named:
            label = next((one for one, settings in (knob.choices or {}).items() if _is_so(data, settings)), None)
            if label is None:
                return None
            found[knob.name] = label
            continue
        value = value_in(data, knob.name, _NOTHING)
        if value is _NOTHING:
            value = _default(data, knob.name)
        if value is None:
            unknown.append(knob.name)
            continue
        try:
            found |= point_of(knob, value)
        except ValueError:
            return None
    return None if {*unknown} & used_knobs(search, found) else found


def _is_so(data: Any, settings: Mapping[str, Any]) -> bool:
    """Whether a recipe has these settings as it is."""
    return all(value_in(data, key) == value for key, value in settings.items())


def _default(data: Any, key: str) -> Any:
    """What holds where a recipe says nothing; None: it does not concern it."""
    name = key.rpartition(".")[2]
    method, sparsifier = value_in(data, "merge_method"), value_in(data, "sparsify.method")
    if key == "sparsify.seed":
        return 0
    shared = value_in(data, f"parameters.{name}") if key.startswith("models.") else None
    if shared is not None or name in ("weight", "lambda"):
        return 1.0 if shared is None else shared
    table, used = (SPARSIFIERS, sparsifier) if key.startswith("sparsify.") else (MERGE_METHODS, method)
    known: Any = table.get(used) if isinstance(used, str) else None
    parameter = known.parameters.get(name) if known is not None else None
    return None if parameter is None else parameter.default


def filled(search: Search, given: Mapping[str, Any]) -> dict[str, Any]:
    """A point with a value for every dimension: what is left out is as in the recipe, else in the middle."""
    return midpoint(search.knobs) | (written_point(search) or {}) | dict(given)


def spread_points(search: Search, count: int) -> list[dict[str, Any]]:
    """So many points that are spread over the space: of each range every part has one (a Latin hypercube), choices take
    turns, and control points over depth and groups have the same value: what all layers share is found first."""
    rng = np.random.Generator(np.random.Philox(int(digest_of("spread", search.seed)[:16], 16)))
    found: list[dict[str, Any]] = [{} for _ in range(count)]
    for knob in search.knobs:
        order = rng.permutation(count)
        offsets = rng.random(count)
        labels = [*(knob.choices or ())]
        for at, point in enumerate(found):
            share = float((order[at] + offsets[at]) / count)
            value = labels[int(order[at]) % len(labels)] if labels else _at(knob.numbers or Numbers(0.0, 1.0), share)
            point |= dict.fromkeys(knob.dimensions, value)
    return found


def _at(numbers: Numbers, share: float) -> float:
    """The number at a share of a range, from 0 to 1."""
    low, high = numbers.low, numbers.high
    if numbers.step is not None or numbers.whole:
        step = numbers.step or 1.0
        count = int((high - low) / step + 1e-9) + 1
        return low + step * min(count - 1, int(share * count))
    if numbers.log:
        return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return low + share * (high - low)


def first_points(search: Search) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """What is asked first: the recipe as written, where the space holds it; a file's own candidates; and, for a sampler
    that learns, some that are spread over the space."""
    point = written_point(search)
    written = [] if point is None else [point]
    given = [filled(search, one) for one in search.points]
    count = SPREAD - len(written) - len(given)
    return written, given, spread_points(search, max(0, count)) if search.sampler == "tpe" else []


def check_points(search: Search) -> None:
    """Complain about a file's candidates that are outside of a range, once all ranges are known.

    Raises:
        PlanError: one is.
    """
    numbers = {name: knob.numbers for knob in search.knobs for name in knob.dimensions}
    for i, point in enumerate(search.points):
        for name, value in point.items():
            known = numbers[name]
            if known is not None and not known.holds(value):
                raise PlanError(f"{search.places.at('try', i)}: {name}: {value:g} is not in the range {_told(known)}")
