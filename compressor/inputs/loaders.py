"""`file.py:loader` in, what that function returns, or what stands there ready, out.

Knows nothing of what data are; `data` does. Code that a run's folder names is for `trust` to allow first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from ..errors import DataError
from .blame import raised
from .calls import parse_call, place_and_name
from .code import code_of


def called_loader(source: str) -> object:
    """The data of `file.py:name` or `package.module:name`, with literal arguments or without.

    Of a function what it returns, but itself where that can be gone through only once. Raises DataError for what is
    not there, and for code that raises.
    """
    place, _ = place_and_name(source)
    name, arguments = parse_call(source[len(place) + 1 :])
    with code_of(place, name, role="loader", error=DataError, callables=False) as loader:
        if not _is_function(loader):
            return loader
        function: Callable[[], object] = functools.partial(loader, **arguments)
        try:
            returned = function()
        except Exception as error:
            raise DataError(f"{source!r} raised {raised(error)}; correct it there") from error
        return function if isinstance(returned, Iterator) else returned


def _is_function(loader: object) -> bool:
    """A function or a class; what can be read already is data."""
    return callable(loader) and (isinstance(loader, type) or not hasattr(loader, "__getitem__"))
