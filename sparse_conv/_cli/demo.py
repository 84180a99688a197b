"""`demo`: convolves a photograph with 64 pruned filters, compares, draws.

Knows the order of the job and what is printed. The filters, the comparison and the
poster have modules of their own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

import sparse_conv
from sparse_conv import backends
from sparse_conv._cli import CommandError, machine, photograph, poster
from sparse_conv._cli.filters import filter_bank, prune
from sparse_conv._cli.verify import median_time_ms, relative_errors

# float32 stays below 1e-6 here; what is above this is a fault, not rounding.
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute the convolution.

    Attributes:
        name: What it is called in the table.
        call: Computes the (1, H, W, 64) feature maps.
        tensor_float_32: TensorFlow's setting while it runs.
    """

    name: str
    call: Callable[[], tf.Tensor]
    tensor_float_32: bool = False


def run(image: Path | None, output: Path, density: float) -> None:
    """Runs the demo.

    Args:
        image: The photograph; None means the bundled one.
        output: Where the poster goes, a PNG.
        density: The part of the weights to keep.

    Raises:
        CommandError: The photograph can't be read, the poster can't be written, or the
            result is wrong; in that case no time is printed.
    """
    if not output.parent.is_dir():
        raise CommandError(f"the poster needs a folder. Received: {output}")
    picture = photograph.read(image or photograph.BUNDLED)
    dense = prune(filter_bank(), density)
    device, reason = _device()
    _print_job(picture, image, dense, device, reason)
    with tf.device(device):
        # Without its mean, the photograph meets the zero padding with a small step.
        pixels = tf.constant(picture / np.float32(255), tf.float32)
        x = (pixels - tf.reduce_mean(pixels, (0, 1)))[tf.newaxis]
        maps = _compare(x, dense, on_gpu=device != "/CPU:0")
    _write(poster.compose(picture, dense, maps), output)
    print(f"poster       {output.resolve()}")


def _device() -> tuple[str, str | None]:
    """Where to compute, and why not on a GPU (None if there)."""
    reason = dict(backends.statuses())["cuda"]
    return ("/GPU:0" if reason is None else "/CPU:0"), reason


def _print_job(
    picture: np.ndarray,
    image: Path | None,
    dense: np.ndarray,
    device: str,
    reason: str | None,
) -> None:
    height, width, _ = picture.shape
    nnz = np.count_nonzero(dense)
    versions = (
        ("sparse_conv", sparse_conv.__version__),
        ("TensorFlow", tf.__version__),
        ("NumPy", np.__version__),
        ("Numba", machine.installed_version("numba")),
        ("CuPy", machine.installed_version("cupy-cuda12x", "cupy-cuda13x")),
    )
    print(f"photograph   {height} x {width} x 3, {image or 'Chelsea the cat'}")
    print(f"kernel       {' x '.join(map(str, dense.shape))}")
    print(f"density      {nnz / dense.size:.3f}: {nnz} of {dense.size} weights")
    if device == "/CPU:0":
        print(f"device       {machine.cpu_name()}")
        print(f"             no GPU: {reason}")
    else:
        print(f"device       {machine.gpu_names()[0]}")
    print("versions     " + ", ".join(f"{n} {v}" for n, v in versions if v), flush=True)


def _compare(x: tf.Tensor, dense: np.ndarray, on_gpu: bool) -> np.ndarray:
    """Computes, checks, times and prints; returns the (H, W, 64) feature maps."""
    contenders = _contenders(x, dense, on_gpu)
    results = []
    for contender in contenders:
        with _tensor_float_32(contender.tensor_float_32):
            results.append(contender.call().numpy()[0])
    errors = relative_errors(results, x.numpy()[0], dense)
    if not errors[0] <= TOLERANCE:
        raise CommandError(
            f"{contenders[0].name} is wrong, so it is not timed: its relative error "
            f"must be at most {TOLERANCE:g}. Received: {errors[0]:.2g}"
        )
    times = []
    for contender in contenders:
        with _tensor_float_32(contender.tensor_float_32):
            times.append(median_time_ms(contender.call, calls=50 if on_gpu else 1))
    print(f"\n{'':28}{'relative error':>16}{'time':>14}{'relative time':>17}")
    for contender, error, time in zip(contenders, errors, times, strict=True):
        ratio = f"{time / times[0]:.2f}"
        print(f"{contender.name:28}{error:>16.1e}{time:>11.3f} ms{ratio:>17}")
    print()
    return results[0]


def _contenders(x: tf.Tensor, dense: np.ndarray, on_gpu: bool) -> list[Contender]:
    """The sparse convolution, then TensorFlow's in each precision it has here."""
    weights = tf.constant(dense)
    kernel = sparse_conv.SparseKernel.from_dense(weights)
    algorithm = _fastest_of_ours(x, kernel)
    sparse = functools.partial(
        sparse_conv.conv2d, x, kernel, 1, "SAME", algorithm=algorithm
    )
    tensorflow = functools.partial(tf.nn.conv2d, x, weights, 1, "SAME")
    if not on_gpu:
        return [
            Contender("sparse_conv.conv2d", sparse),
            Contender("tf.nn.conv2d", tensorflow),
        ]
    return [
        Contender("sparse_conv.conv2d", sparse),
        Contender("tf.nn.conv2d, TF32", tensorflow, tensor_float_32=True),
        Contender("tf.nn.conv2d, float32", tensorflow),
    ]


def _fastest_of_ours(x: tf.Tensor, kernel: sparse_conv.SparseKernel) -> str:
    """What is expected to be: code for this very kernel, where it can be had."""
    explained = sparse_conv.explain(x, kernel, 1, "SAME")["fprop"]
    times = {
        one.algorithm: one.predicted_us
        for one in explained.alternatives
        if one.algorithm != "dense" and one.predicted_us is not None
    }
    return min(times, key=times.__getitem__)


@contextlib.contextmanager
def _tensor_float_32(enabled: bool) -> Iterator[None]:
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(enabled)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


def _write(picture: np.ndarray, output: Path) -> None:
    with tf.device("/CPU:0"):
        data = tf.io.encode_png(picture).numpy()
    try:
        output.write_bytes(data)
    except OSError as error:
        raise CommandError(
            f"the poster can't be written: {error.strerror}. Received: {output}"
        ) from error
