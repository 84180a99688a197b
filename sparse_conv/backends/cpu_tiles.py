"""How many columns, channels and outputs the CPU loops, or code, take together.

A tile is what is summed at a time: some columns, for some output channels, for one
block of indices after the other. Models of the cycles that it takes choose it. Pure
arithmetic on sizes.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from sparse_conv.costs.terms import CODE_BLOCK, CODE_OUTPUTS, code_reads
from sparse_conv.gather import Axis, Gather


class Core(NamedTuple):
    """What differs between kinds of cores, and decides the cut.

    Attributes:
        planes: Sizes of a task's planes, in bytes, and by how much tasks of up to that
            size are slower than small ones.
        window_bytes: The part of the first-level cache that the planes which a tile
            reads find free.
        output_block: Output channels that are summed, and written, together, if there
            are as many.
        many_outputs: The same where their sums are loaded and stored once for each
            block of channels.
    """

    planes: tuple[tuple[int, float], ...]
    window_bytes: int
    output_block: int
    many_outputs: int


COMMON = Core(((384 * 1024, 1.0), (2**23, 1.3)), 28 * 1024, 16, 64)
# By the names that `cpu_code.core` gives.
CORES = {
    "avx2": COMMON,
    "avx512": COMMON,
    # Measured on Xeons with 2 MB of second-level and 48 KB of first-level cache. They
    # write two neighbouring lines past the caches in less time than a single one: 3x3,
    # 3 to 64 channels, 256x512 takes 1.15 ms, not 1.75.
    "amx": Core(
        ((384 * 1024, 1.0), (1280 * 1024, 1.15), (2**23, 1.3)), 28 * 1024, 32, 128
    ),
    # The same with AVX2 alone, as Numba may be told: its memory does not change.
    "amx-avx2": COMMON._replace(output_block=32, many_outputs=128),
}
# Products that are summed by themselves before they join the rest, at most. In one
# long chain the error of float32 would exceed that of TensorFlow's own convolution.
CHAIN_ENTRIES = 20
# Bytes of generated code for each product, about.
CODE_BYTES = 11
# Columns of a tile of it, at most. All are powers of two: others, which cut rows into
# uneven tiles, took up to a third longer.
_CODE_COLUMNS = 32
# Sums that a core's first cache has room for, in bytes, beside what is read.
_NEAR_SUMS_BYTES = 20 * 1024
# Sizes of code, in bytes, and the cycles in which a byte of it is fetched again.
_FETCHES = ((28 * 1024, 0.0), (768 * 1024, 1 / 40), (math.inf, 1 / 8))
# Code beyond this size fetches itself ahead of its use.
FAR_CODE_BYTES = 100 * 1024
# Blocks of channels are summed one after the other, so there must not be many more. Of
# 512 channels and 3x3 taps, twelfths don't fit a core's first cache; these do.
MAX_BLOCKS = 36
# Outputs of this size are written past the caches.
STREAMED_BYTES = 8 * 2**20


class Job(NamedTuple):
    """What a plan is for.

    Attributes:
        gather: What to compute; no extent of what is written may be 0.
        itemsize: Bytes of a number.
        lanes: Numbers in a cell.
        tile_cells: Cells that the loops sum at once, at most.
        entries: About how many nonzeros the kernel has.
        threads: Threads to cut for. Results of a wgrad depend on it.
        wgrad: Whether the plan is for a weight gradient.
        core: What to cut for.
        code: Whether the plan is for generated code; see `cpu_baked`.
    """

    gather: Gather
    itemsize: int
    lanes: int
    tile_cells: int
    entries: int
    threads: int
    wgrad: bool
    core: Core
    code: bool = False


class Tile(NamedTuple):
    """Columns that are summed together, the blocks of channels, and the time it takes.

    Attributes:
        cycles: Estimated time of a cell of all output channels of a row.
        columns: Columns that are summed together.
        blocks: Blocks of channels, or of other runs of indices.
        length: Indices in one block.
    """

    cycles: float
    columns: int
    blocks: int
    length: int


def choose_tile(job: Job) -> Tile:
    """The fastest tile.

    It decides in what order an output's products are summed, so it may follow from
    nothing that a number of threads has a part in, such as the cut.
    """
    gather = job.gather
    columns = max(-(-axis.outputs // axis.phases) for axis in (gather.h, gather.w))
    if is_pointwise(gather.h) and is_pointwise(gather.w):
        columns *= gather.h.outputs
    if job.code:
        most = min(_CODE_COLUMNS, columns)
        sizes = (2**i for i in range((most - 1).bit_length() + 1))
        lengths = _code_block_lengths(job)
        return min(
            _code_tile(job, size, length)
            for size, length in itertools.product(sizes, lengths)
        )
    channels = gather.in_channels // gather.groups
    taps = gather.h.taps * gather.w.taps
    tiles = [
        tile_of(job, size, taps * -(-channels // blocks))
        for size in range(1, min(job.tile_cells, columns) + 1)
        for blocks in candidates(channels)
        if blocks <= MAX_BLOCKS
    ]
    return min(tiles)


def _code_block_lengths(job: Job) -> list[int]:
    """Indices in a block: as many as make up a chain of products, or fewer.

    Errors grow with the length of chains as with their number.
    """
    gather = job.gather
    row_entries = max(1.0, job.entries / max(1, gather.rows))
    chain = max(CHAIN_ENTRIES, math.sqrt(row_entries))
    blocks = math.ceil(row_entries / chain)
    return [
        -(-gather.row_length // (blocks * times))
        for times in (1, 2, 4, 8)
        if times == 1 or blocks * times <= 2 * chain
    ]


def _code_tile(job: Job, columns: int, length: int, parts: int = 1) -> Tile:
    """A tile of generated code with so many columns, and indices in a block.

    Each of `parts` tasks computes some of the output channels.

    The times were measured on one core of an Intel Xeon (Sapphire Rapids), in cycles;
    only their ratios matter.
    """
    gather, cell_bytes = job.gather, job.itemsize * job.lanes
    blocks = -(-gather.row_length // length)
    row_entries = max(1.0, job.entries / max(1, gather.rows))
    together = min(gather.out_channels, CODE_BLOCK)
    outputs = min(together, CODE_OUTPUTS)
    zeros = 1 - min(1.0, row_entries / gather.row_length)
    reads = code_reads(gather, zeros, together)
    window = _window_cells(gather, length, columns) * cell_bytes
    # What is far from a core comes near with the first tap that needs it.
    far = max(0.0, 1 - job.core.window_bytes / window)
    far /= 1 + (min(gather.h.taps, gather.w.taps) - 1) * (1 - zeros**outputs)
    cycles = 0.6 * row_entries + (0.33 + 1.5 * far) * reads + 2.0 * blocks
    if exceeds_caches(job):
        # Memory takes longer for more at a time.
        cycles += 2.0 * math.log2(columns)
    # Sums that leave the first cache until they are written.
    cycles += 5.0 * max(0.0, 1 - _NEAR_SUMS_BYTES / (columns * together * cell_bytes))
    # What each tile takes anew: jumps that end loops, and code that is fetched.
    code = gather.out_channels * row_entries * CODE_BYTES / parts
    pace = next(pace for most, pace in _FETCHES if code <= most)
    again = 30.0 * blocks / outputs + row_entries * CODE_BYTES * pace
    return Tile(
        gather.out_channels * (cycles + again / columns), columns, blocks, length
    )


def _window_cells(gather: Gather, length: int, columns: int) -> float:
    """Cells that a row of so many columns reads, for so many indices."""
    cells = length / (gather.h.taps * gather.w.taps)
    for axis, outputs in ((gather.h, 1), (gather.w, columns)):
        reach = (axis.taps - 1) // axis.stride
        cells *= min(axis.stride, axis.taps) * (outputs + reach)
    return cells


def tile_of(job: Job, columns: int, length: int, parts: int = 1) -> Tile:
    """A tile with so many columns, and so many indices in a block: whole channels.

    The times were measured on one core of an AMD EPYC (Zen 4) with AVX-512 and with
    AVX2, in cycles; only their ratios matter.
    """
    if job.code:
        return _code_tile(job, columns, length, parts)
    gather, cell_bytes = job.gather, job.itemsize * job.lanes
    blocks = -(-gather.row_length // length)
    row_entries = max(1.0, job.entries / max(1, gather.rows))
    window = cell_bytes * _window_cells(gather, length, columns)
    near = min(1.0, job.core.window_bytes / window)
    scale = cell_bytes / 64
    entry = 0.9 + columns * scale * (1.0 + 0.6 * (1 - near))
    chains = math.ceil(row_entries / blocks / CHAIN_ENTRIES)
    row = 15 * chains + columns * scale * (1.5 if blocks == 1 else 6.5)
    if job.wgrad:
        # The sum of each entry is loaded and stored.
        entry, row = entry + 4.0, 15
    # The window is fetched anew for each group of outputs, the entries for each tile.
    groups = -(-gather.out_channels // outputs_together(job, blocks))
    fetch = 2 * window / 64 * blocks * (groups if blocks > 1 else 1)
    cycles = gather.out_channels * (row_entries * entry + blocks * row) + fetch
    return Tile(cycles / columns, columns, blocks, length)


def outputs_together(job: Job, blocks: int) -> int:
    """Output channels that are taken together, if there are as many."""
    if job.code:
        return CODE_BLOCK
    several = blocks > 1 and not job.wgrad
    return job.core.many_outputs if several else job.core.output_block


def exceeds_caches(job: Job) -> bool:
    """Whether the output is so large that it is written past the caches."""
    gather = job.gather
    numbers = gather.n * gather.h.outputs * gather.w.outputs * gather.out_channels
    return numbers * job.itemsize >= STREAMED_BYTES


def is_pointwise(axis: Axis) -> bool:
    """Whether each output reads the one input of its own place."""
    return (
        axis.taps == axis.phases == axis.step == axis.stride == axis.row_sets == 1
        and axis.origins == (0,)
        and axis.inputs == axis.outputs
    )


def candidates(largest: int) -> list[int]:
    """Ways to divide `largest` evenly, from one part to parts of one."""
    parts = {2**i * j for i in range(largest.bit_length()) for j in (1, 3)}
    return sorted({-(-largest // part) for part in parts})
