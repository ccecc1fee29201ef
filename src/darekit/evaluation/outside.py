# SPDX-License-Identifier: Apache-2.0
"""Judges of other people: a command that gets a model directory, a Python function that gets the live model."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from darekit.code import sources_of
from darekit.errors import CheckpointError, DarekitError, DataError, RecipeError
from darekit.evaluation.items import Items
from darekit.evaluation.scores import Score, scores_of
from darekit.live.models import LiveModel
from darekit.live.skeletons import quiet_transformers

MODEL = "{model}"  # stands for the model directory in a command
TOLD = 15  # last lines of a failed command that an error quotes
DIRECTORY = ("directory", "folder", "path")  # a function whose first parameter is called so gets a directory


@dataclass(frozen=True)
class Command:
    """The judge of `{command: [...]}`: run with a model directory, its standard output is JSON."""

    words: tuple[str, ...]

    def __call__(self, live: LiveModel) -> Mapping[str, Score]:
        """Scores of the model as it is now, written to a temporary folder."""
        with written(live) as folder:
            return self.judge_directory(folder)

    def identity(self) -> dict[str, Any]:
        """What decides about the scores, in JSON-able form: the words, and what is in the files that they name; of
        Python files also what is in the modules beside them that they import."""
        files = {word: _digests(Path(word)) for word in self.words[1:] if Path(word).is_file()}
        return {"command": list(self.words), "files": files}

    def judge_directory(self, folder: Path) -> dict[str, Score]:
        """Scores of a model directory.

        Raises:
            DataError: the command fails, or does not print numbers.
        """
        words = [word.replace(MODEL, str(folder)) for word in self.words]
        if words == list(self.words):
            words.append(str(folder))
        who = f"the judge `{shlex.join(self.words)}`"
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except OSError as error:
            raise DataError(f"{who} cannot be run: {error.strerror or error}") from error
        if done.returncode != 0:
            tail = "".join(f"\n  {line}" for line in (done.stderr or done.stdout).strip().splitlines()[-TOLD:])
            how = f"failed with exit code {done.returncode}" if done.returncode > 0 else "was killed"
            raise DataError(f"{who} {how}:{tail or ' it printed nothing'}")
        return scores_of(_json_of(done.stdout, who), who)


@dataclass(frozen=True)
class Function:
    """The judge of `{python: "module:function"}`."""

    function: Callable[..., Any]
    name: str
    takes_directory: bool
    items: int = 0  # how many it has, where it can be asked for some

    def sizes(self) -> Mapping[str, int]:
        """Its items, where it says how many it has."""
        return {"": self.items} if self.items else {}

    def ask(self, live: LiveModel, places: Mapping[str, Sequence[int]]) -> Mapping[str, Items]:
        """What the model as it is now makes of these items.

        Raises:
            DataError: the function fails, or does not return a number for each of them.
        """
        given = places[""]
        found = self._called(live, items=list(given))
        who = f"the judge {self.name}, asked for {len(given)} items,"
        named = found if isinstance(found, Mapping) else {"score": found}
        return {str(name): _numbers(values, len(given), f"{who} returned {name}") for name, values in named.items()}

    def __call__(self, live: LiveModel) -> Mapping[str, Score]:
        """Scores of the model as it is now."""
        if self.takes_directory:
            with written(live) as folder:
                return self.judge_directory(folder)
        return self._call(live)

    def identity(self) -> dict[str, Any]:
        """What decides about the scores, in JSON-able form: the name, and the text of the function's file and of the
        modules of its own folder that it imports."""
        try:
            digest: Any = _digests(Path(inspect.getsourcefile(inspect.unwrap(self.function)) or ""))
        except (TypeError, OSError):
            digest = _digest(repr(self.function).encode())  # built in, or typed into a session: new with each run
        return {"python": self.name, "digest": digest}

    def judge_directory(self, folder: Path) -> dict[str, Score]:
        """Scores of a model directory, for a function that takes one."""
        return self._call(folder)

    def _call(self, given: Any) -> dict[str, Score]:
        return scores_of(self._called(given), f"the judge {self.name}")

    def _called(self, given: Any, **more: Any) -> Any:
        try:
            return self.function(given, **more)
        except DarekitError:
            raise
        except Exception as error:  # whatever other people's code may raise
            where = _place_of(error)
            said = f"{type(error).__name__}: {error}".rstrip(": ")
            raise DataError(f"the judge {self.name} failed{where}: {said}") from error


def _numbers(values: Any, count: int, who: str) -> Items:
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.shape != (count,) or not np.isfinite(found).all():
        raise DataError(f"{who}: {repr(values)[:80]}; expected a finite number for each item, in their order")
    return Items(found, np.ones(count))


def command_of(words: str | Sequence[str], *, search: Sequence[Path]) -> Command:
    """A command line, or its words, as a judge; words that name a file of a folder in `search` become its path.

    Raises:
        RecipeError: no word, or no such program.
    """
    split = shlex.split(words) if isinstance(words, str) else [str(word) for word in words]
    if not split:
        raise RecipeError("the judge's command is empty; write the program and its arguments, as [python, judge.py]")
    found = [str(_found(word, search) or word) for word in split]
    if found[0] == "python" and shutil.which("python") is None:
        found[0] = sys.executable
    if shutil.which(found[0]) is None:
        raise RecipeError(f"the judge's command begins with {split[0]!r}, but there is no such program")
    return Command(tuple(found))


def function_of(name: str, *, search: Sequence[Path]) -> Function:
    """`module:function` or `judge.py:function` as a judge. The file's folder can be imported from while it is loaded.

    Raises:
        RecipeError: there is no such function, or it takes more than one argument.
    """
    module_name, _, function_name = name.rpartition(":")
    if not module_name or not function_name.isidentifier():
        raise RecipeError(f"judge {name!r}: expected module:function or judge.py:function")
    if module_name.endswith(".py"):
        path = _found(module_name, search)
        if path is None:
            where = ", ".join(map(str, (Path.cwd(), *search)))
            raise CheckpointError(f"judge {name!r}: there is no file {module_name} in {where}")
        module = _load(path, name)
    else:
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise RecipeError(f"judge {name!r}: {error}; to name a file, write judge.py:function") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        others = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise RecipeError(
            f"judge {name!r}: {module_name} has no function {function_name!r}; it has {', '.join(others) or 'none'}"
        )
    return function_judge(function, name)


def function_judge(function: Callable[..., Any], name: str) -> Function:
    """A Python function as a judge: it gets the live model, or a directory where its parameter is called so."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if parameters and len(required) > 1:
        raise RecipeError(f"judge {name!r} expects {', '.join(required)}, but it gets a single argument, the model")
    first = parameters[0] if parameters else None
    directory = first is not None and (first.name in DIRECTORY or first.annotation is Path)
    return Function(function, name, directory, _count_of(function, parameters, directory))


def _count_of(function: Any, parameters: Sequence[inspect.Parameter], directory: bool) -> int:
    """How many items a function has that takes `items`: its attribute of that name. 0: it judges as a whole."""
    if directory or not any(parameter.name == "items" for parameter in parameters[1:]):
        return 0
    count = getattr(function, "items", None)
    return count if type(count) is int and count > 0 else 0


@contextmanager
def written(live: LiveModel) -> Iterator[Path]:
    """The live model as a model directory in a temporary folder.

    In the checkpoint's own dtype where every value survives that, as those of a merge do; else as it computes.
    """
    import torch

    own = getattr(torch, str(live.config.get("dtype") or live.config.get("torch_dtype") or "float32"), None)
    model = live.model
    before = model.config.dtype
    state = model.state_dict()
    if isinstance(own, torch.dtype) and own != before:
        narrow = {name: tensor.to(own) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        if all(torch.equal(narrow[name].to(tensor.dtype), tensor) for name, tensor in state.items()):
            state = narrow
    with tempfile.TemporaryDirectory(prefix="darekit-") as name, quiet_transformers():
        folder = Path(name)
        model.save_pretrained(folder, state_dict=state)
        if live.tokenizer is not None:
            live.tokenizer.save_pretrained(folder)
        yield folder


def _digests(path: Path) -> dict[str, str]:
    """Digest of a file and, where it is Python, of the modules of its folder that it imports, by name."""
    files = sources_of(path) if path.suffix == ".py" else [path]
    return {os.path.relpath(file, path.parent): _digest(file.read_bytes()) for file in files}


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _json_of(text: str, who: str) -> Any:
    """All of the output, or else its last line that is not empty."""
    lines = [line for line in text.splitlines() if line.strip()]
    for candidate in (text, lines[-1] if lines else ""):
        try:
            return json.loads(candidate)
        except json.JSONDecodeError:
            continue
    shown = lines[-1][:100] if lines else "nothing"
    raise DataError(f'{who} printed {shown}; expected JSON such as {{"accuracy": 0.5}} on its last line')


def _found(name: str, search: Sequence[Path]) -> Path | None:
    """A relative name that is a file here or in a folder of `search`; links stay, as an environment's python."""
    for folder in (Path.cwd(), *search):
        if (folder / name).is_file():
            return (folder / name).absolute()
    return None


def _load(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"darekit_judge_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        sys.modules[spec.name] = module  # dataclasses and pickle look themselves up there
        spec.loader.exec_module(module)
    except Exception as error:  # whatever other people's code may raise
        raise RecipeError(f"judge {name!r}: {path} cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _place_of(error: BaseException) -> str:
    """File and line where other people's code stood."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename != __file__:
            place = f" at {code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
