"""The choice of an algorithm: the cheapest by the models, or the one asked for.

A pure function of the problem, the dtype, the place, the number of nonzeros and the
precision that TensorFlow is set to. Knows no model: back ends estimate their own
algorithms, `dense` estimates TensorFlow's convolution.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import tensorflow as tf

from sparse_conv import costs, dense
from sparse_conv.bridge import Place
from sparse_conv.costs import Estimate
from sparse_conv.problem import Problem

ALGORITHMS = ("auto", "generic", "baked", "dense")
PASSES = ("fprop", "dgrad", "wgrad")

# By how much ours has to be predicted faster than TensorFlow's convolution to be taken,
# for each kind of place, so that few calls lose against it. On CPUs that is about what
# the models are wrong by. cuDNN chooses among algorithms, which no model of a few sizes
# foresees: there the costs of dense are fitted to be too short rather than too long.
MARGINS = {"CPU": 1.25, "GPU": 1.03}

_UNCOUNTED = (
    "nobody counted the zeros of the dense kernel, which would make the host wait for "
    "the GPU"
)


class Question(NamedTuple):
    """All that a choice may depend on.

    Attributes:
        pass_name: "fprop", "dgrad" or "wgrad".
        problem: The sizes.
        dtype: Of all operands.
        place: Where they live.
        nnz: Weights that aren't zero; None where nobody counted them.
        constant: Whether the kernel is a SparseKernel whose values stay the same.
        sparse: Whether it is a SparseKernel, whose pattern stays the same.
        tf32: Whether TensorFlow may compute float32 convolutions in TF32.
        traced: Whether a graph is being built, where a Python function is expensive.
    """

    pass_name: str
    problem: Problem
    dtype: tf.DType
    place: Place
    nnz: int | None
    constant: bool
    sparse: bool
    tf32: bool
    traced: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen algorithm, why, and what is expected of each."""

    algorithm: str
    reason: str
    estimates: tuple[Estimate, ...]


def check_name(algorithm: str) -> None:
    """Raises a ValueError unless `algorithm` is the name of one."""
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"`algorithm` must be one of {', '.join(ALGORITHMS)}. "
            f"Received: algorithm={algorithm!r}"
        )


@functools.lru_cache(maxsize=4096)
def choose(
    question: Question,
    backend: ModuleType,
    algorithm: str = "auto",
    measured: tuple[Estimate, ...] | None = None,
) -> Choice:
    """The algorithm for a pass.

    Args:
        question: What is to be computed, and where.
        backend: The back end that computes there.
        algorithm: One of ALGORITHMS; all but "auto" force it.
        measured: Estimates that were measured, which replace those of the models.

    Returns:
        The choice; the first of the cheapest unless one is forced.

    Raises:
        NotImplementedError: The algorithm asked for can't compute the pass; says why.
    """
    expected = estimates(question, backend, measured)
    if algorithm != "auto":
        return Choice(algorithm, "asked for", _checked(algorithm, question, expected))
    if question.nnz is None and measured is None:
        return Choice("generic", _UNCOUNTED, expected)
    possible = [one for one in expected if one.microseconds is not None]
    if measured is None:
        kind = question.place.kind
        best = min(possible, key=lambda one: _counted(one, kind))
        reason = f"the shortest time predicted, dense favoured by {MARGINS[kind]:g}"
    else:
        best = min(possible, key=lambda one: one.microseconds)
        reason = "the shortest time measured"
    return Choice(best.algorithm, reason, expected)


def _counted(estimate: Estimate, kind: str) -> float:
    if estimate.algorithm == "dense":
        return favoured(estimate.microseconds, kind)
    return estimate.microseconds


def favoured(microseconds: float, kind: str) -> float:
    """What the predicted time of TensorFlow's convolution counts as in a choice.

    Args:
        microseconds: The prediction.
        kind: "CPU" or "GPU".

    Returns:
        A shorter time, in microseconds.
    """
    return microseconds / MARGINS[kind]


def estimates(
    question: Question,
    backend: ModuleType,
    measured: tuple[Estimate, ...] | None = None,
) -> tuple[Estimate, ...]:
    """What each algorithm would take; `measured` replaces what the models say."""
    expected = _modelled(question, backend) if measured is None else measured
    if not question.traced:
        return expected
    extra = costs.traced_microseconds(backend.machine(question.place))
    return tuple(
        one if one.algorithm == "dense" else _later(one, extra) for one in expected
    )


def _modelled(question: Question, backend: ModuleType) -> tuple[Estimate, ...]:
    q = question
    nnz = q.nnz
    if nnz is None:
        p = q.problem
        nnz = p.r * p.s * p.group_channels * p.k
    machine = backend.machine(q.place)
    ours = backend.estimates(
        q.pass_name, q.problem, q.dtype, q.place, nnz, q.constant, q.sparse
    )
    theirs = dense.estimate(
        q.pass_name, q.problem, q.dtype, q.place, machine, tf32=q.tf32
    )
    return (*ours, theirs)


def _later(estimate: Estimate, extra: float) -> Estimate:
    if estimate.microseconds is None:
        return estimate
    return dataclasses.replace(
        estimate,
        microseconds=estimate.microseconds + extra,
        reason=f"{estimate.reason}, {extra:.0f} us of it as a Python function",
    )


def _checked(
    algorithm: str, question: Question, estimates: tuple[Estimate, ...]
) -> tuple[Estimate, ...]:
    """The estimates, once it is known that the algorithm can compute the pass."""
    for one in estimates:
        if one.algorithm == algorithm and one.microseconds is None:
            raise unsupported(algorithm, question.pass_name, one.reason)
    return estimates


def unsupported(algorithm: str, pass_name: str, reason: str) -> NotImplementedError:
    """The error for an algorithm that was asked for and can't."""
    return NotImplementedError(
        f"The algorithm asked for can't compute this {_NAMES[pass_name]}: {reason}. "
        f"Received: algorithm={algorithm!r}"
    )


_NAMES = {
    "fprop": "convolution",
    "dgrad": "gradient to the input",
    "wgrad": "gradient to the kernel",
}
