# SPDX-License-Identifier: Apache-2.0
"""Names as the loader knows them: copies of one tensor, old names, wrappers, buffers, groups, vocabularies.

Small arrays under the names of real classes; the right value of each is known. `test_classes.py` asks transformers.
"""

import json

import ml_dtypes
import numpy as np
import pytest

import darekit as dk
import families
import oracle
from darekit.architectures.families import facts_of
from darekit.architectures.groups import MEANING, group_of
from darekit.checkpoints import TensorInfo
from darekit.checkpoints.sources import ArrayBytes, Joined, Part
from darekit.errors import HomologyError, PlanError
from darekit.planning.matching.equality import BLOCK, are_equal

H = 8
TOKENS = 12
DARE = {"sparsify": {"method": "dare", "drop_rate": 0.5}}


def made(shapes, seed=0, kind=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.05, shape).astype(kind) for name, shape in shapes.items()}


def of(name, **more):
    return {"architectures": [name], "model_type": facts_of({"architectures": [name]}).model_type, **more}


T5 = {
    "shared.weight": (TOKENS, H),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (H, H),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (4, 2),
    "decoder.block.0.layer.0.SelfAttention.q.weight": (H, H),
    "decoder.final_layer_norm.weight": (H,),
}
T5_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
BERT = {
    "bert.embeddings.word_embeddings.weight": (TOKENS, H),
    "bert.encoder.layer.0.attention.self.query.weight": (H, H),
    "bert.encoder.layer.0.output.LayerNorm.weight": (H,),
    "bert.encoder.layer.0.output.LayerNorm.bias": (H,),
    "cls.predictions.transform.dense.weight": (H, H),
    "cls.predictions.bias": (TOKENS,),
}
BERT_COPIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
QWEN = {
    "model.embed_tokens.weight": (TOKENS, H),
    "model.layers.0.self_attn.q_proj.weight": (H, H),
    "model.layers.0.mlp.up_proj.weight": (H, H),
    "model.norm.weight": (H,),
}


def saved(path, config, shapes, k=2, kind=np.float32):
    """base, m0 .. under `path` -> their arrays."""
    base = made(shapes, kind=kind)
    models = [families.tuned(np.random.default_rng(7 + i), base) for i in range(k)]
    families.save(path / "base", base, config)
    for i, model in enumerate(models):
        families.save(path / f"m{i}", model, config)
    return base, models


def mean(name, base, models):
    """What lambda 1/2 of two deltas comes to."""
    return oracle.merge(name, base, models, seeds=(None,) * len(models), method="task_arithmetic", lambda_=0.5)


def merged(path, k=2, **keys):
    report = dk.merge(families.recipe(path, k=k, **keys), path / "out", overwrite=True)
    return families.load(path / "out"), report


def config_of(path):
    return json.loads((path / "out" / "config.json").read_text())


# --- ties


@pytest.mark.parametrize("who", [("base", "m0", "m1"), ("base",), ("m1",)])
def test_copies_of_one_tensor_are_merged_once(tmp_path, who):
    config = of("T5ForConditionalGeneration")
    base, models = saved(tmp_path, config, T5)
    for name, tensors in zip(("base", "m0", "m1"), (base, *models), strict=True):
        if name in who:
            copies = dict.fromkeys(T5_COPIES, tensors["shared.weight"])
            families.save(tmp_path / name, tensors | copies, config)
    data = families.recipe(tmp_path, k=2, **DARE)
    found, _ = merged(tmp_path, **DARE)
    how = {"seeds": dk.plan(data).seeds, "sparsify": ("dare", {"drop_rate": 0.5}), "method": "task_arithmetic"}
    families.same(found, {n: oracle.merge(n, base[n], [m[n] for m in models], **how) for n in base})
    assert config_of(tmp_path) == config | {"torch_dtype": "float32"}  # T5 takes the key for another one


def test_a_copy_without_its_source_stands_for_it(tmp_path):
    config = of("T5ForConditionalGeneration")
    base, _models = saved(tmp_path, config, T5)
    other = {n.replace("shared.weight", "lm_head.weight"): a for n, a in base.items()}
    families.save(tmp_path / "base", other, config)
    found, _ = merged(tmp_path, parameters={"lambda": 0.0})
    families.same(found, other)  # written as the base has it


@pytest.mark.parametrize("said", [True, None])
def test_a_head_that_differs_from_its_embedding_is_a_head_of_its_own(tmp_path, said):
    config = of("Gemma2ForCausalLM") | ({} if said is None else {"tie_word_embeddings": said})
    base, (m0, m1) = saved(tmp_path, config, QWEN)
    heads = [families.tuned(np.random.default_rng(i), {"lm_head.weight": m["model.embed_tokens.weight"]}, 0.05)
             for i, m in enumerate((m0, m1))]  # fmt: skip
    for i, model in enumerate((m0, m1)):
        families.save(tmp_path / f"m{i}", model | heads[i], config)
    found, report = merged(tmp_path, parameters={"lambda": 0.5})
    origin = base["model.embed_tokens.weight"]
    expected = mean("lm_head.weight", origin, [head["lm_head.weight"] for head in heads])
    families.same({"lm_head.weight": found["lm_head.weight"]}, {"lm_head.weight": expected})
    assert config_of(tmp_path)["tie_word_embeddings"] is False
    assert any("base ties lm_head.weight to model.embed_tokens.weight" in note for note in report.notes)
    dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "kept", drop_rate=0)
    families.same(families.load(tmp_path / "kept"), m0 | heads[0])


def test_a_config_that_unties_the_head_unties_its_bias_too(tmp_path):
    """BERT's key decides about both: what stays tied is written under both names, with one mask."""
    config = of("BertForMaskedLM")
    base, models = saved(tmp_path, config, BERT)
    for i, model in enumerate(models):
        head = {"cls.predictions.decoder.weight": model["bert.embeddings.word_embeddings.weight"] + np.float32(1)}
        families.save(tmp_path / f"m{i}", model | head, config)
    found, _ = merged(tmp_path, sparsify={"method": "dare", "drop_rate": 0.5, "keep_dense": []})
    assert set(found) == {*base, *BERT_COPIES}
    assert np.array_equal(found["cls.predictions.decoder.bias"], found["cls.predictions.bias"])
    assert config_of(tmp_path)["tie_word_embeddings"] is False


@pytest.mark.parametrize("who", ["base", "m0"])
def test_a_tied_bias_that_is_stored_twice_is_no_head(tmp_path, who):
    config = of("BertForMaskedLM")
    base, models = saved(tmp_path, config, BERT)
    tensors = base if who == "base" else models[0]
    families.save(tmp_path / who, tensors | {copy: tensors[n] for copy, n in BERT_COPIES.items()}, config)
    found, _ = merged(tmp_path, parameters={"lambda": 0.5})
    families.same(found, {n: mean(n, base[n], [m[n] for m in models]) for n in base})


def test_an_equal_head_of_an_untied_model_is_a_head(tmp_path):
    """Two tensors that may part ways: the config says so, and nothing is folded."""
    config = of("Qwen3ForCausalLM", tie_word_embeddings=False)
    base = made(QWEN)
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    families.save(tmp_path / "base", base, config)
    model = families.tuned(np.random.default_rng(1), base)
    families.save(tmp_path / "m0", model, config)
    dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "out", drop_rate=0)
    families.same(families.load(tmp_path / "out"), model)


def test_nobody_gets_a_head_that_its_class_has_not(tmp_path):
    causal, reward = of("Qwen3ForCausalLM", tie_word_embeddings=True), of("Qwen3ForSequenceClassification")
    base, models = saved(tmp_path, causal, QWEN)
    families.save(tmp_path / "base", base | {"lm_head.weight": base["model.embed_tokens.weight"]}, causal)
    for i, model in enumerate(models):
        score = {"score.weight": np.full((2, H), i, np.float32)}
        families.save(tmp_path / f"m{i}", model | score, reward | {"tie_word_embeddings": True})
    found, report = merged(tmp_path, heads=str(tmp_path / "m0"))
    assert set(found) == {*base, "score.weight"} and not found["score.weight"].any()
    assert not any("lm_head" in note for note in report.notes)


def test_an_untied_class_that_lacks_its_head_is_refused(tmp_path):
    config = of("LlamaForCausalLM", tie_word_embeddings=False)
    _base, models = saved(tmp_path, config, QWEN | {"lm_head.weight": (TOKENS, H)}, k=1)
    del models[0]["lm_head.weight"]
    families.save(tmp_path / "m0", models[0], config)
    with pytest.raises(HomologyError, match=r"m0 lacks lm_head\.weight of"):
        merged(tmp_path, k=1)


def test_copies_in_packs(tmp_path):
    """A lossless pack gives back what is stored; one that drops holds the one tensor."""
    config = of("T5ForConditionalGeneration")
    base, (model,) = saved(tmp_path, config, T5, k=1)
    for name, tensors in (("base", base), ("m0", model)):
        families.save(tmp_path / name, tensors | dict.fromkeys(T5_COPIES, tensors["shared.weight"]), config)
    for options in ({"lossless": True}, {"drop_rate": 0.5, "seed": 3}):
        bits = {} if "lossless" in options else {"bits": 32}
        dk.pack(tmp_path / "base", tmp_path / "m0", tmp_path / "m.safetensors", overwrite=True, **options, **bits)
        dk.unpack(tmp_path / "base", tmp_path / "m.safetensors", tmp_path / "out", overwrite=True)
        found = families.load(tmp_path / "out")
        if "lossless" in options:
            families.same(found, model | dict.fromkeys(T5_COPIES, model["shared.weight"]))
        else:
            dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "dropped", **options)
            families.same(found, families.load(tmp_path / "dropped"))


def test_masks_of_other_lengths_in_a_lossless_pack(tmp_path):
    config = of("GPTNeoXForCausalLM")
    base, (model,) = saved(tmp_path, config, {"gpt_neox.embed_in.weight": (TOKENS, H)}, k=1)
    name = "gpt_neox.layers.0.attention.bias"
    for who, tensors, n in (("base", base, 3), ("m0", model, 5)):
        families.save(tmp_path / who, tensors | {name: np.ones((1, 1, n, n), np.uint8)}, config)
    dk.pack(tmp_path / "base", tmp_path / "m0", tmp_path / "m.safetensors", lossless=True)
    dk.unpack(tmp_path / "base", tmp_path / "m.safetensors", tmp_path / "out")
    families.same(families.load(tmp_path / "out"), model | {name: np.ones((1, 1, 3, 3), np.uint8)})


@pytest.mark.parametrize("who", ["base", "m0"])
def test_other_names_in_packs(tmp_path, who):
    """Masks are drawn by the base's names, so that a pack and `dare drop` agree."""
    config = of("BertForMaskedLM")
    base, (model,) = saved(tmp_path, config, BERT, k=1)
    tensors = base if who == "base" else model
    families.save(tmp_path / who, {gamma_beta(n): a for n, a in tensors.items()}, config)
    names = {n: gamma_beta(n) if who == "base" else n for n in base}
    for options in ({"lossless": True}, {"drop_rate": 0.5, "seed": 3}):
        bits = {} if "lossless" in options else {"bits": 32}
        dk.pack(tmp_path / "base", tmp_path / "m0", tmp_path / "m.safetensors", overwrite=True, **options, **bits)
        dk.unpack(tmp_path / "base", tmp_path / "m.safetensors", tmp_path / "out", overwrite=True)
        found = families.load(tmp_path / "out")
        if "lossless" in options:
            families.same(found, {names[n]: a for n, a in model.items()})
        else:
            dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "dropped", **options)
            families.same(found, families.load(tmp_path / "dropped"))


def test_a_wrapped_base_is_written_out_before_it_is_packed_on(tmp_path):
    config = of("BertForMaskedLM")
    base, _ = saved(tmp_path, config, BERT, k=1)
    families.save(tmp_path / "base", {f"module.{n}": a for n, a in base.items()}, config)
    for options in ({"lossless": True}, {"drop_rate": 0.5}):
        with pytest.raises(PlanError, match=r"base stores bert\S+ as module.bert\S+: write it out"):
            dk.pack(tmp_path / "base", tmp_path / "m0", tmp_path / "m.safetensors", **options)
    dk.merge({"models": [str(tmp_path / "base")], "merge_method": "linear"}, tmp_path / "plain")
    families.same(families.load(tmp_path / "plain"), base)


def test_an_own_head_in_packs(tmp_path):
    config = of("Qwen3ForCausalLM", tie_word_embeddings=True)
    base, (model,) = saved(tmp_path, config, QWEN, k=1)
    own = model | {"lm_head.weight": model["model.embed_tokens.weight"] + np.float32(0.1)}
    families.save(tmp_path / "m0", own, config)
    with pytest.raises(PlanError, match=r"lm_head.weight of its own, which .*base ties to another"):
        dk.pack(tmp_path / "base", tmp_path / "m0", tmp_path / "m.safetensors", lossless=True)
    families.save(tmp_path / "base", base | {"lm_head.weight": base["model.embed_tokens.weight"]}, config)
    dk.pack(tmp_path / "base", tmp_path / "m0", tmp_path / "m.safetensors", lossless=True)
    dk.unpack(tmp_path / "base", tmp_path / "m.safetensors", tmp_path / "out")
    families.same(families.load(tmp_path / "out"), own)
    assert config_of(tmp_path)["tie_word_embeddings"] is False


def test_equality_reads_all_bytes():
    long = np.zeros(3 * BLOCK, np.uint8)
    other = long.copy()
    other[BLOCK + 12345] = 1  # where no sample is taken
    infos = [TensorInfo("x", "U8", raw.shape, ArrayBytes(raw)) for raw in (long, long.copy(), other)]
    assert are_equal(infos[0], infos[1]) and not are_equal(infos[0], infos[2])
    assert not are_equal(infos[0], TensorInfo("x", "I8", long.shape, ArrayBytes(long)))


def test_arrays_of_a_tied_base_and_untied_models():
    base = made(QWEN)
    own = families.tuned(np.random.default_rng(1), base) | {"lm_head.weight": np.ones((TOKENS, H), np.float32)}
    found = dk.merge_tensors(base, [own], method="linear")
    families.same(found, own)


# --- names


def gamma_beta(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def checkpointed(name):
    return name.replace("layer.0.", "layer.0._checkpoint_wrapped_module.")


def adapted(name):
    return "base_model.model." + name.replace("query.weight", "query.base_layer.weight")


NAMINGS = {
    "gamma and beta": gamma_beta,
    "data parallel": "module.{}".format,
    "compiled": "_orig_mod.{}".format,
    "both": "module._orig_mod.{}".format,
    "inside": checkpointed,
    "adapters": adapted,
    "an attribute": "model.{}".format,
    "a wrapped attribute": "module.student.{}".format,
}


@pytest.mark.parametrize("who", ["base", "m0"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_other_names_are_the_same_tensors(tmp_path, naming, who):
    config = of("BertForMaskedLM")
    base, models = saved(tmp_path, config, BERT)
    data = families.recipe(tmp_path, k=2, sparsify={"method": "dare", "drop_rate": 0.5, "seed": 3})
    data["models"] = [{"model": entry["model"], "parameters": {"seed": 5 + i}} for i, entry in
                      enumerate(data["models"])]  # fmt: skip
    dk.merge(data, tmp_path / "plain")
    tensors = base if who == "base" else models[0]
    renamed = {NAMINGS[naming](n): a for n, a in tensors.items()}
    assert set(renamed) != set(tensors)
    families.save(tmp_path / who, renamed, config)
    report = dk.merge(data, tmp_path / "out")
    found, plain = families.load(tmp_path / "out"), families.load(tmp_path / "plain")
    legacy = naming == "gamma and beta" and who == "base"  # written as the base has them, which every loader reads
    expected = {gamma_beta(n) if legacy else n: a for n, a in plain.items()}
    if not legacy:  # masks are drawn by the names that are written
        families.same(found, expected)
    assert set(found) == set(expected)
    wrapped = any("training wrapper" in note for note in report.notes)
    assert wrapped == (naming != "gamma and beta")
    digests = json.loads((tmp_path / "out" / "darekit.lock.json").read_text())["inputs"]
    assert all(entry["content_digest"] for entry in digests)


def test_names_of_weight_norms(tmp_path):
    config = of("Wav2Vec2ForCTC")
    conv = "wav2vec2.encoder.pos_conv_embed.conv"
    new = [f"{conv}.parametrizations.weight.original{i}" for i in (0, 1)]
    base, models = saved(tmp_path, config, {new[0]: (1, 1, 3), new[1]: (4, 2, 3), "lm_head.bias": (5,)})
    old = dict(zip(new, (f"{conv}.weight_g", f"{conv}.weight_v"), strict=True))
    families.save(tmp_path / "base", {old.get(n, n): a for n, a in base.items()}, config)
    found, _ = merged(tmp_path, parameters={"lambda": 0.5})
    for name, array in base.items():
        expected = mean(name, array, [m[name] for m in models])
        families.same({name: found[old.get(name, name)]}, {name: expected})


@pytest.mark.parametrize("who", ["base", "m0"])
def test_a_model_without_the_prefix_of_its_class(tmp_path, who):
    config = of("GPT2LMHeadModel")
    shapes = {"transformer.wte.weight": (TOKENS, H), "transformer.h.0.attn.c_attn.weight": (H, 3 * H),
              "transformer.ln_f.weight": (H,)}  # fmt: skip
    base, (model,) = saved(tmp_path, config, shapes, k=1)
    tensors = base if who == "base" else model
    families.save(tmp_path / who, {n.removeprefix("transformer."): a for n, a in tensors.items()}, config)
    found, _ = merged(tmp_path, k=1)
    families.same({n.removeprefix("transformer."): a for n, a in found.items()},
                  {n.removeprefix("transformer."): a for n, a in model.items()})  # fmt: skip
    assert all(name.startswith("transformer.") == (who != "base") for name in found)


def test_names_of_the_hub_and_of_run_time(tmp_path):
    config = of("Gemma3ForConditionalGeneration", text_config={"vocab_size": TOKENS}, vision_config={})
    hub = {"language_model.model.embed_tokens.weight": (TOKENS, H),
           "language_model.model.layers.0.mlp.up_proj.weight": (H, H),
           "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (H, H),
           "multi_modal_projector.mm_input_projection_weight": (H, H)}  # fmt: skip
    _base, (model,) = saved(tmp_path, config, hub, k=1)
    facts = facts_of(config)
    later = {facts.canonical(n): a for n, a in model.items()}
    assert not set(later) & set(hub)
    families.save(tmp_path / "m0", later, config)
    found, _ = merged(tmp_path, k=1)
    families.same(found, model)


def test_two_tensors_of_one_name(tmp_path):
    """Equal values are one tensor; others are refused, as nobody knows which of them the loader takes."""
    config = of("BertForMaskedLM")
    base, models = saved(tmp_path, config, BERT, k=1)
    name = "cls.predictions.transform.dense.weight"
    families.save(tmp_path / "m0", models[0] | {f"module.{name}": models[0][name]}, config)
    families.same(merged(tmp_path, k=1)[0], models[0])
    families.save(tmp_path / "m0", models[0] | {f"module.{name}": base[name]}, config)
    with pytest.raises(HomologyError, match=rf"m0 stores {name} and module.{name}, which are one tensor"):
        merged(tmp_path, k=1)


def test_an_adapter_that_is_not_merged_is_the_cause(tmp_path):
    config = of("LlamaForCausalLM")
    base, (model,) = saved(tmp_path, config, QWEN, k=1)
    at = "base_model.model.model.layers.0.self_attn.q_proj"
    wrapped = {f"base_model.model.{n}": a for n, a in model.items() if "q_proj" not in n}
    wrapped |= {f"{at}.base_layer.weight": base["model.layers.0.self_attn.q_proj.weight"]}
    wrapped |= {f"{at}.lora_A.default.weight": np.zeros((2, H)), f"{at}.lora_B.default.weight": np.zeros((H, 2))}
    families.save(tmp_path / "m0", wrapped, config)
    with pytest.raises(HomologyError, match=r"adapter that is not merged .*lora_A.*merge_and_unload"):
        merged(tmp_path, k=1)


def test_the_language_model_of_a_model_with_vision_is_another_model(tmp_path):
    hub = {"language_model.model.embed_tokens.weight": (TOKENS, H), "multi_modal_projector.w": (H, H),
           "language_model.model.layers.0.mlp.up_proj.weight": (H, H)}  # fmt: skip
    config = of("Gemma3ForConditionalGeneration", text_config={}, vision_config={})
    _base, (model,) = saved(tmp_path, config, hub, k=1)
    text = {n.removeprefix("language_model."): a for n, a in model.items() if n.startswith("language_model.")}
    families.save(tmp_path / "m0", text, of("Gemma3ForCausalLM"))
    with pytest.raises(HomologyError, match=r"several parts: .*modules: \{text_decoder: ") as error:
        merged(tmp_path, k=1)
    assert "save_pretrained" not in str(error.value)  # loaded in the class of the base, it would get new towers


# --- experts

EXPERTS = {
    f"model.layers.0.mlp.experts.{e}.{part}_proj.weight": (H, 4) if part == "down" else (4, H)
    for e in range(11)
    for part in ("gate", "up", "down")
}


def fused(tensors):
    """As Qwen3-MoE has them in memory: gate above up, expert by expert."""
    at = "model.layers.0.mlp.experts"
    one = lambda e, part: tensors[f"{at}.{e}.{part}_proj.weight"]  # noqa: E731
    rest = {n: a for n, a in tensors.items() if ".experts." not in n}
    return rest | {
        f"{at}.gate_up_proj": np.stack([np.concatenate([one(e, "gate"), one(e, "up")]) for e in range(11)]),
        f"{at}.down_proj": np.stack([one(e, "down") for e in range(11)]),
    }


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("who", ["base", "m0"])
def test_experts_fused_here_and_single_there(tmp_path, who, kind):
    config = of("Qwen3MoeForCausalLM")
    base, (model,) = saved(tmp_path, config, QWEN | EXPERTS, k=1, kind=kind)
    families.save(tmp_path / who, fused(base if who == "base" else model), config)
    found, report = merged(tmp_path, k=1)
    families.same(found, fused(model) if who == "base" else model)
    assert any("m0 stores" in note and "experts" in note for note in report.notes)


def test_experts_that_do_not_fill_the_fused_tensor_are_refused(tmp_path):
    config = of("Qwen3MoeForCausalLM")
    _base, (model,) = saved(tmp_path, config, QWEN | EXPERTS, k=1)
    whole = fused(model)
    whole["model.layers.0.mlp.experts.down_proj"] = whole["model.layers.0.mlp.experts.down_proj"][:-1]
    families.save(tmp_path / "m0", whole, config)
    with pytest.raises(HomologyError, match=r"experts.0.down_proj"):
        merged(tmp_path, k=1)


def test_parts_and_joined_sources():
    raw = np.arange(60, dtype=np.uint8)
    part = Part(ArrayBytes(raw), 10, 20)
    joined = Joined((part, Part(ArrayBytes(raw), 40, 20)))
    assert (part.nbytes, joined.nbytes) == (20, 40)
    expected = np.concatenate([raw[10:30], raw[40:60]])
    for offset, count in ((0, 40), (15, 10), (19, 1), (20, 20), (39, 1), (7, 0)):
        room = np.empty(count, np.uint8)
        joined.read_into(room, offset)
        assert np.array_equal(room, expected[offset : offset + count])
    with pytest.raises(ValueError, match="outside"):
        joined.read_into(np.empty(2, np.uint8), 39)


# --- buffers


def test_masks_and_frequencies_are_no_obstacle(tmp_path):
    config = of("GPTNeoXForCausalLM")
    shapes = {"gpt_neox.embed_in.weight": (TOKENS, H), "gpt_neox.layers.0.attention.dense.weight": (H, H),
              "gpt_neox.layers.0.attention.dense.bias": (H,), "embed_out.weight": (TOKENS, H)}  # fmt: skip
    base, models = saved(tmp_path, config, shapes)
    at = "gpt_neox.layers.0.attention"
    short, long = (np.tril(np.ones((n, n), np.uint8))[None, None] for n in (4, 6))
    own = {f"{at}.bias": short, f"{at}.masked_bias": np.array(-np.inf, np.float16)}
    families.save(tmp_path / "base", base | own, config)
    families.save(tmp_path / "m0", models[0] | {f"{at}.bias": long, f"{at}.rotary_emb.inv_freq": np.ones(2)}, config)
    families.save(tmp_path / "m1", models[1] | {f"{at}.bias": short.astype(bool)}, config)
    found, _ = merged(tmp_path, parameters={"lambda": 0.5}, dtype="float16")
    families.same({n: found[n] for n in own}, own)  # the base's, to the byte
    assert set(found) == {*base, *own}
    dk.merge({"models": [str(tmp_path / "base")], "merge_method": "linear"}, tmp_path / "alone")
    families.same(families.load(tmp_path / "alone"), base | own)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.float16])
def test_positions_count_from_zero(tmp_path, kind):
    config = of("BertForMaskedLM")
    base, models = saved(tmp_path, config, BERT)
    name = "bert.embeddings.position_ids"
    families.save(tmp_path / "base", base | {name: np.arange(5, dtype=kind)[None]}, config)
    families.save(tmp_path / "m0", models[0] | {name: np.arange(9, dtype=np.float16)[None]}, config)
    found, _ = merged(tmp_path)
    assert (name in found) == (kind is not np.float16)
    if name in found:
        assert found[name].tolist() == [[0, 1, 2, 3, 4]]


# --- groups


@pytest.mark.parametrize(
    ("model", "name", "shape", "group"),
    [
        ("T5ForConditionalGeneration", "shared.weight", (9, 4), "embeddings"),
        ("T5ForConditionalGeneration", "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (9, 4),
         "embeddings"),
        ("GPTNeoXForCausalLM", "embed_out.weight", (9, 4), "heads"),
        ("ResNetForImageClassification", "resnet.embedder.embedder.convolution.weight", (4, 3, 7, 7), None),
        ("WhisperForConditionalGeneration", "proj_out.weight", (9, 4), "heads"),
        ("DistilBertForMaskedLM", "vocab_transform.weight", (4, 4), "heads"),
        ("MambaForCausalLM", "backbone.embeddings.weight", (9, 4), "embeddings"),
        ("AlbertForMaskedLM", "albert.encoder.embedding_hidden_mapping_in.weight", (9, 4), None),
        ("LlamaForCausalLM", "model.layers.0.self_attn.q_proj.bias", (4,), "biases"),
        ("LlamaForCausalLM", "model.norm.weight", (4,), "norms"),
    ],
)  # fmt: skip
def test_groups(model, name, shape, group):
    assert group_of(name, shape, facts_of({"architectures": [model]})) == group


def test_what_is_kept_dense_follows_the_table(tmp_path):
    config = of("T5ForConditionalGeneration")
    base, (model,) = saved(tmp_path, config, T5, k=1)
    dk.drop(tmp_path / "base", tmp_path / "m0", tmp_path / "out", drop_rate=1, keep_dense=["embeddings"])
    found = families.load(tmp_path / "out")
    for name in base:
        kept = name in ("shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        assert np.array_equal(found[name], (model if kept else base)[name])
    assert json.loads((tmp_path / "out" / "darekit.lock.json").read_text())["groups"] == MEANING


# --- vocabularies


def vocabularies(path, name, shapes, axes, more=2, **config):
    """m0 has more tokens than the base, along `axes`: tensor -> axis."""
    base, (model,) = saved(path, of(name, **config), shapes, k=1)
    for tensor, axis in axes.items():
        widths = [(0, more if i == axis else 0) for i in range(model[tensor].ndim)]
        model[tensor] = np.pad(model[tensor], widths, constant_values=1)
    families.save(path / "m0", model, of(name, **config))
    return base, model


VOCABULARIES = {
    "BartForConditionalGeneration": (
        {"model.shared.weight": (TOKENS, H), "final_logits_bias": (1, TOKENS), "model.encoder.layers.0.fc1.bias": (H,)},
        {"model.shared.weight": 0, "final_logits_bias": 1}, {"vocab_size": TOKENS},
    ),
    "MambaForCausalLM": (
        {"backbone.embeddings.weight": (TOKENS, H)}, {"backbone.embeddings.weight": 0}, {"vocab_size": TOKENS}
    ),
    "T5ForConditionalGeneration": (T5, {"shared.weight": 0}, {"vocab_size": TOKENS}),
    "BertForMaskedLM": (
        BERT | {"cls.predictions.decoder.bias": (TOKENS,), "bert.embeddings.position_embeddings.weight": (TOKENS, H)},
        {"bert.embeddings.word_embeddings.weight": 0, "cls.predictions.bias": 0, "cls.predictions.decoder.bias": 0},
        {"vocab_size": TOKENS, "tie_word_embeddings": False},
    ),
    "DistilBertForMaskedLM": (
        {"distilbert.embeddings.word_embeddings.weight": (TOKENS, H), "vocab_projector.bias": (TOKENS,),
         "vocab_transform.weight": (TOKENS, TOKENS)},
        {"distilbert.embeddings.word_embeddings.weight": 0, "vocab_projector.bias": 0}, {"vocab_size": TOKENS},
    ),
    "Gemma3ForConditionalGeneration": (
        {"language_model.model.embed_tokens.weight": (TOKENS, H)}, {"language_model.model.embed_tokens.weight": 0},
        {"text_config": {"vocab_size": TOKENS}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabularies_of_every_family(tmp_path, name):
    shapes, axes, config = VOCABULARIES[name]
    _base, model = vocabularies(tmp_path, name, shapes, axes, **config)
    with pytest.raises(HomologyError, match=f"{TOKENS} rows in base, {TOKENS + 2} rows in m0"):
        merged(tmp_path, k=1)
    for vocab, rows in (("base", TOKENS), ("pad", TOKENS + 2)):
        found, _ = merged(tmp_path, k=1, vocab=vocab)
        expected = {n: a.take(range(min(a.shape[axes[n]], rows)), axes[n]) if n in axes else a
                    for n, a in model.items()}  # fmt: skip
        families.same(found, expected)
        written = config_of(tmp_path)
        assert written.get("text_config", written)["vocab_size"] == rows
        assert "vocab_size" in config or "vocab_size" not in written


def test_a_first_word_that_is_the_familys_own_stays(tmp_path):
    """Llama 4's causal class has its base model under no prefix that the loader knows, but its names begin with one."""
    config = of("Llama4ForCausalLM", model_type="llama4_text", tie_word_embeddings=True)
    base, _models = saved(tmp_path, config, QWEN, k=2)
    found, report = merged(tmp_path)
    assert set(found) == set(base) and all(name.startswith("model.") for name in base)
    assert not any("wrapper" in note for note in report.notes)
