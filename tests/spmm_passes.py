"""The passes of a convolution by conv2d_spmm.cu, run by the emulator.

Knows the pointers of the launches that `spmm` makes. Does not know what the results
should be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from sparse_conv import spmm
from sparse_conv.gather import Gather, dgrad_gather, fprop_gather
from sparse_conv.pattern import Rows
from sparse_conv.problem import Problem
from sparse_conv.spmm import SpmmConfig
from tests.emulated_passes import LARGE_GPU, Call, origins_of
from tests.problems import DTYPES, Data


def spmm_call(
    gather: Gather,
    rows: Rows,
    values: np.ndarray,
    read: np.ndarray,
    shape: tuple[int, ...],
    dtype: str,
    config: SpmmConfig,
    bias: np.ndarray | None = None,
    activation: int = 0,
) -> Call | None:
    """One pass; None where the configuration doesn't fit."""
    chunk = min(config.chunk, gather.in_channels // gather.groups)
    config = dataclasses.replace(config, chunk=chunk)
    block = spmm.make_spmm_block(gather, dtype, config)
    if block is None:
        return None
    placed = spmm.place_rows(gather, rows, dtype, block)
    if not spmm.fits(dtype, block, placed.capacity, LARGE_GPU):
        return None
    arrays = {
        "read": read,
        "values": values,
        "offsets": placed.offsets,
        "begins": placed.begins,
        "order": rows.order,
        "bias": bias,
        "origins": origins_of(gather),
        "write": np.empty(shape, DTYPES[dtype]),
    }
    launch = spmm.spmm_launch(gather, dtype, block, placed.capacity, activation)
    return Call(launch, arrays, ("write",))


def spmm_fprop_call(
    problem: Problem,
    data: Data,
    dtype: str,
    config: SpmmConfig,
    *,
    bias=False,
    **options,
) -> Call | None:
    """The forward pass; `options` are those of `spmm_call`."""
    return spmm_call(
        fprop_gather(problem), data.pattern.fprop_rows(), data.values, data.x,
        problem.output_shape, dtype, config, data.bias if bias else None, **options,
    )  # fmt: skip


def spmm_dgrad_call(
    problem: Problem, data: Data, dtype: str, config: SpmmConfig
) -> Call | None:
    """The input gradient."""
    gather = dgrad_gather(problem)
    return spmm_call(
        gather, data.pattern.dgrad_rows(gather), data.values, data.dy,
        problem.input_shape, dtype, config,
    )  # fmt: skip


def spmm_configs(gather: Gather) -> Iterator[SpmmConfig]:
    """Configurations with every division of rows, entries, pixels and channels."""
    group_in = gather.in_channels // gather.groups
    for positions, rows, warp_rows, row_warps, slices, tile_h, tile_w, chunk in (
        (2, 4, 4, 2, 2, 7, 8, group_in),
        (1, 1, 1, 4, 4, 4, 8, max(1, group_in // 2)),
        (4, 4, 3, 3, 1, 5, 25, 1),
        (2, 8, 8, 5, 1, 3, 5, 4),
    ):
        yield SpmmConfig(
            positions, rows, warp_rows, row_warps, slices, tile_h, tile_w,
            max(1, min(chunk, group_in)),
        )  # fmt: skip
