# SPDX-License-Identifier: Apache-2.0
"""The model card: what was merged, how to repeat it, and the metadata by which the Hub draws the family tree."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from darekit.checkpoints.companions import CARD, Companions, Content

FRONT_MATTER_LIMIT = 1 << 16  # bytes or characters; metadata is far smaller, and a hostile card need not be read

CITATION = """\
@inproceedings{yu2024language,
  title     = {Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch},
  author    = {Yu, Le and Yu, Bowen and Yu, Haiyang and Huang, Fei and Li, Yongbin},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  url       = {https://arxiv.org/abs/2311.03099}
}
"""


def model_card(
    *,
    base_model: str | None,
    models: Sequence[str],
    statistics: Sequence[str] = (),
    recipe_text: str,
    lock_name: str = "darekit.lock.json",
    recipe_name: str = "darekit_recipe.yaml",
    license: str | None = None,
    title: str,
    summary: Sequence[str] = (),
    made_of: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """A README.md. Models are given as in the recipe; of a local path only the last component is shown.

    `made_of`: of those that are recipes, the models that these are made of.
    """
    made_of = made_of or {}
    inputs = tuple(dict.fromkeys(([base_model] if base_model is not None else []) + list(models)))
    stored = [name for given in inputs for name in made_of.get(given, [given])]
    names = {given: public_name(given) for given in (*inputs, *stored)}
    metadata: dict[str, Any] = {
        "base_model": list(dict.fromkeys(names[given] for given in stored)),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "darekit"],
    }
    if license is not None:
        metadata["license"] = license
    recipe = recipe_text.rstrip("\n")
    private = {**names, **{given: given.replace("\\", "/").rpartition("/")[2] for given in statistics}}
    for given in sorted(private, key=len, reverse=True):  # a path may begin another
        if given not in names:
            recipe = recipe.replace(given, private[given])
        elif names[given] != given.split("@")[0]:  # a Hub id keeps its revision here
            recipe = recipe.replace(given, names[given])
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000).rstrip("\n"),
        "---",
        "",
        f"# {_one_line(title)}",
        "",
        "Merged with darekit from",
        "",
        *(f"- {_code(names[name])}{_parts(name, made_of)}" for name in dict.fromkeys(models)),
        "",
        f"on the base {_code(names[base_model])}." if base_model is not None else "without a base model.",
        "",
        *(f"- {_one_line(line)}" for line in summary),
        *([""] if summary else []),
        "## Recipe",
        "",
        _fenced(recipe, "yaml"),
        "",
        "## Reproduce",
        "",
        _fenced(f"dare merge {recipe_name} OUT", "sh"),
        "",
        "Model names that are not Hub ids are looked up in the working directory and next to the recipe.",
        f"{_code(lock_name)} holds the seeds, the resolved parameters and the fingerprints of the inputs.",
        "",
        "## Cite",
        "",
        _fenced(CITATION.rstrip("\n"), "bibtex"),
        "",
    ]
    return "\n".join(lines)


def _parts(name: str, made_of: Mapping[str, Sequence[str]]) -> str:
    parts = dict.fromkeys(public_name(one) for one in made_of.get(name, ()))
    return f", merged from {', '.join(map(_code, parts))}" if parts else ""


def public_name(model: str) -> str:
    """A Hub id without its revision, or the last component of a local path, which must not leak.

    >>> public_name("org/name@main"), public_name("/home/me/models/wizard"), public_name("./wizard/model.safetensors")
    ('org/name', 'wizard', 'wizard')
    >>> public_name("step@1000"), public_name("./runs/step@1000")
    ('step@1000', 'step@1000')
    >>> public_name("/home/me/.cache/huggingface/hub/models--org--name/snapshots/0123abc")
    'org/name'
    """
    cached = re.search(r"(?:^|[/\\])models--([^/\\]+?)--([^/\\]+)", model)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", model, re.ASCII) and not Path(model).exists():
        return model.split("@")[0]
    parts = [part for part in re.split(r"[/\\]", model) if part not in ("", ".", "..", "~")]
    if len(parts) > 1 and parts[-1].endswith((".safetensors", ".bin")):
        parts.pop()
    return parts[-1] if parts else "model"


def agreed_license(companions: Sequence[Companions]) -> str | None:
    """The license on which the cards of all these checkpoints agree, None if there is no such."""
    found = {_license(beside.get(CARD)) for beside in companions}
    return found.pop() if len(found) == 1 else None


def front_matter(text: str) -> dict[str, Any]:
    """The metadata at the head of a card; empty where there is none that can be read."""
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text[:FRONT_MATTER_LIMIT], re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _license(card: Content | None) -> str | None:
    if card is None:
        return None
    try:
        with io.BytesIO(card) if isinstance(card, bytes) else card.open("rb") as file:
            found = front_matter(file.read(FRONT_MATTER_LIMIT).decode("utf-8", "replace")).get("license")
    except OSError:
        return None
    # Two licenses called "other" are not one.
    return found if isinstance(found, str) and found not in ("other", "unknown") else None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    space = " " if "`" in text else ""
    return f"{fence}{space}{_one_line(text)}{space}{fence}"


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
