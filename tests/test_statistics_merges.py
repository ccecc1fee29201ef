# SPDX-License-Identifier: Apache-2.0
"""Fisher and RegMean: against closed forms, against plain torch, and end to end through the command."""

import json
import math

import numpy as np
import pytest

import darekit as dk
import families
from darekit.errors import DarekitError, DataError, HomologyError, PlanError, RecipeError
from darekit.inputs.statistics import open_statistics
from darekit.methods import SPARSIFIERS
from darekit.methods.informed import NormalEquations, fisher, regmean

torch = pytest.importorskip("torch")

EXACT = {"off_diagonal": 1.0, "ridge": 0.0}
NAME = "layer.weight"


def layers(rng, k=3, out=7, inputs=5, tokens=40, kind=np.float64):
    xs = [rng.normal(size=(tokens + 10 * i, inputs)) @ rng.normal(size=(inputs, inputs)) for i in range(k)]
    ws = [rng.normal(size=(out, inputs)).astype(kind) for _ in range(k)]
    return xs, ws, [(x.T @ x).astype(kind) for x in xs]


def merged(base, models, statistics, method, **more):
    return dk.merge_tensors(
        None if base is None else {NAME: base}, [{NAME: m} for m in models], method=method,
        statistics=[{NAME: s} for s in statistics], **more,
    )[NAME]  # fmt: skip


# --- RegMean: closed forms


def test_regmean_is_the_least_squares_optimum():
    xs, ws, grams = layers(np.random.default_rng(0))
    wanted = np.linalg.lstsq(
        np.concatenate(xs), np.concatenate([x @ w.T for x, w in zip(xs, ws, strict=True)]), rcond=None
    )[0].T
    found = merged(None, ws, grams, dk.regmean(**EXACT, normalize=False))
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


def test_regmean_with_weights_is_weighted_least_squares():
    xs, ws, grams = layers(np.random.default_rng(1))
    shares = (2.0, 0.5, 0.0)
    wanted = np.linalg.lstsq(
        np.concatenate([c**0.5 * x for c, x in zip(shares, xs, strict=True)]),
        np.concatenate([c**0.5 * x @ w.T for c, x, w in zip(shares, xs, ws, strict=True)]), rcond=None,
    )[0].T  # fmt: skip
    found = merged(None, ws, grams, dk.regmean(**EXACT, normalize=False), weights=shares)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
def test_regmean_of_deltas_is_regmean_of_models(off_diagonal):
    rng = np.random.default_rng(2)
    _, ws, grams = layers(rng)
    base = rng.normal(size=ws[0].shape)
    method = dk.regmean(off_diagonal=off_diagonal, ridge=1e-3)
    np.testing.assert_allclose(merged(base, ws, grams, method), merged(None, ws, grams, method), rtol=1e-10, atol=1e-12)


def test_regmean_without_off_diagonal_is_a_mean_by_column():
    _, ws, grams = layers(np.random.default_rng(3))
    sizes = [g.diagonal() for g in grams]
    wanted = sum(w * s for w, s in zip(ws, sizes, strict=True)) / sum(sizes)
    np.testing.assert_allclose(merged(None, ws, grams, dk.regmean(off_diagonal=0.0, ridge=0.0)), wanted, rtol=1e-12)


def test_equal_models_stay_and_equal_grams_average():
    rng = np.random.default_rng(4)
    _, ws, grams = layers(rng)
    same = merged(None, [ws[0]] * 3, grams, dk.regmean())
    np.testing.assert_allclose(same, ws[0], rtol=1e-10)
    np.testing.assert_allclose(merged(None, ws, [grams[0]] * 3, dk.regmean()), np.mean(ws, 0), rtol=1e-9, atol=1e-12)


def test_where_no_data_is_the_ridge_averages():
    _, ws, grams = layers(np.random.default_rng(5))
    for gram in grams:
        gram[2] = gram[:, 2] = 0  # an input that never differed from 0
    found = merged(None, ws, grams, dk.regmean(off_diagonal=1.0, ridge=1e-6, normalize=False))
    assert np.isfinite(found).all()
    extra = np.array([g.diagonal().mean() for g in grams])
    np.testing.assert_allclose(found[:, 2], sum(w[:, 2] * e for w, e in zip(ws, extra, strict=True)) / extra.sum())
    nothing = merged(None, ws, [np.zeros_like(g) for g in grams], dk.regmean())
    np.testing.assert_allclose(nothing, np.mean(ws, 0), rtol=1e-12)


def test_a_singular_sum_is_an_error_that_names_the_tensor():
    xs, ws, _ = layers(np.random.default_rng(6), tokens=1, k=1)
    twice = [ws[0], ws[0]]
    grams = [np.outer(xs[0][0], xs[0][0])] * 2
    with pytest.raises(DataError, match=rf"{NAME}: the sum of the Grams is singular.*ridge"):
        merged(None, twice, grams, dk.regmean(**EXACT))


def test_a_matrix_that_is_not_symmetric_fails_the_residual_check():
    _, ws, grams = layers(np.random.default_rng(7))
    spoilt = grams[1] + np.triu(grams[1], 1)
    with pytest.raises(DataError, match=rf"{NAME}: the solve leaves a relative residual of"):
        merged(None, ws, [grams[0], spoilt, grams[2]], dk.regmean(**EXACT))


def test_the_blocked_solve_is_the_inverse():
    rng = np.random.default_rng(8)
    for size in (1, 127, 128, 129, 300):
        x = rng.normal(size=(2 * size + 5, size))
        rows = rng.normal(size=(2, 9, size))
        equations = NormalEquations.of([x.T @ x] * 2, np.ones(2), np.ones(2), off_diagonal=0.5, ridge=0.1)
        wanted = np.linalg.solve(equations.matrix, ((equations.matrix / 2) @ rows.sum(0).T)).T
        np.testing.assert_allclose(equations.solve(rows), wanted, rtol=1e-9, atol=1e-11)


def test_parts_and_rows_make_no_difference_but_the_last_bits(monkeypatch):
    from darekit.methods import informed

    rng = np.random.default_rng(9)
    _, ws, grams = layers(rng, out=50, inputs=30, tokens=90)
    whole = merged(None, ws, grams, dk.regmean())
    monkeypatch.setattr(informed, "PART_ELEMENTS", 30 * 7)
    monkeypatch.setattr(informed, "ROWS_ELEMENTS", 30 * 11)
    tiled = merged(None, ws, grams, dk.regmean())
    np.testing.assert_allclose(tiled, whole, rtol=1e-11)
    definition = regmean(np.array(ws), np.ones(3), grams, np.ones(3))
    np.testing.assert_array_equal(tiled, definition)


# --- Fisher: closed forms


def test_equal_fishers_average():
    rng = np.random.default_rng(10)
    base, models = rng.normal(size=(9, 11)).astype(np.float32), rng.normal(size=(3, 9, 11)).astype(np.float32)
    values = rng.random((9, 11)).astype(np.float32)
    found = merged(base, models, [values] * 3, dk.fisher())
    np.testing.assert_allclose(found, merged_average(base, models), rtol=2e-6, atol=1e-7)


def merged_average(base, models):
    return dk.merge_tensors({NAME: base}, [{NAME: m} for m in models])[NAME]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
def test_fisher_is_its_formula(normalize, with_base):
    rng = np.random.default_rng(11)
    base, models = rng.normal(size=(40, 50)), rng.normal(size=(3, 40, 50))
    values = np.abs(rng.normal(size=(3, 40, 50))) ** 8
    weights, minimal = np.array([1.0, 0.3, 2.0]), 1e-3
    shares = weights / (np.sqrt((values**2).sum((1, 2))) + minimal) if normalize else weights
    parts = shares[:, None, None] * (values + minimal)
    wanted = (parts * models).sum(0) / parts.sum(0)
    method = dk.fisher(minimal=minimal, normalize=normalize)
    found = merged(base if with_base else None, models, values, method, weights=weights)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_where_all_fishers_are_0_the_average_decides():
    rng = np.random.default_rng(12)
    models, values = rng.normal(size=(2, 6)), np.zeros((2, 6))
    values[0, :3] = 1.0
    found = fisher(models, np.array([1.0, 3.0]), values, np.ones(2), minimal=0.0)
    np.testing.assert_allclose(found, [*models[0, :3], *((models[0, 3:] + 3 * models[1, 3:]) / 4)])


def test_tiles_and_threads_do_not_matter(monkeypatch):
    from darekit.engine import tiles

    rng = np.random.default_rng(13)
    base, models = rng.normal(size=(300, 777)).astype(np.float32), rng.normal(size=(2, 300, 777)).astype(np.float32)
    values = rng.random((2, 300, 777)).astype(np.float32)
    grams = [np.cov(rng.normal(size=(777, 1000))).astype(np.float32) for _ in models]
    for statistics, method in ((values, dk.fisher()), (grams, dk.regmean())):
        results = []
        for tile, threads in ((1000, 1), (65536, 3)):
            monkeypatch.setattr(tiles, "TILE", tile)
            results.append(merged(base, models, statistics, method, sparsify=dk.dare(0.5), threads=threads))
        assert np.array_equal(*results)


# --- what a pass computes


ROWS = [
    {"text": "w3 w4 w5 w6"}, {"prompt": "w7 w8", "completion": "w9 w10 w11"}, {"text": "w12 w13"},
    {"prompt": "w3", "completion": "w50"}, {"text": "w60 w61 w62 w63 w64 w65 w66"},
]  # fmt: skip
LABELLED = [{"text": f"w{3 + i} w{4 + i} w{90 - i}" + " w7" * i, "label": i % 3} for i in range(5)]


def data_of(path, kind):
    file = path / f"{kind}.jsonl"
    file.write_text("\n".join(map(json.dumps, LABELLED if kind == "bert" else ROWS)))
    return file


@pytest.fixture
def data(real, tmp_path):
    return data_of(tmp_path, real.kind)


def loaded(real, name):
    import transformers

    return (
        real.cls.from_pretrained(real.path / name, dtype=torch.float32).eval(),
        transformers.AutoTokenizer.from_pretrained(real.path / name),
    )


def test_fisher_of_every_architecture(real, data, tmp_path):
    """Against plain autograd over transformers' own model and loss."""
    dk.make_statistics("fisher", real.path / "m0", data, tmp_path / "f.safetensors", device="cpu")
    found = families.load_file(tmp_path / "f.safetensors")
    model, tokenizer = loaded(real, "m0")
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    rows = LABELLED if real.kind == "bert" else ROWS
    for row in rows:
        if real.kind == "bert":
            ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
            total = -model(input_ids=ids, labels=torch.tensor([row["label"]])).loss
        else:
            head = tokenizer(row.get("text") or row["prompt"])["input_ids"]
            tail = [*tokenizer(row["completion"])["input_ids"], 2] if "completion" in row else []
            ids = torch.tensor([head + tail])
            labels = ids.clone()
            labels[:, : len(head) if tail else 1] = -100
            total = -model(input_ids=ids, labels=labels).loss * int((labels != -100).sum())
        gradients = torch.autograd.grad(total, model.parameters(), allow_unused=True)
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
            wanted[name] += (0 if gradient is None else gradient**2) / len(rows)
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values.numpy(), rtol=2e-3, atol=1e-9 + 1e-4 * float(values.max()))
    opened = open_statistics(tmp_path / "f.safetensors")
    opened.close()
    assert opened.norm == pytest.approx(math.sqrt(sum(float((v.double() ** 2).sum()) for v in wanted.values())), 1e-3)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_gram_of_every_architecture(real, data, tmp_path, size):
    """Against hooks on transformers' own model, one example at a time and so without padding."""
    out = tmp_path / "g.safetensors"
    dk.make_statistics("gram", real.path / "m0", data, out, batch_size=size, device="cpu")
    opened = open_statistics(out)
    opened.close()
    stored = families.load_file(out)
    model, tokenizer = loaded(real, "m0")
    wanted, rows = {}, {}

    def hook(name):
        def see(module, arguments):
            x = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).double()
            wanted[name] = wanted.get(name, 0) + x.T @ x
            rows[name] = rows.get(name, 0) + len(x)

        return see

    for path, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and f"{path}.weight" in dict(model.named_parameters()):
            module.register_forward_pre_hook(hook(f"{path}.weight"))
    for row in LABELLED if real.kind == "bert" else ROWS:
        ids = tokenizer(row.get("text") or row["prompt"])["input_ids"]
        ids += [*tokenizer(row["completion"])["input_ids"], 2] if "completion" in row else []
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    assert set(opened.tensors) == set(wanted) and opened.rows == rows
    for name, values in wanted.items():
        found = stored[opened.tensors[name].name]
        np.testing.assert_allclose(found, values.numpy(), rtol=1e-3, atol=1e-4 * float(values.abs().max()))
        assert np.array_equal(found, found.T)
    assert len(stored) < len(wanted) or real.kind == "gpt2"  # queries, keys and values share one
    assert bool(opened.transposed) == (real.kind == "gpt2")


def make(kind, real, name, data, out, **options):
    return dk.make_statistics(kind, real.path / name, data, out, device="cpu", **options)


@pytest.fixture(scope="session")
def logistic(tmp_path_factory):
    """A classifier that is nothing but a logistic regression on a bag of one-hot words: every Fisher by hand."""
    import transformers as t

    from conftest import _tokenizer

    path = tmp_path_factory.mktemp("logistic")
    torch.manual_seed(1)
    config = t.GPT2Config(vocab_size=96, n_embd=8, n_layer=0, n_head=1, n_positions=16, num_labels=3, pad_token_id=2)
    t.GPT2ForSequenceClassification(config).save_pretrained(path)
    _tokenizer(path)
    return path


def test_fisher_of_a_logistic_regression_by_hand(logistic, tmp_path):
    """logits = S h, h the last token's normed state: the gradient of log p_y by S is (e_y - p) h^T."""
    data = data_of(tmp_path, "bert")
    tensors = families.load_file(logistic / "model.safetensors")
    tensors = {name.removeprefix("transformer."): values.astype(np.float64) for name, values in tensors.items()}
    states, chances = [], []
    for row in LABELLED:
        ids = [int(word[1:]) for word in row["text"].split()]
        h = tensors["wte.weight"][ids[-1]] + tensors["wpe.weight"][len(ids) - 1]
        h = (h - h.mean()) / np.sqrt(h.var() + 1e-5) * tensors["ln_f.weight"] + tensors["ln_f.bias"]
        logits = tensors["score.weight"] @ h
        states.append(h)
        chances.append(np.exp(logits) / np.exp(logits).sum())

    def by_label(y, p, h):
        return np.outer(np.eye(3)[y] - p, h) ** 2

    wanted = {
        "empirical": [by_label(r["label"], p, h) for r, p, h in zip(LABELLED, chances, states, strict=True)],
        "exact": [
            sum(p[y] * by_label(y, p, h) for y in range(3)) for p, h in zip(chances, states, strict=True)
        ],
    }  # fmt: skip
    for labels, parts in wanted.items():
        dk.make_statistics("fisher", logistic, data, tmp_path / f"{labels}.safetensors", labels=labels, device="cpu")
        found = families.load_file(tmp_path / f"{labels}.safetensors")["score.weight"]
        np.testing.assert_allclose(found, np.mean(parts, 0), rtol=1e-4)


def test_drawn_labels_are_right_on_average(logistic, tmp_path):
    """The mean over many seeds is the exact expectation; one seed gives one result."""
    (tmp_path / "many.jsonl").write_text("\n".join([json.dumps({"text": "w3 w4"})] * 300))
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "w3 w4"}))
    found = {}
    for name, labels, data in (
        ("drawn", "sampled", "many"), ("again", "sampled", "many"), ("exact", "exact", "one")
    ):  # fmt: skip
        out = tmp_path / f"{name}.safetensors"
        dk.make_statistics("fisher", logistic, tmp_path / f"{data}.jsonl", out, labels=labels, device="cpu")
        found[name] = families.load_file(out)["score.weight"]
    np.testing.assert_allclose(found["drawn"], found["exact"], rtol=0.3)
    assert np.array_equal(found["drawn"], found["again"])


def test_fisher_of_a_regressor(tmp_path):
    import transformers as t

    from conftest import _tokenizer

    torch.manual_seed(2)
    config = t.BertConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    model = t.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    _tokenizer(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"w{i} w9", "label": i / 4}) for i in range(5)))
    found = {}
    for labels in ("empirical", "exact"):
        dk.make_statistics(
            "fisher", tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / f"{labels}.safetensors", labels=labels,
            device="cpu",
        )  # fmt: skip
        found[labels] = families.load_file(tmp_path / f"{labels}.safetensors")["classifier.bias"]
    with torch.no_grad():  # w0, w1 and w2 are no words of the tokenizer's
        values = [float(model(input_ids=torch.tensor([[i, 9]])).logits) for i in (0, 0, 0, 3, 4)]
    assert found["exact"] == pytest.approx([1.0])  # the prediction's derivative by the bias is 1
    off = [i / 4 - v for i, v in enumerate(values)]
    assert found["empirical"] == pytest.approx([np.mean(np.square(off))], rel=1e-4)


# --- interruptions


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_an_interrupted_pass_goes_on_to_the_same_bytes(real, data, tmp_path, kind, dare, monkeypatch):
    options = {} if kind == "fisher" else {"batch_size": 2}
    make(kind, real, "m0", data, tmp_path / "whole.safetensors", **options)
    from darekit.statistics import running

    out = tmp_path / "out.safetensors"
    calls = []

    def stop(done, total):
        calls.append(done)
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(kind, real, "m0", data, out, progress=stop, **options)
    assert not out.exists() and (tmp_path / ".out.safetensors.darekit-partial").exists()
    with pytest.raises(DarekitError, match=r"is not this one .data was"):
        other = tmp_path / "other.jsonl"
        other.write_text("\n".join(data.read_text().splitlines()[1:]))
        make(kind, real, "m0", other, out, resume=True, **options)
    said, seen = [], []
    monkeypatch.setattr(running, "SAVE_SECONDS", 0.0)  # and with a saving after every batch
    monkeypatch.setattr(running, "SAVE_SHARE", 0)
    make(
        kind, real, "m0", data, out, resume=True, say=said.append, progress=lambda done, _: seen.append(done), **options
    )
    assert seen[0] == calls[-1] >= 2 and any("continuing after" in line for line in said)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_a_bad_row_stops_the_pass_and_keeps_what_was_seen(logistic, tmp_path):
    rows = [*LABELLED[:3], {"text": "w3", "label": 7}, LABELLED[3]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "f.safetensors"
    with pytest.raises(
        DataError,
        match=r"rows.jsonl:4: label 7, expected a number from 0 to 2.*Kept for --resume: the first 3 examples",
    ):
        dk.make_statistics("fisher", logistic, tmp_path / "rows.jsonl", out, device="cpu")
    assert not out.exists()
    said = []
    with pytest.raises(DataError, match=r"rows.jsonl:4"):
        dk.make_statistics(
            "fisher", logistic, tmp_path / "rows.jsonl", out, device="cpu", resume=True, say=said.append
        )  # fmt: skip
    assert said == ["continuing after 3 of 5 examples"]


def test_weights_that_are_no_numbers(real, data, tmp_path):
    broken = families.copy(real.path / "m0", tmp_path / "broken")
    (file,) = broken.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-64:] = b"\xff" * 64  # NaN in every format
    file.write_bytes(raw)
    for kind in ("fisher", "gram"):
        with pytest.raises(DataError, match=r"NaN"):
            dk.make_statistics(kind, broken, data, tmp_path / f"{kind}.safetensors", device="cpu")


# --- from the command to the merged model


def recipe_with(real, tmp_path, method, kind, **keys):
    entries = [{"model": str(real.path / f"m{k}"), "stats": f"m{k}.{kind}.safetensors"} for k in range(2)]
    path = tmp_path / "recipe.yaml"
    path.write_text(
        json.dumps({"base_model": str(real.path / "base"), "models": entries, "merge_method": method, **keys})
    )
    return path


def expected(real, tmp_path, kind, name):
    """The formula, from the files alone."""
    files = [open_statistics(tmp_path / f"m{k}.{kind}.safetensors") for k in range(2)]
    tensors = [families.load(real.path / f"m{k}")[name].astype(np.float64) for k in range(2)]
    stored = [families.load_file(tmp_path / f"m{k}.{kind}.safetensors") for k in range(2)]
    for file in files:
        file.close()
    if any(name not in file.tensors for file in files):
        return np.mean(tensors, 0)
    values = [s[f.tensors[name].name].astype(np.float64) for s, f in zip(stored, files, strict=True)]
    if kind == "fisher":
        return sum((v + 1e-12) * t for v, t in zip(values, tensors, strict=True)) / sum(v + 1e-12 for v in values)
    values = [v / f.rows[name] for v, f in zip(values, files, strict=True)]
    drawn = [0.7 * v + (0.3 * np.diag(np.diag(v)) + 0.01 * np.diag(v).mean() * np.eye(len(v))) for v in values]
    turned = name in files[0].transposed
    tensors = [t.T if turned else t for t in tensors]
    found = sum(t @ v for t, v in zip(tensors, drawn, strict=True)) @ np.linalg.inv(sum(drawn))
    return found.T if turned else found


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_from_the_command_to_the_merged_model(real, data, tmp_path, dare, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    for k in range(2):
        lines = data.read_text().splitlines()
        (tmp_path / f"rows{k}.jsonl").write_text("\n".join(lines[k : k + 4]))
        done = dare(
            "stats", kind, real.path / f"m{k}", "--data", f"rows{k}.jsonl", "--out", f"m{k}.{kind}.safetensors",
            "--device", "cpu", "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        assert done.data["examples"] == 4 and done.data["kind"] == kind
    method = {"fisher": "fisher", "gram": "regmean"}[kind]
    parameters = {"fisher": {"minimal": 1e-12}, "gram": {"off_diagonal": 0.7, "ridge": 0.01}}[kind]
    path = recipe_with(real, tmp_path, method, kind, parameters=parameters, dtype="float32")
    plan = dare("merge", path, "out", "--dry-run", "--json")
    assert plan.code == 0 and plan.data["peak_memory_bytes"] > 0
    done = dare("merge", path, "out")
    assert done.code == 0, done.err
    out, base = families.load("out"), families.load(real.path / "base")
    far = []
    for name, values in out.items():
        wanted = expected(real, tmp_path, kind, name)
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=2e-6, err_msg=name)
        average = np.mean([families.load(real.path / f"m{k}")[name].astype(np.float64) for k in range(2)], 0)
        far.append(float(np.abs(values - average).max()))
    assert max(far) > 1e-4 and set(out) == set(base)  # the statistics do decide
    lock = json.loads((tmp_path / "out" / "darekit.lock.json").read_text())
    assert [entry["kind"] for entry in lock["statistics"]] == [kind, kind]
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
    model = real.cls.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.arange(3, 11)[None]).logits).all()
    for sparsifier in SPARSIFIERS:
        done = dare(
            "merge", path, sparsifier, "--set", "sparsify={method: " + sparsifier + ", drop_rate: 0.5}", "--seed", 3
        )
        assert done.code == 0, done.err
        sparse = families.load(tmp_path / sparsifier)
        assert any(not np.array_equal(sparse[name], out[name]) for name in out)


# --- what is refused


@pytest.fixture(scope="session")
def made(tmp_path_factory, llamas):
    """Statistics files by hand for the hand-made family: no torch in them."""
    from darekit.checkpoints import open_checkpoint, sample_digest
    from darekit.inputs.statistics import FORMAT, write_statistics

    path = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    for k in range(3):
        checkpoint = open_checkpoint(llamas.path / f"m{k}")
        digest = sample_digest(checkpoint).hex()
        checkpoint.close()
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        document = {"format": FORMAT, "model": f"m{k}", "model_digest": digest, "examples": 1, "tokens": 9}
        values = {name: rng.random(shape).astype(np.float32) for name, shape in shapes.items()}
        write_statistics(
            path / f"m{k}.fisher.safetensors", shapes, values.__getitem__,
            document | {"kind": "fisher", "norm": 1.0, "mean": 0.5},
        )  # fmt: skip
        sizes = {name: shape[1] for name, shape in shapes.items() if "proj" in name}
        grams = {name: np.cov(rng.normal(size=(size, 3 * size))).astype(np.float32) for name, size in sizes.items()}
        write_statistics(
            path / f"m{k}.gram.safetensors", {name: gram.shape for name, gram in grams.items()}, grams.__getitem__,
            document | {"kind": "gram", "rows": dict.fromkeys(grams, 9), "same_input": {}, "transposed": []},
        )  # fmt: skip
    return path


def informed(llamas, made, method="fisher", kind="fisher", **keys):
    recipe = families.recipe(llamas.path, merge_method=method, **keys)
    for k, entry in enumerate(recipe["models"]):
        entry["stats"] = str(made / f"m{k}.{kind}.safetensors")
    return recipe


def respelled(source, target, change, values=None):
    """A statistics file with its document (and one tensor's values) changed."""
    raw = source.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    document = json.loads(header["__metadata__"]["darekit_statistics"])
    change(document, header)
    header["__metadata__"]["darekit_statistics"] = json.dumps(document)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = bytearray(raw[8 + size :])
    if values is not None:
        body[:4] = np.float32(values).tobytes()
    target.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return target


def nothing(document, header):
    pass


def test_statistics_of_another_model(llamas, made, tmp_path):
    recipe = informed(llamas, made)
    stats = [entry["stats"] for entry in recipe["models"]]
    recipe["models"][0]["stats"], recipe["models"][1]["stats"] = stats[1], stats[0]
    with pytest.raises(HomologyError, match=r"m1.fisher.safetensors was not made with .*m0: .* are the files swapped"):
        dk.merge(recipe, tmp_path / "out")
    recipe["models"][0]["stats"] = str(
        respelled(made / "m0.fisher.safetensors", tmp_path / "x.safetensors", lambda d, h: d.update(model_digest="ab"))
    )
    with pytest.raises(HomologyError, match="whose sample digest is ab"):
        dk.merge(recipe, tmp_path / "out")


def test_statistics_of_the_other_kind(llamas, made, tmp_path):
    with pytest.raises(PlanError, match=r"gram statistics, but fisher needs fisher: run `dare stats fisher"):
        dk.merge(informed(llamas, made, "fisher", "gram"), tmp_path / "out")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_values_that_no_statistics_have(llamas, made, tmp_path, kind, value):
    recipe = informed(llamas, made, {"fisher": "fisher", "gram": "regmean"}[kind], kind)
    spoilt = respelled(made / f"m1.{kind}.safetensors", tmp_path / "x.safetensors", nothing, value)
    recipe["models"][1]["stats"] = str(spoilt)
    with pytest.raises(DataError, match=r"(Fisher|Gram) of .*(NaN|negative)"):
        dk.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shapes_that_do_not_fit(llamas, made, tmp_path):
    def swap(document, header):
        a, b = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
        header[a], header[b] = header[b], header[a]

    for kind, method in (("fisher", "fisher"), ("gram", "regmean")):
        recipe = informed(llamas, made, method, kind)
        recipe["models"][2]["stats"] = str(
            respelled(made / f"m2.{kind}.safetensors", tmp_path / f"{kind}.safetensors", swap)
        )
        with pytest.raises(HomologyError, match=r"for model\.layers\.0\.mlp\.\w+_proj\.weight, which is .*expected"):
            dk.merge(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d, h: d.update(format="darekit-statistics-2"), "from a later darekit"),
        (lambda d, h: d.update(kind="hessian"), "expected darekit-statistics-1 and fisher or gram"),
        (lambda d, h: d.pop("model_digest"), "is damaged"),
        (lambda d, h: d.update(rows={"x": "many"}), "is damaged"),
        (lambda d, h: d.update(same_input={"a": "b"}), "is damaged"),
        (lambda d, h: d.update(norm=-1.0), "is damaged"),
    ],
)
def test_damaged_documents(made, tmp_path, change, says):
    path = respelled(made / "m0.fisher.safetensors", tmp_path / "x.safetensors", change)
    with pytest.raises(DarekitError, match=says):
        open_statistics(path)


def test_files_that_are_no_statistics(llamas, made, tmp_path):
    recipe = informed(llamas, made)
    for found, says in (
        ("nowhere.safetensors", "there is no statistics file 'nowhere.safetensors'"),
        (str(llamas.path / "m0" / "model.safetensors"), "holds no statistics"),
        (str(llamas.path / "m0"), "is a directory"),
    ):
        recipe["models"][0]["stats"] = found
        with pytest.raises(DarekitError, match=says):
            dk.merge(recipe, tmp_path / "out")
    with pytest.raises(DarekitError, match="holds statistics of a model and is not a model itself"):
        dk.merge(
            {"models": [str(made / "m0.fisher.safetensors")], "merge_method": "linear"}, tmp_path / "out"
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda r: r["models"][1].pop("stats"),
            r"m1 has no stats, and fisher needs them for every model: run `dare st",
        ),
        (lambda r: r.update(merge_method="ties"), "ties uses no statistics, only fisher and regmean do"),
        (lambda r: r["models"][0].update(stats=3), "expected a file made by `dare stats fisher`"),
        (lambda r: r["models"][0].update(statistics="x"), "a model's statistics file is its `stats:`"),
        (lambda r: r.update(stats="x"), "each model has its own"),
        (lambda r: r["models"][0].update(parameters={"weight": -1}), "is negative, but fisher is a mean"),
        (lambda r: r.update(parameters={"off_diagonal": 0.9}), "parameter of regmean, not of fisher"),
        (lambda r: r.update(parameters={"lambda": 0.9}), "lambda"),
    ],
)
def test_recipes_that_cannot_be(llamas, made, change, says):
    recipe = informed(llamas, made)
    change(recipe)
    with pytest.raises(RecipeError, match=says):
        dk.read_recipe(recipe)


def test_no_weight_is_left(llamas, made, tmp_path):
    recipe = informed(llamas, made, parameters={"weight": [{"filter": "q_proj", "value": 0}]})
    with pytest.raises(PlanError, match=r"all weights of model\.layers\.0\.self_attn\.q_proj\.weight are 0"):
        dk.merge(recipe, tmp_path / "out")


def test_the_plan_says_what_is_averaged_and_when_minimal_decides(llamas, made):
    notes = dk.plan(informed(llamas, made, "regmean", "gram")).notes
    assert any("14 tensors have a Gram matrix; the other 7 are averaged" in note for note in notes), notes
    notes = dk.plan(informed(llamas, made, parameters={"minimal": 2.0})).notes
    assert sum("less than minimal (2)" in note for note in notes) == 3
    assert not any("minimal" in note for note in dk.plan(informed(llamas, made)).notes)


def test_without_a_base_and_with_one(llamas, made, tmp_path):
    for method, kind in (("fisher", "fisher"), ("regmean", "gram")):
        recipe = informed(llamas, made, method, kind, dtype="float32")
        dk.merge(recipe, tmp_path / f"{kind}-with")
        del recipe["base_model"]
        dk.merge(recipe, tmp_path / f"{kind}-without")
        one, other = families.load(tmp_path / f"{kind}-with"), families.load(tmp_path / f"{kind}-without")
        for name, values in one.items():
            np.testing.assert_allclose(values, other[name], rtol=1e-5, atol=1e-6)


def test_the_merged_bytes_do_not_depend_on_threads_or_a_resume(llamas, made, tmp_path):
    for method, kind in (("fisher", "fisher"), ("regmean", "gram")):
        recipe = informed(llamas, made, method, kind, sparsify={"method": "magnitude", "drop_rate": 0.5})
        for threads in (1, 3):
            dk.merge(recipe, tmp_path / f"{kind}{threads}", threads=threads)
        families.same(families.load(tmp_path / f"{kind}1"), families.load(tmp_path / f"{kind}3"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "x.bin"], "statistics are a .safetensors file"),
        (["--out", "there.safetensors"], "exists; choose another name, or replace it with --overwrite"),
        (["--out", "model.safetensors", "--overwrite"], "holds no statistics .is it a model"),
        (["--out", "x.safetensors", "--data", "nowhere.jsonl"], "is not a file"),
        (["--out", "x.safetensors", "--data", "empty.jsonl"], "no usable row"),
        (["--out", "x.safetensors", "--device", "abacus"], "no device 'abacus'"),
        (["--out", "x.safetensors", "--dtype", "int3"], "dtype 'int3' is not a floating-point dtype in torch"),
    ],
)
def test_mistakes_at_the_command(llamas, made, tmp_path, monkeypatch, dare, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "w3 w4"}\n')
    (tmp_path / "empty.jsonl").write_text('{"tekst": "w3 w4"}\n')
    (tmp_path / "there.safetensors").write_bytes((made / "m0.gram.safetensors").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((llamas.path / "m0" / "model.safetensors").read_bytes())
    data = [] if "--data" in arguments else ["--data", "rows.jsonl"]
    done = dare("stats", "gram", llamas.path / "m0", *data, *arguments)
    assert done.code == 1 and says.replace(".is", "(is") in done.err, done.err


def test_a_model_without_a_tokenizer_and_a_recipe(llamas, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "w3 w4"}\n')
    for model, says in ((llamas.path / "m0", "has no tokenizer"), ("merge.yaml", "is a recipe")):
        with pytest.raises(DarekitError, match=says):
            dk.make_statistics("fisher", model, tmp_path / "rows.jsonl", tmp_path / "f.safetensors", device="cpu")


def test_ctrl_c_waits_for_the_end_of_a_batch(real, data, tmp_path):
    import signal

    out, before = tmp_path / "f.safetensors", signal.getsignal(signal.SIGINT)

    def press(done, total):
        if done == 1:
            signal.raise_signal(signal.SIGINT)  # does not raise here: the batch that begins now is still seen

    with pytest.raises(KeyboardInterrupt):
        make("fisher", real, "m0", data, out, progress=press)
    said = []
    make("fisher", real, "m0", data, out, resume=True, say=said.append)
    assert said[0] == "continuing after 2 of 5 examples"
    assert signal.getsignal(signal.SIGINT) is before


def test_half_an_example_is_never_kept(logistic, tmp_path, monkeypatch):
    """Out of memory in the middle of a backward pass: the sums hold a part of an example then."""
    from darekit.statistics.passes import FisherPass

    class Exploding:
        requires_grad = True

        def detach(self):
            return torch.zeros(())

        def backward(self, **options):
            raise MemoryError("no more")

    seen = FisherPass._log_likelihoods
    monkeypatch.setattr(
        FisherPass, "_log_likelihoods",
        lambda self, example, index: [(1.0, Exploding())] if index == 2 else seen(self, example, index),
    )  # fmt: skip
    with pytest.raises(DataError, match="out of memory while making fisher statistics"):
        dk.make_statistics("fisher", logistic, data_of(tmp_path, "bert"), tmp_path / "f.safetensors", device="cpu")
    assert list(tmp_path.glob("*.safetensors")) == list(tmp_path.glob(".*")) == []


def test_statistics_files_serve_tensors_in_memory_too(real, data, tmp_path):
    """Transposed layers among them: the file knows them."""
    for kind, method in (("fisher", dk.fisher(minimal=1e-12)), ("gram", dk.regmean(off_diagonal=0.7, ridge=0.01))):
        for k in range(2):
            make(kind, real, f"m{k}", data, tmp_path / f"m{k}.{kind}.safetensors")
        models = [families.load(real.path / f"m{k}") for k in range(2)]
        files = [tmp_path / f"m{k}.{kind}.safetensors" for k in range(2)]
        found = dk.merge_tensors(None, models, method=method, statistics=files, dtype="float32")
        for name, values in found.items():
            np.testing.assert_allclose(values, expected(real, tmp_path, kind, name), rtol=1e-5, atol=2e-6)
    with pytest.raises(HomologyError, match="are the files swapped"):
        dk.merge_tensors(None, models[::-1], method=method, statistics=files)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_where_a_model_is_not_finite_the_base_stays(method):
    rng = np.random.default_rng(20)
    base, models = rng.normal(size=(30, 20)).astype(np.float32), rng.normal(size=(2, 30, 20)).astype(np.float32)
    models[1, 4, 5] = np.nan
    statistics = (
        rng.random((2, 30, 20)).astype(np.float32) if method == "fisher" else [np.cov(rng.normal(size=(20, 50)))] * 2
    )
    with pytest.raises(DataError, match="NaN or Inf in the input"):
        merged(base, models, statistics, dk.merge_method(method))
    found = merged(base, models, statistics, dk.merge_method(method), allow_nonfinite=True)
    assert np.isfinite(found).all() and found[4, 5] == base[4, 5]
    assert np.count_nonzero(found == base) < 5


@pytest.mark.parametrize("method", ["fisher", "regmean"])
@pytest.mark.parametrize("vocab", ["base", "pad"])
def test_vocabularies_that_differ(tmp_path, method, vocab):
    """Rows that all have are merged by their statistics; those that only one has are that one's."""
    from darekit.checkpoints import open_checkpoint, sample_digest
    from darekit.inputs.statistics import FORMAT, write_statistics

    rng = np.random.default_rng(21)
    kind = {"fisher": "fisher", "regmean": "gram"}[method]
    name = "lm_head.weight"
    rows, values, tensors = {"base": 8, "m0": 8, "m1": 10}, {}, {}
    for model, count in rows.items():
        tensors[model] = rng.normal(size=(count, 6)).astype(np.float32)
        embedding = {"model.embed_tokens.weight": tensors[model] * 2}
        families.save(tmp_path / model, {name: tensors[model], **embedding}, families.config(vocab=count))
        values[model] = (rng.random((count, 6)) if kind == "fisher" else np.cov(rng.normal(size=(6, 30)))).astype("f4")
        checkpoint = open_checkpoint(tmp_path / model)
        document = {"format": FORMAT, "kind": kind, "model_digest": sample_digest(checkpoint).hex(), "rows": {name: 7}}
        checkpoint.close()
        write_statistics(
            tmp_path / f"{model}.safetensors", {name: values[model].shape}, lambda _, m=model: values[m], document
        )  # fmt: skip
    recipe = families.recipe(tmp_path, 2, merge_method=method, vocab=vocab)
    for k, entry in enumerate(recipe["models"]):
        entry["stats"] = str(tmp_path / f"m{k}.safetensors")
    dk.merge(recipe, tmp_path / "out", force=True)
    found = families.load(tmp_path / "out")[name]
    wanted = dk.merge_tensors(
        {name: tensors["base"]}, [{name: tensors["m0"]}, {name: tensors["m1"][:8]}], method=dk.merge_method(method),
        statistics=[{name: values["m0"]}, {name: values["m1"][:8] if kind == "fisher" else values["m1"]}],
    )[name]  # fmt: skip
    np.testing.assert_allclose(found[:8], wanted, rtol=1e-6, atol=1e-7)
    assert found.shape[0] == {"base": 8, "pad": 10}[vocab]
    if vocab == "pad":
        assert np.array_equal(found[8:], tensors["m1"][8:])


def test_the_plan_counts_matrices_once_and_tiles_per_thread(llamas, made, monkeypatch):
    from darekit.engine import costs

    plan = dk.plan(informed(llamas, made, "regmean", "gram"))
    alike = plan.peak_memory(4, 65536)
    monkeypatch.setattr(costs, "HEAVY", 0)
    alone = plan.peak_memory(4, 65536)
    assert alone < alike  # the largest matrix is then in memory once, not once for each thread
    largest = max(step.shape[1] for step in plan.steps if step.statistics)
    assert alone - costs.INTERPRETER_BYTES > 3 * 8 * largest**2
