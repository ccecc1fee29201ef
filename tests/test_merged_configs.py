# SPDX-License-Identifier: Apache-2.0
"""What travels, from configs alone: the output's config.json, classes of heads, functions that differ."""

from types import SimpleNamespace

import pytest

from darekit.checkpoints import ArrayBytes, Checkpoint, TensorInfo
from darekit.dtypes import DTYPES
from darekit.planning.matching.vocabulary import rows_told, sizes_for_config, tokens_axis
from darekit.planning.travel.beside import companions_of, main_dtype
from darekit.planning.travel.configs import config_notes, functional
from darekit.planning.travel.labels import label_notes, labels_of, shared_labels
from darekit.planning.travel.merged import merged_config, with_ids


def checkpoint(config, ref="hub/m", origin=None):
    return Checkpoint(ref, None, {}, config, (), None, origin=origin)


def merged(config, dtype="BF16", sizes=None, tied=None):
    return merged_config(config, dtype=DTYPES[dtype], sizes=sizes or {}, tied=tied)


# --- config.json


def test_the_number_format_is_told_in_every_spelling():
    config = {
        "torch_dtype": "float32",
        "other": "float32",
        "text_config": {"dtype": None, "deeper_config": {"dtype": "x"}},
        "encoder": {"torch_dtype": "float16"},
        "plain": {"dtype": "float16"},
        "dtype": {"": "float32", "vision": "float16"},
        "vision_config": "not a dict",
    }
    found = merged(config)
    assert found == {
        "torch_dtype": "bfloat16",
        "other": "float32",
        "text_config": {"dtype": "bfloat16", "deeper_config": {"dtype": "bfloat16"}},
        "encoder": {"torch_dtype": "bfloat16"},
        "plain": {"dtype": "float16"},
        "dtype": {"": "bfloat16", "vision": "bfloat16"},
        "vision_config": "not a dict",
    }
    assert [*found] == [*config] and config["torch_dtype"] == "float32"
    assert merged({}, "F16") == {"torch_dtype": "float16"} and merged({"dtype": None}, "F8_E4M3") == {
        "dtype": "bfloat16"
    }
    assert merged({"dtype": 5}, "F32") == {"dtype": 5}


def test_vocabularies_are_told_where_configs_keep_them():
    assert merged({"vocab_size": 5, "dtype": "x"}, sizes={"vocab_size": 9})["vocab_size"] == 9
    assert merged({}, sizes={"vocab_size": 9})["vocab_size"] == 9
    text = merged({"text_config": {"vocab_size": 5}}, sizes={"vocab_size": 9})
    assert text["text_config"]["vocab_size"] == 9 and "vocab_size" not in text
    both = merged({"text_config": {}, "vocab_size": 5}, sizes={"vocab_size": 9})
    assert both["text_config"] == {"vocab_size": 9} and both["vocab_size"] == 9
    nested = {"encoder": {"vocab_size": 5}, "plain": 3}
    found = merged(nested, sizes={"encoder.vocab_size": 7, "decoder.vocab_size": 8, "plain.x": 1, "own_size": 4})
    assert {*found} == {"encoder", "plain", "own_size", "torch_dtype"}
    assert (found["encoder"], found["plain"], found["own_size"]) == ({"vocab_size": 7}, 3, 4)


def test_ties_are_told_where_a_class_asks():
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert "tie_word_embeddings" not in merged(llama)
    assert merged(llama, tied=True)["tie_word_embeddings"] is True
    assert merged(llama | {"tie_word_embeddings": True}, tied=False)["tie_word_embeddings"] is False
    unknown = merged({"text_config": {}, "architectures": ["Strange"]}, tied=True)
    assert unknown["tie_word_embeddings"] is True and unknown["text_config"] == {"tie_word_embeddings": True}


IDS = {"eos_token_id": 7, "image_token_index": 8, "tokenizer_class": "T", "pad_token_ids": [1], "sep_token_indices": 2}


def test_ids_of_special_tokens_are_anothers():
    config = {
        "model_type": "a",
        "eos_token_id": 1,
        "bos_token_id": 2,
        "hidden": 3,
        "text_config": {"eos_token_id": 1, "x": 1},
    }
    source = {"model_type": "a", **IDS, "hidden": 9, "text_config": {"eos_token_id": 5}}
    found = with_ids(config, source)
    assert found == {"model_type": "a", "hidden": 3, "text_config": {"eos_token_id": 5, "x": 1}, **IDS}
    assert (
        with_ids(config, None) == config
        and with_ids(config, {"model_type": "a"})["text_config"] == config["text_config"]
    )
    assert with_ids(config, {"model_type": "a"}) == {
        key: config[key] for key in ("model_type", "hidden", "text_config")
    }
    unlike = with_ids(
        {"model_type": "a", "plain": {"eos_token_id": 1}}, {"model_type": "a", "plain": {"eos_token_id": 5}}
    )
    assert unlike["plain"] == {"eos_token_id": 1}


def test_ids_of_a_language_model_go_into_a_whole_one_and_back():
    whole = {"model_type": "vl", "eos_token_id": 1, "text_config": {"eos_token_id": 1, "bos_token_id": 2, "x": 3}}
    found = with_ids(whole, {"model_type": "text", "eos_token_id": 7, "pad_token_id": 9, "hidden": 1})
    assert found == {
        "model_type": "vl",
        "eos_token_id": 7,
        "pad_token_id": 9,
        "text_config": {"eos_token_id": 7, "bos_token_id": 2, "x": 3},
    }
    inner = with_ids(
        {"model_type": "vl", "text_config": {"eos_token_id": 1}}, {"model_type": "text", "eos_token_id": 7}
    )
    assert inner == {"model_type": "vl", "text_config": {"eos_token_id": 7}}  # not at the top, where it was not
    back = with_ids(
        {"model_type": "text", "eos_token_id": 1}, {"model_type": "vl", "text_config": {"eos_token_id": 7, "x": 1}}
    )
    assert back == {"model_type": "text", "eos_token_id": 7}
    top = with_ids({"model_type": "text"}, {"model_type": "vl", "eos_token_id": 8, "text_config": {"eos_token_id": 7}})
    assert top["eos_token_id"] == 8


def place(dtype, nbytes):
    return SimpleNamespace(dtype=dtype, nbytes=nbytes)


def test_the_format_of_most_bytes_and_what_is_made_of_it():
    def plan(*shards, **more):
        config = checkpoint({"model_type": "a", "eos_token_id": 1, "vocab_size": 5})
        travel = SimpleNamespace(config=config, tokenizer=config, labels={}, files={"x": b""})
        whole = {
            "config": None,
            "travel": travel,
            "template": "T",
            "alignment": SimpleNamespace(sizes={}, tied=None),
        } | more
        return SimpleNamespace(shards=[SimpleNamespace(placements=one) for one in shards], **whole)

    assert main_dtype(plan([place("F32", 4), place("BF16", 3)], [place("BF16", 3), place("I64", 99)])).name == "BF16"
    assert main_dtype(plan([place("F16", 0), place("F16", 0), place("F32", 1)])).name == "F16"  # empty ones count, too
    assert main_dtype(plan([place("I64", 99)])).name == main_dtype(plan()).name == "F32"
    one = plan([place("F16", 2)], alignment=SimpleNamespace(sizes={"vocab_size": 9}, tied=None))
    found = companions_of(one)
    assert found.config == {"model_type": "a", "eos_token_id": 1, "vocab_size": 9, "torch_dtype": "float16"}
    assert found.files == {"x": b""} and found.chat_template == "T"
    one.travel.tokenizer, one.travel.labels = (
        checkpoint({"model_type": "a", "eos_token_id": 7}),
        {"id2label": {"0": "x"}},
    )
    found = companions_of(one)
    assert found.config["eos_token_id"] == 7 and found.config["id2label"] == {"0": "x"}
    one.config = {"model_type": "a", "stacked": True}
    assert companions_of(one).config["stacked"] and "vocab_size" in companions_of(one).config
    one.travel.config = checkpoint(None)
    assert companions_of(one).config is None


# --- vocabularies


def info(*shape, name="w"):
    return TensorInfo(name, "F32", shape, ArrayBytes(None))


@pytest.mark.parametrize(
    ("axis", "shape", "found", "expected"),
    [
        (0, (5, 3), [(5, 3), (7, 3)], 0),
        (1, (3, 5), [(3, 5), (3, 7)], None),
        (1, (1, 5), [(1, 5), (1, 7)], 1),
        (0, (5, 3), [(5, 3), (7, 4)], None),
        (None, (5, 3), [(5, 3), (7, 3)], None),
        (0, (5,), [(5,), (7,)], 0),
        (0, (5, 3), [(5, 3), (7,)], None),
        (0, (5, 3), [(7,), (5, 3)], None),
        (0, (5, 3, 2), [(5, 3, 2), (4, 3, 2)], 0),
        (1, (2, 5), [(2, 5)], None),
        (1, (1, 5, 2), [(1, 5, 2), (1, 6, 2)], 1),
        (1, (1, 5, 2), [(1, 5, 2), (1, 5, 3)], None),
        (1, (1, 5), [(1, 5), (2, 7)], None),
    ],
)
def test_the_axis_that_counts_tokens(axis, shape, found, expected):
    roles = SimpleNamespace(of=lambda name, shape: SimpleNamespace(token_axis=axis))
    assert tokens_axis(info(*shape), [info(*one) for one in found], roles) == expected


def test_rows_in_words_and_in_configs():
    views = [(SimpleNamespace(ref="hub/a"), info(5, 3)), (SimpleNamespace(ref="b"), info(7, 4))]
    assert rows_told("w", 0, views) == "w: 5 rows in a, 7 rows in b" and rows_told("w", 1, views).startswith(
        "w: 3 rows"
    )
    counted = {"embed": {0: "vocab_size"}, "head": {0: "vocab_size"}, "bias": {1: "text.vocab"}}
    facts = SimpleNamespace(counted=lambda name: counted.get(name, {}), is_input_embedding=lambda name: name == "other")
    rows = {"embed": (0, 9), "head": (0, 8), "bias": (1, 7), "none": (0, 99)}
    assert sizes_for_config(facts, rows) == {"vocab_size": 9, "text.vocab": 7}
    assert sizes_for_config(facts, {"head": (0, 8), "embed": (0, 9)}) == {"vocab_size": 9}
    assert sizes_for_config(facts, {"other": (0, 6), "embed": (1, 5)}) == {"vocab_size": 6}


# --- classes


NAMES = {"id2label": {"0": "no", "1": "yes"}}


def test_labels_are_read_from_either_side():
    assert labels_of({"id2label": {"1": "yes", 0: "no", "x": "?", "1234567890": "?"}}) == {0: "no", 1: "yes"}
    assert [*labels_of({"id2label": {"2": "c", "1": "b"}})] == [1, 2]
    assert labels_of({"id2label": {"0": "a"}, "label2id": {"b": 0}}) == {0: "a"}
    assert labels_of({"id2label": [], "label2id": {"b": 4}}) == {4: "b"}
    assert labels_of(None) == labels_of({}) == labels_of({"id2label": {}}) == labels_of({"label2id": 3}) == {}
    assert labels_of({"id2label": {"0": "LABEL_0", "1": "yes"}}) == {0: "LABEL_0", 1: "yes"}
    for classes, expected in (
        (["LlamaForCausalLM"], {}),
        (["BertForMaskedLM", "GPT2LMHeadModel"], {}),
        (["T5ForConditionalGeneration"], {}),
        (["BertForSequenceClassification"], {0: "no", 1: "yes"}),
        ([], {0: "no", 1: "yes"}),
        ("LlamaForCausalLM", {0: "no", 1: "yes"}),
        (["LlamaForCausalLM", "BertForSequenceClassification"], {0: "no", 1: "yes"}),
    ):
        assert labels_of(NAMES | {"architectures": classes}) == expected


def test_labels_that_all_models_share_travel():
    other = checkpoint({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    both = [checkpoint(NAMES | {"problem_type": kind, "x": 1}) for kind in ("single", "single")]
    assert shared_labels(other, both) == NAMES | {"problem_type": "single"}
    apart = [both[0], checkpoint({"id2label": {"0": " NO", "1": "Yes "}, "problem_type": "multi"})]
    assert shared_labels(other, apart) == NAMES
    assert shared_labels(None, both) == shared_labels(checkpoint(NAMES), both) == {}
    assert (
        shared_labels(other, [])
        == shared_labels(other, [other, other])
        == shared_labels(other, [checkpoint(None)])
        == {}
    )
    assert shared_labels(other, [both[0], checkpoint({"id2label": {"0": "no", "1": "maybe"}})]) == {}
    assert shared_labels(checkpoint(None), both[:1]) == NAMES | {"problem_type": "single"}


def test_classes_that_differ_are_told():
    base = checkpoint({"id2label": {"0": "no", "1": "yes"}}, "hub/base")
    turned = checkpoint({"id2label": {"0": "yes", "1": "No ", "2": "maybe"}}, "hub/turned")
    (said,) = label_notes(base, [turned], {})
    assert said.startswith(
        "the classes of the base and turned differ "
        "(0 is 'no' and 'yes'; 1 is 'yes' and 'No '; 2 is nothing and 'maybe'), and"
    )
    assert "as with `heads: hub/turned`" in said
    fewer = checkpoint({"id2label": {"0": "no"}}, "few")
    assert "(1 is 'yes' and nothing), and" in next(label_notes(base, [fewer], {}))
    assert [*label_notes(base, [checkpoint({"id2label": {"0": "NO", "1": " yes"}})], {})] == []
    assert [*label_notes(base, [checkpoint(None)], {})] == [*label_notes(None, [turned], {})] == []
    many = [
        checkpoint({"id2label": {str(at): f"{word}{at}" for at in range(count)}}, word)
        for word, count in (("a", 3), ("b", 5))
    ]
    assert "2 is 'a2' and 'b2'; and 2 more), and" in next(label_notes(None, many, {}))
    assert "2 is 'a2' and 'b2'), and" in next(
        label_notes(None, [many[0], checkpoint({"id2label": {str(at): f"b{at}" for at in range(3)}})], {})
    )
    (said,) = label_notes(base, [turned, turned], {"id2label": {}})  # the base has no say then
    assert said == "the output has the class names of turned and turned"
    kinds = [checkpoint({"problem_type": kind}, f"hub/{at}") for at, kind in enumerate(("one", "many", "one"))]
    (said,) = label_notes(None, kinds, {})
    assert said.startswith("problem_type is one in 0 and 2, many in 1: heads") and "`heads: hub/0`" in said
    assert [*label_notes(None, [kinds[0], kinds[2], checkpoint({"problem_type": None})], {})] == []


# --- functions


def told(*configs, base=None, giver=None, restacked=False):
    models = [checkpoint(config, f"hub/m{at}") for at, config in enumerate(configs)]
    base = None if base is None else checkpoint(base, "hub/base")
    found = [*config_notes(base, models, giver or base or models[0], restacked=restacked)]
    return found[0] if found else ""


def test_what_differs_is_named_with_whose_it_is():
    said = told({"a": 1, "b": 2}, {"a": 3, "b": 2}, {"a": 1}, base={"a": 1.0})
    assert said.startswith(
        "the configs differ, so the models compute different functions of their weights: "
        "a is 1 in the base, m0 and m2, 3 in m1. The output has the config of the base;"
    )
    assert "the config of m1;" in told({"a": 1}, {"a": 2}, giver=checkpoint({}, "hub/m1"))
    assert (
        told({"a": 1}, {"b": 2})
        == told({"a": None}, {"a": 2})
        == told({"a": 1}, None)
        == told({"use_cache": 1}, {"use_cache": 2})
        == ""
    )
    many = told({f"k{at}": 1 for at in range(8)}, {f"k{at}": 2 for at in range(8)})
    assert many.count(" in m0, ") == 6 and "; and 2 more." in many
    assert "more" not in told({f"k{at}": 1 for at in range(6)}, {f"k{at}": 2 for at in range(6)}).split("The output")[0]
    layers = (
        {"num_hidden_layers": 2, "text_config": {"n_layer": 1}},
        {"num_hidden_layers": 3, "text_config": {"n_layer": 4}},
    )
    assert "num_hidden_layers is 2" in told(*layers) and told(*layers, restacked=True) == ""


def of(config, origin=None):
    return functional(checkpoint(config, origin=origin))


def test_values_are_told_alike_however_they_are_written():
    assert of({"a": True, "b": False, "c": 1, "d": 1.0, "e": [1, 2.5, "x"], "f": "swish", "g": "gelu_python"}) == {
        "a": "true", "b": "false", "c": "1", "d": "1", "e": "[1, 2.5, x]", "f": "silu", "g": "gelu",
    }  # fmt: skip
    assert of({"model_type": "qwen2_text"}) == {"model_type": "qwen2"} and of(None) == {}
    assert of({"part": {"deep": {"x": 1}}}) == {"part.deep.x": "1"}


def test_a_language_model_stands_where_a_bare_one_does():
    whole = {
        "model_type": "vl",
        "x": 1,
        "text_config": {"model_type": "own_text", "y": 2},
        "vision_config": {"z": 3},
        "own": {"w": 4},
        "encoder": {"v": 5},
    }
    assert of(whole) == {
        "model_type": "own",
        "x": "1",
        "y": "2",
        "vision_config.z": "3",
        "own.w": "4",
        "encoder.v": "5",
    }
    for text in ({}, {"text_config": {}}):
        assert of({**text, "encoder": {"v": 5}, "b_config": 4}) == {"encoder.v": "5", "b_config": "4"}
    view = of(
        {"num_hidden_layers": 4, "x": 1, "text_config": {"n_layer": 3}, "vision_config": {"num_layers": 2}},
        origin=checkpoint({}),
    )
    assert view == {"x": "1"}


def test_windows_that_are_not_used_are_not_compared():
    windows = {"sliding_window": 5, "max_window_layers": 3}
    assert of({"use_sliding_window": False, **windows}) == {"use_sliding_window": "false"}
    for used in ({"use_sliding_window": True}, {"use_sliding_window": None}, {}):
        assert of({**used, **windows}).items() >= {"sliding_window": "5", "max_window_layers": "3"}.items()


ROPES = [
    ({}, {}),
    ({"model_type": "mamba"}, {}),
    ({"model_type": "llama"}, {"rope_theta": "10000", "rope_scaling": "none"}),
    ({"rope_theta": 5e5}, {"rope_theta": "500000", "rope_scaling": "none"}),
    ({"rotary_emb_base": 7}, {"rope_theta": "7", "rope_scaling": "none"}),
    (
        {"rope_theta": 5, "rotary_pct": 0.25},
        {"rope_theta": "5", "partial_rotary_factor": "0.25", "rope_scaling": "none"},
    ),
    ({"rope_scaling": None}, {"rope_scaling": "none"}),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": "linear (factor 2)"}),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta": None, "a": 1}},
        {"rope_scaling": "yarn (a 1, factor 2)"},
    ),
    ({"rope_scaling": {"rope_type": "llama3", "type": "llama3"}}, {"rope_scaling": "llama3"}),
    (
        {"rope_scaling": {"type": "default", "mrope_section": [1, 2]}},
        {"rope_scaling": "default (mrope_section [1, 2])"},
    ),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, {"rope_scaling": "mrope (mrope_section [1])"}),
    ({"rope_scaling": {"mrope_section": [1]}}, {"rope_scaling": "default (mrope_section [1])"}),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5}}, {"rope_theta": "5", "rope_scaling": "none"}),
    (
        {"rope_parameters": {"rope_theta": 5, "partial_rotary_factor": 0.5}, "rope_theta": 6},
        {"rope_theta": "5 or 6", "partial_rotary_factor": "0.5", "rope_scaling": "none"},
    ),
    ({"rope_parameters": {"rope_theta": 5}, "rope_theta": 5}, {"rope_theta": "5", "rope_scaling": "none"}),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 3}, "rope_scaling": {"type": "yarn", "factor": 2}},
        {"rope_scaling": "linear (factor 3)"},
    ),
    ({"rope_parameters": {}}, {"rope_scaling": "none"}),
    (
        {"rope_theta": 5, "rope_local_base_freq": 3},
        {"rope_theta": "5", "rope_scaling": "none", "sliding.rope_theta": "3", "sliding.rope_scaling": "none"},
    ),
    (
        {
            "rope_parameters": {
                "full_attention": {"rope_theta": 5},
                "sliding_attention": {"rope_theta": 3, "rope_type": "linear"},
            }
        },
        {"rope_theta": "5", "rope_scaling": "none", "sliding.rope_theta": "3", "sliding.rope_scaling": "linear"},
    ),
    (
        {"rope_parameters": {"sliding_attention": {"rope_theta": 3}}},
        {"sliding.rope_theta": "3", "sliding.rope_scaling": "none"},
    ),
]


@pytest.mark.parametrize(("config", "expected"), ROPES, ids=str)
def test_rotary_frequencies_have_one_spelling(config, expected):
    found = of(config)
    found.pop("model_type", None)
    assert found == expected
