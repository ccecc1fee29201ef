# SPDX-License-Identifier: Apache-2.0
"""Work on a Ray cluster: a real one of several processes on this machine, which nothing else can reach."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

import darekit as dk
from darekit.cli import spelled_out
from darekit.errors import PlanError, Unsupported
from darekit.pools import clusters
from darekit.pools.clusters import Cluster, cluster_of, open_pool
from darekit.pools.processes import Lost

TESTS = str(Path(__file__).parent)


def test_without_ray_the_error_says_what_to_install(monkeypatch, tmp_path, dare):
    monkeypatch.setattr(clusters, "find_spec", lambda name: None)
    with (
        pytest.raises(Unsupported, match=r"pip install 'darekit\[ray\]', or use --jobs N"),
        open_pool(int, 1, Cluster()),
    ):
        pass
    (tmp_path / "s.yaml").write_text(json.dumps({
        "recipe": {"base_model": "b", "models": ["m"], "merge_method": "task_arithmetic"},
        "space": {"parameters.lambda": {"low": 0, "high": 1}}, "validation": {"a": {"data": "a.jsonl"}},
    }))  # fmt: skip
    for command in (["search", tmp_path / "s.yaml", "--ray"], ["eval", "m", "--data", "a.jsonl", "--ray"]):
        done = dare(*command)
        assert done.code == 1 and "pip install 'darekit[ray]'" in done.err, done.err


def test_what_callers_say_is_a_cluster_or_none():
    assert cluster_of(None, None, 3) is None and cluster_of(False, 1, 3) is None
    assert cluster_of(True, 0.5, 3) == cluster_of("auto", 0.5, 3) == Cluster(None, 0.5, 3)
    assert cluster_of("head:6379", None, None) == Cluster("head:6379")


def test_ray_has_an_address_or_none_on_the_command_line():
    assert spelled_out(["search", "s.yaml", "--ray"]) == ["search", "s.yaml", "--ray", "auto"]
    assert spelled_out(["--ray", "--jobs", "2"]) == ["--ray", "auto", "--jobs", "2"]
    for address in ("auto", "local", "10.0.0.1:6379", "ray://head:10001"):
        assert spelled_out(["--ray", address]) == ["--ray", address]
    assert spelled_out(["--ray=head:1"]) == ["--ray=head:1"]


# --- on a cluster


class Worker:
    """Work that can be killed: a task that is a path kills its process, the first time or always."""

    def __call__(self, task):
        if isinstance(task, tuple):
            path, always = task
            if always or not Path(path).exists():
                Path(path).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return "survived"
        time.sleep(0.05)
        return task * task, os.getpid(), str(Path.cwd())


@pytest.fixture
def cluster(monkeypatch):
    """A cluster is started here by whoever asks for one, and knows the tests' modules."""
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_DISABLE_MEMORY_MONITOR", "1")


@pytest.mark.check
def test_actors_share_work_and_a_killed_one_is_replaced(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_pool(Worker, 1, Cluster(workers=3)) as pool:
        assert pool.size == 3
        found = dict(pool.run([*range(12)]))
        assert {at: one[0] for at, one in found.items()} == {i: i * i for i in range(12)}
        assert len({one[1] for one in found.values()}) == 3 and os.getpid() not in {one[1] for one in found.values()}
        assert {one[2] for one in found.values()} == {str(tmp_path)}
        once, always = str(tmp_path / "once"), str(tmp_path / "always")
        found = dict(pool.run([1, (once, False), 2, (always, True), 3]))
        assert [found[i][0] for i in (0, 2, 4)] == [1, 4, 9] and found[1] == "survived"
        assert isinstance(found[3], Lost) and "died" in found[3].why
        assert {at: one[0] for at, one in pool.run([5, 6])} == {0: 25, 1: 36}  # and it goes on
        too_many = pytest.raises(PlanError, match="8 GPUs for each worker, but the cluster has 0")
        with too_many, open_pool(Worker, 1, Cluster(gpus=8)):
            pass


def test_a_cluster_that_is_not_there_is_an_error(cluster):
    began = time.monotonic()
    with (
        pytest.raises(PlanError, match=r"the Ray cluster at 127.0.0.1:1 cannot be reached.*ray start --head"),
        open_pool(Worker, 1, Cluster("127.0.0.1:1")),
    ):
        pass
    assert time.monotonic() - began < 30  # Ray itself waits for minutes


@pytest.mark.check
def test_a_search_is_the_same_with_one_worker_and_with_three_on_ray(cluster, llamas, tmp_path, monkeypatch):
    from darekit.searches import running
    from darekit.searches.reading import read_search
    from test_search_runs import Fake, _itself, trials

    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.py").write_text("def score(live):\n    return 1.0\n")
    judge = {"a": {"python": "judge.py:score"}, "b": {"python": "judge.py:score"}}
    data = {
        "recipe": {
            "base_model": str(llamas.path / "base"), "models": [str(llamas.path / f"m{i}") for i in range(2)],
            "merge_method": "task_arithmetic",
        },
        "space": {"parameters.lambda": {"low": 0, "high": 1.5}}, "validation": judge, "test": judge,
        "choose": "a", "round": 3, "trials": 12,
    }  # fmt: skip
    found = {}
    for name, jobs, there in (("one", 1, None), ("three", 1, Cluster(workers=3)), ("single", 1, Cluster(workers=1))):
        fake = Fake(kill=str(tmp_path / "killed") if name == "three" else None)
        running.run(
            read_search(data), tmp_path / name, make=lambda whole, fake=fake: partial(_itself, fake),
            pool=lambda work, jobs=jobs, there=there: open_pool(work, jobs, there),
        )  # fmt: skip
        lines = (
            (one["trial"], one["params"], one["state"], one["scores"], one["rungs"]) for one in trials(tmp_path / name)
        )
        found[name] = sorted(lines, key=lambda one: one[0])
    assert found["one"] == found["three"] == found["single"] and len(found["one"]) == 12
    assert (tmp_path / "killed").exists()  # a worker among the three was killed, and nothing was lost


@pytest.mark.check
@pytest.mark.parametrize("real", ["llama"], indirect=True)
def test_searches_sweeps_and_evaluations_run_on_ray(cluster, real, tmp_path, monkeypatch, dare):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    for name in ("base", "m0", "m1"):
        (tmp_path / name).symlink_to(real.path / name)
    rows = [{"prompt": f"w{3 + i} w{4 + i} ", "completion": f"w{5 + i}"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"base_model": "base", "models": ["m0", "m1"], "merge_method": "task_arithmetic"}
    judges = {"validation": {"j": {"data": "rows.jsonl"}}, "test": {"j": {"data": "rows.jsonl"}}, "choose": "j/loss"}
    search = {"recipe": recipe, "space": {"parameters.lambda": {"low": 0, "high": 2}}, "round": 2, **judges}
    (tmp_path / "s.yaml").write_text(json.dumps(search))
    (tmp_path / "w.yaml").write_text(json.dumps({"recipe": recipe, "axes": {"parameters.lambda": [0.5, 1]}, **judges}))
    on = ("--ray", "--jobs", 2)
    done = dare("search", "s.yaml", "on", "--trials", 4, "--json", *on)
    assert done.code == 0, done.err
    here = dk.search(search, "here", trials=4, device="cpu")
    assert done.data["best"]["validation"] == here.summary["best"]["validation"]
    assert dare("sweep", "w.yaml", "--no-plots", *on).code == 0
    cells = [json.loads(line) for line in (tmp_path / "w" / "cells.jsonl").read_text().splitlines()]
    assert len(cells) == 5 and all(cell["status"] == "ok" for cell in cells)
    table = dare("eval", "base", "m0", "m1", "--data", "rows.jsonl", "--json", *on).data
    alone = dk.evaluate(["base", "m0", "m1"], data="rows.jsonl", device="cpu")
    assert [one["scores"]["loss"]["value"] for one in table["evaluations"]] == pytest.approx(
        [score.value for score in alone.row("loss")], rel=1e-5
    )
