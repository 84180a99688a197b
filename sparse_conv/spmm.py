"""Tiles and entries of `kernels/conv2d_spmm.cu`, for kernels whose pattern is known.

Knows the layout of its tiles in shared memory, and where each entry of a sparse row
reads them. Pure functions: nothing is compiled, uploaded or measured here. Which
configuration is taken is decided in `spmm_plan`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from sparse_conv.gather import Gather
from sparse_conv.launch import (
    GRID_LIMIT,
    WARP,
    Launch,
    divisor_words,
    geometry_longs,
    geometry_words,
    pack_words,
)
from sparse_conv.pattern import Rows
from sparse_conv.tiling import (
    PACK_BYTES,
    PACKS,
    QUAD,
    DeviceLimits,
    Lattice,
    Tiling,
    has_quads,
    is_near,
    make_tiling,
    memory_steps,
)

_INDEX_BYTES = 4
# What shared memory delivers in a clock.
_WAVEFRONT_BYTES = 128
# Bytes of the structs Cell and Span in conv2d_spmm.cu.
_CELL_BYTES = 8
_SPAN_BYTES = 8
# Warps that load, beside those that compute; as in conv2d_spmm.cu.
LOADERS = 8
# Those that compute, at most.
MAX_WARPS = 16
# The quads of a row, times the slices that divide them, fit 32 bits.
_MOST_ROW_LENGTH = 2**31 // MAX_WARPS

_POINTERS = (
    "read", "values", "offsets", "begins", "order", "bias", "origins", "write",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SpmmConfig:
    """How a block of conv2d_spmm.cu divides its work.

    Attributes:
        positions: Pixels of a lane; compiled in.
        rows: The most rows of a warp; compiled in.
        warp_rows: Rows of a warp, at most `rows`.
        row_warps: Warps that have different rows.
        slices: Parts into which each row's entries are divided, a power of 2; so many
            warps have the same rows.
        tile_h: Height of a tile in outputs of one phase.
        tile_w: Width of a tile.
        chunk: Input channels in shared memory at a time.
    """

    positions: int
    rows: int
    warp_rows: int
    row_warps: int
    slices: int
    tile_h: int
    tile_w: int
    chunk: int

    @property
    def block_rows(self) -> int:
        """Output channels of a block."""
        return self.row_warps * self.warp_rows

    @property
    def warps(self) -> int:
        """Warps of a block that compute."""
        return self.row_warps * self.slices


@dataclass(frozen=True, slots=True)
class SpmmBlock:
    """A configuration with all that follows from it.

    Attributes:
        config: The configuration.
        lattice: The layout of a chunk of a tile; pitches in accumulators.
        tiling: How the outputs are divided into tiles.
        wavefronts: Clocks in which shared memory serves one input of all of a warp's
            pixels.
        loads_quads: Whether QUAD channels are loaded at once, where they are aligned.
        channel_threads: Threads that load neighbouring channels, or quads.
        chunks: Chunks of channels.
        row_groups: Blocks that differ in nothing but their rows.
        stage_pitch: From one row to the next where sums are added, in accumulators.
        stage_bytes: Shared memory that they take.
    """

    config: SpmmConfig
    lattice: Lattice
    tiling: Tiling
    wavefronts: int
    loads_quads: bool
    channel_threads: int
    chunks: int
    row_groups: int
    stage_pitch: int
    stage_bytes: int

    @property
    def buffers(self) -> int:
        """Tiles in shared memory: 2 if one is loaded while the other one serves."""
        return 2 if self.chunks > 1 else 1

    @property
    def blocks(self) -> int:
        """Blocks of one pair of row sets."""
        return self.row_groups * self.tiling.subtiles


def make_spmm_block(gather: Gather, dtype: str, config: SpmmConfig) -> SpmmBlock | None:
    """All that follows from a configuration; None where it doesn't fit the problem."""
    channels_last = gather.data_format == "NHWC"
    group_in = gather.in_channels // gather.groups
    group_out = gather.out_channels // gather.groups
    if config.tile_h * config.tile_w > config.positions * WARP:
        return None
    if gather.row_length > _MOST_ROW_LENGTH or not is_near(gather):
        return None
    lattice, wavefronts = _make_lattice(gather, dtype, config)
    tiling = make_tiling(gather, config.tile_h, config.tile_w)
    row_groups = gather.groups * -(-group_out // config.block_rows)
    sets = gather.h.row_sets * gather.w.row_sets
    if sets * row_groups * tiling.subtiles > GRID_LIMIT:
        return None
    if _longest_step(gather, config, lattice) > GRID_LIMIT:
        return None
    # An odd number: neighbouring rows then meet different banks.
    stage_pitch = config.tile_h * config.tile_w | 1
    stage_bytes = config.slices * config.block_rows * stage_pitch * PACKS[dtype][1]
    loads_quads = channels_last and group_in % QUAD == 0 and config.chunk % QUAD == 0
    channel_threads = 1
    if channels_last:
        units = config.chunk // (QUAD if loads_quads else 1)
        # A warp then meets each bank once.
        most = WARP // (QUAD if loads_quads else 1)
        while channel_threads < min(units, most):
            channel_threads *= 2
    return SpmmBlock(
        config,
        lattice,
        tiling,
        wavefronts,
        loads_quads,
        channel_threads,
        -(-group_in // config.chunk),
        row_groups,
        stage_pitch,
        stage_bytes,
    )


def _longest_step(gather: Gather, config: SpmmConfig, lattice: Lattice) -> int:
    """From a tile's first element to its last, at most: a thread has 32 bits for it."""
    read_row, read_column, read_channel, write_row, write_column, _ = memory_steps(
        gather
    )
    return max(
        lattice.extent_h * read_row
        + lattice.extent_w * read_column
        + 2 * max(WARP, config.chunk) * read_channel,
        config.tile_h * write_row + config.tile_w * write_column,
    )


@functools.lru_cache(maxsize=4096)
def _pitch_and_wavefronts(
    width: int, stride_h: int, tile_h: int, tile_w: int, words_at_once: int
) -> tuple[int, int]:
    """The row pitch with the fewest wavefronts, and of those the smallest.

    Args:
        width: Words of a row.
        stride_h: Rows from an output to the one below.
        tile_h: Height of a tile in outputs.
        tile_w: Its width.
        words_at_once: Words that shared memory delivers in a clock.

    Returns:
        The pitch, and the clocks for all pixels of a tile.
    """
    pixels = np.arange(tile_h * tile_w)
    best_pitch, best = width, None
    for pitch in range(width, width + words_at_once):
        place = pixels // tile_w * stride_h * pitch + pixels % tile_w
        clocks = 0
        for first in range(0, len(pixels), WARP):
            banks = place[first : first + WARP] % words_at_once
            # A wavefront takes no more than one word of each bank.
            clocks += max(np.bincount(banks).max(), -(-len(banks) // words_at_once))
        if best is None or clocks < best:
            best_pitch, best = pitch, int(clocks)
    return best_pitch, best


def _make_lattice(
    gather: Gather, dtype: str, config: SpmmConfig
) -> tuple[Lattice, int]:
    """The layout of a chunk of the tiles, and `SpmmBlock.wavefronts`."""
    extent_h = (config.tile_h - 1) * gather.h.stride + gather.h.taps
    extent_w = (config.tile_w - 1) * gather.w.stride + gather.w.taps
    columns = -(-extent_w // gather.w.stride)
    words_at_once = _WAVEFRONT_BYTES // PACKS[dtype][1]
    row_pitch, wavefronts = _pitch_and_wavefronts(
        columns * gather.w.stride, gather.h.stride, config.tile_h, config.tile_w,
        words_at_once,
    )  # fmt: skip
    # Neighbouring threads write neighbouring channels, or columns: to other banks.
    plane_pitch = extent_h * row_pitch | 1
    lattice = Lattice(
        extent_h, extent_w, columns, row_pitch, plane_pitch, config.chunk,
        gather.w.stride,
    )  # fmt: skip
    return lattice, wavefronts


@dataclass(frozen=True, eq=False, slots=True)
class PlacedRows:
    """Sparse rows, ready for the blocks of a configuration.

    Attributes:
        offsets: (nnz,) int32, where each entry reads, in bytes from a lane's place.
        begins: (rows, chunks + 1) int32, the first entry of each chunk, and the end.
        capacity: Entries of a block and a chunk, at most; a multiple of QUAD.
    """

    offsets: np.ndarray
    begins: np.ndarray
    capacity: int


def place_rows(gather: Gather, rows: Rows, dtype: str, block: SpmmBlock) -> PlacedRows:
    """Where the entries of sparse rows read the tiles of a block."""
    config, lattice = block.config, block.lattice
    rest, tap_w = np.divmod(rows.indices.astype(np.int64), gather.w.taps)
    channel, tap_h = np.divmod(rest, gather.h.taps)
    chunk, channel = np.divmod(channel, config.chunk)
    quotient, remainder = np.divmod(tap_w, gather.w.stride)
    word = (
        channel * lattice.plane_pitch
        + tap_h * lattice.row_pitch
        + remainder * lattice.columns
        + quotient
    )
    counts = np.zeros((gather.rows, block.chunks), np.int64)
    row = np.repeat(np.arange(gather.rows), rows.end - rows.begin)
    np.add.at(counts, (row, chunk), 1)
    begins = np.empty((gather.rows, block.chunks + 1), np.int64)
    begins[:, 0] = rows.begin
    np.cumsum(counts, axis=1, out=begins[:, 1:])
    begins[:, 1:] += rows.begin[:, None]
    return PlacedRows(
        (word * PACKS[dtype][1]).astype(np.int32),
        begins.astype(np.int32),
        _capacity(gather, counts, config),
    )


def _capacity(gather: Gather, counts: np.ndarray, config: SpmmConfig) -> int:
    """The most entries of a block and a chunk, where each row begins a quad."""
    padded = -(-counts // QUAD) * QUAD
    group_out = gather.out_channels // gather.groups
    # (groups of all sets, their rows, chunks)
    padded = padded.reshape(-1, group_out, counts.shape[1])
    firsts = np.arange(0, group_out, config.block_rows)
    return max(QUAD, int(np.add.reduceat(padded, firsts, axis=1).max(initial=0)))


def _cell_bytes(block: SpmmBlock) -> int:
    """What the lists of places take, in front of the buffers."""
    config, lattice = block.config, block.lattice
    cells = lattice.extent_h * lattice.extent_w * _CELL_BYTES
    outputs = config.tile_h * config.tile_w * _INDEX_BYTES
    return _aligned(max(cells, outputs))


def shared_mem_bytes(dtype: str, block: SpmmBlock, capacity: int) -> int:
    """Shared memory of a block that has so many entries of a chunk, at most."""
    return _cell_bytes(block) + max(
        block.buffers * _buffer_bytes(dtype, block, capacity), block.stage_bytes
    )


def _buffer_bytes(dtype: str, block: SpmmBlock, capacity: int) -> int:
    config, accumulator = block.config, PACKS[dtype][1]
    tile = config.chunk * block.lattice.plane_pitch * accumulator
    quad = _aligned(QUAD * (accumulator + _INDEX_BYTES))
    spans = _aligned(config.block_rows * _SPAN_BYTES)
    return _aligned(tile) + capacity // QUAD * quad + spans


def _aligned(nbytes: int) -> int:
    return -(-nbytes // PACK_BYTES) * PACK_BYTES


def fits(dtype: str, block: SpmmBlock, capacity: int, device: DeviceLimits) -> bool:
    """Whether the GPU can hold such a block."""
    return shared_mem_bytes(dtype, block, capacity) <= device.shared_mem_bytes


def spmm_launch(
    gather: Gather, dtype: str, block: SpmmBlock, capacity: int, activation: int = 0
) -> Launch:
    """The launch of the forward pass or of the input gradient.

    Args:
        gather: What is computed.
        dtype: Name of the dtype of inputs, values, bias and outputs.
        block: The configuration.
        capacity: That of the placed rows.
        activation: Code of the activation.

    Returns:
        A launch with the pointers read, values, offsets, begins, order (optional), bias
        (optional), origins and write.
    """
    config = block.config
    words = (
        *geometry_words(gather),
        *block.tiling.words(),
        block.tiling.subtiles,
        *block.lattice.words(),
        *divisor_words(config.block_rows),
        *divisor_words(config.tile_h * config.tile_w),
        *divisor_words(block.channel_threads),
        activation,
        config.chunk,
        block.chunks,
        block.row_groups,
        config.row_warps,
        config.warp_rows,
        config.slices.bit_length() - 1,
        capacity // QUAD,
        _buffer_bytes(dtype, block, capacity),
        block.stage_pitch,
        _cell_bytes(block),
        int(block.loads_quads),
        int(has_quads(gather, config.block_rows)),
        *memory_steps(gather),
    )
    sets = gather.h.row_sets * gather.w.row_sets
    return Launch(
        "conv2d_spmm",
        spmm_defines(dtype, config.positions, config.rows),
        (sets * block.blocks, 1, 1),
        ((config.warps + LOADERS) * WARP, 1, 1),
        shared_mem_bytes(dtype, block, capacity),
        _POINTERS,
        pack_words(geometry_longs(gather), words),
    )


def spmm_defines(dtype: str, positions: int, rows: int) -> tuple[tuple[str, str], ...]:
    """What conv2d_spmm.cu is compiled for."""
    return (
        ("DTYPE", dtype.upper()),
        ("POSITIONS", str(positions)),
        ("ROWS", str(rows)),
    )
