# SPDX-License-Identifier: Apache-2.0
"""The companion files of a model: what lies beside its weights and belongs to it. This is the only list of them.

Patterns of `Path.glob`, relative to the model's directory. What is listed is fetched from the Hub, copied into outputs
and packs, and found where a tokenizer is looked for; so a new companion file is one line here.
"""

from __future__ import annotations

CONFIG = "config.json"
CARD = "README.md"  # read for its license; every output gets a card of its own

# What the tokenizers of transformers read, and what holds their settings.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "spm.model",
    "spm_char.model",  # SpeechT5
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "source.spm",  # Marian, with vocab.json and sometimes target_vocab.json
    "target.spm",
    "target_vocab.json",
    "vocab-src.json",  # FSMT, with merges.txt
    "vocab-tgt.json",
    "prophetnet.tokenizer",  # ProphetNet and XLM-ProphetNet
    "bpe.codes",
    "dict.txt",  # BARTpho
    "byte_maps.json",  # MyT5
    "emoji.json",  # GPT-NeoX Japanese
    "entity_vocab.json",  # LUKE
    "word_shape.json",  # RoCBert
    "word_pronunciation.json",
    "normalizer.json",  # Whisper
)
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
PROCESSOR = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
MODEL = ("generation_config.json",)
CODE = ("*.py",)  # copied only where a config's auto_map refers to code
