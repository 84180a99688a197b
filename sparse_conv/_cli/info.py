"""`info`: what is installed, which devices and back ends there are, what is cached.

Knows where to ask. Judges nothing: a reason that a back end gives is printed as it is.
"""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path

import tensorflow as tf

import sparse_conv
from sparse_conv import backends
from sparse_conv._cli import cache, machine

_PACKAGES = (
    ("tensorflow",),
    ("keras",),
    ("numpy",),
    ("numba",),
    ("cupy", "cupy-cuda12x", "cupy-cuda13x"),
)


def run() -> None:
    """Prints the report."""
    _section("versions", [("sparse_conv", sparse_conv.__version__), *_versions()])
    _section(
        "devices",
        [
            ("CPU", machine.cpu_name()),
            *(("GPU", name) for name in machine.gpu_names()),
        ],
    )
    _section(
        "back ends",
        [(name, reason or "usable") for name, reason in backends.statuses()],
    )
    _section("caches", [("", _cache_line(folder)) for folder in backends.caches()])


def _section(title: str, rows: list[tuple[str, str]]) -> None:
    print(title)
    for name, text in rows:
        print(f"  {name:<20}{text}" if name else f"  {text}")


def _versions() -> list[tuple[str, str]]:
    found = [
        (names[0], machine.installed_version(*names) or "not installed")
        for names in _PACKAGES
    ]
    built_for = tf.sysconfig.get_build_info().get("cuda_version", "no CUDA")
    return [
        ("Python", platform.python_version()),
        *found,
        ("TensorFlow's CUDA", built_for),
        *_cuda_versions(),
    ]


def _cuda_versions() -> list[tuple[str, str]]:
    """What CuPy says of CUDA; nothing without CuPy."""
    if importlib.util.find_spec("cupy") is None:
        return []
    import cupy

    runtime = cupy.cuda.runtime
    try:
        numbers = (runtime.driverGetVersion(), runtime.runtimeGetVersion())
    except runtime.CUDARuntimeError as error:
        return [("CUDA", str(error))]
    return [
        ("CUDA driver", _release(numbers[0]) if numbers[0] else "none"),
        ("CUDA runtime", _release(numbers[1])),
    ]


def _release(number: int) -> str:
    """CUDA's number for a version, such as 12090, as people write it."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _cache_line(folder: Path) -> str:
    sizes = [file.stat().st_size for file in cache.compiled_files(folder)]
    return f"{folder}: {cache.describe(len(sizes), sum(sizes))}"
