# SPDX-License-Identifier: Apache-2.0
"""EleutherAI's lm-eval as a judge: its tasks, or local ones, on a live model. Only this file imports lm_eval."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import math
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from darekit.errors import CheckpointError, DarekitError, DataError, PlanError, RecipeError, Unsupported
from darekit.evaluation.guards import nan_refused
from darekit.evaluation.items import Items
from darekit.evaluation.scores import Score, scores_of
from darekit.live.models import LiveModel, memory_told, one_thread
from darekit.live.reading import refuse_foresight
from darekit.live.skeletons import quiet_transformers
from darekit.live.tasks import CAUSAL, rows_of

# What the paper calls its benchmarks -> lm-eval's names.
ALIASES = {
    "math": "minerva_math",
    "human_eval": "humaneval",
    "humaneval": "humaneval",
    "mbpp": "mbpp",
    "gsm8k": "gsm8k",
    "glue": "glue",
}
JUDGED_ELSEWHERE = {
    "alpacaeval": "is judged by another model: write the answers with --generate, and give them to alpaca_eval",
    "stsb": "is not in lm-eval; rows of data (--data, data: FILE) judge regression models, by Pearson and Spearman",
}
SHARED_FOLDER = "benchmarks"  # lm-eval's groups of tasks from other folders
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # lm-eval's own defaults
BOOTSTRAP = 1000  # resamples, for metrics whose standard error has no formula
BATCH_SIZE = 8
NETWORK = ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout",
           "ReadTimeout", "ProxyError", "HfHubHTTPError", "MaxRetryError", "SSLError")  # fmt: skip

Confirm = Callable[[Sequence[str]], bool]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Words:
    """How the reader of a message says what it advises."""

    include: str
    trust: str


OPTIONS = Words("--include DIR", "--trust-code")
JUDGE_KEYS = Words("the judge's key `include: DIR`", "`trust_code: true` beside `tasks:`")


@dataclass
class Harness:
    """The judge of `{tasks: [...]}`.

    `details` and `samples` are those of the last model: versions, configs and results as lm-eval gives them, and its
    log of every question, where `log_samples`.
    """

    names: tuple[str, ...]
    loaded: Any
    limit: int | None = None
    batch_size: int = BATCH_SIZE
    num_fewshot: int | None = None
    chat_template: bool = False
    trusted: bool = False
    show_bars: bool = False
    log_samples: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[Any]] = field(default_factory=dict)

    def __call__(self, live: LiveModel) -> Mapping[str, Score]:
        """Scores of the model as it is now: `task/metric`, or `task/metric,filter`.

        Raises:
            DataError: the model gives NaN, is not a causal model, has no tokenizer, or a task fails.
        """
        found = self._asked(live, None)
        self.samples = found.pop("samples", {})
        self.details = self._details(found)
        return scores_of(_scores(found), f"lm-eval on {', '.join(self.names)}")

    def score_names(self) -> tuple[str, ...]:
        """Names of the scores that there can be; nothing where a task's own code decides about them."""
        tasks = self.loaded["tasks"]
        if not all(map(_tells_metrics, tasks.values())):
            return ()
        found: dict[str, None] = {}
        for name, task in tasks.items():
            filters = [one.name for one in task._filters]
            found |= dict.fromkeys(_named(name, metric, one) for metric in task.aggregation() for one in filters)
        every = {one.name: None for task in tasks.values() for one in task._filters}
        for name, group in (self.loaded.get("groups") or {}).items():
            for one in group.aggregate_metric_list or ():
                found |= dict.fromkeys(_named(name, one.metric, chosen) for chosen in one.filter_list or every)
        return tuple(found)

    def sizes(self) -> Mapping[str, int]:
        """Task -> how many questions it has, or are asked of it."""
        tasks = self.loaded["tasks"]
        found = {name: len(list(task.eval_docs)) for name, task in tasks.items()}
        return {name: min(count, self.limit or count) for name, count in found.items()}

    def ask(self, live: LiveModel, places: Mapping[str, Sequence[int]]) -> Mapping[str, Items]:
        """What the model as it is now makes of these questions, for the metrics that are means over questions."""
        found = self._asked(live, places)
        scores = _scores(found)
        items: dict[str, Items] = {}
        for task, logged in found.get("samples", {}).items():
            by_filter: dict[str, dict[int, Mapping[str, Any]]] = {}
            for one in logged:
                by_filter.setdefault(str(one.get("filter", "none")), {})[int(one["doc_id"])] = one
            for name, score in scores.items():
                of, _, metric = name.partition("/")
                metric, _, chosen = metric.partition(",")
                answers = by_filter.get(chosen or "none", {})
                values = [answers[at].get(metric) for at in places[task] if at in answers] if of == task else []
                if len(values) != len(places[task]) or not all(isinstance(v, int | float | bool) for v in values):
                    continue
                one_by_one = Items(np.array(values, np.float64), np.ones(len(values)), score["higher_is_better"], task)
                if math.isclose(one_by_one.value, score["value"], rel_tol=1e-9, abs_tol=1e-12):  # a mean it is
                    items[name] = one_by_one
        return items

    def _asked(self, live: LiveModel, places: Mapping[str, Sequence[int]] | None) -> dict[str, Any]:
        if live.task != CAUSAL or live.tokenizer is None:
            what = f"{live.kind}: {rows_of(live.model)}" if live.task != CAUSAL else "it has no tokenizer"
            raise DataError(f"lm-eval's tasks need a causal model, but {what}")
        refuse_foresight(live)
        what = f"running {', '.join(self.names)} in batches of {self.batch_size}"
        with one_thread(live.device), memory_told(what), _quiet(self.show_bars, self.trusted), nan_refused(live):
            return self._run(live, places)

    def _run(self, live: LiveModel, places: Mapping[str, Sequence[int]] | None) -> dict[str, Any]:
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM

        with _seeded():
            for task in self.loaded["tasks"].values():
                task.set_fewshot_seed(seed=SEEDS["fewshot"])
            lm = HFLM(
                pretrained=live.model, tokenizer=live.tokenizer, batch_size=self.batch_size, max_length=live.max_length
            )
            try:
                found: dict[str, Any] = evaluator.evaluate(
                    lm=lm,
                    task_dict=self.loaded,
                    limit=self.limit if places is None else None,
                    samples=None if places is None else {name: list(some) for name, some in places.items()},
                    # No standard errors where they are worked out from the items.
                    bootstrap_iters=BOOTSTRAP if places is None else 0,
                    log_samples=self.log_samples or places is not None,
                    apply_chat_template=self.chat_template,
                    fewshot_as_multiturn=self.chat_template,
                    confirm_run_unsafe_code=self.trusted,
                )
            except DarekitError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError, AssertionError, IndexError) as error:
                raise DataError(
                    f"lm-eval failed on {', '.join(self.names)}: {type(error).__name__}: {_first_line(error)}"
                ) from error
        return found

    def _details(self, found: Mapping[str, Any]) -> dict[str, Any]:
        kept = ("results", "groups", "versions", "configs", "n-shot", "n-samples", "higher_is_better")
        return {key: plain(found[key]) for key in kept if key in found} | {
            "lm_eval": version("lm_eval"),
            "seeds": SEEDS,
            "limit": self.limit,
            "chat_template": self.chat_template,
            "bootstrap": BOOTSTRAP,
        }

    def identity(self) -> dict[str, Any]:
        """What decides about the scores, in JSON-able form."""
        tasks = self.loaded["tasks"]
        return {
            "lm_eval": version("lm_eval"),
            "tasks": {name: plain(task.dump_config()) for name, task in tasks.items()},
            "names": list(self.names),
            # changes with a local file's content, as `datasets` sees it
            "data": {
                name: {split: getattr(rows, "_fingerprint", None) for split, rows in task.dataset.items()}
                for name, task in tasks.items()
                if isinstance(getattr(task, "dataset", None), Mapping)
            },
            "limit": self.limit,
            "chat_template": self.chat_template,
        }


def load_tasks(
    names: Sequence[str],
    *,
    include: Sequence[Path] = (),
    limit: int | None = None,
    batch_size: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    confirm: Confirm | None = None,
    say: Say | None = None,
    words: Words = OPTIONS,
) -> Harness:
    """Names of tasks, groups and tags -> a judge. The data sets are loaded here, local ones without any network.

    Args:
        names: lm-eval's names, the paper's (MATH), or those of local task files.
        include: folders with local task files (YAML); `data_files` in them are relative to the file.
        limit: questions per task.
        batch_size: questions at once.
        num_fewshot: examples before each question; the task's own number where not given.
        chat_template: ask as the tokenizer's chat template says.
        confirm: asked with the names of the tasks that execute what the model writes; None: refused.
        say: receives notes.
        words: how messages say what they advise.

    Raises:
        RecipeError: there is no such task; a local task file cannot be read.
        PlanError: a task would execute generated code without consent.
        CheckpointError: a data set is neither cached nor available from the network.
        Unsupported: lm-eval is not installed.
    """
    found = find_tasks(names, include=include, confirm=confirm, say=say, words=words)
    manager, resolved, unsafe = found.manager, list(found.names), found.unsafe
    with _quiet(bars=False, trusted=bool(unsafe)), _uncounted():
        try:
            loaded = manager.load(resolved)
        except DarekitError:
            raise
        except Exception as error:  # lm-eval's, datasets', the Hub's, a task file's own
            raise _load_error(resolved, found.leaves, manager.task_index, error, words) from error
        _check_metrics(loaded)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            # As lm-eval's own command: 0 in a task's file means that its questions say all, and stays.
            if own is None or (num_fewshot is not None and own != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return Harness(
        tuple(resolved), loaded, limit, batch_size or BATCH_SIZE, num_fewshot, chat_template, bool(unsafe)
    )  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Tasks that there are, not loaded yet: names as lm-eval knows them, the tasks behind groups and tags, and whether
    one of them executes what the model writes."""

    manager: Any
    names: tuple[str, ...]
    leaves: tuple[str, ...]
    unsafe: bool


def find_tasks(
    names: Sequence[str],
    *,
    include: Sequence[Path] = (),
    confirm: Confirm | None = None,
    say: Say | None = None,
    words: Words = OPTIONS,
) -> Found:
    """Look tasks up without their data: no network. Arguments as those of `load_tasks`.

    Raises:
        DarekitError: as `load_tasks`, but for what is wrong with the data.
    """
    if find_spec("lm_eval") is None:
        raise Unsupported("tasks need EleutherAI's lm-eval: pip install 'darekit[eval]'")
    if not names:
        raise RecipeError("tasks is empty; name at least one, as gsm8k")
    for folder in include:
        if not folder.is_dir():
            raise RecipeError(f"{folder} is not a folder; {words.include} takes a folder with task files (YAML)")
    for name in names:
        _refuse_elsewhere(name)
    with _quiet(bars=False, trusted=False):
        manager, resolved = _find(names, [folder.resolve() for folder in include], say or (lambda line: None), words)
        leaves = _leaves(resolved, manager.task_index)
        _prepare_local(leaves, manager.task_index, include)
    unsafe = [name for name in leaves if (manager.task_index[name].cfg or {}).get("unsafe_code")]
    if unsafe and not (confirm and confirm(unsafe)):
        raise PlanError(
            f"{', '.join(unsafe)} executes code that the model writes, with your permissions on this machine; "
            f"if you accept that (preferably in a container), use {words.trust}"
        )
    return Found(manager, tuple(resolved), tuple(leaves), bool(unsafe))


def _find(names: Sequence[str], include: Sequence[Path], say: Say, words: Words = OPTIONS) -> tuple[Any, list[str]]:
    """A task manager that knows all names, and the names as it knows them.

    Its full index costs 15 CPU seconds (14,683 tasks, lm-eval 0.4.13); so first only the folders that are likely.
    """
    import lm_eval.tasks as tasks

    root = Path(tasks.__file__).parent
    wanted = [ALIASES.get(name.lower(), name) for name in names]
    folders = [root / name for name in dict.fromkeys(wanted) if (root / name).is_dir()]
    likely = [*folders, *([root / SHARED_FOLDER] if folders else []), *include]
    manager: Any = None
    if likely:
        manager = tasks.TaskManager(include_path=[str(path) for path in likely], include_defaults=False)
    if manager is None or not all(_known(name, manager.task_index) for name in wanted):
        manager = tasks.TaskManager(include_path=[str(path) for path in include] or None)
    lower = {name.lower(): name for name in manager.all_tasks}
    resolved = []
    for name, want in zip(names, wanted, strict=True):
        found = want if want in manager.task_index else lower.get(want.lower())
        if found is None:
            raise _unknown(name, manager.all_tasks, include, words)
        if found != name:
            say(f"{name} is lm-eval's {found}")
        resolved.append(found)
    return manager, list(dict.fromkeys(resolved))


def _known(name: str, index: Mapping[str, Any]) -> bool:
    """Whether the task and all that it consists of are in the index."""
    if name not in index:
        return False
    return all(child in index and _known(child, index) for child in _children(index[name]))


def _children(entry: Any) -> list[str]:
    """Names of what a group or tag consists of."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return []
    members = (entry.cfg or {}).get("task") or []
    names = [m if isinstance(m, str) else str(m.get("task") or m.get("group")) for m in members]
    return [name for name in names if name != entry.name]


def _leaves(names: Sequence[str], index: Mapping[str, Any]) -> list[str]:
    """The tasks themselves behind names of groups and tags."""
    found: dict[str, None] = {}
    for name in names:
        children = [child for child in _children(index[name]) if child in index]
        found |= dict.fromkeys(_leaves(children, index) if children else [name])
    return list(found)


def _refuse_elsewhere(name: str) -> None:
    elsewhere = JUDGED_ELSEWHERE.get(name.lower().replace("_", "").replace("-", ""))
    if elsewhere:
        raise RecipeError(f"{name} {elsewhere}")


def _unknown(name: str, known: Sequence[str], include: Sequence[Path], words: Words) -> RecipeError:
    close = difflib.get_close_matches(name.lower(), known, 5, 0.7)
    hint = f"; close: {', '.join(close)}" if close else ""
    where = f" and {', '.join(map(str, include))}" if include else f"; local task files are found with {words.include}"
    return RecipeError(f"there is no task {name!r}{hint}. Known tasks are those of lm-eval {version('lm_eval')}{where}")


def _prepare_local(leaves: Sequence[str], index: Mapping[str, Any], include: Sequence[Path]) -> None:
    """Local task files say where their data are relative to themselves; `datasets` would look in the working folder."""
    from lm_eval.tasks._yaml_loader import load_yaml

    roots = [folder.resolve() for folder in include]
    for name in leaves:
        entry = index[name]
        path = None if entry.yaml_path is None else Path(entry.yaml_path).resolve()
        if path is None or not any(path.is_relative_to(root) for root in roots):
            continue
        try:
            config = load_yaml(path, resolve_func=True)
        except Exception as error:  # yaml's, or that of a Python file beside it
            raise RecipeError(f"{path} cannot be read: {type(error).__name__}: {_first_line(error)}") from error
        arguments = config.get("dataset_kwargs")
        if isinstance(arguments, dict) and "data_files" in arguments:
            arguments["data_files"] = _located(arguments["data_files"], path)
        entry.yaml_path, entry.cfg = None, config


def _located(files: Any, yaml: Path) -> Any:
    if isinstance(files, dict):
        return {split: _located(value, yaml) for split, value in files.items()}
    if isinstance(files, list):
        return [_located(value, yaml) for value in files]
    text = str(files)
    if "://" in text:
        return text
    found = yaml.parent / text
    if not any(character in text for character in "*?[") and not found.exists():
        raise CheckpointError(f"{yaml} names the data file {text}, but {found} does not exist")
    return str(found)


def _check_metrics(loaded: Any) -> None:
    for name, task in loaded["tasks"].items():
        for metric, function in getattr(task, "_metric_fn_list", {}).items():
            if function is None and getattr(task.config, "process_results", None) is None:
                raise CheckpointError(
                    f"task {name} uses the metric {metric!r}, which is neither in lm-eval nor available "
                    "from the Hub; use acc, exact_match, or your own !function"
                )


def _load_error(
    names: Sequence[str], leaves: Sequence[str], index: Mapping[str, Any], error: BaseException, words: Words
) -> DarekitError:
    chain: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in chain:
        chain.append(step)
        step = step.__cause__ or step.__context__
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    sources = dict.fromkeys(str((index[leaf].cfg or {}).get("dataset_path")) for leaf in leaves)
    what, said = ", ".join(names), f"{type(error).__name__}: {_first_line(error)}"
    if kinds & set(NETWORK) or "couldn't reach" in str(error).lower() or "offline" in str(error).lower():
        return CheckpointError(
            f"{what} needs data from the Hub ({', '.join(sources)}) that is not in the local cache, and the Hub cannot "
            f"be reached ({said}). Run it once with network access, or use a local task file ({words.include})"
        )
    if "ModuleNotFoundError" in kinds or "ImportError" in kinds:
        return Unsupported(f"{what} needs more than lm-eval alone ({said}); for MATH: pip install 'lm-eval[math]'")
    return RecipeError(f"{what} cannot be loaded: {said}")


def _tells_metrics(task: Any) -> bool:
    """Whether a task has the metrics that its file lists, and no others: its own functions may return any."""
    from lm_eval.api.task import ConfigurableTask

    functions = getattr(task, "_metric_fn_list", {}).values()
    return (
        type(task) is ConfigurableTask
        and task.config.process_results is None
        and all(str(getattr(one, "__module__", "")).startswith("lm_eval.") for one in functions)
    )


def _named(task: str, metric: str, chosen: str) -> str:
    """A score's name. `chosen`: the filter."""
    return f"{task}/{metric}" + (f",{chosen}" if chosen != "none" else "")


def _scores(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    scores: dict[str, dict[str, Any]] = {}
    for task, metrics in found["results"].items():
        higher = found.get("higher_is_better", {}).get(task, {})
        for key, value in metrics.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str | bool):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter_name}")
            scores[_named(task, metric, filter_name)] = {
                "value": float(value),
                "stderr": None if stderr is None or isinstance(stderr, str) else float(stderr),
                "higher_is_better": higher.get(metric, True),
            }
    return scores


@contextmanager
def _quiet(bars: bool, trusted: bool) -> Iterator[None]:
    """lm-eval's talk kept from the terminal: its prints, warnings and, unless `bars`, its progress bars."""
    environment = {"TOKENIZERS_PARALLELISM": "false", "DISABLE_MULTIPROC": "1"}
    environment |= {"HF_ALLOW_CODE_EVAL": "1"} if trusted else {}
    before = {name: os.environ.get(name) for name in environment}
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    os.environ.update(environment)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(quiet_transformers())
            stack.enter_context(contextlib.redirect_stdout(sys.stderr if bars else io.StringIO()))
            if not bars:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _uncounted() -> Iterator[None]:
    """Loading a local file is no business of others: `datasets` reports even that to a counter on the network."""
    import datasets

    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


@contextmanager
def _seeded() -> Iterator[None]:
    """The seeds of lm-eval's own command; what others had drawn so far goes on afterwards."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


def plain(value: Any) -> Any:
    """JSON-able: functions become their names."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if hasattr(value, "item"):
        return value.item()
    return getattr(value, "__qualname__", None) or str(value)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
