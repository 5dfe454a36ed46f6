"""The command line: `commands` has one function a verb, `flags` makes options of records,
`screen` and `tables` show."""

from .commands import app

__all__ = ["app"]
