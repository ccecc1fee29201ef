# SPDX-License-Identifier: Apache-2.0
"""Which words a recipe may hold where: known from the table of methods; all unknown ones in one message."""

from __future__ import annotations

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
from darekit.recipe import mergekit
from darekit.recipe.documents import Document, Key, fail, shown, suggest

# --- what later versions will do ---


def refuse_later(document: Document) -> None:
    """Refuse by name what mergekit has and darekit does not have yet."""
    for key, what in mergekit.LATER_KEYS.items():
        if key in document.data:
            fail(document, (key,), f"{key} ({what}) comes in a later version of darekit")


# --- names ---

TOP_KEYS: tuple[str, ...] = (
    "base_model", "models", "sparsify", "merge_method", "parameters", "dtype", "out_dtype", "vocab", "tokenizer_source",
    "tokenizer", "chat_template", "heads", "keep_float32", "base_extras",
)  # fmt: skip
AUTOMATIC = ("dare",)  # sparsifiers whose perturbation is predicted, so that they take drop_rate: auto
_MODEL_KEYS = ("model", "parameters", "stats")
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


def check_names(document: Document) -> Words:
    """The recipe's methods and vocabulary; raises once for all the names that are not in it."""
    data = document.data
    if "axes" in data and "merge_method" not in data:
        fail(document, ("axes",), " belongs to a sweep file, not to a recipe: run it with `dare sweep`")
    unknown: list[tuple[Key, str]] = [((key,), _explain_top(key)) for key in data if key not in TOP_KEYS]
    if "merge_method" not in data or "models" not in data:
        _raise_unknown(document, unknown)
        missing = "merge_method" if "merge_method" not in data else "models"
        fail(document, (), f"no {missing}; a recipe needs models and merge_method")
    words = _words_of(document)
    for k, entry, own in raw_models(document):
        unknown += [(("models", k, key), _explain_entry(key, words)) for key in entry if key not in _MODEL_KEYS]
        unknown += _unknown_parameters(document, ("models", k, "parameters"), own, words.model, words)
    unknown += _unknown_parameters(document, ("parameters",), data.get("parameters", {}), words.shared, words)
    if words.sparsify is not None:
        block = {key: value for key, value in data["sparsify"].items() if key not in SPARSIFY_KEYS}
        unknown += _unknown_parameters(document, ("sparsify",), block, words.sparsify, words)
    _raise_unknown(document, unknown)
    return words


def _raise_unknown(document: Document, unknown: Sequence[tuple[Key, str]]) -> None:
    if len(unknown) == 1:
        fail(document, unknown[0][0], f" {unknown[0][1]}")
    if unknown:
        listed = "".join(
            f"\n  {document.places.get(path, 'in')}{':' if path in document.places else ''} "
            f"{'.'.join(map(str, path))} {why}"
            for path, why in unknown
        )
        raise RecipeError(f"{document.name}: {len(unknown)} keys are not allowed where they are{listed}")


def _explain_top(key: str) -> str:
    if key in ("seed", "random_seed"):
        return "is not a top-level key; write it as sparsify.seed (in mergekit's form, parameters.seed), or pass --seed"
    shared = {name for entry in MERGE_METHODS.values() for name in entry.parameters}
    if key in shared | {WEIGHT.name, mergekit.DENSITY.name, mergekit.INT8_MASK.name}:
        return "is not a top-level key; write it under `parameters:`"
    if key == "stats":
        return "is not a top-level key; each model has its own: `- {model: name, stats: name.safetensors}`"
    if key in SPARSIFY_KEYS or any(key in entry.parameters for entry in SPARSIFIERS.values()):
        return "is not a top-level key; write it under `sparsify:`"
    return f"is not known{suggest(key, TOP_KEYS)}"


def _explain_entry(key: str, words: Words) -> str:
    if key in ("statistics", "fisher", "gram"):
        return "is not known; a model's statistics file is its `stats:`"
    if key in words.model:
        return "is one level too high; move it under the model's `parameters:`"
    return f"is not known{suggest(key, _MODEL_KEYS)}"


def _words_of(document: Document) -> Words:
    method = _read_method(document)
    if "sparsify" not in document.data:
        return Words(method, None, mergekit.shared_words(method), mergekit.model_words(method), None)
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
    if sparsifier == "breadcrumbs":
        model["density"] = mergekit.DENSITY  # only beside its drop_rate, as `to_data` of a mergekit recipe has it
    return Words(method, sparsifier, weight | merge, model, sparse)


def _read_method(document: Document) -> str:
    raw = document.data["merge_method"]
    method = str(raw)
    problems = _look_for(method, (*MERGE_METHODS, *MERGE_ALIASES, *mergekit.PRODUCTS))
    known = (*MERGE_METHODS, *MERGE_ALIASES, *mergekit.PRODUCTS)
    if method in known:
        return MERGE_ALIASES.get(method, method)
    if method in mergekit.LATER_METHODS:
        fail(document, ("merge_method",), f"{method} comes in a later version of darekit; now: {', '.join(known)}")
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
) -> Iterator[tuple[Key, str]]:
    if not isinstance(raw, dict):
        fail(document, path, f"expected a mapping such as {{weight: 1.0}}, found {shown(raw)}")
    for name, value in raw.items():
        if name not in allowed:
            yield (*path, name), _explain(name, value, path, allowed, words)
            continue
        entries = enumerate(value) if isinstance(value, list) else [(None, value)]
        for i, entry in entries:
            if isinstance(entry, dict):
                here = (*path, name) if i is None else (*path, name, i)
                for key in entry:
                    if key not in _FILTER_KEYS:
                        yield (*here, key), f"is not known{suggest(key, _FILTER_KEYS)}"


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
    return f"is not known{suggest(name, [*allowed, *(SPARSIFY_KEYS if path == ('sparsify',) else ())])}"


def raw_models(document: Document) -> Iterator[tuple[int, dict[str, Any], Any]]:
    """Place in `models`, entry, its raw parameters."""
    raw = document.data["models"]
    if not isinstance(raw, list) or not raw:
        fail(document, ("models",), f"expected a list of at least one `- model: name`, found {shown(raw)}")
    for k, entry in enumerate(raw):
        if not isinstance(entry, dict):
            fail(document, ("models", k), f"expected `model: name` or a name, found {shown(entry)}")
        yield k, entry, entry["parameters"]
