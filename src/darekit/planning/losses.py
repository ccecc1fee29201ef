# SPDX-License-Identifier: Apache-2.0
"""What rounding into the output's format leaves of the changes: a sample before a merge, and words for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from darekit.dtypes import NEAREST, STOCHASTIC
from darekit.engine.losses import summary_of
from darekit.engine.sampling import sampled_records
from darekit.engine.steps import is_counted
from darekit.planning.plan import Plan
from darekit.wording import label

TOO_MANY = 0.2  # of the changes that are rounded back to the base: then it is worth a warning
MENTIONED = 0.0005

Summary = Mapping[str, Any]


def names_of(plan: Plan) -> tuple[str, ...]:
    """What to call each model; of two models with one name the later ones carry their place."""
    seen: Counter[str] = Counter()
    names = []
    for k, summary in enumerate(plan.summaries):
        seen[summary.ref] += 1
        names.append(summary.ref if seen[summary.ref] == 1 else f"{summary.ref} #{k + 1}")
    return tuple(names)


def rounding_of(plan: Plan, records: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Tensors' records -> how results were rounded and what that left of the changes (`summary_of`), JSON-able; None
    where nothing was added to a base."""
    found = summary_of(records, names_of(plan))
    if found is None:
        return None
    how = {"method": NEAREST} if plan.rounding is None else {"method": STOCHASTIC, "effective_seed": plan.rounding}
    return {**how, "format": format_of(plan), **found}


def sample_rounding(plan: Plan) -> dict[str, Any] | None:
    """The same in advance, from the head of up to 128 tensors. The plan must be open."""
    return rounding_of(plan, sampled_records(plan.steps))


def rounding_lines(summary: Summary | None) -> Iterator[str]:
    """What happened to the changes, for people: in one line, or none where it is nothing."""
    if summary is None:
        return
    share = summary["share"]
    applied = (
        f"what is stored is {summary['scale']:.2f} times the merged delta, with an error of "
        f"{_percent(summary['error'])} of its length"
    )
    if summary["method"] == STOCHASTIC:
        yield f"stochastic: {_percent(share)} of the changes fell back to the base, none is lost on average: {applied}"
    elif share >= MENTIONED:
        yield (
            f"{_percent(share)} of the changes are too small for {summary['format']} and are rounded back to the "
            f"base{_each(summary)}: {applied}"
        )
    elif _is_off(summary):
        yield f"to {summary['format']}: {applied}"


def swallowed_notes(summary: Summary | None) -> Iterator[str]:
    """A warning, where rounding to nearest undoes more than a fifth of the changes, in all or of one model, or makes
    their length wrong by as much."""
    if summary is None or summary["method"] != NEAREST:
        return
    shares = [share for share in (summary["share"], *summary["models"].values()) if share is not None]
    if max(shares) > TOO_MANY:
        yield (
            f"rounding to {summary['format']} undoes {_percent(summary['share'])} of the changes{_each(summary)}, "
            "which are smaller than half a step of that format, and applies "
            f"{summary['scale']:.2f} times the merged delta. "
            "`dtype: float32` keeps all changes; `rounding: stochastic` keeps them on average, in a file of the same "
            "size. (A larger lambda or weight loses fewer, but is another merge.) DARE's survivors are larger, so "
            "fewer are lost: comparing with and without DARE measures that too, unless both are float32 or stochastic"
        )
    elif _is_off(summary):
        yield (
            f"the merged changes are about as large as the steps of {summary['format']}: rounding to it applies "
            f"{summary['scale']:.2f} times the merged delta. `rounding: stochastic` (a file of the same size) and "
            "`dtype: float32` apply it as it is"
        )


def _is_off(summary: Summary) -> bool:
    return bool(abs(summary["scale"] - 1) > TOO_MANY)


def format_of(plan: Plan) -> str:
    """The format that most of the changed elements are stored in."""
    formats: Counter[str] = Counter()
    for step in plan.steps:
        if is_counted(step):
            formats[step.dtype.torch_name] += step.count
    return formats.most_common(1)[0][0] if formats else "the output's format"


def _each(summary: Summary) -> str:
    found = {label(name): share for name, share in summary["models"].items() if share is not None}
    if len(found) < 2:
        return ""
    return f" ({', '.join(f'{name} {_percent(share)}' for name, share in found.items())})"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"
