"""Where the nonzeros of a kernel are, and how each pass walks them.

Knows shapes and index arithmetic on the host (NumPy). Knows neither the values nor the
device that computes with them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from sparse_conv.gather import Gather
from sparse_conv.memo import Memo

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """The sparse rows of one Gather; see there for the order of rows and entries.

    Attributes:
        begin: (rows,) int32, the first entry of each row.
        end: (rows,) int32, one past the last entry of each row.
        indices: (entries,) int32, each entry's place in its row.
        order: (entries,) int32, each entry's place among the kernel's values; None
            where that is the entry's own place.
    """

    begin: np.ndarray
    end: np.ndarray
    indices: np.ndarray
    order: np.ndarray | None


class Pattern:
    """The positions of a kernel's nonzeros, in compressed sparse row form.

    Rows are output channels. Within a row the index of the weight at (r, s, c) is
    `(c * R + r) * S + s`, ascending, so that the weights of a range of input channels
    are contiguous.

    Attributes:
        shape: (R, S, C / groups, K), the shape of the dense kernel.
        indptr: (K + 1,) int32, where each row begins.
        indices: (nnz,) int32.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], indptr: np.ndarray, indices: np.ndarray
    ):
        self.shape = shape
        self.indptr = indptr
        self.indices = indices
        self._memo = Memo()

    @property
    def nnz(self) -> int:
        """Number of nonzeros."""
        return len(self.indices)

    @property
    def density(self) -> float:
        """Nonzeros as a fraction of all weights; 0 for a kernel without weights."""
        size = int(np.prod(self.shape, dtype=np.int64))
        return self.nnz / size if size else 0.0

    def positions(self) -> np.ndarray:
        """(nnz,) int64, each nonzero's place in the flattened HWIO kernel."""
        r, s, c, k = self.coordinates()
        _, width, channels, outputs = self.shape
        return ((r * width + s) * channels + c) * outputs + k

    def coordinates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The nonzeros' coordinates (r, s, c, k), each (nnz,) int64."""
        height, width, _, outputs = self.shape
        k = np.repeat(np.arange(outputs), np.diff(self.indptr))
        rest, s = np.divmod(self.indices.astype(np.int64), width)
        c, r = np.divmod(rest, height)
        return r, s, c, k

    def tap_range(self) -> tuple[int, int, int, int]:
        """The taps that have nonzeros: first row, one past the last, and columns alike.

        A pattern without nonzeros has the range of all taps.
        """
        return self.cached("tap_range", self._find_tap_range)

    def cropped(self) -> Pattern:
        """The pattern without the outer taps that are empty for all channels.

        The order of the values is the same. A pattern without such taps is returned
        itself.
        """
        top, bottom, left, right = self.tap_range()
        height, width, channels, outputs = self.shape
        if (bottom - top, right - left) == (height, width):
            return self

        def crop() -> Pattern:
            r, s, c, _ = self.coordinates()
            indices = (c * (bottom - top) + r - top) * (right - left) + s - left
            shape = (bottom - top, right - left, channels, outputs)
            return Pattern(shape, self.indptr, indices.astype(np.int32))

        return self.cached("cropped", crop)

    def fprop_rows(self) -> Rows:
        """The rows of the forward pass: the pattern as it is."""
        return Rows(self.indptr[:-1], self.indptr[1:], self.indices, None)

    def dgrad_rows(self, gather: Gather) -> Rows:
        """The rows of the input gradient, built once for each way of striding.

        Args:
            gather: The `dgrad_gather` of the problem.

        Returns:
            The transposed pattern, split into the gather's row sets.
        """
        key = ("dgrad_rows", gather.groups, gather.h.kernel_taps, gather.w.kernel_taps)
        return self.cached(key, lambda: self._transpose(gather))

    def cached(self, key: Hashable, build: Callable[[], _T]) -> _T:
        """What `build` makes of this pattern, made once for each `key`.

        Back ends keep here what they derive from the pattern, so that it lives as long.
        It must not hold on to the pattern: memory is freed with the last reference.
        """
        return self._memo.cached(key, build)

    def _find_tap_range(self) -> tuple[int, int, int, int]:
        height, width, *_ = self.shape
        if not self.nnz:
            return 0, height, 0, width
        r, s, *_ = self.coordinates()
        return int(r.min()), int(r.max()) + 1, int(s.min()), int(s.max()) + 1

    def _transpose(self, gather: Gather) -> Rows:
        height, width, group_channels, outputs = self.shape
        r, s, c, k = self.coordinates()
        set_h, tap_h = _places(gather.h.kernel_taps, height)
        set_w, tap_w = _places(gather.w.kernel_taps, width)
        group_outputs = outputs // gather.groups
        group, k_in_group = np.divmod(k, group_outputs)
        channel = group * group_channels + c
        rows = (set_h[r] * gather.w.row_sets + set_w[s]) * gather.out_channels + channel
        indices = (k_in_group * gather.h.taps + tap_h[r]) * gather.w.taps + tap_w[s]
        # A tap that no output reaches (an input smaller than the stride) has no row.
        reached = np.flatnonzero((tap_h[r] >= 0) & (tap_w[s] >= 0))
        order = reached[np.lexsort((indices[reached], rows[reached]))]
        counts = np.bincount(rows[order], minlength=gather.rows)
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return Rows(
            indptr[:-1],
            indptr[1:],
            indices[order].astype(np.int32),
            order.astype(np.int32),
        )


def _places(
    kernel_taps: tuple[tuple[int, ...], ...], taps: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each tap of the dense kernel: its row set and its tap there, -1 without."""
    row_set = np.zeros(taps, np.int64)
    place = np.full(taps, -1, np.int64)
    for number, members in enumerate(kernel_taps):
        for t, tap in enumerate(members):
            if tap >= 0:
                row_set[tap], place[tap] = number, t
    return row_set, place
