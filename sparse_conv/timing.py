"""How long calls take until TensorFlow and our own launches are done.

Knows the clock and how to wait. Knows nothing of what is called.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sparse_conv.streams import wait_for_devices


def seconds_per_call(call: Callable[[], Any], count: int) -> float:
    """Seconds of one call out of `count` in a row.

    Args:
        call: What to time. On a GPU it may return before its work is done.
        count: How many calls follow each other before the devices are waited for, which
            has a cost of its own.

    Returns:
        The mean.
    """
    wait_for_devices()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    wait_for_devices()
    return (time.perf_counter() - begin) / count
