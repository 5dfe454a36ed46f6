"""An engine of several inputs and outputs, on a library and a GPU made up here: what goes where, in which type."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor.device import cuda, tensorrt
from compressor.device.openers import OpenOptions, Port
from compressor.errors import EngineError

SHAPES = {"image": (-1, 2), "tokens": (-1, 3), "sum": (-1, 2), "first": (-1,)}
TYPES = {"image": "float16", "tokens": "int64", "sum": "float16", "first": "int64"}
MOST_SAMPLES = 4


class Context:
    """Adds the tokens' sum to the image, and says the first token."""

    def __init__(self) -> None:
        self.samples: dict[str, int] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.samples[name] = shape[0]
        return shape[0] <= MOST_SAMPLES

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (samples,) = set(self.samples.values())  # an output's shape follows from those of all inputs
        return (samples, *SHAPES[name][1:])

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        image, tokens = self.read("image"), self.read("tokens")
        self.write("sum", image + tokens.sum(1, keepdims=True).astype(np.float16))
        self.write("first", tokens[:, 0])
        return True

    def read(self, name: str) -> NDArray[Any]:
        shape = self.get_tensor_shape(name)
        size = int(np.prod(shape)) * np.dtype(TYPES[name]).itemsize
        return np.frombuffer(ctypes.string_at(self.addresses[name], size), TYPES[name]).reshape(shape)

    def write(self, name: str, array: NDArray[Any]) -> None:
        array = np.ascontiguousarray(array, TYPES[name])
        ctypes.memmove(self.addresses[name], array.ctypes.data, array.nbytes)


def engine() -> SimpleNamespace:
    names = list(SHAPES)
    return SimpleNamespace(
        num_io_tensors=len(names),
        get_tensor_name=names.__getitem__,
        get_tensor_mode=lambda name: "in" if name in ("image", "tokens") else "out",
        get_tensor_dtype=TYPES.__getitem__,
        get_tensor_shape=SHAPES.__getitem__,
        create_execution_context=Context,
    )


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    class Logger:
        ERROR = 1

    library = SimpleNamespace(
        ILogger=Logger,
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine()),
        TensorIOMode=SimpleNamespace(INPUT="in"),
        nptype=np.dtype,
    )
    memory: dict[int, ctypes.Array[ctypes.c_char]] = {}

    def allocate(size_bytes: int) -> int:
        block = ctypes.create_string_buffer(max(1, size_bytes))
        memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    made: Mapping[str, Any] = {
        "unavailable": lambda: "",
        "attach": lambda: 0,
        "device": lambda: ("a GPU", "SM86"),
        "allocate": allocate,
        "free": memory.pop,
        "to_device": lambda pointer, array, stream: ctypes.memmove(pointer, array.ctypes.data, array.nbytes),
        "to_host": lambda array, pointer, stream: ctypes.memmove(array.ctypes.data, pointer, array.nbytes),
        "wait": lambda stream: None,
    }
    for name, function in made.items():
        monkeypatch.setattr(cuda, name, function)
    monkeypatch.setattr(tensorrt, "import_library", lambda name: library)
    (tmp_path / "x.plan").write_bytes(b"plan")
    return tensorrt.open_engine(tmp_path / "x.plan", OpenOptions(), library="tensorrt")


def test_its_ports_are_the_engines(loaded: Any) -> None:
    assert loaded.inputs == (Port("image", (-1, 2), "float16"), Port("tokens", (-1, 3), "int64"))
    assert loaded.outputs == (Port("sum", (-1, 2), "float16"), Port("first", (-1,), "int64"))


@pytest.mark.parametrize("samples", [1, 4])
def test_every_input_reaches_the_engine_and_every_output_comes_back(loaded: Any, samples: int) -> None:
    image = np.arange(2 * samples, dtype=np.float32).reshape(samples, 2)
    tokens = np.arange(3 * samples).reshape(samples, 3)
    for _ in range(2):  # buffers are kept
        total, first = loaded.call((image, tokens))
        assert (total.dtype, first.dtype) == (np.float16, np.int64)
        np.testing.assert_array_equal(total, image + tokens.sum(1, keepdims=True))
        np.testing.assert_array_equal(first, tokens[:, 0])


def test_a_shape_it_was_not_built_for_is_named(loaded: Any) -> None:
    with pytest.raises(EngineError, match=r"x\.plan was not built for the shape \[5, 2\] of 'image'; see its profile"):
        loaded.call((np.zeros((5, 2), np.float32), np.zeros((5, 3), np.int64)))
