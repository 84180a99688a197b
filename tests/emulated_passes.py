"""The passes of a convolution on the GPU's functions, run by the emulator.

Knows the pointers of each launch that `plan` makes. Every pass runs in ascending and in
descending order of threads, which must agree in every bit. Does not know what the
results should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparse_conv import plan, tiling
from sparse_conv.gather import Gather, dgrad_gather, fprop_gather
from sparse_conv.launch import Launch
from sparse_conv.pattern import Rows
from sparse_conv.problem import Problem
from tests.emulator import ORDERS, Task, run_tasks
from tests.problems import DTYPES, Data

# They choose different tiles.
SMALL_GPU = plan.DeviceLimits(multiprocessors=2, shared_mem_bytes=48 * 1024)
LARGE_GPU = plan.DeviceLimits(132, 227 * 1024, 8, 60 * 2**20)
# Its blocks have to do several pieces of work, one after the other.
LITTLE_GPU = plan.DeviceLimits(1, 227 * 1024, 8)


@dataclass(frozen=True, eq=False, slots=True)
class Call:
    """A launch with its arrays; those named in `outputs` give only shape and dtype."""

    launch: Launch
    arrays: dict[str, np.ndarray | None]
    outputs: tuple[str, ...]

    def with_launch(self, **changes: Any) -> Call:
        """The same call with parts of its launch replaced."""
        return replace(self, launch=replace(self.launch, **changes))


def run_calls(
    calls: Sequence[Call], text: str | None = None
) -> list[dict[str, np.ndarray]]:
    """Runs independent calls in both orders of threads; see `tests.emulator.run`.

    Args:
        calls: What to run.
        text: The CUDA text of all of them; that of `kernels/` by default.

    Returns:
        For each call its outputs by name.
    """
    tasks = [
        Task(call.launch, call.arrays, call.outputs, text, order)
        for order in ORDERS
        for call in calls
    ]
    results = run_tasks(tasks)
    ascending, descending = results[: len(calls)], results[len(calls) :]
    for call, one, other in zip(calls, ascending, descending, strict=True):
        for name in call.outputs:
            assert one[name].tobytes() == other[name].tobytes(), (
                f"{call.launch.function} depends on the order of threads: {name}"
            )
    return ascending


def origins_of(gather: Gather) -> np.ndarray:
    """What the pointer "origins" of a launch points to."""
    return np.array([*gather.h.origins, *gather.w.origins], np.int32)


def _gather_call(
    gather: Gather,
    rows: Rows,
    values: np.ndarray,
    read: np.ndarray,
    shape: tuple[int, ...],
    dtype: str,
    bias: np.ndarray | None,
    activation: int,
    options: dict[str, Any],
) -> Call:
    launch = plan.gather_launch(
        gather,
        dtype,
        len(values),
        activation,
        has_bias=bias is not None,
        has_order=rows.order is not None,
        **{"device": LARGE_GPU, **options},
    )
    arrays = {
        "read": read,
        "values": values,
        "begin": rows.begin,
        "end": rows.end,
        "indices": rows.indices,
        "order": rows.order,
        "bias": bias,
        "origins": origins_of(gather),
        "write": np.empty(shape, DTYPES[dtype]),
    }
    return Call(launch, arrays, ("write",))


def tile_configs(gather: Gather, dtype: str, nnz: int) -> list[Any]:
    """Configurations with and without tiles, as both GPUs would choose them."""
    blocks = [
        tiling.choose_block(gather, dtype, nnz, device)[0]
        for device in (SMALL_GPU, LARGE_GPU)
    ]
    tiles = [block.config for block in blocks if block is not None]
    return [plan.Direct(), *dict.fromkeys(tiles)]


def fprop_call(
    problem: Problem,
    data: Data,
    dtype: str,
    *,
    bias: bool = False,
    activation: int = 0,
    **options: Any,
) -> Call:
    """The forward pass; `options` are `device` and `config` of the plan."""
    return _gather_call(
        fprop_gather(problem),
        data.pattern.fprop_rows(),
        data.values,
        data.x,
        problem.output_shape,
        dtype,
        data.bias if bias else None,
        activation,
        options,
    )


def dgrad_call(problem: Problem, data: Data, dtype: str, **options: Any) -> Call:
    """The input gradient; `options` are `device` and `config` of the plan."""
    gather = dgrad_gather(problem)
    rows = data.pattern.dgrad_rows(gather)
    return _gather_call(
        gather, rows, data.values, data.dy, problem.input_shape, dtype, None, 0, options
    )


def wgrad_calls(
    problem: Problem, data: Data, dtype: str, *, dense: bool, **options: Any
) -> tuple[Call, Call]:
    """The kernel gradient: the second call sums the first one's workspace."""
    gather = fprop_gather(problem)
    rows = data.pattern.fprop_rows()
    first, second, workspace_bytes = plan.wgrad_launches(
        gather, dtype, len(data.values), dense=dense, **{"device": LARGE_GPU, **options}
    )
    arrays = {
        "read": data.x,
        "gradient": data.dy,
        "begin": None if dense else rows.begin,
        "end": None if dense else rows.end,
        "indices": None if dense else rows.indices,
        "origins": origins_of(gather),
        "workspace": np.empty(workspace_bytes, np.uint8),
    }
    shape = problem.kernel_shape if dense else data.values.shape
    written = {"write": np.empty(shape, DTYPES[dtype])}
    return Call(first, arrays, ("workspace",)), Call(second, written, ("write",))


def run_wgrads(
    pairs: Sequence[tuple[Call, Call]], text: str | None = None
) -> list[np.ndarray]:
    """Runs pairs that `wgrad_calls` made; the text, if given, is the first calls'."""
    partial = run_calls([first for first, _ in pairs], text)
    seconds = [
        replace(second, arrays={**second.arrays, "workspace": sums["workspace"]})
        for (_, second), sums in zip(pairs, partial, strict=True)
    ]
    return [result["write"] for result in run_calls(seconds)]


def compress_call(
    problem: Problem, dense: np.ndarray, dtype: str, *, transposed: bool
) -> Call:
    """Finds the nonzeros of a dense kernel, as rows of the gather of fprop or dgrad."""
    gather = (dgrad_gather if transposed else fprop_gather)(problem)
    launch = plan.compress_launch(
        gather, dtype, problem.kernel_shape, transposed=transposed
    )
    slots = gather.rows * gather.row_length
    taps = [
        tap for axis in (gather.h, gather.w) for row in axis.kernel_taps for tap in row
    ]
    arrays = {
        "kernel": dense,
        "taps": np.array(taps, np.int32),
        "begin": np.empty(gather.rows, np.int32),
        "end": np.empty(gather.rows, np.int32),
        "indices": np.empty(slots, np.int32),
        "values": np.empty(slots, dense.dtype),
    }
    return Call(launch, arrays, ("begin", "end", "indices", "values"))


def assert_rows(found: dict[str, np.ndarray], rows: Rows, values: np.ndarray) -> None:
    """Fails unless what `compress_call` wrote are these rows, each in its own slots."""
    begin, end = found["begin"], found["end"]
    row_length = len(found["indices"]) // max(len(begin), 1)
    np.testing.assert_array_equal(begin, np.arange(len(begin)) * row_length)
    np.testing.assert_array_equal(end - begin, rows.end - rows.begin)
    places = np.arange(len(found["indices"]))
    used = places % max(row_length, 1) < np.repeat(end - begin, row_length)
    np.testing.assert_array_equal(found["indices"][used], rows.indices)
    assert found["values"][used].tobytes() == values.tobytes()
