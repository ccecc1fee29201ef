# SPDX-License-Identifier: Apache-2.0
"""Sparsifiers and merge methods as typed Python functions: what `darekit.merge_tensors` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from darekit.recipe import Sparsify


@dataclass(frozen=True)
class Method:
    """A merge method and its parameters, as in a recipe."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


def sparsifier(
    method: str, drop_rate: float, *, seed: int = 0, keep_dense: Sequence[str] = (), on: str = "delta", **more: Any
) -> Sparsify:
    """Any sparsifier of the table by name, with its parameters; the functions below are the same, typed."""
    return Sparsify(
        method=method,
        parameters={"drop_rate": drop_rate, **more},
        on=on,  # type: ignore[arg-type]
        seed=seed,
        keep_dense=tuple(keep_dense),
    )


def dare(
    drop_rate: float,
    *,
    seed: int = 0,
    rescale: str = "paper",
    q: float = 0.0,
    keep_dense: Sequence[str] = (),
    on: str = "delta",
) -> Sparsify:
    """DARE: random drop, survivors times 1/(1-p), or 1/q where q > 0. See `darekit.methods.sparsifiers.dare`."""
    return sparsifier("dare", drop_rate, seed=seed, keep_dense=keep_dense, on=on, rescale=rescale, q=q)


def drop_only(drop_rate: float, *, seed: int = 0, keep_dense: Sequence[str] = (), on: str = "delta") -> Sparsify:
    """Random drop without rescale. See `darekit.methods.sparsifiers.drop_only`."""
    return sparsifier("drop_only", drop_rate, seed=seed, keep_dense=keep_dense, on=on)


def magnitude(
    drop_rate: float, *, rescale: str = "none", keep_dense: Sequence[str] = (), on: str = "delta"
) -> Sparsify:
    """Keep the largest magnitudes. See `darekit.methods.sparsifiers.magnitude`."""
    return sparsifier("magnitude", drop_rate, keep_dense=keep_dense, on=on, rescale=rescale)


def della(
    drop_rate: float,
    *,
    window: float = 0.14,
    seed: int = 0,
    rescale: str = "paper",
    keep_dense: Sequence[str] = (),
    on: str = "delta",
) -> Sparsify:
    """MAGPRUNE: small magnitudes drop more often. See `darekit.methods.sparsifiers.della`."""
    return sparsifier("della", drop_rate, seed=seed, keep_dense=keep_dense, on=on, window=window, rescale=rescale)


def breadcrumbs(
    drop_rate: float, *, gamma: float = 0.01, rescale: str = "none", keep_dense: Sequence[str] = (), on: str = "delta"
) -> Sparsify:
    """Drop the largest and the smallest magnitudes. See `darekit.methods.sparsifiers.breadcrumbs`."""
    return sparsifier("breadcrumbs", drop_rate, keep_dense=keep_dense, on=on, gamma=gamma, rescale=rescale)


def merge_method(name: str, **parameters: Any) -> Method:
    """Any merge method of the table by name, with its parameters; the functions below are the same, typed."""
    return Method(name, parameters)


def linear(*, normalize: bool = True) -> Method:
    """Weighted average of the models. See `darekit.methods.merging.linear`."""
    return Method("linear", {"normalize": normalize})


def task_arithmetic(*, lambda_: float = 1.0, normalize: bool = False) -> Method:
    """Base + lambda times the weighted sum of the deltas. See `darekit.methods.merging.task_arithmetic`."""
    return Method("task_arithmetic", {"lambda": lambda_, "normalize": normalize})


def ties(*, keep: float = 1.0, lambda_: float = 1.0, normalize: bool = True, trim: str = "tensor") -> Method:
    """Trim to `keep`, elect signs, disjoint mean. See `darekit.methods.merging.ties`."""
    return Method("ties", {"keep": keep, "lambda": lambda_, "normalize": normalize, "trim": trim})


def slerp(t: float) -> Method:
    """Along the arc from the base (`t` = 0) to one model (1). See `darekit.methods.spherical.slerp`."""
    return Method("slerp", {"t": t})


def fisher(*, minimal: float = 1e-6, normalize: bool = False) -> Method:
    """Each element counts by its diagonal Fisher; takes `statistics`. See `darekit.methods.informed.fisher`."""
    return Method("fisher", {"minimal": minimal, "normalize": normalize})


def regmean(*, off_diagonal: float = 0.9, ridge: float = 1e-6, normalize: bool = True) -> Method:
    """Least squares on each linear layer's inputs; takes `statistics`. See `darekit.methods.informed.regmean`."""
    return Method("regmean", {"off_diagonal": off_diagonal, "ridge": ridge, "normalize": normalize})
