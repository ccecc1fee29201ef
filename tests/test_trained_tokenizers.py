# SPDX-License-Identifier: Apache-2.0
"""Tokenizers that were trained here, merged, and asked by transformers itself: text, ids, templates, models."""

import json
from functools import cache

import numpy as np
import pytest

import darekit as dk
import families
from darekit.architectures.templates import CHAT_TEMPLATES
from darekit.errors import PlanError
from darekit.live.models import open_live

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXTS = [
    "the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs",
    "how vexingly quick daft zebras jump", "sphinx of black quartz judge my vow",
] * 3  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def bpe():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return made, trainer


def unigram():
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    return made, trainer


def wordpiece():
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.decoder = tokenizers.decoders.WordPiece()
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    return made, trainer


KINDS = {"BPE": bpe, "Unigram": unigram, "WordPiece": wordpiece}


@cache
def trained(kind):
    """The tokenizer as text: training decides ties at random, and all models of a family have one vocabulary."""
    made, trainer = KINDS[kind]()
    made.train_from_iterator(TEXTS, trainer)
    return made.to_str()


def save(directory, kind, added, rng, like=None):
    """A tiny Llama with a trained tokenizer and added tokens."""
    made = tokenizers.Tokenizer.from_str(trained(kind))
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    whole.add_special_tokens({"additional_special_tokens": added})
    rows = len(whole)
    tensors = families.llama(rng, np.float32, vocab=rows, layers=1)
    if like is not None:
        for name, array in tensors.items():
            common = tuple(slice(min(a, b)) for a, b in zip(array.shape, like[name].shape, strict=True))
            array[common] = like[name][common] + rng.normal(0, 1e-3, like[name][common].shape)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    families.save(directory, tensors, families.config(vocab=rows, layers=1, dtype="float32") | ids)
    whole.save_pretrained(directory)
    return tensors, whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_union_tokenises_as_its_base_and_knows_all_added_tokens(tmp_path, kind):
    rng = np.random.default_rng(0)
    base, old = save(tmp_path / "base", kind, [], rng)
    one, _ = save(tmp_path / "m0", kind, ["<|im_start|>", "<|im_end|>"], rng, base)
    two, _ = save(tmp_path / "m1", kind, ["<|tool|>", "<|im_start|>"], rng, base)
    recipe = families.recipe(tmp_path, k=2, tokenizer_source="union", chat_template="chatml")
    said = dk.merge(recipe, tmp_path / "out").notes
    new = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    n = len(old)
    assert len(new) == n + 3
    stops = [note for note in said if note.startswith("the chat template chatml ends turns")]
    assert len(stops) == 1 and f"<|im_end|> ({n + 1}), which is not among the ids that stop generation (2," in stops[0]
    for text in TEXTS[:4]:
        assert new(text).input_ids == old(text).input_ids
        assert new.decode(new(text).input_ids) == old.decode(old(text).input_ids)
    for i, token in enumerate(["<|im_start|>", "<|im_end|>", "<|tool|>"]):
        assert new(token, add_special_tokens=False).input_ids == [n + i]
        ids = new(f"quick{token}fox", add_special_tokens=False).input_ids
        assert ids.count(n + i) == 1 and new.convert_ids_to_tokens(n + i) == token
        assert token not in new.decode(ids, skip_special_tokens=True)  # special, as its model has it
    chat = [{"role": "user", "content": "quick"}]
    assert new.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nquick<|im_end|>\n"
    network, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert network.config.vocab_size == n + 3 == network.get_input_embeddings().weight.shape[0]
    found = families.load(tmp_path / "out")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(found[n + 1], one["model.embed_tokens.weight"][n + 1])
    np.testing.assert_array_equal(found[n + 2], two["model.embed_tokens.weight"][n])
    assert new.eos_token_id == network.config.eos_token_id == 2 and new.pad_token_id == network.config.pad_token_id


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_vocabularies_cut_to_the_rows(tmp_path, kind):
    """The base's tokenizer has more tokens than its embedding rows: with new ones, they and their merges go."""
    rng = np.random.default_rng(1)
    base, old = save(tmp_path / "base", kind, [], rng)
    rows = len(old) - 5
    short = {name: array[:rows] if array.shape[0] == len(old) else array for name, array in base.items()}
    families.save(tmp_path / "base", short, families.config(vocab=rows, layers=1, dtype="float32"))
    save(tmp_path / "m0", kind, ["<x>"], rng, base)
    recipe = families.recipe(tmp_path, k=1, tokenizer={"source": "base", "tokens": {"<x>": {}}})
    dk.merge(recipe, tmp_path / "out")
    new = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(new) == rows + 1 and new.convert_tokens_to_ids("<x>") == rows
    for text in TEXTS[:4]:
        ids = new(text).input_ids
        assert max(ids) < rows and new.decode(ids) == old.decode(old(text).input_ids)


CHAT = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"},
]  # fmt: skip
EXPECTED = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "Hello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello.[|endofturn|]\n"
    "[|user|]Bye\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello.</s>[INST] Bye [/INST]",
}  # fmt: skip


def test_named_templates_lay_out_a_conversation():
    assert EXPECTED.keys() == CHAT_TEMPLATES.keys()
    made = tokenizers.Tokenizer.from_str(trained("WordPiece"))
    for name, template in CHAT_TEMPLATES.items():
        asked = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
        asked.chat_template = template.text
        assert asked.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == EXPECTED[name], name
        assert all(token in EXPECTED[name] for token in template.tokens)
        without = asked.apply_chat_template(CHAT[1:3], tokenize=False)
        assert "Hi" in without and "Hello." in without


def test_templates_of_a_recipe(tmp_path):
    rng = np.random.default_rng(2)
    base, _ = save(tmp_path / "base", "WordPiece", [], rng)
    texts = ["{{ messages[0].content }} A", "{{ messages[0].content }} B\n", "{{ messages[0].content }} B"]
    for i, text in enumerate(texts):
        save(tmp_path / f"m{i}", "WordPiece", [], rng, base)
        (tmp_path / f"m{i}" / "chat_template.jinja").write_text(text)
    written = "{{ messages[0].content ~ '!' }}"
    for asked, expected in (("auto", texts[1]), (written, written), ("mistral", CHAT_TEMPLATES["mistral"].text)):
        dk.merge(families.recipe(tmp_path, chat_template=asked), tmp_path / "out", overwrite=True)
        found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
        assert found.rstrip() == expected.rstrip()
    with dk.plan(families.recipe(tmp_path, chat_template="chatml")) as plan:
        assert any("WARNING: the chat template chatml writes <|im_start|>, <|im_end|>" in note for note in plan.notes)


def test_a_sentencepiece_model_alone(tmp_path):
    """Copied where nothing changes; refused, with what to run, where tokens are to be added to it."""
    rng = np.random.default_rng(3)
    base, _ = save(tmp_path / "base", "WordPiece", [], rng)
    rows = len(base["model.embed_tokens.weight"])
    piece = b"".join(
        b"\x0a" + bytes([len(body)]) + body
        for body in (b"\x0a" + bytes([len(text)]) + text for text in (b"p%d" % i for i in range(rows)))
    )
    for name in ("base", "m0"):
        save(tmp_path / name, "WordPiece", [], rng, base)
        for file in (tmp_path / name).glob("*token*"):
            file.unlink()
        (tmp_path / name / "tokenizer.model").write_bytes(piece)
    recipe = families.recipe(tmp_path, k=1, tokenizer_source="union")
    dk.merge(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == piece
    (tmp_path / "m0" / "added_tokens.json").write_text(json.dumps({"<x>": rows}))
    families.save(tmp_path / "m0", {k: np.vstack([v, v[:1]]) if len(v) == rows else v for k, v in base.items()})
    with pytest.raises(PlanError, match=r"AutoTokenizer.from_pretrained\(.*base.*\).save_pretrained"):
        dk.merge(recipe, tmp_path / "out", overwrite=True)


def test_a_union_in_memory_is_the_one_on_disk(tmp_path):
    """A live model has the rows, the tokenizer and the template that the merged folder has."""
    rng = np.random.default_rng(4)
    base, _ = save(tmp_path / "base", "BPE", [], rng)
    for i in range(2):
        save(tmp_path / f"m{i}", "BPE", [f"<x{i}>"], rng, base)
    recipe = families.recipe(tmp_path, k=2, tokenizer_source="union", chat_template="alpaca")
    dk.merge(recipe, tmp_path / "out")
    found = families.load(tmp_path / "out")["model.embed_tokens.weight"]
    with open_live(recipe, device="cpu") as live:
        rows = live.model.get_input_embeddings().weight.detach().numpy()
        np.testing.assert_array_equal(rows, found)
        assert live.tokenizer("<x1>", add_special_tokens=False).input_ids == [len(found) - 1]
        assert live.tokenizer.chat_template == CHAT_TEMPLATES["alpaca"].text
