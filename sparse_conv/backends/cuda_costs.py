"""What the GPU functions cost: the models of `tiling`, in microseconds.

Pure functions. Knows which launches a pass makes; needs neither CuPy nor a GPU.
"""

from __future__ import annotations

import functools

import tensorflow as tf

from sparse_conv import costs, plan
from sparse_conv.costs import Machine
from sparse_conv.costs.terms import gather_of, sparse_terms
from sparse_conv.problem import Problem
from sparse_conv.tiling import DeviceLimits


@functools.lru_cache(maxsize=4096)
def generic_microseconds(
    pass_name: str,
    problem: Problem,
    dtype: str,
    nnz: int,
    limits: DeviceLimits,
    machine: Machine,
) -> float:
    """The predicted time of one pass by the functions that read the pattern."""
    terms = generic_terms(pass_name, problem, dtype, nnz, limits, machine)
    predicted = costs.microseconds(machine, f"generic {pass_name}", terms)
    return predicted * costs.dtype_factor(machine, "generic", dtype)


def generic_terms(
    pass_name: str,
    problem: Problem,
    dtype: str,
    nnz: int,
    limits: DeviceLimits,
    machine: Machine,
) -> dict[str, float]:
    """The amounts that the model of a pass weighs.

    Returns:
        "call" (1), and for fprop and dgrad "clocks" (thousands), for wgrad the amounts
        of `sparse_terms`.
    """
    if pass_name == "wgrad":
        return sparse_terms(pass_name, problem, nnz, tf.as_dtype(dtype).size, machine)
    clocks = plan.gather_clocks(gather_of(pass_name, problem), dtype, nnz, limits)
    return {"call": 1.0, "clocks": clocks / 1e3}
