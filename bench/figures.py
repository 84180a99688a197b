"""`figures`: the seed's five figures."""

from __future__ import annotations

from bench import cases
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
    """Measures the points."""
    points = list(cases.figure_cases(on_gpu=session.target.on_gpu))
    if session.options.quick:
        points = [p for p in points if _QUICK_POINTS.get(p.group) == p.position]
    results = session.results("figures")
    session.fill(results, points, lambda case, tell: measure(case, session.bench, tell))
    return results
