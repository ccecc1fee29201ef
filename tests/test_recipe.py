# SPDX-License-Identifier: Apache-2.0
"""Reading recipes: the native form, and every way in which a text is not one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darekit.errors import RecipeError
from darekit.methods import MERGE_METHODS, SPARSIFIERS, Choice, Number, Parameter, Switch
from darekit.recipe import Filtered, Filters, Gradient, ModelEntry, Place, Recipe, Sparsify, Value, read_recipe, resolve
from darekit.recipe.data import TokenRow, Tokens

NATIVE = """\
    base_model: llama-2-13b
    models:
      - {model: wizardlm-13b,   parameters: {weight: 1.0}}
      - {model: wizardmath-13b, parameters: {weight: 1.0, drop_rate: 0.8, seed: 7}}
    sparsify: {method: dare, drop_rate: 0.9, seed: 42, keep_dense: [embeddings, norms]}
    merge_method: ties
    parameters: {lambda: 1.0, keep: 0.2}
    dtype: bfloat16
    """


@pytest.fixture
def read(tmp_path: Path):
    def read(text: str, **options) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(dedent(text), encoding="utf-8")
        return read_recipe(path, **options)

    return read


@pytest.fixture
def refuse(read):
    """Text and fragments -> the message of the error, which has all of them."""

    def refuse(text: str, *fragments: str, **options) -> str:
        with pytest.raises(RecipeError) as caught:
            read(text, **options)
        message = str(caught.value)
        for fragment in fragments:
            assert fragment in message
        return message

    return refuse


# --- the native form ---


def test_native_form(read):
    recipe = read(NATIVE)
    assert recipe == Recipe(
        base_model="llama-2-13b",
        models=(
            ModelEntry("wizardlm-13b", {"weight": 1.0}),
            ModelEntry("wizardmath-13b", {"weight": 1.0, "drop_rate": 0.8, "seed": 7}),
        ),
        sparsify=Sparsify("dare", {"drop_rate": 0.9}, "delta", 42, ("embeddings", "norms")),
        merge_method="ties",
        parameters={"lambda": 1.0, "keep": 0.2},
        dtype="BF16",
        vocab="strict",
        tokenizer_source=None,
    )
    assert recipe.text == dedent(NATIVE)
    assert recipe.notes == ()


def test_data_in_memory_equals_the_file(read):
    recipe = read(NATIVE)
    assert read_recipe(recipe.to_data()) == recipe
    assert read_recipe(json.loads(json.dumps(recipe.to_data()))) == recipe


def test_data_in_memory_may_hold_none_paths_and_tuples():
    recipe = read_recipe(
        {"base_model": None, "models": (Path("a"), "b"), "merge_method": "average", "sparsify": None, "dtype": None}
    )
    assert [entry.model for entry in recipe.models] == ["a", "b"]
    assert recipe.merge_method == "linear"
    assert "merge_method: average" in recipe.text


def test_data_in_memory_has_no_lines():
    with pytest.raises(RecipeError, match=r"^recipe: parameters.lambda must be a number"):
        read_recipe({"base_model": "b", "models": ["a"], "merge_method": "ties", "parameters": {"lambda": "x"}})
    with pytest.raises(RecipeError, match="found a set"):
        read_recipe({"models": {"a"}, "merge_method": "linear"})


def test_key_on_is_a_word(read):
    """YAML 1.1 reads the bare key `on` as true, and so does whoever hands us yaml.safe_load's data."""
    recipe = read("models: [a, b]\nmerge_method: linear\nsparsify:\n  method: dare\n  drop_rate: 0.5\n  on: weights\n")
    assert recipe.sparsify is not None and recipe.sparsify.on == "weights"
    data = {"models": ["a"], "merge_method": "linear", "sparsify": {"method": "dare", "drop_rate": 0, True: "weights"}}
    again = read_recipe(data).sparsify
    assert again is not None and again.on == "weights"


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "+1e-5", "1.e-5", "1.0e-5", ".1e-4"])
def test_exponents_are_numbers(read, text):
    recipe = read(f"models: [{{model: a, parameters: {{weight: {text}}}}}]\nmerge_method: linear")
    assert recipe.models[0].parameters == {"weight": 1e-5}


def test_values_per_tensor(read):
    recipe = read("""\
        base_model: b
        models:
          - model: a
            parameters:
              weight: {filter: mlp, value: 2}
              drop_rate:
                - {filter: "model.layers.[01].*", value: 9e-1}
                - value: 0.5
        sparsify: {method: della, drop_rate: 0.9, window: [{filter: q_proj, value: 0.1}]}
        merge_method: ties
        parameters:
          lambda: [{filter: "*", value: 0.7}]
          keep: [{filter: norm, value: 1}]
        """)
    own, sparsify = recipe.models[0].parameters, recipe.sparsify
    assert own["weight"] == Filters((Filtered("mlp", 2.0),))
    assert own["drop_rate"] == Filters((Filtered("model.layers.[01].*", 0.9), Filtered("*", 0.5)))
    assert sparsify is not None and sparsify.parameters["window"] == Filters((Filtered("q_proj", 0.1),))
    assert recipe.parameters == {"lambda": Filters((Filtered("*", 0.7),)), "keep": Filters((Filtered("norm", 1.0),))}
    assert read_recipe(recipe.to_data()) == recipe


def test_gradients(read):
    """Wherever a number may stand: for all models, for one, under a filter; also numbers that YAML reads as text."""
    recipe = read("""\
        base_model: b
        models:
          - model: a
            parameters: {weight: [0, 1e-3, 1], keep: [0.5]}
        sparsify:
          method: della
          drop_rate: [{filter: mlp, value: [0.5, 0.9]}, {filter: norm, value: 0.1}, {value: [0.2, 0.4]}]
          window: [0.1, 0.2]
        merge_method: ties
        parameters: {lambda: [1, 0.5], keep: {filter: mlp, value: [1, 0.2]}}
        """)
    own, sparsify = recipe.models[0].parameters, recipe.sparsify
    assert own == {"weight": Gradient((0.0, 0.001, 1.0)), "keep": Gradient((0.5,))}
    assert sparsify is not None and sparsify.parameters == {
        "drop_rate": Filters(
            (Filtered("mlp", Gradient((0.5, 0.9))), Filtered("norm", 0.1), Filtered("*", Gradient((0.2, 0.4))))
        ),
        "window": Gradient((0.1, 0.2)),
    }
    assert recipe.parameters == {
        "lambda": Gradient((1.0, 0.5)),
        "keep": Filters((Filtered("mlp", Gradient((1.0, 0.2))),)),
    }
    assert recipe.to_data()["sparsify"]["drop_rate"][0] == {"filter": "mlp", "value": [0.5, 0.9]}
    assert recipe.to_data()["parameters"]["lambda"] == [1.0, 0.5]
    assert read_recipe(recipe.to_data()) == recipe
    assert read(NATIVE, settings={"parameters.lambda": "[0, 1]"}).parameters["lambda"] == Gradient((0.0, 1.0))


def test_resolve():
    place = Place("model.layers.0.mlp.up_proj.weight", (4, 4), 0.25)

    def filters(*pairs):
        return Filters(tuple(Filtered(*pair) for pair in pairs))

    assert resolve([], place) is None
    assert resolve([None, 0.5], place) == 0.5
    assert resolve(["paper", "none"], place) == "paper"
    assert resolve([filters(("attn", 1.0)), None, 0.5], place) == 0.5
    assert resolve([filters(("mlp", 1.0), ("*", 2.0)), 0.5], place) == 1.0
    assert resolve([filters(("up*", 1.0), ("*up*", 2.0))], place) == 2.0
    assert resolve([filters(("layers.?.mlp", 1.0))], place) is None
    assert resolve([filters(("attn", 1.0))], place) is None
    assert resolve([filters(("mlp", False)), True], place) is False
    assert resolve([0, 1], place) == 0
    assert resolve([Gradient((0.0, 2.0)), 1.0], place) == 0.5
    assert resolve([filters(("attn", 1.0)), Gradient((0.0, 2.0))], place) == 0.5
    assert resolve([filters(("mlp", Gradient((0.0, 4.0))), ("*", 2.0))], place) == 1.0
    assert resolve([Gradient((0.0, 0.0)), 1.0], place) == 0.0  # a zero is a value


def test_dtypes(read):
    start = "models: [a]\nmerge_method: linear\n"
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
    names |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    for name, code in names.items():
        assert read(f"{start}dtype: {name}").dtype == code
        assert read(f"{start}dtype: torch.{name}").dtype == code
    assert read(f"{start}dtype: float32\nout_dtype: bfloat16").dtype == "BF16"
    assert read(start).dtype is None


def test_bad_dtypes(refuse):
    start = "models: [a]\nmerge_method: linear\n"
    refuse(f"{start}dtype: int64", "line 3: dtype must be a floating-point format, found 'int64'")
    refuse(f"{start}dtype: bf16", "did you mean 'bfloat16'?")
    refuse(f"{start}dtype: fp16", "did you mean 'float16'?")
    refuse(f"{start}dtype: bfloat61", "did you mean 'bfloat16'?")
    refuse(f"{start}out_dtype: 16", "line 3: out_dtype must be one of float64")
    refuse(f"{start}sparsify: {{method: dare, drop_rate: 0.5, on: weights}}\ndtype:", "dtype must be one of")
    refuse(f"{start}dtype: int8\nout_dtype: bfloat16", "line 3: dtype must be")


def test_vocab_and_tokenizer_source(read, refuse):
    start = "models: [a, c]\nmerge_method: linear\nbase_model: b\n"
    assert read(f"{start}vocab: pad\ntokenizer_source: a").tokenizer_source == "a"
    assert read(f"{start}vocab: pad").vocab == "pad"
    assert read(f"{start}tokenizer_source: b/").tokenizer_source == "base"
    refuse(f"{start}vocab: union", "line 4: vocab must be one of strict, base, pad, found 'union'")
    refuse(f"{start}tokenizer_source: unoin", "line 4: tokenizer_source must be base, union or a model", "base, union")


def test_tokens(read, refuse):
    start = "models: [a, c]\nmerge_method: linear\nbase_model: b\n"
    assert read(start).tokens is None and read(f"{start}tokenizer_source:\ntokenizer:\n").tokens is None
    assert read(f"{start}tokenizer: {{}}").tokens == Tokens("union")
    assert read(f"{start}tokenizer_source: union").tokens == Tokens("union")
    assert read(f"{start}tokenizer_source: a/").tokens == Tokens("a")
    assert read(f"{start}tokenizer_source: model:a").tokens == Tokens("a")
    assert read(f"{start}tokenizer_source: model:union").tokens == Tokens("model:union")
    assert read(f"{start}tokenizer_source: b").tokens == Tokens("base")
    assert read(f"{start}tokenizer_source: else/where").tokens == Tokens("else/where")
    found = read(
        f"{start}tokenizer:\n  source: base\n  pad_to_multiple_of: 64\n  tokens:\n    <a>: {{source: c, force: true}}\n"
        "    <b>: {source: {kind: zero}}\n    <c>: {source: {kind: model_token, model: b/, token: x}}\n    <d>:\n"
        "    <e>: {source: {kind: model_token, model: y/z, token_id: 7}}\n"
    ).tokens
    assert found == Tokens(
        "base",
        {
            "<a>": TokenRow("model", "c", force=True), "<b>": TokenRow("zero"), "<c>": TokenRow("token", "base", "x"),
            "<d>": TokenRow(), "<e>": TokenRow("token", "y/z", None, 7),
        },
        64,
    )  # fmt: skip
    assert found.models == ("c", "base", "y/z")


def test_bad_tokens(refuse):
    start = "models: [a, c]\nmerge_method: linear\nbase_model: b\n"
    refuse(f"{start}tokenizer: union", "line 4: tokenizer: expected a mapping such as {source: union}, found 'union'")
    refuse(f"{start}tokenizer: {{sourc: a}}", "line 4: tokenizer.sourc is not known; did you mean 'source'?")
    refuse(f"{start}tokenizer_source: a\ntokenizer: {{}}", "line 5: tokenizer and tokenizer_source say the same")
    refuse(f"{start}tokenizer: {{}}\nvocab: pad", "line 4: tokenizer matches rows by token, and vocab by number")
    refuse(f"{start}tokenizer_source: union\nvocab: pad", "line 4: tokenizer_source matches rows by token")
    refuse(f"{start}tokenizer_source: [a]", "tokenizer_source must be base, union or a model, found ['a']")
    refuse(f"{start}tokenizer: {{pad_to_multiple_of: 0}}", "must be a whole number from 1 on, found 0")
    rows = f"{start}tokenizer: {{tokens: {{<a>: "
    refuse(f"{start}tokenizer: {{tokens: [a]}}", "tokenizer.tokens: expected tokens and their sources")
    refuse(f"{rows}3}}}}", "tokenizer.tokens.<a>: expected a mapping", "found 3")
    refuse(f"{rows}{{force: true}}}}}}", "tokenizer.tokens.<a> has force and no source")
    refuse(f"{rows}{{force: maybe, source: a}}}}}}", "must be true or false, found 'maybe'")
    refuse(f"{rows}{{source: {{kind: one}}}}}}}}", "must be one of zero, model_token, found 'one'")
    refuse(f"{rows}{{source: {{kind: zero, model: a}}}}}}}}", "source.model is not known")
    refuse(f"{rows}{{source: {{kind: model_token}}}}}}}}", "has no model")
    refuse(f"{rows}{{source: {{kind: model_token, model: a}}}}}}}}", "needs the row's token or its token_id")
    refuse(f"{rows}{{source: {{kind: model_token, model: a, token: x, token_id: 1}}}}}}}}", "and one of them only")
    refuse(f"{rows}{{source: {{kind: model_token, model: a, token_id: -1}}}}}}}}", "a whole number from 0 on")


def test_chat_template(read, refuse):
    start = "models: [a, c]\nmerge_method: linear\n"
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for written in ("auto", "chatml", text):
        assert read(f"{start}chat_template: {json.dumps(written)}").chat_template == written
    assert read(f"{start}chat_template:").chat_template is None
    refuse(f"{start}chat_template: chatlm", "line 3: chat_template must be auto, alpaca", "did you mean 'chatml'?")
    refuse(f"{start}chat_template: '{{{{ x }}}}'", "or the text of a Jinja template")
    refuse(f"{start}chat_template: 7", "found 7")


def test_keep_dense(read, refuse):
    text = (
        "base_model: b\nmodels: [a]\nmerge_method: linear\nsparsify: {{method: dare, drop_rate: 0.9, keep_dense: {}}}"
    )
    for written, kept in {"[]": (), "norms": ("norms",), "[heads, '*.q_proj.*', model.embed]": None}.items():
        sparsify = read(text.format(written)).sparsify
        assert sparsify.keep_dense == (("heads", "*.q_proj.*", "model.embed") if kept is None else kept)
    refuse(text.format("[embedings]"), "line 4: sparsify.keep_dense.0", "'embedings'", "did you mean 'embeddings'?")
    refuse(text.format("[norm]"), "did you mean 'norms'?")
    refuse(text.format("[1]"), "1 is neither a group")
    refuse(text.format("{a: 1}"), "expected a list of embeddings, norms, biases, heads or glob patterns")


# --- notes and text ---


def test_notes(read):
    start = "base_model: b\nmodels: [a, a, b]\n"
    notes = read(f"{start}merge_method: ties").notes
    assert any("b is the base and also one of the models" in note for note in notes)
    assert any("a is listed 2 times" in note for note in notes)
    assert any("ties without keep: no trim (the TIES paper keeps 0.2)" in note for note in notes)
    assert not any("no trim" in note for note in read(f"{start}merge_method: ties\nparameters: {{keep: 1}}").notes)
    assert any("seed has no effect" in note for note in read(f"{start}merge_method: linear", seed=3).notes)


def test_base_among_the_models(read, refuse):
    """A method of deltas leaves it out; for linear it is a model like the others."""
    models = "base_model: b\nmodels: [b/, {model: a, parameters: {weight: 2}}]\n"
    assert [e.model for e in read(f"{models}merge_method: task_arithmetic").models] == ["a"]
    assert [e.model for e in read(f"{models}merge_method: linear").models] == ["b/", "a"]
    refuse("base_model: b\nmodels: [b]\nmerge_method: ties", "line 2: models: only the base is listed")


def test_settings(read):
    settings = {"parameters.lambda": "0.5", "models.0.parameters.weight": 0.3, "sparsify.method": "magnitude"}
    recipe = read(NATIVE, settings=settings, seed=2**64 - 1)
    assert recipe.parameters["lambda"] == 0.5
    assert recipe.models[0].parameters["weight"] == 0.3
    assert recipe.sparsify is not None and recipe.sparsify.method == "magnitude"
    assert recipe.sparsify.seed == 2**64 - 1
    comment, _, rest = recipe.text.partition("\n")
    assert "parameters.lambda=0.5" in comment and comment.startswith("#") and "seed=18446744073709551615" in comment
    assert read(rest) == recipe


def test_settings_make_what_is_not_there(read):
    text = "models: [a, b]\nmerge_method: linear\nparameters:\n"
    recipe = read(text, settings={"parameters.normalize": "no", "models.1.parameters.weight": "1e-3", "vocab": "pad"})
    assert recipe.parameters == {"normalize": False}
    assert recipe.models[1].parameters == {"weight": 1e-3}
    assert recipe.vocab == "pad"
    data = {"models": ["a"], "merge_method": "linear"}
    assert read_recipe(data, settings={"models.0": "c"}).models[0].model == "c"
    assert data == {"models": ["a"], "merge_method": "linear"}


def test_bad_settings(refuse):
    refuse(NATIVE, "setting parameters.lamda", "did you mean 'lambda'?", settings={"parameters.lamda": 1})
    refuse(NATIVE, "setting parmeters.x: the recipe has no 'parmeters'", settings={"parmeters.x": 1})
    refuse(NATIVE, "models has the entries 0 to 1, found '2'", settings={"models.2.parameters.weight": 1})
    refuse(NATIVE, "models has the entries 0 to 1, found 'x'", settings={"models.x.parameters.weight": 1})
    refuse(NATIVE, "merge_method is the single value 'ties' and has no 'x'", settings={"merge_method.x": 1})
    refuse(
        NATIVE, "setting sparsify.drop_rate: sparsify.drop_rate must be in [0, 1]", settings={"sparsify.drop_rate": 2}
    )
    refuse(NATIVE, "is not valid YAML", settings={"parameters.lambda": "[1"})
    refuse(NATIVE, "setting seed", "whole number from 0 to 2^64 - 1", seed=-1)
    refuse("models: [a]\nmerge_method: linear", "has no 'sparsify'", settings={"sparsify.seed": 1})
    message = refuse(NATIVE, "setting", settings={"parameters": "{keep: 2}"})
    assert "line" not in message  # the file's line of keep is not what is wrong


# --- not YAML ---


def test_not_a_file(tmp_path):
    with pytest.raises(RecipeError, match=r"no such file; did you mean 'recipe\.yaml'"):
        (tmp_path / "recipe.yaml").write_text("a: 1")
        read_recipe(tmp_path / "recpie.yaml")
    with pytest.raises(RecipeError, match="is a directory"):
        read_recipe(tmp_path)
    with pytest.raises(RecipeError, match="no such file"):
        read_recipe(str(tmp_path / "nowhere" / "recipe.yaml"))
    with pytest.raises(RecipeError, match="text of several lines"):
        read_recipe("models: [a]\nmerge_method: linear\n")
    (tmp_path / "big").write_bytes(bytes(2 << 20))
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        read_recipe(tmp_path / "big")
    (tmp_path / "latin").write_bytes("a: 1\nb: \xe9".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin line 2: not UTF-8 \(byte 0xe9\)"):
        read_recipe(tmp_path / "latin")
    (tmp_path / "nul").write_bytes(b"a: \x00")
    with pytest.raises(RecipeError, match="nul: not YAML"):
        read_recipe(tmp_path / "nul")
    (tmp_path / "bom").write_bytes("\ufeffmodels: [a]\nmerge_method: linear".encode())
    assert read_recipe(tmp_path / "bom").models[0].model == "a"


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "recipe.yaml is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n- b\n", "line 1: expected a mapping"),
        ("just words", "found a single value"),
        (
            "a: 1\n\tb: 2\n",
            "line 2: not YAML: found character '\\t' that cannot start any token; YAML indents with spaces",
        ),
        ("a: [1\nb: 2\n", "line 2: not YAML"),
        ("models:\n- model: a\n  range: [0, 8\ndtype: x\n", "a bracket is not closed (it begins on line 3)"),
        ("models:\n  - model: a\n  parameters:\n    weight: 1\n", "below the m of model"),
        ("models:\n- model: a\n   weight: 1\n", "line 3: not YAML: mapping values are not allowed here; the keys"),
        (
            "# pasted\n    name: a\n    models: [b]\n    ---\n    models: [a]\n",
            "a line `---` between two documents begins in",
        ),
        ("models: [a]\n---\nmodels: [b]\n", "documents 1 and 2 of 2 have no name"),
        ("models: [a]\nmerge_method: ties\nmodels: [b]\n", "line 3: models is given twice (first on line 1)"),
        ("models:\n - model: a\n   model: b\n", "line 3: models.0.model is given twice (first on line 2)"),
        ("? [a, b]\n: 1\n", "line 1: expected a word as a key"),
        ("models: !!python/name:os.system x\n", "line 1: not YAML"),
        ("models: !!set {a, b}\n", "the tag"),
        ("models: [!!bool maybe]\n", "line 1: 'maybe' is not a valid bool"),
        ("models: [!!timestamp x]\n", "is not a valid timestamp"),
        ("models: [!!int '']\n", "is not a valid int"),
        ("models: [2024-99-99]\n", "is not a valid timestamp"),
        (f"models: [0x{'f' * 5000}]\n", "too large"),
        (f"models: [{'9' * 5000}]\n", "is not a valid int"),
        ("a: &a [*a]\n", "too large or too deep"),
        ("a: &a {<<: *a}\n", "recipe.yaml"),
        ("a: " + "[" * 3000, "deeper than 32 levels"),
        ("a: *missing\n", "line 1: not YAML: found undefined alias"),
    ],
)
def test_not_a_recipe(refuse, text, fragment):
    refuse(text, fragment)


def test_alias_bombs(refuse):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    refuse("\n".join(lines), "too large or too deep once its aliases are expanded")
    text = "x" * 500_000
    refuse(f"a: &a {text}\nb: [{', '.join(['*a'] * 50)}]", "too large")


def test_aliases_and_merge_keys(read):
    recipe = read("""\
        models:
          - model: a
            parameters: &common {weight: 0.25, seed: 1}
          - model: b
            parameters: {<<: *common, seed: 2}
          - {model: c, parameters: *common}
        merge_method: linear
        """)
    assert [dict(e.parameters) for e in recipe.models] == [
        {"weight": 0.25, "seed": 1},
        {"weight": 0.25, "seed": 2},
        {"weight": 0.25, "seed": 1},
    ]


# --- unknown names ---


def test_unknown_names_come_all_at_once(refuse):
    message = refuse(
        """\
        base_model: b
        models:
          - model: a
            wieght: 1
            parameters: {wieght: 1, lambda: 2}
        sparsify: {method: dare, drop_rate: 0.9, densty: 1, gamma: 1}
        merge_method: task_arithmetic
        parameters: {drop_rate: 0.9, lambda: [{fliter: a, value: 1}]}
        dtpye: bfloat16
        """,
        "recipe.yaml: 8 keys are not allowed where they are",
        "line 4: models.0.wieght is not known",
        "line 5: models.0.parameters.wieght is not known; did you mean 'weight'? Allowed here: weight, drop_rate",
        "line 5: models.0.parameters.lambda is one for all models: write it under the top-level `parameters:`",
        "line 6: sparsify.densty is not known",
        "line 6: sparsify.gamma is a parameter of breadcrumbs, not of dare or task_arithmetic",
        "line 8: parameters.drop_rate belongs to the sparsifier: write it under `sparsify:` or, for one model",
        "line 8: parameters.lambda.0.fliter is not known; did you mean 'filter'?",
        "line 9: dtpye is not known; did you mean 'dtype'?",
    )
    assert message.count("\n") == 8


def test_names_at_the_wrong_level(refuse):
    start = "base_model: b\nmodels: [a]\nmerge_method: ties\n"
    refuse(f"{start}keep: 1", "line 4: keep is not a top-level key; write it under `parameters:`")
    refuse(f"{start}drop_rate: 0.9", "write it under `sparsify:`")
    refuse(f"{start}seed: 1", "sparsify.seed", "--seed")
    refuse("models: [{model: a, weight: 1}]\nmerge_method: linear", "line 1: models.0.weight is one level too high")
    refuse("models: [a]\nmerge-method: linear", "line 2: merge-method is not known; did you mean 'merge_method'?")
    refuse("models: [a]", "no merge_method")
    refuse("merge_method: linear", "no models")
    refuse(f"{start}parameters: {{drop_rate: 0.9}}", "write `sparsify: {method: dare, drop_rate: 0.9}`")
    refuse(f"{start}parameters: {{keep_dense: [norms]}}", "belongs to a sparsifier")
    sparse = f"{start}sparsify: {{method: dare, drop_rate: 0.9"
    refuse(f"{sparse}, keep: 0.2}}", "line 4: sparsify.keep is one for all models")
    refuse(f"{sparse}}}\nparameters: {{seed: 1}}", "line 5: parameters.seed belongs to the sparsifier")
    refuse(f"{sparse}}}\nparameters: {{keep_dense: []}}", "belongs to the sparsifier")
    refuse(
        f"{sparse}, desnity: 1}}",
        "is not known",
        "llowed here: drop_rate, rescale, q, tau, method, on",
    )
    refuse(
        "models: [{model: a, parameters: {rescale: l1}}]\nmerge_method: ties\nbase_model: b\n"
        "sparsify: {method: dare, drop_rate: 0.1}",
        "belongs to the sparsifier: write it under `sparsify:`",
    )


def test_density_belongs_to_mergekit(refuse):
    start = "base_model: b\nmerge_method: ties\nsparsify: {method: dare, drop_rate: 0.9}\n"
    refuse(f"{start}models: [{{model: a, parameters: {{density: 0.1}}}}]", "line 4", "write drop_rate: 0.9")
    refuse(f"{start}models: [a]\nparameters: {{density: 1}}", "line 5", "write drop_rate: 0.0")
    refuse(
        "base_model: b\nmerge_method: ties\nmodels: [{model: a, parameters: {density: 0.1, drop_rate: 0.5}}]\n"
        "sparsify: {method: breadcrumbs}",
        "models.0.parameters.density and drop_rate are the same quantity",
    )


def test_methods(refuse):
    start = "base_model: b\nmodels: [a]\n"
    refuse(
        f"{start}merge_method: tise", "line 3: merge_method: unknown method 'tise'; did you mean 'ties'? Known: linear"
    )
    refuse(f"{start}merge_method: zzz", "unknown method 'zzz'; known: linear")
    refuse(f"{start}merge_method: [ties]", "unknown method ['ties']")
    refuse(f"{start}merge_method:", "unknown method None")
    refuse(f"{start}merge_method: dare", "dare is a sparsifier", "sparsify: {method: dare")
    sparse = f"{start}merge_method: ties\nsparsify: "
    refuse(f"{sparse}{{method: drae}}", "line 4: sparsify.method: unknown method 'drae'; did you mean 'dare'?")
    refuse(f"{sparse}{{method: dare_ties}}", "write method: dare here and merge_method: ties")
    refuse(f"{sparse}{{method: {{}}}}", "unknown method {}")
    refuse(f"{sparse}{{drop_rate: 0.9}}", "line 4: sparsify has no method")
    refuse(f"{sparse}dare", "expected a mapping such as {method: dare, drop_rate: 0.9}, found 'dare'")
    refuse(sparse, "expected a mapping such as {method: dare, drop_rate: 0.9}, found None")


# --- values ---


@pytest.mark.parametrize(
    ("value", "fragment"),
    [
        ("90", "must be in [0, 1], found 90; a percentage? write 0.9"),
        ("90%", "found the text '90%'; a percentage? write 0.9"),
        ("'0.9'", "found the text '0.9'; write it without quotes"),
        ("high", "must be a number, found the text 'high'"),
        ("-0.1", "must be in [0, 1], found -0.1"),
        ("true", "must be a number, found True"),
        (".nan", "must be in [0, 1], found nan"),
        ("", "has no value; give it one or remove the key"),
        ("[0.1, 9]", "sparsify.drop_rate.1 must be in [0, 1], found 9; a percentage? write 0.09"),
        ("[0.1, '0.9']", "sparsify.drop_rate.1 must be a number, found the text '0.9'; write it without quotes"),
        ("[0.1, true]", "sparsify.drop_rate.1 must be a number, found True"),
        ("[0.1, null]", "sparsify.drop_rate.1 is part of a gradient and must be a number, found None"),
        ("[[0.1, 0.9]]", "sparsify.drop_rate.0 is part of a gradient and must be a number, found [0.1, 0.9]"),
        ("[auto, 0.9]", "sparsify.drop_rate.0 is auto, which a gradient cannot contain"),
        ("[{filter: a, value: [0.1, -9]}]", "sparsify.drop_rate.0.value.1 must be in [0, 1], found -9"),
        ("[{filter: a, value: [{value: 1}]}]", "sparsify.drop_rate.0.value.0 is part of a gradient"),
        ("[{filter: a, value: []}]", "expected a number, a list of numbers (a gradient"),
        ("[0.1, {filter: a, value: 1}]", "sparsify.drop_rate.0: expected a number, a list of numbers (a gradient"),
        ("[0.1, {filter: a, value: 1}]", "found 0.1 among filters"),
        ("[]", "expected a number, a list of numbers (a gradient over the layers), or a list of {filter"),
        ("[a]", "sparsify.drop_rate.0 must be a number, found the text 'a'"),
        ("{filter: a}", "expected a number, a list of numbers (a gradient"),
        ("[{filter: a}]", "without a value"),
        ("[{filter: '', value: 1}]", "expected part of a tensor's name, a glob or '*', found ''"),
        ("[{filter: 1, value: 1}]", "expected part of a tensor's name, a glob or '*', found 1"),
        ("[{filter: a, value: 20}]", "sparsify.drop_rate.0 must be in [0, 1], found 20; a percentage? write 0.2"),
        ("[{value: 0.2}, {filter: a, value: 0.5}]", "sparsify.drop_rate.1 is never reached"),
        ("[{filter: a, value: '0.5'}]", "write it without quotes"),
    ],
)
def test_bad_numbers(refuse, value, fragment):
    text = f"base_model: b\nmodels: [a]\nmerge_method: linear\nsparsify:\n  method: dare\n  drop_rate: {value}\n"
    refuse(text, "recipe.yaml line 6: sparsify.drop_rate", fragment)


def test_infinite_numbers(refuse):
    for value in (".inf", "1e999", "-1e999"):
        refuse(f"models: [a]\nmerge_method: linear\nparameters: {{weight: {value}}}", "must be a finite number")


def test_a_method_of_one_slice_is_told_where_it_belongs(refuse):
    text = "slices:\n- sources: [{model: a, layer_range: [0, 2]}]\n  merge_method: passthrough\n"
    refuse(text, "no merge_method", "move that of slices.0 to the top level")


@pytest.mark.parametrize("seed", ["-1", "1.0", "1e3", "true", "18446744073709551616", "x", "[1]"])
def test_bad_seeds(refuse, seed):
    sparse = f"base_model: b\nmerge_method: ties\nsparsify: {{method: dare, drop_rate: 0.9, seed: {seed}}}\nmodels: [a]"
    refuse(sparse, "line 3: sparsify.seed must be a whole number from 0 to 2^64 - 1")
    model = f"merge_method: linear\nmodels:\n- model: a\n  parameters: {{seed: {seed}}}"
    refuse(model, "line 4: models.0.parameters.seed must be a whole number from 0 to 2^64 - 1")


def test_choices_and_switches(read, refuse):
    start = "base_model: b\nmodels: [a]\nmerge_method: ties\n"
    assert read(f"{start}parameters: {{normalize: 1.0, trim: model}}").parameters == {
        "normalize": True,
        "trim": "model",
    }
    refuse(f"{start}parameters: {{normalize: 'maybe'}}", "parameters.normalize must be true or false")
    refuse(f"{start}parameters: {{normalize: [true, 2]}}", "parameters.normalize.1 must be true or false, found 2")
    refuse(f"{start}parameters: {{normalize: []}}", "expected true or false, a list of these over the layers, or a")
    refuse(f"{start}parameters: {{trim: [model]}}", "parameters.trim must be one value for all tensors")
    refuse(f"{start}parameters: {{trim: all}}", "parameters.trim must be one of tensor, model, found 'all'")
    refuse(f"{start}parameters: [1]", "line 4: parameters: expected a mapping")
    sparse = f"{start}sparsify: {{method: dare, drop_rate: 0.9, "
    refuse(f"{sparse}rescale: true}}", "sparsify.rescale must be one of paper, l1, none")
    refuse(f"{sparse}on: deltas}}", "sparsify.on must be one of delta, weights, found 'deltas'; did you mean 'delta'?")


def test_bad_models(refuse):
    end = "\nmerge_method: linear"
    refuse(f"models: []{end}", "line 1: models: expected a list of at least one `- model: name`")
    refuse(f"models: a{end}", "expected a list of at least one")
    refuse(f"models: {{model: a}}{end}", "expected a list of at least one")
    refuse(f"models:\n- 5{end}", "line 2: models.0: expected `model: name`")
    refuse(f"models:\n- parameters: {{weight: 1}}{end}", "line 2: models.0 has no model")
    refuse(f"models:\n- model: 5{end}", "models.0.model: expected a directory or a Hub id, found 5", "in quotes")
    refuse(f"models:\n- model:{end}", "models.0.model has no value")
    refuse(f"models:\n- model: {{modle: {{path: a}}}}{end}", "found the mapping")
    refuse(f"models:\n- model: {{model: {{path: a, revison: b}}}}{end}", "did you mean 'revision'?")
    refuse(f"models:\n- model: {{model: {{revision: b}}}}{end}", "expected {path: org/name, revision: ...}")
    refuse(f"models:\n- model: a\n  parameters: 3{end}", "line 3: models.0.parameters: expected a mapping")


# --- what belongs together ---


def test_base_model_is_needed_by_deltas(read, refuse):
    assert read("models: [a]\nmerge_method: linear").base_model is None
    refuse("models: [a]\nmerge_method: task_arithmetic", "no base_model; task_arithmetic works on differences from it")
    sparse = "models: [a]\nmerge_method: linear\nsparsify: {method: dare, drop_rate: 0.5, on: "
    refuse(f"{sparse}delta}}", "no base_model; sparsify with dare")
    assert read(f"{sparse}weights}}").base_model is None
    refuse("base_model:\nmodels: [a]\nmerge_method: ties", "line 1: base_model has no value")


def test_on_weights_goes_with_linear(refuse):
    refuse(
        "base_model: b\nmodels: [a]\nmerge_method: ties\nsparsify:\n  method: dare\n  drop_rate: 0.5\n  on: weights",
        "line 7: sparsify.on: weights works only with merge_method: linear",
    )


def test_every_model_has_a_drop_rate(read, refuse):
    text = (
        "base_model: b\nmerge_method: ties\nsparsify: {{method: {}}}\n"
        "models:\n- {{model: a, parameters: {{drop_rate: 0.5}}}}\n"
    )
    for method in SPARSIFIERS:
        assert read(text.format(method)).sparsify.parameters == {}
        refuse(text.format(method) + "- c", "line 6: models.1: c has no drop_rate; write it under `sparsify:`")


# --- laws ---


def numbers(parameter: Parameter) -> st.SearchStrategy[float]:
    kind = parameter.kind
    assert isinstance(kind, Number)
    if kind.whole:
        return st.integers(int(max(kind.low, -(2**53))), int(min(kind.high, 2**53))).map(float)
    return st.floats(max(kind.low, -1e300), min(kind.high, 1e300), allow_nan=False)


def values(parameter: Parameter) -> st.SearchStrategy[Value]:
    match parameter.kind:
        case Choice(of=of):
            return st.sampled_from(of)
        case Switch():
            return st.booleans()
    names = st.text("abc.*?[]=", min_size=1).filter(lambda text: text not in ("*", "="))
    gradients = st.lists(numbers(parameter), min_size=1, max_size=4).map(lambda anchors: Gradient(tuple(anchors)))
    entry = st.builds(Filtered, names, numbers(parameter) | gradients)
    filters = st.lists(entry, min_size=1, max_size=3).map(lambda entries: Filters(tuple(entries)))
    return numbers(parameter) | gradients | filters


def some(parameters: dict[str, Parameter]) -> st.SearchStrategy[dict[str, Value]]:
    return st.fixed_dictionaries({}, optional={name: values(p) for name, p in parameters.items()})


def all_tokens(names):
    """What a recipe may say of tokens."""
    giver = st.sampled_from(["base", *names])
    rows = st.one_of(
        st.builds(TokenRow),
        st.builds(TokenRow, st.just("model"), giver, force=st.booleans()),
        st.builds(TokenRow, st.just("zero"), force=st.booleans()),
        st.builds(TokenRow, st.just("token"), giver, st.text("ab<>"), force=st.booleans()),
        st.builds(TokenRow, st.just("token"), giver, st.none(), st.integers(0, 99), force=st.booleans()),
    )
    sources = st.sampled_from(["base", "union", "model:union", *names])
    return st.builds(
        Tokens, sources, st.dictionaries(st.text("<a>|b", min_size=1), rows), st.none() | st.integers(1, 64)
    )


@st.composite
def recipes(draw) -> Recipe:
    method = draw(st.sampled_from(list(MERGE_METHODS)))
    sparsifier = draw(st.sampled_from([None, *SPARSIFIERS]))
    own = dict(MERGE_METHODS[method].parameters)
    sparsify = None
    if sparsifier is not None:
        parameters = SPARSIFIERS[sparsifier].parameters
        own |= parameters
        sparsify = Sparsify(
            sparsifier,
            draw(some(parameters)) | {"drop_rate": draw(values(parameters["drop_rate"]))},
            draw(st.sampled_from(["delta", "weights"] if method == "linear" else ["delta"])),
            draw(st.integers(0, 2**64 - 1)),
            tuple(draw(st.lists(st.sampled_from(["norms", "heads", "*.q", "a.b"]), max_size=3))),
        )
        if sparsify.parameters.get("rescale") in ("l1", "none"):  # two ways to rescale are refused
            sparsify = replace(sparsify, parameters={n: v for n, v in sparsify.parameters.items() if n != "q"})
            own.pop("q", None)
    shared = dict(MERGE_METHODS[method].parameters)
    if method == "linear" and sparsify is not None and sparsify.on == "delta":
        del shared["normalize"]  # false would make it a sum of whole models, which is refused
    own = {name: p for name, p in own.items() if isinstance(p.kind, Number) and p.kind.per_model}
    weight = Parameter("weight", Number("", 0 if MERGE_METHODS[method].statistics else float("-inf")), 1.0)
    weights = {MERGE_METHODS[method].weight_word: weight} if MERGE_METHODS[method].weighted else {}
    required = {name: draw(values(p)) for name, p in shared.items() if p.default is None}
    low, high = MERGE_METHODS[method].models
    names = draw(st.lists(st.text("abz/09.@-é 'x:#", min_size=1), min_size=low, max_size=int(min(high, max(3, low)))))
    entries = []
    for name in names:
        seed = {"seed": draw(st.integers(0, 2**64 - 1))} if draw(st.booleans()) else {}
        stats = draw(st.text("ab/.", min_size=1)) if MERGE_METHODS[method].statistics else None
        entries.append(ModelEntry(name, draw(some(own | weights)) | seed, stats))
    tokens = draw(st.none() | all_tokens(names))
    source = draw(st.sampled_from([None, "base", *names])) if tokens is None else tokens.source.removeprefix("model:")
    return Recipe(
        base_model="the base",
        models=tuple(entries),
        sparsify=sparsify,
        merge_method=method,
        parameters=draw(some(shared | weights)) | required,
        dtype=draw(st.sampled_from([None, "BF16", "F32", "F8_E4M3"])),
        vocab=draw(st.sampled_from(["strict", "base", "pad"])) if tokens is None else "strict",
        tokenizer_source=source,
        heads=draw(st.sampled_from([None, "base", *names])),
        tokens=tokens,
        chat_template=draw(st.sampled_from([None, "auto", "chatml", "{{ messages[0].content }}"])),
    )


@given(recipes())
def test_round_trip(recipe):
    """Through data, JSON and YAML: what the lock stores is the recipe."""
    data = recipe.to_data()
    assert read_recipe(data) == recipe
    assert read_recipe(json.loads(json.dumps(data))) == recipe


@settings(max_examples=40)
@given(recipes())
def test_round_trip_through_a_file(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("recipes") / "recipe.yaml"
    path.write_text(read_recipe(recipe.to_data()).text, encoding="utf-8")
    assert read_recipe(path) == recipe


@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_a_recipe_error(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("texts") / "recipe.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(RecipeError):
        read_recipe(path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["dare", "ties", "b"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["model", "filter", "value", "parameters", "method", "weight"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {
            "models": JSON | st.just(["a"]),
            "merge_method": st.sampled_from(["ties", "linear", "dare_ties", "della"]) | JSON,
        },
        optional={
            "base_model": JSON | st.just("b"),
            "sparsify": JSON,
            "parameters": st.dictionaries(st.sampled_from(["weight", "density", "rescale", "keep", "seed"]), JSON)
            | JSON,
            "dtype": JSON,
            "vocab": JSON,
            "tokenizer_source": JSON,
            "heads": JSON | st.sampled_from(["a", "base"]),
        },
    )
)
def test_any_data_is_a_recipe_or_a_recipe_error(data):
    try:
        recipe = read_recipe(data)
    except RecipeError:
        return
    assert read_recipe(recipe.to_data()) == recipe


# --- what it costs ---


def test_an_error_imports_nothing_heavy(tmp_path):
    (tmp_path / "recipe.yaml").write_text("models: [a]\nmerge_method: tise\n")
    program = dedent("""\
        import sys, time
        from darekit.errors import RecipeError
        from darekit.recipe import read_recipe
        try:
            read_recipe("recipe.yaml")
        except RecipeError as error:
            assert "recipe.yaml line 2" in str(error), error
        heavy = {"numba", "torch", "transformers", "pydantic", "huggingface_hub"} & {*sys.modules}
        assert not heavy, heavy
        assert "numpy" in sys.modules  # that the check can fail
        print(time.process_time())
        """)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.9


def test_a_sweep_file_is_no_recipe():
    with pytest.raises(RecipeError, match=r"axes belongs to a sweep file.*dare sweep"):
        read_recipe({"recipe": {"models": ["a"], "merge_method": "linear"}, "axes": {"seed": [1]}})
