"""`inspect` with several models: against numpy on whole tensors, closed forms, vocabularies that differ, plots."""

import numpy as np
import pytest

import darekit as dk
import families
from darekit.analysis.inspection import Comparison


def family(path, deltas, *, kind=np.float32):
    """A base and one model for each list of deltas (name -> array)."""
    rng = np.random.default_rng(0)
    base = families.llama(rng, kind)
    families.save(path / "base", base, families.config())
    for k, own in enumerate(deltas):
        families.save(path / f"m{k}", {n: base[n] + own[n].astype(kind) for n in base}, families.config())
    return base


def random_deltas(count, seed=1):
    rng = np.random.default_rng(seed)
    shapes = {name: array.shape for name, array in families.llama(np.random.default_rng(0), np.float32).items()}
    return [{n: 1e-3 * rng.standard_normal(s) * (rng.random(s) < 0.7) for n, s in shapes.items()} for _ in range(count)]


def test_every_number_is_that_of_numpy_on_whole_tensors(tmp_path):
    base = family(tmp_path, random_deltas(3))
    names = [tmp_path / f"m{k}" for k in range(3)]
    found = dk.inspect(tmp_path / "base", *names)
    models = [families.load(name) for name in names]
    together = found.interference
    assert together.pairs == ((0, 1), (0, 2), (1, 2))

    def check(row, deltas):
        for (i, j), relation in zip(together.pairs, row.pairs, strict=True):
            x, y = deltas[i].astype(np.float64), deltas[j].astype(np.float64)
            product = np.sign(x) * np.sign(y)
            assert relation.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-12)
            assert relation.agreement == pytest.approx((product > 0).sum() / (product != 0).sum())
            assert relation.overlap == pytest.approx((product != 0).mean())
            assert relation.conflict == pytest.approx((product < 0).mean())
        every = np.stack(deltas).astype(np.float64)
        assert row.conflict == pytest.approx(((every > 0).any(0) & (every < 0).any(0)).mean())
        assert row.cancelled == pytest.approx(1 - np.abs(every.sum(0)).sum() / np.abs(every).sum())

    flat = {n: [(m[n] - base[n]).ravel() for m in models] for n in base}
    for row in together.tensors:
        check(row, flat[row.name])
    check(together.total, [np.concatenate([flat[n][k] for n in sorted(base)]) for k in range(3)])
    sizes = np.array([row.parameters for row in together.tensors])
    cosines = np.array([row.pairs[0].cosine for row in together.tensors])
    assert together.mean_cosine[0] == pytest.approx((sizes * cosines).sum() / sizes.sum())


def test_each_models_own_report_is_that_of_inspecting_it_alone(llamas):
    names = [llamas.path / f"m{k}" for k in range(3)]
    found = dk.inspect(llamas.path / "base", *names)
    assert isinstance(found, Comparison)
    assert found.models == tuple(dk.inspect(llamas.path / "base", name) for name in names)
    assert found == dk.inspect(llamas.path / "base", *names, threads=1)
    with pytest.raises(TypeError, match="at least one model"):
        dk.inspect(llamas.path / "base")


def test_closed_forms(tmp_path):
    (delta,) = random_deltas(1)
    even = {n: np.where(np.arange(d.size).reshape(d.shape) % 2 == 0, d, 0) for n, d in delta.items()}
    odd = {n: d - even[n] for n, d in delta.items()}
    family(tmp_path, [delta, {n: 2 * d for n, d in delta.items()}, {n: -d for n, d in delta.items()}, even, odd],
           kind=np.float64)  # fmt: skip

    def relation(i, j):
        found = dk.inspect(tmp_path / "base", tmp_path / f"m{i}", tmp_path / f"m{j}").interference
        return found.total.pairs[0], found

    twice, found = relation(0, 1)
    assert twice.cosine == pytest.approx(1) and twice.agreement == 1 and twice.conflict == 0
    assert found.total.cancelled == pytest.approx(0, abs=1e-9) and "the same model twice" in found.words[0]
    against, found = relation(0, 2)
    assert against.cosine == pytest.approx(-1) and against.agreement == 0 and against.conflict == against.overlap
    assert found.total.cancelled == pytest.approx(1, abs=1e-4) and "against each other" in found.words[0]
    apart, found = relation(3, 4)
    assert (apart.cosine, apart.agreement, apart.overlap) == (0, None, 0)
    assert found.total.cancelled == pytest.approx(0, abs=1e-9) and "do not affect" in found.words[0]
    # The words promise what independent deltas give.
    independent = tmp_path / "independent"
    rng = np.random.default_rng(5)
    family(independent, [{n: 1e-3 * rng.standard_normal(d.shape) for n, d in delta.items()} for _ in range(3)])
    found = dk.inspect(independent / "base", *(independent / f"m{k}" for k in range(3))).interference
    assert found.total.conflict == pytest.approx(1 - 2**-2, abs=0.01)
    assert found.total.cancelled == pytest.approx(1 - 3**-0.5, abs=0.01)
    assert found.total.chance_conflict == pytest.approx(0.75, abs=1e-3)
    assert "75 % and 42 %" in found.words[-1] and "nearly independent" in found.words[0]


def test_chance_counts_elements_that_a_model_left_alone_out(tmp_path):
    rng = np.random.default_rng(7)
    shapes = {n: d.shape for n, d in random_deltas(1)[0].items()}
    moved = [{n: rng.random(shape) < 0.5 for n, shape in shapes.items()} for _ in range(3)]
    family(tmp_path, [{n: m * 1e-3 * rng.standard_normal(m.shape) for n, m in one.items()} for one in moved])
    found = dk.inspect(tmp_path / "base", *(tmp_path / f"m{k}" for k in range(3))).interference
    # By hand: each element's probability, given who moved it.
    movers = np.concatenate([sum(one[n].astype(int) for one in moved).ravel() for n in shapes])
    by_hand = np.where(movers, 1 - 0.5 ** (movers - 1.0), 0).mean()
    assert found.total.chance_conflict == pytest.approx(by_hand, abs=2e-3)
    assert found.total.conflict == pytest.approx(
        found.total.chance_conflict, abs=0.01
    )  # 3/8 x 0.5 + 1/8 x 0.75, not 0.75
    assert found.total.cancelled == pytest.approx(found.total.chance_cancelled, abs=0.01)
    assert "28 % and 25 %" in found.words[-1]
    for tensor in found.tensors:
        m = sum(one[tensor.name].astype(int) for one in moved)
        assert tensor.chance_cancelled == pytest.approx(1 - np.sqrt(m).sum() / m.sum(), abs=2e-3)


def test_vocabularies_that_differ_are_compared_on_common_rows(tmp_path):
    rng = np.random.default_rng(0)
    base = families.llama(rng, np.float32)
    families.save(tmp_path / "base", base, families.config())
    for k, rows in enumerate((families.VOCAB, families.VOCAB + 3, families.VOCAB - 2)):
        tensors = {n: a + 1e-3 * rng.standard_normal(a.shape).astype(np.float32) for n, a in base.items()}
        for n in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[n] = np.resize(tensors[n], (rows, tensors[n].shape[1]))
        families.save(tmp_path / f"m{k}", tensors, families.config() | {"vocab_size": rows})
    names = [tmp_path / f"m{k}" for k in range(3)]
    found = dk.inspect(tmp_path / "base", *names)
    row = next(t for t in found.interference.tensors if t.name == "lm_head.weight")
    base_rows, models = base["lm_head.weight"], [families.load(n)["lm_head.weight"] for n in names]
    x, y = models[0][:-2] - base_rows[:-2], models[2] - base_rows[:-2]
    assert row.parameters == base_rows.size
    assert row.pairs[1].conflict == pytest.approx((np.sign(x) * np.sign(y) < 0).mean())
    assert [one.total.parameters for one in found.models] == [
        dk.inspect(tmp_path / "base", name).total.parameters for name in names
    ]  # fmt: skip


def test_the_histogram_counts_what_is_not_zero(llamas):
    found = dk.inspect(llamas.path / "base", llamas.path / "m0")
    base, model = families.load(llamas.path / "base"), families.load(llamas.path / "m0")
    delta = np.concatenate([(model[n].astype(np.float32) - base[n].astype(np.float32)).ravel() for n in base])
    size = np.abs(delta[delta != 0])
    histogram = found.histogram
    assert sum(histogram.counts) == size.size
    assert histogram.counts == tuple(np.histogram(size, np.array([*histogram.edges[:-1], np.inf]))[0])
    assert dk.inspect(llamas.path / "base", llamas.path / "base").histogram.counts == ()


def test_the_command_with_several_models_and_plots(llamas, dare, tmp_path):
    pytest.importorskip("matplotlib")
    names = [llamas.path / f"m{k}" for k in range(2)]
    done = dare("inspect", llamas.path / "base", *names, "--plot", tmp_path / "one", "--json")
    assert done.code == 0, done.err
    assert len(done.data["models"]) == 2 and len(done.data["interference"]["pairs"]) == 1
    drawn = {path.name for path in (tmp_path / "one").iterdir()}
    plots = {f"{name}.{kind}" for name in ("deltas", "r", "pairs", "conflict") for kind in ("png", "svg")}
    assert drawn == plots | {"inspection.json"}
    assert sorted(done.data["plots"]) == sorted(str(tmp_path / "one" / name) for name in plots)
    shown = dare("inspect", llamas.path / "base", *names)
    assert shown.out.startswith("ok: base looks like the base of all 2 models")
    assert "no two models pull against each other" in shown.out and "a plain sum cancels" in shown.out
    assert "cos A & B" in shown.out and "self_attn.q_proj" in shown.out and "layers.0" not in shown.out
    rows = dare("inspect", llamas.path / "base", *names, "--tensors").out
    assert all(f"{name} " in rows for name in llamas.base)
    svg = (tmp_path / "one" / "r.svg").read_text()
    assert "kind of tensor" in svg and "layer (other: outside the layers)" in svg and "self_attn.q_proj" in svg

    same = dare("inspect", llamas.path / "base", llamas.path / "base", "--plot", tmp_path / "same", "--json")
    assert same.code == 0 and same.data["total"]["zeros"] == 1
    assert {path.stem for path in (tmp_path / "same").iterdir()} == {"deltas", "r", "inspection"}


def test_models_whose_short_names_are_equal(tmp_path):
    from darekit.wording import distinct_labels

    assert distinct_labels(["x/a/m", "x/b/m", "x/n"]) == ["x/a/m", "x/b/m", "n"]
