# SPDX-License-Identifier: Apache-2.0
"""`config.json`, made true to the merged weights: number format, vocabulary, tied embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from darekit.dtypes import DType

DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5 writes the first and reads both, 4 writes the second
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")  # where a composite model keeps its language model
CODERS = ("encoder", "decoder")  # nested configs not named `*_config`

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


def merged_config(
    config: Mapping[str, Any], *, dtype: DType, vocab_size: int | None, tied: bool | None
) -> dict[str, Any]:
    """The config of an output whose weights are `dtype`, have `vocab_size` rows and are `tied`.

    None means: as the config says. Everything else is left as it is, in its order.
    """
    merged = _with_dtype(config, _load_name(dtype))
    if not any(key in merged for key in DTYPE_KEYS):
        merged["torch_dtype"] = _load_name(dtype)  # the one name that 4.48 to 5.23 understand
    text = next((key for key in TEXT_CONFIGS if isinstance(merged.get(key), dict)), None)
    if vocab_size is not None:
        # A composite config may carry the size twice, or (where it has the default value) nowhere.
        if text is not None:
            merged[text]["vocab_size"] = vocab_size
        if text is None or "vocab_size" in merged:
            merged["vocab_size"] = vocab_size
    if tied is not None:
        # transformers 5 asks the top level, 4 asks the language model's config: both are told.
        merged["tie_word_embeddings"] = tied
        if text is not None:
            merged[text]["tie_word_embeddings"] = tied
    return merged


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether the config says that output and input embeddings are one; None where it does not say."""
    for part in (config, *(config.get(key) for key in TEXT_CONFIGS)):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def tied_by_default(model_type: str | None) -> bool:
    """What transformers assumes where a config of this `model_type` has no `tie_word_embeddings`."""
    return model_type in TIED_MODEL_TYPES


def _load_name(dtype: DType) -> str:
    # transformers makes this torch's default dtype while it loads, which torch refuses for 8 bits.
    return "bfloat16" if dtype.name.startswith("F8") else dtype.torch_name


def _with_dtype(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in DTYPE_KEYS and (value is None or isinstance(value, str)):
            changed[key] = name
        elif key in DTYPE_KEYS and isinstance(value, dict):  # one format for each part of a composite model
            changed[key] = dict.fromkeys(value, name)
        elif isinstance(value, dict) and (key.endswith("_config") or key in CODERS):
            changed[key] = _with_dtype(value, name)
        else:
            changed[key] = value
    return changed
