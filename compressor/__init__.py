"""Relevance-guided pruning of vision models to verified, shippable ONNX and TensorRT bundles.

`compress(model, images, ...) -> Run` is the whole of it; `load(folder)` brings a run's network back.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import Run as Run
    from .pipeline import compress as compress
    from .pipeline import load as load
    from .recipe import Recipe as Recipe
    from .recipe import read_recipe as read_recipe
    from .searching import search as search

__version__ = "0.1.0"
__all__ = ["Recipe", "Run", "__version__", "compress", "load", "read_recipe", "search"]

_HOMES = {
    "compress": "pipeline",
    "load": "pipeline",
    "search": "searching",
    "Run": "pipeline",
    "Recipe": "recipe",
    "read_recipe": "recipe",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
