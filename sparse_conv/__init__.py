"""Convolution with sparse kernels for TensorFlow.

`sparse_conv.conv2d(x, kernel, ...)` is equivalent to
`tf.nn.conv2d(x, kernel.to_dense(), ...)` and skips the zeros of the kernel.
"""

from sparse_conv.explanation import Explanation as Explanation
from sparse_conv.explanation import explain as explain
from sparse_conv.ops import conv2d as conv2d
from sparse_conv.sparse_kernel import SparseKernel as SparseKernel

__version__ = "0.1.0"

__all__ = ["Explanation", "SparseKernel", "__version__", "conv2d", "explain"]
