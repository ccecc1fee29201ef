# SPDX-License-Identifier: Apache-2.0
"""Judging by rows of data: one forward pass over each, and what the model makes of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from darekit.errors import DataError
from darekit.evaluation import scores
from darekit.evaluation.items import Items
from darekit.evaluation.scores import Floats, Ints, Score
from darekit.live.batches import asked_of, padded, padding_known
from darekit.live.data import Row, Tokens, rows_digest, tokenize
from darekit.live.models import LiveModel, memory_told, one_thread
from darekit.live.reading import refuse_foresight
from darekit.live.tasks import CAUSAL, CLASSIFIER, REGRESSOR, SEQ2SEQ, rows_of
from darekit.wording import some
from darekit.wording.progress import Progress

BATCH_SIZE = 16
COMPLETION, LABEL, TEXT = "a completion", "a label", "text alone"
JUDGED_BY = {CAUSAL: (TEXT, COMPLETION), SEQ2SEQ: (COMPLETION,), CLASSIFIER: (LABEL,), REGRESSOR: (LABEL,)}
METRICS = {
    COMPLETION: ("exact_match", "loss"),
    LABEL: ("accuracy", "matthews", "f1", "pearson", "spearman"),
    TEXT: ("loss", "perplexity"),
}


@dataclass
class Examples:
    """The judge of `{data: FILE}`. What it measures follows from the rows and the model:

    - prompt and completion: `exact_match` (every token of the completion and its end is the likeliest one: what
      greedy decoding gives, in one pass) and `loss` per token of the completion; an encoder-decoder has the prompt in
      its encoder and is asked for the completion as its tokenizer makes a target of it;
    - text and label: `accuracy`, `matthews` and, for two classes, `f1`; for a regressor `pearson` and `spearman`;
    - text: `loss` per token, and `perplexity`.

    `samples`: what the last model made of each row. `note`: how many rows were cut for it, if any were.
    """

    rows: Sequence[Row]
    source: str
    batch_size: int = BATCH_SIZE
    max_length: int | None = None
    progress: Progress | None = None
    samples: list[dict[str, Any]] = field(default_factory=list, repr=False)
    note: str = ""
    _tokens: tuple[Any, int, list[Tokens]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.form = form_of(self.rows[0])
        for row in self.rows:
            if form_of(row) != self.form:
                raise DataError(
                    f"{self.rows[0].place} has {self.form} and {row.place} has {form_of(row)}; all rows of a file are "
                    "judged in one way: split the file, and name several judges"
                )

    def __call__(self, live: LiveModel) -> Mapping[str, Score]:
        """Scores of the model as it is now."""
        self._refuse(live)
        tokens = self._tokenized(live)
        with self._judging(live):
            if live.task in (CLASSIFIER, REGRESSOR):
                return self._labelled(live, tokens)
            return self._predicted(live, tokens)

    def score_names(self) -> tuple[str, ...]:
        """Names of the scores that there can be: some are a classifier's, others a regressor's."""
        return METRICS[self.form]

    def sizes(self) -> Mapping[str, int]:
        """All rows are one group of items."""
        return {"": len(self.rows)}

    def ask(self, live: LiveModel, places: Mapping[str, Sequence[int]]) -> Mapping[str, Items]:
        """What the model as it is now makes of these rows: `exact_match` and `loss`, or `accuracy`."""
        self._refuse(live)
        every = self._tokenized(live)
        tokens = [every[place] for place in places[""]]
        with self._judging(live):
            if live.task == REGRESSOR:
                return {}  # a correlation is no mean over rows
            if live.task == CLASSIFIER:
                found, labels = self._classified(live, tokens)
                return {
                    "accuracy": Items((found.argmax(1) == np.array(labels)).astype(np.float64), np.ones(len(tokens)))
                }
            loss, right, counts = self._measured(live, tokens)
        losses = Items(loss, counts.astype(np.float64), False)
        if self.form == TEXT:
            return {"loss": losses}
        return {"exact_match": Items(right.astype(np.float64), np.ones(len(tokens))), "loss": losses}

    @contextmanager
    def _judging(self, live: LiveModel) -> Iterator[None]:
        import torch

        told = memory_told(f"judging by {self.source} in batches of {self.batch_size}")
        with one_thread(live.device), told, torch.inference_mode(), padding_known(live):
            if live.task == CAUSAL:
                refuse_foresight(live)
            yield

    def identity(self) -> dict[str, Any]:
        """What decides about the scores, in JSON-able form."""
        digest = rows_digest(self.rows)
        return {"data": self.source, "rows": len(self.rows), "digest": digest, "max_length": self.max_length}

    def _refuse(self, live: LiveModel) -> None:
        if self.form not in JUDGED_BY.get(live.task, ()):
            word = "; put the label into the completion as a word" if self.form == LABEL and live.task == CAUSAL else ""
            has = "labels" if self.form == LABEL else self.form
            raise DataError(f"{self.source} has {has}, but {live.kind}: {rows_of(live.model)}{word}")
        if live.tokenizer is None:
            raise DataError(f"judging by {self.source} needs a tokenizer, but the model has none")

    def _tokenized(self, live: LiveModel) -> list[Tokens]:
        length = min(self.max_length or live.max_length, live.max_length)
        if self._tokens is None or self._tokens[0] is not live.tokenizer or self._tokens[1] != length:
            tokens = tokenize(live.tokenizer, self.rows, max_length=length, apart=live.task == SEQ2SEQ)
            if len(tokens) < len(self.rows):
                made = {row.place for row in tokens}
                place = next(row.place for row in self.rows if row.place not in made)
                raise DataError(f"{place}: the tokenizer produces no tokens for this row, so it cannot be judged")
            end = live.tokenizer.eos_token_id
            for row in tokens if self.form == COMPLETION and end is not None else ():
                if row.last != end:
                    raise DataError(
                        f"{row.place}: the completion does not fit into {length} tokens, so it cannot be "
                        "judged; shorten it or raise max_length"
                    )
            if self.form != LABEL and not any(row.targets for row in tokens):
                raise DataError(f"{self.source}: no row has two tokens, so there is nothing to predict")
            cut = [row.place for row in tokens if row.cut]
            self.note = f"{len(cut)} of {len(tokens)} rows are longer than {length} tokens and are cut: {some(cut, 2)}"
            self.note = self.note if cut else ""
            self._tokens = live.tokenizer, length, tokens
        return self._tokens[2]

    def _measured(self, live: LiveModel, tokens: list[Tokens]) -> tuple[Floats, npt.NDArray[np.bool_], Ints]:
        """Each row's summed loss, whether all of it is right, and how many targets it has."""
        import torch

        loss, right = np.zeros(len(tokens)), np.zeros(len(tokens), bool)
        counts = np.array([row.targets for row in tokens], np.int64)
        forced = _forced_first(live)
        for places, batch, inputs in self._batches(live, tokens):
            asked, targets = asked_of(live, batch, inputs)
            # Only what is asked becomes float32: (targets, vocabulary), not (batch, length, vocabulary).
            asked, narrow = _narrowed(live, asked)
            logits = _logits_of(live, inputs, use_cache=False, **narrow)[asked].float()
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().cpu().numpy()
            hits = (logits.argmax(-1) == targets).cpu().numpy()
            begin = 0
            for at, place in enumerate(places):
                own = slice(begin, begin := begin + int(counts[place]))
                if forced is not None and batch[at].answer[:1] == (forced,):
                    hits[own.start] = True
                loss[place], right[place] = losses[own].sum(), bool(hits[own].all())
                _refuse_nonfinite(loss[place], "loss", batch[at], live)
        return loss, right, counts

    def _predicted(self, live: LiveModel, tokens: list[Tokens]) -> dict[str, Score]:
        loss, right, counts = self._measured(live, tokens)
        self.samples = [
            {"place": row.place, "tokens": int(counts[at]), "loss": loss[at] / max(counts[at], 1)}
            | ({"right": bool(right[at])} if self.form == COMPLETION else {})
            for at, row in enumerate(tokens)
        ]
        asked_rows = counts > 0
        mean = scores.mean_loss(loss[asked_rows], counts[asked_rows])
        if self.form == TEXT:
            return {"loss": mean, "perplexity": scores.perplexity(mean)}
        return {"exact_match": scores.share(right), "loss": mean}

    def _classified(self, live: LiveModel, tokens: list[Tokens]) -> tuple[Floats, list[int | float]]:
        """(rows, classes) outputs, and the labels."""
        classes = int(live.model.config.num_labels)
        labels = [label_of(row, live) for row in tokens]
        outputs = np.zeros((len(tokens), classes))
        for places, batch, inputs in self._batches(live, tokens):
            logits = _logits_of(live, inputs).double().cpu().numpy()
            for at, place in enumerate(places):
                outputs[place] = logits[at]
                _refuse_nonfinite(logits[at].sum(), "output", batch[at], live)
        return outputs, labels

    def _labelled(self, live: LiveModel, tokens: list[Tokens]) -> dict[str, Score]:
        outputs, labels = self._classified(live, tokens)
        found: Any = outputs[:, 0] if live.task == REGRESSOR else outputs.argmax(1)
        self.samples = [
            {"place": row.place, "label": label, "found": at.item()}
            for row, label, at in zip(tokens, labels, found, strict=True)
        ]
        if live.task == REGRESSOR:
            return scores.regression(found, np.array(labels, np.float64))
        return scores.classification(found, np.array(labels, np.int64), classes=outputs.shape[1])

    def _batches(
        self, live: LiveModel, tokens: Sequence[Tokens]
    ) -> Iterator[tuple[list[int], list[Tokens], dict[str, Any]]]:
        """(places in `tokens`, rows, inputs) of each batch, longest first: little padding, the largest at once."""
        order = sorted(range(len(tokens)), key=lambda place: -len(tokens[place].ids))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            rows = [tokens[place] for place in places]
            yield places, rows, padded(live, rows)
            if self.progress:
                self.progress(start + len(rows), len(tokens))


def _logits_of(live: LiveModel, inputs: Mapping[str, Any], **more: Any) -> Any:
    """(rows, width, tokens) or (rows, labels).

    Raises:
        DataError: the model gives none.
    """
    logits = getattr(live.run(inputs, **more), "logits", None)
    if logits is None:
        raise DataError(f"{live.kind}, and gives no logits: {rows_of(live.model)}")
    return logits


def _narrowed(live: LiveModel, asked: Any) -> tuple[Any, dict[str, Any]]:
    """What is asked, (rows, width) bool -> the same for the columns in which anything is, and the argument by which the
    head computes these alone: it is a fifth of a small model's work, and where answers are short most of it is for
    nothing. Models that do not take the argument get none."""
    keep = inspect.signature(live.model.forward).parameters.get("logits_to_keep")
    if live.task != CAUSAL or keep is None or "Tensor" not in str(keep.annotation):
        return asked, {}
    columns = asked.any(0).nonzero().flatten()
    return asked[:, columns], {"logits_to_keep": columns}


def _forced_first(live: LiveModel) -> int | None:
    """The token with which an encoder-decoder's answers begin, whatever it predicts (BART's, a language's)."""
    found = getattr(getattr(live.model, "generation_config", None), "forced_bos_token_id", None)
    return int(found) if live.task == SEQ2SEQ and isinstance(found, int) else None


def _refuse_nonfinite(value: float, what: str, row: Tokens, live: LiveModel) -> None:
    if not np.isfinite(value):
        raise DataError(f"{row.place}: the model's {what} is {value}: {live.suspects}")


def form_of(row: Row) -> str:
    """Which kind of row it is."""
    return COMPLETION if row.completion is not None else LABEL if row.label is not None else TEXT


def label_of(row: Tokens, live: LiveModel) -> int | float:
    """A row's label as the model's head counts them; a word is looked up in the config's `label2id`.

    Raises:
        DataError: the head has no such label.
    """
    label, config = row.label, live.model.config
    if live.task == REGRESSOR:
        if isinstance(label, str):
            raise DataError(f"{row.place}: label {label!r} is a word, but the model is a regressor: it needs a number")
        return float(label or 0)
    if isinstance(label, str):
        named = {str(name): int(index) for name, index in (config.label2id or {}).items()}
        if label not in named:
            raise DataError(f"{row.place}: label {label!r} is not one of the model's: {', '.join(named)}")
        return named[label]
    if label is None or label != int(label) or not 0 <= label < config.num_labels:
        raise DataError(f"{row.place}: label {label}, but the model has the classes 0 to {config.num_labels - 1}")
    return int(label)
