# SPDX-License-Identifier: Apache-2.0
"""What makes a project of the package: what it exports, its version, workflows, hooks, fragments of the changelog."""

import ast
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import darekit
from darekit.version import FALLBACK

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def run(*command, cwd=ROOT):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, timeout=120)
    return done.returncode, done.stdout + done.stderr


# --- what is public


def test_all_is_exactly_what_shows():
    """What type checkers see, what is found when asked for, and `__all__` are the same names."""
    tree = ast.parse(Path(darekit.__file__).read_text(encoding="utf-8"))
    (typed,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = [alias.asname or alias.name for node in typed.body for alias in node.names]
    assert sorted(set(imported) - set(darekit._MODULES)) == sorted(darekit._LAZY) == darekit.__all__
    assert set(darekit._MODULES) <= set(imported)
    for name in darekit.__all__:
        assert not name.startswith("_")
        assert getattr(darekit, name).__module__.startswith("darekit"), name


def test_a_fresh_import_shows_nothing_else():
    code = """
import darekit, sys, types
loaded = {name for name, value in vars(darekit).items() if isinstance(value, types.ModuleType)}
known = loaded | {"annotations", "TYPE_CHECKING", "Any"} | {*darekit.__all__}
print(sorted(name for name in vars(darekit) if not name.startswith("_") and name not in known))
print("importlib.metadata" in sys.modules)
"""
    code, said = run(sys.executable, "-c", code)
    assert code == 0 and said.split("\n")[:2] == ["[]", "False"], said


def documented():
    """Name -> object, of everything that the API's pages show."""
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for name in re.findall(r"^::: (darekit[\w.]*)", page.read_text(encoding="utf-8"), re.M):
            yield name, pkgutil.resolve_name(name)


def test_every_public_function_has_an_example():
    """Doctests run them: everything in `__all__`, and every function of the API's pages."""
    public = {f"darekit.{name}": getattr(darekit, name) for name in darekit.__all__}
    shown = dict(documented())
    assert {name for name in public if name != "darekit.DarekitError"} <= {*shown}
    public |= {name: one for name, one in shown.items() if inspect.isfunction(one)}
    assert [name for name, one in public.items() if ">>> " not in (inspect.getdoc(one) or "")] == []


# --- the version


def test_the_fallback_is_the_same_everywhere_and_no_release_of_the_past():
    assert PROJECT["tool"]["hatch"]["version"]["fallback-version"] == FALLBACK
    number, dev = re.fullmatch(r"(\d+\.\d+\.\d+)(\.dev0)?", FALLBACK).groups()
    released = re.findall(r"^## (\d+\.\d+\.\d+), ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert number not in released if dev else released[0] == number


def test_the_citation_has_a_version():
    assert re.search(r"^version: \d+\.\d+\.\d+$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)


@pytest.fixture
def release(tmp_path):
    """A copy of what `.ci/release` reads, ready to release 7.8.9, and how to run it."""
    for name in (".ci", "changelog.d"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in (tmp_path / "changelog.d").glob("*.md"):
        if path.name != "README.md":
            path.unlink()
    (tmp_path / "dist").mkdir()
    for name in ("darekit-7.8.9-py3-none-any.whl", "darekit-7.8.9.tar.gz"):
        (tmp_path / "dist" / name).touch()
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n\n## 7.8.9, 2030-01-01\n")
    (tmp_path / "CITATION.cff").write_text("version: 7.8.9\n")
    for name in ("README.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text("git clone https://example.org\n")
    (tmp_path / "pyproject.toml").write_text('fallback-version = "7.8.9"  # twice\n\nSource = "https://example.org"\n')
    return tmp_path, lambda tag="v7.8.9": run("bash", tmp_path / ".ci" / "release", tag)


def test_a_release_whose_files_agree_is_ready(release):
    assert release[1]() == (0, "ready to release v7.8.9\n")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("dist/darekit-7.8.9.tar.gz", None, "there is no dist/darekit-7.8.9.tar.gz"),
        ("CHANGELOG.md", "## 7.8.8, 2029-01-01\n", "make changelog VERSION=7.8.9"),
        ("changelog.d/+more.added.md", "More.\n", "changelog.d/ has changes"),
        ("CITATION.cff", "version: 7.8.8\n", "CITATION.cff has another version"),
        ("pyproject.toml", 'fallback-version = "7.8.9"\n# Source = ""\n', "[project.urls]"),
        ("README.md", "git clone REPOSITORY darekit\n", "README.md still says REPOSITORY"),
        ("CONTRIBUTING.md", "git clone REPOSITORY darekit\n", "CONTRIBUTING.md still says REPOSITORY"),
        ("pyproject.toml", 'fallback-version = "7.8.9.dev0"\nSource = "https://example.org"\n', "fallback"),
    ],
)
def test_a_release_whose_files_disagree_is_refused(release, file, content, says):
    folder, check = release
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    code, said = check()
    assert code == 1 and "not ready to release v7.8.9" in said and says in said


@pytest.mark.parametrize("tag", ["", "7.8.9", "v7.8", "v7.8.9; true"])
def test_a_release_needs_a_tag(release, tag):
    code, said = release[1](tag)
    assert code == 1 and "expected a tag such as v1.2.3" in said


# --- what describes the package


def test_no_address_is_a_placeholder():
    for name, address in PROJECT["project"]["urls"].items():
        assert re.fullmatch(r"https://[\w.-]+/\S+", address), name
        assert not re.search(r"example|REPOSITORY|TODO|OWNER", address), name


def test_classifiers_name_the_pythons_that_are_tested():
    named = re.findall(r"Python :: (3\.\d+)\n", "\n".join([*PROJECT["project"]["classifiers"], ""]))
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert ci["jobs"]["test"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"


def test_files_without_coverage_exist():
    for pattern in PROJECT["tool"]["coverage"]["run"]["omit"]:
        assert (ROOT / "src" / pattern.removeprefix("*/")).is_file(), pattern


# --- workflows and forms


def check_schema(schema, *files):
    return run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files)


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("custom.github-workflows-require-timeout", ".github/workflows/*.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("vendor.github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("vendor.citation-file-format", "CITATION.cff"),
    ],
)
def test_files_have_the_form_that_is_expected_of_them(schema, files):
    found = sorted(ROOT.glob(files))
    assert found
    code, said = check_schema(schema, *found)
    assert code == 0, said


def test_a_workflow_without_form_is_noticed(tmp_path):
    text = WORKFLOWS[0].read_text(encoding="utf-8")
    (tmp_path / "bad.yml").write_text(text.replace("runs-on:", "runs_on:"))
    code, said = check_schema("vendor.github-workflows", tmp_path / "bad.yml")
    assert code == 1 and "bad.yml" in said


def targets():
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_everyone_runs(workflow):
    text = workflow.read_text(encoding="utf-8")
    assert not re.search(r"https?://", text), "where packages come from is a variable of the repository"
    content = yaml.safe_load(text)
    assert content["permissions"] == {"contents": "read"}
    known = {name for name in content["jobs"]}
    for name, job in content["jobs"].items():
        needed = job.get("needs", [])
        assert {needed} if isinstance(needed, str) else {*needed} <= known
        matrix = job.get("strategy", {}).get("matrix", {})
        assert {*re.findall(r"matrix\.(\w+)", str(job))} == {*matrix}, name
        for step in job["steps"]:
            if "run" in step:
                target = re.fullmatch(r"make ([\w-]+)( [A-Z]+=\S+)*", step["run"])
                assert target and target[1] in targets(), step["run"]
            else:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"]), step["uses"]
                assert not step["uses"].startswith("actions/checkout@") or not step["with"]["persist-credentials"]


def test_only_the_job_that_publishes_may_ask_for_an_identity():
    for workflow in WORKFLOWS:
        for name, job in yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].items():
            expected = {"id-token": "write"} if (workflow.stem, name) == ("release", "publish") else None
            assert job.get("permissions") == expected, (workflow.name, name)


def test_ci_runs_both_commands():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-2:] == ["make test", "make check"] and {"test", "check"} <= targets()


# --- hooks and the changelog


def test_the_hooks_are_valid_and_run_the_environments_programs():
    path = ROOT / ".pre-commit-config.yaml"
    code, said = run(sys.executable, "-m", "pre_commit", "validate-config", path)
    assert code == 0, said
    (repository,) = yaml.safe_load(path.read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local"
    assert all(hook["entry"].startswith(".venv/bin/") for hook in repository["hooks"])


def test_fragments_of_the_changelog_are_found_by_the_tool():
    kinds = "|".join(PROJECT["tool"]["towncrier"]["fragment"])
    code, said = run(sys.executable, "-m", "towncrier", "build", "--draft", "--version", "7.8.9")
    assert code == 0 and "\n## 7.8.9, " in f"\n{said}", said
    for path in sorted((ROOT / "changelog.d").iterdir()):
        if path.name != "README.md":
            assert re.fullmatch(rf"(\d+|\+[\w-]+)\.({kinds})\.md", path.name), path.name
            assert " ".join(path.read_text(encoding="utf-8").split()) in " ".join(said.split()), path.name


def test_a_release_puts_its_fragments_above_the_last_one(tmp_path):
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "changelog.d").mkdir()
    (tmp_path / "changelog.d" / "+thing.fixed.md").write_text("A thing is mended.\n")
    code, said = run(sys.executable, "-m", "towncrier", "build", "--yes", "--version", "7.8.9", cwd=tmp_path)
    assert code == 0, said
    before, text = ((path / "CHANGELOG.md").read_text(encoding="utf-8") for path in (ROOT, tmp_path))
    marker = PROJECT["tool"]["towncrier"]["start_string"]
    assert text.startswith(before[: before.index(marker)])
    assert re.search(rf"{marker}\n## 7\.8\.9, [\d-]+\n\n### Fixed\n\n- A thing is mended\.\n", text)
    assert text.endswith(before[before.index(marker) + len(marker) :].lstrip())
