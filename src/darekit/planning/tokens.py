# SPDX-License-Identifier: Apache-2.0
"""Which tokens the output has, and where every row of every model comes from: embeddings, heads and their biases."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from darekit.architectures.families import facts_of
from darekit.checkpoints import Checkpoint, TensorInfo
from darekit.checkpoints.companions import Companions, is_of_tokenizer
from darekit.checkpoints.places import ELSEWHERE, Rows
from darekit.checkpoints.tokenizers import Tokenizer, files_digest
from darekit.dtypes import dtype_named
from darekit.errors import HomologyError, PlanError
from darekit.inputs.rows import FILL, MEAN, ZERO, RowTable, gathered
from darekit.planning.matching.alignment import AlignedTensor, Alignment
from darekit.planning.matching.vocabulary import sizes_for_config
from darekit.recipe import Recipe
from darekit.recipe.data import TokenRow, Tokens
from darekit.tokens.documents import rewritten
from darekit.tokens.joining import Joined, Part, join
from darekit.wording import and_, label, some

BASE = "base"


@dataclass(frozen=True)
class Member:
    """A checkpoint whose tokens count. `name`: as the recipe writes it; `rows`: of its embedding."""

    name: str
    checkpoint: Checkpoint
    rows: int
    tokenizer: Tokenizer

    @property
    def part(self) -> Part:
        """Its tokens that have a row."""
        return Part(self.tokenizer, self.rows)


@dataclass(frozen=True)
class OutputVocabulary:
    """The output's tokens.

    Attributes:
        joined: tokens and ids.
        owner: the checkpoint whose tokenizer it is, or to whose tokenizer tokens were added.
        rows: of embeddings and heads.
        tensors: names of the tensors whose rows were gathered.
        provenance: of each row that some model did not have, where it came from.
        members: names of the checkpoints that `provenance` speaks of.
        files: the tokenizer's files, where they are others than the owner's.
    """

    joined: Joined
    owner: Checkpoint
    rows: int
    tensors: frozenset[str]
    members: tuple[str, ...] = ()
    provenance: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    files: Companions | None = field(default=None, repr=False)

    def to_data(self) -> dict[str, Any]:
        """JSON-able form, for the lock."""
        return {
            "source": self.owner.ref,
            "tokens": len(self.joined.ids),
            "rows": self.rows,
            **({"without_row": list(self.joined.removed)} if self.joined.removed and self.joined.changed else {}),
            **({"tensors": sorted(self.tensors)} if self.tensors else {}),
            **({"moved": list(self.provenance)} if self.provenance else {}),
        }

    def digest(self) -> str:
        """Of all that it says."""
        text = json.dumps([self.to_data(), sorted(self.joined.ids.items())], sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def with_vocabulary(
    recipe: Recipe,
    tokens: Tokens,
    alignment: Alignment,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    others: Mapping[str, Checkpoint],
) -> tuple[Alignment, OutputVocabulary | None]:
    """An alignment whose token rows are matched by token.

    Args:
        recipe: what is to be done.
        tokens: what it says of tokens.
        alignment: the tensors, in which vocabularies may still differ.
        base: the base, where there is one.
        models: the models, in recipe order.
        others: models that only `tokens` names, open.

    Raises:
        PlanError: a tokenizer is missing where it is needed, or a source of rows has no such row.
        HomologyError: rows are of other sizes.
    """
    return _Matching(tokens, recipe, alignment, base, models, others).run()


class _Matching:
    """The members, the tensors that have token rows, and the tables of rows."""

    def __init__(
        self,
        tokens: Tokens,
        recipe: Recipe,
        alignment: Alignment,
        base: Checkpoint | None,
        models: Sequence[Checkpoint],
        others: Mapping[str, Checkpoint],
    ) -> None:
        self.tokens, self.alignment, self.base, self.models, self.others = tokens, alignment, base, models, others
        self.facts = facts_of(next((c.config for c in (base, *models) if c and c.config), None))
        self.notes: list[str] = []
        self.axes = {t.name: t.token_axis for t in alignment.tensors if t.token_axis is not None and not t.copied}
        # Each checkpoint counts once, however often the recipe lists it.
        named: dict[str, Checkpoint] = {}
        for entry, model in zip(recipe.models, models, strict=True):
            named.setdefault(entry.model, model)
        first = [] if base is None else [(recipe.base_model or base.ref, base)]
        self.named = [*first, *named.items()]
        self.place = {id(checkpoint): k for k, (_, checkpoint) in enumerate(self.named)}
        for entry, model in zip(recipe.models, models, strict=True):
            self.place[id(model)] = len(first) + [*named].index(entry.model)

    def find(self, name: str) -> int | None:
        """The place of a member, as `Tokens` names it: the base's is `base`."""
        if name == BASE and self.base is not None:
            return 0
        first = int(self.base is not None)
        return next((k for k, (known, _) in enumerate(self.named) if k >= first and known == name), None)

    # Who has which tokens

    def _members(self) -> list[Member]:
        known: dict[str | None, Tokenizer | None] = {}  # equal files are read once
        found: list[tuple[str, Checkpoint, Tokenizer | None]] = []
        for name, checkpoint in self.named:
            digest = files_digest(checkpoint.companions)
            if digest not in known:
                known[digest] = self._tokenizer(checkpoint)
            found.append((name, checkpoint, known[digest]))
        first = next((tokenizer for _, _, tokenizer in found if tokenizer is not None), None)
        if first is None:
            return []
        members = []
        for name, checkpoint, tokenizer in found:
            if tokenizer is None:
                self.notes.append(
                    f"{label(checkpoint.ref)} has no tokenizer: its tokens are assumed to be those of {found[0][1].ref}"
                )
            tokenizer = tokenizer or first
            # Of a stack of slices it may have a part that has no rows of tokens, and counts all the same.
            members.append(Member(name, checkpoint, self._rows_of(checkpoint) or tokenizer.size, tokenizer))
        return members

    def _tokenizer(self, checkpoint: Checkpoint) -> Tokenizer | None:
        for name, why in checkpoint.left.items():
            if is_of_tokenizer(name):
                raise PlanError(
                    f"the tokenizer of {checkpoint.ref} cannot be read: its {name} was left out, because {why}. Or "
                    "remove tokenizer_source (and tokenizer) to match rows by number"
                )
        tokenizer = Tokenizer.of(checkpoint)
        if tokenizer is not None and tokenizer.fault is not None:
            raise PlanError(
                f"the tokenizer of {checkpoint.ref} ({tokenizer.form}) cannot be read: {tokenizer.fault}. Repair it, "
                "or remove tokenizer_source (and tokenizer) to match rows by number"
            )
        return tokenizer

    def _info(self, tensor: AlignedTensor, checkpoint: Checkpoint) -> TensorInfo | None:
        """A checkpoint's part in an aligned tensor."""
        if checkpoint is self.base:
            return tensor.base
        for info, model in zip(tensor.models, self.models, strict=True):
            if model is checkpoint:
                return info
        return None

    def _rows_of(self, checkpoint: Checkpoint) -> int:
        """Rows of its embedding; of several tensors the fewest, as a token needs a row in each."""
        lengths = [
            info.shape[self.axes[tensor.name]]
            for tensor in self.alignment.tensors
            if tensor.name in self.axes and (info := self._info(tensor, checkpoint)) is not None
        ]
        return min(lengths, default=0)

    def _owner(self, members: Sequence[Member]) -> Member:
        """Whose ids stay. One that is none of the recipe's models gives tokens and no rows."""
        model = self.tokens.model
        if model is None:
            return members[0]
        place = self.find(model)
        if place is not None:
            return members[place]
        other = self._other(model)
        tokenizer = self._tokenizer(other)
        if tokenizer is None:
            raise PlanError(f"tokenizer_source names {model}, but there is no tokenizer beside its weights")
        return Member(model, other, tokenizer.size, tokenizer)

    def _other(self, name: str) -> Checkpoint:
        found = self.others.get(name)
        if found is None:
            raise PlanError(
                f"{name} is named as a source of tokens or rows, but is not open here: list it among the models"
            )
        return found

    # What becomes of the rows

    def run(self) -> tuple[Alignment, OutputVocabulary | None]:
        """The alignment with gathered rows, and the output's tokens; None where there is nothing to match by token."""
        if not self.axes:
            return self._by_number("no tensor of these models has a row for each token")
        members = self._members()
        if not members:
            return self._by_number(f"no tokenizer beside {', '.join(checkpoint.ref for _, checkpoint in self.named)}")
        owner = self._owner(members)
        parts = [member.part for member in members]
        if owner not in members:
            parts.append(owner.part)
        at = members.index(owner) if owner in members else len(members)
        joined = join(parts, at, union=self.tokens.source == "union", named=[*self.tokens.rows])
        self._tell(joined, [*members, owner])
        rows = self._count(joined, members, owner)
        rules = _Rules(self, joined, members, rows)
        tensors, moved = [], set()
        for tensor in self.alignment.tensors:
            axis = self.axes.get(tensor.name)
            changed = tensor if axis is None else rules.gather(tensor, axis)
            if changed is not tensor:
                moved.add(tensor.name)
            tensors.append(changed)
        self.notes += rules.notes()
        files = None
        if joined.changed:
            files = rewritten(owner.checkpoint.ref, owner.checkpoint.companions, joined)
        alignment = replace(
            self.alignment,
            tensors=tuple(tensors),
            sizes=self._sizes(tensors) if moved else self.alignment.sizes,
            notes=(*self.alignment.notes, *self.notes),
        )
        return alignment, OutputVocabulary(
            joined, owner.checkpoint, rows, frozenset(moved), tuple(m.name for m in members),
            tuple(rules.provenance()) if moved else (), files,
        )  # fmt: skip

    def _by_number(self, why: str) -> tuple[Alignment, None]:
        """Where nobody knows any tokens: as without a word about them, if that is possible.

        Raises:
            PlanError: rows differ, or tokens are to be added.
        """
        plain = self.tokens.source in ("base", *(name for name, _ in self.named)) and self.tokens == Tokens(
            self.tokens.source
        )
        lengths = {
            info.shape
            for tensor in self.alignment.tensors
            if tensor.name in self.axes
            for info in (tensor.base, *tensor.models)
            if info is not None and info.shape != tensor.shape
        }
        if not plain or lengths:
            raise PlanError(
                f"{why}, so rows cannot be matched by token: remove tokenizer_source (and tokenizer), or put "
                "tokenizer.json beside the weights"
            )
        notes = (*self.alignment.notes, f"{why}: rows are matched by number")
        return replace(self.alignment, notes=notes), None

    def _sizes(self, tensors: Sequence[AlignedTensor]) -> Mapping[str, int]:
        """What config.json must say of vocabularies."""
        counted = {t.name: (self.axes[t.name], t.shape[self.axes[t.name]]) for t in tensors if t.name in self.axes}
        return sizes_for_config(self.facts, counted)

    def _count(self, joined: Joined, members: Sequence[Member], owner: Member) -> int:
        """Rows of the output: those of the tokens, and the padding that its models have."""
        multiple = self.tokens.pad_to_multiple_of
        if multiple is not None:
            return -(-joined.size // multiple) * multiple
        padded = members if self.tokens.source == "union" or owner not in members else [owner]
        return max(joined.size, *(member.rows for member in padded))

    def _tell(self, joined: Joined, members: Sequence[Member]) -> None:
        """What the user must know of the tokens."""
        for k, member in enumerate(members):
            new = [entry for entry in joined.new if entry.part == k]
            added = [entry.token.content for entry in new if not entry.ordinary]
            ordinary = [entry.token.content for entry in new if entry.ordinary]
            if added:
                self.notes.append(f"tokens added from {label(member.checkpoint.ref)}: {some(added)}")
            if ordinary:
                self.notes.append(
                    f"WARNING: {label(member.checkpoint.ref)} brings {len(ordinary):,} ordinary tokens "
                    f"({some(ordinary)}), not only added ones. Its merges are not imported, so these are matched as "
                    "whole words before any other token, and text that contains them is tokenised as by none of the "
                    "models. Models whose vocabularies differ this much seldom merge well: consider "
                    "`tokenizer_source: base`"
                )
        named = [entry.token.content for entry in joined.new if entry.part is None]
        if named:
            self.notes.append(f"tokens that the recipe adds: {some(named)}")
        if joined.conflicts:
            told = [f"{token!r} of {label(members[k].checkpoint.ref)}" for token, k in joined.conflicts]
            self.notes.append(f"added tokens whose flags differ between models keep the first model's: {some(told)}")
        if joined.removed and joined.changed:
            self.notes.append(
                f"{len(joined.removed)} tokens of {label(members[joined.owner].checkpoint.ref)} have no row in its "
                f"embedding and are left out: {some(joined.removed)}"
            )


class _Rules:
    """Where each row comes from, in the view of each member.

    A model that has a token gives its own row. One that lacks it gets the row that the recipe names for the token, else
    that of the only model that has it, else the base's, else the mean of all that have it (mergekit's rules). A row
    without a token stays where a model has such a row; else it is the mean of that model's rows.
    """

    def __init__(self, matching: _Matching, joined: Joined, members: Sequence[Member], rows: int) -> None:
        self.matching, self.joined, self.members, self.count = matching, joined, members, rows
        self.token_at: dict[int, str] = {at: token for token, at in joined.ids.items()}
        self.has_token = np.zeros(rows, bool)
        self.has_token[[*self.token_at]] = True
        self.others = [*matching.others.values()]
        self.own = [self._own_rows(member) for member in members]
        self.zeros: dict[str, list[str]] = {}  # token -> tensors in which nobody has a row for it
        self.tables: dict[str, list[RowTable | None]] = {}

    def _own_rows(self, member: Member) -> Rows:
        """(rows,) int64: the member's own row of each row of the output, `ELSEWHERE` for none."""
        found = np.full(self.count, ELSEWHERE, np.int64)
        ids = member.tokenizer.vocabulary
        for token, at in self.joined.ids.items():
            found[at] = ids.get(token, ELSEWHERE)
        taken = np.zeros(max(self.count, member.rows), bool)
        used = [at for at in ids.values() if at < taken.size]
        taken[used] = True
        spare = np.flatnonzero(~self.has_token & ~taken[: self.count])
        found[spare] = spare
        return found

    def gather(self, tensor: AlignedTensor, axis: int) -> AlignedTensor:
        """An aligned tensor with its rows in the output's order; the same one where nothing moves."""
        inputs = [self.matching._info(tensor, member.checkpoint) for member in self.members]
        inputs += [_named(other, tensor.name) for other in self.others]
        tables = self._tables(tensor, axis, inputs)
        lengths = {info.shape[axis] for info in inputs[: len(self.members)] if info is not None}
        if all(
            table is None or table.is_identity(k, inputs[k].shape[axis])  # type: ignore[union-attr]
            for k, table in enumerate(tables)
        ):
            return tensor
        self._refuse_unmovable(tensor, axis)
        self.tables[tensor.name] = tables

        def view(info: TensorInfo | None, checkpoint: Checkpoint) -> TensorInfo | None:
            if info is None:
                return None
            k = self.matching.place[id(checkpoint)]
            table = tables[k]
            assert table is not None
            if table.is_identity(k, info.shape[axis]):
                return info
            return gathered(k, table, inputs, axis, self._alike(tables, k, inputs))

        models = tuple(view(info, model) for info, model in zip(tensor.models, self.matching.models, strict=True))
        base = None if tensor.base is None or self.matching.base is None else view(tensor.base, self.matching.base)
        shape = (*tensor.shape[:axis], self.count, *tensor.shape[axis + 1 :])
        assert lengths
        return replace(tensor, shape=shape, base=base, models=models)

    def _alike(
        self, tables: Sequence[RowTable | None], k: int, inputs: Sequence[TensorInfo | None]
    ) -> npt.NDArray[np.bool_] | None:
        """(rows,) bool: which rows of a member's view are the base's to the bit."""
        first, own, base, info = tables[0], tables[k], inputs[0], inputs[k]
        if self.matching.base is None or first is None or own is None or base is None or info is None:
            return None
        if base.dtype != info.dtype:  # rows of a third format round to other values
            return None
        found: npt.NDArray[np.bool_] = (first.owners == own.owners) & (first.rows == own.rows) & (own.owners >= 0)
        return found

    def _refuse_unmovable(self, tensor: AlignedTensor, axis: int) -> None:
        """Tensors of one model that count tokens must count the same ones, or nobody knows where new ones go."""
        if dtype_named(tensor.dtype).kind != "float":
            raise HomologyError(
                f"{tensor.name} has its rows for tokens in {tensor.dtype}, which can be neither moved nor averaged: "
                "dequantise the model first, or remove tokenizer_source (and tokenizer)"
            )
        for member in self.members:
            info = self.matching._info(tensor, member.checkpoint)
            if info is not None and info.shape[axis] != member.rows:
                raise HomologyError(
                    f"{tensor.name} of {member.checkpoint.ref} has {info.shape[axis]} rows, and another tensor "
                    f"{member.rows}: tokens can only be moved where all of a model's tensors count the same ones. "
                    "Remove tokenizer_source (and tokenizer)"
                )

    def _tables(self, tensor: AlignedTensor, axis: int, inputs: Sequence[TensorInfo | None]) -> list[RowTable | None]:
        """One for each member; None for those without the tensor."""
        present = [k for k in range(len(self.members)) if inputs[k] is not None]
        own = np.stack([_within(self.own[k], inputs[k], axis) for k in present])
        has = own != ELSEWHERE
        numbers = np.array(present, np.int64)
        first = numbers[has.argmax(axis=0)]
        count = has.sum(axis=0)
        if self.matching.base is not None and present[0] == 0:
            chosen = np.where((count == 1) | ~has[0], first, 0)
            several = (count > 1) & ~has[0] & self.has_token
        else:
            chosen, several = first, (count > 1) & self.has_token
        rows = own[np.searchsorted(numbers, chosen), np.arange(self.count)]
        chosen, rows = np.where(several, MEAN, chosen), np.where(several, ELSEWHERE, rows)
        none = count == 0
        chosen = np.where(none, np.where(self.has_token, ZERO, FILL), chosen)
        means = {
            int(i): [(int(numbers[j]), int(own[j, i])) for j in np.flatnonzero(has[:, i])]
            for i in np.flatnonzero(several)
        }
        given = {
            self.joined.ids[token]: row for token, row in self.matching.tokens.rows.items() if row.kind != "default"
        }
        sources = {at: self._given(self.token_at[at], row, tensor, axis, inputs) for at, row in given.items()}
        for i in np.flatnonzero(none & self.has_token):
            if int(i) not in given:
                self.zeros.setdefault(self.token_at[int(i)], []).append(tensor.name)
        tables: list[RowTable | None] = [None] * len(self.members)
        for j, k in enumerate(present):
            owners, of = np.where(has[j], k, chosen), np.where(has[j], own[j], rows)
            for at, row in given.items():
                if row.force or not has[j, at]:
                    owners[at], of[at] = sources[at]
            tables[k] = RowTable(owners, of, means, self.joined.size)
        return tables

    def _given(
        self, token: str, row: TokenRow, tensor: AlignedTensor, axis: int, inputs: Sequence[TensorInfo | None]
    ) -> tuple[int, int]:
        """(Tensor, row) that the recipe names for a token."""
        if row.kind == "zero":
            return ZERO, ELSEWHERE
        assert row.model is not None
        place = self.matching.find(row.model)
        if place is None and row.model not in self.matching.others:
            raise PlanError(
                f"{row.model} is to give the row of {token!r}, but is not open here: list it among the models"
            )
        k = len(self.members) + [*self.matching.others].index(row.model) if place is None else place
        info = inputs[k]
        if info is None:
            raise PlanError(f"{row.model} is to give the row of {token!r}, but it has no tensor {tensor.name}")
        wanted = token if row.kind == "model" else row.token
        at = row.token_id
        if wanted is not None:
            tokenizer = (
                self.members[k].tokenizer if k < len(self.members) else Tokenizer.of(self.matching.others[row.model])
            )
            at = None if tokenizer is None else tokenizer.vocabulary.get(wanted)
            if at is None:
                raise PlanError(
                    f"{row.model} is to give the row of {token!r}, but its tokenizer has no token {wanted!r}; name "
                    "another model, or `{kind: model_token, model: ..., token: ...}`"
                )
        assert at is not None
        if at >= info.shape[axis]:
            raise PlanError(
                f"{row.model} is to give its row {at} to {token!r}, but {tensor.name} has {info.shape[axis]} rows there"
            )
        return k, at

    # What is told of them

    def notes(self) -> Iterator[str]:
        """Warnings of rows that nobody has."""
        if self.zeros:
            tokens = sorted(self.zeros, key=lambda token: self.joined.ids[token])
            tensors = dict.fromkeys(name for token in tokens for name in self.zeros[token])
            # In a stack not every model has a part in every tensor.
            where = f" that gives {and_([*tensors])}" if len(tensors) < len(self.matching.axes) else ""
            yield (
                f"WARNING: no model{where} has rows for {some(tokens)}: they are zeros, and the model must be trained "
                "before these tokens mean anything; `tokenizer: {tokens: {TOKEN: {source: ...}}}` names rows to begin "
                "with"
            )

    def provenance(self) -> Iterator[dict[str, Any]]:
        """Of each row that is not each member's own row of that number: its token, and whose rows it is made of."""
        told: dict[int, dict[str, Any]] = {}
        for tables in self.tables.values():
            for k, table in enumerate(tables):
                if table is None:
                    continue
                for at in np.flatnonzero(table.owners != k).tolist():
                    entry = told.setdefault(at, {"id": at, "token": self.token_at.get(at), "rows": {}})
                    entry["rows"].setdefault(self.members[k].name, self._origin(table, at))
        for at in sorted(told):
            if told[at]["token"] is not None or at < self.joined.size:
                yield told[at]

    def _origin(self, table: RowTable, at: int) -> str:
        owner = int(table.owners[at])
        names = [*(member.name for member in self.members), *self.matching.others]
        if owner >= 0:
            return f"{names[owner]} {int(table.rows[at])}"
        if owner == MEAN:
            return "mean of " + ", ".join(f"{names[k]} {row}" for k, row in table.means[at])
        return "zeros" if owner == ZERO else "mean of all"


def _within(own: Rows, info: TensorInfo | None, axis: int) -> Rows:
    """Own rows that a tensor really has."""
    assert info is not None
    return np.where(own < info.shape[axis], own, ELSEWHERE)


def _named(checkpoint: Checkpoint, name: str) -> TensorInfo | None:
    """A tensor by its name, or the one that it is tied to."""
    found = checkpoint.tensors.get(name)
    if found is not None:
        return found
    tied = facts_of(checkpoint.config).tied_to(name)
    return None if tied is None else checkpoint.tensors.get(tied)
