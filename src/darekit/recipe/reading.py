# SPDX-License-Identifier: Apache-2.0
"""The strict reading of a recipe, in passes over the whole of it: what is refused by name; unknown names; values;
mergekit's words -> native ones; what belongs together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from darekit.architectures.groups import GROUPS, ONE_TERM
from darekit.dtypes import DTYPES, FLOAT_DTYPES, NEAREST, STOCHASTIC, Rounding, dtype_from_torch_name
from darekit.errors import RecipeError
from darekit.methods import MERGE_METHODS, SPARSIFIERS, WEIGHT
from darekit.recipe import mergekit
from darekit.recipe.data import LAYOUTS, ModelEntry, Recipe, Slice, Sparsify
from darekit.recipe.documents import (
    Document,
    Key,
    did_you_mean,
    fail,
    open_data,
    open_documents,
    override,
    shown,
    suggest,
)
from darekit.recipe.entries import gather
from darekit.recipe.essence import is_random
from darekit.recipe.ignored import without
from darekit.recipe.leniency import as_in_mergekit
from darekit.recipe.names import find_model, same_model
from darekit.recipe.parameters import block_at, read_seed
from darekit.recipe.references import reference_of
from darekit.recipe.stages import read_stage, stages_of, stored_names
from darekit.recipe.texts import recipe_text
from darekit.recipe.tokens import TokensReader, read_chat_template
from darekit.recipe.values import AUTO, BySlice, Value, is_glob, scalars_of
from darekit.recipe.words import AUTOMATIC, Words, check_names
from darekit.wording import and_, label

ROUNDINGS = (NEAREST, STOCHASTIC)
NO_DRAW = "seed has no effect: nothing is drawn at random in this recipe"
_ROUNDING_KEYS = ("method", "seed")


def read_recipe(
    source: str | Path | Mapping[str, Any],
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    lenient: bool = False,
    stage: str | None = None,
) -> Recipe:
    """Read a recipe strictly from a YAML file or from data, translate it into native words, and check every name.

    Args:
        source: a recipe file, or its data.
        settings: overrides by dotted key, as `{"parameters.lambda": 0.5}`; an empty value removes a key.
        seed: replaces `sparsify.seed`, in every stage that draws at random.
        lenient: warn of keys that are not known and of settings without effect, instead of refusing the recipe.
        stage: of a recipe of several stages (documents with a `name:`), which one; the last if not given.

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
    return read_with(
        lambda document, search: read_document(document, search, lenient=lenient),
        source, settings, seed, stage, lenient=lenient,
    )  # fmt: skip


def read_with(
    reader: Callable[[Document, Sequence[Path]], Recipe],
    source: str | Path | Mapping[str, Any],
    settings: Mapping[str, Any] | None,
    seed: int | None,
    stage: str | None,
    *,
    lenient: bool = False,
) -> Recipe:
    """As `read_recipe`; `reader`: reads one document, given where relative names are looked up."""
    if settings is not None and not (isinstance(settings, Mapping) and all(isinstance(key, str) for key in settings)):
        raise RecipeError(
            f"settings must be a dict, dotted key -> value, as {{'parameters.lambda': 0.5}}; found {settings}"
        )
    search = search_path(source)
    opened = [open_data(source)] if isinstance(source, Mapping) else open_documents(Path(source), lenient=lenient)
    named, last = stages_of(opened)
    chosen = last if stage is None else named.get(stage)

    def read(document: Document) -> Recipe:
        own = settings or {} if document is chosen else {}
        if not named:
            return reader(override(document, own, seed), search)
        recipe = reader(override(document, own, None), search)
        # One seed for all stages that draw, so that a stage can be written alone.
        return reader(override(document, own, seed), search) if seed is not None and is_random(recipe) else recipe

    found = read_stage(named, last, stage, read)
    if seed is not None and (files := [name for name in stored_names(found) if name.endswith((".yaml", ".yml"))]):
        found = replace(found, notes=(*found.notes, _own_seeds(files)))
    if not named or (stage is None and seed is None and not settings):
        return found
    if seed is not None and not is_random(found):
        found = replace(found, notes=(*found.notes, NO_DRAW))
    changes = [f"{key}={value}" for key, value in (settings or {}).items()] + [f"seed={seed}"] * (seed is not None)
    said = [
        *([f"stage {stage}"] if stage is not None else []),
        *([f"overridden: {', '.join(changes)}"] if changes else []),
    ]
    return replace(found, text=f"# {'; '.join(said)}\n{recipe_text(found.to_data())}")


def _own_seeds(files: Sequence[str]) -> str:
    keep = "keeps its own" if len(files) == 1 else "keep their own"
    return f"the seed is that of this file's recipes: {and_([label(name) for name in files])} {keep}"


def search_path(source: object) -> tuple[Path, ...]:
    """Where a recipe's relative paths are looked up after the working directory: the recipe's own folder."""
    return (Path(source).resolve().parent,) if isinstance(source, str | Path) else ()


def read_document(document: Document, search: Sequence[Path], *, lenient: bool = False) -> Recipe:
    """One document, which knows no other; errors as `read_recipe`. `search`: where relative names are looked up."""
    document = _spell_out(document)
    if lenient:
        document = _copy_of_base(document, search)
    document = _with_base_of_linear(document, search)
    document, words, ignored = check_names(document, lenient=lenient)
    document = _without_empty(document, words)
    if lenient:
        document, words = as_in_mergekit(document, words)
    # First what depends on nothing else, so that whoever collects errors meets all of it.
    plain: dict[str, Any] = dict(
        dtype=_read_dtype(document),
        vocab=_read_choice(document, ("vocab",), ("strict", "base", "pad")),
        keep_float32=_read_switch(document, "keep_float32", default=True),
        base_extras=_read_choice(document, ("base_extras",), ("keep", "leave_out")),
        output=_read_choice(document, ("output",), ("model", "adapter")),
        rank=_read_rank(document),
        chat_template=read_chat_template(document),
    )
    rounding, rounding_seed = _read_rounding(document)
    if rounding == STOCHASTIC and plain["output"] == "adapter":
        fail(document, ("rounding",), " applies to models: with output: adapter, write nearest, or remove it")
    found = gather(document, words, search)
    seed = 0  # of the recipe
    notes, shared = [*document.notes, *ignored, *found.notes], found.shared
    models = [(entry.path, entry.name, entry.own) for entry in found.entries]
    if words.sparsify is None:
        parts = mergekit.translate(
            words.method, shared, models, lambda path, why: fail(document, path, why), lenient=lenient
        )
        notes.extend(parts.notes)
        models = [(path, name, own) for (path, name, _), own in zip(models, parts.models, strict=True)]
        sparsify = Sparsify(parts.sparsifier, parts.sparsify, seed=parts.seed or 0) if parts.sparsifier else None
        merge, shared, seeded, seed = parts.merge_method, parts.shared, parts.seed is not None, parts.seed or 0
    else:
        sparsify, merge = _read_sparsify(document, words, found.sparse), words.method
        seeded, seed = "seed" in document.data["sparsify"], sparsify.seed
        if "keep_dense" not in document.data["sparsify"] and any(
            _is_auto(scope.get("drop_rate")) for scope in (sparsify.parameters, *(own for _, _, own in models))
        ):
            sparsify = replace(sparsify, keep_dense=ONE_TERM)
            notes.append(
                f"drop_rate: auto keeps {', '.join(ONE_TERM)} dense, because noise does not average out in their "
                "outputs; write keep_dense: [] to drop them too"
            )
    tokenizer_source, tokens = TokensReader(document, found.base, found.names, search).read()
    recipe = Recipe(
        base_model=found.base,
        models=tuple(
            ModelEntry(
                name, _where_present(own, k, found.slices), _read_stats(document, path), _read_layout(document, path)
            )
            for k, (path, name, own) in enumerate(models)
        ),
        sparsify=sparsify,
        merge_method=merge,
        parameters=shared,
        tokenizer_source=tokenizer_source,
        tokens=tokens,
        heads=_read_heads(document, found.base, found.names, search),
        slices=found.slices,
        rounding=rounding,
        rounding_seed=0 if rounding == NEAREST else seed if rounding_seed is None else rounding_seed,
        text=document.text,
        **plain,
    )
    _check_whole(document, recipe, [path for path, _, _ in models], ignored)
    return replace(recipe, notes=(*notes, *_notes(recipe, seeded, search)))


def _copy_of_base(document: Document, search: Sequence[Path]) -> Document:
    """A recipe of mergekit's whose only model is its base, of which mergekit makes a copy."""
    data = document.data
    base, models, method = data.get("base_model"), data.get("models"), data.get("merge_method")
    parted = method in mergekit.PRODUCTS or (method in MERGE_METHODS and MERGE_METHODS[method].parts_base)
    if "sparsify" in data or not parted or base is None or not isinstance(models, list) or len(models) != 1:
        return document
    entry = models[0]
    if not isinstance(entry, dict) or entry.get("model") is None:
        return document
    name = reference_of(document, ("base_model",), base)
    if not same_model(reference_of(document, ("models", 0, "model"), entry["model"]), name, search):
        return document
    note = f"WARNING: only the base is listed, so the output is a copy of {name}, as in mergekit (--lenient)"
    rest = {key: value for key, value in data.items() if key != "parameters"}
    changed = {"merge_method": "passthrough", "models": [{"model": name, "parameters": {}}]}
    return replace(document, data=rest | changed, notes=(*document.notes, note))


def _with_base_of_linear(document: Document, search: Sequence[Path]) -> Document:
    """A `linear` of mergekit's with a weight for all models: its base, if not listed, is one more of them."""
    data = document.data
    base = data.get("base_model")
    if data.get("merge_method") != "linear" or {"sparsify", "output"} & {*data} or base is None:
        return document
    name = reference_of(document, ("base_model",), base)
    notes: list[str] = []

    def extended(block: Mapping[str, Any], path: Key, weighted: bool) -> Mapping[str, Any]:
        weighted = weighted or (isinstance(block.get("parameters"), dict) and WEIGHT.name in block["parameters"])
        found = dict(block)
        if isinstance(block.get("modules"), dict):
            found["modules"] = {
                key: extended(one, (*path, "modules", key), weighted) if isinstance(one, dict) else one
                for key, one in block["modules"].items()
            }
        models = block["models"] if isinstance(block.get("models"), list) else []
        named = [one["model"] for one in models if isinstance(one, dict) and one.get("model")]
        if weighted and named and len(named) == len(models):
            listed = (reference_of(document, (*path, "models", i, "model"), one) for i, one in enumerate(named))
            if not any(same_model(one, name, search) for one in listed):
                found["models"] = [*models, {"model": name, "parameters": {}}]
                notes.append(
                    f"WARNING: {name} is the base and not listed, and a weight is given for all models: it counts as "
                    "one more of them, as in mergekit; to leave it out, write weights under the models' own "
                    "`parameters:`"
                )
        return found

    data = dict(extended(data, (), False))
    return replace(document, data=data, notes=(*document.notes, *dict.fromkeys(notes)))


def _without_empty(document: Document, words: Words) -> Document:
    """Keys of mergekit's that have no value, as programs write them, are as if they were not there."""
    empty = [key for key in ("base_model", "dtype", "out_dtype") if document.data.get(key, "") is None]
    empty = [key for key in empty if words.sparsify is None and not (key == "base_model" and words.needs_base)]
    if not empty:
        return document
    notes = [f"{key} has no value: as if it were not there" for key in empty]
    return replace(without(document, [(key,) for key in empty]), notes=(*document.notes, *notes))


def _where_present(own: Mapping[str, Value], model: int, slices: Sequence[Slice]) -> dict[str, Value]:
    """A model's parameters without values for slices in which it has no part."""
    absent = [one.models[model] is None for one in slices]
    return {
        name: BySlice(tuple(None if gone else one for gone, one in zip(absent, value.values, strict=True)))
        if isinstance(value, BySlice)
        else value
        for name, value in own.items()
    }


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


# --- one key ---


def _read_choice(document: Document, path: tuple[str, ...], of: tuple[str, ...]) -> str:
    """One of a few words at `path`; the first of them where the key is missing."""
    block = document.data if len(path) == 1 else document.data[path[0]]
    raw = block.get(path[-1], of[0])
    if raw not in of:
        fail(document, path, f" must be one of {', '.join(of)}, found {shown(raw)}{did_you_mean(str(raw), of)}")
    return cast(str, raw)


def _read_stats(document: Document, path: Key) -> str | None:
    """A model's statistics file, as written."""
    entry = block_at(document, path)
    if "stats" not in entry:
        return None
    raw = entry["stats"]
    if not isinstance(raw, str) or not raw:
        fail(
            document, (*path, "stats"),
            f"expected a file made by `dare stats fisher` or `dare stats gram`, found {shown(raw)}",
        )  # fmt: skip
    return raw


def _read_layout(document: Document, path: Key) -> str | None:
    """In which order an adapter's factors have their experts."""
    entry = block_at(document, path)
    if "experts_layout" not in entry:
        return None
    raw = entry["experts_layout"]
    if raw not in LAYOUTS:
        fail(
            document, (*path, "experts_layout"),
            f" must be one of {', '.join(LAYOUTS)}, found {shown(raw)}{did_you_mean(str(raw), LAYOUTS)}",
        )  # fmt: skip
    return cast(str, raw)


def _read_sparsify(document: Document, words: Words, parameters: Mapping[str, Value]) -> Sparsify:
    assert words.sparsifier is not None
    block = document.data["sparsify"]
    return Sparsify(
        method=words.sparsifier,
        parameters=parameters,
        on=_read_choice(document, ("sparsify", "on"), ("delta", "weights")),  # type: ignore[arg-type]
        seed=read_seed(document, ("sparsify", "seed"), block.get("seed", 0)),
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


def _read_rounding(document: Document) -> tuple[Rounding, int | None]:
    """How results are rounded, and the seed of it where it has its own."""
    raw = document.data.get("rounding", NEAREST)
    if not isinstance(raw, dict):
        return cast(Rounding, _read_choice(document, ("rounding",), ROUNDINGS)), None
    for key in raw:
        if key not in _ROUNDING_KEYS:
            fail(document, ("rounding", key), f"is not known{suggest(key, _ROUNDING_KEYS)}")
    if "method" not in raw:
        fail(document, ("rounding",), f" has no method; add method: one of {', '.join(ROUNDINGS)}")
    method = cast(Rounding, _read_choice(document, ("rounding", "method"), ROUNDINGS))
    if "seed" not in raw:
        return method, None
    seed = read_seed(document, ("rounding", "seed"), raw["seed"])
    if method == NEAREST:
        fail(document, ("rounding", "seed"), " has no effect: nothing is drawn in rounding to nearest; remove it")
    return method, seed


def with_rounding(recipe: Recipe, rounding: str | Mapping[str, Any]) -> Recipe:
    """A recipe with another `rounding:`, as a recipe has it.

    Raises:
        RecipeError: it is none.
    """
    method, seed = _read_rounding(Document("recipe", {"rounding": rounding}, {}, ""))
    own = recipe.sparsify.seed if recipe.sparsify is not None else 0
    return replace(recipe, rounding=method, rounding_seed=0 if method == NEAREST else own if seed is None else seed)


def _read_rank(document: Document) -> int | None:
    """The rank of an adapter that is to be written."""
    raw = document.data.get("rank")
    if raw is None:
        return None
    if type(raw) is not int or raw < 1:
        fail(document, ("rank",), f" must be a whole number above 0, found {shown(raw)}")
    if document.data.get("output") != "adapter":
        fail(document, ("rank",), " applies to adapters: write output: adapter, or remove it")
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


def _check_whole(document: Document, recipe: Recipe, paths: Sequence[Key], ignored: Sequence[str]) -> None:
    method, sparsify = MERGE_METHODS[recipe.merge_method], recipe.sparsify
    on_delta = sparsify is not None and sparsify.on == "delta"
    _check_number(document, recipe, ignored)
    bases = [one.base and one.base[0] for one in recipe.slices] or [recipe.base_model]
    if any(base is None for base in bases) and (method.needs_base or on_delta):
        written = str(document.data["merge_method"])
        who = written if method.needs_base else f"sparsify with {sparsify.method}"  # type: ignore[union-attr]
        fail(
            document, (), f"no base_model; {who} works on differences from it: add base_model: with the common ancestor"
        )
    _check_stats(document, recipe, paths)
    _check_output(document, recipe)
    if sparsify is None:
        return
    if sparsify.on == "weights" and method.parts_base:
        fail(
            document,
            ("sparsify", "on"),
            f"weights works only with merge_method: linear; {recipe.merge_method} merges deltas: write on: delta",
        )
    if on_delta and recipe.merge_method == "linear" and False in scalars_of(recipe.parameters.get("normalize")):
        fail(
            document,
            ("parameters", "normalize"),
            "false makes linear a sum of whole models, which has no deltas to sparsify: write merge_method: "
            "task_arithmetic (base + sum of deltas), or remove normalize",
        )
    for parameter in SPARSIFIERS[sparsify.method].parameters.values():
        for path, entry in zip(paths, recipe.models, strict=True):
            if parameter.default is None and not {parameter.name} & ({*sparsify.parameters} | {*entry.parameters}):
                fail(
                    document,
                    path,
                    f"{entry.model} has no {parameter.name}; write it under `sparsify:` for all models or under this "
                    "model's `parameters:`",
                )
    _check_auto(
        document, sparsify, [(path, entry.parameters) for path, entry in zip(paths, recipe.models, strict=True)]
    )
    for path, entry in zip(paths, recipe.models, strict=True):
        _check_density(document, (*path, "parameters", "density"), entry.parameters)


def _check_output(document: Document, recipe: Recipe) -> None:
    """An adapter is put on one base, layer by layer."""
    if recipe.output == "model":
        return
    if recipe.base_model is None or recipe.slices:
        what = "has no base_model" if not recipe.slices else "stacks slices"
        fail(document, ("output",), f" is adapter, which is put on a base as it is, but this recipe {what}")
    if recipe.sparsify is not None and recipe.sparsify.on == "weights":
        fail(document, ("output",), " is adapter, which holds deltas, and sparsify is on: weights")


def _to_stack(recipe: Recipe, count: int) -> str:
    """What to write where several models are to be stacked."""
    if recipe.merge_method != "passthrough" or count < 2:
        return ""
    if recipe.slices:
        return "; a slice is merged by the recipe's one method: to stack layers, each source is a slice of its own"
    return (
        "; to stack their layers, make each a slice: `slices: [{sources: [{model: name, layer_range: [0, 8]}]}, ...]`"
    )


def _check_number(document: Document, recipe: Recipe, ignored: Sequence[str]) -> None:
    """As many models as the method takes, in every slice, and the parameters that it must have.

    `ignored`: notes of what was left out; one of them may tell why a parameter is missing.
    """
    method = MERGE_METHODS[recipe.merge_method]
    low, high = method.models
    counts = [(len(recipe.models), recipe.base_model)]
    if recipe.slices:
        counts = [(sum(part is not None for part in one.models), one.base and one.base[0]) for one in recipe.slices]
    for i, (count, base) in enumerate(counts):
        if recipe.slices and base and not count:  # the base's own layers
            continue
        if not low <= count <= high or (method.base_row and method.needs_base and base is None):
            many = _MODELS.get(low, f"{low} models")
            wanted = f"{many} {'besides base_model' if method.needs_base else ''}".rstrip()
            wanted = f"exactly {wanted}" if low == high else f"at least {wanted}"
            wanted += f", at most {high}" if low < high < float("inf") else ""
            either = " (or two models, of which the first is the base then)" if method.base_row and high == 1 else ""
            besides = f" besides {base}" if base else " and no base_model" if method.needs_base else ""
            fail(
                document, ("slices", i) if recipe.slices else ("models",),
                f"{recipe.merge_method} takes {wanted}{either}, found {count}{besides}{_to_stack(recipe, count)}",
            )  # fmt: skip
    for parameter in method.parameters.values():
        if parameter.default is None and parameter.name not in recipe.parameters:
            words = (parameter.name, WEIGHT.name)
            why = next((note for word in words for note in ignored if note.split()[0].endswith(f".{word}")), "")
            fail(
                document, (),
                f"{recipe.merge_method} needs {parameter.name}, {parameter.kind.help}: add `parameters: "
                f"{{{parameter.name}: ...}}`{f' ({why})' if why else ''}",
            )  # fmt: skip


def _beyond(recipe: Recipe) -> list[float]:
    """Values of `slerp`'s t that are beyond its two models."""
    if recipe.merge_method != "slerp":
        return []
    return [number for number in map(float, scalars_of(recipe.parameters.get("t"))) if not 0 <= number <= 1]


_MODELS = {1: "one model", 2: "two models"}


def _check_auto(document: Document, sparsify: Sparsify, models: Sequence[tuple[Key, Mapping[str, Value]]]) -> None:
    """`auto`, `tau` and `q` go only where they mean something."""
    scopes: list[tuple[Key, Mapping[str, Value]]] = [(("sparsify",), sparsify.parameters)]
    scopes += [((*path, "parameters"), own) for path, own in models]
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


def _check_stats(document: Document, recipe: Recipe, paths: Sequence[Key]) -> None:
    kind = MERGE_METHODS[recipe.merge_method].statistics
    for path, entry in zip(paths, recipe.models, strict=True):
        if kind is None and entry.stats is not None:
            users = " and ".join(name for name, other in MERGE_METHODS.items() if other.statistics)
            fail(
                document, (*path, "stats"),
                f"{recipe.merge_method} uses no statistics, only {users} do; remove it, or change merge_method",
            )  # fmt: skip
        if kind is not None and entry.stats is None:
            fail(
                document, path,
                f"{entry.model} has no stats, and {recipe.merge_method} needs them for every model: run `dare stats "
                f"{kind} {entry.model} --data FILE --out NAME.{kind}.safetensors` and add `stats: "
                f"NAME.{kind}.safetensors` to this model",
            )  # fmt: skip
    if kind is None:
        return
    scopes: list[tuple[Key, Mapping[str, Value]]] = [(("parameters", "weight"), recipe.parameters)]
    scopes += [
        ((*path, "parameters", "weight"), entry.parameters) for path, entry in zip(paths, recipe.models, strict=True)
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
    if beyond := _beyond(recipe):
        yield (
            f"t reaches {' and '.join(f'{one:g}' for one in sorted({min(beyond), max(beyond)}))}: beyond [0, 1] slerp "
            "goes on along the arc, past the model at its end, as in mergekit"
        )
    random = recipe.sparsify is not None and SPARSIFIERS[recipe.sparsify.method].random
    if ((seeded and recipe.rounding == NEAREST) or "seed" in given) and not random:
        yield NO_DRAW
