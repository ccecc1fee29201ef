# SPDX-License-Identifier: Apache-2.0
"""The safetensors format, byte by byte, and against the safetensors library in both directions."""

import json

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darekit.checkpoints import InputFile, OutputFile, OutputTensor, Placement, index_json, lay_out, read_placements
from darekit.dtypes import DTYPES
from darekit.errors import PlanError

HEADER = b'{"__metadata__":{"format":"pt"},"b":{"dtype":"I16","shape":[2],"data_offsets":[0,4]}}'


def read(path):
    file = InputFile(path)
    try:
        return read_placements(file)
    finally:
        file.close()


def write(directory, shards, contents):
    """`contents`: name -> (n,) uint8. Written out of order, as threads do."""
    for shard in shards:
        file = OutputFile.create(directory / shard.filename, shard.size)
        for place in reversed(shard.placements):
            file.write(contents[place.name], place.offset)
        file.write(np.frombuffer(shard.header, np.uint8), 0)
        file.sync()
        file.close()


def test_reads_literal_bytes(tmp_path):
    header = (
        b'{"b":{"dtype":"I16","shape":[2],"data_offsets":[0,4]},"s":{"shape":[],"data_offsets":[4,5],"dtype":"U8"}} '
    )
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x6a\0\0\0\0\0\0\0" + header + b"\1\0\2\0\7")
    assert len(header) == 0x6A
    assert read(path) == (Placement("b", "I16", (2,), 8 + 0x6A, 4), Placement("s", "U8", (), 12 + 0x6A, 1))


def test_writes_literal_bytes():
    (shard,) = lay_out([OutputTensor("b", "I16", (2,))], 100)
    assert len(HEADER) == 85
    assert shard.header == b"\x58\0\0\0\0\0\0\0" + HEADER + b"   "
    assert (shard.filename, shard.size) == ("model.safetensors", 8 + 88 + 4)
    assert shard.placements == (Placement("b", "I16", (2,), 96, 4),)


def test_larger_elements_come_first_and_equal_ones_keep_their_order():
    names = [("c", "U8", 3), ("b", "F32", 1), ("a", "F32", 1), ("d", "F64", 1), ("e", "BF16", 1)]
    (shard,) = lay_out([OutputTensor(name, dtype, (n,)) for name, dtype, n in names], 10**6)
    assert [place.name for place in shard.placements] == ["d", "b", "a", "e", "c"]


def test_shards_are_filled_greedily():
    tensors = [OutputTensor(name, "U8", (n,)) for name, n in [("a", 4), ("b", 6), ("c", 1), ("big", 99), ("d", 2)]]
    shards = lay_out(tensors, 10)
    assert [[place.name for place in shard.placements] for shard in shards] == [["a", "b"], ["c"], ["big"], ["d"]]
    assert [shard.filename for shard in shards] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]


def test_index():
    shards = lay_out([OutputTensor("b", "U8", (4,)), OutputTensor("a", "U8", (3,))], 4)
    text = index_json(shards)
    assert text == index_json(shards)
    assert json.loads(text) == {
        "metadata": {"total_size": 7},
        "weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
    }


@pytest.mark.parametrize(
    ("names", "size", "says"),
    [(["a"], 0, "shard size 0"), (["a", "a"], 9, "used twice"), (["__metadata__"], 9, "__metadata__")],
)
def test_impossible_layouts(names, size, says):
    with pytest.raises(PlanError, match=says):
        lay_out([OutputTensor(name, "U8", (1,)) for name in names], size)


def test_nothing_to_write_is_an_empty_file(tmp_path):
    shards = lay_out([], 10)
    write(tmp_path, shards, {})
    assert read(tmp_path / "model.safetensors") == ()
    assert safetensors.numpy.load_file(tmp_path / "model.safetensors") == {}


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__" and not any(0xD800 <= ord(c) < 0xE000 for c in name)
    ),
    st.tuples(st.sampled_from(list(DTYPES)), SHAPES),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(tensors=TENSORS, shard_size=st.integers(1, 400), seed=st.integers(0, 2**32))
def test_what_is_laid_out_is_what_is_read(tensors, shard_size, seed, tmp_path_factory):
    directory = tmp_path_factory.mktemp("layout")
    wanted = [OutputTensor(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    shards = lay_out(wanted, shard_size)
    random = np.random.default_rng(seed)
    places = [place for shard in shards for place in shard.placements]
    contents = {place.name: random.integers(0, 2, place.nbytes, np.uint8) for place in places}
    write(directory, shards, contents)
    for shard in shards:
        path = directory / shard.filename
        assert path.stat().st_size == shard.size
        assert read(path) == shard.placements
        for place in shard.placements:
            assert place.offset % DTYPES[place.dtype].itemsize == 0
        loaded = dict(safetensors.deserialize(path.read_bytes()))
        assert {name: bytes(found["data"]) for name, found in loaded.items()} == {
            place.name: contents[place.name].tobytes() for place in shard.placements
        }
        data = sum(place.nbytes for place in shard.placements)
        assert data <= shard_size or len([place for place in shard.placements if place.nbytes]) == 1
    assert {(place.name, place.dtype, place.shape) for place in places} == {(t.name, t.dtype, t.shape) for t in wanted}
    assert all(shard.placements for shard in shards) or not wanted


TORCH = {
    "bf16": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "f16": torch.arange(5, dtype=torch.float16),
    "f64": torch.arange(3, dtype=torch.float64),
    "e4m3": torch.arange(7).to(torch.float8_e4m3fn),
    "e5m2": torch.arange(7).to(torch.float8_e5m2),
    "i64": torch.tensor([-1, 2**62]),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "größe.λ": torch.ones(1),
}


def raw_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def test_torch_reads_what_is_written(tmp_path):
    names = {entry.torch_name: entry.name for entry in DTYPES.values()}
    wanted = [OutputTensor(k, names[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for k, t in TORCH.items()]
    write(tmp_path, lay_out(wanted, 10**6), {name: raw_bytes(t) for name, t in TORCH.items()})
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TORCH.keys()
    for name, tensor in TORCH.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert np.array_equal(raw_bytes(loaded[name]), raw_bytes(tensor))


def test_numpy_reads_what_is_written(tmp_path):
    arrays = {"a": np.arange(6, dtype="<f4").reshape(2, 3), "s": np.array(7, "<i8"), "b": np.array([True, False])}
    wanted = [OutputTensor("a", "F32", (2, 3)), OutputTensor("s", "I64", ()), OutputTensor("b", "BOOL", (2,))]
    write(tmp_path, lay_out(wanted, 10**6), {k: np.frombuffer(v.tobytes(), np.uint8) for k, v in arrays.items()})
    loaded = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert {k: (v.dtype, v.tolist()) for k, v in loaded.items()} == {
        k: (v.dtype, v.tolist()) for k, v in arrays.items()
    }


def test_reads_what_the_library_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(TORCH, path, metadata={"format": "pt"})
    data = path.read_bytes()
    places = read(path)
    assert {place.name for place in places} == TORCH.keys()
    for place in places:
        tensor = TORCH[place.name]
        assert (DTYPES[place.dtype].torch_name, place.shape) == (str(tensor.dtype)[6:], tuple(tensor.shape))
        assert data[place.offset : place.offset + place.nbytes] == raw_bytes(tensor).tobytes()
