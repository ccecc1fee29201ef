# SPDX-License-Identifier: Apache-2.0
"""Hostile and broken checkpoints: one builder each, with the error it must end in and words of its message."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from darekit.errors import CheckpointError, Unsupported


def tensor(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def encode(header, data: bytes = b"\0" * 8, *, length: int | None = None) -> bytes:
    """A file from a header (object or raw bytes); `length`: what its first 8 bytes say, if not the truth."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = encode({"w": tensor()})


def sharded(weight_map, **files: bytes) -> dict[str, bytes]:
    text = weight_map if isinstance(weight_map, bytes) else json.dumps({"weight_map": weight_map}).encode()
    shards = {f"{name}.safetensors": data for name, data in files.items()}
    return {"model.safetensors.index.json": text, **shards}


@dataclass(frozen=True)
class Attack:
    """`files` are written into an empty directory, which is then opened."""

    name: str
    files: dict[str, bytes]
    error: type[CheckpointError]
    says: str

    def build(self, directory: Path) -> Path:
        directory.mkdir()
        for name, data in self.files.items():
            (directory / name).write_bytes(data)
        return directory


def header(name: str, content, says: str, error: type[CheckpointError] = CheckpointError, **how) -> Attack:
    return Attack(name, {"model.safetensors": encode(content, **how)}, error, says)


def entry(name: str, content, says: str, error: type[CheckpointError] = CheckpointError) -> Attack:
    return header(name, {"w": content}, says, error)


def index(name: str, weight_map, says: str, **files: bytes) -> Attack:
    return Attack(name, sharded(weight_map, **(files or {"a": GOOD})), CheckpointError, says)


def raw(name: str, data: bytes, says: str, error: type[CheckpointError] = CheckpointError) -> Attack:
    return Attack(name, {"model.safetensors": data}, error, says)


ATTACKS: tuple[Attack, ...] = (
    # The length in front of the header.
    raw("empty file", b"", "it has 0 bytes"),
    raw("seven bytes", b"\1\0\0\0\0\0\0", "it has 7 bytes"),
    header("length 2^60", {"w": tensor()}, "the format allows 100,000,000", length=1 << 60),
    header("length 2^64 - 1", {"w": tensor()}, "the format allows 100,000,000", length=(1 << 64) - 1),
    header("length 0", {"w": tensor()}, "its header has 0 bytes", length=0),
    header("length 1", {"w": tensor()}, "its header has 1 bytes", length=1),
    header("length beyond the file", {"w": tensor()}, "is truncated", length=5000),
    raw("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    # The header as JSON.
    header("not an object", b"[1, 2]", "its header begins with"),
    header("space first", b' {"w":0}', "its header begins with"),
    header("no JSON", b"{what}", "is not valid JSON"),
    header("two documents", b"{}{}", "is not valid JSON"),
    header("a byte order mark", b"\xef\xbb\xbf{}", "its header begins with"),
    header("not UTF-8", b'{"\xff\xfe": 0}', "is not UTF-8 text"),
    header("UTF-16", "{}".encode("utf-16-le"), "is not valid JSON"),
    header("half a surrogate pair", b'{"\\ud800": ' + json.dumps(tensor()).encode() + b"}", "not Unicode text"),
    header("NaN", b'{"w": NaN}', "holds NaN"),
    header("Infinity", b'{"w": {"shape": [-Infinity]}}', "holds -Infinity"),
    header("nested a little", b'{"w":' + b"[" * 900 + b"]" * 900 + b"}", "expected an object with dtype"),
    header("nested deeply", b'{"w":' + b"[" * 100_000, "nested too deeply"),
    header("nested objects", b'{"w":' + b'{"a":' * 100_000, "nested too deeply"),
    header("ten million lists", b'{"w":[' + b"[]," * 10_000_000, "about 20,000,002 values"),
    header("a number of a million digits", b'{"w":' + b"9" * 1_000_000 + b"}", "too many digits"),
    header("a name twice", b'{"w": 1, "w": 2}', 'has the key "w" twice'),
    header("a field twice", b'{"w": {"dtype": "F32", "dtype": "F16"}}', 'has the key "dtype" twice'),
    header("a name that steers the terminal", {"\x1b[2J": 0}, "\\u001b[2J"),
    header("a name of a megabyte", {"n" * 1_000_000: 0}, "nnn..."),
    header("metadata is a list", {"__metadata__": [], "w": tensor()}, "does not map strings to strings"),
    header("metadata holds a number", {"__metadata__": {"a": 1}, "w": tensor()}, "does not map strings to strings"),
    header("no tensors", {}, "behind its last tensor"),
    # One tensor.
    entry("no fields", {}, "expected an object with dtype, shape and data_offsets"),
    entry("a field too many", {**tensor(), "scale": 1}, "expected an object with dtype, shape and data_offsets"),
    entry("null", None, "expected an object with dtype, shape and data_offsets"),
    entry("unknown dtype", tensor(dtype="F4"), 'number format "F4" is not supported', Unsupported),
    entry("dtype in lower case", tensor(dtype="f32"), "is not supported", Unsupported),
    entry("dtype is a list", tensor(dtype=["F32"]), "is not supported", Unsupported),
    entry("shape is a number", {**tensor(), "shape": 2}, "shape 2 is not a list"),
    entry("negative dimension", tensor((-2,)), "shape [-2] is not a list of whole numbers"),
    entry("two negative dimensions", tensor((-1, -2)), "is not a list of whole numbers"),
    entry("float dimension", tensor((2.0,)), "shape [2.0] is not a list of whole numbers"),
    entry("bool dimension", tensor((True, 2)), "shape [true, 2] is not a list of whole numbers"),
    entry("string dimension", tensor(("2",)), "is not a list of whole numbers"),
    entry("shape overflows", tensor((2**62, 4)), "overflows"),
    entry("shape overflows to 0", tensor((2**62, 4, 0), 0, 0), "overflows"),
    entry("shape overflows to 8", tensor((2**61 + 1, 8)), "overflows"),
    entry("dimension overflows", tensor((0, 2**70), 0, 0), "overflows"),
    entry("bytes overflow", tensor((2**62,)), "overflows"),
    entry("too many dimensions", tensor([1] * 65), "has 65 dimensions"),
    entry("a million dimensions", tensor([9] * 900_000), "has 900000 dimensions"),
    entry("three offsets", {**tensor(), "data_offsets": [0, 8, 8]}, "are not two whole numbers"),
    entry("offsets are no list", {**tensor(), "data_offsets": "08"}, "are not two whole numbers"),
    entry("negative offset", tensor(begin=-8, end=0), "are not two whole numbers"),
    entry("bool offset", tensor(begin=False), "are not two whole numbers"),
    entry("float offset", tensor(end=8.0), "are not two whole numbers"),
    entry("offsets backwards", tensor(begin=8, end=0), "begins at 8, after its end at 0"),
    entry("too few bytes", tensor((3,)), "needs 12 bytes, data_offsets [0, 8] hold 8"),
    entry("too many bytes", tensor((1,)), "needs 4 bytes, data_offsets [0, 8] hold 8"),
    entry("far away", tensor(begin=1 << 60, end=(1 << 60) + 8), "a hole of"),
    # All tensors together.
    header("overlap", {"v": tensor(), "w": tensor(begin=4, end=12)}, 'overlaps that of "v" by 4', data=b"\0" * 12),
    header("the same bytes twice", {"v": tensor(), "w": tensor()}, 'overlaps that of "v" by 8'),
    header("an empty tensor inside another", {"v": tensor(), "w": tensor((0,), 4, 4)}, 'overlaps that of "v"'),
    header("hole", {"v": tensor(), "w": tensor(begin=9, end=17)}, "a hole of 1 bytes", data=b"\0" * 17),
    header("hole at the beginning", {"w": tensor(begin=8, end=16)}, "the header", data=b"\0" * 16),
    header("bytes behind the last tensor", {"w": tensor()}, "has 1 bytes behind", data=b"\0" * 9),
    header("data cut off", {"w": tensor()}, "is truncated", data=b"\0" * 7),
    # The index of shards.
    index("index is no JSON", b"<html>", "is a web page, not JSON"),
    index("index is a list", b"[]", "expected an object"),
    index("index without a map", b"{}", "weight_map is null"),
    index("map is a list", ["w"], 'weight_map is ["w"]'),
    index("map is empty", {}, "weight_map is {}"),
    index("index names a tensor twice", b'{"weight_map": {"w": "a", "w": "b"}}', "twice"),
    index("file is a number", {"w": 1}, "expected the name of a file"),
    index("file above the directory", {"w": "../../x.safetensors"}, "expected a plain file name"),
    index("absolute file", {"w": "/etc/x.safetensors"}, "expected a plain file name"),
    index("file in a folder", {"w": "sub/x.safetensors"}, "expected a plain file name"),
    index("file in a Windows folder", {"w": "..\\x.safetensors"}, "expected a plain file name"),
    index("file on a Windows drive", {"w": "C:x.safetensors"}, "expected a plain file name"),
    index("file with a NUL", {"w": "x\0.safetensors"}, "expected a plain file name"),
    index("file is the directory", {"w": ".."}, "expected a plain file name"),
    index("file of another kind", {"w": "x.bin"}, "ends in .safetensors"),
    index("missing shard", {"w": "a.safetensors", "v": "b.safetensors"}, "lacks b.safetensors, 1 of the 2 files"),
    index(
        "tensor in two shards with two values", {"w": "a.safetensors", "v": "b.safetensors"}, "with different values",
        a=GOOD, b=encode({"v": tensor(), "w": tensor(begin=8, end=16)}, b"\0" * 8 + b"\1" * 8),
    ),
    # The directory.
    Attack("empty directory", {}, CheckpointError, "an empty directory"),
    Attack("no weights", {"config.json": b"{}"}, CheckpointError, "found config.json"),
    Attack("config is no JSON", {"config.json": b"{", "model.safetensors": GOOD}, CheckpointError, "not valid JSON"),
    Attack("config is a list", {"config.json": b"[]", "model.safetensors": GOOD}, CheckpointError, "but a list"),
    Attack(
        "config nested deeply", {"config.json": b'{"a":' * 100_000, "model.safetensors": GOOD}, CheckpointError,
        "nested too deeply",
    ),
    Attack("header without tensors", {"model.safetensors": encode({}, b"")}, CheckpointError, "holds no tensors"),
)  # fmt: skip

# An index that lies about its shards: the headers are right. Name -> map, shards, the tensors that are there.
LYING_INDEXES = {
    "missing tensor": ({"w": "a.safetensors", "v": "a.safetensors"}, {"a": GOOD}, ["w"]),
    "tensor not in the index": ({"v": "a.safetensors"}, {"a": GOOD}, ["w"]),
    "more tensors than the index": (
        {"w": "a.safetensors"}, {"a": encode({"v": tensor(), "w": tensor(begin=8, end=16)}, b"\0" * 16)}, ["v", "w"],
    ),
    "equal tensor in two shards": (
        {"w": "a.safetensors", "v": "b.safetensors"},
        {"a": GOOD, "b": encode({"v": tensor(), "w": tensor(begin=8, end=16)}, b"\0" * 16)},
        ["v", "w"],
    ),
    "tensor in the other shard": (
        {"v": "a.safetensors", "w": "b.safetensors"}, {"a": GOOD, "b": encode({"v": tensor()})}, ["v", "w"],
    ),
}  # fmt: skip

# Not files in a directory, but things that pose as one.
POSERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a directory": (lambda path: path.mkdir(), "is a directory"),
    "a dangling link": (lambda path: path.symlink_to("nowhere"), "a link to a file that does not exist"),
}
