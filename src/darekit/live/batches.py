# SPDX-License-Identifier: Apache-2.0
"""Tokens of several examples -> what a live model takes, padded on the right.

There a causal model never looks back at padding, positions count from 0 as in training, and the mask hides it from
the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from darekit.errors import DataError
from darekit.live.data import IGNORED, Tokens
from darekit.live.models import LiveModel
from darekit.live.tasks import SEQ2SEQ


def padded(live: LiveModel, rows: Sequence[Tokens]) -> dict[str, Any]:
    """Rows -> the model's arguments, each (rows, longest) int64 on its device: `input_ids`, `attention_mask` (0 where
    there is padding), `token_type_ids` where it tells two sentences of a pair apart (`segments`), and for an
    encoder-decoder `decoder_input_ids` and `decoder_attention_mask`, of another width than those of the encoder."""
    ids, mask = _filled([row.ids for row in rows], _padding_of(live))
    inputs = {"input_ids": ids.to(live.device), "attention_mask": mask.to(live.device)}
    if live.task == SEQ2SEQ:
        return inputs | _decoder(live, rows, ids.shape[1])
    return inputs | segments(live, rows, ids.shape[1])


def _filled(rows: Sequence[Sequence[int]], padding: int, width: int = 0) -> tuple[Any, Any]:
    """(rows, longest) int64 ids, and their mask; at least `width` wide."""
    import torch

    longest = max(width, *(len(row) for row in rows))
    ids = torch.full((len(rows), longest), padding)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[at, : len(row)] = 1
    return ids, mask


def _decoder(live: LiveModel, rows: Sequence[Tokens], other: int) -> dict[str, Any]:
    """What the decoder sees: its targets, moved by one as the model moves them while it is trained. A width like the
    encoder's gets one more, so that shapes tell which of the two a layer's input is."""
    longest = max(len(row.answer) for row in rows)
    answers, mask = _filled([row.answer for row in rows], IGNORED, longest + (longest == other))
    try:
        seen = live.model.prepare_decoder_input_ids_from_labels(labels=answers.to(live.device))
    except (ValueError, AttributeError, TypeError, AssertionError) as error:  # no token to begin with, no such method
        raise DataError(
            f"{live.kind}, and its config.json does not say which token the decoder begins with "
            f"(decoder_start_token_id, pad_token_id): {error}"
        ) from error
    return {"decoder_input_ids": seen, "decoder_attention_mask": mask.to(live.device)}


def asked_of(live: LiveModel, rows: Sequence[Tokens], inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Which predictions of a batch are asked for, and the tokens that are right.

    Returns:
        (rows, width) bool, as wide as the logits, and (asked,) int64 in the same order; both on the model's device.
    """
    import torch

    width = inputs["decoder_input_ids" if live.task == SEQ2SEQ else "input_ids"].shape[1]
    asked = torch.zeros((len(rows), width), dtype=torch.bool)
    targets: list[int] = []
    for at, row in enumerate(rows):
        if live.task == SEQ2SEQ:
            asked[at, : len(row.answer)] = True
            targets += row.answer
        else:  # the one before it predicts a token
            asked[at, : len(row.asked) - 1] = torch.tensor(row.asked[1:], dtype=torch.bool)
            targets += [token for token, wanted in zip(row.ids[1:], row.asked[1:], strict=True) if wanted]
    return asked.to(live.device), torch.tensor(targets, dtype=torch.int64, device=live.device)


def masks_of(inputs: Mapping[str, Any]) -> list[Any]:
    """(rows, width) bool, True where there is no padding: of the tokens, and of the decoder's if it has its own."""
    return [inputs[name].bool() for name in ("attention_mask", "decoder_attention_mask") if name in inputs]


def without_padding(values: Any, masks: Sequence[Any]) -> Any | None:
    """A layer's input, (rows, width, in) or (rows width, in) -> (n, in) without padding, by the mask of its shape; None
    where none has it."""
    for mask in masks:
        if values.dim() == 3 and values.shape[:2] == mask.shape:
            return values[mask]
    for mask in masks:
        if values.dim() == 2 and values.shape[0] == mask.numel():
            return values[mask.reshape(-1)]
    return None


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
