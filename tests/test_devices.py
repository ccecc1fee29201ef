# SPDX-License-Identifier: Apache-2.0
"""What runs on a GPU gives what it gives on the CPU: bits where weights are concerned, nearly that where models run.

Only where there is one; its float32 is asked to be exact to 24 bits, as torch's default is.
"""

import contextlib
from contextlib import closing

import numpy as np
import pytest

import darekit as dk
import families
from darekit.errors import DataError
from darekit.inputs.statistics import open_statistics
from darekit.live.models import build, open_live
from darekit.planning.opening import open_plan
from darekit.recipe import read_recipe
from test_statistics_merges import data_of

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

DARE = {"sparsify": {"method": "dare", "drop_rate": 0.5, "seed": 3}}


@pytest.fixture
def data(real, tmp_path):
    return data_of(tmp_path, real.kind)


def outputs(live):
    ids = torch.arange(3, 19, device=live.device).reshape(2, 8)
    with torch.no_grad():
        return live.model(input_ids=ids).logits.float().cpu()


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_recipe_is_merged_into_the_gpus_memory(real, dtype):
    recipe, other = read_recipe(families.recipe(real.path, **DARE)), read_recipe(families.recipe(real.path, k=1))
    with open_plan(recipe) as plan, open_plan(other) as single:
        near = build(plan, device="cpu", dtype=dtype or real.dtype)
        far = build(plan, device="cuda", dtype=dtype)
        for which in (plan, single, plan):
            for live in (near, far):
                live.put(which)
            state = far.model.state_dict()
            assert all(tensor.is_cuda and tensor.dtype == getattr(torch, dtype or real.dtype)
                       for tensor in state.values() if tensor.is_floating_point())  # fmt: skip
            assert all(torch.equal(tensor, state[name].cpu()) for name, tensor in near.model.state_dict().items())
    if dtype:
        torch.testing.assert_close(outputs(far), outputs(near), atol=1e-5, rtol=1e-4)


def test_arrays_on_the_gpu_are_merged_as_those_of_the_host(llamas):
    near = [
        {name: torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16) for name, array in state.items()}
        for state in (llamas.base, *llamas.models)
    ]
    far = [{name: tensor.cuda() for name, tensor in state.items()} for state in near]
    expected, found = (
        dk.merge_tensors(states[0], states[1:], sparsify=dk.dare(0.5), method=dk.ties(), seeds=[1, 2, 3])
        for states in (near, far)
    )
    assert all(torch.equal(tensor, found[name].cpu()) for name, tensor in expected.items())
    assert {tensor.device.type for tensor in found.values()} <= {"cuda", "cpu"}


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_statistics(real, data, tmp_path, kind):
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.safetensors"
        dk.make_statistics(kind, real.path / "m0", data, out, device=device, dtype="float32")
    files = (open_statistics(tmp_path / f"{device}.safetensors") for device in ("cpu", "cuda"))
    with closing(next(files)) as near, closing(next(files)) as far:
        assert near.tensors.keys() == far.tensors.keys() and near.rows == far.rows
        found = {name: (float32_of(near, name), float32_of(far, name)) for name in near.tensors}
        largest = max(float(np.abs(a).max()) for a, _ in found.values())  # BERT's keys have biases without a gradient
        for name, (a, b) in found.items():
            np.testing.assert_allclose(b, a, rtol=2e-3, atol=1e-6 * largest, err_msg=name)


def float32_of(statistics, name):
    info = statistics.tensors[name]
    raw = np.empty(info.nbytes, np.uint8)
    info.source.read_into(raw, 0)
    return raw.view(np.float32)


def test_judges_similarity_and_advice(real, data, tmp_path):
    near, far = (
        dk.similarity(real.path / "base", real.path / "m0", data=data, drop_rate=0.9, device=device, dtype="float32")
        for device in ("cpu", "cuda")
    )
    for a, b in zip(near.curves, far.curves, strict=True):
        np.testing.assert_allclose(b.cosine, a.cosine, atol=1e-4)
    near, far = (
        dk.recommend(real.path / "base", real.path / "m0", drop_rate=0.9, data=data, device=device, dtype="float32")
        for device in ("cpu", "cuda")
    )
    for a, b in zip(near.tensors, far.tensors, strict=True):
        assert a.name == b.name and (a.kappa is None) == (b.kappa is None)
        assert a.kappa is None or b.noise_to_signal == pytest.approx(a.noise_to_signal, rel=1e-2)
    if real.kind != "bert":
        (tmp_path / "asked.jsonl").write_text('{"prompt": "w3 w4", "completion": "w5 w6"}\n' * 3)
        near, far = (
            dk.evaluate(
                {"it": families.recipe(real.path, **DARE)},
                data=tmp_path / "asked.jsonl",
                device=device,
                dtype="float32",
            )
            for device in ("cpu", "cuda")
        )
        assert far.names == near.names and not far.failed
        for name in near.names:
            assert far.row(name)[0].value == pytest.approx(near.row(name)[0].value, rel=1e-3, abs=1e-6)


def test_no_gpu_memory_says_what_to_do(real, data):
    """Another process may have taken it; here this one may have no more, and uses what it has up."""
    taken = []
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                taken.append(torch.empty(512, dtype=torch.uint8, device="cuda"))
        with pytest.raises(DataError, match=r"out of memory while loading .*m0; use --dtype bfloat16"):
            dk.similarity(real.path / "base", real.path / "m0", data=data, drop_rate=0.9, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_gpu_is_what_is_taken_where_nothing_is_said(real):
    with open_live(real.path / "m0") as live:
        assert live.device.type == "cuda"
        assert {parameter.dtype for parameter in live.model.parameters()} == {getattr(torch, real.dtype)}
