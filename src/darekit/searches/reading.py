# SPDX-License-Identifier: Apache-2.0
"""The strict reading of a search file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

from darekit.architectures.groups import GROUPS
from darekit.errors import RecipeError
from darekit.recipe import Recipe
from darekit.recipe.documents import Document, Key, Places, did_you_mean, fail, open_source, shown, suggest
from darekit.searches.blends import LEAST, wish_in
from darekit.searches.data import AUTO, RUNGS, SAMPLERS, Knob, Limit, Numbers, Search
from darekit.searches.points import point_of
from darekit.searches.space import candidate, midpoint, used_knobs, weight_knobs
from darekit.trials.judging import AGAIN, asked_again, read_judges, read_recipe_place
from darekit.trials.scores import WORDS, check_score, word_meant
from darekit.trials.settings import data_of, models_in, recipe_with
from darekit.wording import and_

KEYS = ("recipe", "space", "seeds", "constraints", "try", "at_least", "at_most", "choose", "sampler", "rungs", "round",
        "trials", "storage", "validation", "test")  # fmt: skip
_MEANT = {"min": "low", "max": "high", "lower": "low", "upper": "high", "from": "low", "to": "high"}  # for ends
RANGE = ("low", "high", "log", "step", "layers", "stepped", "groups")
PARTS = ("attention", "mlp", *GROUPS)  # groups of tensors that a range may name
EVERY = "models.*."
COMBINATIONS = 200  # of choices, that are looked at beforehand

_SHAPE = "expected a range such as {low: 0, high: 1}, a list of values, or names with their settings"


def read_search(source: str | Path | Mapping[str, Any]) -> Search:
    """A YAML file, or the same as data -> search. Relative names in a file are looked up in the working directory, then
    beside the file.

    Raises:
        RecipeError: the text is not a search; the message names the file, line and key, and says what to write instead.
    """
    document, name, search = open_source(source, "search")
    data = document.data
    for key in data:
        if key not in KEYS:
            _explain(document, key)
    for key in ("recipe", "space"):
        if key not in data:
            fail(document, (), f"no {key}; a search needs recipe, space, and judges under validation and test")
    judges = read_judges(document)
    if "validation" not in judges:
        fail(
            document, (), "no validation judges; candidates are chosen by them: add `validation: {NAME: {data: FILE}}`"
        )
    for split, named in judges.items():
        if LEAST in named:
            fail(document, (split, LEAST), " is a reserved name: choose: min is the least of all; use another one")
    names = judges["validation"]
    place = read_recipe_place(document, search)
    try:
        recipe = recipe_with(place, {}, set(), None)
    except RecipeError as error:
        fail(document, ("recipe",), f"{error}")
    weights_sum, negative = _read_constraints(document)
    knobs = _read_space(document, recipe, models_in(data_of(place)), negative)
    _refuse_negative(document, knobs, negative)
    _check_weights(document, knobs, recipe, weights_sum)
    notes = [] if "test" in judges else [
        "there are no judges under `test:`: what is chosen will be reported on validation alone, which flatters it"
    ]  # fmt: skip
    again = asked_again(judges)
    if again:
        notes.append(AGAIN.format(and_([*again])))
    notes += dict.fromkeys(
        f"{_written_as(document, knob.name)} is {' or '.join(knob.choices)}, and nothing between them; a range is "
        "{low: L, high: H}"
        for knob in knobs if knob.choices is not None and _are_ends(document, knob)
    )  # fmt: skip
    found = Search(
        name, place, knobs, weights_sum, judges, _read_goals(document, names, search),
        _read_limits(document, recipe, names, search), *_read_sampler(document, knobs), _read_rungs(document),
        _read_count(document, "round", None), _read_count(document, "trials", None), _read_storage(document), search,
        document.text, (*notes, *recipe.notes), _read_points(document, knobs, recipe),
        Places(document.name, document.places),
    )  # fmt: skip
    if found.sampler == "nsga2" and len(found.goals) < 2:
        fail(document, ("sampler",), " nsga2 is for several goals; with one, write tpe, or name them: choose: [A, B]")
    if found.sampler == "cmaes" and len(found.goals) > 1:
        fail(document, ("sampler",), " cmaes knows one goal only; with several write nsga2 or tpe")
    _check_test(document, found)
    _check_candidates(document, found, recipe)
    return found


def _explain(document: Document, key: str) -> None:
    if key == "axes":
        fail(document, (key,), " belongs to a sweep; a search has space: with the same settings, each with its range")
    if key in ("seed", "mask_seeds"):
        fail(
            document,
            (key,),
            f" is not known; write seeds: {shown(document.data[key])} for masks, or sampler: {{seed: N}}",
        )
    if key in ("models", "base_model", "merge_method", "sparsify", "parameters"):
        fail(document, (key,), " belongs to the recipe; write it under `recipe:`")
    if key in ("judges", "judge", "tasks", "data"):
        fail(document, (key,), " is not known; judges go under `validation:` and `test:`, as test: {NAME: {data: F}}")
    if key in ("goals", "goal", "maximize", "minimize", "objectives"):
        fail(document, (key,), f" is not known; write choose: {shown(document.data[key])}")
    if "." in key:
        fail(document, (key,), " is a setting of the recipe; write it under `space:`")
    if key in ("jobs", "time", "ray", "device", "dtype", "threads"):
        fail(document, (key,), f" is an option of the command: dare search SEARCH.yaml --{key}")
    fail(document, (key,), f" is not known{suggest(key, KEYS)}")


# --- the space ---


def _read_space(document: Document, recipe: Recipe, listed: Sequence[str], negative: bool | None) -> tuple[Knob, ...]:
    raw = document.data["space"]
    if not isinstance(raw, dict) or not raw:
        fail(
            document, ("space",),
            f"expected settings with their ranges, such as {{parameters.lambda: {{low: 0.3, high: 1.5}}}}, "
            f"found {shown(raw)}",
        )  # fmt: skip
    knobs: list[Knob] = []
    for name, value in raw.items():
        path: Key = ("space", name)
        if name in ("seed", "seeds"):
            fail(document, path, f" is not a setting; write at the top level: seeds: {shown(value)}")
        keys = [name]
        if name.startswith(EVERY):
            if 0 < len(listed) < len(recipe.models):
                fail(document, path, f"the recipe has a weight for all models, so its base {recipe.base_model} counts "
                     "as one more of them, which it does not list: list it under `models:`, or remove "
                     "`parameters.weight`")  # fmt: skip
            keys = [f"models.{k}.{name.removeprefix(EVERY)}" for k in range(len(recipe.models))]
        knobs += [_read_knob(document, path, key, value, negative) for key in keys]
    if "seeds" in document.data:
        knobs.append(_read_seeds(document))
    twice = [knob.name for i, knob in enumerate(knobs) if knob.name in [other.name for other in knobs[:i]]]
    if twice:
        fail(document, _path_of(document, twice[0]), " is given twice; keep one")
    return tuple(knobs)


def _read_knob(document: Document, path: Key, key: str, raw: Any, negative: bool | None) -> Knob:
    if raw == AUTO:
        if key.endswith(".drop_rate"):
            return Knob(key)  # the models say how far it may go
        if re.fullmatch(r"models\.\d+\.parameters\.weight", key):
            return Knob(key, Numbers(-1.0 if negative else 0.0, 1.0))
        fail(document, path, " has no range of its own; auto is for drop rates and weights: write {low: L, high: H}")
    if isinstance(raw, list):
        return _read_values(document, path, key, raw)
    if not isinstance(raw, dict) or not raw:
        fail(document, path, f"{_SHAPE}, found {shown(raw)}")
    if {"low", "high"} & {*raw}:
        return _read_range(document, path, key, raw)
    odd = [name for name, end in raw.items() if name in _MEANT and not isinstance(end, dict | None)]
    if odd and {*raw} <= {*RANGE, *_MEANT}:
        fail(document, (*path, odd[0]), f" is not known; a range is {{low: L, high: H}}: write {_MEANT[odd[0]]}")
    odd = [name for name in raw if name in RANGE]
    if odd:
        fail(document, path, f"has {odd[0]}, but no low and high; {_SHAPE}")
    choices = {}
    for label, settings in raw.items():
        if settings is not None and not isinstance(settings, dict):
            fail(
                document,
                (*path, label),
                f"expected settings, such as {{sparsify.method: dare}}, found {shown(settings)}",
            )
        choices[label] = settings or {}
    return Knob(key, choices=choices, named=True)


def _read_values(document: Document, path: Key, key: str, values: list[Any]) -> Knob:
    if len(values) < 2:
        fail(document, path, f"{shown(values)} leaves nothing to choose; write it into the recipe, or give two values")
    if any(value is None for value in values):
        fail(document, path, "holds an empty value; name that choice: {none: {KEY: null}, ...}")
    for i, value in enumerate(values):
        if value in values[:i]:
            fail(document, (*path, i), f"{shown(value)} is given twice; keep one")
    return Knob(key, choices={_label(value): {key: value} for value in values})


def _are_ends(document: Document, knob: Knob) -> bool:
    """Whether two values are written that are rather the ends of a range."""
    raw = document.data["space"].get(_path_of(document, knob.name)[-1])
    return isinstance(raw, list) and len(raw) == 2 and all(isinstance(one, float) for one in raw)


def _label(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _read_range(document: Document, path: Key, key: str, raw: Mapping[str, Any]) -> Knob:
    for name in raw:
        if name not in RANGE:
            fail(document, (*path, name), f" is not known{suggest(name, RANGE)}")
    low, high = _number(document, path, raw, "low"), _number(document, path, raw, "high")
    if not low < high:
        fail(document, path, f"the range from {low:g} to {high:g} is empty; low must be below high")
    log, stepped = (_switch(document, path, raw, name) for name in ("log", "stepped"))
    if log and low <= 0:
        fail(document, (*path, "log"), f"needs low above 0, found {low:g}")
    step = None if raw.get("step") is None else _number(document, path, raw, "step")
    if step is not None and not 0 < step <= high - low:
        fail(document, (*path, "step"), f"{step:g} must be above 0, and at most high - low = {high - low:g}")
    if step is not None and log:
        fail(document, (*path, "step"), " and log cannot be combined; keep one")
    layers = raw.get("layers", 0)
    if type(layers) is not int or not (layers == 0 or 2 <= layers <= 64):
        fail(
            document,
            (*path, "layers"),
            f"expected how many control points over depth, from 2 to 64, found {shown(layers)}",
        )
    if stepped and not layers:
        fail(document, (*path, "stepped"), " is about layers; add layers: 4, for example")
    groups = raw.get("groups", [])
    if groups in PARTS:
        fail(document, (*path, "groups"), f"expected a list, found {shown(groups)}; write groups: [{groups}]")
    if not isinstance(groups, list) or any(group not in PARTS for group in groups) or len({*groups}) < len(groups):
        odd = next((g for g in groups if g not in PARTS), groups) if isinstance(groups, list) else groups
        fail(document, (*path, "groups"), f"expected some of {', '.join(PARTS)}, found {shown(odd)}"
             f"{did_you_mean(str(odd), PARTS)}")  # fmt: skip
    if (layers or groups) and ".parameters." not in f".{key}" and not key.startswith("sparsify."):
        fail(document, path, " cannot differ between layers or groups; that is for numbers under `parameters`")
    whole = all(isinstance(raw.get(name, 0), int) for name in ("low", "high")) and isinstance(step, float) and step >= 1
    return Knob(key, Numbers(low, high, log, step, whole), layers=layers, stepped=stepped, groups=tuple(groups))


def _number(document: Document, path: Key, raw: Mapping[str, Any], name: str) -> float:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        if name not in raw:
            fail(document, path, f" lacks {name}; write {{low: NUMBER, high: NUMBER}}")
        hint = "; write it with a point, as 1.0e-5" if _scientific(value) else ""
        fail(document, (*path, name), f"expected a number, found {shown(value)}{hint}")
    return float(value)


def _scientific(value: Any) -> bool:
    """YAML 1.1 reads 1e-5 as text."""
    return isinstance(value, str) and bool(re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.I))


def _switch(document: Document, path: Key, raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name, False)
    if not isinstance(value, bool):
        fail(document, (*path, name), f"expected true or false, found {shown(value)}")
    return value


def _read_seeds(document: Document) -> Knob:
    raw = document.data["seeds"]
    if not isinstance(raw, list) or not raw or any(type(one) is not int or not 0 <= one < 1 << 64 for one in raw):
        fail(document, ("seeds",), f"expected whole numbers from 0 to 2^64 - 1, such as [1, 2, 3], found {shown(raw)}")
    if len({*raw}) < len(raw) or len(raw) < 2:
        fail(document, ("seeds",), f"{shown(raw)}: give two or more different ones; a single one is the recipe's seed")
    return Knob("sparsify.seed", choices={str(one): {"sparsify.seed": one} for one in raw})


# --- constraints ---


def _read_constraints(document: Document) -> tuple[float | None, bool | None]:
    """What weights add up to, and whether they may be negative; None: nothing is said."""
    raw = document.data.get("constraints", {})
    path: Key = ("constraints",)
    if not isinstance(raw, dict) or any(key != "weights" for key in raw):
        odd = next((key for key in raw if key != "weights"), "") if isinstance(raw, dict) else raw
        hint = (
            f"; bounds of scores are at the top level: at_least: {{{odd}: 0.9}}" if isinstance(odd, str) and odd else ""
        )
        fail(document, path, f"expected {{weights: {{sum: 1, negative: false}}}}, found {shown(raw)}{hint}")
    weights = raw.get("weights", {})
    if not isinstance(weights, dict):
        fail(document, (*path, "weights"), f"expected {{sum: 1, negative: false}}, found {shown(weights)}")
    for key in weights:
        if key not in ("sum", "negative"):
            fail(document, (*path, "weights", key), f" is not known{suggest(key, ('sum', 'negative'))}")
    total = weights.get("sum")
    if total is not None and (isinstance(total, bool) or not isinstance(total, int | float) or total <= 0):
        fail(document, (*path, "weights", "sum"), f"expected a number above 0, found {shown(total)}")
    negative = weights.get("negative")
    if negative is not None and not isinstance(negative, bool):
        fail(document, (*path, "weights", "negative"), f"expected true or false, found {shown(negative)}")
    return None if total is None else float(total), negative


def _refuse_negative(document: Document, knobs: tuple[Knob, ...], negative: bool | None) -> None:
    for knob in weight_knobs(knobs) if negative is False else ():
        if knob.numbers is not None and knob.numbers.low < 0:
            fail(document, _path_of(document, knob.name), f"reaches down to {knob.numbers.low:g}, but "
                 "constraints.weights says negative: false; write low: 0, or negative: true")  # fmt: skip


def _check_weights(document: Document, knobs: tuple[Knob, ...], recipe: Recipe, total: float | None) -> None:
    weights = weight_knobs(knobs)
    if total is None:
        return
    shapes = {(knob.layers, knob.stepped, knob.groups) for knob in weights}
    if len(weights) < len(recipe.models) or len(shapes) > 1:
        what = "a range for each model's weight" if len(weights) < len(recipe.models) else "alike ranges"
        fail(document, ("constraints", "weights", "sum"), f"needs {what}; write under space: "
             "models.*.parameters.weight: {low: 0, high: 1}")  # fmt: skip


def _path_of(document: Document, name: str) -> Key:
    space = document.data["space"]
    every = re.sub(r"^models\.\d+\.", EVERY, name)
    return ("space", name if name in space else every) if {name, every} & {*space} else ("seeds",)


def _check_candidates(document: Document, search: Search, recipe: Recipe) -> None:
    """Each choice, and each range, makes a recipe. Whatever depends on the models is not known here."""
    plain = midpoint(search.knobs)
    models = [Path(entry.model).name for entry in recipe.models]
    search = replace(search, weights_sum=None)  # the middle of all weights may be 0, which cannot be scaled
    for knob in search.knobs:
        path = _path_of(document, knob.name)
        for label in knob.choices or (None,):
            try:
                candidate(search, {**plain, **({knob.name: label} if label is not None else {})}, only=knob)
            except RecipeError as error:
                place: Key = (*path, label) if knob.named and label is not None else path
                fail(document, place, f"this does not make a recipe: {_why(error, knob.name, models)}")
    chosen = [knob for knob in search.knobs if knob.choices is not None]
    used: set[str] = set()
    tried: set[tuple[str, ...]] = set()
    for labels in islice(product(*(knob.choices or () for knob in chosen)), COMBINATIONS):
        params = {**plain, **{knob.name: label for knob, label in zip(chosen, labels, strict=True)}}
        try:
            candidate(search, params)
        except RecipeError as error:
            which = ", ".join(f"{knob.name}: {label}" for knob, label in zip(chosen, labels, strict=True))
            fail(document, ("space",), f"{which + ' ' if which else 'its middle '}does not make a recipe: {error}")
        concerned = used_knobs(search, params)
        for knob in search.knobs:
            if knob.name in concerned and knob.numbers is not None and (knob.name, *sorted(concerned)) not in tried:
                tried.add((knob.name, *sorted(concerned)))
                _check_ends(document, search, knob, params)
        used |= concerned
    for knob in search.knobs:
        if knob.name not in used:
            setters = [
                label
                for other in search.knobs if other.named
                for label, settings in (other.choices or {}).items() if knob.name in settings
            ]  # fmt: skip
            if setters:
                fail(document, _path_of(document, knob.name), f" concerns no candidate: {and_(setters)} "
                     f"set{'s' * (len(setters) == 1)} it; leave it out there, or here")  # fmt: skip
            what = "a `sparsify:` block" if knob.name.startswith("sparsify.") else "a method that takes it"
            fail(document, _path_of(document, knob.name), f" concerns no candidate: the recipe lacks {what}")


def _why(error: RecipeError, name: str, models: Sequence[str] = ()) -> str:
    """What is wrong with a setting, as the space's own words have it."""
    text = re.sub(r"^(?:recipe )?setting (\S+): (?=\1[ :]|models has)", "", str(error))
    block = re.search(r"write it under `(\w+):`$", text)
    if block is not None and "." not in name:
        return f"{text[: block.start()]}write {block[1]}.{name}"
    of = re.match(r"models\.([^.]+)", name)
    if of is not None and of[1] in models:
        return f"{text}; {of[1]} is models.{models.index(of[1])}"
    return text


def _check_ends(document: Document, search: Search, knob: Knob, params: Mapping[str, Any]) -> None:
    """The ends of a range are values that its setting may have."""
    assert knob.numbers is not None
    for word, end in (("low", knob.numbers.low), ("high", knob.numbers.high)):
        try:
            candidate(search, {**params, **dict.fromkeys(knob.dimensions, end)})
        except RecipeError as error:
            fail(
                document,
                (*_path_of(document, knob.name), word),
                f"this does not make a recipe: {_why(error, knob.name)}",
            )


# --- candidates that are asked first ---


def _read_points(document: Document, knobs: tuple[Knob, ...], recipe: Recipe) -> tuple[Mapping[str, Any], ...]:
    """Candidates of one's own: dimension -> value; what is left out is as in the recipe."""
    raw = document.data.get("try", [])
    if not isinstance(raw, list) or not all(isinstance(one, dict) and one for one in raw):
        fail(document, ("try",), "expected a list of candidates, each with some settings of the space, such as "
             f"[{{parameters.lambda: 0.5}}], found {shown(raw)}")  # fmt: skip
    by_name = {knob.name: knob for knob in knobs}
    found = []
    for i, settings in enumerate(raw):
        point: dict[str, Any] = {}
        for name, value in settings.items():
            path: Key = ("try", i, name)
            suffix = name.removeprefix(EVERY)
            keys = [f"models.{k}.{suffix}" for k in range(len(recipe.models))] if name.startswith(EVERY) else [name]
            for key in keys:
                if key not in by_name:
                    written = [*dict.fromkeys(_written_as(document, knob.name) for knob in knobs)]
                    fail(document, path, f" is no setting of the space{suggest(name, written, 'there are')}")
                try:
                    point |= point_of(by_name[key], value)
                except ValueError as error:
                    fail(document, path, f"{error}")
        found.append(point)
    return tuple(found)


def _written_as(document: Document, name: str) -> str:
    """A knob's name as the file has it."""
    return str(_path_of(document, name)[-1])


# --- goals ---


def _read_goals(document: Document, judges: Mapping[str, Any], search: tuple[Path, ...]) -> tuple[str, ...]:
    raw = document.data.get("choose")
    if raw is None:
        return ()
    found = [_goal_in(document, one) for one in (raw if isinstance(raw, list) else [raw])]
    if not found or len({*found}) < len(found):
        fail(document, ("choose",), f"expected the name of a score, or of several, found {shown(raw)}")
    for one in found:
        _known_score(document, ("choose",), one, judges, search)
    return tuple(found)


def _goal_in(document: Document, raw: Any) -> str:
    """A goal in one line: `{min: [a, b]}` is `min of a, b`."""
    if isinstance(raw, dict) and len(raw) == 1:
        word, parts = next(iter(raw.items()))
        wish = wish_in(str(word))
        names = parts if isinstance(parts, list) and all(isinstance(one, str) for one in parts) else []
        if wish is not None and not wish.parts and 1 < len(names) == len({*names}):
            return f"{word} of {', '.join(names)}"
    if not isinstance(raw, str):
        word = next(iter(raw)) if isinstance(raw, dict) and len(raw) == 1 else ""
        meant = word_meant(str(word))
        hint = f"; did you mean {meant!r}?" if meant not in (None, word) else ""
        fail(document, ("choose",), "expected the name of a score, or of several, or what to make of them, as "
             f"min, or {{relative mean: [A, B]}}; found {shown(raw)}{hint}")  # fmt: skip
    return raw


def _known_score(
    document: Document, path: Key, score: str, judges: Mapping[str, Any], search: tuple[Path, ...]
) -> None:
    wish = wish_in(score)
    for part in (score,) if wish is None else wish.parts:
        check_score(document, path, part, judges, search, "under `validation:`", WORDS)


def _check_test(document: Document, search: Search) -> None:
    """Complain where `test:` lacks a judge without which the choice cannot be reported."""
    if "test" not in search.judges:
        return
    names = search.judges["validation"]
    for goal in search.goals or ("",):
        wish = wish_in(goal) if goal else None
        parts = (wish.parts if wish is not None else (goal,) if goal else ()) or names
        missing = [name for name in names if name not in search.judges["test"]
                   and name in {part.partition("/")[0] for part in parts}]  # fmt: skip
        if missing:
            chosen = goal or (f"the mean of {and_([*names])}" if len(names) > 1 else missing[0])
            fail(
                document, ("test",), f" lacks {and_(missing)}: candidates are chosen by {chosen}, which could not be "
                "reported; add what is missing under the same name, or write choose: with scores that both have",
            )  # fmt: skip


_OF = re.compile(r"([-+]?[0-9.]+(?:e[-+]?\d+)?)\s*(?:of\s+(.+))?", re.I)


def _read_limits(
    document: Document, recipe: Recipe, judges: Mapping[str, Any], search: tuple[Path, ...]
) -> tuple[Limit, ...]:
    found = []
    models = [entry.model for entry in recipe.models]
    for key in ("at_least", "at_most"):
        raw = document.data.get(key, {})
        if not isinstance(raw, dict):
            fail(
                document,
                (key,),
                f"expected scores and their bounds, such as {{chat: 0.95 of base}}, found {shown(raw)}",
            )
        for score, bound in raw.items():
            path: Key = (key, score)
            _known_score(document, path, score, judges, search)
            match = _OF.fullmatch(str(bound).strip())
            if match is None or isinstance(bound, bool):
                part = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%(.*)", str(bound).strip())
                hint = f"; write {float(part[1]) / 100:g}{part[2]}" if part else ""
                fail(document, path, f"expected a number, or a share such as 0.95 of base, found {shown(bound)}{hint}")
            of = match[2].strip() if match[2] else None
            if of is not None and of != "base":
                known = {one: one for one in models} | {Path(one).name: one for one in models}
                if of not in known:
                    fail(document, path, f"{of!r} is not a model of the recipe{suggest(of, [*known, 'base'], 'known')}")
                of = known[of]
            if of == "base" and recipe.base_model is None:
                fail(document, path, "names base, but the recipe has no base_model; name one of its models")
            try:
                factor = float(match[1])
            except ValueError:
                fail(document, path, f"expected a number, found {shown(bound)}")
            found.append(Limit(score, factor, of, key == "at_least"))
    return tuple(found)


# --- how ---


def _read_sampler(document: Document, knobs: tuple[Knob, ...]) -> tuple[str, int]:
    raw = document.data.get("sampler", "tpe")
    path: Key = ("sampler",)
    spec = {"name": raw} if isinstance(raw, str) else raw
    if not isinstance(spec, dict) or any(key not in ("name", "seed") for key in spec):
        fail(document, path, f"expected one of {', '.join(SAMPLERS)}, or {{name: tpe, seed: 1}}, found {shown(raw)}")
    name, seed = spec.get("name", "tpe"), spec.get("seed", 0)
    if name not in SAMPLERS:
        fail(document, path, f"{shown(name)} is not known{suggest(str(name), SAMPLERS, 'known')}")
    if type(seed) is not int or not 0 <= seed < 1 << 32:
        fail(document, path, f"seed must be a whole number from 0 to 2^32 - 1, found {shown(seed)}")
    chosen = [knob.name for knob in knobs if knob.choices is not None]
    if name == "cmaes" and chosen:
        fail(document, path, f"cmaes searches numbers only, and {', '.join(chosen)} "
             f"{'is a choice' if len(chosen) == 1 else 'are choices'}: write sampler: tpe")  # fmt: skip
    if name == "cmaes" and sum(len(knob.dimensions) for knob in knobs) < 2:
        fail(document, path, "cmaes needs at least two numbers; write sampler: tpe")
    loose = [
        knob.name for knob in knobs if knob.choices is None and (knob.numbers is None or knob.numbers.step is None)
    ]
    if name == "grid" and loose:
        fail(document, path, f"grid tries all combinations, and {loose[0]} has no step; write step: 0.1, for "
             "example, or a list of values")  # fmt: skip
    return name, seed


def _read_rungs(document: Document) -> tuple[float, ...]:
    raw = document.data.get("rungs")
    if raw is None:
        return RUNGS
    if raw in (False, "none", []):
        return (1.0,)
    found: list[float] = []
    for i, one in enumerate(raw if isinstance(raw, list) else [raw]):
        share = _share(one)
        if share is None or not 0 < share <= 1 or (found and share <= found[-1]):
            fail(document, ("rungs", i), "expected shares of the items, each larger than the one before, as "
                 f"[1/9, 1/3, 1], found {shown(one)}")  # fmt: skip
        found.append(share)
    return tuple(found) if found[-1] == 1 else (*found, 1.0)


def _share(value: Any) -> float | None:
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+)\s*/\s*([1-9]\d*)", value)):
        return int(match[1]) / int(match[2])
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _read_count(document: Document, key: str, default: int | None) -> int | None:
    raw = document.data.get(key, default)
    if raw is not None and (type(raw) is not int or raw < 1):
        fail(document, (key,), f"expected a whole number above 0, found {shown(raw)}")
    return raw


def _read_storage(document: Document) -> str | None:
    raw = document.data.get("storage")
    if raw is not None and (not isinstance(raw, str) or "://" not in raw):
        fail(document, ("storage",), f"expected a database's URL, such as sqlite:///search.db, found {shown(raw)}")
    return raw
