# SPDX-License-Identifier: Apache-2.0
"""The API reference is whole: every public name is on a page, explains its arguments and results, and shows an example.

Read as mkdocstrings reads it, by griffe: nothing is imported, and what a function returns is known by its full path.
"""

import re
from pathlib import Path

import pytest

import darekit as dk

griffe = pytest.importorskip("griffe")

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))

# What a result leads to, but nobody outside needs to know.
INSIDE = {
    "Alignment", "Companions", "Depths", "Filtered", "Filters", "Gradient", "InputFile", "LeafTable",
    "OutputVocabulary", "Places", "Settings", "Shard", "Source", "Statistics", "Step", "Tower", "Travel", "Value",
    "Within",
}  # fmt: skip


@pytest.fixture(scope="module")
def package():
    return griffe.load("darekit", search_paths=[str(ROOT / "src")], docstring_parser="google", resolve_aliases=True)


def target(package, path):
    found = package[path.removeprefix("darekit.")]
    return found.final_target if found.is_alias else found


def documented(package):
    """Path of everything that a page of docs/api renders -> what it is."""
    names = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
    assert len(names) == len(set(names)), "something is on two pages"
    return {found.path: found for found in (target(package, name) for name in names)}


def classes_in(package, annotation):
    """The package's classes that an annotation names."""
    if annotation is None or isinstance(annotation, str):
        return
    for part in annotation.iterate(flat=True):
        path = getattr(part, "canonical_path", "")
        if path.startswith("darekit."):
            try:
                found = target(package, path)
            except KeyError:  # a name within a function
                continue
            if found.is_class:
                yield found


def fields(found):
    """Public attributes of a class that are no properties, those of its own instances included."""
    return {
        name: member
        for name, member in found.members.items()
        if member.is_attribute and not name.startswith("_") and "property" not in member.labels
    }


def section(found, kind):
    """Name -> description in a section of a docstring."""
    parsed = found.docstring.parsed if found.docstring else []
    return {entry.name: entry.description for part in parsed if part.kind.value == kind for entry in part.value}


def has_example(found):
    return found.docstring is not None and ">>> " in found.docstring.value


@pytest.mark.parametrize("name", dk.__all__)
def test_every_public_name_is_on_a_page_and_shows_an_example(name, package):
    found = target(package, name)
    assert found.path in documented(package), f"{name} is on no page of docs/api"
    assert has_example(found), f"{name} has no example"


def test_a_name_without_an_example_is_seen(package):
    assert not has_example(target(package, "api.run"))


@pytest.mark.parametrize("name", [name for name in dk.__all__ if name != "DarekitError"])
def test_every_argument_is_explained(name, package):
    found = target(package, name)
    arguments = found.members["__init__"].parameters if found.is_class else found.parameters
    explained = {entry.lstrip("*") for entry in section(found, "parameters")}
    assert {one.name for one in arguments} - {"self"} == explained


@pytest.mark.parametrize("name", [name for name in dk.__all__ if name != "DarekitError"])
def test_every_function_says_what_it_returns(name, package):
    found = target(package, name)
    if not found.is_class:
        assert any(part.kind.value == "returns" for part in found.docstring.parsed)
        assert "Any" not in str(found.returns) or name == "merge_tensors"
        for one in found.parameters:
            assert one.kind.value != "variadic keyword" or str(one.annotation) != "Any"


def test_what_functions_return_is_on_a_page_too(package):
    known = documented(package)
    todo = [target(package, name) for name in dk.__all__]
    seen = set()
    while todo:
        found = todo.pop()
        if found.path in seen or found.name in INSIDE:
            continue
        seen.add(found.path)
        assert found.path in known, f"{found.path} is a result, and on no page of docs/api"
        annotations = [found.returns] if found.is_function else [one.annotation for one in fields(found).values()]
        todo += [one for annotation in annotations for one in classes_in(package, annotation)]
    assert {"darekit.planning.plan.Plan", "darekit.output.publishing.Report", "darekit.analysis.interference.Relation",
            "darekit.packs.format.PackedTensor", "darekit.sweeps.data.Axis"} <= seen  # fmt: skip


def test_every_field_of_a_result_is_explained(package):
    for path, found in documented(package).items():
        if found.is_class and not path.startswith("darekit.errors."):
            explained = set(section(found, "attributes"))
            assert path == "darekit.api.Options" or set(fields(found)) <= explained, path


def test_options_are_explained_where_they_are_typed(package):
    written = {**fields(target(package, "api.WriteOptions")), **fields(target(package, "api.RunOptions"))}
    assert set(written) == set(fields(target(package, "api.Options")))
    for name in ("merge", "drop"):
        [words] = [words for entry, words in section(target(package, name), "parameters").items() if "options" in entry]
        assert set(re.findall(r"\w+", words.partition(":")[2].partition("(")[0])) == set(written)


def test_every_error_is_on_a_page(package):
    errors = {one.path for one in package["errors"].classes.values()}
    assert errors <= set(documented(package))


def test_large_results_are_one_line_when_printed(llamas):
    base, model = llamas.path / "base", llamas.path / "m0"
    recipe = {"base_model": str(base), "models": [str(model)], "merge_method": "task_arithmetic"}
    plan, found = dk.plan(recipe), dk.inspect(base, model, llamas.path / "m1")
    for one in (plan, plan.base, found, found.models[0], found.interference, dk.recommend(base, model)):
        assert repr(one).startswith(f"<{type(one).__name__}: ") and len(repr(one)) < 400
