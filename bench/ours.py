"""How the measurements use the package: one convolution, prepared as a user would.

Knows the public API alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import tensorflow as tf

import sparse_conv

ALGORITHMS = ("auto", "generic", "baked", "dense")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A kernel that is ready for calls of one shape.

    Attributes:
        kernel: The kernel.
        asked: The algorithm asked for.
        chosen: The algorithm that calls take.
        reason: Why.
        seconds: How long the conversion and the preparation took.
    """

    kernel: sparse_conv.SparseKernel
    asked: str
    chosen: str
    reason: str
    seconds: float

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """The convolution of `x`, stride 1, padding SAME."""
        return sparse_conv.conv2d(x, self.kernel, 1, "SAME")


def prepare(
    x: tf.Tensor, dense: tf.Tensor, algorithm: str, *, trainable: bool = False
) -> Prepared:
    """Converts a dense kernel, and compiles what calls on inputs like `x` need.

    Args:
        x: (N, H, W, C) tensor.
        dense: (R, S, C, K) tensor.
        algorithm: One of ALGORITHMS.
        trainable: Whether the kernel's values are a variable.

    Returns:
        The kernel, and what was chosen.

    Raises:
        NotImplementedError: The algorithm can't compute this convolution.
    """
    begin = time.perf_counter()
    kernel = sparse_conv.SparseKernel.from_dense(dense, trainable=trainable)
    seconds = time.perf_counter() - begin
    return Prepared(kernel, algorithm, "generic", "no choice yet", seconds)
