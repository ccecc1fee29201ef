# SPDX-License-Identifier: Apache-2.0
"""`dare recommend`: what it predicts is what happens, what it writes runs, and what it refuses it explains."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

import darekit as dk
import families
from conftest import _tokenizer
from darekit.engine.steps import Copy
from darekit.errors import DataError, OutputError, PlanError, RecipeError
from darekit.planning.homology import p_max, weighted_median
from darekit.planning.opening import open_plan
from darekit.recipe import read_recipe
from darekit.recipe.single import drop_recipe
from darekit.recipe.values import filters_of
from darekit.recommendation.advice import divisor, write_recipe

DENSE = ("embeddings", "norms", "biases")
SENTENCES = [[3 + (7 * i + 5 * j + i * j) % 90 for j in range(12)] for i in range(24)]


def text_of(ids):
    return " ".join(f"w{i}" for i in ids)


def train(model, rows, steps, rate):
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    ids = torch.tensor(rows)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps({"text": text_of(row)}) for row in rows) + "\n")
    return path


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def trained(request, tmp_path_factory):
    """A base trained on some sequences, a model trained on from it on others (float32); .data: rows of both."""
    torch = pytest.importorskip("torch")
    import transformers as t

    torch.set_num_threads(1)
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp(f"trained-{request.param}")
    model = {
        "llama": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(
                vocab_size=96, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=64,
            )
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64)
        ),
    }[request.param]()  # fmt: skip
    train(model, SENTENCES, 40, 3e-3).save_pretrained(path / "base")
    train(model, [[*row[::-1]] for row in SENTENCES], 15, 1e-3).save_pretrained(path / "tuned")
    for name in ("base", "tuned"):
        _tokenizer(path / name)
    data = write_rows(path / "rows.jsonl", [row[: 6 + i % 7] for i, row in enumerate(SENTENCES)])
    return SimpleNamespace(path=path, base=path / "base", tuned=path / "tuned", data=data, kind=request.param)


def inputs_of(trained):
    """Weight's name -> (tokens, in) what each linear layer sees; by transformers alone."""
    import torch
    import transformers
    from transformers.pytorch_utils import Conv1D

    model = transformers.AutoModelForCausalLM.from_pretrained(trained.tuned, dtype=torch.float32).eval()
    seen = {}

    def watch(name):
        return lambda module, arguments: seen.setdefault(name, []).append(arguments[0][0].double().numpy())

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            module.register_forward_pre_hook(watch(f"{name}.weight"))
    with torch.no_grad():
        for line in trained.data.read_text().splitlines():
            model(input_ids=torch.tensor([[int(word[1:]) for word in json.loads(line)["text"].split()]]))
    return {name: np.concatenate(rows) for name, rows in seen.items()}


def named(tensors, name):
    """A checkpoint's tensor for a module's weight; checkpoints of GPT-2 lack the prefix."""
    return name if name in tensors else name.removeprefix("transformer.")


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_predicted_noise_is_measured_noise(trained, p):
    """Per layer within 25 %: dropped by the engine under several seeds, run on the inputs that the model really has."""
    found = dk.recommend(trained.base, trained.tuned, drop_rate=p, data=trained.data, device="cpu", batch_size=5)
    base, tuned = families.load(trained.base), families.load(trained.tuned)
    dropped = [
        dk.merge_tensors(base, [tuned], sparsify=dk.dare(p), seeds=[seed], method="task_arithmetic")
        for seed in range(8)
    ]
    advice = {tensor.name: tensor for tensor in found.tensors}
    checked = 0
    for layer, x in inputs_of(trained).items():
        name = named(tuned, layer)
        if name not in advice:
            continue  # a head that is tied to the embedding
        turn = (lambda w: w) if trained.kind == "gpt2" and "lm_head" not in name else (lambda w: w.T)
        signal = x @ turn(tuned[name].astype(float) - base[name])
        noise = [np.sum(np.square(x @ turn(one[name].astype(float) - tuned[name]))) for one in dropped]
        ratio = math.sqrt(np.mean(noise) / np.sum(np.square(signal)))
        moved = math.sqrt(np.mean(noise) / np.sum(np.square(x @ turn(tuned[name].astype(float)))))
        assert advice[name].noise_to_signal == pytest.approx(ratio, rel=0.25), name
        assert advice[name].rho == pytest.approx(moved, rel=0.25), name
        assert advice[name].kappa > 1.2, "training moves a layer's output together"
        checked += 1
    assert checked == len(advice) >= 8


def test_without_data_inputs_have_no_preferred_direction(llamas):
    """The data-free prediction, against isotropic inputs."""
    found = dk.recommend(llamas.path / "base", llamas.path / "m0", drop_rate=0.9)
    x = np.random.default_rng(0).normal(size=(200, families.HIDDEN))
    for tensor in found.tensors:
        if tensor.shape[1] != families.HIDDEN:
            continue
        base, model = (a[tensor.name].astype(np.float32) for a in (llamas.base, llamas.models[0]))
        made = [
            dk.merge_tensors({tensor.name: base}, [{tensor.name: model}], sparsify=dk.dare(0.9), seeds=[s])[tensor.name]
            for s in range(6)
        ]
        moved = np.sqrt(np.mean([np.sum(np.square(x @ (one - model).T)) for one in made]))
        assert tensor.rho == pytest.approx(moved / np.linalg.norm(x @ model.T), rel=0.25), tensor.name
        assert tensor.kappa is None and tensor.noise_to_signal is None


def test_the_number_is_the_median_over_what_may_be_dropped(llamas, dare):
    data = dare("recommend", llamas.path / "base", llamas.path / "m0", "--tau", 0.1, "--json").data
    names = {tensor["name"] for tensor in data["tensors"]}
    assert names | {tensor["name"] for tensor in data["dense"]} == set(llamas.base)
    assert all(name.endswith("proj.weight") or name == "lm_head.weight" for name in names)
    for tensor in data["tensors"]:
        before = llamas.base[tensor["name"]].astype(float)
        r = np.linalg.norm(llamas.models[0][tensor["name"]] - before) / np.linalg.norm(before)
        assert tensor["r"] == pytest.approx(r, rel=1e-4)
        assert tensor["p_max"] == pytest.approx(0.01 / (0.01 + r * r), rel=1e-4)
        assert 0 <= tensor["p_max"] - tensor["drop_rate"] < 1e-4 and tensor["rho"] <= 0.1
    pairs = [(tensor["p_max"], tensor["parameters"]) for tensor in data["tensors"]]
    assert data["drop_rate"] == min(0.99, weighted_median(pairs))
    assert data["tau"] == 0.1 and "preferred direction" in data["assumed"] and "tau = 0.1" in data["assumed"]
    assert {d["reason"] for d in data["dense"]} >= {"each output is one row of it: no sum in which noise averages out"}


def test_the_written_recipe_runs_as_it_is(llamas, dare, tmp_path):
    out = tmp_path / "recipe.yaml"
    said = dare("recommend", llamas.path / "base", llamas.path / "m0", "--out", out)
    assert (
        said.code == 0
        and "assumed: inputs without" in said.out
        and "dense model.embed_tokens" in " ".join(said.out.split())
    )
    found = dk.recommend(llamas.path / "base", llamas.path / "m0")
    assert read_recipe(out) == found.recipe == read_recipe(found.recipe.to_data())
    assert dare("merge", out, tmp_path / "merged").code == 0
    merged = families.load(tmp_path / "merged")
    for tensor in found.tensors:
        kept = np.mean(merged[tensor.name].view(np.uint16) != llamas.base[tensor.name].view(np.uint16))
        assert kept == pytest.approx(1 - tensor.drop_rate, abs=4 * math.sqrt(0.25 / tensor.parameters))
    for tensor in found.dense:
        assert merged[tensor.name].tobytes() == llamas.models[0][tensor.name].tobytes()
    again = dare("recommend", llamas.path / "base", llamas.path / "m0", "--out", out)
    assert again.code == 1 and "replace it with --overwrite" in again.err
    assert dare("recommend", llamas.path / "base", llamas.path / "m0", "--out", out, "--overwrite").code == 0


def test_names_within_names_get_their_own_rates(tmp_path):
    """A filter that is part of another tensor's name would catch it."""
    rng = np.random.default_rng(0)
    base = {name: rng.normal(0, 1, (40, 40)).astype(np.float32) for name in ("a.weight", "xa.weight", "xa.weight.b")}
    tuned = {name: w + rng.normal(0, 0.02 * 3**i, w.shape).astype("f4") for i, (name, w) in enumerate(base.items())}
    families.save(tmp_path / "base", base)
    families.save(tmp_path / "tuned", tuned)
    found = dk.recommend(tmp_path / "base", tmp_path / "tuned", tau=0.1)
    write_recipe(found, tmp_path / "r.yaml")
    with open_plan(read_recipe(tmp_path / "r.yaml")) as plan:
        rates = {t.name: plan.rate_of(0, t)[0] for t in plan.alignment.tensors}
    assert rates == {t.name: t.drop_rate for t in found.tensors}
    assert rates["a.weight"] > rates["xa.weight"] > rates["xa.weight.b"] > 0


@pytest.mark.parametrize("budget", [0.02, 0.3, 1.0])
def test_a_budget_is_kept_and_better_than_one_rate(llamas, budget):
    models = llamas.path / "base", llamas.path / "m0"
    found = dk.recommend(*models, budget=budget)
    kept = sum(t.parameters * (1 - t.drop_rate) for t in found.tensors)
    assert kept == pytest.approx(budget * found.droppable, rel=0.01)  # rates have four digits
    same = dk.recommend(*models, drop_rate=1 - budget)
    assert sum(t.rho**2 for t in found.tensors) <= sum(t.rho**2 for t in same.tensors) * 1.02 + 1e-12


def test_calibrated_rates_stay_within_tau(trained, tmp_path, dare):
    out = tmp_path / "r.yaml"
    options = ("--data", trained.data, "--tau", 0.1, "--device", "cpu", "--out", out)
    data = dare("recommend", trained.base, trained.tuned, *options, "--json").data
    assert data["calibration"] == {"rows": 24, "tokens": sum(6 + i % 7 for i in range(24))}
    assert all(t["rho"] <= 0.1 and t["kappa"] > 0 and t["p_max"] < 1 for t in data["tensors"])
    free = {t.name: t for t in dk.recommend(trained.base, trained.tuned, tau=0.1).tensors}
    assert any(abs(t["p_max"] - free[t["name"]].p_max) > 0.01 for t in data["tensors"])
    assert dare("merge", out, tmp_path / "merged").code == 0
    shown = dare("recommend", trained.base, trained.tuned, *options[:-2])
    assert "noise/signal" in shown.out and "measured on 24 rows" in shown.out


def test_rows_of_a_batch_do_not_see_padding(trained):
    one, many = (
        dk.recommend(trained.base, trained.tuned, data=trained.data, device="cpu", batch_size=size) for size in (1, 24)
    )
    for a, b in zip(one.tensors, many.tensors, strict=True):
        assert a.kappa == pytest.approx(b.kappa, rel=1e-4)


def test_the_search_of_q_takes_what_changes_outputs_least(trained):
    found = dk.recommend(
        trained.base, trained.tuned, drop_rate=0.98, data=trained.data, search_q=True, device="cpu", seed=3
    )
    changes = found.search.changes
    assert len(changes) >= 8 and found.search.best == min(changes, key=changes.get)
    assert all(change > 0 for change in changes.values())
    searched = found.recipe.sparsify.parameters.get("q")
    q = {entry.filter: entry.value for entry in filters_of(searched)}
    if found.search.best != 1:
        assert all(q[f"={t.name}"] == divisor(t.drop_rate, found.search.best) for t in found.tensors)
    # Nothing dropped, nothing changes: the reference is the fine-tuned model itself.
    same = dk.recommend(trained.base, trained.tuned, drop_rate=0.0, data=trained.data, search_q=True, device="cpu")
    assert same.search.changes[1.0] == pytest.approx(0, abs=1e-6)


def test_q_is_searched_where_the_model_is_asked(trained, tmp_path):
    """What a prompt holds has no part in it; in plain text every token has."""
    rows = [{"prompt": text_of(row[:4]), "completion": " " + text_of(row[4:7])} for row in SENTENCES[:8]]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    whole = write_rows(tmp_path / "whole.jsonl", [row[:7] for row in SENTENCES[:8]])
    changes = [
        dk.recommend(
            trained.base, trained.tuned, drop_rate=0.98, data=data, search_q=True, device="cpu"
        ).search.changes[1.0]
        for data in (tmp_path / "asked.jsonl", whole)
    ]
    assert changes[0] != pytest.approx(changes[1], rel=0.01)
    single = write_rows(tmp_path / "single.jsonl", [[5], [6]])
    with pytest.raises(DataError, match="no row has two tokens"):
        dk.recommend(trained.base, trained.tuned, data=single, search_q=True, device="cpu")


@pytest.mark.parametrize("real", ["bert"], indirect=True)
def test_a_classifier_is_searched_and_calibrated_too(real):
    data = write_rows(real.path / "rows.jsonl", SENTENCES[:6])
    found = dk.recommend(
        real.path / "base", real.path / "m0", data=data, drop_rate=0.9, search_q=True, device="cpu", keep_dense=DENSE
    )
    assert found.calibration.tokens >= 6 * 12 and found.search.changes
    assert all(tensor.kappa is not None for tensor in found.tensors)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"tau": 0}, PlanError, "tau must be in"),
        ({"budget": 2}, PlanError, "budget must be in"),
        ({"budget": 0.1, "drop_rate": 0.9}, PlanError, "give only one of them"),
        ({"search_q": True}, PlanError, "needs data"),
        ({"keep_dense": ["norm"]}, RecipeError, "neither a group"),
    ],
)
def test_what_cannot_be_recommended(llamas, options, error, says):
    with pytest.raises(error, match=says):
        dk.recommend(llamas.path / "base", llamas.path / "m0", **options)


def test_mistakes_in_options_are_told_at_once(dare, tmp_path):
    """Before a checkpoint is looked for."""
    said = dare("recommend", "a", "b", "--budget", 5)
    assert said.code == 2 and "write 0.05" in said.err
    assert dare("recommend", "a", "b", "-p", 0.9, "--budget", 0.1).code == 2
    assert dare("recommend", "a", "b", "--search-q").code == 2
    for out, says in (("r.json", "must end in .yaml"), (tmp_path / "no" / "r.yaml", "there is no folder")):
        said = dare("recommend", "a", "b", "--out", out)
        assert said.code == 1 and says in said.err


def test_unusable_data_and_outputs(llamas, tmp_path):
    models = llamas.path / "base", llamas.path / "m0"
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no usable row"):
        dk.recommend(*models, data=tmp_path / "empty.jsonl")
    rows = write_rows(tmp_path / "rows.jsonl", SENTENCES[:2])
    with pytest.raises(DataError, match="tokenizer"):
        dk.recommend(*models, data=rows, device="cpu")
    with pytest.raises(OutputError, match=r"must end in \.yaml"):
        write_recipe(dk.recommend(*models), tmp_path / "recipe.json")


def test_the_wrong_base_is_told(llamas, tmp_path, dare):
    families.save(tmp_path / "other", families.llama(np.random.default_rng(77)), families.config())
    said = dare("recommend", tmp_path / "other", llamas.path / "m0")
    assert said.code == 0 and "does not look like the base" in said.out
    data = dare("recommend", tmp_path / "other", llamas.path / "m0", "--json").data
    assert data["verdict"] == "wrong_base" and data["drop_rate"] < 0.1


def test_tensors_that_the_base_has_as_zeros_are_not_dropped(tmp_path):
    rng = np.random.default_rng(0)
    base = {"a.weight": np.zeros((8, 8), np.float32), "b.weight": rng.normal(0, 1, (8, 8)).astype(np.float32)}
    families.save(tmp_path / "base", base)
    families.save(tmp_path / "tuned", {n: (w + 0.01).astype(np.float32) for n, w in base.items()})
    found = dk.recommend(tmp_path / "base", tmp_path / "tuned")
    assert [t.drop_rate for t in found.tensors] == [0.0, 0.99] and found.tensors[0].p_max == 0
    assert any("zeros" in note for note in found.notes)
    assert json.dumps(found.to_data(), allow_nan=False)
    assert p_max(math.inf) == 0


def test_nothing_dropped_is_the_model(trained):
    """The plan that is calibrated has the fine-tuned model's own bytes."""
    with open_plan(drop_recipe(str(trained.base), str(trained.tuned), drop_rate=0.0)) as plan:
        assert all(isinstance(step, Copy) or step.verbatim for step in plan.steps)
