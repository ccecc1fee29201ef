# SPDX-License-Identifier: Apache-2.0
"""Merge methods as typed Python functions: what `darekit.merge_tensors` takes as `method`."""

from __future__ import annotations

from typing import Literal

from darekit.recipe.typed import Method


def linear(*, normalize: bool = True) -> Method:
    """Weighted average of the models, with or without a base.

    The formula: `darekit.methods.merging.linear`.

    Args:
        normalize: divide by the sum of the weights.

    Returns:
        What `merge_tensors` takes as `method`.

    Examples:
        >>> first, second = {"w": np.float32([0, 2])}, {"w": np.float32([4, 4])}
        >>> dk.merge_tensors(None, [first, second], method=dk.linear())["w"]
        array([2., 3.], dtype=float32)
        >>> dk.merge_tensors(None, [first, second], method=dk.linear(), weights=[3, 1])["w"]
        array([1. , 2.5], dtype=float32)
    """
    return Method("linear", {"normalize": normalize})


def task_arithmetic(*, lambda_: float = 1.0, normalize: bool = False) -> Method:
    """Task arithmetic: the base plus lambda times the weighted sum of the deltas.

    The formula: `darekit.methods.merging.task_arithmetic`.

    Args:
        lambda_: scale of the merged delta.
        normalize: divide by the sum of the weights.

    Returns:
        What `merge_tensors` takes as `method`.

    Examples:
        >>> base, first, second = {"w": np.float32([1, 1])}, {"w": np.float32([2, 1])}, {"w": np.float32([1, 3])}
        >>> dk.merge_tensors(base, [first, second], method=dk.task_arithmetic(lambda_=0.5))["w"]
        array([1.5, 2. ], dtype=float32)
    """
    return Method("task_arithmetic", {"lambda": lambda_, "normalize": normalize})


def ties(
    *, keep: float = 1.0, lambda_: float = 1.0, normalize: bool = True, trim: Literal["tensor", "model"] = "tensor"
) -> Method:
    """TIES: trim each delta to its largest magnitudes, elect a sign for each element, average the deltas that agree.

    The formula: `darekit.methods.merging.ties`.

    Args:
        keep: fraction of largest magnitudes that survives the trim, in [0, 1]; 1: no trim.
        lambda_: scale of the merged delta.
        normalize: take the mean of the deltas that agree; False: their sum.
        trim: what is trimmed to `keep`: each `tensor`, or the whole `model`.

    Returns:
        What `merge_tensors` takes as `method`.

    Examples:
        >>> base = {"w": np.float32([0, 0, 0])}
        >>> models = [{"w": np.float32([3, 1, 1])}, {"w": np.float32([1, -5, 1])}]
        >>> dk.merge_tensors(base, models, method=dk.ties())["w"]
        array([ 2., -5.,  1.], dtype=float32)
    """
    return Method("ties", {"keep": keep, "lambda": lambda_, "normalize": normalize, "trim": trim})


def slerp(t: float) -> Method:
    """Along the arc from the base to one model: norms are kept where a straight line would shorten them.

    The formula: `darekit.methods.spherical.slerp`.

    Args:
        t: how far to go: 0 is the base (or the first of two models), 1 the other model; beyond them (from -1 to 2),
            past it.

    Returns:
        What `merge_tensors` takes as `method`.

    Examples:
        >>> base, model = {"w": np.float32([1, 0])}, {"w": np.float32([0, 1])}
        >>> dk.merge_tensors(base, [model], method=dk.slerp(0.5))
        {'w': array([0.7071..., 0.7071...], dtype=float32)}
    """
    return Method("slerp", {"t": t})


def nuslerp(*, nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False) -> Method:
    """Along the arc between two models, or between their deltas where there is a base, as far as their weights say.

    The formula: `darekit.methods.spherical.nuslerp`.

    Args:
        nuslerp_flatten: the whole tensor is one vector.
        nuslerp_row_wise: without `nuslerp_flatten`: vectors along the first axis (columns), not along the last (rows).

    Returns:
        What `merge_tensors` takes as `method`.

    Examples:
        >>> first, second = {"w": np.float32([1, 0])}, {"w": np.float32([0, 1])}
        >>> dk.merge_tensors(None, [first, second], method=dk.nuslerp(), weights=[1, 1])
        {'w': array([0.7071..., 0.7071...], dtype=float32)}
    """
    return Method("nuslerp", {"nuslerp_flatten": nuslerp_flatten, "nuslerp_row_wise": nuslerp_row_wise})


def multislerp(*, normalize_weights: bool = True, eps: float = 1e-8) -> Method:
    """The mean direction of the models, or of their deltas where there is a base, with their mean norm.

    The formula: `darekit.methods.spherical.multislerp`.

    Args:
        normalize_weights: divide the weights by their sum.
        eps: added to every norm; a mean direction that is shorter is none.

    Returns:
        What `merge_tensors` takes as `method`.

    Examples:
        >>> first, second = {"w": np.float32([1, 0])}, {"w": np.float32([0, 3])}
        >>> dk.merge_tensors(None, [first, second], method=dk.multislerp())
        {'w': array([1.4142..., 1.4142...], dtype=float32)}
    """
    return Method("multislerp", {"normalize_weights": normalize_weights, "eps": eps})


def karcher(*, max_iter: int = 10, tol: float = 1e-5) -> Method:
    """Karcher mean: the direction that is nearest to those of all models, and of the base if there is one.

    The formula: `darekit.methods.spherical.karcher`.

    Args:
        max_iter: steps towards the mean, at most.
        tol: length of a step that is none: the mean is found.

    Returns:
        What `merge_tensors` takes as `method`.

    Examples:
        >>> models = [{"w": np.float32([1, 0])}, {"w": np.float32([0, 1])}]
        >>> dk.merge_tensors(None, models, method=dk.karcher())
        {'w': array([0.7071..., 0.7071...], dtype=float32)}
    """
    return Method("karcher", {"max_iter": max_iter, "tol": tol})


def model_stock(*, lambda_: float = 1.0, filter_wise: bool = False) -> Method:
    """Model Stock: from the base towards the models' average, as far as their deltas agree.

    The formula: `darekit.methods.spherical.model_stock`.

    Args:
        lambda_: scale of the merged delta.
        filter_wise: coefficients for each row, not for the whole tensor.

    Returns:
        What `merge_tensors` takes as `method`.

    Examples:
        >>> base = {"w": np.float32([0, 0, 0])}
        >>> models = [{"w": np.float32([2, 1, 0])}, {"w": np.float32([2, 0, 1])}]
        >>> dk.merge_tensors(base, models, method=dk.model_stock())["w"].round(3)
        array([1.778, 0.444, 0.444], dtype=float32)
    """
    return Method("model_stock", {"lambda": lambda_, "filter_wise": filter_wise})


def sce(*, select_topk: float = 1.0, floor: float = 1e-6, lambda_: float = 1.0) -> Method:
    """SCE: the elements in which the models differ most, models weighted by energy, signs elected.

    The formula: `darekit.methods.surveyed.sce`.

    Args:
        select_topk: fraction, of the elements whose deltas differ at all, that is merged, in [0, 1].
        floor: models count alike where their deltas' mean squares sum to less; 0: never.
        lambda_: scale of the merged delta.

    Returns:
        What `merge_tensors` takes as `method`.

    Examples:
        >>> base = {"w": np.float32([0, 0, 0, 0])}
        >>> models = [{"w": np.float32([3, 1, 1, 0])}, {"w": np.float32([1, -5, 1, 2])}]
        >>> dk.merge_tensors(base, models, method=dk.sce(select_topk=0.5))["w"]
        array([ 0., -5.,  0.,  0.], dtype=float32)
    """
    return Method("sce", {"select_topk": select_topk, "floor": floor, "lambda": lambda_})


def nearswap(t: float, *, lambda_: float = 1.0) -> Method:
    """NearSwap: one model's elements where they are within t of the base's, and t towards it elsewhere.

    The formula: `darekit.methods.merging.nearswap`.

    Args:
        t: how far an element may move from the base's towards the model's, 0 or more.
        lambda_: scale of the merged delta.

    Returns:
        What `merge_tensors` takes as `method`.

    Examples:
        >>> base, model = {"w": np.float32([0, 0, 0])}, {"w": np.float32([0.25, 2, -4])}
        >>> dk.merge_tensors(base, [model], method=dk.nearswap(0.5))["w"]
        array([ 0.25,  0.5 , -0.5 ], dtype=float32)
    """
    return Method("nearswap", {"t": t, "lambda": lambda_})


def arcee_fusion(*, lambda_: float = 1.0) -> Method:
    """Arcee Fusion: only the outliers among the changes of one model.

    The formula: `darekit.methods.surveyed.arcee_fusion`.

    Args:
        lambda_: scale of the merged delta.

    Returns:
        What `merge_tensors` takes as `method`.

    Examples:
        >>> base, model = {"w": np.zeros(5, np.float32)}, {"w": np.float32([0.1, 0.2, 0.1, 3, 0.1])}
        >>> dk.merge_tensors(base, [model], method=dk.arcee_fusion())["w"]
        array([0., 0., 0., 3., 0.], dtype=float32)
    """
    return Method("arcee_fusion", {"lambda": lambda_})


def ram(*, epsilon: float = 1e-5, lambda_: float = 1.0) -> Method:
    """Reinforced Agent Merging: the mean, of each element, of the deltas that change it.

    The formula: `darekit.methods.merging.ram`.

    Args:
        epsilon: an element that changed by no more counts as unchanged.
        lambda_: scale of the merged delta.

    Returns:
        What `merge_tensors` takes as `method`.

    Examples:
        >>> base = {"w": np.float32([0, 0, 0])}
        >>> models = [{"w": np.float32([2, 0, 1])}, {"w": np.float32([0, 4, 3])}]
        >>> dk.merge_tensors(base, models, method=dk.ram())["w"]
        array([2., 4., 2.], dtype=float32)
    """
    return Method("ram", {"epsilon": epsilon, "lambda": lambda_})


def ramplus_tl(*, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5, lambda_: float = 1.0) -> Method:
    """RAM+ per tensor: `ram` in which a model's own part is amplified, the more of its changes it shares.

    The formula: `darekit.methods.surveyed.ramplus_tl`.

    Args:
        r: how much is added for each unit of the ratio of shared to unique elements.
        alpha: largest ratio that counts.
        epsilon: an element that changed by no more counts as unchanged.
        lambda_: scale of the merged delta.

    Returns:
        What `merge_tensors` takes as `method`.

    Examples:
        >>> base = {"w": np.float32([0, 0, 0])}
        >>> models = [{"w": np.float32([2, 0, 1])}, {"w": np.float32([0, 4, 3])}]
        >>> dk.merge_tensors(base, models, method=dk.ramplus_tl(r=0.5, alpha=1.0))["w"]
        array([3., 6., 2.], dtype=float32)
    """
    return Method("ramplus_tl", {"r": r, "alpha": alpha, "epsilon": epsilon, "lambda": lambda_})


def fisher(*, minimal: float = 1e-6, normalize: bool = False) -> Method:
    """Fisher merging: an average in which each element counts by its diagonal Fisher; needs `statistics`.

    The formula: `darekit.methods.informed.fisher`.

    Args:
        minimal: added to every Fisher, so that elements without one are averaged.
        normalize: divide each model's Fisher by its norm, so that no model outweighs the others.

    Returns:
        What `merge_tensors` takes as `method`.

    Examples:
        >>> first, second = {"w": np.float32([0, 0])}, {"w": np.float32([4, 4])}
        >>> sure = [{"w": np.float32([1, 3])}, {"w": np.float32([1, 1])}]
        >>> dk.merge_tensors(None, [first, second], method=dk.fisher(), statistics=sure)["w"].round(3)
        array([2., 1.], dtype=float32)
    """
    return Method("fisher", {"minimal": minimal, "normalize": normalize})


def regmean(*, off_diagonal: float = 0.9, ridge: float = 1e-6, normalize: bool = True) -> Method:
    """RegMean: the linear layer whose outputs are closest to every model's own; needs `statistics`.

    The formula: `darekit.methods.informed.regmean`. Tensors without statistics are averaged.

    Args:
        off_diagonal: factor of the Grams' off-diagonal elements, in [0, 1].
        ridge: added to the diagonal, relative to its mean.
        normalize: divide each Gram by its number of rows.

    Returns:
        What `merge_tensors` takes as `method`.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> models = [{"w": rng.normal(size=(2, 3)).astype(np.float32)} for _ in range(2)]
        >>> inputs = [rng.normal(size=(64, 3)).astype(np.float32) for _ in models]
        >>> grams = [{"w": x.T @ x / len(x)} for x in inputs]
        >>> merged = dk.merge_tensors(None, models, method=dk.regmean(off_diagonal=1.0), statistics=grams)
        >>> merged["w"].shape
        (2, 3)
    """
    return Method("regmean", {"off_diagonal": off_diagonal, "ridge": ridge, "normalize": normalize})
