# SPDX-License-Identifier: Apache-2.0
"""Sources, plain and computed: all keep to the same rules, and what they say of themselves is used."""

import hashlib
import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import darekit as dk
import families
import oracle
from darekit import memory
from darekit.checkpoints import (
    ArrayBytes,
    Checkpoint,
    FileRange,
    InputFile,
    TensorInfo,
    Traits,
    open_checkpoint,
    sample_digest,
    traits_of,
)
from darekit.checkpoints.digests import LEAF
from darekit.engine import execution
from darekit.engine.costs import bytes_to_read, peak_memory
from darekit.engine.trimming import settle_model_trim
from darekit.inputs.slices import layers, renamed
from darekit.output.lock import make_lock
from darekit.packing.jobs import _Rows
from darekit.planning.plan import make_plan
from darekit.recipe import read_recipe
from sources import Added, added, conform, read

BF16 = ml_dtypes.bfloat16


class Memory:
    """A sink."""

    def __init__(self, place):
        self.raw, self.place = np.zeros(place.nbytes, np.uint8), place

    def write(self, buffer, offset):
        at = offset - self.place.offset
        self.raw[at : at + buffer.size] = buffer


def merged(plan, *, tile=1024, threads=2):
    """Name -> raw bytes of a plan's output, whose shards hold one tensor each; and the records."""
    sinks = [Memory(place) for shard in plan.shards for place in shard.placements]
    steps = settle_model_trim(plan.steps, threads=threads, tile=tile, allow_nonfinite=False)
    done = execution.execute(steps, sinks, names=[m.ref for m in plan.models], threads=threads, tile=tile)
    return {sink.place.name: sink.raw.tobytes() for sink in sinks}, done


def raw_of(info):
    return read(info.source, 0, info.nbytes)


# --- every source


def test_bytes_that_lie_somewhere(tmp_path):
    raw = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    (tmp_path / "x").write_bytes(b"before" + raw.tobytes() + b"after")
    file = InputFile(tmp_path / "x")
    for dtype in ("U8", "BF16", "F64"):
        conform(FileRange(file, 6, 5000), dtype, raw.tobytes())
        conform(ArrayBytes(raw), dtype, raw.tobytes())
        conform(ArrayBytes(raw[:0]), dtype, b"")
    assert traits_of(FileRange(file, 6, 5000)).files == (file,) and traits_of(ArrayBytes(raw)) == Traits()
    rows = _Rows(ArrayBytes(raw[:3000]), FileRange(file, 6, 5000), 1001)
    conform(rows, "U8", raw[:1001].tobytes() + raw[1001:].tobytes())
    file.close()


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize(
    "options",
    [{"drop_rate": 0.9}, {"drop_rate": 0.9, "bits": 4}, {"drop_rate": 0.5, "bits": 32, "codec": "none"},
     {"drop_rate": 0.0, "bits": 8}, {"lossless": True}],
)  # fmt: skip
def test_packed_tensors(tmp_path, dtype, options):
    rng = np.random.default_rng(1)
    both = [oracle.family(rng, (2 * LEAF + 777,), dtype, k=1), oracle.family(rng, (33,), dtype, k=1)]
    families.save(tmp_path / "base", {"long": both[0][0], "short": both[1][0], "same": both[1][0]})
    families.save(tmp_path / "m0", {"long": both[0][1][0], "short": both[1][1][0], "same": both[1][0]})
    dk.pack(tmp_path / "base", tmp_path / "m0", tmp_path / "m.safetensors", seed=None if "lossless" in options else 7,
            force=True, **options)  # fmt: skip
    dk.unpack(tmp_path / "base", tmp_path / "m.safetensors", tmp_path / "whole")
    expected = families.load(tmp_path / "whole")
    base = open_checkpoint(tmp_path / "base")
    with dk.open_pack(tmp_path / "m.safetensors", base=base) as pack:
        model = pack.checkpoint()
        for name in ("long", "short"):
            traits = traits_of(model.tensors[name].source)
            conform(model.tensors[name].source, dtype, expected[name].tobytes())
            assert [file.path.name for file in traits.files] == ["m.safetensors", "model.safetensors"]
            assert traits.seed == (7 if 0 < options.get("drop_rate", 0) < 1 else None)
            assert traits.grain == LEAF and 1 < traits.cost < 2.2 and traits.identity is None
        assert traits_of(model.tensors["same"].source) == traits_of(base.tensors["same"].source)
        view = renamed(model, {"x": "long"})
        conform(view.tensors["x"].source, dtype, expected["long"].tobytes())
        assert {file.path.name for file in model.read_files} == {"m.safetensors", "model.safetensors"}
        model.close()
    base.close()


def test_a_computed_tensor(llamas):
    base = open_checkpoint(llamas.path / "base")
    info = base.tensors["model.norm.weight"]
    delta = np.random.default_rng(0).normal(0, 1e-4, info.count).astype(np.float32)
    values = llamas.base["model.norm.weight"].astype(np.float32) + delta
    conform(Added(info, delta), "BF16", values.astype(BF16).tobytes())
    base.close()


class Broken:
    """Bytes of which one thing is wrong."""

    def __init__(self, raw, wrong):
        self.raw, self.wrong, self.nbytes = raw, wrong, raw.size
        self.traits = Traits(result="0" * 32) if wrong == "result" else Traits(cost=-1) if wrong == "cost" else Traits()

    def read_into(self, buffer, offset):
        if self.wrong != "range" and not 0 <= offset <= self.nbytes - buffer.size:
            raise ValueError("outside")
        part = self.raw[max(0, offset) : max(0, offset) + buffer.size]
        buffer[: part.size] = part
        if self.wrong == "odd" and offset % 2 and buffer.size:
            buffer[0] ^= 1


@pytest.mark.parametrize("wrong", ["nothing", "range", "odd", "result", "cost"])
def test_a_source_that_breaks_a_rule_is_found(wrong):
    source = Broken(np.arange(200, dtype=np.uint8), wrong)
    if wrong == "nothing":
        conform(source, "U8", source.raw.tobytes())
        return
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        conform(source, "U8", source.raw.tobytes())


# --- what is made of their traits


def test_an_identity_takes_the_place_of_the_sample():
    known = {"identity": b"0123456789abcdef"}
    source = type("Computed", (), {"nbytes": 8, "traits": Traits(**known)})()  # it has no bytes to read
    tensors = {"w": TensorInfo("w", "F32", (2,), source)}
    digest = sample_digest(Checkpoint("x", None, tensors, None, (), None))
    text = b"w\0F32\x002\0darekit-computed-1\x000123456789abcdef"
    assert digest == hashlib.blake2b(text, digest_size=16).digest()
    assert digest.hex() == "a0e313d1cb244bc695bc24af66d30109"


def test_a_known_delta_is_never_rounded_before_the_merge(llamas):
    """Deltas far below BF16's steps: as bytes they all are zero."""
    base = open_checkpoint(llamas.path / "base")
    rng = np.random.default_rng(3)
    deltas = [
        {name: rng.normal(0, 1e-5, info.shape).astype(np.float32) for name, info in base.tensors.items()}
        for _ in range(2)
    ]
    models = [added(base, delta) for delta in deltas]
    data = families.recipe(llamas.path, k=2) | {
        "sparsify": {"method": "dare", "drop_rate": 0.5}, "parameters": {"lambda": 300.0},
    }  # fmt: skip
    plan = make_plan(read_recipe(data), base, models, shard_size=1)
    found, done = merged(plan)
    moved = 0
    for name, array in llamas.base.items():
        zeros = np.zeros(array.shape, np.float32)
        change = oracle.merge(
            name, zeros, [delta[name] for delta in deltas], seeds=plan.seeds, sparsify=("dare", {"drop_rate": 0.5}),
            method="task_arithmetic", lambda_=300.0,
        )  # fmt: skip
        after = (array.astype(np.float32) + change).astype(BF16)
        bits = np.where(change == 0, array.view(np.uint16), after.view(np.uint16))
        assert found[name] == bits.tobytes(), name
        moved += np.count_nonzero(bits != array.view(np.uint16))
        # Its bytes were not asked for (an adapter would be computed twice), so there is no digest of them.
        assert done.records[name]["models"] == {}
    assert moved > sum(array.size for array in llamas.base.values()) / 4
    base.close()


def test_a_known_delta_to_another_base_means_nothing(llamas):
    base, other = open_checkpoint(llamas.path / "base"), open_checkpoint(llamas.path / "m1")
    deltas = {name: np.full(info.shape, 0.01, np.float32) for name, info in base.tensors.items()}
    model = added(base, deltas)
    arrays = {
        name: TensorInfo(name, info.dtype, info.shape, ArrayBytes(np.frombuffer(raw_of(info), np.uint8)))
        for name, info in model.tensors.items()
    }
    recipe = read_recipe(families.recipe(llamas.path, k=1) | {"parameters": {"lambda": 0.5}})
    plain = replace(model, tensors=arrays)
    one, two = (merged(make_plan(recipe, other, [m], shard_size=1))[0] for m in (model, plain))
    assert one == two
    base.close()
    other.close()


@pytest.mark.parametrize("method", ["magnitude", "breadcrumbs", "della"])
def test_a_known_delta_is_measured_too(llamas, method):
    """Where the delta is exact in BF16 anyway, it comes to what the bytes come to."""
    base = open_checkpoint(llamas.path / "base")
    deltas = {
        name: (model.astype(np.float32) - llamas.base[name].astype(np.float32))
        for name, model in llamas.models[0].items()
    }
    model = added(base, deltas)
    data = families.recipe(llamas.path, k=1) | {"sparsify": {"method": method, "drop_rate": 0.6}}
    data["models"][0]["parameters"] = {"seed": 5}
    tuned = open_checkpoint(llamas.path / "m0")
    found, expected = (merged(make_plan(read_recipe(data), base, [m], shard_size=1))[0] for m in (model, tuned))
    assert found == expected
    base.close()
    tuned.close()


def test_a_plan_counts_what_is_read_rather_than_what_is_given(llamas):
    base, tuned = open_checkpoint(llamas.path / "base"), open_checkpoint(llamas.path / "m0")

    class Dear:
        def __init__(self, source):
            self.source, self.nbytes = source, source.nbytes
            self.traits = Traits(cost=3.0, grain=1 << 20)

        def read_into(self, buffer, offset):
            self.source.read_into(buffer, offset)

    dear = replace(
        tuned, tensors={name: replace(info, source=Dear(info.source)) for name, info in tuned.tensors.items()}
    )
    recipe = read_recipe(families.recipe(llamas.path, k=1))
    plain, plan = (make_plan(recipe, base, [m], shard_size=1) for m in (tuned, dear))
    size = sum(info.nbytes for info in base.tensors.values())
    assert (plain.bytes_in, plan.bytes_in) == (2 * size, 4 * size)
    assert (plain.bytes_to_read(), plan.bytes_to_read()) == (2 * size, 4 * size)
    found, done = merged(plan)
    assert done.bytes_read == bytes_to_read(plan.steps) and found == merged(plain)[0]
    largest = max(info.nbytes for info in base.tensors.values())
    assert peak_memory(plan.steps, 1, 64) - peak_memory(plain.steps, 1, 64) == largest
    base.close()
    tuned.close()


# --- views that rename


def test_a_range_of_layers_is_counted_anew(llamas):
    base = open_checkpoint(llamas.path / "base")
    one = layers(base, 1, 2)
    assert list(one.tensors) == [name for name in base.tensors if ".1." not in name], (
        "one layer, and what belongs to none"
    )
    for name, info in one.tensors.items():
        stored = name.replace("layers.0.", "layers.1.")
        assert raw_of(info) == llamas.base[stored].tobytes() and info.stored_name == stored
    assert list(layers(base, 0, 2).tensors) == list(base.tensors)
    assert all(info == base.tensors[name] for name, info in layers(base, 0, 2).tensors.items())
    assert [name for name in layers(base, 1, 1).tensors if "layers" in name] == []
    assert one.directory is None and one.companions == base.companions and one.origin is base
    base.close()


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((1, 3), {}, r"layers 1 to 3 of model\.layers .* <= 2"),
        ((1, 0), {}, "layers 1 to 0"),
        ((-1, 1), {}, "layers -1 to 1"),
        ((0, 1), {"stack": "h"}, r"has no layers h; it has model\.layers"),
    ],
)
def test_layers_that_are_not_there(llamas, arguments, options, said):
    base = open_checkpoint(llamas.path / "base")
    with pytest.raises(dk.errors.PlanError, match=said):
        layers(base, *arguments, **options)
    with pytest.raises(
        dk.errors.PlanError, match=r"no tensor model\.norm\.weigth, which x is to be; did you mean model\.norm"
    ):
        renamed(base, {"x": "model.norm.weigth"})
    base.close()


def test_of_several_stacks_one_must_be_named():
    names = ["encoder.block.0.layer.0.w", "encoder.block.1.layer.0.w", "decoder.block.0.layer.0.w", "shared.w"]
    source = ArrayBytes(np.zeros(4, np.uint8))
    checkpoint = Checkpoint("t5", None, {n: TensorInfo(n, "F32", (1,), source) for n in names}, None, (), None)
    with pytest.raises(dk.errors.PlanError, match=r"2 stacks of layers \(encoder\.block, decoder\.block\); name one"):
        layers(checkpoint, 0, 1)
    view = layers(checkpoint, 1, 2, stack="encoder.block")
    assert set(view.tensors) == {"encoder.block.0.layer.0.w", "decoder.block.0.layer.0.w", "shared.w"}
    assert view.tensors["encoder.block.0.layer.0.w"].stored_name == "encoder.block.1.layer.0.w"


def prefixed(checkpoint, prefix="language_model."):
    return renamed(checkpoint, {prefix + name: name for name in checkpoint.tensors})


def test_views_nest_and_keep_the_sample_digest(llamas):
    base = open_checkpoint(llamas.path / "base")
    wrapped = prefixed(layers(base, 1, 2))
    again = layers(wrapped, 0, 1)
    back = renamed(again, {name.removeprefix("language_model."): name for name in again.tensors})
    for view in (wrapped, again, back, layers(base, 0, 0)):
        assert sample_digest(view) == sample_digest(base) and view.origin is base
    assert back.tensors == layers(base, 1, 2).tensors
    assert {info.stored_name for info in wrapped.tensors.values()} < set(base.tensors)
    base.close()


HOW = [
    {"sparsify": {"method": "dare", "drop_rate": 0.7}},
    {"sparsify": {"method": "dare", "drop_rate": 0.7}, "merge_method": "ties", "parameters": {"keep": 0.5}},
    {"sparsify": {"method": "della", "drop_rate": 0.7}},
    {"sparsify": {"method": "dare", "drop_rate": 0.7, "rescale": "l1"}, "merge_method": "linear"},
]


@pytest.mark.parametrize("how", HOW)
def test_a_merge_of_views_is_that_of_the_same_tensors(llamas, how):
    """Seeds and masks are those of the whole models; only the names are others."""
    whole = [open_checkpoint(llamas.path / name) for name in ("base", "m0", "m1")]
    recipe = read_recipe(families.recipe(llamas.path, k=2, **how))
    plan = make_plan(recipe, whole[0], whole[1:], shard_size=1)
    expected, _ = merged(plan)
    views = [prefixed(layers(checkpoint, 1, 2), "text.") for checkpoint in whole]
    view_plan = make_plan(recipe, views[0], views[1:], shard_size=1)
    assert view_plan.seeds == plan.seeds
    found, _ = merged(view_plan, tile=2048)
    assert {name.removeprefix("text.").replace("layers.0.", "layers.1."): raw for name, raw in found.items()} == {
        name: raw for name, raw in expected.items() if "layers.0." not in name
    }
    for checkpoint in whole:
        checkpoint.close()


def test_each_model_keeps_its_own_masks(llamas):
    """One model's layer 1 beside another's layer 0, on the base's layer 0: streams differ within a step."""
    base, one, two = (open_checkpoint(llamas.path / name) for name in ("base", "m0", "m1"))
    data = families.recipe(llamas.path, k=2, sparsify={"method": "dare", "drop_rate": 0.7})
    bare = layers(base, 0, 1)
    plan = make_plan(read_recipe(data), bare, [layers(one, 1, 2), layers(two, 0, 1)], shard_size=1)
    found, _ = merged(plan)
    name = "model.layers.0.mlp.up_proj.weight"
    other = name.replace("0", "1", 1)
    both = []
    for k, stored in ((0, other), (1, name)):
        kept = dk.masks.kept(plan.seeds[k], dk.masks.stream_of(stored), 0, llamas.base[name].size, 0.7)
        delta = llamas.models[k][stored].astype(np.float32) - llamas.base[name].astype(np.float32)
        both.append(np.where(kept.reshape(delta.shape), delta * np.float32(1 / 0.3), np.float32(0)))
    change = both[0] + both[1]
    expected = (llamas.base[name].astype(np.float32) + change).astype(BF16)
    bits = np.where(change == 0, llamas.base[name].view(np.uint16), expected.view(np.uint16))
    assert found[name] == bits.tobytes()
    # The general way, which a tile that no kernel block divides takes, draws the same.
    assert merged(plan, tile=1000)[0] == found
    for checkpoint in (base, one, two):
        checkpoint.close()


def test_a_layer_that_is_used_twice_is_dropped_alike(llamas):
    base, tuned = open_checkpoint(llamas.path / "base"), open_checkpoint(llamas.path / "m0")

    def doubled(checkpoint):
        names = {name: name for name in checkpoint.tensors if "layers.1." not in name}
        return renamed(checkpoint, names | {n.replace(".0.", ".1."): n for n in names if "layers.0." in n})

    data = families.recipe(llamas.path, k=1, sparsify={"method": "dare", "drop_rate": 0.7})
    found, _ = merged(make_plan(read_recipe(data), doubled(base), [doubled(tuned)], shard_size=1))
    assert len(found) == len(base.tensors)
    for name, raw in found.items():
        assert raw == found[name.replace("layers.1.", "layers.0.")]
    base.close()
    tuned.close()


def test_the_lock_of_views_names_the_stored_models(llamas):
    whole = [open_checkpoint(llamas.path / name) for name in ("base", "m0")]
    recipe = read_recipe(families.recipe(llamas.path, k=1))
    plan = make_plan(recipe, whole[0], whole[1:], shard_size=1)
    expected = make_lock(plan, merged(plan)[1].records)["inputs"]
    assert all(entry["content_digest"] for entry in expected)
    view_plan = make_plan(
        recipe, *([prefixed(one)] if k else prefixed(one) for k, one in enumerate(whole)), shard_size=1
    )
    assert make_lock(view_plan, merged(view_plan)[1].records)["inputs"] == expected
    part = make_plan(recipe, layers(whole[0], 0, 1), [layers(whole[1], 0, 1)], shard_size=1)
    found = make_lock(part, merged(part)[1].records)["inputs"]
    assert found == [entry | {"content_digest": None} for entry in expected], "not every tensor was read"
    for checkpoint in whole:
        checkpoint.close()


def test_statistics_are_found_by_the_stored_name(llamas):
    """Those of layer 1, where a view calls it layer 0."""
    whole = [open_checkpoint(llamas.path / name) for name in ("base", "m0", "m1")]
    rng = np.random.default_rng(0)
    fishers = [{name: rng.random(a.shape).astype(np.float32) for name, a in llamas.base.items()} for _ in range(2)]
    statistics = [memory._statistics("fisher", k, fisher) for k, fisher in enumerate(fishers)]
    data = families.recipe(llamas.path, k=2, merge_method="fisher")
    for entry in data["models"]:
        entry["stats"] = "unread"
    recipe = read_recipe(data)
    expected, _ = merged(make_plan(recipe, whole[0], whole[1:], statistics=statistics, shard_size=1))
    views = [layers(checkpoint, 1, 2) for checkpoint in whole]
    found, _ = merged(make_plan(recipe, views[0], views[1:], statistics=statistics, shard_size=1))
    assert all(raw == expected[name.replace("layers.0.", "layers.1.")] for name, raw in found.items())
    for checkpoint in whole:
        checkpoint.close()


def test_a_pack_is_not_put_on_its_bases_tensors_under_other_names(llamas, tmp_path):
    dk.pack(llamas.path / "base", llamas.path / "m0", tmp_path / "m.safetensors", drop_rate=0.5)
    base = open_checkpoint(llamas.path / "base")
    with dk.open_pack(tmp_path / "m.safetensors") as pack:
        swap = {"0": "1", "1": "0"}
        names = {name: re.sub(r"layers\.(\d)", lambda found: f"layers.{swap[found[1]]}", name) for name in base.tensors}
        with pytest.raises(
            dk.errors.HomologyError, match=r"layers\.0\.\S+ should be .* which is stored as .*layers\.1\."
        ):
            pack.checkpoint(renamed(base, names))
        model = pack.checkpoint(renamed(base, {name: name for name in base.tensors}))
        assert raw_of(model.tensors["model.norm.weight"])
    base.close()
