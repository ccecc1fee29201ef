# SPDX-License-Identifier: Apache-2.0
"""Adapters opened as models: `base+adapter`, an adapter alone on the base of the recipe or on the one that it names.

All names pass through here, so what reads an adapter is imported when there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from darekit.checkpoints import Checkpoint, InputFile
from darekit.checkpoints.hub import fetch_adapter, looks_like_hub_id
from darekit.checkpoints.opening import places_of
from darekit.checkpoints.refusals import ADAPTER_CONFIG, step_of
from darekit.errors import CheckpointError, PlanError
from darekit.inputs.adapters.finding import find_adapter
from darekit.inputs.kinds import Opener, Opening, open_by
from darekit.recipe.names import same_model
from darekit.wording import some

if TYPE_CHECKING:
    from darekit.inputs.adapters.files import AdapterFiles


def pair_of(opening: Opening) -> tuple[str, str] | None:
    """Model and adapter of a name with a plus; None where it is the name of something else.

    A file or folder of the whole name goes before. Either side may have a plus in its name, so what is here decides.
    """
    ref = str(opening.ref)
    if "+" not in ref or isinstance(opening.ref, Path) or _is_here(opening, ref):
        return None
    pairs = [(ref[:i], ref[i + 1 :]) for i, char in enumerate(ref) if char == "+"][::-1]
    pairs = [(left.strip(), right.strip()) for left, right in pairs if left.strip() and right.strip()]
    for left, right in pairs:
        if find_adapter(right, opening.search) is not None:
            return left, right
    for left, right in pairs:
        if looks_like_hub_id(right) and "@" not in left.rpartition("+")[2]:  # a revision may have a plus
            return left, right
    return next(((left, right) for left, right in pairs if _is_here(opening, left)), None)


def _is_here(opening: Opening, ref: str) -> bool:
    try:
        return any(place.exists() for place in places_of(ref, opening.search))
    except OSError:
        return False


def _find_pair(opening: Opening) -> str | None:
    return None if pair_of(opening) is None else str(opening.ref)


def _open_pair(opening: Opening) -> Checkpoint:
    pair = pair_of(opening)
    assert pair is not None
    left, right = pair
    if find_adapter(right, opening.search) is None and not looks_like_hub_id(right):
        folders = [place for place in places_of(right, opening.search) if place.is_dir()]
        held = [path.parent for place in folders for path in place.glob(f"*/{ADAPTER_CONFIG}")]
        deeper = [str(path) for path in sorted(held, key=step_of)]
        if deeper:
            raise CheckpointError(
                f"{opening.ref}: {right} itself is no adapter; there is one in {some(deeper)}. Give {left}+{deeper[-1]}"
            )
        raise CheckpointError(
            f"{opening.ref}: there is no adapter {right!r}, expected a folder with adapter_config.json and weights, or "
            f"org/name on the Hub; looked for {', '.join(map(str, places_of(right, opening.search)))}"
        )
    base = opening.base
    if base is not None and same_model(left, base.ref, opening.search):
        return _put_on(opening, right, base)
    below = opening.open(left)
    try:
        found = _put_on(opening, right, below)
    except BaseException:
        below.close()
        raise
    return replace(found, files=(*found.files, *below.files))


def _put_on(opening: Opening, right: str, base: Checkpoint) -> Checkpoint:
    from darekit.inputs.adapters.views import is_adapted

    found = open_by(replace(opening, ref=right, base=base, together=True))
    if not is_adapted(found):
        found.close()
        raise CheckpointError(f"{opening.ref}: {right} is a whole model, expected an adapter after the plus")
    return replace(found, ref=str(opening.ref))


def _find_alone(opening: Opening) -> str | Path | None:
    return None if find_adapter(opening.ref, opening.search) is None else opening.ref


def _open_alone(opening: Opening) -> Checkpoint:
    place = find_adapter(opening.ref, opening.search)
    assert place is not None
    return open_on(opening, place)


def open_from_hub(opening: Opening) -> Checkpoint:
    """An adapter on the Hub, on the base of the opening or the one that it names."""
    return open_on(opening, fetch_adapter(str(opening.ref)))


def open_on(
    opening: Opening,
    place: Path,
    open_file: Callable[[Path], InputFile] = InputFile,
    finish: Callable[[AdapterFiles], AdapterFiles] = lambda adapter: adapter,
) -> Checkpoint:
    """The adapter that lies in a folder, on the base of the opening, or on the one that it names where there is none.

    Args:
        opening: how it was named.
        place: where it lies.
        open_file: how its weights are opened.
        finish: what is done to it before it is put on the base.

    Raises:
        PlanError: there is no base, or another one than it names.
        CheckpointError, HomologyError: it is damaged, or not of this base.
    """
    from darekit.inputs.adapters.bases import about_base
    from darekit.inputs.adapters.files import open_adapter
    from darekit.inputs.adapters.views import adapted

    adapter = open_adapter(place, open_file)
    own = None
    try:
        adapter = finish(adapter)
        base = opening.base
        if base is None:
            own = base = _own_base(opening, adapter)
        note = None if own or opening.together else about_base(adapter.config, base, opening)
        found = adapted(base, adapter, str(opening.ref), notes=[note] if note else [], layout=opening.layout)
    except BaseException:
        adapter.close()
        if own is not None:
            own.close()
        raise
    return replace(found, files=(*found.files, *own.files)) if own is not None else found


def _own_base(opening: Opening, adapter: AdapterFiles) -> Checkpoint:
    named, instead = adapter.config.base, f"name both as one model: BASE+{opening.ref}"
    if named is None:
        raise PlanError(f"{opening.ref} is an adapter, and its config names no base; {instead}")
    try:
        return opening.open(named)
    except CheckpointError as error:
        raise PlanError(
            f"{opening.ref} is an adapter without a base here, and the one that it names cannot be opened; {instead}. "
            f"{error}"
        ) from error


PAIR = Opener("a model with an adapter", _find_pair, _open_pair)
ALONE = Opener("an adapter", _find_alone, _open_alone, needs_base=True, finds_base=True)
