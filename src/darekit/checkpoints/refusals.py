# SPDX-License-Identifier: Apache-2.0
"""What looks like a model and cannot be merged as it is: how each kind is recognised, and the way out of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from darekit.checkpoints.documents import read_object, shorten
from darekit.checkpoints.files import InputFile
from darekit.checkpoints.safetensors import read_placements
from darekit.dtypes import POWERS
from darekit.errors import CheckpointError, Unsupported
from darekit.wording import some

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLED_ADAPTER = "adapter_model.bin"
ADAPTER_WEIGHTS = (ADAPTER, "adapters.safetensors", PICKLED_ADAPTER)  # the first that is there is read
ADAPTER_INDEX = "adapter_model.safetensors.index.json"  # transformers cuts large ones into shards
ADAPTER_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors")
MLX_ADAPTER = re.compile(r"(?:\d+_)?adapters\.(?:safetensors|npz)")

_WHOLE = ("pytorch_model", "diffusion_pytorch_model")  # how pickled files that hold a model begin: no training_args.bin
_SHARDED_STATE = ".distcp"
_CHECKPOINT = re.compile(r".*?(?:[-_]|step|epoch)(\d{1,18})")  # checkpoint-500, global_step500, of a trainer
_RANK = re.compile(r"model_world_size_\d+_rank_\d+\.pt")  # of verl
MEGATRON = "latest_checkpointed_iteration.txt"  # of verl too
_DEEPSPEED_STATE = re.compile(r".*(?:mp_rank_\d+_model_states|zero_pp_rank_\d+_.*)\.pt")


class Header(Protocol):
    """What is known of a tensor that nobody has read."""

    @property
    def dtype(self) -> str:
        """The safetensors name of its number format."""
        ...

    @property
    def shape(self) -> Sequence[int]:
        """Its dimensions."""
        ...


# Quantised weights

_NARROW = ("I8", "U8", "I16", "U16", "I32", "U32")  # 64 bits wide are indices and counters, and no codes
_CODES = re.compile(r"(?:weight|q_?weight|weight_(?:packed|qdata)|w_q|qidxs|codes|_data|.+_blocks)", re.IGNORECASE)
_STATES = re.compile(
    r"(?:.*_)?(?:scales?|scaling|absmax|amax|scb|q?zeros?|zero_points?|quant_map|code_?books?|centroids)"
    r"(?:_inv|_2|_weight|_factor)?",
    re.IGNORECASE,
)
_KEYS = ("quantization_config", "compression_config")  # the second: of older compressed-tensors
_SCALED = ("scaled_fp8",)  # says of a whole file that F8 weights in it have scales
_SCALE = re.compile(r".*(?:scal(?:es?|ing|ed)|absmax|amax|dequant).*", re.IGNORECASE)


def quantisation_in(config: Mapping[str, Any] | None) -> str | None:
    """How the weights are quantised, as config.json (or a part of a model in it) says; None: it does not say so."""
    for part in _parts(config or {}):
        for key in _KEYS:
            if found := part.get(key):
                method = found.get("quant_method") if isinstance(found, dict) else None
                return f"{key} (quant_method {shorten(method)})"
    return None


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config for weights that are not quantised."""
    return {
        key: without_quantisation(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _KEYS
    }


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _parts(value)


def refuse_quantised(tensors: Mapping[str, Header], said: str | None, where: str) -> None:
    """Refuse weights that are codes, and no numbers; `said`: what their config says, where it says something.

    What is stored decides: a config may say so of weights that were dequantised long ago.

    Raises:
        Unsupported: there are integers where weights are expected, or F8 weights that their config calls quantised.
    """
    eights = [name for name, info in tensors.items() if info.dtype.startswith("F8_") and info.dtype != POWERS.name]
    codes = _find_codes(tensors) or (eights[0] if eights and said else None)
    if codes is not None:
        why = f" and a {said} in its config.json" if said else ""
        raise Unsupported(
            f"{where} has {tensors[codes].dtype} weights ({shorten(codes)}){why}, in a form that darekit does not "
            f"decode: such quantised weights cannot be merged. {_way_on(list(tensors), said)}"
        )
    if eights and (scales := _find_scales(tensors, eights)):
        raise Unsupported(
            f"{where} has F8 weights ({shorten(eights[0])}) with scales beside them ({some(scales)}) that darekit does "
            "not know how to apply: the numbers mean something only when multiplied by their scales, so such quantised "
            f"weights cannot be merged. {_way_on(list(tensors), said)}"
        )


def refuse_quantised_names(names: Sequence[str], said: str, where: str) -> None:
    """The same by names alone, of weights that are not here yet and whose config says that they are quantised.

    Raises:
        Unsupported: there are names that only quantised weights have which are not decoded.
    """
    if any("quant_state.bitsandbytes__" in name for name in names):
        return
    for name in names:
        if _UNREAD.fullmatch(last_of(name)):
            raise Unsupported(
                f"{where} has {shorten(name)} and a {said} in its config.json, in a form that darekit does not decode: "
                f"such quantised weights cannot be merged. {_way_on(names, said)}"
            )


# Names that weights have only in forms that are not decoded.
_UNREAD = re.compile(r"qweight|q_weight|qzeros|weight_qdata|w_q|qidxs|codes|code_?books?|_data|absmax", re.IGNORECASE)

_DEQUANTISE = (
    "Dequantise first: load it in transformers, call `model.dequantize()`, and save_pretrained that; or give the "
    "checkpoint from which it was quantised"
)
_ORIGINAL = "or better, give the checkpoint from which it was quantised"
_GPTQ = (
    "Dequantise first, with GPTQModel (`pip install gptqmodel`), in Python:\n\n"
    "    from gptqmodel.utils.model_dequant import dequantize_model\n"
    '    dequantize_model("MODEL", "OUT", target_dtype=torch.bfloat16)\n\n'
    f"and give OUT; {_ORIGINAL}"
)
_MLX = (
    "Dequantise first, with mlx-lm:\n\n    mlx_lm.convert --hf-path MODEL --mlx-path OUT -d\n\n"
    f"and give OUT; {_ORIGINAL}"
)
_TENSORS = (
    "Dequantise first, in Python, with the library that quantised it ({library}): load it in transformers, put "
    "`{call}` in place of each quantised weight, and save_pretrained that; " + _ORIGINAL
)
# What is to be done, by `quant_method`.
_WAYS = {
    "gptq": _GPTQ,
    "awq": _GPTQ,
    "auto-round": _GPTQ,
    "hqq": _TENSORS.format(library="hqq", call="layer.dequantize()"),
    "torchao": _TENSORS.format(library="torchao", call="weight.dequantize()"),
    "quanto": _TENSORS.format(library="optimum-quanto", call="weight.dequantize()"),
    "aqlm": "AQLM has no tool that dequantises a whole model: give the checkpoint from which it was quantised. "
    "Dequantise first where there is none, layer by layer, with the package aqlm",
}


def _way_on(names: Sequence[str], said: str | None) -> str:
    """What dequantises such weights: by what config.json says, or by their names."""
    for method, way in _WAYS.items():
        if said is not None and f'"{method}"' in said:
            return way
    last = {last_of(name) for name in names}
    if "qweight" in last and "qzeros" in last:
        return _GPTQ
    if {"weight", "scales", "biases"} <= last:
        return _MLX
    return _DEQUANTISE


def _find_codes(tensors: Mapping[str, Header]) -> str | None:
    """A tensor of integers that stand for weights: by its own name, or by scales and the like beside it."""
    powers = [name for name, info in tensors.items() if info.dtype == POWERS.name]
    if powers:  # which scale something
        return powers[0]
    narrow = [name for name, info in tensors.items() if info.dtype in _NARROW and len(info.shape) > 0]
    if not narrow:
        return None
    states = {module_of(name) for name in tensors if _STATES.fullmatch(last_of(name))}
    for name in narrow:
        last = last_of(name)
        if _CODES.fullmatch(last) or (last != "bias" and (name in states or module_of(name) in states)):
            return name
    return None


def _find_scales(tensors: Mapping[str, Header], eights: Sequence[str]) -> list[str]:
    """The tensors that F8 weights must be multiplied by: called so, or too small to be anything else."""
    modules, weights = {module_of(name) for name in eights}, set(eights)
    sizes = {module_of(name): _count(tensors[name]) for name in eights if last_of(name) == "weight"}
    found = []
    for name, info in tensors.items():
        if info.dtype.startswith("F8_") or info.dtype in ("I64", "BOOL"):
            continue
        last, module = last_of(name), module_of(name)
        beside = module in modules or module in weights
        # A layer has a weight and maybe a bias. Whatever else is stored with an F8 weight, and is smaller, scales it.
        small = last != "weight" and "bias" not in last and _count(info) < sizes.get(module, 0)
        if last in _SCALED or (beside and _SCALE.fullmatch(last)) or module in weights or small:
            found.append(name)
    return found


def _count(info: Header) -> int:
    count = 1
    for dimension in info.shape:
        count *= dimension
    return count


def last_of(name: str) -> str:
    """A tensor's own name in its module.

    >>> last_of("a.b.weight")
    'weight'
    """
    return name.rpartition(".")[2]


def module_of(name: str) -> str:
    """The module that a tensor is in.

    >>> module_of("a.b.weight")
    'a.b'
    """
    return name.rpartition(".")[0]


_WEIGHTS = ("weight", "_proj", "embedding", "embeddings")  # how names of weights end


def refuse_empty(tensors: Mapping[str, Header], where: str) -> None:
    """Refuse a model whose weights are elsewhere: DeepSpeed (ZeRO-3) leaves tensors without elements where a run was
    saved without gathering them.

    Raises:
        Unsupported: there are weights of shape [0].
    """
    empty = [name for name, info in tensors.items() if tuple(info.shape) == (0,) and last_of(name).endswith(_WEIGHTS)]
    if empty:
        raise Unsupported(
            f"{where} has {len(empty)} weights that are empty, of shape [0] ({some(empty)}): the run was saved without "
            "gathering its parts, as happens under DeepSpeed ZeRO-3. If the run's folder has zero_to_fp32.py and a "
            "global_step folder, run `python zero_to_fp32.py . OUT` there; otherwise save the model again with "
            "stage3_gather_16bit_weights_on_model_save: true"
        )


# Adapters

_PEFT_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
_OF_ADAPTER = re.compile(
    r".*(?:\.|_)(?:lora_(?:[AaBb]|down|up|mid|magnitude_vector|embedding_[AB])|alpha|dora_scale|hada_w\d_[ab]|"
    r"lokr_w\d(?:_[ab])?)(?:\..*)?"
)


def is_adapter(name: str) -> bool:
    """Whether a file is named like an adapter's weights."""
    return name in (ADAPTER, PICKLED_ADAPTER) or any(one.fullmatch(name) for one in (ADAPTER_SHARD, MLX_ADAPTER))


def refuse_adapter(names: Sequence[str], path: Path) -> None:
    """Refuse a file that holds an adapter, whatever it is called.

    Raises:
        Unsupported: all its tensors have names of an adapter's.
    """
    if names and all(_OF_ADAPTER.fullmatch(name) for name in names):
        raise Unsupported(about_adapter(path if path.is_dir() else path.parent, names))


def about_adapter(directory: Path, names: Sequence[str] = ()) -> str:
    """How to make a whole model of the adapter in a directory; `names`: of its tensors, where they are known."""
    config = _settings(directory / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path") or config.get("model")
    merged = f"{directory.name}-merged"
    if "peft_type" not in config and (_is_mlx(directory, config) or _has_part(names, "lora_a")):
        return (
            f"{directory} is an adapter that mlx-lm trained, not a whole model. In a recipe, list it as a model "
            f"beside its base, or write BASE+{directory}. Elsewhere, fuse it into its base first:\n\n"
            f"    mlx_lm.fuse --model {base or 'BASE'} --adapter-path {directory} --save-path {merged}\n\n"
            f"and give {merged} instead (a quantised base must be dequantised in that step: see `mlx_lm.fuse --help`)"
        )
    if config.get("peft_type") in PROMPTS:
        return about_prompt(str(directory), str(config["peft_type"]))
    task = config.get("task_type")
    cls = _PEFT_CLASSES.get(task) if isinstance(task, str) else None
    if cls is None and (config or not names or _has_part(names, "lora_A")):
        code = _through_the_base(directory, base, config)
    elif cls is not None:
        labels = _labels_of(directory) if task in ("SEQ_CLS", "TOKEN_CLS") else ""
        code = [
            f"from peft import {cls}",
            f'model = {cls}.from_pretrained({str(directory)!r}, torch_dtype="auto"{labels})',
        ]
    else:
        return (
            f"{directory} holds an adapter (all its tensors are parts of one: {some(list(names))}), not a whole model. "
            "Merge it into its base with the tool that trained it, and give the result"
        )
    code.append(f"model.merge_and_unload().save_pretrained({merged!r})")
    lines = "\n".join(f"    {line}" for line in code)
    named = f"In a recipe, list it as a model beside its base, or write BASE+{directory}. Elsewhere, merge it"
    files = [path.name for path in directory.iterdir()]
    if files == [ADAPTER_CONFIG]:
        named = f"Its weights are missing: a recipe takes it once {ADAPTER} is next to {ADAPTER_CONFIG}. Or merge it"
    elif not any(map(is_adapter, files)):
        named = (
            f"A recipe takes it as a model beside its base once its file is called {ADAPTER}, with {ADAPTER_CONFIG} "
            "next to it. Or merge it"
        )
    return (
        f"{directory} is a LoRA/PEFT adapter, not a whole model. {named} into its base first, in Python:\n\n{lines}"
        f"\n\nand give {merged} instead"
    )


def about_prompt(where: str, kind: str) -> str:
    """Why a prompt has no place in a merge."""
    return (
        f"{where} is a prompt that PEFT trained (peft_type {kind}), not a whole model: it changes no weight of its "
        "base, so there is nothing to merge"
    )


def _through_the_base(directory: Path, base: Any, config: Mapping[str, Any]) -> list[str]:
    """The adapter does not say its task: its base says its class, where it is at hand."""
    mapping = config.get("auto_mapping")
    cls = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if cls is None and isinstance(base, str):
        named = _settings(Path(base) / "config.json").get("architectures")
        cls = named[0] if isinstance(named, list) and named else None
    known = isinstance(cls, str) and cls.isidentifier()
    note = "" if known else "  # CLASS: the one that the adapter was trained with"
    return [
        "import peft, transformers",
        f"base = transformers.{cls if known else 'CLASS'}.from_pretrained({str(base or 'BASE')!r}, "
        f'torch_dtype="auto"){note}',
        f"model = peft.PeftModel.from_pretrained(base, {str(directory)!r})",
    ]


def _labels_of(directory: Path) -> str:
    """The argument that tells how many classes a classifier has, where it has others than the two of the default."""
    try:
        file = InputFile(directory / ADAPTER)
        try:
            heads = [place.shape for place in read_placements(file) if _is_classifier(place.name)]
        finally:
            file.close()
    except CheckpointError:
        return ""
    return f", num_labels={heads[0][0]}" if heads and heads[0][0] != 2 else ""


def _is_classifier(name: str) -> bool:
    return re.search(r"(?:^|\.)(?:score|classifier|out_proj)(?:\.modules_to_save\.\w+)?\.weight$", name) is not None


def _is_mlx(directory: Path, config: Mapping[str, Any]) -> bool:
    if {"fine_tune_type", "lora_parameters", "lora_layers"} & config.keys():
        return True
    return directory.is_dir() and any(MLX_ADAPTER.fullmatch(path.name) for path in directory.iterdir())


def _has_part(names: Sequence[str], part: str) -> bool:
    return any(part in name.split(".") for name in names)


def _settings(path: Path) -> dict[str, Any]:
    """A JSON file that only makes an advice better: nothing, where it is not there or broken."""
    try:
        return read_object(path, strict=False)
    except (CheckpointError, ValueError):
        return {}


# What training, other programs and interrupted downloads leave behind

PARTIAL = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download")
PIPELINE = "model_index.json"  # of diffusers

FOREIGN = {
    ".gguf": "GGUF files hold weights for llama.cpp, mostly quantised; give the original checkpoint in safetensors, "
    "or, if there is none, dequantise it: load model and tokenizer with transformers (and the package gguf), "
    "from_pretrained(FOLDER, gguf_file=NAME), and save both with `save_pretrained`",
    ".pt": "it may hold any Python object; save the model with `save_pretrained` and give that directory",
    ".pth": "it may hold any Python object; save the model with `save_pretrained` and give that directory",
    ".ckpt": "it holds a training state; save the model with `save_pretrained` and give that directory",
    ".h5": "it holds weights of TensorFlow; load it with transformers 4 and from_tf=True, and save it with "
    "`save_pretrained`",
    ".msgpack": "it holds weights of Flax; load it with transformers 4 and from_flax=True, and save it with "
    "`save_pretrained`",
    **dict.fromkeys(
        (".onnx", ".tflite", ".litertlm", ".task", ".mlmodel", ".mlpackage", ".pte", ".engine", ".xml"),
        "it holds a graph for inference; give the checkpoint from which it was exported",
    ),
    ".ot": "it holds weights for rust-bert; give the checkpoint from which it was converted",
    ".nemo": "it is an archive of NeMo's; convert it with NeMo's script for Hugging Face, and give that directory",
    ".keras": "it holds a model of Keras; save its weights in safetensors, under the names of transformers",
    ".pdparams": "it holds weights of Paddle; save the model with PaddleFormers' `save_pretrained(..., "
    "save_to_hf=True)`, and give that directory",
    ".llamafile": "it holds a program and weights for llama.cpp; give the checkpoint from which it was made",
    **dict.fromkeys(
        (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst", ".zip", ".7z"),
        "unpack it, and give the folder with the model",
    ),
    ".npz": "it holds arrays of numpy's; save the model in safetensors",
    **dict.fromkeys(PARTIAL, "the download is incomplete; run it again, and give the folder when it is done"),
}


def advise(directory: Path, names: Sequence[str]) -> str | None:
    """Entries of a directory without weights -> what it is, and the way to a model; None: nothing is recognised."""
    if any(is_adapter(name) for name in names) or ADAPTER_CONFIG in names:
        return about_adapter(directory)
    if state := _about_state(directory, names):
        return state
    if PIPELINE in names:
        parts = [str(directory / name) for name in sorted(_folders(directory, names)) if _holds_model(directory / name)]
        return (
            f"{directory} is a pipeline of diffusers, not one model: merge its parts one by one"
            + (f" ({some(parts, 4)})" if parts else "")
            + f", and copy {PIPELINE} and the folders that hold no model beside the results"
        )
    if deeper := _find_deeper(directory, names):
        last = deeper[-1]
        more = f" (the last of {len(deeper)}: {some([str(path) for path in deeper])})" if len(deeper) > 1 else ""
        return f"{directory} itself holds no weights; there are some in {last}{more}. Give {last}"
    for name in _folders(directory, names):  # a trainer's folder for each step, with the states of a sharded run
        if state := _about_state(directory / name, _names_in(directory / name)):
            return state
    inside = [f"{name}/{one}" for name in _folders(directory, names) for one in _names_in(directory / name)]
    for held in (names, inside):
        for suffix, reason in FOREIGN.items():
            if foreign := [name for name in held if name.endswith(suffix)]:
                return f"{directory} has only {some(foreign)}: {reason}"
    return None


def about_file(path: Path) -> str | None:
    """The way from a single file to a model; None: nothing is recognised by its name."""
    if is_adapter(path.name):
        return about_adapter(path.parent)
    if path.suffix == _SHARDED_STATE:
        return _about_sharded(path.parent)
    if _DEEPSPEED_STATE.fullmatch(path.name):
        return _about_deepspeed(path.parent.parent)
    if path.suffix in FOREIGN:
        return f"{path} is not read: {FOREIGN[path.suffix]}"
    return None


def _about_state(directory: Path, names: Sequence[str]) -> str | None:
    """Of a run whose parts were never put together."""
    if actor := _find_ranks(directory, names):
        return (
            f"{actor} holds the state of a run in a file for each rank, as verl writes it, not a whole model. Put its "
            f"weights together:\n\n    python -m verl.model_merger merge --backend fsdp --local_dir {actor} "
            "--target_dir OUT\n\nand give OUT"
        )
    if MEGATRON in names or {"weights", "context"} <= set(names):
        whose, way = ("Megatron", "Megatron-Bridge") if MEGATRON in names else ("NeMo", "NeMo's `export_ckpt`")
        return (
            f"{directory} holds a checkpoint of {whose}, not a model of transformers: export it for Hugging Face with "
            f"{way}, and give the result"
        )
    if "zero_to_fp32.py" in names or any(name.startswith("global_step") for name in names):
        return _about_deepspeed(directory)
    if any(_DEEPSPEED_STATE.fullmatch(name) for name in names):
        return _about_deepspeed(directory.parent)
    if any(name.endswith(_SHARDED_STATE) for name in names):
        return _about_sharded(directory)
    sharded = [name for name in _folders(directory, names) if _is_sharded(directory / name)]
    if sharded:
        return _about_sharded(directory / min(sharded, key=lambda name: ("optim" in name, name)))
    if "pytorch_model_fsdp.bin" in names:
        return f"{directory} holds the weights in pytorch_model_fsdp.bin: give {directory / 'pytorch_model_fsdp.bin'}"
    return None


def _find_ranks(directory: Path, names: Sequence[str]) -> Path | None:
    """The folder with a file for each rank: this one, its `actor`, or that of the latest step."""
    if any(_RANK.fullmatch(name) for name in names):
        return directory
    for name in _folders(directory, names):
        if name == "actor" or name.startswith("global_step_"):
            found = _find_ranks(directory / name, _names_in(directory / name))
            if found is not None:
                return found
    return None


def _about_deepspeed(directory: Path) -> str:
    script = directory / "zero_to_fp32.py"
    run = str(script) if script.exists() else "-m deepspeed.utils.zero_to_fp32"
    return (
        f"{directory} holds the state of a DeepSpeed run, not a whole model. Put its weights together with the script "
        f"zero_to_fp32.py of DeepSpeed:\n\n    python {run} {directory} OUT --safe_serialization\n\n"
        "copy config.json and the tokenizer's files to OUT, and give OUT"
    )


def _about_sharded(directory: Path) -> str:
    return (
        f"{directory} holds the state of a sharded (FSDP) run in {_SHARDED_STATE} files, not a whole model. Put its "
        f"weights together:\n\n    accelerate merge-weights {directory} OUT\n\n"
        "copy config.json and the tokenizer's files to OUT, and give OUT"
    )


def _is_sharded(folder: Path) -> bool:
    return any(name.endswith(_SHARDED_STATE) for name in _names_in(folder))


def _find_deeper(directory: Path, names: Sequence[str]) -> list[Path]:
    """Folders one level (two, in a cache of the Hub) below that hold a model, the latest step of a run last."""
    found = []
    for name in _folders(directory, names):
        if _holds_model(directory / name):
            found.append(directory / name)
        elif name == "snapshots":
            found += [path for path in sorted((directory / name).iterdir()) if path.is_dir() and _holds_model(path)]
    return sorted(found, key=step_of)


def _holds_model(folder: Path) -> bool:
    """Whether a folder has a file named like a model's weights, or like an adapter."""
    return any(
        is_adapter(name) or name.endswith(".safetensors") or (name.startswith(_WHOLE) and name.endswith(".bin"))
        for name in _names_in(folder)
    )


def step_of(path: Path) -> tuple[int, str]:
    """How folders of a run are ordered: by the step in their names."""
    step = _CHECKPOINT.fullmatch(path.name)
    return (int(step[1]) if step else -1, path.name)


def _folders(directory: Path, names: Sequence[str]) -> list[str]:
    return sorted((name for name in names if (directory / name).is_dir()), key=lambda name: step_of(Path(name)))[::-1]


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []
