"""The passes of a convolution by conv2d_spmm.cu, run by the emulator.

Knows the pointers of the launches that `spmm` makes, and how the entries of a block lie
in memory. Does not know what the results of a pass should be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from sparse_conv import spmm
from sparse_conv.gather import Gather, dgrad_gather, fprop_gather
from sparse_conv.pattern import Rows
from sparse_conv.problem import Problem
from sparse_conv.spmm import PlacedRows, SpmmBlock, SpmmConfig
from sparse_conv.tiling import QUAD, phase_outputs
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
        "entries": entries_of(placed, values, dtype),
        "bias": bias,
        "origins": origins_of(gather),
        "write": np.empty(shape, DTYPES[dtype]),
    }
    launch = spmm.spmm_launch(gather, dtype, block, placed.capacity, activation)
    return Call(launch, arrays, ("write",))


def entries_of(placed: PlacedRows, values: np.ndarray, dtype: str) -> np.ndarray:
    """What place_entries.cu has to write: (parts, bytes) uint8."""
    number = {"float64": np.float64, "int32": np.int32}.get(dtype, np.float32)
    entry = [("weights", number, QUAD), ("offsets", np.int32, QUAD)]
    parts = len(placed.sources)
    quads = np.empty((parts, placed.capacity // QUAD), entry)
    exists = placed.sources >= 0
    weights = np.zeros(placed.sources.shape, number)
    weights[exists] = values[placed.sources[exists]].astype(number)
    quads["weights"] = weights.reshape(*quads.shape, QUAD)
    quads["offsets"] = placed.offsets.reshape(*quads.shape, QUAD)
    pieces = [quads.view(np.uint8), placed.spans.reshape(parts, -1).view(np.uint8)]
    return np.concatenate(pieces, axis=1)


def place_call(
    gather: Gather, placed: PlacedRows, values: np.ndarray, dtype: str, block: SpmmBlock
) -> Call:
    """The launch that places values."""
    sizes = (gather, dtype, block, placed.capacity)
    arrays = {
        "values": values,
        "sources": placed.sources,
        "offsets": placed.offsets,
        "spans": placed.spans,
        "write": np.empty(spmm.entries_bytes(*sizes), np.uint8),
    }
    return Call(spmm.place_launch(*sizes), arrays, ("write",))


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
    whole_h, whole_w = phase_outputs(gather.h), phase_outputs(gather.w)
    for (
        positions,
        rows,
        warp_rows,
        row_warps,
        slices,
        tile_h,
        tile_w,
        chunk,
        images,
    ) in (
        (2, 4, 4, 2, 2, 7, 8, group_in, 1),
        (1, 1, 1, 4, 4, 4, 8, max(1, group_in // 2), 1),
        (4, 4, 3, 3, 1, 5, 25, 1, 1),
        (2, 8, 8, 5, 1, 3, 5, 4, 3),
        # Images of which only their rows, and their margins, can share places.
        (7, 4, 4, 2, 2, whole_h, whole_w, 3, 3),
        (7, 4, 2, 4, 1, whole_h, -(-whole_w // 8) * 8, 5, 2),
    ):
        yield SpmmConfig(
            positions, rows, warp_rows, row_warps, slices, tile_h, tile_w,
            max(1, min(chunk, group_in)), images,
        )  # fmt: skip
