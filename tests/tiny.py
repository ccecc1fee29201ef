# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of transformers' own classes, built at test time."""

import torch
import transformers

DECODER = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
HEADED = {**DECODER, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    **DECODER, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LINEAR = {
    "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
ENCODER = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
PAIR = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "decoder_start_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "pad_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
PICTURES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
SOUND = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
WORDS = {**DECODER, "vocab_size": 70}
HYBRID = {
    **DECODER, "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
    "mamba_chunk_size": 8, "shared_intermediate_size": 16, **LOCAL,
}  # fmt: skip
PER_LAYER = {
    "num_hidden_layers": 5, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
    "num_kv_shared_layers": 0, "altup_num_inputs": 2, "activation_sparsity_pattern": None, "sliding_window": 16,
}  # fmt: skip

SIZES = {
    # decoders
    "LlamaForCausalLM": DECODER,
    "LlamaForSequenceClassification": {**DECODER, "num_labels": 1, "pad_token_id": 0},
    "Qwen3ForCausalLM": HEADED,
    "PhiForCausalLM": DECODER,
    "Gemma2ForCausalLM": {**HEADED, "sliding_window": 16},
    "Gemma3ForCausalLM": {**HEADED, "sliding_window": 16},
    "Gemma3nForCausalLM": {**HEADED, **PER_LAYER},
    "GPTJForCausalLM": {**GPT, "rotary_dim": 8},
    "GPT2LMHeadModel": GPT,
    "GPTNeoXForCausalLM": ENCODER,
    "FalconForCausalLM": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "BloomForCausalLM": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "Lfm2ForCausalLM": {**DECODER, "layer_types": ["conv", "full_attention"]},
    # experts, stored one by one or fused
    "Qwen3MoeForCausalLM": {**HEADED, **EXPERTS},
    "Qwen2MoeForCausalLM": {**DECODER, **EXPERTS, "shared_expert_intermediate_size": 16},
    "MixtralForCausalLM": {**DECODER, **LOCAL},
    "OlmoeForCausalLM": {**DECODER, "num_experts": 4, "num_experts_per_tok": 2},
    "PhimoeForCausalLM": {**DECODER, **LOCAL},
    "DeepseekV2ForCausalLM": {**ROUTED, **LATENT},
    "DeepseekV3ForCausalLM": {**ROUTED, **LATENT},
    "Glm4MoeForCausalLM": {**ROUTED, "head_dim": 16},
    "GptOssForCausalLM": {
        **HEADED, **LOCAL, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]
    },
    "Llama4ForCausalLM": {
        **HEADED, "intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 1,
        "attention_chunk_size": 32,
    },
    "Qwen3NextForCausalLM": {**HEADED, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16},
    "GraniteMoeHybridForCausalLM": HYBRID,
    "JambaForCausalLM": {
        **DECODER, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
    },
    # state spaces
    "MambaForCausalLM": {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    "Mamba2ForCausalLM": {
        "vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8,
        "n_groups": 1, "chunk_size": 8,
    },
    "RwkvForCausalLM": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    "Qwen3_5ForCausalLM": {**HEADED, **LINEAR},
    # encoders and encoder-decoders
    "BertForMaskedLM": ENCODER,
    "BertForSequenceClassification": {**ENCODER, "num_labels": 3},
    "BertForPreTraining": ENCODER,
    "BertModel": ENCODER,
    "BertLMHeadModel": ENCODER,
    "RobertaForMaskedLM": ENCODER,
    "AlbertForMaskedLM": {**ENCODER, "embedding_size": 16},
    "DistilBertForMaskedLM": {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2},
    "ElectraForMaskedLM": {**ENCODER, "embedding_size": 16},
    "DebertaV2ForTokenClassification": ENCODER,
    "GteForMaskedLM": ENCODER,  # stores queries, keys and values as one
    "XLNetLMHeadModel": {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48},
    "T5ForConditionalGeneration": T5,
    "MT5ForConditionalGeneration": {**T5, "tie_word_embeddings": False},
    "BartForConditionalGeneration": PAIR,
    "MBartForConditionalGeneration": PAIR,
    "PegasusForConditionalGeneration": PAIR,
    "BartForSequenceClassification": {**PAIR, "num_labels": 3},
    # images, sound, and text beside them
    "ViTForImageClassification": PICTURES,
    "ResNetForImageClassification": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3},
    "CLIPModel": {"text_config": ENCODER, "vision_config": PICTURES, "projection_dim": 16},
    "Wav2Vec2ForCTC": SOUND,
    "WhisperForConditionalGeneration": {
        **PAIR, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "decoder_start_token_id": 1,
        "suppress_tokens": None, "begin_suppress_tokens": None,
    },
    "LlavaForConditionalGeneration": {
        "text_config": {**WORDS, "model_type": "llama"}, "image_token_index": 64,
        "vision_config": {**PICTURES, "model_type": "clip_vision_model"},
    },
    "Gemma3ForConditionalGeneration": {
        "text_config": {**WORDS, "head_dim": 16, "sliding_window": 16}, "vision_config": PICTURES,
        "mm_tokens_per_image": 4, "image_token_index": 65, "boi_token_index": 66, "eoi_token_index": 67,
    },
    "Qwen2VLForConditionalGeneration": {
        "text_config": {**WORDS, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        "image_token_id": 65, "video_token_id": 66, "vision_start_token_id": 67, "vision_end_token_id": 68,
    },
    "Qwen3VLMoeForConditionalGeneration": {
        "text_config": {**WORDS, **EXPERTS, "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        "vision_config": {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 24,
            "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        "image_token_id": 65, "video_token_id": 66, "vision_start_token_id": 67, "vision_end_token_id": 68,
    },
}  # fmt: skip


def build(name, seed=0, **changes):
    """A random model of a class, in float32."""
    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    return cls(cls.config_class(**{**SIZES[name], **changes})).eval()


def family(directory, name, k=2, dtype=torch.float32, **changes):
    """base and m1 .. mk of a class under `directory`: each fine-tune is the base and noise of its own. -> the class."""
    model = build(name, **changes).to(dtype)
    model.save_pretrained(directory / "base")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for i in range(1, k + 1):
        generator = torch.Generator().manual_seed(i)
        model.load_state_dict(before)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * 0.002
                parameter.add_(noise.to(parameter.dtype))
        model.save_pretrained(directory / f"m{i}")
    return type(model)


def recipe(directory, k=2, **more):
    """DARE and task arithmetic of a family."""
    return {
        "base_model": str(directory / "base"),
        "models": [{"model": str(directory / f"m{i}")} for i in range(1, k + 1)],
        "merge_method": "task_arithmetic",
        "sparsify": {"method": "dare", "drop_rate": 0.5, "seed": 3},
        **more,
    }


def tokenizer(*directories, size=60):
    """A tokenizer by words: <unk> 0, <s> 1, </s> 2, and w3, w4, ..."""
    import tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, size)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    for directory in directories:
        fast.save_pretrained(directory)
