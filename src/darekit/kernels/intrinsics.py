# SPDX-License-Identifier: Apache-2.0
"""Parts of kernels in LLVM's own language, for what it does not find in a loop: vectors for any processor, which LLVM
cuts to its width, and single instructions.

Only `compiling.Intrinsic` imports this, and so numba, when a kernel that uses a part of it is compiled. numba's caches
do not see that this file changed: whoever changes it touches the kernels' files as well.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

from darekit.kernels.lanes import LANES
from darekit.masks import BLOCK, COUNTERS, MULTIPLIERS, ROUNDS, WEYL

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_WORDS, _PAIRS = ir.VectorType(_I32, LANES), ir.VectorType(_I64, LANES // 2)
# Of the products of even lanes and those of odd lanes, as 32 bit words: the lower or upper halves of both, within each
# 128 bits, as one shuffle of AVX2 does it. Even lanes then stand before odd ones; twice that, and order is restored.
_LOWER = [start + i for start in range(0, LANES, 4) for i in (0, 2, LANES, LANES + 2)]
_UPPER = [place + 1 for place in _LOWER]


def _spread(builder: Any, value: Any) -> Any:
    """A uint32 in every lane."""
    one = builder.insert_element(ir.Constant(_WORDS, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(_WORDS, ir.Undefined), ir.Constant(_WORDS, [0] * LANES))


def _philox(builder: Any, low: Any, high: Any, stream: Any, seed: Any) -> list[Any]:
    """Counters low .. low + 31 -> their draws, four vectors of 32 uint32 (`darekit.masks` defines them).

    `low`, `high`: the counter's halves, uint32; `stream`, `seed` uint64.
    The two upper words come out of each round in another order of lanes than the lower words, which are not reordered:
    they are needed a round later, in the order that the next upper words have then. (14 operations a round for 32 draws
    of AVX2, 2.2e9 draws/s at 3.0 GHz; with every word in a lane of 64 bits, it was 16, and 1.6e9.)
    """
    constant = ir.Constant

    def products(words: Any, multiplier: int) -> tuple[Any, Any]:
        """Of even lanes and of odd ones."""
        pairs, factor = builder.bitcast(words, _PAIRS), constant(_PAIRS, [multiplier] * (LANES // 2))
        even = builder.and_(pairs, constant(_PAIRS, [0xFFFFFFFF] * (LANES // 2)))
        odd = builder.lshr(pairs, constant(_PAIRS, [32] * (LANES // 2)))
        even, odd = builder.mul(even, factor), builder.mul(odd, factor)
        return builder.bitcast(even, _WORDS), builder.bitcast(odd, _WORDS)

    def shuffled(both: tuple[Any, Any], places: list[int]) -> Any:
        return builder.shuffle_vector(*both, constant(_WORDS, places))

    def key(part: Any, number: int, weyl: int) -> Any:
        return _spread(builder, builder.add(part, constant(_I32, number * weyl % (1 << 32))))

    half = constant(_I64, 32)
    keys = builder.trunc(seed, _I32), builder.trunc(builder.lshr(seed, half), _I32)
    c0, c1 = builder.add(_spread(builder, low), constant(_WORDS, list(range(LANES)))), _spread(builder, high)
    c2 = _spread(builder, builder.trunc(stream, _I32))
    c3 = _spread(builder, builder.trunc(builder.lshr(stream, half), _I32))
    for number in range(ROUNDS):
        wide0, wide1 = products(c0, MULTIPLIERS[0]), products(c2, MULTIPLIERS[1])
        mixed1 = builder.xor(c1, key(keys[0], number, WEYL[0]))  # first: it waits for nothing
        mixed3 = builder.xor(c3, key(keys[1], number, WEYL[1]))
        if number + 1 < ROUNDS:
            c1 = builder.mul(c2, constant(_WORDS, [MULTIPLIERS[1]] * LANES))
            c3 = builder.mul(c0, constant(_WORDS, [MULTIPLIERS[0]] * LANES))
        else:
            c1, c3 = shuffled(wide1, _LOWER), shuffled(wide0, _LOWER)
        c0, c2 = builder.xor(shuffled(wide1, _UPPER), mixed1), builder.xor(shuffled(wide0, _UPPER), mixed3)
    return [c0, c1, c2, c3]


@intrinsic
def keep_lanes(typing: Any, low: Any, high: Any, stream: Any, seed: Any, limit: Any) -> Any:
    """`_philox` -> four masks of 32 bits: which draws are `limit`, uint32, or more."""
    signature = types.UniTuple(types.uint32, 4)(types.uint32, types.uint32, types.uint64, types.uint64, types.uint32)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *counters, limit = arguments
        limits = _spread(builder, limit)
        draws = _philox(builder, *counters)
        masks = [builder.bitcast(builder.icmp_unsigned(">=", one, limits), _I32) for one in draws]
        return context.make_tuple(builder, signature.return_type, masks)

    return signature, build


@intrinsic
def store_lanes(typing: Any, low: Any, high: Any, stream: Any, seed: Any, address: Any) -> Any:
    """`_philox` -> memory, uint32: each vector 4 * COUNTERS bytes behind the one before, the first at `address`."""
    signature = types.void(types.uint32, types.uint32, types.uint64, types.uint64, types.int64)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *counters, address = arguments
        for number, one in enumerate(_philox(builder, *counters)):
            place = builder.add(address, ir.Constant(_I64, 4 * COUNTERS * number))
            builder.store(one, builder.inttoptr(place, _WORDS.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, build


@intrinsic
def count_bits(typing: Any, word: Any) -> Any:
    """How many bits of a uint64 are set."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), build


@intrinsic
def lowest_bit(typing: Any, word: Any) -> Any:
    """Place of the lowest bit that is set; 64 where none is."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), build


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Have the processor bring a line of 64 bytes into its second cache, and go on."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", (pointer,), kind)
        for_reading, second_cache, data = (ir.Constant(number, value) for value in (0, 2, 1))
        builder.call(function, [builder.inttoptr(arguments[0], pointer), for_reading, second_cache, data])
        return context.get_dummy_value()

    return types.void(types.int64), build


def _block(number: Any) -> Any:
    """A part that gives an array of one block on the stack: numba's own memory would tie a kernel to its run time."""
    kind = types.Array(number, 1, "C")

    def typed(typing: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = cgutils.alloca_once(builder, context.get_data_type(number), size=ir.Constant(_I64, BLOCK))
            place.align = 64
            size, width = context.get_constant(types.intp, BLOCK), number.bitwidth // 8
            array = arrayobj.make_array(kind)(context, builder)
            arrayobj.populate_array(
                array, data=place, shape=[size], strides=[context.get_constant(types.intp, width)],
                itemsize=context.get_constant(types.intp, width), meminfo=None,
            )  # fmt: skip
            return array._getvalue()

        return kind(), build

    return intrinsic(typed)


word_block, float_block, double_block = _block(types.uint32), _block(types.float32), _block(types.float64)
