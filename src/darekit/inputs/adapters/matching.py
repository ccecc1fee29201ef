# SPDX-License-Identifier: Apache-2.0
"""An adapter meets a base: which tensors change, which are new or go, and what config.json must say then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from darekit.architectures.families import Facts, facts_of
from darekit.checkpoints import Checkpoint, TensorInfo
from darekit.checkpoints.checkpoint import content_of
from darekit.errors import CheckpointError, HomologyError
from darekit.inputs.adapters.changes import Found, find_changes, matrices_of
from darekit.inputs.adapters.config import AdapterConfig, Layout
from darekit.inputs.adapters.names import Names
from darekit.inputs.adapters.sources import Change

_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_TABLES = ("embed_tokens", "lm_head")
_LAST = ("score", "classifier", "out_proj")  # layers of heads whose rows are the labels, whatever lies before them


@dataclass(frozen=True)
class Matched:
    """What an adapter is on a base.

    Attributes:
        changes: name of a tensor of the result -> what happens to it.
        added: tensors that the base lacks, by name, as they are before anything happens to them.
        gone: names of the base's tensors that the result lacks.
        config: what config.json must say: key, with dots -> value.
        notes: what the user should know.
    """

    changes: Mapping[str, Change]
    added: Mapping[str, TensorInfo] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    config: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def match(
    config: AdapterConfig, tensors: Mapping[str, TensorInfo], base: Checkpoint, ref: str, layout: Layout | None = None
) -> Matched:
    """An adapter's config and tensors, and a base -> what the result is.

    Args:
        config: the adapter's.
        tensors: the adapter's, by the names in its file.
        base: whose tensors are changed.
        ref: the adapter, as the user wrote it.
        layout: of experts, as the user says; None: as the config says.

    Raises:
        CheckpointError: its tensors do not belong together: halves, ranks, shapes.
        HomologyError: it is not of this base: names that the base lacks, or other shapes.
        PlanError: nobody says in which order a factor has its experts.
    """
    names = Names(base)
    found = find_changes(config, tensors, base, ref, names, layout)
    made = _Making(config, base, ref, names, found)
    made.warn_of_shared()
    made.settle_ties()
    made.add_heads()
    made.settle_vocabulary()
    return Matched(found.changes, made.added, frozenset(made.gone), made.said, tuple(made.notes))


class _Making:
    """The result in the making."""

    def __init__(self, config: AdapterConfig, base: Checkpoint, ref: str, names: Names, found: Found) -> None:
        self.config, self.base, self.ref, self.names, self.found = config, base, ref, names, found
        self.added: dict[str, TensorInfo] = {}
        self.gone: set[str] = set()
        self.said: dict[str, object] = {}
        self.notes: list[str] = [*config.notes, *found.notes]

    def warn_of_shared(self) -> None:
        """Factors on a table that no layer of an encoder-decoder looks anything up in."""
        for name, change in self.found.changes.items():
            if change.terms and name.endswith("shared.weight") and (self.base.config or {}).get("is_encoder_decoder"):
                self.notes.append(
                    f"WARNING: the adapter has factors on {name}. Encoder and decoder look tokens up in their own "
                    "embed_tokens, which only start from its values, so these factors were not trained; "
                    "they are added to the stored table, as PEFT's merge_and_unload() does"
                )

    # Ties

    def settle_ties(self) -> None:
        """Tensors that are one in the base: they part where the adapter does not do the same to both."""
        for target, source in self.names.ties([*self.found.apart]):
            stored = self.names.stored(target)
            if stored is not None and not self._is_copy(stored, source):
                continue
            own = self.found.apart.pop(target, None) if stored is None else self.found.changes.get(stored)
            other = self.found.changes.get(source)
            if own is None and other is None:
                continue
            if not self.names.facts.is_output_embedding(target):
                if own is not None and other is not None and not _are_alike(own, other):
                    raise CheckpointError(
                        f"{self.ref} changes {target} and {source}, which are one tensor, in two ways"
                    )
                self.found.changes[source] = other or own  # type: ignore[assignment]
                continue
            if self._stays_tied(own, other, source):
                self.found.changes[source] = other or own  # type: ignore[assignment]
                if stored is not None:
                    self.found.changes[stored] = self.found.changes[source]
                continue
            self._untie(target, source, stored, own, other)

    def _is_copy(self, stored: str, source: str) -> bool:
        one, other = self.base.tensors[stored], self.base.tensors[source]
        return one.shape == other.shape and content_of(one) == content_of(other)

    def _stays_tied(self, own: Change | None, other: Change | None, source: str) -> bool:
        if self.config.tie or (own is not None and other is not None and _are_alike(own, other)):
            return True
        if own is None and other is not None and not other.terms:
            # Rows of tokens are trained in both; a vocabulary that has grown is stored once for both.
            return other.whole is None or source not in self.found.saved
        return False

    def _untie(self, target: str, source: str, stored: str | None, own: Change | None, other: Change | None) -> None:
        """The head gets a tensor of its own."""
        name, info = stored or target, self.base.tensors[source]
        which = "the head" if other is None else "the input embedding" if own is None else "both"
        if own is None and other is not None and other.whole is not None and source not in self.found.saved:
            own = Change(other.matrices, whole=other.whole)  # what both were before the embedding was trained
        elif own is None and (before := self.found.before.get(source)) is not None and before.shape != info.shape:
            own = Change(matrices_of(before.shape), whole=before)  # the trained copy is the embedding's alone
        if own is not None:
            self.found.changes[name] = own
        grown = other is None and own is not None and own.whole is not None and own.whole.shape != info.shape
        if grown and name not in self.found.saved:
            assert own is not None
            self.found.changes[source] = Change(own.matrices, whole=own.whole)
        if stored is None:
            self.added[name] = replace(info, name=name, stored=None)
        for key in self.names.facts.output_tie_keys or (() if self.names.facts.is_known else ("tie_word_embeddings",)):
            parts = key.split(".")[:-1]
            if all(isinstance((self.base.config or {}).get(part), dict) for part in parts[:1]):
                self.said[key] = False
        for other_target, other_source in self.names.facts.untied_with_output():
            here, there = self.names.stored(other_source), self.names.stored(other_target)
            memory = self.names.facts.in_memory(other_target)
            if here is not None and there is None and memory not in self.added:
                self.added[memory] = replace(self.base.tensors[here], name=memory, stored=None)
                if here in self.found.changes and not self.names.facts.is_output_embedding(memory):
                    self.found.changes[memory] = self.found.changes[here]
        self.notes.append(
            f"{target} is {source} in the base, and the adapter changes {which}: the result has both tensors, and its "
            "config says that they are not tied"
        )

    # Heads that the base has not

    def add_heads(self) -> None:
        """Modules that were trained as a whole and that the base lacks: those of another class."""
        heads = {name: change.whole for name, change in self.found.apart.items() if change.whole is not None}
        if not heads:
            if self.found.apart:
                raise HomologyError(f"{self.ref} changes {next(iter(self.found.apart))}, which {self.base.ref} lacks")
            return
        facts = self.names.facts
        stem = (facts.class_name or "").partition("For")[0].removesuffix("Model").removesuffix("LMHead")
        suffix = _CLASSES.get(self.config.task or "")
        kind = self.config.model_class or (f"{stem}{suffix}" if suffix else "")
        new = facts_of({"architectures": [kind], "model_type": facts.model_type})
        for name, info in heads.items():
            self.added[name] = replace(info, name=name)
        if new.is_exact and new.class_name != facts.class_name:
            self.said["architectures"] = [kind]
            self.gone |= {
                name for name in self.base.tensors if facts.has_head(name) and not new.has_head(name)
            } - self.found.changes.keys()
            weights = {name: info for name, info in heads.items() if len(info.shape) == 2 and name.endswith(".weight")}
            last = [info for name, info in weights.items() if name.split(".")[-2] in _LAST] or [*weights.values()]
            labels = last[-1].shape[0] if last else 2
            known = (self.base.config or {}).get("id2label")
            if self.config.task in ("SEQ_CLS", "TOKEN_CLS") and len(known or "ab") != labels:
                self.said["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
                self.said["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
            self._warn_of_random(new, kind)
        self.notes.append(
            f"the adapter brings {', '.join(heads)}, which {self.base.ref} lacks"
            + (f": the result is a {kind}" if "architectures" in self.said else "")
        )

    def _warn_of_random(self, new: Facts, kind: str) -> None:
        """What the class has, and nobody stores: it was random in the training, and is random again."""
        names = [*map(self.names.key_of, self.base.tensors), *self.added]
        parts = (*new.heads, *(part for part in self.names.facts.lacks if part not in new.lacks))
        random = [
            part.strip(".") for part in parts if not any(f"{name}.".startswith(f"{part.strip('.')}.") for name in names)
        ]
        if random:
            self.notes.append(
                f"WARNING: a {kind} has {', '.join(random)}, which neither {self.base.ref} nor the adapter "
                "stores: it starts from random values, not from those of the training. Train with it in "
                "modules_to_save, or give a base that has it"
            )

    # Vocabularies that have grown

    def settle_vocabulary(self) -> None:
        """What config.json must say of the number of tokens, where the adapter has another."""
        facts, rows = self.names.facts, {}
        for name, change in self.found.changes.items():
            info = self.base.tensors.get(name) or self.added.get(name)
            if change.whole is None or info is None or change.whole.shape == info.shape:
                continue
            rows[name] = info.shape[0], change.whole.shape[0]
            keys = [key for axis, key in facts.counted(name).items() if axis == 0] or ["vocab_size"]
            for key in keys:
                self.said[key] = change.whole.shape[0]
        if not rows:
            return
        (before, now), *others = dict.fromkeys(rows.values())
        if others:
            raise HomologyError(f"{self.ref} brings tables of {now} and {others[0][1]} tokens")
        for name, info in self.base.tensors.items():
            axis = None if name in rows or name in self.gone else facts.token_axis(name, info.shape)
            if axis is not None and info.shape[axis] == before:
                way = "save the adapter again with save_embedding_layers=True"
                if any(one.rpartition(".")[2] in _TABLES for one in self.config.targets):
                    # What `save_embedding_layers` means then in PEFT, whatever it is set to.
                    way = (
                        "once one of the two tables has factors, PEFT saves no other. Give the base as it was trained "
                        f"on, with {now} tokens, if it was saved; else train with both in modules_to_save"
                    )
                raise HomologyError(
                    f"{self.ref} has {now} tokens, {self.base.ref} {before}, and brings no rows for {name}: {way}"
                )
        self.notes.append(f"the vocabulary has {now} tokens, {before} in the base")


def _are_alike(one: Change, other: Change) -> bool:
    """Whether two changes are the same, as far as samples of what they are made of tell."""
    return one.matrices == other.matrices and one.told() == other.told()
