# SPDX-License-Identifier: Apache-2.0
"""A JSON Schema of search files, as `darekit.recipe.schema` has one of recipes.

It flags no file that `read_search` accepts, unless the recipe in it holds a value that would be wrong in any recipe and
that every candidate replaces. What the space makes of the recipe only `dare search --dry-run` knows.
"""

from __future__ import annotations

from darekit.recipe.schema import DRAFT, Schema, partial_schema, seed, switch, whole
from darekit.searches.data import AUTO, SAMPLERS
from darekit.searches.reading import KEYS, PARTS
from darekit.trials.schema import judges_of, settings

TITLE = "darekit search"
_BOUND = r"^\s*[-+]?[0-9.]+([eE][-+]?\d+)?\s*([oO][fF]\s+.+)?$"


def search_schema() -> Schema:
    """The schema of a search file, with every method in the table.

    >>> search_schema()["required"]
    ['recipe', 'space', 'validation']
    """
    recipe = partial_schema()
    definitions = recipe.pop("definitions")
    text: Schema = {"type": "string", "minLength": 1}
    known: dict[str, Schema] = {
        "recipe": {"description": "The recipe whose settings are searched, or its file.", "anyOf": [text, recipe]},
        "space": _space(),
        "seeds": {
            "description": "Seeds of the masks, one of which each candidate has.",
            "type": "array", "items": seed(), "minItems": 2, "uniqueItems": True,
        },
        "constraints": _constraints(),
        "try": {
            "description": "Candidates of your own, asked first; what is left out is as in the recipe.",
            "type": "array", "items": {"type": "object", "minProperties": 1},
        },
        "at_least": _bounds("Lower bounds of scores"),
        "at_most": _bounds("Upper bounds of scores"),
        "choose": _goals(),
        "sampler": _sampler(),
        "rungs": _rungs(),
        "round": {"description": "Candidates that are asked for at once; default: one for each worker."} | whole(1),
        "trials": {"description": "How many candidates, all runs together; default: 60."} | whole(1),
        "storage": {"description": "A database's URL instead of a journal, such as sqlite:///search.db.",
                    "type": "string", "pattern": "://"},
        "validation": judges_of("Judges by which candidates are chosen."),
        "test": judges_of("Judges by which the best is reported."),
    }  # fmt: skip
    return {
        "$schema": DRAFT,
        "title": TITLE,
        "description": "One recipe, ranges for some of its settings, and judges: dare search finds the best.",
        "type": "object",
        "properties": {key: known[key] for key in KEYS},
        "required": ["recipe", "space", "validation"],
        "additionalProperties": False,
        "definitions": definitions,
    }


def _space() -> Schema:
    number: Schema = {"type": "number"}
    ranged: Schema = {
        "type": "object",
        "properties": {
            "low": {"description": "The smallest value."} | number,
            "high": {"description": "The largest value."} | number,
            "log": {"description": "Look at small values more closely.", "default": False} | switch(True, False),
            "step": {"description": "The distance between two values.", "type": ["number", "null"],
                     "exclusiveMinimum": 0},
            "layers": {"description": "How many control points over depth.", "default": 0,
                       "anyOf": [{"enum": [0]}, whole(2, 64)]},
            "stepped": {"description": "Jump from control point to control point.", "default": False}
            | switch(True, False),
            "groups": {
                "description": "Groups of tensors that have a value of their own.",
                "type": "array", "items": {"enum": list(PARTS)}, "uniqueItems": True,
            },
        },
        "required": ["low", "high"],
        "additionalProperties": False,
    }  # fmt: skip
    values: Schema = {"type": "array", "minItems": 2, "uniqueItems": True, "items": {"not": {"type": "null"}}}
    named: Schema = {
        "type": "object", "minProperties": 1, "not": {"anyOf": [{"required": ["low"]}, {"required": ["high"]}]},
        "additionalProperties": {
            "description": "Settings by dotted name; an empty value removes a key.", "type": ["object", "null"],
        },
    }  # fmt: skip
    knob: Schema = {"anyOf": [{"enum": [AUTO]}, ranged, values, named]}
    weights = {"models.*.parameters.weight": "The weight of each model."}
    return {
        "description": "Settings by dotted name with their ranges or values, or names with the settings that they "
        "stand for.",
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"not": {"enum": ["seed", "seeds"]}},
        "properties": {name: {"description": help} | knob for name, help in (weights | settings()).items()},
        "additionalProperties": knob,
    }


def _constraints() -> Schema:
    weights: Schema = {
        "type": "object",
        "properties": {
            "sum": {
                "description": "What the models' weights add up to.",
                "type": ["number", "null"],
                "exclusiveMinimum": 0,
            },
            "negative": {"description": "Whether weights may be negative."} | _or_none(switch(True, False)),
        },
        "additionalProperties": False,
    }
    return {
        "description": "What holds for the models' weights.",
        "type": "object", "properties": {"weights": weights}, "additionalProperties": False,
    }  # fmt: skip


def _or_none(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _bounds(description: str) -> Schema:
    bound: Schema = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": _BOUND}]}
    return {
        "description": f"{description}: a number, or a share such as 0.95 of MODEL.",
        "type": "object", "additionalProperties": bound,
    }  # fmt: skip


def _goals() -> Schema:
    names: Schema = {"type": "array", "items": {"type": "string"}, "minItems": 2, "uniqueItems": True}
    blend: Schema = {
        "type": "object", "minProperties": 1, "maxProperties": 1,
        "propertyNames": {"enum": ["mean", "min", "relative mean", "relative min"]}, "additionalProperties": names,
    }  # fmt: skip
    one: Schema = {"anyOf": [{"type": "string"}, blend]}
    return {
        "description": "What candidates are chosen by: a score, mean, min, relative mean, relative min, or several.",
        "anyOf": [*one["anyOf"], {"type": "array", "items": one, "minItems": 1, "uniqueItems": True}, {"type": "null"}],
    }


def _sampler() -> Schema:
    name: Schema = {"enum": list(SAMPLERS)}
    spec: Schema = {
        "type": "object", "additionalProperties": False,
        "properties": {"name": name, "seed": {"description": "Of what it draws."} | whole(0, (1 << 32) - 1)},
    }  # fmt: skip
    return {"description": "Who proposes candidates.", "default": "tpe", "anyOf": [name, spec]}


def _rungs() -> Schema:
    share: Schema = {
        "anyOf": [
            {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            {"type": "string", "pattern": r"^\d+\s*/\s*[1-9]\d*$"},
        ]
    }
    return {
        "description": "Shares of the items after which hopeless candidates are stopped; [1]: never.",
        "anyOf": [{"type": "array", "items": share}, share, {"enum": [False, "none"]}, {"type": "null"}],
    }
