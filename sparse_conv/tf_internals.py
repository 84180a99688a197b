"""Everything that this package takes from TensorFlow's private modules, in one place.

Each name says why the public API does not serve. Knows nothing of convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import tensorflow as tf
from tensorflow.python import pywrap_tfe as _pywrap
from tensorflow.python.autograph.impl import api as _autograph
from tensorflow.python.eager import context as _context
from tensorflow.python.eager import core as _core
from tensorflow.python.eager import forwardprop_util as _forwardprop
from tensorflow.python.eager import record as _record
from tensorflow.python.framework import ops as _ops
from tensorflow.python.ops import control_flow_util as _control_flow
from tensorflow.python.saved_model import save_context as _save_context
from tensorflow.python.util import _pywrap_tensor_float_32_execution as _tensor_float_32

# The class of concrete tensors; the public API tells them from symbolic ones only by
# an attribute lookup that costs more.
EagerTensor = _ops.EagerTensor

# Keeps AutoGraph from rewriting a function; `tf.autograph.experimental.do_not_convert`
# does so, too, but its wrapper makes every eager call slower.
autograph_artifact = _autograph.autograph_artifact

# Recording an operation on the tapes costs 10 us, `tf.custom_gradient` 80 us.
could_possibly_record = _record.could_possibly_record
record_operation = _record.record_operation
stop_recording = _record.stop_recording

# Whether float32 may be computed in TF32; the public function takes longer to find.
tensor_float_32_enabled = _tensor_float_32.is_enabled

# Whether a graph is being built for a SavedModel, which can't hold a Python function.
in_save_context = _save_context.in_save_context


def needs_gradient(tensor: tf.Tensor) -> bool:
    """Whether a tape or a forward accumulator follows `tensor`."""
    tensors = [tensor]
    return _record.should_record_backprop(tensors) or bool(
        _forwardprop.pack_tangents(tensors).indices
    )


def shape_of(tensor: tf.Tensor) -> tuple[int, ...]:
    """The shape of an eager tensor; ten times as fast as `tuple(tensor.shape)`."""
    return tensor._shape_tuple()


def signature_of(tensor: tf.Tensor) -> Hashable:
    """What decides how an eager tensor is treated: its shape, dtype and device.

    The hash of a DType alone takes longer than all of this.
    """
    return tensor._shape_tuple(), tensor._datatype_enum(), tensor.backing_device


def device_scope() -> str:
    """The device of the `tf.device` around an eager operation; empty without one."""
    return _context.context().device_name or ""


def operation(name: str, attributes: dict[str, Any]) -> Callable[..., tf.Tensor]:
    """TensorFlow's operation of that name in `tf.raw_ops`, with attributes.

    On eager tensors it goes straight to TensorFlow's runtime, which takes 3 to 10 us
    less. What the runtime refuses goes the public way, for the error that users know.

    Returns:
        A function of the inputs, given by keyword and in the operation's order.
    """
    public = getattr(tf.raw_ops, name)
    flat = [part for attribute in attributes.items() for part in attribute]
    refusals = (_core._NotOkStatusException, _core._FallbackException)

    def call(**inputs: tf.Tensor) -> tf.Tensor:
        context = _context.context()
        if context.executing_eagerly():
            try:
                return _pywrap.TFE_Py_FastPathExecute(
                    context, name, None, *inputs.values(), *flat
                )
            except refusals:
                pass
        return public(**inputs, **attributes)

    return call


def in_xla_context() -> bool:
    """Whether the graph under construction is for XLA, which can't hold one either."""
    return _control_flow.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def captured_tensor(tensor: tf.Tensor) -> tf.Tensor:
    """What a graph's tensor is a copy of: a tensor captured from outside, or itself.

    The public API does not tell where a placeholder of a `tf.function` gets its value.
    """
    while not isinstance(tensor, EagerTensor):
        if tensor.op.type == "Identity":
            tensor = tensor.op.inputs[0]
            continue
        captures = getattr(tensor.graph, "captures", ())
        outer = next((o for o, inner in captures if inner is tensor), None)
        if outer is None or outer.dtype == tf.resource:
            return tensor
        tensor = outer
    return tensor
