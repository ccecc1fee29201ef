# SPDX-License-Identifier: Apache-2.0
"""The lock: everything that determines an output's bytes, so that a run can be resumed, repeated and checked."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darekit import __version__
from darekit.architectures.groups import MEANING
from darekit.checkpoints import InputFile, traits_of
from darekit.checkpoints.digests import checkpoint_digest
from darekit.dtypes import STOCHASTIC
from darekit.engine.steps import ENGINE_FORMAT, Merge
from darekit.inputs.statistics import Statistics
from darekit.methods import MERGE_METHODS
from darekit.planning.losses import rounding_of
from darekit.planning.plan import Plan
from darekit.recipe.origins import origins_of
from darekit.recipe.values import is_scalar


def resolved_parameters(plan: Plan) -> list[Mapping[str, Any]]:
    """What was really done to which tensors, for the lock: equal settings stand together.

    `keep` and the merge's own parameters are listed only where they differ by tensor; elsewhere the recipe says them.
    """
    recipe = plan.recipe
    keeps = [parameters.get("keep", 1.0) for parameters in (recipe.parameters, *(e.parameters for e in recipe.models))]
    keep_varies = MERGE_METHODS[recipe.merge_method].trims and not all(is_scalar(keep) for keep in keeps)
    varying = [name for name, value in recipe.parameters.items() if not is_scalar(value)]
    groups: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for step in plan.steps:
        if not isinstance(step, Merge) or step.begin:
            continue
        method, settings = MERGE_METHODS[step.method], plan.settings[step.name]
        told = settings.merge if method.products else varying
        merge = {name: settings.merge[name] for name in told if name in settings.merge}
        models = [one for k in step.owners if (one := settings.models[k])]
        setting = {
            **({"weights": list(step.weights)} if method.weighted else {}),
            **({"method": step.method} if plan.statistics else {}),
            "lambda": step.factor,
            **({"parameters": merge} if merge else {}),
            **({"keep": [one.keep for one in models]} if keep_varies else {}),
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


SAMPLES, SAMPLE_BYTES = 64, 4096  # of each input file


def identity(plan: Plan, *, allow_nonfinite: bool) -> dict[str, Any]:
    """Plan -> what must be equal for a resume, JSON-able: facts on which two machines with equal inputs agree.

    A change of what stands here is a change of `darekit.output.staging.FORMAT`.
    """
    return {
        "engine": ENGINE_FORMAT,
        "groups": MEANING,
        "recipe": plan.recipe.to_data(),
        # A key of its own for each input and each file, so that the refusal of a resume names the one that changed.
        **{
            f"input {k} ({checkpoint.ref})": {"sample_digest": digest.hex()}
            for k, (checkpoint, digest) in enumerate(zip(plan.checkpoints, plan.sample_digests, strict=True))
        },
        **{f"statistics {k} ({entry.ref})": entry.fingerprint() for k, entry in enumerate(plan.statistics)},
        **{f"code of the {origin.kind} {origin.name}": origin.identity() for origin in origins_of(plan.recipe)},
        **{
            f"file {k} ({file.path.name})": {"bytes": file.size, "sample": _sample_of(file)}
            for k, file in enumerate(plan.files)
        },
        **({"tokens": plan.vocabulary.digest()} if plan.vocabulary else {}),
        "shards": [[shard.filename, shard.size] for shard in plan.shards],
        "allow_nonfinite": allow_nonfinite,
    }


def _sample_of(file: InputFile) -> str:
    """Digest of pieces from everywhere in a file, its first and last bytes among them: training changes all of a
    model, but maybe not the beginnings of its tensors, which are all that the sample digest sees."""
    last, digest = max(0, file.size - SAMPLE_BYTES), hashlib.blake2b(digest_size=16)
    for offset in sorted({last * k // (SAMPLES - 1) for k in range(SAMPLES)}):
        digest.update(file.read(offset, min(SAMPLE_BYTES, file.size - offset)))
    return digest.hexdigest()


def times_of(plan: Plan) -> dict[str, Any]:
    """When each input file was last changed, and on which machine: a resume there finds even changes that no sample
    shows. On another machine equal files have other times."""
    return {"machine": platform.node(), "changed": {str(file.path.absolute()): file.mtime_ns for file in plan.files}}


def make_lock(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that determines the output's bytes, and fingerprints of what went in and came out.

    Content digests are those of `darekit.checkpoints.digests`; null where not every tensor of an input was read. That
    of a view is the one of its origin.
    """

    def content(key: str | None, index: int) -> str | None:
        checkpoint = plan.checkpoints[index]
        stored = checkpoint.origin or checkpoint
        names = _outputs_of(plan, index)
        rows = []
        for name, info in stored.tensors.items():
            record = records.get(names.get(name, ""), {})
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
        **_methods(plan),
        "groups": MEANING,
        "effective_seeds": list(plan.seeds),
        "inputs": [{**told, "content_digest": content(keys[i], i)} for i, told in enumerate(_inputs(plan))],
        **({"statistics": [_statistics(entry) for entry in plan.statistics]} if plan.statistics else {}),
        "output": {
            "content_digest": checkpoint_digest(
                (name, placed[name].dtype, placed[name].shape, record["output"]) for name, record in records.items()
            ),
            "shards": [shard.filename for shard in plan.shards],
        },
        "resolved": resolved_parameters(plan),
        **_rounding(plan, records),
        **_tokens(plan),
        **({"measured": dict(sorted(measured.items()))} if measured else {}),
    }


def _methods(plan: Plan) -> dict[str, Any]:
    """Whose code ran, where it was not darekit's own."""
    origins = origins_of(plan.recipe)
    return {"methods": [origin.to_data() for origin in origins]} if origins else {}


def _rounding(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How results were rounded, and what that left of the changes."""
    found = rounding_of(plan, records.values())
    if found is None and plan.rounding is not None:
        found = {"method": STOCHASTIC, "effective_seed": plan.rounding}
    return {} if found is None else {"rounding": found}


def _tokens(plan: Plan) -> dict[str, Any]:
    """Which tokens the output has, and where rows come from that some model did not have."""
    return {} if plan.vocabulary is None else {"tokenizer": plan.vocabulary.to_data()}


def _outputs_of(plan: Plan, index: int) -> dict[str, str]:
    """Stored name of a checkpoint's tensor -> the output tensor whose record has its digest: a tied copy's is that of
    the tensor it is."""
    at = index - bool(plan.base)
    found: dict[str, str] = {}
    for tensor in plan.alignment.tensors:
        info = tensor.base if at < 0 else tensor.models[at]
        traits = None if info is None else traits_of(info.source)
        if info is not None and traits is not None and traits.places is None and traits.as_stored:
            found.setdefault(info.stored_name, tensor.name)
    return {**plan.alignment.copies[index], **found}


def _inputs(plan: Plan) -> list[dict[str, Any]]:
    return [
        {"ref": checkpoint.ref, "revision": checkpoint.revision, "sample_digest": digest.hex()}
        for checkpoint, digest in zip(plan.checkpoints, plan.sample_digests, strict=True)
    ]


def is_output_of(plan: Plan, out: Path) -> bool:
    """Whether a directory is the complete output of this plan: its lock tells of the same recipe and inputs, no input
    was written to since, and its files of weights have the sizes that the plan gives them."""
    try:
        written = (out / LOCK_NAME).stat().st_mtime_ns
        lock = json.loads((out / LOCK_NAME).read_bytes())
        sizes = [(out / shard.filename).stat().st_size for shard in plan.shards]
    except (OSError, ValueError):
        return False
    wanted = {
        "format": "darekit-lock-1",
        "recipe": plan.recipe.to_data(),
        "methods": _methods(plan).get("methods"),
        "groups": MEANING,
        "effective_seeds": list(plan.seeds),
        "inputs": _inputs(plan),
        "statistics": [_statistics(entry) for entry in plan.statistics],
        "shards": [shard.filename for shard in plan.shards],
        "resolved": resolved_parameters(plan),
        "tokenizer": _tokens(plan).get("tokenizer"),
    }
    try:
        found = {key: lock.get(key) for key in wanted} | {
            "inputs": [{key: entry[key] for key in _inputs(plan)[0]} for entry in lock["inputs"]],
            "statistics": lock.get("statistics", []),
            "shards": lock["output"]["shards"],
        }
    except (AttributeError, KeyError, TypeError):
        return False
    return (
        found == json.loads(json.dumps(wanted))
        and sizes == [shard.size for shard in plan.shards]
        and all(file.mtime_ns <= written for file in plan.files)
    )


def _statistics(entry: Statistics) -> dict[str, Any]:
    facts = {name: entry.facts.get(name) for name in ("data", "examples", "tokens", "labels")}
    return {"ref": entry.ref, "kind": entry.kind, "sample_digest": entry.fingerprint(), **facts}
