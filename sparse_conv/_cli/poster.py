"""Composes the demo's poster: the photograph, the filters, and a map for each filter.

Knows pictures as NumPy arrays. Knows neither files nor convolutions.
"""

from __future__ import annotations

import colorsys

import numpy as np

from sparse_conv._cli import photograph
from sparse_conv._cli.filters import BLUE_YELLOW, FAMILIES, ORIENTATIONS, RED_GREEN

# Pixels. The margin surrounds the poster, the gutter parts its three areas, the gap
# parts the tiles of one area.
MARGIN, GUTTER, GAP = 64, 40, 8
MAP_WIDTH = 256
WIDTH = ORIENTATIONS * MAP_WIDTH + (ORIENTATIONS - 1) * GAP + 2 * MARGIN

BACKGROUND = np.array([13, 15, 20], np.float32)
PRUNED = np.array([30, 33, 42], np.float32)
# The colours of a map's positive and negative outputs.
TINTS = {
    RED_GREEN: ((255, 82, 96), (52, 211, 140)),
    BLUE_YELLOW: ((82, 148, 255), (255, 202, 64)),
}
# A luminance map's positive outputs show its orientation as a hue of this saturation.
SATURATION = 0.45
SHADE = (64, 84, 128)


def compose(picture: np.ndarray, kernel: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Draws the poster.

    Args:
        picture: (H, W, 3) uint8.
        kernel: (R, S, 3, K) array, ordered as `filter_bank` is.
        maps: (H, W, K) array.

    Returns:
        (height, `WIDTH`, 3) uint8; the height follows from the picture's shape.
    """
    height, width, _ = picture.shape
    inner = WIDTH - 2 * MARGIN
    # The photograph and the square of filters share one height, and fill the width.
    top_height = round((inner - GUTTER) * height / (width + height))
    top = photograph.resize(picture, top_height, inner - GUTTER - top_height)
    map_height = max(1, round(MAP_WIDTH * height / width))
    tiles = [
        photograph.resize(_draw_map(maps[..., k], k), map_height, MAP_WIDTH)
        for k in range(maps.shape[-1])
    ]
    grid = _grid(tiles, GAP)
    size = (2 * MARGIN + top_height + GUTTER + grid.shape[0], WIDTH, 3)
    poster = np.broadcast_to(BACKGROUND, size).astype(np.uint8)
    _paste(poster, top, MARGIN, MARGIN)
    _paste(poster, _draw_filters(kernel, top_height), MARGIN, -MARGIN - top_height)
    _paste(poster, grid, MARGIN + top_height + GUTTER, MARGIN)
    return poster


def _draw_map(values: np.ndarray, k: int) -> np.ndarray:
    """One feature map as light on black: a colour each for its two signs."""
    positive, negative = _tints(k)
    # The brightest half per cent may saturate, so that one glint dims nothing.
    scale = np.quantile(np.abs(values), 0.995)
    light = np.clip(values / scale, -1, 1) if scale > 0 else np.zeros_like(values)
    # Faint outputs are lifted: eyes judge light by its ratio.
    light = np.sign(light) * np.abs(light) ** 0.6
    colour = np.where(light[..., np.newaxis] > 0, positive, negative)
    strength = np.abs(light)[..., np.newaxis]
    return np.rint(BACKGROUND + strength * (colour - BACKGROUND)).astype(np.uint8)


def _tints(k: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    family, orientation = divmod(k, ORIENTATIONS)
    hue = colorsys.hsv_to_rgb(orientation / ORIENTATIONS, SATURATION, 255)
    return TINTS.get(FAMILIES[family].colour, (hue, SHADE))


def _draw_filters(kernel: np.ndarray, side: int) -> np.ndarray:
    """All filters in a square of `side` pixels, their weights as square pixels."""
    rows, columns, _, count = kernel.shape
    across = -(-count // ORIENTATIONS)
    pixel = max(1, (side - (across - 1) * GAP) // (across * max(rows, columns)))
    tiles = [
        _draw_filter(kernel[..., k]).repeat(pixel, 0).repeat(pixel, 1)
        for k in range(count)
    ]
    free = side - across * columns * pixel
    grid = _grid(tiles, free // (across - 1))
    square = np.broadcast_to(BACKGROUND, (side, side, 3)).astype(np.uint8)
    _paste(square, grid, (side - grid.shape[0]) // 2, (side - grid.shape[1]) // 2)
    return square


def _draw_filter(weights: np.ndarray) -> np.ndarray:
    """Weights as colours about grey; where all three are pruned, dark."""
    largest = np.abs(weights).max()
    colour = 127.5 + 127.5 * (weights / largest if largest else weights)
    kept = weights.any(axis=-1, keepdims=True)
    return np.rint(np.where(kept, colour, PRUNED)).astype(np.uint8)


def _grid(tiles: list[np.ndarray], gap: int) -> np.ndarray:
    """Tiles of one size in rows of `ORIENTATIONS`, on the background."""
    height, width, _ = tiles[0].shape
    rows = -(-len(tiles) // ORIENTATIONS)
    size = (rows * (height + gap) - gap, ORIENTATIONS * (width + gap) - gap, 3)
    grid = np.broadcast_to(BACKGROUND, size).astype(np.uint8)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, ORIENTATIONS)
        _paste(grid, tile, row * (height + gap), column * (width + gap))
    return grid


def _paste(canvas: np.ndarray, tile: np.ndarray, top: int, left: int) -> None:
    """Puts the tile onto the canvas; a negative `left` counts from the right edge."""
    left %= canvas.shape[1]
    canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
