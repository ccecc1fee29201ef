# SPDX-License-Identifier: Apache-2.0
"""A model's delta as extraction reads it, in every pair of number formats and from sources that know more."""

import threading
from itertools import product

import ml_dtypes
import numpy as np
import pytest

import darekit as dk
import families
from darekit.checkpoints import ArrayBytes, FileRange, TensorInfo, Traits
from darekit.checkpoints.sources import Delta
from darekit.errors import DataError
from darekit.extraction import deltas
from darekit.extraction.deltas import Reader, Room, are_same
from darekit.extraction.targets import Block, Target
from darekit.planning.matching.alignment import AlignedTensor

FORMATS = {"F32": np.float32, "F64": np.float64, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "I32": np.int32}
TILE = 16


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(deltas, "TILE", TILE)


def format_of(array):
    return next(name for name, kind in FORMATS.items() if array.dtype == kind)


def info(array, name="w", traits=None):
    source = ArrayBytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    if traits is not None:
        source = type("Told", (ArrayBytes,), {"traits": traits})(source.data)
    return TensorInfo(name, format_of(array), array.shape, source)


def tensor(base, model, traits=None, dtype=None, base_info=None):
    base = base_info or (None if base is None else info(base))
    shape = model.shape if base is None else base.shape
    return AlignedTensor(
        "w", dtype or (base.dtype if base else format_of(model)), shape, base, (info(model, traits=traits),)
    )


def numbers(count, dtype, seed=0):
    return (np.random.default_rng(seed).normal(size=count)).astype(FORMATS[dtype])


def wide(array):
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32)


PAIRS = [pair for pair in product(FORMATS, FORMATS) if "I32" not in pair]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_delta_is_model_minus_base_in_float32(one, other):
    base, model = numbers(50, one), numbers(50, other, 1)
    double = "F64" in (one, other)
    expected = (
        (model.astype(np.float64) - base.astype(np.float64)).astype(np.float32)
        if double else model.astype(np.float32) - base.astype(np.float32)
    )  # fmt: skip
    aligned = tensor(base, model)
    reader = Reader("m")
    for begin, count in ((0, 50), (3, 20), (16, 16), (15, 2), (49, 1), (5, 0), (32, 18)):
        target = np.full(count, np.nan, np.float32)
        total = reader.into(target, aligned, begin)
        assert target.tobytes() == expected[begin : begin + count].tobytes()
        assert total == pytest.approx(np.sum(expected[begin : begin + count].astype(float) ** 2), rel=1e-12)
    assert reader.square(aligned) == pytest.approx(np.sum(expected.astype(float) ** 2), rel=1e-12)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
def test_rows_that_either_lacks_do_not_differ(dtype):
    base, model = numbers(50, dtype), numbers(50, dtype, 1)
    expected = (wide(model) - wide(base)).astype(np.float32)
    for own, other in ((50, 40), (40, 50), (50, 16), (50, 17)):
        aligned = AlignedTensor("w", dtype, (50,), info(base[:own]), (info(model[:other]),))
        target = np.full(50, np.nan, np.float32)
        total = Reader("m").into(target, aligned, 0)
        have = min(own, other)
        assert total == pytest.approx(np.sum(expected[:have].astype(float) ** 2), rel=1e-12)
        assert target[:have].tobytes() == expected[:have].tobytes() and not target[have:].any()


def test_tiles_end_where_those_of_the_tensor_do():
    seen = []
    base, model = numbers(50, "F32"), numbers(50, "F32", 1)

    def exact(out, at):
        seen.append((at, out.size))
        out[...] = model[at : at + out.size]

    aligned = tensor(base, model, Traits(values=exact))
    Reader("m").into(np.empty(30, np.float32), aligned, 10)
    assert seen == [(10, 6), (16, 16), (32, 8)]
    seen.clear()
    Reader("m").square(aligned)
    assert seen == [(0, 16), (16, 16), (32, 16), (48, 2)]


def test_what_a_source_knows_more_precisely():
    base, stored = numbers(40, "BF16"), numbers(40, "BF16", 1)
    known = np.arange(40, dtype=np.float32)

    def fill(out, at):
        out[...] = known[at : at + out.size]

    own = info(base)
    target = np.empty(40, np.float32)
    reader = Reader("m")
    total = reader.into(target, tensor(base, stored, Traits(delta=Delta(own.source, fill)), base_info=own), 0)
    assert (target == known).all() and total == np.sum(known.astype(float) ** 2)
    # A delta to another base means nothing.
    other = Traits(delta=Delta(info(stored, traits=Traits()).source, fill))
    reader.into(target, tensor(base, stored, other), 0)
    assert (target == wide(stored) - wide(base)).all()
    reader.into(target, tensor(base, stored, Traits(values=fill)), 0)
    assert (target == known - wide(base)).all()
    double = numbers(40, "F64")
    reader.into(target, tensor(double, stored, Traits(values=fill)), 0)
    assert (target == (stored.astype(float) - double).astype(np.float32)).all()


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_what_is_no_number_is_an_error(one, other):
    base, model = numbers(40, one), numbers(40, other, 1)
    for spoilt, value in ((base, np.inf), (model, np.nan)):
        kept = spoilt[20].copy()
        spoilt[20] = value
        with pytest.raises(DataError, match="NaN or Inf in w of m or its base"):
            Reader("m").into(np.empty(40, np.float32), tensor(base, model), 0)
        spoilt[20] = kept
    Reader("m").into(np.empty(40, np.float32), tensor(base, model), 0)


def test_what_a_source_knows_may_be_no_number():
    base = numbers(40, "F32")

    def fill(out, at):
        out[...] = np.nan

    own = info(base)
    for traits in (Traits(values=fill), Traits(delta=Delta(own.source, fill))):
        with pytest.raises(DataError, match="NaN or Inf in w"):
            Reader("m").into(np.empty(40, np.float32), tensor(base, base, traits, base_info=own), 0)
    far = np.array([1e300])
    with pytest.raises(DataError, match="NaN or Inf in w"):
        Reader("m").into(np.empty(1, np.float32), tensor(far, -far), 0)


def test_blocks_lie_upon_each_other():
    base = np.zeros((10, 6), np.float32)
    model = np.arange(60, dtype=np.float32).reshape(10, 6)
    one, other = tensor(base, model), tensor(base, -model)
    reader = Reader("m")
    blocks = [Block(one, 6, (2, 3)), Block(other, 0, (4, 3)), Block(one, 54, (1, 3))]
    found, total = reader.matrix(blocks)
    flat = model.reshape(-1)
    expected = np.concatenate([flat[6:12], -flat[:12], flat[54:57]]).reshape(7, 3)
    assert (found == expected).all() and total == np.sum(expected.astype(float) ** 2)
    again, _ = reader.matrix([Block(one, 0, (2, 6))])
    assert again.base is found.base and blocks[0].count == 6
    room = Room()
    first = room.matrix(2, 3)
    assert room.matrix(3, 2).base is first.base and room.matrix(1, 6).shape == (1, 6)
    assert room.matrix(7, 1).base is not first.base


def test_integers_have_no_delta():
    one = np.arange(20, dtype=np.int32)
    assert Reader("m").square(tensor(one, one + 1)) == 0


def joined(reader, aligned):
    return [raw.size for raw in reader.values(aligned)], b"".join(raw.tobytes() for raw in reader.values(aligned))


@pytest.mark.parametrize(("dtype", "other"), PAIRS)
def test_values_in_the_outputs_format(dtype, other):
    model = numbers(50, other)
    expected = model.astype(np.float64 if "F64" in (dtype, other) else np.float32).astype(FORMATS[dtype])
    size = expected.itemsize
    assert joined(Reader("m"), tensor(None, model, dtype=dtype)) == ([16 * size] * 3 + [2 * size], expected.tobytes())
    base = numbers(50, dtype, 2)
    for have in (40, 33, 32, 16):
        aligned = AlignedTensor("w", dtype, (50,), info(base), (info(model[:have]),))
        assert joined(Reader("m"), aligned)[1] == np.concatenate([expected[:have], base[have:]]).tobytes()


def test_values_that_are_integers_or_no_numbers():
    one = np.arange(20, dtype=np.int32)
    assert joined(Reader("m"), tensor(None, one)) == ([64, 16], one.tobytes())
    for bad, dtype in ((np.float32([np.nan]), "F32"), (np.float32([1e30]), "F16")):
        with pytest.raises(DataError, match=f"or a number too large for {dtype}"):
            joined(Reader("m"), tensor(None, bad, dtype=dtype))


def test_what_must_be_read_in_order_is_read_by_one():
    model = numbers(40, "F32")
    reader = Reader("m")
    for ordered in (True, False):
        locked = []

        def exact(out, at, locked=locked):
            locked.append(reader._one.locked())
            out[...] = 0

        reader.into(np.empty(40, np.float32), tensor(model, model, Traits(values=exact, ordered=ordered)), 0)
        reader.square(tensor(model, model, Traits(values=exact, ordered=ordered)))
        assert set(locked) == {ordered} and not reader._one.locked()
    assert isinstance(reader._one, type(threading.Lock()))


def test_one_tensor_of_two_opened_files(tmp_path):
    class Opened:
        def __init__(self, path):
            self.path = path

    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    first, again, link, other = (Opened(tmp_path / name) for name in ("a", "a", "link", "b"))
    one = FileRange(first, 4, 8)
    assert are_same(one, one) and are_same(one, FileRange(again, 4, 8)) and are_same(one, FileRange(link, 4, 8))
    assert not are_same(one, FileRange(other, 4, 8))
    assert not are_same(one, FileRange(again, 5, 8)) and not are_same(one, FileRange(again, 4, 9))
    bytes_ = ArrayBytes(np.zeros(8, np.uint8))
    assert not are_same(one, bytes_) and not are_same(bytes_, one) and are_same(bytes_, bytes_)


def test_targets_are_made_of_blocks():
    base = np.zeros((10, 6), np.float32)
    one = tensor(base, base)
    two = AlignedTensor("v", "F32", (10, 6), info(base), (info(base),))
    upon = Target("m.q", ((Block(one, 0, (4, 6)), Block(two, 24, (3, 6))),))
    assert upon.shape == (7, 6) and upon.count == 42 and upon.tensors == (one, two) and upon.module == "m.q"
    turned = Target("m.q", ((Block(one, 0, (4, 6)),),), transposed=True)
    assert turned.shape == (6, 4)
    experts = Target("m.experts.up", ((Block(one, 0, (2, 6)),), (Block(one, 12, (2, 6)),)), parameter="up")
    assert (
        experts.shape == (2, 6) and experts.count == 24 and experts.tensors == (one,) and experts.module == "m.experts"
    )


EMBED = "model.embed_tokens.weight"


@pytest.mark.parametrize("save", [(), ("embeddings",)])
def test_a_model_with_fewer_tokens_than_its_base(tmp_path, save):
    """Rows that it lacks do not differ, be they more than a tile; what is saved whole has the base's."""
    rng = np.random.default_rng(0)
    base = families.llama(rng, np.float32)
    model = {name: array + rng.normal(0, 0.01, array.shape).astype(np.float32) for name, array in base.items()}
    fewer = {name: array[:80] if len(array) == families.VOCAB else array for name, array in model.items()}
    families.save(tmp_path / "base", base, families.config(dtype="float32"))
    families.save(tmp_path / "model", fewer, families.config(dtype="float32", vocab=80))
    dk.extract(
        tmp_path / "base", tmp_path / "model", tmp_path / "out", rank=40, vocab="base", save=list(save), threads=1
    )
    stored = families.load(tmp_path / "out")
    delta = stored["base_model.model.lm_head.lora_B.weight"] @ stored["base_model.model.lm_head.lora_A.weight"]
    assert np.abs(delta[80:]).max() < 1e-6
    np.testing.assert_allclose(delta[:80], (model["lm_head.weight"] - base["lm_head.weight"])[:80], atol=1e-6)
    tables = [array for name, array in stored.items() if "embed_tokens" in name]
    assert len(tables) == len(save)
    for table in tables:
        assert (table == np.concatenate([fewer[EMBED], base[EMBED][80:]])).all()
