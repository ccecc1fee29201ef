# SPDX-License-Identifier: Apache-2.0
"""Live models of transformers' own classes: what is in memory is what `from_pretrained` loads, bit for bit."""

import pytest

import darekit as dk
from darekit.live.models import build
from darekit.planning.opening import open_plan
from darekit.recipe import read_recipe

torch = pytest.importorskip("torch")
tiny = pytest.importorskip("tiny")

FAST = (
    "Qwen3MoeForCausalLM",  # experts one by one
    "GPTNeoXForCausalLM",  # renamed head
    "ViTForImageClassification",  # renamed, no text
    "Gemma3ForConditionalGeneration",  # another prefix, tied
    "T5ForConditionalGeneration",  # tied three times
)
CLASSES = [name if name in FAST else pytest.param(name, marks=pytest.mark.check) for name in tiny.SIZES]


def same(found, loaded):
    """All tensors, buffers and ties of two models agree."""
    before, after = (dict(m.state_dict()) | dict(m.named_buffers()) for m in (loaded, found))
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    assert ties(found) == ties(loaded)


def ties(model):
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(names for names in groups.values() if len(names) > 1)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_in_memory_what_transformers_loads(name, tmp_path):
    cls = tiny.family(tmp_path, name)
    recipe = read_recipe(tiny.recipe(tmp_path))
    dk.merge(recipe, tmp_path / "out", force=True)
    merged = cls.from_pretrained(tmp_path / "out")
    single = read_recipe({"models": [str(tmp_path / "m1")], "merge_method": "linear"})
    with open_plan(single) as one, open_plan(recipe) as plan:
        live = build(one, device="cpu")
        same(live.model, cls.from_pretrained(tmp_path / "m1"))
        places = {name: tensor.data_ptr() for name, tensor in live.model.state_dict().items()}
        live.put(plan)
        same(live.model, merged)
        assert places == {name: tensor.data_ptr() for name, tensor in live.model.state_dict().items()}
