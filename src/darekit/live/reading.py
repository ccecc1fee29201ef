# SPDX-License-Identifier: Apache-2.0
"""Which models can read rows of text at all, whatever is made of what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from darekit.errors import DataError
from darekit.live.data import Row
from darekit.live.models import LiveModel
from darekit.live.tasks import FUNCTION, OTHER, SEQ2SEQ, rows_of

SAMPLE = (3, 4, 5, 6)  # tokens that any vocabulary has
FORESIGHT = 1e-3  # of the logits' spread: of tiny untrained encoders 5e-3 or more, of decoders' rounding 1e-6
ROUNDING = 16  # times the format's own precision, where that is more


def refuse_unreadable(live: LiveModel, rows: Sequence[Row]) -> None:
    """Refuse a model whose first input is no text, and an encoder-decoder without anything for its decoder.

    Raises:
        DataError: either.
    """
    if live.task == OTHER and getattr(live.model, "main_input_name", "input_ids") != "input_ids":
        raise DataError(f"{live.kind}, so it cannot read rows of text")
    if live.task == SEQ2SEQ:
        bare = next((row for row in rows if row.completion is None), None)
        if bare is not None:
            raise DataError(f"{bare.place} has no completion, but {live.kind}: {rows_of(live.model)}")
    elif live.task == OTHER and getattr(live.model.config, "is_encoder_decoder", False):
        raise DataError(f"{live.kind}, so rows of text do not say what its decoder begins with")


def refuse_foresight(live: LiveModel) -> None:
    """Refuse a class that is listed as causal, and predicts a token from what comes after it (XLNet; PaliGemma, whose
    prompts look ahead).

    Raises:
        DataError: it does, or it cannot be run on text alone.
    """
    import torch

    config = live.model.config
    known = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "vocab_size", None)
    if not isinstance(known, int) or known < SAMPLE[-1] + 2:
        return
    texts = (torch.tensor([[*SAMPLE[:-1], last]], device=live.device) for last in (SAMPLE[-1], SAMPLE[-1] + 1))
    with torch.no_grad():
        outputs: list[Any] = [getattr(live.run({"input_ids": ids}), "logits", None) for ids in texts]
    if any(logits is None for logits in outputs):
        raise DataError(f"{type(live.model).__name__} gives no logits for text. It can be judged by {FUNCTION}")
    one, other = (logits[0, :-1].float() for logits in outputs)
    limit = max(FORESIGHT, ROUNDING * torch.finfo(live.model.dtype).eps)
    if float((one - other).abs().max()) > limit * float(one.std()):
        raise DataError(
            f"{type(live.model).__name__} predicts a token from what comes after it as well, so a loss or a perplexity "
            f"of text would say nothing. It can be judged by {FUNCTION}"
        )
