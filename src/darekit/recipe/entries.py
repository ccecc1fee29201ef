# SPDX-License-Identifier: Apache-2.0
"""Models, slices and parameters of a recipe: who takes part where, what is the base there, and what holds there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from darekit.methods import SEED
from darekit.recipe.data import DEFAULT, Range, Slice
from darekit.recipe.documents import Document, Key, fail, where
from darekit.recipe.layout import SliceAt, layout_of, range_of
from darekit.recipe.names import find_model, same_model
from darekit.recipe.parameters import block_at, read_parameters
from darekit.recipe.references import reference_of
from darekit.recipe.values import Value, by_slice, chained
from darekit.recipe.words import SPARSIFY_KEYS, Words

_ONE_FOR_ALL = ("trim", "rescale", "int8_mask", SEED.name)  # what cannot differ from slice to slice


@dataclass(frozen=True)
class Entry:
    """One model of the recipe: where it stands first, its name, its own parameters."""

    path: Key
    name: str
    own: Mapping[str, Value]


@dataclass
class Gathered:
    """What a recipe says of models, before its method's words are translated.

    Attributes:
        base: the recipe's base, as written.
        entries: its models, each once (or as often as it stands in one slice), in order of appearance.
        slices: who takes part where; empty: all models with all their layers.
        shared: the method's parameters and the models' defaults, with those that slices set.
        sparse: likewise of the sparsifier, where there is a `sparsify:` block.
        names: every model that is named, also where it is the base.
        notes: what the user should know.
    """

    base: str | None
    entries: list[Entry]
    slices: tuple[Slice, ...]
    shared: dict[str, Value]
    sparse: dict[str, Value]
    names: list[str]
    notes: list[str] = field(default_factory=list)


@dataclass
class _Source:
    path: Key
    name: str
    layers: Range
    own: dict[str, Value]


@dataclass
class _Slice:
    at: SliceAt
    sources: list[_Source]
    written: dict[str, str]
    base: tuple[str, Range] | None = None


def gather(document: Document, words: Words, search: Sequence[Path]) -> Gathered:
    """Read all models, slices and parameters of a recipe.

    Raises:
        RecipeError: what is written there is no name, no range or no value; or no base can be found for a slice.
    """
    layout = layout_of(document)
    base = (
        reference_of(document, ("base_model",), document.data["base_model"]) if "base_model" in document.data else None
    )
    slices = [_read_slice(document, words, one) for one in layout]
    names = [*dict.fromkeys(source.name for one in slices for source in one.sources)]
    found = Gathered(base, [], (), {}, {}, names)
    for one in slices:
        _find_base(document, words, found, one, search)
    plain = all(one.at.path is None and one.at.name == DEFAULT for one in slices) and slices[0].base is None
    entries: dict[tuple[str, int], list[_Source | None]] = {}
    for i, one in enumerate(slices):
        counts: dict[str, int] = {}
        for source in one.sources:
            known = [name for name, _ in entries]
            name = find_model(source.name, known, search) or source.name
            counts[name] = counts.get(name, 0) + 1
            entries.setdefault((name, counts[name]), [None] * len(slices))[i] = source
            one.written.setdefault(name, one.written[source.name])
    found.entries = [_entry_of(document, parts) for parts in entries.values()]
    if not plain:
        found.slices = tuple(
            Slice(
                tuple(p[i].layers if p[i] else None for p in entries.values()),  # type: ignore[union-attr]
                one.base,
                one.at.name,
                one.written,
            )
            for i, one in enumerate(slices)
        )
    _read_shared(document, words, found, layout)
    return found


def _read_slice(document: Document, words: Words, one: SliceAt) -> _Slice:
    sources = []
    for source in one.sources:
        if "model" not in source.entry:
            fail(document, source.path, " has no model; add `model:` with a directory or a Hub id")
        name = reference_of(document, (*source.path, "model"), source.entry["model"])
        own = read_parameters(document, (*source.path, "parameters"), words.model)
        sources.append(_Source(source.path, name, range_of(document, source, sliced=one.path is not None), own))
    lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers[1] is not None}
    if len(lengths) > 1:
        told = ", ".join(f"{source.name} {list(source.layers)}" for source in sources)
        fail(document, one.path or (), f"all sources of one slice must have the same number of layers, found {told}")
    written = {source.name: where(document, (*source.path, "layer_range")) for source in sources}
    return _Slice(one, sources, {**written, "": where(document, one.path or ())})


def _entry_of(document: Document, parts: Sequence[_Source | None]) -> Entry:
    """One model's parts in each slice -> the model, with parameters by slice."""
    present = [part for part in parts if part is not None]
    own: dict[str, Value] = {}
    name = present[0].name
    for parameter in dict.fromkeys(parameter for part in present for parameter in part.own):
        values = [None if part is None else part.own.get(parameter) for part in parts]
        if parameter == SEED.name:
            seeds = {part.own.get(parameter) for part in present}
            if len(seeds) > 1:
                fail(document, (*present[-1].path, "parameters", "seed"), f" of {name} must be the same in all slices")
            values = [seeds.pop()]
        value = by_slice(values)
        if value is not None:
            own[parameter] = value
    return Entry(present[0].path, name, own)


# --- the base ---


def _find_base(document: Document, words: Words, found: Gathered, one: _Slice, search: Sequence[Path]) -> None:
    """Take the base out of a slice's models, where the method compares with it; or make the first of them the base."""
    method, sources, plain = words.merge_method, one.sources, one.at.path is None and one.at.name == DEFAULT
    own = one.at.entry.get("base_model")
    base = found.base if own is None else reference_of(document, (*(one.at.path or ()), "base_model"), own)
    first = method is not None and method.base_row and method.models == (1, 1) and len(sources) == 2
    listed = [source for source in sources if base is not None and same_model(source.name, base, search)]
    if first and base is None:
        start = sources.pop(0)
        _tell(found, f"no base_model: {start.name} is the base, since it comes first")
        if plain:
            found.base = start.name
        else:
            one.base = start.name, start.layers
        return
    if first and not listed:  # older recipes name a third model, which gave the config alone
        start = sources.pop(0)
        _tell(
            found,
            f"{base} is neither of the two models that {words.method} takes: it goes from {start.name} to "
            f"{sources[0].name}, and {base} gives only config and tokenizer",
        )
        one.base = start.name, start.layers
        return
    if base is None or not (words.parts_base or (words.sparsify is not None and not plain)):
        return
    if words.parts_base and listed:
        if method is None or not method.base_row:
            _tell(
                found, f"{base} is the base and also one of the models: its delta is 0, so it is left out of the models"
            )
        one.sources = [source for source in sources if source not in listed]
        if plain and not one.sources:
            fail(document, ("models",), "only the base is listed; add a model that was fine-tuned from it")
    if plain or not (listed or words.needs_base or words.sparsify is not None):
        return
    ranges = {source.layers for source in listed or sources}
    if len(ranges) > 1:
        fail(
            document, one.at.path or (),
            f"which layers of {base} are the base of this slice? Its models give different ones: list {base} among the "
            "sources with its layer_range",
        )  # fmt: skip
    one.base = (listed[0].name if listed else base), ranges.pop()


def _tell(found: Gathered, note: str) -> None:
    if note not in found.notes:
        found.notes.append(note)


# --- parameters for all models ---


def _read_shared(document: Document, words: Words, found: Gathered, layout: Sequence[SliceAt]) -> None:
    """What stands above the models: the recipe's own parameters, and those of modules and slices."""
    found.shared = read_parameters(document, ("parameters",), words.shared)
    if words.sparsify is not None:
        found.sparse = read_parameters(document, ("sparsify",), words.sparsify, skip=SPARSIFY_KEYS)
    here = {**words.model, **words.shared}
    nearer = [[read_parameters(document, path, here) for path in one.scopes] for one in layout]
    for name in dict.fromkeys(name for scopes in nearer for scope in scopes for name in scope):
        sparse = name not in words.shared and words.sparsify is not None and name in words.sparsify
        home = found.sparse if sparse else found.shared
        values = [chained([*(scope.get(name) for scope in scopes), home.get(name)]) for scopes in nearer]
        if all(value == values[0] for value in values):
            values = values[:1]
        elif name in _ONE_FOR_ALL:
            path = next((*path, name) for one in layout for path in one.scopes if name in block_at(document, path))
            fail(document, path, " must be the same for all layers: write it under the top-level `parameters:`")
        value = by_slice(values)
        if value is not None:
            home[name] = value
