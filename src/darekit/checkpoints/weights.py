# SPDX-License-Identifier: Apache-2.0
"""Which files of a directory hold its weights, by the conventions of transformers, and what is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from darekit.checkpoints.documents import read_object, shorten
from darekit.errors import CheckpointError, Unsupported

SAFETENSORS = ".safetensors"
SINGLE = {"safetensors": "model.safetensors", "pickle": "pytorch_model.bin"}
INDEX = {kind: f"{name}.index.json" for kind, name in SINGLE.items()}
SHARD_NAME = re.compile(r".*-of-(\d{1,9})\.safetensors")
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
SCALES = (".weight_scale", "_scale_inv", ".input_scale")  # beside F8 weights: what they must be multiplied with
FOREIGN = {
    ".gguf": "GGUF files hold weights quantised for llama.cpp; give the original checkpoint in safetensors",
    ".pt": "it may hold any Python object; save the model with `save_pretrained` and give that directory",
    ".pth": "it may hold any Python object; save the model with `save_pretrained` and give that directory",
    ".ckpt": "it holds a training state; save the model with `save_pretrained` and give that directory",
}

Kind = Literal["safetensors", "pickle"]


@dataclass(frozen=True)
class Weights:
    """The files that hold a checkpoint's tensors. `index`: tensor -> file name, None if all lie in one file."""

    kind: Kind
    files: tuple[Path, ...]
    index: Mapping[str, str] | None
    index_path: Path | None


def find_weights(directory: Path) -> Weights:
    """Directory -> its files of weights; safetensors before pickled ones.

    Raises:
        CheckpointError: there are none, or more than one answer.
        Unsupported: there are only files of a kind that darekit does not read.
    """
    if found := _find_standard(directory, "safetensors"):
        return found
    names = list_names(directory)
    others = [name for name in names if name.endswith(SAFETENSORS) and name != ADAPTER]
    if len(others) == 1:
        return _take_only(directory, others[0])
    if others:
        raise CheckpointError(
            f"{directory} has {len(others)} safetensors files ({_some(others)}), but neither {SINGLE['safetensors']} "
            f"nor {INDEX['safetensors']}, so their order and completeness are unknown. "
            "Restore the index, or give one file"
        )
    if found := _find_standard(directory, "pickle"):
        return found
    if ADAPTER in names:
        raise Unsupported(_about_adapter(directory))
    for suffix, reason in FOREIGN.items():
        foreign = [name for name in names if name.endswith(suffix)]
        if foreign:
            raise Unsupported(f"{directory} has only {_some(foreign)}: {reason}")
    raise CheckpointError(
        f"{directory} holds no weights: expected {SINGLE['safetensors']}, or shards with {INDEX['safetensors']}; "
        f"found {_some(names) if names else 'an empty directory'}"
    )


def list_names(directory: Path) -> list[str]:
    """Names of a directory's entries, sorted."""
    try:
        return sorted(path.name for path in directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be listed: {error.strerror or error}") from error


def read_index(path: Path) -> dict[str, str]:
    """Index file of shards -> tensor name -> file name, every file name plain.

    Raises:
        CheckpointError: the index is malformed, or a file name would leave the directory.
    """
    index = read_object(path, strict=True).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path}: weight_map is {shorten(index)}, expected an object of tensor name -> file name")
    suffix = ".bin" if path.name == INDEX["pickle"] else SAFETENSORS
    for name, file in index.items():
        at = f"{path}: tensor {shorten(name)} lies in {shorten(file)}"
        if not isinstance(file, str):
            raise CheckpointError(f"{at}; expected the name of a file")
        # Backslash and colon are separators on Windows only, and no shard has them in its name.
        if file in ("", ".", "..") or any(character in file for character in "/\\:\0"):
            raise CheckpointError(f"{at}; expected a plain file name: no folder, no absolute path, no '..'")
        if not file.endswith(suffix):
            raise CheckpointError(f"{at}; expected a name that ends in {suffix}")
    return index


def compare_index(weights: Weights, headers: Sequence[Sequence[str]]) -> None:
    """Check that the names in each file (in the order of `weights.files`) are what the index says.

    Raises:
        CheckpointError: a tensor is in two files, in another than the index says, missing, or not in the index.
    """
    if weights.index is None:
        return
    seen: dict[str, str] = {}
    for path, names in zip(weights.files, headers, strict=True):
        for name in names:
            if name in seen:
                raise CheckpointError(
                    f"tensor {shorten(name)} lies in two shards of {path.parent}: {seen[name]} and {path.name}. "
                    "Save the model again"
                )
            seen[name] = path.name
    for name, file in weights.index.items():
        if seen.get(name) != file:
            where = f"lies in {seen[name]}" if name in seen else "is in no shard"
            raise CheckpointError(
                f"{weights.index_path}: tensor {shorten(name)} should lie in {file}, but {where}: index and shards do "
                "not belong together. Download or save the model again"
            )
    extra = [name for name in seen if name not in weights.index]
    if extra:
        raise CheckpointError(
            f"{weights.index_path} does not list {_some([shorten(name) for name in extra])} of {seen[extra[0]]}: index "
            "and shards do not belong together. Download or save the model again"
        )


def refuse_directory(directory: Path) -> None:
    """Refuse an adapter.

    Raises:
        Unsupported: the directory holds an adapter, and no whole model beside it.
    """
    whole = any((directory / name).exists() for names in (SINGLE, INDEX) for name in names.values())
    if not whole and (directory / ADAPTER_CONFIG).exists():
        raise Unsupported(_about_adapter(directory))


def refuse_config(config: Mapping[str, Any] | None, where: Path) -> None:
    """Refuse quantised weights, which cannot be subtracted from one another.

    Raises:
        Unsupported: the config, or that of a part of the model, has a `quantization_config`.
    """
    if config is None:
        return
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        found = part.get("quantization_config")
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else None
            raise Unsupported(
                f"{where} has a quantization_config (quant_method {shorten(method)}): quantised weights cannot be "
                "merged. Dequantise first: load it in transformers, call `model.dequantize()`, and save_pretrained "
                "that; or give the checkpoint from which it was quantised"
            )


def refuse_scales(dtypes: Mapping[str, str], where: str) -> None:
    """Tensor name -> dtype: refuse F8 weights that mean something only together with their scales.

    Raises:
        Unsupported: there are F8 tensors, and tensors named like their scales.
    """
    eights = [name for name, dtype in dtypes.items() if dtype.startswith("F8_")]
    scales = [name for name in dtypes if name.endswith(SCALES)]
    if eights and scales:
        raise Unsupported(
            f"{where} has F8 weights ({shorten(eights[0])}) with scales beside them ({_some(scales)}): quantised "
            "weights cannot be merged. Dequantise first, or give the checkpoint from which it was quantised"
        )


def refuse_file(path: Path) -> None:
    """Refuse a single file by its name.

    Raises:
        Unsupported: an adapter, or a kind that darekit does not read.
    """
    if path.name == ADAPTER:
        raise Unsupported(_about_adapter(path.parent))
    if path.suffix in FOREIGN:
        raise Unsupported(f"{path} is not read: {FOREIGN[path.suffix]}")
    if path.suffix in (".yaml", ".yml"):
        raise Unsupported(
            f"{path} looks like a recipe, and here stands a model: write it out first with `dare merge {path} OUT`, "
            "and name OUT"
        )
    if path.suffix not in (SAFETENSORS, ".bin"):
        raise Unsupported(f"{path} is not read: expected a directory, a {SAFETENSORS} file or an org/name on the Hub")


def _find_standard(directory: Path, kind: Kind) -> Weights | None:
    single, index_path = directory / SINGLE[kind], directory / INDEX[kind]
    # A dangling link counts: it is opened later, and reported there.
    has_single = single.exists() or single.is_symlink()
    if not index_path.exists():
        return Weights(kind, (single,), None, None) if has_single else None
    index = read_index(index_path)
    files = sorted(set(index.values()))
    missing = [name for name in files if not (directory / name).exists()]
    if has_single and single.name not in files:
        if len(missing) == len(files):  # an index left behind by an older, sharded version
            return Weights(kind, (single,), None, None)
        raise CheckpointError(
            f"{directory} has both {single.name} and shards with {index_path.name}; which of them is the model? Remove "
            f"one, or give the file itself: {single}"
        )
    if missing:
        raise CheckpointError(
            f"{directory} lacks {_some(missing)}, {len(missing)} of the {len(files)} files that {index_path.name} "
            "names. Download the model again"
        )
    return Weights(kind, tuple(directory / name for name in files), index, index_path)


def _take_only(directory: Path, name: str) -> Weights:
    shard = SHARD_NAME.fullmatch(name)
    if shard and int(shard[1]) > 1:
        raise CheckpointError(
            f"{directory} has {name}, one of {int(shard[1])} shards, without the others and without "
            f"{INDEX['safetensors']}. Download the model again"
        )
    return Weights("safetensors", (directory / name,), None, None)


def _about_adapter(directory: Path) -> str:
    return f"""{directory} is a LoRA/PEFT adapter, not a whole model. Merge it into its base first, in Python:

    from peft import AutoPeftModelForCausalLM
    model = AutoPeftModelForCausalLM.from_pretrained({str(directory)!r}, torch_dtype="auto")
    model.merge_and_unload().save_pretrained({f"{directory.name}-merged"!r})

and give {directory.name}-merged instead"""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
