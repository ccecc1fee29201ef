# SPDX-License-Identifier: Apache-2.0
"""Live models of transformers' own classes: what is in memory is what `from_pretrained` loads, bit for bit."""

import pytest
from safetensors.torch import load_file, save_file

import darekit as dk
from darekit.architectures.families import facts_of
from darekit.architectures.layout import Unplaced, places_of
from darekit.errors import HomologyError
from darekit.live import loading
from darekit.live.models import build, open_live
from darekit.packs import weights
from darekit.planning.opening import open_plan
from darekit.recipe import read_recipe

torch = pytest.importorskip("torch")
tiny = pytest.importorskip("tiny")

FAST = (
    "Qwen3MoeForCausalLM",  # experts one by one
    "GPTNeoXForCausalLM",  # renamed head
    "ViTForImageClassification",  # renamed, no text
    "Gemma3ForConditionalGeneration",  # another prefix, tied
    "T5ForConditionalGeneration",  # tied three times
    "GteForMaskedLM",  # cut in memory
)
CLASSES = [name if name in FAST else pytest.param(name, marks=pytest.mark.check) for name in tiny.SIZES]


def same(found, loaded):
    """All tensors, buffers and ties of two models agree."""
    before, after = (dict(m.state_dict()) | dict(m.named_buffers()) for m in (loaded, found))
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    assert ties(found) == ties(loaded)


def ties(model):
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(names for names in groups.values() if len(names) > 1)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_in_memory_what_transformers_loads(name, tmp_path):
    cls = tiny.family(tmp_path, name)
    recipe = read_recipe(tiny.recipe(tmp_path))
    dk.merge(recipe, tmp_path / "out", force=True)
    merged = cls.from_pretrained(tmp_path / "out")
    single = read_recipe({"models": [str(tmp_path / "m1")], "merge_method": "linear"})
    with open_plan(single) as one, open_plan(recipe) as plan:
        live = build(one, device="cpu")
        same(live.model, cls.from_pretrained(tmp_path / "m1"))
        places = {name: tensor.data_ptr() for name, tensor in live.model.state_dict().items()}
        live.put(plan)
        same(live.model, merged)
        assert places == {name: tensor.data_ptr() for name, tensor in live.model.state_dict().items()}


def test_conversions_come_a_few_at_a_time(tmp_path, monkeypatch):
    cls = tiny.family(tmp_path, "Qwen3MoeForCausalLM")
    waiting = []
    monkeypatch.setattr(loading, "ROOM", 1)
    bunches = loading._bunches
    monkeypatch.setattr(loading, "_bunches", lambda *given: (waiting.append(len(b)) or b for b in bunches(*given)))
    with open_live(tiny.recipe(tmp_path, sparsify={"method": "dare", "drop_rate": 0.0}, k=1), device="cpu") as live:
        same(live.model, cls.from_pretrained(tmp_path / "m1"))
    assert waiting == [1, 1, 1, 1]  # two layers, and two fused tensors in each


@pytest.mark.parametrize(
    ("name", "dtype", "kept"),
    [
        ("DeepseekV3ForCausalLM", "bfloat16", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("T5ForConditionalGeneration", "float16", "encoder.block.0.layer.1.DenseReluDense.wo.weight"),
    ],
)
def test_what_transformers_keeps_in_float32_stays_so(name, dtype, kept, tmp_path):
    cls = tiny.family(tmp_path, name, k=0)
    with open_live(tmp_path / "base", device="cpu", dtype=dtype) as live:
        same(live.model, cls.from_pretrained(tmp_path / "base", dtype=getattr(torch, dtype)))
        assert live.model.state_dict()[kept].dtype == torch.float32


def test_a_trained_head_beside_a_tied_config_is_one_of_its_own(tmp_path):
    cls = tiny.family(tmp_path, "Qwen3ForCausalLM", k=1, tie_word_embeddings=True)
    path = tmp_path / "m1" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 3
    save_file(tensors, path, metadata={"format": "pt"})
    with open_live(tmp_path / "m1", device="cpu") as live:
        same(live.model, cls.from_pretrained(tmp_path / "m1"))
        assert not torch.equal(live.model.lm_head.weight, live.model.model.embed_tokens.weight)


def test_a_conversion_that_does_not_fit_says_which(tmp_path):
    tiny.family(tmp_path, "Qwen3MoeForCausalLM", k=1)
    path = tmp_path / "m1" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name] = tensors[name][:8].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    says = r"cannot make model\.layers\.1\.mlp\.experts\.gate_up_proj of"
    with pytest.raises(HomologyError, match=says), open_live(tmp_path / "m1", device="cpu"):
        pass


def test_what_is_permuted_in_memory_is_no_part_of_it():
    name = "vision_tower.encoder.blocks.0.wqkv.bias"
    facts = facts_of({"architectures": ["Kimi_K25ForConditionalGeneration"]})
    target = facts.conversion(name).target
    live = {target.replace("q_proj", part): (8,) for part in ("q_proj", "k_proj", "v_proj")}
    (found,) = places_of({name: (24,)}, live, facts).values()
    assert isinstance(found, Unplaced) and "PermuteForRope" in found.why


def test_a_pack_of_what_is_permuted_is_refused(tmp_path, monkeypatch):
    cls = tiny.family(tmp_path, "Qwen3MoeForCausalLM", k=1)
    model = cls.from_pretrained(tmp_path / "base")
    monkeypatch.setattr(weights, "places_of", lambda stored, *_: dict.fromkeys(stored, Unplaced("it is turned round")))
    with pytest.raises(HomologyError, match="cannot be changed in place in this model: it is turned round"):
        dk.Switcher(model, tmp_path / "base")


@pytest.mark.parametrize("name", CLASSES)
def test_packs_change_every_class_in_place(name, tmp_path):
    cls = tiny.family(tmp_path, name, k=1)
    dk.pack(tmp_path / "base", tmp_path / "m1", tmp_path / "pack.safetensors", drop_rate=0.5, seed=1, force=True)
    dk.unpack(tmp_path / "base", tmp_path / "pack.safetensors", tmp_path / "out")
    model, base = (cls.from_pretrained(tmp_path / "base") for _ in range(2))
    with dk.Switcher(model, tmp_path / "base") as switcher:
        switcher.switch(tmp_path / "pack.safetensors")
        same(model, cls.from_pretrained(tmp_path / "out"))
    same(model, base)
    with dk.open_pack(tmp_path / "pack.safetensors") as pack:
        pack.apply_(model)
    same(model, cls.from_pretrained(tmp_path / "out"))
