"""The three passes as differentiable operations, of any order.

Each pass is linear in both of its operands, and its gradients are the other two passes,
so derivatives of every order come from three rules. An operation is recorded on the
tapes only when one is active, and a gradient is computed only for operands that a tape
follows. Knows tapes and custom gradients; knows no back end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import tensorflow as tf

from sparse_conv import execution, graph_execution
from sparse_conv.activations import LINEAR, Activation
from sparse_conv.convolution import Convolution
from sparse_conv.graph_execution import RuntimeShape, Shape
from sparse_conv.tf_internals import (
    could_possibly_record,
    needs_gradient,
    record_operation,
    stop_recording,
)

# From an operation's operands, its output, the gradient of the output, and which of the
# operands need theirs: the gradients of the operands. It must use no other tensor: in a
# graph, another one may be out of scope when a gradient is differentiated again.
Gradients = Callable[
    [Sequence[tf.Tensor], tf.Tensor, tf.Tensor, Sequence[bool]], list[Any]
]


def fprop(
    convolution: Convolution,
    x: tf.Tensor,
    w: tf.Tensor,
    bias: tf.Tensor | None = None,
    activation: Activation = LINEAR,
) -> tf.Tensor:
    """The forward pass, with bias and activation fused into it.

    Args:
        convolution: What is convolved, how and where.
        x: The input, at least four-dimensional.
        w: (nnz,) values of the pattern, or the dense HWIO kernel.
        bias: (K,) tensor or None.
        activation: The fused activation.

    Returns:
        The output.
    """
    if not could_possibly_record() and tf.executing_eagerly():
        return execution.fprop(convolution, x, w, bias, activation)
    if activation.gradient is None and x.dtype.is_floating:
        # Its gradient needs what goes into it, so TensorFlow applies and records it.
        return activation.function(fprop(convolution, x, w, bias))

    def compute(x: tf.Tensor, w: tf.Tensor, bias: tf.Tensor | None = None) -> tf.Tensor:
        return _passes().fprop(convolution, x, w, bias, activation)

    def gradients(
        operands: Sequence[tf.Tensor],
        y: tf.Tensor,
        dy: tf.Tensor,
        needed: Sequence[bool],
    ) -> list[Any]:
        x, w = operands[:2]
        dz = activation.gradient(dy, y)
        return [
            dgrad(convolution, _shape(x), dz, w) if needed[0] else None,
            wgrad(convolution, x, dz, _shape(w)) if needed[1] else None,
            _bias_gradient(convolution, dz) if needed[-1] else None,
        ][: len(needed)]

    operands = [x, w] if bias is None else [x, w, bias]
    return _differentiable("SparseConv2D", compute, gradients, operands)


def dgrad(
    convolution: Convolution, input_shape: Shape, dy: tf.Tensor, w: tf.Tensor
) -> tf.Tensor:
    """The gradient to the input, which has the shape `input_shape`."""

    def compute(dy: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
        return _passes().dgrad(convolution, input_shape, dy, w)

    def gradients(
        operands: Sequence[tf.Tensor],
        _: tf.Tensor,
        ddx: tf.Tensor,
        needed: Sequence[bool],
    ) -> list[Any]:
        dy, w = operands
        return [
            fprop(convolution, ddx, w) if needed[0] else None,
            wgrad(convolution, ddx, dy, _shape(w)) if needed[1] else None,
        ]

    return _differentiable("SparseConv2DInputGradient", compute, gradients, [dy, w])


def wgrad(
    convolution: Convolution, x: tf.Tensor, dy: tf.Tensor, kernel_shape: Shape
) -> tf.Tensor:
    """The gradient to the values of the pattern, or to the dense HWIO kernel."""

    def compute(x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        return _passes().wgrad(convolution, x, dy, kernel_shape)

    def gradients(
        operands: Sequence[tf.Tensor],
        _: tf.Tensor,
        ddw: tf.Tensor,
        needed: Sequence[bool],
    ) -> list[Any]:
        x, dy = operands
        return [
            dgrad(convolution, _shape(x), dy, ddw) if needed[0] else None,
            fprop(convolution, x, ddw) if needed[1] else None,
        ]

    return _differentiable("SparseConv2DKernelGradient", compute, gradients, [x, dy])


def _differentiable(
    name: str,
    compute: Callable[..., tf.Tensor],
    gradients: Gradients,
    operands: list[tf.Tensor],
) -> tf.Tensor:
    """Computes an operation and records it on the tapes that follow its operands."""
    with stop_recording():
        if tf.executing_eagerly():
            y = compute(*operands)
        else:
            y = _with_graph_gradient(compute, gradients)(*operands)
    if not could_possibly_record() or not operands[0].dtype.is_floating:
        return y
    needed = [needs_gradient(operand) for operand in operands]
    if any(needed):

        def backward(dy: Any) -> list[Any]:
            return gradients(operands, y, tf.convert_to_tensor(dy), needed)

        record_operation(name, [y], operands, backward)
    return y


def _with_graph_gradient(
    compute: Callable[..., tf.Tensor], gradients: Gradients
) -> Callable[..., tf.Tensor]:
    """`compute` with the gradient that `tf.gradients` finds in a graph.

    It serves what differentiates a finished graph, such as a tape outside of a
    `tf.function`; tapes inside are served by the recorded operation.
    """

    @tf.custom_gradient
    def operation(*operands: tf.Tensor):
        # Tensors of this very graph, even if the operands come from an outer one.
        operands = [tf.identity(operand) for operand in operands]
        y = compute(*operands)

        def gradient(dy: tf.Tensor) -> list[tf.Tensor]:
            return gradients(operands, y, dy, [True] * len(operands))

        return y, gradient

    return operation


def _passes() -> ModuleType:
    """What computes a pass: at once, or as a node of the graph under construction."""
    return execution if tf.executing_eagerly() else graph_execution


def _shape(tensor: tf.Tensor) -> Shape:
    """The tensor's shape, as a tuple where it is known."""
    if tensor.shape.is_fully_defined():
        return tuple(tensor.shape)
    return RuntimeShape(tf.shape(tensor), tensor.shape)


def _bias_gradient(convolution: Convolution, dz: tf.Tensor) -> tf.Tensor:
    """The sum over all but the channels, which half and bfloat16 take in float32."""
    wide = tf.cast(dz, tf.float32) if dz.dtype.size == 2 else dz
    if convolution.geometry.data_format == "NCHW":
        wide = tf.reduce_sum(wide, axis=(-2, -1))
    sums = tf.reduce_sum(tf.reshape(wide, [-1, tf.shape(wide)[-1]]), axis=0)
    return tf.cast(sums, dz.dtype)
