# SPDX-License-Identifier: Apache-2.0
"""Exports: patches, applied by a reader that knows their description alone, give the bits of `dare unpack`."""

import json
import shutil
from typing import NamedTuple

import numpy as np
import pytest

import darekit as dk
import families
import oracle
from darekit.errors import CheckpointError, DataError, HomologyError, PlanError

torch = pytest.importorskip("torch")


class CheckpointWeightPatch(NamedTuple):
    """The fields of vLLM's class of this name (vllm/model_executor/model_loader/checkpoint_weight_patch.py)."""

    name: str
    shape: tuple
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor | None = None


def read_patches(folder):
    """The reader of docs/packs.md: an exported folder -> (dense, sparse) patches."""
    from safetensors.torch import load_file

    listed = json.loads((folder / "patches.json").read_text())
    assert (listed["format"], listed["version"]) == ("darekit-weight-patches", 1)
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    dense, sparse = [], []
    for entry in listed["patches"]:
        values = files[entry["file"]][entry["values"]].reshape(-1)
        indices = files[entry["indices_file"]][entry["indices"]] if "indices" in entry else None
        patch = CheckpointWeightPatch(
            entry["name"], tuple(entry["shape"]), getattr(torch, entry["dtype"]), values, indices
        )
        (dense if indices is None else sparse).append(patch)
    return dense, sparse


def check(patch):
    """What vLLM demands of a patch before it loads any (read on 2026-11-25)."""
    count = int(np.prod(patch.shape))
    assert patch.name and patch.values.ndim == 1 and patch.values.dtype == patch.dtype
    if patch.indices is None:
        assert patch.values.numel() == count
        return
    assert patch.dtype.is_floating_point and not torch.isnan(patch.values.float()).any()
    assert patch.indices.ndim == 1 and patch.indices.dtype in (torch.int32, torch.int64)
    assert patch.indices.numel() == patch.values.numel() > 0
    assert (patch.indices >= 0).all() and (patch.indices < count).all()
    assert (patch.indices[1:] > patch.indices[:-1]).all()


def apply(tensors, patches):
    """Name -> flat torch tensor, overwritten as vLLM's loader does: NaN marks what stays."""
    for patch in patches:
        check(patch)
        if patch.indices is None:
            tensors[patch.name] = patch.values.clone()
            continue
        marked = torch.full((tensors[patch.name].numel(),), float("nan"), dtype=torch.float64).to(patch.dtype)
        marked[patch.indices.long()] = patch.values
        tensors[patch.name] = torch.where(torch.isnan(marked), tensors[patch.name], marked)


def flat(directory):
    from safetensors.torch import load_file

    found = {}
    for path in directory.glob("*.safetensors"):
        found |= {name: tensor.reshape(-1) for name, tensor in load_file(path).items()}
    return found


def bits(tensors):
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def family(directory, dtype="BF16", kinds=((400, 300), (1025,), (7, 33), (1,), (0,))):
    rng = np.random.default_rng(5)
    base, tuned = {}, {}
    for shape in kinds:
        name = f"t{'x'.join(map(str, shape))}.weight"
        base[name], (tuned[name],) = oracle.family(rng, shape, dtype, k=1, scale=2e-3)
    base["same.weight"] = tuned["same.weight"] = base["t7x33.weight"]
    families.save(directory / "base", base)
    families.save(directory / "m0", tuned)
    return base, tuned


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("options", [{"drop_rate": 0.9}, {"drop_rate": 0.5}, {"drop_rate": 0.9, "bits": 4},
                                     {"lossless": True}])  # fmt: skip
def test_applied_patches_are_the_bits_of_unpack(tmp_path, dtype, options):
    family(tmp_path, dtype)
    extra = {} if "lossless" in options else {"seed": 3, "force": True}
    dk.pack(tmp_path / "base", tmp_path / "m0", tmp_path / "m.safetensors", **options, **extra)
    dk.unpack(tmp_path / "base", tmp_path / "m.safetensors", tmp_path / "out")
    report = dk.export(
        tmp_path / "m.safetensors", tmp_path / "patch", to="vllm-patch", base=tmp_path / "base", threads=2
    )
    dense, sparse = read_patches(tmp_path / "patch")
    assert (report.dense, report.sparse) == (len(dense), len(sparse))
    tensors = flat(tmp_path / "base")
    apply(tensors, dense)
    apply(tensors, sparse)
    assert bits(tensors) == bits(flat(tmp_path / "out"))
    names = {patch.name for patch in (*dense, *sparse)}
    assert "same.weight" not in names and "t0.weight" not in names
    # At p = 0.9 a tenth changes and is listed; at p = 0.5 half, and the whole tensor takes less room.
    large = {patch.name: patch.indices is None for patch in (*dense, *sparse)}["t400x300.weight"]
    assert large == (options.get("drop_rate") != 0.9)
    assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "patch").glob("*.safetensors"))


def test_unchanged_elements_are_in_no_patch(tmp_path):
    base, tuned = family(tmp_path)
    tuned["t400x300.weight"][:, 1:] = base["t400x300.weight"][:, 1:]
    families.save(tmp_path / "m0", tuned)
    dk.pack(tmp_path / "base", tmp_path / "m0", tmp_path / "m.safetensors", lossless=True)
    dk.export(tmp_path / "m.safetensors", tmp_path / "patch", to="vllm-patch", base=tmp_path / "base")
    _, sparse = read_patches(tmp_path / "patch")
    (patch,) = [patch for patch in sparse if patch.name == "t400x300.weight"]
    changed = np.flatnonzero(oracle.raw_of(base["t400x300.weight"]).view(np.uint16)
                             != oracle.raw_of(tuned["t400x300.weight"]).view(np.uint16))  # fmt: skip
    assert patch.indices.tolist() == changed.tolist() and 0 < len(changed) <= 400


def test_what_a_sparse_patch_cannot_say_is_dense(tmp_path):
    """NaN means "unchanged" there, and integers have none."""
    base, tuned = family(tmp_path)
    tuned["t400x300.weight"][...] = base["t400x300.weight"]
    tuned["t400x300.weight"][3, 5] = np.nan
    base["n"], tuned["n"] = np.arange(500), np.arange(500)
    tuned["n"][7] = -1
    families.save(tmp_path / "base", base)
    families.save(tmp_path / "m0", tuned)
    dk.pack(tmp_path / "base", tmp_path / "m0", tmp_path / "m.safetensors", lossless=True)
    dk.export(tmp_path / "m.safetensors", tmp_path / "patch", to="vllm-patch", base=tmp_path / "base")
    dense, sparse = read_patches(tmp_path / "patch")
    assert {"n", "t400x300.weight"} <= {patch.name for patch in dense}
    tensors = flat(tmp_path / "base")
    apply(tensors, dense)
    apply(tensors, sparse)
    assert bits(tensors) == bits(flat(tmp_path / "m0"))


def test_files_are_cut_by_size_and_threads_do_not_matter(tmp_path):
    family(tmp_path)
    dk.pack(tmp_path / "base", tmp_path / "m0", tmp_path / "m.safetensors", drop_rate=0.9, seed=1, force=True)
    for name, options in (("a", {"threads": 1}), ("b", {"threads": 4}), ("c", {"shard_size": 10_000})):
        dk.export(tmp_path / "m.safetensors", tmp_path / name, to="vllm-patch", base=tmp_path / "base", **options)
    content = [{p.name: p.read_bytes() for p in sorted((tmp_path / name).iterdir())} for name in "abc"]
    assert content[0] == content[1] and len(content[2]) > len(content[0])
    tensors = flat(tmp_path / "base")
    for patches in read_patches(tmp_path / "c"):
        apply(tensors, patches)
    dk.unpack(tmp_path / "base", tmp_path / "m.safetensors", tmp_path / "out")
    assert bits(tensors) == bits(flat(tmp_path / "out"))


def test_dense_is_what_unpack_writes(tmp_path, dare):
    family(tmp_path)
    dk.pack(tmp_path / "base", tmp_path / "m0", tmp_path / "m.safetensors", drop_rate=0.9, seed=1, force=True)
    dk.unpack(tmp_path / "base", tmp_path / "m.safetensors", tmp_path / "out")
    pack, base = tmp_path / "m.safetensors", ("--base", tmp_path / "base")
    found = dare("export", pack, tmp_path / "dense", "--to", "dense", *base)
    assert found.code == 0, found.err
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("dense", "out")]
    assert written[0] == written[1]
    found = dare("export", pack, tmp_path / "p", "--to", "vllm-patch", *base, "--json")
    assert found.code == 0 and found.data["target"] == "vllm-patch" and found.data["sparse"] > 0
    assert dare("export", pack, tmp_path / "q", "--to", "gguf").code == 2


def test_exports_that_are_refused(tmp_path):
    base, _ = family(tmp_path)
    dk.pack(tmp_path / "base", tmp_path / "m0", tmp_path / "m.safetensors", drop_rate=0.9, seed=1, force=True)
    run = lambda **options: dk.export(  # noqa: E731
        tmp_path / "m.safetensors", tmp_path / "patch", **({"to": "vllm-patch", "base": tmp_path / "base"} | options)
    )
    with pytest.raises(PlanError, match="targets: vllm-patch, dense"):
        run(to="gguf")
    with pytest.raises(PlanError, match="packed against base, which is not on the Hub: name it with --base"):
        run(base=None)
    with pytest.raises(HomologyError, match="is not the base"):
        run(base=tmp_path / "m0")
    with pytest.raises(CheckpointError, match="does not exist"):
        dk.export(tmp_path / "none.safetensors", tmp_path / "patch", to="dense", base=tmp_path / "base")
    base["t400x300.weight"][399, 299] += 1  # beyond the sampled bytes
    families.save(tmp_path / "base", base)
    with pytest.raises(DataError, match="not the tensor that was packed against"):
        run()
    assert not (tmp_path / "patch").exists() and not list(tmp_path.glob(".patch*"))
    with pytest.raises(PlanError, match="cannot be resumed, only one to dense can"):
        run(resume=True)


@pytest.mark.parametrize("target", ["vllm-patch", "dense"])
def test_an_export_replaces_only_what_it_may_and_only_when_it_is_whole(tmp_path, dare, target):
    family(tmp_path)
    pack, out, base = tmp_path / "m.safetensors", tmp_path / "out", tmp_path / "base"
    dk.pack(base, tmp_path / "m0", pack, drop_rate=0.9, seed=1, force=True)
    out.mkdir()  # empty: nothing is lost
    command = ("export", pack, out, "--to", target, "--base", base)
    assert dare(*command).code == 0
    content = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "notes.txt").write_text("mine")
    found = dare(*command)
    assert found.code == 1 and "exists and is not empty" in found.err and "--overwrite" in found.err
    assert (out / "notes.txt").read_text() == "mine"
    # What fails while it is written leaves the old one as it was.
    raw = bytearray(pack.read_bytes())
    raw[-1] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(raw)
    assert dare("export", tmp_path / "bad.safetensors", *command[2:], "--overwrite").code == 1
    assert (out / "notes.txt").exists() and {n: (out / n).read_bytes() for n in content} == content
    assert dare(*command, "--overwrite").code == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == content
    # Inputs are never replaced, nor what is no export.
    inside = shutil.copy(pack, out / "m.safetensors")
    found = dare("export", inside, *command[2:], "--overwrite")
    assert found.code == 1 and "holds the input" in found.err and inside.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    found = dare("export", pack, tmp_path / "mine", *command[3:], "--overwrite")
    assert found.code == 1 and "does not look like a model" in found.err
    found = dare("export", pack, base, *command[3:], "--overwrite")
    assert found.code == 1 and "holds the input" in found.err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") and target != "dense"]


def test_an_export_without_a_patch_can_be_replaced(tmp_path, dare):
    family(tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "same")
    dk.pack(tmp_path / "base", tmp_path / "same", tmp_path / "m.safetensors", lossless=True)
    command = (
        "export",
        tmp_path / "m.safetensors",
        tmp_path / "out",
        "--to",
        "vllm-patch",
        "--base",
        tmp_path / "base",
    )
    assert dare(*command).code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["patches.json"]
    assert dare(*command, "--overwrite").code == 0
    assert dare(*command, "--resume").code == 2
