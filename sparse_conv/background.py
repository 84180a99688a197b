"""Jobs that threads do in the background: Workers.

The threads are daemons: what is still to be done when the process ends is not done.
Knows nothing of what the jobs are.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Workers:
    """A few threads, started when there is work for them."""

    def __init__(self, count: int, name: str):
        """Starts none yet.

        Args:
            count: The most threads.
            name: Name of the threads.
        """
        self._count = count
        self._name = name
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = 0
        self._lock = threading.Lock()

    def submit(self, job: Callable[[], Any]) -> Future:
        """Has a thread do a job.

        Args:
            job: What to do.

        Returns:
            The future of what it returns or raises.
        """
        future: Future = Future()
        self._jobs.put((job, future))
        with self._lock:
            if self._threads < self._count:
                self._threads += 1
                threading.Thread(
                    target=self._work, name=self._name, daemon=True
                ).start()
        return future

    def _work(self) -> None:
        while True:
            job, future = self._jobs.get()
            try:
                result = job()
            # Whatever it is belongs to those who wait for the future.
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            # Until the next job comes, nothing of this one is held.
            del job, future
