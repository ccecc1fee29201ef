# SPDX-License-Identifier: Apache-2.0
"""The files beside the weights: true to them, loadable, and never worth more than they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from darekit.architectures.families import facts_of
from darekit.checkpoints.companions import companions_in
from darekit.checkpoints.tokenizers import chat_template
from darekit.checkpoints.writing import write_beside
from darekit.dtypes import DTYPES
from darekit.errors import OutputError
from darekit.output.card import agreed_license, front_matter, model_card, public_name
from darekit.output.companions import write_companions
from darekit.planning.travel.companions import companion_files, model_files, tokenizer_files
from darekit.planning.travel.merged import merged_config, with_ids

BF16, F32 = DTYPES["BF16"], DTYPES["F32"]
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    """A real tokenizer, built offline and saved by transformers."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    path = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(path)
    return path


def put(directory, name, value):
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return directory


# --- config.json


@pytest.mark.parametrize("keys", [["dtype"], ["torch_dtype"], ["torch_dtype", "dtype"]])
def test_the_dtype_is_updated_where_it_is(keys):
    config = {"a": 1, **dict.fromkeys(keys, "float16"), "z": {"dtype": "float16"}, "vocab_size": 7}
    before = json.dumps(config)
    merged = merged_config(config, dtype=BF16, sizes={}, tied=None)
    assert merged == {**config, **dict.fromkeys(keys, "bfloat16")} and list(merged) == list(config)
    assert json.dumps(config) == before, "the input is not changed"


def test_the_dtype_is_added_where_it_is_missing():
    merged = merged_config({"a": 1}, dtype=F32, sizes={}, tied=None)
    assert merged == {"a": 1, "torch_dtype": "float32"}


def test_parts_of_a_composite_config_follow():
    config = {
        "torch_dtype": {"": "float16", "vision_config": "float16"},
        "text_config": {"torch_dtype": "float16", "vocab_size": 7, "rope": {"dtype": "x"}},
        "vision_config": {"hidden_size": 3},
        "encoder": {"dtype": None, "deep_config": {"dtype": "float16"}},
        "vocabulary_map": {"dtype": "a token"},
    }
    assert merged_config(config, dtype=BF16, sizes={"vocab_size": 9}, tied=True) == {
        "torch_dtype": {"": "bfloat16", "vision_config": "bfloat16"},
        "text_config": {
            "torch_dtype": "bfloat16",
            "vocab_size": 9,
            "rope": {"dtype": "x"},
            "tie_word_embeddings": True,
        },
        "vision_config": {"hidden_size": 3},
        "encoder": {"dtype": "bfloat16", "deep_config": {"dtype": "bfloat16"}},
        "vocabulary_map": {"dtype": "a token"},
        "tie_word_embeddings": True,
    }


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"vocab_size": 9}),
        ({"vocab_size": 7}, {"vocab_size": 9}),
        ({"text_config": {}}, {"text_config": {"vocab_size": 9}}),
        ({"vocab_size": 7, "text_config": {"vocab_size": 7}}, {"vocab_size": 9, "text_config": {"vocab_size": 9}}),
    ],
)
def test_the_vocabulary_lands_where_it_lives(config, expected):
    merged = merged_config(config, dtype=BF16, sizes={"vocab_size": 9}, tied=None)
    del merged["torch_dtype"]
    assert merged == expected


def test_ids_are_those_of_the_tokenizer():
    config = {"model_type": "x", "eos_token_id": 1, "pad_token_id": 0, "hidden_size": 8, "tokenizer_class": "A",
              "text_config": {"eos_token_id": 1, "head_dim": 4}, "vision_config": {"image_token_id": 7}}  # fmt: skip
    source = {"model_type": "x", "eos_token_id": [1, 44], "hidden_size": 9, "image_token_index": 5,
              "text_config": {"eos_token_id": 44, "bos_token_id": 3, "head_dim": 5}}  # fmt: skip
    assert with_ids(config, source) == {
        "model_type": "x", "eos_token_id": [1, 44], "hidden_size": 8, "image_token_index": 5,
        "text_config": {"eos_token_id": 44, "bos_token_id": 3, "head_dim": 4}, "vision_config": {"image_token_id": 7},
    }  # fmt: skip
    bare = {"model_type": "x_text", "eos_token_id": 44, "bos_token_id": 3}
    told = with_ids(config, bare)
    assert (told["eos_token_id"], told["text_config"]["eos_token_id"], told["bos_token_id"]) == (44, 44, 3)
    assert with_ids(bare, config)["eos_token_id"] == 1
    assert told["pad_token_id"] == 0, "another kind of config says nothing by silence"
    assert with_ids(config, None) == config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "llava", "gemma3", "of_ones_own"])
def test_ties_are_written_and_read(tied, kind):
    written = merged_config({"model_type": kind, "text_config": {}}, dtype=BF16, sizes={}, tied=tied)
    facts = facts_of(written)
    assert written["tie_word_embeddings"] is written["text_config"]["tie_word_embeddings"] is tied
    assert (facts.is_tied if facts.is_known else facts.says_tied) is tied


def test_a_class_that_never_asks_is_told_nothing():
    """T5 takes the key for another one: whether its decoder's output is scaled."""
    for tied in (True, False):
        assert "tie_word_embeddings" not in merged_config({"model_type": "t5"}, dtype=BF16, sizes={}, tied=tied)


@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F8_E4M3"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_the_config_says(tmp_path, name, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=16, tie_word_embeddings=not tied)
    weights = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, vocab_size=18, tie_word_embeddings=False)
    ).state_dict()
    if tied:
        del weights["lm_head.weight"]
    dtype = getattr(torch, DTYPES[name].torch_name)
    save_file(
        {key: value.to(dtype) for key, value in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    merged = merged_config(config.to_dict(), dtype=DTYPES[name], sizes={"vocab_size": 18}, tied=tied)
    put(tmp_path, "config.json", merged)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == (torch.bfloat16 if name == "F8_E4M3" else dtype)
    embedding, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert embedding.shape == (18, 8) and (embedding.data_ptr() == head.data_ptr()) is tied
    expected = weights["model.embed_tokens.weight" if tied else "lm_head.weight"].to(dtype).to(loaded.dtype)
    assert torch.equal(head, expected)


# --- tokenizer files and chat templates


def test_companions_are_found_and_nothing_else(tmp_path):
    wanted = ["tokenizer.json", "tokenizer_config.json", "merges.txt", "qwen.tiktoken", "chat_template.jinja"]
    wanted += ["additional_chat_templates/tool_use.jinja"]
    for name in [
        *wanted,
        "generation_config.json",
        "README.md",
        "training_args.bin",
        "modeling_own.py",
        "logs/x",
    ]:
        put(tmp_path, name, "{}")
    put(tmp_path, "config.json", {"model_type": "llama"})
    put(tmp_path, "model.safetensors", "")

    assert sorted(tokenizer_files(companions_in(tmp_path))) == sorted(wanted)
    assert list(model_files(companions_in(tmp_path))) == ["generation_config.json"]
    found = companion_files(companions_in(tmp_path))
    assert found == {name: tmp_path / name for name in (*wanted, "generation_config.json")}
    put(tmp_path, "config.json", {"auto_map": {"AutoModel": "modeling_own.Own"}})
    found = companion_files(companions_in(tmp_path))
    assert sorted(found) == sorted([*wanted, "generation_config.json", "modeling_own.py"])
    assert companion_files(companions_in(tmp_path / "nowhere")) == {}
    said = {name: path.read_bytes() for name, path in companions_in(tmp_path).items()}
    assert companion_files(said) == {name: said[name] for name in found}, "files that lie nowhere are found alike"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("chat_template.jinja", "T", "T"),
        ("chat_template.json", {"chat_template": "T"}, "T"),
        ("tokenizer_config.json", {"chat_template": "T"}, "T"),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "x", "template": "X"}, {"name": "default", "template": "T"}]},
            "T",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "x", "template": "X"}, "junk", {"name": "default"}]},
            None,
        ),
        ("tokenizer_config.json", {"chat_template": {"default": "T"}}, "T"),
        ("tokenizer_config.json", {"chat_template": 3}, None),
        ("tokenizer_config.json", {}, None),
        ("tokenizer_config.json", "{torn", None),
        ("tokenizer_config.json", "[]", None),
        ("tokenizer_config.json", "[" * 100000, None),
    ],
)
def test_chat_template_forms(tmp_path, name, value, expected):
    beside = companions_in(put(tmp_path, name, value))
    assert chat_template(beside) == expected
    assert chat_template({name: path.read_bytes() for name, path in beside.items()}) == expected


def test_chat_template_order(tmp_path):
    put(tmp_path, "chat_template.json", {"chat_template": "json"})
    put(tmp_path, "tokenizer_config.json", {"chat_template": "config"})
    assert chat_template(companions_in(tmp_path)) == "config"
    put(tmp_path, "chat_template.jinja", "jinja")
    assert chat_template(companions_in(tmp_path)) == "jinja"


def test_a_written_template_is_loaded_by_transformers(tmp_path, tokenizer_directory):
    transformers = pytest.importorskip("transformers")
    assert (
        write_companions(
            tmp_path,
            config={"model_type": "llama"},
            files=companion_files(companions_in(tokenizer_directory)),
            chat_template=TEMPLATE,
            recipe_text="",
            card=lambda: "",
        )
        == []
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<user>hello\n"
    assert tokenizer("hello world")["input_ids"] == [3, 4]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    (tmp_path / "chat_template.jinja").unlink()  # what transformers 4.48 sees
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template == TEMPLATE


def test_a_template_without_a_tokenizer_config(tmp_path):
    assert write_beside(tmp_path, config={}, files={}, chat_template="T") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat_template.jinja", "config.json"]


# --- the card


def test_the_card_has_the_metadata_of_the_hub():
    card = model_card(
        base_model="org/base@main",
        models=["/home/secret/me/wizard", "org/base", "org/math", "/home/secret/me/wizard"],
        recipe_text="base_model: org/base@main\nmodels:\n- /home/secret/me/wizard\n- org/math\n",
        license="apache-2.0",
        title="wizard\n+ math",
        summary=["90 % of each delta dropped"],
    )
    assert front_matter(card) == {
        "base_model": ["org/base", "wizard", "org/math"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "darekit"],
        "license": "apache-2.0",
    }
    assert "secret" not in card
    assert "# wizard + math\n" in card and "- 90 % of each delta dropped\n" in card
    assert "```yaml\nbase_model: org/base@main\nmodels:\n- wizard\n- org/math\n```" in card
    assert "dare merge darekit_recipe.yaml OUT" in card and "darekit.lock.json" in card and "2311.03099" in card


@pytest.mark.parametrize(
    "name", ["a: b", "- x", "'q'", '"q"', "#c", "true", "1.0", "null", "{a}", "é", "a\nb: c", "---"]
)
def test_odd_names_survive_the_front_matter(name):
    card = model_card(base_model=None, models=["/x/" + name], recipe_text="x", title=name, license=name)
    metadata = front_matter(card)
    assert metadata["base_model"] == [name] and metadata["license"] == name and "tags" in metadata


def test_a_recipe_cannot_leave_its_block():
    card = model_card(base_model=None, models=["a"], recipe_text="x: 1\n```\n# not a heading", title="t")
    assert "````yaml\nx: 1\n```\n# not a heading\n````" in card


def test_public_names(tmp_path, monkeypatch):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("mine/model") == "model", "a directory, although it looks like a Hub id"
    assert public_name("theirs/model") == "theirs/model"
    assert public_name("a/b/c") == "c" and public_name("../x/") == "x" and public_name("~/m") == "m"
    assert public_name(r"C:\Users\me\m") == "m" and public_name("gpt2") == "gpt2" and public_name(".") == "model"


def test_front_matter_reads_what_it_can():
    assert front_matter("---\r\nlicense: mit\r\n---\r\n# x") == {"license": "mit"}
    for text in ("", "# x", "---\n: : [\n---\n", "---\n- a\n---\n", "---\nlicense: mit\n", "---\n!!python/x 1\n---\n"):
        assert front_matter(text) == {}


def test_the_license_needs_agreement(tmp_path):
    mit = put(tmp_path / "a", "README.md", "---\nlicense: mit\n---\n")
    mit2 = put(tmp_path / "b", "README.md", "---\nlicense: mit\n---\n")
    llama = put(tmp_path / "c", "README.md", "---\nlicense: llama2\n---\n")
    other = put(tmp_path / "d", "README.md", "---\nlicense: other\nlicense_name: mine\n---\n")
    mit, mit2, llama, other = (companions_in(directory) for directory in (mit, mit2, llama, other))
    none = companions_in(tmp_path / "e")
    assert agreed_license([mit, {"README.md": b"---\nlicense: mit\n---\n"}]) == "mit"
    assert agreed_license([mit, mit2]) == "mit" and agreed_license([mit, llama]) is None
    assert agreed_license([mit, none]) is None and agreed_license([other, other]) is None and agreed_license([]) is None


# --- all together


def test_companions_are_written(tmp_path):
    blob = put(tmp_path / "blobs", "0123", '{"a": 1}') / "0123"
    blob.chmod(0o400)
    source = put(tmp_path / "snapshot", "merges.txt", "x")
    (source / "tokenizer.json").symlink_to(blob)
    put(source, "additional_chat_templates/tool_use.jinja", "tool")
    out = tmp_path / "out"
    out.mkdir()
    warnings = write_companions(
        out,
        config={"z": 1, "a": "é"},
        files={**companion_files(companions_in(source)), "vocab.txt": b"bytes"},
        recipe_text="recipe: 1\n",
        card=lambda: "# card",
    )
    assert warnings == []
    assert (out / "config.json").read_text(encoding="utf-8") == '{\n  "z": 1,\n  "a": "é"\n}\n'
    assert (out / "tokenizer.json").read_text() == '{"a": 1}' and not (out / "tokenizer.json").is_symlink()
    assert (out / "tokenizer.json").stat().st_mode & 0o600 == 0o600
    assert (out / "merges.txt").read_text() == "x" and (out / "vocab.txt").read_bytes() == b"bytes"
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "tool"
    assert (out / "darekit_recipe.yaml").read_text() == "recipe: 1\n" and (out / "README.md").read_text() == "# card"


def test_a_failing_courtesy_is_a_warning(tmp_path):
    def card():
        raise ZeroDivisionError("in the card")

    put(tmp_path, "tokenizer_config.json", "{torn")
    warnings = write_companions(
        tmp_path,
        config={},
        files={"tokenizer.json": tmp_path / "nowhere" / "tokenizer.json", "config.json/x": b"x"},
        chat_template="T",
        recipe_text="\ud800",  # cannot be encoded
        card=card,
    )
    assert [warning.split(":")[0] for warning in warnings] == [
        f"could not copy {tmp_path / 'nowhere' / 'tokenizer.json'}",
        "could not write config.json/x",
        "could not write the chat template",
        "could not write darekit_recipe.yaml",
        "could not write the model card",
    ]
    assert (tmp_path / "config.json").exists()


def test_a_failing_config_is_an_error(tmp_path):
    for directory, config in ((tmp_path / "nowhere", {}), (tmp_path, {"a": {1, 2}})):
        with pytest.raises(OutputError, match=r"config\.json"):
            write_companions(directory, config=config, files={}, recipe_text="", card=lambda: "")
    assert (
        "transformers cannot load"
        in write_companions(tmp_path, config=None, files={}, recipe_text="", card=lambda: "")[0]
    )


def test_reading_a_config_imports_nothing_heavy():
    code = "import sys, darekit.planning.travel.merged; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    ).stdout.split()
    assert not {"torch", "transformers", "pydantic", "numba", "yaml", "huggingface_hub", "numpy"} & set(modules)


def test_the_recipe_in_the_card_is_still_yaml():
    recipe = "models:\n- {model: /a/b c/d, parameters: {weight: 1.0}}\n- {model: /a/b, parameters: {weight: 0.5}}\n"
    card = model_card(base_model="/a/b", models=["/a/b c/d"], recipe_text=recipe, title="t")
    block = card.split("```yaml\n")[1].split("\n```")[0]
    assert [entry["model"] for entry in yaml.safe_load(block)["models"]] == ["d", "b"]
    assert Path("/a").as_posix() + "/" not in card
