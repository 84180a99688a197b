"""Passes by code that is generated for one kernel: when it is made, and how it is kept.

The code belongs to a tensor of values. While it is compiled in the background, and for
other values, the functions that read pattern and values serve. Knows threads and
compiled functions, and compares the times of configurations if it is asked to; which
code that is, `baked` knows.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from sparse_conv import baked, bridge, jit
from sparse_conv.background import Workers
from sparse_conv.baked import BakedBlock, BakedFunction
from sparse_conv.bridge import Memory, Place, known_memory
from sparse_conv.gather import Gather
from sparse_conv.launch import Launch
from sparse_conv.pattern import Rows
from sparse_conv.streams import Step, ordered
from sparse_conv.timing import seconds_per_call

# Code is generated for values once they have been used so often: what is called once
# or twice is over before it would be ready.
_USES = 3
# Of how many tensors of values the code of a pass is kept.
_TENSORS = 4
# For so many shapes of a kernel code is generated unasked: with a new shape in every
# call the compiler would never rest.
_SHAPES = 16
# So often is code generated unasked in one process, because CuPy keeps all that it has
# ever loaded.
_KERNELS = 512
# Vectors are loaded up to 16 bytes at a time.
_ALIGNMENT = 16

# A kernel's job waits for those of its functions, so they have threads of their own.
_kernel_workers = Workers(4, "sparse_conv_kernel")
_function_workers = Workers(4, "sparse_conv_function")
_pending: set[Future] = set()
_lock = threading.Lock()
_started = 0

# A configuration is timed so often, in so many launches that follow each other. It
# takes the place of another if it is faster by more than such times differ anyway.
_GROUPS = 3
_LAUNCHES = 30
_GAIN = 1.05


class Loaded(NamedTuple):
    """Compiled code.

    Attributes:
        block: The configuration that it was generated for.
        functions: The functions and what they were compiled to.
    """

    block: BakedBlock
    functions: list[tuple[BakedFunction, Any]]


def finish_compiling() -> None:
    """Waits for all code that is being compiled.

    What didn't compile raises in the calls that would use it.
    """
    wait(list(_pending))


class _State:
    """How far the code for one tensor of values is.

    Attributes:
        values: Held, so that no other tensor can have this one's memory.
        uses: Calls that would have used the code.
        future: The compiled functions; None before the compiler was started.
        loaded: The same once they are there: a future's locks take a microsecond.
    """

    def __init__(self, values: tf.Tensor):
        self.values = values
        self.uses = 0
        self.future: Future | None = None
        self.loaded: Loaded | None = None


class BakedCode:
    """The generated code of one pass of a kernel, for the values in use.

    It is kept with the kernel's pattern, and serves every bias and activation.
    """

    def __init__(
        self,
        gather: Gather,
        rows: Callable[[], Rows | None],
        dtype: tf.DType,
        block: BakedBlock,
        place: Place,
        shapes: set[Gather],
    ):
        """Generates nothing yet.

        Args:
            gather: What is computed.
            rows: Gives its sparse rows, or None if the kernel no longer exists.
            dtype: Of all operands.
            block: The configuration.
            place: The GPU.
            shapes: For which shapes code was generated; all of a kernel share it.
        """
        self.gather = gather
        self.make_rows = rows
        self.dtype = dtype
        self.block = block
        # Configurations that it is known to be the fastest of; 0 if the model chose.
        self.compared = 0
        self.place = place
        self._shapes = shapes
        # By the values' address, the latest last.
        self._states: dict[int, _State] = {}
        self._latest: _State | None = None
        self._warned = False

    def loaded(self, values: tf.Tensor, *, waits: bool) -> Loaded | None:
        """The compiled code for these values.

        Args:
            values: The kernel's values. A graph may hand the same memory over in a new
                tensor at each call.
            waits: Whether to wait for the compiler.

        Returns:
            The code; None while it isn't ready, and where nobody waits for it and it
            didn't compile.

        Raises:
            CompileError: The code didn't compile, and the caller waits for it.
        """
        # Read once: another thread may come with other values at any time.
        state = self._latest
        if state is None or values is not state.values:
            state = self._latest = self._state_of(values)
        if state.loaded is not None:
            return state.loaded
        if state.future is None:
            state.uses += 1
            if not waits and (state.uses < _USES or self._is_one_too_many()):
                return None
            self._start(state)
        if not waits:
            if not state.future.done():
                return None
            error = state.future.exception()
            if error is not None:
                self._warn(error)
                return None
        loaded = state.future.result()
        with _lock:
            # Another thread may have tuned it meanwhile.
            if state.loaded is None:
                state.loaded = loaded
            return state.loaded

    def tune(
        self,
        blocks: Sequence[BakedBlock],
        fixed: Mapping[str, Memory],
        operands: Mapping[str, Memory],
        values: tf.Tensor,
    ) -> None:
        """Takes the configuration that is the fastest with these values.

        What computes with other values goes on to do so, and what is compiled for new
        ones has the configuration. Nothing changes if the code compiles for none.

        Args:
            blocks: The configurations to compare, the first of which is expected to be
                the best. Those whose code doesn't compile are passed over.
            fixed: The memory of operands that are the same at each use.
            operands: The memory of "read" and "write"; what is written is overwritten.
            values: The kernel's values.
        """
        global _started
        rows, numbers = self.make_rows(), _numbers(values)
        futures = [
            _kernel_workers.submit(
                lambda block=block: _compiled(self, block, rows, numbers)
            )
            for block in blocks
        ]
        best, best_seconds, compared = None, float("inf"), 0
        for future in futures:
            try:
                loaded = future.result()
            except jit.CompileError:
                continue
            compared += 1
            seconds = self._seconds(loaded, fixed, operands)
            if seconds * _GAIN < best_seconds:
                best, best_seconds = loaded, seconds
        if best is not None:
            state = self._state_of(values)
            with _lock:
                _started += compared
                self._shapes.add(self.gather)
                self.block = best.block
                self.compared = compared
                state.loaded = best

    def _seconds(
        self,
        loaded: Loaded,
        fixed: Mapping[str, Memory],
        operands: Mapping[str, Memory],
    ) -> float:
        """Of one use of the code, among many that follow each other."""
        steps = self.steps(loaded, fixed)

        def launch() -> None:
            with ordered(bridge.ordinal_of(self.place)) as lane:
                for _ in range(_LAUNCHES):
                    for step in steps:
                        lane.launch(step, operands)

        launch()
        return min(seconds_per_call(launch, 1) for _ in range(_GROUPS)) / _LAUNCHES

    def steps(
        self, loaded: Loaded, fixed: Mapping[str, Memory], activation: int = 0
    ) -> list[Step]:
        """The launches of compiled code.

        Args:
            loaded: The code.
            fixed: The memory of operands that are the same at each use.
            activation: Code of the activation.

        Returns:
            The steps, which may run in any order.
        """
        ordinal = bridge.ordinal_of(self.place)
        return [
            Step(
                _launch(self, loaded.block, function, activation),
                ordinal, fixed, compiled,
            )
            for function, compiled in loaded.functions
        ]  # fmt: skip

    def _warn(self, error: BaseException) -> None:
        """Says once that other functions go on to serve."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                "The generated code must compile. The functions that read pattern and "
                f"values serve instead. Received: {error}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _state_of(self, values: tf.Tensor) -> _State:
        address = known_memory(values).address
        with _lock:
            state = self._states.pop(address, None) or _State(values)
            self._states[address] = state
            if len(self._states) > _TENSORS:
                del self._states[next(iter(self._states))]
            return state

    def _is_one_too_many(self) -> bool:
        is_new = self.gather not in self._shapes
        return _started >= _KERNELS or (is_new and len(self._shapes) >= _SHAPES)

    def _start(self, state: _State) -> None:
        """Starts the compiler, unless another thread has done so."""
        global _started
        with _lock:
            if state.future is not None:
                return
            _started += 1
            self._shapes.add(self.gather)
            wanted = weakref.ref(self), weakref.ref(state)
            state.future = _kernel_workers.submit(lambda: _compile(*wanted))
            _pending.add(state.future)
        state.future.add_done_callback(_pending.discard)


def _compile(
    code_reference: weakref.ref, state_reference: weakref.ref
) -> Loaded | None:
    """Generates, compiles and loads what is still wanted; None if it no longer is.

    Args:
        code_reference: Of a BakedCode, which dies with its kernel.
        state_reference: Of its _State, which dies when other values have come and
            nobody waits.
    """
    code, state = code_reference(), state_reference()
    rows = code.make_rows() if code is not None and state is not None else None
    if rows is None:
        return None
    return _compiled(code, code.block, rows, _numbers(state.values))


def _numbers(values: tf.Tensor) -> np.ndarray:
    """Values on the host, in a dtype that NumPy has."""
    return np.asarray(tf.cast(values, tf.float32) if values.dtype.size == 2 else values)


def _compiled(
    code: BakedCode, block: BakedBlock, rows: Rows, values: np.ndarray
) -> Loaded:
    """Generates, compiles and loads the code for one configuration."""
    functions = baked.bake(code.gather, rows, values, code.dtype.name, block)
    futures = [
        _function_workers.submit(lambda function=function: _load(code, block, function))
        for function in functions
    ]
    return Loaded(block, [future.result() for future in futures])


def _load(
    code: BakedCode, block: BakedBlock, function: BakedFunction
) -> tuple[BakedFunction, Any]:
    launch = _launch(code, block, function)
    ordinal = bridge.ordinal_of(code.place)
    compiled = jit.load_function(launch.function, launch.defines, ordinal, launch.code)
    # The text has served.
    return BakedFunction("", function.parts), compiled


def _launch(
    code: BakedCode, block: BakedBlock, function: BakedFunction, activation: int = 0
) -> Launch:
    return baked.baked_launch(code.gather, code.dtype.name, block, function, activation)


class BakedRun:
    """A pass by generated code, or by `generic` where and while there is none."""

    def __init__(
        self,
        code: BakedCode,
        activation: int,
        fixed: Mapping[str, Memory],
        shape: tuple[int, ...],
        generic: Callable[..., tf.Tensor],
        *,
        waits: bool,
    ):
        """Prepares the pass.

        Args:
            code: The pass's code.
            activation: Code of the activation.
            fixed: The memory of operands that are the same at each use.
            shape: The result's.
            generic: The same pass by functions that read pattern and values.
            waits: Whether the first call waits for the compiler.
        """
        self._code = code
        self._activation = activation
        self._fixed = fixed
        self._shape = shape
        self._generic = generic
        self._waits = waits
        self._ordinal = bridge.ordinal_of(code.place)
        self._steps: tuple[Loaded | None, list[Step]] = (None, [])

    def __call__(
        self, read: tf.Tensor, w: tf.Tensor, bias: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Computes the pass; the operands live on the code's GPU."""
        code = self._code
        loaded = code.loaded(w, waits=self._waits)
        if loaded is None:
            return self._generic(read, w, bias)
        source = known_memory(read)
        if source.address % _ALIGNMENT and loaded.block.loading.unit > 1:
            return self._generic(read, w, bias)
        write, memory = bridge.output(self._shape, code.dtype, code.place)
        operands = {"read": source, "write": memory}
        if bias is not None:
            operands["bias"] = known_memory(bias)
        steps = self._steps_of(loaded)
        with ordered(self._ordinal) as lane:
            for step in steps:
                lane.launch(step, operands)
        return write

    def _steps_of(self, loaded: Loaded) -> list[Step]:
        known, steps = self._steps
        if known is not loaded:
            steps = self._code.steps(loaded, self._fixed, self._activation)
            self._steps = (loaded, steps)
        return steps
