# SPDX-License-Identifier: Apache-2.0
"""Many tensors on one screen: a row for each kind of tensor, a bar over the layers, text as wide as the terminal.

Pure display: nothing here reads a file or knows a command.
"""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from darekit.architectures.depth import Layer, layer_of
from darekit.architectures.groups import ONE_TERM

if TYPE_CHECKING:
    from rich.table import Table

NARROWEST, PIPED = 60, 100  # columns: a terminal that says less, and where there is none
ROWS = 20  # kinds that are shown; smaller ones share the last row
OTHERS = "other"
TOTAL = "all"
SPACE = 2  # columns between two cells
WIDEST = 120  # columns of a paragraph
NARROWEST_BAR = 12  # characters of a bar that is worth a column
LONGEST = 32  # characters of a kind's name

COLOURS = {"ok": "green", "large": "yellow", "wrong_base": "red"}

_BLOCKS, _BLOCK_ZERO = "▁▂▃▄▅▆▇█", "·"
_LETTERS, _LETTER_ZERO = ".:-=+*%#", "_"


class Named(Protocol):
    """One tensor's row, whatever else it has."""

    @property
    def name(self) -> str:
        """The tensor's name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def group(self) -> str | None:
        """Its group; None: none."""

    @property
    def parameters(self) -> int:
        """Its number of elements."""


T = TypeVar("T", bound=Named)


@dataclass(frozen=True)
class Sized:
    """A tensor of which only the name and size are known."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    group: str | None


def kind_of(name: str, group: str | None) -> tuple[str, Layer | None]:
    """Tensor name and group -> its kind and its layer; the numbers of experts and the like are left out of the kind.

    The words of `keep_dense` group what they stand for: embeddings, norms, biases, heads.

    >>> kind_of("model.layers.11.self_attn.q_proj.weight", None)
    ('self_attn.q_proj', Layer(stack='model.layers', index=11))
    >>> kind_of("model.layers.3.block_sparse_moe.experts.7.w1.weight", None)[0]
    'block_sparse_moe.experts.w1'
    >>> kind_of("transformer.h.0.ln_1.weight", "norms")[0], kind_of("bert.pooler.dense.weight", None)[0]
    ('norms', 'bert.pooler.dense')
    """
    if group in ("embeddings", "heads"):  # a classifier's layers are no depth
        return group, None
    layer = layer_of(name)
    words = name.split(".")
    inside = words if layer is None else words[layer.stack.count(".") + 2 :]
    tail = ".".join(word for word in inside if not word.isdecimal()).removesuffix(".weight")
    if tail in ("", "weight"):
        tail = name if layer is None else layer.stack
    return group or tail, layer


@dataclass(frozen=True)
class Kind(Generic[T]):
    """Tensors of one kind, with each one's layer (None: outside of the layers)."""

    name: str
    tensors: tuple[T, ...]
    layers: tuple[int | None, ...]

    @property
    def group(self) -> str | None:
        """Its group; None: none."""

    @property
    def parameters(self) -> int:
        """Elements in all tensors."""
        return sum(tensor.parameters for tensor in self.tensors)

    def mean(self, value: Callable[[T], float | None]) -> float | None:
        """The mean of a value, weighted by parameters; None where no tensor has one."""
        found = [(value(tensor), tensor.parameters) for tensor in self.tensors]
        known = [(one, weight) for one, weight in found if one is not None]
        weight = sum(weight for _, weight in known)
        return sum(one * weight for one, weight in known) / weight if weight else None

    def median(self, value: Callable[[T], float]) -> float:
        """The median of a value, weighted by parameters."""
        from darekit.planning.homology import weighted_median

        return weighted_median((value(tensor), tensor.parameters) for tensor in self.tensors)

    def by_layer(self) -> Mapping[int, Kind[T]]:
        """Layer -> its tensors, in the order of the layers."""
        found: dict[int, list[T]] = {}
        for tensor, layer in zip(self.tensors, self.layers, strict=True):
            if layer is not None:
                found.setdefault(layer, []).append(tensor)
        return {layer: Kind(self.name, tuple(found[layer]), (layer,) * len(found[layer])) for layer in sorted(found)}


def kinds_of(tensors: Sequence[T], rows: int = ROWS) -> list[Kind[T]]:
    """All kinds: embeddings, the layers' matrices, what stands outside of them, norms, biases, heads.

    Kinds of one name in two stacks (an encoder and a decoder) stay apart. Of more than `rows` kinds the smallest
    become one.
    """
    places = [kind_of(tensor.name, tensor.group) for tensor in tensors]
    stacks = _stack_labels(layer.stack for _, layer in places if layer)
    homes: dict[str, set[str]] = {}
    for kind, layer in places:
        if layer:
            homes.setdefault(kind, set()).add(layer.stack)
    found: dict[str, list[tuple[T, int | None]]] = {}
    for tensor, (kind, layer) in zip(tensors, places, strict=True):
        name = f"{stacks[layer.stack]} {kind}" if layer and len(homes[kind]) > 1 else kind
        found.setdefault(name, []).append((tensor, layer.index if layer else None))
    kinds = [Kind(name, tuple(t for t, _ in many), tuple(i for _, i in many)) for name, many in found.items()]
    if len(kinds) > rows:
        small = sorted(kinds, key=lambda one: one.parameters)[: len(kinds) - rows + 1]
        rest = [(t, i) for one in small for t, i in zip(one.tensors, one.layers, strict=True)]
        kinds = [one for one in kinds if one not in small]
        kinds.append(Kind(f"{OTHERS} ({len(small)} kinds)", tuple(t for t, _ in rest), tuple(i for _, i in rest)))
    return sorted(kinds, key=_order)


def globs_of(names: Iterable[str]) -> list[str]:
    """Names of tensors, with one pattern for those that differ in their numbers alone.

    >>> globs_of(["layers.0.input_layernorm.weight", "layers.1.input_layernorm.weight", "norm.weight"])
    ['layers.*.input_layernorm.weight', 'norm.weight']
    """
    found: dict[str, list[str]] = {}
    for name in names:
        glob = ".".join("*" if word.isdecimal() else word for word in name.split("."))
        found.setdefault(glob, []).append(name)
    return [glob if len(alike) > 1 else alike[0] for glob, alike in found.items()]


def whole(tensors: Sequence[T]) -> Kind[T]:
    """All tensors as one kind, by layer; where there are several stacks, the largest one's layers."""
    found = [kind_of(tensor.name, tensor.group)[1] for tensor in tensors]
    sizes: dict[str, int] = {}
    for tensor, layer in zip(tensors, found, strict=True):
        if layer:
            sizes[layer.stack] = sizes.get(layer.stack, 0) + tensor.parameters
    largest = max(sizes, key=sizes.__getitem__, default="")
    layers = tuple(layer.index if layer and layer.stack == largest else None for layer in found)
    return Kind(TOTAL, tuple(tensors), layers)


def layers_of(kinds: Iterable[Kind[Any]]) -> int:
    """How many layers there are."""
    return max((layer + 1 for kind in kinds for layer in kind.layers if layer is not None), default=0)


def is_one_term(kind: str) -> bool:
    """Whether a kind is one that stays dense: nothing averages the noise of dropping out in it."""
    return kind.split(" ")[-1] in ONE_TERM


def _order(kind: Kind[Any]) -> int:
    word = kind.name.split(" ")[-1]
    if kind.name.startswith(OTHERS + " "):
        return 6
    ranks = {"embeddings": 0, "norms": 3, "biases": 4, "heads": 5}
    return ranks.get(word, 1 if any(layer is not None for layer in kind.layers) else 2)


def _stack_labels(stacks: Iterable[str]) -> dict[str, str]:
    """Each stack's shortest name that tells it from the others.

    >>> _stack_labels(["encoder.block", "decoder.block"])
    {'encoder.block': 'encoder', 'decoder.block': 'decoder'}
    >>> _stack_labels(["vision_tower.encoder.layers", "language_model.model.layers"])["language_model.model.layers"]
    'language_model'
    """
    names = list(dict.fromkeys(stacks))
    words = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and len({tuple(parts[: shared + 1]) for parts in words}) == 1:
        shared += 1
    firsts = [parts[shared] if len(parts) > shared else parts[-1] for parts in words]
    distinct = len(set(firsts)) == len(names)
    return dict(zip(names, firsts if distinct else names, strict=True))


def can_show(characters: str) -> bool:
    """Whether standard output's encoding has these characters."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def shown(text: str) -> str:
    """A text with `+-` for the sign of a deviation where standard output cannot show it."""
    return text if can_show("±") else text.replace("±", "+-")


def columns() -> int:
    """Width of the terminal; where output goes elsewhere, what COLUMNS says, else 100."""
    return max(NARROWEST, shutil.get_terminal_size((PIPED, 24)).columns)


def bar(values: Mapping[int, float], layers: int, top: float, room: int, *, unicode: bool | None = None) -> str:
    """Layer -> value as one character for each layer, or for several where they are more than `room`.

    Heights go from 0 to `top`; exactly 0 has a sign of its own, a layer without a value a space.

    >>> bar({0: 0.0, 1: 0.1, 2: 0.5, 3: 1.0}, 5, 1.0, 20, unicode=True)
    '·▁▄█ '
    >>> bar({0: 0.0, 1: 0.1, 2: 0.5, 3: 1.0}, 5, 1.0, 20, unicode=False)
    '_.=# '
    >>> bar(dict.fromkeys(range(80), 2.0), 80, 2.0, 32, unicode=False)
    '###########################'
    """
    unicode = can_show(_BLOCKS + _BLOCK_ZERO) if unicode is None else unicode
    levels, zero = (_BLOCKS, _BLOCK_ZERO) if unicode else (_LETTERS, _LETTER_ZERO)
    step = max(1, math.ceil(layers / max(1, room)))
    text = ""
    for first in range(0, layers, step):
        known = [values[i] for i in range(first, min(first + step, layers)) if i in values]
        if not known:
            text += " "
            continue
        mean = sum(known) / len(known)
        height = math.ceil(len(levels) * mean / top) if top > 0 and math.isfinite(mean / top) else len(levels)
        text += zero if not any(known) else levels[min(max(height, 1), len(levels)) - 1]
    return text


def bar_legend(what: str, layers: int, room: int, top: str) -> str:
    """What a column of bars shows, in words."""
    if not room:
        return ""
    step = max(1, math.ceil(layers / room))
    zero = _BLOCK_ZERO if can_show(_BLOCKS + _BLOCK_ZERO) else _LETTER_ZERO
    each = "each layer" if step == 1 else f"every {step} layers"
    return f" Bars: {what} of {each}, from 0 to {top} ({zero}: exactly 0)."


def layers_title(layers: int) -> str:
    """The head of a column of bars.

    >>> layers_title(32)
    'layers 0-31'
    """
    return f"layers 0-{layers - 1}" if layers > 1 else "layer 0"


def table_of(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1, *, title: str = "") -> Table:
    """A table whose first columns (as many as `words`) hold words, the others numbers."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, SPACE, 0, 0), title=title or None, title_justify="left",
                  title_style="bold")  # fmt: skip
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))  # as Text: rich reads [brackets] in a name as markup
    return table


def floored(fraction: float | None, digits: int) -> str:
    """A drop rate that may be used as it is written: never above what it was, but for a float's own rounding.

    >>> floored(0.95796, 3), floored(0.9, 4), floored(None, 3)
    ('0.957', '0.9000', '')
    """
    return "" if fraction is None else f"{math.floor(fraction * 10**digits + 1e-9) / 10**digits:.{digits}f}"


def with_bars(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    courses: Sequence[Mapping[int, float]],
    layers: int,
    *,
    top: float | None = None,
    words: int = 1,
    what: str = "",
    title: str = "",
) -> tuple[Table, int]:
    """A table with a bar for each row in its last column, where there are layers and room; -> table, room or 0.

    `top`: what a full bar is; None: each row's own largest. The column's head is `title`, or `what` and the layers.
    """
    widths = [max(len(line[i]) for line in (heads, *rows)) for i in range(len(heads))]
    room = columns() - sum(widths) - SPACE * len(widths)
    if layers < 2 or room < NARROWEST_BAR:
        return table_of(heads, rows, words), 0
    bars = [bar(course, layers, top or max(course.values(), default=0.0), room) for course in courses]
    table = table_of(
        [*heads, title or what + layers_title(layers)],
        [[*row, one] for row, one in zip(rows, bars, strict=True)],
        words,
    )
    table.columns[-1].justify = "left"
    return table, room


def side_by_side(
    heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1, *, title: str = ""
) -> Iterator[Table]:
    """A table, or where the terminal is too narrow several that begin with the same columns of words."""
    widths = [max(len(line[i]) for line in (heads, *rows)) + SPACE for i in range(len(heads))]
    first = words
    while first < len(heads):
        end = first + 1
        while end < len(heads) and sum(widths[:words]) + sum(widths[first : end + 1]) - SPACE <= columns():
            end += 1
        chosen = (*range(words), *range(first, end))
        yield table_of([heads[i] for i in chosen], [[row[i] for i in chosen] for row in rows], words, title=title)
        title, first = "", end


def shorten(text: str, width: int) -> str:
    """A name cut on the left, where names are alike.

    >>> shorten("model.visual.merger.mlp", 12), shorten("mlp", 12)
    ('...erger.mlp', 'mlp')
    """
    return text if len(text) <= width else "..." + text[len(text) - width + 3 :]


def wrapped(text: str, indent: str = "", first: str = "") -> str:
    """A paragraph as wide as the terminal; later lines begin with `indent`."""
    return textwrap.fill(text, min(columns(), WIDEST), initial_indent=first, subsequent_indent=indent,
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip


def told(text: str) -> str:
    """A note or an error as standard error shows it: wrapped where that is a terminal, else line by line as it is."""
    if not sys.stderr.isatty():
        return text
    return "\n".join(wrapped(line, "  ") for line in text.split("\n"))


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """A word and a sentence on each line; nothing for an empty sentence."""
    shown = [(word, text) for word, text in facts if text]
    width = max((len(word) for word, _ in shown), default=0) + SPACE
    for word, text in shown:
        first = f"  {word:{width}}"
        print(wrapped(text, " " * len(first), first))


def print_headline(word: str, sentence: str, colour: str = "") -> None:
    """`word: sentence`, the word in colour where there is colour."""
    from rich.console import Console
    from rich.text import Text

    text = Text(wrapped(f"{word}: {sentence}"))
    text.stylize(f"bold {colour}", 0, len(word) + 1)
    Console(soft_wrap=True).print(text)


def print_small(text: str) -> None:
    """What explains a table, dimmed where there is colour."""
    from rich.console import Console
    from rich.text import Text

    Console(soft_wrap=True).print(Text(wrapped(text), "dim"))


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers in words.

    >>> spans([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    text: list[str] = []
    run: list[int] = []
    for number in [*sorted(set(numbers)), math.inf]:
        if run and number != run[-1] + 1:
            text.append(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}")
            run = []
        run.append(int(number) if math.isfinite(number) else 0)
    return ", ".join(text)


def share(fraction: float | None, digits: int = 1) -> str:
    """A fraction as per cent; nothing for None.

    >>> share(0.9659), share(None)
    ('96.6 %', '')
    """
    return "" if fraction is None else f"{100 * fraction:.{digits}f} %"


def small(value: float) -> str:
    """A positive number of any size in six characters or so.

    >>> small(0.0372), small(0.00004), small(0.0), small(3.14159)
    ('0.0372', '4.0e-05', '0', '3.14')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.1e}" if value < 0.001 else f"{value:.4f}" if value < 1 else f"{value:.3g}"
