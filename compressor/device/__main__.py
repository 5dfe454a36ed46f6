"""`python -m compressor.device VERB BUNDLE`: what an edge box does with a bundle.

Standard library and numpy only, and neither from the current folder, which may be the bundle's.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from ..errors import MissingPackageError, first_line
from .isolation import leave_current_folder

VERBS = ("verify", "run", "build", "pack", "unpack")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code; every error of the tree is one line on stderr."""
    commands = load_commands()
    if commands is None:
        return MissingPackageError.exit_code
    return int(commands.guarded(lambda: commands.run_command(arguments)))


def load_commands() -> ModuleType | None:
    """What needs numpy, only once the current folder is off the path; None, and a line on stderr, where it is not."""
    try:
        return importlib.import_module(f"{__package__}.commands")
    except ImportError as error:
        reason = first_line(error)
        print(f"error: numpy can't be imported ({reason}): {sys.executable} -m pip install numpy", file=sys.stderr)
        return None


if __name__ == "__main__":
    leave_current_folder()
    sys.exit(main())
