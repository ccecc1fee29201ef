# SPDX-License-Identifier: Apache-2.0
"""Folders as people report them in public: classifiers whose classes differ, files that a download left half, links to
nothing, the Hub's cache by hand, value heads, leftovers of quantisation, pipelines of diffusers."""

import json
import shutil

import numpy as np
import pytest

import darekit
import families
from darekit.planning.travel.beside import companions_of

NLI = {"0": "entailment", "1": "neutral", "2": "contradiction"}
TURNED = {"0": "contradiction", "1": "neutral", "2": "entailment"}
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9085657\n"


@pytest.fixture
def place(llamas, tmp_path, monkeypatch):
    """base, m0, m1 in the working directory."""
    for name in ("base", "m0", "m1"):
        shutil.copytree(llamas.path / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(directory, **changes):
    path = directory / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def add(directory, tensors):
    found = families.load(directory) | tensors
    families.write_safetensors(directory / "model.safetensors", found)


def merge(dare, place, *more, models="m0, m1", out="out"):
    lines = ["base_model: base", f"models: [{models}]", "merge_method: task_arithmetic", "parameters: {lambda: 0.5}"]
    (place / "recipe.yaml").write_text("\n".join([*lines, *more]))
    done = dare("merge", "recipe.yaml", out)
    return done.code, " ".join((done.out + done.err).split())


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


# --- what the rows of a classifier stand for


def classifiers(place, *labels):
    """base, m0 and m1 get a classifier of three classes; `labels`: id2label of each, None: none."""
    rng = np.random.default_rng(0)
    head = rng.standard_normal((3, families.HIDDEN)).astype(np.float32)
    for name, said in zip(("base", "m0", "m1"), labels, strict=True):
        add(place / name, {"score.weight": head + 0.001 * len(name)})
        edit(place / name, id2label=said if said else ..., architectures=["LlamaForSequenceClassification"])


def test_classes_in_another_order_are_told(place, dare):
    classifiers(place, None, NLI, TURNED)
    code, text = merge(dare, place)
    assert code == 0
    assert "the classes of m0 and m1 differ (0 is 'entailment' and 'contradiction'; 2 is" in text
    assert "heads: m0" in text


def test_with_the_head_of_one_model_nothing_is_told_and_its_classes_are_the_outputs(place, dare):
    classifiers(place, None, NLI, TURNED)
    code, text = merge(dare, place, "heads: m1")
    assert code == 0
    assert "classes" not in text
    assert config_of(place / "out")["id2label"] == TURNED


def test_classes_that_the_models_share_are_the_outputs(place, dare):
    classifiers(place, {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, NLI, {k: v.upper() for k, v in NLI.items()})
    edit(place / "m0", problem_type="single_label_classification")
    code, text = merge(dare, place)
    assert code == 0
    assert "differ" not in text
    assert config_of(place / "out")["id2label"] == NLI
    assert "problem_type" not in config_of(place / "out")  # of one model alone


def test_classes_of_one_model_stay_when_its_delta_is_dropped(place, dare):
    classifiers(place, TURNED, NLI, NLI)
    done = dare("drop", "base", "m0", "out", "-p", "0.5")
    assert done.code == 0
    assert "classes" not in done.err
    assert config_of(place / "out")["id2label"] == NLI


def test_other_kinds_of_answers_are_told(place, dare):
    classifiers(place, None, None, None)
    edit(place / "m0", problem_type="regression")
    edit(place / "m1", problem_type="multi_label_classification")
    code, text = merge(dare, place)
    assert code == 0
    assert "problem_type is regression in m0, multi_label_classification in m1" in text


def test_nothing_is_told_of_models_without_classes(place, dare):
    for name in ("base", "m0", "m1"):
        edit(place / name, id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    code, text = merge(dare, place)
    assert code == 0
    assert "classes" not in text


# --- one model under two names


def test_equal_models_are_told(place, dare):
    shutil.rmtree(place / "m1")
    shutil.copytree(place / "m0", place / "m1")
    code, text = merge(dare, place)
    assert code == 0
    assert "m0 and m1 are identical wherever they were sampled" in text
    assert "identical" not in merge(dare, place, models="m0, ./m0", out="out2")[1]  # said by the recipe already


# --- configs


def test_a_base_without_a_config_gets_its_models(place, dare):
    (place / "base/config.json").unlink()
    code, text = merge(dare, place)
    assert code == 0
    assert "the base has no config.json: the output has that of m0" in text
    assert config_of(place / "out")["hidden_size"] == families.HIDDEN


def test_a_config_that_is_a_link_to_nothing_is_refused(place, dare):
    (place / "m0/config.json").unlink()
    (place / "m0/config.json").symlink_to(place / "gone")
    code, text = merge(dare, place)
    assert code == 1
    assert "m0/config.json is a link to a file that does not exist" in text


def test_a_byte_order_mark_is_no_fault(place, dare):
    for name in ("base", "m0"):
        path = place / name / "config.json"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert merge(dare, place)[0] == 0
    assert config_of(place / "out")["hidden_size"] == families.HIDDEN


# --- files beside the weights


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (POINTER, "it is a Git LFS pointer"),
        ('{"version": "1.0", "model": {"voc', "it is not a complete JSON document"),
        ("<!DOCTYPE html><html>404</html>", "it is not a complete JSON document"),
        (None, "it is a link to a file that does not exist"),
    ],
)
def test_a_damaged_tokenizer_is_told_and_a_whole_one_taken(place, dare, text, why):
    whole = json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}}, "added_tokens": []})
    (place / "base/tokenizer.json").write_text(whole)
    for name in ("m0", "m1"):
        path = place / name / "tokenizer.json"
        path.write_text(text) if text is not None else path.symlink_to(place / "gone")
    code, said = merge(dare, place)
    assert code == 0
    assert f"not copied: m0/tokenizer.json, m1/tokenizer.json ({why}" in said
    assert (place / "out/tokenizer.json").read_text() == whole


def test_a_vocabulary_that_is_a_pointer_is_not_copied(place, dare):
    (place / "base/tokenizer.model").write_text(POINTER)
    code, text = merge(dare, place)
    assert code == 0
    assert "not copied: base/tokenizer.model (it is a Git LFS pointer" in text
    assert not (place / "out/tokenizer.model").exists()


def test_half_downloads_logs_and_secrets_stay_behind(place, dare):
    names = [
        "model.safetensors.incomplete",
        "a.json.tmp",
        "Thumbs.db",
        "token",
        "hf_token",
        "credentials.json",
        "id.pem",
    ]
    folders = ["tb_logs/version_0/hparams.yaml", "mlruns/0/meta.yaml", "checkpoints/a/config.json"]
    for name in (*names, *folders, "modules.json"):
        path = place / "m0" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert dare("drop", "base", "m0", "out", "-p", "0.5").code == 0
    found = {str(path.relative_to(place / "out")) for path in (place / "out").rglob("*")}
    assert "modules.json" in found
    assert not found & {*names, *folders}


def test_weights_that_nobody_reads_are_named(place, dare):
    head = {"v_head.summary.weight": np.ones((1, families.HIDDEN), np.float32)}
    families.write_safetensors(place / "m0/value_head.safetensors", head)
    families.write_safetensors(place / "m1/model.fp16.safetensors", head)  # a second copy of the model
    families.write_safetensors(place / "m1/consolidated.safetensors", head)
    code, text = merge(dare, place)
    assert code == 0
    assert "m0: value_head.safetensors is neither read nor copied: the model is in model.safetensors" in text
    assert "fp16" not in text
    assert "consolidated" not in text


# --- places


def test_a_folder_of_the_hubs_cache_is_its_main_snapshot(place, dare):
    commits = ["a" * 40, "b" * 40]
    root = place / "hub/models--org--tuned"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text(commits[0])
    shutil.copytree(place / "m0", root / "snapshots" / commits[0])
    shutil.copytree(place / "m1", root / "snapshots" / commits[1])
    assert merge(dare, place, models=str(root))[0] == 0
    assert merge(dare, place, models="m0", out="out2")[0] == 0
    ours, theirs = families.load(place / "out"), families.load(place / "out2")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    (root / "refs/main").write_text("../../m0")  # no commit
    code, text = merge(dare, place, models=str(root), out="out3")
    assert code == 1
    assert f"snapshots/{commits[1]}" in text


def test_an_output_with_too_long_a_name_is_refused(place, dare):
    code, text = merge(dare, place, out="a" * 300)
    assert code == 1
    assert "cannot be a directory: File name too long" in text


# --- refusals that name the way out


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"PK\x03\x04" + b"\0" * 90, "zip archive, as torch.save writes"),
        (b"GGUF" + b"\0" * 90, "GGUF file under another name"),
        (b"Entry not found", 'begins with the text "Entry not found"'),
        (b'{"error": "Access to model is restricted"}', "web page or an error message"),
    ],
)
def test_files_of_other_formats_under_the_name_of_weights(place, dare, data, says):
    (place / "m0/model.safetensors").write_bytes(data)
    code, text = merge(dare, place)
    assert code == 1
    assert says in text


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.safetensors.incomplete", "the download is incomplete"),
        ("model-00001-of-00002.safetensors.crdownload", "the download is incomplete"),
        ("model.onnx", "graph for inference"),
        ("rust_model.ot", "rust-bert"),
        ("model.nemo", "NeMo"),
    ],
)
def test_folders_without_weights_that_can_be_read(place, dare, name, says):
    (place / "m0/model.safetensors").rename(place / "m0" / name)
    code, text = merge(dare, place)
    assert code == 1
    assert says in text


def test_a_pipeline_of_diffusers_is_merged_part_by_part(place, dare):
    for name in ("base", "m0", "m1"):
        (place / name / "unet").mkdir()
        (place / name / "model.safetensors").rename(place / name / "unet/diffusion_pytorch_model.safetensors")
        (place / name / "config.json").rename(place / name / "unet/config.json")
        edit(place / name / "unet", _class_name="UNet2DConditionModel")
        (place / name / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    code, text = merge(dare, place)
    assert code == 1
    assert f"base is a pipeline of diffusers, not one model: merge its parts one by one ({place}/base/unet)" in text
    recipe = {"base_model": "base/unet", "models": ["m0/unet", "m1/unet"], "merge_method": "linear"}
    assert any("diffusion_pytorch_model.safetensors: rename" in note for note in darekit.plan(recipe).notes)


def renamed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def with_more(name, shape=(1,), dtype=np.float32):
    return lambda tensors: tensors | {name: np.ones(shape, dtype)}


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "config", "says"),
    [
        (with_more(f"{UP}.weight_scale_inv"), {}, "has tensors that accompany quantised weights"),
        (with_more("model.layers.0.self_attn.k_proj.k_scale"), {}, "has tensors that accompany quantised weights"),
        (
            with_more("v_head.summary.weight", (1, 32)),
            {},
            "with the value head of reinforcement learning, which nothing else reads",
        ),
        (
            lambda tensors: with_more("v_head.summary.weight")(renamed("pretrained_model.")(tensors)),
            {},
            "under the names of its wrapper, with the value head",
        ),
        (lambda tensors: tensors | renamed("ema.")(tensors), {}, "holds every weight twice"),
        (
            lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(UP)},
            {"model_type": "phi3"},
            "model_type is phi3 in m0 and llama in base",
        ),
    ],
)
def test_tensors_that_do_not_correspond_have_a_cause(place, dare, change, config, says):
    families.write_safetensors(place / "m0/model.safetensors", change(families.load(place / "m0")))
    edit(place / "m0", **config)
    code, text = merge(dare, place)
    assert code == 1
    assert says in text


def test_a_text_model_is_told_how_it_goes_into_one_with_vision(place, dare):
    more = {"vision_tower.patch.weight": (4, 4), "multi_modal_projector.weight": (4, families.HIDDEN)}
    for name in ("base", "m0", "m1"):
        tensors = {n: t for n, t in families.load(place / name).items() if n != "lm_head.weight"}
        families.write_safetensors(place / name / "model.safetensors", tensors)
    for name in ("base", "m1"):
        tensors = {f"language_model.{n}": t for n, t in families.load(place / name).items()}
        tensors |= {n: np.ones(shape, np.float32) for n, shape in more.items()}
        families.write_safetensors(place / name / "model.safetensors", tensors)
        parts = {"text_config": {"model_type": "gemma3_text"}, "vision_config": {"a": 1}}
        edit(place / name, model_type="gemma3", architectures=["Gemma3ForConditionalGeneration"], **parts)
    edit(place / "m0", model_type="gemma3_text", architectures=["Gemma3ForCausalLM"])
    code, text = merge(dare, place, models="m0")
    assert code == 1
    assert "`modules: {text_decoder: {models: [m0]}}`" in text
    assert "save_pretrained" not in text  # its class would make new weights for what is missing
    lines = ["base_model: base", "merge_method: linear", "modules: {text_decoder: {models: [m0]}}"]
    (place / "recipe.yaml").write_text("\n".join(lines))
    assert dare("merge", "recipe.yaml", "out").code == 0
    assert more.keys() < families.load(place / "out").keys()
    done = dare("drop", "m0", "m1", "out2", "-p", "0.5")
    assert done.code == 1
    assert "m0 has only the text part of m1" in " ".join(done.err.split())


@pytest.mark.parametrize("names", ["as the whole", "as its class has them"])
def test_a_text_model_of_another_class_is_told_too(place, dare, names):
    """Qwen3.5: its two classes call the same stored tensors by other names, and may store them under either."""
    for name in ("base", "m0"):
        tensors = families.load(place / name)
        if name == "base" or names == "as the whole":
            tensors = {n.replace("model.", "model.language_model.", 1): t for n, t in tensors.items()}
        kind = "Qwen3_5ForCausalLM"
        if name == "base":
            tensors["model.visual.patch_embed.proj.weight"] = np.ones((4, 4), np.float32)
            kind = "Qwen3_5ForConditionalGeneration"
            edit(place / name, text_config={"model_type": "qwen3_5_text"}, vision_config={"depth": 1})
        families.write_safetensors(place / name / "model.safetensors", tensors)
        edit(place / name, model_type="qwen3_5" if name == "base" else "qwen3_5_text", architectures=[kind])
    code, text = merge(dare, place, models="m0")
    assert code == 1
    assert "m0 has only the text part of base" in text
    assert "`modules: {text_decoder: {models: [m0]}}`" in text
    (place / "recipe.yaml").write_text(
        "base_model: base\nmerge_method: linear\nmodules: {text_decoder: {models: [m0]}}\n"
    )
    assert dare("merge", "recipe.yaml", "out").code == 0
    ours, tuned = families.load(place / "out"), families.load(place / "m0")
    assert ours.keys() == families.load(place / "base").keys()
    for name, tensor in tuned.items():
        long = name if name in ours else name.replace("model.", "model.language_model.", 1)
        assert np.array_equal(ours[long], tensor)


# --- weights that leave nothing


def test_a_single_model_of_weight_0_is_not_the_output(place, dare):
    (place / "recipe.yaml").write_text(
        "base_model: base\nmodels: [{model: m0, parameters: {weight: 0}}]\nmerge_method: linear\n"
    )
    done = dare("merge", "recipe.yaml", "zero")
    assert done.code == 0
    assert "all weights are 0: the output is the base" in done.err
    ours, base = families.load(place / "zero"), families.load(place / "base")
    assert all(np.array_equal(ours[name], base[name]) for name in base)


def test_one_tensor_of_weight_0_stays_the_bases(place, dare):
    weight = "[{filter: mlp, value: 0}, {value: 1}]"
    (place / "recipe.yaml").write_text(
        f"base_model: base\nmodels: [{{model: m0, parameters: {{weight: {weight}}}}}]\nmerge_method: linear\n"
    )
    assert dare("merge", "recipe.yaml", "some").code == 0
    ours, base, tuned = (families.load(place / name) for name in ("some", "base", "m0"))
    assert all(np.array_equal(ours[name], (base if "mlp" in name else tuned)[name]) for name in base)


def test_weights_that_add_up_to_0_are_told(place, dare):
    (place / "recipe.yaml").write_text(
        "base_model: base\nmerge_method: linear\nmodels:\n"
        "- {model: m0, parameters: {weight: 1}}\n- {model: m1, parameters: {weight: -1}}\n"
    )
    done = dare("merge", "recipe.yaml", "out")
    assert done.code == 0
    assert "normalize has nothing to divide by" in " ".join(done.err.split())


@pytest.mark.parametrize(
    ("method", "more", "note"),
    [
        ("passthrough", "", ""),
        ("linear", "", "the output is 0 everywhere"),
        ("ties", "base_model: base", "the output is the base"),
        ("nuslerp", "base_model: base", "they say nothing about the models"),
    ],
)
def test_what_weights_of_0_leave_is_told_as_it_is(place, dare, method, more, note):
    names = ["m0"] if method in ("passthrough", "linear") else ["m0", "m1"]
    key = "scale" if method == "passthrough" else "weight"
    models = ", ".join(f"{{model: {name}, parameters: {{{key}: 0}}}}" for name in names)
    (place / "recipe.yaml").write_text(f"models: [{models}]\nmerge_method: {method}\n{more}\n")
    done = dare("merge", "recipe.yaml", "out")
    assert done.code == 0
    assert note in " ".join(done.err.split())
    ours, base = families.load(place / "out"), families.load(place / "base")
    if method == "nuslerp":
        return
    assert all(np.array_equal(ours[name], base[name] if more else np.zeros_like(base[name])) for name in base)


def test_rows_that_the_base_lacks_are_averaged_where_all_weights_are_0(tmp_path, dare, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    shapes = {"model.embed_tokens.weight": 4, "model.layers.0.mlp.up_proj.weight": 4}
    base = {name: rng.normal(size=(rows, families.HIDDEN)).astype(np.float32) for name, rows in shapes.items()}
    families.save(tmp_path / "base", base)
    more = rng.normal(size=(2, 2, families.HIDDEN)).astype(np.float32)
    for at, name in enumerate(("m0", "m1")):
        tuned = {key: value + rng.normal(size=value.shape).astype(np.float32) / 1000 for key, value in base.items()}
        tuned["model.embed_tokens.weight"] = np.concatenate([tuned["model.embed_tokens.weight"], more[at]])
        families.save(tmp_path / name, tuned)
    weight = "[{filter: embed_tokens, value: 0}, {value: 1}]"
    models = ", ".join(f"{{model: {name}, parameters: {{weight: {weight}}}}}" for name in ("m0", "m1"))
    (tmp_path / "recipe.yaml").write_text(
        f"base_model: base\nmodels: [{models}]\nmerge_method: linear\nvocab: pad\ndtype: float32\n"
    )
    assert dare("merge", "recipe.yaml", "out").code == 0
    ours = families.load(tmp_path / "out")["model.embed_tokens.weight"]
    assert np.array_equal(ours[:4], base["model.embed_tokens.weight"])
    assert np.allclose(ours[4:], more.mean(0), atol=1e-6)


def test_whole_and_empty_files_of_a_tokenizer(place, dare):
    """Blanks after the end damage nothing; nothing but blanks, or zeros of an interrupted download, is no tokenizer."""
    whole = json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}}, "added_tokens": []})
    for name in ("base", "m0", "m1"):
        (place / name / "tokenizer.json").write_text(whole + " " * 300 + "\n")
    code, said = merge(dare, place)
    assert code == 0 and "not copied" not in said and (place / "out/tokenizer.json").exists()
    for at, raw in enumerate((b"", b"\0" * 400)):
        (place / "base/tokenizer.json").write_bytes(raw)
        code, said = merge(dare, place, out=f"out{at}")
        assert code == 0 and "base/tokenizer.json (it is empty: download it again" in said


def test_classes_of_a_model_without_a_classifier_mean_nothing(place, dare):
    edit(place / "m0", id2label={"0": "yes", "1": "no"}, architectures=["LlamaForCausalLM"])
    edit(place / "m1", id2label={"0": "no", "1": "yes"}, architectures=["LlamaForCausalLM"])
    code, said = merge(dare, place)
    assert code == 0 and "classes" not in said


# --- what the system has against a name


@pytest.mark.parametrize(
    "words",
    [
        ("pack", "base", "m0", "LONG.safetensors", "--lossless"),
        ("merge", "LONG", "out"),
        ("recommend", "base", "LONG"),
        ("inspect", "LONG", "m0"),
        ("eval", "m0", "--data", "LONG"),
        ("report", "LONG"),
        ("drop", "base", "m0", "LONG", "-p", "0.5"),
        ("extract", "base", "m0", "LONG", "--rank", "2"),
    ],
)
def test_names_that_are_too_long_end_in_one_line(place, dare, words):
    done = dare(*(word.replace("LONG", "a" * 300) for word in words))
    assert done.code == 1
    assert "File name too long" in " ".join(done.err.split())
    assert "Traceback" not in done.err


# --- JSON of strangers, well-formed and of the wrong kinds


@pytest.mark.parametrize("value", [True, 5, "x", ["a"], [None], [[1]], {"a": 1}, {"0": None}, 10**30])
def test_no_value_of_a_config_or_tokenizer_stops_a_plan(place, value):
    whole = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}}, "added_tokens": []}
    for name in ("base", "m1"):
        (place / name / "tokenizer.json").write_text(json.dumps(whole))
    recipe = {"base_model": "base", "models": ["m0", "m1"], "merge_method": "linear"}
    config = config_of(place / "m0")
    for key in ("model_type", "architectures", "rope_scaling", "id2label", "label2id", "eos_token_id", "text_config"):
        (place / "m0/config.json").write_text(json.dumps({**config, key: value}))
        with darekit.plan(recipe) as plan:
            companions_of(plan)
    (place / "m0/config.json").write_text(json.dumps(config))
    for changed in ({"added_tokens": value}, {"model": value}, {"model": {"vocab": value}}, {"normalizer": value}):
        (place / "m0/tokenizer.json").write_text(json.dumps({**whole, **changed}))
        with darekit.plan(recipe) as plan:
            companions_of(plan)


def test_an_adapter_one_folder_deeper_is_named(place, dare):
    (place / "run/default").mkdir(parents=True)
    (place / "run/default/adapter_config.json").write_text("{}")
    code, text = merge(dare, place, models="base+run")
    assert code == 1
    assert "run itself is no adapter; there is one in" in text
    assert "run/default. Give base+" in text


def test_the_latest_step_of_several_adapters_is_named(place, dare):
    for step in (9, 10, 100):
        (place / f"run/checkpoint-{step}").mkdir(parents=True)
        (place / f"run/checkpoint-{step}/adapter_config.json").write_text("{}")
    code, text = merge(dare, place, models="base+run")
    assert code == 1
    assert text.endswith("run/checkpoint-100")


def test_a_working_directory_that_is_gone(place, dare, monkeypatch):
    (place / "gone").mkdir()
    monkeypatch.chdir(place / "gone")
    (place / "gone").rmdir()
    done = dare("inspect", "base", "m0")
    assert done.code == 1
    assert "the working directory no longer exists" in done.err


# --- shards, indexes and documents


def sharded(directory, count, *, index=None, suffix="safetensors"):
    """The model of a directory in `count` shards; `index`: tensor name, file name -> what an index says of it."""
    tensors = families.load(directory)
    (directory / "model.safetensors").unlink()
    places = {}
    for at in range(count):
        part = dict(list(tensors.items())[at::count])
        file = f"model-{at + 1:05}-of-{count:05}.{suffix}"
        families.write_safetensors(directory / file, part)
        places |= dict.fromkeys(part, file)
    if index is not None:
        text = json.dumps({"metadata": {}, "weight_map": {name: index(name, file) for name, file in places.items()}})
        (directory / "model.safetensors.index.json").write_text(text)
    return places


def same_values(place, one, other):
    ours, theirs = families.load(place / one), families.load(place / other)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("index", "note"),
    [
        (None, "m0: there is no index: its 3 shards are complete by their numbers"),
        (lambda name, file: file.replace("00003.", "00030."), "model.safetensors.index.json names files that are not"),
    ],
)
def test_shards_are_whole_by_their_numbers(place, dare, index, note):
    assert merge(dare, place, out="want")[0] == 0
    sharded(place / "m0", 3, index=index)
    code, text = merge(dare, place)
    assert code == 0
    assert note in text
    same_values(place, "out", "want")


def test_shards_of_two_saves_are_not_mixed(place, dare):
    shutil.copytree(place / "m0", place / "again")
    sharded(place / "m0", 2)
    sharded(place / "again", 3)
    for path in (place / "again").glob("*.safetensors"):
        path.rename(place / "m0" / path.name)
    code, text = merge(dare, place)
    assert code == 1
    assert "shards of 2 saves of a model (model-*-of-00002.safetensors, model-*-of-00003.safetensors)" in text


@pytest.mark.parametrize("lost", [None, "model-00001-of-00003.safetensors"])
def test_shards_that_are_counted_from_0(place, dare, lost):
    assert merge(dare, place, out="want")[0] == 0
    sharded(place / "m0", 3, index=None)
    for number in range(3):
        one = place / f"m0/model-{number + 1:05}-of-00003.safetensors"
        one.rename(one.with_name(f"model-{number:05}-of-00003.safetensors"))
    if lost:
        (place / "m0" / lost).unlink()
    code, text = merge(dare, place)
    assert code == (1 if lost else 0)
    if lost:
        assert f"neither model.safetensors.index.json nor {lost}. Download" in text
    else:
        same_values(place, "out", "want")


def test_pickled_shards_without_an_index(place, dare):
    torch = pytest.importorskip("torch")
    assert merge(dare, place, out="want")[0] == 0
    arrays = families.load(place / "m0")
    tensors = {n: torch.from_numpy(t.view(np.int16).copy()).view(torch.bfloat16) for n, t in arrays.items()}
    (place / "m0/model.safetensors").unlink()
    for at in range(2):
        part = dict(list(tensors.items())[at::2])
        torch.save(part, place / f"m0/pytorch_model-{at + 1:05}-of-00002.bin")
    torch.save({"lr": 1e-4}, place / "m0/training_args.bin")
    assert merge(dare, place)[0] == 0
    same_values(place, "out", "want")


@pytest.mark.parametrize("index", [None, lambda name, file: file])
def test_a_missing_shard_is_named(place, dare, index):
    sharded(place / "m0", 3, index=index)
    (place / "m0/model-00002-of-00003.safetensors").unlink()
    code, text = merge(dare, place)
    assert code == 1
    assert "model-00002-of-00003.safetensors" in text
    assert "Download the model again" in text


def test_a_tensor_in_two_shards_of_the_index(place, dare):
    places = sharded(place / "m0", 2, index=lambda name, file: file)
    first, other = "model-00001-of-00002.safetensors", place / "m0/model-00002-of-00002.safetensors"
    name = next(name for name, file in places.items() if file == first)
    tensors = {n: t for n, t in families.load(place / "m0").items() if places[n] != first}
    stale = families.load(place / "m1")[name]
    families.write_safetensors(other, tensors | {name: stale})
    code, text = merge(dare, place)
    assert code == 1
    assert f"(the index names {first}; transformers takes the last)" in text


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (POINTER.encode(), "is a Git LFS pointer, not the file itself"),
        (b"<!doctype html>\n<html>", "is a web page, not JSON"),
        (b"\0" * 20, "is empty: download it again"),
        (b"", "is empty: download it again"),
        (b"{'model_type': 'llama'}", "is not valid JSON: Expecting property name"),
    ],
)
def test_documents_that_are_none(place, dare, raw, says):
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.rmtree(place / "m0")
        shutil.copytree(place / "m1", place / "m0")
        if name != "config.json":
            sharded(place / "m0", 2)
        (place / "m0" / name).write_bytes(raw)
        code, text = merge(dare, place)
        assert code == 1
        assert f"m0/{name} {says}" in text


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            ["iter_0000100/mp_rank_00/model_optim_rng.pt", "latest_checkpointed_iteration.txt"],
            "a checkpoint of Megatron",
        ),
        (["weights/__0_0.distcp", "context/model.yaml"], "a checkpoint of NeMo"),
        (
            ["global_step_9/actor/model_world_size_2_rank_0.pt", "global_step_10/actor/model_world_size_2_rank_0.pt"],
            "verl.model_merger merge --backend fsdp --local_dir {place}/run/global_step_10/actor",
        ),
        (["model.keras"], "has only model.keras: it holds a model of Keras"),
        (["model.tar.gz"], "unpack it"),
    ],
)
def test_what_other_trainers_leave(place, dare, files, says):
    for name in files:
        (place / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "run" / name).write_bytes(b"x")
    code, text = merge(dare, place, models="run")
    assert code == 1
    assert says.format(place=place) in text


@pytest.mark.parametrize("name", ["onnx/model.onnx", "model.tflite", "openvino_model.xml"])
def test_graphs_for_inference_are_named(place, dare, name):
    (place / "m0/model.safetensors").unlink()
    (place / "m0" / name).parent.mkdir(exist_ok=True)
    (place / "m0" / name).write_bytes(b"x")
    code, text = merge(dare, place)
    assert code == 1
    assert f"m0 has only {name}: it holds a graph for inference" in text


# --- complex numbers


def with_frequencies(directory, factor=1):
    """Rotary frequencies as Meta's code keeps them, which no loader of transformers asks for."""
    complex64 = (factor * np.exp(1j * np.arange(6))).astype(np.complex64)
    add(directory, {"freqs_cis": complex64})
    return complex64


def test_complex_tensors_that_agree_are_copied(place, dare):
    for name in ("base", "m0", "m1"):
        want = with_frequencies(place / name)
    assert merge(dare, place)[0] == 0
    assert np.array_equal(families.load(place / "out")["freqs_cis"], want)
    for options in (["-p", "0.5"], ["--lossless"]):
        assert dare("pack", "base", "m0", "p.safetensors", *options, "--overwrite").code == 0
        assert dare("unpack", "base", "p.safetensors", "back", "--overwrite").code == 0
        assert np.array_equal(families.load(place / "back")["freqs_cis"], want)


def test_complex_tensors_that_differ(place, dare):
    for name in ("base", "m1"):
        with_frequencies(place / name)
    want = with_frequencies(place / "m0", 2)
    code, text = merge(dare, place)
    assert code == 1
    assert "freqs_cis (C64) of m0 differs from the base's" in text
    done = dare("pack", "base", "m0", "p.safetensors", "-p", "0.5")
    assert done.code == 1
    assert "freqs_cis (C64) of m0 differs from the base's" in " ".join(done.err.split())
    assert dare("pack", "base", "m0", "p.safetensors", "--lossless").code == 0
    assert dare("unpack", "base", "p.safetensors", "back").code == 0
    assert np.array_equal(families.load(place / "back")["freqs_cis"], want)
