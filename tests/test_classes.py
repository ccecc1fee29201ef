# SPDX-License-Identifier: Apache-2.0
"""Names, ties and vocabularies of transformers' own classes: what is written loads, and is the right model."""

import re

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import darekit as dk  # noqa: E402
import tiny  # noqa: E402
from darekit.architectures.families import facts_of  # noqa: E402


def stored(path):
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def store(path, tensors):
    for file in path.glob("*.safetensors*"):
        file.unlink()
    tensors = {n: t.clone().contiguous() for n, t in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def loaded(cls, path):
    """The model as transformers loads it, without a word about keys."""
    model, told = cls.from_pretrained(path, output_loading_info=True)
    assert not any(told.values()), told
    return model


def same(cls, one, other):
    ours, theirs = (loaded(cls, path).state_dict() for path in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def some(*fast):
    """All tiny classes; those that are not named only where there is time."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.check) for name in tiny.SIZES]


@pytest.mark.parametrize("name", some("T5ForConditionalGeneration", "Qwen3MoeForCausalLM"))
def test_a_fine_tune_comes_back(tmp_path, name):
    """Nothing is dropped: whatever the base's and the model's files call their tensors."""
    cls = tiny.family(tmp_path, name, 1)
    model = loaded(cls, tmp_path / "m1")
    dk.drop(tmp_path / "base", tmp_path / "m1", tmp_path / "out", drop_rate=0)
    same(cls, tmp_path / "out", tmp_path / "m1")
    (tmp_path / "now").mkdir()
    model.save_pretrained(tmp_path / "now", save_original_format=False)  # under the names of run time
    if stored(tmp_path / "now").keys() != stored(tmp_path / "m1").keys():
        for base, tuned in (("base", "now"), ("m1", "now")):
            dk.drop(tmp_path / base, tmp_path / tuned, tmp_path / "out", drop_rate=0, overwrite=True)
            same(cls, tmp_path / "out", tmp_path / "m1")
    store(tmp_path / "m1", {f"module._orig_mod.{n}": t for n, t in stored(tmp_path / "m1").items()})
    dk.drop(tmp_path / "base", tmp_path / "m1", tmp_path / "out", drop_rate=0, overwrite=True)
    same(cls, tmp_path / "out", tmp_path / "now")


TIED = [
    "BartForConditionalGeneration", "BertForMaskedLM", "RobertaForMaskedLM", "AlbertForMaskedLM",
    "DistilBertForMaskedLM", "ElectraForMaskedLM", "XLNetLMHeadModel", "WhisperForConditionalGeneration",
    "GPT2LMHeadModel", "Gemma2ForCausalLM", "Gemma3ForConditionalGeneration", "T5ForConditionalGeneration",
    "BloomForCausalLM", "MambaForCausalLM", "FalconForCausalLM", "PegasusForConditionalGeneration",
]  # fmt: skip
FAST = ("BertForMaskedLM", "WhisperForConditionalGeneration")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.check) for n in TIED])
def test_copies_and_heads_of_tied_classes(tmp_path, name):
    cls = tiny.family(tmp_path, name)
    facts = facts_of({"architectures": [name]})
    tensors = stored(tmp_path / "m1")
    names = {facts.canonical(n): n for n in tensors}
    copies = {target: names[source] for target, source in facts.held.items() if source in names and target not in names}
    head = next(target for target in copies if facts.is_output_embedding(target) and target.endswith("weight"))
    store(tmp_path / "m1", tensors | {copy: tensors[source] for copy, source in copies.items()})
    dk.merge(tiny.recipe(tmp_path), tmp_path / "out")
    state = loaded(cls, tmp_path / "out").state_dict()
    for copy in copies:
        assert torch.equal(state[copy], state[facts.held[copy]]), copy
    # A head of its own, whatever the config says.
    own = {head: tensors[copies[head]] + 0.5}
    store(tmp_path / "m1", tensors | own)
    assert torch.equal(loaded(cls, tmp_path / "m1").state_dict()[head], own[head])
    dk.drop(tmp_path / "base", tmp_path / "m1", tmp_path / "kept", drop_rate=0)
    same(cls, tmp_path / "kept", tmp_path / "m1")


GROWS = [
    "T5ForConditionalGeneration", "BartForConditionalGeneration", "BertForMaskedLM", "DistilBertForMaskedLM",
    "ElectraForMaskedLM", "AlbertForMaskedLM", "XLNetLMHeadModel", "GPT2LMHeadModel", "GPTNeoXForCausalLM",
    "Gemma3ForConditionalGeneration", "Gemma3nForCausalLM", "MambaForCausalLM", "WhisperForConditionalGeneration",
    "PegasusForConditionalGeneration", "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration",
]  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in GROWS[:2] else pytest.mark.check) for n in GROWS])
def test_vocabularies_that_grew(tmp_path, name):
    changes = {"pad_vocab_size_multiple": 1} if "Mamba" in name else {}
    cls = tiny.family(tmp_path, name, 1, **changes)
    model = loaded(cls, tmp_path / "m1")
    start = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(start + 3, mean_resizing=False)
    model.save_pretrained(tmp_path / "m1")
    table = model.get_input_embeddings().weight
    for vocab, rows in (("base", start), ("pad", start + 3)):
        dk.drop(tmp_path / "base", tmp_path / "m1", tmp_path / f"out-{vocab}", drop_rate=0, vocab=vocab)
        found = loaded(cls, tmp_path / f"out-{vocab}")
        assert torch.equal(found.get_input_embeddings().weight, table[:rows])
    same(cls, tmp_path / "out-pad", tmp_path / "m1")


@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "ElectraForMaskedLM", "DebertaV2ForTokenClassification"]
)
def test_old_names_of_norms(tmp_path, name):
    cls = tiny.family(tmp_path, name, 1)
    words = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    norms = re.compile("|".join(map(re.escape, words)))
    old = {norms.sub(lambda found: words[found[0]], n): t for n, t in stored(tmp_path / "base").items()}
    store(tmp_path / "base", old)
    loaded(cls, tmp_path / "base")
    dk.drop(tmp_path / "base", tmp_path / "m1", tmp_path / "out", drop_rate=0)
    same(cls, tmp_path / "out", tmp_path / "m1")


MODERN = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
          "sep_token_id": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("base", "tuned", "sizes", "part"),
    [
        ("ModernBertForMaskedLM", "ModernBertForTokenClassification", MODERN, "head.dense.weight"),
        ("WhisperForConditionalGeneration", "WhisperForAudioClassification", None, "model.encoder.conv1.weight"),
        ("CLIPModel", "CLIPForImageClassification", None, "vision_model.embeddings.position_embedding.weight"),
    ],
)
def test_classes_for_other_tasks(tmp_path, base, tuned, sizes, part):
    """What the base has before its outputs was trained by all, and is merged; of what no model has nothing is left."""
    source, cls = getattr(transformers, base), getattr(transformers, tuned)
    whole = source(source.config_class(**(sizes or tiny.SIZES[base])))
    whole.save_pretrained(tmp_path / "base")
    for i in range(2):
        torch.manual_seed(7)
        model = cls.from_pretrained(tmp_path / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.002 * (i + 1))
        model.save_pretrained(tmp_path / f"m{i + 1}")
    dk.merge({**tiny.recipe(tmp_path), "sparsify": None, "parameters": {"lambda": 0.5}, "heads": str(tmp_path / "m1")},
             tmp_path / "out")  # fmt: skip
    loaded(cls, tmp_path / "out")
    found, one, two = (stored(tmp_path / name) for name in ("out", "m1", "m2"))
    assert found.keys() == one.keys()
    name = next(name for name in found if part.endswith(name) or name.endswith(part))
    assert torch.allclose(found[name], (one[name] + two[name]) / 2, atol=1e-6)
    assert torch.equal(found["classifier.weight"], one["classifier.weight"])
