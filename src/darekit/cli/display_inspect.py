# SPDX-License-Identifier: Apache-2.0
"""What `dare inspect` shows: the verdict and what follows from it, then tables by kind of tensor and by layer."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from darekit.analysis.interference import TOGETHER
from darekit.cli import tables
from darekit.cli.display import count_of, print_table, say_note
from darekit.planning.rates import MOST, PAYS_FIRST
from darekit.wording import distinct_labels, label

if TYPE_CHECKING:
    from rich.table import Table

    from darekit.analysis.inspection import Comparison, Inspection, TensorReport
    from darekit.analysis.interference import Interference, Relation, TensorInterference
    from darekit.cli.tables import Kind

Fact = tuple[str, str]

PERCENT_COLUMNS = ("10%", "50%", "90%", "max")
SHARES_SHOWN = ("0.002",)  # of the limits that are counted: nearly all of a usual delta is below it
AGAINST, TWICE, SAME_WAY, INDEPENDENT, APART = "against", "the same", "same way", "independent", "apart"
MEANINGS = {
    AGAINST: "summed, each takes from the other",
    TWICE: "is this one model twice?",
    SAME_WAY: "summed, what they share doubles",
    INDEPENDENT: "a sum holds both",
    APART: "they moved no element in common",
}
PAIRS_TOLD = 3  # of each standing, in words
STANDS_OUT = 1.1  # times the median: less is said to be like the others
PAIRS = 6  # pairs of models that are shown; the others are counted
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def show_inspections(found: Inspection | Comparison, drawn: Sequence[Path], *, tensors: bool, as_json: bool) -> None:
    """The verdict and what follows from it, then a table by kind of tensor, or with `tensors` of every one."""
    from darekit.analysis.inspection import Comparison

    if as_json:
        print(json.dumps(found.to_data() | ({"plots": [str(path) for path in drawn]} if drawn else {})))
        return
    if isinstance(found, Comparison):
        _show_comparison(found, tensors=tensors)
    else:
        _show_inspection(found, tensors=tensors)
    sys.stdout.flush()  # notes come after what they are about
    for note in found.notes:
        say_note(note)
    for path in drawn:
        print(path)


# --- one model


def _show_inspection(one: Inspection, *, tensors: bool) -> None:
    kinds, everything = tables.kinds_of(one.tensors), tables.whole(one.tensors)
    tables.print_headline(one.verdict, _judged(one), tables.COLOURS[one.verdict])
    print()
    tables.print_facts(_facts(one, kinds, everything))
    print()
    if tensors:
        print_table(_deltas([*one.tensors, one.total]))
        return
    rows = [*kinds, everything]
    layers = tables.layers_of(rows)
    table, room = tables.with_bars(
        ("kind of tensor", "parameters", "r", "p_max", "zeros", *(f"<{limit}" for limit in SHARES_SHOWN)),
        [
            (
                tables.shorten(kind.name, tables.LONGEST), count_of(kind.parameters), tables.small(_r(kind)),
                "dense" if tables.is_one_term(kind.name)
                else tables.floored(kind.median(lambda tensor: tensor.p_max), 3),
                tables.share(kind.mean(lambda tensor: tensor.zeros)), *_shares(kind),
            )
            for kind in rows
        ],
        [_course(kind) for kind in rows], layers,
    )  # fmt: skip
    print_table(table)
    print()
    tables.print_small(
        "r: ||delta|| / ||base||. p_max: the drop rate that moves the output by 20 %, by a rule of thumb from small "
        "models (dense: better kept whole). Both are the median tensor's. zeros, <0.002: shares of |delta|."
        + tables.bar_legend("r", layers, room, "the largest in its row")
        + " Every tensor: --tensors."
    )


def _judged(one: Inspection) -> str:
    """The verdict in a sentence."""
    base, model = label(one.base), label(one.model)
    if one.verdict == "wrong_base":
        return f"{base} does not look like the base of {model}."
    if one.total.zeros == 1:
        return f"{base} and {model} are identical."
    drop = f"about {_floored(one.recommended)} of the delta can be dropped"
    if one.verdict == "large":
        return f"{model} is far from {base}: its deltas are large, yet {drop}."
    return f"{base} looks like the base of {model}, and {drop}."


def _facts(one: Inspection, kinds: Sequence[Kind[TensorReport]], everything: Kind[TensorReport]) -> Iterator[Fact]:
    """Is this the base, how much may go, what moved, what did not, what next?"""
    yield "base", _meaning(one.verdict, one.median_r)
    if one.verdict == "wrong_base" or one.total.zeros == 1:
        return
    most = math.floor(one.recommended * 1000) / 1000
    yield "drop", f"up to p = {most:g} by a rule of thumb; keep embeddings, norms and biases dense"
    yield "cost", PAYS_FIRST if one.recommended == MOST else ""
    yield "moved most", _moved_most(kinds, one.median_r)
    yield "unchanged", _unchanged(kinds, everything)
    yield "next", f"dare recommend {shlex.join([one.base, one.model])}"


def _meaning(verdict: str, median_r: float) -> str:
    r = tables.small(median_r)
    if verdict == "wrong_base":
        return (f"the median tensor differs by r = {r} of its norm; fine-tuning moves it by 0.001 to 0.1. Name the "
                "checkpoint that the model was fine-tuned from")  # fmt: skip
    if verdict == "large":
        return f"the median tensor moved by r = {r} of its norm, as after continued pre-training"
    return f"the median tensor moved by r = {r} of its norm; 0.001 to 0.1 is usual"


def _moved_most(kinds: Sequence[Kind[TensorReport]], median_r: float) -> str:
    finite = [kind for kind in kinds if math.isfinite(_r(kind))]
    if not finite:
        return ""
    most = max(finite, key=_r)
    course = _course(most)
    at = max(course, key=course.__getitem__, default=-1)
    if len(course) < 2 or course[at] < STANDS_OUT * _r(most):
        at = -1
    if at < 0 and len(finite) > 1 and _r(most) < STANDS_OUT * median_r:
        return "nothing stands out: all kinds and layers moved alike"
    text = f"{most.name}, r = {tables.small(_r(most))}"
    if at >= 0:
        text += f"; most of all in layer {at}, r = {tables.small(course[at])}"
    return text


def _unchanged(kinds: Sequence[Kind[TensorReport]], everything: Kind[TensorReport]) -> str:
    """Kinds and layers in which no element changed."""

    def still(kind: Kind[TensorReport]) -> bool:
        return all(tensor.zeros == 1 for tensor in kind.tensors)

    parts = [kind.name for kind in kinds if still(kind)]
    layers = [i for i, layer in everything.by_layer().items() if still(layer)]
    if layers:
        parts.append(f"{'layer' if len(layers) == 1 else 'layers'} {tables.spans(layers)}")
    return ", ".join(parts)


def _r(kind: Kind[TensorReport]) -> float:
    return kind.median(lambda tensor: tensor.r)


def _course(kind: Kind[TensorReport]) -> dict[int, float]:
    found = {layer: _r(part) for layer, part in kind.by_layer().items()}
    return {layer: r for layer, r in found.items() if math.isfinite(r)}


def _shares(kind: Kind[TensorReport]) -> Iterator[str]:
    for limit in SHARES_SHOWN:
        yield tables.share(kind.mean(lambda tensor, limit=limit: tensor.shares[limit]))  # type: ignore[misc]


def _floored(fraction: float) -> str:
    return f"{math.floor(fraction * 1000) / 10:g} %"


def _deltas(reports: Sequence[TensorReport], head: Sequence[str] = ("tensor", "shape")) -> Table:
    """A row for each tensor, with everything that is known of it."""
    heads = (*head, "r", "p_max", "zeros", *(f"<{limit}" for limit in reports[-1].shares),
             *(f"|d| {name}" for name in PERCENT_COLUMNS))  # fmt: skip
    rows = [
        (
            *(report.name, "x".join(map(str, report.shape)))[: len(head)], f"{report.r:.4f}",
            tables.floored(report.p_max, 4), tables.share(report.zeros), *map(tables.share, report.shares.values()),
            *(f"{report.deciles[i]:.1e}" for i in (1, 5, 9, 10)),
        )
        for report in reports
    ]  # fmt: skip
    return tables.table_of(heads, rows, len(head))


# --- several models


def _show_comparison(found: Comparison, *, tensors: bool) -> None:
    names = distinct_labels([one.model for one in found.models])
    letters = [LETTERS[k] if k < len(LETTERS) else str(k + 1) for k in range(len(names))]
    together = found.interference
    kinds = tables.kinds_of(together.tensors)
    everything = tables.whole(together.tensors)
    worst = max((one.verdict for one in found.models), key=[*tables.COLOURS].index)
    tables.print_headline(worst, _judged_together(found, names), tables.COLOURS[worst])
    print()
    tables.print_facts(_facts_together(found, names, kinds))
    print()
    _print_models(found, names, letters)
    print()
    if tensors:
        print_table(_deltas([replace(one.total, name=n) for one, n in zip(found.models, names, strict=True)],
                            ("model",)))  # fmt: skip
        print()
    pairs = [f"{letters[i]} & {letters[j]}" for i, j in together.pairs]
    shown = sorted(range(len(pairs)), key=lambda at: -abs(together.total.pairs[at].cosine))[:PAIRS]
    _print_pairs(together, sorted(shown), pairs, kinds, everything)
    print()
    if tensors:
        print_table(_relations([*together.tensors, together.total], pairs))
    else:
        _print_kinds(together, pairs, [*kinds, everything])
    print()
    tables.print_small(
        "conflict: elements that some models raise and others lower. cancelled: what a plain sum loses of the deltas' "
        "size. Independent deltas of equal size that move the same elements have "
        f"{100 * together.total.chance_conflict:.0f} % and {100 * together.total.chance_cancelled:.0f} %. equal signs: "
        "of the elements that both moved; chance gives 50 %. "
        f"Bars of r go from 0 to the largest in their row, those of cosines to at least {TOGETHER:g}."
        + ("" if tensors else " Every tensor: --tensors.")
    )


def _judged_together(found: Comparison, names: Sequence[str]) -> str:
    base = label(found.base)
    wrong = [name for one, name in zip(found.models, names, strict=True) if one.verdict == "wrong_base"]
    if wrong:
        return f"{base} does not look like the base of {_listed(wrong)}."
    least = min(one.recommended for one in found.models)
    drop = f"about {_floored(least)} of each delta can be dropped"
    large = [name for one, name in zip(found.models, names, strict=True) if one.verdict == "large"]
    if large:
        return f"{_listed(large)} {'is' if len(large) == 1 else 'are'} far from {base}: large deltas, yet {drop}."
    return f"{base} looks like the base of all {len(names)} models, and {drop}."


def _facts_together(
    found: Comparison, names: Sequence[str], kinds: Sequence[Kind[TensorInterference]]
) -> Iterator[Fact]:
    """Are these models of this base, which pairs fight and where, which share something, what does a sum of all do?"""
    together = found.interference
    low, high = (tables.small(pick(one.median_r for one in found.models)) for pick in (min, max))
    yield "base", f"their median tensors moved by r = {low} to {high}; 0.001 to 0.1 is usual"
    least = min(found.models, key=lambda one: one.recommended)
    alike = all(one.recommended == least.recommended for one in found.models)
    yield (
        "drop",
        f"at most {_floored(least.recommended)} of "
        + ("each" if alike else f"{label(least.model)}, more of the others") + ", by a rule of thumb",
    )  # fmt: skip
    yield "cost", PAYS_FIRST if least.recommended == MOST else ""
    pairs: dict[str, list[int]] = {}
    for at, relation in enumerate(together.total.pairs):
        pairs.setdefault(_standing(relation), []).append(at)
    if AGAINST not in pairs:
        yield AGAINST, "no two models pull against each other"
    for standing in (AGAINST, TWICE, SAME_WAY):
        ordered = sorted(pairs.get(standing, ()), key=lambda at: -abs(together.total.pairs[at].cosine))
        for at in ordered[:PAIRS_TOLD]:
            i, j = together.pairs[at]
            where, cosine = _most(kinds, at)
            yield (
                standing,
                (
                    f"{names[i]} and {names[j]}: cosine {together.total.pairs[at].cosine:.2f}, most in {where} "
                    f"({cosine:.2f}); {MEANINGS[standing]}"
                ),
            )
        if len(ordered) > PAIRS_TOLD:
            yield standing, f"and {len(ordered) - PAIRS_TOLD} more pairs"
    for standing in (INDEPENDENT, APART):
        if standing in pairs:
            yield standing, f"{len(pairs[standing])} of {len(together.pairs)} pairs; {MEANINGS[standing]}"
    yield (
        "sum",
        (
            f"a plain sum cancels {100 * together.total.cancelled:.0f} % of the deltas' size; signs conflict in "
            f"{100 * together.total.conflict:.0f} % of the elements"
        ),
    )


def _standing(relation: Relation) -> str:
    """How two deltas stand to each other, in a word."""
    if relation.agreement is None:
        return APART
    if relation.cosine > 1 - 1e-6:
        return TWICE
    return SAME_WAY if relation.cosine > TOGETHER else AGAINST if relation.cosine < -TOGETHER else INDEPENDENT


def _most(kinds: Sequence[Kind[TensorInterference]], pair: int) -> tuple[str, float]:
    """The kind of tensor in which a pair's cosine is farthest from 0."""
    cosines = [(kind.name, _cosine(kind, pair)) for kind in kinds]
    return max(cosines, key=lambda one: abs(one[1]))


def _cosine(kind: Kind[TensorInterference], pair: int) -> float:
    return kind.mean(lambda tensor: tensor.pairs[pair].cosine) or 0.0


def _cosines(kind: Kind[TensorInterference], pair: int) -> dict[int, float]:
    """Layer -> size of a pair's mean cosine."""
    return {layer: abs(_cosine(part, pair)) for layer, part in kind.by_layer().items()}


def _print_models(found: Comparison, names: Sequence[str], letters: Sequence[str]) -> None:
    wholes = [tables.whole(one.tensors) for one in found.models]
    rows = [
        (letter, tables.shorten(name, tables.LONGEST), one.verdict,
         tables.share(math.floor(one.recommended * 1000) / 1000), tables.small(one.median_r),
         tables.share(one.total.zeros))
        for one, name, letter in zip(found.models, names, letters, strict=True)
    ]  # fmt: skip
    layers = tables.layers_of(wholes)
    heads = ("", "model", "verdict", "can drop", "r", "zeros")
    table, _ = tables.with_bars(heads, rows, [_course(one) for one in wholes], layers, words=3, what="r, ")
    print_table(table)


def _print_pairs(
    together: Interference,
    shown: Sequence[int],
    pairs: Sequence[str],
    kinds: Sequence[Kind[TensorInterference]],
    everything: Kind[TensorInterference],
) -> None:
    rows = []
    for at in shown:
        relation = together.total.pairs[at]
        standing = _standing(relation)
        where = "" if standing in (INDEPENDENT, APART) else tables.shorten(_most(kinds, at)[0], tables.LONGEST)
        rows.append((pairs[at], standing, where, f"{relation.cosine:.3f}", f"{together.mean_cosine[at]:.3f}",
                     tables.share(relation.agreement)))  # fmt: skip
    courses = [_cosines(everything, at) for at in shown]
    table, _ = tables.with_bars(
        ("pair", "", "most in", "cosine", "tensor mean", "equal signs"), rows, courses, tables.layers_of([everything]),
        top=_top(courses), words=3, what="|cosine|, ",
    )  # fmt: skip
    print_table(table)
    if len(shown) < len(pairs):
        print(f"{len(pairs) - len(shown)} more pairs have smaller cosines; --json has them all")


def _top(courses: Sequence[Mapping[int, float]]) -> float:
    """What a full bar of cosines is: never so little that chance fills it."""
    return max([TOGETHER, *(value for course in courses for value in course.values())])


def _print_kinds(together: Interference, pairs: Sequence[str], kinds: Sequence[Kind[TensorInterference]]) -> None:
    total = together.total
    heads = ["kind of tensor", "conflict", "cancelled"]
    rows = [
        [tables.shorten(kind.name, tables.LONGEST), tables.share(kind.mean(lambda tensor: tensor.conflict)),
         tables.share(kind.mean(lambda tensor: tensor.cancelled))]
        for kind in kinds[:-1]
    ]  # fmt: skip
    rows.append([kinds[-1].name, tables.share(total.conflict), tables.share(total.cancelled)])
    widths = [max(len(line[i]) for line in (heads, *rows)) for i in range(len(heads))]
    room = tables.columns() - sum(widths) - tables.SPACE * len(widths)
    by_size = sorted(range(len(pairs)), key=lambda at: -abs(total.pairs[at].cosine))
    fitting = max(1, room // (len(f"cos {pairs[0]}") + tables.SPACE))
    for at in sorted(by_size[:fitting]):
        heads.append(f"cos {pairs[at]}")
        for row, kind in zip(rows, kinds[:-1], strict=False):
            row.append(f"{_cosine(kind, at):.3f}")
        rows[-1].append(f"{total.pairs[at].cosine:.3f}")
    courses = [_cosines(kind, by_size[0]) for kind in kinds]
    table, _ = tables.with_bars(
        heads, rows, courses, tables.layers_of(kinds), top=_top(courses), what=f"|cos {pairs[by_size[0]]}|, "
    )
    print_table(table)


def _relations(rows: Sequence[TensorInterference], pairs: Sequence[str]) -> Table:
    """A row for each tensor, with every pair."""
    heads = ("tensor", "conflict", "cancelled", *(f"cos {pair}" for pair in pairs),
             *(f"signs {pair}" for pair in pairs))  # fmt: skip
    cells = [
        (row.name, tables.share(row.conflict), tables.share(row.cancelled), *(f"{one.cosine:.3f}" for one in row.pairs),
         *(tables.share(one.agreement) for one in row.pairs))
        for row in rows
    ]  # fmt: skip
    return tables.table_of(heads, cells)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
