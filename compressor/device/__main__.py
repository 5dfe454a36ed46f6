"""`python -m compressor.device VERB BUNDLE`: what an edge box does with a bundle.

Standard library and numpy only, and neither from the current folder, which may be the bundle's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .isolation import leave_current_folder

VERBS = ("verify", "run", "build", "pack", "unpack")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code; every error of the tree is one line on stderr."""
    from .commands import guarded, run_command  # numpy: only once the current folder is off the path

    return guarded(lambda: run_command(arguments))


if __name__ == "__main__":
    leave_current_folder()
    sys.exit(main())
