# SPDX-License-Identifier: Apache-2.0
"""The tool that breaks the package to see whether tests notice: what it changes, and one short run of it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
import mutants  # noqa: E402

TEXT = '''
"""Nothing here: 1 < 2."""
from typing import Annotated

LIMIT = 3


def f(a: Annotated[float, 7], b=2, *, c: bool = True) -> "list[int]":
    """Nor here: 4 + 5."""
    if not a or b < 1:
        raise ValueError(f"{a + b} is not {6}")
    for x in a:
        if x is None:
            continue
        a += min(x, -b) * 0.5
    print(a)
    return [x for x, _ in zip(a, b, strict=True) if x not in b]
'''


def test_each_mutant_is_one_change():
    found = list(mutants.mutants_of("m", TEXT))
    assert [(one.line, one.old, one.new) for one in found] == [
        (5, "3", "4"), (8, "2", "3"), (8, "True", "False"), (10, "not a or b < 1", "not a and b < 1"),
        (10, "not a", "a"), (10, "b < 1", "b <= 1"), (10, "1", "2"),
        (11, 'raise ValueError(f"{a + b} is not {6}")', ""), (13, "x is None", "x is not None"), (14, "continue", ""),
        (15, "a += min(x, -b) * 0.5", "a -= min(x, -b) * 0.5"), (15, "min(x, -b) * 0.5", "min(x, -b) + 0.5"),
        (15, "min", "max"), (15, "-b", "b"), (15, "0.5", "0.75"), (16, "print(a)", ""),
        (17, "x not in b", "x in b"),
    ]  # fmt: skip
    before = ast.dump(ast.parse(TEXT))
    for one in found:
        assert ast.dump(ast.parse(one.source)) != before, one.told
    assert len({one.name for one in found}) == len(found)


def test_a_setter_is_broken_where_it_stands():
    from darekit.engine.selection import Select

    module = "engine/selection"
    text = (ROOT / "src" / "darekit" / f"{module}.py").read_text(encoding="utf-8")
    one = next(one for one in mutants.mutants_of(module, text) if one.text.startswith("self.lows, self.highs = int("))
    getter, setter = Select.bounds.fget.__code__, Select.bounds.fset.__code__
    try:
        assert mutants.implant(one)
        assert Select.bounds.fget.__code__ is getter and Select.bounds.fset.__code__ is not setter
    finally:
        Select.bounds.fset.__code__ = setter


def test_every_place_of_the_heart_can_be_compiled():
    for module in mutants.TARGETS:
        text = (ROOT / "src" / "darekit" / f"{module}.py").read_text(encoding="utf-8")
        places = list(mutants.mutants_of(module, text))
        assert len(places) > 10, module
        for one in places[::10]:
            compile(one.source, module, "exec")


def test_what_is_called_equivalent_is_a_place_and_has_a_reason():
    known = {
        one.told for module in mutants.TARGETS
        for one in mutants.mutants_of(module, (ROOT / "src" / "darekit" / f"{module}.py").read_text(encoding="utf-8"))
    }  # fmt: skip
    same = mutants.equivalents()
    assert not same.keys() - known
    assert all(len(why) > 10 for why in same.values())


@pytest.mark.check
def test_a_run_tells_of_each_mutant_and_touches_no_file(tmp_path):
    before = subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True).stdout
    arguments = ("--only", "planning/rates", "--tests", "rates", "--work", tmp_path)
    command = [sys.executable, ROOT / "scripts" / "mutants.py", *arguments, "--sample", "12"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    tried = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    outcomes = [one["outcome"] for one in tried]
    assert len(tried) >= 8 and outcomes.count("killed") > len(tried) / 2, done.stdout
    assert done.returncode == bool({"survived", "not reached"} & set(outcomes))
    assert subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True).stdout == before
