# SPDX-License-Identifier: Apache-2.0
"""What the examples in docstrings find: `dk`, `np`, `Path`, and a folder of their own with a tiny family in it.

    base/ math/ code/    a Llama of 27 thousand parameters, and two models fine-tuned from it
    recipe.yaml          both of them, 90 % dropped by DARE, added to the base
    sums.jsonl           prompts and completions
    questions.json       instructions

It stands at the root because `tests/conftest.py` is not asked about src/; nothing of it is in the wheel.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = ["<unk>", "<s>", "</s>", *NUMBERS, "plus", "is", "what"]
RECIPE = """\
base_model: base
models: [math, code]
sparsify: {method: dare, drop_rate: 0.9, seed: 42, keep_dense: [embeddings, norms]}
merge_method: task_arithmetic
"""


@pytest.fixture(scope="session")
def examples_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every example gets a copy of."""
    import numpy as np

    import families

    folder = tmp_path_factory.mktemp("examples") / "family"
    rng = np.random.default_rng(0)
    base = families.llama(rng)
    for name in ("base", "math", "code"):
        families.save(folder / name, base if name == "base" else families.tuned(rng, base), families.config())
        _write_tokenizer(folder / name)
    (folder / "recipe.yaml").write_text(RECIPE)
    sums = [{"prompt": f"{NUMBERS[k]} plus one is ", "completion": NUMBERS[k + 1]} for k in range(8)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    questions = [{"instruction": f"what is {word} plus one"} for word in NUMBERS[:2]]
    (folder / "questions.json").write_text(json.dumps(questions))
    return folder


def _write_tokenizer(folder: Path) -> None:
    """A word for each token, as the tokenizers library writes it."""
    words = WORDS + [f"word{at}" for at in range(len(WORDS), 96)]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": at, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
            for at, word in enumerate(words[:3])
        ],
        "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "truncation": None, "padding": None,
        "model": {"type": "WordLevel", "vocab": {word: at for at, word in enumerate(words)}, "unk_token": "<unk>"},
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
        "pad_token": "</s>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(autouse=True)
def _examples_folder(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every docstring's examples run in a fresh copy of the family; tests are left alone."""
    if not isinstance(request.node, pytest.DoctestItem) or "darekit" not in Path(request.node.path).parts:
        yield
        return
    import numpy as np

    import darekit as dk

    namespace: dict[str, Any] = request.getfixturevalue("doctest_namespace")
    namespace |= {"dk": dk, "np": np, "Path": Path}
    folder = request.getfixturevalue("tmp_path") / "examples"
    shutil.copytree(request.getfixturevalue("examples_family"), folder)
    request.getfixturevalue("monkeypatch").chdir(folder)
    yield
