"""Photographs as arrays: read from a file, scaled.

Knows picture formats. Knows nothing about what becomes of the picture.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow as tf

from sparse_conv._cli import CommandError

BUNDLED = Path(__file__).resolve().parent.parent / "data" / "chelsea.jpg"
# Beyond this the float64 reference takes longer than one likes to wait.
LONGEST_SIDE = 1024


def read(path: Path) -> np.ndarray:
    """Decodes a colour photograph, and shrinks it if it is large.

    Args:
        path: A JPEG, PNG, GIF (its first picture) or BMP.

    Returns:
        (H, W, 3) uint8, no side longer than `LONGEST_SIDE`.

    Raises:
        CommandError: The file can't be read, or is no picture.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CommandError(
            f"the photograph can't be read: {error.strerror}. Received: {path}"
        ) from error
    try:
        with tf.device("/CPU:0"):
            image = tf.io.decode_image(data, channels=3, expand_animations=False)
    except tf.errors.InvalidArgumentError as error:
        raise CommandError(
            f"the photograph must be a JPEG, PNG, GIF or BMP. Received: {path}"
        ) from error
    height, width = image.shape[:2]
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    return resize(
        image.numpy(), max(1, round(height * scale)), max(1, round(width * scale))
    )


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales a picture smoothly.

    Args:
        image: (H, W, 3) uint8.
        height: The new height in pixels.
        width: The new width in pixels.

    Returns:
        (height, width, 3) uint8.
    """
    if image.shape[:2] == (height, width):
        return image
    with tf.device("/CPU:0"):
        scaled = tf.image.resize(
            image, (height, width), method="lanczos3", antialias=True
        )
    return np.clip(np.rint(scaled.numpy()), 0, 255).astype(np.uint8)
