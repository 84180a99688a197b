"""conv2d_spmm.cu agrees with the definition, and is taken where it pays.

The emulator runs it on the CPU; calls need a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import sparse_conv
from sparse_conv import spmm, spmm_plan
from sparse_conv.backends import cuda_costs
from sparse_conv.costs import Machine
from sparse_conv.gather import dgrad_gather, fprop_gather
from sparse_conv.pattern import Rows
from sparse_conv.spmm import SpmmConfig
from sparse_conv.tiling import DeviceLimits
from tests.conftest import skip_unless_usable
from tests.emulated_passes import run_calls
from tests.problems import DENSITIES, DTYPES, FEW_PROBLEMS, PROBLEMS, make, make_data
from tests.reference import conv2d_reference, dgrad_reference
from tests.spmm_passes import (
    entries_of,
    place_call,
    spmm_configs,
    spmm_dgrad_call,
    spmm_fprop_call,
)
from tests.tolerance import assert_exact

WRITING = [
    p for p in PROBLEMS if 0 not in (*p.input_shape, *p.output_shape, *p.kernel_shape)
]


def assert_passes_exact(problem, dtype, densities) -> None:
    """Both passes, with every density and configuration that fits."""
    calls, expected, labels = [], [], []
    for density in densities:
        data = make_data(problem, dtype, density, whole=True)
        for gather, make_call, array, reference in (
            (fprop_gather(problem), spmm_fprop_call, data.x, conv2d_reference),
            (dgrad_gather(problem), spmm_dgrad_call, data.dy, dgrad_reference),
        ):
            result = reference(array, data.dense, problem)
            for config in spmm_configs(gather):
                call = make_call(problem, data, dtype, config)
                if call is not None:
                    calls.append(call)
                    expected.append(result)
                    labels.append(f"{make_call.__name__} density={density} {config}")
    assert calls
    for written, result, label in zip(run_calls(calls), expected, labels, strict=True):
        assert_exact(written["write"], result, label)


@pytest.mark.parametrize("problem", WRITING, ids=str)
def test_passes_are_exact(problem):
    assert_passes_exact(problem, "float32", DENSITIES[::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", FEW_PROBLEMS, ids=str)
def test_passes_are_exact_in_every_dtype(problem, dtype):
    assert_passes_exact(problem, dtype, (0.3,))


# Deep enough, and so small, that conv2d_spmm is expected to be the fastest of ours.
DEEP = make((1, 7, 7, 256), (3, 3, 256, 128))
LIMITS = DeviceLimits(132, 227 * 1024, 8, 60 * 2**20)
H100 = Machine("cuda-sm90", 132, 32)


def cost(problem, nnz, sparse=True, name="fprop"):
    return cuda_costs.generic_cost(name, problem, "float32", nnz, LIMITS, H100, sparse)


def test_few_pixels_of_many_channels_are_given_to_it():
    assert cost(DEEP, 29491).block is not None
    assert cost(DEEP, 29491, name="dgrad").block is not None


def test_a_pattern_that_nobody_knows_ahead_is_not():
    assert cost(DEEP, 29491, sparse=False).block is None
    assert cost(DEEP, 29491, name="wgrad").block is None


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_what_is_chosen_can_be_launched(problem):
    gather = fprop_gather(problem)
    if not (gather.out_channels and gather.in_channels):
        return
    reachable = set(spmm_plan.reachable())
    for dtype in DTYPES:
        choice = spmm_plan.choose_spmm_block(gather, dtype, 7, LIMITS)
        assert (choice.block is None) == (dtype == "int32")
        if choice.block is not None:
            launch = spmm.spmm_launch(gather, dtype, choice.block, 8)
            assert (launch.function, launch.defines) in reachable


def test_a_gpu_without_room_gets_no_configuration():
    little = DeviceLimits(132, 1024)
    choice = spmm_plan.choose_spmm_block(fprop_gather(DEEP), "float32", 9000, little)
    assert choice.block is None
    assert choice.clocks == float("inf")


def test_rows_are_placed_part_by_part():
    gather = fprop_gather(make((1, 4, 4, 4), (1, 1, 4, 5)))
    rows = Rows(
        np.array([0, 0, 1, 5, 6], np.int32), np.array([0, 1, 5, 6, 6], np.int32),
        np.array([2, 0, 1, 2, 3, 0], np.int32), None,
    )  # fmt: skip
    block = spmm.make_spmm_block(gather, "float32", SpmmConfig(1, 2, 2, 1, 1, 4, 4, 2))
    placed = spmm.place_rows(gather, rows, "float32", block)
    # Rows 2 and 3 have two and one entries of the first chunk, in a quad each.
    assert placed.capacity == 8
    # Blocks of two rows, and of each two chunks; the last block has one row.
    np.testing.assert_array_equal(
        placed.sources.reshape(3, 2, 8)[:, :, [0, 1, 4]],
        [[[-1, -1, -1], [0, -1, -1]], [[1, 2, 5], [3, 4, -1]], [[-1] * 3, [-1] * 3]],
    )
    plane = 4 * block.lattice.plane_pitch
    assert placed.offsets.reshape(3, 2, 8)[1, 1, :2].tolist() == [0, plane]
    np.testing.assert_array_equal(
        placed.spans.reshape(3, 2, 2, 2),
        [
            [[[0, 0], [0, 0]], [[0, 0], [0, 1]]],
            [[[0, 2], [1, 1]], [[0, 2], [1, 0]]],
            [[[0, 0], [0, 0]], [[0, 0], [0, 0]]],
        ],
    )


@pytest.mark.parametrize("dtype", spmm_plan.DTYPES)
@pytest.mark.parametrize("problem", FEW_PROBLEMS, ids=str)
def test_values_are_placed(problem, dtype):
    data = make_data(problem, dtype, 0.3, whole=True)
    calls, expected = [], []
    dgrad = dgrad_gather(problem)
    for gather, rows in (
        (fprop_gather(problem), data.pattern.fprop_rows()),
        (dgrad, data.pattern.dgrad_rows(dgrad)),
    ):
        for config in spmm_configs(gather):
            block = spmm.make_spmm_block(gather, dtype, config)
            if block is not None:
                placed = spmm.place_rows(gather, rows, dtype, block)
                calls.append(place_call(gather, placed, data.values, dtype, block))
                expected.append(entries_of(placed, data.values, dtype))
    for written, entries in zip(run_calls(calls), expected, strict=True):
        np.testing.assert_array_equal(written["write"], entries.ravel())


def layout_of(shape, kernel_shape, config, **geometry):
    gather = fprop_gather(make(shape, kernel_shape, **geometry))
    return spmm.make_spmm_block(gather, "float32", config)


def test_margins_share_their_places():
    config = SpmmConfig(2, 2, 1, 4, 1, 7, 8, 4)
    block = layout_of((1, 7, 7, 4), (3, 3, 4, 4), config)
    # A row's last column is the next one's first. Eight lanes read seven outputs.
    assert (block.lattice.row_pitch, block.width, block.wavefronts) == (8, 7, 2)
    assert block.lattice.plane_pitch == 8 * 8 + 9
    # Without a margin there is nothing to share.
    block = layout_of((1, 9, 9, 4), (3, 3, 4, 4), config, padding="VALID")
    assert block.lattice.row_pitch >= 9


def test_images_share_a_tile():
    config = SpmmConfig(7, 4, 4, 2, 1, 7, 8, 4, images=4)
    block = layout_of((6, 7, 7, 4), (3, 3, 4, 4), config)
    assert block.tiling.subtiles == 2
    # No bank serves two lanes of a warp, whichever images they are of.
    assert block.wavefronts == 7


def operands(dtype, data_format="NHWC"):
    """A deep convolution on the GPU: input, dense kernel with zeros."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((3, 3, 256, 128)) * (rng.random((3, 3, 256, 128)) < 0.1)
    shape = (2, 7, 7, 256) if data_format == "NHWC" else (2, 256, 7, 7)
    x = rng.standard_normal(shape)
    with tf.device("/GPU:0"):
        return tf.cast(tf.constant(x), dtype), tf.cast(tf.constant(w), dtype)


def assert_close(got, x, w, dtype, data_format="NHWC"):
    x, w = (tf.cast(t, tf.float64).numpy() for t in (x, w))
    if data_format == "NCHW":
        x = x.transpose(0, 2, 3, 1)
    exact = tf.nn.conv2d(tf.constant(x), tf.constant(w), 1, "SAME").numpy()
    if data_format == "NCHW":
        exact = exact.transpose(0, 3, 1, 2)
    error = np.abs(tf.cast(got, tf.float64).numpy() - exact).max() / np.abs(exact).max()
    assert error < {"float16": 1e-3, "bfloat16": 8e-3}.get(dtype, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_calls_are_exact_and_say_what_computes(dtype, data_format):
    skip_unless_usable("cuda")
    x, w = operands(dtype, data_format)
    kernel = sparse_conv.SparseKernel.from_dense(w)
    options = {"data_format": data_format, "algorithm": "generic"}
    y = sparse_conv.conv2d(x, kernel, 1, "SAME", **options)
    assert_close(y, x, w, dtype, data_format)
    explained = sparse_conv.explain(x, kernel, 1, "SAME", **options)
    assert "input channels at a time" in str(explained["fprop"])


@pytest.mark.gpu
def test_new_values_and_gradients_need_no_new_rows():
    skip_unless_usable("cuda")
    x, w = operands("float32")
    with tf.device("/GPU:0"):
        kernel = sparse_conv.SparseKernel.from_dense(w, trainable=True)
    for factor in (1.0, -2.0):
        kernel.values.assign(kernel.values * factor)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm="generic")
            loss = tf.reduce_sum(y * y)
        dx = tape.gradient(loss, x)
        dense = kernel.to_dense()
        assert_close(y, x, dense, "float32")
        exact = tf.nn.conv2d_transpose(
            tf.cast(2 * y, tf.float64), tf.cast(dense, tf.float64), x.shape, 1, "SAME"
        )
        error = tf.reduce_max(tf.abs(tf.cast(dx, tf.float64) - exact))
        assert error < 1e-6 * tf.reduce_max(tf.abs(exact))


@pytest.mark.gpu
def test_a_row_that_is_far_denser_than_the_others_is_served():
    skip_unless_usable("cuda")
    x, w = operands("float32")
    w = tf.concat([tf.ones_like(w[..., :1]), w[..., 1:]], -1)
    kernel = sparse_conv.SparseKernel.from_dense(w)
    y = sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm="generic")
    assert_close(y, x, w, "float32")
