"""Hypothesis profiles and the back ends that the public tests run on.

Changes none of TensorFlow's settings but the amount of its logging, so that the tests
meet the defaults that users meet: the memory policy above all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

_COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
# Without a random part, so that a change is only ever blamed for what it did.
settings.register_profile("default", max_examples=100, derandomize=True, **_COMMON)
settings.register_profile("thorough", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@dataclass(frozen=True)
class Backend:
    """A back end under test.

    Attributes:
        name: What `conv2d` calls it.
        device: The TensorFlow device that its tensors live on.
    """

    name: str
    device: str


@pytest.fixture(
    scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """A usable back end; tensors made during the test live on its device."""
    import tensorflow as tf

    chosen = Backend(request.param, "/CPU:0" if request.param == "cpu" else "/GPU:0")
    if chosen.name != "cpu":
        skip_unless_usable(chosen.name)
    with tf.device(chosen.device):
        yield chosen


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """One process where there is a GPU, whose memory TensorFlow takes as a whole."""
    del config
    from sparse_conv import backends

    usable = dict(backends.statuses())["cuda"] is None
    return 1 if usable else None


def skip_unless_usable(name: str) -> None:
    """Skips the test, with the back end's own reason, where it can't run."""
    from sparse_conv import backends

    reason = dict(backends.statuses())[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
