"""`dare eval`: real lm-eval without a network, one table, what is finished is kept, answers for AlpacaEval."""

import hashlib
import json
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

import darekit as dk
import families
from darekit.errors import CheckpointError, DataError, OutputError, PlanError, RecipeError
from darekit.evaluation.comparison import KEPT, best_of
from darekit.evaluation.harness import _find, load_tasks
from darekit.evaluation.judges import Score, judge_of
from darekit.live.models import open_live

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

RECIPE = {"sparsify": {"method": "dare", "drop_rate": 0.5, "seed": 3}}
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: rows/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITE = """
task: local_write
dataset_path: json
dataset_kwargs: {data_files: {test: rows/write.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["nothing"], max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(rng, count):
    return " ".join(f"w{i}" for i in rng.integers(3, 96, count))


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """A llama and a GPT-2 family with tokenizers: .path/llama/base, m0, m1."""
    import copy
    from types import SimpleNamespace

    import conftest

    path = tmp_path_factory.mktemp("causal")
    for kind in ("llama", "gpt2"):
        dtype, cls, config = conftest._configs()[kind]
        torch.manual_seed(1)
        model = cls(config)
        for name in ("base", "m0", "m1"):
            tuned = copy.deepcopy(model)
            with torch.no_grad():
                for tensor in tuned.parameters():
                    tensor += (1e-2 if name == "base" else 1e-3) * torch.randn_like(tensor)
            tuned.to(getattr(torch, dtype)).save_pretrained(path / kind / name)
            conftest._tokenizer(path / kind / name)
    return SimpleNamespace(llama=path / "llama", gpt2=path / "gpt2")


@pytest.fixture
def offline(monkeypatch):
    """Whoever asks for the network is noted, and gets none."""
    asked = []

    def refuse(*arguments, **keywords):
        asked.append(arguments)
        raise OSError("no network in tests")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


def likelihood(live, question, choice):
    ids = live.tokenizer(f"{question} {choice}", return_tensors="pt")["input_ids"]
    count = len(choice.split())
    logits = live.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logits[torch.arange(len(logits)), ids[0, 1:]][-count:].sum().item()


def local_tasks(folder, live):
    """Two task files, their rows, and the scores that the model must have."""
    rng = np.random.default_rng(0)
    (folder / "choice.yaml").write_text(CHOICE)
    (folder / "write.yaml").write_text(WRITE)
    choices = [
        {"question": words(rng, 1 + i % 5), "choices": [words(rng, 1 + (i + j) % 3) for j in range(3)], "answer": i % 3}
        for i in range(12)
    ]
    right = [
        int(np.argmax([likelihood(live, row["question"], choice) for choice in row["choices"]])) == row["answer"]
        for row in choices
    ]
    written = []
    for i in range(8):
        question = words(rng, 1 + i % 5)
        ids = live.tokenizer(question, return_tensors="pt")
        new = live.model.generate(**ids, max_new_tokens=3, do_sample=False)[0, ids["input_ids"].shape[1] :]
        answer = live.tokenizer.decode(new, skip_special_tokens=True)
        written.append({"question": question, "answer": answer if i % 4 else "w1 w2"})
    write(folder / "rows" / "choice.jsonl", choices)
    write(folder / "rows" / "write.jsonl", written)
    return {"local_choice/acc": float(np.mean(right)), "local_write/exact_match": 0.75}


# --- lm-eval


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lm_eval_runs_local_tasks_without_a_network(causal, kind, tmp_path, monkeypatch, offline):
    with open_live(getattr(causal, kind) / "m0", device="cpu") as live:
        expected = local_tasks(tmp_path, live)
        monkeypatch.chdir(tmp_path.parent)  # data files are relative to the task file, not to this
        judge = judge_of({"tasks": "local_choice,local_write", "include": tmp_path.name, "batch_size": 5})
        state = torch.random.get_rng_state()
        found = judge(live)
        assert {name: score.value for name, score in found.items()} == pytest.approx(expected)
        n, value = 12, expected["local_choice/acc"]
        assert found["local_choice/acc"].stderr == pytest.approx((value * (1 - value) / (n - 1)) ** 0.5)
        assert torch.equal(state, torch.random.get_rng_state())
        judge.batch_size = 1
        assert judge(live) == found
        # asked in parts, in another order, it is the same
        assert judge.sizes() == {"local_choice": 12, "local_write": 8}
        first = judge.ask(live, {"local_choice": [11, 0, 5], "local_write": [7]})
        second = judge.ask(live, {"local_choice": [1, 2, 3, 4, 6, 7, 8, 9, 10], "local_write": [*range(7)]})
        for name, score in found.items():
            items = first[name] + second[name]
            assert items.value == pytest.approx(score.value) and items.group == name.partition("/")[0]
            assert items.higher_is_better == score.higher_is_better
            assert name != "local_choice/acc" or items.score.stderr == pytest.approx(score.stderr)
        assert len(first["local_choice/acc"]) == 3 and len(first["local_write/exact_match"]) == 1
        assert judge.details["versions"] and judge.details["lm_eval"] and judge.details["configs"]["local_choice"]
        assert not list(live.model._forward_hooks)
    assert not offline


FILTERS = """filter_list:
  - {name: strict, filter: [{function: take_first}]}
  - {name: first-word, filter: [{function: regex, regex_pattern: "(w[0-9]+)"}, {function: take_first}]}
"""
FILTERED = WRITE.replace("local_write", "local_filtered").replace("metric_list", f"{FILTERS}metric_list")
GROUP = """
group: local_group
task: [local_choice, local_filtered]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


def test_the_scores_of_tasks_are_known_before_they_are_asked(causal, tmp_path, offline):
    """Also those of filters and of groups; not those of a task whose own code makes them."""
    with open_live(causal.llama / "m0", device="cpu") as live:
        local_tasks(tmp_path, live)
        (tmp_path / "filtered.yaml").write_text(FILTERED)
        (tmp_path / "group.yaml").write_text(GROUP)
        judge = load_tasks(["local_group", "local_write"], include=[tmp_path])
        known = judge.score_names()
        found = {*judge(live)}
    assert found <= {*known} and {*known} - found <= {f"local_group/acc,{one}" for one in ("strict", "first-word")}
    assert {"local_filtered/exact_match,strict", "local_filtered/exact_match,first-word"} <= {*known}
    (tmp_path / "helper.py").write_text("def own(doc, results):\n    return {'any': 1.0}\n")
    own = WRITE.replace("local_write", "local_own") + "process_results: !function helper.own\n"
    (tmp_path / "own.yaml").write_text(own)
    assert load_tasks(["local_own"], include=[tmp_path]).score_names() == ()
    assert not offline


def test_a_score_that_tasks_do_not_have_is_refused_before_a_model_is_opened(causal, tmp_path, dare, offline):
    with open_live(causal.llama / "m0", device="cpu") as live:
        local_tasks(tmp_path, live)
    recipe = {"base_model": str(causal.llama / "base"), "models": [str(causal.llama / "m0")],
              "merge_method": "task_arithmetic"}  # fmt: skip
    judges = {"all": {"tasks": ["local_choice"], "include": str(tmp_path)}}
    sweep = {"recipe": recipe, "axes": {"parameters.lambda": [0.5, 1]}, "test": judges}
    search = {"recipe": recipe, "space": {"parameters.lambda": {"low": 0, "high": 1}}, "validation": judges}
    says = "has no score 'local_choice/acc_norm'; did you mean 'local_choice/acc'?"
    for command, data in (("sweep", sweep), ("search", search)):
        (tmp_path / "s.yaml").write_text(json.dumps(data | {"choose": "all/local_choice/acc_norm"}))
        done = dare(command, tmp_path / "s.yaml", tmp_path / "out")
        assert done.code == 1 and says in " ".join(done.err.split()), done.err
        assert not (tmp_path / "out").exists()


def test_lm_eval_refuses_what_it_cannot_judge(causal, real, tmp_path):
    with open_live(causal.llama / "m0", device="cpu") as live:
        local_tasks(tmp_path, live)
        judge = load_tasks(["local_choice"], include=[tmp_path])
        with torch.no_grad():
            live.model.lm_head.weight[5] = float("nan")
        with pytest.raises(DataError, match="logits are NaN"):
            judge(live)
    if real.kind == "bert":
        with open_live(real.path / "m0", device="cpu") as live, pytest.raises(DataError, match="is a classifier"):
            judge(live)


def test_names_of_the_paper_are_resolved_and_said(tmp_path):
    said = []
    _, names = _find(["MATH", "GSM8K", "gsm8k"], [], said.append)
    assert names == ["minerva_math", "gsm8k"]
    assert said == ["MATH is lm-eval's minerva_math", "GSM8K is lm-eval's gsm8k"]
    with pytest.raises(RecipeError, match="--generate"):
        load_tasks(["alpaca_eval"])


def test_a_task_that_does_not_exist_names_close_ones(tmp_path, monkeypatch):
    from functools import partial

    import lm_eval.tasks

    # Without lm-eval's own 14,683 tasks, whose index takes 15 s.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    (tmp_path / "choice.yaml").write_text(CHOICE)
    with pytest.raises(RecipeError, match=r"no task 'local_choise'; close: local_choice"):
        load_tasks(["local_choise"], include=[tmp_path])
    with pytest.raises(RecipeError, match="is not a folder"):
        load_tasks(["local_choice"], include=[tmp_path / "choice.yaml"])


def test_a_sweep_looks_tasks_up_before_anything_runs(causal, tmp_path, monkeypatch, dare, offline):
    from functools import partial

    import lm_eval.tasks

    from darekit.trials import models as running

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(running, "build", None)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "choice.yaml").write_text(CHOICE)
    write(folder / "rows" / "choice.jsonl", [{"question": "w3", "choices": ["w4", "w5"], "answer": 0}])
    data = {
        "recipe": {"base_model": str(causal.llama / "base"), "models": [str(causal.llama / "m0")],
                   "merge_method": "task_arithmetic", "sparsify": {"method": "dare", "drop_rate": 0.5}},
        "axes": {"sparsify.drop_rate": [0.5]},
    }  # fmt: skip
    for judge, says in (
        ({"tasks": ["local_choise"], "include": "tasks"}, r"there is no task 'local_choise'; close: local_choice"),
        ({"tasks": ["local_choice"]}, r"the judge's key `include: DIR`"),
        ({"tasks": ["local_choice"], "include": "nowhere"}, r"nowhere is not a folder; the judge's key `include: DIR`"),
        ({"tasks": ["local_choice"], "includes": "tasks"}, r"has no key 'includes'; did you mean 'include'"),
        ({"tasks": ["local_choice"], "include": "tasks"}, None),
    ):
        (tmp_path / "s.yaml").write_text(json.dumps(data | {"test": {"all": judge}}))
        for dry in ((), ("--dry-run",)) if says else (("--dry-run",),):
            done = dare("sweep", tmp_path / "s.yaml", *dry)
            assert done.code == (1 if says else 0), done.err
            assert says is None or ("s.yaml line 1: test.all: " in done.err and re.search(says, done.err)), done.err
        assert not (tmp_path / "s").exists()
    assert not offline


def test_data_that_need_the_network_say_so(offline, monkeypatch):
    import datasets
    import huggingface_hub

    for module in (datasets.config, huggingface_hub.constants):  # no waiting for more tries
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"gsm8k needs data from the Hub \(openai/gsm8k\).*cannot be reached"):
        load_tasks(["gsm8k"])


@pytest.mark.parametrize(
    ("old", "new", "error", "says"),
    [
        ("rows/choice", "rows/missing", CheckpointError, r"choice\.yaml names the data file rows/missing\.jsonl"),
        ("metric: acc", "metric: no_such_metric", CheckpointError, "metric 'no_such_metric'"),
        ("multiple_choice", "choose", RecipeError, "local_choice cannot be loaded: .*choose"),
        ('"{{question}}"', "!function helper.ask", RecipeError, r"choice\.yaml cannot be read.*helper"),
    ],
)
def test_task_files_with_mistakes(tmp_path, offline, old, new, error, says):
    write(tmp_path / "rows" / "choice.jsonl", [{"question": "w5", "choices": ["w6", "w7"], "answer": 0}])
    (tmp_path / "choice.yaml").write_text(CHOICE.replace(old, new))
    with pytest.raises(error, match=says):
        load_tasks(["local_choice"], include=[tmp_path])


def test_generated_code_is_executed_only_where_somebody_agreed(causal, tmp_path, dare, monkeypatch):
    done = dare("eval", causal.llama / "m0", "--tasks", "humaneval,mbpp")
    assert done.code == 1 and "humaneval, mbpp executes code that the model writes" in done.err
    write(tmp_path / "rows" / "write.jsonl", [{"question": "w5", "answer": "w6"}] * 2)
    (tmp_path / "write.yaml").write_text(WRITE + "unsafe_code: true\n")
    asked = []
    with pytest.raises(PlanError, match="--trust-code"):
        load_tasks(["local_write"], include=[tmp_path], confirm=lambda names: asked.append(names))
    assert asked == [["local_write"]]
    arguments = ("eval", causal.llama / "m0", "--tasks", "local_write", "--include", tmp_path)
    assert dare(*arguments).code == 1
    done = dare(*arguments, "--trust-code", "--json")
    assert done.code == 0 and "local_write/exact_match" in done.data["evaluations"][0]["scores"]
    assert "HF_ALLOW_CODE_EVAL" not in __import__("os").environ


# --- comparisons


@pytest.fixture
def rows(tmp_path):
    rng = np.random.default_rng(2)
    return write(tmp_path / "data" / "qa.jsonl", [
        {"prompt": words(rng, 1 + i % 4), "completion": words(rng, 2)} for i in range(9)
    ])  # fmt: skip


def test_a_recipe_in_memory_scores_as_its_merge_on_disk(causal, rows, tmp_path):
    recipe = families.recipe(causal.llama, k=2, **RECIPE)
    dk.merge(recipe, tmp_path / "out")
    found = dk.evaluate({"memory": recipe, "disk": tmp_path / "out"}, data=rows)
    memory, disk = found.evaluations
    assert memory.scores == disk.scores and set(memory.scores) == {"exact_match", "loss"}
    assert best_of(found.row("loss")) is None


def test_a_pack_scores_as_the_model_that_it_holds(causal, rows, tmp_path, dare):
    base, model, pack = causal.llama / "base", causal.llama / "m0", tmp_path / "m0.safetensors"
    dk.pack(base, model, pack, drop_rate=0.5, seed=4, force=True)
    dk.drop(base, model, tmp_path / "dropped", drop_rate=0.5, seed=4, force=True)
    done = dare("eval", pack, "--data", rows)
    assert done.code == 1 and "is a pack: it can only be used with its base; add --base" in done.err
    done = dare("eval", pack, tmp_path / "dropped", "--base", base, "--data", rows, "--json")
    first, second = done.data["evaluations"]
    assert first["scores"] == second["scores"]


def test_a_damaged_pack_has_no_score(causal, rows, tmp_path, dare):
    base, pack = causal.llama / "base", tmp_path / "m0.safetensors"
    dk.pack(base, causal.llama / "m0", pack, drop_rate=0.5, seed=4, codec="none", force=True)
    families.damage(pack, "values:lm_head.weight")
    done = dare("eval", pack, "--base", base, "--data", rows)
    assert done.code == 1 and "m0.safetensors: lm_head.weight" in done.err and "dare verify" in done.err


def test_a_command_gets_the_bytes_that_a_merge_writes(causal, tmp_path):
    recipe = families.recipe(causal.llama, k=2, **RECIPE)
    dk.merge(recipe, tmp_path / "out")
    code = (
        "import sys, json, hashlib, pathlib\n"
        "data = (pathlib.Path(sys.argv[1]) / 'model.safetensors').read_bytes()\n"
        "print(json.dumps(int(hashlib.sha256(data).hexdigest()[:8], 16)))"
    )
    found = dk.evaluate({"merged": recipe, "plain": causal.llama / "m0"}, judge=[sys.executable, "-c", code])
    for evaluation, folder in zip(found.evaluations, (tmp_path / "out", causal.llama / "m0"), strict=True):
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert evaluation.scores["score"].value == int(digest[:8], 16)


def test_one_table_and_its_files(causal, rows, tmp_path, dare):
    models = [causal.llama / "m0", causal.llama / "m1"]
    out, samples = tmp_path / "out", tmp_path / "samples"
    done = dare("eval", *models, "--data", rows, "--out", out, "--samples", samples)
    assert done.code == 0 and "±" in done.out and str(models[0]) in done.out and "no model is marked best" in done.out
    assert json.loads((out / "comparison.json").read_text())["evaluations"][0]["scores"]["loss"]["stderr"] > 0
    assert f"| {models[0]} | {models[1]} |" in (out / "comparison.md").read_text()
    (made,) = [path for path in samples.rglob("*.jsonl") if "m0" in str(path.parent)]
    lines = [json.loads(line) for line in made.read_text().splitlines()]
    assert len(lines) == 9 and {"place", "loss", "right"} <= set(lines[0])


@pytest.mark.parametrize(
    ("data", "cut"),
    [
        ([{"text": "w3 w4 w5 w6"}, {"text": "w3 w4 w5"}], 1),
        ([{"text": "w3 w4 w5"}], 0),
        ([{"prompt": "w3 w4 w5 w6", "completion": "w7"}, {"prompt": "w3", "completion": "w7"}], 1),
    ],
)
def test_rows_that_are_cut_are_told(causal, tmp_path, data, cut):
    path, said = tmp_path / "long.jsonl", []
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    dk.evaluate(causal.llama / "m0", data=path, max_length=3, say=said.append)
    told = [line for line in said if "longer than 3 tokens and are cut" in line]
    assert bool(told) is bool(cut)
    assert all(f"{cut} of {len(data)} rows" in line and f"{path}:1" in line for line in told)


def test_what_is_finished_is_kept(causal, rows, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    models = {"a": causal.llama / "m0", "b": causal.llama / "m1"}
    out = tmp_path / "out"
    calls, forward = [], LlamaForCausalLM.forward

    def exhausted(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) > 3:  # the first model is asked twice whether it looks ahead, and has one batch
            raise torch.OutOfMemoryError("tried to allocate 7 GiB")
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(LlamaForCausalLM, "forward", exhausted)
    said = []
    found = dk.evaluate(models, data=rows, out=out, say=said.append)
    assert found.failed and found.evaluations[0].error is None
    assert "out of memory" in found.evaluations[1].error and "--batch-size" in said[-1]
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with (out / KEPT).open("a") as file:
        file.write('{"key": "cut by a ki')
    again = dk.evaluate(models, data=rows, out=out)
    assert [e.kept for e in again.evaluations] == [True, False] and not again.failed
    assert again.evaluations[0].scores == found.evaluations[0].scores
    third = dk.evaluate(models, data=rows, out=out)
    assert [e.kept for e in third.evaluations] == [True, True]
    with Path(rows).open("a") as file:
        file.write(json.dumps({"prompt": "w5", "completion": "w6"}) + "\n")
    changed = dk.evaluate(models, data=rows, out=out)
    assert not any(e.kept for e in changed.evaluations)


def test_a_model_that_fails_does_not_stop_the_others(causal, rows, real, dare):
    if real.kind != "bert":
        pytest.skip("only a classifier cannot be judged by completions")
    done = dare("eval", real.path / "m0", causal.llama / "m0", "--data", rows, "--json")
    assert done.code == 1
    broken, fine = done.data["evaluations"]
    assert "is a classifier" in broken["error"] and fine["scores"]["loss"]["value"] > 0
    with pytest.raises(DataError, match="is a classifier"):
        dk.evaluate(real.path / "m0", data=rows)


def test_what_torch_refuses_does_not_stop_the_others(causal, rows, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    def wide(self, *arguments, **keywords):
        raise IndexError("index out of range in self")

    monkeypatch.setattr(LlamaForCausalLM, "forward", wide)
    said = []
    found = dk.evaluate([causal.llama / "m0", causal.gpt2 / "m0"], data=rows, say=said.append)
    assert "cannot be run on input_ids alone (index out of range in self)" in found.evaluations[0].error
    assert "llama/m0: LlamaForCausalLM cannot be run" in said[-1]
    assert found.evaluations[1].scores
    with pytest.raises(DataError, match="index out of range in self"):
        dk.evaluate(causal.llama / "m0", data=rows)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "Missing argument"),
        (["m"], 2, "choose what to judge by"),
        (["m", "--generate", "q.json"], 2, "needs --out"),
        (["m", "--data", "d.jsonl", "--prompt", "x"], 2, "only works with --generate"),
        (["missing", "--judge", "nowhere.py:f"], 1, "no file nowhere.py"),
        (["missing", "missing", "--data", "ROWS"], 1, "given twice"),
        (["missing", "--data", "ROWS"], 1, "there is no checkpoint 'missing'"),
        (["missing.yaml", "--data", "ROWS"], 1, "missing.yaml"),
    ],
)
def test_mistakes_are_found_before_anything_runs(dare, rows, arguments, code, says):
    done = dare("eval", *[rows if one == "ROWS" else one for one in arguments])
    assert done.code == code and says in done.out + done.err


def test_the_best_is_only_marked_where_errors_leave_no_doubt():
    assert best_of([Score(0.9, 0.01), Score(0.8, 0.01)]) == 0
    assert best_of([Score(0.9, 0.01), Score(0.8, 0.01), Score(0.89, 0.01)]) is None
    assert best_of([Score(2.0, 0.1, False), Score(1.0, 0.1, False)]) == 1
    assert best_of([Score(0.9, 0.06), Score(0.8, 0.0)]) is None
    assert best_of([Score(0.9, None), Score(0.1, 0.01)]) is None
    assert best_of([Score(0.9, 0.0, None), Score(0.1, 0.0, None)]) is None
    assert best_of([Score(0.9, 0.01), None]) is None
    assert best_of([Score(0.9, 0.01), None, Score(0.2, 0.01)]) == 0
    assert best_of([Score(0.9, 0.0), Score(0.9, 0.0)]) is None


# --- answers


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answers_are_what_greedy_decoding_gives(causal, kind, tmp_path, dare):
    rng = np.random.default_rng(3)
    asked = [{"instruction": words(rng, 1 + i % 6), "dataset": "helpful"} for i in range(7)]
    (tmp_path / "q.json").write_text(json.dumps(asked))
    model = getattr(causal, kind) / "m0"
    options = ("--generate", tmp_path / "q.json", "--max-new-tokens", 4)
    assert dare("eval", model, *options, "--out", tmp_path / "a.json", "--batch-size", 3).code == 0
    found = json.loads((tmp_path / "a.json").read_text())
    with open_live(model, device="cpu") as live:
        for row, question in zip(found, asked, strict=True):
            ids = live.tokenizer(question["instruction"], return_tensors="pt")
            new = live.model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
            expected = live.tokenizer.decode(new, skip_special_tokens=True).strip()
            assert row == {
                "instruction": question["instruction"], "output": expected, "generator": "m0", "dataset": "helpful"
            }  # fmt: skip
    done = dare("eval", model, *options, "--out", tmp_path / "a.json")
    assert done.code == 0 and "has all answers already" in done.err
    done = dare("eval", model, *options, "--out", tmp_path / "a.json", "--limit", 2)
    assert done.code == 1 and "does not answer these questions" in done.err
    assert dare("eval", model, *options, "--out", tmp_path / "a.json", "--limit", 2, "--overwrite").code == 0
    assert len(json.loads((tmp_path / "a.json").read_text())) == 2


def test_answers_follow_the_chat_template_or_a_prompt(causal, tmp_path):
    from darekit.evaluation.generations import Question, _ids

    question = Question("w5", "d", "q:1")
    with open_live(causal.llama / "m0", device="cpu") as live:
        assert _ids(live.tokenizer, question, None) == [5]
        assert _ids(live.tokenizer, question, "w8 {instruction} w9") == [8, 5, 9]
        live.tokenizer.chat_template = "w7 {% for m in messages %}{{ m.content }}{% endfor %} w9"
        assert _ids(live.tokenizer, question, None) == [7, 5, 9]


def test_answers_that_cannot_be_written(causal, tmp_path):
    model, asked = causal.llama / "m0", tmp_path / "q.jsonl"
    asked.write_text('{"prompt": "w5"}\n{"text": "w6"}\n')
    with pytest.raises(DataError, match=r"q\.jsonl:2 has no instruction"):
        dk.generate(model, asked, tmp_path / "a.json")
    asked.write_text('{"prompt": "w5"}\n')
    for models, keywords, error, says in (
        (model, {"max_new_tokens": 99}, DataError, "exceeds the model's limit of 64"),
        (model, {"prompt": "Answer:"}, PlanError, "does not contain {instruction}"),
        ([model, causal.llama / "m1"], {}, PlanError, "the answers of 2 models do not fit into one file"),
    ):
        with pytest.raises(error, match=says):
            dk.generate(models, asked, tmp_path / "a.json", **keywords)
    (tmp_path / "a.json").write_text("notes")
    with pytest.raises(OutputError, match="does not answer"):
        dk.generate(model, asked, tmp_path / "a.json")
    paths = dk.generate([model, causal.llama / "m1"], asked, tmp_path / "all", max_new_tokens=2)
    assert len(paths) == 2 and all(len(json.loads(path.read_text())) == 1 for path in paths)
