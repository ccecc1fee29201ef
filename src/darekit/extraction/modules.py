# SPDX-License-Identifier: Apache-2.0
"""Which tensors become low-rank modules of an adapter, which are saved whole, and which it cannot hold.

PEFT knows a model's modules by their names in memory, and there experts that are stored one by one are one parameter.
What is a matrix times its input becomes a pair of factors; what is not (norms, biases, tables, routers, heads) can be
saved whole. Servers read modules by the names that checkpoints have, and experts one by one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from darekit.architectures.families import Facts
from darekit.dtypes import dtype_named
from darekit.extraction.layers import convolution, model_types, table
from darekit.extraction.targets import Block, Target
from darekit.planning.matching.alignment import AlignedTensor, Alignment

SAVES = ("norms", "biases", "heads", "routers", "embeddings")  # what may be saved whole
SAVED = SAVES[:4]  # what is, if nothing is said: small, and each of them matters

# Of transformers' classes whose linear layers are stored [in, out] (Conv1D): the names of these layers.
CONV1D = {
    "gpt2": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "imagegpt": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "decision_transformer": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
}

# Model types whose experts are stored [in, out] in memory, and say so to PEFT (`is_transposed`).
EXPERTS_IN_OUT = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")

# Layers that PEFT refuses: their kernels take the weight, and never call the layer.
REFUSED = {
    model_type: ("conv1d", "out_proj") for model_type in ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
}

# The parameters of a module of experts, in the order in which it has them: PEFT wraps the second around the first.
EXPERT_PARAMETERS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")

_STACKED = {("MergeModulelist",): (0,), ("MergeModulelist", "Concatenate"): (0, 1)}


@dataclass(frozen=True)
class Saved:
    """A tensor that is saved whole. `module`: whose it is, in `modules_to_save`; None: a bias of another module."""

    name: str
    tensor: AlignedTensor
    kind: str
    module: str | None


@dataclass(frozen=True)
class LeftOut:
    """A tensor that the adapter does not hold, and why."""

    tensor: AlignedTensor
    kind: str
    why: str


@dataclass
class Selection:
    """What becomes of each tensor, in their order."""

    targets: list[Target] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def select(
    alignment: Alignment,
    facts: Facts,
    config: Mapping[str, Any],
    *,
    save: Collection[str],
    factors: Collection[str],
    for_vllm: bool,
) -> Selection:
    """What becomes of each tensor that base and model have.

    Args:
        alignment: of the base and the one model.
        facts: of the class that will load the adapter.
        config: its config.
        save: kinds of `SAVES`.
        factors: kinds of `layers.FACTORS`.
        for_vllm: names as stored, experts one by one, no output embedding.
    """
    names = _names(alignment, facts, as_stored=for_vllm)
    tensors = {names[tensor.name]: tensor for tensor in alignment.tensors}
    routers = _routers(tensors)
    twice = _used_twice(alignment)
    selection = Selection()
    experts: dict[str, dict[tuple[int, int], Block]] = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        kind = _kind_of(name, tensor, facts, routers)
        if dtype_named(tensor.dtype).kind != "float" or tensor.copied or tensor.models[0] is None:
            continue
        if tensor.name in twice:
            selection.left_out.append(
                LeftOut(tensor, kind, "the base ties it to another tensor, and the model does not")
            )
        elif kind == "embeddings" and "embeddings" in factors and (target := table(name, tensor, facts, tensors)):
            selection.targets += [target] if isinstance(target, Target) else []
            selection.left_out += [] if isinstance(target, Target) else [LeftOut(tensor, kind, target)]
        elif kind == "biases" and last in EXPERT_PARAMETERS and len(tensor.shape) == 2 and _are_kept(save, for_vllm):
            selection.targets.append(
                Target(name, ((Block(tensor, 0, (tensor.shape[0], tensor.shape[1])),),), parameter=last)
            )
        elif kind in SAVES:
            _save(selection, name, tensor, kind, tensors, save, facts, routers, for_vllm=for_vllm)
        elif for_vllm and facts.is_output_embedding(tensor.name):
            selection.left_out.append(
                LeftOut(tensor, kind, "few of vLLM's models take an adapter on the output embedding")
            )
        elif (place := _place_among_experts(name, tensor, facts)) is not None and not for_vllm:
            parameter, order = place
            experts.setdefault(parameter, {})[order] = Block(tensor, 0, (tensor.shape[0], tensor.shape[1]))
        elif len(tensor.shape) == 3 and last in EXPERT_PARAMETERS and "expert" in module:
            selection.targets.append(_fused(name, tensor, facts, config))
        elif last == "weight" and len(tensor.shape) == 2:
            parts = _parts(name, tensor, facts)
            if module.rpartition(".")[2] in REFUSED.get(facts.model_type or "", ()):
                selection.left_out.append(LeftOut(tensor, kind, "PEFT refuses adapters on this layer"))
            elif parts is None:
                why = "transformers turns it into another matrix in memory"
                selection.left_out.append(LeftOut(tensor, kind, why))
            else:
                selection.targets += parts
        elif "convolutions" in factors and (layer := convolution(name, tensor, facts, config)) is not None:
            selection.targets.append(layer)
        else:
            what = f"a parameter of shape {list(tensor.shape)} is not a matrix times its input"
            if last == "weight":
                what = "a convolution; `--factors convolutions` writes its factors"
            if last == "weight" and "convolutions" in factors:
                what = "a convolution that may have groups or be transposed: its kind of layer is unknown"
            selection.left_out.append(LeftOut(tensor, kind, what))
    for parameter, blocks in experts.items():
        _stack(selection, parameter, blocks)
    _complete(selection, tensors)
    _tie(selection, tensors, facts)
    return selection


def _are_kept(save: Collection[str], for_vllm: bool) -> bool:
    """Whether biases of experts get factors: PEFT cannot replace them, but it takes a parameter for a matrix."""
    return "biases" in save and not for_vllm


def _names(alignment: Alignment, facts: Facts, *, as_stored: bool) -> dict[str, str]:
    """Written name -> the name in memory (`as_stored`: as in files), with the base model's prefix."""
    stored = [tensor.name for tensor in alignment.tensors]
    if as_stored:
        return {name: facts.in_memory(name) for name in stored}
    return {name: facts.in_memory(facts.without_prefix(memory)) for name, memory in facts.canonicals(stored).items()}


def _used_twice(alignment: Alignment) -> set[str]:
    """Tensors that the base does not store under their names, as it ties them to others."""
    names = {tensor.name for tensor in alignment.tensors}
    return {
        tensor.name for tensor in alignment.tensors
        if tensor.base is not None and tensor.base.name != tensor.name and tensor.base.name in names
    }  # fmt: skip


def _routers(tensors: Mapping[str, AlignedTensor]) -> set[str]:
    """Modules that choose among experts: they lie beside them, and have a row for each."""
    counts: dict[str, set[int]] = {}
    for name, tensor in tensors.items():
        parent, among, rest = name.partition(".experts.")
        if not among:
            continue
        number = rest.partition(".")[0]
        if number.isdecimal():
            counts.setdefault(parent, set()).add(int(number) + 1)
        elif len(tensor.shape) == 3:
            counts.setdefault(parent, set()).add(tensor.shape[0])
    many = {parent: max(numbers) for parent, numbers in counts.items()}
    return {
        name.removesuffix(".weight") for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
        and tensor.shape[0] == many.get(name.rpartition(".")[0].rpartition(".")[0])
    }  # fmt: skip


def _kind_of(name: str, tensor: AlignedTensor, facts: Facts, routers: Collection[str]) -> str:
    """A kind of `SAVES`, or `matrices`."""
    if name.rpartition(".")[0] in routers:
        return "routers"
    if tensor.head:
        return "heads"
    if tensor.group == "heads" and facts.is_output_embedding(tensor.name):
        return "matrices"
    return "matrices" if tensor.group is None else tensor.group


def _save(
    selection: Selection, name: str, tensor: AlignedTensor, kind: str, tensors: Mapping[str, AlignedTensor],
    save: Collection[str], facts: Facts, routers: Collection[str], *, for_vllm: bool,
) -> None:  # fmt: skip
    """Whole, where its kind is saved. A bias of a module that is saved whole goes with it."""
    module, _, last = name.rpartition(".")
    owner = tensors.get(f"{module}.weight")
    if kind == "biases" and owner is not None:
        of = _kind_of(f"{module}.weight", owner, facts, routers)
        if of in SAVES and of in save:
            selection.saved.append(Saved(name, tensor, of, module))
            return
    if kind not in save:
        why = "vLLM takes no modules that are saved whole" if for_vllm else f"not saved unless asked for (save {kind})"
        selection.left_out.append(LeftOut(tensor, kind, why))
    elif facts.conversion(tensor.name) is not None:
        selection.left_out.append(LeftOut(tensor, kind, "transformers turns it into another tensor in memory"))
    elif last in ("weight", "bias"):
        selection.saved.append(Saved(name, tensor, kind, None if kind == "biases" else module))
    else:
        selection.left_out.append(LeftOut(tensor, kind, "PEFT saves whole modules, and this parameter is not one"))


def _complete(selection: Selection, tensors: Mapping[str, AlignedTensor]) -> None:
    """PEFT replaces a module as a whole, and refuses files that lack one of its tensors: buffers go along."""
    names = {one.tensor.name for one in selection.saved if one.module is not None}
    kinds = {one.module: one.kind for one in selection.saved if one.module is not None}
    for name, tensor in tensors.items():
        owner = next((module for module in _above(name) if module in kinds), None)
        if owner is not None and tensor.name not in names:
            selection.saved.append(Saved(name, tensor, kinds[owner], owner))
            selection.left_out = [one for one in selection.left_out if one.tensor.name != tensor.name]


def _tie(selection: Selection, tensors: Mapping[str, AlignedTensor], facts: Facts) -> None:
    """What shares the values of a table that is saved whole (an output embedding) is replaced with it: PEFT looks for
    each of them in the file."""
    tables = {one.name for one in selection.saved if one.kind == "embeddings"}
    roots = {name: facts.tied_to(name) for name in facts.held if "#" not in name}
    tied = {name: root for name, root in roots.items() if root is not None and root in tensors}
    modules = {name.rpartition(".")[0] for name, root in tied.items() if root in tables}
    for name, root in tied.items():
        module = name.rpartition(".")[0]
        if module in modules and name not in tensors:
            selection.saved.append(Saved(name, tensors[root], "embeddings", module))


def _above(name: str) -> Iterator[str]:
    """The modules that a tensor is in, the innermost first."""
    while name := name.rpartition(".")[0]:
        yield name


def _place_among_experts(name: str, tensor: AlignedTensor, facts: Facts) -> tuple[str, tuple[int, int]] | None:
    """Of one expert's matrix: the parameter that it is a part of in memory, its expert, and its place there."""
    conversion = facts.conversion(tensor.name)
    if conversion is None or len(tensor.shape) != 2:
        return None
    operations = tuple(operation.name for operation in conversion.operations)
    axes = tuple(operation.parameters.get("dim") for operation in conversion.operations)
    if _STACKED.get(operations) != axes:
        return None
    number = re.search(re.escape(conversion.source).replace(r"\*", r"(\d+)") + "$", facts.canonical(tensor.name))
    if number is None or number.lastindex != 1:
        return None
    target = facts.in_memory(facts.without_prefix(conversion.target))
    return target, (int(number[1]), conversion.sources.index(conversion.source))


def _stack(selection: Selection, parameter: str, blocks: Mapping[tuple[int, int], Block]) -> None:
    """The experts of one parameter, in order; what is incomplete stays out."""
    experts = sorted({expert for expert, _ in blocks})
    kinds = sorted({kind for _, kind in blocks})
    whole = len(blocks) == len(experts) * len(kinds) and experts == list(range(len(experts)))
    last = parameter.rpartition(".")[2]
    if not whole or last not in EXPERT_PARAMETERS or len({block.shape[1] for block in blocks.values()}) > 1:
        why = "its experts are incomplete, or differ in shape"
        selection.left_out += [LeftOut(block.tensor, "matrices", why) for block in blocks.values()]
        return
    matrices = tuple(tuple(blocks[expert, kind] for kind in kinds) for expert in experts)
    selection.targets.append(Target(parameter, matrices, parameter=last))


def _fused(name: str, tensor: AlignedTensor, facts: Facts, config: Mapping[str, Any]) -> Target:
    """Experts that are stored as one tensor, (experts, rows, columns)."""
    experts, rows, columns = tensor.shape
    types = model_types(facts, config)
    matrices = tuple((Block(tensor, i * rows * columns, (rows, columns)),) for i in range(experts))
    return Target(name, matrices, not types.isdisjoint(EXPERTS_IN_OUT), name.rpartition(".")[2])


def _parts(name: str, tensor: AlignedTensor, facts: Facts) -> list[Target] | None:
    """A layer's matrix, or those that the loader cuts it into; None where it makes something else of it."""
    rows, columns = tensor.shape
    conversion = facts.conversion(tensor.name) if ".experts." not in name else None
    if conversion is None:
        last = name.rpartition(".")[0].rpartition(".")[2]
        transposed = last in CONV1D.get(facts.model_type or "", ())
        return [Target(name.removesuffix(".weight"), ((Block(tensor, 0, (rows, columns)),),), transposed)]
    how = [(operation.name, operation.parameters.get("dim")) for operation in conversion.operations]
    many = len(conversion.targets)
    if how != [("Chunk", 0)] or rows % many:
        return None
    size, first = rows // many, conversion.targets[0]
    names = [facts.in_memory(facts.without_prefix(conversion.target.replace(first, one, 1)))
             for one in conversion.targets]  # fmt: skip
    return [
        Target(one.removesuffix(".weight"), ((Block(tensor, i * size * columns, (size, columns)),),))
        for i, one in enumerate(names)
    ]


def suffixes(names: Sequence[str], others: Collection[str]) -> list[str]:
    """Modules -> what names these and none of the others: last words where they are enough, else whole names.

    >>> suffixes(["a.0.q", "a.1.q", "a.0.k"], ["a.1.k", "head"])
    ['a.0.k', 'q']
    """
    wanted, words = set(names), sorted({name.rpartition(".")[2] for name in names})
    others = {*others, *(module for name in (*names, *others) for module in _above(name))}
    shortest: list[str] = []
    for word in words:
        whole = [name for name in names if name.rpartition(".")[2] == word]
        clear = all(name in wanted for name in others if name == word or name.endswith(f".{word}"))
        shortest += [word] if clear and not word.isdecimal() else whole
    return sorted(shortest)
