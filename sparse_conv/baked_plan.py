"""Which configuration of generated code to take, and what it should cost.

Knows a rough model of a multiprocessor that executes long straight-line code. Pure
functions; the code itself is generated in `baked`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from sparse_conv.baked import BakedBlock, BakedConfig, make_baked_block
from sparse_conv.gather import Gather
from sparse_conv.launch import WARP
from sparse_conv.tiling import PACKS, DeviceLimits, phase_outputs

# The compiler takes a second for 15,000 to 20,000 of them, on one core.
MOST_PRODUCTS = 60_000
# The compiler's time grows with the number of pieces, too: 2 s for 1,024 of them in one
# function, 23 s for 4,096.
MOST_PIECES = 4096
# Fewer products would be spent for each input that is read.
LEAST_OUTPUTS = 4

# Bytes of an instruction.
_INSTRUCTION = 16
# Code that fits is executed from a multiprocessor's own instruction cache; more comes
# from the next one, which does not hold much more, at so many bytes a clock. Measured
# on an H100: loops of up to 32 KiB ran at 94 % of the arithmetic's speed, longer ones
# drew 6 to 7 bytes a clock, and what exceeded 128 KiB about half as many.
_CACHED_BYTES = 32 * 1024
_NEXT_CACHED_BYTES = 128 * 1024
_NEXT_RATE = 6.5
_FAR_RATE = 3.5
# The same for code that is met for the first time.
_FIRST_RATE = 2.6
# The warps that fetch code together; more drift apart.
_FETCHING_WARPS = 8
# Part of the peak that arithmetic reaches.
_EFFICIENCY = 0.85
# Clocks of a launch with its blocks' set-up, and of one round of loads.
_LAUNCH_CLOCKS = 4000
_LOAD_CLOCKS = 1200
# Numbers that a thread loads at a time, and with several chunks; see conv2d_baked.cu.
_LOADS = 5
_CHUNK_LOADS = 3
# Clocks that a chunk takes beside its computation: a barrier, and the wait for loads.
_CHUNK_CLOCKS = 700
# Bytes of memory a clock, of one multiprocessor.
_MEMORY_RATE = 9.8
# Computation takes so much longer where registers are too few to load vectors ahead.
_CROWDED = 1.3
# Of a multiprocessor's warps, so that a thread has registers beside its own.
_COMFORTABLE_SUMS = 1024
# The part of the shorter of two times that the longer one can't hide: of arithmetic and
# loads from shared memory in one block, and of computation and memory by the number of
# resident blocks.
_UNHIDDEN_LOADS = 0.5
_UNHIDDEN = {1: 1.0, 2: 0.8}
_LEAST_UNHIDDEN = 0.65


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
    best, best_clocks = None, float("inf")
    for config in _candidates(gather, dtype, device):
        block = make_baked_block(gather, dtype, config, device)
        if block is None or block.parts * block.chunks > MOST_PIECES:
            continue
        clocks = baked_clocks(gather, dtype, nnz, block, device)
        if clocks < best_clocks:
            best, best_clocks = block, clocks
    if best is None:
        reason = (
            "no tile of the input fits into shared memory, or the code would have more "
            f"than {MOST_PIECES} pieces"
        )
        return BakedChoice(None, best_clocks, reason)
    config = best.config
    return BakedChoice(
        best,
        best_clocks,
        f"code for {nnz} weights: tiles of {config.tile_h}x{config.tile_w} outputs, "
        f"{config.outputs} output channels a thread, {config.chunk} input channels at "
        f"a time",
    )


def _reason_against(gather: Gather, dtype: str, nnz: int) -> str | None:
    if dtype == "int32":
        return "code is generated for floats only"
    if nnz > MOST_PRODUCTS:
        return (
            f"code for {nnz} weights would take too long to compile, it is generated "
            f"for at most {MOST_PRODUCTS}"
        )
    if gather.out_channels // gather.groups < LEAST_OUTPUTS:
        return (
            f"code is generated for at least {LEAST_OUTPUTS} output channels of a "
            f"group, not for {gather.out_channels // gather.groups}"
        )
    return None


def _candidates(
    gather: Gather, dtype: str, device: DeviceLimits
) -> Iterator[BakedConfig]:
    """The configurations worth comparing."""
    group_out = gather.out_channels // gather.groups
    group_in = max(1, gather.in_channels // gather.groups)
    height, width = phase_outputs(gather.h), phase_outputs(gather.w)
    all_pixels = gather.n * gather.h.outputs * gather.w.outputs
    # A sum takes as many registers as an accumulator has words.
    most = 64 if PACKS[dtype][1] == 4 else 32
    for outputs in sorted({min(group_out, most), *_divided(group_out, most)}):
        for warps in (1, 2, 4, 8, 16):
            # Small blocks repeat what blocks do once; they are for few pixels.
            if warps < 4 and all_pixels > 256 * device.multiprocessors:
                continue
            pixels = warps * WARP
            for tile_w in {min(w, width) for w in (8, 14, 16, 28, 32, 56, 64)}:
                if tile_w > pixels:
                    continue
                tile_h = _even(height, pixels // tile_w)
                needed = -(-tile_h * tile_w // WARP)
                for resident in _residents(outputs, needed):
                    for chunk in _chunks(group_in):
                        yield BakedConfig(
                            outputs, needed, resident, tile_h, tile_w, chunk
                        )


def _even(extent: int, most: int) -> int:
    """The size, at most `most`, of as few equal parts of `extent` as there can be."""
    return -(-extent // -(-extent // max(1, most)))


def _divided(group_out: int, most: int) -> Iterator[int]:
    """Smaller numbers of outputs, for more blocks; whole quads where there are some."""
    for outputs in (8, 16, 32):
        if outputs < min(group_out, most):
            yield outputs


def _residents(outputs: int, warps: int) -> set[int]:
    """How many blocks may share a multiprocessor, by their registers."""
    threads = {8: 1024, 16: 1024, 32: 1024}.get(outputs, 768)
    most = max(1, threads // (warps * WARP))
    return {1, min(2, most), min(most, 16)}


def _chunks(group_in: int) -> set[int]:
    return {group_in} | {chunk for chunk in (4, 8, 16, 32, 64) if chunk < group_in}


def baked_clocks(
    gather: Gather, dtype: str, nnz: int, block: BakedBlock, device: DeviceLimits
) -> float:
    """Predicted clocks of all launches."""
    config, tile = block.config, block.tile
    products = nnz / block.parts
    # How many inputs of a part meet a weight, and so are loaded.
    inputs = gather.row_length
    used = 1 - (1 - min(1.0, products / max(1, inputs * config.outputs))) ** (
        config.outputs * tile.vector
    )
    loads = inputs / tile.vector * used
    instructions = products + loads
    code = instructions * _INSTRUCTION
    blocks = block.parts * block.tiling.subtiles
    rounds = -(-blocks // device.multiprocessors)
    words = PACKS[dtype][1] / 4
    issue = rounds * config.warps * instructions * words / 4 / _EFFICIENCY
    shared = rounds * config.warps * loads * tile.vector * words
    # A warp by itself can't issue at every clock.
    alone = instructions * 1.5 * words
    computing = max(
        _overlapped(issue, shared, _UNHIDDEN_LOADS),
        alone,
        _fetch_clocks(code, rounds, block),
    )
    sums = config.outputs * config.warps * config.resident
    if tile.vector > 1 and sums > _COMFORTABLE_SUMS:
        computing *= _CROWDED
    waves = -(-rounds // config.resident)
    computing += waves * block.chunks * _CHUNK_CLOCKS
    unhidden = _UNHIDDEN.get(config.resident, _LEAST_UNHIDDEN)
    memory = _memory_clocks(gather, dtype, block, device)
    return (
        _LAUNCH_CLOCKS + _load_clocks(block) + _overlapped(computing, memory, unhidden)
    )


def _overlapped(one: float, other: float, unhidden: float) -> float:
    """The time of two things that go on together, the shorter one partly hidden."""
    return max(one, other) + unhidden * min(one, other)


def _fetch_clocks(code: float, rounds: int, block: BakedBlock) -> float:
    """Clocks in which a multiprocessor's blocks get their code."""
    first = code / _FIRST_RATE
    if code <= _CACHED_BYTES:
        return first
    streams = rounds * -(-block.config.warps // _FETCHING_WARPS)
    resident = min(block.parts, block.config.resident) * code
    rate = _NEXT_RATE if resident <= _NEXT_CACHED_BYTES else _FAR_RATE
    return max(first, streams * code / rate)


def _load_clocks(block: BakedBlock) -> float:
    """Clocks until the first chunk is there, and those that hide behind nothing."""
    config, tile = block.config, block.tile
    numbers = tile.extent_h * tile.extent_w * config.chunk
    threads = config.warps * WARP
    if tile.copies_vectors:
        return _LOAD_CLOCKS * (1 + numbers / tile.vector / threads / 16)
    at_once = threads * (_LOADS if block.chunks == 1 else _CHUNK_LOADS)
    return _LOAD_CLOCKS * -(-numbers // at_once)


def _memory_clocks(
    gather: Gather, dtype: str, block: BakedBlock, device: DeviceLimits
) -> float:
    size = 2 if dtype in ("float16", "bfloat16") else PACKS[dtype][1]
    pixels = gather.n * gather.h.outputs * gather.w.outputs
    read = gather.n * gather.h.inputs * gather.w.inputs * gather.in_channels
    nbytes = (pixels * gather.out_channels + read) * size
    # Lines that the second-level cache has for the other parts cost about a third.
    nbytes += read * size * (block.group_parts - 1) / 3
    return nbytes / device.multiprocessors / _MEMORY_RATE
