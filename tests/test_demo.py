# SPDX-License-Identifier: Apache-2.0
"""The demo end to end, with models too small to mean anything: what is tested is what could be wrong regardless."""

import dataclasses
import itertools
import json
import random
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from darekit.demo import claim_directory, report, run_demo  # noqa: E402
from darekit.demo.settings import Course, Settings, quick_settings, read_settings  # noqa: E402
from darekit.demo.tasks import (  # noqa: E402
    ABILITIES,
    FINE_TUNED,
    Example,
    base_examples,
    direct,
    held_out_words,
    instruct,
    tuning_examples,
)
from darekit.errors import DarekitError, DataError, OutputError  # noqa: E402

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo") / "dir", quick=True, quiet=True)


@pytest.fixture
def members(result):
    from darekit.demo.family import Family, calm

    with calm():
        yield Family(result.directory, quick_settings())


def times(directory):
    return {name: (directory / name / WEIGHTS).stat().st_mtime_ns for name in ("base", *FINE_TUNED)}


def test_the_table_has_every_row_and_every_cell_is_a_percentage(result):
    titles = [row.title for row in report.summarise(result.scores)]
    merges = ["average", "average + DARE", "task arithmetic", "task arithmetic + DARE", "TIES", "TIES + DARE"]
    assert titles == ["base", *(f"fine-tuned: {ability}" for ability in FINE_TUNED), *merges]
    assert all(len(score.accuracy) == len(FINE_TUNED) for score in result.scores)
    assert all(0 <= value <= 100 for score in result.scores for value in score.accuracy)
    lines = [line for line in result.table.read_text().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(titles)
    assert {line.count("|") for line in lines} == {len(FINE_TUNED) + 4}


def test_the_files_hold_the_same_numbers(result):
    data = json.loads(result.data.read_text())
    assert [row["mean"] for row in data["rows"]] == [row.mean for row in report.summarise(result.scores)]
    assert len(data["points"]) == len(result.points) == 3 * 3 * len(FINE_TUNED)
    assert data["table"] == "results.md"
    png = result.plot.read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    assert not list(result.directory.glob(".*"))


def test_the_family_and_the_merges_are_ordinary_checkpoints(result):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("base", *FINE_TUNED, "merged/average", "merged/ties_dare"):
        model = AutoModelForCausalLM.from_pretrained(result.directory / name)
        stored = load_file(result.directory / name / WEIGHTS)
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        assert all(torch.equal(value, stored[key].to(value.dtype)) for key, value in model.state_dict().items())
        tokenizer = AutoTokenizer.from_pretrained(result.directory / name)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        text = "please sort cab=abc"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_recipes_beside_the_models_are_the_examples(result):
    from darekit.demo.recipes import examples_directory

    assert (result.directory / "ties_dare.yaml").read_text() == (examples_directory() / "ties_dare.yaml").read_text()
    for path in examples_directory().glob("*_dare.yaml"):
        assert "keep_dense: [embeddings, norms]" in path.read_text()


def test_no_evaluation_word_is_ever_generated_for_training():
    held_out = set(held_out_words(count=600, length=4))
    assert len(held_out) == 600
    streams = [base_examples(random.Random(0), length=4)]
    streams += [tuning_examples(random.Random(0), ability, length=4, replay=0.3) for ability in FINE_TUNED]
    for stream in streams:
        assert held_out.isdisjoint(example.word for example in itertools.islice(stream, 5000))


def test_training_on_an_evaluation_word_is_refused(members):
    from darekit.demo.family import load_model, load_tokenizer
    from darekit.demo.training import train

    words = held_out_words(count=8, length=3)
    leaking = (direct("copy", word) for word in itertools.cycle(words))
    model, tokenizer = load_model(members.base), load_tokenizer(members.base)
    with pytest.raises(DataError, match="saw 4 evaluation words"):
        list(train(model, tokenizer, leaking, Course(1, 4, 1e-4), title="x", held_out=frozenset(words)))


def test_an_instruction_is_left_out_of_its_own_replay():
    replayed = itertools.islice(base_examples(random.Random(0), length=4, without="sort"), 2000)
    assert not [example for example in replayed if example.prompt.startswith("please sort")]


def test_teacher_forced_score_equals_generation(members):
    from darekit.demo.evaluation import answered
    from darekit.demo.family import END, load_model, load_tokenizer

    tokenizer, both = load_tokenizer(members.base), set()
    for ability in FINE_TUNED:
        model = load_model(members.model(ability, 0))
        words = held_out_words(count=12, length=3)
        examples = [instruct(ability, word) for word in words] + [instruct(ability, word, "aaa") for word in words]
        ids = tokenizer([example.prompt for example in examples], return_tensors="pt")
        texts = tokenizer.batch_decode(model.generate(**ids), skip_special_tokens=False)
        wanted = [example.prompt + example.answer + END for example in examples]
        found = [text.startswith(want) for text, want in zip(texts, wanted, strict=True)]
        assert answered(model, tokenizer, examples) == found
        both |= set(found)
    assert both == {True, False}


def test_dropping_nothing_is_the_fine_tuned_model(result, members):
    scores = {score.row: score.accuracy for score in result.scores}
    for column, ability in enumerate(FINE_TUNED):
        tuned = scores[f"fine-tuned: {ability}"][column]
        at_zero = [point.accuracy for point in result.points if point.ability == ability and point.drop_rate == 0]
        assert at_zero == [tuned] * 3


def test_the_data_beside_the_models_say_what_the_table_says(result):
    """`dare eval` on the file for testing gives the table's cell; no word is in two files."""
    import darekit as dk

    rows = {path.name: set(path.read_text().splitlines()) for path in result.directory.glob("*.jsonl")}
    assert len(rows) == 3 * len(FINE_TUNED) + 1 and all(rows.values())
    asked = {name: found for name, found in rows.items() if name != "texts.jsonl"}
    assert sum(map(len, asked.values())) == len(set().union(*asked.values()))
    found = dk.evaluate(
        [result.directory / ability for ability in FINE_TUNED],
        judge={ability: {"data": str(result.directory / f"{ability}.test.jsonl")} for ability in FINE_TUNED},
        device="cpu",
    )
    for ability, evaluation in zip(FINE_TUNED, found.evaluations, strict=True):
        cells = next(score.accuracy for score in result.scores if score.row == f"fine-tuned: {ability}")
        assert [100 * evaluation.scores[f"{name}/exact_match"].value for name in FINE_TUNED] == pytest.approx(cells)


def test_a_second_run_trains_nothing_and_finds_the_same(result):
    before = times(result.directory)
    again = run_demo(result.directory, quick=True, quiet=True)
    assert again.trained == ()
    assert again.scores == result.scores and again.points == result.points
    assert times(result.directory) == before


def test_a_changed_setting_trains_what_it_shapes(members):
    from darekit.demo.family import Family, Job, is_trained

    changes = (
        ({}, (True, True)),
        ({"mask_seeds": (1, 2)}, (True, True)),
        ({"replay": 0.5}, (True, False)),
        ({"tune": Course(41, 32, 1e-3)}, (True, False)),
        ({"base_seed": 1}, (False, False)),
    )
    for change, expected in changes:
        other = Family(members.directory, dataclasses.replace(members.settings, **change))
        assert (is_trained(other, Job()), is_trained(other, Job("sort", 0))) == expected, change


def test_two_processes_train_what_one_does(members, tmp_path):
    import shutil

    from darekit.demo.family import Family
    from darekit.demo.training import train_family

    shutil.copytree(members.base, tmp_path / "base")
    seen = []
    family = Family(tmp_path, dataclasses.replace(members.settings, processes=2))
    trained = train_family(family, lambda *event: seen.append(event))
    assert len(trained) == len(FINE_TUNED)
    assert seen[-1] == ("fine-tuning 3 models", 3 * 40, 3 * 40)
    for ability in FINE_TUNED:
        assert (tmp_path / ability / WEIGHTS).read_bytes() == (members.model(ability, 0) / WEIGHTS).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_failing_child_is_reported_and_leaves_nothing(members, tmp_path):
    import shutil

    from darekit.demo.family import Family
    from darekit.demo.training import train_family

    shutil.copytree(members.base, tmp_path / "base")
    diverging = dataclasses.replace(members.settings, tune=Course(3, 4, 1e30), processes=2)
    with pytest.raises(DarekitError, match=r"fine-tuning failed: training of \w+ \(seed 0\) diverged"):
        train_family(Family(tmp_path, diverging), lambda *event: None)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_diverging_training_is_refused_by_name(tmp_path):
    settings = dataclasses.replace(quick_settings(), base=Course(5, 4, 1e30))
    with pytest.raises(DataError, match=r"training of base diverged: the loss is nan at step \d of 5"):
        run_demo(tmp_path / "d", settings=settings, quiet=True)
    assert not (tmp_path / "d" / "base").exists()


def test_what_a_killed_run_left_is_not_taken_for_a_model(members, tmp_path):
    from darekit.demo.family import Family, Job, is_trained, remove_unfinished

    family = Family(tmp_path, members.settings)
    (tmp_path / ".unfinished-x").mkdir()
    (tmp_path / ".unfinished-x" / WEIGHTS).write_bytes(b"half")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "training.json").write_text('{"fingerprint"')
    assert not is_trained(family, Job())
    remove_unfinished(tmp_path)
    assert not (tmp_path / ".unfinished-x").exists()


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="holds other files"):
        claim_directory(tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        claim_directory(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_missing_extras_are_named_before_anything_is_imported_or_written(tmp_path):
    code = (
        "import sys, pathlib; sys.modules['matplotlib'] = None; import darekit.demo, darekit.errors\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        f"try: darekit.demo.run_demo(pathlib.Path({str(tmp_path / 'new')!r}))\n"
        "except darekit.errors.DarekitError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "the demo needs matplotlib, which is not installed: pip install 'darekit[demo]'\n"
    assert not (tmp_path / "new").exists()


def test_abilities():
    assert {name: ability("gadp") for name, ability in ABILITIES.items()} == {
        "reverse": "pdag",
        "sort": "adgp",
        "shift": "hbea",
        "upper": "GADP",
        "copy": "gadp",
    }
    assert instruct("sort", "cab") == Example("cab", "please sort cab=", "abc")


def test_settings_survive_json():
    assert read_settings(json.loads(json.dumps(dataclasses.asdict(Settings())))) == Settings()
