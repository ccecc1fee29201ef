# SPDX-License-Identifier: Apache-2.0
"""The tables of methods: they drive the recipes, the command line, the docs, the tests and the bench.

Each entry stands below its function, in the `METHODS` of that module; what an entry can say is in `kinds.py`.
"""

from __future__ import annotations

from darekit.methods import informed, merging, sparsifiers, spherical, surveyed
from darekit.methods.kinds import MergeMethod, Scope, Sparsifier
from darekit.methods.parameters import Choice, Number, Parameter, Switch

SPARSIFIERS: dict[str, Sparsifier] = {entry.name: entry for entry in sparsifiers.METHODS}

MERGE_METHODS: dict[str, MergeMethod] = {
    entry.name: entry for module in (merging, surveyed, informed, spherical) for entry in module.METHODS
}

AVERAGE = merging.linear.__name__  # what is done where a method has nothing to say
DROP = sparsifiers.drop_only.__name__  # what leaves nothing at a rate of 1
SUM = merging.task_arithmetic.__name__  # what a method with coefficients becomes when they are known

MERGE_ALIASES: dict[str, str] = {"average": "linear"}

WEIGHT = Parameter("weight", Number("the model's factor in the merge"), 1.0)
SCALE = Parameter("scale", Number("what the model's tensors are multiplied by"), 1.0)
TAU = Parameter(
    "tau",
    Number("with drop_rate: auto: the relative perturbation of a layer's output that it may cause", 0.001, 1),
    None,
)
SEED = Parameter("seed", Number("effective seed of the model's mask, used as it is", 0, 2**64 - 1), None)

__all__ = [
    "AVERAGE",
    "DROP",
    "MERGE_ALIASES",
    "MERGE_METHODS",
    "SCALE",
    "SEED",
    "SPARSIFIERS",
    "SUM",
    "TAU",
    "WEIGHT",
    "Choice",
    "MergeMethod",
    "Number",
    "Parameter",
    "Scope",
    "Sparsifier",
    "Switch",
]
