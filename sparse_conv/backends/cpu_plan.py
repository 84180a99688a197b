"""How the CPU loops cut a Gather into tasks that fit a core's cache.

Pure arithmetic on sizes. Knows the layout that the loops work in; does not know how
they compute, nor any array but its own tables.

One spatial axis, the outer one, is cut into lanes. The images lie below each other
along it, in one stack of rows; neighbours share the rows of zeros between them. A chunk
of the stack is `lanes * band` rows long, and lane l holds the rows from `l * band` on.
The cell at (row, column) of a plane thus holds `lanes` numbers, one from each lane's
part of the stack, and a tap moves every lane by the same number of cells: each read is
aligned, however short the rows of an image are. Along the inner axis a task covers one
strip of columns.

A stride splits an axis into as many planes ("subs"), so that within a plane the reads
of neighbouring outputs are neighbours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparse_conv.gather import Axis, Gather

# Half of the second-level cache of a common core: a task's planes should fit.
PLANES_BYTES = 384 * 1024
# The part of the first-level cache that one tile of one block of channels may read.
WINDOW_BYTES = 24 * 1024
# Entries that a row should have in a block, to be worth loading and storing its sums.
BLOCK_ENTRIES = 32
# Products that are summed by themselves before they join the rest, at least. In one
# long chain the error of float32 would exceed that of TensorFlow's own convolution.
CHAIN_ENTRIES = 16
# Output channels that are summed, and written, together.
OUTPUT_BLOCK = 16
# The same where their sums are loaded and stored once for each block of channels.
MANY_OUTPUTS = 256
# Then, rows times output channels whose sums stay in the cache meanwhile.
ROW_OUTPUTS = 64
# Sums of the partial results of a wgrad, in bytes at most, and their number.
PARTIAL_BYTES = 64 * 2**20
MAX_SLOTS = 32
# Below this many cycles in all, handing a task to another thread takes longer.
INLINE_CYCLES = 100_000


class Side(NamedTuple):
    """One spatial axis as the loops see it; the names as in `gather.Axis`."""

    inputs: int
    outputs: int
    phases: int
    visited: int
    step: int
    stride: int
    subs: int
    reach: int
    row_sets: int
    set_factor: int
    read_stride: int
    write_stride: int


class Plan(NamedTuple):
    """The numbers that the loops need, all of them integers.

    Sizes are in cells or elements, `*_stride` and the like in elements of the arrays.

    Attributes:
        outer: The axis that is cut into lanes. `inner` is the other one.
        images: Batch size.
        lanes: Numbers in a cell.
        groups: Channel groups. A task takes `group_block` of them.
        group_channels: Channels read in one group; `group_outputs` are written.
        band: Rows of each lane; `strip` is the number of columns of a task.
        pitch: Cells from one row of a plane to the next.
        plane_cells: Cells from one plane to the next.
        channel_cells: Cells from one channel to the next.
        block_length: Indices in one block of channels; `blocks` blocks in a row.
        chain: Products that are summed by themselves before they join others.
        chains: Chains that are summed by themselves before they join the rest.
        output_block: Output channels that are summed, and written, together, for
            `row_block` rows.
        output_parts: Tasks that share the outputs of the same planes.
        tasks: Number of tasks.
    """

    outer: Side
    inner: Side
    images: int
    lanes: int
    groups: int
    group_channels: int
    group_outputs: int
    read_image: int
    read_channel: int
    write_image: int
    write_channel: int
    band: int
    strip: int
    pitch: int
    plane_cells: int
    channel_cells: int
    group_block: int
    group_blocks: int
    block_length: int
    blocks: int
    chain: int
    chains: int
    output_block: int
    row_block: int
    output_parts: int
    chunks: int
    strips: int
    tasks: int


_SIDE_DTYPE = np.dtype([(name, np.int64) for name in Side._fields])
_PLAN_DTYPE = np.dtype(
    [("outer", _SIDE_DTYPE), ("inner", _SIDE_DTYPE)]
    + [(name, np.int64) for name in Plan._fields[2:]]
)


@dataclass(frozen=True, eq=False)
class PlanTables:
    """A Plan and the arrays that go with it.

    Attributes:
        plan: The numbers.
        record: (1,), the same as a structure; it enters compiled code faster.
        outer_origins: (outer.visited,) int64; `inner_origins` (inner.visited,).
        image_rows: (outer.visited,) int64, rows from one image of the stack to the
            next.
        offsets: (row_length,) int32, the cells by which each index moves a read.
        threads: Threads that are worth using.
        slots: Partial results of a wgrad.
        gather_cells: Cells of scratch memory of one task of a Gather.
    """

    plan: Plan
    record: np.ndarray
    outer_origins: np.ndarray
    inner_origins: np.ndarray
    image_rows: np.ndarray
    offsets: np.ndarray
    threads: int
    slots: int
    gather_cells: int


class Job(NamedTuple):
    """What a plan is for.

    Attributes:
        gather: What to compute; no extent of what is written may be 0.
        itemsize: Bytes of a number.
        lanes: Numbers in a cell.
        tile_cells: Cells that the loops sum at once.
        entries: About how many nonzeros the kernel has.
        threads: Threads to cut for. Results of a wgrad depend on it.
        wgrad: Whether the plan is for a weight gradient.
    """

    gather: Gather
    itemsize: int
    lanes: int
    tile_cells: int
    entries: int
    threads: int
    wgrad: bool


class _Cut(NamedTuple):
    """One way to cut a Gather, and its estimated time; the shortest compares least."""

    cycles: float
    total_cycles: float
    swapped: bool
    band: int
    strip: int
    output_parts: int
    chunks: int
    strips: int
    tasks: int


@functools.lru_cache(maxsize=1024)
def make_plan(job: Job) -> PlanTables:
    """Chooses the cut with the shortest estimated time.

    Args:
        job: What to plan.

    Returns:
        The plan with its tables.

    Raises:
        NotImplementedError: The planes of one tile would have 2^31 cells or more.
    """
    gather = job.gather
    cut = min(_cuts(job))
    plan = _finish(job, cut)
    planes = plan.group_block * plan.group_channels * plan.channel_cells
    if planes >= 2**31:
        raise NotImplementedError(
            "The CPU back end needs scratch memory of less than 2^31 cells. "
            f"Received: {gather}"
        )
    outer_axis, inner_axis = _axes(gather, cut.swapped)
    partial_bytes = max(1, job.itemsize * gather.out_channels * gather.row_length)
    return PlanTables(
        plan,
        np.array([(tuple(plan.outer), tuple(plan.inner), *plan[2:])], _PLAN_DTYPE),
        np.array(outer_axis.origins, np.int64),
        np.array(inner_axis.origins, np.int64),
        _image_rows(outer_axis),
        _offsets(plan, gather, cut.swapped),
        1 if cut.total_cycles < INLINE_CYCLES else job.threads,
        max(1, min(plan.tasks, MAX_SLOTS, PARTIAL_BYTES // partial_bytes)),
        # One tile more than the sums, for those of a group of chains.
        planes + (plan.row_block * plan.output_block + 1) * job.tile_cells,
    )


def _axes(gather: Gather, swapped: bool) -> tuple[Axis, Axis]:
    return (gather.w, gather.h) if swapped else (gather.h, gather.w)


def _sides(gather: Gather, swapped: bool) -> tuple[Side, Side]:
    """The outer and the inner side; `swapped` makes the width the outer one."""
    nhwc = gather.data_format == "NHWC"
    read_pixel, write_pixel = (
        (gather.in_channels, gather.out_channels) if nhwc else (1, 1)
    )
    h = _side(
        gather.h,
        gather.w.row_sets,
        gather.w.inputs * read_pixel,
        gather.w.outputs * write_pixel,
    )
    w = _side(gather.w, 1, read_pixel, write_pixel)
    return (w, h) if swapped else (h, w)


def _side(axis: Axis, set_factor: int, read_stride: int, write_stride: int) -> Side:
    return Side(
        inputs=axis.inputs,
        outputs=axis.outputs,
        phases=axis.phases,
        visited=len(axis.origins),
        step=axis.step,
        stride=axis.stride,
        subs=min(axis.stride, axis.taps),
        reach=(axis.taps - 1) // axis.stride,
        row_sets=axis.row_sets,
        set_factor=set_factor,
        read_stride=read_stride,
        write_stride=write_stride,
    )


def _image_rows(axis: Axis) -> np.ndarray:
    """For each phase: rows of the stack from one image to the next.

    Positions `u` of an image and `u - rows` of the next one are the same row, so at
    least one of them must lie in the padding, wherever both are read.
    """
    reach = (axis.taps - 1) // axis.stride
    subs = min(axis.stride, axis.taps)
    rows = []
    for phase, origin in enumerate(axis.origins):
        outputs = max(0, -((phase - axis.outputs) // axis.phases))
        needed = outputs + reach
        first, last = needed, 0
        for sub in range(subs):
            start = origin + axis.step * sub
            pace = axis.step * axis.stride
            low = max(0, -(start // pace))
            high = (axis.inputs - 1 - start) // pace + 1
            if low < high:
                first, last = min(first, low), max(last, high)
        rows.append(max(1, outputs, min(last, needed), needed - first))
    return np.array(rows, np.int64)


def _group_block(gather: Gather, lanes: int) -> int:
    """Groups that a task takes: enough to fill the vectors of the transpositions."""
    smallest = max(1, min(gather.in_channels, gather.out_channels) // gather.groups)
    return min(gather.groups, -(-2 * lanes // smallest))


def _plane_cells(cells: int) -> int:
    """Rounded up to 2 modulo 4, so that planes don't all meet in one cache set."""
    return cells + (2 - cells) % 4


def _candidates(largest: int) -> list[int]:
    """Ways to divide `largest` evenly, from one part to parts of one."""
    parts = {2**i * j for i in range(largest.bit_length()) for j in (1, 3)}
    return sorted({-(-largest // part) for part in parts})


def _cuts(job: Job) -> Iterator[_Cut]:
    for swapped in (False, True):
        outer, inner = _axes(job.gather, swapped)
        stack = (job.gather.n - 1) * int(_image_rows(outer).max())
        stack += -(-outer.outputs // outer.phases)
        columns = -(-inner.outputs // inner.phases)
        for tiles in _candidates(-(-columns // job.tile_cells)):
            strip = min(columns, tiles * job.tile_cells)
            for band in _candidates(-(-stack // job.lanes)):
                chunks, strips = -(-stack // (job.lanes * band)), -(-columns // strip)
                yield from _parts(job, swapped, band, strip, chunks, strips)


def _parts(
    job: Job, swapped: bool, band: int, strip: int, chunks: int, strips: int
) -> Iterator[_Cut]:
    """The cuts of one band and strip, with the outputs in one part or several."""
    gather = job.gather
    outer, inner = _sides(gather, swapped)
    share = _group_block(gather, job.lanes) / gather.groups
    packed = share * gather.in_channels * outer.subs * inner.subs
    packed *= (band + outer.reach) * (strip + inner.reach)
    size = packed * job.lanes * job.itemsize
    # Cycles for a cell: measured on one core, and only their ratios matter.
    slowness = 0.75 if size <= PLANES_BYTES else 1.0 if size <= 2**23 else 1.5
    row_entries = share * job.entries / (outer.row_sets * inner.row_sets)
    outputs = share * gather.out_channels
    work = band * strip * (slowness * row_entries + 8.0 * outputs)
    phases = outer.visited * inner.visited * math.ceil(1 / share)
    most = job.threads if gather.groups == 1 and not job.wgrad else 1
    for parts in range(1, min(most, gather.out_channels) + 1):
        task_cycles = 6.0 * packed + work / parts + 10_000
        tasks = phases * chunks * strips * parts
        total = tasks * task_cycles
        cycles = math.ceil(tasks / job.threads) * task_cycles
        if total < INLINE_CYCLES:
            cycles = total
        yield _Cut(cycles, total, swapped, band, strip, parts, chunks, strips, tasks)


def _finish(job: Job, cut: _Cut) -> Plan:
    gather = job.gather
    row_entries = job.entries // max(1, gather.rows)
    # The errors of three levels are least where each has as many terms as the others.
    chain = max(CHAIN_ENTRIES, round(row_entries ** (1 / 3)))
    outer, inner = _sides(gather, cut.swapped)
    nhwc = gather.data_format == "NHWC"
    read_plane = gather.h.inputs * gather.w.inputs
    write_plane = gather.h.outputs * gather.w.outputs
    pitch = cut.strip + inner.reach
    plane_cells = _plane_cells((cut.band + outer.reach) * pitch)
    group_block = _group_block(gather, job.lanes)
    blocks, block_length = _blocks(job)
    outputs = group_block * gather.out_channels // gather.groups
    output_block = min(OUTPUT_BLOCK if blocks == 1 else MANY_OUTPUTS, outputs)
    row_block = 1 if blocks == 1 else max(1, ROW_OUTPUTS // output_block)
    return Plan(
        outer=outer,
        inner=inner,
        images=gather.n,
        lanes=job.lanes,
        groups=gather.groups,
        group_channels=gather.in_channels // gather.groups,
        group_outputs=gather.out_channels // gather.groups,
        read_image=read_plane * gather.in_channels,
        read_channel=1 if nhwc else read_plane,
        write_image=write_plane * gather.out_channels,
        write_channel=1 if nhwc else write_plane,
        band=cut.band,
        strip=cut.strip,
        pitch=pitch,
        plane_cells=plane_cells,
        channel_cells=plane_cells * outer.subs * inner.subs,
        group_block=group_block,
        group_blocks=-(-gather.groups // group_block),
        block_length=block_length,
        blocks=blocks,
        chain=chain,
        chains=max(1, math.isqrt(row_entries // chain)),
        output_block=output_block,
        row_block=min(cut.band, row_block),
        output_parts=cut.output_parts,
        chunks=cut.chunks,
        strips=cut.strips,
        tasks=cut.tasks,
    )


def _blocks(job: Job) -> tuple[int, int]:
    """The number of blocks of channels, and the indices in one.

    They decide in what order an output's products are summed, so they may follow from
    nothing that a number of threads has a part in, such as the cut.
    """
    gather = job.gather
    columns = min(job.tile_cells, -(-gather.w.outputs // gather.w.phases))
    window = job.itemsize * job.lanes
    for axis, outputs in ((gather.h, 1), (gather.w, columns)):
        reach = (axis.taps - 1) // axis.stride
        window *= min(axis.stride, axis.taps) * (outputs + reach)
    channels = gather.in_channels // gather.groups
    row_entries = max(1.0, job.entries / max(1, gather.rows))
    size = max(
        1, WINDOW_BYTES // window, math.ceil(BLOCK_ENTRIES * channels / row_entries)
    )
    blocks = max(1, -(-channels // size))
    size = -(-channels // blocks)
    return blocks, size * gather.h.taps * gather.w.taps


def _offsets(plan: Plan, gather: Gather, swapped: bool) -> np.ndarray:
    channel, tap_h, tap_w = np.ogrid[
        : plan.group_channels, : gather.h.taps, : gather.w.taps
    ]
    outer, inner = (tap_w, tap_h) if swapped else (tap_h, tap_w)
    outer_shift, outer_sub = np.divmod(outer, plan.outer.stride)
    inner_shift, inner_sub = np.divmod(inner, plan.inner.stride)
    plane = outer_sub * plan.inner.subs + inner_sub
    offsets = (
        channel * plan.channel_cells
        + plane * plan.plane_cells
        + outer_shift * plan.pitch
        + inner_shift
    )
    return offsets.reshape(-1).astype(np.int32)
