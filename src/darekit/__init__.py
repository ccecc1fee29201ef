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
    "inspect": "analysis.inspection",
    "similarity": "analysis.similarities",
    "recommend": "recommendation.advice",
    "sweep": "sweeps.running",
    "search": "searches.running",
    "report": "reports.writing",
    "evaluate": "evaluation.comparison",
    "generate": "evaluation.generations",
    "pack": "packing.writing",
    "unpack": "packing.unpacking",
    "extract": "extraction.writing",
    "open_pack": "packs.reading",
    "export": "packing.exporting",
    "push": "packing.sharing",
    "pull": "packing.sharing",
    "Switcher": "packs.switching",
    "make_statistics": "statistics.running",
    "merge_tensors": "memory",
    "read_recipe": "recipe",
    "dare": "recipe.typed",
    "drop_only": "recipe.typed",
    "magnitude": "recipe.typed",
    "della": "recipe.typed",
    "breadcrumbs": "recipe.typed",
    "linear": "recipe.merges",
    "task_arithmetic": "recipe.merges",
    "ties": "recipe.merges",
    "fisher": "recipe.merges",
    "regmean": "recipe.merges",
    "slerp": "recipe.merges",
    "nuslerp": "recipe.merges",
    "multislerp": "recipe.merges",
    "karcher": "recipe.merges",
    "model_stock": "recipe.merges",
    "sce": "recipe.merges",
    "nearswap": "recipe.merges",
    "arcee_fusion": "recipe.merges",
    "ram": "recipe.merges",
    "ramplus_tl": "recipe.merges",
    "sparsifier": "recipe.typed",
    "merge_method": "recipe.typed",
    "DarekitError": "errors",
}

_MODULES = ("register", "testing")

__all__ = [
    "DarekitError",
    "Switcher",
    "arcee_fusion",
    "breadcrumbs",
    "dare",
    "della",
    "drop",
    "drop_only",
    "evaluate",
    "export",
    "extract",
    "fisher",
    "generate",
    "inspect",
    "karcher",
    "linear",
    "magnitude",
    "make_statistics",
    "merge",
    "merge_method",
    "merge_tensors",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "open_pack",
    "pack",
    "plan",
    "pull",
    "push",
    "ram",
    "ramplus_tl",
    "read_recipe",
    "recommend",
    "regmean",
    "report",
    "sce",
    "search",
    "similarity",
    "slerp",
    "sparsifier",
    "sweep",
    "task_arithmetic",
    "ties",
    "unpack",
]

if TYPE_CHECKING:
    from darekit import register as register
    from darekit import testing as testing
    from darekit.analysis.inspection import inspect
    from darekit.analysis.similarities import similarity
    from darekit.api import drop, merge, plan
    from darekit.errors import DarekitError
    from darekit.evaluation.comparison import evaluate
    from darekit.evaluation.generations import generate
    from darekit.extraction.writing import extract
    from darekit.memory import merge_tensors
    from darekit.packing.exporting import export
    from darekit.packing.sharing import pull, push
    from darekit.packing.unpacking import unpack
    from darekit.packing.writing import pack
    from darekit.packs.reading import open_pack
    from darekit.packs.switching import Switcher
    from darekit.recipe import read_recipe
    from darekit.recipe.merges import (
        arcee_fusion,
        fisher,
        karcher,
        linear,
        model_stock,
        multislerp,
        nearswap,
        nuslerp,
        ram,
        ramplus_tl,
        regmean,
        sce,
        slerp,
        task_arithmetic,
        ties,
    )
    from darekit.recipe.typed import (
        breadcrumbs,
        dare,
        della,
        drop_only,
        magnitude,
        merge_method,
        sparsifier,
    )
    from darekit.recommendation.advice import recommend
    from darekit.reports.writing import report
    from darekit.searches.running import search
    from darekit.statistics.running import make_statistics
    from darekit.sweeps.running import sweep

else:  # a type checker that saw this would believe every misspelt name

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"darekit.{name}")
        if name in _LAZY:
            return getattr(importlib.import_module(f"darekit.{_LAZY[name]}"), name)
        raise AttributeError(f"module 'darekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
