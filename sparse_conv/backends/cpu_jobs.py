"""The words of a job: what the CPU loops and their callers have to agree on.

Knows names and their order alone. Every word is an integer: an address, or a number.
"""

from __future__ import annotations

from typing import NamedTuple

# Words at the beginning of a job that belong to the threads.
JOB_HEADER = 5
# Cells at the beginning of scratch memory: one of zeros, one that takes what belongs
# nowhere, two for where each lane's memory begins, and again one for what belongs
# nowhere, just before the planes.
HEAD_CELLS = 5


class GatherJob(NamedTuple):
    """A forward pass or an input gradient; see `cpu_loops.Entries`."""

    record: int
    outer_origins: int
    inner_origins: int
    image_rows: int
    places: int
    offsets: int
    splits: int
    lengths: int
    values: int
    read: int
    write: int
    bias: int
    activation: int


class WgradJob(NamedTuple):
    """A weight gradient; see `cpu_loops.wgrad`."""

    record: int
    outer_origins: int
    inner_origins: int
    image_rows: int
    places: int
    gradient_places: int
    offsets: int
    splits: int
    read: int
    gradient: int
    partial: int
    entries: int
    longest: int
    slots: int
