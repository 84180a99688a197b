"""`conv2d` by this package's own code, for tests that are about that code.

By default a call may be computed by TensorFlow's dense convolution, where that is
expected to be faster; `test_choice.py` is about that.
"""

from __future__ import annotations

import functools

import sparse_conv

conv2d = functools.partial(sparse_conv.conv2d, algorithm="generic")
