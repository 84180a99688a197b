"""A Python function as a node of a TensorFlow graph, and what that can't do.

XLA can't compile such a node and a SavedModel can't hold it; both get a clear error
here. Knows nothing of convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from sparse_conv.tf_internals import in_xla_context, stop_recording

_SAVING_ERROR = (
    "A SavedModel can't hold a sparse convolution, which runs as a Python function. "
    "Save the tf.function instead of a concrete function of it: it is then traced "
    "anew, with a dense convolution. Received: a function that was traced for calls."
)


def call_in_graph(
    function: Callable[..., tf.Tensor],
    operands: Sequence[Any],
    dtype: tf.DType,
    shape: Sequence[int | None] | None,
    device: str | None,
) -> tf.Tensor:
    """Calls `function` with eager tensors whenever the graph runs.

    Args:
        function: Takes the operands as eager tensors, returns one.
        operands: Tensors, or what converts to them.
        dtype: Dtype of the result.
        shape: Static shape of the result as far as it is known; None when nothing is.
        device: Where the function runs unless the caller chose a device; None leaves
            it to TensorFlow, which may well move it to the host.

    Returns:
        The symbolic result.

    Raises:
        NotImplementedError: The graph is built for XLA.
    """
    if in_xla_context():
        raise NotImplementedError(
            "A sparse convolution runs as a Python function, which XLA can't compile; "
            'with algorithm="dense" and static shapes it is TensorFlow\'s own. '
            "Received: a call inside of tf.function(jit_compile=True)"
        )

    def run(*tensors: tf.Tensor) -> tf.Tensor:
        with stop_recording():
            return function(*tensors)

    _refuse_to_be_saved()
    if device is None or chosen_device().device_type is not None:
        y = tf.py_function(run, operands, dtype)
    else:
        with tf.device(device):
            y = tf.py_function(run, operands, dtype)
    y.set_shape(shape)
    return y


def chosen_device() -> tf.DeviceSpec:
    """What the `tf.device` says that a graph's call is inside of; maybe nothing."""
    probe = tf.no_op()
    return tf.DeviceSpec.from_string(probe.device)


def _refuse_to_be_saved() -> None:
    """Makes saving the graph under construction fail, and those that contain it."""
    graph = tf.compat.v1.get_default_graph()
    while hasattr(graph, "mark_as_unsaveable"):
        graph.mark_as_unsaveable(_SAVING_ERROR)
        graph = graph.outer_graph
