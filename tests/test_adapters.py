# SPDX-License-Identifier: Apache-2.0
"""Adapters as models: each form that PEFT writes comes to what PEFT makes of it, and never rounds before the merge."""

import numpy as np
import pytest

import families
import lora
from darekit.checkpoints import traits_of
from darekit.inputs.adapters.products import low_rank
from darekit.kernels import products
from darekit.planning.opening import open_models

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

FORMS = {
    "plain": {"target_modules": ALL},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "patterns": {
        "target_modules": ALL, "rank_pattern": {"down_proj": 2, "layers.1.self_attn.*": 3},
        "alpha_pattern": {r".*\.mlp\.(up|gate)_proj": 16, "down_proj": 3},
    },
    "dora": {"target_modules": ALL, "use_dora": True},
}  # fmt: skip


# What PEFT can do with an adapter on its base -> class, and the settings of LoRA.
MORE = {
    "gpt2": ("GPT2LMHeadModel", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 dora": ("GPT2LMHeadModel", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "gpt2 biases": ("GPT2LMHeadModel", {"target_modules": ["c_fc"], "lora_bias": True, "fan_in_fan_out": True}),
    "bert": ("BertForMaskedLM", {"target_modules": ["query", "value", "dense"], "lora_bias": True}),
    "bert all biases": ("BertForMaskedLM", {"target_modules": ["query"], "bias": "all"}),
    "bert own biases": ("BertForMaskedLM", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "bert head": (
        "BertForSequenceClassification", {"target_modules": ["query"], "task_type": "SEQ_CLS",
        "modules_to_save": ["classifier", "pooler"]},
    ),
    "norms": ("LlamaForCausalLM", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]}),
    "embeddings": ("LlamaForCausalLM", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "embeddings dora": ("LlamaForCausalLM", {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True}),
    "saved embeddings": (
        "LlamaForCausalLM", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    ),
    "tokens": ("LlamaForCausalLM", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 60]}),
    "tokens by module": (
        "LlamaForCausalLM", {"target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [4]}},
    ),
    "convolutions": ("ResNetForImageClassification", {"target_modules": ["convolution"]}),
    "convolutions dora": ("ResNetForImageClassification", {"target_modules": ["convolution"], "use_dora": True}),
    "1-d convolutions": (
        "Wav2Vec2ForCTC", {"target_modules": r".*feature_extractor\.conv_layers\.\d\.conv|.*q_proj"}
    ),
    "mixtral": (
        "MixtralForCausalLM", {"target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "qwen3 moe": (
        "Qwen3MoeForCausalLM", {"target_modules": ["v_proj", "gate"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "qwen3 moe, one of two": (
        "Qwen3MoeForCausalLM", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    ),
    "gpt-oss": (
        "GptOssForCausalLM", {"target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "parameters of linear layers": (
        "LlamaForCausalLM", {"target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]}
    ),
}  # fmt: skip


SELDOM = (
    "gpt2 dora", "gpt2 biases", "bert own biases", "norms", "saved embeddings", "tokens by module", "embeddings dora",
    "convolutions dora", "1-d convolutions", "qwen3 moe, one of two", "parameters of linear layers",
)  # fmt: skip


@pytest.mark.parametrize("form", [pytest.param(f, marks=pytest.mark.check) if f in SELDOM else f for f in MORE])
def test_forms_of_other_models(form, tmp_path):
    name, settings = MORE[form]
    adapter = lora.make(tmp_path, "a", name, **settings)
    lora.merge(tmp_path / "out", tmp_path / "base", adapter)
    lora.agree(tmp_path / "out", tmp_path / "a-merged")


@pytest.mark.parametrize("form", FORMS)
def test_a_form_comes_to_what_peft_makes_of_it(form, tmp_path):
    adapter = lora.make(tmp_path, "a", **FORMS[form])
    lora.merge(tmp_path / "out", tmp_path / "base", adapter)
    lora.agree(tmp_path / "out", tmp_path / "a-merged")
    lora.merge(tmp_path / "pair", tmp_path / "base", f"{tmp_path / 'base'}+{adapter}")
    families.same(families.load(tmp_path / "pair"), families.load(tmp_path / "out"))


def test_the_kernel_has_the_bits_of_the_definition_in_any_range():
    rng = np.random.default_rng(0)
    for rows, rank, width in ((1, 1, 1), (5, 3, 7), (40, 8, 33), (17, 21, 600), (3, 16, 1)):
        left, right = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, rank), (rank, width)))
        whole = low_rank(left, right).reshape(-1)
        assert np.allclose(whole.reshape(rows, width), left.astype(np.float64) @ right, atol=1e-4)
        for begin, end in {(0, whole.size), (whole.size // 3, whole.size // 2 + 1), (whole.size - 1, whole.size)}:
            out = np.full(end - begin, np.nan, np.float32)
            products.low_rank_into(left, right, begin, out)
            assert (out == whole[begin:end]).all(), (rows, rank, width, begin, end)


def test_what_no_module_touches_is_the_base_s_own(tmp_path):
    adapter = lora.make(tmp_path, "a", target_modules=["q_proj"])
    with open_models(tmp_path / "base", [adapter]) as (base, (model,)):
        for name, info in model.tensors.items():
            if "q_proj" not in name:
                assert info.source is base.tensors[name].source
            else:
                assert traits_of(info.source).delta.base == base.tensors[name].source
