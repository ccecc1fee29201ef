# SPDX-License-Identifier: Apache-2.0
"""Drop rates from the size of each tensor's delta: within a tolerance tau, or within a budget of kept elements.

Dropping at random with rescale replaces an element d by d / (1-p) with probability 1-p and by 0 otherwise: the mean
stays, the variance is p/(1-p) d^2. So the output of a linear layer moves by

    E ||noise||^2 = p/(1-p) sum_ij dW_ij^2 ||X_j||^2

over the inputs X (X_j: input j of all tokens). For inputs without a preferred direction that is, relative to the
layer's output, rho^2 = p/(1-p) r^2 with r = ||dW||_F / ||W||_F, and rho <= tau where p <= tau^2 / (tau^2 + r^2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from darekit.architectures.depth import Depths
from darekit.architectures.groups import is_kept_dense
from darekit.errors import NotFetched
from darekit.planning.homology import TAU, Norms, p_max, sample_norms
from darekit.planning.matching.alignment import AlignedTensor
from darekit.planning.settings import place_in, place_of
from darekit.recipe import AUTO, Filtered, Filters, Recipe, resolve
from darekit.recipe.values import scalars_of

MOST = 0.99  # above it neither small models nor the paper's 7B and 13B ones kept their abilities

# Measured on one model of 135M parameters with three abilities (exact match, and perplexity on English prose).
PAYS_FIRST = (
    "general language suffers before the ability does: on a model of 135M parameters perplexity rose by 3 to 8 % at "
    "0.99, where abilities held, and by 28 to 62 % at 0.999, where they fell by 3.5 to 14 points"
)

_DIGITS = 4


def rate_within(r: float, tau: float) -> float:
    """Relative size of a delta, tolerance -> the drop rate to write down: p_max, at most `MOST`, rounded down.

    0 where nothing was seen to change: there is nothing to gain, and a sample may have missed it.

    >>> rate_within(0.1, 0.2), rate_within(1e-3, 0.2), rate_within(0.0, 0.2)
    (0.8, 0.99, 0.0)
    """
    return rounded_down(min(p_max(r, tau), MOST)) if r > 0 else 0.0


def rounded_down(rate: float) -> float:
    """A drop rate with four digits, never above what it was.

    >>> rounded_down(0.97859)
    0.9785
    """
    scale = 10**_DIGITS
    return float(math.floor(rate * scale + 1e-9) / scale)


def spend(sizes: Sequence[int], costs: Sequence[float], kept: float) -> list[float]:
    """Spend a budget of kept elements where it lowers the total perturbation most.

    Minimise sum_t c_t p_t / (1 - p_t) over drop rates p_t in [0, 1], subject to sum_t n_t (1 - p_t) = B. With k = 1 - p
    the cost is c (1/k - 1), convex in k. At the minimum there is one price lambda (a Lagrange multiplier) with

        c_t / k_t^2 = lambda n_t    =>    k_t = sqrt(c_t / n_t) / sqrt(lambda)

    wherever 0 < k_t < 1; a tensor whose k_t would exceed 1 is kept whole (k_t = 1), and its n_t is taken from B for the
    others. Tensors are clamped in descending order of c_t / n_t, so one walk finds them. Where c_t = 0 nothing is
    kept, unless the budget is larger than all others together.

    Args:
        sizes: n_t, elements of each tensor.
        costs: c_t >= 0, the squared perturbation at p/(1-p) = 1 (infinite: a tensor that must stay whole).
        kept: B, how many elements may be kept in all.

    Returns:
        drop rates, one per tensor, in the order given.

    >>> spend([100, 100], [0.04, 0.01], 90)
    [0.4, 0.7]
    """
    n, c = np.asarray(sizes, np.float64), np.asarray(costs, np.float64)
    keep = np.zeros(len(n))
    with np.errstate(divide="ignore", invalid="ignore"):
        worth = np.where(n > 0, np.sqrt(c / n), 0.0)
    order = np.argsort(-worth, kind="stable")
    left = min(float(kept), float(n.sum()))
    for place, t in enumerate(order):
        rest = order[place:]
        total = float(np.sum(n[rest] * worth[rest]))
        if not worth[t] > 0:  # nothing below moves anything: what is left of the budget is spread evenly
            keep[rest] = left / max(1.0, float(n[rest].sum()))
            break
        share = math.inf if math.isinf(total) else left * worth[t] / total
        if share < 1:
            keep[rest] = left * worth[rest] / total
            break
        keep[t] = min(1.0, left / max(1.0, n[t]))
        left -= keep[t] * n[t]
    return [round(1.0 - float(k), 12) for k in np.clip(keep, 0.0, 1.0)]


def _sampled(tensors: Sequence[AlignedTensor], model: int) -> list[Norms]:
    """Samples of one model's tensors; none where its values are not here: nothing is dropped in such a plan."""
    try:
        return sample_norms(tensors, model, lambda tensor: (0.0, 0.0))
    except NotFetched:
        return []


def settle(
    recipe: Recipe, tensors: Sequence[AlignedTensor], depths: Depths
) -> tuple[Recipe, tuple[Mapping[str, float], ...]]:
    """Replace `drop_rate: auto` by a number for each tensor, from a sample of its values.

    Returns:
        the recipe with the numbers under each model's own parameters, by exact names; and per model the rates that
        were made here (empty where nothing was auto).
    """
    sparsify = recipe.sparsify
    scopes = [] if sparsify is None else [sparsify.parameters, *(entry.parameters for entry in recipe.models)]
    if sparsify is None or not any(AUTO in scalars_of(scope.get("drop_rate")) for scope in scopes):
        return recipe, tuple({} for _ in recipe.models)
    places = [(tensor, place_of(tensor, depths)) for tensor in tensors]
    models, found = [], []
    for k, entry in enumerate(recipe.models):
        asked = (entry.parameters.get("drop_rate"), sparsify.parameters.get("drop_rate"))
        # Asked, and written down, by the names that the model itself has.
        own = {
            tensor.name: place if info is None else place_in(place, info, depths)
            for tensor, place in places
            for info in (tensor.models[k],)
        }
        given = {name: resolve(asked, place) for name, place in own.items()}
        # What has no delta (integers, what only one side has) `sample_norms` leaves out.
        automatic = [
            t
            for t in tensors
            if given[t.name] == AUTO and not t.head and not is_kept_dense(t.name, t.group, sparsify.keep_dense)
        ]
        tolerances = (entry.parameters.get("tau"), sparsify.parameters.get("tau"), TAU)
        rates = {
            norms.name: rate_within(norms.r, resolve(tolerances, own[norms.name])) for norms in _sampled(automatic, k)
        }
        found.append(rates)
        if AUTO not in given.values():
            models.append(entry)
            continue
        numbers = {name: rates.get(name, 0.0) if value == AUTO else value for name, value in given.items()}
        by_name = Filters(
            tuple(Filtered(f"={own[name].name}", value) for name, value in numbers.items() if value is not None)
        )
        models.append(replace(entry, parameters={**entry.parameters, "drop_rate": by_name}))
    return replace(recipe, models=tuple(models)), tuple(found)
