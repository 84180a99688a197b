"""The back end for tensors in host memory.

Knows tensors of TensorFlow and which loop serves which pass; the loops themselves, on
NumPy arrays, are in `cpu_loops`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from sparse_conv import bridge, costs
from sparse_conv.backends import cpu_loops, cpu_threads
from sparse_conv.backends.cpu_vectors import VECTOR_BYTES
from sparse_conv.bridge import HOST, Place
from sparse_conv.costs import Estimate
from sparse_conv.costs.terms import sparse_terms
from sparse_conv.gather import Gather, dgrad_gather, fprop_gather
from sparse_conv.pattern import Pattern
from sparse_conv.problem import Problem
from sparse_conv.tensor_cache import cached

# float32 numbers in a vector -> the machines whose costs were measured.
_KINDS = {16: "cpu-avx512", 8: "cpu-avx2"}
_NEVER_BAKED = (
    "the CPU back end generates no code for a pattern: its loops read patterns at run "
    "time"
)


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
    dtype: tf.DType,
    place: Place,
    pattern: Pattern | None,
    *,
    algorithm: str,
    has_bias: bool,
    activation: int,
    shape: tuple[int, ...],
) -> Callable[..., tf.Tensor]:
    """The forward pass."""
    del algorithm, has_bias
    gather = fprop_gather(problem)

    def run(x: tf.Tensor, w: tf.Tensor, bias: tf.Tensor | None = None) -> tf.Tensor:
        entries = _entries("fprop", w, pattern, gather)
        y, write = _new(shape, dtype)
        cpu_loops.gather_entries(
            entries,
            _view(x).reshape(problem.input_shape),
            write.reshape(problem.output_shape),
            None if bias is None else _view(bias),
            activation,
        )
        return _finished(y, dtype, place)

    return run


def dgrad(
    problem: Problem,
    dtype: tf.DType,
    place: Place,
    pattern: Pattern | None,
    *,
    algorithm: str,
    shape: tuple[int, ...],
) -> Callable[..., tf.Tensor]:
    """The gradient to the input."""
    del algorithm
    gather = dgrad_gather(problem)

    def run(dy: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
        entries = _entries("dgrad", w, pattern, gather)
        dx, write = _new(shape, dtype)
        cpu_loops.gather_entries(
            entries,
            _view(dy).reshape(problem.output_shape),
            write.reshape(problem.input_shape),
        )
        return _finished(dx, dtype, place)

    return run


def wgrad(
    problem: Problem,
    dtype: tf.DType,
    place: Place,
    pattern: Pattern | None,
    *,
    algorithm: str,
) -> Callable[..., tf.Tensor]:
    """The gradient to the values of the pattern, or to the dense kernel."""
    del algorithm
    gather = fprop_gather(problem)

    def run(x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        read = _view(x).reshape(problem.input_shape)
        gradient = _view(dy).reshape(problem.output_shape)
        if pattern is None:
            dw, write = _new(problem.kernel_shape, dtype)
            cpu_loops.wgrad_dense(gather, read, gradient, write)
        else:
            dw, write = _new((pattern.nnz,), dtype)
            cpu_loops.wgrad(gather, pattern.fprop_rows(), read, gradient, write)
        return _finished(dw, dtype, place)

    return run


def machine(place: Place) -> costs.Machine:
    """The vectors and threads that a call uses, wherever its tensors live."""
    del place
    lanes = VECTOR_BYTES // 4
    kind = _KINDS.get(lanes, "cpu-avx2")
    return costs.Machine(kind, cpu_threads.thread_count(), lanes)


def estimates(
    pass_name: str,
    problem: Problem,
    dtype: tf.DType,
    place: Place,
    nnz: int,
    has_pattern: bool,
) -> tuple[Estimate, ...]:
    """What each algorithm would take; see `sparse_conv.backends`."""
    del has_pattern
    return _estimates(pass_name, problem, dtype, nnz, machine(place))


@functools.lru_cache(maxsize=4096)
def _estimates(
    pass_name: str, problem: Problem, dtype: tf.DType, nnz: int, machine: costs.Machine
) -> tuple[Estimate, ...]:
    terms = sparse_terms(pass_name, problem, nnz, dtype.size, machine)
    predicted = costs.microseconds(machine, f"generic {pass_name}", terms)
    predicted *= costs.dtype_factor(machine, "generic", dtype.name)
    return (
        Estimate("generic", predicted, f"loops over the {nnz} weights"),
        Estimate("baked", None, _NEVER_BAKED),
    )


def nonzeros(w: tf.Tensor) -> int:
    """The nonzeros of a dense kernel, counted once for each tensor."""
    return cached(w, "nonzeros", lambda: int(np.count_nonzero(_view(w))))


def finish_compiling() -> None:
    """Returns at once: what is compiled is compiled by the call that needs it."""


def _wide(dtype: tf.DType) -> tf.DType:
    """The dtype that the loops compute in."""
    return tf.float32 if dtype.size == 2 else dtype


def _view(tensor: tf.Tensor) -> np.ndarray:
    """The elements as the loops take them; copied if they live on a GPU."""
    with tf.device(HOST.device):
        if bridge.place_of(tensor).kind == "GPU":
            tensor = tf.identity(tensor)
        return bridge.host_view(tf.cast(tensor, _wide(tensor.dtype)))


def _new(shape: tuple[int, ...], dtype: tf.DType) -> tuple[tf.Tensor, np.ndarray]:
    """A tensor with arbitrary contents, and the view through which to fill it."""
    tensor = bridge.empty(shape, _wide(dtype), HOST)
    return tensor, bridge.host_view(tensor)


def _finished(tensor: tf.Tensor, dtype: tf.DType, place: Place) -> tf.Tensor:
    """A filled tensor in the caller's dtype, where its operands live."""
    with tf.device(HOST.device):
        tensor = tf.cast(tensor, dtype)
    if place.kind == "CPU":
        return tensor
    with tf.device(place.device):
        return tf.identity(tensor)


def _entries(
    name: str, w: tf.Tensor, pattern: Pattern | None, gather: Gather
) -> cpu_loops.Entries:
    """A kernel's entries as a pass's loops walk them, prepared once for each tensor."""

    def build() -> cpu_loops.Entries:
        known, values = _sparse(w, pattern)
        rows = known.fprop_rows() if name == "fprop" else known.dgrad_rows(gather)
        return cpu_loops.prepare(gather, rows, values)

    # One tensor may hold the values of several patterns, and the gathers of both passes
    # are equal for a 1x1 kernel with as many inputs as outputs.
    owner = None if pattern is None else weakref.ref(pattern)
    return cached(w, (name, gather, owner, cpu_threads.thread_count()), build)


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
