# SPDX-License-Identifier: Apache-2.0
"""What type checkers make of the public API: read by mypy in `test_public_types.py`, never run.

`# R: type` is what mypy must reveal in that line, `# E: code` the error that it must report there.
"""

from pathlib import Path
from typing import Unpack, reveal_type

import darekit as dk
from darekit.api import Options, RunOptions, WriteOptions


def told(done: int, whole: int) -> None:
    """A progress function."""


def merging(recipe: Path) -> None:
    reveal_type(dk.merge(recipe, "out"))  # R: Report
    reveal_type(dk.merge({"models": []}, Path("out")).kept)  # R: dict[str, int]
    dk.merge(dk.read_recipe(recipe), "out", threads=4, shard_size=10**9, overwrite=True, progress=told, say=print)
    dk.merge(recipe, "out", resume=True, force=True, allow_nonfinite=True, tile=None)
    dk.merge(recipe, "out", thread=4)  # E: call-arg
    dk.merge(recipe, "out", threads="4")  # E: arg-type
    dk.merge(recipe, "out", shard_size=None)  # E: arg-type
    dk.merge(recipe, "out", progress=print)
    dk.merge(recipe, "out", progress=str.strip)  # E: arg-type
    dk.merge(recipe)  # E: call-arg


def dropping() -> None:
    reveal_type(dk.drop("base", "model", "out", drop_rate=0.9))  # R: Report
    dk.drop("base", "model", "out", drop_rate="auto", rescale="l1", on="weights", vocab="pad", heads="model")
    dk.drop("base", "model", "out", drop_rate="most")  # E: arg-type
    dk.drop("base", "model", "out", drop_rate=0.9, rescale="papper")  # E: arg-type
    dk.drop("base", "model", "out", drop_rate=0.9, overwrit=True)  # E: call-arg
    dk.drop("base", "model", "out")  # E: call-arg


def planning() -> None:
    with dk.plan("recipe.yaml") as plan:
        reveal_type(plan.bytes_out)  # R: int
        reveal_type(plan.base)  # R: Checkpoint | None


def wrapped(out: str, **options: Unpack[RunOptions]) -> dk.Switcher | None:
    """Options can be passed on by whoever wraps a function."""
    dk.merge("recipe.yaml", out, **options)
    dk.unpack("base", "pack.safetensors", out, **options)  # E: misc
    return None


def unpacking(options: WriteOptions) -> None:
    reveal_type(dk.unpack("base", "a.safetensors", "out", **options))  # R: Report
    dk.unpack("base", "a.safetensors", "out", threads=2, resume=True)
    dk.unpack("base", "a.safetensors", "out", force=True)  # E: call-arg
    Options(**options)


def packing() -> None:
    reveal_type(dk.pack("base", "model", "a.safetensors", drop_rate=0.9))  # R: PackReport
    with dk.open_pack("a.safetensors", base="base") as pack:
        reveal_type(pack)  # R: Pack
        reveal_type(pack.verify().faults)  # R: tuple[Fault, ...]
    reveal_type(dk.export("a.safetensors", "out", to="dense"))  # R: ExportReport
    dk.Switcher({}, "base").switch(None)


def methods() -> None:
    reveal_type(dk.dare(0.9, seed=1, keep_dense=["norms"]))  # R: Sparsify
    reveal_type(dk.ties(keep=0.2, trim="model"))  # R: Method
    dk.dare(0.9, window=0.1)  # E: call-arg
    dk.magnitude(0.9, seed=1)  # E: call-arg
    dk.dare(0.9, rescale="l2")  # E: arg-type
    dk.ties(trim="layer")  # E: arg-type
    dk.sparsifier("mine", 0.9, strength=0.5, kind="soft", levels=[{"filter": "mlp", "value": 0.5}])
    dk.sparsifier("mine", 0.9, strength=None)  # E: arg-type
    dk.merge_method("mine", strength=0.5)
    dk.merge_method("mine", strength=object())  # E: arg-type
    reveal_type(dk.merge_tensors(None, [{}], method="linear"))  # R: dict[str, Any]


def looking() -> None:
    reveal_type(dk.inspect("base", "a"))  # R: Inspection
    reveal_type(dk.inspect("base", "a", "b"))  # R: Comparison
    reveal_type(dk.recommend("base", "a").recipe)  # R: Recipe
    reveal_type(dk.evaluate("a", data="rows.jsonl").row("loss"))  # R: tuple[Score | None, ...]
    reveal_type(dk.generate("a", "q.json", "out"))  # R: tuple[Path, ...]
    reveal_type(dk.sweep("sweep.yaml", "out").failed)  # R: tuple[Finished, ...]
    reveal_type(dk.make_statistics("gram", "a", "rows.jsonl", "out").mean)  # R: float | None
    dk.merg("recipe.yaml", "out")  # E: attr-defined


def registering() -> None:
    @dk.register.merge_method
    def first(deltas: object, weights: object) -> object:
        return deltas

    @dk.register.merge_method(scope="row", models=(2, None), needs_base=False)
    def second(deltas: object) -> object:
        return deltas

    reveal_type(first)  # R: def (deltas: object, weights: object) -> object
    reveal_type(second)  # R: def (deltas: object) -> object
    dk.register.merge_method(scope="layer")  # E: call-overload
    dk.register.sparsifier(unbiased=True)
    reveal_type(dk.testing.checks("first", power=2))  # R: tuple[Check, ...]
