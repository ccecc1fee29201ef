# SPDX-License-Identifier: Apache-2.0
"""YAML (or data) -> plain data that knows where each of its keys stands; overrides by dotted path."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml

from darekit.errors import RecipeError

# --- YAML -> plain data, with the place of every key ---

Key = tuple[str | int, ...]

_LARGEST_FILE = 1 << 20
_LARGEST_COUNT = 100_000  # keys and values after aliases are expanded: a bomb of nine lines has 1e9
_DEEPEST = 32
_LARGEST_INT = 1 << 128  # a hexadecimal number may be too long to print

# What PyYAML's constructors let through for a value that its tag does not fit (`!!bool maybe`).
_MALFORMED = (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError)


@dataclass(frozen=True)
class Document:
    """Plain data, where each of its keys stands ("line 7"), and its text.

    `notes`: what was let pass; `repeated`: top-level keys of which an alias elsewhere uses something; `clipped`: the
    parameters whose gradients may reach beyond their ranges, and within which range their values then stay.
    """

    name: str
    data: dict[str, Any]
    places: Mapping[Key, str]
    text: str
    notes: tuple[str, ...] = ()
    repeated: frozenset[str] = frozenset()
    clipped: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Places:
    """Where a file has its keys: for mistakes that show after it was read."""

    name: str
    places: Mapping[Key, str] = field(default_factory=dict)

    def at(self, *path: str | int) -> str:
        """File, line and key, as `fail` has them: `search.yaml line 7: space.parameters.lambda`."""
        return f"{where(self, path)}: {'.'.join(map(str, path))}"


def fail(document: Document, path: Key, message: str) -> NoReturn:
    """Raise with file, line and key; a message that starts with a space goes on from the key's name."""
    dotted = ".".join(map(str, path))
    joint = "" if not dotted or message.startswith(" ") else ": "
    raise RecipeError(f"{where(document, path)}: {dotted}{joint}{message}", [path])


def where(document: Document | Places, path: Key) -> str:
    """File and line of a key, or of the nearest key around it."""
    for end in range(len(path), 0, -1):
        if path[:end] in document.places:
            return f"{document.name} {document.places[path[:end]]}"
    return document.name


def shown(value: Any) -> str:
    """A value as messages show it: its repr, shortened."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def open_file(path: Path, kind: str = "recipe") -> Document:
    """A YAML file of one document -> that; `kind` is what errors call it."""
    name, text = _read(path, kind)
    (found,) = _parse(text, name, kind, single=True)
    return _normalize(found)


def open_source(source: str | Path | Mapping[str, Any], kind: str) -> tuple[Document, str, tuple[Path, ...]]:
    """A file, or the same as data -> its document, its name, and where relative names are looked up: beside the file,
    after the working directory."""
    if isinstance(source, Mapping):
        return open_data(source, kind), kind, ()
    path = Path(source)
    return open_file(path, kind), path.stem, (path.resolve().parent,)


def open_documents(path: Path, *, lenient: bool = False) -> list[Document]:
    """A file of one recipe or of several, one document each. Documents without content are none.

    `lenient`: of a key that is given twice the last counts, as in mergekit, and a note says so.
    """
    name, text = _read(path, "recipe")
    return [_normalize(one) for one in _parse(text, name, "recipe", lenient=lenient)]


def _read(path: Path, kind: str) -> tuple[str, str]:
    """Name and text of a file."""
    name = str(path)
    if "\n" in name:
        raise RecipeError(
            f"expected a {kind} as a mapping or as the path of a YAML file, found text of several lines; for YAML text "
            "pass yaml.safe_load(text)"
        )
    if path.is_dir():
        raise RecipeError(f"{name} is a directory; a {kind} is a YAML file: give the path of the file itself")
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise RecipeError(f"{name}: no such file{_similar_files(path)}") from None
    except OSError as error:
        raise RecipeError(f"{name} cannot be read: {error.strerror}") from None
    if len(raw) > _LARGEST_FILE:
        raise RecipeError(f"{name} is larger than 1 MiB; a {kind} is a small YAML file: is this a checkpoint?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{name} line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save it as UTF-8") from None
    return name, text


def _similar_files(path: Path) -> str:
    """ "; did you mean ...?" for the YAML file beside it whose name is near without its suffix, or nothing."""
    try:
        names = {entry.stem: entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")}
    except OSError:
        return ""
    close = difflib.get_close_matches(path.stem, names, 1, 0.7)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def open_data(source: Mapping[str, Any], kind: str = "recipe") -> Document:
    """Data in memory -> its document; None stands for "not given"."""
    plain = _plain(source, 0)
    # Programs pass None for "not given"; in a file an empty key is a slip.
    data = {key: value for key, value in plain.items() if value is not None}
    return _normalize(Document(kind, data, {}, _dump(data)))


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
        f"recipe: found a {type(value).__name__} ({shown(value)}); expected mappings, lists, numbers and text"
    )


_LEAST = {
    "recipe": "`models:` and `merge_method:`",
    "sweep": "`recipe:`, `axes:` and `test:`",
    "search": "`recipe:`, `space:`, `validation:` and `test:`",
}


def _parse(text: str, name: str, kind: str, *, single: bool = False, lenient: bool = False) -> list[Document]:
    """Every document with content; `single`: the file must be one."""
    found = []
    try:
        loader = yaml.SafeLoader(text)
        every = [loader.get_single_node()] if single else []
        while not single and loader.check_node():
            every.append(loader.get_node())
        nodes = [node for node in every if node is not None and not _is_empty(node)]
        if not nodes:
            raise RecipeError(f"{name} is empty; a {kind} needs at least {_LEAST[kind]}")
        for node in nodes:
            if not isinstance(node, yaml.MappingNode):
                raise RecipeError(
                    f"{name} line {node.start_mark.line + 1}: expected a mapping (`key: value` lines) at the top, "
                    f"found a {'list' if isinstance(node, yaml.SequenceNode) else 'single value'}"
                )
            walker = _Walker(loader, name, lenient=lenient)
            data = cast(dict[str, Any], walker.build(node, ()))
            found.append(Document(name, data, walker.places, text, tuple(walker.notes), frozenset(walker.repeated)))
        return found
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_yaml_problem(error, name)) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{name}: nested deeper than {_DEEPEST} levels") from None


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null" and not node.value


def _yaml_problem(error: yaml.MarkedYAMLError, name: str) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{name} line {mark.line + 1}" if mark else name
    problem = error.problem or str(error)
    if "single document" in (error.context or "") or "another document" in problem:
        return f"{where}: a second document starts here (`---`); this file is one document: split it"
    return f"{where}: not YAML: {problem}{_yaml_hint(error, problem)}"


def _yaml_hint(error: yaml.MarkedYAMLError, problem: str) -> str:
    """What is likely wrong, as the parser itself does not say it."""
    text = error.problem_mark.buffer if error.problem_mark else None
    if text and "```" in text:
        return "; is this a model card? Save what stands between ``` and ``` as a file of its own"
    if text and re.search(r"(?m)^[ \t]+---[ \t]*$", text):
        return "; a line `---` between two documents begins in the first column, and so do the documents' keys"
    began = f" (it begins on line {error.context_mark.line + 1})" if error.context_mark else ""
    if r"'\t'" in problem:
        return "; YAML indents with spaces, never with tabs"
    if "expected <block end>" in problem or "mapping values are not allowed" in problem:
        return (
            f"; the keys of one block begin in the same column{began if 'block' in problem else ''}, those of a list's "
            "entry under its first key (`- model: A`, and `parameters:` below the m of model)"
        )
    if "expected ',' or" in problem:
        return f"; a bracket is not closed{began}"
    return ""


class _Walker:
    """Nodes -> plain data. Keeps the lines, and counts, so that aliases cannot explode."""

    def __init__(self, loader: yaml.SafeLoader, name: str, *, lenient: bool) -> None:
        self.loader, self.name, self.lenient, self.count = loader, name, lenient, 0
        self.places: dict[Key, str] = {}
        self.notes: list[str] = []
        self.first: dict[int, Key] = {}  # where a node comes up first: an alias is the same node again
        self.repeated: set[str] = set()

    def build(self, node: yaml.Node, path: Key) -> Any:
        self.count += 1
        line = node.start_mark.line + 1
        first = self.first.setdefault(id(node), path)
        if first[:1] != path[:1]:
            self.repeated.add(str(first[0]))
        if self.count > _LARGEST_COUNT or len(path) > _DEEPEST:
            raise RecipeError(
                f"{self.name} line {line}: too large or too deep once its aliases are expanded (at most "
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
        if isinstance(value, bool | int | float) and self._is_there(node.value, path):
            return str(node.value)
        if isinstance(value, int) and abs(value) >= _LARGEST_INT:
            raise RecipeError(f"{self.name} line {line}: the number {node.value[:40]!r} is too large")
        if value is None or isinstance(value, str | bool | int | float):
            return value
        return str(node.value)  # a date is a model's name here

    def _is_there(self, text: str, path: Key) -> bool:
        """Whether a model is to be named here, and one of that name exists: a directory may be called 500 or 1.5."""
        listed = len(path) > 1 and path[-2] in ("models", "sources") and isinstance(path[-1], int)
        if not listed and path[-1:] not in (
            ("model",), ("base_model",), ("tokenizer_source",), ("heads",),
        ) and path != ("tokenizer", "source"):  # fmt: skip
            return False
        return any(os.path.lexists(folder / text) for folder in (Path(), Path(self.name).resolve().parent))

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
                places = self.places
                self.places = {}
                again = self.build(item, (*path, name))
                self.places, anew = places, self.places
                if again == found[name]:
                    continue  # said twice, alike
                dotted = ".".join(map(str, (*path, name)))
                if not self.lenient:
                    raise RecipeError(
                        f"{self.name} line {line}: {dotted} is given twice (first on line {lines[name]}); keep one"
                    )
                self.notes.append(
                    f"WARNING: {dotted} is given twice: line {line} counts, as in mergekit, and line {lines[name]} is "
                    "ignored (--lenient)"
                )
                inside = (*path, name)
                self.places = {key: at for key, at in places.items() if key[: len(inside)] != inside} | anew
                del found[name]
                lines[name], found[name] = line, again
                self.places[inside] = f"line {line}"
                continue
            lines[name] = line
            self.places[(*path, name)] = f"line {line}"
            found[name] = self.build(item, (*path, name))
        for other in merged:
            extra = self.build(other, path)
            if not isinstance(extra, dict):
                raise RecipeError(f"{self.name} line {other.start_mark.line + 1}: `<<` can only merge mappings")
            found = extra | found
        return found


def _normalize(document: Document) -> Document:
    """Give every model its mapping and every empty `parameters:` an empty one, so that all have the same paths."""
    data = _normalized(document.data)
    if isinstance(data.get("modules"), dict):
        data["modules"] = {
            name: _normalized(one) if isinstance(one, dict) else one for name, one in data["modules"].items()
        }
    return replace(document, data=data)


def _normalized(block: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe, a module or a slice."""
    data = dict(block)
    if data.get("parameters", 0) is None:
        data["parameters"] = {}
    for key in ("models", "sources"):
        if isinstance(data.get(key), list):
            data[key] = [_model_mapping(entry) for entry in data[key]]
    if isinstance(data.get("slices"), list):
        data["slices"] = [_normalized(one) if isinstance(one, dict) else one for one in data["slices"]]
    return data


def _model_mapping(entry: Any) -> Any:
    if isinstance(entry, str):
        return {"model": entry, "parameters": {}}
    if isinstance(entry, dict) and entry.get("parameters") is None:
        return entry | {"parameters": {}}
    return entry


# --- overrides ---


def override(document: Document, settings: Mapping[str, Any], seed: int | None) -> Document:
    """A document with values replaced by dotted path, and the seed where the form keeps it.

    None removes a key.
    """
    changes: dict[tuple[str, ...], tuple[str, Any]] = {
        tuple(dotted.split(".")): (dotted, value) for dotted, value in settings.items()
    }
    if seed is not None:
        sparsify = "sparsify" in document.data or any(path[0] == "sparsify" for path in changes)
        changes["sparsify" if sparsify else "parameters", "seed"] = ("seed", seed)
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
        raise RecipeError(f"setting {dotted}: {text!r} is not valid YAML: {' '.join(str(error).split())}") from None


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
                here[int(key) : int(key) + 1] = [] if value is None else [value]
                return
            here = here[int(key)]
        elif isinstance(here, dict):
            if last and value is not None:
                here[key] = value
            elif last:
                if here.pop(key, None) is None:
                    _fail_setting(dotted, f"{around} has no {key!r} to remove{suggest(key, list(here), 'it has')}")
                return
            elif key not in here and key != "parameters":
                known = ["parameters", *(name for name in here if name != "parameters")]
                _fail_setting(dotted, f"{around} has no {key!r}{suggest(key, known, 'it has')}")
            here = here.setdefault(key, {})
        else:
            _fail_setting(dotted, f"{around} is the single value {here!r} and has no {key!r}")


def _fail_setting(dotted: str, message: str) -> NoReturn:
    raise RecipeError(f"setting {dotted}: {message}")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """ "; did you mean ...?" for the nearest known word, or nothing."""
    close = difflib.get_close_matches(word.lower().replace("-", "_"), known, 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def suggest(word: str, known: Sequence[str], verb: str = "allowed here") -> str:
    """The nearest known word, if one is near, and all of them."""
    hint = did_you_mean(word, known)
    return f"{hint} {verb.capitalize()}: {', '.join(known)}" if hint else f"; {verb}: {', '.join(known)}"
