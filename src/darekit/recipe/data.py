# SPDX-License-Identifier: Apache-2.0
"""The recipe itself: inert data that knows no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from darekit.dtypes import DTYPES, NEAREST, Rounding
from darekit.recipe.mergekit import lambda_is_ours
from darekit.recipe.values import BySlice, Value, to_data

Range = tuple[int, int | None]  # layers from one on, up to another one that is not among them; None: to the last

DEFAULT = "default"  # the module of a model that is one whole


# In which order an adapter's factors B have their experts: as the fast index, or one expert after another.
LAYOUTS = ("peft", "grouped")


@dataclass(frozen=True)
class ModelEntry:
    """One model of a recipe.

    Attributes:
        model: directory, file or Hub id, as written.
        parameters: those that are set for it alone; what is missing comes from the recipe.
        stats: its statistics file, as written; None if it has none.
        experts_layout: of an adapter, in which order its factors have their experts (peft, grouped); None: as it says.
    """

    model: str
    parameters: Mapping[str, Value]
    stats: str | None = None
    experts_layout: str | None = None


@dataclass(frozen=True)
class Slice:
    """Some layers of the output, one after another, and whose layers they are made of.

    Attributes:
        models: of each of the recipe's models the layers that go in; None: it has no part in this slice.
        base: the model that the others are compared with here, as written, and its layers; None where there is none.
        module: the part of the model that these are layers of.
        written: where the recipe says so, for errors: model -> file and line; "": of the slice itself.
    """

    models: tuple[Range | None, ...]
    base: tuple[str, Range] | None = None
    module: str = DEFAULT
    written: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def where(self, model: str) -> str:
        """File and line of a model's layers, as the beginning of an error; nothing where nobody knows."""
        found = self.written.get(model) or self.written.get("")
        return f"{found}: " if found else ""


@dataclass(frozen=True)
class Sparsify:
    """How each delta (or, `on` weights, each model) is made sparse.

    Attributes:
        method: the sparsifier's name.
        parameters: `drop_rate` and the sparsifier's own; only what was given.
        on: `delta` or `weights`.
        seed: the recipe seed from which each model's mask is derived.
        keep_dense: groups or glob patterns of tensors that are not dropped.
    """

    method: str
    parameters: Mapping[str, Value]
    on: Literal["delta", "weights"] = "delta"
    seed: int = 0
    keep_dense: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenRow:
    """Where the rows of a token come from, for models that lack it.

    Attributes:
        kind: `model`, that model's own row; `token`, a row of another token; `zero`; `default`, as without an entry.
        model: the model that gives the row, as written, or `base`; None where there is none.
        token: of another token, its text, or
        token_id: its id.
        force: models that have the token get this row, too.
    """

    kind: Literal["default", "model", "token", "zero"] = "default"
    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False

    def to_data(self) -> dict[str, Any]:
        """JSON-able form, as a recipe has it."""
        source: dict[str, Any] = {}
        if self.kind == "model":
            source = {"source": self.model}
        elif self.kind == "zero":
            source = {"source": {"kind": "zero"}}
        elif self.kind == "token":
            named = {"token_id": self.token_id} if self.token is None else {"token": self.token}
            source = {"source": {"kind": "model_token", "model": self.model, **named}}
        return {**source, "force": self.force}


@dataclass(frozen=True)
class Tokens:
    """Which tokens the output has. Rows are then matched by token; without it they are matched by their number.

    Attributes:
        source: `union`, `base`, or the model, as written, whose tokens they are; `model:NAME` where that is one of
            these words.
        rows: token -> where its rows come from; those that no model has are added.
        pad_to_multiple_of: rows are added up to a multiple of this; None: as many as the inputs have, or the tokens
            need.
    """

    source: str = "union"
    rows: Mapping[str, TokenRow] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are named, as written; the base and the recipe's models may be among them."""
        named = [self.model] if self.model is not None else []
        return tuple(dict.fromkeys([*named, *(row.model for row in self.rows.values() if row.model is not None)]))

    @property
    def model(self) -> str | None:
        """The model whose tokens they are; None: the base's, or of all."""
        return None if self.source in ("base", "union") else self.source.removeprefix("model:")

    def to_data(self) -> dict[str, Any]:
        """JSON-able form, as a recipe has it."""
        data: dict[str, Any] = {"source": self.source}
        if self.rows:
            data["tokens"] = {token: row.to_data() for token, row in self.rows.items()}
        return data | ({} if self.pad_to_multiple_of is None else {"pad_to_multiple_of": self.pad_to_multiple_of})


def _told(parameters: Mapping[str, Any], form: str) -> str:
    """Parameters in a line, in a form; nothing where there are none."""
    parts = []
    for name, value in parameters.items():
        data = to_data(value)
        if isinstance(data, int | float) and not isinstance(data, bool):
            told = f"{data:.4g}"
        elif isinstance(data, list) and all(isinstance(one, int | float) for one in data):
            told = f"{', '.join(f'{one:.4g}' for one in data)} over depth"
        else:
            told = "by filter" if isinstance(data, list | dict) else str(data).lower()
        parts.append(f"{name.replace('_', ' ')} {told}")
    return form % ", ".join(parts) if parts else ""


@dataclass(frozen=True)
class Recipe:
    """What to do, in native words and canonical names; knows no file.

    Attributes:
        base_model: directory, file or Hub id, as written; None for a plain average of models.
        models: the fine-tuned models, in order.
        sparsify: what is done to each delta; None: nothing.
        merge_method: the method's name.
        parameters: the method's own; only what was given.
        dtype: output format by its safetensors name; None keeps the base's.
        keep_float32: whether tensors that are F32 in a 16-bit model stay so under a 16-bit `dtype`.
        vocab: what to do with vocabularies that differ: strict refuses, base cuts, pad keeps.
        tokenizer_source: `base`, or the model whose tokenizer the output gets; None: the models', where they agree on
            one, else the base's.
        heads: whose heads the output has: `base`, or a model as written; None: heads are merged.
        tokens: which tokens the output has, where rows are matched by token; None: by number, as `vocab` says.
        chat_template: of the output: `auto`, a name, or a template's text; None: the one that comes with the tokenizer.
        base_extras: what becomes of tensors that only the base has: keep or leave_out.
        rounding: how the merged values are rounded into the output's format: nearest or stochastic.
        rounding_seed: from which the draws of stochastic rounding are derived; the sparsifier's unless it has its own.
        output: what is written: a model, or an adapter, where all models are adapters on the base.
        rank: of that adapter's modules; None: as much as their sum has.
        stages: recipes that are models of this one, by the names that it calls them.
        slices: the output's layers from the first to the last, module by module; empty: all layers of all models.
        notes: notes and warnings for the user.
        text: the file's own text.
    """

    base_model: str | None
    models: tuple[ModelEntry, ...]
    sparsify: Sparsify | None
    merge_method: str
    parameters: Mapping[str, Value]
    dtype: str | None = None
    vocab: Literal["strict", "base", "pad"] = "strict"
    tokenizer_source: str | None = None
    heads: str | None = None
    tokens: Tokens | None = None
    chat_template: str | None = None
    keep_float32: bool = True
    base_extras: Literal["keep", "leave_out"] = "keep"
    rounding: Rounding = NEAREST
    rounding_seed: int = 0
    output: Literal["model", "adapter"] = "model"
    rank: int | None = None
    slices: tuple[Slice, ...] = ()
    stages: tuple[tuple[str, Recipe], ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)
    text: str = field(default="", compare=False, repr=False)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from darekit.recipe.texts import recipe_text
        from darekit.wording.notebooks import shown_as_html

        facts = [("base", self.base_model)] if self.base_model is not None else []
        facts += [("models", "; ".join(entry.model + _told(entry.parameters, " (%s)") for entry in self.models))]
        if self.sparsify is not None:
            facts.append(("sparsify", self.sparsify.method + _told(self.sparsify.parameters, ", %s")))
        facts.append(("merge", self.merge_method + _told(self.parameters, ", %s")))
        text = recipe_text(self.to_data())
        return shown_as_html("Recipe", facts, notes=self.notes, source=("as YAML", text))

    def to_data(self) -> dict[str, Any]:
        """The recipe as JSON-able data in native form: `read_recipe` of it gives an equal recipe."""
        data: dict[str, Any] = {"stages": {name: one.to_data() for name, one in self.stages}} if self.stages else {}
        data |= {} if self.base_model is None else {"base_model": self.base_model}
        if self.slices:
            data |= _layers_data(self)
        else:
            data["models"] = [_source_data(entry, None) for entry in self.models]
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
        if self.tokens is None:
            data["vocab"] = self.vocab
            data |= {} if self.tokenizer_source is None else {"tokenizer_source": self.tokenizer_source}
        else:
            data["tokenizer"] = self.tokens.to_data()
        data |= {} if self.heads is None else {"heads": self.heads}
        data |= {} if self.chat_template is None else {"chat_template": self.chat_template}
        data |= {} if self.keep_float32 else {"keep_float32": False}
        data |= {} if self.base_extras == "keep" else {"base_extras": self.base_extras}
        if self.rounding != NEAREST:
            own = self.rounding_seed != (self.sparsify.seed if self.sparsify is not None else 0)
            data["rounding"] = {"method": self.rounding, "seed": self.rounding_seed} if own else self.rounding
        scaled = self.sparsify is None and "lambda" in self.parameters and lambda_is_ours(self.merge_method)
        data |= {} if self.output == "model" and not scaled else {"output": self.output}
        return data | ({} if self.rank is None else {"rank": self.rank})


def _layers_data(recipe: Recipe) -> dict[str, Any]:
    """`slices:`, or, where the output has parts, `modules:`."""
    found: dict[str, list[Any]] = {}
    for i, one in enumerate(recipe.slices):
        found.setdefault(one.module, []).append(_slice_data(recipe, one, i))
    if list(found) == [DEFAULT]:
        return {"slices": found[DEFAULT]}
    return {"modules": {name: {"slices": slices} for name, slices in found.items()}}


def _slice_data(recipe: Recipe, one: Slice, index: int) -> dict[str, Any]:
    sources = [
        _source_data(entry, index) | {"layer_range": list(layers)}
        for entry, layers in zip(recipe.models, one.models, strict=True)
        if layers is not None
    ]
    data: dict[str, Any] = {}
    if one.base is not None:
        sources.insert(0, {"model": one.base[0], "layer_range": list(one.base[1])})
        data["base_model"] = one.base[0]
    shared = recipe.parameters if recipe.sparsify is None else {**recipe.sparsify.parameters, **recipe.parameters}
    values = {name: value.values[index] for name, value in shared.items() if isinstance(value, BySlice)}
    own = {name: to_data(value) for name, value in values.items() if value is not None}
    return {"sources": sources} | data | ({"parameters": own} if own else {})


def _source_data(entry: ModelEntry, index: int | None) -> dict[str, Any]:
    """One model, or its part in one slice."""
    return {
        "model": entry.model,
        **({"stats": entry.stats} if entry.stats else {}),
        **({"experts_layout": entry.experts_layout} if entry.experts_layout else {}),
        "parameters": _parameters_data(entry.parameters, index),
    }


def _parameters_data(parameters: Mapping[str, Value], index: int | None = None) -> dict[str, Any]:
    """What holds everywhere, and in the slice of that index."""
    values = {
        name: value if not isinstance(value, BySlice) else None if index is None else value.values[index]
        for name, value in parameters.items()
    }
    return {name: to_data(value) for name, value in values.items() if value is not None}
