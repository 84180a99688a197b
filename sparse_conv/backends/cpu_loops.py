"""The sparse convolution and its gradients on NumPy arrays and addresses.

Prepares what the compiled loops of `cpu_tasks` walk, and has the threads run them.

Every output is one sum in an order that depends on the kernel's pattern alone: short
chains of products, each summed by itself, in ascending order. Results do not depend on
the number of threads. Only stored entries are visited: what a skipped zero would have
met never takes part. Cells of padding are zeros.

Knows NumPy arrays and Gathers. Does not know TensorFlow, nor float16 and bfloat16: the
caller casts them to float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparse_conv.backends import cpu_baked, cpu_code, cpu_memory, cpu_threads
from sparse_conv.backends.cpu_code import Function
from sparse_conv.backends.cpu_jobs import HEAD_CELLS, JOB_HEADER, GatherJob, WgradJob
from sparse_conv.backends.cpu_plan import PlanTables, make_plan
from sparse_conv.backends.cpu_tiles import CHAIN_ENTRIES, COMMON, CORES, Job
from sparse_conv.gather import Gather
from sparse_conv.pattern import Rows

# The cut of a wgrad decides the order of its sums, so it can't follow the machine, nor
# the kind of its cores.
WGRAD_THREADS = 16


class Placement(NamedTuple):
    """A Gather's rows as the loops walk them, without their values.

    Attributes:
        tables: The plan they are made for.
        function: The compiled function.
        offsets: (entries,) int32, what each entry reads, in cells.
        sources: (entries,) the place of each entry's value among the pattern's.
        splits: (rows, blocks + 1) int32, where each row's blocks of channels begin.
        lengths: (rows, blocks) int32, the entries of a chain in each block.
        no_bias: (out_channels,) zeros.
        code: Code that takes the place of the loops; None for the loops. It reads the
            values in the order of `sources`, and none of the tables above.
    """

    tables: PlanTables
    function: Function
    offsets: np.ndarray
    sources: np.ndarray
    splits: np.ndarray
    lengths: np.ndarray
    no_bias: np.ndarray
    code: cpu_baked.Code | None = None


class Entries(NamedTuple):
    """Entries in their places.

    Attributes:
        placement: The places, which the job points to.
        values: (entries,) numbers, which the job points to as well.
        job: What the threads run, but for the words that differ from call to call.
    """

    placement: Placement
    values: np.ndarray
    job: Any


def gather(
    gather: Gather,
    rows: Rows,
    values: np.ndarray,
    read: np.ndarray,
    write: np.ndarray,
    bias: np.ndarray | None = None,
    activation: int = 0,
    baked: bool = False,
) -> None:
    """Computes a Gather: the forward pass or the input gradient.

    Args:
        gather: What to compute.
        rows: The sparse rows that belong to it.
        values: (nnz,) numbers, in the pattern's canonical order.
        read: The input, in the gather's layout; float32, float64 or int32.
        write: The output, of the same dtype; all of it is overwritten.
        bias: (out_channels,) numbers.
        activation: The code of the activation; int32 has 0, 1 and 2 only.
        baked: As for `prepare`.

    Raises:
        NotImplementedError: The scratch memory of one tile would exceed 2^31 cells.
    """
    if write.size:
        entries = prepare(gather, rows, values, baked=baked)
        read = np.ascontiguousarray(read)
        run_gather(
            entries, _address(read), _address(write),
            0 if bias is None else _address(bias), activation,
        )  # fmt: skip


def prepare(
    gather: Gather,
    rows: Rows,
    values: np.ndarray,
    wanted_threads: int = 0,
    baked: bool = False,
) -> Entries:
    """Prepares what does not depend on a Gather's input.

    Args:
        gather: What will be computed.
        rows: The sparse rows that belong to it.
        values: (nnz,) numbers, in the pattern's canonical order. Their magnitudes
            decide the order within the chains of loops.
        wanted_threads: As `cpu_threads.thread_count` takes it.
        baked: Whether code is generated for the pattern; float32 and float64 only.

    Returns:
        The entries, ready for any number of calls of `run_gather`.

    Raises:
        NotImplementedError: The scratch memory of one tile would exceed 2^31 cells.
    """
    placement = place(gather, rows, values.dtype, wanted_threads, baked)
    if placement.code is not None:
        return fill(placement, values)
    order = _chain_order(values[placement.sources], placement.splits, placement.lengths)
    placement = placement._replace(
        offsets=placement.offsets[order], sources=placement.sources[order]
    )
    return fill(placement, values)


def place(
    gather: Gather,
    rows: Rows,
    dtype: np.dtype,
    wanted_threads: int = 0,
    baked: bool = False,
) -> Placement:
    """Prepares what depends neither on a Gather's input nor on its values.

    Args:
        gather: What will be computed.
        rows: The sparse rows that belong to it.
        dtype: Of the numbers.
        wanted_threads: As `cpu_threads.thread_count` takes it.
        baked: Whether code is generated for the pattern; float32 and float64 only.

    Returns:
        The places, which serve any values of the same pattern and dtype.

    Raises:
        NotImplementedError: The scratch memory of one tile would exceed 2^31 cells.
    """
    threads = cpu_threads.thread_count(wanted_threads)
    function = cpu_code.function("code" if baked else "gather", dtype.name)
    tables = _tables(gather, function, dtype, len(rows.indices), threads, code=baked)
    used, offsets, splits = _place_entries(tables, rows)
    lengths = chain_lengths(np.diff(splits, axis=1))
    sources = used if rows.order is None else rows.order[used]
    code = None
    if baked:
        row = np.repeat(np.arange(len(splits)), splits[:, -1] - splits[:, 0])
        channel, tap = np.divmod(rows.indices[used], gather.h.taps * gather.w.taps)
        block = rows.indices[used] // tables.plan.block_length
        # As TensorFlow's convolution: one tap's channels after the other's.
        rank = tap * gather.in_channels + channel
        code = cpu_baked.generate(tables.plan, row, block, rank, offsets, dtype.name)
        sources = sources[code.order]
    return Placement(
        tables, function, offsets, sources, splits, lengths,
        np.zeros(gather.out_channels, dtype), code,
    )  # fmt: skip


def fill(placement: Placement, values: np.ndarray) -> Entries:
    """The entries with these values, ready for any number of calls of `run_gather`."""
    p = placement
    ordered = values[p.sources]
    words = GatherJob(
        *_table_words(p.tables), _address(p.offsets), _address(p.splits),
        _address(p.lengths), _address(ordered),
        codes=0 if p.code is None else _address(p.code.addresses), read=0, write=0,
        bias=_address(p.no_bias), activation=0,
    )  # fmt: skip
    job = cpu_threads.make_job(p.function.address, words)
    return Entries(placement, ordered, job)


_READ, _WRITE, _BIAS, _ACTIVATION = (
    JOB_HEADER + GatherJob._fields.index(name)
    for name in ("read", "write", "bias", "activation")
)


def run_gather(
    entries: Entries, read: int, write: int, bias: int = 0, activation: int = 0
) -> None:
    """As `gather`, for entries that are prepared and operands at addresses."""
    tables = entries.placement.tables
    job = type(entries.job).from_buffer_copy(entries.job)
    job[_READ] = read
    job[_WRITE] = write
    if bias:
        job[_BIAS] = bias
    job[_ACTIVATION] = activation
    _run(job, tables.plan.tasks, tables.gather_bytes, tables.threads)


def _run(job: Any, tasks: int, scratch_bytes: int, threads: int) -> None:
    owner, scratch = cpu_memory.scratch(scratch_bytes * min(tasks, threads))
    cpu_threads.run(job, tasks, scratch, scratch_bytes, threads)
    del owner


def _table_words(tables: PlanTables) -> tuple[int, ...]:
    """The words at the beginning of each kind of job."""
    return tuple(
        _address(table)
        for table in (
            tables.record,
            tables.outer_origins,
            tables.inner_origins,
            tables.image_rows,
            tables.places,
        )
    )


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


def wgrad(
    gather: Gather,
    rows: Rows,
    read: np.ndarray,
    gradient: np.ndarray,
    dvalues: np.ndarray,
    wanted_threads: int = 0,
) -> None:
    """Computes the gradient to the kernel's values, at its nonzeros only.

    Args:
        gather: The forward pass.
        rows: The forward pass's rows.
        read: The forward pass's input; float32, float64 or int32.
        gradient: The gradient to the forward pass's output, of the same dtype.
        dvalues: (nnz,) of the same dtype; all of it is overwritten.
        wanted_threads: As `cpu_threads.thread_count` takes it.

    Raises:
        NotImplementedError: The scratch memory of one tile would exceed 2^31 cells.
    """
    if dvalues.size == 0:
        return
    if gradient.size == 0:
        dvalues[...] = 0
        return
    prepared = prepare_wgrad(gather, rows, read.dtype)
    run_wgrad(prepared, _address(read), _address(gradient), dvalues, wanted_threads)


class WgradEntries(NamedTuple):
    """What a weight gradient needs and does not depend on its operands.

    Attributes:
        tables: The plan.
        job: What the threads run, but for the words that differ from call to call.
        scratch_bytes: Scratch memory of a thread.
        owners: What the job points to.
    """

    tables: PlanTables
    job: Any
    scratch_bytes: int
    owners: tuple[np.ndarray, ...]


def prepare_wgrad(gather: Gather, rows: Rows, dtype: np.dtype) -> WgradEntries:
    """Prepares a weight gradient at the nonzeros of a pattern.

    Args:
        gather: The forward pass.
        rows: The forward pass's rows; at least one entry.
        dtype: Of the operands.

    Raises:
        NotImplementedError: The scratch memory of one tile would exceed 2^31 cells.
    """
    function = cpu_code.function("wgrad", dtype.name)
    entries = len(rows.indices)
    tables = _tables(gather, function, dtype, entries, WGRAD_THREADS, wgrad=True)
    plan = tables.plan
    _, offsets, splits = _place_entries(tables, rows)
    longest = int((splits[:, -1] - splits[:, 0]).max())
    # Planes, a cell for waste, the gradients of some output channels, and the sums of
    # their entries.
    cells = plan.group_block * plan.group_channels * plan.channel_cells
    cells += HEAD_CELLS + 1 + plan.output_block * (plan.band * plan.strip + longest)
    # The lanes of a vector of sums are added at a time.
    cells += plan.lanes
    words = WgradJob(
        *_table_words(tables), _address(tables.gradient_places), _address(offsets),
        _address(splits), read=0, gradient=0, partial=0, entries=entries,
        longest=longest, slots=tables.slots,
    )  # fmt: skip
    job = cpu_threads.make_job(function.address, words)
    size = cells * function.widths.vector_bytes
    return WgradEntries(tables, job, size, (offsets, splits))


def run_wgrad(
    entries: WgradEntries, read: int, gradient: int, dvalues: np.ndarray,
    wanted_threads: int = 0,
) -> None:  # fmt: skip
    """As `wgrad`, for entries that are prepared and operands at addresses."""
    tables = entries.tables
    partial = np.zeros((tables.slots, len(dvalues)), dvalues.dtype)
    job = type(entries.job).from_buffer_copy(entries.job)
    for name, word in (
        ("read", read), ("gradient", gradient), ("partial", _address(partial))
    ):  # fmt: skip
        job[JOB_HEADER + WgradJob._fields.index(name)] = word
    threads = 1 if tables.threads == 1 else cpu_threads.thread_count(wanted_threads)
    _run(job, tables.slots, entries.scratch_bytes, threads)
    # One slot after the other, whatever their number.
    np.add.reduce(partial, axis=0, dtype=dvalues.dtype, out=dvalues)


def wgrad_dense(
    gather: Gather,
    read: np.ndarray,
    gradient: np.ndarray,
    dkernel: np.ndarray,
    wanted_threads: int = 0,
) -> None:
    """Computes the gradient to every weight of the dense kernel.

    Args:
        gather: The forward pass.
        read: The forward pass's input; float32, float64 or int32.
        gradient: The gradient to the forward pass's output, of the same dtype.
        dkernel: (R, S, C / groups, K) of the same dtype; all of it is overwritten.
        wanted_threads: As `cpu_threads.thread_count` takes it.

    Raises:
        NotImplementedError: The scratch memory of one tile would exceed 2^31 cells.
    """
    length, outputs = gather.row_length, gather.out_channels
    begin = np.arange(outputs, dtype=np.int64) * length
    if begin.size and begin[-1] + length >= 2**31:
        raise NotImplementedError(
            "The CPU back end's gradient to a dense kernel is limited to 2^31 - 1 "
            f"weights. Received: {gather}"
        )
    rows = Rows(
        begin.astype(np.int32),
        (begin + length).astype(np.int32),
        np.tile(np.arange(length, dtype=np.int32), outputs),
        None,
    )
    dvalues = np.empty(outputs * length, dkernel.dtype)
    wgrad(gather, rows, read, gradient, dvalues, wanted_threads)
    channels = gather.in_channels // gather.groups
    by_output = dvalues.reshape(outputs, channels, gather.h.taps, gather.w.taps)
    dkernel[...] = by_output.transpose(2, 3, 1, 0)


def _tables(
    gather: Gather,
    function: Function,
    dtype: np.dtype,
    entries: int,
    threads: int,
    wgrad: bool = False,
    code: bool = False,
) -> PlanTables:
    # Plans are cached: near numbers of entries share one.
    step = 1 << max(0, int(entries).bit_length() - 3)
    rounded = -(-int(entries) // step) * step
    vector_bytes, tile_cells = function.widths
    lanes = vector_bytes // dtype.itemsize
    core = COMMON if wgrad else CORES[cpu_code.core()]
    return make_plan(
        Job(
            gather, dtype.itemsize, lanes, tile_cells, rounded, threads, wgrad, core,
            code,
        )
    )  # fmt: skip


def _place_entries(
    tables: PlanTables, rows: Rows
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of the rows' entries, their offsets in cells, and the blocks' beginnings.

    The places are those in `rows.indices`, without the gaps between rows; the blocks'
    beginnings count without them.
    """
    plan = tables.plan
    counts = (rows.end - rows.begin).astype(np.int64)
    row = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    used = np.arange(len(row)) + np.repeat(rows.begin - (ends - counts), counts)
    indices = rows.indices[used]
    group = np.arange(len(counts)) % (plan.groups * plan.group_outputs)
    group = group // plan.group_outputs % plan.group_block
    shift = (group * plan.group_channels * plan.channel_cells).astype(np.int32)
    offsets = tables.offsets[indices] + shift[row]
    place = row * plan.blocks + indices // plan.block_length
    block_counts = np.bincount(place, minlength=len(counts) * plan.blocks)
    splits = np.zeros((len(counts), plan.blocks + 1), np.int32)
    splits[:, 0] = ends - counts
    block_counts = block_counts.reshape(len(counts), plan.blocks)
    splits[:, 1:] = splits[:, :1] + np.cumsum(block_counts, axis=1)
    return used, offsets, splits


def chain_lengths(counts: np.ndarray) -> np.ndarray:
    """The products in one chain of each block: blocks are cut into even chains."""
    chains = np.maximum(1, -(-counts // CHAIN_ENTRIES))
    return np.maximum(1, -(-counts // chains)).astype(np.int32)


def _chain_order(
    values: np.ndarray, splits: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """The order that sorts each chain by the values' magnitude.

    A sum that takes the small products first is smaller while it is rounded.
    """
    counts = np.diff(splits, axis=1).reshape(-1)
    number = np.arange(len(values)) - np.repeat(splits[:, :-1].reshape(-1), counts)
    chain = number // np.repeat(lengths.reshape(-1), counts)
    # Chains are numbered in order; where one begins, the number grows.
    begins = np.diff(chain, prepend=0) != 0
    begins |= number == 0
    return np.lexsort((np.abs(values), np.cumsum(begins)))
