"""Which configuration of generated code to take, and what it should cost.

Knows a rough model of a multiprocessor that executes long straight-line code. Pure
functions; the code itself is generated in `baked`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

from sparse_conv.baked import (
    CONVERTED,
    PARTIAL_SUMS,
    REGISTERS,
    BakedBlock,
    BakedConfig,
    Loading,
    count_functions,
    has_vectors,
    make_baked_block,
)
from sparse_conv.gather import Gather
from sparse_conv.launch import WARP
from sparse_conv.tiling import (
    PACKS,
    DeviceLimits,
    make_tiling,
    phase_outputs,
    stored_bytes,
)

# The compiler takes a second for 15,000 to 20,000 of them, on one core.
MOST_PRODUCTS = 60_000
# The compiler's time grows with the number of pieces, too: 2 s for 1,024 of them in one
# function, 23 s for 4,096.
MOST_PIECES = 4096
# One of several groups with fewer outputs would read few channels from all over memory.
LEAST_OUTPUTS = 4
# Up to so many outputs a thread may have up to four pixels, with more two.
_FEW_OUTPUTS = 8
# With fewer products for each input, channels may be loaded one by one.
_FEW_PRODUCTS = 1
# Several pixels have so many products at most: longer code takes longer to fetch than
# they save. 11x11, 128 to 3 channels, 256x512, density 0.1, on an H100: 125 us with one
# pixel, 162 with two; 32 to 3 channels: 30.4 and 28.7.
_MOST_PIXEL_PRODUCTS = 6000
# Where a thread has many outputs, two pixels, and blocks of few warps, pay with so many
# products at most, whose code stays near. 3x3, 64 to 64 channels, 224x224, batch 32, on
# an H200: with 1,843 weights 282 us with one pixel and 232 with two, with 3,686 weights
# 331 and 724.
_NEAR_PRODUCTS = 4000

# Blocks of a cluster, and those that share a multiprocessor.
_SPLITS = (2, 4, 8)
_MOST_SPLIT_RESIDENT = 2

# The numbers below were fitted to 2,830 launches of 112 kernels, nearly all on an H200,
# but for _NEXT_CACHED_BYTES, _KEPT_BYTES, _CROWDED_*, _LATE_LOADS, _REREAD and the
# first of _UNHIDDEN, which were then set by a few layers, those of clusters, for which
# there were 480 launches of 42 kernels, and those of memory beyond the L2 cache. What
# the model takes was 3 % slower than the best configuration tried, in the mean, and at
# most 39 %.

# Bytes of an instruction.
_INSTRUCTION = 16
# Code that fits is executed from a multiprocessor's own instruction cache; more comes
# from the next one, which serves two of them, and what doesn't fit there from far, so
# many bytes a clock for 16 resident warps. More warps have more fetches on the way.
_CACHED_BYTES = 21 * 1024
_NEXT_CACHED_BYTES = 122 * 1024
_NEXT_SHARERS = 2
_NEXT_RATE = 13.03
_FAR_RATE = 5.63
_FETCH_WARPS = 16
_FETCH_POWER = 0.449
# A team with more code than this takes longer by a power of how much more it is: 11x11,
# 32 to 64 channels, density 0.2, took 350 to 392 us where 295 were expected.
_CROWDED_BYTES = 320 * 1024
_CROWDED_POWER = 1.0
# So many sums leave few registers to load ahead into. Where code comes from far again
# and again, too, the waits for both add up, unless the code stays in the L2 cache.
_MANY_SUMS = 32
_LATE_LOADS = 1.4
# The same for code that is met for the first time, and for all parts together, which
# neighbouring multiprocessors fetch through the same door.
_FIRST_RATE = 27.52
_DOOR_RATE = 69.53
_DOORS = 8
# The code of all parts together that a GPU keeps from one launch to the next. If there
# is more, each block fetches all its code from far, so many bytes a clock for 16 warps.
_KEPT_BYTES = 290 * 1024
_LOST_RATE = 4.629
# What comes through a door where nothing is kept and nearly all multiprocessors run
# different code, as with clusters.
_LOST_DOOR_RATE = 20.0
# The warps of a block that walk together; others have to be served by themselves.
_TOGETHER = 8
# What a cluster takes to exchange its sums: clocks for its barriers and latencies, and
# bytes a clock of each multiprocessor.
_EXCHANGE_CLOCKS = 1000
_EXCHANGE_RATE = 11.0
# What is predicted for clusters scatters by a sixth, twice as much as for single
# blocks, so that the best of many predictions is more often too good to be true.
_DOUBT = 1.12
# Part of the peak that arithmetic reaches.
_EFFICIENCY = 0.97
# Instructions of a warp for each tile, and for each load.
_TILE_INSTRUCTIONS = 104
_LOAD_INSTRUCTIONS = 0.355
# Clocks for which a load of a warp, and the store that goes with it, keep shared memory
# busy.
_COPY_CLOCKS = 2.755
# Numbers that are converted: instructions of a warp for each load and each of its
# numbers, and the clocks of a chunk in which nothing else is done, for each time that
# loads are waited for.
_CONVERTED_LOAD_INSTRUCTIONS = 11.29
_CONVERTED_INSTRUCTIONS = 3.077
_CONVERTED_CLOCKS = 606
_WAIT_CLOCKS = 483
# Clocks of an instruction of a warp that is by itself.
_ALONE = 1.626
# Clocks of a launch with its first and its last steps.
_LAUNCH_CLOCKS = 2756
# Clocks that a chunk takes beside its computation: a barrier, and the wait for loads.
_CHUNK_CLOCKS = 551
# The same where a tile is loaded only after the last one has served.
_UNBUFFERED_CLOCKS = 142
# Bytes of memory a clock, of one multiprocessor, and how much longer the first tile
# takes, for which all wait at once.
_MEMORY_RATE = 18.93
_FIRST_TILE = 0.189
# What reading the input again for another part costs.
_REREAD = 0.52
# The part of the shorter of two times that the longer one can't hide: of arithmetic and
# loads from shared memory, of both and of fetching code, and of computation and memory,
# with one block, two or more.
_UNHIDDEN_LOADS = 0.166
_UNHIDDEN_FETCHES = 0.076
_UNHIDDEN = (0.94, 0.728, 0.624)
# Of more than so many times the L2 cache, what exceeds it comes at this rate; where
# chunks are pieces of a cache line, a part is fetched again. Where that takes longer
# than computation, so much of the latter can't be hidden if it is far shorter; the
# nearer both are, the more it is what memory would leave unhidden. Fitted to 480
# launches of 12 layers on an H200.
_FAR_SIZE = 3
_FAR_MEMORY_RATE = 13.2
_LINE_BYTES = 128
_PIECES = 0.2
_UNHIDDEN_BY_FAR = (0.09, 0.44, 0.7)
_FAR_POWER = 2.6
# What computing takes with more registers of sums than that, and too few beside them.
_MOST_ROOMY_SUMS = 64
_ROOMY_REGISTERS = 60
_CRAMPED = 1.32
# What tiles take that are higher than wide: they read and write shorter pieces of
# memory.
_TALL = 1.01
# What is read and written pushes code out of the L2 cache, from where multiprocessors
# fetch what they can't keep, unless it leaves that cache first. That pays for so much
# code; more is slower if what is read has to come from memory again. 11x11, 32 to 64
# channels, 256x512, densities 0.05, 0.1 and 0.15, on an H200: 121, 178 and 238 us; 98,
# 156 and 262 if it leaves first.
_STREAMING_CODE_BYTES = (96 * 1024, 512 * 1024)
# Bytes of a copy that can say so.
_STREAMED_COPY = 16
# Registers of a thread beside its sums.
_OTHER_REGISTERS = 24
_MOST_REGISTERS = 255
_MOST_WARPS = 64
_MOST_BLOCK_WARPS = 32


@dataclass(frozen=True, slots=True)
class BakedChoice:
    """A configuration with what follows from it and its predicted clocks.

    Attributes:
        block: None where no code is to be generated.
        clocks: Of all launches; infinite without a block.
        reason: Why there is no block, or what it is.
    """

    block: BakedBlock | None
    clocks: float
    reason: str


@functools.lru_cache(maxsize=4096)
def choose_baked_block(
    gather: Gather, dtype: str, nnz: int, device: DeviceLimits
) -> BakedChoice:
    """The best configuration by the model.

    Args:
        gather: What is computed.
        dtype: Name of the dtype.
        nnz: Entries of all rows together.
        device: The GPU's limits.

    Returns:
        The choice.
    """
    refused = _reason_against(gather, dtype, nnz)
    if refused:
        return BakedChoice(None, float("inf"), refused)
    possible = _costed(gather, dtype, nnz, device)
    best_clocks, best = min(possible, key=lambda one: one[0], default=(None, None))
    if best is None:
        reason = (
            "no tile of the input fits into shared memory, or the code would have more "
            f"than {MOST_PIECES} pieces"
        )
        return BakedChoice(None, float("inf"), reason)
    return BakedChoice(best, best_clocks, described(best, nnz))


def described(block: BakedBlock, nnz: int) -> str:
    """A configuration in words."""
    config = block.config
    text = (
        f"code for {nnz} weights: tiles of {config.tile_h}x{config.tile_w} outputs, "
        f"{config.outputs} output channels of {config.pixels} pixel(s) a thread, "
        f"{config.chunk} input channels at a time"
    )
    if config.splits > 1:
        text = f"{text}, shared by clusters of {config.splits} blocks"
    return f"{text}, for {config.teams} teams" if config.teams > 1 else text


def shortlist(
    gather: Gather, dtype: str, nnz: int, device: DeviceLimits, most: int
) -> list[BakedBlock]:
    """The best configurations by the model, at most one of each tile, team and cluster.

    Args:
        gather: What is computed; code can be generated for it.
        dtype: Name of the dtype.
        nnz: Entries of all rows together.
        device: The GPU's limits.
        most: How many, at most.

    Returns:
        The configurations, the best first.
    """
    best: dict[tuple[int, ...], BakedBlock] = {}
    possible = _costed(gather, dtype, nnz, device)
    for _, block in sorted(possible, key=lambda one: one[0]):
        config = block.config
        tile = (
            config.outputs, config.teams, config.splits, config.tile_h, config.tile_w
        )  # fmt: skip
        best.setdefault(tile, block)
    return list(best.values())[:most]


def _costed(
    gather: Gather, dtype: str, nnz: int, device: DeviceLimits
) -> Iterator[tuple[float, BakedBlock]]:
    """The predicted clocks of each configuration that is possible."""
    for config in _candidates(gather, dtype, nnz, device):
        block = make_baked_block(gather, dtype, config, device)
        if block is not None and block.parts * block.chunks <= MOST_PIECES:
            block = _streaming(gather, dtype, nnz, block, device)
            yield baked_clocks(gather, dtype, nnz, block, device), block


def _reason_against(gather: Gather, dtype: str, nnz: int) -> str | None:
    if dtype == "int32":
        return "code is generated for floats only"
    if nnz > MOST_PRODUCTS:
        return (
            f"code for {nnz} weights would take too long to compile, it is generated "
            f"for at most {MOST_PRODUCTS}"
        )
    if gather.groups > 1 and gather.out_channels // gather.groups < LEAST_OUTPUTS:
        return (
            f"code is generated for at least {LEAST_OUTPUTS} output channels of a "
            f"group, where there are several, not for "
            f"{gather.out_channels // gather.groups}"
        )
    return None


def _candidates(
    gather: Gather, dtype: str, nnz: int, device: DeviceLimits
) -> Iterator[BakedConfig]:
    """The configurations worth comparing."""
    group_out = gather.out_channels // gather.groups
    # A sum takes as many registers as an accumulator has words.
    most = 64 // (PACKS[dtype][1] // 4)
    products = nnz / (gather.h.row_sets * gather.w.row_sets * gather.groups)
    for outputs in sorted({min(group_out, most), *_divided(group_out, most)}):
        parts = -(-group_out // outputs)
        for pixels, vectors in _readings(gather, dtype, products):
            near = products * pixels <= parts * _NEAR_PRODUCTS
            yield from _blocks(gather, dtype, outputs, pixels, vectors, near, device)


def _readings(
    gather: Gather, dtype: str, products: float
) -> Iterator[tuple[int, bool]]:
    """Pixels of a thread, and whether it loads vectors.

    Few outputs, and few nonzeros, use few of the inputs that are loaded for a pixel.

    Args:
        gather: What is computed.
        dtype: Name of the dtype.
        products: Those of a pixel, for all outputs of a group.
    """
    group_out = gather.out_channels // gather.groups
    few = products < _FEW_PRODUCTS * gather.row_length
    choices = (True, False) if few and has_vectors(gather, dtype) else (True,)
    counts, most = (1, 2, 4), _MOST_PIXEL_PRODUCTS
    if group_out > _FEW_OUTPUTS:
        # Of a single row of taps, neighbouring pixels share nothing.
        counts, most = (1, 2) if gather.h.taps > 1 else (1,), _NEAR_PRODUCTS
    for pixels in counts:
        if pixels == 1 or products * pixels <= most:
            yield from ((pixels, vectors) for vectors in choices)


def _blocks(
    gather: Gather,
    dtype: str,
    outputs: int,
    pixels: int,
    vectors: bool,
    near: bool,
    device: DeviceLimits,
) -> Iterator[BakedConfig]:
    """The blocks of such threads that are worth comparing."""
    height, width = phase_outputs(gather.h), phase_outputs(gather.w)
    all_pixels = gather.n * gather.h.outputs * gather.w.outputs
    sums = outputs * pixels
    # Few sums have partial ones beside them.
    registers = sums * (2 if sums <= PARTIAL_SUMS else 1) * PACKS[dtype][1] // 4
    counts = (2, 4, 8, 16)
    if all_pixels > 128 * device.multiprocessors:
        # Small blocks repeat what blocks do once; they are for few pixels. With their
        # scout, 7 warps leave a thread half as many registers again as 8.
        counts = (4, 7, 8, 16) if near else (4, 8, 16)
    for warps in counts:
        strips = warps * WARP
        for tile_w in {min(w, width) for w in (8, 14, 16, 28, 32, 56, 64)}:
            if tile_w > strips:
                continue
            tile_h = _even(height, strips // tile_w * pixels)
            needed = -(-(-(-tile_h // pixels) * tile_w) // WARP)
            for teams in _teams(gather, outputs, registers, needed):
                for resident in _residents(registers, teams * needed):
                    for chunk in _chunks(gather.in_channels // gather.groups):
                        yield BakedConfig(
                            outputs, teams * needed, resident, tile_h, tile_w, chunk,
                            pixels, vectors, teams,
                        )  # fmt: skip
            if pixels == 1:
                alone = BakedConfig(
                    outputs, needed, 1, tile_h, tile_w, 0, vectors=vectors
                )
                yield from _split(gather, alone, device)


def _split(
    gather: Gather, alone: BakedConfig, device: DeviceLimits
) -> Iterator[BakedConfig]:
    """The clusters of such blocks that find room on the GPU together."""
    group_in = gather.in_channels // gather.groups
    parts = -(-(gather.out_channels // gather.groups) // alone.outputs)
    parts *= gather.h.row_sets * gather.w.row_sets * gather.groups
    tiles = make_tiling(gather, alone.tile_h, alone.tile_w).subtiles
    for splits in _SPLITS:
        resident = -(-parts * tiles * splits // device.multiprocessors)
        if resident > _MOST_SPLIT_RESIDENT or group_in % splits:
            continue
        own = group_in // splits
        for chunk in (own, own // 2) if own % 2 == 0 else (own,):
            yield dataclasses.replace(
                alone, resident=resident, chunk=chunk, splits=splits
            )


def _even(extent: int, most: int) -> int:
    """The size, at most `most`, of as few equal parts of `extent` as there can be."""
    return -(-extent // -(-extent // max(1, most)))


def _divided(group_out: int, most: int) -> Iterator[int]:
    """Smaller numbers of outputs, for more blocks; whole quads where there are some."""
    for outputs in (8, 16, 32):
        if outputs < min(group_out, most):
            yield outputs


def _teams(gather: Gather, outputs: int, registers: int, warps: int) -> Iterator[int]:
    """How many teams of so many warps a block may have."""
    parts = -(-(gather.out_channels // gather.groups) // outputs)
    for teams in (1, 2, 4):
        fits = teams * warps < min(_room(registers), _MOST_BLOCK_WARPS)
        if fits and parts % teams == 0:
            yield teams


def _room(registers: int) -> int:
    """Warps that a multiprocessor holds, of threads with so many registers of sums."""
    return min(_MOST_WARPS, REGISTERS // ((registers + _OTHER_REGISTERS) * WARP))


def _residents(registers: int, warps: int) -> set[int]:
    """How many blocks may share a multiprocessor, by their registers.

    Args:
        registers: Those of a thread's sums.
        warps: Warps of a block that compute; one more finds their work.
    """
    most = max(1, _room(registers) // (warps + 1))
    return {1, min(2, most), min(most, 16)}


def _chunks(group_in: int) -> set[int]:
    return {group_in} | {chunk for chunk in (4, 8, 16, 32, 64) if chunk < group_in}


def baked_clocks(
    gather: Gather, dtype: str, nnz: int, block: BakedBlock, device: DeviceLimits
) -> float:
    """Predicted clocks of all launches."""
    config = block.config
    functions = count_functions(nnz * config.pixels, block)
    parts = -(-block.parts // config.teams // functions) * config.teams
    clocks = functions * _function_clocks(gather, dtype, nnz, block, parts, device)
    if config.splits > 1:
        clocks *= _DOUBT
    return clocks * (_TALL if config.tile_h > config.tile_w else 1)


def _streaming(
    gather: Gather, dtype: str, nnz: int, block: BakedBlock, device: DeviceLimits
) -> BakedBlock:
    """The block with what may leave the GPU's L2 cache before anything else."""
    size = stored_bytes(dtype)
    read, written = (size * numbers for numbers in _numbers(gather))
    if not device.l2_bytes or 2 * (read + written) <= device.l2_bytes:
        return block
    products = _products(nnz, block)
    code = _code_bytes(products, _loads(gather, products, block), block)
    least, most = _STREAMING_CODE_BYTES
    pushes = least < code * block.parts // block.config.teams <= most
    return dataclasses.replace(
        block,
        # Tiles that are read by several blocks in turn are wanted again.
        streams_in=pushes
        and block.parts == block.config.teams
        and block.loading.unit * size == _STREAMED_COPY,
        # Of what is larger than the cache, nothing is left for whoever reads it.
        streams_out=pushes or written > device.l2_bytes,
    )


def _code_bytes(products: float, loads: float, block: BakedBlock) -> float:
    """The code of a block's teams, for one tile."""
    return (products + loads) * _INSTRUCTION * block.config.teams


def _products(nnz: int, block: BakedBlock) -> float:
    """Products of a part, for all pixels of a thread."""
    return nnz / block.parts / block.config.splits * block.config.pixels


def _function_clocks(
    gather: Gather,
    dtype: str,
    nnz: int,
    block: BakedBlock,
    parts: int,
    device: DeviceLimits,
) -> float:
    """Predicted clocks of the launch of a function with so many parts."""
    config, chunks = block.config, block.own_chunks
    products = _products(nnz, block)
    loads = _loads(gather, products, block)
    instructions = (
        products
        + loads
        + _TILE_INSTRUCTIONS
        + chunks * block.loading.turns * _load_instructions(dtype, block)
    )
    kinds = parts // config.teams * config.splits
    items = kinds * block.tiling.subtiles
    # Of the multiprocessor that has the most.
    tiles = -(-items // device.multiprocessors)
    resident = min(config.resident, tiles)
    rounds, rest = divmod(tiles, resident)
    # Of the scheduler that has the most.
    warps = rounds * -(-resident * config.warps // 4) + -(-rest * config.warps // 4)
    words = PACKS[dtype][1] / 4
    issue = warps * instructions * words / _EFFICIENCY
    shared = loads * block.tile.vector * words
    shared += _COPY_CLOCKS * chunks * block.loading.turns
    shared *= tiles * config.warps
    rounds += rest > 0
    computing = max(
        _overlapped(issue, shared, _UNHIDDEN_LOADS),
        rounds * instructions * words * _ALONE,
    )
    code = _code_bytes(products, loads, block)
    fetching = _fetch_clocks(code, kinds, tiles, resident, block)
    computing = _overlapped(computing, fetching, _UNHIDDEN_FETCHES)
    if _is_far(code, kinds, resident):
        crowd = code / config.teams / _CROWDED_BYTES
        computing *= max(1.0, crowd) ** _CROWDED_POWER
        again = tiles > resident or kinds * code > _KEPT_BYTES
        late = again and config.sums > _MANY_SUMS and chunks > 1
        if late and not block.streams_in:
            computing *= _LATE_LOADS
    computing += rounds * chunks * (_CHUNK_CLOCKS + _wait_clocks(block.loading))
    if block.buffers == 1 and chunks * tiles > 1:
        # Without other blocks, nothing goes on while a tile is loaded.
        alone = block.tile.nbytes / _MEMORY_RATE if resident == 1 else 0.0
        computing += tiles * chunks * (_UNBUFFERED_CLOCKS + alone)
    if config.splits > 1:
        exchanged = tiles * config.warps * WARP * config.sums * PACKS[dtype][1]
        computing += _EXCHANGE_CLOCKS + exchanged / _EXCHANGE_RATE
    sums = int(config.sums * words)
    if sums > _MOST_ROOMY_SUMS and _registers(config) - sums < _ROOMY_REGISTERS:
        computing *= _CRAMPED
    blocks = min(resident, 3) - 1
    near, far = _memory_clocks(gather, dtype, block, parts, device)
    if far > computing:
        memory, unhidden = far, _unhidden_by_far(blocks, computing / far, near / far)
    else:
        memory, unhidden = near, _UNHIDDEN[blocks]
    first = block.tile.nbytes / _MEMORY_RATE * _FIRST_TILE
    return _LAUNCH_CLOCKS + first + _overlapped(computing, memory, unhidden)


def _unhidden_by_far(blocks: int, computing: float, near: float) -> float:
    """The part of computation that memory beyond the L2 cache can't hide.

    Args:
        blocks: The index of `_UNHIDDEN`.
        computing: Its time, as a part of what memory takes.
        near: The same for the time that memory would take if the cache were larger.
    """
    least = _UNHIDDEN_BY_FAR[blocks]
    return least + (_UNHIDDEN[blocks] * near - least) * computing**_FAR_POWER


def _registers(config: BakedConfig) -> int:
    """Registers that a thread can have."""
    # Each of the four schedulers has a quarter of them for its warps.
    warps = -(-(config.warps + 1) * config.resident // 4) * 4
    return min(REGISTERS // (warps * WARP), _MOST_REGISTERS)


def _load_instructions(dtype: str, block: BakedBlock) -> float:
    if dtype not in CONVERTED:
        return _LOAD_INSTRUCTIONS
    return _CONVERTED_LOAD_INSTRUCTIONS + _CONVERTED_INSTRUCTIONS * block.loading.unit


def _wait_clocks(loading: Loading) -> float:
    if loading.lands:
        return _CONVERTED_CLOCKS
    return _WAIT_CLOCKS * loading.waits if loading.in_flight else 0.0


def _loads(gather: Gather, products: float, block: BakedBlock) -> float:
    """How many loads the products of a part need."""
    config, vector = block.config, block.tile.vector
    rows = gather.h.taps + (config.pixels - 1) * gather.h.stride
    row_length = gather.row_length / config.splits
    inputs = row_length * rows / gather.h.taps
    # Of the products that an input has on average, with a dense kernel.
    most = config.sums * row_length / max(1, inputs)
    met = 1 - (1 - min(1.0, products / max(1, inputs * most))) ** (most * vector)
    return inputs / vector * met


def _overlapped(one: float, other: float, unhidden: float) -> float:
    """The time of two things that go on together, the shorter one partly hidden."""
    return max(one, other) + unhidden * min(one, other)


def _fetch_clocks(
    code: float, kinds: int, tiles: int, resident: int, block: BakedBlock
) -> float:
    """Clocks in which a multiprocessor's blocks get their code, that of each kind."""
    config = block.config
    fetches = (config.warps * resident / _FETCH_WARPS) ** _FETCH_POWER
    met = min(kinds, -(-kinds * block.tiling.subtiles // _DOORS))
    first = max(code / _FIRST_RATE, met * code / _DOOR_RATE)
    if kinds * code > _KEPT_BYTES:
        met_in_turn = min(kinds, -(-tiles // resident))
        first = max(first, met_in_turn * code / (_LOST_RATE * fetches))
        if config.splits > 1:
            first = max(first, met * code / _LOST_DOOR_RATE)
    # Blocks on a multiprocessor may be of different kinds.
    if min(kinds, resident) * code <= _CACHED_BYTES:
        return first
    streams = tiles * -(-config.team_warps // _TOGETHER)
    rate = _FAR_RATE if _is_far(code, kinds, resident) else _NEXT_RATE
    return max(first, streams * code / (rate * fetches))


def _is_far(code: float, kinds: int, resident: int) -> bool:
    """Whether the code of blocks that share a cache doesn't fit into it."""
    return min(kinds, _NEXT_SHARERS * resident) * code > _NEXT_CACHED_BYTES


def _memory_clocks(
    gather: Gather, dtype: str, block: BakedBlock, parts: int, device: DeviceLimits
) -> tuple[float, float]:
    """Clocks of memory if all fitted into the L2 cache, and if it far exceeds it.

    The latter is 0 if it doesn't.
    """
    size = stored_bytes(dtype)
    read, written = (size * numbers for numbers in _numbers(gather))
    here = parts / block.parts
    again = 1 + _REREAD * (block.group_parts / block.config.teams * here - 1)
    nbytes = written * here + read * max(1.0, again)
    near = nbytes / device.multiprocessors / _MEMORY_RATE
    cached = device.l2_bytes or nbytes
    if nbytes <= _FAR_SIZE * cached:
        return near, 0.0
    chunk = block.config.chunk
    channels = gather.in_channels // gather.groups
    if gather.data_format == "NHWC" and chunk < channels and chunk * size < _LINE_BYTES:
        nbytes += _PIECES * read
    clocks = cached / _MEMORY_RATE + (nbytes - cached) / _FAR_MEMORY_RATE
    return near, clocks / device.multiprocessors


def _numbers(gather: Gather) -> tuple[int, int]:
    """How many numbers are read, each once, and written."""
    inputs = gather.h.inputs * gather.w.inputs * gather.in_channels
    outputs = gather.h.outputs * gather.w.outputs * gather.out_channels
    return gather.n * inputs, gather.n * outputs
