# SPDX-License-Identifier: Apache-2.0
"""A JSON Schema of sweep files, as `darekit.recipe.schema` has one of recipes.

It flags no file that `read_sweep` accepts, unless the recipe in it holds a value that would be wrong in any recipe and
that every cell replaces. What the axes make of the recipe only `dare sweep --dry-run` knows.
"""

from __future__ import annotations

from darekit.recipe.schema import DRAFT, Schema, partial_schema, seed
from darekit.sweeps.data import SPLITS
from darekit.sweeps.reading import KEYS
from darekit.trials.schema import judges_of, settings

TITLE = "darekit sweep"


def sweep_schema() -> Schema:
    """The schema of a sweep file, with every method in the table.

    >>> sweep_schema()["required"]
    ['recipe', 'axes']
    """
    recipe = partial_schema()
    definitions = recipe.pop("definitions")
    known: dict[str, Schema] = {
        "recipe": {
            "description": "The recipe that is varied, or its file.",
            "anyOf": [{"type": "string", "minLength": 1}, recipe],
        },
        "axes": _axes(),
        "seeds": {
            "description": "Seeds of the masks; tables show means and standard deviations over them.",
            "anyOf": [*seed()["anyOf"], {"type": "array", "items": seed(), "uniqueItems": True}],
        },
        "validation": judges_of("Judges by which settings are chosen."),
        "test": judges_of("Judges by which results are reported."),
        "choose": {
            "description": "The score by which settings are chosen, such as reverse/loss; default: the mean.",
            "type": ["string", "null"],
        },
        "plot": {
            "description": "What the plot shows: two axes, a score and a title.",
            "type": "object",
            "properties": {key: {"type": "string"} for key in ("x", "lines", "score", "title")},
            "additionalProperties": False,
        },
    }
    return {
        "$schema": DRAFT,
        "title": TITLE,
        "description": "One recipe, some of its settings varied, and every combination judged.",
        "type": "object",
        "properties": {key: known[key] for key in KEYS},
        "required": ["recipe", "axes"],
        "anyOf": [{"required": [split]} for split in SPLITS],
        "additionalProperties": False,
        "definitions": definitions,
    }


def _axes() -> Schema:
    words: Schema = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
    point: Schema = {
        "description": "Settings by dotted name; an empty value removes a key.",
        "type": ["object", "null"],
        "properties": {"judges": {"description": "The judges asked here; default: all."} | words},
    }
    values: Schema = {"type": "array", "minItems": 1, "uniqueItems": True, "items": {"not": {"type": "null"}}}
    named: Schema = {"type": "object", "minProperties": 1, "additionalProperties": point}
    axis: Schema = {"anyOf": [values, named]}
    return {
        "description": "Settings by dotted name with their values, or names with the settings that they stand for.",
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"not": {"enum": ["seed", "seeds", "sparsify.seed"]}},
        "properties": {name: {"description": help} | axis for name, help in settings().items()},
        "patternProperties": {"^(judges|kind)$": values},  # cells have keys of these names
        "additionalProperties": axis,
    }
