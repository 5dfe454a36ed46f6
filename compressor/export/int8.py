"""An fp32 file and evidence in, the int8 file out that loses at most what is allowed, with the layers it took.

The calibration method is chosen by the judge; where even the best loses too much, the layers that cost most stay
in float (`mixed`). Which images are judged on is the caller's business: not those the ranges were read from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from ..device.feeds import Arrays
from .calibration import Method, Statistics, ranges
from .mixed import best_method, sensitivity, to_mixed
from .onnx import write_model
from .precision import Placement, bits_for, to_int8, with_half_rest
from .rounding import Rounding


@dataclass(frozen=True, slots=True)
class Evidence:
    """`score(file, placement)` is the judge, `reference` what it says of the fp32 file, `max_loss` in its units.

    `images` [N, ...] order the layers by what int8 costs them; `statistics` and `rounding` are of others.
    """

    statistics: Statistics
    rounding: Rounding
    images: Arrays
    score: Callable[[Path, Placement], float]
    reference: float
    max_loss: float


@dataclass(frozen=True, slots=True)
class Quantised:
    """An int8 file; `scores` are the judge's of every method, `kept` the layers left in float, worst first.

    `bits` are those of the weights; `islands`, where the rest is in half precision, what stays in fp32 for its values.
    """

    path: str
    placement: Placement
    method: Method
    scores: Mapping[Method, float]
    kept: tuple[str, ...]
    score: float
    reference: float
    bits: int
    islands: tuple[str, ...] | None = None


def quantise(
    path: Path | str,
    out: Path | str,
    *,
    evidence: Evidence,
    placement: Placement,
    like: Quantised | None = None,
    progress: Callable[[float], None] | None = None,
) -> Quantised:
    """Writes `out`; `like` is a form of the same network for another library, whose choices are tried first.

    TensorRT's form computes the rest in half precision, unless that loses more than is allowed.
    Raises GateError when half of the layers in float are not enough.
    """
    quantised = _in_fp32(path, out, evidence, placement, like, progress)
    return _with_half_rest(quantised, evidence) if placement == "tensorrt" else quantised


def _with_half_rest(quantised: Quantised, evidence: Evidence) -> Quantised:
    """The file in half precision, in place of the other, where the judge lets it pass; else the other as it is."""
    path = Path(quantised.path)
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        half = with_half_rest(path, Path(folder) / path.name, statistics=evidence.statistics)
        score = evidence.score(Path(half.path), quantised.placement)
        if score < evidence.reference - evidence.max_loss:
            return quantised
        write_model(onnx.load(half.path), path)
    return replace(quantised, score=score, islands=tuple(sorted(half.islands)))


def _in_fp32(
    path: Path | str,
    out: Path | str,
    evidence: Evidence,
    placement: Placement,
    like: Quantised | None,
    progress: Callable[[float], None] | None,
) -> Quantised:
    """The int8 file whose other operations are in fp32, in either form."""

    def judge(file: Path) -> float:
        return evidence.score(file, placement)

    options: dict[str, Any] = {"placement": placement, "rounding": evidence.rounding}
    least = evidence.reference - evidence.max_loss
    bits = bits_for(placement)
    if like is not None:  # one network's forms lose about alike: most often this spares the search
        chosen = ranges(evidence.statistics, like.method)
        score = judge(to_int8(path, out, ranges=chosen, keep=like.kept, **options))
        if score >= least:
            tried = {like.method: score}
            return Quantised(str(out), placement, like.method, tried, like.kept, score, evidence.reference, bits)

    method, scores = best_method(path, out, statistics=evidence.statistics, score=judge, **options)
    if scores[method] >= least:
        return Quantised(str(out), placement, method, scores, (), scores[method], evidence.reference, bits)

    chosen = ranges(evidence.statistics, method)
    costs = sensitivity(path, evidence.images, ranges=chosen, progress=progress, **options)
    order = [name for name, _ in costs]
    mixed = to_mixed(path, out, ranges=chosen, order=order, score=judge, least=least, **options)
    return Quantised(str(out), placement, method, scores, mixed.kept, mixed.score, evidence.reference, bits)
