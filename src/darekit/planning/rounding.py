# SPDX-License-Identifier: Apache-2.0
"""What rounding into the output's format leaves of the changes: a sample before a merge, and words for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from darekit.dtypes import NEAREST
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
    seed = {} if plan.rounding is None else {"effective_seed": plan.rounding}
    return {"method": plan.recipe.rounding, **seed, "format": format_of(plan), **found}


def sample_rounding(plan: Plan) -> dict[str, Any] | None:
    """The same in advance, from the head of up to 256 tensors. The plan must be open."""
    return rounding_of(plan, sampled_records(plan.steps))


def rounding_lines(summary: Summary | None) -> Iterator[str]:
    """What happened to the changes, for people: in one line, or none where it is nothing."""
    if summary is None:
        return
    share, scale = summary["share"], summary["scale"]
    if "effective_seed" in summary:
        yield (
            f"stochastic: {_percent(share)} of the changes fell back to the base and the others went a whole step; on "
            f"average nothing is lost ({scale:.3g} of the merged delta is in the output)"
        )
    elif share >= MENTIONED:
        yield (
            f"{_percent(share)} of the changes are too small for {summary['format']} and are rounded back to the "
            f"base{_each(summary)}; {scale:.3g} of the merged delta is in the output"
        )


def swallowed_notes(summary: Summary | None) -> Iterator[str]:
    """A warning, where rounding to nearest undoes more than a fifth of the changes, in all or of one model."""
    if summary is None or summary["method"] != NEAREST:
        return
    shares = [share for share in (summary["share"], *summary["models"].values()) if share is not None]
    if max(shares) <= TOO_MANY:
        return
    yield (
        f"rounding to {summary['format']} undoes {_percent(summary['share'])} of the changes{_each(summary)}: they are "
        "smaller than half a step of that format. `dtype: float32` keeps them; `rounding: stochastic` keeps them on "
        "average, in a file of the same size; a larger lambda or weight loses fewer. DARE's survivors are larger and "
        "survive: a comparison with and without DARE in this format measures that, too"
    )


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
    return f"{100 * share:.3g} %"
