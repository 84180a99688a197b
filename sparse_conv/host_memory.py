"""Host memory in large pages, where the system has them.

Knows the system's calls and how NumPy's memory becomes a tensor. Knows nothing of what
the memory is for.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import numpy as np
import tensorflow as tf

# Memory of this size is taken from the system in large pages.
LARGE_PAGE_BYTES = 2 * 2**20
# As TensorFlow's own operations want it, and the vectors of the CPU back end.
ALIGNMENT = 64


def allocate(size: int) -> np.ndarray:
    """New memory with arbitrary contents.

    Returns:
        (size,) uint8, whose address is a multiple of ALIGNMENT; of LARGE_PAGE_BYTES if
        it is as large. Whoever uses the address keeps the array.
    """
    if size < LARGE_PAGE_BYTES:
        memory, alignment = np.empty(size + ALIGNMENT, np.uint8), ALIGNMENT
    else:
        memory, alignment = _large_pages(size), LARGE_PAGE_BYTES
    begin = -memory.ctypes.data % alignment
    return memory[begin : begin + size]


def _large_pages(size: int) -> np.ndarray:
    """Memory in which so many bytes find room in large pages."""
    # Shared memory, mmap's default, would be shared with forked children, too, and gets
    # no large pages on most systems.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    whole = aligned(size, LARGE_PAGE_BYTES)
    memory = mmap.mmap(-1, whole + LARGE_PAGE_BYTES, flags=private)
    # A kernel without large pages refuses.
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def aligned(size: int, alignment: int) -> int:
    """The size, or the next one that is a multiple of `alignment`."""
    return -(-size // alignment) * alignment


def copied(tensor: tf.Tensor) -> tf.Tensor:
    """A copy of an eager tensor in host memory; a large one lies in large pages.

    TensorFlow's convolution reads 9 MB of weights from there in a twelfth less time:
    3x3, 512 to 512 channels, 7x7, on an Intel Xeon, 1.69 instead of 1.85 ms.
    """
    size = tensor.dtype.size * math.prod(tensor.shape)
    # NumPy's own dtypes alone can become tensors through DLPack.
    if size < LARGE_PAGE_BYTES or tensor.dtype == tf.bfloat16:
        return tf.identity(tensor)
    copy = allocate(size).view(tensor.dtype.as_numpy_dtype).reshape(tensor.shape)
    copy[...] = tensor.numpy()
    return tf.experimental.dlpack.from_dlpack(copy.__dlpack__())
