"""What the GPU functions cost: the models of `tiling`, in microseconds.

Pure functions. Knows which launches a pass makes; needs neither CuPy nor a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import tensorflow as tf

from sparse_conv import costs, plan
from sparse_conv.baked_plan import choose_baked_block
from sparse_conv.costs import Estimate, Machine
from sparse_conv.costs.terms import gather_of, sparse_terms
from sparse_conv.problem import Problem
from sparse_conv.spmm import SpmmBlock
from sparse_conv.spmm_plan import choose_spmm_block
from sparse_conv.tiling import DeviceLimits


@dataclass(frozen=True, slots=True)
class GenericCost:
    """How the functions that read pattern and values compute a pass.

    Attributes:
        block: The configuration of conv2d_spmm; None where other functions serve.
        model: Name of the model of what they cost.
        terms: The amounts that it weighs.
        microseconds: What it predicts.
    """

    block: SpmmBlock | None
    model: str
    terms: Mapping[str, float]
    microseconds: float


@functools.lru_cache(maxsize=4096)
def generic_cost(
    pass_name: str,
    problem: Problem,
    dtype: str,
    nnz: int,
    limits: DeviceLimits,
    machine: Machine,
    sparse: bool,
    constant: bool = True,
) -> GenericCost:
    """The fastest way to compute a pass by functions that read the pattern.

    Args:
        pass_name: "fprop", "dgrad" or "wgrad".
        problem: The sizes.
        dtype: Name of the dtype.
        nnz: Weights that are visited.
        limits: The GPU's.
        machine: The GPU.
        sparse: Whether the pattern is known ahead, as a SparseKernel's is.
        constant: Whether its values stay the same; what is derived from them, is then
            derived once.
    """
    factor = costs.dtype_factor(machine, "generic", dtype)

    def cost(block: SpmmBlock | None, model: str, terms: dict[str, float]):
        predicted = costs.microseconds(machine, model, terms) * factor
        return GenericCost(block, model, terms, predicted)

    terms = generic_terms(pass_name, problem, dtype, nnz, limits, machine)
    best = cost(None, f"generic {pass_name}", terms)
    gather = gather_of(pass_name, problem)
    written = gather.n * gather.h.outputs * gather.w.outputs * gather.out_channels
    if pass_name == "wgrad" or not sparse or not written or not gather.in_channels:
        return best
    choice = choose_spmm_block(gather, dtype, nnz, limits)
    if choice.block is None:
        return best
    terms = {"call": 1.0, "clocks": choice.clocks / 1e3}
    if not constant:
        terms |= {"place": 1.0, "placed": nnz / 1e6}
    other = cost(choice.block, f"spmm {pass_name}", terms)
    return min(best, other, key=lambda one: one.microseconds)


def baked_estimate(
    pass_name: str,
    problem: Problem,
    dtype: str,
    nnz: int,
    limits: DeviceLimits,
    machine: Machine,
) -> Estimate:
    """The predicted time of one pass by generated code, or why there is none."""
    if pass_name == "wgrad":
        return Estimate("baked", None, "the gradient to the kernel has no weights")
    gather = gather_of(pass_name, problem)
    choice = choose_baked_block(gather, dtype, nnz, limits)
    if choice.block is None:
        return Estimate("baked", None, choice.reason)
    terms = {"call": 1.0, "clocks": choice.clocks / 1e3}
    predicted = costs.microseconds(machine, f"baked {pass_name}", terms)
    return Estimate("baked", predicted, choice.reason)


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
        "call" (1), and for fprop and dgrad "clocks" (thousands) and "memory"
        (megabytes read and written, divided among the multiprocessors), for wgrad the
        amounts of `sparse_terms`.
    """
    if pass_name == "wgrad":
        return sparse_terms(pass_name, problem, nnz, tf.as_dtype(dtype).size, machine)
    clocks = plan.gather_clocks(gather_of(pass_name, problem), dtype, nnz, limits)
    amounts = sparse_terms(pass_name, problem, nnz, tf.as_dtype(dtype).size, machine)
    memory = amounts["read"] + amounts["write"]
    return {"call": 1.0, "clocks": clocks / 1e3, "memory": memory}
