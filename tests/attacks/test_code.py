# SPDX-License-Identifier: Apache-2.0
"""Code in a checkpoint never runs, and nobody is asked whether it may: a pickle's, a config's, a tokenizer's."""

import json
import pickle
from pathlib import Path

import pytest

import conftest
import families
from darekit.errors import Unsupported


class Payload:
    """What unpickling this does: it creates a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """A file that exists once hostile code has run."""
    return tmp_path / "ran"


@pytest.fixture
def model(tmp_path, mark):
    """A base with its tokenizer, and a module beside it that leaves the mark when it is imported."""
    families.family(tmp_path)
    base = tmp_path / "base"
    conftest._tokenizer(base)
    classes = "".join(f"class {name}: pass\n" for name in ("Config", "Model", "Tokenizer"))
    (base / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n{classes}")
    return base


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "w3 w4"}\n')
    return path


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    def ask(prompt=""):
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr("builtins.input", ask)


def change(path, **entries):
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, **entries}))


def test_the_payload_would_run(tmp_path, mark):
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


def test_pickled_weights_run_nothing(tmp_path, mark, dare):
    torch = pytest.importorskip("torch")
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        torch.save({"w": Payload(mark)}, tmp_path / name / "pytorch_model.bin")
    done = dare("inspect", tmp_path / "base", tmp_path / "tuned")
    assert done.code == 1 and "safetensors" in done.err and not mark.exists()


@pytest.mark.parametrize("code", ["own.Config", "org/name--own.Config"], ids=["beside it", "on the Hub"])
def test_a_config_runs_nothing(model, rows, mark, code):
    pytest.importorskip("transformers")
    import darekit as dk

    change(model / "config.json", model_type="own", architectures=["Own"], auto_map={"AutoConfig": code})
    with pytest.raises(Unsupported, match="never runs a checkpoint's code"):
        dk.evaluate([model], data=[rows])
    assert not mark.exists()


def test_a_model_that_transformers_knows_is_run_without_its_code(model, rows, mark):
    pytest.importorskip("transformers")
    import darekit as dk

    change(model / "config.json", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    dk.evaluate([model], data=[rows])
    assert not mark.exists()


def test_an_architecture_is_a_model_and_not_any_name_in_transformers(model, rows, monkeypatch):
    transformers = pytest.importorskip("transformers")
    import darekit as dk

    monkeypatch.setattr(transformers, "payload", lambda config: pytest.fail("called"), raising=False)
    change(model / "config.json", architectures=["payload", "pipeline", "LlamaForCausalLM"])
    dk.evaluate([model], data=[rows])


def test_a_tokenizer_runs_nothing(model, rows, mark):
    pytest.importorskip("transformers")
    import darekit as dk

    change(model / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Tokenizer", None]})
    with pytest.raises(Unsupported, match="never runs a checkpoint's code"):
        dk.evaluate([model], data=[rows])
    assert not mark.exists()


def test_a_merge_carries_code_and_does_not_run_it(model, tmp_path, mark, dare):
    change(model / "config.json", auto_map={"AutoConfig": "own.Config"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(families.recipe(tmp_path)))
    assert dare("merge", recipe, tmp_path / "out").code == 0
    assert (tmp_path / "out" / "own.py").exists() and not mark.exists()
