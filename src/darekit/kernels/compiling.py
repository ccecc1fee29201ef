# SPDX-License-Identifier: Apache-2.0
"""When kernels are compiled: not before one is called, and the fast lane's not even then, if a run before did it.

Importing numba and having it look up its caches takes 0.6 s, as long as merging a small model. So numba is imported
by the first call of a kernel (`kernel`), and the few kernels that whole merges consist of (`kept_kernel`) are stored
as object code, which LLVM loads without numba (docs/decisions/0025). Where anything about that fails, numba does it.

With DAREKIT_KERNEL_CACHE=0 in the environment nothing compiled is read from disk or written to it, by numba neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, update_wrapper
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

SWITCH = "DAREKIT_KERNEL_CACHE"
OPTIONS = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
CACHED = {**OPTIONS, "cache": True}
NEEDS_NOBODY = {"memset", "memcpy", "memmove"}  # what object code may call: every process has them

_LOCK = threading.RLock()
# One letter per type, as numpy's: (name in numba, ctypes type).
_TYPES = {
    "q": ("int64", ctypes.c_int64), "Q": ("uint64", ctypes.c_uint64), "I": ("uint32", ctypes.c_uint32),
    "H": ("uint16", ctypes.c_uint16), "B": ("uint8", ctypes.c_uint8), "f": ("float32", ctypes.c_float),
    "d": ("float64", ctypes.c_double),
}  # fmt: skip
_NUMBERS: dict[type, str] = {getattr(np, name): char for char, (name, _) in _TYPES.items()}
_ARRAYS: dict[tuple[np.dtype[Any], int], str] = {}
_ANYTHING = ctypes.c_char * 0  # how ctypes sees an array of which it needs the address alone


class Kernel:
    """A function of arrays that numba compiles, and that imports numba when it is called first."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self.function, self.options = function, options
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:  # noqa: D102
        return (self.compiled or self.compile())(*arguments)

    def compile(self) -> Callable[..., Any]:
        """numba's dispatcher, of a function that sees numba's dispatchers where this one sees kernels, by their names.

        The module keeps its own: code that was kept is called on, whoever else needed numba meanwhile.
        """
        from numba import njit

        with _LOCK:
            if self.compiled is None:
                twin, unkept = self._among_dispatchers(), {**self.options, "cache": False}
                try:
                    self.compiled = njit(**(self.options if cached() else unkept))(twin)
                except RuntimeError:  # numba finds no folder that it may write to, and refuses to work without
                    self.compiled = njit(**unkept)(twin)
            return self.compiled

    def _among_dispatchers(self) -> Callable[..., Any]:
        function = self.function
        names = dict(function.__globals__)
        for name in function.__code__.co_names:
            other = names.get(name)  # or what has an attribute's name by chance
            if isinstance(other, Kernel | Intrinsic) and other is not self:
                names[name] = other.compile()
        twin = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
        update_wrapper(twin, function)
        # numba looks for changes in the function's own file alone, and its caches are named after the function. What
        # stands in other files is a part of the code as well.
        twin.__qualname__ += f"_{_sources().hex()}"
        return twin


@dataclass(frozen=True)
class Intrinsic:
    """A part of kernels that stands in `kernels.intrinsics`, which imports numba."""

    name: str

    def compile(self) -> Any:
        """As numba knows it."""
        from darekit.kernels import intrinsics

        return getattr(intrinsics, self.name)


class KeptKernel(Kernel):
    """A kernel whose object code is kept between runs.

    It takes contiguous arrays, numbers of numpy's types (or int) and tuples of float32, returns one int64, and
    neither allocates nor raises.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__(function, options)
        self._ready: dict[tuple[str, ...], Callable[..., int]] = {}

    def __call__(self, *arguments: Any) -> int:  # noqa: D102
        kinds = tuple(map(_kind, arguments))
        ready = self._ready.get(kinds)
        if ready is None:
            with _LOCK:  # the threads of a merge arrive here together
                ready = self._ready.get(kinds)
                if ready is None:
                    ready = self._ready[kinds] = self._prepare(kinds)
        return ready(*arguments)

    def _prepare(self, kinds: tuple[str, ...]) -> Callable[..., int]:
        if "x" in "".join(kinds) or not cached():
            return self.compile()
        try:
            path = _place(self.function, kinds)
            code, symbol = _stored(path), path.stem.replace("-", "_")
            if code is None:
                code = _object_code(self.compile(), kinds, symbol)
                _store(path, code)
            return _loaded(code, kinds, symbol)
        except Exception:  # whatever it is (LLVM's errors are RuntimeErrors), numba can do without
            return self.compile()


def cached() -> bool:
    """Whether compiled kernels are kept between runs: unless the environment says DAREKIT_KERNEL_CACHE=0."""
    return os.environ.get(SWITCH, "1") != "0"


def kernel(function: Callable[..., Any]) -> Any:
    """Compile with numba when it is called."""
    return Kernel(function, CACHED)


def inlined(function: Callable[..., Any]) -> Any:
    """A part of kernels."""
    return Kernel(function, {"inline": "always"})


def intrinsic(name: str) -> Any:
    """A part of kernels, by its name in `kernels.intrinsics`."""
    return Intrinsic(name)


def kept_kernel(function: Callable[..., Any]) -> Any:
    """Compile with numba unless a run before did it."""
    return KeptKernel(function, CACHED)


# Arguments


def _kind(argument: Any) -> str:
    """An argument's type: a letter, the number of dimensions for arrays, a bracket before the letters of a tuple (one
    of a single number is no number); "x": only numba can take it."""
    kind = type(argument)
    if kind is np.ndarray:
        if not argument.flags.c_contiguous:
            return "x"
        array = argument.dtype, argument.ndim
        return _ARRAYS[array] if array in _ARRAYS else _ARRAYS.setdefault(array, _kind_of_array(*array))
    if kind is tuple:
        return "(" + "f" * len(argument) if argument and all(type(one) is np.float32 for one in argument) else "x"
    return _NUMBERS.get(kind) or ("q" if isinstance(argument, int) else "x")


def _kind_of_array(dtype: np.dtype[Any], ndim: int) -> str:
    known = [char for char, (name, _) in _TYPES.items() if dtype == np.dtype(name)]
    return f"{known[0]}{ndim}" if known else "x"


def _flatten(argument: Any) -> tuple[Any, ...]:
    """An argument as C takes it: an array as its address and shape, a tuple as its numbers."""
    if isinstance(argument, np.ndarray):
        try:
            return _ANYTHING.from_buffer(argument), *argument.shape
        except TypeError:  # it may not be written to: its address takes four times as long
            return argument.__array_interface__["data"][0], *argument.shape
    return argument if isinstance(argument, tuple) else (argument,)


def _c_types(kind: str) -> list[Any]:
    if kind[-1].isdigit():
        return [ctypes.c_void_p] + [ctypes.c_int64] * int(kind[-1])
    return [_TYPES[char][1] for char in kind.removeprefix("(")]


# Compiling


def _object_code(dispatcher: Callable[..., Any], kinds: tuple[str, ...], symbol: str) -> bytes:
    """Machine code for this processor, with one function `symbol` that needs nothing of numba or Python.

    Raises:
        RuntimeError: the kernel allocates or raises, so its code would need numba's run time.
    """
    import llvmlite.binding as llvm
    import numba

    types, parameters, arguments = [], [], []
    for i, kind in enumerate(kinds):
        if kind[-1].isdigit():
            sizes = [f"n{i}_{axis}" for axis in range(int(kind[-1]))]
            types += [numba.types.CPointer(getattr(numba.types, _TYPES[kind[0]][0]))] + [numba.types.int64] * len(sizes)
            parameters += [f"a{i}", *sizes]
            arguments.append(f"carray(a{i}, ({', '.join(sizes)},))")
        else:
            letters = kind.removeprefix("(")
            parts = [f"a{i}_{part}" for part in range(len(letters))]
            types += [getattr(numba.types, _TYPES[char][0]) for char in letters]
            parameters += parts
            arguments.append(f"({', '.join(parts)},)" if kind.startswith("(") else parts[0])
    names: dict[str, Any] = {"carray": numba.carray, "kernel": dispatcher}
    exec(f"def entry({', '.join(parameters)}):\n    return kernel({', '.join(arguments)})", names)
    function = numba.cfunc(numba.types.int64(*types), boundscheck=False, error_model="numpy")(names["entry"])
    module = llvm.parse_assembly(function.inspect_llvm())
    for one in module.functions:
        if one.name == function.native_name:
            one.name = symbol
        elif not one.is_declaration:
            one.linkage = "internal"  # so that LLVM sees that nothing is raised, and drops what would handle it
    machine = _target_machine(llvm)
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=1))
    builder.getModulePassManager().run(module, builder)
    needs = {one.name for one in module.functions if one.is_declaration and not one.name.startswith("llvm.")}
    if needs - NEEDS_NOBODY:
        raise RuntimeError(f"the kernel needs {', '.join(sorted(needs - NEEDS_NOBODY))}")
    code: bytes = machine.emit_object(module)
    return code


def _target_machine(llvm: Any) -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, codemodel="jitdefault",
        jit=True,
    )  # fmt: skip


@cache
def _engine() -> Any:
    """Where the code of all kernels is loaded (a fifth of a millisecond for each; with an engine of its own, one)."""
    import llvmlite.binding as llvm

    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine(llvm))


def _loaded(code: bytes, kinds: tuple[str, ...], symbol: str) -> Callable[..., int]:
    """Object code -> the function; ctypes releases the GIL while it runs."""
    import llvmlite.binding as llvm

    engine = _engine()
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    types = [one for kind in kinds for one in _c_types(kind)]
    function = ctypes.CFUNCTYPE(ctypes.c_int64, *types)(engine.get_function_address(symbol))

    def call(*arguments: Any) -> int:
        found: int = function(*[one for argument in arguments for one in _flatten(argument)])
        return found

    return call


# Keeping


def _place(function: Callable[..., Any], kinds: tuple[str, ...]) -> Path:
    """Where the code of a kernel for these arguments, this source, processor, numba and LLVM is kept."""
    source = Path(function.__code__.co_filename)
    state = hashlib.blake2b(digest_size=16)
    for one in (_about(source), " ".join(kinds).encode()):
        state.update(one)
        state.update(b"\0")
    return _folder(source) / f"{function.__name__}-{state.hexdigest()}.o"


@cache
def _about(source: Path) -> bytes:
    """What the code of all kernels of a file follows from, in short."""
    import llvmlite
    import llvmlite.binding as llvm

    return _digest(
        source.read_bytes(), _sources(), _about_numba(), llvmlite.__version__, sys.platform, llvm.get_process_triple(),
        llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), size=16,
    )  # fmt: skip


@cache
def _sources() -> bytes:
    """What all kernels are made of, in short: any of them may be a part of any other, and constants are, too."""
    here = Path(__file__).parent
    paths = (*sorted(here.glob("*.py")), here.parent / "masks.py")
    return _digest(*(path.read_bytes() for path in paths if path.is_file()), size=8)  # a frozen program has none


def _about_numba() -> bytes:
    """numba's version, as its own file has it: importing numba to ask for it is what kept kernels do without.

    Its releases that go with one of llvmlite's differ in what they make of a kernel.
    """
    found = find_spec("numba")
    assert found is not None and found.origin is not None
    return Path(found.origin).with_name("_version.py").read_bytes()


def _digest(*about: bytes | str, size: int) -> bytes:
    state = hashlib.blake2b(digest_size=size)
    for one in about:
        state.update(one if isinstance(one, bytes) else one.encode())
        state.update(b"\0")
    return state.digest()


def _folder(source: Path) -> Path:
    """As numba's own: NUMBA_CACHE_DIR, else beside the source where that can be written, else the user's cache."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        return Path(os.environ["NUMBA_CACHE_DIR"]) / "darekit"
    beside = source.parent / "__pycache__"
    if os.access(beside if beside.is_dir() else source.parent, os.W_OK):
        return beside
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "darekit"


def _stored(path: Path) -> bytes | None:
    """The code kept at `path`; None where there is none, or it is not what was written."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, code = data[:16], data[16:]
    return code if code and hashlib.blake2b(code, digest_size=16).digest() == digest else None


def _store(path: Path, code: bytes) -> None:
    """Whole or not at all: other processes may be reading and writing the same file."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.blake2b(code, digest_size=16).digest() + code)
            Path(draft).replace(path)
        except OSError:
            Path(draft).unlink(missing_ok=True)
            raise
