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
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts)
        yield name, imports(path.read_text(), name)


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
            "darekit.statistics.budget",
            "darekit.statistics.passes",
            "darekit.statistics.running",
            "darekit.recommendation.inputs",
            "darekit.recommendation.calibration",
            "darekit.recommendation.shrinkage",
            "darekit.demo",
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
    "matplotlib only in plots and the demo": lambda name, one: (
        not within(one, "matplotlib") or within(name, "darekit.plots", "darekit.demo")
    ),
    "merging needs no model that runs": lambda name, one: (
        not within(
            one,
            "darekit.live",
            "darekit.plots",
            "darekit.evaluation",
            "darekit.statistics.budget",
            "darekit.statistics.passes",
            "darekit.statistics.running",
        )
        or not within(
            name,
            "darekit.methods",
            "darekit.checkpoints",
            "darekit.kernels",
            "darekit.recipe",
            "darekit.planning",
            "darekit.engine",
            "darekit.tiles",
            "darekit.running",
            "darekit.packs",
            "darekit.recommendation.rates",
        )
    ),
    "methods know no checkpoint, kernel, recipe or engine": lambda name, one: (
        not within(name, "darekit.methods")
        or not within(one, "darekit")
        or within(one, "darekit.methods", "darekit.masks", "darekit.dtypes", "darekit.errors")
    ),
    "checkpoints know no method": lambda name, one: (
        not within(name, "darekit.checkpoints")
        or not within(one, "darekit")
        or within(one, "darekit.checkpoints", "darekit.masks", "darekit.dtypes", "darekit.errors")
    ),
    "kernels know arrays only": lambda name, one: (
        not within(name, "darekit.kernels")
        or not within(one, "darekit")
        or within(one, "darekit.kernels", "darekit.masks", "darekit.dtypes", "darekit.errors")
    ),
    "masks, dtypes and errors know nobody": lambda name, one: (
        not within(name, "darekit.masks", "darekit.dtypes", "darekit.errors")
        or not within(one, "darekit")
        or within(one, "darekit.errors")
    ),
    "nobody but the command imports typer and rich": lambda name, one: (
        not within(one, "typer", "rich") or within(name, "darekit.cli", "darekit.demo")
    ),
    "nobody imports the command but itself": lambda name, one: (
        not within(one, "darekit.cli") or within(name, "darekit.cli", "darekit.__main__")
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_the_rule(rule):
    assert not offenders(RULES[rule])


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        ("only kernels.compiling and kernels.intrinsics import numba", "darekit.tiles",
         "def f():\n    from numba import njit\n"),
        ("torch only where models run, and where tensors, pickles or the demo are", "darekit.engine",
         "import torch.nn as nn\n"),
        ("matplotlib only in plots and the demo", "darekit.inspection", "import matplotlib\n"),
        ("lm-eval only in evaluation, datasets there and where rows are read", "darekit.live.data",
         "def f():\n    from lm_eval import evaluator\n"),
        ("methods know no checkpoint, kernel, recipe or engine", "darekit.methods.ties",
         "from darekit.checkpoints import TensorInfo\n"),
        ("methods know no checkpoint, kernel, recipe or engine", "darekit.methods.ties", "from .. import kernels\n"),
        ("checkpoints know no method", "darekit.checkpoints.files", "import darekit.methods\n"),
        ("kernels know arrays only", "darekit.kernels.cpu", "from darekit.steps import Step\n"),
        ("masks, dtypes and errors know nobody", "darekit.masks", "from darekit import digests\n"),
        ("merging needs no model that runs", "darekit.engine", "from darekit.live import models\n"),
        ("nobody but the command imports typer and rich", "darekit.running", "from rich.table import Table\n"),
        ("nobody imports the command but itself", "darekit.api", "from darekit.cli import display\n"),
    ],
)  # fmt: skip
def test_each_rule_can_be_broken(rule, module, source):
    assert offenders(RULES[rule], [(module, imports(source, module))])


def test_type_checkers_imports_do_not_count():
    source = "if TYPE_CHECKING:\n    import numba\nelse:\n    import yaml\n"
    assert imports(source) == {"yaml"}


# --- the process


LIST = """
import atexit, sys
atexit.register(lambda: print("LOADED", *sorted(sys.modules), file=sys.stderr))
"""


def loaded(code, *arguments):
    """Modules that a fresh interpreter has loaded at its end, and its exit code."""
    done = subprocess.run(
        [sys.executable, "-c", LIST + code, *map(str, arguments)], capture_output=True, text=True, timeout=60
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
    code = "import numpy as np; from darekit.kernels import cpu; cpu.scale(np.ones(3, np.float32), np.float32(2))"
    modules, _, _ = loaded(code)
    assert {"numpy", "numba"} <= modules and "torch" not in modules


def test_everything_in_all_exists():
    for name in darekit.__all__:
        assert getattr(darekit, name) is not None
    with pytest.raises(AttributeError, match="marge"):
        _ = darekit.marge


def test_a_merge_loads_what_it_needs_and_no_more(llamas, tmp_path):
    """The reader of packs where there is a pack, statistics where there are some, one module of commands."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(families.recipe(llamas.path)))
    modules, returned, said = loaded(RUN, "merge", recipe, tmp_path / "out", "--dry-run", "--json")
    assert returned == 0, said
    assert "darekit.planning" in modules and "darekit.cli.merging" in modules
    others = {"darekit.cli.packs", "darekit.cli.analysis", "darekit.packs.reading", "darekit.statistics.files"}
    assert not modules & {*others, "rich.console", "numba", "llvmlite", "torch"}
