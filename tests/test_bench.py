# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks measure a command: seconds, written bytes and memory are the command's own."""

import sys

import pytest

import adapters
import run as bench
from costs import Cost, cost_of, mergekit

WRITES = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[2])
(out / "part").mkdir(parents=True)
(out / "one").write_bytes(bytes(1000))
(out / "part" / "two").write_bytes(bytes(500))
held = b"1" * (100 << 20)
time.sleep(0.05)
"""


def test_a_command_costs_what_it_writes_and_holds(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_bytes(bytes(7))
    cost = cost_of([sys.executable, "-c", WRITES, "recipe", str(out)], out)
    assert cost.seconds >= 0.05 and cost.written == 1500 and cost.memory >= 100 << 20
    assert not (out / "old").exists()


def test_costs_add_up_and_memory_is_the_largest():
    both = Cost()
    both.add(Cost(1.0, 10, 5))
    both.add(Cost(2.0, 20, 3))
    assert both == Cost(3.0, 30, 5)


def test_a_command_that_fails_stops_the_benchmark_with_what_it_said(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)-c .* failed:\n.*no such recipe"):
        cost_of([sys.executable, "-c", "raise ValueError('no such recipe')"], tmp_path / "out")


def test_both_benchmarks_run_mergekit_the_same_way(tmp_path):
    assert bench.mergekit is adapters.mergekit is mergekit
    program = tmp_path / "mergekit-yaml"
    program.write_text(f"#!{sys.executable}\n{WRITES}(out / 'said').write_text(' '.join(sys.argv[3:]))\n")
    program.chmod(0o755)
    out = tmp_path / "out"
    assert mergekit(str(program), tmp_path / "recipe.yaml", out).written > 1500
    assert (out / "said").read_text() == "--random-seed 42 --no-copy-tokenizer"
