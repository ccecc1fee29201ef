# SPDX-License-Identifier: Apache-2.0
"""Fixtures: real tiny families that transformers made, one hand-made family, and the command in this process."""

import copy
import json
import os
import sys
from types import SimpleNamespace

import pytest
from hypothesis import settings

import families
from hub_server import Hub

# Examples are not timed: machines are noisy. CI repeats one fixed set; everyone else keeps looking for new ones.
os.environ["COLUMNS"] = "100"  # what is shown where output goes to no terminal; test runners set widths of their own
settings.register_profile("darekit", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("darekit")


@pytest.fixture(scope="session")
def llamas(tmp_path_factory):
    """Hand-made base and three models (bf16) that nobody writes to: .path, .base, .models."""
    path = tmp_path_factory.mktemp("llamas")
    base, models = families.family(path)
    return SimpleNamespace(path=path, base=base, models=models)


@pytest.fixture
def hub():
    """A stand-in of the Hub on this machine; ask it by `hub_server.dare`."""
    server = Hub()
    yield server
    server.close()


@pytest.fixture
def dare(monkeypatch, capsys):
    """Run the command in this process -> code, out, err; `.data` is standard output as JSON."""
    from darekit import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dare", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        data = json.loads(out) if "--json" in arguments and out.strip() else None
        return SimpleNamespace(code=code, out=out, err=err, data=data)

    return run


def _tokenizer(path):
    import tokenizers
    import transformers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 96)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(path)


def _configs():
    import transformers as t

    return {
        "llama": ("bfloat16", t.LlamaForCausalLM, t.LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=64)),
        "gpt2": ("float32", t.GPT2LMHeadModel, t.GPT2Config(
            vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64)),
        "bert": ("float16", t.BertForSequenceClassification, t.BertConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_labels=3, max_position_embeddings=64)),
    }  # fmt: skip


@pytest.fixture(scope="session", params=["llama", "gpt2", "bert"])
def real(request, tmp_path_factory):
    """A family that transformers built and saved: .path holds base, m0, m1, m2; .cls loads them."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp(request.param)
    dtype, cls, config = _configs()[request.param]
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for tensor in model.parameters():  # biases begin as zeros and norms as ones, which hides mistakes
            tensor += 0.02 * torch.randn_like(tensor)
    if model.can_generate():
        model.generation_config.max_new_tokens = 7
    for name in ("base", "m0", "m1", "m2"):
        tuned = copy.deepcopy(model)
        with torch.no_grad():
            for tensor in tuned.parameters() if name != "base" else ():
                tensor += 1e-3 * torch.randn_like(tensor)
        tuned.to(getattr(torch, dtype)).save_pretrained(path / name)
        _tokenizer(path / name)
    return SimpleNamespace(path=path, cls=cls, kind=request.param, dtype=dtype)
