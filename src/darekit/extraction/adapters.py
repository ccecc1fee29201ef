# SPDX-License-Identifier: Apache-2.0
"""The files of a PEFT adapter: adapter_config.json and adapter_model.safetensors.

Every module's scale is 1: B and A share the roots of the singular values, and a module's alpha is its rank. What a
reader needs and older versions of PEFT do not know is written only where it says something.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from darekit.checkpoints import OutputFile, OutputTensor, lay_out, natural_key
from darekit.errors import DataError
from darekit.extraction.deltas import Reader
from darekit.extraction.layers import TIED_BY_PEFT
from darekit.extraction.modules import EXPERT_PARAMETERS, Saved, suffixes
from darekit.extraction.running import Module, Place, Spool

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
LAYOUT_OF = "0.19.0"  # the first PEFT with this layout of experts' factors

# The last words of a class -> what PEFT wraps it with.
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# PEFT takes layers of these names for experts that are stored one by one, wherever they are in a model with experts
# (0.21, `transformers_weight_conversion`). By their weight's name it leaves them what they are.
LIKE_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")

OWN_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # for which PEFT expects the head in the file
PAIRS = ("bart", "mbart", "t5", "mt5", "umt5", "longt5", "pegasus", "marian", "m2m_100", "blenderbot", "led")


def task_of(config: Mapping[str, Any]) -> str | None:
    """A model's config -> PEFT's word for its task; None where it has none.

    >>> task_of({"architectures": ["LlamaForCausalLM"]}), task_of({"architectures": ["BertForMaskedLM"]})
    ('CAUSAL_LM', None)
    """
    name = next(iter(config.get("architectures") or ()), "")
    if isinstance(name, str) and name.endswith("ForConditionalGeneration") and config.get("model_type") in PAIRS:
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in TASKS.items() if isinstance(name, str) and name.endswith(end)), None)


def config_of(
    modules: Sequence[Module],
    saved: Sequence[Saved],
    *,
    names: Collection[str],
    base: str,
    revision: str | None,
    config: Mapping[str, Any],
    tied: bool,
) -> dict[str, Any]:
    """What adapter_config.json says.

    Args:
        modules: those with a rank above 0.
        saved: the tensors that are saved whole.
        names: of all modules of the model that have weights: what must not be hit by a short name.
        base: the base, as written.
        revision: its commit on the Hub.
        config: of the model.
        tied: whether its output embedding is its input embedding.
    """
    experts = any(one.target.parameter is not None for one in modules)
    known = {one.target.name: _parameter_of(one, experts=experts) for one in modules}
    parameters = [name for name in known.values() if name is not None]
    layers = [name for name, parameter in known.items() if parameter is None]
    # PEFT ties what it finds by one of these two names, and takes the head from the targets again.
    layers += [head for one in modules for head in one.target.heads if not one.target.name.endswith(TIED_BY_PEFT)]
    rank = max((one.rank for one in modules), default=1)
    called = {name: parameter or name for name, parameter in known.items()}
    less = {
        _pattern(called[one.target.name], called.values()): one.rank
        for one in sorted(modules, key=lambda one: natural_key(one.target.name)) if one.rank != rank
    }  # fmt: skip
    task = task_of(config)
    if task in OWN_HEADS and not any(one.kind == "heads" for one in saved):
        task = None
    wholes = {one.module for one in saved if one.module is not None}
    kept = sorted({_head_of(name) for name in wholes} if task in OWN_HEADS else wholes, key=natural_key)
    embeddings = any(one.kind == "embeddings" for one in saved)
    found: dict[str, Any] = {
        "alpha_pattern": less,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "all" if any(one.module is None for one in saved) else "none",
        "fan_in_fan_out": any(
            one.target.transposed and one.target.parameter is None and not one.target.table for one in modules
        ),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": kept or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": dict(less),
        "revision": revision,
        "target_modules": suffixes(layers, names),
        "task_type": task,
        "use_dora": False,
        "use_rslora": False,
    }
    if (embeddings and tied) or any(one.target.heads for one in modules):
        found["ensure_weight_tying"] = True
    if parameters:
        found["target_parameters"] = sorted(parameters, key=natural_key)
        found["peft_version"] = LAYOUT_OF
    return dict(sorted(found.items()))


def _head_of(module: str) -> str:
    """The module that PEFT saves unasked for a classifier, where this one is a layer in it: one cannot be in the other.

    >>> _head_of("classifier.out_proj"), _head_of("pre_classifier"), _head_of("encoder.norm")
    ('classifier', 'pre_classifier', 'encoder.norm')
    """
    words = module.split(".")
    at = next((i for i, word in enumerate(words) if word in ("classifier", "score", "qa_outputs")), len(words))
    return ".".join(words[: at + 1])


def _parameter_of(one: Module, *, experts: bool) -> str | None:
    """The parameter by which PEFT finds a module; None: by the module's own name."""
    if one.target.parameter is not None:
        return one.target.name
    like = experts and one.target.name.rpartition(".")[2] in LIKE_EXPERTS
    return f"{one.target.name}.weight" if like else None


def _pattern(name: str, names: Collection[str]) -> str:
    """A module's name, as PEFT's patterns of ranks look for it: at the end of names. Where it is the end of another
    module's name, too, only as a whole."""
    return f"^{re.escape(name)}" if any(one.endswith(f".{name}") for one in names) else name


def keys_of(modules: Sequence[Module]) -> Iterator[tuple[str, Place]]:
    """(key in the file, where the factor lies). Of two parameters of one module the first is wrapped by the second."""
    parameters = {one.target.name for one in modules if one.target.parameter is not None}
    for one in modules:
        where = one.target.module
        if one.target.parameter is not None:
            later = EXPERT_PARAMETERS[EXPERT_PARAMETERS.index(one.target.parameter) + 1 :]
            where += ".base_layer" * sum(f"{one.target.module}.{other}" in parameters for other in later)
        names = ("lora_embedding_A", "lora_embedding_B") if one.target.table else ("lora_A.weight", "lora_B.weight")
        for name, place in zip(names, (one.a, one.b), strict=True):
            yield f"{PREFIX}{where}.{name}", place
        for head in one.target.heads:
            for role, place in zip("AB", one.turned or (), strict=True):
                yield f"{PREFIX}{head}.lora_{role}.weight", place


def key_of_saved(one: Saved, modules: Collection[str]) -> str:
    """The key of a tensor that is saved whole. `modules`: those with factors, inside of which PEFT keeps the layer."""
    module, _, last = one.name.rpartition(".")
    inner = ".base_layer" if one.module is None and module in modules else ""
    return f"{PREFIX}{module}{inner}.{last}"


def write(
    folder: Path,
    modules: Sequence[Module],
    saved: Sequence[Saved],
    spool: Spool,
    reader: Reader,
    *,
    dtype: str,
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> int:
    """Write both files into an empty folder -> bytes of the weights' file."""
    factors = dict(keys_of(modules))
    owners = {one.target.module for one in modules}
    wholes = {key_of_saved(one, owners): one for one in saved}
    tensors = [OutputTensor(key, dtype, shape) for key, (_, shape) in factors.items()]
    tensors += [OutputTensor(key, one.tensor.dtype, one.tensor.shape) for key, one in wholes.items()]
    (shard,) = lay_out(sorted(tensors, key=lambda one: natural_key(one.name)), 1 << 62, metadata=metadata)
    file = OutputFile.create(folder / WEIGHTS, shard.size)
    try:
        file.write(np.frombuffer(shard.header, np.uint8), 0)
        for place in shard.placements:
            at = place.offset
            if place.name in factors:
                begin = factors[place.name][0]
                for start in range(0, place.nbytes, 1 << 24):
                    raw = np.empty(min(1 << 24, place.nbytes - start), np.uint8)
                    spool.get(begin + start, raw)
                    file.write(raw, at + start)
                continue
            for raw in reader.values(wholes[place.name].tensor):
                file.write(raw, at)
                at += raw.size
            if at != place.offset + place.nbytes:
                raise DataError(f"{place.name}: {at - place.offset} bytes were read, expected {place.nbytes}")
        file.sync()
    finally:
        file.close()
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return shard.size
