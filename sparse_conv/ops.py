"""`conv2d`: the arguments of a call, checked and converted, before anything computes.

Knows the contract of `tf.nn.conv2d`. The passes and their gradients are in `autodiff`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from sparse_conv import activations, autodiff, dense
from sparse_conv.activations import Activation
from sparse_conv.convolution import Convolution, check_operands
from sparse_conv.pattern import Pattern
from sparse_conv.problem import Geometry, normalize_geometry
from sparse_conv.sparse_kernel import SparseKernel
from sparse_conv.tf_internals import EagerTensor, autograph_artifact, in_save_context

_NOT_DENSE = (str, bytes, dict, tf.RaggedTensor, tf.SparseTensor, tf.IndexedSlices)


@autograph_artifact
def conv2d(
    input: Any,
    filters: Any,
    strides: Any,
    padding: Any,
    data_format: str | None = "NHWC",
    dilations: Any = None,
    name: str | None = None,
    *,
    bias: Any = None,
    activation: str | Callable[[tf.Tensor], tf.Tensor] | None = None,
    algorithm: str = "auto",
    backend: str | None = None,
) -> tf.Tensor:
    """A 2-D convolution that skips the zeros of its kernel.

    Equivalent to `tf.nn.conv2d(input, filters.to_dense(), strides, padding, ...)`, but
    for two things: where a weight is zero, an Inf or NaN of the input does not reach
    the output, and the order of summation is its own. float32 is exact to float32's
    rounding; half and bfloat16 accumulate in float32. That holds for our own code,
    which `algorithm="generic"` pins: where "dense" is chosen, all is as `tf.nn.conv2d`
    does it, at the precision that TensorFlow is set to.

    Args:
        input: (..., H, W, C) tensor, or (..., C, H, W) for "NCHW", with one batch
            dimension or more; float16, bfloat16, float32, float64 or int32.
        filters: A SparseKernel, or a dense (R, S, C / groups, K) tensor, variable or
            array of the input's dtype, which is converted on the way: once for each
            tensor object, at every call for a variable or an array.
        strides: An int, or a sequence of length 1, 2 or 4.
        padding: "SAME", "VALID", or four (before, after) pairs in the order of
            `data_format`.
        data_format: "NHWC" or "NCHW"; None means "NHWC".
        dilations: As `strides`; None means 1.
        name: Name of the operation in a graph.
        bias: (K,) tensor, variable or array of the input's dtype, added to the output.
        activation: Applied to the output: None, "relu", "relu6", "leaky_relu", "elu",
            "sigmoid", "tanh", "gelu", "swish", or a callable. A name is fused.
        algorithm: "auto", which takes the one that is expected to be the fastest (see
            `explain`), or one of them: "generic", our code, which reads the kernel's
            pattern at run time; "baked", our code, generated for one SparseKernel;
            "dense", TensorFlow's convolution on the dense kernel.
        backend: "cuda", "cpu", or None to choose by where the operands live.

    Returns:
        (..., P, Q, K) tensor, or (..., K, P, Q) for "NCHW", of the input's dtype.

    Raises:
        ValueError: A value, a shape or a combination of them is wrong.
        TypeError: A type or dtype can't serve or doesn't match the input's.
        NotImplementedError: Valid, but unsupported: strides or dilations in the batch
            or channel dimension, a back end or an algorithm that can't, XLA.

    References:
        S. Han et al., Learning both Weights and Connections for Efficient Neural
        Networks, https://arxiv.org/abs/1506.02626, for kernels with such zeros.
    """
    geometry = geometry_of(strides, padding, data_format, dilations)
    epilogue = activations.get(activation)
    x = _tensor("input", input, None)
    eager = tf.executing_eagerly()
    pattern, w = _kernel_operand(filters, x, eager)
    bias = None if bias is None else _tensor("bias", bias, x)
    fused = epilogue if isinstance(epilogue, Activation) else activations.LINEAR
    convolution = convolution_of(geometry, filters, pattern, backend, algorithm)
    if eager:
        y = autodiff.fprop(convolution, x, w, bias, fused)
    else:
        with tf.name_scope(name or "sparse_conv2d"):
            y = _graph_conv2d(convolution, x, w, filters, bias, fused)
    return y if fused is epilogue else epilogue(y)


def _graph_conv2d(
    convolution: Convolution,
    x: tf.Tensor,
    w: tf.Tensor,
    filters: Any,
    bias: tf.Tensor | None,
    activation: Activation,
) -> tf.Tensor:
    """The convolution in a graph; in a SavedModel, TensorFlow's dense one."""
    check_operands(convolution, [x, w] if bias is None else [x, w, bias], activation)
    if not in_save_context():
        return autodiff.fprop(convolution, x, w, bias, activation)
    kernel = filters.to_dense() if isinstance(filters, SparseKernel) else w
    return dense.convolve(convolution.geometry, x, kernel, bias, activation)


_cached_geometry = functools.lru_cache(maxsize=1024)(normalize_geometry)


def geometry_of(
    strides: Any, padding: Any, data_format: Any, dilations: Any
) -> Geometry:
    """The Geometry of the arguments of `conv2d`, checked once."""
    arguments = (strides, padding, data_format, dilations)
    try:
        hash(arguments)
    except TypeError:
        return normalize_geometry(*arguments)
    return _cached_geometry(*arguments)


def convolution_of(
    geometry: Geometry,
    filters: Any,
    pattern: Pattern | None,
    backend: str | None,
    algorithm: str,
) -> Convolution:
    """The Convolution of earlier calls with these arguments, or a new one."""
    if pattern is None:
        return _dense_convolution(geometry, backend, algorithm)
    return filters.memo.cached(
        (geometry, backend, algorithm),
        lambda: Convolution(
            geometry, pattern, backend, algorithm, constant=filters.is_constant
        ),
    )


@functools.lru_cache(maxsize=1024)
def _dense_convolution(
    geometry: Geometry, backend: str | None, algorithm: str
) -> Convolution:
    return Convolution(geometry, None, backend, algorithm)


def _kernel_operand(
    filters: Any, x: tf.Tensor, eager: bool
) -> tuple[Pattern | None, tf.Tensor]:
    """The pattern, None for a dense kernel, and the operand of the passes."""
    if isinstance(filters, SparseKernel):
        if not eager:
            return filters.pattern, filters.graph_values()
        w = filters.values
        return filters.pattern, (
            w if isinstance(w, EagerTensor) else tf.convert_to_tensor(w)
        )
    return None, _tensor("filters", filters, x)


def _tensor(name: str, value: Any, like: tf.Tensor | None) -> tf.Tensor:
    """`value` as a dense tensor; floats in an array take the float dtype of `like`."""
    if isinstance(value, EagerTensor):
        return value
    if value is None or isinstance(value, _NOT_DENSE):
        raise _type_error(name, value)
    if isinstance(value, np.ndarray | list | tuple | np.generic):
        return _from_array(name, value, like)
    try:
        return tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        raise _type_error(name, value) from error


def _type_error(name: str, value: Any) -> TypeError:
    return TypeError(
        f"`{name}` must be a dense tensor, a variable or an array"
        f"{' (or a SparseKernel)' if name == 'filters' else ''}. "
        f"Received: {name} of type {type(value).__name__}"
    )


def _from_array(name: str, value: Any, like: tf.Tensor | None) -> tf.Tensor:
    try:
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        raise _type_error(name, value) from error
    if like is None or tensor.dtype == like.dtype:
        return tensor
    if tensor.dtype.is_floating and like.dtype.is_floating:
        return tf.cast(tensor, like.dtype)
    return tensor
