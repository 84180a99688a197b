"""Which configuration of conv2d_spmm.cu to take, and what it should cost.

Knows a rough model of a multiprocessor whose warps read inputs and entries from shared
memory. Pure functions; the tiles themselves are `spmm`'s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from sparse_conv.gather import Gather
from sparse_conv.launch import WARP
from sparse_conv.spmm import (
    SpmmBlock,
    SpmmConfig,
    fits,
    make_spmm_block,
    place_defines,
    spmm_defines,
)
from sparse_conv.tiling import PACKS, QUAD, DeviceLimits, phase_outputs

# (POSITIONS, ROWS) that conv2d_spmm.cu is compiled for, where the sums of a thread take
# so many registers at most.
VARIANTS = ((1, 2), (2, 2), (4, 2), (2, 8), (7, 4), (4, 8))
_MOST_SUM_REGISTERS = 32
# TensorFlow keeps integers in host memory.
DTYPES = tuple(dtype for dtype in PACKS if dtype != "int32")
# (warp_rows, row_warps, slices) worth comparing.
_DIVISIONS = (
    (1, 4, 2), (1, 4, 4), (1, 2, 8), (1, 8, 1), (1, 8, 2), (1, 16, 1),
    (2, 4, 2), (2, 8, 1), (2, 8, 2), (2, 16, 1), (4, 16, 1), (8, 16, 1),
)  # fmt: skip
_WIDTHS = (7, 8, 14, 16, 28, 32)
# Lanes of a row that may have no output, so that the others meet different banks.
_BESIDE = 8
_CHUNKS = (8, 16, 32, 48, 64, 96, 128, 256, 512)

# Fitted to 2,327 launches of 53 kernels, on an H100, above all to those with good
# configurations: half of their predictions are within 5 %. What the model takes was 4 %
# slower than the best configuration tried, in the mean, and at most 24 %.
# Clocks of a launch, and of each block that a multiprocessor has in turn.
_LAUNCH_CLOCKS = 4380
_BLOCK_CLOCKS = 6010
# Of a wavefront that delivers inputs, and of an entry beside them.
_WAVEFRONT_CLOCKS = 1.21
_ENTRY_CLOCKS = 0.8
# Of 32 inputs that are loaded.
_LOAD_CLOCKS = 3.94
# Of a chunk, and of each part of a row in it.
_CHUNK_CLOCKS = 567
_ROW_CLOCKS = 14
# Of 32 sums that are staged, or added to others, and stored.
_STORE_CLOCKS = 10.5
# Of an entry of one warp: what it waits for.
_ALONE_CLOCKS = 4.8
# Entries of a chunk vary about their mean: by so many standard deviations, at most.
_DEVIATIONS = 5


@dataclass(frozen=True, slots=True)
class SpmmChoice:
    """A configuration and its predicted clocks, infinite where there is none."""

    block: SpmmBlock | None
    clocks: float


@functools.lru_cache(maxsize=4096)
def choose_spmm_block(
    gather: Gather, dtype: str, nnz: int, device: DeviceLimits
) -> SpmmChoice:
    """The best configuration by the model.

    Args:
        gather: What is computed; it has outputs and inputs.
        dtype: Name of the dtype.
        nnz: Entries of all rows together.
        device: The GPU's limits.

    Returns:
        The choice.
    """
    best = SpmmChoice(None, float("inf"))
    if dtype not in DTYPES:
        return best
    for config in _candidates(gather, dtype):
        block = make_spmm_block(gather, dtype, config)
        if block is None or not fits(
            dtype, block, _capacity(gather, nnz, block), device
        ):
            continue
        clocks = spmm_clocks(gather, nnz, block, device)
        if clocks < best.clocks:
            best = SpmmChoice(block, clocks)
    return best


def described(block: SpmmBlock) -> str:
    """A configuration in words."""
    config = block.config
    images = f"{config.images}x" if config.images > 1 else ""
    return (
        f"tiles of {images}{config.tile_h}x{block.width} outputs, {config.block_rows} "
        f"output and {config.chunk} input channels at a time"
    )


def reachable() -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    """Every (function, defines) that a launch can name."""
    for dtype in DTYPES:
        yield "place_entries", place_defines(dtype)
        for positions, rows in _variants(dtype):
            yield "conv2d_spmm", spmm_defines(dtype, positions, rows)


def _variants(dtype: str) -> list[tuple[int, int]]:
    """Those of VARIANTS that a dtype has."""
    most = _MOST_SUM_REGISTERS * 4 // PACKS[dtype][1]
    return [(p, r) for p, r in VARIANTS if p * r <= most]


def _candidates(gather: Gather, dtype: str) -> Iterator[SpmmConfig]:
    """The configurations worth comparing."""
    variants = _variants(dtype)
    group_in = gather.in_channels // gather.groups
    group_out = gather.out_channels // gather.groups
    chunks = sorted({group_in, *(chunk for chunk in _CHUNKS if chunk < group_in)})
    for positions, images, tile_h, tile_w in _tiles(gather, variants):
        for warp_rows, row_warps, slices in _DIVISIONS:
            rows = next(
                (r for p, r in variants if p == positions and r >= warp_rows), None
            )
            # Of more rows than there are, a part is idle.
            if rows is None or warp_rows * row_warps >= 2 * max(group_out, 4):
                continue
            for chunk in chunks:
                yield SpmmConfig(
                    positions, rows, warp_rows, row_warps, slices, tile_h, tile_w,
                    chunk, images,
                )  # fmt: skip


def _tiles(
    gather: Gather, variants: list[tuple[int, int]]
) -> Iterator[tuple[int, int, int, int]]:
    """The tiles worth comparing: positions, images, height and width."""
    height, width = phase_outputs(gather.h), phase_outputs(gather.w)
    widths = {tile_w for tile_w in _WIDTHS if tile_w < width + _BESIDE}
    widths |= {width} if width < max(_WIDTHS) else set()
    for positions in sorted({positions for positions, _ in variants}):
        lanes = positions * WARP
        for tile_w in sorted(widths):
            most_h = lanes // tile_w
            if not most_h:
                continue
            # As few equal tiles as there can be, so that none has few rows.
            tile_h = -(-height // -(-height // most_h))
            images = 1
            if tile_h == height and tile_w >= width:
                images = max(1, min(gather.n, lanes // (tile_h * tile_w)))
            if 2 * images * tile_h * tile_w > lanes or positions == 1:
                yield positions, images, tile_h, tile_w


def _capacity(gather: Gather, nnz: int, block: SpmmBlock) -> int:
    """Entries of a block and a chunk that have to be expected."""
    rows = min(block.config.block_rows, gather.out_channels // gather.groups)
    mean = nnz / gather.rows / block.chunks * rows
    return int(mean + _DEVIATIONS * math.sqrt(mean) + rows * QUAD / 2) // QUAD * QUAD


def spmm_clocks(
    gather: Gather, nnz: int, block: SpmmBlock, device: DeviceLimits
) -> float:
    """Predicted clocks of a launch."""
    config, lattice = block.config, block.lattice
    sets = gather.h.row_sets * gather.w.row_sets
    waves = -(-sets * block.blocks // device.multiprocessors)
    rows = min(config.block_rows, gather.out_channels // gather.groups)
    row_entries = nnz / max(1, gather.rows)
    inputs = min(lattice.extent_h, gather.h.inputs) * min(
        lattice.extent_w, gather.w.inputs
    )
    inputs *= config.images * (gather.in_channels // gather.groups)
    sums = rows * config.pixels * (1 + config.slices)
    clocks = (
        _BLOCK_CLOCKS
        + row_entries * rows * (_WAVEFRONT_CLOCKS * block.wavefronts + _ENTRY_CLOCKS)
        + inputs / WARP * _LOAD_CLOCKS
        + block.chunks * (_CHUNK_CLOCKS + rows * config.slices * _ROW_CLOCKS)
        + sums / WARP * _STORE_CLOCKS
        + config.warp_rows * row_entries / config.slices * _ALONE_CLOCKS
    )
    return _LAUNCH_CLOCKS + waves * clocks
