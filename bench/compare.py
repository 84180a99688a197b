"""Times of a row set against each other, both taken by one method.

Knows the entries of a row. Measures nothing and draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

KINDS = ("device_us", "call_us")


def median_us(row: dict[str, Any], side: str, kind: str) -> float | None:
    """A contender's median time; None if it has none of that kind."""
    times = row["sides"].get(side, {}).get(kind)
    return None if times is None else times["median"]


def kind_of(rows: Iterable[dict[str, Any]]) -> str:
    """The kind of time that ratios are made of: the device's where it was measured."""
    on_gpu = any(
        "device_us" in entry for row in rows for entry in row["sides"].values()
    )
    return "device_us" if on_gpu else "call_us"


def ratio(row: dict[str, Any], side: str, kind: str) -> float | None:
    """How many times as long a contender takes as ours; None if either has no time."""
    theirs, ours = median_us(row, side, kind), median_us(row, "ours", kind)
    return None if theirs is None or ours is None else theirs / ours


def ratio_spread(row: dict[str, Any], side: str, kind: str) -> tuple[float, float]:
    """The ratio with the quartiles at their least and at their most favourable."""
    theirs, ours = row["sides"][side][kind], row["sides"]["ours"][kind]
    return theirs["q1"] / ours["q3"], theirs["q3"] / ours["q1"]


def floor_us(row: dict[str, Any], machine: dict[str, Any]) -> float:
    """The time that the device needs at least.

    To move the bytes, or to do the FMAs that are not with zeros, whichever is longer.
    """
    bytes_s = row["io_bytes"] / machine["bandwidth_bytes_per_s"]
    fmas_s = row["useful_fmas"] / machine["peak_fmas_per_s"]
    return max(bytes_s, fmas_s) * 1e6


def floor_fraction(
    row: dict[str, Any], kind: str, machine: dict[str, Any]
) -> float | None:
    """The part of our time that the device needs at least; None without such a floor.

    TensorFlow's convolution visits the zeros, and may do so in tensor cores: the floor
    of our own algorithms is none for it.
    """
    ours = median_us(row, "ours", kind)
    dense = "dense" in row["sides"].get("ours", {}).get("algorithm", "")
    return None if ours is None or dense else floor_us(row, machine) / ours


def geometric_mean(numbers: Iterable[float | None]) -> float | None:
    """The geometric mean of those that are there; None if none is."""
    logs = [math.log(number) for number in numbers if number is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None
