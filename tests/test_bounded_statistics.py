# SPDX-License-Identifier: Apache-2.0
"""Statistics in bounded memory: the file does not depend on the bound, and what was finished outlives every fault."""

import errno
import gc
import itertools
import math
import os
import signal
import weakref

import numpy as np
import pytest

import darekit as dk
import families
from darekit.errors import DataError, OutputError, PlanError
from darekit.inputs.statistics import open_statistics
from darekit.methods.informed import NormalEquations
from darekit.statistics.budget import ITEM, bytes_of_sums, grouped
from test_statistics_merges import data_of

torch = pytest.importorskip("torch")

KINDS = ["fisher", "gram"]
DECODER = pytest.mark.parametrize("real", ["llama"], indirect=True)  # what does not depend on the architecture


def make(kind, model, data, out, **options):
    options |= {"batch_size": 2} if kind == "gram" else {}
    return dk.make_statistics(kind, model, data, out, device="cpu", **options)


def killed(kind, model, data, out, when, **options):
    """A child that makes statistics, and is killed when `when` says so of what is done."""
    import torch

    if kind == "fisher" and torch.cuda.is_available():
        pytest.skip("torch's autograd does not survive a fork where there is a GPU")
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # its pool is made anew after a fork, and not by two threads at once: that fails

            def die(done, total):
                if when(done):
                    os.kill(os.getpid(), signal.SIGKILL)

            make(kind, model, data, out, progress=die, **options)
        finally:
            os._exit(7)  # it was not killed, and pytest must not go on in here
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.fixture
def data(real, tmp_path):
    return data_of(tmp_path, real.kind)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def whole(kind, real, data, tmp_path):
    """The file of one pass, its report, and the bytes of its largest tensor."""
    report = make(kind, real.path / "m0", data, tmp_path / "whole.safetensors", memory=1 << 30)
    assert report.passes == 1
    largest = max(values.nbytes for values in families.load_file(tmp_path / "whole.safetensors").values())
    return (tmp_path / "whole.safetensors").read_bytes(), report, largest


def hidden(path):
    return sorted(p.name for p in path.glob(".*"))


@pytest.mark.parametrize("memory", [0, 3, 10, 40, 100, 1000])
def test_groups_are_neighbours_that_fit(memory):
    shapes = {"a": (2,), "b": (1,), "c": (), "d": (3, 5), "e": (0,), "f": (2, 2), "g": (1,)}
    groups = grouped(shapes, memory)
    assert [pair for group in groups for pair in group.items()] == list(shapes.items())
    assert all(bytes_of_sums(group) <= memory or len(group.keys() - {"e"}) == 1 for group in groups)
    for group, behind in itertools.pairwise(groups):  # nothing more would have fitted
        assert bytes_of_sums(group) + ITEM * math.prod(next(iter(behind.values()))) > memory
    assert grouped({}, memory) == []


def test_the_file_does_not_depend_on_the_bound(kind, real, data, whole, tmp_path):
    expected, report, largest = whole
    passes = []
    for memory in (largest, 2 * largest, report.sums_bytes - 1):
        said, seen = [], []
        out = tmp_path / f"{memory}.safetensors"
        bounded = make(
            kind,
            real.path / "m0",
            data,
            out,
            memory=memory,
            say=said.append,
            progress=lambda *done, seen=seen: seen.append(done),
        )
        assert out.read_bytes() == expected
        assert bounded.sums_bytes <= memory == bounded.memory
        assert any(f"{bounded.passes} passes over the data" in line for line in said)
        assert seen == sorted(seen) and seen[-1] == (5 * bounded.passes,) * 2 and len({total for _, total in seen}) == 1
        passes.append(bounded.passes)
    assert passes[0] > passes[1] >= passes[2] > 1
    assert hidden(tmp_path) == []


@DECODER
def test_another_reader_of_safetensors_reads_the_padded_header(kind, whole, tmp_path):
    from safetensors.numpy import load_file

    ours, theirs = families.load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "whole.safetensors")
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[name], values) for name, values in theirs.items())


def test_a_shared_input_is_stored_once(real, data, whole, kind, tmp_path):
    """The file holds the tensors, its header, and nothing else."""
    raw, _, _ = whole
    stored = families.load_file(tmp_path / "whole.safetensors")
    assert len(raw) == 8 + int.from_bytes(raw[:8], "little") + sum(values.nbytes for values in stored.values())
    opened = open_statistics(tmp_path / "whole.safetensors")
    opened.close()
    if kind == "gram" and real.kind == "llama":
        layer = "model.layers.1."
        assert {opened.tensors[f"{layer}self_attn.{n}_proj.weight"].name for n in "qkv"} == {
            f"{layer}self_attn.q_proj.weight"
        }
        assert {opened.tensors[f"{layer}mlp.{n}_proj.weight"].name for n in ("gate", "up")} == {
            f"{layer}mlp.gate_proj.weight"
        }
        assert len(stored) == 2 * 4 + 1 and len(opened.tensors) == 2 * 7 + 1


@DECODER
def test_layers_behind_the_group_do_not_run(real, data, whole, kind, tmp_path, monkeypatch):
    """A Gram needs no more of the model than what comes before its layer; a Fisher no gradient of what comes before."""
    from darekit.statistics.passes import FisherPass, GramPass

    if kind == "gram":
        cls, ran = GramPass, []
        seen = GramPass.see

        def see(self, batch, first):
            last = list(self.live.model.modules())[-1]
            with torch.no_grad():
                handle = last.register_forward_hook(lambda *_: ran.append(first))
            before = len(ran)
            seen(self, batch, first)
            handle.remove()
            last_of_all = [name for name in self.layers if self.owners.get(name) == name][-1]
            counts.append((bool(self._group) and last_of_all not in self._group, len(ran) > before))

        counts = []
        monkeypatch.setattr(cls, "see", see)
        make(kind, real.path / "m0", data, tmp_path / "out.safetensors", memory=whole[2])
        assert {early for early, _ in counts} == {False, True}
        assert all(ran != early for early, ran in counts)
    else:
        began = FisherPass.begin

        def begin(self, names):
            began(self, names)
            wanted = {name for name, [(tensor, _)] in self.wanted.items() if tensor.requires_grad}
            assert wanted == set(names)

        monkeypatch.setattr(FisherPass, "begin", begin)
        make(kind, real.path / "m0", data, tmp_path / "out.safetensors", memory=whole[2])


@DECODER
def test_killed_in_the_second_group_and_resumed(kind, real, data, whole, tmp_path, monkeypatch):
    """By a signal that nothing can catch; then with other memory too."""
    from darekit.statistics import running

    expected, _, largest = whole
    monkeypatch.setattr(running, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(running, "SAVE_SHARE", 0)
    for number, memory in enumerate((2 * largest, largest)):
        out = tmp_path / f"out{number}.safetensors"
        killed(kind, real.path / "m0", data, out, lambda done: done >= 5 + 3, memory=2 * largest)
        assert not out.exists() and len(hidden(tmp_path)) == 2
        said, seen = [], []
        make(
            kind, real.path / "m0", data, out, memory=memory, resume=True, say=said.append,
            progress=lambda done, _, seen=seen: seen.append(done),
        )  # fmt: skip
        assert said[0].startswith("continuing in pass 2, after ") and seen[0] >= 5, said
        assert out.read_bytes() == expected
        assert hidden(tmp_path) == []


@DECODER
def test_killed_before_anything_was_saved(kind, real, data, whole, tmp_path):
    out = tmp_path / "out.safetensors"
    killed(kind, real.path / "m0", data, out, lambda done: True)
    said = []
    make(kind, real.path / "m0", data, out, resume=True, say=said.append)
    assert said[0].startswith("no unfinished run of") and out.read_bytes() == whole[0]
    assert hidden(tmp_path) == []


@DECODER
def test_memory_that_holds_not_even_the_largest(kind, real, data, whole, tmp_path, dare):
    message = rf"--memory of {whole[2] - 1:,} bytes is too little: the sums of .* alone take {whole[2]:,}"
    with pytest.raises(PlanError, match=message):
        make(kind, real.path / "m0", data, tmp_path / "out.safetensors", memory=whole[2] - 1)
    assert hidden(tmp_path) == [] and not (tmp_path / "out.safetensors").exists()


@DECODER
def test_out_of_memory_in_the_second_group(kind, real, data, whole, tmp_path, monkeypatch):
    """The message says which option helps and what was kept; with that option the run goes on to the same bytes."""
    from darekit.statistics.passes import FisherPass, GramPass

    cls = FisherPass if kind == "fisher" else GramPass
    began, groups = cls.begin, []

    def begin(self, names):
        groups.append(names)
        if len([group for group in groups if group]) == 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: ...")
        began(self, names)

    out = tmp_path / "out.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(cls, "begin", begin)
        with pytest.raises(
            DataError, match=r"out of memory while making .*a smaller --memory .*Kept for --resume: 1 of \d passes"
        ):
            make(kind, real.path / "m0", data, out, memory=2 * whole[2])
    report = make(kind, real.path / "m0", data, out, memory=whole[2], resume=True)
    assert out.read_bytes() == whole[0] and report.passes >= 2


@DECODER
def test_a_full_disk(kind, real, data, whole, tmp_path, monkeypatch):
    from darekit.checkpoints import files
    from darekit.statistics import running

    expected, _, largest = whole
    out = tmp_path / "out.safetensors"
    with monkeypatch.context() as patch:  # known beforehand: no pass begins
        patch.setattr(files, "_free", lambda path: len(expected) // 2)
        patch.setattr(running._Run, "_see_all", None)
        with pytest.raises(OutputError, match=r"needs [\d,]+ bytes, [\d,]+ are free on its disk: no space left"):
            make(kind, real.path / "m0", data, out)
    assert hidden(tmp_path) == []
    room, write = 6 * len(expected) // 10, os.pwrite

    def pwrite(fd, view, offset):
        nonlocal room
        room -= len(view)
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, view, offset)

    with monkeypatch.context() as patch:  # filled by others while the passes run
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OutputError, match=r"no space left.*Kept for --resume: \d+ of \d+ passes"):
            make(kind, real.path / "m0", data, out, memory=largest)
    assert not out.exists()
    make(kind, real.path / "m0", data, out, resume=True)
    assert out.read_bytes() == expected and hidden(tmp_path) == []


@DECODER
def test_a_pass_goes_on_where_it_cannot_be_saved(kind, real, data, whole, tmp_path, monkeypatch):
    from darekit.statistics import running, staging

    monkeypatch.setattr(running, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(running, "SAVE_SHARE", 0)
    saved, said = staging.Stage.save, []

    def save(self, shapes, values, facts):
        if shapes:
            raise OutputError("no room")
        saved(self, shapes, values, facts)

    monkeypatch.setattr(staging.Stage, "save", save)
    out = tmp_path / "out.safetensors"
    make(kind, real.path / "m0", data, out, memory=2 * whole[2], say=said.append)
    assert out.read_bytes() == whole[0]
    assert [line for line in said if "could not be saved" in line] == [
        "progress in this pass could not be saved; continuing: no room"
    ]


@DECODER
def test_a_stage_that_is_gone(kind, real, data, whole, tmp_path):
    out = tmp_path / "out.safetensors"

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(kind, real.path / "m0", data, out, memory=2 * whole[2], progress=stop)
    stage = tmp_path / ".out.safetensors.darekit-stage"
    raw = stage.read_bytes()
    stage.write_bytes(raw[:-4])
    with pytest.raises(OutputError, match=r"has [\d,]+ bytes, expected [\d,]+ bytes; run without --resume"):
        make(kind, real.path / "m0", data, out, resume=True)
    stage.unlink()
    with pytest.raises(OutputError, match=r"is gone, expected [\d,]+ bytes; run without --resume"):
        make(kind, real.path / "m0", data, out, resume=True)
    stage.write_bytes(raw)
    make(kind, real.path / "m0", data, out, resume=True)
    assert out.read_bytes() == whole[0]


@DECODER
def test_not_finite_in_the_second_group(kind, real, data, whole, tmp_path):
    """A weight that no longer is a number; what was finished before stays, and the message says so."""
    from darekit.statistics import passes

    cls = passes.FisherPass if kind == "fisher" else passes.GramPass
    seen = cls.see
    out = tmp_path / "out.safetensors"
    with pytest.MonkeyPatch.context() as patch:

        def see(self, batch, first):
            if run["passes"] and first >= 2:
                with torch.no_grad():
                    next(iter(self.live.model.parameters())).fill_(math.nan)
            seen(self, batch, first)

        run = {"passes": 0}

        def progress(done, total):
            run["passes"] = done // 5

        patch.setattr(cls, "see", see)
        with pytest.raises(DataError, match=r"jsonl:.*(NaN|nan).* Kept for --resume: 1 of \d+ passes"):
            make(kind, real.path / "m0", data, out, memory=2 * whole[2], progress=progress)
    make(kind, real.path / "m0", data, out, resume=True)
    assert out.read_bytes() == whole[0]


@DECODER
def test_the_command_says_what_it_took(kind, real, data, whole, tmp_path, dare):
    out = tmp_path / "out.safetensors"
    common = ("stats", kind, real.path / "m0", "--data", data, "--out", out, "--overwrite", "--device", "cpu")
    done = dare(*common)
    assert done.code == 0 and "1 pass over the data, with" in done.out and "(--memory " in done.out
    done = dare(*common, "--memory", f"{whole[2]}B")
    assert done.code == 0 and "passes over the data, with" in done.out and "of sums in memory (--memory " in done.out
    assert "may be in memory (--memory)" in done.err
    found = dare(*common, "--memory", f"{whole[2]}B", "--json").data
    assert found["passes"] > 1 and found["memory"] == whole[2] == found["sums_bytes"]
    done = dare(*common, "--memory", "much")
    assert done.code == 2 and "'much' is not a size" in done.err and "--memory" in done.err


def test_a_merge_holds_the_matrices_of_one_layer_for_each_thread(monkeypatch):
    """Without Python's collector of cycles, which counts objects and not their bytes: it let a merge of 128 layers of
    1024 inputs grow to 2.4 GB, where 0.2 GB do."""
    rng = np.random.default_rng(0)
    names = [f"layer.{i}.weight" for i in range(12)]
    models = [{name: rng.normal(size=(3, 8)) for name in names} for _ in range(2)]
    grams = [{name: np.cov(rng.normal(size=(8, 30))) for name in names} for _ in range(2)]
    made, alive = [], []
    of = NormalEquations.of

    def counted(*arguments, **options):
        alive.append(sum(one() is not None for one in made))
        equations = of(*arguments, **options)
        made.append(weakref.ref(equations))
        return equations

    monkeypatch.setattr(NormalEquations, "of", staticmethod(counted))
    gc.disable()
    try:
        dk.merge_tensors(None, models, method=dk.regmean(), statistics=grams, threads=1)
    finally:
        gc.enable()
    assert len(made) == len(names) and max(alive) <= 1
