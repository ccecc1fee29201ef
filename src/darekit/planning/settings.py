# SPDX-License-Identifier: Apache-2.0
"""What holds for each tensor, and for each model in it: asked of the recipe once, kept by the plan.

Whatever a recipe says by model, by filter or by depth ends here as plain numbers. Everybody after this (steps,
summaries, notes, checks, the lock) reads these and no longer the recipe's parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from darekit.architectures.depth import Depths
from darekit.architectures.groups import is_kept_dense
from darekit.checkpoints import TensorInfo
from darekit.dtypes import dtype_named
from darekit.errors import RecipeError
from darekit.methods import MERGE_METHODS, SPARSIFIERS, WEIGHT
from darekit.methods.sparsifiers import noise_gain
from darekit.planning.buffers import Role, reach
from darekit.planning.matching.alignment import AlignedTensor
from darekit.recipe import Place, Recipe, Value, resolve
from darekit.recipe.values import is_scalar, reachable

# Not the merge function's own: they belong to the way it is run.
_RUN_WITH = ("lambda", "keep", "trim")


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What holds for one tensor of one model.

    `sparsify`: the sparsifier's parameters, empty where nothing is dropped whatever they say (`keep_dense`, a head
    taken whole, no sparsifier). `rate`: the fraction dropped. `noise`: of one element, as a multiple of it, where the
    drop is random and rescaled, else 0. `keep`: what the merge's trim keeps. `density`: the survivors' fraction as a
    recipe of mergekit's wrote it, where breadcrumbs counts them by it.
    """

    weight: float = 1.0
    rate: float = 0.0
    noise: float = 0.0
    keep: float = 1.0
    density: float | None = None
    sparsify: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for one tensor. `scale`: lambda; of running statistics how far they go from the base's to the models'.
    `merge`: the merge function's parameters.

    `models`: one per model of the recipe; None where it has no say: it lacks the tensor, or the tensor is copied.
    """

    scale: float
    merge: Mapping[str, Any]
    models: tuple[ModelSettings | None, ...]


def is_float(dtype: str) -> bool:
    """Whether tensors of this dtype are merged; others are copied."""
    return dtype_named(dtype).kind == "float"


def merges_weights(recipe: Recipe, parameters: Mapping[str, Any]) -> bool:
    """Whether the models themselves are merged: asked for, or an unnormalised sum of w_k theta_k, which is not the
    base plus anything."""
    if recipe.sparsify is not None and recipe.sparsify.on == "weights":
        return True
    switch = MERGE_METHODS[recipe.merge_method].mean_if
    return switch is not None and not parameters.get(switch)


def place_of(tensor: AlignedTensor, depths: Depths) -> Place:
    """Where a tensor's parameters are asked."""
    return Place(tensor.name, tensor.shape, depths.at(tensor.name), depths.slice_of(tensor.name))


def place_in(place: Place, info: TensorInfo, depths: Depths) -> Place:
    """Where those of one model are asked: in a stack by the name that the tensor has there."""
    return replace(place, name=info.stored_name) if depths.slices and info.stored is not None else place


def settings_of(
    recipe: Recipe, tensors: Iterable[AlignedTensor], depths: Depths, roles: Mapping[str, Role] | None = None
) -> dict[str, Settings]:
    """The recipe asked at every tensor: name -> what holds there. `roles`: what is no weight.

    Raises:
        RecipeError: a parameter without a default has no value for a tensor.
    """
    resolver, roles = _Resolver(recipe), roles or {}
    return {
        tensor.name: (resolver.average if roles.get(tensor.name) == "statistic" else resolver.at)(
            tensor, place_of(tensor, depths), depths
        )
        for tensor in tensors
    }


class _Resolver:
    """A recipe's parameters, each with the scopes that can decide it. Equal settings are one object."""

    def __init__(self, recipe: Recipe) -> None:
        method = MERGE_METHODS[recipe.merge_method]
        shared = recipe.parameters
        self._recipe = recipe
        self._scale = _Asked({"lambda": (shared.get("lambda"), 1.0)})
        self._merge = _Asked(
            {
                name: (shared.get(name), parameter.default)
                for name, parameter in method.parameters.items()
                if name not in _RUN_WITH
            }
        )
        self._models = [_ModelResolver(recipe, k) for k in range(len(recipe.models))]
        self._known: dict[Any, Settings] = {}

    def at(self, tensor: AlignedTensor, place: Place, depths: Depths) -> Settings:
        """What holds for one tensor."""
        merged = is_float(tensor.dtype) and not tensor.copied
        sparsify = self._recipe.sparsify
        kept = sparsify.keep_dense if sparsify is not None else ()
        dense = sparsify is None or tensor.head or bool(kept and is_kept_dense(place.name, tensor.group, kept))
        models = tuple(
            [
                resolver.at(place_in(place, info, depths), dense=dense) if merged and info is not None else None
                for resolver, info in zip(self._models, tensor.models, strict=True)
            ]
        )
        scale, merge = self._scale.at(place), self._merge.at(place)
        key = (*scale.values(), *merge.values(), *map(id, models))  # `_known` keeps those objects alive
        if key not in self._known:
            self._known[key] = Settings(float(scale["lambda"]), merge, models)
        return self._known[key]

    def average(self, tensor: AlignedTensor, place: Place, depths: Depths) -> Settings:
        """What holds for running statistics: they are averaged, whatever is dropped, trimmed or elected elsewhere. A
        model that is dropped altogether has no say, nor has one with a weight below 0."""
        found = self.at(tensor, place, depths)
        models = tuple(None if one is None else _averaged(one) for one in found.models)
        weights = [one.weight for one in models if one is not None]
        far = 1.0
        if tensor.base is not None:
            far = reach(MERGE_METHODS[self._recipe.merge_method], found.merge, found.scale, weights)
        return Settings(far, {}, models)


def _averaged(settings: ModelSettings) -> ModelSettings:
    gone = settings.rate >= 1
    return ModelSettings(weight=0.0 if gone else max(0.0, settings.weight), rate=1.0 if gone else 0.0)


class _ModelResolver:
    """The same for one model."""

    def __init__(self, recipe: Recipe, model: int) -> None:
        entry, sparsify = recipe.models[model], recipe.sparsify
        own, shared = entry.parameters, recipe.parameters
        word = MERGE_METHODS[recipe.merge_method].weight_word
        self._always = _Asked(
            {
                "weight": (own.get(word), shared.get(word), WEIGHT.default),
                "keep": (own.get("keep"), shared.get("keep"), 1.0),
            }
        )
        self._sparsify = None
        if sparsify is not None:
            self._sparsify = _Asked(
                {
                    name: (own.get(name), sparsify.parameters.get(name), parameter.default)
                    for name, parameter in SPARSIFIERS[sparsify.method].parameters.items()
                },
                whose=f" of model {entry.model}",
                block="sparsify",
            )
        self._density: Value | None = own.get("density")
        self._unbiased = sparsify is not None and sparsify.on == "delta" and SPARSIFIERS[sparsify.method].unbiased
        self._known: dict[Any, ModelSettings] = {}

        self._constant: dict[bool, ModelSettings] = {}  # by `dense`, where nothing depends on the place
        self._varies = self._always.varies or (self._sparsify is not None and self._sparsify.varies)
        self._varies = self._varies or not (self._density is None or is_scalar(self._density))

    def at(self, place: Place, *, dense: bool) -> ModelSettings:
        """What holds for one tensor of this model."""
        if not self._varies:
            if dense not in self._constant:
                self._constant[dense] = self._at(place, dense=dense)
            return self._constant[dense]
        return self._at(place, dense=dense)

    def _at(self, place: Place, *, dense: bool) -> ModelSettings:
        always = self._always.at(place)
        sparsify = {} if dense or self._sparsify is None else self._sparsify.at(place)
        density = None if dense else resolve((self._density,), place)
        key = (dense, density, *always.values(), *sparsify.values())
        if key not in self._known:
            self._known[key] = self._made(always, density, sparsify)
        return self._known[key]

    def _made(self, always: Mapping[str, Any], density: float | None, sparsify: Mapping[str, Any]) -> ModelSettings:
        rate, q = float(sparsify.get("drop_rate", 0.0)), float(sparsify.get("q", 0.0))
        rescaled = self._unbiased and (sparsify.get("rescale") != "none" or q > 0)
        noise = noise_gain(rate, q) if sparsify and rescaled else 0.0
        return ModelSettings(float(always["weight"]), rate, noise, float(always["keep"]), density, sparsify)


class _Asked:
    """Several parameters, asked together. `whose` and `block` are for the error: the model, and where to set a value
    for all."""

    def __init__(
        self, scopes: Mapping[str, Sequence[Value | None]], *, whose: str = "", block: str = "parameters"
    ) -> None:
        self._whose, self._block = whose, block
        self._scopes = {name: reachable(values) for name, values in scopes.items()}
        self._fixed = {name: values[0] for name, values in self._scopes.items() if values and is_scalar(values[0])}
        self._varying = [name for name in self._scopes if name not in self._fixed]

    @property
    def varies(self) -> bool:
        """Whether any of them depends on the place."""
        return bool(self._varying)

    def at(self, place: Place) -> Mapping[str, Any]:
        """Name -> value at a place, in the order given."""
        if not self._varying:
            return self._fixed
        values: dict[str, Any] = {name: self._fixed.get(name) for name in self._scopes}
        for name in self._varying:
            values[name] = resolve(self._scopes[name], place)
            if values[name] is None:
                raise RecipeError(
                    f"no {name} for tensor {place.name}{self._whose}: none of its filters matches; end the list with a "
                    f"value without a filter, or set {self._block}.{name}"
                )
        return values
