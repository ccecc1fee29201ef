# SPDX-License-Identifier: Apache-2.0
"""What PEFT saves whole beside factors: twice where the vocabulary has grown, by the ends of names, or not at all."""

import json
import shutil
import warnings

import numpy as np
import peft
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import darekit as dk
import lora
import tiny
from darekit.errors import CheckpointError

TIED = {"tie_word_embeddings": True}


def drop(adapter, word):
    """Lose an adapter's tensors with a word in their names."""
    path = adapter / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if word not in name}, path)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ({}, {"modules_to_save": ["embed_tokens"]}),
        (TIED, {"modules_to_save": ["embed_tokens"]}),
        (TIED, {"modules_to_save": ["lm_head"]}),
        (TIED, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ],
)
def test_saved_embeddings_of_a_grown_vocabulary_are_those_that_were_trained(tmp_path, changes, settings):
    adapter = lora.make(tmp_path, "a", grow=3, changes=changes, target_modules=["q_proj"], **settings)
    assert any(
        "original_module" in name for name in load_file(adapter / "adapter_model.safetensors")
    )  # PEFT wrote both
    dk.merge({"models": [f"{tmp_path}/base+{adapter}"], "merge_method": "linear"}, tmp_path / "out")
    lora.same_answers(tmp_path / "out", tmp_path)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.config.vocab_size == 67
    lora.agree(tmp_path / "out", tmp_path / "a-merged")


def classifier(root, base, name, **settings):
    """root/base of one class and root/a, an adapter that was trained on it as a classifier; -> PEFT's merged model."""
    tiny.build(base).save_pretrained(root / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, name).from_pretrained(root / "base", num_labels=3, pad_token_id=0)
        trained = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, task_type="SEQ_CLS", **settings))
        lora.fill(trained)
        trained.save_pretrained(root / "a")
        return trained.merge_and_unload()


@pytest.mark.parametrize(
    ("base", "name", "target"),
    [
        ("DistilBertForMaskedLM", "DistilBertForSequenceClassification", "q_lin"),  # saves pre_classifier, too
        ("BertModel", "BertForSequenceClassification", "query"),  # stored without the prefix
        ("LlamaForCausalLM", "LlamaForSequenceClassification", "v_proj"),
    ],
)
def test_a_classifier_loads_as_it_was_trained(tmp_path, base, name, target):
    wanted = classifier(tmp_path, base, name, target_modules=[target]).state_dict()
    report = dk.merge({"models": [f"{tmp_path}/base+{tmp_path}/a"], "merge_method": "linear"}, tmp_path / "out")
    found, said = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not said["missing_keys"] and not said["mismatched_keys"]
    for key, value in found.state_dict().items():
        np.testing.assert_allclose(value, wanted[key], rtol=0, atol=1e-6 * float(wanted[key].abs().max()))
    assert not any("random" in note for note in report.notes)


def test_a_part_that_nobody_stores_is_told(tmp_path):
    classifier(tmp_path, "BertForMaskedLM", "BertForSequenceClassification", target_modules=["query"])
    report = dk.merge({"models": [f"{tmp_path}/base+{tmp_path}/a"], "merge_method": "linear"}, tmp_path / "out")
    assert any("WARNING: a BertForSequenceClassification has pooler" in note for note in report.notes)


@pytest.mark.parametrize(
    ("settings", "word", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head", "lm_head of modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "token_adapter", "rows of trainable_token_indices"),
        ({"lora_bias": True}, "lora_B.bias", "biases of lora_bias"),
        ({"bias": "all"}, ".bias", "biases of bias: all"),
    ],
)
def test_a_file_without_what_was_trained_is_refused(tmp_path, settings, word, said):
    adapter = lora.make(tmp_path, "a", changes={"attention_bias": True}, target_modules=["q_proj"], **settings)
    lora.merge(tmp_path / "out", tmp_path / "base", adapter)
    drop(adapter, word)
    with pytest.raises(CheckpointError, match=said):
        lora.merge(tmp_path / "out", tmp_path / "base", adapter)


def test_an_adapter_beside_a_whole_model_is_not_passed_over(tmp_path):
    """The folder is the model, and a note says how to use the adapter."""
    adapter = lora.make(tmp_path, "a", target_modules=["q_proj"])
    shutil.copy(tmp_path / "base" / "model.safetensors", adapter)
    report = lora.merge(tmp_path / "model", tmp_path / "base", adapter)
    [note] = [note for note in report.notes if "a whole model and an adapter" in note]
    assert "the model is read as it is" in note and note.endswith(str(adapter / "adapter_model.safetensors"))
    lora.agree(tmp_path / "model", tmp_path / "base")
    lora.merge(tmp_path / "out", tmp_path / "base", adapter / "adapter_model.safetensors")
    lora.agree(tmp_path / "out", tmp_path / "a-merged")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 64
