# SPDX-License-Identifier: Apache-2.0
"""Quantised weights -> tensors that decode themselves. All that names, formats and shapes can tell is checked here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from darekit.checkpoints.checkpoint import TensorInfo
from darekit.checkpoints.documents import parse_object, shorten
from darekit.checkpoints.headers import HeaderFile
from darekit.checkpoints.quantised import formulas
from darekit.checkpoints.quantised.codes import Codes, Halves, Whole, packed
from darekit.checkpoints.quantised.formulas import Singles
from darekit.checkpoints.quantised.naming import Match
from darekit.checkpoints.quantised.scales import Grid, Nested, Ordered, Scales, Zeros
from darekit.checkpoints.quantised.sources import Flipped, Scaled, Shelf, Stored
from darekit.checkpoints.quantised.told import Told
from darekit.checkpoints.sources import FileRange
from darekit.dtypes import DType, dtype_named
from darekit.errors import CheckpointError, Unsupported
from darekit.kernels import quantised as kernels

POWERS = ("U8", "F8_E8M0")
NUMBERS = ("F32", "F16", "BF16", "F64")
INTEGERS = ("I8", "U8", "I16", "I32", "I64")
USUAL = (128, 128)  # blocks of F8, where neither config nor shapes tell
SMALL = (16, 32)  # elements of a row that share a scale in the small formats (NVFP4 and MX)
LIMIT = 1 << 16  # bytes of a quant_state

# Families whose layers lie transposed in files, and the other way round once bitsandbytes has quantised them.
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "xlnet")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Making:
    """What tensors are made with.

    Attributes:
        tensors: all that is stored, by name.
        told: what config.json says.
        dtype: that weights are decoded to.
        where: the checkpoint, in errors.
        shelf: for matrices that are read whole.
    """

    tensors: Mapping[str, TensorInfo]
    told: Told
    dtype: DType
    where: str
    shelf: Shelf


@dataclass(frozen=True)
class Decoded:
    """A tensor that decodes itself, and what it is stored as, in words."""

    info: TensorInfo
    form: str


@dataclass(frozen=True)
class Layout:
    """How scales lie over a tensor.

    Attributes:
        rows: of each of its matrices.
        columns: of a row.
        block: rows and columns of elements that share a scale.
        width: scales in a row of them.
        words: what to call it.
    """

    rows: int
    columns: int
    block: tuple[int, int]
    width: int
    words: str


class Weight:
    """One quantised weight, while it is made: its parts, and what can be wrong with them."""

    def __init__(self, match: Match, making: Making) -> None:
        self.match, self.making = match, making
        self.parts = {role: making.tensors[name] for role, name in match.parts.items()}

    def __getitem__(self, role: str) -> TensorInfo:
        return self.parts[role]

    def get(self, role: str) -> TensorInfo | None:
        """A part that may be absent."""
        return self.parts.get(role)

    def wrong(self, what: str) -> CheckpointError:
        """An error about this weight."""
        return CheckpointError(
            f"{self.making.where}, tensor {self.match.name}: {what}. The checkpoint is damaged, or its parts "
            "belong to different models; download it again, or give the checkpoint that was quantised"
        )

    def need(self, role: str, formats: Sequence[str]) -> TensorInfo:
        """A part whose number format is one of those that it can have."""
        info = self.parts[role]
        if info.dtype not in formats:
            raise self.wrong(f"{info.name} is {info.dtype}, expected {' or '.join(formats)}")
        return info

    def values(self, role: str, limit: int = LIMIT) -> bytes:
        """All bytes of a small part, which says what headers of other formats do: its values are read on opening.

        Raises:
            Unsupported: they are not on this machine.
        """
        info = self.parts[role]
        if isinstance(info.source, FileRange) and isinstance(info.source.file, HeaderFile):
            raise Unsupported(
                f"{self.making.where}, tensor {self.match.name}: its shape is stored in {info.name}, but only the "
                "headers were fetched; download the model first"
            )
        if info.nbytes > limit:
            raise self.wrong(f"{info.name} has {info.nbytes:,} bytes, expected at most {limit:,}")
        raw = np.empty(info.nbytes, np.uint8)
        info.source.read_into(raw, 0)
        return raw.tobytes()

    def stored(self, shape: Shape, facts: Mapping[str, Any], dtype: DType | None = None, grain: int = 1) -> Stored:
        """What decoding needs to know, and what identifies the tensor."""
        dtype = dtype or self.making.dtype
        return Stored(
            self.match.name,
            dtype,
            math.prod(shape),
            self.match.kind,
            self.parts,
            {"shape": list(shape), **facts},
            grain,
        )

    def layout(self, shape: Shape, scales: TensorInfo, powers: bool = False) -> Layout:
        """How scales of their shape lie over a tensor of a shape."""
        return layout_of(shape, scales, self.making.told, self.wrong, small=powers)

    def made(self, stored: Stored, shape: Shape, source: Scaled | Flipped, form: str) -> Decoded:
        """The tensor."""
        return Decoded(TensorInfo(self.match.name, stored.dtype.name, shape, source), form)


def build(match: Match, making: Making) -> Decoded:
    """One quantised weight as a tensor that decodes itself.

    Raises:
        CheckpointError: its parts do not fit each other.
        Unsupported: it is stored in a way that is not read.
    """
    return KINDS[match.kind](Weight(match, making))


def layout_of(
    shape: Shape, scales: TensorInfo, told: Told, wrong: Callable[[str], CheckpointError], *, small: bool
) -> Layout:
    """How scales lie over a tensor: one for all of it, for each matrix, row, column, or block.

    Args:
        shape: of the tensor.
        scales: the tensor of scales.
        told: what config.json says of blocks.
        wrong: an error about the tensor.
        small: whether runs of 16 or 32 elements of a row may share a scale, whatever config.json says.

    Raises:
        CheckpointError: their shapes do not fit.
    """
    columns = shape[-1] if shape else 1
    rows = shape[-2] if len(shape) > 1 else 1
    before, own = shape[:-2], scales.shape
    every = rows * math.prod(before)
    if scales.count == 1:
        return Layout(max(1, every), max(1, columns), (max(1, every), max(1, columns)), 1, "one scale for each tensor")
    if len(shape) > 1 and own in ((*before, rows), (*before, rows, 1)):
        return Layout(every, columns, (1, max(1, columns)), 1, "one scale for each row")
    if before and own in ((*before,), (*before, 1), (*before, 1, 1)):
        return Layout(rows, columns, (rows, columns), 1, "one scale for each expert")
    if len(shape) > 1 and len(own) == len(shape) and own[:-2] == before:
        block = _block_of((rows, columns), (own[-2], own[-1]), told, small=small)
        if block is not None:
            words = f"blocks of {block[0]} x {block[1]}" if block[0] > 1 else f"groups of {block[1]}"
            return Layout(rows, columns, block, own[-1], "one scale for each column" if block[1] == 1 else words)
    said = " or ".join(f"{one} x {other}" for one, other in told.blocks)
    raise wrong(
        f"scales of shape {list(own)} ({scales.name}) do not fit weights of shape {list(shape)}"
        + (f" in blocks of {said}, as config.json has it" if said else "")
    )


def _block_of(shape: Shape, grid: Shape, told: Told, *, small: bool) -> tuple[int, int] | None:
    """Rows and columns of elements that share a scale; the last block of an axis may be smaller."""
    (rows, columns), (lines, groups) = shape, grid

    def fits(block: tuple[int, int]) -> bool:
        return (-(-rows // block[0]), -(-columns // block[1])) == (lines, groups)

    for block in told.blocks:
        if fits(block):
            return block
    if not lines or not groups:
        return None
    if (lines, groups) == (1, columns):
        return rows, 1
    even = rows % lines == 0 and columns % groups == 0
    if small and lines == rows and even and columns // groups in SMALL:
        return 1, columns // groups
    if told.blocks:
        return None
    if fits(USUAL):
        return USUAL
    return (rows // lines, columns // groups) if even else None


@cache
def _coding(kind: str) -> tuple[Singles, kernels.How]:
    """What codes of a kind are worth: a table of 256, of which all tensors share one, and the same as arithmetic."""
    how = kernels.LOOKED_UP
    if kind in kernels.OF_FORMATS:
        return formulas.eights(kind), kernels.OF_FORMATS[kind]
    if kind == "E2M1":
        table, how = formulas.E2M1, kernels.E2M1
    elif kind.startswith("INT"):
        bits = int(kind.removeprefix("INT"))
        table, how = formulas.integers(bits), kernels.integers(bits)
    else:
        table = formulas.NF4 if kind == "NF4" else formulas.FP4
    return np.pad(table, (0, 256 - table.size)), how


def _scaled(
    weight: Weight, shape: Shape, layout: Layout, codes: Codes, kind: str, scales: Grid, form: str, *,
    zeros: Grid | None = None, factor: float = 1.0, anything: bool = False, **facts: Any,
) -> Decoded:  # fmt: skip
    """A tensor whose codes lie in the order of its elements."""
    stored = weight.stored(shape, {"rows": layout.rows, "block": list(layout.block), **facts})
    source = Scaled(
        stored, codes, *_coding(kind), scales, zeros, layout.rows, layout.columns, layout.block,
        weight.making.shelf.desk, factor, anything,
    )  # fmt: skip
    return weight.made(stored, shape, source, form)


def _eights(weight: Weight) -> Decoded:
    """F8 with scales: DeepSeek's blocks, one for each row or tensor, and runs of 32 with powers of two (MXFP8)."""
    codes, scales = weight["codes"], weight.need("scales", (*NUMBERS, *POWERS))
    layout = weight.layout(codes.shape, scales, powers=scales.dtype in POWERS)
    name = "MXFP8" if scales.dtype in POWERS and layout.block == (1, 32) else "FP8"
    return _scaled(
        weight, codes.shape, layout, Whole(codes.source), codes.dtype,
        Scales(scales, layout.width, weight.match.name), f"{name} ({codes.dtype.removeprefix('F8_')}), {layout.words}",
    )  # fmt: skip


def _integers(weight: Weight) -> Decoded:
    """INT8, one byte each, with scales and perhaps zero points."""
    codes, scales, zeros = weight["codes"], weight.need("scales", NUMBERS), weight.get("zeros")
    layout = weight.layout(codes.shape, scales)
    if zeros is not None:
        weight.need("zeros", INTEGERS)
        if zeros.count != scales.count:
            raise weight.wrong(f"zero points of shape {list(zeros.shape)}, scales of shape {list(scales.shape)}")
    return _scaled(
        weight, codes.shape, layout, Whole(codes.source), "I8",
        Scales(scales, layout.width, weight.match.name, signed=True), f"INT8, {layout.words}",
        zeros=None if zeros is None else Zeros(zeros, layout.width),
    )  # fmt: skip


def _rows(weight: Weight) -> Decoded:
    """LLM.int8() of bitsandbytes: the largest value of each row."""
    _refuse_transposed(weight)
    codes, scales = weight.need("codes", ("I8",)), weight.need("scales", NUMBERS)
    if len(codes.shape) != 2 or scales.count != codes.shape[0]:
        raise weight.wrong(f"SCB of shape {list(scales.shape)} does not fit weights of shape {list(codes.shape)}")
    if weight.get("format") is not None and any(weight.values("format")):
        raise Unsupported(
            f"{weight.making.where}, tensor {weight.match.name}: its elements are in the order of one kind of GPU "
            f"({weight['format'].name} is not 0); load it with bitsandbytes, call `model.dequantize()`, and save that"
        )
    layout = Layout(codes.shape[0], codes.shape[1], (1, max(1, codes.shape[1])), 1, "one scale for each row")
    return _scaled(
        weight, codes.shape, layout, Whole(codes.source), "I8",
        Scales(scales, 1, weight.match.name), "INT8 of bitsandbytes", factor=float(formulas.INT8_STEP), anything=True,
    )  # fmt: skip


def _fours(weight: Weight) -> Decoded:
    """Rows of four-bit floats, two in a byte: with powers of two (MXFP4), or F8 scales and one for all (NVFP4)."""
    codes, scales = weight.need("codes", ("U8", "I8")), weight.need("scales", (*POWERS, "F8_E4M3"))
    if not codes.shape:
        raise weight.wrong(f"{codes.name} has no dimensions")
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    layout = weight.layout(shape, scales, powers=True)
    divisor, factor = weight.get("divisor"), weight.get("factor")
    whole = divisor or factor
    if whole is not None and (whole.count != 1 or whole.dtype not in NUMBERS):
        raise weight.wrong(f"{whole.name} is {whole.dtype} of shape {list(whole.shape)}, expected one number")
    if scales.dtype == "F8_E4M3" and whole is None:
        raise weight.wrong("its F8 scales need one more for all of them (weight_scale_2 or weight_global_scale)")
    return _scaled(
        weight, shape, layout, Halves(codes.source, high_first=False), "E2M1",
        Scales(scales, layout.width, weight.match.name, whole, divisor is not None),
        f"{'MXFP4' if scales.dtype in POWERS else 'NVFP4'}, {layout.words}",
    )  # fmt: skip


def _packed(weight: Weight) -> Decoded:
    """Integers of 1 to 8 bits in words of 32, as compressed-tensors packs them."""
    codes, scales = weight["codes"], weight.need("scales", NUMBERS)
    if len(codes.shape) < 2:
        raise weight.wrong(f"{codes.name} has shape {list(codes.shape)}, expected rows of words")
    shape, bits = _packed_shape(weight)
    order, zeros = weight.get("order"), weight.get("zeros")
    # The grid of an order is one of groups, whatever elements they have.
    layout = weight.layout(shape, scales)
    grid: Grid = Scales(scales, layout.width, weight.match.name, signed=True)
    points: Grid | None = None
    if zeros is not None:
        points = _zero_points(weight, shape, bits, layout)
    if order is not None and layout.width > 1:
        weight.need("order", ("I32", "I64"))
        if order.count != shape[-1] or len(shape) != 2:
            raise weight.wrong(f"{order.name} has {order.count} elements, for rows of {shape[-1]}")
        grid = Ordered(grid, order, layout.width, layout.block[1])
        points = None if points is None else Ordered(points, order, layout.width, layout.block[1])
        layout = replace(layout, block=(layout.block[0], 1))
    return _scaled(
        weight, shape, layout, packed(codes.source, bits, shape[-1]), f"INT{bits}", grid,
        f"INT{bits}, {layout.words}", zeros=points, bits=bits,
    )  # fmt: skip


def _packed_shape(weight: Weight) -> tuple[Shape, int]:
    """The shape of packed integers, and their bits: what is stored says so, or else config and scales."""
    codes, scales, told = weight["codes"], weight["scales"], weight.making.told
    words, known = codes.shape[-1], [one for one in told.bits if one <= 8]
    info = weight.get("shape")
    if info is not None and not (isinstance(info.source, FileRange) and isinstance(info.source.file, HeaderFile)):
        weight.need("shape", ("I64", "I32"))
        shape = tuple(np.frombuffer(weight.values("shape"), dtype_named(info.dtype).numpy).tolist())
        if len(shape) != len(codes.shape) or shape[:-1] != codes.shape[:-1] or shape[-1] < 1:
            raise weight.wrong(f"{info.name} says {shorten(list(shape))}, but its codes have shape {list(codes.shape)}")
        possible = [bits for bits in (*known, 4, 8, 2, 3, 6, 5, 7, 1) if -(-shape[-1] * bits // 32) == words]
        if not possible or (known and possible[0] not in known):
            said = " or ".join(map(str, known or range(1, 9)))
            raise weight.wrong(
                f"rows of {shape[-1]} integers ({info.name}) of {said} bits do not fill rows of {words} words"
            )
        return shape, possible[0]
    bits = known[0] if known else 4
    groups = [size for _, size in told.blocks if -(-size * scales.shape[-1] * bits // 32) == words]
    columns = groups[0] * scales.shape[-1] if groups and len(scales.shape) > 1 else words * 32 // bits
    return (*codes.shape[:-1], columns), bits


def _zero_points(weight: Weight, shape: Shape, bits: int, layout: Layout) -> Grid:
    zeros, scales = weight.need("zeros", INTEGERS), weight["scales"]
    if zeros.dtype == "I32" and len(shape) == 2 and zeros.shape == (-(-shape[0] * bits // 32), layout.width):
        return Zeros(zeros, layout.width, bits)
    if zeros.count == scales.count:
        return Zeros(zeros, layout.width)
    raise weight.wrong(f"zero points of shape {list(zeros.shape)} do not fit scales of shape {list(scales.shape)}")


def _blocks(weight: Weight) -> Decoded:
    """MXFP4 of experts, as in gpt-oss: the inputs of each output lie together, and live models have them transposed."""
    codes, scales = weight["codes"], weight.need("scales", POWERS)
    if len(codes.shape) != 4 or scales.shape != codes.shape[:-1]:
        raise weight.wrong(
            f"scales of shape {list(scales.shape)} ({scales.name}) do not fit blocks of shape {list(codes.shape)}; "
            "expected [experts, rows, groups, bytes] without the bytes"
        )
    experts, rows, groups, width = codes.shape
    shape = experts, 2 * groups * width, rows
    matrix = 2 * groups * width * rows
    stored = weight.stored(shape, {"group": 2 * width}, grain=matrix // 2)
    source = Flipped(stored, codes.source, scales, (experts, rows, groups, width), weight.making.shelf)
    return weight.made(stored, shape, source, f"MXFP4, groups of {2 * width}")


def _bitsandbytes(weight: Weight) -> Decoded:
    """NF4 and FP4, whose shape and blocks are told by JSON in a tensor of its own."""
    _refuse_transposed(weight)
    state = parse_object(weight.values("state"), weight["state"].name, strict=False)
    kind, shape, block = state.get("quant_type"), state.get("shape"), state.get("blocksize")
    if kind not in ("nf4", "fp4") or not weight["state"].name.endswith(kind):
        raise weight.wrong(f"{weight['state'].name} has quant_type {shorten(kind)}, expected nf4 or fp4")
    if not isinstance(shape, list) or not all(type(one) is int and one > 0 for one in shape) or not shape:
        raise weight.wrong(f"{weight['state'].name} has shape {shorten(shape)}, expected a list of sizes")
    if type(block) is not int or block < 1:
        raise weight.wrong(f"{weight['state'].name} has blocksize {shorten(block)}, expected a whole number above 0")
    count, codes, absmax = math.prod(shape), weight["codes"], weight["scales"]
    if codes.nbytes != -(-count // 2) or absmax.count != -(-count // block):
        raise weight.wrong(
            f"{codes.nbytes:,} bytes of codes and {absmax.count:,} scales do not fit the shape {shape} and the "
            f"blocksize {block} of {weight['state'].name}"
        )
    _refuse_other_table(weight, "map", formulas.NF4 if kind == "nf4" else formulas.FP4)
    grid: Grid = Scales(absmax, absmax.count, weight.match.name)
    double = "outer" in weight.parts
    if double:
        grid = _nested(weight, state, absmax)
    else:
        weight.need("scales", NUMBERS)
    layout = Layout(1, count, (1, block), absmax.count, f"blocks of {block}")
    return _scaled(
        weight, tuple(shape), layout, Halves(codes.source, high_first=True), kind.upper(), grid,
        f"{kind.upper()} of bitsandbytes{', double quantised' if double else ''}", anything=True, type=kind,
    )  # fmt: skip


def _nested(weight: Weight, state: Mapping[str, Any], absmax: TensorInfo) -> Grid:
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    outer = weight.need("outer", NUMBERS)
    if type(block) is not int or block < 1 or not isinstance(offset, int | float) or not math.isfinite(offset):
        raise weight.wrong(
            f"{weight['state'].name} has nested_blocksize {shorten(block)} and nested_offset {shorten(offset)}, "
            "expected a whole number above 0 and a number"
        )
    weight.need("scales", ("U8",))
    if "outer_map" not in weight.parts or weight.need("outer_map", NUMBERS).count != 256:
        raise weight.wrong("its scales are quantised, and the 256 values of their codes (nested_quant_map) are missing")
    if outer.count != -(-absmax.count // block):
        raise weight.wrong(f"{outer.count:,} scales of {absmax.count:,} scales in blocks of {block}")
    return Nested(absmax, weight["outer_map"], outer, block, np.float32(offset), weight.match.name)


def _refuse_other_table(weight: Weight, role: str, table: Singles) -> None:
    """bitsandbytes takes the values of codes for granted and stores them all the same: they must be the same."""
    if role not in weight.parts:
        return
    stored = np.frombuffer(weight.values(role), np.uint8)
    info = weight.need(role, ("F32",))
    if info.count != table.size or not np.allclose(stored.view(np.float32), table, atol=1e-4):
        raise weight.wrong(f"{info.name} holds other values of its codes than those of {weight['state'].name}")


def _refuse_transposed(weight: Weight) -> None:
    told = weight.making.told
    if told.model in TRANSPOSED:
        raise Unsupported(
            f"{weight.making.where} is a {told.model} that bitsandbytes quantised, with its layers transposed, which "
            "is not read: quantised weights cannot be merged. Dequantise first: load it in transformers, call "
            "`model.dequantize()`, and save_pretrained that; or give the checkpoint from which it was quantised"
        )


KINDS: Mapping[str, Callable[[Weight], Decoded]] = {
    "eights": _eights,
    "integers": _integers,
    "rows": _rows,
    "fours": _fours,
    "packed": _packed,
    "blocks": _blocks,
    "bitsandbytes": _bitsandbytes,
}
