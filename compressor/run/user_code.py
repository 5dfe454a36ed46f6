"""A recipe in; the user's code that it names, by the hash of its file, and whether a folder's recipe may run it, out.

The rule is `inputs.trust`'s, the same as for a model's builder. Code of the task (`quality` and the like) is recorded
as data's is, and no folder's recipe runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..inputs.trust import loader_sha256, require_trusted_loader
from ..recipe import Recipe
from .task_choice import PARTS

_SOURCES = ("data", "evaluation_data")


def code_sha256s(recipe: Recipe) -> dict[str, str]:
    """By what the recipe says (`data = my.py:loader`) the file's hash; without code, or a file of it, there is none."""
    fields = {field: getattr(recipe, field) for field in (*_SOURCES, *PARTS)}
    hashes = {line_of(field, text): loader_sha256(text) for field, text in fields.items()}
    return {line: sha256 for line, sha256 in hashes.items() if sha256}


def line_of(field: str, text: str) -> str:
    """How a recipe says it: one file's functions are each recorded for what they serve as."""
    return f"{field} = {text}"


def require_trusted_data(recipe: Recipe, recorded: Mapping[str, str], folder: Path, *, trust: bool = False) -> None:
    """Raises DataError where the recipe of a folder names code for its data that is not the recorded one outside it."""
    for field in _SOURCES:
        text = getattr(recipe, field)
        require_trusted_loader(text, recorded.get(line_of(field, text), ""), folder, trust=trust)
