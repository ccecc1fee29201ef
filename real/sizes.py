# SPDX-License-Identifier: Apache-2.0
"""How much a run measures, and what a step of it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from real.lessons import ABILITIES, PROSE

Results = Mapping[str, Any]  # a step's name -> what it gave
Document = dict[str, Any]

DROP_RATE = "sparsify.drop_rate"
DENSE = ["embeddings", "norms"]


def rows_for(test: int) -> dict[str, int]:
    """Rows of each split and of prose.

    >>> rows_for(200)
    {'validation': 80, 'test': 200, 'prose': 32}
    """
    return {"validation": max(1, round(0.4 * test)), "test": test, PROSE: max(1, round(0.16 * test))}


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        abilities: the models, in the order of the merges.
        rows: rows of each split, and of prose.
        seeds: of the masks at the headline's cells.
        other_seeds: of all other cells.
        rates, headline, other_rates: drop rates of DARE's curve, those of the headline, those of other methods.
        batch: rows at once.
        again: the headline again, of another training seed and with other threads.
        also: what else, of `ALSO`.
        depth: control points over the layers that a search may use.
    """

    abilities: tuple[str, ...] = ABILITIES
    rows: Mapping[str, int] = field(default_factory=lambda: rows_for(200))
    seeds: tuple[int, ...] = (1, 2, 3)
    other_seeds: tuple[int, ...] = (1,)
    rates: tuple[float, ...] = (0.5, 0.9, 0.95, 0.99, 0.999)
    headline: tuple[float, ...] = (0.9, 0.99)
    other_rates: tuple[float, ...] = (0.9, 0.99)
    batch: int = 32
    again: bool = True
    also: tuple[str, ...] = ()
    depth: int = 4


STANDARD = Size()
# What takes long and can be asked for by name: adapters of every model and by energy, a search for the best merge, the
# headline's and the merges' cells row by row.
ALSO = ("loras", "search", "paired")
FULL = replace(STANDARD, other_seeds=(1, 2, 3), headline=STANDARD.rates, other_rates=STANDARD.rates, also=ALSO)
QUICK = Size(
    abilities=ABILITIES[:1], rows=rows_for(100), seeds=(1,), rates=(0.5, 0.9, 0.99),
    headline=(), other_rates=(0.9,), again=False,
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        name: of its result, and of its sweep file.
        title: for people.
        words: after the program.
        file: makes what it reads from the results so far: the sweep or search file `steps/NAME.yaml`, or the recipes
            of an evaluation by name, each `steps/THEIRS.yaml`.
        cells: about how many models are judged, and by which judges each: by their test, or `/validation`, or so many
            of the rows.
        seconds: beside judging.
        program: `dare`, or a module of this package.
        makes: a file or folder that later steps read; what it holds is replaced.
        device: whether it takes --device and --dtype.
        dtype: the number format that it must be judged in, whatever is faster.
        needs: abilities whose models it reads.
        folder: of results that are gone on from after a stop, and useless for anything else.
    """

    name: str
    title: str
    words: tuple[str, ...]
    file: Callable[[Results], Document] | None = None
    cells: tuple[tuple[int, tuple[str, ...]], ...] = ()
    seconds: float = 5.0
    program: str = "dare"
    makes: str | None = None
    device: bool = False
    dtype: str | None = None
    needs: tuple[str, ...] = ()
    folder: str | None = None

    @property
    def is_grid(self) -> bool:
        """Whether it is a sweep or a search: of one file, in processes, with its results in a folder."""
        return self.words[0] in ("sweep", "search")


def sweep(
    name: str, title: str, file: Callable[[Results], Document], cells: Any, needs: Sequence[str], out: str = ""
) -> Step:
    """A step that is a sweep. Those with one `out` judge what they have in common once: --overwrite replaces the tables
    of the one before, and keeps its cells."""
    words = ("sweep", f"steps/{name}.yaml", f"runs/{out or name}", "--overwrite")
    return Step(name, title, words, file, tuple(cells), 15.0, device=True, needs=tuple(needs))


def judges(size: Size, split: str, names: Sequence[str], *, prose: bool = True) -> Document:
    """Judges by name, as a sweep has them."""
    every = [*names, PROSE] if prose else [*names]
    return {name: {"data": f"data/{name}.{split}.jsonl", "batch_size": size.batch} for name in every}
