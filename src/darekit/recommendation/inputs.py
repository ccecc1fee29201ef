# SPDX-License-Identifier: Apache-2.0
"""Rows of text -> padded batches for a live model, and which of their positions are no padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from darekit.errors import DataError
from darekit.live.data import Row, Tokens, batches, tokenize
from darekit.live.models import LiveModel, segments

Progress = Callable[[int, int], None]


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
        if live.tokenizer is None:
            raise DataError("calibration needs the model's tokenizer, and there is none beside the model or its base")
        found = tokenize(live.tokenizer, self.rows, max_length=min(self.max_length, live.max_length))
        return sorted(found, key=lambda one: -len(one.ids))


def padded(live: LiveModel, tokens: Sequence[Tokens], size: int) -> Iterator[tuple[dict[str, Any], Any]]:
    """Batches of `input_ids` and `attention_mask`, (rows, longest) int64 on the model's device, padded to the right;
    and (rows, longest) bool: where a causal model is asked for the next token (completions; all of plain text)."""
    import torch

    for batch in batches(tokens, size):
        longest = max(len(one.ids) for one in batch)
        ids = torch.full((len(batch), longest), live.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        asking = torch.zeros(ids.shape, dtype=torch.bool)
        for place, one in enumerate(batch):
            ids[place, : len(one.ids)] = torch.tensor(one.ids)
            mask[place, : len(one.ids)] = 1
            asking[place, : len(one.ids) - 1] = torch.tensor(one.asked[1:], dtype=torch.bool)
        inputs = {"input_ids": ids.to(live.device), "attention_mask": mask.to(live.device)}
        yield inputs | segments(live, batch, longest), asking.to(live.device)


@contextmanager
def padding_known(live: LiveModel) -> Iterator[None]:
    """A decoder with a classifier's head reads at the last token that is no padding: its config must name that."""
    config = live.model.config
    before = getattr(config, "pad_token_id", None)
    config.pad_token_id = live.tokenizer.pad_token_id if before is None else before
    try:
        yield
    finally:
        config.pad_token_id = before
