# SPDX-License-Identifier: Apache-2.0
"""Break the heart of the package in one place at a time, and see whether the tests notice.

    python scripts/mutants.py                          # all places of the modules below: some hours
    python scripts/mutants.py --sample 300             # some of them, the same ones each time
    python scripts/mutants.py --only planning/rates    # of modules whose name contains this
    python scripts/mutants.py --show                   # what earlier runs found; runs nothing

A mutant is one comparison turned, one condition negated, one operator, constant or extreme (min, max, any, all)
changed, or one statement left out. The tests are collected and run once, traced: so each mutant is met by the tests
that reach its line, the quick ones first, and is killed by the first that fails. It lives in a fork of that process,
where its function's code takes the place of the one that was imported; no file is touched, and tests that start a
process of their own do not see it. What was tried is kept under --work in results.jsonl, and a run that was stopped
goes on.

What nothing can tell from the original (a bound that only speed depends on, sides that are never equal) is in
`equivalents.txt` beside this file, with the reason, and is not tried.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import importlib
import json
import os
import random
import resource
import signal
import sys
import time
import types
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENTS = Path(__file__).with_name("equivalents.txt")

TARGETS = (
    "masks", "dtypes", "kernels/__init__",
    "methods/sparsifiers", "methods/merging", "methods/spherical", "methods/surveyed", "methods/parameters",
    "engine/selection", "engine/stages", "engine/losses", "engine/measuring", "engine/surveying", "engine/trimming",
    "planning/settings", "planning/steps", "planning/homology", "planning/rates", "planning/rounding",
    "planning/losses", "planning/matching/alignment", "planning/matching/vocabulary", "recipe/values",
    "packs/quantization", "packs/steps", "packs/frames",
    "checkpoints/quantised/formulas", "checkpoints/quantised/scales", "checkpoints/places", "inputs/slices",
    "inputs/rows", "tokens/joining", "tokens/documents", "planning/travel/merged", "planning/travel/configs",
    "planning/travel/labels", "extraction/deltas", "extraction/factors", "extraction/cores",
    "trials/judging", "trials/scores", "searches/racing", "searches/standings", "searches/goals",
)  # fmt: skip

# Files of tests that ask them, in tests/ without `test_` and `.py`.
TESTS = (
    "masks", "reference", "conformance", "merge_methods", "measuring", "rounding", "rounding_losses", "gradients",
    "rates", "homology", "heads", "extras", "packs", "packs_settings", "pack_kernels", "quantised", "search",
    "engine_property",
    # each asks a module or two by itself, in seconds
    "selection", "stages", "losses", "products", "trimming", "quantization", "frames", "scales", "standings", "goals",
    "settings", "layers", "row_sources", "joining", "merged_configs", "deltas", "factors", "cores",
)  # fmt: skip
COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd,
}  # fmt: skip
SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor"}


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: str
    line: int
    end: int
    old: str
    new: str
    text: str
    owner: tuple[str, ...]
    source: str

    @property
    def name(self) -> str:
        """The same in every run, as long as the module's text is."""
        return hashlib.blake2b(f"{self.module}\0{self.source}".encode(), digest_size=6).hexdigest()

    @property
    def told(self) -> str:
        """Where it is and what it does, in a line: what `equivalents.txt` has too."""
        change = f"{' '.join(self.old.split())} -> {' '.join(self.new.split()) or 'nothing'}"
        return f"{'.'.join((self.module, *self.owner))}: {change}, in `{self.text}`"


# --- what may be changed


def mutants_of(module: str, text: str) -> Iterator[Mutant]:
    """All mutants of a module's text, from its first line to its last."""
    lines = text.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    raw = text.encode()
    tree = ast.parse(text)
    for node, changed in sorted(_changes(tree), key=lambda one: (one[0].lineno, one[0].col_offset)):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        new = "pass" if changed is None else ast.unparse(changed)
        shown = new if changed is not None else ""
        if isinstance(node, ast.expr):
            new = f"({new})"
        source = (raw[:begin] + new.encode() + raw[end:]).decode()
        first = lines[node.lineno - 1].decode().strip()
        yield Mutant(
            module,
            node.lineno,
            node.end_lineno,
            raw[begin:end].decode(),
            shown,
            first,
            _owner(tree, node.lineno),
            source,
        )


def _changes(tree: ast.Module) -> Iterator[tuple[Any, ast.AST | None]]:
    """(a node, what takes its place; None: nothing)."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        waiting += _children(node)
        yield from ((node, one) for one in _changed(node))


def _children(node: ast.AST) -> list[ast.AST]:
    """Parts of a node that decide about results: no annotations, docstrings, messages, type checkers' code."""
    match node:
        case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return []
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return []
        case ast.AnnAssign():
            return [node.value] if node.value else []
        case ast.Call(func=ast.Attribute(attr="reshape")):  # any negative length is the one that is left over
            return [node.func, *(one for one in node.args if not isinstance(one, ast.UnaryOp))]
        case ast.FunctionDef():
            defaults = [one for one in (*node.args.defaults, *node.args.kw_defaults) if one is not None]
            return [*node.body, *defaults]
        case ast.ClassDef():
            return list(node.body)
        case ast.Expr(value=ast.Constant()) | ast.keyword(arg="strict"):
            return []
        case ast.Subscript(value=ast.Name(id="Annotated" | "Literal" | "tuple" | "dict" | "list")):
            return []
    return list(ast.iter_child_nodes(node))


def _changed(node: ast.AST) -> Iterator[ast.AST | None]:
    match node:
        case ast.Compare(ops=ops):
            for at, op in enumerate(ops):
                one = copy.deepcopy(node)
                one.ops[at] = COMPARE[type(op)]()
                yield one
        case ast.BoolOp():
            one = copy.deepcopy(node)
            one.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield one
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield node.operand
        case ast.BinOp(op=op) if type(op) in ARITHMETIC:
            one = copy.deepcopy(node)
            one.op = ARITHMETIC[type(op)]()
            yield one
        case ast.AugAssign(op=op) if type(op) in ARITHMETIC:
            one = copy.deepcopy(node)
            one.op = ARITHMETIC[type(op)]()
            yield one
        case ast.IfExp() | ast.If() | ast.While():
            if not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp) and isinstance(node, ast.IfExp):
                one = copy.deepcopy(node)
                one.test = ast.UnaryOp(ast.Not(), node.test)
                yield one
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield ast.Constant(node.value + 1)
        case ast.Constant(value=float()):
            yield ast.Constant(node.value * 1.5 if node.value else 1.0)
        case ast.Name(id=name) if name in SWAPPED:
            yield ast.Name(SWAPPED[name])
        case ast.Attribute(attr=name) if name in SWAPPED:
            one = copy.deepcopy(node)
            one.attr = SWAPPED[name]
            yield one
        case ast.Raise() | ast.Continue() | ast.Break():
            yield None
        case ast.Expr(value=ast.Call()):
            yield None


# --- the tests that reach a line, and a mutant among them


def _owner(tree: ast.Module, line: int) -> tuple[str, ...]:
    """Names of the classes and the function that a line is in; empty: it is the module's own."""
    names: tuple[str, ...] = ()
    body: Sequence[ast.stmt] = tree.body
    while True:
        found = next(
            (node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)
             and node.lineno <= line <= (node.end_lineno or 0)), None,
        )  # fmt: skip
        if found is None:
            return names
        names = (*names, found.name)
        if isinstance(found, ast.FunctionDef):
            return names
        body = found.body


def _function(one: Any, line: int) -> Any:
    """The function behind what a name stands for, of a property the one that has this line; None: there is none."""
    if isinstance(one, property):
        found = [one for one in (one.fget, one.fset, one.fdel) if one is not None]
        begun = [one for one in found if one.__code__.co_firstlineno <= line] or found[:1]
        one = max(begun, key=lambda one: one.__code__.co_firstlineno)
    elif isinstance(one, cached_property):
        one = one.func
    elif isinstance(one, staticmethod | classmethod):
        one = one.__func__
    while hasattr(one, "__wrapped__"):
        one = one.__wrapped__
    return one if isinstance(one, types.FunctionType) else None


DATA = (int, float, str, bytes, tuple, frozenset, dict)


def implant(mutant: Mutant) -> bool:
    """Make an imported module the mutant's; False: it is of a kind for which that cannot be done."""
    import numpy as np

    name = f"darekit.{mutant.module}".replace("/", ".").removesuffix(".__init__")
    module = sys.modules[name]
    changed = types.ModuleType(name)
    changed.__file__ = module.__file__
    exec(compile(mutant.source, str(module.__file__), "exec"), changed.__dict__)
    old, new = vars(module), vars(changed)
    owner = mutant.owner
    for word in owner[:-1]:
        old, new = vars(old[word]), vars(new[word])
    if owner and (into := _function(old[owner[-1]], mutant.line)) is not None:
        source = _function(new[owner[-1]], mutant.line)
        into.__code__, into.__defaults__, into.__kwdefaults__ = (
            source.__code__,
            source.__defaults__,
            source.__kwdefaults__,
        )
        return True
    if owner:  # a class's own statement
        return False
    for word, value in new.items():
        before = old.get(word)
        if not word.startswith("__") and isinstance(value, (*DATA, np.ndarray, np.generic)):
            for other in list(sys.modules.values()):
                if getattr(other, "__name__", "").startswith("darekit") and vars(other).get(word) is before:
                    setattr(other, word, value)
    return True


@dataclass
class Session:
    """A pytest plugin that runs the collected tests once, and then once more for each mutant.

    `lines`: module -> line -> the tests (numbers of `items`) that run it; `seconds`: of each, of processor.
    """

    mutants: Sequence[Mutant]
    found: Any  # called with each result
    minutes: float | None
    modules: Sequence[str]
    lines: dict[str, dict[int, set[int]]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def pytest_runtestloop(self, session: Any) -> bool:
        """In place of pytest's own loop."""
        self.trace(session)
        begin = time.monotonic()
        for mutant in self.mutants:
            if self.minutes is not None and time.monotonic() - begin > 60 * self.minutes:
                break
            self.found(mutant, *self.outcome(session, mutant))
        return True

    def trace(self, session: Any) -> None:
        """Run all tests, and note which lines each of them runs, and how long it takes."""
        import coverage
        from _pytest.runner import runtestprotocol

        paths = {module: str(ROOT / "src" / "darekit" / f"{module}.py") for module in self.modules}
        tracer = coverage.Coverage(data_file=None, include=list(paths.values()), config_file=False)
        tracer.start()
        for at, item in enumerate(session.items):
            tracer.switch_context(str(at))
            began = time.process_time()
            reports = runtestprotocol(item, nextitem=_next(session, session.items, at), log=False)
            self.seconds.append(time.process_time() - began)
            if bad := [report for report in reports if report.failed]:
                sys.exit(f"{item.nodeid} fails without a mutant:\n{bad[0].longreprtext}")
        tracer.stop()
        for module, path in paths.items():
            lines: dict[int, set[int]] = defaultdict(set)
            for line, contexts in tracer.get_data().contexts_by_lineno(path).items():
                lines[line].update(int(one) for one in contexts if one)
            self.lines[module] = lines
        print(f"{len(session.items)} tests, {sum(self.seconds):.0f} s of processor, traced", flush=True)

    def tests_of(self, mutant: Mutant) -> list[int]:
        """Tests that run a line of it, the quick ones first; of what runs while a module is imported: all of its."""
        lines = self.lines[mutant.module]
        span = range(mutant.line, mutant.end + 1)
        if not mutant.owner:
            span = range(1, 1 + max(lines, default=0))
        names = set().union(*(lines[line] for line in span if line in lines))
        return sorted(names, key=lambda at: self.seconds[at])

    def outcome(self, session: Any, mutant: Mutant) -> tuple[str, str, float]:
        """("killed", "survived", "too long", "not reached" or "not tried"; the test that killed it; seconds)."""
        tests = self.tests_of(mutant)
        if not tests:
            return "not reached", "", 0.0
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            self._die_or_survive(session, mutant, tests, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as said:
            name = said.read().decode()
        _, status, used = os.wait4(child, 0)
        seconds = used.ru_utime + used.ru_stime
        if os.WIFSIGNALED(status):
            return "too long", name, seconds
        return ("survived", "killed", "not tried")[os.WEXITSTATUS(status)], name, seconds

    def _die_or_survive(self, session: Any, mutant: Mutant, tests: Sequence[int], told: int) -> None:
        from _pytest.runner import runtestprotocol

        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        limit = int(10 + 3 * sum(self.seconds[at] for at in tests))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        signal.alarm(30 * limit)
        try:
            if not implant(mutant):
                os._exit(2)
            items = [session.items[at] for at in tests]
            for at, item in enumerate(items):
                if any(one.failed for one in runtestprotocol(item, nextitem=_next(session, items, at), log=False)):
                    os.write(told, item.nodeid.encode())
                    os._exit(1)
        except BaseException as error:
            os.write(told, repr(error).encode())
            os._exit(1)
        os._exit(0)


def _next(session: Any, items: Sequence[Any], at: int) -> Any:
    """Whose fixtures stay; after the last, the session's do."""
    return items[at + 1] if at + 1 < len(items) else session


# --- all of them


def equivalents() -> dict[str, str]:
    """What cannot be told from the original -> why: a line, and an indented one."""
    found, told = {}, ""
    for line in EQUIVALENTS.read_text(encoding="utf-8").splitlines() if EQUIVALENTS.exists() else ():
        if line.startswith(" "):
            found[told] = line.strip()
        elif not line.startswith("#"):
            told = line
    return found


def show(results: Sequence[dict[str, Any]], same: dict[str, str], every: Sequence[Mutant]) -> int:
    """A table by module, and a line for each survivor; returns how many there are."""
    told = {mutant.name: mutant.told for mutant in every}
    results = [one for one in results if told.get(one["name"], "") not in {"", *same}]
    words = ("killed", "too long", "survived", "not reached", "not tried")
    print(f"{'module':32} {'places':>6} {'equal':>5} {'tried':>5}  " + "  ".join(words))
    rows = [(module, [one for one in results if one["module"] == module]) for module in TARGETS]
    for module, tried in [*rows, ("in all", results)]:
        places = [mutant for mutant in every if module in (mutant.module, "in all")]
        if places:
            counts = [sum(one["outcome"] == word for one in tried) for word in words]
            equal = sum(mutant.told in same for mutant in places)
            numbers = "  ".join(f"{count:{len(word)}}" for count, word in zip(counts, words, strict=True))
            print(f"{module:32} {len(places):6} {equal:5} {len(tried):5}  {numbers}")
    left = [one for one in results if one["outcome"] in ("survived", "not reached")]
    for one in left:
        print(f"{one['outcome']}: line {one['line']} of {told[one['name']]}")
    return len(left)


def main() -> int:
    """Try them; 1 where one survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=TARGETS, metavar="WORD", help="modules whose name contains one")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="NAME", help="only these files of tests")
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants, drawn from all")
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mutants", help="where results are kept")
    parser.add_argument("--again", action="store_true", help="only what survived earlier runs")
    parser.add_argument("--show", action="store_true", help="only say what earlier runs found")
    arguments = parser.parse_args()

    arguments.work.mkdir(parents=True, exist_ok=True)
    journal, same = arguments.work / "results.jsonl", equivalents()
    lines = journal.read_text().splitlines() if journal.exists() else []
    results = {one["name"]: one for one in map(json.loads, lines)}
    modules = [module for module in TARGETS if any(word in module for word in arguments.only)]
    if not modules:
        sys.exit(f"no module is called {' or '.join(arguments.only)}; expected a part of one of: {', '.join(TARGETS)}")
    every = [
        mutant
        for module in modules
        for mutant in mutants_of(module, (ROOT / "src" / "darekit" / f"{module}.py").read_text(encoding="utf-8"))
    ]
    chosen = random.Random(0).sample(every, min(len(every), arguments.sample or len(every)))
    left = {name for name, one in results.items() if one["outcome"] in ("survived", "not reached")}
    waiting = [
        mutant for mutant in chosen
        if mutant.told not in same and (mutant.name in left if arguments.again else mutant.name not in results)
    ]  # fmt: skip

    def found(mutant: Mutant, outcome: str, by: str, seconds: float) -> None:
        results[mutant.name] = {
            "name": mutant.name, "module": mutant.module, "line": mutant.line, "told": mutant.told,
            "outcome": outcome, "by": by, "seconds": round(seconds, 2),
        }  # fmt: skip
        with journal.open("a") as file:
            file.write(json.dumps(results[mutant.name]) + "\n")
        print(f"{outcome} {seconds:.1f} s: line {mutant.line} of {mutant.told}", flush=True)

    if waiting and not arguments.show:
        import pytest

        os.chdir(ROOT)
        os.environ["CI"] = "1"  # hypothesis: the same examples each time
        sys.path[:0] = [str(ROOT / "src")]
        for module in modules:
            importlib.import_module(f"darekit.{module}".replace("/", ".").removesuffix(".__init__"))
        files = [f"tests/test_{name}.py" for name in arguments.tests]
        files += [f"src/darekit/{module}.py" for module in modules]  # the examples in their docstrings
        options = ["-q", "-s", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
        pytest.main([*options, *files], plugins=[Session(waiting, found, arguments.minutes, modules)])
    return bool(show(list(results.values()), same, every))


if __name__ == "__main__":
    sys.exit(main())
