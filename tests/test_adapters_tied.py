# SPDX-License-Identifier: Apache-2.0
"""Adapters on models whose head is the input embedding, and on vocabularies that have grown.

What PEFT's merge_and_unload makes of a tied head is often not what was trained (it adds both products to the one
tensor), so the truth here is what the adapter answers on its base before it is merged.
"""

import json

import numpy as np
import pytest

import families
import lora
from darekit.errors import HomologyError
from darekit.planning.opening import open_models

BOTH = ["embed_tokens", "lm_head"]
TIED = {"tie_word_embeddings": True}

# What is trained of a tied model -> whether it is still tied.
CASES = {
    "both": ({"target_modules": [*BOTH, "q_proj"]}, False),
    "both, told to stay tied": ({"target_modules": [*BOTH, "q_proj"], "ensure_weight_tying": True}, True),
    "the embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, False),
    "the embedding, told to stay tied": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "the head": ({"target_modules": ["lm_head", "q_proj"]}, False),
    "both as a whole": ({"target_modules": ["q_proj"], "modules_to_save": BOTH}, False),
    "both as a whole, told to stay tied": (
        {"target_modules": ["q_proj"], "modules_to_save": BOTH, "ensure_weight_tying": True}, True
    ),
    "the embedding as a whole": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 11]}, True),
    "more tokens": ({"target_modules": ["q_proj"], "grow": 3}, True),
    "more tokens, and both": ({"target_modules": [*BOTH, "q_proj"], "grow": 3}, False),
    "more tokens, and the head": ({"target_modules": ["lm_head"], "grow": 3}, False),
}  # fmt: skip


SELDOM = ("both as a whole, told to stay tied", "the embedding as a whole", "more tokens, and the head", "more tokens")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.check) if c in SELDOM else c for c in CASES])
def test_a_tied_model_answers_as_it_was_trained(case, tmp_path):
    settings, tied = CASES[case]
    adapter = lora.make(tmp_path, "a", changes=TIED, **settings)
    more = {"vocab": "pad"} if "grow" in settings else {}
    done = lora.merge(tmp_path / "out", tmp_path / "base", adapter, **more)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in families.load(tmp_path / "out")) is not tied
    assert any("not tied" in note for note in done.notes) is not tied
    assert said["vocab_size"] == (67 if "grow" in settings else 64)
    lora.same_answers(tmp_path / "out", tmp_path)


@pytest.mark.parametrize("targets", [["q_proj"], [*BOTH, "q_proj"]])
def test_more_tokens_of_a_model_that_is_not_tied(targets, tmp_path):
    adapter = lora.make(tmp_path, "a", target_modules=targets, grow=5)
    with open_models(tmp_path / "base", [adapter]) as (_, (model,)):
        assert model.config["vocab_size"] == 69 == json.loads(model.companions["config.json"])["vocab_size"]
        assert any("69 tokens, 64 in the base" in note for note in model.notes)
    lora.merge(tmp_path / "out", tmp_path / "base", adapter, vocab="pad")
    lora.agree(tmp_path / "out", tmp_path / "a-merged")
    lora.same_answers(tmp_path / "out", tmp_path)


def test_rows_of_new_tokens_for_one_table_alone(tmp_path):
    adapter = lora.make(tmp_path, "a", target_modules=["q_proj"], grow=5)
    lora.rewrite(adapter, lambda tensors: tensors.pop("base_model.model.lm_head.weight") is None or None)
    with pytest.raises(HomologyError, match=r"has 69 tokens, .*base 64, and brings no rows for lm_head.weight"):
        lora.merge(tmp_path / "out", tmp_path / "base", adapter, vocab="pad")


def test_rows_that_peft_did_not_save(tmp_path):
    """Of a grown vocabulary it saves the table that has factors, and not the other."""
    adapter = lora.make(tmp_path, "a", grow=2, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(HomologyError, match=r"no rows for lm_head.weight: once one of the two tables has factors"):
        lora.merge(tmp_path / "out", tmp_path / "base", adapter, vocab="pad")
    lora.edit(adapter, target_modules=["q_proj"])
    with pytest.raises(HomologyError, match="save the adapter again with save_embedding_layers=True"):
        lora.merge(tmp_path / "out", tmp_path / "base", adapter, vocab="pad")


def test_a_bert_with_more_tokens(tmp_path):
    """Words, decoder and both biases grow together; the error says how."""
    adapter = lora.make(tmp_path, "a", "BertForMaskedLM", grow=2, target_modules=["query", "word_embeddings"])
    with pytest.raises(HomologyError, match="`vocab: pad` keeps them from the models that have them"):
        lora.merge(tmp_path / "out", tmp_path / "base", adapter)
    lora.merge(tmp_path / "out", tmp_path / "base", adapter, vocab="pad")
    found, wanted = families.load(tmp_path / "out"), families.load(tmp_path / "a-merged")
    for name, values in wanted.items():
        assert np.abs(found[name] - values).max() <= 1e-6, name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 66


def test_a_bert_whose_decoder_is_trained(tmp_path):
    adapter = lora.make(tmp_path, "a", "BertForMaskedLM", target_modules=["query", "decoder"])
    lora.merge(tmp_path / "out", tmp_path / "base", adapter)
    found, base = families.load(tmp_path / "out"), families.load(tmp_path / "base")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert np.array_equal(
        found["bert.embeddings.word_embeddings.weight"], base["bert.embeddings.word_embeddings.weight"]
    )
    moved = found["cls.predictions.decoder.weight"] - base["bert.embeddings.word_embeddings.weight"]
    factors = families.load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.cls.predictions.decoder.lora_{}.weight"
    assert np.allclose(moved, 1.5 * factors[name.format("B")] @ factors[name.format("A")], atol=1e-6)
    assert np.array_equal(found["cls.predictions.decoder.bias"], base["cls.predictions.bias"])


def test_factors_on_a_table_that_nobody_calls_are_told(tmp_path):
    adapter = lora.make(tmp_path, "a", "T5ForConditionalGeneration", target_modules=["shared", "q"])
    notes = lora.merge(tmp_path / "out", tmp_path / "base", adapter).notes
    assert any("factors on shared.weight" in note and "no part in the training" in note for note in notes)
