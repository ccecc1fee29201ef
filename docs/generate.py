# SPDX-License-Identifier: Apache-2.0
"""Write docs/methods.md, docs/cli.md and docs/commands/*.md from the table of methods, the commands' own functions, and
the examples in docs/commands.yaml.

`make docs` writes them; `python docs/generate.py --check` exits with 1 where a file is stale (a test does the same).
"""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from enum import EnumType
from pathlib import Path
from typing import Any

import yaml
from typer.models import ArgumentInfo, OptionInfo

from darekit import cli
from darekit.cli.display import methods_data
from darekit.methods import (
    MERGE_ALIASES,
    MERGE_METHODS,
    SEED,
    SPARSIFIERS,
    WEIGHT,
    Choice,
    MergeMethod,
    Number,
    Parameter,
)
from darekit.methods.kinds import passes_before
from darekit.recipe.mergekit import PRODUCTS

HERE = Path(__file__).resolve().parent
DOCS = HERE  # where the pages go
NOTICE = "<!-- Written by docs/generate.py from the code: change it there and run `make docs`. -->"

METHODS_HEAD = """\
Any sparsifier can be combined with any merge method. In a recipe a sparsifier's parameters go under `sparsify:`, a
merge method's under `parameters:`, and those marked "per model" also under one model's `parameters:`. A number can be
a list of `{filter, value}`: the first filter that matches the tensor's name decides ([recipes](recipes.md)).

The formulas are plain numpy functions: [sparsifiers.py](../src/darekit/methods/sparsifiers.py),
[merging.py](../src/darekit/methods/merging.py), [spherical.py](../src/darekit/methods/spherical.py),
[surveyed.py](../src/darekit/methods/surveyed.py) and [informed.py](../src/darekit/methods/informed.py). The fast
kernels equal them bit for bit, which the tests check for every pair. Here `d` is a delta, `p` the drop rate, `w_k` a
model's weight. A method that is missing can be [your own](own-methods.md)."""

MODEL_HEAD = "Every model can have these, unless its method takes no weights."

NAMES_HEAD = """\
These names come from [mergekit's recipes](mergekit.md); each is read as a sparsifier and a merge method."""


def methods_page() -> str:
    """The text of methods.md."""
    data = methods_data()
    lines = ["# Methods", "", NOTICE, "", METHODS_HEAD, ""]
    for title, entries, table in (
        ("Sparsifiers", data["sparsifiers"], SPARSIFIERS),
        ("Merge methods", data["merge_methods"], MERGE_METHODS),
    ):
        lines += [f"## {title}", ""]
        for entry in entries:
            found: Any = table[entry["name"]]
            names = [entry["name"], *(alias for alias, name in MERGE_ALIASES.items() if name == entry["name"])]
            lines += [f"### {', '.join(f'`{name}`' for name in names)}", "", entry["summary"], ""]
            lines += [f"Source: {entry['source']}", ""]
            if title == "Sparsifiers":
                what = "random" if found.random else "not random: there is no seed"
                lines += [f"The choice is {what}. It looks at one {found.scope} at a time.", ""]
            if title == "Merge methods" and found.products:
                lines += [_measured(found), ""]
            elif title == "Merge methods" and not found.weighted:
                lines += [_surveyed(found), ""]
            lines += [*_parameters(found.parameters.values()), ""]
    lines += ["## Of each model", "", MODEL_HEAD, "", *_parameters((WEIGHT, SEED)), ""]
    lines += ["## Names of products", "", NAMES_HEAD, "", "| name | sparsifier | merge method | normalize |"]
    lines += ["|---|---|---|---|"]
    lines += [
        f"| `{name}` | `{product.sparsifier}` | `{product.merge}`, no trim | {str(product.normalize).lower()} |"
        if MERGE_METHODS[product.merge].trims
        else f"| `{name}` | `{product.sparsifier}` | `{product.merge}` | {str(product.normalize).lower()} |"
        for name, product in PRODUCTS.items()
    ]
    return "\n".join([*lines, ""])


def _measured(method: MergeMethod) -> str:
    return (
        f"{_takes(method)} Every tensor is read twice: its coefficients are measured first, and go into the lock file."
    )


def _surveyed(method: MergeMethod) -> str:
    times = passes_before(method.survey)
    if not times:
        return _takes(method)
    often = {1: "twice", 2: "three times"}[times]
    return f"{_takes(method)} Every tensor is read {often}: what is measured first goes into the lock file."


def _takes(method: MergeMethod) -> str:
    low, high = method.models
    many = {1: "one model", 2: "two models"}[low]
    takes = f"It takes {many if low == high else f'{many} or more'}"
    base = " besides the base" if method.needs_base else ", with or without a base"
    return f"{takes}{base}{'' if method.weighted else ', and no weights'}."


def _parameters(parameters: typing.Iterable[Parameter]) -> list[str]:
    rows = ["| parameter | default | range | |", "|---|---|---|---|"]
    for p in parameters:
        per_model = "; per model" if isinstance(p.kind, Number) and p.kind.per_model else ""
        rows.append(f"| `{p.name}` | {_default(p)} | {_range(p)} | {p.kind.help}{per_model} |")
    return rows


def _default(parameter: Parameter) -> str:
    if parameter.default is None:
        return "derived" if parameter.name == SEED.name else "required"
    return f"`{str(parameter.default).lower()}`"


def _range(parameter: Parameter) -> str:
    kind = parameter.kind
    if isinstance(kind, Choice):
        return ", ".join(f"`{word}`" for word in kind.of)
    if not isinstance(kind, Number):
        return "`true`, `false`"
    if parameter.name == SEED.name:
        return "0 to 2^64 - 1"
    if kind.low > float("-inf") and kind.high == float("inf"):
        return f"{kind.low:g} or more"
    return "any number" if kind.low == float("-inf") else f"{kind.low:g} to {kind.high:g}"


CLI_HEAD = """\
`dare COMMAND --help` prints what the command's page here says, without the examples. Results go to standard output;
notes, errors and the progress bar go to standard error, and the bar appears only if that is a terminal.

Exit codes: 0 done; 1 refused or failed, with the reason; 2 a mistake in the command itself; 130 interrupted."""


def cli_page() -> str:
    """The text of cli.md: every command, and what it does."""
    lines = ["# The command line", "", NOTICE, "", CLI_HEAD, ""]
    for panel, members in cli.PANELS.items():
        lines += [f"## {panel}", "", "| command | |", "|---|---|"]
        for word in members:
            summary = _text_of(cli.build_app(word), word)
            lines.append(f"| [`dare {word}`](commands/{word}.md) | {summary} |")
        lines.append("")
    return "\n".join(lines)


def command_page(word: str) -> str:
    """The text of one command's page: what it does, its examples, its arguments and options."""
    app = cli.build_app(word)
    lines = [f"# `dare {word}`", "", NOTICE, "", _text_of(app, word), ""]
    members = [*_members(app)]
    lines += [] if len(members) > 1 else [*_usage(*members[0]), ""]
    runs = any("shown" not in example for example in _examples()[word])
    lines += ["## Examples", "", *([EXAMPLES_HEAD, ""] if runs else [])]
    for example in _examples()[word]:
        lines += [example["says"], ""]
        for name, text in example.get("save", {}).items():
            lines += [
                f"`{name}`:",
                "",
                f"<!-- save: {name} -->",
                f"```{Path(name).suffix[1:]}",
                text.rstrip(),
                "```",
                "",
            ]
        [(kind, marker)] = [(kind, marker) for kind, marker in MARKERS.items() if kind in example]
        lines += [*([marker] if marker else []), "```sh", example[kind].rstrip(), "```", ""]
    for name, function in members:
        if len(members) > 1:
            lines += [f"## `dare {name}`", "", _summary(function), "", *_usage(name, function), ""]
        else:
            lines += ["## Arguments and options", ""]
        lines += [*_parameters_of(function), ""]
    return "\n".join(lines)


EXAMPLES_HEAD = "These run in the folder `demo/` that `make demo` leaves ([the demo](../demo.md))."
MARKERS = {"run": "<!-- run -->", "hub": "<!-- run on the Hub -->", "shown": ""}


@functools.cache
def _examples() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = yaml.safe_load((HERE / "commands.yaml").read_text(encoding="utf-8"))
    words = [word for members in cli.PANELS.values() for word in members]
    if set(found) != set(words):
        raise SystemExit(f"commands.yaml and `dare --help` differ: {', '.join(sorted(set(found) ^ set(words)))}")
    return found


def _summary(function: Callable[..., Any]) -> str:
    return " ".join((function.__doc__ or "").split())


def _text_of(app: Any, word: str) -> str:
    """What `dare --help` says of a command."""
    group = next((one for one in app.registered_groups if one.name == word), None)
    return str(group.typer_instance.info.help) if group else _summary(app.registered_commands[0].callback)


def _usage(name: str, function: Callable[..., Any]) -> list[str]:
    shown = [_word(p) for p, _, info in _described(function) if isinstance(info, ArgumentInfo)]
    return [f"Usage: `{' '.join(['dare', name, *shown, '[OPTIONS]'])}`"]


def _word(parameter: inspect.Parameter) -> str:
    return parameter.name.upper() if parameter.default is parameter.empty else f"[{parameter.name.upper()}]"


def _parameters_of(function: Callable[..., Any]) -> list[str]:
    """A list of a command's arguments, and a table of its options."""
    described = list(_described(function))
    lines = [f"- `{p.name.upper()}`: {info.help}" for p, _, info in described if isinstance(info, ArgumentInfo)]
    lines += [""] if lines else []
    lines += ["| option | default | |", "|---|---|---|"]
    lines += [
        f"| {_option(p, kind, info)} | {_preset(p, kind)} | {info.help} |"
        for p, kind, info in described
        if isinstance(info, OptionInfo)
    ]
    return lines


def _members(app: Any, prefix: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    for command in app.registered_commands:
        yield prefix + (command.name or command.callback.__name__.replace("_", "-")), command.callback
    for group in app.registered_groups:
        yield from _members(group.typer_instance, f"{prefix}{group.name} ")


def _described(function: Callable[..., Any]) -> Iterator[tuple[inspect.Parameter, Any, Any]]:
    """Each parameter of a command with its type and what typer knows of it."""
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        kind, *metadata = typing.get_args(hints[parameter.name])
        yield parameter, kind, next(item for item in metadata if isinstance(item, ArgumentInfo | OptionInfo))


def _option(parameter: inspect.Parameter, kind: Any, info: OptionInfo) -> str:
    # Inside Annotated typer keeps the first name that is given where the default stands elsewhere.
    given = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
    names = given or ["--" + parameter.name.replace("_", "-")]
    words = [part for part in (kind, *typing.get_args(kind)) if isinstance(part, EnumType)]
    if kind is bool:
        value = ""
    elif words:
        value = " " + " \\| ".join(str(member.value) for member in words[0])
    else:
        parts = [part for part in (kind, *typing.get_args(kind)) if part in (int, float, str)]
        value = " " + (info.metavar or {int: "N", float: "X", str: "TEXT"}[parts[0] if parts else str])
    repeated = ", repeatable" if "list[" in str(kind) else ""
    return ", ".join(f"`{name}`" for name in names) + (f"{value}" if value else "") + repeated


def _preset(parameter: inspect.Parameter, kind: Any) -> str:
    if parameter.default is parameter.empty:
        return "required"
    if parameter.default is None or parameter.default is False:
        return ""
    if isinstance(parameter.default, list):
        return f"`{','.join(map(str, parameter.default))}`"
    return f"`{getattr(parameter.default, 'value', parameter.default)}`"


def pages() -> dict[str, Callable[[], str]]:
    """Every generated page, by its path in docs/."""
    words = [word for members in cli.PANELS.values() for word in members]
    return {
        "methods.md": methods_page,
        "cli.md": cli_page,
        **{f"commands/{word}.md": functools.partial(command_page, word) for word in words},
    }


def stale() -> list[str]:
    """Names of the pages on disk that are not what the code says now, or that nothing writes any more."""
    found = [
        name
        for name, page in pages().items()
        if not (DOCS / name).is_file() or (DOCS / name).read_text(encoding="utf-8") != page()
    ]
    left = [f"commands/{path.name}" for path in (DOCS / "commands").glob("*.md")]
    return [*found, *sorted(set(left) - set(pages()))]


def main() -> int:
    """Write the stale pages and remove those of commands that are gone; with --check only name them."""
    found = stale()
    if "--check" in sys.argv[1:]:
        if found:
            sys.stderr.write(f"stale: {', '.join(found)}; run `make docs`\n")
        return 1 if found else 0
    for name in found:
        if name in pages():
            (DOCS / name).parent.mkdir(exist_ok=True)
            (DOCS / name).write_text(pages()[name](), encoding="utf-8")
        else:
            (DOCS / name).unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
