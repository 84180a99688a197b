"""Tiles of the GPU functions: their layout in shared memory, and which to take.

Knows the geometry of `kernels/tile.cuh` and a rough model of a multiprocessor, with
which it compares tiles. Knows nothing of pointers, launches or compilers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sparse_conv.gather import Axis, Gather
from sparse_conv.launch import (
    GRID_LIMIT,
    WARP,
    divisor_words,
    read_pitch,
    write_pitch,
)

# dtype -> (slots of a Pack, bytes of an accumulator); as in prelude.cuh.
PACKS = {
    "float16": (4, 4),
    "bfloat16": (4, 4),
    "float32": (4, 4),
    "float64": (2, 8),
    "int32": (4, 4),
}
PACK_BYTES = 16
# Numbers that are stored together where they can be; as in prelude.cuh.
QUAD = 4
WINDOW_BYTES = 32
# (POSITIONS, ROWS) that conv2d_gather.cu is compiled for.
GATHER_VARIANTS = ((4, 4), (2, 8), (1, 8))
MAX_WARPS = 8
# Threads of conv2d_gather that share a multiprocessor: its registers allow no more.
RESIDENT_THREADS = 512
# Packs that a thread loads at a time; as in tile.cuh.
LOADS = 3
# What a launch must take to be worth a delay of some of its blocks.
_LONG_CLOCKS = 80_000
# Entries that a warp of conv2d_gather stages at a time.
STAGED = 2 * WARP
# Shared memory that a block takes beside what it asks for.
RESERVED_BYTES = 1024
# More than any tile's height or width.
_LONGEST_TILE = 1024


def stored_bytes(dtype: str) -> int:
    """Size of a number in global memory."""
    return 2 if dtype in ("float16", "bfloat16") else PACKS[dtype][1]


# With so many multiprocessors, some of them are neighbours enough for any cluster.
_CLUSTER_MULTIPROCESSORS = 64


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What a plan has to know of a GPU.

    Attributes:
        multiprocessors: Number of multiprocessors.
        shared_mem_bytes: The most shared memory that a block may ask for.
        cluster_blocks: Blocks that may form a cluster; 1 where there are none.
        l2_bytes: Size of the cache that all multiprocessors share; 0 if it isn't known.
    """

    multiprocessors: int
    shared_mem_bytes: int
    cluster_blocks: int = 1
    l2_bytes: int = 0

    @classmethod
    def of(cls, attributes: Mapping[str, int], capability: int) -> DeviceLimits:
        """The limits of a GPU.

        Args:
            attributes: Those that CUDA tells of it, by CUDA's names.
            capability: As 10 * major + minor.
        """
        multiprocessors = attributes["MultiProcessorCount"]
        return cls(
            multiprocessors,
            attributes["MaxSharedMemoryPerBlockOptin"],
            cluster_blocks(capability, multiprocessors),
            attributes["L2CacheSize"],
        )


def cluster_blocks(capability: int, multiprocessors: int) -> int:
    """Blocks that may form a cluster.

    Args:
        capability: Of the GPU, as 10 * major + minor.
        multiprocessors: Those of the GPU, or of the slice of it that is used.
    """
    # Eight blocks need eight multiprocessors that are neighbours. Small GPUs, and
    # slices of large ones, may not have them, and would refuse the launch.
    return 8 if capability >= 90 and multiprocessors >= _CLUSTER_MULTIPROCESSORS else 1


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How a block of conv2d_gather.cu divides its work.

    Attributes:
        positions: Pixels of a lane in every slot; compiled in.
        rows: The most rows of a warp; compiled in.
        warp_rows: Rows of a warp, at most `rows`.
        row_warps: Warps side by side along the rows.
        position_warps: Warps side by side along the pixels.
        tile_h: Height of a subtile in outputs of one phase.
        tile_w: Width of a subtile.
        chunk: Input channels in shared memory at a time.
        passes: How often a block goes through its tile, with `block_rows` other rows
            each time; more than once only if the tile holds all channels.
    """

    positions: int
    rows: int
    warp_rows: int
    row_warps: int
    position_warps: int
    tile_h: int
    tile_w: int
    chunk: int
    passes: int = 1

    @property
    def block_rows(self) -> int:
        """Output channels of a block in one pass."""
        return self.row_warps * self.warp_rows

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.row_warps * self.position_warps


@dataclass(frozen=True, slots=True)
class Lattice:
    """The struct Lattice: a tile's layout in shared memory, pitches in Packs."""

    extent_h: int
    extent_w: int
    columns: int
    row_pitch: int
    plane_pitch: int
    chunk: int
    stride_w: int

    @property
    def nbytes(self) -> int:
        """Shared memory of the tile."""
        return self.chunk * self.plane_pitch * PACK_BYTES

    def words(self) -> tuple[int, ...]:
        """The struct's 32-bit members."""
        return (
            self.extent_h,
            self.extent_w,
            self.columns,
            self.row_pitch,
            self.plane_pitch,
            *divisor_words(self.chunk),
            *divisor_words(self.extent_h),
            *divisor_words(self.extent_w),
            *divisor_words(self.stride_w),
        )


@dataclass(frozen=True, slots=True)
class Tiling:
    """The struct Tiling: how the subtiles of one pair of row sets are numbered."""

    tile_h: int
    tile_w: int
    tiles_h: int
    tiles_w: int
    set_phases_h: int
    set_phases_w: int
    subtiles: int

    def words(self) -> tuple[int, ...]:
        """The struct's 32-bit members."""
        return (
            self.tile_h,
            self.tile_w,
            *divisor_words(self.tiles_h),
            *divisor_words(self.tiles_w),
            *divisor_words(self.set_phases_h),
            *divisor_words(self.set_phases_w),
            *divisor_words(self.tile_w),
        )


def phase_outputs(axis: Axis) -> int:
    """Outputs of the phase that has the most; at least 1, also where there are none."""
    return max(1, -(-axis.outputs // axis.phases))


def make_lattice(
    gather: Gather, tile_h: int, tile_w: int, chunk: int, *, channels_last: bool
) -> Lattice:
    """The layout of what a subtile of this size reads."""
    extent_h = (tile_h - 1) * gather.h.stride + gather.h.taps
    extent_w = (tile_w - 1) * gather.w.stride + gather.w.taps
    return _lattice(
        extent_h,
        extent_w,
        gather.h.stride,
        gather.w.stride,
        tile_w,
        chunk,
        channels_last,
    )


def make_output_lattice(
    tile_h: int, tile_w: int, chunk: int, *, channels_last: bool
) -> Lattice:
    """The layout of a subtile's own outputs, as wgrad reads them."""
    return _lattice(tile_h, tile_w, 1, 1, tile_w, chunk, channels_last)


def _lattice(
    extent_h: int,
    extent_w: int,
    stride_h: int,
    stride_w: int,
    tile_w: int,
    chunk: int,
    channels_last: bool,
) -> Lattice:
    columns = -(-extent_w // stride_w)
    row_pitch = _row_pitch(columns * stride_w, stride_h, tile_w)
    plane_pitch = extent_h * row_pitch
    if channels_last:
        # Eight threads store eight Packs at a time, channels first: spread them.
        distance = -(-8 // min(chunk, 8))
        plane_pitch += (distance - plane_pitch) % 8
    return Lattice(extent_h, extent_w, columns, row_pitch, plane_pitch, chunk, stride_w)


def _row_pitch(width: int, stride_h: int, tile_w: int) -> int:
    """`width`, or more where eight lanes across two rows would hit the same banks."""
    if tile_w % 8 == 0:
        return width
    for pitch in range(width, width + 8):
        if (stride_h * pitch - tile_w) % 8 == 0:
            return pitch
    return width


def make_tiling(gather: Gather, tile_h: int, tile_w: int) -> Tiling:
    """The numbering of subtiles of this size."""
    h, w = gather.h, gather.w
    tiles_h = -(-phase_outputs(h) // tile_h)
    tiles_w = -(-phase_outputs(w) // tile_w)
    set_phases_h = -(-len(h.origins) // h.row_sets)
    set_phases_w = -(-len(w.origins) // w.row_sets)
    subtiles = gather.n * set_phases_h * set_phases_w * tiles_h * tiles_w
    return Tiling(
        tile_h, tile_w, tiles_h, tiles_w, set_phases_h, set_phases_w, subtiles
    )


def stores_quads(gather: Gather, config: TileConfig) -> bool:
    """Whether conv2d_gather.cu may store four channels at a time."""
    # With eight rows a warp, scalar stores were faster: 95 us instead of 106 for
    # 3x3, 64 to 64 channels, 56x56, batch 32; with four, quads: 64 instead of 68 us for
    # 11x11, 3 to 64 channels, 256x512.
    return config.rows == 4 and has_quads(gather, config.warp_rows)


def has_quads(gather: Gather, outputs: int) -> bool:
    """Whether `outputs` channels of a pixel at a time are aligned quads in memory."""
    group_out = gather.out_channels // gather.groups
    return gather.data_format == "NHWC" and not any(
        channels % QUAD for channels in (outputs, gather.out_channels, group_out)
    )


def stage_pitch(block_rows: int, quads: bool) -> int:
    """Accumulators from one pixel to the next while outputs are staged.

    An odd number, or an odd number of quads: then no two lanes meet in a bank.
    """
    return (block_rows // 4 | 1) * 4 if quads else block_rows | 1


@functools.lru_cache(maxsize=1024)
def is_near(gather: Gather) -> bool:
    """Whether 31 bits are enough for all that tiles compute: steps and coordinates."""
    return (
        max(memory_steps(gather)) <= GRID_LIMIT
        and _reach(gather.h) <= GRID_LIMIT
        and _reach(gather.w) <= GRID_LIMIT
    )


def _reach(axis: Axis) -> int:
    """More than any coordinate, and any distance between two, along an axis."""
    tiled = phase_outputs(axis) + _LONGEST_TILE
    first = max((abs(origin) for origin in axis.origins), default=0)
    read = axis.inputs + first + axis.step * (axis.stride * tiled + 1)
    return max(read, axis.outputs + axis.phases * (tiled + 1))


def memory_steps(gather: Gather) -> tuple[int, ...]:
    """The struct Steps: elements from a lattice position to the next, and channels."""
    steps = []
    for pitch, (step_h, step_w) in zip(
        (read_pitch(gather), write_pitch(gather)),
        ((gather.h.step, gather.w.step), (gather.h.phases, gather.w.phases)),
        strict=True,
    ):
        steps += [pitch[1] * step_h, pitch[2] * step_w, pitch[3]]
    return tuple(steps)


def _stage(
    gather: Gather, config: TileConfig, dtype: str, room: int
) -> tuple[int, int]:
    """How many of a lane's positions are staged at a time, and the bytes they take.

    All of them, if they fit into `room` bytes.
    """
    slots, accumulator = PACKS[dtype]
    pixels = config.position_warps * WARP
    # Quads take more room; whether an activation prevents them is not known here.
    pitch = stage_pitch(config.block_rows, stores_quads(gather, config))
    nbytes = slots * pixels * pitch * accumulator
    positions = config.positions
    while positions > 1 and positions * nbytes > room:
        positions //= 2
    return positions, positions * nbytes


@dataclass(frozen=True, slots=True)
class Block:
    """A configuration with all that follows from it."""

    config: TileConfig
    lattice: Lattice
    tiling: Tiling
    stage_positions: int
    stage_begin: int
    shared_mem_bytes: int
    row_groups: int
    subtile_groups: int
    blocks: int


def make_block(
    gather: Gather, dtype: str, config: TileConfig, device: DeviceLimits
) -> Block | None:
    """All that follows from a configuration; None where the GPU can't hold it."""
    lattice = make_lattice(
        gather,
        config.tile_h,
        config.tile_w,
        config.chunk,
        channels_last=gather.data_format == "NHWC",
    )
    slots, accumulator = PACKS[dtype]
    front = 2 * slots * WINDOW_BYTES + config.warps * STAGED * 2 * accumulator
    room = device.shared_mem_bytes // 2 - RESERVED_BYTES - front
    stage_begin = lattice.nbytes if config.passes > 1 else 0
    stage_positions, stage_bytes = _stage(
        gather, config, dtype, max(lattice.nbytes, room) - stage_begin
    )
    shared = front + max(lattice.nbytes, stage_begin + stage_bytes)
    tiling = make_tiling(gather, config.tile_h, config.tile_w)
    group_out = gather.out_channels // gather.groups
    row_groups = gather.groups * -(-group_out // (config.passes * config.block_rows))
    subtile_groups = -(-tiling.subtiles // slots)
    sets = gather.h.row_sets * gather.w.row_sets
    blocks = sets * subtile_groups * row_groups
    if shared > device.shared_mem_bytes or blocks > GRID_LIMIT:
        return None
    if config.passes > 1 and config.chunk * gather.groups < gather.in_channels:
        return None
    if tiling.subtiles + slots > GRID_LIMIT:
        return None
    if not is_near(gather):
        return None
    return Block(
        config,
        lattice,
        tiling,
        stage_positions,
        stage_begin,
        shared,
        row_groups,
        subtile_groups,
        blocks,
    )


def choose_block(
    gather: Gather, dtype: str, nnz: int, device: DeviceLimits
) -> tuple[Block | None, float]:
    """The best tile by the model, and its clocks; None where none fits or writes."""
    best, best_clocks = None, float("inf")
    if not _group_out(gather):
        return best, best_clocks
    for config in candidates(gather, dtype, device):
        block = make_block(gather, dtype, config, device)
        if block is None:
            continue
        clocks = model_clocks(gather, dtype, nnz, block, device)
        if clocks < best_clocks:
            best, best_clocks = block, clocks
    if best is not None:
        return _with_passes(gather, dtype, nnz, best, best_clocks, device)
    return best, best_clocks


def _with_passes(
    gather: Gather,
    dtype: str,
    nnz: int,
    best: Block,
    best_clocks: float,
    device: DeviceLimits,
) -> tuple[Block, float]:
    """The best number of passes; it hardly changes which tile is the best."""
    config = best.config
    for passes in (2, 4, 8):
        more = dataclasses.replace(config, passes=passes)
        block = make_block(gather, dtype, more, device)
        if block is None or (passes - 1) * config.block_rows >= _group_out(gather):
            break
        clocks = model_clocks(gather, dtype, nnz, block, device)
        if clocks < best_clocks:
            best, best_clocks = block, clocks
    return best, best_clocks


def _group_out(gather: Gather) -> int:
    return gather.out_channels // gather.groups


def candidates(
    gather: Gather, dtype: str, device: DeviceLimits
) -> Iterator[TileConfig]:
    """The configurations worth comparing."""
    group_out = max(1, _group_out(gather))
    for positions, rows in GATHER_VARIANTS:
        for row_warps, warp_rows in _row_splits(group_out, rows):
            for position_warps in (1, 2, 4, 8):
                if row_warps * position_warps > MAX_WARPS:
                    break
                pixels = positions * position_warps * WARP
                for tile_h, tile_w in _tiles(gather, pixels):
                    chunk = _chunk(gather, tile_h, tile_w, device)
                    yield TileConfig(
                        positions, rows, warp_rows, row_warps, position_warps,
                        tile_h, tile_w, chunk,
                    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _row_splits(group_out: int, rows: int) -> tuple[tuple[int, int], ...]:
    """(row_warps, warp_rows): a group's channels at once, or a part in powers of 2."""
    splits = set()
    for row_warps in (1, 2, 4, 8, min(group_out, MAX_WARPS)):
        for warp_rows in (1, 2, 4, 8, -(-group_out // row_warps)):
            if warp_rows <= rows and (row_warps - 1) * warp_rows < group_out:
                splits.add((row_warps, warp_rows))
    return tuple(sorted(splits))


@functools.lru_cache(maxsize=4096)
def _tiles(gather: Gather, pixels: int) -> tuple[tuple[int, int], ...]:
    """The three subtiles of at most so many pixels with the least to load."""
    height, width = phase_outputs(gather.h), phase_outputs(gather.w)
    widths = {4, 8, 16, 32} | {-(-width // parts) for parts in (1, 2, 4)}
    loads = {}
    for tile_w in {min(w, width) for w in widths}:
        if tile_w <= pixels:
            tile_h = min(pixels // tile_w, height)
            lattice = make_lattice(gather, tile_h, tile_w, 1, channels_last=False)
            tiles = -(-height // tile_h) * -(-width // tile_w)
            # A lane's pixel costs more than a position of the lattice.
            cost = tiles * (4 * pixels + lattice.extent_h * lattice.extent_w)
            loads[tile_h, tile_w] = cost
    return tuple(sorted(loads, key=lambda tile: (loads[tile], tile))[:3])


def _chunk(gather: Gather, tile_h: int, tile_w: int, device: DeviceLimits) -> int:
    """Channels at a time, in chunks of equal size, so that two blocks are resident."""
    group_in = max(1, gather.in_channels // gather.groups)
    plane = make_lattice(gather, tile_h, tile_w, 1, channels_last=False).nbytes
    room = device.shared_mem_bytes // 2 - RESERVED_BYTES - 4 * 1024
    most = max(1, min(group_in, room // (plane + 7 * PACK_BYTES)))
    return -(-group_in // -(-group_in // most))


def model_clocks(
    gather: Gather, dtype: str, nnz: int, block: Block, device: DeviceLimits
) -> float:
    """Clocks of the whole launch, roughly; only for comparing configurations.

    Shared memory is the bound: a Pack for 32 lanes takes four clocks of a
    multiprocessor, the broadcast of an entry two. Blocks that are resident together
    share it, but none is faster than the latencies of its own longest warp allow.
    """
    config, lattice = block.config, block.lattice
    group_in = gather.in_channels // gather.groups
    group_out = gather.out_channels // gather.groups
    chunks = -(-group_in // config.chunk)
    block_rows = group_out / -(-group_out // config.block_rows)
    row_entries = nnz / max(gather.rows, 1)
    entry_clocks = 4 * config.positions + 2
    batches = chunks + row_entries / STAGED
    packs = config.chunk * lattice.extent_h * lattice.extent_w
    stores = config.positions * config.position_warps * block_rows
    rows = (row_entries * entry_clocks + batches * 30) * block_rows
    shared = config.passes * (rows * config.position_warps + stores * 14)
    shared += chunks * packs / WARP * 25
    warp_rows = min(config.warp_rows, block_rows)
    load_rounds = -(-packs // (config.warps * WARP * LOADS))
    rows = warp_rows * (row_entries * (entry_clocks + 15) + batches * 700)
    alone = config.passes * (rows + stores / config.warps * 300)
    alone += chunks * (800 + load_rounds * 1600) + 4000
    resident = min(
        (device.shared_mem_bytes + RESERVED_BYTES)
        // (block.shared_mem_bytes + RESERVED_BYTES),
        RESIDENT_THREADS // (config.warps * WARP),
    )
    places = device.multiprocessors * resident
    full, rest = divmod(block.blocks, places)
    last = -(-rest // device.multiprocessors)
    # While blocks load, the others compute only once they have drifted apart.
    start = chunks * packs / (config.warps * WARP) * 20 + 2500
    clocks = full * max(resident * shared + start, alone)
    return clocks + (max(last * shared + start, alone) if rest else 0)


def first_late_block(
    gather: Gather, dtype: str, nnz: int, block: Block, device: DeviceLimits
) -> int:
    """The first block that starts late, so that two don't load and store together.

    It pays where there is one wave of blocks, two to a multiprocessor, that compute for
    long: 61 instead of 64 us for 11x11, 3 to 64 channels, 256x512, on an H100, delayed
    by 6 us, and nothing gained by 2 us or lost by 9 us.

    Returns:
        Its number; beyond the last block where none is late.
    """
    alone = device.multiprocessors
    if not alone < block.blocks <= 2 * alone:
        return GRID_LIMIT
    clocks = model_clocks(gather, dtype, nnz, block, device)
    return alone if clocks > _LONG_CLOCKS else GRID_LIMIT


def direct_clocks(gather: Gather, nnz: int, device: DeviceLimits) -> float:
    """As `model_clocks`, for conv2d_gather_direct.cu."""
    row_entries = nnz / max(gather.rows, 1)
    outputs = gather.n * gather.h.outputs * gather.w.outputs * gather.out_channels
    warps = -(-outputs // WARP)
    throughput = warps / device.multiprocessors * (row_entries * 20 + 300)
    return max(throughput, row_entries * 600) + 4000


@dataclass(frozen=True, slots=True)
class WgradConfig:
    """How a block of conv2d_wgrad.cu divides its work.

    Attributes:
        positions: Pixels of a lane in every slot; compiled in.
        warps: Warps of a block; each has rows of its own.
        warp_rows: Rows of a warp, at most 32.
        tile_h: Height of a subtile.
        tile_w: Width of a subtile.
        chunk: Input channels in shared memory at a time.
        splits: Over how many blocks the pixels are divided: as many partial sums.
    """

    positions: int
    warps: int
    warp_rows: int
    tile_h: int
    tile_w: int
    chunk: int
    splits: int


@dataclass(frozen=True, slots=True)
class WgradBlock:
    """A configuration of wgrad with all that follows from it."""

    config: WgradConfig
    lattice: Lattice
    outputs: Lattice
    tiling: Tiling
    shared_mem_bytes: int
    row_groups: int
    subtile_groups: int
    splits: int


def make_wgrad_block(
    gather: Gather, dtype: str, config: WgradConfig, device: DeviceLimits
) -> WgradBlock | None:
    """All that follows from a configuration; None where the GPU can't hold it."""
    channels_last = gather.data_format == "NHWC"
    tile_h, tile_w = config.tile_h, config.tile_w
    lattice = make_lattice(
        gather, tile_h, tile_w, config.chunk, channels_last=channels_last
    )
    block_rows = config.warps * config.warp_rows
    outputs = make_output_lattice(
        tile_h, tile_w, block_rows, channels_last=channels_last
    )
    slots = PACKS[dtype][0]
    shared = 2 * slots * WINDOW_BYTES + config.warps * WARP * 4
    shared += lattice.nbytes + outputs.nbytes
    tiling = make_tiling(gather, tile_h, tile_w)
    subtile_groups = -(-tiling.subtiles // slots)
    group_out = gather.out_channels // gather.groups
    row_groups = gather.groups * -(-group_out // block_rows)
    splits = max(1, min(config.splits, subtile_groups))
    if shared > device.shared_mem_bytes or splits * row_groups > GRID_LIMIT:
        return None
    if tiling.subtiles + slots > GRID_LIMIT:
        return None
    if not is_near(gather):
        return None
    return WgradBlock(
        config, lattice, outputs, tiling, shared, row_groups, subtile_groups, splits
    )


def _resident_wgrad_block(
    gather: Gather, dtype: str, config: WgradConfig, device: DeviceLimits
) -> WgradBlock | None:
    """The block with fewer channels at a time, until all that there are fit.

    Where there are more blocks than multiprocessors, two have to be resident.
    """
    half = device.shared_mem_bytes // 2 - RESERVED_BYTES
    while True:
        block = make_wgrad_block(gather, dtype, config, device)
        if block:
            blocks = block.subtile_groups * block.row_groups
            alone = blocks <= device.multiprocessors
            if alone or block.shared_mem_bytes <= half:
                return block
        if config.chunk == 1:
            return block
        config = dataclasses.replace(config, chunk=-(-config.chunk // 2))


def choose_wgrad_block(
    gather: Gather, dtype: str, device: DeviceLimits, partials: int
) -> WgradBlock | None:
    """The tile with the least padding and halo that fits; None where none fits.

    Args:
        gather: The forward pass's gather.
        dtype: Name of the dtype.
        device: The GPU's limits.
        partials: The most partial sums that the workspace may hold.

    Returns:
        The block, with as many splits as fill the GPU twice.
    """
    best, best_cost = None, float("inf")
    group_out = max(1, gather.out_channels // gather.groups)
    for positions in (4,):
        warps = min(MAX_WARPS, group_out)
        warp_rows = min(4, -(-group_out // warps))
        for tile_h, tile_w in _tiles(gather, positions * WARP):
            chunk = _chunk(gather, tile_h, tile_w, device)
            config = WgradConfig(positions, warps, warp_rows, tile_h, tile_w, chunk, 1)
            block = _resident_wgrad_block(gather, dtype, config, device)
            if block is None:
                continue
            cost = block.subtile_groups * (
                positions * WARP + block.lattice.extent_h * block.lattice.extent_w / 4
            )
            if cost < best_cost:
                best, best_cost = block, cost
    if best is None:
        return None
    wanted = -(-2 * device.multiprocessors // max(1, best.row_groups))
    splits = max(1, min(wanted, partials))
    return make_wgrad_block(
        gather, dtype, dataclasses.replace(best.config, splits=splits), device
    )
