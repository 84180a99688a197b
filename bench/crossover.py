"""`crossover`: for each shape, the density at which dense takes over.

The density is sought by bisection between 1 and 100 per cent, on a logarithmic scale.
Between the last two densities, the logarithm of the time is taken for a straight line.
With `--algorithm auto`, ours is the faster one of the sparse algorithms that there are:
what `auto` itself would choose beyond the crossing is dense.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from bench import cases, compare, ours
from bench.cases import Case, useful_fmas
from bench.measure import Report, Row, add_fp32, begin_row, fill_row
from bench.results import Results
from bench.session import Session
from bench.sides import dense_side, make_operands, our_side

LEAST, MOST = 0.01, 1.0
# Halves the interval of two decades to less than half an octave.
STEPS = 4
SPARSE = ("generic", "baked")


def run(session: Session) -> Results:
    """Seeks the crossings."""
    shapes = list(cases.crossover_shapes(on_gpu=session.target.on_gpu))
    if session.options.quick:
        shapes = [shape for shape in shapes if shape.n == 1 and shape.h <= 32][:4]
    results = session.results("crossover")
    session.fill(results, shapes, lambda shape, tell: _row(shape, session, tell))
    return results


def crossing(time_at: Callable[[float], float], target: float) -> float:
    """The density at which a time that grows with it reaches `target`.

    Args:
        time_at: The time at a density from `LEAST` to `MOST`.
        target: The time to reach.

    Returns:
        The density; 0 if the time at `LEAST` is above already, infinity if the time at
        `MOST` is still below.
    """
    low, high = LEAST, MOST
    if time_at(low) >= target:
        return 0.0
    if time_at(high) <= target:
        return math.inf
    for _ in range(STEPS):
        middle = math.sqrt(low * high)
        if time_at(middle) < target:
            low = middle
        else:
            high = middle
    below, above = math.log(time_at(low)), math.log(time_at(high))
    # Noise may have turned them around.
    part = (math.log(target) - below) / (above - below) if above > below else 0.5
    return low * (high / low) ** min(1.0, max(0.0, part))


def _row(shape: Case, session: Session, tell: Report) -> Row:
    """Our times at the densities that bisection needs, dense's, and the crossings."""
    row = _dense_row(shape, session, tell)
    kind = compare.kind_of([row])
    row["times"] = {}

    @functools.cache
    def time_at(density: float) -> float:
        case = cases.with_density(shape, density)
        times = _our_times(case, session, tell)
        row["times"][f"{density:.6g}"] = times
        known = [entry[kind]["median"] for entry in times.values() if kind in entry]
        # Where nothing of ours computes, dense has taken over.
        return min(known, default=math.inf)

    row["crossings"] = {}
    for side in ("dense", "dense_fp32"):
        target = compare.median_us(row, side, kind)
        if target is not None:
            density = crossing(time_at, target)
            # JSON has no infinity.
            row["crossings"][side] = density if math.isfinite(density) else None
    row["kind"] = kind
    return row


def _dense_row(shape: Case, session: Session, tell: Report) -> Row:
    kernel = shape.kernel()
    bench = session.bench
    operands = make_operands(shape, kernel, bench.target)
    row = begin_row(shape, useful_fmas(shape, kernel))
    side = dense_side(shape, operands, bench.target, tf32=True)
    fill_row(row, [side], len(operands.inputs), bench, tell)
    add_fp32(row, "convolution", shape, bench, tell)
    return row


def _our_times(case: Case, session: Session, tell: Report) -> dict[str, Any]:
    """The entry of each sparse algorithm at one density."""
    bench = session.bench
    kernel = case.kernel()
    operands = make_operands(case, kernel, bench.target)
    asked = bench.algorithm
    entries = {}
    for algorithm in SPARSE if asked == "auto" else (asked,):
        tell(f"density {case.density:.3g}, {algorithm}")
        try:
            prepared = ours.prepare(operands.inputs[0], operands.dense, algorithm)
        except NotImplementedError as error:
            entries[algorithm] = {"refused": str(error)}
            continue
        side = our_side(case, operands, bench.target, prepared)
        row = begin_row(case, useful_fmas(case, kernel))
        fill_row(row, [side], len(operands.inputs), bench, tell)
        entries[algorithm] = row["sides"]["ours"]
    return entries
