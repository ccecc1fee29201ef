# SPDX-License-Identifier: Apache-2.0
"""The companion files of a model: what lies beside its weights and belongs to it. This is the only list of them.

Patterns of `Path.glob`, relative to the model's directory. What is listed is fetched from the Hub, copied into outputs
and packs, and found where a tokenizer is looked for; so a new companion file is one line here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

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

Content = Path | bytes  # where a companion file lies, or what it says
Companions = Mapping[str, Content]  # by name, relative to the model's directory, with forward slashes

ALL = (CONFIG, CARD, *TOKENIZER, *TEMPLATES, *PROCESSOR, *MODEL, *CODE)


def companions_in(directory: Path) -> Companions:
    """The companion files in a directory, where they lie."""
    folders = dict.fromkeys(str(PurePosixPath(pattern).parent) for pattern in ALL)
    names: list[str] = []
    for folder in folders:
        with suppress(OSError):  # no such folder, or one that may not be listed
            names += [(PurePosixPath(folder) / path.name).as_posix() for path in (directory / folder).iterdir()]
    found = {name: directory / name for name in _matches(names, ALL)}
    return {name: path for name, path in found.items() if path.is_file()}


def matching(companions: Companions, patterns: Sequence[str]) -> dict[str, Content]:
    """The companion files that match, in the order of the patterns; those of one pattern by name."""
    return {name: companions[name] for name in _matches(companions, patterns)}


def content_of(content: Content) -> bytes:
    """What a companion file says.

    Raises:
        OSError: it cannot be read.
    """
    return content if isinstance(content, bytes) else content.read_bytes()


def _matches(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    ordered = sorted(names)
    return [
        name
        for pattern in patterns
        for name in ordered
        if name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)
    ]
