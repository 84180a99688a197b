"""Machine code on disk: what is trusted, what is compiled anew, and what is found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparse_conv.backends import cpu_code
from sparse_conv.backends.cpu_code import Object, Widths

OBJECT = Object(("first", "second"), Widths(64, 10), b"\x7fELF and so on\n\0")


@pytest.fixture
def path(tmp_path) -> Path:
    """Where a compiled function is kept; written."""
    path = tmp_path / "cache" / "gather-float32-0a1b.machine-code"
    cpu_code._write(path, OBJECT)
    return path


def test_what_is_written_is_read(path):
    assert cpu_code._read(path) == OBJECT
    assert path.read_bytes().startswith(cpu_code.MARKER)
    # Nothing is left of the way there.
    assert list(path.parent.iterdir()) == [path]


def test_only_the_user_can_write(path):
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o622, 0o620, 0o602])
def test_a_file_that_others_can_write_is_not_loaded(path, mode):
    path.chmod(mode)
    assert cpu_code._read(path) is None


def test_a_folder_that_others_can_write_to_is_not_trusted(path):
    path.parent.chmod(0o777)
    assert cpu_code._read(path) is None


@pytest.mark.parametrize("change", ["cut", "flipped", "headless", "empty", "json"])
def test_a_damaged_file_is_not_loaded(path, change):
    data = path.read_bytes()
    damaged = {
        "cut": data[:-1],
        "flipped": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        "headless": data[1:],
        "empty": b"",
        "json": data.replace(b"{", b"[", 1),
    }
    path.write_bytes(damaged[change])
    assert cpu_code._read(path) is None


def test_an_absent_file_and_a_folder_that_can_not_be_made(tmp_path):
    assert cpu_code._read(tmp_path / "absent") is None
    (tmp_path / "file").write_bytes(b"")
    cpu_code._write(tmp_path / "file" / "below", OBJECT)


def test_the_folder(monkeypatch):
    monkeypatch.delenv("SPARSE_CONV_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cpu_code.folder() == Path("/somewhere/sparse_conv")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cpu_code.folder() == Path.home() / ".cache" / "sparse_conv"
    monkeypatch.setenv("SPARSE_CONV_CACHE_DIR", "/elsewhere")
    assert cpu_code.folder() == Path("/elsewhere")


@pytest.fixture
def fresh_circumstances() -> Iterator[None]:
    cpu_code._circumstances.cache_clear()
    yield
    cpu_code._circumstances.cache_clear()


def test_the_name_follows_from_what_decides_the_code(monkeypatch, fresh_circumstances):
    keys = {cpu_code._key("gather", "float32")}
    assert cpu_code._key("gather", "float32") in keys
    keys.add(cpu_code._key("gather", "float64"))
    keys.add(cpu_code._key("wgrad", "float32"))
    monkeypatch.setenv("NUMBA_CPU_NAME", "haswell")
    cpu_code._circumstances.cache_clear()
    keys.add(cpu_code._key("gather", "float32"))
    monkeypatch.setattr(cpu_code.llvm, "get_host_cpu_name", lambda: "another")
    cpu_code._circumstances.cache_clear()
    keys.add(cpu_code._key("gather", "float32"))
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("features", "host", "core"),
    [
        ("+avx2,-avx512f", {"avx512f": True}, "avx2"),
        ("+avx2,+avx512f", {}, "avx512"),
        ("+avx2,+avx512f", {"amx-tile": True}, "amx"),
        ("+avx2", {"avx512f": True, "amx-tile": True}, "amx-avx2"),
        (None, {"avx512f": True, "amx-tile": True}, "amx"),
        (None, {"avx512f": True, "amx-tile": False}, "avx512"),
        (None, {}, "avx2"),
    ],
)
def test_the_core_follows_from_the_host_and_from_what_numba_compiles_for(
    monkeypatch, features, host, core
):
    monkeypatch.delenv("NUMBA_CPU_FEATURES", raising=False)
    if features is not None:
        monkeypatch.setenv("NUMBA_CPU_FEATURES", features)
    monkeypatch.setattr(cpu_code.llvm, "get_host_cpu_features", lambda: host)
    monkeypatch.setattr(cpu_code, "vector_bytes", cpu_code.vector_bytes.__wrapped__)
    assert cpu_code.core.__wrapped__() == core


CALL = """
import sys
import numpy as np
import sparse_conv
x, kernel = np.ones((2, 5, 6, 3), np.float32), np.ones((2, 2, 3, 4), np.float32)
y = sparse_conv.conv2d(x, kernel, 1, "VALID", activation=sys.argv[1], backend="cpu")
print("numba" in sys.modules, float(y[0, 0, 0, 0]))
"""


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_numba_is_only_needed_once(tmp_path, activation):
    environment = {**os.environ, "SPARSE_CONV_CACHE_DIR": str(tmp_path / "cache")}

    def run() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CALL, activation],
            capture_output=True, text=True, timeout=300, env=environment, check=True,
        )  # fmt: skip
        return done.stdout.split()

    assert run() == ["True", "12.0"]
    assert run() == ["False", "12.0"]
    # The same from code that is damaged.
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert run() == ["True", "12.0"]
