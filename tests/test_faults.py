# SPDX-License-Identifier: Apache-2.0
"""Killed, full, changed, contended: nothing that looks finished is left, and what is resumed is the same to the bit."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import darekit as dk
import families
from darekit.engine import execution
from darekit.errors import CheckpointError, DataError, OutputError
from darekit.output.lock import identity
from darekit.output.publishing import OutputFile
from darekit.planning.opening import open_plan
from darekit.recipe import read_recipe

SPARSIFY = {"method": "dare", "drop_rate": 0.7}


def stage_of(out):
    return out.with_name(f".{out.name}.darekit-stage")


def journaled(out):
    lines = (stage_of(out) / "journal.jsonl").read_text().split("\n")[1:]
    return [json.loads(line)["name"] for line in lines if line]


# --- killed


# Imports once, then forks: each child merges with tensors that take a while, and is killed.
DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
from darekit import api
from darekit.checkpoints import OutputFile
from darekit.engine import execution

recipe, work, waits = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
api.merge(recipe, work / "reference", threads=2)

def run(out):
    execution.FLUSH_SECONDS = 0.0
    write = OutputFile.write
    def slow(self, buffer, offset):
        time.sleep(0.05)
        write(self, buffer, offset)
    OutputFile.write = slow
    notes = []
    report = api.merge(recipe, out, threads=2, resume=True, say=notes.append)
    (work / f"{out.name}.json").write_text(json.dumps({"read": report.bytes_read, "notes": notes}))

def killed(out, wait):
    child = os.fork()
    if child == 0:
        try:
            run(out)
        except BaseException as error:
            print("child:", repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + wait
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for i, wait in enumerate(waits):
    out = work / f"out{i // 2}"
    if not out.exists():
        code = killed(out, wait)
        print(json.dumps([out.name, wait, code, out.exists()]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_random_moments(llamas, tmp_path):
    rng = random.Random(0)
    recipe = families.recipe(llamas.path, sparsify=SPARSIFY)
    # Each output is killed at a random moment, and once more while it is resumed.
    waits = [rng.uniform(0, 0.6) for _ in range(30)]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(recipe), str(tmp_path), json.dumps(waits)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(code in (0, -signal.SIGKILL) for _, _, code, _ in runs), done.stdout
    assert sum(code == -signal.SIGKILL for _, _, code, _ in runs) >= 10, "they were killed while they ran"
    reference = families.contents(tmp_path / "reference")
    reference.pop("README.md")  # its title is the directory's name
    last = {name: code for name, _, code, _ in runs}
    reused = 0
    for i in range(len(waits) // 2):
        out = tmp_path / f"out{i}"
        if not out.exists():  # one more run, to the end
            del last[out.name]
            finished = journaled(out) if (stage_of(out) / "journal.jsonl").exists() else []
            report = dk.merge(recipe, out, resume=True, threads=1)
            rest = sum(array.nbytes for name, array in llamas.base.items() if name not in finished)
            assert report.bytes_read == 4 * rest, "finished tensors are not read again, all others once"
            reused += len(finished)
        found = families.contents(out)
        assert f"# out{i}" in found.pop("README.md").decode()
        assert found == reference
        if last.get(out.name) == -signal.SIGKILL and stage_of(out).exists():
            # Killed with the output in its place already: the next run clears what is left.
            dk.merge(recipe, out, overwrite=True, threads=1)
            found = families.contents(out)
            found.pop("README.md")
            assert found == reference
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(f".out{i}.")]
    assert reused > 20, "many tensors were journaled by runs that were killed"


class Stop(Exception):
    pass


@pytest.fixture
def interrupt(monkeypatch, llamas):
    """Run a merge whose writes fail after `after` bytes, with a journal flushed all the time."""

    def run(out, after, recipe=None, **options):
        written = 0
        write = OutputFile.write

        def failing(self, buffer, offset):
            nonlocal written
            if written > after:
                time.sleep(0.3)  # leave the journal time
                raise Stop
            written += buffer.size
            write(self, buffer, offset)

        with monkeypatch.context() as patch:
            patch.setattr(execution, "FLUSH_SECONDS", 0.0)
            patch.setattr(OutputFile, "write", failing)
            with pytest.raises(Stop):
                dk.merge(recipe or families.recipe(llamas.path, sparsify=SPARSIFY), out, threads=1, **options)
        assert not out.exists()
        return journaled(out)

    return run


@pytest.mark.parametrize(
    "keys", [{}, {"merge_method": "ties", "parameters": {"keep": 0.3}},
             {"merge_method": "ties", "parameters": {"keep": 0.3, "trim": "model"}},
             {"rounding": {"method": "stochastic", "seed": 4}, "parameters": {"lambda": 0.3}}]
)  # fmt: skip
def test_resume_redoes_only_what_is_unfinished(llamas, tmp_path, interrupt, keys):
    recipe = families.recipe(llamas.path, sparsify=SPARSIFY, **keys)
    dk.merge(recipe, tmp_path / "whole" / "out")
    finished = interrupt(tmp_path / "out", 20_000, recipe)
    assert 0 < len(finished) < len(llamas.base)
    # Other threads and tiles do not make it another run.
    report = dk.merge(recipe, tmp_path / "out", resume=True, threads=3, tile=64)
    assert f"resuming: {len(finished)} tensors are done" in report.notes
    rest = sum(array.nbytes for name, array in llamas.base.items() if name not in finished)
    assert report.bytes_written == rest
    assert families.contents(tmp_path / "out") == families.contents(tmp_path / "whole" / "out")
    whole = dk.merge(recipe, tmp_path / "again")
    assert report.kept == whole.kept and report.rounding == whole.rounding
    if "rounding" in keys:
        dk.merge(recipe | {"rounding": "nearest"}, tmp_path / "nearest" / "out")
        nearest, drawn = (families.contents(tmp_path / name / "out") for name in ("nearest", "whole"))
        assert nearest["model.safetensors"] != drawn["model.safetensors"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 100)])
def test_a_finished_tensor_whose_file_is_gone_is_merged_again(llamas, tmp_path, interrupt, damage):
    recipe = families.recipe(llamas.path, sparsify=SPARSIFY)
    dk.merge(recipe, tmp_path / "whole" / "out", shard_size=20_000)
    finished = interrupt(tmp_path / "out", 40_000, shard_size=20_000)
    lost = sorted((stage_of(tmp_path / "out") / "files").glob("*.safetensors"))[0]
    damage(lost)
    report = dk.merge(recipe, tmp_path / "out", shard_size=20_000, resume=True)
    said = f"gone or cut short since the unfinished run wrote them: {lost.name}; their tensors are merged again"
    assert said in report.notes
    assert families.contents(tmp_path / "out") == families.contents(tmp_path / "whole" / "out")
    assert report.bytes_written < sum(array.nbytes for array in llamas.base.values()) and finished


def test_a_lost_tensor_stays_lost_when_the_resumed_run_is_killed_too(llamas, tmp_path, interrupt):
    """The file has its size again by then, and is full of zeros."""
    recipe = families.recipe(llamas.path, sparsify=SPARSIFY)
    dk.merge(recipe, tmp_path / "whole" / "out", shard_size=20_000)
    interrupt(tmp_path / "out", 40_000, shard_size=20_000)
    sorted((stage_of(tmp_path / "out") / "files").glob("*.safetensors"))[0].unlink()
    interrupt(tmp_path / "out", 0, shard_size=20_000, resume=True)
    dk.merge(recipe, tmp_path / "out", shard_size=20_000, resume=True)
    assert families.contents(tmp_path / "out") == families.contents(tmp_path / "whole" / "out")


def test_the_stage_has_its_files_before_the_journal_tells_of_them(llamas, tmp_path, monkeypatch):
    from darekit.output import publishing, staging

    events = []
    sync, append = publishing.sync_directory, staging._append

    def synced(path):
        events.append(("names", sorted(found.name for found in path.glob("*.safetensors"))))
        sync(path)

    def appended(path, data):
        events.append(("journal", data.count(b'"record"')))
        append(path, data)

    monkeypatch.setattr(publishing, "sync_directory", synced)
    monkeypatch.setattr(staging, "_append", appended)
    dk.merge(families.recipe(llamas.path), tmp_path / "out")
    kinds = [kind for kind, found in events if kind == "names" or found]
    assert kinds[0] == "names" and "journal" in kinds and ("names", ["model.safetensors"]) in events


def test_without_resume_the_unfinished_run_is_discarded(llamas, tmp_path, interrupt):
    finished = interrupt(tmp_path / "out", 20_000)
    report = dk.merge(families.recipe(llamas.path, sparsify=SPARSIFY), tmp_path / "out")
    assert any(f"{len(finished)} tensors done" in note for note in report.notes)
    assert report.bytes_written == sum(array.nbytes for array in llamas.base.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sparsify": {**SPARSIFY, "drop_rate": 0.8}}, "recipe"),
        ({"sparsify": {**SPARSIFY, "seed": 1}}, "recipe"),
        ({"dtype": "float32"}, "recipe"),
    ],
)
def test_resume_of_another_recipe_is_refused(llamas, tmp_path, interrupt, change, said):
    finished = interrupt(tmp_path / "out", 20_000)
    with pytest.raises(OutputError, match=said) as error:
        dk.merge(families.recipe(llamas.path, **({"sparsify": SPARSIFY} | change)), tmp_path / "out", resume=True)
    assert "cannot be resumed" in str(error.value) and "without --resume" in str(error.value)
    assert journaled(tmp_path / "out") == finished, "nothing of it is lost"


def test_resume_with_another_shard_size_is_refused(llamas, tmp_path, interrupt):
    interrupt(tmp_path / "out", 20_000)
    with pytest.raises(OutputError, match="shards"):
        dk.merge(families.recipe(llamas.path, sparsify=SPARSIFY), tmp_path / "out", resume=True, shard_size=20_000)


def test_resume_after_an_input_changed_names_it(llamas, tmp_path, interrupt):
    for name in ("base", "m0", "m1", "m2"):
        families.copy(llamas.path / name, tmp_path / name)
    recipe = families.recipe(tmp_path, sparsify=SPARSIFY)
    interrupt(tmp_path / "out", 20_000, recipe)
    os.utime(tmp_path / "m1" / "model.safetensors")
    with pytest.raises(OutputError, match="cannot be resumed") as error:
        dk.merge(recipe, tmp_path / "out", resume=True)
    message = str(error.value)
    assert str(tmp_path / "m1") in message and str(tmp_path / "m0") not in message


def test_resume_after_a_change_that_kept_size_and_time_names_the_file(llamas, tmp_path, interrupt):
    for name in ("base", "m0", "m1", "m2"):
        families.copy(llamas.path / name, tmp_path / name)
    recipe = families.recipe(tmp_path, sparsify=SPARSIFY)
    interrupt(tmp_path / "out", 20_000, recipe)
    file = tmp_path / "m1" / "model.safetensors"
    status, raw = file.stat(), bytearray(file.read_bytes())
    raw[-1] ^= 1  # no tensor's first 4096 bytes
    file.write_bytes(raw)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(OutputError, match=r"file 2 \(model\.safetensors\)\.sample: \S+ -> \S+; undo"):
        dk.merge(recipe, tmp_path / "out", resume=True)


def test_resume_on_another_machine_compares_content_and_no_times(llamas, tmp_path, interrupt, monkeypatch):
    for name in ("base", "m0", "m1", "m2"):
        families.copy(llamas.path / name, tmp_path / name)
    recipe = families.recipe(tmp_path, sparsify=SPARSIFY)
    dk.merge(recipe, tmp_path / "whole" / "out")
    finished = interrupt(tmp_path / "out", 20_000, recipe)
    os.utime(tmp_path / "m1" / "model.safetensors")  # copied there, say
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    report = dk.merge(recipe, tmp_path / "out", resume=True)
    assert f"resuming: {len(finished)} tensors are done" in report.notes
    assert families.contents(tmp_path / "out") == families.contents(tmp_path / "whole" / "out")


def test_files_with_one_name_do_not_hide_one_another(llamas):
    with open_plan(read_recipe(families.recipe(llamas.path, k=2))) as plan:
        files = {key: value for key, value in identity(plan, allow_nonfinite=False).items() if key.startswith("file")}
    assert list(files) == [f"file {k} (model.safetensors)" for k in range(3)]
    assert files["file 0 (model.safetensors)"] != files["file 1 (model.safetensors)"]


def test_interrupted_from_the_keyboard(llamas, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(families.recipe(llamas.path, sparsify=SPARSIFY)))
    code = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test that runs in the background inherits none
from darekit import cli
from darekit.checkpoints import OutputFile
write = OutputFile.write
def slow(self, buffer, offset):
    print("writing", flush=True)
    time.sleep(0.2)
    write(self, buffer, offset)
OutputFile.write = slow
sys.argv = ["dare", "merge", *sys.argv[1:]]
cli.main()
"""
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(recipe), str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert run.stdout.readline() == "writing\n"
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in said
    assert "interrupted" in said and "--resume" in said and not (tmp_path / "out").exists()
    dk.merge(recipe, tmp_path / "out", resume=True)
    dk.merge(recipe, tmp_path / "whole" / "out")
    assert families.contents(tmp_path / "out") == families.contents(tmp_path / "whole" / "out")


# --- changed while it runs


@pytest.mark.parametrize("how", ["touched", "replaced", "truncated", "removed"])
def test_an_input_that_changes_during_the_run_is_named(llamas, tmp_path, monkeypatch, how):
    for name in ("base", "m0"):
        families.copy(llamas.path / name, tmp_path / name)
    victim = tmp_path / "m0" / "model.safetensors"
    write, done = OutputFile.write, []

    def meddling(self, buffer, offset):
        if not done:
            done.append(how)
            if how == "touched":
                os.utime(victim)
            elif how == "replaced":
                shutil.copy(victim, tmp_path / "new")
                (tmp_path / "new").replace(victim)
            elif how == "removed":
                victim.unlink()
            else:
                os.truncate(victim, 3000)
        write(self, buffer, offset)

    monkeypatch.setattr(OutputFile, "write", meddling)
    with pytest.raises(CheckpointError) as error:
        dk.merge(families.recipe(tmp_path, k=1, sparsify=SPARSIFY), tmp_path / "out", threads=1)
    assert str(victim) in str(error.value)
    assert ("changed while it was read" if how != "truncated" else "truncated") in str(error.value)
    assert str(stage_of(tmp_path / "out")) in str(error.value)
    assert not (tmp_path / "out").exists()


# --- full


@contextlib.contextmanager
def small_disk(path, kib):
    """Mount a file system of so many KiB; skips where that is not allowed."""
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_disk_too_small_for_the_weights_is_said_at_once(llamas, dare, tmp_path):
    (tmp_path / "r.yaml").write_text(json.dumps(families.recipe(llamas.path, sparsify=SPARSIFY)))
    with small_disk(tmp_path / "disk", 32) as disk:
        result = dare("merge", tmp_path / "r.yaml", disk / "out")
        assert result.code == 1 and "needs" in result.err and "free" in result.err
        assert str(stage_of(disk / "out")) in result.err
        assert not (disk / "out").exists()


def test_a_disk_that_is_full_after_the_weights(llamas, dare, tmp_path):
    """Each size fails at another file; none may be a crash, none may leave an OUT that looks finished."""
    (tmp_path / "r.yaml").write_text(json.dumps(families.recipe(llamas.path, sparsify=SPARSIFY)))
    reference = tmp_path / "reference"
    dk.merge(tmp_path / "r.yaml", reference)
    weights = -(-sum(file.stat().st_size for file in reference.glob("*.safetensors")) // 4096) * 4
    failed = finished = 0
    for more in range(0, 60, 4):
        with small_disk(tmp_path / "disk", weights + more) as disk:
            result = dare("merge", tmp_path / "r.yaml", disk / "out")
            if result.code:
                failed += 1
                said = ("full", "no space left")
                assert result.code == 1 and any(words in result.err.lower() for words in said), result.err
                assert str(disk) in result.err and not (disk / "out").exists()
                continue
            finished += 1
            found, whole = families.contents(disk / "out"), families.contents(reference)
            # The card and other courtesies may be missing, with a warning; what is there is whole.
            assert {"model.safetensors", "config.json", "darekit.lock.json"} <= set(found)
            assert all(found[name] == whole[name] for name in found if name != "README.md")
            if missing := set(whole) - set(found):
                assert missing <= {"README.md", "darekit_recipe.yaml"} and "could not write" in result.err
    assert failed >= 3 and finished >= 3


FILE_LIMIT = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from darekit.cli import main
sys.argv = ["dare", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize("limit", [2_000, 20_000])
def test_a_file_that_may_not_grow(llamas, tmp_path, limit):
    """Without root: a limit on the size of files (here the journal's, and the weights')."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(families.recipe(llamas.path, sparsify=SPARSIFY)))
    done = subprocess.run(
        [sys.executable, "-c", FILE_LIMIT, str(limit), "merge", str(recipe), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "too large" in done.stderr.lower() and str(stage_of(tmp_path / "out")) in done.stderr
    assert not (tmp_path / "out").exists()


# --- OUT


def test_an_existing_out_is_untouched_without_overwrite(llamas, tmp_path):
    recipe = families.recipe(llamas.path, sparsify=SPARSIFY)
    dk.merge(recipe, tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("precious")
    before = families.contents(tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(OutputError, match="--overwrite"):
        dk.merge(families.recipe(llamas.path, sparsify=SPARSIFY | {"seed": 2}), tmp_path / "out")
    assert families.contents(tmp_path / "out") == before
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_all_of_it_when_it_is_complete(llamas, tmp_path, interrupt):
    one = families.recipe(llamas.path, sparsify=SPARSIFY)
    two = families.recipe(llamas.path, sparsify=SPARSIFY | {"seed": 2})
    dk.merge(one, tmp_path / "out", shard_size=20_000)
    before = families.contents(tmp_path / "out")
    spoilt = families.copy(llamas.path / "m0", tmp_path / "m0")
    model = {name: array.copy() for name, array in llamas.models[0].items()}
    model["lm_head.weight"][0, 0] = np.nan
    families.save(spoilt, model, families.config())
    bad = {**two, "models": [str(spoilt)]}
    with pytest.raises(DataError):
        dk.merge(bad, tmp_path / "out", overwrite=True)
    assert families.contents(tmp_path / "out") == before, "a failed run replaces nothing"
    dk.merge(two, tmp_path / "out", overwrite=True)
    dk.merge(two, tmp_path / "fresh" / "out")
    assert families.contents(tmp_path / "out") == families.contents(tmp_path / "fresh" / "out")


def test_an_input_is_never_overwritten(llamas, tmp_path):
    for name in ("base", "m0"):
        families.copy(llamas.path / name, tmp_path / name)
    before = families.contents(tmp_path)
    with pytest.raises(OutputError, match="input"):
        dk.merge(families.recipe(tmp_path, k=1), tmp_path / "m0", overwrite=True)
    assert families.contents(tmp_path) == before


def test_two_runs_on_one_out(llamas, tmp_path, monkeypatch):
    recipe = families.recipe(llamas.path, sparsify=SPARSIFY)
    write, errors = OutputFile.write, []

    def second(self, buffer, offset):
        if not errors:
            errors.append(None)
            with pytest.raises(OutputError) as error:
                dk.merge(recipe, tmp_path / "out")
            errors.append(str(error.value))
        write(self, buffer, offset)

    monkeypatch.setattr(OutputFile, "write", second)
    dk.merge(recipe, tmp_path / "out", threads=1)
    assert "another run" in errors[1] and str(os.getpid()) in errors[1]
    monkeypatch.undo()
    dk.merge(recipe, tmp_path / "alone" / "out")
    assert families.contents(tmp_path / "out") == families.contents(tmp_path / "alone" / "out")


def test_a_courtesy_that_fails_does_not_cost_the_weights(llamas, tmp_path, monkeypatch):
    from darekit.output import publishing

    def fails(**_):
        raise ValueError("no card today")

    monkeypatch.setattr(publishing, "model_card", fails)
    report = dk.merge(families.recipe(llamas.path), tmp_path / "out")
    assert any("no card today" in note for note in report.notes)
    assert families.load(tmp_path / "out") and not (tmp_path / "out" / "README.md").exists()


def test_links_to_weights_are_normal(llamas, tmp_path):
    """As in the Hub's cache."""
    for name in ("base", "m0"):
        (tmp_path / name).mkdir()
        for file in (llamas.path / name).iterdir():
            (tmp_path / name / file.name).symlink_to(file)
    dk.merge(families.recipe(tmp_path, k=1), tmp_path / "out")
    families.same(families.load(tmp_path / "out"), llamas.models[0])
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_unreadable_input(llamas, tmp_path):
    families.copy(llamas.path / "base", tmp_path / "base")
    families.save(tmp_path / "m0", {"w": np.zeros(3, ml_dtypes.bfloat16)})
    file = tmp_path / "m0" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="m0/model"):
        dk.merge(families.recipe(tmp_path, k=1), tmp_path / "out")
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["base", "m0"]


def test_a_refused_resume_says_what_differs(llamas, tmp_path, interrupt):
    interrupt(tmp_path / "out", 20_000)
    changed = families.recipe(llamas.path, sparsify=SPARSIFY | {"seed": 77})
    with pytest.raises(OutputError, match=r"recipe\.sparsify\.seed: \d+ -> 77"):
        dk.merge(changed, tmp_path / "out", resume=True)
