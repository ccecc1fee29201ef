# SPDX-License-Identifier: Apache-2.0
"""Tokens of several examples -> what a live model takes, padded on the right.

There a causal model never looks back at padding, positions count from 0 as in training, and the mask hides it from
the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from darekit.live.data import Tokens
from darekit.live.models import LiveModel


def padded(live: LiveModel, rows: Sequence[Tokens]) -> dict[str, Any]:
    """Rows -> the model's arguments, each (rows, longest) int64 on its device: `input_ids`, `attention_mask` (0 where
    there is padding), and `token_type_ids` where it tells two sentences of a pair apart (`segments`)."""
    import torch

    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), _padding_of(live))
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = torch.tensor(row.ids)
        mask[at, : len(row.ids)] = 1
    inputs = {"input_ids": ids.to(live.device), "attention_mask": mask.to(live.device)}
    return inputs | segments(live, rows, longest)


def asked_of(live: LiveModel, rows: Sequence[Tokens], width: int) -> Any:
    """(rows, width) bool on the model's device: which tokens are targets."""
    import torch

    asked = torch.zeros((len(rows), width), dtype=torch.bool)
    for at, row in enumerate(rows):
        asked[at, : len(row.asked)] = torch.tensor(row.asked)
    return asked.to(live.device)


def segments(live: LiveModel, rows: Sequence[Tokens], width: int) -> dict[str, Any]:
    """The model's argument that tells two sentences of a pair apart: `token_type_ids`, (rows, width) int64, padded on
    the right. Nothing where no row is a pair or the model has no such embedding (some tokenizers tell anyhow)."""
    import torch

    if (getattr(live.model.config, "type_vocab_size", None) or 0) < 2 or all(row.types is None for row in rows):
        return {}
    types = [[*(row.types or ()), *[0] * (width - len(row.types or ()))] for row in rows]
    return {"token_type_ids": torch.tensor(types, device=live.device)}


@contextmanager
def padding_known(live: LiveModel) -> Iterator[None]:
    """A decoder with a classifier's head reads at the last token that is no padding: its config must say which is."""
    config = live.model.config
    before = getattr(config, "pad_token_id", None)
    if before is None and live.tokenizer is not None:
        config.pad_token_id = live.tokenizer.pad_token_id
    try:
        yield
    finally:
        config.pad_token_id = before


def _padding_of(live: LiveModel) -> int:
    """The config's padding token, as the model looks for that; else the tokenizer's. -1 in a config means none."""
    named = getattr(live.model.config, "pad_token_id", None)
    if isinstance(named, int) and named >= 0:
        return named
    return (None if live.tokenizer is None else live.tokenizer.pad_token_id) or 0
