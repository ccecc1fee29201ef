# SPDX-License-Identifier: Apache-2.0
"""Every sparsifier before every merge method, tiled and threaded, equals the formulas bit for bit."""

from functools import partial

import numpy as np
import pytest

import darekit as dk
import oracle
from darekit import testing
from darekit.dtypes import FLOAT_DTYPES
from darekit.engine import execution, tiles
from darekit.engine.selection import Select
from darekit.kernels import surveys
from darekit.methods import MERGE_METHODS, SPARSIFIERS

SIZES = (0, 1, 63, 64, 65, 1023, 1024, 1025)
SHAPES = (*((n,) for n in SIZES), (7, 33), (3, 1), (130, 517), (2, 5, 64))
SPARSIFY = {
    "none": None,
    "dare": ("dare", {"drop_rate": 0.7}),
    "dare_l1": ("dare", {"drop_rate": 0.7, "rescale": "l1"}),
    "dare_q": ("dare", {"drop_rate": 0.7, "q": 0.45}),
    "drop_only": ("drop_only", {"drop_rate": 0.9}),
    "magnitude": ("magnitude", {"drop_rate": 0.8}),
    "magnitude_rescaled": ("magnitude", {"drop_rate": 0.8, "rescale": "paper"}),
    "magnitude_l1": ("magnitude", {"drop_rate": 0.8, "rescale": "l1"}),
    "della": ("della", {"drop_rate": 0.6, "window": 0.2}),
    "della_l1": ("della", {"drop_rate": 0.6, "window": 0.2, "rescale": "l1"}),
    "breadcrumbs": ("breadcrumbs", {"drop_rate": 0.6, "gamma": 0.1}),
}
METHODS = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.5},
    "ties": {"keep": 0.3, "lambda": 1.2},
    "ties_sum": {"normalize": False},
    "slerp": {"t": 0.3},
    "nearswap": {"t": 1e-4},
    "sce": {"select_topk": 0.3},
}
# A method without a row above is held to its formula with its defaults.
SPARSIFY |= {
    n: (n, {"drop_rate": 0.7}) for n in SPARSIFIERS if all(row is None or row[0] != n for row in SPARSIFY.values())
}
METHODS |= {n: {} for n in MERGE_METHODS if n not in METHODS}


def statistics_of(method, base):
    """What a method must know of three models beside their weights: name -> array, one dict of each."""
    rng = np.random.default_rng(99)
    match MERGE_METHODS[method].statistics:
        case "fisher":
            return [{n: (rng.random(b.shape) ** 4).astype(np.float32) for n, b in base.items()} for _ in SEEDS]
        case "gram":
            sizes = {n: b.shape[1] for n, b in base.items() if b.ndim == 2}
            return [
                {n: np.cov(rng.normal(size=(size, 2 * size + 9))).reshape(size, size).astype(np.float32)
                 for n, size in sizes.items()}
                for _ in SEEDS
            ]  # fmt: skip


SEEDS = (11, 22, 33)
WEIGHTS = (1.0, 0.7, 0.3)


def spec_of(sparsify):
    if sparsify is None:
        return None
    kind, parameters = sparsify
    return dk.sparsifier(kind, **parameters)


def same_bits(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert np.array_equal(oracle.raw_of(found), oracle.raw_of(expected))


def test_the_typed_functions_are_the_table():
    for name, entry in SPARSIFIERS.items():
        if name not in dk.__all__:
            continue
        typed = getattr(dk, name)(0.5)
        assert (typed.method, typed.parameters) == (name, {"drop_rate": 0.5} | {
            p.name: p.default for p in entry.parameters.values() if p.default is not None
        })  # fmt: skip
    for name, entry in MERGE_METHODS.items():
        if name not in dk.__all__:
            continue
        required = {p.name: 0.5 for p in entry.parameters.values() if p.default is None}
        defaults = {p.name: p.default for p in entry.parameters.values()}
        assert getattr(dk, name)(**required) == dk.merge_method(name, **defaults | required)


def subject_of(method, parameters, sparsify=None):
    """What `darekit.testing` checks."""
    needed = MERGE_METHODS[method].statistics
    return testing.Subject(sparsify, (method, parameters), partial(statistics_of, method) if needed else None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsify", SPARSIFY)
def test_every_combination_equals_the_formulas(sparsify, method):
    testing.equals_formula(subject_of(method.removesuffix("_sum"), METHODS[method], SPARSIFY[sparsify]))


BUILT_IN = [
    *(testing.Subject(sparsify=row) for row in SPARSIFY.values() if row),
    *(subject_of(method.removesuffix("_sum"), parameters) for method, parameters in METHODS.items()),
]


def checks():
    """Those of a method's first row always, of its others in `make check`."""
    seen = set()
    for one in BUILT_IN:
        found = testing.checks_of(one)
        marks = [pytest.mark.check] if found[0].method in seen else []
        seen.add(found[0].method)
        yield from (pytest.param(check, marks=marks, id=f"{check}-{len(seen)}") for check in found)


@pytest.mark.parametrize("check", [*checks()])
def test_what_every_method_must_do(check):
    check()


@pytest.mark.parametrize(("rate", "window"), [(0.5, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("number", [np.float32, np.float64])
def test_della_at_the_ends_of_its_window_warns_of_nothing(rate, window, number):
    """The smallest of each row is never kept, so its factor is Inf: times a delta of 0 it made NaN, and a warning."""
    deltas = {"w": np.arange(12, dtype=number).reshape(3, 4)}
    merged = dk.merge_tensors({"w": np.zeros((3, 4), number)}, [deltas], sparsify=dk.della(rate, window=window, seed=1))
    assert np.isfinite(merged["w"]).all() and not merged["w"][:, 0].any()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("sparsify", ["none", "dare", "magnitude", "della"])
def test_every_number_format(dtype, sparsify):
    rng = np.random.default_rng(1)
    base, models = oracle.family(rng, (37, 129), dtype)
    merged = dk.merge_tensors(
        {"w": base}, [{"w": m} for m in models], sparsify=spec_of(SPARSIFY[sparsify]), method=dk.ties(keep=0.5),
        seeds=SEEDS,
    )["w"]  # fmt: skip
    expected = oracle.merge("w", base, models, seeds=SEEDS, sparsify=SPARSIFY[sparsify], method="ties", keep=0.5)
    same_bits(merged, expected)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_the_fast_lane_gives_way_where_a_value_is_not_finite(method):
    rng = np.random.default_rng(11)
    base, models = oracle.family(rng, 600_000, "BF16")
    at = [5, 150_000, 599_999]
    spoilt = models[1].copy()
    spoilt[at] = np.nan
    arguments = {"sparsify": dk.dare(0.5), "method": dk.merge_method(method), "seeds": SEEDS, "threads": 2}
    whole = dk.merge_tensors({"w": base}, [{"w": m} for m in models], **arguments)["w"]
    found = dk.merge_tensors(
        {"w": base}, [{"w": models[0]}, {"w": spoilt}, {"w": models[2]}], allow_nonfinite=True, **arguments
    )["w"]
    whole[at] = base[at]
    same_bits(found, whole)


def test_the_fast_lane_and_the_general_way_give_the_same_bits(monkeypatch):
    rng = np.random.default_rng(12)
    base, models = oracle.family(rng, (700, 1001), "BF16")
    for sparsify in (None, dk.dare(0.9), dk.drop_only(0.3), dk.magnitude(0.8), dk.breadcrumbs(0.8, gamma=0.1)):
        for method in (dk.linear(), dk.task_arithmetic(lambda_=0.3), dk.ties(), dk.ties(normalize=False)):
            arguments = {"sparsify": sparsify, "method": method, "weights": WEIGHTS, "seeds": SEEDS}
            with monkeypatch.context() as patch:
                patch.setattr(tiles, "fuse", lambda step, chains: None)
                general = dk.merge_tensors({"w": base}, [{"w": m} for m in models], **arguments)["w"]
            same_bits(dk.merge_tensors({"w": base}, [{"w": m} for m in models], **arguments)["w"], general)


@pytest.mark.parametrize("large", [False, True])
def test_the_fast_lane_without_a_base_and_for_one_model(large, monkeypatch):
    """Sums of models, and a model that is copied: zeros of both signs, and values whose difference is no BF16."""
    rng = np.random.default_rng(15)
    base, models = oracle.family(rng, (700, 1001), "BF16")
    models[0][0, :100], models[1][0, :100], base[1, :50] = -0.0, -0.0, -0.0
    if large:
        models[0][3, 5] = 2.0**127
    for method, weights in ((dk.linear(), WEIGHTS), (dk.linear(normalize=False), WEIGHTS), (dk.karcher(), None)):
        arguments = {"method": method, "weights": weights}
        fast = dk.merge_tensors(None, [{"w": m} for m in models], **arguments)["w"]
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "fuse", lambda step, chains: None)
            same_bits(dk.merge_tensors(None, [{"w": m} for m in models], **arguments)["w"], fast)
    for method in (dk.slerp(1.0), dk.linear(), dk.task_arithmetic()):
        same_bits(dk.merge_tensors({"w": base}, [{"w": models[0]}], method=method)["w"], models[0])


SCE = ({"select_topk": 0.1}, {"select_topk": 0.3, "floor": 0}, {"floor": 0}, {"select_topk": 0}, {"lambda": 0.7})


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("parameters", SCE)
def test_the_fast_lane_of_surveys_gives_the_same_bits_and_records(k, parameters, monkeypatch):
    """With and without the pass that adds up energies, and whether windows are found by sampling or not."""
    rng = np.random.default_rng(21)
    base, models = oracle.family(rng, (700, 1001), "BF16", k=k)
    for large in (True, False):
        monkeypatch.setattr(Select, "SAMPLE_FROM", 1 << 18 if large else 1 << 30)
        results = []
        for fast in (True, False):
            arguments = {"method": dk.merge_method("sce", **parameters), "seeds": SEEDS[:k]}
            with monkeypatch.context() as patch:
                records = recorded(patch)
                if not fast:
                    patch.setattr(tiles, "fuse_survey", lambda step, surveyor: None)
                    arguments["tile"] = 3000
                found = dk.merge_tensors({"w": base}, [{"w": m} for m in models], **arguments)
                results.append((found["w"], dict(records)))
        same_bits(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]


@pytest.mark.parametrize("coarse", [True, False])
def test_sums_of_squares_keep_their_digits_in_tiles_of_any_size(coarse):
    """float32 alone would lose one part in 20,000 of these: each square is 1 + 2^-6 + 2^-14, and all are alike."""
    count = 1 << 23
    base, raws = np.zeros(count, np.uint16), np.full((1, count), 0x3F81, np.uint16)
    scores = np.empty(count if coarse else 1024, np.float32)
    fine, found = np.zeros(1 << 15, np.uint32), np.zeros(2)
    work = np.empty((6, 1024), np.float32)
    above = surveys.count_variances_bf16(base, raws, (np.float32(1),), coarse, 0, fine, scores, found, work)
    assert above == 0 and found[0] == 0
    assert abs(found[1] / (count * (1 + 2**-7) ** 2) - 1) < 1e-5


def test_a_floor_below_tiny_squares_is_no_floor():
    """Squares of 1e-38 lie above a floor of 1e-40: models count by their energies, as without a floor."""
    base, models = oracle.family(np.random.default_rng(23), (65, 100), "BF16")
    base = np.zeros_like(base)
    models = [(1e-19 * k * np.sign(m.astype(np.float32))).astype(base.dtype) for k, m in enumerate(models, 1)]

    def found(floor):
        how = {"method": dk.sce(select_topk=0.5, floor=floor)}
        return dk.merge_tensors({"w": base}, [{"w": m} for m in models], **how)["w"]

    same_bits(found(1e-40), found(0))
    assert not np.array_equal(oracle.raw_of(found(1)), oracle.raw_of(found(0)))


def test_energies_are_added_up_only_where_they_matter(monkeypatch):
    """Below the floor models count alike, and nobody reads them once more to find out by how much."""
    rng = np.random.default_rng(22)
    base, models = oracle.family(rng, (300, 1001), "BF16")
    passes = []
    for floor in (1e6, 0, 1e-12):
        with monkeypatch.context() as patch:
            runs = recorded(patch, "bytes_read")
            dk.merge_tensors({"w": base}, [{"w": m} for m in models], method=dk.sce(select_topk=0.2, floor=floor))
        passes.append(runs["bytes_read"] / (4 * base.nbytes))
    assert passes[0] + 1 == passes[1] == passes[2]


def recorded(patch, name="records"):
    """What the engine says of the next merge: its tensors' records, or something else."""
    run, kept = execution.run, {}

    def watched(*arguments, **options):
        done = run(*arguments, **options)
        kept.update(done.records if name == "records" else {name: getattr(done, name)})
        return done

    patch.setattr(execution, "run", watched)
    return kept


@pytest.mark.parametrize("parameters", [{"select_topk": 0.3}, {"select_topk": 0.3, "floor": 0}])
def test_the_fast_lane_of_surveys_gives_way_where_a_value_is_not_finite(parameters):
    rng = np.random.default_rng(23)
    base, models = oracle.family(rng, 600_000, "BF16")
    spoilt = models[1].copy()
    spoilt[[5, 150_000, 599_999]] = np.nan, np.inf, -np.inf
    given = [{"w": models[0]}, {"w": spoilt}, {"w": models[2]}]
    arguments = {"method": dk.merge_method("sce", **parameters), "seeds": SEEDS, "allow_nonfinite": True}
    found, general = (dk.merge_tensors({"w": base}, given, tile=tile, **arguments)["w"] for tile in (65536, 5000))
    same_bits(found, general)
    assert np.array_equal(found[[5, 150_000, 599_999]], base[[5, 150_000, 599_999]])


def test_more_models_than_the_fast_lane_takes():
    rng = np.random.default_rng(13)
    base, models = oracle.family(rng, (130, 517), "BF16", k=9)
    weights, seeds = [1.0 + k / 7 for k in range(9)], list(range(9))
    arguments = {"sparsify": dk.dare(0.7), "method": dk.ties(), "weights": weights, "seeds": seeds}
    merged = dk.merge_tensors({"w": base}, [{"w": m} for m in models], **arguments)["w"]
    expected = oracle.merge(
        "w", base, models, seeds=seeds, sparsify=SPARSIFY["dare"], method="ties", weights=weights
    )  # fmt: skip
    same_bits(merged, expected)


def test_counting_gives_way_where_a_value_is_not_finite(monkeypatch):
    """NaN beyond the sampled pieces: the fast counting pass finds it, and the general way counts again."""
    monkeypatch.setattr(Select, "SAMPLE_FROM", 1000)
    rng = np.random.default_rng(14)
    base, models = oracle.family(rng, 600_000, "BF16")
    models[1][599_999] = np.nan
    arguments = {"method": dk.ties(keep=0.2), "seeds": SEEDS}
    found = dk.merge_tensors({"w": base}, [{"w": m} for m in models], allow_nonfinite=True, **arguments)["w"]
    for model in models:  # the element counts as unchanged in all of them
        model[599_999] = base[599_999]
    same_bits(found, oracle.merge("w", base, models, seeds=SEEDS, method="ties", keep=0.2))


@pytest.mark.parametrize("kind", SPARSIFIERS)
@pytest.mark.parametrize("dtype", ["F64", "F32"])
def test_tiles_that_are_no_whole_rows(kind, dtype):
    """65536 is no multiple of 1536, and 100 x 1536 is more than one tile."""
    rng = np.random.default_rng(10)
    base, (model,) = oracle.family(rng, (100, 1536), dtype, k=1)
    sparsify = (kind, {"drop_rate": 0.7})
    merged = dk.merge_tensors({"w": base}, [{"w": model}], sparsify=spec_of(sparsify), seeds=[5], threads=2)["w"]
    same_bits(merged, oracle.merge("w", base, [model], seeds=[5], sparsify=sparsify))


@pytest.mark.parametrize("sparsify", ["dare", "magnitude_l1", "breadcrumbs", "della_l1", "dare_l1"])
def test_tile_size_and_threads_do_not_matter(sparsify, monkeypatch):
    rng = np.random.default_rng(2)
    base, models = oracle.family(rng, (300, 777), "BF16")
    results = []
    for tile, threads in ((64, 1), (1000, 2), (65536, 7)):
        monkeypatch.setattr(tiles, "TILE", tile)
        results.append(
            dk.merge_tensors(
                {"w": base},
                [{"w": m} for m in models],
                sparsify=spec_of(SPARSIFY[sparsify]),
                method=dk.ties(keep=0.2),
                seeds=SEEDS,
                threads=threads,
            )["w"]
        )
    for other in results[1:]:
        same_bits(other, results[0])


def test_large_tensor_is_cut_into_spans_and_sampled(monkeypatch):
    # Small spans and samples stand in for large tensors: the same code paths, in little memory.
    monkeypatch.setattr(execution, "SPAN", 65536)
    monkeypatch.setattr(Select, "SAMPLE_FROM", 1000)
    rng = np.random.default_rng(3)
    base, models = oracle.family(rng, (700, 500), "BF16")
    for sparsify in ("dare", "magnitude", "breadcrumbs"):
        merged = dk.merge_tensors(
            {"w": base}, [{"w": m} for m in models], sparsify=spec_of(SPARSIFY[sparsify]),
            method=dk.ties(keep=0.2), seeds=SEEDS, threads=3,
        )["w"]  # fmt: skip
        expected = oracle.merge("w", base, models, seeds=SEEDS, sparsify=SPARSIFY[sparsify], method="ties", keep=0.2)
        same_bits(merged, expected)


def test_finished_tensors_keep_no_leaves(monkeypatch):
    """72 bytes for each tile of each input: memory that would grow with the model."""
    monkeypatch.setattr(execution, "SPAN", 65536)
    jobs, finished = [], []
    end, record = execution.Job.end, execution.Job.record

    def ended(job):
        jobs.append(job)
        assert job._leaves
        return end(job)

    def recorded(job):
        found = record(job)
        finished.append(job)
        assert not job._leaves
        return found

    monkeypatch.setattr(execution.Job, "end", ended)
    monkeypatch.setattr(execution.Job, "record", recorded)
    base, models = oracle.family(np.random.default_rng(3), (300, 500), "BF16")
    dk.merge_tensors({"w": base}, [{"w": m} for m in models], sparsify=dk.dare(0.5, seed=1), seeds=SEEDS, threads=1)
    assert len(jobs) == 3 and finished == jobs[:1]


def test_selection_with_a_misleading_sample(monkeypatch):
    """The first tiles are unlike the rest, so the guess is wrong and a refining pass must put it right."""
    monkeypatch.setattr(Select, "SAMPLE_FROM", 1000)
    monkeypatch.setattr(tiles, "SAMPLED_PIECES", 1)
    monkeypatch.setattr(tiles, "TILE", 1024)
    rng = np.random.default_rng(4)
    base = np.zeros(50_000, np.float32)
    model = rng.normal(0, 1, 50_000).astype(np.float32)
    model[:1024] *= 1e-6
    for kind, parameters in (("magnitude", {"drop_rate": 0.5}), ("breadcrumbs", {"drop_rate": 0.5, "gamma": 0.2})):
        merged = dk.merge_tensors({"w": base}, [{"w": model}], sparsify=spec_of((kind, parameters)), seeds=[0])
        same_bits(merged["w"], oracle.merge("w", base, [model], seeds=[0], sparsify=(kind, parameters)))


def test_ties_among_equal_magnitudes_keep_exactly_k_and_the_lower_index():
    rng = np.random.default_rng(5)
    base = np.zeros((64, 64), np.float32)
    model = rng.choice(np.float32([-2, -1, 1, 2]), (64, 64))
    for rate in (0.1, 0.25, 0.5, 0.77, 0.999):
        kept = dk.merge_tensors({"w": base}, [{"w": model}], sparsify=dk.magnitude(rate))["w"]
        assert np.count_nonzero(kept) == 4096 - int(rate * 4096)
        for size in (1, 2):
            there = np.flatnonzero(np.abs(model) == size)
            survivors = np.flatnonzero(np.abs(kept) == size)
            assert np.array_equal(survivors, there[: survivors.size]), "the lower index survives"


def test_breadcrumbs_among_equals_keep_exactly_k_over_many_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 100)
    rng = np.random.default_rng(8)
    model = rng.choice(np.float32([-2, -1, 1, 2]), 5000)
    base = np.zeros(5000, np.float32)
    for rate, gamma in ((0.5, 0.1), (0.9, 0.1), (0.3, 0.3), (0.95, 0.0), (1.0, 0.5)):
        parameters = {"drop_rate": rate, "gamma": gamma}
        merged = dk.merge_tensors({"w": base}, [{"w": model}], sparsify=dk.breadcrumbs(rate, gamma=gamma))["w"]
        assert np.count_nonzero(merged) == 5000 - int(rate * 5000)
        same_bits(merged, oracle.merge("w", base, [model], seeds=[0], sparsify=("breadcrumbs", parameters)))


@pytest.mark.parametrize("kind", ["dare", "drop_only", "magnitude", "breadcrumbs"])
def test_drop_rates_zero_and_one(kind):
    rng = np.random.default_rng(9)
    base, (model,) = oracle.family(rng, (50, 41), "BF16", k=1)
    for rate, expected in ((0.0, model), (1.0, base)):
        merged = dk.merge_tensors({"w": base}, [{"w": model}], sparsify=dk.sparsifier(kind, rate))["w"]
        same_bits(merged, expected)


def test_trim_over_the_whole_model_equals_a_flat_vector():
    rng = np.random.default_rng(6)
    shapes = {"a.weight": (40, 50), "b.weight": (1000,), "c.weight": (8, 8)}
    base = {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    models = [
        {name: np.round(b + rng.normal(0, 1e-3 * (1 + i), b.shape), 3).astype(np.float32) for i, (name, b) in
         enumerate(base.items())}
        for _ in range(2)
    ]  # fmt: skip
    merged = dk.merge_tensors(base, models, method=dk.ties(keep=0.2, trim="model"))
    flat = [np.concatenate([(m[n] - base[n]).reshape(-1) for n in shapes]) for m in models]
    trimmed = []
    for vector in flat:
        order = np.argsort(-np.abs(vector), kind="stable")
        keep = np.zeros(vector.size, bool)
        keep[order[: int(0.2 * vector.size)]] = True
        trimmed.append(np.where(keep, vector, np.float32(0)))
    from darekit.methods.merging import ties

    expected = ties(np.array(trimmed), np.ones(2))
    origin = np.concatenate([base[n].reshape(-1) for n in shapes])
    found = np.concatenate([merged[n].reshape(-1) for n in shapes])
    assert np.array_equal(found, np.where(expected == 0, origin, origin + expected))


def test_trim_after_dare_follows_the_papers_order():
    rng = np.random.default_rng(7)
    base, models = oracle.family(rng, (100, 100), "F32")
    merged = dk.merge_tensors(
        {"w": base}, [{"w": m} for m in models], sparsify=dk.dare(0.5), method=dk.ties(keep=0.2), seeds=SEEDS
    )["w"]
    expected = oracle.merge(
        "w", base, models, seeds=SEEDS, sparsify=("dare", {"drop_rate": 0.5}), method="ties", keep=0.2
    )
    same_bits(merged, expected)


@pytest.mark.parametrize("rescale", ["paper", "l1", "none"])
def test_the_typed_dare_takes_every_rescale(rescale):
    """Its default q of 0 stands for no q at all."""
    base, model = {"w": np.zeros(4000, np.float32)}, {"w": np.ones(4000, np.float32)}
    merged = dk.merge_tensors(base, [model], sparsify=dk.dare(0.5, rescale=rescale), method="task_arithmetic")["w"]
    kept = merged[merged != 0]
    assert 1800 < kept.size < 2200
    expected = {"paper": 2.0, "l1": 4000 / kept.size, "none": 1.0}[rescale]
    assert np.allclose(kept, expected, rtol=1e-6)
