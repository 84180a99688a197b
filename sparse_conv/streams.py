"""The order between our launches and TensorFlow's work on the same GPU.

TensorFlow does not tell its streams. Events of a whole context order them all without
stopping the host: what is enqueued before `ordered` is done before our launches start,
and what comes after it waits for them. Drivers before CUDA 12.5 have no such events;
there the host waits. Knows CuPy and how to launch; knows nothing of convolutions.

Who takes times has to wait for both: TensorFlow's `sync_devices` returns while our
launches still run.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import tensorflow as tf

from sparse_conv import jit
from sparse_conv.bridge import Memory
from sparse_conv.launch import Launch

_STREAM_WAIT_DEFAULT = 0


class DriverError(RuntimeError):
    """A call of the CUDA driver failed."""


class _Driver:
    """The few calls of the CUDA driver that CuPy does not offer."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        pointer = ctypes.c_void_p
        self.current_context = self._function("cuCtxGetCurrent", pointer)
        self.stream_wait = self._function(
            "cuStreamWaitEvent", pointer, pointer, ctypes.c_uint
        )
        self.record = self._function("cuEventRecord", pointer, pointer)
        self.synchronize = self._function("cuCtxSynchronize")
        self.has_context_events = hasattr(self._library, "cuCtxRecordEvent")
        if self.has_context_events:
            self.context_record = self._function("cuCtxRecordEvent", pointer, pointer)
            self.context_wait = self._function("cuCtxWaitEvent", pointer, pointer)

    def _function(self, name: str, *argtypes: Any) -> Any:
        function = getattr(self._library, name)
        function.argtypes = argtypes
        function.restype = ctypes.c_int
        return function


@functools.cache
def _driver() -> _Driver:
    return _Driver()


@functools.cache
def _runtime() -> ModuleType:
    from cupy.cuda import runtime

    return runtime


def has_context_events() -> bool:
    """Whether launches are ordered without a wait of the host (CUDA 12.5 or newer)."""
    return _driver().has_context_events


def _check(status: int, call: str) -> None:
    if status:
        raise DriverError(f"{call} failed. Received: CUresult {status}")


_pack_address = struct.Struct("<Q").pack_into


class Step:
    """A launch with what all its uses share: the function and the fixed operands."""

    def __init__(
        self,
        launch: Launch,
        ordinal: int,
        fixed: Mapping[str, Memory],
        function: Any = None,
    ):
        """Loads the function, compiling it if need be.

        Args:
            launch: The launch.
            ordinal: CUDA's number of the GPU.
            fixed: The memory of operands that are the same at each use.
            function: The launch's function, if it is loaded already.
        """
        if function is None:
            function = jit.load_function(launch.function, launch.defines, ordinal)
        self._function = function
        self._launch = launch
        # Holds on to the memory as well as to its addresses.
        self._fixed = fixed
        addresses = {name: memory.address for name, memory in fixed.items()}
        self._template = launch.pack(addresses)
        self._struct = np.dtype((np.void, len(self._template)))
        self._slots = {name: 8 * i for i, name in enumerate(launch.pointers)}

    def run(self, operands: Mapping[str, Memory], stream: Any) -> None:
        """Enqueues the launch on a CuPy stream.

        Args:
            operands: The memory of the other operands.
            stream: The stream.
        """
        arguments = bytearray(self._template)
        for name, memory in operands.items():
            if name in self._slots:
                _pack_address(arguments, self._slots[name], memory.address)
        launch = self._launch
        self._function(
            launch.grid,
            launch.block,
            (np.frombuffer(arguments, self._struct)[0],),
            shared_mem=launch.shared_mem_bytes,
            stream=stream,
        )


class _Lane:
    """One thread's stream on one GPU, with the events that order it."""

    def __init__(self) -> None:
        import cupy

        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._before = cupy.cuda.Event(block=False, disable_timing=True)
        self._after = cupy.cuda.Event(block=False, disable_timing=True)
        context = ctypes.c_void_p()
        _check(_driver().current_context(ctypes.byref(context)), "cuCtxGetCurrent")
        self._context = context.value

    def launch(self, step: Step, operands: Mapping[str, Memory]) -> None:
        """Enqueues a launch on the stream."""
        step.run(operands, self.stream)

    def enter(self) -> None:
        """Makes the stream wait for all work in the context so far."""
        driver = _driver()
        if not driver.has_context_events:
            _check(driver.synchronize(), "cuCtxSynchronize")
            return
        before = self._before.ptr
        _check(driver.context_record(self._context, before), "cuCtxRecordEvent")
        wait = driver.stream_wait(self.stream.ptr, before, _STREAM_WAIT_DEFAULT)
        _check(wait, "cuStreamWaitEvent")

    def leave(self) -> None:
        """Makes all later work in the context wait for the stream."""
        driver = _driver()
        if not driver.has_context_events:
            self.stream.synchronize()
            return
        after = self._after.ptr
        _check(driver.record(after, self.stream.ptr), "cuEventRecord")
        _check(driver.context_wait(self._context, after), "cuCtxWaitEvent")


_lanes = threading.local()
# CUDA's numbers of the GPUs on which there are lanes.
_ordinals: set[int] = set()


def _lane(ordinal: int) -> _Lane:
    lanes = _lanes.__dict__
    if ordinal not in lanes:
        lanes[ordinal] = _Lane()
        _ordinals.add(ordinal)
    return lanes[ordinal]


def wait_for_devices() -> None:
    """Waits for all that TensorFlow and our launches do."""
    tf.test.experimental.sync_devices()
    if not _ordinals:
        return
    import cupy

    for ordinal in tuple(_ordinals):
        cupy.cuda.Device(ordinal).synchronize()


class ordered:
    """A context in which launches on a GPU are ordered with TensorFlow's work there.

    Gives the calling thread's lane, whose `launch` takes a Step; that GPU is current
    inside. The memory of the operands has to live until the context is left.
    """

    __slots__ = ("_lane", "_ordinal", "_previous")

    def __init__(self, ordinal: int):
        """Names the GPU by CUDA's number."""
        self._ordinal = ordinal

    def __enter__(self) -> _Lane:
        """Makes the GPU current and its lane wait for the work so far.

        Raises:
            DriverError: The driver refused to order the streams.
        """
        self._previous = _runtime().getDevice()
        if self._previous != self._ordinal:
            _runtime().setDevice(self._ordinal)
        try:
            self._lane = _lane(self._ordinal)
            self._lane.enter()
        except BaseException:
            self._restore_device()
            raise
        return self._lane

    def __exit__(self, *_: object) -> None:
        """Makes later work wait for the launches, even if one of them failed."""
        try:
            self._lane.leave()
        finally:
            self._restore_device()

    def _restore_device(self) -> None:
        if self._previous != self._ordinal:
            _runtime().setDevice(self._previous)
