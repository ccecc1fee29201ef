# SPDX-License-Identifier: Apache-2.0
"""What an adapter's config says, read strictly: ranks, scales, and which of PEFT's many forms it has.

What has no meaning on a whole model, or only on a base that was changed before training, is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from darekit.checkpoints.documents import shorten
from darekit.checkpoints.refusals import PROMPTS, about_prompt
from darekit.errors import CheckpointError, Unsupported

Layout = str  # one of `recipe.data.LAYOUTS`

PATTERN_LIMIT = 1000  # characters of a pattern for ranks: the real ones are names of modules


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """An adapter's config.

    Attributes:
        where: its file, for errors.
        form: whose names its tensors have.
        base: the base that it was trained on, as its config names it; None: it does not say.
        rank: of modules for which `ranks` has no pattern; None: what the factors say.
        alpha: likewise of `alphas`.
        scale: of all modules (mlx); None: it follows from rank and alpha.
        ranks, alphas: pattern of a module's name -> its rank, its alpha.
        rslora: the scale is alpha / sqrt(rank).
        dora: magnitudes are trained apart.
        lora_bias: factors B have biases.
        transposed: linear layers are stored [in, out].
        biases: which biases were trained: none, all, lora_only.
        saved: names of modules that are trained as a whole.
        tokens: name of a module (embed_tokens where the config has only numbers) -> rows that were trained.
        parameters: names of parameters that are adapted by themselves: experts in one tensor.
        tie: what is done to the input embedding is done to the output embedding.
        layout: of the experts in a factor B; None: it does not say.
        unsloth: it looks as if Unsloth wrote it, whose older versions had another order of experts.
        version: of PEFT, as (0, 18, 1); None: it does not say.
        task: what the model was trained for, in PEFT's words.
        model_class: of the model that was trained, where it is said.
        targets: ends of names of modules that have factors; none where it has a regular expression.
        excludes: the same of modules that have none; None: a regular expression.
        layers: numbers of the only layers that have factors; none: all have.
        notes: what the user should know.
    """

    where: str
    form: Literal["peft", "mlx"] = "peft"
    base: str | None = None
    rank: int | None = None
    alpha: float | None = None
    scale: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    transposed: bool = False
    biases: str = "none"
    saved: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    tie: bool = False
    layout: Layout | None = None
    unsloth: bool = False
    version: tuple[int, ...] | None = None
    task: str | None = None
    model_class: str | None = None
    targets: tuple[str, ...] = ()
    excludes: tuple[str, ...] | None = ()
    layers: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def scale_of(self, module: str, rank: int) -> float:
        """What a module's product is multiplied by: alpha / rank, or alpha / sqrt(rank). `rank`: of its factors.

        Raises:
            CheckpointError: the config gives this module another rank.
        """
        if self.scale is not None:
            return self.scale
        said = self.ranks.get(_first_match(self.ranks, module) or "", self.rank)
        if said is not None and said != rank:
            raise CheckpointError(
                f"{self.where}: {module} has rank {said} by the config, but its factors have rank {rank}: config and "
                "weights do not belong together"
            )
        alpha = self.alphas.get(_first_match(self.alphas, module) or "", self.alpha)
        if alpha is None:
            raise CheckpointError(f"{self.where} has no lora_alpha, which gives the scale of the product")
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _first_match(patterns: Mapping[str, object], module: str) -> str | None:
    """The first pattern that fits the end of a module's name, as PEFT looks for it."""
    return next((one for one in patterns if re.match(rf"(.*\.)?({one})$", module)), None)


def read_config(data: Mapping[str, Any], where: str) -> AdapterConfig:
    """The content of an adapter's config.

    Args:
        data: of adapter_config.json.
        where: that file, for errors.

    Raises:
        CheckpointError: a value is of a wrong kind.
        Unsupported: an adapter that cannot be added to a whole model; the message says what to do instead.
    """
    if "peft_type" not in data and ({"fine_tune_type", "lora_parameters", "lora_layers", "num_layers"} & data.keys()):
        return _of_mlx(_Values(data, where))
    return _of_peft(_Values(data, where))


@dataclass(frozen=True)
class _Values:
    """A config's values, each of the kind that is expected."""

    data: Mapping[str, Any]
    where: str

    def wrong(self, key: str, expected: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: {key} is {shorten(self.data[key])}, expected {expected}")

    def flag(self, key: str) -> bool:
        value = self.data.get(key)
        if not isinstance(value, bool | None):
            self.wrong(key, "true or false")
        return bool(value)

    def text(self, key: str) -> str | None:
        value = self.data.get(key)
        if not isinstance(value, str | None):
            self.wrong(key, "a text")
        return value or None

    def rank(self, key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.wrong(key, "a whole number from 1 on")
        return value

    def number(self, key: str, value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not _is_finite(value):
            self.wrong(key, "a finite number")
        return float(value)

    def names(self, key: str) -> tuple[str, ...]:
        value = self.data.get(key)
        value = [value] if isinstance(value, str) else value or []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            self.wrong(key, "a list of names")
        return tuple(value)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.data.get(key) or {}
        if not isinstance(value, dict):
            self.wrong(key, "a mapping")
        return value

    def patterns(self, key: str) -> dict[str, Any]:
        value = self.mapping(key)
        for pattern in value:
            try:
                fits = len(pattern) <= PATTERN_LIMIT and re.compile(rf"(.*\.)?({pattern})$")
            except (re.error, RecursionError, OverflowError):
                fits = False
            if not fits:
                self.wrong(key, f"names of modules or regular expressions; {shorten(pattern)} is neither")
        return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def _of_peft(values: _Values) -> AdapterConfig:
    data, where = values.data, values.where
    _refuse_kinds(values)
    _refuse_forms(values)
    rank = values.rank("r", data["r"]) if data.get("r") is not None else None
    alpha = values.number("lora_alpha", data["lora_alpha"]) if data.get("lora_alpha") is not None else None
    biases = values.text("bias") or "none"
    if biases not in ("none", "all", "lora_only"):
        values.wrong("bias", "none, all or lora_only")
    mapping = data.get("auto_mapping")
    trained = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return AdapterConfig(
        where=where,
        base=values.text("base_model_name_or_path"),
        rank=rank,
        alpha=alpha,
        ranks={key: values.rank("rank_pattern", one) for key, one in values.patterns("rank_pattern").items()},
        alphas={key: values.number("alpha_pattern", one) for key, one in values.patterns("alpha_pattern").items()},
        rslora=values.flag("use_rslora"),
        dora=values.flag("use_dora"),
        lora_bias=values.flag("lora_bias"),
        transposed=values.flag("fan_in_fan_out"),
        biases=biases,
        saved=values.names("modules_to_save"),
        tokens=_tokens_in(values),
        parameters=values.names("target_parameters"),
        tie=values.flag("ensure_weight_tying"),
        layout=_layout_in(values),
        unsloth="unsloth" in f"{[*data, mapping, data.get('base_model_name_or_path')]}".lower(),
        version=_version_in(values),
        task=values.text("task_type"),
        model_class=trained if isinstance(trained, str) else None,
        targets=_ends_in(data.get("target_modules")) or (),
        excludes=_ends_in(data.get("exclude_modules")),
        layers=_layers_in(data.get("layers_to_transform")),
        notes=tuple(_notes_on_unknown(values)),
    )


def _ends_in(value: object) -> tuple[str, ...] | None:
    """A list of modules' names; None for a regular expression."""
    if isinstance(value, str):
        return None
    return tuple(one for one in value if isinstance(one, str)) if isinstance(value, list) else ()


def _layers_in(value: object) -> tuple[int, ...]:
    many = value if isinstance(value, list) else [value]
    return tuple(one for one in many if type(one) is int)


def _notes_on_unknown(values: _Values) -> Iterator[str]:
    """Of settings that no PEFT has up to 0.21: what is switched on by its name is refused, other things are told.

    Raises:
        Unsupported: a form of adapters that nobody knew.
    """
    unknown = {key: value for key, value in values.data.items() if key not in _KNOWN}
    on = [key for key, value in unknown.items() if value is True]
    forms = [key for key in on if key.startswith("use_")]
    if forms:
        raise Unsupported(
            f"{values.where} says {forms[0]}: true, which PEFT up to 0.21 does not know: it may be a form of adapter "
            f"that cannot be read. {_MERGED[0].upper()}{_MERGED[1:]}. If it says nothing about the weights, remove "
            "it from the config"
        )
    told = [*on, *(key for key, value in unknown.items() if isinstance(value, dict) and value)]
    if told:
        yield (
            f"WARNING: {values.where} has {first_of(told)}, which PEFT up to 0.21 does not know: it is read as plain "
            "LoRA. If it changes how the factors act, the result is wrong"
        )


def _tokens_in(values: _Values) -> dict[str, tuple[int, ...]]:
    found = values.data.get("trainable_token_indices")
    if not found:
        return {}
    tables = found if isinstance(found, dict) else {"embed_tokens": found}
    for rows in tables.values():
        if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
            values.wrong("trainable_token_indices", "a list of row numbers, or one for each of some modules")
    return {name: tuple(rows) for name, rows in tables.items()}


def _layout_in(values: _Values) -> Layout | None:
    """The marker that Unsloth writes since it has PEFT's order of experts."""
    found = values.data.get("lora_B_layout")
    if found is None:
        return None
    if found == "rank_major":
        return "peft"
    if found == "grouped_by_expert":
        return "grouped"
    values.wrong("lora_B_layout", "rank_major or grouped_by_expert")


def _version_in(values: _Values) -> tuple[int, ...] | None:
    found = re.match(r"(\d{1,6})\.(\d{1,6})", str(values.data.get("peft_version")))
    return (int(found[1]), int(found[2])) if found else None


def _of_mlx(values: _Values) -> AdapterConfig:
    kind = values.text("fine_tune_type") or "lora"
    if kind not in ("lora", "dora", "full"):
        values.wrong("fine_tune_type", "lora, dora or full")
    settings = _Values(values.mapping("lora_parameters") or values.data, values.where)
    rank, scale = settings.data.get("rank"), settings.data.get("scale", 10.0 if "rank" in settings.data else None)
    if settings.data.get("alpha") is not None and rank:
        alpha = settings.number("alpha", settings.data["alpha"]) / settings.rank("rank", rank)
        if "scale" not in settings.data:
            scale = alpha
        elif alpha != 1 and "num_layers" not in values.data:  # what lora_layers is called since alpha means nothing
            raise CheckpointError(
                f"{values.where} has both alpha and scale in lora_parameters: the first versions of mlx-lm multiplied "
                f"the product by scale x alpha / rank ({settings.number('scale', scale) * alpha:g}), later ones by "
                f"scale alone ({scale:g}), and nothing says which trained this. Put the number that holds "
                "into scale, and remove alpha"
            )
    if scale is None and kind != "full":
        raise CheckpointError(f"{values.where} has no scale in lora_parameters, by which mlx multiplies the product")
    return AdapterConfig(
        where=values.where,
        form="mlx",
        base=values.text("model"),
        rank=None if rank is None else settings.rank("rank", rank),
        scale=None if scale is None else settings.number("scale", scale),
        dora=kind == "dora",
    )


# What is refused

# Keys of adapter_config.json: of PEFT 0.21, of its first versions, and Unsloth's marker.
_KNOWN = frozenset({
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias",
    "corda_config", "enable_lora", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "kasa_config", "layer_replication", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_B_layout", "lora_bias", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "merge_weights", "modules_to_save", "monteclora_config",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora", "use_rslora", "velora_config",
})  # fmt: skip

_CONVERTED = ("LOHA", "LOKR", "VERA", "FOURIERFT", "SHIRA", "HIRA", "MISS", "C3A", "PSOFT", "WAVEFT")
_BASE_CHANGED = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA"}
_MERGED = "merge it into its base with PEFT's merge_and_unload(), save that, and give the result"


def _refuse_kinds(values: _Values) -> None:
    kind = values.data.get("peft_type")
    if str(kind).upper() == "LORA" or (kind is None and "r" in values.data):
        return
    if kind is None:
        raise Unsupported(
            f"{values.where} is no config of PEFT's LoRA or of mlx-lm: it has {first_of([*values.data]) or 'no keys'}, "
            "expected peft_type, r and lora_alpha, or lora_parameters. Save the adapter in one of these formats "
            "with the tool that trained it, or merge it there, and give the result"
        )
    if kind in PROMPTS:
        raise Unsupported(about_prompt(values.where, str(kind)))
    if kind in _CONVERTED:
        raise Unsupported(
            f"{values.where}: a PEFT adapter of type {kind}; only LoRA can be read. PEFT (0.18 and later) "
            f"converts it: load it on its base with PeftModel.from_pretrained, call "
            f"`peft.save_as_lora(OUT, model, rank=R)`, and give OUT; or {_MERGED}"
        )
    raise Unsupported(f"{values.where}: a PEFT adapter of type {shorten(kind)}; only LoRA can be read: {_MERGED}")


def _refuse_forms(values: _Values) -> None:
    data = values.data
    init = str(data.get("init_lora_weights")).lower()
    changed = next((name for begin, name in _BASE_CHANGED.items() if init.startswith(begin)), None)
    if changed is not None or data.get("kasa_config"):
        name = changed or "KaSA"
        raise Unsupported(
            f"{values.where}: a {name} adapter, which is relative to a base that {name} changed before training, and "
            "not to the published one. "
            + (
                "Save it as plain LoRA, in PEFT: model.save_pretrained(OUT, path_initial_model_for_weight_conversion="
                "FOLDER) with the adapter as it was before training; or "
                if name != "KaSA"
                else ""
            )
            + "merge it into its own base with PEFT's merge_and_unload(), and give the result"
        )
    forms = {
        "alora_invocation_tokens": ("an aLoRA adapter: it is active only behind its invocation tokens", ""),
        "use_qalora": ("a QALoRA adapter: its factors see groups of inputs of a quantised base", ""),
        "arrow_config": ("an Arrow router: it chooses an adapter for each token", ": give these adapters one by one"),
        "layer_replication": (
            "an adapter with layer_replication: its model has more layers than its base",
            f": {_MERGED}; or repeat the layers by `slices` of a recipe and train on the result",
        ),
        "use_bdlora": ("a BD-LoRA adapter: its factors are stored in blocks", f": {_MERGED}"),
    }  # fmt: skip
    for key, (what, way) in forms.items():
        if data.get(key):
            raise Unsupported(
                f"{values.where}: {what}, so no whole model is equivalent to it{way}"
                if key != "use_bdlora"
                else f"{values.where}: {what}, which is not supported{way}"
            )


def first_of(names: Sequence[str]) -> str:
    """At most three names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
