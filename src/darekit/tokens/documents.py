# SPDX-License-Identifier: Apache-2.0
"""The files of a tokenizer to which tokens were added, written as data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from darekit.checkpoints import companions
from darekit.checkpoints.companions import Companions, Content
from darekit.checkpoints.tokenizers import ADDED, CONFIG, FLAGS, AddedToken, read_json
from darekit.errors import PlanError
from darekit.tokens.joining import Joined

FAST = "tokenizer.json"

# Of tokenizers without the library `tokenizers`: right only as long as none of their tokens is removed.
_SLOW = (*companions.SENTENCEPIECE, "vocab.json", "merges.txt", "vocab.txt", "*.tiktoken", "tekken.json")


def rewritten(ref: str, beside: Companions, joined: Joined) -> dict[str, Content]:
    """The files of the owner's tokenizer, with the tokens that were added and without those that have no row.

    Args:
        ref: the owner, for errors.
        beside: its companion files.
        joined: the tokens.

    Raises:
        PlanError: there is no tokenizer.json, or a loader would number the tokens of the new one otherwise.
    """
    files = companions.matching(beside, companions.TOKENIZER)
    if FAST not in files:
        found = ", ".join(files) or "no tokenizer at all"
        raise PlanError(
            f"{ref} has {found} and no {FAST}, without which no tokens can be added to its tokenizer. Write one, and "
            'run again: python -c "from transformers import AutoTokenizer; '
            f'AutoTokenizer.from_pretrained({ref!r}).save_pretrained({ref!r})"'
        )
    document = json.loads(companions.content_of(files[FAST]).decode("utf-8"))
    removed = frozenset(joined.removed)
    ordinary = _remove(document, removed)
    document["added_tokens"] = _with_added(document.get("added_tokens") or (), joined, removed)
    _refuse_renumbered(ref, document, joined)
    made: dict[str, Content] = dict(files)
    made[FAST] = _text(document)
    changed = [*(entry.token for entry in joined.new), *joined.marked]
    config = read_json(beside, CONFIG)
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        kept = {at: entry for at, entry in decoder.items() if entry.get("content") not in removed}
        kept |= {str(token.id): {"content": token.content, **_flags(token)} for token in changed}
        ordered = dict(sorted(kept.items(), key=lambda entry: int(entry[0])))
        made[CONFIG] = _text({**config, "added_tokens_decoder": ordered})
    if ADDED in files:
        legacy = {token: at for token, at in read_json(beside, ADDED).items() if token not in removed}
        made[ADDED] = _text(legacy | {token.content: token.id for token in changed})
    if ordinary:
        made = {name: content for name, content in made.items() if not companions.matching({name: content}, _SLOW)}
    return made


def _remove(document: dict[str, Any], removed: frozenset[str]) -> bool:
    """Take tokens out of the vocabulary, and the merges that make them; whether there were any."""
    model = document["model"]
    vocabulary = model["vocab"]
    kept: Any = {token: at for token, at in _pairs(vocabulary) if token not in removed}
    if isinstance(vocabulary, list):  # Unigram: the place is the id, and what has no row is at the end
        kept = [entry for entry in vocabulary if entry[0] in kept]
    if len(kept) == len(vocabulary):
        return False
    model["vocab"] = kept
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not _pieces(merge) & removed]
    return True


def _pairs(vocabulary: Any) -> Iterable[tuple[str, int]]:
    """Tokens and ids of a model's vocabulary; of Unigram it is a list of tokens with scores."""
    if isinstance(vocabulary, dict):
        return vocabulary.items()
    return ((token, at) for at, (token, _) in enumerate(vocabulary))


def _pieces(merge: Any) -> set[str]:
    """The two tokens that a merge joins, and what they become."""
    one, other = merge.split(" ", 1) if isinstance(merge, str) else merge
    return {one, other, one + other}


def _with_added(entries: Sequence[Mapping[str, Any]], joined: Joined, removed: frozenset[str]) -> list[dict[str, Any]]:
    """The entries that there are, and those of added tokens that stand elsewhere or are new."""
    kept = [dict(entry) for entry in entries if entry.get("content") not in removed]
    there = {entry.get("content") for entry in kept}
    kept += [{"id": t.id, "content": t.content, **_flags(t)} for t in joined.added if t.content not in there]
    return sorted(kept, key=lambda entry: int(entry["id"]))


def _flags(token: AddedToken) -> dict[str, bool]:
    return {flag: flag in token.flags for flag in FLAGS}


def _refuse_renumbered(ref: str, document: Mapping[str, Any], joined: Joined) -> None:
    """The library `tokenizers` gives an added token the id that it has in the vocabulary, else the next one: it does
    not read the ids in the file."""
    vocabulary = dict(_pairs(document["model"]["vocab"]))
    last = -1
    for entry in document["added_tokens"]:
        token = entry["content"]
        at = vocabulary.get(token, last + 1 if last >= len(vocabulary) else len(vocabulary))
        last = max(last, at)
        if at != joined.ids.get(token):
            raise PlanError(
                f"{FAST} of {ref} numbers its tokens with gaps, so that a loader would give the added token {token!r} "
                f"the id {at} instead of {joined.ids.get(token)}: take the tokens of another model (tokenizer_source)"
            )


def _text(document: Any) -> bytes:
    # No indent: with one, Python's slow encoder writes a vocabulary of 150,000 tokens.
    return (json.dumps(document, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
