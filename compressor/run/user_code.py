"""A recipe in; the user's code that it names, by the hash of its file, and whether a folder's recipe may run it, out.

The rule is `inputs.trust`'s, the same as for a model's builder. Code of the task (`quality` and the like) is recorded
as data's is, and no folder's recipe runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..inputs.trust import loader_sha256, require_trusted_loader
from ..recipe import Recipe
from .choosing import PARTS

_SOURCES = ("data", "evaluation_data")


def code_sha256s(recipe: Recipe) -> dict[str, str]:
    """By what the recipe writes (`data.py:loader`), the hash of the file; of code without a file, and of none, none."""
    hashes = {}
    for field in (*_SOURCES, *PARTS):
        text = getattr(recipe, field)
        sha256 = loader_sha256(text)
        if sha256:
            hashes[text] = sha256
    return hashes


def require_trusted_data(recipe: Recipe, recorded: Mapping[str, str], folder: Path, *, trust: bool = False) -> None:
    """Raises DataError where the recipe of a folder names code for its data that is not the recorded one outside it."""
    for field in _SOURCES:
        text = getattr(recipe, field)
        require_trusted_loader(text, recorded.get(text, ""), folder, trust=trust)
