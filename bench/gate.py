"""What the GPU alone needs for a call, the host kept ahead of it.

TensorFlow needs some 50 us of the host to enqueue a convolution that takes the GPU 10.
So a function that does nothing but wait, the gate, is enqueued first, and all streams
of the context wait for it. Behind it the host enqueues N calls. When the gate opens,
they run without a gap. Time is taken by events of the GPU, from the opening of the gate
to the end of all work. The time of a call is that of 2 N calls less that of N, by N:
whatever happens once cancels.

Both sides are timed by this same method. What differs is how the N calls are enqueued:
- `tf.nn.conv2d`, and every call that launches nothing through `sparse_conv.streams`, is
  called. Its stream waits for the gate as all others do.
- Our calls ask TensorFlow for memory and wait for its stream meanwhile, that is for the
  gate. So each call is made once; its launches are recorded, with their operands, and
  enqueued again behind the gate. The caller checks that they compute the whole result.
  What a call spends on the order between streams is in its call time.

Before the gate, the L2 cache is overwritten, and the calls rotate through inputs and
outputs, so that none finds its data in the cache.

Knows CuPy, streams and events. Knows nothing of convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import tensorflow as tf

from bench import BenchError
from bench.gpu_code import Step
from bench.timing import Sampler
from sparse_conv import bridge, streams
from sparse_conv.bridge import Memory, Place
from sparse_conv.launch import Launch, pack_words

# A launch as it was enqueued: what has `run(operands, stream)`, and the operands.
Recorded = tuple[Any, Mapping[str, Memory]]

_FIRST_HOLD_NS = 200_000
# Longer than it takes to enqueue the most calls, by far.
_LONGEST_HOLD_NS = 400_000_000
# Device time of the N calls; less would drown in the jitter of the events.
_SAMPLE_US = 1500
_MOST_CALLS = 20


class GateError(BenchError):
    """The host could not stay ahead of the GPU."""


@contextmanager
def recorded_launches() -> Iterator[list[Recorded]]:
    """A context that yields the list of all launches that the package makes in it."""
    launches: list[Recorded] = []
    run = streams.Step.run

    def record(step: streams.Step, operands: Mapping[str, Memory], stream: Any) -> None:
        launches.append((step, operands))
        run(step, operands, stream)

    with mock.patch.object(streams.Step, "run", record):
        yield launches


class Gate:
    """A GPU with a gate; see the module."""

    def __init__(self, place: Place, l2_bytes: int):
        """Prepares the gate.

        Args:
            place: The GPU.
            l2_bytes: Size of its L2 cache.

        Raises:
            GateError: The driver has no events of a context.
        """
        if not streams.has_context_events():
            raise GateError(
                "Device times need a driver of CUDA 12.5 or newer, whose events order "
                "all streams of a context. Received: an older one"
            )
        import cupy

        self._cupy = cupy
        self._ordinal = bridge.ordinal_of(place)
        self._hold_ns = _FIRST_HOLD_NS
        cells = 2 * max(l2_bytes, 1 << 20) // tf.float32.size
        tensor = bridge.empty((cells,), tf.float32, place)
        self._scratch = bridge.memory_of(tensor)
        self._scratch_bytes = cells * tf.float32.size

    def sampler(self, enqueue: Callable[[int], None]) -> Sampler:
        """Samples the device time of a call.

        Args:
            enqueue: Enqueues that many calls and does not wait for them.

        Returns:
            The sampler.

        Raises:
            GateError: `enqueue` waits for the GPU.
        """
        self._hold_ns = _FIRST_HOLD_NS
        self._time_us(enqueue, 1)
        estimate_us = self._time_us(enqueue, 2) / 2
        calls = int(np.clip(_SAMPLE_US / max(estimate_us, 1e-3), 1, _MOST_CALLS))

        def sample() -> float:
            once = self._time_us(enqueue, calls)
            return (self._time_us(enqueue, 2 * calls) - once) / calls

        return Sampler(sample, calls)

    def replay(self, calls: list[list[Recorded]]) -> Callable[[int], None]:
        """An `enqueue` that makes recorded launches again, call after call in turns."""
        position = 0

        def enqueue(count: int) -> None:
            nonlocal position
            with streams.ordered(self._ordinal) as lane:
                for _ in range(count):
                    for step, operands in calls[position % len(calls)]:
                        step.run(operands, lane.stream)
                    position += 1

        return enqueue

    def fill(self, memory: Memory, size: int, byte: int) -> None:
        """Sets all bytes of some memory; poisons an output, for example."""
        with streams.ordered(self._ordinal) as lane:
            self._cupy.cuda.runtime.memsetAsync(
                memory.address, byte, size, lane.stream.ptr
            )

    def _time_us(self, enqueue: Callable[[int], None], count: int) -> float:
        """From the gate's opening to the end of `count` calls, in microseconds."""
        while True:
            elapsed_us = self._try_time_us(enqueue, count)
            if elapsed_us is not None:
                return elapsed_us
            self._hold_ns *= 2
            if self._hold_ns > _LONGEST_HOLD_NS:
                raise GateError(
                    "The host must enqueue the calls while the gate is shut. Received: "
                    f"calls that wait for the GPU, or need more than "
                    f"{_LONGEST_HOLD_NS // 1_000_000} ms"
                )

    def _try_time_us(self, enqueue: Callable[[int], None], count: int) -> float | None:
        """As `_time_us`; None if the gate was open before all was enqueued."""
        start, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        self.fill(self._scratch, self._scratch_bytes, 0)
        with streams.ordered(self._ordinal) as lane:
            self._shut(lane.stream)
            start.record(lane.stream)
        enqueue(count)
        ahead = not start.done
        # The lane waits for all work of the context as it enters.
        with streams.ordered(self._ordinal) as lane:
            end.record(lane.stream)
        end.synchronize()
        if not ahead:
            return None
        return self._cupy.cuda.get_elapsed_time(start, end) * 1e3

    def _shut(self, stream: Any) -> None:
        constants = pack_words([self._hold_ns], [])
        launch = Launch("bench_gate", (), (1, 1, 1), (1, 1, 1), 0, (), constants)
        Step("gpu", launch, self._ordinal).run({}, stream)


def clocked_us(enqueue: Callable[[Any], None], ordinal: int, repeats: int) -> float:
    """The shortest time of what `enqueue` puts on a stream, in microseconds."""
    import cupy

    times = []
    for _ in range(repeats):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        with streams.ordered(ordinal) as lane:
            start.record(lane.stream)
            enqueue(lane.stream)
            end.record(lane.stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) * 1e3)
    return min(times)
