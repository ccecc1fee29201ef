# SPDX-License-Identifier: Apache-2.0
"""What a model is for, as transformers' own tables and the model itself say; and so what it can be judged by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CAUSAL, CLASSIFIER, REGRESSOR = "causal", "classifier", "regressor"
SEQ2SEQ, MASKED, OTHER = "encoder-decoder", "masked", "other"

PROMPTS = '{"prompt": ..., "completion": ...}'
LABELS = '{"text": ..., "label": ...}'
FUNCTION = "a function of your own, which gets the live model (--judge FILE.py:FUNCTION)"

# What the first input of a model that does not begin with text is called, and what it is.
_INPUTS: Mapping[str, str] = {
    "pixel_values": "images",
    "pixel_values_videos": "videos",
    "input_values": "speech and other sound",
    "input_features": "speech and other sound",
    "past_values": "series of numbers",
}


def task_of(model: Any) -> str:
    """A transformers model -> causal, classifier, regressor, encoder-decoder, masked or other."""
    config, name = model.config, type(model).__name__
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return CAUSAL if _answers_to_text(name) else OTHER
    if name.endswith("ForSequenceClassification"):
        kind = getattr(config, "problem_type", None)
        if kind == "multi_label_classification":
            return OTHER
        return REGRESSOR if kind == "regression" or (kind is None and config.num_labels == 1) else CLASSIFIER
    if getattr(config, "is_encoder_decoder", False):
        return SEQ2SEQ if _is_listed("SEQ_TO_SEQ_CAUSAL_LM", name) else OTHER
    if _is_listed("MASKED_LM", name) and not getattr(config, "causal", False):
        return MASKED
    if _is_listed("CAUSAL_LM", name):
        return MASKED if _is_encoder(config) and not getattr(config, "is_decoder", False) else CAUSAL
    return CAUSAL if _answers_to_text(name) else OTHER


def _is_listed(table: str, name: str) -> bool:
    """Whether one of transformers' auto classes chooses this class."""
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {})
    return any(name == entry or (isinstance(entry, tuple) and name in entry) for entry in names.values())


def _answers_to_text(name: str) -> bool:
    """Whether images beside text are possible, not necessary: the model writes text, token by token."""
    return any(_is_listed(table, name) for table in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM"))


def _is_encoder(config: Any) -> bool:
    """Whether the family's models are encoders, which only a config's `is_decoder` makes causal."""
    from transformers.models.auto import modeling_auto

    table: Mapping[str, Any] = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return config.model_type in table and hasattr(config, "is_decoder") and not hasattr(config, "causal")


def kind_of(model: Any) -> str:
    """The class and what it is, for messages.

    >>> from transformers import BertConfig, BertForMaskedLM
    >>> kind_of(BertForMaskedLM(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)))
    'BertForMaskedLM is a masked language model'
    """
    name, first = type(model).__name__, getattr(model, "main_input_name", "input_ids")
    match task_of(model):
        case "causal":
            what = "is a causal model, which writes text"
        case "encoder-decoder":
            what = "is an encoder-decoder"
        case "masked":
            what = "is a masked language model"
        case "classifier" | "regressor" as task:
            what = f"is a {task}"
        case _ if getattr(model.config, "is_encoder_decoder", False):
            what = f"is an encoder-decoder of {_INPUTS.get(first, 'another kind than text to text')}"
        case _ if first != "input_ids":
            what = f"is a model of {_INPUTS.get(first, first)}"
        case _ if _is_bare(name):
            what = "is a model without a head"
        case _:
            what = "is neither a model that writes text nor one that classifies it"
    return f"{name} {what}"


def _is_bare(name: str) -> bool:
    from transformers.models.auto import modeling_auto

    entries = modeling_auto.MODEL_MAPPING_NAMES.values()
    return any(name == entry or (isinstance(entry, tuple) and name in entry) for entry in entries)


def rows_of(model: Any) -> str:
    """What rows of data can judge the model by, or what else can; the end of a message.

    >>> from transformers import BertConfig, BertModel
    >>> rows_of(BertModel(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)))[:46]
    'no rows can judge it, but a function of your o'
    """
    match task_of(model):
        case "causal":
            return f'it needs {{"text": ...}} or {PROMPTS} on each line'
        case "encoder-decoder":
            return f"it needs {PROMPTS} on each line: the prompt goes into its encoder"
        case "classifier" | "regressor":
            return f"it needs {LABELS} on each line"
        case "masked":
            return (
                "it sees every token that it would have to predict, so that a loss or a perplexity of text would say "
                f"nothing. It can be judged by {FUNCTION}; a classifier made from it, by {LABELS}"
            )
        case _:
            return f"no rows can judge it, but {FUNCTION}"
