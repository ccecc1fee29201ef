# SPDX-License-Identifier: Apache-2.0
"""What a judge is, and how it is written down: data, a command, a Python function, tasks of lm-eval, or several.

::

    data: test.jsonl                  # rows as in docs/evaluating.md; also batch_size, max_length, limit
    command: [python, judge.py]       # gets a model directory, prints JSON
    python: judge.py:score            # gets the live model, returns numbers
    tasks: [gsm8k]                    # lm-eval; also include, limit, batch_size, num_fewshot, chat_template, trust_code
    math: {data: math.jsonl}          # several by name: scores are called math/exact_match
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from darekit.errors import DarekitError, RecipeError
from darekit.evaluation.examples import BATCH_SIZE, METRICS, Examples, form_of
from darekit.evaluation.harness import JUDGE_KEYS, find_tasks, load_tasks
from darekit.evaluation.outside import Command, Function, command_of, function_judge, function_of
from darekit.evaluation.scores import Score
from darekit.live.data import read_rows
from darekit.live.models import LiveModel
from darekit.wording.progress import Progress

__all__ = ["Judge", "Score", "judge_of"]

KEYS = {
    "data": ("data", "batch_size", "max_length", "limit", "split"),
    "command": ("command",),
    "python": ("python",),
    "tasks": ("tasks", "include", "limit", "batch_size", "num_fewshot", "chat_template", "trust_code"),
}
DATA_FILES = (".jsonl", ".json")


class Judge(Protocol):
    """Gives a model that runs its scores, by name."""

    def __call__(self, live: LiveModel, /) -> Mapping[str, Score]:
        """Scores of the model as it is now; it may have other weights at the next call."""
        ...


@dataclass(frozen=True)
class Several:
    """Judges by name; each score's name begins with its judge's."""

    judges: Mapping[str, Judge]

    def __call__(self, live: LiveModel) -> Mapping[str, Score]:
        """Every judge's scores, in order."""
        return self._named({name: judge(live) for name, judge in self.judges.items()})

    def judge_directory(self, folder: Path) -> Mapping[str, Score]:
        """Every judge's scores, where all of them judge a directory."""
        return self._named({name: judge.judge_directory(folder) for name, judge in self.judges.items()})  # type: ignore[attr-defined]

    def score_names(self) -> tuple[str, ...]:
        """Names of the scores that there can be; nothing where one of the judges does not know its own."""
        known = {name: names_of(judge) for name, judge in self.judges.items()}
        if not all(known.values()):
            return ()
        return tuple(f"{name}/{score}" for name, scores in known.items() for score in scores)

    def _named(self, found: Mapping[str, Mapping[str, Score]]) -> dict[str, Score]:
        return {f"{name}/{score}": value for name, scores in found.items() for score, value in scores.items()}

    def identity(self) -> dict[str, Any]:
        """What decides about the scores, in JSON-able form."""
        return {name: identity_of(judge) for name, judge in self.judges.items()}


def identity_of(judge: Judge) -> Any:
    """What decides about a judge's scores, in JSON-able form; two runs with equal ones need not both be made."""
    return judge.identity() if hasattr(judge, "identity") else repr(judge)


def names_of(judge: Judge) -> tuple[str, ...]:
    """Names of the scores that a judge can have, one of which may be missing (a regressor has no accuracy); nothing
    where only a run shows them."""
    return judge.score_names() if hasattr(judge, "score_names") else ()


def judges_directory(judge: Judge) -> bool:
    """Whether it needs no live model: it would only write it to a folder."""
    if isinstance(judge, Several):
        return all(map(judges_directory, judge.judges.values()))
    return isinstance(judge, Command) or (isinstance(judge, Function) and judge.takes_directory)


def judge_of(
    spec: Mapping[str, Any] | str | Sequence[Any] | Callable[[Any], Any],
    *,
    search: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Judge:
    """What is written down -> a judge. Files are read and functions loaded here, so that mistakes are found at once.

    Args:
        spec: a mapping as at the top of this file, or short: a text that ends in .jsonl (data), is `file.py:function`
            or `module:function` (Python), or else a command line; a list of words (a command); a Python function.
        search: folders where relative files are looked up after the working directory.
        progress: called with (rows done, rows in all) by judges of data.

    Raises:
        RecipeError: it does not describe a judge.
        DarekitError: its file cannot be read, its tasks do not exist.
    """
    match spec:
        case str():
            return judge_of(_short_form(spec), search=search, progress=progress)
        case Mapping():
            return _from_mapping(spec, search, progress)
        case Sequence() if spec and all(isinstance(word, str) for word in spec):
            return command_of(spec, search=search)
        case _ if callable(spec):
            return function_judge(spec, getattr(spec, "__name__", "given"))
    raise RecipeError(f"a judge must be one of {', '.join(KEYS)}, or several by name; found {spec!r}")


def check_judge(spec: Any, *, search: Sequence[Path] = ()) -> Judge | None:
    """Complain about a judge that cannot be, without the data of lm-eval's tasks (which may have to be downloaded) ->
    the judge; None of tasks.

    Raises:
        DarekitError: as `judge_of`.
    """
    if not isinstance(spec, Mapping) or "tasks" not in spec:
        return judge_of(spec, search=search)
    _kind_of(spec)
    find_tasks(_listed(spec["tasks"]), **_found_by(spec, search))
    _asked_as(spec)
    return None


def metrics_of(spec: Any, *, search: Sequence[Path] = ()) -> tuple[str, ...]:
    """Names of the scores that a judge of data can have, by the first row of its file (all there are, where that is not
    here); of other judges nothing: only a run shows them."""
    if not isinstance(spec, Mapping) or not isinstance(spec.get("data"), str):
        return ()
    path = next((one for folder in (Path.cwd(), *search) if (one := folder / spec["data"]).is_file()), None)
    if path is not None:
        with suppress(DarekitError):  # told when the judge is made
            return METRICS[form_of(read_rows(path, limit=1)[0])]
    return tuple(dict.fromkeys(name for names in METRICS.values() for name in names))


def _short_form(text: str) -> dict[str, str]:
    if Path(text).suffix in DATA_FILES:
        return {"data": text}
    module, _, function = text.rpartition(":")
    if module and function.isidentifier() and " " not in module:
        return {"python": text}
    return {"command": text}


def _from_mapping(spec: Mapping[str, Any], search: Sequence[Path], progress: Progress | None) -> Judge:
    if not any(kind in spec for kind in KEYS):
        nested = {name: value for name, value in spec.items() if isinstance(value, Mapping | str | list | tuple)}
        if not spec or len(nested) < len(spec):
            raise RecipeError(f"a judge must be one of {', '.join(KEYS)}, or several by name; found {dict(spec)}")
        for name, value in spec.items():
            near = difflib.get_close_matches(str(name), KEYS, 1, 0.75)
            if near and not isinstance(value, Mapping):
                raise RecipeError(f"a judge has no key {name!r}; did you mean {near[0]!r}?")
        return Several({str(n): judge_of(value, search=search, progress=progress) for n, value in nested.items()})
    return _MAKERS[_kind_of(spec)](spec, search, progress)


def _kind_of(spec: Mapping[str, Any]) -> str:
    """The one kind of judge that a mapping says, with no key that it does not take."""
    kinds = [kind for kind in KEYS if kind in spec]
    if len(kinds) > 1:
        raise RecipeError(f"a judge has both {' and '.join(kinds)}; give each a name: {{a: {{data: ...}}, b: ...}}")
    for key in spec:
        if key not in KEYS[kinds[0]]:
            near = difflib.get_close_matches(str(key), KEYS[kinds[0]], 1)
            hint = f"; did you mean {near[0]!r}" if near else ""
            raise RecipeError(f"a judge of {kinds[0]} has no key {key!r}{hint}. It takes {', '.join(KEYS[kinds[0]])}")
    return kinds[0]


def _of_data(spec: Mapping[str, Any], search: Sequence[Path], progress: Progress | None) -> Judge:
    limit, batch_size, max_length = (_count(spec, key) for key in ("limit", "batch_size", "max_length"))
    given = spec["data"]
    path = next((folder / given for folder in (Path.cwd(), *search) if (folder / given).is_file()), Path(given))
    source = path if path.is_file() else str(given)
    rows = read_rows(source, limit=limit, split=str(spec.get("split", "test")))
    return Examples(rows, str(given), batch_size or BATCH_SIZE, max_length, progress)


def _of_tasks(spec: Mapping[str, Any], search: Sequence[Path], progress: Progress | None) -> Judge:
    return load_tasks(_listed(spec["tasks"]), **_found_by(spec, search), **_asked_as(spec))


def _found_by(spec: Mapping[str, Any], search: Sequence[Path]) -> dict[str, Any]:
    """Where tasks are looked up, and who agrees to what they execute."""
    trusted = _yes(spec, "trust_code")
    include = [_folder(name, search) for name in _listed(spec.get("include", ()))]
    return {"include": include, "confirm": lambda names: trusted, "words": JUDGE_KEYS}


def _asked_as(spec: Mapping[str, Any]) -> dict[str, Any]:
    """How tasks are asked."""
    limit, batch_size = _count(spec, "limit"), _count(spec, "batch_size")
    shots = spec.get("num_fewshot")
    if shots is not None and (type(shots) is not int or shots < 0):
        raise RecipeError(f"a judge's num_fewshot must be a whole number, found {shots!r}")
    chat_template = _yes(spec, "chat_template")
    return {"limit": limit, "batch_size": batch_size, "num_fewshot": shots, "chat_template": chat_template}


def _yes(spec: Mapping[str, Any], key: str) -> bool:
    value = spec.get(key, False)
    if type(value) is not bool:
        raise RecipeError(f"a judge's {key} must be true or false, found {value!r}")
    return value


def _listed(value: Any) -> list[str]:
    """`a,b`, `a` or a list -> a list of names."""
    parts = str(value).split(",") if isinstance(value, str | Path) else list(value)
    return [name for part in parts if (name := str(part).strip())]


def _folder(name: str, search: Sequence[Path]) -> Path:
    return next((folder / name for folder in (Path.cwd(), *search) if (folder / name).is_dir()), Path(name))


def _count(spec: Mapping[str, Any], key: str) -> int | None:
    value = spec.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise RecipeError(f"a judge's {key} must be a whole number above 0, found {value!r}")
    return value


_MAKERS: Mapping[str, Callable[[Mapping[str, Any], Sequence[Path], Progress | None], Judge]] = {
    "data": _of_data,
    "command": lambda spec, search, progress: command_of(spec["command"], search=search),
    "tasks": _of_tasks,
    "python": lambda spec, search, progress: function_of(str(spec["python"]), search=search),
}
