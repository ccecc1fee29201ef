# SPDX-License-Identifier: Apache-2.0
"""Packs to and from the Hugging Face Hub, or a folder: the file, and a card that says what it is and how to use it."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darekit.checkpoints.companions import CARD
from darekit.checkpoints.hub import HUB_ID, refuse_address, upload_files
from darekit.errors import CheckpointError, OutputError, PlanError
from darekit.packing.card import pack_card
from darekit.packs.opening import SUFFIX, locate_pack
from darekit.packs.reading import open_pack
from darekit.wording.progress import Progress

PACK_SUFFIX = ".pack.safetensors"


@dataclass(frozen=True)
class Pushed:
    """Where a pack went.

    Attributes:
        to: the repository or folder, as written.
        url: of the repository; the folder's path.
        files: those that were written.
        bytes: of the pack.
        commit: on the Hub; None in a folder.
    """

    to: str
    url: str
    files: tuple[str, ...]
    bytes: int
    commit: str | None = None

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**self.__dict__, "files": list(self.files)}


@dataclass(frozen=True)
class Pulled:
    """The pack that was fetched and checked.

    Attributes:
        pack: the file.
        bytes: of the file.
        base: what the pack says of its base: ref, revision and digests.
        tensors: of the model.
    """

    pack: str
    bytes: int
    base: Mapping[str, Any]
    tensors: int

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**self.__dict__, "base": dict(self.base)}


def push(
    pack: str | Path,
    to: str | Path,
    *,
    base_model: str | None = None,
    license: str | None = None,
    private: bool = False,
    new_card: bool = False,
    message: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Pushed:
    """Put a pack, with a model card, into a repository on the Hub or into a folder.

    Args:
        pack: the file.
        to: org/name on the Hub, or a folder: one that is there, or a path that cannot be a Hub id (`./name`).
        base_model: the base on the Hub, org/name or org/name@commit; if not given, the one that the pack names.
        license: the model's license, if the pack does not name it.
        private: make a new repository private.
        new_card: replace an existing model card.
        message: commit message.
        say: receives notes.

    Returns:
        Where the pack and its card are now.

    Raises:
        PlanError: the base is not known by a Hub id.
        CheckpointError: the pack is damaged.
        OutputError: it cannot be written there.

    Examples:
        >>> packed = dk.pack("base", "math", "math.safetensors", drop_rate=0.9, seed=42)
        >>> dk.push("math.safetensors", "./share", base_model="org/base", license="apache-2.0").files
        ('math.pack.safetensors', 'README.md')

        To the Hub, in a repository that is made where it is missing:

        >>> dk.push("math.safetensors", "me/math-pack", base_model="org/base")  # doctest: +SKIP
    """
    path = locate_pack(pack)
    with open_pack(path) as found:
        faults = found.verify().faults
        info = found.info()
    if faults:
        raise CheckpointError(f"{path} is damaged and was not pushed: {faults[0].tensor}: {faults[0].words}")
    folder = _as_folder(to)
    name, revision = _base_of(info, base_model)
    if name is None and folder is None:
        raise PlanError(
            f"{path} was packed against {info['base']['ref']}, a local name that means nothing on the Hub: give the "
            "base's Hub id with --base-model org/name or org/name@commit"
        )
    license = license or info["license"]
    if license is None and say:
        say("the pack names no license, so its card has none; set one with --license")
    filename = path.name if path.name.endswith(PACK_SUFFIX) else path.name.removesuffix(SUFFIX) + PACK_SUFFIX
    card = pack_card(
        info, filename=filename, repository=None if folder is not None else str(to), base_model=name,
        base_revision=revision, license=license,
    ).encode()  # fmt: skip
    if folder is not None:
        files = _write_folder(folder, path, filename, card, new_card)
        url, commit = str(folder), None
    else:
        done = upload_files(
            str(to), {filename: path, CARD: card}, keep=() if new_card else (CARD,), private=private,
            message=message or f"Add {filename} with darekit",
        )  # fmt: skip
        files, url, commit = done.files, done.url, done.commit
    if CARD not in files and say:
        say(f"{CARD} already exists and was kept; use --new-card to replace it")
    return Pushed(str(to), url, files, info["bytes"], commit)


def pull(
    pack: str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Pulled:
    """Fetch a pack from the Hub or a folder, check it against its own digests, and put it in place.

    Args:
        pack: org/name or org/name/FILE.safetensors on the Hub, perhaps with @revision; or a local folder or file.
        out: the file to write, or a folder for it; the working directory if not given.
        overwrite: replace an existing file.
        progress: called with (bytes checked, bytes in all).

    Returns:
        The file, and what it needs.

    Raises:
        CheckpointError: there is no such pack, or it is damaged.
        OutputError: it cannot be written there.

    Examples:
        >>> packed = dk.pack("base", "math", "math.safetensors", drop_rate=0.9, seed=42)
        >>> pushed = dk.push("math.safetensors", "./share", base_model="org/base")
        >>> pulled = dk.pull("./share", "fetched.safetensors")
        >>> pulled.pack, pulled.base["ref"]
        ('fetched.safetensors', 'base')

        From the Hub, at one commit:

        >>> dk.pull("me/math-pack@1a2b3c4")  # doctest: +SKIP
    """
    path = locate_pack(pack)
    open_pack(path).close()  # what is no pack is no matter of where to put it
    target = Path(out) if out is not None else Path()
    target = target if target.suffix == SUFFIX and not target.is_dir() else target / path.name
    if target.exists() and target.resolve() == path.resolve():
        raise OutputError(
            f"{path} would be copied onto itself: it is here already. Check it with `dare verify {path}`, or name "
            "where the copy should go"
        )
    if target.is_dir():
        raise OutputError(f"{target} is a directory; expected a file, or a folder to write {path.name} in")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists; choose another name, or replace it with --overwrite")
    with open_pack(path) as found:
        faults = found.verify(progress=progress).faults
        info = found.info()
    if faults:
        raise CheckpointError(
            f"{path} is damaged: {faults[0].tensor}: {faults[0].words}. Nothing was written; remove that file and pull "
            "again"
        )
    _copy(path, target)
    return Pulled(str(target), info["bytes"], info["base"], info["tensors"])


def _as_folder(to: str | Path) -> Path | None:
    """The folder that `to` means, None where it is a Hub id."""
    refuse_address(to)
    path = Path(to).expanduser()
    if path.is_file():
        raise OutputError(f"{to} is a file; give a folder, or org/name on the Hub")
    match = HUB_ID.fullmatch(to) if isinstance(to, str) else None
    if isinstance(to, Path) or path.is_dir() or match is None:
        return path
    if match["revision"]:
        raise PlanError(f"{to}: packs are pushed to the main branch; leave out the @ and what follows it")
    return None


def _base_of(info: Mapping[str, Any], base_model: str | None) -> tuple[str | None, str | None]:
    """The base's Hub id and commit, as far as they are known."""
    entry = info["base"]
    if base_model is None:
        found = entry["ref"] if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", entry["ref"], re.ASCII) else None
        return found, entry.get("revision")
    match = HUB_ID.fullmatch(base_model)
    if match is None:
        raise PlanError(f"{base_model!r} is not a Hub id; expected org/name or org/name@commit")
    known = entry.get("revision") if match["repository"] == entry["ref"] else None
    return match["repository"], match["revision"] or known


def _write_folder(folder: Path, pack: Path, filename: str, card: bytes, new_card: bool) -> tuple[str, ...]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        if not (folder / filename).exists() or (folder / filename).resolve() != pack.resolve():
            _copy(pack, folder / filename)
            written.append(filename)
        if new_card or not (folder / CARD).exists():
            (folder / CARD).write_bytes(card)
            written.append(CARD)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error
    return tuple(written)


def _copy(path: Path, target: Path) -> None:
    """A copy that appears when it is whole."""
    hidden = target.with_name(f".{target.name}.darekit-part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, hidden)
        hidden.replace(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            hidden.unlink()
