# SPDX-License-Identifier: Apache-2.0
"""`public_types.py` under `mypy --strict`: every revealed type and every error stands in the line's comment."""

import re
import typing
from dataclasses import fields
from pathlib import Path

import pytest

import darekit as dk
from darekit.api import Options, RunOptions, WriteOptions

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "public_types.py"
SAID = re.compile(r"^.*?:(?P<line>\d+): (?P<kind>error|note): (?P<text>.*?)(?:  \[(?P<code>[\w-]+)\])?$")


def expected(source):
    """(line, "E" or "R", words) of every comment, in order."""
    for number, line in enumerate(source.splitlines(), 1):
        for kind, words in re.findall(r"  # ([ER]): (.+)$", line):
            yield number, kind, words


def found(path):
    """(line, "E" or "R", words) of everything that mypy says of a file."""
    api = pytest.importorskip("mypy.api")
    output, errors, _ = api.run(["--strict", "--no-error-summary", str(path)])
    assert not errors
    for line in output.splitlines():
        said = SAID.match(line)
        assert said, line
        revealed = re.match(r'Revealed type is "(.*)"$', said["text"])
        if revealed:
            yield int(said["line"]), "R", re.sub(r"[\w.]+\.(?=\w)", "", revealed[1])  # names without their modules
        elif said["kind"] == "error":
            yield int(said["line"]), "E", said["code"]


def test_type_checkers_see_what_is_promised(monkeypatch):
    monkeypatch.chdir(ROOT)  # for the settings, and for the cache that `make test` has just filled
    assert list(found(SOURCE)) == list(expected(SOURCE.read_text()))


def test_options_and_their_types_are_those_that_run():
    assert {entry.name: entry.type for entry in fields(Options)} == {
        name: hint.__forward_arg__ if isinstance(hint, typing.ForwardRef) else hint
        for name, hint in {**WriteOptions.__annotations__, **RunOptions.__annotations__}.items()
    }
    assert not WriteOptions.__required_keys__ | RunOptions.__required_keys__


@pytest.mark.parametrize(
    "call",
    [
        lambda: dk.merge({}, "out", thread=1),
        lambda: dk.drop("base", "model", "out", drop_rate=0.9, thread=1),
        lambda: dk.unpack("base", "pack", "out", thread=1),
    ],
)
def test_an_option_that_does_not_exist_is_refused_with_the_closest_one(call):
    with pytest.raises(TypeError, match="'thread' is not an option; did you mean 'threads'"):
        call()


def test_unpack_refuses_options_that_it_would_ignore():
    with pytest.raises(TypeError, match="'force' is not an option; options: threads, shard_size, overwrite, resume"):
        dk.unpack("base", "pack", "out", force=True)


@pytest.mark.parametrize("function", [lambda *given, **more: dk.merge(*given, "out", **more), dk.plan])
@pytest.mark.parametrize(
    ("late", "said"),
    [({"seed": 0}, "seed=0"), ({"settings": {"parameters.lambda": 0.5}, "stage": "a"}, "settings={.*} and stage='a'")],
)
def test_a_recipe_that_was_read_takes_no_more_settings(function, late, said):
    recipe = dk.read_recipe({"base_model": "base", "models": ["math"], "merge_method": "task_arithmetic"})
    with pytest.raises(dk.DarekitError, match=f"has already been read, so {said} would have no effect"):
        function(recipe, **late)


def test_names_can_be_completed():
    assert set(dk.__all__) <= set(dir(dk))
