# SPDX-License-Identifier: Apache-2.0
"""Hidden states of a model that runs, layer by layer, without those of padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from darekit.errors import DataError
from darekit.live.batches import padded
from darekit.live.data import Tokens, batches
from darekit.live.models import LiveModel, memory_told, one_thread

States = npt.NDArray[np.float32]


def hidden_states(
    live: LiveModel,
    tokens: Sequence[Tokens],
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[States]:
    """(layers + 1, tokens, width) float32 for each batch: the embeddings, then what each layer gives; the last one is
    after the final norm where transformers has it so. Tokens stand example by example, padding left out.

    Raises:
        DataError: NaN or Inf, or a model that does not return its hidden states.
    """
    import torch

    done = 0
    with one_thread(live.device), memory_told(f"running batches of {batch_size}"), torch.inference_mode():
        for batch in batches(tokens, batch_size):
            inputs = padded(live, batch)
            body = getattr(live.model, "base_model", live.model)  # without the head, which costs and says nothing here
            found = live.run(inputs, body=body, output_hidden_states=True)
            layers = getattr(found, "hidden_states", None)
            if layers is None:
                raise DataError(f"{type(live.model).__name__} does not return its hidden states")
            real = inputs["attention_mask"].bool()
            states: States = torch.stack([layer[real].float() for layer in layers]).cpu().numpy()
            if not np.isfinite(states).all():
                raise DataError(
                    f"the model's hidden states contain NaN or Inf in the batch that begins with {batch[0].place}: "
                    f"{live.suspects}"
                )
            yield states
            done += len(batch)
            if progress:
                progress(done, len(tokens))
