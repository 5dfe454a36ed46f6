"""The console's entry point: the device's verbs work with numpy and one runtime, the rest needs the extra."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Sequence

from . import __version__
from .device.__main__ import VERBS, load_commands
from .device.__main__ import main as on_device
from .device.isolation import leave_current_folder
from .errors import CompressorError, MissingPackageError
from .launch import launched_rank

_CONTINUED = ("compress", "rebundle", "ship", "search", "benchmark")
_INTERRUPTED = 130
_PATIENCE_S = 3.0
_NEEDED = ("torch", "torchvision", "onnx", "safetensors", "typer")
_HELP: tuple[list[str], ...] = ([], ["--help"], ["--help-all"], ["-h"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code. Errors of the tree are one line on stderr."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    verb = words[0] if words else ""
    if verb == "--version":
        print(f"compressor {__version__}")
        return 0
    if verb in VERBS:
        return on_device(words)
    # only now: it brings numpy, which takes longer to import than the version takes to print
    commands = load_commands()
    if commands is None:
        return MissingPackageError.exit_code
    return int(commands.guarded(lambda: _compress(words)))


def _compress(arguments: list[str]) -> int:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _without(missing, arguments)
    try:
        app = importlib.import_module("compressor.cli").app
        app(args=arguments, prog_name="compressor")
    except CompressorError:
        if launched_rank() > 0:  # the first process fails for the same reason and says so: `torchrun` ends this one
            time.sleep(_PATIENCE_S)
        raise
    except SystemExit as end:
        if isinstance(end.code, int):
            return end.code
        return 0 if end.code is None else 1
    except KeyboardInterrupt:
        is_continued = bool(arguments) and arguments[0] in _CONTINUED
        remedy = "; the same command goes on from here" if is_continued else ""
        print(f"interrupted{remedy}", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _without(missing: Sequence[str], arguments: list[str]) -> int:
    """What works without the compressor's own packages. Raises MissingPackageError for anything else."""
    if arguments in _HELP:
        return on_device([])  # the help of what works here
    verb = arguments[0]
    if verb == "benchmark":
        return on_device(arguments)  # times a bundle's models with a runtime alone
    if verb == "list":
        from .listing import print_lists

        return print_lists(arguments[1:])
    raise MissingPackageError(
        f"{', '.join(missing)} not installed, which everything but {', '.join(VERBS)}, list and benchmark of a "
        "bundle needs: pip install 'compressor[compress]'"
    )


if __name__ == "__main__":
    leave_current_folder()
    sys.exit(main())
