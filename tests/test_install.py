# SPDX-License-Identifier: Apache-2.0
"""The core installs from its wheel into a clean environment, and merges there without torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import families

ROOT = Path(__file__).parents[1]

CHECK = """
import importlib.util, sys
for name in ("torch", "transformers", "peft", "safetensors"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed: this environment proves nothing"
import darekit
from pathlib import Path
assert Path(darekit.__file__).is_relative_to(sys.prefix), darekit.__file__
assert (Path(darekit.__file__).parent / "py.typed").exists()
from importlib.metadata import metadata
assert metadata("darekit")["License-Expression"] == "Apache-2.0"
"""


def run(*command, cwd=None):
    # Nothing of this process's environment may lend it modules.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=environment, timeout=240
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A fresh environment with darekit's wheel and its dependencies; skips where there is no package index."""
    path = tmp_path_factory.mktemp("clean")
    source = path / "source"
    source.mkdir()
    # Built from a copy: the checkout stays clean.
    for name in ("pyproject.toml", "README.md", "LICENSE", "src", "examples"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    assert run(sys.executable, "-m", "venv", path / "venv")[0] == 0
    pip = (path / "venv" / "bin" / "pip", "--quiet", "--disable-pip-version-check", "--retries", "1")
    code, said = run(*pip, "wheel", "--no-deps", "--wheel-dir", path, source)
    if code == 0:
        (wheel,) = path.glob("darekit-*.whl")
        code, said = run(*pip, "install", "-c", ROOT / "constraints.txt", wheel)
    if code and any(
        word in said for word in ("Temporary failure in name", "NewConnectionError", "ConnectTimeoutError")
    ):
        pytest.skip("no package index")
    assert code == 0, said
    return path / "venv" / "bin"


def test_the_core_merges_where_there_is_no_torch(clean, llamas, tmp_path):
    code, said = run(clean / "python", "-c", CHECK, cwd=tmp_path)
    assert code == 0, said
    recipe = tmp_path / "recipe.yaml"
    text = families.recipe(llamas.path, merge_method="ties", sparsify={"method": "dare", "drop_rate": 0.8, "seed": 1})
    recipe.write_text(str(text).replace("'", '"'))
    code, said = run(clean / "dare", "merge", recipe, tmp_path / "out", cwd=tmp_path)
    assert code == 0, said
    import darekit as dk

    dk.merge(recipe, tmp_path / "here" / "out")
    found, expected = families.contents(tmp_path / "out"), families.contents(tmp_path / "here" / "out")
    assert found == expected, "the same bytes as in an environment with torch"


def test_the_other_commands_run_there(clean, llamas, tmp_path):
    for arguments in (["--help"], ["methods"], ["inspect", llamas.path / "base", llamas.path / "m0"]):
        code, said = run(clean / "dare", *arguments, cwd=tmp_path)
        assert code == 0 and said, said


def test_what_needs_torch_says_what_to_install(clean, llamas, tmp_path):
    families.copy(llamas.path / "base", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
    code, said = run(clean / "dare", "inspect", tmp_path / "base", llamas.path / "m0", cwd=tmp_path)
    assert code == 1 and "torch" in said and "pip install" in said and "Traceback" not in said
    code, said = run(clean / "dare", "demo", tmp_path / "demo", cwd=tmp_path)
    assert code == 1 and "pip install" in said and "Traceback" not in said
