"""From a Gather to launches: which GPU function, which tile, which arguments.

Pure functions of the shapes, the dtype, the number of nonzeros and the GPU's limits:
nothing is compiled, allocated or measured here. The tiles themselves are compared in
`tiling`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from sparse_conv import spmm_plan
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
from sparse_conv.tiling import (
    GATHER_VARIANTS,
    PACKS,
    Block,
    DeviceLimits,
    TileConfig,
    WgradConfig,
    choose_block,
    choose_wgrad_block,
    direct_clocks,
    first_late_block,
    make_block,
    make_wgrad_block,
    memory_steps,
    phase_outputs,
    stage_pitch,
    stores_quads,
)

__all__ = [
    "DeviceLimits",
    "Direct",
    "TileConfig",
    "WgradConfig",
    "compress_launch",
    "explain_gather",
    "gather_clocks",
    "gather_launch",
    "reachable",
    "wgrad_launches",
]

INT32_MAX = 2**31 - 1
# Codes of none and relu: short enough to be repeated for each of four channels.
QUAD_ACTIVATIONS = (0, 1)
DIRECT_THREADS = 256
COMPRESS_THREADS = 1024
# Positions of a lane that conv2d_wgrad.cu is compiled for.
WGRAD_POSITIONS = 4
# By how much the second of two blocks is delayed, see `tiling.first_late_block`.
DELAY_NS = 6000
# The most bytes of partial sums that wgrad keeps.
WORKSPACE_BYTES = 64 * 2**20

_GATHER_POINTERS = (
    "read", "values", "begin", "end", "indices", "order", "bias", "origins", "write",
)  # fmt: skip
_WGRAD_POINTERS = (
    "read", "gradient", "begin", "end", "indices", "origins", "workspace",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Direct:
    """The configuration that uses no shared memory; it serves every problem."""


@dataclass(frozen=True, slots=True)
class _Choice:
    """A block, or None for the direct function, the clocks it takes, and why."""

    block: Block | None
    clocks: float
    reason: str


def _outputs(gather: Gather) -> int:
    return gather.n * gather.h.outputs * gather.w.outputs * gather.out_channels


@functools.lru_cache(maxsize=4096)
def _choose(gather: Gather, dtype: str, nnz: int, device: DeviceLimits) -> _Choice:
    if not _outputs(gather):
        return _Choice(None, 0.0, "there is nothing to write")
    block, clocks = choose_block(gather, dtype, nnz, device)
    direct = direct_clocks(gather, nnz, device)
    if block is None:
        return _Choice(None, direct, "no tile of the input fits into shared memory")
    if direct < clocks:
        return _Choice(
            None,
            direct,
            f"so little work that tiles don't pay: about {direct:.0f} clocks without, "
            f"{clocks:.0f} with",
        )
    config = block.config
    return _Choice(
        block,
        clocks,
        f"tiles of {config.tile_h}x{config.tile_w} outputs, {config.block_rows} output "
        f"and {config.chunk} input channels at a time, {block.blocks} blocks of "
        f"{config.warps} warps: about {clocks:.0f} clocks",
    )


def explain_gather(gather: Gather, dtype: str, nnz: int, device: DeviceLimits) -> str:
    """What `gather_launch` chooses and why, in one sentence."""
    choice = _choose(gather, dtype, nnz, device)
    function = "conv2d_gather_direct" if choice.block is None else "conv2d_gather"
    return f"{function}: {choice.reason}"


def gather_clocks(gather: Gather, dtype: str, nnz: int, device: DeviceLimits) -> float:
    """Clocks that the launch of `gather_launch` takes, by the model in `tiling`."""
    return _choose(gather, dtype, nnz, device).clocks


@functools.lru_cache(maxsize=4096)
def gather_launch(
    gather: Gather,
    dtype: str,
    nnz: int,
    activation: int = 0,
    *,
    has_bias: bool,
    has_order: bool,
    device: DeviceLimits,
    config: TileConfig | Direct | None = None,
) -> Launch:
    """The launch of the forward pass or of the input gradient.

    Args:
        gather: What is computed.
        dtype: Name of the dtype of inputs, values, bias and outputs.
        nnz: Entries of all rows together.
        activation: Code of the activation.
        has_bias: Whether a bias will be given. No choice depends on it.
        has_order: Whether an order of the values will be given; likewise.
        device: The GPU's limits.
        config: The configuration to take; None chooses.

    Returns:
        A launch with the pointers read, values, begin, end, indices, order (optional),
        bias (optional), origins and write (16-byte aligned). Its grid is empty if
        nothing is written.

    Raises:
        ValueError: The GPU can't hold the given configuration.
    """
    del has_bias, has_order
    if config is None:
        block = _choose(gather, dtype, nnz, device).block
    elif isinstance(config, Direct):
        block = None
    else:
        block = make_block(gather, dtype, config, device)
        if block is None:
            raise ValueError(
                f"The configuration must fit the GPU ({device}). Received: {config}"
            )
    if block is None or not _outputs(gather):
        return _direct_gather_launch(gather, dtype, activation, device)
    late_block = first_late_block(gather, dtype, nnz, block, device)
    return _tiled_gather_launch(gather, dtype, activation, block, late_block)


def _tiled_gather_launch(
    gather: Gather, dtype: str, activation: int, block: Block, late_block: int
) -> Launch:
    config = block.config
    channels_last = gather.data_format == "NHWC"
    group_in = gather.in_channels // gather.groups
    quads = activation in QUAD_ACTIVATIONS and stores_quads(gather, config)
    stored_first = block.stage_positions * config.position_warps * WARP
    if channels_last:
        stored_first = config.block_rows // (4 if quads else 1)
    words = (
        *geometry_words(gather),
        *block.tiling.words(),
        block.tiling.subtiles,
        *block.lattice.words(),
        *divisor_words(config.block_rows),
        *divisor_words(stored_first),
        activation,
        config.chunk,
        -(-group_in // config.chunk),
        block.row_groups,
        block.subtile_groups,
        config.row_warps,
        config.warp_rows,
        config.passes,
        block.stage_begin,
        stage_pitch(config.block_rows, quads),
        block.stage_positions,
        int(quads),
        late_block,
        DELAY_NS,
        *memory_steps(gather),
    )
    return Launch(
        "conv2d_gather",
        _gather_defines(dtype, config.positions, config.rows, config.passes > 1),
        (block.blocks, 1, 1),
        (config.warps * WARP, 1, 1),
        block.shared_mem_bytes,
        _GATHER_POINTERS,
        pack_words(geometry_longs(gather), words),
    )


def _direct_gather_launch(
    gather: Gather, dtype: str, activation: int, device: DeviceLimits
) -> Launch:
    outputs_h, outputs_w = phase_outputs(gather.h), phase_outputs(gather.w)
    phases = len(gather.h.origins) * len(gather.w.origins)
    pixels = gather.n * phases * outputs_h * outputs_w
    words = (*geometry_words(gather), outputs_h, outputs_w, activation)
    blocks = -(-pixels * gather.out_channels // DIRECT_THREADS)
    if not _outputs(gather):
        blocks = 0
    return Launch(
        "conv2d_gather_direct",
        (("DTYPE", dtype.upper()),),
        # More blocks than can run at once; each thread loops over the rest.
        (min(blocks, 64 * device.multiprocessors), 1, 1),
        (DIRECT_THREADS, 1, 1),
        0,
        _GATHER_POINTERS,
        pack_words((pixels, *geometry_longs(gather)), words),
    )


@functools.lru_cache(maxsize=4096)
def wgrad_launches(
    gather: Gather,
    dtype: str,
    nnz: int,
    *,
    dense: bool,
    device: DeviceLimits,
    config: WgradConfig | Direct | None = None,
) -> tuple[Launch, Launch, int]:
    """The two launches of the kernel's gradient.

    Args:
        gather: The forward pass's gather.
        dtype: Name of the dtype of input, gradients and result.
        nnz: Entries of all rows together; ignored if `dense`.
        dense: Whether every weight gets a gradient, zero or not. Then begin, end and
            indices are null, and the result is the dense HWIO gradient.
        device: The GPU's limits.
        config: The configuration to take; None chooses.

    Returns:
        The launch that fills the workspace with partial sums (pointers read, gradient,
        begin, end, indices, origins, workspace), the launch that adds them in a fixed
        order (workspace, write), and the workspace's size in bytes.

    Raises:
        ValueError: The GPU can't hold the given configuration.
    """
    entries = gather.rows * gather.row_length if dense else nnz
    partials = max(1, WORKSPACE_BYTES // max(1, entries * PACKS[dtype][1]))
    if config is None:
        block = choose_wgrad_block(gather, dtype, device, partials)
    elif isinstance(config, Direct):
        block = None
    else:
        block = make_wgrad_block(gather, dtype, config, device)
        if block is None:
            raise ValueError(
                f"The configuration must fit the GPU ({device}). Received: {config}"
            )
    if block is None or not _outputs(gather):
        first, splits = _direct_wgrad_launch(gather, dtype, entries, device, partials)
    else:
        first, splits = _tiled_wgrad_launch(gather, dtype, entries, block), block.splits
    total = _sum_launch(gather, dtype, entries, splits, dense)
    return first, total, splits * entries * PACKS[dtype][1]


def _tiled_wgrad_launch(gather: Gather, dtype: str, entries: int, block) -> Launch:
    config = block.config
    words = (
        *geometry_words(gather),
        *block.tiling.words(),
        block.tiling.subtiles,
        *block.lattice.words(),
        *block.outputs.words(),
        config.chunk,
        -(-(gather.in_channels // gather.groups) // config.chunk),
        block.row_groups,
        block.subtile_groups,
        block.splits,
        config.warp_rows,
        *memory_steps(gather),
    )
    return Launch(
        "conv2d_wgrad",
        _wgrad_defines(dtype),
        (block.splits * block.row_groups if entries else 0, 1, 1),
        (config.warps * WARP, 1, 1),
        block.shared_mem_bytes,
        _WGRAD_POINTERS,
        pack_words((entries, *geometry_longs(gather)), words),
    )


def _direct_wgrad_launch(
    gather: Gather, dtype: str, entries: int, device: DeviceLimits, partials: int
) -> tuple[Launch, int]:
    outputs_h, outputs_w = phase_outputs(gather.h), phase_outputs(gather.w)
    phases = len(gather.h.origins) * len(gather.w.origins)
    pixels = gather.n * phases * outputs_h * outputs_w
    rows = max(gather.rows, 1)
    wanted = max(1, 8 * device.multiprocessors // rows)
    splits = max(1, min(wanted, partials, -(-pixels // (4 * WARP)), GRID_LIMIT // rows))
    launch = Launch(
        "conv2d_wgrad_direct",
        (("DTYPE", dtype.upper()),),
        (splits * gather.rows if entries else 0, 1, 1),
        (DIRECT_THREADS, 1, 1),
        0,
        _WGRAD_POINTERS,
        pack_words(
            (pixels, entries, *geometry_longs(gather)),
            (*geometry_words(gather), outputs_h, outputs_w, splits),
        ),
    )
    return launch, splits


def _sum_launch(
    gather: Gather, dtype: str, entries: int, splits: int, dense: bool
) -> Launch:
    words = (
        splits,
        int(dense),
        gather.out_channels,
        gather.in_channels // gather.groups,
        gather.h.taps * gather.w.taps,
    )
    blocks = min(-(-entries // DIRECT_THREADS), GRID_LIMIT)
    return Launch(
        "sum_partials",
        (("DTYPE", dtype.upper()),),
        (blocks, 1, 1),
        (DIRECT_THREADS, 1, 1),
        0,
        ("workspace", "write"),
        pack_words((entries,), words),
    )


@functools.lru_cache(maxsize=4096)
def compress_launch(
    gather: Gather,
    dtype: str,
    kernel_shape: tuple[int, int, int, int],
    *,
    transposed: bool,
) -> Launch:
    """The launch that finds the rows of a dense kernel on the GPU.

    Row i owns the slots from `i * gather.row_length` on, which is what `begin` says.

    Args:
        gather: Whose rows are wanted.
        dtype: Name of the kernel's dtype.
        kernel_shape: (R, S, C / groups, K).
        transposed: Whether `gather` is the input gradient's. For a 1x1 kernel with as
            many inputs as outputs both passes have the same gather and other rows.

    Returns:
        A launch with the pointers kernel, taps, begin, end, indices and values.

    Raises:
        ValueError: The kernel isn't one of this gather.
        NotImplementedError: The rows have more slots than 32 bits can number.
    """
    ends = (gather.out_channels // gather.groups, gather.in_channels)
    if not transposed:
        ends = (gather.in_channels // gather.groups, gather.out_channels)
    if kernel_shape[2:] != ends:
        raise ValueError(
            f"The kernel's shape must end in {ends}. "
            f"Received: kernel_shape={kernel_shape}, transposed={transposed}"
        )
    if gather.rows * gather.row_length > INT32_MAX:
        raise NotImplementedError(
            "A dense kernel may have at most 2^31 - 1 weights. "
            f"Received: {gather.rows} rows of {gather.row_length} weights"
        )
    # More rows in a block read more of each line of memory, fewer fill the GPU.
    block_rows = 4
    while block_rows < WARP and gather.rows > 128 * block_rows:
        block_rows *= 2
    words = (
        *geometry_words(gather),
        gather.rows,
        block_rows,
        *kernel_shape[1:],
        int(transposed),
    )
    return Launch(
        "compress",
        (("DTYPE", dtype.upper()),),
        (-(-gather.rows // block_rows), 1, 1),
        (COMPRESS_THREADS, 1, 1),
        # Each thread counts its part of a row.
        COMPRESS_THREADS * 4,
        ("kernel", "taps", "begin", "end", "indices", "values"),
        pack_words(geometry_longs(gather), words),
    )


def reachable() -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    """Every (function, defines) that a launch can name."""
    for dtype in PACKS:
        for (positions, rows), passes in itertools.product(
            GATHER_VARIANTS, (False, True)
        ):
            yield "conv2d_gather", _gather_defines(dtype, positions, rows, passes)
        yield "conv2d_wgrad", _wgrad_defines(dtype)
        for function in (
            "conv2d_gather_direct",
            "conv2d_wgrad_direct",
            "sum_partials",
            "compress",
        ):
            yield function, (("DTYPE", dtype.upper()),)
    yield from spmm_plan.reachable()


def _gather_defines(
    dtype: str, positions: int, rows: int, many_passes: bool
) -> tuple[tuple[str, str], ...]:
    return (
        ("DTYPE", dtype.upper()),
        ("POSITIONS", str(positions)),
        ("ROWS", str(rows)),
        ("MANY_PASSES", str(int(many_passes))),
    )


def _wgrad_defines(dtype: str) -> tuple[tuple[str, str], ...]:
    return (("DTYPE", dtype.upper()), ("POSITIONS", str(WGRAD_POSITIONS)))
