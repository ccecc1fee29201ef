# SPDX-License-Identifier: Apache-2.0
"""A base with an adapter on it, as a checkpoint: most tensors are the base's own, the others are computed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from darekit.checkpoints import Checkpoint, TensorInfo, natural_key
from darekit.checkpoints.companions import CONFIG, TEMPLATES, TOKENIZER, Companions, companions_in
from darekit.errors import NotFetched
from darekit.inputs.adapters.config import Layout
from darekit.inputs.adapters.files import AdapterFiles
from darekit.inputs.adapters.matching import Matched, match
from darekit.inputs.adapters.sources import AdaptedSource, Shelf, is_idle, refuse_nonfinite
from darekit.wording import label


def adapted(
    base: Checkpoint, adapter: AdapterFiles, ref: str, *, notes: Sequence[str] = (), layout: Layout | None = None
) -> Checkpoint:
    """A base with an open adapter on it, as a checkpoint. Closing it closes the adapter, and not the base.

    Raises:
        DataError: its values are NaN or Inf.
        CheckpointError, HomologyError: they do not belong together; see `matching.match`.
    """
    matched = match(adapter.config, adapter.tensors, base, ref, layout)
    found = [*notes, *matched.notes]
    with suppress(NotFetched):  # of what has only its headers here, nothing is known of values
        refuse_nonfinite(adapter.tensors.values(), ref)
        if is_idle(matched.changes.values()):
            found.append(
                "WARNING: every factor B is 0, so this adapter changes nothing: it was saved before it was trained, or "
                "its trained weights were saved under other names"
            )
    config = _config(base, matched)
    return Checkpoint(
        ref=ref,
        directory=None,
        tensors=dict(_tensors(base, matched)),
        config=config,
        files=adapter.files,
        revision=None,
        companions=_companions(base, adapter, config),
        notes=(*base.notes, *(f"{label(ref)}: {note}" for note in found)),
        left=base.left,
    )


def is_adapted(checkpoint: Checkpoint) -> bool:
    """Whether an adapter changes anything in it."""
    return any(isinstance(info.source, AdaptedSource) for info in checkpoint.tensors.values())


def _tensors(base: Checkpoint, matched: Matched) -> Iterator[tuple[str, TensorInfo]]:
    shelf = Shelf()

    def changed(name: str, info: TensorInfo) -> TensorInfo:
        change = matched.changes.get(name)
        if change is None:
            return info
        shape = info.shape if change.whole is None else change.whole.shape
        return replace(info, shape=shape, source=AdaptedSource(info, shape, change, shelf))

    found = {name: info for name, info in {**base.tensors, **matched.added}.items() if name not in matched.gone}
    names = found if not matched.added else sorted(found, key=natural_key)
    for name in names:
        yield name, changed(name, found[name])


def _config(base: Checkpoint, matched: Matched) -> Mapping[str, Any] | None:
    """The base's config, with what the adapter has made of it."""
    if base.config is None or not matched.config:
        return base.config
    found: dict[str, Any] = json.loads(json.dumps(base.config))
    for key, value in matched.config.items():
        *parts, last = key.split(".")
        into = found
        for part in parts:
            into = into.setdefault(part, {})
        into[last] = value
    return found


def _companions(base: Checkpoint, adapter: AdapterFiles, config: Mapping[str, Any] | None) -> Companions:
    """The base's, with the adapter's tokenizer where it brings one."""
    own = {
        name: content
        for name, content in companions_in(adapter.folder).items()
        if _is_of(name, TOKENIZER) or _is_of(name, TEMPLATES)
    }
    found = dict(base.companions)
    if any(_is_of(name, TOKENIZER) for name in own):
        found = {n: c for n, c in found.items() if not _is_of(n, TOKENIZER) and not _is_of(n, TEMPLATES)}
    found |= own
    if config is not base.config and CONFIG in found:
        found[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return found


def _is_of(name: str, patterns: Sequence[str]) -> bool:
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)
