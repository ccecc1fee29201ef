"""Models that run: what `open_live` builds in memory is what transformers loads from disk; rows and tokens."""

import json

import pytest

import darekit as dk
import families
from darekit.errors import CheckpointError, DataError, HomologyError
from darekit.live.data import Row, read_rows, tokenize
from darekit.live.models import build, open_live
from darekit.planning.opening import open_plan
from darekit.recipe import read_recipe

torch = pytest.importorskip("torch")
RECIPE = {"sparsify": {"method": "dare", "drop_rate": 0.5, "seed": 3}}


def outputs(model):
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        return model.float()(input_ids=ids).logits


def test_a_checkpoint_runs_as_transformers_loads_it(real):
    with open_live(real.path / "m0", device="cpu") as live:
        loaded = real.cls.from_pretrained(real.path / "m0").eval()
        assert torch.equal(outputs(live.model), outputs(loaded))
        assert live.task == ("classifier" if real.kind == "bert" else "causal")
        assert not any(p.requires_grad for p in live.model.parameters())


def test_a_recipe_runs_as_its_merge_on_disk(real, tmp_path):
    recipe = families.recipe(real.path, **RECIPE)
    dk.merge(recipe, tmp_path / "out")
    loaded = real.cls.from_pretrained(tmp_path / "out").eval()
    with open_live(recipe, device="cpu") as live:
        assert torch.equal(outputs(live.model), outputs(loaded))


def test_a_method_that_measures_runs_as_its_merge_on_disk(real, tmp_path):
    recipe = families.recipe(real.path, k=1, merge_method="slerp", parameters={"t": 0.3}) | {"sparsify": {
        "method": "dare", "drop_rate": 0.9, "seed": 3}}  # fmt: skip
    dk.merge(recipe, tmp_path / "out", force=True)
    loaded = real.cls.from_pretrained(tmp_path / "out").eval()
    with open_live(recipe, device="cpu") as live:
        assert torch.equal(outputs(live.model), outputs(loaded))


def test_weights_are_replaced_in_place(real):
    recipe = read_recipe(families.recipe(real.path, **RECIPE))
    other = read_recipe(families.recipe(real.path, k=1))
    with open_plan(recipe) as plan, open_plan(other) as single:
        live = build(plan, device="cpu")
        first = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
        places = [p.data_ptr() for p in live.model.parameters()]
        live.put(single)
        again = real.cls.from_pretrained(real.path / "m0").eval()
        assert torch.equal(outputs(live.model), outputs(again))
        assert any(not torch.equal(first[n], t) for n, t in live.model.state_dict().items())
        live.put(plan)
        assert all(torch.equal(first[n], t) for n, t in live.model.state_dict().items())
        assert places == [p.data_ptr() for p in live.model.parameters()]


def test_another_models_tensors_are_refused(llamas, tmp_path):
    import numpy as np

    families.save(tmp_path / "deep", families.llama(np.random.default_rng(0), layers=3), families.config(layers=3))
    shallow, deep = (
        read_recipe({"models": [{"model": str(path)}], "merge_method": "linear"})
        for path in (llamas.path / "m0", tmp_path / "deep")
    )
    with open_plan(shallow) as small, open_plan(deep) as large:
        live = build(large, device="cpu")
        with pytest.raises(HomologyError, match=r"no value for model\.layers\.2"):
            live.put(small)


def test_rows_of_every_form(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "a b"}, {"prompt": "p", "completion": "c"}, {"text": "t", "label": 2}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert [(r.text, r.completion, r.label) for r in read_rows(path)] == [
        ("a b", None, None), ("p", "c", None), ("t", None, 2)
    ]  # fmt: skip
    assert len(read_rows(path, limit=2)) == 2
    path.write_text("\n " + json.dumps(rows, indent=1), encoding="utf-8-sig")  # one list, as many datasets are
    assert [row.text for row in read_rows(path)] == ["a b", "p", "t"]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in rows))
    assert [row.text for row in read_rows(path)] == ["a b", "p", "t"]


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", DataError, "it is empty"),
        ('{"texts": "a"}\n', DataError, "keys texts"),
        ('{"text": "a"}\n{"text": " "}\n', DataError, "1 rows cannot be used"),
        ('{"text": "a"\n', DataError, "rows.jsonl:1: not JSON"),
        ('{"text": "a", "label": []}\n', DataError, "neither a number nor a word"),
        ('{"text": "a", "label": NaN}\n', DataError, "neither a number nor a word"),
        ('{"text": "a", "label": 1' + 400 * "0" + ".0}\n", DataError, "neither a number nor a word"),
        ('{"text": ' + 5000 * "1" + "}\n", DataError, "rows.jsonl:1: not JSON"),
        (100000 * "[" + "\n", DataError, "not JSON"),
        ('[{"text": "a"}, {"text": 5}]', DataError, r"rows.jsonl\[1\]: keys text"),
        ('[{"text": "a"}]\n[{"text": "b"}]\n', DataError, "rows.jsonl:1: not a JSON object"),
        ('{"text": "a\\ud800"}\n', DataError, "half of a surrogate pair"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', DataError, "apply_chat_template"),
        ('{"prompt": [{"role": "user", "content": "a"}], "completion": []}\n', DataError, "prompt is a list of turns"),
        ('{"prompt": "a"}\n', DataError, "keys prompt$"),
        ('{"instruction": "a", "output": "b"}\n', DataError, "instruction is called prompt here"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, text, error, says):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(error, match=says):
        read_rows(tmp_path / "rows.jsonl")


def test_no_file_of_rows(tmp_path):
    with pytest.raises(CheckpointError, match="not a file"):
        read_rows(tmp_path / "rows.jsonl")


def test_only_a_completion_is_asked_for(real):
    with open_live(real.path / "m0", device="cpu") as live:
        long, short = tokenize(
            live.tokenizer, [Row("w3 w4 w5", completion="w6"), Row("w3 w4")], max_length=4, end=True
        )  # fmt: skip
        assert long.ids == (4, 5, 6, 2) and long.asked == (False, False, True, True)
        assert short.ids == (3, 4) and short.asked == (False, True)
