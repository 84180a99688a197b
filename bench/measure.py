"""One row of the results: a case, its contenders checked, then timed.

A contender whose result is wrong gets no time; its row says why. So does one whose
device time can't be had. Times of one row were taken in turns, by one method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bench import check, ours
from bench.cases import Case, useful_fmas
from bench.gate import Gate, GateError
from bench.machine import Target
from bench.sides import (
    Side,
    dense_side,
    enqueuer,
    make_operands,
    naive_side,
    our_side,
    replays,
    tensor_float_32,
    why_not_naive,
)
from bench.timing import Effort, Quartiles, Ring, Sampler, call_sampler, in_turns

Row = dict[str, Any]
# A program on a CPU frees an output soon, and the next one takes its memory, whoever
# computes it; new memory would cost more than the convolution.
_CPU_RING = 2
# Tells the user what is being done.
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Bench:
    """What all rows of a run share.

    Attributes:
        target: The device.
        gate: Its gate; None on a CPU.
        effort: How long each contender is sampled.
        algorithm: The algorithm of ours.
        measured_choice: Whether ours is chosen by times that `prepare` measures.
        fp32: Measures TensorFlow with TF32 off, given "convolution" or "training" and a
            case; None where that is no difference.
    """

    target: Target
    gate: Gate | None
    effort: Effort
    algorithm: str
    measured_choice: bool = False
    fp32: Callable[[str, Case], Row] | None = None


def measure(case: Case, bench: Bench, report: Report) -> Row:
    """Measures all contenders on a case.

    Args:
        case: The convolution.
        bench: What all rows share.
        report: Is told each step.

    Returns:
        The row, ready for JSON.
    """
    report("inputs")
    kernel = case.kernel()
    fmas = useful_fmas(case, kernel)
    operands = make_operands(case, kernel, bench.target)
    row = begin_row(case, fmas)
    sides = []
    report("compiling")
    try:
        prepared = ours.prepare(
            operands.inputs[0],
            operands.dense,
            bench.algorithm,
            measure=bench.measured_choice,
        )
        sides.append(our_side(case, operands, bench.target, prepared))
    except NotImplementedError as error:
        row["sides"]["ours"] = {"refused": str(error)}
    sides.append(dense_side(case, operands, bench.target, tf32=True))
    refusal = why_not_naive(case, fmas, bench.target)
    if refusal is None:
        sides.append(naive_side(case, operands, bench.target))
    else:
        row["sides"]["naive"] = {"refused": refusal}
    fill_row(row, sides, len(operands.inputs), bench, report)
    add_fp32(row, "convolution", case, bench, report)
    return row


def add_fp32(row: Row, kind: str, case: Case, bench: Bench, report: Report) -> None:
    """Adds TensorFlow with TF32 off to a row, where that makes a difference."""
    if bench.fp32 is not None and case.dtype == "float32":
        report("TensorFlow in float32")
        row["sides"]["dense_fp32"] = bench.fp32(kind, case)


def dense_entry(case: Case, bench: Bench) -> Row:
    """The entry of TensorFlow with TF32 off; for a process where it always is."""
    operands = make_operands(case, case.kernel(), bench.target)
    side = dense_side(case, operands, bench.target, tf32=False)
    row = {"sides": {}}
    fill_row(row, [side], len(operands.inputs), bench, lambda step: None)
    return row["sides"][side.name]


def begin_row(case: Case, fmas: int, io_bytes: int | None = None) -> Row:
    """A row without contenders: what is computed, and what decides its floor.

    Args:
        case: The convolution.
        fmas: The FMAs that are not with zeros.
        io_bytes: The bytes; None means to read the input and write the output once.

    Returns:
        The row.
    """
    return {
        "key": str(case),
        "case": asdict(case),
        "shape": case.shape_text,
        "useful_fmas": fmas,
        "io_bytes": case.io_bytes if io_bytes is None else io_bytes,
        "sides": {},
    }


def fill_row(
    row: Row, sides: list[Side], rotation: int, bench: Bench, report: Report
) -> None:
    """Checks the contenders and adds the times of those that are right.

    Args:
        row: What `begin_row` made.
        sides: The contenders.
        rotation: How many inputs take turns.
        bench: What all rows share.
        report: Is told each step.
    """
    right = []
    for side in sides:
        report(f"checking {side.name}")
        entry, refusal = checked(side)
        row["sides"][side.name] = entry
        if refusal is None:
            right.append(side)
    report("timing calls")
    shared = None if bench.target.on_gpu else Ring(_CPU_RING)
    calls = {side.name: _call_sampler(side, shared or Ring(rotation)) for side in right}
    for name, quartiles in in_turns(calls, bench.effort).items():
        row["sides"][name]["call_us"] = quartiles.as_dict()
    if bench.gate is not None:
        report("timing the device")
        times = device_times(row, right, bench, rotation)
        for name, quartiles in times.items():
            row["sides"][name]["device_us"] = quartiles.as_dict()


def checked(side: Side) -> tuple[dict[str, Any], str | None]:
    """A contender's entry without times, and why it gets none (None if it does)."""
    with tensor_float_32(side.tf32):
        error = side.error(side.call(0))
    refusal = check.verdict(error, side.limit)
    entry = {
        **side.facts,
        # JSON has neither NaN nor infinity; the refusal tells them.
        "error": error if math.isfinite(error) else None,
        "error_limit": side.limit,
        "tf32": side.tf32,
    }
    if refusal is not None:
        entry["refused"] = refusal
    return entry, refusal


def _call_sampler(side: Side, outputs: Ring) -> Sampler:
    with tensor_float_32(side.tf32):
        return _with_tf32(side, call_sampler(side.call, outputs))


def _with_tf32(side: Side, sampler: Sampler) -> Sampler:
    """`sampler` under the contender's setting of TF32."""

    def sample() -> float:
        with tensor_float_32(side.tf32):
            return sampler.sample()

    return Sampler(sample, sampler.calls)


def device_times(
    row: Row, sides: list[Side], bench: Bench, rotation: int
) -> Mapping[str, Quartiles]:
    """The device times of those contenders that have one."""
    samplers = {}
    for side in sides:
        entry = row["sides"][side.name]
        is_ours = side.name == "ours" and side.recorded is not None
        if is_ours and not replays(side, bench.gate):
            side.recorded = None
        entry["enqueued"] = "calls" if side.recorded is None else "recorded launches"
        try:
            with tensor_float_32(side.tf32):
                enqueue = enqueuer(side, bench.gate, rotation)
                samplers[side.name] = _with_tf32(side, bench.gate.sampler(enqueue))
        except GateError as error:
            entry["no_device_time"] = str(error)
    return in_turns(samplers, bench.effort)
