"""A manifest in, how good its maker measured one file's answers to be out, where it says so."""

from __future__ import annotations

import math
from pathlib import Path

from ..records import Figure, Quality
from .manifest import Manifest


def stated_figure(manifest: Manifest, path: str | Path) -> Figure | None:
    """The figure of the bundle's file at `path`; None where the manifest has none."""
    name = next((model.path for model in manifest.models if Path(path).as_posix().endswith(f"/{model.path}")), "")
    for stated in manifest.metrics:
        if name and stated.of == name:
            return Quality(stated.metric, stated.value, stated.n, stated.low, stated.high, math.nan, stated.is_share)
    return None
