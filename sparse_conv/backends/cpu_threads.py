"""Threads that work on numbered tasks of compiled code, without Python's lock.

Knows how many threads to use and how to share tasks among them. Does not know what the
tasks compute. The threads wait, work and wake each other in `cpu_threads.ll`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparse_conv.backends import cpu_code

# For how long a helper waits for the next job before it sleeps, and a caller for its
# helpers. To wake a thread takes 30 us (AMD EPYC) to 45 us (Xeon), and Python takes 85
# to 115 us between two calls (Xeon), because its code has left the near caches.
HELPER_WAIT_S = 120e-6
CALLER_WAIT_S = 200e-6
# Rounds of waiting that are timed. One takes 10 ns (Xeon) to 20 ns (AMD EPYC).
_TIMED_ROUNDS = 500

# By machine: an instruction for loops that wait, and the number of the system call.
_MACHINES = {
    "x86_64": ("llvm.x86.sse2.pause()", "declare void @llvm.x86.sse2.pause()", 202),
    "aarch64": (
        "llvm.aarch64.hint(i32 1)", "declare void @llvm.aarch64.hint(i32)", 98
    ),
}  # fmt: skip
# The state of a slot, and what fills a cache line.
_SLOT_WORDS = 8
_JOB_WORDS = 5


class _Functions(NamedTuple):
    """The functions of `cpu_threads.ll`."""

    run: Any
    help: Any
    rest: Any
    release: int


class _State:
    """The helpers of this process, made when first needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.helpers = 0
        self.slots: Any = None
        self.slots_address = 0
        self.limit: int | None = None


_state = _State()
# Helpers go on reading their slots for as long as the process lives.
_all_slots: list[Any] = []


def _forget_helpers() -> None:
    """In a forked child the parent's threads are gone, and its lock may be held."""
    limit = _state.limit
    _state.__init__()
    _state.limit = limit


def after_fork(action: Callable[[], None]) -> None:
    """Has `action` called in every child that this process forks."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=action)


after_fork(_forget_helpers)


@functools.cache
def functions() -> _Functions:
    """The compiled part.

    Raises:
        NotImplementedError: The processor is of a kind that nobody tried.
    """
    machine = platform.machine()
    if machine not in _MACHINES:
        raise NotImplementedError(
            "The CPU back end knows the processors "
            f"{' and '.join(_MACHINES)}. Received: {machine}"
        )
    pause, declaration, futex = _MACHINES[machine]
    text = Path(__file__).with_suffix(".ll").read_text()
    text = text.replace("PAUSE_DECLARATION", declaration)
    text = text.replace("PAUSE", f"call void @{pause}")
    text = text.replace("FUTEX,", f"{futex},")
    addresses = cpu_code.assembled(text, _Functions._fields)
    word = ctypes.c_int64
    return _Functions(
        ctypes.CFUNCTYPE(None, word, word, word, word)(addresses["run"]),
        ctypes.CFUNCTYPE(None, word, word)(addresses["help"]),
        ctypes.CFUNCTYPE(None, word)(addresses["rest"]),
        addresses["release"],
    )


@functools.cache
def _rounds(seconds: float) -> int:
    """Rounds of waiting that take so long on this processor."""
    rest, times = functions().rest, []
    # What interrupts the process makes some of them longer.
    for _ in range(5):
        start = time.perf_counter()
        rest(_TIMED_ROUNDS)
        times.append(time.perf_counter() - start)
    return max(1, round(seconds / min(times) * _TIMED_ROUNDS))


def set_thread_limit(limit: int | None) -> None:
    """Sets how many threads a call uses; None for what else decides.

    Args:
        limit: The number of threads, the calling one included.

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1. Received: limit={limit!r}")
    _state.limit = limit


def thread_count(wanted: int = 0) -> int:
    """The threads that a call uses.

    In this order: what `set_thread_limit` set; `wanted`; the environment variable
    OMP_NUM_THREADS; one for each core that this process may use. The second and the
    third never exceed the fourth.

    Args:
        wanted: A number that the caller was told to use; 0 without one.
    """
    if _state.limit is not None:
        return _state.limit
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    wanted = wanted or _environment_threads()
    return min(wanted, cores) if wanted else cores


@functools.cache
def _environment_threads() -> int:
    """OMP_NUM_THREADS, of which there may be one for each level; 0 without it."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(text) if text.isdigit() else 0


def make_job(function: int, arguments: Sequence[int]) -> Any:
    """The tasks of a function with its arguments, to be copied and run.

    Args:
        function: Address of a function of `cpu_code`.
        arguments: What it finds in the words of the job.

    Returns:
        An array of words. Its first ones are this module's own.
    """
    words = [function, 0, 0, 0, 0, *arguments]
    return (ctypes.c_int64 * len(words))(*words)


def run(job: Any, count: int, scratch: int, scratch_bytes: int, threads: int) -> None:
    """Runs tasks 0 to `count - 1` of a job, in any order, and waits for all of them.

    The calling thread works too, so that a call never waits for helpers that other
    calls keep busy.

    Args:
        job: From `make_job`; overwritten.
        count: The number of tasks.
        scratch: Address of scratch memory: `scratch_bytes` for each thread.
        scratch_bytes: See there.
        threads: The most threads to use.
    """
    job[1:_JOB_WORDS] = 0, count, scratch, scratch_bytes
    helpers = min(count, threads) - 1
    if helpers > 0:
        slots, rounds = _slots(helpers), _rounds(CALLER_WAIT_S)
        functions().run(ctypes.addressof(job), slots, helpers, rounds)
    else:
        functions().run(ctypes.addressof(job), 0, 0, 0)


def _slots(helpers: int) -> int:
    """Address of the slots of at least so many helpers."""
    if _state.helpers >= helpers:
        return _state.slots_address
    with _state.lock:
        if _state.helpers < helpers:
            _start_helpers(helpers)
        return _state.slots_address


def _start_helpers(count: int) -> None:
    """Starts new helpers; those that there were sleep from now on."""
    memory = (ctypes.c_int64 * (_SLOT_WORDS * (count + 1)))()
    _all_slots.append(memory)
    size, rounds = 8 * _SLOT_WORDS, _rounds(HELPER_WAIT_S)
    address = -(-ctypes.addressof(memory) // size) * size
    for i in range(count):
        threading.Thread(
            target=functions().help,
            args=(address + i * size, rounds),
            name=f"sparse_conv_{i}",
            daemon=True,
        ).start()
    _state.slots = memory
    _state.slots_address = address
    _state.helpers = count
