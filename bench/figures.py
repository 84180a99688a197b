"""`figures`: the seed's five figures."""

from __future__ import annotations

from bench import BenchError, cases
from bench.measure import measure
from bench.results import Results
from bench.session import Session

# One cheap point of each figure.
_QUICK_POINTS = {
    "kernel size": 3,
    "channels in": 3,
    "channels out": 3,
    "image size": 32,
}


def run(session: Session) -> Results:
    """Measures the points, in one dtype.

    Raises:
        BenchError: Several dtypes were asked for: a figure has one.
    """
    dtype, *others = session.options.dtypes
    if others:
        raise BenchError(
            "`figures` takes one --dtype. "
            f"Received: {', '.join(session.options.dtypes)}"
        )
    points = list(cases.figure_cases(on_gpu=session.target.on_gpu, dtype=dtype))
    if session.options.quick:
        points = [p for p in points if _QUICK_POINTS.get(p.group) == p.position]
    part = "" if dtype == "float32" else f"-{dtype}"
    results = session.results("figures", part)
    session.fill(results, points, lambda case, tell: measure(case, session.bench, tell))
    return results
