"""A Python file or a module of the user's and a name in, what it holds under that name out, imported as when it is run.

`trust` says whether code that a folder names may be imported. Knows neither models nor data.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import InputError, did_you_mean
from ..graph.program import raised_at


@contextmanager
def code_of(place: str, name: str, *, role: str, error: type[InputError], callables: bool = True) -> Iterator[Any]:
    """What `file.py` or `package.module` holds under that name; modules beside it can be imported inside the block.

    `role` is what it is called in errors, of the given type: for a file or a name that is not there, and for code that
    raises when it is imported. `callables`: anything else is as good as not there.
    """
    parent = Path(place).expanduser().parent if place.endswith(".py") else Path.cwd()
    folder = str(parent.resolve())
    sys.path.insert(0, folder)  # as when the user's file is run as a script
    try:
        yield _attribute(_imported(place, role, error), name, place, role=role, error=error, callables=callables)
    finally:
        sys.path.remove(folder)


def _imported(place: str, role: str, kind: type[InputError]) -> ModuleType:
    try:
        if place.endswith(".py"):
            return _file_module(Path(place).expanduser(), role, kind)
        return importlib.import_module(place)
    except kind:
        raise
    except ModuleNotFoundError as error:
        hint = did_you_mean(place, ["torchvision", "timm", "transformers"])
        raise kind(
            f"module {error.name!r} is not here, needed for {place!r}.{hint} Install it, or run in its folder"
        ) from error
    except Exception as error:
        named = f"{type(error).__name__}{at_line(error)}: {error}"
        raise kind(f"importing {place!r} raised {named}; correct that file") from error


def at_line(error: Exception) -> str:
    """` (at nets.py:12)` for an error of the user's code."""
    place = raised_at(error)
    if not place:
        return ""
    return f" (at {place})"


def _file_module(path: Path, role: str, kind: type[InputError]) -> ModuleType:
    if not path.is_file():
        raise kind(f"there is no file {str(path)!r}; give the Python file that holds the {role}")
    resolved = str(path.resolve())
    name = f"{path.stem}_{hashlib.sha256(resolved.encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the like look their own module up while it is executed
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(
    module: ModuleType, name: str, place: str, *, role: str, error: type[InputError], callables: bool
) -> object:
    value: object = getattr(module, name, None)
    suits = callable(value) or not callables
    if value is None or not suits:
        choices = [key for key, other in vars(module).items() if callable(other) and not key.startswith("_")]
        raise error(f"{place!r} has no {role} {name!r}.{did_you_mean(name, choices)}")
    return value
