# SPDX-License-Identifier: Apache-2.0
"""The recipe: which models, sparsified how, merged how. Inert data, and the strict reading of it.

Reading goes in passes, each over the whole recipe: YAML -> plain data with the line of every key; overrides; what is
refused by name; unknown names (all in one message); values; mergekit's words -> native ones; what belongs together.
Names and ranges of parameters come from the table of methods, never from here.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import yaml

from darekit import mergekit
from darekit.dtypes import DTYPES, FLOAT_DTYPES, dtype_from_torch_name
from darekit.errors import RecipeError
from darekit.methods import MERGE_ALIASES, MERGE_METHODS, SEED, SPARSIFIERS, WEIGHT, Choice, Number, Parameter, Switch
from darekit.naming import GROUPS


@dataclass(frozen=True, slots=True)
class Filtered:
    """One entry of a per-tensor list: `value` for the tensors that `filter` matches ("*": all)."""

    filter: str
    value: Any


Value = float | int | bool | str | tuple[Filtered, ...]


@dataclass(frozen=True)
class ModelEntry:
    """One model: directory or Hub id as written, and the parameters that are set for it alone."""

    model: str
    parameters: Mapping[str, Value]


@dataclass(frozen=True)
class Sparsify:
    """How each delta (or, `on` weights, each model) is made sparse; `parameters` holds only what was given."""

    method: str
    parameters: Mapping[str, Value]
    on: Literal["delta", "weights"] = "delta"
    seed: int = 0
    keep_dense: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """What to do, in native words and canonical names; knows no file. `dtype`: None keeps the base's."""

    base_model: str | None
    models: tuple[ModelEntry, ...]
    sparsify: Sparsify | None
    merge_method: str
    parameters: Mapping[str, Value]
    dtype: str | None = None
    vocab: Literal["strict", "base", "pad"] = "strict"
    tokenizer_source: str = "base"
    notes: tuple[str, ...] = field(default=(), compare=False)
    text: str = field(default="", compare=False, repr=False)

    def to_data(self) -> dict[str, Any]:
        """The recipe as JSON-able data in native form: `read_recipe` of it gives an equal recipe."""
        data: dict[str, Any] = {} if self.base_model is None else {"base_model": self.base_model}
        data["models"] = [{"model": e.model, "parameters": _parameters_data(e.parameters)} for e in self.models]
        if self.sparsify is not None:
            data["sparsify"] = {
                "method": self.sparsify.method,
                **_parameters_data(self.sparsify.parameters),
                "on": self.sparsify.on,
                "seed": self.sparsify.seed,
                "keep_dense": list(self.sparsify.keep_dense),
            }
        data["merge_method"] = self.merge_method
        data["parameters"] = _parameters_data(self.parameters)
        if self.dtype is not None:
            data["dtype"] = DTYPES[self.dtype].torch_name
        return data | {"vocab": self.vocab, "tokenizer_source": self.tokenizer_source}


def _parameters_data(parameters: Mapping[str, Value]) -> dict[str, Any]:
    return {
        name: [{"filter": e.filter, "value": e.value} for e in value] if isinstance(value, tuple) else value
        for name, value in parameters.items()
    }


def resolve(values: Sequence[Value | None], tensor: str) -> Any:
    """Values in order of precedence (the model's, the recipe's), tensor name -> the value for that tensor.

    The first scope that yields a value wins; a list of filters without a match falls through to the next scope.
    None if nothing matches.

    >>> resolve([(Filtered("mlp", 0.9),), 0.5], "model.layers.0.mlp.up_proj.weight")
    0.9
    >>> resolve([(Filtered("mlp", 0.9),), 0.5], "model.norm.weight")
    0.5
    """
    for value in values:
        if isinstance(value, tuple):
            for entry in value:
                if _matches(entry.filter, tensor):
                    return entry.value
        elif value is not None:
            return value
    return None


def _matches(pattern: str, tensor: str) -> bool:
    """A glob over the whole name if there is a glob character in it, else a substring."""
    return pattern == "*" or (fnmatchcase(tensor, pattern) if _is_glob(pattern) else pattern in tensor)


def _is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def read_recipe(
    source: str | Path | Mapping[str, Any], *, settings: Mapping[str, Any] | None = None, seed: int | None = None
) -> Recipe:
    """A YAML file, or the same as data -> recipe; `settings` are overrides by dotted path, `seed` of `sparsify.seed`.

    Raises:
        RecipeError: the text is not a recipe: the message names file, line and key, and what to write instead.
    """
    document = _open_data(source) if isinstance(source, Mapping) else _open_file(Path(source))
    document = _override(document, settings or {}, seed)
    _refuse_later(document)
    words = _check_names(document)
    models = _read_models(document, words)
    shared = _read_parameters(document, ("parameters",), words.shared)
    base = _read_text(document, "base_model")
    notes = []
    if base is not None and words.needs_base and any(_same(name, base) for _, name, _ in models):
        notes.append(f"{base} is the base and also one of the models: its delta is 0, it is left out of the models")
        models = [entry for entry in models if not _same(entry[1], base)]
        if not models:
            _fail(document, ("models",), "only the base is listed; add a model that was fine-tuned from it")
    if words.sparsify is None:
        parts = mergekit.translate(words.method, shared, models, lambda path, why: _fail(document, path, why))
        notes.extend(parts.notes)
        entries = [(k, ModelEntry(name, own)) for (k, name, _), own in zip(models, parts.models, strict=True)]
        sparsify = Sparsify(parts.sparsifier, parts.sparsify, seed=parts.seed or 0) if parts.sparsifier else None
        method, shared, seeded = parts.merge_method, parts.shared, parts.seed is not None
    else:
        entries = [(k, ModelEntry(name, own)) for k, name, own in models]
        sparsify, method, seeded = _read_sparsify(document, words), words.method, "seed" in document.data["sparsify"]
    recipe = Recipe(
        base_model=base,
        models=tuple(entry for _, entry in entries),
        sparsify=sparsify,
        merge_method=method,
        parameters=shared,
        dtype=_read_dtype(document),
        vocab=_read_choice(document, ("vocab",), ("strict", "base", "pad")),  # type: ignore[arg-type]
        tokenizer_source=_read_tokenizer_source(document, base, [name for _, name, _ in _models_of(document)]),
        text=document.text,
    )
    _check_whole(document, recipe, [k for k, _ in entries])
    return replace(recipe, notes=(*notes, *_notes(recipe, seeded)))


# --- YAML -> plain data, with the place of every key ---

Key = tuple[str | int, ...]

_LARGEST_FILE = 1 << 20
_LARGEST_COUNT = 100_000  # keys and values after aliases are expanded: a bomb of nine lines has 1e9
_DEEPEST = 32
_LARGEST_INT = 1 << 128  # a hexadecimal number may be too long to print

# What PyYAML's constructors let through for a value that its tag does not fit (`!!bool maybe`).
_MALFORMED = (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError)


@dataclass(frozen=True)
class _Document:
    """Plain data, where each of its keys stands ("line 7"), and its text."""

    name: str
    data: dict[str, Any]
    places: Mapping[Key, str]
    text: str


def _fail(document: _Document, path: Key, message: str) -> NoReturn:
    """Raise with file, line and key; a message that starts with a space goes on from the key's name."""
    dotted = ".".join(map(str, path))
    joint = "" if not dotted or message.startswith(" ") else ": "
    raise RecipeError(f"{_where(document, path)}: {dotted}{joint}{message}")


def _where(document: _Document, path: Key) -> str:
    """File and line of a key, or of the nearest key around it."""
    for end in range(len(path), 0, -1):
        if path[:end] in document.places:
            return f"{document.name} {document.places[path[:end]]}"
    return document.name


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _open_file(path: Path) -> _Document:
    name = str(path)
    if "\n" in name:
        raise RecipeError(
            "a recipe is the path of a YAML file or a mapping, found text of several lines; for YAML text pass "
            "yaml.safe_load(text)"
        )
    if path.is_dir():
        raise RecipeError(f"{name} is a directory; a recipe is a YAML file: name the file in it")
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise RecipeError(f"{name}: no such file{_similar_files(path)}") from None
    except OSError as error:
        raise RecipeError(f"{name} cannot be read: {error.strerror}") from None
    if len(raw) > _LARGEST_FILE:
        raise RecipeError(f"{name} is larger than 1 MiB; a recipe is a small YAML file: is this a checkpoint?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{name} line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save it as UTF-8") from None
    data, places = _parse(text, name)
    return _normalize(_Document(name, data, places, text))


def _similar_files(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")]
    except OSError:
        return ""
    return _did_you_mean(path.name, names)


def _open_data(source: Mapping[str, Any]) -> _Document:
    plain = _plain(source, 0)
    # Programs pass None for "not given"; in a file an empty key is a slip.
    data = {key: value for key, value in plain.items() if value is not None}
    return _normalize(_Document("recipe", data, {}, _dump(data)))


def _dump(data: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)


def _plain(value: Any, depth: int) -> Any:
    """Mappings, sequences and numpy scalars of a caller -> dict, list and Python's own numbers."""
    if depth > _DEEPEST:
        raise RecipeError(f"recipe: nested deeper than {_DEEPEST} levels")
    if isinstance(value, Mapping):
        # YAML 1.1 reads the key `on` as true.
        return {"on" if key is True else str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    if isinstance(value, int) and abs(value) >= _LARGEST_INT:
        raise RecipeError("recipe: found an integer of 2^128 or more; no parameter is that large")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise RecipeError(
        f"recipe: found a {type(value).__name__} ({_shown(value)}); expected mappings, lists, numbers and text"
    )


def _parse(text: str, name: str) -> tuple[dict[str, Any], dict[Key, str]]:
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(f"{name} is empty; a recipe needs at least `models:` and `merge_method:`")
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(
                f"{name} line {node.start_mark.line + 1}: expected a mapping (`key: value` lines) at the top, found a "
                f"{'list' if isinstance(node, yaml.SequenceNode) else 'single value'}"
            )
        walker = _Walker(loader, name)
        return cast(dict[str, Any], walker.build(node, ())), walker.places
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_yaml_problem(error, name)) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{name}: nested deeper than {_DEEPEST} levels") from None


def _yaml_problem(error: yaml.MarkedYAMLError, name: str) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{name} line {mark.line + 1}" if mark else name
    problem = error.problem or str(error)
    if "single document" in (error.context or "") or "another document" in problem:
        return f"{where}: a second document starts here (`---`); a recipe is one document: split the file"
    hint = "; YAML indents with spaces, never with tabs" if r"'\t'" in problem else ""
    return f"{where}: not YAML: {problem}{hint}"


class _Walker:
    """Nodes -> plain data. Keeps the lines, and counts, so that aliases cannot explode."""

    def __init__(self, loader: yaml.SafeLoader, name: str) -> None:
        self.loader, self.name, self.count = loader, name, 0
        self.places: dict[Key, str] = {}

    def build(self, node: yaml.Node, path: Key) -> Any:
        self.count += 1
        line = node.start_mark.line + 1
        if self.count > _LARGEST_COUNT or len(path) > _DEEPEST:
            raise RecipeError(
                f"{self.name} line {line}: too large or too deep when its aliases are written out (at most "
                f"{_LARGEST_COUNT} values, {_DEEPEST} levels)"
            )
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            found = []
            for i, item in enumerate(node.value):
                self.places[(*path, i)] = f"line {item.start_mark.line + 1}"
                found.append(self.build(item, (*path, i)))
            return found
        if not isinstance(node, yaml.ScalarNode):
            raise RecipeError(f"{self.name} line {line}: the tag {node.tag!r} is not supported; remove it")
        self.count += len(node.value) // 64
        try:
            value = self.loader.construct_object(node)
        except _MALFORMED:
            kind = node.tag.rpartition(":")[2]
            raise RecipeError(f"{self.name} line {line}: {node.value[:40]!r} is not a valid {kind}") from None
        if isinstance(value, int) and abs(value) >= _LARGEST_INT:
            raise RecipeError(f"{self.name} line {line}: the number {node.value[:40]!r} is too large")
        if value is None or isinstance(value, str | bool | int | float):
            return value
        return str(node.value)  # a date is a model's name here

    def _mapping(self, node: yaml.MappingNode, path: Key) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key, item in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                merged += item.value if isinstance(item, yaml.SequenceNode) else [item]
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{self.name} line {line}: expected a word as a key, found a list or mapping")
            name = str(key.value)  # the text, not what YAML 1.1 makes of it: it reads the key `on` as true
            if name in lines:
                raise RecipeError(
                    f"{self.name} line {line}: {'.'.join(map(str, (*path, name)))} is given twice (first in line "
                    f"{lines[name]}); keep one"
                )
            lines[name] = line
            self.places[(*path, name)] = f"line {line}"
            found[name] = self.build(item, (*path, name))
        for other in merged:
            extra = self.build(other, path)
            if not isinstance(extra, dict):
                raise RecipeError(f"{self.name} line {other.start_mark.line + 1}: `<<` merges mappings only")
            found = extra | found
        return found


def _normalize(document: _Document) -> _Document:
    """Give every model its mapping and every empty `parameters:` an empty one, so that all have the same paths."""
    data = dict(document.data)
    if data.get("parameters", 0) is None:
        data["parameters"] = {}
    if isinstance(data.get("models"), list):
        data["models"] = [_model_mapping(entry) for entry in data["models"]]
    return replace(document, data=data)


def _model_mapping(entry: Any) -> Any:
    if isinstance(entry, str):
        return {"model": entry, "parameters": {}}
    if isinstance(entry, dict) and entry.get("parameters") is None:
        return entry | {"parameters": {}}
    return entry


# --- overrides ---


def _override(document: _Document, settings: Mapping[str, Any], seed: int | None) -> _Document:
    changes: dict[tuple[str, ...], tuple[str, Any]] = {
        tuple(dotted.split(".")): (dotted, value) for dotted, value in settings.items()
    }
    if seed is not None:
        changes["sparsify" if "sparsify" in document.data else "parameters", "seed"] = ("seed", seed)
    if not changes:
        return document
    data: dict[str, Any] = _plain(document.data, 0)
    places = dict(document.places)
    for path, (dotted, value) in changes.items():
        if isinstance(value, str):
            value = _parse_setting(value, dotted)
        _set(data, path, dotted, _plain(value, 0))
        key = tuple(int(part) if part.isdecimal() else part for part in path)
        places = {other: place for other, place in places.items() if other[: len(key)] != key}
        places[key] = f"setting {dotted}"
    listed = ", ".join(f"{dotted}={value}" for dotted, value in changes.values())
    return _normalize(replace(document, data=data, places=places, text=f"# overridden: {listed}\n{_dump(data)}"))


def _parse_setting(text: str, dotted: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, *_MALFORMED) as error:
        raise RecipeError(f"setting {dotted}: {text!r} is not a YAML value: {' '.join(str(error).split())}") from None


def _set(data: dict[str, Any], path: tuple[str, ...], dotted: str, value: Any) -> None:
    """Write `value` at `path` in the data; the last key and `parameters` may be new."""
    here: Any = data
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        around = ".".join(path[:depth]) or "the recipe"
        if isinstance(here, list):
            if not key.isdecimal() or int(key) >= len(here):
                _fail_setting(dotted, f"{around} has the entries 0 to {len(here) - 1}, found {key!r}")
            if last:
                here[int(key)] = value
            here = here[int(key)]
        elif isinstance(here, dict):
            if last:
                here[key] = value
            elif key not in here and key != "parameters":
                known = ["parameters", *(name for name in here if name != "parameters")]
                _fail_setting(dotted, f"{around} has no {key!r}{_suggest(key, known, 'it has')}")
            here = here.setdefault(key, {})
        else:
            _fail_setting(dotted, f"{around} is the single value {here!r} and has no {key!r}")


def _fail_setting(dotted: str, message: str) -> NoReturn:
    raise RecipeError(f"setting {dotted}: {message}")


# --- what later versions will do ---


def _refuse_later(document: _Document) -> None:
    for key, what in mergekit.LATER_KEYS.items():
        if key in document.data:
            _fail(document, (key,), f"{key} ({what}) comes in a later version of darekit")
    if document.data.get("tokenizer_source") == "union":
        _fail(
            document, ("tokenizer_source",), "union comes in a later version of darekit; use base or one of the models"
        )


# --- names ---

TOP_KEYS: tuple[str, ...] = (
    "base_model", "models", "sparsify", "merge_method", "parameters", "dtype", "out_dtype", "vocab", "tokenizer_source",
)  # fmt: skip
_MODEL_KEYS = ("model", "parameters")
_SPARSIFY_KEYS = ("method", "on", "seed", "keep_dense")
_FILTER_KEYS = ("filter", "value")


@dataclass(frozen=True)
class _Words:
    """The methods of a recipe, and the parameters that may stand where. `sparsify` is None without that block."""

    method: str
    sparsifier: str | None
    shared: Mapping[str, Parameter]
    model: Mapping[str, Parameter]
    sparsify: Mapping[str, Parameter] | None

    @property
    def needs_base(self) -> bool:
        return self.method not in MERGE_METHODS or MERGE_METHODS[self.method].needs_base


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.lower().replace("-", "_"), known, 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _suggest(word: str, known: Sequence[str], verb: str = "allowed here") -> str:
    """The nearest known word, if one is near, and all of them."""
    hint = _did_you_mean(word, known)
    return f"{hint} {verb.capitalize()}: {', '.join(known)}" if hint else f"; {verb}: {', '.join(known)}"


def _check_names(document: _Document) -> _Words:
    """The recipe's methods and vocabulary; raises once for all the names that are not in it."""
    data = document.data
    unknown: list[tuple[Key, str]] = [((key,), _explain_top(key)) for key in data if key not in TOP_KEYS]
    if "merge_method" not in data or "models" not in data:
        _raise_unknown(document, unknown)
        missing = "merge_method" if "merge_method" not in data else "models"
        _fail(document, (), f"no {missing}; a recipe needs models and merge_method")
    words = _words_of(document)
    for k, entry, own in _raw_models(document):
        unknown += [(("models", k, key), _explain_entry(key, words)) for key in entry if key not in _MODEL_KEYS]
        unknown += _unknown_parameters(document, ("models", k, "parameters"), own, words.model, words)
    unknown += _unknown_parameters(document, ("parameters",), data.get("parameters", {}), words.shared, words)
    if words.sparsify is not None:
        block = {key: value for key, value in data["sparsify"].items() if key not in _SPARSIFY_KEYS}
        unknown += _unknown_parameters(document, ("sparsify",), block, words.sparsify, words)
    _raise_unknown(document, unknown)
    return words


def _raise_unknown(document: _Document, unknown: Sequence[tuple[Key, str]]) -> None:
    if len(unknown) == 1:
        _fail(document, unknown[0][0], f" {unknown[0][1]}")
    if unknown:
        listed = "".join(
            f"\n  {document.places.get(path, 'in')}{':' if path in document.places else ''} "
            f"{'.'.join(map(str, path))} {why}"
            for path, why in unknown
        )
        raise RecipeError(f"{document.name}: {len(unknown)} keys cannot stand where they are{listed}")


def _explain_top(key: str) -> str:
    if key in ("seed", "random_seed"):
        return "is not a top-level key; write it as sparsify.seed (in mergekit's form, parameters.seed), or pass --seed"
    shared = {name for entry in MERGE_METHODS.values() for name in entry.parameters}
    if key in shared | {WEIGHT.name, mergekit.DENSITY.name, mergekit.INT8_MASK.name}:
        return "is not a top-level key; write it under `parameters:`"
    if key in _SPARSIFY_KEYS or any(key in entry.parameters for entry in SPARSIFIERS.values()):
        return "is not a top-level key; write it under `sparsify:`"
    return f"is not known{_suggest(key, TOP_KEYS)}"


def _explain_entry(key: str, words: _Words) -> str:
    if key in words.model:
        return "stands one level too high; write it under the model's `parameters:`"
    return f"is not known{_suggest(key, _MODEL_KEYS)}"


def _words_of(document: _Document) -> _Words:
    method = _read_method(document)
    if "sparsify" not in document.data:
        return _Words(method, None, mergekit.shared_words(method), mergekit.model_words(method), None)
    block = document.data["sparsify"]
    if not isinstance(block, dict):
        _fail(
            document,
            ("sparsify",),
            f"expected a mapping such as {{method: dare, drop_rate: 0.9}}, found {_shown(block)}",
        )
    if method in mergekit.PRODUCTS:
        product = mergekit.PRODUCTS[method]
        _fail(
            document,
            ("merge_method",),
            f"{method} already names a sparsifier, and there is a `sparsify:` block; with it write merge_method: "
            f"{product.merge}",
        )
    sparsifier = _read_sparsifier(document, block)
    sparse, merge = SPARSIFIERS[sparsifier].parameters, MERGE_METHODS[method].parameters
    numbers = {n: p for n, p in (sparse | merge).items() if isinstance(p.kind, Number) and p.kind.per_model}
    model = {"weight": WEIGHT, **numbers, "seed": SEED}
    if sparsifier == "breadcrumbs":
        model["density"] = mergekit.DENSITY  # only beside its drop_rate, as `to_data` of a mergekit recipe has it
    return _Words(method, sparsifier, {"weight": WEIGHT} | merge, model, sparse)


def _read_method(document: _Document) -> str:
    raw = document.data["merge_method"]
    method = str(raw)
    known = (*MERGE_METHODS, *MERGE_ALIASES, *mergekit.PRODUCTS)
    if method in known:
        return MERGE_ALIASES.get(method, method)
    if method in mergekit.LATER_METHODS:
        _fail(document, ("merge_method",), f"{method} comes in a later version of darekit; now: {', '.join(known)}")
    hint = _suggest(method, known, "known")
    if method in SPARSIFIERS:
        hint = f": {method} is a sparsifier, write `sparsify: {{method: {method}, ...}}`; here: {', '.join(known)}"
    _fail(document, ("merge_method",), f"unknown method {_shown(raw)}{hint}")


def _read_sparsifier(document: _Document, block: Mapping[str, Any]) -> str:
    if "method" not in block:
        _fail(document, ("sparsify",), f" has no method; add method: one of {', '.join(SPARSIFIERS)}")
    method = str(block["method"])
    if method in SPARSIFIERS:
        return method
    hint = _suggest(method, list(SPARSIFIERS), "known")
    if method in mergekit.PRODUCTS:
        product = mergekit.PRODUCTS[method]
        hint = f"; write method: {product.sparsifier} here and merge_method: {product.merge}"
    _fail(document, ("sparsify", "method"), f"unknown method {_shown(block['method'])}{hint}")


def _unknown_parameters(
    document: _Document, path: Key, raw: Any, allowed: Mapping[str, Parameter], words: _Words
) -> Iterator[tuple[Key, str]]:
    if not isinstance(raw, dict):
        _fail(document, path, f"expected a mapping such as {{weight: 1.0}}, found {_shown(raw)}")
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
                        yield (*here, key), f"is not known{_suggest(key, _FILTER_KEYS)}"


def _explain(name: str, value: Any, path: Key, allowed: Mapping[str, Parameter], words: _Words) -> str:
    """Why a parameter cannot stand at `path`, and where it belongs."""
    sparse = words.sparsify
    if sparse is None and (advice := mergekit.advise(name, value, words.method)):
        return f"cannot stand here: {advice}"
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
        return f"belongs to a sparsifier: write `sparsify: {{method: {owner}, {name}: {_shown(value)}}}`"
    owners += [n for n, entry in MERGE_METHODS.items() if name in entry.parameters]
    if owners:
        chosen = words.method if words.sparsifier is None else f"{words.sparsifier} or {words.method}"
        return f"is a parameter of {' and '.join(owners)}, not of {chosen}"
    return f"is not known{_suggest(name, [*allowed, *(_SPARSIFY_KEYS if path == ('sparsify',) else ())])}"


# --- values ---

# PyYAML follows YAML 1.1, where 1e-5 without a point is text.
_EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]{1,4}")


def _read_parameters(
    document: _Document, path: Key, allowed: Mapping[str, Parameter], skip: Sequence[str] = ()
) -> dict[str, Value]:
    raw: Any = document.data
    for key in path:
        raw = raw.get(key, {}) if isinstance(raw, dict) else raw[key]
    return {
        name: _read_value(document, (*path, name), allowed[name], value)
        for name, value in raw.items()
        if name not in skip
    }


def _read_value(document: _Document, path: Key, parameter: Parameter, raw: Any) -> Value:
    if raw is None:
        _fail(document, path, " has no value; give it one or remove the key")
    if parameter.name == SEED.name:
        return _read_seed(document, path, raw)
    if isinstance(parameter.kind, Number):
        if isinstance(raw, list | dict):
            return _read_filters(document, path, parameter, raw)
        return _read_number(document, path, parameter, raw)
    if isinstance(raw, list | dict):
        _fail(document, path, f" is one value for all tensors, found {_shown(raw)}")
    if isinstance(parameter.kind, Switch) and not isinstance(raw, str) and raw in (0, 1):
        raw = bool(raw)  # mergekit's users write `normalize: 1.0`
    if isinstance(parameter.kind, Choice) and isinstance(raw, bool):
        raw = str(raw).lower()
    _check_range(document, path, parameter, raw)
    return cast(Value, raw)


def _check_range(document: _Document, path: Key, parameter: Parameter, value: Any) -> None:
    problem = parameter.problem(value)
    if problem is not None:
        _fail(document, path, problem.removeprefix(parameter.name))


def _read_number(document: _Document, path: Key, parameter: Parameter, raw: Any) -> float:
    if isinstance(raw, str):
        raw = _number_of_text(document, path, raw)
    _check_range(document, path, parameter, raw)
    try:
        number = float(raw)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        _fail(document, path, f" must be a finite number, found {_shown(raw)}")
    return number


def _number_of_text(document: _Document, path: Key, raw: str) -> float:
    if _EXPONENT.fullmatch(raw):
        return float(raw)
    hint = "; write a number"
    try:
        float(raw.removesuffix("%"))
        hint = f"; a percentage? write {float(raw[:-1]) / 100:g}" if raw.endswith("%") else "; write it without quotes"
    except ValueError:
        pass
    _fail(document, path, f" must be a number, found the text {_shown(raw)}{hint}")


def _read_filters(document: _Document, path: Key, parameter: Parameter, raw: Any) -> tuple[Filtered, ...]:
    shape = "expected a number, or a list of {filter: part of a tensor's name, value: number}"
    if raw == [] or (isinstance(raw, dict) and "value" not in raw):
        _fail(document, path, f"{shape}, found {_shown(raw)}")
    found: list[Filtered] = []
    for i, entry in enumerate(raw if isinstance(raw, list) else [raw]):
        here = (*path, i) if isinstance(raw, list) else path
        if not isinstance(entry, dict):
            if isinstance(entry, int | float) and not isinstance(entry, bool):
                _refuse_gradient(document, path)
            _fail(document, here, f"{shape}, found {_shown(entry)}")
        if entry.get("value") is None:
            _fail(document, here, f"{shape}, found {_shown(entry)} without a value")
        if isinstance(entry["value"], list):
            _refuse_gradient(document, here)
        pattern = entry.get("filter", "*")
        if not isinstance(pattern, str) or not pattern:
            _fail(document, (*here, "filter"), f"expected part of a tensor's name, a glob or '*', found {pattern!r}")
        if found and found[-1].filter == "*":
            _fail(document, here, " is never reached: the entry before it matches every tensor; put that one last")
        found.append(Filtered(pattern, _read_number(document, here, parameter, entry["value"])))
    return tuple(found)


def _refuse_gradient(document: _Document, path: Key) -> NoReturn:
    _fail(
        document,
        path,
        "a list of numbers is a gradient over the layers; gradients come in a later version of darekit: write one "
        "number, or a list of {filter, value}",
    )


def _read_seed(document: _Document, path: Key, raw: Any) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or SEED.problem(raw) is not None:
        _fail(document, path, f" must be a whole number from 0 to 2^64 - 1, found {_shown(raw)}")
    return raw


def _read_text(document: _Document, key: str) -> str | None:
    return None if key not in document.data else _text(document, (key,), document.data[key])


def _text(document: _Document, path: Key, raw: Any) -> str:
    """A checkpoint's name."""
    if isinstance(raw, dict):
        _fail(document, path, "expected a directory or a Hub id as text (org/name@revision), found a mapping")
    if raw is None or raw == "":
        _fail(document, path, " has no value; write a directory or a Hub id")
    if not isinstance(raw, str):
        _fail(
            document, path, f"expected a directory or a Hub id, found {_shown(raw)}; put a name that looks so in quotes"
        )
    if "+" in raw:
        _fail(
            document,
            path,
            f"{raw!r} names a LoRA adapter after the +; adapters as input come in a later version of darekit: merge "
            "it first with PEFT's merge_and_unload(). (A directory with + in its name: use a link without it.)",
        )
    return raw


def _read_choice(document: _Document, path: tuple[str, ...], of: tuple[str, ...]) -> str:
    """One of a few words at `path`; the first of them where the key is missing."""
    block = document.data if len(path) == 1 else document.data[path[0]]
    raw = block.get(path[-1], of[0])
    if raw not in of:
        _fail(document, path, f" must be one of {', '.join(of)}, found {_shown(raw)}{_did_you_mean(str(raw), of)}")
    return cast(str, raw)


def _raw_models(document: _Document) -> Iterator[tuple[int, dict[str, Any], Any]]:
    """Place in `models`, entry, its raw parameters."""
    raw = document.data["models"]
    if not isinstance(raw, list) or not raw:
        _fail(document, ("models",), f"expected a list of at least one `- model: name`, found {_shown(raw)}")
    for k, entry in enumerate(raw):
        if not isinstance(entry, dict):
            _fail(document, ("models", k), f"expected `model: name` or a name, found {_shown(entry)}")
        yield k, entry, entry["parameters"]


def _models_of(document: _Document) -> list[tuple[int, str, Any]]:
    found = []
    for k, entry, own in _raw_models(document):
        if "model" not in entry:
            _fail(document, ("models", k), " has no model; add `model:` with a directory or a Hub id")
        found.append((k, _text(document, ("models", k, "model"), entry["model"]), own))
    return found


def _read_models(document: _Document, words: _Words) -> list[tuple[int, str, dict[str, Value]]]:
    return [
        (k, name, _read_parameters(document, ("models", k, "parameters"), words.model))
        for k, name, _ in _models_of(document)
    ]


def _same(one: str, other: str) -> bool:
    return one.rstrip("/") == other.rstrip("/")


def _read_sparsify(document: _Document, words: _Words) -> Sparsify:
    assert words.sparsifier is not None and words.sparsify is not None
    block = document.data["sparsify"]
    return Sparsify(
        method=words.sparsifier,
        parameters=_read_parameters(document, ("sparsify",), words.sparsify, skip=_SPARSIFY_KEYS),
        on=_read_choice(document, ("sparsify", "on"), ("delta", "weights")),  # type: ignore[arg-type]
        seed=_read_seed(document, ("sparsify", "seed"), block.get("seed", 0)),
        keep_dense=_read_keep_dense(document, block.get("keep_dense", [])),
    )


def _read_keep_dense(document: _Document, raw: Any) -> tuple[str, ...]:
    path: Key = ("sparsify", "keep_dense")
    raw = [raw] if isinstance(raw, str) else raw
    if not isinstance(raw, list):
        _fail(document, path, f"expected a list of {', '.join(GROUPS)} or glob patterns, found {_shown(raw)}")
    for i, entry in enumerate(raw):
        if not isinstance(entry, str) or not (entry in GROUPS or "." in entry or _is_glob(entry)):
            _fail(
                document,
                (*path, i),
                f"{entry!r} is neither a group ({', '.join(GROUPS)}) nor a glob over tensor names "
                f"(*.q_proj.weight){_did_you_mean(str(entry), GROUPS)}",
            )
    return tuple(raw)


def _read_dtype(document: _Document) -> str | None:
    """Safetensors name of the output's dtype; `out_dtype` wins."""
    names = {key: _dtype_name(document, key) for key in ("out_dtype", "dtype") if key in document.data}
    return next(iter(names.values()), None)


def _dtype_name(document: _Document, key: str) -> str:
    raw = document.data[key]
    known = [DTYPES[name].torch_name for name in FLOAT_DTYPES]
    entry = dtype_from_torch_name(raw) if isinstance(raw, str) else None
    if entry is not None and entry.kind == "float":
        return entry.name
    if entry is not None:
        _fail(document, (key,), f" must be a floating point format, found {_shown(raw)}; use one of {', '.join(known)}")
    short = DTYPES.get(str(raw).upper().replace("FP", "F"))
    hint = f"; did you mean {short.torch_name!r}?" if short else _did_you_mean(str(raw), known)
    _fail(document, (key,), f" must be one of {', '.join(known)}, found {_shown(raw)}{hint}")


def _read_tokenizer_source(document: _Document, base: str | None, models: Sequence[str]) -> str:
    raw = document.data.get("tokenizer_source", "base")
    if raw == "base" or (base is not None and isinstance(raw, str) and _same(raw, base)):
        return "base"
    if raw not in models:
        _fail(
            document,
            ("tokenizer_source",),
            f" must be base or one of the models, found {_shown(raw)}{_suggest(str(raw), ['base', *models], 'known')}",
        )
    return cast(str, raw)


# --- what belongs together ---


def _check_whole(document: _Document, recipe: Recipe, places: Sequence[int]) -> None:
    method, sparsify = MERGE_METHODS[recipe.merge_method], recipe.sparsify
    on_delta = sparsify is not None and sparsify.on == "delta"
    if recipe.base_model is None and (method.needs_base or on_delta):
        who = recipe.merge_method if method.needs_base else f"sparsify with {sparsify.method}"  # type: ignore[union-attr]
        _fail(document, (), f"no base_model; {who} works on differences to it: add base_model: the common ancestor")
    if sparsify is None:
        return
    if sparsify.on == "weights" and method.needs_base:
        _fail(
            document,
            ("sparsify", "on"),
            f"weights goes only with merge_method: linear; {recipe.merge_method} merges deltas: write on: delta",
        )
    if on_delta and recipe.merge_method == "linear" and recipe.parameters.get("normalize") is False:
        _fail(
            document,
            ("parameters", "normalize"),
            "false makes linear a sum of whole models, which has no deltas to sparsify: write merge_method: "
            "task_arithmetic (base + sum of deltas), or remove normalize",
        )
    for parameter in SPARSIFIERS[sparsify.method].parameters.values():
        for place, entry in zip(places, recipe.models, strict=True):
            if parameter.default is None and not {parameter.name} & ({*sparsify.parameters} | {*entry.parameters}):
                _fail(
                    document,
                    ("models", place),
                    f"{entry.model} has no {parameter.name}; write it under `sparsify:` for all models or under this "
                    "model's `parameters:`",
                )
    for place, entry in zip(places, recipe.models, strict=True):
        _check_density(document, ("models", place, "parameters", "density"), entry.parameters)


def _check_density(document: _Document, path: Key, own: Mapping[str, Value]) -> None:
    """Breadcrumbs counts survivors from mergekit's density as written: it must say the same as the drop rate."""
    if "density" in own and own.get("drop_rate") != mergekit.drop_rates(own["density"]):
        _fail(document, path, " and drop_rate are one quantity; with a `sparsify:` block write only drop_rate")


def _notes(recipe: Recipe, seeded: bool) -> Iterator[str]:
    names = [entry.model for entry in recipe.models]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"{name} is listed {names.count(name)} times: each counts as a model of its own"
    given = {*recipe.parameters}.union(*(entry.parameters for entry in recipe.models))
    whole = [entry.model for entry in recipe.models if "keep" not in {*entry.parameters} | {*recipe.parameters}]
    if MERGE_METHODS[recipe.merge_method].trims and whole:
        of = "" if "keep" not in given else f" for {' and '.join(whole)}"
        yield f"{recipe.merge_method} without keep{of}: no trim (the TIES paper keeps 0.2)"
    random = recipe.sparsify is not None and SPARSIFIERS[recipe.sparsify.method].random
    if (seeded or "seed" in given) and not random:
        yield "seed has no effect: nothing is drawn at random in this recipe"
