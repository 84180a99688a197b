"""A small pool of threads for loops that release the interpreter's lock.

Knows how many cores this process may use and how to share numbered tasks among
threads. Does not know what the tasks compute.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor


class _State:
    """The pool of this process, made when first needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pool: ThreadPoolExecutor | None = None
        self.pool_size = 0
        self.limit: int | None = None


_state = _State()


def _forget_pool() -> None:
    """In a forked child the parent's threads are gone, and its lock may be held."""
    limit = _state.limit
    _state.__init__()
    _state.limit = limit


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def set_thread_limit(limit: int | None) -> None:
    """Sets how many threads a call may use; None means one for each usable core.

    Args:
        limit: The number of threads, the calling one included.

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1. Received: limit={limit!r}")
    _state.limit = limit


def thread_count() -> int:
    """The threads that a call uses: the limit if one is set, else the usable cores."""
    if _state.limit is not None:
        return _state.limit
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(task: Callable[[int], object], count: int, threads: int | None = None) -> None:
    """Calls `task(0)` to `task(count - 1)`, in any order, and waits for all of them.

    The calling thread works too, so that a call never waits for a pool that other
    calls keep busy. A single task runs without the pool.

    Args:
        task: The function to call. It runs in several threads at once.
        count: The number of tasks.
        threads: The most threads to use; `thread_count()` without it.

    Raises:
        Exception: What a task raised; the tasks that had not begun are left out.
    """
    threads = min(count, thread_count() if threads is None else threads)
    numbers = iter(range(count))
    if threads <= 1:
        _work(task, numbers)
        return
    # `next` on an itertools object is atomic under the interpreter's lock.
    numbers = itertools.islice(itertools.count(), count)
    helpers = _submit(task, numbers, threads - 1)
    try:
        _work(task, numbers)
    finally:
        _drain(numbers)
        # A helper that has not begun would find nothing to do.
        started = [helper for helper in helpers if not helper.cancel()]
        errors = [helper.exception() for helper in started]
    for error in errors:
        if error is not None:
            raise error


def _submit(
    task: Callable[[int], object], numbers: Iterator[int], helpers: int
) -> list[Future[None]]:
    with _state.lock:
        if _state.pool is None or _state.pool_size < helpers:
            if _state.pool is not None:
                _state.pool.shutdown(wait=False)
            _state.pool = ThreadPoolExecutor(helpers, thread_name_prefix="sparse_conv")
            _state.pool_size = helpers
        return [_state.pool.submit(_help, task, numbers) for _ in range(helpers)]


def _help(task: Callable[[int], object], numbers: Iterator[int]) -> None:
    try:
        _work(task, numbers)
    except BaseException:
        _drain(numbers)
        raise


def _work(task: Callable[[int], object], numbers: Iterator[int]) -> None:
    for number in numbers:
        task(number)


def _drain(numbers: Iterator[int]) -> None:
    for _ in numbers:
        pass
