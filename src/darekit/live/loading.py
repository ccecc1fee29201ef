# SPDX-License-Identifier: Apache-2.0
"""Stored tensors -> those of a live model: transformers' own renames and conversions, into the memory that is there.

Files and memory differ: experts are stored one by one and computed as one, names have changed, projections are fused or
apart. A tensor that only has another name goes straight into its parameter, tile by tile. Those that become others are
made in memory of their own, a few conversions at a time (`ROOM`), converted by transformers, and copied.
"""

from __future__ import annotations

import bisect
import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from darekit.architectures.families import facts_of
from darekit.checkpoints import Placement
from darekit.dtypes import Bytes, DType, dtype_named
from darekit.engine import execution, tiles
from darekit.engine.trimming import settle_model_trim
from darekit.errors import HomologyError
from darekit.machine import threads_of
from darekit.planning.plan import Plan

ROOM = 1 << 28  # bytes of tensors that wait for their conversion; one conversion may need more

Shape = tuple[int, ...]
Records = dict[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Group:
    """Stored tensors that become others in memory.

    Attributes:
        target: the name in memory under which transformers collects them.
        sources: (the pattern that matched, the stored name), in the order in which they are collected.
        converter: transformers' own; never run itself, but copied.
        shapes: name in memory -> the shape that comes out.
    """

    target: str
    sources: tuple[tuple[str, str], ...]
    converter: Any
    shapes: Mapping[str, Shape] = field(default_factory=dict)

    def converted(self, model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Stored name -> tensor, in the dtype that the model computes in -> name in memory -> tensor. What is given is
        taken out of the dict, so that it can go as soon as it is not needed."""
        converter = copy.deepcopy(self.converter)
        for pattern, name in self.sources:
            converter.add_tensor(self.target, name, pattern, tensors.pop(name))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class Destinations:
    """Where stored tensors belong. `direct`: stored name -> name in memory; what is in neither is nobody's."""

    direct: Mapping[str, str]
    groups: tuple[Group, ...] = ()

    @property
    def given(self) -> set[str]:
        """Names in memory that get values."""
        return {*self.direct.values(), *(name for group in self.groups for name in group.shapes)}


def destinations(model: Any, shapes: Mapping[str, Shape], *, rehearse: bool = True) -> Destinations:
    """Stored name -> shape, for all tensors of one checkpoint -> where transformers would load them.

    Args:
        model: the live model.
        shapes: of the stored tensors.
        rehearse: find out what conversions make; without that, groups have no shapes.

    Raises:
        HomologyError: a conversion cannot be made of them.
    """
    known = dict.fromkeys(model.state_dict(), True)
    prefix = getattr(model, "base_model_prefix", "")
    try:
        from transformers import conversion_mapping, core_model_loading
    except ImportError:  # transformers 4 has files and memory alike, but for the base model's prefix
        return Destinations({name: found for name in shapes if (found := _prefixed(name, prefix, known)) is not None})
    entries = conversion_mapping.get_model_conversion_mapping(model)
    renames = [entry for entry in entries if isinstance(entry, core_model_loading.WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, core_model_loading.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    def renamed(name: str, *how: Any) -> tuple[str, str | None]:
        found: tuple[str, str | None] = core_model_loading.rename_source_key(name, *how, prefix, known)
        return found

    direct: dict[str, str] = {}
    collected: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(shapes, key=core_model_loading.dot_natural_key):
        target, pattern = renamed(name, renames, converters)
        if target not in known and name in known:
            target, pattern = renamed(name, [], [])
        if target not in known:
            continue
        if pattern is None:
            direct[name] = target
        else:
            collected.setdefault(target, []).append((pattern, name))
    groups = [Group(target, tuple(found), by_pattern[found[0][0]]) for target, found in collected.items()]
    return Destinations(direct, tuple(_measured(model, group, shapes) if rehearse else group for group in groups))


def _prefixed(name: str, prefix: str, known: Mapping[str, Any]) -> str | None:
    """Checkpoints of the bare base model lack its prefix, and the reverse."""
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in known), None)


def _measured(model: Any, group: Group, shapes: Mapping[str, Shape]) -> Group:
    """The group with the shapes that come out: a rehearsal without values."""
    import torch

    rehearsed = {name: torch.empty(shapes[name], device="meta") for _, name in group.sources}
    try:
        with torch.no_grad():
            made = group.converted(model, rehearsed)
    except Exception as error:  # whatever an operation raises on shapes that it was not made for
        names = [name for _, name in group.sources]
        raise HomologyError(
            f"transformers cannot make {group.target} of {', '.join(names[:3])}{', ...' if names[3:] else ''}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. Do these tensors belong to this "
            "model's config?"
        ) from error
    return Group(group.target, group.sources, group.converter, {name: tuple(t.shape) for name, t in made.items()})


def refuse_misfits(model: Any, found: Destinations, shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> None:
    """Refuse tensors that the model has in other shapes, and a model that would have no value somewhere.

    Raises:
        HomologyError: either; the tensors are named.
    """
    state = state_of(model)
    wrong = [f"{n} {shapes[n]}" for n, target in found.direct.items() if tuple(state[target].shape) != shapes[n]]
    made = [(name, shape) for group in found.groups for name, shape in group.shapes.items()]
    wrong += [f"{name} {shape}" for name, shape in made if name not in state or tuple(state[name].shape) != shape]
    lacking = absent(model, found.given, config)
    if wrong or lacking:
        what = "other shapes" if wrong else "no value"
        raise HomologyError(
            f"the merged tensors do not fit this model: {what} for {', '.join((wrong or lacking)[:4])}"
            f"{', ...' if len(wrong or lacking) > 4 else ''}"
        )


def absent(model: Any, given: set[str], config: Mapping[str, Any]) -> list[str]:
    """Names in memory without a value: not given, not tied to what is given, and neither optional nor made anew."""
    state, facts = state_of(model), facts_of(config)
    places = {_place(state[name]) for name in given if name in state}
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    reached = {source for target, source in ties.items() if target in given} | (given & set(ties.values()))
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return [
        name
        for name, tensor in state.items()
        if name not in given
        and tensor.numel()
        and _place(tensor) not in places
        and name not in reached
        and ties.get(name) not in reached
        and not any(re.search(pattern, name) for pattern in ignored)
        and not facts.is_rebuilt(name, tuple(tensor.shape))
    ]


def state_of(model: Any) -> dict[str, Any]:
    """Name in memory -> the live tensor itself, of everything that a checkpoint may hold."""
    import torch

    return {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, torch.Tensor)}


def _place(tensor: Any) -> tuple[int, Shape]:
    return tensor.data_ptr(), tuple(tensor.shape)


def put(model: Any, plan: Plan, found: Destinations, *, threads: int | None = None) -> Records:
    """Run a plan into a model: `found` are its tensors' destinations, of the right shapes. -> the engine's records.

    Raises:
        DataError: NaN, Inf or an overflow; the weights are undefined then.
        HomologyError: two stored tensors have one memory, and differ.
    """
    import torch

    state = state_of(model)
    threads = threads_of(threads)
    steps = settle_model_trim(plan.steps, threads=threads, tile=tiles.TILE)
    dtypes = {place.name: place.dtype for shard in plan.shards for place in shard.placements}
    shapes = {place.name: place.shape for shard in plan.shards for place in shard.placements}
    converted = {name for group in found.groups for _, name in group.sources}
    goals: dict[str, Any] = {name: _flat(state[target]) for name, target in found.direct.items()}
    sinks = [_Sink(shard.placements, goals) for shard in plan.shards]
    names = [checkpoint.ref for checkpoint in plan.models]
    records: Records = {}
    wanted = {name for name in dtypes if name not in converted}  # the first run also takes what is nobody's
    for groups in _bunches(found.groups, shapes, state):
        rooms = {
            name: torch.empty(shapes[name], dtype=state[group.target].dtype, device=state[group.target].device)
            for group in groups
            for _, name in group.sources
        }
        goals |= {name: _flat(room) for name, room in rooms.items()}
        wanted |= set(rooms)
        run = [step for step in steps if step.name in wanted]
        records |= execution.execute(run, sinks, names=names, threads=threads).records
        for group in groups:
            own = {name: rooms.pop(name) for _, name in group.sources}
            for name in own:
                del goals[name]  # it would keep the memory
            _copy(state, group.converted(model, own))
        wanted = set()
    _refuse_parted(found, state, records)
    return records


def settle(model: Any, given: set[str]) -> None:
    """What `from_pretrained` does once the values are there: ties (by config, and by values where both are stored), and
    what no file holds (buffers; parameters that may be absent, here from a fixed seed).

    Args:
        model: its values are there.
        given: names in memory that got them.
    """
    import torch

    if not hasattr(model, "all_tied_weights_keys"):  # transformers 4: tied when it was made
        return
    missing = set(model.state_dict()) - given
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    for name, tensor in state_of(model).items():
        if name not in missing:
            tensor._is_hf_initialized = True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.initialize_weights()


def _bunches(groups: Sequence[Group], shapes: Mapping[str, Shape], state: Mapping[str, Any]) -> Iterator[list[Group]]:
    """Groups that are made at once; the first bunch may be empty, and is there."""
    bunch: list[Group] = []
    size = 0
    for group in groups:
        own = sum(math.prod(shapes[name]) for _, name in group.sources) * state[group.target].element_size()
        if bunch and size + own > ROOM:
            yield bunch
            bunch, size = [], 0
        bunch.append(group)
        size += own
    yield bunch


def _copy(state: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    import torch

    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def _flat(tensor: Any) -> Any:
    return tensor.detach().view(-1)


def _refuse_parted(found: Destinations, state: Mapping[str, Any], records: Records) -> None:
    """What was tied by equal values may have parted in another merge."""
    first: dict[tuple[int, Shape], str] = {}
    for name, target in found.direct.items():
        place = _place(state[target])
        other = first.setdefault(place, name)
        if state[target].numel() and records[other].get("output") != records[name].get("output"):
            raise HomologyError(
                f"{other} and {name} are tied in this model, but the merge has other values for each: reload it"
            )


class _Sink:
    """Where one shard's bytes go, converted to the format that they compute in. `goals`: stored name -> flat tensor, of
    what is wanted at the moment."""

    def __init__(self, placements: Sequence[Placement], goals: Mapping[str, Any]) -> None:
        self.goals = goals
        self.places = [
            (place.offset, place.name, dtype_named(place.dtype)) for place in sorted(placements, key=lambda p: p.offset)
        ]
        self.starts = [offset for offset, _, _ in self.places]

    def write(self, buffer: Bytes, offset: int) -> None:
        """Tiles never cross tensors."""
        import torch

        begin, name, dtype = self.places[bisect.bisect_right(self.starts, offset) - 1]
        flat = self.goals.get(name)
        if flat is None:
            return
        values = torch.frombuffer(buffer, dtype=_torch_dtype(dtype))
        at = (offset - begin) // dtype.itemsize
        with torch.no_grad():
            flat[at : at + values.numel()].copy_(values)


def _torch_dtype(dtype: DType) -> Any:
    import torch

    return getattr(torch, dtype.torch_name)
