# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and what a command may load before it has work to do."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import darekit
import families
from darekit.methods import MERGE_METHODS, SPARSIFIERS
from darekit.recipe.mergekit import PRODUCTS

PACKAGE = Path(darekit.__file__).parent
HEAVY = ("numpy", "pydantic", "numba", "torch", "transformers", "yaml", "huggingface_hub", "ml_dtypes")


# --- the source


def imports(source, module=""):
    """Absolute names of everything a module imports, wherever in it; those only for type checkers are left out."""
    found = set()

    def visit(node):
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=orelse):
                for child in orelse:
                    visit(child)
                return
            case ast.Import(names=names):
                found.update(alias.name for alias in names)
            case ast.ImportFrom(module=origin, names=names, level=level):
                above = module.split(".")[:-level] if level else []
                origin = ".".join([*above, *([origin] if origin else [])])
                found.update(f"{origin}.{alias.name}" for alias in names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "_version.py":  # a build's, not the project's
            continue
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts)
        yield name, imports(path.read_text(), name)


# The house, from the top floor down: a room imports from the floors below it and from its own files, never from beside
# it or above. `docs/architecture.md` draws the same picture.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("reports",),
    ("recommendation", "searches", "sweeps", "testing"),
    ("demo", "packing", "trials"),
    ("analysis", "api", "evaluation", "extraction", "register", "statistics"),
    ("live", "memory", "output"),
    ("planning",),
    ("engine", "inputs", "packs", "tokens"),
    ("checkpoints", "recipe"),
    ("kernels", "methods", "plotting", "pools"),
    ("architectures", "code", "dtypes", "errors", "machine", "masks", "version", "wording"),
)
FLOOR = {room: floor for floor, rooms in enumerate(reversed(FLOORS)) for room in rooms}


def graph(found=None):
    """Module of the package -> the package's modules that it imports."""
    found = dict(found or modules())
    known = {name.removesuffix(".__init__") for name in found} - {"darekit"}
    return {
        name: {
            next(one.rsplit(".", k)[0] for k in range(3) if one.rsplit(".", k)[0] in known) for one in many
            if any(one.rsplit(".", k)[0] in known for k in range(3))
        } - {name}
        for name, many in ((name.removesuffix(".__init__"), many) for name, many in found.items())
        if name != "darekit"
    }  # fmt: skip


def room(module):
    return module.split(".")[1]


def climbers(imported):
    """Imports that do not go down."""
    return [
        (name, one)
        for name, many in imported.items()
        for one in sorted(many)
        if room(name) != room(one) and FLOOR[room(one)] >= FLOOR[room(name)]
    ]


def circles(imported):
    """Modules that can be reached from themselves."""

    def reached(name):
        seen, left = set(), list(imported[name])
        while left:
            one = left.pop()
            if one not in seen:
                seen.add(one)
                left += imported.get(one, ())
        return seen

    return [name for name in imported if name in reached(name)]


def test_every_room_has_a_floor():
    assert {room(name) for name in graph()} == set(FLOOR)


def test_imports_go_down():
    assert not climbers(graph())


def test_no_module_imports_itself_in_a_circle():
    assert not circles(graph())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("darekit.planning.plan", "from darekit.output.lock import identity\n"),
        ("darekit.engine.tiles", "def f():\n    from darekit.packs import reading\n"),
        ("darekit.methods.merging", "from darekit.checkpoints import TensorInfo\n"),
        ("darekit.methods.merging", "from .. import kernels\n"),
        ("darekit.kernels.cpu", "import darekit.recipe\n"),
        ("darekit.api", "from darekit.cli import display\n"),
    ],
)
def test_an_import_that_climbs_is_seen(module, source):
    found = dict(modules()) | {module: imports(source, module)}
    assert [name for name, _ in climbers(graph(found))] == [module]


def test_a_circle_is_seen():
    found = dict(modules()) | {"darekit.engine.steps": imports("from darekit.engine.tiles import TILE\n")}
    assert {"darekit.engine.steps", "darekit.engine.tiles"} <= set(circles(graph(found)))


def test_the_architecture_draws_the_same_floors():
    text = (PACKAGE.parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = text[text.index("## The house") : text.index("## The flow")]
    rows = [line.strip().split("  ")[0].split() for line in picture.splitlines() if line.startswith("    ")]
    drawn = [tuple(one.removesuffix("/").removesuffix(".py") for one in row) for row in rows]
    assert drawn == [floor for floor in FLOORS if floor != ("__main__",)]


def test_the_root_holds_few_modules():
    """What everybody imports, and what nobody looks for in a room."""
    loose = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__", "_version"}
    assert loose == {
        "api", "code", "dtypes", "errors", "machine", "masks", "memory", "plotting", "register", "version",
    }  # fmt: skip


def within(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offenders(rule, found=None):
    """(module, import) pairs that break a rule: (module, import) -> allowed."""
    return [(name, one) for name, many in found or modules() for one in sorted(many) if not rule(name, one)]


RULES = {
    "only kernels.compiling and kernels.intrinsics import numba": lambda name, one: (
        not within(one, "numba", "llvmlite") or within(name, "darekit.kernels.compiling", "darekit.kernels.intrinsics")
    ),
    "torch only where models run, and where tensors, pickles or the demo are": lambda name, one: (
        not within(one, "torch", "transformers", "tokenizers")
        or within(
            name,
            "darekit.live",
            "darekit.evaluation",
            "darekit.statistics",
            "darekit.recommendation.inputs",
            "darekit.recommendation.calibration",
            "darekit.recommendation.shrinkage",
            "darekit.demo",
            "darekit.machine",
            "darekit.memory",
            "darekit.packs.weights",
            "darekit.checkpoints.pytorch",
        )
    ),
    "lm-eval only in evaluation, datasets there and where rows are read": lambda name, one: (
        not within(one, "lm_eval", "datasets", "evaluate")
        or within(name, "darekit.evaluation")
        or (within(one, "datasets") and within(name, "darekit.live.data"))
    ),
    "matplotlib only where something is drawn": lambda name, one: (
        not within(one, "matplotlib")
        or within(name, "darekit.plotting", "darekit.analysis.drawing", "darekit.analysis.curves",
                  "darekit.sweeps.drawing", "darekit.reports.drawing", "darekit.demo")
    ),
    "plotly only where pages are made, Optuna only where settings are searched": lambda name, one: (
        not within(one, "plotly", "optuna")
        or within(name, "darekit.searches")
        or (within(one, "plotly") and within(name, "darekit.reports.markup"))
        or (within(one, "optuna") and within(name, "darekit.reports.importance"))
    ),
    "checkpoints know files and no method": lambda name, one: (
        not within(name, "darekit.checkpoints") or not within(one, "darekit.methods")
    ),
    "methods and kernels know arrays only": lambda name, one: (
        not within(name, "darekit.methods", "darekit.kernels")
        or not within(one, "darekit")
        or within(one, "darekit.methods" if within(name, "darekit.methods") else
                  "darekit.kernels", "darekit.masks", "darekit.dtypes", "darekit.errors")
    ),
    "nobody but the command imports typer and rich": lambda name, one: (
        not within(one, "typer", "rich") or within(name, "darekit.cli", "darekit.demo")
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_the_rule(rule):
    assert not offenders(RULES[rule])


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        ("only kernels.compiling and kernels.intrinsics import numba", "darekit.engine.tiles",
         "def f():\n    from numba import njit\n"),
        ("torch only where models run, and where tensors, pickles or the demo are", "darekit.engine.execution",
         "import torch.nn as nn\n"),
        ("matplotlib only where something is drawn", "darekit.analysis.inspection", "import matplotlib\n"),
        ("plotly only where pages are made, Optuna only where settings are searched", "darekit.reports.charts",
         "def f():\n    import plotly.graph_objects as go\n"),
        ("lm-eval only in evaluation, datasets there and where rows are read", "darekit.live.data",
         "def f():\n    from lm_eval import evaluator\n"),
        ("checkpoints know files and no method", "darekit.checkpoints.files", "from darekit import methods\n"),
        ("methods and kernels know arrays only", "darekit.methods.merging",
         "from darekit.architectures import groups\n"),
        ("methods and kernels know arrays only", "darekit.kernels.cpu", "from darekit.checkpoints import Source\n"),
        ("nobody but the command imports typer and rich", "darekit.output.publishing",
         "from rich.table import Table\n"),
    ],
)  # fmt: skip
def test_each_rule_can_be_broken(rule, module, source):
    assert offenders(RULES[rule], [(module, imports(source, module))])


def method_names(source):
    """Texts in a module that are the name of a method."""
    names = {*SPARSIFIERS, *MERGE_METHODS, *PRODUCTS}
    return [
        node.value for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    ]  # fmt: skip


@pytest.mark.parametrize("part", ["engine", "planning"])
def test_methods_are_known_by_their_entries_in_the_table(part):
    """What the engine must know of a method is a field of its entry, so that a new one touches the table alone."""
    found = {path.name: method_names(path.read_text()) for path in (PACKAGE / part).rglob("*.py")}
    assert len(found) > 5 and not {name: many for name, many in found.items() if many}


def test_a_methods_name_is_seen():
    assert method_names('if step.method == "ties":\n    pass\n') == ["ties"]


def test_type_checkers_imports_do_not_count():
    source = "if TYPE_CHECKING:\n    import numba\nelse:\n    import yaml\n"
    assert imports(source) == {"yaml"}


# --- the process


LIST = """
import atexit, sys
atexit.register(lambda: print("LOADED", *sorted(sys.modules), file=sys.stderr))
"""


def loaded(code, *arguments, timeout=60):
    """Modules that a fresh interpreter has loaded at its end, and its exit code."""
    done = subprocess.run(
        [sys.executable, "-c", LIST + code, *map(str, arguments)], capture_output=True, text=True, timeout=timeout
    )
    line = next(line for line in done.stderr.splitlines() if line.startswith("LOADED"))
    return set(line.split()[1:]), done.returncode, done.stdout + done.stderr


RUN = "import sys\nfrom darekit.cli import main\nsys.argv[0] = 'dare'\nmain()"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        ([], 2),
        (["--version"], 0),
        (["merge", "--help"], 0),
        (["merge"], 2),
        (["mrge", "a", "b"], 2),
        (["drop", "a", "b", "c"], 2),
        (["eval", "m"], 2),
        (["eval", "m", "--data", "d", "--prompt", "x"], 2),
        (["drop", "a", "b", "c", "-p", "90"], 2),
        (["recommend", "a"], 2),
        (["recommend", "a", "b", "--search-q"], 2),
        (["recommend", "a", "b", "-p", "0.9", "--budget", "0.1"], 2),
        (["merge", "r.yaml", "out", "--shard-size", "large"], 2),
        (["merge", "r.yaml", "out", "--set", "lambda"], 2),
    ],
)
def test_help_and_usage_errors_load_nothing_heavy(arguments, code):
    modules, returned, text = loaded(RUN, *arguments)
    assert returned == code, text
    # typer itself takes pydantic to convert arguments (0.29), so only help is free of it.
    assert not modules & ({*HEAVY} if arguments in (["--help"], []) else {*HEAVY} - {"pydantic"})
    assert "typer" in modules and "Traceback" not in text


def test_an_unknown_method_loads_the_table_and_nothing_that_compiles():
    modules, returned, text = loaded(RUN, "drop", "a", "b", "c", "-p", "0.9", "--method", "nonsense")
    assert returned == 2 and "magnitude" in text
    assert not modules & {"numba", "torch", "transformers", "huggingface_hub", "yaml"}


@pytest.mark.parametrize(
    "text", [None, "models: [", "merge_method: ties\nmodels: [a]\n", "merge_method: linear\nmodels: [a]\nlamda: 1\n"]
)
def test_a_recipe_error_compiles_nothing(tmp_path, text):
    recipe = tmp_path / "recipe.yaml"
    if text is not None:
        recipe.write_text(text)
    modules, returned, said = loaded(RUN, "merge", recipe, tmp_path / "out")
    assert returned == 1 and "dare: " in said and "Traceback" not in said
    assert not modules & {"numba", "torch", "transformers", "huggingface_hub"}


def test_importing_the_package_is_light():
    modules, returned, _ = loaded("import darekit")
    assert returned == 0 and "darekit" in modules
    assert not modules & {*HEAVY, "typer", "rich"}


def test_the_list_of_loaded_modules_can_show_heavy_ones():
    modules, _, _ = loaded("from darekit.kernels import cpu; cpu.scale.compile()")
    assert {"numpy", "numba"} <= modules and "torch" not in modules


def test_everything_in_all_exists():
    for name in darekit.__all__:
        assert getattr(darekit, name) is not None
    with pytest.raises(AttributeError, match="marge"):
        _ = darekit.marge


# What some merges need, and a plain one does not. `dare merge --dry-run` is started often, by people and by searches.
ASIDE = {
    "darekit.architectures.layout", "darekit.architectures.stacking", "darekit.cli.analysis",
    "darekit.cli.display_layers", "darekit.cli.packs", "darekit.engine.execution", "darekit.engine.nested",
    "darekit.engine.trimming", "darekit.inputs.headers", "darekit.inputs.rows", "darekit.inputs.slices",
    "darekit.inputs.statistics", "darekit.packs.reading", "darekit.planning.checking", "darekit.planning.stacks.config",
    "darekit.planning.stacks.stack", "darekit.planning.statistics", "darekit.planning.tokens",
    "darekit.planning.travel.beside", "darekit.planning.travel.merged", "darekit.planning.travel.templates",
    "darekit.recipe.schema", "darekit.tokens.documents", "darekit.tokens.joining",
    "darekit.engine.sampling", "darekit.kernels.quantised", "darekit.planning.losses",
    "huggingface_hub", "llvmlite", "numba", "rich.console", "tokenizers", "torch", "transformers",
}  # fmt: skip

# Rooms that every name or header passes: only the doors that recognise what is theirs are open, to new files too.
DOORS = {
    "darekit.checkpoints.quantised": {"naming", "view"},
    "darekit.inputs.adapters": {"finding", "opening"},
}
ASIDE |= {
    name for name, _ in modules() for place, doors in DOORS.items()
    if name.startswith(f"{place}.") and name.removeprefix(f"{place}.") not in doors | {"__init__"}
}  # fmt: skip

# A dry run merges a sample: it loads the engine, and its kernels where no run before has kept them.
SAMPLE = {
    "darekit.engine.execution", "darekit.engine.sampling", "darekit.engine.trimming", "darekit.planning.losses",
    "llvmlite", "numba",
}  # fmt: skip
PLAN = "import sys\nimport darekit as dk\ndk.plan(sys.argv[1])"


def test_a_merge_loads_what_it_needs_and_no_more(llamas, tmp_path):
    """Packs, statistics, slices, tokens and recipes within recipes where there are some; one module of commands."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(families.recipe(llamas.path)))
    modules, returned, said = loaded(RUN, "merge", recipe, tmp_path / "out", "--dry-run", "--json")
    assert returned == 0, said
    assert "darekit.planning.plan" in modules and "darekit.cli.merging" in modules
    assert not modules & (ASIDE - SAMPLE)
    modules, returned, said = loaded(RUN, "merge", recipe, tmp_path / "out", "--dry-run")
    assert returned == 0 and "darekit.engine.sampling" in modules
    assert "numba" not in modules, "the kernels of a plain merge are kept by the run before"
    modules, returned, said = loaded(PLAN, recipe)
    assert returned == 0, said
    assert "darekit.planning.plan" in modules and not modules & ASIDE


DRY = """
import json, sys
import darekit as dk
from darekit.planning.losses import sample_rounding
for recipe in json.loads(sys.argv[1]):
    with dk.plan(recipe) as plan:
        assert sample_rounding(plan) is not None, recipe
"""
DARE = {"method": "dare", "drop_rate": 0.5}
DRY_RUNS = [
    {"merge_method": "ties", "sparsify": DARE, "parameters": {"keep": 0.2}},
    {"merge_method": "ties", "sparsify": DARE, "parameters": {"keep": 0.2, "trim": "model"}},
    {"merge_method": "linear", "sparsify": {**DARE, "rescale": "l1"}},
    {"merge_method": "ties", "sparsify": {**DARE, "method": "della"}},
    {"merge_method": "linear", "sparsify": {"method": "breadcrumbs", "drop_rate": 0.5}},
    {"merge_method": "sce", "parameters": {"select_topk": 0.3}},
    {"merge_method": "sce", "sparsify": DARE},
    {"merge_method": "ram"},
    {"merge_method": "ramplus_tl"},
    {"merge_method": "model_stock", "parameters": {"filter_wise": True}},
    {"merge_method": "ties", "sparsify": DARE, "dtype": "float32"},
    {"merge_method": "task_arithmetic", "rounding": "stochastic", "sparsify": DARE, "parameters": {"lambda": 0.5}},
]  # fmt: skip


def test_what_a_dry_run_merges_of_a_sample_needs_no_numba(llamas):
    """With kernels that a run before has kept: importing numba took more time than all else."""
    recipes = json.dumps([families.recipe(llamas.path, sparsify=None) | more for more in DRY_RUNS])
    for _ in range(2):
        modules, returned, said = loaded(DRY, recipes, timeout=600)  # the first one compiles some twenty kernels
        assert returned == 0, said
    assert "darekit.engine.sampling" in modules and "numba" not in modules


def test_what_a_plain_merge_leaves_aside_exists():
    """A module that was renamed would be left aside for ever."""
    known = {name.removesuffix(".__init__") for name, _ in modules()}
    assert {name for name in ASIDE if name.startswith("darekit.")} <= known


def test_what_a_merge_needs_is_loaded_for_it(llamas, tmp_path):
    """The counterpart of the list above: slices load stacks, a recipe as a model loads what computes it."""
    inner, outer = tmp_path / "inner.yaml", tmp_path / "outer.yaml"
    inner.write_text(json.dumps(families.recipe(llamas.path)))
    layers = [{"sources": [{"model": str(inner), "layer_range": [0, 1]}]}]
    outer.write_text(json.dumps({"slices": layers, "merge_method": "passthrough"}))
    modules, returned, said = loaded(RUN, "merge", outer, tmp_path / "out", "--dry-run")
    assert returned == 0, said
    needed = {"darekit.planning.stacks.stack", "darekit.inputs.slices", "darekit.engine.nested"}
    assert needed | {"darekit.cli.display_layers", "darekit.planning.travel.beside"} <= modules
