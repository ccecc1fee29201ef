# SPDX-License-Identifier: Apache-2.0
"""The recipe files of `examples/`, which the demo runs as they are: only the models' places are filled in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from darekit.demo.family import Family
from darekit.errors import DarekitError

NAMES = (  # (row of the table, file without DARE, file with DARE)
    ("average", "average.yaml", "average_dare.yaml"),
    ("task arithmetic", "task_arithmetic.yaml", "task_arithmetic_dare.yaml"),
    ("TIES", "ties.yaml", "ties_dare.yaml"),
)


def examples_directory() -> Path:
    """Where the examples are: inside the installed package, or in the repository that it is run from."""
    here = Path(__file__).resolve()
    for directory in (here.parent / "examples", here.parents[3] / "examples"):
        if (directory / NAMES[0][1]).is_file():
            return directory
    raise DarekitError(
        f"the example recipes are neither beside {here} nor in {here.parents[3] / 'examples'}: reinstall darekit"
    )


def read_example(name: str) -> dict[str, Any]:
    """One example as data."""
    data: dict[str, Any] = yaml.safe_load((examples_directory() / name).read_text())
    return data


def copy_examples(directory: Path) -> None:
    """Put the examples beside the models they name, ready for `dare merge DIR/ties_dare.yaml OUT`."""
    for _, *names in NAMES:
        for name in names:
            shutil.copyfile(examples_directory() / name, directory / name)


def place_models(recipe: dict[str, Any], family: Family, seed: int) -> dict[str, Any]:
    """The recipe with its model names turned into the paths of one fine-tuning seed's models."""
    models = [{**entry, "model": str(family.model(entry["model"], seed))} for entry in recipe["models"]]
    return {**recipe, "base_model": str(family.base), "models": models}
