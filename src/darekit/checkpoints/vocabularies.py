# SPDX-License-Identifier: Apache-2.0
"""Files of vocabularies -> tokens and ids. Raises ValueError and its like on whatever is malformed."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

Json = Mapping[str, Any]

PIECE, TEXT, SCORE, TYPE = 1, 1, 2, 3  # fields of SentencePiece's ModelProto and of its pieces
WORD, BYTES_64, SIZED, BYTES_32 = 0, 1, 2, 5  # wire types of protocol buffers


def pieces_of(model: bytes) -> list[tuple[str, float, int]]:
    """A SentencePiece model -> (piece, score, type) by id.

    The file is a protocol buffer (sentencepiece_model.proto): repeated pieces in field 1, each with its text, score
    and type (1 is the usual) in the fields 1 to 3.

    >>> pieces_of(bytes.fromhex("0a09" "0a0261621500008040" "0a05" "0a01631803"))
    [('ab', 4.0, 1), ('c', 0.0, 3)]
    """
    found = []
    for number, value in _fields(model):
        if number == PIECE and isinstance(value, bytes):
            text, score, kind = "", 0.0, 1
            for part, entry in _fields(value):
                if part == TEXT and isinstance(entry, bytes):
                    text = entry.decode("utf-8")
                elif part == SCORE and isinstance(entry, bytes):
                    score = struct.unpack("<f", entry)[0]
                elif part == TYPE and isinstance(entry, int):
                    kind = entry
            found.append((text, score, kind))
    if not found:
        raise ValueError("no pieces, so it is not a SentencePiece model")
    return found


def vocabulary_of_lines(raw: bytes) -> dict[str, int]:
    """A list of tokens, one on each line -> token -> id.

    >>> vocabulary_of_lines(b"[PAD]\\n[UNK]\\nthe\\n")
    {'[PAD]': 0, '[UNK]': 1, 'the': 2}
    """
    lines = raw.decode("utf-8").split("\n")
    return {line.rstrip("\r"): i for i, line in enumerate(lines if lines[-1] else lines[:-1])}


def ranks_of(raw: bytes) -> dict[str, int]:
    """A tiktoken file (a token in base 64 and its rank on each line) -> token in base 64 -> id.

    >>> ranks_of(b"IQ== 0\\nIg== 1\\n")
    {'IQ==': 0, 'Ig==': 1}
    """
    found = {}
    for line in raw.splitlines():
        if line:
            token, rank = line.split()
            found[token.decode("ascii")] = int(rank)
    if not found:
        raise ValueError("no ranks")
    return found


def tekken_of(raw: bytes) -> tuple[dict[str, int], dict[str, Any]]:
    """A Tekken file of Mistral's -> token (in base 64 where it is not special) -> id, and what else it says."""
    document = json.loads(raw.decode("utf-8"))
    config = document.get("config") or {}
    special = document.get("special_tokens") or ()
    first = config.get("default_num_special_tokens", len(special))
    last = config.get("default_vocab_size")
    found = {entry["token_bytes"]: first + entry["rank"] for entry in document["vocab"]}
    if isinstance(last, int):  # the file holds more than the model has rows for
        found = {token: i for token, i in found.items() if i < last}
    found |= {entry["token_str"]: entry["rank"] for entry in special}
    return found, config


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: number and value."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        number, wire = tag >> 3, tag & 7
        if wire == WORD:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if wire == SIZED:
            size, at = _varint(raw, at)
        elif wire in (BYTES_64, BYTES_32):
            size = 8 if wire == BYTES_64 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}: not a protocol buffer")
        if at + size > len(raw):
            raise ValueError("it ends in the middle of a field")
        yield number, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {at}")
