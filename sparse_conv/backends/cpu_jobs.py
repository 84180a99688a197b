"""The words of a job: what the CPU loops and their callers have to agree on.

Knows names and their order alone. Every word is an integer: an address, or a number.
"""

from __future__ import annotations

from typing import NamedTuple

# Words at the beginning of a job that belong to the threads.
JOB_HEADER = 5
# Cells at the beginning of scratch memory: one of zeros, one that takes what belongs
# nowhere, two for where each lane's memory begins, two more for another row's, and
# again one for what belongs nowhere, just before the planes.
HEAD_CELLS = 7
# Bytes of a block of lanes: the least that x86 and ARM shuffle without crossing into
# other parts of a vector. A tile is written in as many parts as a vector has blocks,
# and generated code is called as often.
BLOCK_BYTES = 16


class GatherJob(NamedTuple):
    """A forward pass or an input gradient; see `cpu_loops.Entries`.

    `codes` is 0 where no code was generated; see `cpu_baked.Code`.
    """

    record: int
    outer_origins: int
    inner_origins: int
    image_rows: int
    places: int
    offsets: int
    splits: int
    lengths: int
    values: int
    codes: int
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
