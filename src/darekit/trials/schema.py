# SPDX-License-Identifier: Apache-2.0
"""What the JSON Schemas of sweep and search files share: settings of recipes by dotted name, and judges."""

from __future__ import annotations

from darekit.evaluation.judges import KEYS as JUDGES
from darekit.methods import MERGE_METHODS, SPARSIFIERS
from darekit.recipe.schema import Schema, switch, whole
from darekit.trials.judging import SPLITS


def settings() -> dict[str, str]:
    """Dotted names of the settings that are varied most -> what they are."""
    found = {"merge_method": "How the models become one.", "sparsify.method": "How to choose what is dropped."}
    for sparsifier in SPARSIFIERS.values():
        found |= {f"sparsify.{name}": one.kind.help for name, one in sparsifier.parameters.items()}
    for merge in MERGE_METHODS.values():
        found |= {f"parameters.{name}": one.kind.help for name, one in merge.parameters.items()}
    return found


def judges_of(description: str) -> Schema:
    """Judges of a split, by name."""
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
