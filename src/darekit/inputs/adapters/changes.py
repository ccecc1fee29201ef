# SPDX-License-Identifier: Apache-2.0
"""What an adapter does to which tensors of a base: its tensors sorted by module, matched, and checked by their shapes.

Everything foreseeable is an error here: a tensor that matches nothing, halves, shapes and ranks that contradict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from darekit.checkpoints import Checkpoint, TensorInfo
from darekit.errors import CheckpointError, HomologyError
from darekit.inputs.adapters.config import AdapterConfig, first_of
from darekit.inputs.adapters.names import Key, Names, grouped
from darekit.inputs.adapters.sources import Change, Term

# Linear layers that are stored [in, out]: transformers' Conv1D, in the families that have it.
_CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")
_CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")


@dataclass
class _Module:
    """The tensors of one module."""

    parts: dict[str, TensorInfo] = field(default_factory=dict)

    def __getattr__(self, name: str) -> TensorInfo | None:
        return self.parts.get(name)


@dataclass(frozen=True)
class Matched:
    """What an adapter is on a base.

    Attributes:
        changes: stored name of a base's tensor -> what happens to it.
        names: the base's, by which they were found.
    """

    changes: Mapping[str, Change]
    names: Names


def match(config: AdapterConfig, tensors: Mapping[str, TensorInfo], base: Checkpoint, ref: str) -> Matched:
    """An adapter's config and tensors, and a base -> what happens to which tensors of the base.

    Args:
        config: the adapter's.
        tensors: the adapter's, by the names in its file.
        base: whose tensors are changed.
        ref: the adapter, as the user wrote it.

    Raises:
        CheckpointError: its tensors do not belong together: halves, ranks, shapes.
        HomologyError: it is not of this base: names that the base lacks, or other shapes.
    """
    keys, strange = grouped(tensors, config.form)
    if strange:
        raise CheckpointError(
            f"{ref} has {len(strange)} tensors that are no parts of an adapter ({first_of(strange)}): expected names "
            "such as MODULE.lora_A.weight"
        )
    modules: dict[tuple[str, int], dict[str, TensorInfo]] = {}
    for key, name in keys.items():
        modules.setdefault((key.module, key.inner), {})[key.part] = tensors[name]
    names = Names(base)
    found = _Matching(config, names, ref)
    for (module, inner), parts in modules.items():
        found.add(module, inner, parts)
    return Matched(found.finish(), names)


class _Matching:
    """Modules on their way to the base's tensors."""

    def __init__(self, config: AdapterConfig, names: Names, ref: str) -> None:
        self.config, self.names, self.ref = config, names, ref
        self.terms: dict[str, list[tuple[str, Term]]] = {}  # parameter -> terms, with what they are of
        self.modules: list[tuple[str, dict[str, TensorInfo]]] = []
        self.whole: dict[str, TensorInfo] = {}

    def add(self, module: str, inner: int, parts: dict[str, TensorInfo]) -> None:
        """The tensors of one module."""
        if "whole" in parts:
            self.whole[module] = parts.pop("whole")
        if parts:
            self.modules.append((module, parts))

    def finish(self) -> dict[str, Change]:
        """What happens to which stored tensors."""
        wanted = [f"{module}.weight" for module, _ in self.modules]
        wanted += [f"{module}.bias" for module, parts in self.modules if "B.bias" in parts]
        stored = self.names.find([*wanted, *self.whole])
        missing = [name for name in (*wanted, *self.whole) if name not in stored]
        if missing:
            raise self._lacking(missing)
        changes: dict[str, Change] = {}
        for name, info in self.whole.items():
            changes[stored[name]] = self._replaced(stored[name], info)
        for module, parts in self.modules:
            name = stored[f"{module}.weight"]
            changes[name] = self._changed(module, parts, self.names.base.tensors[name], changes.get(name))
            if "B.bias" in parts:
                name = stored[f"{module}.bias"]
                changes[name] = self._biased(module, parts, self.names.base.tensors[name])
        return changes

    def _lacking(self, missing: list[str]) -> HomologyError:
        near = self.names.near(missing[0])
        hint = f" (near it: {', '.join(near)})" if near else ""
        many = f"{len(missing)} of the parameters" if missing[1:] else "a parameter"
        return HomologyError(
            f"{self.ref} changes {many} that {self.names.base.ref} does not have: {first_of(missing)}{hint}. It is of "
            f"another base{f', and names {self.config.base}' if self.config.base else ''}: give that one"
        )

    def _replaced(self, name: str, info: TensorInfo) -> Change:
        base = self.names.base.tensors[name]
        if base.shape != info.shape:
            raise self._unlike(name, info, base.shape)
        return Change(matrices_of(info.shape), whole=info)

    def _unlike(self, name: str, info: TensorInfo, wanted: tuple[int, ...]) -> HomologyError:
        base = self.names.base
        return HomologyError(
            f"{self.ref}: {info.name} has shape {list(info.shape)}, but {name} of {base.ref} is "
            f"{list(base.tensors[name].shape)}, expected {list(wanted)}: the adapter is of another base"
            + (f" ({self.config.base})" if self.config.base else "")
        )

    def _halves(self, module: str, parts: Mapping[str, TensorInfo], one: str, other: str) -> None:
        if (one in parts) != (other in parts):
            here, gone = (one, other) if one in parts else (other, one)
            raise CheckpointError(
                f"{self.ref}: {module} has lora_{here} without lora_{gone}: the file is incomplete; download or save "
                "it again"
            )

    def _changed(self, module: str, parts: Mapping[str, TensorInfo], info: TensorInfo, before: Change | None) -> Change:
        self._halves(module, parts, "A", "B")
        self._halves(module, parts, "embedding_A", "embedding_B")
        whole = before.whole if before else None
        if "A" in parts:
            term = self._linear(module, parts["A"], parts["B"], info)
        elif "embedding_A" in parts:
            term = self._embedding(module, parts["embedding_A"], parts["embedding_B"], info)
        else:
            raise CheckpointError(f"{self.ref}: {module} has {', '.join(parts)} without factors lora_A and lora_B")
        matrices = matrices_of(info.shape)
        change = Change(matrices, (term,), whole)
        if "magnitude" in parts:
            # Norms run over a layer's inputs; of an embedding over the tokens.
            columns = term.swap
            length = matrices[2] if columns else matrices[1]
            if parts["magnitude"].count != length:
                raise CheckpointError(
                    f"{self.ref}: {parts['magnitude'].name} has {parts['magnitude'].count} elements, expected {length}"
                )
            return Change(matrices, (term,), whole, magnitude=parts["magnitude"], columns=columns)
        if self.config.dora:
            raise CheckpointError(
                f"{self.ref}: {module} has no lora_magnitude_vector, though its config says use_dora: the file is "
                "incomplete"
            )
        return change

    def _linear(self, module: str, a: TensorInfo, b: TensorInfo, info: TensorInfo) -> Term:
        flipped = self.config.form == "mlx"
        rank_a, rank_b = (a.shape[-1:], b.shape[:1]) if flipped else (a.shape[:1], b.shape[1:2])
        if len(a.shape) < 2 or len(b.shape) < 2 or rank_a != rank_b or not a.count or not b.count:
            raise CheckpointError(
                f"{self.ref}: {module} has factors of shapes {list(a.shape)} and {list(b.shape)}, expected "
                f"{'[in, r] and [r, out]' if flipped else '[r, in] and [out, r]'} with one r"
            )
        (rank,) = rank_a
        if flipped:
            inside, outside = math.prod(a.shape[:-1]), b.shape[1]
        else:
            inside, outside = math.prod(a.shape[1:]), b.shape[0]
        _, rows, columns = matrices_of(info.shape)
        swap = self._is_transposed(module, info, (outside, inside))
        if (rows, columns) != ((inside, outside) if swap else (outside, inside)) or len(info.shape) < 2:
            raise HomologyError(
                f"{self.ref}: {module} has factors of shapes {list(a.shape)} and {list(b.shape)}, whose product is "
                f"{[outside, inside]}, but {info.name} of {self.names.base.ref} is {list(info.shape)}: the adapter is "
                f"of another base{f', and names {self.config.base}' if self.config.base else ''}"
            )
        return Term(a, b, self.config.scale_of(module, rank), swap=swap, flipped=flipped)

    def _is_transposed(self, module: str, info: TensorInfo, product: tuple[int, int]) -> bool:
        """Whether a layer is stored [in, out]; where it is square, the family or the config says so."""
        if len(info.shape) != 2 or info.shape == product:
            square = len(info.shape) == 2 and info.shape[0] == info.shape[1]
            if not square:
                return False
            facts = self.names.facts
            if facts.is_known:
                return facts.model_type in _CONV1D_FAMILIES and module.rpartition(".")[2] in _CONV1D
            return self.config.transposed
        return info.shape == product[::-1]

    def _embedding(self, module: str, a: TensorInfo, b: TensorInfo, info: TensorInfo) -> Term:
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.count:
            raise CheckpointError(
                f"{self.ref}: {module} has factors of shapes {list(a.shape)} and {list(b.shape)}, expected "
                "[r, vocabulary] and [hidden, r] with one r"
            )
        if info.shape != (a.shape[1], b.shape[0]):
            raise HomologyError(
                f"{self.ref}: the product of {module} is {[a.shape[1], b.shape[0]]}, but {info.name} of "
                f"{self.names.base.ref} is {list(info.shape)}: the adapter is of another base"
            )
        return Term(a, b, self.config.scale_of(module, a.shape[0]), swap=True)

    def _biased(self, module: str, parts: Mapping[str, TensorInfo], info: TensorInfo) -> Change:
        own = parts["B.bias"]
        if own.shape != info.shape:
            raise self._unlike(info.name, own, info.shape)
        rank = parts["A"].shape[0]
        return Change(matrices_of(info.shape), (Term(None, own, self.config.scale_of(module, rank)),))


def matrices_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A tensor's shape -> how many matrices it is, and their rows and columns, where it is no stack of experts."""
    return 1, shape[0] if shape else 1, math.prod(shape[1:])


__all__ = ["Key", "Matched", "match", "matrices_of"]
