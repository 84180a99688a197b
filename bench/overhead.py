"""What a call costs the host: eagerly, while a tape records, inside a `tf.function`.

Run as `python -m bench.overhead`. The tensors are tiny, so that little but the cost of
calling is measured: 1x32x32x3 by 3x3x3x8. Medians over batches of calls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import tensorflow as tf

import sparse_conv

BATCHES = 25
CALLS = 40


def median_us(call: Callable[[], tf.Tensor]) -> float:
    """Median time of a call in microseconds, over batches that end with a wait."""
    times = []
    for _ in range(BATCHES):
        start = time.perf_counter()
        for _ in range(CALLS):
            y = call()
        y.numpy()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times)


def recorded(function: Callable[[], tf.Tensor], watched: tf.Tensor) -> tf.Tensor:
    """Calls `function` while a tape follows `watched`."""
    with tf.GradientTape() as tape:
        tape.watch(watched)
        return function()


def main() -> None:
    """Prints a table of microseconds for each way of calling."""
    x = tf.random.normal((1, 32, 32, 3))
    dense = tf.random.normal((3, 3, 3, 8))
    dense = tf.where(tf.random.uniform(dense.shape) < 0.1, dense, 0.0)
    kernel = sparse_conv.SparseKernel.from_dense(dense)

    def ours() -> tf.Tensor:
        return sparse_conv.conv2d(x, kernel, 1, "SAME")

    def ours_dense() -> tf.Tensor:
        return sparse_conv.conv2d(x, dense, 1, "SAME")

    def theirs() -> tf.Tensor:
        return tf.nn.conv2d(x, dense, 1, "SAME")

    print(f"TensorFlow {tf.__version__}, {x.device}; microseconds a call")
    print(f"{'':<32}{'eager':>10}{'recording':>12}{'tf.function':>14}")
    rows = {
        "sparse_conv.conv2d, SparseKernel": (ours, kernel.values),
        "sparse_conv.conv2d, dense tensor": (ours_dense, dense),
        "tf.nn.conv2d": (theirs, dense),
    }
    for name, (function, weights) in rows.items():
        graph = tf.function(function)
        ways = (function, lambda f=function, w=weights: recorded(f, w), graph)
        cells = [median_us(way) for way in ways]
        print(f"{name:<32}{cells[0]:>10.1f}{cells[1]:>12.1f}{cells[2]:>14.1f}")


if __name__ == "__main__":
    main()
