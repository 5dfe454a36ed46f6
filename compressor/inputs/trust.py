"""A builder that a folder names in, whether its code may be run here out.

A folder is data; a builder is code. Code is run without a word only where it can't be the folder's: a library's
model by plain arguments, or a file outside the folder that is, byte for byte, the one the run was made with.
"""

from __future__ import annotations

import importlib.machinery
import sys
import sysconfig
from pathlib import Path

from ..errors import CompressorError, DataError, ModelError, RecipeError
from ..files import file_sha256
from .calls import LIBRARIES, names_code, parse_call, place_and_name

_TRUST = "read it, and if you trust it give --trust (in Python trust=True)"
_REMEDY = f"{_TRUST}, or give the model itself"


def builder_sha256(builder: str) -> str:
    """The hash of the file that holds the builder's code; empty for libraries' models and where there is no file."""
    path = _code_of(builder)
    if path is None:
        return ""
    return file_sha256(path)


def require_trusted(builder: str, sha256: str, folder: Path, *, trust: bool = False) -> None:
    """Raises ModelError naming the code that the folder names and why it is not run; `sha256` is what was recorded."""
    if trust or _is_embedded(builder):
        return

    source, _, call = builder.partition(":")
    if source in LIBRARIES:
        _require_plain(call, builder, folder)
        return

    objection = _objection_to(builder, sha256, folder, role="builder", instead="the model itself")
    if objection:
        raise ModelError(objection)


def loader_sha256(source: str) -> str:
    """The hash of the file that holds the code of `file.py:loader`; empty for data that need none of the user's."""
    if not names_code(source):
        return ""
    return builder_sha256(source)


def require_trusted_loader(source: str, sha256: str, folder: Path, *, trust: bool = False) -> None:
    """As `require_trusted`, with DataError, of the code that the folder names for its data; other sources are none."""
    if trust or not names_code(source):
        return
    objection = _objection_to(source, sha256, folder, role="loader", instead="other data")
    if objection:
        raise DataError(objection)


def require_trusted_function(spec: str, sha256: str, folder: Path, *, trust: bool = False) -> None:
    """As `require_trusted`, with RecipeError, of a function that the folder's recipe names (`metrics.py:quality`)."""
    if trust:
        return
    objection = _objection_to(spec, sha256, folder, role="function", instead="the function itself")
    if objection:
        raise RecipeError(objection)


def _objection_to(code: str, sha256: str, folder: Path, *, role: str, instead: str) -> str:
    """Why code that the folder names is not run, and what to do; empty where nothing is against it."""
    path = _code_of(code)
    if path is None:
        place, _ = place_and_name(code)
        return (
            f"the folder {str(folder)!r} names the {role} {code!r}, and there is no file of {place!r} here to "
            f"compare with the one it was made with; run in the folder where that lies, or give {instead}"
        )
    reason = _objection(path, sha256, folder)
    if not reason:
        return ""
    return f"the folder {str(folder)!r} names code to run, {str(path)!r}, {reason}; {_TRUST}, or give {instead}"


def _is_embedded(builder: str) -> bool:
    """A model of the project's own: a name without a place."""
    return ":" not in builder


def _require_plain(call: str, builder: str, folder: Path) -> None:
    """Libraries' models take files, and some of them are unpickled: numbers, switches and plain words alone pass."""
    try:
        arguments = parse_call(call)[1]
    except CompressorError:
        return  # the loader says what is wrong with it, and runs nothing
    suspect = [name for name, value in arguments.items() if not _is_plain(value)]
    if suspect:
        raise ModelError(
            f"the folder {str(folder)!r} names the builder {builder!r}, whose argument {suspect[0]!r} may name a file "
            f"to load; {_REMEDY}"
        )


def _is_plain(value: object) -> bool:
    """A number, a switch, or text that is no path: letters, digits and underscores."""
    match value:
        case None | bool() | int() | float():
            return True
        case list() | tuple():
            return all(map(_is_plain, value))
        case str():
            return value.replace("_", "").isalnum()
        case _:
            return False


def _objection(path: Path, sha256: str, folder: Path) -> str:
    """Why a file's code is not run; empty where nothing is against it."""
    resolved = path.resolve()
    if not sha256:
        return "whose hash it does not hold"
    if file_sha256(resolved) != sha256:
        return "which is not the file it was made with: its hash is another"
    if resolved.is_relative_to(folder.resolve()):
        return "which came along inside it: that its hash fits says nothing"
    if is_installed(resolved):
        return "which is an installed library's: any of its functions could be named"
    return ""


def is_installed(path: Path) -> bool:
    """Whether a file is Python's or a library's, and not the user's."""
    if {"site-packages", "dist-packages"}.intersection(path.parts):
        return True
    folders = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return any(path.is_relative_to(folder) for folder in folders)


def _code_of(builder: str) -> Path | None:
    """The file of `file.py:factory` or, without importing anything, of `package.module:factory` run from here.

    None for libraries' and embedded models, and where no such file is there.
    """
    source, _, _ = builder.partition(":")
    if source in LIBRARIES or _is_embedded(builder):
        return None
    place, _ = place_and_name(builder)
    path = Path(place).expanduser() if place.endswith(".py") else _module_file(place)
    if path is None or not path.is_file():
        return None
    return path


def _module_file(place: str) -> Path | None:
    """Where Python would find the module; packages on the way are looked through, not imported."""
    search = [str(Path.cwd()), *sys.path]
    origin = None
    for name in place.split("."):
        spec = importlib.machinery.PathFinder.find_spec(name, search)
        if spec is None:
            return None
        search = list(spec.submodule_search_locations or [])
        origin = spec.origin if spec.has_location else None  # a package without a file has none
    if origin is None:
        return None
    return Path(origin)
