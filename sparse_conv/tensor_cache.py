"""What a back end derived from a tensor, kept for as long as the tensor lives.

Eager tensors never change, so a dense kernel is converted once for each tensor object.
Knows nothing of what is kept.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import tensorflow as tf

_entries: dict[int, tuple[weakref.ref, dict[Hashable, Any]]] = {}
# Reentrant, since the garbage collector may call `forget` while it is held.
_lock = threading.RLock()


def cached(tensor: tf.Tensor, key: Hashable, build: Callable[[], Any]) -> Any:
    """What `build` made for this tensor object and `key`, made now if it wasn't yet."""
    derived = _derived(tensor)
    if key not in derived:
        derived[key] = build()
    return derived[key]


def _derived(tensor: tf.Tensor) -> dict[Hashable, Any]:
    identity = id(tensor)
    entry = _entries.get(identity)
    if entry is not None and entry[0]() is tensor:
        return entry[1]
    with _lock:
        entry = _entries.get(identity)
        if entry is None or entry[0]() is not tensor:
            # Bound here: when the process ends, the module's names go first.
            def forget(
                reference: weakref.ref, entries: dict = _entries, lock: Any = _lock
            ) -> None:
                with lock:
                    current = entries.get(identity)
                    if current is not None and current[0] is reference:
                        del entries[identity]

            entry = (weakref.ref(tensor, forget), {})
            _entries[identity] = entry
        return entry[1]
