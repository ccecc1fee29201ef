# SPDX-License-Identifier: Apache-2.0
"""Methods of your own, in the same tables as the built-in ones, so that recipes, sweeps and the lock know them.

```python
import darekit as dk
from darekit.register import Number
from typing import Annotated

@dk.register.merge_method
def pull(deltas, weights, *, power: Annotated[float, Number("how much large deltas count", 0, 8)] = 1.0):
    ...
```

Keyword-only arguments are the method's parameters in recipes, checked like any other: annotated with a `Number`, a
`Choice` or a `Switch`, which say what is allowed and what it means, or plainly as `float`, `int`, `bool` or
`Literal[...]`. One without a default must be given. The docstring is what `dare methods` shows. Arrays that a function
gets are read-only, and it is called from several threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

from darekit.methods import Choice, Number, Switch, registry
from darekit.methods.sparsifiers import DropRate
from darekit.recipe.mergekit import PRODUCTS

__all__ = ["Choice", "DropRate", "Number", "Switch", "merge_method", "remove", "sparsifier"]

Function = TypeVar("Function", bound=Callable[..., Any])
Scope = Literal["element", "row", "tensor"]


@overload
def merge_method(function: Function, /) -> Function: ...


@overload
def merge_method(
    *,
    name: str | None = None,
    scope: Scope = "element",
    needs_base: bool = True,
    models: tuple[int, int | None] = (1, None),
    keeps_one: bool = False,
    trims: bool = False,
    products: Literal["models", "deltas"] | None = None,
    base_row: bool = False,
    vectors: Callable[..., str] | None = None,
) -> Callable[[Function], Function]: ...


def merge_method(
    function: Function | None = None,
    /,
    *,
    name: str | None = None,
    scope: Scope = "element",
    needs_base: bool = True,
    models: tuple[int, int | None] = (1, None),
    keeps_one: bool = False,
    trims: bool = False,
    products: Literal["models", "deltas"] | None = None,
    base_row: bool = False,
    vectors: Callable[..., str] | None = None,
) -> Function | Callable[[Function], Function]:
    """Register a function as a merge method, with or without arguments.

    It is `(deltas, weights, *, ...)`: deltas, (K, n) float32 or float64, and the models' weights, (K,) float64, become
    the merged delta, (n,), which is multiplied by `lambda` and added to the base. Without an argument `weights`,
    recipes may not give any. With `products` it is `(products, *, ...)`, and `weights` may be its second argument:
    inner products of a tensor's rows, (R, R) float64, become the rows' coefficients, (R,), and the result is their sum.

    Args:
        function: the function, where the decorator has no arguments.
        name: the word in recipes; the function's name if not given.
        scope: what the function must see at once. `element`: any piece of a tensor, of any size. `row`: whole rows.
            `tensor`: the whole tensor, which is then in memory. For rows and tensors, deltas are (K, rows, columns),
            and so is the result without the K; a 1-D tensor is one row.
        needs_base: False for a mean: it also works without a base, on the models themselves.
        models: how many it takes besides the base, at least and at most; None: any number.
        keeps_one: of a single delta with weight 1 it makes that very delta.
        trims: each delta is first trimmed to its largest, as `ties` does it: recipes get `keep` and `trim`.
        products: of what the inner products are: of the `models`, whose weighted sum is the result, or of their
            `deltas`, whose weighted sum is added to the base.
        base_row: the base is one of the rows of `products`, the first.
        vectors: a function from keyword-only parameters, which the method then has too, to what has coefficients of its
            own: `tensor`, each `row` or each `column` of a matrix. With it the method takes (..., R, R) and returns
            (..., R).

    Returns:
        The function as it is, or the decorator.

    Raises:
        MethodError: the function cannot be a merge method, or the name is taken.

    Examples:
        >>> @dk.register.merge_method
        ... def strongest(deltas, weights):
        ...     \"\"\"Of each element the largest change, whoever made it.\"\"\"
        ...     votes = np.abs(weights[:, None] * deltas)
        ...     return np.take_along_axis(deltas, votes.argmax(axis=0)[None], axis=0)[0]
        >>> base, first, second = {"w": np.float32([0, 0])}, {"w": np.float32([3, 1])}, {"w": np.float32([-2, -5])}
        >>> dk.merge_tensors(base, [first, second], method="strongest")["w"]
        array([ 3., -5.], dtype=float32)
        >>> dk.register.remove("strongest")

        A method of products, which the engine measures on all threads: each model counts by the inverse of its
        delta's length.

        >>> @dk.register.merge_method(products="deltas")
        ... def equal_lengths(products, weights):
        ...     lengths = np.sqrt(np.diagonal(products))
        ...     return weights * lengths.mean() / np.where(lengths > 0, lengths, 1) / len(weights)
        >>> dk.merge_tensors(base, [{"w": np.float32([2, 0])}, {"w": np.float32([0, 4])}], method="equal_lengths")["w"]
        array([1.5, 1.5], dtype=float32)
        >>> dk.register.remove("equal_lengths")
    """
    low, high = _pair(models)
    fields = {
        "scope": scope, "needs_base": needs_base, "models": (low, high), "keeps_one": keeps_one, "trims": trims,
        "products": products, "base_row": base_row, "vectors": vectors,
    }  # fmt: skip

    def add(function: Function) -> Function:
        registry.add_merge_method(function, name=name, taken=PRODUCTS, shaped=scope != "element", **fields)
        return function

    return add if function is None else add(function)


def _pair(models: Any) -> tuple[Any, Any]:
    low, high = models if isinstance(models, tuple | list) and len(models) == 2 else (models, 0)
    return low, float("inf") if high is None else high


@overload
def sparsifier(function: Function, /) -> Function: ...


@overload
def sparsifier(
    *, name: str | None = None, scope: Scope = "element", random: bool | None = None, unbiased: bool = False
) -> Callable[[Function], Function]: ...


def sparsifier(
    function: Function | None = None,
    /,
    *,
    name: str | None = None,
    scope: Scope = "element",
    random: bool | None = None,
    unbiased: bool = False,
) -> Function | Callable[[Function], Function]:
    """Register a function as a sparsifier, with or without arguments.

    It is `(delta, draws, *, drop_rate, ...)`: delta, (rows, columns) float32 or float64, and draws, (rows, columns)
    uint32, uniform and the same for a seed on any machine, become a new delta in which the dropped elements are 0; or a
    mask of bool, True where an element is kept as it is. A sparsifier that draws nothing leaves `draws` out.

    Args:
        function: the function, where the decorator has no arguments.
        name: the word in recipes; the function's name if not given.
        scope: what the function must see at once. `element`: any piece of a tensor, given as one row. `row`: whole
            rows. `tensor`: the whole tensor. A 1-D tensor is one row.
        random: whether the result depends on draws; if not given, whether the function takes them.
        unbiased: a random drop with rescale, so that each element keeps its expectation; warnings about the noise that
            it makes, as those about DARE, need this.

    Returns:
        The function as it is, or the decorator.

    Raises:
        MethodError: the function cannot be a sparsifier, or the name is taken.

    Examples:
        >>> @dk.register.sparsifier(scope="row")
        ... def whole_columns(delta, *, drop_rate: dk.register.DropRate):
        ...     \"\"\"Keep the columns with the largest norms, whole.\"\"\"
        ...     norms = np.square(delta).sum(axis=0)
        ...     kept = np.argsort(-norms, kind="stable")[: round((1 - drop_rate) * len(norms))]
        ...     return np.isin(np.arange(len(norms)), kept) & np.ones(delta.shape, bool)
        >>> base, tuned = {"w": np.zeros((1, 4), np.float32)}, {"w": np.float32([[1, 4, 2, 3]])}
        >>> dk.merge_tensors(base, [tuned], sparsify=dk.sparsifier("whole_columns", 0.5))["w"]
        array([[0., 4., 0., 3.]], dtype=float32)
        >>> dk.register.remove("whole_columns")
    """

    def add(function: Function) -> Function:
        registry.add_sparsifier(function, name=name, taken=PRODUCTS, scope=scope, random=random, unbiased=unbiased)
        return function

    return add if function is None else add(function)


def remove(name: str) -> None:
    """Take a method that was registered out of the table again, as a test may have to.

    Args:
        name: the method's name.

    Raises:
        MethodError: no method of this name was registered.

    Examples:
        >>> dk.register.remove("dare")
        Traceback (most recent call last):
        darekit.errors.MethodError: 'dare' is not a registered method; registered: none
    """
    registry.remove(name)
