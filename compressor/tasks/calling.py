"""A user's own function called: whatever it raises is a TaskError that names the function, its file and its line."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..errors import CompressorError, TaskError
from ..inputs.blame import raised


def call(function: Callable[..., object], role: str, *arguments: object) -> object:
    """What the function answers. Raises TaskError for what it raises, but lets the product's own errors through."""
    try:
        return function(*arguments)
    except (CompressorError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise TaskError(f"{place_of(function)}, given as {role}, raises {raised(error)}") from error


def place_of(function: Callable[..., object]) -> str:
    """`my_map (metrics.py, line 12)`, as far as Python knows."""
    bare: Any = inspect.unwrap(_without_arguments(function))
    if not inspect.isroutine(bare):
        bare = type(bare).__call__  # an object that is called: its method
    code = getattr(bare, "__code__", None)
    name = name_of(function)
    if code is None:
        return name
    return f"{name} ({code.co_filename}, line {code.co_firstlineno})"


def name_of(function: Callable[..., object]) -> str:
    """The function's name, that of an object's class."""
    bare = _without_arguments(function)
    return str(getattr(bare, "__name__", type(bare).__name__))


def _without_arguments(function: Callable[..., object]) -> Callable[..., object]:
    """The function of a `functools.partial`."""
    while isinstance(function, functools.partial):
        function = function.func
    return function
