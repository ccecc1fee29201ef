# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as they lie about: what is stored decides, and where it cannot be merged the advice fits the case."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest

import darekit as dk
import families
from darekit.checkpoints import open_checkpoint
from darekit.checkpoints.hub import fetch_snapshot
from darekit.errors import CheckpointError, OutputError, PlanError, Unsupported
from darekit.recipe.names import same_model
from test_checkpoints import FakeHub

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with base, m0 and m1."""
    base, models = families.family(tmp_path, k=2)
    monkeypatch.chdir(tmp_path)
    return base, models


def edit(path, **changes):
    """Set keys of a JSON file; None removes one."""
    data = {**json.loads(Path(path).read_text()), **changes}
    Path(path).write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def merge(*models, out="out", **keys):
    """Merge models of the working directory -> what was said."""
    recipe = {"base_model": "base", "models": [{"model": m} for m in models], "merge_method": "task_arithmetic"}
    return list(dk.merge(recipe | keys, out, threads=1).notes)


def refusal(ref):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(ref)
    return str(caught.value)


def stored(directory, **tensors):
    """Tensors, besides which those of m0 are stored in `directory`."""
    shutil.copytree("m0", directory, dirs_exist_ok=True)
    families.write_safetensors(Path(directory) / "model.safetensors", families.load("m0") | tensors)
    return directory


class TestQuantised:
    @pytest.mark.parametrize("where", ["quantization_config", "text_config"])
    def test_a_stale_key_beside_numbers(self, where, here):
        key = BNB if where == "quantization_config" else {"hidden_size": 1, "deep": {"quantization_config": BNB}}
        for directory in ("base", "m0"):
            edit(f"{directory}/config.json", **{where: key})
        said = merge("m0")
        families.same(families.load("out"), here[1][0])
        assert "quantization_config" not in Path("out/config.json").read_text()
        assert [
            note for note in said if 'm0: its config.json has a quantization_config (quant_method "bitsandb' in note
        ]
        edit("m0/config.json", **{where: None})
        dk.merge(families.recipe(Path(), 1), "plain", threads=1)
        families.same(families.load("plain"), here[1][0])

    def test_masks_of_bytes_are_no_codes(self, here):
        mask = np.tril(np.ones((1, 1, 8, 8), np.uint8))
        edit(f"{stored('m', **{'h.0.attn.bias': mask})}/config.json", quantization_config=BNB)
        checkpoint = open_checkpoint("m")
        assert "quantization_config" not in checkpoint.config and len(checkpoint.notes) == 1
        checkpoint.close()

    def test_a_pack_leaves_the_key_out_as_well(self, here):
        edit("m0/config.json", quantization_config=BNB)
        dk.pack("base", "m0", "m.safetensors", lossless=True)
        dk.unpack("base", "m.safetensors", "out")
        families.same(families.load("out"), here[1][0])
        assert "quantization_config" not in Path("out/config.json").read_text()

    @pytest.mark.parametrize(
        "tensors",
        [
            {"a.weight": np.zeros((8, 1), np.uint8), "a.weight.absmax": np.zeros(2, np.float32)},
            {"a.weight": np.zeros((8, 1), np.uint8)},
            {"a.qweight": np.zeros((2, 8), np.int32), "a.scales": np.ones(8, np.float16)},
            {"a.up_proj_blocks": np.zeros((2, 8), np.uint8), "a.up_proj_absmax": np.zeros(2, np.uint8)},
            {"a.w": np.zeros((2, 8), np.uint8), "a.zero_point": np.zeros(2, np.float16)},
        ],
        ids=["4-bit", "alone", "gptq", "blocks", "other-name"],
    )
    @pytest.mark.parametrize("says", [True, False])
    def test_codes_are_refused_whatever_the_config_says(self, tensors, says, here):
        edit(f"{stored('m', **tensors)}/config.json", quantization_config=BNB if says else None)
        said = refusal("m")
        assert "quantised weights cannot be merged. Dequantise first" in said
        assert ('quant_method "bitsandbytes"' in said) == says

    @pytest.mark.parametrize(
        "scale",
        ["a.input_scale", "a.scales", "a.amax", "a.s", "scaled_fp8", "a.weight_absmax"],
    )  # fmt: skip
    @pytest.mark.parametrize("shape", [(), (4,), (4, 1)])
    def test_eights_with_scales_that_are_not_known(self, scale, shape, here):
        eight = np.zeros((4, 8), ml_dtypes.float8_e4m3fn)
        stored("m", **{"a.weight": eight, scale: np.ones(shape, np.float32)})
        said = refusal("m")
        assert f'F8 weights ("a.weight") with scales beside them ({scale})' in said

    @pytest.mark.parametrize(
        "scale",
        ["a.weight_scale", "a.weight_scale_inv", "a.scale", "a.scale_weight", "a.qscale_weight", "a.weight.scale"],
    )
    @pytest.mark.parametrize("shape", [(), (4,), (4, 1)])
    def test_eights_with_scales_are_multiplied(self, scale, shape, here):
        eight, marks = np.full((4, 8), 2, ml_dtypes.float8_e4m3fn), {"scaled_fp8": np.zeros(2, np.float32)}
        stored(
            "m", **{"a.weight": eight, scale: np.full(shape, 0.25, np.float32), "a.input_scale": np.ones(()), **marks}
        )
        checkpoint = open_checkpoint("m")
        info = checkpoint.tensors["a.weight"]
        raw = np.empty(info.nbytes, np.uint8)
        info.source.read_into(raw, 0)
        assert info.dtype == "BF16" and np.all(raw.view(ml_dtypes.bfloat16).astype(np.float32) == 0.5)
        assert not checkpoint.tensors.keys() & {scale, "a.input_scale", "scaled_fp8"}
        checkpoint.close()

    def test_eights_without_scales_are_numbers(self, here):
        eight = np.ones((4, 8), ml_dtypes.float8_e4m3fn)
        more = {"logit_scale": np.ones((), np.float32), "norm.scale": np.ones(8, np.float32), "step": np.array([3])}
        stored("m", **{"a.weight": eight, "a.bias": np.ones(4, np.float32), **more})
        open_checkpoint("m").close()
        edit("m/config.json", quantization_config={"quant_method": "fp8"})
        assert 'quant_method "fp8"' in refusal("m")


class TestIndex:
    @pytest.fixture
    def shards(self, tmp_path, monkeypatch):
        """The models of a family in four shards each; the names of m0's first and last shard."""
        families.family(tmp_path, k=1, shards=4)
        monkeypatch.chdir(tmp_path)
        return sorted(path.name for path in Path("m0").glob("*.safetensors"))

    def change(self, change):
        path = Path("m0/model.safetensors.index.json")
        data = json.loads(path.read_text())
        change(data["weight_map"])
        path.write_text(json.dumps(data))

    @pytest.mark.parametrize(
        ("change", "note"),
        [
            (lambda index, last: index.update({"mtp.fc.weight": last}), r'lists "mtp.fc.weight", which no shard holds'),
            (
                lambda index, last: index.pop("model.norm.weight"),
                r'does not list "model.norm.weight", which the shards',
            ),
            (
                lambda index, last: index.update({"model.embed_tokens.weight": last}),
                r'names another shard .*"model.emb',
            ),
        ],
    )
    def test_headers_are_right(self, change, note, shards):
        expected = families.load("m0")
        self.change(lambda index: change(index, shards[-1]))
        said = merge("m0")
        families.same(families.load("out"), expected)
        assert len([line for line in said if line.startswith("m0/model.safetensors.index.json ")]) == 1
        with pytest.raises(AssertionError, match=note):  # the one note is the right one
            assert not said

    def test_a_shard_that_the_index_does_not_name_is_not_read(self, shards):
        families.write_safetensors(Path("m0/model-00005-of-00004.safetensors"), {"x": np.ones(1, np.float32)})
        families.write_safetensors(Path("m0/consolidated.safetensors"), {"y": np.ones(1, np.float32)})
        checkpoint = open_checkpoint("m0")
        assert not {"x", "y"} & set(checkpoint.tensors)
        (note,) = checkpoint.notes
        assert "does not name model-00005-of-00004.safetensors: not read" in note
        checkpoint.close()

    def test_two_copies(self, shards):
        expected = families.load("m0")
        first, last = families.load_file(f"m0/{shards[0]}"), families.load_file(f"m0/{shards[-1]}")
        name = next(iter(first))
        families.write_safetensors(Path("m0") / shards[-1], last | {name: first[name]})
        assert not [line for line in merge("m0") if "index" in line]
        families.same(families.load("out"), expected)
        for other in (first[name] + first[name].dtype.type(1), first[name][:1], first[name].astype(np.float32)):
            families.write_safetensors(Path("m0") / shards[-1], last | {name: other})
            said = refusal("m0")
            assert (
                "lies in two shards of m0, with different values" in said and shards[0] in said and shards[-1] in said
            )

    def test_an_index_of_another_name(self, shards):
        expected = families.load("m0")
        data = json.loads(Path("m0/model.safetensors.index.json").read_text())["weight_map"]
        for file in shards:
            Path("m0", file).rename(f"m0/{file.replace('model', 'model.fp16')}")
        Path("m0/model.safetensors.index.json").unlink()
        assert "neither model.safetensors nor model.safetensors.index.json" in refusal("m0")
        data = {name: file.replace("model", "model.fp16") for name, file in data.items()}
        Path("m0/model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": data}))
        assert "m0 has only the variant fp16 of its weights: that is read" in merge("m0")
        families.same(families.load("out"), expected)


class TestVariants:
    def test_one_of_two_is_not_guessed(self, here):
        for variant in ("bf16", "fp16"):
            shutil.copy("m0/model.safetensors", f"m0/model.{variant}.safetensors")
        open_checkpoint("m0").close()  # the plain one is the model
        Path("m0/model.safetensors").unlink()
        assert "in 2 variants (bf16, fp16)" in refusal("m0")

    def test_pickled(self, here):
        torch = pytest.importorskip("torch")
        families.write_safetensors(Path("m0/model.fp16.safetensors"), {"w": np.zeros(1, np.float16)})
        Path("m0/model.safetensors").unlink()
        torch.save({"w": torch.ones(1)}, "m0/pytorch_model.bin")
        checkpoint = open_checkpoint("m0")  # as transformers, which is not asked for a variant
        assert checkpoint.tensors["w"].dtype == "F32" and not checkpoint.notes
        checkpoint.close()
        Path("m0/model.fp16.safetensors").unlink()
        Path("m0/pytorch_model.bin").rename("m0/pytorch_model.fp16.bin")
        checkpoint = open_checkpoint("m0")
        assert checkpoint.notes == ("m0 has only the variant fp16 of its weights: that is read",)
        checkpoint.close()


class TestLeftovers:
    @pytest.fixture
    def run(self, here):
        Path("run").mkdir()
        shutil.copy("m0/config.json", "run")
        return Path("run")

    def touch(self, *paths):
        for path in map(Path, paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")

    def test_deepspeed(self, run):
        self.touch(run / "global_step5/mp_rank_00_model_states.pt", run / "latest", run / "zero_to_fp32.py")
        for ref in (run, run / "global_step5", run / "global_step5/mp_rank_00_model_states.pt"):
            assert "python run/zero_to_fp32.py run OUT" in refusal(ref)
        (run / "zero_to_fp32.py").unlink()
        assert "python -m deepspeed.utils.zero_to_fp32 run OUT" in refusal(run)

    def test_sharded(self, run):
        self.touch(run / "optimizer_0/__0_0.distcp", run / "pytorch_model_fsdp_0/__0_0.distcp")
        for ref in (run, run / "pytorch_model_fsdp_0", run / "pytorch_model_fsdp_0/__0_0.distcp"):
            assert "accelerate merge-weights run/pytorch_model_fsdp_0 OUT" in refusal(ref)

    def test_a_state_inside_a_step(self, run):
        self.touch(run / "checkpoint-50/zero_to_fp32.py", run / "checkpoint-50/global_step50/x.pt")
        assert "zero_to_fp32.py run/checkpoint-50 OUT" in refusal(run)

    def test_the_last_of_several_steps(self, run):
        for step in (1000, 500):
            shutil.copytree("m0", run / f"checkpoint-{step}")
        said = refusal(run)
        assert said.endswith("Give run/checkpoint-1000") and "run/checkpoint-500" in said
        open_checkpoint("run/checkpoint-1000").close()

    def test_a_folder_of_the_hubs_cache(self, run):
        shutil.copytree("m0", run / "snapshots/abc")
        assert refusal(run).endswith("Give run/snapshots/abc")

    def test_nothing_is_made_up(self, run):
        self.touch(run / "logs/events", run / "notes.md")
        assert refusal(run).endswith("found config.json, logs, notes.md")

    def test_not_gathered(self, here):
        empty = {"model.embed_tokens.weight": np.zeros(0, ml_dtypes.bfloat16)}
        said = refusal(stored("m", **empty))
        assert "1 weights that are empty, of shape [0] (model.embed_tokens.weight)" in said and "ZeRO-3" in said
        Path("m/config.json").unlink()
        open_checkpoint("m").close()  # no model, for all we know: an empty tensor is one too


class TestAdapters:
    def make(self, directory="a", tensors=None, **config):
        Path(directory).mkdir()
        name = "base_model.model.layers.0.q_proj.lora_{}.weight"
        tensors = tensors or {name.format(x): np.zeros((2, 2), np.float32) for x in "AB"}
        families.write_safetensors(Path(directory) / "adapter_model.safetensors", tensors)
        (Path(directory) / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))

    @pytest.mark.parametrize(
        ("task", "cls"),
        [
            ("CAUSAL_LM", "AutoPeftModelForCausalLM"), ("SEQ_CLS", "AutoPeftModelForSequenceClassification"),
            ("TOKEN_CLS", "AutoPeftModelForTokenClassification"), ("SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM"),
            ("QUESTION_ANS", "AutoPeftModelForQuestionAnswering"),
            ("FEATURE_EXTRACTION", "AutoPeftModelForFeatureExtraction"),
        ],
    )  # fmt: skip
    def test_the_class_is_that_of_its_task(self, task, cls, here):
        self.make(task_type=task)
        said = refusal("a")
        code = [line[4:] for line in said.splitlines() if line.startswith("    ")]
        compile("\n".join(code), "advice", "exec")
        assert code[0] == f"from peft import {cls}" and f"{cls}.from_pretrained('a'" in code[1]
        assert "num_labels" not in said and ("Causal" in said) == (task == "CAUSAL_LM")

    def test_how_many_classes(self, here):
        head = {"base_model.model.score.weight": np.zeros((5, 2), np.float32)}
        self.make(
            tensors=head | {"base_model.model.q.lora_A.weight": np.zeros((2, 2), np.float32)}, task_type="SEQ_CLS"
        )
        assert 'torch_dtype="auto", num_labels=5)' in refusal("a")

    @pytest.mark.parametrize("base", ["base", "nowhere", None])
    def test_without_a_task_the_base_says_the_class(self, base, here):
        self.make(task_type=None, base_model_name_or_path=base)
        said = refusal("a")
        code = [line[4:] for line in said.splitlines() if line.startswith("    ")]
        compile("\n".join(code), "advice", "exec")
        assert f"transformers.{'LlamaForCausalLM' if base == 'base' else 'CLASS'}.from_pretrained" in code[1]
        assert "AutoPeft" not in said and "PeftModel.from_pretrained(base, 'a')" in code[2]

    def test_the_class_that_a_mapping_names(self, here):
        self.make(task_type=None, auto_mapping={"base_model_class": "LlavaForConditionalGeneration"})
        assert "transformers.LlavaForConditionalGeneration.from_pretrained" in refusal("a")

    def test_a_prompt_changes_no_weight(self, here):
        self.make(peft_type="PREFIX_TUNING", task_type="CAUSAL_LM")
        assert "there is nothing to merge" in refusal("a") and "merge_and_unload" not in refusal("a")

    @pytest.mark.parametrize("name", ["adapters.safetensors", "0000100_adapters.safetensors"])
    def test_of_mlx(self, name, here):
        Path("a").mkdir()
        families.write_safetensors(Path("a") / name, {"model.q.lora_a": np.zeros((2, 2), np.float32)})
        Path("a/adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "model": "base"}))
        for ref in ("a", f"a/{name}"):
            said = refusal(ref)
            assert "mlx_lm.fuse --model base --adapter-path a --save-path a-merged" in said and "Peft" not in said
        Path("a/adapter_config.json").unlink()
        assert "mlx_lm.fuse --model BASE" in refusal("a")

    @pytest.mark.parametrize("parts", [("q.lora_A.weight", "q.lora_B.weight"), ("q.lora_down.weight", "q.alpha")])
    def test_under_another_name(self, parts, here):
        families.write_safetensors(Path("style.safetensors"), dict.fromkeys(parts, np.zeros((2, 2), np.float32)))
        assert "adapter" in refusal("style.safetensors")

    def test_left_beside_the_model_that_it_became(self, here):
        self.make(task_type="CAUSAL_LM")
        for file in Path("a").iterdir():
            shutil.copy(file, "m0")
        [note] = [note for note in merge("m0") if "adapter" in note]
        assert "the model is read as it is" in note and str(Path("m0/adapter_model.safetensors")) in note
        families.same(families.load("out"), here[1][0])
        Path("m0/model.safetensors").rename("m0/whole.safetensors")
        merge("m0", out="again")
        families.same(families.load("again"), here[1][0])


NAMES = [
    "step@1000",
    "llama3+math",
    "größe",
    "run[3]",
    "1e5",
    "mein modell",
    "500",
    "1.5",
    "on",
    "~nobody-here",
    "-x",
    "a.yaml",
]


class TestNames:
    @pytest.mark.parametrize("name", NAMES)
    def test_a_directory_is_a_directory(self, name, here, dare):
        Path("m0").rename(name)
        text = name if name in ("500", "1.5", "on", "1e5") else json.dumps(name, ensure_ascii=False)
        Path("r.yaml").write_text(
            f"base_model: base\nmodels:\n- {{model: {text}}}\nmerge_method: task_arithmetic\nheads: {text}\n"
        )
        assert dare("merge", "r.yaml", "out").code == 0
        families.same(families.load("out"), here[1][0])
        assert dare("drop", "-p", "0", "--", "base", name, "dropped").code == 0
        families.same(families.load("dropped"), here[1][0])
        assert dare("pack", "--lossless", "--", "base", name, "p.safetensors").code == 0
        assert dare("unpack", "base", "p.safetensors", "unpacked").code == 0
        families.same(families.load("unpacked"), here[1][0])
        assert dare("inspect", "--", "base", name).code == 0

    def test_beside_the_recipe(self, here, monkeypatch):
        Path("m0").rename("500")
        Path("r.yaml").write_text("base_model: ./base\nmodels: [500, base]\nmerge_method: task_arithmetic\n")
        Path("elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        report = dk.merge("../r.yaml", "out", threads=1)
        families.same(families.load("out"), here[1][0])
        assert any("is the base and also one of the models" in note for note in report.notes)

    def test_a_base_among_the_models_of_a_mean(self, here):
        models = [{"model": "base", "parameters": {"weight": 0.3}}, {"model": "m0", "parameters": {"weight": 0.7}}]
        notes = dk.merge({"base_model": "base", "models": models, "merge_method": "linear"}, "out", threads=1).notes
        assert not any("is identical to" in note for note in notes)

    def test_a_revision_of_a_directory(self, here):
        stored("org/name", w=np.zeros(2, np.float32))
        assert open_checkpoint("org/name@main").directory == Path("org/name")
        assert "org/name is here, but a directory has no revisions: to use it, leave out @v1" in refusal("org/name@v1")

    @pytest.mark.parametrize("name", ["m0+lora", "org/name+org/lora", "org/name@v1+org/lora"])
    def test_a_plus_that_names_an_adapter(self, name, here):
        assert "LoRA adapter" in refusal(name) and "packs opened from Python" in refusal(name)

    @pytest.mark.parametrize(
        ("base", "listed"),
        [
            ("./base", "base"),
            ("base", "./base"),
            ("base/", "base"),
            ("base", "m0/../base"),
            ("base", "."),
            ("HERE", "base"),
        ],
    )
    def test_one_base_by_two_paths(self, base, listed, here):
        base = str(Path("base").absolute()) if base == "HERE" else base
        listed = str(Path("base").absolute()) + "/" if listed == "." else listed
        said = merge(listed, "m0", base_model=base, tokenizer_source=listed, heads=listed)
        assert any("is the base and also one of the models" in note for note in said)
        expected = families.load("m0") | {"lm_head.weight": here[0]["lm_head.weight"]}
        families.same(families.load("out"), expected)
        with pytest.raises(PlanError, match="as the base and as the model"):
            dk.drop(base, listed, "dropped", drop_rate=0.5)

    def test_heads_by_another_path(self, here):
        merge("m0", "m1", heads="./m1", tokenizer_source="m0/")
        assert families.load("out")["lm_head.weight"].tobytes() == here[1][1]["lm_head.weight"].tobytes()

    def test_other_models_are_others(self, here):
        Path("link").symlink_to("base")
        assert not same_model("base", "link") and not same_model("base", "m0")
        assert not same_model("org/name", "./org/name") and same_model("org/name", "org/name/")
        assert not same_model("org/name", "org/name@v1") and same_model("org/name", "org/name@main")
        Path("org/name").mkdir(parents=True)
        assert same_model("org/name", "./org/name")
        assert same_model("x", str(Path("m0/x").absolute()), [Path("m0")]) is False
        shutil.copytree("m1", "m0/x")
        assert same_model("x", str(Path("m0/x").absolute()), [Path("m0")])


class TestResumeOfWhatIsComplete:
    def resume(self, out="out", **keys):
        recipe = families.recipe(Path(), 1, sparsify={"method": "dare", "drop_rate": 0.5, "seed": 1}) | keys
        return dk.merge(recipe, out, threads=1, resume=True)

    def test_it_is_said_and_nothing_is_written(self, here, dare):
        first = self.resume()
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("out").iterdir()}
        again = self.resume()
        assert first.bytes_written > 0 and again.bytes_written == 0
        assert any("out is complete" in note and "nothing is left to do" in note for note in again.notes)
        assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("out").iterdir()} == before
        assert not [path.name for path in Path().iterdir() if path.name.startswith(".")]
        dropped = ("drop", "base", "m0", "dropped", "-p", "0.5", "--seed", "1", "--resume")
        assert (dare(*dropped).code, dare(*dropped).code) == (0, 0)

    @pytest.mark.parametrize("change", ["recipe", "input", "time", "missing", "torn", "lock"])
    def test_anything_else_is_refused_as_ever(self, change, here):
        self.resume()
        keys = {}
        if change == "recipe":
            keys = {"sparsify": {"method": "dare", "drop_rate": 0.5, "seed": 2}}
        elif change == "input":
            tensors = families.load("m0")
            families.write_safetensors(
                Path("m0/model.safetensors"), {n: t * t.dtype.type(1.01) for n, t in tensors.items()}
            )
            os.utime("m0/model.safetensors", (0, 0))
        elif change == "time":
            os.utime("m0/model.safetensors")
        elif change == "missing":
            Path("out/model.safetensors").unlink()
        elif change == "torn":
            os.truncate("out/model.safetensors", 100)
        else:
            Path("out/darekit.lock.json").write_text("[]")
        with pytest.raises(OutputError, match="exists and is not empty"):
            self.resume(**keys)


class TestQuantisedOnTheHub:
    """What can be said before gigabytes are fetched."""

    @pytest.fixture
    def fetched(self, tmp_path, monkeypatch):
        """Fetch a repository of these files -> the names that were fetched."""

        def fetch(files, header=None):
            def parse(self, repository, name, *, revision):
                if header is None:
                    raise OSError("no network")
                return SimpleNamespace(tensors={n: SimpleNamespace(dtype=d, shape=s) for n, (d, s) in header.items()})

            hub = FakeHub(tmp_path, files)
            monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
            monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", parse)
            try:
                fetch_snapshot("org/name@v2")
                return hub.fetched, ""
            except Unsupported as error:
                return hub.fetched, str(error)

        return fetch

    CONFIG = json.dumps({"quantization_config": {"quant_method": "awq"}}).encode()

    @pytest.mark.parametrize(
        ("name", "stops"),
        [
            ("a.qweight", True),
            ("a.weight.absmax", True),
            ("a.qzeros", True),
            ("a.weight.quant_state.bitsandbytes__nf4", False),
            ("a.weight_scale", False),
            ("b.up_proj_blocks", False),
            ("logit_scale", False),
            ("b.bias", False),
        ],
    )
    def test_an_index_tells(self, name, stops, fetched):
        index = json.dumps({"weight_map": dict.fromkeys(["a.weight", name], "model-1.safetensors")}).encode()
        files = {"config.json": self.CONFIG, "model.safetensors.index.json": index, "model-1.safetensors": b""}
        found, said = fetched(files)
        assert ("model-1.safetensors" not in found) == stops == ("Dequantise first" in said)

    @pytest.mark.parametrize(("dtype", "stops"), [("I32", True), ("F8_E4M3", True), ("BF16", False)])
    def test_a_header_tells(self, dtype, stops, fetched):
        found, said = fetched({"config.json": self.CONFIG, "model.safetensors": b""}, {"a.weight": (dtype, [2, 2])})
        assert ("model.safetensors" not in found) == stops == ("Dequantise first" in said)

    def test_where_nothing_tells_the_weights_do(self, fetched):
        assert "model.safetensors" in fetched({"config.json": self.CONFIG, "model.safetensors": b""})[0]
