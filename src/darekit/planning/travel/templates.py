# SPDX-License-Identifier: Apache-2.0
"""The chat template that a recipe asks for: by name, as text, or the one that most models have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darekit.architectures.templates import CHAT_TEMPLATES, ChatTemplate
from darekit.checkpoints import Checkpoint
from darekit.checkpoints.tokenizers import Tokenizer, chat_template, read_json
from darekit.planning.tokens import OutputVocabulary
from darekit.planning.travel.tokenizers import GENERATION, ids_of
from darekit.recipe.tokens import AUTO_TEMPLATE
from darekit.wording import label


@dataclass(frozen=True)
class TemplateChoice:
    """The chat template that a recipe asks for.

    Attributes:
        template: its text; None where there is none, or the one that comes with the tokenizer.
        notes: what was decided, where that is not what one would expect, and what the user should decide.
    """

    template: str | None = None
    notes: tuple[str, ...] = ()


def choose_template(
    asked: str, inputs: Sequence[Checkpoint], source: Checkpoint, vocabulary: OutputVocabulary | None
) -> TemplateChoice:
    """The template of a recipe's `chat_template`.

    Args:
        asked: `auto`, a name or a template's text.
        inputs: the base, where there is one, and the models.
        source: whose tokenizer and ids of special tokens the output has.
        vocabulary: the output's tokens, where rows are matched by token.
    """
    if asked == AUTO_TEMPLATE:
        return _commonest([(label(one.ref), text) for one in inputs if (text := chat_template(one.companions))])
    named = CHAT_TEMPLATES.get(asked)
    if named is None:
        return TemplateChoice(asked)
    return TemplateChoice(named.text, tuple(_unfitting(asked, named, source, vocabulary)))


def _commonest(found: Sequence[tuple[str, str]]) -> TemplateChoice:
    """The template that most models have, but for blank ends; of several the one that comes first."""
    if not found:
        return TemplateChoice(None, ("chat_template is auto, but no model has one: the output has none",))
    counts = Counter(template.strip() for _, template in found)
    best = max(counts.values())
    name, template = next((name, template) for name, template in found if counts[template.strip()] == best)
    if len(counts) == 1:
        return TemplateChoice(template)
    return TemplateChoice(
        template, (f"chat_template: auto takes that of {name}, which {best} of {len(found)} models have",)
    )


def _unfitting(name: str, named: ChatTemplate, source: Checkpoint, vocabulary: OutputVocabulary | None) -> list[str]:
    """Tokens of a template that are none in the output, and turns that end where generation does not stop."""
    tokens = _added(source, vocabulary)
    if tokens is None:
        return []
    missing = [token for token in named.tokens if token not in tokens]
    if missing:
        return [
            f"WARNING: the chat template {name} writes {', '.join(missing)}, which "
            f"{'is no token' if len(missing) == 1 else 'are no tokens'} of the output's tokenizer: the model will not "
            "see where turns begin and end. Take the tokens of a model that has them (tokenizer_source: union, or "
            "that model); where none has them, leave chat_template out"
        ]
    stops = {at for config in (source.config, read_json(source.companions, GENERATION)) for at in _stops(config)}
    if named.end is None or not stops or tokens[named.end] in stops:
        return []
    return [
        f"the chat template {name} ends turns with {named.end} ({tokens[named.end]}), which is not among the ids that "
        f"stop generation ({', '.join(map(str, sorted(stops)))}, those of {label(source.ref)}): pass it as "
        "eos_token_id when you generate, or take the tokenizer of a model that ends turns with it (tokenizer_source)"
    ]


def _stops(config: Mapping[str, Any] | None) -> list[int]:
    """The ids at which a config ends a text."""
    found = ids_of(config).get("eos_token_id")
    return [at for at in (found if isinstance(found, list) else [found]) if isinstance(at, int)]


def _added(source: Checkpoint, vocabulary: OutputVocabulary | None) -> Mapping[str, int] | None:
    """Added tokens of the output and their ids; None where they are not known."""
    if vocabulary is not None:
        return {token.content: token.id for token in vocabulary.joined.added}
    found = Tokenizer.of(source)
    return None if found is None else {token.content: token.id for token in found.added}
