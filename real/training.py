# SPDX-License-Identifier: Apache-2.0
"""Full fine-tuning of the base on one ability: AdamW on float32 masters, loss on the answer alone, saved in bfloat16.

Every batch follows from the seed and its number, so a run that was stopped goes on from its last state with the very
steps that it would have made. Matrix products are in bfloat16 where this machine is faster in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from real import lessons

MADE, STATE, UNFINISHED = "training.json", "state.pt", ".unfinished-"
EVERY_SECONDS = 120.0  # between two states: 1.6 GB each for 135M parameters
MAX_LENGTH = 512

Progress = Callable[[int, int, float], None]  # steps done, steps in all, loss
Loss = Callable[[Any, Mapping[str, Any]], Any]  # a model and a batch -> its loss


@dataclass(frozen=True)
class Course:
    """How long, with how many rows a step, at which peak rate."""

    steps: int
    batch: int
    rate: float
    seed: int = 0


COURSES: Mapping[str, Course] = {
    "numbers": Course(120, 16, 6e-5),
    "json": Course(120, 12, 6e-5),
    "topics": Course(100, 14, 6e-5),
}
BETAS, EPSILON, CLIP, WARM_UP = (0.9, 0.99), 1e-8, 1.0, 0.1


def rate_at(step: int, course: Course) -> float:
    """The learning rate of a step, counted from 0: linear up over the first tenth, then linear down to a tenth.

    >>> [round(1e5 * rate_at(step, Course(20, 1, 1e-5)), 2) for step in (0, 1, 2, 19)]
    [0.5, 1.0, 1.0, 0.15]
    """
    warm = max(1, round(WARM_UP * course.steps))
    if step < warm:
        return course.rate * (step + 1) / warm
    return course.rate * (1 - 0.9 * (step - warm) / (course.steps - warm))


def fingerprint(base: Path, ability: str, course: Course) -> str:
    """Digest of what shapes the weights: course, examples and base."""
    first = [asdict(one) for one in islice(lessons.examples(ability, "training", course.seed), 200)]
    weights = hashlib.blake2b(digest_size=16)
    for path in sorted(base.glob("*.safetensors")):
        weights.update(path.read_bytes())
    parts = {"course": asdict(course), "ability": ability, "examples": first, "base": weights.hexdigest()}
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def is_trained(base: Path, out: Path, ability: str, course: Course) -> bool:
    """Whether the model is there, complete, and what this course would give."""
    try:
        found = json.loads((out / MADE).read_text())
    except (OSError, ValueError):
        return False
    return bool(found["fingerprint"] == fingerprint(base, ability, course))


def train(
    base: Path,
    out: Path,
    ability: str,
    course: Course,
    *,
    progress: Progress | None = None,
    every: float = EVERY_SECONDS,
    stop_after: int | None = None,
    device: str | None = None,
) -> bool:
    """Fine-tune `base` into `out`; a state that an earlier call left is gone on from.

    Args:
        base: directory of the base model.
        out: directory that appears when the model is finished.
        ability: what it learns.
        course: how.
        progress: called after each step.
        every: seconds between two states on disk.
        stop_after: stop, with a state, after so many steps of this call (tests do).
        device: cpu, cuda or another; a GPU of CUDA if there is one.

    Returns:
        Whether it is finished.

    Raises:
        SystemExit: the loss is not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = fingerprint(base, ability, course)
    state_path = out.parent / f"{out.name}.{STATE}"
    unfinished = state_path.with_suffix(".new")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(place)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=course.rate, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    begin, seconds, precision = 0, 0.0, None
    if state_path.is_file():
        state = torch.load(state_path, map_location=place, weights_only=True)
        if state["fingerprint"] == made:
            model.load_state_dict(state["model"])
            optimiser.load_state_dict(state["optimiser"])
            begin, seconds = state["step"], state["seconds"]
            precision = state.get("precision")  # timed again, it could be the other one
        del state

    def keep(step: int) -> None:
        found = {
            "fingerprint": made, "step": step, "seconds": seconds + time.perf_counter() - began,
            "precision": precision, "model": model.state_dict(), "optimiser": optimiser.state_dict(),
        }  # fmt: skip
        try:
            torch.save(found, unfinished)
            unfinished.replace(state_path)
        except (OSError, RuntimeError) as error:  # a full disk costs the state, and the steps if it comes to that
            unfinished.unlink(missing_ok=True)
            sys.stderr.write(f"no state was kept at step {step}: {str(error).splitlines()[0]}\n")

    precision = precision or faster_precision(model, place)
    loss_of: Loss | None = None
    began = kept = time.perf_counter()
    for step, batch in enumerate(islice(batches(tokenizer, ability, course), begin, course.steps), begin):
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, course)
        inputs = {name: values.to(place) for name, values in batch.items()}
        loss_of = loss_of or loss_for(model, inputs)
        torch.manual_seed(step)  # dropout, where a model has it
        with _autocast(place, precision):
            loss = loss_of(model, inputs)
        if not math.isfinite(loss.item()):
            raise SystemExit(f"training of {ability} diverged at step {step + 1}: a lower rate usually helps")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        if progress:
            progress(step + 1, course.steps, loss.item())
        if stop_after is not None and step + 1 - begin == stop_after and step + 1 < course.steps:
            keep(step + 1)
            return False
        if time.perf_counter() - kept > every:
            keep(step + 1)
            kept = time.perf_counter()
    seconds += time.perf_counter() - began
    record = {
        "fingerprint": made, "ability": ability, "course": asdict(course), "seconds": round(seconds, 1),
        "precision": precision, "device": place.type, "threads": torch.get_num_threads(),
        "torch": torch.__version__.partition("+")[0],
    }  # fmt: skip
    _publish(model, tokenizer, out, record)
    for path in (state_path, unfinished):
        path.unlink(missing_ok=True)
    return True


def loss_for(model: Any, inputs: Mapping[str, Any]) -> Loss:
    """`answer_loss` where it is what the model itself gives; `own_loss` where it scales or caps its logits (Gemma,
    Cohere, Granite), or has no decoder to be asked alone. One row decides."""
    import torch

    row = {name: values[:1] for name, values in inputs.items()}
    model.eval()
    try:
        with torch.inference_mode():
            same = torch.isclose(answer_loss(model, row), own_loss(model, row), rtol=1e-3)
    except (AttributeError, NotImplementedError, TypeError):
        return own_loss
    finally:
        model.train()
    return answer_loss if same else own_loss


def own_loss(model: Any, inputs: Mapping[str, Any]) -> Any:
    """The same by the model's own forward: every position's logits."""
    return model(**inputs).loss


def answer_loss(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Mean cross entropy of the answers' tokens. The head is asked for these positions alone: of a topic's row they are
    one in twenty, and with 49 thousand tokens the head is a fifth of the work."""
    import torch

    from darekit.live.data import IGNORED

    targets = inputs["labels"][:, 1:]
    asked = targets != IGNORED
    hidden = model.get_decoder()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0][:, :-1]
    logits = model.get_output_embeddings()(hidden[asked])
    return torch.nn.functional.cross_entropy(logits.float(), targets[asked])


def batches(tokenizer: Any, ability: str, course: Course) -> Iterator[dict[str, Any]]:
    """Batches without end: (rows, longest) int64 `input_ids`, `attention_mask` and `labels`."""
    import torch

    from darekit.live.data import IGNORED, Row, tokenize

    source = lessons.examples(ability, "training", course.seed)
    while rows := [Row(lessons.chat(tokenizer, one), completion=one.answer) for one in islice(source, course.batch)]:
        tokens = tokenize(tokenizer, rows, max_length=MAX_LENGTH)
        longest = max(len(row.ids) for row in tokens)
        ids = torch.zeros((len(tokens), longest), dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for at, row in enumerate(tokens):
            ids[at, : len(row.ids)] = torch.tensor(row.ids)
            mask[at, : len(row.ids)] = 1
            labels[at, : len(row.ids)] = torch.tensor(
                [token if asked else IGNORED for token, asked in zip(row.ids, row.asked, strict=True)]
            )
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def faster_precision(model: Any, device: Any) -> str:
    """`bfloat16` or `float32`, whichever multiplies faster here: with AVX512_BF16 or AMX bfloat16 is three times as
    fast, without them many times slower."""
    import torch

    if device.type != "cpu":
        return "bfloat16"
    found = {}
    width = model.config.get_text_config().hidden_size
    for dtype in (torch.bfloat16, torch.float32):
        left, right = torch.ones((256, width), dtype=dtype), torch.ones((width, 4 * width), dtype=dtype)
        left @ right
        times = []
        for _ in range(5):
            began = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - began)
        found[min(times)] = str(dtype).removeprefix("torch.")
    return found[min(found)]


def _autocast(device: Any, precision: str) -> Any:
    import torch

    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def _publish(model: Any, tokenizer: Any, out: Path, record: Mapping[str, Any]) -> None:
    """One rename: a killed run leaves nothing that looks finished."""
    import torch

    unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=out.parent))
    try:
        model.to(torch.bfloat16).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / MADE).write_text(json.dumps(record, indent=1) + "\n")
        unfinished.chmod(0o755)
        shutil.rmtree(out, ignore_errors=True)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def course_of(name: str) -> tuple[str, Course]:
    """A model's name -> its ability and course.

    >>> course_of("json-seed1")
    ('json', Course(steps=120, batch=12, rate=6e-05, seed=1))
    """
    ability, _, seed = name.partition("-seed")
    return ability, replace(COURSES[ability], seed=int(seed or 0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train some models, one after the other: what `python -m real` does in processes of their own."""
    import argparse

    parser = argparse.ArgumentParser(description="Fine-tune the base on abilities.")
    parser.add_argument("work", type=Path)
    parser.add_argument("names", nargs="+", help="numbers, json, topics; numbers-seed1 is trained with another seed")
    parser.add_argument("--device", help="cpu, cuda or another; default: a GPU of CUDA if there is one")
    given = parser.parse_args(arguments)
    base = given.work / "base"
    for name in given.names:
        ability, course = course_of(name)
        if not is_trained(base, given.work / name, ability, course):
            train(base, given.work / name, ability, course, progress=_printer(), device=given.device)


def _printer() -> Progress:
    """A line of JSON for each step, with the seconds that are left."""
    began, first = time.perf_counter(), 0

    def tell(done: int, steps: int, loss: float) -> None:
        nonlocal first
        first = first or done
        left = (time.perf_counter() - began) / (done - first + 1) * (steps - done)
        line = {"step": done, "of": steps, "loss": round(loss, 4), "left": round(left)}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    return tell


if __name__ == "__main__":
    main()
