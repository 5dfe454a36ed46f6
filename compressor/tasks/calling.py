"""A user's own function called: whatever it raises is a TaskError that names the function, its file and its line."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

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
    bare: object = function
    while isinstance(bare, functools.partial):
        bare = bare.func
    bare = inspect.unwrap(bare) if callable(bare) else bare
    if not inspect.isroutine(bare):
        bare = type(bare).__call__ if callable(bare) else bare  # an object that is called: its method
    code = getattr(bare, "__code__", None)
    name = name_of(function)
    return name if code is None else f"{name} ({code.co_filename}, line {code.co_firstlineno})"


def name_of(function: Callable[..., object]) -> str:
    """The function's name, that of an object's class."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))
