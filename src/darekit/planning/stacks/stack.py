# SPDX-License-Identifier: Apache-2.0
"""Slices of layers put one upon another: which tensor of which model goes where in the output.

Every slice, and what stands before and after the layers, is aligned by itself, among the models that take part there.
Each model then is one view: its tensors under the names that they have in the output. Masks, digests and statistics go
by the names that they are stored under.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

from darekit.architectures.depth import Depths, along, depths_of
from darekit.architectures.families import facts_of
from darekit.architectures.parts import part_of
from darekit.checkpoints import Checkpoint, natural_key
from darekit.errors import PlanError
from darekit.inputs.slices import Layered, kind_of, layered, renamed
from darekit.planning.matching.alignment import AlignedTensor, Alignment, Heads, align
from darekit.planning.matching.naming import Roles
from darekit.planning.problems import Problems
from darekit.planning.stacks.ties import output_ties, untied_config
from darekit.recipe import Recipe
from darekit.recipe.data import DEFAULT, Range, Slice
from darekit.recipe.layout import WHOLE
from darekit.wording import label

Member = int | None  # index of a model in the recipe; None: the base


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose layer a layer of the output is, and which one there, of how many. `tensors`: kinds and shapes of what it is
    made of."""

    member: Member
    checkpoint: Checkpoint
    index: int
    count: int
    tensors: frozenset[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Tower:
    """A stack of layers of the output. `name`: before the number (`model.layers`). `layers`: of each, all who have a
    part in it, the base first. `slices`: the slice of each."""

    name: str
    layers: tuple[tuple[Origin, ...], ...]
    slices: tuple[int, ...]


@dataclass(frozen=True)
class Stack:
    """A recipe's slices on open checkpoints.

    Attributes:
        base: view of everything that any base gives; None where there is no base at all.
        models: views of what each model gives.
        alignment: of all of it.
        depths: within each slice, and the slice of each tensor.
        towers: the stacks of layers, and where their layers come from.
    """

    base: Checkpoint | None
    models: tuple[Checkpoint, ...]
    alignment: Alignment
    depths: Depths
    towers: tuple[Tower, ...]


@dataclass
class _Part:
    """What is aligned together. `names`: of each who takes part, name in the output -> its own; `slices`, `depths`: by
    name in the output. `untied`: heads are there that their models may call tied. `like`: names of the base's that the
    output keeps, where models call theirs otherwise and the base has no part in it."""

    names: dict[Member, dict[str, str]]
    slices: dict[str, int | None] = field(default_factory=dict)
    depths: dict[str, float] = field(default_factory=dict)
    untied: bool = False
    like: tuple[str, ...] = ()

    def add(self, member: Member, new: str, name: str, slice_: int | None, depth: float = 0.0) -> None:
        """One tensor of one member."""
        self.names[member][new] = name
        self.slices[new] = slice_
        if depth:
            self.depths[new] = depth


def stacked(
    recipe: Recipe,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    bases: Mapping[str, Checkpoint],
    vocab: str = "strict",
    problems: Problems | None = None,
) -> Stack:
    """The recipe's slices, put together.

    Args:
        recipe: one with slices.
        base: the recipe's base, None without one.
        models: its models, in order.
        bases: the bases that slices name, by name.
        vocab: what to do with vocabularies that differ, as `align` takes it.
        problems: what becomes of errors; the first is raised if not given.

    Raises:
        PlanError: layers that a model does not have, or a model whose layers are not known.
        HomologyError: models whose tensors do not correspond.
    """
    return _Stacking(recipe, base, models, bases, vocab, problems or Problems()).stack()


class _Stacking:
    """The work of `stacked`."""

    def __init__(
        self,
        recipe: Recipe,
        base: Checkpoint | None,
        models: Sequence[Checkpoint],
        bases: Mapping[str, Checkpoint],
        vocab: str,
        problems: Problems,
    ) -> None:
        self._vocab, self._problems = vocab, problems
        self._recipe, self._base, self._models, self._bases = recipe, base, tuple(models), bases
        self._layered: dict[tuple[int, str], Layered] = {}
        self._given: dict[str, Checkpoint] = {}  # name in the output of what a base gives -> that base
        self._classes: dict[tuple[int, str, int], frozenset[tuple[str, tuple[int, ...]]]] = {}
        self._notes: list[str] = []

    def stack(self) -> Stack:
        """All modules, and what none of them names."""
        parts: list[_Part] = []
        towers: list[Tower] = []
        at = 0
        for module, group in groupby(self._recipe.slices, key=lambda one: one.module):
            slices = list(group)
            if all(part in (WHOLE, None) for one in slices for part in (*one.models, one.base and one.base[1])):
                parts.append(self._whole(module, slices, at))
            else:
                found, tower = self._tower(module, slices, at)
                parts += found
                towers.append(tower)
            at += len(slices)
        rest = self._rest()
        parts += [rest] if any(rest.names.values()) else []  # modules may name every tensor
        return self._assembled(parts, tuple(towers))

    # --- who takes part

    def _members(self, one: Slice) -> dict[Member, tuple[Checkpoint, Range]]:
        found: dict[Member, tuple[Checkpoint, Range]] = {}
        if one.base is not None:
            found[None] = self._bases[one.base[0]], one.base[1]
        found |= {k: (self._models[k], part) for k, part in enumerate(one.models) if part is not None}
        return found

    def _own(self, checkpoint: Checkpoint, module: str) -> list[str]:
        """Names of the tensors of a module."""
        if module == DEFAULT:
            return list(checkpoint.tensors)
        names = [name for name, part in part_of(checkpoint.tensors, module).items() if part]
        if not names:
            raise PlanError(f"modules: {checkpoint.ref} has no part {module!r}; {_parts_told(checkpoint)}")
        return names

    def _of(self, checkpoint: Checkpoint, module: str) -> Layered:
        key = id(checkpoint), module
        if key not in self._layered:
            self._layered[key] = layered(checkpoint, self._own(checkpoint, module))
        return self._layered[key]

    def _layers_of(self, one: Slice, member: Member, checkpoint: Checkpoint, module: str, layers: Range) -> range:
        found = self._of(checkpoint, module)
        try:
            return found.range(*layers)
        except PlanError as error:
            name = self._recipe.models[member].model if member is not None else one.base[0] if one.base else ""
            raise PlanError(f"{one.where(name)}{error}") from None

    # --- the parts

    def _whole(self, module: str, slices: Sequence[Slice], at: int) -> _Part:
        """A module that is merged as it is."""
        if len(slices) > 1:
            raise PlanError(f"modules: {module} has {len(slices)} slices of all layers; expected one")
        members = self._members(slices[0])
        part = _Part({member: {} for member in members})
        for member, (checkpoint, _) in members.items():
            names = self._own(checkpoint, module)
            depths = depths_of(names)
            for name in names:
                part.add(member, name, name, at, depths.at(name))
                self._note_base(member, name, checkpoint)
        if None not in members and self._base is not None and module != DEFAULT:
            own = self._own(self._base, module)
            if any(names.keys() != set(own) for names in part.names.values()):
                part.like = tuple(own)
        return part

    def _tower(self, module: str, slices: Sequence[Slice], at: int) -> tuple[list[_Part], Tower]:
        parts: list[_Part] = []
        origins: list[tuple[Origin, ...]] = []
        numbers: list[int] = []
        for one in slices:
            for member, (checkpoint, wanted) in self._members(one).items():
                self._problems.attempt(partial(self._layers_of, one, member, checkpoint, module, wanted))
        self._problems.stop()
        for i, one in enumerate(slices, at):
            members = self._members(one)
            ranges = {k: self._layers_of(one, k, checkpoint, module, part) for k, (checkpoint, part) in members.items()}
            many = len(next(iter(ranges.values())))
            if any(len(layers) != many for layers in ranges.values()):
                told = ", ".join(f"{len(layers)} of {members[k][0].ref}" for k, layers in ranges.items())
                raise PlanError(
                    f"{one.where('')}the sources of slice {i} must have the same number of layers, found {told}"
                )
            part = _Part({member: {} for member in members})
            for step, depth in enumerate(along(many)):
                for member, layers in ranges.items():
                    checkpoint = members[member][0]
                    for new, name in self._of(checkpoint, module).layer(layers[step], len(origins)):
                        part.add(member, new, name, i, depth)
                        self._note_base(member, new, checkpoint)
                origins.append(tuple(self._origin(k, members[k][0], module, at[step]) for k, at in ranges.items()))
                numbers.append(i)
            if many:
                parts.append(part)
        if not origins:
            raise PlanError(
                f"{slices[0].where('')}the slices have no layers at all: every layer_range is empty; write the first "
                "layer and the one after the last, as [0, 16]"
            )
        self._refuse_other_names(module, slices)
        parts += self._outside(module, slices, at, len(origins))
        some = next(iter(self._members(slices[0]).values()))[0]
        return parts, Tower(self._of(some, module).stack, tuple(origins), tuple(numbers))

    def _refuse_other_names(self, module: str, slices: Sequence[Slice]) -> None:
        """Layers of a model of another class than the base's, which is the output's, have no place between its own."""
        if self._base is None or module == DEFAULT:
            return
        own = self._of(self._base, module).stack
        for one in slices:
            for checkpoint, _ in self._members(one).values():
                if (other := self._of(checkpoint, module).stack) != own:
                    raise PlanError(
                        f"{one.where('')}{checkpoint.ref} calls its layers {other}, and {self._base.ref} {own}. Merge "
                        f"it into the base's {module} first, with `models` in the place of `slices`, and stack that"
                    )

    def _origin(self, member: Member, checkpoint: Checkpoint, module: str, index: int) -> Origin:
        key = id(checkpoint), module, index
        if key not in self._classes:
            names = self._of(checkpoint, module).layers[index].items()
            self._classes[key] = frozenset((kind_of(rest), checkpoint.tensors[name].shape) for rest, name in names)
        return Origin(member, checkpoint, index, len(self._of(checkpoint, module).layers), self._classes[key])

    def _outside(self, module: str, slices: Sequence[Slice], at: int, layers: int) -> Iterator[_Part]:
        """What stands before the layers is made as the first slice is; what stands after them, as the last is."""
        first, last = self._members(slices[0]), self._members(slices[-1])
        end = at + len(slices) - 1
        together = first.keys() == last.keys() and first.get(None, _NOBODY)[0] is last.get(None, _NOBODY)[0]
        if len(last) > len(first):
            kept = dict(list(last.items())[: len(first)])
            left = ", ".join(label(last[k][0].ref) for k in last if k not in kept)
            self._tell(
                f"the first slice has fewer sources than the last: {left} is left out after the layers, as in mergekit"
            )
            last = kept
        before, after = _Part({member: {} for member in first}), _Part({member: {} for member in last})
        after = before if together else after
        for member, (checkpoint, _) in first.items():
            for name in self._of(checkpoint, module).before:
                before.add(member, name, name, at)
                self._note_base(member, name, checkpoint)
        for member, (checkpoint, _) in last.items():
            found = self._of(checkpoint, module)
            for new, name in (*((name, name) for name in found.after), *found.beyond(layers)):
                after.add(member, new, name, end)
                self._note_base(member, new, checkpoint)
        if not together:
            self._untie([checkpoint for checkpoint, _ in first.values()], last, before, after, end)
        yield before
        if not together:
            yield after

    def _untie(
        self,
        first: Sequence[Checkpoint],
        last: Mapping[Member, tuple[Checkpoint, Range]],
        before: _Part,
        after: _Part,
        end: int,
    ) -> None:
        """Output embeddings of models that do not give the input embedding."""
        for tie in output_ties(first, [checkpoint for checkpoint, _ in last.values()]):
            for names in (*before.names.values(), *after.names.values()):
                names.pop(tie.target, None)
            if tie.tied:
                self._tell(f"{tie.target} is tied to the embedding, which is that of {label(first[0].ref)}")
                continue
            after.untied = True
            for (member, (checkpoint, _)), given in zip(last.items(), tie.given, strict=True):
                if given is None:
                    continue
                after.add(member, *given, end)
                if given[0] != given[1]:
                    self._tell(
                        f"{label(checkpoint.ref)} ties {given[0]} to {given[1]}, but others do not: the output is "
                        "untied"
                    )

    def _rest(self) -> _Part:
        """What no module names is the base's; that of the first model, where there is no base."""
        modules = {one.module for one in self._recipe.slices}
        if DEFAULT in modules:
            return _Part({})
        donor = self._base or self._models[0]
        named = {name for module in modules for name in self._own(donor, module)}
        part = _Part({None: {}})
        for name in donor.tensors:
            if name not in named:
                part.add(None, name, name, None)
                self._note_base(None, name, donor)
        if part.names[None]:
            self._tell(f"{len(part.names[None])} tensors that no module names are kept from {label(donor.ref)}")
        return part

    # --- all of it

    def _assembled(self, parts: Sequence[_Part], towers: tuple[Tower, ...]) -> Stack:
        tensors: list[AlignedTensor] = []
        notes: list[str] = []
        names: dict[Member, dict[str, str]] = {}
        slices: dict[str, int | None] = {}
        depths: dict[str, float] = {}
        tied: bool | None = None
        sizes: dict[str, int] = {}
        copies: dict[Member, dict[str, str]] = {}
        for part in parts:
            alignment = self._aligned(part)
            tensors += (self._widened(tensor, [k for k in part.names if k is not None]) for tensor in alignment.tensors)
            notes += alignment.notes
            tied = False if part.untied else alignment.tied if alignment.tied is not None else tied
            sizes |= alignment.sizes
            for member, found in zip(part.names, alignment.copies, strict=False):
                copies.setdefault(member, {}).update(found)
            slices |= part.slices
            depths |= part.depths
            for member, own in part.names.items():
                names.setdefault(member, {}).update(own)
        tensors.sort(key=lambda tensor: natural_key(tensor.name))
        models = tuple(renamed(model, names.get(k, {})) for k, model in enumerate(self._models))
        stacks = depths_of(tensor.name for tensor in tensors).stacks
        members: list[Member] = [*([None] if None in names or self._base is not None else []), *range(len(models))]
        return Stack(
            self._base_view(names.get(None, {})), models,
            Alignment(
                tuple(tensors), tied, sizes, (*self._notes, *dict.fromkeys(notes)),
                tuple(copies.get(member, {}) for member in members),
            ),
            Depths(stacks, depths, slices), towers,
        )  # fmt: skip

    def _aligned(self, part: _Part) -> Alignment:
        views = {member: self._view(member, names, part) for member, names in part.names.items()}
        heads = self._heads_of(views)
        if part.like:
            return self._named_as_base(part, views, heads)
        base = views.pop(None, None)
        return align(base, list(views.values()), self._vocab, heads=heads, extras=self._recipe.base_extras)

    def _named_as_base(self, part: _Part, views: Mapping[Member, Checkpoint], heads: Heads) -> Alignment:
        """Models of another class than the base's, as a language model for that of a model with vision: the class of
        the output looks for the base's names, and what no model has stays the base's."""
        assert self._base is not None
        base = renamed(self._base, {name: name for name in part.like})
        found = align(base, list(views.values()), self._vocab, heads=heads, extras=self._recipe.base_extras)
        slices, depths = dict(part.slices), dict(part.depths)
        part.names, part.slices, part.depths = {None: {}, **{member: {} for member in views}}, {}, {}
        tensors = []
        for tensor in found.tensors:
            given = {k: info.name for k, info in zip(views, tensor.models, strict=True) if info is not None}
            for member, name in given.items():
                part.add(member, tensor.name, name, slices.get(name), depths.get(name, 0.0))
            if not given and tensor.base is not None:
                part.add(None, tensor.name, tensor.base.name, None)
                self._note_base(None, tensor.name, self._base)
            tensors.append(replace(tensor, base=None) if given else tensor)
        return replace(found, tensors=tuple(tensors))

    def _heads_of(self, views: Mapping[Member, Checkpoint]) -> Heads:
        """Whose heads a part has: only what stands after the layers has some, and is made as the last slice is."""
        if self._recipe.heads is None or not any(map(_has_head, views.values())):
            return "merged"
        names: list[Member] = [k for k, one in enumerate(self._recipe.models) if one.model == self._recipe.heads]
        member = None if self._recipe.heads == "base" and self._base is not None else names[0]
        if member not in views:
            known = [label(view.ref) for view in views.values()]
            raise PlanError(
                f"heads: {self._recipe.heads} has no part in the last slice, which gives the output's head: its models "
                f"are {', '.join(known)}. Name one of them, or add a source to that slice"
            )
        return views[member]

    def _view(self, member: Member, names: Mapping[str, str], part: _Part) -> Checkpoint:
        if member is None:
            return self._base_view(names)  # type: ignore[return-value]
        view = renamed(self._models[member], names)
        return replace(view, config=untied_config(view.config)) if part.untied else view

    def _base_view(self, names: Mapping[str, str]) -> Checkpoint | None:
        """What bases give, as one checkpoint: several of them may have a part in it."""
        givers = {id(self._given[new]): self._given[new] for new in names}
        if len(givers) == 1 and (self._base is None or next(iter(givers.values())) is self._base):
            return renamed(next(iter(givers.values())), names)
        if self._base is None and not givers:
            return None
        donor = self._base or next(iter(givers.values()))
        views = {
            key: renamed(giver, {new: name for new, name in names.items() if self._given[new] is giver})
            for key, giver in givers.items()
        }
        merged = {name: info for view in views.values() for name, info in view.tensors.items()}
        ordered = {name: merged[name] for name in sorted(merged, key=natural_key)}
        files = tuple(dict.fromkeys(file for view in (donor, *views.values()) for file in view.files))
        origin = (donor.origin or donor) if not merged else None
        return replace(donor, directory=None, tensors=ordered, files=files, origin=origin)

    def _note_base(self, member: Member, new: str, checkpoint: Checkpoint) -> None:
        if member is None:
            self._given[new] = checkpoint

    def _widened(self, tensor: AlignedTensor, members: Sequence[int]) -> AlignedTensor:
        """A tensor of a part, with a place for every model of the recipe."""
        by_member = dict(zip(members, tensor.models, strict=True))
        return replace(tensor, models=tuple(by_member.get(k) for k in range(len(self._models))))

    def _tell(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)


def _has_head(checkpoint: Checkpoint) -> bool:
    roles = Roles(facts_of(checkpoint.config))
    return any(roles.of(name, info.shape).is_head for name, info in checkpoint.tensors.items())


_NOBODY: tuple[Checkpoint | None, Range] = (None, WHOLE)


def _parts_told(checkpoint: Checkpoint) -> str:
    firsts = dict.fromkeys(name.split(".")[0] for name in checkpoint.tensors)
    return f"its tensors begin with {', '.join(firsts)}: name one of text_decoder, vision_tower, projector, or a prefix"
