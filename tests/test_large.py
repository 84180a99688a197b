"""Tensors of more than 2^31 elements, on a GPU that has the memory for them."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import sparse_conv
from tests import ours
from tests.conftest import skip_unless_usable

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

HEIGHT, WIDTH = 32769, 32768


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_rows_behind_two_to_the_31_elements(data_format):
    skip_unless_usable("cuda")
    rng = np.random.default_rng(0)
    dense = rng.integers(-3, 4, (3, 3, 2, 2)).astype(np.float16)
    kernel = sparse_conv.SparseKernel.from_dense(dense)
    nhwc = data_format == "NHWC"
    shape = (1, HEIGHT, WIDTH, 2) if nhwc else (1, 2, HEIGHT, WIDTH)
    x = tf.cast(tf.random.uniform(shape, -8, 8, tf.int32), tf.float16)
    with tf.GradientTape() as tape:
        tape.watch([x, kernel.values])
        y = ours.conv2d(x, kernel, 1, "SAME", data_format)
    dx, dvalues = tape.gradient(y, [x, kernel.values], tf.ones_like(y))
    assert dvalues.shape == (kernel.nnz,)
    # The last rows lie behind element 2^31 and depend on the last rows only.
    last = x[:, -16:] if nhwc else x[:, :, -16:]
    with tf.GradientTape() as tape:
        tape.watch(last)
        expected = ours.conv2d(last, kernel, 1, "SAME", data_format)
    dlast = tape.gradient(expected, last, tf.ones_like(expected))
    rows = slice(-15, None)
    for actual, wanted in ((y, expected), (dx, dlast)):
        a = actual[:, rows] if nhwc else actual[:, :, rows]
        b = wanted[:, rows] if nhwc else wanted[:, :, rows]
        np.testing.assert_array_equal(a.numpy(), b.numpy())
