"""Tensors of TensorFlow as memory that a back end can read and fill, without copies.

Knows where a tensor lives, how to allocate one with TensorFlow's allocator, and how to
look at its memory. Launches and their order are in `streams`; convolutions are
unknown here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from sparse_conv.tensor_cache import cached
from sparse_conv.tf_internals import device_scope

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Place(NamedTuple):
    """Where a tensor's memory is.

    Attributes:
        kind: "CPU" or "GPU".
        index: Number of the GPU among TensorFlow's; 0 for the CPU.
        device: TensorFlow's name of the device.
    """

    kind: str
    index: int
    device: str


HOST = Place("CPU", 0, "/job:localhost/replica:0/task:0/device:CPU:0")


@functools.cache
def gpu_place(index: int) -> Place:
    """Where tensors on TensorFlow's GPU of that number live."""
    return _parse(f"/job:localhost/replica:0/task:0/device:GPU:{index}")


@functools.cache
def _parse(device: str) -> Place:
    spec = tf.DeviceSpec.from_string(device)
    return Place(spec.device_type or "CPU", spec.device_index or 0, device)


def place_of(tensor: tf.Tensor) -> Place:
    """Where an eager tensor's memory is; for int32, TensorFlow uses the host's."""
    return _parse(tensor.backing_device)


def at(place: Place) -> contextlib.AbstractContextManager:
    """TensorFlow's scope of a device, which takes 10 us, where it makes a difference.

    Outside of all scopes, eager operations run on the first GPU if there is one.
    """
    if (device_scope() or _first_place().device) == place.device:
        return contextlib.nullcontext()
    return tf.device(place.device)


@functools.cache
def _first_place() -> Place:
    return gpu_place(0) if tf.config.list_logical_devices("GPU") else HOST


class DLTensor(ctypes.Structure):
    """The head of DLPack's DLManagedTensor, see https://dmlc.github.io/dlpack."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint32),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class Memory(NamedTuple):
    """A tensor's memory; valid as long as this object lives.

    Attributes:
        address: First byte, 0 for an empty tensor.
        owner: What keeps the memory alive.
    """

    address: int
    owner: object


def memory_of(tensor: tf.Tensor) -> Memory:
    """The memory of an eager tensor, once what computes its contents is done.

    `to_dlpack` waits for the work that TensorFlow has enqueued on the tensor's device.
    """
    capsule = tf.experimental.dlpack.to_dlpack(tensor)
    head = DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    return Memory((head.data or 0) + head.byte_offset, capsule)


def known_memory(tensor: tf.Tensor) -> Memory:
    """`memory_of`, looked up once for each tensor object.

    Every look-up waits for TensorFlow's stream, and the passes of a training step share
    their operands.
    """
    return cached(tensor, "memory", lambda: memory_of(tensor))


@functools.lru_cache(maxsize=1024)
def shape_tensor(shape: tuple[int, ...]) -> tf.Tensor:
    """A shape as a tensor in host memory, which TensorFlow takes faster.

    Raises:
        ValueError: An extent is too large; TensorFlow would take its low bits alone.
    """
    if max(shape, default=0) >= 2**31:
        raise ValueError(f"An extent must be below 2^31. Received: {shape}")
    with tf.init_scope(), tf.device("/CPU:0"):
        return tf.constant(shape, tf.int32, shape=(len(shape),))


def empty(shape: tuple[int, ...], dtype: tf.DType, place: Place) -> tf.Tensor:
    """A tensor with arbitrary contents from the allocator of its device."""
    with at(place):
        return tf.raw_ops.Empty(shape=shape_tensor(shape), dtype=dtype)


def output(
    shape: tuple[int, ...], dtype: tf.DType, place: Place
) -> tuple[tf.Tensor, Memory]:
    """A tensor with arbitrary contents on a GPU, and its memory.

    Making a tensor costs TensorFlow 20 us, as long as a small convolution takes, and to
    learn its address takes as long again. Small ones are therefore parts of larger
    tensors that a pool keeps, see `_pool`; the memory of larger ones is used again, see
    `Shelf`; the largest are TensorFlow's.
    """
    pooled = _POOLED.get(dtype)
    size = math.prod(shape) * dtype.size
    cupy = _cupy()
    # CuPy labels memory with the current GPU, and TensorFlow reads the label.
    labelled = cupy.cuda.runtime.getDevice() == ordinal_of(place) == place.index
    block = None
    if pooled is not None and labelled:
        if size <= _POOLED_BYTES:
            block = _pool(place).malloc(size)
        elif size <= shelf(place).most_bytes:
            block = shelf(place).take(size)
    if block is None:
        tensor = empty(shape, dtype, place)
        return tensor, memory_of(tensor)
    capsule = cupy.ndarray(shape, pooled, block).__dlpack__()
    return tf.experimental.dlpack.from_dlpack(capsule), Memory(block.ptr, block)


@functools.cache
def _cupy() -> ModuleType:
    import cupy

    return cupy


@functools.cache
def ordinal_of(place: Place) -> int:
    """CUDA's number of a GPU, which TensorFlow may count otherwise."""
    # Who asks first may be building a graph.
    with tf.init_scope():
        # Not int32, which TensorFlow would put into host memory.
        probe = memory_of(empty((1,), tf.float32, place))
    return _cupy().cuda.runtime.pointerGetAttributes(probe.address).device


# CuPy has no bfloat16.
_POOLED = {
    tf.float16: np.dtype("e"),
    tf.float32: np.dtype("f"),
    tf.float64: np.dtype("d"),
}
_POOLED_BYTES = 1 << 20
_POOL_BYTES = 64 << 20
# A shelf holds this part of TensorFlow's memory, at most.
_SHELF_PART = 64
_ROW_BYTES = 4096


@functools.cache
def _pool(place: Place) -> Any:
    """A CuPy pool of memory that TensorFlow allocated on one GPU.

    A block returns to the pool when the tensor made of it dies. Its next user may then
    write it, because every launch waits for all work that the context has by then.
    """
    cupy = _cupy()
    tensors = {}

    def allocate(size: int, device: int) -> int:
        del device
        if pool.total_bytes() > _POOL_BYTES:
            pool.free_all_blocks()
        tensor = empty((size,), tf.uint8, place)
        memory = memory_of(tensor)
        tensors[memory.address] = memory
        return memory.address

    def free(address: int, device: int) -> None:
        del device
        tensors.pop(address, None)

    allocator = cupy.cuda.PythonFunctionAllocator(allocate, free)
    pool = cupy.cuda.MemoryPool(allocator.malloc)
    return pool


class Shelf:
    """Memory of large tensors that have died, by its size, for others of that size.

    Its next user may write it at once, because every launch waits for all work that the
    context has by then. There is no lock: what returns may come from a garbage
    collection at any place, and each step on a list or a dictionary is atomic.

    Attributes:
        most_bytes: What it holds at most, a small part of what TensorFlow has.
    """

    def __init__(self, place: Place):
        self._place = place
        self._idle: dict[int, list[Memory]] = {}
        with _cupy().cuda.Device(ordinal_of(place)) as device:
            total = device.mem_info[1]
        self.most_bytes = min(total, _configured_bytes(place) or total) // _SHELF_PART

    def take(self, size: int) -> Any:
        """A CuPy pointer to memory of this size, which returns when nobody has it."""
        try:
            memory = self._idle[size].pop()
        except (KeyError, IndexError):
            memory = self._new(size)
        cuda = _cupy().cuda
        loan = _Loan(self, memory, size)
        device = ordinal_of(self._place)
        return cuda.MemoryPointer(
            cuda.UnownedMemory(memory.address, size, loan, device), 0
        )

    def _new(self, size: int) -> Memory:
        # In rows, because TensorFlow's extents have 32 bits.
        shape = (-(-size // _ROW_BYTES), _ROW_BYTES)
        try:
            return memory_of(empty(shape, tf.uint8, self._place))
        except tf.errors.ResourceExhaustedError:
            self._idle = {}
        return memory_of(empty(shape, tf.uint8, self._place))

    def put(self, memory: Memory, size: int) -> None:
        """Keeps memory, but lets go of all that is idle before it would be too much."""
        if size > self.most_bytes:
            return
        if self.idle_bytes() + size > self.most_bytes:
            self._idle = {}
        self._idle.setdefault(size, []).append(memory)

    def idle_bytes(self) -> int:
        """What it holds now."""
        idle = self._idle
        # Keys alone: to list pairs could start a garbage collection, which calls `put`.
        return sum(size * len(idle[size]) for size in list(idle))


def _configured_bytes(place: Place) -> int | None:
    """What TensorFlow was told to take of a GPU at most; None if nothing was said."""
    configured = [
        one
        for gpu in tf.config.get_visible_devices("GPU")
        for one in tf.config.get_logical_device_configuration(gpu) or [None]
    ]
    one = configured[place.index] if place.index < len(configured) else None
    return one.memory_limit * 2**20 if one and one.memory_limit else None


class _Loan:
    """Memory from a shelf; goes back there when it dies."""

    __slots__ = ("_memory", "_shelf", "_size")

    def __init__(self, shelf: Shelf, memory: Memory, size: int):
        self._shelf = shelf
        self._memory = memory
        self._size = size

    def __del__(self) -> None:
        self._shelf.put(self._memory, self._size)


shelf = functools.cache(Shelf)


def host_view(tensor: tf.Tensor) -> np.ndarray:
    """A NumPy view of a tensor in host memory.

    Writable, so that a new tensor can be filled before anyone sees it, and since a JIT
    compiler takes read-only arrays for another type. Other tensors must not be written.
    """
    dtype = np.dtype(tensor.dtype.as_numpy_dtype)
    shape = tuple(tensor.shape)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    memory = memory_of(tensor)
    buffer = (ctypes.c_char * size).from_address(memory.address)
    buffer.owner = memory.owner
    return np.frombuffer(buffer, dtype).reshape(shape)
