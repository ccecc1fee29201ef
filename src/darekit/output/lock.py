# SPDX-License-Identifier: Apache-2.0
"""The lock: everything that determines an output's bytes, so that a run can be resumed, repeated and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from darekit import __version__
from darekit.checkpoints.digests import checkpoint_digest
from darekit.inputs.statistics import Statistics
from darekit.methods import MERGE_METHODS
from darekit.planning.plan import Plan


def resolved_parameters(plan: Plan) -> list[Mapping[str, Any]]:
    """What was really done to which tensors, for the lock: equal settings stand together."""
    groups: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for step in plan.steps:
        if step.kind != "merge" or step.begin:
            continue
        method = MERGE_METHODS[step.method]
        setting = {
            **({"weights": list(step.weights)} if method.weighted else {}),
            **({"method": step.method} if plan.statistics else {}),
            **({"parameters": dict(step.parameters)} if method.products else {}),
            "lambda": step.factor,
            "stages": [
                [
                    {"method": spec.method, **{n: v for n, v in spec.parameters.items() if n != "keep_count"}}
                    for spec in chain
                ]
                for chain in step.chains
            ],
        }
        groups.setdefault(repr(setting), (setting, []))[1].append(step.name)
    return [{**setting, "tensors": names} for setting, names in groups.values()]


LOCK_NAME = "darekit.lock.json"


def identity(plan: Plan, *, allow_nonfinite: bool) -> dict[str, Any]:
    """Plan -> what must be equal for a resume, JSON-able."""
    return {
        "version": __version__,
        "recipe": plan.recipe.to_data(),
        # A key of its own for each input, so that the refusal of a resume names the one that changed.
        **{
            f"input {checkpoint.ref}": {
                "sample_digest": digest.hex(),
                "files": {
                    file.path.name: {"bytes": file.size, "time of last change": file.mtime_ns}
                    for file in checkpoint.files
                },
            }
            for checkpoint, digest in zip(plan.checkpoints, plan.sample_digests, strict=True)
        },
        **{f"statistics {entry.ref}": entry.fingerprint() for entry in plan.statistics},
        "shards": [[shard.filename, shard.size] for shard in plan.shards],
        "allow_nonfinite": allow_nonfinite,
    }


def make_lock(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that determines the output's bytes, and fingerprints of what went in and came out.

    Content digests are those of `darekit.checkpoints.digests`; null where not every tensor of an input was read.
    """

    def content(key: str | None, index: int) -> str | None:
        checkpoint = plan.checkpoints[index]
        rows = []
        for name, info in checkpoint.tensors.items():
            record = records.get(name, {})
            digest = record.get("base") if key is None else record.get("models", {}).get(key)
            if digest is None:
                return None
            rows.append((name, info.dtype, info.shape, digest))
        return checkpoint_digest(rows)

    measured = {name: record["measured"] for name, record in records.items() if "measured" in record}
    keys = [*([None] if plan.base else []), *(str(k) for k in range(len(plan.models)))]
    placed = {p.name: p for shard in plan.shards for p in shard.placements}
    return {
        "format": "darekit-lock-1",
        "version": __version__,
        "recipe": plan.recipe.to_data(),
        "effective_seeds": list(plan.seeds),
        "inputs": [
            {
                "ref": checkpoint.ref,
                "revision": checkpoint.revision,
                "sample_digest": plan.sample_digests[i].hex(),
                "content_digest": content(keys[i], i),
            }
            for i, checkpoint in enumerate(plan.checkpoints)
        ],
        **({"statistics": [_statistics(entry) for entry in plan.statistics]} if plan.statistics else {}),
        "output": {
            "content_digest": checkpoint_digest(
                (name, placed[name].dtype, placed[name].shape, record["output"]) for name, record in records.items()
            ),
            "shards": [shard.filename for shard in plan.shards],
        },
        "resolved": resolved_parameters(plan),
        **({"measured": dict(sorted(measured.items()))} if measured else {}),
    }


def _statistics(entry: Statistics) -> dict[str, Any]:
    facts = {name: entry.facts.get(name) for name in ("data", "examples", "tokens", "labels")}
    return {"ref": entry.ref, "kind": entry.kind, "sample_digest": entry.fingerprint(), **facts}
