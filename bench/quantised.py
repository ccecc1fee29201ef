# SPDX-License-Identifier: Apache-2.0
"""Speed of merges whose base is quantised, against the same merges on a BF16 base that holds what it decodes to.

The models are the same, 16-bit: half of the benchmark's family, and for gpt-oss's layout a stack of experts of about
the same size. Merges take turns (BF16, quantised, BF16, ...), files are warm, nothing waits for the disk (as in
`run.py`). Shown are medians of the seconds, and of the ratios of neighbours: of the time on the clock, and of that of
the processors, which other work on the machine changes less; and the peak of memory of a process that does one merge.
The two outputs of a merge without drop must be the same bytes, so that what is compared is the same work.

    python bench/quantised.py SCRATCH [--runs 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import darekit as dk
import family
from darekit.checkpoints import open_checkpoint
from darekit.checkpoints.quantised import formulas as codes

LAYERS, VOCABULARY = 8, 19200  # half of the family
EXPERTS, EXPERT_LAYERS = 8, 3
METHODS = {"linear": {}, "ties": {"sparsify": {"method": "dare", "drop_rate": 0.9}}}
MEMORY = "import sys, darekit as dk; dk.merge(sys.argv[1], sys.argv[2], overwrite=True, force=True, \
threads={threads}); print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"

Parts = dict[str, np.ndarray]


def fp8(name: str, weight: np.ndarray) -> Parts:
    """Blocks of 128 x 128."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // 128, 128, columns // 128, 128)
    scale = (np.abs(blocks).max(axis=(1, 3)) / np.float32(448)).astype(np.float32)
    found = (blocks / scale[:, None, :, None]).astype(ml_dtypes.float8_e4m3fn).reshape(rows, columns)
    return {name: found.view(np.uint8), f"{name}_scale_inv": scale}


def nearest(values: np.ndarray) -> np.ndarray:
    """The code of E2M1 that is next to each value within -6 .. 6."""
    bounds = (codes.E2M1[1:8] + codes.E2M1[:7]) / 2
    return (np.searchsorted(bounds, np.abs(values)) + 8 * (values < 0)).astype(np.uint8)


def powers(groups: np.ndarray) -> np.ndarray:
    """(..., 32) -> (...): exponents of E8M0 for which all values are within -6 .. 6."""
    return (np.ceil(np.log2(np.abs(groups).max(axis=-1) / 6)) + 127).astype(np.uint8)


def mxfp4(name: str, weight: np.ndarray) -> Parts:
    """Rows in groups of 32."""
    groups = weight.reshape(weight.shape[0], -1, 32)
    scale = powers(groups)
    found = nearest(groups / codes.powers(scale.reshape(-1)).reshape(scale.shape)[..., None])
    packed = (found[..., 0::2] | found[..., 1::2] << 4).reshape(weight.shape[0], -1)
    return {f"{name}_packed": packed, f"{name}_scale": scale}


def blocks(name: str, weight: np.ndarray) -> Parts:
    """gpt-oss: (experts, inputs, outputs) -> columns in groups of 32."""
    groups = np.ascontiguousarray(weight.swapaxes(1, 2)).reshape(weight.shape[0], weight.shape[2], -1, 32)
    scale = powers(groups)
    found = nearest(groups / codes.powers(scale.reshape(-1)).reshape(scale.shape)[..., None])
    return {f"{name}_blocks": found[..., 0::2] | found[..., 1::2] << 4, f"{name}_scales": scale}


def int4(name: str, weight: np.ndarray) -> Parts:
    """compressed-tensors: groups of 128."""
    groups = weight.reshape(weight.shape[0], -1, 128)
    scale = (np.abs(groups).max(axis=-1) / np.float32(7)).astype(ml_dtypes.bfloat16)
    found = (np.rint(groups / scale.astype(np.float32)[..., None]) + 8).clip(0, 15).astype(np.uint8)
    packed = (found[..., 0::2] | found[..., 1::2] << 4).reshape(weight.shape[0], -1).view(np.int32)
    return {f"{name}_packed": packed, f"{name}_scale": scale, f"{name}_shape": np.array(weight.shape, np.int64)}


FORMS: dict[str, Callable[[str, np.ndarray], Parts]] = {"fp8": fp8, "mxfp4": mxfp4, "int4": int4, "gpt-oss": blocks}
FORMATS = {np.dtype(np.uint8): "U8", np.dtype(np.float32): "F32", np.dtype(np.int32): "I32", np.dtype(np.int64): "I64"}


def widen(raw: np.ndarray) -> np.ndarray:
    return (raw.astype(np.uint32) << 16).view(np.float32)


def save(parts: Parts, folder: Path, eights: bool, config: dict[str, object]) -> None:
    """One file; `eights`: bytes are F8."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, at = {}, 0
    for name, part in parts.items():
        kind = FORMATS.get(part.dtype, "BF16")
        kind = "F8_E4M3" if eights and kind == "U8" else kind
        entries[name] = {"dtype": kind, "shape": list(part.shape), "data_offsets": [at, at + part.nbytes]}
        at += part.nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in parts.values():
            file.write(np.ascontiguousarray(part).tobytes())
    (folder / "config.json").write_text(json.dumps(config))


def experts(folder: Path) -> None:
    """A base and three models of experts alone, as gpt-oss has them."""
    if (folder / "complete").exists():
        return
    rng, h, m = np.random.default_rng(0), family.HIDDEN, 2048
    shapes = {f"model.layers.{i}.mlp.experts.{n}": s for i in range(EXPERT_LAYERS)
              for n, s in (("gate_up_proj", (EXPERTS, h, 2 * m)), ("down_proj", (EXPERTS, m, h)))}  # fmt: skip
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in ("base", *family.MODELS)}
    for name, shape in shapes.items():
        base = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        for model in found:
            delta = rng.standard_normal(shape, np.float32) * np.float32(5e-4 * (model != "base"))
            found[model][name] = family.round_bf16(base + delta).view(ml_dtypes.bfloat16)
    for model, tensors in found.items():
        (folder / model).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / model / "model.safetensors")
        (folder / model / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "torch_dtype": "bfloat16"}))
    (folder / "complete").touch()


def prepare(scratch: Path, form: str) -> tuple[Path, Path]:
    """-> the family's folder, with `base`'s quantised copy, and one that holds what that decodes to."""
    folder = scratch / ("experts" if form == "gpt-oss" else "half")
    if form == "gpt-oss":
        experts(folder)
    else:
        family.LAYERS, family.VOCABULARY = LAYERS, VOCABULARY
        family.build(folder)
    quantised, decoded = folder / f"base-{form}", folder / f"base-{form}-decoded"
    if not decoded.exists():
        source = open_checkpoint(folder / "base")
        parts: Parts = {}
        for name, info in source.tensors.items():
            raw = np.empty(info.count, np.uint16)
            info.source.read_into(raw.view(np.uint8), 0)
            values = raw.reshape(info.shape)
            parts |= FORMS[form](name, widen(values)) if "proj" in name else {name: values.view(ml_dtypes.bfloat16)}
        save(parts, quantised, form == "fp8", dict(source.config or {}))
        source.close()
        dk.merge({"models": [str(quantised)], "merge_method": "linear"}, decoded)
    return quantised, decoded


def recipes(folder: Path, bases: tuple[Path, Path], method: str) -> Iterator[Path]:
    for base in bases:
        path = folder / f"{base.name}-{method}.json.yaml"
        models = [str(folder / name) for name in family.MODELS]
        path.write_text(
            json.dumps({"base_model": str(base), "models": models, "merge_method": method} | METHODS[method])
        )
        yield path


def clocked(recipe: Path, out: Path, threads: int) -> tuple[float, float]:
    """Seconds on the clock, and of processors."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter(), time.process_time()
    dk.merge(recipe, out, threads=threads, force=True)
    return time.perf_counter() - began[0], time.process_time() - began[1]


def peak(recipe: Path, out: Path, threads: int) -> float:
    """MB of a process of its own."""
    program = MEMORY.format(threads=threads)
    done = subprocess.run([sys.executable, "-c", program, str(recipe), str(out)], capture_output=True, text=True)
    return int(done.stdout.split()[-1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(FORMS))
    arguments = parser.parse_args()
    os.fsync = os.fdatasync = lambda fd: None
    print("| base | merge | BF16 base | quantised base | speed | by processors | peak memory |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for form in arguments.only:
        bases = prepare(arguments.scratch, form)
        for method in METHODS:
            out = arguments.scratch / "out"
            quantised, decoded = recipes(bases[0].parent, bases, method)
            clocked(decoded, out, arguments.threads)
            clocked(quantised, out, arguments.threads)
            pairs = [
                (clocked(decoded, out, arguments.threads), clocked(quantised, out, arguments.threads))
                for _ in range(arguments.runs)
            ]
            if method == "linear":
                other = arguments.scratch / "other"
                clocked(decoded, other, arguments.threads)
                files = sorted(path.name for path in out.glob("*.safetensors"))
                assert filecmp.cmpfiles(out, other, files, shallow=False)[0] == files
            plain, coded = (statistics.median(pair[side][0] for pair in pairs) for side in range(2))
            ratios = [statistics.median(one[of] / other[of] for one, other in pairs) for of in range(2)]
            memory = peak(quantised, out, arguments.threads)
            print(
                f"| {form} | {'dare + ' if method == 'ties' else ''}{method} | {plain:.2f} s | {coded:.2f} s | "
                f"{ratios[0]:.0%} | {ratios[1]:.0%} | {memory:.0f} MB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
