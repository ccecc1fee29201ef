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
    "exact": "76ba90059c27ae43",
    "int1": "4168f5a30470572c",
    "int2": "57b04aa90a882e6f",
    "int4": "8358e2a0191e95a7",
    "int8": "10e24b28fff9366c",
    "lossless": "91078154b9856f5b",
    "none": "127d797269254444",
    "rounded": "fcea9fb82fa5af2b",
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
