"""The convolutions that are measured: the seed's five figures, and layers of networks.

Knows sizes and random numbers. Does not know what computes with them, nor how that is
timed.

The original operator was published with five figures: over the kernel's size, the
channels in and out, the density and the image's size. They are kept point for point.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

FIGURES = ("kernel size", "channels in", "channels out", "density", "image size")
KERNEL_SIZES = (3, 5, 7, 9, 11)
CHANNELS = (3, 32, 64, 128, 256)
SEED_DENSITIES = (0.1, 0.2, 0.5, 0.8, 1.0)
# Beside the seed's: where pruned networks are, and where dense takes over.
MORE_DENSITIES = (0.01, 0.02, 0.05, 0.15, 0.3)
IMAGE_SIZES = (32, 64, 128, 256, 512)
# A CPU takes seconds for more; the seed's other figures have this size anyway.
MOST_CPU_PIXELS = 256 * 512

LAYER_DENSITIES = (0.02, 0.05, 0.1, 0.2)
# On a CPU sparse is ahead up to such densities, so that the choice has to hold there.
MORE_CPU_LAYER_DENSITIES = (0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Case:
    """One convolution to measure, with SAME padding and stride 1, NHWC.

    Attributes:
        group: The figure or the network that it belongs to.
        position: Where it stands on the figure's axis, or the layer's name.
        n: Batch size.
        h: Input height; `w` is the width, `c` the channels.
        k: Output channels.
        taps: Height and width of the kernel.
        density: The part of the weights that is not zero.
        dtype: Name of the dtype of all operands.
    """

    group: str
    position: float | str
    n: int
    h: int
    w: int
    c: int
    k: int
    taps: int
    density: float
    dtype: str = "float32"

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""
        return (self.n, self.h, self.w, self.c)

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        """(R, S, C, K)."""
        return (self.taps, self.taps, self.c, self.k)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, P, Q, K)."""
        return (self.n, self.h, self.w, self.k)

    @property
    def io_bytes(self) -> int:
        """Bytes of the input and of the output together."""
        elements = self.n * self.h * self.w * (self.c + self.k)
        return elements * DTYPES[self.dtype].itemsize

    def input(self, seed: int = 0) -> np.ndarray:
        """A random input of `input_shape`."""
        rng = np.random.default_rng([seed, 1])
        x = rng.standard_normal(self.input_shape, np.float32)
        return x.astype(DTYPES[self.dtype])

    def kernel(self, seed: int = 0) -> np.ndarray:
        """A random dense kernel of `kernel_shape` with random zeros."""
        rng = np.random.default_rng([seed, 2])
        kernel = rng.standard_normal(self.kernel_shape, np.float32)
        kernel[rng.random(self.kernel_shape) >= self.density] = 0
        return kernel.astype(DTYPES[self.dtype])

    @property
    def shape_text(self) -> str:
        """The sizes, as in the seed's captions."""
        return (
            f"{self.n}x{self.h}x{self.w}x{self.c} "
            f"{self.taps}x{self.taps}x{self.c}x{self.k}"
        )

    def __str__(self) -> str:
        """A name that no other case of a command has."""
        name = f" {self.position}" if isinstance(self.position, str) else ""
        return (
            f"{self.group}{name}: {self.shape_text} density {self.density:g} "
            f"{self.dtype}"
        )


def useful_fmas(case: Case, kernel: np.ndarray) -> int:
    """Multiplications of a nonzero weight and an input that is not padding.

    Args:
        case: The sizes.
        kernel: (R, S, C, K) array, its zeros included.

    Returns:
        The number of them in one call.
    """
    weights = np.sum(kernel != 0, axis=(2, 3))
    rows = _reached(case.h, case.taps)
    columns = _reached(case.w, case.taps)
    return case.n * int(rows @ weights @ columns)


def _reached(size: int, taps: int) -> np.ndarray:
    """For each tap along one axis, the outputs whose input exists."""
    before = (taps - 1) // 2
    return np.array([max(0, size - abs(tap - before)) for tap in range(taps)])


def figure_cases(*, on_gpu: bool, dtype: str = "float32") -> Iterator[Case]:
    """The points of the five figures.

    Args:
        on_gpu: Whether they are for a GPU. On a CPU the largest image is 256x512.
        dtype: Name of the dtype of all operands.

    Yields:
        The cases, figure after figure.
    """
    for taps in KERNEL_SIZES:
        yield Case("kernel size", taps, 1, 256, 512, 3, 64, taps, 0.1, dtype)
    for channels in CHANNELS:
        yield Case("channels in", channels, 1, 256, 512, channels, 3, 11, 0.1, dtype)
    for channels in CHANNELS:
        yield Case("channels out", channels, 1, 256, 512, 3, channels, 11, 0.1, dtype)
    for density in sorted(SEED_DENSITIES + MORE_DENSITIES):
        yield Case("density", density, 1, 256, 512, 32, 64, 11, density, dtype)
    for size in IMAGE_SIZES:
        height = size if on_gpu or size * size <= MOST_CPU_PIXELS else size // 2
        yield Case("image size", size, 1, height, size, 3, 64, 11, 0.1, dtype)


# Name, height and width, channels in, channels out, taps.
_LAYERS = {
    "ResNet-50 3x3": (
        ("conv2", 56, 64, 64, 3),
        ("conv3", 28, 128, 128, 3),
        ("conv4", 14, 256, 256, 3),
        ("conv5", 7, 512, 512, 3),
    ),
    "ResNet-50 1x1": (
        ("conv2 expand", 56, 64, 256, 1),
        ("conv2 reduce", 56, 256, 64, 1),
        ("conv3 reduce", 28, 512, 128, 1),
        ("conv4 reduce", 14, 1024, 256, 1),
        ("conv5 reduce", 7, 2048, 512, 1),
    ),
    "MobileNet 1x1": (
        ("112", 112, 32, 64, 1),
        ("56", 56, 128, 128, 1),
        ("28", 28, 256, 256, 1),
        ("14", 14, 512, 512, 1),
        ("7", 7, 1024, 1024, 1),
    ),
    "VGG-16": (
        ("conv1_1", 224, 3, 64, 3),
        ("conv1_2", 224, 64, 64, 3),
        ("conv2_2", 112, 128, 128, 3),
        ("conv3_3", 56, 256, 256, 3),
        ("conv4_3", 28, 512, 512, 3),
        ("conv5_3", 14, 512, 512, 3),
    ),
}


def layer_cases(
    *, on_gpu: bool, dtypes: tuple[str, ...] = ("float32",)
) -> Iterator[Case]:
    """Layers of networks at batch 1 and 32; 1 and 8 on a CPU."""
    densities = LAYER_DENSITIES + (() if on_gpu else MORE_CPU_LAYER_DENSITIES)
    for dtype in dtypes:
        for batch in (1, 32 if on_gpu else 8):
            for shape in layer_shapes(batch, dtype):
                for density in densities:
                    yield with_density(shape, density)


def layer_shapes(batch: int, dtype: str = "float32") -> Iterator[Case]:
    """Every layer once, at density 0.1."""
    for network, layers in _LAYERS.items():
        for name, size, c, k, taps in layers:
            yield Case(network, name, batch, size, size, c, k, taps, 0.1, dtype)


def with_density(case: Case, density: float) -> Case:
    """The same convolution with another part of its weights."""
    sizes = (case.n, case.h, case.w, case.c, case.k, case.taps)
    return Case(case.group, case.position, *sizes, density, case.dtype)


def crossover_shapes(*, on_gpu: bool) -> Iterator[Case]:
    """The shapes for which the density is sought where dense takes over."""
    for point in figure_cases(on_gpu=on_gpu):
        if point.group in ("kernel size", "channels in", "image size"):
            yield point
    yield Case("density", 0.1, 1, 256, 512, 32, 64, 11, 0.1)
    for batch in (1, 32 if on_gpu else 8):
        yield from layer_shapes(batch)


def training_cases(*, on_gpu: bool) -> Iterator[Case]:
    """Layers of which a training step is measured."""
    yield Case("figure", "11x11", 1, 256, 512, 3, 64, 11, 0.1)
    batch = 32 if on_gpu else 8
    for shape in layer_shapes(batch):
        if shape.group.startswith("ResNet-50"):
            for density in (0.05, 0.1):
                yield with_density(shape, density)
