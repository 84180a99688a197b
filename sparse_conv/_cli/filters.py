"""A bank of filters as first layers of vision networks learn them, and its pruning.

Knows the filters alone: neither photographs nor convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SIZE = 11
ORIENTATIONS = 8
LUMINANCE = (0.299, 0.587, 0.114)
RED_GREEN = (0.5, -0.5, 0.0)
BLUE_YELLOW = (-0.25, -0.25, 0.5)


@dataclass(frozen=True, slots=True)
class Family:
    """Filters that differ in their orientation alone.

    Attributes:
        colour: Weight of the red, green and blue channel.
        wavelength: Of the wave, in pixels.
        phase: Of the wave at the filter's centre, in radians: 0 finds lines, pi / 2
            finds edges.
        width: Standard deviation of the envelope, in pixels.
    """

    colour: tuple[float, float, float]
    wavelength: float
    phase: float
    width: float


FAMILIES = tuple(
    Family(colour, wavelength, phase, width)
    for colour, wavelength, width in (
        (LUMINANCE, 4.5, 1.8),
        (LUMINANCE, 9.0, 2.6),
        (RED_GREEN, 9.0, 2.6),
        (BLUE_YELLOW, 9.0, 2.6),
    )
    for phase in (0.0, np.pi / 2)
)


def filter_bank() -> np.ndarray:
    """The (11, 11, 3, 64) float32 kernel: each of `FAMILIES` in all orientations.

    Filters have the sum 0 in each colour and the Euclidean norm 1, so that a uniform
    area gives 0 and magnitudes can be compared across filters.

    References:
        J. G. Daugman, Uncertainty relation for resolution in space, spatial frequency,
        and orientation optimized by two-dimensional visual cortical filters,
        https://doi.org/10.1364/JOSAA.2.001160
    """
    return np.stack(list(_filters()), axis=-1).astype(np.float32)


def _filters() -> Iterator[np.ndarray]:
    centred = np.arange(SIZE) - SIZE // 2
    y, x = np.meshgrid(centred, centred, indexing="ij")
    for family in FAMILIES:
        for angle in np.arange(ORIENTATIONS) * np.pi / ORIENTATIONS:
            across = x * np.cos(angle) + y * np.sin(angle)
            envelope = np.exp(-(x**2 + y**2) / (2 * family.width**2))
            wave = np.cos(2 * np.pi * across / family.wavelength - family.phase)
            # The envelope's share of the mean goes, so that no rim is left.
            wave -= (envelope * wave).sum() / envelope.sum()
            weights = (envelope * wave)[..., np.newaxis] * np.array(family.colour)
            yield weights / np.linalg.norm(weights)


def prune(kernel: np.ndarray, density: float) -> np.ndarray:
    """The kernel with its weights of smallest magnitude set to 0.

    Args:
        kernel: Any array.
        density: The part of the weights to keep, rounded to a whole number of them; at
            least one is kept.

    Returns:
        An array like `kernel`.
    """
    kept = max(1, round(density * kernel.size))
    largest = np.argsort(-np.abs(kernel), axis=None, kind="stable")[:kept]
    pruned = np.zeros_like(kernel)
    pruned.flat[largest] = kernel.flat[largest]
    return pruned
