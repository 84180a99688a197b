"""Blocks of memory that become tensors, again and again."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from sparse_conv import host_memory
from sparse_conv.backends import cpu_memory
from sparse_conv.bridge import memory_of


@pytest.fixture(autouse=True)
def blocks(monkeypatch) -> cpu_memory._Blocks:
    """Blocks of this test alone."""
    blocks = cpu_memory._Blocks()
    monkeypatch.setattr(cpu_memory, "_blocks", blocks)
    return blocks


def known_bytes(blocks: cpu_memory._Blocks) -> int:
    return sum(size * len(some) for size, some in blocks.by_size.items())


@pytest.mark.parametrize("size", [0, 3, 2**20])
@pytest.mark.parametrize(
    "dtype", [tf.float32, tf.float64, tf.int32, tf.float16, tf.bfloat16]
)
def test_a_copy_outlives_what_it_is_of(size, dtype):
    with tf.device("/CPU:0"):
        numbers = tf.cast(tf.range(2 * size) % 251, dtype)
        tensor = tf.reshape(numbers, (2, size))
        expected = tensor.numpy()
        copy = host_memory.copied(tensor)
        del numbers, tensor
        gc.collect()
        again = copy + tf.zeros((), dtype)
    for result in (copy, again):
        assert result.dtype == dtype
        np.testing.assert_array_equal(result.numpy(), expected)
    if (
        copy.dtype.size * 2 * size >= host_memory.LARGE_PAGE_BYTES
        and dtype != tf.bfloat16
    ):
        assert memory_of(copy).address % host_memory.LARGE_PAGE_BYTES == 0


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64, tf.int32])
@pytest.mark.parametrize("shape", [(1,), (2, 3, 5, 7), (700, 1000)])
def test_a_tensor_is_what_was_asked_for(shape, dtype):
    tensor, address = cpu_memory.output(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert address % host_memory.ALIGNMENT == 0
    view = np.asarray(memoryview(tensor))
    assert view.ctypes.data == address
    assert "CPU:0" in tensor.backing_device


def test_the_memory_of_a_dead_tensor_is_used_again():
    first, address = cpu_memory.output((100, 100), tf.float32)
    second, other = cpu_memory.output((100, 100), tf.float32)
    assert other != address
    del first
    gc.collect()
    third, again = cpu_memory.output((100, 100), tf.float32)
    assert again == address
    del second, third


def test_memory_that_anything_still_uses_is_not():
    tensor, address = cpu_memory.output((64, 64), tf.float32)
    tensor = tf.reshape(tensor, (-1,))
    view = memoryview(tensor)
    del tensor
    gc.collect()
    others = [cpu_memory.output((64, 64), tf.float32) for _ in range(20)]
    assert address not in [other for _, other in others]
    del view, others
    gc.collect()
    # Those that were asked least recently are asked first.
    found = [cpu_memory.output((64, 64), tf.float32) for _ in range(21)]
    assert address in [other for _, other in found]


def test_free_memory_beyond_what_is_kept_is_returned(blocks, monkeypatch):
    monkeypatch.setattr(cpu_memory, "KEPT_BYTES", 2**20)
    tensors = [cpu_memory.output((256, 1024), tf.float32)[0] for _ in range(8)]
    assert known_bytes(blocks) == 8 * 2**20
    del tensors
    gc.collect()
    for _ in range(cpu_memory._SWEEP_CALLS):
        cpu_memory.output((1,), tf.float32)
    assert known_bytes(blocks) <= 2**20 + 4096


def test_scratch_memory_stays_and_grows():
    owner, address = cpu_memory.scratch(1000)
    assert cpu_memory.scratch(500)[1] == address
    assert address % host_memory.ALIGNMENT == 0
    _, larger = cpu_memory.scratch(3 * 2**20)
    assert cpu_memory.scratch(1000)[1] == larger
    del owner


_FORK = """
import ctypes, os, sys
import numpy as np
import tensorflow as tf
from sparse_conv.backends import cpu_memory
tensor, address = cpu_memory.output((2**22,), tf.float32)
numbers = np.ctypeslib.as_array((ctypes.c_float * 2**22).from_address(address))
numbers[:] = 1
pid = os.fork()
numbers[:] += pid == 0
if pid == 0:
    os._exit(0)
os.waitpid(pid, 0)
sys.exit(0 if (numbers == 1).all() else 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_writes_to_memory_of_its_own():
    # In a process of its own: a fork of this one would inherit pytest's threads.
    subprocess.run([sys.executable, "-c", _FORK], check=True, timeout=120)
