"""The CUDA driver through ctypes: is there a GPU, its compute capability, memory, copies and one stream.

Only libcuda, which every GPU driver brings: no CUDA toolkit, no torch. TensorRT shares its primary context.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def unavailable() -> str:
    """Why no GPU can be used here, in words; an empty string when one can."""
    try:
        driver = ctypes.CDLL(_LIBRARY)
    except OSError:
        return "no GPU: the CUDA driver is not installed"
    status = driver.cuInit(0)
    if status:
        return f"no GPU: the CUDA driver does not start (error {status})"
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    return "" if count.value else "no GPU: the CUDA driver sees no device"


def device() -> tuple[str, str]:
    """Name and compute capability of GPU 0, such as ("NVIDIA GeForce RTX 3080", "SM86")."""
    driver = _driver()
    name = ctypes.create_string_buffer(128)
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call(driver.cuDeviceGetName, name, 128, 0)
    _call(driver.cuDeviceGetAttribute, ctypes.byref(major), _MAJOR, 0)
    _call(driver.cuDeviceGetAttribute, ctypes.byref(minor), _MINOR, 0)
    return name.value.decode(), f"SM{major.value}{minor.value}"


def device_here() -> tuple[str, str]:
    """The same; two empty strings where no GPU can be used."""
    return ("", "") if unavailable() else device()


def attach() -> int:
    """Makes GPU 0's primary context current in this thread and returns a new stream's handle."""
    driver = _driver()
    context, stream = ctypes.c_void_p(), ctypes.c_void_p()
    _call(driver.cuDevicePrimaryCtxRetain, ctypes.byref(context), 0)
    _call(driver.cuCtxSetCurrent, context)
    _call(driver.cuStreamCreate, ctypes.byref(stream), 1)  # 1 = does not wait for the default stream
    return int(stream.value or 0)


def allocate(size_bytes: int) -> int:
    """The address of that much memory on the GPU; raises EngineError where it has not as much left."""
    pointer = ctypes.c_uint64()
    size = ctypes.c_size_t(max(size_bytes, 1))  # the driver refuses to allocate nothing
    _call(_driver().cuMemAlloc_v2, ctypes.byref(pointer), size)
    return pointer.value


def free(pointer: int) -> None:
    """Gives back what `allocate` returned."""
    _call(_driver().cuMemFree_v2, ctypes.c_uint64(pointer))


def to_device(pointer: int, array: NDArray[np.generic], stream: int) -> None:
    """Queues the copy of a contiguous array; the array must live until `wait`."""
    target, source = ctypes.c_uint64(pointer), ctypes.c_void_p(array.ctypes.data)
    _call(_driver().cuMemcpyHtoDAsync_v2, target, source, ctypes.c_size_t(array.nbytes), _handle(stream))


def to_host(array: NDArray[np.generic], pointer: int, stream: int) -> None:
    """Queues the copy into a contiguous array, which holds it after `wait`."""
    target, source = ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(pointer)
    _call(_driver().cuMemcpyDtoHAsync_v2, target, source, ctypes.c_size_t(array.nbytes), _handle(stream))


def wait(stream: int) -> None:
    """Returns once all that was queued on the stream is done."""
    _call(_driver().cuStreamSynchronize, _handle(stream))


def _handle(stream: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(stream)


def _driver() -> ctypes.CDLL:
    """The driver's library, started; loading it again gives the same one."""
    reason = unavailable()
    if reason:
        raise EngineError(reason)
    return ctypes.CDLL(_LIBRARY)


def _call(function: Callable[..., int], *arguments: object) -> None:
    status = function(*arguments)
    if status:
        raise EngineError(f"{function.__name__} failed with CUDA error {status}")
