"""The forward pass and the input gradient of a convolution as one shape of loop.

Both sum, for every output, over the nonzeros of one sparse row: fprop reads the input,
dgrad reads the output's gradient through the transposed kernel. A Gather says where
each of them reads, for any stride, dilation and padding, so that a back end needs one
routine for both. Knows neither TensorFlow nor any back end.

Along one spatial axis, outputs are split into `phases`: output `phase + phases * i`
reads the inputs `origins[phase] + step * (i * stride + t)` for the taps `t`. In units
of `step` a phase is therefore a plain, undilated convolution with stride `stride`,
whatever stride and dilation the convolution has:

    fprop: dilation d, stride s, g = gcd(s, d): d/g phases that read every d-th input;
    dgrad: lcm(s, d) phases that read every (d/g)-th gradient, stride 1. Each phase
        meets only the taps that are congruent to it, so no work is lost on zeros.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from sparse_conv.problem import Problem


@dataclass(frozen=True, slots=True)
class Axis:
    """One spatial axis of a Gather; see the module's docstring.

    Attributes:
        inputs: Extent of what is read. Reads outside of it give 0.
        outputs: Extent of what is written.
        phases: Distance between two outputs of the same phase.
        step: Distance between two inputs that one phase reads.
        stride: Distance, in steps, between the reads of two outputs of a phase.
        taps: Extent of the kernel in steps.
        origins: For each phase that has outputs, the input that output `phase` reads at
            tap 0. May be negative. Its length is the number of phases to visit.
        kernel_taps: For each set of rows and each tap `t`, the row (or column) of the
            dense kernel that it reads, or -1 where there is none. The rows of phase `f`
            are those of set `f % len(kernel_taps)`.
    """

    inputs: int
    outputs: int
    phases: int
    step: int
    stride: int
    taps: int
    origins: tuple[int, ...]
    kernel_taps: tuple[tuple[int, ...], ...]

    @property
    def row_sets(self) -> int:
        """How many sets of sparse rows the phases of this axis choose from."""
        return len(self.kernel_taps)


@dataclass(frozen=True, slots=True)
class Gather:
    """A sum over sparse rows, for every output; see the module's docstring.

    Row `((set_h * row_sets_w) + set_w) * out_channels + out_channel` holds the
    nonzeros of one output channel for one choice of row sets. An entry's index is
    `(channel * h.taps + tap_h) * w.taps + tap_w`, where `channel` counts from the first
    input channel of the output channel's group; indices ascend within a row.

    Attributes:
        n: Batch size.
        in_channels: Channels of what is read, all groups together.
        out_channels: Channels of what is written, all groups together.
        groups: Number of channel groups.
        h: The vertical axis. `w` is the horizontal one.
        data_format: "NHWC" or "NCHW", of both what is read and what is written.
    """

    n: int
    in_channels: int
    out_channels: int
    groups: int
    h: Axis
    w: Axis
    data_format: str

    @property
    def rows(self) -> int:
        """Number of sparse rows."""
        return self.h.row_sets * self.w.row_sets * self.out_channels

    @property
    def row_length(self) -> int:
        """Entries that a full row has; indices lie below it."""
        return self.in_channels // self.groups * self.h.taps * self.w.taps

    def __str__(self) -> str:
        """A short name that reads well as a test id."""
        h, w = self.h, self.w
        return (
            f"n{self.n}_in{h.inputs}x{w.inputs}x{self.in_channels}"
            f"_out{h.outputs}x{w.outputs}x{self.out_channels}_taps{h.taps}x{w.taps}"
            f"_g{self.groups}_phases{h.phases}x{w.phases}_step{h.step}x{w.step}"
            f"_stride{h.stride}x{w.stride}_{self.data_format.lower()}"
        )


@functools.lru_cache(maxsize=4096)
def fprop_gather(problem: Problem) -> Gather:
    """The forward pass: reads the input, writes the output; one row per output."""
    p = problem
    return Gather(
        p.n, p.c, p.k, p.groups,
        _fprop_axis(p.h, p.p, p.r, p.stride_h, p.dilation_h, p.pad_top),
        _fprop_axis(p.w, p.q, p.s, p.stride_w, p.dilation_w, p.pad_left),
        p.data_format,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def dgrad_gather(problem: Problem) -> Gather:
    """The input gradient: reads the output's gradient, writes the input's."""
    p = problem
    return Gather(
        p.n, p.k, p.c, p.groups,
        _dgrad_axis(p.h, p.p, p.r, p.stride_h, p.dilation_h, p.pad_top),
        _dgrad_axis(p.w, p.q, p.s, p.stride_w, p.dilation_w, p.pad_left),
        p.data_format,
    )  # fmt: skip


def _fprop_axis(
    inputs: int, outputs: int, taps: int, stride: int, dilation: int, pad: int
) -> Axis:
    if taps == 1:
        # One tap has no dilation; this one makes the reads of a phase contiguous.
        dilation = stride
    common = math.gcd(stride, dilation)
    phases = dilation // common
    return Axis(
        inputs=inputs,
        outputs=outputs,
        phases=phases,
        step=dilation,
        stride=stride // common,
        taps=taps,
        origins=tuple(
            stride * phase - pad for phase in range(max(1, min(phases, outputs)))
        ),
        kernel_taps=(tuple(range(taps)),),
    )


def _dgrad_axis(
    inputs: int, outputs: int, taps: int, stride: int, dilation: int, pad: int
) -> Axis:
    """The axis of dgrad for a forward pass with these extents.

    Input gradient `i` sums over the pairs of output `o` and tap `r` with
    `o * stride + r * dilation == i + pad`. For a given `i` the taps that have an `o`
    form one class modulo stride / g; from one to the next, `o` falls by dilation / g.
    """
    if taps == 1:
        dilation = stride
    common = math.gcd(stride, dilation)
    class_step, output_step = stride // common, dilation // common
    class_taps = -(-taps // class_step)
    phases = stride * output_step
    first_taps = [
        _first_tap(residue + pad, stride, dilation, class_step)
        for residue in range(max(1, min(stride, inputs)))
    ]
    origins = []
    for phase in range(max(1, min(phases, inputs))):
        first = first_taps[phase % len(first_taps)]
        if first is None:
            origins.append(0)
            continue
        last_output = (phase + pad - first * dilation) // stride
        origins.append(last_output - (class_taps - 1) * output_step)
    kernel_taps = tuple(
        tuple(
            _class_tap(first, (class_taps - 1 - t) * class_step, taps)
            for t in range(class_taps)
        )
        for first in first_taps
    )
    return Axis(
        inputs=outputs,
        outputs=inputs,
        phases=phases,
        step=output_step,
        stride=1,
        taps=class_taps,
        origins=tuple(origins),
        kernel_taps=kernel_taps,
    )


def _first_tap(position: int, stride: int, dilation: int, class_step: int):
    """The smallest tap that reaches `position` from some output, None without one."""
    for tap in range(class_step):
        if (position - tap * dilation) % stride == 0:
            return tap
    return None


def _class_tap(first: int | None, ahead: int, taps: int) -> int:
    if first is None or first + ahead >= taps:
        return -1
    return first + ahead
