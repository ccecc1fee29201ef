# SPDX-License-Identifier: Apache-2.0
"""What the paper's experiments run: every call of `dare`, by experiment."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import storage

HERE = Path(__file__).resolve().parent

DECODERS, ENCODERS = ("shift", "mirror", "rotate"), ("first", "last", "most")
TRAINING = {"w128": 170.0, "w64": 90.0, "w32": 60.0, "encoder": 40.0}  # CPU seconds, to begin with the longest


@dataclass(frozen=True)
class Command:
    """One call of `dare`.

    Attributes:
        words: after `dare`; EXPERIMENTS stands for the folder of that name.
        result: the name under which its JSON is kept.
        makes: what it writes and others read; where it has no result, what is newer than `of` is not written again.
        of: the model that `makes` is made from.
        seconds: of a processor, about; the longest begin first.
        program: another than `dare`: a script of this folder.
    """

    words: tuple[str, ...]
    result: str | None = None
    makes: str | None = None
    of: str | None = None
    seconds: float = 3.0
    program: str = "dare"

    def line(self, experiments: str) -> str:
        """As it is typed."""
        script = os.path.normpath(f"{experiments}/../{self.program}")
        begin = ["dare"] if self.program == "dare" else ["python", script]
        return shlex.join([*begin, *(word.replace("EXPERIMENTS", experiments) for word in self.words)])

    def reads(self) -> str:
        """All that names a model or a file that it needs."""
        files = [HERE / "experiments" / w.removeprefix("EXPERIMENTS/") for w in self.words if "EXPERIMENTS" in w]
        return "\n".join([*self.words, *(file.read_text() for file in files)])


def sweep(name: str, seconds: float) -> Command:
    """A sweep file of `experiments/`."""
    return Command(("sweep", f"EXPERIMENTS/{name}.yaml", f"runs/{name}"), f"sweeps/{name}", seconds=seconds)


def inspection(base: str, model: str) -> Command:
    """What `dare inspect` says of a model and a base."""
    return Command(("inspect", base, model, "--json"), f"inspections/{model} on {base}")


def inspections_together(base: str, *models: str, name: str) -> Command:
    """The deltas of several models, with plots."""
    return Command(("inspect", base, *models, "--plot", f"runs/{name}", "--json"), seconds=8)


def statistic(kind: str, model: str, data: str) -> Command:
    """The Fisher or the Grams of a model on its own training data."""
    out = f"statistics/{data}.{kind}.safetensors"
    words = ("stats", kind, model, "--data", f"data/{data}.training.jsonl", "--out", out)
    return Command(words, makes=out, of=model, seconds=9)


def similarity(base: str, model: str, data: str) -> Command:
    """Hidden states of the model against those after the drop, layer by layer, with a plot."""
    return Command(
        ("similarity", base, model, "--data", f"data/{data}.test.jsonl", "-p", "0.5", "-p", "0.9",
         "--seeds", "1,2,3", "--plot", "runs/f-similarity", "--json"),
        f"similarities/{model}", seconds=12,
    )  # fmt: skip


def recommendation(base: str, model: str) -> Command:
    """How much may be dropped, without data."""
    return Command(("recommend", base, model, "--json"), f"recommendations/{model}", seconds=2)


# DAREx-q without labels: a search for each model, drop rate and mask, and the recipes that it writes, judged on test.
SEARCHED = tuple((width, ability) for width in (32, 128) for ability in ("shift", "mirror"))
SEARCHED_RATES, SEARCHED_SEEDS = (0.9, 0.99), (1, 2, 3)


def searched(width: int, ability: str, rate: float, seed: int) -> str:
    """The recipe that one search writes."""
    return f"recipes/w{width}-{ability}-{100 * rate:g}-seed{seed}.yaml"


def q_search(width: int, ability: str, rate: float, seed: int) -> Command:
    """DAREx's own way: q by how much the outputs change. Of the rows, 64 of training, no answer is compared with."""
    out = searched(width, ability, rate, seed)
    words = (
        "recommend", f"w{width}/base", f"w{width}/{ability}", "-p", f"{rate:g}", "--keep-dense", "none",
        "--seed", f"{seed}", "--data", f"data/{ability}.training.jsonl", "--batch-size", "64",
        "--search-q", "--out", out, "--json",
    )  # fmt: skip
    return Command(words, f"searches/{Path(out).stem}", makes=out, seconds=9)


def judged(ability: str) -> Command:
    """The recipes of all searches for one ability, in one table."""
    recipes = [
        searched(width, ability, rate, seed)
        for width in (32, 128)
        for rate in SEARCHED_RATES
        for seed in SEARCHED_SEEDS
    ]
    return evaluation(recipes, ability, out=f"runs/e-darex-{ability}", seconds=15)


def stored(ability: str) -> tuple[Command, Command]:
    """Packs of one model, and what else stores its delta; and all of them judged."""
    base, model, folder = "w128/base", f"w128/{ability}", f"packs/{ability}"
    everything = (model, *(f"{folder}/{name}" for name in storage.names()))
    return (
        Command((base, model, folder), f"stored/{ability}", makes=folder, seconds=23, program="storage.py"),
        evaluation(everything, ability, "--base", base, out=f"runs/j-packs-{ability}", seconds=65),
    )


def evaluation(models: Sequence[str], ability: str, *options: str, out: str, seconds: float) -> Command:
    """Models, recipes or packs, judged by an ability's test words in one table."""
    judge = ("--data", f"data/{ability}.test.jsonl", "--batch-size", "200")
    return Command(
        ("eval", *models, *options, *judge, "--out", out, "--json"), f"evaluations/{ability}", seconds=seconds
    )


EXPERIMENTS: Mapping[str, tuple[Command, ...]] = {
    "a": (sweep("a-drop-rates", 61), sweep("a-encoders", 20)),
    "b": (
        *(
            command(f"w{width}/base", f"w{width}/{ability}")
            for width in (32, 64, 128)
            for ability in ("shift", "mirror")
            for command in (inspection, recommendation)
        ),
        sweep("b-width", 50),
    ),
    "c": (
        *(
            statistic(kind, f"{family}/{name}", name)
            for family, names in (("w128", DECODERS), ("encoder", ENCODERS))
            for name in names
            for kind in ("fisher", "gram")
        ),
        sweep("c-two", 100),
        sweep("c-three", 130),
        sweep("c-encoders-first-last", 40),
        sweep("c-encoders-first-most", 40),
        sweep("c-encoders-last-most", 40),
    ),
    "d": (
        inspection("w64/base", "w64/continued-shift"),
        inspection("w64/continued", "w64/continued-shift"),
        sweep("d-wrong-base", 25),
    ),
    "e": (
        sweep("e-rescale-90", 30),
        sweep("e-rescale-99", 30),
        sweep("e-masks", 15),
        *(q_search(*model, rate, seed) for model in SEARCHED for rate in SEARCHED_RATES for seed in SEARCHED_SEEDS),
        *map(judged, ("shift", "mirror")),
    ),
    "f": (similarity("w128/base", "w128/shift", "shift"),),
    "g": (
        *(inspection("w128/base", f"w128/{ability}") for ability in DECODERS),
        inspection("w64/base", "w64/shift"),
        inspection("w64/base", "w64/continued"),
        *(inspection("encoder/base", f"encoder/{task}") for task in ENCODERS),
        inspections_together("w128/base", *(f"w128/{ability}" for ability in DECODERS), name="g-deltas"),
        inspections_together("w64/base", "w64/shift", "w64/continued", name="g-continued"),
    ),
    "h": (sweep("h-della", 40), sweep("h-della-merges", 85)),
    "i": (sweep("i-seeds", 45),),
    "j": tuple(command for ability in DECODERS for command in stored(ability)),
}


def commands(letters: Iterable[str] = tuple(EXPERIMENTS)) -> list[Command]:
    """All commands of some experiments."""
    return [command for letter in letters for command in EXPERIMENTS[letter]]
