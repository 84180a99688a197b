"""`explain` and `prepare`: which algorithm a call takes, and why.

Knows how to ask for a choice without a call, and how to measure the alternatives. What
is measured on behalf of a kernel decides its later calls; nothing else does.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import tensorflow as tf

from sparse_conv import backends, choice, dense
from sparse_conv.bridge import HOST, Place, gpu_place, place_of
from sparse_conv.choice import PASSES
from sparse_conv.convolution import Convolution, Pass
from sparse_conv.costs import Estimate
from sparse_conv.execution import build_run, kept_at
from sparse_conv.ops import convolution_of, geometry_of
from sparse_conv.problem import Problem
from sparse_conv.sparse_kernel import SparseKernel, check_dtype
from sparse_conv.tf_internals import tensor_float_32_enabled
from sparse_conv.timing import seconds_per_call

# A group of calls is timed for about so long, and so many groups are.
_GROUP_SECONDS = 0.01
_GROUPS = 7


@dataclass(frozen=True, slots=True)
class Alternative:
    """One algorithm for one pass.

    Attributes:
        algorithm: "generic", "baked" or "dense".
        predicted_us: Microseconds by the model; None where it can't compute the pass.
        measured_us: Microseconds measured here; None where nothing was.
        reason: Why it can't, or what it is.
    """

    algorithm: str
    predicted_us: float | None
    measured_us: float | None
    reason: str

    def __str__(self) -> str:
        """One line of a table."""
        if self.predicted_us is None:
            return f"{self.algorithm:<10}{'no':>12}{'':>12}  {self.reason}"
        measured = "" if self.measured_us is None else f"{self.measured_us:.1f} us"
        predicted = f"{self.predicted_us:.1f} us"
        return f"{self.algorithm:<10}{predicted:>12}{measured:>12}  {self.reason}"


@dataclass(frozen=True, slots=True)
class PassExplanation:
    """How one pass is computed.

    Attributes:
        name: "fprop", "dgrad" or "wgrad".
        algorithm: The algorithm that a call takes; None if no call can be made.
        reason: Why this one.
        alternatives: All algorithms.
    """

    name: str
    algorithm: str | None
    reason: str
    alternatives: tuple[Alternative, ...]

    def __str__(self) -> str:
        """The choice, and a line for each alternative."""
        lines = [f"{self.name}: {self.algorithm or 'none'} ({self.reason})"]
        return "\n  ".join([*lines, *map(str, self.alternatives)])


@dataclass(frozen=True)
class Explanation:
    """Which algorithms a convolution takes, and why; `str` gives a table.

    Attributes:
        problem: The sizes, with the batch dimensions folded.
        dtype: Of all operands.
        device: Where they live.
        backend: The back end whose algorithms these are.
        nnz: Weights that aren't zero; None where nobody counted them.
        tf32: Whether TensorFlow may compute float32 in TF32 there.
        passes: One explanation for each pass.
    """

    problem: Problem
    dtype: tf.DType
    device: str
    backend: str
    nnz: int | None
    tf32: bool
    passes: tuple[PassExplanation, ...]

    def __getitem__(self, name: str) -> PassExplanation:
        """The explanation of the pass of that name."""
        for one in self.passes:
            if one.name == name:
                return one
        raise KeyError(name)

    def __str__(self) -> str:
        """The sizes, then each pass with its alternatives."""
        p = self.problem
        nnz = "unknown" if self.nnz is None else self.nnz
        head = (
            f"{'x'.join(map(str, p.input_shape))} by "
            f"{'x'.join(map(str, p.kernel_shape))} ({nnz} nonzeros), "
            f"{self.dtype.name}, on {self.device}, back end {self.backend}"
        )
        if self.tf32:
            head += ", TensorFlow in TF32"
        columns = f"  {'algorithm':<10}{'predicted':>12}{'measured':>12}"
        return "\n".join([head, columns, *map(str, self.passes)])


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is explained: a convolution of operands of one shape, somewhere."""

    convolution: Convolution
    filters: Any
    problem: Problem
    input_shape: tuple[int, ...]
    dtype: tf.DType
    place: Place
    backend: ModuleType

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (*self.input_shape[:-3], *self.problem.output_shape[1:])


def explain(
    input_or_shape: Any,
    filters: Any,
    strides: Any,
    padding: Any,
    data_format: str | None = "NHWC",
    dilations: Any = None,
    *,
    dtype: Any = None,
    algorithm: str = "auto",
    backend: str | None = None,
    device: str | None = None,
    measure: bool = False,
) -> Explanation:
    """Which algorithm `conv2d` takes for each pass, the alternatives, and why.

    Args:
        input_or_shape: The input, or its shape.
        filters: A SparseKernel, or a dense tensor, variable or array.
        strides: As for `conv2d`; so are padding, data_format and dilations.
        padding: "SAME", "VALID" or explicit.
        data_format: "NHWC" or "NCHW".
        dilations: None means 1.
        dtype: Of all operands; None means that of the input, or of the filters.
        algorithm: As for `conv2d`.
        backend: As for `conv2d`.
        device: Where the operands live, such as "/GPU:0"; None means where the input
            is, or the filters.
        measure: Whether to run and time all alternatives, which changes no choice.

    Returns:
        The explanation of an eager call; in a graph, algorithms other than "dense" cost
        what a Python function costs there in addition.

    Raises:
        ValueError: As `conv2d`, or an extent is 0: then nothing is computed.
        TypeError: As `conv2d`.
        NotImplementedError: No back end computes there.
    """
    subject = _subject(
        input_or_shape, filters, (strides, padding, data_format, dilations), dtype,
        algorithm, backend, device,
    )  # fmt: skip
    measured = _measured(subject, PASSES) if measure else {}
    return _explained(subject, PASSES, measured)


def prepare(
    kernel: SparseKernel,
    input_shape: Sequence[int],
    strides: Any,
    padding: Any,
    data_format: str | None = "NHWC",
    dilations: Any = None,
    *,
    algorithm: str = "auto",
    backend: str | None = None,
    device: str | None = None,
    measure: bool = False,
    passes: Sequence[str] = PASSES,
) -> Explanation:
    """See `SparseKernel.prepare`."""
    unknown = sorted(set(passes) - set(PASSES))
    if unknown:
        raise ValueError(
            f"`passes` must be among {', '.join(PASSES)}. Received: passes={passes!r}"
        )
    subject = _subject(
        input_shape, kernel, (strides, padding, data_format, dilations), None,
        algorithm, backend, device,
    )  # fmt: skip
    measured = {}
    if measure:
        _tune(subject, passes)
        measured = _measured(subject, passes)
    for name, times in measured.items():
        question = _question(subject, name)
        subject.convolution.keep_measured(question, _with_times(subject, name, times))
    explanation = _explained(subject, passes, measured)
    for one in explanation.passes:
        if one.algorithm is not None:
            _run_once(subject, one.name, one.algorithm)
    subject.backend.finish_compiling()
    return explanation


def _subject(
    input_or_shape: Any,
    filters: Any,
    geometry: tuple[Any, Any, Any, Any],
    dtype: Any,
    algorithm: str,
    backend: str | None,
    device: str | None,
) -> _Subject:
    choice.check_name(algorithm)
    backends.check_name(backend)
    is_shape = not (tf.is_tensor(input_or_shape) or hasattr(input_or_shape, "dtype"))
    if not is_shape:
        input_or_shape = tf.convert_to_tensor(input_or_shape)
    input_shape = tuple(
        int(size) for size in (input_or_shape if is_shape else input_or_shape.shape)
    )
    pattern, w = None, filters
    if isinstance(filters, SparseKernel):
        pattern, w = filters.pattern, filters.values
    w = tf.convert_to_tensor(w)
    if dtype is None:
        dtype = w.dtype if is_shape else input_or_shape.dtype
    dtype = tf.as_dtype(dtype)
    check_dtype("input", dtype)
    place = _place(device, w if is_shape else input_or_shape, dtype)
    convolution = convolution_of(
        geometry_of(*geometry), filters, pattern, backend, algorithm
    )
    problem = convolution.problem(input_shape, tuple(w.shape))
    if 0 in (*problem.input_shape, *problem.output_shape, *problem.kernel_shape):
        raise ValueError(
            "There is an algorithm only where something is computed. Received: input "
            f"of shape {input_shape}, filters of shape {problem.kernel_shape}"
        )
    module = backends.select(place, dtype, backend)
    kernel = filters if pattern is not None else w
    return _Subject(convolution, kernel, problem, input_shape, dtype, place, module)


def _place(device: str | None, tensor: tf.Tensor, dtype: tf.DType) -> Place:
    """The place of that name, or of a tensor."""
    if dtype == tf.int32:
        return HOST
    if device is None:
        return place_of(tensor)
    found = re.fullmatch(r"(?i:.*/)?(?:device:)?(CPU|GPU)(?::(\d+))?", device)
    if found is None:
        raise ValueError(
            '`device` must name a CPU or a GPU, such as "/GPU:0". '
            f"Received: device={device!r}"
        )
    return HOST if found[1] == "CPU" else gpu_place(int(found[2] or 0))


def _nonzeros(subject: _Subject, name: str) -> int | None:
    if isinstance(subject.filters, SparseKernel):
        return subject.filters.nnz
    if name == "wgrad":
        # The gradient to a dense kernel has no zeros.
        return int(np.prod(subject.problem.kernel_shape, dtype=np.int64))
    return subject.backend.nonzeros(subject.filters)


def _question(subject: _Subject, name: str) -> choice.Question:
    return choice.Question(
        name,
        subject.problem,
        subject.dtype,
        subject.place,
        _nonzeros(subject, name),
        subject.convolution.constant,
        subject.convolution.pattern is not None,
        tensor_float_32_enabled(),
    )


def _explained(
    subject: _Subject, passes: Sequence[str], measured: dict[str, dict[str, float]]
) -> Explanation:
    tf32 = (
        tensor_float_32_enabled()
        and subject.place.kind == "GPU"
        and subject.dtype == tf.float32
    )
    return Explanation(
        subject.problem,
        subject.dtype,
        subject.place.device,
        subject.backend.__name__.rpartition(".")[2],
        _nonzeros(subject, "fprop"),
        tf32,
        tuple(
            _pass_explained(subject, name, measured.get(name, {})) for name in passes
        ),
    )


def _pass_explained(
    subject: _Subject, name: str, times: dict[str, float]
) -> PassExplanation:
    question = _question(subject, name)
    estimates = choice.estimates(question, subject.backend)
    known = subject.convolution.measured(question)
    reasons = {one.algorithm: one.reason for one in estimates}
    if any(map(_is_code, estimates)):
        tuned = subject.backend.tuned(*_code_of(subject, name))
        reasons["baked"] = tuned or reasons["baked"]
    if known is not None:
        times = {one.algorithm: one.microseconds for one in known} | times
    alternatives = tuple(
        Alternative(
            one.algorithm, one.microseconds, times.get(one.algorithm),
            reasons[one.algorithm],
        )
        for one in estimates
    )  # fmt: skip
    try:
        chosen = choice.choose(
            question, subject.backend, subject.convolution.algorithm, known
        )
    except NotImplementedError as error:
        return PassExplanation(name, None, str(error), alternatives)
    return PassExplanation(name, chosen.algorithm, chosen.reason, alternatives)


def _with_times(
    subject: _Subject, name: str, times: dict[str, float]
) -> tuple[Estimate, ...]:
    """The estimates of a pass with what was measured in the place of predictions."""
    estimates = choice.estimates(_question(subject, name), subject.backend)
    return tuple(
        replace(one, microseconds=times.get(one.algorithm)) for one in estimates
    )


def _pass(subject: _Subject, name: str) -> Pass:
    shape = {
        "fprop": subject.output_shape,
        "dgrad": subject.input_shape,
        "wgrad": subject.problem.kernel_shape,
    }[name]
    return Pass(name, subject.problem, subject.dtype, subject.place, shape)


def _operands(subject: _Subject, name: str) -> list[tf.Tensor]:
    """Operands of a pass, of the right shapes and at the right place."""
    with tf.device(subject.place.device):
        x, dy = (
            tf.cast(tf.random.uniform(shape, -1, 1), subject.dtype)
            for shape in (subject.input_shape, subject.output_shape)
        )
        kernel = subject.filters
        w = kernel.values if isinstance(kernel, SparseKernel) else kernel
        # The kernel's own tensor where it can be: what is compiled belongs to it.
        w = kept_at(subject.place, tf.cast(tf.convert_to_tensor(w), subject.dtype))
    return {"fprop": [x, w], "dgrad": [dy, w], "wgrad": [x, dy]}[name]


def _call(subject: _Subject, name: str, algorithm: str) -> Callable[[], tf.Tensor]:
    if algorithm == "dense":
        reason = dense.reason_against(
            name, subject.problem, subject.dtype, subject.place
        )
        if reason is not None:
            raise choice.unsupported(algorithm, name, reason)
    run = build_run(
        subject.convolution,
        _pass(subject, name),
        subject.backend,
        algorithm,
        waits=True,
    )
    operands = _operands(subject, name)
    return lambda: run(*operands)


def _run_once(subject: _Subject, name: str, algorithm: str) -> None:
    """Compiles or loads whatever a pass needs, by running it."""
    _call(subject, name, algorithm)()


def _tune(subject: _Subject, passes: Sequence[str]) -> None:
    """Has generated code chosen by its times, where it may serve."""
    if subject.convolution.algorithm not in ("auto", "baked"):
        return
    for name in passes:
        estimates = choice.estimates(_question(subject, name), subject.backend)
        if any(map(_is_code, estimates)):
            subject.backend.tune(*_code_of(subject, name), *_operands(subject, name))


def _is_code(estimate: Estimate) -> bool:
    """Whether code can be generated for a pass."""
    return estimate.algorithm == "baked" and estimate.microseconds is not None


def _code_of(subject: _Subject, name: str) -> tuple[Any, ...]:
    """What a back end knows generated code by."""
    pattern = subject.filters.pattern
    return name, subject.problem, subject.dtype, subject.place, pattern


def _measured(subject: _Subject, passes: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each pass, the microseconds of each algorithm that can compute it."""
    times: dict[str, dict[str, float]] = {}
    for name in passes:
        estimates = choice.estimates(_question(subject, name), subject.backend)
        possible = [one for one in estimates if one.microseconds is not None]
        calls = {one.algorithm: _call(subject, name, one.algorithm) for one in possible}
        times[name] = median_microseconds(calls, subject.backend.finish_compiling)
    return times


def median_microseconds(
    calls: dict[str, Callable[[], Any]], ready: Callable[[], None]
) -> dict[str, float]:
    """The median time of each call, their groups taken in turn.

    Args:
        calls: What to time.
        ready: Waits for what the first calls compile in the background.

    Returns:
        Microseconds of one call, with many in flight if they don't wait themselves.
    """
    counts = {}
    for name, call in calls.items():
        call()
        ready()
        seconds_per_call(call, 1)
        counts[name] = max(1, int(_GROUP_SECONDS / seconds_per_call(call, 3)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_GROUPS):
        for name, call in calls.items():
            times[name].append(seconds_per_call(call, counts[name]))
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}
