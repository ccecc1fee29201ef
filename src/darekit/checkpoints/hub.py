# SPDX-License-Identifier: Apache-2.0
"""Models on the Hugging Face Hub, through huggingface_hub's own cache.

Small files come first: an adapter or a quantised model is refused before gigabytes are fetched, and the index says
which files are the weights (repositories often hold them in several formats). HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and
the rest of huggingface_hub's environment mean what they mean there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from darekit.checkpoints import companions
from darekit.checkpoints.documents import read_object
from darekit.checkpoints.quantised.naming import undecoded
from darekit.checkpoints.refusals import (
    ADAPTER_CONFIG,
    ADAPTER_INDEX,
    ADAPTER_WEIGHTS,
    about_adapter,
    quantisation_in,
    refuse_quantised,
    refuse_quantised_names,
)
from darekit.checkpoints.weights import INDEX, SINGLE, read_index
from darekit.errors import CheckpointError, HoldsAdapter, OutputError
from darekit.wording import some

TIMEOUT = 30  # seconds that a server may be silent
HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>.+))?", re.ASCII)
HUB_FILE = re.compile(
    r"(?P<repository>\w[\w.-]*/\w[\w.-]*)/(?P<name>\w[\w.-]*\.safetensors)(?:@(?P<revision>.+))?", re.ASCII
)
VARIANTS = ("*.safetensors.index.*.json", "pytorch_model.bin.index.*.json")  # of indices: fp16
SMALL = (
    companions.CONFIG, companions.CARD, ADAPTER_CONFIG, ADAPTER_INDEX, *INDEX.values(), *VARIANTS,
    *companions.TOKENIZER, *companions.TEMPLATES, *companions.PROCESSOR, *companions.MODEL, *companions.CODE,
)  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """A model's files at one commit, in the local cache; `left`: those beside its weights that stay there, and why."""

    directory: Path
    revision: str
    left: Mapping[str, str] = field(default_factory=dict)


def looks_like_hub_id(ref: str) -> bool:
    """Whether `ref` reads org/name or org/name@revision.

    >>> [looks_like_hub_id(ref) for ref in ("org/name", "org/name@refs/pr/1", "./name", "a/b/c", "~/name", "gpt2")]
    [True, True, False, False, False, False]
    """
    return HUB_ID.fullmatch(ref) is not None


def refuse_address(ref: str | Path) -> None:
    """An address of a web page is no name of a model.

    Raises:
        CheckpointError: `ref` reads https://huggingface.co/org/name.
    """
    match = re.match(r"\w+://[^/]+/(\w[\w.-]*/\w[\w.-]*)", str(ref))
    if match is not None:
        raise CheckpointError(f"{ref} is an address; give the name that the Hub knows it by: {match[1]}")


def fetch_snapshot(ref: str, *, cache: Path | None = None) -> Snapshot:
    """Hub id -> a local directory with its companions and weights; downloads what the cache lacks.

    Raises:
        CheckpointError: there is no such model, no access, no network, or no disk space.
        Unsupported: an adapter or a quantised model, refused before its weights are fetched.
    """
    found = fetch_small(ref, cache=cache)
    directory, commit, repository = found.directory, found.revision, ref.partition("@")[0]
    for patterns in _wanted(directory):
        # With config.json among them a pattern is never without a match, of which huggingface_hub would warn.
        _fetch(ref, repository, commit, cache, (companions.CONFIG, *patterns), partial=False)
        if any(any(directory.glob(pattern)) for pattern in patterns):
            break
    return found


def fetch_small(ref: str, *, cache: Path | None = None) -> Snapshot:
    """Hub id -> a local directory with all but its weights; errors as `fetch_snapshot`."""
    match = HUB_ID.fullmatch(ref)
    if match is None:
        raise CheckpointError(f"{ref!r} is not a Hub id; expected org/name or org/name@revision")
    repository, revision = match["repository"], match["revision"]
    further, left = _further(repository, revision)
    directory = _fetch(ref, repository, revision, cache, (*SMALL, *map(_escaped, further)), partial=True)
    commit = directory.name  # further calls must not see a push that happens meanwhile
    config_path = directory / companions.CONFIG
    if not config_path.exists():  # with one it may be a whole model that keeps its adapter's settings
        if (directory / ADAPTER_CONFIG).exists():
            raise HoldsAdapter(about_adapter(directory), directory)
    elif said := quantisation_in(read_object(config_path, strict=False)):
        _refuse_quantised(ref, repository, directory, said)
    return Snapshot(directory, commit, left)


def fetch_adapter(ref: str, *, cache: Path | None = None) -> Path:
    """Hub id of an adapter -> a local folder with its config and weights; errors as `fetch_snapshot`."""
    match = HUB_ID.fullmatch(ref)
    if match is None:
        raise CheckpointError(f"{ref!r} is not a Hub id; expected org/name or org/name@revision")
    shards = ADAPTER_INDEX, "adapter_model-*-of-*.safetensors"
    patterns = (ADAPTER_CONFIG, *ADAPTER_WEIGHTS, *shards, *companions.TOKENIZER, *companions.TEMPLATES)
    return _fetch(ref, match["repository"], match["revision"], cache, patterns, partial=True)


def weights_on_hub(ref: str, snapshot: Snapshot, wanted: Sequence[Sequence[str]] | None = None) -> dict[str, int]:
    """Names of the files of weights that `fetch_snapshot` would fetch (`wanted`: patterns, best first) -> their bytes.

    Raises:
        CheckpointError: there are none, or the Hub does not say.
    """
    import huggingface_hub

    repository = ref.partition("@")[0]
    try:
        api = huggingface_hub.HfApi()
        siblings = api.model_info(repository, revision=snapshot.revision, files_metadata=True).siblings
    except Exception as error:  # as in _fetch
        raise CheckpointError(
            f"{ref} is not in the local cache, or only in part, and the Hub could not be asked ({_name(error)}). Once "
            f"there is a network, run `hf download {repository}`; or give a local directory"
        ) from error
    sizes = {one.rfilename: one.size or 0 for one in siblings or ()}
    for patterns in _wanted(snapshot.directory) if wanted is None else wanted:
        found = {name: size for name, size in sizes.items() if any(_is_match(name, pattern) for pattern in patterns)}
        if found:
            return found
    raise CheckpointError(
        f"{ref} holds no weights: expected {SINGLE['safetensors']}, or shards with {INDEX['safetensors']}; found "
        f"{some(sorted(sizes)) if sizes else 'an empty repository'}"
    )


def is_cached(snapshot: Snapshot) -> bool:
    """Whether all of a model's weights are in the local cache, as far as what is there can tell."""
    wanted = _wanted(snapshot.directory)
    if len(wanted) == 1:  # an index names them
        return all((snapshot.directory / name).exists() for name in wanted[0])
    return any(any(snapshot.directory.glob(pattern)) for patterns in wanted for pattern in patterns)


def fetch_start(ref: str, snapshot: Snapshot, name: str, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of a file on the Hub, or as many as it has.

    Raises:
        CheckpointError: no network, no access, or a server that gives whole files only.
    """
    import huggingface_hub

    utils: Any = huggingface_hub.utils
    url = huggingface_hub.hf_hub_url(ref.partition("@")[0], name, revision=snapshot.revision)
    try:
        response = utils.get_session().get(
            url, headers={**utils.build_hf_headers(), "range": f"bytes={begin}-{end - 1}"}, timeout=TIMEOUT
        )
        utils.hf_raise_for_status(response)
    except Exception as error:  # as in _fetch
        raise CheckpointError(
            f"{ref}: the header of {name} could not be fetched from the Hub ({_name(error)}). Run again"
        ) from error
    data: bytes = response.content
    return data[: end - begin] if response.status_code == 206 else data[begin:end]


def _further(repository: str, revision: str | None) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Small files that are on no list of companions, by the Hub's own listing; none of them where it cannot be had,
    since without a network what the cache holds is enough."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (), {}
    try:
        siblings = huggingface_hub.HfApi().model_info(repository, revision=revision, files_metadata=True).siblings
    except Exception:  # what is wrong is told by the download that follows
        return (), {}
    sizes = {one.rfilename: one.size or 0 for one in siblings or ()}
    known = [name for name in sizes if any(_is_match(name, pattern) for pattern in SMALL)]
    return companions.travels({name: size for name, size in sizes.items() if name not in known})


def _is_match(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _escaped(name: str) -> str:
    """A pattern that matches this name alone.

    >>> _escaped("a[1]*.txt")
    'a[[]1][*].txt'
    """
    return re.sub(r"([*?[])", r"[\1]", name)


def _refuse_quantised(ref: str, repository: str, directory: Path, said: str) -> None:
    """Look at names and headers of weights that are not here yet; where that cannot be done, they are fetched."""
    import huggingface_hub

    if (directory / INDEX["safetensors"]).exists():
        refuse_quantised_names(list(read_index(directory / INDEX["safetensors"])), said, ref)
        return
    try:
        found = huggingface_hub.HfApi().parse_safetensors_file_metadata(
            repository, SINGLE["safetensors"], revision=directory.name
        )
    except Exception:  # no such file, no network and all in the cache: the weights themselves will tell
        return
    refuse_quantised_names(list(found.tensors), said, ref)
    refuse_quantised(undecoded(found.tensors, ref), said, ref)


def looks_like_hub_file(ref: str) -> bool:
    """Whether `ref` reads org/name/FILE.safetensors, perhaps with @revision.

    >>> [looks_like_hub_file(ref) for ref in ("org/name/m.safetensors", "o/n/m.safetensors@v2", "o/n", "m.safetensors")]
    [True, True, False, False]
    """
    return HUB_FILE.fullmatch(ref) is not None


def fetch_file(ref: str, *, cache: Path | None = None) -> Path:
    """org/name/FILE.safetensors, perhaps with @revision -> the file in the local cache, downloaded where it is not.

    Raises:
        CheckpointError: as `fetch_snapshot`.
    """
    match = HUB_FILE.fullmatch(ref)
    if match is None:
        raise CheckpointError(f"{ref!r} is no file on the Hub; expected org/name/FILE.safetensors")
    directory = _fetch(ref, match["repository"], match["revision"], cache, (match["name"],), partial=False)
    if not (directory / match["name"]).exists():
        raise CheckpointError(f"{match['repository']} on the Hub has no file {match['name']}")
    return directory / match["name"]


@dataclass(frozen=True)
class Upload:
    """What was pushed: the address of the repository and of the commit, and the names of the files in it."""

    url: str
    commit: str
    files: tuple[str, ...]


def upload_files(
    repository: str, files: Mapping[str, Path | bytes], *, keep: Sequence[str], private: bool, message: str
) -> Upload:
    """Put files into a repository on the Hub with one commit; the repository is created where there is none.

    Args:
        repository: org/name.
        files: name there -> the local file, or its content.
        keep: names that are left as they are where they exist.
        private: of a new repository.
        message: of the commit.

    Raises:
        OutputError: no access, no network, or the Hub refuses.
    """
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi()
    try:
        # Without a value an organisation's own default would decide; an existing repository keeps what it is.
        api.create_repo(repository, private=private, exist_ok=True)
        chosen = {n: f for n, f in files.items() if n not in keep or not api.file_exists(repository, n)}
        operations = [huggingface_hub.CommitOperationAdd(name, file) for name, file in chosen.items()]
        done = api.create_commit(repository, operations, commit_message=message)
    except errors.OfflineModeIsEnabled as error:
        raise OutputError(f"{repository} cannot be pushed to: HF_HUB_OFFLINE is set") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        hint = "; run `hf auth login` or set HF_TOKEN, with a token that may write" if status in (401, 403) else ""
        raise OutputError(f"{repository} cannot be pushed to: the Hub says {_name(error)}{hint}") from error
    except Exception as error:  # as in _fetch
        raise OutputError(f"{repository} could not be pushed to ({_name(error)}); nothing was committed") from error
    return Upload(str(done.repo_url), str(done.oid), tuple(chosen))


def _wanted(directory: Path) -> tuple[tuple[str, ...], ...]:
    """What to ask for, best first, until something is there."""
    if (directory / INDEX["safetensors"]).exists():
        return (tuple(sorted(set(read_index(directory / INDEX["safetensors"]).values()))),)
    if any(any(directory.glob(pattern)) for pattern in VARIANTS):
        return ((SINGLE["safetensors"],), (SINGLE["pickle"],), ("*.safetensors",), ("pytorch_model*.bin",))
    return ((SINGLE["safetensors"],), ("*.safetensors",), ("pytorch_model*.bin",))


def _fetch(
    ref: str, repository: str, revision: str | None, cache: Path | None, patterns: tuple[str, ...], *, partial: bool
) -> Path:
    """One call of snapshot_download; `partial`: without network, what the cache has is enough."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, cache_dir=cache, allow_patterns=list(patterns),
            ignore_patterns=_in_folders(patterns),
        )  # fmt: skip
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{ref} is gated: ask for access at https://huggingface.co/{repository}, then run `hf auth login` or set "
            "HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} on the Hub has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{ref} is not on the Hub, or it is private: check the spelling; for a private model run `hf auth login` "
            "or set HF_TOKEN"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        path = getattr(error, "snapshot_path", None)
        if partial and path is not None:
            return Path(path)
        raise CheckpointError(_about_network(ref, repository, revision, incomplete=path is not None)) from error
    except Exception as error:
        # Beneath lie an HTTP client, TLS, a proxy, the disk and a download accelerator, which share no base class.
        raise CheckpointError(
            f"{ref} could not be fetched from the Hub ({_name(error)}). Run again: finished files are kept"
        ) from error
    return Path(found)


def _in_folders(patterns: Sequence[str]) -> list[str]:
    """What `patterns` should not match, though they do: to the Hub's client `*` matches a slash like any character.

    >>> _in_folders(["config.json", "*.py", "templates/*.jinja"])
    ['*/*.py', 'templates/*/*.jinja']
    """
    stars = [(pattern, star.start()) for pattern in patterns for star in re.finditer(r"(?<!\[)\*", pattern)]
    return [f"{pattern[:at]}*/*{pattern[at + 1 :]}" for pattern, at in stars]


def _about_network(ref: str, repository: str, revision: str | None, *, incomplete: bool) -> str:
    from huggingface_hub import constants

    command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    state = "only in part in the local cache" if incomplete else "not in the local cache"
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
    return (
        f"{ref} is {state} ({constants.HF_HUB_CACHE}), and {reason}. Once there is a network, run "
        f"`{command}`; or give a local directory"
    )


def _name(error: Any) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
