# SPDX-License-Identifier: Apache-2.0
"""What an adapter does to which tensors of a base: its tensors sorted by module, matched, and checked by their shapes.

Everything foreseeable is an error here: a tensor that matches nothing, halves, shapes and ranks that contradict.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import permutations

from darekit.checkpoints import Checkpoint, TensorInfo
from darekit.dtypes import dtype_named
from darekit.errors import CheckpointError, HomologyError, PlanError, Unsupported
from darekit.inputs.adapters.config import AdapterConfig, Layout, first_of
from darekit.inputs.adapters.names import Key, Names, grouped, key_of
from darekit.inputs.adapters.sources import Change, Put, Term
from darekit.inputs.adapters.targets import kinds_without, named_modules_without

# Linear layers that are stored [in, out]: transformers' Conv1D, in the families that have it.
_CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")
_CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")

# Families whose experts are [E, in, out] in memory; the parameters of experts in the order in which PEFT wraps them.
_IN_OUT_FAMILIES = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
_EXPERTS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")

# Factors in the words of diffusers, kohya's scripts and LyCORIS.
_OTHERS = re.compile(
    r"(?:lora_(?:unet|te\d?|transformer)_.*)|"
    r".*[._](?:lora[._](?:down|up|mid)|lora_linear_layer[._](?:down|up)|dora_scale|hada_w\d_[ab]|lokr_w\d(?:_[ab])?)"
    r"(?:\.weight)?"
)

LARGEST = 3.4e38  # of float32, in which products are made

Parts = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Found:
    """What an adapter's tensors come to, before ties.

    Attributes:
        changes: stored name of a base's tensor -> what happens to it.
        apart: the same of parameters that the base stores under no name of their own, by their names in memory.
        saved: names, as in the two above, of tensors that were trained as a whole in a copy of their own.
        before: what saved ones were before the training, by the same names: with a grown vocabulary's rows.
        notes: what the user should know.
    """

    changes: dict[str, Change] = field(default_factory=dict)
    apart: dict[str, Change] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)
    before: dict[str, TensorInfo] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_changes(
    config: AdapterConfig, tensors: Mapping[str, TensorInfo], base: Checkpoint, ref: str, names: Names,
    layout: Layout | None,
) -> Found:  # fmt: skip
    """An adapter's config and tensors, and a base -> what happens to which tensors of the base.

    Args:
        config: the adapter's.
        tensors: the adapter's, by the names in its file.
        base: whose tensors are changed.
        ref: the adapter, as the user wrote it.
        names: the base's.
        layout: of experts, as the user says; None: as the config says.

    Raises:
        CheckpointError: its tensors do not belong together: halves, ranks, shapes.
        HomologyError: it is not of this base: names that the base lacks, or other shapes.
        PlanError: nobody says in which order a factor has its experts.
    """
    keys, strange = grouped(tensors, config.form)
    twice = next((name for name in strange if key_of(name, config.form) in keys), None)
    if twice is not None:
        raise CheckpointError(
            f"{ref} holds more than one adapter: {keys[key_of(twice, config.form)]} and {twice} are one part of one "  # type: ignore[index]
            "module. Save one by itself: model.save_pretrained(OUT, selected_adapters=[NAME])"
        )
    if strange:
        raise CheckpointError(
            f"{ref} has {len(strange)} tensors that are no parts of an adapter ({first_of(strange)}): expected names "
            "such as MODULE.lora_A.weight"
        )
    _refuse_names_of_others(keys, ref)
    modules: dict[str, dict[int, dict[str, TensorInfo]]] = {}
    wholes: dict[str, TensorInfo] = {}
    before: dict[str, TensorInfo] = {}
    for key, name in sorted(keys.items(), key=lambda item: item[1]):  # whatever the order in the file
        if dtype_named(tensors[name].dtype).kind != "float":
            raise CheckpointError(
                f"{ref}: {name} is {tensors[name].dtype}, expected floating-point numbers: is the adapter quantised?"
            )
        if key.part == "whole":
            wholes[key.module] = tensors[name]
        elif key.part == "before":
            before[key.module] = tensors[name]
        else:
            modules.setdefault(key.module, {}).setdefault(key.inner, {})[key.part] = tensors[name]
    return _Finding(config, base, ref, names, layout).run(modules, wholes, before)


def _ungathered(*factors: TensorInfo) -> str:
    """Why factors are empty, for a message."""
    if all(factor.count for factor in factors):
        return ""
    return (
        ". Empty ones are left where a run under DeepSpeed ZeRO-3 is saved without gathering its parts: save the "
        "adapter again with stage3_gather_16bit_weights_on_model_save: true"
    )


def _refuse_names_of_others(keys: Mapping[Key, str], ref: str) -> None:
    """Refuse what is no parameter of any model, but of an adapter in another tool's words.

    Raises:
        Unsupported: it is in the file.
    """
    wholes = [name for key, name in keys.items() if key.part == "whole"]
    factors = [name for name in wholes if _OTHERS.fullmatch(name)]
    if factors:
        raise Unsupported(
            f"{ref} names its factors as diffusers or kohya's scripts do ({first_of(factors)}). PEFT's names are read "
            "(MODULE.lora_A.weight), and mlx-lm's (MODULE.lora_a): save it with PEFT, or merge it with the tool that "
            "trained it, and give the result"
        )
    modules = {f"{key.module}.alpha" for key in keys if key.part == "A"}
    scales = [name for key, name in keys.items() if key.part == "whole" and key.module in modules]
    if scales:
        raise Unsupported(
            f"{ref} has an alpha for each module among its tensors ({first_of(scales)}), where PEFT has none: put "
            "these numbers into alpha_pattern of its config, and take the tensors out of the file"
        )


class _Finding:
    """Modules on their way to the base's tensors."""

    def __init__(self, config: AdapterConfig, base: Checkpoint, ref: str, names: Names, layout: Layout | None) -> None:
        self.config, self.base, self.ref, self.names, self.layout = config, base, ref, names, layout
        self.found = Found()
        self.missing: list[str] = []
        self.placed: dict[str, str] = {}  # parameter in memory -> stored name

    def run(self, modules: Mapping[str, Mapping[int, Parts]], wholes: Parts, before: Parts) -> Found:
        """What happens to which tensors."""
        wanted = [f"{module}.{end}" for module in modules for end in ("weight", "bias")]
        self.placed = self.names.find([*wanted, *wholes])
        for parameter, info in wholes.items():
            self._add_whole(parameter, info, before.get(parameter))
        for module, levels in modules.items():
            if len(levels) == 1 and f"{module}.weight" in self.placed:
                self._add_module(module, self.placed[f"{module}.weight"], next(iter(levels.values())))
            else:
                self._add_elsewhere(module, levels)
        if self.missing:
            raise self._lacking()
        self._refuse_lost(wholes, {part for levels in modules.values() for parts in levels.values() for part in parts})
        if self.config.form == "peft" and any(change.terms for change in self.found.changes.values()):
            told = kinds_without(self.config, self.names, self.found.changes)
            self.found.notes.extend([told] if told else [])
        return self.found

    def _refuse_lost(self, wholes: Parts, parts: Container[str]) -> None:
        """Refuse a file without what its config says was trained: what is missing would be the base's, silently."""
        stored = [name for name in self.base.tensors if "." in name]
        lost = [
            f"{one} of modules_to_save"
            for one in self.config.saved
            if any(_is_in(name, one) for name in stored) and not any(_is_in(name, one) for name in wholes)
        ]
        if self.config.tokens and "rows" not in parts:
            lost.append("rows of trainable_token_indices")
        if self.config.lora_bias and "A" in parts and "B.bias" not in parts:
            lost.append("biases of lora_bias")
        biased = any(name.endswith(".bias") for name in stored)
        if self.config.biases == "all" and biased and not any(name.endswith("bias") for name in wholes):
            lost.append("biases of bias: all")
        if any(change.terms for change in self.found.changes.values()):
            modules = named_modules_without(self.config, self.names, self.found.changes)
            lost += [f"{one} of target_modules" for one in modules]
        if lost:
            raise CheckpointError(
                f"{self.ref}: {self.config.where} says that it trained {first_of(lost)}, but the file has nothing of "
                "it: it is incomplete; download or save it again"
            )

    def _lacking(self) -> HomologyError:
        near = self.names.near(self.missing[0])
        hint = f" (near it: {', '.join(near)})" if near else ""
        many = f"{len(self.missing)} parameters" if self.missing[1:] else "a parameter"
        return HomologyError(
            f"{self.ref} changes {many} that {self.base.ref} does not have: {first_of(self.missing)}{hint}. "
            f"{self._other_base()}"
        )

    def _other_base(self) -> str:
        named = self.config.base
        if named is not None and named.rstrip("/") == str(self.base.ref).rstrip("/"):
            return f"It names {named} as its base, so it was trained on another class or another version of it"
        return f"It names {named} as its base: give that one" if named else "Give the base that it was trained on"

    # Tensors that are replaced

    def _add_whole(self, parameter: str, info: TensorInfo, before: TensorInfo | None) -> None:
        stored = self.placed.get(parameter)
        saved = any(_is_in(parameter, one) for one in self.config.saved)
        change = Change(matrices_of(info.shape), whole=info)
        if stored is None:
            if not saved and self.names.tied_source(parameter) is None:
                self.missing.append(parameter)
                return
            self.found.apart[parameter] = change
        else:
            base = self.base.tensors[stored]
            if base.shape != info.shape and not self._is_grown(stored, base, info):
                raise self._unlike(stored, info, base.shape)
            self.found.changes[stored] = change
        if saved:
            self.found.saved.add(stored or parameter)
        if before is not None and before.shape == info.shape:
            self.found.before[stored or parameter] = before

    def _is_grown(self, name: str, base: TensorInfo, info: TensorInfo) -> bool:
        """Whether only the number of tokens differs."""
        axis = self.names.facts.token_axis(name, base.shape)
        return axis == 0 and len(info.shape) == len(base.shape) and info.shape[1:] == base.shape[1:]

    def _unlike(self, name: str, info: TensorInfo, wanted: tuple[int, ...]) -> HomologyError:
        return HomologyError(
            f"{self.ref}: {info.name} has shape {list(info.shape)}, but {name} of {self.base.ref} is {list(wanted)}. "
            f"{self._other_base()}"
        )

    # Modules

    def _add_module(self, module: str, stored: str, parts: Parts) -> None:
        """A module whose weight the base stores."""
        before = self.found.changes.get(stored)
        info = self.base.tensors[stored] if before is None or before.whole is None else before.whole
        self.found.changes[stored] = self._changed(module, parts, info, before)
        if "B.bias" in parts:
            if not self.config.lora_bias:
                return  # as PEFT does, which made no such parameter
            self._add_bias(module, parts)

    def _add_bias(self, module: str, parts: Parts) -> None:
        stored = self.placed.get(f"{module}.bias")
        if stored is None:
            raise HomologyError(
                f"{self.ref}: {module} has a lora_B.bias, but the layer of {self.base.ref} has no bias to which it "
                f"could be added. {self._other_base()}"
            )
        own, info, before = parts["B.bias"], self.base.tensors[stored], self.found.changes.get(stored)
        if own.shape != info.shape:
            raise self._unlike(stored, own, info.shape)
        term = Term(None, own, self._scale_of(module, parts["A"].shape[0]))
        before = before or Change(matrices_of(info.shape))
        self.found.changes[stored] = replace(before, terms=(*before.terms, term))

    def _scale_of(self, module: str, rank: int) -> float:
        scale = self.config.scale_of(module, rank)
        if not abs(scale) <= LARGEST:
            raise CheckpointError(f"{self.config.where}: the scale of {module} is {scale}")
        return scale

    def _changed(self, module: str, parts: Parts, info: TensorInfo, before: Change | None) -> Change:
        for one, other in (("A", "B"), ("B", "A"), ("embedding_A", "embedding_B"), ("embedding_B", "embedding_A")):
            if one in parts and other not in parts:
                raise CheckpointError(
                    f"{self.ref}: {module} has lora_{one} without lora_{other}: the file is incomplete; download or "
                    "save it again"
                )
        change = before or Change(matrices_of(info.shape))
        if "rows" in parts:
            change = replace(change, rows=(self._rows_of(module, parts["rows"], info), parts["rows"]))
        if "A" in parts:
            term = self._linear(module, parts["A"], parts["B"], info)
        elif "embedding_A" in parts:
            term = self._embedding(module, parts["embedding_A"], parts["embedding_B"], info)
        elif "rows" in parts:
            return change
        else:
            raise CheckpointError(f"{self.ref}: {module} has {', '.join(parts)} without factors lora_A and lora_B")
        change = replace(change, terms=(term,))
        if "magnitude" in parts:
            # Norms run over a layer's inputs; of an embedding over the tokens.
            length = change.matrices[2] if term.swap else change.matrices[1]
            if parts["magnitude"].count != length:
                raise CheckpointError(
                    f"{self.ref}: {parts['magnitude'].name} has {parts['magnitude'].count} elements, expected {length}"
                )
            return replace(change, magnitude=parts["magnitude"], columns=term.swap)
        if self.config.dora:
            raise CheckpointError(
                f"{self.ref}: {module} has no lora_magnitude_vector, though its config says use_dora: the file is "
                "incomplete"
            )
        return change

    def _rows_of(self, module: str, rows: TensorInfo, info: TensorInfo) -> tuple[int, ...]:
        tables = self.config.tokens
        found = next((tables[name] for name in tables if module == name or module.endswith(f".{name}")), None)
        if found is None and len(tables) == 1:  # a list means the input embedding, whatever it is called
            found = next(iter(tables.values()))
        if found is None or rows.shape != (len(found), info.shape[-1]):
            raise CheckpointError(
                f"{self.ref}: {rows.name} is {list(rows.shape)}, but the config's trainable_token_indices has "
                f"{'no rows of it' if found is None else f'{len(found)} rows'}, of {info.shape[-1]} elements each"
            )
        if found and max(found) >= info.shape[0]:
            raise HomologyError(
                f"{self.ref} trains row {max(found)} of {module}, but {info.name} has {info.shape[0]} rows. "
                f"{self._other_base()}"
            )
        return found

    def _product(self, module: str, a: TensorInfo, b: TensorInfo) -> tuple[int, int, int]:
        """Rows, columns and rank of a product."""
        flipped = self.config.form == "mlx"
        rank_a, rank_b = (a.shape[-1:], b.shape[:1]) if flipped else (a.shape[:1], b.shape[1:2])
        if len(a.shape) < 2 or len(b.shape) < 2 or rank_a != rank_b or not a.count or not b.count:
            raise CheckpointError(
                f"{self.ref}: {module} has factors of shapes {list(a.shape)} and {list(b.shape)}, expected "
                f"{'[in, r] and [r, out]' if flipped else '[r, in] and [out, r]'} with one r{_ungathered(a, b)}"
            )
        if flipped:
            return b.shape[1], math.prod(a.shape[:-1]), rank_a[0]
        return b.shape[0], math.prod(a.shape[1:]), rank_a[0]

    def _linear(self, module: str, a: TensorInfo, b: TensorInfo, info: TensorInfo) -> Term:
        outside, inside, rank = self._product(module, a, b)
        _, rows, columns = matrices_of(info.shape)
        swap = self._is_transposed(module, info, (outside, inside))
        if (rows, columns) != ((inside, outside) if swap else (outside, inside)) or len(info.shape) < 2:
            raise self._misfit(module, a, b, [outside, inside], info)
        return Term(a, b, self._scale_of(module, rank), swap=swap, flipped=self.config.form == "mlx")

    def _misfit(self, module: str, a: TensorInfo, b: TensorInfo, product: list[int], info: TensorInfo) -> HomologyError:
        return HomologyError(
            f"{self.ref}: {module} has factors of shapes {list(a.shape)} and {list(b.shape)}, whose product is "
            f"{product}, but {info.name} of {self.base.ref} is {list(info.shape)}. {self._other_base()}"
        )

    def _is_transposed(self, module: str, info: TensorInfo, product: tuple[int, int]) -> bool:
        """Whether a layer is stored [in, out]; where it is square, the family or the config says so."""
        if len(info.shape) != 2:
            return False
        if info.shape[0] != info.shape[1]:
            return info.shape == product[::-1]
        facts = self.names.facts
        if facts.is_known:
            return facts.model_type in _CONV1D_FAMILIES and module.rpartition(".")[2] in _CONV1D
        return self.config.transposed

    def _embedding(self, module: str, a: TensorInfo, b: TensorInfo, info: TensorInfo) -> Term:
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.count:
            raise CheckpointError(
                f"{self.ref}: {module} has factors of shapes {list(a.shape)} and {list(b.shape)}, expected "
                "[r, vocabulary] and [hidden, r] with one r"
            )
        if info.shape != (a.shape[1], b.shape[0]):
            raise self._misfit(module, a, b, [a.shape[1], b.shape[0]], info)
        return Term(a, b, self._scale_of(module, a.shape[0]), swap=True)

    # Modules whose weight the base does not store under their name

    def _add_elsewhere(self, module: str, levels: Mapping[int, Parts]) -> None:
        """A tied head, experts in one tensor or one by one, or a part of a tensor that is stored whole."""
        (inner, parts), *more = levels.items()
        source = None if more or inner else self.names.tied_source(f"{module}.weight")
        if source is not None:
            before = self.found.apart.get(f"{module}.weight")
            info = self.base.tensors[source]
            whole = self.found.changes.get(source)
            if before is None and whole is not None and whole.whole is not None and source not in self.found.saved:
                before = Change(whole.matrices, whole=whole.whole)  # of a vocabulary that has grown
            if before is not None and before.whole is not None:
                info = before.whole
            self.found.apart[f"{module}.weight"] = self._changed(module, parts, info, before)
            return
        parameters = self._parameters_of(module)
        if parameters:
            self._add_parameters(module, parameters, levels)
            return
        key = self.names.key_of(f"{module}.weight")
        if not more and "A" in parts and "B" in parts:
            outside, inside, rank = self._product(module, parts["A"], parts["B"])
            whole_place = self.names.fusing.in_whole(key, (outside, inside))
            if whole_place is not None:
                term = Term(
                    parts["A"], parts["B"], self._scale_of(module, rank), flipped=self.config.form == "mlx",
                    put=Put(whole_place.matrices, whole_place.range.matrix, whole_place.range.begin),
                )  # fmt: skip
                self._refuse_magnitude(module, parts, whole_place.stored)
                self._add_term(whole_place.stored, whole_place.matrices, term)
                return
        self.missing.append(f"{module}.weight")

    def _refuse_magnitude(self, module: str, parts: Parts, whole: str | None = None) -> None:
        if "magnitude" in parts and whole is not None:
            raise Unsupported(
                f"{self.ref}: {module} has DoRA's magnitudes, and {self.base.ref} stores it as a part of {whole}: that "
                "is supported for plain LoRA only. Merge the adapter into its base with PEFT's merge_and_unload(), and "
                "give the result"
            )
        if "magnitude" in parts:
            raise CheckpointError(f"{self.ref}: {module} has DoRA's magnitudes, which PEFT does not have for experts")

    def _add_term(self, stored: str, matrices: tuple[int, int, int], term: Term) -> None:
        before = self.found.changes.get(stored) or Change(matrices)
        self.found.changes[stored] = replace(before, terms=(*before.terms, term))

    def _parameters_of(self, module: str) -> list[str]:
        """Names of a module's own parameters that may have been adapted by themselves, in the order of wrapping."""
        said = [
            last
            for one in self.config.parameters
            for last in [one.rpartition(".")[2]]
            if f"{module}.{last}" == one or f"{module}.{last}".endswith(f".{one}")
        ]
        names = sorted(said, key=lambda name: (_EXPERTS.index(name) if name in _EXPERTS else -1, name)) or _EXPERTS
        return [name for name in names if name in said or self._place_of(f"{module}.{name}") is not None]

    def _place_of(self, parameter: str) -> object:
        """Where a parameter is stored, as it is or in parts."""
        stored = self.names.find([parameter]).get(parameter)
        return stored or self.names.fusing.in_parts(self.names.key_of(parameter))

    def _add_parameters(self, module: str, names: list[str], levels: Mapping[int, Parts]) -> None:
        """Parameters that are adapted by themselves. The innermost wrapper is that of the first of them."""
        ordered = [levels[inner] for inner in sorted(levels, reverse=True)]
        for parts in ordered:
            if "A" not in parts or "B" not in parts:
                self._changed(module, parts, parts[next(iter(parts))], None)  # says what is missing
            self._refuse_magnitude(module, parts)
        lacking = [f"{module}.{name}" for name in names if self._place_of(f"{module}.{name}") is None]
        if lacking or len(names) < len(ordered):
            self.missing += lacking or [f"{module}.weight"]
            return
        fitting = [
            order
            for order in permutations(names, len(ordered))
            if all(self._fits(f"{module}.{name}", parts) for name, parts in zip(order, ordered, strict=True))
        ]
        # Equal shapes leave more than one way: then it is the order of the wrappers.
        order = next((one for one in fitting if list(one) == names), fitting[0] if len(fitting) == 1 else None)
        if order is None:
            order = tuple(names[: len(ordered)])
            if not fitting and len(names) > 1 and len(ordered) == len(names):
                order = tuple(names)
            elif len(fitting) > 1:
                order = fitting[0]
        for name, parts in zip(order, ordered, strict=True):
            self._add_parameter(f"{module}.{name}", parts["A"], parts["B"])

    def _fits(self, parameter: str, parts: Parts) -> bool:
        many, rows, columns = self._matrices(parameter)
        a, b = parts["A"], parts["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] % many or a.shape[0] != b.shape[1]:
            return False
        return (b.shape[0], a.shape[1]) in ((rows, columns), (columns, rows))

    def _matrices(self, parameter: str) -> tuple[int, int, int]:
        stored = self.names.find([parameter]).get(parameter)
        if stored is not None:
            return experts_of(self.base.tensors[stored].shape)
        found = self.names.fusing.in_parts(self.names.key_of(parameter))
        assert found is not None
        return found.matrices

    def _add_parameter(self, parameter: str, a: TensorInfo, b: TensorInfo) -> None:
        """One parameter of all experts."""
        many, rows, columns = self._matrices(parameter)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.count:
            raise CheckpointError(
                f"{self.ref}: {parameter} has factors of shapes {list(a.shape)} and {list(b.shape)}, expected "
                "[E r, in] and [out, r E]"
            )
        if a.shape[0] % many:
            raise CheckpointError(
                f"{self.ref}: the factors of {parameter} have {a.shape[0]} ranks for all experts together, which "
                f"is no multiple of {many}, the experts of {self.base.ref}: the adapter belongs to another base, or is "
                "damaged"
            )
        product = b.shape[0], a.shape[1]
        if product not in ((rows, columns), (columns, rows)):
            raise HomologyError(
                f"{self.ref}: {parameter} has factors of shapes {list(a.shape)} and {list(b.shape)}, whose products "
                f"are {list(product)}, but those of {self.base.ref} are {[rows, columns]}. {self._other_base()}"
            )
        stored = self.names.find([parameter]).get(parameter)
        flat = stored is not None and len(self.base.tensors[stored].shape) == 2  # biases of experts: one matrix
        square = rows == columns and not flat
        swap = self._is_swapped(parameter) if square else product != (rows, columns)
        rank = a.shape[0] // many
        term = Term(
            a, b, self._scale_of(parameter, rank), swap=swap, experts=many,
            slow=many > 1 and rank > 1 and self._layout(parameter) == "grouped",
        )  # fmt: skip
        if stored is not None:
            self._add_term(stored, (many, rows, columns), term)
            return
        found = self.names.fusing.in_parts(self.names.key_of(parameter))
        assert found is not None
        for name, place in found.parts.items():
            part = replace(term, take=(place.matrix, place.begin, place.end))
            self._add_term(name, (1, place.end - place.begin, columns), part)

    def _is_swapped(self, parameter: str) -> bool:
        """Of square experts, whether the product is stored transposed: the family, or the version of PEFT says so."""
        if self.names.facts.model_type in _IN_OUT_FAMILIES:
            return True
        if self.config.version is None:
            raise PlanError(
                f"{self.ref}: the matrices of {parameter} are square, and without peft_version in its config it "
                "is unknown which way its factors lie (PEFT 0.19 changed it): add the version that wrote it, as "
                '"peft_version": "0.19.0"'
            )
        return self.config.version < (0, 19)

    def _layout(self, parameter: str) -> Layout:
        found = self.layout or self.config.layout
        if found is None and self.config.unsloth:
            raise PlanError(
                f"{self.ref} looks as if Unsloth wrote it, and does not say in which order {parameter} has its "
                "experts: before its version of 17 September 2026, Unsloth wrote lora_B with the expert as the slow "
                "index (grouped), since then as PEFT does, and then it says so (lora_B_layout). The wrong order gives "
                "a model that is silently wrong. Say which: in a recipe, beside the model, experts_layout: grouped or "
                'experts_layout: peft; elsewhere in adapter_config.json, "lora_B_layout": "grouped_by_expert" or '
                '"rank_major"'
            )
        return found or "peft"


def matrices_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A tensor's shape -> how many matrices it is, and their rows and columns, where it is no stack of experts."""
    return 1, shape[0] if shape else 1, math.prod(shape[1:])


def experts_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The same of one that may be a stack of experts."""
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else matrices_of(shape)


def _is_in(parameter: str, module: str) -> bool:
    """Whether a parameter is in a module whose name ends so, as PEFT looks for modules: `classifier` is also the end of
    `pre_classifier`."""
    return f"{module}." in f"{parameter.rpartition('.')[0]}."


def kinds_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by the kind of module: what is left of them without numbers and containers."""
    found: dict[str, list[str]] = {}
    for name in names:
        words = [word for word in name.removesuffix(".weight").split(".") if not word.isdecimal()]
        found.setdefault(words[-1], []).append(name)
    return found
