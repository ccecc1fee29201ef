# SPDX-License-Identifier: Apache-2.0
"""An output appears all at once, survives a kill, resumes, and never costs anybody's data."""

import errno
import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from darekit.errors import OutputError
from darekit.output import staging
from darekit.output.staging import FORMAT, open_stage

IDENTITY = {"recipe": {"method": "ties"}, "seed": 42}


def begin(out, *, identity=IDENTITY, times=None, overwrite=False, resume=False, inputs=()):
    return open_stage(out, identity=identity, times=times, overwrite=overwrite, resume=resume, inputs=inputs)


def make_model(path, text, shards=1):
    path.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        (path / f"model-{shard}.safetensors").write_text(text)
    (path / "model.safetensors.index.json").write_text(text)
    (path / "config.json").write_text(text)
    (path / "extra").mkdir(exist_ok=True)
    (path / "extra" / "a.jinja").write_text(text)


def content(path):
    """Every file and its text; the stage of a run that could not rename OUT is not content."""
    return {
        str(file.relative_to(path)): file.read_text()
        for file in sorted(path.rglob("*"))
        if file.is_file() and staging.INSIDE not in file.relative_to(path).parts
    }


def model(text, shards, folder):
    make_model(folder / f"expected-{text}", text, shards)
    return content(folder / f"expected-{text}")


def leave(out, records=("a", "b"), **kwargs):
    """An unfinished run with some tensors journaled."""
    with begin(out, **kwargs) as stage:
        (stage.path / "model.safetensors").write_bytes(b"half")
        for name in records:
            stage.record(name, {"offset": len(name)})
        stage.flush(lambda: None)
    return stage


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_process_forked_meanwhile_does_not_hold_the_output(tmp_path):
    """As a DataLoader's workers do, it has the lock's descriptor for as long as it lives."""
    reads, writes = os.pipe()
    with begin(tmp_path / "out"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
        if not child:
            os.close(writes)
            os.read(reads, 1)
            os._exit(0)
    try:
        with begin(tmp_path / "out", resume=True):
            pass
    finally:
        os.close(writes)
        os.close(reads)
        os.waitpid(child, 0)


# --- the ordinary way


@pytest.mark.parametrize("existing", [False, True])
def test_appears_at_once_and_leaves_nothing_else(tmp_path, existing):
    out = tmp_path / "deep" / "er" / "out"
    if existing:
        out.mkdir(parents=True)
    with begin(out) as stage:
        assert dict(stage.finished) == {} and stage.notes == []
        make_model(stage.path, "new")
        assert not out.exists() or not any(out.iterdir())
        assert stage.path.parent == out.with_name(".out.darekit-stage")
        stage.publish()
    assert content(out) == model("new", 1, tmp_path)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_exception_leaves_out_untouched_and_the_stage_in_place(tmp_path):
    make_model(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="boom"), begin(tmp_path / "out", overwrite=True) as stage:
        make_model(stage.path, "new")
        raise ValueError("boom")
    assert content(tmp_path / "out") == model("old", 1, tmp_path)
    assert stage.path.is_dir()


def test_overwrite_replaces_everything(tmp_path):
    make_model(tmp_path / "out", "old", shards=3)
    with begin(tmp_path / "out", overwrite=True) as stage:
        make_model(stage.path, "new")
        stage.publish()
    assert content(tmp_path / "out") == model("new", 1, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected-new", "out"]


# --- resuming


def test_resume_reads_the_journal(tmp_path):
    leave(tmp_path / "out")
    with begin(tmp_path / "out", resume=True) as stage:
        assert stage.finished == {"a": {"offset": 1}, "b": {"offset": 1}}
        assert (stage.path / "model.safetensors").read_bytes() == b"half"
        assert stage.notes == ["resuming: 2 tensors are done"]
        stage.record("c", {})
        stage.flush(lambda: None)
    with begin(tmp_path / "out", resume=True) as stage:
        assert list(stage.finished) == ["a", "b", "c"]


def test_without_resume_the_unfinished_run_is_discarded_and_said(tmp_path):
    leave(tmp_path / "out")
    with begin(tmp_path / "out") as stage:
        assert stage.finished == {} and not any(stage.path.iterdir())
        assert stage.notes == ["discarded an unfinished run (2 tensors done); --resume would have continued it"]


def test_resume_with_nothing_to_resume_says_so(tmp_path):
    with begin(tmp_path / "out", resume=True) as stage:
        assert stage.notes == [f"no unfinished run of {tmp_path / 'out'} to resume: starting from the beginning"]


def test_resume_of_another_run_names_what_differs(tmp_path):
    leave(tmp_path / "out", identity={"seed": 1, "recipe": "r", "gone": [1]})
    with pytest.raises(OutputError) as caught:
        begin(tmp_path / "out", resume=True, identity={"seed": 2, "recipe": "r", "new": "x" * 500})
    message = str(caught.value)
    assert "seed: 1 -> 2" in message and "gone: [1] -> null" in message and "new: null" in message
    assert "recipe" not in message.split("(")[1].split(")")[0] and "--resume" in message and len(message) < 600
    with begin(tmp_path / "out", resume=True, identity={"seed": 1, "recipe": "r", "gone": (1,)}) as stage:
        assert list(stage.finished) == ["a", "b"], "the refusal must not have cost the stage"


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_torn_last_line_is_redone(tmp_path, cut):
    stage = leave(tmp_path / "out")
    journal = stage.path.parent / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    with begin(tmp_path / "out", resume=True) as stage:
        assert list(stage.finished) == (["a", "b"] if cut == 1 else ["a"])
        stage.record("c", {})
        stage.flush(lambda: None)
    with begin(tmp_path / "out", resume=True) as stage:
        assert list(stage.finished) == (["a", "b", "c"] if cut == 1 else ["a", "c"])


def test_garbage_in_the_journal_is_redone(tmp_path):
    stage = leave(tmp_path / "out")
    journal = stage.path.parent / "journal.jsonl"
    garbage = b'\x00\x00\xff\n[1]\n{"name": 3, "record": {}}\n{"name": "x", "record": 4}\n{"name": "y"}\n'
    garbage += b"[" * 10**5
    journal.write_bytes(journal.read_bytes() + garbage + b'\n{"name": "z", "record": {}}\n')
    with begin(tmp_path / "out", resume=True) as stage:
        assert list(stage.finished) == ["a", "b", "z"]


@pytest.mark.parametrize(
    "header",
    [b"", b"{}\n", b"garbage\n", b'{"format": 3, "identity": {}}\n', b'{"format": "3", "identity": {}, "times": {}}\n'],
)
def test_an_unreadable_header_means_starting_anew(tmp_path, header):
    stage = leave(tmp_path / "out")
    journal = stage.path.parent / "journal.jsonl"
    journal.write_bytes(header + b'{"name": "a", "record": {}}\n')
    with begin(tmp_path / "out", resume=True) as stage:
        assert (
            stage.finished == {} and not any(stage.path.iterdir()) and "starting from the beginning" in stage.notes[0]
        )


@pytest.mark.parametrize(("version", "whose"), [(1, "an earlier"), (FORMAT + 1, "a later")])
def test_a_run_that_another_version_began_is_refused_with_the_reason(tmp_path, version, whose):
    stage = leave(tmp_path / "out")
    journal = stage.path.parent / "journal.jsonl"
    first, *rest = journal.read_bytes().split(b"\n")
    header = json.loads(first) | {"format": version}
    if version == 1:
        del header["times"]
    journal.write_bytes(b"\n".join([json.dumps(header).encode(), *rest]))
    before = content(stage.path.parent)
    said = (
        rf"cannot be resumed, because {whose} version of darekit .* format {version}, .* format {FORMAT}\).*2 finished"
    )
    with pytest.raises(OutputError, match=said):
        begin(tmp_path / "out", resume=True)
    assert content(stage.path.parent) == before, "the refusal must not have cost the stage"
    with begin(tmp_path / "out") as stage:
        assert stage.notes == ["discarded an unfinished run (2 tensors done); --resume would have continued it"]


def test_times_are_compared_on_the_machine_that_knows_them(tmp_path):
    there = {"machine": "here", "changed": {"/base": 1, "/model": 2}}
    leave(tmp_path / "out", times=there)
    with pytest.raises(OutputError, match=r"not the same run \(/model has been written to since\)"):
        begin(tmp_path / "out", times={"machine": "here", "changed": {"/base": 1, "/model": 3}}, resume=True)
    for times in (
        {"machine": "elsewhere", "changed": {"/model": 3}},
        {"machine": "here", "changed": {"/moved": 3}},
        there,
    ):
        with begin(tmp_path / "out", times=times, resume=True) as stage:
            assert list(stage.finished) == ["a", "b"]


def test_the_sync_comes_before_the_journal_and_covers_what_it_promises(tmp_path):
    with begin(tmp_path / "out") as stage:
        journal = stage.path.parent / "journal.jsonl"

        def sync():
            assert b'"first"' not in journal.read_bytes()
            stage.record("during", {})  # written after the sync began: not covered by it

        stage.record("first", {})
        stage.flush(sync)
        assert b'"first"' in journal.read_bytes() and b'"during"' not in journal.read_bytes()
        with pytest.raises(OutputError, match="disk is full"):
            stage.flush(lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        stage.flush(lambda: None)
        assert b'"during"' in journal.read_bytes(), "a failed flush must not forget"


def test_record_and_flush_from_many_threads(tmp_path):
    with begin(tmp_path / "out") as stage:

        def work(start):
            for index in range(start, start + 50):
                stage.record(f"t{index}", {"i": index})
                if index % 10 == 0:
                    stage.flush(lambda: None)

        threads = [threading.Thread(target=work, args=(100 * start,)) for start in range(7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stage.flush(lambda: None)
    with begin(tmp_path / "out", resume=True) as stage:
        assert {record["i"] for record in stage.finished.values()} == {100 * s + i for s in range(7) for i in range(50)}


# --- what is refused


def test_a_second_run_is_refused_with_the_pid(tmp_path):
    code = (
        "import sys; from pathlib import Path; from darekit.output.staging import open_stage\n"
        "try: open_stage(Path(sys.argv[1]), identity={}, overwrite=False, resume=True, inputs=[])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    with begin(tmp_path / "out") as stage:
        run = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=True)
        assert run.stdout.startswith("OutputError") and f"process {os.getpid()}" in run.stdout
        make_model(stage.path, "new")
        stage.publish()
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "other"], capture_output=True, text=True, check=True)
    assert run.stdout == ""


def test_without_flock_a_file_is_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "fcntl", None)
    with begin(tmp_path / "out") as stage:
        with pytest.raises(OutputError, match=r"process \d+.*delete .*lock\.exclusive"):
            begin(tmp_path / "out")
        make_model(stage.path, "new")
        stage.publish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with begin(tmp_path / "two"):
        pass
    with begin(tmp_path / "two", resume=True) as stage:
        assert stage.notes == ["resuming: 0 tensors are done"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        begin(tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "a refusal leaves no stage"


def test_an_existing_output_is_refused_and_an_unfinished_run_kept(tmp_path):
    leave(tmp_path / "out")
    make_model(tmp_path / "out", "old")
    with pytest.raises(OutputError, match=r"not empty .*--overwrite"):
        begin(tmp_path / "out")
    with begin(tmp_path / "out", resume=True, overwrite=True) as stage:
        assert list(stage.finished) == ["a", "b"]


def test_out_filled_by_somebody_else_during_the_run_is_kept(tmp_path):
    with begin(tmp_path / "out") as stage:
        make_model(stage.path, "new")
        make_model(tmp_path / "out", "other")
        with pytest.raises(OutputError, match=r"not empty.*complete files are in .*darekit-stage"):
            stage.publish()
    assert content(tmp_path / "out") == model("other", 1, tmp_path)
    assert content(stage.path) == model("new", 1, tmp_path)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["thesis.tex", "a.py"], "does not look like a model"),
        (["config.json", ".git/HEAD"], "git repository"),
        (["config.json", "checkpoint-500/model.safetensors"], "another model in checkpoint-500/"),
    ],
)
def test_overwrite_refuses_what_is_more_than_a_model(tmp_path, names, reason):
    for name in names:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(OutputError, match=reason):
        begin(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == dict.fromkeys(sorted(names), "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "darekit.lock.json"])
def test_overwrite_knows_a_model(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("old")
    with begin(tmp_path / "out", overwrite=True) as stage:
        stage.publish()
    assert content(tmp_path / "out") == {}


def test_overwrite_refuses_inputs_and_places_of_the_user(tmp_path, monkeypatch):
    out = tmp_path / "out"
    make_model(out, "old")
    make_model(out / "extra" / "base", "old")  # two levels down: not found by the look for nested models
    with pytest.raises(OutputError, match="holds the input"):
        begin(out, overwrite=True, inputs=[out])
    with pytest.raises(OutputError, match="holds the input"):
        begin(out, overwrite=True, inputs=[tmp_path / "else", out / "extra" / "base"])
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(OutputError, match="holds the input"):
        begin(out, overwrite=True, inputs=[tmp_path / "link"])
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "model.safetensors").symlink_to(out / "model-0.safetensors")
    with pytest.raises(OutputError, match="an input"):
        begin(out, overwrite=True, inputs=[cache])
    with monkeypatch.context() as patch:
        patch.chdir(out / "extra")
        with pytest.raises(OutputError, match="current directory"):
            begin(Path(".."), overwrite=True)
    monkeypatch.setenv("HOME", str(out / "extra"))
    with pytest.raises(OutputError, match="home directory"):
        begin(out, overwrite=True)
    with pytest.raises(OutputError, match="root of a file system"):
        begin(Path("/"), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "link", "out"]


def test_an_empty_current_directory_is_not_renamed_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="current directory"):
        begin(Path())


def test_a_linked_out_means_its_target(tmp_path):
    make_model(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    with begin(tmp_path / "link", overwrite=True) as stage:
        make_model(stage.path, "new")
        stage.publish()
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "real") == model("new", 1, tmp_path)


def test_links_in_a_replaced_output_are_not_followed(tmp_path):
    make_model(tmp_path / "precious", "mine")
    make_model(tmp_path / "out", "old")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "precious" / "extra")
    with begin(tmp_path / "out", overwrite=True) as stage:
        stage.publish()
    assert content(tmp_path / "precious") == model("mine", 1, tmp_path)


def test_a_linked_stage_is_refused(tmp_path):
    make_model(tmp_path / "precious", "mine")
    (tmp_path / ".out.darekit-stage").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="symbolic link"):
        begin(tmp_path / "out")
    assert content(tmp_path / "precious") == model("mine", 1, tmp_path)


def test_a_parent_that_is_a_file_is_a_named_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot write beside"):
        begin(tmp_path / "file" / "out")


# --- an OUT that cannot be renamed


@pytest.fixture(params=["mount", "parent"])
def fixed(request, tmp_path, monkeypatch):
    """OUT is a mount point, or its parent cannot be written."""
    out = tmp_path / "out"
    if request.param == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    else:
        allowed = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and allowed(path, mode))
    out.mkdir()
    (out / "lost+found").mkdir()
    return out


def test_fixed_out_is_filled_file_by_file(fixed, monkeypatch):
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    with begin(fixed) as stage:
        assert stage.path.is_relative_to(fixed)
        make_model(stage.path, "new", shards=2)
        stage.publish()
    assert moved[:2] == ["model-0.safetensors", "model-1.safetensors"]
    assert moved[-2:] == ["model.safetensors.index.json", "config.json"]
    assert sorted(path.name for path in fixed.parent.iterdir()) == ["out"]
    assert staging.INSIDE not in {path.name for path in fixed.iterdir()}
    assert (fixed / "lost+found").is_dir()


def test_fixed_out_resumes_and_replaces(fixed, tmp_path):
    make_model(fixed, "old", shards=3)
    with pytest.raises(OutputError, match="not empty"):
        begin(fixed)
    leave(fixed, overwrite=True)
    assert content(fixed) == model("old", 3, tmp_path)
    with begin(fixed, overwrite=True, resume=True) as stage:
        assert list(stage.finished) == ["a", "b"]
        (stage.path / "model.safetensors").unlink()
        make_model(stage.path, "new")
        stage.publish()
    assert content(fixed) == model("new", 1, tmp_path)
    assert (fixed / "lost+found").is_dir()


# --- killed at any step

CHILD = """
import json, os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_staging import begin, make_model, staging
out, steps, mount = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "mount"
if mount:
    os.path.ismount = lambda path: Path(path) == out
left = None
def counted(function):
    def call(*args, **kwargs):
        global left
        if left is not None:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
for name in ("rename", "replace", "unlink", "rmdir", "fsync", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))
with begin(out, overwrite=True) as stage:
    make_model(stage.path, "new", shards=2)
    stage.record("w", {{}})
    stage.flush(lambda: None)
    left = steps
    stage.publish()
os._exit(0)
"""


def publish_and_die(out, steps, mode):
    """Whether the run was killed: at its `steps`-th call of the file system while it published.

    A fork, not a new interpreter: some hundred of them must fit into a test.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pytest-xdist has a thread; the child does not need it
        pid = os.fork()
    if pid == 0:
        sys.argv = ["child", str(out), str(steps), mode]
        try:
            exec(CHILD.format(tests=str(Path(__file__).parent)), {"__name__": "child"})
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, 9), "the child failed by itself"
    return status == 9


@pytest.mark.parametrize("had_old", [False, True])
@pytest.mark.parametrize("mode", ["sibling", "mount"])
def test_killed_anywhere_in_publish(tmp_path, mode, had_old, monkeypatch):
    old, new = model("old", 3, tmp_path), model("new", 2, tmp_path)
    killed, seen = True, set()
    steps = 0
    while killed:
        out = tmp_path / f"run{steps}" / "out"
        out.mkdir(parents=True)
        if had_old:
            make_model(out, "old", shards=3)
        killed = publish_and_die(out, steps, mode)
        if killed and out.is_dir() and (out / "config.json").exists():
            assert content(out) in (old, new), "what looks finished is"
        if mode == "mount":
            monkeypatch.setattr(os.path, "ismount", lambda path, out=out: Path(path) == out)
        try:
            begin(out, overwrite=had_old, resume=True).__exit__(None, None, None)
        except OutputError as error:  # the new output is there, and the next run has no --overwrite
            assert not had_old and "not empty" in str(error)
        after = content(out) if out.exists() else {}
        assert after in ([old, new] if had_old else [{}, new])
        seen.add(json.dumps(after))
        if killed and after != new:
            # Not there yet: all of it is still in the stage, and known to be.
            with begin(out, overwrite=had_old, resume=True) as stage:
                assert content(stage.path) == new and list(stage.finished) == ["w"]
        # Garbage of the killed run is gone with the next published one.
        if mode == "sibling":
            with begin(out, overwrite=True) as stage:
                make_model(stage.path, "next")
                stage.publish()
            assert [path.name for path in out.parent.iterdir()] == ["out"], steps
        steps += 1
    assert len(seen) == 2 and steps > 15


def test_a_kill_between_the_two_renames_is_told(tmp_path):
    out = tmp_path / "out"
    make_model(out, "old")
    with begin(out, overwrite=True) as stage:
        make_model(stage.path, "new")
    out.rename(tmp_path / ".out.darekit-old")
    out.mkdir()  # somebody looked for it; an empty directory is no output
    with begin(out, overwrite=True, resume=True) as stage:
        assert "put the old output back" in stage.notes[0]
        assert content(out) == model("old", 1, tmp_path)


def test_an_out_made_by_somebody_else_after_such_a_kill_is_not_guessed_about(tmp_path):
    out = tmp_path / "out"
    leave(out)
    make_model(tmp_path / ".out.darekit-old", "old")
    make_model(out, "other")
    with pytest.raises(OutputError, match="remove or rename one"):
        begin(out, overwrite=True)
    assert content(out) == model("other", 1, tmp_path)
    assert content(tmp_path / ".out.darekit-old") == model("old", 1, tmp_path)


def test_a_failed_second_rename_puts_the_old_output_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    make_model(out, "old")
    rename = os.rename

    def failing(source, target):
        if Path(source).name == "files":
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))
        rename(source, target)

    with begin(out, overwrite=True) as stage:
        make_model(stage.path, "new")
        monkeypatch.setattr(os, "rename", failing)
        with pytest.raises(OutputError, match=r"another file system.*complete files are in"):
            stage.publish()
    assert content(out) == model("old", 1, tmp_path) and content(stage.path) == model("new", 1, tmp_path)
