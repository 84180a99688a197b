"""The layers of the seed's five figures, shared by the measurements.

The original operator was published with five figures: over the kernel's size, the
channels in and out, the density and the image's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Layer:
    """One point of a figure: a convolution with SAME padding and stride 1, batch 1."""

    figure: str
    height: int
    width: int
    channels_in: int
    channels_out: int
    taps: int
    density: float

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(1, H, W, C)."""
        return (1, self.height, self.width, self.channels_in)

    def tensors(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """A random float32 input and a dense kernel with random zeros."""
        rng = np.random.default_rng(seed)
        shape = (self.taps, self.taps, self.channels_in, self.channels_out)
        x = rng.standard_normal(self.input_shape, np.float32)
        kernel = rng.standard_normal(shape, np.float32)
        kernel[rng.random(shape) >= self.density] = 0
        return x, kernel

    def __str__(self) -> str:
        """The shapes, as in the seed's captions."""
        return (
            f"{self.height}x{self.width}x{self.channels_in} "
            f"{self.taps}x{self.taps}x{self.channels_in}x{self.channels_out} "
            f"density {self.density:g}"
        )


def layers() -> Iterator[Layer]:
    """The points of the five figures."""
    for taps in (3, 5, 7, 9, 11):
        yield Layer("kernel", 256, 512, 3, 64, taps, 0.1)
    for channels in (3, 32, 64, 128, 256):
        yield Layer("channels in", 256, 512, channels, 3, 11, 0.1)
    for channels in (3, 32, 64, 128, 256):
        yield Layer("channels out", 256, 512, 3, channels, 11, 0.1)
    for density in (0.1, 0.2, 0.5, 0.8, 1.0):
        yield Layer("density", 256, 512, 32, 64, 11, density)
    for size in (32, 64, 128, 256, 512):
        yield Layer("image", size, size, 3, 64, 11, 0.1)
