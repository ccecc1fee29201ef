# SPDX-License-Identifier: Apache-2.0
"""Models on the Hugging Face Hub, through huggingface_hub's own cache.

Small files come first: an adapter or a quantised model is refused before gigabytes are fetched, and the index says
which files are the weights (repositories often hold them in several formats). HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and
the rest of huggingface_hub's environment mean what they mean there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darekit.checkpoints.documents import read_object
from darekit.checkpoints.weights import INDEX, SINGLE, read_index, refuse_config, refuse_directory
from darekit.errors import CheckpointError

HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>.+))?", re.ASCII)
COMPANIONS = ("*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja")


@dataclass(frozen=True)
class Snapshot:
    """A model's files at one commit, in the local cache."""

    directory: Path
    revision: str


def looks_like_hub_id(ref: str) -> bool:
    """Whether `ref` reads org/name or org/name@revision.

    >>> [looks_like_hub_id(ref) for ref in ("org/name", "org/name@refs/pr/1", "./name", "a/b/c", "~/name", "gpt2")]
    [True, True, False, False, False, False]
    """
    return HUB_ID.fullmatch(ref) is not None


def fetch_snapshot(ref: str, *, cache: Path | None = None) -> Snapshot:
    """Hub id -> a local directory with its companions and weights; downloads what the cache lacks.

    Raises:
        CheckpointError: there is no such model, no access, no network, or no disk space.
        Unsupported: an adapter or a quantised model, refused before its weights are fetched.
    """
    match = HUB_ID.fullmatch(ref)
    if match is None:
        raise CheckpointError(f"{ref!r} is not a Hub id; expected org/name or org/name@revision")
    repository, revision = match["repository"], match["revision"]
    directory = _fetch(ref, repository, revision, cache, COMPANIONS, partial=True)
    commit = directory.name  # further calls must not see a push that happens meanwhile
    config_path = directory / "config.json"
    if not config_path.exists():  # with one it may be a whole model that keeps its adapter's settings
        refuse_directory(directory)
    else:
        refuse_config(read_object(config_path, strict=False), config_path)
    for patterns in _wanted(directory):
        # With config.json among them a pattern is never without a match, of which huggingface_hub would warn.
        _fetch(ref, repository, commit, cache, ("config.json", *patterns), partial=False)
        if any(any(directory.glob(pattern)) for pattern in patterns):
            break
    return Snapshot(directory, commit)


def _wanted(directory: Path) -> tuple[tuple[str, ...], ...]:
    """What to ask for, best first, until something is there."""
    if (directory / INDEX["safetensors"]).exists():
        return (tuple(sorted(set(read_index(directory / INDEX["safetensors"]).values()))),)
    return ((SINGLE["safetensors"],), ("*.safetensors",), ("pytorch_model*.bin",))


def _fetch(
    ref: str, repository: str, revision: str | None, cache: Path | None, patterns: tuple[str, ...], *, partial: bool
) -> Path:
    """One call of snapshot_download; `partial`: without network, what the cache has is enough."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, cache_dir=cache, allow_patterns=list(patterns), ignore_patterns=["*/*"]
        )
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


def _about_network(ref: str, repository: str, revision: str | None, *, incomplete: bool) -> str:
    from huggingface_hub import constants

    command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    state = "only in part in the local cache" if incomplete else "not in the local cache"
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
    return (
        f"{ref} is {state} ({constants.HF_HUB_CACHE}), and {reason}. With a network run `{command}`; or give a local "
        "directory"
    )


def _name(error: Any) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
