# SPDX-License-Identifier: Apache-2.0
"""The demo's examples as files beside its models, for the commands that look at data.

::

    reverse.jsonl              100 words that models are trained on: for statistics and calibration
    reverse.validation.jsonl   held-out words to choose settings by
    reverse.test.jsonl         other held-out words to report by: those of the demo's own table
    texts.jsonl                some of each ability's training examples, without asking for anything
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from darekit.demo.settings import Settings
from darekit.demo.tasks import FINE_TUNED, Example, held_out_words, instruct, words

TRAINING_ROWS = 100
TEXTS = 32  # of each ability


def write_data(directory: Path, settings: Settings) -> None:
    """Write all of the files; they depend on the settings alone."""
    held_out = held_out_words(count=2 * settings.items, length=settings.word_length)
    test, validation = held_out[: settings.items], held_out[settings.items :]
    known = []
    for word in words(random.Random(1), length=settings.word_length, held_out=False):
        known.append(word)
        if len(known) == TRAINING_ROWS:
            break
    texts = []
    for ability in FINE_TUNED:
        for part, chosen in (("", known), (".validation", validation), (".test", test)):
            _write(directory / f"{ability}{part}.jsonl", (_row(instruct(ability, word)) for word in chosen))
        texts += [example.prompt + example.answer for example in (instruct(ability, word) for word in known[:TEXTS])]
    _write(directory / "texts.jsonl", ({"text": text} for text in texts))


def _row(example: Example) -> dict[str, str]:
    return {"prompt": example.prompt, "completion": example.answer}


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
