"""TOML text in, tables out, by the standard library's reader or, before Python 3.11, by the package it came from."""

from __future__ import annotations

import sys
from typing import Any


def parse_toml(text: str) -> dict[str, Any]:
    """Raises ValueError for what is no TOML, RecursionError for what is nested too deeply."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # a device lists criteria without it
    return tomllib.loads(text)
