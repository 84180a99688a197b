"""One pass in a graph: a Python function that runs it eagerly, or TensorFlow's own.

Where all sizes are known and the dense algorithm is chosen, TensorFlow's operations are
put into the graph, which cost less to call than a Python function. All else is decided
whenever the graph runs. Knows what a graph needs to know beforehand: shapes, devices.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from sparse_conv import backends, dense, execution
from sparse_conv.activations import Activation
from sparse_conv.bridge import HOST, Place, gpu_place, place_of
from sparse_conv.convolution import Convolution, Pass, check_dense, known_nonzeros
from sparse_conv.graph import call_in_graph, chosen_device
from sparse_conv.problem import infer_output_shape
from sparse_conv.tf_internals import EagerTensor, captured_tensor


class RuntimeShape(NamedTuple):
    """A shape that is known only when the graph runs.

    Attributes:
        value: (rank,) int32 tensor.
        static: What is known of it while the graph is built.
    """

    value: tf.Tensor
    static: tf.TensorShape


Shape = tuple[int, ...] | RuntimeShape


def fprop(
    convolution: Convolution,
    x: tf.Tensor,
    w: tf.Tensor,
    bias: tf.Tensor | None,
    activation: Activation,
) -> tf.Tensor:
    """The forward pass; see `autodiff.fprop` for the arguments."""
    shape = None
    if x.shape.rank is not None and w.shape.rank is not None:
        kernel_shape = convolution.kernel_shape(w.shape.as_list())
        shape = infer_output_shape(
            x.shape.as_list(), kernel_shape, convolution.geometry
        )
    others = [] if bias is None else [bias]
    one = _static_pass(convolution, "fprop", x.shape, w.shape, x.dtype, shape)
    if one is not None and _is_dense(convolution, one, w):
        with _at(one.place):
            return dense.graph_fprop(
                one.problem,
                one.place,
                convolution.pattern,
                [x, w, *others],
                activation,
                shape,
            )

    def run(w: tf.Tensor, x: tf.Tensor, bias: tf.Tensor | None = None) -> tf.Tensor:
        return execution.fprop(convolution, x, w, bias, activation)

    run, kernel = _bound(run, convolution, w)
    operands = [*kernel, x, *others]
    return call_in_graph(run, operands, x.dtype, shape, _device(convolution, x))


def dgrad(
    convolution: Convolution, input_shape: Shape, dy: tf.Tensor, w: tf.Tensor
) -> tf.Tensor:
    """The gradient to the input; see `autodiff.dgrad` for the arguments."""
    value, static = _operand_of(input_shape)
    one = _static_pass(convolution, "dgrad", static, w.shape, dy.dtype, input_shape)
    if one is not None and _is_dense(convolution, one, w):
        with _at(one.place):
            return dense.graph_dgrad(
                one.problem, one.place, convolution.pattern, [dy, w], one.shape
            )

    def run(w: tf.Tensor, dy: tf.Tensor, *value: tf.Tensor) -> tf.Tensor:
        return execution.dgrad(convolution, _known_shape(input_shape, value), dy, w)

    run, kernel = _bound(run, convolution, w)
    operands = [*kernel, dy, *value]
    device = _device(convolution, dy)
    return call_in_graph(run, operands, dy.dtype, static, device)


def wgrad(
    convolution: Convolution, x: tf.Tensor, dy: tf.Tensor, kernel_shape: Shape
) -> tf.Tensor:
    """The gradient to the kernel; see `autodiff.wgrad` for the arguments."""

    def run(x: tf.Tensor, dy: tf.Tensor, *value: tf.Tensor) -> tf.Tensor:
        return execution.wgrad(convolution, x, dy, _known_shape(kernel_shape, value))

    value, static = _operand_of(kernel_shape)
    one = _static_pass(convolution, "wgrad", x.shape, static, x.dtype, kernel_shape)
    if one is not None and _is_dense(convolution, one, None):
        with _at(one.place):
            return dense.graph_wgrad(
                one.problem, one.place, convolution.pattern, [x, dy]
            )
    device = _device(convolution, x)
    return call_in_graph(run, [x, dy, *value], x.dtype, static, device)


def _static_pass(
    convolution: Convolution,
    name: str,
    input_shape: tf.TensorShape,
    w_shape: tf.TensorShape,
    dtype: tf.DType,
    shape: Any,
) -> Pass | None:
    """A pass of a graph with all sizes known, and none of them 0; None otherwise."""
    known = input_shape.is_fully_defined() and w_shape.is_fully_defined()
    if not known or convolution.algorithm in ("generic", "baked"):
        return None
    problem = convolution.problem(tuple(input_shape), tuple(w_shape))
    if 0 in (*problem.input_shape, *problem.output_shape):
        return None
    if 0 in w_shape and convolution.algorithm != "dense":
        return None
    return Pass(name, problem, dtype, _place(convolution, dtype), tuple(shape))


def _bound(
    run: Callable[..., tf.Tensor], convolution: Convolution, w: tf.Tensor
) -> tuple[Callable[..., tf.Tensor], list[tf.Tensor]]:
    """`run` and what it takes first, the kernel; or with the kernel filled in.

    A graph hands it over as a new tensor each time. If it is always the same one, and
    where the graph needs it, that one is taken: then what was derived from it for one
    call, its rows or its code, serves the next.
    """
    kernel = captured_tensor(w)
    if not isinstance(kernel, EagerTensor):
        return run, [w]
    if place_of(kernel) != _place(convolution, kernel.dtype):
        return run, [w]
    return functools.partial(run, kernel), []


def _is_dense(convolution: Convolution, one: Pass, w: tf.Tensor | None) -> bool:
    """Whether TensorFlow's own operations shall compute a pass of a graph."""
    if convolution.algorithm == "dense":
        check_dense(convolution, one)
        return True
    if one.place.kind == "GPU" and backends.unavailable("cuda"):
        return False
    backend = backends.select(one.place, one.dtype, convolution.backend)
    nnz = known_nonzeros(convolution, one.problem, w)
    if nnz is None:
        kernel = captured_tensor(w)
        # Of others, the zeros are counted when the graph runs.
        nnz = backend.nonzeros(kernel) if isinstance(kernel, EagerTensor) else None
        if nnz is None:
            return False
    chosen = convolution.choose(*one[:4], nnz, backend, traced=True)
    return chosen.algorithm == "dense"


def _place(convolution: Convolution, dtype: tf.DType) -> Place:
    """Where a graph's convolution is expected to run."""
    gpus = len(tf.config.list_logical_devices("GPU"))
    device = chosen_device()
    if not gpus or device.device_type == "CPU" or convolution.backend == "cpu":
        return HOST
    return HOST if dtype == tf.int32 else gpu_place(device.device_index or 0)


def _at(place: Place) -> Any:
    """The device of a graph's dense pass, unless the caller chose one."""
    if chosen_device().device_type is not None:
        return contextlib.nullcontext()
    return tf.device(f"/{place.kind}:{place.index}")


def _operand_of(shape: Shape) -> tuple[list[tf.Tensor], tf.TensorShape]:
    """The operands that tell a shape when the graph runs, and what is known before.

    The shape goes as that of a tensor without elements. Its numbers would be an operand
    in host memory among others on a GPU, and the host would have to wait for them.
    """
    if isinstance(shape, RuntimeShape):
        empty = tf.zeros(tf.concat([[0], shape.value], axis=0), tf.float32)
        return [empty], shape.static
    return [], tf.TensorShape(shape)


def _known_shape(shape: Shape, value: Sequence[tf.Tensor]) -> tuple[int, ...]:
    """The shape while the graph runs; `value` is what `_operand_of` added."""
    return tuple(value[0].shape[1:]) if value else shape


def _device(convolution: Convolution, operand: tf.Tensor) -> str | None:
    """Where a pass should run in a graph; None leaves it to TensorFlow."""
    if convolution.backend == "cpu" or operand.dtype == tf.int32:
        return None
    if not tf.config.list_logical_devices("GPU") or backends.unavailable("cuda"):
        return None
    return "/GPU:0"
