# SPDX-License-Identifier: Apache-2.0
"""Parameters of methods, read from the functions themselves.

A method's keyword-only arguments ARE its parameters: name, default, and (through `typing.Annotated`) range and one
line of help. Recipe validation, the command line, the docs and the tests all read them from here.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from darekit.errors import MethodError


@dataclass(frozen=True, slots=True)
class Number:
    """A number in [low, high], without a fraction where `whole`; may be given per tensor, and per model where
    `per_model`.

    Attributes:
        help: what it means, in a line.
        low: the least value.
        high: the largest value.
        per_model: whether a model may have its own; a merge method's parameters are one for all models.
        whole: whether it has no fraction.
    """

    help: str
    low: float = float("-inf")
    high: float = float("inf")
    per_model: bool = True
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words.

    Attributes:
        help: what it means, in a line.
        of: the words.
    """

    help: str
    of: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Switch:
    """True or false.

    Attributes:
        help: what it means, in a line.
    """

    help: str


Kind = Number | Choice | Switch


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method; `default` is None where the user must give it."""

    name: str
    kind: Kind
    default: Any

    def problem(self, value: Any) -> str | None:
        """What is wrong with a single value (not a list of filters); None if nothing is."""
        match self.kind:
            case Number(low=low, high=high, whole=whole):
                if isinstance(value, bool) or not isinstance(value, int | float):
                    return f"{self.name} must be a number, found {value!r}"
                if not low <= value <= high:
                    hint = ""
                    if 1 <= high <= 2 and 2 <= value <= 100:
                        hint = f"; a percentage? write {value / 100:g}"
                    return f"{self.name} must be in [{low:g}, {high:g}], found {value!r}{hint}"
                if whole and value % 1 != 0:
                    return f"{self.name} must be a whole number, found {value!r}"
            case Choice(of=of):
                if value not in of:
                    return f"{self.name} must be one of {', '.join(of)}, found {value!r}"
            case Switch():
                if not isinstance(value, bool):
                    return f"{self.name} must be true or false, found {value!r}"
        return None


def parameters_of(function: Callable[..., Any]) -> dict[str, Parameter]:
    """Keyword-only arguments of a method -> its parameters, in order."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = {}
    for argument in inspect.signature(function).parameters.values():
        if argument.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        kind = kind_of(hints.get(argument.name))
        if kind is None:
            raise MethodError(
                f"{function.__name__}: its parameter {argument.name} must say what it takes, as {argument.name}: "
                'Annotated[float, Number("what it does", 0, 1)], or with a Choice or a Switch, or plainly as float, '
                f"int, bool or Literal[...]; found {argument}"
            )
        default = None if argument.default is inspect.Parameter.empty else argument.default
        name = argument.name.removesuffix("_")  # `lambda_`: the field's word is Python's too
        found[name] = Parameter(name, kind, default)
    return found


def kind_of(hint: Any) -> Kind | None:
    """An argument's annotation -> what it takes; None where the annotation does not say."""
    for item in getattr(hint, "__metadata__", ()):
        if isinstance(item, Kind):
            return item
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if hint is float:
        return Number("a number")
    if hint is int:
        return Number("a whole number", whole=True)
    if hint is bool:
        return Switch("true or false")
    words = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    if words and all(isinstance(word, str) for word in words):
        return Choice(f"one of {', '.join(words)}", words)
    return None
