"""The contenders: ours, TensorFlow's convolution, the original operator's method.

A side computes the convolution of one case on inputs that take turns, and can say how
its device work is enqueued. Knows how each is called; does not know how long it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from bench import check
from bench.cases import Case
from bench.gate import Gate, Recorded, recorded_launches
from bench.machine import Target
from bench.naive import NaiveGpu, naive_cpu
from bench.ours import Prepared
from bench.timing import Ring
from sparse_conv import bridge

# In the order of the tables.
SIDES = ("ours", "dense", "dense_fp32", "naive")
# Above this the plain loops take seconds on a CPU.
MOST_NAIVE_CPU_FMAS = 1.5e9
_MOST_ROTATION_BYTES = 1 << 29
_MOST_ROTATION = 40


@dataclass(frozen=True, slots=True)
class Operands:
    """What all sides of a case compute with.

    Attributes:
        inputs: Equal shapes; calls take them in turns. They do not fit in the cache
            together with the outputs, as far as memory allows.
        dense: (R, S, C, K) kernel with its zeros.
        exact: The float64 result of the first input.
        terms: The nonzeros that an output sums, on average.
    """

    inputs: Sequence[tf.Tensor]
    dense: tf.Tensor
    exact: tf.Tensor
    terms: float

    def input(self, number: int) -> tf.Tensor:
        """The input of call `number`."""
        return self.inputs[number % len(self.inputs)]

    def error(self, y: Any) -> float:
        """The error of the result for the first input."""
        return check.relative_error(y, self.exact)


@dataclass(slots=True)
class Side:
    """One contender, ready to be checked and timed.

    Attributes:
        name: One of SIDES.
        call: Makes call `number`, as a program would.
        error: The error of what call 0 returns.
        tf32: TensorFlow's setting while it runs.
        limit: The largest error that rounding explains.
        facts: What the results keep beside times.
        recorded: Launches of each call to enqueue again; None to make calls.
    """

    name: str
    call: Callable[[int], Any]
    error: Callable[[Any], float]
    tf32: bool
    limit: float
    facts: dict[str, Any] = field(default_factory=dict)
    recorded: list[list[Recorded]] | None = None


@contextmanager
def tensor_float_32(enabled: bool) -> Any:
    """A context with TensorFlow's setting of TF32."""
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(enabled)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


def rotation(io_bytes: int, cache_bytes: int, *, on_gpu: bool) -> int:
    """How many inputs take turns.

    On a GPU the cache is overwritten before each sample, so that more inputs than a
    sample has calls would change nothing. On a CPU they exceed the cache.
    """
    wanted = math.ceil(2 * cache_bytes / io_bytes) + 1
    affordable = _MOST_ROTATION_BYTES // io_bytes
    most = _MOST_ROTATION if on_gpu else 4 * _MOST_ROTATION
    return max(2, min(wanted, affordable, most))


def random_tensor(shape: tuple[int, ...], dtype: str, seed: int) -> tf.Tensor:
    """Normal numbers, made where they are needed: NumPy takes seconds for some."""
    normal = tf.random.stateless_normal(shape, (seed, 0))
    return tf.cast(normal, dtype)


def make_operands(case: Case, kernel: np.ndarray, target: Target) -> Operands:
    """Makes the inputs, uploads the kernel, and computes the reference."""
    count = rotation(case.io_bytes, target.cache_bytes, on_gpu=target.on_gpu)
    first = random_tensor(case.input_shape, case.dtype, 1)
    # Copies: only the first one's result is compared.
    inputs = [first, *(first + 0 for _ in range(count - 1))]
    dense = tf.constant(kernel)
    exact = check.reference(first, dense)
    return Operands(inputs, dense, exact, np.count_nonzero(kernel) / case.k)


def our_side(
    case: Case, operands: Operands, target: Target, prepared: Prepared
) -> Side:
    """Ours, with a SparseKernel that was converted and prepared before."""
    side = Side(
        "ours",
        lambda number: prepared(operands.input(number)),
        operands.error,
        True,
        dense_limit(case, operands.terms, target, tf32=True)
        if prepared.chosen == "dense"
        else check.limit(case.dtype, operands.terms),
        {
            "algorithm_asked": prepared.asked,
            "algorithm": prepared.chosen,
            "reason": prepared.reason,
            "prepare_s": prepared.seconds,
        },
    )
    if target.on_gpu:
        side.recorded = record(side.call, len(operands.inputs))
    return side


def dense_limit(case: Case, terms: float, target: Target, *, tf32: bool) -> float:
    """The largest error of TensorFlow's convolution that rounding explains.

    Args:
        case: The convolution.
        terms: How many products an output sums.
        target: The device; a CPU has no TF32.
        tf32: TensorFlow's setting.

    Returns:
        Relative to the result.
    """
    in_tf32 = tf32 and target.on_gpu
    return check.limit(case.dtype, terms, tf32=in_tf32, transformed=True)


def dense_side(case: Case, operands: Operands, target: Target, *, tf32: bool) -> Side:
    """`tf.nn.conv2d`, with TF32 or without where that makes a difference."""

    def call(number: int) -> tf.Tensor:
        return tf.nn.conv2d(operands.input(number), operands.dense, 1, "SAME")

    limit = dense_limit(case, operands.terms, target, tf32=tf32)
    name = "dense" if tf32 else "dense_fp32"
    return Side(name, call, operands.error, tf32, limit)


def why_not_naive(case: Case, fmas: int, target: Target) -> str | None:
    """Why the original's method is not measured; None if it is."""
    if case.dtype != "float32":
        return f"the original's method has no {case.dtype}"
    if not target.on_gpu and fmas > MOST_NAIVE_CPU_FMAS:
        return f"takes a CPU seconds: more than {MOST_NAIVE_CPU_FMAS:.1e} FMAs"
    return None


def naive_side(case: Case, operands: Operands, target: Target) -> Side:
    """The original operator's method.

    Its call converts the dense kernel, as the original did. Its device time is that of
    the convolution alone.
    """
    limit = check.limit(case.dtype, operands.terms)
    if not target.on_gpu:
        inputs = [x.numpy() for x in operands.inputs]
        kernel = operands.dense.numpy()
        return Side(
            "naive",
            lambda number: naive_cpu(inputs[number % len(inputs)], kernel),
            operands.error,
            True,
            limit,
        )
    naive = NaiveGpu(case, target.place)
    # The recorded launches find the nonzeros that a call has listed.
    naive(operands.inputs[0], operands.dense)
    return Side(
        "naive",
        lambda number: naive(operands.input(number), operands.dense),
        operands.error,
        True,
        limit,
        recorded=[naive.convolution(x) for x in operands.inputs],
    )


def record(call: Callable[[int], Any], count: int) -> list[list[Recorded]] | None:
    """The launches of calls 0 to `count` - 1; None if the package launches nothing."""
    call(0)
    calls = []
    for number in range(count):
        with recorded_launches() as launches:
            call(number)
        calls.append(launches)
    return calls if all(calls) else None


def replays(side: Side, gate: Gate) -> bool:
    """Whether the launches of call 0 compute its whole result when enqueued again.

    The result is poisoned in between.
    """
    with recorded_launches() as launches:
        results = side.call(0)
    for tensor in tf.nest.flatten(results):
        size = tensor.dtype.size * math.prod(tensor.shape)
        gate.fill(bridge.memory_of(tensor), size, 0xFF)
    gate.replay([launches])(1)
    return check.verdict(side.error(results), side.limit) is None


def enqueuer(side: Side, gate: Gate, ring: int) -> Callable[[int], None]:
    """What enqueues the device work of some calls; see `gate`."""
    if side.recorded is not None:
        return gate.replay(side.recorded)
    outputs = Ring(ring)
    # Memory that TensorFlow asks the driver for would hold the host up at the gate.
    for position in range(ring):
        outputs.keep(side.call(position))
    position = 0

    def enqueue(count: int) -> None:
        nonlocal position
        for _ in range(count):
            outputs.keep(side.call(position))
            position += 1

    return enqueue
