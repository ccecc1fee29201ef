# SPDX-License-Identifier: Apache-2.0
"""Only what a model is for is run: encoder-decoders by prompts and completions, and who is refused, with what words."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import darekit as dk
from darekit.errors import DarekitError, DataError
from darekit.evaluation.judges import judge_of
from darekit.live.models import open_live
from darekit.live.tasks import task_of

torch = pytest.importorskip("torch")
tiny = pytest.importorskip("tiny")

TASKS = {
    "BertForMaskedLM": "masked", "RobertaForMaskedLM": "masked", "AlbertForMaskedLM": "masked",
    "DistilBertForMaskedLM": "masked", "ElectraForMaskedLM": "masked", "GteForMaskedLM": "masked",
    "BertLMHeadModel": "masked",
    "BertForSequenceClassification": "classifier", "LlamaForSequenceClassification": "regressor",
    "BartForSequenceClassification": "classifier", "T5ForConditionalGeneration": "encoder-decoder",
    "BartForConditionalGeneration": "encoder-decoder", "MBartForConditionalGeneration": "encoder-decoder",
    "PegasusForConditionalGeneration": "encoder-decoder", "WhisperForConditionalGeneration": "other",
    "BertModel": "other", "BertForPreTraining": "other", "DebertaV2ForTokenClassification": "other",
    "CLIPModel": "other", "Wav2Vec2ForCTC": "other", "ViTForImageClassification": "other",
    "ResNetForImageClassification": "other", "MT5ForConditionalGeneration": "encoder-decoder",
}  # fmt: skip
ROWS = [
    {"prompt": "w3 w4 w5 w6", "completion": "w7 w8"}, {"prompt": "w9", "completion": "w10 w11 w12"},
    {"prompt": "w5 w13 w14", "completion": "w15"}, {"prompt": "w6 w7 w8 w9 w10", "completion": "w3 w4 w5 w6"},
]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", tiny.SIZES)
def test_what_every_class_is_for(name):
    with torch.device("meta"):
        model = tiny.build(name)
    assert task_of(model) == TASKS.get(name, "causal")


@pytest.fixture(scope="module", params=["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def pair(request, tmp_path_factory):
    """An encoder-decoder family with tokenizers: path, class and the rows as (encoder's tokens, decoder's targets)."""
    path = tmp_path_factory.mktemp(request.param)
    cls = tiny.family(path, request.param)
    tiny.tokenizer(path / "base", path / "m1", path / "m2")
    numbers = [[[int(w[1:]) for w in row[key].split()] for key in ("prompt", "completion")] for row in ROWS]
    return path, cls, [(torch.tensor([p]), torch.tensor([[*c, 2]])) for p, c in numbers]


def test_an_encoder_decoder_has_the_loss_that_transformers_computes(pair, tmp_path):
    path, cls, pairs = pair
    model = cls.from_pretrained(path / "m1")
    with torch.no_grad():
        total = sum(float(model(input_ids=ids, labels=labels).loss) * labels.numel() for ids, labels in pairs)
    expected = total / sum(labels.numel() for _, labels in pairs)
    with open_live(path / "m1", device="cpu") as live:
        for size in (1, 3):
            judge = judge_of({"data": write(tmp_path / "rows.jsonl", ROWS), "batch_size": size})
            assert judge(live)["loss"].value == pytest.approx(expected, abs=1e-5)


def test_an_encoder_decoders_exact_match_is_what_it_writes(pair, tmp_path):
    path, cls, pairs = pair
    model = cls.from_pretrained(path / "m1")
    rows, expected = [], []
    for at, (ids, _) in enumerate(pairs):
        with torch.no_grad():
            made = model.generate(input_ids=ids, max_new_tokens=6, num_beams=1, do_sample=False)[0, 1:].tolist()
        words = [token for token in made if token > 2] or [3]
        target = words if at % 2 else [*words, 3]
        rows.append({**ROWS[at], "completion": " ".join(f"w{token}" for token in target)})
        expected.append(made == [*target, 2] or made[: len(target) + 1] == [*target, 2])
    with open_live(path / "m1", device="cpu") as live:
        found = judge_of({"data": write(tmp_path / "rows.jsonl", rows)})(live)
    assert found["exact_match"].value == np.mean(expected)


@pytest.mark.check
def test_an_encoder_decoder_taught_its_answers_writes_them(pair, tmp_path):
    path, cls, pairs = pair
    model = cls.from_pretrained(path / "base")
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(120):
        loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in pairs[:3])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(tmp_path / "taught")
    tiny.tokenizer(tmp_path / "taught")
    found = dk.evaluate(tmp_path / "taught", data=write(tmp_path / "rows.jsonl", ROWS), device="cpu")
    model.eval()
    written = [model.generate(input_ids=i, max_new_tokens=8, num_beams=1)[0, 1:].tolist() for i, _ in pairs]
    right = [text[: labels.numel()] == labels[0].tolist() for text, (_, labels) in zip(written, pairs, strict=True)]
    assert sum(right) >= 3 and found.row("exact_match")[0].value == np.mean(right)


def test_a_fisher_of_an_encoder_decoder_squares_the_gradients_of_its_answers(pair, tmp_path):
    path, cls, pairs = pair
    rows = write(tmp_path / "rows.jsonl", ROWS)
    dk.make_statistics("fisher", path / "m1", rows, tmp_path / "f.safetensors", device="cpu")
    found = load_file(tmp_path / "f.safetensors")
    model = cls.from_pretrained(path / "m1").eval()
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for ids, labels in pairs:
        model.zero_grad()
        (model(input_ids=ids, labels=labels).loss * labels.numel()).backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad**2 / len(pairs)
    assert {*found} == {*expected}
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name].numpy(), rtol=1e-3, atol=1e-9, err_msg=name)


def test_padding_is_in_no_statistics_of_an_encoder_decoder(pair, tmp_path):
    path, _, _ = pair
    rows = write(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "w3 w4 w5", "completion": "w6 w7 w8"}])  # equal lengths
    one, many = (
        dk.make_statistics("gram", path / "m1", rows, tmp_path / f"{size}.safetensors", device="cpu", batch_size=size)
        for size in (1, 5)
    )
    assert one.tensors == many.tensors
    alone, batched = (load_file(report.output) for report in (one, many))
    for name, values in alone.items():
        np.testing.assert_allclose(batched[name], values, rtol=1e-3, atol=1e-4, err_msg=name)


def test_an_encoder_decoder_is_recommended_by_its_rows(pair, tmp_path):
    path, _, _ = pair
    found = dk.recommend(path / "base", path / "m1", data=write(tmp_path / "rows.jsonl", ROWS), device="cpu")
    seen = found.to_data()
    assert "encoder" in json.dumps(seen)
    texts = write(tmp_path / "texts.jsonl", [{"text": "w3 w4"}])
    with pytest.raises(DataError, match=r"texts\.jsonl:1 has no completion, but \w+ is an encoder-decoder"):
        dk.recommend(path / "base", path / "m1", data=texts, device="cpu")


def test_a_merge_in_memory_has_the_loss_of_that_on_disk(pair, tmp_path):
    path, _, _ = pair
    rows = write(tmp_path / "rows.jsonl", ROWS)
    recipe = tiny.recipe(path)
    dk.merge(recipe, tmp_path / "out", force=True)
    disk = dk.evaluate({"disk": str(tmp_path / "out"), "memory": recipe}, data=rows, device="cpu").row("loss")
    assert disk[0].value == disk[1].value


def test_a_fisher_of_fused_experts_has_each_stored_expert(tmp_path):
    cls = tiny.family(tmp_path, "Qwen3MoeForCausalLM", k=1)
    tiny.tokenizer(tmp_path / "m1")
    rows = write(tmp_path / "rows.jsonl", [{"text": "w3 w4 w5 w6"}, {"text": "w7 w8 w9"}])
    dk.make_statistics("fisher", tmp_path / "m1", rows, tmp_path / "f.safetensors", device="cpu")
    found = load_file(tmp_path / "f.safetensors")
    model = cls.from_pretrained(tmp_path / "m1")
    expected = 0
    for ids in ([[3, 4, 5, 6]], [[7, 8, 9]]):
        model.zero_grad()
        (model(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss * (len(ids[0]) - 1)).backward()
        expected = expected + model.model.layers[1].mlp.experts.gate_up_proj.grad ** 2 / 2
    for i in range(4):
        for at, part in enumerate(("gate_proj", "up_proj")):
            values = found[f"model.layers.1.mlp.experts.{i}.{part}.weight"]
            own = expected[i, 16 * at : 16 * (at + 1)].numpy()
            np.testing.assert_allclose(values, own, rtol=1e-3, atol=1e-10)


REFUSED = [
    ("BertForMaskedLM", {"text": "w3 w4 w5"}, "masked language model: it sees every token"),
    ("BertLMHeadModel", {"text": "w3 w4 w5"}, "masked language model"),
    ("XLNetLMHeadModel", {"text": "w3 w4 w5"}, "predicts a token from what comes after it"),
    ("T5ForConditionalGeneration", {"text": "w3 w4 w5"}, "is an encoder-decoder: it needs"),
    ("BertModel", {"text": "w3 w4 w5"}, "is a model without a head"),
    ("ViTForImageClassification", {"text": "w3", "label": 1}, "is a model of images"),
    ("WhisperForConditionalGeneration", {"prompt": "w3", "completion": "w4"}, "is an encoder-decoder of speech"),
    ("LlamaForSequenceClassification", {"text": "w3 w4"}, "is a regressor: it needs"),
]


@pytest.mark.parametrize(("name", "row", "says"), REFUSED)
def test_what_a_model_is_not_for_is_refused(name, row, says, tmp_path):
    tiny.family(tmp_path, name, k=0)
    tiny.tokenizer(tmp_path / "base")
    rows = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=says):
        dk.evaluate(tmp_path / "base", data=rows, device="cpu")
    with pytest.raises(DarekitError):
        dk.make_statistics("fisher", tmp_path / "base", rows, tmp_path / "f.safetensors", device="cpu")


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForMaskedLM", "Gemma3ForConditionalGeneration"])
def test_a_function_judges_every_class(name, tmp_path):
    cls = tiny.family(tmp_path, name, k=0)
    found = dk.evaluate(tmp_path / "base", judge=lambda live: isinstance(live.model, cls) * 1.0, device="cpu")
    assert found.row("score")[0].value == 1.0
