# SPDX-License-Identifier: Apache-2.0
"""Modules that get factors, and where their matrices are stored."""

from __future__ import annotations

from dataclasses import dataclass

from darekit.planning.matching.alignment import AlignedTensor


@dataclass(frozen=True)
class Block:
    """Some rows of a stored tensor: elements from `begin` on, (rows, columns)."""

    tensor: AlignedTensor
    begin: int
    shape: tuple[int, int]

    @property
    def count(self) -> int:
        """Elements."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Target:
    """A module that gets factors.

    Attributes:
        name: the module's; of experts the parameter's.
        matrices: what it computes with: one matrix, or one for each expert; of each the blocks that lie upon each other
            in it, as they are stored.
        transposed: matrices are stored [in, out].
        parameter: of experts in one parameter: its own name; None: an ordinary layer.
        kernel: of a convolution: the shape of what one output sees, (in, height, width); empty: it is none.
        table: tokens are looked up in it.
        heads: modules that have a table's values as their own weight.
    """

    name: str
    matrices: tuple[tuple[Block, ...], ...]
    transposed: bool = False
    parameter: str | None = None
    kernel: tuple[int, ...] = ()
    table: bool = False
    heads: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of one matrix."""
        blocks = self.matrices[0]
        rows, columns = sum(block.shape[0] for block in blocks), blocks[0].shape[1]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def count(self) -> int:
        """Elements of all matrices."""
        return len(self.matrices) * self.shape[0] * self.shape[1]

    @property
    def tensors(self) -> tuple[AlignedTensor, ...]:
        """What it is stored in."""
        return tuple({block.tensor.name: block.tensor for blocks in self.matrices for block in blocks}.values())

    @property
    def module(self) -> str:
        """The module's name; of a parameter, its module's."""
        return self.name.rpartition(".")[0] if self.parameter else self.name
