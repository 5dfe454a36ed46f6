"""An fp32 ONNX file and calibration images in, every activation's range out: min-max, percentile or entropy.

Two passes, one image batch in memory at a time: extremes first, then histograms between them. Which images may be
used is the caller's business. Entropy: the threshold of least Kullback-Leibler divergence (Migacz, GTC 2017).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import InputError

Images = NDArray[np.float32]
Method = Literal["minmax", "percentile", "entropy"]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "entropy")

_BINS = 2048
_LEVELS = 128  # magnitudes an int8 has


@dataclass(frozen=True, slots=True)
class Statistics:
    """Per tensor: extremes over all images and a histogram of `_BINS` equal bins between them."""

    extremes: Mapping[str, tuple[float, float]]
    histograms: Mapping[str, NDArray[np.int64]]
    images: int


def collect(path: Path | str, images: Images, *, batch: int = 1) -> Statistics:
    """Runs the file on every image and counts all its float activations."""
    if len(images) == 0:
        raise InputError("calibration needs images, none were given")
    model = onnx.load(path)
    run, names = exposed(model)
    parts = [images[i : i + batch] for i in range(0, len(images), batch)]
    low, high = dict.fromkeys(names, np.inf), dict.fromkeys(names, -np.inf)
    for name, value in values_of(run, names, parts):
        low[name], high[name] = min(low[name], float(value.min())), max(high[name], float(value.max()))
    counts = {name: np.zeros(_BINS, np.int64) for name in names}
    for name, value in values_of(run, names, parts):
        if high[name] > low[name]:
            counts[name] += np.histogram(value, bins=_BINS, range=(low[name], high[name]))[0]
    return Statistics({name: (low[name], high[name]) for name in names}, counts, len(images))


def ranges(
    statistics: Statistics, method: Method = "minmax", *, percentile: float = 99.99
) -> dict[str, tuple[float, float]]:
    """What int8 should cover of each tensor; zero is always inside, as quantisation needs it."""
    if method not in METHODS:
        raise InputError(f"no calibration method {method!r}; there are {', '.join(METHODS)}")
    found = {}
    for name, (low, high) in statistics.extremes.items():
        histogram = statistics.histograms[name]
        if method == "percentile" and high > low:
            low, high = _percentiles(histogram, (low, high), percentile)
        elif method == "entropy" and high > low:
            limit = _least_divergence(histogram, (low, high))
            low, high = max(low, -limit), min(high, limit)
        found[name] = (min(low, 0.0), max(high, 0.0))
    return found


def exposed(model: onnx.ModelProto) -> tuple[Any, list[str]]:
    """A session that returns every float activation, and their names, the input's first."""
    import onnxruntime

    inferred = onnx.shape_inference.infer_shapes(model)
    floats = {v.name for v in (*inferred.graph.value_info, *inferred.graph.output) if v.type.tensor_type.elem_type == 1}
    outputs = [name for node in model.graph.node for name in node.output if name in floats]
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Unfused, so that every tensor the quantiser sees exists.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session, [session.get_inputs()[0].name, *outputs]


def values_of(session: Any, names: Sequence[str], parts: Sequence[Images]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for part in parts:
        yield names[0], part
        yield from zip(names[1:], session.run(names[1:], {names[0]: part}), strict=True)


def _percentiles(histogram: NDArray[np.int64], extremes: tuple[float, float], percentile: float) -> tuple[float, float]:
    edges = np.linspace(*extremes, _BINS + 1)
    share = np.cumsum(histogram) / histogram.sum()
    tail = (1 - percentile / 100) / 2
    first, last = int(np.searchsorted(share, tail)), int(np.searchsorted(share, 1 - tail))
    return float(edges[first]), float(edges[last + 1 if last < _BINS else _BINS])


def _least_divergence(histogram: NDArray[np.int64], extremes: tuple[float, float]) -> float:
    """The magnitude at which clipping and 128 levels together change the distribution of magnitudes least."""
    centres = np.abs((np.linspace(*extremes, _BINS + 1)[:-1] + np.linspace(*extremes, _BINS + 1)[1:]) / 2)
    top = max(abs(e) for e in extremes)
    magnitudes = np.histogram(centres, bins=_BINS, range=(0, top), weights=histogram.astype(np.float64))[0]
    # Exact zeros (after ReLU) would dominate every divergence and are represented exactly anyway.
    magnitudes[0] = magnitudes[1]
    candidates = range(_LEVELS, _BINS + 1, 16)
    divergences = [_divergence(magnitudes, bins) for bins in candidates]
    return top * candidates[int(np.argmin(divergences))] / _BINS


def _divergence(magnitudes: NDArray[np.float64], bins: int) -> float:
    reference = magnitudes[:bins].copy()
    reference[-1] += magnitudes[bins:].sum()
    group = np.arange(bins) * _LEVELS // bins
    filled = (magnitudes[:bins] > 0).astype(np.float64)
    totals, members = (np.bincount(group, weights, _LEVELS) for weights in (magnitudes[:bins], filled))
    quantised = np.where(filled > 0, (totals / np.maximum(members, 1))[group], 0.0)
    if quantised.sum() == 0 or reference.sum() == 0:
        return float("inf")
    p, q = reference / reference.sum(), quantised / quantised.sum()
    mask = p > 0
    return float((p[mask] * np.log(p[mask] / np.maximum(q[mask], 1e-12))).sum())
