# SPDX-License-Identifier: Apache-2.0
"""A LLaMA-shaped family for the benchmarks: a base and three models with deltas ~ N(0, 5e-4), bf16, in shards."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from darekit.checkpoints import OutputTensor, Shard, index_json, lay_out, open_checkpoint

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 1536, 4096, 16, 38400  # 0.57e9 parameters
SHARD_SIZE = 300_000_000
MODELS = ("math", "code", "chat")
ADAPTERS, RANK = ("lora1", "lora2", "lora3"), 16
CHUNK = 1 << 22


def tensors(scale: int) -> Iterator[OutputTensor]:
    """`scale` multiplies the number of layers and the vocabulary: about that many times the parameters."""
    h, m = HIDDEN, INTERMEDIATE
    yield OutputTensor("model.embed_tokens.weight", "BF16", (VOCABULARY * scale, h))
    for i in range(LAYERS * scale):
        p = f"model.layers.{i}."
        yield OutputTensor(p + "input_layernorm.weight", "BF16", (h,))
        for name, shape in (("q", (h, h)), ("k", (h, h)), ("v", (h, h)), ("o", (h, h))):
            yield OutputTensor(f"{p}self_attn.{name}_proj.weight", "BF16", shape)
        yield OutputTensor(p + "post_attention_layernorm.weight", "BF16", (h,))
        for name, shape in (("gate", (m, h)), ("up", (m, h)), ("down", (h, m))):
            yield OutputTensor(f"{p}mlp.{name}_proj.weight", "BF16", shape)
    yield OutputTensor("model.norm.weight", "BF16", (h,))
    yield OutputTensor("lm_head.weight", "BF16", (VOCABULARY * scale, h))


def round_bf16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def config(scale: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS * scale, "num_attention_heads": 12,
        "num_key_value_heads": 12, "vocab_size": VOCABULARY * scale, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def build(folder: Path, scale: int = 1) -> None:
    """Write base, math, code and chat below `folder`, unless they are there."""
    done = folder / "complete"
    if done.exists():
        return
    shards = lay_out(list(tensors(scale)), SHARD_SIZE)
    for name in ("base", *MODELS):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config(scale), indent=1))
        if len(shards) > 1:
            (folder / name / "model.safetensors.index.json").write_text(index_json(shards))
    for number, shard in enumerate(shards):
        write_shard(folder, shard, np.random.default_rng(number))
    done.touch()


def build_union(folder: Path, source: Path) -> None:
    """The family of `source` with tokenizers, and 100 new tokens: a third of them in each model, at the same ids.

    Weights are those of `source`, with new rows behind embedding and head.
    """
    if (folder / "complete").exists():
        return
    for name in ("base", *MODELS):
        rng = np.random.default_rng(len(name))
        new = [f"<{name}{i}>" for i in range({"base": 0, MODELS[0]: 34}.get(name, 33))]
        rows = VOCABULARY + len(new)
        checkpoint = open_checkpoint(source / name)
        layout = [
            OutputTensor(info.name, info.dtype, (rows, *info.shape[1:]) if VOCABULARY in info.shape else info.shape)
            for info in checkpoint.tensors.values()
        ]
        shards = lay_out(layout, SHARD_SIZE)
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config(1) | {"vocab_size": rows}, indent=1))
        (folder / name / "model.safetensors.index.json").write_text(index_json(shards))
        (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer(new)))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings))
        for shard in shards:
            with (folder / name / shard.filename).open("wb") as file:
                file.write(shard.header)
                for place in shard.placements:
                    raw = np.empty(checkpoint.tensors[place.name].nbytes, np.uint8)
                    checkpoint.tensors[place.name].source.read_into(raw, 0)
                    file.write(raw.tobytes())
                    extra = rng.standard_normal((place.nbytes - raw.size) // 2, np.float32) * np.float32(0.02)
                    file.write(round_bf16(extra).tobytes())
        checkpoint.close()
    (folder / "complete").touch()


def build_adapters(folder: Path, source: Path) -> None:
    """The base of `source`, and three adapters on all of its linear layers, of rank 16 in BF16 as PEFT writes them."""
    if (folder / "complete").exists():
        return
    (folder / "base").mkdir(parents=True, exist_ok=True)
    for path in (source / "base").iterdir():
        (folder / "base" / path.name).symlink_to(path.resolve())
    layers = [tensor for tensor in tensors(1) if "_proj" in tensor.name]
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none",
        "target_modules": sorted({tensor.name.split(".")[-2] for tensor in layers}), "base_model_name_or_path": "base",
    }  # fmt: skip
    layout = [
        OutputTensor(f"base_model.model.{tensor.name.removesuffix('weight')}lora_{x}.weight", "BF16", shape)
        for tensor in layers
        for x, shape in (("A", (RANK, tensor.shape[1])), ("B", (tensor.shape[0], RANK)))
    ]
    for number, name in enumerate(ADAPTERS):
        rng = np.random.default_rng(number)
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "adapter_config.json").write_text(json.dumps(settings, indent=1))
        (shard,) = lay_out(layout, SHARD_SIZE)
        with (folder / name / "adapter_model.safetensors").open("wb") as file:
            file.write(shard.header)
            for place in shard.placements:
                values = rng.standard_normal(place.nbytes // 2, np.float32) * np.float32(0.01)
                file.write(round_bf16(values).tobytes())
    (folder / "complete").touch()


def tokenizer(new: list[str]) -> dict[str, object]:
    """A tokenizer.json of words with these added tokens."""
    vocabulary = {word: i for i, word in enumerate(("<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))))}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [(0, "<unk>"), (1, "<s>"), (2, "</s>"), *((VOCABULARY + i, token) for i, token in enumerate(new))]
    model = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary, "merges": [],
    }  # fmt: skip
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    entries = [{"id": i, "content": token, **flags} for i, token in added]
    return {"version": "1.0", **parts, "added_tokens": entries, "model": model}


def write_shard(folder: Path, shard: Shard, rng: np.random.Generator) -> None:
    files = {name: (folder / name / shard.filename).open("wb") for name in ("base", *MODELS)}
    for file in files.values():
        file.write(shard.header)
    for place in shard.placements:
        left = place.nbytes // 2
        while left:
            n = min(left, CHUNK)
            base = rng.standard_normal(n, np.float32) * np.float32(0.02) + np.float32(len(place.shape) == 1)
            files["base"].write(round_bf16(base).tobytes())
            base = (round_bf16(base).astype(np.uint32) << 16).view(np.float32)
            for name in MODELS:
                delta = rng.standard_normal(n, np.float32) * np.float32(5e-4)
                files[name].write(round_bf16(base + delta).tobytes())
            left -= n
    for file in files.values():
        file.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=int, default=1)
    arguments = parser.parse_args()
    build(arguments.folder, arguments.scale)
