# SPDX-License-Identifier: Apache-2.0
"""Models on the Hub from their headers: a few megabytes say what a model is, where its weights would be gigabytes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from darekit.checkpoints import Checkpoint, InputFile, open_checkpoint
from darekit.checkpoints.headers import Elsewhere, HeaderFile, has_values, without_values
from darekit.checkpoints.hub import Snapshot, fetch_small, fetch_start, is_cached, looks_like_hub_id, weights_on_hub
from darekit.checkpoints.opening import looked_for
from darekit.checkpoints.refusals import ADAPTER_INDEX, ADAPTER_WEIGHTS
from darekit.checkpoints.safetensors import HEADER_LIMIT
from darekit.errors import CheckpointError, HoldsAdapter, HoldsPack, HomologyError, Unsupported
from darekit.inputs.adapters.opening import open_on
from darekit.inputs.kinds import Opener, Opening

if TYPE_CHECKING:
    from darekit.inputs.adapters.files import AdapterFiles

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx")
FIRST = 100_000  # bytes of a file that are fetched at once: few headers have more


@dataclass
class Headers:
    """Opens what is on the Hub and not on this machine by its headers.

    Attributes:
        kinds: all other kinds of input.
        folder: an empty directory, where headers are kept as long as the models are open.
        asked: what values were asked of, as `Elsewhere` notes it.
        missing: bytes of weights that a merge would download, by model.
    """

    kinds: Sequence[Opener]
    folder: Path
    asked: dict[str, set[str]] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)

    @property
    def openers(self) -> tuple[Opener, ...]:
        """All kinds of input, those on the Hub before the others."""
        return (
            Opener("a pack of a base that is not here", self._find_pack, self._refuse_pack),
            Opener("a model on the Hub", _find, self._open),
            *self.kinds,
        )

    def _find_pack(self, opening: Opening) -> str | Path | None:
        """A pack is checked against values of its base."""
        if opening.base is None or has_values(opening.base):
            return None
        packs = [one for one in self.kinds if one.needs_base and not one.finds_base]
        return next((found for one in packs if (found := one.find(opening)) is not None), None)

    def _refuse_pack(self, opening: Opening) -> Checkpoint:
        assert opening.base is not None
        raise Unsupported(
            f"{opening.ref} is stored relative to its base, but only headers of {opening.base.ref} are here: "
            f"download it first with `hf download {opening.base.ref.partition('@')[0]}`"
        )

    def _open(self, opening: Opening) -> Checkpoint:
        ref = str(opening.ref)
        try:
            small = fetch_small(ref)
        except HoldsAdapter as error:
            return self._open_adapter(opening, ref, Snapshot(error.path, error.path.name))
        except Unsupported:  # it was found
            raise
        except CheckpointError as error:  # a mistyped path reads like a Hub id
            raise CheckpointError(f"{error}. No local checkpoint either: {looked_for(ref, opening.search)}") from error
        if is_cached(small):
            return replace(open_checkpoint(small.directory), ref=ref, left=small.left)
        sizes = weights_on_hub(ref, small)
        if pickled := [name for name in sizes if not name.endswith(".safetensors")]:
            raise Unsupported(
                f"{ref} has its weights in {pickled[0]}, which has no header that can be read by itself: download it "
                f"first with `hf download {ref.partition('@')[0]}`, or name a revision with safetensors"
            )
        place = self.folder / ref
        place.mkdir(parents=True, exist_ok=True)
        if small.directory.exists():  # a repository may hold nothing but weights
            shutil.copytree(small.directory, place, ignore=shutil.ignore_patterns(*WEIGHTS), dirs_exist_ok=True)
        for name in sizes:
            (place / name).write_bytes(_header(ref, small, name))

        def open_file(path: Path) -> InputFile:
            return HeaderFile(path, sizes[path.name])

        try:
            found = open_checkpoint(place, open_file=open_file)
        except HoldsPack:
            raise Unsupported(
                f"{ref} holds a pack: download it first with `dare pull {ref} FOLDER`, and name the file"
            ) from None
        except CheckpointError as error:  # it is the model on the Hub that is wrong, and no folder of ours
            raise type(error)(str(error).replace(f"{self.folder}/", "")) from None
        self.missing[ref] = sum(size for name, size in sizes.items() if not (small.directory / name).exists())
        return without_values(found, ref, small.revision, self.asked)

    def _open_adapter(self, opening: Opening, ref: str, small: Snapshot) -> Checkpoint:
        """An adapter on the Hub on its base."""
        if (small.directory / ADAPTER_INDEX).exists():
            raise Unsupported(
                f"{ref} is an adapter in several files, whose headers are not read alone: download it first with "
                f"`hf download {ref.partition('@')[0]}`"
            )
        if any((small.directory / name).exists() for name in ADAPTER_WEIGHTS):
            return open_on(opening, small.directory)
        sizes = weights_on_hub(ref, small, [(name,) for name in ADAPTER_WEIGHTS])
        (name,) = sizes
        if not name.endswith(".safetensors"):
            raise Unsupported(
                f"{ref} has its weights in {name}, which has no header that can be read by itself: download it first "
                f"with `hf download {ref.partition('@')[0]}`"
            )
        place = self.folder / ref
        place.mkdir(parents=True, exist_ok=True)
        shutil.copytree(small.directory, place, ignore=shutil.ignore_patterns(*WEIGHTS), dirs_exist_ok=True)
        (place / name).write_bytes(_header(ref, small, name))

        def without(adapter: AdapterFiles) -> AdapterFiles:
            where = f"{ref.partition('@')[0]}@{small.revision}"
            tensors = {
                name: replace(info, source=Elsewhere(where, name, info.nbytes, self.asked))
                for name, info in adapter.tensors.items()
            }
            return replace(adapter, tensors=tensors)

        try:
            found = open_on(opening, place, lambda path: HeaderFile(path, sizes[path.name]), without)
        except (CheckpointError, HomologyError) as error:
            raise type(error)(str(error).replace(f"{self.folder}/", "")) from None
        self.missing[ref] = sizes[name]
        return found


def _find(opening: Opening) -> str | None:
    """A name of that form that is nothing on this machine."""
    ref = opening.ref
    return ref if isinstance(ref, str) and looks_like_hub_id(ref) and opening.path is None else None


def _header(ref: str, snapshot: Snapshot, name: str) -> bytes:
    """A file's header with its length in front; what is wrong with it is said when it is read."""
    start = fetch_start(ref, snapshot, name, 0, FIRST)
    end = 8 + int.from_bytes(start[:8], "little")
    if end > len(start) and len(start) == FIRST and end <= HEADER_LIMIT:
        start += fetch_start(ref, snapshot, name, FIRST, end)
    return start[:end]
