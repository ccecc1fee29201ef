# SPDX-License-Identifier: Apache-2.0
"""The page of `dare inspect --plot`: is it the base, where did fine-tuning change most, do the models conflict."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darekit.analysis.drawing import draw_inspection, octaves, place_of, sides_of
from darekit.analysis.inspection import DECILES, Comparison, Inspection, TensorReport
from darekit.analysis.interference import Interference, TensorInterference
from darekit.analysis.records import RECORD, read_inspection
from darekit.reports.charts import Line, Point, Square, curves, heat_map
from darekit.reports.page import MINUS, Copy, Figure, Key, Number, Page, Plot, Section, Table, View
from darekit.wording import and_, distinct_labels, label

_WORST = {"ok": 0, "large": 1, "wrong_base": 2}
_TONES = {"ok": "good", "large": "plain", "wrong_base": "bad"}
_PAIRS = 4  # that the verdict names
_KINDS = 60  # rows of a heat map; experts that are stored one by one would be hundreds
_ROWS = 2000  # of the table of tensors
_EXPERT = re.compile(r"\.\d+\.")
_CLICK = "Point at a square for its tensor, click to copy the tensor's name."


@dataclass(frozen=True)
class _Found:
    """What `inspect` found, one or several models, and their short names."""

    base: str
    models: tuple[Inspection, ...]
    names: list[str]
    interference: Interference | None
    notes: tuple[str, ...]


def inspection_page(folder: Path) -> Page:
    """A folder of `dare inspect --plot` -> its page."""
    found = _read(folder)
    verdict, tone, details = _verdict(found)
    title = f"{and_(found.names)} on {label(found.base)}"
    return Page(
        "Inspection", title, verdict, tone, details, "",
        tuple(_numbers(found)), tuple(_facts(found)), None, tuple(_sections(found)),
        tuple(f"{note}." for note in found.notes),
    )  # fmt: skip


def pulls(folder: Path) -> tuple[Plot | Table, ...]:
    """Of several models that were inspected into a folder, how they pull against each other; else nothing."""
    if not (folder / RECORD).is_file():
        return ()
    found = _read(folder)
    return tuple(_together(found, found.interference)) if found.interference and found.interference.tensors else ()


def draw_inspection_folder(folder: Path, into: Path) -> list[Path]:
    """The plots that `dare inspect --plot` draws, drawn again."""
    return draw_inspection(read_inspection(folder), into)


def _read(folder: Path) -> _Found:
    found = read_inspection(folder)
    models = found.models if isinstance(found, Comparison) else (found,)
    interference = found.interference if isinstance(found, Comparison) else None
    notes = dict.fromkeys([*found.notes, *(note for one in models for note in one.notes)])
    return _Found(found.base, models, distinct_labels([one.model for one in models]), interference, tuple(notes))


def _verdict(found: _Found) -> tuple[str, str, tuple[str, ...]]:
    """That of the worst model, and who pulls against whom."""
    worst = max(found.models, key=lambda one: _WORST.get(one.verdict, 0))
    together = list(found.interference.words) if found.interference else []
    pairs = [line for line in together[:-1] if "nearly independent" not in line]
    details = [*pairs[:_PAIRS], *together[-1:]]
    if together and not pairs:
        details.insert(0, "No two models pull against each other, or the same way")
    tone = _TONES.get(worst.verdict, "plain")
    said = tuple(f"{line}." for line in details)
    if worst.verdict != "ok" or len(found.models) == 1:
        return f"{worst.words}.", tone, said
    return f"{label(found.base)} looks like the base of all {len(found.models)} models.", tone, said


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _numbers(found: _Found) -> Iterator[Number]:
    for name, one in list(zip(found.names, found.models, strict=True))[:3]:
        rate = f"{math.floor(one.recommended * 1000) / 10:g} %"
        yield Number(
            f"{name}: may be dropped", rate, f"median r {one.median_r:.4f}, unmoved {_percent(one.total.zeros)}"
        )
    if found.interference:
        total = found.interference.total
        note = f"{_percent(total.chance_conflict, 0)} if they were independent"
        yield Number("Signs conflict", _percent(total.conflict, 0), note)


def _facts(found: _Found) -> Iterator[tuple[str, str]]:
    yield "base", found.base
    yield ("model" if len(found.models) == 1 else "models"), ", ".join(one.model for one in found.models)
    yield "tensors", f"{max(len(one.tensors) for one in found.models):,}"
    yield "parameters", f"{max(one.total.parameters for one in found.models):,}"


def _sections(found: _Found) -> Iterator[Section]:
    if not any(one.tensors for one in found.models):
        return
    yield Section("Where fine-tuning changed the model", (_r_map(found), _share_map(found), _tensor_table(found)))
    yield Section("How large the deltas are", tuple(_sizes(found)))
    if found.interference and found.interference.tensors:
        yield Section("How the models pull against each other", tuple(_together(found, found.interference)))


# --- tensors ---


def _grid(
    reports: Sequence[Any], value: Callable[[Any], float], text: Callable[[float], str],
    says: Callable[[Any], tuple[str, ...]],
) -> dict[tuple[str, str], Square]:  # fmt: skip
    """(kind, layer) -> the tensor there; of experts, where they are many, the one with the largest number."""
    places = {one.name: place_of(one.name) for one in reports}
    if len({kind for kind, _ in places.values()}) > _KINDS:
        places = {name: (_EXPERT.sub(".*.", kind), layer) for name, (kind, layer) in places.items()}
    there: dict[tuple[str, str], list[Any]] = {}
    for one in reports:
        there.setdefault(places[one.name], []).append(one)
    squares = {}
    for place, many in there.items():
        one = max(many, key=lambda report: (abs(value(report)), report.name))
        among = (f"the largest of {len(many)} tensors here",) if len(many) > 1 else ()
        squares[place] = Square(
            value(one), text(value(one)), (one.name, *among, *says(one)), Copy(one.name, one.name, "name")
        )
    return squares


def _map(
    squares: Mapping[tuple[str, str], Square],
    tables: Sequence[Mapping[tuple[str, str], Square]],
    bar: str,
    **scale: Any,
) -> Figure:
    kinds, layers = sides_of([{place: s.value for place, s in table.items()} for table in tables])
    return heat_map(layers, kinds, squares, "layer (other: outside the layers)", "", bar, **scale)


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "inf"
    return f"{value:.2g}" if value >= 1 or value == 0 else "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0")


def _tensor_says(one: TensorReport) -> tuple[str, ...]:
    shape = " \N{MULTIPLICATION SIGN} ".join(map(str, one.shape))
    dense = f", {one.group}: keep dense" if one.group and one.group != "heads" else ""
    return (
        f"{shape}{dense}", f"r {one.r:.4g}", f"p_max {math.floor(one.p_max * 1000) / 1000:g}",
        f"unmoved {_percent(one.zeros)}", f"largest |delta| {one.deciles[-1]:.3g}",
    )  # fmt: skip


def _r_map(found: _Found) -> Plot:
    grids = [_grid(one.tensors, lambda t: t.r, _short, _tensor_says) for one in found.models]
    sizes = [s.value for grid in grids for s in grid.values() if 0 < s.value < math.inf]
    low, high = (min(sizes), max(sizes)) if sizes else (1e-4, 1e-3)
    views = tuple(
        View(name, (("", _map(grid, grids, "r", low=low, high=max(high, low * 1.01), log=True)),))
        for name, grid in zip(found.names, grids, strict=True)
    )
    how = "r = ‖delta‖ / ‖base‖ by kind of tensor and layer: how far fine-tuning moved each."
    return Plot("r of every tensor", how, views, None, "Model", _CLICK)


def shares_of(one: Inspection) -> dict[str, float]:
    """Tensor -> its share of the squared length of the whole delta."""
    whole = math.fsum(tensor.norm**2 for tensor in one.tensors)
    return {tensor.name: tensor.norm**2 / whole if whole else 0.0 for tensor in one.tensors}


def _share_grid(one: Inspection, shares: Mapping[str, float]) -> dict[tuple[str, str], Square]:
    return _grid(
        one.tensors, lambda t: 100 * shares[t.name], "{:.1f}".format,
        lambda t: (f"{_percent(shares[t.name], 2)} of the change", *_tensor_says(t)),
    )  # fmt: skip


def _share_map(found: _Found) -> Plot:
    grids = [_share_grid(one, shares_of(one)) for one in found.models]
    high = max((s.value for grid in grids for s in grid.values()), default=1.0)
    views = tuple(
        View(name, (("", _map(grid, grids, "% of the change", low=0.0, high=high or 1.0)),))
        for name, grid in zip(found.names, grids, strict=True)
    )
    how = (
        "How much of the whole delta lies in each tensor, as a share of its squared length. Large tensors have more of "
        "it at the same r."
    )
    return Plot("Share of the change", how, views, None, "Model", _CLICK)


def _tensor_table(found: _Found) -> Table:
    several = len(found.models) > 1
    header = ["tensor", "elements"]
    columns: list[Mapping[str, tuple[str, ...]]] = []
    for name, one in zip(found.names, found.models, strict=True):
        shares = shares_of(one)
        header += [f"{word}, {name}" if several else word for word in ("r", "p_max", "unmoved", "share of the change")]
        columns.append({
            t.name: (f"{t.r:.4g}", f"{math.floor(t.p_max * 1000) / 1000:g}", _percent(t.zeros),
                     _percent(shares[t.name], 2))
            for t in one.tensors
        })  # fmt: skip
    sizes = {t.name: t.parameters for one in found.models for t in one.tensors}
    rows = tuple(
        (name, f"{size:,}", *(cell for column in columns for cell in column.get(name, ("",) * 4)))
        for name, size in sizes.items()
    )
    title, names = "Every tensor", list(sizes)
    if len(names) > _ROWS:
        most: dict[str, float] = {}
        for tensor in (tensor for one in found.models for tensor in one.tensors):
            most[tensor.name] = max(tensor.r, most.get(tensor.name, 0.0))
        kept = {*sorted(names, key=lambda name: -most[name])[:_ROWS]}
        title = f"The {_ROWS:,} of {len(names):,} tensors that moved most; inspection.json has all"
        rows = tuple(row for row in rows if row[0] in kept)
        names = [name for name in names if name in kept]
    return Table(title, tuple(header), rows, 1, tuple(Copy(name, name, "name") for name in names), (), True)


def _sizes(found: _Found) -> Iterator[Plot]:
    keys = tuple(Key(name, i) for i, name in enumerate(found.names)) if len(found.names) > 1 else ()
    lines, ranks = [], []
    for i, (name, one) in enumerate(zip(found.names, found.models, strict=True)):
        edges, shares = octaves(one)
        points = [
            Point(float(edge) * math.sqrt(2), 100 * float(share),
                  (name, f"{100 * share:.2f} % of the parameters", f"have |delta| from {edge:.3g} to {2 * edge:.3g}"))
            for edge, share in zip(edges, shares, strict=True)
        ]  # fmt: skip
        lines.append(Line(name, tuple(points), i))
        deciles = [(100 * q, value) for q, value in zip(DECILES, one.total.deciles, strict=True) if value > 0]
        says = [(name, f"{q:.0f} % have |delta| below {value:.3g}") for q, value in deciles]
        ranks.append(Line(name, tuple(Point(q, v, s) for (q, v), s in zip(deciles, says, strict=True)), i))
    powers = {"type": "log", "dtick": 1, "exponentformat": "power"}
    first = curves(lines, {"title": "|delta|, in steps of a factor of 2", **powers},
                   {"title": "% of the parameters", "rangemode": "tozero"})  # fmt: skip
    second = curves(ranks, {"title": "% of the parameters with a smaller |delta|", "dtick": 20},
                    {"title": "|delta|", **powers})  # fmt: skip
    zeros = ", ".join(f"{n} {_percent(o.total.zeros)}" for n, o in zip(found.names, found.models, strict=True))
    how = (
        f"Deltas of exactly 0 are left out: {zeros}. The paper's models, of which 90 % and more could be dropped, lie "
        "below 0.002 to 0.005 nearly everywhere."
    )
    table = Table(
        "Deciles of |delta|", ("model", *(f"{100 * q:.0f} %" for q in DECILES)),
        tuple((n, *(f"{d:.3g}" for d in o.total.deciles)) for n, o in zip(found.names, found.models, strict=True)),
        1, (), (), True,
    )  # fmt: skip
    yield Plot("Sizes of the deltas", how, (View("", (("Histogram", first), ("Deciles", second)), keys),), table)


# --- several models ---


def _together(found: _Found, all_of_them: Interference) -> Iterator[Plot | Table]:
    names = found.names
    pairs = list(zip(all_of_them.pairs, all_of_them.total.pairs, all_of_them.mean_cosine, strict=True))
    said = [f"{names[i]} & {names[j]}" for (i, j), _, _ in pairs]
    cosine: dict[tuple[str, str], Square] = {(n, n): Square(1.0, "1", (n, "cosine 1")) for n in names}
    signs: dict[tuple[str, str], Square] = {(n, n): Square(100.0, "100", (n, "equal signs 100 %")) for n in names}
    for pair, ((i, j), relation, _) in zip(said, pairs, strict=True):
        for place in ((names[i], names[j]), (names[j], names[i])):
            cosine[place] = Square(relation.cosine, f"{relation.cosine:.2f}", (pair, f"cosine {relation.cosine:.4f}"))
            if relation.agreement is not None:
                share = 100 * relation.agreement
                signs[place] = Square(share, f"{share:.0f}", (pair, f"equal signs {share:.1f} %"))
    matrices = (
        View("cosine", (("", heat_map(names, names, cosine, "", "", "cosine", low=-1, high=1, diverging=True)),)),
        View("equal signs", (("", heat_map(names, names, signs, "", "", "%", low=0, high=100, diverging=True)),)),
    )
    table = Table(
        "Every pair of models", ("pair", "cosine", "tensor mean", "equal signs", "both moved", "opposite"),
        tuple(
            (pair, f"{r.cosine:.4f}".replace("-", MINUS), f"{mean:.4f}".replace("-", MINUS),
             "" if r.agreement is None else _percent(r.agreement), _percent(r.overlap), _percent(r.conflict))
            for pair, (_, r, mean) in zip(said, pairs, strict=True)
        ), 1, (), (), False,
    )  # fmt: skip
    yield Plot("Do they pull the same way?", "Independent deltas have cosine 0 and 50 % equal signs.", matrices, table)
    yield _by_layer(all_of_them, said)


def _by_layer(found: Interference, said: Sequence[str]) -> Plot:
    def says(one: TensorInterference) -> tuple[str, ...]:
        pairs = tuple(f"cosine of {pair}: {r.cosine:.3f}" for pair, r in zip(said, one.pairs, strict=True))[:6]
        return (
            f"signs conflict in {_percent(one.conflict)} (by chance {_percent(one.chance_conflict)})",
            f"a plain sum cancels {_percent(one.cancelled)} (by chance {_percent(one.chance_cancelled)})", *pairs,
        )  # fmt: skip

    conflict = _grid(found.tensors, lambda t: 100 * t.conflict, "{:.0f}".format, says)
    cancelled = _grid(found.tensors, lambda t: 100 * t.cancelled, "{:.0f}".format, says)
    high = max(1.0, *(s.value for grid in (conflict, cancelled) for s in grid.values()))
    views = [
        View("signs that conflict, %", (("", _map(conflict, [conflict], "%", low=0.0, high=high)),)),
        View("size that a sum cancels, %", (("", _map(cancelled, [cancelled], "%", low=0.0, high=high)),)),
    ]
    for at, pair in enumerate(said):
        grid = _grid(found.tensors, lambda t, at=at: t.pairs[at].cosine, "{:.2f}".format, says)  # type: ignore[misc]
        size = max(0.1, *(abs(s.value) for s in grid.values()))
        figure = _map(grid, [grid], "cosine", low=-size, high=size, diverging=True)
        views.append(View(f"cosine of {pair}", (("", figure),)))
    return Plot("Interference by layer", "By kind of tensor and layer.", tuple(views), pointer=_CLICK)
