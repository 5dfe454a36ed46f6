"""A function that builds a model in, the module it gives out, or an error that says what went wrong and what to do.

What every library's names come to (`Built`), before weights are filled in and the module is made ready.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..errors import ModelError
from .code import at_line
from .decoding import NamedDecode
from .images import Preprocessing

_LONGEST_LINE = 300  # characters of a library's own error that are shown


@dataclass(frozen=True, slots=True)
class Built:
    """A module as its library builds it, with what the library says of its images; `notes` are for the report.

    `licence` is of the weights, as their source states it, and empty where it does not or they are others.
    """

    module: nn.Module
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    decode: NamedDecode | None = None
    licence: str = ""


def called(build: Callable[[], object], spec: str, *, downloads: bool) -> nn.Module:
    """The model that `build` makes. Raises ModelError for whatever it raises, and for what is no module."""
    try:
        module = build()
    except ModelError:
        raise
    except Exception as error:
        raised = f"{type(error).__name__}{at_line(error)}: {first_line_of(error)}"
        if downloads and isinstance(error, OSError):
            raise ModelError(
                f"the default weights of {spec!r} can't be downloaded ({raised}); check the network, "
                "give a checkpoint file with --weights, or --weights none"
            ) from error
        raise ModelError(f"building {spec!r} raised {raised}; check its arguments: name(key=value)") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{spec!r} gave {type(module).__name__}, expected a torch.nn.Module")
    return module


def first_line_of(error: Exception) -> str:
    """The first line of a library's error."""
    message = str(error).strip() or "no message"
    return message.splitlines()[0][:_LONGEST_LINE]
