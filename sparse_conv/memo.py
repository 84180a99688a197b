"""A dictionary of things that are made when they are first asked for: Memo.

Knows threads. Knows nothing of what is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

_T = TypeVar("_T")


class Memo:
    """What was derived from an object, kept as long as the object keeps the Memo."""

    def __init__(self) -> None:
        """Makes an empty one."""
        self._made: dict[Hashable, Any] = {}
        self._lock = threading.RLock()

    def cached(self, key: Hashable, build: Callable[[], _T]) -> _T:
        """What `build` made for `key`; made once, also by several threads."""
        try:
            return self._made[key]
        except KeyError:
            with self._lock:
                if key not in self._made:
                    self._made[key] = build()
                return self._made[key]
