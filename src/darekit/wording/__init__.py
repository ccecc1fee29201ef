# SPDX-License-Identifier: Apache-2.0
"""Words for people: short names of models, lists of names, sizes in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath


def size_of(count: float) -> str:
    """Bytes for people, in powers of ten.

    >>> size_of(1_234_000_000)
    '1.23 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def brief(one: object, words: str) -> str:
    """What `repr` says of a large object: its kind, and what a person wants to know of it.

    >>> brief(ValueError(), "math on base")
    '<ValueError: math on base>'
    """
    return f"<{type(one).__name__}: {words}>"


def label(ref: str) -> str:
    """A model's short name for tables and errors: the last part of its path or id."""
    return PurePath(ref).name or ref


def distinct_labels(refs: Sequence[str]) -> list[str]:
    """Short names, or the whole ones where two short ones are the same.

    >>> distinct_labels(["a/math", "a/code", "b/code"])
    ['math', 'a/code', 'b/code']
    """
    short = [label(ref) for ref in refs]
    return [ref if short.count(one) > 1 else one for ref, one in zip(refs, short, strict=True)]


def and_(names: Sequence[str]) -> str:
    """Names as a sentence lists them; at least one.

    >>> and_(["base", "m0", "m1"])
    'base, m0 and m1'
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def some(names: Sequence[str], shown: int = 4, sep: str = ", ") -> str:
    """The first few of some names, and how many more there are.

    >>> some(["a", "b"]), some(["a", "b", "c", "d", "e", "f"]), some(["1 in a", "2 in b"], 1, "; ")
    ('a, b', 'a, b, c, d and 2 more', '1 in a; and 1 more')
    """
    more = len(names) - shown
    tail = f"{';' if ';' in sep else ''} and {more:,} more" if more > 0 else ""
    return sep.join(names[:shown]) + tail
