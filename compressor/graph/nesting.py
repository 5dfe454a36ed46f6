"""A flat graph's forward in, one that is called as the model is and answers in the model's own containers out.

For whoever trains the network further: their loop passes a dictionary or keywords where the model takes them, and reads
the loss's inputs out of a dictionary, a dataclass or a tuple. Graphs inside the program stay flat (`interface`).
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..tensors import OUTPUT, Inputs, Outputs, as_tuple, mapped
from .interface import input_nodes, output_paths
from .program import call, evaluating, parameter_names, takes_by_name

_KINDS = inspect.Parameter.POSITIONAL_OR_KEYWORD


@dataclass(frozen=True, slots=True, eq=False)
class Nesting:
    """How a model is called, and an answer of its own, `template`, whose tensors others take the place of.

    `inputs` are forward's names of the graph's inputs, in the graph's order, `positions` the same names in the order in
    which forward takes them. With `as_mapping`, forward takes one dictionary with those names.
    """

    inputs: tuple[str, ...]
    positions: tuple[str, ...]
    as_mapping: bool
    outputs: tuple[str, ...]
    template: object

    def flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The graph's inputs, in its order. Raises TypeError, as any function does, for what forward does not take."""
        if self.as_mapping and len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
            kwargs, args = args[0], []
        if len(args) > len(self.positions):
            raise TypeError(f"forward() takes {len(self.positions)} inputs but {len(args)} were given")
        named = dict(zip(self.positions, args, strict=False))
        for name, value in kwargs.items():
            if name in named:
                raise self._refused(f"got several values for {name!r}")
            if name not in self.inputs:
                raise self._refused(f"was traced without the argument {name!r}")
            named[name] = value
        missing = [name for name in self.inputs if name not in named]
        if missing:
            raise self._refused(f"lacks {', '.join(map(repr, missing))}")
        return [named[name] for name in self.inputs]

    def _refused(self, problem: str) -> TypeError:
        return TypeError(f"forward() {problem}; its inputs are {', '.join(self.inputs)}")

    def nested(self, answer: Outputs) -> object:
        """The graph's answer in the model's own containers."""
        return _filled(self.template, dict(zip(self.outputs, as_tuple(answer), strict=True)), "")


def nesting_of(
    model: nn.Module, graph: fx.GraphModule, example: Inputs, keywords: Sequence[str] = ()
) -> Nesting | None:
    """What `model`, which the graph was traced from, is called with and answers with; None where the graph's is that.

    `model` lies where `example` does.
    """
    with torch.no_grad(), evaluating(model):
        answer = call(model, mapped(Tensor.clone, example), keywords)
    outputs = output_paths(graph)
    hollow = _filled(answer, dict.fromkeys(outputs, torch.empty(0)), "")
    if keywords:
        as_mapping = not takes_by_name(model, keywords)
        positions = tuple(keywords) if as_mapping else _in_order(model, keywords)
        return Nesting(tuple(keywords), positions, as_mapping, outputs, hollow)

    input_count = len(as_tuple(example))
    placeholders = tuple(node.name for node in input_nodes(graph))
    positions = parameter_names(model)[:input_count]
    if len(positions) < input_count:
        positions = placeholders
    if isinstance(answer, Tensor) and positions == placeholders:
        return None
    return Nesting(positions, positions, False, outputs, hollow)


def _in_order(model: nn.Module, keywords: Sequence[str]) -> tuple[str, ...]:
    """The keywords as forward takes them by position; as they are where it does not name all of them."""
    in_order = tuple(name for name in parameter_names(model) if name in keywords)
    return in_order if len(in_order) == len(keywords) else tuple(keywords)


def with_nesting(forward: Callable[..., Any], nesting: Nesting) -> Callable[..., Any]:
    """A method that is called as the model is, around the flat one."""

    def nested(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        return nesting.nested(forward(self, *nesting.flat(args, kwargs)))

    parameters = [inspect.Parameter(name, _KINDS) for name in ("self", *nesting.positions) if name.isidentifier()]
    nested.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # a later tracing counts them
    return nested


def _filled(template: Any, leaves: Mapping[str, Tensor], path: str) -> Any:
    """The template with tensors by the names that `tensors.named_leaves` gives them; what has none stays."""

    def filled(entries: Iterable[tuple[object, object]]) -> dict[object, object]:
        return {key: _filled(value, leaves, _below(path, key)) for key, value in entries}

    made: Callable[..., object] = type(template)
    # a named tuple is a tuple, and some answers are dictionaries and dataclasses at once: the first case that fits
    match template:
        case Tensor():
            return leaves.get(path or OUTPUT, template)
        case Mapping():
            return _mapping_like(template, filled(template.items()))
        case _ if dataclasses.is_dataclass(template) and not isinstance(template, type):
            return _dataclass_like(template, filled(_fields_of(template)))
        case tuple() if hasattr(template, "_fields"):  # a named one
            return made(*filled(zip(template._fields, template, strict=True)).values())
        case tuple() | list():
            return made(filled(enumerate(template)).values())
        case _:
            return template


def _fields_of(template: Any) -> Iterator[tuple[str, object]]:
    for field in dataclasses.fields(template):
        yield field.name, getattr(template, field.name)


def _dataclass_like(template: object, values: Mapping[object, object]) -> object:
    """A copy with those values, of a frozen one too."""
    changed = copy.copy(template)
    for name, value in values.items():
        object.__setattr__(changed, str(name), value)
    return changed


def _below(path: str, key: object) -> str:
    """The name of an entry: of `{"boxes": [a, b]}` b is `boxes.1`, of `(a, b)` it is `output.1`."""
    if path:
        return f"{path}.{key}"
    return f"{OUTPUT}.{key}" if isinstance(key, int) else str(key)


def _mapping_like(template: Mapping[Any, Any], entries: dict[object, object]) -> Mapping[Any, Any]:
    """Of the template's own class, where that is made of its entries; else a dictionary."""
    made: Callable[..., Any] = type(template)
    try:
        # Hugging Face's answers are both a dictionary and a dataclass
        mapping = made(**entries) if dataclasses.is_dataclass(template) else made(entries)
        assert isinstance(mapping, Mapping)
    except Exception:  # a class of the user's own, made in some other way
        return entries
    return mapping
