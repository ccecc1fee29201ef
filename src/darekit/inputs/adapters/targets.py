# SPDX-License-Identifier: Apache-2.0
"""Modules that an adapter has trained by its config, and of which its file has nothing.

PEFT saves factors for every module that its config names, so what is missing was taken out, or lost. Names alone do not
always tell: another class of the same model may have fewer layers. So a module that is named in full is certain, and
of a kind of module (q_proj) what is missing where others of its stack of layers are there is told.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from darekit.inputs.adapters.config import AdapterConfig, first_of
from darekit.inputs.adapters.names import Names


def named_modules_without(config: AdapterConfig, names: Names, changed: Container[str]) -> list[str]:
    """Modules that the config names in full and the base has, without factors in the file.

    Args:
        config: the adapter's.
        names: the base's.
        changed: stored names of tensors that the file changes.
    """
    own = {memory: stored for memory, stored in _layers(names)}
    wanted = [one for one in config.targets if any(word.isdecimal() for word in one.split("."))]
    return [one for one in wanted if one in own and own[one] not in changed and not _is_left_out(config, one)]


def kinds_without(config: AdapterConfig, names: Names, changed: Container[str]) -> str | None:
    """What to say of kinds of modules that have factors in some layers only, or in none; None: all is there."""
    if config.excludes is None:
        return None
    layers = list(_layers(names))
    stacks = {_stack(memory) for memory, stored in layers if stored in changed}
    words = config.targets or tuple({memory.rpartition(".")[2] for memory, stored in layers if stored in changed})
    found: dict[tuple[str, str], list[bool]] = {}
    without: list[str] = []
    for memory, stored in layers:
        word = next((one for one in words if memory.endswith(f".{one}")), None)
        stack = _stack(memory)
        if word is None or not stack or stack not in stacks or _is_left_out(config, memory):
            continue
        found.setdefault((word, stack), []).append(stored in changed)
        without += [] if stored in changed else [memory]
    if not without:
        return None
    counts = [
        f"{sum(there) or 'none'} of {len(there)} {word} in {stack}"
        for (word, stack), there in sorted(found.items()) if not all(there)
    ]  # fmt: skip
    return (
        f"WARNING: {config.where} names modules for which the file has no factors: it has them for "
        f"{' and '.join(counts)}, but not for {first_of(without)}, which stay as in the base. Unless they were removed "
        "on purpose, the file is incomplete; download or save it again"
    )


def _layers(names: Names) -> Iterator[tuple[str, str]]:
    """Modules of the base with a matrix that may have factors: their names in memory, and their weights'."""
    for memory, stored in names.in_memory():
        info = names.base.tensors[stored]
        if memory.endswith(".weight") and len(info.shape) >= 2 and ".experts." not in memory:
            yield memory.removesuffix(".weight"), stored


def _stack(module: str) -> str:
    """The layers that a module is in: its name before the first number; empty where there is none."""
    words = module.split(".")
    at = next((i for i, word in enumerate(words) if word.isdecimal()), 0)
    return ".".join(words[:at])


def _is_left_out(config: AdapterConfig, module: str) -> bool:
    numbers = {int(word) for word in module.split(".") if word.isdecimal()}
    if config.layers and not numbers & set(config.layers):
        return True
    others = (*(config.excludes or ()), *config.saved)
    return any(module == one or module.endswith(f".{one}") for one in others)
