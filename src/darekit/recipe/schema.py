# SPDX-License-Identifier: Apache-2.0
"""A JSON Schema of recipes, with which editors complete, explain and check them. Generated from the table of methods.

`read_recipe` decides what a recipe is. The schema flags no recipe that the reader accepts, but it misses mistakes that
span several places, such as `tau` without `drop_rate: auto`, a `tokenizer_source` that is not listed, or a filter after
one that matches everything.

Draft-07, because every version of yaml-language-server knows it, and only recent ones know a later draft. Editors parse
YAML 1.2 and the reader YAML 1.1; where one finds a number or a switch and the other text (`1e-5`, `1_000`, `yes`), the
schema accepts both.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from darekit.architectures.groups import GROUPS
from darekit.architectures.templates import CHAT_TEMPLATES
from darekit.dtypes import DTYPES, FLOAT_DTYPES
from darekit.methods import (
    MERGE_ALIASES,
    MERGE_METHODS,
    SEED,
    SPARSIFIERS,
    Choice,
    MergeMethod,
    Number,
    Parameter,
    Switch,
)
from darekit.recipe import ignored
from darekit.recipe.data import LAYOUTS, Recipe, Sparsify
from darekit.recipe.documents import Document
from darekit.recipe.layout import FORMS
from darekit.recipe.mergekit import PRODUCTS, RESCALE
from darekit.recipe.tokens import AUTO_TEMPLATE, SHORTEST_TEMPLATE
from darekit.recipe.values import AUTO
from darekit.recipe.words import AUTOMATIC, SPARSIFY_KEYS, TOP_KEYS, Words, check_names

Schema = dict[str, Any]

DRAFT = "http://json-schema.org/draft-07/schema#"
TITLE = "darekit recipe"


def recipe_schema() -> Schema:
    """The schema of a recipe, in the native form or mergekit's, with every method in the table.

    >>> recipe_schema()["properties"]["vocab"]["enum"]
    ['strict', 'base', 'pad']
    """
    build = _Builder()
    properties = _top() | {"models": _models(_entry()), "sparsify": _sparsify(build)} | _layers()
    properties = _with_ignored(properties, *ignored.OPTIONS)
    return {
        "$schema": DRAFT,
        "title": TITLE,
        "description": "Which models are merged, and how.",
        "type": "object",
        "properties": properties,
        "required": ["merge_method"],
        "oneOf": [{"required": [form]} for form in FORMS],
        "additionalProperties": False,
        "allOf": [*_plain_rules(build), *_sparsified_rules(build)],
        "definitions": build.definitions,
    }


def partial_schema() -> Schema:
    """The schema of a recipe that a sweep's axes complete: the words of all methods, no key required, any key empty.

    Its `definitions` belong at the root of the schema that holds it.
    """
    build = _Builder()
    every = [_words(method) for method in (*MERGE_METHODS, *PRODUCTS)]
    every += [_words(method, sparsifier) for method in MERGE_METHODS for sparsifier in SPARSIFIERS]
    blocks = [(words.sparsifier or "", words.sparsify) for words in every if words.sparsify is not None]
    sparsify = {"method": _sparsifier_names()} | _sparsify_options(build) | _with_rescale_q(build.union(blocks))
    shared = build.union([(words.method, words.shared) for words in every])
    own = build.union([(words.sparsifier or words.method, words.model) for words in every])
    entry = _entry(_block(_with_rescale_q(own)) | {"type": ["object", "null"]})
    del entry["required"]
    properties = _top() | {
        "models": _models(entry),
        **_layers(),
        "sparsify": _block(sparsify) | {"description": _SPARSIFY_HELP},
        "parameters": _block(shared) | {"description": _PARAMETERS_HELP, "type": ["object", "null"]},
    }
    nullable = {name: {"anyOf": [schema, {"type": "null"}]} for name, schema in properties.items()}
    return _block(nullable) | {"minProperties": 1, "definitions": build.definitions}


# --- one value ---

# A number or a switch in one version of YAML, text in the other; or in quotes, which a recipe of mergekit's may have.
_NUMBER_TEXT: Schema = {
    "type": "string",
    "pattern": r"^ *[-+]?(([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,4})?|[0-9]+(_[0-9]+)+(\.[0-9_]*)?) *$",
}
_SWITCH_TEXT = {
    True: "true|True|TRUE|yes|Yes|YES|y|t|on|On|ON|1",
    False: "false|False|FALSE|no|No|NO|n|f|off|Off|OFF|0",
}


def switch(*values: bool) -> Schema:
    """True, false or both, as any YAML writes them."""
    text = "|".join(_SWITCH_TEXT[value] for value in values)
    return {"anyOf": [{"enum": [*values]}, {"type": "string", "pattern": f"^({text})$"}]}


def whole(low: int, high: int | None = None) -> Schema:
    """A whole number of at least `low`."""
    number: Schema = {"type": "integer", "minimum": low}
    return {"anyOf": [number if high is None else number | {"maximum": high}, _NUMBER_TEXT]}


def seed() -> Schema:
    """A seed."""
    return whole(0, 2**64 - 1)


def _number(kind: Number, *, auto: bool) -> list[Schema]:
    """Ways to write one number; with `auto`, also the word for a drop rate that is derived."""
    number: Schema = {"type": "integer" if kind.whole else "number"}
    if kind.low > float("-inf"):
        number["minimum"] = kind.low
    if kind.high < float("inf"):
        number["maximum"] = kind.high
    return [number, *([{"const": AUTO}] if auto else []), _NUMBER_TEXT]


def _per_tensor(number: list[Schema]) -> list[Schema]:
    """Ways to write one number or switch -> ways to give each tensor its own."""
    gradient = {"type": "array", "items": {"anyOf": [one for one in number if "const" not in one]}, "minItems": 1}
    entry = _block({"filter": _FILTER, "value": {"anyOf": [*number, gradient]}}) | {"required": ["value"]}
    return [*number, gradient, entry, {"type": "array", "items": entry, "minItems": 1}]


_FILTER: Schema = {
    "description": "Part of a tensor's name, a glob over the whole name, =NAME for that name alone, or * for all.",
    "type": "string",
    "pattern": r"^([^=]|=[\s\S])",
    "default": "*",
}


def _parameter(parameter: Parameter, *, auto: bool) -> Schema:
    """What a parameter may hold; `auto`: it is a drop rate that may be derived."""
    about: Schema = {"description": parameter.kind.help}
    if parameter.default is not None:
        about["default"] = parameter.default
    if parameter.name == SEED.name:
        return about | seed()
    match parameter.kind:
        case Number() as kind:
            return about | {"anyOf": _per_tensor(_number(kind, auto=auto))}
        case Switch():
            return about | {"anyOf": _per_tensor([*switch(True, False)["anyOf"], {"enum": [0, 1]}])}
        case Choice(of=of):
            booleans = [word == "true" for word in of if word in ("true", "false")]
            if not booleans:
                return about | {"enum": [*of]}
            return about | {"anyOf": [{"enum": [*of]}, switch(*booleans), {"enum": [*map(int, booleans)]}]}


class _Builder:
    """Collects definitions, so that a parameter that many methods take is there once."""

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {}

    def refer(self, owner: str, name: str, schema: Schema) -> Schema:
        """A reference to `schema`, which is defined as `owner.name` unless that name has an equal definition."""
        key = next((k for k, s in self.definitions.items() if k.rpartition(".")[2] == name and s == schema), None)
        if key is None:
            key = f"{owner}.{name}"
            while key in self.definitions:  # a sparsifier and a product of mergekit's may share a name
                key = f"other.{key}"
            self.definitions[key] = schema
        return {"$ref": f"#/definitions/{key}"}

    def parameters(self, owner: str, allowed: Mapping[str, Parameter]) -> dict[str, Schema]:
        """Names -> references to what they may hold. `owner` is the method that they are written for."""
        return {
            name: self.refer(owner, name, _parameter(one, auto=name == "drop_rate" and owner in AUTOMATIC))
            for name, one in allowed.items()
        }

    def union(self, each: Iterable[tuple[str, Mapping[str, Parameter]]]) -> dict[str, Schema]:
        """(Owner, its parameters) -> names with all that they may hold."""
        found: dict[str, list[Schema]] = {}
        for owner, allowed in each:
            for name, reference in self.parameters(owner, allowed).items():
                if reference not in found.setdefault(name, []):
                    found[name].append(reference)
        return {name: one[0] if len(one) == 1 else {"anyOf": one} for name, one in found.items()}


# --- blocks ---

_SPARSIFY_HELP = "What happens to each delta before the merge. Leave it out to merge whole deltas."
_PARAMETERS_HELP = "The merge method's parameters, and defaults for all models."
_NAME: Schema = {"type": "string", "minLength": 1}


def _block(properties: Mapping[str, Schema]) -> Schema:
    """A mapping with these keys and no others."""
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def _top() -> dict[str, Schema]:
    """Top-level keys; those that say what is merged, and `sparsify`, are placeholders."""
    known: dict[str, Schema] = {
        "base_model": _NAME
        | {"description": "The checkpoint that all models were fine-tuned from.", "type": ["string", "null"]},
        "stages": {"description": "Recipes that are models of this one, by name.", "type": "object"},
        "models": {},
        "slices": {},
        "modules": {},
        "sparsify": {},
        "merge_method": _merge_method_names(),
        "parameters": {"description": _PARAMETERS_HELP, "type": ["object", "null"]},
        "dtype": _dtype("Number format of the output; defaults to the base's."),
        "out_dtype": _dtype("Another name for `dtype`; takes precedence if both are given."),
        "vocab": {
            "description": (
                "What to do if vocabularies differ from the base's: strict refuses, base cuts, pad keeps all rows."
            ),
            "enum": _literals(Recipe, "vocab"),
            "default": "strict",
        },
        "tokenizer_source": _NAME
        | {
            "description": (
                "Which tokens the output has: union, base, or those of a model. Without `vocab`, rows of embeddings "
                "and heads are matched by token; with `vocab` they are matched by number, and only files are copied. "
                "Left out: the tokenizer that all models share, else the base's, and rows by number."
            ),
            "type": ["string", "null"],
        },
        "tokenizer": _tokenizer(),
        "chat_template": {
            "description": "The output's chat template: auto (the commonest), a name, or the text of a Jinja template.",
            "anyOf": [
                {"enum": [AUTO_TEMPLATE, *CHAT_TEMPLATES]},
                {"type": "string", "minLength": SHORTEST_TEMPLATE, "pattern": r"\{"},
                {"type": "null"},
            ],
        },
        "heads": {
            "description": "Whose heads the output gets: base, or one of the models. Leave it out to merge heads.",
            "type": "string",
        },
        "keep_float32": {
            "description": "Under a 16-bit `dtype`: whether tensors that are float32 in a 16-bit model stay float32.",
            **switch(True, False),
            "default": True,
        },
        "base_extras": {
            "description": "What becomes of tensors that only the base has, and no model has instead.",
            "enum": _literals(Recipe, "base_extras"),
            "default": "keep",
        },
        "rounding": _rounding(),
        "output": {
            "description": "What is written: a model; or an adapter, where all models are adapters on the base.",
            "enum": _literals(Recipe, "output"),
            "default": "model",
        },
        "rank": {
            "description": "Of an adapter that is written: the rank of its modules; left out: that of their sum.",
            "type": ["integer", "null"],
            "minimum": 1,
        },
    }
    return {key: known[key] for key in TOP_KEYS}


def _rounding() -> Schema:
    """A word, or a block that has a seed, too."""
    words = _literals(Recipe, "rounding")
    block = _block({"method": {"enum": words}, "seed": {"description": "Of its draws.", **seed()}})
    return {
        "description": (
            "How merged values are rounded into the output's format: to the nearest, or stochastically, so that small "
            "changes are not lost in the mean."
        ),
        "anyOf": [{"enum": words}, block | {"required": ["method"]}],
        "default": "nearest",
    }


def _tokenizer() -> Schema:
    """The `tokenizer:` block, which takes the place of `tokenizer_source` and `vocab`."""
    model = _NAME | {"description": "A model's own row of this token."}
    zero = _block({"kind": {"const": "zero"}}) | {"required": ["kind"]}
    other = _block(
        {
            "kind": {"const": "model_token"},
            "model": _NAME,
            "token": {"type": "string"},
            "token_id": {"type": "integer", "minimum": 0},
        }
    ) | {"required": ["kind", "model"], "oneOf": [{"required": ["token"]}, {"required": ["token_id"]}]}
    row = _block(
        {
            "source": {
                "description": "Where models that lack it get its row.",
                "anyOf": [model, zero, other, {"type": "null"}],
            },
            "force": {"description": "Also for models that have the token.", "type": ["boolean", "null"]},
        }
    )
    block = _block(
        {
            "source": _NAME
            | {"description": "union, base, or a model.", "type": ["string", "null"], "default": "union"},
            "tokens": {
                "description": "Rows of single tokens; those that no model has are added.",
                "type": ["object", "null"],
                "additionalProperties": row | {"type": ["object", "null"]},
            },
            "pad_to_multiple_of": {
                "description": "Add rows up to a multiple of this.", "type": ["integer", "null"], "minimum": 1,
            },
        }
    )  # fmt: skip
    return block | {
        "description": "Which tokens the output has, and where their rows come from; rows are matched by token.",
        "type": ["object", "null"],
    }


def _literals(owner: type, name: str) -> list[str]:
    return [*typing.get_args(typing.get_type_hints(owner)[name])]


def _dtype(description: str) -> Schema:
    names = [DTYPES[name].torch_name for name in FLOAT_DTYPES]
    prefixed = {"type": "string", "pattern": rf"^torch\.({'|'.join(names)})$"}
    return {"description": description, "anyOf": [{"enum": names}, prefixed, {"type": "null"}]}


def _models(entry: Schema) -> Schema:
    name = _NAME | {"description": "Short for {model: NAME}."}
    return {
        "description": "The models to merge.",
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [name, entry]},
    }


_IGNORED: Schema = {"description": "Without effect here; ignored, as mergekit does."}


def _layers() -> dict[str, Schema]:
    """`slices:` and `modules:`, with the words of any method."""
    block: Schema = {"description": "Parameters of these layers.", "type": ["object", "null"]}
    reference: Schema = {"anyOf": [_NAME, {"type": "object"}]}
    number: Schema = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": "^ *[0-9]+ *$"}]}
    source = {
        "model": reference | {"description": "A directory, a .safetensors file, or org/name[@revision] on the Hub."},
        "layer_range": {
            "description": "The first layer, and the one after the last.",
            "type": "array",
            "items": [number, {"anyOf": [number, {"type": "null"}]}],
            "minItems": 2,
            "maxItems": 2,
        },
        "parameters": block,
        "stats": {"type": "string", "minLength": 1},
        "experts_layout": _LAYOUT,
    }
    one = {
        "sources": {
            "description": "Whose layers are merged here: equally many of each.",
            "type": "array",
            "minItems": 1,
            "items": _block(_with_ignored(source, *ignored.SOURCE_WORDS)) | {"required": ["model", "layer_range"]},
        },
        "base_model": reference | {"description": "The base of these layers, where it is not the recipe's."},
        "parameters": block,
    }
    slices: Schema = {
        "description": "The output's layers, from the first to the last.",
        "type": "array",
        "minItems": 1,
        "items": _block(_with_ignored(one, *ignored.SLICE_WORDS)) | {"required": ["sources"]},
    }
    module = _block({"slices": slices, "models": _models(_entry()), "parameters": block})
    return {
        "slices": slices,
        "modules": {
            "description": "Parts of a model (text_decoder, vision_tower, ...) to merge; the rest is the base's.",
            "type": "object",
            "minProperties": 1,
            "additionalProperties": module | {"oneOf": [{"required": ["slices"]}, {"required": ["models"]}]},
        },
    }


_LAYOUT: Schema = {
    "description": "For an adapter: the order of the experts in its factors B, if its config does not say.",
    "enum": list(LAYOUTS),
}


def _entry(parameters: Schema | None = None) -> Schema:
    """One of the models, as a mapping."""
    about = {"description": "A directory, a .safetensors file, or org/name[@revision] on the Hub."}
    properties: dict[str, Schema] = {
        "model": {"anyOf": [_NAME, {"type": "object"}]} | about,
        "parameters": {"description": "Parameters of this model alone.", "type": ["object", "null"]},
        "stats": {
            "description": "The statistics file that `dare stats` wrote for this model.",
            "type": "string",
            "minLength": 1,
        },
        "experts_layout": _LAYOUT,
    }
    if parameters is not None:
        properties["parameters"] |= parameters
    return _block(_with_ignored(properties, *ignored.SOURCE_WORDS)) | {"required": ["model"]}


def _parameters(allowed: Mapping[str, Schema]) -> Schema:
    """A `parameters:` block, which may be empty."""
    found = _block(_with_rescale_q(allowed)) | {"type": ["object", "null"]}
    twice = [pair for pair in (["density", "keep"], ["q", "rescale"]) if {*pair} <= {*found["properties"]}]
    return found | ({"allOf": [{"not": {"type": "object", "required": pair}} for pair in twice]} if twice else {})


def _tolerant(block: Schema) -> Schema:
    """A `parameters:` block with words of other methods of mergekit's, which are ignored."""
    return block | {"properties": _with_ignored(block["properties"])}


def _with_ignored(properties: Mapping[str, Schema], *words: str) -> dict[str, Schema]:
    """And what is ignored: these words, mergekit's parameters, and its words that mean something elsewhere."""
    others = (*words, *ignored.PARAMETERS, *ignored.ELSEWHERE)
    return {**properties, **{name: _IGNORED for name in others if name not in properties}}


def _with_rescale_q(allowed: Mapping[str, Schema]) -> dict[str, Schema]:
    """Parameters, with `rescale: {q: 0.15}` as another way to write `q: 0.15` where there is a q."""
    if "q" not in allowed:
        return dict(allowed)
    spelled = _block({"q": {"allOf": [allowed["q"], {"not": {"const": 0}}]}}) | {"required": ["q"]}
    return {**allowed, "rescale": {"anyOf": [allowed["rescale"], spelled]} if "rescale" in allowed else spelled}


def _sparsify(build: _Builder) -> Schema:
    """The `sparsify:` block: with a method, its parameters and no others."""
    rules = []
    for sparsifier in SPARSIFIERS:
        allowed = _words(next(iter(MERGE_METHODS)), sparsifier).sparsify or {}
        parameters = _with_rescale_q(build.parameters(sparsifier, allowed))
        then = _block({"method": {}} | _sparsify_options(build) | parameters)
        if "q" in allowed and "rescale" in allowed:
            then |= {"if": {"required": ["q"]}, "then": {"properties": {"rescale": {"const": "paper"}}}}
        rules.append({"if": _is("method", [sparsifier]), "then": then})
    return {
        "description": _SPARSIFY_HELP,
        "type": "object",
        "properties": {"method": _sparsifier_names()},
        "required": ["method"],
        "allOf": rules,
    }


def _sparsify_options(build: _Builder) -> dict[str, Schema]:
    """What every sparsifier takes besides its parameters."""
    kept: Schema = {"anyOf": [{"enum": [*GROUPS]}, {"type": "string", "pattern": r"[.*?\[]"}]}
    known: dict[str, Schema] = {
        "on": {
            "description": "Drop from each delta, or from the weights themselves (the paper's counter-experiment).",
            "enum": _literals(Sparsify, "on"),
            "default": "delta",
        },
        "seed": {"description": "Seed of the masks; each model's own seed is derived from it.", "default": 0} | seed(),
        "keep_dense": {
            "description": "Tensors in which nothing is dropped: groups, or globs over their names.",
            "anyOf": [*kept["anyOf"], {"type": "array", "items": kept}],
        },
    }
    return {key: build.refer("sparsify", key, known[key]) for key in SPARSIFY_KEYS if key != "method"}


def _merge_method_names() -> Schema:
    about = {name: _summary(entry.function) for name, entry in MERGE_METHODS.items()}
    about |= {alias: f"Another name for {name}." for alias, name in MERGE_ALIASES.items()}
    about |= {
        name: f"mergekit's name for {product.sparsifier} before {product.merge}." for name, product in PRODUCTS.items()
    }
    return _described("How the models become one.", about)


def _sparsifier_names() -> Schema:
    about = {name: _summary(entry.function) for name, entry in SPARSIFIERS.items()}
    return _described("How to choose what is dropped.", about)


def _described(description: str, about: Mapping[str, str]) -> Schema:
    """One of a few words; validators ignore `enumDescriptions`, editors show them."""
    return {"description": description, "enum": [*about], "enumDescriptions": [*about.values()]}


def _summary(function: Any) -> str:
    """A method's docstring, up to its source."""
    return " ".join((function.__doc__ or "").partition("Source: ")[0].split())


# --- what holds for some methods only ---


def _plain_rules(build: _Builder) -> list[Schema]:
    """Without a `sparsify:` block: native words, and mergekit's."""
    rules = []
    for method in (*MERGE_METHODS, *PRODUCTS):
        words = _words(method)
        merge = MERGE_METHODS[PRODUCTS[method].merge if method in PRODUCTS else method]
        own = _tolerant(_parameters(build.parameters(method, _narrowed(words.model, merge))))
        then = _of_method(merge, words, own, build)
        then["properties"]["parameters"] = _tolerant(then["properties"]["parameters"])
        condition = _is("merge_method", _spellings(method)) | {"not": {"required": ["sparsify"]}}
        condition["required"] = ["merge_method", "models"]
        rules.append({"if": condition, "then": then})
    return rules


def _sparsified_rules(build: _Builder) -> list[Schema]:
    """With a `sparsify:` block: native words only."""
    native = [name for method in MERGE_METHODS for name in _spellings(method)]
    on_deltas = {"not": _is("on", ["weights"])}
    rules: list[Schema] = [
        {"if": {"required": ["sparsify"]}, "then": {"properties": {"merge_method": {"enum": native}}}},
        {
            "if": {
                "required": ["sparsify", "models"],
                "properties": {
                    "sparsify": on_deltas,
                    "merge_method": {"not": {"enum": [n for n, e in MERGE_METHODS.items() if _first_may_be_base(e)]}},
                },
            },
            "then": {"required": ["base_model"]},
        },
    ]
    for method, merge in MERGE_METHODS.items():
        condition = _is("merge_method", _spellings(method)) | {"required": ["merge_method", "sparsify", "models"]}
        then = _of_method(merge, _words(method, next(iter(SPARSIFIERS))), {}, build)
        if merge.parts_base:
            then["properties"]["sparsify"] = {"properties": {"on": {"const": "delta"}}}
        rules.append({"if": condition, "then": then})
    return [*rules, *(rule for sparsifier in SPARSIFIERS for rule in _rules_of_models(sparsifier, build))]


def _of_method(merge: MergeMethod, words: Words, own: Schema, build: _Builder) -> Schema:
    """What a merge method asks of a recipe; `own`: what a model's parameters may be."""
    entry: Schema = {"properties": {"parameters": own}}
    if merge.weighted:  # its parameter, which nobody ignores beside `parameters:`
        entry["properties"][merge.weight_word] = False
    if merge.statistics is None:
        entry["properties"]["stats"] = False
    elif not merge.needs_base:  # else the base, which needs none, may be among the models
        entry |= {"type": "object", "required": ["stats"]}
    shared = _parameters(
        build.parameters(words.method, _narrowed(words.shared, merge, native=words.method in MERGE_METHODS))
    )
    models: Schema = {"items": entry}
    low, high = merge.models
    if high < math.inf:
        models["maxItems"] = high + merge.parts_base  # the base may be among them
    then: Schema = {"properties": {"parameters": shared, "models": models}}
    needed = [name for name, parameter in merge.parameters.items() if parameter.default is None]
    if needed:
        shared |= {"type": "object", "required": needed}
        then["required"] = ["parameters"]
    if _first_may_be_base(merge):
        return then | {"anyOf": [{"required": ["base_model"]}, {"properties": {"models": {"minItems": 2}}}]}
    if low > 1:
        models["minItems"] = low
    if merge.needs_base:
        then["required"] = [*then.get("required", []), "base_model"]
    return then


def _first_may_be_base(merge: MergeMethod) -> bool:
    """Whether, of two models without `base_model`, the first is the base."""
    return merge.base_row and merge.models == (1, 1)


def _rules_of_models(sparsifier: str, build: _Builder) -> list[Schema]:
    """A model's parameters are those of the sparsifier and of the merge method, so there is a rule for each pair."""
    groups: list[tuple[Schema, list[str]]] = []
    for method, merge in MERGE_METHODS.items():
        own = _parameters(build.parameters(sparsifier, _narrowed(_words(method, sparsifier).model, merge)))
        if "density" in own["properties"]:  # what a recipe of mergekit's, written in native words, has beside it
            own["dependencies"] = {"density": ["drop_rate"]}
        for known, names in groups:
            if known == own:
                names += _spellings(method)
                break
        else:
            groups.append((own, _spellings(method)))
    chosen = _is("method", [sparsifier])
    rules: list[Schema] = [
        {
            "if": {
                "required": ["merge_method", "sparsify"],
                "properties": {"merge_method": {"enum": names}, "sparsify": chosen},
            },
            "then": {"properties": {"models": {"items": {"properties": {"parameters": own}}}}},
        }
        for own, names in groups
    ]
    for name, parameter in SPARSIFIERS[sparsifier].parameters.items():
        if parameter.default is None:  # for all models, or for each but the base, should it be among them
            given = {"required": ["parameters"], "properties": {"parameters": {"type": "object", "required": [name]}}}
            somewhere: list[Schema] = [
                {"properties": {"sparsify": {"required": [name]}}},
                {"properties": {"models": {"contains": {"type": "object"} | given}}},
            ]
            condition = {"required": ["sparsify", "models"], "properties": {"sparsify": chosen}}
            rules.append({"if": condition, "then": {"anyOf": somewhere}})
    return rules


def _narrowed(allowed: Mapping[str, Parameter], merge: MergeMethod, *, native: bool = True) -> dict[str, Parameter]:
    """Parameters with what the merge method leaves of their ranges."""
    found = dict(allowed)
    if merge.statistics is not None:  # a mean, whose weights are not negative
        weight = found["weight"]
        assert isinstance(weight.kind, Number)
        found["weight"] = replace(weight, kind=replace(weight.kind, low=0))
    if native and merge.trims and found.get("rescale") == RESCALE:  # mergekit's word, of a native method
        found["rescale"] = replace(RESCALE, kind=Choice(RESCALE.kind.help, ("false", "paper", "l1", "none")))
    return found


def _words(method: str, sparsifier: str | None = None) -> Words:
    """The reader's own vocabulary for a merge method, with or without a `sparsify:` block."""
    data: dict[str, Any] = {"models": [{"model": "a", "parameters": {}}], "merge_method": method}
    if sparsifier is not None:
        data["sparsify"] = {"method": sparsifier}
    return check_names(Document(TITLE, data, {}, ""))[1]


def _spellings(method: str) -> list[str]:
    """A merge method's names in recipes."""
    return [method, *(alias for alias, name in MERGE_ALIASES.items() if name == method)]


def _is(key: str, words: Sequence[str]) -> Schema:
    """A condition: the key is there and is one of these words."""
    return {"required": [key], "properties": {key: {"enum": [*words]}}}
