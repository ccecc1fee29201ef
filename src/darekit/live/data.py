# SPDX-License-Identifier: Apache-2.0
"""Examples to feed a model with: JSON lines or a dataset's name -> rows -> batches of tokens. No torch in here."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from darekit.errors import CheckpointError, DataError, Unsupported

FORMS = '{"text": ...}, {"prompt": ..., "completion": ...} or {"text": ..., "label": ...}'
LISTED = 3  # rows of a file that an error quotes
_HALVES = re.compile("[\ud800-\udfff]")  # of pairs that stand for one character in UTF-16, as JSON may spell it
_CHAT = "of a chat: write it as text with tokenizer.apply_chat_template(..., tokenize=False)"
# Keys of rows as trainers take them, and what to do with those.
_OTHERS = {
    "messages": f"are turns {_CHAT}",
    "conversations": f"are turns {_CHAT}",
    "chosen": "is one of two answers that are compared: give it as completion",
    "instruction": "is called prompt here, and the answer to it completion",
    "question": "is called prompt here, and the answer to it completion",
    "sentence": "is called text here",
}
_BINARY = (".parquet", ".arrow", ".feather", ".gz", ".bz2", ".xz", ".zst", ".zip", ".xlsx")
IGNORED = -100  # a target that has no part in the loss; torch's own default


@dataclass(frozen=True, slots=True)
class Row:
    """One example. A causal model sees `text` + `completion` and is asked for the completion (for all of the text,
    where there is none); an encoder-decoder has `text` in its encoder; a classifier sees `text`, or `text` and `pair`
    as its two sentences, and is asked for `label`.
    `place`: where it came from, for errors."""

    text: str
    completion: str | None = None
    label: int | float | str | None = None
    place: str = ""
    pair: str | None = None


def read_rows(source: str | Path, *, limit: int | None = None, split: str = "train") -> tuple[Row, ...]:
    """A file of JSON lines or with a JSON list, or the name of a Hugging Face dataset (`name`, `name:config`) -> rows.

    Args:
        source: the file; what is not a file and has no suffix is taken as a dataset's name.
        limit: only the first rows.
        split: of a dataset; a file has none.

    Raises:
        CheckpointError: there is no such file.
        DataError: no row is usable; the message quotes the first ones.
        Unsupported: a dataset, and the library `datasets` is not installed.
    """
    path = Path(source)
    if path.is_file():
        raw: Iterator[tuple[str, Any]] = _read_lines(path)
    elif path.suffix in (".jsonl", ".json", ".txt", ".csv") or path.exists():
        raise CheckpointError(f"{path} is not a file; give a file of JSON lines, one {FORMS} each")
    else:
        raw = _read_dataset(str(source), split)
    rows: list[Row] = []
    refused: list[str] = []
    for place, value in raw:
        if limit is not None and len(rows) >= limit:
            break
        found = _row_of(value, place)
        if isinstance(found, Row):
            rows.append(found)
        else:
            refused.append(found)
    if not rows:
        seen = "".join(f"\n  {line}" for line in refused[:LISTED]) or "\n  it is empty"
        raise DataError(f"{source} has no usable row; expected {FORMS}:{seen}")
    if refused:
        more = f" and {len(refused) - LISTED} more" if len(refused) > LISTED else ""
        quoted = "".join(f"\n  {line}" for line in refused[:LISTED])
        raise DataError(f"{source}: {len(refused)} rows cannot be used; expected {FORMS}:{quoted}{more}")
    return tuple(rows)


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            file.seek(0)
            if start == "[":
                yield from _read_list(path, file.read())
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _parsed(line, f"{path}:{number}")
    except UnicodeDecodeError:
        way = "Save it again as UTF-8" if path.suffix not in _BINARY else "Unpack it, or export it as such"
        raise DataError(f"{path} is not UTF-8 text; expected JSON lines. {way}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _read_list(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """One JSON list of all rows; or lines, each of which is a list, and then no row at all."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield f"{path}:{number}", _parsed(line, f"{path}:{number}")
        return
    for number, value in enumerate(rows):
        yield f"{path}[{number}]", value


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and lists in lists in lists
        said = getattr(error, "msg", "its numbers or lists are too long")
        raise DataError(f"{place}: not JSON ({said}); expected one {FORMS} on each line") from None


def _read_dataset(name: str, split: str) -> Iterator[tuple[str, Any]]:
    if find_spec("datasets") is None:
        raise Unsupported(
            f"{name}: no such file. If it is a dataset on the Hub, that needs pip install 'darekit[eval]'; a file of "
            f"JSON lines needs nothing extra: one {FORMS} on each line"
        )
    import datasets

    path, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(path, config or None, split=split)
    except Exception as error:  # the library's own, the network's, the Hub's
        raise CheckpointError(
            f"cannot load dataset {name} (split {split}): {str(error).splitlines()[0] if str(error) else error!r}. "
            "If it is meant to be a file, check its path"
        ) from error
    for number, value in enumerate(loaded):
        yield f"{name}[{number}]", value


def _is_number(value: Any) -> bool:
    """Whether it is one that JSON knows: its readers take NaN and Infinity too."""
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _row_of(value: Any, place: str) -> Row | str:
    """The row, or why there is none."""
    if not isinstance(value, Mapping):
        return f"{place}: not a JSON object"
    for key in ("text", "prompt", "completion", "pair", "label"):
        if isinstance(said := value.get(key), str) and not said.isascii() and _HALVES.search(said):
            return f"{place}: {key} has half of a surrogate pair, which is no character"
    text, prompt = value.get("text"), value.get("prompt")
    if isinstance(prompt, str) and isinstance(value.get("completion"), str):
        if not value["completion"]:
            return f"{place}: the completion is empty"
        return Row(prompt, completion=value["completion"], place=place)
    if not isinstance(text, str):
        meant = [f"; prompt is a list of turns {_CHAT}"] if isinstance(prompt, list) else []
        meant += [f"; {key} {word}" for key, word in _OTHERS.items() if key in value]
        return f"{place}: keys {', '.join(map(str, value)) or 'none'}{''.join(meant[:1])}"
    if not text.strip():
        return f"{place}: the text is empty"
    label, pair = value.get("label"), value.get("pair")
    if pair is not None and not (isinstance(pair, str) and label is not None):
        return f"{place}: pair is a classifier's second sentence and must be a text beside text and label"
    if label is not None and not (isinstance(label, str) or _is_number(label)):
        return f"{place}: label {label!r} is neither a number nor a word"
    return Row(text, label=label, place=place, pair=pair)


def rows_digest(rows: Sequence[Row]) -> str:
    """32 hex digits of all that a model sees of the rows; not where they stand."""
    text = json.dumps([[row.text, row.completion, row.label, row.pair] for row in rows])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Tokens:
    """One example as token ids. `asked`: whether the token at i is a target (predicted from those before it).
    `types`: of a pair, which sentence each token belongs to, where the tokenizer tells (BERT's does). `answer`: what
    the decoder of an encoder-decoder is asked for; the encoder has `ids`, of which nothing is asked then. `cut`: the
    row has more tokens than these."""

    ids: tuple[int, ...]
    asked: tuple[bool, ...]
    label: int | float | str | None
    place: str
    types: tuple[int, ...] | None = None
    answer: tuple[int, ...] = ()
    cut: bool = False

    @property
    def targets(self) -> int:
        """How many tokens are predicted: the first of a text is not, as nothing is before it."""
        return len(self.answer) or sum(self.asked[1:])

    @property
    def last(self) -> int:
        """The last token that the model sees or is asked for."""
        return (self.answer or self.ids)[-1]


def tokenize(
    tokenizer: Any, rows: Sequence[Row], *, max_length: int, end: bool = True, apart: bool = False
) -> list[Tokens]:
    """Rows -> tokens, cut to `max_length` (of the prompt the beginning is cut, so that a target remains).

    Args:
        tokenizer: a transformers tokenizer.
        rows: the examples.
        max_length: tokens per example.
        end: put the end-of-text token behind a completion.
        apart: for an encoder-decoder: prompt and completion are two sequences, each as the tokenizer makes it.

    Raises:
        DataError: no example leaves a token.
    """
    found = []
    for row in rows:
        types, cut = None, False
        answer: list[int] = []
        if apart and row.completion is not None:
            ids = tokenizer(row.text, truncation=True, max_length=max_length)["input_ids"]
            asked = [False] * len(ids)
            answer = list(tokenizer(text_target=row.completion)["input_ids"])
            if end and tokenizer.eos_token_id is not None and answer[-1:] != [tokenizer.eos_token_id]:
                answer.append(tokenizer.eos_token_id)
            answer = answer[:max_length]
        elif row.completion is None:
            encoded = tokenizer(row.text, row.pair, truncation=True, max_length=max_length)
            ids = encoded["input_ids"]
            if row.pair is not None and "token_type_ids" in encoded:
                types = tuple(encoded["token_type_ids"])
            asked = [False] + [True] * (len(ids) - 1)
            if len(ids) >= max_length:
                cut = len(tokenizer(row.text, row.pair, verbose=False)["input_ids"]) > len(ids)
        else:
            head = tokenizer(row.text, verbose=False)["input_ids"]
            if head and head[-1] == tokenizer.eos_token_id:
                head = head[:-1]
            tail = tokenizer(row.completion, add_special_tokens=False)["input_ids"]
            if end and tokenizer.eos_token_id is not None:
                tail = [*tail, tokenizer.eos_token_id]
            tail = tail[: max_length - 1]
            cut = len(head) + len(tail) > max_length
            head = head[-(max_length - len(tail)) :]
            ids, asked = [*head, *tail], [False] * len(head) + [True] * len(tail)
        if ids:
            found.append(Tokens(tuple(ids), tuple(asked), row.label, row.place, types, tuple(answer), cut))
    if not found:
        raise DataError("the tokenizer produces no tokens for any row: is it the model's own tokenizer?")
    return found


def batches(tokens: Sequence[Tokens], size: int) -> Iterator[Sequence[Tokens]]:
    """Runs of `size` examples, in order."""
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size]
