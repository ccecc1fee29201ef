# SPDX-License-Identifier: Apache-2.0
"""XXH3-128 of many pieces in one call, to the bit that of the library xxhash.

Python hands its lock from thread to thread around each call of a library, and that takes longer than to digest a leaf:
two threads that digest 16 leaves of 128 KB one by one take half as long again. The algorithm is that for more than 240
bytes, with the default secret and no seed (the XXH3 part of xxHash's specification).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from darekit.kernels.compiling import inlined, kernel

TOO_SHORT = 240  # bytes: pieces of no more have algorithms of their own
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_PRIMES32 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_PRIMES64 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_STRIPE, _STRIPES = 64, 16  # bytes of a stripe; stripes of a block
_BLOCK = _STRIPE * _STRIPES


def _keys(at: int) -> tuple[int, ...]:
    """Eight words of the secret from byte `at` on."""
    return tuple(np.frombuffer(_SECRET[at : at + 64], "<u8").tolist())


_SCRAMBLE = len(_SECRET) - 64
_BEGIN = np.array([_PRIMES32[2], *_PRIMES64[:4], _PRIMES32[1], _PRIMES64[4], _PRIMES32[0]], np.uint64)
_STRIPE_KEYS = np.array([_keys(8 * t) for t in range(_STRIPES)], np.uint64)
_LAST_KEYS = np.array(_keys(len(_SECRET) - 64 - 7), np.uint64)
_LOW_KEYS, _HIGH_KEYS = np.array(_keys(11), np.uint64), np.array(_keys(len(_SECRET) - 64 - 11), np.uint64)
_HALF, _WORD = np.uint64(0xFFFFFFFF), np.uint64(32)

_I64 = ir.IntType(64)
_LANES = ir.VectorType(_I64, 8)
_NEIGHBOURS = ir.Constant(ir.VectorType(ir.IntType(32), 8), [1, 0, 3, 2, 5, 4, 7, 6])


def _all(value: int) -> Any:
    return ir.Constant(_LANES, [value] * 8)


def _add_stripe(builder: Any, sums: Any, address: Any, keys: Any) -> Any:
    """Sums and the 64 bytes at an address -> sums: each word to its neighbour, products of keyed halves to its own."""
    pointer = builder.inttoptr(address, _LANES.as_pointer())
    words = builder.load(pointer)
    words.align = 1
    keyed = builder.xor(words, keys)
    product = builder.mul(builder.and_(keyed, _all(0xFFFFFFFF)), builder.lshr(keyed, _all(32)))
    other = builder.shuffle_vector(words, ir.Constant(_LANES, ir.Undefined), _NEIGHBOURS)
    return builder.add(builder.add(sums, other), product)


@intrinsic
def _add_blocks(typing: Any, sums: Any, address: Any, blocks: Any) -> Any:
    """Whole blocks of 1024 bytes at `address`, int64, into the eight words at `sums`, int64; `blocks` int64."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, address, blocks = arguments
        pointer = builder.inttoptr(place, _LANES.as_pointer())
        first = builder.load(pointer)
        first.align = 8
        before = builder.block
        head, body, end = (builder.append_basic_block(name) for name in ("head", "body", "end"))
        builder.branch(head)
        builder.position_at_end(head)
        number, sums = builder.phi(_I64), builder.phi(_LANES)
        number.add_incoming(ir.Constant(_I64, 0), before)
        sums.add_incoming(first, before)
        builder.cbranch(builder.icmp_signed("<", number, blocks), body, end)
        builder.position_at_end(body)
        begin = builder.add(address, builder.mul(number, ir.Constant(_I64, _BLOCK)))
        found: Any = sums
        for stripe in range(_STRIPES):
            at = builder.add(begin, ir.Constant(_I64, _STRIPE * stripe))
            found = _add_stripe(builder, found, at, ir.Constant(_LANES, list(_keys(8 * stripe))))
        found = builder.xor(found, builder.lshr(found, _all(47)))
        found = builder.xor(found, ir.Constant(_LANES, list(_keys(_SCRAMBLE))))
        prime = _all(_PRIMES32[0])  # a product of 64 bits and 32, of two of 32 and 32
        low = builder.mul(builder.and_(found, _all(0xFFFFFFFF)), prime)
        high = builder.shl(builder.mul(builder.lshr(found, _all(32)), prime), _all(32))
        found = builder.add(low, high)
        number.add_incoming(builder.add(number, ir.Constant(_I64, 1)), builder.block)
        sums.add_incoming(found, builder.block)
        builder.branch(head)
        builder.position_at_end(end)
        stored = builder.store(sums, pointer)
        stored.align = 8
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@intrinsic
def _add_one(typing: Any, sums: Any, address: Any, keys: Any) -> Any:
    """A stripe at `address` into the eight words at `sums`, with the eight at `keys`; all int64."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _LANES.as_pointer())
        keys = builder.load(builder.inttoptr(arguments[2], _LANES.as_pointer()))
        sums = builder.load(pointer)
        keys.align = sums.align = 8
        stored = builder.store(_add_stripe(builder, sums, arguments[1], keys), pointer)
        stored.align = 8
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@inlined
def _fold(a, b):
    """The product of 64 bits and 64, upper half XOR lower half."""
    low, high = (a & _HALF) * (b & _HALF), (a >> _WORD) * (b >> _WORD)
    one, other = (a >> _WORD) * (b & _HALF), (a & _HALF) * (b >> _WORD)
    middle = (low >> _WORD) + (one & _HALF) + other
    return ((low & _HALF) | (middle << _WORD)) ^ (high + (one >> _WORD) + (middle >> _WORD))


@kernel
def _merged(sums, keys, start):
    total = start
    for i in range(4):
        total += _fold(sums[2 * i] ^ keys[2 * i], sums[2 * i + 1] ^ keys[2 * i + 1])
    total ^= total >> np.uint64(37)
    total *= np.uint64(0x165667919E3779F9)
    return total ^ (total >> _WORD)


@kernel
def digest_pieces(raw, ends, out):
    """(n,) uint8, cut at `ends`, (pieces,) int64 -> `out`, (pieces, 2) uint64: upper and lower half of each digest.

    Pieces have more than TOO_SHORT bytes.
    """
    sums = np.empty(8, np.uint64)
    begin = 0
    for piece in range(ends.size):
        size = ends[piece] - begin
        address = raw.ctypes.data + begin
        for i in range(8):
            sums[i] = _BEGIN[i]
        blocks = (size - 1) // _BLOCK
        _add_blocks(sums.ctypes.data, address, blocks)
        for stripe in range((size - 1 - blocks * _BLOCK) // _STRIPE):
            at = address + blocks * _BLOCK + stripe * _STRIPE
            _add_one(sums.ctypes.data, at, _STRIPE_KEYS.ctypes.data + 64 * stripe)
        _add_one(sums.ctypes.data, address + size - _STRIPE, _LAST_KEYS.ctypes.data)
        length = np.uint64(size)
        out[piece, 0] = _merged(sums, _HIGH_KEYS, ~np.uint64(length * np.uint64(0xC2B2AE3D27D4EB4F)))
        out[piece, 1] = _merged(sums, _LOW_KEYS, np.uint64(length * np.uint64(0x9E3779B185EBCA87)))
        begin = ends[piece]
