"""A launch of a GPU function, described without a GPU: Launch, and how it is packed.

Knows the layout of the structs that the functions in `kernels/` receive, and nothing of
how a configuration is chosen (see `plan`) or compiled (see `jit`).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparse_conv.gather import Axis, Gather

WARP = 32
# The largest extent of a grid in x.
GRID_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of one GPU function.

    Attributes:
        function: Name of the function and of its file, `kernels/<function>.cu`.
        defines: Compile-time macros as (name, value).
        grid: Blocks in x, y and z. Zero in x means that there is nothing to do.
        block: Threads of a block in x, y and z.
        shared_mem_bytes: Dynamic shared memory of a block.
        pointers: Names of the pointers, in the order of the argument struct.
        constants: The rest of the argument struct, packed.
        code: Generated text, which takes the place of the function's own
            `baked_code.cuh`.
        cluster: Blocks of a cluster; it is compiled in.
    """

    function: str
    defines: tuple[tuple[str, str], ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_mem_bytes: int
    pointers: tuple[str, ...]
    constants: bytes
    code: str = ""
    cluster: int = 1

    def pack(self, addresses: Mapping[str, int]) -> bytes:
        """The whole argument struct.

        Args:
            addresses: Address of each array by its pointer's name; a pointer that is
                missing here is null.

        Returns:
            The bytes of the struct, pointers first.
        """
        places = [addresses.get(name, 0) for name in self.pointers]
        return struct.pack(f"<{len(places)}Q", *places) + self.constants


def pack_words(longs: Sequence[int], words: Sequence[int]) -> bytes:
    """64-bit members, then 32-bit members, padded to a multiple of 8 bytes.

    Args:
        longs: Signed numbers.
        words: Signed or unsigned numbers.
    """
    padding = [0] * (len(words) % 2)
    bits = [word & 0xFFFFFFFF for word in (*words, *padding)]
    return struct.pack(f"<{len(longs)}q{len(bits)}I", *longs, *bits)


def divisor_words(divisor: int) -> tuple[int, int, int]:
    """The struct Divisor: magic, shift and the divisor itself."""
    shift = 31 + (divisor - 1).bit_length()
    return (-(-(1 << shift) // divisor), shift, divisor)


def geometry_longs(gather: Gather) -> tuple[int, ...]:
    """The 64-bit members of the struct Geometry."""
    return (*read_pitch(gather), *write_pitch(gather))


def read_pitch(gather: Gather) -> tuple[int, int, int, int]:
    """The struct Pitch of what is read: from one image, row, ... to the next."""
    return _pitch(gather, gather.h.inputs, gather.w.inputs, gather.in_channels)


def write_pitch(gather: Gather) -> tuple[int, int, int, int]:
    """The struct Pitch of what is written."""
    return _pitch(gather, gather.h.outputs, gather.w.outputs, gather.out_channels)


def geometry_words(gather: Gather) -> tuple[int, ...]:
    """The 32-bit members of the struct Geometry."""
    return (
        gather.in_channels // gather.groups,
        gather.out_channels // gather.groups,
        gather.out_channels,
        int(gather.data_format == "NHWC"),
        *_axis_words(gather.h),
        *_axis_words(gather.w),
        *divisor_words(gather.h.taps),
        *divisor_words(gather.w.taps),
    )


def _pitch(
    gather: Gather, height: int, width: int, channels: int
) -> tuple[int, int, int, int]:
    if gather.data_format == "NHWC":
        return (height * width * channels, width * channels, channels, 1)
    return (height * width * channels, width, 1, height * width)


def _axis_words(axis: Axis) -> tuple[int, ...]:
    return (
        axis.inputs,
        axis.outputs,
        axis.phases,
        len(axis.origins),
        axis.row_sets,
        axis.step,
        axis.stride,
        axis.taps,
        *divisor_words(axis.phases),
        *divisor_words(axis.step),
    )
