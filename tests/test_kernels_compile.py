"""Every function, in every configuration, compiles for the supported GPUs.

NVRTC needs no GPU. Here it is the release that still knows the oldest supported one.
The text knows two kinds of GPUs, those before sm_80 and the others, so that not every
pair of a configuration and an architecture has to be tried: float32 is compiled for
all, each other dtype for the oldest, the newest, and two in turn.
HYPOTHESIS_PROFILE=thorough tries every pair.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import pytest

from sparse_conv import jit, plan, tiling

OLDEST_ARCHITECTURE = 70
NEWEST_ARCHITECTURE = 120
REACHABLE = list(plan.reachable())
FUNCTIONS = sorted({function for function, _ in REACHABLE})
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
STACK = re.compile(r"(\d+) bytes stack frame")
# A thread of the tiled functions keeps at least 256 bytes of sums. Fewer bytes on the
# stack are a few registers that were spilt; as many are an array that the compiler
# could not keep in registers, at a fraction of the speed.
MAX_STACK_BYTES = 255


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """The compiler's library, from the package that the extra `test` installs."""
    files = metadata.distribution("nvidia-cuda-nvrtc-cu12").files or []
    library = next(file for file in files if file.name == "libnvrtc.so.12")
    return ctypes.CDLL(str(library.locate()))


@functools.cache
def architectures() -> tuple[int, ...]:
    """The supported architectures that the compiler knows, as 10 * major + minor."""
    count = ctypes.c_int()
    assert nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count)) == 0
    known = (ctypes.c_int * count.value)()
    assert nvrtc().nvrtcGetSupportedArchs(known) == 0
    return tuple(a for a in known if OLDEST_ARCHITECTURE <= a <= NEWEST_ARCHITECTURE)


def architectures_for(number: int) -> list[int]:
    """What configuration `number` is compiled for."""
    every = architectures()
    if THOROUGH or ("DTYPE", "FLOAT32") in REACHABLE[number][1]:
        return list(every)
    turns = {every[2 * number % len(every)], every[(2 * number + 1) % len(every)]}
    return sorted({every[0], every[-1], *turns})


def compile_text(text: str, name: str, options: list[str]) -> tuple[int, str]:
    """Compiles to machine code; returns the compiler's status (0 is good) and log."""
    program = ctypes.c_void_p()
    status = nvrtc().nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), name.encode(), 0, None, None
    )
    assert status == 0
    try:
        words = [option.encode() for option in options]
        status = nvrtc().nvrtcCompileProgram(
            program, len(words), (ctypes.c_char_p * len(words))(*words)
        )
        size = ctypes.c_size_t()
        assert nvrtc().nvrtcGetProgramLogSize(program, ctypes.byref(size)) == 0
        log = ctypes.create_string_buffer(size.value)
        assert nvrtc().nvrtcGetProgramLog(program, log) == 0
        return status, log.value.decode()
    finally:
        nvrtc().nvrtcDestroyProgram(ctypes.byref(program))


def name_of(number: int) -> str:
    function, defines = REACHABLE[number]
    return "-".join([function, *(f"{name}_{value}" for name, value in defines)])


@pytest.mark.parametrize("number", range(len(REACHABLE)), ids=name_of)
def test_compiles(number):
    function, defines = REACHABLE[number]
    text = jit.source(function)

    def compile_for(architecture: int) -> str | None:
        options = [*jit.options(defines), f"-arch=sm_{architecture}"]
        status, log = compile_text(
            text, f"{function}.cu", [*options, "--ptxas-options=-v"]
        )
        if status:
            return f"sm_{architecture}: {log}"
        stack = max(map(int, STACK.findall(log)))
        return f"sm_{architecture}: {log}" if stack > MAX_STACK_BYTES else None

    # The library compiles outside of Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failures = [
            log for log in pool.map(compile_for, architectures_for(number)) if log
        ]
    assert not failures, "\n".join(failures)


def test_the_compiler_knows_the_range_of_architectures():
    assert {70, 75, 80, 86, 89, 90, 100, 120} <= set(architectures())


@pytest.mark.parametrize("dtype", sorted(tiling.PACKS))
def test_every_dtype_is_compiled_for_every_architecture(dtype):
    define = ("DTYPE", dtype.upper())
    numbers = [n for n, (_, defines) in enumerate(REACHABLE) if define in defines]
    tried = {a for number in numbers for a in architectures_for(number)}
    assert tried == set(architectures())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_text_needs_no_other_file_and_knows_two_kinds_of_gpus(function):
    assert "#include" not in jit.source(function)
    kinds = re.findall(r"__CUDA_ARCH__(?: >= \d+)?", jit.source(function))
    assert set(kinds) == {"__CUDA_ARCH__ >= 800"}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_errors_are_reported_where_they_are(function):
    """A mistake behind the last definition of each file is found there."""
    lines = jit.source(function).splitlines()
    ends = ends_of_definitions(lines)
    assert f"{function}.cu" in ends
    assert "prelude.cuh" in ends
    for name, (place, number) in ends.items():
        seeded = [*lines]
        seeded[place] += " oops;"
        status, log = compile_text("\n".join(seeded), f"{function}.cu", [])
        assert status != 0
        assert f"{name}({number}): error" in log


def ends_of_definitions(lines: list[str]) -> dict[str, tuple[int, int]]:
    """Each file's last line that ends a definition: place in the text, and number."""
    ends = {}
    name, number = "", 0
    for place, line in enumerate(lines):
        directive = re.fullmatch(r'#line (\d+) "([\w.]+)"', line)
        if directive:
            number, name = int(directive[1]) - 1, directive[2]
            continue
        number += 1
        if line in ("}", "};"):
            assert (jit.KERNELS / name).read_text().splitlines()[number - 1] == line
            ends[name] = (place, number)
    return ends
