"""Builds CUDA text with the host compiler, once for each text on each machine.

Knows compilers and the cache of what they made. Does not know what a launch is.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sparse_conv import jit

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++")
UNDEFINED = "bounds,shift,signed-integer-overflow,integer-divide-by-zero"
COMMON_FLAGS = ("-std=c++20", "-Wno-unknown-pragmas")
FUNCTION_FLAGS = (
    "-O1",
    "-g1",
    "-fPIC",
    "-shared",
    # A function's arithmetic must not depend on what the host's compiler may fuse.
    "-ffp-contract=off",
    "-fno-omit-frame-pointer",
    f"-fsanitize={UNDEFINED}",
    "-fno-sanitize-recover=all",
    # Makes each access of memory a call, which the emulator answers.
    "-fsanitize=thread",
    "-DCUDA_EMULATION",
    # Without the run-time library of the thread sanitizer.
    "-nostdlib",
)
LIBRARIES = ("-lgcc", "-lm")
# A function's argument struct is known only to its text, so the call is made there.
ENTRY = """
#line 1 "entry of {function}"
extern "C" const unsigned long emulation_argument_bytes =
    emulation::argument_bytes({function});
extern "C" void emulation_entry(const void* bytes) {{
    emulation::call({function}, bytes);
}}
"""


class EmulationError(Exception):
    """A function can't be built, or broke a rule of CUDA while it ran."""


def build_functions(
    functions: Iterable[tuple[str, tuple[tuple[str, str], ...]]],
) -> None:
    """Builds many (function, defines) at once, on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda pair: build_function(*pair), dict.fromkeys(functions)))


def build_function(
    function: str, defines: tuple[tuple[str, str], ...], text: str | None = None
) -> Path:
    """The shared library of one function.

    Args:
        function: Name of the `__global__` function.
        defines: Its compile-time macros.
        text: The CUDA text; that of `kernels/` by default.

    Returns:
        Path of the library in the cache.

    Raises:
        EmulationError: The compiler refuses the text; has the compiler's log.
    """
    if text is None:
        text = jit.source(function)
    text += ENTRY.format(function=function)
    macros = [f"-D{name}={value}" for name, value in defines]
    header = HERE / "cuda_emulation.h"
    command = [COMPILER, *COMMON_FLAGS, *FUNCTION_FLAGS, *macros, "-include", header]
    return _build(f"{function}.so", command, text, LIBRARIES, header.read_text())


@functools.cache
def build_emulator() -> Path:
    """The program that runs functions."""
    source = HERE / "emulator.cpp"
    command = [COMPILER, *COMMON_FLAGS, "-O3", f"-I{HERE}", "-rdynamic"]
    # Functions call the library of -fsanitize=undefined; the emulator itself does not.
    libraries = ("-Wl,--no-as-needed", "-lubsan", "-ldl")
    header = (HERE / "cuda_emulation.h").read_text()
    return _build("emulator", command, source.read_text(), libraries, header)


def _build(
    name: str, command: list, text: str, libraries: tuple[str, ...], header: str
) -> Path:
    """Runs `command` on `text` unless its result is in the cache already."""
    words = [str(word) for word in command]
    key = hashlib.sha256(
        repr((words, libraries, text, header, _version())).encode()
    ).hexdigest()
    folder = _cache() / key[:32]
    made = folder / name
    if made.exists():
        return made
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made.exists():
            return made
        partial = folder / f"partial-{name}"
        done = subprocess.run(
            [*words, "-x", "c++", "-", "-o", str(partial), *libraries],
            input=text,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise EmulationError(f"{name} can't be built:\n{done.stderr}")
        partial.rename(made)
    return made


@functools.cache
def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"sparse_conv_emulator_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"The build cache {folder} belongs to another user.")
    return folder


@functools.cache
def _version() -> str:
    try:
        return subprocess.run(
            [COMPILER, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except FileNotFoundError:
        raise EmulationError(
            "The emulator needs a C++20 compiler: install g++ 12 or later, or set CXX. "
            f"Received: CXX={COMPILER!r}"
        ) from None
