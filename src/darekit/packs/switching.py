# SPDX-License-Identifier: Apache-2.0
"""One live model and many packs: put one after another on its weights in place, and return to the base exactly."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from darekit.checkpoints import Checkpoint, TensorInfo, open_checkpoint, sample_digest
from darekit.dtypes import Bytes
from darekit.errors import DarekitError, HomologyError
from darekit.packs.decoding import Decoder, Swapped, spans_of
from darekit.packs.leaves import Indices
from darekit.packs.reading import open_pack
from darekit.packs.weights import Counterparts, Place, Weight
from darekit.packs.workers import run_all
from darekit.wording import brief


@dataclass(slots=True)
class _Span:
    """Some leaves of a live tensor, bytes `begin` to `end`, and what the base had there."""

    weight: Weight
    begin: int
    end: int
    swapped: Swapped

    def put_back(self) -> None:
        """The base's bits."""
        if self.swapped.filled:
            with self.weight.changing(self.begin, self.end) as raw:
                self.swapped.put_back(raw)


@dataclass(frozen=True, slots=True)
class _Saved:
    """The same of one leaf that no lane goes through. `where`: (k,) indices in it, None: everywhere; `words`: bytes."""

    weight: Weight
    begin: int
    end: int
    itemsize: int
    where: npt.NDArray[np.uint16] | None
    words: Bytes

    def put_back(self) -> None:
        """The base's bits."""
        with self.weight.changing(self.begin, self.end) as raw:
            if self.where is None:
                raw[:] = self.words
            else:
                raw.view(f"u{self.itemsize}")[self.where] = self.words.view(f"u{self.itemsize}")


class Switcher:
    """A live model, on the CPU or any torch device, that takes one pack after another.

    What a pack overwrites is remembered in the host's memory (at p = 0.9 a fifth of a BF16 model's size), so that the
    base comes back bit for bit without reading it again; that memory is reused by the next pack, and freed with the
    switcher. A device's weights come to the host range by range, are changed there, and go back. Nothing else may
    change or move the weights in the meantime: put the model on its device first.

    Args:
        model: a torch module, or name -> torch tensor or numpy array, with the base's weights.
        base: the checkpoint that they were loaded from.
        threads: worker threads.

    Attributes:
        model: as given.
        threads: worker threads.
        current: the pack that is on the weights; None for the base.

    Raises:
        HomologyError: the model does not have the base's weights.

    Examples:
        >>> from safetensors.torch import load_file
        >>> for name in ("math", "code"):
        ...     packed = dk.pack("base", name, f"{name}.safetensors", drop_rate=0.9)
        >>> weights = load_file("base/model.safetensors")  # or a torch module
        >>> before = weights["lm_head.weight"].clone()
        >>> switcher = dk.Switcher(weights, "base")
        >>> switcher.switch("math.safetensors")
        >>> switcher.switch("code.safetensors")
        >>> switcher
        <Switcher: base, code.safetensors>
        >>> switcher.switch(None)
        >>> bool((weights["lm_head.weight"] == before).all())
        True
    """

    def __init__(self, model: Mapping[str, Any] | Any, base: str | Path, *, threads: int | None = None) -> None:
        from darekit.machine import threads_of

        self.model = model
        self.threads = threads_of(threads)
        self.current: Path | None = None
        self._spans: dict[tuple[str, int], _Span] = {}  # by tensor and first leaf: always the same leaves
        self._saved: list[_Saved] = []  # where no lane goes
        self._checked: set[Any] = set()  # packs whose bytes were compared with their digests
        self._places: dict[str, tuple[Place, ...]] = {}
        self._base = open_checkpoint(base)
        try:
            self._refuse_other_weights()
        finally:
            self._base.close()

    def __repr__(self) -> str:
        return brief(self, f"{self._base.ref}, {self.current or 'no pack'}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.switch(None)
        except DarekitError as failure:
            if error is None:
                raise
            error.add_note(f"the base's weights could not be restored: {failure}")

    def switch(self, pack: str | Path | None) -> None:
        """Put a pack onto the base's weights, whichever pack is on them now; None restores the base's weights.

        Raises:
            HomologyError: the pack is of another base, or the weights lie elsewhere than before; they stay as they are.
            CheckpointError: the pack is damaged; the weights stay as they are, or become the base's.
        """
        self._refuse_moved()
        if pack is None:
            self._return()
            return
        with open_pack(pack) as found:
            found.refuse_base(self._live, self._digest)
            decoders = found.decoders(self._counterparts)
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

    def _apply(self, decoders: Sequence[tuple[Decoder, Weight]]) -> None:
        """Where the lane goes, the base comes back and leaves again while it is in the cache."""

        def work(job: tuple[Decoder, Weight, int]) -> int:
            decoder, weight, first = job
            begin, end = decoder.span(first)
            if decoder.lane:
                span = self._spans.get((decoder.tensor.name, first))
                if span is None:
                    span = self._spans[decoder.tensor.name, first] = _Span(weight, begin, end, Swapped())
                with weight.changing(begin, end) as raw:
                    span.swapped.put_back(raw)
                    decoder.swap_leaves(first, raw, span.swapped)
                return 1

            def keep(where: Indices | None, words: Bytes) -> None:
                places = None if where is None else where.astype(np.uint16)
                self._saved.append(_Saved(weight, begin, end, decoder.itemsize, places, words))

            with weight.changing(begin, end) as raw:
                decoder.swap(first, raw, keep)
            return 1

        run_all(spans_of(decoders), work, threads=self.threads)

    def _return(self) -> None:
        """The base's bits, everywhere."""
        self._return_others(frozenset())

    def _return_others(self, names: Collection[str]) -> None:
        """The base's bits, everywhere but in those of these tensors that the lane changed."""
        saved: list[_Saved | _Span] = [span for (name, _), span in self._spans.items() if name not in names]
        saved += self._saved
        parts = [saved[i::64] for i in range(64)]

        def work(saved: list[_Saved | _Span]) -> int:
            for one in saved:
                one.put_back()
            return 1

        run_all(parts, work, threads=self.threads)
        self._saved = []
        self.current = None

    def _refuse_moved(self) -> None:
        """What was remembered belongs to the memory that the weights had."""
        for name, weight in self._counterparts.weights(self._places).items():
            if weight.nbytes and weight.places != self._places[name]:
                raise HomologyError(
                    f"{name} has moved in memory since this switcher was made: move or load the model first, and then "
                    "make a switcher"
                )

    def _refuse_other_weights(self) -> None:
        infos = dict(self._base.tensors)
        stored = {name: (info.dtype, info.shape) for name, info in infos.items()}
        self._counterparts = Counterparts(self.model, stored, self._base.config, self._base.ref)
        weights = self._counterparts.weights(name for name in infos if not self._counterparts.is_nobodys(name))
        for name, weight in weights.items():
            infos[name] = TensorInfo(name, infos[name].dtype, infos[name].shape, weight)
            self._places[name] = weight.places
        live = Checkpoint(self._base.ref, None, infos, None, (), None)
        self._digest = sample_digest(live)
        if self._digest != sample_digest(self._base, decoded=True):
            raise HomologyError(f"the model's weights are not those of {self._base.ref}: load it again")
        self._live = live
