# SPDX-License-Identifier: Apache-2.0
"""The demo's family of models on disk: one base and its fine-tuned children, as ordinary Hugging Face checkpoints.

::

    DIR/base                      bfloat16 weights, config, generation config, tokenizer, training.json
    DIR/reverse  DIR/sort ...     fine-tuned with the first seed
    DIR/seed-1/reverse ...        with the others

`training.json` holds the fingerprint of everything that shaped the weights. A model whose fingerprint still fits is
not trained again. It is written before the directory gets its name, so a killed run leaves nothing that looks finished.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from darekit.demo import tasks
from darekit.demo.settings import Settings
from darekit.errors import OutputError

PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"
TRAINING_FILE = "training.json"
UNFINISHED = ".unfinished-"
IGNORED = -100  # a target that has no part in the loss; torch's own default


@dataclass(frozen=True)
class Job:
    """One model to train: the base (no ability), or the base fine-tuned on one ability with one seed."""

    ability: str | None = None
    seed: int = 0

    @property
    def title(self) -> str:
        """How progress and errors call it."""
        return "base" if self.ability is None else f"{self.ability} (seed {self.seed})"


@dataclass(frozen=True)
class Family:
    """Where the models of one directory lie."""

    directory: Path
    settings: Settings

    @property
    def base(self) -> Path:
        """The model that all others were fine-tuned from."""
        return self.directory / "base"

    def model(self, ability: str, seed: int) -> Path:
        """The model fine-tuned on one ability; the first seed's lie beside the base, for recipes to name them."""
        if seed == self.settings.tune_seeds[0]:
            return self.directory / ability
        return self.directory / f"seed-{seed}" / ability

    def path(self, job: Job) -> Path:
        """Where a job's model belongs."""
        return self.base if job.ability is None else self.model(job.ability, job.seed)

    def tuning_jobs(self) -> tuple[Job, ...]:
        """All fine-tunings."""
        return tuple(Job(ability, seed) for seed in self.settings.tune_seeds for ability in tasks.FINE_TUNED)


def fingerprint(family: Family, job: Job) -> str:
    """Digest of what shapes a model's weights: settings, code and, for a fine-tuned model, the base it started from."""
    parts: dict[str, Any] = {"settings": family.settings.shaping(tuned=job.ability is not None), "job": asdict(job)}
    parts["code"] = [inspect.getsource(tasks), Path(__file__).with_name("training.py").read_text(encoding="utf-8")]
    if job.ability is not None:
        parts["base"] = hashlib.blake2b((family.base / "model.safetensors").read_bytes()).hexdigest()
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def is_trained(family: Family, job: Job) -> bool:
    """Whether the model is there, complete, and what these settings would give."""
    try:
        found = json.loads((family.path(job) / TRAINING_FILE).read_text())
        return bool(found["fingerprint"] == fingerprint(family, job))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def build_tokenizer(pieces: Sequence[str] = tasks.PIECES) -> Any:
    """One token for each letter, and one for each word and mark of a prompt."""
    vocabulary = {piece: number for number, piece in enumerate((PAD, END, UNKNOWN, *pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    longest_first = sorted(pieces, key=len, reverse=True)
    pattern = "|".join(re.escape(piece) for piece in longest_first) + "|."
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="right",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 would add token types, which LLaMA refuses
    )


def build_model(settings: Settings, tokenizer: Any) -> Any:
    """An untrained LLaMA, the same one for the same settings, whatever else draws random numbers."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        intermediate_size=settings.mlp,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.base_seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=settings.word_length + 1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def encode(tokenizer: Any, examples: Sequence[tasks.Example]) -> tuple[Any, Any]:
    """Examples -> (n, t) int64 token ids, (n, t - 1) int64 targets: the answer and its end, `IGNORED` elsewhere.

    Padding is on the right, where a causal model cannot see it, so no attention mask is needed.
    """
    texts = [example.prompt + example.answer + END for example in examples]
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    asked = (ids == tokenizer.convert_tokens_to_ids("=")).cumsum(1)[:, :-1] > 0  # every prompt ends with its only "="
    targets = ids[:, 1:].masked_fill(~asked, IGNORED)
    return ids, targets.masked_fill(targets == tokenizer.pad_token_id, IGNORED)


def load_model(path: Path) -> Any:
    """A checkpoint as any user would load it, computing in float32: bfloat16 is for storage here, and slow on a CPU."""
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True).float().eval()


def load_tokenizer(path: Path) -> Any:
    """The tokenizer that lies with a checkpoint."""
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def save_model(family: Family, job: Job, model: Any, tokenizer: Any) -> None:
    """Publish a trained model in one rename, replacing an older one that the demo itself had made."""
    path = family.path(job)
    if path.exists() and not (path / TRAINING_FILE).is_file():
        raise OutputError(f"{path} exists and was not made by the demo: move it away, or choose another directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=path.parent))
    try:
        model.to(torch.bfloat16).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        record = {"fingerprint": fingerprint(family, job), "job": asdict(job), "settings": asdict(family.settings)}
        (unfinished / TRAINING_FILE).write_text(json.dumps(record, indent=2) + "\n")
        unfinished.chmod(0o755)  # mkdtemp makes private directories
        if path.exists():
            shutil.rmtree(path)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_unfinished(directory: Path) -> None:
    """Remove what killed runs left behind."""
    for path in (*directory.glob(f"{UNFINISHED}*"), *directory.glob(f"seed-*/{UNFINISHED}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@contextmanager
def calm() -> Iterator[None]:
    """One torch thread and no progress bars of transformers' own, restored afterwards.

    On two shared cores, a second thread made these small matrices 3 to 13 times slower.
    """
    threads, bars = torch.get_num_threads(), transformers_logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            transformers_logging.enable_progress_bar()
