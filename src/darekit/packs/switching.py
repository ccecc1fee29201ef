# SPDX-License-Identifier: Apache-2.0
"""One live model and many packs: put one after another on its weights in place, and return to the base exactly."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from darekit.checkpoints import ArrayBytes, Checkpoint, TensorInfo, open_checkpoint, sample_digest
from darekit.dtypes import DTYPES, Bytes
from darekit.errors import HomologyError
from darekit.packs.lane import READ_LEAVES
from darekit.packs.leaves import Indices
from darekit.packs.reading import Decoder, Swapped, bytes_of, open_pack
from darekit.packs.workers import run_all


@dataclass(frozen=True, slots=True)
class _Saved:
    """What the base had in one leaf: `where` (None: everywhere), counted from its first element, and raw bytes."""

    raw: Bytes
    itemsize: int
    where: npt.NDArray[np.uint16] | None
    words: Bytes

    def put_back(self) -> None:
        if self.where is None:
            self.raw[:] = self.words
        else:
            self.raw.view(f"u{self.itemsize}")[self.where] = self.words.view(f"u{self.itemsize}")


class Switcher:
    """A live model on the CPU that takes one pack after another.

    What a pack overwrites is remembered (at p = 0.9 a fifth of a BF16 model's size), so that the base comes back bit
    for bit without reading it again; that memory is used again by the next pack, and free when the switcher is. Nobody
    else may change the weights meanwhile.

    Args:
        model: a torch module, or name -> torch tensor or numpy array, with the base's weights.
        base: the checkpoint that they were loaded from.
        threads: worker threads.

    Raises:
        HomologyError: the model does not have the base's weights.
    """

    def __init__(self, model: Mapping[str, Any] | Any, base: str | Path, *, threads: int | None = None) -> None:
        from darekit.engine import default_threads

        self.state: Mapping[str, Any] = model.state_dict() if hasattr(model, "state_dict") else model
        self.threads = threads or default_threads()
        self.current: Path | None = None
        self._swapped: dict[tuple[str, int], Swapped] = {}  # by tensor and first leaf: always the same leaves
        self._saved: list[_Saved] = []  # where no lane goes
        self._checked: set[Any] = set()  # packs whose bytes were compared with their digests
        self._base = open_checkpoint(base)
        try:
            self._refuse_other_weights()
        finally:
            self._base.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.switch(None)

    def switch(self, pack: str | Path | None) -> None:
        """Put a pack on the base's weights, whatever is on them now; None: the base's weights themselves.

        Raises:
            HomologyError: the pack is of another base; the weights stay as they are.
            CheckpointError: the pack is damaged; the weights stay as they are, or are the base's then.
        """
        if pack is None:
            self._return()
            return
        with open_pack(pack) as found:
            found.refuse_base(self._live, self._digest)
            decoders = found.decoders(self.state)
            if found.identity not in self._checked:
                found.refuse_damaged(threads=self.threads)
                self._checked.add(found.identity)
            self._return_others({decoder.tensor.name for decoder, _ in decoders if decoder.lane})
            try:
                self._apply(decoders)
            except BaseException:
                self._return()
                raise
        self.current = Path(pack)

    def _apply(self, decoders: list[tuple[Decoder, Bytes]]) -> None:
        """Where the lane goes, the base comes back and leaves again while it is in the cache."""
        jobs = [
            (decoder, raw, first) for decoder, raw in decoders for first in range(0, decoder.tensor.leaves, READ_LEAVES)
        ]

        def work(job: tuple[Decoder, Bytes, int]) -> int:
            decoder, whole, first = job
            itemsize = DTYPES[decoder.tensor.dtype].itemsize
            last = min(first + READ_LEAVES, decoder.tensor.leaves)
            if decoder.lane:
                kept = self._swapped.get((decoder.tensor.name, first))
                if kept is None:
                    kept = self._swapped[decoder.tensor.name, first] = Swapped()
                kept.put_back()
                decoder.swap_leaves(first, whole[first * decoder.leaf_bytes : last * decoder.leaf_bytes], kept)
                return 1
            for leaf in range(first, last):
                raw = whole[leaf * decoder.leaf_bytes : (leaf + 1) * decoder.leaf_bytes]

                def keep(where: Indices | None, words: Bytes, raw: Bytes = raw) -> None:
                    self._saved.append(_Saved(raw, itemsize, None if where is None else where.astype(np.uint16), words))

                decoder.swap(leaf, raw, keep)
            return 1

        run_all(jobs, work, threads=self.threads)

    def _return(self) -> None:
        """The base's bits, everywhere."""
        self._return_others(frozenset())

    def _return_others(self, names: Collection[str]) -> None:
        """The base's bits, everywhere but in those of these tensors that the lane changed."""
        saved: list[_Saved | Swapped] = [kept for (name, _), kept in self._swapped.items() if name not in names]
        saved += self._saved
        parts = [saved[i::64] for i in range(64)]

        def work(saved: list[_Saved | Swapped]) -> int:
            for one in saved:
                one.put_back()
            return 1

        run_all(parts, work, threads=self.threads)
        self._saved = []
        self.current = None

    def _refuse_other_weights(self) -> None:
        infos = {}
        for name, info in self._base.tensors.items():
            if name not in self.state:
                raise HomologyError(f"the model has no tensor {name}, which {self._base.ref} has")
            raw = bytes_of(self.state[name], name, info.dtype, info.shape)
            infos[name] = TensorInfo(name, info.dtype, info.shape, ArrayBytes(raw))
        live = Checkpoint(self._base.ref, None, infos, None, (), None)
        self._digest = sample_digest(live)
        if self._digest != sample_digest(self._base):
            raise HomologyError(f"the model's weights are not those of {self._base.ref}: load it again")
        self._live = live
