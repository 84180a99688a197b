"""Is a result right? Asked before any time is taken.

The reference is `tf.nn.conv2d` in float64 on the same device. The error is the
Euclidean norm of the difference over that of the reference. Random numbers make random
roundings, so that errors of a sum of n terms grow like the root of n. Limits follow
from that, not from what was seen; a wrong index or a forgotten channel is a thousand
times beyond them.
"""

from __future__ import annotations

import math

import tensorflow as tf

# Half the distance from 1 to the next number. TF32 has 10 bits behind the point.
UNIT_ROUNDOFF = {
    "float32": 2.0**-24,
    "tf32": 2.0**-11,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}


def reference(x: tf.Tensor, dense: tf.Tensor) -> tf.Tensor:
    """The convolution in float64, stride 1, padding SAME, NHWC."""
    return tf.nn.conv2d(tf.cast(x, tf.float64), tf.cast(dense, tf.float64), 1, "SAME")


def relative_error(y: tf.Tensor, exact: tf.Tensor) -> float:
    """Euclidean norm of the error over that of the exact result; NaN if `y` has one."""
    if tuple(y.shape) != tuple(exact.shape):
        return math.inf
    norm = float(tf.norm(exact))
    error = float(tf.norm(tf.cast(y, tf.float64) - exact))
    return error / norm if norm else error


def limit(
    dtype: str, terms: float, *, tf32: bool = False, transformed: bool = False
) -> float:
    """The largest error that rounding explains.

    Args:
        dtype: Name of the operands' dtype.
        terms: How many products an output sums.
        tf32: Whether float32 may be computed in TF32.
        transformed: Whether the operands may be transformed before they are multiplied
            (Winograd, FFT), as TensorFlow's libraries do. That costs some four bits.

    Returns:
        Relative to the Euclidean norm of the result.
    """
    storage = UNIT_ROUNDOFF[dtype]
    # Sums are kept in float32, whatever the operands are.
    sums = (4 + 2 * math.sqrt(terms)) * UNIT_ROUNDOFF["float32"]
    if transformed:
        sums *= 2**4
    products = UNIT_ROUNDOFF["tf32"] if tf32 and dtype == "float32" else storage
    return 2 * products + sums


def verdict(error: float, allowed: float) -> str | None:
    """Why a result is refused; None if it is right."""
    # Written so that a NaN is refused.
    if error <= allowed:
        return None
    return f"wrong result: error {error:.2g}, at most {allowed:.2g} is rounding"
