"""`accuracy`: errors relative to float64 on the five figures, ours and TensorFlow's.

TF32 is switched off, so that both sides compute in float32.
"""

from __future__ import annotations

from dataclasses import asdict

import tensorflow as tf

from bench import cases, check, ours
from bench.cases import Case
from bench.measure import Report, Row
from bench.results import Results
from bench.session import Session
from bench.sides import tensor_float_32


def run(session: Session) -> Results:
    """Compares the errors on all points of the figures."""
    points = list(cases.figure_cases(on_gpu=session.target.on_gpu))
    if session.options.quick:
        points = [point for point in points if point.h <= 64]
    results = session.results("accuracy")
    session.fill(results, points, lambda case, tell: _row(case, session, tell))
    return results


def _row(case: Case, session: Session, tell: Report) -> Row:
    x, dense = tf.constant(case.input()), tf.constant(case.kernel())
    tell("reference")
    exact = check.reference(x, dense)
    tell("ours")
    with tensor_float_32(False):
        prepared = ours.prepare(x, dense, session.options.algorithm)
        error = check.relative_error(prepared(x), exact)
        theirs = check.relative_error(tf.nn.conv2d(x, dense, 1, "SAME"), exact)
    return {
        "key": str(case),
        "case": asdict(case),
        "shape": case.shape_text,
        "algorithm": prepared.chosen,
        "ours": error,
        "dense": theirs,
    }
