# SPDX-License-Identifier: Apache-2.0
"""Packs of version 1 decode for ever, here and by a second reader. Nothing regenerates these files."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import darekit as dk
import families
import pack_reader
from golden_base import base_of

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
FILES = {
    "exact": "a8ced5e24be6e01c",
    "int1": "0ee452a026e4c735",
    "int2": "1b7de79916390432",
    "int4": "f91438b8bc7ef5f3",
    "int8": "da2a8e47cacc6912",
    "lossless": "2d31a4b5a937344e",
    "none": "785593d5b262b604",
    "rounded": "24bff576c7778a03",
    "steps-exact": "a613ad3e485e3c5e",
    "steps-lossless": "c5d606d56250f990",
    "zstd-exact": "074a65be65523ee1",
    "zstd-int4": "f4f01689c0da2d46",
    "zstd-rounded": "cf390ac3d3895494",
}


def digests(tensors):
    return {name: hashlib.blake2b(raw, digest_size=16).hexdigest() for name, raw in tensors.items()}


def raw_base():
    return {name: np.ascontiguousarray(array).tobytes() for name, array in base_of().items()}


def test_all_files_are_there():
    assert {path.stem for path in GOLDEN.glob("*.safetensors")} == set(EXPECTED) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_unchanged(name):
    found = hashlib.blake2b((GOLDEN / f"{name}.safetensors").read_bytes(), digest_size=8).hexdigest()
    assert found == FILES[name]


@pytest.mark.parametrize("name", FILES)
def test_darekit_reads_it(name, tmp_path):
    families.save(tmp_path / "base", base_of())
    with dk.open_pack(GOLDEN / f"{name}.safetensors", base=tmp_path / "base") as pack:
        assert not pack.verify().faults
    dk.unpack(tmp_path / "base", GOLDEN / f"{name}.safetensors", tmp_path / "out")
    found = {key: np.ascontiguousarray(array).tobytes() for key, array in families.load(tmp_path / "out").items()}
    assert digests(found) == EXPECTED[name]


@pytest.mark.parametrize("name", FILES)
def test_the_second_reader_reads_it(name):
    assert digests(pack_reader.restore(GOLDEN / f"{name}.safetensors", raw_base())) == EXPECTED[name]


def test_the_second_reader_knows_nothing_of_darekit():
    source = Path(pack_reader.__file__).read_text()
    assert "import darekit" not in source and "from darekit" not in source
