"""Tensors of TensorFlow as memory that a back end can read and fill, without copies.

Knows where a tensor lives, how to allocate one with TensorFlow's allocator, and how to
look at its memory. The GPU's streams are in `streams`; convolutions are unknown here.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import numpy as np
import tensorflow as tf

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


@functools.cache
def _parse(device: str) -> Place:
    spec = tf.DeviceSpec.from_string(device)
    return Place(spec.device_type or "CPU", spec.device_index or 0, device)


def place_of(tensor: tf.Tensor) -> Place:
    """Where an eager tensor's memory is; for int32, TensorFlow uses the host's."""
    return _parse(tensor.backing_device)


class _DLTensor(ctypes.Structure):
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
    head = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    return Memory((head.data or 0) + head.byte_offset, capsule)


@functools.lru_cache(maxsize=1024)
def _shape_tensor(shape: tuple[int, ...]) -> tf.Tensor:
    with tf.init_scope(), tf.device("/CPU:0"):
        return tf.constant(shape, tf.int32, shape=(len(shape),))


def empty(shape: tuple[int, ...], dtype: tf.DType, place: Place) -> tf.Tensor:
    """A tensor with arbitrary contents from the allocator of its device."""
    with tf.device(place.device):
        return tf.raw_ops.Empty(shape=_shape_tensor(shape), dtype=dtype)


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
