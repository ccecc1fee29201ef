# SPDX-License-Identifier: Apache-2.0
"""Reading what a recipe says of tokens: `tokenizer_source`, `tokenizer:`, `vocab` and `chat_template`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from darekit.architectures.templates import CHAT_TEMPLATES
from darekit.recipe.data import TokenRow, Tokens
from darekit.recipe.documents import Document, Key, did_you_mean, fail, shown, suggest
from darekit.recipe.names import find_model, same_model
from darekit.recipe.parameters import switch_of
from darekit.recipe.references import reference_of

AUTO_TEMPLATE = "auto"

TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")
ROW_KEYS = ("source", "force")
KINDS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}

_MODEL = "model:"  # before a name that would else be a word
_WORDS = ("base", "union")
SHORTEST_TEMPLATE = 20  # characters; what is shorter is a name


def unknown_keys(data: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """A recipe's data -> each key of its `tokenizer:` that means nothing, and why."""
    block = data.get("tokenizer")
    if not isinstance(block, dict):
        return
    places: list[tuple[Key, Any, Sequence[str]]] = [(("tokenizer",), block, TOKENIZER_KEYS)]
    rows = block.get("tokens")
    for token, entry in rows.items() if isinstance(rows, dict) else ():
        here: Key = ("tokenizer", "tokens", token)
        places.append((here, entry, ROW_KEYS))
        source = entry.get("source") if isinstance(entry, dict) else None
        if isinstance(source, dict) and source.get("kind") in KINDS:
            places.append(((*here, "source"), source, KINDS[source["kind"]]))
    for path, found, known in places:
        for key in found if isinstance(found, dict) else ():
            if key not in known:
                yield (*path, key), f"is not known{suggest(key, known)}"


class TokensReader:
    """What one recipe says of tokens.

    Args:
        document: the recipe.
        base: its base, as written.
        models: the names of its models, as written.
        search: where relative names are looked up after the working directory.
    """

    def __init__(self, document: Document, base: str | None, models: Sequence[str], search: Sequence[Path]) -> None:
        self.document, self.base, self.models, self.search = document, base, models, search

    def read(self) -> tuple[str | None, Tokens | None]:
        """Whose tokenizer the output gets, where the recipe says it, and which tokens, where rows are matched by token.

        Raises:
            RecipeError: words that do not mean anything, or that contradict each other.
        """
        data = self.document.data
        given = [key for key in ("tokenizer_source", "tokenizer") if data.get(key) is not None]
        if len(given) == 2:
            fail(
                self.document, ("tokenizer",), " and tokenizer_source say the same; keep one: tokenizer: {source: ...}"
            )  # fmt: skip
        if given == ["tokenizer"]:
            if "vocab" in data:
                self._refuse_vocab(("tokenizer",))
            tokens = self._tokenizer(data["tokenizer"])
            return self._short(tokens.source), tokens
        if not given:
            return None, None
        source = self._source(("tokenizer_source",), data["tokenizer_source"])
        if "vocab" not in data:
            return self._short(source), Tokens(source)
        if source == "union":
            self._refuse_vocab(("tokenizer_source",))
        return self._short(source), None

    @staticmethod
    def _short(source: str) -> str:
        """As `Recipe.tokenizer_source` has it."""
        return source.removeprefix(_MODEL)

    def _refuse_vocab(self, path: Key) -> NoReturn:
        fail(
            self.document, path,
            " matches rows by token, and vocab by number: remove vocab (or keep it, with `tokenizer_source: base` or "
            "one of the models)",
        )  # fmt: skip

    def _tokenizer(self, raw: Any) -> Tokens:
        path: Key = ("tokenizer",)
        if not isinstance(raw, dict):
            fail(self.document, path, f"expected a mapping such as {{source: union}}, found {shown(raw)}")
        source = raw.get("source")
        return Tokens(
            "union" if source is None else self._source((*path, "source"), source),
            self._rows((*path, "tokens"), raw.get("tokens")),
            self._multiple((*path, "pad_to_multiple_of"), raw.get("pad_to_multiple_of")),
        )

    def _source(self, path: Key, raw: Any) -> str:
        """`union`, `base` or a model, as it is spelled elsewhere in the recipe."""
        raw = reference_of(self.document, path, raw) if isinstance(raw, dict) else raw
        if not isinstance(raw, str):
            self._no_model(path, raw, (*_WORDS,))
        if raw in _WORDS:
            return raw
        name = raw.removeprefix(_MODEL)
        if not name:
            self._no_model(path, raw, _WORDS)
        found = self._known(name)
        if found == "base":
            return "base"
        if found is None and name == raw and did_you_mean(name, _WORDS):
            self._no_model(path, raw, _WORDS)
        found = found or name
        return f"{_MODEL}{found}" if found in _WORDS else found

    def _known(self, name: str) -> str | None:
        """A name as the recipe spells it elsewhere; `base` for the base's, None for that of no model of the recipe."""
        if self.base is not None and same_model(name, self.base, self.search):
            return "base"
        return find_model(name, self.models, self.search)

    def _no_model(self, path: Key, raw: Any, words: Sequence[str]) -> NoReturn:
        fail(
            self.document, path,
            f" must be {', '.join(words)} or a model, found {shown(raw)}"
            f"{suggest(str(raw), [*words, *self.models], 'known')}",
        )  # fmt: skip

    def _rows(self, path: Key, raw: Any) -> dict[str, TokenRow]:
        if raw is None:
            return {}
        if not isinstance(raw, dict):
            fail(
                self.document,
                path,
                f"expected tokens and their sources, as {{<s>: {{source: base}}}}, found {shown(raw)}",
            )
        found = {}
        for token, entry in raw.items():
            here = (*path, token)
            entry = {} if entry is None else entry
            if not isinstance(entry, dict):
                fail(
                    self.document,
                    here,
                    f"expected a mapping such as {{source: base, force: true}}, found {shown(entry)}",
                )
            force = switch_of(entry.get("force"))
            if not isinstance(force, bool | None):
                fail(self.document, (*here, "force"), f" must be true or false, found {shown(force)}")
            if force and entry.get("source") is None:
                fail(self.document, here, " has force and no source: say whose row all models get")
            found[token] = self._row((*here, "source"), entry.get("source"), token, bool(force))
        return found

    def _row(self, path: Key, raw: Any, token: str, force: bool) -> TokenRow:
        if raw is None:
            return TokenRow(force=force)
        if not isinstance(raw, dict):
            return TokenRow("model", self._giver(path, raw), force=force)
        if "kind" not in raw:
            return TokenRow("model", self._giver(path, raw), force=force)
        kind = raw["kind"]
        if kind not in KINDS:
            fail(
                self.document, (*path, "kind"),
                f" must be one of {', '.join(KINDS)}, found {shown(kind)}{did_you_mean(str(kind), [*KINDS])}",
            )  # fmt: skip
        if kind == "zero":
            return TokenRow("zero", force=force)
        if raw.get("model") is None:
            fail(self.document, path, " has no model; add `model:` with the model whose row it is")
        model = self._giver((*path, "model"), raw["model"])
        named, at = raw.get("token"), raw.get("token_id")
        if (named is None) == (at is None):
            fail(self.document, path, " needs the row's token or its token_id, and one of them only")
        if at is not None and (isinstance(at, bool) or not isinstance(at, int) or at < 0):
            fail(self.document, (*path, "token_id"), f" must be a whole number from 0 on, found {shown(at)}")
        if at is None and not isinstance(named, str):
            fail(self.document, (*path, "token"), f" must be a token's text, found {shown(named)}; put it in quotes")
        return TokenRow("token", model, named, at, force)

    def _giver(self, path: Key, raw: Any) -> str:
        """The model that gives a row: `base`, or as it is spelled elsewhere."""
        raw = reference_of(self.document, path, raw) if isinstance(raw, dict) else raw
        if not isinstance(raw, str) or not raw.removeprefix(_MODEL):
            self._no_model(path, raw, ("base",))
        if raw == "base" and self.base is not None:
            return "base"
        name = raw.removeprefix(_MODEL)
        return self._known(name) or name

    def _multiple(self, path: Key, raw: Any) -> int | None:
        number = int(raw) if isinstance(raw, str) and raw.strip().isdecimal() else raw  # mergekit reads it in quotes
        if number is None:
            return None
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            fail(self.document, path, f" must be a whole number from 1 on, found {shown(raw)}")
        return number


def is_template(raw: Any) -> bool:
    """Whether something is a chat template: `auto`, a name, or a text."""
    if not isinstance(raw, str):
        return False
    return raw in (AUTO_TEMPLATE, *CHAT_TEMPLATES) or ("{" in raw and len(raw) >= SHORTEST_TEMPLATE)


def read_chat_template(document: Document) -> str | None:
    """`auto`, the name of a template, or a template's text; None where the recipe says nothing of it.

    Raises:
        RecipeError: it is none of these.
    """
    raw = document.data.get("chat_template")
    if raw is None or is_template(raw):
        return raw
    known = (AUTO_TEMPLATE, *CHAT_TEMPLATES)
    fail(
        document, ("chat_template",),
        f" must be {', '.join(known)} or the text of a Jinja template, found {shown(raw)}"
        f"{did_you_mean(str(raw), known)}",
    )  # fmt: skip
