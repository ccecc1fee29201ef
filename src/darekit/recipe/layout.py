# SPDX-License-Identifier: Apache-2.0
"""Where a recipe's models stand: under `models:`, in `slices:`, or in either of these for each of its `modules:`.

Whatever the form, it is read as slices of sources, each of which knows its own path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from darekit.recipe.data import DEFAULT, Range
from darekit.recipe.documents import Document, Key, fail, shown

FORMS = ("models", "slices", "modules")
MODULE_KEYS = ("models", "slices", "parameters")
SLICE_KEYS = ("sources", "base_model", "parameters")
SOURCE_KEYS = ("model", "layer_range", "parameters", "stats", "experts_layout")
MODEL_KEYS = ("model", "parameters", "stats", "experts_layout")

WHOLE: Range = (0, None)


@dataclass(frozen=True)
class SourceAt:
    """One model in one slice: where it stands, and what is written there."""

    path: Key
    entry: Mapping[str, Any]


@dataclass(frozen=True)
class SliceAt:
    """One slice, or the list of `models:`. `path`: where it stands, and `module` the path of its module; None where
    there is none. `name`: the module's. `entry`: what is written there."""

    path: Key | None
    sources: tuple[SourceAt, ...]
    name: str = DEFAULT
    module: Key | None = None
    entry: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scopes(self) -> tuple[Key, ...]:
        """Paths of the `parameters:` that go before the recipe's own, the nearest first."""
        return tuple((*path, "parameters") for path in (self.path, self.module) if path is not None)


def layout_of(document: Document) -> tuple[SliceAt, ...]:
    """All slices of a recipe, in order.

    Raises:
        RecipeError: none of the forms is there, or several are; or something that is no list or no mapping.
    """
    form = _form_of(document, (), document.data)
    if form != "modules":
        return tuple(_slices_of(document, (), document.data, form, DEFAULT, None))
    modules = document.data["modules"]
    if not isinstance(modules, dict) or not modules:
        fail(
            document,
            ("modules",),
            f"expected a mapping such as {{text_decoder: {{slices: [...]}}}}, found {shown(modules)}",
        )
    found: list[SliceAt] = []
    for name, module in modules.items():
        path: Key = ("modules", name)
        if not isinstance(module, dict):
            fail(document, path, f"expected a mapping with models or slices, found {shown(module)}")
        found += _slices_of(document, path, module, _form_of(document, path, module, FORMS[:2]), str(name), path)
    return tuple(found)


def sources_of(layout: Sequence[SliceAt]) -> Iterator[SourceAt]:
    """Every source of every slice."""
    for one in layout:
        yield from one.sources


def _form_of(document: Document, path: Key, data: Mapping[str, Any], forms: Sequence[str] = FORMS) -> str:
    given = [form for form in forms if data.get(form) is not None]
    if len(given) > 1:
        given = [form for form in given if data[form] not in ([], {})] or given  # an empty one says nothing
    if len(given) > 1:
        fail(document, (*path, given[1]), f" and {given[0]} both say what is merged; keep one of them")
    if not given:
        needs = "no models; a recipe needs models (or slices, or modules) and merge_method"
        fail(document, path, " needs models or slices" if path else needs)
    return given[0]


def _slices_of(
    document: Document, path: Key, data: Mapping[str, Any], form: str, name: str, module: Key | None
) -> Iterator[SliceAt]:
    here = (*path, form)
    raw = data[form]
    if form == "models":
        yield SliceAt(None, _sources_of(document, here, raw, "- model: name"), name, module)
        return
    if not isinstance(raw, list) or not raw:
        fail(document, here, f"expected a list of at least one `- sources: [...]`, found {shown(raw)}")
    for i, one in enumerate(raw):
        if not isinstance(one, dict) or "sources" not in one:
            fail(document, (*here, i), f"expected `sources:`, a list of {{model, layer_range}}, found {shown(one)}")
        sources = _sources_of(document, (*here, i, "sources"), one["sources"], "- {model: name, layer_range: [0, 8]}")
        yield SliceAt((*here, i), sources, name, module, one)


def _sources_of(document: Document, path: Key, raw: Any, example: str) -> tuple[SourceAt, ...]:
    if not isinstance(raw, list) or not raw:
        fail(document, path, f"expected a list of at least one `{example}`, found {shown(raw)}")
    found = []
    for k, entry in enumerate(raw):
        entry = {"model": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            fail(document, (*path, k), f"expected `{example.removeprefix('- ')}` or a name, found {shown(entry)}")
        found.append(SourceAt((*path, k), entry))
    return tuple(found)


def range_of(document: Document, source: SourceAt, *, sliced: bool) -> Range:
    """The layers that a source gives; all of them under `models:`.

    Raises:
        RecipeError: not two whole numbers, the second not below the first.
    """
    path = (*source.path, "layer_range")
    if not sliced:
        return WHOLE
    raw = source.entry.get("layer_range")
    if raw is None:
        fail(document, source.path, " has no layer_range; add the first layer and the one after the last, as [0, 16]")
    if not isinstance(raw, list) or len(raw) != 2:
        fail(document, path, f" must be the first layer and the one after the last, as [0, 16], found {shown(raw)}")
    start, end = (_layer(one) for one in raw)
    if start is None or (end is None and raw[1] is not None) or (end is not None and end < start):
        fail(
            document, path,
            f" must be two whole numbers from 0 on, the first no larger than the second, found {shown(raw)}",
        )  # fmt: skip
    return start, end


def _layer(raw: Any) -> int | None:
    """A layer's number, also where it is written as text or as 8.0."""
    if isinstance(raw, str) and raw.strip().isdecimal():
        return int(raw)
    if isinstance(raw, bool) or not isinstance(raw, int | float) or raw != raw // 1 or raw < 0:
        return None
    return int(raw)
