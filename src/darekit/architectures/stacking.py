# SPDX-License-Identifier: Apache-2.0
"""What config.json says of layers, and what it must say when they are stacked anew.

It tells layers apart in three ways: lists with one value for each layer, lists of those layers that are special, and
rules that count. The first two follow the layers. A rule holds on where it still says the truth; where it does not, its
numbers are fitted again, or the architecture's explicit list is written; and where it has none, that is a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from darekit.architectures.families import TEXTS

Config = Mapping[str, Any]
Kinds = Sequence[Hashable]

# Numbers of layers; which of them is meant is told by the number itself.
COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers", "n_encoder_layers", "n_decoder_layers",
)  # fmt: skip

# One value for each layer.
BY_LAYER = (
    "layer_types", "mlp_layer_types", "layers_block_type", "block_types", "no_rope_layers",
    "activation_sparsity_pattern", "intermediate_size", "ffn_hidden_size", "num_attention_heads_per_layer",
    "num_attention_heads", "num_key_value_heads", "num_kv_heads", "num_query_heads", "block_configs",
    "attention_layers", "compress_ratios", "hybrid_override_pattern", "moe_layer_freq", "attn_type_list",
    "layer_attn_types", "hybrid_layer_pattern", "sliding_window_sizes",
)  # fmt: skip

# Indices of layers that are special; those whose values count from 1.
INDEX_SETS = (
    "mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "cross_attention_layers",
    "hybrid_layer_ids", "full_attn_layers", "kda_layers", "global_attn_idxs", "global_attention_layers",
)  # fmt: skip
FROM_ONE = ("full_attn_layers", "kda_layers")
BY_INDEX = ("per_layer_config",)  # mappings from a layer's number

# What a layer's number decides in ways that no config can follow.
REFUSED: dict[str, str] = {
    "num_kv_shared_layers": "the last layers use keys and values of earlier ones",
    "hidden_size_per_layer_input": "an embedding has columns for each layer by its number",
}
SCALED_BY_NUMBER = ("scale_attn_by_inverse_layer_idx", "scale_attn_weights_by_layer")


@dataclass(frozen=True)
class Source:
    """A layer of the output: of which config, which of how many layers there."""

    config: Config
    index: int
    count: int


@dataclass(frozen=True)
class Restacked:
    """The config of a stack; what its user should know; and what cannot be made true."""

    config: dict[str, Any]
    notes: tuple[str, ...]
    problems: tuple[str, ...]


def section_of(config: Config, part: str) -> str | None:
    """The key under which a composite config has its text, vision or audio model; None where it is the whole."""
    keys = {"text": TEXTS, "vision": ("vision_config", "vision_tower_config"), "audio": ("audio_config",)}
    return next((key for key in keys.get(part, ()) if isinstance(config.get(key), dict)), None)


def restacked(config: Config, part: str, layers: Sequence[Sequence[Source]], count: int, tower: str = "") -> Restacked:
    """A model's config, made true to other layers.

    Args:
        config: the model's whose other settings the output has.
        part: which part of a composite model the layers are of: text, vision or audio.
        layers: of each layer of the output, whose it is (of several models, where they are merged).
        count: layers of the part in that model.
        tower: the names of the layers up to their number, which tell encoders from decoders.
    """
    section = section_of(config, part)
    own = dict(config if section is None else config[section])
    work = _Work(own, [[_of_section(one, part) for one in sources] for sources in layers], count, tower)
    work.run()
    changed = work.config if section is None else {**config, section: work.config}
    if section is not None:  # some composite configs repeat the number
        changed |= {key: len(layers) for key in COUNTS if config.get(key) == count}
    return Restacked(changed, tuple(work.notes), tuple(work.problems))


def told_apart(config: Config, part: str, layer: int, count: int) -> Hashable:
    """All that a config says of one layer: of two layers of which it says the same, the loader expects the same."""
    section = section_of(config, part)
    own = config if section is None else config[section]
    found: list[Hashable] = [rule.kind(own, layer, count) for rule in RULES if rule.applies(own)]
    for block in (own, own.get("linear_attn_config")):
        for key, value in block.items() if isinstance(block, Mapping) else ():
            if key in INDEX_SETS and isinstance(value, list):
                found.append(layer + int(key in FROM_ONE) in value)
            elif key in BY_INDEX or (key in BY_LAYER and isinstance(value, list | str) and len(value) == count):
                found.append(repr(_at(value, layer)))
    return tuple(found)


def _of_section(one: Source, part: str) -> Source:
    section = section_of(one.config, part)
    return one if section is None else Source(one.config[section], one.index, one.count)


class _Work:
    def __init__(self, config: dict[str, Any], layers: list[list[Source]], count: int, tower: str) -> None:
        self.config, self.layers, self.count, self.tower = config, layers, count, tower
        self.many = len(layers)
        self.notes: list[str] = []
        self.problems: list[str] = []

    def run(self) -> None:
        before = dict(self.config)
        self._counts()
        moved = [[one.index for one in sources] != [i] * len(sources) for i, sources in enumerate(self.layers)]
        if self.many == self.count and not any(moved):
            return
        for key, why in REFUSED.items():
            if self.config.get(key):
                self.problems.append(f"{key} is {self.config[key]}: {why}")
        self.notes += [
            f"{key} is on: what a layer does depends on its number, so moved layers behave differently"
            for key in SCALED_BY_NUMBER
            if self.config.get(key)
        ]
        self._lists(self.config)
        for nested in ("linear_attn_config",):
            if isinstance(self.config.get(nested), dict):
                self.config[nested] = dict(self.config[nested])
                self._lists(self.config[nested], nested)
        self._expand_attention_types()
        for rule in RULES:
            if rule.applies(before):
                self._rule(rule)

    def _counts(self) -> None:
        side = next((word for word in ("encoder", "decoder") if word in self.tower.split(".")), None)
        other = {"encoder": "decoder", "decoder": "encoder"}.get(side or "")
        found = [key for key in COUNTS if self.config.get(key) == self.count and not (other and other in key)]
        if side == "decoder" and any("decoder" in key for key in found):
            found = [key for key in found if "decoder" in key]
        if side == "encoder" and len(found) > 1:
            found = [key for key in found if key != "num_hidden_layers" or "encoder_layers" in found]
        for key in found:
            self.config[key] = self.many
        if not found and self.many != self.count:
            self.notes.append(
                f"no key of config.json says that there are {self.count} layers ({', '.join(COUNTS[:4])}, ...): set "
                f"the number of layers to {self.many} yourself"
            )

    def _values(self, what: str, value_of: Callable[[Source], Hashable]) -> list[Any]:
        """A value for each layer of the output; all the models that it is merged from must agree."""
        values = []
        for i, sources in enumerate(self.layers):
            found = [value_of(one) for one in sources]
            if any(other != found[0] for other in found):
                told = " and ".join(
                    f"{value!r} in layer {one.index}" for value, one in zip(found, sources, strict=True)
                )
                self.problems.append(f"layer {i} is merged from layers that {what} tells apart: {told}")
            values.append(found[0])
        return values

    def _lists(self, config: dict[str, Any], nested: str | None = None) -> None:
        def of(one: Source) -> Config:
            inner = one.config if nested is None else one.config.get(nested)
            return inner if isinstance(inner, Mapping) else {}

        for key in list(config):
            value = config[key]
            if key in INDEX_SETS and isinstance(value, list):
                first = int(key in FROM_ONE)
                special = self._values(key, partial(_is_listed, of, key, first))
                config[key] = [i + first for i, one in enumerate(special) if one]
            elif key in BY_INDEX and isinstance(value, dict):
                values = self._values(key, partial(_told, of, key))
                chosen = [_at(of(sources[0]).get(key), sources[0].index) for sources in self.layers]
                config[key] = {str(i): one for i, one in enumerate(chosen) if one is not None and values}
            elif isinstance(value, list | str) and len(value) == self.count and self._is_by_layer(key, value):
                self._values(key, partial(_told, of, key))
                chosen = [_at(of(sources[0]).get(key, value), sources[0].index) for sources in self.layers]
                config[key] = "".join(map(str, chosen)) if isinstance(value, str) else chosen

    def _is_by_layer(self, key: str, value: Any) -> bool:
        if key in BY_LAYER:
            return True
        if not isinstance(value, list) or self.count < 3 or "layer" not in key:
            return False
        self.notes.append(f"{key} has one value for each layer: they follow the layers")
        return True

    def _expand_attention_types(self) -> None:
        """GPT-Neo: `attention_types: [[["global", "local"], 6]]` says what `attention_layers` lists."""
        types = self.config.get("attention_types")
        if isinstance(types, list) and types and all(isinstance(one, list) and len(one) == 2 for one in types):
            kinds = self._values("attention_types", lambda one: _expanded(one.config.get("attention_types"), one.index))
            self.config["attention_types"] = [[[kind], 1] for kind in kinds]

    def _rule(self, rule: Rule) -> None:
        wanted = self._values(rule.name, lambda one: rule.kind(one.config, one.index, one.count))

        def told(config: Config) -> list[Hashable]:
            return [rule.kind(config, i, self.many) for i in range(self.many)]

        if told(self.config) == wanted:
            return
        for changes in rule.fitted(self.config, wanted):
            if told({**self.config, **changes}) == wanted:
                self.config.update(changes)
                self.notes.append(f"config.json: {_shown(changes)}, so that it fits the layers")
                return
        wrong = [i for i, (one, other) in enumerate(zip(told(self.config), wanted, strict=True)) if one != other]
        listed = ", ".join(map(str, wrong[:8])) + (", ..." if wrong[8:] else "")
        said = _shown({key: self.config[key] for key in rule.keys if key in self.config})
        self.problems.append(
            f"{rule.name} ({said}): for layers {listed} it is wrong (they are {wanted[wrong[0]]}, not "
            f"{told(self.config)[wrong[0]]}), and config.json has no list that could say so"
        )


def _is_listed(of: Callable[[Source], Config], key: str, first: int, one: Source) -> bool:
    return one.index + first in (of(one).get(key) or ())


def _told(of: Callable[[Source], Config], key: str, one: Source) -> str:
    return repr(_at(of(one).get(key), one.index))


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} is {value if not isinstance(value, list) or len(value) <= 6 else f'a list of {len(value)}'}"
        for key, value in values.items()
    )


def _at(values: Any, index: int) -> Any:
    if isinstance(values, Mapping):
        return values.get(str(index), values.get(index))
    return values[index] if isinstance(values, list | str) and index < len(values) else values


def _expanded(types: Any, index: int) -> Any:
    flat = [kind for kinds, times in types or () for _ in range(times) for kind in kinds]
    return flat[index] if index < len(flat) else None


# --- rules ---


@dataclass(frozen=True)
class Rule:
    """Something that a layer's number decides.

    `name`: what it is about. `keys`: of the config; one of them must be there. `kind`: config, layer, layers -> what
    that layer is. `fit`: config, kinds -> changes that may make the rule right.
    """

    name: str
    keys: tuple[str, ...]
    kind: Callable[[Config, int, int], Hashable]
    fit: Callable[[Config, Kinds], Iterable[dict[str, Any]]]

    def applies(self, config: Config) -> bool:
        """Whether a config has this rule."""
        return any(config.get(key) is not None for key in self.keys)

    def fitted(self, config: Config, wanted: Kinds) -> Iterator[dict[str, Any]]:
        """Changes to try, the smallest first."""
        yield from self.fit(config, wanted)


def _listed(config: Config, layer: int) -> Any:
    types = config.get("layer_types")
    return types[layer] if isinstance(types, list) and layer < len(types) else None


def _attention(config: Config, layer: int, layers: int) -> Hashable:
    """Which layers attend to a window only, or are linear."""
    listed = _listed(config, layer)
    if listed is not None:
        return str(listed)
    pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
    if isinstance(config.get("full_attention_interval"), int):
        return "full_attention" if (layer + 1) % config["full_attention_interval"] == 0 else "linear_attention"
    if isinstance(pattern, str) and pattern:
        full = pattern[layer % len(pattern)] == "G" or layer == layers - 1
        return "full_attention" if full else "sliding_attention"
    if isinstance(pattern, int) and pattern > 0:
        return "sliding_attention" if (layer + 1) % pattern else "full_attention"
    if config.get("model_type") == "gemma2":
        return "full_attention" if layer % 2 else "sliding_attention"
    if config.get("use_sliding_window") and isinstance(config.get("max_window_layers"), int):
        return "sliding_attention" if layer >= config["max_window_layers"] else "full_attention"
    return "full_attention"


def _fit_attention(config: Config, wanted: Kinds) -> Iterator[dict[str, Any]]:
    yield {"layer_types": list(wanted)}


def _mlp_only(config: Config, layer: int, layers: int) -> Hashable:
    """Qwen2-MoE and its descendants."""
    step = config.get("decoder_sparse_step") or 1
    return "dense" if layer in (config.get("mlp_only_layers") or ()) or (layer + 1) % step else "experts"


def _fit_mlp_only(config: Config, wanted: Kinds) -> Iterator[dict[str, Any]]:
    yield {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, kind in enumerate(wanted) if kind == "dense"]}


def _first_dense(key: str) -> Callable[[Config, int, int], Hashable]:
    def kind(config: Config, layer: int, layers: int) -> Hashable:
        types = config.get("mlp_layer_types")
        if isinstance(types, list) and layer < len(types):
            return "dense" if types[layer] == "dense" else "experts"
        step = config.get("moe_layer_freq") or 1
        if isinstance(step, list):
            return "experts" if layer < len(step) and step[layer] else "dense"
        return "dense" if layer < (config.get(key) or 0) or layer % step else "experts"

    return kind


def _fit_first_dense(key: str) -> Callable[[Config, Kinds], Iterator[dict[str, Any]]]:
    def fit(config: Config, wanted: Kinds) -> Iterator[dict[str, Any]]:
        yield {key: next((i for i, kind in enumerate(wanted) if kind != "dense"), len(wanted))}

    return fit


def _between(config: Config, layer: int, layers: int) -> Hashable:
    """Ernie 4.5 MoE."""
    start, step = config.get("moe_layer_start_index") or 0, config.get("moe_layer_interval") or 1
    end = config.get("moe_layer_end_index", -1)
    end = layers - 1 if end == -1 else end
    return "experts" if (layer + 1) % step == 0 and start <= layer <= end else "dense"


def _fit_between(config: Config, wanted: Kinds) -> Iterator[dict[str, Any]]:
    experts = [i for i, kind in enumerate(wanted) if kind == "experts"] or [0]
    yield {"moe_layer_start_index": experts[0], "moe_layer_end_index": experts[-1]}


def _interleaved(config: Config, layer: int, layers: int) -> Hashable:
    """Llama 4."""
    if isinstance(config.get("moe_layers"), list):
        return "experts" if layer in config["moe_layers"] else "dense"
    return "experts" if (layer + 1) % (config.get("interleave_moe_layer_step") or 1) == 0 else "dense"


def _no_rope(config: Config, layer: int, layers: int) -> Hashable:
    """Llama 4 and SmolLM3: 1 where positions are rotated."""
    listed = config.get("no_rope_layers")
    if isinstance(listed, list) and layer < len(listed):
        return int(listed[layer])
    return int((layer + 1) % config["no_rope_layer_interval"] != 0) if config.get("no_rope_layer_interval") else 1


def _periodic(period: str, offset: str) -> Callable[[Config, int, int], Hashable]:
    """Jamba: every so many layers, from one on."""

    def kind(config: Config, layer: int, layers: int) -> Hashable:
        return layer % (config.get(period) or 1) == (config.get(offset) or 0)

    return kind


def _fit_periodic(period: str, offset: str) -> Callable[[Config, Kinds], Iterator[dict[str, Any]]]:
    def fit(config: Config, wanted: Kinds) -> Iterator[dict[str, Any]]:
        special = [i for i, kind in enumerate(wanted) if kind]
        steps = {b - a for a, b in pairwise(special)} or {max(len(wanted), 1)}
        if special and len(steps) == 1:
            yield {period: steps.pop(), offset: special[0]}

    return fit


def _every(key: str) -> Callable[[Config, int, int], Hashable]:
    """ModernBERT: layers 0, n, 2n, ... attend to everything."""

    def kind(config: Config, layer: int, layers: int) -> Hashable:
        listed = _listed(config, layer)
        return bool(listed == "full_attention" if listed is not None else layer % config[key] == 0)

    return kind


def _grouped(config: Config, layer: int, layers: int) -> Hashable:
    """Bailing's hybrids: the last of every group attends to everything."""
    return bool((layer + 1) % config["layer_group_size"] == 0)


def _cycled(config: Config, layer: int, layers: int) -> Hashable:
    """RecurrentGemma: a short list, over and over."""
    return str(config["block_types"][layer % len(config["block_types"])])


def _nothing(config: Config, wanted: Kinds) -> Iterator[dict[str, Any]]:
    yield from ()


RULES: tuple[Rule, ...] = (
    Rule(
        "the attention of a layer",
        (
            "layer_types", "sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval",
            "max_window_layers", "sliding_window",
        ),
        _attention, _fit_attention,
    ),
    Rule("which layers have experts", ("mlp_only_layers", "decoder_sparse_step"), _mlp_only, _fit_mlp_only),
    Rule(
        "which layers have experts", ("first_k_dense_replace",), _first_dense("first_k_dense_replace"),
        _fit_first_dense("first_k_dense_replace"),
    ),
    Rule(
        "which layers have experts", ("num_dense_layers",), _first_dense("num_dense_layers"),
        _fit_first_dense("num_dense_layers"),
    ),
    Rule("which layers have experts", ("moe_layer_start_index",), _between, _fit_between),
    Rule(
        "which layers have experts", ("interleave_moe_layer_step",), _interleaved,
        lambda config, wanted: iter([{"moe_layers": [i for i, kind in enumerate(wanted) if kind == "experts"]}]),
    ),
    Rule(
        "which layers have experts", ("expert_layer_period",), _periodic("expert_layer_period", "expert_layer_offset"),
        _fit_periodic("expert_layer_period", "expert_layer_offset"),
    ),
    Rule(
        "which layers attend", ("attn_layer_period",), _periodic("attn_layer_period", "attn_layer_offset"),
        _fit_periodic("attn_layer_period", "attn_layer_offset"),
    ),
    Rule(
        "which layers rotate positions", ("no_rope_layer_interval",), _no_rope,
        lambda config, wanted: iter([{"no_rope_layers": list(wanted)}]),
    ),
    Rule(
        "which layers attend to everything", ("global_attn_every_n_layers",), _every("global_attn_every_n_layers"),
        lambda config, wanted: iter(
            [{"layer_types": ["full_attention" if kind else "sliding_attention" for kind in wanted]}]
        ),
    ),
    Rule("which layers attend to everything", ("layer_group_size",), _grouped, _nothing),
    Rule(
        "the blocks of the layers", ("block_types",), _cycled,
        lambda config, wanted: iter([{"block_types": list(wanted)}]),
    ),
)  # fmt: skip
