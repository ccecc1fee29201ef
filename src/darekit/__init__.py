# SPDX-License-Identifier: Apache-2.0
"""darekit: absorb the abilities of fine-tuned models into one.

>>> import darekit as dk
>>> dk.dare(0.9, seed=42).method
'dare'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from darekit.version import __version__ as __version__

# Name -> module: imported when first used, so that `import darekit` and `dare --help` stay instant.
_LAZY = {
    "merge": "api",
    "drop": "api",
    "plan": "api",
    "inspect": "inspection",
    "similarity": "similarities",
    "recommend": "recommendation.advice",
    "sweep": "sweeps.running",
    "evaluate": "evaluation.comparison",
    "generate": "evaluation.generations",
    "pack": "packs.packing",
    "unpack": "packs.unpacking",
    "open_pack": "packs.reading",
    "export": "packs.exporting",
    "push": "packs.sharing",
    "pull": "packs.sharing",
    "Switcher": "packs.switching",
    "make_statistics": "statistics.running",
    "merge_tensors": "memory",
    "read_recipe": "recipe",
    "dare": "memory",
    "drop_only": "memory",
    "magnitude": "memory",
    "della": "memory",
    "breadcrumbs": "memory",
    "linear": "memory",
    "task_arithmetic": "memory",
    "ties": "memory",
    "fisher": "memory",
    "regmean": "memory",
    "sparsifier": "memory",
    "merge_method": "memory",
    "DarekitError": "errors",
}

__all__ = [
    "DarekitError",
    "Switcher",
    "breadcrumbs",
    "dare",
    "della",
    "drop",
    "drop_only",
    "evaluate",
    "export",
    "fisher",
    "generate",
    "inspect",
    "linear",
    "magnitude",
    "make_statistics",
    "merge",
    "merge_method",
    "merge_tensors",
    "open_pack",
    "pack",
    "plan",
    "pull",
    "push",
    "read_recipe",
    "recommend",
    "regmean",
    "similarity",
    "sparsifier",
    "sweep",
    "task_arithmetic",
    "ties",
    "unpack",
]

if TYPE_CHECKING:
    from darekit.api import drop, merge, plan
    from darekit.errors import DarekitError
    from darekit.evaluation.comparison import evaluate
    from darekit.evaluation.generations import generate
    from darekit.inspection import inspect
    from darekit.memory import (
        breadcrumbs,
        dare,
        della,
        drop_only,
        fisher,
        linear,
        magnitude,
        merge_method,
        merge_tensors,
        regmean,
        sparsifier,
        task_arithmetic,
        ties,
    )
    from darekit.packs.exporting import export
    from darekit.packs.packing import pack
    from darekit.packs.reading import open_pack
    from darekit.packs.sharing import pull, push
    from darekit.packs.switching import Switcher
    from darekit.packs.unpacking import unpack
    from darekit.recipe import read_recipe
    from darekit.recommendation.advice import recommend
    from darekit.similarities import similarity
    from darekit.statistics.running import make_statistics
    from darekit.sweeps.running import sweep


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"darekit.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'darekit' has no attribute {name!r}")
