# SPDX-License-Identifier: Apache-2.0
"""The model card of a pack: what it is, how to use it in three commands, and the metadata that the Hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from darekit.output.card import CITATION

UNKNOWN = "BASE"


def pack_card(
    info: Mapping[str, Any],
    *,
    filename: str,
    repository: str | None,
    base_model: str | None,
    base_revision: str | None,
    license: str | None,
) -> str:
    """A README.md.

    Args:
        info: of the pack, see `Pack.info`.
        filename: of the pack beside the card.
        repository: where it will lie on the Hub; None: in a folder.
        base_model: Hub id of the base; None where that is unknown.
        base_revision: its commit, where that is known.
        license: of the model.
    """
    exact = not any(word.startswith("int") for word in info["encodings"])
    metadata: dict[str, Any] = {"base_model": [base_model]} if base_model else {}
    # The Hub knows no relation "delta": its words are adapter, merge, quantized and finetune.
    metadata |= {"base_model_relation": "finetune" if exact else "quantized"} if base_model else {}
    metadata |= {"base_model_revision": base_revision} if base_model and base_revision else {}
    metadata |= {"library_name": "darekit", "tags": ["delta", "dare", "darekit"]}
    metadata |= {"license": license} if license else {}
    at = f"@{base_revision}" if base_model and base_revision else ""
    base = f"{base_model or UNKNOWN}{at}"
    origin = base_model or _plain(info["base"]["ref"])
    name = filename.removesuffix(".safetensors").removesuffix(".pack")
    settings = info["settings"]
    lossless = bool(settings.get("lossless"))
    share = f"{100 * info['kept'] / info['parameters'] if info['parameters'] else 0:.3g} %"
    what = (
        "It holds the exact model, bit for bit."
        if lossless
        else f"{share} of the model's elements are stored; which ones is a function of the seed {info['seed']}."
    )
    sizes = f"{info['bytes'] / 1e6:.3g} MB instead of {info['model_bytes'] / 1e6:.4g} MB"
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000).rstrip("\n"),
        "---",
        "",
        f"# {name}",
        "",
        f"A delta pack: `{_plain(info['model'].get('ref') or name)}`, stored as its difference from `{origin}`.",
        f"It takes {sizes} ({info['ratio']:.3g} times smaller). {what}",
        "",
        *(f"- {key.replace('_', ' ')}: {_plain(value)}" for key, value in settings.items() if not lossless),
        f"- base: `{origin}`" + (f" at commit `{base_revision}`" if base_revision else ""),
        f"- fingerprint of the base: `{info['base']['sample_digest']}`; another base is refused",
        f"- fingerprint of the result: `{info['content_digest']}`",
        "",
        "## Use it",
        "",
        "```sh",
        "pip install darekit",
        f"dare pull {repository}" if repository else f"dare verify {filename}",
        f"dare unpack {base} {filename} {name}",
        "```",
        "",
        *([] if base_model else [f"`{UNKNOWN}` is your copy of the base.", ""]),
        "The last command writes an ordinary model directory. Together with its base, a pack can also be used like a",
        "model: in a recipe for `dare merge`, in `dare inspect`, and on a live model with `darekit.Switcher`.",
        "",
        "## Cite",
        "",
        "```bibtex",
        CITATION.rstrip("\n"),
        "```",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """On one line, without what would end a code span."""
    text = "+".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
    return " ".join(text.split()).replace("`", "'")
