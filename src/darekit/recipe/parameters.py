# SPDX-License-Identifier: Apache-2.0
"""Reading a block of parameters: numbers, switches and choices, gradients, filters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from darekit.methods import SEED, Choice, Number, Parameter, Switch
from darekit.recipe.documents import Document, Key, fail, shown
from darekit.recipe.values import AUTO, Filtered, Filters, Gradient, Stepped, Value

# PyYAML follows YAML 1.1, where 1e-5 without a point is text.
_EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]{1,4}")

# What mergekit's reader takes for a switch where it is written in quotes.
_WORDS = dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True) | dict.fromkeys(
    ("false", "f", "no", "n", "off", "0"), False
)


def read_parameters(
    document: Document, path: Key, allowed: Mapping[str, Parameter], skip: Sequence[str] = ()
) -> dict[str, Value]:
    """The block of parameters at a path; `skip`: keys of it that are none.

    Raises:
        RecipeError: a value of the wrong kind or out of range.
    """
    return {
        name: _read_value(document, (*path, name), allowed[name], value)
        for name, value in block_at(document, path).items()
        if name not in skip
    }


def block_at(document: Document, path: Key) -> Any:
    """What stands at a path; an empty mapping where nothing does."""
    found: Any = document.data
    for key in path:
        found = found.get(key) if isinstance(found, dict) else found[key]
        if found is None:
            return {}
    return found


def _read_value(document: Document, path: Key, parameter: Parameter, raw: Any) -> Value:
    if raw is None:
        fail(document, path, " has no value; give it one or remove the key")
    if parameter.name == SEED.name:
        return read_seed(document, path, raw)
    if not isinstance(parameter.kind, Choice):
        if isinstance(raw, list | dict):
            return _read_per_tensor(document, path, parameter, raw)
        return _read_one(document, path, parameter, raw)
    if isinstance(raw, list | dict):
        fail(document, path, f" must be one value for all tensors, found {shown(raw)}")
    if isinstance(raw, bool) or ("true" in parameter.kind.of and not isinstance(raw, str) and raw in (0, 1)):
        raw = str(bool(raw)).lower()
    _check_range(document, path, parameter, raw)
    return cast(Value, raw)


def _read_one(document: Document, path: Key, parameter: Parameter, raw: Any) -> float | str | bool:
    """A number or a switch."""
    if isinstance(parameter.kind, Number):
        return _read_number(document, path, parameter, raw)
    if isinstance(raw, str) and _as_mergekit(document):
        raw = switch_of(raw)
    elif not isinstance(raw, str) and raw in (0, 1):
        raw = bool(raw)  # mergekit's users write `normalize: 1.0`
    _check_range(document, path, parameter, raw)
    return cast(bool, raw)


def switch_of(raw: Any) -> Any:
    """A switch that is written in quotes, as mergekit reads it; anything else as it is."""
    return _WORDS.get(raw.strip().lower(), raw) if isinstance(raw, str) else raw


def _check_range(document: Document, path: Key, parameter: Parameter, value: Any) -> None:
    problem = parameter.problem(value)
    if problem is not None:
        fail(document, path, problem.removeprefix(parameter.name))


def _read_number(document: Document, path: Key, parameter: Parameter, raw: Any) -> float | str:
    if isinstance(raw, str):
        if raw == AUTO and parameter.name == "drop_rate":
            return AUTO
        raw = _number_of_text(document, path, raw)
    _check_range(document, path, parameter, raw)
    try:
        number = float(raw)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        fail(document, path, f" must be a finite number, found {shown(raw)}")
    return number


def _as_mergekit(document: Document) -> bool:
    """Whether values mean what they mean in mergekit: a recipe without a `sparsify:` block may be one of its."""
    return "merge_method" in document.data and "sparsify" not in document.data


def _number_of_text(document: Document, path: Key, raw: str) -> float:
    if _EXPONENT.fullmatch(raw):
        return float(raw)
    hint = "; write a number"
    try:
        number = float(raw.removesuffix("%"))
    except ValueError:
        pass
    else:
        if not raw.endswith("%") and _as_mergekit(document):
            return number  # in quotes, which mergekit reads
        hint = f"; a percentage? write {number / 100:g}" if raw.endswith("%") else "; write it without quotes"
    fail(document, path, f" must be a number, found the text {shown(raw)}{hint}")


def _per_tensor(parameter: Parameter) -> str:
    one, many = ("a number", "numbers (a gradient over the layers)")
    if isinstance(parameter.kind, Switch):
        one, many = "true or false", "these over the layers"
    return (
        f"expected {one}, a list of {many}, or a list of {{filter: part of a tensor's name, "
        f"value: {one.removeprefix('a ')}}}"
    )


def _read_per_tensor(document: Document, path: Key, parameter: Parameter, raw: Any) -> Filters | Gradient | Stepped:
    """A gradient, a filter or a list of filters."""
    expected = _per_tensor(parameter)
    if raw == [] or (isinstance(raw, dict) and "value" not in raw):
        fail(document, path, f"{expected}, found {shown(raw)}")
    if isinstance(raw, list) and not any(isinstance(entry, dict) for entry in raw):
        return _read_gradient(document, path, parameter, raw)
    found: list[Filtered] = []
    for i, entry in enumerate(raw if isinstance(raw, list) else [raw]):
        here = (*path, i) if isinstance(raw, list) else path
        if not isinstance(entry, dict):
            fail(document, here, f"{expected}, found {shown(entry)} among filters")
        value = entry.get("value")
        if value is None:
            fail(document, here, f"{expected}, found {shown(entry)} without a value")
        pattern = entry.get("filter", "*")
        if pattern is None or (pattern == "" and _as_mergekit(document)):
            pattern = "*"  # nothing is part of every name
        if not isinstance(pattern, str) or not pattern.removeprefix("="):
            fail(
                document,
                (*here, "filter"),
                f"expected part of a tensor's name, a glob or '*', found {pattern!r}",
            )
        if found and found[-1].filter == "*":
            fail(document, here, " is never reached: the entry before it matches every tensor; put that one last")
        if isinstance(value, list):
            found.append(Filtered(pattern, _read_gradient(document, (*here, "value"), parameter, value)))
        else:
            found.append(Filtered(pattern, _read_one(document, here, parameter, value)))
    return Filters(tuple(found))


def _read_gradient(document: Document, path: Key, parameter: Parameter, raw: list[Any]) -> Gradient | Stepped:
    """Numbers at equal distances over the layers, each within the parameter's range; or switches."""
    if not raw:
        fail(document, path, f"{_per_tensor(parameter)}, found {shown(raw)}")
    what = "true or false" if isinstance(parameter.kind, Switch) else "a number"
    within = document.clipped.get(parameter.name)
    if within is not None and isinstance(parameter.kind, Number):
        low, high = (own if math.isinf(end) else out for own, end, out in zip(
            (parameter.kind.low, parameter.kind.high), within, (-math.inf, math.inf), strict=True
        ))  # fmt: skip
        parameter = replace(parameter, kind=replace(parameter.kind, low=low, high=high))
    anchors: list[Any] = []
    for i, entry in enumerate(raw):
        here = (*path, i)
        if isinstance(entry, list | dict) or entry is None:
            fail(document, here, f" is part of a gradient and must be {what}, found {shown(entry)}")
        number = _read_one(document, here, parameter, entry)
        if isinstance(number, str):
            fail(
                document,
                here,
                f" is {number}, which a gradient cannot contain: write numbers, or use filters with value: {number}",
            )
        anchors.append(number)
    if isinstance(parameter.kind, Switch):
        return Stepped(tuple(anchors))
    beyond = within is not None and not all(within[0] <= anchor <= within[1] for anchor in anchors)
    return Gradient(tuple(anchors), within if beyond else None)


def read_seed(document: Document, path: Key, raw: Any) -> int:
    """A seed.

    Raises:
        RecipeError: it is no whole number of 64 bits.
    """
    if isinstance(raw, bool) or not isinstance(raw, int) or SEED.problem(raw) is not None:
        fail(document, path, f" must be a whole number from 0 to 2^64 - 1, found {shown(raw)}")
    return raw
