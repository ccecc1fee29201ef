# SPDX-License-Identifier: Apache-2.0
"""Which words a recipe may hold where: known from the table of methods; all unknown ones in one message."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darekit.errors import RecipeError
from darekit.methods import (
    MERGE_ALIASES,
    MERGE_METHODS,
    SEED,
    SPARSIFIERS,
    TAU,
    WEIGHT,
    MergeMethod,
    Number,
    Parameter,
    installed,
)
from darekit.recipe import mergekit, references, tokens
from darekit.recipe.documents import Document, Key, fail, shown, suggest
from darekit.recipe.ignored import anchored, lambda_ignored, why_ignored, without
from darekit.recipe.layout import FORMS, MODEL_KEYS, MODULE_KEYS, SLICE_KEYS, SOURCE_KEYS, SliceAt, layout_of
from darekit.recipe.parameters import block_at

# --- names ---

TOP_KEYS: tuple[str, ...] = (
    "stages", "base_model", "models", "slices", "modules", "sparsify", "merge_method", "parameters", "dtype",
    "out_dtype", "vocab", "tokenizer_source", "tokenizer", "chat_template", "heads", "keep_float32", "base_extras",
    "rounding", "output", "rank",
)  # fmt: skip
AUTOMATIC = ("dare",)  # sparsifiers whose perturbation is predicted, so that they take drop_rate: auto
SPARSIFY_KEYS = ("method", "on", "seed", "keep_dense")
_FILTER_KEYS = ("filter", "value")


@dataclass(frozen=True)
class Words:
    """The methods of a recipe, and the parameters that may stand where. `sparsify` is None without that block."""

    method: str
    sparsifier: str | None
    shared: Mapping[str, Parameter]
    model: Mapping[str, Parameter]
    sparsify: Mapping[str, Parameter] | None

    @property
    def needs_base(self) -> bool:
        """Whether the method works on differences to a base (mergekit's products all do)."""
        return self.merge_method is None or self.merge_method.needs_base

    @property
    def parts_base(self) -> bool:
        """Whether a base that is also listed among the models is none of them."""
        return self.merge_method is None or self.merge_method.parts_base

    @property
    def merge_method(self) -> MergeMethod | None:
        """The method's entry in the table; None for one of mergekit's products."""
        return MERGE_METHODS.get(self.method)


def check_names(document: Document, *, lenient: bool = False) -> tuple[Document, Words, list[str]]:
    """The recipe's methods and vocabulary; raises once for all the names that are not in it.

    Args:
        document: the recipe.
        lenient: names that are not in it are left out, with a warning each.

    Returns:
        The recipe without what has no effect, its words, and notes of what was left out.

    Raises:
        RecipeError: a method or other names that do not exist where they stand.
    """
    data = document.data
    if "axes" in data and "merge_method" not in data:
        fail(document, ("axes",), " belongs to a sweep file, not to a recipe: run it with `dare sweep`")
    unknown: list[Unknown] = [Unknown((key,), _explain_top(key)) for key in data if key not in TOP_KEYS]
    if "merge_method" not in data or not any(form in data for form in FORMS):
        _raise_unknown(document, unknown)
        missing = "merge_method" if "merge_method" not in data else "models"
        slices = data["slices"] if isinstance(data.get("slices"), list) else []
        inner = next((i for i, one in enumerate(slices) if isinstance(one, dict) and missing in one), None)
        hint = "" if inner is None else f". It is one for all slices: move that of slices.{inner} to the top level"
        fail(document, (), f"no {missing}; a recipe needs models (or slices, or modules) and merge_method{hint}")
    layout = layout_of(document)
    words = _words_of(document)
    for one in layout:
        unknown += _unknown_around(document, one, words)
        for source in one.sources:
            allowed = MODEL_KEYS if one.path is None else SOURCE_KEYS
            unknown += [
                Unknown((*source.path, key), _explain_entry(key, words, allowed))
                for key in source.entry
                if key not in allowed
            ]
            unknown += _unknown_parameters(
                document, (*source.path, "parameters"), source.entry.get("parameters"), words.model, words
            )
            named = references.unknown_keys((*source.path, "model"), source.entry.get("model"))
            unknown += [Unknown(*one) for one in named]
    unknown += [Unknown(*one) for one in _unknown_in_names(document)]
    unknown += _unknown_parameters(document, ("parameters",), data.get("parameters", {}), words.shared, words)
    if words.sparsify is not None:
        block = {key: value for key, value in data["sparsify"].items() if key not in SPARSIFY_KEYS}
        unknown += _unknown_parameters(document, ("sparsify",), block, words.sparsify, words)
    unknown = list({one.path: one for one in unknown}.values())  # a module's are met in each of its slices
    ignored = {one.path: note for one in unknown if (note := _ignored(document, one, words)) is not None}
    unknown = [one for one in unknown if one.path not in ignored]
    if not lenient:
        _raise_unknown(document, unknown)
    notes = [*ignored.values(), *(_left_out(one) for one in unknown)]
    return without(document, [*ignored, *(one.path for one in unknown)]), words, notes


@dataclass(frozen=True)
class Unknown:
    """A key that means nothing where it stands. `inside`: it is in a block of parameters."""

    path: Key
    why: str
    inside: bool = False


def _ignored(document: Document, one: Unknown, words: Words) -> str | None:
    """The note for a key that mergekit's recipes may have there without effect."""
    if words.sparsify is not None or words.method not in mergekit.METHODS:
        return None
    entry = words.merge_method or MERGE_METHODS[mergekit.PRODUCTS[words.method].merge]
    misspelt = difflib.get_close_matches(str(one.path[0]), TOP_KEYS, cutoff=0.8)
    if len(one.path) == 1 and one.path[0] in document.repeated and not misspelt:
        return anchored(one.path)
    lambda_ = one.inside and one.path[-1] == "lambda" and mergekit.lambda_is_ours(words.method)
    return (
        lambda_ignored(one.path, words.method)
        if lambda_
        else (why_ignored(one.path, words.method, entry, inside=one.inside))
    )


def _left_out(one: Unknown) -> str:
    """The note for a key that would be refused: what it may be a misspelling of, without all that may stand there."""
    why = re.split(r"(?i)[;?] allowed here: ", one.why)[0]
    end = "? Ignored" if "did you mean" in why else ": ignored"
    return f"WARNING: {'.'.join(map(str, one.path))} {why}{end} (--lenient)"


def _raise_unknown(document: Document, unknown: Sequence[Unknown]) -> None:
    if len(unknown) == 1:
        fail(document, unknown[0].path, f" {unknown[0].why}")
    if unknown:
        listed = "".join(
            f"\n  {document.places.get(one.path, 'in')}{':' if one.path in document.places else ''} "
            f"{'.'.join(map(str, one.path))} {one.why}"
            for one in unknown
        )
        raise RecipeError(
            f"{document.name}: {len(unknown)} keys are not allowed where they are{listed}",
            [one.path for one in unknown],
        )


def _explain_top(key: str) -> str:
    if key in ("seed", "random_seed"):
        return "is not a top-level key; write it as sparsify.seed (in mergekit's form, parameters.seed), or pass --seed"
    shared = {name for entry in MERGE_METHODS.values() for name in entry.parameters}
    if key in shared | {WEIGHT.name, mergekit.DENSITY.name, mergekit.INT8_MASK.name}:
        return "is not a top-level key; write it under `parameters:`"
    if key in ("experts", "shared_experts", "gate_mode", "experts_per_token"):
        return "belongs to mergekit-moe, which makes a mixture of experts of models; darekit merges models of one form"
    if key == "genome":
        return "belongs to mergekit-evolve, which searches for parameters; here: `dare search`"
    if key == "stats":
        return "is not a top-level key; each model has its own: `- {model: name, stats: name.safetensors}`"
    if key in SPARSIFY_KEYS or any(key in entry.parameters for entry in SPARSIFIERS.values()):
        return "is not a top-level key; write it under `sparsify:`"
    return f"is not known{suggest(key, TOP_KEYS)}"


def _unknown_around(document: Document, one: SliceAt, words: Words) -> Iterator[Unknown]:
    """Unknown keys of a slice and its module, and of their `parameters:`."""
    for path, allowed in ((one.path, SLICE_KEYS), (one.module, MODULE_KEYS)):
        if path is None:
            continue
        block = block_at(document, path)
        yield from (
            Unknown((*path, key), f"is not known{suggest(key, allowed)}") for key in block if key not in allowed
        )
        yield from _unknown_parameters(
            document, (*path, "parameters"), block.get("parameters"), {**words.model, **words.shared}, words
        )


def _unknown_in_names(document: Document) -> Iterator[tuple[Key, str]]:
    """Unknown keys of mappings that stand for a base's or a tokenizer's name, and of `tokenizer:`."""
    data = document.data
    for key in ("base_model", "tokenizer_source"):
        yield from references.unknown_keys((key,), data.get(key))
    if isinstance(data.get("tokenizer"), dict):
        yield from references.unknown_keys(("tokenizer", "source"), data["tokenizer"].get("source"))
    yield from tokens.unknown_keys(data)


def _explain_entry(key: str, words: Words, allowed: Sequence[str]) -> str:
    if key in ("statistics", "fisher", "gram"):
        return "is not known; a model's statistics file is its `stats:`"
    if key in words.model:
        return "is one level too high; move it under the model's `parameters:`"
    return f"is not known{suggest(key, allowed)}"


def _words_of(document: Document) -> Words:
    method = _read_method(document)
    if "sparsify" not in document.data:
        shared = mergekit.shared_words(method, ours=_is_ours(document))
        return Words(method, None, shared, mergekit.model_words(method), None)
    block = document.data["sparsify"]
    if not isinstance(block, dict):
        fail(
            document,
            ("sparsify",),
            f"expected a mapping such as {{method: dare, drop_rate: 0.9}}, found {shown(block)}",
        )
    if method in mergekit.PRODUCTS:
        product = mergekit.PRODUCTS[method]
        fail(
            document,
            ("merge_method",),
            f"{method} already names a sparsifier, and there is a `sparsify:` block; with it write merge_method: "
            f"{product.merge}",
        )
    sparsifier = _read_sparsifier(document, block)
    sparse, merge = dict(SPARSIFIERS[sparsifier].parameters), MERGE_METHODS[method].parameters
    if sparsifier in AUTOMATIC:
        sparse["tau"] = TAU
    numbers = {n: p for n, p in (sparse | merge).items() if isinstance(p.kind, Number) and p.kind.per_model}
    weight = mergekit.weight_words(method)
    model = {**weight, **numbers, "seed": SEED}
    if sparsifier in ("breadcrumbs", "magnitude"):
        model["density"] = mergekit.DENSITY  # only beside its drop_rate, as `to_data` of a mergekit recipe has it
    return Words(method, sparsifier, weight | merge, model, sparse)


def _is_ours(document: Document) -> bool:
    """Whether a recipe without a `sparsify:` block says that it is none of mergekit's: by a key of ours, or by the way
    in which its lambda was given."""
    return "output" in document.data or document.places.get(("parameters", "lambda"), "").startswith("setting")


def _read_method(document: Document) -> str:
    raw = document.data["merge_method"]
    method = str(raw)
    problems = _look_for(method, (*MERGE_METHODS, *MERGE_ALIASES, *mergekit.PRODUCTS))
    known = (*MERGE_METHODS, *MERGE_ALIASES, *mergekit.PRODUCTS)
    if method in known:
        return MERGE_ALIASES.get(method, method)
    hint = suggest(method, known, "known")
    if method in SPARSIFIERS:
        hint = f": {method} is a sparsifier, write `sparsify: {{method: {method}, ...}}`; here: {', '.join(known)}"
    fail(document, ("merge_method",), f"unknown method {shown(raw)}{hint}{problems}")


def _look_for(method: str, known: Iterable[str]) -> str:
    """Ask installed packages for a method that is not known; what could not be loaded, for the error."""
    return "" if method in known else "".join(f"\n  not loaded: {line}" for line in installed.load(method))


def _read_sparsifier(document: Document, block: Mapping[str, Any]) -> str:
    if "method" not in block:
        fail(document, ("sparsify",), f" has no method; add method: one of {', '.join(SPARSIFIERS)}")
    method = str(block["method"])
    problems = _look_for(method, (*SPARSIFIERS, *MERGE_METHODS))
    if method in SPARSIFIERS:
        return method
    hint = suggest(method, list(SPARSIFIERS), "known")
    if method in MERGE_METHODS:
        hint = f": {method} is a merge method, write `merge_method: {method}`; here: {', '.join(SPARSIFIERS)}"
    if method in mergekit.PRODUCTS:
        product = mergekit.PRODUCTS[method]
        hint = f"; write method: {product.sparsifier} here and merge_method: {product.merge}"
    fail(document, ("sparsify", "method"), f"unknown method {shown(block['method'])}{hint}{problems}")


def _unknown_parameters(
    document: Document, path: Key, raw: Any, allowed: Mapping[str, Parameter], words: Words
) -> Iterator[Unknown]:
    if raw is None:
        return
    if not isinstance(raw, dict):
        fail(document, path, f"expected a mapping such as {{weight: 1.0}}, found {shown(raw)}")
    for name, value in raw.items():
        if name not in allowed:
            yield Unknown((*path, name), _explain(name, value, path, allowed, words), inside=True)
            continue
        entries = enumerate(value) if isinstance(value, list) else [(None, value)]
        reached = True
        for i, entry in entries:
            if isinstance(entry, dict):
                if not reached and i is not None and words.sparsify is None:
                    yield Unknown(
                        (*path, name, i),
                        "is never reached: the entry before it matches every tensor; put that one last",
                        inside=True,
                    )
                    continue
                reached = reached and entry.get("filter", "*") not in (None, "*", "")
                here = (*path, name) if i is None else (*path, name, i)
                for key in entry:
                    if key not in _FILTER_KEYS:
                        yield Unknown((*here, key), f"is not known{suggest(key, _FILTER_KEYS)}")


def _explain(name: str, value: Any, path: Key, allowed: Mapping[str, Parameter], words: Words) -> str:
    """Why a parameter cannot stand at `path`, and where it belongs."""
    sparse = words.sparsify
    if (sparse is None or name == WEIGHT.name) and (advice := mergekit.advise(name, value, words.method)):
        return f"is not allowed here: {advice}"
    if name == mergekit.DENSITY.name:
        return f"is mergekit's word; with a `sparsify:` block write drop_rate: {mergekit.drop_rate_words(value)}"
    if name in words.shared:
        return "is one for all models: write it under the top-level `parameters:`"
    if sparse is not None and (name in sparse or name in ("on", "seed", "keep_dense")):
        model = " or, for one model, under its `parameters:`" if name in words.model else ""
        return f"belongs to the sparsifier: write it under `sparsify:`{model}"
    owners = [n for n, entry in SPARSIFIERS.items() if name in entry.parameters]
    if sparse is None and (owners or name in ("on", "keep_dense")):
        owner = owners[0] if owners else "dare"
        return f"belongs to a sparsifier: write `sparsify: {{method: {owner}, {name}: {shown(value)}}}`"
    owners += [n for n, entry in MERGE_METHODS.items() if name in entry.parameters]
    if owners:
        chosen = words.method if words.sparsifier is None else f"{words.sparsifier} or {words.method}"
        return f"is a parameter of {' and '.join(owners)}, not of {chosen}"
    if name in TOP_KEYS:
        return "belongs to the recipe itself: write it at the top level, beside merge_method"
    return f"is not known{suggest(name, [*allowed, *(SPARSIFY_KEYS if path == ('sparsify',) else ())])}"
