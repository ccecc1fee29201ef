# SPDX-License-Identifier: Apache-2.0
"""The second reader of packs: plain numpy, from docs/pack-format.md alone; nothing of darekit takes part.

`restore(pack, base)`: path of a pack, name -> (dtype, raw bytes) of its base -> name -> raw bytes of the result.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import zstandard

LEAF = 65536
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "U16": 2, "U32": 4}
M = np.uint64(0xFFFFFFFF), np.uint64(32)


def open_file(path):
    """Document and parts."""
    raw = Path(path).read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:size])
    document = json.loads(header.pop("__metadata__")["darekit_pack"])
    assert (document["format"], document["version"], document["mask"]) == ("darekit-pack", 1, "philox4x32-10/1")
    parts = {n: (e["dtype"], raw[size + e["data_offsets"][0] : size + e["data_offsets"][1]]) for n, e in header.items()}
    return document, parts


def draws(seed, name, start, count):
    """Draws of elements start .. start + count; start is a multiple of 1024."""
    stream = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    blocks = -(-count // 1024)
    t = np.arange(start // 4, start // 4 + blocks * 256, dtype=np.uint64)
    c = [t & M[0], t >> M[1], np.full_like(t, stream & 0xFFFFFFFF), np.full_like(t, stream >> 32)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> M[1]) ^ c[1] ^ np.uint64(k0), b & M[0], (a >> M[1]) ^ c[3] ^ np.uint64(k1), a & M[0]]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([w.reshape(blocks, 256) for w in c], axis=1).reshape(-1)[:count]


def widen(dtype, raw, number):
    """Raw bytes -> numbers; exact."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).astype(number)
    return np.frombuffer(raw, f"<f{SIZES[dtype]}").astype(number)


def narrow(dtype, values):
    """Numbers -> raw bytes as unsigned words; to nearest even."""
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")
    return values.astype(f"<f{SIZES[dtype]}").view(f"<u{SIZES[dtype]}")


def in_order(words):
    """Bits of floats as places among all numbers of their format, and back."""
    top = words.dtype.type(1 << (8 * words.itemsize - 1))
    return np.where(words & top, words ^ (top - words.dtype.type(1)), words)


def take_steps(origin, steps):
    """Bits of the base's elements and steps from them, words of the same size -> bits."""
    one = steps.dtype.type(1)
    return in_order(in_order(origin) + np.where(steps & one, ~(steps >> one), steps >> one))


def narrow_steps(frame):
    """Of a frame of kind 4: steps, in 16 bits."""
    many = int.from_bytes(frame[1:3], "little")
    body = zstandard.ZstdDecompressor().decompress(frame[3 + 2 * many :], max_output_size=LEAF)
    steps = np.frombuffer(body, np.uint8).astype("<u2")
    steps[steps == 255] = np.frombuffer(frame[3 : 3 + 2 * many], "<u2")
    return steps


def read_values(parts, name, tensor, leaf, sizes, itemsize, origin=b""):
    """The bytes of one leaf's values; `sizes`: of all leaves', `origin`: the base's elements at their places."""
    if "codec" not in tensor:
        return parts[f"values:{name}"][1][sum(sizes[:leaf]) :][: sizes[leaf]]
    assert tensor["codec"] == "zstd"
    dtype, raw = parts[f"sizes:{name}"]
    lengths = np.frombuffer(raw, f"<u{SIZES[dtype]}").astype(int)
    frame = parts[f"frames:{name}"][1][lengths[:leaf].sum() :][: lengths[leaf]]
    if not frame or frame[0] == 0:
        return frame[1:]
    word = f"<u{itemsize}"
    if frame[0] == 4:
        return take_steps(np.frombuffer(origin, word), narrow_steps(frame)).tobytes()
    body = zstandard.ZstdDecompressor().decompress(frame[1:], max_output_size=sizes[leaf])
    values = np.frombuffer(body, np.uint8).reshape(itemsize, -1).T.tobytes()
    assert frame[0] in (1, 2, 3)
    if frame[0] == 3:
        return take_steps(np.frombuffer(origin, word), np.frombuffer(values, word)).tobytes()
    return values if frame[0] == 1 else bytes(a ^ b for a, b in zip(values, origin, strict=True))


def delta_leaf(document, parts, name, tensor, leaf, base):
    """One leaf of the base, raw -> of the result, raw."""
    size, count = SIZES[tensor["dtype"]], len(base) // SIZES[tensor["dtype"]]
    kept = draws(document["seed"], name, leaf * LEAF, count) >= np.uint64(round(tensor["drop_rate"] * 2**32))
    if f"rows:{name}" in parts:
        bits = np.unpackbits(np.frombuffer(parts[f"rows:{name}"][1], np.uint8), bitorder="little")
        kept &= bits[(leaf * LEAF + np.arange(count)) // max(1, math.prod(tensor["shape"][1:]))] == 1
    counts = [min(LEAF, math.prod(tensor["shape"]) - i * LEAF) for i in range(leaf + 1)]
    if f"leaves:{name}" in parts:
        dtype, raw = parts[f"leaves:{name}"]
        found = np.frombuffer(raw, "i1" if dtype == "I8" else f"<u{SIZES[dtype]}").astype(int).tolist()
        threshold = round(tensor["drop_rate"] * 2**32)
        average = [
            min(LEAF, math.prod(tensor["shape"]) - i * LEAF) * (2**32 - threshold) >> 32 for i in range(len(found))
        ]
        counts = [n + a for n, a in zip(found, average, strict=True)] if dtype == "I8" else found
    assert counts[leaf] == np.count_nonzero(kept)
    k = counts[leaf]
    stored = tensor["values"] if "codec" in tensor else parts[f"values:{name}"][0]
    number = np.float64 if "F64" in (tensor["dtype"], stored) else np.float32
    words = np.frombuffer(base, f"<u{size}").copy()
    origin = widen(tensor["dtype"], words[kept].tobytes(), number)
    if tensor["encoding"].startswith("int"):
        bits, group = int(tensor["encoding"][3:]), tensor["group"]
        packed = np.frombuffer(read_values(parts, name, tensor, leaf, [-(-n * bits // 8) for n in counts], 1), np.uint8)
        codes = np.unpackbits(packed, bitorder="little")[: k * bits].reshape(k, bits) @ (1 << np.arange(bits))
        q = 2 * codes - 1 if bits == 1 else codes - (1 << (bits - 1))
        groups = [min(n, max(1, (2 * n + group) // (2 * group))) for n in counts]
        scales = widen("BF16", parts[f"scales:{name}"][1], np.float32)[sum(groups[:leaf]) :][: groups[leaf]]
        delta = q.astype(number) * scales[np.minimum(np.arange(k) // group, groups[leaf] - 1)].astype(number)
    else:
        sizes = [n * SIZES[stored] for n in counts]
        values = read_values(parts, name, tensor, leaf, sizes, SIZES[stored], words[kept].tobytes())
        if tensor["encoding"] == "exact" and tensor["drop_rate"] == 0:
            same = stored == tensor["dtype"]
            words[kept] = np.frombuffer(values, f"<u{size}") if same else narrow(
                tensor["dtype"], widen(stored, values, number))  # fmt: skip
            return words.tobytes()
        delta = widen(stored, values, number) - (origin if tensor["encoding"] == "exact" else number(0))
    p = tensor["drop_rate"]
    factor = np.float32(1 / (1 - p)) if document["rescale"] == "paper" and p < 1 else np.float32(1)
    change = delta * number(factor)
    words[kept] = np.where(change == 0, words[kept], narrow(tensor["dtype"], origin + change))
    return words.tobytes()


def lossless_leaf(parts, name, tensor, leaf, base):
    """One leaf of the base, raw -> of the result, raw."""
    size = SIZES[tensor["dtype"]]
    lengths = np.frombuffer(parts[f"leaves:{name}"][1], "<u4").astype(int)
    begin = lengths[:leaf].sum()
    frame = parts[f"frames:{name}"][1][begin : begin + lengths[leaf]]
    if not frame:
        return base
    if frame[0] == 0:
        return frame[1:]
    words = np.frombuffer(base, f"<u{size}").copy()
    if frame[0] == 4:
        return take_steps(words, narrow_steps(frame)).tobytes()
    body = zstandard.ZstdDecompressor().decompress(frame[1:], max_output_size=2 * len(base) + 16)
    assert frame[0] in (1, 2, 3, 5)
    sparse = frame[0] in (2, 5)
    k = len(body) // (2 + size) if sparse else len(words)
    gaps = np.frombuffer(body[: 2 * k], np.uint8).reshape(2, k).T.copy().view("<u2").reshape(-1)
    places = np.cumsum(gaps.astype(int) + 1) - 1 if sparse else slice(None)
    found = np.frombuffer(body[2 * k if sparse else 0 :], np.uint8).reshape(size, k).T.copy().view(words.dtype)[:, 0]
    words[places] = words[places] ^ found if frame[0] < 3 else take_steps(words[places], found)
    return words.tobytes()


def restore(path, base):
    """Path of a pack, name -> raw bytes of its base -> name -> raw bytes of the result."""
    document, parts = open_file(path)
    results = {}
    for name, tensor in document["tensors"].items():
        size, whole = LEAF * SIZES[tensor["dtype"]], base[name]
        leaves = [whole[i : i + size] for i in range(0, len(whole), size)]
        if tensor["kind"] == "delta":
            leaves = [delta_leaf(document, parts, name, tensor, i, leaf) for i, leaf in enumerate(leaves)]
        if tensor["kind"] == "lossless":
            leaves = [lossless_leaf(parts, name, tensor, i, leaf) for i, leaf in enumerate(leaves)]
        results[name] = b"".join(leaves)
    return results
