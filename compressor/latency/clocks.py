"""A layer at some widths in, its time in microseconds out, on the runtime that was asked for.

One contract for every runtime, so that tables don't know what they were timed on and tests bring a clock of
their own. Files are timed in a process of their own, PyTorch in this one.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..device import child
from ..device.probes import steadied, take_rounds, time_probes
from ..export.layers import Layer, input_shape, layer_model
from ..files import content_hash
from ..placement import CPU, placed
from ..tensors import Inputs, as_tuple
from .places import HERE, Place

EXTRA = 3  # layers that the second file has more than the first: the difference is less noisy by as much
_OPEN_BYTES = 2**28  # weights of all files that are open at once


@dataclass(frozen=True, slots=True)
class Point:
    """A layer at (input, output) channels. Its name and fields are in the keys of what was timed."""

    layer: Layer
    inputs: int
    outputs: int


Clock = Callable[[Sequence[Point]], list[float]]
_REFERENCE = Point(Layer("conv", (28, 28), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)), 32, 32)


Remember = Callable[[str, Callable[[], float]], float]
"""A number by name: the one that was kept, else the one that is measured now, and kept."""


@contextlib.contextmanager
def file_clock(runtime: str, *, batch: int, threads: int, remember: Remember, place: Place = HERE) -> Iterator[Clock]:
    """Times layers as ONNX files of one and of several copies; the difference is the layer's own time.

    One and the same layer goes along in every measurement: what comes out is relative to it, so that tables made
    at busier and at quieter times agree. The child that times lives as long as the block; `threads` 0 leaves their
    number to the runtime. Raises what `open_model` raises, and EngineError when the child dies.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compressor-")))
        start = stack.enter_context(place.workers())
        ask = stack.enter_context(start("compressor.device.probes", name=f"the timing of layers on {runtime}"))
        timer = _Timer(ask, runtime, threads, folder, remember)

        def clock(points: Sequence[Point]) -> list[float]:
            times_us: list[float] = []
            for together in _fitting(points):
                times_us += _layer_times_us(timer, folder, together, batch)
            return times_us

        yield clock


def _layer_times_us(timer: _Timer, folder: Path, points: Sequence[Point], batch: int) -> list[float]:
    """Each layer's own time: 1 + EXTRA copies take longer than one by EXTRA layers, and by nothing else."""
    files: list[Path] = []
    shapes: list[tuple[int, ...]] = []
    for point in points:
        for copies in (1, 1 + EXTRA):
            files.append(_written(folder, point, copies))
            shapes.append((batch, *input_shape(point.layer, point.inputs)))

    times = timer(files, shapes)
    single, several = times[::2], times[1::2]
    for file in files:
        file.unlink()
    return [max(0.0, more - less) / EXTRA for less, more in zip(single, several, strict=True)]


def time_file(
    path: Path, shape: tuple[int, ...], *, runtime: str, threads: int, remember: Remember, place: Place = HERE
) -> float:
    """A whole network's microseconds, by the same yardstick as its layers'."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compressor-")))
        start = stack.enter_context(place.workers())
        ask = stack.enter_context(start("compressor.device.probes", name=f"the timing of {path.name}"))
        return _Timer(ask, runtime, threads, folder, remember)([path], [shape])[0]


@dataclass(frozen=True, slots=True)
class _Timer:
    """Files' microseconds, with the reference beside them."""

    ask: child.Ask
    runtime: str
    threads: int
    folder: Path
    remember: Remember

    def __call__(self, files: Sequence[Path], shapes: Sequence[tuple[int, ...]]) -> list[float]:
        reference = _written(self.folder, _REFERENCE, 1)
        shape = (1, *input_shape(_REFERENCE.layer, _REFERENCE.inputs))
        turns = time_probes(self.ask, [*files, reference], [*shapes, shape], runtime=self.runtime, threads=self.threads)
        times = steadied(turns)  # [files + 1], the reference last
        level = self.remember("reference", lambda: float(times[-1])) / times[-1]
        times_us: list[float] = (times[:-1] * level).tolist()
        return times_us


def _written(folder: Path, point: Point, copies: int) -> Path:
    path = folder / f"{content_hash(point)[:16]}-{copies}.onnx"
    path.write_bytes(layer_model(point.layer, point.inputs, point.outputs, copies).SerializeToString())
    return path


def _fitting(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Points that are timed together, as many as fit into memory."""
    together: list[Point] = []
    size = 0
    for point in points:
        weights = point.inputs * point.outputs * max(1, prod(point.layer.kernel))
        point_bytes = 4 * (2 + EXTRA) * weights  # float32, in a file of one copy and one of 1 + EXTRA
        if together and size + point_bytes > _OPEN_BYTES:
            yield together
            together, size = [], 0
        together.append(point)
        size += point_bytes
    if together:
        yield together


def torch_clock(*, batch: int, threads: int) -> Clock:
    """Times layers as PyTorch runs them; there is no layout to change, so one copy will do."""

    def clock(points: Sequence[Point]) -> list[float]:
        return _time_calls([_torch_call(point, batch) for point in points], threads)

    return clock


def time_network(network: nn.Module, inputs: Inputs, *, threads: int) -> float:
    """`time_file` for PyTorch, on the CPU, of one batch."""
    tensors, on_cpu = as_tuple(inputs), placed(network, CPU)
    return _time_calls([lambda: on_cpu(*tensors)], threads)[0]


def _time_calls(calls: Sequence[Callable[[], Tensor]], threads: int) -> list[float]:
    """Microseconds of each; 0 threads leaves the number as it is."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        with torch.inference_mode():
            rounds = take_rounds(calls, by_processor=threads == 1)
        times_us: list[float] = steadied(np.array(rounds)).tolist()  # [calls, rounds] to [calls]
        return times_us
    finally:
        torch.set_num_threads(before)


def _torch_call(point: Point, batch: int) -> Callable[[], Tensor]:
    """The layer as PyTorch has it, on random weights and the input that its ONNX file takes."""
    layer = point.layer
    x = torch.rand(batch, *input_shape(layer, point.inputs))
    match layer.kind:
        case "attention":
            return lambda: F.scaled_dot_product_attention(x, x, x)
        case "product":
            right = torch.rand(batch, layer.sizes[0], point.inputs, layer.sizes[2])  # [N, lead, inputs, n]
            return lambda: x @ right
        case "linear":
            bias, matrix = torch.rand(point.outputs), torch.rand(point.outputs, point.inputs)
            return lambda: F.linear(x, matrix, bias)
        case _:
            return _convolution_call(point, x, torch.rand(point.outputs))


def _convolution_call(point: Point, x: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    layer = point.layer
    groups = point.inputs if layer.kind == "depthwise" else layer.groups
    rank = len(layer.padding) // 2
    pads = layer.padding[:rank]  # all begins, then all ends: PyTorch takes one for both
    if layer.kind == "transposed":
        weight = torch.rand(point.inputs, point.outputs // groups, *layer.kernel)
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        return lambda: transposed(x, weight, bias, layer.stride, pads, 0, groups, layer.dilation)
    weight = torch.rand(point.outputs, point.inputs // groups, *layer.kernel)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return lambda: convolve(x, weight, bias, layer.stride, pads, layer.dilation, groups)
