# SPDX-License-Identifier: Apache-2.0
"""Heads that are never merged: the recipe's key `heads`, `drop --heads`, and what `inspect` makes of heads."""

import json

import ml_dtypes
import numpy as np
import pytest

import darekit as dk
import families
import oracle
from darekit.architectures.families import facts_of
from darekit.errors import HomologyError, PlanError, RecipeError

BF16 = ml_dtypes.bfloat16
HIDDEN = 32
is_head = facts_of({"architectures": ["BertForSequenceClassification"]}).is_head


def encoder(rng, labels=None, kind=np.float32):
    """Name -> array of a BERT's shape; without labels it has the head of a masked language model."""
    shapes = {"bert.embeddings.word_embeddings.weight": (40, HIDDEN)}
    for i in range(2):
        at = f"bert.encoder.layer.{i}"
        shapes |= {f"{at}.attention.self.{x}.weight": (HIDDEN, HIDDEN) for x in ("query", "key", "value")}
        shapes |= {f"{at}.intermediate.dense.weight": (64, HIDDEN), f"{at}.intermediate.dense.bias": (64,)}
    shapes |= {"bert.pooler.dense.weight": (HIDDEN, HIDDEN), "bert.pooler.dense.bias": (HIDDEN,)}
    if labels is None:
        shapes |= {"cls.predictions.transform.dense.weight": (HIDDEN, HIDDEN), "cls.predictions.bias": (40,)}
    else:
        shapes |= {"classifier.weight": (labels, HIDDEN), "classifier.bias": (labels,)}
    return {name: rng.normal(0, 0.05, shape).astype(kind) for name, shape in shapes.items()}


def config(labels=None, kind="float32"):
    name = "BertForMaskedLM" if labels is None else "BertForSequenceClassification"
    own = {} if labels is None else {"id2label": {str(i): f"L{i}" for i in range(labels)}}
    return {
        "architectures": [name], "model_type": "bert", "hidden_size": HIDDEN, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 40, "torch_dtype": kind, **own,
    }  # fmt: skip


@pytest.fixture
def encoders(tmp_path):
    """A base with a language model's head, and children with classifiers of 2, 5 and 2 classes."""
    rng = np.random.default_rng(0)
    base = encoder(rng)
    families.save(tmp_path / "base", base, config())
    models = []
    for i, labels in enumerate((2, 5, 2)):
        model = {name: array for name, array in families.tuned(rng, base).items() if not is_head(name)}
        model |= {name: array for name, array in encoder(rng, labels).items() if is_head(name)}
        families.save(tmp_path / f"m{i}", model, config(labels))
        models.append(model)
    return tmp_path, base, models


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("giver", [0, 1])
def test_one_models_head_is_taken_and_the_rest_merged(encoders, giver, sparse):
    path, base, models = encoders
    keys = {"sparsify": {"method": "dare", "drop_rate": 0.5}} if sparse else {}
    recipe = families.recipe(path, k=3, heads=str(path / f"m{giver}"), parameters={"lambda": 0.5}, **keys)
    report = dk.merge(recipe, path / "out")
    found, own = families.load(path / "out"), models[giver]
    assert set(found) == set(own)
    seeds = dk.plan(recipe).seeds
    for name, array in found.items():
        if is_head(name):
            expected = own[name]
        else:
            how = {"sparsify": ("dare", {"drop_rate": 0.5})} if sparse else {}
            same = [model[name] for model in models]
            expected = oracle.merge(name, base[name], same, seeds=seeds, method="task_arithmetic", lambda_=0.5, **how)
        assert np.array_equal(array, expected), name
    written = json.loads((path / "out" / "config.json").read_text())
    assert written["architectures"] == ["BertForSequenceClassification"]
    assert len(written["id2label"]) == (2, 5)[giver]
    assert any(f"are taken from m{giver};" in note and "left out" in note for note in report.notes)
    lock = json.loads((path / "out" / "darekit.lock.json").read_text())
    assert lock["recipe"]["heads"] == str(path / f"m{giver}")


def test_a_head_that_the_base_has_beside_another_is_still_the_givers(tmp_path):
    """BERT's base was trained for two tasks at once; its fine-tunes go on with one of them."""
    rng = np.random.default_rng(5)
    base = encoder(rng)
    further = {"cls.seq_relationship.weight": rng.normal(0, 0.05, (2, HIDDEN)).astype(np.float32)}
    families.save(tmp_path / "base", base | further, config() | {"architectures": ["BertForPreTraining"]})
    models = [families.tuned(rng, base) for _ in range(2)]
    for i, model in enumerate(models):
        families.save(tmp_path / f"m{i}", model, config())
    dk.merge(families.recipe(tmp_path, k=2, heads=str(tmp_path / "m0")), tmp_path / "out")
    found = families.load(tmp_path / "out")
    assert found.keys() == models[0].keys()
    for name in filter(is_head, found):
        assert np.array_equal(found[name], models[0][name]), name


def test_the_bases_head(encoders):
    path, base, _ = encoders
    dk.merge(families.recipe(path, k=2, heads="base"), path / "out")
    found = families.load(path / "out")
    assert set(found) == set(base)
    for name in base:
        assert np.array_equal(found[name], base[name]) == is_head(name), name
    assert json.loads((path / "out" / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]


@pytest.mark.parametrize("giver", ["base", "m1"])
def test_another_format_rounds_heads_too(encoders, giver):
    path, base, models = encoders
    heads = giver if giver == "base" else str(path / giver)
    dk.merge(families.recipe(path, k=2, heads=heads, dtype="bfloat16"), path / "out")
    own = base if giver == "base" else models[1]
    for name, array in families.load(path / "out").items():
        assert array.dtype == BF16
        if is_head(name):
            assert np.array_equal(array, own[name].astype(BF16)), name


def test_transformers_loads_it_without_a_word(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    shape = {
        "vocab_size": 40, "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    base = transformers.BertForMaskedLM(transformers.BertConfig(**shape))
    base.save_pretrained(tmp_path / "base")
    models = []
    for i, labels in enumerate((3, 4)):
        model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=labels, **shape))
        model.bert.load_state_dict(base.bert.state_dict(), strict=False)
        with torch.no_grad():
            for parameter in model.bert.parameters():
                parameter.add_(1e-3 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / f"m{i}")
        models.append(model)
    # BertForMaskedLM has no pooler, the classifiers have: theirs goes with the head
    dk.merge(families.recipe(tmp_path, k=2, heads=str(tmp_path / "m1")), tmp_path / "on-base")
    stored = families.load(tmp_path / "m1")
    found = families.load(tmp_path / "on-base")
    assert found.keys() == stored.keys()
    assert np.array_equal(found["bert.pooler.dense.weight"], stored["bert.pooler.dense.weight"])
    merged = {"models": [str(tmp_path / "m0"), str(tmp_path / "m1")], "merge_method": "linear"}
    dk.merge({**merged, "heads": str(tmp_path / "m1")}, tmp_path / "out")
    found, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info
    assert found.config.num_labels == 4
    assert torch.equal(found.classifier.weight, models[1].classifier.weight)


def test_drop_with_the_models_own_head(encoders):
    path, base, models = encoders
    with pytest.raises(HomologyError, match="Only heads differ"):
        dk.drop(path / "base", path / "m1", path / "out", drop_rate=0.9)
    dk.drop(path / "base", path / "m1", path / "out", drop_rate=0.9, heads="model", seed=3)
    found = families.load(path / "out")
    assert set(found) == set(models[1])
    for name, array in found.items():
        kept = np.mean(array != base[name]) if name in base else 1.0
        assert np.array_equal(array, models[1][name]) if is_head(name) else kept < 0.4, name


def test_without_the_key_the_error_names_it(encoders):
    path, _, _ = encoders
    with pytest.raises(HomologyError, match=r"heads: base.*heads: MODEL"):  # other names
        dk.merge(families.recipe(path, k=2), path / "out")
    models = {"models": [str(path / "m0"), str(path / "m1")], "merge_method": "linear"}
    with pytest.raises(HomologyError, match="heads: MODEL"):  # other shapes
        dk.merge(models, path / "out")


def test_the_key_is_not_named_where_it_would_not_help(encoders):
    """Other tensors than heads do not fit either, whichever of them comes first."""
    path, _, models = encoders
    for name in ("bert.embeddings.word_embeddings.weight", "zeta.weight"):
        for other in (0, 1):
            tensors = models[other] | {name: np.ones((HIDDEN, HIDDEN + other), np.float32)}
            families.save(path / f"n{other}", tensors, config((2, 5)[other]))
        with pytest.raises(HomologyError, match=rf"{name}: .*classifier|classifier.*{name}: ") as error:
            dk.merge({"models": [str(path / "n0"), str(path / "n1")], "merge_method": "linear"}, path / "out")
        assert "heads" not in str(error.value)


def test_a_giver_without_heads_is_an_error(encoders):
    path, base, _ = encoders
    families.save(path / "bare", {name: array for name, array in base.items() if not is_head(name)}, config())
    recipe = families.recipe(path, k=2, heads="base") | {"base_model": str(path / "bare")}
    with pytest.raises(HomologyError, match=r"but it has none.*lm_head\*"):
        dk.merge(recipe, path / "out")
    dk.merge(recipe | {"heads": str(path / "m0")}, path / "out")
    assert set(families.load(path / "out")) > set(families.load(path / "bare"))


def test_a_language_models_head_needs_a_row_for_each_token(tmp_path):
    rng = np.random.default_rng(0)
    base = families.llama(rng)
    families.save(tmp_path / "base", base, families.config())
    families.save(tmp_path / "m0", families.tuned(rng, base), families.config())
    longer = families.tuned(rng, base)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        longer[name] = np.concatenate([longer[name], longer[name][:1]])
    families.save(tmp_path / "m1", longer, families.config(vocab=families.VOCAB + 1))
    recipe = families.recipe(tmp_path, k=2, heads=str(tmp_path / "m1"))
    with pytest.raises(HomologyError, match=r"97 rows.* 96"):
        dk.merge(recipe | {"vocab": "base"}, tmp_path / "out")
    dk.merge(recipe | {"vocab": "pad"}, tmp_path / "out")
    found = families.load(tmp_path / "out")
    assert np.array_equal(found["lm_head.weight"], longer["lm_head.weight"])


def test_inspect_compares_what_both_have(encoders):
    path, base, _ = encoders
    found = dk.inspect(path / "base", path / "m1")
    assert {tensor.name for tensor in found.tensors} == {name for name in base if not is_head(name)}


def test_inspect_says_which_heads_it_leaves_out(encoders, dare):
    path, base, _ = encoders
    names = [str(path / f"m{k}") for k in range(3)]
    found = dk.inspect(path / "base", *names)
    (note,) = found.notes
    assert (
        note.startswith("heads that differ in shape, or that some models lack, are left out: ") and "classifier" in note
    )
    # Without heads the models are alike, whoever gives them.
    alike = {name: array for name, array in base.items() if not is_head(name)}
    for heads in ("base", names[1], f"{names[1]}/"):
        named = dk.inspect(path / "base", *names, heads=heads)
        assert [model.tensors for model in named.models] == [model.tensors for model in found.models]
        assert {tensor.name for tensor in named.models[0].tensors} == set(alike)
    told = dare("inspect", path / "base", names[1], "--heads", "model")
    assert told.code == 0 and "are taken from m1; those of base are left out\nnote: heads are not compared" in told.err
    for heads, models in (("model", names), ("m7", names[:1])):
        told = dare("inspect", path / "base", *models, "--heads", heads)
        assert told.code == 1 and f"one of the models as written ({', '.join(models)})" in told.err
        assert ("base, model or" in told.err) == (len(models) == 1)


def test_inspect_leaves_heads_out_that_could_be_compared(llamas):
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    found = [dk.inspect(llamas.path / "base", llamas.path / "m0", heads=heads) for heads in (None, "base", "model")]
    reported = [{tensor.name for tensor in one.tensors} for one in found]
    assert names <= reported[0] and reported[1] == reported[2] == reported[0] - {"lm_head.weight"}
    assert found[1].total.parameters == found[0].total.parameters - llamas.base["lm_head.weight"].size


@pytest.mark.parametrize("rows", [families.VOCAB + 3, families.VOCAB - 2])
def test_inspect_of_a_vocabulary_that_differs(tmp_path, rows, dare):
    rng = np.random.default_rng(0)
    base = families.llama(rng)
    families.save(tmp_path / "base", base, families.config())
    model = families.tuned(rng, base)
    longer = {**model}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        longer[name] = np.resize(model[name], (rows, model[name].shape[1]))
        base[name], model[name] = base[name][:rows], model[name][:rows]
    families.save(tmp_path / "longer", longer, families.config(vocab=rows))
    families.save(tmp_path / "short-base", base, families.config())
    families.save(tmp_path / "short", model, families.config())
    common = dk.inspect(tmp_path / "short-base", tmp_path / "short")
    for words in ((), ("--vocab", "base"), ("--vocab", "pad")):
        told = dare("inspect", tmp_path / "base", tmp_path / "longer", *words, "--json")
        assert told.code == 0 and told.data["total"] == common.total.to_data()
        assert told.data["notes"] == [
            f"{name}: {families.VOCAB} rows in the base, {rows} in longer; only the rows of both are compared"
            for name in ("lm_head.weight", "model.embed_tokens.weight")
        ]
    told = dare("inspect", tmp_path / "base", tmp_path / "longer")
    assert told.err.count("only the rows of both are compared") == 2
    told = dare("inspect", tmp_path / "base", tmp_path / "longer", "--vocab", "strict")
    assert told.code == 1 and "The vocabularies differ" in told.err and "--vocab" in told.err
    with pytest.raises(PlanError, match="vocab: expected strict, base, pad, found 'cut'"):
        dk.inspect(tmp_path / "base", tmp_path / "longer", vocab="cut")


def test_a_recipe_reads_its_heads(tmp_path):
    start = {"base_model": "b", "models": ["a", "c"], "merge_method": "linear"}
    assert dk.read_recipe(start).heads is None and "heads" not in dk.read_recipe(start).to_data()
    for word, read in (("base", "base"), ("b/", "base"), ("c", "c")):
        found = dk.read_recipe({**start, "heads": word})
        assert found.heads == read and dk.read_recipe(found.to_data()) == found
    with pytest.raises(RecipeError, match="base or one of the models, found 'd'"):
        dk.read_recipe({**start, "heads": "d"})
    with pytest.raises(RecipeError, match="no base_model"):
        dk.read_recipe({"models": ["a", "c"], "merge_method": "linear", "heads": "base"})
    with pytest.raises(RecipeError, match="did you mean"):
        dk.read_recipe({**start, "head": "a"})
