# SPDX-License-Identifier: Apache-2.0
"""Companion files: the one list of them, and that what is on it arrives wherever a model goes, from the Hub too."""

import ast
import json
from pathlib import Path

import pytest

from darekit.checkpoints import companions
from hub_server import dare as from_hub

# What one finds beside the weights of published models.
MARIAN = ("source.spm", "target.spm", "vocab.json", "target_vocab.json", "tokenizer_config.json")
FSMT = ("vocab-src.json", "vocab-tgt.json", "merges.txt", "tokenizer_config.json")
XLM_PROPHETNET = ("prophetnet.tokenizer", "special_tokens_map.json")
CODE = ("tokenization_own.py", "tokenizer_config.json", "qwen.tiktoken")
ELSEWHERE = ("onnx/config.json", "onnx/tokenizer.json", "onnx/own.py", "original/params.json", "training_args.bin")


def publish(hub, directory, repository, names, *, license=None):
    """A directory's files on the Hub, with further small files beside them."""
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    for name in (*names, *ELSEWHERE):
        files[name] = f"{repository}: {name}".encode()
    if "tokenizer_config.json" in files:
        automatic = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}} if names is CODE else {}
        files["tokenizer_config.json"] = json.dumps(automatic).encode()
    if license:
        files["README.md"] = f"---\nlicense: {license}\n---\n# {repository}\n".encode()
    hub.repositories[repository] = files


def small_files(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.suffix != ".safetensors" and not path.name.startswith("darekit")
    }


@pytest.mark.parametrize(
    ("names", "license", "kept"),
    [(MARIAN, "mit", "license: mit"), (FSMT, "llama2", None), (XLM_PROPHETNET, None, None), (CODE, None, None)],
)
def test_an_output_from_the_hub_has_the_whole_tokenizer_and_the_license(hub, llamas, tmp_path, names, license, kept):
    publish(hub, llamas.path / "base", "org/base", (), license="mit")
    publish(hub, llamas.path / "m0", "org/m0", names, license=license)
    done = from_hub(hub, tmp_path, "drop", "org/base", "org/m0", "out", "-p", "0.5")
    assert done.returncode == 0, done.stderr
    found, files = small_files(tmp_path / "out"), hub.repositories["org/m0"]
    assert set(found) == {*names, "config.json", "README.md"}
    assert {name: found[name] for name in names} == {name: files[name] for name in names}
    metadata = found["README.md"].decode().split("---")[1].splitlines()
    assert [line for line in metadata if line.startswith("license")] == ([kept] if kept else [])


def test_the_models_own_tokenizer_travels_in_its_pack(hub, llamas, tmp_path):
    publish(hub, llamas.path / "base", "org/base", FSMT)
    publish(hub, llamas.path / "m0", "org/m0", MARIAN)
    done = from_hub(hub, tmp_path, "pack", "org/base", "org/m0", "m0.safetensors", "-p", "0.5")
    assert done.returncode == 0, done.stderr
    done = from_hub(hub, tmp_path, "unpack", "org/base", "m0.safetensors", "out")
    assert done.returncode == 0, done.stderr
    found, files = small_files(tmp_path / "out"), hub.repositories["org/m0"]
    assert set(found) == {*MARIAN, "config.json", "README.md"}
    assert all(found[name] == files[name] for name in MARIAN)


def test_companions_of_a_folder_and_of_the_hub_are_the_same(hub, llamas, tmp_path, dare):
    patterns = (*companions.TOKENIZER, *companions.TEMPLATES, *companions.PROCESSOR, *companions.MODEL)
    names = [pattern.replace("*", "x") for pattern in patterns]
    publish(hub, llamas.path / "m0", "org/m0", names)
    for name, content in hub.repositories["org/m0"].items():
        (tmp_path / "m0" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m0" / name).write_bytes(content)
    assert dare("drop", llamas.path / "base", tmp_path / "m0", tmp_path / "local", "-p", "0.5").code == 0
    done = from_hub(hub, tmp_path, "drop", llamas.path / "base", "org/m0", "out", "-p", "0.5")
    assert done.returncode == 0, done.stderr
    local, fetched = small_files(tmp_path / "local"), small_files(tmp_path / "out")
    assert set(names) < set(fetched) == set(local)
    assert {name: local[name] for name in names} == {name: fetched[name] for name in names}


def test_every_file_that_a_tokenizer_of_transformers_reads_is_on_the_list():
    transformers = pytest.importorskip("transformers")
    read = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/tokenization_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match node:
                case ast.Assign(targets=[ast.Name(id="VOCAB_FILES_NAMES")], value=ast.Dict() as value):
                    read |= {name for name in ast.literal_eval(value).values() if isinstance(name, str)}
    assert {"source.spm", "vocab-src.json", "vocab.txt"} <= read
    assert read <= {*companions.TOKENIZER}
