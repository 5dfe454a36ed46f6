"""`name(key=1, other='x')` in, the name and its keyword arguments out; only literals, nothing is evaluated."""

from __future__ import annotations

import ast
from pathlib import Path

from ..device.listings import is_file
from ..errors import RecipeError

LIBRARIES = ("torchvision", "timm", "transformers")
"""What stands before the colon of a library's model or data set."""


SPLITS = "dataset_dict.json"
"""What a folder of several saved data sets has in it."""


def names_split(text: str) -> bool:
    """Whether it is `FOLDER:split` of a folder that the package datasets saved."""
    place, _, name = text.rpartition(":")
    return bool(place and name) and is_file(Path(place).expanduser() / SPLITS)


def names_code(text: str) -> bool:
    """Whether it is `file.py:name` or `package.module:name`, with arguments or without: code of the user's."""
    if names_split(text):
        return False
    place, name = place_and_name(text)
    if not name.isidentifier() or place in (*LIBRARIES, "digits", "digits-masks", "digits-boxes"):
        return False
    return place.endswith(".py") or all(part.isidentifier() for part in place.split("."))


def place_and_name(text: str) -> tuple[str, str]:
    """`file.py:name(key=1)` to ("file.py", "name"); without a colon the place is empty."""
    place, _, name = text.partition("(")[0].rpartition(":")
    return place, name


def parse_call(text: str) -> tuple[str, dict[str, object]]:
    """`resnet18(num_classes=2)` to ("resnet18", {"num_classes": 2}); a bare name has no arguments.

    Raises RecipeError for arguments without names, and for values that are no literals.
    """
    if not text.endswith(")"):
        return text, {}
    name, _, inside = text[:-1].partition("(")
    try:
        call = ast.parse(f"f({inside})", mode="eval").body
        assert isinstance(call, ast.Call)  # `a(1)+(2)` is read as `f(1)+(2)`, which is none
        return name, _keywords(call)
    except (SyntaxError, ValueError, TypeError, AssertionError, RecursionError, MemoryError) as error:
        raise RecipeError(
            f"{text!r} can't be read ({error}); write name(key=value, ...) with plain numbers, strings or lists"
        ) from error


def _keywords(call: ast.Call) -> dict[str, object]:
    """A call's arguments by name. Raises ValueError for one without a name, and for a value that is no literal."""
    if call.args or any(keyword.arg is None for keyword in call.keywords):  # a `**mapping` has none
        raise ValueError("every argument needs its name")
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
