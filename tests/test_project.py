# SPDX-License-Identifier: Apache-2.0
"""What makes a project of the package: what it exports, its version, workflows, hooks, fragments of the changelog."""

import ast
import importlib.util
import inspect
import io
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import types
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


def packed(folder, metadata):
    """dist/darekit-7.8.9.tar.gz, with the metadata of a source distribution."""
    with tarfile.open(folder / "dist" / "darekit-7.8.9.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("darekit-7.8.9/PKG-INFO")
        entry.size = len(metadata)
        archive.addfile(entry, io.BytesIO(metadata.encode()))


@pytest.fixture
def release(tmp_path):
    """A copy of what `.ci/release` reads, ready to release 7.8.9, and how to run it."""
    for name in (".ci", "changelog.d"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in (tmp_path / "changelog.d").glob("*.md"):
        if path.name != "README.md":
            path.unlink()
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "darekit-7.8.9-py3-none-any.whl").touch()
    packed(tmp_path, "Project-URL: Source, https://example.org/darekit\nProject-URL: Paper, https://example.org\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n\n## 7.8.9, 2030-01-01\n")
    (tmp_path / "CITATION.cff").write_text("version: 7.8.9\n")
    for name in ("README.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text("git clone https://example.org\n")
    (tmp_path / "pyproject.toml").write_text('fallback-version = "7.8.9"  # twice\n')
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
        ("README.md", "git clone REPOSITORY darekit\n", "README.md still says REPOSITORY"),
        ("CONTRIBUTING.md", "git clone REPOSITORY darekit\n", "CONTRIBUTING.md still says REPOSITORY"),
        ("pyproject.toml", 'fallback-version = "7.8.9.dev0"\n', "fallback"),
    ],
)
def test_a_release_whose_files_disagree_is_refused(release, file, content, says):
    folder, check = release
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    code, said = check()
    assert code == 1 and "not ready to release v7.8.9" in said and says in said


def test_a_release_says_where_its_source_is(release):
    folder, check = release
    packed(folder, "Project-URL: Paper, https://example.org\n\n# darekit\n")
    code, said = check()
    assert code == 1 and "run `DAREKIT_SOURCE=https://HOST/OWNER/NAME make wheel`" in said


@pytest.mark.parametrize("tag", ["", "7.8.9", "v7.8", "v7.8.9; true"])
def test_a_release_needs_a_tag(release, tag):
    code, said = release[1](tag)
    assert code == 1 and "expected a tag such as v1.2.3" in said


# --- what describes the package


@pytest.fixture
def build(monkeypatch):
    """hatch_build.py, without hatchling, which only builds have."""
    interface = types.ModuleType("hatchling.metadata.plugin.interface")
    interface.MetadataHookInterface = object
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.delenv("DAREKIT_SOURCE", raising=False)
    specification = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def clone(tmp_path):
    """A repository with this origin, or none."""

    def make(origin):
        assert run("git", "init", "--quiet", tmp_path / "clone")[0] == 0
        if origin:
            assert run("git", "remote", "add", "origin", origin, cwd=tmp_path / "clone")[0] == 0
        return tmp_path / "clone"

    return make


@pytest.mark.parametrize(
    ("origin", "source"),
    [
        ("https://github.com/some-one/darekit.git", "https://github.com/some-one/darekit"),
        ("https://github.com/some-one/darekit/", "https://github.com/some-one/darekit"),
        ("git@github.com:some-one/dare.kit.git", "https://github.com/some-one/dare.kit"),
        ("ssh://git@gitlab.com/group/part/darekit.git", "https://gitlab.com/group/part/darekit"),
        (None, None),
        ("/home/someone/darekit", None),
        ("../github.com/someone/darekit", None),
        ("file:///home/someone/darekit", None),
        ("someone@host:darekit", None),
        ("git@host.example:someone/darekit", None),
        ("https://git.company.example/team/darekit.git", None),
        ("https://SECRET@github.com/someone/darekit", None),
        ("https://someone:SECRET@github.com/someone/darekit", None),
        ("https://github.com:8443/someone/darekit", None),
        ("https://github.com/someone/darekit?token=SECRET", None),
        ("https://github.com/../darekit", None),
        ("https://github.com/darekit", None),
        ("http://github.com/someone/darekit", None),
    ],
)
def test_the_source_is_an_origin_that_anyone_can_see(build, clone, origin, source):
    assert build.source_of(clone(origin)) == source


def test_the_source_is_not_that_of_a_repository_around_it(build, clone):
    folder = clone("https://github.com/someone/other")
    (folder / "darekit").mkdir()
    assert build.source_of(folder / "darekit") is None


def test_a_variable_decides_where_the_source_is(build, clone, monkeypatch):
    folder = clone("https://github.com/someone/darekit")
    monkeypatch.setenv("DAREKIT_SOURCE", "https://git.company.example/team/darekit.git")
    assert build.source_of(folder) == "https://git.company.example/team/darekit"
    monkeypatch.setenv("DAREKIT_SOURCE", " ")
    assert build.source_of(folder) == "https://github.com/someone/darekit"


@pytest.mark.parametrize(
    "value",
    ["https://SECRET@github.com/someone/darekit", "git@github.com:someone/darekit", "github.com/a/b", "/home/me"],
)
def test_a_variable_that_is_no_plain_address_stops_the_build_and_is_not_shown(build, monkeypatch, value):
    monkeypatch.setenv("DAREKIT_SOURCE", value)
    with pytest.raises(ValueError, match="expected https://HOST/OWNER/NAME") as error:
        build.source_of(ROOT)
    assert value not in str(error.value)


def metadata(build, root, version="1.2.3"):
    hook = build.CustomMetadataHook()
    hook.root, hook.config = str(root), PROJECT["tool"]["hatch"]["metadata"]["hooks"]["custom"]
    found = {"version": version}
    hook.update(found)
    return found


def test_the_metadata_have_all_addresses_or_the_papers_alone(build, clone):
    folder = clone("https://gitlab.com/someone/darekit")
    shutil.copy(ROOT / "README.md", folder)
    assert metadata(build, folder)["urls"] == {
        "Source": "https://gitlab.com/someone/darekit",
        "Documentation": "https://gitlab.com/someone/darekit/-/blob/HEAD/docs/index.md",
        "Issues": "https://gitlab.com/someone/darekit/-/issues",
        "Changelog": "https://gitlab.com/someone/darekit/-/blob/HEAD/CHANGELOG.md",
        "Paper": "https://arxiv.org/abs/2311.03099",
    }
    assert run("git", "remote", "remove", "origin", cwd=folder)[0] == 0
    alone = metadata(build, folder)
    assert alone["urls"] == {"Paper": "https://arxiv.org/abs/2311.03099"}
    assert alone["readme"]["text"] == (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("version", "at"), [("1.2.3", "v1.2.3"), ("1.2.3rc1", "v1.2.3rc1"), ("1.2.4.dev1+g1", "HEAD")])
def test_every_link_of_the_readme_leads_somewhere_from_an_index(build, clone, version, at):
    folder = clone("https://github.com/someone/darekit")
    shutil.copy(ROOT / "README.md", folder)
    readme = metadata(build, folder, version)["readme"]
    assert readme["content-type"] == "text/markdown"
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = re.findall(r"\]\((?!https://)([^)#]+)", before)
    targets = re.findall(r"\]\(([^)#]+)", readme["text"])
    assert len(relative) > 40 and len(targets) == before.count("](")
    assert all(target.startswith("https://") for target in targets)
    for path in {*relative} - {"docs/real/drop.png"}:
        assert f"https://github.com/someone/darekit/blob/{at}/{path}" in targets
    assert f"](https://github.com/someone/darekit/raw/{at}/docs/real/drop.png)" in readme["text"]
    assert "](https://arxiv.org/abs/2311.03099)" in readme["text"]


def test_the_workflows_say_where_the_source_is():
    for workflow in WORKFLOWS:
        content = yaml.safe_load(workflow.read_text(encoding="utf-8"))
        assert content["env"]["DAREKIT_SOURCE"] == "${{ github.server_url }}/${{ github.repository }}"


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
