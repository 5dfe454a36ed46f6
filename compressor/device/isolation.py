"""Where this program and its workers look for modules: never in the current folder, which may hold anything.

`python -m` puts that folder first, an empty entry of PYTHONPATH puts it somewhere: a bundle from elsewhere could
bring an onnxruntime.py of its own. What Python itself imports before our first line can't be helped from here; the
installed command `compressor` has no such moment.
"""

from __future__ import annotations

import os
import sys

_OWN_OPTION_SINCE = (3, 11)  # python -P
# `-c` puts "" first, after Python has started and before this runs.
_BY_HAND = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import runpy
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


def command(module: str, version: tuple[int, ...] = sys.version_info[:2]) -> list[str]:
    """What runs `module` in a Python like this one, without the current folder on its path."""
    if version >= _OWN_OPTION_SINCE:
        return [sys.executable, "-P", "-m", module]
    return [sys.executable, "-c", _BY_HAND.format(module=module)]


def environment() -> dict[str, str]:
    """This process's, in which a child finds this very package, also where it is not installed."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    elsewhere = [entry for entry in entries if os.path.normpath(entry) != os.curdir]  # "" is the current folder too
    return {**os.environ, "PYTHONPATH": os.pathsep.join([_root(), *elsewhere])}


def leave_current_folder() -> None:
    """Takes back what `python -m` put first on the path, unless this package itself lies there."""
    if getattr(sys.flags, "safe_path", False) or not sys.path:  # with -P Python put nothing there
        return
    first = os.path.abspath(sys.path[0])
    if first == os.getcwd() and os.path.realpath(first) != _root():
        del sys.path[0]


def _root() -> str:
    package = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    return os.path.dirname(package)
