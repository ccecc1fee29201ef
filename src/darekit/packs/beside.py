# SPDX-License-Identifier: Apache-2.0
"""The small files of a packed model: stored in the pack, or taken from its base where both have the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from darekit.checkpoints import Checkpoint
from darekit.checkpoints.companions import ALL, CONFIG, Companions, Content, content_of, matching, travels
from darekit.dtypes import Bytes
from darekit.errors import CheckpointError
from darekit.packs.format import PackFile


def companions_of(source: PackFile, base: Checkpoint) -> tuple[Companions, Mapping[str, Any] | None]:
    """The model's small files, those that it shares with its base where the base has them; and its config."""
    files = source.document.files
    if not files:
        return {}, base.config
    found: dict[str, Content] = {}
    sizes: dict[str, int] = {}
    config = None
    for file in files:
        content = found[file.name] = _file(source, file.name, base)
        raw = content_of(content)
        if digest_of(raw) != file.digest:
            where = source.file.path if file.stored else base.ref
            raise CheckpointError(f"{file.name} of {where} is not the file that was packed")
        sizes[file.name] = len(raw)
        if file.name == CONFIG:
            config = json.loads(raw)
    # A stranger's pack brings no files that would not travel beside a stranger's weights.
    listed = matching(found, ALL)
    further, _ = travels({name: size for name, size in sizes.items() if name not in listed})
    return {name: content for name, content in found.items() if name in listed or name in further}, config


def _file(source: PackFile, name: str, base: Checkpoint) -> Content:
    if name in source.files:
        return source.read_part(source.files[name]).tobytes()
    if name not in base.companions:
        raise CheckpointError(f"{base.ref} has no {name}, which {source.file.path} takes from it")
    return base.companions[name]


def digest_of(raw: Bytes | bytes) -> str:
    """Of a file, as packs store it."""
    return xxhash.xxh3_128_hexdigest(raw)
