"""One pass on eager tensors.

Knows how to find the back end, where the operands are brought together, and what is
computed where there is nothing to sum. Knows nothing of graphs and gradients, nor of
what a back end does.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import tensorflow as tf

from sparse_conv import backends, dense
from sparse_conv.activations import Activation
from sparse_conv.bridge import HOST, Place, place_of
from sparse_conv.convolution import (
    Convolution,
    Pass,
    Run,
    check_dense,
    check_operands,
    known_nonzeros,
)
from sparse_conv.memo import Memo
from sparse_conv.tensor_cache import cached
from sparse_conv.tf_internals import shape_of, signature_of, tensor_float_32_enabled


def fprop(
    convolution: Convolution,
    x: tf.Tensor,
    w: tf.Tensor,
    bias: tf.Tensor | None,
    activation: Activation,
) -> tf.Tensor:
    """The forward pass; see `autodiff.fprop` for the arguments."""
    operands = (x, w) if bias is None else (x, w, bias)
    # Which algorithm is the cheapest depends on TensorFlow's precision.
    tf32 = tensor_float_32_enabled()
    key = (activation.code, tf32, *map(signature_of, operands))
    run = convolution.remembered(
        key, lambda: _build_fprop(convolution, operands, activation)
    )
    return run(*operands)


def dgrad(
    convolution: Convolution, input_shape: tuple[int, ...], dy: tf.Tensor, w: tf.Tensor
) -> tf.Tensor:
    """The gradient to the input; see `autodiff.dgrad` for the arguments."""
    tf32 = tensor_float_32_enabled()
    key = ("dgrad", tf32, input_shape, signature_of(dy), signature_of(w))
    run = convolution.remembered(
        key, lambda: _build_dgrad(convolution, input_shape, (dy, w))
    )
    return run(dy, w)


def wgrad(
    convolution: Convolution, x: tf.Tensor, dy: tf.Tensor, kernel_shape: tuple[int, ...]
) -> tf.Tensor:
    """The gradient to the kernel; see `autodiff.wgrad` for the arguments."""
    tf32 = tensor_float_32_enabled()
    key = ("wgrad", tf32, kernel_shape, signature_of(x), signature_of(dy))
    run = convolution.remembered(
        key, lambda: _build_wgrad(convolution, kernel_shape, (x, dy))
    )
    return run(x, dy)


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
    if 0 in input_shape or _has_no_products(convolution, w):
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
    if 0 in shape or 0 in shape_of(dy) or _has_no_products(convolution, w):
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
    run = _chosen_run(convolution, one, backend, None)
    return _moving(run, operands, place, has_kernel=False)


def _has_no_products(convolution: Convolution, w: tf.Tensor) -> bool:
    """Whether there is nothing to sum; TensorFlow's convolution sums zeros even so."""
    return 0 in shape_of(w) and convolution.algorithm != "dense"


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
        check_dense(convolution, one)
    elif algorithm != "generic":
        nnz = known_nonzeros(convolution, one.problem, w)
        if nnz is None and backend.nonzeros(w) is not None:
            return _counting_run(convolution, one, backend)
        algorithm = _choose(convolution, one, backend, nnz)
    waits = convolution.algorithm != "auto"
    return build_run(convolution, one, backend, algorithm, waits=waits)


def build_run(
    convolution: Convolution,
    one: Pass,
    backend: ModuleType | None,
    algorithm: str,
    *,
    waits: bool,
) -> Run:
    """A pass by a given algorithm; `waits` tells whether it waits for its compiler."""
    problem, pattern = one.problem, convolution.pattern
    options: dict[str, Any] = {} if one.name == "wgrad" else {"shape": one.shape}
    if algorithm == "dense":
        if one.name == "fprop":
            options["activation"] = one.activation
        arguments = (problem, one.dtype, one.place, pattern)
        return getattr(dense, one.name)(*arguments, **options)
    if one.name != "wgrad":
        options |= {"waits": waits, "constant": convolution.constant}
    if pattern is not None:
        # Empty outer taps would make every tile of the input larger.
        problem, pattern = problem.cropped(*pattern.tap_range()), pattern.cropped()
    arguments = (problem, one.dtype, one.place, pattern)
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
            algorithm,
            lambda: build_run(convolution, one, backend, algorithm, waits=False),
        )
        return prepared(read, w, *rest)

    return run


def _choose(
    convolution: Convolution, one: Pass, backend: ModuleType, nnz: int | None
) -> str:
    return convolution.choose(
        one.name, one.problem, one.dtype, one.place, nnz, backend
    ).algorithm


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


def _moving(
    run: Run, operands: Sequence[tf.Tensor], place: Place, has_kernel: bool = True
) -> Run:
    """`run`, behind copies of the operands to `place` where they live elsewhere."""
    if all(place_of(operand) == place for operand in operands):
        return run

    def moved(*operands: tf.Tensor) -> tf.Tensor:
        return run(*(moved_to(place, operand) for operand in operands))

    def moved_with_kernel(read: tf.Tensor, w: tf.Tensor, *rest: tf.Tensor) -> tf.Tensor:
        others = (moved_to(place, operand) for operand in rest)
        return run(moved_to(place, read), kept_at(place, w), *others)

    return moved_with_kernel if has_kernel else moved


def moved_to(place: Place, tensor: tf.Tensor) -> tf.Tensor:
    """The tensor, or a copy of it, at a place."""
    if place_of(tensor) == place:
        return tensor
    with tf.device(place.device):
        return tf.identity(tensor)


def kept_at(place: Place, w: tf.Tensor) -> tf.Tensor:
    """As `moved_to`, with the copy kept as long as the tensor.

    A kernel is used again and again, and what is derived from it belongs to one tensor.
    """
    return cached(w, ("at", place), lambda: moved_to(place, w))


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
