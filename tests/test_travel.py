# SPDX-License-Identifier: Apache-2.0
"""What travels with the weights: one tokenizer, its template and its ids from one source; companions; configs that
agree."""

import json
import shutil

import pytest

import darekit
import families
from darekit.checkpoints.companions import travels
from darekit.planning.travel.configs import OF_THETA, THETA
from hub_server import dare as from_hub
from test_tokenizers import LLAMA, WORDS, fast, put, sentencepiece

CHAT = ["<|im_start|>", "<|im_end|>"]
SPECIAL = [*WORDS[:4], *CHAT]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
END = len(WORDS) + 1


@pytest.fixture
def family(llamas, tmp_path, monkeypatch):
    """base, m0, m1 in the working directory, each with a tokenizer by words."""
    for name in ("base", "m0", "m1"):
        shutil.copytree(llamas.path / name, tmp_path / name)
        fast(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chat(*directories, template=True, tokens=True):
    """Chat tokens in reserved rows, a template of them, and turns that end with the last."""
    for directory in directories:
        fast(directory, [*WORDS, *CHAT] if tokens else WORDS, SPECIAL if tokens else WORDS[:4], eos_token=CHAT[1])
        edit(directory, "config.json", eos_token_id=END)
        put(directory, "generation_config.json", {"eos_token_id": [2, END]})
        if template:
            put(directory, "chat_template.jinja", TEMPLATE)


def edit(directory, file, **changes):
    path = directory / file
    data = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def read(directory, file):
    return json.loads((directory / file).read_text())


def merge(dare, place, *more, models="m0, m1", out="out"):
    lines = ["base_model: base", f"models: [{models}]", "merge_method: task_arithmetic", "parameters: {lambda: 0.5}"]
    (place / "recipe.yaml").write_text("\n".join([*lines, *more]))
    return dare("merge", "recipe.yaml", out)


def notes(place):
    """What a plan of the merge says."""
    recipe = {
        "base_model": str(place / "base"),
        "models": [str(place / "m0"), str(place / "m1")],
        "merge_method": "linear",
    }
    return darekit.plan(recipe).notes


def flat(text):
    return " ".join(text.split())


def has_all_of(out, source):
    """Tokenizer, template, generation settings and the ids of config.json are one model's."""
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
    same = [name for name in names if (source / name).exists()]
    return (
        all((out / name).read_bytes() == (source / name).read_bytes() for name in same)
        and not any((out / name).exists() for name in names if name not in same)
        and read(out, "config.json").get("eos_token_id") == read(source, "config.json").get("eos_token_id")
    )


# --- one source


def test_the_tokenizer_that_all_models_share_is_taken_whole(family, dare):
    chat(family / "m0", family / "m1")
    edit(family / "m1", "tokenizer_config.json", name_or_path="somewhere", padding_side="left")
    put(family / "base", "generation_config.json", {"eos_token_id": 2})
    said = merge(dare, family)
    assert said.code == 0 and has_all_of(family / "out", family / "m0")
    assert "has the tokenizer of m0 and m1" in flat(said.err) and "<|im_start|>, <|im_end|>" in flat(said.err)
    assert merge(dare, family, "tokenizer_source: base", out="own").code == 0
    assert has_all_of(family / "own", family / "base")


def test_without_a_template_too(family, dare):
    chat(family / "m0", family / "m1", template=False)
    said = merge(dare, family)
    assert said.code == 0 and has_all_of(family / "out", family / "m0") and "differs" in flat(said.err)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("add_bos_token", False, True),
        ("add_bos_token", True, True),
        ("add_eos_token", True, True),
        ("add_eos_token", False, False),  # as if nothing were said
        ("split_special_tokens", False, False),
    ],
)
def test_what_only_the_models_say_of_how_text_is_cut(family, dare, key, value, told):
    for name in ("m0", "m1"):
        edit(family / name, "tokenizer_config.json", **{key: value})
    said = merge(dare, family)
    assert said.code == 0
    assert (f"it does not say {key}: {str(value).lower()}" in flat(said.err)) is told
    assert has_all_of(family / "out", family / ("m0" if told else "base"))


def test_a_template_never_comes_without_its_tokens(family, dare):
    chat(family / "m0")
    said = merge(dare, family)
    assert said.code == 0 and has_all_of(family / "out", family / "base"), "m1 knows nothing of chat"
    told = flat(said.err)
    assert "tokenizers of the models differ" in told and "<|im_start|>, <|im_end|>" in told
    assert "tokenizer_source: m0" in told
    assert merge(dare, family, "tokenizer_source: m0", out="chosen").code == 0
    assert has_all_of(family / "chosen", family / "m0")


def test_many_tokens_are_counted(family, dare):
    words = [f"word{i}" for i in range(40)]
    fast(family / "m0", [*WORDS, *words])
    fast(family / "m1", [*WORDS, *words[1:]])
    told = flat(merge(dare, family).err)
    assert "tokens word0, word1, word2, word3, word4 and 35 more" in told


@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json", "generation_config.json"])
def test_another_end_of_turn_is_another_tokenizer(family, dare, where):
    for name in ("base", "m0", "m1"):
        fast(family / name, [*WORDS, *CHAT], SPECIAL)
        put(family / name, "generation_config.json", {"eos_token_id": 2})
        edit(family / name, "config.json", eos_token_id=2)
    for name in ("m0", "m1"):
        edit(
            family / name,
            where,
            **{"eos_token" if "tokenizer" in where else "eos_token_id": CHAT[1] if "tok" in where else END},
        )
    said = merge(dare, family)
    assert has_all_of(family / "out", family / "m0") and "eos_token" in flat(said.err)
    shutil.copy(family / "base" / where, family / "m1")
    told = merge(dare, family, out="apart")
    assert has_all_of(family / "apart", family / "base") and "eos_token" in flat(told.err)


def test_ids_follow_into_the_language_models_config(family, dare):
    for name in ("base", "m0", "m1"):
        config = read(family / name, "config.json")
        put(family / name, "config.json", {"model_type": "x", "text_config": {**config, "eos_token_id": 2}})
    chat(family / "m0", family / "m1")
    for name in ("m0", "m1"):
        config = read(family / name, "config.json")
        edit(family / name, "config.json", eos_token_id=..., text_config={**config["text_config"], "eos_token_id": END})
    assert merge(dare, family).code == 0
    assert read(family / "out", "config.json")["text_config"]["eos_token_id"] == END


def test_equal_contents_are_one_tokenizer_however_they_are_written(family, dare):
    document = read(family / "m0", "tokenizer.json")
    document["added_tokens"].reverse()
    put(family / "m0", "tokenizer.json", document | {"truncation": {"max_length": 3}})
    edit(family / "m1", "tokenizer_config.json", model_max_length=9, padding_side="left", pad_token="</s>")
    said = merge(dare, family)
    assert said.code == 0 and has_all_of(family / "out", family / "base") and "tokenizer" not in said.err


def test_templates_alone_that_differ(family, dare):
    put(family / "base", "chat_template.jinja", "A")
    edit(family / "m0", "tokenizer_config.json", chat_template="A\n")
    edit(family / "m1", "tokenizer_config.json", chat_template=[{"name": "default", "template": "B"}])
    said = merge(dare, family)
    assert has_all_of(family / "out", family / "base") and "the chat templates of the models differ" in flat(said.err)
    edit(family / "m0", "tokenizer_config.json", chat_template="B")
    assert merge(dare, family, out="agreed").code == 0
    assert read(family / "agreed", "tokenizer_config.json")["chat_template"] == "B"
    assert not (family / "agreed" / "chat_template.jinja").exists()


def interpolated(dare, place, base, model, method="slerp", more="parameters: {t: 0.5}"):
    lines = [f"base_model: {base}", f"models: [{base}, {model}]", f"merge_method: {method}", more]
    (place / "recipe.yaml").write_text("\n".join(lines))
    shutil.rmtree(place / "out", ignore_errors=True)
    return dare("merge", "recipe.yaml", "out")


def test_a_base_that_is_merged_is_asked_with_the_models(family, dare):
    """slerp's base is one of its two models: their tokenizers agree, or it is told which of them the output has."""
    chat(family / "m0")
    for method, more in (("slerp", "parameters: {t: 0.5}"), ("linear", "parameters: {weight: 0.5}")):
        for base, model in (("m0", "m1"), ("m1", "m0")):
            fast(family / "m1", [*WORDS, *CHAT], SPECIAL)  # the same tokens, another end, no template
            found = interpolated(dare, family, base, model, method, more)
            assert found.code == 0 and has_all_of(family / "out", family / "m0")
            choice = "base" if base == "m1" else "m1"
            assert "alone has a chat template; that of m1 differs in eos_token" in flat(found.err)
            assert f"choose it with tokenizer_source: {choice}" in flat(found.err)
        fast(family / "m1", [*WORDS, "other", CHAT[1]], [*WORDS[:4], CHAT[1]])  # another token
        for base, model in (("m0", "m1"), ("m1", "m0")):
            found = interpolated(dare, family, base, model, method, more)
            assert found.code == 0 and has_all_of(family / "out", family / base)
            assert "The output has the base's tokenizer" in found.err
            assert f"choose with tokenizer_source: {model}" in flat(found.err)


def test_a_third_model_beside_slerps_two_gives_its_tokenizer(family, dare):
    chat(family / "m0", family / "m1")
    (family / "recipe.yaml").write_text(
        "base_model: base\nmodels: [m0, m1]\nmerge_method: slerp\nparameters: {t: 0.5}\n"
    )
    found = dare("merge", "recipe.yaml", "out")
    assert "base gives only config and tokenizer" in flat(found.err) and has_all_of(family / "out", family / "base")


def test_generation_settings_of_one_model(family, dare):
    put(family / "m1", "generation_config.json", {"eos_token_id": 2, "temperature": 0.6})
    said = merge(dare, family)
    assert has_all_of(family / "out", family / "m1") and "generation_config.json" in flat(said.err)
    fast(family / "m0", [*WORDS, "more"])
    said = merge(dare, family, out="apart")
    assert has_all_of(family / "apart", family / "base") and "generation_config.json of m1 is not copied" in flat(
        said.err
    )


@pytest.mark.parametrize("form", ["sentencepiece", "wordpiece", "bpe"])
def test_older_forms(family, dare, form):
    """Slow tokenizers of the base, and of models that have the same and two tokens more."""
    for name in ("base", "m0", "m1"):
        (family / name / "tokenizer.json").unlink()
        words = ["<unk>", "<s>", "</s>", "hello", *(CHAT if name != "base" and form != "sentencepiece" else [])]
        if form == "sentencepiece":
            put(family / name, "tokenizer.model", LLAMA)
            if name != "base":
                put(family / name, "added_tokens.json", {token: 4 + i for i, token in enumerate(CHAT)})
        elif form == "wordpiece":
            put(family / name, "vocab.txt", "\n".join(words) + "\n")
        else:
            put(family / name, "vocab.json", {token: i for i, token in enumerate(words)})
            put(family / name, "merges.txt", "#version: 0.2\nh e\n")
    said = merge(dare, family)
    assert said.code == 0 and "<|im_start|>, <|im_end|>" in flat(said.err)
    kinds = {"sentencepiece": "added_tokens.json", "wordpiece": "vocab.txt", "bpe": "vocab.json"}
    assert (family / "out" / kinds[form]).read_bytes() == (family / "m0" / kinds[form]).read_bytes()
    if form == "sentencepiece":
        put(family / "m1", "tokenizer.model", sentencepiece(LLAMA))
        (family / "m1" / "added_tokens.json").unlink()
        assert "tokenizers of the models differ" in flat(merge(dare, family, out="apart").err)


def test_a_tokenizer_that_does_not_fit_the_rows_stays_behind(family, dare):
    tokens = [*WORDS, *(f"t{i}" for i in range(families.VOCAB))]
    for name in ("m0", "m1"):
        fast(family / name, tokens)
    said = merge(dare, family)
    assert has_all_of(family / "out", family / "base") and "do not fit" in flat(said.err)


# --- a model without one


def test_a_model_without_a_tokenizer_gets_the_bases(family, dare):
    for path in (family / "m0").glob("tokenizer*"):
        path.unlink()
    put(family / "base", "generation_config.json", {"eos_token_id": 2})
    for command in (("drop", "base", "m0", "out", "-p", "0.5"), ("pack", "base", "m0", "m.safetensors", "-p", "0.5")):
        said = dare(*command)
        assert said.code == 0 and "m0 has no tokenizer files: the output has the base's" in flat(said.err)
    assert has_all_of(family / "out", family / "base")
    assert dare("unpack", "base", "m.safetensors", "unpacked").code == 0
    assert has_all_of(family / "unpacked", family / "base")


def test_a_source_without_a_tokenizer_is_an_error_that_names_who_has_one(family, dare):
    for path in (family / "m0").glob("tokenizer*"):
        path.unlink()
    said = merge(dare, family, "tokenizer_source: m0")
    assert said.code == 1 and "m0 has no tokenizer files" in flat(said.err) and "base and m1 have" in flat(said.err)
    assert not (family / "out").exists()
    assert merge(dare, family).code == 0 and (family / "out" / "tokenizer.json").exists()


# --- companions

MODULES = {
    "modules.json": '[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]',
    "1_Pooling/config.json": '{"pooling_mode_cls_token": true}',
    "config_sentence_transformers.json": '{"prompts": {"query": "query: "}}',
    "preprocessor_config.json": '{"do_resize": true}',
    "LICENSE": "do as you like",
}


def with_modules(*directories):
    for directory in directories:
        for name, text in MODULES.items():
            put(directory, name, text)


def names_in(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("holders", [("base", "m0", "m1"), ("m0", "m1"), ("base",)])
def test_files_that_nobody_knows_travel(family, dare, holders):
    with_modules(*(family / name for name in holders))
    for name in holders:
        put(family / name, "trainer_state.json", "{}")
        put(family / name, "checkpoint-5/config.json", "{}")
        put(family / name, "README.md", "about")
    assert merge(dare, family).code == 0
    assert {name: (family / "out" / name).read_text() for name in MODULES} == MODULES
    assert not {"trainer_state.json", "checkpoint-5/config.json"} & names_in(family / "out")


def test_files_of_one_model_alone_are_named(family, dare):
    with_modules(family / "m1")
    said = merge(dare, family)
    assert not MODULES.keys() & names_in(family / "out")
    assert all(name in flat(said.err) for name in MODULES) and "of m1 are not copied" in flat(said.err)
    with_modules(family / "base")
    put(family / "m1", "1_Pooling/config.json", "{}")
    said = merge(dare, family, out="apart")
    assert (family / "apart/1_Pooling/config.json").read_text() == MODULES["1_Pooling/config.json"]
    assert "1_Pooling/config.json differ" in flat(said.err)


def test_a_pack_gives_back_all_files(family, dare):
    with_modules(family / "m0")
    chat(family / "m0")
    edit(family / "m0", "config.json", hidden_act="gelu")
    given = names_in(family / "m0") | {"README.md"}
    for more in (("--lossless",), ("-p", "0.5")):
        out = family / f"out{len(more)}"
        assert dare("pack", "base", "m0", "m0.safetensors", "--overwrite", *more).code == 0
        assert dare("unpack", "base", "m0.safetensors", out).code == 0
        assert {n for n in names_in(out) if not n.startswith("darekit")} == given
        assert all((out / n).read_bytes() == (family / "m0" / n).read_bytes() for n in [*MODULES, "tokenizer.json"])
        assert read(out, "config.json") == read(family / "m0", "config.json") | {"torch_dtype": "bfloat16"}
    assert dare("drop", "base", "m0", "dropped", "-p", "0.5").code == 0
    assert names_in(family / "dropped") == names_in(family / "out2")


def test_what_a_pack_cannot_name_is_told(family, dare):
    put(family / "m0", "prompts/my prompts (1).json", "{}")
    said = dare("pack", "base", "m0", "m0.safetensors", "--lossless")
    assert said.code == 0 and "not packed: prompts/my prompts (1).json" in flat(said.err)


def test_weights_in_folders_are_named(family, dare):
    put(family / "m0", "2_Dense/config.json", "{}")
    put(family / "m0", "2_Dense/model.safetensors", b"x")
    said = dare("drop", "base", "m0", "out", "-p", "0.5")
    assert said.code == 0 and "m0/2_Dense/" in flat(said.err) and not (family / "out/2_Dense").exists()


def test_small_layers_of_sentence_transformers_travel(family, dare):
    with_modules(family / "base", family / "m0", family / "m1")
    for name in ("base", "m0", "m1"):
        put(family / name, "2_Dense/config.json", "{}")
        put(family / name, "2_Dense/model.safetensors", b"base" if name == "base" else b"models")
    said = merge(dare, family)
    assert said.code == 0 and "trained layer" not in said.err
    assert (family / "out/2_Dense/model.safetensors").read_bytes() == b"models"
    for options in (["--lossless"], ["-p", "0.5"]):
        assert dare("pack", "base", "m0", "m0.safetensors", "--overwrite", *options).code == 0
        assert dare("unpack", "base", "m0.safetensors", "back", "--overwrite").code == 0
        assert (family / "back/2_Dense/model.safetensors").read_bytes() == b"models"
    put(family / "m1", "2_Dense/model.safetensors", b"others")
    said = merge(dare, family, out="apart")
    assert said.code == 0 and "2_Dense is a trained layer of the embedding model: merge" in flat(said.err)
    assert (family / "apart/2_Dense/model.safetensors").read_bytes() == b"base"
    put(family / "m1", "2_Dense/model.safetensors", b"x" * 17_000_000)
    assert "2_Dense/" in flat(merge(dare, family, out="large").err)


def test_large_files_are_named():
    assert travels({"a.npy": 20_000_000, "b.json": 5})[0] == ("b.json",)
    many, left = travels({f"{i}.json": 15_000_000 for i in range(6)})
    assert len(many) == 4 and list(left) == ["4.json", "5.json"]
    assert travels({name: 1 for name in ("optimizer.pt", "a/b/c/d/e.json", ".env", "x.py", "run.log", "img.png")}) == (
        (),
        {},
    )


def test_files_that_nobody_knows_come_from_the_hub_too(hub, family):
    with_modules(family / "m0")
    put(family / "m0", "odd[1]*.txt", "odd")
    put(family / "m0", "2_Dense/model.safetensors", b"x")
    put(family / "m0", "further/model.safetensors", b"x")
    for name in ("base", "m0"):
        hub.repositories[f"org/{name}"] = {
            path.relative_to(family / name).as_posix(): path.read_bytes()
            for path in (family / name).rglob("*")
            if path.is_file()
        }
    done = from_hub(hub, family, "drop", "org/base", "org/m0", "out", "-p", "0.5")
    assert done.returncode == 0, done.stderr
    assert {*MODULES, "odd[1]*.txt", "2_Dense/model.safetensors"} <= names_in(family / "out")
    assert "further/" in flat(done.stderr) and "2_Dense/" not in flat(done.stderr)


# --- configs


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ({"hidden_act": "silu"}, {"hidden_act": "gelu"}, "hidden_act is silu in the base and m1, gelu in m0"),
        ({"rms_norm_eps": 1e-6}, {"rms_norm_eps": 1e-2}, "rms_norm_eps is 1e-06 in the base and m1, 0.01 in m0"),
        ({"num_attention_heads": 2}, {"num_attention_heads": 4}, "num_attention_heads is 2"),
        ({"sliding_window": 64}, {"sliding_window": 32}, "sliding_window is 64"),
        ({"layer_types": ["a", "b"]}, {"layer_types": ["a", "a"]}, "layer_types is [a, b]"),
        ({"num_experts_per_tok": 2}, {"num_experts_per_tok": 1}, "num_experts_per_tok is 2"),
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}, "rope_theta is 10000"),
        ({"rope_theta": 1e4, "rope_scaling": None}, {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 8}},
         "rope_scaling is none in the base and m1, yarn (factor 8) in m0"),
        ({"model_type": "llama"}, {"model_type": "llama", "rope_theta": 1e6}, "rope_theta is 10000"),
        ({"text_config": {"hidden_act": "silu"}}, {"text_config": {"hidden_act": "gelu"}}, "hidden_act is silu"),
        ({"text_config": {}, "feature_layer": -2}, {"text_config": {}, "feature_layer": -1}, "feature_layer is -2"),
        ({"vision_config": {"patch_size": 14}}, {"vision_config": {"patch_size": 16}}, "vision_config.patch_size"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
         {"rope_theta": 1e6, "rope_local_base_freq": 2e4}, "sliding.rope_theta is 10000"),
    ],
)  # fmt: skip
def test_configs_that_compute_other_functions_are_told(family, ours, theirs, told):
    for name, changes in (("base", ours), ("m0", theirs), ("m1", ours)):
        edit(family / name, "config.json", **changes)
    said = " ".join(notes(family))
    assert told in said and "output has the config of the base" in said


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"use_cache": True, "pretraining_tp": 1}, {"use_cache": False, "transformers_version": 4, "_name_or_path": 1}),
        ({"hidden_act": "silu"}, {"hidden_act": "swish"}),
        ({"attention_dropout": 0.0, "initializer_range": 1}, {"attention_dropout": 0.1, "initializer_range": 2}),
        ({"rope_theta": 10000.0}, {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}}),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
         {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2}}),
        ({"rotary_emb_base": 10000, "rotary_pct": 0.25},
         {"rope_parameters": {"rope_theta": 10000, "rope_type": "default", "partial_rotary_factor": 0.25}}),
        ({"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None},
         {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                              "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}}),
        ({"use_sliding_window": False, "sliding_window": 4096}, {"use_sliding_window": False, "sliding_window": 32}),
        ({"model_type": "llama"}, {"model_type": "llama", "rope_theta": 10000}),
        ({"head_dim": None, "attention_bias": False}, {"head_dim": 8}),
        ({"text_config": {"rms_norm_eps": 1e-5}}, {"text_config": {"rms_norm_eps": 0.00001}}),
        ({"torch_dtype": "bfloat16"}, {"dtype": "float32"}),
    ],
)  # fmt: skip
def test_configs_that_compute_the_same_are_not_spoken_of(family, ours, theirs):
    for name, changes in (("base", ours), ("m0", theirs), ("m1", ours)):
        edit(family / name, "config.json", **changes)
    assert not [note for note in notes(family) if "config" in note]


@pytest.mark.check
def test_unsaid_frequencies_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    for model_type in OF_THETA & {*transformers.CONFIG_MAPPING}:
        config = transformers.CONFIG_MAPPING[model_type]()
        assert config.rope_parameters["rope_theta"] == THETA, model_type
