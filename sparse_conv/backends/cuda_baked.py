"""Passes by code that is generated for one kernel: when it is made, and how it is kept.

The code belongs to a tensor of values. While it is compiled in the background, and for
other values, the functions that read pattern and values serve. Knows threads and
compiled functions; which code that is, `baked` knows.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import tensorflow as tf

from sparse_conv import baked, bridge, jit
from sparse_conv.baked import BakedBlock, BakedFunction
from sparse_conv.bridge import Memory, Place
from sparse_conv.gather import Gather
from sparse_conv.pattern import Rows
from sparse_conv.streams import Step, ordered
from sparse_conv.tensor_cache import cached

# Code is generated for values once they have been used so often: what is called once
# or twice is over before it would be ready.
_USES = 3
# Kernels whose code is generated at a time, and functions that are compiled at a time.
_KERNELS = 4
_COMPILERS = 4
# For so many shapes of a kernel code is generated unasked; with a new shape in every
# call the compiler would never rest, and memory would fill up.
_SHAPES = 16
# Vectors are copied and stored 16 bytes at a time.
_ALIGNMENT = 16

_Loaded = list[tuple[BakedFunction, Any]]

_lock = threading.Lock()
_pending: set[Future] = set()


def finish_compiling() -> None:
    """Waits for all code that is being compiled.

    Raises:
        CompileError: Some of it didn't compile.
    """
    for future in wait(list(_pending)).done:
        future.result()


class _State:
    """How far the code for one tensor of values is.

    Attributes:
        values: Held, so that no other tensor can have this one's memory.
        address: Of the values.
        uses: Calls that would have used the code.
        future: The compiled functions; None before the compiler was started.
    """

    def __init__(self, values: tf.Tensor, address: int):
        self.values = values
        self.address = address
        self.uses = 0
        self.future: Future | None = None


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
        self.rows = rows
        self.dtype = dtype
        self.block = block
        self.place = place
        self._shapes = shapes
        self._state: _State | None = None

    def loaded(self, values: tf.Tensor, *, waits: bool) -> _Loaded | None:
        """The compiled functions for these values.

        Args:
            values: The kernel's values. A graph hands the same memory over in a new
                tensor at each call.
            waits: Whether to wait for the compiler.

        Returns:
            The functions; None while they aren't ready.

        Raises:
            CompileError: The code didn't compile.
        """
        # Read once: another thread may come with other values at any time.
        state = self._state
        if state is None or values is not state.values:
            address = _memory(values).address
            if state is None or address != state.address:
                state = self._state = _State(values, address)
        if state.future is None:
            state.uses += 1
            if not waits and (state.uses < _USES or self._is_one_too_many()):
                return None
            self._start(state)
        if not waits and not state.future.done():
            return None
        return state.future.result()

    def _is_one_too_many(self) -> bool:
        return self.gather not in self._shapes and len(self._shapes) >= _SHAPES

    def _start(self, state: _State) -> None:
        """Starts the compiler, unless another thread has done so."""
        with _lock:
            if state.future is None:
                self._shapes.add(self.gather)
                reference = weakref.ref(self)
                state.future = _submit(lambda: _compile(reference, state.values))


@functools.cache
def _executors() -> tuple[ThreadPoolExecutor, ThreadPoolExecutor]:
    """Threads for kernels, which wait for the second ones, those for functions."""
    return (
        ThreadPoolExecutor(_KERNELS, "sparse_conv_kernel"),
        ThreadPoolExecutor(_COMPILERS, "sparse_conv_compiler"),
    )


def _submit(job: Callable[[], Any]) -> Future:
    future = _executors()[0].submit(job)
    _pending.add(future)
    future.add_done_callback(_pending.discard)
    return future


def _compile(reference: weakref.ref, values: tf.Tensor) -> _Loaded:
    """Generates, compiles and loads; gives up on a kernel that no longer exists."""
    code = reference()
    rows = None if code is None else code.rows()
    if rows is None or not threading.main_thread().is_alive():
        return []
    wide = tf.cast(values, tf.float32) if values.dtype.size == 2 else values
    functions = baked.bake(
        code.gather, rows, np.asarray(wide), code.dtype.name, code.block
    )
    ordinal = bridge.ordinal_of(code.place)

    def load(function: BakedFunction) -> tuple[BakedFunction, Any]:
        launch = baked.baked_launch(code.gather, code.dtype.name, code.block, function)
        compiled = jit.load_function(
            launch.function, launch.defines, ordinal, launch.code
        )
        # The text has served.
        return BakedFunction("", function.parts), compiled

    return list(_executors()[1].map(load, functions))


def baked_run(
    code: BakedCode,
    activation: int,
    fixed: Mapping[str, Memory],
    shape: tuple[int, ...],
    generic: Callable[..., tf.Tensor],
    *,
    waits: bool,
) -> Callable[..., tf.Tensor]:
    """The function of a pass.

    Args:
        code: The pass's code.
        activation: Code of the activation.
        fixed: The memory of operands that are the same at each use.
        shape: The result's.
        generic: The same pass by functions that read pattern and values.
        waits: Whether the first call waits for the compiler.
    """
    ordinal = bridge.ordinal_of(code.place)
    known: tuple[Any, list[Step]] = (None, [])

    def steps_of(loaded: _Loaded) -> list[Step]:
        nonlocal known
        if known[0] is not loaded:
            name, block = code.dtype.name, code.block
            steps = []
            for function, compiled in loaded:
                launch = baked.baked_launch(
                    code.gather, name, block, function, activation
                )
                steps.append(Step(launch, ordinal, fixed, compiled))
            known = (loaded, steps)
        return known[1]

    def run(read: tf.Tensor, w: tf.Tensor, bias: tf.Tensor | None = None) -> tf.Tensor:
        loaded = code.loaded(w, waits=waits)
        source = _memory(read)
        if loaded is None or source.address % _ALIGNMENT:
            return generic(read, w, bias)
        write, memory = bridge.output(shape, code.dtype, code.place)
        operands = {"read": source, "write": memory}
        if bias is not None:
            operands["bias"] = _memory(bias)
        with ordered(ordinal) as lane:
            for step in steps_of(loaded):
                lane.launch(step, operands)
        return write

    return run


def _memory(tensor: tf.Tensor) -> Memory:
    return cached(tensor, "memory", lambda: bridge.memory_of(tensor))
