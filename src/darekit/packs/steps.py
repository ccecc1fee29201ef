# SPDX-License-Identifier: Apache-2.0
"""How far fine-tuned elements are from the base's, in steps: so many numbers of their format lie between them.

Small changes are small numbers of steps, while bits differ in any place: from 0x3F7F to 0x3F80 in eight, with one step
between them. On the benchmark's family (BF16, changes of 2 % of the weights) steps take 0.38 of the values' room, and
bits that differ (XOR, as in BitX, NSDI'26) 0.45. A step up counts 2, one down 1, two down 3 and so on, as bits of a
whole number without a sign. Bits alone decide: those of integers are taken as if they were a float's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from darekit.dtypes import Bytes
from darekit.errors import CheckpointError
from darekit.kernels import packs as kernels

Unsigned: TypeAlias = npt.NDArray[np.unsignedinteger]

# Of so many elements of 16 bits the steps of one may be 255 or more: of BF16 planes take less from 0.26 on.
FEW_APART = 4


def steps_between(words: Unsigned, base: Unsigned) -> Unsigned:
    """(k,) bits of floats twice, of any size -> (k,) steps from `base`."""
    ahead, one = _in_order(words) - _in_order(base), words.dtype.type(1)
    found: Unsigned = (ahead << one) ^ _sign(ahead)
    return found


def after_steps(base: Unsigned, steps: Unsigned) -> Unsigned:
    """The inverse of `steps_between`: (k,) twice -> (k,) bits."""
    one = base.dtype.type(1)
    return _in_order(_in_order(base) + ((steps >> one) ^ (~(steps & one) + one)))


def cut_narrow(words: Unsigned, base: Unsigned, ends: Sequence[int]) -> list[tuple[bytes, Bytes] | None]:
    """(k,) uint16 bits twice, of leaves that end at `ends` -> of each leaf how its frame begins, and steps as one byte
    each, (k,) uint8; None: too many do not fit one."""
    low, steps = np.empty(words.size, np.uint8), np.empty(words.size, np.uint16)
    numbers = np.empty(len(ends), np.int64)
    kernels.cut_leaves(words, base, np.array(ends, np.int64), steps, low, numbers)
    found: list[tuple[bytes, Bytes] | None] = []
    begin = 0
    for end, number in zip(ends, numbers.tolist(), strict=True):
        fits = number <= (end - begin) // FEW_APART
        found.append((head_of(steps[begin : begin + number]), low[begin:end]) if fits else None)
        begin = end
    return found


def join_narrow(base: Unsigned, low: Any, many: memoryview, name: str) -> Unsigned:
    """The inverse of `cut_narrow`: (k,) uint16 bits; `low` has a buffer of k bytes, `many` is what `read_head` found.

    Raises:
        CheckpointError: `many` are not as many as `low` says.
    """
    out = np.empty(base.size, np.uint16)
    writable = np.frombuffer(low, np.uint8).copy()  # of what is not, numba would compile a kernel of its own
    if not kernels.take_steps(base, writable, apart(many), out):
        raise bad_steps(name)
    return out


def apart(raw: Any) -> npt.NDArray[np.uint16]:
    """Of what `read_head` found: (m,) uint16."""
    return np.frombuffer(raw, "<u2").astype(np.uint16)


def head_of(many: npt.NDArray[np.uint16]) -> bytes:
    """(m,) uint16 -> how frames begin: their number, and they themselves."""
    return many.size.to_bytes(2, "little") + many.astype("<u2", copy=False).tobytes()


def read_head(frame: memoryview, count: int, name: str) -> tuple[memoryview, memoryview]:
    """The inverse of `head_of`, for `count` elements: m times 2 bytes, and what follows.

    Raises:
        CheckpointError: it is nothing that `head_of` could have written.
    """
    many = int.from_bytes(frame[:2], "little")
    end = 2 + 2 * many
    if many > count // FEW_APART or len(frame) < end:
        raise bad_steps(name)
    return frame[2:end], frame[end:]


def bad_steps(name: str) -> CheckpointError:
    """What is wrong where steps that stand apart are not as many as the bytes say."""
    return CheckpointError(f"tensor {name}: a frame whose steps do not fit together; the pack is damaged")


def _in_order(words: Unsigned) -> Unsigned:
    """Bits of floats -> their places among all numbers of the format, modulo their number; its own inverse."""
    found: Unsigned = words ^ (_sign(words) & words.dtype.type(np.iinfo(words.dtype).max >> 1))
    return found


def _sign(words: Unsigned) -> Unsigned:
    """All bits where the highest is set, and none elsewhere."""
    signed = words.view(f"i{words.itemsize}")
    found: Unsigned = (signed >> signed.dtype.type(8 * words.itemsize - 1)).view(words.dtype)
    return found
