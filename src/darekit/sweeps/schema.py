# SPDX-License-Identifier: Apache-2.0
"""A JSON Schema of sweep files, as `darekit.recipe.schema` has one of recipes.

It flags no file that `read_sweep` accepts, unless the recipe in it holds a value that would be wrong in any recipe and
that every cell replaces. What the axes make of the recipe only `dare sweep --dry-run` knows.
"""

from __future__ import annotations

from darekit.evaluation.judges import KEYS as JUDGES
from darekit.methods import MERGE_METHODS, SPARSIFIERS
from darekit.recipe.schema import DRAFT, Schema, partial_schema, seed, switch, whole
from darekit.sweeps.data import SPLITS
from darekit.sweeps.reading import KEYS

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
        "validation": _judges("Judges by which settings are chosen."),
        "test": _judges("Judges by which results are reported."),
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
        "properties": {name: {"description": help} | axis for name, help in _settings().items()},
        "patternProperties": {"^(judges|kind)$": values},  # cells have keys of these names
        "additionalProperties": axis,
    }


def _settings() -> dict[str, str]:
    """Dotted names of the settings that are varied most, and what they are."""
    found = {"merge_method": "How the models become one.", "sparsify.method": "How to choose what is dropped."}
    for sparsifier in SPARSIFIERS.values():
        found |= {f"sparsify.{name}": one.kind.help for name, one in sparsifier.parameters.items()}
    for merge in MERGE_METHODS.values():
        found |= {f"parameters.{name}": one.kind.help for name, one in merge.parameters.items()}
    return found


def _judges(description: str) -> Schema:
    return {
        "description": description,
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"not": {"enum": ["mean", *SPLITS]}},
        "additionalProperties": _judge(),
    }


def _judge() -> Schema:
    """What judges: one kind of judge with its keys, or several by name."""
    words: Schema = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": ["string", "number"]}}]}
    count: Schema = {"anyOf": [*whole(1)["anyOf"], {"type": "null"}]}
    known: dict[str, Schema] = {
        "data": {"description": "Rows of data: a file, or a dataset.", "type": "string"},
        "command": {"description": "A command that gets a model directory and prints JSON."} | words,
        "python": {"description": "file.py:function, or module:function.", "type": "string"},
        "tasks": {"description": "Tasks of lm-eval."} | words,
        "include": {"description": "Folders with your own task files."} | words,
        "limit": {"description": "Maximum number of rows."} | count,
        "batch_size": {"description": "How many rows run at once."} | count,
        "max_length": {"description": "Tokens after which a row is cut."} | count,
        "num_fewshot": {"description": "Worked examples before each question."}
        | {"anyOf": [*whole(0)["anyOf"], {"type": "null"}]},
        "chat_template": {"description": "Ask through the tokenizer's chat template.", "default": False}
        | switch(True, False),
        "trust_code": {"description": "Let tasks run their own code.", "default": False} | switch(True, False),
        "split": {"description": "Which split of a dataset.", "default": "test"},
    }
    rules = [
        {
            "if": {"required": [kind]},
            "then": {"properties": {key: known.get(key, {}) for key in keys}, "additionalProperties": False},
        }
        for kind, keys in JUDGES.items()
    ]
    several = {"additionalProperties": {"type": ["object", "string", "array"]}}
    return {
        "type": "object",
        "minProperties": 1,
        "properties": {kind: known[kind] for kind in JUDGES},
        "allOf": rules,
        "if": {"not": {"anyOf": [{"required": [kind]} for kind in JUDGES]}},
        "then": several,
    }
