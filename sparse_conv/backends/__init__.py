"""The back ends, and the choice between them.

A back end is a module with

    unavailable() -> str | None           why this machine can't use it
    reason_against(place, dtype, forced) -> str | None    why it can't compute there
    fprop(problem, dtype, place, pattern, *, algorithm, waits, constant, has_bias,
        activation, shape) -> run(x, w[, bias]) -> y
    dgrad(problem, dtype, place, pattern, *, algorithm, waits, constant, shape)
        -> run(dy, w) -> dx
    wgrad(problem, dtype, place, pattern, *, algorithm) -> run(x, dy) -> dw
    machine(place) -> costs.Machine       what its costs depend on besides the problem
    estimates(pass_name, problem, dtype, place, nnz, constant, sparse)
        -> tuple[costs.Estimate, ...]     what each of its algorithms would take
    nonzeros(w) -> int | None             those of a dense kernel, None if not cheap
    finish_compiling() -> None            waits for what it compiles in the background
    tune(pass_name, problem, dtype, place, pattern, read, w) -> None
                                          chooses by times how "baked" computes a pass
    tuned(pass_name, problem, dtype, place, pattern) -> str | None
                                          what was chosen so
    caches() -> list[Path]                where its compiled code is kept

Each pass is prepared for one problem and place, and then run on eager tensors that live
there. `w` holds the values of `pattern`, or is the dense HWIO kernel when `pattern` is
None; `dw` likewise. `shape` is the result's, with all its batch dimensions. No extent
is 0. Back ends are imported when they are first needed.

`algorithm` is "generic" or "baked"; `waits` tells whether the latter's first call waits
for its compiler, or the former computes until the code is there. `estimates` has both,
in this order, and is a pure and cached function; `nnz` is the number of weights that
are visited, `constant` tells a SparseKernel whose values stay the same from one that is
trained and from a dense kernel, and `sparse` both of the former from a dense kernel,
whose zeros may be others in the next call. The gradient to a dense kernel visits all.
"dense", TensorFlow's own convolution, belongs to no back end: see `sparse_conv.dense`.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

import tensorflow as tf

from sparse_conv.bridge import Place

NAMES = ("cuda", "cpu")
# In which order they are asked; for host memory, CUDA's is not even imported.
_ORDER = {"GPU": ("cuda", "cpu"), "CPU": ("cpu", "cuda")}


@functools.cache
def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"sparse_conv.backends.{name}")


def check_name(requested: str | None) -> None:
    """Raises a ValueError unless `requested` is None or the name of a back end."""
    if requested is not None and requested not in NAMES:
        raise ValueError(
            f"`backend` must be None or one of {', '.join(NAMES)}. "
            f"Received: backend={requested!r}"
        )


@functools.lru_cache(maxsize=256)
def select(place: Place, dtype: tf.DType, requested: str | None) -> ModuleType:
    """The first back end that computes at `place`, or the requested one.

    Args:
        place: Where the operands live.
        dtype: Their dtype.
        requested: "cuda", "cpu", or None to choose.

    Returns:
        The module of the back end.

    Raises:
        NotImplementedError: The requested one, or every one, can't; says why.
    """
    reasons = []
    for name in (requested,) if requested else _ORDER[place.kind]:
        backend = _backend(name)
        reason = backend.reason_against(place, dtype, requested is not None)
        if reason is None:
            return backend
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(
        f"No back end computes this convolution: {'; '.join(reasons)}. "
        f"Received: {dtype.name} tensors on {place.device}"
    )


def unavailable(name: str) -> str | None:
    """Why this machine can't use the back end of that name; None if it can."""
    return _backend(name).unavailable()


def statuses() -> list[tuple[str, str | None]]:
    """Each back end's name, and why this machine can't use it; None if it can."""
    return [(name, unavailable(name)) for name in NAMES]


def caches() -> list[Path]:
    """The directories that hold code compiled by the back ends."""
    return [path for name in NAMES for path in _backend(name).caches()]
