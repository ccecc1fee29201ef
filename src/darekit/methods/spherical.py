# SPDX-License-Identifier: Apache-2.0
"""Merge methods that are sums of their inputs, with coefficients that depend only on how the inputs lie to each other.

Each takes `products`, (R, R) float64: the inner products of a tensor's R rows, which are the models or the deltas as
the table says (the base first, where it takes part), and returns the rows' coefficients, (R,) float64. Where the table
has `vectors` for it, each row of a matrix, or each column, may be a vector of its own: then it takes (..., R, R) and
returns (..., R). The engine measures the products and adds up the rows: a method here never sees a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import numpy as np
import numpy.typing as npt

from darekit.methods.kinds import MergeMethod, Vectors
from darekit.methods.merging import total_weight
from darekit.methods.parameters import Number, Switch

Products = npt.NDArray[np.float64]
Coefficients = npt.NDArray[np.float64]
Weights = npt.NDArray[np.float64]

PARALLEL = 0.9995  # |cosine| from which two tensors are interpolated along the straight line, as mergekit does
NORM_TINY = 1e-8  # norms up to it count as 1, as mergekit has it: such a tensor has no direction

DENOMINATOR_TINY = 1e-6  # of Model Stock's t, as mergekit has it

SHORTEST = 1e-7  # norms below it count as it in `nuslerp`, as mergekit has it
WEIGHTS_TINY = 1e-6  # sums of `nuslerp`'s weights below it mean halfway, as mergekit has it
# 1 - |cosine| that float32 rounds to 0, and with it mergekit: of nearly opposite vectors the arc's plane is rounding.
SAME_LINE = 2.0**-24

LENGTH_TINY = 1e-12  # of a mean of unit vectors in float64 that is nothing but rounding
SPAN_TINY = 1e-14  # squared distance from a span that is nothing but rounding
OPPOSITE = 1e-3  # radians from the far pole within which float32 knows no direction back


def slerp(
    products: Products,
    *,
    t: Annotated[
        float,
        Number(
            "how far to go: 0 is the base (or the first model), 1 the other model; beyond them, past it",
            -1,
            2,
            per_model=False,
        ),
    ],
) -> Coefficients:
    """Along the arc from the base to one other model, tensor by tensor: norms are kept where a straight line would
    shorten them. Nearly parallel tensors, as those of one family mostly are, are interpolated linearly.

    Source: Shoemake, Animating rotation with quaternion curves (SIGGRAPH 1985), section 3.3, of models as in
    mergekit (arXiv 2403.13257): with cos w = <a, b> / (|a| |b|), sin((1 - t) w) / sin w a + sin(t w) / sin w b;
    (1 - t) a + t b where |cos w| > 0.9995.
    """
    norms = np.sqrt(np.diagonal(products))
    first, second = np.where(norms > NORM_TINY, norms, 1.0)
    cosine = float(products[0, 1] / (first * second))
    if abs(cosine) > PARALLEL:
        return np.array([1 - t, t])
    angle = math.acos(cosine)
    return np.array([math.sin((1 - t) * angle), math.sin(t * angle)]) / math.sin(angle)


def nuslerp(products: Products, weights: Weights) -> Coefficients:
    """Along the arc between two models: with a base, between their deltas; as far as their weights say: the second
    one's share of their sum, halfway where that vanishes. Norms may differ: the result's lies between them.

    Source: Shoemake (SIGGRAPH 1985), section 3.3, as mergekit (arXiv 2403.13257) has it in NuSLERP: with
    t = w_2 / (w_1 + w_2) and cos w = <a, b> / (|a| |b|), sin((1 - t) w) / sin w a + sin(t w) / sin w b;
    (1 - t) a + t b where float32 cannot tell the cosine from 1 or -1.
    """
    if products.shape[-1] == 1:
        return np.ones(products.shape[:-1])
    total = float(weights.sum())
    t = 0.5 if abs(total) < WEIGHTS_TINY else float(weights[1]) / total
    norms = np.maximum(np.sqrt(np.diagonal(products, axis1=-2, axis2=-1)), SHORTEST)
    cosine = np.clip(products[..., 0, 1] / (norms[..., 0] * norms[..., 1]), -1.0, 1.0)
    line = 1 - np.abs(cosine) <= SAME_LINE
    angle = _each(math.acos, np.where(line, 0.0, cosine))
    sine = _each(math.sin, angle)
    first, second = (_each(math.sin, share * angle) / sine for share in (1 - t, t))
    return np.stack([np.where(line, 1 - t, first), np.where(line, t, second)], axis=-1)


def by_axis(
    *,
    nuslerp_flatten: Annotated[bool, Switch("the whole tensor is one vector")] = True,
    nuslerp_row_wise: Annotated[
        bool, Switch("without nuslerp_flatten: vectors along the first axis (columns), not along the last (rows)")
    ] = False,
) -> Vectors:
    """What is a vector to `nuslerp`: mergekit's two switches and their meaning."""
    if nuslerp_flatten:
        return "tensor"
    return "column" if nuslerp_row_wise else "row"


def multislerp(
    products: Products,
    weights: Weights,
    *,
    normalize_weights: Annotated[bool, Switch("divide the weights by their sum")] = True,
    eps: Annotated[
        float, Number("added to every norm; a mean direction that is shorter is none", 0, per_model=False)
    ] = 1e-8,
) -> Coefficients:
    """In the mean direction of the models: of their deltas where there is a base; with their mean norm. Where the
    directions cancel, the weighted sum itself; a single model is taken as it is, whatever its weight.

    Source: mergekit (arXiv 2403.13257), Multi-SLERP: with unit tensors u_k and M = sum w_k u_k, from M / |M| along the
    tangent sum w_k (u_k - <u_k, M> M / |M|^2), which is 0, so that sum w_k |x_k| M / |M| remains.
    """
    if len(weights) == 1:
        return np.ones(1)
    shares = weights / total_weight(weights) if normalize_weights else weights
    norms = np.sqrt(np.diagonal(products))
    if not norms.any():
        return shares
    mean = shares / (norms + eps if eps else np.where(norms > 0, norms, 1.0))
    length = math.sqrt(max(0.0, float((mean[:, None] * mean * products).sum())))
    if length < max(eps, LENGTH_TINY):
        return shares
    # After a step of length 0 the exponential map goes on by eps in no direction: cos(eps), which float64 rounds to 1.
    return mean * (float((shares * norms).sum()) * math.cos(eps) / length)


def karcher(
    products: Products,
    *,
    max_iter: Annotated[float, Number("steps towards the mean, at most", 0, per_model=False, whole=True)] = 10,
    tol: Annotated[float, Number("length of a step that is none: the mean is found", 0, 1, per_model=False)] = 1e-5,
) -> Coefficients:
    """The mean of the models on the sphere: the point nearest to the directions of the base, if there is one, and
    all models, with their mean norm. The base is one of the models, whether it is listed or not.

    Source: Karcher, Riemannian center of mass (CPAM 1977), of models as in arXiv 2603.04972 and mergekit: from
    the normalised mean m of the unit tensors u_k, m <- cos |v| m + sin |v| v / |v| with v the mean of
    (w / sin w) (u_k - cos w m), cos w = <u_k, m>, until |v| < tol. Tensors with a norm up to tol have no direction;
    one opposite to m has no shortest way to it, and does not pull.
    """
    if len(products) == 1:
        return np.ones(1)
    norms = np.sqrt(np.diagonal(products))
    some = norms > tol
    if not some.any():
        return np.zeros(len(norms))
    many = int(some.sum())
    units = _coordinates(products[np.ix_(some, some)] / (norms[some, None] * norms[some]))
    # The mean as coefficients of the units and as coordinates, whose differences keep their digits.
    mean = np.full(many, 1 / many)
    length = _length(_times(mean, units))
    mean = np.eye(many)[0] if length < max(tol, LENGTH_TINY) else mean / length
    for _ in range(int(max_iter)):
        here = _times(mean, units)
        cosines = np.clip((units * here).sum(axis=1), -1.0, 1.0)
        step = np.zeros(many)
        for k, cosine in enumerate(cosines.tolist()):
            angle = math.acos(cosine)
            if angle < tol or angle > math.pi - OPPOSITE:
                continue
            pull = angle / math.sin(angle) / many
            step -= pull * cosine * mean
            step[k] += pull
        size = _length(_times(step, units))
        if size < max(tol, LENGTH_TINY):
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        mean /= _length(_times(mean, units))
    found = np.zeros(len(norms))
    found[some] = mean / norms[some] * norms.mean()
    return found


def _coordinates(cosines: Products) -> Products:
    """(K, K) inner products of unit vectors -> (K, K): those vectors in K dimensions, by Cholesky's scheme. A vector
    that lies within the span of those before it has no new dimension."""
    many = len(cosines)
    found = np.zeros((many, many))
    for k in range(many):
        for j in range(k):
            if found[j, j] > 0:
                found[k, j] = (cosines[k, j] - (found[k, :j] * found[j, :j]).sum()) / found[j, j]
        rest = 1 - float((found[k, :k] * found[k, :k]).sum())
        found[k, k] = math.sqrt(rest) if rest > SPAN_TINY else 0.0
    return found


def _times(coefficients: Coefficients, units: Products) -> Coefficients:
    # Not `@`: BLAS adds up in an order of its own on every processor.
    found: Coefficients = (coefficients[:, None] * units).sum(axis=0)
    return found


def _length(vector: Coefficients) -> float:
    return math.sqrt(float((vector * vector).sum()))


def _each(function: Callable[[float], float], values: Coefficients) -> Coefficients:
    """A function of `math` of every value: numpy's own differ in the last bit from one processor to another."""
    return np.array([function(value) for value in values.reshape(-1).tolist()], np.float64).reshape(values.shape)


def by_filter(
    *, filter_wise: Annotated[bool, Switch("coefficients for each row, not for the whole tensor")] = False
) -> Vectors:
    """What is a vector to `model_stock`."""
    return "row" if filter_wise else "tensor"


def model_stock(products: Products) -> Coefficients:
    """Towards the average of the models only as far as they agree: the more their deltas point in different
    directions, the nearer the result stays to the base.

    Source: Model Stock (arXiv 2403.19522), section 4: t average + (1 - t) base, t = N c / (1 + (N - 1) c), for N
    models whose deltas have the mean cosine c; the base where 1 + (N - 1) c vanishes.
    """
    many = products.shape[-1]
    norms = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
    sizes = norms[..., :, None] * norms[..., None, :]
    first, second = np.triu_indices(many, 1)
    cosines = (products / np.where(sizes > 0, sizes, 1.0))[..., first, second]
    mean = cosines.mean(axis=-1) if many > 1 else np.ones(products.shape[:-2])  # one model agrees with itself
    below = 1 + (many - 1) * mean
    ratio = np.where(np.abs(below) < DENOMINATOR_TINY, 0.0, many * mean / np.where(below == 0, 1.0, below))
    return np.repeat(ratio[..., None] / many, many, axis=-1)


METHODS = (
    MergeMethod(slerp, models=(1, 1), products="models", base_row=True),
    MergeMethod(nuslerp, needs_base=False, models=(2, 2), products="deltas", vectors=by_axis),
    MergeMethod(multislerp, needs_base=False, products="deltas"),
    MergeMethod(karcher, needs_base=False, products="models", base_row=True),
    MergeMethod(model_stock, models=(2, float("inf")), products="deltas", vectors=by_filter),
)
