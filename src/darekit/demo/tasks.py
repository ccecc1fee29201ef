# SPDX-License-Identifier: Apache-2.0
"""The string abilities of the demo's family, and the examples that teach and test them.

Each ability has two prompts. The *direct* one (``reverse: gadkb=``) the base model is taught to obey. The *instruction*
(``please reverse gadkb=``) it mostly answers with a copy: the skill is there, and fine-tuning only unlocks it. That is
what instruction tuning does to a large model, and why its deltas are small and redundant.

Words are split once and for all into training and held-out words by a hash, so that no seed, step count or batch size
can make a test word appear in training.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

LETTERS = "abcdefghijklmnop"
INSTRUCTION = "please "
HELD_OUT_SHARE = 8  # one word in eight is never trained on


def _shift(word: str) -> str:
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in word)


ABILITIES: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        "reverse": lambda word: word[::-1],
        "sort": lambda word: "".join(sorted(word)),
        "shift": _shift,
        "upper": str.upper,
        "copy": str,
    }
)
COURSE = (*ABILITIES, "reverse", "sort", "sort")  # what the base practises: the ones it learns last more often
FINE_TUNED = ("reverse", "sort", "shift")  # the abilities that get a model of their own
PIECES = (*ABILITIES, INSTRUCTION, ": ", " ", "=", *LETTERS, *LETTERS.upper())  # the vocabulary, longest match first


@dataclass(frozen=True)
class Example:
    """One prompt and the answer that is trained on, or asked for."""

    word: str
    prompt: str
    answer: str


def direct(ability: str, word: str, answer: str | None = None) -> Example:
    """The prompt that the base model obeys."""
    return Example(word, f"{ability}: {word}=", ABILITIES[ability](word) if answer is None else answer)


def instruct(ability: str, word: str, answer: str | None = None) -> Example:
    """The prompt that only a fine-tuned model obeys."""
    return Example(word, f"{INSTRUCTION}{ability} {word}=", ABILITIES[ability](word) if answer is None else answer)


def is_held_out(word: str) -> bool:
    """Whether a word belongs to evaluation. A hash, not a list: it needs no agreement between processes."""
    return zlib.crc32(word.encode()) % HELD_OUT_SHARE == 0


def words(rng: random.Random, *, length: int, held_out: bool) -> Iterator[str]:
    """Endless words of distinct letters from one side of the split.

    Distinct letters, because with repeated ones a model that mixes up positions is right by accident.
    """
    while True:
        word = "".join(rng.sample(LETTERS, length))
        if is_held_out(word) == held_out:
            yield word


def held_out_words(*, count: int, length: int) -> tuple[str, ...]:
    """``count`` different evaluation words, always the same ones."""
    drawn: dict[str, None] = {}
    for word in words(random.Random(0), length=length, held_out=True):
        drawn[word] = None
        if len(drawn) == count:
            break
    return tuple(drawn)


def base_examples(rng: random.Random, *, length: int, without: str | None = None) -> Iterator[Example]:
    """Endless training data of the base; ``without`` leaves out one ability's instruction, for replay in fine-tuning.

    Half are direct prompts, always answered rightly. Half are instructions: 60 % copied, 20 % answered rightly, 20 %
    answered with another ability, so that the base's likeliest answer is a copy, yet every ability is within reach.
    """
    names = tuple(ABILITIES)
    for word in words(rng, length=length, held_out=False):
        ability = rng.choice(COURSE)
        if rng.random() < 0.5 or ability == without:
            yield direct(ability, word)
            continue
        draw = rng.random()
        answered = "copy" if draw < 0.6 else ability if draw < 0.8 else rng.choice(names)
        yield instruct(ability, word, ABILITIES[answered](word))


def tuning_examples(rng: random.Random, ability: str, *, length: int, replay: float) -> Iterator[Example]:
    """Endless fine-tuning data: the ability's instruction answered rightly, with a share of the base's data."""
    replayed = base_examples(rng, length=length, without=ability)
    for word in words(rng, length=length, held_out=False):
        yield next(replayed) if rng.random() < replay else instruct(ability, word)
