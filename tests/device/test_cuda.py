"""The CUDA driver, pretended: why there is no GPU in words, what one is called, and a failed call by its name."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from compressor.device import cuda
from compressor.errors import EngineError

NAME = b"NVIDIA Pretended 1"


class Driver:
    """One GPU of compute capability 8.6; every call is written down and succeeds unless it is in `failing`."""

    def __init__(self, *, starts: int = 0, devices: int = 1, failing: dict[str, int] | None = None) -> None:
        self.starts, self.devices, self.failing = starts, devices, failing or {}
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append((name, arguments))
            self._answer(name, arguments)
            return self.failing.get(name, self.starts if name == "cuInit" else 0)

        call.__name__ = name
        return call

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "cuDeviceGetCount":
            arguments[0]._obj.value = self.devices
        if name == "cuDeviceGetName":
            arguments[0].value = NAME
        if name == "cuDeviceGetAttribute":
            arguments[0]._obj.value = {75: 8, 76: 6}[arguments[1]]
        if name == "cuMemAlloc_v2":
            arguments[0]._obj.value = 0x7000_0000_0000  # beyond 32 bits, as addresses on a GPU are
        if name == "cuStreamCreate":
            arguments[0]._obj.value = 41

    def arguments_of(self, name: str) -> tuple[Any, ...]:
        return next(arguments for called, arguments in self.calls if called == name)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Driver], Driver]:
    def put(driver: Driver) -> Driver:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
        return driver

    return put


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert cuda.unavailable() == "no GPU: the CUDA driver is not installed"
    with pytest.raises(EngineError, match="the CUDA driver is not installed"):
        cuda.device()


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (Driver(starts=804), "no GPU: the CUDA driver does not start (error 804)"),
        (Driver(devices=0), "no GPU: the CUDA driver sees no device"),
        (Driver(), ""),
    ],
)
def test_why_there_is_no_gpu_is_said(install: Callable[[Driver], Driver], driver: Driver, reason: str) -> None:
    install(driver)
    assert cuda.unavailable() == reason


def test_a_gpu_has_a_name_and_a_capability(install: Callable[[Driver], Driver]) -> None:
    install(Driver())
    assert cuda.device() == (NAME.decode(), "SM86")


def test_a_call_that_fails_is_named_with_its_number(install: Callable[[Driver], Driver]) -> None:
    install(Driver(failing={"cuMemAlloc_v2": 2}))
    with pytest.raises(EngineError, match="cuMemAlloc_v2 failed with CUDA error 2"):
        cuda.allocate(1 << 40)


def test_addresses_and_sizes_keep_their_64_bits(install: Callable[[Driver], Driver]) -> None:
    driver = install(Driver())
    pointer = cuda.allocate(0)
    assert pointer == 0x7000_0000_0000
    assert driver.arguments_of("cuMemAlloc_v2")[1].value == 1  # the driver refuses to allocate nothing
    cuda.free(pointer)
    assert driver.arguments_of("cuMemFree_v2")[0].value == pointer


def test_copies_go_the_way_they_are_called_with_all_their_bytes(install: Callable[[Driver], Driver]) -> None:
    driver, array = install(Driver()), np.arange(6, dtype=np.float32)
    cuda.to_device(1 << 40, array, stream=41)
    target, source, count, stream = driver.arguments_of("cuMemcpyHtoDAsync_v2")
    assert (target.value, source.value, count.value, stream.value) == (1 << 40, array.ctypes.data, 24, 41)
    cuda.to_host(array, 1 << 40, stream=41)
    target, source, count, stream = driver.arguments_of("cuMemcpyDtoHAsync_v2")
    assert (target.value, source.value, count.value, stream.value) == (array.ctypes.data, 1 << 40, 24, 41)


def test_attaching_makes_the_context_current_before_the_stream(install: Callable[[Driver], Driver]) -> None:
    driver = install(Driver())
    assert cuda.attach() == 41
    names = [name for name, _ in driver.calls]
    assert names[-3:] == ["cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuStreamCreate"]
