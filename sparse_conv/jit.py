"""Source text in `kernels/` -> compiled GPU function, memoised for each device.

Knows CuPy, which it imports when the first function is loaded, and the files' includes.
Knows nothing about convolutions. The includes are pasted into the text, so that CuPy's
cache on disk, whose key is the text, never serves what an older include gave.
"""

from __future__ import annotations

import functools
import pathlib
import re
import threading
from collections.abc import Mapping
from typing import Any

_HERE = pathlib.Path(__file__).resolve().parent
# Installed, the files lie inside the package; in a checkout, beside it.
KERNELS = next(
    (d for d in (_HERE / "kernels", _HERE.parent / "kernels") if d.is_dir()),
    _HERE / "kernels",
)
# The include that generated text replaces.
_GENERATED = "baked_code.cuh"
_INCLUDE = re.compile(r'#include "([\w.]+)"')
# Above this, a function has to ask for its shared memory before it is launched.
_DEFAULT_SHARED_MEM_BYTES = 48 * 1024

_functions: dict[tuple[str, tuple[tuple[str, str], ...], int], Any] = {}
_lock = threading.Lock()


class CompileError(RuntimeError):
    """A GPU function didn't compile: a fault of this package or of its environment."""


def source(function: str, code: str = "") -> str:
    """The text of `kernels/<function>.cu` with its includes pasted in, each once.

    Args:
        function: Name of the function and of its file.
        code: Generated text that takes the place of `baked_code.cuh`, if not empty.

    Returns:
        Text that needs no other file; compilers report places in the original files.
    """
    # Generated text is long, and compiled once: it isn't kept.
    return _expanded(function, code) if code else _source(function)


@functools.cache
def _source(function: str) -> str:
    return _expanded(function, "")


def _expanded(function: str, code: str) -> str:
    return _expand(f"{function}.cu", set(), {_GENERATED: code} if code else {})


def options(defines: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """The compiler's options for these macros."""
    return ("-std=c++17", *(f"-D{name}={value}" for name, value in defines))


def load_function(
    function: str, defines: tuple[tuple[str, str], ...], device: int, code: str = ""
) -> Any:
    """The compiled function, ready to launch on the given device.

    Args:
        function: Name of the function and of its file.
        defines: Compile-time macros as (name, value).
        device: Number of the CUDA device.
        code: Generated text, see `source`. A function that has some serves one kernel,
            and isn't memoised here; CuPy keeps what it has loaded, though.

    Returns:
        A `cupy.RawKernel` that may use as much shared memory as the device has.

    Raises:
        CompileError: The compiler refused the text.
    """
    if code:
        return _load(function, defines, device, code)
    key = (function, defines, device)
    loaded = _functions.get(key)
    if loaded is None:
        with _lock:
            if key not in _functions:
                _functions[key] = _load(function, defines, device, code)
            loaded = _functions[key]
    return loaded


def _load(
    function: str, defines: tuple[tuple[str, str], ...], device: int, code: str
) -> Any:
    import cupy

    with cupy.cuda.Device(device) as current:
        text = source(function, code)
        module = cupy.RawModule(code=text, options=options(defines))
        try:
            loaded = module.get_function(function)
        except cupy.cuda.compiler.CompileException as error:
            macros = " ".join(f"{name}={value}" for name, value in defines)
            raise CompileError(
                f"{function}.cu must compile. Received: {macros} and this message:\n"
                f"{error}"
            ) from error
        limit = current.attributes["MaxSharedMemoryPerBlockOptin"]
        if limit > _DEFAULT_SHARED_MEM_BYTES:
            loaded.max_dynamic_shared_size_bytes = limit - loaded.shared_size_bytes
    return loaded


def _expand(name: str, pasted: set[str], generated: Mapping[str, str]) -> str:
    pasted.add(name)
    lines = [f'#line 1 "{name}"']
    text = generated.get(name) or (KERNELS / name).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        include = _INCLUDE.fullmatch(line.strip())
        if include is None:
            # In one text, the pragma would concern the main file.
            lines.append("" if line.strip() == "#pragma once" else line)
        elif include[1] in pasted:
            lines.append("")
        else:
            lines.append(_expand(include[1], pasted, generated))
            lines.append(f'#line {number + 1} "{name}"')
    return "\n".join(lines)
