# SPDX-License-Identifier: Apache-2.0
"""Write src/darekit/architectures/families.jsonl: what the installed transformers knows about its own classes.

    python scripts/families.py                   # all classes, six minutes on one core
    python scripts/families.py --cache DIR       # the same, keeping what it learns of each class: can be interrupted
    python scripts/families.py --only bert,t5    # print the records of these model types, write nothing

Each class is built from its default config on the meta device (no weights), several times: as it is, with more tokens,
positions, labels and layers, and with its ties on and off. What changes tells which axis counts what, which containers
hold layers, and which config key ties which tensors. `docs/decisions/0036-names-from-the-loader.md` says why.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import inspect
import json
import pkgutil
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent.parent / "src" / "darekit" / "architectures" / "families.jsonl"
PAGE = FILE.parents[3] / "docs" / "which-models.md"

SECONDS = 60  # for one build; the slowest takes 9

# Config keys that count something, by what they count.
TOKENS = re.compile(r"(^|_)(vocab_size|n_vocab|n_words)(_per_layer_input)?$")
TYPES = re.compile(r"^type_vocab_size$")
POSITIONS = re.compile(
    r"^(max(_[a-z0-9]+)*_positions?(_embeddings)?|n_positions|n_ctx|seq_length|max_seq(uence)?_len(gth)?|context_length)$"
)
LAYERS = re.compile(r"^(?!.*(window|shared|nextn|mtp|dense|skip))(|.*_)(n_layers?|layers|num_blocks|depth)$")

# Auto classes in the order in which one of them is the family's own, where a config names no class.
MAIN = (
    "PRETRAINING",
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CTC",
    "IMAGE_CLASSIFICATION",
)

Record = dict[str, Any]


# Names


def pattern(name: str) -> str:
    """A tensor's name with `#` for every number between dots."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)


def folded(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest prefixes (ending in a dot; or whole names) that hold all of `names` and none of `others`."""
    others = list(others)
    found: list[str] = []
    for name in sorted(names):
        if any(name == f or (f.endswith(".") and name.startswith(f)) for f in found):
            continue
        parts = name.split(".")
        for i in range(1, len(parts)):
            prefix = ".".join(parts[:i]) + "."
            if not any(other.startswith(prefix) for other in others):
                found.append(prefix)
                break
        else:
            found.append(name)
    return found


def numbers(name: str) -> list[str]:
    """The numbers between the dots of a name."""
    return [part for part in name.split(".") if part.isdigit()]


def tie_patterns(ties: Mapping[str, str]) -> dict[str, str]:
    """Name -> name it is tied to, as patterns: `$i` in the second is the i-th `#` of the first.

    {"a.1.w": "b.1.w", "a.2.w": "b.2.w"} -> {"a.#.w": "b.$0.w"}; {"a.1.w": "a.0.w"} -> {"a.#.w": "a.0.w"}
    """
    groups: dict[tuple[str, str], list[tuple[list[str], list[str]]]] = {}
    for target, source in ties.items():
        if target != source:
            groups.setdefault((pattern(target), pattern(source)), []).append((numbers(target), numbers(source)))
    result = {}
    for (target, source), pairs in sorted(groups.items()):
        words = []
        for i in range(source.split(".").count("#")):
            seen = {of_source[i] for _, of_source in pairs}
            same = [j for j in range(len(pairs[0][0])) if all(t[j] == s[i] for t, s in pairs)]
            if same:
                words.append(f"${same[min(i, len(same) - 1)]}")
            elif len(seen) == 1:
                words.append(seen.pop())
            else:
                break
        else:
            rest = iter(words)
            result[target] = ".".join(next(rest) if part == "#" else part for part in source.split("."))
    return result


# Configs and models


def nodes(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A config and the configs within it, with their paths ("" is the whole)."""
    from transformers import PretrainedConfig

    yield path, config
    for key, value in sorted(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            yield from nodes(value, f"{path}.{key}" if path else key)


def key_of(config: Any, key: str) -> str:
    """The key under which config.json has an attribute."""
    return str(config.attribute_map.get(key, key))


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def built(cls: Any, config: Any) -> Any:
    """A model on the meta device; its config is a copy."""
    import torch
    from transformers import initialization

    with limited(SECONDS), torch.device("meta"), initialization.no_init_weights(), torch.no_grad():
        return cls(copy.deepcopy(config))


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """All names of parameters and buffers, copies included."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def raised(config: Any, wanted: tuple[str, ...]) -> tuple[Any, dict[int, str]]:
    """A config that counts more of what is wanted, each key by an amount of its own; amount -> key."""
    config = copy.deepcopy(config)
    keys: dict[int, str] = {}
    # Tokens by multiples of 128, as some models pad their vocabulary; the rest by odd numbers: no two are alike.
    for path, node in nodes(config):
        for key, value in sorted(vars(node).items()):
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                continue
            full = f"{path}.{key}" if path else key
            if TYPES.search(key):
                kind, step = "types", 1
            elif TOKENS.search(key):
                kind, step = "tokens", 128
            elif POSITIONS.search(key):
                kind, step = "positions", 1
            else:
                continue
            if kind in wanted:
                amount = step * (len(keys) + 1) if kind == "tokens" else 7 + 2 * len(keys)
                keys[amount] = full
                with contextlib.suppress(Exception):
                    setattr(node, key, value + amount)
    if "labels" in wanted and isinstance(getattr(config, "num_labels", None), int):
        keys[1001] = "num_labels"
        config.num_labels = config.num_labels + 1001
    return config, keys


def deeper(config: Any, only: str | None = None) -> tuple[Any, dict[int, list[str]]]:
    """A config with more layers, of all kinds or of one; amount -> the key that was raised by it."""
    config = copy.deepcopy(config)
    keys: dict[int, list[str]] = {}
    for path, node in nodes(config):
        longer: set[str] = set()
        for key, value in sorted(vars(node).items()):
            full = f"{path}.{key}" if path else key
            if not LAYERS.search(key) or not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                continue
            if only not in (None, full):
                continue
            amount = len(keys) + 1
            keys[amount] = [full]
            for other, row in sorted(vars(node).items()):
                if isinstance(row, (list, tuple)) and len(row) == value and other not in longer:
                    setattr(node, other, type(row)([*row, *[row[-1]] * amount]))
                    longer.add(other)
            setattr(node, key, value + amount)
    return config, keys


def shorter(config: Any, most: int = 6) -> Any:
    """A config with at most so many layers of each kind, as their number is what takes time; None if none has more."""
    config = copy.deepcopy(config)
    found = False
    for _, node in nodes(config):
        for key, value in sorted(vars(node).items()):
            if "hybrid" in key:
                return None  # layers that differ by a list of indexes
            if LAYERS.search(key) and isinstance(value, int) and value > most:
                for other, row in sorted(vars(node).items()):
                    if isinstance(row, (list, tuple)) and len(row) == value:
                        setattr(node, other, row[:most])
                setattr(node, key, most)
                found = True
    return config if found else None


def flipped(cls: Any, config: Any, paths: Iterable[str], value: bool) -> Any:
    """A config made anew with `tie_word_embeddings` set at these paths: the constructor may overrule it (T5's does)."""
    data = config.to_dict()
    for path in paths:
        part = data
        for step in path.split(".") if path else ():
            part = part[step]
        part["tie_word_embeddings"] = value
    return cls.config_class.from_dict(data)


# Facts of one class


def facts_of_class(cls: Any) -> Record:
    """All facts of a model class. Names are as in memory; `pattern` says how numbers are written."""
    from torch import nn

    config = default_config(cls)
    model = None
    if (short := shorter(config)) is not None:
        with contextlib.suppress(Exception):  # where layers must fit other lists, the whole depth is built
            model = built(cls, short)
    if model is None or _ties_layers(model):
        model = built(cls, config)
    config = model.config
    shapes = shapes_of(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = set(model.state_dict())
    buffers = {name for name in shapes if name not in parameters}
    prefix = model.base_model_prefix if model.base_model is not model else ""
    if prefix and not any(name.startswith(f"{prefix}.") for name in shapes):
        prefix = ""

    record: Record = {"type": config.model_type, "prefix": prefix, "base_model_prefix": model.base_model_prefix}
    record["names"] = sorted({pattern(name) for name in shapes if name in stored})
    tables = {
        f"{path}.weight".lstrip(".")
        for path, module in modules.items()
        if isinstance(module, nn.Embedding) or ("Embedding" in type(module).__name__ and _is_table(module))
    }
    raw = {name for name in parameters if _is_raw_table(name, modules)}
    record["tables"] = sorted({pattern(name) for name in (tables & set(shapes)) | raw})
    record["input"] = sorted(_weights_of(model, "get_input_embeddings", shapes, modules, tables))
    record["output"] = sorted(_weights_of(model, "get_output_embeddings", shapes, modules, None))
    norms = {path for path, module in modules.items() if hasattr(module, "running_mean")}
    record["rebuilt"] = sorted({pattern(name) for name in buffers - stored})
    record["buffers"] = sorted({pattern(name) for name in buffers & stored})
    record["statistics"] = sorted(
        {pattern(name) for name in buffers & stored if name.rpartition(".")[0] in norms and not _is_counter(name)}
    )
    record["counters"] = sorted({pattern(name) for name in buffers & stored if _is_counter(name)})
    for key, attribute in (
        ("missing", "_keys_to_ignore_on_load_missing"),
        ("unexpected", "_keys_to_ignore_on_load_unexpected"),
        ("unsaved", "_keys_to_ignore_on_save"),
        ("fp32", "_keep_in_fp32_modules"),
        ("fp32_strict", "_keep_in_fp32_modules_strict"),
    ):
        record[key] = sorted(getattr(model, attribute, None) or ())
    record["axes"] = _axes(cls, config, shapes)
    record["tokens"] = _token_keys(config)
    record["layers"] = _layers(cls, config, modules)
    record |= _ties(cls, model)
    record |= _renames(model, stored)
    return record


def default_config(cls: Any) -> Any:
    """What the class is built from: its config's defaults, and what those leave open."""
    kwargs = dict(OPEN.get(cls.config_class.model_type, {}))
    if cls.__name__ == "ReformerModelWithLMHead":
        kwargs["is_decoder"] = True
    if cls.config_class.model_type in RESNETS:
        import transformers

        kwargs["backbone_config"] = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    return cls.config_class(**kwargs)


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 1024,
    "indexer_compress_ratio": 4,
}

# Configs whose defaults build no model, or one that nobody has.
OPEN: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 8},
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "informer": {"prediction_length": 8},
    "deberta": {"relative_attention": True},  # as all that are published
    "deberta-v2": {"relative_attention": True},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"] * 6, "num_hidden_layers": 12}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_hidden_layers": 4},
    "ministral": {"head_dim": 128},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron": {"num_key_value_heads": 48},
    "perception_lm": {"vision_config": {"model_type": "timm_wrapper", "model_args": {"embed_dim": 64}}},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "time_series_transformer": {"prediction_length": 8},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
}
RESNETS = (
    "detr",
    "conditional_detr",
    "dab-detr",
    "deformable_detr",
    "table-transformer",
)  # their default is a backbone of timm's


def without_timm() -> None:
    """Where timm is not installed, its models are empty: what is around them is known all the same."""
    import importlib.util

    import torch
    from transformers import PreTrainedModel
    from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

    if importlib.util.find_spec("timm") is None:

        def init(self: Any, config: Any) -> None:
            PreTrainedModel.__init__(self, config)
            self.timm_model = torch.nn.Identity()
            self.timm_model.num_features = 64

        TimmWrapperModel.__init__ = init


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _is_table(module: Any) -> bool:
    """Whether a module that calls itself an embedding is one lookup table: one 2-D weight, and no others."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    return own == ["weight"] and module.weight.dim() == 2 and hasattr(module, "num_embeddings")


def _is_raw_table(name: str, modules: Mapping[str, Any]) -> bool:
    """Whether a parameter without a layer of its own is a table of what is added or put into a sequence."""
    owner, _, last = name.rpartition(".")
    kind = type(modules[owner])
    layered = kind.__module__.startswith("torch.nn") or last in ("weight", "bias")
    return not layered and ("embed" in last or last.endswith(("_token", "_tokens")))


def _weights_of(
    model: Any, getter: str, shapes: Mapping[str, Any], modules: Mapping[str, Any], tables: set[str] | None
) -> set[str]:
    """Patterns of the tensors of what `getter` gives, here and in all models within; only of `tables`, if given."""
    from transformers import PreTrainedModel

    places = {id(module): path for path, module in reversed(modules.items())}
    found = set()
    for submodel in modules.values():
        if not isinstance(submodel, PreTrainedModel) or (tables is None and submodel is not model):
            continue
        try:
            module = getattr(submodel, getter)()
        except Exception:  # a class without one says so by raising whatever it likes
            continue
        for one in module if isinstance(module, (list, tuple)) else [module]:
            if id(one) in places:
                path = places[id(one)]
                names = {f"{path}.{name}".lstrip(".") for name, _ in one.named_parameters()}
                found |= {pattern(name) for name in names if name in shapes and (tables is None or name in tables)}
    return found


def _differences(cls: Any, config: Any, shapes: Mapping[str, tuple[int, ...]], wanted: tuple[str, ...]) -> Record:
    more, keys = raised(config, wanted)
    if not keys:
        return {}
    found: dict[str, dict[str, str]] = {}
    for name, shape in shapes_of(built(cls, more)).items():
        before = shapes.get(name, ())
        if len(before) != len(shape):
            continue
        for axis, (a, b) in enumerate(zip(before, shape, strict=True)):
            if b > a and b - a in keys:
                found.setdefault(pattern(name), {})[str(axis)] = keys[b - a]
    return found


def _ties_layers(model: Any) -> bool:
    """Whether layers share tensors: then all of them must be there."""
    names = [name for group in _shared(model) for name in group] + list(model.all_tied_weights_keys)
    return any(numbers(name) for name in names)


def _axes(cls: Any, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Record:
    """Pattern -> axis -> the config key that counts it."""
    found: Record = {}
    try:
        return _differences(cls, config, shapes, ("tokens", "positions", "types", "labels"))
    except Exception:  # a config that cannot be raised like this
        pass
    for wanted in (("tokens",), ("positions", "types"), ("labels",)):
        with contextlib.suppress(Exception):  # then these axes stay unknown
            for name, axes in _differences(cls, config, shapes, wanted).items():
                found.setdefault(name, {}).update(axes)
    return dict(sorted(found.items()))


def _token_keys(config: Any) -> list[str]:
    """The config keys that count the tokenizer's tokens: those of the config that transformers calls the text's."""
    texts = [config]
    for decoder in (None, True, False):
        with contextlib.suppress(Exception):
            texts.append(config.get_text_config(decoder=decoder))
    found = set()
    for path, node in nodes(config):
        if any(node is text for text in texts):
            for key in sorted(vars(node)):
                if TOKENS.search(key) and not TYPES.search(key) and "per_layer" not in key:
                    found.add(f"{path}.{key}" if path else key)
    return sorted(found)


def _layers(cls: Any, config: Any, modules: Mapping[str, Any]) -> Record:
    """Containers of layers -> the config keys that say how many."""
    from torch import nn

    def lengths(more: Any) -> dict[str, int]:
        lists = built(cls, more).named_modules(remove_duplicate=False)
        return {path: len(module) for path, module in lists if isinstance(module, nn.ModuleList)}

    def raised_by(only: str | None = None) -> Record:
        more, keys = deeper(config, only)
        found: dict[str, set[str]] = {}
        for path, length in (lengths(more) if keys else {}).items():
            if isinstance(modules.get(path), nn.ModuleList):
                found.setdefault(pattern(path), set()).update(keys.get(length - len(modules[path]), ()))
        return {path: sorted(of) for path, of in sorted(found.items()) if of}

    with contextlib.suppress(Exception):
        return raised_by()
    found: Record = {}
    for keys in deeper(config)[1].values():  # one at a time, where all of them together fit no other lists
        with contextlib.suppress(Exception):
            found |= raised_by(keys[0])
    counts = {keys[0]: _value(config, keys[0]) for keys in deeper(config)[1].values()}
    for path, module in modules.items():  # and by their length, where not even one fits
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and pattern(path) not in found
            and "#" not in pattern(path)
        ):
            keys = [key for key, count in counts.items() if count == len(module)]
            kinds = {type(layer).__name__ for layer in module}
            if keys and all(re.search("Layer|Block", kind) for kind in kinds):
                near = [key for key in keys if key.partition("_")[0] in path]
                found[path] = near or keys
    return dict(sorted(found.items()))


def _value(config: Any, key: str) -> Any:
    for word in key.split("."):
        config = getattr(config, word)
    return config


def _ties(cls: Any, model: Any) -> Record:
    """What is tied and which config keys say so; what is one tensor in any case.

    `ties`: source pattern by target pattern, with [tied by default, key, ...]. No key: the config is not asked.
    """
    shared = tie_patterns(_pairs(_shared(model)))
    default = tie_patterns(model.all_tied_weights_keys)
    if not any(getattr(module, "_tied_weights_keys", None) for module in model.modules()):
        return {"ties": {}, "one": shared}
    config = default_config(cls)
    paths = [path for path, node in nodes(config) if hasattr(node, "tie_word_embeddings")]
    found = {target: (source, True) for target, source in default.items()}
    keys: dict[str, list[str]] = {}
    for path in paths:
        for value in (True, False):
            try:
                other = built(cls, flipped(cls, config, [path], value))
            except Exception as error:  # as where a part of a config has the key, and the class wants it of the whole
                print(f"{cls.__name__}: {path}.tie_word_embeddings = {value}: {error!r}"[:200], file=sys.stderr)
                continue
            now = tie_patterns(other.all_tied_weights_keys)
            for target in {*now, *default}:
                if (target in now) != (target in default):
                    found.setdefault(target, (now.get(target, ""), False))
                    keys.setdefault(target, []).append(f"{path}.tie_word_embeddings".lstrip("."))
            shared = {t: s for t, s in shared.items() if t not in now}
    ties = {target: [source, int(tied), *keys.get(target, ())] for target, (source, tied) in sorted(found.items())}
    return {"ties": ties, "one": {t: s for t, s in shared.items() if t not in ties}}


def _shared(model: Any) -> list[list[str]]:
    places: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(tensor), []).append(name)
    return [names for names in places.values() if len(names) > 1]


def _pairs(groups: Iterable[list[str]]) -> dict[str, str]:
    return {name: names[0] for names in groups for name in names[1:]}


# Renames


def transform(entry: Any) -> Record:
    """One entry of transformers' conversion mapping as data."""
    found: Record = {"from": list(entry.source_patterns), "to": list(entry.target_patterns)}
    kind = type(entry).__name__
    if kind == "GroupWeightRename":
        found["guarded"] = True
    if kind == "Inkling2IndexOffsetWeightRename":
        found["offset"] = entry.offset
    if kind == "WeightConverter":
        found["by"] = [
            [type(op).__name__, {k: v for k, v in sorted(vars(op).items()) if not k.endswith("_op")}]
            for op in entry.operations
        ]
    return found


def _renames(model: Any, stored: set[str]) -> Record:
    """The class's own renames with the prefix under which they hold; and names in memory that they must leave alone."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    entries = get_model_conversion_mapping(model, add_legacy=False)
    scopes: list[Any] = []
    for entry in entries:
        if not scopes or scopes[-1][0] != entry.scope_prefix:
            scopes.append([entry.scope_prefix, []])
        scopes[-1][1].append(transform(entry))
    entries = get_model_conversion_mapping(model, add_legacy=True)
    renamings = [entry for entry in entries if not isinstance(entry, WeightConverter)]
    fixed = set()
    for name in stored:
        renamed, _ = rename_source_key(name, renamings, [])
        if renamed != name and renamed not in stored:
            fixed.add(pattern(name))
    return {"renames": scopes, "fixed": sorted(fixed)}


# All classes


def all_classes() -> dict[str, Any]:
    """Every public model class of transformers that has a config and is no skeleton of others."""
    import transformers.models
    from transformers import PreTrainedModel

    found = {}
    for package in sorted(p.name for p in pkgutil.iter_modules(transformers.models.__path__) if p.ispkg):
        folder = Path(transformers.models.__path__[0]) / package
        for file in sorted(folder.glob("modeling_*.py")):
            try:
                module = importlib.import_module(f"transformers.models.{package}.{file.stem}")
            except Exception as error:  # a module that needs a library that is not here
                print(f"{package}/{file.name}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            for name in sorted(getattr(module, "__all__", ())):
                cls = getattr(module, name, None)
                if not inspect.isclass(cls) or not issubclass(cls, PreTrainedModel) or "pretrained" in name.lower():
                    continue
                if getattr(cls, "config_class", None) is not None:
                    found[name] = cls
    return found


def learn(cls: Any, cache: Path | None) -> Record:
    """The facts of a class, or {"error": why there are none}."""
    file = cache / f"{cls.__name__}.json" if cache else None
    if file and file.is_file():
        return dict(json.loads(file.read_text()))
    try:
        record = facts_of_class(cls)
    except Exception as error:
        line = str(error).strip().split("\n")[0][:160]
        record = {"type": getattr(cls.config_class, "model_type", ""), "error": f"{type(error).__name__}: {line}"}
    if file:
        file.write_text(json.dumps(record))
    return record


def quiet() -> None:
    """Say nothing while hundreds of models are built."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()


# Families


def suffixes(facts: Mapping[str, Any], names: Iterable[str]) -> Record:
    """Pattern -> fact becomes suffix -> fact: the shortest ending of whole words that says the same of all `names`.

    An ending that is no name's alone is written from the start, with `^`.
    """
    endings: dict[str, list[str]] = {}
    for name in {*names, *facts}:
        parts = name.split(".")
        for i in range(len(parts)):
            endings.setdefault(".".join(parts[i:]), []).append(name)
    found: Record = {}
    for name, fact in sorted(facts.items()):
        parts = name.split(".")
        for i in reversed(range(len(parts))):
            ending = ".".join(parts[i:])
            plain = ending in ("weight", "bias", "#") or ending.startswith("#.")
            if not plain and all(facts.get(other) == fact for other in endings[ending]):
                found[ending] = fact
                break
        else:
            found[f"^{name}"] = fact
    return found


def family(model_type: str, classes: Mapping[str, Record], mains: Iterable[str], base: str | None) -> Record:
    """One record of the file: the facts that hold for a model type, and those that its classes have of their own."""

    def relative(name: str, of: Record) -> str:
        return name.removeprefix(f"{of['prefix']}.") if of["prefix"] else name

    names = {relative(n, c) for c in classes.values() for n in (*c["names"], *c["rebuilt"])}
    record: Record = {"type": model_type}
    record["main"] = next((name for name in mains if name in classes), min(classes))
    for key in ("tables", "rebuilt", "buffers", "statistics", "counters"):
        found = {relative(n, c): 1 for c in classes.values() for n in c[key]}
        if key == "buffers":  # without those of the next two kinds
            others = _all(classes, relative, "statistics") | _all(classes, relative, "counters")
            found = {n: 1 for n in found if n not in others}
        record[key] = list(suffixes(found, names))
    axes: Record = {}
    for of in classes.values():
        for name, counts in of["axes"].items():
            if name in of["rebuilt"]:
                continue
            counts = {axis: key for axis, key in counts.items() if key != "num_labels"}
            if counts:
                axes.setdefault(relative(name, of), []).append(counts)
    apart = {name for name, counts in axes.items() if any(other != counts[0] for other in counts)}
    record["axes"] = suffixes({name: counts[0] for name, counts in axes.items() if name not in apart}, names)
    record["tokens"] = sorted({key for c in classes.values() for key in c["tokens"]})
    record["input"] = sorted({relative(n, c) for c in classes.values() for n in c["input"]})
    record["output"] = sorted({relative(n, c) for c in classes.values() for n in c["output"]})
    said = [tuple(tie[1:]) for c in classes.values() for tie in c["ties"].values()]
    record["tied"] = list(max(sorted(set(said)), key=said.count)) if said else []  # what most of them say
    record["layers"] = {relative(n, c): keys for c in classes.values() for n, keys in c["layers"].items()}
    bases = {relative(n, classes[base]) for n in classes[base]["names"]} if base else set()
    record["parts"] = sorted({n.partition(".")[0] for n in bases})
    record["classes"] = {}
    for name, of in sorted(classes.items()):
        own = {key: of[key] for key in ("missing", "unexpected", "unsaved", "fp32", "fp32_strict", "fixed")}
        own |= {key: of[key] for key in ("prefix", "one", "renames")}
        own["ties"] = {t: tie[0] if tie[1:] == record["tied"] else tie for t, tie in of["ties"].items()}
        if any(scope is not None for scope, _ in of["renames"]) and of["base_model_prefix"] != of["prefix"]:
            own["base"] = of["base_model_prefix"]
        own["axes"] = {f"^{relative(n, of)}": counts for n, counts in of["axes"].items() if relative(n, of) in apart}
        own["heads"] = heads(of, bases, is_base=name == base)
        inner = {relative(n, of) for n in of["names"]}
        own["lacks"] = folded(bases - inner, inner) if of["prefix"] and bases & inner else []
        record["classes"][name] = {key: value for key, value in own.items() if value}
    return {key: value for key, value in record.items() if value or key == "type"}


def _all(classes: Mapping[str, Record], relative: Callable[[str, Record], str], key: str) -> set[str]:
    return {relative(name, of) for of in classes.values() for name in of[key]}


def heads(of: Record, bases: set[str], *, is_base: bool) -> list[str]:
    """What a class has besides its base model, as prefixes: by the base's attribute, else by the base's names."""
    names = set(of["names"])
    if is_base:
        return []
    if of["prefix"]:
        inside = {n for n in names if n.startswith(f"{of['prefix']}.")}
    else:
        inside = names & bases
        if len(inside) * 2 < len(names):
            return [n for n in of["output"] if n in names]
    return folded(names - inside, inside)


def lines(classes: Mapping[str, Record]) -> Iterator[str]:
    """The file: what holds for all, then lists of renames, then a family a line."""
    import transformers
    import transformers.models.auto.modeling_auto as auto
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    known = {name: copy.deepcopy(record) for name, record in sorted(classes.items()) if "error" not in record}
    legacy = [transform(entry) for entry in get_checkpoint_conversion_mapping("legacy")]
    missing = {name: record["error"][:90] for name, record in sorted(classes.items()) if "error" in record}
    yield dumped({"transformers": transformers.__version__, "legacy": legacy, "unknown": missing})
    tables: dict[str, str] = {}
    for name, record in known.items():
        for scope in record["renames"]:
            text = dumped(scope[1])
            if text not in tables:
                again = sum(table.partition("/")[0] == name for table in tables.values())
                tables[text] = f"{name}/{again}" if again else name
            scope[1] = tables[text]
    for text, name in sorted(tables.items(), key=lambda item: item[1]):
        yield f'{{"renames":{json.dumps(name)},"of":{text}}}'
    types: dict[str, dict[str, Record]] = {}
    for name, record in known.items():
        types.setdefault(record["type"], {})[name] = record
    tasks = [getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in MAIN] + [auto.MODEL_MAPPING_NAMES]
    # Model types without classes of their own: they use another's.
    for model_type in sorted({t for task in tasks for t in task} - set(types)):
        others = [n for task in tasks for n in _names(task.get(model_type)) if n in known]
        if others:
            yield dumped({"type": model_type, "class": others[0]})
    for model_type, of in sorted(types.items()):
        mains = [n for task in tasks for n in _names(task.get(model_type))]
        base = next((n for n in _names(auto.MODEL_MAPPING_NAMES.get(model_type)) if n in of), None)
        base = base or next((n for n in sorted(of, key=len) if n.endswith("Model") and "Head" not in n), None)
        yield dumped(family(model_type, of, mains, base))


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


# What families are called on the page, by the ending of their main class; the first that fits.
KINDS = (
    ("Language models", ("ForCausalLM", "LMHeadModel", "WithLMHead", "HeadModel")),
    ("Encoder-decoders, models with vision, audio or several of these", ("ForConditionalGeneration", "MTModel")),
    ("Encoders", ("ForMaskedLM", "ForPreTraining")),
    ("Others: vision, audio, time series, parts of larger models", ("",)),
)
BEGIN, END = "<!-- families: written by scripts/families.py -->", "<!-- families: end -->"


def page(text: str) -> str:
    """docs/which-models.md with its list of families as the table has it."""
    header, *records = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    found = [record for record in records if "classes" in record and record["type"]]
    kinds: dict[str, list[str]] = {kind: [] for kind, _ in KINDS}
    for record in found:
        kinds[next(kind for kind, ends in KINDS if record["main"].endswith(ends))].append(record["type"])
    count = sum(len(record["classes"]) for record in found)
    lines = [f"From transformers {header['transformers']}: {len(found)} model types, {count} classes.", ""]
    for kind, types in kinds.items():
        lines += [f"**{kind}** ({len(types)}): " + ", ".join(f"`{name}`" for name in types) + ".", ""]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return before + BEGIN + "\n\n" + "\n".join(lines) + "\n" + END + after


def dumped(value: Any) -> str:
    """One line of JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def main() -> None:
    """Learn, and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cache", type=Path, help="keep what is learned of each class here")
    parser.add_argument("--only", help="model types, with commas: print their records")
    parser.add_argument("--part", default="0/1", help="i/n: learn only every n-th class, into the cache; write nothing")
    options = parser.parse_args()
    quiet()
    if options.cache:
        options.cache.mkdir(parents=True, exist_ok=True)
    classes = all_classes()
    without_timm()
    if options.only:
        wanted = options.only.split(",")
        classes = {name: cls for name, cls in classes.items() if cls.config_class.model_type in wanted}
    part, parts = map(int, options.part.split("/"))
    records = {}
    for i, (name, cls) in enumerate(classes.items()):
        if i % parts == part:
            records[name] = learn(cls, options.cache)
            print(f"{i + 1}/{len(classes)} {name} {records[name].get('error', '')}", file=sys.stderr)
    if options.only:
        print("\n".join(lines(records)))
    elif parts == 1:
        FILE.write_text("".join(line + "\n" for line in lines(records)), encoding="utf-8")
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
