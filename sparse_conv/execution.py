"""One pass, run: straight away on eager tensors, by `tf.py_function` in a graph.

Knows how to find the back end and what a graph needs to know beforehand. Knows nothing
of gradients, and nothing of what a back end does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import tensorflow as tf

from sparse_conv import backends
from sparse_conv.activations import Activation
from sparse_conv.bridge import Place, place_of
from sparse_conv.graph import call_in_graph
from sparse_conv.pattern import Pattern
from sparse_conv.problem import Geometry, Problem, infer_output_shape, make_problem

# A tuple where it is known while a graph is built, else an int32 tensor.
Shape = Any


@dataclass(frozen=True, eq=False, slots=True)
class Convolution:
    """What stays the same over the passes of one call of `conv2d`.

    Attributes:
        geometry: Strides, padding, dilations and layout.
        pattern: The kernel's pattern; None when the kernel is dense.
        backend: The back end asked for; None to choose.
    """

    geometry: Geometry
    pattern: Pattern | None
    backend: str | None

    def kernel_shape(self, w_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """The dense kernel's shape, given the shape of its values or of itself."""
        return tuple(w_shape) if self.pattern is None else self.pattern.shape

    def problem(self, input_shape: Sequence[int], w_shape: Sequence[int]) -> Problem:
        """The Problem for an input of that shape."""
        return make_problem(
            tuple(input_shape), self.kernel_shape(w_shape), self.geometry
        )

    def output_shape(self, input_shape: tuple[int, ...], problem: Problem):
        """The output's shape with all the batch dimensions of the input."""
        return (*input_shape[:-3], *problem.output_shape[1:])


def fprop(
    convolution: Convolution,
    x: tf.Tensor,
    w: tf.Tensor,
    bias: tf.Tensor | None,
    activation: Activation,
) -> tf.Tensor:
    """The forward pass; see `autodiff.fprop` for the arguments."""
    if not tf.executing_eagerly():
        return _graph_fprop(convolution, x, w, bias, activation)
    input_shape = tuple(x.shape)
    problem = convolution.problem(input_shape, w.shape)
    shape = convolution.output_shape(input_shape, problem)
    backend, place, (x, w, bias) = _prepare(convolution, x, w, bias)
    if _is_empty(shape):
        return _zeros(shape, x.dtype, place)
    if _is_empty(input_shape) or _is_empty(w.shape):
        return _without_products(convolution, shape, x.dtype, place, bias, activation)
    return backend.fprop(
        problem, x, w, convolution.pattern, bias, activation.code, shape
    )


def dgrad(
    convolution: Convolution, input_shape: Shape, dy: tf.Tensor, w: tf.Tensor
) -> tf.Tensor:
    """The gradient to the input; see `autodiff.dgrad` for the arguments."""
    if not tf.executing_eagerly():
        return _graph_dgrad(convolution, input_shape, dy, w)
    problem = convolution.problem(input_shape, w.shape)
    backend, place, (dy, w) = _prepare(convolution, dy, w)
    if _is_empty(input_shape) or _is_empty(dy.shape) or _is_empty(w.shape):
        return _zeros(input_shape, dy.dtype, place)
    return backend.dgrad(problem, dy, w, convolution.pattern, input_shape)


def wgrad(
    convolution: Convolution, x: tf.Tensor, dy: tf.Tensor, kernel_shape: Shape
) -> tf.Tensor:
    """The gradient to the kernel; see `autodiff.wgrad` for the arguments."""
    if not tf.executing_eagerly():
        return _graph_wgrad(convolution, x, dy, kernel_shape)
    problem = convolution.problem(tuple(x.shape), kernel_shape)
    backend, place, (x, dy) = _prepare(convolution, x, dy)
    if _is_empty(kernel_shape) or _is_empty(x.shape) or _is_empty(dy.shape):
        return _zeros(kernel_shape, x.dtype, place)
    return backend.wgrad(problem, x, dy, convolution.pattern)


def _prepare(
    convolution: Convolution, *tensors: tf.Tensor | None
) -> tuple[ModuleType, Place, Sequence[tf.Tensor | None]]:
    """The back end for these operands, and the operands brought to one place."""
    place = place_of(tensors[0])
    if any(t is not None and place_of(t) is not place for t in tensors):
        place = _common_place(tensors)
        with tf.device(place.device):
            tensors = [t if t is None else tf.identity(t) for t in tensors]
    backend = backends.select(place, tensors[0].dtype, convolution.backend)
    return backend, place, tensors


def _common_place(tensors: Sequence[tf.Tensor | None]) -> Place:
    """The one GPU among the operands' places.

    As TensorFlow's own operations do, an operand in host memory follows the others to
    the GPU where they are.
    """
    gpus = {place_of(t) for t in tensors if t is not None}
    gpus = sorted(place for place in gpus if place.kind == "GPU")
    if len(gpus) > 1:
        raise ValueError(
            "All operands must be on the same GPU, or in host memory. "
            f"Received: operands on {' and '.join(place.device for place in gpus)}"
        )
    return gpus[0]


def _is_empty(shape: Sequence[int]) -> bool:
    return 0 in tuple(shape)


def _zeros(shape: Sequence[int], dtype: tf.DType, place: Place) -> tf.Tensor:
    with tf.device(place.device):
        return tf.zeros(tuple(shape), dtype)


def _without_products(
    convolution: Convolution,
    shape: tuple[int, ...],
    dtype: tf.DType,
    place: Place,
    bias: tf.Tensor | None,
    activation: Activation,
) -> tf.Tensor:
    """The output of a convolution that has no nonzero weight or no input."""
    with tf.device(place.device):
        y = tf.zeros(shape, dtype)
        if bias is not None:
            channels = -1 if convolution.geometry.data_format == "NHWC" else -3
            aligned = [1] * len(shape)
            aligned[channels] = shape[channels]
            y += tf.reshape(bias, aligned)
        return activation.function(y)


def _graph_fprop(
    convolution: Convolution,
    x: tf.Tensor,
    w: tf.Tensor,
    bias: tf.Tensor | None,
    activation: Activation,
) -> tf.Tensor:
    def run(x: tf.Tensor, w: tf.Tensor, bias: tf.Tensor | None = None) -> tf.Tensor:
        return fprop(convolution, x, w, bias, activation)

    shape = None
    if x.shape.rank is not None and w.shape.rank is not None:
        kernel_shape = convolution.kernel_shape(w.shape.as_list())
        shape = infer_output_shape(
            x.shape.as_list(), kernel_shape, convolution.geometry
        )
    operands = [x, w] if bias is None else [x, w, bias]
    return call_in_graph(run, operands, x.dtype, shape)


def _graph_dgrad(
    convolution: Convolution, input_shape: Shape, dy: tf.Tensor, w: tf.Tensor
) -> tf.Tensor:
    def run(dy: tf.Tensor, w: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
        return dgrad(convolution, tuple(shape.numpy().tolist()), dy, w)

    return call_in_graph(run, [dy, w, input_shape], dy.dtype, _static(input_shape))


def _graph_wgrad(
    convolution: Convolution, x: tf.Tensor, dy: tf.Tensor, kernel_shape: Shape
) -> tf.Tensor:
    def run(x: tf.Tensor, dy: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
        return wgrad(convolution, x, dy, tuple(shape.numpy().tolist()))

    return call_in_graph(run, [x, dy, kernel_shape], x.dtype, _static(kernel_shape))


def _static(shape: Shape) -> Sequence[int | None] | None:
    """What is known of a shape while a graph is built."""
    return shape if isinstance(shape, tuple) else None
