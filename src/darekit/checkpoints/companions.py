# SPDX-License-Identifier: Apache-2.0
"""The companion files of a model: what lies beside its weights and belongs to it. This is the only list of them.

Patterns of `Path.glob`, relative to the model's directory. What is listed is fetched from the Hub, copied into outputs
and packs, and found where a tokenizer is looked for; so a new companion file is one line here.

Files that are on no list travel as well (`travels`), if they are small and neither weights nor the traces of training:
the modules of sentence-transformers, prompts, whatever a library looks for beside weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

CONFIG = "config.json"
CARD = "README.md"  # read for its license; every output gets a card of its own

# What the tokenizers of transformers read, and what holds their settings. A vocabulary is also on one of the two lists
# below, from which `tokenizers.FORMS` takes how it is recognised.
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
# Of those: single vocabularies in SentencePiece's format, and files that hold a vocabulary in one of their own.
SENTENCEPIECE = (
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "spm_char.model",
    "prophetnet.tokenizer",
)  # fmt: skip
OTHER_VOCABULARIES = ("vocab-src.json", "dict.txt", "byte_maps.json", "entity_vocab.json", "bpe.codes", "source.spm")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
PROCESSOR = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
MODEL = ("generation_config.json",)
CODE = ("*.py",)  # copied only where a config's auto_map refers to code

Content = Path | bytes  # where a companion file lies, or what it says
Companions = Mapping[str, Content]  # by name, relative to the model's directory, with forward slashes

LISTED = (*TOKENIZER, *TEMPLATES, *PROCESSOR, *MODEL)
ALL = (CONFIG, CARD, *LISTED, *CODE)

POINTER = b"version https://git-lfs"
POINTER_SIZE = (40, 1024)  # bytes; a Git LFS pointer has some 130, and never more than 1024
DANGLING = -1
END = 4096  # bytes at either end of a file that tell whether it is whole

# Layers of sentence-transformers behind the model, each in a folder of its own: `2_Dense/model.safetensors`.
MODULES = "modules.json"
MODULE = re.compile(r"\d+_\w+")
LAYER = re.compile(rf"{MODULE.pattern}/(?:model\.safetensors|pytorch_model\.bin)")

# What is on no list travels within these limits.
SMALL = 16_000_000  # bytes of one file
TOGETHER = 64_000_000  # bytes of all files of a model
COUNT = 1000  # files of a model
DEPTH = 3  # folders down from the weights
LOOKED_AT = 20_000  # entries of a directory: it may be anybody's home

WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx",
    "*.onnx_data*", "*.onnx.data", "*.tflite", "*.ot", "*.mlmodel", "weights*.npz", "*.pkl", "*.pickle", "*.joblib",
    "*.distcp", "*.nemo", "*.engine", "*.pte",
)  # fmt: skip
# Tables of weights, traces of training, documents of the source model, and files that make of an output what it is not.
NOT_COMPANIONS = (
    *WEIGHTS, "*.index.json", "*.index.*.json", "adapter_config.json", "training_args*", "trainer_*", "*_results.json",
    "events.out.*", "rng_state*", "optimizer*", "*.log", "*.out", "*.err", "latest", "checkpoint", "*.py", "*.pyc",
    "*.ipynb", "*.sh", "*.lock", "README*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4", "*.pdf",
    "darekit*", "mergekit_config.y*ml", ".*", "*~", "*.part", "*.partial", "*.incomplete", "*.crdownload", "*.aria2",
    "*.download", "*.tmp", "*.bak", "*.tfevents*", "thumbs.db", "desktop.ini", "token", "*_token", "credentials*",
    "secrets*", "*.pem", "*.key",
)  # fmt: skip
LEGAL = ("license*", "notice*", "copying*")  # even where it is a page of text
# Folders of other things: the same model for other programs, and what a training run leaves.
NOT_FOLDERS = (
    "onnx", "openvino*", "original", "coreml", "tflite", "gguf", "mlx", "flax", "tensorrt*", "metal", "checkpoint-*",
    "checkpoints", "global_step*", "pytorch_model_fsdp*", "optimizer*", "runs", "logs", "tb_logs", "lightning_logs",
    "mlruns", "aim", "wandb", "tensorboard", "eval*", "__pycache__", "venv", "node_modules", "src", "scripts", "assets",
    "images", "figures", "docs", ".*", "*.mlpackage",
)  # fmt: skip


@dataclass(frozen=True)
class Beside:
    """What lies beside weights: the files that belong to the model, and of those that do not travel, why."""

    companions: Companions
    left: Mapping[str, str] = field(default_factory=dict)


def companions_in(directory: Path) -> Companions:
    """The companion files in a directory, where they lie."""
    return look_beside(directory).companions


def look_beside(directory: Path, *, listed: bool = False) -> Beside:
    """The companion files in a directory; with `listed` only those on the lists (it may hold anything else too)."""
    sizes = dict(_listed_files(directory) if listed else _files(directory, "", DEPTH, [LOOKED_AT]))
    damaged = {name: why for name, size in sizes.items() if (why := _damage(directory, name, size))}
    whole = {name: size for name, size in sizes.items() if name not in damaged}
    known = _matches(whole, ALL)
    further, left = ((), {}) if listed else travels({n: size for n, size in whole.items() if n not in known})
    return Beside({name: directory / name for name in (*known, *further)}, {**damaged, **left})


def is_of_tokenizer(name: str) -> bool:
    """Whether a companion file belongs to the tokenizer."""
    return bool(_matches([name], TOKENIZER))


def _damage(directory: Path, name: str, size: int) -> str | None:
    """Why a companion file is not what its name says, as far as its first and last bytes tell: half a tokenizer.json
    keeps a whole model from loading, and who has no tokenizer can be given another's."""
    if size < 0:
        return "it is a link to a file that does not exist"
    is_json = name.endswith(".json") and name != CONFIG and any(_matches([name], ALL))
    if not is_json and not POINTER_SIZE[0] <= size <= POINTER_SIZE[1]:
        return None
    with suppress(OSError), (directory / name).open("rb") as file:
        begin = file.read(END)
        if begin.startswith(POINTER):
            return "it is a Git LFS pointer, not the file itself: run `git lfs pull` in its directory"
        if is_json and not begin.strip(b"\0 \t\r\n"):
            return "it is empty: download it again"
        if is_json:
            file.seek(max(0, size - END))
            begin, end = begin.removeprefix(b"\xef\xbb\xbf").lstrip(), file.read().rstrip()
            if end and begin.startswith((b"{", b"[", b"<")) and not end.endswith((b"}", b"]")):
                return "it is not a complete JSON document: download it again"
    return None


def travels(sizes: Mapping[str, int]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Which files that are on no list belong to a model, by their names and sizes in bytes; and why others stay.

    Weights in folders are a further model's, so nothing of such a folder travels, but for small layers of
    sentence-transformers (`modules.json` names their folders). Traces of training and documents stay without a word.

    >>> travels({"modules.json": 229, "1_Pooling/config.json": 190, "model.safetensors": 9, "trainer_state.json": 5})
    (('modules.json', '1_Pooling/config.json'), {})
    >>> travels({"2_Dense/config.json": 115, "2_Dense/model.safetensors": 2362528})[1]
    {'2_Dense/': 'it holds weights of its own'}
    >>> travels({"modules.json": 349, "2_Dense/config.json": 115, "2_Dense/model.safetensors": 2362528})[1]
    {}
    """
    layers = {name for name in sizes if MODULES in sizes and LAYER.fullmatch(name) and sizes[name] <= SMALL}
    candidates = [name for name in sorted(sizes, key=lambda name: (name.count("/"), name)) if not _elsewhere(name)]
    heavy = {folder for name in candidates if (folder := _folder(name)) and _is_weight(name) and name not in layers}
    left = {f"{folder}/": "it holds weights of its own" for folder in sorted(heavy)}
    chosen: list[str] = []
    total = 0
    for name in candidates:
        if any(_folder(name) == folder or name.startswith(f"{folder}/") for folder in heavy):
            continue
        if name not in layers and not _belongs(name):
            continue
        if sizes[name] > SMALL:
            left[name] = f"it has {sizes[name]:,} bytes, and at most {SMALL:,} are copied"
        elif total + sizes[name] > TOGETHER or len(chosen) >= COUNT:
            left[name] = f"the files before it already are {len(chosen)} with {total:,} bytes"
        else:
            chosen.append(name)
            total += sizes[name]
    return tuple(chosen), left


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
    present = set(ordered)
    found = []
    for pattern in patterns:
        if not any(sign in pattern for sign in "*?["):  # most of them: a regular expression each takes a millisecond
            found += [pattern] if pattern in present else []
        else:
            depth = pattern.count("/")
            found += [name for name in ordered if name.count("/") == depth and fnmatchcase(name, pattern)]
    return found


def _listed_files(directory: Path) -> Iterator[tuple[str, int]]:
    folders = dict.fromkeys(str(PurePosixPath(pattern).parent) for pattern in ALL)
    for folder in folders:
        prefix = "" if folder == "." else f"{folder}/"
        yield from _files(directory / folder, prefix, 0, [LOOKED_AT])


def _files(directory: Path, prefix: str, depth: int, room: list[int]) -> Iterator[tuple[str, int]]:
    """Name and size of each file, folders last; `DANGLING` is the size of a listed one that is a link to nothing.
    `room`: how many entries may still be looked at."""
    folders = []
    with suppress(OSError), os.scandir(directory) as entries:  # no such folder, or one that may not be listed
        for entry in entries:
            room[0] -= 1
            if room[0] < 0:
                return
            with suppress(OSError):
                if entry.is_file():
                    yield prefix + entry.name, entry.stat().st_size
                elif entry.is_symlink() and not entry.is_dir() and _matches([prefix + entry.name], LISTED):
                    yield prefix + entry.name, DANGLING
                elif depth and entry.is_dir(follow_symlinks=False) and not _is_other_folder(entry.name):
                    folders.append(entry.name)
    for name in sorted(folders):
        yield from _files(directory / name, f"{prefix}{name}/", depth - 1, room)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _elsewhere(name: str) -> bool:
    folders = name.split("/")[:-1]
    return len(folders) > DEPTH or any(map(_is_other_folder, folders))


def _is_other_folder(name: str) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in NOT_FOLDERS)


def _is_weight(name: str) -> bool:
    return any(fnmatchcase(name.rpartition("/")[2].lower(), pattern) for pattern in WEIGHTS)


def _belongs(name: str) -> bool:
    last = name.rpartition("/")[2].lower()
    if "\\" in name or not name.isprintable():  # a separator elsewhere, or nothing that one can name
        return False
    if any(fnmatchcase(last, pattern) for pattern in LEGAL):
        return not _is_weight(name)
    return not last.endswith(".md") and not any(fnmatchcase(last, pattern.lower()) for pattern in NOT_COMPANIONS)
