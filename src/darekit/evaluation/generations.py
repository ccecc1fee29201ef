# SPDX-License-Identifier: Apache-2.0
"""What models answer to instructions, greedily, in the JSON form of AlpacaEval."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darekit.errors import CheckpointError, DataError, OutputError, PlanError
from darekit.evaluation.comparison import Model, file_name, named_models, write_text
from darekit.evaluation.guards import nan_refused
from darekit.live.models import LiveModel, build, memory_told, one_thread
from darekit.live.skeletons import quiet_transformers
from darekit.live.tasks import CAUSAL
from darekit.planning.opening import open_plan
from darekit.wording.progress import Progress

BATCH_SIZE = 8
MAX_NEW_TOKENS = 512
FORMS = '{"instruction": ...} or {"prompt": ...}, and "dataset" where there is one'
INSTRUCTION = "{instruction}"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Question:
    """One instruction; `dataset`: the part of the benchmark it belongs to; `place`: where it came from, for errors."""

    instruction: str
    dataset: str
    place: str


def read_questions(path: Path, *, limit: int | None = None) -> tuple[Question, ...]:
    """A JSON list, as AlpacaEval's own file of instructions, or JSON lines -> questions.

    Raises:
        CheckpointError: there is no such file.
        DataError: a row has no instruction, or there is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a file; expected a JSON list or JSON lines, each {FORMS}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    try:
        if text.lstrip().startswith("["):
            rows = [(f"{path}[{at}]", row) for at, row in enumerate(json.loads(text))]
        else:
            lines = [(f"{path}:{at}", line) for at, line in enumerate(text.splitlines(), 1) if line.strip()]
            rows = [(place, json.loads(line)) for place, line in lines]
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error.msg}, line {error.lineno}); expected a list or JSON lines") from None
    questions = []
    for place, row in rows[:limit]:
        asked = (row.get("instruction") or row.get("prompt")) if isinstance(row, dict) else None
        if not isinstance(asked, str) or not asked.strip():
            raise DataError(f"{place} has no instruction; expected {FORMS}")
        questions.append(Question(asked, str(row.get("dataset") or path.stem), place))
    if not questions:
        raise DataError(f"{path} has no question; expected a JSON list or JSON lines, each {FORMS}")
    return tuple(questions)


def answer(
    live: LiveModel,
    questions: Sequence[Question],
    *,
    prompt: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> list[str]:
    """Greedy answers, in order.

    Args:
        live: a causal model.
        questions: what to ask.
        prompt: a text with `{instruction}` in it; the tokenizer's chat template if not given; without
            one, the instruction alone.
        max_new_tokens: of an answer.
        batch_size: answers at once.
        progress: called with (answers done, answers in all).

    Raises:
        DataError: the model writes no text, gives NaN, or a question does not fit.
    """
    import torch

    if live.task != CAUSAL or live.tokenizer is None:
        what = live.kind if live.task != CAUSAL else "the model has no tokenizer"
        raise DataError(f"{what}; answers to instructions need a causal model with its tokenizer")
    ids = [_ids(live.tokenizer, question, prompt) for question in questions]
    for question, one in zip(questions, ids, strict=True):
        if len(one) + max_new_tokens > live.max_length:
            raise DataError(
                f"{question.place} has {len(one)} tokens; with {max_new_tokens} for the answer, that exceeds "
                f"the model's limit of {live.max_length}; use a smaller --max-new-tokens"
            )
    answers = [""] * len(questions)
    order = sorted(range(len(ids)), key=lambda at: -len(ids[at]))
    padding = live.tokenizer.pad_token_id or 0
    with ExitStack() as stack:
        stack.enter_context(one_thread(live.device))
        stack.enter_context(memory_told(f"answering in batches of {batch_size}"))
        stack.enter_context(quiet_transformers())
        stack.enter_context(nan_refused(live))
        stack.enter_context(torch.inference_mode())
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            width = len(ids[places[0]])
            # Padding stands to the left, so that every answer goes on where its question ends.
            batch = torch.tensor([[padding] * (width - len(ids[at])) + ids[at] for at in places], device=live.device)
            mask = torch.tensor([[0] * (width - len(ids[at])) + [1] * len(ids[at]) for at in places]).to(live.device)
            found = live.model.generate(
                input_ids=batch, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
                pad_token_id=padding,
            )  # fmt: skip
            for at, row in zip(places, found[:, width:].tolist(), strict=True):
                answers[at] = live.tokenizer.decode(row, skip_special_tokens=True).strip()
            if progress:
                progress(start + len(places), len(order))
    return answers


def _ids(tokenizer: Any, question: Question, prompt: str | None) -> list[int]:
    if prompt is not None:
        text, special = prompt.replace(INSTRUCTION, question.instruction), True
    elif getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": question.instruction}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        special = False  # the template has them
    else:
        text, special = question.instruction, True
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
        ids = ids[:-1]  # some tokenizers end every text; nothing would follow
    if not ids:
        raise DataError(f"{question.place}: the tokenizer produces no tokens for it")
    return ids


def generate(
    models: Model | Sequence[Model],
    questions: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    prompt: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
) -> tuple[Path, ...]:
    """Write each model's answers as AlpacaEval reads them: a list of {instruction, output, generator, dataset}.

    Args:
        models: as for `evaluate`.
        questions: a JSON list or JSON lines, with an instruction each.
        out: a file that ends in .json for one model; else a folder, with one file for each.
        base: the checkpoint that packs among the models were made against.
        prompt: a template that contains `{instruction}`, for models that were tuned on one and have no chat template.
        max_new_tokens: the longest answer.
        batch_size: answers at once.
        limit: ask only this many questions.
        overwrite: replace existing files; otherwise a finished file for the same questions is kept, any other refused.
        device: cpu, cuda or mps; the fastest available if not given.
        dtype: number format to compute in; float32 on a CPU if not given.
        progress: called with (answers done, answers in all) of each model.
        say: receives notes.

    Returns:
        The files that were written, or were there already, in the order of the models.

    Raises:
        DarekitError: see `darekit.errors`; files of finished models are kept.

    Examples:
        >>> [path] = dk.generate("math", "questions.json", "answers.json", max_new_tokens=4, device="cpu")
        >>> import json
        >>> [row["instruction"] for row in json.loads(path.read_text())]
        ['what is zero plus one', 'what is one plus one']
    """
    say = say or (lambda line: None)
    if prompt is not None and INSTRUCTION not in prompt:
        raise PlanError(f"the prompt does not contain {INSTRUCTION}, so the question would be missing")
    asked = read_questions(Path(questions), limit=limit)
    named = named_models(models, base)
    single = Path(out).suffix == ".json"
    if single and len(named) > 1:
        raise PlanError(
            f"the answers of {len(named)} models do not fit into one file {out}; name a folder to get a file for each"
        )
    paths = [Path(out) if single else Path(out) / f"{file_name(name)}.json" for name, _, _ in named]
    if len(set(paths)) < len(paths):
        raise PlanError("two models would be written to the same file; rename one")
    finished = [not overwrite and _is_finished(path, asked) for path in paths]
    for (name, recipe, search), path, done in zip(named, paths, finished, strict=True):
        if done:
            say(f"{path} has all answers already (use --overwrite to ask again)")
            continue
        with open_plan(recipe, search=search) as plan:
            live = build(plan, device=device, dtype=dtype)
            if prompt is None and live.tokenizer is not None and not getattr(live.tokenizer, "chat_template", None):
                say(f"{name} has no chat template: instructions are passed as they are (set a form with --prompt)")
            answers = answer(
                live, asked, prompt=prompt, max_new_tokens=max_new_tokens, batch_size=batch_size or BATCH_SIZE,
                progress=progress,
            )  # fmt: skip
            del live
            gc.collect()
        rows = [
            {"instruction": q.instruction, "output": text, "generator": Path(name).stem, "dataset": q.dataset}
            for q, text in zip(asked, answers, strict=True)
        ]
        write_text(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return tuple(paths)


def _is_finished(path: Path, asked: Sequence[Question]) -> bool:
    """Whether the file has answers to these very questions.

    Raises:
        OutputError: it is something else, which must not be lost.
    """
    if not path.exists():
        return False
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if [row["instruction"] for row in rows] == [q.instruction for q in asked] and all("output" in r for r in rows):
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise OutputError(f"{path} exists and does not answer these questions; name another file, or use --overwrite")
