"""`overhead`: what a call costs the host: eagerly, while a tape records, in a graph.

The tensors are tiny, so that little but the cost of calling is measured: 1x32x32x3 by
3x3x3x8.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

import sparse_conv
from bench import ours
from bench.measure import Report, Row
from bench.results import Results
from bench.session import Session
from bench.timing import Effort, Ring, Sampler, call_sampler, in_turns

WAYS = ("eager", "recording", "tf.function")
CALLERS = ("SparseKernel", "dense tensor", "tf.nn.conv2d")
_Call = Callable[[], tf.Tensor]


def run(session: Session) -> Results:
    """Times the ways of calling."""
    results = session.results("overhead")
    session.fill(results, WAYS, lambda way, tell: _row(way, session, tell))
    return results


def _row(way: str, session: Session, tell: Report) -> Row:
    """All callers in one way."""
    samplers = {}
    for name, (call, weights) in _callers(session.options.algorithm).items():
        tell(name)
        samplers[name] = _sampler(way, call, weights)
    effort = Effort(session.bench.effort.seconds, fewest=25)
    times = in_turns(samplers, effort)
    return {
        "key": way,
        "call_us": {name: quartiles.as_dict() for name, quartiles in times.items()},
    }


def _callers(algorithm: str) -> dict[str, tuple[_Call, tf.Tensor]]:
    """For each caller its call, and the weights that a tape follows."""
    x = tf.random.normal((1, 32, 32, 3))
    dense = tf.random.normal((3, 3, 3, 8))
    dense = tf.where(tf.random.uniform(dense.shape) < 0.1, dense, 0.0)
    prepared = ours.prepare(x, dense, algorithm)
    calls = (
        (lambda: prepared(x), prepared.kernel.values),
        (lambda: sparse_conv.conv2d(x, dense, 1, "SAME"), dense),
        (lambda: tf.nn.conv2d(x, dense, 1, "SAME"), dense),
    )
    return dict(zip(CALLERS, calls, strict=True))


def _sampler(way: str, call: _Call, weights: tf.Tensor) -> Sampler:
    if way == "tf.function":
        graph = tf.function(call)
        return call_sampler(lambda number: graph(), Ring(1))
    if way == "recording":
        return call_sampler(lambda number: _recorded(call, weights), Ring(1))
    return call_sampler(lambda number: call(), Ring(1))


def _recorded(call: _Call, watched: tf.Tensor) -> tf.Tensor:
    """Calls while a tape follows `watched`."""
    with tf.GradientTape() as tape:
        tape.watch(watched)
        return call()
