# SPDX-License-Identifier: Apache-2.0
"""What happens to one batch: squared gradients of log-likelihoods, or products of inputs, added up in float32.

A pass over the data makes the sums of one group of tensors; what is added to a sum does not depend on its group.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

from darekit.architectures.layout import Part
from darekit.errors import DataError, Unsupported
from darekit.live.batches import asked_of, masks_of, padded, without_padding
from darekit.live.data import Tokens
from darekit.live.models import LiveModel
from darekit.live.tasks import CAUSAL, CLASSIFIER, REGRESSOR, SEQ2SEQ

EMPIRICAL, SAMPLED, EXACT = "empirical", "sampled", "exact"
LABELS = (EMPIRICAL, SAMPLED, EXACT)

BLOCK = 1024  # rows and columns of a Gram that are mirrored at once


_Goal = tuple[str, slice | None, Part]  # a sum, its rows where they are not all, and what goes into it of a gradient


class Pass(Protocol):
    """Passes over data.

    Attributes:
        sums: name -> float32 tensor on the model's device: what has been added up so far in this pass.
        spoilt: whether the sums hold a part of a batch, or NaN or Inf, so that they must not be kept.
    """

    sums: dict[str, Any]
    spoilt: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All sums that are still thought to be needed, in the file's order."""

    def explore(self, example: Tokens) -> None:
        """Find out from one example what can be known of `shapes` before the first pass."""

    def begin(self, names: Collection[str]) -> None:
        """Forget the sums; from now on make those of `names`."""

    def see(self, batch: Sequence[Tokens], first: int) -> None:
        """Add a batch, whose first example has the index `first` among all."""

    def finish(self) -> None:
        """The pass has seen everything: settle the sums; a second call changes nothing."""

    def state(self) -> dict[str, Any]:
        """What besides the sums a resumed run must know; JSON-able."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`, after `begin`."""

    def close(self) -> None:
        """Leave the model as it was."""


class FisherPass:
    """Diagonal Fisher: the sum over examples of the squared gradient of each example's log-likelihood.

    One example at a time, since the square of a batch's gradient is not the sum of its examples' squares. A gradient
    is squared and added as soon as it is complete, so that only one tensor's gradient is in memory. Only the tensors of
    the group ask for one, so autograd goes back no further than to the first of them.

    Args:
        live: the model.
        parts: name in the checkpoint -> the live tensors that hold it, one after another along its first axis, and the
            way to what is its own of each.
        labels: empirical: targets are the data's. sampled: drawn from the model's own predictions (of a causal model
            at each position, given the data before it). exact: the expectation over a head's labels.
        seed: of the draws; each example has its own, so that neither order nor interruption matters.
    """

    def __init__(
        self, live: LiveModel, parts: Mapping[str, Sequence[tuple[Any, Part]]], *, labels: str, seed: int
    ) -> None:
        import torch

        if live.task not in (CAUSAL, SEQ2SEQ, CLASSIFIER, REGRESSOR):
            raise Unsupported(
                f"a Fisher needs the log-likelihood of each row, but {live.kind}, and has none for text; Gram matrices "
                "(`dare stats gram`) need none"
            )
        if labels == EXACT and live.task in (CAUSAL, SEQ2SEQ):
            raise Unsupported(
                "exact sums over all labels, and for a model that writes text these are its whole vocabulary at every "
                "position: use empirical or sampled"
            )
        self.live, self.labels, self.seed, self.spoilt = live, labels, seed, False
        self.wanted = {
            name: places
            for name, places in parts.items()
            if all(isinstance(tensor, torch.nn.Parameter) for tensor, _ in places)
        }
        if not self.wanted:
            raise Unsupported("none of the model's parameters has a name from its checkpoint")
        self.sums: dict[str, Any] = {}
        self.factor = 1.0
        self._bad = torch.zeros((), dtype=torch.bool, device=live.device)
        self._hooks: list[Any] = []

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter of the checkpoint's."""
        found = {}
        for name, places in self.wanted.items():
            shapes = [tuple(part.within(tensor).shape) for tensor, part in places]
            found[name] = shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return found

    def explore(self, example: Tokens) -> None:
        """Everything is known."""

    def begin(self, names: Collection[str]) -> None:
        """Zeros for these parameters, which alone need a gradient from now on."""
        import torch

        self.close()
        self.sums = {}  # the old ones go before the new ones come
        shapes = self.shapes()
        self.sums = {
            name: torch.zeros(shapes[name], dtype=torch.float32, device=places[0][0].device)
            for name, places in self.wanted.items()
            if name in names
        }
        goals: dict[int, tuple[Any, list[_Goal]]] = {}  # of each tensor: the sums that want it, or a part of it
        for name in self.sums:
            begin = 0
            for tensor, part in self.wanted[name]:
                rows = None
                if len(self.wanted[name]) > 1:
                    rows = slice(begin, begin := begin + part.within(tensor).shape[0])
                goals.setdefault(id(tensor), (tensor, []))[1].append((name, rows, part))
        self._hooks = [self._follow(tensor, wanted) for tensor, wanted in goals.values()]

    def _follow(self, tensor: Any, goals: Sequence[_Goal]) -> Any:
        """Have each complete gradient of a tensor squared, added and forgotten."""
        tensor.requires_grad_(True)

        def add(parameter: Any) -> None:
            import torch

            gradient = parameter.grad.to(torch.float32)
            for name, rows, part in goals:
                own, total = part.within(gradient), self.sums[name]
                (total if rows is None else total[rows]).addcmul_(own, own, value=self.factor)
            self._bad |= ~torch.isfinite(gradient.sum())
            parameter.grad = None

        return tensor.register_post_accumulate_grad_hook(add)

    def see(self, batch: Sequence[Tokens], first: int) -> None:
        """Add examples, one after the other."""
        for index, example in enumerate(batch, first):
            parts = list(self._log_likelihoods(example, index))
            for _, value in parts:
                if not math.isfinite(float(value.detach())):
                    raise DataError(
                        f"{example.place}: the model's log-likelihood of this row is {float(value.detach())}: "
                        f"{self.live.suspects}"
                    )
            self.spoilt = True  # until all of the example is in the sums
            for place, (factor, value) in enumerate(parts):
                self.factor = factor
                if value.requires_grad:  # the group may be nothing but what this likelihood does not depend on
                    value.backward(retain_graph=place + 1 < len(parts))
            if bool(self._bad):
                raise DataError(
                    f"{example.place}: of this row the model's gradient has NaN or Inf: {self.live.suspects}"
                )
            self.spoilt = False

    def _log_likelihoods(self, example: Tokens, index: int) -> Iterator[tuple[float, Any]]:
        """(factor, scalar) pairs: the Fisher is the sum of factor times the square of the scalar's gradient."""
        import torch

        inputs = padded(self.live, [example])
        logits = self.live.run(inputs).logits[0].float()
        draw = torch.Generator().manual_seed(_seed_of(self.seed, index))
        match self.live.task:
            case "causal" | "encoder-decoder":
                asked, targets = asked_of(self.live, [example], inputs)
                scores = torch.log_softmax(logits[asked[0]], -1)
                if self.labels != EMPIRICAL:
                    targets = _drawn(scores, draw)
                yield 1.0, scores.gather(1, targets[:, None]).sum()
            case "classifier":
                scores = torch.log_softmax(logits, -1)
                if self.labels == EXACT:
                    for label, chance in enumerate(scores.detach().exp().tolist()):
                        yield chance, scores[label]
                    return
                target = self._class_of(example) if self.labels == EMPIRICAL else int(_drawn(scores[None], draw))
                yield 1.0, scores[target]
            case _:  # a normal distribution of variance 1 around the prediction
                if self.labels == EXACT:
                    for value in logits:
                        yield 1.0, value
                    return
                if self.labels == EMPIRICAL:
                    off = self._number_of(example, logits) - logits.detach()
                else:
                    off = torch.randn(logits.shape, generator=draw).to(logits)
                yield 1.0, (off * logits).sum()

    def _class_of(self, example: Tokens) -> int:
        label, config = example.label, self.live.model.config
        known = {str(name): int(number) for name, number in (config.label2id or {}).items()}
        if isinstance(label, str):
            label = known.get(label, int(label) if label.isdecimal() else label)
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < config.num_labels:
            raise DataError(
                f"{example.place}: label {example.label!r}, expected a number from 0 to {config.num_labels - 1}"
                f"{' or one of ' + ', '.join(known) if known else ''}; without labels: --kind sampled or exact"
            )
        return label

    def _number_of(self, example: Tokens, logits: Any) -> float:
        label = example.label
        if logits.numel() != 1 or isinstance(label, str | bool | None) or not math.isfinite(label):
            what = "a number" if logits.numel() == 1 else f"{logits.numel()} numbers, which a row cannot hold"
            raise DataError(
                f"{example.place}: label {label!r}, expected {what}; without labels: --kind sampled or exact"
            )
        return float(label)

    def finish(self) -> None:
        """Nothing is left to do."""

    def state(self) -> dict[str, Any]:
        """Nothing but the sums."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing but the sums."""

    def close(self) -> None:
        """Remove the hooks; the model's parameters need no gradient again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for tensor, _ in (place for places in self.wanted.values() for place in places):
            tensor.requires_grad_(False)
            tensor.grad = None


def _seed_of(seed: int, index: int) -> int:
    text = f"darekit-labels-1 {seed} {index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")


def _drawn(scores: Any, draw: Any) -> Any:
    """(n, labels) log-probabilities -> (n,) labels, drawn on the CPU's generator so that devices agree."""
    import torch

    sums = scores.detach().exp().cumsum(-1)
    level = torch.rand(len(scores), 1, generator=draw).to(sums) * sums[:, -1:]
    return torch.searchsorted(sums, level, right=True)[:, 0].clamp(max=scores.shape[1] - 1)


class GramPass:
    """Gram matrices: of every linear layer, the sum over tokens of x x^T, x its input. Padding is left out.

    Layers that are given one and the same input (queries, keys and values) have one sum, under the name of the first
    that is reached. Every pass watches all layers for that, and adds up its own group's.

    Attributes:
        layers: name of a layer's weight -> how many inputs it has.
        owners: name of a layer's weight -> under which name its sum is.
        rows: name of a sum -> how many inputs were added.
        transposed: weights stored [in, out] (GPT-2's Conv1D).
        tied: layers left out because their weight is also something else's (a head tied to the embedding).
    """

    def __init__(self, live: LiveModel, names: Mapping[str, Any]) -> None:
        import torch
        from transformers.pytorch_utils import Conv1D

        by_tensor = {id(tensor): name for name, tensor in names.items()}
        uses: dict[int, int] = {}
        for module in live.model.modules():
            for parameter in module.parameters(recurse=False):
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        self.live, self.spoilt = live, False
        self.sums: dict[str, Any] = {}
        self.owners: dict[str, str] = {}
        self.rows: dict[str, int] = {}
        self.transposed: list[str] = []
        self.tied: list[str] = []
        self.layers: dict[str, int] = {}
        self._group: frozenset[str] = frozenset()
        self._calls: dict[str, int] = {}  # of the first example's layers
        self._left: set[str] | None = None  # what is still to come of a batch that ends early
        self._hooks: list[Any] = []
        self._last: tuple[Any, str] | None = None
        self._masks: list[Any] = []
        self._bad = torch.zeros((), dtype=torch.bool, device=live.device)
        for path, module in live.model.named_modules():
            if not isinstance(module, torch.nn.Linear | Conv1D):
                continue
            name = by_tensor.get(id(module.weight))
            if uses[id(module.weight)] > 1:
                self.tied.append(f"{path}.weight")
            elif name is not None:
                self.layers[name] = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
                self.transposed += [name] if isinstance(module, Conv1D) else []
                self._hooks.append(module.register_forward_pre_hook(self._hook(name)))
        if not self.layers:
            raise Unsupported(
                "none of the model's linear layers has a name from its checkpoint, so there is no Gram matrix to make"
            )

    @property
    def missing(self) -> list[str]:
        """Layers that no input has reached."""
        return [name for name in self.layers if name not in self.owners]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every layer that owns its input, or was not reached yet."""
        return {name: (n, n) for name, n in self.layers.items() if not self.shares(name)}

    def shares(self, name: str) -> bool:
        """Whether a layer's sum is under another one's name."""
        return self.owners.get(name, name) != name

    def explore(self, example: Tokens) -> None:
        """Let one example through, to see which layers share an input, and whether each has exactly one a batch."""
        self.begin(())
        self._calls = dict.fromkeys(self.layers, 0)
        self.see([example], 0)

    def begin(self, names: Collection[str]) -> None:
        """Sums of these layers; each gets its memory when the first input reaches it."""
        self.sums = {}
        self._group = frozenset(names)
        self.rows |= dict.fromkeys(names, 0)

    def _hook(self, name: str) -> Any:
        def add(module: Any, arguments: tuple[Any, ...]) -> None:
            if arguments:
                self._add(name, arguments[0])

        return add

    def _add(self, name: str, values: Any) -> None:
        import torch

        if not self._group:
            self._calls[name] += 1
        shared = self._last[1] if self._last is not None and self._last[0] is values else name
        owner = self.owners.setdefault(name, shared)
        if owner != name:
            if shared != owner:
                raise Unsupported(f"{name} shared its input with {owner} in the first batch, but no longer does")
            return
        self._last = values, name
        if name not in self._group:
            return
        rows = self._without_padding(values).to(torch.float32)
        self._bad |= ~torch.isfinite(rows.sum())
        if name not in self.sums:
            size = self.layers[name]
            self.sums[name] = torch.zeros(size, size, dtype=torch.float32, device=rows.device)
        self.sums[name].addmm_(rows.T, rows)
        self.rows[name] += rows.shape[0]
        if self._left is not None:
            self._left.discard(name)
            if not self._left:
                raise _EnoughError

    def _without_padding(self, values: Any) -> Any:
        """(batch, tokens, in), (batch tokens, in) or (batch, in) -> (rows, in)."""
        found = without_padding(values, self._masks)
        if found is not None:
            return found
        if values.dim() == 2 and values.shape[0] == self._masks[0].shape[0]:  # a pooler's: one of each example
            return values
        if all(bool(mask.all()) for mask in self._masks):
            return values.reshape(-1, values.shape[-1])
        raise DataError(
            f"a layer's input has the shape {list(values.shape)}, so the padding in it cannot be identified: use "
            "--batch-size 1"
        )

    def _ends_early(self) -> bool:
        """Whether the layers behind the group's need not run: only if each layer has had exactly one input (experts and
        layers that are used again have others), and only if there are such layers."""
        owners = [name for name in self.layers if self.owners.get(name) == name]
        return bool(self._group) and owners[-1] not in self._group and set(self._calls.values()) == {1}

    def see(self, batch: Sequence[Tokens], first: int) -> None:
        """Add a batch, padded on the right."""
        import torch

        inputs = padded(self.live, batch)
        self._masks, self._last = masks_of(inputs), None
        self._left = set(self._group) if self._ends_early() else None
        self.spoilt = True  # until all layers have seen the batch
        output = None
        try:
            with torch.no_grad():
                output = self.live.run(inputs)
        except _EnoughError:
            pass
        finally:
            masks, self._masks, self._last, self._left = self._masks, [], None, None
        found = getattr(output, "logits", getattr(output, "last_hidden_state", None))
        if found is not None:
            rows = without_padding(found, masks) if found.dim() == 3 else found
            self._bad |= ~torch.isfinite(found if rows is None else rows).all()
        if bool(self._bad):
            raise DataError(
                f"{batch[0].place} to {batch[-1].place}: the model's output, or the input of one of its layers, has "
                f"NaN or Inf: {self.live.suspects}"
            )
        self.spoilt = False

    def finish(self) -> None:
        """Products of matrices are symmetric but for the last bits: the mean with the transposed, block by block."""
        for total in self.sums.values():
            starts = range(0, len(total), BLOCK)
            for top in starts:
                for left in starts[top // BLOCK :]:
                    above = total[top : top + BLOCK, left : left + BLOCK]
                    below = total[left : left + BLOCK, top : top + BLOCK]
                    mean = (above + below.T) / 2
                    above.copy_(mean)
                    below.copy_(mean.T)

    def state(self) -> dict[str, Any]:
        """Which layers share an input, the numbers of rows, and the calls of the first example."""
        return {"owners": self.owners, "rows": self.rows, "calls": self._calls}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.owners, self.rows, self._calls = dict(state["owners"]), dict(state["rows"]), dict(state["calls"])

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()


class _EnoughError(Exception):
    """The last layer of a group has been reached; the rest of the model need not run."""
