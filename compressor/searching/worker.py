"""One more process at the trials of a search (`crew`): a line of JSON in, its trials into the study.

It writes no file, and ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from ..device.commands import guarded

FORCE_S = 20.0
_INTERRUPTED = 130


def main() -> int:
    """The exit code; errors of the tree are one line on stderr."""
    # a shell's background jobs ignore it, and pass that on
    signal.signal(signal.SIGINT, signal.default_int_handler)
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    return guarded(lambda: _work(request))


def _end_with_input() -> None:
    """Interrupts this process like Ctrl-C once nobody holds the other end; by force where that does nothing."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(FORCE_S)
    os._exit(_INTERRUPTED)


def _work(request: Mapping[str, Any]) -> int:
    from ..recipe import make_recipe
    from .flow import join_trials
    from .options import make_options

    join_trials(make_recipe(request["recipe"]), make_options(request["options"]), request["study"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
