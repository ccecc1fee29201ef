# SPDX-License-Identifier: Apache-2.0
"""Do the checkpoints belong together? From headers, then from a sample of values, before a byte is written."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import darekit as dk
import families
from darekit.checkpoints import ArrayBytes, TensorInfo
from darekit.errors import DataError, HomologyError
from darekit.planning import homology
from darekit.planning.homology import TAU, Norms
from darekit.planning.matching import alignment
from darekit.planning.opening import open_plan
from darekit.recipe import read_recipe

BF16 = ml_dtypes.bfloat16


def pair(path, scale, *, seed=0):
    """A base and a model whose delta has the relative size `scale` in every tensor."""
    rng = np.random.default_rng(seed)
    base = families.llama(rng, np.float32)
    model = {}
    for name, array in base.items():
        noise = rng.normal(0, 1, array.shape)
        model[name] = (array + scale * np.linalg.norm(array) / np.linalg.norm(noise) * noise).astype(np.float32)
    families.save(path / "base", base, families.config(dtype="float32"))
    families.save(path / "m0", model, families.config(dtype="float32"))
    return path / "base", path / "m0"


@pytest.fixture
def stranger(tmp_path):
    """A model that was trained from other random weights."""
    rng = np.random.default_rng(0)
    for name in ("base", "m0"):
        families.save(tmp_path / name, families.llama(rng), families.config())
    return tmp_path


@pytest.mark.parametrize("keys", [{}, {"sparsify": {"method": "dare", "drop_rate": 0.0}},
                                  {"sparsify": {"method": "dare", "drop_rate": 0.1}},
                                  {"sparsify": {"method": "magnitude", "drop_rate": 0.9}},
                                  {"sparsify": {"method": "drop_only", "drop_rate": 0.9}}])  # fmt: skip
def test_a_wrong_base_is_refused_with_numbers_whatever_is_done(stranger, keys):
    with pytest.raises(HomologyError) as error:
        dk.merge(families.recipe(stranger, k=1, **keys), stranger / "out")
    message = str(error.value)
    assert "does not look like the base of" in message and "r = 1.4" in message  # sqrt 2 for independent weights
    assert "0.5" in message and "rule of thumb" in message and "--force" in message
    assert not (stranger / "out").exists()
    assert not [path for path in stranger.iterdir() if path.name not in ("base", "m0")]


def test_force_goes_on_and_still_says_it(stranger):
    report = dk.merge(families.recipe(stranger, k=1), stranger / "out", force=True)
    assert any("does not look like the base" in note for note in report.notes)
    assert (stranger / "out" / "config.json").exists()


def test_weights_are_exempt(stranger):
    dk.drop(stranger / "base", stranger / "m0", stranger / "out", drop_rate=0.9, on="weights")
    assert (stranger / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("r", "p", "said"),
    [
        (0.05, 0.9, None),  # rho 0.15
        (0.1, 0.7, None),  # rho 0.153
        (0.1, 0.9, "warning"),  # rho 0.3
        (0.01, 0.999, "warning"),  # rho 0.316
        (0.1, 0.99, "stop"),  # rho 0.995
        (0.4, 0.7, "stop"),  # rho 0.611
        (0.4, 0.0, None),  # large, but nothing is dropped
        (0.1, 1.0, None),  # everything dropped is the base: no perturbation
    ],
)
def test_thresholds_of_rho(tmp_path, r, p, said):
    base, model = pair(tmp_path, r)
    rho = r * np.sqrt(p / (1 - p)) if p < 1 else 0
    wanted = 0.04 / (0.04 + r * r)  # p_max at tau = 0.2
    if said == "stop":
        with pytest.raises(HomologyError, match=r"Too much of .* is dropped") as error:
            dk.drop(base, model, tmp_path / "out", drop_rate=p)
        message = str(error.value)
    else:
        report = dk.drop(base, model, tmp_path / "out", drop_rate=p)
        message = "\n".join(note for note in report.notes if "rho" in note)
    assert bool(message) == bool(said)
    if said:
        assert f"rho = {rho:.2f}" in message and f"r = {r:.3f}" in message and "rule of thumb" in message
        assert f"drop rate of {np.floor(wanted * 1000) / 1000:g}" in message


@pytest.mark.parametrize("method", ["drop_only", "magnitude"])
def test_only_a_rescaled_random_drop_is_judged_by_rho(tmp_path, method):
    base, model = pair(tmp_path, 0.1)
    report = dk.drop(base, model, tmp_path / "out", drop_rate=0.99, method=method)
    assert not any("rho" in note for note in report.notes)
    with pytest.raises(HomologyError, match="Too much"):
        dk.drop(base, model, tmp_path / "no", drop_rate=0.99, rescale="paper")
    report = dk.drop(base, model, tmp_path / "yes", drop_rate=0.99, rescale="none")
    assert not any("rho" in note for note in report.notes)


def test_only_what_is_dropped_is_judged(tmp_path):
    rng = np.random.default_rng(0)
    base = families.llama(rng, np.float32)
    model = families.tuned(rng, base)
    for name in base:
        if "mlp" not in name:
            model[name] = families.tuned(rng, {name: base[name]}, 0.1)[name]  # r = 2
    families.save(tmp_path / "base", base)
    families.save(tmp_path / "m0", model)
    rest = ["*self_attn*", "embeddings", "norms", "heads"]
    dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "out", drop_rate=0.9, keep_dense=rest)
    with pytest.raises(HomologyError):
        dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "no", drop_rate=0.9, keep_dense=["*mlp*"])


def test_rows_beyond_the_common_vocabulary_are_not_judged(tmp_path):
    rng = np.random.default_rng(0)
    base = {"model.embed_tokens.weight": rng.normal(0, 0.05, (50, 32)).astype(np.float32)}
    model = families.tuned(rng, base)
    extra = rng.normal(0, 9, (50, 32)).astype(np.float32)
    model = {name: np.concatenate([array, extra]) for name, array in model.items()}
    families.save(tmp_path / "base", base)
    families.save(tmp_path / "m0", model)
    report = dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "out", drop_rate=0.5, vocab="pad")
    assert not any("rho" in note for note in report.notes)


def test_sampled_norms_are_close_to_the_true_ones(tmp_path):
    """A tensor much larger than its sample, whose halves differ."""
    from darekit.checkpoints import open_checkpoint

    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, (512, 1024)).astype(np.float32)
    model = base + rng.normal(0, 0.01, base.shape).astype(np.float32)
    model[256:] += rng.normal(0, 0.1, (256, 1024)).astype(np.float32)
    for name, array in (("base", base), ("m0", model)):
        families.save(tmp_path / name, {"w": array})
    opened = [open_checkpoint(tmp_path / name) for name in ("base", "m0")]
    tensors = alignment.align(opened[0], opened[1:], "strict").tensors
    (norms,) = homology.sample_norms(tensors, 0, lambda _: (0.9, True))
    truth = np.linalg.norm(model - base) / np.linalg.norm(base)
    assert norms.r == pytest.approx(truth, rel=0.05) and norms.parameters == base.size
    for checkpoint in opened:
        checkpoint.close()


def test_an_identical_model_is_noted(llamas, tmp_path):
    families.save(tmp_path / "same", llamas.base, families.config())
    report = dk.drop(llamas.path / "base", tmp_path / "same", tmp_path / "out", drop_rate=0.9)
    assert any("identical" in note for note in report.notes)
    report = dk.drop(llamas.path / "base", llamas.path / "m0", tmp_path / "two", drop_rate=0.9)
    assert not any("identical" in note for note in report.notes)


# --- names and shapes


def refused(tmp_path, llamas, tensors):
    families.save(tmp_path / "m0", tensors, families.config())
    families.save(tmp_path / "base", llamas.base, families.config())
    with pytest.raises(HomologyError) as error:
        dk.merge(families.recipe(tmp_path, k=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_missing_and_extra_tensors_are_listed_with_counts(llamas, tmp_path):
    model = {n: a for n, a in llamas.models[0].items() if "mlp" not in n}  # 6 are missing
    message = refused(tmp_path, llamas, model | {"model.extra.weight": model["lm_head.weight"]})
    assert "6 tensors" in message and "model.layers.0.mlp.gate_proj.weight" in message
    assert "has model.extra.weight" in message and str(tmp_path / "m0") in message


def test_a_head_that_could_be_tied_to_nothing_is_missing(llamas, tmp_path):
    gone = ("model.embed_tokens.weight", "lm_head.weight")
    message = refused(tmp_path, llamas, {n: a for n, a in llamas.models[0].items() if n not in gone})
    assert "m0 lacks 2 tensors (lm_head.weight, model.embed_tokens.weight)" in message


def test_misshaped_tensors_are_listed_with_both_shapes(llamas, tmp_path):
    model = dict(llamas.models[0])
    for name in model:
        if "mlp" in name:
            model[name] = model[name][:-1]
    message = refused(tmp_path, llamas, model)
    assert "model.layers.0.mlp.gate_proj.weight: [48, 32] in base, [47, 32] in m0" in message
    assert "2 more" in message


def test_classes_are_not_a_vocabulary(llamas, tmp_path):
    """Two classifiers with 3 and 5 labels do not belong together, whatever `vocab` says."""
    for name, labels in (("base", 3), ("m0", 5)):
        head = {"score.weight": np.ones((labels, 32), np.float32), "classifier.bias": np.ones(labels, np.float32)}
        families.save(tmp_path / name, {"model.embed_tokens.weight": llamas.base["model.embed_tokens.weight"]} | head)
    for vocab in ("strict", "pad", "base"):
        with pytest.raises(HomologyError, match=r"score.weight: \[3, 32\] in base, \[5, 32\] in m0") as error:
            dk.merge(families.recipe(tmp_path, k=1, vocab=vocab), tmp_path / "out")
        assert "vocabular" not in str(error.value) and "classifier.bias" in str(error.value)


@pytest.mark.parametrize("name", ["lm_head.bias", "cls.predictions.bias", "cls.predictions.decoder.weight"])
def test_heads_and_their_biases_grow_with_the_vocabulary(llamas, tmp_path, name):
    for model, rows in (("base", 96), ("m0", 97)):
        shape = (rows, 32) if name.endswith("weight") else (rows,)
        tensors = {"model.embed_tokens.weight": np.ones((rows, 32), BF16), name: np.ones(shape, BF16)}
        families.save(tmp_path / model, tensors, families.config(vocab=rows))
    with pytest.raises(HomologyError, match="vocab: pad"):
        dk.merge(families.recipe(tmp_path, k=1), tmp_path / "out")
    dk.merge(families.recipe(tmp_path, k=1, vocab="pad"), tmp_path / "out")
    assert {len(array) for array in families.load(tmp_path / "out").values()} == {97}


def test_a_float_that_is_an_integer_elsewhere_is_refused(llamas, tmp_path):
    model = llamas.models[0] | {"lm_head.weight": np.zeros((96, 32), np.int64)}
    message = refused(tmp_path, llamas, model)
    assert "lm_head.weight: I64" in message and "heads:" not in message


def test_integers_with_another_number_of_rows_differ_though_the_common_rows_agree(tmp_path):
    for name, rows in (("base", 96), ("m0", 97)):
        tensors = {"model.embed_codes.weight": np.arange(rows * 4).reshape(rows, 4), "model.w": np.ones(4, np.float32)}
        families.save(tmp_path / name, tensors, families.config(vocab=rows))
    with pytest.raises(DataError, match=r"model.embed_codes.weight \(I64\) of .*m0 differs from the base's"):
        dk.merge(families.recipe(tmp_path, k=1, vocab="base"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base_has_it", [True, False])
@pytest.mark.parametrize("prefix", ["model.", "student."])
def test_a_prefix_is_recognised(llamas, tmp_path, base_has_it, prefix):
    """One prefix before all names is no other tensor; one before some of them may be."""
    bare = {n.removeprefix("model."): a for n, a in llamas.base.items() if n != "lm_head.weight"}
    full = {prefix + n.removeprefix("model."): a for n, a in llamas.models[0].items() if n != "lm_head.weight"}
    families.save(tmp_path / "base", full if base_has_it else bare)
    families.save(tmp_path / "m0", bare if base_has_it else full)
    report = dk.merge(families.recipe(tmp_path, k=1), tmp_path / "out")
    families.same(
        {n.removeprefix(prefix): a for n, a in families.load(tmp_path / "out").items()},
        {n.removeprefix(prefix): a for n, a in (bare if base_has_it else full).items()},
    )
    assert any(f"{prefix!r} before {len(bare)} names" in note for note in report.notes)
    some = {n: a for n, a in full.items() if "mlp" not in n} | {n: a for n, a in bare.items() if "mlp" in n}
    families.save(tmp_path / "m0", some)
    families.save(tmp_path / "base", {**bare, "extra.weight": bare["norm.weight"]})
    with pytest.raises(HomologyError, match=f"prefix '{prefix}'.*same class"):
        dk.merge(families.recipe(tmp_path, k=1), tmp_path / "out2")


def test_buffers_that_loaders_rebuild_say_nothing(llamas, tmp_path):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.arange(4, dtype=np.float32)}
    families.save(tmp_path / "base", llamas.base, families.config())
    families.save(tmp_path / "m0", llamas.models[0] | buffer, families.config())
    report = dk.merge(families.recipe(tmp_path, k=1), tmp_path / "out")
    assert any("1 buffers" in note for note in report.notes)
    families.same(families.load(tmp_path / "out"), llamas.models[0])
    families.save(tmp_path / "base", llamas.base | buffer, families.config())
    families.save(tmp_path / "m0", llamas.models[0], families.config())
    dk.merge(families.recipe(tmp_path, k=1, sparsify={"method": "dare", "drop_rate": 0.0}), tmp_path / "two")
    families.same(families.load(tmp_path / "two"), llamas.models[0] | buffer)


# --- seeds and scopes


def test_equal_effective_seeds_are_noted(llamas, tmp_path):
    data = families.recipe(llamas.path, k=2, sparsify={"method": "dare", "drop_rate": 0.5})
    for entry in data["models"]:
        entry["parameters"] = {"seed": 7}
    assert any("effective seed 7" in note for note in dk.plan(data).notes)
    data["models"][1]["parameters"] = {"seed": 8}
    assert not any("effective seed" in note for note in dk.plan(data).notes)
    data["models"] = [data["models"][0]["model"]] * 2
    one, two = dk.plan(data).seeds
    assert one != two, "the same model twice gets two masks"


@pytest.mark.parametrize(("rate", "dense", "warns"), [(0.9, [], True), (0.89, [], False), (0.9, ["embeddings"], False)])
def test_dropped_embeddings_are_noted(llamas, rate, dense, warns):
    sparsify = {"method": "dare", "drop_rate": rate, "keep_dense": dense}
    notes = dk.plan(families.recipe(llamas.path, k=1, sparsify=sparsify)).notes
    assert any("model.embed_tokens.weight is dropped" in note for note in notes) == warns


def test_a_size_at_a_limit_is_still_allowed():
    """r and rho are exact here: squared norms and noise are powers of two, or tenths squared."""
    facts = {"name": "w", "parameters": 9, "base": 1.0, "drop_rate": 0.5}
    at_stop = homology.judge("m", "base", [Norms(delta=homology.R_STOP**2, noise=0.0, **facts)])
    assert at_stop.r == homology.R_STOP and at_stop.stop is None and at_stop.warning is None
    loud = homology.judge("m", "base", [Norms(delta=0.0625, noise=homology.RHO_STOP / 0.25, **facts)])
    assert loud.rho == homology.RHO_STOP and loud.stop is None and "is above 0.2" in loud.warning
    quiet = homology.judge("m", "base", [Norms(delta=0.0625, noise=TAU / 0.25, **facts)])
    assert quiet.rho == TAU and quiet.stop is None and quiet.warning is None
    over = homology.judge("m", "base", [Norms(delta=1.0, noise=0.0, **facts)])
    assert [one.to_data()["warning"] for one in (over, loud, quiet)] == [over.stop, loud.warning, None] != [None] * 3


def test_a_model_is_identical_only_if_every_tensor_is():
    same, other = (Norms("w", 9, delta, 1.0, 0.0, 0.0) for delta in (0.0, 1e-6))
    assert "is identical to base" in homology.judge("m", "base", [same, same]).warning
    assert homology.judge("m", "base", [same, other]).warning is None


def test_integers_are_compared_where_a_model_has_them():
    """A model may lack a tensor, and without a base the first one that has it is what others are compared with."""

    def tensor(values):
        array = np.array(values, np.int64)
        return TensorInfo("steps", "I64", array.shape, ArrayBytes(array.view(np.uint8)))

    def check(base, *models):
        aligned = SimpleNamespace(name="steps", dtype="I64", base=base, models=models)
        homology.check_integers([aligned], [f"m{k}" for k in range(len(models))])

    check(tensor([1, 2]), None, tensor([1, 2]))
    check(None, None, tensor([1, 2]), tensor([1, 2]))
    with pytest.raises(DataError, match="of m2 differs from the base's"):
        check(None, None, tensor([1, 2]), tensor([1, 3]))
    with pytest.raises(DataError, match="of m1 differs"):
        check(tensor([1, 2]), None, tensor([1, 2, 2]))


def sampled(dtype, before, after):
    """Norms of one tensor, its base and its model given as arrays."""

    def tensor(values):
        return TensorInfo("w", dtype, values.shape, ArrayBytes(values.view(np.uint8)))

    aligned = SimpleNamespace(name="w", base=tensor(before), models=(tensor(after),))
    (found,) = homology.sample_norms([aligned], 0, lambda _: (0.5, 2.0))
    return found


def test_float64_is_sampled_in_float64():
    """A delta of 1e-10 is no delta in float32."""
    found = sampled("F64", np.ones(100), np.ones(100) + 1e-10)
    assert found.r == pytest.approx(1e-10, rel=1e-5) and found.rho == 2 * found.r and found.parameters == 100


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_none_are_left_out_of_the_sample(bad):
    before, after = np.full(5, 2, np.float32), np.full(5, 3, np.float32)
    after[1] = bad
    found = sampled("F32", before, after)
    assert (found.delta, found.base) == (4.0, 16.0) and found.r == 0.5


def test_where_neither_side_has_a_value_nothing_differs():
    """0 of 0 is no change; something of 0 is more than any share."""
    facts = {"name": "w", "parameters": 1, "drop_rate": 0.0, "noise": 0.0}
    assert Norms(delta=0.0, base=0.0, **facts).r == 0.0
    assert Norms(delta=1.0, base=0.0, **facts).r == float("inf")


@pytest.mark.parametrize(
    ("more", "noisy"), [({}, True), ({"rescale": "none"}, False), ({"q": 0.2}, True), ({"rescale": "l1"}, True)]
)
def test_only_a_rescaled_drop_makes_noise(llamas, more, noisy):
    recipe = families.recipe(llamas.path, 1, sparsify={"method": "dare", "drop_rate": 0.5, **more})
    with open_plan(read_recipe(recipe)) as plan:
        found = {plan.rate_of(0, tensor) for tensor in plan.alignment.tensors}
    ((rate, noise),) = found
    assert rate == 0.5 and (noise > 0) == noisy


@pytest.mark.parametrize(
    ("sparsify", "noise"),
    [({"method": "dare"}, 2.0), ({"method": "della"}, 2.0), ({"method": "dare", "rescale": {"q": 0.5}}, 0.8)],
)
def test_the_noise_of_a_drop(llamas, sparsify, noise):
    """sqrt(p (1 - p)) / q at p = 0.8, where q is 1 - p unless it is given."""
    recipe = families.recipe(llamas.path, 1, sparsify={"drop_rate": 0.8, **sparsify})
    with open_plan(read_recipe(recipe)) as plan:
        found = [plan.rate_of(0, tensor)[1] for tensor in plan.alignment.tensors]
    assert found == pytest.approx([noise] * len(found))


def test_a_model_that_asks_for_no_trim_keeps_all(llamas):
    recipe = families.recipe(llamas.path, 2, merge_method="ties")
    recipe["models"][0]["parameters"] = {"keep": [0.3, 0.6]}
    with open_plan(read_recipe(recipe)) as plan:
        keeps = [{settings.models[k].keep for settings in plan.settings.values()} for k in (0, 1)]
    assert keeps[1] == {1.0} and min(keeps[0]) == 0.3 and max(keeps[0]) == 0.6
