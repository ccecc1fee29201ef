# SPDX-License-Identifier: Apache-2.0
"""Whose code it was: what people's own functions (judges, methods) consist of, and a digest of it.

Only the files of their own folder count, and no library.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any


def digest_of_code(function: Callable[..., Any]) -> str:
    """32 hexadecimal digits of the text of a function's file and of the modules of its own folder that it imports; of a
    function without a file (typed into a session) of its own text, or of its compiled code."""
    function = inspect.unwrap(function)
    digest = hashlib.blake2b(digest_size=16)
    try:
        path = Path(inspect.getsourcefile(function) or "")
        files = sources_of(path) if path.is_file() else []
    except (TypeError, OSError):
        files = []
    for file in files:
        digest.update(os.path.relpath(file, path.parent).encode() + b"\0" + file.read_bytes() + b"\0")
    if not files:
        digest.update(_own_text(function))
    return digest.hexdigest()


def _own_text(function: Callable[..., Any]) -> bytes:
    try:
        return inspect.getsource(function).encode()
    except (TypeError, OSError):
        code = getattr(function, "__code__", None)
        return repr(function).encode() if code is None else _compiled(code)


def _compiled(code: CodeType) -> bytes:
    inner = [one for one in code.co_consts if isinstance(one, CodeType)]
    constants = [one for one in code.co_consts if not isinstance(one, CodeType)]
    return code.co_code + repr((constants, code.co_names)).encode() + b"".join(map(_compiled, inner))


def sources_of(path: Path) -> list[Path]:
    """A Python file, and the modules that it imports from its own folder (of a package: from anywhere in it), and
    what those import there, in order of names. Imports within functions count; names made while running do not."""
    top = _top(path)
    if top.name in ("site-packages", "dist-packages"):  # a module that is installed alone: beside it are libraries
        return [path]
    found, waiting = {path}, [path]
    while waiting:
        for one in _imported(waiting.pop(), top):
            if one not in found:
                found.add(one)
                waiting.append(one)
    return sorted(found)


def _top(path: Path) -> Path:
    """The outermost package that a file is in; its folder where it is in none."""
    folder = path.parent
    while (folder / "__init__.py").is_file() and (folder.parent / "__init__.py").is_file():
        folder = folder.parent
    return folder


def _imported(path: Path, top: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # loading it says what is wrong
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(_starts(top), alias.name)
        elif isinstance(node, ast.ImportFrom):
            above = path.parents[node.level - 1] if 0 < node.level <= len(path.parents) else None
            starts = [above] if above is not None and above.is_relative_to(top) else _starts(top)
            for alias in node.names:  # what is imported may be a module too
                yield from _files(starts, ".".join(filter(None, (node.module, alias.name))))


def _starts(top: Path) -> list[Path]:
    """Where an absolute name may begin: beside the file, or (a package by its own name) beside the package."""
    return [top, top.parent] if (top / "__init__.py").is_file() else [top]


def _files(starts: list[Path], dotted: str) -> Iterator[Path]:
    """The files of a module and of the packages around it, as far as they are there."""
    for start in starts:
        place = start
        for word in dotted.split("."):
            place /= word
            if start != starts[0] and not place.is_relative_to(starts[0]):
                break  # beside the package: another one
            for file in (place.with_name(f"{word}.py"), place / "__init__.py"):
                if file.is_file():
                    yield file
