"""What stays the same over the calls of one convolution, and what is known of a pass.

A Convolution remembers, for each shape and place it has met, a function that computes a
pass there; a call that has been seen before costs one look-up. Knows which algorithm a
pass takes; runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import NamedTuple

import tensorflow as tf

from sparse_conv import backends, choice, dense
from sparse_conv.activations import LINEAR, Activation
from sparse_conv.bridge import Place
from sparse_conv.choice import Choice, Question
from sparse_conv.costs import Estimate
from sparse_conv.pattern import Pattern
from sparse_conv.problem import Geometry, Problem, make_problem
from sparse_conv.sparse_kernel import check_dtype
from sparse_conv.tf_internals import tensor_float_32_enabled

# Computes a pass for operands of one shape, dtype and place.
Run = Callable[..., tf.Tensor]

# Beyond so many shapes and places, a Convolution forgets what it remembers.
_REMEMBERED = 1024


class Convolution:
    """What stays the same over the passes and calls of one convolution.

    Attributes:
        geometry: Strides, padding, dilations and layout.
        pattern: The kernel's pattern; None when the kernel is dense.
        backend: The back end asked for; None to choose.
        algorithm: The algorithm asked for; "auto" to choose.
        constant: Whether the kernel is a SparseKernel whose values stay the same.
    """

    def __init__(
        self,
        geometry: Geometry,
        pattern: Pattern | None,
        backend: str | None,
        algorithm: str = "auto",
        *,
        constant: bool = False,
    ):
        backends.check_name(backend)
        choice.check_name(algorithm)
        self.geometry = geometry
        self.pattern = pattern
        self.backend = backend
        self.algorithm = algorithm
        self.constant = constant
        self._runs: dict[Hashable, Run] = {}
        self._measured: dict[Question, tuple[Estimate, ...]] = {}

    def kernel_shape(self, w_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """The dense kernel's shape, given the shape of its values or of itself."""
        return tuple(w_shape) if self.pattern is None else self.pattern.shape

    def problem(
        self, input_shape: tuple[int, ...], w_shape: tuple[int, ...]
    ) -> Problem:
        """The Problem for an input of that shape."""
        return make_problem(input_shape, self.kernel_shape(w_shape), self.geometry)

    def choose(
        self,
        pass_name: str,
        problem: Problem,
        dtype: tf.DType,
        place: Place,
        nnz: int | None,
        backend: ModuleType,
        traced: bool = False,
    ) -> Choice:
        """The algorithm of a pass, by what was measured for it or by the models."""
        question = Question(
            pass_name,
            problem,
            dtype,
            place,
            nnz,
            self.constant,
            self.pattern is not None,
            tensor_float_32_enabled(),
            traced,
        )
        measured = self._measured.get(question._replace(traced=False))
        return choice.choose(question, backend, self.algorithm, measured)

    def measured(self, question: Question) -> tuple[Estimate, ...] | None:
        """What was measured for this very question; None if nothing was."""
        return self._measured.get(question)

    def keep_measured(
        self, question: Question, estimates: tuple[Estimate, ...]
    ) -> None:
        """From now on, lets measured times decide where `question` is asked."""
        self._measured[question] = estimates
        self._runs = {}

    def remembered(self, key: Hashable, build: Callable[[], Run]) -> Run:
        """The function made for `key`, made now if it wasn't yet."""
        run = self._runs.get(key)
        if run is None:
            if len(self._runs) >= _REMEMBERED:
                self._runs.clear()
            run = self._runs[key] = build()
        return run


class Pass(NamedTuple):
    """One pass with all that decides how it is computed, but the algorithm.

    Attributes:
        name: "fprop", "dgrad" or "wgrad".
        problem: The sizes; `dtype` is that of all operands, which live at `place`.
        shape: The result's, with all its batch dimensions.
        has_bias: Whether a bias is added; fprop only, as is `activation`.
    """

    name: str
    problem: Problem
    dtype: tf.DType
    place: Place
    shape: tuple[int, ...]
    has_bias: bool = False
    activation: Activation = LINEAR


def check_operands(
    convolution: Convolution, operands: Sequence[tf.Tensor], activation: Activation
) -> None:
    """Checks dtypes and the bias, as far as they are known.

    Args:
        convolution: What is convolved.
        operands: The input, the kernel's values or the dense kernel, and maybe a bias.
        activation: The fused activation.

    Raises:
        TypeError: A dtype can't serve or doesn't match the input's.
        ValueError: The bias does not have one element for each output channel.
    """
    x, w, *rest = operands
    check_dtype("input", x.dtype)
    for name, operand in zip(("filters", "bias"), (w, *rest), strict=False):
        if operand.dtype != x.dtype:
            raise TypeError(
                f"`{name}` must have the dtype of `input`. Received: {name} of dtype "
                f"{operand.dtype.name}, input of dtype {x.dtype.name}"
            )
    if x.dtype.is_integer and not activation.integer:
        raise TypeError(
            f"The activation {activation.name!r} is not defined for integers. "
            f"Received: input of dtype {x.dtype.name}"
        )
    outputs = None
    if convolution.pattern is not None:
        outputs = convolution.pattern.shape[3]
    elif w.shape.rank == 4:
        outputs = w.shape[3]
    for bias in rest:
        if not bias.shape.is_compatible_with([outputs]):
            raise ValueError(
                "`bias` must have one element for each output channel. Received: bias "
                f"of shape {tuple(bias.shape)}, {outputs} output channels"
            )


def known_nonzeros(
    convolution: Convolution, problem: Problem, w: tf.Tensor | None
) -> int | None:
    """The weights that a pass visits; None for those of a dense kernel."""
    if convolution.pattern is not None:
        return convolution.pattern.nnz
    return math.prod(problem.kernel_shape) if w is None else None


def check_dense(convolution: Convolution, one: Pass) -> None:
    """Raises a NotImplementedError unless TensorFlow's convolution computes a pass."""
    reason = dense.reason_against(one.name, one.problem, one.dtype, one.place)
    if reason is None and one.place.kind == "GPU" and convolution.backend == "cpu":
        reason = dense.ELSEWHERE
    if reason is not None:
        raise choice.unsupported("dense", one.name, reason)
