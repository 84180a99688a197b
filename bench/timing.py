"""Medians with their spread, samples taken in turns, and the time of a call.

The time of a call is what a program sees: several calls follow each other, then the
device is waited for. It includes all that Python and TensorFlow do on the host. What a
GPU alone needs is in `gate`.

Contenders are sampled in turns, so that a clock that drifts, or a neighbour on the
machine, meets all of them alike. Knows nothing of convolutions.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sparse_conv.streams import wait_for_devices

# A shorter sample shows the resolution, the wait at its end, and what the sample before
# left behind: cold caches, or a core that has to wake.
SAMPLE_S = 20e-3
MOST_CALLS = 20
# Where the middle half of the samples is wider than this part of their median, a
# neighbour was on the machine.
WIDE_SPREAD = 0.2


@dataclass(frozen=True, slots=True)
class Quartiles:
    """The middle of some samples and their spread, in microseconds.

    Attributes:
        q1: A quarter of the samples is below.
        median: Half of the samples is below.
        q3: Three quarters are below.
        samples: How many samples there are.
        calls: How many calls each sample is a mean of.
    """

    q1: float
    median: float
    q3: float
    samples: int
    calls: int

    @classmethod
    def of(cls, samples: list[float], calls: int) -> Quartiles:
        """The quartiles of `samples`, each the mean of `calls` calls."""
        q1, median, q3 = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
        return cls(q1, median, q3, len(samples), calls)

    @property
    def spread(self) -> float:
        """How wide the middle half of the samples is, as a part of the median."""
        return (self.q3 - self.q1) / self.median

    def as_dict(self) -> dict[str, float]:
        """What the results keep."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Sampler:
    """One way to take a sample.

    Attributes:
        sample: Microseconds a call.
        calls: Of how many calls its result is the mean.
    """

    sample: Callable[[], float]
    calls: int


@dataclass(frozen=True, slots=True)
class Effort:
    """How long and how often a contender is sampled.

    Attributes:
        seconds: After so long a contender is not sampled again.
        fewest: Except to have so many samples.
        most: It is never sampled more often.
        tries: All contenders are sampled anew while times are spread widely; so often
            at most.
    """

    seconds: float
    fewest: int = 3
    most: int = 101
    tries: int = 1


def in_turns(samplers: Mapping[str, Sampler], effort: Effort) -> dict[str, Quartiles]:
    """Samples all contenders in turns, anew while their times are spread widely.

    Args:
        samplers: How each contender is sampled, by name.
        effort: How long, and how often anew.

    Returns:
        Of the tries, the one in which the widest spread is the smallest.
    """
    tries = []
    for _ in range(effort.tries):
        tries.append(_one_try(samplers, effort))
        if _widest(tries[-1]) <= WIDE_SPREAD:
            break
    return min(tries, key=_widest)


def _widest(times: Mapping[str, Quartiles]) -> float:
    return max((quartiles.spread for quartiles in times.values()), default=0.0)


def _one_try(samplers: Mapping[str, Sampler], effort: Effort) -> dict[str, Quartiles]:
    """Samples all contenders in turns until each has had its share of time.

    Every other turn goes backwards, so that none always follows the same one: what a
    slow contender leaves behind, cold caches and a core asleep, would count against it.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    spent = dict.fromkeys(samplers, 0.0)
    waiting = set(samplers)
    order = list(samplers)
    while waiting:
        for name in [name for name in order if name in waiting]:
            begin = time.perf_counter()
            samples[name].append(samplers[name].sample())
            spent[name] += time.perf_counter() - begin
            taken = len(samples[name])
            enough = spent[name] >= effort.seconds and taken >= effort.fewest
            if enough or taken >= effort.most:
                waiting.remove(name)
        order.reverse()
    return {
        name: Quartiles.of(samples[name], samplers[name].calls) for name in samplers
    }


class Ring:
    """The last few outputs.

    An allocator hands out the memory of a dead tensor again. While the ring holds the
    last outputs, each call writes memory that left the cache. Contenders that share a
    ring hand each other their memory: where it lies costs a call up to 6 % on a CPU.
    """

    def __init__(self, size: int):
        """Makes an empty one for `size` outputs."""
        self._outputs: deque[Any] = deque(maxlen=max(1, size))

    def keep(self, output: Any) -> None:
        """Keeps `output` and lets go of the oldest one."""
        self._outputs.append(output)


def call_sampler(call: Callable[[int], Any], outputs: Ring) -> Sampler:
    """Samples the time of a call, host and device together.

    Args:
        call: Enqueues call number `i`; may return before the device is done.
        outputs: Keeps the last ones alive.

    Returns:
        The sampler. The calls it makes here are the warm-up.
    """
    _timed_calls(call, outputs, 1)
    estimate_s = min(_timed_calls(call, outputs, 1) for _ in range(2))
    calls = int(np.clip(SAMPLE_S / max(estimate_s, 1e-7), 1, MOST_CALLS))
    return Sampler(lambda: _timed_calls(call, outputs, calls) / calls * 1e6, calls)


def _timed_calls(call: Callable[[int], Any], outputs: Ring, calls: int) -> float:
    wait_for_devices()
    begin = time.perf_counter()
    for number in range(calls):
        outputs.keep(call(number))
    wait_for_devices()
    return time.perf_counter() - begin
