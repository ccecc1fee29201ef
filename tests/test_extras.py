# SPDX-License-Identifier: Apache-2.0
"""What a base has and its fine-tunes have not, or the other way round. Expectations are numpy's, by hand."""

import json

import numpy as np
import pytest

import darekit as dk
import families
from darekit.errors import HomologyError, RecipeError

WIDTH = 8
LAYERS = 2


def config(kind, cls, **more):
    return {"architectures": [cls], "model_type": kind, "num_hidden_layers": LAYERS, **more}


def save(path, name, tensors, cls, kind="bert"):
    families.save(path / name, tensors, config(kind, cls))


def arrays(rng, *names, rows=WIDTH):
    return {name: rng.normal(0, 1, (rows, WIDTH)).astype(np.float32) for name in names}


def near(rng, tensors):
    return {name: (array * (1 + 0.01 * rng.normal(size=array.shape))).astype(np.float32) for name, array in
            tensors.items()}  # fmt: skip


def body(prefix, layer="encoder.layer"):
    return [f"{prefix}{layer}.{i}.output.dense.weight" for i in range(LAYERS)]


def mean(recipe, k=2, **keys):
    return families.recipe(recipe, k=k, parameters={"lambda": 1 / k}, **keys)


def check_mean(found, models, names):
    for name in names:
        expected = sum(model[name].astype(np.float64) for model in models) / len(models)
        assert np.allclose(found[name], expected, atol=1e-6), name


@pytest.fixture
def predicting(tmp_path):
    """A Qwen3-Next base with token prediction, and two fine-tunes that transformers saved without."""
    rng = np.random.default_rng(0)
    own = arrays(rng, *body("model.", "layers"))
    more = arrays(rng, "mtp.fc.weight", "mtp.layers.0.mlp.gate.weight", "mtp.norm.weight")
    save(tmp_path, "base", own | more, "Qwen3NextForCausalLM", "qwen3_next")
    models = [near(rng, own) for _ in range(2)]
    for k, model in enumerate(models):
        save(tmp_path, f"m{k}", model, "Qwen3NextForCausalLM", "qwen3_next")
    return tmp_path, own, more, models


def test_what_only_the_base_has_is_kept(predicting):
    path, own, more, models = predicting
    report = dk.merge(mean(path), path / "out")
    found = families.load(path / "out")
    assert set(found) == set(own) | set(more)
    assert all(np.array_equal(found[name], more[name]) for name in more)
    check_mean(found, models, own)
    assert any("only base has 3 tensors (mtp.*): kept" in note and "base_extras" in note for note in report.notes)


def test_or_left_out(predicting, dare):
    path, own, _, models = predicting
    report = dk.merge(mean(path, base_extras="leave_out"), path / "out")
    assert set(families.load(path / "out")) == set(own)
    assert any("only base has 3 tensors (mtp.*): left out" in note for note in report.notes)
    lock = json.loads((path / "out" / "darekit.lock.json").read_text())
    assert lock["recipe"]["base_extras"] == "leave_out"
    told = dare("drop", path / "base", path / "m0", path / "dropped", "-p", "0", "--base-extras", "leave_out")
    assert told.code == 0
    families.same(families.load(path / "dropped"), models[0])


@pytest.mark.parametrize("options", [{"lossless": True}, {"drop_rate": 0.5}])
def test_packs(predicting, options):
    path, _, more, models = predicting
    dk.pack(path / "base", path / "m0", path / "m0.safetensors", **options)
    dk.unpack(path / "base", path / "m0.safetensors", path / "out")
    found = families.load(path / "out")
    if "lossless" in options:
        families.same(found, models[0])
    else:
        assert all(np.array_equal(found[name], more[name]) for name in more)


def test_a_layer_behind_the_last(tmp_path):
    """DeepSeek's layer for a further token stands behind the layers that the config counts."""
    rng = np.random.default_rng(1)
    own = arrays(rng, *body("model.", "layers"))
    more = arrays(rng, f"model.layers.{LAYERS}.eh_proj.weight", f"model.layers.{LAYERS}.output.dense.weight")
    models = [near(rng, own) for _ in range(2)]
    for kind, cls in (("deepseek_v3", "DeepseekV3ForCausalLM"), ("nobody-knows", "Unknown")):
        save(tmp_path, "base", own | more, cls, kind)
        for k, model in enumerate(models):
            save(tmp_path, f"m{k}", model, cls, kind)
        report = dk.merge(mean(tmp_path), tmp_path / "out", overwrite=True)
        found = families.load(tmp_path / "out")
        assert all(np.array_equal(found[name], more[name]) for name in more)
        check_mean(found, models, own)
        assert any(f"model.layers.{LAYERS}.*" in note for note in report.notes)


def test_a_layer_that_the_fine_tunes_lack_is_an_error(tmp_path):
    rng = np.random.default_rng(1)
    own = arrays(rng, *body("model.", "layers"))
    for name in ("base", "m0", "m1"):
        kept = own if name == "base" else {n: a for n, a in own.items() if "layers.1" not in n}
        save(tmp_path, name, kept, "LlamaForCausalLM", "llama")
    for keys in ({}, {"base_extras": "leave_out"}):
        with pytest.raises(HomologyError, match=r"lacks model\.layers\.1"):
            dk.merge(mean(tmp_path, **keys), tmp_path / "out")


POOLER = ("pooler.dense.weight", "pooler.dense.bias")


@pytest.fixture
def classifiers(tmp_path):
    """A RoBERTa base with its head and a pooler, and two classifiers."""
    rng = np.random.default_rng(2)
    own = arrays(rng, *body("roberta."))
    pooler, head = arrays(rng, *(f"roberta.{n}" for n in POOLER)), arrays(rng, "lm_head.dense.weight")
    save(tmp_path, "base", own | pooler | head, "RobertaForMaskedLM", "roberta")
    models = []
    for k in range(2):
        models.append(near(rng, own) | arrays(rng, "classifier.dense.weight", "classifier.out_proj.weight", rows=2))
        save(tmp_path, f"m{k}", models[-1], "RobertaForSequenceClassification", "roberta")
    return tmp_path, own, pooler | head, models


def test_as_the_model_that_gives_the_heads(classifiers):
    path, own, _, models = classifiers
    report = dk.merge(mean(path, heads=str(path / "m0")), path / "out")
    found = families.load(path / "out")
    assert set(found) == set(models[0])
    check_mean(found, models, own)
    assert all(np.array_equal(found[name], models[0][name]) for name in set(found) - set(own))
    assert any("m0, whose heads the output has, has no roberta.pooler.*: left out" in note for note in report.notes)


def test_as_the_base_that_gives_the_heads(classifiers):
    path, own, more, models = classifiers
    dk.merge(mean(path, heads="base"), path / "out")
    found = families.load(path / "out")
    assert set(found) == set(own) | set(more)
    assert all(np.array_equal(found[name], more[name]) for name in more)
    check_mean(found, models, own)


def test_another_head_is_never_guessed(classifiers):
    path, *_ = classifiers
    for keys in ({}, {"base_extras": "leave_out"}):
        with pytest.raises(HomologyError, match="heads: MODEL"):
            dk.merge(mean(path, **keys), path / "out")


def test_a_pooler_that_only_classifiers_have(tmp_path):
    """BERT as a masked language model is saved without a pooler; classifiers have a new one each."""
    rng = np.random.default_rng(3)
    own = arrays(rng, *body("bert."))
    save(tmp_path, "base", own | arrays(rng, "cls.predictions.transform.dense.weight"), "BertForMaskedLM")
    models = []
    for k in range(2):
        models.append(near(rng, own) | arrays(rng, *(f"bert.{n}" for n in POOLER), "classifier.weight"))
        save(tmp_path, f"m{k}", models[-1], "BertForSequenceClassification")
    report = dk.merge(mean(tmp_path, heads=str(tmp_path / "m1")), tmp_path / "out")
    found = families.load(tmp_path / "out")
    assert set(found) == set(models[1])
    assert all(np.array_equal(found[f"bert.{n}"], models[1][f"bert.{n}"]) for n in POOLER)
    check_mean(found, models, own)
    assert any("bert.pooler.*" in note and "taken from m1" in note for note in report.notes)


def test_a_bare_base_and_prefixed_names(tmp_path):
    rng = np.random.default_rng(4)
    own = arrays(rng, *body(""), *POOLER)
    save(tmp_path, "base", own, "ViTModel", "vit")
    models = []
    for k in range(2):
        kept = {f"vit.{n}": a for n, a in near(rng, own).items() if n not in POOLER}
        models.append(kept | arrays(rng, "classifier.weight", rows=2))
        save(tmp_path, f"m{k}", models[-1], "ViTForImageClassification", "vit")
    dk.merge(mean(tmp_path, heads=str(tmp_path / "m0")), tmp_path / "out")
    found = families.load(tmp_path / "out")
    assert set(found) == set(models[0])
    check_mean(found, models, body("vit."))


def test_bare_fine_tunes_keep_the_bases_heads(tmp_path):
    rng = np.random.default_rng(5)
    own, head = arrays(rng, *body("bert.")), arrays(rng, "cls.predictions.transform.dense.weight")
    save(tmp_path, "base", own | head, "BertForPreTraining")
    models = [near(rng, own) for _ in range(2)]
    for k, model in enumerate(models):
        save(tmp_path, f"m{k}", {n.removeprefix("bert."): a for n, a in model.items()}, "BertModel")
    report = dk.merge(mean(tmp_path), tmp_path / "out")
    found = families.load(tmp_path / "out")
    assert set(found) == set(own) | set(head)
    check_mean(found, models, own)
    assert any("(cls.*): kept" in note for note in report.notes)


def test_a_model_that_lacks_what_the_others_have(tmp_path):
    rng = np.random.default_rng(6)
    own, pooler = arrays(rng, *body("bert.")), arrays(rng, *(f"bert.{n}" for n in POOLER))
    save(tmp_path, "base", own | pooler, "BertModel")
    save(tmp_path, "m0", near(rng, own | pooler), "BertModel")
    save(tmp_path, "m1", near(rng, own), "BertModel")
    with pytest.raises(HomologyError, match=r"m1 lacks 2 tensors[\s\S]*save .*m1 again[\s\S]*or leave it out"):
        dk.merge(mean(tmp_path), tmp_path / "out")


def test_token_prediction_of_a_model_alone_is_left_out(predicting):
    path, own, more, models = predicting
    save(path, "base", own, "Qwen3NextForCausalLM", "qwen3_next")
    save(path, "m1", models[1] | more, "Qwen3NextForCausalLM", "qwen3_next")
    report = dk.merge(mean(path), path / "out")
    found = families.load(path / "out")
    assert set(found) == set(own)
    check_mean(found, models, own)
    assert any("only models have 3 tensors (mtp.*)" in note and "left out" in note for note in report.notes)


def test_a_comparison_leaves_them_out(predicting):
    path, *_ = predicting
    found = dk.inspect(path / "base", path / "m0")
    assert any("not all models have 3 tensors (mtp.*): left out" in note for note in found.notes)


def test_the_key():
    recipe = {"base_model": "a", "models": ["b"], "merge_method": "ties"}
    assert dk.read_recipe(recipe).base_extras == "keep" and "base_extras" not in dk.read_recipe(recipe).to_data()
    found = dk.read_recipe(recipe | {"base_extras": "leave_out"})
    assert found.base_extras == "leave_out" and dk.read_recipe(found.to_data()) == found
    with pytest.raises(RecipeError, match="base_extras must be one of keep, leave_out, found 'leave'"):
        dk.read_recipe(recipe | {"base_extras": "leave"})


@pytest.mark.parametrize("kind", [("clip_vision_model", "CLIPVisionModel", "clip"), ("of-my-own", "New", "of-my-own")])
def test_a_part_that_stands_in_another_family(tmp_path, kind):
    rng = np.random.default_rng(7)
    own = arrays(rng, *body("", "encoder.layers"), "pre_layrnorm.weight", "post_layernorm.weight")
    save(tmp_path, "base", own, kind[1], kind[0])
    models = []
    for k in range(2):
        kept = {f"vision_model.{n}": a for n, a in near(rng, own).items()}
        models.append(kept | arrays(rng, "classifier.weight", rows=2))
        save(tmp_path, f"m{k}", models[-1], "CLIPForImageClassification", kind[2])
    dk.merge(mean(tmp_path, heads=str(tmp_path / "m0")), tmp_path / "out")
    found = families.load(tmp_path / "out")
    assert set(found) == set(models[0])
    check_mean(found, models, [f"vision_model.{n}" for n in own])
    assert np.array_equal(found["classifier.weight"], models[0]["classifier.weight"])


def test_bare_fine_tunes_of_an_unknown_family(tmp_path):
    rng = np.random.default_rng(8)
    own = arrays(rng, *body("", "encoder.layers"), "norm.weight")
    base = {f"new.{n}": a for n, a in own.items()} | arrays(rng, "lm_head.weight")
    save(tmp_path, "base", base, "NewForMaskedLM", "of-my-own")
    models = [near(rng, own) for _ in range(2)]
    for k, model in enumerate(models):
        save(tmp_path, f"m{k}", model, "NewModel", "of-my-own")
    dk.merge(mean(tmp_path), tmp_path / "out")
    found = families.load(tmp_path / "out")
    assert set(found) == set(base) and np.array_equal(found["lm_head.weight"], base["lm_head.weight"])
    for name in own:
        assert np.allclose(found[f"new.{name}"], (models[0][name] + models[1][name]) / 2, atol=1e-6)
