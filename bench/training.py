"""`training`: a step, forward and both gradients, eagerly, ours and TensorFlow's.

The gradient of the output is given. Ours goes to the input and to the nonzeros of a
SparseKernel; TensorFlow's to the input and to the whole dense kernel. Compared with the
float64 gradients, the kernel's at the nonzeros alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from bench import cases, check, ours
from bench.cases import Case, useful_fmas
from bench.machine import Target
from bench.measure import Bench, Report, Row, add_fp32, begin_row, fill_row
from bench.results import Results
from bench.session import Session
from bench.sides import Side, dense_limit, random_tensor, record, rotation

# Each does the useful FMAs once, and so the floor counts them.
PASSES = 3
_Step = tuple[tf.Tensor, tf.Tensor, tf.Tensor]


@dataclass(frozen=True, slots=True)
class Operands:
    """What both sides compute a step with.

    Attributes:
        inputs: Equal shapes; steps take them in turns.
        gradients: The output's gradient for each input.
        dense: The kernel.
        exact: The float64 output and gradients for the first input.
    """

    inputs: list[tf.Tensor]
    gradients: list[tf.Tensor]
    dense: tf.Tensor
    exact: _Step


def run(session: Session) -> Results:
    """Measures the steps."""
    steps = list(cases.training_cases(on_gpu=session.target.on_gpu))
    if session.options.quick:
        steps = [step for step in steps if step.h <= 14 and step.density == 0.1]
    results = session.results("training")
    session.fill(
        results, steps, lambda case, tell: measure_step(case, session.bench, tell)
    )
    return results


def measure_step(case: Case, bench: Bench, tell: Report) -> Row:
    """Measures both sides on a case; as `measure.measure` does for convolutions."""
    tell("inputs")
    kernel = case.kernel()
    operands = _operands(case, kernel, bench.target)
    fmas = PASSES * useful_fmas(case, kernel)
    # Input, output and the gradients of both.
    row = begin_row(case, fmas, io_bytes=2 * case.io_bytes)
    tell("compiling")
    sides = [
        _our_side(case, operands, bench),
        _dense_side(case, operands, bench.target, tf32=True),
    ]
    fill_row(row, sides, len(operands.inputs), bench, tell)
    add_fp32(row, "training", case, bench, tell)
    return row


def _operands(case: Case, kernel: np.ndarray, target: Target) -> Operands:
    count = rotation(2 * case.io_bytes, target.cache_bytes, on_gpu=target.on_gpu)
    x = random_tensor(case.input_shape, case.dtype, 1)
    dy = random_tensor(case.output_shape, case.dtype, 2)
    dense = tf.constant(kernel)
    wide = [tf.cast(tensor, tf.float64) for tensor in (x, dense, dy)]
    exact = _step(lambda x: tf.nn.conv2d(x, wide[1], 1, "SAME"), wide[0], *wide[1:])
    return Operands(
        [x, *(x + 0 for _ in range(count - 1))],
        [dy, *(dy + 0 for _ in range(count - 1))],
        dense,
        exact,
    )


def _step(
    convolve: Callable[[tf.Tensor], tf.Tensor],
    x: tf.Tensor,
    weights: Any,
    dy: tf.Tensor,
) -> _Step:
    """The output, its gradient to the input, and its gradient to the weights."""
    with tf.GradientTape() as tape:
        tape.watch((x, weights))
        y = convolve(x)
    dx, dw = tape.gradient(y, (x, weights), output_gradients=dy)
    return y, dx, dw


def dense_entry(case: Case, bench: Bench) -> Row:
    """The entry of TensorFlow with TF32 off; for a process where it always is."""
    operands = _operands(case, case.kernel(), bench.target)
    side = _dense_side(case, operands, bench.target, tf32=False)
    row = {"sides": {}}
    fill_row(row, [side], len(operands.inputs), bench, lambda step: None)
    return row["sides"][side.name]


def _terms(case: Case) -> int:
    """The products of the longest sum, which may be the kernel's gradient."""
    return max(case.n * case.h * case.w, case.taps**2 * max(case.c, case.k))


def _dense_side(case: Case, operands: Operands, target: Target, *, tf32: bool) -> Side:
    def step(number: int) -> _Step:
        turn = number % len(operands.inputs)
        return _step(
            lambda x: tf.nn.conv2d(x, operands.dense, 1, "SAME"),
            operands.inputs[turn],
            operands.dense,
            operands.gradients[turn],
        )

    name = "dense" if tf32 else "dense_fp32"
    limit = dense_limit(case, _terms(case), target, tf32=tf32)
    return Side(name, step, lambda result: _error(result, operands), tf32, limit)


def _our_side(case: Case, operands: Operands, bench: Bench) -> Side:
    first = operands.inputs[0]
    prepared = ours.prepare(
        first,
        operands.dense,
        bench.algorithm,
        measure=bench.measured_choice,
        training=True,
    )
    kernel = prepared.kernel

    def step(number: int) -> _Step:
        turn = number % len(operands.inputs)
        x, dy = operands.inputs[turn], operands.gradients[turn]
        return _step(prepared, x, kernel.values, dy)

    def error(step: _Step) -> float:
        y, dx, dw = step
        return _error((y, dx, kernel.with_values(dw).to_dense()), operands)

    limit = check.limit(case.dtype, _terms(case))
    if "dense" in prepared.chosen:
        limit = dense_limit(case, _terms(case), bench.target, tf32=True)
    facts = {"algorithm": prepared.chosen, "reason": prepared.reason}
    side = Side("ours", step, error, True, limit, facts)
    if bench.target.on_gpu:
        side.recorded = record(step, len(operands.inputs))
    return side


def _error(step: _Step, operands: Operands) -> float:
    """The largest of the three errors; the kernel's where its weights are not zero."""
    kept = operands.dense != 0
    zero = tf.zeros((), tf.float64)
    y, dx, dw = (tf.cast(tensor, tf.float64) for tensor in step)
    exact_y, exact_dx, exact_dw = operands.exact
    pairs = (
        (y, exact_y),
        (dx, exact_dx),
        (tf.where(kept, dw, zero), tf.where(kept, exact_dw, zero)),
    )
    errors = [check.relative_error(result, exact) for result, exact in pairs]
    # Unlike Python's, this maximum keeps a NaN.
    return float(np.max(errors))
