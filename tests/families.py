# SPDX-License-Identifier: Apache-2.0
"""Tiny model families on disk, written and read here by hand: nothing of darekit takes part."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np

NAMES = {
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "int64": "I64", "int32": "I32", "int8": "I8", "uint8": "U8",
    "bool": "BOOL", "complex64": "C64",
}  # fmt: skip
KINDS = {name: getattr(ml_dtypes, kind, None) or np.dtype(kind) for kind, name in NAMES.items()}

VOCAB, HIDDEN, INNER, LAYERS = 96, 32, 48, 2


def write_safetensors(path, tensors):
    header, at = {}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": NAMES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def save(directory, tensors, config=None, *, shards=1):
    """A checkpoint directory; the tensors lie in the files in the order of the dict."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return directory
    index = {}
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(directory / file, part)
        index |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def load(directory):
    """All tensors of a directory, by name."""
    tensors = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        found = load_file(path)
        assert not found.keys() & tensors.keys()
        tensors |= found
    return tensors


def load_file(path):
    """All tensors of one file, by name."""
    raw = Path(path).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        data = np.frombuffer(raw[8 + size + begin : 8 + size + end], KINDS[entry["dtype"]])
        tensors[name] = data.reshape(entry["shape"])
    return tensors


def llama(rng, kind=ml_dtypes.bfloat16, *, vocab=VOCAB, tied=False, layers=LAYERS):
    """Name -> array of a Llama's shape, all of one dtype."""
    shapes = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
        shapes |= {f"{at}.mlp.{x}_proj.weight": (INNER, HIDDEN) for x in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (HIDDEN, INNER)}
        shapes |= {f"{at}.{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,)} | ({} if tied else {"lm_head.weight": (vocab, HIDDEN)})
    return {
        name: (rng.normal(0, 0.05, shape) + (len(shape) == 1)).astype(kind)  # norms are about 1
        for name, shape in shapes.items()
    }


def config(*, vocab=VOCAB, tied=False, dtype="bfloat16", layers=LAYERS):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4,
        "vocab_size": vocab, "tie_word_embeddings": tied, "torch_dtype": dtype, "max_position_embeddings": 64,
    }  # fmt: skip


def tuned(rng, base, scale=2e-3):
    """Base plus a little noise of relative size scale / 0.05."""
    return {
        name: (array.astype(np.float64) + rng.normal(0, scale, array.shape)).astype(array.dtype)
        if array.dtype.kind not in "iub"
        else array
        for name, array in base.items()
    }


def family(directory, *, kind=ml_dtypes.bfloat16, k=3, scale=2e-3, seed=0, shards=1, dtype="bfloat16"):
    """base and m0 .. m(k-1) under `directory`."""
    rng = np.random.default_rng(seed)
    base = llama(rng, kind)
    models = [tuned(rng, base, scale) for _ in range(k)]
    save(directory / "base", base, config(dtype=dtype), shards=shards)
    for i, model in enumerate(models):
        save(directory / f"m{i}", model, config(dtype=dtype), shards=shards)
    return base, models


def recipe(directory, k=3, **keys):
    """A recipe as data: models m0 .. m(k-1) of `directory` on its base, task arithmetic unless said otherwise."""
    return {
        "base_model": str(directory / "base"),
        "models": [{"model": str(directory / f"m{i}")} for i in range(k)],
        "merge_method": "task_arithmetic",
        **keys,
    }


def same(found, expected):
    """Two dicts of arrays agree in names, dtypes, shapes and every bit."""
    assert list(sorted(found)) == list(sorted(expected))
    for name, array in expected.items():
        other = found[name]
        assert (other.dtype, other.shape) == (array.dtype, array.shape), name
        assert other.tobytes() == np.ascontiguousarray(array).tobytes(), name


def contents(directory):
    """Every file under a directory, by relative path; a lock without what may differ between machines."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(Path(directory).rglob("*")) if p.is_file()}


def copy(source, target):
    shutil.copytree(source, target)
    return target


def damage(pack: Path, part: str, at: int = -2) -> None:
    """Flip one bit of a part of a pack, such as `values:lm_head.weight`: of its byte `at`, from the end if negative."""
    raw = bytearray(pack.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    first, end = json.loads(raw[8:begin])[part]["data_offsets"]
    raw[begin + (first if at >= 0 else end) + at] ^= 1
    pack.write_bytes(raw)
