# SPDX-License-Identifier: Apache-2.0
"""Which models tie their output embedding to the input embedding, by their config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXT_CONFIGS = ("text_config", "llm_config", "language_config")  # where a composite model keeps its language model

# Model types whose embeddings are tied unless the config says otherwise, in transformers 4.48 and 5.23 alike (they
# disagree about mt5, whose checkpoints say it). Untied by default are llama, mistral, mixtral, qwen2, qwen3, phi3,
# olmo, gpt_neox and most others.
TIED_MODEL_TYPES = frozenset(
    """
    albert bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom camembert
    cohere cohere2 cohere2_moe convbert cpmant ctrl data2vec-text deberta deberta-v2 distilbert electra ernie ernie4_5
    ernie4_5_moe esm falcon falcon_mamba flaubert fnet funnel gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text
    gemma4 gemma4_text gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese ibert jetmoe layoutlm led lfm2 lfm2_moe
    longformer longt5 luke m2m_100 mamba marian mbart megatron-bert mobilebert modernbert modernbert-decoder mpnet mpt
    mra mvp nllb-moe nystromformer openai-gpt opt paligemma pegasus pegasus_x plbart prophetnet recurrent_gemma
    roberta roberta-prelayernorm roc_bert roformer smollm3 squeezebert starcoder2 switch_transformers t5 t5gemma
    t5gemma2 tapas umt5 vaultgemma whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod yoso zamba zamba2
    """.split()  # noqa: SIM905 (read as a paragraph)
)


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether the config says that output and input embeddings are one; None where it does not say."""
    for part in (config, *(config.get(key) for key in TEXT_CONFIGS)):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def tied_by_default(model_type: str | None) -> bool:
    """What transformers assumes where a config of this `model_type` has no `tie_word_embeddings`."""
    return model_type in TIED_MODEL_TYPES


def says_tied(config: Mapping[str, Any] | None) -> bool:
    """Whether the embeddings of a model of this config are tied, said or by default."""
    if config is None:
        return False
    said = is_tied(config)
    return tied_by_default(str(config.get("model_type", ""))) if said is None else said


def untied_config(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The same, with embeddings that are not tied."""
    if config is None:
        return None
    texts = {
        key: {**config[key], "tie_word_embeddings": False} for key in TEXT_CONFIGS if isinstance(config.get(key), dict)
    }
    return {**config, **texts, "tie_word_embeddings": False}
