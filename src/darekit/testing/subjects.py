# SPDX-License-Identifier: Apache-2.0
"""What is checked: methods with their parameters, on small families of arrays, in memory and in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from darekit.checkpoints import open_checkpoint
from darekit.dtypes import DTYPES
from darekit.memory import merge_tensors
from darekit.methods import MERGE_METHODS, SUM, MergeMethod
from darekit.recipe.typed import merge_method, sparsifier
from darekit.testing.reference import Array, reference

Tensors = dict[str, Array]

SIZES = (0, 1, 63, 64, 65, 1023, 1024, 1025)
SHAPES = (*((n,) for n in SIZES), (7, 33), (3, 1), (130, 517), (2, 5, 64))
SEEDS = (11, 22, 33)
WEIGHTS = (1.0, 0.7, 0.3)


@dataclass(frozen=True)
class Subject:
    """What is merged how: names and parameters in recipes' words.

    Attributes:
        sparsify: sparsifier and its parameters; None: nothing is sparsified.
        merge: merge method and its parameters.
        statistics: base tensors -> what the merge method must know of each model, by tensor; None: nothing.
    """

    sparsify: tuple[str, Mapping[str, Any]] | None = None
    merge: tuple[str, Mapping[str, Any]] = (SUM, {})
    statistics: Callable[[Tensors], Sequence[Tensors]] | None = None

    @property
    def entry(self) -> MergeMethod:
        """The merge method's entry in the table."""
        return MERGE_METHODS[self.merge[0]]

    @property
    def models(self) -> int:
        """Three models, or as many as the method takes."""
        low, high = self.entry.models
        return max(low, int(min(3, high)))

    def family(
        self, dtype: str, shapes: Sequence[tuple[int, ...]] = ((70, 777),), *, models: int | None = None
    ) -> Family:
        """A base and models with small deltas."""
        rng, many = np.random.default_rng(0), models or self.models
        base: Tensors = {}
        tuned: list[Tensors] = [{} for _ in range(many)]
        for shape in shapes:
            name = f"layers.0.t{'x'.join(map(str, shape))}.weight"
            base[name], own = family(rng, shape, dtype, k=many)
            for model, array in zip(tuned, own, strict=True):
                model[name] = array
        return Family(base, tuned)

    def merged(self, base: Tensors | None, models: Sequence[Tensors], **more: Any) -> Tensors:
        """The engine's result."""
        many = len(models)
        given: dict[str, Any] = {
            "sparsify": sparsifier(self.sparsify[0], **self.sparsify[1]) if self.sparsify else None,
            "method": merge_method(self.merge[0], **self.merge[1]),
            "weights": [WEIGHTS[k % 3] for k in range(many)] if self.entry.weighted else None,
            "seeds": [SEEDS[k % 3] + k // 3 for k in range(many)],
            "statistics": self.statistics(base or models[0]) if self.statistics else None,
        }
        return merge_tensors(base, models, **given | more)

    def expected(self, base: Tensors, models: Sequence[Tensors]) -> Tensors:
        """The formulas' result."""
        own, many = dict(self.merge[1]), len(models)
        told = {"lambda_": own.pop("lambda", 1.0), "keep": own.pop("keep", 1.0), "own": own}
        known = self.statistics(base) if self.statistics else None
        return {
            name: reference(
                name, array, [one[name] for one in models], seeds=[SEEDS[k % 3] + k // 3 for k in range(many)],
                sparsify=self.sparsify, method=self.merge[0], weights=[WEIGHTS[k % 3] for k in range(many)],
                statistics=[one[name] for one in known] if known and name in known[0] else None, **told,
            )
            for name, array in base.items()
        }  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A base and models, name -> array each."""

    base: Tensors
    models: list[Tensors]


def family(
    rng: np.random.Generator, shape: int | tuple[int, ...], dtype: str, k: int = 3, scale: float = 5e-4
) -> tuple[Array, list[Array]]:
    """A base and k models with deltas of about `scale`, in a safetensors dtype."""
    kind = DTYPES[dtype].numpy
    base = rng.normal(0, 0.02, shape).astype(kind)
    spread = scale if dtype not in ("F8_E4M3", "F8_E5M2") else 0.01
    models = [(base.astype(np.float64) + rng.normal(0, spread, shape)).astype(kind) for _ in range(k)]
    return base, models


def raw_of(array: Array) -> Array:
    """An array's bytes, (n,) uint8."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def same(found: Tensors, expected: Tensors, what: str) -> None:
    """Raise AssertionError where any bit differs; `what` says what was tried."""
    assert sorted(found) == sorted(expected), f"{what}: other tensors"
    for name, array in expected.items():
        other = found[name]
        assert (other.dtype, other.shape) == (array.dtype, array.shape), f"{what}: {name} has another dtype or shape"
        bytes_differ = (raw_of(other) != raw_of(array)).reshape(-1, array.dtype.itemsize)
        differ = np.count_nonzero(bytes_differ.any(axis=-1))
        assert not differ, f"{what}: {differ} of {array.size} elements of {name} differ"


def close(found: Tensors, expected: Tensors, what: str) -> None:
    """The same, but for a few units in the last place of the largest element."""
    for name, array in expected.items():
        if array.size:
            values, wanted = found[name].astype(np.float64), array.astype(np.float64)
            unit = float(np.abs(wanted).max()) * float(ml_dtypes.finfo(array.dtype).eps)
            worst = float(np.abs(values - wanted).max())
            assert worst <= 4 * unit, f"{what}: {name} is off by {worst:g}, units in the last place are {unit:g}"


def save(folder: Path, tensors: Tensors, parts: int) -> None:
    """A float32 checkpoint in so many files."""
    folder.mkdir()
    index: dict[str, str] = {}
    for part in range(parts):
        chosen = dict(list(tensors.items())[part::parts])
        file = "model.safetensors" if parts == 1 else f"model-{part + 1:05}-of-{parts:05}.safetensors"
        header, at = {}, 0
        for name, array in chosen.items():
            header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
            at += array.nbytes
        text = json.dumps(header).encode()
        data = b"".join(raw_of(array).tobytes() for array in chosen.values())
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
        index |= dict.fromkeys(chosen, file)
    if parts > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def load(folder: Path) -> Tensors:
    """All tensors of a checkpoint."""
    with closing(open_checkpoint(folder)) as checkpoint:
        found = {}
        for name, info in checkpoint.tensors.items():
            raw = np.empty(info.nbytes, np.uint8)
            info.source.read_into(raw, 0)
            found[name] = raw.view(DTYPES[info.dtype].numpy).reshape(info.shape)
        return found
