"""SparseKernel: the values and the pattern of a pruned kernel, converted once.

Knows TensorFlow's tensors, variables and checkpoints. Knows no back end.
"""

from __future__ import annotations

import io
import numbers
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from sparse_conv.memo import Memo
from sparse_conv.pattern import Pattern
from sparse_conv.problem import INT32_MAX

if TYPE_CHECKING:
    from sparse_conv.explanation import Explanation

_DTYPES = (tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.int32)


class SparseKernel(tf.Module):
    """A convolution kernel that keeps its nonzeros only.

    `sparse_conv.conv2d(x, kernel, ...)` is equivalent to
    `tf.nn.conv2d(x, kernel.to_dense(), ...)`. The pattern is fixed; the values may be a
    trainable variable, and gradients go to them alone.

    Attributes:
        values: (nnz,) tensor or variable. Ordered by output channel k, then by
            `(c * R + r) * S + s`.
        pattern: Where the values belong.
        memo: What calls keep for the next ones; of no use to others.

    Example:
    >>> kernel = sparse_conv.SparseKernel.from_dense(dense)
    >>> y = sparse_conv.conv2d(x, kernel, strides=1, padding="SAME")
    """

    def __init__(
        self,
        values: tf.Tensor | tf.Variable,
        pattern: Pattern,
        name: str | None = None,
    ):
        """Joins values and a pattern; `from_dense` is the usual way to make a kernel.

        Args:
            values: (nnz,) tensor or variable of a dtype that `conv2d` takes.
            pattern: The positions of the values.
            name: Name of the module.

        Raises:
            ValueError: `values` does not have one element for each position.
            TypeError: `conv2d` does not take the dtype.
        """
        super().__init__(name=name)
        check_dtype("values", values.dtype)
        if tuple(values.shape) != (pattern.nnz,):
            raise ValueError(
                "`values` must have one element for each nonzero of the pattern. "
                f"Received: values of shape {tuple(values.shape)}, nnz={pattern.nnz}"
            )
        self.values = values
        self.pattern = pattern
        # What calls keep for the next ones.
        self.memo = Memo()
        self._is_in_graph = False
        # What a checkpoint holds besides a variable's values.
        self._compressed = _CompressedState(self)

    @classmethod
    def from_dense(
        cls,
        dense: Any,
        threshold: float = 0.0,
        mask: Any = None,
        trainable: bool = False,
        name: str | None = None,
    ) -> SparseKernel:
        """Keeps the weights of a dense kernel that are not zero.

        The conversion runs on the device where `dense` lives.

        Args:
            dense: (R, S, C / groups, K) tensor, variable or array.
            threshold: Keeps weights with an absolute value above it.
            mask: (R, S, C / groups, K) booleans; keeps weights where it is true. A kept
                weight may be 0: with a mask, the pattern is the mask's, less what the
                threshold removes when that is above 0.
            trainable: Whether `values` is a trainable variable.
            name: Name of the module.

        Returns:
            The SparseKernel.

        Raises:
            ValueError: A shape is wrong, or `threshold` is negative or NaN.
            TypeError: `conv2d` does not take the dtype, or `threshold` is no number.
        """
        dense = _dense_tensor(dense)
        if not isinstance(threshold, numbers.Real):
            raise TypeError(
                f"`threshold` must be a number. Received: threshold={threshold!r}"
            )
        if not threshold >= 0:
            raise ValueError(
                f"`threshold` must be at least 0. Received: threshold={threshold!r}"
            )
        kept = _kept(dense, threshold, mask)
        # Rows are output channels and input channels come before taps: see Pattern.
        order = (3, 2, 0, 1)
        kept = tf.reshape(tf.transpose(kept, order), [-1])
        places = tf.reshape(tf.where(kept), [-1])
        values = tf.gather(tf.reshape(tf.transpose(dense, order), [-1]), places)
        pattern = _pattern(tuple(dense.shape), places.numpy())
        if trainable:
            values = tf.Variable(values, name="values")
        return cls(values, pattern, name)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(R, S, C / groups, K), the shape of the dense kernel."""
        return self.pattern.shape

    @property
    def is_constant(self) -> bool:
        """Whether the values stay the same: they are not a variable."""
        return not isinstance(self.values, tf.Variable)

    @property
    def dtype(self) -> tf.DType:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def nnz(self) -> int:
        """Number of weights kept."""
        return self.pattern.nnz

    @property
    def density(self) -> float:
        """Weights kept, as a fraction of all."""
        return self.pattern.density

    def to_dense(self) -> tf.Tensor:
        """The (R, S, C / groups, K) kernel with its zeros; differentiable."""
        positions = self.pattern.cached("positions", self.pattern.positions)
        size = int(np.prod(self.shape, dtype=np.int64))
        flat = tf.scatter_nd(
            tf.constant(positions[:, np.newaxis], tf.int64),
            tf.convert_to_tensor(self.values),
            tf.constant([size], tf.int64),
        )
        return tf.reshape(flat, self.shape)

    def prepare(
        self,
        input_shape: Sequence[int],
        strides: Any,
        padding: Any,
        data_format: str | None = "NHWC",
        dilations: Any = None,
        *,
        algorithm: str = "auto",
        backend: str | None = None,
        device: str | None = None,
        measure: bool = False,
        passes: Sequence[str] = ("fprop", "dgrad", "wgrad"),
    ) -> Explanation:
        """Compiles or loads what calls of this shape will use, ahead of them.

        Args:
            input_shape: Shape of the input.
            strides: As for `conv2d`; so are the arguments up to `backend`.
            padding: "SAME", "VALID" or explicit.
            data_format: "NHWC" or "NCHW".
            dilations: None means 1.
            algorithm: The algorithm that the calls will ask for.
            backend: The back end that the calls will ask for.
            device: Where the operands will live, such as "/GPU:0"; None means where the
                values are.
            measure: Whether to time all algorithms. From then on, calls of exactly this
                shape, dtype and device and at TensorFlow's present precision take the
                fastest one, as long as the kernel lives; `explain` shows it. On a GPU,
                the ten tiles that are expected to be best for generated code are
                compiled and compared before, for this and all kernels that share the
                pattern. Tiles decide the order of sums: results may differ in their
                last bits from those of other tiles.
            passes: Those that will be used, of "fprop", "dgrad" and "wgrad".

        Returns:
            What was chosen, and why.

        Raises:
            ValueError: As `conv2d`, an extent is 0, or a pass has no such name.
            NotImplementedError: No back end computes there.
        """
        # Calls take kernels, and this asks how a call would be computed.
        from sparse_conv.explanation import prepare

        return prepare(
            self, input_shape, strides, padding, data_format, dilations,
            algorithm=algorithm, backend=backend, device=device, measure=measure,
            passes=passes,
        )  # fmt: skip

    def with_values(self, values: tf.Tensor | tf.Variable) -> SparseKernel:
        """A kernel with the same pattern, shared, and other values."""
        return SparseKernel(values, self.pattern, self.name)

    def graph_values(self) -> tf.Tensor:
        """The values as an operand of a graph that is being built."""
        self._is_in_graph = True
        return tf.convert_to_tensor(self.values)

    def restore_values(self, values: tf.Tensor) -> None:
        """Takes over values from a checkpoint, unless a variable holds them.

        Raises:
            ValueError: A `tf.function` was traced with other values, and would go on
                with them.
        """
        if self._is_in_graph and not np.array_equal(values, self.values):
            raise ValueError(
                "A kernel must be restored before a tf.function is traced with it, or "
                f"be made with trainable=True. Received: other values for {self!r}"
            )
        self.values = values

    def __repr__(self) -> str:
        """Shape, dtype, number of nonzeros and density."""
        height, width, channels, outputs = self.shape
        trainable = getattr(self.values, "trainable", False)
        return (
            f"<SparseKernel {height}x{width}x{channels}x{outputs} {self.dtype.name}, "
            f"{self.nnz} nonzeros, density {self.density:.3g}"
            f"{', trainable' if trainable else ''}>"
        )


class _CompressedState(tf.train.experimental.PythonState):
    """The pattern, and the values where no variable holds them, in a checkpoint."""

    def __init__(self, kernel: SparseKernel):
        # Weak, so that a kernel and its memory on a GPU die with its last reference.
        self._reference = weakref.ref(kernel)

    @property
    def _kernel(self) -> SparseKernel:
        kernel = self._reference()
        if kernel is None:
            raise ReferenceError(
                "The SparseKernel of this checkpoint no longer exists."
            )
        return kernel

    def serialize(self) -> bytes:
        """The compressed arrays as the bytes of an .npz archive."""
        pattern = self._kernel.pattern
        arrays = {
            "shape": np.asarray(pattern.shape, np.int64),
            "indptr": pattern.indptr,
            "indices": pattern.indices,
        }
        if not isinstance(self._kernel.values, tf.Variable):
            # As bytes: the .npy format does not know bfloat16.
            values = np.ascontiguousarray(self._kernel.values.numpy())
            arrays["values"] = values.view(np.uint8)
            arrays["dtype"] = np.asarray(self._kernel.dtype.name)
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        return file.getvalue()

    def deserialize(self, string_value: bytes) -> None:
        """Checks the pattern against the kernel's own and takes the values over.

        Raises:
            ValueError: The checkpoint is of a kernel with another pattern or dtype.
        """
        kernel = self._kernel
        archive = np.load(io.BytesIO(string_value), allow_pickle=False)
        shape = tuple(archive["shape"].tolist())
        same = (
            shape == kernel.pattern.shape
            and np.array_equal(archive["indptr"], kernel.pattern.indptr)
            and np.array_equal(archive["indices"], kernel.pattern.indices)
        )
        if not same:
            raise ValueError(
                "A checkpoint can be restored only into a kernel of the same pattern. "
                f"Received: shape {shape} with "
                f"{len(archive['indices'])} nonzeros for {kernel!r}"
            )
        if "values" not in archive or isinstance(kernel.values, tf.Variable):
            return
        if str(archive["dtype"]) != kernel.dtype.name:
            raise ValueError(
                "A checkpoint can be restored only into a kernel of the same dtype. "
                f"Received: {archive['dtype']} for {kernel!r}"
            )
        values = archive["values"].view(kernel.dtype.as_numpy_dtype)
        with tf.device(kernel.values.device):
            kernel.restore_values(tf.constant(values))


def check_dtype(name: str, dtype: tf.DType) -> None:
    """Raises a TypeError unless `conv2d` takes tensors of this dtype."""
    if dtype not in _DTYPES:
        raise TypeError(
            f"`{name}` must have one of the dtypes "
            f"{', '.join(allowed.name for allowed in _DTYPES)}. "
            f"Received: {name} of dtype {dtype.name}"
        )


def _dense_tensor(dense: Any) -> tf.Tensor:
    try:
        tensor = tf.convert_to_tensor(dense)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "`dense` must be a tensor, a variable or an array. "
            f"Received: dense of type {type(dense).__name__}"
        ) from error
    if not tf.executing_eagerly():
        raise TypeError(
            "A SparseKernel is made outside of a graph, from weights that are known. "
            f"Received: {dense!r} while tracing a tf.function"
        )
    check_dtype("dense", tensor.dtype)
    if tensor.shape.rank != 4:
        raise ValueError(
            "`dense` must have 4 dimensions (height, width, input channels per group, "
            f"output channels). Received: dense of shape {tuple(tensor.shape)}"
        )
    if tensor.shape.num_elements() > INT32_MAX:
        raise NotImplementedError(
            "A kernel of more than 2^31 - 1 weights is not supported. "
            f"Received: dense of shape {tuple(tensor.shape)}"
        )
    return tensor


def _kept(dense: tf.Tensor, threshold: float, mask: Any) -> tf.Tensor:
    if mask is None:
        return dense != 0 if threshold == 0 else _above(dense, threshold)
    mask = tf.convert_to_tensor(mask)
    if mask.dtype != tf.bool:
        raise TypeError(
            f"`mask` must be boolean. Received: mask of dtype {mask.dtype.name}"
        )
    if mask.shape != dense.shape:
        raise ValueError(
            "`mask` must have the shape of `dense`. Received: mask of shape "
            f"{tuple(mask.shape)}, dense of shape {tuple(dense.shape)}"
        )
    return mask if threshold == 0 else mask & _above(dense, threshold)


def _above(dense: tf.Tensor, threshold: float) -> tf.Tensor:
    # Not `abs(dense) > threshold`: that would drop NaN, which is no zero, and the least
    # integer, which has no absolute value.
    bound = tf.cast(threshold, dense.dtype)
    return ~((dense <= bound) & (dense >= -bound))


def _pattern(shape: Sequence[int], places: np.ndarray) -> Pattern:
    """The pattern of the weights at `places` of the kernel in (K, C, R, S) order."""
    height, width, channels, outputs = shape
    row_length = channels * height * width
    starts = np.arange(outputs + 1, dtype=np.int64) * row_length
    indptr = np.searchsorted(places, starts).astype(np.int32)
    indices = (places % row_length if row_length else places).astype(np.int32)
    return Pattern((height, width, channels, outputs), indptr, indices)
