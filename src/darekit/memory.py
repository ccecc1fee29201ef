# SPDX-License-Identifier: Apache-2.0
"""Merging arrays that are already in memory: the same plan, steps and engine, between arrays instead of files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from darekit.checkpoints import ArrayBytes, Checkpoint, TensorInfo, natural_key
from darekit.dtypes import DTYPES, NEAREST, Bytes, DType, Rounding, dtype_of, is_torch
from darekit.errors import CheckpointError, PlanError, RecipeError
from darekit.inputs.statistics import FISHER, Statistics, open_statistics
from darekit.machine import threads_of
from darekit.methods import MERGE_ALIASES, MERGE_METHODS, SPARSIFIERS, WEIGHT
from darekit.recipe import Sparsify, read_recipe
from darekit.recipe.merges import linear
from darekit.recipe.typed import Method


def merge_tensors(
    base: Mapping[str, Any] | None,
    models: Sequence[Mapping[str, Any]],
    *,
    sparsify: Sparsify | None = None,
    method: Method | str | None = None,
    weights: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    statistics: Sequence[Mapping[str, Any] | str | Path] | None = None,
    dtype: str | None = None,
    rounding: Rounding | Mapping[str, Any] = NEAREST,
    threads: int | None = None,
    tile: int | None = None,
    allow_nonfinite: bool = False,
) -> dict[str, Any]:
    """Merge dicts of numpy arrays or torch tensors (read in place where they lie on the CPU) into a new dict.

    Args:
        base: name -> array; None for methods that need no base: `linear`, `fisher`, `regmean`, and `slerp` between two
            models.
        models: one dict per model, with the base's names and shapes.
        sparsify: what is done to each delta; None: nothing.
        method: how the deltas are merged, `ties(keep=0.2)` or just a name; `linear()` if not given.
        weights: one per model; 1 each if not given.
        seeds: one effective seed per model, used as they are; derived from `sparsify.seed` if not given.
        statistics: for `fisher()` and `regmean()`, one per model: a file that `make_statistics` wrote for exactly these
            tensors; or a dict, name -> the tensor's diagonal Fisher (its shape), or the Gram X^T X of a linear
            layer's inputs, (in, in), for weights stored [out, in]. Tensors without statistics are averaged. Grams in a
            dict are used as they are, divided by their numbers of tokens or not.
        dtype: output format (`bfloat16`, ...); each tensor's own if not given.
        rounding: nearest, or stochastic: `{"method": "stochastic", "seed": 7}`, or the word alone for the seed of
            `sparsify`.
        threads: worker threads.
        tile: elements of a tensor that are worked on at once; 65,536 if not given.
        allow_nonfinite: take the base's element where an input has NaN or Inf.

    Returns:
        name -> array of the base's kind (torch tensors for torch tensors), with the bits that a merge of the same
        tensors on disk would write.

    Raises:
        RecipeError: a method or parameter that does not exist, or a value out of range.
        CheckpointError: something that is not a dict of arrays, or a number format that is not supported.
        HomologyError: the models' names or shapes are not the base's.
        PlanError: a parameter is impossible for these tensors.
        DataError: NaN or Inf in an input.

    Examples:
        >>> base = {"w": np.zeros(4, np.float32)}
        >>> math = {"w": np.float32([0, 1, 0, 3])}
        >>> code = {"w": np.float32([0, 0, 2, -1])}
        >>> dk.merge_tensors(base, [math, code], method="task_arithmetic")
        {'w': array([0., 1., 2., 2.], dtype=float32)}
        >>> dk.merge_tensors(base, [math, code], sparsify=dk.dare(0.5, seed=5), method=dk.ties())
        {'w': array([0., 2., 0., 6.], dtype=float32)}
    """
    from darekit.engine import execution
    from darekit.planning.plan import make_plan

    if allow_nonfinite and base is None:
        raise PlanError("allow_nonfinite takes the base's element where a model has NaN or Inf, so it needs a base")
    method = _method(method)
    if sparsify is not None and not isinstance(sparsify, Sparsify):
        raise RecipeError(
            f"sparsify must be what a sparsifier's function returns, such as dk.dare(0.9); found {_told(sparsify)}"
        )
    if isinstance(models, Mapping) or not isinstance(models, Sequence):
        what = "one dict" if isinstance(models, Mapping) else _told(models)
        raise CheckpointError(f"models must be a list of dicts, one per model; found {what}")
    for name, given in (("weights", weights), ("seeds", seeds), ("statistics", statistics)):
        if given is not None and (isinstance(given, str) or not hasattr(given, "__len__")):
            raise CheckpointError(f"{name} must be a list, one for each model; found {_told(given)}")
    if tile is not None and (type(tile) is not int or tile < 1):
        raise TypeError(f"tile must be a whole number above 0, found {tile!r}")
    threads = threads_of(threads)
    entries: list[dict[str, Any]] = [{"model": f"model {k}", "parameters": {}} for k in range(len(models))]
    word = _weight_word(method, weights)
    for name, values in ((word, weights), ("seed", seeds)):
        if values is not None and len(values) != len(models):
            raise CheckpointError(f"{len(values)} {'weight' if name == word else name}s for {len(models)} models")
        for entry, value in zip(entries, () if values is None else values, strict=False):
            entry["parameters"][name] = value
    if statistics is not None and len(statistics) != len(models):
        raise CheckpointError(f"{len(statistics)} statistics for {len(models)} models")
    for k, entry in enumerate(entries if statistics is not None else ()):
        entry["stats"] = f"statistics {k}"
    data: dict[str, Any] = {"models": entries, "merge_method": method.name, "parameters": dict(method.parameters)}
    data |= {"base_model": "base"} if base is not None else {}
    data |= {"dtype": dtype} if dtype is not None else {}
    data["rounding"] = rounding
    data["output"] = "model"  # a key of ours: of mergekit's methods some have no lambda there
    if sparsify is not None:
        chosen = SPARSIFIERS.get(sparsify.method)
        defaults = {name: one.default for name, one in chosen.parameters.items()} if chosen else {}
        data["sparsify"] = {
            "method": sparsify.method,
            # Defaults go without saying: beside another rescale, a q of 0 would count as a second one.
            **{name: value for name, value in sparsify.parameters.items() if value != defaults.get(name)},
            "on": sparsify.on,
            "seed": sparsify.seed,
            "keep_dense": list(sparsify.keep_dense),
        }
    recipe = read_recipe(data)
    opened = [_checkpoint(f"model {k}", tensors) for k, tensors in enumerate(models)]
    origin = _checkpoint("base", base) if base is not None else None
    empty = next((one.ref for one in (*opened, *([origin] if origin else [])) if not one.tensors), None)
    if empty is not None:
        raise CheckpointError(f"{empty} is empty: expected at least one tensor, as name -> array")
    if origin is None and recipe.base_model is not None:  # of two models the first may be the base
        origin, *opened = opened
    known: list[Statistics] = []
    try:
        for k, found in enumerate(statistics or ()):
            known.append(_statistics(recipe.merge_method, k, found))
        plan = make_plan(recipe, origin, opened, statistics=known, shard_size=1)
        template = base if base is not None else models[0]
        merged, sinks = {}, []
        for shard in plan.shards:  # shard_size=1: one tensor each
            (place,) = shard.placements
            like = next(tensors[place.name] for tensors in (template, *models) if place.name in tensors)
            array, raw = _empty(like, DTYPES[place.dtype], place.shape)
            merged[place.name] = array
            sinks.append(_ArraySink(raw, place.offset))
        execution.run(
            plan.steps,
            sinks,
            names=[c.ref for c in opened],
            threads=threads,
            tile=tile,
            allow_nonfinite=allow_nonfinite,
        )
        return {name: merged[name] for name in (*template, *merged) if name in merged}
    finally:
        for closing in known:
            closing.close()


def _method(given: Method | str | None) -> Method:
    """A merge method as callers name it: what its function returns, or the name alone.

    Raises:
        RecipeError: it is something else.
    """
    if given is None:
        return linear()
    if isinstance(given, str):
        return Method(given)
    if not isinstance(given, Method):
        raise RecipeError(
            f"method must be a name, or what a method's function returns, such as dk.ties(); found {_told(given)}"
        )
    return given


def _told(given: Any) -> str:
    """Something that was given in place of something else, in words."""
    if callable(given) and hasattr(given, "__name__"):
        return f"the function {given.__name__} itself, which must be called"
    return f"{type(given).__name__} ({given!r})" if isinstance(given, str | int | float) else type(given).__name__


@dataclass(frozen=True)
class _ArraySink:
    raw: Bytes
    origin: int

    def write(self, buffer: Bytes, offset: int) -> None:
        at = offset - self.origin
        self.raw[at : at + buffer.size] = buffer


def _weight_word(method: Method, weights: Sequence[float] | None) -> str:
    """What the method calls its models' weights. In recipes foreign parameters may be ignored; here none is.

    Raises:
        RecipeError: it takes none, or not these parameters.
    """
    entry = MERGE_METHODS.get(MERGE_ALIASES.get(method.name, method.name))
    if entry is None:  # mergekit's products, and what is no method at all: the recipe says so
        return WEIGHT.name
    known = [*entry.parameters, *([entry.weight_word] if entry.weighted else [])]
    for name in method.parameters:
        if name not in known:
            raise RecipeError(f"{method.name} takes no {name}; its parameters are {', '.join(known) or 'none'}")
    if weights is not None and not entry.weighted:
        raise RecipeError(f"{method.name} takes no weights; its parameters are {', '.join(known) or 'none'}")
    return entry.weight_word


def _checkpoint(ref: str, tensors: Mapping[str, Any]) -> Checkpoint:
    infos = {}
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{ref} must be a dict of name -> array; found {type(tensors).__name__}")
    strange = next((name for name in tensors if not isinstance(name, str)), None)
    if strange is not None:
        raise CheckpointError(f"{ref} has a tensor named {strange!r}; expected strings, such as {str(strange)!r}")
    for name in sorted(tensors, key=natural_key):
        if not name.isprintable() and any("\ud800" <= char <= "\udfff" for char in name):
            raise CheckpointError(f"{ref}: the name {name!r} is not valid Unicode")
        array = tensors[name]
        if not hasattr(array, "dtype"):
            raise CheckpointError(
                f"{ref}: {name} must be a numpy array or a torch tensor; found {type(array).__name__}: numpy.asarray "
                "makes one"
            )
        dtype = _dtype_of(array, name)
        if is_torch(array):
            import torch

            if array.device.type == "meta" or array.layout != torch.strided:
                what = "has no values (it is on torch's device meta)" if array.device.type == "meta" else "is sparse"
                raise CheckpointError(f"{ref}: {name} {what}; expected a dense tensor with values")
            flat = array.detach().cpu().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
        else:
            flat = np.ascontiguousarray(array, dtype.numpy).reshape(-1).view(np.uint8)  # whatever its byte order
        infos[name] = TensorInfo(name, dtype.name, tuple(array.shape), ArrayBytes(flat))
    return Checkpoint(ref=ref, directory=None, tensors=infos, config=None, files=(), revision=None)


def _statistics(method: str, k: int, tensors: Mapping[str, Any] | str | Path) -> Statistics:
    if not isinstance(tensors, Mapping):
        return open_statistics(tensors)
    kind = MERGE_METHODS[method].statistics
    assert kind is not None  # the recipe's reading has seen to it
    ref, infos = f"statistics {k}", _checkpoint(f"statistics {k}", tensors).tensors
    norm = (
        math.sqrt(sum(float(np.square(_float64(array)).sum()) for array in tensors.values())) if kind == FISHER else 1.0
    )
    count = sum(info.count for info in infos.values())
    mean = sum(float(_float64(array).sum()) for array in tensors.values()) / max(1, count) if kind == FISHER else 0.0
    return Statistics(kind, ref, None, infos, {}, norm, mean, frozenset(), {}, None)


def _float64(array: Any) -> Any:
    return array.detach().double().cpu().numpy() if is_torch(array) else np.asarray(array, np.float64)


def _dtype_of(array: Any, name: str) -> DType:
    found = dtype_of(array if is_torch(array) else np.asarray(array))
    if found is None:
        raise CheckpointError(f"{name}: number format {array.dtype} is not supported; use one of {', '.join(DTYPES)}")
    return found


def _empty(like: Any, dtype: DType, shape: tuple[int, ...]) -> tuple[Any, Bytes]:
    if is_torch(like):
        import torch

        tensor = torch.empty(shape, dtype=getattr(torch, dtype.torch_name))
        return tensor, tensor.reshape(-1).view(torch.uint8).numpy()
    array = np.empty(shape, dtype.numpy)
    return array, array.reshape(-1).view(np.uint8)
