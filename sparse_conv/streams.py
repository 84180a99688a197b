"""The order between our launches and TensorFlow's work on the same GPU.

TensorFlow does not tell its streams. Events of a whole context order them all without
stopping the host: what is enqueued before `ordered` is done before our launches start,
and what comes after it waits for them. Drivers before CUDA 12.5 have no such events;
there the host waits. Knows CuPy; knows nothing of tensors or convolutions.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator
from typing import Any

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


def has_context_events() -> bool:
    """Whether launches are ordered without a wait of the host (CUDA 12.5 or newer)."""
    return _driver().has_context_events


def _check(status: int, call: str) -> None:
    if status:
        raise DriverError(f"{call} failed. Received: CUresult {status}")


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


def _lane(ordinal: int) -> _Lane:
    lanes = _lanes.__dict__
    if ordinal not in lanes:
        lanes[ordinal] = _Lane()
    return lanes[ordinal]


@contextlib.contextmanager
def ordered(ordinal: int) -> Iterator[Any]:
    """Gives a CuPy stream on GPU `ordinal`, ordered with TensorFlow's work around it.

    Args:
        ordinal: CUDA's number of the GPU.

    Yields:
        The calling thread's stream there, with that GPU current.

    Raises:
        DriverError: The driver refused to order the streams.
    """
    import cupy

    previous = cupy.cuda.runtime.getDevice()
    if previous != ordinal:
        cupy.cuda.runtime.setDevice(ordinal)
    try:
        lane = _lane(ordinal)
        lane.enter()
        try:
            yield lane.stream
        finally:
            lane.leave()
    finally:
        if previous != ordinal:
            cupy.cuda.runtime.setDevice(previous)
