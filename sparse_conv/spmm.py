"""Tiles and entries of `kernels/conv2d_spmm.cu`, for kernels whose pattern is known.

Knows the layout of its tiles in shared memory, where each entry of a sparse row reads
them, and how `kernels/place_entries.cu` puts entries together. Pure functions: nothing
is compiled, uploaded or measured here. Which configuration is taken is decided in
`spmm_plan`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np

from sparse_conv.gather import Axis, Gather
from sparse_conv.launch import (
    GRID_LIMIT,
    WARP,
    Launch,
    divisor_words,
    geometry_longs,
    geometry_words,
    pack_words,
    read_pitch,
    write_pitch,
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
    phase_outputs,
)

_INDEX_BYTES = 4
# What shared memory delivers in a clock.
_WAVEFRONT_BYTES = 128
# Bytes of the structs Cell in conv2d_spmm.cu and Span in spmm_entries.cuh.
_CELL_BYTES = 8
_SPAN_BYTES = 8
# Warps that load, beside those that compute; as in conv2d_spmm.cu.
LOADERS = 8
# Those that compute, at most.
MAX_WARPS = 16
# Of place_entries.cu.
_PLACE_THREADS = 256
# The quads of a row, times the slices that divide them, fit 32 bits.
_MOST_ROW_LENGTH = 2**31 // MAX_WARPS

_POINTERS = ("read", "entries", "bias", "origins", "write")


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
        tile_w: Width of a tile; it may be wider than the outputs, whose lanes then read
            from places that don't share their banks.
        chunk: Input channels in shared memory at a time.
        images: Images of a tile.
    """

    positions: int
    rows: int
    warp_rows: int
    row_warps: int
    slices: int
    tile_h: int
    tile_w: int
    chunk: int
    images: int = 1

    @property
    def block_rows(self) -> int:
        """Output channels of a block."""
        return self.row_warps * self.warp_rows

    @property
    def warps(self) -> int:
        """Warps of a block that compute."""
        return self.row_warps * self.slices

    @property
    def pixels(self) -> int:
        """Pixels of a tile, of all its images."""
        return self.images * self.tile_h * self.tile_w


@dataclass(frozen=True, slots=True)
class SpmmBlock:
    """A configuration with all that follows from it.

    Attributes:
        config: The configuration.
        lattice: The layout of a chunk of a tile; pitches in accumulators. Rows may
            overlap where there is no input in any of them.
        image_pitch: From one image of a tile to the next, in accumulators.
        image_rows: Rows of the lattice until the next image's first.
        width: Outputs of a row of a tile.
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
    image_pitch: int
    image_rows: int
    width: int
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
    if config.pixels > config.positions * WARP:
        return None
    if gather.row_length > _MOST_ROW_LENGTH or not is_near(gather):
        return None
    layout = _make_layout(gather, dtype, config)
    tiles_of_images = dataclasses.replace(gather, n=-(-gather.n // config.images))
    tiling = make_tiling(tiles_of_images, config.tile_h, config.tile_w)
    row_groups = gather.groups * -(-group_out // config.block_rows)
    sets = gather.h.row_sets * gather.w.row_sets
    if sets * row_groups * tiling.subtiles > GRID_LIMIT:
        return None
    if _longest_step(gather, config, layout.lattice) > GRID_LIMIT:
        return None
    # An odd number: neighbouring rows then meet different banks.
    stage_pitch = config.pixels | 1
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
        layout.lattice,
        layout.image_pitch,
        layout.image_rows,
        layout.width,
        tiling,
        # Positions without pixels read one word.
        layout.wavefronts + config.positions - -(-config.pixels // WARP),
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
    apart = config.images - 1
    return max(
        apart * read_pitch(gather)[0]
        + lattice.extent_h * read_row
        + lattice.extent_w * read_column
        + 2 * max(WARP, config.chunk) * read_channel,
        apart * write_pitch(gather)[0]
        + config.tile_h * write_row
        + config.tile_w * write_column,
    )


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a tile's inputs lie; see SpmmBlock."""

    lattice: Lattice
    image_pitch: int
    image_rows: int
    width: int
    wavefronts: int


def _make_layout(gather: Gather, dtype: str, config: SpmmConfig) -> _Layout:
    """The layout with the fewest wavefronts, and of those one of the smallest."""
    width = min(config.tile_w, phase_outputs(gather.w))
    extent_h = (config.tile_h - 1) * gather.h.stride + gather.h.taps
    extent_w = (width - 1) * gather.w.stride + gather.w.taps
    columns = -(-extent_w // gather.w.stride)
    found = _find_pitches(
        columns * gather.w.stride,
        extent_h,
        _margin(gather.w, config.tile_w, extent_w),
        _margin(gather.h, config.tile_h, extent_h),
        gather.h.stride,
        (config.images, config.tile_h, config.tile_w),
        width,
        _WAVEFRONT_BYTES // PACKS[dtype][1],
    )
    # Neighbouring threads write neighbouring channels, or columns: to other banks.
    plane_pitch = found.words | 1
    lattice = Lattice(
        extent_h, extent_w, columns, found.row_pitch, plane_pitch, config.chunk,
        gather.w.stride,
    )  # fmt: skip
    return _Layout(
        lattice, found.image_pitch, found.image_rows, width, found.wavefronts
    )


def _margin(axis: Axis, tile: int, extent: int) -> int:
    """How many first, and as many last, places of a tile never have any input."""
    if axis.stride != 1 or phase_outputs(axis) > tile:
        return 0
    margins = []
    for origin in axis.origins:
        first = -(min(origin, 0) // axis.step)
        end = max(first, -(-(axis.inputs - origin) // axis.step))
        margins.append(min(first, extent - end))
    return max(0, min(margins, default=0))


@dataclass(frozen=True, slots=True)
class _Pitches:
    """Where the rows of a tile lie, of one channel: see SpmmBlock."""

    row_pitch: int
    image_pitch: int
    image_rows: int
    words: int
    wavefronts: int


@functools.lru_cache(maxsize=4096)
def _find_pitches(
    columns: int,
    extent_h: int,
    margin_w: int,
    margin_h: int,
    stride_h: int,
    tile: tuple[int, int, int],
    width: int,
    words_at_once: int,
) -> _Pitches:
    """Pitches with the fewest wavefronts, and of those the smallest.

    Args:
        columns: Words of a row.
        extent_h: Rows of an image.
        margin_w: Columns that a row may share with the next one.
        margin_h: Rows that an image may share with the next one.
        stride_h: Rows from an output to the one below.
        tile: Images, height and width in lanes.
        width: Outputs of a row.
        words_at_once: Words that shared memory delivers in a clock.

    Returns:
        The pitches, the words of a plane, and the clocks for all pixels of a tile.
    """
    images, tile_h, tile_w = tile
    pixels = np.arange(images * tile_h * tile_w)
    rest, x = np.divmod(pixels, tile_w)
    image, y = np.divmod(rest, tile_h)
    # Lanes behind the row read what others read.
    distinct = x < width
    warp, x, y, image = (
        array[distinct] for array in (pixels // WARP, x, stride_h * y, image)
    )

    def best(pitches: np.ndarray, image_rows: int) -> _Pitches:
        """Of (options, 2) row pitches and image pitches."""
        row, image_pitch = pitches.T[..., None]
        banks = (image * image_pitch + y * row + x) % words_at_once
        # A wavefront takes no more than one word of each bank.
        shape = (len(pitches), int(warp[-1]) + 1, words_at_once)
        option = np.arange(len(pitches))[:, None]
        place = np.ravel_multi_index((option, warp, banks), shape)
        counts = np.bincount(place.ravel(), minlength=math.prod(shape)).reshape(shape)
        full = -(-counts.sum(axis=2) // words_at_once)
        clocks = np.maximum(counts.max(axis=2), full).sum(axis=1)
        words = (pitches * (extent_h - 1, images - 1)).sum(axis=1) + columns
        first = int(np.lexsort((words, clocks))[0])
        row_pitch, image_pitch = map(int, pitches[first])
        return _Pitches(
            row_pitch, image_pitch, image_rows, int(words[first]), int(clocks[first])
        )

    more = np.arange(words_at_once)
    rows = columns - margin_w + more
    joined = extent_h - margin_h
    found = best(np.stack([rows, joined * rows], axis=1), joined)
    if images == 1:
        return found
    # Or else with a gap between images, so that their rows meet other banks.
    row = found.row_pitch
    gaps = np.stack([np.full_like(more, row), extent_h * row + more], axis=1)
    apart = best(gaps, extent_h)
    return min(found, apart, key=lambda one: (one.wavefronts, one.words))


@dataclass(frozen=True, eq=False, slots=True)
class PlacedRows:
    """Sparse rows, ready for the blocks of a configuration.

    A part is what a block needs of a chunk. Entries come in quads, and each row begins
    one.

    Attributes:
        sources: (parts, capacity) int32, which value an entry has; -1 where there is no
            entry.
        offsets: (parts, capacity) int32, where it reads, in bytes from a lane's place.
        spans: (parts, pieces, 4) int32, for each row its first quad and the number of
            its entries.
        capacity: Entries of a part, at most; a multiple of QUAD.
    """

    sources: np.ndarray
    offsets: np.ndarray
    spans: np.ndarray
    capacity: int


def place_rows(gather: Gather, rows: Rows, dtype: str, block: SpmmBlock) -> PlacedRows:
    """Where the entries of sparse rows lie, and where they read a block's tiles."""
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
    row = np.repeat(np.arange(gather.rows), rows.end - rows.begin)
    cells = gather.rows * block.chunks
    counts = np.bincount(row * block.chunks + chunk, minlength=cells)
    counts = counts.reshape(gather.rows, block.chunks)
    # Entries are in the order of rows, of channels, and of taps.
    entries = np.arange(len(row))
    begins = (np.cumsum(counts) - counts.ravel()).reshape(counts.shape)
    firsts, capacity = _first_quads(gather, counts, config)
    # The part of a row's first chunk.
    group_out = gather.out_channels // gather.groups
    group, in_group = np.divmod(np.arange(gather.rows), group_out)
    blocks = -(-group_out // config.block_rows)
    parts = (group * blocks + in_group // config.block_rows) * block.chunks
    place = (
        (parts[row] + chunk) * capacity
        + firsts[row, chunk] * QUAD
        + entries - begins[row, chunk]
    )  # fmt: skip
    shape = (gather.rows // group_out * blocks * block.chunks, capacity)
    sources, offsets = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    sources.flat[place] = entries if rows.order is None else rows.order[entries]
    offsets.flat[place] = word * PACKS[dtype][1]
    spans = np.zeros((shape[0], _span_bytes(config) // _SPAN_BYTES, 2), np.int32)
    part = parts[:, None] + np.arange(block.chunks)
    in_block = in_group[:, None] % config.block_rows
    spans[part, in_block] = np.stack([firsts, counts], axis=-1)
    return PlacedRows(sources, offsets, spans.reshape(shape[0], -1, 4), capacity)


def _first_quads(
    gather: Gather, counts: np.ndarray, config: SpmmConfig
) -> tuple[np.ndarray, int]:
    """For each row and chunk its first quad in its part, and the capacity of parts."""
    group_out = gather.out_channels // gather.groups
    chunks = counts.shape[1]
    # (groups of all sets, their rows, chunks)
    quads = (-(-counts // QUAD)).reshape(-1, group_out, chunks)
    behind = np.cumsum(quads, axis=1)
    first = np.arange(group_out) // config.block_rows * config.block_rows
    before = np.concatenate([np.zeros_like(behind[:, :1]), behind], axis=1)
    firsts = before[:, :-1] - before[:, first]
    most = int((firsts + quads).max(initial=1))
    return firsts.reshape(counts.shape), max(1, most) * QUAD


def _cell_bytes(block: SpmmBlock) -> int:
    """What the lists of places take, in front of the buffers."""
    config, lattice = block.config, block.lattice
    cells = config.images * lattice.extent_h * lattice.extent_w * _CELL_BYTES
    outputs = config.pixels * _INDEX_BYTES
    return _aligned(max(cells, outputs))


def shared_mem_bytes(dtype: str, block: SpmmBlock, capacity: int) -> int:
    """Shared memory of a block that has so many entries of a chunk, at most."""
    return _cell_bytes(block) + max(
        block.buffers * _buffer_bytes(dtype, block, capacity), block.stage_bytes
    )


def _buffer_bytes(dtype: str, block: SpmmBlock, capacity: int) -> int:
    config = block.config
    tile = config.chunk * block.lattice.plane_pitch * PACKS[dtype][1]
    return _aligned(tile) + _part_bytes(dtype, block, capacity)


def _part_bytes(dtype: str, block: SpmmBlock, capacity: int) -> int:
    """Of a block's entries of a chunk, and their spans."""
    quad = _aligned(QUAD * (PACKS[dtype][1] + _INDEX_BYTES))
    return capacity // QUAD * quad + _span_bytes(block.config)


def _span_bytes(config: SpmmConfig) -> int:
    return _aligned(config.block_rows * _SPAN_BYTES)


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
        A launch with the pointers read, entries, bias (optional), origins and write.
    """
    config = block.config
    words = (
        *geometry_words(gather),
        *block.tiling.words(),
        gather.n,
        config.images,
        block.tiling.subtiles,
        block.image_pitch,
        block.image_rows,
        block.width,
        *block.lattice.words(),
        *divisor_words(config.block_rows),
        *divisor_words(config.tile_h * config.tile_w),
        *divisor_words(config.pixels),
        *divisor_words(block.channel_threads),
        activation,
        config.chunk,
        block.chunks,
        block.row_groups,
        config.row_warps,
        config.warp_rows,
        config.slices.bit_length() - 1,
        capacity // QUAD,
        _part_bytes(dtype, block, capacity) // PACK_BYTES,
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


def place_launch(gather: Gather, dtype: str, block: SpmmBlock, capacity: int) -> Launch:
    """The launch that brings values to where blocks read them.

    Args:
        gather: What is computed.
        dtype: Name of the dtype of values.
        block: The configuration.
        capacity: That of the placed rows.

    Returns:
        A launch with the pointers values, sources, offsets, spans and write, see
        `entries_bytes`.
    """
    quads = capacity // QUAD
    span_pieces = _span_bytes(block.config) // PACK_BYTES
    count = _parts(gather, block) * (quads + span_pieces)
    return Launch(
        "place_entries",
        place_defines(dtype),
        (-(-count // _PLACE_THREADS), 1, 1),
        (_PLACE_THREADS, 1, 1),
        0,
        ("values", "sources", "offsets", "spans", "write"),
        pack_words((count,), (quads, span_pieces)),
    )


def entries_bytes(gather: Gather, dtype: str, block: SpmmBlock, capacity: int) -> int:
    """What `place_launch` writes."""
    return _parts(gather, block) * _part_bytes(dtype, block, capacity)


def _parts(gather: Gather, block: SpmmBlock) -> int:
    sets = gather.h.row_sets * gather.w.row_sets
    return sets * block.row_groups * block.chunks


def place_defines(dtype: str) -> tuple[tuple[str, str], ...]:
    """What place_entries.cu is compiled for."""
    return (("DTYPE", dtype.upper()),)


def spmm_defines(dtype: str, positions: int, rows: int) -> tuple[tuple[str, str], ...]:
    """What conv2d_spmm.cu is compiled for."""
    return (
        ("DTYPE", dtype.upper()),
        ("POSITIONS", str(positions)),
        ("ROWS", str(rows)),
    )
