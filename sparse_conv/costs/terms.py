"""The quantities that costs are sums of, for loops over a Gather and for dense ones.

Pure arithmetic on sizes. All amounts are divided by the machine's units.
"""

from __future__ import annotations

import math

from sparse_conv.costs import Machine
from sparse_conv.gather import Gather, dgrad_gather, fprop_gather
from sparse_conv.problem import Problem

_MEGA = 1e6
# Dense convolutions with more taps than that are slower for their products.
_MANY_TAPS = 49
# Beyond so many products of an output, several units share them.
_SHARED_DEPTH = 512
# What more products of a dense kernel's output read does not stay near a core.
_DEEP_ROW = 2000
# Of code for a pattern: output channels whose sums are in registers at a time, and that
# are written together, at most, and weights whose code stays near a core.
CODE_OUTPUTS = 31
CODE_BLOCK = 128
_NEAR_CODE = 70_000
# Vector operations that a unit does while others are called.
_LITTLE_WORK = 1e5


def gather_of(pass_name: str, problem: Problem) -> Gather:
    """The Gather that a sparse pass walks."""
    return dgrad_gather(problem) if pass_name == "dgrad" else fprop_gather(problem)


def sparse_terms(
    pass_name: str, problem: Problem, nnz: int, itemsize: int, machine: Machine
) -> dict[str, float]:
    """The amounts of a loop over `nnz` nonzeros that has pixels in its lanes.

    Args:
        pass_name: "fprop", "dgrad" or "wgrad".
        problem: The sizes.
        nnz: Weights that are visited.
        itemsize: Bytes of an element.
        machine: Its lanes decide how much of a short image is wasted.

    Returns:
        "call" (1), "sharing" (near 0 for so little work that one unit does it, near 1
        for much), "products" (millions), "deep", the same once more where an output may
        have very many, "read", "write", "halo", what is read again because lanes
        overlap (megabytes), "sums" (millions of outputs, or of pixels that a gradient
        reads), "cells" (millions of pixels) and "entries" (millions).
    """
    gather = gather_of(pass_name, problem)
    h, w = gather.h, gather.w
    high, wide = -(-h.outputs // h.phases), -(-w.outputs // w.phases)
    lanes = machine.lanes
    cells = min(
        _rounded(gather.n * high, lanes) * wide, _rounded(gather.n * wide, lanes) * high
    )
    cells *= len(h.origins) * len(w.origins)
    share = _MEGA * machine.units
    read = gather.n * h.inputs * w.inputs * gather.in_channels
    write = gather.n * h.outputs * w.outputs * gather.out_channels
    products = nnz / (h.row_sets * w.row_sets) * cells
    sums = cells * gather.out_channels
    work = (products + 8 * sums + read + write) / lanes
    return {
        "call": 1.0,
        "sharing": work / (work + _LITTLE_WORK),
        "products": products / share,
        "deep": products / share if gather.row_length > _DEEP_ROW else 0.0,
        "read": read * itemsize / share,
        "write": write * itemsize / share,
        "halo": read * itemsize * _overlap(gather, lanes) / share,
        "sums": sums / share,
        "cells": cells / share,
        "entries": nnz / share,
    }


def _overlap(gather: Gather, lanes: int) -> float:
    """The part of the input that is read twice where one axis is cut into lanes."""
    overlaps = []
    for axis in (gather.h, gather.w):
        reach = (axis.taps - 1) // axis.stride
        rows = gather.n * -(-axis.outputs // axis.phases)
        overlaps.append(reach / max(1.0, rows / lanes))
    return min(overlaps)


def code_terms(
    pass_name: str, problem: Problem, nnz: int, itemsize: int, machine: Machine
) -> dict[str, float]:
    """The amounts of code for a pattern that has pixels in its lanes.

    Args:
        pass_name: "fprop" or "dgrad".
        problem: The sizes.
        nnz: Weights that are visited.
        itemsize: Bytes of an element.
        machine: As for `sparse_terms`.

    Returns:
        Those of `sparse_terms`, and "reads", what is read, once for all the outputs
        that are summed together, and "code", products whose code is far from a core, as
        that of many weights is (millions).
    """
    gather = gather_of(pass_name, problem)
    terms = sparse_terms(pass_name, problem, nnz, itemsize, machine)
    zeros = 1 - min(1.0, nnz / max(1, gather.rows * gather.row_length))
    outputs = max(1, min(CODE_BLOCK, gather.out_channels // gather.groups))
    return terms | {
        "reads": terms["sums"] * code_reads(gather, zeros, outputs),
        "code": terms["products"] if nnz > _NEAR_CODE else 0.0,
    }


def code_reads(gather: Gather, zeros: float, outputs: int) -> float:
    """Inputs that code reads for an output, where outputs share what they read.

    Args:
        gather: What is computed.
        zeros: The part of the weights that is zero.
        outputs: Output channels that are written together.
    """
    groups, rest = divmod(outputs, CODE_OUTPUTS)
    needed = groups * (1 - zeros**CODE_OUTPUTS) + 1 - zeros**rest
    return gather.row_length * needed / outputs


def dense_terms(
    pass_name: str, problem: Problem, itemsize: int, machine: Machine, lanes: int
) -> dict[str, float]:
    """The amounts of a dense convolution that has channels in its lanes.

    Args:
        pass_name: "fprop", "dgrad" or "wgrad".
        problem: The sizes.
        itemsize: Bytes of an element.
        machine: What the work is divided among.
        lanes: To whole multiples of what the channels are rounded.

    Returns:
        "call" (1), "several" (1 where there are several taps), "products" with the
        channels written rounded up, "both" with all of them rounded up, "unaligned" the
        same where they are no multiple of 4, "large" with none rounded, where there are
        many taps (millions), "read", "write" and "weights" (megabytes), and "taps",
        "depth", the products of an output, "chain", as many of them as one unit takes,
        and "inner", those of all taps but one (thousands, undivided: they follow each
        other).
    """
    p = problem
    ins, outs = p.group_channels, p.k // p.groups
    read, write = p.n * p.h * p.w * p.c, p.n * p.p * p.q * p.k
    if pass_name == "dgrad":
        ins, outs, read, write = outs, ins, write, read
    pixels = p.n * p.p * p.q * p.r * p.s * p.groups
    depth = p.n * p.p * p.q if pass_name == "wgrad" else p.r * p.s * ins
    share = _MEGA * machine.units
    both = pixels * _rounded(ins, lanes) * _rounded(outs, lanes) / share
    return {
        "call": 1.0,
        "several": float(p.r * p.s > 1),
        "taps": p.r * p.s / 1e3,
        "depth": depth / 1e3,
        "chain": min(depth, _SHARED_DEPTH) / 1e3,
        "inner": (p.r * p.s - 1) * ins / 1e3,
        "products": pixels * ins * _rounded(outs, lanes) / share,
        "both": both,
        "unaligned": both if outs % 4 else 0.0,
        "large": pixels * ins * outs / share if p.r * p.s > _MANY_TAPS else 0.0,
        "read": read * itemsize / share,
        "write": write * itemsize / share,
        "weights": math.prod(p.kernel_shape) * itemsize / share,
    }


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
