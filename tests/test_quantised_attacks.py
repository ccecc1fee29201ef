# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints that cannot be right: every one is refused with the tensor's name, on opening or when read."""

import json
from contextlib import closing

import ml_dtypes
import numpy as np
import pytest

import coded
import families
from darekit.checkpoints import open_checkpoint
from darekit.errors import CheckpointError, DataError, Unsupported
from test_quantised import FP8, GOLDEN, WEIGHT, W, checkpoint, groups, read

S = f"{W}_scale_inv"
SMALL = WEIGHT[:64, :64]


def refusal(folder, error=CheckpointError):
    with pytest.raises(error) as caught:
        read(folder)
    return str(caught.value)


def eights(**changes):
    stored, _ = coded.eights(W, WEIGHT)
    return {name: array for name, array in {**stored, **changes}.items() if array is not None}


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        (eights(**{S: np.ones((2, 2), np.float32)}), FP8, "scales of shape [2, 2]*blocks of 128 x 128, as config.json"),
        (eights(**{S: np.ones((7, 3), np.float32)}), {}, "scales of shape [7, 3]*do not fit weights of shape [300,"),
        (eights(**{S: np.ones((3, 2, 1), np.float32)}), {}, "do not fit"),
        (eights(**{S: np.ones((0, 2), np.float32)}), {}, "do not fit"),
        (eights(**{S: np.ones(256, np.float32)}), {}, "do not fit"),
        (eights(**{S: np.ones((3, 2), np.int32)}), {}, "is I32, expected F32"),
        (eights(**{f"{W}_scale": np.ones((3, 2), np.float32)}), {}, "two scales of*not known which of them"),
        (eights(**{"l.k_proj.weight": SMALL.astype(coded.E4M3)}), FP8, "l.k_proj.weight is F8_E4M3 without scales"),
        (eights(**{"l.k_proj.weight_scale_inv": np.ones((1, 1), np.float32)}), FP8, "whose other parts are missing"),
        (eights(**{"l.k_proj.weight_packed": np.ones((4, 4), np.int32)}), FP8, "l.k_proj.weight_packed is part of"),
        (eights(), {"quantization_config": {"weight_block_size": [64, 64]}}, "blocks of 64 x 64, as config.json"),
        (eights(), {"quantization_config": {"weight_block_size": [0, 128]}}, "size [0, 128]; expected whole"),
        (eights(), {"quantization_config": {"weight_block_size": "128"}}, "weight_block_size"),
        (eights(), {"quantization_config": {"weight_block_size": [128]}}, "weight_block_size"),
        (eights(), {"quantization_config": {"weight_block_size": [1e3, 1]}}, "weight_block_size"),
        (eights(), groups(num_bits="four"), "num_bits"),
        (eights(), groups(group_size=True), "group_size"),
        ({**coded.packed(W, WEIGHT)[0], W: SMALL}, {}, "stores l.q_proj.weight twice"),
    ],
)  # fmt: skip
def test_headers_that_cannot_be_right(tensors, config, says, tmp_path):
    folder = checkpoint(tmp_path, tensors, **config)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    said, at = str(caught.value), 0
    for part in says.split("*"):  # in this order
        assert part in said[at:], said
        at = said.index(part, at)


@pytest.mark.parametrize(
    ("value", "what"), [(np.nan, "NaN or Inf"), (np.inf, "NaN or Inf"), (-np.inf, "NaN or Inf"), (-1.0, "negative")]
)
@pytest.mark.parametrize("where", [(0, 0), (2, 1)])
def test_scales_that_no_quantiser_writes(value, what, where, tmp_path):
    stored = eights()
    stored[S] = stored[S].copy()
    stored[S][where] = value
    said = refusal(checkpoint(tmp_path, stored, **FP8), DataError)
    assert said.startswith(f"{W}: 1 of ") and f"from {S} are {what}" in said


def test_scales_of_inputs_are_not_passed_over(tmp_path):
    folder = checkpoint(tmp_path, eights(**{"l.q_proj.pre_quant_scale": np.ones(WEIGHT.shape[1], np.float32)}), **FP8)
    said = refusal_on_opening(folder, Unsupported)
    assert "l.q_proj.pre_quant_scale scales the inputs of quantised layers" in said


@pytest.mark.parametrize(("place", "read_"), [("input", False), ("weight_input", True), ("q_attn", False)])
def test_weights_that_are_turned_while_the_model_runs(place, read_, tmp_path):
    quantised = dict(FP8["quantization_config"])
    quantised["transform_config"] = {
        "config_groups": {"R1": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": place}]}}
    }
    folder = checkpoint(tmp_path, eights(), **{**FP8, "quantization_config": quantised})
    if read_:
        with closing(open_checkpoint(folder)) as opened:
            assert W in opened.tensors
    else:
        assert f'transform_config ("R1") that rotates activations ({place})' in refusal_on_opening(folder, Unsupported)


def refusal_on_opening(folder, error):
    with pytest.raises(error) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def test_a_scale_of_zero(tmp_path):
    """What it scales was lost, unless that is zero as well."""
    weight = WEIGHT.copy()
    weight[:128, :128] = 0
    stored, values = coded.eights(W, weight)
    assert stored[S][0, 0] == 0
    found = read(checkpoint(tmp_path / "zeros", stored, **FP8))
    assert np.array_equal(found[W].astype(np.float32), values.astype(ml_dtypes.bfloat16).astype(np.float32))
    stored[W] = stored[W].copy()
    stored[W][5, 7] = 1
    assert f"{W}: a scale in {S} is 0, and the codes" in refusal(
        checkpoint(tmp_path / "lost", stored, **FP8), DataError
    )


def test_codes_that_are_no_number_are_found_as_any_nan(tmp_path, monkeypatch):
    import darekit as dk

    monkeypatch.chdir(tmp_path)
    stored = eights()
    stored[W] = stored[W].copy()
    stored[W].view(np.uint8)[3, 4] = 0x7F
    checkpoint(tmp_path / "m", stored, **FP8)
    with pytest.raises(DataError, match=r"q_proj\.weight"):
        dk.merge({"models": ["m"], "merge_method": "linear"}, "out", threads=1)


@pytest.mark.parametrize("form", [coded.fours, coded.blocks])
def test_powers_that_are_no_number(form, tmp_path):
    name = "l.mlp.experts.up_proj"
    stored, _ = form(name, WEIGHT[None, :64, :64] if form is coded.blocks else WEIGHT)
    if form is coded.fours:
        stored = {key.replace(name, W): array for key, array in stored.items()}
    (scales,) = (key for key in stored if "_scale" in key)
    stored[scales] = stored[scales].copy()
    stored[scales].reshape(-1)[-1] = 255
    assert f"read from {scales} are NaN or Inf" in refusal(checkpoint(tmp_path, stored), DataError)


class TestPacked:
    GROUPS = groups(num_bits=4, group_size=32)

    @pytest.mark.parametrize(
        ("changes", "config", "says"),
        [
            ({"_shape": np.array([300, 512])}, GROUPS, "do not fill rows of 32 words"),
            ({"_shape": np.array([299, 256])}, GROUPS, "says [299, 256], but its codes have shape [300, 32]"),
            ({"_shape": np.array([300, -256])}, GROUPS, "says [300, -256]"),
            ({"_shape": np.array([300, 1 << 62])}, GROUPS, "do not fill rows"),
            ({"_shape": np.array([300])}, GROUPS, "says [300]"),
            ({"_shape": np.zeros(100_000, np.int64)}, GROUPS, "has 800,000 bytes"),
            ({"_shape": np.array([300.0, 256.0])}, GROUPS, "is F64, expected I64 or I32"),
            ({}, groups(num_bits=8, group_size=32), "of 8 bits do not fill rows of 32 words"),
            ({}, groups(num_bits=4, group_size=64), "groups"),
            ({"_scale": np.ones((300, 9), np.float32)}, {}, "do not fit"),
            ({"_zero_point": np.ones((38, 7), np.int32)}, GROUPS, "zero points of shape [38, 7]"),
            ({"_g_idx": np.zeros(255, np.int32)}, GROUPS, "has 255 elements, for rows of 256"),
            ({"_packed": np.zeros(32, np.int32)}, GROUPS, "expected rows of words"),
            ({"_scale": None}, GROUPS, "weight_packed"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit(self, changes, config, says, tmp_path):
        stored, _ = coded.packed(W, WEIGHT)
        stored |= {f"{W}{key}": array for key, array in changes.items()}
        said = refusal(checkpoint(tmp_path, {n: a for n, a in stored.items() if a is not None}, **config))
        assert says in said or (says == "groups" and "blocks of 1 x 64" in said), said

    @pytest.mark.parametrize("group", [8, -2, 1 << 30])
    def test_groups_that_do_not_exist(self, group, tmp_path):
        stored, _ = coded.packed(W, WEIGHT, order=np.arange(256) // 32)
        stored[f"{W}_g_idx"][100] = group
        said = refusal(checkpoint(tmp_path, stored, **self.GROUPS), DataError)
        assert f"{W}_g_idx: groups" in said and "of 8" in said

    def test_an_order_that_is_none(self, tmp_path):
        stored, values = coded.packed(W, WEIGHT)
        stored[f"{W}_g_idx"] = np.full(256, -1, np.int32)
        found = read(checkpoint(tmp_path, stored, **self.GROUPS))
        assert np.array_equal(found[W], values.astype(ml_dtypes.bfloat16))

    def test_negative_scales_of_integers_are_scales(self, tmp_path):
        """Some quantisers use all sixteen codes that way."""
        stored, values = coded.packed(W, WEIGHT)
        stored[f"{W}_scale"] = -stored[f"{W}_scale"]
        found = read(checkpoint(tmp_path, stored, **self.GROUPS))
        assert np.array_equal(found[W].astype(np.float32), (-values).astype(ml_dtypes.bfloat16).astype(np.float32))


class TestBlocks:
    @pytest.mark.parametrize("shape", [(1, 64, 3), (2, 64, 2), (1, 64), (1, 64, 2, 1)])
    def test_scales_that_do_not_fit(self, shape, tmp_path):
        stored, _ = coded.blocks("l.mlp.experts.up_proj", WEIGHT[None, :64, :64])
        stored["l.mlp.experts.up_proj_scales"] = np.zeros(shape, np.uint8)
        said = refusal(checkpoint(tmp_path, stored))
        assert "l.mlp.experts.up_proj" in said and "do not fit blocks of shape [1, 64, 2, 16]" in said

    def test_half_of_it(self, tmp_path):
        stored, _ = coded.blocks("l.mlp.experts.up_proj", WEIGHT[None, :64, :64])
        other = {name.replace("up_proj", "down_proj"): array for name, array in stored.items()}
        for gone in stored:
            left = {**stored, **other}
            left.pop(gone)
            assert "other parts are missing" in refusal(checkpoint(tmp_path / gone, left))


class TestBitsandbytes:
    def stored(self, **changes):
        stored = families.load_file(GOLDEN / "nf4-double.safetensors")
        stored.pop("expected")
        key = "a.weight.quant_state.bitsandbytes__nf4"
        facts = json.loads(stored[key].tobytes())
        return {**stored, key: coded.state(**{**facts, **changes})}

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"shape": [6, 129]}, "do not fit the shape [6, 129]"),
            ({"shape": [1 << 40, 1 << 40]}, "do not fit the shape"),
            ({"shape": [-6, -128]}, "expected a list of sizes"),
            ({"shape": None}, "expected a list of sizes"),
            ({"blocksize": 0}, "blocksize 0"),
            ({"blocksize": 128}, "do not fit"),
            ({"blocksize": True}, "blocksize true"),
            ({"quant_type": "fp4"}, "quant_type"),
            ({"nested_blocksize": "256"}, "nested_blocksize"),
            ({"nested_offset": float("nan")}, "nested_offset"),
        ],
    )
    def test_a_state_that_lies(self, changes, says, tmp_path):
        said = refusal(checkpoint(tmp_path, self.stored(**changes)))
        assert "a.weight" in said and says in said

    def test_a_state_that_is_no_json(self, tmp_path):
        stored = self.stored()
        stored["a.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(b"\xff{", np.uint8)
        assert "not UTF-8" in refusal(checkpoint(tmp_path / "1", stored))
        stored["a.weight.quant_state.bitsandbytes__nf4"] = np.zeros(100_000, np.uint8)
        assert "has 100,000 bytes" in refusal(checkpoint(tmp_path / "2", stored))

    def test_parts_that_are_missing_or_others(self, tmp_path):
        for gone in ("a.weight.nested_quant_map", "a.weight.nested_absmax", "a.weight.absmax"):
            stored = self.stored()
            stored.pop(gone)
            said = refusal(checkpoint(tmp_path / gone, stored))
            assert "a.weight" in said
        stored = self.stored() | {"a.weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32)}
        assert "other values of its codes" in refusal(checkpoint(tmp_path / "map", stored))

    def test_layers_that_are_stored_transposed(self, tmp_path):
        assert "transposed" in refusal(checkpoint(tmp_path, self.stored(), model_type="gpt2"), Unsupported)

    def test_orders_for_a_kind_of_gpu(self, tmp_path):
        stored = families.load_file(GOLDEN / "int8.safetensors") | {"a.weight_format": np.array(2, np.uint8)}
        stored.pop("expected")
        assert "one kind of GPU" in refusal(checkpoint(tmp_path, stored), Unsupported)


@pytest.mark.parametrize(
    ("method", "tensors", "says"),
    [
        ("gptq", {"a.qweight": np.zeros((2, 8), np.int32), "a.scales": np.ones(8, np.float16),
                  "a.qzeros": np.zeros((1, 1), np.int32)}, "dequantize_model"),
        (None, {"a.qweight": np.zeros((2, 8), np.int32), "a.scales": np.ones(8, np.float16),
                "a.qzeros": np.zeros((1, 1), np.int32)}, "gptqmodel"),
        ("awq", {"a.qweight": np.zeros((2, 8), np.int32), "a.scales": np.ones(8, np.float16)}, "gptqmodel"),
        ("hqq", {"a.W_q": np.zeros((2, 8), np.uint8), "a.scale": np.ones(8, np.float16)}, "layer.dequantize()"),
        ("aqlm", {"a.codes": np.zeros((2, 8), np.int16), "a.codebooks": np.ones(8, np.float16)}, "AQLM"),
        ("torchao", {"a.weight_qdata": np.zeros((2, 8), np.int8), "a.weight_scale": np.ones(8, np.float16)}, "torchao"),
        (None, {"a.weight": np.zeros((8, 8), np.uint32), "a.scales": np.ones(8, np.float16),
                "a.biases": np.ones(8, np.float16)}, "mlx_lm.convert"),
    ],
)  # fmt: skip
def test_other_forms_are_refused_with_the_way_out(method, tensors, says, tmp_path):
    tensors = {name: a.astype(np.int32) if a.dtype in (np.uint32, np.int16) else a for name, a in tensors.items()}
    config = {"quantization_config": {"quant_method": method}} if method else {}
    said = refusal(checkpoint(tmp_path, tensors, **config), Unsupported)
    assert "quantised weights cannot be merged" in said and says in said and "Dequantise first" in said


def test_a_truncated_file_is_told_while_it_is_read(tmp_path):
    folder = checkpoint(tmp_path, eights(), **FP8)
    with closing(open_checkpoint(folder)) as opened:
        (info,) = opened.tensors.values()
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(20_000)
        with pytest.raises(CheckpointError, match="shrank or was truncated"):
            info.source.read_into(np.empty(info.nbytes, np.uint8), 0)
