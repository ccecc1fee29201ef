# SPDX-License-Identifier: Apache-2.0
"""The command as its users meet it: exit codes, JSON, dry runs, verdicts, hints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

import darekit as dk
import families
from darekit.cli import COMMANDS, PANELS, main, options
from darekit.cli.mergekit_options import read_options
from darekit.methods import MERGE_METHODS, SPARSIFIERS
from darekit.methods.parameters import Choice
from darekit.recipe import Recipe, Sparsify

ROOT = Path(__file__).resolve().parents[1]

REPORT = {
    "seconds", "fsync_seconds", "bytes_read", "bytes_written", "peak_rss_bytes", "tensors", "parameters", "kept",
    "output",
}  # fmt: skip


@pytest.fixture
def recipe(llamas, tmp_path):
    def write(name="recipe.yaml", **keys):
        path = tmp_path / name
        keys = {"sparsify": {"method": "dare", "drop_rate": 0.5, "keep_dense": ["norms"]}} | keys
        path.write_text(json.dumps(families.recipe(llamas.path, **keys)))
        return path

    return write


# --- exit codes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["drop", "base", "m0", "out", "-p", "90"], "write 0.9"),
        (["drop", "base", "m0", "out", "-p", "-0.5"], "outside [0, 1]"),
        (["drop", "base", "m0", "out", "-p", "nan"], "outside [0, 1]"),
        (["drop", "base", "m0", "out"], "--drop-rate"),
        (["drop", "base", "m0", "out", "-p", "0.5", "--shard-size", "5 apples"], "write 5GB"),
        (["drop", "base", "m0", "out", "-p", "0.5", "--shard-size", "0"], "above 0"),
        (["drop", "base", "m0", "out", "-p", "0.5", "--threads", "0"], "--threads"),
        (["drop", "base", "m0", "out", "-p", "0.5", "--seed", "-1"], "--seed"),
        (["drop", "base", "m0", "out", "-p", "0.5", "--seed", str(2**64)], "from 0 to 2^64 - 1"),
        (["merge", "r.yaml", "out", "--set", "parameters.lambda"], "KEY=VALUE"),
        (["merge", "r.yaml"], "OUT"),
        (["nonsense"], "nonsense"),
    ],
)
def test_usage_errors_are_2(dare, arguments, said):
    result = dare(*arguments)
    assert result.code == 2 and said.lower() in " ".join(result.err.replace("│", " ").split()).lower()


def test_a_recipe_without_a_command(dare):
    result = dare("recipe.yaml", "out")
    assert result.code == 2 and "`dare merge recipe.yaml OUT` merges it" in result.err


def test_refusals_are_1_and_one_message(dare, llamas, recipe, tmp_path):
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "config.json").write_text("{}")
    for arguments in (
        ["merge", tmp_path / "none.yaml", tmp_path / "out"],
        ["merge", recipe("missing.yaml", models=["nowhere/at/all"]), tmp_path / "out"],
        ["merge", recipe(), tmp_path / "busy"],
        ["drop", llamas.path / "base", llamas.path / "none", tmp_path / "out", "-p", "0.5"],
        ["inspect", llamas.path / "base", tmp_path / "busy"],
    ):
        result = dare(*arguments)
        assert result.code == 1 and result.out == ""
        assert result.err.startswith("dare: ") and "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_an_error_in_json_too(dare, tmp_path):
    result = dare("merge", tmp_path / "none.yaml", tmp_path / "out", "--json")
    assert result.code == 1
    assert result.data["error"] == "RecipeError" and "none.yaml" in result.data["message"]


def test_version_and_help(dare):
    assert dare("--version").out.strip() == dk.__version__
    for command in ("merge", "drop", "inspect", "methods", "demo"):
        assert command in dare("-h").out
        assert dare(command, "--help").code == 0


@pytest.mark.parametrize("words", [[name] for name in COMMANDS] + [["stats", "gram"], []], ids=" ".join)
def test_help_calls_things_what_its_texts_call_them(dare, words):
    """Whatever typer shows of types: names of arguments in capitals, no type of a switch, no range of 20 digits."""
    said = dare(*words, "--help").out
    assert not re.search("<(bool|int|float)[> ]|boolean|18446744073709551615", said, re.I), said
    for line in re.findall(r"^│ [ *]+ (--[\w-]+)(.*)$", said, re.M):
        assert not re.search(r"<(str|path|list\[.*)>", line[1]), line
    (usage,) = re.findall(r"Usage: .*", said)
    assert not re.search(r"[{[][a-z]", usage), usage


def test_help_lists_commands_in_the_order_in_which_a_user_meets_them(dare):
    listed = []  # titles of panels and names of commands
    for line in dare("--help").out.splitlines():
        listed += re.findall(r"^╭─ (.+?) ─|^│ (\w+) ", line)
    listed = [title or name for title, name in listed]
    index = (Path(__file__).parents[1] / "docs" / "cli.md").read_text()
    headings = [title or name for title, name in re.findall(r"^## (.+)$|^\| \[`dare (\w+)`\]", index, re.M)]
    listed = listed[listed.index("Merge and drop") :]
    assert listed == [word for panel, commands in PANELS.items() for word in (panel, *commands)]
    assert headings == listed  # the reference has the same


def test_without_torch_what_runs_a_model_says_what_it_needs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    families.save(tmp_path / "m", families.llama(np.random.default_rng(0)), families.config())
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), str(Path(dk.__file__).parents[1])])
    for words in (
        ("stats", "gram", tmp_path / "m", "--data", rows, "--out", tmp_path / "g.safetensors"),
        ("eval", tmp_path / "m", "--data", rows),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "darekit", *map(str, words)], env=os.environ | {"PYTHONPATH": path},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert "needs torch: pip install 'darekit[torch]'" in done.stderr, done.stderr


# --- results


def test_json_of_a_merge(dare, recipe, llamas, tmp_path):
    result = dare("merge", recipe(), tmp_path / "out", "--json", "--threads", "2")
    assert result.code == 0, result.err
    data = result.data
    assert set(data) >= REPORT
    elements = sum(array.size for array in llamas.base.values())
    norms = sum(array.size for name, array in llamas.base.items() if array.ndim == 1)
    assert data["output"] == str(tmp_path / "out")
    assert data["tensors"] == len(llamas.base) and data["parameters"] == elements
    assert data["bytes_read"] == 4 * 2 * elements and data["bytes_written"] == 2 * elements
    assert data["seconds"] > 0 and data["fsync_seconds"] > 0 and data["peak_rss_bytes"] > 10 << 20
    assert set(data["kept"]) == {str(llamas.path / f"m{i}") for i in range(3)}
    for kept in data["kept"].values():
        assert abs(kept - norms - (elements - norms) / 2) < 5 * np.sqrt((elements - norms) / 4)
    assert "note:" not in result.out


def test_a_merge_for_people(dare, recipe, tmp_path):
    result = dare("merge", recipe(), tmp_path / "out")
    assert result.code == 0 and str(tmp_path / "out") in result.out
    assert "kept" in result.out and "m0" in result.out and "\x1b" not in result.out + result.err


def test_seed_set_and_shard_size(dare, recipe, tmp_path):
    path = recipe()
    assert dare("merge", path, tmp_path / "a", "--seed", "1").code == 0
    assert dare("merge", path, tmp_path / "b", "--set", "sparsify.seed=1", "--shard-size", "20kB").code == 0
    assert dare("merge", path, tmp_path / "c", "--seed", "2", "--set", "parameters.lambda=0.25").code == 0
    one, two, three = (families.load(tmp_path / name) for name in "abc")
    families.same(two, one)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert (three["lm_head.weight"] != one["lm_head.weight"]).any()
    lock = json.loads((tmp_path / "c" / "darekit.lock.json").read_text())
    assert lock["recipe"]["parameters"]["lambda"] == 0.25 and lock["recipe"]["sparsify"]["seed"] == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2 << 30), ("1.5kb", 1500), ("12345", 12345), ("7000b", 7000)],
)
def test_sizes(text, size):
    assert options.bytes_of(text) == size


def test_recipes_are_relative_to_themselves(dare, llamas, tmp_path, monkeypatch):
    families.copy(llamas.path / "base", tmp_path / "here" / "base")
    families.copy(llamas.path / "m0", tmp_path / "here" / "m0")
    (tmp_path / "here" / "r.yaml").write_text("base_model: base\nmodels: [m0]\nmerge_method: task_arithmetic\n")
    monkeypatch.chdir(tmp_path)
    result = dare("merge", "here/r.yaml", "out")
    assert result.code == 0, result.err
    families.same(families.load("out"), llamas.models[0])


def test_every_option_of_drop_reaches_the_recipe(dare, llamas, tmp_path):
    result = dare(
        "drop", llamas.path / "base", llamas.path / "m0", tmp_path / "out", "-p", "0.6", "--method", "della",
        "--window", "0.3", "--rescale", "none", "--keep-dense", "norms", "--keep-dense", "lm_head*", "--seed", "12",
    )  # fmt: skip
    assert result.code == 0, result.err
    recipe = json.loads((tmp_path / "out" / "darekit.lock.json").read_text())["recipe"]
    sparsify = {key: value for key, value in recipe["sparsify"].items() if key != "seed"}
    assert sparsify == {
        "method": "della", "drop_rate": 0.6, "window": 0.3, "rescale": "none", "on": "delta",
        "keep_dense": ["norms", "lm_head*"],
    }  # fmt: skip
    assert recipe["models"][0]["parameters"]["seed"] == 12


# --- dry runs


def test_a_dry_run_shows_the_plan_and_writes_nothing(dare, recipe, llamas, tmp_path):
    path = recipe()
    before = sorted(tmp_path.iterdir())
    result = dare("merge", path, tmp_path / "out", "--dry-run", "--json")
    assert result.code == 0, result.err
    assert sorted(tmp_path.iterdir()) == before
    data = result.data
    elements = sum(array.size for array in llamas.base.values())
    norms = [name for name, array in llamas.base.items() if array.ndim == 1]
    dense = sum(llamas.base[name].size for name in norms)
    assert data["tensors"] == len(llamas.base) and data["parameters"] == elements
    assert data["bytes_in"] == 8 * elements and 2 * elements < data["bytes_out"] < 2 * elements + 10_000
    assert data["bytes_out"] == sum(shard["bytes"] for shard in data["shards"])
    assert data["peak_memory_bytes"] > 0
    for model in data["models"]:
        assert model["kept"] == pytest.approx(dense + (elements - dense) / 2, abs=len(llamas.base))
        assert model["drop_rate"] == pytest.approx(0.5 * (1 - dense / elements), abs=1e-3)
        assert isinstance(model["effective_seed"], int)
    assert sorted(data["keep_dense"]["norms"]) == sorted(norms)
    assert [check["r"] for check in data["checks"]] == [pytest.approx(0.04, rel=0.2)] * 3
    text = dare("merge", path, tmp_path / "out", "--dry-run").out
    for part in ("tensors", "parameters", "reads", "writes", "memory", "drop rate", "kept", "m2", "keep_dense norms"):
        assert part in text
    assert dare("merge", path, tmp_path / "real").code == 0
    written = sum(file.stat().st_size for file in (tmp_path / "real").glob("*.safetensors"))
    assert written == data["bytes_out"]


def test_filters_and_patterns_that_match_nothing_are_said(dare, recipe, tmp_path):
    rates = [{"filter": "mpl", "value": 0.5}, {"value": 0.6}]
    path = recipe(sparsify={"method": "dare", "drop_rate": rates, "keep_dense": ["*.nomatch"]})
    said = dare("merge", path, tmp_path / "out", "--json").data["notes"]
    assert "drop_rate: the filter 'mpl' matches no tensor" in said
    assert "keep_dense: '*.nomatch' matches no tensor" in said
    assert not any("'*'" in line for line in said)


@pytest.mark.parametrize("size", ["5", "5B"])  # 5B is 5e9 to mergekit
def test_a_bare_small_shard_size_is_asked_about(dare, recipe, tmp_path, size):
    found = dare("merge", recipe(), tmp_path / "out", "--shard-size", size)
    assert found.code == 2 and "5GB" in found.err and "5 bytes" in found.err


# --- mergekit's options


def test_options_of_mergekit_become_ours_or_are_left_out_with_a_note():
    """The command line of `mergekit-yaml`, but for the command's name."""
    found = read_options([
        "merge", "r.yml", "out", "--cuda", "--lazy-unpickle", "--out-shard-size", "500M", "--random-seed", "7",
        "-j", "2", "--device=cuda:0", "--no-quiet", "--transformers-cache", "D", "--dry-run",
    ])  # fmt: skip
    assert " ".join(found.words) == "merge r.yml out --shard-size 500MB --seed 7 --threads 2 --dry-run"
    assert [note.partition(" is ignored: ")[0] for note in found.notes] == [
        "--cuda", "--lazy-unpickle", "--device cuda:0", "--no-quiet",
    ]  # fmt: skip
    assert found.cache == "D" and found.refused is None
    multi = read_options(["merge", "r.yml", "-I", "between", "--out-path", "out", "--no-lazy", "-vv"])
    assert multi.words == ["merge", "r.yml", "out"] and "--stage" in multi.notes[0]
    # What would change the result is no option to leave out; other commands, and words that are no options, stay.
    assert "vocab: base" in str(read_options(["check", "r.yml", "--unsafe-truncate-embeddings"]).refused)
    for line in (
        ["drop", "a", "b", "c", "--cuda"],
        ["merge", "r.yml", "out", "--cudda"],
        ["merge", "r", "o", "-j"],
        [],
    ):
        assert read_options(line).words == [word if word != "-j" else "--threads" for word in line]


def test_every_option_of_mergekit_is_known():
    """Those of mergekit 0.1.5's `mergekit-yaml --help` and `mergekit-multi --help`."""
    switches = [
        "allow-crimes", "trust-remote-code", "quiet", "cuda", "low-cpu-memory", "lazy-unpickle", "read-to-gpu",
        "multi-gpu", "gpu-rich", "async-write", "copy-tokenizer", "clone-tensors", "write-model-card",
        "safe-serialization", "lazy",
    ]  # fmt: skip
    values = [
        "transformers-cache", "lora-merge-cache", "lora-merge-dtype", "random-seed", "device", "num-threads",
        "write-threads", "out-shard-size", "out-path", "intermediate-dir",
    ]  # fmt: skip
    for word in switches:
        for option in (f"--{word}", f"--no-{word}"):
            assert read_options(["merge", "r", "o", option]).words == ["merge", "r", "o"], option
    for word in values:
        assert f"--{word}" not in read_options(["merge", "r", "o", f"--{word}", "1"]).words
    page = (ROOT / "docs" / "mergekit.md").read_text()
    assert [word for word in (*switches, *values, "unsafe-truncate-embeddings") if f"`{word}" not in page] == []


def test_a_command_line_of_mergekit_runs(dare, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "before")
    line = [recipe(), tmp_path / "out", "--copy-tokenizer", "--allow-crimes", "--out-shard-size", "5B", "--cuda"]
    monkeypatch.setattr(sys, "argv", ["dare", "merge", *map(str, line), "--transformers-cache", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and (tmp_path / "out" / "model.safetensors").exists()
    assert os.environ["HF_HUB_CACHE"] == str(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dare", "check", "r.yml", "--unsafe-truncate-embeddings"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2


def test_a_dry_run_finds_what_a_run_would_refuse(dare, llamas, tmp_path):
    rng = np.random.default_rng(9)
    families.save(tmp_path / "base", families.llama(rng), families.config())
    result = dare("drop", tmp_path / "base", llamas.path / "m0", tmp_path / "out", "-p", "0.5", "--dry-run")
    assert result.code == 1 and "does not look like the base" in result.err
    forced = dare("drop", tmp_path / "base", llamas.path / "m0", tmp_path / "out", "-p", "0.5", "--dry-run", "--force")
    assert forced.code == 0 and "does not look like the base" in " ".join(forced.out.split())


# --- inspect


def scaled(path, base, r):
    rng = np.random.default_rng(1)
    model = {}
    for name, array in base.items():
        noise = rng.normal(0, 1, array.shape)
        model[name] = (array + r * np.linalg.norm(array) / np.linalg.norm(noise) * noise).astype(np.float32)
    families.save(path, model)
    return model


@pytest.mark.parametrize(
    ("r", "verdict", "words"),
    [
        (0.01, "ok", "can be dropped"),
        (0.24, "ok", "can be dropped"),
        (0.26, "large", "large"),
        (0.49, "large", "large"),
        (0.52, "wrong_base", "does not look like the base"),
    ],
)
def test_verdicts(dare, tmp_path, r, verdict, words):
    base = families.llama(np.random.default_rng(0), np.float32)
    families.save(tmp_path / "base", base)
    scaled(tmp_path / "m0", base, r)
    result = dare("inspect", tmp_path / "base", tmp_path / "m0", "--json")
    assert result.code == 0 and result.data["verdict"] == verdict and words in result.data["words"]
    assert result.data["median_r"] == pytest.approx(r, rel=1e-3)
    text = dare("inspect", tmp_path / "base", tmp_path / "m0").out
    assert text.startswith(f"{verdict}: ") and words in " ".join(text.split()) and "heads" in text


def test_inspect_recommend_and_the_recipe_say_one_number_and_what_it_costs(dare, tmp_path):
    """r = 0.003: the rule alone would allow 0.9998."""
    base = families.llama(np.random.default_rng(0), np.float32)
    families.save(tmp_path / "base", base)
    for k in range(2):
        scaled(tmp_path / f"m{k}", base, 0.003)
    names = (tmp_path / "base", tmp_path / "m0")
    for command, more in (("inspect", ()), ("inspect", (tmp_path / "m1",)), ("recommend", ())):
        text = " ".join(dare(command, *names, *more).out.split())
        assert "0.999," in text and "general language suffers before the ability does" in text
        assert "99.9 %" not in text and "p = 0.9998" not in text
        data = dare(command, *names, *more, "--json").data
        assert {one["drop_rate"] for one in data.get("models", [data])} == {0.99}
    advice = dare("recommend", *names).out
    assert "p = 0.99." in advice and "99 % of the delta can be dropped" in dare("inspect", *names).out
    assert "p = 0.99 is advised" in " ".join(dare("recommend", *names, "-p", 0.5).out.split())


def test_the_numbers_of_inspect_are_those_of_numpy(dare, tmp_path):
    rng = np.random.default_rng(0)
    base = families.llama(rng, np.float32)
    model = {n: (a + rng.normal(0, 0.003, a.shape) * (rng.random(a.shape) < 0.7)).astype(np.float32)
             for n, a in base.items()}  # fmt: skip
    families.save(tmp_path / "base", base)
    families.save(tmp_path / "m0", model)
    data = dare("inspect", tmp_path / "base", tmp_path / "m0", "--json").data
    assert {tensor["name"] for tensor in data["tensors"]} == set(base)
    deltas = {name: np.abs(model[name] - base[name]).reshape(-1) for name in base}
    whole = np.concatenate(list(deltas.values()))
    flat = np.concatenate([array.reshape(-1) for array in base.values()])
    for report in (*data["tensors"], data["total"]):
        delta = deltas.get(report["name"], whole)
        weights = base[report["name"]].reshape(-1) if report["name"] in base else flat
        assert report["parameters"] == delta.size
        quantiles = np.quantile(delta, np.arange(11) / 10, method="inverted_cdf")
        np.testing.assert_allclose(report["deciles"], quantiles, rtol=2**-11)
        assert report["deciles"][0] == quantiles[0] and report["deciles"][10] == quantiles[10]
        assert report["zeros"] == np.count_nonzero(delta == 0) / delta.size
        assert {key: share * delta.size for key, share in report["shares"].items()} == pytest.approx(
            {f"{limit:g}": np.count_nonzero(delta < np.float32(limit)) for limit in (0.0002, 0.002, 0.005, 0.01)}
        )
        r = np.linalg.norm(delta.astype(np.float64)) / np.linalg.norm(weights.astype(np.float64))
        assert report["r"] == pytest.approx(r, rel=1e-5)
        assert report["p_max"] == pytest.approx(0.04 / (0.04 + r * r), rel=1e-5)


def test_inspecting_a_model_with_itself_and_with_nan(dare, llamas, tmp_path):
    data = dare("inspect", llamas.path / "base", llamas.path / "base", "--json").data
    assert data["verdict"] == "ok" and "identical" in data["words"]
    assert data["total"]["zeros"] == 1 and data["total"]["r"] == 0 and data["total"]["p_max"] == 1
    model = {name: array.copy() for name, array in llamas.models[0].items()}
    model["lm_head.weight"][0, 0] = np.nan
    families.save(tmp_path / "m0", model)
    result = dare("inspect", llamas.path / "base", tmp_path / "m0")
    assert result.code == 1 and "lm_head.weight" in result.err


# --- the table of methods


def test_methods_lists_the_table_on_one_screen_and_explains_one_by_name(dare):
    text = dare("methods").out
    assert len(text.splitlines()) <= 40
    rows = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(rows) == len(SPARSIFIERS) + len(MERGE_METHODS) and "average is another name for linear" in text
    data = dare("methods", "--json").data
    for key, table in (("sparsifiers", SPARSIFIERS), ("merge_methods", MERGE_METHODS)):
        assert [entry["name"] for entry in data[key]] == list(table)
        for entry in data[key]:
            assert f"  {entry['name']} " in text and "arXiv" in entry["source"] and entry["summary"]
            assert [p["name"] for p in entry["parameters"]] == list(table[entry["name"]].parameters)
            one = " ".join(dare("methods", entry["name"]).out.split())
            assert one.startswith(entry["name"]) and entry["source"] in one and entry["summary"] in one
            assert dare("methods", entry["name"], "--json").data[key] == [entry]
            for parameter in entry["parameters"]:
                assert f"{parameter['name']} {parameter['help']} (" in one and parameter["name"] in text
    assert dare("methods", "average").out.startswith("linear ")
    unknown = dare("methods", "tie")
    assert unknown.code == 2 and "ties" in unknown.err


def test_the_words_of_the_options_are_the_tables():
    kinds = [entry.parameters["rescale"].kind for entry in SPARSIFIERS.values() if "rescale" in entry.parameters]
    assert kinds and all(isinstance(kind, Choice) for kind in kinds)
    assert {kind.of for kind in kinds} == {tuple(word.value for word in options.RescaleName)}
    for words, owner, name in ((options.Scope, Sparsify, "on"), (options.Vocab, Recipe, "vocab")):
        assert [word.value for word in words] == list(get_args(get_type_hints(owner)[name]))


# --- terminals


def test_a_progress_bar_only_on_a_terminal(recipe, tmp_path):
    """A pseudo terminal as standard error gets a bar; a pipe gets nothing but notes."""
    pty = pytest.importorskip("pty")

    command = [sys.executable, "-m", "darekit", "merge", str(recipe())]
    piped = subprocess.run([*command, str(tmp_path / "a")], capture_output=True, text=True, timeout=60)
    assert piped.returncode == 0 and "\x1b" not in piped.stderr + piped.stdout
    assert all(line.startswith("note: ") for line in piped.stderr.splitlines())

    def on_terminal(*more):
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        done = subprocess.Popen(
            [*command, *more], stdout=subprocess.PIPE, stderr=theirs, env=environment, stdin=subprocess.DEVNULL
        )
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux says EIO where the other end is closed
                break
            if not part:
                break
            shown += part
        out = done.communicate(timeout=60)[0]
        os.close(ours)
        assert done.returncode == 0
        return shown.decode(), out.decode()

    shown, out = on_terminal(str(tmp_path / "b"))
    assert "merging" in shown and "\x1b" in shown and "\x1b" not in out
    shown, out = on_terminal(str(tmp_path / "c"), "--json")
    assert "merging" not in shown and json.loads(out)["tensors"]


def test_python_m_works_like_the_command():
    for module in ("darekit", "darekit.cli"):
        done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == dk.__version__


def test_resuming_what_is_complete_says_that_nothing_was_written(dare, llamas, tmp_path):
    arguments = ("drop", llamas.path / "base", llamas.path / "m0", tmp_path / "out", "-p", "0.5")
    assert dare(*arguments).out.startswith(f"Wrote {tmp_path / 'out'}: ")
    done = dare(*arguments, "--resume")
    assert done.code == 0
    assert done.out.startswith(f"{tmp_path / 'out'} is complete: 21 tensors, 23.7 k parameters;")
    assert "0 B" not in done.out and "/s" not in done.out


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_the_peak_of_memory_is_the_programs_own():
    """What a large parent held when it started the program is none of it (as `getrusage` has it)."""
    held = np.ones(30_000_000)  # 240 MB
    command = [sys.executable, "-c", "from darekit.machine import peak_rss; print(peak_rss())"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 1 << 20 < int(done.stdout) < held.nbytes / 2
