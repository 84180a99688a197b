"""TensorFlow's own convolution on the dense kernel, as an algorithm beside ours.

Serves eager calls, graphs, and SavedModels. It computes at the precision that
TensorFlow is set to, and visits every weight, zero or not. Knows what TensorFlow can't
compute, and where to keep the dense kernel of a SparseKernel. Has no say in when it is
used.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from sparse_conv import costs, host_memory
from sparse_conv.activations import LINEAR, Activation
from sparse_conv.bridge import HOST, Place, at, shape_tensor
from sparse_conv.costs import Estimate, Machine
from sparse_conv.costs.terms import dense_terms
from sparse_conv.pattern import Pattern
from sparse_conv.problem import INT32_MAX, Geometry, Problem
from sparse_conv.tensor_cache import cached
from sparse_conv.tf_internals import EagerTensor, captured_tensor, operation

ELSEWHERE = "a back end was asked for that computes elsewhere than the tensors live"

# To a multiple of so many channels, cuDNN's time grows in steps.
_GPU_LANES = 32


def reason_against(
    pass_name: str, problem: Problem, dtype: tf.DType, place: Place
) -> str | None:
    """Why TensorFlow can't compute a pass at `place`; None if it can."""
    if 0 in (*problem.input_shape, *problem.output_shape):
        return "TensorFlow's convolution needs extents above 0"
    sizes = (problem.input_shape, problem.output_shape)
    if max(math.prod(shape) for shape in sizes) > INT32_MAX:
        return "TensorFlow's convolution takes tensors of at most 2^31 - 1 elements"
    if place.kind == "GPU":
        if dtype == tf.int32:
            return "TensorFlow keeps int32 tensors in host memory"
        return None
    if problem.data_format != "NHWC":
        return "TensorFlow's convolution takes nothing but NHWC on CPUs"
    if dtype.size == 2 and not _computes_on_cpu(dtype):
        return f"TensorFlow's convolution of {dtype.name} fails on this CPU"
    if pass_name == "fprop":
        return None
    if dtype == tf.int32:
        return "int32 has no gradients"
    if problem.groups > 1:
        return "TensorFlow has no gradients of grouped convolutions on CPUs"
    if (problem.dilation_h, problem.dilation_w) != (1, 1):
        return "TensorFlow has no gradients of dilated convolutions on all CPUs"
    return None


@functools.cache
def _computes_on_cpu(dtype: tf.DType) -> bool:
    """Whether this CPU has what TensorFlow needs for a dtype of 16 bits; it may not."""
    with tf.init_scope(), tf.device(HOST.device):
        x = tf.zeros((1, 1, 1, 1), dtype)
        try:
            tf.raw_ops.Conv2D(input=x, filter=x, strides=[1] * 4, padding="VALID")
        except tf.errors.OpError:
            return False
    return True


@functools.lru_cache(maxsize=4096)
def estimate(
    pass_name: str,
    problem: Problem,
    dtype: tf.DType,
    place: Place,
    machine: Machine,
    *,
    tf32: bool,
) -> Estimate:
    """What TensorFlow's convolution is expected to cost.

    Args:
        pass_name: "fprop", "dgrad" or "wgrad".
        problem: The sizes.
        dtype: Of the operands.
        place: Where they live.
        machine: What a back end computes with; elsewhere than at `place` if a back end
            was asked for that copies.
        tf32: Whether float32 is computed in TF32 on GPUs.

    Returns:
        The estimate for "dense".
    """
    reason = reason_against(pass_name, problem, dtype, place)
    on_gpu = place.kind == "GPU"
    if reason is None and on_gpu != machine.kind.startswith("cuda"):
        reason = ELSEWHERE
    if reason is not None:
        return Estimate("dense", None, reason)
    amounts = terms(pass_name, problem, dtype, machine)
    if not on_gpu:
        predicted = costs.microseconds(machine, f"dense {pass_name}", amounts)
        predicted *= costs.dtype_factor(machine, "dense", dtype.name)
        return Estimate("dense", predicted, "TensorFlow's convolution")
    precision = "tf32" if tf32 and dtype == tf.float32 else dtype.name
    model = f"dense {pass_name} {precision}"
    predicted = costs.microseconds(machine, model, amounts)
    return Estimate("dense", predicted, f"TensorFlow's convolution in {precision}")


def terms(
    pass_name: str, problem: Problem, dtype: tf.DType, machine: Machine
) -> dict[str, float]:
    """The amounts that the model of a pass weighs."""
    lanes = _GPU_LANES if machine.kind.startswith("cuda") else machine.lanes
    return dense_terms(pass_name, problem, dtype.size, machine, lanes)


def fprop(
    problem: Problem,
    dtype: tf.DType,
    place: Place,
    pattern: Pattern | None,
    *,
    activation: Activation,
    shape: tuple[int, ...],
) -> Callable[..., tf.Tensor]:
    """The forward pass on eager tensors; see `sparse_conv.backends` for what it is."""
    del dtype
    compute = _fprop_operation(problem, activation, shape)
    kernel_of = _kernels(pattern, place)

    def run(x: tf.Tensor, w: tf.Tensor, bias: tf.Tensor | None = None) -> tf.Tensor:
        return compute(x, kernel_of(w), bias)

    return _on_device(place, run)


def dgrad(
    problem: Problem,
    dtype: tf.DType,
    place: Place,
    pattern: Pattern | None,
    *,
    shape: tuple[int, ...],
) -> Callable[..., tf.Tensor]:
    """The gradient to the input on eager tensors."""
    del dtype
    compute = _dgrad_operation(problem, shape)
    kernel_of = _kernels(pattern, place)

    def run(dy: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
        return compute(dy, kernel_of(w))

    return _on_device(place, run)


def wgrad(
    problem: Problem, dtype: tf.DType, place: Place, pattern: Pattern | None
) -> Callable[..., tf.Tensor]:
    """The gradient to the values, or to the dense kernel, on eager tensors."""
    del dtype
    compute = _wgrad_operation(problem)

    def run(x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        dw = compute(x, dy)
        return dw if pattern is None else _at_nonzeros(dw, pattern, place)

    return _on_device(place, run)


def graph_fprop(
    problem: Problem,
    place: Place,
    pattern: Pattern | None,
    operands: list[tf.Tensor],
    activation: Activation,
    shape: tuple[int, ...],
) -> tf.Tensor:
    """The forward pass as operations of the graph that is being built."""
    x, w, *bias = operands
    compute = _fprop_operation(problem, activation, shape)
    return compute(x, _graph_kernel(w, pattern, place), *bias)


def graph_dgrad(
    problem: Problem,
    place: Place,
    pattern: Pattern | None,
    operands: list[tf.Tensor],
    shape: tuple[int, ...],
) -> tf.Tensor:
    """The gradient to the input as operations of a graph."""
    dy, w = operands
    return _dgrad_operation(problem, shape)(dy, _graph_kernel(w, pattern, place))


def graph_wgrad(
    problem: Problem, place: Place, pattern: Pattern | None, operands: list[tf.Tensor]
) -> tf.Tensor:
    """The gradient to the values or to the dense kernel as operations of a graph."""
    dw = _wgrad_operation(problem)(*operands)
    return dw if pattern is None else _at_nonzeros(dw, pattern, place)


def convolve(
    geometry: Geometry,
    x: tf.Tensor,
    kernel: tf.Tensor,
    bias: tf.Tensor | None,
    activation: Activation,
) -> tf.Tensor:
    """The forward pass for shapes that may be unknown, as a SavedModel has them.

    TensorFlow differentiates it by itself.
    """
    padding = geometry.padding
    if not isinstance(padding, str):
        padding = _outer_first(geometry.data_format, *padding)
    y = tf.nn.conv2d(
        x,
        kernel,
        geometry.strides,
        padding,
        geometry.data_format,
        geometry.dilations,
    )
    return _finished(y, bias, activation, geometry.data_format)


def _on_device(place: Place, run: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    """`run` where the operands live; what TensorFlow does anyway without a GPU."""
    if not tf.config.list_logical_devices("GPU"):
        return run

    def placed(*operands: tf.Tensor) -> tf.Tensor:
        with at(place):
            return run(*operands)

    return placed


def kernel_of(w: tf.Tensor, pattern: Pattern | None, place: Place) -> tf.Tensor:
    """The dense kernel of an eager operand `w`, made once for each tensor of values."""
    return _kernels(pattern, place)(w)


def _kernels(pattern: Pattern | None, place: Place) -> Callable[[tf.Tensor], tf.Tensor]:
    """`kernel_of` for one pattern and place."""
    if pattern is None:
        return lambda w: w
    # One tensor may hold the values of several patterns.
    key = ("dense", weakref.ref(pattern), place)
    # On a GPU, since TensorFlow may scatter on another device than it was asked to.
    copied = tf.identity if place.kind == "GPU" else host_memory.copied

    def kernel_of(w: tf.Tensor) -> tf.Tensor:
        return cached(w, key, lambda: copied(_scatter(w, pattern, place)))

    return kernel_of


def _graph_kernel(w: tf.Tensor, pattern: Pattern | None, place: Place) -> tf.Tensor:
    """The dense kernel in a graph; of values that never change, made outside of it."""
    if pattern is None:
        return w
    known = captured_tensor(w)
    if isinstance(known, EagerTensor):
        with tf.init_scope(), tf.device(place.device):
            return kernel_of(known, pattern, place)
    return _scatter(w, pattern, place)


def _scatter(w: tf.Tensor, pattern: Pattern, place: Place) -> tf.Tensor:
    shape = pattern.shape
    flat = tf.scatter_nd(
        _positions(pattern, place)[:, tf.newaxis],
        w,
        tf.constant([math.prod(shape)], tf.int64),
    )
    return tf.reshape(flat, shape)


def _at_nonzeros(dw: tf.Tensor, pattern: Pattern, place: Place) -> tf.Tensor:
    return tf.gather(tf.reshape(dw, [-1]), _positions(pattern, place))


def _positions(pattern: Pattern, place: Place) -> tf.Tensor:
    """Each nonzero's place in the flat HWIO kernel, as a tensor at `place`."""

    def build() -> tf.Tensor:
        with tf.init_scope(), tf.device(place.device):
            return tf.identity(tf.constant(pattern.positions(), tf.int64))

    return pattern.cached(("dense", place), build)


def _attributes(problem: Problem) -> dict[str, Any]:
    """The attributes of TensorFlow's three operations that aren't their defaults."""
    nhwc = problem.data_format == "NHWC"

    def spatial(height: int, width: int) -> list[int]:
        return [1, height, width, 1] if nhwc else [1, 1, height, width]

    attributes = {"strides": spatial(problem.stride_h, problem.stride_w)}
    dilations = (problem.dilation_h, problem.dilation_w)
    if dilations != (1, 1):
        attributes["dilations"] = spatial(*dilations)
    if not nhwc:
        attributes["data_format"] = problem.data_format
    return attributes | _padding(problem)


def _padding(problem: Problem) -> dict[str, Any]:
    """The padding by name where it has one: explicit padding is slower on CPUs."""
    p = problem
    axes = (
        (p.h, p.p, (p.r - 1) * p.dilation_h + 1, p.stride_h, p.pad_top),
        (p.w, p.q, (p.s - 1) * p.dilation_w + 1, p.stride_w, p.pad_left),
    )
    if all(_is_same(*axis) for axis in axes):
        return {"padding": "SAME"}
    pairs = [
        (pad, max(0, (outputs - 1) * stride + taps - inputs - pad))
        for inputs, outputs, taps, stride, pad in axes
    ]
    if not any(map(any, pairs)):
        return {"padding": "VALID"}
    pads = _outer_first(p.data_format, *pairs)
    return {
        "padding": "EXPLICIT",
        "explicit_paddings": [size for pair in pads for size in pair],
    }


def _is_same(inputs: int, outputs: int, taps: int, stride: int, pad: int) -> bool:
    total = max((outputs - 1) * stride + taps - inputs, 0)
    return outputs == -(-inputs // stride) and pad == total // 2


def _outer_first(
    data_format: str, vertical: tuple[int, int], horizontal: tuple[int, int]
) -> list[tuple[int, int]]:
    """Explicit padding of all four dimensions."""
    none = (0, 0)
    if data_format == "NHWC":
        return [none, vertical, horizontal, none]
    return [none, none, vertical, horizontal]


def _fprop_operation(
    problem: Problem, activation: Activation, shape: tuple[int, ...]
) -> Callable[..., tf.Tensor]:
    conv2d = operation("Conv2D", _attributes(problem))
    folds = len(shape) != 4

    def compute(
        x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None = None
    ) -> tf.Tensor:
        if folds:
            x = tf.reshape(x, problem.input_shape)
        y = conv2d(input=x, filter=kernel)
        y = _finished(y, bias, activation, problem.data_format)
        return tf.reshape(y, shape) if folds else y

    return compute


def _finished(
    y: tf.Tensor, bias: tf.Tensor | None, activation: Activation, data_format: str
) -> tf.Tensor:
    if bias is not None:
        y = tf.nn.bias_add(y, bias, data_format)
    return y if activation is LINEAR else activation.function(y)


def _dgrad_operation(
    problem: Problem, shape: tuple[int, ...]
) -> Callable[..., tf.Tensor]:
    conv2d_input = operation("Conv2DBackpropInput", _attributes(problem))
    folds = len(shape) != 4

    def compute(dy: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        if folds:
            dy = tf.reshape(dy, problem.output_shape)
        dx = conv2d_input(
            input_sizes=shape_tensor(problem.input_shape),
            filter=kernel,
            out_backprop=dy,
        )
        return tf.reshape(dx, shape) if folds else dx

    return compute


def _wgrad_operation(problem: Problem) -> Callable[..., tf.Tensor]:
    conv2d_filter = operation("Conv2DBackpropFilter", _attributes(problem))

    def compute(x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        if x.shape.rank != 4:
            x = tf.reshape(x, problem.input_shape)
            dy = tf.reshape(dy, problem.output_shape)
        return conv2d_filter(
            input=x,
            filter_sizes=shape_tensor(problem.kernel_shape),
            out_backprop=dy,
        )

    return compute
