"""From the values of a kernel to launches of code that is generated for them.

Knows the layout of the tiles of `kernels/conv2d_baked.cu` and the form of the text that
it includes. Pure functions: nothing is compiled or measured here. Which configuration
is taken, and whether it pays, is decided in `baked_plan`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
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
    PACKS,
    RESERVED_BYTES,
    DeviceLimits,
    Tiling,
    has_quads,
    is_near,
    make_tiling,
    memory_steps,
    stored_bytes,
)

# Bytes of the struct Item in conv2d_baked.cu, and how many a block keeps.
ITEM_BYTES = 80
ITEMS = 3
# Channels that a warp stages at a time; as in conv2d_baked.cu.
STAGED = 32
# Up to so many sums of a thread, each chunk has sums of its own; as there.
PARTIAL_SUMS = 16
# Products of one function, at most, where it has several parts: the compiler's time
# grows faster than the code.
FUNCTION_PRODUCTS = 32_000
# Pieces of one function, at most, where it has several parts.
FUNCTION_PIECES = 512

# Parts share the multiprocessors if that leaves at most a tenth of them without work.
_USED_MULTIPROCESSORS = 0.9

# Numbers of these dtypes are converted on their way into the tile. Several of them are
# copied, and land beside it; one by one they pass through registers: so many loads of a
# thread may be on their way together then.
CONVERTED = ("float16", "bfloat16")
_MOST_IN_FLIGHT = 32
_LEAST_IN_FLIGHT = 2
# Registers of a multiprocessor, and those that a thread needs while it loads, beside
# its sums and what it has loaded.
REGISTERS = 65536
_LOADING_REGISTERS = 30

_POINTERS = ("read", "bias", "origins", "write")


@dataclass(frozen=True, slots=True)
class BakedConfig:
    """How a block of conv2d_baked.cu divides its work.

    Attributes:
        outputs: Output channels of a thread.
        warps: Warps of a block that compute, of all teams; one more finds their work.
        resident: Blocks that share a multiprocessor; bounds a thread's registers.
        tile_h: Height of a tile in outputs of one phase.
        tile_w: Width of a tile.
        chunk: Input channels in shared memory at a time.
        pixels: Pixels of a thread, one above the other.
        vectors: Whether several channels are loaded at once, where they lie side by
            side. They have to be loaded even if few of them are used.
        teams: Teams of warps; each computes another part from the same tile.
        splits: Blocks of a cluster, each of which computes with an equal share of the
            input channels; they add their sums and share the outputs.
    """

    outputs: int
    warps: int
    resident: int
    tile_h: int
    tile_w: int
    chunk: int
    pixels: int = 1
    vectors: bool = True
    teams: int = 1
    splits: int = 1

    @property
    def sums(self) -> int:
        """Sums of a thread."""
        return self.outputs * self.pixels

    @property
    def team_warps(self) -> int:
        """Warps of a team."""
        return self.warps // self.teams

    @property
    def thread_rows(self) -> int:
        """Rows of threads that a tile takes."""
        return -(-self.tile_h // self.pixels)


@dataclass(frozen=True, slots=True)
class Tile:
    """The layout of a tile in shared memory; pitches in accumulators.

    Attributes:
        vector: Channels that lie side by side, here and in global memory, so that one
            load reads them all.
        nbytes: Size of a tile of all channels of a chunk.
    """

    extent_h: int
    extent_w: int
    columns: int
    row_pitch: int
    column_pitch: int
    channel_pitch: int
    vector: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Loading:
    """How the threads of a block share the loading of a tile.

    Attributes:
        row_threads: Threads that load the same row.
        column_threads: Threads that load the same column of it, other channels each.
        rows: Rows that are loaded at once.
        columns: Columns that are loaded at once.
        row_turns: So often, for all rows; the same for columns, and for the channels of
            a chunk.
        turns: Loads of one thread.
        unit: Channels that a thread loads at once.
        lands: Whether they are copied to a place beside the tile and converted there.
        in_flight: Loads of one thread that pass through registers together; 0 where
            they are copies, all of which are on their way together.
    """

    row_threads: int
    column_threads: int
    rows: int
    columns: int
    row_turns: int
    column_turns: int
    channel_turns: int
    turns: int
    unit: int
    lands: bool
    in_flight: int

    @property
    def waits(self) -> int:
        """So often a thread waits for loads."""
        if not self.in_flight:
            return 1
        return self.turns // self.row_turns * -(-self.row_turns // self.in_flight)


@dataclass(frozen=True, slots=True)
class BakedBlock:
    """A configuration with all that follows from it.

    Attributes:
        config: The configuration.
        tile: The tiles in shared memory.
        tiling: How the outputs are divided into tiles.
        loading: How a tile is loaded.
        chunks: Chunks of channels, of all blocks of a cluster.
        parts: Pieces of work that have code of their own, each for all tiles. The teams
            of a block compute neighbouring ones, of the same group.
        group_parts: Parts of one group.
        multiprocessors: Those of the GPU.
        buffers: Tiles in shared memory: 2 if the next one is loaded meanwhile.
        stage: Where outputs are staged, or sums exchanged, in bytes behind the items.
        landing: Where numbers that are to be converted land; the same.
        shared_mem_bytes: Shared memory of a block.
        streams_in: Whether what is read may leave the GPU's L2 cache first, before the
            code does.
        streams_out: Whether what is written may.
    """

    config: BakedConfig
    tile: Tile
    tiling: Tiling
    loading: Loading
    chunks: int
    parts: int
    group_parts: int
    multiprocessors: int
    buffers: int
    stage: int
    landing: int
    shared_mem_bytes: int
    streams_in: bool = False
    streams_out: bool = False

    @property
    def own_chunks(self) -> int:
        """Chunks of one block."""
        return self.chunks // self.config.splits

    @property
    def most_blocks(self) -> int:
        """Blocks that the GPU can hold at a time."""
        return self.config.resident * self.multiprocessors


def make_baked_block(
    gather: Gather, dtype: str, config: BakedConfig, device: DeviceLimits
) -> BakedBlock | None:
    """All that follows from a configuration; None where the GPU can't hold it."""
    tile = _make_tile(gather, dtype, config)
    tiling = make_tiling(gather, config.tile_h, config.tile_w)
    chunks = -(-(gather.in_channels // gather.groups) // config.chunk)
    group_parts = -(-(gather.out_channels // gather.groups) // config.outputs)
    parts = gather.h.row_sets * gather.w.row_sets * gather.groups * group_parts
    items = parts // config.teams * tiling.subtiles
    loading = _make_loading(gather, dtype, config, tile, chunks // config.splits)
    # A thread's outputs take turns in the stage, but all sums are exchanged at once.
    pitch = _stage_pitch(gather, dtype) if config.splits == 1 else config.sums
    staged = config.warps * WARP * pitch * PACKS[dtype][1]
    landed = _landed_bytes(dtype, config, loading)
    most_blocks = config.resident * device.multiprocessors
    room = device.shared_mem_bytes + RESERVED_BYTES
    room = room // config.resident - RESERVED_BYTES - ITEMS * ITEM_BYTES
    room -= staged + landed
    # There is nothing to load ahead where a block has a single tile of all channels.
    goes_on = chunks > config.splits or (config.splits == 1 and items > most_blocks)
    buffers = min(2 if goes_on else 1, room // tile.nbytes)
    if buffers < 1:
        return None
    stage = tile.nbytes * buffers
    landing = stage + staged
    shared = ITEMS * ITEM_BYTES + landing + landed
    # Items are padded to what a whole number of multiprocessors takes.
    padded = items * config.splits / _USED_MULTIPROCESSORS + device.multiprocessors
    if padded > GRID_LIMIT or not is_near(gather):
        return None
    if _longest_step(gather, config, tile) > GRID_LIMIT:
        return None
    if config.thread_rows * config.tile_w > config.team_warps * WARP:
        return None
    if group_parts % config.teams or config.warps % config.teams:
        return None
    if not _can_split(gather, config, chunks, device):
        return None
    return BakedBlock(
        config,
        tile,
        tiling,
        loading,
        chunks,
        parts,
        group_parts,
        device.multiprocessors,
        buffers,
        stage,
        landing,
        shared,
    )


def _can_split(
    gather: Gather, config: BakedConfig, chunks: int, device: DeviceLimits
) -> bool:
    """Whether blocks can have equal shares of the channels, read and written."""
    if config.splits == 1:
        return True
    group_in = gather.in_channels // gather.groups
    return (
        config.splits <= device.cluster_blocks
        and config.pixels == 1
        and config.outputs % config.splits == 0
        and chunks % config.splits == 0
        and group_in % config.chunk == 0
    )


def _longest_step(gather: Gather, config: BakedConfig, tile: Tile) -> int:
    """From a tile's first element to its last, at most: a thread has 32 bits for it."""
    read_row, read_column, read_channel, write_row, write_column, write_channel = (
        memory_steps(gather)
    )
    # Loops go further before they end: by the rows of all loads that go together.
    return max(
        (3 * tile.extent_h + WARP * config.warps) * read_row
        + tile.columns * gather.w.stride * read_column
        + config.chunk * read_channel,
        config.tile_h * write_row
        + config.tile_w * write_column
        + config.outputs * write_channel,
    )


def _make_loading(
    gather: Gather, dtype: str, config: BakedConfig, tile: Tile, chunks: int
) -> Loading:
    """The division among the threads that has the fewest loads in a row."""
    threads = config.warps * WARP
    unit = tile.vector
    if dtype in CONVERTED and gather.data_format == "NHWC":
        # What lies side by side and aligned, as far as a copy reaches.
        both = math.gcd(config.chunk, gather.in_channels // gather.groups)
        unit = next((unit for unit in (8, 4) if both % unit == 0), unit)
    # Neighbouring threads read neighbouring memory.
    units = config.chunk // unit if gather.data_format == "NHWC" else 1
    column_threads = min(units, threads)
    channel_turns = -(-config.chunk // (column_threads * unit))
    lands = dtype in CONVERTED and unit > 1
    in_flight = 0
    if dtype in CONVERTED and not lands:
        in_flight = _in_flight(config, chunks)
    possible = []
    for wanted_turns in range(1, min(tile.columns, 8) + 1):
        columns = -(-tile.columns // wanted_turns)
        if columns * column_threads > threads:
            columns = threads // column_threads
        row_threads = columns * column_threads
        rows = min(tile.extent_h, threads // row_threads)
        row_turns = -(-tile.extent_h // rows)
        column_turns = -(-tile.columns // columns)
        turns = row_turns * column_turns * gather.w.stride * channel_turns
        loading = Loading(
            row_threads, column_threads, rows, columns, row_turns, column_turns,
            channel_turns, turns, unit, lands, min(row_turns, in_flight),
        )  # fmt: skip
        possible.append(loading)
    return min(possible, key=_loading_cost)


def _loading_cost(loading: Loading) -> tuple[int, int]:
    if loading.lands:
        return 0, loading.turns + loading.turns // loading.row_turns
    return loading.waits, loading.turns


def _landed_bytes(dtype: str, config: BakedConfig, loading: Loading) -> int:
    """What all threads load of a tile, where it is converted after that."""
    if not loading.lands:
        return 0
    return loading.turns * config.warps * WARP * loading.unit * stored_bytes(dtype)


def _stage_pitch(gather: Gather, dtype: str) -> int:
    return STAGED + (16 // PACKS[dtype][1] if gather.data_format == "NHWC" else 1)


def _make_tile(gather: Gather, dtype: str, config: BakedConfig) -> Tile:
    slots, accumulator = PACKS[dtype]
    height = config.thread_rows * config.pixels
    extent_h = (height - 1) * gather.h.stride + gather.h.taps
    extent_w = (config.tile_w - 1) * gather.w.stride + gather.w.taps
    columns = -(-extent_w // gather.w.stride)
    channels_last = gather.data_format == "NHWC"
    whole = _has_vectors_of(gather, dtype, config)
    # Three channels, padded to a vector, were slower than three loads: 28 instead of
    # 26 us for 11x11, 3 to 64 channels, 256x512, on an H100.
    vector = slots if whole and config.vectors else 1
    # An odd number of vectors: neighbouring lanes then meet different banks.
    column_pitch = (config.chunk // vector | 1) * vector if channels_last else 1
    width = columns * gather.w.stride * column_pitch
    stride_h = gather.h.stride * config.pixels
    row_pitch = _row_pitch(width, stride_h, config.tile_w, column_pitch, vector)
    plane = extent_h * row_pitch
    numbers = plane if channels_last else config.chunk * plane
    return Tile(
        extent_h,
        extent_w,
        columns,
        row_pitch,
        column_pitch,
        1 if channels_last else plane,
        vector,
        -(-numbers // slots) * slots * accumulator,
    )


def _has_vectors_of(gather: Gather, dtype: str, config: BakedConfig) -> bool:
    """Whether a chunk consists of channels that lie side by side, aligned."""
    return has_vectors(gather, dtype) and config.chunk % PACKS[dtype][0] == 0


def has_vectors(gather: Gather, dtype: str) -> bool:
    """Whether several channels lie side by side in memory, aligned."""
    group_in = gather.in_channels // gather.groups
    return gather.data_format == "NHWC" and group_in % PACKS[dtype][0] == 0


def _row_pitch(
    width: int, stride_h: int, tile_w: int, column_pitch: int, vector: int
) -> int:
    """`width`, or more where lanes in two rows would meet in a bank.

    A vector load serves 8 lanes at a time, another one 32.
    """
    lanes = 8 if vector > 1 else 32
    if tile_w % lanes == 0:
        return width
    for pitch in range(width, width + lanes * vector, vector):
        if (stride_h * pitch - tile_w * column_pitch) // vector % lanes == 0:
            return pitch
    return width


def needs_origins(gather: Gather) -> bool:
    """Whether there are several phases, whose origins have to be in memory."""
    return len(gather.h.origins) * len(gather.w.origins) > 1


@dataclass(frozen=True, eq=False, slots=True)
class BakedFunction:
    """Generated code for some of the parts, and how it is launched.

    Attributes:
        code: The text that takes the place of baked_code.cuh.
        parts: The parts that it computes.
    """

    code: str
    parts: range


def bake(
    gather: Gather, rows: Rows, values: np.ndarray, dtype: str, block: BakedBlock
) -> list[BakedFunction]:
    """The functions that compute a Gather with these values.

    Args:
        gather: What is computed.
        rows: Its sparse rows.
        values: (nnz,) the kernel's values, exact in float32 or float64.
        dtype: Name of the dtype of inputs, bias and outputs.
        block: The configuration and what follows from it.

    Returns:
        The functions, which may run in any order.
    """
    wide = np.asarray(values, np.float64 if dtype == "float64" else np.float32)
    ordered = wide if rows.order is None else wide[rows.order]
    entries = _entries(gather, rows, ordered, block, dtype)
    return [
        BakedFunction(
            "".join((*_layout(gather, block, parts), *_code(entries, parts, block))),
            parts,
        )
        for parts in _functions(entries, block)
    ]


@dataclass(frozen=True, eq=False, slots=True)
class _Entries:
    """The products of all parts in the order in which they are computed.

    Attributes:
        begins: (parts, chunks + 1), where each piece's products begin.
        offset: Bytes from a thread's place to the vector that is read.
        number: Which number of the vector.
        sum: Which of the thread's sums.
        bits: The weight in hexadecimal.
    """

    begins: np.ndarray
    offset: list[int]
    number: list[int]
    sum: list[int]
    bits: list[str]


def _entries(
    gather: Gather, rows: Rows, values: np.ndarray, block: BakedBlock, dtype: str
) -> _Entries:
    counts = rows.end - rows.begin
    row = np.repeat(np.arange(gather.rows), counts)
    part, output = _parts_of(gather, block, row)
    rest, tap_w = np.divmod(rows.indices.astype(np.int64), gather.w.taps)
    channel, tap_h = np.divmod(rest, gather.h.taps)
    chunk, channel = np.divmod(channel, block.config.chunk)
    tile = block.tile
    group, number = np.divmod(channel, tile.vector)
    quotient, remainder = np.divmod(tap_w, gather.w.stride)
    place = (
        tap_h * tile.row_pitch
        + (remainder * tile.columns + quotient) * tile.column_pitch
        + group * tile.vector * tile.channel_pitch
    )
    # For the pixels below, the same again.
    pixel = np.repeat(np.arange(block.config.pixels), len(row))

    def each(entries: np.ndarray) -> np.ndarray:
        return np.tile(entries, block.config.pixels)

    place = each(place) + pixel * gather.h.stride * tile.row_pitch
    number, values = each(number), each(values)
    sums = pixel * block.config.outputs + each(output)
    pieces = each(part * block.chunks + chunk)
    order = np.lexsort((sums, number, *_load_order(pieces, place, values)))
    ends = np.cumsum(np.bincount(pieces, minlength=block.parts * block.chunks))
    begins = np.concatenate([[0], ends])
    first = np.arange(block.parts)[:, None] * block.chunks
    return _Entries(
        begins[first + np.arange(block.chunks + 1)],
        (place[order] * PACKS[dtype][1]).tolist(),
        number[order].tolist(),
        sums[order].tolist(),
        _hexadecimal(values[order]),
    )


def _load_order(
    pieces: np.ndarray, place: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort keys, the last one first: the loads with the smallest weights come first.

    A sum that takes the small products first is smaller while it is rounded (N. Higham,
    Accuracy and Stability of Numerical Algorithms, 4.2). Any order is as fast.
    """
    _, load, counts = np.unique(
        pieces * (place.max(initial=0) + 1) + place,
        return_inverse=True,
        return_counts=True,
    )
    mean = np.bincount(load, np.abs(values), len(counts)) / counts
    return load, mean[load], pieces


def _parts_of(
    gather: Gather, block: BakedBlock, row: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which part computes each sparse row, and as which of a thread's sums."""
    set_number, channel = np.divmod(row, gather.out_channels)
    group, channel = np.divmod(channel, gather.out_channels // gather.groups)
    part_in_group, output = np.divmod(channel, block.config.outputs)
    part = (set_number * gather.groups + group) * block.group_parts + part_in_group
    return part, output


def _functions(entries: _Entries, block: BakedBlock) -> Iterator[range]:
    """How the parts are divided among functions."""
    number = count_functions(int(entries.begins[-1, -1]), block)
    teams = block.config.teams
    edges = [block.parts // teams * i // number for i in range(number + 1)]
    for first, last in itertools.pairwise(edges):
        yield range(first * teams, last * teams)


def count_functions(products: int, block: BakedBlock) -> int:
    """How many functions compute so many products, of all pixels of a thread."""
    number = max(
        -(-products // FUNCTION_PRODUCTS),
        -(-block.parts * block.chunks // FUNCTION_PIECES),
        1,
    )
    return min(block.parts // block.config.teams, number)


def _layout(gather: Gather, block: BakedBlock, parts: range) -> Iterator[str]:
    """The numbers of the struct Layout in conv2d_baked.cu.

    None of them depends on the number of images: text that differs in nothing else is
    compiled once.
    """
    config, tile, loading = block.config, block.tile, block.loading
    several = needs_origins(gather)
    members = {
        "geometry": (*geometry_longs(gather), *geometry_words(gather)),
        "tiling": block.tiling.words(),
        "tile": (
            tile.extent_h,
            tile.extent_w,
            tile.columns,
            tile.row_pitch,
            tile.column_pitch,
            tile.channel_pitch,
        ),
        "loading": (
            *divisor_words(loading.row_threads),
            *divisor_words(loading.column_threads),
            loading.rows,
            loading.columns,
            loading.row_turns,
            loading.column_turns,
            loading.channel_turns,
        ),
        "origins": (
            int(not several),
            0 if several else gather.h.origins[0],
            0 if several else gather.w.origins[0],
        ),
        "chunks": (config.chunk, block.own_chunks, block.chunks, tile.nbytes),
        "stores": (
            block.stage,
            block.landing,
            int(has_quads(gather, config.outputs)),
        ),
        "parts": (
            parts.start,
            len(parts),
            *_shared_divisors(len(parts) // config.teams, block),
            *divisor_words(gather.groups * block.group_parts),
            *divisor_words(block.group_parts),
            *divisor_words(gather.w.row_sets),
        ),
        "steps": memory_steps(gather),
    }
    lines = (
        f"/* {name} */ {', '.join(map(str, numbers))}"
        for name, numbers in members.items()
    )
    yield "#define LAYOUT_NUMBERS " + ", \\\n    ".join(lines) + "\n"


def code_sharers(kinds: int, block: BakedBlock) -> int:
    """Multiprocessors that compute the same parts of a function, or 0: all of them do.

    A multiprocessor has fetched a part's code when its next block, or the next tile,
    needs it again, if that is of the same part.

    Args:
        kinds: Kinds of blocks: parts, or groups of parts that teams compute together.
        block: The blocks.
    """
    if kinds == 1 or block.config.splits > 1:
        # Clusters compute one tile each.
        return 0
    sharers = block.multiprocessors // kinds
    used = sharers * kinds
    return sharers if used >= _USED_MULTIPROCESSORS * block.multiprocessors else 0


def _shared_divisors(kinds: int, block: BakedBlock) -> tuple[int, ...]:
    sharers = code_sharers(kinds, block)
    if not sharers:
        return (0,) * 6
    return *divisor_words(block.multiprocessors), *divisor_words(sharers)


def _code(entries: _Entries, parts: range, block: BakedBlock) -> Iterator[str]:
    """Sums and pieces, as baked_code.cuh has them."""
    sums = block.config.sums
    yield f"#define SUMS {', '.join(f'SUM({k})' for k in range(sums))}\n"
    yield f'#define PLACE "%{sums}"\n'
    yield "__device__ __forceinline__ void accumulate(\n"
    yield "    int piece, const char* place, Sums& sums) {\n"
    yield "switch (piece) {\n"
    vectors = block.tile.vector > 1
    for number, part in enumerate(parts):
        begins = entries.begins[part]
        for chunk, (begin, end) in enumerate(itertools.pairwise(begins.tolist())):
            if begin == end:
                continue
            yield f"case {number * block.chunks + chunk}:\nBEGIN\n"
            yield from _instructions(entries, begin, end, vectors)
            yield "END\nbreak;\n"
    yield "}\n}\n"


def _hexadecimal(values: np.ndarray) -> list[str]:
    if values.dtype == np.float64:
        return [f"{bits:016x}" for bits in values.view(np.uint64).tolist()]
    return [f"{bits:08x}" for bits in values.view(np.uint32).tolist()]


def _instructions(
    entries: _Entries, begin: int, end: int, vectors: bool
) -> Iterator[str]:
    """Loads and products in order."""
    load = "LOAD_VECTOR" if vectors else "LOAD"
    loaded = None
    for entry in range(begin, end):
        offset = entries.offset[entry]
        if offset != loaded:
            loaded = offset
            yield f"{load}({offset})\n"
        number, total = entries.number[entry], entries.sum[entry]
        yield f"ADD({number}, {total}, {entries.bits[entry]})\n"


def baked_launch(
    gather: Gather,
    dtype: str,
    block: BakedBlock,
    function: BakedFunction,
    activation: int = 0,
) -> Launch:
    """The launch of a generated function.

    Args:
        gather: What is computed.
        dtype: Name of the dtype of inputs, bias and outputs.
        block: The configuration that the code was generated for.
        function: One of what `bake` made.
        activation: Code of the activation; the code doesn't depend on it.

    Returns:
        A launch with the pointers read (16-byte aligned), bias (optional), origins
        (null if `needs_origins` is false) and write (16-byte aligned).
    """
    config, tiles = block.config, block.tiling.subtiles
    kinds = len(function.parts) // config.teams
    items = kinds * tiles
    sharers = code_sharers(kinds, block)
    if sharers:
        items = -(-tiles // sharers) * block.multiprocessors
    blocks = min(items, block.most_blocks) if config.splits == 1 else items
    words = (activation, items, *divisor_words(tiles))
    return Launch(
        "conv2d_baked",
        _defines(dtype, block, gather.data_format),
        (blocks * config.splits, 1, 1),
        ((config.warps + 1) * WARP, 1, 1),
        block.shared_mem_bytes,
        _POINTERS,
        pack_words((), words),
        function.code,
        config.splits,
    )


@functools.lru_cache(maxsize=256)
def _defines(
    dtype: str, block: BakedBlock, data_format: str
) -> tuple[tuple[str, str], ...]:
    config = block.config
    return (
        ("DTYPE", dtype.upper()),
        ("OUTPUTS", str(config.outputs)),
        ("PIXELS", str(config.pixels)),
        ("WARPS", str(config.warps)),
        ("TEAMS", str(config.teams)),
        ("RESIDENT", str(config.resident)),
        ("SPLITS", str(config.splits)),
        ("MANY_CHUNKS", str(int(block.own_chunks > 1))),
        ("BUFFERED", str(int(block.buffers > 1))),
        ("LOAD_VECTORS", str(int(block.tile.vector > 1))),
        *_loading_defines(block.loading),
        ("STREAMS_IN", str(int(block.streams_in))),
        ("STREAMS_OUT", str(int(block.streams_out))),
        ("CHANNELS_LAST", str(int(data_format == "NHWC"))),
    )


def _loading_defines(loading: Loading) -> tuple[tuple[str, str], ...]:
    if loading.lands:
        return (("UNIT", str(loading.unit)),)
    return (("IN_FLIGHT", str(loading.in_flight)),) if loading.in_flight else ()


def _in_flight(config: BakedConfig, chunks: int) -> int:
    """Loads of a thread that may pass through registers together."""
    room = _registers(config) - _LOADING_REGISTERS
    if chunks > 1:
        # From the second chunk on, the sums are there, too.
        room -= config.sums
    # What is loaded takes a register, and so does its address.
    return min(max(_LEAST_IN_FLIGHT, room // 2), _MOST_IN_FLIGHT)


def _registers(config: BakedConfig) -> int:
    """What a thread may have: a quarter of all serves a quarter of the warps."""
    warps = -(-config.resident * (config.warps + 1) // 4)
    return min(255, REGISTERS // 4 // (warps * WARP) // 8 * 8)
