# SPDX-License-Identifier: Apache-2.0
"""JSON from strangers: every way in which it can be broken is one line that names the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from darekit.checkpoints.files import InputFile
from darekit.errors import CheckpointError

DOCUMENT_LIMIT = 100_000_000  # bytes; the largest index files of published models have some 10 MB

BOM = b"\xef\xbb\xbf"  # what editors on Windows put before UTF-8 text

# Brackets, braces and commas in one document. The format allows 100 MB of header, which would be 1.7 million empty
# tensors: 11 s and 1 GB to parse. A tensor has about 8 such characters; the largest models have 0.1 million tensors.
MARK_LIMIT = 1_000_000


def parse_object(text: bytes, where: str, *, strict: bool) -> dict[str, Any]:
    """UTF-8 JSON text of one object -> dict; `where` opens every message. A byte order mark before it is no fault.

    `strict` also refuses duplicate keys and NaN or Infinity, which are not JSON. A config.json is read without: the
    published ones of Mamba models hold Infinity.
    """

    def without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{where} has the key {shorten(twice)} twice")
        return found

    def refuse_constant(name: str) -> NoReturn:
        raise CheckpointError(f"{where} holds {name}, which is not JSON")

    marks = sum(map(text.count, (b"[", b"{", b",")))
    if marks > MARK_LIMIT:
        raise CheckpointError(
            f"{where} holds about {marks:,} values, expected at most {MARK_LIMIT:,}. If the model really has so many "
            "tensors, save it in more shards"
        )
    text = text.removeprefix(BOM)
    try:
        if strict:
            found = json.loads(text.decode(), object_pairs_hook=without_duplicates, parse_constant=refuse_constant)
        else:
            found = json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        other = _about_other(text) or f"is not valid JSON: {error.msg} at character {error.pos}"
        raise CheckpointError(f"{where} {other}") from None
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply") from None
    except ValueError:  # an integer of thousands of digits: Python refuses, its cost is quadratic
        raise CheckpointError(f"{where} holds a number with too many digits") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is JSON, but {_kind(found)}; expected an object, {{...}}")
    return found


def read_object(path: Path, *, strict: bool) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        CheckpointError: it cannot be read, or is something else.
    """
    file = InputFile(path)
    try:
        if file.size > DOCUMENT_LIMIT:
            raise CheckpointError(f"{path} has {file.size:,} bytes; expected JSON of at most {DOCUMENT_LIMIT:,}")
        return parse_object(file.read(0, file.size), str(path), strict=strict)
    finally:
        file.close()


def shorten(value: Any) -> str:
    """A parsed value as JSON in ASCII, for a message: what a stranger wrote cannot flood or steer a terminal."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "something nested deeply"
    return text if len(text) <= 120 else text[:117] + "..."


def _about_other(text: bytes) -> str | None:
    """What a download left in the place of a document; None: something else."""
    start = text[:512].strip()
    if not text.strip(b"\0 \t\r\n"):
        return "is empty: download it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull` in its directory"
    if start[:1] == b"<":
        return "is a web page, not JSON: download it again, with a token if the model is gated"
    return None


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
