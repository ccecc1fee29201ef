# SPDX-License-Identifier: Apache-2.0
"""What the loader knows of a model's tensors: ties, renames, buffers, axes that count tokens, heads.

The facts of transformers' own classes are data (`families.jsonl`, written by scripts/families.py from transformers
itself). `facts_of(config)` finds a model's; where its class and model type are unknown, names alone must do
(`GENERIC`).

Names may be those in files or those in memory, with or without the prefix of the base model. In patterns of names `#`
is any number. Queries look a name up by its ending, so they are cheap, and right for parts of larger models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("families.jsonl")

# What wrappers put before names when a wrapped model is saved: DistributedDataParallel, torch.compile, activation
# checkpointing, FSDP, PEFT. "module." is a name of its own inside some models, so it counts only at the start.
WRAPPERS_BEFORE = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "base_model.model.")
WRAPPERS_WITHIN = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "base_layer.")

# Where composite models keep the config of their language model.
TEXTS = ("text_config", "llm_config", "language_config")

VOCAB_KEYS = ("vocab_size", *(f"{part}.vocab_size" for part in TEXTS))  # one number, which a config may have twice

# What names tell where nothing else does.
HEADS = ("lm_head*", "*.lm_head.*", "embed_out.*", "*classifier*", "score*", "cls.*", "qa_outputs.*")
_INPUTS = ("*embed_tokens.weight", "*wte.weight", "*embed_in.weight", "*embeddings.weight", "shared.weight")
_OUTPUTS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight", "lm_head.decoder.weight")
_OUTPUT_BIASES = ("lm_head.bias", "cls.predictions.bias", "cls.predictions.decoder.bias", "lm_head.decoder.bias")
_EMBEDDINGS = ("*embed*", "*wte*", "*wpe*", "shared.weight")
_NOT_WORDS = ("*position*", "*wpe*", "*token_type*")

# Buffers that every loader makes anew, whatever the model. `masked_bias` is -1e9 beside a mask in old GPT checkpoints.
_REBUILT = ("inv_freq", "original_inv_freq", "position_ids", "token_type_ids", "masked_bias", "relative_position_index")

# Of the keys that a class ignores when it finds them: those that name buffers. The others are weights that it drops.
_OF_BUFFERS = re.compile(r"(^|[._\\])(bias|masked_bias|inv_freq|position_ids|token_type_ids|\w*index|version)[.*$]*$")

_NUMBERS = re.compile(r"(?<![^.])\d+(?![^.])")


def pattern_of(name: str) -> str:
    """A tensor's name with `#` for each number between dots.

    >>> pattern_of("model.layers.11.mlp.experts.3.w1.weight")
    'model.layers.#.mlp.experts.#.w1.weight'
    """
    return _NUMBERS.sub("#", name)


def unwrapped(name: str) -> str:
    """A tensor's name without what wrappers put before and into it.

    >>> unwrapped("module._orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> unwrapped("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    while name.startswith(WRAPPERS_BEFORE):
        name = name.removeprefix(next(w for w in WRAPPERS_BEFORE if name.startswith(w)))
    for word in WRAPPERS_WITHIN:
        while f".{word}" in name:  # one within another, too
            name = name.replace(f".{word}", ".")
    return name


def wrappers_in(name: str) -> tuple[str, ...]:
    """What of a name a wrapper put there, as written, from the beginning on.

    >>> wrappers_in("module.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
    ('module.', '_checkpoint_wrapped_module.')
    """
    found = []
    while name.startswith(WRAPPERS_BEFORE):
        found.append(next(word for word in WRAPPERS_BEFORE if name.startswith(word)))
        name = name.removeprefix(found[-1])
    return tuple(dict.fromkeys((*found, *(word for word in WRAPPERS_WITHIN if f".{word}" in name))))


@dataclass(frozen=True)
class Operation:
    """One step of a conversion: transformers' name for it, and its parameters."""

    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Conversion:
    """Tensors that are others in memory than in files: what a name belongs to."""

    target: str  # the tensor in memory; the first of them, where one stored tensor becomes several
    source: str  # the pattern that the name matched, one of `sources`
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Rename:
    """One entry of transformers' conversion mapping: names in files (`sources`, regular expressions) -> in memory.

    `scope` and `base` are prefixes of the part of a model for which it holds; None: all of it. A guarded entry's first
    pair decides whether the others hold. With operations, the values change too (experts are stacked, and so on).
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[Operation, ...] = ()
    scope: str | None = None
    base: str = ""
    guarded: bool = False
    offset: int = 0

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        # As WeightTransform builds it: the longest source first, `*.` is anything, and a source ends where a word does.
        branches = []
        for i, source in sorted(enumerate(self.sources), key=lambda item: -len(item[1])):
            body = source.replace("*.", r".*\.")
            branches.append(f"(?P<g{i}>{body}" + (r"(?!\w))" if re.search(r"[a-zA-Z0-9]$", body) else ")"))
        return re.compile("|".join(branches))

    def apply(self, name: str, *, active: bool = True) -> tuple[str, str | None]:
        """Name -> the new name and the source that matched; the same name and None where none does.

        >>> Rename(("LayerNorm.gamma",), ("LayerNorm.weight",)).apply("encoder.layer.0.LayerNorm.gamma")
        ('encoder.layer.0.LayerNorm.weight', 'LayerNorm.gamma')
        """
        prefix, rest = "", name
        if self.scope is not None:
            scope, base = (f"{part}." if part else "" for part in (self.scope, self.base))
            prefix = next((p for p in (base + scope, scope) if name.startswith(p)), name + ".")
            if not name.startswith(prefix):
                return name, None
            rest = name.removeprefix(prefix)
        found = self._regex.search(rest)
        if found is None:
            return name, None
        group = next(key for key, value in found.groupdict().items() if value is not None)
        which, first = int(group[1:]), self._regex.groupindex[group]
        if self.guarded and which and not active:
            return name, None
        target = self.targets[which] if self.guarded else self.targets[0]
        if "\\" in target:
            target = re.sub(r"\\(\d)", lambda digit: self._captured(found, first + int(digit[1])), target)
        return prefix + rest.replace(found[0], target, 1), self.sources[which]

    def _captured(self, found: re.Match[str], group: int) -> str:
        text = found.group(group) or ""
        return str(int(text) + self.offset) if self.offset else text

    def is_guard(self, name: str) -> bool:
        """Whether the first pair of a guarded entry matches."""
        return self.guarded and self.apply(name, active=False)[1] == self.sources[0]


@dataclass(frozen=True)
class Tie:
    """A tensor that can be another's: `source`, in which `$i` is the i-th number of the tensor's own name."""

    source: str
    by_default: bool
    keys: tuple[str, ...] = ()  # the config keys that decide, with dots; none: the config is not asked

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Whether it is tied by a config: as by default, unless a key says otherwise.

        >>> Tie("shared.weight", True, ("tie_word_embeddings",)).holds({"tie_word_embeddings": False})
        False
        """
        said = [value for key in self.keys if isinstance(value := _value(config, key), bool)]
        return (all(said) if self.by_default else any(said)) if said else self.by_default


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of one model: the facts of its class, and of its family for what the class does not have."""

    model_type: str | None = None
    says_tied: bool | None = None  # of a model that the table does not know: its config's `tie_word_embeddings`
    class_name: str | None = None  # a class that the table knows: the config's, else the model type's main class
    is_exact: bool = False  # `class_name` is what was asked for, not the model type's main class
    prefix: str = ""  # the attribute under which the class has its base model
    ties: Mapping[str, Tie] = field(default_factory=dict)  # pattern -> what it can be tied to
    held: Mapping[str, str] = field(default_factory=dict)  # pattern -> what it is tied to by this config
    inputs: frozenset[str] = frozenset()  # patterns of the input embeddings, without the prefix
    outputs: frozenset[str] = frozenset()  # patterns of the output embeddings, biases included
    heads: tuple[str, ...] = ()  # prefixes of what the class has besides its base model
    other_heads: tuple[str, ...] = ()  # the same of the family's other classes
    parts: tuple[str, ...] = ()  # first words of the base model's names
    lacks: tuple[str, ...] = ()  # prefixes of what the base model has, and this class's copy of it has not
    others_lack: tuple[str, ...] = ()  # the same of any class of the family
    missing: tuple[str, ...] = ()  # regular expressions: may be absent from files
    unexpected: tuple[str, ...] = ()  # regular expressions: ignored in files
    unsaved: tuple[str, ...] = ()  # never written by transformers
    kept_f32: tuple[str, ...] = ()  # words in names: stay F32 where F16 is asked for
    kept_f32_strictly: tuple[str, ...] = ()  # the same, also for BF16
    tables: frozenset[str] = frozenset()  # endings of lookup tables: one row (or vector) is used at a time
    rebuilt: frozenset[str] = frozenset()  # endings of buffers that are never stored
    buffers: frozenset[str] = frozenset()  # endings of buffers that are stored
    statistics: frozenset[str] = frozenset()
    counters: frozenset[str] = frozenset()
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)  # ending -> axis -> the config key it counts
    token_keys: tuple[str, ...] = ()  # the config keys that count the tokenizer's tokens
    layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # containers, without prefix -> config keys
    renames: tuple[Rename, ...] = ()
    fixed: frozenset[str] = frozenset()  # patterns of names in memory that renames would hit, and must not

    @property
    def is_known(self) -> bool:
        """Whether the table has the class or the model type."""
        return self.class_name is not None

    # Names

    def canonical(self, name: str) -> str:
        """The name in memory: no wrappers, no legacy names, the run-time prefixes; a conversion's sources stay apart.

        >>> bert = facts_of({"architectures": ["BertForMaskedLM"]})
        >>> bert.canonical("module.bert.encoder.layer.0.output.LayerNorm.gamma")
        'bert.encoder.layer.0.output.LayerNorm.weight'
        >>> facts_of({"model_type": "gemma3"}).canonical("language_model.model.layers.0.mlp.up_proj.weight")
        'model.language_model.layers.0.mlp.up_proj.weight'
        """
        return self.canonicals((name,))[name]

    def canonicals(self, names: Iterable[str]) -> dict[str, str]:
        """Stored name -> name in memory, for all names of one checkpoint (some renames hold only if another does).

        Of names that differ in numbers alone one is asked first: most are in memory what they are in files.
        """
        names = list(names)
        if self._renames_numbers:
            return self._canonicals(names)
        first: dict[str, str] = {}
        for name in names:
            first.setdefault(self.pattern(name), name)
        asked = self._canonicals(first.values())
        found = dict(zip(names, names, strict=True))
        changed = {pattern for pattern, name in first.items() if asked[name] != name}
        if changed:
            rest = (name for name in names if self.pattern(name) in changed)
            found |= self._canonicals(dict.fromkeys((*first.values(), *rest)))
        return found

    def _canonicals(self, names: Iterable[str]) -> dict[str, str]:
        found = {name: unwrapped(name) for name in names}
        fixed = {name for name, now in found.items() if self.fixed and pattern_of(now) in self.fixed}
        moving = [name for name in found if name not in fixed]
        for rename in self._renamings:
            active = rename.guarded and any(rename.is_guard(found[name]) for name in moving)
            for name in moving:
                found[name] = rename.apply(found[name], active=active)[0]
        return found

    def conversion(self, name: str) -> Conversion | None:
        """What a stored tensor becomes part of in memory, where that is more than a new name.

        >>> moe = facts_of({"model_type": "qwen3_moe"})
        >>> c = moe.conversion("model.layers.0.mlp.experts.5.up_proj.weight")
        >>> c.target, [operation.name for operation in c.operations]
        ('model.layers.0.mlp.experts.gate_up_proj', ['MergeModulelist', 'Concatenate'])
        """
        name = self.canonical(name)
        for rename in self.renames:
            if rename.operations:
                target, source = rename.apply(name)
                if source is not None:
                    return Conversion(target, source, rename.sources, rename.targets, rename.operations)
        return None

    @cached_property
    def _renamings(self) -> tuple[Rename, ...]:
        return tuple(rename for rename in (*self.renames, *legacy()) if not rename.operations)

    def relative(self, name: str) -> str:
        """The name in memory without the prefix of the base model.

        >>> facts_of({"architectures": ["BertForMaskedLM"]}).relative("bert.encoder.layer.0.output.dense.weight")
        'encoder.layer.0.output.dense.weight'
        """
        return self._relative(self.canonical(name))

    def key(self, name: str) -> str:
        """The same as `relative`, of one stored name of many."""
        return self._relative(self.canonicals((name,))[name])

    def has_part(self, key: str) -> bool:
        """Whether a name without the prefix of the base model begins like one of the family's.

        >>> bert = facts_of({"architectures": ["BertForMaskedLM"]})
        >>> bert.has_part("pooler.dense.bias"), bert.has_part("classifier.bias"), bert.has_part("model.bert.x")
        (True, True, False)
        """
        return key.partition(".")[0] in self._firsts

    def begins_with(self, word: str) -> bool:
        """Whether names of the family begin with this word, though it is not the prefix of a base model.

        >>> facts_of({"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}).begins_with("model.")
        True
        """
        return any(name.startswith(word) for name in (*self.layers, *self.inputs) if not self.prefix)

    @cached_property
    def _firsts(self) -> frozenset[str]:
        return frozenset(name.partition(".")[0] for name in (*self.parts, *self.heads, *self.other_heads))

    def without_prefix(self, name: str) -> str:
        """A name in memory without the prefix of the base model.

        >>> facts_of({"architectures": ["BertForMaskedLM"]}).without_prefix("bert.pooler.dense.bias")
        'pooler.dense.bias'
        """
        return self._relative(name)

    def _relative(self, name: str) -> str:
        return name.removeprefix(f"{self.prefix}.") if self.prefix else name

    def pattern(self, name: str) -> str:
        """What names that mean the same share: the name with `#` for each number, where numbers tell nothing.

        Remembered: there may be tens of thousands of names, of a few patterns.
        """
        if self._renames_numbers:
            return name
        if (found := self._seen.get(name)) is None:
            found = pattern_of(name)
            self._seen[name] = found = self._seen.setdefault(found, found)
        return found

    @cached_property
    def _seen(self) -> dict[str, str]:
        return {}

    def in_memory(self, key: str) -> str:
        """A name without the prefix of the base model -> with it, where it is a part of that.

        >>> bert = facts_of({"architectures": ["BertForMaskedLM"]})
        >>> bert.in_memory("embeddings.word_embeddings.weight"), bert.in_memory("cls.predictions.bias")
        ('bert.embeddings.word_embeddings.weight', 'cls.predictions.bias')
        """
        return f"{self.prefix}.{key}" if self.prefix and key.partition(".")[0] in self.parts else key

    def _pattern(self, name: str) -> str:
        """The pattern of the name in memory; remembered by the stored name's pattern, as experts are many."""
        stored = pattern_of(name)
        if (pattern := self._patterns.get(stored)) is None:
            pattern = pattern_of(self.canonical(name))
            if not self._renames_numbers:
                self._patterns[stored] = pattern
        return pattern

    def _key(self, name: str) -> str:
        return self._relative(self._pattern(name))

    @cached_property
    def _patterns(self) -> dict[str, str]:
        return {}

    @cached_property
    def _renames_numbers(self) -> bool:
        """Whether some rename is about one number, so that names of one pattern part ways."""
        words = (word for r in self._renamings for source in r.sources for word in re.split(r"\\?\.", source))
        return any(re.match(r"[(\[^]*\d", word) for word in words)

    def _look_up(self, table: str, name: str) -> str | None:
        """The entry of a table of endings (an attribute) that a name has."""
        key = self._key(name)
        if (table, key) not in self._found:
            self._found[table, key] = _ending(getattr(self, table), key)
        return self._found[table, key]

    @cached_property
    def _found(self) -> dict[tuple[str, str], str | None]:
        return {}

    # Ties

    @property
    def is_tied(self) -> bool:
        """Whether an output embedding is tied, by this config.

        >>> facts_of({"model_type": "gpt2"}).is_tied, facts_of({"model_type": "llama"}).is_tied
        (True, False)
        """
        return any(pattern_of(self._relative(target)) in self.outputs for target in self.held)

    def tied_to(self, name: str) -> str | None:
        """The tensor, by its name in memory, whose values this one has; None: it has its own.

        >>> t5 = facts_of({"architectures": ["T5ForConditionalGeneration"]})
        >>> t5.tied_to("decoder.embed_tokens.weight"), t5.tied_to("shared.weight")
        ('shared.weight', None)
        >>> reward = facts_of({"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": True})
        >>> reward.tied_to("lm_head.weight") is None
        True
        """
        return self._tied_to(self.canonical(name))

    def _tied_to(self, name: str) -> str | None:
        # A pattern of ties within a list holds for the one that the others are tied to, too: it ends there.
        path = [name]
        while (source := self.held.get(pattern_of(path[-1]))) is not None:
            step = _filled(source, path[-1])
            if step in path:
                break
            path.append(step)
        return path[-1] if len(path) > 1 else None

    def tied_names(self, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """The groups of these stored names that are one tensor each, the one they are tied to first if it is stored.

        >>> facts_of({"model_type": "t5"}).tied_names(["lm_head.weight", "decoder.embed_tokens.weight", "x.weight"])
        (('lm_head.weight', 'decoder.embed_tokens.weight'),)
        """
        groups: dict[str, list[str]] = {}
        for stored, name in self.canonicals(names).items():
            root = self._tied_to(name) or name
            groups.setdefault(root, []).insert(0 if root == name else len(groups.get(root, ())), stored)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    @cached_property
    def _relative_ties(self) -> dict[str, str]:
        """Pattern -> source of all that can be tied, both without the base model's prefix."""
        every = {**{target: tie.source for target, tie in self.ties.items()}, **self.held}
        return {self._relative(target): self._relative(source) for target, source in every.items()}

    @cached_property
    def _relative_held(self) -> frozenset[str]:
        return frozenset(self._relative(target) for target in self.held)

    def possible_ties(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[tuple[str, str], ...]:
        """Which of these tensors can be another's, whatever the config says: (target, source), by their names in
        memory without the base model's prefix. `shapes`: of all tensors that a source is looked for among.

        >>> facts_of({"architectures": ["BartForConditionalGeneration"]}).possible_ties(["lm_head.weight"], {})
        (('lm_head.weight', 'shared.weight'),)
        >>> GENERIC.possible_ties(["lm_head.weight"], {"lm_head.weight": (8, 4), "tok.wte.weight": (8, 4)})
        (('lm_head.weight', 'tok.wte.weight'),)
        """
        ties = self._relative_ties
        if not self.is_known:
            return tuple(_guessed_ties(keys, shapes))
        if not any("#" in target for target in ties):
            keys = [target for target in ties if target in keys]
        return tuple((key, source) for key in keys if (source := self._source(key)) != key)

    def _source(self, key: str) -> str:
        """What a tensor is tied to in the end, if all ties hold; itself where it can be tied to nothing."""
        path = [key]
        while (source := self._relative_ties.get(pattern_of(path[-1]))) is not None:
            step = _filled(source, path[-1])
            if step in path:
                break
            path.append(step)
        return path[-1]

    def is_held(self, key: str, *, stored: bool) -> bool:
        """Whether the config ties a tensor, by its name in memory without the base model's prefix.

        Where the table does not know the model: as its config says, and where that is silent, a tensor that others
        have (`stored` is false) is taken for tied.
        """
        if not self.is_known:
            return self.says_tied is True if stored else self.says_tied is not False
        while pattern_of(key) in self._relative_held:
            step = _filled(self._relative_ties[pattern_of(key)], key)
            if pattern_of(step) not in self._relative_ties or step == key:
                return True
            key = step
        return False

    @property
    def output_tie_keys(self) -> tuple[str, ...]:
        """The config keys that decide whether the output embedding is tied.

        >>> facts_of({"model_type": "llava"}).output_tie_keys, facts_of({"model_type": "t5"}).output_tie_keys
        (('tie_word_embeddings', 'text_config.tie_word_embeddings'), ())
        """
        ties = [tie for target, tie in self.ties.items() if pattern_of(self._relative(target)) in self.outputs]
        return tuple(dict.fromkeys(key for tie in ties for key in tie.keys))

    def untied_with_output(self) -> tuple[tuple[str, str], ...]:
        """What a config that unties the output embedding unties as well: (target, source), without the prefix.

        >>> facts_of({"architectures": ["BertForMaskedLM"]}).untied_with_output()[0]
        ('cls.predictions.decoder.bias', 'cls.predictions.bias')
        """
        keys = {*self.output_tie_keys}
        found = [target for target, tie in self.ties.items() if "#" not in target and keys & {*tie.keys}]
        return tuple((target, self._source(target)) for target in map(self._relative, found))

    # What need not be there

    def is_rebuilt(self, name: str, shape: tuple[int, ...] | None = None) -> bool:
        """Whether a loader makes this buffer itself: masks, positions, rotary frequencies. Nobody's weights.

        With a shape, masks are known where no name tells: a bias never has four axes.

        >>> neox = facts_of({"model_type": "gpt_neox"})
        >>> [neox.is_rebuilt(f"gpt_neox.layers.0.attention.{name}") for name in ("bias", "dense.bias")]
        [True, False]
        >>> facts_of({"model_type": "gpt2"}).is_rebuilt("h.0.attn.bias", (1, 1, 1024, 1024))
        True
        """
        last = name.rpartition(".")[2]
        if last in _REBUILT or self._look_up("rebuilt", name) is not None:
            return True
        if last == "bias" and shape is not None and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]:
            return True
        return self._masks is not None and self._masks.search(name) is not None

    @cached_property
    def _masks(self) -> re.Pattern[str] | None:
        # Whole words: transformers asks these only of what a model does not have, and `attn.bias` is in `c_attn.bias`.
        masks = [text.removeprefix(".*").removesuffix(".*") for text in self.unexpected if _OF_BUFFERS.search(text)]
        return _any_of([rf"(^|\.){text}(\.|$)" for text in masks])

    def ignored_when_missing(self, name: str) -> bool:
        """Whether a checkpoint need not have it.

        >>> facts_of({"model_type": "bart"}).ignored_when_missing("final_logits_bias")
        True
        """
        return self._missing is not None and self._missing.search(self.canonical(name)) is not None

    def ignored_when_unexpected(self, name: str) -> bool:
        """Whether the class drops it without a word: another part of a larger model, or a rebuilt buffer.

        >>> facts_of({"model_type": "qwen3_next"}).ignored_when_unexpected("mtp.layers.0.mlp.gate.weight")
        True
        """
        return self.is_rebuilt(name) or any(
            self._unexpected is not None and self._unexpected.search(text) for text in (name, self.canonical(name))
        )

    @cached_property
    def _missing(self) -> re.Pattern[str] | None:
        return _any_of(self.missing)

    @cached_property
    def _unexpected(self) -> re.Pattern[str] | None:
        return _any_of(self.unexpected)

    # What a tensor is

    def is_embedding(self, name: str) -> bool:
        """Whether it is a lookup table (tokens, positions, types, relative distances): one row is used at a time.

        >>> facts_of({"model_type": "resnet"}).is_embedding("resnet.embedder.embedder.convolution.weight")
        False
        >>> t5 = facts_of({"model_type": "t5"})
        >>> t5.is_embedding("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        True
        """
        if not self.is_known:
            return _matches(name, _EMBEDDINGS) and "embedder" not in name
        return self._look_up("tables", name) is not None

    def is_input_embedding(self, name: str) -> bool:
        """Whether it is a table of the model's tokens.

        >>> facts_of({"model_type": "mamba"}).is_input_embedding("backbone.embeddings.weight")
        True
        """
        if not self.is_known:
            return _matches(name, _INPUTS) and not _matches(name, _NOT_WORDS)
        return self._key(name) in self.inputs

    def is_output_embedding(self, name: str) -> bool:
        """Whether it turns states into logits of tokens (its bias included).

        >>> facts_of({"model_type": "distilbert"}).is_output_embedding("vocab_projector.weight")
        True
        """
        if not self.is_known:
            return name.endswith((*_OUTPUTS, *_OUTPUT_BIASES))
        return self._key(name) in self.outputs

    def is_head(self, name: str) -> bool:
        """Whether it belongs to a head: the class has it besides its base model, or another class of the family does.

        >>> bert = facts_of({"architectures": ["BertForSequenceClassification"]})
        >>> [bert.is_head(n) for n in ("classifier.bias", "cls.predictions.bias", "bert.pooler.dense.weight")]
        [True, True, False]
        >>> facts_of({"architectures": ["DebertaV2ForSequenceClassification"]}).is_head("pooler.dense.weight")
        True
        """
        if not self.is_known:
            return _matches(name, HEADS)
        name = self._pattern(name)
        if self.prefix and name.startswith(f"{self.prefix}."):
            return False
        if _begins(name, self.heads):
            return True
        if name.partition(".")[0] in self.parts:
            return False
        return _begins(name, self.other_heads) or _matches(name, HEADS)

    def has_head(self, name: str) -> bool:
        """Whether it belongs to a head that this very class has.

        >>> bert = facts_of({"architectures": ["BertForSequenceClassification"]})
        >>> [bert.has_head(n) for n in ("classifier.bias", "cls.predictions.bias")]
        [True, False]
        """
        return self.is_exact and _begins(self._pattern(name), self.heads)

    def is_optional(self, name: str) -> bool:
        """Whether it is a part of the base model that some classes of the family are built without (poolers).

        >>> facts_of({"architectures": ["BertForMaskedLM"]}).is_optional("bert.pooler.dense.weight")
        True
        """
        return _begins(self._key(name), self.others_lack)

    def is_lacking(self, name: str) -> bool:
        """Whether it is a part of the base model that this class is built without.

        >>> facts_of({"architectures": ["RobertaForSequenceClassification"]}).is_lacking("roberta.pooler.dense.bias")
        True
        """
        return _begins(self._key(name), self.lacks)

    def is_buffer(self, name: str) -> bool:
        """Whether it is a stored buffer rather than a parameter: training does not touch it by gradients.

        >>> facts_of({"model_type": "deepseek_v3"}).is_buffer("model.layers.3.mlp.gate.e_score_correction_bias")
        True
        """
        return self.is_statistic(name) or self.is_counter(name) or self._look_up("buffers", name) is not None

    def is_statistic(self, name: str) -> bool:
        """Whether it is a running mean or variance.

        >>> facts_of({"model_type": "resnet"}).is_statistic("resnet.embedder.embedder.normalization.running_var")
        True
        """
        return name.endswith((".running_mean", ".running_var")) or self._look_up("statistics", name) is not None

    def is_counter(self, name: str) -> bool:
        """Whether it counts batches.

        >>> GENERIC.is_counter("bn.num_batches_tracked")
        True
        """
        return name.endswith("num_batches_tracked") or self._look_up("counters", name) is not None

    def stays_f32(self, name: str, dtype: str) -> bool:
        """Whether transformers keeps it in F32 where `dtype` ("F16" or "BF16") is asked for.

        >>> t5 = facts_of({"model_type": "t5"})
        >>> wo = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
        >>> t5.stays_f32(wo, "F16"), t5.stays_f32(wo, "BF16")
        (True, False)
        """
        words = self.kept_f32_strictly + (self.kept_f32 if dtype == "F16" else ())
        found = _any_of([word.replace("*", ".*") for word in words])
        return found is not None and found.search(self.canonical(name)) is not None

    # Axes

    def counted(self, name: str) -> Mapping[int, str]:
        """Axis -> the config key that it counts.

        >>> dict(facts_of({"model_type": "bert"}).counted("bert.embeddings.position_embeddings.weight"))
        {0: 'max_position_embeddings'}
        """
        ending = self._look_up("axes", name)
        return {} if ending is None else self.axes[ending]

    def token_axis(self, name: str, shape: tuple[int, ...]) -> int | None:
        """The axis that counts the tokenizer's tokens; None: none does.

        >>> facts_of({"model_type": "bart"}).token_axis("final_logits_bias", (1, 50265))
        1
        >>> facts_of({"model_type": "t5"}).token_axis("shared.weight", (32128, 512))
        0
        >>> facts_of({"model_type": "bert"}).token_axis("embeddings.position_embeddings.weight", (512, 768)) is None
        True
        """
        counted = self.counted(name)
        if not counted and self._key(name).partition(".")[0] not in self.parts:  # nothing that the table knows
            words = len(shape) == 2 and _matches(name, _EMBEDDINGS) and not _matches(name, (*_NOT_WORDS, *HEADS))
            return 0 if words or name.endswith((*_OUTPUTS, *_OUTPUT_BIASES)) else None
        for axis, key in counted.items():
            # Gemma 3n counts the tokens of a second table by a key of its own, and resizes both.
            words = key in self.token_keys or key.rpartition(".")[2].startswith("vocab_size")
            if words and axis < len(shape):
                return axis
        return None

    # Depth

    def layer_of(self, name: str) -> tuple[str, int, tuple[str, ...]] | None:
        """Container of layers (without the base's prefix), number of the layer, and the config keys that count them.

        >>> facts_of({"model_type": "t5"}).layer_of("decoder.block.3.layer.0.SelfAttention.q.weight")
        ('decoder.block', 3, ('num_decoder_layers',))
        """
        words = self.relative(name).split(".")
        for i, word in enumerate(words):
            if word.isdigit() and (container := ".".join(words[:i])) in self.layers:
                return container, int(word), self.layers[container]
        return None


GENERIC = Facts()


def facts_of(config: Mapping[str, Any] | None) -> Facts:
    """config.json -> the facts of its class (`architectures`), else of its model type's main class, else `GENERIC`.

    Reads the one family's line of the table, and no other; remembers it.

    >>> facts_of({"model_type": "llama"}).class_name, facts_of({"model_type": "of-my-own"}).is_known
    ('LlamaForCausalLM', False)
    """
    if not config:
        return GENERIC
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    model_type = config.get("model_type")
    facts = _facts(name, model_type if isinstance(model_type, str) else None)
    if not facts.is_known:
        said = [_value(config, key) for key in ("tie_word_embeddings", *(f"{of}.tie_word_embeddings" for of in TEXTS))]
        tied = next((value for value in said if isinstance(value, bool)), None)
        return facts if tied is None else replace(facts, says_tied=tied)
    held = {target: tie.source for target, tie in facts.ties.items() if tie.holds(config)}
    return replace(facts, held={**facts.held, **held})


def _filled(source: str, name: str) -> str:
    """A tie's source with the numbers of the name that is tied to it."""
    numbers = _NUMBERS.findall(name)
    return re.sub(r"\$(\d)", lambda which: str(numbers[int(which[1])]), source)


def _guessed_ties(keys: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, str]]:
    """Heads and the first embedding of the same width, by names alone."""
    found = []
    for key in keys:
        if key.endswith(_OUTPUTS):
            width = shapes[key][1:] if key in shapes else None
            inputs = (n for n, shape in shapes.items() if _matches(n, _INPUTS) and not _matches(n, _NOT_WORDS)
                      and width in (None, shape[1:]))  # fmt: skip
            found += [(key, source) for source in [next(inputs, None)] if source is not None]
    return found


def _value(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for word in key.split("."):
        value = value.get(word) if isinstance(value, Mapping) else None
    return value


@cache
def _text() -> str:
    return FILE.read_text(encoding="utf-8")


def _line(at: int) -> Any:
    text = _text()
    return json.loads(text[text.rfind("\n", 0, at) + 1 : text.find("\n", at)])


def version() -> str:
    """The version of transformers that the table describes."""
    return str(_line(0)["transformers"])


@cache
def families() -> tuple[dict[str, Any], ...]:
    """All records of the table, as they are in the file; for documents and tests."""
    return tuple(record for line in _text().splitlines() if "classes" in (record := json.loads(line)))


@cache
def legacy() -> tuple[Rename, ...]:
    """The renames that hold for all models: `gamma` and `beta`, weight norms."""
    return tuple(_rename(entry) for entry in _line(0)["legacy"])


def _rename(entry: Mapping[str, Any], scope: str | None = None, base: str = "") -> Rename:
    return Rename(
        sources=tuple(entry["from"]),
        targets=tuple(entry["to"]),
        operations=tuple(Operation(name, parameters) for name, parameters in entry.get("by", ())),
        scope=scope,
        base=base,
        guarded=entry.get("guarded", False),
        offset=entry.get("offset", 0),
    )


def _renames(scopes: Iterable[tuple[str | None, str]], base: str) -> tuple[Rename, ...]:
    found = []
    for scope, table in scopes:
        entries = _line(_text().index(f'{{"renames":"{table}",'))["of"]
        found += [_rename(entry, scope, base) for entry in entries]
    return tuple(found)


@cache
def _facts(name: str | None, model_type: str | None) -> Facts:
    at = _text().find(f'"{name}":{{') if name else -1
    is_exact = at >= 0
    if not is_exact:
        at = _text().find(f'{{"type":"{model_type}",') if model_type else -1
    if at < 0:
        return GENERIC
    record = _line(at)
    if "class" in record:
        return _facts(record["class"], None)
    main = name if is_exact and name else record["main"]
    own, classes = record["classes"][main], record["classes"]

    def union(key: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry for of in classes.values() for entry in of.get(key, ())))

    return Facts(
        model_type=record["type"],
        class_name=main,
        is_exact=is_exact,
        prefix=own.get("prefix", ""),
        ties={target: _tie(tie, record["tied"]) for target, tie in own.get("ties", {}).items()},
        held=own.get("one", {}),
        inputs=frozenset(record.get("input", ())),
        outputs=frozenset(record.get("output", ())),
        heads=tuple(own.get("heads", ())),
        other_heads=union("heads"),
        parts=tuple(record.get("parts", ())),
        lacks=tuple(own.get("lacks", ())),
        others_lack=union("lacks"),
        missing=tuple(own.get("missing", ())),
        unexpected=tuple(own.get("unexpected", ())),
        unsaved=tuple(own.get("unsaved", ())),
        kept_f32=tuple(own.get("fp32", ())),
        kept_f32_strictly=tuple(own.get("fp32_strict", ())),
        tables=frozenset(record.get("tables", ())),
        rebuilt=frozenset(record.get("rebuilt", ())),
        buffers=frozenset(record.get("buffers", ())),
        statistics=frozenset(record.get("statistics", ())),
        counters=frozenset(record.get("counters", ())),
        axes={
            end: {int(axis): key for axis, key in counts.items()}
            for end, counts in {**record.get("axes", {}), **own.get("axes", {})}.items()
        },
        token_keys=tuple(record.get("tokens", ())),
        layers={end: tuple(keys) for end, keys in record.get("layers", {}).items()},
        renames=_renames(own.get("renames", ()), own.get("base", own.get("prefix", ""))),
        fixed=frozenset(own.get("fixed", ())),
    )


def _tie(entry: str | list[Any], usual: list[Any]) -> Tie:
    source, by_default, *keys = [entry, *usual] if isinstance(entry, str) else entry
    return Tie(source, bool(by_default), tuple(keys))


def _ending(table: Iterable[str], key: str) -> str | None:
    """The shortest ending of whole words that the table has, or all of the key after `^`."""
    words = key.split(".")
    endings = (".".join(words[i:]) for i in reversed(range(len(words))))
    return next((ending for ending in (*endings, "^" + key) if ending in table), None)


def _any_of(patterns: Iterable[str]) -> re.Pattern[str] | None:
    patterns = [f"({text})" for text in patterns]
    return re.compile("|".join(patterns)) if patterns else None


def _begins(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a name is one of these, or begins with one that ends in a dot; `#` is any number."""
    name = pattern_of(name)
    return any(name == prefix or (prefix.endswith(".") and name.startswith(prefix)) for prefix in prefixes)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, text) for text in patterns)
