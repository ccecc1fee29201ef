# SPDX-License-Identifier: Apache-2.0
"""Names in an adapter's file: which parameter of the model each tensor is about, and what it is to it.

Modules are called as in memory when the adapter was trained, so they meet the base's tensors through the one table of
names (`architectures.families`), as other models do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Literal

from darekit.architectures.families import WRAPPERS_BEFORE, Facts, facts_of, unwrapped
from darekit.architectures.parts import part_named
from darekit.checkpoints import Checkpoint
from darekit.inputs.adapters.experts import Fusing

Part = Literal["A", "B", "B.bias", "embedding_A", "embedding_B", "magnitude", "rows", "whole", "before"]

_FACTOR = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<leaf>\.weight|\.bias)?"
)
_ROWS = re.compile(r"(?P<module>.+?)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
_SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save(?:\.(?!weight$|bias$)[^.]+)?\.(?P<rest>.+)")
_MLX = re.compile(r"(?P<module>.+?)\.(?P<part>lora_a|lora_b|m)")
_PARTS: dict[tuple[str, str], Part] = {
    ("lora_A", ".weight"): "A",
    ("lora_B", ".weight"): "B",
    ("lora_B", ".bias"): "B.bias",
    ("lora_embedding_A", ""): "embedding_A",
    ("lora_embedding_B", ""): "embedding_B",
    ("lora_magnitude_vector", ""): "magnitude",
    ("lora_magnitude_vector", ".weight"): "magnitude",
    ("lora_a", ""): "A",
    ("lora_b", ""): "B",
    ("m", ""): "magnitude",
}


@dataclass(frozen=True)
class Key:
    """What a tensor of an adapter is.

    Attributes:
        module: the module, as in memory; of a `whole` parameter its name, of experts in one tensor the module of it.
        part: what it is to that module; `before` is what a `whole` one was before its copy was trained.
        inner: how many wrappers lie between the module and this one: experts have one for each parameter.
    """

    module: str
    part: Part
    inner: int = 0


def key_of(name: str, form: str) -> Key | None:
    """The name of a tensor in an adapter's file -> what it is; None: it has no place in one.

    >>> key_of("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "peft")
    Key(module='model.layers.0.self_attn.q_proj', part='A', inner=0)
    >>> key_of("base_model.model.score.modules_to_save.default.weight", "peft")
    Key(module='score.weight', part='whole', inner=0)
    >>> key_of("model.layers.3.mlp.up_proj.lora_b", "mlx")
    Key(module='model.layers.3.mlp.up_proj', part='B', inner=0)
    >>> key_of("base_model.model.model.layers.0.mlp.experts.base_layer.base_layer.lora_A.weight", "peft")
    Key(module='model.layers.0.mlp.experts', part='A', inner=2)
    """
    while name.startswith(WRAPPERS_BEFORE):
        name = name.removeprefix(next(word for word in WRAPPERS_BEFORE if name.startswith(word)))
    if found := (_MLX if form == "mlx" else _FACTOR).fullmatch(name):
        part = _PARTS.get((found["part"], found.groupdict().get("leaf") or ""))
        module = found["module"]
        return None if part is None else Key(unwrapped(f"{module}.")[:-1], part, module.split(".").count("base_layer"))
    if found := _ROWS.fullmatch(name):
        return Key(unwrapped(f"{found['module']}.")[:-1], "rows")
    if ".original_module." in name:
        return Key(unwrapped(name.replace(".original_module.", ".")), "before")
    if found := _SAVED.fullmatch(name):
        name = f"{found['module']}.{found['rest']}"
    return Key(unwrapped(name.replace(".token_adapter.", ".")), "whole")


_LAYER = re.compile(r"(?P<before>(?:.+\.)??)(?:layers|h|blocks)\.\d+\.")
_HEADS = ("lm_head.weight", "embed_out.weight")  # that are not stored where they are tied, in whichever family


class Names:
    """A base's tensors, to be found by the names of parameters in memory."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.facts: Facts = facts_of(base.config)
        self._keys: dict[str, str] = {}  # key -> stored name
        memory = self.facts.canonicals(base.tensors)
        for stored, name in memory.items():
            self._keys.setdefault(self.facts.without_prefix(name), stored)
        self.fusing = Fusing(self.facts, base.tensors, self._keys)

    def find(self, parameters: Iterable[str]) -> dict[str, str]:
        """Of these parameters those that the base has -> the names that they are stored under.

        Where a family is unknown, names may begin otherwise than the base's, if all of them do so alike.
        """
        parameters = list(dict.fromkeys(parameters))
        keys = self.keys_of(parameters)
        found = {name: self._keys[key] for name, key in keys.items() if key in self._keys}
        found |= {name: name for name in parameters if name in self.base.tensors}
        if not found and not self.facts.is_known:
            found = self._by_ending(parameters)
        return found

    def in_memory(self) -> list[tuple[str, str]]:
        """The base's tensors: their names in memory, and those that they are stored under."""
        return [(self.facts.in_memory(key), stored) for key, stored in self._keys.items()]

    def key_of(self, parameter: str) -> str:
        """How the loader knows a parameter, without the base model's prefix."""
        return self.keys_of([parameter])[parameter]

    def stored(self, parameter: str) -> str | None:
        """The name that a parameter is stored under; None: the base does not store it."""
        return self.find([parameter]).get(parameter)

    def ties(self, more: Iterable[str] = ()) -> list[tuple[str, str]]:
        """What the base's config ties: the name in memory of a tensor (stored, a head, or one of `more`), and the
        stored name of the one that it is."""
        keys = [key for key in self.keys_of(more).values() if key not in self._keys]
        return list(dict.fromkeys([*self._ties, *self._tied(keys)]))

    @cached_property
    def _ties(self) -> list[tuple[str, str]]:
        return self._tied([*self._keys, *_HEADS])

    def _tied(self, keys: Iterable[str]) -> list[tuple[str, str]]:
        shapes = {key: self.base.tensors[stored].shape for key, stored in self._keys.items()}
        return [
            (self.facts.in_memory(target), self._keys[source])
            for target, source in self.facts.possible_ties(list(keys), shapes)
            if source in self._keys and self.facts.is_held(target, stored=target in self._keys)
        ]

    def tied_source(self, parameter: str) -> str | None:
        """The stored name of the tensor that a parameter, which is not stored, is by the base's config."""
        key = self.key_of(parameter)
        if key in self._keys:
            return None
        return next((source for target, source in self.ties([parameter]) if self.key_of(target) == key), None)

    def keys_of(self, parameters: Iterable[str]) -> dict[str, str]:
        """Names of parameters -> how the loader knows them, without the base model's prefix."""
        memory = self.facts.canonicals(parameters)
        return {name: self._bare(self.facts.without_prefix(one)) for name, one in memory.items()}

    def _bare(self, name: str) -> str:
        """Without the prefix of a class with a head, where the base is stored without one, as a base model alone."""
        first, _, rest = name.partition(".")
        known = self.facts.is_known and not self.facts.prefix and first not in self.facts.parts
        bare = rest if known and rest.partition(".")[0] in self.facts.parts else name
        return f"{self.text}{bare}" if bare not in self._keys and f"{self.text}{bare}" in self._keys else bare

    @cached_property
    def text(self) -> str:
        """What a model of several parts has before the names of its language model, which is also a model by itself,
        and trained as one; nothing in other models."""
        layers = (_LAYER.match(key) for key, stored in self._keys.items() if part_named(stored) == "text")
        found = {layer["before"] for layer in layers if layer}
        return found.pop() if len(found) == 1 else ""

    def _by_ending(self, parameters: Iterable[str]) -> dict[str, str]:
        ends: dict[str, str] = {}
        for stored in self.base.tensors:
            words = stored.split(".")
            for i in range(1, len(words) - 2):
                ends.setdefault(".".join(words[i:]), stored)
        found = {}
        for name in parameters:
            words = name.split(".")
            starts = (".".join(words[i:]) for i in range(len(words) - 2))
            at = next(
                (self._keys.get(one) or ends.get(one) for one in starts if one in self._keys or one in ends), None
            )
            if at is not None:
                found[name] = at
        return found if len(set(found.values())) == len(found) else {}

    def near(self, parameter: str) -> list[str]:
        """Names of the base that one which it lacks may have been meant to be."""
        key = self.keys_of([parameter])[parameter]
        return [self._keys[one] for one in get_close_matches(key, self._keys, n=2, cutoff=0.7)]


def grouped(names: Iterable[str], form: str) -> tuple[dict[Key, str], list[str]]:
    """Names in an adapter's file -> what each is, and those that are nothing of an adapter's.

    PEFT stores embeddings that were saved as modules twice where the vocabulary has grown: what it loads is the module.
    """
    found: dict[Key, str] = {}
    strange = []
    for name in sorted(names, key=lambda name: _SAVED.fullmatch(name) is None):
        key = key_of(name, form)
        if key is None or (key in found and (_SAVED.fullmatch(name) or not _SAVED.fullmatch(found[key]))):
            strange.append(name)
        else:
            found.setdefault(key, name)
    return found, strange
