"""The method of the original operator, written anew: the baseline of its figures.

A dense kernel is converted to a list of its nonzeros, in coordinates, at each call; one
thread then computes one output (`naive.cu`), or one core one row of them. Stride 1,
padding SAME, NHWC, float32. Nothing is tuned, and one thing is left out in its favour:
the original made the host wait for the GPU after each step of a call.

Knows nothing of how it is timed.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import tensorflow as tf

from bench.cases import Case
from bench.gpu_code import Step
from sparse_conv import bridge, streams
from sparse_conv.backends import cpu_threads
from sparse_conv.bridge import Memory, Place
from sparse_conv.launch import Launch, pack_words

_CONVERSION_THREADS = 128
# Threads of a block along the columns, the rows and the output channels.
_BLOCK = 10


def conversion_launch(case: Case) -> Launch:
    """The launch of `naive_to_coo`."""
    weights = case.taps * case.taps * case.c
    return Launch(
        "naive_to_coo",
        (),
        (-(-case.k // _CONVERSION_THREADS), 1, 1),
        (_CONVERSION_THREADS, 1, 1),
        0,
        ("kernel", "counts", "values", "rows", "columns", "channels"),
        pack_words([], [case.taps, case.c, case.k, weights]),
    )


def convolution_launch(case: Case) -> Launch:
    """The launch of `naive_conv2d`."""
    block = tuple(min(_BLOCK, extent) for extent in (case.w, case.h, case.k))
    columns, rows, channels = (
        -(-extent // threads)
        for extent, threads in zip((case.w, case.h, case.k), block, strict=True)
    )
    before = (case.taps - 1) // 2
    weights = case.taps * case.taps * case.c
    words = [case.h, case.w, case.c, case.k, weights, before, before, rows]
    return Launch(
        "naive_conv2d",
        (),
        (columns, rows * case.n, channels),
        block,
        0,
        ("x", "y", "counts", "values", "rows", "columns", "channels"),
        pack_words([], words),
    )


class NaiveGpu:
    """The method on a GPU, for one case."""

    def __init__(self, case: Case, place: Place):
        """Compiles the functions and allocates the list of nonzeros.

        Args:
            case: The convolution, in float32.
            place: The GPU.
        """
        self._place = place
        self._ordinal = bridge.ordinal_of(place)
        self._shape = case.output_shape
        self._convert = Step("naive", conversion_launch(case), self._ordinal)
        self._convolve = Step("naive", convolution_launch(case), self._ordinal)
        slots = math.prod(case.kernel_shape)
        # Cells of float32, for TensorFlow keeps int32 tensors in host memory.
        self._coo = {
            name: bridge.memory_of(bridge.empty((size,), tf.float32, place))
            for name, size in (
                ("counts", case.k),
                ("values", slots),
                ("rows", slots),
                ("columns", slots),
                ("channels", slots),
            )
        }

    def __call__(self, x: tf.Tensor, dense: tf.Tensor) -> tf.Tensor:
        """The convolution, with the conversion of the dense kernel."""
        y, operands = self._operands(x)
        kernel = {"kernel": bridge.memory_of(dense), **self._coo}
        with streams.ordered(self._ordinal) as lane:
            self._convert.run(kernel, lane.stream)
            self._convolve.run(operands, lane.stream)
        return y

    def convolution(self, x: tf.Tensor) -> list[tuple[Step, dict[str, Memory]]]:
        """The launch of the convolution alone, as `gate` enqueues it again."""
        return [(self._convolve, self._operands(x)[1])]

    def _operands(self, x: tf.Tensor) -> tuple[tf.Tensor, dict[str, Memory]]:
        y = bridge.empty(self._shape, tf.float32, self._place)
        memories = {"x": bridge.memory_of(x), "y": bridge.memory_of(y)}
        return y, {**memories, **self._coo}


def naive_cpu(x: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """The method on a CPU, with the conversion of the dense kernel.

    Args:
        x: (N, H, W, C) float32.
        dense: (R, S, C, K) float32.

    Returns:
        (N, H, W, K) float32.
    """
    by_output = np.ascontiguousarray(dense.transpose(3, 0, 1, 2))
    k, rows, columns, channels = np.nonzero(by_output)
    values = by_output[k, rows, columns, channels]
    begins = np.searchsorted(k, np.arange(dense.shape[3] + 1))
    coo = (begins, values, rows, columns, channels)
    before = np.array([(size - 1) // 2 for size in dense.shape[:2]])
    y = np.empty((*x.shape[:3], dense.shape[3]), np.float32)

    def row(number: int) -> None:
        image, p = divmod(number, x.shape[1])
        _naive_row(x[image], y[image, p], p, before, *coo)

    with ThreadPoolExecutor(cpu_threads.thread_count()) as pool:
        list(pool.map(row, range(x.shape[0] * x.shape[1])))
    return y


@numba.njit(nogil=True, cache=True)
def _naive_row(x, y, p, before, begins, values, rows, columns, channels):
    """One row of outputs: (W, K) from the (H, W, C) image, one output at a time."""
    height, width, _ = x.shape
    for q in range(width):
        for k in range(y.shape[1]):
            total = np.float32(0)
            for i in range(begins[k], begins[k + 1]):
                h = p + rows[i] - before[0]
                w = q + columns[i] - before[1]
                if 0 <= h < height and 0 <= w < width:
                    total += x[h, w, channels[i]] * values[i]
            y[q, k] = total
