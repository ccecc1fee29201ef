# SPDX-License-Identifier: Apache-2.0
"""How much each dimension of a search matters, by Optuna's own measures, from what `trials.jsonl` holds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from darekit.reports.search_folder import Goal, Trial

# Of 300 trials in 10 dimensions, 64 trees of depth 64 say the same to 0.01 and take 2.3 s of CPU instead of 0.3.
TREES, DEPTH = 16, 8

FEWEST = 8  # trials, below which an importance would be noise


def importance_of(
    trials: Sequence[Trial], space: Mapping[str, Mapping[str, Any]], goal: Goal
) -> tuple[dict[str, float], str]:
    """Trials -> dimension -> importance, largest first, and by which measure; or nothing, and why.

    fANOVA (Hutter, Hoos and Leyton-Brown 2014), as Optuna computes it, where scikit-learn is there; else PED-ANOVA
    (Watanabe, Bansal and Hutter 2023). Only dimensions that every trial has are measured.
    """
    if find_spec("optuna") is None:
        return {}, "Importance needs Optuna: pip install 'darekit[search]'."
    able = [one for one in trials if math.isfinite(one.value(goal.score))]
    common = [name for name in space if all(name in one.params for one in able)]
    common = [name for name in common if len({repr(one.params[name]) for one in able}) > 1]
    if len(able) < FEWEST:
        return {}, f"Importance needs at least {FEWEST} trials with a score; there are {len(able)}."
    if not common:
        return {}, "No dimension varies in all trials, so none can be compared."
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return _measured(able, space, common, goal)
    finally:
        optuna.logging.set_verbosity(level)


def _measured(
    able: Sequence[Trial], space: Mapping[str, Mapping[str, Any]], common: Sequence[str], goal: Goal
) -> tuple[dict[str, float], str]:
    import optuna

    known = {name: _distribution(space[name], [one.params[name] for one in able]) for name in common}
    study = optuna.create_study(direction="maximize" if goal.higher else "minimize")
    for one in able:
        params = {name: one.params[name] for name in common}
        if any(not known[name]._contains(known[name].to_internal_repr(value)) for name, value in params.items()):
            continue  # of a space that was another one then
        study.add_trial(optuna.trial.create_trial(params=params, distributions=known, value=one.value(goal.score)))
    measure = "fANOVA" if find_spec("sklearn") is not None else "PED-ANOVA"
    evaluator: Any
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if measure == "fANOVA":
            evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, max_depth=DEPTH, seed=0)
        else:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        try:
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError) as error:
            return {}, f"Optuna cannot tell how much each setting matters: {error}."
    return {name: float(value) for name, value in found.items()}, measure


def _distribution(space: Mapping[str, Any], values: Sequence[Any]) -> Any:
    import optuna

    if "choices" in space:
        choices = [*space["choices"]]
        choices += [value for value in values if value not in choices]
        return optuna.distributions.CategoricalDistribution(tuple(dict.fromkeys(choices)))
    low, high, step = space["low"], space["high"], space.get("step")
    log = bool(space.get("log"))
    if isinstance(low, int) and isinstance(high, int) and all(isinstance(value, int) for value in values):
        return optuna.distributions.IntDistribution(low, high, log=log, step=1 if log else int(step or 1))
    return optuna.distributions.FloatDistribution(float(low), float(high), log=log, step=None if log else step)
