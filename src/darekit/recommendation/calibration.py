# SPDX-License-Identifier: Apache-2.0
"""What a model's own inputs say about its layers: one pass over text, with a hook on every linear layer.

For a layer with weight W = W_base + dW and inputs X (tokens x in), dropping at the rate p adds noise to the output
whose expected square is p/(1-p) S with S = sum_ij dW_ij^2 ||X_j||^2. Against what fine-tuning does to the output,

    (noise / signal)^2 = p / ((1 - p) kappa),    kappa = ||dW X||^2 / S,

and against the whole output, rho^2 = p/(1-p) S / ||W X||^2. kappa is the layer's coherence: 1 where every output is one
delta times one input, up to the number of inputs where all products add up to the same sign.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from darekit.checkpoints import TensorInfo
from darekit.dtypes import Floats, dtype_named, widen
from darekit.errors import DataError
from darekit.live.batches import masks_of, padding_known, without_padding
from darekit.live.models import build, memory_told, one_thread
from darekit.live.tasks import CAUSAL, SEQ2SEQ
from darekit.methods.sparsifiers import noise_gain
from darekit.planning.plan import Plan
from darekit.recommendation.inputs import Feed, batched
from darekit.wording.progress import Progress

_CACHED = 1 << 30  # bytes of deltas that are kept from batch to batch; what is more is read again for each


@dataclass
class Layer:
    """Sums over all tokens that reached one linear layer.

    Attributes:
        signal: ||dW X||^2.
        spread: S = sum_ij dW_ij^2 ||X_j||^2, the square of the noise of dropping at p/(1-p) = 1.
        output: ||W X||^2.
        tokens: that reached it.
    """

    signal: float = 0.0
    spread: float = 0.0
    output: float = 0.0
    tokens: int = 0

    @property
    def kappa(self) -> float:
        """Coherence, at least 0; 1 where fine-tuning did not move this layer's output at all."""
        return self.signal / self.spread if self.spread > 0 else 1.0

    @property
    def r(self) -> float:
        """The relative perturbation of the layer's output at p/(1-p) = 1: what r is for isotropic inputs."""
        if self.spread == 0:
            return 0.0
        return math.sqrt(self.spread / self.output) if self.output > 0 else math.inf

    def noise_to_signal(self, drop_rate: float) -> float:
        """Predicted noise of dropping, relative to what fine-tuning does to the output; 0 where nothing is random."""
        gain = noise_gain(drop_rate)
        if gain == 0 or self.spread == 0:
            return 0.0
        return gain / math.sqrt(self.kappa) if self.kappa > 0 else math.inf


@dataclass(frozen=True)
class Calibration:
    """What a model's own inputs say of its linear layers.

    Attributes:
        layers: name of the weight -> what was seen.
        rows: of the data that were read.
        tokens: in those rows.
        unreached: linear layers that no token reached.
    """

    layers: Mapping[str, Layer]
    rows: int
    tokens: int
    unreached: tuple[str, ...] = field(default=())


def calibrate(
    plan: Plan,
    feed: Feed,
    *,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Run the one model of a plan (nothing dropped, its checkpoints open) over text, and add up what its layers see.

    Raises:
        DataError: NaN or Inf in a layer; out of memory.
        Unsupported: torch is missing, or transformers does not know the model.
    """
    live = build(plan, device=device, dtype=dtype)
    import torch

    watch = _Watch(live, plan)
    tokens = feed.tokens(live)
    done = 0
    try:
        with one_thread(live.device), memory_told("calibrating"), padding_known(live), torch.inference_mode():
            for inputs, _ in batched(live, tokens, feed.batch_size):
                watch.masks = masks_of(inputs)
                live.run(inputs, **({"use_cache": False} if live.task in (CAUSAL, SEQ2SEQ) else {}))
                done += len(inputs["input_ids"])
                if progress:
                    progress(done, len(tokens))
    finally:
        watch.close()
    layers = {name: layer for name, layer in watch.layers.items() if layer.tokens}
    for name, layer in layers.items():
        if not math.isfinite(layer.signal + layer.spread + layer.output):
            raise DataError(f"the model has NaN or Inf in the inputs of {name}: {live.suspects}")
    unreached = tuple(name for name, layer in watch.layers.items() if not layer.tokens)
    return Calibration(layers, len(tokens), sum(len(one.ids) for one in tokens), unreached)


class _Watch:
    """Hooks on the linear layers whose weight is a tensor of the checkpoint, of the base's shape."""

    def __init__(self, live: Any, plan: Plan) -> None:
        import torch
        from transformers.pytorch_utils import Conv1D

        self.layers: dict[str, Layer] = {}
        self.masks: list[Any] = []
        aligned = {
            t.name: t for t in plan.alignment.tensors if t.base and t.models[0] and t.base.shape == t.models[0].shape
        }
        # An embedding that is also the head is judged as what it is first: a table.
        names = {
            id(tensor): name for name, tensor in live.tensors(aligned).items() if aligned[name].group != "embeddings"
        }
        self._cached = sum(4 * math.prod(tensor.shape) for tensor in aligned.values()) <= _CACHED
        self._deltas: dict[str, Any] = {}
        self._hooks = []
        for module in live.model.modules():
            name = names.get(id(getattr(module, "weight", None)))
            if name is None or not isinstance(module, torch.nn.Linear | Conv1D):
                continue
            self.layers[name] = Layer()
            base = aligned[name].base
            assert base is not None
            self._hooks.append(module.register_forward_pre_hook(self._hook(name, base, isinstance(module, Conv1D))))

    def _hook(self, name: str, base: TensorInfo, transposed: bool) -> Any:
        def see(module: Any, arguments: tuple[Any, ...]) -> None:
            if arguments:
                weight = module.weight.T if transposed else module.weight
                self._add(name, weight.float(), self._delta(name, weight, base, transposed), arguments[0])

        return see

    def _delta(self, name: str, weight: Any, base: TensorInfo, transposed: bool) -> Any:
        import torch

        if name in self._deltas:
            return self._deltas[name]
        dtype = dtype_named(base.dtype)
        raw = np.empty(base.nbytes, np.uint8)
        base.source.read_into(raw, 0)
        values: Floats = np.empty(base.count, np.float64 if dtype.name == "F64" else np.float32)
        widen(raw, dtype, values)
        before = torch.from_numpy(values.astype(np.float32, copy=False)).reshape(base.shape)
        delta = weight.float() - (before.T if transposed else before).to(weight.device)
        if self._cached:
            self._deltas[name] = delta
        return delta

    def _add(self, name: str, weight: Any, delta: Any, values: Any) -> None:
        """(out, in) weight and delta, the layer's input -> its sums, in float64 over float32 products."""
        rows = self._without_padding(values).float()
        squares = rows.double().square().sum(0)  # (in,) ||X_j||^2
        layer = self.layers[name]
        layer.signal += float((rows @ delta.T).double().square().sum())
        layer.spread += float(delta.double().square().sum(0) @ squares)
        layer.output += float((rows @ weight.T).double().square().sum())
        layer.tokens += len(rows)

    def _without_padding(self, values: Any) -> Any:
        """(rows, tokens, in), (rows tokens, in) or (rows, in) -> (n, in); what has lost its order (an expert's
        share of the tokens) is taken whole, padding included: batches of one row have none."""
        found = without_padding(values, self.masks)
        if found is None:
            found = without_padding(values.reshape(-1, values.shape[-1]), self.masks)
        return values.reshape(-1, values.shape[-1]) if found is None else found

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
