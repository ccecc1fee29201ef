# SPDX-License-Identifier: Apache-2.0
"""A model from which nothing is dropped is copied to the bit, if and only if it counts as exactly once."""

import json

import numpy as np
import pytest

import darekit as dk
import families

# Sums of these are exact: 1 + s 2^-3 for every s below.
BASE = {"w": np.full(1000, 1.0, np.float32)}
MODEL = {"w": np.full(1000, 1.125, np.float32)}


@pytest.mark.parametrize(
    ("weight", "scale"), [(1.0, 1.0), (2.0, 0.5), (1.0, 0.5), (0.5, 1.0), (2.0, 1.0), (1.0, 0.0), (1.0, -1.0)]
)
@pytest.mark.parametrize("method", [dk.task_arithmetic, dk.ties])
def test_an_untouched_model_counts_as_its_weight_and_lambda_say(method, weight, scale):
    how = method(lambda_=scale, normalize=False) if method is dk.ties else method(lambda_=scale)
    found = dk.merge_tensors(BASE, [MODEL], method=how, weights=[weight])["w"]
    assert np.array_equal(found, np.full(1000, 1 + weight * scale * 0.125, np.float32))


@pytest.mark.parametrize("normalize", [True, False])
def test_rows_that_only_one_model_has_count_as_its_weight_says(tmp_path, normalize):
    rng = np.random.default_rng(0)
    one = families.llama(rng, np.float32)
    longer = {name: np.concatenate([array, array[:2]]) if len(array) == families.VOCAB else array
              for name, array in one.items()}  # fmt: skip
    for name, tensors, rows in (("m0", one, families.VOCAB), ("m1", longer, families.VOCAB + 2)):
        families.save(tmp_path / name, tensors, families.config(vocab=rows, dtype="float32"))
    data = families.recipe(tmp_path, k=2, merge_method="linear", parameters={"normalize": normalize}, vocab="pad")
    del data["base_model"]
    data["models"][1]["parameters"] = {"weight": 0.5}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(data))
    dk.merge(path, tmp_path / "out")
    found, name = families.load(tmp_path / "out"), "model.embed_tokens.weight"
    expected = longer[name][families.VOCAB :] * np.float32(1.0 if normalize else 0.5)
    assert found[name][families.VOCAB :].tobytes() == expected.tobytes()
