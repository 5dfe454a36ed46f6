"""The search room: `compressor.search(...)` is its function, `compressor.search.space` a module in it.

The package is callable because the function and the room share their name; nothing heavy is read before it is called.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import MissingPackageError

if TYPE_CHECKING:
    from .outcome import Found


def search(model: Any = None, images: Any = None, **options: Any) -> Found:
    """Searches a recipe for a model; see `compressor.search.flow.search`."""
    found: Found = load_flow().search(model, images, **options)
    return found


def load_flow() -> ModuleType:
    """`compressor.search.flow`, once it is known that what it needs is installed."""
    try:
        return importlib.import_module(".flow", __name__)
    except ModuleNotFoundError as error:
        if error.name not in ("optuna", "sqlalchemy"):
            raise
        raise MissingPackageError(
            f"{error.name} not installed, which the search needs: pip install 'compressor[compress,search]'"
        ) from error


class _Room(ModuleType):
    def __call__(self, model: Any = None, images: Any = None, **options: Any) -> Found:
        return search(model, images, **options)


sys.modules[__name__].__class__ = _Room
