"""One pass, run: straight away on eager tensors, or as a node of a graph.

A Convolution remembers, for each shape and place it has met, a function that computes a
pass there; a call that has been seen before costs one look-up. In a graph, that
function runs in a `tf.py_function`, unless the dense algorithm is known to be chosen:
that is TensorFlow's own operation. Knows how to find the back end and what a graph
needs to know beforehand. Knows nothing of gradients, nor of what a back end does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import tensorflow as tf

from sparse_conv import backends, choice, dense
from sparse_conv.activations import LINEAR, Activation
from sparse_conv.bridge import HOST, Place, gpu_place, place_of
from sparse_conv.choice import Choice, Question
from sparse_conv.costs import Estimate
from sparse_conv.graph import call_in_graph, chosen_device
from sparse_conv.memo import Memo
from sparse_conv.pattern import Pattern
from sparse_conv.problem import Geometry, Problem, infer_output_shape, make_problem
from sparse_conv.sparse_kernel import check_dtype
from sparse_conv.tensor_cache import cached
from sparse_conv.tf_internals import (
    EagerTensor,
    captured_tensor,
    shape_of,
    tensor_float_32_enabled,
)


class RuntimeShape(NamedTuple):
    """A shape that is known only when the graph runs.

    Attributes:
        value: (rank,) int32 tensor.
        static: What is known of it while the graph is built.
    """

    value: tf.Tensor
    static: tf.TensorShape


Shape = tuple[int, ...] | RuntimeShape
# Computes a pass for operands of one shape, dtype and place.
Run = Callable[..., tf.Tensor]

# Beyond so many shapes and places, a Convolution forgets what it remembers.
_REMEMBERED = 1024


class Convolution:
    """What stays the same over the passes and calls of one convolution.

    Attributes:
        geometry: Strides, padding, dilations and layout.
        pattern: The kernel's pattern; None when the kernel is dense.
        backend: The back end asked for; None to choose.
        algorithm: The algorithm asked for; "auto" to choose.
    """

    def __init__(
        self,
        geometry: Geometry,
        pattern: Pattern | None,
        backend: str | None,
        algorithm: str = "auto",
    ):
        backends.check_name(backend)
        choice.check_name(algorithm)
        self.geometry = geometry
        self.pattern = pattern
        self.backend = backend
        self.algorithm = algorithm
        self._runs: dict[Hashable, Run] = {}
        self._measured: dict[Question, tuple[Estimate, ...]] = {}

    def kernel_shape(self, w_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """The dense kernel's shape, given the shape of its values or of itself."""
        return tuple(w_shape) if self.pattern is None else self.pattern.shape

    def problem(
        self, input_shape: tuple[int, ...], w_shape: tuple[int, ...]
    ) -> Problem:
        """The Problem for an input of that shape."""
        return make_problem(input_shape, self.kernel_shape(w_shape), self.geometry)

    def choose(
        self,
        pass_name: str,
        problem: Problem,
        dtype: tf.DType,
        place: Place,
        nnz: int | None,
        backend: ModuleType,
        traced: bool = False,
    ) -> Choice:
        """The algorithm of a pass, by what was measured for it or by the models."""
        question = Question(
            pass_name,
            problem,
            dtype,
            place,
            nnz,
            self.pattern is not None,
            tensor_float_32_enabled(),
            traced,
        )
        measured = self._measured.get(question._replace(traced=False))
        return choice.choose(question, backend, self.algorithm, measured)

    def measured(self, question: Question) -> tuple[Estimate, ...] | None:
        """What was measured for this very question; None if nothing was."""
        return self._measured.get(question)

    def keep_measured(
        self, question: Question, estimates: tuple[Estimate, ...]
    ) -> None:
        """From now on, lets measured times decide where `question` is asked."""
        self._measured[question] = estimates
        self._runs = {}

    def remembered(self, key: Hashable, build: Callable[[], Run]) -> Run:
        """The function made for `key`, made now if it wasn't yet."""
        run = self._runs.get(key)
        if run is None:
            if len(self._runs) >= _REMEMBERED:
                self._runs.clear()
            run = self._runs[key] = build()
        return run


def fprop(
    convolution: Convolution,
    x: tf.Tensor,
    w: tf.Tensor,
    bias: tf.Tensor | None,
    activation: Activation,
) -> tf.Tensor:
    """The forward pass; see `autodiff.fprop` for the arguments."""
    if tf.executing_eagerly():
        return eager_fprop(convolution, x, w, bias, activation)
    return _graph_fprop(convolution, x, w, bias, activation)


def eager_fprop(
    convolution: Convolution,
    x: tf.Tensor,
    w: tf.Tensor,
    bias: tf.Tensor | None,
    activation: Activation,
) -> tf.Tensor:
    """The forward pass on eager tensors."""
    operands = (x, w) if bias is None else (x, w, bias)
    # Which algorithm is the cheapest depends on TensorFlow's precision.
    tf32 = tensor_float_32_enabled()
    key = (activation.code, tf32, *map(_signature, operands))
    run = convolution.remembered(
        key, lambda: _build_fprop(convolution, operands, activation)
    )
    return run(*operands)


def dgrad(
    convolution: Convolution, input_shape: Shape, dy: tf.Tensor, w: tf.Tensor
) -> tf.Tensor:
    """The gradient to the input; see `autodiff.dgrad` for the arguments."""
    if not tf.executing_eagerly():
        return _graph_dgrad(convolution, input_shape, dy, w)
    tf32 = tensor_float_32_enabled()
    key = ("dgrad", tf32, input_shape, _signature(dy), _signature(w))
    run = convolution.remembered(
        key, lambda: _build_dgrad(convolution, input_shape, (dy, w))
    )
    return run(dy, w)


def wgrad(
    convolution: Convolution, x: tf.Tensor, dy: tf.Tensor, kernel_shape: Shape
) -> tf.Tensor:
    """The gradient to the kernel; see `autodiff.wgrad` for the arguments."""
    if not tf.executing_eagerly():
        return _graph_wgrad(convolution, x, dy, kernel_shape)
    tf32 = tensor_float_32_enabled()
    key = ("wgrad", tf32, kernel_shape, _signature(x), _signature(dy))
    run = convolution.remembered(
        key, lambda: _build_wgrad(convolution, kernel_shape, (x, dy))
    )
    return run(x, dy)


def check_operands(
    convolution: Convolution, operands: Sequence[tf.Tensor], activation: Activation
) -> None:
    """Checks dtypes and the bias, as far as they are known.

    Args:
        convolution: What is convolved.
        operands: The input, the kernel's values or the dense kernel, and maybe a bias.
        activation: The fused activation.

    Raises:
        TypeError: A dtype can't serve or doesn't match the input's.
        ValueError: The bias does not have one element for each output channel.
    """
    x, w, *rest = operands
    check_dtype("input", x.dtype)
    for name, operand in zip(("filters", "bias"), (w, *rest), strict=False):
        if operand.dtype != x.dtype:
            raise TypeError(
                f"`{name}` must have the dtype of `input`. Received: {name} of dtype "
                f"{operand.dtype.name}, input of dtype {x.dtype.name}"
            )
    if x.dtype.is_integer and not activation.integer:
        raise TypeError(
            f"The activation {activation.name!r} is not defined for integers. "
            f"Received: input of dtype {x.dtype.name}"
        )
    outputs = None
    if convolution.pattern is not None:
        outputs = convolution.pattern.shape[3]
    elif w.shape.rank == 4:
        outputs = w.shape[3]
    for bias in rest:
        if not bias.shape.is_compatible_with([outputs]):
            raise ValueError(
                "`bias` must have one element for each output channel. Received: bias "
                f"of shape {tuple(bias.shape)}, {outputs} output channels"
            )


def _signature(tensor: tf.Tensor) -> Hashable:
    """What decides how an eager operand is treated."""
    return (shape_of(tensor), tensor.dtype, tensor.backing_device)


class Pass(NamedTuple):
    """One pass with all that decides how it is computed, but the algorithm.

    Attributes:
        name: "fprop", "dgrad" or "wgrad".
        problem: The sizes; `dtype` is that of all operands, which live at `place`.
        shape: The result's, with all its batch dimensions.
        has_bias: Whether a bias is added; fprop only, as is `activation`.
    """

    name: str
    problem: Problem
    dtype: tf.DType
    place: Place
    shape: tuple[int, ...]
    has_bias: bool = False
    activation: Activation = LINEAR


def _build_fprop(
    convolution: Convolution, operands: Sequence[tf.Tensor], activation: Activation
) -> Run:
    x, w, *rest = operands
    check_operands(convolution, operands, activation)
    input_shape, dtype = shape_of(x), x.dtype
    problem = convolution.problem(input_shape, shape_of(w))
    shape = (*input_shape[:-3], *problem.output_shape[1:])
    place = _common_place(operands)
    backend = _select(convolution, place, dtype)
    if 0 in shape:
        return lambda *_: _zeros(shape, dtype, place)
    if 0 in input_shape or 0 in shape_of(w):
        layout = convolution.geometry.data_format
        return lambda _x, _w, bias=None: _without_products(
            layout, _zeros(shape, dtype, place), bias, activation
        )
    one = Pass("fprop", problem, dtype, place, shape, bool(rest), activation)
    return _moving(_chosen_run(convolution, one, backend, w), operands, place)


def _build_dgrad(
    convolution: Convolution, shape: tuple[int, ...], operands: Sequence[tf.Tensor]
) -> Run:
    dy, w = operands
    problem = convolution.problem(shape, shape_of(w))
    place, dtype = _common_place(operands), dy.dtype
    backend = _select(convolution, place, dtype)
    if 0 in shape or 0 in shape_of(dy) or 0 in shape_of(w):
        return lambda *_: _zeros(shape, dtype, place)
    one = Pass("dgrad", problem, dtype, place, shape)
    return _moving(_chosen_run(convolution, one, backend, w), operands, place)


def _build_wgrad(
    convolution: Convolution, shape: tuple[int, ...], operands: Sequence[tf.Tensor]
) -> Run:
    x, dy = operands
    problem = convolution.problem(shape_of(x), shape)
    place, dtype = _common_place(operands), x.dtype
    backend = _select(convolution, place, dtype)
    if 0 in shape or 0 in shape_of(x) or 0 in shape_of(dy):
        return lambda *_: _zeros(shape, dtype, place)
    one = Pass("wgrad", problem, dtype, place, shape)
    return _moving(_chosen_run(convolution, one, backend, None), operands, place)


def _select(
    convolution: Convolution, place: Place, dtype: tf.DType
) -> ModuleType | None:
    """The back end; None where TensorFlow's convolution was asked for, and no other."""
    if convolution.algorithm == "dense" and convolution.backend is None:
        return None
    return backends.select(place, dtype, convolution.backend)


def _chosen_run(
    convolution: Convolution,
    one: Pass,
    backend: ModuleType | None,
    w: tf.Tensor | None,
) -> Run:
    """A pass by the algorithm that is asked for or the cheapest.

    Args:
        convolution: What is convolved.
        one: The pass.
        backend: What `_select` gave.
        w: The kernel's operand; None for wgrad.
    """
    algorithm = convolution.algorithm
    if algorithm == "dense":
        _check_dense(convolution, one)
    elif algorithm != "generic":
        nnz = _known_nonzeros(convolution, one.problem, w)
        if nnz is None and backend.nonzeros(w) is not None:
            return _counting_run(convolution, one, backend)
        algorithm = _choose(convolution, one, backend, nnz)
    return build_run(convolution, one, backend, algorithm)


def build_run(
    convolution: Convolution, one: Pass, backend: ModuleType | None, algorithm: str
) -> Run:
    """A pass by a given algorithm."""
    arguments = (one.problem, one.dtype, one.place, convolution.pattern)
    options: dict[str, Any] = {} if one.name == "wgrad" else {"shape": one.shape}
    if algorithm == "dense":
        if one.name == "fprop":
            options["activation"] = one.activation
        return getattr(dense, one.name)(*arguments, **options)
    if one.name == "fprop":
        options |= {"has_bias": one.has_bias, "activation": one.activation.code}
    return getattr(backend, one.name)(*arguments, algorithm=algorithm, **options)


def _counting_run(convolution: Convolution, one: Pass, backend: ModuleType) -> Run:
    """A pass over a dense kernel, by an algorithm that follows from its zeros."""
    runs = Memo()
    # What was chosen is kept with each kernel, under this name.
    name = object()

    def run(read: tf.Tensor, w: tf.Tensor, *rest: tf.Tensor) -> tf.Tensor:
        algorithm = cached(
            w, name, lambda: _choose(convolution, one, backend, backend.nonzeros(w))
        )
        prepared = runs.cached(
            algorithm, lambda: build_run(convolution, one, backend, algorithm)
        )
        return prepared(read, w, *rest)

    return run


def _choose(
    convolution: Convolution, one: Pass, backend: ModuleType, nnz: int | None
) -> str:
    return convolution.choose(
        one.name, one.problem, one.dtype, one.place, nnz, backend
    ).algorithm


def _known_nonzeros(
    convolution: Convolution, problem: Problem, w: tf.Tensor | None
) -> int | None:
    """The weights that a pass visits; None for those of a dense kernel."""
    if convolution.pattern is not None:
        return convolution.pattern.nnz
    return math.prod(problem.kernel_shape) if w is None else None


def _check_dense(convolution: Convolution, one: Pass) -> None:
    reason = dense.reason_against(one.name, one.problem, one.dtype, one.place)
    if reason is None and one.place.kind == "GPU" and convolution.backend == "cpu":
        reason = dense.ELSEWHERE
    if reason is not None:
        raise choice.unsupported("dense", one.name, reason)


def _common_place(operands: Sequence[tf.Tensor]) -> Place:
    """Where the operands are brought together: the one GPU among their places.

    As for TensorFlow's own operations, an operand in host memory follows the others to
    the GPU where they are; int32 is computed on the host, where TensorFlow keeps it.
    """
    if operands[0].dtype == tf.int32:
        return HOST
    places = {place_of(operand) for operand in operands}
    gpus = sorted(place for place in places if place.kind == "GPU")
    if len(gpus) > 1:
        raise ValueError(
            "All operands must be on the same GPU, or in host memory. "
            f"Received: operands on {' and '.join(place.device for place in gpus)}"
        )
    return gpus[0] if gpus else places.pop()


def _moving(run: Run, operands: Sequence[tf.Tensor], place: Place) -> Run:
    """`run`, behind copies of the operands to `place` where they live elsewhere."""
    if all(place_of(operand) == place for operand in operands):
        return run

    def moved(*operands: tf.Tensor) -> tf.Tensor:
        with tf.device(place.device):
            return run(*(tf.identity(operand) for operand in operands))

    return moved


def _zeros(shape: Sequence[int], dtype: tf.DType, place: Place) -> tf.Tensor:
    with tf.device(place.device):
        return tf.zeros(shape, dtype)


def _without_products(
    data_format: str,
    zeros: tf.Tensor,
    bias: tf.Tensor | None,
    activation: Activation,
) -> tf.Tensor:
    """The output of a convolution that has no nonzero weight or no input."""
    with tf.device(zeros.device):
        y = zeros
        if bias is not None:
            per_channel = (-1,) if data_format == "NHWC" else (-1, 1, 1)
            y += tf.reshape(bias, per_channel)
        return activation.function(y)


def _graph_fprop(
    convolution: Convolution,
    x: tf.Tensor,
    w: tf.Tensor,
    bias: tf.Tensor | None,
    activation: Activation,
) -> tf.Tensor:
    def run(x: tf.Tensor, w: tf.Tensor, bias: tf.Tensor | None = None) -> tf.Tensor:
        return eager_fprop(convolution, x, w, bias, activation)

    shape = None
    if x.shape.rank is not None and w.shape.rank is not None:
        kernel_shape = convolution.kernel_shape(w.shape.as_list())
        shape = infer_output_shape(
            x.shape.as_list(), kernel_shape, convolution.geometry
        )
    operands = [x, w] if bias is None else [x, w, bias]
    one = _graph_pass(convolution, "fprop", x.shape, w.shape, x.dtype, shape)
    if one is not None and _is_dense_in_graph(convolution, one, w):
        with _at(one.place):
            return dense.graph_fprop(
                one.problem, one.place, convolution.pattern, operands, activation, shape
            )
    return call_in_graph(run, operands, x.dtype, shape, _device(convolution, x))


def _graph_dgrad(
    convolution: Convolution, input_shape: Shape, dy: tf.Tensor, w: tf.Tensor
) -> tf.Tensor:
    def run(dy: tf.Tensor, w: tf.Tensor, *value: tf.Tensor) -> tf.Tensor:
        return dgrad(convolution, _known_shape(input_shape, value), dy, w)

    value, static = _graph_shape(input_shape)
    one = _graph_pass(convolution, "dgrad", static, w.shape, dy.dtype, input_shape)
    if one is not None and _is_dense_in_graph(convolution, one, w):
        with _at(one.place):
            return dense.graph_dgrad(
                one.problem, one.place, convolution.pattern, [dy, w], one.shape
            )
    device = _device(convolution, dy)
    return call_in_graph(run, [dy, w, *value], dy.dtype, static, device)


def _graph_wgrad(
    convolution: Convolution, x: tf.Tensor, dy: tf.Tensor, kernel_shape: Shape
) -> tf.Tensor:
    def run(x: tf.Tensor, dy: tf.Tensor, *value: tf.Tensor) -> tf.Tensor:
        return wgrad(convolution, x, dy, _known_shape(kernel_shape, value))

    value, static = _graph_shape(kernel_shape)
    one = _graph_pass(convolution, "wgrad", x.shape, static, x.dtype, kernel_shape)
    if one is not None and _is_dense_in_graph(convolution, one, None):
        with _at(one.place):
            return dense.graph_wgrad(
                one.problem, one.place, convolution.pattern, [x, dy]
            )
    device = _device(convolution, x)
    return call_in_graph(run, [x, dy, *value], x.dtype, static, device)


def _graph_pass(
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
    if 0 in (*problem.input_shape, *problem.output_shape, *w_shape):
        return None
    return Pass(name, problem, dtype, _graph_place(convolution, dtype), tuple(shape))


def _is_dense_in_graph(
    convolution: Convolution, one: Pass, w: tf.Tensor | None
) -> bool:
    """Whether TensorFlow's own operations shall compute a pass of a graph."""
    if convolution.algorithm == "dense":
        _check_dense(convolution, one)
        return True
    if one.place.kind == "GPU" and backends.unavailable("cuda"):
        return False
    backend = backends.select(one.place, one.dtype, convolution.backend)
    nnz = _known_nonzeros(convolution, one.problem, w)
    if nnz is None:
        kernel = captured_tensor(w)
        # Of others, the zeros are counted when the graph runs.
        nnz = backend.nonzeros(kernel) if isinstance(kernel, EagerTensor) else None
        if nnz is None:
            return False
    chosen = convolution.choose(*one[:4], nnz, backend, traced=True)
    return chosen.algorithm == "dense"


def _graph_place(convolution: Convolution, dtype: tf.DType) -> Place:
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


def _graph_shape(shape: Shape) -> tuple[list[tf.Tensor], tf.TensorShape]:
    """The operands that tell a shape when the graph runs, and what is known before."""
    if isinstance(shape, RuntimeShape):
        return [shape.value], shape.static
    return [], tf.TensorShape(shape)


def _known_shape(shape: Shape, value: Sequence[tf.Tensor]) -> tuple[int, ...]:
    """The shape while the graph runs; `value` is what `_graph_shape` added."""
    return tuple(value[0].numpy().tolist()) if value else shape


def _device(convolution: Convolution, operand: tf.Tensor) -> str | None:
    """Where a pass should run in a graph; None leaves it to TensorFlow."""
    if convolution.backend == "cpu" or operand.dtype == tf.int32:
        return None
    if not tf.config.list_logical_devices("GPU") or backends.unavailable("cuda"):
        return None
    return "/GPU:0"
