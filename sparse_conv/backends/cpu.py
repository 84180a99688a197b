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
from sparse_conv.backends import (
    cpu_assembly,
    cpu_code,
    cpu_loops,
    cpu_memory,
    cpu_threads,
)
from sparse_conv.bridge import HOST, Place
from sparse_conv.costs import Estimate
from sparse_conv.costs.terms import code_terms, sparse_terms
from sparse_conv.gather import Gather, dgrad_gather, fprop_gather
from sparse_conv.pattern import Pattern, Rows
from sparse_conv.problem import Problem
from sparse_conv.tensor_cache import cached


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
    return [cpu_code.folder()]


def fprop(
    problem: Problem,
    dtype: tf.DType,
    place: Place,
    pattern: Pattern | None,
    *,
    algorithm: str,
    waits: bool,
    constant: bool,
    has_bias: bool,
    activation: int,
    shape: tuple[int, ...],
) -> Callable[..., tf.Tensor]:
    """The forward pass."""
    del waits, has_bias
    gather, baked = fprop_gather(problem), algorithm == "baked"
    wide = _wide(dtype)

    def run(x: tf.Tensor, w: tf.Tensor, bias: tf.Tensor | None = None) -> tf.Tensor:
        entries = _entries("fprop", w, pattern, gather, constant, baked)
        read, shift = _memory(x), None if bias is None else _memory(bias)
        y, write = cpu_memory.output(shape, wide)
        cpu_loops.run_gather(
            entries, read.address, write, shift.address if shift else 0, activation
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
    waits: bool,
    constant: bool,
    shape: tuple[int, ...],
) -> Callable[..., tf.Tensor]:
    """The gradient to the input."""
    del waits
    gather, baked = dgrad_gather(problem), algorithm == "baked"
    wide = _wide(dtype)

    def run(dy: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
        entries = _entries("dgrad", w, pattern, gather, constant, baked)
        read = _memory(dy)
        dx, write = cpu_memory.output(shape, wide)
        cpu_loops.run_gather(entries, read.address, write)
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
    wide = _wide(dtype)
    numbers = np.dtype(wide.as_numpy_dtype)

    def at_nonzeros(x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        entries = pattern.cached(
            ("cpu_wgrad", gather, numbers),
            lambda: cpu_loops.prepare_wgrad(gather, pattern.fprop_rows(), numbers),
        )
        read, gradient = _memory(x), _memory(dy)
        dw, write = _new((pattern.nnz,), wide)
        cpu_loops.run_wgrad(
            entries, read.address, gradient.address, write, _wanted_threads()
        )
        return _finished(dw, dtype, place)

    def dense(x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        read = _view(x).reshape(problem.input_shape)
        gradient = _view(dy).reshape(problem.output_shape)
        dw, write = _new(problem.kernel_shape, wide)
        cpu_loops.wgrad_dense(gather, read, gradient, write, _wanted_threads())
        return _finished(dw, dtype, place)

    return dense if pattern is None else at_nonzeros


def machine(place: Place) -> costs.Machine:
    """The vectors and threads that a call uses, wherever its tensors live."""
    del place
    lanes = cpu_code.vector_bytes() // 4
    threads = cpu_threads.thread_count(_wanted_threads())
    return costs.Machine(f"cpu-{cpu_code.core()}", threads, lanes)


def estimates(
    pass_name: str,
    problem: Problem,
    dtype: tf.DType,
    place: Place,
    nnz: int,
    constant: bool,
    sparse: bool,
) -> tuple[Estimate, ...]:
    """What each algorithm would take; see `sparse_conv.backends`."""
    del constant
    return _estimates(pass_name, problem, dtype, nnz, sparse, machine(place))


@functools.lru_cache(maxsize=4096)
def _estimates(
    pass_name: str,
    problem: Problem,
    dtype: tf.DType,
    nnz: int,
    sparse: bool,
    machine: costs.Machine,
) -> tuple[Estimate, ...]:
    terms = sparse_terms(pass_name, problem, nnz, dtype.size, machine)
    generic = costs.microseconds(machine, f"generic {pass_name}", terms)
    generic *= costs.dtype_factor(machine, "generic", dtype.name)
    loops = Estimate("generic", generic, f"loops over the {nnz} weights")
    reason = _reason_against_code(pass_name, dtype, sparse)
    if reason is not None:
        return loops, Estimate("baked", None, reason)
    model = f"baked {pass_name}"
    if not costs.has_model(machine, model):
        reason = "code for the pattern, which nobody measured on this kind of core"
        return loops, Estimate("baked", generic, reason)
    terms = code_terms(pass_name, problem, nnz, dtype.size, machine)
    baked = costs.microseconds(machine, model, terms)
    baked *= costs.dtype_factor(machine, "baked", dtype.name)
    return loops, Estimate("baked", baked, "code for the pattern")


def _reason_against_code(pass_name: str, dtype: tf.DType, sparse: bool) -> str | None:
    """Why no code can be generated for a pass; None if it can."""
    if pass_name == "wgrad":
        return "the gradient to the kernel has no weights"
    if not sparse:
        return "code is generated for the pattern of a SparseKernel"
    if dtype.is_integer:
        return "code is generated for floating-point numbers only"
    return cpu_assembly.unavailable()


def tune(*_: object) -> None:
    """Returns at once: code follows from a pattern and from sizes alone."""


def tuned(*_: object) -> None:
    """Nothing is chosen by times."""


def nonzeros(w: tf.Tensor) -> int:
    """The nonzeros of a dense kernel, counted once for each tensor."""
    return cached(w, "nonzeros", lambda: int(np.count_nonzero(_view(w))))


def finish_compiling() -> None:
    """Returns at once: what is compiled is compiled by the call that needs it."""


def _wide(dtype: tf.DType) -> tf.DType:
    """The dtype that the loops compute in."""
    return tf.float32 if dtype.size == 2 else dtype


def _on_host(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor in host memory, in a dtype that the loops compute in."""
    if tensor.dtype.size != 2 and bridge.place_of(tensor).kind == "CPU":
        return tensor
    with tf.device(HOST.device):
        return tf.cast(tf.identity(tensor), _wide(tensor.dtype))


def _memory(tensor: tf.Tensor) -> bridge.Memory:
    """The elements as the loops take them; copied if they live on a GPU."""
    return bridge.memory_of(_on_host(tensor))


def _view(tensor: tf.Tensor) -> np.ndarray:
    """The same as an array."""
    return bridge.host_view(_on_host(tensor))


def _new(shape: tuple[int, ...], dtype: tf.DType) -> tuple[tf.Tensor, np.ndarray]:
    """A tensor with arbitrary contents, and the view through which to fill it."""
    tensor, _ = cpu_memory.output(shape, dtype)
    return tensor, bridge.host_view(tensor)


def _finished(tensor: tf.Tensor, dtype: tf.DType, place: Place) -> tf.Tensor:
    """A filled tensor in the caller's dtype, where its operands live."""
    if tensor.dtype != dtype:
        with tf.device(HOST.device):
            tensor = tf.cast(tensor, dtype)
    if place.kind == "CPU":
        return tensor
    with tf.device(place.device):
        return tf.identity(tensor)


@functools.cache
def _wanted_threads() -> int:
    """What `tf.config.threading` was told, 0 if it was not. It can't change any more.

    TensorFlow takes a number until it has run its first operation.
    """
    return tf.config.threading.get_intra_op_parallelism_threads()


def _entries(
    name: str,
    w: tf.Tensor,
    pattern: Pattern | None,
    gather: Gather,
    constant: bool,
    baked: bool,
) -> cpu_loops.Entries:
    """A kernel's entries as a pass's loops walk them, prepared once for each tensor."""
    threads = cpu_threads.thread_count(_wanted_threads())

    def build() -> cpu_loops.Entries:
        known, values = _sparse(w, pattern)

        def rows() -> Rows:
            return known.fprop_rows() if name == "fprop" else known.dgrad_rows(gather)

        if constant or pattern is None:
            return cpu_loops.prepare(gather, rows(), values, _wanted_threads(), baked)
        # Training changes the values at every step, and only them.
        placement = pattern.cached(
            ("cpu", name, gather, values.dtype, threads, baked),
            lambda: cpu_loops.place(
                gather, rows(), values.dtype, _wanted_threads(), baked
            ),
        )
        return cpu_loops.fill(placement, values)

    # One tensor may hold the values of several patterns, and the gathers of both passes
    # are equal for a 1x1 kernel with as many inputs as outputs.
    owner = None if pattern is None else weakref.ref(pattern)
    return cached(w, (name, gather, owner, threads, baked), build)


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
