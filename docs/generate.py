# SPDX-License-Identifier: Apache-2.0
"""Write docs/methods.md and docs/cli.md from the table of methods and the command's own functions.

`make docs` writes them; `python docs/generate.py --check` exits with 1 where a file is stale (a test does the same).
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from enum import EnumType
from pathlib import Path
from typing import Any

from typer.models import ArgumentInfo, OptionInfo

from darekit import cli
from darekit.cli.display import methods_data
from darekit.methods import MERGE_ALIASES, MERGE_METHODS, SEED, SPARSIFIERS, WEIGHT, Choice, Number, Parameter
from darekit.recipe.mergekit import LATER_METHODS, PRODUCTS

DOCS = Path(__file__).resolve().parent
NOTICE = "<!-- Written by docs/generate.py from the code: change it there and run `make docs`. -->"

METHODS_HEAD = """\
Any sparsifier can be combined with any merge method. In a recipe a sparsifier's parameters go under `sparsify:`, a
merge method's under `parameters:`, and those marked "per model" also under one model's `parameters:`. A number can be
a list of `{filter, value}`: the first filter that matches the tensor's name decides ([recipes](recipes.md)).

The formulas are plain numpy functions: [sparsifiers.py](../src/darekit/methods/sparsifiers.py),
[merging.py](../src/darekit/methods/merging.py) and
[informed.py](../src/darekit/methods/informed.py). The fast kernels equal them bit for bit, which the tests check for
every pair. Here `d` is a delta, `p` the drop rate, `w_k` a model's weight."""

MODEL_HEAD = "Every model can have these, whatever the methods."

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
    later = ", ".join(f"`{name}`" for name in LATER_METHODS)
    lines += ["", f"Known, and refused by name until a later version: {later}.", ""]
    return "\n".join(lines)


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
`dare --help` and `dare COMMAND --help` print the same. Results go to standard output; notes, errors and the progress
bar go to standard error, and the bar appears only if that is a terminal.

Exit codes: 0 done; 1 refused or failed, with the reason; 2 a mistake in the command itself; 130 interrupted."""


def cli_page() -> str:
    """The text of cli.md."""
    lines = ["# The command line", "", NOTICE, "", CLI_HEAD, ""]
    shown_panel = None
    for panel, name, function in _commands():
        if panel != shown_panel:
            shown_panel = panel
            lines += [f"## {panel}", ""]
        arguments, options = [], []
        for parameter, kind, info in _described(function):
            if isinstance(info, ArgumentInfo):
                arguments.append((parameter, kind, info))
            else:
                options.append((parameter, kind, info))
        shown = [p.name.upper() if p.default is p.empty else f"[{p.name.upper()}]" for p, _, _ in arguments]
        lines += [f"### `dare {name}`", "", " ".join((function.__doc__ or "").split()), ""]
        lines += ["```", " ".join(["dare", name, *shown, "[OPTIONS]"]), "```", ""]
        lines += [f"- `{word.strip('[]')}`: {info.help}" for word, (_, _, info) in zip(shown, arguments, strict=True)]
        lines += [""] if arguments else []
        lines += ["| option | default | |", "|---|---|---|"]
        lines += [f"| {_option(p, kind, info)} | {_preset(p, kind)} | {info.help} |" for p, kind, info in options]
        lines += [""]
    return "\n".join(lines)


def _commands() -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Every command in the order of `dare --help`: its panel, full name and function."""
    for panel, members in cli.PANELS.items():
        for word in members:
            app = cli.build_app(word)
            yield from ((panel, name, function) for name, function in _members(app))


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


PAGES: dict[str, Callable[[], str]] = {"methods.md": methods_page, "cli.md": cli_page}


def stale() -> list[str]:
    """Names of the pages on disk that are not what the code says now."""
    return [
        name
        for name, page in PAGES.items()
        if not (DOCS / name).is_file() or (DOCS / name).read_text(encoding="utf-8") != page()
    ]


def main() -> int:
    """Write the stale pages; with --check only name them."""
    found = stale()
    if "--check" in sys.argv[1:]:
        if found:
            sys.stderr.write(f"stale: {', '.join(found)}; run `make docs`\n")
        return 1 if found else 0
    for name in found:
        (DOCS / name).write_text(PAGES[name](), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
