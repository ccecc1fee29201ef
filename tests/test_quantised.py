# SPDX-License-Identifier: Apache-2.0
"""Quantised weights as numbers: every form against those who define it, and against sums made by hand."""

import hashlib
import json
from contextlib import closing
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import coded
import families
from darekit.checkpoints import open_checkpoint, sample_digest, traits_of
from darekit.checkpoints.headers import HeaderFile
from darekit.checkpoints.quantised import formulas
from darekit.checkpoints.quantised.sources import identity_of
from darekit.errors import Unsupported
from darekit.kernels import quantised as kernels

BF16 = ml_dtypes.bfloat16
GOLDEN = Path(__file__).parent / "golden" / "bitsandbytes"
FORMATS = {"bfloat16": BF16, "float16": np.float16, "float32": np.float32}

RNG = np.random.default_rng(0)
WEIGHT = (RNG.standard_normal((300, 256)) * 0.02).astype(np.float32)  # no multiple of 128 rows
EXPERTS = (RNG.standard_normal((3, 64, 40)) * 0.02).astype(np.float32)
POINTS = RNG.integers(-8, 8, (300, 8))
ORDER = RNG.permutation(np.arange(256) // 32)


def checkpoint(directory, tensors, **config):
    return families.save(directory, tensors, {"model_type": "llama", "torch_dtype": "bfloat16", **config})


def groups(**weights):
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": weights}}}}


def read(directory, step=None):
    """Name -> array, of all that a checkpoint is read as; in pieces of so many bytes."""
    found = {}
    with closing(open_checkpoint(directory)) as opened:
        for name, info in opened.tensors.items():
            raw = np.empty(info.nbytes, np.uint8)
            for begin in range(0, raw.size, step or max(1, raw.size)):
                part = raw[begin : begin + (step or raw.size)]
                info.source.read_into(part, begin)
            found[name] = raw.view(families.KINDS[info.dtype]).reshape(info.shape)
    return found


def equal(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    word = f"u{found.dtype.itemsize}"
    assert np.array_equal(found.view(word), expected.view(word))


FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
W = "l.q_proj.weight"
# (what is stored and worth, config)
FORMS = {
    "fp8": (coded.eights(W, WEIGHT), FP8),
    "fp8-without-config": (coded.eights(W, WEIGHT), {}),
    "fp8-64": (
        coded.eights(W, WEIGHT, (64, 96)), {"quantization_config": {"weight_block_size": [64, 96]}},
    ),
    "fp8-bf16-scales": (coded.eights(W, WEIGHT, number=BF16), FP8),
    "fp8-e5m2": (coded.eights(W, WEIGHT, kind=ml_dtypes.float8_e5m2), FP8),
    "fp8-tensor": (coded.eights(W, WEIGHT, (300, 256), scale="_scale", shape=()), {}),
    "fp8-rows": (coded.eights(W, WEIGHT, (1, 256), scale="_scale"), {}),
    "fp8-rows-flat": (coded.eights(W, WEIGHT, (1, 256), scale="_scale", shape=(300,)), {}),
    "fp8-columns": (coded.eights(W, WEIGHT, (300, 1), scale="_scale"), {}),
    "fp8-experts": (coded.eights("l.experts.up_proj", EXPERTS, (32, 32)), {
        "quantization_config": {"weight_block_size": [32, 32]}}),
    "fp8-each-expert": (coded.eights("l.experts.up_proj", EXPERTS, (64, 40), scale="_scale", shape=(3,)), {}),
    "fp8-comfy": (coded.eights("d.q.weight", WEIGHT, (300, 256), scale=".scale", shape=()), {}),
    "mxfp4": (coded.fours(W, WEIGHT), {}),
    "nvfp4": (coded.fours(W, WEIGHT, 16), {}),
    "gpt-oss": (coded.blocks("l.mlp.experts.gate_up_proj", EXPERTS), {}),
    "int4": (coded.packed(W, WEIGHT), groups(num_bits=4, group_size=32)),
    "int4-channel": (coded.packed(W, WEIGHT, group=256), {}),
    "int4-points": (coded.packed(W, WEIGHT, zeros=POINTS), groups(num_bits=4, group_size=32, symmetric=False)),
    "int4-order": (coded.packed(W, WEIGHT, order=ORDER), groups(num_bits=4, group_size=32)),
    "int4-points-order": (coded.packed(W, WEIGHT, order=ORDER, zeros=POINTS), groups(num_bits=4, group_size=32)),
    "int4-odd-rows": (coded.packed(W, WEIGHT[:, :251], group=251), {}),
    "int3": (coded.packed(W, WEIGHT, 3, 128), groups(num_bits=3, group_size=128)),
    "int8-packed": (coded.packed(W, WEIGHT, 8, 32), groups(num_bits=8, group_size=32)),
    "int8": (coded.integers(W, WEIGHT), {}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_worth_what_it_stands_for(form, dtype, tmp_path):
    (stored, values), config = FORMS[form]
    found = read(checkpoint(tmp_path, {**stored, "n.weight": np.ones(3, BF16)}, torch_dtype=dtype, **config))
    (name,) = found.keys() - {"n.weight"}
    assert name == next(iter(stored)).removesuffix("_packed").removesuffix("_blocks")
    equal(found[name], values.astype(FORMATS[dtype]))


@pytest.mark.parametrize("form", ["fp8", "fp8-experts", "gpt-oss", "int4-points", "int3", "int4-odd-rows", "nvfp4"])
def test_any_range_can_be_read(form, tmp_path):
    (stored, values), config = FORMS[form]
    folder = checkpoint(tmp_path, stored, **config)
    whole = read(folder)
    for step in (1022, 4097):  # of whole elements, and not
        for name, array in read(folder, step).items():
            equal(array, whole[name])
    with closing(open_checkpoint(folder)) as opened:
        (info,) = opened.tensors.values()
        with pytest.raises(ValueError, match="outside"):
            info.source.read_into(np.empty(4, np.uint8), info.nbytes - 2)
        assert info.count == values.size


def test_threads_read_the_same(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    weight = (RNG.standard_normal((8, 128, 512)) * 0.02).astype(np.float32)
    stored, values = coded.blocks("l.mlp.experts.down_proj", weight)
    with closing(open_checkpoint(checkpoint(tmp_path, stored))) as opened, ThreadPoolExecutor(4) as pool:
        (info,) = opened.tensors.values()
        raw = np.empty(info.nbytes, np.uint8)
        pieces = [raw[i::1][: 50000 - i % 50000] for i in range(0, raw.size, 50000)]
        list(pool.map(lambda i: info.source.read_into(pieces[i], i * 50000), range(len(pieces))))
        equal(raw.view(BF16).reshape(info.shape), values.astype(BF16))
        assert len(info.source.shelf._kept) <= 4


@pytest.mark.parametrize("rows", [256, 251])  # transposed by words, and not
def test_every_code_times_every_power_of_two(rows, tmp_path):
    """Sums of exponents where products are normal numbers, and products of floats where they are not: the same bits."""
    every = np.arange(rows)
    scales = np.stack((every % 255, 2 + every % 251, 1 + every % 252, every % 253), axis=-1).astype(np.uint8)[None]
    blocks = np.empty((1, rows, 4, 16), np.uint8)
    blocks[0, :, :, :8] = np.arange(8, dtype=np.uint8) * 17 + 8 * 16  # each code with each scale
    blocks[0, :, :, 8:] = np.arange(8, dtype=np.uint8) * 16 + np.arange(8, 16, dtype=np.uint8)
    name = "l.mlp.experts.down_proj"
    found = read(checkpoint(tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": scales}))[name]
    codes = np.stack((blocks & 15, blocks >> 4), axis=-1).reshape(1, rows, 4, 32)
    with np.errstate(over="ignore"):
        values = formulas.E2M1[codes] * formulas.powers(scales)[..., None]
        equal(found, values.reshape(1, rows, 128).swapaxes(1, 2).astype(BF16))


@pytest.mark.parametrize("name", ["nf4", "nf4-double", "fp4", "int8"])
def test_bitsandbytes_known_answers(name, tmp_path):
    """Files and answers are those of bitsandbytes 0.50.2: quantize_4bit and dequantize_4bit, and of int8 the same."""
    stored = families.load_file(GOLDEN / f"{name}.safetensors")
    expected = stored.pop("expected")
    if name == "int8":
        by_hand = stored["a.weight"] * stored["a.SCB"][:, None] * np.float32(1 / 127)
    else:
        table, absmax = stored["a.weight.quant_map"], stored["a.weight.absmax"]
        if name == "nf4-double":
            facts = json.loads(stored["a.weight.quant_state.bitsandbytes__nf4"].tobytes())
            outer = np.repeat(stored["a.weight.nested_absmax"], facts["nested_blocksize"])[: absmax.size]
            absmax = stored["a.weight.nested_quant_map"][absmax] * outer + np.float32(facts["nested_offset"])
        codes = np.stack([stored["a.weight"] >> 4, stored["a.weight"] & 15], axis=-1).reshape(-1)
        by_hand = (table[codes] * np.repeat(absmax, 64)).reshape(expected.shape)
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    found = read(checkpoint(tmp_path, stored, **config))
    assert list(found) == ["a.weight"]
    equal(found["a.weight"], by_hand.astype(BF16))
    equal(found["a.weight"], expected)


@pytest.mark.check
def test_transformers_decodes_the_same(tmp_path):
    """Fp8Dequantize and its like for gpt-oss, on what transformers' own quantiser writes."""
    torch = pytest.importorskip("torch")
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    def plain(tensors):
        views = {torch.float8_e4m3fn: coded.E4M3, torch.bfloat16: BF16}
        return {
            n: t.contiguous().view(torch.uint8).numpy().view(views[t.dtype]).reshape(t.shape)
            if t.dtype in views
            else t.numpy()
            for n, t in tensors.items()
        }

    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=[64, 32], scale_fmt=None))
    for number, shape in enumerate([(128, 96), (3, 64, 32)]):
        made = Fp8Quantize(quantizer).convert({"l.experts.up_proj": torch.randn(shape) * 0.02})
        weight, scale = made.values()
        expected = Fp8Dequantize(quantizer)._dequantize_one(weight, scale, torch.bfloat16)
        config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 32]}}
        found = read(checkpoint(tmp_path / str(number), plain(made), **config))
        equal(found["l.experts.up_proj"], plain({"e": expected})["e"])
    blocks = torch.randint(0, 256, (3, 40, 4, 16), dtype=torch.uint8)
    scales = torch.randint(90, 140, (3, 40, 4), dtype=torch.uint8)
    name = "l.mlp.experts.gate_up_proj"
    found = read(checkpoint(tmp_path / "oss", plain({f"{name}_blocks": blocks, f"{name}_scales": scales})))
    equal(found[name], plain({"e": convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)})["e"])


@pytest.mark.check
@pytest.mark.parametrize("number", ["bfloat16", "float16", "float32"])
def test_compressed_tensors_decodes_the_same(number, tmp_path):
    """Its compressors' own `decompress`, on what `compress` writes; scales of each number format."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from safetensors.torch import save_file

    dtype = getattr(torch, number)
    weight = torch.randn(40, 96) * 0.02
    rows = weight.abs().amax(-1, keepdim=True)
    of_groups = weight.unflatten(-1, (-1, 32)).abs().amax(-1)
    points = torch.randint(-2, 2, of_groups.shape, dtype=torch.int8)
    cases = [
        *[("pack-quantized", {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32,
           "symmetric": zero is None}, of_groups / (2 ** (bits - 1) - 1), zero)
          for bits in (4, 8, 3) for zero in (None, points)],
        ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}, rows / 7, None),
        ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "tensor"}, rows.max().reshape(1) / 7, None),
        ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}, rows / 127,
         points[:, :1]),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, rows / 448, None),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, rows.max().reshape(1) / 448, None),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 64]},
         torch.rand(2, 2) * 1e-3 + 1e-4, None),
    ]  # fmt: skip
    for i, (form, facts, scale, zero) in enumerate(cases):
        arguments = QuantizationArgs(**facts)
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        given = {"weight": weight.to(dtype), "weight_scale": scale.to(dtype)} | (
            {} if zero is None else {"weight_zero_point": zero}
        )
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(dict(given), scheme)
        expected = compressor.decompress(dict(stored), scheme)["weight"]
        folder = tmp_path / str(i)
        checkpoint(folder, {}, torch_dtype=number, **groups(**json.loads(arguments.model_dump_json())))
        save_file({f"l.{name}": tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
        found = read(folder)["l.weight"]
        assert found.dtype == FORMATS[number] and expected.dtype == dtype
        assert np.array_equal(found.view(np.uint8), expected.contiguous().view(torch.uint8).numpy()), (form, facts)


# --- the definition and its twins


CODINGS = {
    "F8_E4M3": (formulas.eights("F8_E4M3"), kernels.E4M3), "F8_E5M2": (formulas.eights("F8_E5M2"), kernels.LOOKED_UP),
    "I8": (formulas.eights("I8"), kernels.INT8), "E2M1": (formulas.E2M1, kernels.E2M1),
    "NF4": (formulas.NF4, kernels.LOOKED_UP),
    **{f"INT{bits}": (formulas.integers(bits), kernels.integers(bits)) for bits in range(1, 9)},
}  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_kernel_is_the_definition(data):
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 2100))
    block = data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns))
    start = data.draw(st.integers(0, rows * columns - 1))
    count = data.draw(st.integers(0, min(10_000, rows * columns - start)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    grid = -(-rows // block[0]), -(-columns // block[1])
    table, how = CODINGS[data.draw(st.sampled_from(list(CODINGS)))]
    scales = (rng.random(grid, np.float32) - np.float32(0.5)) * np.float32(10.0 ** data.draw(st.integers(-38, 38)))
    zeros = rng.integers(-8, 8, grid).astype(np.float32)
    codes = rng.integers(0, table.size, count).astype(np.uint8)
    factor, none = np.float32(data.draw(st.sampled_from([1, 0.3]))), data.draw(st.booleans())
    place, scratch = (start, columns, *block, 0, 0, factor), np.empty((2, kernels.BLOCK), np.float32)
    given = np.empty((0, 0), np.float32) if none else zeros
    zeros = np.zeros_like(zeros) if none else zeros
    expected = formulas.worth(codes, table, zeros, scales, start, columns, block, (0, 0), factor)
    found, narrow = np.empty(count, np.float32), np.empty(count, np.uint16)
    kernels.worth(codes, table, how, given, scales, *place, found, scratch)
    assert alike(found, expected)
    with np.errstate(over="ignore"):
        rounded = expected.astype(BF16)
    bad = kernels.worth_bf16(codes, table, how, given, scales, *place, narrow, scratch)
    assert alike(narrow.view(BF16), rounded) and bad == np.count_nonzero(~np.isfinite(rounded))


def alike(one, other):
    """To the bit; but one NaN is like another."""
    numbers = ~np.isnan(other.astype(np.float32))
    word = f"u{one.dtype.itemsize}"
    return np.array_equal(one.view(word)[numbers], other.view(word)[numbers]) and bool(np.isnan(one[~numbers]).all())


@pytest.mark.parametrize("name", CODINGS)
def test_arithmetic_is_the_table(name):
    """Every code, also those below the smallest normal number, and those that are none."""
    table, how = CODINGS[name]
    codes, found = np.arange(table.size, dtype=np.uint8), np.empty(table.size, np.float32)
    one = np.ones((1, 1), np.float32)
    place = (0, 256, 1, 256, 0, 0, np.float32(1))
    kernels.worth(
        codes, table, how, np.empty((0, 0), np.float32), one, *place, found, np.empty((2, kernels.BLOCK), np.float32)
    )
    assert alike(found, table)


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 64, 1001])
@pytest.mark.parametrize("high", [False, True])
def test_halves_of_bytes(skip, count, high):
    raw = RNG.integers(0, 256, (count + skip + 1) // 2 + 1).astype(np.uint8)
    found = np.empty(count, np.uint8)
    kernels.nibbles(raw, high, skip, found)
    assert np.array_equal(found, formulas.nibbles(raw, high)[skip : skip + count])


@pytest.mark.parametrize("shape", [(8, 8), (16, 24), (264, 72), (40, 520)])
def test_bytes_are_transposed(shape):
    rows, found = RNG.integers(0, 256, shape).astype(np.uint8), np.zeros(shape[::-1], np.uint8)
    kernels.flip(rows.view("<u8"), found.view("<u8"))
    assert np.array_equal(found, rows.T)


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_hold_codes_one_behind_the_other(bits):
    codes = RNG.integers(0, 1 << bits, (3, 77)).astype(np.uint8)
    assert np.array_equal(formulas.unpacked(coded.words(codes, bits).view(np.uint32), bits, 77), codes)


def test_cells_tell_the_error_of_rounding(tmp_path):
    """What the codes say of the error, without the weights, against the error itself."""
    weight = (RNG.standard_normal((256, 1024)) * 0.02).astype(np.float32)
    cases = {
        "fp8": coded.eights(W, weight), "mxfp4": coded.fours(W, weight), "int4": coded.packed(W, weight),
        "int8": coded.integers(W, weight), "nvfp4": coded.fours(W, weight, 16),
    }  # fmt: skip
    for name, (stored, values) in cases.items():
        true = np.linalg.norm(values - weight) / np.linalg.norm(weight)
        with closing(open_checkpoint(checkpoint(tmp_path / name, stored))) as opened:
            error, square = traits_of(opened.tensors[W].source).rounding()
        assert 0.85 < np.sqrt(error / square) / true < 1.2, (name, np.sqrt(error / square), true)
    stored, values = coded.blocks("l.mlp.experts.up_proj", weight[None])
    true = np.linalg.norm(values - weight) / np.linalg.norm(weight)
    with closing(open_checkpoint(checkpoint(tmp_path / "oss", stored))) as opened:
        (info,) = opened.tensors.values()
        error, square = traits_of(info.source).rounding()
    assert 0.85 < np.sqrt(error / square) / true < 1.2


# --- what is frozen


def test_identities_never_change(tmp_path):
    """Seeds of masks depend on these."""
    codes = (np.arange(64 * 64) % 127).astype(np.uint8).view(coded.E4M3).reshape(64, 64)
    scales = np.array([[0.5]], np.float32)
    folder = checkpoint(tmp_path / "a", {"w.weight": codes, "w.weight_scale_inv": scales})
    facts = {"form": "eights", "dtype": "BF16", "shape": [64, 64], "rows": 64, "block": [64, 64]}
    text = b"darekit-dequantised-1\0" + json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    text += b"codes\0F8_E4M3\x0064,64\0" + codes.tobytes()[:4096]
    text += b"scales\0F32\x001,1\0" + scales.tobytes()
    with closing(open_checkpoint(folder)) as opened:
        (info,) = opened.tensors.values()
        assert traits_of(info.source).identity == hashlib.blake2b(text, digest_size=16).digest()
        assert traits_of(info.source).identity.hex() == "7290a902ac348c7685ebd66b1c8c18f9"
        head = b"w.weight\0BF16\x0064,64\0darekit-computed-1\0"
        whole = hashlib.blake2b(head + traits_of(info.source).identity, digest_size=16)
        assert sample_digest(opened) == whole.digest()
        assert sample_digest(opened).hex() == "778baa223ea89d530648286710784424"
        assert identity_of({"form": "other"}, info.source.stored.parts) != traits_of(info.source).identity
        # Packs are bound to what is decoded: to a copy that stores it as well.
        decoded = families.save(tmp_path / "b", {"w.weight": (codes.astype(np.float32) * 0.5).astype(BF16)})
        with closing(open_checkpoint(decoded)) as plain:
            assert sample_digest(opened, decoded=True) == sample_digest(plain) != sample_digest(opened)


def test_traits(tmp_path):
    (stored, values), config = FORMS["mxfp4"]
    with closing(open_checkpoint(checkpoint(tmp_path, stored, **config))) as opened:
        traits = traits_of(opened.tensors[W].source)
        assert traits.files == opened.files and traits.grain == 1
        assert traits.cost == (values.size / 2 + values.size / 32) / (values.size * 2)


# --- headers, names, config


@pytest.mark.parametrize("form", ["fp8", "gpt-oss", "int4", "int4-channel", "int8", "mxfp4"])
def test_headers_alone_tell_names_and_shapes(form, tmp_path):
    (stored, values), config = FORMS[form]
    folder = checkpoint(tmp_path, stored, **config)
    with (folder / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.truncate(8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little"))
    with closing(open_checkpoint(folder, open_file=lambda path: HeaderFile(path, size))) as opened:
        (info,) = opened.tensors.values()
        assert (info.shape, info.dtype) == (values.shape, "BF16")


def test_what_only_values_tell_is_not_guessed_from_headers(tmp_path):
    stored = families.load_file(GOLDEN / "nf4.safetensors")
    stored.pop("expected")
    folder = checkpoint(tmp_path, stored)
    with pytest.raises(Unsupported, match=r"its shape is stored in a\.weight\.quant_state.*download the model first"):
        open_checkpoint(folder, open_file=lambda path: HeaderFile(path, path.stat().st_size))


def test_a_mixture_is_read_tensor_by_tensor(tmp_path):
    """Some layers are not quantised, one is in another form, and activations have scales of their own."""
    plain = {
        "l.0.o_proj.weight": WEIGHT.astype(BF16),
        "norm.weight": np.ones(4, BF16),
        "h.bias": np.ones(2, np.float32),
    }
    eights, values = coded.eights("l.0.q_proj.weight", WEIGHT)
    fours, others = coded.fours("l.1.up_proj.weight", WEIGHT)
    unread = {
        "l.0.q_proj.input_scale": np.ones((), np.float32), "l.0.self_attn.k_scale": np.ones((), np.float32),
        "l.0.q_proj.activation_scale": np.ones((), np.float32),
        "l.1.up_proj.input_global_scale": np.ones(1, np.float32),
    }  # fmt: skip
    folder = checkpoint(tmp_path, {**plain, **eights, **fours, **unread}, **FP8)
    (folder / "hf_quant_config.json").write_text("{}")
    found = read(folder)
    assert found.keys() == {*plain, "l.0.q_proj.weight", "l.1.up_proj.weight"}
    for name, array in plain.items():
        equal(found[name], array)
    equal(found["l.0.q_proj.weight"], values.astype(BF16))
    equal(found["l.1.up_proj.weight"], others.astype(BF16))
    with closing(open_checkpoint(folder)) as opened:
        assert opened.config == {"model_type": "llama", "torch_dtype": "bfloat16"}
        assert "quantization_config" not in opened.companions["config.json"].decode()
        assert "hf_quant_config.json" not in opened.companions and opened.directory is None
        (note,) = opened.notes
    assert "2 quantised tensors are read as bfloat16" in note and "1 of MXFP4, groups of 32" in note
    assert "1 of FP8 (E4M3), blocks of 128 x 128" in note and "for activations: " in note and "input_scale" in note


def test_the_format_is_that_of_the_model(tmp_path):
    (stored, values), _ = FORMS["fp8"]
    for number, kind in (("F16", np.float16), ("BF16", BF16)):
        folder = families.save(tmp_path / number, {**stored, "n.weight": np.ones(3, kind)})
        equal(read(folder)[W], values.astype(kind))
    nested = families.save(tmp_path / "nested", stored, {"text_config": {"dtype": "float16"}, **FP8})
    equal(read(nested)[W], values.astype(np.float16))
    with closing(open_checkpoint(nested)) as opened:
        assert opened.config == {"text_config": {"dtype": "float16"}}


def test_experts_that_were_decoded_and_saved_under_names_of_codes(tmp_path):
    """As transformers 5.23 saves a gpt-oss that it has decoded, and does not load again."""
    array = EXPERTS.astype(BF16)
    folder = checkpoint(tmp_path, {"l.mlp.experts.down_proj_blocks": array, "l.x_blocks": np.ones(2, BF16)})
    found = read(folder)
    assert found.keys() == {"l.mlp.experts.down_proj", "l.x_blocks"}
    equal(found["l.mlp.experts.down_proj"], array)
    with closing(open_checkpoint(folder)) as opened:
        assert "names of MXFP4 codes" in opened.notes[0]


def test_numbers_beside_a_stale_key_stay_numbers(tmp_path):
    folder = checkpoint(tmp_path, {W: WEIGHT.astype(BF16), "b.scale": np.ones(2, np.float32)}, **FP8)
    equal(read(folder)[W], WEIGHT.astype(BF16))
    with closing(open_checkpoint(folder)) as opened:
        assert "not quantised" in opened.notes[0] and opened.directory == folder


def test_four_bits_in_bytes_that_have_a_sign(tmp_path):
    """DeepSeek-V4: I8 weights of two codes each, with scales in F8_E8M0."""
    stored, values = coded.fours(W, WEIGHT)
    codes, scales = stored.values()
    e8m0 = scales.view(ml_dtypes.float8_e8m0fnu)
    found = read(checkpoint(tmp_path, {W: codes.view(np.int8), W.replace("weight", "scale"): e8m0}))
    equal(found[W], values.astype(BF16))


def test_nvfp4_of_modelopt(tmp_path):
    stored, _ = coded.fours(W, WEIGHT, 16)
    codes, scales, whole = stored.values()
    second = (1 / whole[0]).astype(np.float32)
    found = read(checkpoint(tmp_path, {W: codes, f"{W}_scale": scales, f"{W}_scale_2": np.array(second)}))
    wide = coded.spread(scales.astype(np.float32) * second, WEIGHT.shape, (1, 16))
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(WEIGHT.shape)
    equal(found[W], (np.array(coded.E2M1, np.float32)[nibbles] * wide).astype(BF16))


def test_mxfp8(tmp_path):
    exponents = coded.powers(WEIGHT, (1, 32), 448)
    wide = coded.spread(np.ldexp(np.float32(1), exponents.astype(int) - 127), WEIGHT.shape, (1, 32))
    codes = (WEIGHT / wide).astype(coded.E4M3)
    for i, scales in enumerate((exponents, exponents.view(ml_dtypes.float8_e8m0fnu))):
        found = read(checkpoint(tmp_path / str(i), {W: codes, f"{W}_scale": scales}, **FP8))
        equal(found[W], (codes.astype(np.float32) * wide).astype(BF16))
