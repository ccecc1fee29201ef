# SPDX-License-Identifier: Apache-2.0
"""Functions of other people as the engine calls them: read-only arrays go in, what comes out is looked at, and whatever
they raise is told with the method's name."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from darekit.errors import DarekitError, MethodError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Foreign:
    """What is known of a registered method beside its entry in the table.

    Attributes:
        name: the word in recipes.
        function: the function as it was given.
        module: the module that registered it.
    """

    name: str
    function: Callable[..., Any]
    module: str


def checked_merge(name: str, function: Callable[..., Any], whole: frozenset[str]) -> Callable[..., Array]:
    """A merge of deltas, (K, ...) -> (...) of deltas' dtype. `whole`: parameters that the function gets as int."""

    @functools.wraps(function)
    def merge(deltas: Array, *weights: Array, **parameters: Any) -> Array:
        given = (_frozen(deltas), *map(_frozen, weights))
        return _array(name, _called(name, function, *given, **_cast(parameters, whole)), deltas, deltas.shape[1:])

    return merge


def checked_products(name: str, function: Callable[..., Any], whole: frozenset[str]) -> Callable[..., Array]:
    """From products, (..., R, R), to coefficients, (..., R) float64."""

    @functools.wraps(function)
    def coefficients(products: Array, **parameters: Any) -> Array:
        found = _called(name, function, _frozen(products), **_cast(parameters, whole))
        return _array(name, found, products, products.shape[:-1])

    return coefficients


def checked_vectors(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """From parameters to what is one vector."""

    @functools.wraps(function)
    def vectors(**parameters: Any) -> Any:
        found = _called(name, function, **parameters)
        if found not in ("tensor", "row", "column"):
            raise MethodError(f"{name}: its vectors must be tensor, row or column, found {found!r}")
        return found

    return vectors


def checked_sparsifier(
    name: str, function: Callable[..., Any], whole: frozenset[str], *, random: bool
) -> Callable[..., Array]:
    """A sparsifier, (rows, columns) -> the same; what it may give instead is a mask of what is kept."""

    @functools.wraps(function)
    def sparsify(delta: Array, draws: Array, **parameters: Any) -> Array:
        given = (_frozen(delta), _frozen(draws)) if random else (_frozen(delta),)
        found = _called(name, function, *given, **_cast(parameters, whole))
        if isinstance(found, np.ndarray) and found.dtype.kind == "b" and found.shape == delta.shape:
            return np.where(found, delta, delta.dtype.type(0))
        return _array(name, found, delta, delta.shape)

    return sparsify


def _cast(parameters: dict[str, Any], whole: frozenset[str]) -> dict[str, Any]:
    return {key: int(value) if key in whole else value for key, value in parameters.items()}


def _called(name: str, function: Callable[..., Any], *arrays: Array, **parameters: Any) -> Any:
    try:
        return function(*arrays, **parameters)
    except DarekitError:
        raise
    except Exception as error:  # whatever other people's code may raise
        hint = "; its arguments are read-only, since other steps need them: return a new array" if any(
            word in str(error) for word in ("read-only", "not writeable")
        ) else ""  # fmt: skip
        raise MethodError(f"{name} failed{_place_of(error)}: {type(error).__name__}: {error}{hint}") from error


def _array(name: str, found: Any, like: Array, shape: tuple[int, ...]) -> Array:
    """What a method gave, in `like`'s dtype, in memory of its own.

    Raises:
        MethodError: it is no array of real numbers of that shape, or has NaN or Inf where `like` has none.
    """
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu" or found.shape != shape:
        what = f"an array of {found.dtype}, shape {found.shape}" if isinstance(found, np.ndarray) else repr(found)[:80]
        raise MethodError(f"{name} must return an array of numbers of shape {shape}, found {what}")
    result = np.require(found, like.dtype, ("C", "W"))
    if np.may_share_memory(result, like):
        result = result.copy()
    if not np.isfinite(result).all() and np.isfinite(like).all():
        raise MethodError(f"{name} turned {like.size:,} finite numbers into NaN or Inf; it must return finite ones")
    return result


def _frozen(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


def _place_of(error: BaseException) -> str:
    """File and line where other people's code stood."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if one.filename != __file__]
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
