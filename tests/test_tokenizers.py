# SPDX-License-Identifier: Apache-2.0
"""Tokenizers as data: what transformers itself reads from the same files, and when two are the same."""

import json
import struct

import pytest

from darekit.checkpoints.companions import companions_in
from darekit.checkpoints.tokenizers import compare, difference, files_digest, forms_of, read_tokenizer
from darekit.checkpoints.vocabularies import pieces_of

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "hello", "world", "wor", "ld", "lo"]
LETTERS = [chr(c) for c in range(97, 123)]


def put(directory, name, value):
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode()
    )
    return directory


def added(token, i, **flags):
    usual = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    return {"id": i, "content": token, **usual, **flags}


def fast(directory, tokens=WORDS, special=WORDS[:4], **more):
    """A tokenizer.json by words; `more`: of tokenizer_config.json."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    document = {
        "version": "1.0", "added_tokens": [added(token, vocabulary[token]) for token in special], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }  # fmt: skip
    put(directory, "tokenizer.json", document)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>", **more}
    return put(directory, "tokenizer_config.json", config)


def of(directory, form=None):
    return read_tokenizer(companions_in(directory), form)


def piece(text, score=0.0, kind=1):
    raw = text.encode()
    body = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(body)]) + body


def sentencepiece(*pieces):
    """A model as SentencePiece writes it: pieces, then a trainer's settings, of which nobody here knows anything."""
    return b"".join(pieces) + b"\x12\x04\x08\x01\x10\x7f"


LLAMA = sentencepiece(piece("<unk>", kind=2), piece("<s>", kind=3), piece("</s>", kind=3), piece("▁hello", -1.5))


# --- what is read


def test_tokenizer_json_is_what_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    fast(tmp_path, pad_token={"__type": "AddedToken", "content": "<pad>", "lstrip": False})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), of(tmp_path)
    assert ours.form == "tokenizer.json" and ours.vocabulary == theirs.get_vocab() and ours.size == len(theirs)
    assert ours.special_ids == {"eos_token_id": 2, "unk_token_id": 3, "pad_token_id": 0}
    assert (theirs.eos_token_id, theirs.unk_token_id, theirs.pad_token_id) == (2, 3, 0)
    assert {token.content: token.id for token in ours.added} == {
        str(t): i for i, t in theirs.added_tokens_decoder.items()
    }


@pytest.mark.parametrize("name", ["BertTokenizer", "GPT2Tokenizer"])
def test_older_files_are_what_transformers_reads(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    if name == "BertTokenizer":
        put(tmp_path, "vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\n##lo\n")
    else:
        put(tmp_path, "vocab.json", {token: i for i, token in enumerate(["<|endoftext|>", *LETTERS, "Ġ", "lo", "Ġlo"])})
        put(tmp_path, "merges.txt", "#version: 0.2\nl o\nĠ lo\n")
    put(tmp_path, "tokenizer_config.json", {"tokenizer_class": name})
    assert of(tmp_path).vocabulary == transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab()


def test_sentencepiece_is_read_without_its_library(tmp_path):
    assert pieces_of(LLAMA) == [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("▁hello", -1.5, 1)]
    put(tmp_path, "tokenizer.model", LLAMA)
    put(tmp_path, "special_tokens_map.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    put(tmp_path, "added_tokens.json", {"<|im_end|>": 4})
    found = of(tmp_path)
    assert found.form == "tokenizer.model"
    assert found.vocabulary == {"<unk>": 0, "<s>": 1, "</s>": 2, "▁hello": 3, "<|im_end|>": 4}
    assert found.special_ids == {"bos_token_id": 1, "eos_token_id": 2} and found.keeps(["<|im_end|>", "</s>"])


def test_other_forms(tmp_path):
    tekken = {"config": {"default_num_special_tokens": 2, "default_vocab_size": 4},
              "vocab": [{"rank": i, "token_bytes": name} for i, name in enumerate(("IQ==", "Ig==", "Iw=="))],
              "special_tokens": [{"rank": 0, "token_str": "<unk>"}, {"rank": 1, "token_str": "<s>"}]}  # fmt: skip
    found = of(put(tmp_path / "tekken", "tekken.json", tekken))
    assert found.vocabulary == {"IQ==": 2, "Ig==": 3, "<unk>": 0, "<s>": 1}
    assert of(put(tmp_path / "qwen", "qwen.tiktoken", b"IQ== 0\nIg== 1\n")).vocabulary == {"IQ==": 0, "Ig==": 1}
    assert of(put(tmp_path / "kimi", "tokenizer.model", b"IQ== 0\nIg== 1\n")).vocabulary == {"IQ==": 0, "Ig==": 1}
    assert of(tmp_path) is None and forms_of({}) == [] and files_digest({}) is None


@pytest.mark.parametrize("raw", [b"", b"{", b"[" * 100_000, b"{}", b'{"model": {"vocab": 3}}', b"\xff\xfe"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json"])
def test_a_broken_file_is_a_fault_and_no_error(name, raw):
    found = read_tokenizer({name: raw})  # in a folder, JSON that is cut off would be left out before
    assert found.vocabulary == {} and (found.fault or name == "vocab.json")


@pytest.mark.parametrize(
    "value",
    [
        "T",
        {"default": "T", "tools": "U"},
        [{"name": "default", "template": "T"}, {"name": "tools", "template": "U"}, 3],
    ],
)
def test_templates_by_name(tmp_path, value):
    fast(tmp_path / "a", chat_template=value)
    assert of(tmp_path / "a").template == "T"
    named = of(put(put(tmp_path / "b", "chat_template.jinja", "T\n"), "additional_chat_templates/tools.jinja", "U"))
    assert named is None
    fast(tmp_path / "b")
    assert of(tmp_path / "b").templates == {"default": "T\n", "tools": "U"}
    assert difference(of(tmp_path / "a"), of(tmp_path / "b")).template is isinstance(value, str)


# --- when two are the same


def test_layout_is_no_difference(tmp_path):
    one = {"type": "BPE", "dropout": None, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "fuse_unk": False}
    two = {"vocab": {"b": 1, "ab": 2, "a": 0}, "merges": [["a", "b"]], "ignore_merges": False}
    put(tmp_path / "one", "tokenizer.json", {"model": one, "added_tokens": [added("<s>", 3), added("</s>", 4)]})
    put(tmp_path / "two", "tokenizer.json", {"model": two, "added_tokens": [added("</s>", 4), added("<s>", 3)],
                                             "truncation": {"max_length": 9}})  # fmt: skip
    put(tmp_path / "two", "tokenizer_config.json", {"model_max_length": 9, "padding_side": "left"})
    a, b = of(tmp_path / "one"), of(tmp_path / "two")
    assert a.digest == b.digest and not difference(a, b)
    put(tmp_path / "two", "tokenizer.json", {"model": {**two, "merges": []}, "added_tokens": []})
    told = difference(a, of(tmp_path / "two"))
    assert (told.tokens, told.parts) == (("<s>", "</s>"), ("merges",))


def test_differences_are_named(tmp_path):
    chat = ["<|im_start|>", "<|im_end|>"]
    fast(tmp_path / "base")
    fast(tmp_path / "chat", [*WORDS, *chat], [*WORDS[:4], *chat], eos_token=chat[1], chat_template="{{ '<|im_end|>' }}")
    fast(tmp_path / "plain", [*WORDS, *chat], WORDS[:4])
    base, model, plain = of(tmp_path / "base"), of(tmp_path / "chat"), of(tmp_path / "plain")
    told = difference(base, model)
    assert told == compare(companions_in(tmp_path / "base"), companions_in(tmp_path / "chat"))
    assert told.tokens == tuple(chat) and told.template and told.roles == {"eos_token": ("</s>", "<|im_end|>")}
    assert model.tokens_in(model.template) == ["<|im_end|>"]
    assert model.keeps(chat) and not base.keeps(chat) and not plain.keeps(chat), "a plain entry is cut before it is met"
    assert difference(plain, model).tokens == tuple(chat)
    swapped = [*WORDS[:4], "world", "hello", *WORDS[6:]]
    assert difference(base, of(fast(tmp_path / "swapped", swapped))).tokens == ("hello", "world")


BARE = {
    "type": "TemplateProcessing", "special_tokens": {},
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
}  # fmt: skip
OFFSETS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
START = BARE | {
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, *BARE["single"]],
}


@pytest.mark.parametrize(
    ("part", "one", "other", "same"),
    [
        ("post_processor", None, BARE, True),  # as transformers 5 writes it where there was none
        ("post_processor", OFFSETS, None, True),
        ("post_processor", {"type": "Sequence", "processors": [OFFSETS, START]}, START, True),
        ("post_processor", {"type": "Sequence", "processors": [OFFSETS, BARE]}, None, True),
        ("post_processor", None, START, False),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [OFFSETS]}, OFFSETS, True),
        ("pre_tokenizer", OFFSETS, None, False),
        ("normalizer", {"type": "Sequence", "normalizers": []}, None, True),
        ("normalizer", {"type": "Sequence", "normalizers": 5}, None, False),
    ],
)
def test_steps_that_do_the_same(part, one, other, same):
    document = {"model": {"type": "WordLevel", "vocab": {"a": 0, "<s>": 1}}, "added_tokens": []}
    found = [{"tokenizer.json": json.dumps({**document, part: step}).encode()} for step in (one, other)]
    assert compare(*found).parts == (() if same else (part,))
