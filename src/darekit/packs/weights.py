# SPDX-License-Identifier: Apache-2.0
"""The weights of a live model, wherever they lie: the host's memory is changed in place, a device's range by range."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from darekit.checkpoints import ArrayBytes, Source
from darekit.dtypes import DTYPES, Bytes, dtype_of, is_torch
from darekit.errors import HomologyError


class Weight(Source, Protocol):
    """One live tensor, which can be read as a checkpoint's can."""

    @property
    def place(self) -> tuple[str, int]:
        """The memory that it lies in: device and address."""
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
    def place(self) -> tuple[str, int]:
        """See `Weight`."""
        return "cpu", self.raw.ctypes.data

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
    def place(self) -> tuple[str, int]:
        """See `Weight`."""
        return str(self._flat.device), int(self._flat.data_ptr())

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
    state: Mapping[str, Any] = model.state_dict() if hasattr(model, "state_dict") else model
    devices = {tensor.device for tensor in state.values() if is_torch(tensor)}
    for device in devices:
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)
    return state


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
    placed = sorted((*weight.place, weight.nbytes, name) for name, weight in weights.items() if weight.nbytes)
    for (device, address, nbytes, name), (other, start, _, second) in itertools.pairwise(placed):
        if device == other and start < address + nbytes:
            raise HomologyError(
                f"{name} and {second} share memory (the model ties them), but the pack stores each of them as a "
                "separate tensor; untie them first, or use `dare unpack`"
            )


def on_host(tensor: Any) -> bool:
    """Whether a torch tensor lies in the host's memory."""
    return bool(tensor.device.type == "cpu")
