# SPDX-License-Identifier: Apache-2.0
"""One checkpoint as the Hub has it, another as it is in memory: read right, or refused; never wrong without a word.

Between the two lies transformers' conversion mapping. The truth here is what its own operations make of the tensors.
"""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import core_model_loading

import darekit as dk
import families
import sources
import tiny
from darekit.architectures.families import facts_of
from darekit.architectures.families import families as table
from darekit.checkpoints import ArrayBytes
from darekit.checkpoints.transposed import Transposed
from darekit.errors import HomologyError

# Operation of transformers -> what becomes of a checkpoint as the Hub has it beside one as it is in memory.
HANDLED = {
    "MergeModulelist": "read: parts of one tensor, one after another (fusing.py)",
    "Concatenate": "read along the axis on which parts follow one another, else refused",
    "Chunk": "read along the first axis, else refused",
    "Transpose": "read, turned (turning.py)",
    "Split": "refused: parts of several sizes",
    "Interleave": "refused: rows are dealt out",
    "PermuteForRope": "refused: rows of each head are dealt out",
    "ErnieFuseAndSplitTextVisionExperts": "refused: experts of two kinds in one list",
}
# What no entry of the mapping has: the reverse of the above for saving, what config decides, and what is deprecated.
UNUSED = {
    "SplitModulelist", "Conv3dToLinear", "LinearToConv3d", "ErnieSplitAndDecoupleTextVisionExperts", "_IdentityOp",
    "VisionFuseAndPermuteForRope", "VisionUnfuseAndPermuteForRope",
}  # fmt: skip
READ = {
    ("MergeModulelist 0",), ("MergeModulelist 0", "Concatenate 1"), ("Concatenate 0",), ("Chunk 0",), ("Transpose",),
}  # fmt: skip


def conversions():
    """(class, rename) of every entry that changes values, each once."""
    found = {}
    for record in table():
        for name in record["classes"]:
            for rename in facts_of({"architectures": [name]}).renames:
                if rename.operations:
                    key = rename.sources, rename.targets, repr(rename.operations)
                    found.setdefault(key, (name, rename))
    return list(found.values())


ENTRIES = conversions()


def chain(rename):
    return tuple(f"{o.name} {o.parameters['dim']}" if "dim" in o.parameters else o.name for o in rename.operations)


def test_every_operation_of_the_table_is_handled():
    assert {o.name for _, rename in ENTRIES for o in rename.operations} == set(HANDLED)


def test_every_operation_of_transformers_is_known():
    """A new one shows here, as soon as the pinned version has it."""
    base = core_model_loading.ConversionOps
    own = {
        name for name, one in vars(core_model_loading).items()
        if isinstance(one, type) and issubclass(one, base) and one is not base
    }  # fmt: skip
    assert own == {*HANDLED, *UNUSED}


SIDE, HEADS, EXPERTS = 4, 2, 4


def stored_shapes(rename):
    """Of one tensor of each source: as square as they can be, so that no shape tells what is wrong."""
    first = rename.operations[0]
    if first.name == "Transpose":
        return (2, SIDE, SIDE) if first.parameters["dim1"] == 2 else (SIDE, SIDE)
    if first.name == "Interleave":
        return (2, 2 * SIDE, SIDE) if first.parameters["dim"] else (2 * SIDE, SIDE)
    if first.name == "Concatenate" and first.parameters["dim"]:
        return (2, SIDE, SIDE)
    if first.name in ("Chunk", "Split"):
        rows = 2 * SIDE if len(rename.targets) == 1 else SIDE * len(rename.targets)
        return (2, rows) if first.parameters["dim"] else (rows, SIDE)
    return (SIDE, SIDE)


def plain(pattern):
    return re.sub(r"[\\^$()]", "", pattern).removeprefix(".")


def named(pattern):
    return f"{plain(pattern)}weight" if pattern.endswith(".") else plain(pattern)


# Where an entry needs another place in the model than a layer of it.
PLACES = {"MistralLarge4ForConditionalGeneration": "vision_encoder.transformer.layers.0."}
# Its names in memory are not told from those in files: `model.` is put before both.
NOT_FOUND = {"RfDetrForInstanceSegmentation"}


def checkpoint(name, rename, *, tuned):
    """Tensors as the Hub has them, and the same as they are in memory, made by transformers' own operations."""
    rng = np.random.default_rng(0)
    facts = facts_of({"architectures": [name]})
    scope = f"{rename.scope}." if rename.scope else ""
    place = PLACES.get(name, "") if rename.operations[0].name == "PermuteForRope" else ""
    place = place or f"{scope}layers.0."
    hub, collected = {}, {}
    for source in rename.sources:
        many = range(EXPERTS) if "*" in source else range(1)
        collected[source] = []
        for i in many:
            stored = f"{place}{named(source).replace('*', str(i))}"
            array = 64 * rng.integers(-9, 9, stored_shapes(rename)).astype(np.float32)
            array += rng.integers(-1, 2, array.shape) * tuned
            hub[stored] = array
            collected[source].append(torch.from_numpy(array.copy()))
            conversion = facts.conversion(stored)
            assert conversion is not None and conversion.source == source, (stored, conversion)
    target = conversion.target
    shape = SimpleNamespace(shape=torch.Size([SIDE, SIDE]))
    config = SimpleNamespace(num_attention_heads=HEADS)
    config.vision_config = config.text_config = config
    for operation in rename.operations:
        kind = getattr(core_model_loading, operation.name)
        collected = kind(**{k: v for k, v in operation.parameters.items() if v is not None}).convert(
            collected, source_patterns=list(rename.sources), target_patterns=list(rename.targets), config=config,
            full_layer_name=target, model=SimpleNamespace(get_parameter=lambda _: shape),
        )  # fmt: skip
    memory = {}
    for one, value in collected.items():
        value = value[0] if isinstance(value, list) else value
        memory[target.replace(plain(rename.targets[0]), plain(one), 1)] = value.numpy()
    return hub, memory


@pytest.mark.parametrize("way", ["hub", "memory"])
@pytest.mark.parametrize(("name", "rename"), ENTRIES, ids=[f"{n}-{'+'.join(chain(r))}" for n, r in ENTRIES])
def test_an_entry_is_read_right_or_refused(tmp_path, name, rename, way):
    config = {"architectures": [name], "model_type": facts_of({"architectures": [name]}).model_type}
    rest = {"layers.0.other.weight": np.ones((3, 3), np.float32)}
    (hub, memory), (hub_m, memory_m) = (checkpoint(name, rename, tuned=tuned) for tuned in (False, True))
    ours, theirs, expected = (hub, memory_m, hub_m) if way == "hub" else (memory, hub_m, memory_m)
    families.save(tmp_path / "base", ours | rest, config)
    families.save(tmp_path / "m0", theirs | rest, config)
    recipe = families.recipe(tmp_path, 1)
    if name in NOT_FOUND:
        with pytest.raises(HomologyError, match="do not have the same tensors"):
            dk.merge(recipe, tmp_path / "out")
    elif chain(rename) in READ and hub.keys() != memory.keys():
        dk.merge(recipe, tmp_path / "out")
        families.same(families.load(tmp_path / "out"), expected | rest)
    elif hub.keys() == memory.keys():  # Qwen3-VL-MoE: square alone says nothing, see below
        assert chain(rename) == ("Transpose",) and rename.operations[0].parameters["check_dims"]
    else:
        with pytest.raises(HomologyError, match="do not have the same tensors") as error:
            dk.merge(recipe, tmp_path / "out")
        assert "save_original_format=True" in str(error.value), str(error.value)
        assert not (tmp_path / "out").exists()


# --- Qwen3-VL-MoE: one name for both


QWEN = "Qwen3VLMoeForConditionalGeneration"


def turned(tensors):
    """As the Hub has them: all experts, square or not."""
    return {n: np.ascontiguousarray(a.swapaxes(1, 2)) if ".experts." in n else a for n, a in tensors.items()}


def config_of(path):
    return json.loads((path / "base" / "config.json").read_text())


def qwen(path, **text):
    """base and m1 as transformers saves them, and as `hub-...` in the Hub's layout."""
    changes = {"text_config": {**tiny.SIZES[QWEN]["text_config"], **text}}
    tiny.family(path, QWEN, 1, **changes)
    for who in ("base", "m1"):
        families.save(path / f"hub-{who}", turned(families.load(path / who)), config_of(path))
    return path


def change(base, model, out, **more):
    entry = {"model": str(model), **({"parameters": {"seed": 3}} if "sparsify" in more else {})}
    recipe = {"base_model": str(base), "models": [entry], "merge_method": "task_arithmetic", **more}
    return dk.merge(recipe, out)


@pytest.mark.parametrize("text", [{"moe_intermediate_size": 24}, {"moe_intermediate_size": 32}, {}],
                         ids=["no square", "down is square", "gate_up is square"])  # fmt: skip
def test_experts_of_the_hub_and_of_memory(tmp_path, text):
    path = qwen(tmp_path, **text)
    dare = {"sparsify": {"method": "dare", "drop_rate": 0.5}}
    shapes = {a.shape[1] == a.shape[2] for n, a in families.load(path / "base").items() if ".experts." in n}
    assert (True in shapes) == (text != {"moe_intermediate_size": 24})
    for more in ({}, dare):
        for ours, theirs in (("base", "m1"), ("hub-base", "hub-m1")):
            other = f"hub-{theirs}" if theirs == "m1" else "m1"
            name = "dare" if more else "plain"
            change(path / ours, path / theirs, path / f"{name}-{ours}", **more)
            report = change(path / ours, path / other, path / f"{name}-{ours}-mixed", **more)
            families.same(families.load(path / f"{name}-{ours}-mixed"), families.load(path / f"{name}-{ours}"))
            assert any("rows and columns swapped" in note for note in report.notes)
    lock = json.loads((path / "plain-base-mixed" / "darekit.lock.json").read_text())
    assert lock["inputs"][0]["content_digest"] and lock["inputs"][1]["content_digest"] is None  # read in another order


def test_the_loader_reads_the_hubs_layout_as_we_do(tmp_path):
    """The truth: transformers itself loads both to the same weights, where no expert is square."""
    path = qwen(tmp_path, moe_intermediate_size=24)
    cls = getattr(__import__("transformers"), QWEN)
    ours, theirs = (cls.from_pretrained(path / who).state_dict() for who in ("m1", "hub-m1"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_experts_of_both_kinds_in_one_checkpoint_are_refused(tmp_path):
    path = qwen(tmp_path, moe_intermediate_size=24)
    mixed, other = families.load(path / "m1"), turned(families.load(path / "m1"))
    name = next(n for n in mixed if n.endswith("layers.0.mlp.experts.down_proj"))
    families.save(path / "mixed", mixed | {name: other[name]}, config_of(path))
    with pytest.raises(HomologyError, match=r"rows and columns swapped .*layers.0.mlp.experts.down_proj.*save it ag"):
        change(path / "base", path / "mixed", tmp_path / "out")


def test_experts_of_another_size_are_refused_as_ever(tmp_path):
    path = qwen(tmp_path, moe_intermediate_size=24)
    tensors = families.load(path / "hub-m1")
    families.save(
        path / "cut", {n: a[:, :-1] if n.endswith("experts.down_proj") else a for n, a in tensors.items()},
        config_of(path),
    )  # fmt: skip
    with pytest.raises(HomologyError, match="differ in shape"):
        change(path / "base", path / "cut", tmp_path / "out")


def test_a_pack_of_a_model_in_the_other_layout(tmp_path):
    path = qwen(tmp_path, moe_intermediate_size=24)
    dk.pack(path / "base", path / "hub-m1", path / "m1.safetensors", lossless=True)
    dk.unpack(path / "base", path / "m1.safetensors", path / "back")
    families.same(families.load(path / "back"), families.load(path / "m1"))


# --- the source


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 7), "F32"), ((3, 4, 6), "BF16"), ((2, 3, 1, 8), "F8_E4M3"), ((2, 5, 3), "F64")]
)
def test_a_turned_source_is_a_source(shape, dtype):
    size = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "F64": 8}[dtype]
    array = np.random.default_rng(0).integers(0, 255, (*shape, size)).astype(np.uint8)
    source = Transposed(ArrayBytes(array.reshape(-1)), shape, size)
    sources.conform(source, dtype, np.ascontiguousarray(array.swapaxes(-3, -2)).tobytes())


def test_a_large_matrix_is_read_in_bands(monkeypatch):
    monkeypatch.setattr("darekit.checkpoints.transposed.BAND", 64)
    array = np.arange(40 * 30, dtype=np.uint16).reshape(40, 30)
    source = Transposed(ArrayBytes(array.reshape(-1).view(np.uint8)), array.shape, 2)
    assert sources.read(source, 0, array.nbytes) == np.ascontiguousarray(array.T).tobytes()
