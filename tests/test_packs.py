# SPDX-License-Identifier: Apache-2.0
"""Packs: exact restores, every width and format, random access, corruption, and packs in the place of models."""

import contextlib
import json
import math
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import xxhash
import zstandard

import darekit as dk
import families
import oracle
from darekit import masks
from darekit.checkpoints import open_checkpoint
from darekit.checkpoints.digests import LEAF, checkpoint_digest, tensor_digest
from darekit.dtypes import DTYPES, FLOAT_DTYPES
from darekit.errors import CheckpointError, DarekitError, DataError, HomologyError, OutputError, PlanError, Unsupported
from darekit.packing import writing
from darekit.packs import lossless, weights
from darekit.packs.lane import READ_LEAVES
from darekit.packs.lossless import compress, decompress, inflate_all
from darekit.packs.quantization import decode_values, dequantize, encode_values, pack_bits, quantize, unpack_bits
from golden_base import base_of

GOLDEN = Path(__file__).parent / "golden"
SHAPES = (*((n,) for n in (0, 1, 63, 64, 65, 1023, 1024, 1025)), (7, 33), (300, 257))


def sizes(directory, dtype="BF16", *, shapes=SHAPES, seed=0, spread=2e-3):
    """Base and m0 with one tensor of each shape."""
    rng = np.random.default_rng(seed)
    base, tuned = {}, {}
    for shape in shapes:
        b, (m,) = oracle.family(rng, shape, dtype, k=1, scale=spread)
        base[f"t{'x'.join(map(str, shape))}.weight"], tuned[f"t{'x'.join(map(str, shape))}.weight"] = b, m
    families.save(directory / "base", base)
    families.save(directory / "m0", tuned)
    return base, tuned


def pack(directory, name="m.safetensors", **options):
    drawn = {} if options.get("lossless") else {"seed": 7}
    options = {"drop_rate": 0.9, **drawn, "force": True, "threads": 2} | options
    return dk.pack(directory / "base", directory / "m0", directory / name, **options)


def restored(directory, name="m.safetensors"):
    dk.unpack(directory / "base", directory / name, directory / f"{name}.unpacked", threads=2)
    return families.load(directory / f"{name}.unpacked")


def leaf_digests(raw, itemsize=2):
    return [xxhash.xxh3_128_digest(raw[i : i + LEAF * itemsize]) for i in range(0, len(raw), LEAF * itemsize)]


# --- exact packs restore what `dare drop` writes


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("rate", [0.0, 0.9, 1.0])
def test_unpack_is_byte_for_byte_what_drop_writes(tmp_path, dtype, rate):
    sizes(tmp_path, dtype)
    bits = 8 * DTYPES[dtype].itemsize
    pack(tmp_path, drop_rate=rate, bits=bits)
    dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "dropped", drop_rate=rate, seed=7, force=True)
    restored(tmp_path)
    found = (tmp_path / "m.safetensors.unpacked/model.safetensors").read_bytes()
    assert found == (tmp_path / "dropped/model.safetensors").read_bytes()


@pytest.mark.parametrize("options", [{"rescale": "none"}, {"keep_dense": ["norms"]}, {"keep_dense": ["t300*"]}])
def test_settings_of_drop_are_settings_of_pack(tmp_path, options):
    sizes(tmp_path)
    pack(tmp_path, drop_rate=0.7, **options)
    dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "dropped", drop_rate=0.7, seed=7, force=True, **options)
    families.same(restored(tmp_path), families.load(tmp_path / "dropped"))


def test_without_a_seed_the_mask_is_that_of_drop(llamas, tmp_path):
    report = dk.pack(llamas.path / "base", llamas.path / "m0", tmp_path / "m.safetensors", drop_rate=0.9)
    dk.drop(llamas.path / "base", llamas.path / "m0", tmp_path / "dropped", drop_rate=0.9)
    dk.unpack(llamas.path / "base", tmp_path / "m.safetensors", tmp_path / "out")
    families.same(families.load(tmp_path / "out"), families.load(tmp_path / "dropped"))
    assert report.seed == json.loads((tmp_path / "dropped/darekit.lock.json").read_text())["effective_seeds"][0]
    lock = json.loads((tmp_path / "dropped/darekit.lock.json").read_text())
    with dk.open_pack(tmp_path / "m.safetensors") as found:
        assert found.info()["content_digest"] == lock["output"]["content_digest"]
        assert found.info()["base"]["content_digest"] == lock["inputs"][0]["content_digest"]


def test_formats_that_differ_between_base_and_model(tmp_path):
    rng = np.random.default_rng(1)
    base = {"w.weight": rng.normal(0, 0.02, (50, 60)).astype(np.float32)}
    tuned = {"w.weight": (base["w.weight"] + rng.normal(0, 1e-2, (50, 60))).astype(families.KINDS["BF16"])}
    families.save(tmp_path / "base", base)
    families.save(tmp_path / "m0", tuned)
    for rate in (0.0, 0.8):
        pack(tmp_path, f"m{rate}.safetensors", drop_rate=rate)
        out = tmp_path / f"dropped{rate}"
        dk.drop(tmp_path / "base", tmp_path / "m0", out, drop_rate=rate, seed=7, force=True)
        families.same(restored(tmp_path, f"m{rate}.safetensors"), families.load(out))


def test_an_unpacked_model_is_an_ordinary_directory(real, tmp_path):
    dk.pack(real.path / "base", real.path / "m0", tmp_path / "m.safetensors", drop_rate=0.9, bits=32)
    dk.unpack(real.path / "base", tmp_path / "m.safetensors", tmp_path / "out")
    model = real.cls.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) > 0
    assert (tmp_path / "out/config.json").exists()


# --- integers


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [*((dtype, bits) for dtype in ("F64", "F32", "F16", "BF16") for bits in (8, 4, 2, 1)),
     ("F8_E5M2", 4), ("F8_E5M2", 1), ("F8_E4M3", 2)],
)  # fmt: skip
def test_integers_restore_base_plus_factor_times_value(tmp_path, bits, dtype):
    base, tuned = sizes(tmp_path, dtype)
    pack(tmp_path, bits=bits, group=32)
    found = restored(tmp_path)
    number = np.float64 if dtype == "F64" else np.float32
    errors = []
    for name, b in base.items():
        kept = masks.kept(7, masks.stream_of(name), 0, b.size, 0.9).reshape(b.shape)
        delta = (tuned[name].astype(number) - b.astype(number))[kept]
        value = np.empty(delta.size, number)
        first = np.count_nonzero(kept.reshape(-1)[:65536])
        for part in (slice(0, first), slice(first, None)):  # groups begin anew in every leaf
            codes, scales = quantize(delta[part], bits, 32)
            dequantize(codes, scales.view(families.KINDS["BF16"]).astype(np.float32), bits, 32, value[part])
        change = np.zeros(b.shape, number)
        change[kept] = value * number(np.float32(1 / (1 - 0.9)))
        expected = np.where(change == 0, b, (b.astype(number) + change).astype(b.dtype))
        assert oracle.raw_of(found[name]).tobytes() == oracle.raw_of(expected.astype(b.dtype)).tobytes()
        if delta.size > 100 and np.linalg.norm(delta):
            errors.append(np.linalg.norm(value - delta) / np.linalg.norm(delta))
    assert max(errors) < {8: 0.01, 4: 0.15, 2: 0.55, 1: 0.75}[bits]


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("count", [0, 1, 7, 63, 64, 65, 95, 96, 97, 1000])
def test_quantised_values(bits, count):
    rng = np.random.default_rng(count)
    delta = rng.normal(0, 1e-3, count).astype(np.float32)
    delta[::5] = 0
    codes, scales = quantize(delta, bits, 64)
    assert np.array_equal(unpack_bits(pack_bits(codes, bits), bits, count), codes)
    for twin, own in zip(encode_values(delta, bits, 64), (pack_bits(codes, bits), scales), strict=True):
        assert np.array_equal(twin, own)
    groups = max(min(count, 1), round(count / 64 + 1e-9))  # the nearest: the last group takes the rest
    assert pack_bits(codes, bits).size == -(-count * bits // 8) and scales.size == 2 * groups
    wide = scales.view(families.KINDS["BF16"]).astype(np.float32)
    value = np.empty(count, np.float32)
    dequantize(codes, wide, bits, 64, value)
    twin = np.empty(count, np.float32)
    decode_values(pack_bits(codes, bits), wide, bits, 64, twin)
    assert np.array_equal(twin, value)
    if bits > 1:
        assert not value[::5].any(), "zero deltas stay zero"
    if bits >= 4:
        scale = wide[np.minimum(np.arange(count) // 64, groups - 1)]
        assert np.all(np.abs(value - delta) <= scale * 0.501), "nothing is clipped"


def test_groups_of_zeros_and_of_huge_values():
    for bits in (8, 4, 2, 1):
        for delta in (np.zeros(70, np.float32), np.full(70, 3e38, np.float32), np.full(70, 1e-45, np.float32)):
            codes, scales = quantize(delta, bits, 64)
            wide = scales.view(families.KINDS["BF16"]).astype(np.float32)
            assert np.all(np.isfinite(wide)) and np.all(wide >= 0)
            value = np.empty(70, np.float32)
            dequantize(codes, wide, bits, 64, value)
            assert np.all(np.isfinite(value))


def test_fewer_bits_than_the_format_are_said_to_be_lossy(tmp_path):
    base, tuned = sizes(tmp_path, "F32")
    assert any("--bits 32 is exact" in note for note in pack(tmp_path, bits=16).notes)
    assert not any("exact" in note for note in pack(tmp_path, "n.safetensors", bits=32).notes)
    found = restored(tmp_path)
    name = "t300x257.weight"
    kept = masks.kept(7, masks.stream_of(name), 0, base[name].size, 0.9).reshape(base[name].shape)
    wanted = (tuned[name] - base[name])[kept] * 10
    assert np.allclose((found[name] - base[name])[kept], wanted, rtol=2**-7)


def test_dense_bits(tmp_path):
    sizes(tmp_path)
    pack(tmp_path, bits=1, keep_dense=["norms"])
    with dk.open_pack(tmp_path / "m.safetensors") as found:
        encodings = {name: tensor.encoding for name, tensor in found.tensors.items() if tensor.kind == "delta"}
    assert encodings["t300x257.weight"] == "int1" and encodings["t1024.weight"] == "int4"
    pack(tmp_path, "n.safetensors", bits=1, dense_bits=16, keep_dense=["norms"])
    with dk.open_pack(tmp_path / "n.safetensors") as found:
        assert found.tensors["t1024.weight"].encoding == "exact"


# --- lossless


def rl_tuned(directory, share=0.1, dtype="BF16"):
    """A base and a model of which only a share of the elements changed; odd values and integers among them."""
    rng = np.random.default_rng(8)
    base, tuned = sizes(directory, dtype, shapes=((1000, 200), (1025,), (0,), (3, 5)))
    for name, b in base.items():
        m = tuned[name]
        m[...] = np.where(rng.random(m.shape) < share, m, b)
    tuned["t3x5.weight"][0] = np.nan
    tuned["t3x5.weight"][1] = -0.0
    base |= {"n": np.arange(200, dtype=np.int64), "same.weight": base["t1000x200.weight"]}
    tuned |= {"n": np.arange(200, dtype=np.int64)[::-1].copy(), "same.weight": base["t1000x200.weight"]}
    families.save(directory / "base", base)
    families.save(directory / "m0", tuned)
    return base, tuned


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_a_lossless_pack_restores_every_bit(tmp_path, dtype, share):
    base, tuned = rl_tuned(tmp_path, share, dtype)
    report = dk.pack(tmp_path / "base", tmp_path / "m0", tmp_path / "m.safetensors", lossless=True, threads=2)
    families.same(restored(tmp_path), tuned)
    with dk.open_pack(tmp_path / "m.safetensors", base=tmp_path / "base") as found:
        kinds = {name: tensor.kind for name, tensor in found.tensors.items()}
        assert kinds["same.weight"] == "same" and kinds["t1000x200.weight"] == "lossless"
        assert not found.verify().faults
        name = "t1000x200.weight"
        number = np.float64 if dtype == "F64" else np.float32
        delta = tuned[name].astype(number) - base[name].astype(number)
        assert np.array_equal(found.delta(name, slice(300, 400)), delta[300:400])
        arrays = {n: array.copy() for n, array in base.items()}
        found.apply_(arrays)
    families.same(arrays, tuned)
    if share == 0.02:
        assert report.bytes < 0.15 * report.model_bytes
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_lossless_packs_that_are_refused(tmp_path):
    base, _ = sizes(tmp_path)
    with pytest.raises(PlanError, match="either a drop rate or lossless"):
        dk.pack(tmp_path / "base", tmp_path / "m0", tmp_path / "m.safetensors")
    with pytest.raises(PlanError, match="not both"):
        pack(tmp_path, lossless=True)
    families.save(tmp_path / "m0", {name: array.astype(np.float32) for name, array in base.items()})
    with pytest.raises(PlanError, match="F32 in the model and BF16"):
        pack(tmp_path, lossless=True, drop_rate=None)
    assert not list(tmp_path.glob("*m.safetensors*")) and not list(tmp_path.glob(".m*"))


@pytest.mark.parametrize("rate", [0.0, 0.9])
@pytest.mark.parametrize(("wide", "bits"), [(np.float32, 32), (np.float64, 64), (np.float64, 32)])
def test_a_model_of_a_wider_format_than_its_base_comes_out_of_frames(tmp_path, wide, bits, rate):
    """In a frame its values stand by themselves: the base's elements have another size."""
    rng = np.random.default_rng(8)
    base = rng.normal(0, 0.02, (301, 257)).astype(ml_dtypes.bfloat16)
    tuned = (base.astype(np.float32) * np.float32(1 + 2**-7)).astype(wide)
    families.save(tmp_path / "base", {"w.weight": base})
    families.save(tmp_path / "m0", {"w.weight": tuned})
    found = {}
    for codec in ("none", "zstd"):
        out = tmp_path / f"{codec}.safetensors"
        dk.pack(tmp_path / "base", tmp_path / "m0", out, drop_rate=rate, bits=bits, seed=1, force=True, codec=codec)
        dk.unpack(tmp_path / "base", out, tmp_path / codec)
        with dk.open_pack(out, base=tmp_path / "base") as pack:
            assert pack.tensors["w.weight"].codec == codec and not pack.verify().faults
            found[codec] = np.array(pack.delta("w.weight")), families.load(tmp_path / codec)["w.weight"].tobytes()
    assert np.array_equal(found["zstd"][0], found["none"][0]) and found["zstd"][1] == found["none"][1]


@pytest.mark.parametrize(("rate", "result"), [(0.0, 1.0), (0.5, 2.0)])
def test_float64_becomes_bf16_in_two_steps_as_it_did_in_the_first_packs(tmp_path, rate, result):
    """1 + 2^-8 + 2^-40 rounds to 1 + 2^-7; its float32 is a tie, which rounds to 1."""
    families.save(tmp_path / "base", {"w.weight": np.zeros((64, 64), ml_dtypes.bfloat16)})
    families.save(tmp_path / "m0", {"w.weight": np.full((64, 64), 1 + 2**-8 + 2**-40)})
    out = tmp_path / "m.safetensors"
    dk.pack(tmp_path / "base", tmp_path / "m0", out, drop_rate=rate, bits=64, seed=1, force=True)
    dk.unpack(tmp_path / "base", out, tmp_path / "out")
    found = families.load(tmp_path / "out")["w.weight"].astype(np.float64)
    assert {*found.flat} == {result, *((0.0,) if rate else ())}


@pytest.mark.parametrize("method", [0, 1, 2, 3, 4, 5, 6, 255])
def test_hostile_frames(method):
    base = np.zeros(2000, np.uint8)
    bodies = (b"", b"x", b"\xff" * 2000, zstandard.compress(b"\0" * 10**8), zstandard.compress(b"\xff" * 4000),
              zstandard.compress(b"abc"), zstandard.compress(b"\xff" * 400)[:-3], b"\0" * 1999,
              b"\0\0" + zstandard.compress(b"\0" * 10**8), b"\1\0\0\1" + zstandard.compress(b"\xff" * 1000),
              b"\1\0\0\1" + zstandard.compress(b"\0" * 1000), b"\x7e\0" + b"\1" * 252)  # fmt: skip
    for body in bodies:
        if (method, len(body)) == (0, 2000):
            continue
        with pytest.raises(CheckpointError, match="tensor w"):
            decompress(np.frombuffer(bytes([method]) + body, np.uint8), base.copy(), 2, "w")
    tuned = base.copy()
    tuned[::30] = 1
    raw = base.copy()
    decompress(compress(base, tuned, 2), raw, 2, "w")
    assert np.array_equal(raw, tuned) and compress(base, base, 2).size == 0


def lying_sizes(document, header, data):
    begin, end = header["sizes:t300x257.weight"]["data_offsets"]
    sizes = np.frombuffer(data[begin:end], "<u2") + np.array([1, -1], np.int16).astype(np.uint16)
    return data[:begin] + sizes.tobytes() + data[end:]


def bomb(document, header, data):
    """The second frame of a tensor of two becomes one that would inflate to 100 MB, with a size that fits."""
    begin, end = header["sizes:t300x257.weight"]["data_offsets"]
    sizes = np.frombuffer(data[begin:end], "<u2")
    first, last = header["frames:t300x257.weight"]["data_offsets"]
    frame = (b"\x01" + zstandard.compress(b"\0" * 10**8)).ljust(int(sizes[1]), b"\0")[: sizes[1]]
    return data[: first + sizes[0]] + frame + data[last:]


def steps(document, header, data):
    """The second frame holds as many steps apart as no leaf of its size has."""
    first, _ = header["frames:t300x257.weight"]["data_offsets"]
    place = first + int(np.frombuffer(data[slice(*header["sizes:t300x257.weight"]["data_offsets"])], "<u2")[0])
    return data[:place] + b"\4\xff\xff" + data[place + 3 :]


def other_steps(document, header, data):
    """The same with one step less than its bytes speak of."""
    first, _ = header["frames:t300x257.weight"]["data_offsets"]
    place = first + int(np.frombuffer(data[slice(*header["sizes:t300x257.weight"]["data_offsets"])], "<u2")[0])
    number = int.from_bytes(data[place + 1 : place + 3], "little") - 1
    frame = data[place : place + 1] + number.to_bytes(2, "little") + data[place + 5 :]
    sizes = bytearray(data[slice(*header["sizes:t300x257.weight"]["data_offsets"])])
    sizes[2:4] = (int.from_bytes(sizes[2:4], "little") - 2).to_bytes(2, "little")
    header["frames:t300x257.weight"]["shape"][0] -= 2
    begin = header["sizes:t300x257.weight"]["data_offsets"][0]
    data = data[:begin] + bytes(sizes) + data[begin + len(sizes) : place] + frame
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [at - 2 * (at > place) for at in entry["data_offsets"]]
    return data


def no_frame(document, header, data):
    first, _ = header["frames:t300x257.weight"]["data_offsets"]
    return data[:first] + b"\x07" + data[first + 1 :]


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lying_sizes, "frame"),
        (bomb, "frame of 100,000,000 bytes, expected at most"),
        (no_frame, "frame of kind 7"),
        (steps, "frame whose steps do not fit together"),
        (other_steps, "frame whose steps do not fit together"),
    ],
)
def test_hostile_frames_of_values(tmp_path, bits, change, words):
    if change in (steps, other_steps) and bits < 16:
        words = "frame of kind 4" if change is steps else "frame"
    sizes(tmp_path, shapes=((300, 257),))
    pack(tmp_path, bits=bits, codec="zstd")
    rewrite(tmp_path / "m.safetensors", change)
    with pytest.raises(CheckpointError, match=words), dk.open_pack(tmp_path / "m.safetensors") as found:
        raise CheckpointError("; ".join(fault.words for fault in found.verify().faults))
    with pytest.raises(DarekitError, match=words):
        dk.unpack(tmp_path / "base", tmp_path / "m.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- sizes


@pytest.mark.parametrize("rate", [0.9, 0.99])
@pytest.mark.parametrize("bits", [16, 8, 4, 2, 1])
def test_size_is_what_the_formula_says(tmp_path, bits, rate):
    sizes(tmp_path, shapes=((1500, 2000),))
    report = pack(tmp_path, drop_rate=rate, bits=bits, codec="none")
    header = 8 + int.from_bytes((tmp_path / "m.safetensors").read_bytes()[:8], "little")
    expected = report.kept * (bits + (16 / 64 if bits < 16 else 0)) / 8
    assert abs(report.bytes - header - expected) < 0.02 * expected
    assert (tmp_path / "m.safetensors").stat().st_size == report.bytes
    assert abs(report.kept - 3e6 * (1 - rate)) < 5 * math.sqrt(3e6 * rate * (1 - rate))


def test_a_codec_is_used_where_it_pays(tmp_path):
    """Values of 16 bits halve, codes lose a little, signs nothing; auto asks for a twentieth, zstd for anything."""
    sizes(tmp_path, shapes=((700, 1000), (3,)), spread=5e-4)
    found = {}
    for bits in (16, 8, 4, 2, 1):
        for codec in ("none", "auto", "zstd"):
            report = pack(tmp_path, f"{bits}{codec}.safetensors", bits=bits, codec=codec)
            with dk.open_pack(tmp_path / f"{bits}{codec}.safetensors", base=tmp_path / "base") as opened:
                used = opened.tensors["t700x1000.weight"].codec
                assert opened.tensors["t3.weight"].codec == "none" and not opened.verify().faults
                results = {name: tensor.result for name, tensor in opened.tensors.items()}
            found[bits, codec] = report.bytes, used, results
        assert found[bits, "none"][1] == "none"
        assert found[bits, "none"][2] == found[bits, "auto"][2] == found[bits, "zstd"][2]
        assert found[bits, "zstd"][0] <= found[bits, "auto"][0] <= found[bits, "none"][0]
    assert [found[bits, "auto"][1] for bits in (16, 8, 4, 2, 1)] == ["zstd"] * 4 + ["none"]
    assert found[16, "auto"][0] < 0.55 * found[16, "none"][0] and found[2, "auto"][0] < 0.9 * found[2, "none"][0]
    with pytest.raises(PlanError, match="expected auto, none or zstd"):
        pack(tmp_path, codec="lz4")


def test_what_did_not_change_costs_nothing(tmp_path):
    rng = np.random.default_rng(3)
    base, (tuned,) = oracle.family(rng, (2000, 64), "BF16", k=1)
    tuned[100:] = base[100:]
    families.save(tmp_path / "base", {"embed_tokens.weight": base, "w.weight": base})
    families.save(tmp_path / "m0", {"embed_tokens.weight": tuned, "w.weight": base})
    for rate in (0.0, 0.5):
        name = f"m{rate}.safetensors"
        pack(tmp_path, name, drop_rate=rate)
        with dk.open_pack(tmp_path / name, base=tmp_path / "base") as found:
            assert found.tensors["w.weight"].kind == "same"
            assert found.tensors["embed_tokens.weight"].kept <= 100 * 64
            assert not found.verify().faults
        dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / f"d{rate}", drop_rate=rate, seed=7, force=True)
        families.same(restored(tmp_path, name), families.load(tmp_path / f"d{rate}"))


# --- random access and use in place


def test_random_access_equals_the_whole(tmp_path):
    base, _ = sizes(tmp_path, shapes=((1000, 300), (5,)))
    for bits in (16, 4):
        pack(tmp_path, f"m{bits}.safetensors", bits=bits)
        with dk.open_pack(tmp_path / f"m{bits}.safetensors", base=tmp_path / "base") as found:
            whole = found.delta("t1000x300.weight")
            for rows in (slice(0, 1), slice(217, 220), slice(200, 700), slice(999, 1000), slice(3, 3), slice(-5, None)):
                assert np.array_equal(found.delta("t1000x300.weight", rows), whole[rows])
            out = restored(tmp_path, f"m{bits}.safetensors")["t1000x300.weight"]
            b = base["t1000x300.weight"]
            assert np.array_equal((b.astype(np.float32) + whole).astype(b.dtype), out)
            source = found.checkpoint().tensors["t1000x300.weight"].source
            for offset, count in ((0, 2), (131070, 4), (100_000, 300_000), (599_998, 2), (7 * 2, 1001 * 2)):
                raw = np.empty(count, np.uint8)
                source.read_into(raw, offset)
                assert raw.tobytes() == oracle.raw_of(out)[offset : offset + count].tobytes()
    with dk.open_pack(tmp_path / "m4.safetensors") as found:
        assert np.array_equal(found.delta("t1000x300.weight"), whole)
        with pytest.raises(PlanError, match="no tensor"):
            found.delta("nothing")
    with dk.open_pack(tmp_path / "m16.safetensors") as found, pytest.raises(PlanError, match="needs the base"):
        found.delta("t1000x300.weight")


@pytest.fixture(params=["host", "ranges", "cuda"])
def device(request, monkeypatch):
    """Where torch's tensors lie; "ranges": in the host's memory, but treated as a device's."""
    torch = pytest.importorskip("torch")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if request.param == "ranges":
        monkeypatch.setattr(weights, "on_host", lambda tensor: False)
    return "cuda" if request.param == "cuda" else "cpu"


def torch_tensor(array, device="cpu"):
    import torch

    return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device)


def numpy_array(tensor):
    import torch

    return tensor.detach().cpu().view(torch.int16).numpy().view(families.KINDS["BF16"]).copy()


@pytest.mark.parametrize("options", [{"bits": 16}, {"bits": 4}, {"bits": 16, "codec": "none"}, {"drop_rate": 0.0}])
def test_apply_in_place(tmp_path, options, device):
    base, _ = sizes(tmp_path)
    pack(tmp_path, **options)
    expected = restored(tmp_path)
    arrays = {name: array.copy() for name, array in base.items()}
    tensors = {name: torch_tensor(array, device) for name, array in base.items()}
    with dk.open_pack(tmp_path / "m.safetensors") as found:
        found.apply_(arrays)
        found.apply_(tensors)
        with pytest.raises(HomologyError, match=r"does not hold the values of base, .*Switcher"):
            found.apply_(arrays)  # on what is no longer the base
        with pytest.raises(HomologyError, match="no tensor"):
            found.apply_({})
        with pytest.raises(HomologyError, match="should be BF16"):
            found.apply_({name: array.astype(np.float32) for name, array in base.items()})
    families.same(arrays, expected)
    families.same({name: numpy_array(tensor) for name, tensor in tensors.items()}, expected)


def test_one_live_model_takes_pack_after_pack_and_returns_exactly(llamas, tmp_path, device):
    import torch

    base = llamas.path / "base"
    expected = {}
    for k, options in enumerate(({"drop_rate": 0.9}, {"drop_rate": 0.5, "bits": 4}, {"lossless": True})):
        dk.pack(base, llamas.path / f"m{k}", tmp_path / f"m{k}.safetensors", force=True, **options)
        dk.unpack(base, tmp_path / f"m{k}.safetensors", tmp_path / f"u{k}")
        expected[k] = families.load(tmp_path / f"u{k}")

    module = torch.nn.Module()
    for name, array in llamas.base.items():
        at = module
        *path, last = name.split(".")
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.register_parameter(last, torch.nn.Parameter(torch_tensor(array, device)))

    def values():
        return {name: numpy_array(tensor) for name, tensor in module.state_dict().items()}

    with dk.Switcher(module, base, threads=2) as switcher:
        for k in (0, 1, 2, 1, None, 2, 0):
            switcher.switch(None if k is None else tmp_path / f"m{k}.safetensors")
            families.same(values(), llamas.base if k is None else expected[k])
        assert switcher.current == tmp_path / "m0.safetensors"
        dk.pack(llamas.path / "m1", llamas.path / "m2", tmp_path / "other.safetensors", drop_rate=0.9)
        with pytest.raises(HomologyError, match="is not the base"):
            switcher.switch(tmp_path / "other.safetensors")
        families.same(values(), expected[0])

        def broken(document, header, data):
            document["seed"] += 1

        rewrite(tmp_path / "m1.safetensors", broken)
        with pytest.raises(CheckpointError, match="its mask keeps"):
            switcher.switch(tmp_path / "m1.safetensors")
        families.same(values(), llamas.base)
        switcher.switch(tmp_path / "m0.safetensors")
    families.same(values(), llamas.base)
    with pytest.raises(HomologyError, match="are not those of"):
        dk.Switcher(module, llamas.path / "m1")
    with pytest.raises(HomologyError, match="has no tensor"):
        dk.Switcher({}, base)


def test_a_switcher_refuses_weights_that_moved(llamas, tmp_path):
    base, path = llamas.path / "base", tmp_path / "m.safetensors"
    dk.pack(base, llamas.path / "m0", path, drop_rate=0.5, force=True)
    live = {name: array.copy() for name, array in llamas.base.items()}
    switcher = dk.Switcher(live, base)
    switcher.switch(path)
    kept, live["lm_head.weight"] = live["lm_head.weight"], live["lm_head.weight"].copy()
    for pack in (path, None):
        with pytest.raises(HomologyError, match=r"lm_head\.weight has moved in memory .* and then make a switcher"):
            switcher.switch(pack)
    live["lm_head.weight"] = kept
    switcher.switch(None)
    families.same(live, llamas.base)


def test_names_of_one_memory_are_refused(tmp_path, device):
    """A base that stores both, a model that ties them: it cannot become two tensors."""
    base, _ = sizes(tmp_path, shapes=((300, 257), (257, 300)))
    pack(tmp_path)
    live = {name: torch_tensor(array, device) for name, array in base.items()}
    first, second = live
    live[second] = live[first].view(257, 300)
    with dk.open_pack(tmp_path / "m.safetensors") as found:
        before = {name: numpy_array(tensor) for name, tensor in live.items()}
        with pytest.raises(HomologyError, match=rf"({first} and {second}|{second} and {first}) share memory"):
            found.apply_(live)
        families.same({name: numpy_array(tensor) for name, tensor in live.items()}, before)


def test_weights_of_every_mode_of_torch(llamas, tmp_path, device):
    """Servers run in inference mode, and may have another default device."""
    import torch

    base, path = llamas.path / "base", tmp_path / "m.safetensors"
    dk.pack(base, llamas.path / "m0", path, drop_rate=0.5, force=True)
    with torch.inference_mode():
        strict = {name: torch_tensor(array, device) for name, array in llamas.base.items()}
    plain = {name: torch_tensor(array, device) for name, array in llamas.base.items()}

    def there_and_back(live):
        with dk.Switcher(live, base, threads=2) as switcher:
            switcher.switch(path)
            found.append({name: numpy_array(tensor) for name, tensor in live.items()})
        families.same({name: numpy_array(tensor) for name, tensor in live.items()}, llamas.base)

    found = []
    for live in (strict, plain):
        there_and_back(live)
        with torch.inference_mode():
            there_and_back(live)
        with torch.device("meta"):
            there_and_back(live)
    for one in found[1:]:
        families.same(one, found[0])


def test_what_failed_before_is_what_is_told(llamas, tmp_path):
    live = {name: array.copy() for name, array in llamas.base.items()}
    with pytest.raises(KeyError, match="theirs") as caught, dk.Switcher(live, llamas.path / "base"):
        live["lm_head.weight"] = live["lm_head.weight"].copy()
        raise KeyError("theirs")
    assert "lm_head.weight has moved in memory" in caught.value.__notes__[0]


def test_weights_that_are_not_there_yet(llamas, tmp_path):
    torch = pytest.importorskip("torch")
    live = {name: torch_tensor(array) for name, array in llamas.base.items()}
    with pytest.raises(HomologyError, match=r"lm_head\.weight has no values yet .* device meta"):
        dk.Switcher(
            live | {"lm_head.weight": torch.empty_like(live["lm_head.weight"], device="meta")}, llamas.path / "base"
        )
    with pytest.raises(HomologyError, match=r"should be BF16 .* found torch\.float32 .*dtype=torch\.bfloat16$"):
        dk.Switcher({name: tensor.float() for name, tensor in live.items()}, llamas.path / "base")
    turned = live["lm_head.weight"].T.contiguous().T
    with pytest.raises(HomologyError, match=r"lm_head\.weight must be contiguous"):
        dk.Switcher(live | {"lm_head.weight": turned}, llamas.path / "base")


# --- packs where models go


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_merging_packs_equals_merging_what_they_unpack_to(llamas, tmp_path, bits, method):
    base = llamas.path / "base"
    for k in range(3):
        dk.pack(base, llamas.path / f"m{k}", tmp_path / f"m{k}.safetensors", drop_rate=0.8, bits=bits)
        dk.unpack(base, tmp_path / f"m{k}.safetensors", tmp_path / f"m{k}")
    outputs = []
    for suffix in (".safetensors", ""):
        recipe = {
            "base_model": str(base),
            "models": [{"model": str(tmp_path / f"m{k}{suffix}")} for k in range(3)],
            "sparsify": {"method": "magnitude", "drop_rate": 0.5},
            "merge_method": method,
        }
        dk.merge(recipe, tmp_path / f"out{suffix}", force=True)
        outputs.append(families.load(tmp_path / f"out{suffix}"))
    families.same(*outputs)
    assert not np.array_equal(outputs[0]["lm_head.weight"], llamas.base["lm_head.weight"])


@pytest.mark.parametrize(("dtype", "keep"), [("BF16", 0.9), ("BF16", 0.0), ("F16", 0.9)])
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_any_range_of_a_bound_pack_is_that_range_of_the_result(tmp_path, dtype, keep, codec):
    """More leaves than one call takes, ranges that begin and end within leaves, and buffers that are not aligned."""
    count = (READ_LEAVES + 1) * LEAF + 333
    sizes(tmp_path, dtype, shapes=[(count,)])
    pack(tmp_path, drop_rate=keep, codec=codec, bits=16)
    whole = restored(tmp_path)[f"t{count}.weight"].reshape(-1).view(np.uint8)
    with dk.open_pack(tmp_path / "m.safetensors", base=tmp_path / "base") as found:
        source = found.checkpoint().tensors[f"t{count}.weight"].source
        leaf = 2 * LEAF
        for begin, end in (
            (0, whole.size),
            (0, 2 * leaf),
            (3, leaf + 5),
            (leaf, whole.size - 1),
            (16 * leaf, whole.size),
        ):
            for shift in (0, 1):
                buffer = np.empty(end - begin + shift, np.uint8)[shift:]
                source.read_into(buffer, begin)
                assert np.array_equal(buffer, whole[begin:end])
        with pytest.raises(ValueError, match="outside"):
            source.read_into(np.empty(2, np.uint8), whole.size - 1)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("harm", ["none", "flipped", "cut", "no frame", "larger", "empty"])
def test_frames_that_are_read_together_are_read_as_one_by_one(monkeypatch, together, harm):
    rng = np.random.default_rng(0)
    contents = [bytes(rng.integers(0, 7, 1000 + 100 * i, np.uint8)) for i in range(5)]
    sizes = [len(content) for content in contents]
    codec = zstandard.ZstdCompressor(write_checksum=True)
    frames = [bytearray(codec.compress(content)) for content in contents]
    if harm == "flipped":
        frames[3][-1] ^= 1
    elif harm == "cut":
        del frames[3][-20:]
    elif harm == "no frame":
        frames[3][:4] = b"none"
    elif harm == "larger":
        frames[3] = bytearray(codec.compress(bytes(1 << 30)))
    elif harm == "empty":
        frames[3].clear()
    if not together:  # as where zstandard has no such call
        decoder = zstandard.ZstdDecompressor()
        alone = SimpleNamespace(codec=SimpleNamespace(decompress=decoder.decompress))
        monkeypatch.setattr(lossless, "_DECOMPRESSOR", alone)
    given = [memoryview(frame) for frame in frames]
    if harm == "none":
        assert [bytes(found) for found in inflate_all(given, sizes, "w")] == contents
        assert list(inflate_all([], [], "w")) == []
        with pytest.raises(CheckpointError, match="tensor w: a frame of 1,300 bytes"):
            inflate_all(given, [*sizes[:3], sizes[3] - 1, sizes[4]], "w")
        with pytest.raises(CheckpointError, match="tensor w: a frame of 1,300 bytes for 1,301"):
            inflate_all(given, [*sizes[:3], sizes[3] + 1, sizes[4]], "w")
    else:
        with pytest.raises(CheckpointError, match="tensor w: a frame"):
            inflate_all(given, sizes, "w")


def test_the_digest_of_what_is_unpacked_is_taken_of_every_tensor(tmp_path):
    """Input and output of a copy have one digest, and it is the file's."""
    sizes(tmp_path, shapes=SHAPES[1:])
    pack(tmp_path)
    found = restored(tmp_path)
    lock = json.loads((tmp_path / "m.safetensors.unpacked/darekit.lock.json").read_text())
    entries = [
        (name, "BF16", array.shape, tensor_digest(leaf_digests(array.tobytes()))) for name, array in found.items()
    ]
    assert lock["output"]["content_digest"] == lock["inputs"][0]["content_digest"] == checkpoint_digest(entries)


def test_a_recipe_finds_packs_beside_itself_and_inspect_takes_them(llamas, tmp_path, dare):
    base = llamas.path / "base"
    dk.pack(base, llamas.path / "m0", tmp_path / "m0.pack.safetensors", drop_rate=0.5)
    (tmp_path / "r.yaml").write_text(
        f"base_model: {base}\nmodels:\n- model: m0.pack.safetensors\nmerge_method: task_arithmetic\n"
    )
    assert dare("merge", tmp_path / "r.yaml", tmp_path / "out").code == 0
    with dk.open_pack(tmp_path / "m0.pack.safetensors", base=base) as found:
        expected = dict(llamas.base)
        found.apply_(expected := {name: array.copy() for name, array in expected.items()})
    families.same(families.load(tmp_path / "out"), expected)
    assert 0.4 < dk.inspect(base, tmp_path / "m0.pack.safetensors").total.zeros < 0.6


@pytest.mark.parametrize("bits", [16, 4])
def test_live_weights_never_meet_a_damaged_pack(llamas, tmp_path, bits):
    """A value that merely differs would go unseen by decoding; a pack that was sound once is looked at again when it
    changed."""
    base, whole, damaged = llamas.path / "base", tmp_path / "whole.safetensors", tmp_path / "damaged.safetensors"
    for path in (whole, damaged):
        dk.pack(base, llamas.path / "m0", path, drop_rate=0.5, bits=bits, seed=3, codec="none")
    live = {name: array.copy() for name, array in llamas.base.items()}
    with dk.Switcher(live, base) as switcher:
        switcher.switch(damaged)
        switcher.switch(whole)
        packed = {name: array.copy() for name, array in live.items()}
        families.damage(damaged, "values:lm_head.weight")
        with pytest.raises(CheckpointError, match=r"damaged\.safetensors, tensor lm_head\.weight: .* is damaged"):
            switcher.switch(damaged)
        families.same(live, packed)
    families.same(live, llamas.base)
    with (
        dk.open_pack(damaged, base=base) as found,
        pytest.raises(CheckpointError, match=r"lm_head\.weight: .* damaged"),
    ):
        found.apply_(live)
    families.same(live, llamas.base)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_no_merge_of_a_damaged_pack_is_published(llamas, tmp_path, codec):
    """With a frame that cannot be decoded it stops at once; a value that merely differs is found by its digest."""
    base = llamas.path / "base"
    for k in range(2):
        dk.pack(base, llamas.path / f"m{k}", tmp_path / f"m{k}.safetensors", drop_rate=0.5, seed=k, codec=codec)
    models = [str(tmp_path / f"m{k}.safetensors") for k in range(2)]
    recipe = {"base_model": str(base), "models": models, "merge_method": "task_arithmetic"}
    dk.merge(recipe, tmp_path / "whole")
    part, at = ("values", -2) if codec == "none" else ("frames", 0)
    families.damage(tmp_path / "m1.safetensors", f"{part}:lm_head.weight", at)
    with pytest.raises((CheckpointError, DataError), match=r"(?s)m1\.safetensors: .*damaged") as caught:
        dk.merge(recipe, tmp_path / "out")
    assert ("nothing was published" in str(caught.value)) == (codec == "none")
    assert "m0.safetensors" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name and path.is_dir() and codec == "none"]


def test_packs_with_one_seed_are_warned_of(llamas, tmp_path):
    base = llamas.path / "base"
    for k, seed in enumerate((5, 5, 6)):
        dk.pack(base, llamas.path / f"m{k}", tmp_path / f"m{k}.safetensors", drop_rate=0.8, seed=seed)

    def notes(*names, **keys):
        models = [{"model": str(tmp_path / f"{name}.safetensors")} for name in names]
        return [
            note
            for note in dk.plan({"base_model": str(base), "models": models, "merge_method": "linear", **keys}).notes
            if "same effective seed" in note
        ]

    (note,) = notes("m0", "m1", "m2")
    assert note.startswith("m0.safetensors and m1.safetensors have the same effective seed 5")
    assert not notes("m0", "m2")


def test_a_pack_is_no_base(llamas, tmp_path):
    dk.pack(llamas.path / "base", llamas.path / "m0", tmp_path / "m.safetensors", drop_rate=0.5)
    with pytest.raises(Unsupported, match=r"m\.safetensors is a darekit pack"):
        dk.inspect(tmp_path / "m.safetensors", llamas.path / "m1")


def test_a_pack_without_a_base_is_refused(llamas, tmp_path):
    dk.pack(llamas.path / "base", llamas.path / "m0", tmp_path / "m.safetensors", drop_rate=0.5)
    recipe = {"models": [{"model": str(tmp_path / "m.safetensors")}], "merge_method": "linear"}
    with pytest.raises(PlanError, match="can only be used with its base"):
        dk.merge(recipe, tmp_path / "out")


# --- what is wrong is found


def test_another_base_is_refused_by_name(llamas, tmp_path):
    dk.pack(llamas.path / "base", llamas.path / "m0", tmp_path / "m.safetensors", drop_rate=0.9)
    for action in (
        lambda: dk.unpack(llamas.path / "m1", tmp_path / "m.safetensors", tmp_path / "out"),
        lambda: dk.open_pack(tmp_path / "m.safetensors", base=llamas.path / "m1"),
    ):
        with pytest.raises(HomologyError, match=r"m1 is not the base of .*m\.safetensors.*packed against base"):
            action()
    assert not (tmp_path / "out").exists()


def test_a_base_that_differs_behind_the_sample_is_named(tmp_path):
    base, _ = sizes(tmp_path)
    pack(tmp_path)
    base["t300x257.weight"][299, 256] += 1  # beyond the sampled bytes, and dropped or not: some result changes
    families.save(tmp_path / "base", base)
    with dk.open_pack(tmp_path / "m.safetensors", base=tmp_path / "base") as found:
        (fault,) = found.verify().faults
    assert fault.tensor == "t300x257.weight" and "not the tensor that was packed against" in fault.words
    with pytest.raises(DataError, match=r"t300x257.weight of .*base is not the tensor"):
        dk.unpack(tmp_path / "base", tmp_path / "m.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(("bits", "codec"), [(16, "none"), (4, "none"), (16, "zstd"), (4, "zstd"), (0, "lossless")])
def test_a_flipped_bit_in_any_region_is_found(tmp_path, bits, codec):
    rng = np.random.default_rng(4)
    base, (tuned,) = oracle.family(rng, (400, 300), "BF16", k=1)
    tuned[:200] = base[:200]
    config = {"hidden_size": 300}
    families.save(tmp_path / "base", {"embed.weight": base, "w.weight": base}, config)
    families.save(tmp_path / "m0", {"embed.weight": tuned, "w.weight": base + tuned}, config | {"vocab_size": 400})
    lossless = codec == "lossless"
    pack(tmp_path, **({"lossless": True, "drop_rate": None} if lossless else {"bits": bits, "codec": codec}))
    whole = (tmp_path / "m.safetensors").read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:size])
    parts = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    wanted = {"leaves", "rows", "file"} | ({"scales"} if bits == 4 else set())
    wanted |= {"values"} if codec == "none" else {"frames", "sizes"}
    wanted -= {"rows", "sizes"} if lossless else set()
    assert {name.split(":")[0] for name in parts} - ({"values"} if codec == "zstd" else set()) == wanted
    places = [*range(0, 8), *rng.integers(8, size, 60), size - 1]
    places += [size + at for begin, end in parts.values() for at in (begin, (begin + end) // 2, end - 1)]
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << rng.integers(8)
        (tmp_path / "b.safetensors").write_bytes(broken)
        for where in (None, tmp_path / "base"):
            try:
                with dk.open_pack(tmp_path / "b.safetensors", base=where) as found:
                    assert found.verify().faults, place
            except DarekitError:
                pass
    (tmp_path / "b.safetensors").write_bytes(whole)
    with dk.open_pack(tmp_path / "b.safetensors", base=tmp_path / "base") as found:
        assert not found.verify().faults


def test_nan_in_a_kept_element_is_refused(tmp_path):
    _, tuned = sizes(tmp_path)
    tuned["t300x257.weight"][:] = np.nan
    families.save(tmp_path / "m0", tuned)
    with pytest.raises(DataError, match=r"t300x257.weight .*NaN or Inf"):
        pack(tmp_path)
    assert not list(tmp_path.glob("*m.safetensors*"))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("who", ["model", "base"])
def test_nan_in_a_dropped_element_is_refused(tmp_path, dtype, who):
    base, tuned = sizes(tmp_path, dtype)
    keeps = masks.kept(7, masks.stream_of("t300x257.weight"), 0, 300 * 257, 0.9)
    (tuned if who == "model" else base)["t300x257.weight"].flat[np.flatnonzero(~keeps)[77]] = np.inf
    families.save(tmp_path / "base", base)
    families.save(tmp_path / "m0", tuned)
    with pytest.raises(DataError, match=r"t300x257.weight has 1 .*NaN or Inf"):
        pack(tmp_path)
    assert not list(tmp_path.glob("*m.safetensors*"))


def test_a_killed_pack_leaves_nothing_visible(tmp_path, monkeypatch):
    sizes(tmp_path)
    pack(tmp_path, "whole.safetensors")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_publish", die)
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path)
    assert not list(tmp_path.glob("*m.safetensors*")) and not list(tmp_path.glob(".m*"))
    monkeypatch.undo()
    (tmp_path / ".m.safetensors.darekit-part").write_bytes(b"x" * (tmp_path / "whole.safetensors").stat().st_size)
    pack(tmp_path)
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_a_run_that_is_shot_leaves_nothing_visible_and_can_be_repeated(tmp_path, command):
    import signal
    import subprocess
    import sys
    import time

    sizes(tmp_path, shapes=((3000, 1000),))
    pack(tmp_path, "whole.safetensors")
    out = tmp_path / ("m.safetensors" if command == "pack" else "out")
    inputs = ("base", "m0") if command == "pack" else ("base", "whole.safetensors")
    options = ", drop_rate=0.9, seed=7, force=True" if command == "pack" else ""
    code = f"""
import sys, time
import darekit as dk
from darekit.checkpoints import OutputFile
def slow(self, buffer, offset, write=OutputFile.write):
    write(self, buffer, offset)
    print("written", flush=True)
    time.sleep(0.5)
OutputFile.write = slow
dk.{command}({str(tmp_path / inputs[0])!r}, {str(tmp_path / inputs[1])!r}, {str(out)!r}{options})
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"written\n"
        time.sleep(0.1)
        child.send_signal(signal.SIGKILL)
    names = {path.name for path in tmp_path.iterdir()}
    assert not out.exists() and any(name.startswith(f".{out.name}.darekit-") for name in names)
    if command == "pack":
        pack(tmp_path)
        assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    else:
        dk.unpack(tmp_path / "base", tmp_path / "whole.safetensors", out, resume=True)
        dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "dropped", drop_rate=0.9, seed=7, force=True)
        families.same(families.load(out), families.load(tmp_path / "dropped"))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("lossless", [False, True])
def test_two_runs_do_not_write_one_file(tmp_path, monkeypatch, lossless):
    sizes(tmp_path)
    options = {"lossless": True, "drop_rate": None} if lossless else {}
    publish = writing._publish

    def meanwhile(*arguments):
        with pytest.raises(OutputError, match="another run is writing"):
            pack(tmp_path, **options)
        publish(*arguments)

    monkeypatch.setattr(writing, "_publish", meanwhile)
    pack(tmp_path, **options)
    with dk.open_pack(tmp_path / "m.safetensors", base=tmp_path / "base") as found:
        assert not found.verify().faults
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_outputs_that_are_refused(tmp_path):
    sizes(tmp_path)
    for name, words in (("m.bin", "must end in"), ("none/m.safetensors", "no directory"), ("base", "must end in")):
        with pytest.raises(OutputError, match=words):
            pack(tmp_path, name)
    pack(tmp_path)
    with pytest.raises(OutputError, match="exists"):
        pack(tmp_path)
    pack(tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="one of the inputs"):
        pack(tmp_path, "base/model.safetensors", overwrite=True)


def test_threads_do_not_matter(tmp_path):
    sizes(tmp_path, shapes=((1300, 1300), (64,)))
    pack(tmp_path, threads=1)
    pack(tmp_path, "n.safetensors", threads=5)
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "n.safetensors").read_bytes()


# --- hostile files


def rewrite(path: Path, change):
    """A pack whose document and header are changed, with a header digest that fits again."""
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:size])
    document = json.loads(header["__metadata__"]["darekit_pack"])
    data = change(document, header, whole[size:])
    header["__metadata__"]["darekit_pack"] = json.dumps(document)
    header["__metadata__"]["darekit_header_digest"] = "0" * 32
    text = json.dumps(header).encode()
    text = text.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(text).encode(), 1)
    path.write_bytes(len(text).to_bytes(8, "little") + text + (whole[size:] if data is None else data))


def tensor(**changes):
    return lambda document, header, data: document["tensors"]["t300x257.weight"].update(changes)


def top(**changes):
    return lambda document, header, data: document.update(changes)


def part(name, **changes):
    return lambda document, header, data: header[name].update(changes)


def nan_scales(document, header, data):
    begin, _ = header["scales:t300x257.weight"]["data_offsets"]
    return data[:begin] + b"\xc0\x7f" + data[begin + 2 :]


def lying_counts(document, header, data):
    begin, end = header["leaves:t300x257.weight"]["data_offsets"]
    kind = {"I8": "i1", "U16": "<u2"}[header["leaves:t300x257.weight"]["dtype"]]
    counts = np.frombuffer(data[begin:end], kind).astype(int) + np.array([16, -16])  # as many bytes and scales
    return data[:begin] + counts.astype(kind).tobytes() + data[end:]


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (top(version=2), Unsupported, "pack version 2"),
        (top(version=True), Unsupported, "pack version true"),
        (top(mask="philox/9"), Unsupported, "pack mask"),
        (top(format="other"), Unsupported, "pack format"),
        (top(seed=-1), CheckpointError, "seed"),
        (top(seed=1 << 64), CheckpointError, "seed"),
        (top(rescale="l1"), Unsupported, "rescale"),
        (top(tensors=[]), CheckpointError, "tensors"),
        (top(files=[{"name": "../x", "stored": True, "digest": "0" * 32}]), CheckpointError, "plain file name"),
        (top(files=[{"name": "x.json", "stored": True, "digest": "0" * 32}]), CheckpointError, "is missing"),
        (tensor(kind="new"), Unsupported, "kind"),
        (tensor(encoding="int3"), Unsupported, "encoding"),
        (tensor(dtype="F4"), Unsupported, "number format"),
        (tensor(dtype="I64"), CheckpointError, "not a floating-point"),
        (tensor(shape=[-300, 257]), CheckpointError, "shape"),
        (tensor(shape=[1 << 40, 1 << 40]), CheckpointError, "more elements"),
        (tensor(shape=[1 << 40]), CheckpointError, "leaves"),
        (tensor(shape=[257, 300]), HomologyError, r"should be BF16 \[257, 300\]"),
        (tensor(shape=[300, 258]), CheckpointError, "document says"),
        (tensor(drop_rate=-0.1), CheckpointError, "drop rate"),
        (tensor(drop_rate=0.5), CheckpointError, "document says|mask keeps"),
        (top(seed=8), CheckpointError, "mask keeps"),
        (tensor(codec="lz4"), Unsupported, "codec"),
        (tensor(codec="zstd"), CheckpointError, "does not allow"),
        (tensor(codec="zstd", values="U8"), CheckpointError, "has the parts"),
        (tensor(values="U8"), CheckpointError, "does not allow"),
        (tensor(values=[]), CheckpointError, "does not allow"),
        (tensor(drop_rate="x"), CheckpointError, "drop rate"),
        (tensor(group=0), CheckpointError, "group 0"),
        (tensor(group=32), CheckpointError, "scales take"),
        (tensor(kept=5), CheckpointError, "document says 5"),
        (tensor(kept=1 << 50), CheckpointError, "kept elements"),
        (tensor(result="zz"), CheckpointError, "hexadecimal"),
        (tensor(kind="same"), CheckpointError, "has the parts"),
        (lambda d, h, x: d["tensors"].pop("t300x257.weight"), CheckpointError, "belongs to no tensor"),
        (lambda d, h, x: d["tensors"].update({"more": d["tensors"]["t300x257.weight"]}), CheckpointError, "parts"),
        (part("scales:t300x257.weight", dtype="F16"), CheckpointError, "role does not allow"),
        (nan_scales, CheckpointError, "NaN or Inf"),
        (lying_counts, CheckpointError, "its mask keeps"),
    ],
)  # fmt: skip
def test_hostile_packs_get_a_named_error(tmp_path, change, kind, words):
    sizes(tmp_path)
    pack(tmp_path, bits=4, codec="none")

    def altered(document, header, data):
        found = change(document, header, data)
        return found if isinstance(found, bytes) else None

    rewrite(tmp_path / "m.safetensors", altered)
    with pytest.raises(kind, match=words), dk.open_pack(tmp_path / "m.safetensors", base=tmp_path / "base") as found:
        faults = found.verify().faults
        raise CheckpointError("; ".join(fault.words for fault in faults))
    with pytest.raises(DarekitError, match=words):
        dk.unpack(tmp_path / "base", tmp_path / "m.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, None), ({"drop_rate": 0.0}, 1 << 47), ({"drop_rate": 0.0, "codec": "zstd", "bits": 16}, 1 << 47)],
)
def test_a_shape_that_the_file_cannot_hold_costs_no_memory(tmp_path, settings, kept):
    """2^47 elements have 2^31 leaves: 17 GB of counts, for a file of some kB."""
    sizes(tmp_path)
    pack(tmp_path, **{"bits": 4, "codec": "none", **settings})
    rewrite(tmp_path / "m.safetensors", tensor(shape=[1 << 47], **({} if kept is None else {"kept": kept})))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"leaves, but its shape has|but the file has"):
            dk.open_pack(tmp_path / "m.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


VALUES = (None, True, -1, 0, 1, 1 << 31, 1 << 63, 1 << 70, 1e308, "", "x", "0" * 32, [], {}, [1], "F64", "U8", "int8",
          "exact", "delta", "lossless", "same", 0.5)  # fmt: skip


def mutated(rng, value):
    """A JSON value with one thing in it removed or replaced."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[rng.integers(len(keys))]
        if rng.random() < 0.15:
            del value[key]
        else:
            value[key] = mutated(rng, value[key])
        return value
    return VALUES[rng.integers(len(VALUES))]


@pytest.mark.parametrize("seed", range(4))
def test_no_document_causes_anything_but_a_named_error(tmp_path, seed):
    rng = np.random.default_rng(seed)
    families.save(tmp_path / "base", base_of())
    for _ in range(60):
        names = ("exact", "int4", "lossless", "rounded", "zstd-exact", "zstd-int4")
        name = names[rng.integers(len(names))]
        (tmp_path / "m.safetensors").write_bytes((GOLDEN / f"{name}.safetensors").read_bytes())

        def change(document, header, data):
            mutated(rng, document if rng.random() < 0.8 else header)

        try:
            rewrite(tmp_path / "m.safetensors", change)
        except (KeyError, TypeError):  # it is the metadata that was lost
            continue
        where = tmp_path / "base"
        with contextlib.suppress(DarekitError), dk.open_pack(tmp_path / "m.safetensors", base=where) as found:
            found.info()
            found.verify(threads=1)
            found.checkpoint()


def test_other_safetensors_files_are_no_packs(llamas, tmp_path):
    with pytest.raises(CheckpointError, match="not a pack"):
        dk.open_pack(llamas.path / "base/model.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError):
        dk.open_pack(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        dk.open_pack(tmp_path / "none.safetensors")


def test_a_large_integer_tensor_is_copied_once(tmp_path, monkeypatch):
    from darekit.engine import execution

    monkeypatch.setattr(execution, "SPAN", 65536)
    numbers = np.arange(200_000, dtype=np.int64)
    families.save(tmp_path / "base", {"n": numbers, "w": np.ones(3, np.float32)})
    families.save(tmp_path / "m0", {"n": numbers, "w": np.full(3, 1.1, np.float32)})
    dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "out", drop_rate=1.0, threads=3, force=True)
    families.same(families.load(tmp_path / "out"), families.load(tmp_path / "base"))
    lock = json.loads((tmp_path / "out/darekit.lock.json").read_text())
    assert lock["output"]["content_digest"] == lock["inputs"][0]["content_digest"]


# --- the command


def test_the_command_packs_shows_verifies_and_unpacks(llamas, tmp_path, dare):
    base, out = llamas.path / "base", tmp_path / "m.pack.safetensors"
    found = dare("pack", base, llamas.path / "m0", out, "-p", "0.9", "--bits", "4", "--json")
    assert found.code == 0 and found.data["bytes"] == out.stat().st_size and found.data["ratio"] > 1
    shown = dare("info", out)
    assert shown.code == 0 and "int4" in shown.out and "drop_rate 0.9" in shown.out and "base" in shown.out
    assert dare("info", out, "--json").data["seed"] == found.data["seed"]
    for arguments in ((out,), (out, base)):
        assert dare("verify", *arguments).code == 0
        assert dare("verify", *arguments, "--json").data["ok"]
    wrong = dare("verify", out, llamas.path / "m1")
    assert wrong.code == 1 and "is not the base of" in wrong.err
    assert dare("unpack", base, out, tmp_path / "out").code == 0
    broken = bytearray(out.read_bytes())
    broken[-1] ^= 1
    out.write_bytes(broken)
    found = dare("verify", out)
    assert found.code == 1 and "tensor" in found.err + found.out
    for arguments in (("-p", "9"), ("-p", "0.9", "--bits", "3")):
        assert dare("pack", base, llamas.path / "m0", tmp_path / "x.safetensors", *arguments).code == 2


def test_a_packs_companions_are_carried_and_need_no_directory(real, tmp_path):
    base = families.copy(real.path / "base", tmp_path / "base")
    tuned = families.copy(real.path / "m0", tmp_path / "m0")
    (tuned / "generation_config.json").write_text('{"max_new_tokens": 3}')
    dk.pack(base, tuned, tmp_path / "m.safetensors", drop_rate=0.9, bits=32)
    opened = open_checkpoint(base)
    with dk.open_pack(tmp_path / "m.safetensors", base=opened) as found:
        model = found.checkpoint()
        assert model.directory is None and model.config["model_type"] == opened.config["model_type"]
        assert model.companions["tokenizer.json"] == base / "tokenizer.json", "shared with the base, not stored"
        assert model.companions["generation_config.json"] == b'{"max_new_tokens": 3}'
        (base / "tokenizer.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"tokenizer\.json of .*base is not the file that was packed"):
            found.checkpoint()
    opened.close()
