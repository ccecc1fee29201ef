# SPDX-License-Identifier: Apache-2.0
"""Opening checkpoints: directories, files, the Hub's cache, pickled files; and files that many threads share."""

import ctypes
import errno
import fnmatch
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from darekit.checkpoints import (
    ArrayBytes,
    Checkpoint,
    FileRange,
    InputFile,
    OutputFile,
    TensorInfo,
    natural_key,
    open_checkpoint,
    sample_digest,
    sync_directory,
)
from darekit.checkpoints import files as files_module
from darekit.checkpoints.hub import fetch_snapshot
from darekit.errors import CheckpointError, OutputError, Unsupported

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def weights():
    return {
        "layers.10.w": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "layers.2.w": torch.arange(4, dtype=torch.float32),
        "count": torch.tensor(3),
    }


def make_model(directory, config=None, **tensors):
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors or weights(), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return directory


def make_shards(directory):
    directory.mkdir(parents=True, exist_ok=True)
    index = {}
    for i, (name, tensor) in enumerate(weights().items(), start=1):
        file = f"model-{i:05d}-of-00003.safetensors"
        save_file({name: tensor}, directory / file)
        index[name] = file
    text = json.dumps({"metadata": {"total_size": 36}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text)
    return directory


def read_all(checkpoint):
    found = {}
    for name, info in checkpoint.tensors.items():
        buffer = np.empty(info.nbytes, np.uint8)
        info.source.read_into(buffer, 0)
        found[name] = (info.dtype, info.shape, buffer.tobytes())
    return found


EXPECTED = {
    "count": ("I64", (), b"\3\0\0\0\0\0\0\0"),
    "layers.2.w": ("F32", (4,), np.arange(4, dtype="<f4").tobytes()),
    "layers.10.w": ("BF16", (2, 3), bytes.fromhex("0000803f004040408040a040")),
}


class TestOpening:
    def test_single_file_in_a_directory(self, tmp_path):
        checkpoint = open_checkpoint(make_model(tmp_path / "m"))
        assert list(checkpoint.tensors) == list(EXPECTED)  # layers.2 before layers.10
        assert read_all(checkpoint) == EXPECTED
        assert checkpoint.config == {"model_type": "llama"}
        assert (checkpoint.directory, checkpoint.revision) == (tmp_path / "m", None)
        assert checkpoint.tensors["count"].count == 1
        assert checkpoint.tensors["layers.10.w"].nbytes == 12
        checkpoint.close()
        checkpoint.close()  # twice is harmless

    def test_shards(self, tmp_path):
        checkpoint = open_checkpoint(make_shards(tmp_path / "m"))
        assert read_all(checkpoint) == EXPECTED
        assert len(checkpoint.files) == 3
        assert checkpoint.config is None
        checkpoint.close()

    def test_one_file(self, tmp_path):
        make_model(tmp_path)
        checkpoint = open_checkpoint(tmp_path / "model.safetensors")
        assert (checkpoint.directory, checkpoint.config) == (None, {"model_type": "llama"})
        assert checkpoint.companions == {"config.json": tmp_path / "config.json"}
        assert read_all(checkpoint) == EXPECTED
        checkpoint.close()

    def test_only_one_safetensors_file_of_another_name(self, tmp_path):
        save_file(weights(), tmp_path / "weights.safetensors")
        open_checkpoint(tmp_path).close()
        save_file(weights(), tmp_path / "more.safetensors")
        with pytest.raises(CheckpointError, match=r"has 2 safetensors files \(more.safetensors, weights.safetensors\)"):
            open_checkpoint(tmp_path)

    def test_a_lone_shard_is_half_a_model(self, tmp_path):
        save_file(weights(), tmp_path / "model-00001-of-00002.safetensors")
        with pytest.raises(CheckpointError, match="one of 2 shards, without the others"):
            open_checkpoint(tmp_path)

    def test_stale_index_beside_a_whole_file(self, tmp_path):
        make_shards(tmp_path)
        make_model(tmp_path)
        with pytest.raises(CheckpointError, match="which of them is the model"):
            open_checkpoint(tmp_path)
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(CheckpointError, match="which of them is the model"):
            open_checkpoint(tmp_path)
        for file in tmp_path.glob("model-*"):
            file.unlink()
        open_checkpoint(tmp_path).close()

    def test_index_that_names_the_single_file(self, tmp_path):
        make_model(tmp_path)
        index = {"weight_map": dict.fromkeys(weights(), "model.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        open_checkpoint(tmp_path).close()

    def test_infinity_in_a_config_is_read(self, tmp_path):  # as in Mamba's
        make_model(tmp_path)
        (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.config["time_step_limit"][1] == float("inf")
        checkpoint.close()

    def test_replaced_file_is_noticed(self, tmp_path):
        checkpoint = open_checkpoint(make_model(tmp_path))
        (file,) = checkpoint.files
        assert not file.changed()
        status = file.path.stat()
        (make_model(tmp_path / "other") / "model.safetensors").replace(file.path)
        os.utime(file.path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert file.changed()  # same size and time, another inode
        file.path.unlink()
        assert file.changed()
        checkpoint.close()


class TestPlaces:
    def test_working_directory_wins_over_search(self, tmp_path, monkeypatch):
        here, there = tmp_path / "here", tmp_path / "there"
        make_model(here / "org/name", a=torch.zeros(1))
        make_model(there / "org/name", b=torch.zeros(1))
        make_model(there / "only", c=torch.zeros(1))
        monkeypatch.chdir(here)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # nothing here may reach for the network
        for ref, expected in (("org/name", "a"), ("./org/name", "a"), ("only", "c")):
            checkpoint = open_checkpoint(ref, search=[there])
            assert list(checkpoint.tensors) == [expected]
            assert checkpoint.ref == ref
            checkpoint.close()

    def test_home(self, tmp_path, monkeypatch):
        make_model(tmp_path / "m")
        monkeypatch.setenv("HOME", str(tmp_path))
        open_checkpoint("~/m").close()

    @pytest.mark.parametrize("ref", ["./mistral-base", "mistral-base", "a/b/mistral-base", Path("org/name")])
    def test_not_found_lists_the_places(self, ref, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
        (tmp_path / "recipes").mkdir()
        (tmp_path / "recipes/mistral-bsae").mkdir()
        with pytest.raises(CheckpointError, match="there is no checkpoint") as caught:
            open_checkpoint(ref, search=[tmp_path / "recipes"])
        assert str(tmp_path / ref) in str(caught.value)
        assert str(tmp_path / "recipes" / ref) in str(caught.value)
        near = "did you mean " + str(tmp_path / "recipes/mistral-bsae")
        assert (near in str(caught.value)) == (str(ref) in ("./mistral-base", "mistral-base"))

    @pytest.mark.parametrize(
        ("ref", "says"),
        [
            ("", "is empty"),
            ("x" * 5000, "cannot be opened"),
            ("a\0b", "no checkpoint"),
            ("~nobody-here/x", "no checkpoint"),
        ],
    )
    def test_impossible_names(self, ref, says):
        with pytest.raises(CheckpointError, match=says):
            open_checkpoint(ref)


class TestRefused:
    def test_adapter(self, tmp_path):
        directory = tmp_path / "my-lora"
        directory.mkdir()
        (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "task_type": "CAUSAL_LM"}')
        save_file(weights(), directory / "adapter_model.safetensors")
        for ref in (directory, directory / "adapter_model.safetensors"):
            with pytest.raises(Unsupported, match="is a LoRA/PEFT adapter") as caught:
                open_checkpoint(ref)
            code = [line[4:] for line in str(caught.value).splitlines() if line.startswith("    ")]
            compile("\n".join(code), "advice", "exec")
            assert "AutoPeftModelForCausalLM.from_pretrained" in code[1]
            assert "merge_and_unload().save_pretrained('my-lora-merged')" in code[2]
        (directory / "adapter_config.json").rename(tmp_path / "adapter_config.json")
        with pytest.raises(Unsupported, match="is a LoRA/PEFT adapter"):
            open_checkpoint(directory)
        (tmp_path / "adapter_config.json").rename(directory / "adapter_config.json")
        make_model(directory)  # a whole model that still has its adapter's settings
        open_checkpoint(directory).close()

    @pytest.mark.parametrize("nested", [False, True])
    def test_quantised(self, nested, tmp_path):
        config = {"quantization_config": {"quant_method": "gptq"}}
        codes = {"a.qweight": torch.zeros(2, 2, dtype=torch.int32), "a.scales": torch.ones(2)}
        make_model(tmp_path, {"text_config": config} if nested else config, **codes)
        for ref in (tmp_path, tmp_path / "model.safetensors"):
            with pytest.raises(Unsupported, match=r'quant_method "gptq".*Dequantise first'):
                open_checkpoint(ref)

    def test_not_quantised(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        open_checkpoint(make_model(tmp_path, {"quantization_config": None})).close()

    @pytest.mark.parametrize("scale", ["a.input_scale", "a.scales", "a.amax"])
    def test_scaled_eights(self, scale, tmp_path):
        eight = torch.zeros(4).to(torch.float8_e4m3fn)
        make_model(tmp_path, **{"a.weight": eight, scale: torch.ones(1)})
        with pytest.raises(Unsupported, match=r"F8 weights .*with scales beside them"):
            open_checkpoint(tmp_path)
        make_model(tmp_path, **{"a.weight": eight})
        open_checkpoint(tmp_path).close()

    @pytest.mark.parametrize("name", ["m.gguf", "m.pt", "m.pth", "m.ckpt", "m.onnx"])
    def test_other_kinds_of_files(self, name, tmp_path):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(Unsupported, match=f"{name} is not read"):
            open_checkpoint(tmp_path / name)
        way_on = r"gguf_file=NAME.*save_pretrained" if name == "m.gguf" else ""
        with pytest.raises(CheckpointError, match=f"{name}.*{way_on}"):
            open_checkpoint(tmp_path)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


class TestPickled:
    @pytest.mark.parametrize("legacy", [False, True])
    def test_one_file(self, legacy, tmp_path):
        tensors = {**weights(), "t": torch.arange(6.0).reshape(2, 3).T, "e": torch.zeros(0, 2)}
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        (tmp_path / "training_args.bin").write_bytes(b"not looked at")
        checkpoint = open_checkpoint(tmp_path)
        found = read_all(checkpoint)
        assert found.pop("t") == ("F32", (3, 2), np.array([0, 3, 1, 4, 2, 5], "<f4").tobytes())
        assert found.pop("e") == ("F32", (0, 2), b"")
        assert found == EXPECTED
        assert [file.path.name for file in checkpoint.files] == ["pytorch_model.bin"]
        checkpoint.close()

    def test_shards(self, tmp_path):
        index = {}
        for i, (name, tensor) in enumerate(weights().items()):
            torch.save({name: tensor}, tmp_path / f"pytorch_model-{i}.bin")
            index[name] = f"pytorch_model-{i}.bin"
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
        checkpoint = open_checkpoint(tmp_path)
        assert read_all(checkpoint) == EXPECTED
        checkpoint.close()

    def test_digest_is_that_of_the_same_model_in_safetensors(self, tmp_path):
        make_shards(tmp_path / "a")
        (tmp_path / "b").mkdir()
        torch.save(weights(), tmp_path / "b/pytorch_model.bin")
        digests = set()
        for ref in (tmp_path / "a", tmp_path / "b", make_model(tmp_path / "c")):
            checkpoint = open_checkpoint(ref)
            digests.add(sample_digest(checkpoint))
            checkpoint.close()
        assert len(digests) == 1

    def test_safetensors_are_preferred(self, tmp_path):
        (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
        make_model(tmp_path)
        open_checkpoint(tmp_path).close()
        (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
        open_checkpoint(tmp_path).close()

    def test_an_adapter_beside_it_is_not_the_model(self, tmp_path):
        torch.save(weights(), tmp_path / "pytorch_model.bin")
        save_file({"lora": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text("{}")
        checkpoint = open_checkpoint(tmp_path)
        assert list(checkpoint.tensors) == list(EXPECTED)
        checkpoint.close()

    def test_code_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        torch.save({"w": Bomb()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(Unsupported, match="wants to run code, which darekit never does"):
            open_checkpoint(tmp_path)
        assert not (tmp_path / "exploded").exists()

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ([torch.zeros(1)], "holds a list; expected named tensors"),
            ({"model": {"w": torch.zeros(1)}}, "found a dict, expected a name and a tensor"),
            ({3: torch.zeros(1)}, "entry int"),
            ({"w": torch.zeros(1).expand(10**12)}, "a tensor of 4,000,000,000,000 bytes cannot come from a file of"),
            ({"w": torch.zeros(2, dtype=torch.complex128)}, "a tensor of torch.complex128"),
            ({"w": torch.eye(2).to_sparse()}, "torch.sparse_coo"),
        ],
    )
    def test_other_contents(self, content, says, tmp_path):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=says):
            open_checkpoint(tmp_path)

    def test_truncated(self, tmp_path):
        torch.save(weights(), tmp_path / "whole")
        data = (tmp_path / "whole").read_bytes()
        for size in (0, 1, 10, len(data) // 2, len(data) - 1):
            (tmp_path / "pytorch_model.bin").write_bytes(data[:size])
            with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
                open_checkpoint(tmp_path)

    def test_without_torch(self, tmp_path, monkeypatch):
        torch.save(weights(), tmp_path / "pytorch_model.bin")
        monkeypatch.setattr("darekit.checkpoints.pytorch.find_spec", lambda name: None)
        with pytest.raises(Unsupported, match=r"pip install 'darekit\[torch\]'"):
            open_checkpoint(tmp_path)


def make_cache(home, repository, build):
    """The Hub's cache as huggingface_hub leaves it: blobs, and a snapshot of links to them."""
    root = home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "refs", root / "blobs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs/main").write_text(COMMIT)
    for path in sorted(build(home / "scratch").iterdir()):
        blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    (home / "scratch").rmdir()
    return snapshot


# In a process of its own, because huggingface_hub reads its environment when it is imported.
OPEN_EACH = """
import json, sys
from darekit.checkpoints import open_checkpoint
from darekit.errors import CheckpointError
out = []
for ref in sys.argv[1:]:
    try:
        checkpoint = open_checkpoint(ref)
        out.append([list(checkpoint.tensors), checkpoint.revision, str(checkpoint.directory)])
    except CheckpointError as error:
        out.append(f"{type(error).__name__}: {error}")
print(json.dumps(out))
"""


class FakeHub:
    """`snapshot_download` with the same selection of files, from a dictionary instead of the network."""

    def __init__(self, root, files):
        self.directory = root / COMMIT
        self.directory.mkdir()
        self.files = files
        self.fetched = []

    def snapshot_download(self, repository, *, revision, cache_dir, allow_patterns, ignore_patterns):
        assert repository == "org/name"
        assert revision == (COMMIT if self.fetched else "v2")
        for name, data in self.files.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                assert not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns) or "/" in name
                if not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns) and name not in self.fetched:
                    self.fetched.append(name)
                    (self.directory / name).write_bytes(data)
        return str(self.directory)


class TestHub:
    def test_offline_cache(self, tmp_path):
        snapshot = make_cache(tmp_path, "org/whole", make_model)
        make_cache(tmp_path, "org/shards", make_shards)
        broken = make_cache(tmp_path, "org/broken", make_shards)
        (broken / "model-00002-of-00003.safetensors").resolve().unlink()
        env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
        refs = ["org/whole", f"org/whole@{COMMIT}", "org/shards", "org/broken", "org/absent", "org/whole@v9"]
        (tmp_path / "org").mkdir()
        (tmp_path / "org/absentt").mkdir()
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", OPEN_EACH, *refs],
            env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        whole, by_commit, shards, broken, absent, revision = json.loads(done.stdout)
        assert whole == by_commit == [list(EXPECTED), COMMIT, str(snapshot)]
        assert shards[0] == list(EXPECTED)
        assert "lacks model-00002-of-00003.safetensors" in broken
        assert absent.startswith("CheckpointError: org/absent is not in the local cache")
        assert "HF_HUB_OFFLINE is set" in absent
        assert "hf download org/absent" in absent
        assert f"looked for {tmp_path}/org/absent; did you mean org/absentt?" in absent
        assert "hf download org/whole --revision v9" in revision
        assert done.stderr == ""

    def test_path_into_the_cache_knows_its_revision(self, tmp_path):
        checkpoint = open_checkpoint(make_cache(tmp_path, "org/name", make_model))
        assert checkpoint.revision == COMMIT
        checkpoint.close()

    def fetch(self, tmp_path, monkeypatch, files):
        hub = FakeHub(tmp_path, files)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
        return hub, lambda: fetch_snapshot("org/name@v2")

    def test_only_what_is_needed_is_fetched(self, tmp_path, monkeypatch):
        index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
        wanted = {
            "config.json": b"{}", "tokenizer.model": b"", "merges.txt": b"", "chat_template.jinja": b"",
            "model.safetensors.index.json": index, "model-1.safetensors": b"", "model-2.safetensors": b"",
            "README.md": b"", "own.py": b"",
        }  # fmt: skip
        other = (
            "consolidated.safetensors", "pytorch_model.bin", "onnx/config.json", "onnx/x.py", "trainer_state.json",
            "onnx/README.md", "requirements.txt", "m.gguf",
        )  # fmt: skip
        hub, fetch = self.fetch(tmp_path, monkeypatch, {**wanted, **dict.fromkeys(other, b"")})
        assert fetch().revision == COMMIT
        assert set(hub.fetched) == set(wanted)

    @pytest.mark.parametrize(
        ("files", "weights"),
        [
            (["model.safetensors", "other.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
            (["other.safetensors", "pytorch_model.bin"], ["other.safetensors"]),
            (["original/other.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"]),
            (["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
        ],
    )
    def test_formats_in_order(self, files, weights, tmp_path, monkeypatch):
        hub, fetch = self.fetch(tmp_path, monkeypatch, {"config.json": b"{}", **dict.fromkeys(files, b"")})
        fetch()
        assert hub.fetched == ["config.json", *weights]

    @pytest.mark.parametrize(
        "companions",
        [
            {"adapter_config.json": b"{}"},
            {
                "config.json": b'{"quantization_config": {"quant_method": "awq"}}',
                "model.safetensors.index.json": b'{"weight_map": {"a.qweight": "model.safetensors"}}',
            },
        ],
    )
    def test_refused_before_weights_are_fetched(self, companions, tmp_path, monkeypatch):
        hub, fetch = self.fetch(tmp_path, monkeypatch, {**companions, "model.safetensors": b""})
        with pytest.raises(Unsupported):
            fetch()
        assert hub.fetched == list(companions)

    @pytest.mark.parametrize(
        ("kind", "says"),
        [
            (hub_errors.GatedRepoError, "is gated: ask for access at https://huggingface.co/org/name"),
            (hub_errors.RepositoryNotFoundError, "is not on the Hub, or it is private"),
            (hub_errors.RevisionNotFoundError, "has no revision 'v2'"),
            (hub_errors.LocalEntryNotFoundError, "the Hub cannot be reached"),
            (OSError, "could not be fetched from the Hub .OSError"),
        ],
    )
    def test_failures_are_short(self, kind, says, tmp_path, monkeypatch):
        def fail(*args, **kwargs):
            raise kind.__new__(kind)  # some want an HTTP response

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(CheckpointError, match=says) as caught:
            open_checkpoint("org/name@v2")
        assert "No local checkpoint either: looked for" in str(caught.value)
        assert "\n" not in str(caught.value)


class TestFiles:
    def test_many_threads_read_and_write(self, tmp_path):
        size, piece = 1_000_003, 9_973
        data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        output = OutputFile.create(tmp_path / "out", size)
        offsets = range(0, size, piece)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda at: output.write(data[at : at + piece], at), offsets))
        output.sync()
        output.close()
        source = InputFile(tmp_path / "out")
        found = np.zeros_like(data)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda at: source.read_into(found[at : at + piece], at), offsets))
        assert np.array_equal(found, data)
        source.close()
        sync_directory(tmp_path)

    def test_without_positional_reads(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files_module, "POSITIONAL", False)
        self.test_many_threads_read_and_write(tmp_path)

    def test_partial_reads_and_writes_are_finished(self, tmp_path, monkeypatch):
        preadv, pwrite = os.preadv, os.pwrite
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:1000]], at))
        monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:1000], at))
        self.test_many_threads_read_and_write(tmp_path)

    def test_same_size_keeps_content_and_another_size_drops_it(self, tmp_path):
        path = tmp_path / "out"
        path.write_bytes(b"abcd")
        OutputFile.create(path, 4).close()
        assert path.read_bytes() == b"abcd"
        OutputFile.create(path, 6).close()
        assert path.read_bytes() == bytes(6)

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_full_disk(self, code, tmp_path, monkeypatch):
        def fail(*args):
            raise OSError(code, os.strerror(code))

        output = OutputFile.create(tmp_path / "out", 10)
        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(OutputError, match=r"out needs 10 bytes, [\d,]+ are free on its disk: "):
            output.write(np.zeros(10, np.uint8), 0)
        output.close()

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux's call is used")
    @pytest.mark.parametrize(
        ("code", "refused"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EOPNOTSUPP, False)]
    )
    def test_room_is_found_before_the_first_byte(self, code, refused, tmp_path, monkeypatch):
        asked = []

        def fallocate(fd, mode, offset, length):
            asked.append((mode, offset, length))
            ctypes.set_errno(code)
            return -1

        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(fallocate=fallocate))
        if refused:
            with pytest.raises(OutputError, match=r"out needs 10 bytes, .*(no space left|quota is used up)"):
                OutputFile.create(tmp_path / "out", 10)
        else:
            OutputFile.create(tmp_path / "out", 10).close()
        assert asked == [(0, 0, 10)]
        assert (tmp_path / "out").read_bytes() == bytes(10)

    def test_what_is_there_is_not_asked_for_again(self, tmp_path, monkeypatch):
        (tmp_path / "out").write_bytes(b"0123456789")
        monkeypatch.setattr(files_module, "_reserve", lambda *_: pytest.fail("asked for room"))
        OutputFile.create(tmp_path / "out", 10).close()

    def test_too_large_for_the_disk(self, tmp_path):
        with pytest.raises(OutputError, match=r"needs 9,007,199,254,740,992 bytes|cannot be written"):
            OutputFile.create(tmp_path / "out", 1 << 53)

    def test_no_such_directory(self, tmp_path):
        with pytest.raises(OutputError, match="cannot be written: No such file"):
            OutputFile.create(tmp_path / "no/out", 10)

    def test_a_closed_file_refuses_to_be_read_though_another_has_its_descriptor(self, tmp_path):
        (tmp_path / "own").write_bytes(b"own!")
        (tmp_path / "other").write_bytes(b"other")
        file = InputFile(tmp_path / "own")
        descriptor = file._fd
        file.close()
        other = os.open(tmp_path / "other", os.O_RDONLY)
        try:
            assert other == descriptor, "the system gives the smallest free number: the old one"
            for read in (lambda: file.read(0, 4), lambda: FileRange(file, 0, 4).read_into(np.empty(4, np.uint8), 0)):
                with pytest.raises(CheckpointError, match=r"own is closed, and was to be read: .*with dk\.plan"):
                    read()
            file.close()  # must not close the other file
            assert os.pread(other, 5, 0) == b"other"
        finally:
            os.close(other)

    def test_a_closed_file_reopens_while_it_is_the_same(self, tmp_path):
        (tmp_path / "own").write_bytes(b"own!")
        file = InputFile(tmp_path / "own")
        descriptor = file._fd
        file.reopen()
        assert file._fd == descriptor, "it was open"
        file.close()
        file.reopen()
        assert file.read(0, 4) == b"own!"
        file.close()
        (tmp_path / "new").write_bytes(b"new!")
        (tmp_path / "new").replace(tmp_path / "own")
        with pytest.raises(CheckpointError, match="own has changed since it was first opened"):
            file.reopen()
        with pytest.raises(CheckpointError, match="own is closed"):
            file.read(0, 4)
        (tmp_path / "own").unlink()
        with pytest.raises(CheckpointError, match="own does not exist"):
            file.reopen()

    def test_ranges_stay_inside(self, tmp_path):
        (tmp_path / "x").write_bytes(bytes(range(10)))
        file = InputFile(tmp_path / "x")
        buffer = np.empty(3, np.uint8)
        for source in (FileRange(file, 2, 5), ArrayBytes(np.arange(2, 7, dtype=np.uint8))):
            source.read_into(buffer, 2)
            assert buffer.tolist() == [4, 5, 6]
            source.read_into(np.empty(0, np.uint8), 5)
            for offset in (3, -1):
                with pytest.raises(ValueError, match="outside"):
                    source.read_into(buffer, offset)
        file.close()


def in_memory(**arrays):
    tensors = {
        name: TensorInfo(name, dtype, array.shape, ArrayBytes(np.frombuffer(array.tobytes(), np.uint8)))
        for name, (dtype, array) in arrays.items()
    }
    return Checkpoint("memory", None, tensors, None, (), None)


class TestDigest:
    def test_encoding(self):
        big = np.arange(3000, dtype="<u2").reshape(30, 100)
        checkpoint = in_memory(z=("U8", np.array(7, "u1")), a=("U16", big), é=("F32", np.zeros((0, 2), "<f4")))
        text = b"a\0U16\x0030,100\0" + big.tobytes()[:4096] + b"z\0U8\0\0\7" + "é".encode() + b"\0F32\x000,2\0"
        assert sample_digest(checkpoint) == hashlib.blake2b(text, digest_size=16).digest()

    def test_golden(self):
        checkpoint = in_memory(**{"h.10": ("I32", np.arange(6, dtype="<i4")), "h.2": ("U8", np.array(7, "u1"))})
        assert sample_digest(checkpoint).hex() == "b85da72c8fe4f3a3343c344c79f85c8a"


class TestNaturalKey:
    @given(st.lists(st.text("ab.019٣²é", max_size=6), max_size=8))
    def test_total_order(self, names):
        once = sorted(set(names), key=natural_key)
        assert sorted(reversed(once), key=natural_key) == once
        assert len({natural_key(name) for name in once}) == len(once)

    @given(st.integers(0, 10**9), st.integers(0, 10**9), st.sampled_from(["", ".w", "x3"]))
    def test_numbers_are_compared_as_numbers(self, a, b, tail):
        assert (natural_key(f"l.{a}{tail}") < natural_key(f"l.{b}{tail}")) == (a < b)

    def test_long_numbers(self):
        assert natural_key("9" * 5000) < natural_key("1" + "0" * 5000)


HEAVY = ("torch", "numba", "huggingface_hub", "safetensors", "transformers", "pydantic")


def loaded_by(statement):
    code = f"import sys; {statement}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split()


def test_import_stays_light():
    assert loaded_by("import darekit.checkpoints") == []


def test_the_test_above_can_fail():
    assert "huggingface_hub" in loaded_by("import darekit.checkpoints, huggingface_hub")
