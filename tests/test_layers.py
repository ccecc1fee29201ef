# SPDX-License-Identifier: Apache-2.0
"""Views of some of a checkpoint's tensors under other names, and its tensors sorted by layer: names alone."""

from pathlib import Path

import numpy as np
import pytest

from darekit.checkpoints import ArrayBytes, Checkpoint, TensorInfo
from darekit.errors import PlanError
from darekit.inputs.slices import kind_of, layered, layers, renamed


def checkpoint(*names, stored=None):
    """Each tensor is its own number."""
    tensors = {
        name: TensorInfo(name, "U8", (1,), ArrayBytes(np.uint8([at])), (stored or {}).get(name))
        for at, name in enumerate(names)
    }
    return Checkpoint("hub/m", Path("m"), tensors, {"model_type": "llama"}, (), "abc")


def number(info):
    raw = np.empty(1, np.uint8)
    info.source.read_into(raw, 0)
    return int(raw[0])


def seen(view):
    return {name: number(info) for name, info in view.tensors.items()}


def test_a_view_renames_and_remembers_what_is_stored():
    plain = checkpoint("a.10", "a.9", "b", stored={"b": "elsewhere"})
    view = renamed(plain, {"a.10": "a.9", "a.9": "a.9", "c": "b", "elsewhere": "b", "x": "a.10"})
    assert [*view.tensors.items()] and [*view.tensors] == ["a.9", "a.10", "c", "elsewhere", "x"]
    assert seen(view) == {"a.9": 1, "a.10": 1, "c": 2, "elsewhere": 2, "x": 0}
    assert {name: info.name for name, info in view.tensors.items()} == {name: name for name in view.tensors}
    assert {name: info.stored for name, info in view.tensors.items()} == {
        "a.9": None, "a.10": "a.9", "c": "elsewhere", "elsewhere": None, "x": "a.10",
    }  # fmt: skip
    assert view.directory is None and view.origin is plain and view.config is plain.config
    assert renamed(view, {"c": "c"}).origin is plain
    with pytest.raises(PlanError, match=r"^hub/m has no tensor a\.91, which y is to be; did you mean a\.9\?$"):
        renamed(plain, {"y": "a.91"})
    with pytest.raises(PlanError, match=r"has no tensor quite.other, which y is to be$"):
        renamed(plain, {"y": "quite.other"})


NAMES = ("embed.w", "m.layers.0.a.w", "m.layers.1.a.w", "m.layers.1.b.w", "m.layers.2.a.w", "v.blocks.0.w", "head.w")


def test_a_range_of_layers_is_counted_from_0():
    one = checkpoint(*NAMES[:5], NAMES[6])
    rest = {"embed.w": 0, "head.w": 5}
    assert seen(layers(one, 1, 3)) == rest | {"m.layers.0.a.w": 2, "m.layers.0.b.w": 3, "m.layers.1.a.w": 4}
    assert seen(layers(one, 0, 1)) == rest | {"m.layers.0.a.w": 1}
    assert seen(layers(one, 2, 2)) == seen(layers(one, 3, 3)) == rest
    assert seen(layers(one, 0, 3, stack="m.layers")) == seen(one)
    for start, end in ((0, 4), (2, 1), (-1, 2)):
        with pytest.raises(
            PlanError, match=f"layers {start} to {end} of m.layers in hub/m, which has 3: expected 0 <="
        ):
            layers(one, start, end)


def test_one_stack_of_several_must_be_named():
    several = checkpoint(*NAMES)
    with pytest.raises(PlanError, match=r"hub/m has 2 stacks of layers \(m.layers, v.blocks\); name one of them"):
        layers(several, 0, 1)
    found = layers(several, 2, 3, stack="m.layers")
    assert seen(found) == {"embed.w": 0, "m.layers.0.a.w": 4, "v.blocks.0.w": 5, "head.w": 6}
    assert seen(layers(several, 0, 0, stack="v.blocks")) == {name: at for at, name in enumerate(NAMES) if at != 5}
    with pytest.raises(PlanError, match=r"has no layers text.layers; it has m.layers, v.blocks"):
        layers(several, 0, 1, stack="text.layers")
    with pytest.raises(PlanError, match="hub/m has 0 stacks"):
        layers(checkpoint("a", "b"), 0, 0)
    with pytest.raises(PlanError, match="has no layers x; it has no layers at all"):
        layers(checkpoint("a", "b"), 0, 0, stack="x")


def test_tensors_by_layer():
    names = ("m.layers.0.a.w", "norm.w", "m.layers.1.a.w", "m.layers.1.b.2.w", "embed.w", "head.w", "wpe.w")
    found = layered(checkpoint(*names), names)
    assert found.ref == "hub/m" and found.stack == "m.layers"
    assert found.layers == ({"a.w": "m.layers.0.a.w"}, {"a.w": "m.layers.1.a.w", "b.2.w": "m.layers.1.b.2.w"})
    assert (found.before, found.after) == (("embed.w", "wpe.w"), ("norm.w", "head.w"))
    assert [*found.layer(1, 7)] == [("m.layers.7.a.w", "m.layers.1.a.w"), ("m.layers.7.b.2.w", "m.layers.1.b.2.w")]
    assert [*found.beyond(5)] == []
    assert layered(checkpoint(*names), names[:1]).before == ()  # of those that were named


def test_what_comes_after_the_last_layer_stays_behind_it():
    names = ("m.layers.0.w", "m.layers.1.w", "m.layers.2.eh_proj.weight", "m.layers.2.w", "m.layers.3.eh_proj.weight")
    found = layered(checkpoint(*names), names)
    assert len(found.layers) == 2 and found.before == found.after == ()
    assert dict(found.beyond(5)) == {
        "m.layers.5.eh_proj.weight": "m.layers.2.eh_proj.weight", "m.layers.5.w": "m.layers.2.w",
        "m.layers.6.eh_proj.weight": "m.layers.3.eh_proj.weight",
    }  # fmt: skip


def test_ranges_lie_within_the_stack():
    names = tuple(f"h.{at}.w" for at in range(4))
    found = layered(checkpoint(*names), names)
    assert [*found.range(1, 3)] == [1, 2] and [*found.range(2, None)] == [2, 3] and [*found.range(0, 4)] == [0, 1, 2, 3]
    assert [*found.range(4, 4)] == [*found.range(1, 1)] == [*found.range(4, None)] == []
    for start, end in ((0, 5), (3, 2), (5, None)):
        with pytest.raises(
            PlanError, match=rf"layer_range \[{start}, {end or 4}\]: hub/m has 4 layers; .* within \[0, 4\]"
        ):
            found.range(start, end)


def test_slices_need_one_stack():
    with pytest.raises(PlanError, match="and hub/m has no numbered layers; with several"):
        layered(checkpoint("a"), ["a"])
    with pytest.raises(PlanError, match=r"and hub/m has 2 stacks of layers \(m.layers, v.blocks\); with several"):
        layered(checkpoint(*NAMES), NAMES)
    assert layered(checkpoint(*NAMES), NAMES[:5]).stack == "m.layers"


def test_layers_of_one_kind():
    assert kind_of("mlp.experts.7.up.1") == "mlp.experts.*.up.*" and kind_of("a.b2.w") == "a.b2.w"
