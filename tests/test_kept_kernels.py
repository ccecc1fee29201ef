# SPDX-License-Identifier: Apache-2.0
"""Kernels whose object code is kept: loaded without numba, checked before it is loaded, and never needed."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from darekit.kernels import compiling, cpu
from darekit.kernels.compiling import OPTIONS, KeptKernel

RNG = np.random.default_rng(0)
BASE, RAW = (RNG.integers(0, 0x7F00, 3000).astype(np.uint16) for _ in range(2))


def run(kernel):
    bins, delta = np.zeros(1 << 15, np.int64), np.empty(BASE.size, np.float32)
    assert kernel(BASE, RAW, bins, delta) == 0
    return bins, delta


def values(raw):
    return (raw.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def fresh(folder, monkeypatch):
    """Makes kernels that have not run yet in this process, with a cache of their own."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder))
    return lambda: KeptKernel(cpu.sample_bf16.function, OPTIONS)


def test_the_second_run_needs_no_numba(fresh, folder, monkeypatch):
    expected = values(RAW) - values(BASE)
    counts = np.bincount((expected.view(np.uint32) & 0x7FFFFFFF) >> 16, minlength=1 << 15)
    for first in (True, False):
        with monkeypatch.context() as patch:
            if not first:
                patch.setattr(KeptKernel, "compile", lambda kernel: pytest.fail("compiled again"))
            bins, delta = run(fresh())
        assert np.array_equal(delta.view(np.uint32), expected.view(np.uint32)) and np.array_equal(bins, counts)
        assert [path.suffix for path in (folder / "darekit").iterdir()] == [".o"], "one file, and no draft of it"


def test_damaged_code_is_not_loaded_but_made_again(fresh, folder):
    run(fresh())
    (path,) = (folder / "darekit").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:], b""):
        path.write_bytes(damaged)
        assert compiling._stored(path) is None
        run(fresh())
        assert path.read_bytes() != damaged and compiling._stored(path) is not None


def test_nothing_needs_to_be_kept(fresh, folder, monkeypatch):
    blocked = folder / "a-file"
    blocked.touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(blocked))
    run(fresh())


def test_where_nothing_can_be_written_kernels_serve_one_run(monkeypatch):
    """As in a container whose file system is read-only, without a home: numba itself refuses to compile there."""
    from numba.core import caching

    monkeypatch.setenv("DAREKIT_KERNEL_CACHE", "1")
    monkeypatch.setattr(caching.FunctionCache._impl_class, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator"):
        caching.FunctionCache(cpu.scale.function)
    monkeypatch.setattr(compiling, "_folder", lambda source: (_ for _ in ()).throw(RuntimeError("no home")))
    for kind in (compiling.Kernel, KeptKernel):
        values = np.ones(3, np.float32)
        kind(cpu.scale.function, compiling.CACHED)(values, np.float32(2))
        assert values.tolist() == [2, 2, 2]


@pytest.mark.parametrize(("said", "kept"), [("0", False), ("1", True), ("", True)])
def test_the_cache_can_be_turned_off(fresh, tmp_path, monkeypatch, said, kept):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("DAREKIT_KERNEL_CACHE", said)
    kernel = fresh()
    run(kernel)
    assert any(tmp_path.iterdir()) is kept
    if kept:
        monkeypatch.setenv("DAREKIT_KERNEL_CACHE", "0")
        monkeypatch.setattr(compiling, "_stored", lambda path: pytest.fail("read from disk"))
        run(fresh())


def test_with_the_cache_off_numba_keeps_nothing_either(tmp_path):
    code = "import numpy as np; from darekit.kernels import cpu; cpu.scale(np.ones(3, np.float32), np.float32(2))"
    for said, kept in (("0", False), ("1", True)):
        folder = tmp_path / said
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "DAREKIT_KERNEL_CACHE": said}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        assert any(folder.rglob("*.nb?")) is kept


def add_all(numbers, out):
    for i in range(out.size):
        out[i] = np.float32(len(numbers)) + numbers[0]
    return 0


@pytest.mark.parametrize("many", [1, 2, 3])
def test_a_tuple_of_one_number_is_kept_as_a_tuple(folder, monkeypatch, many):
    """A merge of one model has a single weight: taken for a number, its kernel was compiled anew in every process."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder))
    for first in (True, False):
        with monkeypatch.context() as patch:
            if not first:
                patch.setattr(KeptKernel, "compile", lambda kernel: pytest.fail("compiled again"))
            out = np.empty(3, np.float32)
            assert KeptKernel(add_all, OPTIONS)((np.float32(0.5),) * many, out) == 0
            assert out.tolist() == [many + 0.5] * 3


def allocate(values):
    return np.empty(values.size).size


def test_a_kernel_that_needs_numbas_run_time_is_not_kept(fresh, folder):
    run(fresh())
    before = sorted((folder / "darekit").iterdir())
    assert KeptKernel(allocate, OPTIONS)(np.ones(7, np.float32)) == 7
    assert sorted((folder / "darekit").iterdir()) == before


def test_arguments_that_c_cannot_take_go_to_numba(fresh, folder):
    run(fresh())
    before = sorted((folder / "darekit").iterdir())
    bins, delta = np.zeros(1 << 15, np.int64), np.empty(2 * BASE.size, np.float32)[::2]
    assert fresh()(BASE, RAW, bins, delta) == 0
    assert np.array_equal(bins, run(fresh())[0])
    assert sorted((folder / "darekit").iterdir()) == before


def test_a_part_from_another_file_is_not_taken_as_it_was(tmp_path, monkeypatch):
    """numba keeps a kernel by its own file, and all that it calls with it: `cpu.py` changed, `surveys.py` did not."""
    monkeypatch.setenv("DAREKIT_KERNEL_CACHE", "1")
    whole = tmp_path / "whole.py"
    whole.write_text("def whole(x):\n    return part(x[0])\n")
    found = []
    for number in (1.0, 2.0, 1.0):
        monkeypatch.setattr(compiling, "_sources", lambda number=number: bytes([int(number)]))
        (tmp_path / "part.py").write_text(f"def part(x):\n    return x + {number}\n")
        names = {}
        for path in (tmp_path / "part.py", whole):
            exec(compile(path.read_text(), path, "exec"), names)
            names[path.stem] = compiling.Kernel(names[path.stem], compiling.CACHED)
        found.append(names["whole"](np.zeros(1)))
    assert found == [1.0, 2.0, 1.0]
    assert len(list(tmp_path.rglob("whole.whole*.nbi"))) == 2, "the third run takes the first one's"


def test_what_kept_code_is_known_by(monkeypatch):
    import llvmlite
    import llvmlite.binding as llvm

    seen = set()

    def place(module=compiling, name="_sources", change=None):
        with monkeypatch.context() as patch:
            if change is not None:
                patch.setattr(module, name, change)
            compiling._about.cache_clear()
            seen.add(compiling._place(cpu.scale.function, ("f1", "f")).name)
        compiling._about.cache_clear()

    place()
    place()
    assert len(seen) == 1
    place(name="_sources", change=lambda: b"others")
    place(name="_about_numba", change=lambda: b"another release")
    place(llvmlite, "__version__", "0.0.1")
    place(llvm, "get_host_cpu_name", lambda: "another")
    place(llvm, "get_host_cpu_features", lambda: llvm.FeatureMap(sse=True))
    assert len(seen) == 6


def test_threads_that_come_first_together(monkeypatch):
    """A kernel is seen as compiled only when those that it calls are; numba cannot type the others."""
    import numba

    slow = numba.njit

    def njit(**options):
        time.sleep(0.02)
        return slow(**options)

    monkeypatch.setattr(numba, "njit", njit)
    names = {}
    exec(
        "def twice(x):\n    return x + x\n"
        "def four_times(x):\n    return twice(twice(x))\n"
        "def entry(x):\n    return four_times(x[0]) + twice(x[0])\n",
        names,
    )
    for name in ("entry", "twice", "four_times"):
        names[name] = compiling.Kernel(names[name], OPTIONS)
    found = []

    def work(wait):
        time.sleep(wait)
        found.append(names["entry"](np.ones(1)))

    threads = [threading.Thread(target=work, args=(0.01 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [6.0] * 8


def test_a_quantised_merge_needs_no_numba_when_its_kernels_are_kept(tmp_path):
    import coded
    import families

    weight = np.random.default_rng(0).standard_normal((256, 256), np.float32)
    for name, form in (("fp8", coded.eights), ("rows", lambda n, w: coded.eights(n, w, (1, 256), scale="_scale"))):
        (tmp_path / name).mkdir()
        families.write_safetensors(tmp_path / name / "model.safetensors", form("a.up_proj.weight", weight)[0])
        (tmp_path / name / "config.json").write_text('{"torch_dtype": "bfloat16"}')
        program = (
            "import sys, darekit as dk\n"
            f"recipe = {{'models': ['{tmp_path / name}'], 'merge_method': 'linear'}}\n"
            f"dk.merge(recipe, '{tmp_path}/out', overwrite=True)\n"
            "print('numba' in sys.modules)"
        )
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        found = [
            subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
            for _ in range(2)
        ]
        assert found[1].stdout.split()[-1] == "False", found[1].stdout
