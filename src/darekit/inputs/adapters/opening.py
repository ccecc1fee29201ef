# SPDX-License-Identifier: Apache-2.0
"""Adapters opened as models: `base+adapter`, or an adapter alone on the base of the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from darekit.checkpoints import Checkpoint, TensorInfo
from darekit.checkpoints.companions import Companions
from darekit.checkpoints.hub import looks_like_hub_id
from darekit.checkpoints.opening import places_of
from darekit.errors import CheckpointError
from darekit.inputs.adapters.changes import match
from darekit.inputs.adapters.files import AdapterFiles, find_adapter, open_adapter
from darekit.inputs.adapters.sources import AdaptedSource, Shelf
from darekit.inputs.kinds import Opener, Opening
from darekit.recipe.names import same_model
from darekit.wording import label


def _find_pair(opening: Opening) -> str | None:
    """The name, where it reads model+adapter and nothing of that whole name is here."""
    return None if pair_of(opening) is None else str(opening.ref)


def pair_of(opening: Opening) -> tuple[str, str] | None:
    """Model and adapter of a name with a plus; None where it is the name of something else.

    A file or folder of the whole name goes before. Either side may have a plus in its name, so what is here decides.
    """
    ref = str(opening.ref)
    if "+" not in ref or isinstance(opening.ref, Path) or _is_here(opening, ref):
        return None
    pairs = [(ref[:i], ref[i + 1 :]) for i, char in enumerate(ref) if char == "+"][::-1]
    pairs = [(left, right) for left, right in pairs if left and right]
    for left, right in pairs:
        if find_adapter(right, opening.search) is not None:
            return left, right
    for left, right in pairs:
        if looks_like_hub_id(right) and "@" not in left.rpartition("/")[2].partition("+")[0]:
            return left, right
    return next(((left, right) for left, right in pairs if _is_here(opening, left)), None)


def _is_here(opening: Opening, ref: str) -> bool:
    try:
        return any(place.exists() for place in places_of(ref, opening.search))
    except OSError:
        return False


def _open_pair(opening: Opening) -> Checkpoint:
    pair = pair_of(opening)
    assert pair is not None
    left, right = pair
    place = find_adapter(right, opening.search)
    if place is None:
        raise CheckpointError(
            f"{opening.ref}: there is no adapter {right!r}: expected a folder with adapter_config.json and "
            "adapter_model.safetensors"
        )
    base = opening.base
    if base is not None and same_model(left, base.ref, opening.search):
        return _adapted(base, place, str(opening.ref), owned=False)
    below = opening.open(left)
    try:
        return _adapted(below, place, str(opening.ref), owned=True)
    except BaseException:
        below.close()
        raise


def _find_alone(opening: Opening) -> Path | None:
    return find_adapter(opening.ref, opening.search)


def _open_alone(opening: Opening) -> Checkpoint:
    assert opening.base is not None
    return _adapted(opening.base, Path(opening.ref), str(opening.ref), owned=False)


def _adapted(base: Checkpoint, place: Path, ref: str, *, owned: bool) -> Checkpoint:
    """A base with an adapter on it; `owned`: closing the result closes the base."""
    adapter = open_adapter(place)
    try:
        return adapted(base, adapter, ref, owned=owned)
    except BaseException:
        adapter.close()
        raise


def adapted(base: Checkpoint, adapter: AdapterFiles, ref: str, *, owned: bool = False) -> Checkpoint:
    """A base with an open adapter on it, as a checkpoint; `owned`: closing it closes the base too.

    Raises:
        CheckpointError, HomologyError: they do not belong together; see `changes.match`.
    """
    matched = match(adapter.config, adapter.tensors, base, ref)
    shelf = Shelf()

    def changed() -> Iterator[tuple[str, TensorInfo]]:
        for name, info in base.tensors.items():
            change = matched.changes.get(name)
            if change is None:
                yield name, info
                continue
            shape = info.shape if change.whole is None else change.whole.shape
            yield name, replace(info, shape=shape, source=AdaptedSource(info, shape, change, shelf))

    companions: Companions = dict(base.companions)
    return Checkpoint(
        ref=ref,
        directory=None,
        tensors=dict(changed()),
        config=base.config,
        files=(*adapter.files, *(base.files if owned else ())),
        revision=None,
        companions=companions,
        notes=tuple(f"{label(ref)}: {note}" for note in _notes(adapter, base)),
    )


def _notes(adapter: AdapterFiles, base: Checkpoint) -> Iterator[str]:
    yield from ()


PAIR = Opener("a model with an adapter", _find_pair, _open_pair)
ALONE = Opener("an adapter", _find_alone, _open_alone, needs_base=True, instead="or name both as one model, BASE+{ref}")
