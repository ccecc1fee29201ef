# SPDX-License-Identifier: Apache-2.0
"""The tokens of an output: those of one tokenizer, or those of several, one after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from darekit.checkpoints.tokenizers import AddedToken


class Vocabulary(Protocol):
    """What is asked of a tokenizer: token -> id, the added tokens too, and the added tokens by id."""

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Token -> id, the added tokens too."""
        ...

    @property
    def added(self) -> Sequence[AddedToken]:
        """The added tokens, by id."""
        ...


@dataclass(frozen=True)
class Part:
    """One model's tokens. `rows`: of its embedding; a token with a higher id has none, and does not count."""

    tokenizer: Vocabulary
    rows: int

    def tokens(self) -> Iterator[tuple[str, int]]:
        """(Token, id) of all that have a row, by id."""
        found = ((token, at) for token, at in self.tokenizer.vocabulary.items() if at < self.rows)
        return iter(sorted(found, key=lambda entry: (entry[1], entry[0])))


@dataclass(frozen=True)
class NewToken:
    """A token that the tokenizer did not have.

    Attributes:
        token: the token, with its id in the output.
        part: the first of the parts that has it; None: none does, the recipe names it.
        ordinary: it is one of the part's vocabulary, and none of its added tokens.
    """

    token: AddedToken
    part: int | None = None
    ordinary: bool = False


@dataclass(frozen=True)
class Joined:
    """The output's tokens.

    Attributes:
        owner: the part whose tokenizer was taken, and to whose ids the others were appended.
        ids: token -> id.
        added: all added tokens of the output, by id.
        new: what was appended.
        marked: tokens that its owner has in its vocabulary and another part as an added token: they are one now.
        removed: of the owner, which had no row.
        conflicts: (token, part) where a part's added token has other flags than the one that was taken.
    """

    owner: int
    ids: Mapping[str, int] = field(repr=False)
    added: tuple[AddedToken, ...] = field(default=(), repr=False)
    new: tuple[NewToken, ...] = ()
    marked: tuple[AddedToken, ...] = ()
    removed: tuple[str, ...] = ()
    conflicts: tuple[tuple[str, int], ...] = ()

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.ids.values(), default=-1)

    @property
    def changed(self) -> bool:
        """Whether it is another tokenizer than its owner's. Tokens without a row alone are no reason to touch it."""
        return bool(self.new or self.marked)


def join(parts: Sequence[Part], owner: int, *, union: bool, named: Sequence[str] = ()) -> Joined:
    """The owner's tokens, with `union` those of all parts, and those that a recipe names.

    Tokens are appended part by part and by their ids there, so that nothing depends on the order of a dict.

    Args:
        parts: the base, where there is one, and the models.
        owner: the part whose tokens keep their ids.
        union: append the tokens of the other parts.
        named: tokens that there are to be, whoever has them.
    """
    first = parts[owner]
    ids = dict(first.tokens())
    removed = tuple(token for token, at in _by_id(first.tokenizer.vocabulary) if at >= first.rows)
    flags = {token.content: token for token in first.tokenizer.added if token.content in ids}
    new: list[NewToken] = []
    marked: dict[str, AddedToken] = {}
    conflicts: list[tuple[str, int]] = []
    following = 1 + max(ids.values(), default=-1)
    for k, part in enumerate(parts if union else ()):
        if k == owner:
            continue
        defined = {token.content: token for token in part.tokenizer.added}
        for token, _ in part.tokens():
            own = defined.get(token)
            if token not in ids:
                entry = AddedToken(token, following, own.flags if own else frozenset())
                new.append(NewToken(entry, k, own is None))
                ids[token], flags[token] = following, entry
                following += 1
            elif own is not None and token not in flags:
                flags[token] = marked[token] = AddedToken(token, ids[token], own.flags)
            elif own is not None and own.flags != flags[token].flags:
                conflicts.append((token, k))
    for token in named:
        if token not in ids:
            entry = AddedToken(token, following)
            new.append(NewToken(entry, next((k for k, part in enumerate(parts) if _has(part, token)), None)))
            ids[token], flags[token] = following, entry
            following += 1
    added = tuple(sorted(flags.values(), key=lambda token: (token.id, token.content)))
    return Joined(owner, ids, added, tuple(new), tuple(marked.values()), removed, tuple(conflicts))


def _has(part: Part, token: str) -> bool:
    at = part.tokenizer.vocabulary.get(token)
    return at is not None and at < part.rows


def _by_id(vocabulary: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(vocabulary.items(), key=lambda entry: (entry[1], entry[0]))
