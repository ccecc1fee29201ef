# SPDX-License-Identifier: Apache-2.0
"""Whether the configs of base and models say that they compute the same function of their weights.

Equal shapes are no proof of it: rotary frequencies, activations, numbers of heads and the epsilon of norms leave no
trace in them. Everything is compared but what is known not to matter; a key that only one config has is no difference,
since the loader's default for it may be just that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from darekit.architectures.families import TEXTS
from darekit.checkpoints import Checkpoint
from darekit.wording import and_, label

SHOWN = 6  # keys that are named
CODERS = ("encoder", "decoder")  # nested configs not named `*_config`

# Who wrote it and how it is run, trained and decoded; and what is compared, or made true to the weights, elsewhere.
HARMLESS = re.compile(
    r"""_(?!remove_final_layer_norm).* | architectures | auto_map | (.*_)?version | transformers\.js_config | unsloth.*
    | trl.* | model_name | use_cache | cache_implementation | sentence_transformers
    | (torch_)?dtype | torchscript | return_dict.* | output_.* | use_return_dict | use_bfloat16 | pretraining_tp
    | .*dropout.* | .*_drop | .*pdrop | drop_rate | layerdrop | .*layerdrop | drop_path.* | initializer_.* | .*_init
    | init_.* | initializer | .*_init_.* | mask_time_.* | mask_feature_.* | apply_spec_augment | gradient_checkpointing
    | use_gradient_checkpointing | .*_loss.* | .*_coef | .*_coeff | chunk_size_feed_forward | attn_implementation
    | use_flash.* | use_mem_eff.* | use_sdpa.* | use_.*kernel.* | quantization.* | compression_config | problem_type
    | finetuning_task | task_specific_params | id2label | label2id | num_labels | tokenizer_class
    | processor_class | .*_token_ids? | .*_token_index | .*_token_indices | .*vocab_size | tie_.* | max_length
    | min_length | do_sample | early_stopping | num_beams | num_beam_groups | diversity_penalty | temperature | top_k
    | top_p | typical_p | repetition_penalty | length_penalty | no_repeat_ngram_size | encoder_no_repeat_ngram_size
    | bad_words_ids | num_return_sequences | remove_invalid_values | exponential_decay_length_penalty
    | suppress_tokens | begin_suppress_tokens | pruned_heads | is_encoder_decoder | prefix | logits_to_keep
    | rope_interleaved_kernel | num_nextn_predict_layers | mtp_num_hidden_layers
    | ep_size | moe_implementation | experts_implementation""",
    re.VERBOSE,
)
# One function under several names.
SAME = {
    "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "gelu_python_tanh": "gelu_new", "gelu_python": "gelu",
    "swish": "silu",
}  # fmt: skip
# The base of rotary frequencies where old configs do not name it: Llama 2's does not, Code Llama's says a million.
THETA = 10000.0
OF_THETA = frozenset(
    """
    llama mistral gemma gemma2 qwen2 qwen2_moe qwen3 qwen3_moe phi phi3 stablelm starcoder2 olmo olmo2 olmoe falcon
    gpt_neox persimmon deepseek_v2 deepseek_v3 cohere2 granite glm glm4
    """.split()  # noqa: SIM905 (read as a paragraph)
)
# Of a view, whose layers are others than its config says.
OF_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layer_types", "max_window_layers")


def config_notes(
    base: Checkpoint | None, models: Sequence[Checkpoint], giver: Checkpoint, *, restacked: bool = False
) -> Iterator[str]:
    """Where configs differ in what changes the function: name, values, whose they are.

    `giver`: whose config.json the output's is made of. `restacked`: the recipe chooses layers, so what configs say of
    them is not compared.
    """
    inputs = [one for one in (*([base] if base is not None else []), *models) if one.config is not None]
    said = [(one, functional(one)) for one in inputs]
    names = dict.fromkeys(key for _, found in said for key in found)
    names = dict.fromkeys(key for key in names if not (restacked and key.rpartition(".")[2] in OF_LAYERS))
    differing = {}
    for name in names:
        values: dict[str, list[str]] = {}
        for one, found in said:
            if name in found:
                values.setdefault(found[name], []).append("the base" if one is base else label(one.ref))
        if len(values) > 1:
            differing[name] = values
    if differing:
        told = [
            f"{name} is {', '.join(f'{value} in {and_(whose)}' for value, whose in values.items())}"
            for name, values in list(differing.items())[:SHOWN]
        ]
        more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        whose = "the base" if giver is base else label(giver.ref)
        yield (
            f"the configs differ, so the models compute different functions of their weights: {'; '.join(told)}{more}. "
            f"The output has the config of {whose}; merging models that compute differently may do harm"
        )


def functional(checkpoint: Checkpoint) -> dict[str, str]:
    """What a config says of the function that is computed: path of the key -> its value, as text that can be compared.

    The language model of a composite model stands at the top, where a bare one has it; other parts keep their names.
    """
    config = checkpoint.config or {}
    text = next((key for key in TEXTS if isinstance(config.get(key), Mapping)), None)
    parts: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    if text is not None:
        others = {key: value for key, value in config.items() if key != text and not _is_part(config, key)}
        parts = [("", others), ("", config[text])]
        parts += [(key, config[key]) for key in config if key != text and _is_part(config, key)]
    found: dict[str, str] = {}
    for prefix, part in parts:
        found |= dict(_flat(part, prefix))
    if checkpoint.origin is not None:
        found = {name: value for name, value in found.items() if name.rpartition(".")[2] not in OF_LAYERS}
    return found


def _is_part(config: Mapping[str, Any], key: str) -> bool:
    return isinstance(config[key], Mapping) and (key.endswith("_config") or key in CODERS)


def _flat(part: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    at = f"{prefix}." if prefix else ""
    sliding = part.get("use_sliding_window") is not False
    for name, value in _rope(part):
        yield at + name, value
    for key, value in part.items():
        if key in ROPE_KEYS or HARMLESS.fullmatch(key) or value is None:
            continue
        if key in ("sliding_window", "max_window_layers") and not sliding:
            continue
        if key == "model_type":
            yield at + key, str(value).removesuffix("_text")
        elif isinstance(value, Mapping):
            yield from _flat(value, at + key)
        else:
            yield at + key, _text(value)


# Rotary frequencies: a theta, a scaling and a share of each head, which old and new configs spell differently.
THETAS = ("rope_theta", "rotary_emb_base", "global_rope_theta")
LOCAL_THETAS = ("rope_local_base_freq", "local_rope_theta")
SHARES = ("partial_rotary_factor", "rotary_pct", "rotary_percent")
ROPE_KEYS = (*THETAS, *LOCAL_THETAS, *SHARES, "rope_scaling", "rope_parameters")
KINDS = ("full_attention", "sliding_attention")


def _rope(part: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """One spelling of both: rope_theta, rope_scaling, partial_rotary_factor; of sliding layers with `sliding.` before.

    Since version 5 of transformers `rope_parameters` has all of it, by kind of layer where the kinds differ.
    """
    known = part.get("rope_parameters")
    if isinstance(known, Mapping) and any(isinstance(known.get(kind), Mapping) for kind in KINDS):
        for kind in KINDS:
            if isinstance(known.get(kind), Mapping):
                yield from _rope_of(part, known[kind], "sliding." if kind == KINDS[1] else "")
        return
    yield from _rope_of(part, known if isinstance(known, Mapping) else None, "")
    local = next((part[key] for key in LOCAL_THETAS if part.get(key) is not None), None)
    if local is not None:
        yield "sliding.rope_theta", _text(local)
        yield "sliding.rope_scaling", "none"


def _rope_of(part: Mapping[str, Any], new: Mapping[str, Any] | None, at: str) -> Iterator[tuple[str, str]]:
    old = part.get("rope_scaling")
    said = {**(old if isinstance(old, Mapping) else {}), **(new or {})}
    theta = _either(said.pop("rope_theta", None), [part[key] for key in THETAS if part.get(key) is not None])
    theta = _text(THETA) if theta is None and str(part.get("model_type")) in OF_THETA else theta
    share = _either(said.pop("partial_rotary_factor", None), [part[key] for key in SHARES if part.get(key) is not None])
    kind = said.pop("rope_type", None) or said.get("type")
    said.pop("type", None)
    if theta is not None:
        yield f"{at}rope_theta", theta
    if share is not None:
        yield f"{at}partial_rotary_factor", share
    if new is not None or "rope_scaling" in part or theta is not None:
        details = ", ".join(f"{key} {_text(value)}" for key, value in sorted(said.items()) if value is not None)
        plain = kind in (None, "default") and "mrope_section" not in said
        yield f"{at}rope_scaling", "none" if plain else f"{kind or 'default'}{f' ({details})' if details else ''}"


def _either(new: Any, old: Sequence[Any]) -> str | None:
    """What a config says in the new spelling, in the old one, or (as edited by hand) in both and otherwise."""
    said = dict.fromkeys(_text(value) for value in [*([] if new is None else [new]), *old[:1]])
    return " or ".join(said) or None


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value:.12g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return SAME.get(str(value), str(value))
