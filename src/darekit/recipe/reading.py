# SPDX-License-Identifier: Apache-2.0
"""The strict reading of a recipe, in passes over the whole of it: what is refused by name; unknown names; values;
mergekit's words -> native ones; what belongs together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from darekit.architectures.groups import GROUPS, ONE_TERM
from darekit.dtypes import DTYPES, FLOAT_DTYPES, dtype_from_torch_name
from darekit.methods import MERGE_METHODS, SEED, SPARSIFIERS, Choice, Number, Parameter, Switch
from darekit.recipe import mergekit
from darekit.recipe.data import ModelEntry, Recipe, Sparsify
from darekit.recipe.documents import Document, Key, did_you_mean, fail, open_data, open_file, override, shown, suggest
from darekit.recipe.names import find_model, same_model
from darekit.recipe.tokens import TokensReader, read_chat_template
from darekit.recipe.values import AUTO, Filtered, Filters, Gradient, Value, is_glob, scalars_of
from darekit.recipe.words import AUTOMATIC, SPARSIFY_KEYS, Words, check_names, raw_models, refuse_later


def read_recipe(
    source: str | Path | Mapping[str, Any], *, settings: Mapping[str, Any] | None = None, seed: int | None = None
) -> Recipe:
    """Read a recipe strictly from a YAML file or from data, translate it into native words, and check every name.

    Args:
        source: a recipe file, or its data.
        settings: overrides by dotted key, as `{"parameters.lambda": 0.5}`; an empty value removes a key.
        seed: replaces `sparsify.seed`.

    Returns:
        The recipe, inert: no model is opened.

    Raises:
        RecipeError: the text is not a recipe; the message names the file, line and key, and says what to write instead.

    Examples:
        >>> recipe = dk.read_recipe("recipe.yaml", settings={"parameters.lambda": 0.5}, seed=7)
        >>> recipe.sparsify
        Sparsify(method='dare', parameters={'drop_rate': 0.9}, on='delta', seed=7, keep_dense=('embeddings', 'norms'))
        >>> dict(recipe.parameters)
        {'lambda': 0.5}

        An unknown key is an error, and so is a value out of range:

        >>> dk.read_recipe("recipe.yaml", settings={"sparsify.drop_rat": 0.5})
        Traceback (most recent call last):
        darekit.errors.RecipeError: ...
    """
    document = open_data(source) if isinstance(source, Mapping) else open_file(Path(source))
    document = override(document, settings or {}, seed)
    refuse_later(document)
    document = _spell_out(document)
    words = check_names(document)
    models = _read_models(document, words)
    search = (Path(source).resolve().parent,) if isinstance(source, str | Path) else ()
    shared = _read_parameters(document, ("parameters",), words.shared)
    base = _read_text(document, "base_model")
    notes = []
    method = words.merge_method
    if base is None and method is not None and method.base_row and method.models == (1, 1) and len(models) == 2:
        base = models.pop(0)[1]
        notes.append(f"no base_model: {base} is the base, since it comes first")
    if base is not None and words.parts_base and any(same_model(name, base, search) for _, name, _ in models):
        if method is None or not method.base_row:
            notes.append(
                f"{base} is the base and also one of the models: its delta is 0, so it is left out of the models"
            )
        models = [entry for entry in models if not same_model(entry[1], base, search)]
        if not models:
            fail(document, ("models",), "only the base is listed; add a model that was fine-tuned from it")
    if words.sparsify is None:
        parts = mergekit.translate(words.method, shared, models, lambda path, why: fail(document, path, why))
        notes.extend(parts.notes)
        entries = [
            (k, ModelEntry(name, own, _read_stats(document, k)))
            for (k, name, _), own in zip(models, parts.models, strict=True)
        ]
        sparsify = Sparsify(parts.sparsifier, parts.sparsify, seed=parts.seed or 0) if parts.sparsifier else None
        merge, shared, seeded = parts.merge_method, parts.shared, parts.seed is not None
    else:
        entries = [(k, ModelEntry(name, own, _read_stats(document, k))) for k, name, own in models]
        sparsify, merge, seeded = _read_sparsify(document, words), words.method, "seed" in document.data["sparsify"]
        if "keep_dense" not in document.data["sparsify"] and any(
            _is_auto(scope.get("drop_rate")) for scope in (sparsify.parameters, *(own for _, _, own in models))
        ):
            sparsify = replace(sparsify, keep_dense=ONE_TERM)
            notes.append(
                f"drop_rate: auto keeps {', '.join(ONE_TERM)} dense, because noise does not average out in their "
                "outputs; write keep_dense: [] to drop them too"
            )
    names = [name for _, name, _ in _models_of(document)]
    tokenizer_source, tokens = TokensReader(document, base, names, search).read()
    recipe = Recipe(
        base_model=base,
        models=tuple(entry for _, entry in entries),
        sparsify=sparsify,
        merge_method=merge,
        parameters=shared,
        dtype=_read_dtype(document),
        vocab=_read_choice(document, ("vocab",), ("strict", "base", "pad")),  # type: ignore[arg-type]
        tokenizer_source=tokenizer_source,
        tokens=tokens,
        chat_template=read_chat_template(document),
        heads=_read_heads(document, base, names, search),
        keep_float32=_read_switch(document, "keep_float32", default=True),
        base_extras=_read_choice(document, ("base_extras",), ("keep", "leave_out")),  # type: ignore[arg-type]
        text=document.text,
    )
    _check_whole(document, recipe, [k for k, _ in entries])
    return replace(recipe, notes=(*notes, *_notes(recipe, seeded, search)))


def _spell_out(document: Document) -> Document:
    """`rescale: {q: 0.15}`, as DAREx is written, -> `q: 0.15`."""
    data, places = dict(document.data), dict(document.places)

    def spell(block: Any, path: Key) -> Any:
        raw = block.get("rescale") if isinstance(block, dict) else None
        if not isinstance(raw, dict):
            return block
        here = (*path, "rescale")
        if list(raw) != ["q"] or raw["q"] is None:
            fail(document, here, f" must be paper, l1, none or {{q: number}}, found {shown(raw)}")
        if raw["q"] == 0:
            fail(document, (*here, "q"), " must be above 0: survivors are divided by it")
        if "q" in block:
            fail(document, (*path, "q"), " is given again in rescale; keep one of them")
        places[*path, "q"] = places.get((*here, "q"), places.get(here, "in"))
        return {
            key if key != "rescale" else "q": raw["q"] if key == "rescale" else value for key, value in block.items()
        }

    if "sparsify" in data:
        data["sparsify"] = spell(data["sparsify"], ("sparsify",))
        models = data["models"] if isinstance(data.get("models"), list) else []
        data["models"] = [
            entry | {"parameters": spell(entry["parameters"], ("models", k, "parameters"))}
            if isinstance(entry, dict) and "parameters" in entry
            else entry
            for k, entry in enumerate(models)
        ] or data.get("models")
        if data["models"] is None:
            del data["models"]
    return replace(document, data=data, places=places)


# --- values ---

# PyYAML follows YAML 1.1, where 1e-5 without a point is text.
_EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]{1,4}")


def _read_parameters(
    document: Document, path: Key, allowed: Mapping[str, Parameter], skip: Sequence[str] = ()
) -> dict[str, Value]:
    raw: Any = document.data
    for key in path:
        raw = raw.get(key, {}) if isinstance(raw, dict) else raw[key]
    return {
        name: _read_value(document, (*path, name), allowed[name], value)
        for name, value in raw.items()
        if name not in skip
    }


def _read_value(document: Document, path: Key, parameter: Parameter, raw: Any) -> Value:
    if raw is None:
        fail(document, path, " has no value; give it one or remove the key")
    if parameter.name == SEED.name:
        return _read_seed(document, path, raw)
    if isinstance(parameter.kind, Number):
        if isinstance(raw, list | dict):
            return _read_per_tensor(document, path, parameter, raw)
        return _read_number(document, path, parameter, raw)
    if isinstance(raw, list | dict):
        fail(document, path, f" must be one value for all tensors, found {shown(raw)}")
    if isinstance(parameter.kind, Switch) and not isinstance(raw, str) and raw in (0, 1):
        raw = bool(raw)  # mergekit's users write `normalize: 1.0`
    if isinstance(parameter.kind, Choice) and isinstance(raw, bool):
        raw = str(raw).lower()
    _check_range(document, path, parameter, raw)
    return cast(Value, raw)


def _check_range(document: Document, path: Key, parameter: Parameter, value: Any) -> None:
    problem = parameter.problem(value)
    if problem is not None:
        fail(document, path, problem.removeprefix(parameter.name))


def _read_number(document: Document, path: Key, parameter: Parameter, raw: Any) -> float | str:
    if isinstance(raw, str):
        if raw == AUTO and parameter.name == "drop_rate":
            return AUTO
        raw = _number_of_text(document, path, raw)
    _check_range(document, path, parameter, raw)
    try:
        number = float(raw)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        fail(document, path, f" must be a finite number, found {shown(raw)}")
    return number


def _number_of_text(document: Document, path: Key, raw: str) -> float:
    if _EXPONENT.fullmatch(raw):
        return float(raw)
    hint = "; write a number"
    try:
        float(raw.removesuffix("%"))
        hint = f"; a percentage? write {float(raw[:-1]) / 100:g}" if raw.endswith("%") else "; write it without quotes"
    except ValueError:
        pass
    fail(document, path, f" must be a number, found the text {shown(raw)}{hint}")


_PER_TENSOR = (
    "expected a number, a list of numbers (a gradient over the layers), or a list of {filter: part of a tensor's name, "
    "value: number}"
)


def _read_per_tensor(document: Document, path: Key, parameter: Parameter, raw: Any) -> Filters | Gradient:
    """A gradient, a filter or a list of filters."""
    if raw == [] or (isinstance(raw, dict) and "value" not in raw):
        fail(document, path, f"{_PER_TENSOR}, found {shown(raw)}")
    if isinstance(raw, list) and not any(isinstance(entry, dict) for entry in raw):
        return _read_gradient(document, path, parameter, raw)
    found: list[Filtered] = []
    for i, entry in enumerate(raw if isinstance(raw, list) else [raw]):
        here = (*path, i) if isinstance(raw, list) else path
        if not isinstance(entry, dict):
            fail(document, here, f"{_PER_TENSOR}, found {shown(entry)} among filters")
        value = entry.get("value")
        if value is None:
            fail(document, here, f"{_PER_TENSOR}, found {shown(entry)} without a value")
        pattern = entry.get("filter", "*")
        if not isinstance(pattern, str) or not pattern.removeprefix("="):
            fail(
                document,
                (*here, "filter"),
                f"expected part of a tensor's name, a glob or '*', found {pattern!r}",
            )
        if found and found[-1].filter == "*":
            fail(document, here, " is never reached: the entry before it matches every tensor; put that one last")
        if isinstance(value, list):
            found.append(Filtered(pattern, _read_gradient(document, (*here, "value"), parameter, value)))
        else:
            found.append(Filtered(pattern, _read_number(document, here, parameter, value)))
    return Filters(tuple(found))


def _read_gradient(document: Document, path: Key, parameter: Parameter, raw: list[Any]) -> Gradient:
    """Numbers at equal distances over the layers, each within the parameter's range."""
    if not raw:
        fail(document, path, f"{_PER_TENSOR}, found {shown(raw)}")
    anchors = []
    for i, entry in enumerate(raw):
        here = (*path, i)
        if isinstance(entry, list | dict) or entry is None:
            fail(document, here, f" is part of a gradient and must be a number, found {shown(entry)}")
        number = _read_number(document, here, parameter, entry)
        if isinstance(number, str):
            fail(
                document,
                here,
                f" is {number}, which a gradient cannot contain: write numbers, or use filters with value: {number}",
            )
        anchors.append(number)
    return Gradient(tuple(anchors))


def _read_seed(document: Document, path: Key, raw: Any) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or SEED.problem(raw) is not None:
        fail(document, path, f" must be a whole number from 0 to 2^64 - 1, found {shown(raw)}")
    return raw


def _read_text(document: Document, key: str) -> str | None:
    return None if key not in document.data else _text(document, (key,), document.data[key])


def _text(document: Document, path: Key, raw: Any) -> str:
    """A checkpoint's name."""
    if isinstance(raw, dict):
        fail(document, path, "expected a directory or a Hub id as text (org/name@revision), found a mapping")
    if raw is None or raw == "":
        fail(document, path, " has no value; write a directory or a Hub id")
    if not isinstance(raw, str):
        fail(
            document,
            path,
            f"expected a directory or a Hub id, found {shown(raw)}; if that really is the model's name, put it in "
            "quotes",
        )
    return raw


def _read_choice(document: Document, path: tuple[str, ...], of: tuple[str, ...]) -> str:
    """One of a few words at `path`; the first of them where the key is missing."""
    block = document.data if len(path) == 1 else document.data[path[0]]
    raw = block.get(path[-1], of[0])
    if raw not in of:
        fail(document, path, f" must be one of {', '.join(of)}, found {shown(raw)}{did_you_mean(str(raw), of)}")
    return cast(str, raw)


def _models_of(document: Document) -> list[tuple[int, str, Any]]:
    found = []
    for k, entry, own in raw_models(document):
        if "model" not in entry:
            fail(document, ("models", k), " has no model; add `model:` with a directory or a Hub id")
        found.append((k, _text(document, ("models", k, "model"), entry["model"]), own))
    return found


def _read_models(document: Document, words: Words) -> list[tuple[int, str, dict[str, Value]]]:
    return [
        (k, name, _read_parameters(document, ("models", k, "parameters"), words.model))
        for k, name, _ in _models_of(document)
    ]


def _read_stats(document: Document, place: int) -> str | None:
    """A model's statistics file, as written."""
    entry = document.data["models"][place]
    if "stats" not in entry:
        return None
    raw = entry["stats"]
    if not isinstance(raw, str) or not raw:
        fail(
            document, ("models", place, "stats"),
            f"expected a file made by `dare stats fisher` or `dare stats gram`, found {shown(raw)}",
        )  # fmt: skip
    return raw


def _read_sparsify(document: Document, words: Words) -> Sparsify:
    assert words.sparsifier is not None and words.sparsify is not None
    block = document.data["sparsify"]
    return Sparsify(
        method=words.sparsifier,
        parameters=_read_parameters(document, ("sparsify",), words.sparsify, skip=SPARSIFY_KEYS),
        on=_read_choice(document, ("sparsify", "on"), ("delta", "weights")),  # type: ignore[arg-type]
        seed=_read_seed(document, ("sparsify", "seed"), block.get("seed", 0)),
        keep_dense=_read_keep_dense(document, block.get("keep_dense", [])),
    )


def _read_keep_dense(document: Document, raw: Any) -> tuple[str, ...]:
    path: Key = ("sparsify", "keep_dense")
    raw = [raw] if isinstance(raw, str) else raw
    if not isinstance(raw, list):
        fail(document, path, f"expected a list of {', '.join(GROUPS)} or glob patterns, found {shown(raw)}")
    for i, entry in enumerate(raw):
        if not isinstance(entry, str) or not (entry in GROUPS or "." in entry or is_glob(entry)):
            fail(
                document,
                (*path, i),
                f"{entry!r} is neither a group ({', '.join(GROUPS)}) nor a glob over tensor names "
                f"(*.q_proj.weight){did_you_mean(str(entry), GROUPS)}",
            )
    return tuple(raw)


def _read_dtype(document: Document) -> str | None:
    """Safetensors name of the output's dtype; `out_dtype` wins."""
    names = {key: _dtype_name(document, key) for key in ("out_dtype", "dtype") if key in document.data}
    return next(iter(names.values()), None)


def _dtype_name(document: Document, key: str) -> str:
    raw = document.data[key]
    known = [DTYPES[name].torch_name for name in FLOAT_DTYPES]
    entry = dtype_from_torch_name(raw) if isinstance(raw, str) else None
    if entry is not None and entry.kind == "float":
        return entry.name
    if entry is not None:
        fail(document, (key,), f" must be a floating-point format, found {shown(raw)}; use one of {', '.join(known)}")
    short = DTYPES.get(str(raw).upper().replace("FP", "F"))
    hint = f"; did you mean {short.torch_name!r}?" if short else did_you_mean(str(raw), known)
    fail(document, (key,), f" must be one of {', '.join(known)}, found {shown(raw)}{hint}")


def _read_switch(document: Document, key: str, *, default: bool) -> bool:
    raw = document.data.get(key, default)
    if not isinstance(raw, bool):
        fail(document, (key,), f" must be true or false, found {shown(raw)}")
    return raw


def _read_heads(document: Document, base: str | None, models: Sequence[str], search: Sequence[Path]) -> str | None:
    raw = document.data.get("heads")
    if "heads" not in document.data:
        return None
    if isinstance(raw, str) and base is not None and (raw == "base" or same_model(raw, base, search)):
        return "base"
    if raw == "base" and "base" not in models:
        fail(document, ("heads",), " is base, but there is no base_model: name one of the models, or add base_model")
    found = find_model(raw, models, search) if isinstance(raw, str) else None
    if found is None:
        known = [*(["base"] if base else []), *models]
        fail(
            document,
            ("heads",),
            f" must be {'base or ' if base else ''}one of the models, found {shown(raw)}"
            f"{suggest(str(raw), known, 'known')}",
        )
    return found


# --- what belongs together ---


def _check_whole(document: Document, recipe: Recipe, places: Sequence[int]) -> None:
    method, sparsify = MERGE_METHODS[recipe.merge_method], recipe.sparsify
    on_delta = sparsify is not None and sparsify.on == "delta"
    _check_number(document, recipe)
    if recipe.base_model is None and (method.needs_base or on_delta):
        who = recipe.merge_method if method.needs_base else f"sparsify with {sparsify.method}"  # type: ignore[union-attr]
        fail(
            document, (), f"no base_model; {who} works on differences from it: add base_model: with the common ancestor"
        )
    _check_stats(document, recipe, places)
    if sparsify is None:
        return
    if sparsify.on == "weights" and method.parts_base:
        fail(
            document,
            ("sparsify", "on"),
            f"weights works only with merge_method: linear; {recipe.merge_method} merges deltas: write on: delta",
        )
    if on_delta and recipe.merge_method == "linear" and recipe.parameters.get("normalize") is False:
        fail(
            document,
            ("parameters", "normalize"),
            "false makes linear a sum of whole models, which has no deltas to sparsify: write merge_method: "
            "task_arithmetic (base + sum of deltas), or remove normalize",
        )
    for parameter in SPARSIFIERS[sparsify.method].parameters.values():
        for place, entry in zip(places, recipe.models, strict=True):
            if parameter.default is None and not {parameter.name} & ({*sparsify.parameters} | {*entry.parameters}):
                fail(
                    document,
                    ("models", place),
                    f"{entry.model} has no {parameter.name}; write it under `sparsify:` for all models or under this "
                    "model's `parameters:`",
                )
    _check_auto(document, sparsify, [(k, entry.parameters) for k, entry in zip(places, recipe.models, strict=True)])
    for place, entry in zip(places, recipe.models, strict=True):
        _check_density(document, ("models", place, "parameters", "density"), entry.parameters)


def _check_number(document: Document, recipe: Recipe) -> None:
    """As many models as the method takes, and the parameters that it must have."""
    method = MERGE_METHODS[recipe.merge_method]
    low, high = method.models
    if not low <= len(recipe.models) <= high or (method.base_row and method.needs_base and recipe.base_model is None):
        many = _MODELS.get(low, f"{low} models")
        wanted = f"{many} {'besides base_model' if method.needs_base else ''}".rstrip()
        wanted = f"exactly {wanted}" if low == high else f"at least {wanted}"
        wanted += f", at most {high}" if low < high < float("inf") else ""
        either = " (or two models, of which the first is the base then)" if method.base_row and high == 1 else ""
        base = f" besides {recipe.base_model}" if recipe.base_model else " and no base_model"
        fail(
            document, ("models",),
            f"{recipe.merge_method} takes {wanted}{either}, found {len(recipe.models)}{base}",
        )  # fmt: skip
    for parameter in method.parameters.values():
        if parameter.default is None and parameter.name not in recipe.parameters:
            fail(
                document, (),
                f"{recipe.merge_method} needs {parameter.name}, {parameter.kind.help}: add `parameters: "
                f"{{{parameter.name}: ...}}`",
            )  # fmt: skip


_MODELS = {1: "one model", 2: "two models"}


def _check_auto(document: Document, sparsify: Sparsify, models: Sequence[tuple[int, Mapping[str, Value]]]) -> None:
    """`auto`, `tau` and `q` go only where they mean something."""
    scopes: list[tuple[Key, Mapping[str, Value]]] = [(("sparsify",), sparsify.parameters)]
    scopes += [(("models", k, "parameters"), own) for k, own in models]
    automatic = [path for path, own in scopes if _is_auto(own.get("drop_rate"))]
    if automatic and (sparsify.method not in AUTOMATIC or sparsify.on == "weights"):
        what = sparsify.method if sparsify.on == "delta" else "on: weights"
        fail(
            document,
            (*automatic[0], "drop_rate"),
            f"auto works with {' and '.join(AUTOMATIC)} on deltas, whose perturbation can be predicted, not with "
            f"{what}: write a number",
        )
    for path, own in scopes:
        if "tau" in own and not automatic:
            fail(document, (*path, "tau"), " needs drop_rate: auto, which this recipe does not use; remove it")
        if "q" in own and sparsify.parameters.get("rescale") in ("l1", "none"):
            fail(
                document,
                (*path, "q"),
                f" and rescale: {sparsify.parameters['rescale']} are two ways to rescale; keep one",
            )


def _is_auto(value: Value | None) -> bool:
    return AUTO in scalars_of(value)


def _check_stats(document: Document, recipe: Recipe, places: Sequence[int]) -> None:
    kind = MERGE_METHODS[recipe.merge_method].statistics
    for place, entry in zip(places, recipe.models, strict=True):
        if kind is None and entry.stats is not None:
            users = " and ".join(name for name, other in MERGE_METHODS.items() if other.statistics)
            fail(
                document, ("models", place, "stats"),
                f"{recipe.merge_method} uses no statistics, only {users} do; remove it, or change merge_method",
            )  # fmt: skip
        if kind is not None and entry.stats is None:
            fail(
                document, ("models", place),
                f"{entry.model} has no stats, and {recipe.merge_method} needs them for every model: run `dare stats "
                f"{kind} {entry.model} --data FILE --out NAME.{kind}.safetensors` and add `stats: "
                f"NAME.{kind}.safetensors` to this model",
            )  # fmt: skip
    if kind is None:
        return
    scopes: list[tuple[Key, Mapping[str, Value]]] = [(("parameters", "weight"), recipe.parameters)]
    scopes += [
        (("models", place, "parameters", "weight"), entry.parameters)
        for place, entry in zip(places, recipe.models, strict=True)
    ]
    for path, own in scopes:
        if any(cast(float, number) < 0 for number in scalars_of(own.get("weight"))):
            fail(document, path, f" is negative, but {recipe.merge_method} is a mean; use a weight of 0 or more")


def _check_density(document: Document, path: Key, own: Mapping[str, Value]) -> None:
    """Breadcrumbs counts survivors from mergekit's density as written: it must say the same as the drop rate."""
    if "density" in own and own.get("drop_rate") != mergekit.drop_rates(own["density"]):
        fail(document, path, " and drop_rate are the same quantity; with a `sparsify:` block write only drop_rate")


def _notes(recipe: Recipe, seeded: bool, search: Sequence[Path]) -> Iterator[str]:
    names = [entry.model for entry in recipe.models]
    names = [find_model(name, names[:k], search) or name for k, name in enumerate(names)]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"{name} is listed {names.count(name)} times: each counts as a separate model"
    given = {*recipe.parameters}.union(*(entry.parameters for entry in recipe.models))
    whole = [entry.model for entry in recipe.models if "keep" not in {*entry.parameters} | {*recipe.parameters}]
    if MERGE_METHODS[recipe.merge_method].trims and whole:
        of = "" if "keep" not in given else f" for {' and '.join(whole)}"
        yield f"{recipe.merge_method} without keep{of}: no trim (the TIES paper keeps 0.2)"
    random = recipe.sparsify is not None and SPARSIFIERS[recipe.sparsify.method].random
    if (seeded or "seed" in given) and not random:
        yield "seed has no effect: nothing is drawn at random in this recipe"
