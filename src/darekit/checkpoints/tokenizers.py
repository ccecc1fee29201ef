# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tokenizer as data: vocabulary, added tokens, special tokens, chat templates.

Whatever its files are (tokenizer.json, SentencePiece, WordPiece, byte-level BPE, Tekken, tiktoken), what they mean can
be compared: two tokenizers are the same if their contents are, however the files were written. No tokenizer is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

from darekit.checkpoints import companions
from darekit.checkpoints.checkpoint import Checkpoint
from darekit.checkpoints.companions import Companions, content_of
from darekit.checkpoints.vocabularies import Json, pieces_of, ranks_of, tekken_of, vocabulary_of_lines
from darekit.machine import without_collector

CONFIG = "tokenizer_config.json"
LEGACY = "special_tokens_map.json"
ADDED = "added_tokens.json"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
# What tokenizer_config.json may say of how text is cut; padding, lengths and classes do not change a token.
BEHAVIOUR = ("add_bos_token", "add_eos_token", "do_lower_case", "add_prefix_space", "split_special_tokens")
UNLIKE = ("add_bos_token", "do_lower_case")  # of these, those whose default depends on the class
EMPTY: tuple[Any, ...] = ("", [], {})
UNSAID = ("use_regex", "trim_offsets", "add_prefix_space", "prepend_scheme")  # spelled in other ways over the years
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# How each calls its steps, where it is a sequence; and a template that adds no token to one text, or to two.
SEQUENCES = dict(zip(PARTS, ("normalizers", "pretokenizers", "processors", "decoders"), strict=True))
ALONE, SECOND = [{"Sequence": {"id": "A", "type_id": 0}}], [{"Sequence": {"id": "B", "type_id": 1}}]


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in text before anything else. `flags`: those of `FLAGS` that are set."""

    content: str
    id: int
    flags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Tokenizer:
    """What a tokenizer's files say.

    Attributes:
        form: which kind of files it was read from, one of `FORMS`.
        vocabulary: token -> id, the added tokens too; tokens are spelled as in the files.
        added: the added tokens, by id.
        roles: special tokens by role (`eos_token`), as far as the files name them.
        templates: chat templates by name; the usual one is called "default".
        parts: digests of what else decides how text is cut (`merges`, `normalizer`, ...), by name.
        fault: why the vocabulary could not be read; None where it could.
    """

    form: str
    vocabulary: Mapping[str, int] = field(repr=False)
    added: tuple[AddedToken, ...] = field(repr=False)
    roles: Mapping[str, str]
    templates: Mapping[str, str] = field(repr=False)
    parts: Mapping[str, str] = field(repr=False)
    fault: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, form: str | None = None) -> Tokenizer | None:
        """The tokenizer beside a checkpoint's weights; None where there is none.

        Args:
            checkpoint: of whichever kind; only its companions are read.
            form: one of `forms_of`, where its files are of several forms; the one that transformers prefers if None.
        """
        return read_tokenizer(checkpoint.companions, form)

    @property
    def template(self) -> str | None:
        """The chat template that is used where none is named."""
        return self.templates.get("default")

    @property
    def size(self) -> int:
        """Rows that an embedding needs: one more than the largest id."""
        return 1 + max(self.vocabulary.values(), default=-1)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Role -> id, as `eos_token_id` -> 2, of the special tokens that are in the vocabulary."""
        return {f"{role}_id": self.vocabulary[token] for role, token in self.roles.items() if token in self.vocabulary}

    @cached_property
    def tokens_digest(self) -> str:
        """Of all tokens and their ids, and of which are added. Equal: rows mean the same."""
        return _digest([sorted(self.vocabulary.items()), sorted(token.content for token in self.added)])

    @cached_property
    def digest(self) -> str:
        """Of all that it says: equal for files that say the same in another order or layout."""
        templates = {name: template.rstrip() for name, template in self.templates.items()}
        return _digest([self.tokens_digest, self._flags, dict(self.roles), templates, dict(self.parts)])

    @cached_property
    def _flags(self) -> str:
        return _digest(sorted((token.content, sorted(token.flags)) for token in self.added))

    def summary(self) -> Summary:
        """What is left without the tokens themselves."""
        return Summary(
            self.form, self.size, self.tokens_digest, self._flags, self.roles, self.templates, self.parts, self.fault
        )

    def keeps(self, tokens: Sequence[str]) -> bool:
        """Whether each of these is an added token here, so that no text that holds it splits it."""
        own = {token.content for token in self.added}
        return all(token in own for token in tokens)

    def tokens_in(self, template: str) -> list[str]:
        """The added tokens that a chat template writes, longest first."""
        found = [token.content for token in self.added if len(token.content) > 1 and token.content in template]
        return sorted(found, key=lambda content: (-len(content), content))


@dataclass(frozen=True)
class Summary:
    """A tokenizer without its tokens: small, and all that it takes to say whether two are the same."""

    form: str
    size: int
    tokens: str
    flags: str
    roles: Mapping[str, str]
    templates: Mapping[str, str] = field(repr=False)
    parts: Mapping[str, str] = field(repr=False)
    fault: str | None = None


@dataclass(frozen=True)
class Difference:
    """In what two tokenizers differ; an empty one is false.

    Attributes:
        tokens: that only one of them has, or that have other ids, lowest id first.
        roles: special tokens that are others: role -> (this, that).
        parts: names of what else is other: `added tokens`, `merges`, `normalizer`, ...
        template: whether the chat templates are others.
    """

    tokens: tuple[str, ...] = ()
    roles: Mapping[str, tuple[str | None, str | None]] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    template: bool = False

    def __bool__(self) -> bool:
        return bool(self.tokens or self.roles or self.parts or self.template)


def difference(one: Tokenizer, other: Tokenizer) -> Difference:
    """In what two tokenizers differ.

    A role or a part of which one of them says nothing is no difference: what holds then stands in a class of
    transformers.
    """
    return _difference(one.summary(), other.summary(), lambda: tokens_apart(one, other))


def compare(one: Companions, other: Companions) -> Difference:
    """In what the tokenizers among two models' files differ, read in a form that both have; those without a tokenizer
    differ in nothing. Vocabularies of equal bytes are not even parsed, and what was found is remembered."""
    first, second = files_digest(one), files_digest(other)
    if first is None or second is None or first == second:
        return Difference()
    return _compared(_Files(one, first), _Files(other, second))


@lru_cache(maxsize=64)
def _compared(one: _Files, other: _Files) -> Difference:
    if _core_digest(one.beside) == _core_digest(other.beside):  # saved again, perhaps with another template
        return _difference(_shell(one.beside), _shell(other.beside), tuple)
    forms = [form for form in forms_of(one.beside) if form in forms_of(other.beside)]
    form = forms[0] if forms else None
    a, b = read_tokenizer(one.beside, form), read_tokenizer(other.beside, form)
    return Difference() if a is None or b is None else difference(a, b)


def _core_digest(beside: Companions) -> str:
    """Of the bytes that make a vocabulary, and of the tokens that tokenizer_config.json adds to it."""
    core = [name for name in companions.matching(beside, companions.TOKENIZER) if name not in (CONFIG, LEGACY)]
    added = read_json(beside, CONFIG).get("added_tokens_decoder")
    return _digest([files_digest({name: beside[name] for name in core}), added])


def _shell(beside: Companions) -> Summary:
    """All but the vocabulary."""
    config = read_json(beside, CONFIG)
    return Summary("", 0, "", "", _roles(beside, config), chat_templates(beside), _behaviour(config))


def tokens_apart(one: Tokenizer, other: Tokenizer) -> tuple[str, ...]:
    """Tokens that only one of two tokenizers has, that have other ids, or that only one never cuts; lowest id first."""
    tokens = {token for token, _ in one.vocabulary.items() ^ other.vocabulary.items()}
    tokens |= {token.content for token in one.added} ^ {token.content for token in other.added}
    ids = {**other.vocabulary, **one.vocabulary}
    return tuple(sorted(tokens, key=lambda token: (ids.get(token, -1), token)))


def _difference(one: Summary, other: Summary, apart: Callable[[], tuple[str, ...]]) -> Difference:
    tokens = () if one.tokens == other.tokens else apart()
    roles = {
        role: (one.roles[role], other.roles[role])
        for role in ROLES
        if role in one.roles and role in other.roles and one.roles[role] != other.roles[role]
    }
    parts = [name for name in one.parts if other.parts.get(name, one.parts[name]) != one.parts[name]]
    if one.tokens == other.tokens and one.flags != other.flags and one.form == other.form:
        parts.append("flags of added tokens")
    return Difference(tokens, roles, tuple(parts), not same_templates(one.templates, other.templates))


def same_templates(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether chat templates are the same, but for the blank ends that only some files keep."""
    return {k: v.rstrip() for k, v in one.items()} == {k: v.rstrip() for k, v in other.items()}


def forms_of(beside: Companions) -> list[str]:
    """The forms in which the files hold a tokenizer, first the one that transformers prefers."""
    return [form for form, (first, _) in FORMS.items() if any(companions.matching(beside, (first,)))]


def read_tokenizer(beside: Companions, form: str | None = None) -> Tokenizer | None:
    """The tokenizer among the companion files of a model; None where there is none.

    Whatever is wrong with a file is its `fault`, and no error: what lies beside weights is not worth a merge.
    """
    forms = forms_of(beside)
    if not forms:
        return None
    chosen = form if form in forms else forms[0]
    try:
        with without_collector():
            read = _checked(FORMS[chosen][1](beside))
        fault = None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError, RecursionError) as error:
        read, fault = _Read({}, {"files": files_digest(beside) or ""}), f"{type(error).__name__}: {error}"
    config = read_json(beside, CONFIG)
    added = _added_tokens(beside, config, read)
    vocabulary = {**read.vocabulary, **{token.content: token.id for token in added}}
    parts = dict(read.parts) | _behaviour(config)
    return Tokenizer(chosen, vocabulary, added, _roles(beside, config), chat_templates(beside), parts, fault)


class _Files:
    """The files of a tokenizer, as a key: equal where their bytes are."""

    def __init__(self, beside: Companions, digest: str) -> None:
        self.beside, self.digest = beside, digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Files) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def summary_of(beside: Companions, form: str | None = None) -> Summary | None:
    """What `read_tokenizer` finds, without the tokens; remembered for files of the same bytes."""
    digest = files_digest(beside)
    return None if digest is None else _summary(_Files(beside, digest), form)


@lru_cache(maxsize=16)
def _summary(files: _Files, form: str | None) -> Summary | None:
    found = read_tokenizer(files.beside, form)
    return found.summary() if found else None


def files_digest(beside: Companions) -> str | None:
    """Of the bytes of all files of a tokenizer and of its chat templates; None where there are none. Far cheaper than
    the digest of what they say, and equal only if that is."""
    import xxhash

    found = companions.matching(beside, (*companions.TOKENIZER, *companions.TEMPLATES))
    if not found:
        return None
    digest = xxhash.xxh3_128()
    for name in sorted(found):
        raw = b""
        with suppress(OSError):
            raw = content_of(found[name])
        digest.update(b"%d %d\0" % (len(name.encode()), len(raw)) + name.encode())
        digest.update(raw)
    return digest.hexdigest()


def chat_templates(beside: Companions) -> dict[str, str]:
    """Chat templates by name, found where transformers looks for them and in the same order."""
    files = {}
    for name, content in companions.matching(beside, companions.TEMPLATES).items():
        if name.endswith(".jinja"):
            with suppress(OSError, ValueError):
                stem = name.rpartition("/")[2].removesuffix(".jinja")
                files["default" if name == "chat_template.jinja" else stem] = content_of(content).decode("utf-8")
    if files:
        return files
    # chat_template.json is read by processors only, so a tokenizer's own config goes before it.
    for name in (CONFIG, "chat_template.json"):
        found = read_json(beside, name).get("chat_template")
        if isinstance(found, str):
            return {"default": found}
        if isinstance(found, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
            found = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
        if isinstance(found, dict) and (named := {k: v for k, v in found.items() if isinstance(v, str)}):
            return named
    return {}


def chat_template(beside: Companions) -> str | None:
    """The default chat template; None where there is none."""
    return chat_templates(beside).get("default")


def read_json(beside: Companions, name: str) -> dict[str, Any]:
    """A JSON object among the companion files; an empty one where there is none that can be read."""
    try:
        value = json.loads(content_of(beside[name]).decode("utf-8-sig"))
    except (KeyError, OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# The forms: what each holds of a vocabulary, and of all else that decides how text is cut


@dataclass(frozen=True)
class _Read:
    vocabulary: Mapping[str, int]
    parts: Mapping[str, str]
    added: Sequence[Json] = ()


def _checked(read: _Read) -> _Read:
    """What was read, if it is made of what it should be made of: JSON may hold anything.

    Raises:
        ValueError: it is not.
    """
    if not set(map(type, read.vocabulary.values())) <= {int}:
        raise ValueError("the vocabulary has ids that are not integers")
    if not isinstance(read.added, list | tuple) or not all(isinstance(entry, dict) for entry in read.added):
        raise ValueError("added_tokens is not a list of tokens")
    return read


def _fast(beside: Companions) -> _Read:
    document = json.loads(content_of(beside["tokenizer.json"]).decode("utf-8"))
    model = document["model"]
    found = model["vocab"]
    vocabulary = found if isinstance(found, dict) else {token: i for i, (token, _) in enumerate(found)}
    parts = {name: _digest(_said(_plain(document.get(name), name))) for name in PARTS}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]
    scores = [score for _, score in found] if isinstance(found, list) else []
    parts["merges"] = _digest("\n".join(merges))
    # Files of old versions name no type, and spell out no default.
    rest = {key: value for key, value in model.items() if key not in ("vocab", "merges", "type")}
    parts["model"] = _digest([_said(rest), scores])
    return _Read(vocabulary, parts, document.get("added_tokens") or ())


def _sentencepiece(name: str, beside: Companions) -> _Read:
    raw = content_of(beside[name])
    with suppress(ValueError):  # Llama 3 and others call a tiktoken file tokenizer.model
        return _Read(ranks_of(raw), {})
    pieces = pieces_of(raw)
    return _Read({piece: i for i, (piece, _, _) in enumerate(pieces)}, {"pieces": _digest(pieces)})


def _pairs(beside: Companions) -> _Read:
    vocabulary = json.loads(content_of(beside["vocab.json"]).decode("utf-8"))
    if not all(isinstance(i, int) for i in vocabulary.values()):  # of several languages: token -> id one level down
        return _Read({}, {"vocabulary": _digest(vocabulary)})
    parts = {}
    if "merges.txt" in beside:
        lines = content_of(beside["merges.txt"]).decode("utf-8").splitlines()
        parts["merges"] = _digest([line for line in lines if line.strip() and not line.startswith("#version")])
    for name in companions.matching(beside, ("*.spm", *companions.SENTENCEPIECE)):  # cut by these, numbered by that
        parts[name] = hashlib.blake2b(content_of(beside[name]), digest_size=16).hexdigest()
    return _Read(vocabulary, parts)


def _lines(beside: Companions) -> _Read:
    return _Read(vocabulary_of_lines(content_of(beside["vocab.txt"])), {})


def _tekken(beside: Companions) -> _Read:
    vocabulary, rest = tekken_of(content_of(beside["tekken.json"]))
    return _Read(vocabulary, {"model": _digest(_said(rest))})


def _tiktoken(beside: Companions) -> _Read:
    name = next(iter(companions.matching(beside, ("*.tiktoken",))))
    return _Read(ranks_of(content_of(beside[name])), {})


def _unread(beside: Companions) -> _Read:
    return _Read({}, {"files": files_digest(beside) or ""})


# Form -> the patterns of files by which it is known, and what reads it; in the order in which transformers looks.
FORMS: dict[str, tuple[str, Callable[[Companions], _Read]]] = {
    "tokenizer.json": ("tokenizer.json", _fast),
    "tekken": ("tekken.json", _tekken),
    "vocab.json": ("vocab.json", _pairs),
    **{name: (name, partial(_sentencepiece, name)) for name in companions.SENTENCEPIECE},
    "vocab.txt": ("vocab.txt", _lines),
    "tiktoken": ("*.tiktoken", _tiktoken),
    **{name: (name, _unread) for name in companions.OTHER_VOCABULARIES},
}


def _added_tokens(beside: Companions, config: Mapping[str, Any], read: _Read) -> tuple[AddedToken, ...]:
    """Added tokens by id: those of tokenizer.json, then what only tokenizer_config.json and added_tokens.json name."""
    found: dict[str, AddedToken] = {}
    decoder = config.get("added_tokens_decoder")
    listed = [*read.added]
    if isinstance(decoder, dict):
        listed += [{**entry, "id": int(i)} for i, entry in decoder.items() if isinstance(entry, dict) and i.isdigit()]
    legacy = read_json(beside, ADDED)
    listed += [{"content": content, "id": i} for content, i in legacy.items()]
    for entry in listed:
        content, at = entry.get("content"), entry.get("id")
        if isinstance(content, str) and isinstance(at, int) and content not in found:
            flags = frozenset(flag for flag in FLAGS if entry.get(flag) is True)
            found[content] = AddedToken(content, read.vocabulary.get(content, at), flags)
    if not isinstance(decoder, dict) and not read.added:  # the special tokens of slow tokenizers are added tokens too
        for token in _roles(beside, config).values():
            if token in read.vocabulary and token not in found:
                found[token] = AddedToken(token, read.vocabulary[token], frozenset({"special"}))
    return tuple(sorted(found.values(), key=lambda token: (token.id, token.content)))


def _roles(beside: Companions, config: Mapping[str, Any]) -> dict[str, str]:
    # Where the config lists added tokens it was written after the map had gone out of use.
    legacy = {} if "added_tokens_decoder" in config else read_json(beside, LEGACY)
    return dict(_named({**legacy, **{k: v for k, v in config.items() if v is not None}}))


def special_tokens(beside: Companions) -> dict[str, str]:
    """Special tokens by role, as far as the files of a tokenizer name them."""
    return _roles(beside, read_json(beside, CONFIG))


def behaviour_of(beside: Companions) -> dict[str, str]:
    """What tokenizer_config.json says of how text is cut, but for what holds where nothing is said: `add_bos_token` and
    `do_lower_case` have other defaults in other classes of transformers, the rest is off."""
    found = _behaviour(read_json(beside, CONFIG))
    return {key: value for key, value in found.items() if value == "True" or key in UNLIKE}


def _behaviour(config: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(config[key]) for key in BEHAVIOUR if isinstance(config.get(key), bool)}


def _named(entries: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for role in ROLES:
        token = entries.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            yield role, token


def _plain(step: Any, name: str) -> Any:
    """A step of a tokenizer as any version writes it: a sequence of one step is that step, and a post-processor that
    adds no token is none (byte-level ones only move offsets; transformers 5 writes templates without tokens)."""
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Sequence" and isinstance(steps := step.get(SEQUENCES[name]), list):
        found = [one for one in (_plain(one, name) for one in steps) if one is not None]
        return found[0] if len(found) == 1 else {"type": "Sequence", "steps": found} if found else None
    if name == "post_processor":
        bare = (step.get("single"), step.get("pair")) == (ALONE, ALONE + SECOND) and not step.get("special_tokens")
        return None if step.get("type") == "ByteLevel" or bare else step
    return step


def _said(value: Any) -> Any:
    """A document without what only repeats a default: null, false, what is empty, a few that old files leave out."""
    if isinstance(value, dict):
        said = {key: _said(entry) for key, entry in value.items() if key not in UNSAID}
        return {key: entry for key, entry in said.items() if not (entry is None or entry is False or entry in EMPTY)}
    return [_said(entry) for entry in value] if isinstance(value, list) else value


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
