"""The passes of a convolution by code that is generated for it, run by the emulator.

Knows the pointers of the launches that `baked` makes. Does not know what the results
should be.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sparse_conv import baked
from sparse_conv.baked import BakedBlock, BakedConfig
from sparse_conv.gather import Gather, dgrad_gather, fprop_gather
from sparse_conv.pattern import Rows
from sparse_conv.problem import Problem
from sparse_conv.tiling import DeviceLimits
from tests.baked_configs import fitted
from tests.emulated_passes import LARGE_GPU, LITTLE_GPU, Call, origins_of, run_calls
from tests.problems import DTYPES, Data


def tight_gpu(gather: Gather, dtype: str, config: BakedConfig) -> DeviceLimits:
    """A GPU on which a block has no room for the next tile while it computes."""
    block = baked.make_baked_block(gather, dtype, config, LITTLE_GPU)
    if config.splits > 1 and block.buffers == 1:
        # It has nothing to load ahead.
        return LITTLE_GPU
    assert block.buffers == 2
    return dataclasses.replace(LITTLE_GPU, shared_mem_bytes=block.shared_mem_bytes - 1)


def baked_calls(
    gather: Gather,
    rows: Rows,
    values: np.ndarray,
    read: np.ndarray,
    shape: tuple[int, ...],
    dtype: str,
    block: BakedBlock,
    bias: np.ndarray | None = None,
    activation: int = 0,
) -> list[Call]:
    """The calls of one pass, each of which writes a part of the result."""
    arrays = {
        "read": read,
        "bias": bias,
        "origins": origins_of(gather) if baked.needs_origins(gather) else None,
        "write": np.empty(shape, DTYPES[dtype]),
    }
    return [
        Call(
            baked.baked_launch(gather, dtype, block, function, activation),
            arrays,
            ("write",),
        )
        for function in baked.bake(gather, rows, values, dtype, block)
    ]


def run_baked(calls: list[Call], text: str | None = None) -> np.ndarray:
    """The result of a pass; each of its numbers is written by one call alone."""
    parts = [result["write"] for result in run_calls(calls, text)]
    result = parts[0]
    for part in parts[1:]:
        # What isn't written is NaN.
        written = ~np.isnan(part.astype(np.float64))
        assert np.isnan(result[written].astype(np.float64)).all()
        result = np.where(written, part, result)
    return result


def baked_fprop_calls(
    problem: Problem,
    data: Data,
    dtype: str,
    config: BakedConfig,
    device: DeviceLimits = LARGE_GPU,
    **options: Any,
) -> list[Call]:
    """The forward pass; `options` are `bias` and `activation`."""
    gather = fprop_gather(problem)
    return baked_calls(
        gather, data.pattern.fprop_rows(), data.values, data.x, problem.output_shape,
        dtype, _fitted_block(gather, dtype, config, device), **options,
    )  # fmt: skip


def baked_dgrad_calls(
    problem: Problem,
    data: Data,
    dtype: str,
    config: BakedConfig,
    device: DeviceLimits = LARGE_GPU,
) -> list[Call]:
    """The input gradient."""
    gather = dgrad_gather(problem)
    return baked_calls(
        gather, data.pattern.dgrad_rows(gather), data.values, data.dy,
        problem.input_shape, dtype, _fitted_block(gather, dtype, config, device),
    )  # fmt: skip


def _fitted_block(
    gather: Gather, dtype: str, config: BakedConfig, device: DeviceLimits
) -> BakedBlock:
    block = baked.make_baked_block(gather, dtype, fitted(config, gather), device)
    assert block is not None
    return block
