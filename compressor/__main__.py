"""The console's entry point: the device's verbs work with numpy and one runtime, the rest needs the extra."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

from .device.__main__ import VERBS, guarded
from .device.__main__ import main as device_main
from .errors import MissingPackageError

_NEEDED = ("torch", "torchvision", "onnx", "safetensors", "typer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code. Errors of the tree are one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in VERBS:
        return device_main(given)
    return guarded(lambda: _compress(given))


def _compress(arguments: list[str]) -> int:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing and arguments[:1] == ["benchmark"]:
        return device_main(arguments)  # times a bundle's models with a runtime alone
    if missing:
        raise MissingPackageError(
            f"{', '.join(missing)} not installed, which everything but {', '.join(VERBS)} needs: "
            "pip install 'compressor[compress]'"
        )
    app = importlib.import_module("compressor.cli").app
    try:
        app(args=arguments, prog_name="compressor")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
