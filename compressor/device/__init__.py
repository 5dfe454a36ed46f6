"""What runs on the target, and what the host times, builds and compares with: numpy and one runtime only.

`load(bundle)` gives what answers to images, arrays and files.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answers import Answer as Answer
    from .loading import Loaded as Loaded
    from .loading import load as load

_HOMES = {"Answer": "answers", "Loaded": "loading", "load": "loading"}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Numpy is imported by who asks for one of these, and a runtime by `load` itself."""
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
