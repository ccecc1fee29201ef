# SPDX-License-Identifier: Apache-2.0
"""What the families learn: abilities of decoders, classifications of encoders, and files of examples to judge by.

Decoders change words letter by letter or rotate them. As in the demo, the base obeys the *direct* prompt
(``shift: gadkb=``) and mostly copies under the *instruction* (``please shift gadkb=``): the skill is there, and
fine-tuning only unlocks it.
Encoders say something about a word; here the base mostly answers an instruction with the word's third letter.

Every word belongs to one of three splits by a hash, once and for all: no step count or seed can carry a word of
validation or test into training.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from darekit.demo.tasks import Example

LETTERS = "abcdefghijklmnop"
CLASS_LETTERS = LETTERS[:8]
INSTRUCTION = "please "
SHARES = {"test": (0,), "validation": (1,), "training": tuple(range(2, 8))}  # of 8
EXAMPLES = {"test": 200, "validation": 100, "training": 256}  # in each file


def _letterwise(change: Callable[[int], int]) -> Callable[[str], str]:
    return lambda word: "".join(LETTERS[change(LETTERS.index(letter)) % len(LETTERS)] for letter in word)


ABILITIES: Mapping[str, Callable[[str], str]] = {
    "copy": str,
    "shift": _letterwise(lambda i: i + 1),
    "back": _letterwise(lambda i: i - 1),
    "mirror": _letterwise(lambda i: -1 - i),
    "rotate": lambda word: word[1:] + word[0],
}
CONTINUED: Mapping[str, Callable[[str], str]] = {  # what continued pre-training adds
    "skip": _letterwise(lambda i: i + 5),
    "swap": lambda word: word[-1] + word[1:-1] + word[0],
}
TUNED = ("shift", "mirror", "rotate")

CLASSES: Mapping[str, Callable[[str], int]] = {
    "third": lambda word: CLASS_LETTERS.index(word[2]),
    "first": lambda word: CLASS_LETTERS.index(word[0]),
    "last": lambda word: CLASS_LETTERS.index(word[-1]) // 2,
    "most": lambda word: CLASS_LETTERS.index(max(word)) // 4,
}
LABELS = {"third": 8, "first": 8, "last": 4, "most": 2}
CLASSIFIED = ("first", "last", "most")

PIECES = (*ABILITIES, *CONTINUED, *CLASSES, INSTRUCTION, ": ", " ", "=", *LETTERS)


def split_of(word: str) -> str:
    """Which split a word belongs to: a hash, so that processes need not agree on a list."""
    place = zlib.crc32(word.encode()) % 8
    return next(split for split, places in SHARES.items() if place in places)


def words(rng: random.Random, split: str, *, length: int, encoder: bool = False) -> Iterator[str]:
    """Endless words of one split: of distinct letters for decoders (with repeated ones a model that mixes up places is
    right by accident), of a few letters for encoders."""
    while True:
        letters = rng.choices(CLASS_LETTERS, k=length) if encoder else rng.sample(LETTERS, length)
        word = "".join(letters)
        if split_of(word) == split:
            yield word


def fixed_words(split: str, *, length: int, encoder: bool = False) -> tuple[str, ...]:
    """The words of a split's file, always the same ones."""
    found: dict[str, None] = {}
    for word in words(random.Random(0), split, length=length, encoder=encoder):
        found[word] = None
        if len(found) == EXAMPLES[split]:
            break
    return tuple(found)


# --- decoders ---


def base_examples(
    rng: random.Random, *, length: int, without: str | None = None, continued: bool = False
) -> Iterator[Example]:
    """Endless data of a base. Half are direct prompts. Half are instructions: 60 % copied, 20 % answered rightly, 20 %
    answered with another ability. `without`: no instruction of that ability (for replay). `continued`: two more
    abilities, as often as all others together."""
    names, more = tuple(ABILITIES), tuple(CONTINUED)
    for word in words(rng, "training", length=length):
        if continued and rng.random() < 0.5:
            ability = rng.choice(more)
            yield Example(word, f"{ability}: {word}=", CONTINUED[ability](word))
            continue
        ability = rng.choice(names)
        if rng.random() < 0.5 or ability == without:
            yield Example(word, f"{ability}: {word}=", ABILITIES[ability](word))
            continue
        draw = rng.random()
        answered = "copy" if draw < 0.6 else ability if draw < 0.8 else rng.choice(names)
        yield instruct(ability, word, answered)


def instruct(ability: str, word: str, answered: str | None = None) -> Example:
    """The prompt that only a fine-tuned model obeys."""
    return Example(word, f"{INSTRUCTION}{ability} {word}=", ABILITIES[answered or ability](word))


def tuning_examples(rng: random.Random, ability: str, *, length: int, replay: float) -> Iterator[Example]:
    """Endless fine-tuning data: the ability's instruction, and a share of the base's data without it."""
    replayed = base_examples(rng, length=length, without=ability)
    for word in words(rng, "training", length=length):
        yield next(replayed) if rng.random() < replay else instruct(ability, word)


# --- encoders ---

Labelled = tuple[str, str, int]  # word, text, label


def base_labelled(rng: random.Random, *, length: int) -> Iterator[Labelled]:
    """Endless data of the encoder's base: direct prompts answered rightly; instructions as decoders have them, with the
    third letter in place of the copy."""
    names = tuple(CLASSES)
    for word in words(rng, "training", length=length, encoder=True):
        task = rng.choice(names)
        if rng.random() < 0.5:
            yield word, f"{task}: {word}", CLASSES[task](word)
        else:
            draw = rng.random()
            answered = "third" if draw < 0.6 else task if draw < 0.8 else rng.choice(names)
            yield word, f"{INSTRUCTION}{task} {word}", CLASSES[answered](word)


def tuning_labelled(rng: random.Random, task: str, *, length: int) -> Iterator[Labelled]:
    """Endless fine-tuning data of one classification."""
    for word in words(rng, "training", length=length, encoder=True):
        yield word, f"{INSTRUCTION}{task} {word}", CLASSES[task](word)


# --- files ---


def write_data(directory: Path, *, length: int, class_length: int) -> None:
    """JSON lines for judges and statistics: NAME.validation.jsonl, NAME.test.jsonl, NAME.training.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    for split in SHARES:
        for ability in TUNED:
            rows = [instruct(ability, word) for word in fixed_words(split, length=length)]
            _write(directory / f"{ability}.{split}.jsonl", ({"prompt": r.prompt, "completion": r.answer} for r in rows))
        for task in CLASSIFIED:
            found = fixed_words(split, length=class_length, encoder=True)
            rows = ({"text": f"{INSTRUCTION}{task} {word}", "label": CLASSES[task](word)} for word in found)
            _write(directory / f"{task}.{split}.jsonl", rows)


def _write(path: Path, rows: Iterator[dict[str, object]]) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
