"""Similarity of hidden states: against transformers' own on merges that lie on disk, one model, padding left out."""

import json

import numpy as np
import pytest

import darekit as dk
from darekit.errors import DataError, PlanError

torch = pytest.importorskip("torch")
ROWS = [{"text": "w3 w4 w5 w6 w7"}, {"text": "w8 w9"}, {"prompt": "w10 w11", "completion": "w12 w13"}]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return tmp_path / "rows.jsonl"


def states(cls, path, live_ids):
    """Each example alone, without any padding -> (layers + 1, tokens, width)."""
    model = cls.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in live_ids]
    return torch.cat([torch.stack([layer[0] for layer in one]) for one in found], 1).double().numpy()


IDS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13, 2]]  # the tokenizer's, with the end behind a completion


def test_cosines_are_those_of_a_merge_on_disk(real, data, tmp_path):
    found = dk.similarity(
        real.path / "base", real.path / "m0", data=data, drop_rate=[0.5, 0.9], seeds=[4, 5], device="cpu"
    )
    assert found.tokens == 12 and found.layers == ("embeddings", "1", "2")
    assert [(c.method, c.drop_rate, c.seeds) for c in found.curves] == [
        ("dare", 0.5, (4, 5)), ("dare", 0.9, (4, 5)), ("drop_only", 0.5, (4, 5)), ("drop_only", 0.9, (4, 5)),
        ("magnitude", 0.5, (4,)), ("magnitude", 0.9, (4,)),
    ]  # fmt: skip
    before = states(real.cls, real.path / "m0", IDS)
    for curve, method, seeds in ((found.curves[1], "dare", (4, 5)), (found.curves[5], "magnitude", (None,))):
        means = []
        for seed in seeds:
            out = tmp_path / f"{method}{seed}"
            dk.drop(
                real.path / "base", real.path / "m0", out, drop_rate=0.9, method=method, seed=seed, force=True
            )  # fmt: skip
            after = states(real.cls, out, IDS)
            sizes = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
            means.append(((before * after).sum(-1) / sizes).mean(1))
        assert curve.cosine == pytest.approx(np.mean(means, 0), abs=2e-6)
        if len(means) > 1:
            assert curve.deviation == pytest.approx(np.std(means, 0, ddof=1), abs=2e-6)


@pytest.mark.parametrize("real", ["llama"], indirect=True)
def test_nothing_dropped_turns_nothing(real, data):
    found = dk.similarity(real.path / "base", real.path / "m0", data=data, drop_rate=0.0, batch_size=1, device="cpu")
    assert all(value == pytest.approx(1, abs=1e-12) for curve in found.curves for value in curve.cosine)


@pytest.mark.parametrize("real", ["llama"], indirect=True)
def test_the_command(real, data, dare, tmp_path):
    base, model = real.path / "base", real.path / "m0"
    arguments = ("similarity", base, model, "--data", data, "-p", "0.9", "--methods", "dare,drop_only", "--plot")
    done = dare(*arguments, tmp_path / "plots", "--json")
    assert done.code == 0, done.err
    assert [curve["method"] for curve in done.data["curves"]] == ["dare", "drop_only"]
    svg = (tmp_path / "plots" / "similarity.svg").read_text()
    assert "cosine to the original" in svg and (tmp_path / "plots" / "similarity.png").stat().st_size > 10_000
    shown = dare(*arguments, tmp_path / "again")
    assert "embeddings" in shown.out and "lowest at layer" in shown.out and "dare, p = 0.9" in shown.out
    assert (tmp_path / "again" / "similarity.svg").read_text() == svg


@pytest.mark.parametrize(
    "forms",
    [
        "-p 0.5,0.9 --methods dare,magnitude --seeds 1,2",
        "-p 0.5 -p 0.9 --methods dare --methods magnitude --seeds 1 --seeds 2",
    ],
)
@pytest.mark.parametrize("real", ["llama"], indirect=True)
def test_lists_have_commas_or_are_repeated(real, data, dare, forms):
    done = dare("similarity", real.path / "base", real.path / "m0", "--data", data, "--limit", "2", "--json",
                *forms.split())  # fmt: skip
    found = [(curve["method"], curve["drop_rate"], curve["seeds"]) for curve in done.data["curves"]]
    assert sorted(found) == [("dare", 0.5, [1, 2]), ("dare", 0.9, [1, 2]), ("magnitude", 0.5, [1]),
                             ("magnitude", 0.9, [1])]  # fmt: skip


@pytest.mark.parametrize("real", ["llama"], indirect=True)
def test_likely_mistakes(real, data, dare, tmp_path):
    base, model = real.path / "base", real.path / "m0"
    with pytest.raises(PlanError, match=r"'magnitud' is not a sparsifier; did you mean 'magnitude'\?"):
        dk.similarity(base, model, data=data, drop_rate=0.9, methods=["magnitud"])
    assert dare("similarity", base, model, "--data", data, "-p", "90").code == 2
    assert dare("similarity", base, model, "--data", data, "-p", "0.9", "--seeds", "a").code == 2
    assert dare("similarity", base, model, "--data", data, "-p", "0.9,x").code == 2
    assert dare("similarity", base, model, "--data", data, "-p", ",").code == 2
    assert "not a file" in dare("similarity", base, model, "--data", tmp_path / "no.jsonl", "-p", "0.9").err
    for path in (base, model):
        (tmp_path / path.name).mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / path.name / name).write_bytes((path / name).read_bytes())
    with pytest.raises(DataError, match="no tokenizer"):
        dk.similarity(tmp_path / "base", tmp_path / "m0", data=data, drop_rate=0.9)
