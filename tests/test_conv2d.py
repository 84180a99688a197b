"""The operator and its gradients against the float64 reference, over every geometry."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_conv
from tests import ours
from tests.reference import conv2d_reference, dgrad_reference, wgrad_reference
from tests.strategies import FLOATS, Call, Data, calls, make_data, numpy_dtype
from tests.tolerance import assert_exact, assert_within, error_bound


@dataclass(frozen=True)
class Results:
    """What a call computes: the output, then the gradients (None for int32)."""

    y: np.ndarray
    dx: np.ndarray | None = None
    dkernel: np.ndarray | None = None
    dbias: np.ndarray | None = None


def compute(call: Call, data: Data, conv2d=ours.conv2d) -> Results:
    """Runs a call and its gradients, eagerly, on the current device."""
    x = tf.constant(data.x)
    kernel, weights = make_kernel(call, data)
    bias = None if data.bias is None else tf.constant(data.bias)
    if call.dtype == "int32":
        y = conv2d(x, kernel, **call.options, bias=bias)
        return Results(y.numpy())
    sources = [x, weights] if bias is None else [x, weights, bias]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        y = conv2d(x, kernel, **call.options, bias=bias)
    gradients = tape.gradient(y, sources, output_gradients=tf.constant(data.dy))
    return Results(y.numpy(), *(gradient.numpy() for gradient in gradients))


def make_kernel(call: Call, data: Data):
    """`filters`, and the tensor that its gradient goes to."""
    if not call.sparse:
        kernel = tf.constant(data.kernel)
        return kernel, kernel
    kernel = sparse_conv.SparseKernel.from_dense(data.kernel)
    return kernel, kernel.values


def canonical(dense: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """`dense` where `pattern` (both HWIO) isn't zero, in the order of `values`."""
    return dense.transpose(3, 2, 0, 1)[pattern.transpose(3, 2, 0, 1) != 0]


def check(call: Call, data: Data, results: Results) -> None:
    """Fails unless every result is as near to the reference as it must be."""
    problem = call.problem
    x, kernel, dy = (
        np.asarray(a).astype(np.float64).reshape(shape)
        for a, shape in (
            (data.x, problem.input_shape),
            (data.kernel, problem.kernel_shape),
            (data.dy, problem.output_shape),
        )
    )
    taps = problem.r * problem.s
    pixels = problem.n * problem.p * problem.q

    def compare(actual, function, *operands, terms, shape, extra=0.0, magnitude=0.0):
        expected = function(*operands, problem) + extra
        size = function(*map(np.abs, operands), problem) + magnitude
        if call.sparse and function is wgrad_reference:
            expected, size = canonical(expected, kernel), canonical(size, kernel)
        compare_arrays(actual, expected.reshape(shape), size.reshape(shape), terms)

    def compare_arrays(actual, expected, size, terms):
        assert actual.dtype == numpy_dtype(call.dtype)
        if call.integers or call.dtype == "int32":
            assert_exact(actual, expected, str(call))
        else:
            bound = error_bound(call.dtype, expected, size, terms)
            assert_within(actual, expected, bound, str(call))

    bias = np.zeros(problem.k) if data.bias is None else data.bias.astype(np.float64)
    if problem.data_format == "NCHW":
        bias = bias[:, np.newaxis, np.newaxis]
    compare(
        results.y, conv2d_reference, x, kernel,
        terms=taps * problem.group_channels + 1, shape=call.output_shape,
        extra=bias, magnitude=np.abs(bias),
    )  # fmt: skip
    if results.dx is None:
        return
    compare(
        results.dx, dgrad_reference, dy, kernel,
        terms=taps * (problem.k // problem.groups), shape=call.input_shape,
    )  # fmt: skip
    compare(
        results.dkernel, wgrad_reference, x, dy, terms=pixels,
        shape=(-1,) if call.sparse else problem.kernel_shape,
    )  # fmt: skip
    if data.bias is not None:
        axes = (0, 1, 2) if problem.data_format == "NHWC" else (0, 2, 3)
        compare_arrays(results.dbias, dy.sum(axes), np.abs(dy).sum(axes), pixels)


@given(call=calls())
def test_agrees_with_the_reference(backend, call):
    data = make_data(call)
    check(call, data, compute(call, data))


@settings(max_examples=max(20, settings.default.max_examples // 2))
@given(call=calls(), taps=st.data())
def test_outer_taps_without_nonzeros(backend, call, taps):
    """Such taps are left out of the computation, which moves the padding."""
    data = make_data(replace(call, density=0.7))
    kept = np.zeros(call.kernel_shape[:2], bool)
    first, last = zip(*[taps.draw(_range(size)) for size in kept.shape], strict=True)
    kept[first[0] : last[0], first[1] : last[1]] = True
    kernel = np.where(kept[..., np.newaxis, np.newaxis], data.kernel, 0)
    data = replace(data, kernel=kernel.astype(data.kernel.dtype))
    check(call, data, compute(call, data))


def _range(size: int) -> st.SearchStrategy:
    """A part of `size` taps that isn't empty."""
    bounds = st.tuples(st.integers(0, size - 1), st.integers(0, size - 1))
    return bounds.map(lambda ends: (min(ends), max(ends) + 1))


LARGER = [
    Call((1, 37, 131, 3), (11, 11, 3, 64), density=0.1),
    Call((1, 37, 131, 3), (11, 11, 3, 64), density=0.1, sparse=False),
    Call((2, 14, 14, 130), (3, 3, 130, 33), density=0.1),
    Call((2, 14, 14, 33), (1, 1, 33, 130), density=0.2, dtype="float64"),
    Call((1, 40, 40, 64), (5, 5, 64, 3), density=0.05),
    Call((3, 65, 33, 5), (7, 7, 5, 17), strides=2, density=0.2, bias=True),
    Call((2, 6, 29, 67), (3, 3, 2, 12), data_format="NCHW", padding="VALID"),
    Call((1, 8, 70, 70), (5, 3, 8, 9), data_format="NCHW", dilations=[3, 2]),
    Call((2, 33, 35, 12), (3, 3, 1, 24), density=0.5),
    Call((2, 33, 35, 12), (3, 3, 12, 40), density=0.9, dtype="float16"),
    Call((2, 33, 35, 12), (3, 3, 12, 40), strides=3, density=0.3, dtype="bfloat16"),
    Call((65, 5, 5, 8), (3, 3, 8, 8), density=1.0, sparse=False),
    Call((1, 3, 300, 2), (2, 9, 2, 4), strides=[1, 4], dilations=[1, 6]),
    Call((2, 20, 20, 3), (5, 5, 3, 7), density=1.0, dtype="int32"),
]


@pytest.mark.parametrize(
    "call", LARGER, ids=lambda c: f"{c.problem}_{c.dtype}_{c.density}_{c.sparse}"
)
def test_agrees_with_the_reference_on_larger_problems(backend, call):
    data = make_data(call)
    check(call, data, compute(call, data))


@given(call=calls())
def test_bit_equal_from_run_to_run(backend, call):
    data = make_data(call)
    first = compute(call, data)
    # Scratch memory must not remember what another call left there.
    other = replace(call, strides=1, dilations=1, padding="SAME")
    left = make_data(other)
    if call.dtype != "int32":
        left.x[...] = left.dy[...] = np.nan
    compute(other, left)
    second = compute(call, data)
    for name in ("y", "dx", "dkernel", "dbias"):
        a, b = getattr(first, name), getattr(second, name)
        assert (a is None) == (b is None)
        assert a is None or a.tobytes() == b.tobytes(), f"{name}: {call}"


AFTER_NAN = [
    Call(
        (1, 15, 7, 17), (8, 8, 5, 24), strides=[1, 1, 7, 1], dilations=[7, 1],
        data_format="NCHW", density=0.9, sparse=False,
    ),
    Call(
        (3, 12, 12, 4), (1, 1, 4, 9), strides=(1, 3), dtype="float64", density=1.0,
        sparse=False,
    ),
    Call((2, 9, 11, 6), (7, 8, 2, 3), strides=[7, 4], dilations=[1, 2], density=0.5),
]  # fmt: skip


@pytest.mark.parametrize("call", AFTER_NAN, ids=lambda call: str(call.problem))
def test_results_do_not_depend_on_earlier_calls(backend, call):
    data = make_data(call)
    first = compute(call, data)
    large = Call((2, 64, 64, 8), (3, 3, 8, 8), dtype=call.dtype)
    nans = make_data(large)
    nans.x[...] = nans.dy[...] = np.nan
    for _ in range(5):
        compute(large, nans)
        again = compute(call, data)
        for name in ("y", "dx", "dkernel"):
            assert getattr(first, name).tobytes() == getattr(again, name).tobytes()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("padding", ["SAME", "VALID", "explicit"])
@pytest.mark.parametrize("strides", [1, [2, 3]], ids=str)
def test_agrees_with_tensorflow(backend, dtype, padding, strides):
    # Neither dilations nor groups nor NCHW: TensorFlow's CPU has no gradients for them.
    explicit = [[0, 0], [1, 2], [3, 0], [0, 0]]
    call = Call(
        (2, 9, 11, 4), (3, 5, 4, 6), strides=strides, dtype=dtype, sparse=False,
        padding=explicit if padding == "explicit" else padding, integers=True,
    )  # fmt: skip
    data = make_data(call)
    x, kernel = tf.constant(data.x), tf.constant(data.kernel)
    dy = tf.constant(data.dy)
    with tf.GradientTape() as tape:
        tape.watch([x, kernel])
        y = tf.nn.conv2d(x, kernel, call.strides, call.padding)
    gradients = tape.gradient(y, [x, kernel], output_gradients=dy)
    ours = compute(call, data)
    np.testing.assert_array_equal(ours.y, y.numpy())
    # Sums of half precision are TensorFlow's own affair in its gradients.
    if dtype in ("float32", "float64"):
        np.testing.assert_array_equal(ours.dx, gradients[0].numpy())
        np.testing.assert_array_equal(ours.dkernel, gradients[1].numpy())


EMPTY = {
    "empty batch": Call((0, 8, 8, 4), (3, 3, 4, 6)),
    "one empty batch dimension of three": Call((2, 0, 3, 8, 8, 4), (3, 3, 4, 6)),
    "empty batch, NCHW": Call((0, 4, 8, 8), (3, 3, 4, 6), data_format="NCHW"),
    "no rows, SAME": Call((2, 0, 8, 4), (3, 3, 4, 6)),
    "no pixels, SAME": Call((2, 0, 0, 4), (3, 3, 4, 6), strides=2),
    "no output channels": Call((2, 8, 8, 4), (3, 3, 4, 0)),
    "kernel one larger, VALID": Call((2, 8, 8, 4), (9, 8, 4, 6), padding="VALID"),
    "short by less than a stride": Call(
        (2, 8, 8, 4), (12, 12, 4, 6), padding="VALID", strides=5
    ),
    "nothing but padding": Call(
        (1, 0, 2, 1), (1, 1, 1, 1), padding=[[0, 0], [1, 1], [1, 1], [0, 0]]
    ),
    "too little padding": Call(
        (2, 0, 8, 4), (3, 3, 4, 6), padding=[[0, 0], [1, 1], [1, 1], [0, 0]]
    ),
    "density 0": Call((2, 8, 8, 4), (3, 3, 4, 6), density=0.0),
    "density 0, groups": Call((2, 8, 8, 4), (3, 3, 2, 6), density=0.0),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("name", EMPTY)
def test_empty_tensors(backend, name, sparse, dtype):
    call = replace(EMPTY[name], sparse=sparse, dtype=dtype, bias=True)
    data = make_data(call)
    results = compute(call, data)
    assert results.y.shape == call.output_shape
    check(call, data, results)


LARGE_KERNELS = {
    "SAME": Call((2, 3, 2, 4), (11, 7, 4, 6), integers=True),
    "SAME on one pixel": Call((2, 1, 1, 4), (3, 3, 4, 6), integers=True),
    "SAME, strided and dilated": Call(
        (1, 5, 5, 2), (7, 7, 2, 3), strides=2, dilations=3, integers=True
    ),
    "padding larger than the kernel": Call(
        (2, 4, 4, 2), (3, 3, 2, 3), integers=True,
        padding=[[0, 0], [9, 9], [9, 9], [0, 0]],
    ),
    "stride larger than the kernel": Call(
        (2, 8, 8, 2), (3, 3, 2, 3), strides=5, padding="VALID", integers=True
    ),
    "stride larger than the image": Call(
        (2, 8, 8, 2), (3, 3, 2, 3), strides=100, integers=True
    ),
    "dilation larger than the image": Call(
        (2, 8, 8, 2), (3, 3, 2, 3), dilations=50, integers=True
    ),
    "dilation of a single tap": Call(
        (2, 8, 8, 2), (1, 1, 2, 3), dilations=2**31 - 1, integers=True
    ),
    "stride that fills 32 bits": Call(
        (2, 8, 8, 2), (3, 3, 2, 3), strides=2**31 - 1, integers=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("name", LARGE_KERNELS)
def test_kernels_strides_and_padding_beyond_the_image(backend, name, sparse):
    call = replace(LARGE_KERNELS[name], sparse=sparse)
    data = make_data(call)
    check(call, data, compute(call, data))


def poison(nbytes: int) -> None:
    """Leaves NaN in the memory that the next allocations are likely to get."""
    sizes = [max(nbytes // 4, 1)] * 8 + [64, 1024, 16384]
    arrays = [np.full(size, np.nan, np.float32) for size in sizes]
    tensors = [tf.fill([size], np.float32(np.nan)) for size in sizes]
    del arrays, tensors


@given(call=calls(dtypes=("float32", "float64")))
def test_every_output_is_written(backend, call):
    data = make_data(call)
    poison(data.dy.nbytes)
    check(call, data, compute(call, data))


def between_nans(array: np.ndarray) -> tf.Tensor:
    """A tensor on `array`'s values, whose memory has NaN before and behind it."""
    margin = 4096 // array.itemsize
    memory = np.full(array.size + 3 * margin, np.nan, array.dtype)
    # TensorFlow takes memory as it is only where it is aligned to 64 bytes.
    start = margin + (-memory.ctypes.data // array.itemsize) % (64 // array.itemsize)
    view = memory[start : start + array.size].reshape(array.shape)
    view[...] = array
    return tf.experimental.dlpack.from_dlpack(view.__dlpack__())


@given(call=calls(dtypes=("float32", "float64")))
def test_reads_nothing_outside_the_input(call):
    data = make_data(call)
    if 0 in data.x.shape or 0 in data.dy.shape or 0 in data.kernel.shape:
        return
    x, dy = between_nans(data.x), between_nans(data.dy)
    filters, weights = make_kernel(call, data)
    if not call.sparse:
        filters = weights = between_nans(data.kernel)
    with tf.GradientTape() as tape:
        tape.watch([x, weights])
        y = ours.conv2d(x, filters, **call.options)
    gradients = tape.gradient(y, [x, weights], output_gradients=dy)
    results = Results(y.numpy(), *(gradient.numpy() for gradient in gradients))
    check(call, replace(data, bias=None), results)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_zero_weights_hide_what_is_not_finite(backend, sparse, bad, dtype, data_format):
    nhwc = data_format == "NHWC"
    call = Call(
        (2, 7, 9, 5) if nhwc else (2, 5, 7, 9), (3, 3, 5, 6), data_format=data_format,
        dtype=dtype, sparse=sparse, integers=True, density=0.5,
    )  # fmt: skip
    data = make_data(call)
    data.kernel[:, :, 3] = 0
    hidden = (..., 3) if nhwc else (slice(None), 3)
    data.x[hidden] = 0
    expected = compute(call, data)
    data.x[hidden] = bad
    actual = compute(call, data)
    np.testing.assert_array_equal(
        actual.y.astype(np.float64), expected.y.astype(np.float64)
    )
    # The same for the input gradient, where it is dy that a zero weight hides.
    data.x[hidden] = 0
    data.kernel[..., 4] = 0
    hidden = (..., 4) if nhwc else (slice(None), 4)
    data.dy[hidden] = 0
    expected = compute(call, data)
    data.dy[hidden] = bad
    actual = compute(call, data)
    np.testing.assert_array_equal(
        actual.dx.astype(np.float64), expected.dx.astype(np.float64)
    )


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_output_without_weights_is_positive_zero_plus_bias(backend, sparse, bias):
    call = Call((2, 7, 9, 5), (3, 3, 5, 6), sparse=sparse, bias=bias)
    data = make_data(call)
    data.x[...] = np.nan
    data.kernel[..., 2] = 0
    y = compute(call, data).y[..., 2]
    expected = np.full_like(y, data.bias[2] if bias else 0.0)
    assert y.tobytes() == expected.tobytes()


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_negative_zero_counts_as_zero(backend, sparse):
    call = Call((1, 5, 5, 2), (3, 3, 2, 3), sparse=sparse)
    data = make_data(call)
    data.kernel[data.kernel == 0] = -0.0
    data.kernel[:, :, 1] = -0.0
    data.x[..., 1] = np.nan
    assert np.isfinite(compute(call, data).y).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_weights_that_are_not_finite_reach_the_output(backend, bad):
    call = Call((1, 5, 5, 2), (3, 3, 2, 3), sparse=False, density=0.5)
    data = make_data(call)
    data.kernel[1, 1, 0, 2] = bad
    y = compute(call, data).y
    assert not np.isfinite(y[..., 2]).any()
    assert np.isfinite(y[..., :2]).all()


def test_int32_wraps_around(backend):
    rng = np.random.default_rng(0)
    x = rng.integers(-(2**31), 2**31, (2, 4, 5, 7)).astype(np.int32)
    kernel = rng.integers(-(2**31), 2**31, (1, 1, 7, 9)).astype(np.int32)
    expected = (x.astype(np.int64) @ kernel[0, 0].astype(np.int64)).astype(np.int32)
    for filters in (kernel, sparse_conv.SparseKernel.from_dense(kernel)):
        y = ours.conv2d(x, filters, 1, "SAME")
        np.testing.assert_array_equal(y.numpy(), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_accumulates_in_float32(backend, dtype):
    # In either of them 2048 + 1 is 2048 again: half sums would stay there.
    ones = np.ones((1, 1, 1, 4096), numpy_dtype(dtype))
    y = ours.conv2d(ones, ones.reshape(1, 1, 4096, 1), 1, "SAME")
    assert y.numpy().item() == 4096


def test_float16_overflows_to_infinity(backend):
    x = np.full((1, 1, 1, 2), 60000, np.float16)
    y = ours.conv2d(x, np.ones((1, 1, 2, 1), np.float16), 1, "SAME")
    assert np.isposinf(y.numpy().item())


VIEWS = {
    "transposed": lambda a: np.ascontiguousarray(a.transpose(1, 0, 3, 2)).transpose(
        1, 0, 3, 2
    ),
    "reversed": lambda a: np.ascontiguousarray(a[:, ::-1])[:, ::-1],
    "every other": lambda a: np.repeat(a, 2, axis=2)[:, :, ::2],
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "read-only": lambda a: _read_only(a),
    "unaligned": lambda a: _unaligned(a),
}


def _read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def _unaligned(array: np.ndarray) -> np.ndarray:
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    view = memory.view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_arrays_of_any_memory_layout(backend, view, sparse):
    data = make_data(Call((2, 6, 5, 4), (3, 3, 4, 6), bias=True, integers=True))
    expected = ours.conv2d(data.x, data.kernel, 1, "SAME", bias=data.bias)
    kernel = VIEWS[view](data.kernel)
    if sparse:
        kernel = sparse_conv.SparseKernel.from_dense(kernel)
    actual = ours.conv2d(VIEWS[view](data.x), kernel, 1, "SAME", bias=data.bias)
    np.testing.assert_array_equal(actual.numpy(), expected.numpy())
    assert actual.dtype == tf.float32


ACTIVATIONS = {
    "relu": tf.nn.relu,
    "relu6": tf.nn.relu6,
    "leaky_relu": tf.nn.leaky_relu,
    "elu": tf.nn.elu,
    "sigmoid": tf.sigmoid,
    "tanh": tf.tanh,
    "gelu": tf.nn.gelu,
    "swish": tf.nn.silu,
}


def _activated(name: str | None, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The activation of `z` and its derivative there, in float64."""
    z = tf.constant(z, tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(z)
        y = tf.identity(z) if name is None else ACTIVATIONS[name](z)
    return y.numpy(), tape.gradient(y, z).numpy()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_bias_and_activation(backend, activation, data_format, dtype):
    # Strided, so that the output's rows are not the input's.
    nhwc = data_format == "NHWC"
    call = Call(
        (2, 7, 9, 3) if nhwc else (2, 3, 7, 9), (3, 3, 3, 6), strides=2,
        data_format=data_format, dtype=dtype, bias=True, density=0.4, seed=5,
    )  # fmt: skip
    data = make_data(call)
    problem = call.problem
    x, kernel, bias, dy = (
        np.asarray(a).astype(np.float64)
        for a in (data.x, data.kernel, data.bias, data.dy)
    )
    bias = bias if nhwc else bias[:, np.newaxis, np.newaxis]
    z = conv2d_reference(x, kernel, problem) + bias
    size = conv2d_reference(np.abs(x), np.abs(kernel), problem) + np.abs(bias)
    unit = error_bound(dtype, np.ones(1), np.zeros(1), 0)
    z_bound = error_bound(dtype, z, size, 28)
    y, slope = _activated(activation, z)
    x, filters = tf.constant(data.x), sparse_conv.SparseKernel.from_dense(data.kernel)
    bias = tf.constant(data.bias)
    sources = [x, filters.values, bias]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        result = ours.conv2d(
            x, filters, **call.options, bias=bias, activation=activation
        )
    # No slope of these functions exceeds 1.13.
    y_bound = 1.2 * z_bound + 8 * unit * np.abs(y) + unit
    assert_within(result.numpy(), y, y_bound, "y")
    gradients = tape.gradient(result, sources, output_gradients=tf.constant(data.dy))
    # Where a kink lies within the error of z, either slope is right; here is none.
    assert activation not in ("relu", "leaky_relu") or (np.abs(z) > z_bound).all()
    dz = dy * slope
    dz_bound = 16 * unit * np.abs(dy) + np.abs(dy) * z_bound
    for gradient, function, other in (
        (gradients[0], dgrad_reference, (dz, kernel)),
        (gradients[1], wgrad_reference, (np.asarray(data.x, np.float64), dz)),
    ):
        expected = function(*other, problem)
        left, right = (np.abs(a) for a in other)
        of_input = function is dgrad_reference
        operands = (dz_bound, right) if of_input else (left, dz_bound)
        bound = error_bound(dtype, expected, function(left, right, problem), 200)
        bound = bound + function(*operands, problem)
        if function is wgrad_reference:
            expected, bound = canonical(expected, kernel), canonical(bound, kernel)
        assert_within(gradient.numpy(), expected, bound, function.__name__)
    axes = (0, 1, 2) if nhwc else (0, 2, 3)
    expected = dz.sum(axes)
    bound = error_bound(dtype, expected, np.abs(dz).sum(axes), 40) + dz_bound.sum(axes)
    assert_within(gradients[2].numpy(), expected, bound, "bias gradient")


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_nan_passes_through_activations(backend, activation):
    x = np.full((1, 2, 2, 1), np.nan, np.float32)
    kernel = np.ones((1, 1, 1, 3), np.float32)
    y = ours.conv2d(x, kernel, 1, "SAME", activation=activation)
    assert np.isnan(y.numpy()).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_activations_of_huge_values(backend, activation, dtype):
    large = [-np.inf, -60000.0, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 60000.0, np.inf]
    x = np.array(large, numpy_dtype(dtype)).reshape(1, 2, 5, 1)
    kernel = np.ones((1, 1, 1, 1), x.dtype)
    y = ours.conv2d(x, kernel, 1, "SAME", activation=activation).numpy()
    expected, _ = _activated(activation, x.astype(np.float64))
    # swish and gelu of -inf are NaN in some of TensorFlow's kernels, 0 in the limit.
    same = np.isfinite(x.astype(np.float64))
    unit = error_bound(dtype, np.ones(1), np.zeros(1), 0)
    bound = 8 * unit * np.abs(expected[same]) + unit
    assert_within(y[same], expected[same], bound, activation)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_int32_activations(backend, activation):
    call = Call((2, 5, 5, 3), (3, 3, 3, 4), dtype="int32", bias=True)
    data = make_data(call)
    filters = tf.constant(data.kernel)
    plain = ours.conv2d(data.x, filters, **call.options, bias=data.bias)
    y = ours.conv2d(
        data.x, filters, **call.options, bias=data.bias, activation=activation
    )
    largest = 6 if activation == "relu6" else None
    np.testing.assert_array_equal(y.numpy(), np.clip(plain.numpy(), 0, largest))


def test_activation_may_be_a_function(backend):
    call = Call((2, 5, 5, 3), (3, 3, 3, 4), bias=True)
    data = make_data(call)
    x = tf.constant(data.x)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        plain = ours.conv2d(x, data.kernel, 1, "SAME", bias=data.bias)
        expected = tf.math.softplus(plain)
        y = ours.conv2d(
            x, data.kernel, 1, "SAME", bias=data.bias, activation=tf.math.softplus
        )
    np.testing.assert_array_equal(y.numpy(), expected.numpy())
    np.testing.assert_array_equal(
        tape.gradient(y, x).numpy(), tape.gradient(expected, x).numpy()
    )


@pytest.mark.parametrize("kind", ["tensor", "tf.Variable", "keras", "numpy"])
def test_kinds_of_dense_filters(backend, kind):
    import keras

    call = Call((2, 5, 5, 3), (3, 3, 3, 4), integers=True)
    data = make_data(call)
    make = {
        "tensor": tf.constant,
        "tf.Variable": tf.Variable,
        "keras": keras.Variable,
        "numpy": lambda array: array,
    }[kind]
    y = ours.conv2d(data.x, make(data.kernel), 1, "SAME")
    expected = conv2d_reference(data.x, data.kernel, call.problem)
    np.testing.assert_array_equal(y.numpy(), expected)


def test_input_may_be_a_variable(backend):
    call = Call((2, 5, 5, 3), (3, 3, 3, 4), integers=True)
    data = make_data(call)
    x = tf.Variable(data.x)
    with tf.GradientTape() as tape:
        y = ours.conv2d(x, data.kernel, 1, "SAME")
    expected = conv2d_reference(data.x, data.kernel, call.problem)
    np.testing.assert_array_equal(y.numpy(), expected)
    dx = dgrad_reference(np.ones_like(expected), data.kernel, call.problem)
    np.testing.assert_array_equal(tape.gradient(y, x).numpy(), dx)


@pytest.mark.parametrize("change", ["assign", "assign_add", "scatter"])
def test_assignment_to_a_variable_is_seen(backend, change):
    call = Call((2, 5, 5, 3), (3, 3, 3, 4), integers=True)
    data = make_data(call)
    kernel = tf.Variable(data.kernel)
    ours.conv2d(data.x, kernel, 1, "SAME")
    # Nonzeros appear where there were none, so the pattern must change too.
    other = np.roll(data.kernel, 1, axis=0) + 1
    if change == "assign":
        kernel.assign(other)
    elif change == "assign_add":
        kernel.assign_add(other - data.kernel)
    else:
        kernel.scatter_nd_update([[0], [1], [2]], other)
    y = ours.conv2d(data.x, kernel, 1, "SAME")
    expected = conv2d_reference(data.x, other, call.problem)
    np.testing.assert_array_equal(y.numpy(), expected)


@pytest.mark.parametrize("which", ["input", "filters", "bias"])
def test_change_of_an_array_in_place_is_seen(backend, which):
    call = Call((2, 5, 5, 3), (3, 3, 3, 4), integers=True, bias=True)
    data = make_data(call)
    first = ours.conv2d(data.x, data.kernel, 1, "SAME", bias=data.bias)
    before = first.numpy().copy()
    array = {"input": data.x, "filters": data.kernel, "bias": data.bias}[which]
    array[...] = np.roll(array, 1, axis=0) + 1
    y = ours.conv2d(data.x, data.kernel, 1, "SAME", bias=data.bias)
    expected = conv2d_reference(data.x, data.kernel, call.problem) + data.bias
    np.testing.assert_array_equal(y.numpy(), expected)
    # Nor may the change reach into a result that was already there.
    np.testing.assert_array_equal(first.numpy(), before)


@given(call=calls(), seed=st.integers(0, 2**32 - 1))
def test_operands_are_left_alone(backend, call, seed):
    data = make_data(replace(call, seed=seed))
    before = [a.copy() for a in (data.x, data.kernel, data.dy)]
    compute(call, data)
    for array, copy in zip((data.x, data.kernel, data.dy), before, strict=True):
        assert array.tobytes() == copy.tobytes()


def test_name_is_accepted(backend):
    data = make_data(Call((2, 5, 5, 3), (3, 3, 3, 4)))
    named = ours.conv2d(data.x, data.kernel, 1, "SAME", "NHWC", None, "conv")
    plain = ours.conv2d(data.x, data.kernel, 1, "SAME")
    assert named.numpy().tobytes() == plain.numpy().tobytes()


def test_backend_may_be_forced(backend):
    data = make_data(Call((2, 5, 5, 3), (3, 3, 3, 4)))
    y = ours.conv2d(data.x, data.kernel, 1, "SAME", backend=backend.name)
    plain = ours.conv2d(data.x, data.kernel, 1, "SAME")
    assert y.numpy().tobytes() == plain.numpy().tobytes()
    assert backend.device.strip("/") in y.device.replace("device:", "")
