"""Machine code for the CPU: compiled when it is first needed, kept on disk.

Loading compiled code through Numba means importing Numba, and costs more than all the
rest of a first call. This module keeps the object code that Numba made in a folder of
its own and loads it with LLVM alone. A file is named after all that decides what is in
it: the sources, the versions of the compilers, and the processor.

Knows LLVM, files, and the names of functions. Does not know what they compute.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.metadata
import json
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm

# What a file of ours begins with.
MARKER = b"sparse_conv_marker"
SUFFIX = ".machine-code"
# The name under which the routines of `cpu_vectors` are compiled and kept.
ROUTINES = "routines"

_HERE = Path(__file__).resolve().parent
_SOURCES = (
    "cpu_code.py", "cpu_jobs.py", "cpu_plan.py", "cpu_tasks.py", "cpu_vectors.py"
)  # fmt: skip


class Widths(NamedTuple):
    """What the compiled code and its callers have to agree on.

    Attributes:
        vector_bytes: Bytes of a vector.
        tile_cells: Columns that are summed together, at most.
    """

    vector_bytes: int
    tile_cells: int


class Object(NamedTuple):
    """Compiled functions.

    Attributes:
        symbols: The names of its functions.
        widths: What it was compiled for.
        code: The object code, an ELF file on Linux.
    """

    symbols: tuple[str, ...]
    widths: Widths
    code: bytes


class Function(NamedTuple):
    """A loaded function: its address, and what it was compiled for."""

    address: int
    widths: Widths


_functions: dict[tuple[str, str], Function] = {}
_lock = threading.RLock()


def _renew_lock() -> None:
    """In a forked child the parent's lock may be held for ever."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def function(name: str, dtype: str) -> Function:
    """A function of `cpu_tasks`, loaded; compiled if it is not on disk.

    Args:
        name: One of `cpu_tasks.FUNCTIONS`, or `ROUTINES`.
        dtype: What it computes with, as NumPy names it.

    Returns:
        The same at every call. It stays loaded.
    """
    try:
        return _functions[name, dtype]
    except KeyError:
        with _lock:
            if (name, dtype) not in _functions:
                _functions[name, dtype] = _load(name, dtype)
            return _functions[name, dtype]


@functools.cache
def core() -> str:
    """The kind of core that functions are compiled for, without compiling any.

    Returns:
        "avx512" for vectors of 64 bytes, "avx2" for all else; "amx" and "amx-avx2" for
        the same where there are matrix instructions, too, which are unused, but tell
        Intel's large cores from others.
    """
    amx = llvm.get_host_cpu_features().get("amx-tile", False)
    if vector_bytes() == 64:
        return "amx" if amx else "avx512"
    return "amx-avx2" if amx else "avx2"


@functools.cache
def vector_bytes() -> int:
    """Bytes of the vectors that functions are compiled for, without compiling any."""
    wanted = os.environ.get("NUMBA_CPU_FEATURES")
    if wanted is None:
        return 64 if llvm.get_host_cpu_features().get("avx512f", False) else 32
    return 64 if "+avx512f" in wanted.split(",") else 32


def folder() -> Path:
    """Where compiled code is kept: SPARSE_CONV_CACHE_DIR, or in the user's cache."""
    chosen = os.environ.get("SPARSE_CONV_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(base).expanduser() / "sparse_conv"


def assembled(text: str, names: tuple[str, ...]) -> dict[str, int]:
    """Compiles LLVM's intermediate language at once.

    Args:
        text: The module.
        names: Functions that it defines.

    Returns:
        Their addresses.
    """
    with _lock:
        engine = _engine()
        module = llvm.parse_assembly(text)
        module.verify()
        engine.add_module(module)
        engine.finalize_object()
        return {name: engine.get_function_address(name) for name in names}


def _load(name: str, dtype: str) -> Function:
    if name != ROUTINES:
        # What the others call.
        function(ROUTINES, dtype)
    path = folder() / f"{name}-{dtype}-{_key(name, dtype)}{SUFFIX}"
    compiled = _read(path)
    if compiled is None:
        with _no_garbage_collection():
            from sparse_conv.backends import cpu_tasks

            compiled = cpu_tasks.compile_function(name, dtype)
        _write(path, compiled)
    engine = _engine()
    engine.add_object_file(llvm.ObjectFileRef.from_data(compiled.code))
    engine.finalize_object()
    addresses = [engine.get_function_address(symbol) for symbol in compiled.symbols]
    if name == ROUTINES:
        for symbol, address in zip(compiled.symbols, addresses, strict=True):
            llvm.add_symbol(symbol, address)
    return Function(addresses[0], compiled.widths)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Compiling makes many objects, and each collection visits all of TensorFlow's."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.cache
def _engine() -> Any:
    """LLVM's compiler and loader for this machine."""
    with contextlib.suppress(RuntimeError):
        # Needed up to llvmlite 0.44; later ones refuse it.
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # The loops call functions of C's mathematics library.
    with contextlib.suppress(RuntimeError):
        llvm.load_library_permanently("libm.so.6")
    machine = llvm.Target.from_default_triple().create_target_machine(opt=2, jit=True)
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


def _key(name: str, dtype: str) -> str:
    """A digest of all that decides what the compiled function is."""
    digest = hashlib.sha256()
    for part in (name, dtype, *_circumstances()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


@functools.cache
def _circumstances() -> tuple[str, ...]:
    features = sorted(llvm.get_host_cpu_features().items())
    settings = sorted(
        f"{name}={value}"
        for name, value in os.environ.items()
        if name.startswith("NUMBA_") and name not in ("NUMBA_CACHE_DIR",)
    )
    return (
        *(importlib.metadata.version(package) for package in ("numba", "llvmlite")),
        llvm.get_process_triple(),
        llvm.get_host_cpu_name(),
        ",".join(f"{name}={enabled}" for name, enabled in features),
        *settings,
        *((_HERE / source).read_text() for source in _SOURCES),
    )


def _read(path: Path) -> Object | None:
    """What a file holds; None unless it is whole, and nobody else's."""
    try:
        if not (_is_private(path.parent) and _is_private(path)):
            return None
        data = path.read_bytes()
    except OSError:
        return None
    head, _, code = data.partition(b"\n")
    if not head.startswith(MARKER):
        return None
    try:
        header = json.loads(head[len(MARKER) :])
    except ValueError:
        return None
    if header.get("sha256") != hashlib.sha256(code).hexdigest():
        return None
    return Object(tuple(header["symbols"]), Widths(*header["widths"]), code)


def _is_private(path: Path) -> bool:
    """Whether only this user can have written there."""
    status = path.stat()
    others = stat.S_IWGRP | stat.S_IWOTH
    return status.st_uid == os.geteuid() and not status.st_mode & others


def _write(path: Path, compiled: Object) -> None:
    """Keeps a compiled function, unless the folder can't be written to.

    Other processes see the whole file or none.
    """
    header = {
        "symbols": compiled.symbols,
        "widths": compiled.widths,
        "sha256": hashlib.sha256(compiled.code).hexdigest(),
    }
    data = MARKER + json.dumps(header).encode() + b"\n" + compiled.code
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        # A full disk, for one.
        with contextlib.suppress(OSError):
            os.unlink(temporary)
