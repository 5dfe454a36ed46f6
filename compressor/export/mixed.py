"""Which layers lose most by int8, found by measuring, and a file that leaves just enough of them in float.

In: the fp32 file, activation ranges, calibration images, and a judge of files (accuracy, parity: the caller's).
Out: the int8 file the judge accepts with the fewest layers kept, or the error that none is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from ..device.feeds import Arrays
from ..device.parity import Parity, compare
from ..device.runtimes import open_model
from ..errors import GateError
from .calibration import METHODS, Method, Ranges, Statistics, ranges
from .onnx import write_model
from .precision import Placement, to_int8, weighted_nodes
from .rounding import Rounding


@dataclass(frozen=True, slots=True)
class Mixed:
    """`kept` are the layers left in float, worst first; `score` is the judge's of this file.

    `tried` has every (number of layers in float, score) that was looked at.
    """

    path: str
    kept: tuple[str, ...]
    score: float
    tried: tuple[tuple[int, float], ...]


def best_method(
    path: Path | str,
    out: Path | str,
    *,
    statistics: Statistics,
    score: Callable[[Path], float],
    placement: Placement = "tensorrt",
    rounding: Rounding | None = None,
) -> tuple[Method, dict[Method, float]]:
    """The calibration method whose file the judge scores highest, that file at `out`, and all scores.

    Of equal scores the first in `METHODS` wins.
    """
    scores: dict[Method, float] = {}
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        files = {method: Path(folder) / method / Path(out).name for method in METHODS}
        for method, file in files.items():
            chosen = ranges(statistics, method)
            scores[method] = score(to_int8(path, file, ranges=chosen, placement=placement, rounding=rounding))
        best = max(METHODS, key=lambda method: scores[method])
        write_model(onnx.load(files[best]), Path(out))
    return best, scores


def sensitivity(
    path: Path | str,
    images: Arrays,
    *,
    ranges: Ranges,
    placement: Placement = "tensorrt",
    rounding: Rounding | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[tuple[str, Parity]]:
    """Every weighted layer with the parity of the file that quantises it alone, worst first."""
    names = weighted_nodes(onnx.load(path))
    reference = open_model(path).run(images)
    options: dict[str, Any] = {"ranges": ranges, "placement": placement, "rounding": rounding}
    nodes = _all_nodes(path)

    parities = []
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        for index, name in enumerate(names):
            in_float = [node for node in nodes if node != name]
            file = to_int8(path, Path(folder) / "one.onnx", keep=in_float, **options)
            session = open_model(file, fused=placement == "onnxruntime")
            parities.append((name, compare(reference, session.run(images))))
            if progress is not None:
                progress((index + 1) / len(names))
    return sorted(parities, key=lambda pair: pair[1].sqnr_db)


def to_mixed(
    path: Path | str,
    out: Path | str,
    *,
    ranges: Ranges,
    order: Sequence[str],
    score: Callable[[Path], float],
    least: float,
    placement: Placement = "tensorrt",
    rounding: Rounding | None = None,
) -> Mixed:
    """Keeps the first k layers of `order` (worst first) in float, for the smallest k found with score >= `least`.

    k is doubled until the judge accepts, then bisected. Raises GateError when not even half of the layers in
    float is enough: then int8 isn't worth having.
    """
    options: dict[str, Any] = {"ranges": ranges, "placement": placement, "rounding": rounding}
    scores: dict[int, float] = {}  # by the number of layers in float

    def is_enough(count: int) -> bool:
        scores[count] = score(to_int8(path, out, keep=order[:count], **options))
        return scores[count] >= least

    low, high, most = -1, 0, max(1, len(order) // 2)
    while not is_enough(high):
        low, high = high, min(max(1, high * 2), most)
        if high == low:
            best = max(scores.values())
            raise GateError(
                f"int8 reaches {best:.4f} with {low} of {len(order)} layers in float, at least {least:.4f} is asked "
                f"for (the layers that cost most: {', '.join(order[:5])}); ship fp16"
            )

    # `low` is too few, `high` is enough
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    is_enough(high)  # writes that file once more: the last one tried may be another
    return Mixed(str(out), tuple(order[:high]), scores[high], tuple(sorted(scores.items())))


def _all_nodes(path: Path | str) -> list[str]:
    return [node.name for node in onnx.load(path, load_external_data=False).graph.node]
