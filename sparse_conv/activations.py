"""The activation functions that `conv2d` fuses into a back end's epilogue.

Knows their names, their codes, TensorFlow's function for each, and its gradient. Does
not know how a back end computes them: `kernels/epilogue.cuh` and the CPU's loops do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

LEAKY_RELU_ALPHA = 0.2  # The default of tf.nn.leaky_relu.


@dataclass(frozen=True, slots=True)
class Activation:
    """One fused activation.

    Attributes:
        name: The name by which a user asks for it.
        code: Its number in the back ends' epilogues.
        function: TensorFlow's function.
        gradient: From the output's gradient and the output, the gradient before the
            activation; None where the output does not determine it.
        integer: Whether it is defined for int32.
    """

    name: str
    code: int
    function: Callable[[tf.Tensor], tf.Tensor]
    gradient: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None
    integer: bool = False


def _leaky_relu_gradient(dy: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    return tf.raw_ops.LeakyReluGrad(gradients=dy, features=y, alpha=LEAKY_RELU_ALPHA)


LINEAR = Activation("linear", 0, lambda y: y, lambda dy, y: dy, integer=True)

_FUSED = (
    LINEAR,
    Activation(
        "relu",
        1,
        tf.nn.relu,
        lambda dy, y: tf.raw_ops.ReluGrad(gradients=dy, features=y),
        integer=True,
    ),
    Activation(
        "relu6",
        2,
        tf.nn.relu6,
        lambda dy, y: tf.raw_ops.Relu6Grad(gradients=dy, features=y),
        integer=True,
    ),
    Activation("leaky_relu", 3, tf.nn.leaky_relu, _leaky_relu_gradient),
    Activation(
        "elu",
        4,
        tf.nn.elu,
        lambda dy, y: tf.raw_ops.EluGrad(gradients=dy, outputs=y),
    ),
    Activation(
        "sigmoid", 5, tf.nn.sigmoid, lambda dy, y: tf.raw_ops.SigmoidGrad(y=y, dy=dy)
    ),
    Activation("tanh", 6, tf.nn.tanh, lambda dy, y: tf.raw_ops.TanhGrad(y=y, dy=dy)),
    Activation("gelu", 7, lambda y: tf.nn.gelu(y, approximate=False), None),
    Activation("swish", 8, tf.nn.swish, None),
)

_BY_NAME = {activation.name: activation for activation in _FUSED}


def get(activation: Any) -> Activation | Callable[[tf.Tensor], tf.Tensor]:
    """The fused activation of that name, or the callable itself.

    Args:
        activation: None, a name, or a callable.

    Returns:
        An Activation, or the callable, which then runs behind the convolution.

    Raises:
        ValueError: No activation has that name.
        TypeError: `activation` is neither None, a name nor a callable.
    """
    if activation is None:
        return LINEAR
    if isinstance(activation, str):
        if activation not in _BY_NAME:
            raise ValueError(
                f"`activation` must be one of {', '.join(sorted(_BY_NAME))}, "
                f"or a callable. Received: activation={activation!r}"
            )
        return _BY_NAME[activation]
    if not callable(activation):
        raise TypeError(
            "`activation` must be None, a name or a callable. "
            f"Received: activation={activation!r}"
        )
    return activation
