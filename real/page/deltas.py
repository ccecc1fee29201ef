# SPDX-License-Identifier: Apache-2.0
"""What is in the deltas, before anything is tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from real import claims
from real.page.results import Results
from real.page.words import rate_word, table


def deltas(results: Results, page: Path) -> Iterator[str]:
    """What `dare inspect` and `dare recommend` say."""
    rows = []
    for one in claims.abilities(results):
        found, advice = results["steps"][f"inspect-{one}"], results["steps"].get(f"recommend-{one}", {})
        total = found["total"]
        rows.append((
            one, f"{found['median_r']:.4f}", f"{100 * total['zeros']:.1f} %", f"{100 * total['shares']['0.002']:.1f} %",
            f"{found['drop_rate']:g}", f"{advice.get('drop_rate', float('nan')):g}", found["verdict"],
        ))  # fmt: skip
    yield (
        "What `dare inspect` and `dare recommend` say before anything is tried: r is the size of a tensor's change relative to the "
        "tensor, and *zeros* are the elements that did not change at all, because the change was smaller than half a step of "
        "bfloat16."
    )
    yield table(("model", "median r", "zeros", "below .002", "inspect: p", "recommend: p", "verdict"), rows)
    with suppress(KeyError):
        words = results["steps"]["inspect-all"]["interference"]["words"]
        yield "Together:\n\n" + "\n".join(f"- {one}" for one in words)
    with suppress(KeyError):
        yield from _cosines(results)


def _cosines(results: Results) -> Iterator[str]:
    name = f"similarity-{claims.abilities(results)[0]}"
    found = results["steps"][name]
    rows = []
    for curve in found["curves"]:
        values = curve["cosine"]
        rows.append((curve["method"], rate_word(curve["drop_rate"]), f"{min(values):.4f}", f"{values[-1]:.4f}"))
    yield f"Cosine of the hidden states of `{name.partition('-')[2]}` before and after the drop (`dare similarity`):"
    yield table(("method", "p", "lowest layer", "last layer"), rows)
