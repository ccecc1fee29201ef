# SPDX-License-Identifier: Apache-2.0
"""Merge methods that are sums of their inputs, with coefficients that depend only on how the inputs lie to each other.

Each takes `products`, (R, R) float64: the inner products of a tensor's R rows, which are the models or the deltas as
the table says (the base first, where it takes part), and returns the rows' coefficients, (R,) float64. Where the table
has `per_row` for it, it takes (..., R, R) and returns (..., R). The engine measures the products and adds up the rows:
a method here never sees a tensor.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import numpy.typing as npt

from darekit.methods.parameters import Number

Products = npt.NDArray[np.float64]
Coefficients = npt.NDArray[np.float64]

PARALLEL = 0.9995  # |cosine| from which two tensors are interpolated along the straight line, as mergekit does
NORM_TINY = 1e-8  # norms up to it count as 1, as mergekit has it: such a tensor has no direction


DENOMINATOR_TINY = 1e-6  # of Model Stock's t, as mergekit has it


def slerp(
    products: Products,
    *,
    t: Annotated[
        float, Number("how far to go: 0 is the base (or the first model), 1 the other model", 0, 1, per_model=False)
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
