# SPDX-License-Identifier: Apache-2.0
"""Adding to the two tables of methods: what `darekit.register` offers, with the checks that every method must pass.

The tables change only here. What runs reads them by name, as it reads the built-in methods.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from darekit.errors import MethodError
from darekit.methods import MERGE_ALIASES, MERGE_METHODS, SPARSIFIERS, MergeMethod, Sparsifier
from darekit.methods.foreign import Foreign, checked_merge, checked_products, checked_sparsifier, checked_vectors
from darekit.methods.parameters import Number, Parameter, Switch, parameters_of

NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*([_-][A-Za-z0-9]+)*")
# What YAML reads as something else than text, what recipes say for themselves, and what the engine calls its stages.
NOT_NAMES = (
    "y", "n", "yes", "no", "on", "off", "true", "false", "null", "inf", "nan", "none", "auto", "base",
    "trim", "trim_model", "trim_at",
)  # fmt: skip
# What recipes, or the way in which a method is run, mean by these words already.
_OF_MODELS = (
    "weight", "weights", "scale", "seed", "density", "keep", "trim", "lambda", "tau", "stats", "model", "parameters",
    "filter", "value", "layer_range", "sources", "base_model",
)  # fmt: skip
RESERVED_BY_MERGES = (*_OF_MODELS, "drop_rate", "rescale", "int8_mask", "q")
RESERVED_BY_SPARSIFIERS = (*_OF_MODELS, "method", "on", "keep_dense")


def add_merge_method(
    function: Callable[..., Any], *, name: str | None, taken: Iterable[str] = (), shaped: bool, **fields: Any
) -> None:
    """Put a merge method into the table; `fields` are those of its entry.

    Raises:
        MethodError: it cannot be one; the message says what is wrong with it.
    """
    word = _word(function, name, taken)
    arguments, own = _arguments(function, word), parameters_of(function)
    _check_fields(word, fields)
    products = fields["products"]
    first = "products" if products else "deltas"
    allowed = [(first,), (first, "weights")]
    _check_signature(word, arguments, allowed, f"({first}, weights, *, ...), or without weights")
    vectors = fields["vectors"]
    lines = _vectors_of(word, vectors) if vectors is not None else {}
    _check_parameters(word, own | lines, RESERVED_BY_MERGES)
    if both := {*own} & {*lines}:
        raise MethodError(f"{word}: {', '.join(sorted(both))} is a parameter of the function and of its vectors")
    if "normalize" in own and not isinstance(own["normalize"].kind, Switch):
        raise MethodError(f"{word}: normalize means the same in all methods, a Switch; give the parameter another name")
    if vectors is not None:
        fields["vectors"] = checked_vectors(word, vectors)
    if products:
        called = checked_products(word, function, _whole(own))
    else:
        called = checked_merge(word, function, _whole(own))
    foreign = Foreign(word, function, _caller())
    MERGE_METHODS[word] = MergeMethod(called, foreign=foreign, shaped=shaped, **fields)


def add_sparsifier(
    function: Callable[..., Any], *, name: str | None, taken: Iterable[str] = (), random: bool | None, **fields: Any
) -> None:
    """Put a sparsifier into the table; `fields` are those of its entry.

    Raises:
        MethodError: it cannot be one; the message says what is wrong with it.
    """
    word = _word(function, name, taken)
    arguments, own = _arguments(function, word), parameters_of(function)
    form = "(delta, draws, *, drop_rate, ...), or without draws where nothing is random"
    _check_signature(word, arguments, [("delta",), ("delta", "draws")], form)
    drawn = "draws" in arguments
    if random and not drawn:
        raise MethodError(f"{word} is declared random, so it must take draws: {form}; found {_shown(arguments)}")
    _check_parameters(word, own, RESERVED_BY_SPARSIFIERS)
    rate = own.get("drop_rate")
    if rate is None or not isinstance(rate.kind, Number) or (rate.kind.low, rate.kind.high) != (0, 1):
        raise MethodError(
            f"{word}: a sparsifier needs the keyword-only argument drop_rate: DropRate, the fraction that it drops: "
            f"plans and reports count with it; found {_shown(arguments)}"
        )
    if fields.get("unbiased") and not drawn:
        raise MethodError(f"{word}: unbiased means a random drop with rescale; without draws nothing is random")
    _check_scope(word, fields["scope"])
    foreign = Foreign(word, function, _caller())
    SPARSIFIERS[word] = Sparsifier(
        checked_sparsifier(word, function, _whole(own), random=drawn), random=drawn if random is None else random,
        foreign=foreign, **fields,
    )  # fmt: skip


def remove(name: str) -> None:
    """Take a registered method out of its table.

    Raises:
        MethodError: there is none of this name, or it is a built-in one.
    """
    found = foreign_of(name)
    if found is None:
        known = ", ".join(one.name for one in registered()) or "none"
        raise MethodError(f"{name!r} is not a registered method; registered: {known}")
    for table in (SPARSIFIERS, MERGE_METHODS):
        table.pop(name, None)


def foreign_of(name: str) -> Foreign | None:
    """A registered method by its name; None for a built-in one, and for none at all."""
    return next((one for one in registered() if one.name == name), None)


def registered() -> tuple[Foreign, ...]:
    """All methods that are not built in, in the order of the tables."""
    found = [*(one.foreign for one in SPARSIFIERS.values()), *(one.foreign for one in MERGE_METHODS.values())]
    return tuple(foreign for foreign in found if foreign is not None)


# --- what can be registered ---


def _word(function: Any, name: str | None, taken: Iterable[str]) -> str:
    if not inspect.isfunction(function):
        raise MethodError(f"only a function can be a method; found {function!r}: define one that calls it")
    word = function.__name__ if name is None else name
    if not isinstance(word, str) or not NAME.fullmatch(word) or word.lower() in NOT_NAMES:
        raise MethodError(
            f"{word!r} cannot be a name in recipes: use letters, digits and single _ or - between them, and no word "
            "that means something in YAML or recipes (such as on, null, base, auto); give another one by name="
        )
    if word not in {*SPARSIFIERS, *MERGE_METHODS, *MERGE_ALIASES, *taken}:
        return word
    before = foreign_of(word)
    if before is None:
        raise MethodError(f"{word} is already a name of darekit's own; register {_of(function)} under another: name=")
    if _is_again(before.function, function):
        remove(word)
        return word
    raise MethodError(
        f"{word} is already the name of another method, {_of(before.function)}; register {_of(function)} under another "
        f"by name=, or take that one out first: dk.register.remove({word!r})"
    )


def _of(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _is_again(before: Callable[..., Any], now: Callable[..., Any]) -> bool:
    """Whether a function is the one of before, run or defined again: a cell of a notebook, a module reloaded."""
    if before is now:
        return True
    if _of(before) != _of(now):
        return False
    same = getattr(before, "__code__", None) == getattr(now, "__code__", None)
    return same or "<locals>" not in now.__qualname__


def _arguments(function: Callable[..., Any], word: str) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise MethodError(f"{word}: its signature cannot be read: {error}") from error


def _check_signature(
    word: str, arguments: dict[str, inspect.Parameter], allowed: Sequence[tuple[str, ...]], form: str
) -> None:
    kinds = inspect.Parameter
    arrays = tuple(
        name for name, one in arguments.items() if one.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    )
    loose = [one for one in arguments.values() if one.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    if arrays not in allowed or loose:
        raise MethodError(f"{word} must be called as {form}, its parameters after the *; found {_shown(arguments)}")


def _shown(arguments: dict[str, inspect.Parameter]) -> str:
    return str(inspect.Signature([one.replace(annotation=inspect.Parameter.empty) for one in arguments.values()]))


def _check_parameters(word: str, own: dict[str, Parameter], reserved: Sequence[str]) -> None:
    for name, parameter in own.items():
        if name in reserved or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise MethodError(
                f"{word}: a parameter of a method cannot be called {name}, which means something else in recipes "
                f"already; there are also {', '.join(one for one in reserved if one != name)}"
            )
        if parameter.default is None:
            continue
        if problem := parameter.problem(parameter.default):
            raise MethodError(f"{word}: a default is not what the parameter takes: {problem}")


def _check_scope(word: str, scope: Any) -> None:
    if scope not in ("element", "row", "tensor"):
        raise MethodError(f"{word}: scope must be element, row or tensor, found {scope!r}")


def _check_fields(word: str, fields: dict[str, Any]) -> None:
    _check_scope(word, fields["scope"])
    low, high = fields["models"]
    if not (type(low) is int and (type(high) is int or high == float("inf")) and 1 <= low <= high):
        raise MethodError(
            f"{word}: models must be (least, most) of 1 or more, most None for any number; found {low, high}"
        )
    products = fields["products"]
    if products not in (None, "models", "deltas"):
        raise MethodError(f"{word}: products must be models or deltas, found {products!r}")
    if products is None and (fields["base_row"] or fields["vectors"] is not None):
        raise MethodError(
            f'{word}: base_row and vectors belong to methods of products; add products="models" or "deltas"'
        )
    if products and (fields["scope"] != "element" or fields["trims"]):
        raise MethodError(
            f"{word}: scope and trims belong to methods of deltas, this one is of products; leave them out"
        )


def _whole(own: dict[str, Parameter]) -> frozenset[str]:
    return frozenset(name for name, one in own.items() if isinstance(one.kind, Number) and one.kind.whole)


def _vectors_of(word: str, vectors: Any) -> dict[str, Parameter]:
    if not inspect.isfunction(vectors):
        raise MethodError(f"{word}: vectors is a function from parameters to tensor, row or column; found {vectors!r}")
    _check_signature(word, _arguments(vectors, word), [()], "(*, ...) in its vectors")
    return parameters_of(vectors)


def _caller() -> str:
    """Name of the module that registers: the first one below darekit's own."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "") in (__name__, "darekit.register"):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "__main__"))
