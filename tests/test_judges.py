"""Judges: scores against closed forms, teacher forcing against greedy decoding, padding, and other people's judges."""

import json
import math
import sys

import numpy as np
import pytest

from darekit.errors import CheckpointError, DarekitError, DataError, RecipeError
from darekit.evaluation import scores
from darekit.evaluation.judges import Score, judge_of
from darekit.live.models import open_live

torch = pytest.importorskip("torch")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(rng, count):
    return " ".join(f"w{i}" for i in rng.integers(3, 96, count))


@pytest.fixture
def live(real):
    with open_live(real.path / "m0", device="cpu") as opened:
        yield opened


# --- scores


def test_a_share_has_the_binomial_error():
    assert scores.share(np.array([1, 1, 1, 0], bool)) == Score(0.75, math.sqrt(0.75 * 0.25 / 3))
    assert scores.share(np.array([True])).stderr is None


def test_loss_is_per_target_and_its_error_per_row():
    found = scores.mean_loss(np.array([2.0, 6.0, 4.0]), np.array([1, 3, 2]))
    assert found == Score(2.0, 0.0, False)  # every row has loss 2 per target: nothing varies
    equal = scores.mean_loss(np.array([2.0, 6.0, 4.0]), np.array([2, 2, 2]))
    assert equal.stderr == pytest.approx(np.std([1, 3, 2], ddof=1) / math.sqrt(3))
    assert scores.perplexity(Score(2.0, 0.1, False)).stderr == pytest.approx(0.1 * math.exp(2))


@pytest.mark.parametrize("classes", [2, 3])
def test_classification_agrees_with_sklearn(classes):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(classes)
    truth = rng.integers(0, classes, 60)
    guess = np.where(rng.random(60) < 0.7, truth, rng.integers(0, classes, 60))
    found = scores.classification(guess, truth, classes=classes)
    assert found["accuracy"].value == metrics.accuracy_score(truth, guess)
    assert found["matthews"].value == pytest.approx(metrics.matthews_corrcoef(truth, guess))
    assert ("f1" in found) == (classes == 2)
    if classes == 2:
        assert found["f1"].value == pytest.approx(metrics.f1_score(truth, guess))
        kept = [np.delete(np.arange(60), i) for i in range(60)]
        without = np.array([metrics.f1_score(truth[k], guess[k]) for k in kept])
        assert found["f1"].stderr == pytest.approx(math.sqrt(59 / 60 * ((without - without.mean()) ** 2).sum()))
    constant = scores.classification(np.zeros(60, int), truth, classes=classes)
    assert constant["matthews"].value == 0


def test_correlations_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x = rng.normal(size=50).round(1)  # ties
    y = (x + rng.normal(size=50)).round(1)
    found = scores.regression(x, y)
    assert found["pearson"].value == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found["spearman"].value == pytest.approx(stats.spearmanr(x, y).statistic)
    kept = [np.delete(np.arange(50), i) for i in range(50)]
    without = np.array([stats.pearsonr(x[k], y[k]).statistic for k in kept])
    assert found["pearson"].stderr == pytest.approx(math.sqrt(49 / 50 * ((without - without.mean()) ** 2).sum()))
    assert scores.regression(np.ones(50), y)["pearson"].value == 0
    assert scores.regression(x, 2 * x - 1)["pearson"].value == pytest.approx(1)


# --- data


def rows_for(live, rng, count=13):
    lengths = [1 + i % 7 for i in range(count)]
    if live.task != "causal":
        return [{"text": words(rng, n), "label": int(rng.integers(0, 3))} for n in lengths]
    return [{"prompt": words(rng, n), "completion": words(rng, 8 - n)} for n in lengths]


def test_the_batch_size_changes_nothing(live, tmp_path):
    path = write(tmp_path / "rows.jsonl", rows_for(live, np.random.default_rng(1)))
    one, three, all_ = (judge_of({"data": path, "batch_size": size})(live) for size in (1, 3, 64))
    assert set(one) == ({"exact_match", "loss"} if live.task == "causal" else {"accuracy", "matthews"})
    for name, score in one.items():
        for other in (three[name], all_[name]):
            assert other.value == pytest.approx(score.value, abs=1e-5)
            assert other.stderr == pytest.approx(score.stderr, abs=1e-5)


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "GPT2ForSequenceClassification"])
@pytest.mark.parametrize("labels", [1, 2])
def test_decoders_with_a_head_read_at_the_last_token(name, labels, tmp_path):
    import transformers

    import conftest

    kind = {"L": "llama", "G": "gpt2"}[name[0]]
    config = conftest._configs()[kind][2]
    config.num_labels, config.pad_token_id = labels, None
    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(tmp_path / "model")
    conftest._tokenizer(tmp_path / "model")
    rng = np.random.default_rng(2)
    rows = [{"text": words(rng, 1 + i % 5), "label": i % 2} for i in range(11)]
    path = write(tmp_path / "rows.jsonl", rows)
    with open_live(tmp_path / "model", device="cpu") as live:
        one, four = (judge_of({"data": path, "batch_size": size})(live) for size in (1, 4))
        logits = [live.model(**live.tokenizer(r["text"], return_tensors="pt")).logits[0] for r in rows]
    if labels == 1:
        expected = np.corrcoef([x.item() for x in logits], [r["label"] for r in rows])[0, 1]
        assert set(one) == {"pearson", "spearman"}
        assert one["pearson"].value == pytest.approx(expected, abs=1e-5)
        assert four["pearson"].value == pytest.approx(expected, abs=1e-5)
    else:
        expected = np.mean([x.argmax().item() == r["label"] for x, r in zip(logits, rows, strict=True)])
        assert set(one) == {"accuracy", "f1", "matthews"}
        assert one["accuracy"].value == four["accuracy"].value == pytest.approx(expected)


def test_exact_match_is_greedy_decoding(live, tmp_path):
    if live.task != "causal":
        pytest.skip("it writes nothing")
    live.tokenizer.eos_token = None  # what a random model writes has no end
    rng = np.random.default_rng(3)
    prompts = [words(rng, 1 + i) for i in range(6)]
    rows, expected = [], []
    for at, prompt in enumerate(prompts):
        ids = live.tokenizer(prompt, return_tensors="pt")
        new = live.model.generate(**ids, max_new_tokens=3, do_sample=False, eos_token_id=None)[0, -3:].tolist()
        if at % 2:
            new[at % 3] = 3 + (new[at % 3] + 1) % 90
        text = " ".join(f"w{i}" for i in new)
        if not all(i >= 3 for i in new):
            continue
        rows.append({"prompt": prompt, "completion": text})
        expected.append(not at % 2)
    assert set(expected) == {True, False}
    judge = judge_of({"data": write(tmp_path / "rows.jsonl", rows), "batch_size": 4})
    assert judge(live)["exact_match"].value == pytest.approx(np.mean(expected))
    live.tokenizer.eos_token = "</s>"
    again = judge_of({"data": write(tmp_path / "rows.jsonl", rows)})(live)  # and now it must end there too
    assert again["exact_match"].value < np.mean(expected)


def test_loss_is_what_transformers_computes(live, tmp_path):
    if live.task != "causal":
        pytest.skip("it has no loss over text")
    rng = np.random.default_rng(4)
    texts = [words(rng, 6) for _ in range(4)]
    expected = np.mean(
        [live.model(**(ids := live.tokenizer(t, return_tensors="pt")), labels=ids["input_ids"]).loss for t in texts]
    )
    found = judge_of({"data": write(tmp_path / "rows.jsonl", [{"text": t} for t in texts])})(live)
    assert found["loss"].value == pytest.approx(expected, abs=1e-5)
    assert found["perplexity"].value == pytest.approx(math.exp(expected), rel=1e-4)
    assert not found["loss"].higher_is_better and found["loss"].stderr > 0


def test_the_head_computes_what_is_asked_alone(live, tmp_path, monkeypatch):
    if live.task != "causal":
        pytest.skip("it is asked one thing")
    rows = [{"prompt": words(np.random.default_rng(5), n), "completion": "w5 w6"} for n in (9, 9, 12)]
    judge = judge_of({"data": write(tmp_path / "rows.jsonl", rows)})
    widths = []
    head = live.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, given, __: widths.append(given[0].shape[1]))
    narrow = judge(live)
    forward = live.model.forward
    monkeypatch.setattr(live.model, "forward", lambda input_ids, **more: forward(input_ids=input_ids, **more))
    whole = judge(live)
    hook.remove()
    # Two tokens and the end, three or six places apart in rows of 12 and 15: of 15 columns 6 are asked.
    assert [width for width in widths if width != 4] == [6, 15]  # 4: whether it looks ahead is asked first
    for name, score in whole.items():
        assert narrow[name].value == pytest.approx(score.value, abs=1e-6)


def test_a_model_that_gives_nan_names_the_row(live, tmp_path):
    rows = rows_for(live, np.random.default_rng(5), count=3)
    judge = judge_of({"data": write(tmp_path / "rows.jsonl", rows)})
    with torch.no_grad():
        list(live.model.parameters())[-1].fill_(float("nan"))
    with pytest.raises(DataError, match=r"rows\.jsonl:\d: the model's (loss|output) is nan"):
        judge(live)


def test_rows_that_do_not_fit_the_model(live, tmp_path):
    wrong = {"text": "w5", "label": 1} if live.task == "causal" else {"prompt": "w5", "completion": "w6"}
    with pytest.raises(DataError, match="has labels" if live.task == "causal" else "has a completion"):
        judge_of({"data": write(tmp_path / "rows.jsonl", [wrong])})(live)
    if live.task == "causal":
        long = [{"prompt": "w5", "completion": "w6 " * 80}]
        with pytest.raises(DataError, match=r"long\.jsonl:1: the completion does not fit into 64 tokens"):
            judge_of({"data": write(tmp_path / "long.jsonl", long)})(live)
    else:
        for label, says in (
            (7, "classes 0 to 2"),
            ("good", "not one of the model's: LABEL_0"),
            (0.5, "classes 0 to 2"),
        ):
            with pytest.raises(DataError, match=says):
                judge_of({"data": write(tmp_path / "label.jsonl", [{"text": "w5", "label": label}])})(live)


def test_pairs_are_two_sentences_to_the_model(live, tmp_path):
    if live.task == "causal":
        pytest.skip("it has no labels")
    torch.manual_seed(0)
    from tokenizers.processors import TemplateProcessing

    live.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    live.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # as BERT's: second sentence of type 1
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    with torch.no_grad():
        live.model.bert.embeddings.token_type_embeddings.weight[1] = torch.randn(32)
        for tensor in live.model.parameters():
            tensor *= 8 if tensor.dim() == 2 else 1  # tokens hardly see each other in a model that begins
    rng = np.random.default_rng(6)
    rows = [
        {"text": words(rng, 2), "pair": words(rng, 9 - i), "label": 0} for i in range(6)
    ]  # longest first, as judged
    rows += [{"text": words(rng, 2), "label": 0}]
    encoded = [live.tokenizer(row["text"], row.get("pair"), return_tensors="pt") for row in rows]
    expected = torch.cat([live.model(**one).logits for one in encoded])
    alike = torch.cat([live.model(**one | {"token_type_ids": None}).logits for one in encoded])
    assert not torch.allclose(alike[:-1], expected[:-1], atol=1e-3)
    found = []
    live.model.register_forward_hook(lambda module, arguments, output: found.append(output.logits))
    judge_of({"data": write(tmp_path / "rows.jsonl", rows), "batch_size": 4})(live)
    assert torch.allclose(torch.cat(found), expected, atol=1e-5)
    with pytest.raises(DataError, match="pair is a classifier's second sentence"):
        judge_of(write(tmp_path / "pair.jsonl", [{"text": "w5", "pair": "w6"}]))


def test_rows_of_two_forms_are_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "w5"}, {"prompt": "w5", "completion": "w6"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1 has text alone and .*rows\.jsonl:2 has a completion"):
        judge_of(path)


# --- other people's judges


JUDGE = """
import json, sys
from pathlib import Path
from safetensors import safe_open

def tensors(directory: Path):
    return len(safe_open(Path(directory) / "model.safetensors", "numpy").keys())

def layers(live):
    return {"layers": live.model.config.num_hidden_layers, "heads": {"value": 4, "higher_is_better": None}}

def two(a, b):
    return 0

def broken(live):
    return live.nothing

def nothing(live):
    return {"a": float("nan")}

if __name__ == "__main__":
    print("working...")
    print(json.dumps({"tensors": tensors(sys.argv[1]), "words": len(sys.argv)}))
"""


@pytest.fixture
def judge_file(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


def test_a_command_gets_the_models_directory(real, live, judge_file):
    for spec in ({"command": [sys.executable, "judge.py"]}, f"{sys.executable} judge.py {{model}}"):
        found = judge_of(spec, search=[judge_file])(live)
        assert found["tensors"].value == len(list(live.model.state_dict())) - (real.kind == "gpt2")  # a tied head
        assert found["words"].value == 2


def test_what_a_command_gets_is_the_model_to_the_bit(real, live):
    from safetensors.torch import load_file

    from darekit.evaluation.outside import written

    with written(live) as folder:
        found, expected = (load_file(path / "model.safetensors") for path in (folder, real.path / "m0"))
        assert set(found) == set(expected)
        assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in expected.items())


def test_a_function_gets_the_live_model_or_a_directory(live, judge_file):
    found = judge_of({"python": "judge.py:layers"}, search=[judge_file])(live)
    assert found == {"layers": Score(2.0), "heads": Score(4.0, None, None)}
    assert judge_of("judge.py:tensors", search=[judge_file])(live)["score"].value > 5
    assert judge_of(lambda live: 0.5)(live) == {"score": Score(0.5)}


def test_several_judges_have_names(live, judge_file):
    judge = judge_of({"a": {"python": "judge.py:layers"}, "b": "judge.py:tensors"}, search=[judge_file])
    assert list(judge(live)) == ["a/layers", "a/heads", "b/score"]


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ({"python": "judge.py:layer"}, RecipeError, "no function 'layer'; it has tensors, layers"),
        ({"python": "judge.py:two"}, RecipeError, "expects a, b"),
        ({"python": "missing.py:f"}, CheckpointError, "no file missing.py"),
        ({"python": "nonsense_module:f"}, RecipeError, "No module named"),
        ({"python": "layers"}, RecipeError, "expected module:function"),
        ({"command": []}, RecipeError, "empty"),
        ({"command": ["no-such-program"]}, RecipeError, "no such program"),
        ({"dat": "rows.jsonl"}, RecipeError, "did you mean 'data'"),
        ({"data": "rows.jsonl", "batchsize": 3}, RecipeError, "did you mean 'batch_size'"),
        ({"data": "rows.jsonl", "limit": 0}, RecipeError, "limit must be a whole number"),
        ({"data": "rows.jsonl", "command": ["a"]}, RecipeError, "both data and command"),
        ({"data": "missing.jsonl"}, CheckpointError, "not a file"),
        ({}, RecipeError, "a judge must be one of"),
        (7, RecipeError, "a judge must be one of"),
    ],
)
def test_judges_that_cannot_be(judge_file, spec, error, says):
    with pytest.raises(error, match=says):
        judge_of(spec, search=[judge_file])


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("judge.py:broken", r"judge\.py:\d+: AttributeError"),
        ("judge.py:nothing", "returned a: nan"),
        ({"command": [sys.executable, "-c", "print('hello')"]}, "printed hello; expected JSON"),
        ({"command": [sys.executable, "-c", "raise SystemExit('no luck')"]}, "exit code 1:\n  no luck"),
        ({"command": [sys.executable, "-c", "print('[1]')"]}, r"returned \[1\]; expected a number"),
        ({"command": [sys.executable, "-c", 'print(\'{"a": "b"}\')']}, "returned a: 'b'; expected a number"),
    ],
)
def test_judges_that_fail_say_how(live, judge_file, spec, says):
    with pytest.raises(DarekitError, match=says):
        judge_of(spec, search=[judge_file])(live)
