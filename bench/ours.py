"""How the measurements use the package: one convolution, prepared as a user would.

Knows the public API, and the names of the algorithms and passes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import tensorflow as tf

import sparse_conv
from sparse_conv import choice

ALGORITHMS = choice.ALGORITHMS


@dataclass(frozen=True, slots=True)
class Prepared:
    """A kernel that is ready for calls of one shape.

    Attributes:
        kernel: The kernel.
        asked: The algorithm asked for.
        chosen: The algorithm that calls take.
        reason: Why.
        seconds: How long the conversion and the preparation took.
    """

    kernel: sparse_conv.SparseKernel
    asked: str
    chosen: str
    reason: str
    seconds: float

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """The convolution of `x`, stride 1, padding SAME."""
        return sparse_conv.conv2d(x, self.kernel, 1, "SAME", algorithm=self.asked)


def prepare(
    x: tf.Tensor,
    dense: tf.Tensor,
    algorithm: str,
    *,
    measure: bool = False,
    training: bool = False,
) -> Prepared:
    """Converts a dense kernel, and compiles what calls on inputs like `x` need.

    Args:
        x: (N, H, W, C) tensor.
        dense: (R, S, C, K) tensor.
        algorithm: One of ALGORITHMS.
        measure: Whether the choice is by times that are measured for it.
        training: Whether the kernel's values are a variable, and the gradients are
            prepared, too.

    Returns:
        The kernel, and what was chosen.

    Raises:
        NotImplementedError: The algorithm can't compute this convolution.
    """
    begin = time.perf_counter()
    kernel = sparse_conv.SparseKernel.from_dense(dense, trainable=training)
    passes = choice.PASSES if training else ("fprop",)
    prepared = prepare_kernel(kernel, x, algorithm, measure=measure, passes=passes)
    return replace(prepared, seconds=time.perf_counter() - begin)


def prepare_kernel(
    kernel: sparse_conv.SparseKernel,
    x: tf.Tensor,
    algorithm: str,
    *,
    measure: bool = False,
    passes: tuple[str, ...] = ("fprop",),
) -> Prepared:
    """As `prepare`, for a kernel that was converted before."""
    begin = time.perf_counter()
    explanation = kernel.prepare(
        tuple(x.shape),
        1,
        "SAME",
        algorithm=algorithm,
        device=x.device,
        measure=measure,
        passes=passes,
    )
    seconds = time.perf_counter() - begin
    for one in explanation.passes:
        if one.algorithm is None:
            raise NotImplementedError(one.reason)
    reason = explanation.passes[0].reason
    return Prepared(kernel, algorithm, _chosen(explanation), reason, seconds)


def _chosen(explanation: sparse_conv.Explanation) -> str:
    """The algorithm; the algorithm of each pass where they differ."""
    chosen = {one.name: one.algorithm for one in explanation.passes}
    if len(set(chosen.values())) == 1:
        return next(iter(chosen.values()))
    return ", ".join(f"{name} {algorithm}" for name, algorithm in chosen.items())
