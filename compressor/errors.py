"""Every error the product raises on purpose.

The number is the exit code that it ends a command with::

    CompressorError                1   anything below
    ├── InputError                 2   what the user gave can't be used (model, images, recipe, folder)
    │   ├── ModelError                 a model can't be built, traced, loaded or run
    │   ├── DataError                  images or labels can't be read
    │   ├── RecipeError                an option has no such value
    │   ├── TaskError                  a user's own metric, loss or decoder fails or answers with what it must not
    │   └── FolderError                an output folder holds something else, or can't be written
    ├── BudgetError                3   no plan meets the budget; the nearest reachable figure is named
    ├── GateError                  4   a finished result is not good enough: identity, parity, accuracy, latency
    ├── EngineError                5   an engine can't be built, or no model run, on this machine
    ├── MissingPackageError        6   an optional package, such as a runtime's library, is not installed
    ├── HostError                  7   a device can't be reached, refuses, or ends in the middle
    └── RanksError                 8   another process of a run under torchrun failed, or can't be reached
"""

from __future__ import annotations


class CompressorError(Exception):
    """What every error of the product is; `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(CompressorError):
    """What was given can't be used; the message says what to give instead."""

    exit_code = 2


class ModelError(InputError):
    """A model that can't be built, loaded, traced or run, or a checkpoint that does not fit it."""


class DataError(InputError):
    """Images or labels that are not there, can't be read, are too few or name no class of the model."""


class RecipeError(InputError):
    """An option that has no such value, or one that is missing."""


class TaskError(InputError):
    """A user's own metric, loss or decoder that raises, or answers with what it must not."""


class FolderError(InputError):
    """A folder that holds something else, was changed, is in use or can't be written."""


class BudgetError(CompressorError):
    """No plan meets the budget; the message names one that can be met."""

    exit_code = 3


class GateError(CompressorError):
    """A finished result or a bundle is not good enough, or not what its hashes say; nothing ships."""

    exit_code = 4


class EngineError(CompressorError):
    """An engine can't be built, or no model run, on this machine; the message says what it lacks."""

    exit_code = 5


class MissingPackageError(CompressorError):
    """An optional package is not installed; the message says what to install."""

    exit_code = 6


class HostError(CompressorError):
    """A device over SSH that can't be reached, lacks something or ends in the middle; the message names it."""

    exit_code = 7


class RanksError(CompressorError):
    """Another process of a run under `torchrun` failed or can't be reached; the message says how to go on."""

    exit_code = 8


def first_line(error: BaseException, longest: int = 200) -> str:
    """The first line of an error's text, at most `longest` characters of it; its type's name where it has no text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:longest]


def with_article(noun: str) -> str:
    """`a list`, `an OrderedDict`: the name of a type as a message says it."""
    vowel = noun[:1].lower() in "aeio" or noun.startswith("nd")  # numpy's array begins with the letter's name
    return f"an {noun}" if vowel else f"a {noun}"


def did_you_mean(name: str, choices: list[str]) -> str:
    """` Did you mean 'resnet18'?`, or an empty string when nothing is close."""
    import difflib  # needed where something went wrong, and by nothing else

    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(choice) for choice in close)}?" if close else ""


def unwritten_temporary(error: OSError) -> FolderError:
    """What to say, and to do, where a temporary file can't be written."""
    reason = f"can't write {error.filename or 'a temporary file'}: {error.strerror or error}"
    return FolderError(f"{reason}; free some space, or name another place in TMPDIR")
