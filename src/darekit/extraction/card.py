# SPDX-License-Identifier: Apache-2.0
"""The model card of an adapter: what it was extracted from, how close it is, how to load it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from darekit.checkpoints.hub import looks_like_hub_id
from darekit.extraction.plan import ExtractPlan
from darekit.output.card import public_name
from darekit.wording import size_of

if TYPE_CHECKING:
    from darekit.extraction.writing import ExtractReport


def adapter_card(report: ExtractReport, plan: ExtractPlan, *, license: str | None) -> str:
    """A README.md."""
    base, model = public_name(plan.base.ref), public_name(plan.model.ref)
    metadata: dict[str, Any] = {"base_model": base} if looks_like_hub_id(base) else {}
    metadata |= {"base_model_relation": "adapter"} if metadata else {}
    metadata |= {"library_name": "peft", "tags": ["lora", "darekit"]} | ({"license": license} if license else {})
    terms = plan.terms
    word = next(name for name in ("rank", "energy", "error") if getattr(terms, name) is not None)
    asked = f"{word} {getattr(terms, word):g}"
    saved = sorted({one.kind for one in report.tensors if one.saved and not one.why})
    left = sorted({one.kind for one in report.tensors if not one.saved and one.norm})
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000).rstrip("\n"),
        "---",
        "",
        f"# {public_name(report.output)}",
        "",
        f"The difference of `{model}` from `{base}` as a LoRA adapter, extracted with darekit ({asked}):",
        f"{size_of(report.bytes)} instead of {size_of(report.model_bytes)}.",
        "",
        f"- rank: {report.rank} at most, {len(report.modules)} modules; every module's scale is 1",
        f"- {100 * report.energy:.4g} % of these modules' delta is kept (relative error {report.error:.3g})",
        f"- {100 * report.outside:.3g} % of the whole delta lies in tensors that the adapter does not hold"
        + (f" ({', '.join(left)})" if left else ""),
        *([f"- saved whole: {', '.join(saved)}"] if saved else []),
        "",
        "```python",
        "from peft import PeftModel",
        "model = PeftModel.from_pretrained(base_model, \"THIS FOLDER\")",
        "```",
        "",
    ]  # fmt: skip
    return "\n".join(lines)
