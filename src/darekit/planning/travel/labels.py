# SPDX-License-Identifier: Apache-2.0
"""What the rows of a classifier stand for. Shapes do not tell: two models of three classes may number them differently,
and a row-wise merge of their heads then adds one class to another. Only their configs say it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from darekit.checkpoints import Checkpoint
from darekit.wording import and_, label

KEYS = ("id2label", "label2id", "problem_type")
SHOWN = 3  # rows that are named
WITHOUT_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")  # whatever id2label says

_PLACEHOLDER = re.compile(r"LABEL_\d+")  # what transformers calls classes that nobody named


def labels_of(config: Mapping[str, Any] | None) -> dict[int, str]:
    """Row of the classifier -> what it stands for, as far as a config says so.

    >>> labels_of({"id2label": {"0": "no", "1": "yes"}}), labels_of({"label2id": {"no": 0, "yes": 1}})
    ({0: 'no', 1: 'yes'}, {0: 'no', 1: 'yes'})
    >>> labels_of({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    {}
    """
    said = config or {}
    classes = said.get("architectures")
    if isinstance(classes, list) and classes and all(str(one).endswith(WITHOUT_CLASSES) for one in classes):
        return {}
    rows, names = said.get("id2label"), said.get("label2id")
    pairs: list[tuple[Any, Any]] = []
    if isinstance(rows, Mapping):
        pairs = list(rows.items())
    elif isinstance(names, Mapping):
        pairs = [(row, name) for name, row in names.items()]
    found = {int(row): str(name) for row, name in pairs if re.fullmatch(r"\d{1,9}", str(row))}
    return {} if all(_PLACEHOLDER.fullmatch(name) for name in found.values()) else dict(sorted(found.items()))


def shared_labels(base: Checkpoint | None, models: Sequence[Checkpoint]) -> dict[str, Any]:
    """The keys of config.json about classes, where all fine-tuned models name the same ones and the base does not."""
    found = [labels_of(one.config) for one in models]
    if not found or not found[0] or any(_folded(one) != _folded(found[0]) for one in found):
        return {}
    if base is None or _folded(labels_of(base.config)) == _folded(found[0]):
        return {}
    configs = [one.config or {} for one in models]
    return {
        key: configs[0][key]
        for key in KEYS
        if key in configs[0] and (key != "problem_type" or len({str(one.get(key)) for one in configs}) == 1)
    }


def label_notes(base: Checkpoint | None, models: Sequence[Checkpoint], shared: Mapping[str, Any]) -> Iterator[str]:
    """Where the rows of classifiers that are merged do not stand for the same.

    `shared`: of `shared_labels`; what the base says of rows counts only without them.
    """
    inputs = [*([base] if base is not None and not shared else []), *models]
    said = [(one, found) for one in inputs if (found := labels_of(one.config))]
    if said:
        first, names = said[0]
        for one, found in said[1:]:
            apart = [row for row in names if _fold(found.get(row, "")) != _fold(names[row])]
            apart += [row for row in found if row not in names]
            if apart:
                told = "; ".join(f"{row} is {_of(names, row)} and {_of(found, row)}" for row in apart[:SHOWN])
                more = f"; and {len(apart) - SHOWN} more" if len(apart) > SHOWN else ""
                yield (
                    f"the classes of {_name(first, base)} and {_name(one, base)} differ ({told}{more}), and their "
                    "heads are merged row by row, so a row of the output stands for neither. Take the head of one "
                    f"model, as with `heads: {models[0].ref}`, or put its rows and its config in the other's order"
                )
    if shared:
        yield f"the output has the class names of {and_([label(one.ref) for one in models])}"
    kinds: dict[str, list[str]] = {}
    for one in models:
        if isinstance(kind := (one.config or {}).get("problem_type"), str):
            kinds.setdefault(kind, []).append(label(one.ref))
    if len(kinds) > 1:
        yield (
            f"problem_type is {', '.join(f'{kind} in {and_(whose)}' for kind, whose in kinds.items())}: heads that "
            f"were trained for different kinds of answers are merged; `heads: {models[0].ref}` takes one of them"
        )


def _fold(name: str) -> str:
    return name.strip().casefold()


def _folded(names: Mapping[int, str]) -> dict[int, str]:
    return {row: _fold(name) for row, name in names.items()}


def _of(names: Mapping[int, str], row: int) -> str:
    return repr(names[row]) if row in names else "nothing"


def _name(one: Checkpoint, base: Checkpoint | None) -> str:
    return "the base" if one is base else label(one.ref)
