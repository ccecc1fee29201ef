# SPDX-License-Identifier: Apache-2.0
"""Several models under one judge: one table, with standard errors; what is finished is kept."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from darekit.errors import DarekitError, DataError, OutputError, PlanError
from darekit.evaluation.asked import ASKED, Asked, given
from darekit.evaluation.examples import Examples
from darekit.evaluation.harness import Confirm, Harness, load_tasks
from darekit.evaluation.judges import (
    Judge,
    Score,
    Several,
    identity_of,
    judge_of,
    judges_directory,
)
from darekit.evaluation.scores import difference
from darekit.live.models import build, recipe_of
from darekit.planning.opening import only_on_base, open_plan
from darekit.planning.plan import Plan
from darekit.pools.clusters import cluster_of, open_pool, require_ray
from darekit.pools.processes import Lost
from darekit.recipe import Recipe
from darekit.wording import brief
from darekit.wording.progress import Progress

KEPT = "evaluations.jsonl"  # one line for each model that is finished
COMPARISON = "comparison.json"
CLEAR = 2.0  # standard errors of the difference, from which on the best is called so

Model = str | Path | Recipe | Mapping[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Evaluation:
    """One model's scores, or why there are none.

    Attributes:
        model: its name.
        scores: name -> score.
        seconds: of the evaluation.
        details: what else lm-eval reports: versions, configs, results.
        error: why there are no scores; None where there are some.
        kept: whether they are from an earlier run.
    """

    model: str
    scores: Mapping[str, Score] = field(default_factory=dict)
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    kept: bool = False

    def to_data(self) -> dict[str, Any]:
        """In JSON-able form."""
        data: dict[str, Any] = {"model": self.model}
        if self.error is not None:
            return data | {"error": self.error}
        data |= {"scores": {name: score.to_data() for name, score in self.scores.items()}}
        return data | {"seconds": round(self.seconds, 3), "kept": self.kept, "details": dict(self.details)}


@dataclass(frozen=True)
class Comparison:
    """What `evaluate` found.

    Attributes:
        evaluations: one for each model, in order.
    """

    evaluations: tuple[Evaluation, ...]

    def __repr__(self) -> str:
        return brief(self, f"{', '.join(one.model for one in self.evaluations)}; scores: {', '.join(self.names)}")

    def _repr_html_(self) -> str:
        """What a notebook shows: every score of every model."""
        from darekit.wording.notebooks import shown_as_html

        rows = [
            (one.model, *("failed" if one.error is not None else shown(one.scores.get(name)) for name in self.names))
            for one in self.evaluations
        ]
        return shown_as_html("Evaluation", header=("model", *self.names), rows=rows)

    @property
    def failed(self) -> bool:
        """Whether a model has no scores."""
        return any(evaluation.error is not None for evaluation in self.evaluations)

    @property
    def names(self) -> tuple[str, ...]:
        """Every score's name, in order."""
        return tuple(dict.fromkeys(name for evaluation in self.evaluations for name in evaluation.scores))

    def row(self, name: str) -> tuple[Score | None, ...]:
        """One score of all models."""
        return tuple(evaluation.scores.get(name) for evaluation in self.evaluations)

    def differences(self) -> dict[str, dict[str, tuple[float, float | None]]]:
        """Score's name -> model -> how far it is from the first model that has this score, and the standard error of
        that: row by row where both answered the same rows."""
        found: dict[str, dict[str, tuple[float, float | None]]] = {}
        for name in self.names:
            (_, first), *others = [(e.model, e.scores[name]) for e in self.evaluations if name in e.scores]
            found[name] = {model: difference(score, first) for model, score in others}
        return found

    def to_data(self) -> dict[str, Any]:
        """In JSON-able form."""
        best = {name: best_of(self.row(name)) for name in self.names}
        return {
            "evaluations": [evaluation.to_data() for evaluation in self.evaluations],
            "best": {name: None if at is None else self.evaluations[at].model for name, at in best.items()},
            "differences": {
                name: {model: {"value": value, "stderr": error} for model, (value, error) in models.items()}
                for name, models in self.differences().items()
            },
        }

    def to_markdown(self) -> str:
        """The table; bold is the best, where the difference to every other exceeds its error."""
        done = [evaluation.model for evaluation in self.evaluations]
        lines = [f"| | {' | '.join(done)} |", "|---" * (len(done) + 1) + "|"]
        for name in self.names:
            row = self.row(name)
            best = best_of(row)
            cells = [f"**{shown(score)}**" if at == best else shown(score) for at, score in enumerate(row)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def best_of(row: Sequence[Score | None]) -> int | None:
    """Which of several models is the best in one score; None if that is unknown.

    Its distance to every other must exceed twice the standard error of their difference: row by row where the rows'
    parts are known (`darekit.evaluation.scores.difference`), else sqrt(se1^2 + se2^2), which errs towards silence.
    """
    found = [(at, score) for at, score in enumerate(row) if score is not None]
    if len(found) < 2 or any(score.higher_is_better is None or score.stderr is None for _, score in found):
        return None
    sign = 1 if found[0][1].higher_is_better else -1
    best, top = max(found, key=lambda entry: sign * entry[1].value)
    for at, score in found:
        gap, error = difference(top, score)
        if at != best and not sign * gap > CLEAR * (error or 0.0):
            return None
    return best


def shown(score: Score | None) -> str:
    """A score for people.

    >>> shown(Score(0.7134, 0.0121))
    '0.7134 ± 0.0121'
    """
    if score is None:
        return "-"
    value = f"{score.value:.4f}" if abs(score.value) < 1000 else f"{score.value:.5g}"
    return value if score.stderr is None else f"{value} ± {score.stderr:.4f}"


def evaluate(
    models: Model | Sequence[Model],
    *,
    judge: Mapping[str, Any] | str | Sequence[Any] | Callable[[Any], Any] | None = None,
    tasks: str | Sequence[str] = (),
    data: str | Path | Sequence[str | Path] = (),
    base: str | Path | None = None,
    include: Sequence[str | Path] = (),
    limit: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    trust_code: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    samples: str | Path | None = None,
    out: str | Path | None = None,
    jobs: int | None = None,
    ray: str | bool | None = None,
    gpus_per_worker: float | None = None,
    confirm: Confirm | None = None,
    progress: Progress | None = None,
    show_bars: bool = False,
    say: Say | None = None,
) -> Comparison:
    """Judge models, one after another, each merged in memory; only `out` and `samples` write files.

    Args:
        models: a model directory, Hub id, pack, recipe file, recipe or its data, or several of them; or name -> model.
        judge: see `darekit.evaluation.judges`: `{data: FILE}`, `judge.py:function`, a Python function, a command, or
            name -> any of these.
        tasks: names of lm-eval tasks.
        data: files of JSON lines.
        base: the checkpoint that packs among the models were made against.
        include: folders with local tasks.
        limit: use only this many questions of each task and rows of each file.
        batch_size: rows or questions at once.
        max_length: tokens of a row; longer ones are cut.
        num_fewshot: examples before each question; the task's own number if not given.
        chat_template: ask lm-eval's questions as the tokenizer's chat template says.
        trust_code: agree that tasks execute what the model writes.
        device: cpu, cuda or mps; the fastest available if not given.
        dtype: number format to compute in; if not given, float32 on a CPU, else the models' own.
        samples: a folder for each model's answer to each row or question.
        out: a folder for the results; models that already have results there are not judged again.
        jobs: judge this many models at a time, each in a process of its own.
        ray: judge on a Ray cluster: its address, or True for one that is there or else a new one on this machine.
        gpus_per_worker: of a cluster; one where it has some if not given.
        confirm: asked instead of `trust_code`, with the names of the tasks.
        progress: called with (rows done, rows in all) while a file is judged.
        show_bars: show lm-eval's own progress bars.
        say: receives notes, and the errors of models that fail while others continue.

    Returns:
        Every model's scores, with their standard errors.

    Raises:
        DarekitError: a judge or model is invalid (found before anything runs), or the only model fails.

    Examples:
        A base, a model, and a merge that exists only in memory:

        >>> found = dk.evaluate(["base", "math", "recipe.yaml"], data="sums.jsonl", device="cpu")
        >>> found
        <Comparison: base, math, recipe; scores: exact_match, loss>
        >>> [round(score.value) for score in found.row("loss")]
        [5, 5, 5]

        Any function of the live model can judge:

        >>> def parameters(live):
        ...     return sum(weight.numel() for weight in live.model.parameters())
        >>> dk.evaluate("math", judge=parameters, device="cpu").row("score")[0].value
        23712.0
    """
    say = say or (lambda line: None)
    named = named_models(models, base)
    cluster = cluster_of(ray, gpus_per_worker, jobs)
    if cluster is not None:
        require_ray()
    ask = confirm if confirm is not None and not trust_code else (lambda names: trust_code)
    words: dict[str, Any] = dict(
        judge=judge, tasks=[tasks] if isinstance(tasks, str) else list(tasks),
        data=[data] if isinstance(data, str | Path) else list(data), include=[Path(folder) for folder in include],
        limit=limit, batch_size=batch_size, max_length=max_length, num_fewshot=num_fewshot,
        chat_template=chat_template, log_samples=samples is not None,
    )  # fmt: skip
    found = _judge(**words, confirm=ask, progress=progress, show_bars=show_bars, say=say)
    settings = {"judge": identity_of(found), "dtype": dtype}
    keys = [_key(recipe, search, settings) for _, recipe, search in named]
    kept = kept_in(Path(out)) if out is not None else {}
    if out is not None:
        asked = Asked(
            tuple((name, key, recipe.to_data()) for (name, recipe, _), key in zip(named, keys, strict=True)),
            given({**words, "log_samples": None, "include": include, "base": base, "dtype": dtype}),
        )
        write_text(Path(out) / ASKED, json.dumps(asked.to_data(), indent=1) + "\n")
    evaluations: dict[int, Evaluation] = {}
    todo: list[int] = []
    for at, ((name, _, _), key) in enumerate(zip(named, keys, strict=True)):
        if key in kept:
            say(f"{name} is finished in {out}; to judge it again, remove its line from {KEPT} there")
            evaluations[at] = replace(kept[key], model=name, kept=True)
        else:
            todo.append(at)
    place = None if samples is None else Path(samples)
    if cluster is None and (jobs or 1) == 1:
        opened = open_pool(lambda: _Examiner(found, device, dtype, place, say), 1, None)
    else:
        opened = open_pool(partial(_examiner, words, device, dtype, place), min(jobs or 1, len(todo) or 1), cluster)
    with opened as pool:
        for i, answer in pool.run([named[at] for at in todo]) if todo else ():
            name, key = named[todo[i]][0], keys[todo[i]]
            if isinstance(answer, Lost):
                answer = DataError(f"{name}: {answer.why}"), ()
            one, told = answer
            for line in told:
                say(line)
            if isinstance(one, Evaluation):
                evaluations[todo[i]] = one
                if out is not None:
                    _keep(Path(out), key, one)
                continue
            if len(named) == 1:
                raise one
            say(f"{name}: {one}" if isinstance(one, DarekitError) else f"{name}: {type(one).__name__}: {one}")
            evaluations[todo[i]] = Evaluation(name, error=f"{type(one).__name__}: {one}")
    comparison = Comparison(tuple(evaluations[at] for at in range(len(named))))
    if all(one.error is not None for one in comparison.evaluations):
        lines = "\n".join(f"  {one.model}: {one.error}" for one in comparison.evaluations)
        raise DataError(f"no model could be judged:\n{lines}")
    if out is not None:
        write_text(Path(out) / COMPARISON, json.dumps(comparison.to_data(), indent=1) + "\n")
        write_text(Path(out) / "comparison.md", comparison.to_markdown())
    return comparison


@dataclass
class _Examiner:
    """Judges one model after another. `say`: told at once; None: what is to be said comes back with the answer."""

    judge: Judge
    device: str | None
    dtype: str | None
    samples: Path | None
    say: Say | None

    def __call__(self, task: tuple[str, Recipe, tuple[Path, ...]]) -> tuple[Evaluation | Exception, tuple[str, ...]]:
        """A model's evaluation, or what went wrong; and what is to be said."""
        name, recipe, search = task
        told: list[str] = []
        say = self.say or told.append
        try:
            found = _evaluate_one(name, recipe, search, self.judge, device=self.device, dtype=self.dtype, say=say)
            for _, part in _parts(self.judge):
                if isinstance(part, Examples) and part.note:
                    say(f"{name}: {part.note}")
            if self.samples is not None:
                _write_samples(self.samples, name, self.judge)
        except Exception as error:  # also torch's and transformers': the other models must not suffer
            return error, tuple(told)
        return found, tuple(told)


def _examiner(words: Mapping[str, Any], device: str | None, dtype: str | None, samples: Path | None) -> _Examiner:
    """The same in another process, with judges of its own. What they execute was agreed to where it began."""
    judge = _judge(**words, confirm=_agreed, progress=None, show_bars=False, say=_silent)
    return _Examiner(judge, device, dtype, samples, None)


def _agreed(names: Sequence[str]) -> bool:
    return True


def _silent(line: str) -> None:
    """Said already, where it began."""


def named_models(
    models: Model | Sequence[Model], base: str | Path | None
) -> list[tuple[str, Recipe, tuple[Path, ...]]]:
    """(name for the table, recipe, where its relative names are) of each model."""
    if isinstance(models, Mapping) and "models" not in models:
        given: list[tuple[str, Any]] = [(str(name), model) for name, model in models.items()]
    elif isinstance(models, str | Path | Recipe | Mapping):
        given = [(_name_of(models), models)]
    else:
        given = [(_name_of(model), model) for model in models]
    if not given:
        raise PlanError("no model given; name a model directory, a Hub id, a recipe or a pack")
    if not isinstance(models, Mapping):  # a merge is called as its recipe, unless something else is called so
        short = [_without_suffix(name) for name, _ in given]
        given = [(s if short.count(s) == 1 else name, model) for s, (name, model) in zip(short, given, strict=True)]
    names = [name for name, _ in given]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PlanError(f"{', '.join(twice)} is given twice; one table shows each model once")
    return [(name, *resolve_model(model, base)) for name, model in given]


def _without_suffix(name: str) -> str:
    """A recipe's path without its ending."""
    path = Path(name)
    return name.removesuffix(path.suffix) if path.suffix in (".yaml", ".yml") and not path.is_dir() else name


def _name_of(model: Model) -> str:
    if isinstance(model, str | Path):
        return str(model)
    recipe, _ = recipe_of(model)
    return f"{recipe.merge_method} of {len(recipe.models)}"


def resolve_model(model: Model, base: str | Path | None) -> tuple[Recipe, tuple[Path, ...]]:
    """What may stand for a model -> a recipe, and where its relative names are. Packs and adapters are put on `base`.

    Raises:
        PlanError: a pack without a base.
    """
    found = only_on_base(model) if isinstance(model, str | Path) else None
    if found is None:
        return recipe_of(model)
    opener, path = found
    if base is None:
        if opener.finds_base:
            return recipe_of(model)
        raise PlanError(f"{path} is {opener.kind}: it can only be used with its base; add --base BASE")
    return recipe_of({"base_model": str(base), "models": [{"model": str(path)}], "merge_method": "task_arithmetic"})


def _judge(
    judge: Any, tasks: Sequence[str], data: Sequence[str | Path], *, include: Sequence[Path], limit: int | None,
    batch_size: int | None, max_length: int | None, num_fewshot: int | None, chat_template: bool, confirm: Confirm,
    progress: Progress | None, show_bars: bool, log_samples: bool, say: Say,
) -> Judge:  # fmt: skip
    """All that was asked for, as one judge: data first, as their mistakes are cheap to find."""
    parts: list[tuple[str, Judge]] = []
    sizes = {"limit": limit, "batch_size": batch_size, "max_length": max_length}
    for file in data:
        spec = {"data": str(file)} | {name: size for name, size in sizes.items() if size is not None}
        parts.append((Path(file).stem, judge_of(spec, progress=progress)))
    if judge is not None:
        parts.append(("judge", judge_of(judge, progress=progress)))
    names = [name.strip() for task in tasks for name in task.split(",") if name.strip()]
    if names:
        harness = load_tasks(
            names, include=include, limit=limit, batch_size=batch_size, num_fewshot=num_fewshot,
            chat_template=chat_template, confirm=confirm, say=say,
        )  # fmt: skip
        harness.show_bars, harness.log_samples = show_bars, log_samples
        parts.append(("tasks", harness))
    if not parts:
        raise PlanError("no judge given: use --tasks, --data, --judge or --command")
    if len(parts) == 1:
        return parts[0][1]
    stems = [name for name, _ in parts]
    return Several(
        {name if stems.count(name) == 1 else f"{name}-{stems[:at].count(name) + 1}": one
         for at, (name, one) in enumerate(parts)}
    )  # fmt: skip


def _evaluate_one(
    name: str, recipe: Recipe, search: Sequence[Path], judge: Judge, *, device: str | None, dtype: str | None, say: Say
) -> Evaluation:
    from darekit.planning.checks import check

    begin = time.monotonic()
    with open_plan(recipe, search=search) as plan:
        for note in plan.notes:
            say(f"{name}: {note}")
        check(
            plan, force=True, say=lambda line: say(f"{name}: {line}")
        )  # what does not belong together is measured too
        if judges_directory(judge):
            with _directory(plan) as folder:
                scores = judge.judge_directory(folder)  # type: ignore[attr-defined]
        else:
            live = build(plan, device=device, dtype=dtype)
            try:
                scores = judge(live)
            finally:
                del live
                gc.collect()  # the next model may need all the memory that there is
    return Evaluation(name, dict(scores), time.monotonic() - begin, _details(judge))


@contextmanager
def _directory(plan: Plan) -> Iterator[Path]:
    """The model's own directory where it has one; else it is merged into a temporary one."""
    single = plan.models[0].directory if plan.base is None and len(plan.models) == 1 else None
    if single is not None:
        yield single
        return
    from darekit.output.publishing import execute

    with tempfile.TemporaryDirectory(prefix="darekit-") as folder:
        out = Path(folder) / "model"
        execute(
            plan, out, threads=None, tile=None, overwrite=False, resume=False, allow_nonfinite=False, progress=None,
            say=lambda line: None,
        )  # fmt: skip
        yield out


def _parts(judge: Judge) -> Iterator[tuple[str, Judge]]:
    if isinstance(judge, Several):
        for name, part in judge.judges.items():
            for inner, one in _parts(part):
                yield f"{name}/{inner}" if inner else name, one
    else:
        yield "", judge


def _details(judge: Judge) -> dict[str, Any]:
    return {name or "tasks": part.details for name, part in _parts(judge) if isinstance(part, Harness)}


def _write_samples(folder: Path, model: str, judge: Judge) -> None:
    """One file of JSON lines for each file of data and each task."""
    from darekit.evaluation.harness import plain

    place = folder / file_name(model)
    for name, part in _parts(judge):
        if isinstance(part, Examples):
            files = {name.replace("/", "-") or Path(part.source).stem: part.samples}
        else:
            files = part.samples if isinstance(part, Harness) else {}
        for title, rows in files.items():
            lines = "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)
            write_text(place / f"{file_name(title)}.jsonl", lines)


def _key(recipe: Recipe, search: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """What decides about a model's scores, as a digest: the recipe, samples of its checkpoints and statistics, the
    judge."""
    with open_plan(recipe, search=search) as plan:
        samples = [digest.hex() for digest in plan.sample_digests]
        what = [plan.recipe.to_data(), samples + [entry.fingerprint() for entry in plan.statistics], settings]
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()


def kept_in(out: Path) -> dict[str, Evaluation]:
    """Finished evaluations of an earlier run by key. The line that a kill cut short is none."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; --out takes a folder")
    kept = {}
    path = out / KEPT
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            effects = entry.get("effects", {})
            scores = {
                name: Score(**score, effects=tuple(effects[name]) if name in effects else None)
                for name, score in entry["scores"].items()
            }
            kept[str(entry["key"])] = Evaluation(entry["model"], scores, entry["seconds"], entry["details"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return kept


def _keep(out: Path, key: str, evaluation: Evaluation) -> None:
    path = out / KEPT
    try:
        out.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a kill cut the last line short
                    file.write(b"\n")
            own = {name: one.effects for name, one in evaluation.scores.items() if one.effects is not None}
            file.write((json.dumps({"key": key} | evaluation.to_data() | {"effects": own}) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file that is either as before or complete.

    Raises:
        OutputError: it cannot be written.
    """
    waiting = path.with_name(f".{path.name}.darekit-part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        waiting.write_text(text, encoding="utf-8")
        waiting.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def file_name(name: str) -> str:
    """A model's or task's name as the name of a file."""
    kept = "".join(c if c.isalnum() or c in "-_.+" else "-" for c in name.removesuffix(".yaml").removesuffix(".yml"))
    return kept.strip("-.") or "model"
