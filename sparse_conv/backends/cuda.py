"""The back end for tensors on NVIDIA GPUs.

Knows which launches serve which pass, and what they need on the device: the rows of a
pattern, the output, scratch. All of it comes from TensorFlow's allocator. Which
function and tile a launch takes is decided in `plan`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

from sparse_conv import bridge, jit, plan
from sparse_conv.bridge import Memory, Place
from sparse_conv.gather import Gather, dgrad_gather, fprop_gather
from sparse_conv.launch import Launch
from sparse_conv.pattern import Pattern, Rows
from sparse_conv.problem import Problem
from sparse_conv.streams import ordered
from sparse_conv.tensor_cache import cached

# Raw memory is asked for in elements of a dtype that TensorFlow keeps on the GPU: its
# int32 tensors live in host memory.
_CELL = tf.float32


@functools.cache
def unavailable() -> str | None:
    """Why no GPU can be used on this machine; None if one can."""
    if importlib.util.find_spec("cupy") is None:
        return (
            "CuPy is not installed; `pip install 'sparse_conv[cuda12]'` (or cuda13) "
            "brings it"
        )
    import cupy

    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CUDA finds no GPU ({error})"
    if not tf.config.list_physical_devices("GPU"):
        return "TensorFlow finds no GPU"
    return None


def reason_against(place: Place, dtype: tf.DType, forced: bool) -> str | None:
    """Why this back end doesn't compute for tensors at `place`; None if it does."""
    del forced
    reason = unavailable()
    if reason is None and place.kind != "GPU":
        reason = (
            "TensorFlow keeps int32 tensors in host memory"
            if dtype == tf.int32
            else "the tensors live in host memory"
        )
    return reason


def caches() -> list[Path]:
    """Where CuPy keeps compiled functions."""
    default = Path.home() / ".cupy" / "kernel_cache"
    return [Path(os.environ.get("CUPY_CACHE_DIR") or default)]


@dataclass(frozen=True, eq=False, slots=True)
class _Prepared:
    """What calls of one shape share: a launch, and its operands that don't change.

    Attributes:
        launch: The launch.
        ordinal: CUDA's number of the GPU.
        fixed: Memory that every call reads: rows and origins.
    """

    launch: Launch
    ordinal: int
    fixed: Mapping[str, Memory]


def fprop(
    problem: Problem,
    x: tf.Tensor,
    w: tf.Tensor,
    pattern: Pattern | None,
    bias: tf.Tensor | None,
    activation: int,
    shape: tuple[int, ...],
) -> tf.Tensor:
    """The forward pass."""
    key = ("fprop", problem, x.dtype, activation, bias is not None, bridge.place_of(x))
    prepared = _derived(w, pattern, key, _prepare_fprop)
    return _gather(prepared, x, w, bias, shape)


def dgrad(
    problem: Problem,
    dy: tf.Tensor,
    w: tf.Tensor,
    pattern: Pattern | None,
    shape: tuple[int, ...],
) -> tf.Tensor:
    """The gradient to the input."""
    key = ("dgrad", problem, dy.dtype, bridge.place_of(dy))
    prepared = _derived(w, pattern, key, _prepare_dgrad)
    return _gather(prepared, dy, w, None, shape)


def wgrad(
    problem: Problem, x: tf.Tensor, dy: tf.Tensor, pattern: Pattern | None
) -> tf.Tensor:
    """The gradient to the values of the pattern, or to the dense kernel."""
    place = bridge.place_of(x)
    gather = fprop_gather(problem)
    nnz = _size(problem) if pattern is None else pattern.nnz
    partial, total, workspace_bytes = plan.wgrad_launches(
        gather, x.dtype.name, nnz, dense=pattern is None, device=_limits(place)
    )
    workspace = bridge.empty((-(-workspace_bytes // _CELL.size),), _CELL, place)
    dw = bridge.empty(
        problem.kernel_shape if pattern is None else (nnz,), x.dtype, place
    )
    operands = {
        "read": bridge.memory_of(x),
        "gradient": bridge.memory_of(dy),
        "origins": _origins(gather, place),
        "workspace": bridge.memory_of(workspace),
        "write": bridge.memory_of(dw),
    }
    if pattern is not None:
        operands.update(_pattern_rows(pattern, "fprop", pattern.fprop_rows, place))
    with ordered(_ordinal(place)) as stream:
        for launch in (partial, total):
            _launch(launch, operands, stream, _ordinal(place))
    return dw


def _derived(w: tf.Tensor, pattern: Pattern | None, key: tuple, prepare) -> _Prepared:
    """What `prepare` makes of `key`, kept with the pattern or the dense kernel."""
    if pattern is None:
        return cached(w, key, lambda: prepare(w, None, *key[1:]))
    return pattern.cached(key, lambda: prepare(w, pattern, *key[1:]))


def _prepare_fprop(
    w: tf.Tensor,
    pattern: Pattern | None,
    problem: Problem,
    dtype: tf.DType,
    activation: int,
    has_bias: bool,
    place: Place,
) -> _Prepared:
    gather = fprop_gather(problem)
    if pattern is None:
        rows = _compressed(w, gather, problem, place)
    else:
        rows = _pattern_rows(pattern, "fprop", pattern.fprop_rows, place)
    launch = plan.gather_launch(
        gather,
        dtype.name,
        _size(problem) if pattern is None else pattern.nnz,
        activation,
        has_bias=has_bias,
        has_order=False,
        device=_limits(place),
    )
    return _Prepared(
        launch, _ordinal(place), {**rows, "origins": _origins(gather, place)}
    )


def _prepare_dgrad(
    w: tf.Tensor,
    pattern: Pattern | None,
    problem: Problem,
    dtype: tf.DType,
    place: Place,
) -> _Prepared:
    gather = dgrad_gather(problem)
    if pattern is None:
        rows = _compressed(w, gather, problem, place)
    else:
        key = (gather.groups, gather.h.kernel_taps, gather.w.kernel_taps)
        rows = _pattern_rows(pattern, key, lambda: pattern.dgrad_rows(gather), place)
    launch = plan.gather_launch(
        gather,
        dtype.name,
        _size(problem) if pattern is None else pattern.nnz,
        has_bias=False,
        has_order=pattern is not None,
        device=_limits(place),
    )
    return _Prepared(
        launch, _ordinal(place), {**rows, "origins": _origins(gather, place)}
    )


def _gather(
    prepared: _Prepared,
    read: tf.Tensor,
    w: tf.Tensor,
    bias: tf.Tensor | None,
    shape: tuple[int, ...],
) -> tf.Tensor:
    write = bridge.empty(shape, read.dtype, bridge.place_of(read))
    # The values of a compressed dense kernel are among the fixed operands.
    operands = {
        "values": bridge.memory_of(w),
        **prepared.fixed,
        "read": bridge.memory_of(read),
        "write": bridge.memory_of(write),
    }
    if bias is not None:
        operands["bias"] = bridge.memory_of(bias)
    with ordered(prepared.ordinal) as stream:
        _launch(prepared.launch, operands, stream, prepared.ordinal)
    return write


def _launch(
    launch: Launch, operands: Mapping[str, Memory], stream: object, ordinal: int
) -> None:
    function = jit.load_function(launch.function, launch.defines, ordinal)
    addresses = {name: memory.address for name, memory in operands.items()}
    arguments = np.frombuffer(launch.pack(addresses), np.uint8)
    arguments = arguments.view(np.dtype((np.void, len(arguments))))[0]
    function(
        launch.grid,
        launch.block,
        (arguments,),
        shared_mem=launch.shared_mem_bytes,
        stream=stream,
    )


def _size(problem: Problem) -> int:
    return problem.r * problem.s * problem.group_channels * problem.k


def _pattern_rows(
    pattern: Pattern, key: object, rows: object, place: Place
) -> Mapping[str, Memory]:
    """A pattern's rows on the GPU, uploaded once."""
    return pattern.cached(("cuda", key, place), lambda: _upload_rows(rows(), place))


def _upload_rows(rows: Rows, place: Place) -> Mapping[str, Memory]:
    arrays = {"begin": rows.begin, "end": rows.end, "indices": rows.indices}
    if rows.order is not None:
        arrays["order"] = rows.order
    together = _upload(np.concatenate(list(arrays.values())), place)
    operands, address = {}, together.address
    for name, array in arrays.items():
        operands[name] = Memory(address, together.owner)
        address += array.nbytes
    return operands


def _upload(array: np.ndarray, place: Place) -> Memory:
    """An int32 array in GPU memory, through a dtype that TensorFlow keeps there."""
    cells = np.ascontiguousarray(array, np.int32).view(_CELL.as_numpy_dtype)
    with tf.device(place.device):
        return bridge.memory_of(tf.identity(tf.constant(cells)))


@functools.lru_cache(maxsize=1024)
def _origins(gather: Gather, place: Place) -> Memory:
    return _upload(np.array(gather.h.origins + gather.w.origins), place)


@functools.lru_cache(maxsize=1024)
def _kernel_taps(gather: Gather, place: Place) -> Memory:
    taps = [np.ravel(axis.kernel_taps) for axis in (gather.h, gather.w)]
    return _upload(np.concatenate(taps), place)


def _compressed(
    w: tf.Tensor, gather: Gather, problem: Problem, place: Place
) -> Mapping[str, Memory]:
    """The rows of a dense kernel, found on the GPU without a wait of the host."""
    launch = plan.compress_launch(gather, w.dtype.name, problem.kernel_shape)
    slots = gather.rows * gather.row_length
    results = {
        "begin": bridge.empty((gather.rows,), _CELL, place),
        "end": bridge.empty((gather.rows,), _CELL, place),
        "indices": bridge.empty((slots,), _CELL, place),
        "values": bridge.empty((slots,), w.dtype, place),
    }
    rows = {name: bridge.memory_of(tensor) for name, tensor in results.items()}
    operands = {
        **rows,
        "kernel": bridge.memory_of(w),
        "taps": _kernel_taps(gather, place),
    }
    ordinal = _ordinal(place)
    with ordered(ordinal) as stream:
        _launch(launch, operands, stream, ordinal)
    return rows


@functools.cache
def _ordinal(place: Place) -> int:
    """CUDA's number of the GPU, which TensorFlow may count otherwise."""
    import cupy

    probe = bridge.memory_of(bridge.empty((1,), _CELL, place))
    return cupy.cuda.runtime.pointerGetAttributes(probe.address).device


@functools.cache
def _limits(place: Place) -> plan.DeviceLimits:
    import cupy

    attributes = cupy.cuda.Device(_ordinal(place)).attributes
    return plan.DeviceLimits(
        multiprocessors=attributes["MultiProcessorCount"],
        shared_mem_bytes=attributes["MaxSharedMemoryPerBlockOptin"],
    )
