# SPDX-License-Identifier: Apache-2.0
"""Rows of text -> padded batches for a live model, and which of their positions are no padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from darekit.errors import DataError
from darekit.live.batches import asked_of, padded
from darekit.live.data import Row, Tokens, batches, tokenize
from darekit.live.models import LiveModel
from darekit.live.reading import refuse_unreadable
from darekit.live.tasks import SEQ2SEQ


@dataclass(frozen=True)
class Feed:
    """What a model is fed with. `max_length`: tokens of one row; the rest is cut."""

    rows: Sequence[Row]
    batch_size: int = 8
    max_length: int = 512

    def tokens(self, live: LiveModel) -> list[Tokens]:
        """The rows as tokens, the longest first, so that what does not fit into memory fails at once.

        Raises:
            DataError: the model has no tokenizer, or it makes nothing of the rows.
        """
        refuse_unreadable(live, self.rows)
        if live.tokenizer is None:
            raise DataError("calibration needs the model's tokenizer, but neither the model nor its base has one")
        length, apart = min(self.max_length, live.max_length), live.task == SEQ2SEQ
        found = tokenize(live.tokenizer, self.rows, max_length=length, apart=apart)
        return sorted(found, key=lambda one: -len(one.ids))


def batched(live: LiveModel, tokens: Sequence[Tokens], size: int) -> Iterator[tuple[dict[str, Any], Any]]:
    """Batches of the model's arguments, each (rows, longest), and (rows, longest) bool: where a model that writes text
    is asked for a token (completions; all of plain text)."""
    for batch in batches(tokens, size):
        inputs = padded(live, batch)
        yield inputs, asked_of(live, batch, inputs)[0]
