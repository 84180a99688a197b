"""Memory of the CPU back end: blocks that become tensors, and scratch memory.

TensorFlow gets the memory of a large result from the system and returns it, which then
maps every page anew. Blocks are used again instead, and large ones lie in large pages
where the system has them.

A block becomes a tensor through DLPack, whose managed tensor says who is to be told
when the last user is gone: here a compiled function that marks the block as free, from
any thread and without Python's lock.

Knows TensorFlow's DLPack functions. Knows nothing of convolutions.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections import deque
from typing import Any

import tensorflow as tf

from sparse_conv.backends import cpu_threads
from sparse_conv.bridge import DLTensor
from sparse_conv.host_memory import ALIGNMENT, aligned, allocate

# Memory of dead results that is kept for the next ones.
KEPT_BYTES = 256 * 2**20
# After so many results, memory beyond that is returned.
_SWEEP_CALLS = 64
# Blocks of one size that are asked whether they are free, before a new one is made.
_ASKED = 8
# Scratch memory that a thread keeps for its next call.
KEPT_SCRATCH_BYTES = 64 * 2**20

# DLPack's codes of what TensorFlow can be given; the loops compute in no other dtypes.
_KINDS = {tf.int32: 0, tf.float32: 2, tf.float64: 2}
_CPU_DEVICE = 1

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_from_dlpack = tf.experimental.dlpack.from_dlpack


class _Managed(DLTensor):
    """DLPack's DLManagedTensor and our flag; see https://dmlc.github.io/dlpack."""

    _fields_ = (
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("in_use", ctypes.c_int64),
    )


class _Block:
    """Memory that one tensor at a time lives in."""

    def __init__(self, size: int):
        self.size = size
        self.memory = allocate(size)
        self.address = self.memory.ctypes.data
        self.managed = _Managed(device_type=_CPU_DEVICE, data=self.address)
        self.managed_address = ctypes.addressof(self.managed)
        self.managed.manager_ctx = self.managed_address + _Managed.in_use.offset
        self.managed.deleter = cpu_threads.functions().release
        self.shape: Any = None

    def tensor(self, shape: tuple[int, ...], dtype: tf.DType) -> tf.Tensor:
        managed = self.managed
        self.shape = _extents(shape)
        managed.shape = ctypes.addressof(self.shape)
        managed.ndim = len(shape)
        managed.dtype = _KINDS[dtype] | dtype.size * 8 << 8 | 1 << 16
        managed.in_use = 1
        return _from_dlpack(_new_capsule(self.managed_address, b"dltensor", None))


@functools.lru_cache(maxsize=1024)
def _extents(shape: tuple[int, ...]) -> Any:
    return (ctypes.c_int64 * len(shape))(*shape)


class _Blocks:
    """All blocks: those that tensors live in, and free ones."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_size: dict[int, deque[_Block]] = {}
        self.calls = 0

    def take(self, size: int) -> _Block:
        """A free block, marked as in use."""
        with self.lock:
            self.calls += 1
            if self.calls % _SWEEP_CALLS == 0:
                self._sweep()
            blocks = self.by_size.setdefault(size, deque())
            for _ in range(min(_ASKED, len(blocks))):
                block = blocks[0]
                blocks.rotate(-1)
                if not block.managed.in_use:
                    block.managed.in_use = 1
                    return block
            block = _Block(size)
            block.managed.in_use = 1
            blocks.append(block)
            return block

    def _sweep(self) -> None:
        """Returns free blocks to the system beyond what is kept."""
        kept = 0
        for size, blocks in list(self.by_size.items()):
            remaining = deque()
            for block in reversed(blocks):
                if not block.managed.in_use:
                    if kept + size > KEPT_BYTES:
                        continue
                    kept += size
                remaining.appendleft(block)
            if remaining:
                self.by_size[size] = remaining
            else:
                del self.by_size[size]


_blocks = _Blocks()
_scratch = threading.local()


def _renew_lock() -> None:
    """In a forked child the parent's lock may be held for ever."""
    _blocks.lock = threading.Lock()


cpu_threads.after_fork(_renew_lock)


def output(shape: tuple[int, ...], dtype: tf.DType) -> tuple[tf.Tensor, int]:
    """A tensor with arbitrary contents in host memory, and where they are.

    Args:
        shape: No extent is 0.
        dtype: float32, float64 or int32.

    Returns:
        The tensor and its address. Nobody else has the tensor: it may be filled.
    """
    size = dtype.size
    for extent in shape:
        size *= extent
    # Eighths of powers of two: sizes that are near to each other share blocks.
    step = max(ALIGNMENT, 1 << max(0, size.bit_length() - 4))
    block = _blocks.take(aligned(size, step))
    return block.tensor(shape, dtype), block.address


def scratch(size: int) -> tuple[Any, int]:
    """This thread's scratch memory: `size` bytes with arbitrary contents.

    Returns:
        What keeps it alive, and its address, a multiple of ALIGNMENT. The next call in
        this thread gives the same memory.
    """
    held = getattr(_scratch, "held", None)
    if held is not None and held[0] >= size:
        return held[1:]
    memory = allocate(size)
    address = memory.ctypes.data
    if size <= KEPT_SCRATCH_BYTES:
        _scratch.held = (size, memory, address)
    return memory, address
