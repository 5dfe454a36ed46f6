"""The settings of scoring and ranking that prune a network best: a recipe in, a study, a better recipe out.

Known to users as `compressor.search(...)`; nothing heavy is read before that is called.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import MissingPackageError

if TYPE_CHECKING:
    from torch import nn

    from .outcome import SearchResult


def search(model: str | nn.Module | None = None, images: object = None, **options: object) -> SearchResult:
    """Searches a recipe for a model; see `compressor.searching.flow.search`.

    Raises MissingPackageError where what it needs is not installed.
    """
    result: SearchResult = load_flow().search(model, images, **options)
    return result


def load_flow() -> ModuleType:
    """`compressor.searching.flow`, once it is known that what it needs is installed."""
    try:
        return importlib.import_module(".flow", __name__)
    except ModuleNotFoundError as error:
        if error.name not in ("optuna", "sqlalchemy"):
            raise
        raise MissingPackageError(
            f"{error.name} not installed, which the search needs: pip install 'compressor[compress,search]'"
        ) from error
