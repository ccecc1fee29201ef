# SPDX-License-Identifier: Apache-2.0
"""How an output appears: written out of sight, journaled, and put in its place only when it is complete.

The stage of `models/merged` is the hidden sibling `models/.merged.darekit-stage`::

    lock            held by the one run that may write here
    journal.jsonl   first line: the identity of the run; then one line per finished tensor
    files/          what will become OUT (`Stage.path`)
    trash/          a replaced output on its way out; always garbage

Publishing is one rename of `files/`. An OUT that is replaced is first moved aside to `.merged.darekit-old`, which
is therefore always complete: a run killed in between leaves it there, and the next `open_stage` puts it back.

An OUT that cannot be renamed (a mount point, or in a parent without write permission) is staged in
`OUT/.darekit-stage` and published file by file, `config.json` last. A `publishing.json` in the stage, written once
all files are complete and synced, makes the next `open_stage` finish what a killed run began.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from darekit.checkpoints.companions import MODULE, MODULES
from darekit.errors import OutputError
from darekit.wording import some

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

INSIDE = ".darekit-stage"  # the stage of an OUT that cannot be renamed

NOT_OURS = (INSIDE, "lost+found")  # entries of an OUT that is nevertheless empty, and that are never deleted

# Of the journal's first line, and of what `darekit.output.lock.identity` puts there; raised whenever either changes. A
# run begun under another number is not resumed.
FORMAT = 3

LAST = ("model.safetensors.index.json", "config.json")  # what makes a directory loadable, in order of appearance


@dataclass(frozen=True)
class Place:
    """Where one output and its stage lie."""

    out: Path
    root: Path
    inside: bool

    @property
    def files(self) -> Path:
        """What will become OUT."""
        return self.root / "files"

    @property
    def journal(self) -> Path:
        """The identity of the run and its finished tensors."""
        return self.root / "journal.jsonl"

    @property
    def lock(self) -> Path:
        """Held while a run lasts."""
        return self.root / "lock"

    @property
    def trash(self) -> Path:
        """Garbage, whatever it holds."""
        return self.root / "trash"

    @property
    def marker(self) -> Path:
        """Present while the files of a complete output are moved one by one."""
        return self.root / "publishing.json"

    @property
    def old(self) -> Path:
        """An output that is about to be replaced, always complete."""
        return self.out.with_name(f".{self.out.name}.darekit-old")


@dataclass(frozen=True)
class Guard:
    """What may be replaced: nothing without `overwrite`, and never what holds one of `inputs`."""

    overwrite: bool
    inputs: tuple[Path, ...]


class Stage:
    """An output that nobody sees yet; use it in a `with` statement and `publish` it.

    Leaving the `with` statement without `publish`, or dying, leaves OUT untouched and the stage where it is.

    Attributes:
        path: the directory to write the files in.
        finished: what the journal of a resumed run holds: tensor name -> record. Empty for a new run.
        notes: lines worth telling the user.
        complete: OUT is what this run would write, and nothing is left to do: `discard` the stage.
    """

    def __init__(
        self,
        place: Place,
        lock: Lock,
        guard: Guard,
        finished: Mapping[str, dict[str, Any]],
        notes: list[str],
        complete: bool = False,
    ) -> None:
        self.path = place.files
        self.finished = finished
        self.notes = notes
        self.complete = complete
        self._place = place
        self._lock = lock
        self._guard = guard
        self._pending: list[bytes] = []
        self._pending_lock = threading.Lock()
        self._flush_lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def record(self, name: str, record: Mapping[str, Any]) -> None:
        """Remember that a tensor's bytes are written; nothing is on disk before the next `flush`."""
        line = json.dumps({"name": name, "record": dict(record)}).encode() + b"\n"
        with self._pending_lock:
            self._pending.append(line)

    def forget(self, names: Sequence[str]) -> None:
        """Finished tensors of a resumed run that are not there any more, for this run and all that follow.

        Raises:
            OutputError: the journal cannot be written.
        """
        if not names:
            return
        lines = [json.dumps({"name": name, "record": None}).encode() for name in names]
        try:
            _append(self._place.journal, b"\n" + b"\n".join(lines) + b"\n")
        except OSError as error:
            raise OutputError(_told(f"cannot write {self._place.journal}", error)) from error
        self.finished = {name: record for name, record in self.finished.items() if name not in names}

    def flush(self, sync: Callable[[], None]) -> None:
        """Journal what was recorded so far; `sync` must bring the weight files themselves to the disk."""
        with self._flush_lock:
            # Taken BEFORE the sync: a tensor recorded while it runs may not be covered by it.
            with self._pending_lock:
                lines, self._pending = self._pending, []
            if not lines:
                return
            try:
                sync()
                # The first newline ends whatever a kill or a full disk tore.
                _append(self._place.journal, b"\n" + b"".join(lines))
            except BaseException as error:
                with self._pending_lock:
                    self._pending[:0] = lines
                if isinstance(error, OSError):
                    raise OutputError(_told(f"cannot bring {self._place.root} to the disk", error)) from error
                raise

    def discard(self) -> None:
        """Give the unfinished output up: nothing of it is left, and no --resume can continue it."""
        with contextlib.suppress(OSError):  # whatever made the run fail is what the user should read
            _discard(self._place)
            _remove_root(self._place)

    @property
    def root(self) -> Path:
        """The directory that holds the unfinished files."""
        return self._place.root

    def publish(self) -> None:
        """Put the complete files in their place, all at once, and remove the stage.

        Raises:
            OutputError: OUT changed while the run lasted, or cannot be renamed. The files stay in `path`.
        """
        place = self._place
        try:
            # The run may have lasted an hour: OUT may hold something now that was not there when it began.
            _check_out(place, self._guard)
            _sync_tree(place.files)
            if place.inside:
                _mark(place)
                _move_files(place)
            else:
                _swap(place)
        except OSError as error:
            raise OutputError(
                f"{_told(f'cannot put the output in place at {place.out}', error)}. Its complete files are in "
                f"{place.root}; fix the cause and run again with --resume, or move them yourself"
            ) from error
        except OutputError as error:
            raise OutputError(f"{error}. The complete files are in {place.root}") from error
        try:
            _discard(place)
            _remove_root(place)
        except OSError as error:
            self.notes.append(_told(f"{place.out} is complete, but its stage could not be removed", error))


def open_stage(
    out: Path,
    *,
    identity: Mapping[str, Any],
    times: Mapping[str, Any] | None = None,
    overwrite: bool,
    resume: bool,
    inputs: Sequence[Path],
    is_complete: Callable[[Path], bool] = lambda out: False,
) -> Stage:
    """Lock OUT for this run, repair what a killed run left, and begin or resume a stage.

    Args:
        out: where the output goes.
        identity: JSON-able: all that the output's bytes depend on; a run is only resumed under an equal one.
        times: JSON-able: `machine`, a name, and `changed`, path -> time of last change. On the machine of that name a
            run is only resumed if no path has another time now.
        overwrite: whether OUT may be replaced.
        resume: whether an unfinished run is continued; else it is discarded.
        inputs: the files or directories that an `overwrite` must not replace.
        is_complete: whether OUT, which exists, is what this run would write; asked where there is nothing unfinished
            that could be resumed.

    Raises:
        OutputError: OUT exists and may not be replaced, another run writes it, or the run to be resumed is another.
    """
    place = _locate(out)
    guard = Guard(overwrite, tuple(inputs))
    try:
        lock = _acquire(place)
        try:
            notes = _repair(place)
            if resume and not place.files.is_dir() and place.out.is_dir() and is_complete(place.out):
                return Stage(place, lock, guard, {}, notes, complete=True)
            try:
                _check_out(place, guard)
            except OutputError as error:
                raise OutputError(". ".join([*notes, str(error)])) from None
            header = Header(json.loads(json.dumps(identity)), json.loads(json.dumps(times or {})))
            finished = _begin(place, header, resume, notes)
        except BaseException:
            # Only an empty stage goes: one with files in it is somebody's hour of work.
            if {path.name for path in place.root.iterdir()} <= {place.lock.name}:
                _remove_root(place)
            lock.close()
            raise
    except OSError as error:
        raise OutputError(_told(f"cannot write beside {place.out}", error)) from error
    return Stage(place, lock, guard, finished, notes)


@contextlib.contextmanager
def open_brief_stage(
    out: Path,
    *,
    identity: Mapping[str, Any],
    overwrite: bool,
    inputs: Sequence[Path],
    say: Callable[[str], None] | None,
) -> Iterator[Stage]:
    """A stage of work that is not worth resuming: where it fails, nothing of it is left. `say` receives its notes.

    Raises:
        OutputError: as in `open_stage`; or OUT cannot be written.
    """
    with open_stage(out, identity=identity, overwrite=overwrite, resume=False, inputs=inputs) as stage:
        if say:
            for note in stage.notes:
                say(note)
        try:
            yield stage
        except OSError as error:
            stage.discard()
            raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error
        except BaseException:
            stage.discard()
            raise


def refuse_taken(out: Path) -> None:
    """Look at OUT before there is anything to write.

    Raises:
        OutputError: OUT exists and may not be replaced.
    """
    _check_out(_locate(out), Guard(False, ()))


# Where


def _locate(out: Path) -> Place:
    out = out.expanduser().resolve()  # the target of a symlink, never the link: a rename would replace the link
    if not out.name:
        raise OutputError(f"{out} is the root of a file system: expected a directory of its own for the output")
    inside = out / INSIDE
    try:
        exists = out.is_dir()
    except OSError as error:  # a name that is too long
        raise OutputError(f"{out} cannot be a directory: {error.strerror or error}; choose another OUT") from error
    if exists and (os.path.ismount(out) or not os.access(out.parent, os.W_OK | os.X_OK) or inside.is_dir()):
        return Place(out, inside, True)
    return Place(out, out.with_name(f".{out.name}.darekit-stage"), False)


def _entries(place: Place) -> list[str]:
    """What OUT holds, not counting what is no output; empty where OUT does not exist."""
    if not place.out.is_dir():
        return []
    return sorted(path.name for path in place.out.iterdir() if path.name not in NOT_OURS)


# What must not be replaced


def _check_out(place: Place, guard: Guard) -> None:
    out = place.out
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file: expected a new or empty directory for the output; choose another OUT")
    found = _entries(place)
    if not found:
        if not place.inside and _holds(out, Path.cwd()):
            raise OutputError(f"{out} is the current directory: name a directory in it, or run from elsewhere")
        return
    if not guard.overwrite:
        raise OutputError(
            f"{out} exists and is not empty ({some(found)}): expected a new or empty directory; choose another OUT, "
            f"or let --overwrite replace it once the new output is complete"
        )
    reason = _reason_to_keep(out, found, guard.inputs)
    if reason:
        raise OutputError(
            f"--overwrite does not replace {out}, because it {reason}; choose another OUT, or remove it yourself"
        )


def _reason_to_keep(out: Path, found: Sequence[str], inputs: Sequence[Path]) -> str | None:
    for what, path in (
        ("holds the current directory", Path.cwd()),
        ("holds your home directory", Path(os.path.expanduser("~"))),  # noqa: PTH111 (pathlib's raises without a home)
        *((f"holds the input {path}", path) for path in inputs),
        # A checkpoint may be a directory of links, as in the Hub's cache: what they point to is input as well.
        *((f"holds {path}, an input", path) for top in inputs if top.is_dir() for path in top.iterdir()),
    ):
        if _holds(out, path):
            return what
    if not _is_model(out):
        return f"does not look like a model (no config.json, *.safetensors or darekit.lock.json among {some(found)})"
    if ".git" in found:
        return "is a git repository"
    folders = (path for path in sorted(out.iterdir()) if path.is_dir() and _is_model(path))
    nested = next((path.name for path in folders if MODULES not in found or not MODULE.fullmatch(path.name)), None)
    return f"holds another model in {nested}/" if nested else None


def _is_model(path: Path) -> bool:
    names = [entry.name for entry in path.iterdir()]
    known = ("config.json", "darekit.lock.json", "patches.json")  # the last: an export without a single patch
    return any(name in known or name.endswith(".safetensors") for name in names)


def _holds(directory: Path, path: Path) -> bool:
    """Whether `path` is `directory` or lies in it; by inode, since case-insensitive systems have many names."""
    wanted = directory.stat()
    path = path.resolve()
    for above in (path, *path.parents):
        with contextlib.suppress(OSError):
            if os.path.samestat(wanted, above.stat()):
                return True
    return False


# One run per OUT


class Lock:
    """A held lock file."""

    def __init__(self, descriptor: int, exclusive_file: Path | None) -> None:
        self._descriptor: int | None = descriptor
        self._exclusive_file = exclusive_file

    def close(self) -> None:
        """Let the next run in."""
        if self._descriptor is not None:
            if self._exclusive_file is not None:
                self._exclusive_file.unlink(missing_ok=True)
            elif fcntl is not None:
                with contextlib.suppress(OSError):  # closing alone leaves it to a process that was forked meanwhile
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None


def _acquire(place: Place) -> Lock:
    if place.root.is_symlink():
        raise OutputError(f"{place.root} is a symbolic link: expected the stage of a run; remove the link")
    while True:
        place.root.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(place.lock, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # a run that ended has just removed its stage
            continue
        try:
            lock = _lock_file(place, descriptor)
            # The file that was locked may be the one that an ending run has just unlinked: then it guards nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), place.lock.stat()):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, str(os.getpid()).encode())
                    return lock
            lock.close()
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise


def _lock_file(place: Place, descriptor: int) -> Lock:
    exclusive = place.lock.with_name("lock.exclusive")
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, "no flock here")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Lock(descriptor, None)
    except BlockingIOError:
        pid = place.lock.read_text(errors="replace").strip()
        raise OutputError(
            f"{place.out} is being written by another run{f' (process {pid})' if pid else ''}: expected one run per "
            f"output; wait for it, or choose another OUT"
        ) from None
    except OSError as error:  # a file system (or Windows) without flock: a file that only one can create
        if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK):
            raise
    try:
        os.close(os.open(exclusive, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        pid = place.lock.read_text(errors="replace").strip()
        raise OutputError(
            f"{place.out} is being written by another run{f' (process {pid})' if pid else ''}; if that process is no "
            f"longer running (this file system cannot tell), delete {exclusive}"
        ) from None
    return Lock(descriptor, exclusive)


# What a killed run left


def _repair(place: Place) -> list[str]:
    notes = []
    if place.marker.exists():
        _move_files(place)
        _discard(place)
        notes.append(f"the last run was killed while moving its complete output to {place.out}: finished the move")
    if os.path.lexists(place.old):
        if not place.out.exists() or not any(place.out.iterdir()):
            place.old.rename(place.out)
            notes.append(f"the last run was killed while replacing {place.out}: put the old output back")
        elif not place.files.exists():
            place.old.rename(_room(place.trash))
            notes.append(f"the last run was killed after replacing {place.out}: deleted the old output")
        else:
            raise OutputError(
                f"{place.old} is an output that a killed run was about to replace, but something else has made "
                f"{place.out} since: expected only one of them; remove or rename one"
            )
        _sync_directory(place.out.parent)
    return notes


@dataclass(frozen=True)
class Header:
    """The first line of a journal: what a run is, and when its inputs were last changed; see `open_stage`."""

    identity: dict[str, Any]
    times: dict[str, Any]

    def changes(self, now: Header) -> list[str]:
        """What makes today's run another one."""
        found = list(_changes(self.identity, now.identity)) if self.identity != now.identity else []
        if self.times.get("machine") == now.times.get("machine"):
            before, after = self.times.get("changed", {}), now.times.get("changed", {})
            rewritten = [path for path in before if path in after and before[path] != after[path]]
            found += [f"{path} has been written to since" for path in rewritten]
        return found


def _begin(place: Place, header: Header, resume: bool, notes: list[str]) -> Mapping[str, dict[str, Any]]:
    """Open the journal of an unfinished run, or discard it and begin a new one."""
    version, before, finished = _read_journal(place.journal) if place.files.is_dir() else (None, None, {})
    if resume and version is not None and version != FORMAT:
        whose = "an earlier" if version < FORMAT else "a later"
        raise OutputError(
            f"the unfinished run in {place.root} cannot be resumed, because {whose} version of darekit began it (its "
            f"journal has format {version}, this version resumes format {FORMAT}); resume it with that version, or run "
            f"without --resume to discard its {len(finished)} finished tensors"
        )
    if resume and before is not None:
        changes = before.changes(header)
        if changes:
            raise OutputError(
                f"the unfinished run in {place.root} cannot be resumed, because it is not the same run "
                f"({'; '.join(changes)}); undo the change, or run without --resume to discard its {len(finished)} "
                "finished tensors"
            )
        notes.append(f"resuming: {len(finished)} tensors are done")
        return finished
    if finished:
        told = "its identity cannot be read" if resume else "--resume would have continued it"
        notes.append(f"discarded an unfinished run ({len(finished)} tensors done); {told}")
    elif resume:
        notes.append(f"no unfinished run of {place.out} to resume: starting from the beginning")
    _discard(place)
    place.files.mkdir()
    _append(place.journal, json.dumps({"format": FORMAT, **asdict(header)}).encode() + b"\n")
    _sync_directory(place.root)
    return {}


def _read_journal(path: Path) -> tuple[int | None, Header | None, dict[str, dict[str, Any]]]:
    """The journal's format, its header (None if it cannot be read) and the finished tensors; unreadable lines are work
    to be redone."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    header = next(_parsed(lines[:1]), {})
    version, identity, times = header.get("format"), header.get("identity"), header.get("times")
    if (
        type(version) is not int
        or not isinstance(identity, dict)
        or (version == FORMAT and not isinstance(times, dict))
    ):
        return None, None, {}
    finished: dict[str, dict[str, Any]] = {}
    for line in _parsed(lines[1:]):
        name, record = line.get("name"), line.get("record", False)
        if isinstance(name, str) and isinstance(record, dict):
            finished[name] = record
        elif isinstance(name, str) and record is None:  # lost since
            finished.pop(name, None)
    return version, Header(identity, times or {}), finished


def _parsed(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                yield value


# Into its place, and away


def _swap(place: Place) -> None:
    """One rename; two where an output is replaced."""
    replaces = bool(_entries(place))
    if replaces:
        place.out.rename(place.old)
    try:
        place.files.rename(place.out)
    except OSError:
        if replaces:
            place.old.rename(place.out)
        raise
    _sync_directory(place.out.parent)
    if replaces:
        place.old.rename(_room(place.trash))


def _mark(place: Place) -> None:
    """From here on the new output is the one that will be there, even after a kill."""
    new = {path.name for path in place.files.iterdir()}
    stale = [name for name in _entries(place) if name not in new]
    draft = place.marker.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    _append(draft, json.dumps({"stale": stale}).encode())
    draft.rename(place.marker)
    _sync_directory(place.root)


def _move_files(place: Place) -> None:
    """File by file; may be begun again at any point. Nothing half-done has a config.json."""
    stale = json.loads(place.marker.read_bytes())["stale"]
    new = sorted(
        (path for path in place.files.iterdir()) if place.files.is_dir() else (),
        key=lambda path: (LAST.index(path.name) + 1 if path.name in LAST else 0, path.suffix != ".safetensors", path),
    )
    for name in reversed(LAST):
        if name in stale or (place.files / name).exists():
            _remove(place.out / name)
    for name in stale:
        _remove(place.out / name)
    for source in new:
        target = place.out / source.name
        if source.name in LAST:
            _sync_directory(place.out)  # the weights first, on the disk too
        if target.is_dir():
            _remove(target)
        source.replace(target)
    _sync_directory(place.out)


def _discard(place: Place) -> None:
    """Empty the stage, but for its lock. The journal goes first: it must never promise tensors that are gone."""
    for path in (place.journal, place.marker, place.files, place.trash):
        _remove(path)


def _remove_root(place: Place) -> None:
    # Unlinked while it is held: whoever opened it meanwhile sees that it is no longer the lock (`_acquire`).
    for name in (place.lock.name, place.marker.with_suffix(".draft").name, "lock.exclusive"):
        (place.root / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: the next run has already begun in it
        place.root.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _room(path: Path) -> Path:
    _remove(path)
    return path


# Onto the disk


def _append(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_dir():
            _sync_directory(path)
        elif path.is_file():
            with path.open("r+b" if os.name == "nt" else "rb") as file:  # Windows flushes only what may be written
                os.fsync(file.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# In words


def _told(what: str, error: OSError) -> str:
    hints = {
        errno.ENOSPC: "the disk is full: free some space, then run again with --resume",
        errno.EDQUOT: "the disk quota is used up: free some space, then run again with --resume",
        errno.EBUSY: "it is in use, perhaps as a mount point: choose a directory in it",
        errno.EXDEV: "it is on another file system than its parent: choose a directory in it",
    }
    where = f" ({error.filename})" if error.filename else ""
    return f"{what}: {error.strerror or error}{where}" + (f"; {hints[error.errno]}" if error.errno in hints else "")


def _changes(before: Any, after: Any, at: str = "") -> Iterator[str]:
    """Where two JSON documents differ, as "recipe.sparsify.seed: 0 -> 5"."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            if before.get(key) != after.get(key):
                yield from _changes(before.get(key), after.get(key), f"{at}.{key}" if at else str(key))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            if old != new:
                yield from _changes(old, new, f"{at}.{i}")
    else:
        yield f"{at}: {_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}"
