# SPDX-License-Identifier: Apache-2.0
"""What `dare inspect --plot` found, on disk beside its plots (`inspection.json`) and read again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darekit.analysis.inspection import Comparison, Histogram, Inspection, TensorReport
from darekit.analysis.interference import Interference, Relation, TensorInterference
from darekit.errors import OutputError

RECORD = "inspection.json"
FORMAT = "darekit-inspection-1"

_FROM_PAIRS = ("cosine", "agreement", "overlap", "conflict")


def write_inspection(found: Inspection | Comparison, folder: Path) -> Path:
    """Write FOLDER/inspection.json, at once or not at all; an infinite r is null there.

    Raises:
        OutputError: it cannot be written.
    """
    path = folder / RECORD
    partial = path.with_name(f".{path.name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, **_finite(found.to_data())}, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
    return path


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def read_inspection(folder: Path) -> Inspection | Comparison:
    """FOLDER/inspection.json -> what `inspect` found.

    Raises:
        OutputError: it is missing or is something else.
    """
    path = folder / RECORD
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(data["format"])
        if "models" not in data:
            return _inspection(data)
        models = tuple(map(_inspection, data["models"]))
        return Comparison(data["base"], models, _interference(data["interference"], models), tuple(data["notes"]))
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}; run `dare inspect --plot` again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{path} does not hold what `dare inspect --plot` writes ({error!r}): run it again with this version"
        ) from None


def _inspection(data: Mapping[str, Any]) -> Inspection:
    return Inspection(
        data["base"], data["model"], tuple(map(_tensor, data["tensors"])), _tensor(data["total"]),
        _size(data["median_r"]), data["drop_rate"], data["verdict"], data["words"],
        Histogram(tuple(data["histogram"]["edges"]), tuple(data["histogram"]["counts"])), tuple(data["notes"]),
    )  # fmt: skip


def _tensor(data: Mapping[str, Any]) -> TensorReport:
    return TensorReport(
        **{**data, "shape": tuple(data["shape"]), "deciles": tuple(data["deciles"]), "r": _size(data["r"])}
    )


def _size(r: float | None) -> float:
    return math.inf if r is None else float(r)


def _interference(data: Mapping[str, Any], models: tuple[Inspection, ...]) -> Interference:
    names = tuple(one.model for one in models)
    pairs = tuple((i, j) for i in range(len(names)) for j in range(i + 1, len(names)))
    relations = tuple(Relation(**{key: pair[key] for key in _FROM_PAIRS}) for pair in data["pairs"])
    if len(relations) != len(pairs):
        raise ValueError(f"{len(relations)} pairs of {len(names)} models")
    tensors = tuple(
        TensorInterference(**{**one, "shape": tuple(one["shape"]), "pairs": tuple(Relation(**p) for p in one["pairs"])})
        for one in data["tensors"]
    )
    total = TensorInterference(
        "total", (), models[0].total.parameters, relations, data["conflict"], data["cancelled"], None,
        data["chance_conflict"], data["chance_cancelled"],
    )  # fmt: skip
    means = tuple(pair["mean_cosine"] for pair in data["pairs"])
    return Interference(names, pairs, tensors, total, means, tuple(data["words"]))
