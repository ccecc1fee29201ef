# SPDX-License-Identifier: Apache-2.0
"""Sparsifiers and merge methods as typed Python functions: what `darekit.merge_tensors` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from darekit.recipe import Sparsify

On = Literal["delta", "weights"]
Rescale = Literal["paper", "l1", "none"]
ParameterValue = float | str | Sequence[Mapping[str, Any]]  # a number, a word, or a list of {filter, value}


@dataclass(frozen=True)
class Method:
    """A merge method and its parameters, as in a recipe.

    Attributes:
        name: the method's name in recipes.
        parameters: name in recipes -> value; what is missing has its default.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


def sparsifier(
    method: str,
    drop_rate: float,
    *,
    seed: int = 0,
    keep_dense: Sequence[str] = (),
    on: On = "delta",
    **parameters: ParameterValue,
) -> Sparsify:
    """Any sparsifier by name. `dare`, `drop_only`, `magnitude`, `della` and `breadcrumbs` are the same, typed.

    Args:
        method: a name that `dare methods` lists.
        drop_rate: fraction of the elements that is dropped, in [0, 1].
        seed: the recipe seed from which each model's mask is derived.
        keep_dense: groups (embeddings, norms, biases, heads) or glob patterns of tensors that are not dropped.
        on: `delta`, or `weights` to drop from the fine-tuned weights themselves.
        **parameters: the sparsifier's own, by name: a number, a word, or a list of `{"filter": ..., "value": ...}`.
            They are checked when the sparsifier is used.

    Returns:
        What `merge_tensors` takes as `sparsify`.

    Examples:
        >>> dk.sparsifier("della", 0.7, window=0.2).parameters
        {'drop_rate': 0.7, 'window': 0.2}
    """
    return Sparsify(
        method=method,
        parameters={"drop_rate": drop_rate, **parameters},  # type: ignore[dict-item]  # filters are read as data
        on=on,
        seed=seed,
        keep_dense=tuple([keep_dense] if isinstance(keep_dense, str) else keep_dense),
    )


def dare(
    drop_rate: float,
    *,
    seed: int = 0,
    rescale: Rescale = "paper",
    q: float = 0.0,
    keep_dense: Sequence[str] = (),
    on: On = "delta",
) -> Sparsify:
    """DARE: drop elements at random and rescale the survivors, so that every element keeps its expectation.

    The formula: `darekit.methods.sparsifiers.dare`.

    Args:
        drop_rate: fraction of the elements that is dropped, in [0, 1].
        seed: the recipe seed from which each model's mask is derived.
        rescale: `paper` multiplies survivors by 1/(1-p), `l1` by what restores the tensor's L1 norm, `none` by 1.
        q: divide survivors by this instead of 1-p (DAREx), in (0, 1]; 0: as `rescale` says.
        keep_dense: groups (embeddings, norms, biases, heads) or glob patterns of tensors that are not dropped.
        on: `delta`, or `weights` to drop from the fine-tuned weights themselves.

    Returns:
        What `merge_tensors` takes as `sparsify`.

    Examples:
        >>> base = {"layer.weight": np.zeros(1000, np.float32)}
        >>> tuned = {"layer.weight": np.ones(1000, np.float32)}
        >>> merged = dk.merge_tensors(base, [tuned], sparsify=dk.dare(0.9, seed=42))
        >>> values, counts = np.unique(merged["layer.weight"], return_counts=True)
        >>> values.tolist(), counts.tolist()
        ([0.0, 10.0], [905, 95])
    """
    return sparsifier("dare", drop_rate, seed=seed, keep_dense=keep_dense, on=on, rescale=rescale, q=q)


def drop_only(drop_rate: float, *, seed: int = 0, keep_dense: Sequence[str] = (), on: On = "delta") -> Sparsify:
    """Drop elements at random and leave the survivors as they are: the paper's ablation.

    The formula: `darekit.methods.sparsifiers.drop_only`. The mask is that of `dare` at the same seed.

    Args:
        drop_rate: fraction of the elements that is dropped, in [0, 1].
        seed: the recipe seed from which each model's mask is derived.
        keep_dense: groups (embeddings, norms, biases, heads) or glob patterns of tensors that are not dropped.
        on: `delta`, or `weights` to drop from the fine-tuned weights themselves.

    Returns:
        What `merge_tensors` takes as `sparsify`.

    Examples:
        >>> base, tuned = {"w": np.zeros(8, np.float32)}, {"w": np.arange(8, dtype=np.float32)}
        >>> dk.merge_tensors(base, [tuned], sparsify=dk.drop_only(0.5, seed=42))["w"]
        array([0., 0., 0., 3., 0., 0., 6., 0.], dtype=float32)
    """
    return sparsifier("drop_only", drop_rate, seed=seed, keep_dense=keep_dense, on=on)


def magnitude(
    drop_rate: float, *, rescale: Rescale = "none", keep_dense: Sequence[str] = (), on: On = "delta"
) -> Sparsify:
    """Drop the smallest magnitudes of each tensor; nothing is random.

    The formula: `darekit.methods.sparsifiers.magnitude`. Of n elements, exactly n - int(p n) survive.

    Args:
        drop_rate: fraction p of the elements that is dropped, in [0, 1].
        rescale: `none`, `paper` (survivors times 1/(1-p)), or `l1` (times what restores the tensor's L1 norm).
        keep_dense: groups (embeddings, norms, biases, heads) or glob patterns of tensors that are not dropped.
        on: `delta`, or `weights` to drop from the fine-tuned weights themselves.

    Returns:
        What `merge_tensors` takes as `sparsify`.

    Examples:
        >>> base, tuned = {"w": np.zeros(8, np.float32)}, {"w": np.arange(8, dtype=np.float32)}
        >>> dk.merge_tensors(base, [tuned], sparsify=dk.magnitude(0.75))["w"]
        array([0., 0., 0., 0., 0., 0., 6., 7.], dtype=float32)
    """
    return sparsifier("magnitude", drop_rate, keep_dense=keep_dense, on=on, rescale=rescale)


def della(
    drop_rate: float,
    *,
    window: float = 0.14,
    seed: int = 0,
    rescale: Rescale = "paper",
    keep_dense: Sequence[str] = (),
    on: On = "delta",
) -> Sparsify:
    """DELLA's MAGPRUNE: drop at random, small magnitudes of a row more often than large ones.

    The formula: `darekit.methods.sparsifiers.della`.

    Args:
        drop_rate: mean fraction of the elements that is dropped, in [0, 1].
        window: width of the range of keep probabilities across a row, in [0, 1].
        seed: the recipe seed from which each model's mask is derived.
        rescale: `paper` multiplies each survivor by 1 over its own keep probability, `l1` by what restores the
            tensor's L1 norm, `none` by 1.
        keep_dense: groups (embeddings, norms, biases, heads) or glob patterns of tensors that are not dropped.
        on: `delta`, or `weights` to drop from the fine-tuned weights themselves.

    Returns:
        What `merge_tensors` takes as `sparsify`.

    Examples:
        >>> base, tuned = {"w": np.zeros(1000, np.float32)}, {"w": np.arange(1000, dtype=np.float32)}
        >>> sparse = dk.merge_tensors(base, [tuned], sparsify=dk.della(0.5, window=0.8, seed=42))["w"]
        >>> [int(np.count_nonzero(half)) for half in (sparse[:500], sparse[500:])]
        [135, 356]
    """
    return sparsifier("della", drop_rate, seed=seed, keep_dense=keep_dense, on=on, window=window, rescale=rescale)


def breadcrumbs(
    drop_rate: float,
    *,
    gamma: float = 0.01,
    rescale: Rescale = "none",
    keep_dense: Sequence[str] = (),
    on: On = "delta",
) -> Sparsify:
    """Model Breadcrumbs: drop the largest magnitudes of each tensor, and the smallest; nothing is random.

    The formula: `darekit.methods.sparsifiers.breadcrumbs`.

    Args:
        drop_rate: fraction of the elements that is dropped in all, in [0, 1].
        gamma: fraction of the elements that is dropped because they are the largest, in [0, 1].
        rescale: `none`, `paper` (survivors times 1/(1-p)), or `l1` (times what restores the tensor's L1 norm).
        keep_dense: groups (embeddings, norms, biases, heads) or glob patterns of tensors that are not dropped.
        on: `delta`, or `weights` to drop from the fine-tuned weights themselves.

    Returns:
        What `merge_tensors` takes as `sparsify`.

    Examples:
        >>> base, tuned = {"w": np.zeros(8, np.float32)}, {"w": np.arange(8, dtype=np.float32)}
        >>> dk.merge_tensors(base, [tuned], sparsify=dk.breadcrumbs(0.75, gamma=0.25))["w"]
        array([0., 0., 0., 0., 4., 5., 0., 0.], dtype=float32)
    """
    return sparsifier("breadcrumbs", drop_rate, keep_dense=keep_dense, on=on, gamma=gamma, rescale=rescale)


def merge_method(name: str, **parameters: ParameterValue) -> Method:
    """Any merge method by name; most have a typed function of their name, too.

    Args:
        name: a name that `dare methods` lists.
        **parameters: the method's own, by their names in recipes: a number, a word, or a list of
            `{"filter": ..., "value": ...}`. `lambda` is a Python keyword: pass `**{"lambda": 0.5}`. They are
            checked when the method is used.

    Returns:
        What `merge_tensors` takes as `method`.

    Examples:
        >>> dk.merge_method("ties", keep=0.2)
        Method(name='ties', parameters={'keep': 0.2})
    """
    return Method(name, parameters)
