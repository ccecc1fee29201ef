# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in torch's pickled format (pytorch_model.bin), read by torch itself and without running their code."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from darekit.checkpoints.documents import shorten
from darekit.checkpoints.sources import ArrayBytes
from darekit.dtypes import dtype_from_torch_name
from darekit.errors import CheckpointError, Unsupported


@dataclass(frozen=True)
class PickledTensor:
    """One tensor of a pickled file, its bytes mapped from the file where torch can."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: ArrayBytes


def read_pickled(path: Path) -> tuple[PickledTensor, ...]:
    """A file of `torch.save(state_dict)` -> its tensors.

    Raises:
        CheckpointError: it is damaged, or holds something else than named tensors.
        Unsupported: torch is not installed, or the pickle wants to run code.
    """
    if find_spec("torch") is None:
        raise Unsupported(
            f"{path} is in torch's pickled format, which needs torch: pip install 'darekit[torch]', or give a "
            "checkpoint in safetensors"
        )
    state = _load(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected named tensors (a state_dict)")
    size = path.stat().st_size
    return tuple(_read_tensor(name, value, size, path) for name, value in state.items())


def _load(path: Path) -> Any:
    import torch

    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # saved before torch 1.6
    except pickle.UnpicklingError as error:
        raise Unsupported(
            f"{path} holds more than tensors: its pickle wants to run code, which darekit never does "
            f"({_first_line(error)}). Give a checkpoint in safetensors, or convert it where you trust it"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        # What torch raises on a damaged file depends on the byte that is damaged.
        raise CheckpointError(f"{path} cannot be read by torch: {_first_line(error)}. Download it again") from error


def _read_tensor(name: Any, value: Any, size: int, path: Path) -> PickledTensor:
    import torch

    at = f"{path}, entry {shorten(name) if isinstance(name, str) else type(name).__name__}"
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise CheckpointError(
            f"{at}: found a {type(value).__name__}, expected a name and a tensor. If this is a training state, save "
            "the model with `save_pretrained`"
        )
    dtype = dtype_from_torch_name(str(value.dtype))
    if dtype is None or value.layout != torch.strided or value.device.type != "cpu":
        raise Unsupported(f"{at}: a tensor of {value.dtype}, {value.layout} on {value.device} is not supported")
    nbytes = value.numel() * dtype.itemsize
    if nbytes > size:  # a stride of 0 lets one stored number pose as terabytes
        raise CheckpointError(f"{at}: a tensor of {nbytes:,} bytes cannot come from a file of {size:,}")
    flat = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return PickledTensor(name, dtype.name, tuple(value.shape), ArrayBytes(flat))


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0].rstrip(". ")[:200] if lines else type(error).__name__
