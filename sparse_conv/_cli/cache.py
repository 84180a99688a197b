"""`clear-cache`: finds and removes the code that this package compiled.

Knows how the compilers name what they keep. Their folders may hold the code of other
packages too, which is told apart and left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sparse_conv import backends
from sparse_conv._cli import CommandError

# The name of a symbol that `kernels/prelude.cuh` puts into all that is compiled of it.
MARKER = b"sparse_conv_marker"
_SUFFIXES = (".cubin", ".machine-code")


def run() -> None:
    """Removes our compiled code and prints what went.

    Raises:
        CommandError: A file can't be removed.
    """
    for folder in backends.caches():
        files = list(compiled_files(folder))
        removed_bytes = sum(file.stat().st_size for file in files)
        for file in files:
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise CommandError(
                    f"compiled code can't be removed: {error.strerror}. "
                    f"Received: {file}"
                ) from error
        print(f"{folder}: {describe(len(files), removed_bytes)} removed")


def describe(files: int, size_bytes: int) -> str:
    """How many files, and how large together, in words."""
    return f"{files} files, {size_bytes / 2**20:.1f} MiB"


def compiled_files(folder: Path) -> Iterator[Path]:
    """The files in a cache folder that hold this package's compiled code.

    Args:
        folder: One of `backends.caches()`; need not exist.

    Yields:
        Machine code of the CPU's loops, and GPU functions of ours that CuPy compiled.
    """
    if not folder.is_dir():
        return
    for file in sorted(folder.iterdir()):
        if file.is_symlink() or not file.is_file():
            continue
        if file.suffix in _SUFFIXES and MARKER in file.read_bytes():
            yield file
