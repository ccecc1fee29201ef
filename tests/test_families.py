# SPDX-License-Identifier: Apache-2.0
"""The table of what the loader knows: held to the installed transformers, and to what its models do."""

import importlib.util
import json
import re
import time
from pathlib import Path

import pytest

from darekit.architectures import families
from darekit.architectures.families import GENERIC, Facts, Rename, Tie, facts_of, pattern_of, unwrapped

ROOT = Path(__file__).parent.parent


def of(name, **config):
    return facts_of({"architectures": [name], **config})


# --- what is known of well-known models

TOKEN_AXES = [
    ("T5ForConditionalGeneration", "shared.weight", (64, 32), 0),
    ("T5ForConditionalGeneration", "decoder.embed_tokens.weight", (64, 32), 0),
    ("T5ForConditionalGeneration", "lm_head.weight", (64, 32), 0),
    (
        "T5ForConditionalGeneration",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        (32, 2),
        None,
    ),
    ("BartForConditionalGeneration", "final_logits_bias", (1, 64), 1),
    ("MarianMTModel", "final_logits_bias", (1, 64), 1),
    ("BartForConditionalGeneration", "model.shared.weight", (64, 32), 0),
    ("BartForConditionalGeneration", "model.encoder.embed_positions.weight", (66, 32), None),
    ("GPTNeoXForCausalLM", "embed_out.weight", (64, 32), 0),
    ("GPTNeoXForCausalLM", "gpt_neox.embed_in.weight", (64, 32), 0),
    ("MambaForCausalLM", "backbone.embeddings.weight", (64, 32), 0),
    ("GPT2LMHeadModel", "wte.weight", (64, 32), 0),
    ("GPT2LMHeadModel", "transformer.wpe.weight", (64, 32), None),
    ("BertForPreTraining", "cls.predictions.bias", (64,), 0),
    ("BertForPreTraining", "cls.predictions.decoder.bias", (64,), 0),
    ("BertForPreTraining", "bert.embeddings.word_embeddings.weight", (64, 32), 0),
    ("BertForPreTraining", "bert.embeddings.token_type_embeddings.weight", (2, 32), None),
    ("BertForSequenceClassification", "cls.predictions.decoder.weight", (64, 32), 0),
    ("BertForSequenceClassification", "classifier.weight", (64, 32), None),
    ("RobertaForMaskedLM", "lm_head.decoder.weight", (64, 32), 0),
    ("RobertaForMaskedLM", "lm_head.dense.weight", (32, 32), None),
    ("DistilBertForMaskedLM", "vocab_projector.weight", (64, 32), 0),
    ("DistilBertForMaskedLM", "vocab_projector.bias", (64,), 0),
    ("DistilBertForMaskedLM", "vocab_transform.weight", (32, 32), None),
    ("AlbertForMaskedLM", "predictions.decoder.bias", (64,), 0),
    ("AlbertForMaskedLM", "albert.encoder.embedding_hidden_mapping_in.weight", (32, 16), None),
    ("WhisperForConditionalGeneration", "proj_out.weight", (64, 32), 0),
    ("Gemma3ForConditionalGeneration", "language_model.model.embed_tokens.weight", (64, 32), 0),
    ("Gemma3ForConditionalGeneration", "model.language_model.embed_tokens.weight", (64, 32), 0),
    ("Gemma3ForConditionalGeneration", "vision_tower.vision_model.embeddings.position_embedding.weight", (4, 16), None),
    ("LlavaForConditionalGeneration", "language_model.lm_head.weight", (64, 32), 0),
    ("ResNetForImageClassification", "resnet.embedder.embedder.convolution.weight", (8, 3, 7, 7), None),
    ("ViTForImageClassification", "vit.embeddings.position_embeddings", (1, 5, 32), None),
]


@pytest.mark.parametrize(("cls", "name", "shape", "axis"), TOKEN_AXES)
def test_the_axis_that_counts_tokens(cls, name, shape, axis):
    assert of(cls).token_axis(name, shape) == axis


def test_token_rows_stand_where_the_config_has_them():
    assert of("Gemma3ForConditionalGeneration").token_keys == ("text_config.vocab_size",)
    assert of("BartForConditionalGeneration").token_keys == ("vocab_size",)


EMBEDDINGS = [
    ("T5ForConditionalGeneration", "shared.weight", True),
    ("T5ForConditionalGeneration", "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", True),
    ("T5ForConditionalGeneration", "decoder.block.0.layer.0.SelfAttention.q.weight", False),
    ("ResNetForImageClassification", "resnet.embedder.embedder.convolution.weight", False),
    ("ViTForImageClassification", "vit.embeddings.patch_embeddings.projection.weight", False),
    ("ViTForImageClassification", "vit.embeddings.position_embeddings", True),
    ("ViTForImageClassification", "vit.embeddings.cls_token", True),
    ("BertForMaskedLM", "bert.embeddings.LayerNorm.weight", False),
    ("BertForMaskedLM", "bert.embeddings.token_type_embeddings.weight", True),
    ("AlbertForMaskedLM", "albert.encoder.embedding_hidden_mapping_in.weight", False),
    ("MambaForCausalLM", "backbone.embeddings.weight", True),
    ("GPTNeoXForCausalLM", "gpt_neox.embed_in.weight", True),
    ("GPTNeoXForCausalLM", "embed_out.weight", False),
    ("WhisperForConditionalGeneration", "model.encoder.embed_positions.weight", True),
    ("WhisperForConditionalGeneration", "model.encoder.conv1.weight", False),
    ("DebertaV2ForMaskedLM", "deberta.encoder.rel_embeddings.weight", True),
]


@pytest.mark.parametrize(("cls", "name", "expected"), EMBEDDINGS)
def test_lookup_tables(cls, name, expected):
    assert of(cls).is_embedding(name) is expected


HEADS = [
    ("BertForMaskedLM", "cls.predictions.transform.dense.weight", True),
    ("BertForMaskedLM", "bert.pooler.dense.weight", False),
    ("BertModel", "pooler.dense.weight", False),
    ("BertModel", "encoder.layer.0.output.dense.weight", False),
    ("BertForSequenceClassification", "cls.seq_relationship.weight", True),  # of another class of the family
    ("BertForQuestionAnswering", "qa_outputs.weight", True),
    ("DebertaV2ForSequenceClassification", "pooler.dense.weight", True),
    ("DebertaV2ForMaskedLM", "pooler.dense.weight", True),
    ("RobertaForSequenceClassification", "classifier.out_proj.weight", True),
    ("RobertaForSequenceClassification", "roberta.pooler.dense.weight", False),
    ("GPTNeoXForCausalLM", "embed_out.weight", True),
    ("GPTNeoXForCausalLM", "gpt_neox.final_layer_norm.weight", False),
    ("LlamaForCausalLM", "lm_head.weight", True),
    ("LlamaForCausalLM", "model.norm.weight", False),
    ("LlamaForSequenceClassification", "score.weight", True),
    ("T5ForConditionalGeneration", "lm_head.weight", True),
    ("T5ForConditionalGeneration", "decoder.final_layer_norm.weight", False),
    ("BartForConditionalGeneration", "final_logits_bias", True),
    ("WhisperForConditionalGeneration", "proj_out.weight", True),
    ("ViTForImageClassification", "classifier.bias", True),
    ("ViTForImageClassification", "vit.pooler.dense.bias", False),
    ("Gemma3ForConditionalGeneration", "language_model.lm_head.weight", True),
    ("Gemma3ForConditionalGeneration", "multi_modal_projector.mm_soft_emb_norm.weight", False),
    ("DistilBertForMaskedLM", "vocab_transform.weight", True),
    ("ResNetForImageClassification", "classifier.1.weight", True),
    ("ResNetForImageClassification", "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight", False),
]


@pytest.mark.parametrize(("cls", "name", "expected"), HEADS)
def test_heads(cls, name, expected):
    assert of(cls).is_head(name) is expected


TIES = [
    ({"architectures": ["T5ForConditionalGeneration"]}, "lm_head.weight", "shared.weight"),
    # T5's config takes this key for another one, and ties whatever it says.
    ({"architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": False},
     "lm_head.weight", "shared.weight"),
    ({"architectures": ["T5EncoderModel"]}, "encoder.embed_tokens.weight", "shared.weight"),
    ({"architectures": ["WhisperForConditionalGeneration"]}, "proj_out.weight", "model.decoder.embed_tokens.weight"),
    ({"architectures": ["BertForMaskedLM"]}, "cls.predictions.decoder.bias", "cls.predictions.bias"),
    ({"architectures": ["Gemma2ForCausalLM"]}, "lm_head.weight", "model.embed_tokens.weight"),
    ({"architectures": ["Gemma2ForCausalLM"], "tie_word_embeddings": False}, "lm_head.weight", None),
    ({"architectures": ["Qwen3ForCausalLM"]}, "lm_head.weight", None),
    ({"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
     "lm_head.weight", "model.embed_tokens.weight"),
    # A reward model has no head, so none is tied.
    ({"architectures": ["Qwen3ForSequenceClassification"], "tie_word_embeddings": True}, "lm_head.weight", None),
    ({"architectures": ["LlavaForConditionalGeneration"], "text_config": {"tie_word_embeddings": True}},
     "language_model.lm_head.weight", "model.language_model.embed_tokens.weight"),
    ({"architectures": ["Gemma3ForConditionalGeneration"]},
     "language_model.lm_head.weight", "model.language_model.embed_tokens.weight"),
    ({"architectures": ["DistilBertForMaskedLM"]},
     "vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "name", "expected"), TIES)
def test_what_is_tied(config, name, expected):
    assert facts_of(config).tied_to(name) == expected


def test_a_tie_follows_numbers():
    facts = Facts(class_name="Detector", held={"boxes.#.w": "boxes.0.w", "copies.#.boxes.#.w": "boxes.$1.w"})
    assert facts.tied_to("boxes.3.w") == "boxes.0.w"
    assert facts.tied_to("boxes.0.w") is None
    assert facts.tied_to("copies.2.boxes.5.w") == "boxes.0.w"  # through boxes.5.w


def test_what_says_that_a_tie_holds():
    tie = Tie("e", False, ("tie_word_embeddings", "text_config.tie_word_embeddings"))
    assert tie.holds({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}})
    assert not tie.holds({"text_config": {}})
    assert Tie("e", True).holds({"tie_word_embeddings": False})


REBUILT = [
    ("GPTNeoXForCausalLM", "gpt_neox.layers.0.attention.bias", True),
    ("GPTNeoXForCausalLM", "gpt_neox.layers.0.attention.masked_bias", True),
    ("GPTNeoXForCausalLM", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", True),
    ("GPTNeoXForCausalLM", "gpt_neox.layers.0.attention.dense.bias", False),
    ("GPT2LMHeadModel", "transformer.h.0.attn.bias", True),
    ("GPT2LMHeadModel", "h.0.attn.c_attn.bias", False),
    ("LlamaForCausalLM", "model.layers.0.self_attn.rotary_emb.inv_freq", True),
    ("BertForMaskedLM", "bert.embeddings.position_ids", True),
    ("Qwen3NextForCausalLM", "mtp.layers.0.self_attn.q_proj.weight", False),
    ("T5ForConditionalGeneration", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", False),
    ("DeepseekV3ForCausalLM", "model.layers.3.mlp.gate.e_score_correction_bias", False),
    ("ResNetForImageClassification", "resnet.embedder.embedder.normalization.running_mean", False),
]


@pytest.mark.parametrize(("cls", "name", "expected"), REBUILT)
def test_what_a_loader_makes_anew(cls, name, expected):
    assert of(cls).is_rebuilt(name) is expected


def test_what_a_class_drops_and_does_without():
    assert of("Qwen3NextForCausalLM").ignored_when_unexpected("mtp.layers.0.self_attn.q_proj.weight")
    assert of("Qwen3_5ForCausalLM").ignored_when_unexpected("mtp.fc.weight")
    assert not of("Qwen3ForCausalLM").ignored_when_unexpected("mtp.fc.weight")
    assert of("BartForConditionalGeneration").ignored_when_missing("final_logits_bias")
    assert of("ResNetForImageClassification").is_counter("resnet.embedder.embedder.normalization.num_batches_tracked")
    assert of("RobertaForSequenceClassification").is_lacking("roberta.pooler.dense.weight")
    assert not of("BertForSequenceClassification").is_lacking("bert.pooler.dense.weight")
    assert of("BertForSequenceClassification").is_optional("bert.pooler.dense.weight")
    assert of("DeepseekV3ForCausalLM").stays_f32("model.layers.3.mlp.gate.e_score_correction_bias", "BF16")


NAMES = [
    ("BertForMaskedLM", "bert.embeddings.LayerNorm.beta", "bert.embeddings.LayerNorm.bias"),
    ("WavLMModel", "encoder.pos_conv_embed.conv.weight_g",
     "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    ("GPTNeoXForCausalLM", "embed_out.weight", "lm_head.weight"),
    ("Gemma3ForConditionalGeneration", "language_model.model.layers.3.mlp.up_proj.weight",
     "model.language_model.layers.3.mlp.up_proj.weight"),
    ("Gemma3ForConditionalGeneration", "model.language_model.layers.3.mlp.up_proj.weight",
     "model.language_model.layers.3.mlp.up_proj.weight"),
    ("Gemma3ForConditionalGeneration", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
     "model.vision_tower.encoder.layers.0.mlp.fc1.weight"),
    ("ViTForImageClassification", "vit.encoder.layer.2.attention.output.dense.bias",
     "vit.layers.2.attention.o_proj.bias"),
    ("ViTModel", "encoder.layer.2.attention.output.dense.bias", "layers.2.attention.o_proj.bias"),
    ("LlamaForCausalLM", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    ("LlamaForCausalLM", "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
     "model.layers.0.mlp.up_proj.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "stored", "expected"), NAMES)
def test_names_in_memory(cls, stored, expected):
    assert of(cls).canonical(stored) == expected


def test_experts_that_are_stored_one_by_one():
    facts = of("Qwen3MoeForCausalLM")
    gate, down, fused = (
        facts.conversion(f"model.layers.2.mlp.experts.{name}")
        for name in ("7.gate_proj.weight", "7.down_proj.weight", "gate_up_proj")
    )
    assert (gate.target, down.target, fused) == (
        "model.layers.2.mlp.experts.gate_up_proj",
        "model.layers.2.mlp.experts.down_proj",
        None,
    )
    assert [(o.name, o.parameters["dim"]) for o in gate.operations] == [("MergeModulelist", 0), ("Concatenate", 1)]
    assert gate.sources.index(gate.source) == 0  # the gate comes before the up-projection


def test_a_guarded_rename_needs_its_first_pair():
    facts = Facts(class_name="X", renames=(Rename(("norm0", "norm1"), ("norm1", "norm2"), guarded=True),))
    assert facts.canonicals(["a.norm0", "a.norm1"]) == {"a.norm0": "a.norm1", "a.norm1": "a.norm2"}
    assert facts.canonicals(["a.norm1", "a.norm2"]) == {"a.norm1": "a.norm1", "a.norm2": "a.norm2"}


@pytest.mark.parametrize(
    ("wrapped", "name"),
    [
        ("_orig_mod.model.norm.weight", "model.norm.weight"),
        ("module.module.lm_head.weight", "lm_head.weight"),
        ("model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.norm.weight", "model.layers.0.norm.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("base_model.weight", "base_model.weight"),
    ],
)
def test_wrappers(wrapped, name):
    assert unwrapped(wrapped) == name


def test_layers():
    facts = of("BartForConditionalGeneration")
    assert facts.layer_of("model.encoder.layers.4.fc1.weight") == ("encoder.layers", 4, ("encoder_layers",))
    assert facts.layer_of("model.shared.weight") is None
    moe = of("Qwen3MoeForCausalLM")
    assert moe.layer_of("model.layers.2.mlp.experts.7.up_proj.weight") == ("layers", 2, ("num_hidden_layers",))


def test_an_unknown_model_is_judged_by_names():
    assert facts_of({"model_type": "mine", "architectures": ["MineForCausalLM"]}) is GENERIC
    assert GENERIC.token_axis("model.embed_tokens.weight", (64, 32)) == 0
    assert GENERIC.token_axis("model.embed_positions.weight", (64, 32)) is None
    assert GENERIC.is_head("lm_head.weight")
    assert not GENERIC.is_head("resnet.embedder.weight")
    assert not GENERIC.is_embedding("resnet.embedder.embedder.convolution.weight")
    assert GENERIC.is_rebuilt("h.0.attn.bias", (1, 1, 8, 8))
    assert not GENERIC.is_rebuilt("h.0.attn.bias", (8,))
    assert GENERIC.tied_to("lm_head.weight") is None


def test_a_class_of_ones_own_is_judged_by_its_model_type():
    facts = facts_of({"model_type": "llama", "architectures": ["MyLlama"]})
    assert (facts.class_name, facts.is_exact) == ("LlamaForCausalLM", False)


def test_a_model_type_without_classes_uses_anothers():
    assert facts_of({"model_type": "gpt-sw3"}).class_name == "GPT2LMHeadModel"


def test_where_two_classes_of_a_family_count_by_other_keys_each_has_its_own():
    assert of("SeamlessM4TModel").counted("lm_head.weight") == {0: "vocab_size"}
    assert of("SeamlessM4TTextToUnitForConditionalGeneration").counted("lm_head.weight") == {0: "t2u_vocab_size"}


# --- speed


def test_one_family_is_read_in_a_moment():
    """0.9 ms with the whole file, 0.2 ms for another family; of 80,000 names, half a second."""

    def once():
        families._text.cache_clear()
        families._facts.cache_clear()
        start = time.perf_counter()
        facts_of({"model_type": "qwen3_moe"})
        return time.perf_counter() - start

    assert min(once() for _ in range(9)) < 5e-3


# --- against transformers


@pytest.fixture(scope="module")
def script():
    """scripts/families.py, under another name than the tests' own families.py."""
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("families_script", ROOT / "scripts" / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.quiet()
    module.without_timm()
    return module


def test_the_table_describes_the_pinned_version():
    pinned = re.search(r"(?m)^transformers==(\S+)$", (ROOT / "constraints.txt").read_text()).group(1)
    assert families.version() == pinned, "run `make families`"


def test_every_family_can_be_asked():
    for record in families.families():
        for name in record["classes"]:
            facts = of(name)
            assert facts.is_exact and facts.model_type == record["type"], name
            facts.canonical("model.layers.0.mlp.experts.0.up_proj.weight")
        assert record["main"] in record["classes"]


def disagreements(record, facts):
    """Where answers about a class's own names differ from what was learned of it."""
    held = {t: tie[0] for t, tie in record["ties"].items() if tie[1]} | record["one"]
    for name in record["names"]:
        asked = name.replace("#", "0")
        if facts.relative(asked) != facts._relative(asked):
            continue  # a name that a rename takes for another's
        for key, query in (("tables", "is_embedding"), ("statistics", "is_statistic"), ("counters", "is_counter")):
            if getattr(facts, query)(asked) != (name in record[key]):
                yield name, key
        if name in record["buffers"] and not facts.is_buffer(asked):
            yield name, "buffers"
        axes = {int(a): k for a, k in record["axes"].get(name, {}).items() if k != "num_labels"}
        if dict(facts.counted(asked)) != axes:
            yield name, "axes", axes, facts.counted(asked)
        if (pattern_of(asked) in facts.held) != (name in held):
            yield name, "ties"
        if facts.is_rebuilt(asked) and name not in record["buffers"]:
            yield name, "taken for a buffer"
        if name in record["output"] and not facts.is_output_embedding(asked):
            yield name, "output"
    for name in record["rebuilt"]:
        if not facts.is_rebuilt(name.replace("#", "0")):
            yield name, "rebuilt"
    for key, found in (("missing", facts.missing), ("unexpected", facts.unexpected), ("fp32", facts.kept_f32)):
        if list(found) != record[key]:
            yield key, found, record[key]


SAMPLE = """
    T5ForConditionalGeneration BartForConditionalGeneration BertForPreTraining RobertaForSequenceClassification
    GPTNeoXForCausalLM Qwen3MoeForCausalLM MambaForCausalLM DebertaV2ForSequenceClassification DistilBertForMaskedLM
    ResNetForImageClassification ViTForImageClassification WhisperForConditionalGeneration
    LlamaForSequenceClassification
""".split()  # noqa: SIM905 (read as a paragraph)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_class_learned_again_says_the_same(script, name):
    transformers = pytest.importorskip("transformers")
    record = script.facts_of_class(getattr(transformers, name))
    assert not list(disagreements(record, of(name)))


def names_as(script, cls):
    """The model on the meta device; its names in files; its names in memory."""
    from transformers.core_model_loading import revert_weight_conversion

    config = script.default_config(cls)
    short = script.shorter(config)
    try:
        model = script.built(cls, config if short is None else short)
    except Exception:  # layers that must fit other lists
        model = script.built(cls, config)
    stored = model.state_dict()
    return model, list(revert_weight_conversion(model, dict(stored))), list(stored)


def renamed_otherwise(script, cls, facts):
    """Names that transformers and the table rename differently, in files and in memory."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    model, in_files, in_memory = names_as(script, cls)
    for names in (in_files, in_memory):
        entries = get_model_conversion_mapping(model, add_legacy=True)
        converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in entries if not isinstance(entry, WeightConverter)]
        found = facts.canonicals(names)
        for name in sorted(names, key=dot_natural_key):
            expected, _ = rename_source_key(name, renamings, [])
            whole, source = rename_source_key(name, renamings, converters)
            if source is None and expected not in in_memory and name in in_memory:
                expected = name
            if source is not None and whole not in in_memory and name in in_memory:
                continue
            if found[name] != expected:
                yield name, found[name], expected
            conversion = facts.conversion(name)
            if source is not None and (conversion is None or conversion.target != whole):
                yield name, conversion, whole


RENAMED = """
    Gemma3ForConditionalGeneration LlavaForConditionalGeneration Qwen2_5_VLForConditionalGeneration
    Qwen3MoeForCausalLM MixtralForCausalLM DeepseekV3ForCausalLM GPTNeoXForCausalLM ViTForImageClassification WavLMModel
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", RENAMED)
def test_names_are_renamed_as_transformers_does(script, name):
    transformers = pytest.importorskip("transformers")
    assert not list(renamed_otherwise(script, getattr(transformers, name), of(name)))


TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SEQ2SEQ = dict(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
               decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
               pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=1)  # fmt: skip
GPT = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
REAL = {
    "T5ForConditionalGeneration": dict(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2),
    "BartForConditionalGeneration": SEQ2SEQ,
    "MarianMTModel": SEQ2SEQ,
    "BertForPreTraining": TEXT,
    "RobertaForMaskedLM": TEXT,
    "AlbertForMaskedLM": {**TEXT, "embedding_size": 16},
    "DistilBertForMaskedLM": dict(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=2),
    "DebertaV2ForMaskedLM": TEXT,
    "GPT2LMHeadModel": GPT,
    "GPTNeoXForCausalLM": {**TEXT, "bos_token_id": 1, "eos_token_id": 1},
    "MambaForCausalLM": dict(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2),
    "Gemma2ForCausalLM": {**TEXT, "num_key_value_heads": 2, "head_dim": 16},
    "LlamaForSequenceClassification": {**TEXT, "tie_word_embeddings": True, "pad_token_id": 0},
}


@pytest.mark.parametrize("name", REAL)
def test_ties_and_token_rows_of_a_real_model(name):
    """What shares memory in a model is tied; what grows with transformers' own resizing counts tokens."""
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**REAL[name]))
    facts = facts_of({**json.loads(model.config.to_json_string()), "architectures": [name]})
    places = {}
    for tensor, value in model.state_dict(keep_vars=True).items():
        places.setdefault(value.data_ptr(), []).append(tensor)
    together = {frozenset(names) for names in places.values() if len(names) > 1}
    assert {frozenset(group) for group in facts.tied_names(model.state_dict())} == together
    before = {tensor: tuple(value.shape) for tensor, value in model.state_dict().items()}
    model.resize_token_embeddings(72)
    for tensor, value in model.state_dict().items():
        grown = [axis for axis, (a, b) in enumerate(zip(before[tensor], value.shape, strict=True)) if a != b]
        assert facts.token_axis(tensor, before[tensor]) == (grown[0] if grown else None), tensor


def test_the_page_lists_the_families():
    page = (ROOT / "docs" / "which-models.md").read_text()
    spec = importlib.util.spec_from_file_location("families_script", ROOT / "scripts" / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page(page) == page, "run `make families`"


@pytest.mark.check
def test_all_classes_learned_again_give_the_table(script):
    """Six minutes on one core."""
    classes = script.all_classes()
    records = {name: script.learn(cls, None) for name, cls in classes.items()}
    text = "".join(line + "\n" for line in script.lines(records))
    assert text == families.FILE.read_text(encoding="utf-8")


@pytest.mark.check
def test_all_names_are_renamed_as_transformers_does(script):
    """Three minutes on one core."""
    known = {name: cls for name, cls in script.all_classes().items() if of(name).is_exact}
    assert len(known) > 1600
    wrong = {name: found for name, cls in known.items() if (found := list(renamed_otherwise(script, cls, of(name))))}
    assert not wrong
