# SPDX-License-Identifier: Apache-2.0
"""Whether an adapter is put on the base that it was trained on, as far as names and files on this machine tell."""

from __future__ import annotations

from contextlib import closing

from darekit.checkpoints import Checkpoint, open_checkpoint, sample_digest
from darekit.checkpoints.opening import places_of
from darekit.errors import CheckpointError, NotFetched, PlanError
from darekit.inputs.adapters.config import AdapterConfig
from darekit.inputs.kinds import Opening
from darekit.recipe.names import same_model
from darekit.wording import label


def about_base(config: AdapterConfig, base: Checkpoint, opening: Opening) -> str | None:
    """What to say of the base that an adapter names, where it may be another one than `base`; None: nothing.

    Raises:
        PlanError: it names another model, which is here and has other weights.
    """
    named = config.base
    if named is None or _is_named(named, base, opening):
        return None
    try:
        here = next((place for place in places_of(named, opening.search) if place.is_dir()), None)
    except OSError:
        here = None
    if here is None:
        return (
            f"the adapter names {named} as its base, and is used on {base.ref}: their names and shapes fit, but "
            f"nothing more can be checked, because {named} is not here"
        )
    try:
        with closing(open_checkpoint(here)) as other:
            same = sample_digest(other) == sample_digest(base)
    except NotFetched:
        same = True
    except CheckpointError:  # it is not what it was when the adapter was trained
        return f"the adapter names {named} as its base, which is here but cannot be read; it is used on {base.ref}"
    if not same:
        raise PlanError(
            f"{opening.ref} is an adapter for {named}, whose weights differ from those of the base {base.ref}. To put "
            f"it on {base.ref} anyway, name both as one model: {base.ref}+{opening.ref}; to use it on its own base, "
            f"write {named}+{opening.ref}"
        )
    return None


def _is_named(named: str, base: Checkpoint, opening: Opening) -> bool:
    """Whether a name means this base: the same path or Hub id, or what its files say of themselves."""
    bare = base.ref.partition("@")[0]
    if same_model(named, base.ref, opening.search) or named.partition("@")[0] == bare:
        return True
    if label(named).lower() == label(bare).lower():  # somebody else's path to it
        return True
    said = (base.config or {}).get("_name_or_path")
    cached = None if base.directory is None else base.directory.parent.parent.name
    return named == said or f"models--{named.replace('/', '--')}" == cached
