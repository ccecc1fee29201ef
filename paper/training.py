# SPDX-License-Identifier: Apache-2.0
"""Trains the families that the experiments are about, each model once: ``python paper/training.py``.

::

    WORK/data/*.jsonl                      what judges and statistics read
    WORK/w32, w64, w128                    decoders: base, and a child for each ability
    WORK/w64/continued                     the base after continued pre-training
    WORK/w64/continued-shift               its child: to w64/base a model with the wrong backbone
    WORK/encoder                           base, and children with classifiers of 8, 4 and 2 classes

Ordinary Hugging Face checkpoints in bfloat16, deterministic for a given torch. `training.json` beside each holds the
fingerprint of everything that shaped its weights: settings, code, and its parent's weights. What still fits is not
trained again.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lessons
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from darekit.demo import training as demo
from darekit.demo.family import build_model, build_tokenizer, calm, load_model, load_tokenizer
from darekit.demo.settings import Course, Settings
from darekit.live.skeletons import quiet_transformers

TRAINING_FILE = "training.json"
UNFINISHED = ".unfinished-"
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Line:
    """One base and how its children are made. `continued`: the course of continued pre-training, where there is any."""

    hidden: int
    layers: int
    base: Course
    tune: Course
    children: tuple[str, ...]
    continued: Course | None = None
    heads: int = 4
    word_length: int = 5
    replay: float = 0.3
    encoder: bool = False


# Rates are such that r, the relative size of the deltas, is about the same for all widths.
LINES: Mapping[str, Line] = {
    "w128": Line(128, 3, Course(600, 64, 2e-3), Course(80, 64, 3e-4), lessons.TUNED),
    "w64": Line(64, 3, Course(700, 64, 3e-3), Course(80, 64, 5e-4), ("shift", "mirror"), Course(500, 64, 1e-2)),
    "w32": Line(32, 3, Course(1000, 64, 5e-3), Course(80, 64, 1e-3), ("shift", "mirror")),
    "encoder": Line(64, 2, Course(400, 64, 2e-3), Course(120, 64, 1e-3), lessons.CLASSIFIED, encoder=True),
}


def miniature(line: Line) -> Line:
    """The same models, barely trained: for tests of the machinery."""
    few = Course(1, 2, 1e-3)
    return replace(line, hidden=16, layers=1, base=few, tune=few, continued=line.continued and few)


@dataclass(frozen=True)
class Job:
    """One model to train: where it lies, what it starts from (None: nothing), what it learns."""

    name: str
    parent: str | None
    lesson: str  # base, continued, or a child's ability
    course: Course


def jobs_of(name: str, line: Line) -> tuple[Job, ...]:
    """A line's models, parents first."""
    base = f"{name}/base"
    jobs = [Job(base, None, "base", line.base)]
    jobs += [Job(f"{name}/{child}", base, child, line.tune) for child in line.children]
    if line.continued:
        jobs.append(Job(f"{name}/continued", base, "continued", line.continued))
        child = line.children[0]
        jobs.append(Job(f"{name}/continued-{child}", f"{name}/continued", child, line.tune))
    return tuple(jobs)


def names_of(lines: Mapping[str, Line] = LINES) -> tuple[str, ...]:
    """All models, as experiments name them."""
    return tuple(job.name for name, line in lines.items() for job in jobs_of(name, line))


def fingerprint(work: Path, job: Job, line: Line) -> str:
    """Digest of what shapes a model's weights."""
    code = [inspect.getsource(one) for one in (lessons, demo, _train_decoder, _train_encoder, _bert_config)]
    shape = {k: v for k, v in asdict(line).items() if k not in ("base", "tune", "continued", "children")}
    parts: dict[str, Any] = {"job": asdict(job), "shape": shape, "code": code, "torch": torch.__version__}
    if job.parent:
        parts["parent"] = hashlib.blake2b((work / job.parent / "model.safetensors").read_bytes()).hexdigest()
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def is_trained(work: Path, job: Job, line: Line) -> bool:
    """Whether the model is there, complete, and what these settings would give."""
    try:
        found = json.loads((work / job.name / TRAINING_FILE).read_text())
        return bool(found["fingerprint"] == fingerprint(work, job, line))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def train_line(work: Path, name: str, line: Line) -> Iterator[str]:
    """Train what is missing of one line; yields each model's name when it is done."""
    with calm(), quiet_transformers():
        for job in jobs_of(name, line):
            if not is_trained(work, job, line):
                _save(work, job, line, *(_train_encoder if line.encoder else _train_decoder)(work, job, line))
                yield job.name


def _train_decoder(work: Path, job: Job, line: Line) -> tuple[Any, Any]:
    rng = random.Random(job.name)
    length = line.word_length
    if job.parent is None:
        tokenizer = build_tokenizer(lessons.PIECES)
        settings = Settings(
            hidden=line.hidden, layers=line.layers, heads=line.heads, mlp=line.hidden * 5 // 2, word_length=length
        )
        model = build_model(settings, tokenizer)
        examples = lessons.base_examples(rng, length=length)
    else:
        model, tokenizer = load_model(work / job.parent), load_tokenizer(work / job.parent)
        examples = (
            lessons.base_examples(rng, length=length, continued=True)
            if job.lesson == "continued"
            else lessons.tuning_examples(rng, job.lesson, length=length, replay=line.replay)
        )
    held_out = frozenset(w for split in ("validation", "test") for w in lessons.fixed_words(split, length=length))
    for _ in demo.train(model, tokenizer, examples, job.course, title=job.name, held_out=held_out):
        pass
    return model, tokenizer


def _train_encoder(work: Path, job: Job, line: Line) -> tuple[Any, Any]:
    """A fine-tuned encoder has a new classifier, as wide as its task has classes, that learns ten times as fast."""
    rng = random.Random(job.name)
    labels = lessons.LABELS["third" if job.parent is None else job.lesson]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if job.parent is None:
            tokenizer = build_tokenizer(lessons.PIECES)
            tokenizer.add_special_tokens({"cls_token": "<cls>"})
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<cls> $A", special_tokens=[("<cls>", tokenizer.cls_token_id)]
            )
            model = BertForSequenceClassification(_bert_config(line, tokenizer, labels))
            examples = lessons.base_labelled(rng, length=line.word_length + 1)
        else:
            tokenizer = load_tokenizer(work / job.parent)
            model = AutoModelForSequenceClassification.from_pretrained(
                work / job.parent, num_labels=labels, ignore_mismatched_sizes=True, local_files_only=True
            ).float()
            model.classifier.reset_parameters()
            examples = lessons.tuning_labelled(rng, job.lesson, length=line.word_length + 1)
    new = () if job.parent is None else tuple(model.classifier.parameters())
    body = [parameter for parameter in model.parameters() if not any(parameter is one for one in new)]
    groups = [{"params": body}, {"params": list(new), "lr": 10 * job.course.rate}]
    optimiser = torch.optim.AdamW(groups if new else groups[:1], lr=job.course.rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: demo.rate_factor(step, job.course.steps))
    model.train()
    for step in range(job.course.steps):
        batch = [next(examples) for _ in range(job.course.batch)]
        inputs = tokenizer([text for _, text, _ in batch], padding=True, return_tensors="pt")
        loss = model(**inputs, labels=torch.tensor([label for _, _, label in batch])).loss
        if not math.isfinite(loss.item()):
            raise SystemExit(f"training of {job.name} diverged at step {step + 1}: a lower rate usually helps")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model, tokenizer


def _bert_config(line: Line, tokenizer: Any, labels: int) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=line.hidden,
        num_hidden_layers=line.layers,
        num_attention_heads=line.heads,
        intermediate_size=2 * line.hidden,
        max_position_embeddings=32,
        type_vocab_size=1,
        initializer_range=0.1,  # about 1 / sqrt(width): with 0.02 nothing is learned at this width
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=labels,
    )


def _save(work: Path, job: Job, line: Line, model: Any, tokenizer: Any) -> None:
    """Publish in one rename: a killed run leaves nothing that looks finished."""
    path = work / job.name
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=path.parent))
    try:
        model.to(torch.bfloat16).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        record = {"fingerprint": fingerprint(work, job, line), "job": asdict(job), "line": asdict(line)}
        (unfinished / TRAINING_FILE).write_text(json.dumps(record, indent=1) + "\n")
        unfinished.chmod(0o755)
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_lessons(work: Path) -> None:
    """The files of examples; and what a killed training left is removed."""
    lengths = {"length": LINES["w128"].word_length, "class_length": LINES["encoder"].word_length + 1}
    lessons.write_data(work / "data", **lengths)
    for path in work.glob(f"*/{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def is_complete(work: Path, name: str) -> bool:
    """Whether all models of a line are there."""
    return all(is_trained(work, job, LINES[name]) for job in jobs_of(name, LINES[name]))


def train_apart(work: Path, name: str, *, say: Callable[[str], None]) -> None:
    """Train what is missing of one line, in a process with one thread.

    Raises:
        SystemExit: it failed; what was finished is kept.
    """
    with subprocess.Popen(
        [sys.executable, str(HERE / "training.py"), str(work), "--line", name],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            say(f"trained {line.strip()}")
        errors = process.stderr.read()
    if process.returncode:
        raise SystemExit(f"training {name} failed:\n{errors.strip()[-2000:]}")


def train_small(work: Path) -> None:
    """Everything, barely trained, in this process: for tests of the machinery."""
    write_lessons(work)
    for name, line in LINES.items():
        for _ in train_line(work, name, miniature(line)):
            pass


def main() -> None:
    """Train everything, or one line: what `rerun.py` does, two at a time."""
    parser = argparse.ArgumentParser(description="Train the families of the experiments.")
    parser.add_argument("work", type=Path, nargs="?", default=HERE / "work")
    parser.add_argument("--line", choices=tuple(LINES))
    given = parser.parse_args()
    if given.line is None:
        write_lessons(given.work)
    for line in LINES if given.line is None else (given.line,):
        for name in train_line(given.work, line, LINES[line]):
            print(name, flush=True)


if __name__ == "__main__":
    main()
