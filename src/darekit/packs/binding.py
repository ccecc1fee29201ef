# SPDX-License-Identifier: Apache-2.0
"""Whether a base is the one that a pack was made against."""

from __future__ import annotations

from darekit.checkpoints import Checkpoint, sample_digest
from darekit.errors import HomologyError
from darekit.packs.format import PackFile


def bind(source: PackFile, base: Checkpoint, digest: bytes | None = None) -> None:
    """Refuse a base that is not the pack's.

    Raises:
        HomologyError: a tensor is missing, or has another shape or format; or the samples differ.
    """
    wanted = source.document.base
    for name, tensor in source.document.tensors.items():
        info = base.tensors.get(name)
        found = "no such tensor" if info is None else f"{info.dtype} {list(info.shape)}"
        if info is not None and info.stored_name != name:  # the base's sample digest is that of the stored model
            found += f", which is stored as {info.stored_name}"
        if info is None or (info.dtype, info.shape, info.stored_name) != (tensor.dtype, tensor.shape, name):
            raise HomologyError(
                f"{base.ref} is not the base of {source.file.path}: {name} should be {tensor.dtype} "
                f"{list(tensor.shape)}, found {found}. It was packed against {wanted['ref']}"
            )
    if (digest or sample_digest(base, decoded=True)).hex() != wanted["sample_digest"]:
        raise HomologyError(
            f"{base.ref} is not the base of {source.file.path}: its tensors have the same shapes but other values. It "
            f"was packed against {wanted['ref']}"
            + (f" at commit {wanted['revision']}" if wanted.get("revision") else "")
        )
