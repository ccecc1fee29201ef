# SPDX-License-Identifier: Apache-2.0
"""Fisher and RegMean: against closed forms, against plain torch, and end to end through the command."""

import json
import math

import numpy as np
import pytest

import darekit as dk
import families
from darekit.errors import DataError
from darekit.methods.informed import NormalEquations, fisher, regmean
from darekit.statistics.files import open_statistics

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
    from darekit import tiles

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
