# SPDX-License-Identifier: Apache-2.0
"""Whose tokenizer an output gets, and with it the chat template, the generation settings and the ids of special tokens.

They belong together, so all of them come from one checkpoint: the one that the recipe names; else the fine-tuned
models', where these agree with one another and the base is another or has none; else the base's. A base that is itself
one of the models that are merged, as slerp's, is asked with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darekit.architectures.families import TEXTS, VOCAB_KEYS
from darekit.checkpoints import Checkpoint
from darekit.checkpoints.tokenizers import (
    Difference,
    behaviour_of,
    chat_templates,
    compare,
    forms_of,
    read_json,
    special_tokens,
    summary_of,
)
from darekit.errors import PlanError
from darekit.methods import MERGE_METHODS
from darekit.recipe import Recipe
from darekit.wording import and_, label

GENERATION = "generation_config.json"
IDS = ("eos_token_id", "bos_token_id")  # those that decide where a text begins and ends
SHOWN = 5  # tokens that are named
QUIET_ROLES = ("pad_token",)  # what fills a batch means nothing to a model, and every trainer sets another


@dataclass(frozen=True)
class TokenizerChoice:
    """Whose tokenizer, template, generation settings and ids of special tokens an output gets.

    Attributes:
        source: theirs, all of them; a checkpoint without a tokenizer where nobody has one.
        notes: what was decided, where that is not what one would expect, and what the user should decide.
    """

    source: Checkpoint
    notes: tuple[str, ...] = ()


def choose_tokenizer(
    recipe: Recipe,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    rows: int | None,
    owner: Checkpoint | None = None,
) -> TokenizerChoice:
    """Whose tokenizer the output of a recipe gets.

    Args:
        recipe: may name it.
        base: the base, where there is one.
        models: the models, in recipe order.
        rows: of the output's embedding, None where unknown.
        owner: whose ids stay, where rows are matched by token.
    """
    if owner is not None:
        return _matched(recipe, owner, [*([base] if base else []), *models])
    source = named_source(recipe, base, models)
    if source is None and base is not None and has_tokenizer(base) and _only_lends(recipe):
        source = base
    counts = base is not None and _is_merged(recipe, base, models)
    choice = _agreed(base, models, rows, counts=counts) if source is None else TokenizerChoice(source)
    return TokenizerChoice(choice.source, (*choice.notes, *_unfitting(choice.source, base, rows)))


def rows_of(sizes: Mapping[str, int], base: Checkpoint | None, models: Sequence[Checkpoint]) -> int | None:
    """Rows of an output's embedding: what the plan found (`sizes`: key of the config -> rows), else what the first
    config says."""
    if known := [rows for key, rows in sizes.items() if key in VOCAB_KEYS]:
        return known[0]
    for checkpoint in (*([base] if base else []), *models):
        config = checkpoint.config or {}
        for part in (*(config.get(key) for key in TEXTS), config):
            if isinstance(part, Mapping) and isinstance(part.get("vocab_size"), int):
                return int(part["vocab_size"])
    return None


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether a tokenizer lies beside a checkpoint's weights."""
    return bool(forms_of(checkpoint.companions))


def ids_of(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The ids of special tokens that a config names, at its top or in the config of its language model.

    >>> ids_of({"eos_token_id": 2, "text_config": {"eos_token_id": 2, "bos_token_id": 1}})
    {'eos_token_id': 2, 'bos_token_id': 1}
    """
    found: dict[str, Any] = {}
    for part in (config or {}, *((config or {}).get(key) for key in TEXTS)):
        if isinstance(part, Mapping):
            found |= {key: part[key] for key in IDS if key not in found and part.get(key) is not None}
    return found


def named_source(recipe: Recipe, base: Checkpoint | None, models: Sequence[Checkpoint]) -> Checkpoint | None:
    """The checkpoint of a recipe that its `tokenizer_source` names; None where it names none of them.

    Raises:
        PlanError: it has no tokenizer, and another one has.
    """
    if recipe.tokenizer_source in (None, "union"):
        return None
    if recipe.tokenizer_source == "base" and (recipe.tokens is None or recipe.tokens.model is None):
        source = base or models[0]
    else:
        entries = zip(models, recipe.models, strict=True)
        found = next((model for model, entry in entries if entry.model == recipe.tokenizer_source), None)
        if found is None:  # one that gives tokens and no weights
            return None
        source = found
    owners = [one for one in (*([base] if base else []), *models) if has_tokenizer(one)]
    if owners and not has_tokenizer(source):
        raise PlanError(
            f"tokenizer_source: {recipe.tokenizer_source} has no tokenizer files beside its weights; expected a "
            f"checkpoint with a tokenizer, which {and_(_names(owners, base))} {'has' if len(owners) == 1 else 'have'}. "
            "Name one of them, or leave tokenizer_source out"
        )
    return source


def _matched(recipe: Recipe, owner: Checkpoint, inputs: Sequence[Checkpoint]) -> TokenizerChoice:
    """The tokenizer that tokens were added to; where the owner of the ids has none, the one that stood for it."""
    source = owner if has_tokenizer(owner) else next((one for one in inputs if has_tokenizer(one)), owner)
    others = [one for one in inputs if one is not source and _template(one)]
    if recipe.chat_template is not None or _template(source) or not others:
        return TokenizerChoice(source)
    return TokenizerChoice(
        source,
        (
            f"the output has no chat template, because {label(source.ref)}, whose tokenizer it has, has none; "
            f"{and_([label(one.ref) for one in others])} {'has' if len(others) == 1 else 'have'} one: "
            "`chat_template: auto` takes that of most models",
        ),
    )


def _is_merged(recipe: Recipe, base: Checkpoint, models: Sequence[Checkpoint]) -> bool:
    """Whether the base is one of the models that are merged, and not only what they are compared with."""
    method = MERGE_METHODS[recipe.merge_method]
    if method.base_row or (method.needs_base and method.models == (1, 1)):
        return True
    return any(_is_same(model, base) for model in models)


def _only_lends(recipe: Recipe) -> bool:
    """Whether the base is a third model beside the two that are merged, which gives what is beside the weights."""
    method, starts = MERGE_METHODS[recipe.merge_method], {one.base[0] for one in recipe.slices if one.base}
    return method.base_row and method.models == (1, 1) and bool(starts) and recipe.base_model not in starts


def _agreed(
    base: Checkpoint | None, models: Sequence[Checkpoint], rows: int | None, *, counts: bool = False
) -> TokenizerChoice:
    """`counts`: the base is one of those that are to agree."""
    tuned = [model for model in models if base is None or not _is_same(model, base)]
    tuned = [base, *tuned] if base is not None and counts else tuned or list(models)
    owners = [model for model in tuned if has_tokenizer(model)]
    if not owners:
        return _of_the_base(base, tuned)
    lead = max(owners, key=_completeness)  # the first of the most complete
    apart = [(model, _difference(lead, model)) for model in owners if model is not lead]
    if any(_matters(one) for _, one in apart):
        if counts and _template(lead) and not any(one.tokens or _template(model) for model, one in apart):
            return TokenizerChoice(lead, (_with_template(lead, apart, base),))
        return _undecided(base, lead, tuned, apart)
    notes = [] if len(owners) == len(tuned) else [_without(tuned, owners)]
    for model, one in apart:
        if one.parts:
            notes.append(
                f"the tokenizers of {label(lead.ref)} and {label(model.ref)} have the same tokens, and differ in "
                f"{and_(one.parts)}: the output has that of {label(lead.ref)}"
            )
    if base is None or not has_tokenizer(base):
        if base is not None:
            notes.append(f"the base has no tokenizer files: the output has the tokenizer of {label(lead.ref)}")
        return TokenizerChoice(lead, tuple(notes))
    found = _difference(base, lead)
    lacks = [*_lacks(base, lead)]
    if not (_matters(found) or found.parts or lacks):
        return TokenizerChoice(lead if len(models) == 1 and not counts else base, tuple(notes))
    size = _size(lead)
    if rows is not None and size > rows >= _size(base):
        notes.append(
            f"the tokenizer of {_whose(owners)} differs from the base's ({_told(found, lacks)}), and its ids do not "
            f"fit: it has {size} tokens, the output {rows} rows. The output has the base's, with its chat template "
            "and ids of special tokens; `vocab: pad` keeps all rows"
        )
        return TokenizerChoice(base, tuple(notes))
    if not size and rows_of({}, None, [lead]) != rows:  # tokens that nobody can count, for another number of rows
        return TokenizerChoice(base, tuple(notes))
    if counts or len(models) > 1 or len(owners) < len(tuned):
        notes.append(
            f"the output has the tokenizer of {_whose([lead] if counts else owners)}, with its chat template, "
            f"generation settings and ids of special tokens: the base's differs ({_told(found, lacks)}). "
            "tokenizer_source: base keeps the base's"
        )
    return TokenizerChoice(lead, tuple(notes))


def _of_the_base(base: Checkpoint | None, tuned: Sequence[Checkpoint]) -> TokenizerChoice:
    """No fine-tuned model has a tokenizer."""
    if base is None or not has_tokenizer(base):
        return TokenizerChoice(tuned[0] if len(tuned) == 1 or base is None else base)
    if not tuned:  # slices of the base, and no other model
        return TokenizerChoice(base)
    return TokenizerChoice(base, (_without(tuned, []) + ": the output has the base's, with its ids of special tokens",))


def _undecided(
    base: Checkpoint | None,
    lead: Checkpoint,
    tuned: Sequence[Checkpoint],
    apart: Sequence[tuple[Checkpoint, Difference]],
) -> TokenizerChoice:
    """The fine-tuned models' tokenizers differ."""
    source = base if base is not None and has_tokenizer(base) else next(one for one in tuned if has_tokenizer(one))
    whose = "the base's" if source is base else f"that of {label(source.ref)}"
    told = [
        f"{label(lead.ref)} and {label(model.ref)} in {_told(one, [])}" for model, one in apart if _matters(one)
    ]  # fmt: skip
    others = [one for one in tuned if has_tokenizer(one) and one is not base]
    choices = " or ".join(dict.fromkeys(f"tokenizer_source: {one.ref}" for one in others))
    what = "chat templates" if all(_only_template(one) for _, one in apart if _matters(one)) else "tokenizers"
    return TokenizerChoice(
        source,
        (
            f"the {what} of the models differ: {'; '.join(told)}. The output has {whose} tokenizer, chat template "
            f"and ids of special tokens, which may not be what the others were trained with; choose with {choices}",
        ),
    )


def _with_template(lead: Checkpoint, apart: Sequence[tuple[Checkpoint, Difference]], base: Checkpoint | None) -> str:
    """Of models with the same tokens, one alone has a chat template."""
    others = [(model, one) for model, one in apart if _matters(one)]
    told = "; ".join(f"that of {label(model.ref)} differs in {_told(one, [])}" for model, one in others)
    choices = " or ".join(f"tokenizer_source: {'base' if model is base else model.ref}" for model, _ in others)
    return (
        f"the output has the tokenizer, generation settings and ids of special tokens of {label(lead.ref)}, which "
        f"alone has a chat template; {told}; choose it with {choices}"
    )


def _unfitting(source: Checkpoint, base: Checkpoint | None, rows: int | None) -> Iterator[str]:
    """Where rows were cut below what a tokenizer needs; one that is larger than its own base's table was so before."""
    size = _size(source)
    if base is not None and source is not base and rows is not None and size > rows >= _size(base):
        yield (
            f"the tokenizer of {label(source.ref)} has {size} tokens, and the output only {rows} rows: text with its "
            "last tokens fails. Set tokenizer_source: base, or keep all rows with `vocab: pad`"
        )


# What two checkpoints differ in


def _difference(one: Checkpoint, other: Checkpoint) -> Difference:
    """Of their tokenizers, and of the ids that their configs and generation settings give the tokens of begin and end.

    What only one of them has (a role, a template, an id) is no difference.
    """
    found = compare(one.companions, other.companions)
    roles = {role: pair for role, pair in found.roles.items() if role not in QUIET_ROLES}
    for where, a, b in (
        ("", ids_of(one.config), ids_of(other.config)),
        (f"{GENERATION}: ", _generation(one), _generation(other)),
    ):
        for key in a.keys() & b.keys():
            if _set(a[key]) != _set(b[key]):
                roles[where + key] = (str(a[key]), str(b[key]))
    return Difference(found.tokens, roles, found.parts, found.template and _template(one) and _template(other))


def _lacks(base: Checkpoint, lead: Checkpoint) -> Iterator[str]:
    """What a checkpoint has beside the tokenizer that the base has not."""
    if _template(lead) and not _template(base):
        yield "it has no chat template"
    ours, theirs = special_tokens(base.companions), special_tokens(lead.companions)
    if missing := [role for role in theirs if role not in ours and role not in QUIET_ROLES]:
        yield f"it names no {and_(missing)}"
    ways = behaviour_of(base.companions), behaviour_of(lead.companions)
    if unsaid := [f"{key}: {value.lower()}" for key, value in ways[1].items() if key not in ways[0]]:
        yield f"it does not say {and_(unsaid)}"
    if GENERATION in lead.companions and GENERATION not in base.companions:
        yield f"it has no {GENERATION}"


def _matters(found: Difference) -> bool:
    return bool(found.tokens or found.roles or found.template)


def _only_template(found: Difference) -> bool:
    return found.template and not found.tokens and not found.roles


def _completeness(checkpoint: Checkpoint) -> tuple[bool, bool]:
    return _template(checkpoint), GENERATION in checkpoint.companions


def _template(checkpoint: Checkpoint) -> bool:
    return bool(chat_templates(checkpoint.companions))


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    return ids_of(read_json(checkpoint.companions, GENERATION))


def _size(checkpoint: Checkpoint) -> int:
    found = summary_of(checkpoint.companions)
    return found.size if found else 0


def _set(ids: Any) -> set[Any]:
    return {str(one) for one in ids} if isinstance(ids, list) else {str(ids)}


def _is_same(one: Checkpoint, other: Checkpoint) -> bool:
    if one is other or one.directory is None or other.directory is None:
        return one is other
    return one.directory.absolute() == other.directory.absolute()


# In words


def _told(found: Difference, lacks: Sequence[str]) -> str:
    said = []
    if found.tokens:
        shown = ", ".join(token if token.isprintable() else repr(token) for token in found.tokens[:SHOWN])
        more = f" and {len(found.tokens) - SHOWN} more" if len(found.tokens) > SHOWN else ""
        said.append(f"{'token' if len(found.tokens) == 1 else 'tokens'} {shown}{more}")
    said += [f"{role} {a} and {b}" for role, (a, b) in found.roles.items()]
    if found.template:
        said.append("the chat template")
    said += found.parts
    return ", ".join([*said, *lacks])


def _without(tuned: Sequence[Checkpoint], owners: Sequence[Checkpoint]) -> str:
    bare = [label(one.ref) for one in tuned if not any(one is owner for owner in owners)]
    return f"{and_(bare)} {'has' if len(bare) == 1 else 'have'} no tokenizer files"


def _whose(owners: Sequence[Checkpoint]) -> str:
    return and_([label(one.ref) for one in owners])


def _names(checkpoints: Sequence[Checkpoint], base: Checkpoint | None) -> list[str]:
    return ["base" if one is base else label(one.ref) for one in checkpoints]
