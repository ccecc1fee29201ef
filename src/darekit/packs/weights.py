# SPDX-License-Identifier: Apache-2.0
"""The weights of a live model, wherever they lie: the host's memory is changed in place, a device's range by range."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np

from darekit.checkpoints import ArrayBytes, Source
from darekit.dtypes import DTYPES, Bytes, dtype_from_torch_name
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


class HostWeight(ArrayBytes):
    """Memory that numpy sees."""

    @property
    def place(self) -> tuple[str, int]:
        """See `Weight`."""
        return "cpu", self.data.ctypes.data

    @contextmanager
    def changing(self, begin: int, end: int) -> Iterator[Bytes]:
        """See `Weight`: the memory itself."""
        yield self.data[begin:end]


class DeviceWeight:
    """A contiguous torch tensor in memory that only a device sees."""

    def __init__(self, tensor: Any) -> None:
        import torch

        self._flat = tensor.detach().view(-1).view(torch.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
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
        room = self._fetched(begin, end)
        try:
            yield room.numpy()
        finally:
            self._flat[begin:end].copy_(room)

    def _fetched(self, begin: int, end: int) -> Any:
        """These bytes, in a torch tensor of the host's."""
        if begin < 0 or end > self.nbytes:
            raise ValueError(f"bytes {begin} to {end} lie outside a tensor of {self.nbytes}")
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
            room = self._rooms[pinned] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        return room[:nbytes]


_ROOMS = _Rooms()


def state_of(model: Mapping[str, Any] | Any) -> Mapping[str, Any]:
    """A torch module's tensors by name, as they are now; a mapping is that itself."""
    state: Mapping[str, Any] = model.state_dict() if hasattr(model, "state_dict") else model
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
    torch = type(array).__module__.split(".")[0] == "torch"
    dtype = dtype_from_torch_name(str(array.dtype)) if torch else None
    if not torch:
        dtype = next((entry for entry in DTYPES.values() if entry.numpy == array.dtype), None)
    if dtype is None or dtype.name != wanted or tuple(array.shape) != shape:
        raise HomologyError(f"{name} should be {wanted} {list(shape)}, found {array.dtype} {list(array.shape)}")
    if not torch:
        if not (array.flags.c_contiguous and array.flags.writeable):
            raise HomologyError(f"{name} must be contiguous and writable to be changed in place")
        return HostWeight(array.reshape(-1).view(np.uint8))
    if array.device.type == "meta":
        raise HomologyError(f"{name} has no values yet (it is on torch's device meta); load the base's weights first")
    if not array.is_contiguous():
        raise HomologyError(f"{name} must be contiguous to be changed in place")
    if not on_host(array):
        return DeviceWeight(array)
    return HostWeight(array.detach().view(-1).view(array.new_empty(0).byte().dtype).numpy())


def on_host(tensor: Any) -> bool:
    """Whether a torch tensor lies in the host's memory."""
    return bool(tensor.device.type == "cpu")
