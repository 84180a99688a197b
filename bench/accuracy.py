"""Errors relative to float64 on the five figures: ours and TensorFlow's in float32.

Run as `python -m bench.accuracy`; on the GPU if there is one. TF32 is switched off, so
that both sides compute in float32.
"""

from __future__ import annotations

import sys

import tensorflow as tf

import sparse_conv
from bench.figures import Layer, layers


def relative_error(y: tf.Tensor, exact: tf.Tensor) -> float:
    """Euclidean norm of the error over that of the exact output."""
    return float(tf.norm(tf.cast(y, tf.float64) - exact) / tf.norm(exact))


def errors(layer: Layer) -> tuple[float, float]:
    """Our error and TensorFlow's, on one layer."""
    x, dense = (tf.constant(array) for array in layer.tensors())
    exact = tf.nn.conv2d(tf.cast(x, tf.float64), tf.cast(dense, tf.float64), 1, "SAME")
    kernel = sparse_conv.SparseKernel.from_dense(dense)
    ours = sparse_conv.conv2d(x, kernel, 1, "SAME")
    return (
        relative_error(ours, exact),
        relative_error(tf.nn.conv2d(x, dense, 1, "SAME"), exact),
    )


def main() -> int:
    """Prints a table; returns 1 if we are less exact anywhere."""
    tf.config.experimental.enable_tensor_float_32_execution(False)
    worse = 0
    print(f"TensorFlow {tf.__version__}, {tf.constant(0.0).device}")
    print(f"{'figure':<14}{'layer':<42}{'ours':>10}{'TensorFlow':>12}")
    for layer in layers():
        ours, theirs = errors(layer)
        worse += ours > theirs
        mark = "  worse" if ours > theirs else ""
        print(f"{layer.figure:<14}{layer!s:<42}{ours:>10.2e}{theirs:>12.2e}{mark}")
    print(f"less exact than TensorFlow on {worse} layers")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
