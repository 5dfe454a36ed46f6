"""A record of options in, flags of a command out: one for each field, grouped, the most used ones shown first.

Knows what a value looks like on the command line, not what it does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperOption

from ..recipe import Recipe, read_recipe
from ..searching.options import SearchOptions, make_options

Record = Recipe | SearchOptions
# the command's arguments, from which the reader takes what is its own, and the record's fields in; the record out
ReadRecord = Callable[[dict[str, object], Mapping[str, object]], Record]

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY

# what a value looks like; a switch has none
METAVARS = {
    "bool": "",
    "int": "WHOLE",
    "float": "NUMBER",
    "tuple[int, ...]": "WHOLE,...",
    "tuple[float, ...]": "NUMBER,...",
}

# each panel of --help begins at a field of the recipe
PANELS = {
    "model": "Model",
    "data": "Images",
    "batch_size": "Computing",
    "criterion": "Relevance",
    "budget": "Budget and ranking",
    "compensate": "Repair and recovery",
    "targets": "Files, engines and timing",
    "max_accuracy_loss": "Gates and folder",
}

# what most runs are told; --help shows these, --help-all the rest too
USUAL = frozenset(
    {"model", "weights", "data", "evaluation_data", "size", "device", "criterion", "budget", "units"}
    | {"recovery_minutes", "precisions", "targets", "out", "trials"}
)


def without_kinds(parameters: list[Any]) -> list[Any]:
    """The parameters, switches among them shown without the `<bool>` that typer writes beside its own."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False) and parameter.metavar is None:
            parameter.metavar = ""
    return parameters


class Verb(TyperCommand):
    """A command whose help shows switches, typer's own too, without a kind of value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """What typer reads and shows."""
        return without_kinds(super().get_params(ctx))


def show_all(context: typer.Context, asked: bool) -> None:
    """Prints the help with the flags that `--help` leaves out, and ends."""
    if not asked:
        return
    for parameter in context.command.params:
        if isinstance(parameter, TyperOption):
            parameter.hidden = False
    typer.echo(context.get_help())
    raise typer.Exit


_HELP_ALL = inspect.Parameter(
    "help_all",
    KEYWORD_ONLY,
    annotation=bool,
    default=typer.Option(
        False, "--help-all", help="show every flag and end", is_eager=True, callback=show_all, metavar=""
    ),
)


def with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command a `--recipe` file and one flag for each field of a recipe."""
    help_text = "TOML file of the fields below; each run writes one"
    file = inspect.Parameter(
        "recipe_file",
        KEYWORD_ONLY,
        annotation=Path | None,
        default=typer.Option(None, "--recipe", help=help_text, metavar="FILE"),
    )

    def read(arguments: dict[str, object], values: Mapping[str, object]) -> Recipe:
        del arguments["help_all"]  # it has ended the command where it was asked for
        path = arguments.pop("recipe_file")
        assert path is None or isinstance(path, Path)
        return read_recipe(path, **values)

    return _with_record(command, "recipe", Recipe, read, more=(file, _HELP_ALL))


def with_search(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command one flag for each of the search's own options."""

    def read(arguments: dict[str, object], values: Mapping[str, object]) -> SearchOptions:
        return make_options(values)

    return _with_record(command, "options", SearchOptions, read, panel="Search")


def _with_record(
    command: Callable[..., None],
    argument: str,
    record: type[Record],
    read: ReadRecord,
    *,
    more: Sequence[inspect.Parameter] = (),
    panel: str = "",
) -> Callable[..., None]:
    """The command with flags for a record's fields in place of `argument`; `read` makes the record of their values."""
    parameters = inspect.signature(command, eval_str=True).parameters
    kept = [
        parameter.replace(kind=KEYWORD_ONLY)  # in a signature nothing by position follows these flags
        for name, parameter in parameters.items()
        if name != argument
    ]
    flags = [_parameter(field, panel or panel_of(field.name)) for field in fields(record)]

    def wrapped(**arguments: object) -> None:
        values = {field.name: arguments.pop(field.name) for field in fields(record)}
        command(**{argument: read(arguments, values)}, **arguments)

    # what typer reads: the signature, the name, and the docstring as help
    wrapped.__signature__ = inspect.Signature([*more, *flags, *kept])  # type: ignore[attr-defined]
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


def _parameter(field: Field[object], panel: str) -> inspect.Parameter:
    # text, which the record reads itself: its messages are the same for flags and files
    annotation = bool | None if field.type == "bool" else str | None
    return inspect.Parameter(field.name, KEYWORD_ONLY, annotation=annotation, default=_option(field, panel))


def _option(field: Field[object], panel: str) -> object:
    """What typer makes a flag of: its name, help and default."""
    word = field.name.replace("_", "-")
    declaration = f"--{word}/--no-{word}" if field.type == "bool" else f"--{word}"
    default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    shown_default = escape(f" [{default}]") if default != "" else ""
    option: object = typer.Option(
        None,  # not the default: only what was given goes over the recipe's file
        declaration,
        help=field.metadata["help"] + shown_default,
        show_default=False,
        rich_help_panel=panel,
        metavar=_metavar(str(field.type)),
        hidden=field.name not in USUAL,
    )
    return option


def _metavar(kind: str) -> str:
    """`TEXT,...` for several names, `TEXT` for one, as METAVARS for the rest."""
    if kind in METAVARS:
        return METAVARS[kind]
    return "TEXT,..." if kind.startswith("tuple") else "TEXT"


def panel_of(name: str) -> str:
    """The panel that a recipe's field stands in."""
    names = [field.name for field in fields(Recipe)]
    position = names.index(name)
    begun = [panel for first, panel in PANELS.items() if names.index(first) <= position]
    return begun[-1]
