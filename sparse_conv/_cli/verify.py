"""How far results are from the exact ones, and how long they take.

Knows the definition of a convolution with stride 1 and padding SAME, in float64.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sparse_conv.timing import seconds_per_call


def relative_errors(
    results: Sequence[np.ndarray], x: np.ndarray, kernel: np.ndarray
) -> list[float]:
    """The largest error of each result, relative to the largest exact output.

    Args:
        results: (H, W, K) arrays, each a convolution of `x` with `kernel`.
        x: (H, W, C) array.
        kernel: (R, S, C, K) array.

    Returns:
        One number for each result; NaN where it has one.
    """
    worst = np.zeros(len(results))
    largest = 0.0
    for k, exact in enumerate(_exact_maps(x, kernel)):
        largest = max(largest, np.abs(exact).max())
        errors = [np.abs(result[..., k] - exact).max() for result in results]
        # Unlike Python's, this maximum keeps a NaN.
        worst = np.maximum(worst, errors)
    return (worst / largest if largest else worst).tolist()


def _exact_maps(x: np.ndarray, kernel: np.ndarray) -> Iterator[np.ndarray]:
    """Each output channel in float64, whose rounding is far below float32's."""
    height, width, _ = x.shape
    r, s, _, outputs = kernel.shape
    pads = [(size - 1) // 2 for size in (r, s)]
    padded = np.pad(
        x.astype(np.float64),
        [(pads[0], r - 1 - pads[0]), (pads[1], s - 1 - pads[1]), (0, 0)],
    )
    planes = np.ascontiguousarray(padded.transpose(2, 0, 1))
    for k in range(outputs):
        exact = np.zeros((height, width))
        for i, j, c in np.argwhere(kernel[..., k]):
            window = planes[c, i : i + height, j : j + width]
            exact += np.float64(kernel[i, j, c, k]) * window
        yield exact


def median_time_ms(call: Callable[[], object], calls: int) -> float:
    """The median time of one call, in milliseconds.

    Args:
        call: What to time.
        calls: How many calls follow each other before the devices are waited for.

    Returns:
        The median of several such groups of calls, after a warm-up.
    """
    times = [seconds_per_call(call, calls) for _ in range(13)]
    return 1e3 * statistics.median(times[2:])
