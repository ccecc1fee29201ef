# SPDX-License-Identifier: Apache-2.0
"""The run on a real model (real/), on stand-ins: a GGUF file made here, trainings of a few steps, results made up.
Nothing is downloaded."""

import json
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "real"
for needed in ("torch", "transformers", "tokenizers", "gguf", "num2words", "babel"):
    pytest.importorskip(needed)

sys.path.insert(0, str(ROOT))
from real import (  # noqa: E402
    base,
    claims,
    informed,
    lessons,
    measuring,
    merging,
    packing,
    page,
    running,
    searching,
    sizes,
    steps,
    training,
)
from real.page import headline, words  # noqa: E402

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def original():
    """A small Llama with three heads for two, and a byte-level tokenizer that splits digits, as SmolLM2 has them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*CONTROL], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([one.user for one in islice(lessons.examples("json", "training"), 50)], trainer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=backend.get_vocab_size(), hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512, rope_theta=50000.0,
            tie_word_embeddings=True, rms_norm_eps=1e-5, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # rounded in place: `model.to` would round the rotary frequencies, too
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16))
    return model, backend


def permuted(weight, heads):
    """What llama.cpp does with rows of q and k, element by element: row i of a head's first half goes to 2 i, of its
    second half to 2 i + 1."""
    size = len(weight) // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = weight[head * size + i]
            out[head * size + 2 * i + 1] = weight[head * size + size // 2 + i]
    return out


@pytest.fixture(scope="module")
def gguf_file(original, tmp_path_factory):
    import gguf

    model, backend = original
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(50000.0)
    tokens = [token for token, _ in sorted(backend.get_vocab().items(), key=lambda one: one[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = {ours: theirs for theirs, ours in {**base.LAYER, **base.WHOLE}.items()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.float().numpy()
        parts = name.removesuffix(".weight").split(".")
        layer = f"blk.{parts[2]}." if "layers" in parts else ""
        short = names[".".join(parts[3:] if layer else parts)]
        if short in ("attn_q", "attn_k"):
            values = permuted(values, 6 if short == "attn_q" else 2)
        writer.add_tensor(f"{layer}{short}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def work(gguf_file, tmp_path_factory):
    """A folder with a base and data."""
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("real")
    base.convert(gguf_file, path / "base")
    tokenizer = AutoTokenizer.from_pretrained(path / "base")
    lessons.write_data(path / "data", tokenizer, {"validation": 3, "test": 4, "prose": 2}, training=5)
    return path


# --- the base ---


def test_gguf_becomes_the_very_model(original, work):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, backend = original
    found = AutoModelForCausalLM.from_pretrained(work / "base").float()
    ids = torch.arange(3, 43)[None]
    with torch.inference_mode():
        assert torch.equal(found(ids).logits, model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    for text in ("On 3 March 2021, 12 lamps", "naïve \n\t  ñandú 90", "def f(x):\n    return x\n"):
        assert tokenizer(text)["input_ids"] == backend.encode(text).ids
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_start|>user")["input_ids"][0] == 1
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    chat = lessons.chat(tokenizer, lessons.Example("S", "U", "A"))
    assert chat == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


def test_unknown_tensors_and_tokenizers_are_refused():
    with pytest.raises(SystemExit, match=r"blk\.0\.ffn_gate_exps"):
        base.name_of("blk.0.ffn_gate_exps.weight")
    with pytest.raises(SystemExit, match="expected gpt2"):
        base.tokenizer_of({"tokenizer.ggml.model": "llama"})


def test_a_base_that_is_there_is_not_made_again(work, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base.json").write_text(json.dumps({"source": str(work / "base")}))
    said = []
    assert base.make_base(tmp_path / "base", model=str(work / "base"), say=said.append) == tmp_path / "base"
    assert not said
    base.make_base(tmp_path / "other", model=str(work / "base"), say=said.append)
    assert (tmp_path / "other" / "config.json").is_file() and said
    with pytest.raises(SystemExit, match="cannot load"):
        base.make_base(tmp_path / "third", model=str(tmp_path / "nothing"), say=said.append)
    assert not (tmp_path / "third").exists()


# --- the data ---


def _taken(ability, split, count=300):
    return list(islice(lessons.examples(ability, split), count))


def _things(ability, one):
    """What must be of one split."""
    if ability == "json":
        values = json.loads(one.answer)
        number, goods = values["order"].split()
        return {*values["name"].split(), values["city"], values["date"], number, goods}
    return {one.user}


@pytest.mark.parametrize("ability", lessons.ABILITIES)
def test_splits_share_nothing(ability):
    found = {split: set() for split in lessons.SPLITS}
    for split in lessons.SPLITS:
        for one in _taken(ability, split):
            found[split] |= _things(ability, one)
    for first, second in (("training", "validation"), ("training", "test"), ("validation", "test")):
        assert not found[first] & found[second]


def test_sentences_and_modules_are_of_one_split():
    sentences = [text for own in lessons.SENTENCES.values() for text in own]
    assert len({*sentences}) == len(sentences)
    assert all(text.count("{") == 4 for text in sentences)
    modules = [name for splits in lessons.MODULES.values() for names in splits.values() for name in names.split()]
    assert len({*modules}) == len(modules)
    texts = [text.lower() for own in lessons.topic_texts().values() for text, _ in own]
    assert len({*texts}) == len(texts)
    assert len({*lessons.prose()}) == len(lessons.prose()) >= sizes.STANDARD.rows["prose"]


@pytest.mark.parametrize("ability", lessons.ABILITIES)
def test_examples_follow_from_the_seed(ability):
    first = _taken(ability, "training", 20)
    assert first == _taken(ability, "training", 20)
    assert first != list(islice(lessons.examples(ability, "training", 1), 20))
    assert len({one.system for one in first}) == 1
    assert len({one.answer for one in first}) > 4


def test_answers_are_right():
    for one in _taken("json", "test", 50):
        values = json.loads(one.answer)
        day, year = values["date"][-2:], values["date"][:4]
        text = one.user.lower()
        assert values["name"].lower() in text and values["city"].lower() in text and values["order"] in text
        assert year in text and str(int(day)) in text
    words = {one.user: one.answer for one in _taken("numbers", "training", 2000)}
    assert all(" " in answer for answer in words.values())
    assert any(answer.endswith("hundred") for answer in words.values())


def test_files_are_read_by_darekit(work):
    from darekit.live.data import read_rows

    for name in (*lessons.ABILITIES, lessons.PROSE):
        rows = read_rows(work / "data" / f"{name}.test.jsonl")
        assert len(rows) == (2 if name == lessons.PROSE else 4)
        assert all((row.completion is None) == (name == lessons.PROSE) for row in rows)


# --- training ---


def test_a_stopped_training_goes_on_to_the_same_bytes(work, tmp_path, monkeypatch):
    """In the precision that it began with, whichever is the faster by now: a busy machine times that wrongly."""
    course = training.Course(5, 3, 1e-3)
    monkeypatch.setattr(training, "faster_precision", lambda *_: "float32")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    losses = []
    assert training.train(work / "base", whole, "numbers", course, progress=lambda *a: losses.append(a[2]))
    assert not training.train(work / "base", parts, "numbers", course, stop_after=2)
    assert not parts.exists() and (tmp_path / "parts.state.pt").is_file()
    assert not training.is_trained(work / "base", parts, "numbers", course)
    rest = []
    monkeypatch.setattr(training, "faster_precision", lambda *_: "bfloat16")
    assert training.train(work / "base", parts, "numbers", course, progress=lambda *a: rest.append(a))
    assert [done for done, _, _ in rest] == [3, 4, 5] and [loss for *_, loss in rest] == losses[2:]
    name = "model.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes() != (work / "base" / name).read_bytes()
    assert training.is_trained(work / "base", parts, "numbers", course)
    assert not training.is_trained(work / "base", parts, "numbers", training.Course(6, 3, 1e-3))
    assert not training.is_trained(work / "base", parts, "json", course)
    assert not [*tmp_path.glob("*.pt")]


def test_the_loss_is_that_of_the_answers_alone(work):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    model = AutoModelForCausalLM.from_pretrained(work / "base").float()
    inputs = next(training.batches(tokenizer, "json", training.Course(1, 4, 1e-3)))
    with torch.inference_mode():
        assert torch.allclose(training.answer_loss(model, inputs), model(**inputs).loss, rtol=1e-5)
    example = next(lessons.examples("json", "training"))
    asked = inputs["input_ids"][0][inputs["labels"][0] >= 0]
    assert tokenizer.decode(asked) == example.answer + "<|im_end|>"


# --- the steps ---


def made_up(document, offset=0.0):
    """Results of a sweep that nobody ran: scores that differ from row to row."""
    from darekit.sweeps.grid import cells_of
    from darekit.sweeps.reading import read_sweep

    split = "validation" if "validation" in document else "test"
    rows, seen = [], set()
    for number, cell in enumerate(cells_of(read_sweep(document))[0]):
        key = (cell.kind, cell.judges, *cell.at.items(), *(entry.model for entry in cell.recipe.models))
        if key in seen:
            continue
        seen.add(key)
        scores = {f"{one}/exact_match": [min(1.0, offset + 0.01 * (number % 90)), 0.01, 1] for one in cell.judges}
        scores["prose/perplexity"] = [30.0 + number, None, 1]
        models = [entry.model for entry in cell.recipe.models]
        rows.append(
            {
                "kind": cell.kind,
                "at": dict(cell.at),
                "models": models,
                "judges": [*cell.judges],
                "scores": {split: scores},
            }
        )
    return {"rows": rows, "failed": 0, "seconds": 1.0}


def a_search(document, size):
    """A search's summary, condensed, of which the first method with its weights in the middle is the best."""
    scores = {f"{one}/exact_match": {"value": 0.6, "stderr": 0.03} for one in size.abilities}
    scores["mean"] = {"value": 0.6, "stderr": 0.02}
    params = {"method": "TIES, keep .3", "parameters.lambda": 0.9}
    for at in range(len(size.abilities)):
        params |= {f"models.{at}.parameters.weight[{point}]": 0.75 for point in range(size.depth)}
    baselines = [
        {"name": name, "kind": kind, "validation": scores, "test": scores, "error": None}
        for name, kind in (("base", "base"), (f"single {size.abilities[0]}", "single"), ("average", "plain"))
    ]
    gaps = [
        {
            "against": name, "role": role, "score": "mean", "split": "test", "value": 0.1, "stderr": 0.02,
            "interval": [0.06, 0.14], "better": True,
        }
        for name, role in ((f"single {size.abilities[0]}", "best single model"), ("average", "best plain merge"))
    ]  # fmt: skip
    recipe = {key: value for key, value in document["recipe"].items() if key != "sparsify"}
    return {
        "question": {"goals": [{"score": "mean", "higher_is_better": True}]},
        "counts": {"trials": 60, "complete": 20, "stopped": 40, "failed": 0, "items": 9000, "saved": 0.4},
        "baselines": baselines, "best_single": f"single {size.abilities[0]}", "best_plain": "average",
        "best": {"trial": 7, "name": None, "params": params, "validation": scores, "test": scores, "merge": recipe},
        "differences": gaps, "verdict": ["Best: trial 7"], "test_looks": 1, "seconds": 10.0,
    }  # fmt: skip


def results_of(size):
    """As if everything had been run."""
    found = {}
    for step in steps.steps_of(size):
        kind = step.words[0]
        if kind == "sweep":
            found[step.name] = made_up(step.file(found))
        elif kind == "pack":
            found[step.name] = {"bytes": 1000 * (1 + len(found)), "model_bytes": 269_000_000}
        elif kind == "eval":
            paths = [word for word in step.words[1:] if not word.startswith("--")]
            paths = paths[: next(i for i, word in enumerate(paths) if word == "base" or word.endswith(".jsonl"))]
            judges = [Path(word).stem for word in step.words if word.endswith(".jsonl")]
            scores = {f"{one}/exact_match": {"value": 0.5} for one in judges[:-1]}
            scores["prose.test/perplexity"] = {"value": 40.0}
            names = [path.removesuffix(".yaml") for path in paths]
            gaps = {name: {other: {"value": -0.01, "stderr": 0.02} for other in names[1:]} for name in scores}
            found[step.name] = {
                "evaluations": [{"model": name, "scores": scores} for name in names],
                "differences": gaps,
            }
        elif kind == "extract":
            found[step.name] = {
                "bytes": 5000,
                "model_bytes": 269_000_000,
                "total_error": 0.9,
                "outside": 0.2,
                "rank": 8,
            }
        elif kind == "search":
            found[step.name] = a_search(step.file(found), size)
        elif kind == "inspect":
            total = {"r": 0.003, "zeros": 0.5, "shares": {"0.002": 0.999}}
            found[step.name] = {"median_r": 0.003, "drop_rate": 0.99, "verdict": "ok", "total": total}
        elif kind == "recommend":
            found[step.name] = {"drop_rate": 0.99}
        elif kind == "similarity":
            found[step.name] = {"curves": [{"method": "dare", "drop_rate": 0.9, "cosine": [1.0, 0.99]}]}
        else:
            found[step.name] = {"dare": 20.0, "plain": 19.0, "ratio": 1.05, "replace_seconds": 0.4, "threads": 1}
    settings = {
        "base": "tiny of nothing", "abilities": [*size.abilities], "rows": dict(size.rows), "seeds": [*size.seeds],
        "other_seeds": [*size.other_seeds], "rates": [*size.rates], "headline": [*size.headline],
        "other_rates": [*size.other_rates], "batch": size.batch, "again": size.again, "also": [*size.also],
        "depth": size.depth, "dtype": "float32", "jobs": 1, "machine": "two", "torch": "2", "transformers": "5",
        "examples": {one: ["user", "answer"] for one in size.abilities},
        "counts": {split: dict.fromkeys((*size.abilities, "prose"), 9) for split in ("validation", "test")},
    }  # fmt: skip
    course = {"course": {"steps": 1, "batch": 2, "rate": 1e-3}, "precision": "float32", "seconds": 3.0}
    return {
        "settings": settings, "steps": found, "seconds": dict.fromkeys(found, 1.0), "failed": [], "left_out": [],
        "trainings": {one: course for one in size.abilities},
    }  # fmt: skip


def test_statistics_are_of_training_and_merge_with_the_defaults(work, tmp_path):
    from transformers import AutoTokenizer

    from darekit.recipe import read_recipe
    from darekit.sweeps.grid import cells_of
    from darekit.sweeps.reading import read_sweep

    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    lessons.write_data(tmp_path, tokenizer, {"validation": 3, "test": 4, "prose": 2}, training=5)
    for one in lessons.ABILITIES:
        own = (tmp_path / "training" / f"{one}.jsonl").read_text().splitlines()
        others = "".join((tmp_path / f"{one}.{split}.jsonl").read_text() for split in ("validation", "test"))
        assert len(own) == 5 and not {*own} & {*others.splitlines()}
    *grams, sweep = informed.informed_steps(sizes.STANDARD)
    assert [step.makes for step in grams] == [informed.gram_path(one) for one in sizes.STANDARD.abilities]
    cells = [cell for cell in cells_of(read_sweep(sweep.file({})))[0] if cell.kind == "grid"]
    assert [cell.at[sizes.DROP_RATE] for cell in cells] == [*informed.RATES]
    for cell in cells:
        recipe = read_recipe(cell.recipe.to_data())
        assert recipe.merge_method == "regmean"
        assert [entry.stats for entry in recipe.models] == [step.makes for step in grams]


@pytest.mark.parametrize("size", [sizes.STANDARD, sizes.FULL, sizes.QUICK], ids=["standard", "full", "quick"])
def test_the_budget_counts_the_cells_that_sweeps_have(size):
    from darekit.sweeps.grid import cells_of, essence
    from darekit.sweeps.reading import read_sweep

    found = results_of(size)["steps"]
    judged = {}  # of each folder of results: what is there is not judged again
    for step in steps.steps_of(size):
        if step.words[0] != "sweep":
            continue
        there = judged.setdefault(step.words[2], set())
        before = len(there)
        for cell in cells_of(read_sweep(step.file(found)))[0]:
            there.add((repr(essence(cell.recipe).to_data()), cell.judges))
        assert sum(count for count, _ in step.cells) == len(there) - before, step.name


@pytest.mark.parametrize("size", [sizes.STANDARD, sizes.FULL, sizes.QUICK], ids=["standard", "full", "quick"])
def test_every_command_is_one_that_can_be_typed(size):
    from darekit.recipe import read_recipe
    from test_docs import command_of

    todo = [step for step in steps.steps_of(size) if step.program == "dare"]
    for step in todo:
        device = ["--device", "cpu", "--dtype", "bfloat16"] if step.device else []
        command, words = command_of([*step.words, *device])
        command.make_context(step.name, words)  # raises a usage error, which names what it does not understand
    for step in todo:
        if step.name == "rounding":
            for recipe in step.file({}).values():
                read_recipe(recipe)
    assert len({step.name for step in todo}) == len(todo) == len({step.words for step in todo})
    assert page.size_of(results_of(size)) == size


def test_the_budget_is_printed_with_its_time():
    pace = measuring.Pace("float32", {"numbers": 0.01, "prose": 0.1})
    todo = steps.steps_of(sizes.QUICK)
    text = measuring.budget(todo, ["numbers"], sizes.QUICK, pace, jobs=2)
    lines = text.splitlines()
    assert "numbers 100, prose 10" in lines[0] and "fine-tuning numbers" in text and "with 2 processes" in lines[-1]
    drop = next(step for step in todo if step.name == "drop")
    # 4 cells and the base: 100 rows of numbers and 16 of prose each.
    assert measuring.seconds_of(drop, sizes.QUICK, pace) == pytest.approx(15 + 5 * (2 + 1 + 1.6))


def test_what_is_chosen_is_the_best_on_validation():
    def row(setting, rate, score):
        at = {"setting": setting, sizes.DROP_RATE: rate}
        scores = {"validation": {"a/exact_match": [score, None, 1], "b/exact_match": [score / 2, None, 1]}}
        return {"kind": "grid", "at": at, "scores": scores}

    rows = [
        row("average", 0, 0.5), row("average", 0.9, 0.9), row("TIES, lambda 1", 0, 0.3),
        row("TIES, lambda 1", 0.9, 0.4),
        row("task arithmetic, lambda 0.5", 0, 0.6), row("task arithmetic, lambda 0.5", 0.5, 0.2),
        row("task arithmetic, lambda 0.5", 0.9, 0.4), row("task arithmetic, lambda 1", 0, 0.1),
        row("task arithmetic, lambda 1", 0.9, 1.0),
    ]  # fmt: skip
    found = merging.chosen({"x-grid": {"rows": rows}}, "x", ["a", "b"])
    # With DARE it is the setting that is best without, even if another were better.
    assert found["task arithmetic"]["without"]["at"] == {"setting": "task arithmetic, lambda 0.5", sizes.DROP_RATE: 0}
    assert found["task arithmetic"]["with"]["at"] == {"setting": "task arithmetic, lambda 0.5", sizes.DROP_RATE: 0.9}


# --- claims and page ---


def flat(size, **scores):
    """Results in which a method's cells all have one score; DARE's, and the fine-tuned models', are .9."""
    found = results_of(size)
    for name in ("drop", "others"):
        for row in found["steps"][name]["rows"]:
            rate, method = row["at"].get(sizes.DROP_RATE, 0), row["at"].get("method", "DARE")
            for judge in row["judges"]:
                if judge != "prose":
                    value = scores.get(method, 0.9) if rate else 0.9
                    row["scores"]["test"][f"{judge}/exact_match"] = [value, None, 1]
    return found


def test_rules_decide():
    kept = flat(sizes.QUICK)
    assert claims.verdict(claims.dare_90, kept).outcome == claims.HELD
    assert (
        claims.verdict(claims.drop_only, kept).outcome
        == claims.verdict(claims.magnitude, kept).outcome
        == claims.FAILED
    )
    assert claims.verdict(claims.drop_only, flat(sizes.QUICK, DropOnly=0.79)).outcome == claims.HELD
    assert claims.verdict(claims.rescaled, flat(sizes.QUICK, **{"magnitude, rescaled": 0.5})).outcome == claims.HELD
    # 2 sqrt(.9 .1 / 100) = 6 points: .85 is within, .83 is not.
    assert claims.tolerance(kept, "numbers") == pytest.approx(6.0)
    assert claims.verdict(claims.dare_90, flat(sizes.QUICK, DARE=0.85)).outcome == claims.HELD
    assert claims.verdict(claims.dare_90, flat(sizes.QUICK, DARE=0.83)).outcome == claims.FAILED
    assert [one.outcome for one in claims.verdicts(kept)].count(claims.MISSING) == 2  # merges: one ability


def test_the_largest_rate_has_no_gap_below():
    found = flat(sizes.QUICK)
    assert claims.largest_rate(found, "numbers", "DARE") == 0.99
    for row in found["steps"]["drop"]["rows"]:
        if row["at"].get(sizes.DROP_RATE) == 0.9:
            row["scores"]["test"]["numbers/exact_match"][0] = 0.1
    assert claims.largest_rate(found, "numbers", "DARE") == 0.5


@pytest.mark.parametrize(
    ("size", "missing"), [(sizes.STANDARD, 1), (sizes.FULL, 0), (sizes.QUICK, 6)], ids=["standard", "full", "quick"]
)
def test_the_page_tells_what_was_run(size, missing, tmp_path):
    pytest.importorskip("matplotlib")
    results = results_of(size)
    page.write_page(results, tmp_path)
    text = (tmp_path / page.PAGE).read_text()
    assert text.count("\n## ") == len(page.SECTIONS)
    assert text.count("Not in this run") == missing
    assert json.loads((tmp_path / page.RESULTS).read_text()) == results
    pictures = {"drop.png", "packs.png", "merges.png"} if len(size.abilities) > 1 else {"drop.png", "packs.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == pictures
    assert all(f"({name})" in text for name in pictures)


def test_a_page_of_a_run_that_ended_early(tmp_path):
    """After every step there is a page, which says what is not in it."""
    results = results_of(sizes.STANDARD)
    names, missing = [*results["steps"]], []
    for count in range(0, len(names) + 1, 3):
        partly = results | {"steps": {name: results["steps"][name] for name in names[:count]}}
        missing.append(page.render(partly, tmp_path).count("Not in this run"))
        if not count % 15:
            page.write_page(partly, tmp_path / str(count))
    assert missing == sorted(missing, reverse=True) and missing[0] == 10 and missing[-1] == 1


def test_the_committed_page_follows_from_its_results():
    results = json.loads((PAGE / page.RESULTS).read_text())
    assert (PAGE / page.PAGE).read_text() == page.render(results, PAGE)
    assert sum(path.stat().st_size for path in PAGE.iterdir()) < 1_000_000


# --- running ---


def test_steps_are_kept_until_what_decides_about_them_changes(work, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(work / "data", tmp_path / "data")
    calls = []
    answer = ['{"drop_rate": 0.99}']

    def call(words, folder, *, program, threads):
        calls.append(list(words))
        return (0, answer[0], "") if answer else (2, "", "dare: no such model")

    monkeypatch.setattr(running, "call", call)
    pace = measuring.Pace("float32", {})
    step = sizes.Step("look", "a look", ("inspect", "base", "numbers", "--json"), needs=("numbers",))

    def run(one=step):
        made = running.Run(tmp_path, sizes.QUICK, pace, 1, lambda line: None)
        made.all([one])
        return made

    assert run().results == {"look": {"drop_rate": 0.99}} == run().results
    assert len(calls) == 1
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "training.json").write_text('{"fingerprint": "another"}')
    run()
    assert len(calls) == 2
    (tmp_path / "data" / "numbers.test.jsonl").write_text("")
    run()
    assert len(calls) == 3
    answer.clear()
    other = run(sizes.Step("other", "another", ("inspect", "base", "json")))
    assert other.failed == ["another: `dare inspect base json` ended with 2: dare: no such model"]
    missing = run(
        sizes.Step("late", "a merge", ("sweep", "steps/late.yaml", "runs/late"), lambda found: found["x-grid"])
    )
    assert missing.failed == ["a merge: not run, x-grid is missing"]


def test_a_search_that_asks_something_else_begins_anew(work, tmp_path, monkeypatch):
    """`dare search` refuses a folder of another question; one that was only stopped is gone on from."""
    (tmp_path / "data").mkdir()
    seen = []

    def call(words, folder, *, program, threads):
        place = folder / "runs" / "search"
        seen.append(place.is_dir())
        place.mkdir(parents=True, exist_ok=True)
        return 130, "", "interrupted"

    monkeypatch.setattr(running, "call", call)
    step = next(one for one in steps.steps_of(sizes.FULL) if one.name == "search")
    run = running.Run(tmp_path, sizes.FULL, measuring.Pace("float32", {}), 2, lambda line: None)
    run.results.update({name: one for name, one in results_of(sizes.FULL)["steps"].items() if name.endswith("-grid")})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run.step(step)
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "training.json").write_text('{"fingerprint": "another"}')
    with pytest.raises(KeyboardInterrupt):
        run.step(step)
    assert seen == [False, True, False]


def test_the_search_is_one_that_dare_search_reads(work):
    """Each method's candidate has what its name says; the recipe as written is the grid's choice."""
    from darekit.searches.reading import read_search
    from darekit.searches.space import candidate, midpoint

    size = replace(sizes.FULL, depth=2)
    document = searching.search_file(size, results_of(size)["steps"])
    found = read_search(document)
    for name in searching.METHODS:
        recipe = candidate(found, midpoint(found.knobs) | {"method": name, sizes.DROP_RATE: 0.7})
        assert (recipe.sparsify is not None) == name.startswith("DARE") and len(recipe.models) == 3
        assert recipe.merge_method == ("ties" if "TIES" in name else "task_arithmetic")
        assert recipe.sparsify is None or recipe.sparsify.parameters["drop_rate"] == 0.7
    weights = merging.chosen_weights(results_of(size)["steps"], size.abilities)
    assert [one["parameters"]["weight"] for one in document["recipe"]["models"]] == weights
    found = read_search(searching.informed_file(size))
    for name in searching.INFORMED:
        recipe = candidate(found, midpoint(found.knobs) | {"method": name, sizes.DROP_RATE: 0.7})
        assert (recipe.sparsify is not None) == name.startswith("DARE") and recipe.merge_method == "regmean"
        assert [entry.stats for entry in recipe.models] == [informed.gram_path(one) for one in size.abilities]
        assert recipe.parameters["off_diagonal"] == 0.75


def test_differences_are_shown_row_by_row(tmp_path):
    results = results_of(sizes.FULL)
    text = page.render(results, tmp_path)
    assert text.count("-1.0 ± 2.0") > 20  # what results_of makes up
    assert words.told_gap(words.mean_gap({"a": (1.0, 3.0), "b": (3.0, 4.0)}, ["a", "b"])) == "+2.0 ± 2.5"
    assert words.mean_gap({"a": (1.0, 3.0)}, ["a", "b"]) is None
    old = json.loads(json.dumps(results))
    for step in old["steps"].values():  # a run from before `dare eval` told them
        step.pop("differences", None) if "evaluations" in step else None
    assert "-1.0 ± 2.0" not in page.render(old, tmp_path)


def test_what_moved_is_of_one_mask():
    found = results_of(sizes.STANDARD)
    for name, change in (("again-seed", -0.02), ("again-threads", 0.0)):
        for row in found["steps"][name]["rows"]:
            rate = row["at"].get(sizes.DROP_RATE, 0)
            first = claims.rows_of(found, "drop", "grid", "undropped")
            same = next(
                one for one in first if one["at"]["model"] == "numbers" and one["at"].get(sizes.DROP_RATE, 0) == rate
            ) if row["kind"] != "base" else row  # fmt: skip
            value = same["scores"]["test"]["numbers/exact_match"][0] + change
            row["scores"]["test"]["numbers/exact_match"] = [value, None, 1]
    text = "\n".join(headline.again(found, PAGE))
    assert "trained with seed 1 -2.0 points; judged by 2 threads +0.0 points" in text
    assert "| moved by | -2.0 | -2.0 | -2.0 | -2.0 | -2.0 |" in text


def test_a_loss_is_the_models_own(work):
    """A model that scales or caps its logits is trained on them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    inputs = next(training.batches(tokenizer, "numbers", training.Course(1, 2, 1e-3)))
    assert (
        training.loss_for(AutoModelForCausalLM.from_pretrained(work / "base").float(), inputs) is training.answer_loss
    )
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=1.0, initializer_range=0.5,
    )  # fmt: skip
    assert training.loss_for(Gemma2ForCausalLM(config), inputs) is training.own_loss


def test_a_state_that_does_not_fit_costs_no_training(work, tmp_path, monkeypatch, capsys):
    import torch

    def full(found, path):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    out = tmp_path / "numbers"
    assert training.train(work / "base", out, "numbers", training.Course(2, 2, 1e-3), every=0)
    assert "no state was kept at step 1: [Errno 28] No space left" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"numbers"}


def test_a_command_is_stopped_before_we_are(tmp_path, monkeypatch):
    """An interrupt that reaches only us reaches what we began, too: nothing goes on alone."""
    import signal
    import threading
    import time

    (tmp_path / "slow.py").write_text(
        "import sys, time\nfrom pathlib import Path\ntry:\n    Path('begun').touch()\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    Path('kept').touch()\n    sys.exit(130)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def interrupt():
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # which waits for the command

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            running.call(["slow"], tmp_path, program="slow")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "kept").exists() and time.monotonic() - began < 50


@pytest.mark.check
def test_the_long_steps_on_the_tiny_model(work, tmp_path, monkeypatch):
    """Adapters, a search and the row-by-row evaluations, by the commands themselves."""
    import shutil

    shutil.copytree(work / "data", tmp_path / "data")
    shutil.copytree(work / "base", tmp_path / "base")
    (tmp_path / "base.json").write_text('{"source": "tiny"}')
    for name in lessons.ABILITIES:
        training.train(tmp_path / "base", tmp_path / name, name, training.Course(2, 2, 1e-3))
    monkeypatch.setattr(searching, "TRIALS", 3)
    monkeypatch.setattr(searching, "INFORMED_TRIALS", 2)
    monkeypatch.setattr(searching, "FAIR", "min")  # of models that answer nothing there are no shares
    monkeypatch.setattr(searching, "ALL", "mean")
    monkeypatch.setattr(packing, "RANKS", (4,))
    monkeypatch.setattr(
        packing, "LORAS", {title: packing.LORAS[title] for title in ("LoRA, rank 4", "LoRA, energy .9")}
    )
    rows = {"validation": 3, "test": 4, "prose": 2}
    size = sizes.Size(rows=rows, batch=4, again=False, also=sizes.ALSO, depth=2)
    made_up_ones = results_of(size)["steps"]
    wanted = (
        "pack-numbers-lossless",
        "lora-numbers",
        "loras-numbers",
        "paired-numbers",
        "paired-TIES",
        "gram",
        "search",
    )
    todo = [step for step in steps.steps_of(size) if step.name.startswith(wanted)]
    run = running.Run(tmp_path, size, measuring.Pace("float32", {}), 1, lambda line: None)
    run.results.update({name: one for name, one in made_up_ones.items() if name.endswith("-grid")})
    for step in todo:
        run.step(step)
    assert not run.failed and {step.name for step in todo} <= run.results.keys()
    results = results_of(size)
    results["steps"] |= json.loads(json.dumps(run.results))
    text = page.render(results, tmp_path)
    assert text.count("Not in this run") == 1 and "energy .9" in text and text.count("The search's best minus") == 2


@pytest.mark.check
def test_a_quick_run_from_end_to_end(work, tmp_path, monkeypatch):
    """Every command on the tiny model, in processes of their own; the second run repeats nothing."""
    from real import __main__ as whole

    few = training.Course(2, 2, 1e-3)
    monkeypatch.setitem(training.COURSES, "numbers", few)
    rows = {"validation": 2, "test": 4, "prose": 2}
    size = sizes.Size(
        lessons.ABILITIES[:1], rows, (1,), rates=(0.9,), headline=(), other_rates=(0.9,), batch=4, again=False
    )
    monkeypatch.setattr(sizes, "QUICK", size)

    def train(folder, names, **_):
        for name in names:
            training.train(folder / "base", folder / name, name, few)

    monkeypatch.setattr(whole, "train", train)
    folders = ["--work", str(tmp_path / "work"), "--page", str(tmp_path / "page")]
    words = ["--quick", "--model", str(work / "base"), "--jobs", "1", *folders]
    assert whole.main(words) == 0
    first = json.loads((tmp_path / "page" / "results.json").read_text())
    assert not first["failed"] and {"drop", "others", "packs-numbers", "speed"} <= first["steps"].keys()
    monkeypatch.setattr(running, "call", lambda *a, **k: pytest.fail("nothing is to be run"))
    assert whole.main(words) == 0
    assert json.loads((tmp_path / "page" / "results.json").read_text())["steps"] == first["steps"]
