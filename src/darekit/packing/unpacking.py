# SPDX-License-Identifier: Apache-2.0
"""From a base and a pack to an ordinary checkpoint: the engine copies what the bound pack decodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from darekit.api import WriteOptions, options_of
from darekit.checkpoints import Checkpoint
from darekit.checkpoints.digests import LEAF
from darekit.engine.steps import copied
from darekit.errors import DataError
from darekit.inputs import opening
from darekit.output.publishing import Report, execute
from darekit.packs.lane import READ_LEAVES
from darekit.packs.opening import open_base
from darekit.packs.reading import Pack, open_pack
from darekit.planning.plan import make_plan
from darekit.recipe import read_recipe

SHOWN = 5


def unpack(base: str | Path, pack: str | Path, out: str | Path, **options: Unpack[WriteOptions]) -> Report:
    """Write the packed model as a directory of its own, with the bits that `dare drop` gives at the same seed.

    Args:
        base: the checkpoint that was packed against; `base+adapter` where it was one with an adapter on it.
        pack: the file.
        out: the directory to write.
        **options: how to write: threads, shard_size, overwrite, resume, tile, progress, say (see `WriteOptions`).

    Returns:
        What was done: sizes, times and notes; `kept` is empty.

    Raises:
        TypeError: an option that does not exist; the message names the closest one.
        HomologyError: another base.
        CheckpointError: the pack cannot be decoded.
        DataError: what it decodes to is not what was packed, because it or the base is damaged.

    Examples:
        >>> packed = dk.pack("base", "math", "math.safetensors", drop_rate=0.9, seed=42)
        >>> report = dk.unpack("base", "math.safetensors", "unpacked")
        >>> dropped = dk.drop("base", "math", "dropped", drop_rate=0.9, seed=42)
        >>> Path("unpacked/model.safetensors").read_bytes() == Path("dropped/model.safetensors").read_bytes()
        True
    """
    settings = options_of(options, only_write=True)
    checkpoint = open_bound(base, pack)
    try:
        with open_pack(pack, base=checkpoint) as found:
            model = found.checkpoint()
            recipe = read_recipe({"models": [{"model": str(pack)}], "merge_method": "linear"})
            plan = make_plan(recipe, None, [model], shard_size=settings.shard_size, verbatim=True)
            # Bits are copied, NaN and all: there is nothing to merge.
            steps = tuple(map(copied, plan.steps))
            plan = replace(plan, steps=steps)
            report = execute(
                plan,
                Path(out),
                threads=settings.threads,
                tile=settings.tile or READ_LEAVES * LEAF,
                overwrite=settings.overwrite,
                resume=settings.resume,
                allow_nonfinite=False,
                progress=settings.progress,
                say=settings.say or (lambda line: None),
                accept=partial(_refuse_wrong, found),
            )
            return replace(report, kept={})  # of deltas, and here there were none
    finally:
        checkpoint.close()


def open_bound(base: str | Path, pack: str | Path) -> Checkpoint:
    """Open what a pack is to be bound to: a stored checkpoint, or one with adapters on it (`base+adapter`)."""
    if isinstance(base, str) and "+" in base:
        return opening.open_base(base, openers=opening.OPENERS)
    return open_base(base, pack)


def _refuse_wrong(pack: Pack, records: Mapping[str, Mapping[str, Any]]) -> None:
    # A tensor without elements has no step, and no record.
    wrong = [name for name, t in pack.tensors.items() if t.count and records[name]["output"] != t.result]
    if wrong:
        lines = [pack.explain(name) for name in wrong[:SHOWN]]
        more = [f"... and {len(wrong) - SHOWN} more tensors"] if len(wrong) > SHOWN else []
        # Not a CheckpointError: there is nothing here that another run should resume.
        raise DataError("\n  ".join(["The result is not what was packed; nothing was published:", *lines, *more]))
