"""Relevance-guided pruning of vision models to verified, shippable ONNX and TensorRT bundles.

`compress(model, images, ...) -> Run` is the whole of it, or a `Sweep` of runs; `load(folder)` brings a run's network
back. Without a folder,
in memory: `make_prunable(module, images)`, then `pruning_round(...)`, or its steps one by one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .budgets import Budget as Budget
    from .choices import Choices as Choices
    from .choices import Repairing as Repairing
    from .choices import Scoring as Scoring
    from .inputs.detectors import detector_network as detector_network
    from .pipeline import Run as Run
    from .pipeline import Sweep as Sweep
    from .pipeline import compress as compress
    from .pipeline import load as load
    from .pipeline import ship as ship
    from .recipe import Recipe as Recipe
    from .recipe import read_recipe as read_recipe
    from .rounds import Prunable as Prunable
    from .rounds import Round as Round
    from .rounds import make_prunable as make_prunable
    from .rounds import pruning_round as pruning_round
    from .rounds import remove_units as remove_units
    from .rounds import repair_layers as repair_layers
    from .rounds import score_units as score_units
    from .searching import search as search

__version__ = "0.1.0"
_HOMES = {
    "Budget": "budgets",
    "Choices": "choices",
    "Repairing": "choices",
    "Scoring": "choices",
    "Prunable": "rounds",
    "Round": "rounds",
    "make_prunable": "rounds",
    "pruning_round": "rounds",
    "remove_units": "rounds",
    "repair_layers": "rounds",
    "score_units": "rounds",
    "compress": "pipeline",
    "detector_network": "inputs.detectors",
    "load": "pipeline",
    "ship": "pipeline",
    "search": "searching",
    "Run": "pipeline",
    "Sweep": "pipeline",
    "Recipe": "recipe",
    "read_recipe": "recipe",
}


__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
