"""An fp32 ONNX file and calibration images in, every activation's range out: min-max, percentile or entropy.

Two passes, one image batch in memory at a time: extremes first, then histograms between them. Which images may be
used is the caller's business. Entropy: the threshold of least Kullback-Leibler divergence (Migacz, GTC 2017).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from ..device import feeds
from ..device.feeds import Arrays
from ..errors import InputError
from .onnx import loadable
from .parts import element_types_of, makers_of

Images = Arrays
Method = Literal["minmax", "percentile", "entropy"]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "entropy")

Ranges = Mapping[str, tuple[float, float]]  # what int8 covers of each tensor: (low, high)

_BINS = 2048
_LEVELS = 128  # magnitudes an int8 has


@dataclass(frozen=True, slots=True)
class Statistics:
    """Per tensor: extremes over all images and a histogram of `_BINS` equal bins between them."""

    extremes: Mapping[str, tuple[float, float]]
    histograms: Mapping[str, NDArray[np.int64]]
    images: int
    _ranges: dict[tuple[Method, float], Ranges] = field(default_factory=dict, repr=False, compare=False)


def collect(path: Path | str, images: Images, *, batch: int = 1) -> Statistics:
    """Runs the file on every image [N, ...] and counts all its float activations; InputError without images."""
    if feeds.count(images) == 0:
        raise InputError("calibration needs images, none were given")
    file = exposed(onnx.load(path))
    names, batches = file.names, feeds.parted(images, batch)

    low, high = dict.fromkeys(names, np.inf), dict.fromkeys(names, -np.inf)
    for name, value in values_of(file, batches):
        low[name] = min(low[name], float(value.min()))
        high[name] = max(high[name], float(value.max()))

    histograms = {name: np.zeros(_BINS, np.int64) for name in names}
    for name, value in values_of(file, batches):
        if high[name] > low[name]:  # a constant has no bins
            histograms[name] += np.histogram(value, bins=_BINS, range=(low[name], high[name]))[0]

    extremes = {name: (low[name], high[name]) for name in names}
    return Statistics(extremes, histograms, feeds.count(images))


def ranges(statistics: Statistics, method: Method = "minmax", *, percentile: float = 99.99) -> Ranges:
    """What int8 should cover of each tensor, (low, high); zero is always inside, as quantisation needs it.

    By percentile, that many per cent of the values lie inside; the rest is cut off, half of it on either side. Found
    once for the same statistics.
    """
    if method not in METHODS:
        raise InputError(f"no calibration method {method!r}; there are {', '.join(METHODS)}")
    known = statistics._ranges
    if (method, percentile) not in known:
        known[method, percentile] = _covered_of_all(statistics, method, percentile)
    return known[method, percentile]


def _covered_of_all(statistics: Statistics, method: Method, percentile: float) -> Ranges:
    covered = {}
    for name, extremes in statistics.extremes.items():
        low, high = _covered(statistics.histograms[name], extremes, method, percentile)
        covered[name] = (min(low, 0.0), max(high, 0.0))
    return covered


def _covered(
    histogram: NDArray[np.int64], extremes: tuple[float, float], method: Method, percentile: float
) -> tuple[float, float]:
    low, high = extremes
    if method == "minmax" or not high > low:  # a constant's histogram is empty
        return extremes
    if method == "percentile":
        return _percentiles(histogram, extremes, percentile)
    limit = _least_divergence(histogram, extremes)
    return max(low, -limit), min(high, limit)


@dataclass(frozen=True, slots=True)
class Exposed:
    """A session that returns every float activation: `outputs` by name, of what the `inputs` are fed with.

    `float_inputs` are those that have ranges themselves.
    """

    session: Any
    inputs: tuple[str, ...]
    float_inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that has a range, inputs first."""
        return (*self.float_inputs, *self.outputs)


def exposed(model: onnx.ModelProto) -> Exposed:
    """The model, made to return every float activation: its own outputs are replaced, in place.

    The weights of one that is larger than a message may be are gone from it afterwards.
    """
    import onnxruntime

    types = element_types_of(model)
    outputs = [name for name in makers_of(model.graph) if types.get(name) == onnx.TensorProto.FLOAT]
    del model.graph.output[:]
    for name in outputs:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Unfused, so that every tensor the quantiser sees exists.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with loadable(model) as source:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    input_types = {tensor.name: tensor.type for tensor in session.get_inputs()}
    float_inputs = [name for name, type_name in input_types.items() if type_name == "tensor(float)"]
    return Exposed(session, tuple(input_types), tuple(float_inputs), tuple(outputs))


def values_of(
    file: Exposed, batches: Sequence[Images], asked: Collection[str] | None = None
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every float tensor of the file by name, or those asked for, batch after batch; inputs first."""
    inputs = [name for name in file.float_inputs if asked is None or name in asked]
    outputs = [name for name in file.outputs if asked is None or name in asked]
    for images in batches:
        feed = dict(zip(file.inputs, feeds.as_tuple(images), strict=True))
        for name in inputs:
            yield name, feed[name]
        if outputs:
            yield from zip(outputs, file.session.run(outputs, feed), strict=True)


def _percentiles(histogram: NDArray[np.int64], extremes: tuple[float, float], percentile: float) -> tuple[float, float]:
    edges = np.linspace(*extremes, _BINS + 1)
    share_up_to = np.cumsum(histogram) / histogram.sum()  # of the values, at each bin's upper edge
    tail = (1 - percentile / 100) / 2
    first = int(np.searchsorted(share_up_to, tail))
    last = int(np.searchsorted(share_up_to, 1 - tail))  # _BINS where rounding leaves the last share below 1 - tail
    return float(edges[first]), float(edges[min(last + 1, _BINS)])


def _least_divergence(histogram: NDArray[np.int64], extremes: tuple[float, float]) -> float:
    """The magnitude at which clipping and 128 levels together change the distribution of magnitudes least."""
    edges = np.linspace(*extremes, _BINS + 1)
    centres = np.abs((edges[:-1] + edges[1:]) / 2)
    low, high = extremes
    top = max(abs(low), abs(high))
    magnitudes = np.histogram(centres, bins=_BINS, range=(0, top), weights=histogram.astype(np.float64))[0]
    # Exact zeros (after ReLU) would dominate every divergence and are represented exactly anyway.
    magnitudes[0] = magnitudes[1]

    candidates = range(_LEVELS, _BINS + 1, 16)  # how many bins lie below the threshold
    divergences = [_divergence(magnitudes, bins) for bins in candidates]
    return top * candidates[int(np.argmin(divergences))] / _BINS


def _divergence(magnitudes: NDArray[np.float64], bins: int) -> float:
    """Kullback-Leibler, from the magnitudes clipped to so many bins to the same in 128 levels.

    What lies beyond is counted to the last bin; each level's magnitudes are spread evenly over its bins with any.
    """
    reference = magnitudes[:bins].copy()
    reference[-1] += magnitudes[bins:].sum()

    level = np.arange(bins) * _LEVELS // bins  # of each bin: of 256 bins, 0 and 1 are level 0, 254 and 255 level 127
    filled = (magnitudes[:bins] > 0).astype(np.float64)
    totals = np.bincount(level, magnitudes[:bins], _LEVELS)
    members = np.bincount(level, filled, _LEVELS)
    quantised = np.where(filled > 0, (totals / np.maximum(members, 1))[level], 0.0)
    if quantised.sum() == 0 or reference.sum() == 0:
        return float("inf")

    # The sum of p log(p / q): p as it was, q of 128 levels.
    p, q = reference / reference.sum(), quantised / quantised.sum()
    is_positive = p > 0  # 0 log 0 counts nothing
    return float((p[is_positive] * np.log(p[is_positive] / np.maximum(q[is_positive], 1e-12))).sum())
