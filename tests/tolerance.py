"""How far a result may lie from the float64 reference, by dtype.

The bound is the textbook one for a sum of `terms` rounded products in any order, with a
factor for a fused multiplication or its absence. It knows no problem in particular, so
there is nothing to tune until a test passes.
"""

from __future__ import annotations

import numpy as np

# Half the distance from 1 to the next number: the error of one rounding.
UNIT_ROUNDOFF = {
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float32": 2.0**-24,
    "float64": 2.0**-53,
}

# What half and bfloat16 are summed in.
_ACCUMULATOR = {
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
}

# Rounding is absolute, not relative, below the smallest normal number.
_SMALLEST_STEP = {
    "float16": 2.0**-24,
    "bfloat16": 2.0**-133,
    "float32": 2.0**-149,
    "float64": 2.0**-1074,
}

# The reference sums in float64, which is seen beside float64 results.
_REFERENCE_ROUNDOFF = 2.0**-53


def error_bound(
    dtype: str, result: np.ndarray, magnitude: np.ndarray, terms: int
) -> np.ndarray:
    """The largest error that the arithmetic of `dtype` explains.

    Args:
        dtype: Name of the dtype of operands and result.
        result: The float64 reference.
        magnitude: The same sum over the absolute values of its operands.
        terms: The largest number of products that one result sums.

    Returns:
        The bound, of the shape of `result`.
    """
    storage = UNIT_ROUNDOFF[dtype]
    accumulation = UNIT_ROUNDOFF[_ACCUMULATOR[dtype]]
    return (
        1.01 * storage * np.abs(result)
        + 2 * (terms + 4) * (accumulation + _REFERENCE_ROUNDOFF) * magnitude
        + _SMALLEST_STEP[dtype]
    )


def assert_within(
    actual: np.ndarray, expected: np.ndarray, bound: np.ndarray, what: str
) -> None:
    """Fails, naming the worst place, unless |actual - expected| <= bound everywhere."""
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == expected.shape, (
        f"{what}: shape {actual.shape}, expected {expected.shape}"
    )
    if actual.size == 0:
        return
    # Written so that a NaN fails.
    failed = ~(np.abs(actual - expected) <= bound)
    if not failed.any():
        return
    excess = np.where(failed, np.abs(actual - expected) / bound, 0)
    place = np.unravel_index(np.nanargmax(excess), actual.shape)
    place = place if not np.isnan(actual).any() else tuple(np.argwhere(failed)[0])
    raise AssertionError(
        f"{what}: {failed.sum()} of {actual.size} wrong, first or worst at "
        f"{tuple(int(i) for i in place)}: {actual[place]!r}, "
        f"expected {expected[place]!r} within {bound[place]!r}"
    )


def assert_exact(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Fails unless `actual` is `expected` rounded once to the dtype of `actual`."""
    actual = np.asarray(actual)
    np.testing.assert_array_equal(
        actual.astype(np.float64),
        np.asarray(expected, np.float64).astype(actual.dtype).astype(np.float64),
        err_msg=what,
    )
