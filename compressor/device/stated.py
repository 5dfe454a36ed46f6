"""A manifest in, how good its maker measured one file's answers to be out, where it says so."""

from __future__ import annotations

import math
from pathlib import Path

from ..records import Figure, Quality
from .manifest import Manifest


def stated_figure(manifest: Manifest, path: str | Path) -> Figure | None:
    """The figure of the bundle's file at `path`; None where the manifest has none."""
    place = Path(path).as_posix()
    models = (model.path for model in manifest.models if place.endswith(f"/{model.path}"))
    model_path = next(models, None)  # of `small.onnx` and `a/small.onnx` the manifest's first
    for stated in manifest.metrics:
        if stated.of == model_path:
            return Quality(stated.metric, stated.value, stated.n, stated.low, stated.high, math.nan, stated.is_share)
    return None
