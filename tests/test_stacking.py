# SPDX-License-Identifier: Apache-2.0
"""config.json of stacked layers: by hand where the rule is known, by transformers where a model can be built."""

import json

import pytest

import darekit as dk
from darekit.architectures.parts import is_before, part_of
from darekit.architectures.stacking import Source, restacked, told_apart
from darekit.errors import PlanError

OPTIONS = {"force": True, "threads": 1}


def stack(config, order, part="text", count=None):
    """The config of layers `order` of one model."""
    count = count or config.get("num_hidden_layers") or config["text_config"]["num_hidden_layers"]
    return restacked(config, part, [[Source(config, index, count)] for index in order], count)


S, F, L = "sliding_attention", "full_attention", "linear_attention"


@pytest.mark.parametrize(
    ("config", "order", "wanted"),
    [
        # lists
        ({"layer_types": [S, S, F, S]}, [0, 2, 2, 3, 1], {"layer_types": [S, F, F, S, S]}),
        ({"hybrid_override_pattern": "M*-M"}, [1, 1, 0], {"hybrid_override_pattern": "**M"}),
        ({"intermediate_size": [1, 2, 3, 4]}, [3, 0], {"intermediate_size": [4, 1]}),
        ({"no_rope_layers": [1, 1, 1, 0]}, [3, 3], {"no_rope_layers": [0, 0]}),
        # index sets
        ({"mlp_only_layers": [0, 2], "decoder_sparse_step": 1}, [1, 2, 0, 2], {"mlp_only_layers": [1, 2, 3]}),
        ({"full_attn_idxs": [1, 3]}, [3, 0, 1], {"full_attn_idxs": [0, 2]}),
        ({"linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2, 3]}}, [3, 0, 3],
         {"linear_attn_config": {"full_attn_layers": [1, 3], "kda_layers": [2]}}),
        ({"per_layer_config": {"0": "a", "3": "b"}}, [3, 1, 0], {"per_layer_config": {"0": "b", "2": "a"}}),
        # rules that still hold
        ({"sliding_window_pattern": 2}, [0, 1, 2, 3, 2, 3], {"sliding_window_pattern": 2}),
        ({"first_k_dense_replace": 1}, [0, 1, 2, 1, 2, 3], {"first_k_dense_replace": 1}),
        ({"full_attention_interval": 2}, [0, 1, 0, 1], {"full_attention_interval": 2}),
        # fitted again, or told by a list
        ({"first_k_dense_replace": 2}, [0, 0, 1, 2, 3], {"first_k_dense_replace": 3}),
        ({"num_dense_layers": 2}, [1, 2, 3], {"num_dense_layers": 1}),
        ({"sliding_window_pattern": 2}, [0, 1, 1, 2], {"layer_types": [S, F, F, S]}),
        ({"full_attention_interval": 2}, [1, 0], {"layer_types": [F, L]}),
        ({"model_type": "gemma2", "sliding_window": 8}, [1, 0, 1], {"layer_types": [F, S, F]}),
        ({"use_sliding_window": True, "max_window_layers": 2}, [0, 3, 1], {"layer_types": [F, S, F]}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": []}, [1, 1, 0],
         {"decoder_sparse_step": 1, "mlp_only_layers": [2]}),
        ({"attn_layer_period": 2, "attn_layer_offset": 1}, [1, 0, 0, 1, 0, 0],
         {"attn_layer_period": 3, "attn_layer_offset": 0}),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 3}, [0, 0, 1, 2],
         {"moe_layer_start_index": 2, "moe_layer_end_index": 3}),
        ({"interleave_moe_layer_step": 2}, [1, 1, 0], {"moe_layers": [0, 1]}),
        ({"no_rope_layer_interval": 2}, [1, 0, 1], {"no_rope_layers": [0, 1, 0]}),
        ({"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2}, [1, 0],
         {"attention_layers": ["local", "global"], "attention_types": [[["local"], 1], [["global"], 1]]}),
    ],
)  # fmt: skip
def test_what_a_config_says_follows_the_layers(config, order, wanted):
    found = stack({"num_hidden_layers": 4, **config}, order)
    assert found.problems == ()
    assert found.config["num_hidden_layers"] == len(order)
    assert {key: found.config[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("config", "order", "told"),
    [
        ({"first_k_dense_replace": 1}, [0, 1, 0, 1], "first_k_dense_replace is 1): for layers 2"),
        ({"layer_group_size": 2}, [1, 0], "layer_group_size is 2"),
        ({"num_kv_shared_layers": 2}, [0, 1, 0], "num_kv_shared_layers is 2"),
        ({"hidden_size_per_layer_input": 256}, [0, 1], "hidden_size_per_layer_input"),
        ({"attn_layer_period": 2, "attn_layer_offset": 1}, [1, 1, 0], "which layers attend"),
    ],
)
def test_what_no_config_can_say(config, order, told):
    (problem,) = stack({"num_hidden_layers": 4, **config}, order).problems
    assert told in problem


def test_layers_that_are_merged_must_be_of_one_kind():
    one, other = ({"num_hidden_layers": 2, "layer_types": types} for types in ([S, F], [F, F]))
    layers = [[Source(one, i, 2), Source(other, i, 2)] for i in range(2)]
    found = restacked(one, "text", [*layers, layers[1]], 2)
    assert any("layer 0 is merged from layers that layer_types tells apart" in problem for problem in found.problems)


def test_parts_and_unmoved_layers():
    vision = {"num_hidden_layers": 2, "layer_types": [S, F]}
    config = {"text_config": {"num_hidden_layers": 2, "layer_types": [F, S]}, "vision_config": vision}
    found = stack(config, [1, 0, 0])
    assert found.config["text_config"] == {"num_hidden_layers": 3, "layer_types": [S, F, F]}
    assert found.config["vision_config"] == vision
    assert stack({"num_hidden_layers": 2, "num_kv_shared_layers": 1}, [0, 1]).problems == ()
    encoder = {"encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 2}
    layers = [[Source(encoder, i, 2)] for i in (0, 1, 1)]
    assert restacked(encoder, "text", layers, 2, "model.decoder.layers").config == encoder | {"decoder_layers": 3}
    dense = {"first_k_dense_replace": 1}
    assert told_apart(dense, "text", 0, 2) != told_apart(dense, "text", 1, 2)


def test_names_of_parts():
    names = ["model.visual.blocks.0.w", "model.language_model.layers.0.w", "lm_head.weight", "multi_modal_projector.w"]
    assert [n for n, own in part_of(names, "vision_tower").items() if own] == names[:1]
    assert [n for n, own in part_of(names, "text_decoder").items() if own] == names[1:3]
    assert [n for n, own in part_of(names, "projector").items() if own] == names[3:]
    assert [n for n, own in part_of(names, "model.visual").items() if own] == names[:1]
    assert not any(part_of(names, "audio_tower").values())
    assert [is_before(n) for n in ("wte.weight", "backbone.embeddings.weight", "embed_out.weight", "norm.weight")] == [
        True, True, False, False,
    ]  # fmt: skip


# --- whole models, as transformers loads them


def slices_of(order):
    return [{"sources": [{"model": model, "layer_range": [start, end]}]} for model, start, end in order]


def loads(folder, name, recipe):
    """Merge, load with transformers: no key missing or unexpected, and it runs. -> the config."""
    import torch

    import tiny

    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    dk.merge(folder / "recipe.yaml", folder / "out", overwrite=True, **OPTIONS)
    cls = type(tiny.build(name))
    model, info = cls.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.arange(3, 15)[None])[0]).all()
    return model, json.loads((folder / "out" / "config.json").read_text())


def pair(folder, name, layers):
    """Two random models of a class."""
    import tiny

    sizes = tiny.SIZES[name]
    key = "n_layer" if "n_layer" in sizes else "num_hidden_layers"
    types = {"layer_types": (sizes["layer_types"] * layers)[:layers]} if "layer_types" in sizes else {}
    for i in range(2):
        tiny.build(name, i, **{key: layers}, **types).save_pretrained(folder / f"m{i}")


STACKS = {
    "LlamaForCausalLM": 4, "Qwen3ForCausalLM": 4, "Gemma2ForCausalLM": 4, "Gemma3ForCausalLM": 6,
    "GptOssForCausalLM": 4, "Qwen3MoeForCausalLM": 4, "Qwen3NextForCausalLM": 8, "DeepseekV3ForCausalLM": 4,
    "GPT2LMHeadModel": 4, "GPTNeoXForCausalLM": 4, "BloomForCausalLM": 4, "MambaForCausalLM": 4,
    "Lfm2ForCausalLM": 4, "JambaForCausalLM": 4, "Llama4ForCausalLM": 4, "RwkvForCausalLM": 4,
    "GraniteMoeHybridForCausalLM": 4, "MixtralForCausalLM": 4,
}  # fmt: skip
PLAIN = ("Qwen3NextForCausalLM", "GPT2LMHeadModel")


@pytest.mark.parametrize(
    "name", [name if name in PLAIN else pytest.param(name, marks=pytest.mark.check) for name in STACKS]
)
def test_a_stack_loads_and_runs(tmp_path, name):
    """Overlapping slices of two models; the layers' kinds do not repeat as the rule of the family has it."""
    many = STACKS[name]
    half = many // 2
    pair(tmp_path, name, many)
    order = [("m0", 0, many - half // 2), ("m1", half, many)]
    recipe = {"slices": slices_of(order), "merge_method": "passthrough"}
    _, config = loads(tmp_path, name, recipe)
    layers = sum(end - start for _, start, end in order)
    assert layers == many + half - half // 2
    assert layers in (config.get("num_hidden_layers"), config.get("n_layer"))


def test_dense_layers_among_experts_are_refused(tmp_path):
    """DeepSeek's config can only say that the first so many layers are dense."""
    pair(tmp_path, "DeepseekV3ForCausalLM", 3)
    recipe = {"slices": slices_of([("m0", 0, 3), ("m1", 0, 3)]), "merge_method": "passthrough"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(PlanError, match=r"which layers have experts \(first_k_dense_replace is 1\): for layers 3"):
        dk.merge(tmp_path / "recipe.yaml", tmp_path / "out", **OPTIONS)
    recipe["slices"] = slices_of([("m0", 0, 3), ("m1", 1, 3)])
    loads(tmp_path, "DeepseekV3ForCausalLM", recipe)


@pytest.mark.check
@pytest.mark.parametrize(
    "name",
    [
        "LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration", "Qwen2VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    ],
)  # fmt: skip
def test_modules_of_a_multimodal_model(tmp_path, name):
    """Text of both, the vision tower of one; what no module names is the base's."""
    import torch

    import tiny

    for i in range(2):
        tiny.build(name, i).save_pretrained(tmp_path / f"m{i}")
    recipe = {
        "base_model": "m0", "merge_method": "passthrough",
        "modules": {
            "text_decoder": {"slices": slices_of([("m0", 0, 2), ("m1", 1, 2)])},
            "vision_tower": {"models": ["m1"]},
        },
    }  # fmt: skip
    model, config = loads(tmp_path, name, recipe)
    assert config["text_config"]["num_hidden_layers"] == 3
    others = [dict(type(model).from_pretrained(tmp_path / f"m{i}").named_parameters()) for i in range(2)]
    vision = [n for n in others[0] if "vision" in n or "visual" in n]
    assert vision
    for n, parameter in model.named_parameters():
        if n in vision:
            assert torch.equal(parameter, others[1][n]), n
        elif "projector" in n:
            assert torch.equal(parameter, others[0][n]), n


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration"])
def test_a_language_model_becomes_that_of_a_model_with_vision(tmp_path, name, method):
    """Its class calls the same tensors otherwise: the output has the names that its own class looks for."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    import tiny

    whole = tiny.build(name)
    whole.save_pretrained(tmp_path / "whole")
    text = transformers.AutoModelForCausalLM.from_config(whole.config.get_text_config())
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    with torch.no_grad():
        for parameter in text.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    text.save_pretrained(tmp_path / "text")
    recipe = {
        "base_model": str(tmp_path / "whole"), "merge_method": method, "dtype": "float32",
        "modules": {"text_decoder": {"models": [str(tmp_path / "text")]}},
    }  # fmt: skip
    dk.merge(recipe, tmp_path / "out")
    found, told = type(whole).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    for key, tensor in text.model.state_dict().items():
        assert torch.allclose(found.model.language_model.state_dict()[key], tensor, atol=1e-6), key
    for key, tensor in whole.state_dict().items():
        if "vision" in key or "projector" in key:
            assert torch.equal(found.state_dict()[key], tensor), key
    stack = {"slices": slices_of([(str(tmp_path / "text"), 0, 1)])}
    with pytest.raises(PlanError, match=r"calls its layers model\.layers, and"):
        dk.plan({**recipe, "merge_method": "passthrough", "modules": {"text_decoder": stack}})
