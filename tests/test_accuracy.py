"""float32 results are at least as near to float64 as TensorFlow's own.

The problems are those of the seed's five figures; they are scaled down for the quick
run and of full size in the slow one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import tensorflow as tf

import sparse_conv
from tests.ours import conv2d

UNIT_ROUNDOFF = 2.0**-24

# Two orders of summation that are equally good differ by so much by chance.
CHANCE = 1.05
# Where a GPU has few pixels to compute, TensorFlow splits long sums over its cores, so
# that they are more exact than usual. At full size it does not, nor does this apply.
FEW_PIXELS = {"cpu": CHANCE, "cuda": 1.5}


@dataclass(frozen=True)
class Point:
    """One point of a figure: an image, a square kernel, and its density."""

    figure: str
    height: int
    width: int
    channels: int
    taps: int
    outputs: int
    density: float = 0.1

    def scaled(self) -> Point:
        """The same sums for fewer pixels."""
        return Point(
            self.figure, min(self.height, 24), min(self.width, 40),
            self.channels, self.taps, min(self.outputs, 32), self.density,
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.figure}: {self.height}x{self.width}x{self.channels}, "
            f"{self.taps}x{self.taps}x{self.outputs}, {self.density}"
        )


POINTS = [
    *(Point("kernel", 256, 512, 3, k, 64) for k in (3, 5, 7, 9, 11)),
    *(Point("channels in", 256, 512, c, 11, 3) for c in (3, 32, 64, 128, 256)),
    *(Point("channels out", 256, 512, 3, 11, c) for c in (3, 32, 64, 128, 256)),
    *(Point("density", 256, 512, 32, 11, 64, d) for d in (0.1, 0.2, 0.5, 0.8, 1.0)),
    *(Point("image", s, s, 3, 11, 64) for s in (32, 64, 128, 256, 512)),
]


def relative_error(actual: tf.Tensor, exact: np.ndarray) -> float:
    """Root mean square error, as a fraction of the root mean square of the result."""
    difference = actual.numpy().astype(np.float64) - exact
    return float(np.sqrt(np.mean(difference**2) / np.mean(exact**2)))


@pytest.fixture(scope="module")
def full_float32(backend):
    """TensorFlow without TF32, which is what float32 means."""
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    yield backend
    tf.config.experimental.enable_tensor_float_32_execution(before)


def check_forward(point: Point, allowance: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, point.height, point.width, point.channels))
    dense = rng.standard_normal((point.taps, point.taps, point.channels, point.outputs))
    dense[rng.random(dense.shape) >= point.density] = 0
    x, dense = x.astype(np.float32), dense.astype(np.float32)
    with tf.device("/CPU:0"):
        exact = tf.nn.conv2d(
            tf.constant(x, tf.float64), tf.constant(dense, tf.float64), 1, "SAME"
        ).numpy()
    kernel = sparse_conv.SparseKernel.from_dense(dense)
    ours = conv2d(x, kernel, 1, "SAME")
    theirs = tf.nn.conv2d(x, dense, 1, "SAME")
    # Nobody does better than the rounding of the result itself, or is asked to.
    floor = UNIT_ROUNDOFF / 2
    error = relative_error(ours, exact)
    assert error <= allowance * max(relative_error(theirs, exact), floor)


@pytest.mark.parametrize("point", dict.fromkeys(p.scaled() for p in POINTS), ids=str)
def test_error_of_the_forward_pass(full_float32, point):
    check_forward(point, FEW_PIXELS[full_float32.name])


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_error_of_the_forward_pass_at_full_size(full_float32, point):
    check_forward(point, CHANCE)


GRADIENT_POINTS = [
    Point("training", 32, 32, 32, 3, 32),
    Point("training", 24, 24, 8, 7, 16),
    Point("training", 14, 14, 64, 3, 64),
]


@pytest.mark.parametrize("point", GRADIENT_POINTS, ids=str)
def test_error_of_the_gradients(full_float32, point):
    rng = np.random.default_rng(0)
    shape = (4, point.height, point.width)
    x = rng.standard_normal((*shape, point.channels)).astype(np.float32)
    dy = rng.standard_normal((*shape, point.outputs)).astype(np.float32)
    dense = rng.standard_normal(
        (point.taps, point.taps, point.channels, point.outputs)
    ).astype(np.float32)
    dense[rng.random(dense.shape) >= point.density] = 0

    def gradients(function, dtype):
        operands = [tf.constant(a, dtype) for a in (x, dense)]
        with tf.GradientTape() as tape:
            tape.watch(operands)
            y = function(*operands, 1, "SAME")
        return tape.gradient(y, operands, output_gradients=tf.constant(dy, dtype))

    with tf.device("/CPU:0"):
        exact = gradients(tf.nn.conv2d, tf.float64)
    ours = gradients(conv2d, tf.float32)
    theirs = gradients(tf.nn.conv2d, tf.float32)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        error = relative_error(a, c.numpy())
        floor = max(relative_error(b, c.numpy()), UNIT_ROUNDOFF / 2)
        assert error <= FEW_PIXELS[full_float32.name] * floor


def test_float32_is_not_tf32(backend):
    """The seed's precision was 1e-3, and TF32's is 3e-4; ours is float32's."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 32, 32, 64)).astype(np.float32)
    dense = rng.standard_normal((3, 3, 64, 64)).astype(np.float32)
    with tf.device("/CPU:0"):
        exact = tf.nn.conv2d(
            tf.constant(x, tf.float64), tf.constant(dense, tf.float64), 1, "SAME"
        ).numpy()
    y = conv2d(x, dense, 1, "SAME")
    assert relative_error(y, exact) < 2e-6


def test_settings_of_tf32_do_not_matter(backend):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 32, 32, 64)).astype(np.float32)
    dense = rng.standard_normal((3, 3, 64, 64)).astype(np.float32)
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    results = []
    for setting in (False, True):
        tf.config.experimental.enable_tensor_float_32_execution(setting)
        results.append(conv2d(x, dense, 1, "SAME").numpy().tobytes())
    tf.config.experimental.enable_tensor_float_32_execution(before)
    assert results[0] == results[1]
