# SPDX-License-Identifier: Apache-2.0
"""The weights of a live model, wherever they lie: the host's memory is changed in place, a device's range by range."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from darekit.architectures.families import facts_of
from darekit.architectures.layout import Unplaced, places_of
from darekit.checkpoints import ArrayBytes, Source
from darekit.dtypes import DTYPES, Bytes, dtype_of, is_torch
from darekit.errors import HomologyError

Place = tuple[str, int, int]  # device, address, bytes


class Weight(Source, Protocol):
    """One live tensor, which can be read as a checkpoint's can."""

    @property
    def places(self) -> tuple[Place, ...]:
        """The memory that it lies in."""
        ...

    def changing(self, begin: int, end: int) -> AbstractContextManager[Bytes]:
        """(end - begin,) uint8: these bytes, to be changed in place. They are the tensor's when the context ends,
        however it ends; a thread has one such range of a device's tensors at a time."""
        ...


@dataclass(frozen=True)
class HostWeight:
    """Memory that numpy sees: (n,) uint8."""

    raw: Bytes

    @property
    def nbytes(self) -> int:
        """See `Weight`."""
        return self.raw.nbytes

    @property
    def places(self) -> tuple[Place, ...]:
        """See `Weight`."""
        return (("cpu", self.raw.ctypes.data, self.raw.nbytes),)

    def read_into(self, buffer: Bytes, offset: int) -> None:
        """See `Weight`."""
        ArrayBytes(self.raw).read_into(buffer, offset)

    @contextmanager
    def changing(self, begin: int, end: int) -> Iterator[Bytes]:
        """See `Weight`: the memory itself."""
        yield self.raw[begin:end]


class DeviceWeight:
    """A contiguous torch tensor in memory that only a device sees."""

    def __init__(self, tensor: Any) -> None:
        import torch

        self._flat = tensor.detach().view(-1).view(torch.uint8)

    @property
    def nbytes(self) -> int:
        """See `Weight`."""
        return int(self._flat.numel())

    @property
    def places(self) -> tuple[Place, ...]:
        """See `Weight`."""
        return ((str(self._flat.device), int(self._flat.data_ptr()), self.nbytes),)

    def read_into(self, buffer: Bytes, offset: int) -> None:
        """See `Weight`: copied by way of this thread's room."""
        buffer[...] = self._fetched(offset, offset + buffer.size).numpy()

    @contextmanager
    def changing(self, begin: int, end: int) -> Iterator[Bytes]:
        """See `Weight`: copied to this thread's room, and back."""
        import torch

        room = self._fetched(begin, end)
        try:
            yield room.numpy()
        finally:
            with torch.inference_mode():
                self._flat[begin:end].copy_(room)

    def _fetched(self, begin: int, end: int) -> Any:
        """These bytes, in a torch tensor of the host's."""
        import torch

        if begin < 0 or end > self.nbytes:
            raise ValueError(f"bytes {begin} to {end} lie outside a tensor of {self.nbytes}")
        # In inference mode tensors of every mode may be written to, out of it none that it made.
        with torch.inference_mode():
            room = _ROOMS.of(end - begin, pinned=self._flat.device.type == "cuda")
            room.copy_(self._flat[begin:end])
        return room


class CutWeight:
    """A tensor that is several in memory: its bytes lie in them, one after another."""

    def __init__(self, parts: Sequence[Weight]) -> None:
        self._parts = tuple(parts)
        self._ends = list(itertools.accumulate(part.nbytes for part in parts))

    @property
    def nbytes(self) -> int:
        """See `Weight`."""
        return self._ends[-1]

    @property
    def places(self) -> tuple[Place, ...]:
        """See `Weight`."""
        return tuple(place for part in self._parts for place in part.places)

    def read_into(self, buffer: Bytes, offset: int) -> None:
        """See `Weight`."""
        for part, inside, begin, end in self._within(offset, offset + buffer.size):
            part.read_into(buffer[begin - offset : end - offset], begin - inside)

    @contextmanager
    def changing(self, begin: int, end: int) -> Iterator[Bytes]:
        """See `Weight`: the memory itself where it is one part's, else copied, and back."""
        found = list(self._within(begin, end))
        if len(found) == 1:
            part, inside, _, _ = found[0]
            with part.changing(begin - inside, end - inside) as raw:
                yield raw
            return
        room = np.empty(end - begin, np.uint8)
        self.read_into(room, begin)
        try:
            yield room
        finally:
            for part, inside, first, last in found:
                with part.changing(first - inside, last - inside) as raw:
                    raw[:] = room[first - begin : last - begin]

    def _within(self, begin: int, end: int) -> Iterator[tuple[Weight, int, int, int]]:
        """(part, where it begins, bytes of the whole that are wanted of it: from and to)."""
        for part, stop in zip(self._parts, self._ends, strict=True):
            start = stop - part.nbytes
            if start < end and begin < stop:
                yield part, start, max(begin, start), min(end, stop)


class _Rooms(threading.local):
    """This thread's memory between host and device. Pinned, it is what a GPU copies from and to at full speed."""

    def __init__(self) -> None:
        self._rooms: dict[bool, Any] = {}

    def of(self, nbytes: int, *, pinned: bool) -> Any:
        """(nbytes,) torch.uint8, in place of what was got before."""
        import torch

        room = self._rooms.get(pinned)
        if room is None or room.numel() < nbytes:
            room = self._rooms[pinned] = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        return room[:nbytes]


_ROOMS = _Rooms()


def state_of(model: Mapping[str, Any] | Any) -> Mapping[str, Any]:
    """A torch module's tensors by name, as they are now; a mapping is that itself. What runs on their GPUs has ended:
    copies go through the default stream, and streams beside it would not wait for them."""
    if not hasattr(model, "state_dict") and not isinstance(model, Mapping):
        raise HomologyError(
            f"found {type(model).__name__} where a live model is expected: a torch module, or name -> tensor"
        )
    state: Mapping[str, Any] = model.state_dict() if hasattr(model, "state_dict") else model
    devices = {tensor.device for tensor in state.values() if is_torch(tensor)}
    for device in devices:
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)
    return state


class Counterparts:
    """The live tensors, or parts of them, that stored tensors are in memory.

    Args:
        model: a torch module, or name -> torch tensor or numpy array.
        stored: name -> (format as in `DTYPES`, shape), of all tensors of one checkpoint.
        config: its config.json, for what a mapping does not tell.
        ref: what to call the checkpoint.
    """

    def __init__(
        self,
        model: Mapping[str, Any] | Any,
        stored: Mapping[str, tuple[str, tuple[int, ...]]],
        config: Mapping[str, Any] | None,
        ref: str,
    ) -> None:
        self.model, self.ref, self._stored = model, ref, stored
        self._facts = facts_of(_config_of(model) or config)
        shapes = {name: tuple(array.shape) for name, array in state_of(model).items() if hasattr(array, "shape")}
        self._places = places_of({name: shape for name, (_, shape) in stored.items()}, shapes, self._facts)

    def is_nobodys(self, name: str) -> bool:
        """Whether the model has no such tensor, and its loader would drop it."""
        shape = self._stored[name][1]
        return self._places[name] == Unplaced() and (
            self._facts.is_rebuilt(name, shape) or self._facts.ignored_when_unexpected(name)
        )

    def weights(self, names: Iterable[str]) -> dict[str, Weight]:
        """Stored name -> where it lies now.

        Raises:
            HomologyError: it lies nowhere, in another shape or format, or not in the order in which it is stored.
        """
        state, found = state_of(self.model), {}
        for name in names:
            place, (dtype, shape) = self._places[name], self._stored[name]
            if place == Unplaced():
                raise HomologyError(f"the model has no tensor {name}, which {self.ref} has")
            if isinstance(place, Unplaced):
                raise HomologyError(
                    f"{name} of {self.ref} cannot be changed in place in this model: {place.why}. `dare unpack` writes "
                    "the packed model, which can be loaded instead"
                )
            if len(place) == 1:
                found[name] = weight_of(place[0].of(state), name, dtype, shape)
                continue
            arrays = [part.of(state) for part in place]
            found[name] = CutWeight([weight_of(a, name, dtype, (a.shape[0], *shape[1:])) for a in arrays])
        return found


def _config_of(model: Any) -> dict[str, Any] | None:
    """What a live model of transformers' says of its class; None for anything else."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return None if model_type is None else {"architectures": [type(model).__name__], "model_type": model_type}


def weight_of(array: Any, name: str, wanted: str, shape: tuple[int, ...]) -> Weight:
    """A numpy array or torch tensor, to be changed in place.

    Args:
        array: contiguous; a torch tensor may lie on any device.
        name: of the tensor, for errors.
        wanted: its format, as in `DTYPES`.
        shape: its shape.

    Raises:
        HomologyError: another shape or format, or memory that cannot be changed in place.
    """
    dtype = dtype_of(array)
    if dtype is None or dtype.name != wanted or tuple(array.shape) != shape:
        loaded_wide = is_torch(array) and tuple(array.shape) == shape
        advice = f"; load the model with dtype=torch.{DTYPES[wanted].torch_name}" if loaded_wide else ""
        raise HomologyError(f"{name} should be {wanted} {list(shape)}, found {array.dtype} {list(array.shape)}{advice}")
    if not is_torch(array):
        if not (array.flags.c_contiguous and array.flags.writeable and array.dtype == dtype.numpy):
            raise HomologyError(f"{name} must be contiguous, writable and little-endian to be changed in place")
        return HostWeight(array.reshape(-1).view(np.uint8))
    import torch

    if array.device.type == "meta":
        raise HomologyError(f"{name} has no values yet (it is on torch's device meta); load the base's weights first")
    if not array.is_contiguous():
        raise HomologyError(f"{name} must be contiguous to be changed in place")
    return HostWeight(array.detach().view(-1).view(torch.uint8).numpy()) if on_host(array) else DeviceWeight(array)


def refuse_shared(weights: Mapping[str, Weight]) -> None:
    """Refuse names of one memory: it cannot become what both of them are to be.

    Raises:
        HomologyError: two share a byte.
    """
    placed = sorted((*place, name) for name, weight in weights.items() for place in weight.places if place[2])
    for (device, address, nbytes, name), (other, start, _, second) in itertools.pairwise(placed):
        if device == other and start < address + nbytes:
            raise HomologyError(
                f"{name} and {second} share memory (the model ties them), but the pack stores each of them as a "
                "separate tensor; untie them first, or use `dare unpack`"
            )


def on_host(tensor: Any) -> bool:
    """Whether a torch tensor lies in the host's memory."""
    return bool(tensor.device.type == "cpu")
