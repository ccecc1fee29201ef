# SPDX-License-Identifier: Apache-2.0
"""What the demo trains and measures, as data. How the numbers were found: docs/decisions/0003-demo-family.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Course:
    """One training run: steps, examples a step, highest learning rate."""

    steps: int
    batch: int
    rate: float


@dataclass(frozen=True)
class Settings:
    """Everything that a number in the demo's table depends on."""

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 320
    word_length: int = 5
    base_seed: int = 0
    base: Course = Course(steps=800, batch=64, rate=2e-3)
    tune: Course = Course(steps=100, batch=64, rate=1.5e-4)
    replay: float = 0.3  # share of base data in fine-tuning; without it a merged model forgets
    tune_seeds: tuple[int, ...] = (0, 1, 2)
    mask_seeds: tuple[int, ...] = (42, 43, 44)
    drop_rates: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
    items: int = 200  # held-out words for each ability
    processes: int = 2

    def shaping(self, *, tuned: bool) -> dict[str, Any]:
        """The settings that shape the base's weights, or a fine-tuned model's."""
        left_out = {"tune_seeds", "mask_seeds", "drop_rates", "items", "processes"}
        left_out |= set() if tuned else {"tune", "replay"}
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def read_settings(data: Mapping[str, Any]) -> Settings:
    """Settings from their JSON form."""
    courses = {name: Course(**data[name]) for name in ("base", "tune")}
    lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
    return Settings(**{**data, **courses, **lists})


def quick_settings() -> Settings:
    """Seconds instead of minutes: enough is learned to test the machinery, too little to mean anything."""
    return Settings(
        hidden=64,
        layers=2,
        mlp=128,
        word_length=3,
        base=Course(steps=200, batch=32, rate=5e-3),
        tune=Course(steps=40, batch=32, rate=5e-4),
        tune_seeds=(0,),
        mask_seeds=(42,),
        drop_rates=(0.0, 0.5, 0.9),
        items=32,
        processes=1,
    )
