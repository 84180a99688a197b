"""The back end for tensors in host memory.

Knows tensors of TensorFlow and which loop serves which pass; the loops themselves, on
NumPy arrays, are in `cpu_loops`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from sparse_conv import bridge
from sparse_conv.backends import cpu_loops
from sparse_conv.bridge import Place
from sparse_conv.gather import dgrad_gather, fprop_gather
from sparse_conv.pattern import Pattern
from sparse_conv.problem import Problem
from sparse_conv.tensor_cache import cached

_HOST = Place("CPU", 0, "/job:localhost/replica:0/task:0/device:CPU:0")


def unavailable() -> str | None:
    """None: every machine has a CPU."""
    return None


def reason_against(place: Place, dtype: tf.DType, forced: bool) -> str | None:
    """Why this back end doesn't compute for tensors at `place`; None if it does."""
    del dtype
    if place.kind == "CPU" or forced:
        return None
    return (
        f'the tensors live on {place.device}; `backend="cpu"` would copy them to the '
        "host and back"
    )


def caches() -> list[Path]:
    """Where the compiled loops are kept."""
    return cpu_loops.caches()


def fprop(
    problem: Problem,
    x: tf.Tensor,
    w: tf.Tensor,
    pattern: Pattern | None,
    bias: tf.Tensor | None,
    activation: int,
    shape: tuple[int, ...],
) -> tf.Tensor:
    """The forward pass."""
    pattern, values = _sparse(w, pattern)
    gather = fprop_gather(problem)
    read = _view(x)
    bias = None if bias is None else _view(bias)

    def fill(write: np.ndarray) -> None:
        cpu_loops.gather(
            gather,
            pattern.fprop_rows(),
            values,
            read.reshape(problem.input_shape),
            write.reshape(problem.output_shape),
            bias,
            activation,
        )

    return _filled(shape, x.dtype, fill)


def dgrad(
    problem: Problem,
    dy: tf.Tensor,
    w: tf.Tensor,
    pattern: Pattern | None,
    shape: tuple[int, ...],
) -> tf.Tensor:
    """The gradient to the input."""
    pattern, values = _sparse(w, pattern)
    gather = dgrad_gather(problem)
    read = _view(dy)

    def fill(write: np.ndarray) -> None:
        cpu_loops.gather(
            gather,
            pattern.dgrad_rows(gather),
            values,
            read.reshape(problem.output_shape),
            write.reshape(problem.input_shape),
        )

    return _filled(shape, dy.dtype, fill)


def wgrad(
    problem: Problem, x: tf.Tensor, dy: tf.Tensor, pattern: Pattern | None
) -> tf.Tensor:
    """The gradient to the values of the pattern, or to the dense kernel."""
    gather = fprop_gather(problem)
    read = _view(x).reshape(problem.input_shape)
    gradient = _view(dy).reshape(problem.output_shape)
    if pattern is None:

        def fill(write: np.ndarray) -> None:
            cpu_loops.wgrad_dense(gather, read, gradient, write)

        return _filled(problem.kernel_shape, x.dtype, fill)

    def fill_values(write: np.ndarray) -> None:
        cpu_loops.wgrad(gather, pattern.fprop_rows(), read, gradient, write)

    return _filled((pattern.nnz,), x.dtype, fill_values)


def _wide(dtype: tf.DType) -> tf.DType:
    """The dtype that the loops compute in."""
    return tf.float32 if dtype.size == 2 else dtype


def _view(tensor: tf.Tensor) -> np.ndarray:
    with tf.device(_HOST.device):
        return bridge.host_view(tf.cast(tensor, _wide(tensor.dtype)))


def _filled(
    shape: tuple[int, ...], dtype: tf.DType, fill: Callable[[np.ndarray], None]
) -> tf.Tensor:
    """A new tensor of that shape and dtype, with the contents that `fill` writes."""
    y = bridge.empty(tuple(shape), _wide(dtype), _HOST)
    fill(bridge.host_view(y))
    with tf.device(_HOST.device):
        return tf.cast(y, dtype)


def _sparse(w: tf.Tensor, pattern: Pattern | None) -> tuple[Pattern, np.ndarray]:
    """The pattern and the values of a kernel, converted if it is dense."""
    if pattern is not None:
        return pattern, _view(w)
    return cached(w, "cpu", lambda: _compress(_view(w)))


def _compress(dense: np.ndarray) -> tuple[Pattern, np.ndarray]:
    # Rows are output channels and input channels come before taps: see Pattern.
    rows = np.ascontiguousarray(dense.transpose(3, 2, 0, 1)).reshape(dense.shape[3], -1)
    k, indices = np.nonzero(rows)
    counts = np.bincount(k, minlength=dense.shape[3])
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    pattern = Pattern(dense.shape, indptr, indices.astype(np.int32))
    return pattern, rows[k, indices]
