# SPDX-License-Identifier: Apache-2.0
"""The core installs from its wheel into a clean environment, and merges there without torch."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import families
from darekit.version import FALLBACK

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
assert darekit.__version__ == metadata("darekit")["Version"]
assert "Source, https://example.org/someone/darekit" in metadata("darekit").get_all("Project-URL")
assert "(https://example.org/someone/darekit/blob/HEAD/docs/packs.md)" in metadata("darekit").get_payload()
"""

MERGE = """
import sys
import darekit as dk
report = dk.merge(sys.argv[1], sys.argv[2])
assert report.kept
"""


def run(*command, cwd=None, source=""):
    # Nothing of this process's environment may lend it modules, or say where the source is.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment["DAREKIT_SOURCE"] = source
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=environment, timeout=240
    )
    return done.returncode, done.stdout + done.stderr


def copy_sources(target):
    """What a build needs, without git and what an earlier build wrote: the checkout stays clean."""
    target.mkdir()
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    for name in ("src", "examples"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("_version.py", "__pycache__"))


def skip_without_index(code, said):
    if code and any(
        word in said for word in ("Temporary failure in name", "NewConnectionError", "ConnectTimeoutError")
    ):
        pytest.skip("no package index")
    assert code == 0, said


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A fresh environment with darekit's wheel and its dependencies; skips where there is no package index."""
    path = tmp_path_factory.mktemp("clean")
    source = path / "source"
    copy_sources(source)
    assert run(sys.executable, "-m", "venv", path / "venv")[0] == 0
    pip = (path / "venv" / "bin" / "pip", "--quiet", "--disable-pip-version-check", "--retries", "1")
    address = "https://example.org/someone/darekit"
    code, said = run(*pip, "wheel", "--no-deps", "--wheel-dir", path, source, source=address)
    if code == 0:
        (wheel,) = path.glob("darekit-*.whl")
        code, said = run(*pip, "install", "-c", ROOT / "constraints.txt", wheel)
    skip_without_index(code, said)
    return path / "venv" / "bin"


def test_the_core_merges_where_there_is_no_torch(clean, llamas, tmp_path):
    code, said = run(clean / "python", "-c", CHECK, cwd=tmp_path)
    assert code == 0, said
    recipe = tmp_path / "recipe.yaml"
    text = families.recipe(llamas.path, merge_method="ties", sparsify={"method": "dare", "drop_rate": 0.8, "seed": 1})
    recipe.write_text(str(text).replace("'", '"'))
    code, said = run(clean / "dare", "merge", recipe, tmp_path / "out", cwd=tmp_path)
    assert code == 0, said
    code, said = run(clean / "python", "-c", MERGE, recipe, tmp_path / "api" / "out", cwd=tmp_path)
    assert code == 0, said
    import darekit as dk

    dk.merge(recipe, tmp_path / "here" / "out")
    # The lock says which version wrote it, and the sources' may be another.
    found, by_api, expected = (
        {name: content for name, content in families.contents(path / "out").items() if name != "darekit.lock.json"}
        for path in (tmp_path, tmp_path / "api", tmp_path / "here")
    )
    assert "model.safetensors" in found
    assert found == expected, "the same bytes as in an environment with torch"
    assert by_api == expected


def test_a_wheel_from_sources_without_git_has_the_fallback_as_its_version(clean, tmp_path):
    code, said = run(clean / "dare", "--version", cwd=tmp_path)
    assert code == 0 and said.strip() == FALLBACK


@pytest.mark.check
@pytest.mark.parametrize(
    ("tags", "depth", "origin", "expected"),
    [
        (["v1.2.3"], None, "git@github.com:someone/darekit.git", r"1\.2\.3"),
        (["v1.2.3", "a later commit"], None, "https://SECRET@github.com/a/b", r"1\.2\.4\.dev1\+g\w+"),
        ([], None, None, FALLBACK.removesuffix("0") + r"1\+g\w+"),
        (["v1.2.3", "a later commit"], 1, None, FALLBACK.removesuffix("0") + r"1\+g\w+"),
    ],
    ids=["at a tag", "after a tag", "without tags", "shallow clone"],
)
def test_the_version_is_the_tags_and_the_source_the_origin(tags, depth, origin, expected, tmp_path):
    def git(*arguments, cwd=tmp_path / "source"):
        who = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "init.defaultBranch=main")
        code, said = run("git", *who, *arguments, cwd=cwd)
        assert code == 0, said

    copy_sources(tmp_path / "source")
    shutil.copy(ROOT / ".gitignore", tmp_path / "source")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "sources")
    for tag in tags:
        if tag.startswith("v"):
            git("tag", tag)
        else:
            git("commit", "--quiet", "--allow-empty", "--message", tag)
    if origin:
        git("remote", "add", "origin", origin)
    source = tmp_path / "source"
    if depth:
        git("clone", "--quiet", "--depth", depth, "--no-tags", source.as_uri(), tmp_path / "clone", cwd=tmp_path)
        source = tmp_path / "clone"
    code, said = run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", source)
    skip_without_index(code, said)
    (built,) = (tmp_path / "dist").glob("*.tar.gz")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    version = built.name.removeprefix("darekit-").removesuffix(".tar.gz")
    assert re.fullmatch(expected, version), version
    with tarfile.open(built) as archive:
        (written,) = [name for name in archive.getnames() if name.endswith("src/darekit/_version.py")]
        assert f'__version__ = "{version}"' in archive.extractfile(written).read().decode()
        (told,) = [name for name in archive.getnames() if name.endswith("/PKG-INFO")]
        metadata = archive.extractfile(told).read().decode()
    with zipfile.ZipFile(wheel) as archive:
        (told,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        assert archive.read(told).decode() == metadata, (
            "the wheel is built from the source distribution, which keeps all"
        )
    public = bool(origin) and "SECRET" not in origin
    assert ("Project-URL: Source, https://github.com/someone/darekit\n" in metadata) == public
    assert ("(https://github.com/someone/darekit/blob/v1.2.3/docs/packs.md)" in metadata) == public
    assert (
        metadata.count("Project-URL: ") == (5 if public else 1) and "Project-URL: Paper, https://arxiv.org" in metadata
    )
    assert "SECRET" not in metadata and str(tmp_path) not in metadata


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
