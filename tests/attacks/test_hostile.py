# SPDX-License-Identifier: Apache-2.0
"""No hostile file gets further than a short message, within a second."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from hostile import ATTACKS, GOOD, LYING_INDEXES, POSERS, encode, sharded, tensor

from darekit.checkpoints import open_checkpoint
from darekit.errors import CheckpointError


def count_descriptors():
    return len(list(Path("/dev/fd").iterdir()))


def test_the_harmless_file_opens(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["w"]
    checkpoint.close()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_is_named(attack, tmp_path):
    path = attack.build(tmp_path / "model")
    before = count_descriptors()
    began = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert time.perf_counter() - began < 2  # a second, and the noise of a busy machine
    assert type(caught.value) is attack.error
    message = str(caught.value)
    assert attack.says in message
    assert str(path) in message  # which file it is
    assert len(message) < 1000
    assert message.isprintable()
    assert count_descriptors() == before  # nothing stays open


@pytest.mark.parametrize("name", LYING_INDEXES)
def test_headers_are_right_where_an_index_lies(name, tmp_path):
    weight_map, shards, there = LYING_INDEXES[name]
    for file, data in sharded(weight_map, **shards).items():
        (tmp_path / file).write_bytes(data)
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == there
    assert name == "equal tensor in two shards" or any("index" in note for note in checkpoint.notes)
    for info in checkpoint.tensors.values():
        info.source.read_into(np.empty(8, np.uint8), 0)
    checkpoint.close()


def test_truncated_anywhere(tmp_path):
    path = tmp_path / "model.safetensors"
    whole = encode({"v": tensor(), "w": tensor((2, 2), 8, 24)}, bytes(24))
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="is truncated" if size >= 8 else "not a safetensors file"):
            open_checkpoint(path)


@pytest.mark.parametrize("poser", POSERS)
def test_poser(poser, tmp_path):
    build, says = POSERS[poser]
    build(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(tmp_path)


def test_named_pipe_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path)


def test_file_shrinks_after_opening(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    checkpoint = open_checkpoint(path)
    assert not checkpoint.files[0].changed()
    os.truncate(path, len(GOOD) - 3)
    assert checkpoint.files[0].changed()
    with pytest.raises(CheckpointError, match="shrank or was truncated while it was read"):
        checkpoint.tensors["w"].source.read_into(np.empty(8, np.uint8), 0)
    checkpoint.close()
